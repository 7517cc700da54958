"""The commands for a custom corpus as people and scripts call them: JSON, text, errors, exit status."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import pytrec_eval
from sentence_transformers import SentenceTransformer
from typer.testing import CliRunner

from adaptive_margins import cli, progress
from adaptive_margins.corpus import finetune as finetuning
from adaptive_margins.corpus.settings import Settings
from adaptive_margins.data import sources
from adaptive_margins.data.collection import Texts
from adaptive_margins.data.folder import read_folder
from adaptive_margins.data.splits import split_queries
from adaptive_margins.data.trec import (
    read_marked_run,
    read_qrels,
    read_run,
    top,
    truncated,
    write_run,
)
from adaptive_margins.encoder.load import open_encoder
from adaptive_margins.encoder.options import EncoderOptions
from adaptive_margins.evaluation.comparison import compare_runs
from adaptive_margins.evaluation.measures import evaluate
from adaptive_margins.retrieval.bm25 import BM25
from adaptive_margins.retrieval.dense import hybrid
from conftest import WORDS

COMMANDS = ["train", "evaluate", "compare", "index", "search", "collection", "mine"]
TERMS = WORDS[5:]


@pytest.fixture(name="call")
def commands(monkeypatch, capsys):
    """Exit status, stdout and stderr of the command in this process."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr("sys.argv", ["adaptive-margins", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        told = capsys.readouterr()
        if isinstance(end.value.code, str):  # Python prints it and ends with 1
            return 1, told.out, told.err + end.value.code + "\n"
        return end.value.code or 0, told.out, told.err

    return run


@pytest.fixture
def answer(call):
    """The object that a command prints with --json."""

    def run(*arguments: object) -> dict:
        code, out, err = call(*arguments, "--json")
        assert code == 0, err
        return json.loads(out)

    return run


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """120 passages of a few words (one is empty), 40 queries with two relevant passages each, in TREC's layout."""
    folder = tmp_path_factory.mktemp("corpora") / "words"
    folder.mkdir()
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(TERMS, rng.integers(4, 12))) for _ in range(120)]
    texts[7] = ""
    asked = [" ".join(rng.choice(TERMS, 3, replace=False)) for _ in range(40)]
    (folder / "collection.tsv").write_text("".join(f"d{i}\t{t}\n" for i, t in enumerate(texts)))
    (folder / "queries.tsv").write_text("".join(f"q{i}\t{t}\n" for i, t in enumerate(asked)))
    lines = []
    for i, query in enumerate(asked):
        shared = [len(set(query.split()) & set(text.split())) for text in texts]
        for grade, row in enumerate(np.argsort(shared, kind="stable")[-2:], start=1):
            lines.append(f"q{i} 0 d{row} {grade}\n")
    (folder / "qrels.txt").write_text("".join(lines))
    return folder


@pytest.fixture(scope="session")
def encoder(tiny_folder, tmp_path_factory) -> Path:
    """A tiny random encoder as a Sentence Transformers folder."""
    folder = tmp_path_factory.mktemp("encoders") / "tiny"
    open_encoder(str(tiny_folder("bert"))).save(str(folder))
    return folder


@pytest.fixture
def two_runs(tmp_path):
    """A folder with qrels.txt and two runs."""
    rng = np.random.default_rng(1)
    qrels = {f"q{i}": {f"d{j}": int(rng.integers(0, 3)) for j in range(8)} for i in range(30)}
    lines = [f"{q} 0 {d} {g}\n" for q, judged in qrels.items() for d, g in judged.items()]
    (tmp_path / "qrels.txt").write_text("".join(lines))
    for name, noise in (("good", 0.5), ("bad", 5.0)):
        run = {
            q: {f"d{j}": grades.get(f"d{j}", 0) + noise * rng.normal() for j in range(20)}
            for q, grades in qrels.items()
        }
        write_run(run, tmp_path / f"{name}.run", name)
    return tmp_path


def files(folder: Path) -> list[object]:
    return ["--qrels", folder / "qrels.txt", folder / "good.run", folder / "bad.run"]


# ---- contracts: keys and types of the JSON that scripts rely on --------------------------------------

