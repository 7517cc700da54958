"""The commands for one's own corpus as people and scripts call them: output, JSON, errors, exit status."""

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
from typer.testing import CliRunner

from adaptive_margins import cli, progress
from adaptive_margins.corpus import finetune as finetuning
from adaptive_margins.data import sources
from adaptive_margins.data.folder import read_folder
from adaptive_margins.data.sources import split_queries
from adaptive_margins.data.trec import read_qrels, read_run, top, write_run
from adaptive_margins.encoder.load import open_encoder
from adaptive_margins.evaluation.comparison import compare_runs
from adaptive_margins.evaluation.measures import Evaluation, evaluate
from adaptive_margins.paper.store import Store
from adaptive_margins.retrieval.bm25 import BM25
from conftest import WORDS, run_config

COMMANDS = ["train", "evaluate", "compare", "index", "search", "collection", "status"]
TERMS = WORDS[5:]


@pytest.fixture
def call(monkeypatch, capsys):
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


def told(text: str) -> str:
    """A message on one line."""
    return " ".join(text.split())


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
    """Judgements and two runs in files."""
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


# ---- all commands --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_examples_that_can_be_copied(name):
    done = CliRunner().invoke(cli.app, [name, "--help"], env={"COLUMNS": "80"})
    assert done.exit_code == 0
    assert "--json" in done.output
    examples = [line.strip() for line in done.output.split("Examples:")[1].splitlines()]
    examples = [line for line in examples if line]
    assert examples
    assert all(line.startswith(f"adaptive-margins {name}") or name == "index" for line in examples)
    assert all(len(line.split()) > 1 for line in examples)
    assert f"{name} " in CliRunner().invoke(cli.app, ["--help"]).output


def test_interrupted(call, monkeypatch, corpus):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sources, "open_collection", interrupt)
    code, out, err = call("collection", corpus)
    assert (code, out) == (130, "")
    assert "Traceback" not in err


@pytest.mark.parametrize("json_too", [[], ["--json"]])
def test_errors_are_one_line(call, two_runs, tmp_path, json_too):
    missing, locked = tmp_path / "none.run", tmp_path / "bad.run"
    for path, message in ((missing, "file not found"), (tmp_path, "is a folder; expected a file")):
        code, out, err = call("compare", "--qrels", two_runs / "qrels.txt", locked, path, *json_too)
        assert (code, out, err) == (1, "", f"adaptive-margins: {path}: {message}\n")
    locked.write_text("q1 Q0 d1 1 high x\n")
    code, out, err = call("compare", "--qrels", two_runs / "qrels.txt", locked, locked, *json_too)
    assert (code, out) == (1, "")
    assert err.startswith(f"adaptive-margins: {locked}:1: score 'high' is not a finite number")
    assert err.count("\n") == 1
    code, out, err = call("evaluate", tmp_path / "none", "--model", "minilm", *json_too)
    assert (code, out) == (1, "")
    assert err.startswith(f"adaptive-margins: there is no collection '{tmp_path}/none'")
    code, out, err = call("search", tmp_path / "none", "sort", *json_too)
    assert (code, out) == (1, "")
    assert err.startswith(f"adaptive-margins: no index of passages at {tmp_path}/none")


def test_what_libraries_print_does_not_reach_stdout_and_warnings_are_one_line(
    call, monkeypatch, corpus
):
    def open_collection(source):
        print("from some library")
        warnings.warn("watch out", stacklevel=2)
        progress.say("reading on and on")
        return read_folder(Path(source))

    monkeypatch.setattr(sources, "open_collection", open_collection)
    code, out, err = call("collection", corpus, "--json")
    assert code == 0
    assert json.loads(out)["passages"] == 120
    lines = err.splitlines()
    assert lines[:2] == ["from some library", "adaptive-margins: warning: watch out"]
    assert len(lines) == 3
    assert "passages without text are kept" in lines[2]
    _, _, err = call("collection", corpus, "--json", "--verbose")
    assert "reading on and on" in err.splitlines()
    progress.say("and the process speaks again")


# ---- compare -------------------------------------------------------------------------------------------------------


