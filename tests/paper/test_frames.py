"""What figures and tables show, from the files of the runs; measures and Table 2 by other means."""

from __future__ import annotations

import gzip
import json
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import pytrec_eval
from sentence_transformers import SentenceTransformer

from adaptive_margins import paper
from adaptive_margins.data.stored import seeded_order
from adaptive_margins.evaluation.significance import compare, paired_interval
from adaptive_margins.paper import frames as module

SEEDS = {"minilm-3": [1], "minilm-4": [1, 2]}  # of the rows of Tables 3 and 4
TARGETS = [0.0, 0.5, 1.0]
TREC = {  # ours → trec_eval's, and the grade from which on a passage is relevant
    "nDCG@10": ("ndcg_cut_10", 1),
    "Success(rel=2)@5": ("success_5", 2),
    "R(rel=2)@20": ("recall_20", 2),
}


class Files:
    """The artefacts of a home folder, read without the library."""

    def __init__(self, home: Path) -> None:
        self.runs = {p.name: p for p in (home / "runs").iterdir()}
        self.config = {i: json.loads((p / "config.json").read_text()) for i, p in self.runs.items()}
        self.result = {i: json.loads((p / "result.json").read_text()) for i, p in self.runs.items()}
        (fingerprint,) = {c["collection"] for c in self.config.values()}
        self.collection = home / "collections" / fingerprint
        self.qrels = {}
        for path in self.collection.glob("qrels.*.txt"):
            qrels = self.qrels[path.name.split(".")[1]] = defaultdict(dict)
            for line in path.read_text().splitlines():
                qid, _, docid, grade = line.split()
                qrels[qid][docid] = int(grade)

    def curve(self, run_id):
        return pd.read_parquet(self.runs[run_id] / "curve.parquet")

    def ranking(self, run_id, mode, query_set):
        run = defaultdict(dict)
        with gzip.open(self.runs[run_id] / f"{mode}.{query_set}.run.gz", "rt") as file:
            for line in file:
                qid, _, docid, _, score, tag = line.split()
                assert tag in (run_id, "bm25")
                run[qid][docid] = float(score)
        return run

    def texts(self, name):
        lines = (self.collection / name).read_text("utf-8").removesuffix("\n").split("\n")
        return dict(line.split("\t") for line in lines)

    def triples(self):
        text = (self.collection / "triples.tsv").read_text()
        return [line.split("\t") for line in text.splitlines()]

    def having(self, **values):
        return {i for i, c in self.config.items() if all(c.get(k) == v for k, v in values.items())}

    def seeds_of(self, run_id):
        """A run and those that differ from it in the seed alone, by seed; the model of one is saved."""
        seen = {
            i: {k: v for k, v in c.items() if k not in ("seed", "save_model")}
            for i, c in self.config.items()
        }
        same = [i for i, values in seen.items() if values == seen[run_id]]
        return sorted(same, key=lambda i: self.config[i].get("seed", 0))

    def one(self, **values):
        (run_id,) = self.having(**values)
        return run_id


@pytest.fixture(scope="module")
def files(smoke_home):
    return Files(smoke_home)


@pytest.fixture(scope="module")
def frames(smoke):
    return {
        name: getattr(smoke, name)()
        for name in ("figure3", "figure4", "figure5", "figure6", "table2", "table3", "table4")
    }


# ---- runs ----------------------------------------------------------------------------------------


def test_the_settings_of_each_section(files):
    for config in files.config.values():
        if config["kind"] != "training":
            assert "triples" not in config
            assert config["test_sets"] == ["test1", "test2"]
            continue
        comparison = config["patience"] > 0
        curve = comparison or config["target"] == "distributed"
        assert config["decay"] == (0.99999 if curve else 1.0)
        assert config["stop_early"] != comparison
        assert config["test_sets"] == (["test1", "test2"] if comparison else [])
        static = isinstance(config["target"], float) and not comparison
        assert config["keep"] == ("last" if static else "best")
        assert config["triples"] == (16 if static else 32)
        steps = 0 if static else 8 // config["batch_size"]
        assert config["evaluate_every"] == steps
        assert config["in_batch"] in (
            (False,) if config["target"] == "distributed" else (False, True)
        )
        assert (config["orientation"], config["error"]) == ("paper", "squared")


def test_only_one_model_is_saved(files):
    saved = [i for i, path in files.runs.items() if (path / "model").exists()]
    assert saved == [files.one(encoder="minilm-4", target="distributed", patience=2, seed=1)]