MEANS = {"nDCG@10": "float", "R(rel=1)@100": "float"}
TESTED = {
    "measure": "str", "n": "int", "difference": "float", "ci": ["float"], "p_t": "float", "p_tost": "float",
    "margin": "float", "verdict": "str",
}  # fmt: skip
TRUNCATED = {
    "queries": "int", "passages": "int", "lost": {"queries": "float", "passages": "float"}, "limit": "int",
}  # fmt: skip
OPTIONS = {"query_prompt": "str", "passage_prompt": "str", "dimensions": "int", "max_length": "int"}
TRAIN = {
    "model_dir": "str",
    "collection": {
        "name": "str", "source": "str", "fingerprint": "str", "passages": "int", "split": "str", "pseudo": "NoneType",
        "sets": {"train": "int", "validation": "int", "test": "int"},
    },
    "encoder": {"name": "str", "identity": "str", "parameters": "int"},
    "options": OPTIONS,
    "target": "str",
    "seed": "int",
    "triples": {
        "used": "int", "chosen": "int", "available": "int", "negatives": "str", "tokens": "int",
        "guarded": dict.fromkeys(
            ("queries", "candidates", "judged", "same_text", "near_duplicate", "too_similar", "random",
             "without_negative", "without_text"), "int"
        ),
    },
    "truncated": TRUNCATED,
    "settings": {
        "batch_size": "int", "triples": "int", "passes": "int", "learning_rate": "float", "weight_decay": "float",
        "optimizer": "str", "precision": "str", "checks": "int", "patience": "int", "standard_errors": "float",
        "negatives_depth": "int", "check_share": "float", "check_passages": "int", "check_tokens": "int",
        "check_steps": "int", "tokens": "int", "least_tokens": "int", "memory": "float", "steps": "int",
        "check_every": "int", "query_length": "int", "passage_length": "int", "device": "str", "depth": "int",
    },
    "bm25": {"queries": "int", "without_hits": "int", "bigram_passages": "int"},
    "kept": "str",
    "best_step": "int",
    "stop_step": "int",
    "validation": {
        "queries": "int", "passages": "int", "start": {"nDCG@10": "float"}, "best": {"nDCG@10": "float"},
        "difference": "float", "standard_error": "float",
    },
    "merge": {
        "alphas": ["float"], "values": ["float"], "alpha": "float", "step": "int", "difference": "float", "standard_error": "float",
    },
    "hybrid": {
        "weight": "float", "weights": ["float"], "curve": ["float"], "reciprocal_rank": "float", "queries": "int",
    },
    "relevant_queries": "int",
    "measures": dict.fromkeys(("start", "trained", "bm25", "hybrid"), MEANS),
    "comparisons": dict.fromkeys(
        ("trained vs start", "trained vs bm25", "hybrid vs trained", "hybrid vs bm25"), TESTED
    ),
    "verdict": "str",
    "seconds": dict.fromkeys(("collection", "encoding", "ranking", "triples", "training", "validation"), "float"),
    "versions": dict.fromkeys(
        ("python", "adaptive-margins", "torch", "transformers", "sentence-transformers", "datasets"), "str"
    ),
}  # fmt: skip
EVALUATE = {
    "measures": MEANS, "queries": "int", "relevant_queries": {"nDCG@10": "int", "R(rel=1)@100": "int"}, "missing": "int",
    "run": "str", "mode": "str", "set": "str", "depth": "int", "model": "str", "identity": "str",
    "options": OPTIONS,
    "collection": {"name": "str", "source": "str", "fingerprint": "str", "passages": "int"}, "split": "str",
    "excluded_self": "bool", "truncated": TRUNCATED,
}  # fmt: skip
COMPARE = {
    "measure": "str", "margin": "float", "alpha": "float", "queries": "int", "relevant_queries": "int",
    "baseline": "NoneType", "correction": "str", "resamples": "int",
    "runs": {f"{name}.test": {"mean": "float", "missing": "int"} for name in ("trained", "start", "bm25")},
    "pairs": [
        {
            "a": "str", "b": "str", "n": "int", "difference": "float", "ci": ["float"], "p_t": "float", "p_tost": "float",
            "margin": "float", "verdict": "str", "p_t_adjusted": "float", "p_tost_adjusted": "float",
            "p_randomisation": "float", "p_randomisation_adjusted": "float", "words": "str",
        }
    ],
    "plot": "NoneType",
}  # fmt: skip


def types(value: object) -> object:
    """Names of types in the place of values; a list stands for its first element."""
    if isinstance(value, dict):
        return {key: types(inner) for key, inner in value.items()}
    return [types(value[0])] if isinstance(value, list) else type(value).__name__


def test_json_and_runs_of_train_evaluate_and_compare(call, answer, corpus, encoder, tmp_path, monkeypatch):  # fmt: skip
    output, run_out = tmp_path / "trained", tmp_path / "again.run"
    cache = tmp_path / "home" / "cache" / "embeddings"
    monkeypatch.setenv("ADAPTIVE_MARGINS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("ADAPTIVE_MARGINS_CACHE_GB", "1")
    options = ["--output", output, "--model", encoder, "--triples", "64", "--json"]
    chosen = {"query_prompt": "sort ", "passage_prompt": "path ", "dimensions": 12, "max_length": 9}
    options += [part for name, value in chosen.items() for part in (f"--{name.replace('_', '-')}", value)]  # fmt: skip
    code, out, err = call("train", corpus, *options, "--batch-size", 8, "--learning-rate", 0.001)
    assert code == 0, err
    report = json.loads(out)
    assert report == json.loads((output / "training.json").read_text())
    assert types(report) == TRAIN
    assert report["model_dir"] == str(output)
    assert all("warning" in line for line in err.splitlines())  # no progress

    assert report["options"] == chosen
    assert (report["settings"]["batch_size"], report["settings"]["learning_rate"]) == (8, 0.001)
    plain = SentenceTransformer(str(output), device="cpu")
    assert (plain.get_embedding_dimension(), plain.max_seq_length) == (12, 9)
    assert (plain.prompts["query"], plain.prompts["document"]) == ("sort ", "path ")

    # The other commands give the same values for the test queries, with what is saved with the encoder.
    entries = set(cache.glob("[!.]*"))
    assert len(entries) == 1 + (report["kept"] == "trained")
    found = answer("evaluate", corpus, "--model", output, "--run-out", run_out)
    if report["kept"] == "trained":  # its passages are not embedded again
        assert set(cache.glob("[!.]*")) == entries
    shutil.rmtree(cache)
    again = answer("evaluate", corpus, "--model", output, "--no-cache")
    assert (again["measures"], cache.exists()) == (found["measures"], False)
    assert types(found) == EVALUATE
    assert found["measures"] == pytest.approx(report["measures"]["trained"])
    assert found["queries"] == report["collection"]["sets"]["test"]
    first = run_out.read_text().splitlines()[0]
    assert re.fullmatch(r"q\d+ Q0 d\d+ 1 -?[\d.e-]+ adaptive-margins", first)
    runs = [output / "runs" / f"{name}.test.run.gz" for name in ("trained", "start", "bm25")]
    assert read_run(runs[0]).keys() == read_run(run_out).keys() == read_qrels(output / "qrels.test.txt").keys()  # fmt: skip
    found = answer("compare", "--qrels", output / "qrels.test.txt", *runs)
    assert {pair.pop("more_queries") is not None for pair in found["pairs"]} <= {True, False}
    assert types(found) == COMPARE
    assert found["runs"]["bm25.test"]["mean"] == pytest.approx(report["measures"]["bm25"]["nDCG@10"])  # fmt: skip
    difference = report["comparisons"]["trained vs start"]["difference"]
    assert found["pairs"][0]["difference"] == pytest.approx(difference)
    assert {pair["verdict"] for pair in found["pairs"]} <= {"equivalent", "different", "undecided"}


# ---- all commands ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_examples_that_can_be_copied(name):
    done = CliRunner().invoke(cli.app, [name, "--help"], env={"COLUMNS": "80"})
    assert done.exit_code == 0 and "--json" in done.output
    lines = [line.strip() for line in done.output.split("Examples:")[1].splitlines()]
    examples = [line for line in lines if line]
    assert examples
    assert all(re.match(rf"adaptive-margins {name} \w|adaptive-margins {name} --qrels", e) for e in examples)  # fmt: skip


def test_interrupted(call, monkeypatch, corpus):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sources, "open_collection", interrupt)
    code, out, err = call("collection", corpus)
    assert (code, out) == (130, "") and "Traceback" not in err