def test_compare(call, two_runs):
    files = [two_runs / "good.run", two_runs / "bad.run"]
    code, out, err = call("compare", "--qrels", two_runs / "qrels.txt", *files, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    expected = compare_runs(
        read_qrels(two_runs / "qrels.txt"), {path.stem: read_run(path) for path in files}
    )
    del expected["per_query"]
    assert found == {**json.loads(json.dumps(expected)), "plot": None}
    (pair,) = found["pairs"]
    assert {"a", "b", "difference", "ci", "p_t", "p_tost", "verdict"} <= pair.keys()
    assert (pair["a"], pair["b"], pair["verdict"]) == ("good", "bad", "different")
    assert pair["ci"][0] < pair["difference"] < pair["ci"][1]

    code, out, err = call("compare", "--qrels", two_runs / "qrels.txt", *files)
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == pair["words"]


def test_compare_with_another_measure_margin_and_the_values_of_each_query(call, two_runs):
    files = [two_runs / "good.run", two_runs / "bad.run"]
    options = ["--measure", "R@5", "--margin", "0.9", "--json", "--per-query"]
    _, out, _ = call("compare", "--qrels", two_runs / "qrels.txt", *files, *options)
    found = json.loads(out)
    assert (found["measure"], found["margin"]) == ("R(rel=1)@5", 0.9)
    assert found["pairs"][0]["verdict"] == "equivalent"
    scores = evaluate(read_qrels(two_runs / "qrels.txt"), read_run(files[0]), ["R(rel=1)@5"])
    assert found["per_query"]["good"] == pytest.approx(scores.per_query["R(rel=1)@5"])


@pytest.mark.parametrize(("suffix", "begins"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])  # fmt: skip
def test_compare_draws_what_the_suffix_says(call, two_runs, suffix, begins):
    plot = two_runs / "plots" / f"differences{suffix}"
    files = [two_runs / "good.run", two_runs / "bad.run"]
    code, out, _ = call(
        "compare", "--qrels", two_runs / "qrels.txt", *files, "--plot", plot, "--json"
    )
    assert code == 0
    assert json.loads(out)["plot"] == str(plot)
    assert plot.read_bytes().startswith(begins)
    assert [path.name for path in plot.parent.iterdir()] == [plot.name]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--margin", "0"], "expected a number above 0, got 0.0"),
        (["--margin", "nan"], "expected a number above 0, got nan"),
        (["--measure", "Hits@5"], "cannot compute the measure 'Hits@5'"),
        (["--measure", "AP RR"], "expected 1 measure, got 'AP RR'"),
        (["--plot", "x.jpg"], "expected a name that ends in .png, .svg, .pdf, got x.jpg"),
    ],
)
def test_compare_says_what_is_allowed(call, two_runs, options, message):
    files = [two_runs / "good.run", two_runs / "bad.run"]
    code, out, err = call("compare", "--qrels", two_runs / "qrels.txt", *files, *options)
    assert (code, out) == (2, "")
    assert message in told(err)


def test_compare_needs_two_runs_deep_enough(call, two_runs):
    code, out, err = call("compare", "--qrels", two_runs / "qrels.txt", two_runs / "good.run")
    assert (code, out) == (2, "")
    assert "two or more are needed, got 1" in told(err)
    files = [two_runs / "good.run", two_runs / "bad.run"]
    code, out, err = call(
        "compare", "--qrels", two_runs / "qrels.txt", *files, "--measure", "R@100"
    )
    assert (code, out) == (1, "")
    assert "good: R(rel=1)@100 needs 100 hits a query; the run has at most 20" in err


def test_compare_reads_pipes_whole(call, two_runs, tmp_path):
    names = ("qrels.txt", "bad.run")
    pipes = {name: tmp_path / f"pipe of {name}" for name in names}
    writers = []
    for name, pipe in pipes.items():
        os.mkfifo(pipe)
        data = gzip.compress((two_runs / name).read_bytes())
        writers.append(threading.Thread(target=pipe.write_bytes, args=(data,)))
        writers[-1].start()
    good = two_runs / "good.run"
    code, out, _ = call("compare", "--qrels", pipes["qrels.txt"], good, pipes["bad.run"], "--json")
    for writer in writers:
        writer.join()
    plain = call(
        "compare", "--qrels", two_runs / "qrels.txt", good, two_runs / "bad.run", "--json"
    )[1]
    found, expected = (
        [d["queries"], d["pairs"][0]["difference"], d["pairs"][0]["p_t"]]
        for d in map(json.loads, (out, plain))
    )
    assert code == 0 and found == expected


