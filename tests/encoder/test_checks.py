"""Encoders whose files do not fit each other, length limits, prompts, and queries that are passages."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense
from typer.testing import CliRunner

from adaptive_margins import cli
from adaptive_margins.data.collection import Texts
from adaptive_margins.data.trec import read_run
from adaptive_margins.encoder.checks import EmbeddingError, EncoderError
from adaptive_margins.encoder.embed import embed
from adaptive_margins.encoder.load import (
    encoder_identity,
    open_encoder,
    save_encoder,
    weights_folder,
)
from adaptive_margins.encoder.tokens import tokenize
from adaptive_margins.evaluation.measures import evaluate
from adaptive_margins.profiles.encoders import EncoderSettings
from adaptive_margins.retrieval.bm25 import BM25
from adaptive_margins.retrieval.dense import DenseRetriever
from adaptive_margins.retrieval.dense_index import DenseIndex
from adaptive_margins.retrieval.exact import count_self, without_self
from conftest import SPECIAL, WORDS, write_encoder, write_tokenizer

TERMS = WORDS[len(SPECIAL) :]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 90868376\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Sentence Transformers folders "tiny" and "dense" (a linear layer 16 → 8), 64 positions."""
    home = tmp_path_factory.mktemp("made")
    write_encoder(home / "plain", "bert")
    with pytest.warns(UserWarning, match=r"no modules\.json"):
        model = open_encoder(str(home / "plain"))
    save_encoder(model, home / "tiny")
    save_encoder(SentenceTransformer(modules=[*model, Dense(16, 8)], device="cpu"), home / "dense")
    return home


@pytest.fixture
def tiny(made, tmp_path) -> Path:
    """A copy of "tiny" that a test may change."""
    return shutil.copytree(made / "tiny", tmp_path / "model")


def edit(name: str, **values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / name
        known = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps({**known, **values}))

    return change


def weights(change: Callable[[str, torch.Tensor], Any]) -> Callable[[Path], None]:
    """Change each weight of a folder; those that become None are left out."""

    def rewrite(folder: Path) -> None:
        path = folder / "model.safetensors"
        found = {key: change(key, value) for key, value in load_file(path).items()}
        save_file({k: v for k, v in found.items() if v is not None}, path, {"format": "pt"})

    return rewrite