def test_step_0_is_the_encoder_as_it_comes(files):
    for run_id, config in files.config.items():
        if config["kind"] != "training" or config["similarity"] == "dot":
            continue
        start = files.result[files.one(encoder=config["encoder"], kind="zero-shot")]["rerank"][
            "validation"
        ]
        first = files.curve(run_id).iloc[0]
        assert (first["step"], first["triples"], first["seconds"]) == (0, 0, 0)
        for measure, value in start["mean"].items():
            assert first[measure] == value


def test_measures_are_those_of_trec_eval_on_the_run_files(files):
    checked = 0
    for run_id, result in files.result.items():
        for mode in ("rerank", "full"):
            for query_set, found in result.get(mode, {}).items():
                qrels, run = files.qrels[query_set], files.ranking(run_id, mode, query_set)
                for measure, per_query in found["per_query"].items():
                    name, level = TREC[measure]
                    evaluator = pytrec_eval.RelevanceEvaluator(
                        qrels,
                        {name.rpartition("_")[0] + "." + name.rpartition("_")[2]},
                        relevance_level=level,
                    )
                    expected = evaluator.evaluate(run)
                    assert per_query.keys() == qrels.keys()
                    for qid, value in per_query.items():
                        assert value == pytest.approx(
                            expected.get(qid, {}).get(name, 0.0), abs=1e-9
                        )
                    mean = sum(per_query.values()) / len(per_query)
                    assert found["mean"][measure] == pytest.approx(mean, abs=1e-12)
                    checked += 1
    assert checked > 150


def test_rerank_runs_hold_the_candidates(files):
    for run_id, result in files.result.items():
        for query_set in result["rerank"]:
            bm25 = files.ranking(files.one(encoder="bm25"), "rerank", query_set)
            run = files.ranking(run_id, "rerank", query_set)
            assert {q: set(hits) for q, hits in run.items()} == {q: set(h) for q, h in bm25.items()}
            assert max(len(hits) for hits in run.values()) == 8


def test_what_is_kept_is_the_best_of_the_curve(files):
    for run_id, config in files.config.items():
        if config["kind"] != "training":
            continue
        result, curve = files.result[run_id], files.curve(run_id)
        steps = dict(zip(curve["step"], curve["nDCG@10"], strict=True))
        end = max(steps)
        for n in sorted(steps) if config["patience"] else ():  # two evaluations without a gain
            before = [s for s in steps if s <= n]
            first = min(before, key=lambda s: (-steps[s], s))
            if len([s for s in before if s > first]) >= config["patience"]:
                end = min(end, n)
        best = min([s for s in steps if s <= end], key=lambda s: (-steps[s], s))
        assert (result["best_step"], result["stop_step"]) == (best, end)
        assert result["triples"] == end * config["batch_size"]
        kept = best if config["keep"] == "best" else result["stop_step"]
        assert result["kept_step"] == kept
        row = curve[curve["step"] == kept].iloc[0]
        for measure, value in result["rerank"]["validation"]["mean"].items():
            assert row[measure] == value


# ---- figures -------------------------------------------------------------------------------------


def test_figure_3(frames, files):
    frame = frames["figure3"]
    assert list(frame.columns) == [
        "encoder", "in_batch", "target", "seed", "measure", "value", "low", "high", "start", "maximum", "collapsed", "run_id",
        "start_run_id",
    ]  # fmt: skip
    assert len(frame) == 18 * 2
    assert frame["run_id"].nunique() == 18
    for row in frame.itertuples():
        config = files.config[row.run_id]
        for name in ("encoder", "in_batch", "target", "seed"):
            assert config[name] == getattr(row, name)
        found = files.result[row.run_id]["rerank"]["validation"]["mean"]
        assert row.value == found[row.measure]
        assert files.curve(row.run_id).iloc[-1][row.measure] == row.value
        assert row.start_run_id == files.one(encoder=row.encoder, kind="zero-shot")
        start = files.result[row.start_run_id]["rerank"]["validation"]["mean"]
        assert row.start == start[row.measure]
        after, before = (
            files.result[i]["rerank"]["validation"]["per_query"]["nDCG@10"]
            for i in (row.run_id, row.start_run_id)
        )
        assert row.collapsed == (compare(after, before).verdict == "worse")
    marked = frame[frame["maximum"]]
    assert len(marked) == 2 * 2 * 2
    assert set(marked["seed"]) == {1}
    for row in marked.itertuples():
        curve = frame[
            (frame["encoder"] == row.encoder) & (frame["in_batch"] == row.in_batch)
            & (frame["measure"] == row.measure) & (frame["seed"] == 1)
        ]  # fmt: skip
        assert row.value == curve["value"].max()
        assert row.target == curve.loc[curve["value"] == row.value, "target"].min()


