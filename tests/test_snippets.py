"""The page "Other libraries": its snippets run as they are printed, and come to this library's results."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import typer
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize
from torch.distributed.run import parse_args

from adaptive_margins import cli
from adaptive_margins.corpus import finetune as finetuning
from adaptive_margins.data.collection import Texts
from adaptive_margins.data.sources import open_collection
from adaptive_margins.encoder.load import open_encoder, save_encoder
from adaptive_margins.evaluation.measures import evaluate
from adaptive_margins.retrieval.dense import DenseRetriever
from adaptive_margins.retrieval.dense_index import DenseIndex
from conftest import ROOT, WORDS
from page_snippets import PAGE, SECTIONS, blocks, packages, run_section

QUESTION = "how do I sort an array?"
WITH_PYTHON = [heading for heading in SECTIONS if blocks(heading)]


@pytest.fixture(scope="module")
def place(tiny_folder, tmp_path_factory) -> Path:
    """A folder with the three folders that the page expects."""
    place = tmp_path_factory.mktemp("place")
    rng = np.random.default_rng(2)
    texts = [" ".join(rng.choice(WORDS[5:], rng.integers(4, 12))) for _ in range(60)]
    (place / "my_corpus").mkdir()
    (place / "my_encoder").mkdir()
    lines = {
        "collection.tsv": [f"d{i}\t{text}\n" for i, text in enumerate(texts)],
        "queries.tsv": [f"q{i}\t{' '.join(rng.choice(WORDS[5:], 3))}\n" for i in range(12)],
        "qrels.txt": [f"q{i} 0 d{5 * i + j} {j}\n" for i in range(12) for j in range(3)],
    }
    for name, content in lines.items():
        (place / "my_corpus" / name).write_text("".join(content))
    with warnings.catch_warnings(action="ignore"):  # it has no pooling
        modules = [*open_encoder(str(tiny_folder("bert"))), Normalize()]
    model = SentenceTransformer(modules=modules, device="cpu")
    save_encoder(model, place / "my_encoder")
    # What `train` holds out: of the only set of queries, a part.
    for name, count in (("queries", 6), ("qrels", 18)):
        (source,) = (place / "my_corpus").glob(f"{name}.*")
        part = source.read_text().splitlines(keepends=True)[:count]
        (place / "my_encoder" / f"{name}.test{source.suffix}").write_text("".join(part))
    retriever = DenseRetriever(model, open_collection(place / "my_corpus").passages)
    folder = place / "my_index"
    DenseIndex.build(retriever, "my_corpus", str(place / "my_encoder"), folder, weight=0.5)
    return place


@pytest.fixture(scope="module")
def held_out(place):
    """The ranking of the test queries by exact search, to depth 100, and its nDCG@10."""
    lines = (place / "my_encoder" / "queries.test.tsv").read_text().splitlines()
    queries = Texts(*zip(*(line.split("\t") for line in lines), strict=True))
    collection = open_collection(place / "my_corpus")
    retriever = DenseRetriever(open_encoder(str(place / "my_encoder")), collection.passages)
    run = retriever.search(queries, 100)
    qrels = {qid: collection.qrels["test"][qid] for qid in queries.ids}
    return run, evaluate(qrels, run, ["nDCG@10"]).mean["nDCG@10"]


def ranked(index, weight):
    """The answer to the page's question by the index, docid → score."""
    return index.search(index.open_encoder(), Texts(["q"], [QUESTION]), 10, weight=weight)["q"]


# ---- what each section comes to -----------------------------------------------------------------


def faiss_alone(found, place, held_out):
    ids = [found["passages"].ids[row] for row in found["rows"][0]]
    assert dict(zip(ids, found["scores"][0].tolist(), strict=True)) == pytest.approx(
        ranked(DenseIndex.open(place / "my_index"), 1)
    )


def langchain(found, place, held_out):
    expected = ranked(found["index"], 0.5)
    assert {d.id: d.metadata["score"] for d in found["documents"]} == expected
    assert [d.page_content for d in found["documents"]] == [
        found["index"].passages[docid] for docid in expected
    ]


def llama_index(found, place, held_out):
    expected = ranked(found["index"], 0.5)
    assert {n.node_id: n.score for n in found["nodes"]} == expected
    assert [n.text for n in found["nodes"]] == [found["index"].passages[d] for d in expected]


def pyterrier(found, place, held_out):
    run, ndcg = held_out
    rows = found["Dense"]()(found["topics"])
    assert len(rows) == sum(map(len, run.values()))
    for row in rows.itertuples():
        assert row.score == pytest.approx(run[row.qid][row.docno], abs=1e-6)
        assert list(run[row.qid])[row.rank] == row.docno
    assert not found["pt"].java.started()
    assert found["table"]["ndcg_cut_10"].tolist() == [pytest.approx(ndcg)]