def shards(folder: Path, count: int = 3) -> None:
    """Split model.safetensors as transformers does."""
    path = folder / "model.safetensors"
    found, places = load_file(path), {}
    path.unlink()
    for i in range(count):
        name = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        part = sorted(found)[i::count]
        save_file({key: found[key] for key in part}, folder / name, {"format": "pt"})
        places |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def drop_shard(folder: Path) -> None:
    shards(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()


def without_modules(architecture: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "modules.json").unlink()
        edit("config.json", architectures=[architecture])(folder)

    return change


def modules(change: Callable[[list], Any]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        path = folder / "modules.json"
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return rewrite


def without_prompts_in_pooling(folder: Path) -> None:
    edit("config_sentence_transformers.json", prompts={"query": "find ", "document": ""})(folder)
    edit("1_Pooling/config.json", include_prompt=False)(folder)


def pickled(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / "model.safetensors").rename(folder / name)


def write(name: str, content: bytes | str) -> Callable[[Path], Any]:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def not_finite(key: str, value: torch.Tensor) -> torch.Tensor:
    return value * float("nan") if key.endswith("layer.0.output.dense.bias") else value


FAULTS = {
    "pointer": (write("model.safetensors", POINTER), r"model\.safetensors .*git lfs pull"),
    "pointer tokenizer": (write("tokenizer.json", POINTER), r"tokenizer\.json .*git lfs pull"),
    "page": (write("model.safetensors", "<html>" * 50), r"\(300 bytes\)"),
    "truncated": (lambda f: os.truncate(f / "model.safetensors", 5000), r"\(5,000 bytes\)"),
    "missing shard": (drop_shard, r"2 of the 3 files .*model-00002-of-00003"),
    "pickled shards": (pickled("pytorch_model-00001-of-00002.bin"), r"-00002\.bin is a pickle"),
    "pickle": (
        pickled("pytorch_model.bin"),
        r"model\.safetensors does not exist; .* has 1_Pooling, .*pytorch_model\.bin is a pickle, which is never loaded",
    ),
    "own module": (
        modules(lambda m: [m[0], {**m[1], "type": "modeling.MyPooling"}]),
        "names the custom module 'modeling.MyPooling': code that comes",
    ),
    "bag of words": (
        modules(lambda m: [{**m[0], "type": "sentence_transformers.models.BoW"}, m[1]]),
        "first module must be a Transformer, not '.*BoW'",
    ),
    "no module": (modules(lambda m: []), "first module must be a Transformer, not 'none'"),
    "modules of words": (modules(lambda m: ["a"]), "expected a list of modules with path and type"),
    "modules are no list": (modules(lambda m: {}), "expected a JSON list, not {}"),
    "module elsewhere": (
        modules(lambda m: [{**m[0], "path": "../up"}]),
        r"path '\.\./up' leads out of the folder",
    ),
    "damaged modules": (write("modules.json", "["), r"modules\.json cannot be read"),
    "truncated dimensions": (
        edit("config_sentence_transformers.json", truncate_dim="4"),
        "16 dimensions, but '4' are asked for",
    ),
    "prompts left out": (without_prompts_in_pooling, "leaves its prompts out of the pooling"),
    "adapter": (
        edit("adapter_config.json", base_model_name_or_path="o/base"),
        r"SentenceTransformer\('o/base'\).*PeftModel\.from_pretrained\(.*merge_and_unload\(\)",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json cannot be read"),
    "unknown type": (edit("config.json", model_type="foo"), "'foo'"),
    "own code": (edit("config.json", model_type="foo", auto_map={}), "never run"),
    "dpr": (edit("config.json", model_type="dpr"), "'dpr'"),
    "clip": (edit("config.json", model_type="clip", vision_config={}), "'clip'"),
    "cross-encoder": (without_modules("BertForSequenceClassification"), "SequenceClassification"),
    "colbert": (without_modules("HF_ColBERT"), "HF_ColBERT"),
    "sparse": (edit("config_sentence_transformers.json", model_type="SparseEncoder"), "Sparse"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer"),
    "bad tokenizer": (write("tokenizer.json", '{"version": "1.0"}'), "could not be loaded"),
    "no padding": (edit("tokenizer_config.json", pad_token=None), "pad_token"),
    "quantised": (edit("config.json", quantization_config={}), "quantization_config"),
    "float8": (weights(lambda _, v: v.to(torch.float8_e4m3fn)), "F8_E4M3"),
    "int8": (weights(lambda _, v: v.to(torch.int8)), r"\(I8\)"),
    "not finite": (weights(not_finite), r"3?\d* of \d+ weights are not finite"),
    "overflow": (weights(lambda _, v: v * 1e30), "2 of 2 embeddings are not finite"),
    "missing weights": (
        weights(lambda k, v: None if "layer.1.attention" in k else v),
        r"10 of \d+ weights .*layer\.1\.attention",
    ),
    "hidden size": (edit("config.json", hidden_size=32), r"\(17, 32\), .*\(17, 16\)"),
    "vocabulary": (edit("config.json", vocab_size=40), r"\(40, 16\), .*\(17, 16\)"),
    "more layers": (edit("config.json", num_hidden_layers=5), r"layer\.3\..*missing"),
    "fewer layers": (edit("config.json", num_hidden_layers=1), r"layer\.\d\..*fewer layers"),
    "tokenizer": (lambda f: write_tokenizer(f, words=[*WORDS, "x", "y"]), "up to 18, .* of 17"),
    "no pooling": (modules(lambda m: m[:1]), "give no sentence_embedding"),
    "limit 0": (edit("sentence_bert_config.json", max_seq_length=0), "max_seq_length is 0"),
    "limit text": (edit("sentence_bert_config.json", max_seq_length="9"), "max_seq_length is '9'"),
    "limit not a number": (edit("tokenizer_config.json", model_max_length="64"), "is '64'"),
    "damaged tokenizer": (write("tokenizer.json", ""), r"tokenizer\.json cannot be read"),
    "damaged pooling": (
        write("1_Pooling/config.json", "{"),
        r"1_Pooling/config\.json cannot be read",
    ),
    "unknown activation": (edit("config.json", hidden_act="foo"), "KeyError 'foo'"),
    "no prompts": (edit("config_sentence_transformers.json", prompts=None), "not None"),
    "prompts": (edit("config_sentence_transformers.json", prompts=["a"]), r"not \['a'\]"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_files_that_do_not_fit_are_one_line(tiny, fault):
    change, message = FAULTS[fault]
    change(tiny)
    with warnings.catch_warnings(), pytest.raises(EncoderError, match=message) as error:
        warnings.simplefilter("error")  # an error is not preceded by warnings
        open_encoder(str(tiny))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit("2_Dense/config.json", in_features=32), r"8, 32"),
        (lambda f: (f / "2_Dense" / "model.safetensors").unlink(), r"model\.safetensors"),
        (write("2_Dense/model.safetensors", POINTER), r"2_Dense/model\.safetensors .*git lfs pull"),
        (
            lambda f: (f / "2_Dense/model.safetensors").rename(f / "2_Dense/pytorch_model.bin"),
            r"2_Dense has config\.json, pytorch_model\.bin \(pytorch_model\.bin is a pickle",
        ),
    ],
)
def test_a_linear_layer_that_does_not_fit(made, tmp_path, change, message):
    folder = shutil.copytree(made / "dense", tmp_path / "dense")
    assert open_encoder(str(folder)).get_embedding_dimension() == 8
    change(folder)
    with pytest.raises(EncoderError, match=message):
        open_encoder(str(folder))


def embeddings(folder: Path, texts: list[str]) -> np.ndarray:
    model = open_encoder(str(folder))
    return embed(model, tokenize(model, texts, model.max_seq_length))


def test_shards_are_as_one_file_and_all_of_them_are_pinned(made, tiny):
    shards(tiny)
    texts = ["graph node", "the shape of a matrix"]
    np.testing.assert_array_equal(embeddings(tiny, texts), embeddings(made / "tiny", texts))
    before = encoder_identity(str(tiny))
    pinned = EncoderSettings(base=str(tiny), sha256=before)
    for path in sorted(tiny.glob("model-*.safetensors")):
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert encoder_identity(str(tiny)) != before
        with pytest.raises(
            EncoderError, match=rf"{path.name}.*: SHA-256 is \w+, expected {before}"
        ):
            weights_folder(pinned)
        path.write_bytes(data)
    assert encoder_identity(str(tiny)) == before
    assert weights_folder(pinned) == tiny


@pytest.mark.parametrize("change", [weights(lambda k, v: None if "pooler" in k else v),
                                    weights(lambda _, v: v.double())])  # fmt: skip
def test_weights_that_do_no_harm(made, tiny, change):
    change(tiny)
    np.testing.assert_allclose(
        embeddings(tiny, ["graph"]), embeddings(made / "tiny", ["graph"]), atol=1e-6
    )


@pytest.mark.parametrize("similarity", ["dot", "euclidean"])
def test_the_cosine_is_used_whatever_the_encoder_names(made, tiny, similarity):
    edit("config_sentence_transformers.json", similarity_fn_name=similarity)(tiny)
    with pytest.warns(UserWarning, match=repr(similarity)):
        model = open_encoder(str(tiny))
    assert model.similarity_fn_name == "cosine"
    open_encoder(str(made / "tiny"))  # without a warning, which would be an error


def test_a_decoder_attends_to_what_came_before(tiny):
    edit("config.json", is_decoder=True)(tiny)
    texts = ["graph node", "the shape of a matrix"]
    expected = SentenceTransformer(str(tiny), device="cpu").encode(texts, normalize_embeddings=True)
    np.testing.assert_allclose(embeddings(tiny, texts), expected, atol=1e-6)


def test_a_whole_number_with_a_point_is_a_limit(tiny):
    edit("sentence_bert_config.json", max_seq_length=12.0)(tiny)
    assert embeddings(tiny, ["graph " * 40]).shape == (1, 16)


def test_devices_that_cannot_be_used(tiny):
    for device in ("meta", "abacus"):
        with pytest.raises(EncoderError, match=f"'{device}'"):
            open_encoder(str(tiny), device=device)


# ---- length limits ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "room"), [("bert", 64), ("distilbert", 64), ("roberta", 62), ("mpnet", 62)]
)
def test_texts_are_truncated_at_the_positions_there_are(tmp_path, kind, room):
    folder = write_encoder(tmp_path / kind, kind)
    save_encoder(SentenceTransformer(str(folder), device="cpu"), tmp_path / "saved")
    edit("sentence_bert_config.json", max_seq_length=512)(tmp_path / "saved")
    with pytest.warns(UserWarning, match=rf"512 tokens, .* {room} only"):
        model = open_encoder(str(tmp_path / "saved"))
    assert model.max_seq_length == room
    long = " ".join(["graph"] * 200)
    found = embed(model, tokenize(model, [long], model.max_seq_length))
    cut = embed(model, tokenize(model, [" ".join(["graph"] * (room - 2))], 512))
    np.testing.assert_allclose(found, cut, atol=1e-6)


def test_an_encoder_without_a_limit_reads_512_tokens(tmp_path):
    from transformers import T5Config, T5Model

    folder = tmp_path / "t5"
    config = T5Config(vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    T5Model(config).save_pretrained(folder)
    write_tokenizer(folder)
    edit("tokenizer_config.json", model_max_length=10**30)(folder)
    with pytest.warns(UserWarning, match="no length limit.* 512 tokens"):
        model = open_encoder(str(folder))
    assert model.max_seq_length == 512
    with pytest.warns(UserWarning, match="1 of 1 passages are longer than 512 tokens"):
        DenseRetriever(model, Texts(["a"], ["graph " * 600])).search(Texts(["q"], ["node"]), 1)


def test_queries_are_read_to_the_encoders_limit_and_truncated_texts_counted(tiny):
    model = open_encoder(str(tiny))
    start = " ".join(["graph"] * 55)
    queries = Texts(["a", "b", "c"], [f"{start} sort", f"{start} matrix", f"{start} " * 2])
    passages = Texts(["d", "e"], ["node edge", "path " * 62])  # 64 tokens: not one too many
    retriever = DenseRetriever(model, passages)
    with pytest.warns(UserWarning, match="1 of 3 queries are longer than 64 tokens"):
        run = retriever.search(queries, 2)
    assert retriever.truncated == {"queries": (1, 3), "passages": (0, 2)}
    assert len({tuple(hits.values()) for hits in run.values()}) == 3
    plain = SentenceTransformer(str(tiny), device="cpu")
    np.testing.assert_allclose(
        retriever.embed_queries(queries.texts),
        plain.encode_query(list(queries.texts), normalize_embeddings=True),
        atol=1e-6,
    )


def test_a_prompt_that_fills_the_limit(tiny):
    edit("config_sentence_transformers.json", prompts={"query": "sort " * 62})(tiny)
    with pytest.raises(EncoderError, match=r"64 tokens, and the prompt .* have 64"):
        DenseRetriever(open_encoder(str(tiny)), Texts(["a"], ["b"]))
    edit("config_sentence_transformers.json", prompts={"query": "sort " * 61})(tiny)
    DenseRetriever(open_encoder(str(tiny)), Texts(["a"], ["b"]))


def test_an_older_index_keeps_its_lengths(tiny, tmp_path):
    model = open_encoder(str(tiny))
    passages = Texts(["d", "e"], ["node edge", "path array"])
    built = DenseIndex.build(DenseRetriever(model, passages), "P", str(tiny), tmp_path / "index")
    assert built.about["lengths"] == {"query": 64, "passage": 64}
    edit("index.json", lengths={"query": 5, "passage": 64})(tmp_path / "index")
    queries = Texts(["q"], ["node of the path of the array"])
    with pytest.warns(UserWarning, match="1 of 1 queries are longer than 5 tokens"):
        found = DenseIndex.open(tmp_path / "index").search(model, queries, 2)
    short = DenseRetriever(model, passages, query_length=5, warn=False)
    assert found == short.search(queries, 2) != built.search(model, queries, 2)


# ---- nothing is left behind -------------------------------------------------------------------


def test_embeddings_that_are_not_finite_leave_no_index(tiny, tmp_path):
    model = open_encoder(str(tiny))
    next(model.parameters()).data[7] = float("nan")
    retriever = DenseRetriever(model, Texts(["a", "b"], [WORDS[7], WORDS[8]]))
    with pytest.raises(EmbeddingError, match="1 of 2 embeddings are not finite"):
        DenseIndex.build(retriever, "Two", str(tiny), tmp_path / "out" / "index")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


# ---- prompts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["passage", "corpus"])
def test_the_passages_prompt_is_used_whatever_its_name(tiny, tmp_path, name):
    prompts = {"query": "sort ", name: "path ", "cluster": "edge "}
    edit("config_sentence_transformers.json", prompts=prompts)(tiny)
    with pytest.warns(UserWarning, match="'cluster' are not used"):
        model = open_encoder(str(tiny))
    texts = ["graph node", "the matrix"]
    retriever = DenseRetriever(model, Texts(["a", "b"], texts))
    save_encoder(model, tmp_path / "again")  # as `train` does
    again = SentenceTransformer(str(tmp_path / "again"), device="cpu")
    plain = SentenceTransformer(str(tiny), device="cpu")
    for expected in (
        plain.encode(texts, prompt="path ", normalize_embeddings=True),
        model.encode_document(texts, normalize_embeddings=True),
        again.encode_document(texts, normalize_embeddings=True),
    ):
        np.testing.assert_allclose(retriever.embeddings, expected, atol=1e-6)
    assert (
        np.abs(retriever.embeddings - plain.encode(texts, normalize_embeddings=True)).max() > 0.01
    )
    np.testing.assert_allclose(
        retriever.embed_queries(texts),
        plain.encode_query(texts, normalize_embeddings=True),
        atol=1e-6,
    )


# ---- queries that are passages ----------------------------------------------------------------


@pytest.fixture
def arguments(tmp_path) -> Path:
    """12 passages, of which six are also queries; the answer to each is the next one."""
    folder = tmp_path / "arguments"
    (folder / "qrels").mkdir(parents=True)
    rng = np.random.default_rng(3)
    texts = [" ".join(rng.choice(TERMS, 9)) for _ in range(12)]
    rows = [{"_id": f"a{i}", "title": "", "text": text} for i, text in enumerate(texts)]
    for name, part in (("corpus", rows), ("queries", rows[::2])):
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(lines)
    lines = [f"a{i}\ta{i + 1}\t1\n" for i in range(0, 12, 2)]
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
    return folder


def evaluated(*arguments: object) -> dict[str, Any]:
    done = CliRunner().invoke(cli.app, ["evaluate", *map(str, arguments), "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.mark.parametrize("mode", ["full", "rerank"])
def test_the_query_itself_is_left_out_before_the_cutoff(arguments, tiny, tmp_path, mode):
    run = tmp_path / "mine.run"
    asked = [arguments, "--model", tiny, "--mode", mode, "--measures", "nDCG@2", "--depth", 2]
    found = evaluated(*asked, "--exclude-self", "--run-out", run)
    assert found["excluded_self"]
    lost = {"queries": 0.0, "passages": 0.0}
    assert found["truncated"] == {"queries": 0, "passages": 0, "lost": lost, "limit": 64}

    rows = [json.loads(line) for line in (arguments / "corpus.jsonl").read_text().splitlines()]
    texts = {row["_id"]: row["text"] for row in rows}
    plain = SentenceTransformer(str(tiny), device="cpu")
    vectors = dict(
        zip(texts, plain.encode(list(texts.values()), normalize_embeddings=True), strict=True)
    )
    queries = Texts(list(texts)[::2], list(texts.values())[::2])
    best = BM25(Texts(list(texts), list(texts.values()))).search(queries, 12)
    expected: dict[str, dict[str, float]] = {}
    for qid in queries.ids:
        others = [docid for docid in texts if docid != qid]
        if mode == "rerank":
            others = [docid for docid in best[qid] if docid != qid][:2]
        scores = {docid: float(vectors[qid] @ vectors[docid]) for docid in others}
        expected[qid] = dict(sorted(scores.items(), key=lambda hit: -hit[1])[:2])
    written = read_run(run)
    assert {qid: list(hits) for qid, hits in written.items()} == {
        qid: list(hits) for qid, hits in expected.items()
    }
    qrels = {f"a{i}": {f"a{i + 1}": 1} for i in range(0, 12, 2)}
    assert found["measures"]["nDCG@2"] == pytest.approx(
        evaluate(qrels, expected, ["nDCG@2"]).mean["nDCG@2"]
    )


def test_queries_that_are_passages_are_told(arguments, tiny):
    done = CliRunner().invoke(cli.app, ["evaluate", str(arguments), "--model", str(tiny)])
    assert done.exit_code == 0
    assert "warning: 6 of 6 queries are themselves passages" in done.stderr


def test_a_number_that_is_also_a_passage_is_not_the_query_itself():
    passages = Texts(["1", "2", "3"], ["The  Cat sleeps. At home.", "a dog", ""])
    assert (
        count_self(Texts(["1", "2", "3", "4"], ["the cat  sleeps.", "cat", "", "x"]), passages) == 1
    )
    assert without_self({"1": {"1": 3.0, "2": 2.0, "3": 1.0}}, 1) == {"1": {"2": 2.0}}