def test_errors_are_one_line(call, two_runs, tmp_path):
    broken = tmp_path / "broken.run"
    broken.write_text("q1 Q0 d1 1 high x\n")
    qrels = ("compare", "--qrels", two_runs / "qrels.txt", two_runs / "bad.run")
    for arguments, begins in (
        ((*qrels, tmp_path / "none.run"), f"{tmp_path}/none.run: file not found"),
        ((*qrels, tmp_path, "--json"), f"{tmp_path}: is a folder"),
        ((*qrels, broken, "--json"), f"{broken}:1: score 'high'"),
        (("evaluate", tmp_path / "none", "--model", "minilm"), f"there is no collection '{tmp_path}/none'"),
        (("search", tmp_path / "none", "sort", "--json"), f"no index of passages at {tmp_path}/none"),
    ):  # fmt: skip
        code, out, err = call(*arguments)
        assert (code, out) == (1, "")
        assert err.startswith(f"adaptive-margins: {begins}")
        assert err.count("\n") == 1 or arguments[0] == "evaluate"


def test_what_libraries_print_does_not_reach_stdout_and_warnings_are_one_line(
    call, monkeypatch, corpus
):
    def open_collection(source):
        print("from some library")
        warnings.warn("watch\nout", stacklevel=2)
        progress.say("reading on and on")
        return read_folder(Path(source))

    monkeypatch.setattr(sources, "open_collection", open_collection)
    code, out, err = call("collection", corpus, "--json")
    assert code == 0 and json.loads(out)["passages"] == 120
    lines = err.splitlines()
    assert lines[:2] == ["from some library", "adaptive-margins: warning: watch out"]
    assert len(lines) == 3
    _, _, err = call("collection", corpus, "--json", "--verbose")
    assert "reading on and on" in err.splitlines()


# ---- compare -----------------------------------------------------------------------------------------


def test_compare(call, answer, two_runs):
    found = answer("compare", *files(two_runs), "--per-query")
    expected = compare_runs(
        read_qrels(two_runs / "qrels.txt"),
        {name: read_run(two_runs / f"{name}.run") for name in ("good", "bad")},
    )
    assert found == {**json.loads(json.dumps(expected)), "plot": None}
    (pair,) = found["pairs"]
    assert (pair["a"], pair["b"], pair["verdict"]) == ("good", "bad", "different")
    code, out, err = call("compare", *files(two_runs))
    assert (code, err) == (0, "") and out.splitlines()[-1] == pair["words"]

    options = ["--measure", "R@5", "--margin", "0.9", "--per-query"]
    found = answer("compare", *files(two_runs), *options)
    assert (found["measure"], found["margin"]) == ("R(rel=1)@5", 0.9)
    assert found["pairs"][0]["verdict"] == "equivalent"
    scores = evaluate(read_qrels(two_runs / "qrels.txt"), read_run(two_runs / "good.run"), ["R(rel=1)@5"])  # fmt: skip
    assert found["per_query"]["good"] == pytest.approx(scores.per_query["R(rel=1)@5"])


def test_compare_draws_what_the_suffix_says(answer, two_runs):
    for suffix, begins in ((".svg", b"<?xml"), (".pdf", b"%PDF")):
        plot = two_runs / f"plots{suffix}" / f"differences{suffix}"
        assert answer("compare", *files(two_runs), "--plot", plot)["plot"] == str(plot)
        assert plot.read_bytes().startswith(begins)
        assert [path.name for path in plot.parent.iterdir()] == [plot.name]


def test_compare_refuses(call, two_runs):
    for options, status, message in (
        (["--margin", "0"], 2, "--margin: expected a number above 0, got 0.0"),
        (["--margin", "nan"], 2, "--margin: expected a number above 0, got nan"),
        (["--measure", "Hits@5"], 2, "cannot compute the measure 'Hits@5'"),
        (["--measure", "AP RR"], 2, "expected 1 measure, got 'AP RR'"),
        (["--plot", "x.jpg"], 2, "expected a name that ends in .png, .svg, .pdf, got x.jpg"),
        (["--measure", "R@100"], 1, "R(rel=1)@100 needs 100 hits a query; the run has at most 20"),
    ):
        code, out, err = call("compare", *files(two_runs), *options)
        assert (code, out) == (status, "") and message in err
    code, out, err = call("compare", *files(two_runs)[:3])
    assert (code, out) == (2, "") and "RUN: two or more are needed, got 1" in err