@pytest.mark.parametrize("name", ["figure4", "figure5"])
def test_figures_4_and_5(frames, files, name):
    frame = frames[name]
    assert list(frame.columns) == [
        "encoder", "in_batch", "batch_size", "seed", "step", "triples", "measure", "value", "low", "high", "maximum", "run_id",
    ]  # fmt: skip
    target = "adaptive" if name == "figure4" else "distributed"
    assert set(frame["run_id"]) == files.having(target=target, seed=1)
    for run_id, group in frame.groupby("run_id"):
        config, curve = files.config[run_id], files.curve(run_id)
        for column in ("encoder", "in_batch", "batch_size", "seed"):
            assert set(group[column]) == {config[column]}
        assert curve["triples"].tolist() == [0, 8, 16, 24, 32]
        for measure, line in group.groupby("measure"):
            assert line["step"].tolist() == curve["step"].tolist()
            assert line["triples"].tolist() == curve["triples"].tolist()
            assert line["value"].tolist() == curve[measure].tolist()
            (top,) = line.loc[line["maximum"], "value"]
            assert top == curve[measure].max()
            assert line["maximum"].tolist().index(True) == curve[measure].tolist().index(top)


def test_gains(smoke, files):
    e = smoke.experiments
    frame = smoke.gains([*e.figure4_runs(), *e.figure5_runs()])
    assert len(frame) == 8 * 2
    for row in frame.itertuples():
        assert row.step == files.result[row.run_id]["kept_step"]
        after = files.result[row.run_id]["rerank"]["validation"]["per_query"][row.measure]
        start = files.result[files.one(encoder=row.encoder, kind="zero-shot")]
        before = start["rerank"]["validation"]["per_query"][row.measure]
        assert row.best - row.start == pytest.approx(row.difference, abs=1e-12)
        found = (row.difference, row.low, row.high)
        assert found == pytest.approx(paired_interval(after, before), abs=1e-12)


def test_figure_6(frames, files):
    frame = frames["figure6"]
    assert list(frame.columns) == [
        "encoder", "batch_size", "part", "step", "mean", "min", "max", "window", "span", "run_id",
    ]  # fmt: skip
    window = 3
    assert set(frame["part"]) == {"all"} and frame["run_id"].nunique() == 2  # encoders
    for run_id, group in frame.groupby("run_id"):
        config = files.config[run_id]
        assert (config["target"], config["batch_size"], config["seed"]) == ("distributed", 8, 1)
        assert set(group["encoder"]) == {config["encoder"]}
        raw = pd.read_parquet(files.runs[run_id] / "targets.parquet").to_dict("list")
        assert group["step"].tolist() == raw["step"]
        assert set(group["window"]) == {window} and set(group["span"]) == {len(raw["step"])}
        for column in ("mean", "min", "max"):
            for step, value in zip(group["step"], group[column], strict=True):
                recent = [raw[column][s - 1] for s in range(step - window + 1, step + 1) if s >= 1]
                assert value == pytest.approx(sum(recent) / len(recent), abs=1e-9)


# ---- tables --------------------------------------------------------------------------------------


def test_table_2_with_sentence_transformers_alone(frames, files):
    frame = frames["table2"]
    (run_id,), (qid,) = set(frame["run_id"]), set(frame["qid"])
    assert run_id == files.one(encoder="minilm-4", target="distributed", patience=2, seed=1)
    model = SentenceTransformer(str(files.runs[run_id] / "model"))
    queries, passages = files.texts("queries.train.tsv"), files.texts("collection.tsv")

    def vectors(texts, length):
        model.max_seq_length = length
        found = [model.encode(text, show_progress_bar=False).astype(np.float64) for text in texts]
        return [v / math.sqrt(v @ v) for v in found]

    triples = files.triples()
    order = seeded_order(len(triples), 1)[:8]
    batch = [triples[i] for i in order]
    q = vectors([queries[t[0]] for t in batch], 20)
    p = vectors([passages[t[1]] for t in batch], 12)
    n = vectors([passages[t[2]] for t in batch], 12)
    targets = np.array([[(1 + a @ b) / 2 for b in n] for a in p])
    i = int(np.argmax(targets.max(1) - targets.min(1)))
    t = targets[i]

    assert frame["role"].tolist() == ["q", "d+", "d-max", "d-mid", "d-min"]
    assert qid == batch[i][0]
    rows = frame.set_index("role")
    assert rows.loc["q", ["id", "text"]].tolist() == [batch[i][0], queries[batch[i][0]]]
    assert rows.loc["d+", ["id", "text"]].tolist() == [batch[i][1], passages[batch[i][1]]]
    rho_positive = q[i] @ p[i]
    assert rows.loc["d+", "rho"] == pytest.approx(rho_positive, abs=1e-5)
    for role, j in (
        ("d-max", t.argmax()), ("d-mid", np.abs(t - t.mean()).argmin()), ("d-min", t.argmin()),
    ):  # fmt: skip
        row = rows.loc[role]
        assert (row["id"], row["text"]) == (batch[j][2], passages[batch[j][2]])
        assert row["rho"] == pytest.approx(q[i] @ n[j], abs=1e-5)
        assert row["target"] == pytest.approx(t[j], abs=1e-5)
        assert row["loss_table"] == pytest.approx(
            (rho_positive - q[i] @ n[j] - t[j]) ** 2, abs=1e-5
        )
        own = rho_positive - q[i] @ n[i]  # Eq. 3: the margin to the query's own negative
        assert row["loss_equation"] == pytest.approx((own - t[j]) ** 2, abs=1e-5)


