"""Mined negatives: what is written, that others can read it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sentence_transformers import CrossEncoder

from adaptive_margins import cli
from adaptive_margins.corpus.mine import mine_negatives
from adaptive_margins.data.mining import MARGIN, FilterCounts
from adaptive_margins.data.sources import open_collection
from adaptive_margins.data.text import DataError
from adaptive_margins.encoder.checks import EncoderError
from adaptive_margins.encoder.load import open_encoder
from adaptive_margins.encoder.options import EncoderOptions
from adaptive_margins.errors import ArgumentError
from adaptive_margins.files import WriteError
from adaptive_margins.retrieval.bm25 import BM25
from conftest import WORDS, plain_embeddings, write_tokenizer


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """80 passages, and 12 training and 4 test queries with two relevant passages each, in TREC's layout."""
    folder = tmp_path_factory.mktemp("mine") / "corpus"
    folder.mkdir()
    rng = np.random.default_rng(3)
    texts = [" ".join(rng.choice(WORDS[5:], 8)) for _ in range(80)]
    (folder / "collection.tsv").write_text("".join(f"d{i}\t{t}\n" for i, t in enumerate(texts)))
    for end, qids in (("", range(12, 16)), ("_train", range(12))):
        asked = [" ".join(rng.choice(WORDS[5:], 3, replace=False)) for _ in qids]
        lines = (f"q{q}\t{text}\n" for q, text in zip(qids, asked, strict=True))
        (folder / f"queries{end}.tsv").write_text("".join(lines))
        judged = (f"q{q} 0 d{d} 1\n" for q in qids for d in rng.choice(80, 2, replace=False))
        (folder / f"qrels{end}.txt").write_text("".join(judged))
    return folder