def test_compare_with_a_baseline_in_three_formats(call, answer, two_runs):
    shutil.copy(two_runs / "good.run", two_runs / "other.run")
    qrels, *runs = ["--qrels", two_runs / "qrels.txt"], *(two_runs / f"{n}.run" for n in ("good", "other", "bad"))  # fmt: skip
    options = [*qrels, "--baseline", two_runs / "bad.run"]
    found = answer("compare", *options, *runs)
    assert found == answer("compare", *options, *runs[:2])  # it need not be named again
    pairs = [(pair["a"], pair["b"]) for pair in found["pairs"]]
    assert pairs == [("good", "bad"), ("other", "bad")]
    assert list(found["runs"]) == ["bad", "good", "other"] and found["baseline"] == "bad"
    for form, part in (("text", "a − b"), ("markdown", "| a "), ("latex", r"\toprule")):
        code, out, err = call("compare", *options, *runs, "--format", form)
        assert (code, err) == (0, "") and part in out
        assert found["pairs"][0]["words"] in out
    assert call("compare", *options)[0] == 2


def test_compare_reads_pipes_to_their_end(answer, two_runs, tmp_path):
    pipes = {name: tmp_path / f"pipe of {name}" for name in ("qrels.txt", "bad.run")}
    writers = []
    for name, pipe in pipes.items():
        os.mkfifo(pipe)
        data = gzip.compress((two_runs / name).read_bytes())
        writers.append(threading.Thread(target=pipe.write_bytes, args=(data,)))
        writers[-1].start()
    found = answer("compare", "--qrels", pipes["qrels.txt"], two_runs / "good.run", pipes["bad.run"])  # fmt: skip
    for writer in writers:
        writer.join()
    expected = answer("compare", *files(two_runs))
    assert found["queries"] == expected["queries"] == 30
    assert found["pairs"][0]["difference"] == expected["pairs"][0]["difference"]


# ---- evaluate ----------------------------------------------------------------------------------------


def cosine_run(encoder: Path, corpus: Path, depth: int):
    """All passages with text by cosine, with the encoder as Sentence Transformers runs it."""
    model, collection = SentenceTransformer(str(encoder), device="cpu"), read_folder(corpus)
    ids = [i for i in collection.passages.ids if collection.passages[i]]
    passages = model.encode([collection.passages[i] for i in ids], normalize_embeddings=True)
    queries = collection.queries["test"]
    scores = model.encode(list(queries.texts), normalize_embeddings=True) @ passages.T
    return {
        qid: dict(top(dict(zip(ids, map(float, row), strict=True)), depth))
        for qid, row in zip(queries.ids, scores, strict=True)
    }


def test_evaluate_ranks_all_passages(answer, corpus, encoder, tmp_path):
    run_out = tmp_path / "runs" / "tiny.run.gz"
    found = answer("evaluate", corpus, "--model", encoder, "--run-out", run_out, "--per-query")
    run, collection = read_run(run_out), read_folder(corpus)
    expected = cosine_run(encoder, corpus, 100)
    assert run.keys() == expected.keys()
    for qid, hits in run.items():
        assert len(hits) == 100 and "d7" not in hits
        assert hits == pytest.approx({**hits, **expected[qid]}, abs=2e-6)
    scores = evaluate(collection.qrels["test"], run, ["nDCG@10", "R(rel=1)@100"])
    assert found.pop("per_query") == scores.per_query
    assert re.fullmatch("[0-9a-f]{64}", found.pop("identity"))
    about = {"name": "words", "source": str(corpus), "fingerprint": collection.fingerprint, "passages": 120}  # fmt: skip
    assert found == {
        "measures": scores.mean, "queries": 40, "relevant_queries": {"nDCG@10": 40, "R(rel=1)@100": 40}, "missing": 0,
        "run": str(run_out), "mode": "full", "set": "test", "depth": 100, "model": str(encoder), "collection": about,
        "split": "", "excluded_self": False,
        "options": {"query_prompt": "", "passage_prompt": "", "dimensions": 16, "max_length": 64},
        "truncated": {"queries": 0, "passages": 0, "lost": {"queries": 0.0, "passages": 0.0}, "limit": 64},
    }  # fmt: skip


@pytest.fixture
def few(corpus, tmp_path):
    """A collection of nine passages, one of them without text, and a query for each."""
    everything, folder = read_folder(corpus), tmp_path / "few"
    folder.mkdir()
    texts = {f"d{i}": everything.passages[f"d{i}"] for i in range(9)}
    words = [" ".join(text.split()[:3]) or "nothing" for text in texts.values()]
    for name, lines in (
        ("collection.tsv", [f"{docid}\t{text}\n" for docid, text in texts.items()]),
        ("queries.tsv", [f"q{i}\t{text}\n" for i, text in enumerate(words)]),
        ("qrels.txt", [f"q{i} 0 d{i} 1\n" for i in range(9)]),
    ):
        (folder / name).write_text("".join(lines))
    return folder