def test_compare_in_a_process_of_its_own(two_runs, tmp_path):
    command = [sys.executable, "-m", "adaptive_margins.cli", "compare", "--qrels", "qrels.txt", "--json"]  # fmt: skip
    done = subprocess.run(
        [*command, "good.run", "bad.run"], cwd=two_runs, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["pairs"][0]["verdict"] == "different"
    done = subprocess.run(
        [*command, "good.run", "none.run"],
        cwd=two_runs,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "adaptive-margins: none.run: file not found\n"


# ---- evaluate ------------------------------------------------------------------------------------------------------


def cosine_run(encoder: Path, corpus: Path, depth: int):
    """All passages with text by cosine, with the encoder as Sentence Transformers runs it."""
    from sentence_transformers import SentenceTransformer

    model, collection = SentenceTransformer(str(encoder), device="cpu"), read_folder(corpus)
    ids = [i for i in collection.passages.ids if collection.passages[i]]
    passages = model.encode([collection.passages[i] for i in ids], normalize_embeddings=True)
    queries = collection.queries["test"]
    scores = model.encode(list(queries.texts), normalize_embeddings=True) @ passages.T
    return {
        qid: dict(top(dict(zip(ids, map(float, row), strict=True)), depth))
        for qid, row in zip(queries.ids, scores, strict=True)
    }


def test_evaluate_ranks_all_passages(call, corpus, encoder, tmp_path):
    run_out = tmp_path / "runs" / "tiny.run.gz"
    code, out, err = call(
        "evaluate", corpus, "--model", encoder, "--run-out", run_out, "--json", "--per-query"
    )
    assert code == 0
    assert len(err.splitlines()) == 1 and "passages without text" in err
    found = json.loads(out)
    run, qrels = read_run(run_out), read_folder(corpus).qrels["test"]
    expected = cosine_run(encoder, corpus, 100)
    assert run.keys() == expected.keys()
    for qid, hits in run.items():
        assert len(hits) == 100 and "d7" not in hits
        assert hits == pytest.approx({**hits, **expected[qid]}, abs=2e-6)
    scores = evaluate(qrels, run, ["nDCG@10", "R(rel=1)@100"])
    assert found.pop("per_query") == scores.per_query
    identity = found.pop("identity")
    assert re.fullmatch("[0-9a-f]{64}", identity)
    assert found == {
        "measures": scores.mean,
        "queries": 40,
        "relevant_queries": {"nDCG@10": 40, "R(rel=1)@100": 40},
        "missing": 0,
        "run": str(run_out),
        "mode": "full",
        "set": "test",
        "depth": 100,
        "model": str(encoder),
        "collection": {
            "name": "words",
            "source": str(corpus),
            "fingerprint": read_folder(corpus).fingerprint,
            "passages": 120,
        },
        "split": "",
        "excluded_self": False,
        "truncated": {"queries": 0, "passages": 0, "limit": 64},
    }


@pytest.fixture
def few(corpus, tmp_path):
    """A collection of nine passages, one of them without text."""
    whole, folder = read_folder(corpus), tmp_path / "few"
    folder.mkdir()
    docids = [f"d{i}" for i in range(9)]
    lines = [f"{docid}\t{whole.passages[docid]}\n" for docid in docids]
    (folder / "collection.tsv").write_text("".join(lines))
    qids = whole.queries["test"].ids[:9]
    words = [" ".join(whole.passages[docid].split()[:3]) or "nothing" for docid in docids]
    lines = [f"{qid}\t{text}\n" for qid, text in zip(qids, words, strict=True)]
    (folder / "queries.tsv").write_text("".join(lines))
    lines = [f"{qid} 0 {docid} 1\n" for qid, docid in zip(qids, docids, strict=True)]
    (folder / "qrels.txt").write_text("".join(lines))
    return folder


def test_rankings_of_a_small_collection_are_complete(call, few, encoder, tmp_path):
    qrels = read_folder(few).qrels["test"]
    runs = {mode: tmp_path / f"{mode}.run" for mode in ("full", "rerank")}
    for mode, path in runs.items():
        options = ["--mode", mode, "--run-out", path, "--json"]
        code, out, _ = call("evaluate", few, "--model", encoder, *options)
        assert code == 0
        trec = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "recall.100"})
        values = trec.evaluate(read_run(path)).values()
        assert json.loads(out)["measures"] == {
            "nDCG@10": pytest.approx(sum(v["ndcg_cut_10"] for v in values) / len(qrels)),
            "R(rel=1)@100": pytest.approx(sum(v["recall_100"] for v in values) / len(qrels)),
        }
        assert max(map(len, read_run(path).values())) < 10
    options = ["--qrels", few / "qrels.txt", *runs.values(), "--measure", "R@100", "--json"]
    code, out, _ = call("compare", *options)
    assert code == 0
    assert json.loads(out)["runs"]["full"]["mean"] == pytest.approx(8 / 9)
    for path in runs.values():
        write_run(read_run(path), path, "theirs")
    code, out, err = call("compare", *options)
    assert (code, out) == (1, "") and "needs 100 hits" in err
    code, out, _ = call("compare", *options, "--complete")
    assert json.loads(out)["runs"]["full"]["mean"] == pytest.approx(8 / 9)