def pyterrier_dr(found, place, held_out):
    hits = found["hits"]
    expected = ranked(DenseIndex.open(place / "my_index"), 1)
    assert hits["docno"].tolist()[:10] == list(expected)
    assert hits["score"].tolist()[:10] == pytest.approx(list(expected.values()), abs=1e-5)


def mteb(found, place, held_out):
    assert found["scores"]["ndcg_at_10"] == pytest.approx(held_out[1], abs=1e-4)  # rounded


CHECKS = {
    "FAISS alone": faiss_alone,
    "MTEB": mteb,
    "PyTerrier": pyterrier,
    "pyterrier_dr": pyterrier_dr,
    "LangChain": langchain,
    "LlamaIndex": llama_index,
}
EXPORTED = "ONNX Runtime"  # tests/test_export_onnx.py


@pytest.mark.parametrize("heading", WITH_PYTHON)
def test_snippet(heading, place, held_out, monkeypatch, capsys):
    if heading == EXPORTED:
        pytest.skip("test_export_onnx.py runs it on the graph that it exports")
    for package in sorted(packages(heading)):
        reason = f"{package} is not installed; the page has the version that was used"
        pytest.importorskip(package, reason=reason, exc_type=ImportError)
    monkeypatch.chdir(place)
    CHECKS[heading](run_section(heading), place, held_out)


# ---- commands ------------------------------------------------------------------------------------


def test_runs_are_read_by_ir_measures(place, tmp_path, held_out, monkeypatch, capsys):
    ours, theirs = map(
        shlex.split, blocks("TREC runs: trec_eval, ir_measures, Pyserini", "bash")[0].splitlines()
    )
    for folder in ("my_corpus", "my_encoder"):
        shutil.copytree(place / folder, tmp_path / folder)
    shutil.copy(tmp_path / "my_encoder" / "qrels.test.txt", tmp_path / "my_corpus" / "qrels.txt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ours)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", theirs)
    runpy.run_module("ir_measures", run_name="__main__")
    found = dict(line.split("\t") for line in capsys.readouterr().out.splitlines())
    assert found["nDCG@10"] == f"{held_out[1]:.4f}"
    assert found.keys() == {"nDCG@10", "R@100"}


def test_commands_that_log_are_accepted(tmp_path, monkeypatch):
    """test_finetune.py logs to TensorBoard."""
    asked = []

    def finetune(source, output, **options):
        asked.append(options["report_to"])
        raise SystemExit

    monkeypatch.setattr(finetuning, "finetune", finetune)
    monkeypatch.chdir(tmp_path)
    for line in blocks("TensorBoard, W&B, MLflow, Trackio", "bash")[0].splitlines():
        words = [
            word for word in shlex.split(line, comments=True) if not re.match("[A-Z_]+=", word)
        ]
        if words and words[0] == "adaptive-margins":
            monkeypatch.setattr(sys, "argv", words)
            with pytest.raises(SystemExit) as end:
                cli.main()
            assert not end.value.code, line
    assert asked == [("tensorboard",), ("wandb",), ("mlflow",), ("trackio",)]


def test_commands_on_pages_have_the_options_that_they_name():
    commands = typer.main.get_command(cli.app).commands
    options = {name: {o for p in c.params for o in p.opts} for name, c in commands.items()}
    pages = [ROOT / "README.md", *(ROOT / "book").glob("*.md"), *(ROOT / "examples").glob("*.py")]
    found = 0
    for page in pages:
        text = page.read_text("utf-8").replace("\\\n", " ")
        for name, rest in re.findall(r"adaptive-margins ([a-z-]+)([^\n`]*)", text):
            found += 1
            unknown = {*re.findall(r"\s(--[a-z-]+)", rest)} - options[name]
            assert not unknown, f"{page.name}: {name} {unknown}"
    assert found > 40
    for page in pages:
        for words in re.findall(r"torchrun (-[^\n`]*)", page.read_text("utf-8")):
            assert parse_args(shlex.split(words)).training_script == "adaptive_margins.cli"


# ---- the page ------------------------------------------------------------------------------------


def test_versions_on_the_page_are_those_that_are_pinned():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line and line[0] != "#")
    rows = re.findall(r"^\| `([\w-]+)` \| ([\d.]+) \|", PAGE.read_text("utf-8"), re.MULTILINE)
    assert len(rows) > 5
    named = {name: version for name, version in rows if name in pinned}
    assert named and named == {name: pinned[name] for name in named}