def test_rankings_of_a_small_collection_are_complete(call, answer, few, encoder, tmp_path):
    qrels = read_folder(few).qrels["test"]
    runs = {mode: tmp_path / f"{mode}.run" for mode in ("full", "rerank")}
    for mode, path in runs.items():
        found = answer("evaluate", few, "--model", encoder, "--mode", mode, "--run-out", path)
        trec = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "recall.100"})
        values = trec.evaluate(read_run(path)).values()
        assert found["measures"] == {
            "nDCG@10": pytest.approx(sum(v["ndcg_cut_10"] for v in values) / len(qrels)),
            "R(rel=1)@100": pytest.approx(sum(v["recall_100"] for v in values) / len(qrels)),
        }
        assert max(map(len, read_run(path).values())) < 10
    options = ["--qrels", few / "qrels.txt", *runs.values(), "--measure", "R@100"]
    assert answer("compare", *options)["runs"]["full"]["mean"] == pytest.approx(8 / 9)
    for path in runs.values():  # without the mark of a complete run
        write_run(read_run(path), path, "theirs")
    code, out, err = call("compare", *options)
    assert (code, out) == (1, "") and "needs 100 hits" in err
    found = answer("compare", *options, "--complete")
    assert found["runs"]["full"]["mean"] == pytest.approx(8 / 9)


def test_a_part_of_a_large_collection_is_not_complete(call, corpus, encoder, tmp_path):
    runs = [tmp_path / "a.run", tmp_path / "b.run"]
    options = ["--depth", "10", "--measures", "nDCG@10", "--run-out", runs[0]]
    assert call("evaluate", corpus, "--model", encoder, *options)[0] == 0
    shutil.copy(*runs)
    code, out, err = call("compare", "--qrels", corpus / "qrels.txt", *runs, "--measure", "R@100")
    assert (code, out) == (1, "") and "the run has at most 10" in err
    folder = shutil.copytree(corpus, tmp_path / "full")
    text = (folder / "collection.tsv").read_text()
    (folder / "collection.tsv").write_text(text.replace("d7\t\n", "d7\tsort\n"))
    options = ["--depth", "119", "--run-out", runs[0], "--exclude-self"]  # no query is a passage
    assert call("evaluate", folder, "--model", encoder, *options)[0] == 0
    assert not read_marked_run(runs[0])[1]


def test_evaluate_refuses_judgements_without_a_relevant_passage(call, few, encoder):
    judged = (few / "qrels.txt").read_text().splitlines()
    zero = "".join(f"{line[:-1]}0\n" for line in judged)
    few.joinpath("qrels.txt").write_text(zero)
    code, out, err = call("evaluate", few, "--model", encoder, "--json")
    assert (code, out) == (1, "") and "9 judged queries, grades 0 (9)" in err
    few.joinpath("qrels.txt").write_text(zero.partition("\n")[2] + judged[0])
    code, out, _ = call("evaluate", few, "--model", encoder)
    assert code == 0 and "9 queries (1 with a relevant passage)" in out
    code, out, err = call("evaluate", few, "--model", encoder, "--measures", "ERR@10 R(rel=2)@5")
    assert (code, out) == (1, "") and "R(rel=2)@5 needs grade 2" in err


def test_evaluate_reranks(call, answer, corpus, encoder, tmp_path):
    run_out, path = tmp_path / "reranked.run", tmp_path / "candidates.run"
    options = ["--model", encoder, "--mode", "rerank", "--run-out", run_out]
    found = answer("evaluate", corpus, *options, "--measures", "AP R@20", "--depth", "20")
    assert (found["mode"], found["depth"]) == ("rerank", 20)
    assert list(found["measures"]) == ["AP(rel=1)", "R(rel=1)@20"]
    collection, run = read_folder(corpus), read_run(run_out)
    candidates = BM25(collection.passages).search(collection.queries["test"], 20)
    everything = cosine_run(encoder, corpus, 120)
    for qid, hits in candidates.items():
        assert run[qid] == pytest.approx({d: everything[qid][d] for d in hits}, abs=2e-6)

    assert answer("evaluate", corpus, *options, "--measures", "R@110")["depth"] == 110

    # A file of candidates, some of queries that are not asked, cut at a depth.
    given = {**{qid: hits for qid, hits in list(candidates.items())[:30]}, "z9": {"d1": 1.0}}
    write_run(given, path, "x")
    options += ["--candidates", path, "--depth", "10", "--measures", "R@5"]
    code, out, err = call("evaluate", corpus, *options)
    assert code == 0 and "without candidates count 0: 10 of 40" in err
    cut = read_run(run_out)
    assert cut.keys() == given.keys() - {"z9"}
    for qid, hits in cut.items():
        assert hits.keys() == {docid for docid, _ in top(given[qid], 10)}
    expected = evaluate(collection.qrels["test"], cut, ["R(rel=1)@5"]).mean["R(rel=1)@5"]
    assert ["R(rel=1)@5", f"{expected:.4f}"] in [line.split() for line in out.splitlines()]


def test_evaluate_refuses_what_makes_no_sense(call, corpus, encoder, tmp_path):
    def fails(status, *options, where=corpus):
        code, out, err = call("evaluate", where, "--model", encoder, *options)
        assert (code, out) == (status, "")
        return err

    assert "'nothing' is not one of 'full', 'rerank'" in fails(2, "--mode", "nothing")
    assert "--set: words has no queries 'dev'; it has test" in fails(2, "--set", "dev")
    assert "cannot compute the measure 'Hits@5'" in fails(2, "--measures", "Hits@5")
    assert "expected at least one measure" in fails(2, "--measures", " ")
    assert "--depth: 50 passages a query are too few for nDCG@10 R(rel=1)" in fails(2, "--depth", "50")  # fmt: skip
    candidates = tmp_path / "candidates.run"
    options = ("--mode", "rerank", "--candidates", candidates)
    for line, found in (
        ("q1 Q0 d1 1 1.0 x\n", "R(rel=1)@100 needs 100 hits a query; the run has at most 1"),
        ("q1 Q0 zebra 1 1.0 x\n", "1 of 1 candidates are unknown passages, first 'zebra'"),
        ("z1 Q0 d1 1 1.0 x\n", "has none of the 40 queries"),
    ):
        candidates.write_text(line)
        assert found in fails(1, *options)
    assert "--candidates: " in fails(2, *options[2:])
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(corpus / "collection.tsv", alone)
    assert "alone has passages, but no queries to evaluate with" in fails(1, where=alone)