def test_a_part_of_a_large_collection_is_not_complete(call, corpus, encoder, tmp_path):
    runs = [tmp_path / "a.run", tmp_path / "b.run"]
    for path in runs:
        options = ["--depth", "10", "--measures", "nDCG@10", "--run-out", path]
        assert call("evaluate", corpus, "--model", encoder, *options)[0] == 0
    options = ["--measure", "R@100"]
    code, out, err = call("compare", "--qrels", corpus / "qrels.txt", *runs, *options)
    assert (code, out) == (1, "") and "a: R(rel=1)@100 needs 100 hits a query; the run has at most 10" in err  # fmt: skip


def test_evaluate_refuses_judgements_without_a_relevant_passage(call, few, encoder):
    judged = (few / "qrels.txt").read_text().splitlines()
    few.joinpath("qrels.txt").write_text("".join(f"{line[:-1]}0\n" for line in judged))
    code, out, err = call("evaluate", few, "--model", encoder, "--json")
    assert (code, out) == (1, "")
    assert "9 judged queries, grades 0 (9)" in err
    few.joinpath("qrels.txt").write_text(
        "".join(f"{line[:-1]}0\n" for line in judged[1:]) + judged[0]
    )
    code, out, _ = call("evaluate", few, "--model", encoder)
    assert code == 0 and "9 queries (1 with a relevant passage)" in out
    code, out, err = call("evaluate", few, "--model", encoder, "--measures", "ERR@10 R(rel=2)@5")
    assert (code, out) == (1, "") and "R(rel=2)@5 needs grade 2" in err


def test_evaluate_reranks(call, corpus, encoder, tmp_path):
    run_out = tmp_path / "reranked.run"
    options = ["--mode", "rerank", "--measures", "AP R@20", "--depth", "20", "--run-out", run_out]
    code, out, _ = call("evaluate", corpus, "--model", encoder, *options, "--json")
    assert code == 0
    found, run = json.loads(out), read_run(run_out)
    assert (found["mode"], found["depth"]) == ("rerank", 20)
    assert list(found["measures"]) == ["AP(rel=1)", "R(rel=1)@20"]
    collection = read_folder(corpus)
    candidates = BM25(collection.passages).search(collection.queries["test"], 20)
    everything = cosine_run(encoder, corpus, 120)
    for qid, hits in candidates.items():
        assert run[qid] == pytest.approx({d: everything[qid][d] for d in hits}, abs=2e-6)

    # A file of candidates, some of queries that are not asked, cut at a depth.
    given = {**{qid: hits for qid, hits in list(candidates.items())[:30]}, "z9": {"d1": 1.0}}
    path = tmp_path / "candidates.run"
    write_run(given, path, "x")
    options = ["--mode", "rerank", "--candidates", path, "--depth", "10", "--run-out", run_out]
    code, out, err = call("evaluate", corpus, "--model", encoder, *options, "--measures", "R@5")
    assert code == 0 and "without candidates count 0: 10 of 40" in err
    cut = read_run(run_out)
    assert cut.keys() == given.keys() - {"z9"}
    for qid, hits in cut.items():
        assert hits.keys() == {docid for docid, _ in top(given[qid], 10)}
    expected = evaluate(collection.qrels["test"], cut, ["R(rel=1)@5"]).mean["R(rel=1)@5"]
    lines = out.splitlines()
    assert lines[0].endswith("words, test: 40 queries, 120 passages, candidates reranked, depth 10")
    assert lines[-3].split() == ["R(rel=1)@5", f"{expected:.4f}"]


