"""Runs of others: what is read, what is refused, and scores against pytrec_eval."""

import os
from pathlib import Path

import ir_measures
import numpy as np
import pytest
import pytrec_eval

from adaptive_margins.data.text import DataError
from adaptive_margins.data.trec import write_run
from adaptive_margins.evaluation.external_runs import read_external_runs, score

SETS = ("TREC-DL19", "TREC-DL20")
NDCG, RECALL = "nDCG@10", "R(rel=2)@1000"
TREC = {
    "nDCG@10": ("ndcg_cut_10", 1),
    "R(rel=2)@20": ("recall_20", 2),
    "R(rel=2)@30": ("recall_30", 2),
    "AP(rel=2)": ("map", 2),
}


def collection(depth=30, queries=8, seed=0):
    """Graded qrels of random documents and a run of ``depth`` hits with ties."""
    rng = np.random.default_rng(seed)
    docids = [f"d{i}" for i in range(200)]
    qrels, run = {}, {}
    for q in range(queries):
        judged = rng.choice(docids, 40, replace=False)
        qrels[f"q{q}"] = {d: int(rng.integers(0, 4)) for d in judged}
        hits = rng.choice(docids, depth, replace=False)
        run[f"q{q}"] = {d: float(rng.integers(0, depth)) for d in hits}
    return qrels, run


def by_trec_eval(qrels, run, measure):
    """Mean over the queries of the qrels, as ``trec_eval -c`` has it."""
    name, level = TREC[measure]
    evaluator = pytrec_eval.RelevanceEvaluator(qrels, [name], relevance_level=level)
    found = evaluator.evaluate(run)
    return {q: found[q][name] if q in found else 0.0 for q in qrels}


def place(folder: Path, run, query_set="TREC-DL19", name="tasb.run") -> Path:
    path = folder / query_set / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_run(run, path, "x")
    return path


def test_no_folder_no_runs(tmp_path):
    assert read_external_runs(tmp_path / "supplied", SETS) == {}
    (tmp_path / "supplied" / "TREC-DL20").mkdir(parents=True)
    assert read_external_runs(tmp_path / "supplied", SETS) == {}


def test_names_sets_and_suffixes(tmp_path):
    _, run = collection()
    files = {
        "TREC-DL19": ("tas-b.v1.run", "bm25.trec.gz", "other.txt"),
        "TREC-DL20": ("bm25.run.gz",),
    }
    for query_set, names in files.items():
        for name in names:
            place(tmp_path, run, query_set, name)
    (tmp_path / ".DS_Store").write_bytes(b"\0")
    (tmp_path / "TREC-DL19" / ".tas-b.run.partial").write_text("half a line")
    found = read_external_runs(tmp_path, SETS)
    assert {name: list(by) for name, by in found.items()} == {
        "bm25": ["TREC-DL19", "TREC-DL20"],
        "other": ["TREC-DL19"],
        "tas-b.v1": ["TREC-DL19"],
    }
    assert all(supplied == run for by in found.values() for supplied in by.values())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("TREC-DL21/tasb.run", r"TREC-DL21: expected a folder .* TREC-DL19, TREC-DL20"),
        ("tasb.run", r"tasb.run: expected a folder named like a query set"),
        ("TREC-DL19/tasb.tsv", r"tasb\.tsv: expected a run file named NAME\.run, NAME\.trec, NAME\.txt"),
        ("TREC-DL19/tasb.gz", r"tasb\.gz: expected a run file"),
        ("TREC-DL19/more/tasb.run", r"more: expected a run file"),
        ("TREC-DL19/tasb.txt.gz", r"tasb\.txt\.gz: tasb\.run is a run named 'tasb', too"),
    ],
)  # fmt: skip
def test_what_does_not_belong_is_named(tmp_path, name, message):
    _, run = collection()
    place(tmp_path, run)
    place(tmp_path, run, str(Path(name).parent), Path(name).name)
    with pytest.raises(DataError, match=message):
        read_external_runs(tmp_path, SETS)


def test_scores_are_those_of_trec_eval(tmp_path):
    qrels, run = collection()
    place(tmp_path, run)
    again = read_external_runs(tmp_path, SETS)["tasb"]["TREC-DL19"]
    scored = score(again, qrels, list(TREC))
    assert scored.refused == {} and scored.missing == 0
    for measure in TREC:
        wanted = by_trec_eval(qrels, run, measure)
        assert scored.evaluation.per_query[measure] == pytest.approx(wanted, abs=1e-12)
        mean = np.mean(list(wanted.values()))
        assert scored.evaluation.mean[measure] == pytest.approx(mean, abs=1e-12)
        assert 0 < mean < 1