def test_the_set_that_is_asked_for(answer, corpus, encoder, tmp_path):
    folder = shutil.copytree(corpus, tmp_path / "sets")
    for name, suffix in (("queries", "tsv"), ("qrels", "txt")):
        lines = (folder / f"{name}.{suffix}").read_text().splitlines(keepends=True)
        train = [line for line in lines if re.match(r"q\d\s", line)]
        (folder / f"{name}_train.{suffix}").write_text("".join(train))
        (folder / f"{name}.{suffix}").write_text("".join(line for line in lines if line not in train))  # fmt: skip
    options = ["--model", encoder, "--measures", "nDCG@10"]
    for extra, name, count in (([], "test", 30), (["--set", "train"], "train", 10)):
        found = answer("evaluate", folder, *options, *extra)
        assert (found["set"], found["queries"]) == (name, count)
    fused = answer("evaluate", folder, *options, "--mode", "hybrid")["hybrid"]
    assert (fused["how"], fused["queries"]) == ("the best for 10 queries of train", 10)
    best = max(fused["curve"])
    assert fused["weights"][fused["curve"].index(best)] == fused["weight"] or fused["weight"] == 1
    for name in ("queries.tsv", "qrels.txt"):
        (folder / name).unlink()
    assert answer("evaluate", folder, *options)["set"] == "train"


def test_an_encoder_is_not_tested_on_the_queries_it_was_trained_on(call, corpus, encoder, tmp_path):
    parts, split = split_queries(read_folder(corpus), seed=5)
    tested = parts.queries["test"]
    lines = "".join(f"{qid}\t{tested[qid]}\n" for qid in tested)
    trained = shutil.copytree(encoder, tmp_path / "trained")
    grown, asked = (shutil.copytree(corpus, tmp_path / name) for name in ("grown", "asked"))
    for path, line in (
        (grown / "collection.tsv", "d120\tsort the graph\n"),  # the split is the same
        (asked / "queries.tsv", "q40\tsort the graph\n"),
        (asked / "qrels.txt", "q40 0 d1 1\n"),
    ):
        with path.open("a") as file:
            file.write(line)
    for source, how, stored, queries, warned in (
        (corpus, split, lines, len(tested), False),
        (grown, split, lines, len(tested), False),
        (asked, split, lines, 41, True),
        (corpus, split, "z1\tof another collection\n", 40, False),
        (corpus, "", lines, 40, False),  # on given training queries
    ):
        report = {"seed": 5, "collection": {"split": how}}
        (trained / "training.json").write_text(json.dumps(report))
        (trained / "queries.test.tsv").write_text(stored)
        run = tmp_path / "x.run"
        options = ["--model", trained, "--measures", "nDCG@10", "--run-out", run, "--json"]
        code, out, err = call("evaluate", source, *options)
        found = json.loads(out)
        assert code == 0 and found["queries"] == len(read_run(run)) == queries
        assert bool(found["split"]) == (queries < 40)
        assert ("has changed since" in err) == warned


def test_evaluate_fuses_with_bm25_and_compares(call, answer, corpus, encoder, tmp_path):
    run_out, collection = tmp_path / "hybrid.run", read_folder(corpus)
    options = ["--mode", "hybrid", "--run-out", run_out]
    found = answer("evaluate", corpus, "--model", encoder, *options)
    about, qrels = found.pop("hybrid"), collection.qrels["test"]
    assert types(found) == EVALUATE
    deep = {
        "dense": cosine_run(encoder, corpus, 1000),
        "bm25": BM25(collection.passages).search(collection.queries["test"], 1000),
    }
    runs = {name: truncated(run, 100) for name, run in deep.items()}
    runs["hybrid"] = hybrid(deep["dense"], deep["bm25"], 100)
    assert (about["weight"], about["bm25"]) == (None, {"queries": 40, "without_hits": 0})
    for qid, hits in read_run(run_out).items():
        assert hits == pytest.approx(runs["hybrid"][qid])
    means = {name: evaluate(qrels, run, list(MEANS)).mean for name, run in runs.items()}
    assert about["measures"] == {name: pytest.approx(mean) for name, mean in means.items()}
    assert found["measures"] == about["measures"]["hybrid"]
    assert types(about["comparisons"]) == dict.fromkeys(("hybrid vs bm25", "hybrid vs dense", "dense vs bm25"), TESTED)  # fmt: skip
    pair = about["comparisons"]["hybrid vs dense"]
    assert pair["difference"] == pytest.approx(means["hybrid"]["nDCG@10"] - means["dense"]["nDCG@10"])  # fmt: skip
    code, out, _ = call("evaluate", corpus, "--model", encoder, "--mode", "hybrid")
    assert code == 0 and "hybrid vs dense" in out and "reciprocal ranks" in out
    assert call("evaluate", corpus, "--model", encoder, *options, "--candidates", run_out)[0] == 2