def test_a_file_on_stdout_is_not_mixed_with_the_report(tmp_path):
    (tmp_path / "collection.tsv").write_text("d1\ta passage\n")
    code = "from adaptive_margins.cli import main; main()"
    call = subprocess.run(
        [sys.executable, "-c", code, "collection", tmp_path, "--output", "/dev/stdout"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert call.stdout.rstrip().endswith("</html>")
    assert "Passages" in call.stderr


def test_evaluate_refuses_what_makes_no_sense(call, corpus, encoder, tmp_path):
    def fails(status, *options, where=corpus):
        code, out, err = call("evaluate", where, "--model", encoder, *options)
        assert (code, out) == (status, "")
        return told(err)

    assert "'nothing' is not one of 'full', 'rerank'" in fails(2, "--mode", "nothing")
    assert "it has test" in fails(2, "--set", "dev")
    assert "cannot compute the measure 'Hits@5'" in fails(2, "--measures", "Hits@5")
    assert "expected at least one measure" in fails(2, "--measures", " ")
    assert "50 passages a query are too few for nDCG@10 R(rel=1)@100: 100 are needed" in fails(2, "--depth", "50")  # fmt: skip
    candidates = tmp_path / "candidates.run"
    candidates.write_text("q1 Q0 d1 1 1.0 x\n")
    message = fails(2, "--candidates", candidates)
    assert "candidates are ordered with --mode rerank" in message
    message = fails(1, "--mode", "rerank", "--candidates", candidates)
    assert "R(rel=1)@100 needs 100 hits a query; the run has at most 1" in message
    candidates.write_text("q1 Q0 zebra 1 1.0 x\n")
    message = fails(1, "--mode", "rerank", "--candidates", candidates)
    assert "1 of 1 candidates are unknown passages, first 'zebra'" in message
    candidates.write_text("z1 Q0 d1 1 1.0 x\n")
    message = fails(1, "--mode", "rerank", "--candidates", candidates)
    assert "has none of the 40 queries" in message
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(corpus / "collection.tsv", alone)
    assert "alone has passages, but no queries to evaluate with" in fails(1, where=alone)


def test_the_set_that_is_meant(call, corpus, encoder, tmp_path):
    folder = tmp_path / "sets"
    shutil.copytree(corpus, folder)
    for name in ("queries", "qrels"):
        suffix = "tsv" if name == "queries" else "txt"
        lines = (folder / f"{name}.{suffix}").read_text().splitlines(keepends=True)
        ids = [line.split()[0] for line in lines]
        train = {f"q{i}" for i in range(10)}
        for file, keep in ((f"{name}_train.{suffix}", True), (f"{name}.{suffix}", False)):
            kept = [line for line, qid in zip(lines, ids, strict=True) if (qid in train) == keep]
            (folder / file).write_text("".join(kept))
    options = ["--model", encoder, "--measures", "nDCG@10", "--json"]
    for extra, name, count in (([], "test", 30), (["--set", "train"], "train", 10)):
        found = json.loads(call("evaluate", folder, *options, *extra)[1])
        assert (found["set"], found["queries"]) == (name, count)
    for name in ("queries.tsv", "qrels.txt"):
        (folder / name).unlink()
    assert json.loads(call("evaluate", folder, *options)[1])["set"] == "train"


def test_an_encoder_is_not_tested_on_the_queries_it_was_trained_on(call, corpus, encoder, tmp_path):
    parts, split = split_queries(read_folder(corpus), seed=5)
    trained = tmp_path / "trained"
    shutil.copytree(encoder, trained)
    about = {"fingerprint": parts.fingerprint, "split": split}
    (trained / "training.json").write_text(json.dumps({"seed": 5, "collection": about}))
    options = ["--measures", "nDCG@10", "--run-out", tmp_path / "x.run", "--json"]
    found = json.loads(call("evaluate", corpus, "--model", trained, *options)[1])
    assert found["queries"] == len(parts.queries["test"]) == 16
    assert read_run(tmp_path / "x.run").keys() == set(parts.queries["test"].ids)
    assert found["split"].endswith(split)
    # Trained on another collection, or on given training queries: all are ranked.
    for other in ({**about, "fingerprint": "0" * 16}, {**about, "split": ""}):
        (trained / "training.json").write_text(json.dumps({"seed": 5, "collection": other}))
        found = json.loads(call("evaluate", corpus, "--model", trained, *options)[1])
        assert (found["queries"], found["split"]) == (40, "")


# ---- index and search ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def index(corpus, encoder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("indexes") / "words.index"
    done = CliRunner().invoke(
        cli.app, ["index", str(corpus), "--model", str(encoder), "--output", str(folder), "--json"]
    )
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["index"], found["passages"], found["kind"]) == (str(folder), 119, "Flat")
    assert found["encoder"]["name"] == str(encoder)
    assert found["collection"]["name"] == "words"
    assert found["bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    return folder


def test_search_finds_what_an_exact_search_finds(call, index, corpus, encoder):
    query = read_folder(corpus).queries["test"]["q3"]
    code, out, err = call("search", index, query, "--depth", "5", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    expected = top(cosine_run(encoder, corpus, 5)["q3"])
    assert [(hit["rank"], hit["docid"]) for hit in found["hits"]] == [
        (rank, docid) for rank, (docid, _) in enumerate(expected, start=1)
    ]
    assert [hit["score"] for hit in found["hits"]] == pytest.approx([s for _, s in expected], abs=2e-6)  # fmt: skip
    passages = read_folder(corpus).passages
    assert [hit["text"] for hit in found["hits"]] == [passages[docid] for docid, _ in expected]
    assert (found["queries"], found["depth"], found["run"]) == ({"1": query}, 5, None)


def test_search_prints_lines_as_wide_as_the_terminal(call, index, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    code, out, _ = call("search", index, "sort the graph", "--depth", "3")
    assert code == 0
    lines = out.splitlines()
    assert [line.split()[0] for line in lines] == ["1", "2", "3"]
    assert all(len(line) <= 30 for line in lines)
    assert all(re.match(r"\d  -?\d\.\d{4}  d\d+ +\w", line) for line in lines)


def test_search_for_many_queries(call, index, corpus, encoder, tmp_path):
    run_out = tmp_path / "all.run"
    options = ["--queries", corpus / "queries.tsv", "--depth", "10"]
    code, out, _ = call("search", index, *options, "--run-out", run_out)
    assert (code, out) == (0, f"{run_out}: 400 hits of 40 queries\n")
    expected, run = cosine_run(encoder, corpus, 10), read_run(run_out)
    assert run.keys() == expected.keys()
    assert all(run[qid].keys() == expected[qid].keys() for qid in run)
    _, out, _ = call("search", index, *options)
    blocks = out.split("\n\n")
    assert len(blocks) == 40
    assert [block.splitlines()[0].split(":")[0] for block in blocks] == list(expected)
    assert all(len(block.strip().splitlines()) == 11 for block in blocks)
    found = json.loads(call("search", index, *options, "--json")[1])
    assert {hit["qid"] for hit in found["hits"]} == expected.keys()


def test_search_refuses_what_makes_no_sense(call, index, corpus, tmp_path):
    queries = tmp_path / "queries.tsv"
    for arguments in ([], ["sort", "--queries", corpus / "queries.tsv"]):
        code, out, err = call("search", index, *arguments)
        assert (code, out) == (2, "")
        assert "give one of QUERY and --queries" in told(err)
    assert call("search", index, " ")[0] == 2
    assert call("search", index, "sort", "--depth", "0")[0] == 2
    queries.write_text("1\tsort\n1\tthe\n2 3\tgraph\n3\t \n4\n")
    code, out, err = call("search", index, "--queries", queries)
    assert (code, out) == (1, "")
    for line, what in (
        (2, "id '1' occurs already in line 1"),
        (3, "id '2 3' is empty or has white space"),
        (4, "the text of '3' is empty"),
        (5, "2 tab-separated columns expected, 1 found"),
    ):
        assert f"{queries}:{line}: {what}" in err


def test_an_index_is_never_overwritten(call, index, corpus, encoder):
    code, out, err = call("index", corpus, "--model", encoder, "--output", index)
    assert (code, out) == (1, "")
    assert f"adaptive-margins: {index} cannot be written: it exists" in err


# ---- collection and status -----------------------------------------------------------------------------------------


def test_collection(call, corpus, tmp_path):
    code, out, err = call("collection", corpus, "--json")
    assert code == 0
    found = json.loads(out)
    assert (found["name"], found["passages"], found["page"]) == ("words", 120, None)
    page = tmp_path / "pages" / "words.html"
    code, out, err = call("collection", corpus, "--output", page)
    assert code == 0
    assert out.splitlines()[-1] == f"Page: {page}"
    assert "words" in out.splitlines()[0]
    assert page.read_text("utf-8").lower().startswith("<!doctype html>")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "collection.tsv").write_text("d1\tone\nd1\ttwo\nthree\n")
    code, out, err = call("collection", tmp_path / "broken", "--json")
    assert (code, out) == (1, "")
    assert "collection.tsv:2: id 'd1' occurs already in line 1" in err
    assert "collection.tsv:3: 2 tab-separated columns expected, 1 found" in err


def test_collection_lists_the_runs_in_its_folder(call, corpus, tmp_path):
    folder = shutil.copytree(corpus, tmp_path / "with_runs")
    (folder / "mine.run").write_text("q0 Q0 d1 1 2.5 me\nq0 Q0 d2 2 1.5 me\nq1 Q0 nowhere 1 1 me\n")
    page = tmp_path / "page.html"
    code, out, _ = call("collection", folder, "--json", "--output", page)
    found = json.loads(out)["runs"]
    run = {"q0": {"d1": 2.5, "d2": 1.5}, "q1": {"nowhere": 1.0}}
    expected = evaluate(read_folder(corpus).qrels["test"], run, ["nDCG@10"]).mean["nDCG@10"]
    assert code == 0
    assert found == {
        "mine": {"set": "test", "queries": 2, "depth": 2, "unknown": 1, "nDCG@10": expected}
    }
    assert "Runs that came with it" in page.read_text("utf-8")
    (folder / "mine.run").write_text("q0 Q0 d1 1 much me\n")
    (folder / "._mine.run").write_bytes(b"\x00\x05\x16\x07")
    code, out, err = call("collection", folder, "--json")
    assert code == 0 and json.loads(out)["runs"] == {}
    assert err.count("no run:") == 1 and "mine.run:1:" in err and "'much'" in err


def contents(folder: Path) -> dict[str, float]:
    return {str(path): path.stat().st_mtime for path in folder.rglob("*")}


def test_status_of_nothing(call, tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTIVE_MARGINS_HOME", str(tmp_path / "home"))
    code, out, err = call("status", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["home"] == str(tmp_path / "home")
    assert found["runs"] == {"finished": 0, "bytes": 0, "newest": None, "collections": {}}
    assert found["unfinished"] == found["collections"] == found["notebooks"] == []
    assert found["book"] is None
    assert {"laptop", "paper", "smoke"} <= set(found["profiles"])
    assert not (tmp_path / "home").exists()
    assert "Book: not built" in call("status")[1]


def test_status(call, tmp_path, monkeypatch, corpus):
    home = tmp_path / "home"
    monkeypatch.setenv("ADAPTIVE_MARGINS_HOME", str(home))
    store = Store(home / "runs")
    evaluations = {"rerank": {"validation": Evaluation({"nDCG@10": 0.5}, {"nDCG@10": {"q": 0.5}})}}
    stored = [store.put(run_config(seed=seed), None, evaluations, {}) for seed in (1, 2, 3)]
    os.utime(stored[1].path / "result.json", (2e9, 2e9))
    (home / "runs" / ".x.partial").mkdir()
    (home / "cache" / "work" / "abcd").mkdir(parents=True)
    (home / "cache" / "work" / "abcd" / "checkpoint").write_bytes(b"x" * 2000)
    os.utime(home / "cache" / "work" / "abcd" / "checkpoint", (1e9, 1e9))
    collection = read_folder(corpus)
    kept = home / "collections" / collection.fingerprint
    kept.mkdir(parents=True)
    (kept / "sources.json").write_text(json.dumps({"name": "words"}))
    receipts = home / "book" / "_executed" / "receipts"
    receipts.mkdir(parents=True)
    receipt = {
        "key": {"profile": ["smoke", ""]},
        "finished": "2025-01-02T03:04:05Z",
        "seconds": 3.2,
    }
    (receipts / "01_collection.json").write_text(json.dumps(receipt))
    (receipts / "02_broken.json").write_text("{")
    page = home / "_build" / "html" / "index.html"
    page.parent.mkdir(parents=True)
    page.write_text("")

    before = contents(home)
    code, out, _ = call("status", "--json")
    assert code == 0
    found = json.loads(out)
    size = sum(p.stat().st_size for run in stored for p in run.path.rglob("*") if p.is_file())
    assert found["runs"] == {
        "finished": 3,
        "bytes": size,
        "newest": {
            "run_id": stored[1].run_id,
            "encoder": "tiny",
            "target": "distributed",
            "time": "2033-05-18T03:33:20Z",
        },
        "collections": {"f" * 16: 3},
    }
    (unfinished,) = found["unfinished"]
    assert (unfinished["run_id"], unfinished["bytes"]) == ("abcd", 2000)
    assert unfinished["time"] == "2001-09-09T01:46:40Z"
    assert found["collections"] == [{"fingerprint": kept.name, "name": "words", "bytes": 17}]
    assert found["notebooks"] == [
        {
            "name": "01_collection",
            "profile": "smoke",
            "time": "2025-01-02T03:04:05Z",
            "seconds": 3.2,
        }
    ]
    assert found["book"] == str(page)
    text = call("status")[1]
    for words in ("Runs finished: 3 ", "abcd", "words", "01_collection", str(page)):
        assert words in text
    assert contents(home) == before


# ---- train ---------------------------------------------------------------------------------------------------------

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


def test_train_hands_on_what_was_asked_for(call, asked):
    code, out, _ = call("train", "corpus", "--output", "out dir", "--json")
    assert code == 0
    assert json.loads(out) == REPORT
    call("train", "corpus", "--output", "o", "--target", ".3", "--seed", 7, "--negatives", "encoder", "--triples", 9,
         "--measures", "P@5 nDCG@10 P(rel=1)@5", "--device", "cpu", "--report-to", "tensorboard", "--model", "m")  # fmt: skip
    defaults = {
        "model": "minilm", "target": "distributed", "seed": 1, "measures": ["nDCG@10", "R(rel=1)@100"], "negatives": "bm25",
        "device": None, "triples": None, "report_to": (),
    }  # fmt: skip
    given = {
        "model": "m", "target": 0.3, "seed": 7, "measures": ["P(rel=1)@5", "nDCG@10"], "negatives": "encoder",
        "device": "cpu", "triples": 9, "report_to": ("tensorboard",),
    }  # fmt: skip
    assert asked == [("corpus", Path("out dir"), defaults), ("corpus", Path("o"), given)]


def test_train_tells_what_came_out_and_what_to_do_next(call, asked):
    out = call("train", "my corpus", "--output", "out dir")[1]
    lines = out.splitlines()
    assert lines[0] == "Of the 10 queries …"
    rows = [line.split() for line in lines]
    assert ["test", "queries", "nDCG@10", "R(rel=1)@100"] in rows
    for name, value in (("start", ".1"), ("trained", ".25"), ("bm25", ".2"), ("hybrid", ".3")):
        assert [name, f"{float(value):.4f}", "1.0000"] in rows
    assert ["trained", "vs", "start", "+0.1500", "[+0.1000,", "+0.2000]", "0.0100", "0.9000", "better"] in rows  # fmt: skip
    assert ["trained", "vs", "bm25", "+0.0500", "—", "—", "—", "too", "few", "queries"] in rows
    assert "The trained encoder is better." in lines
    assert (
        "  adaptive-margins index 'my corpus' --model 'out dir' --output 'out dir'.index" in lines
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "dynamic"], "expected distributed, adaptive or a number, got 'dynamic'"),
        (["--target", "nan"], "expected distributed, adaptive or a number, got 'nan'"),
        (["--negatives", "random"], "'random' is not one of 'bm25', 'encoder'"),
        (["--report-to", "paper"], "expected tensorboard, wandb, mlflow, trackio, got 'paper'"),
        (["--triples", "1"], "Invalid value for '--triples'"),
        (["--measures", "Hits"], "cannot compute the measure 'Hits'"),
    ],
)
def test_train_says_what_is_allowed(call, asked, options, message):
    code, out, err = call("train", "corpus", "--output", "o", *options)
    assert (code, out, asked) == (2, "", [])
    assert message in told(err)


def test_train_a_folder_end_to_end(call, corpus, encoder, tmp_path):
    output = tmp_path / "trained"
    code, out, err = call(
        "train", corpus, "--output", output, "--model", encoder, "--triples", "64", "--json"
    )
    assert code == 0, err
    report = json.loads(out)
    assert report == json.loads((output / "training.json").read_text())
    assert report["model_dir"] == str(output)
    assert {"start", "trained", "bm25"} <= report["measures"].keys()
    assert list(report["measures"]["start"]) == ["nDCG@10", "R(rel=1)@100"]
    assert report["verdict"]
    assert all("warning" in line for line in err.splitlines())  # no progress

    # What it says of the test queries is what the other commands say of them.
    run_out = tmp_path / "again.run"
    found = json.loads(
        call("evaluate", corpus, "--model", output, "--run-out", run_out, "--json")[1]
    )
    assert found["measures"] == pytest.approx(report["measures"]["trained"])
    assert found["queries"] == report["collection"]["sets"]["test"]
    runs = [output / "runs" / f"{name}.test.run.gz" for name in ("trained", "start", "bm25")]
    found = json.loads(call("compare", "--qrels", output / "qrels.test.txt", *runs, "--json")[1])
    assert found["runs"]["bm25.test"]["mean"] == pytest.approx(
        report["measures"]["bm25"]["nDCG@10"]
    )
    difference = report["comparisons"]["trained vs start"]["difference"]
    assert found["pairs"][0]["difference"] == pytest.approx(difference)