def check_test(row, files, comparisons):
    """The TOST of a row of Table 3 or 4 against its reference."""
    ids = [row.run_ids.split(), files.seeds_of(row.reference_run_id)]
    per_query = [
        [files.result[i]["full"][row.set]["per_query"][row.measure] for i in of] for of in ids
    ]
    if row.run_id == row.reference_run_id:
        assert math.isnan(row.difference)
        assert math.isnan(row.p_adjusted)
        assert not row.equivalent
        return
    found = compare(*per_query, comparisons=comparisons)
    expected = paired_interval(*per_query, confidence=1 - 2 * 0.05 / comparisons)
    assert (row.difference, row.low, row.high) == pytest.approx(expected, abs=1e-12)
    assert row.p_adjusted == pytest.approx(min(1, found.p_tost * comparisons), abs=1e-12)
    assert row.equivalent == (found.verdict == "equivalent")
    if hasattr(row, "p"):
        assert row.p == found.p_tost


def test_table_3(frames, files):
    frame = frames["table3"]
    assert list(frame.columns) == [
        "encoder", "target", "epsilon", "in_batch", "set", "measure", "value", "best", "difference", "low", "high", "p",
        "p_adjusted", "comparisons", "equivalent", "seconds", "sweep_seconds", "triples", "run_id", "reference_run_id", "run_ids",
    ]  # fmt: skip
    assert len(frame) == 2 * 5 * 2 * 2
    assert set(frame["comparisons"]) == {4}
    for row in frame.itertuples():
        assert row.run_ids.split() == files.seeds_of(row.run_id)
        assert len(row.run_ids.split()) == len(SEEDS[row.encoder])
        config = files.config[row.run_id]
        assert (config["encoder"], config["in_batch"], config["patience"]) == (
            row.encoder,
            row.in_batch,
            2,
        )
        assert config["target"] == (row.epsilon if row.target == "static" else row.target)
        assert math.isnan(row.epsilon) == (row.target != "static")
        results = [files.result[i] for i in row.run_ids.split()]
        values = [r["full"][row.set]["mean"][row.measure] for r in results]
        assert row.value == pytest.approx(np.mean(values), abs=1e-12)
        assert row.triples == np.mean([r["triples"] for r in results])
        sweep = 0.0
        if row.target == "static":
            grid = {
                target: files.one(encoder=row.encoder, target=target, in_batch=row.in_batch, seed=1, patience=0)
                for target in TARGETS
            }  # fmt: skip
            sweep = sum(files.result[i]["train_seconds"] for i in grid.values())
            values = {
                t: files.result[i]["rerank"]["validation"]["mean"]["nDCG@10"]
                for t, i in grid.items()
            }
            assert row.epsilon == min(t for t in TARGETS if values[t] == max(values.values()))
        assert row.sweep_seconds == pytest.approx(sweep)
        assert row.seconds == pytest.approx(np.mean([r["train_seconds"] for r in results]) + sweep)
        check_test(row, files, 4)
    for _, group in frame.groupby(["encoder", "set", "measure"]):
        assert len(group) == 5
        assert group["best"].sum() == 1
        best = group[group["best"]].iloc[0]
        assert best["value"] == group["value"].max()
        assert set(group["reference_run_id"]) == {best["run_id"]}
        assert set(group["measure"]) <= {"nDCG@10", "R(rel=2)@20"}