# ---- index and search --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def index(corpus, encoder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("indexes") / "words.index"
    done = CliRunner().invoke(
        cli.app, ["index", str(corpus), "--model", str(encoder), "--output", str(folder), "--json"]
    )
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["index"], found["passages"], found["kind"]) == (str(folder), 119, "Flat")
    assert (found["encoder"]["name"], found["collection"]["name"]) == (str(encoder), "words")
    assert found["bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    return folder


def test_search_finds_what_an_exact_search_finds(answer, index, corpus, encoder):
    collection = read_folder(corpus)
    query = collection.queries["test"]["q3"]
    found = answer("search", index, query, "--depth", "5", "--mode", "dense")
    expected = top(cosine_run(encoder, corpus, 5)["q3"])
    hits = found["hits"]
    assert [(h["rank"], h["docid"]) for h in hits] == list(enumerate((d for d, _ in expected), start=1))  # fmt: skip
    assert [hit["score"] for hit in hits] == pytest.approx([s for _, s in expected], abs=2e-6)
    assert [hit["text"] for hit in hits] == [collection.passages[docid] for docid, _ in expected]
    assert (found["queries"], found["depth"], found["run"]) == ({"1": query}, 5, None)


def test_search_for_many_queries(call, answer, index, corpus, encoder, tmp_path, monkeypatch):
    run_out = tmp_path / "all.run"
    options = ["--queries", corpus / "queries.tsv", "--depth", "10", "--mode", "dense"]
    code, out, _ = call("search", index, *options, "--run-out", run_out)
    assert (code, out) == (0, f"{run_out}: 400 hits of 40 queries\n")
    expected, run = cosine_run(encoder, corpus, 10), read_run(run_out)
    assert {qid: hits.keys() for qid, hits in run.items()} == {qid: hits.keys() for qid, hits in expected.items()}  # fmt: skip
    assert {hit["qid"] for hit in answer("search", index, *options)["hits"]} == expected.keys()
    monkeypatch.setenv("COLUMNS", "30")
    blocks = [block.strip().splitlines() for block in call("search", index, *options)[1].split("\n\n")]  # fmt: skip
    assert [lines[0].split(":")[0] for lines in blocks] == list(expected)
    for lines in blocks:
        assert [line.split()[0] for line in lines[1:]] == [str(rank) for rank in range(1, 11)]
        assert max(map(len, lines)) <= 30


def test_search_fuses_with_bm25_by_default(answer, index, corpus, encoder, tmp_path):
    collection = read_folder(corpus)
    ids = [docid for docid in collection.passages.ids if collection.passages[docid]]
    bm25 = BM25(Texts(ids, [collection.passages[docid] for docid in ids]))
    asked, dense = collection.queries["test"], cosine_run(encoder, corpus, 100)
    for mode, weight in ((None, None), ("bm25", 0.0)):
        options = ["--queries", corpus / "queries.tsv", "--depth", "7"]
        found = answer("search", index, *options, *(["--mode", mode] if mode else []))
        assert (found["mode"], found["weight"]) == (mode or "hybrid", weight)
        expected = hybrid(dense, bm25.search(asked, 100), 7, weight)
        for qid, hits in expected.items():
            scores = [hit["score"] for hit in found["hits"] if hit["qid"] == qid]
            assert scores == pytest.approx(list(hits.values()), abs=2e-6)


def test_an_index_is_searched_as_it_was_made(answer, call, corpus, encoder, tmp_path):
    chosen = {"query_prompt": "sort ", "passage_prompt": "path ", "dimensions": 5, "max_length": 9}
    options = [part for name, value in chosen.items() for part in (f"--{name.replace('_', '-')}", value)]  # fmt: skip
    index, runs = tmp_path / "index", [tmp_path / "a.run", tmp_path / "b.run"]
    made = answer("index", corpus, "--model", encoder, "--output", index, *options)
    assert made["options"] == chosen
    assert made["truncated"]["passages"] > 0 < made["truncated"]["lost"] < 1
    found = answer("evaluate", corpus, "--model", encoder, "--run-out", runs[0], *options)
    assert found["options"] == chosen
    queries = ["--queries", corpus / "queries.tsv", "--depth", "100", "--mode", "dense"]
    assert call("search", index, *queries, "--run-out", runs[1])[0] == 0
    expected, again = map(read_run, runs)
    assert expected.keys() == again.keys() and expected != cosine_run(encoder, corpus, 100)
    for qid, hits in expected.items():
        assert sorted(again[qid].values()) == pytest.approx(sorted(hits.values()), abs=2e-6)


def test_index_and_search_refuse(call, index, corpus, encoder, tmp_path):
    queries = tmp_path / "queries.tsv"
    for arguments in ([], ["sort", "--queries", corpus / "queries.tsv"]):
        code, out, err = call("search", index, *arguments)
        assert (code, out) == (2, "") and "give one of QUERY and --queries" in err
    assert call("search", index, " ")[0] == call("search", index, "sort", "--depth", "0")[0] == 2
    queries.write_text("1\tsort\n1\tthe\n2 3\tgraph\n3\t \n4\n")
    code, out, err = call("search", index, "--queries", queries)
    assert (code, out) == (1, "")
    assert all(f"{queries}:{line}: " in err for line in (2, 3, 4, 5))
    code, out, err = call("index", corpus, "--model", encoder, "--output", index)
    assert (code, out) == (1, "") and f"{index} cannot be written: it exists" in err


# ---- collection --------------------------------------------------------------------------------------


def test_collection(call, answer, corpus, tmp_path):
    found = answer("collection", corpus)
    assert (found["name"], found["passages"], found["page"]) == ("words", 120, None)
    page = tmp_path / "pages" / "words.html"
    code, out, _ = call("collection", corpus, "--output", page)
    assert code == 0 and out.splitlines()[-1] == f"Page: {page}"
    assert page.read_text("utf-8").lower().startswith("<!doctype html>")


def test_a_file_on_stdout_is_not_mixed_with_the_report(tmp_path):
    (tmp_path / "collection.tsv").write_text("d1\ta passage\n")
    command = [sys.executable, "-m", "adaptive_margins.cli", "collection", tmp_path]
    done = subprocess.run([*command, "--output", "/dev/stdout"], capture_output=True, text=True, check=True)  # fmt: skip
    assert done.stdout.rstrip().endswith("</html>")
    assert "Passages" in done.stderr


def test_collection_lists_the_runs_in_its_folder(call, answer, corpus, tmp_path):
    folder = shutil.copytree(corpus, tmp_path / "with_runs")
    (folder / "mine.run").write_text("q0 Q0 d1 1 2.5 me\nq0 Q0 d2 2 1.5 me\nq1 Q0 nowhere 1 1 me\n")
    run = {"q0": {"d1": 2.5, "d2": 1.5}, "q1": {"nowhere": 1.0}}
    expected = evaluate(read_folder(corpus).qrels["test"], run, ["nDCG@10"]).mean["nDCG@10"]
    about = {"set": "test", "queries": 2, "depth": 2, "unknown": 1, "nDCG@10": expected}
    assert answer("collection", folder)["runs"] == {"mine": about}
    (folder / "mine.run").write_text("q0 Q0 d1 1 much me\n")
    (folder / "._mine.run").write_bytes(b"\x00\x05\x16\x07")
    code, out, err = call("collection", folder, "--json")
    assert code == 0 and json.loads(out)["runs"] == {}
    assert err.count("not a run:") == 1 and "mine.run:1:" in err and "'much'" in err


# ---- train -------------------------------------------------------------------------------------------

REPORT = {
    "model_dir": "out dir",
    "collection": {"split": "Of the 10 queries …", "pseudo": None},
    "kept": "trained",
    "measures": {
        name: {"nDCG@10": value, "R(rel=1)@100": 1.0}
        for name, value in zip(("start", "trained", "bm25", "hybrid"), (0.1, 0.25, 0.2, 0.3), strict=True)
    },
    "comparisons": {
        "trained vs start": {"difference": 0.15, "ci": [0.1, 0.2], "p_t": 0.01, "p_tost": 0.9, "verdict": "better"},
        "trained vs bm25": {"difference": 0.05, "ci": None, "p_t": None, "p_tost": None, "verdict": "too few queries"},
    },
    "verdict": "The trained encoder is better.",
}  # fmt: skip


@pytest.fixture
def asked(monkeypatch):
    """What `finetune` is called with, in the place of fine-tuning."""
    calls = []

    def finetune(source, output, **options):
        calls.append((source, output, options))
        return finetuning.Finetuned(output, REPORT)

    monkeypatch.setattr(finetuning, "finetune", finetune)
    return calls


def test_train_hands_on_what_was_asked_for(answer, call, asked):
    assert answer("train", "corpus", "--output", "out dir") == REPORT
    call("train", "corpus", "--output", "o", "--target", ".3", "--seed", 7, "--negatives", "encoder", "--triples", 9,
         "--measures", "P@5 nDCG@10 P(rel=1)@5", "--device", "cpu", "--report-to", "tensorboard", "--model", "m", "--batch-size", 4,
         "--learning-rate", ".01", "--query-prompt", "q: ", "--passage-prompt", "p: ", "--dimensions", 8, "--max-length", 9,
         "--folds", 5, "--also", "other", "--no-cache")  # fmt: skip
    defaults = {
        "model": "minilm", "target": "distributed", "seed": 1, "measures": ["nDCG@10", "R(rel=1)@100"], "negatives": "bm25",
        "device": None, "triples": None, "report_to": (), "settings": Settings(), "options": EncoderOptions(),
        "folds": None, "also": None, "cache": True,
    }  # fmt: skip
    given = {
        "model": "m", "target": 0.3, "seed": 7, "measures": ["P(rel=1)@5", "nDCG@10"], "negatives": "encoder",
        "device": "cpu", "triples": 9, "report_to": ("tensorboard",),
        "settings": Settings(batch_size=4, learning_rate=0.01), "options": EncoderOptions("q: ", "p: ", 8, 9), "folds": 5, "also": "other",
        "cache": False,
    }  # fmt: skip
    assert asked == [("corpus", Path("out dir"), defaults), ("corpus", Path("o"), given)]


def test_train_prints_the_outcome_and_what_to_do_next(call, asked):
    lines = call("train", "my corpus", "--output", "out dir")[1].splitlines()
    rows = [line.split() for line in lines]
    assert lines[0] == "Of the 10 queries …"
    for name, value in (("start", ".1"), ("trained", ".25"), ("bm25", ".2"), ("hybrid", ".3")):
        assert [name, f"{float(value):.4f}", "1.0000"] in rows
    assert ["trained", "vs", "start", "+0.1500", "[+0.1000,", "+0.2000]", "0.0100", "0.9000", "better"] in rows  # fmt: skip
    assert ["trained", "vs", "bm25", "+0.0500", "—", "—", "—", "too", "few", "queries"] in rows
    assert "The trained encoder is better." in lines
    assert (
        "  adaptive-margins index 'my corpus' --model 'out dir' --output 'out dir'.index" in lines
    )


def test_train_refuses(call, tmp_path):
    for options, message in (
        (["--target", "dynamic"], "--target: target is 'dynamic'; expected"),
        (["--negatives", "random"], "'random' is not one of 'bm25', 'encoder'"),
        (["--report-to", "paper"], "--report-to: cannot report to 'paper'; expected any of tens"),
        (["--triples", "1"], "Invalid value for '--triples'"),
        (["--measures", "Hits"], "cannot compute the measure 'Hits'"),
    ):
        code, out, err = call("train", "corpus", "--output", tmp_path / "o", *options)
        assert (code, out) == (2, "") and message in err
    assert not list(tmp_path.iterdir())