def test_judged_queries_that_are_missing_count_nothing():
    qrels, run = collection()
    shorter = {q: hits for q, hits in run.items() if q not in ("q2", "q5")} | {"q5": {}}
    more = {**shorter, "not judged": {"d1": 1.0}}
    scored = score(more, qrels, [NDCG])
    assert scored.missing == 2
    wanted = by_trec_eval(qrels, shorter, NDCG)
    assert wanted["q2"] == wanted["q5"] == 0 and len(wanted) == 8
    assert scored.evaluation.per_query[NDCG] == pytest.approx(wanted, abs=1e-12)


def test_a_measure_deeper_than_the_run_is_refused():
    qrels, run = collection(depth=30)
    scored = score(run, qrels, [NDCG, "R(rel=2)@30", "R(rel=2)@31", RECALL])
    assert scored.refused == {
        "R(rel=2)@31": "R(rel=2)@31 needs 31 hits a query; the run has at most 30",
        RECALL: "R(rel=2)@1000 needs 1,000 hits a query; the run has at most 30",
    }
    assert list(scored.evaluation.mean) == [NDCG, "R(rel=2)@30"]
    assert list(scored.evaluation.per_query) == [NDCG, "R(rel=2)@30"]


def test_depth_is_that_of_the_deepest_judged_query():
    qrels, run = collection(depth=30)
    run["q0"] = dict(list(run["q0"].items())[:5])  # one query may have fewer
    assert not score(run, qrels, ["R(rel=2)@30"]).refused
    run = {q: dict(list(hits.items())[:9]) for q, hits in run.items()}
    run["not judged"] = {f"d{i}": 1.0 for i in range(50)}
    assert score(run, qrels, [NDCG]).refused[NDCG].endswith("the run has at most 9")


def test_a_run_of_every_passage_is_deep_enough():
    qrels, run = collection(depth=30)
    assert RECALL in score(run, qrels, [RECALL], passages=31).refused
    scored = score(run, qrels, [RECALL], passages=30)
    assert not scored.refused
    wanted = np.mean(list(by_trec_eval(qrels, run, "R(rel=2)@30").values()))
    assert scored.evaluation.mean[RECALL] == pytest.approx(wanted, abs=1e-12)


def test_a_run_of_other_queries_is_refused_whole():
    qrels, run = collection()
    scored = score({f"x{q}": hits for q, hits in run.items()}, qrels, [NDCG, "AP"])
    assert set(scored.refused.values()) == {"none of the 8 judged queries is in the run"}
    assert scored.evaluation.mean == {} and scored.missing == 8


DATA = os.environ.get("ADAPTIVE_MARGINS_TEST_DATA")


@pytest.mark.skipif(
    not DATA, reason="ADAPTIVE_MARGINS_TEST_DATA does not name a folder with TREC DL 2019 runs"
)
def test_trec_dl19_runs(tmp_path):
    """Three systems' top 100 over the whole of MS MARCO; expected scores by the official qrels."""
    folder = Path(str(DATA))
    (tmp_path / "TREC-DL19").symlink_to(folder / "runs_dl19")
    path = folder / "msmarco_dl19" / "qrels.txt"
    qrels: dict[str, dict[str, int]] = {}
    for judged in ir_measures.read_trec_qrels(str(path)):
        qrels.setdefault(judged.query_id, {})[judged.doc_id] = judged.relevance
    found = read_external_runs(tmp_path, SETS)
    expected = {"bm25": 0.5058, "tasb": 0.7210, "repllama": 0.7384}
    assert list(found) == sorted(expected)
    for name, value in expected.items():
        scored = score(found[name]["TREC-DL19"], qrels, [NDCG, RECALL], passages=8_841_823)
        assert round(scored.evaluation.mean[NDCG], 4) == value
        assert len(scored.evaluation.per_query[NDCG]) == 43 and scored.missing == 0
        assert scored.refused == {
            RECALL: "R(rel=2)@1000 needs 1,000 hits a query; the run has at most 100"
        }
        assert RECALL not in scored.evaluation.mean