def test_figures_4_and_5_show_the_runs_of_table_3(frames):
    """Where settings agree: not with batches of 4, which Table 3 does not have."""
    rows = set(frames["table3"]["run_id"])
    assert set(frames["figure4"]["run_id"]) < rows
    sizes = frames["figure5"].groupby("run_id")["batch_size"].first()
    assert {run_id in rows for run_id in sizes.index[sizes == 8]} == {True}
    assert {run_id in rows for run_id in sizes.index[sizes == 4]} == {False}


def test_runs_that_stop_early_are_not_shared(smoke, tmp_path):
    stopping = paper.open("smoke", smoke.home, comparison__stop_early=True).experiments
    figures = {run.run_id for run in (*stopping.figure4_runs(), *stopping.figure5_runs())}
    assert not figures & {run.run_id for run in stopping.table3_runs()}


def test_nothing_is_the_best_of_rows_without_a_score(smoke):
    refused = module._Ranked(("supplied: one",), {})
    rows = list(module._tested(refused, [refused], None, smoke.profile))
    assert len(rows) == 4 and not any(row["best"] for row in rows)


def test_table_4(frames, files):
    frame = frames["table4"]
    assert list(frame.columns) == [
        "block", "loss", "sampling", "in_batch", "source", "set", "measure", "value", "best", "difference", "low", "high",
        "p_adjusted", "comparisons", "equivalent", "refused", "missing", "seconds", "teacher_seconds", "triples",
        "run_id", "reference_run_id", "run_ids",
    ]  # fmt: skip
    student = files.one(loss="margin-mse", sampling="topics-hard", in_batch=False, seed=1)
    assert set(frame["reference_run_id"]) == {student}
    wanted = {
        ("Adaptive", "✗"): {"target": "adaptive", "in_batch": False, "patience": 2},
        ("Adaptive", "✓"): {"target": "adaptive", "in_batch": True, "patience": 2},
        ("Distributed", "✓"): {"target": "distributed", "patience": 2},
        ("BM25", "—"): {"encoder": "bm25"},
        ("Static (ε = 1)", "✗"): {"target": 1.0, "in_batch": False, "patience": 2},
        ("Softmax (MNRL)", "✓"): {"loss": "softmax"},
        ("Zero-shot encoder", "—"): {"kind": "zero-shot"},
    }
    rows = frame[frame["loss"] != "MarginMSE"].groupby(["loss", "in_batch"])
    whole = ("Whole MiniLM, zero-shot", "—")
    assert set(rows.get_group(whole)["run_id"]) == {files.one(encoder="minilm", kind="zero-shot")}
    assert set(rows.groups) == {*wanted, whole, ("Static (tuned)", "✗"), ("Static (tuned)", "✓")}
    for key, values in wanted.items():
        trained = {"seed": 1} if values.keys() & {"target", "loss"} else {}
        values = {"encoder": "minilm-4", **trained, **values}
        assert set(rows.get_group(key)["run_id"]) == {files.one(**values)}, key
    tuned = frames["table3"].query("encoder == 'minilm-4' and target == 'static'")
    for sign, in_batch in (("✗", False), ("✓", True)):
        found = set(rows.get_group(("Static (tuned)", sign))["run_id"])
        assert found == set(tuned.loc[tuned["in_batch"] == in_batch, "run_id"])
    for row in frame.itertuples():
        assert row.run_ids.split() == files.seeds_of(row.run_id)
        found = [files.result[i]["full"][row.set]["mean"] for i in row.run_ids.split()]
        assert row.value == pytest.approx(np.mean([f[row.measure] for f in found]), abs=1e-12)
        check_test(row, files, 15)
    for _, group in frame.groupby(["block", "set", "measure"]):
        assert set(group.loc[group["best"], "value"]) == {group["value"].max()}


def test_the_files_of_the_book_are_the_frames(smoke_home, frames):
    folder = smoke_home / "book" / "_executed" / "data"
    if not folder.is_dir():
        pytest.skip("there are no notebooks yet")
    for name in ("figure3", "figure4", "figure5", "figure6", "table2", "table3", "table4"):
        written = pd.read_csv(folder / f"{name}.csv", keep_default_na=False, na_values=[""])
        columns = [c for c in frames[name].columns if c in written.columns]
        assert len(columns) == len(frames[name].columns), name
        if name == "table4":  # the published rows are there, too
            written = written[written["run_id"].notna()].reset_index(drop=True)
        expected = frames[name]
        assert len(written) == len(expected), name
        for column in ("value", "mean", "rho", "p_adjusted"):
            if column in columns:
                np.testing.assert_allclose(written[column], expected[column], atol=1e-9)
        assert written["run_id"].tolist() == expected["run_id"].tolist()
