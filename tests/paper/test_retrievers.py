"""Other people's retrievers as zero-shot rows: two encoders, their modules as they are, and the dot product."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from adaptive_margins.data.collection import Collection, Texts
from adaptive_margins.encoder.checks import EncoderError
from adaptive_margins.encoder.load import encoder_identity, open_encoder
from adaptive_margins.encoder.tokens import tokenize
from adaptive_margins.paper.reproduction import Reproduction
from adaptive_margins.profiles.load import ProfileError, load_profile
from adaptive_margins.runs import ZeroShotRun
from conftest import RANDOM_TEXTS, SPECIAL, WORDS, write_retriever

LENGTHS = {"query": 9, "passage": 12}


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def in_a_subfolder(folder):
    """The layout of old Sentence Transformers folders, whose transformer is in 0_Transformer."""
    folder = Path(folder)
    (folder / "0_Transformer").mkdir()
    for path in [path for path in folder.iterdir() if path.is_file()]:
        if path.name not in ("modules.json", "config_sentence_transformers.json", "README.md"):
            path.rename(folder / "0_Transformer" / path.name)
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (folder / "modules.json").write_text(json.dumps(modules))
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("retrievers")
    mirrored = [*SPECIAL, *reversed(WORDS[5:])]
    short = write_retriever(base / "short", "bert", 9)
    edit(Path(short, "sentence_bert_config.json"), max_seq_length=6)
    edit(Path(short, "config_sentence_transformers.json"), similarity_fn_name="dot")
    return {
        "old": in_a_subfolder(write_retriever(base / "old", "bert", 7)),
        "mirrored": in_a_subfolder(write_retriever(base / "mirrored", "bert", 2, mirrored)),
        "short": short,
        "passages": write_retriever(base / "passages", "bert", 1),
        "queries": write_retriever(base / "queries", "bert", 2),
        "ance": write_retriever(base / "ance", "roberta", 3, linear=True),
        "tas-b": write_retriever(base / "tas-b", "distilbert", 4),
        "wide": write_retriever(base / "wide", "bert", 5, dim=8),
        "prompted": write_retriever(base / "prompted", "bert", 6, prompts={"query": "the node "}),
    }


@pytest.fixture
def reproduction(folders, tmp_path):
    """The profile smoke with retrievers, on a small collection of random texts."""
    retriever = {"pooling": "own", "similarity": "dot"}
    untrained = {
        "dpr": {"base": folders["passages"], "query_base": folders["queries"], **retriever},
        "ance": {"base": folders["ance"], **retriever},
        "tas-b": {"base": folders["tas-b"], **retriever},
        "cosine": {"base": folders["tas-b"], "pooling": "own"},
        **{name: {"base": folders[name], **retriever} for name in ("old", "mirrored", "short")},
        "short-cls": {"base": folders["short"], "pooling": "cls"},
        "wide": {"base": folders["passages"], "query_base": folders["wide"], "pooling": "own"},
        "prompted": {"base": folders["prompted"], "pooling": "own"},
    }
    values = load_profile("smoke").model_dump()
    values |= {"untrained": untrained, "lengths": LENGTHS, "workers": 1}
    opened = Reproduction(type(load_profile("smoke")).model_validate(values), tmp_path)
    texts = [text for text in dict.fromkeys(RANDOM_TEXTS) if len(text.split()) > 2]
    sets = {name: Texts([f"{name}{i}" for i in range(6)], texts[k : k + 6]) for k, name in
            enumerate(("validation", "test1", "test2"))}  # fmt: skip
    opened.inputs.collection = Collection(
        "Random",
        Texts([f"d{i}" for i in range(60)], texts[20:80]),
        sets,
        {name: {q: {f"d{i}": 3} for i, q in enumerate(s.ids)} for name, s in sets.items()},
    )
    return opened


@pytest.mark.parametrize(
    ("name", "passages", "queries"),
    [("dpr", "passages", "queries"), ("ance", "ance", "ance"), ("tas-b", "tas-b", "tas-b"), ("cosine", "tas-b", "tas-b"),
     ("short", "short", "short"), ("mirrored", "mirrored", "mirrored")],
)  # fmt: skip
def test_rankings_are_those_of_sentence_transformers(
    reproduction, folders, name, passages, queries
):
    """One text at a time, by the folders themselves; the dot product of embeddings of any length."""
    if name == "mirrored":  # the tokens of a retriever with the same files next to its transformer
        reproduction.zero_shot("old")
    run = reproduction.zero_shot(name)
    collection = reproduction.inputs.collection
    of_passages, of_queries = (
        SentenceTransformer(folders[x], device="cpu") for x in (passages, queries)
    )
    for model, key in ((of_passages, "passage"), (of_queries, "query")):
        model.max_seq_length = min(model.max_seq_length or 512, LENGTHS[key])
    unit = name == "cosine"
    docs = np.stack(
        [of_passages.encode(t, normalize_embeddings=unit) for t in collection.passages.texts]
    )
    if name not in ("cosine", "ance"):  # a layer norm makes them equal but for a little
        assert np.linalg.norm(docs, axis=1).std() > 0.01
    for mode, query_set in (("full", "test1"), ("full", "test2"), ("rerank", "validation")):
        hits = run.run(mode, query_set)
        texts = collection.queries[query_set]
        for qid in texts.ids:
            scores = docs @ of_queries.encode(texts[qid], normalize_embeddings=unit)
            found = hits[qid]
            assert len(found) == (50 if mode == "full" else 8)
            for docid, value in found.items():
                assert value == pytest.approx(
                    scores[collection.passages.row(docid)], rel=1e-4, abs=1e-4
                )
            if mode == "full":
                best = np.sort(scores)[::-1][: len(found)]
                np.testing.assert_allclose(
                    sorted(found.values(), reverse=True), best, rtol=1e-4, atol=1e-4
                )
    assert run.result["index"]["factory"] == "Flat"


def test_a_retrievers_own_limit_is_stated_and_its_similarity_used(reproduction):
    with pytest.warns(UserWarning, match="reads at most 6 tokens") as caught:
        loaded = reproduction.inputs.encoder("short")
    assert loaded.queries.lengths.max() == loaded.passages.lengths.max() == 6
    messages = [str(one.message) for one in caught]
    assert sum("reads at most" in text for text in messages) == 2  # queries and passages
    assert not any("similarity" in text for text in messages)
    assert loaded.whole.similarity_fn_name == "dot"
    longer = reproduction.inputs.encoder("short-cls")  # the same tokenizer
    assert (longer.queries.lengths.max(), longer.passages.lengths.max()) == (9, 12)
    with pytest.warns(UserWarning, match="'dot'; here, the cosine is used"):
        open_encoder(
            reproduction.profile.untrained["short"].model_copy(update={"similarity": "cosine"})
        )


def test_a_second_encoder_is_part_of_the_runs_identity(reproduction, folders):
    e, plain = reproduction.experiments, reproduction.profile.encoders["minilm-4"]
    assert e.zero_shot_run("minilm-4").weights == encoder_identity(
        plain
    )  # as before there were any
    dpr, tas, cosine = (e.zero_shot_run(name) for name in ("dpr", "tas-b", "cosine"))
    one, other = (encoder_identity(folders[x]) for x in ("passages", "queries"))
    assert dpr.weights == f"{one}, queries {other}, dot"
    assert tas.weights == f"{cosine.weights}, dot"
    assert len({dpr.run_id, tas.run_id, cosine.run_id}) == 3
    assert "query" not in " ".join(set(ZeroShotRun.model_fields) - {"query_length"})


def test_bad_retrievers_are_refused_before_anything_is_computed(reproduction, folders):
    with pytest.raises(
        EncoderError, match="'wide' has 16 dimensions for passages and 8 for queries"
    ):
        reproduction.zero_shot("wide")
    with pytest.raises(EncoderError, match="'prompted' has the prompt 'the node '"):
        reproduction.zero_shot("prompted")
    assert not (reproduction.home / "runs").exists()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ("encoders: {minilm-4: {layers: null, trained_layers: null, query_base: x}}",
         r"encoders\.minilm-4 has query_base: x, and cannot be trained; list it under untrained"),
        ("encoders: {minilm-4: {layers: null, trained_layers: null, pooling: own}}", "pooling: own"),
        ("encoders: {minilm-4: {layers: null, trained_layers: null, similarity: dot}}", "similarity: dot"),
        ("untrained: {minilm: {query_base: x}}", "trained_layers do not go with query_base: x"),
        ("untrained: {minilm: {query_revision: abc}}", "query_revision 'abc' needs a query_base"),
        ("untrained: {minilm: {similarity: euclid}}", "'cosine' or 'dot'"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit(tmp_path, values, expected):
    (tmp_path / "my.yaml").write_text(f"extends: smoke\n{values}\n")
    with pytest.raises(ProfileError, match=expected):
        load_profile(tmp_path / "my.yaml")


def test_minilm_at_its_own_length_reads_the_same_tokens(smoke):
    """The texts of PyDocs are truncated to the profile's lengths: a row of its own would be the same row."""
    model, lengths = open_encoder("minilm"), smoke.profile.lengths
    assert model.max_seq_length == 256
    texts = ((smoke.inputs.queries.texts, lengths.query), (smoke.inputs.collection.passages.texts, lengths.passage))  # fmt: skip
    for some, length in texts:
        ours, own = (tokenize(model, list(some), n) for n in (length, model.max_seq_length))
        np.testing.assert_array_equal(ours.ids, own.ids)