@pytest.fixture(scope="module")
def encoder(tiny_folder, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("encoders") / "tiny"
    open_encoder(str(tiny_folder("bert"))).save(str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def reranker(tmp_path_factory):
    """``reranker(labels)`` → folder of a tiny random cross-encoder."""
    from transformers import BertConfig, BertForSequenceClassification

    def make(labels: int = 1, safe: bool = True) -> Path:
        folder = tmp_path_factory.mktemp("rerankers")
        torch.manual_seed(5)
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}  # fmt: skip
        config = BertConfig(vocab_size=len(WORDS), max_position_embeddings=64, num_labels=labels, initializer_range=1.0, **sizes)  # fmt: skip
        BertForSequenceClassification(config).save_pretrained(folder)
        write_tokenizer(folder)
        if not safe:
            (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        return folder

    return make


def read(folder: Path) -> pd.DataFrame:
    return pd.read_table(folder / "mined.scores.tsv")


def check_filter(table: pd.DataFrame, qrels: dict, scored) -> None:
    """The filter's scores are ``scored``'s, and no negative is above the threshold, nor judged."""
    for row in table.itertuples():
        both = scored(row.query_id, [row.positive_id, row.negative_id])
        assert np.allclose(both, [row.positive_score, row.negative_score], atol=1e-5)
        lowest = min(scored(row.query_id, list(qrels[row.query_id])))
        assert row.negative_score <= lowest - (1 - MARGIN) * abs(lowest) + 1e-6
        assert row.negative_id not in qrels[row.query_id]


def test_triples_of_a_folder_with_ranks_and_scores(corpus, encoder, tmp_path):
    report = mine_negatives(str(corpus), tmp_path / "mined.tsv", model=encoder, depth=30)
    collection, table = open_collection(corpus), read(tmp_path)
    ids = pd.read_table(tmp_path / "mined.tsv", names=list(table.columns[:3]))
    assert ids.equals(table[ids.columns])
    lost = report["too_few"] + 2 * report["filtered"]["without_negative"]
    assert len(ids) == report["rows"] == 24 - lost > 12
    # Each pair of query and positive once, in the training set only.
    train = collection.qrels["train"]
    assert all(d in train[q] for q, d in zip(ids.query_id, ids.positive_id, strict=True))
    assert not ids.duplicated(["query_id", "positive_id"]).any()
    found = BM25(collection.passages).search(collection.queries["train"], 30)
    ranked = table.dropna(subset="rank")
    assert len(ranked) > 10
    for row in ranked.itertuples():
        docid, score = list(found[row.query_id].items())[int(row.rank) - 1]
        assert docid == row.negative_id and score == pytest.approx(row.score)
    model = open_encoder(encoder)

    def cosines(qid, docids):
        texts = [collection.queries["train"][qid], *(collection.passages[d] for d in docids)]
        q, *d = plain_embeddings(model, texts, 64)
        return np.array(d) @ q

    check_filter(table, train, cosines)
    assert set(report["filtered"]) == set(FilterCounts.__dataclass_fields__)
    assert report["filtered"]["queries"] == 12 and report["filtered"]["judged"] > 0
    # `train` reads them; a seed gives the same bytes, another one other negatives.
    (tmp_path / "copy").mkdir()
    for file in corpus.iterdir():
        (tmp_path / "copy" / file.name).write_bytes(file.read_bytes())
    again = mine_negatives(str(tmp_path / "copy"), tmp_path / "copy" / "triples.tsv", model=encoder, depth=30)  # fmt: skip
    assert (tmp_path / "copy" / "triples.tsv").read_bytes() == (tmp_path / "mined.tsv").read_bytes()
    triples = list(ids.itertuples(index=False, name=None))
    assert open_collection(tmp_path / "copy").triples == triples and again["rows"] == len(triples)
    mine_negatives(str(corpus), tmp_path / "other.tsv", model=encoder, depth=30, seed=2)
    assert (tmp_path / "other.tsv").read_bytes() != (tmp_path / "mined.tsv").read_bytes()


def test_tuples_by_the_encoder_as_texts_and_as_a_collection(corpus, encoder, tmp_path):
    asked = {"retriever": "encoder", "model": encoder, "negatives": 3, "depth": 60}
    with pytest.warns(UserWarning, match="12 of 12 queries are longer than 3 tokens"):
        mine_negatives(str(corpus), tmp_path / "short.tsv", options=EncoderOptions(max_length=3), **asked)  # fmt: skip
    for name in ("mined.jsonl", "mined.parquet", "mined"):
        report = mine_negatives(str(corpus), tmp_path / name, **asked)
    lines = pd.read_json(tmp_path / "mined.jsonl", lines=True)
    rows = pd.read_parquet(tmp_path / "mined.parquet")
    assert rows.equals(lines) and len(rows) == report["rows"]
    texts = ["query", "positive", "negative_1", "negative_2", "negative_3"]
    assert list(rows) == [*texts, *(f"{name}_id" for name in texts)]
    collection, table = open_collection(corpus), read(tmp_path)
    for name in texts:
        of = collection.queries["train"] if name == "query" else collection.passages
        assert [of[i] for i in rows[f"{name}_id"]] == list(rows[name])
    ranks = table["rank"].to_numpy().reshape(-1, 3)
    ranked = ranks[~np.isnan(ranks).any(axis=1)]  # others are random passages
    assert len(ranked) and (np.diff(ranked) > 0).all()  # the best one first, none twice
    loaded = open_collection(tmp_path / "mined")
    assert loaded.triples == list(table.iloc[:, :3].itertuples(index=False, name=None))
    assert (loaded.passages, loaded.qrels) == (collection.passages, collection.qrels)
    back = open_collection(tmp_path / "mined.jsonl")  # as rows of texts
    of, to = back.queries["train"], back.passages
    expected = [(collection.queries["train"][q], collection.passages[p], collection.passages[n]) for q, p, n in loaded.triples]  # fmt: skip
    assert [(of[q], to[p], to[n]) for q, p, n in back.triples] == expected


def test_a_cross_encoder_scores_in_the_place_of_the_encoder(corpus, reranker, tmp_path):
    folder = reranker()
    report = mine_negatives(
        str(corpus), tmp_path / "mined.tsv", cross_encoder=str(folder), depth=30
    )
    assert report["model"] is None and report["filtered"]["too_similar"] > 0
    collection, model = open_collection(corpus), CrossEncoder(str(folder), device="cpu")

    def scored(qid, docids):
        pairs = [(collection.queries["train"][qid], collection.passages[d]) for d in docids]
        return model.predict(pairs, activation_fn=torch.nn.Sigmoid(), show_progress_bar=False)

    check_filter(read(tmp_path), collection.qrels["train"], scored)


def test_queries_of_the_only_set_are_split_first(corpus, encoder, tmp_path):
    (tmp_path / "one").mkdir()
    for name in ("collection.tsv", "queries", "qrels"):
        source = next(corpus.glob(f"{name}_train.*"), corpus / name)
        (tmp_path / "one" / source.name.replace("_train", "")).write_bytes(source.read_bytes())
    with pytest.raises(ArgumentError, match="no training set for the ids"):
        mine_negatives(str(tmp_path / "one"), tmp_path / "one" / "triples.tsv", model=encoder)
    report = mine_negatives(str(tmp_path / "one"), tmp_path / "mined", model=encoder)
    loaded = open_collection(tmp_path / "mined")
    assert "trained on" in report["split"] and set(loaded.queries) == {"train", "validation", "test"}  # fmt: skip
    assert {q for q, _, _ in loaded.triples} <= set(loaded.queries["train"].ids)
    with (tmp_path / "one" / "collection.tsv").open("a") as file:
        file.write("e\t\n")
    with pytest.warns(UserWarning), pytest.raises(DataError, match="text of 'e' must be non-empty"):
        mine_negatives(str(tmp_path / "one"), tmp_path / "other", model=encoder)
    assert not (tmp_path / "other.scores.tsv").exists()


def test_what_is_refused(corpus, encoder, reranker, tmp_path):
    def mine(output: str = "mined.tsv", source: object = corpus, **values):
        return mine_negatives(str(source), tmp_path / output, **{"model": encoder, **values})

    with pytest.raises(ArgumentError, match=r"NAME\.parquet, or a folder without a dot"):
        mine("mined.csv")
    with pytest.raises(ArgumentError, match="'bm25' or 'encoder', not 'dense'"):
        mine(retriever="dense")
    for negatives in (0, 101):
        with pytest.raises(ArgumentError, match=f"expected 1 to the depth, 100, not {negatives}"):
            mine(negatives=negatives)
    with pytest.raises(DataError, match="no query has 99 negatives left"):
        mine(negatives=99)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "rows.jsonl").touch()
    with pytest.raises(WriteError, match="not an empty folder"):
        mine("full")
    with pytest.raises(WriteError, match=r"exists and was not mined \(no rows.scores.tsv"):
        mine("full/rows.jsonl")
    with pytest.raises(WriteError, match="is the collection; name another file"):
        mine("full/rows.jsonl", source=tmp_path / "full" / "rows.jsonl")
    with pytest.raises(ArgumentError, match=r"in its name, not \.$"):
        mine_negatives(str(corpus), Path("."))
    with pytest.raises(EncoderError, match="classifier"):
        mine(cross_encoder=encoder)
    with pytest.raises(EncoderError, match="has 2 scores; expected one"):
        mine(cross_encoder=str(reranker(2)))
    with pytest.raises(EncoderError, match="pickles are not loaded"):
        mine(cross_encoder=str(reranker(safe=False)))
    assert [path.name for path in tmp_path.iterdir()] == ["full"]  # nothing is left


def test_the_command(corpus, encoder, tmp_path, monkeypatch, capsys):
    arguments = ["mine", str(corpus), "--output", str(tmp_path / "mined.jsonl"), "--model", encoder]
    for more in ([], ["--json", "--negatives", "2"]):
        monkeypatch.setattr("sys.argv", ["adaptive-margins", *arguments, *more])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code
        told = capsys.readouterr().out
        if not more:
            assert "near duplicate" in told and "mined.scores.tsv" in told
    report = json.loads(told)
    assert report["rows"] == len((tmp_path / "mined.jsonl").read_text().splitlines())
    assert {"output", "scores", "filtered", "too_few", "negatives", "seed"} <= report.keys()
