"""Equivalence budgets on curves written by hand, against naive loops."""

from __future__ import annotations

import itertools
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from adaptive_margins.evaluation.significance import compare
from adaptive_margins.paper.convergence import (
    TUNED,
    UNSEEN,
    Line,
    budgets,
    convergence,
    equivalence,
    lines,
    rises,
)
from adaptive_margins.paper.store import StoredRun

NDCG, HITS = "nDCG@10", "Success(rel=2)@5"
IDS = itertools.count()
BASE = np.random.default_rng(0).uniform(-0.2, 0.2, 300)


def run(means, *, teacher=None, seed=1, kept=None, noise=0.02, every=100):
    """A run with an evaluation every 100 triples and 10 steps, of these means."""
    number = next(IDS)
    rng = np.random.default_rng(number)
    scores = [m + BASE + noise * rng.standard_normal(300) for m in means]
    rows = [
        (10 * i, f"q{q}", m, float(v))
        for i, values in enumerate(scores)
        for m in (NDCG, HITS)
        for q, v in enumerate(values)
    ]
    checks = pd.DataFrame(rows, columns=["step", "qid", "measure", "value"])
    by = checks.pivot_table("value", "step", "measure").reset_index()
    curve = by.assign(triples=every * np.arange(len(means)))
    best = int(curve[NDCG].argmax()) if kept is None else kept
    found = SimpleNamespace(
        run_id=f"{number:016x}", curve=curve, checks=checks,
        result={"kept_step": 10 * best, "triples": every * (len(means) - 1)},
        config=SimpleNamespace(
            teacher=teacher, seed=seed, selection=NDCG, rerank_measures=(NDCG, HITS)
        ),
    )  # fmt: skip
    found.validated = partial(StoredRun.validated, found)
    return found


def line(loss, *runs, in_batch=False):
    return Line("a", loss, in_batch, tuple(runs))


STATIC = [0.30, 0.45, 0.55, 0.60, 0.58]


def test_the_budget_is_the_first_evaluation_from_which_on_all_are_equivalent():
    static = line(TUNED, *(run(STATIC, seed=i) for i in (1, 2, 3)))
    found = {
        "early": [0.30, 0.59, 0.40, 0.58, 0.50],  # the best so far counts, not the last
        "late": [0.30, 0.40, 0.45, 0.58, 0.50],
        "better": [0.30, 0.40, 0.80, 0.70, 0.60],
        "never": [0.30, 0.40, 0.45, 0.44, 0.40],
        "rising": [0.30, 0.32, 0.34, 0.36, 0.38],
        "at once": [0.61, 0.50, 0.50, 0.50, 0.50],
    }
    group = [static, *(line(k, *(run(v, seed=i) for i in (1, 2, 3))) for k, v in found.items())]
    compared = equivalence(group)
    frame = budgets(compared).set_index(["loss", "measure"]).xs(NDCG, level="measure")
    assert frame["budget"].fillna(-1).to_dict() == {
        "early": 100, "late": 300, "better": 200, "never": -1, "rising": -1, "at once": 0,
    }  # fmt: skip
    assert frame["share"]["late"] == pytest.approx(300 / 400)
    states = frame["state"].to_dict()
    assert {k for k, v in states.items() if v == "reached"} == set(found) - {"never", "rising"}
    assert states["never"] == "not reached" and states["rising"] == UNSEEN
    assert frame["verdict"]["better"] == "better" and (frame["comparisons"] == 6).all()
    assert frame["triples"]["never"] == 400  # what is reported is the end


def test_every_test_is_that_of_a_naive_loop():
    static = line(TUNED, run(STATIC), run(STATIC, seed=2, kept=2))
    other = line("adaptive", run([0.3, 0.5, 0.4, 0.56, 0.1]), run([0.3, 0.2, 0.5], seed=2))
    compared = equivalence([static, other])
    for row in compared.to_dict("records"):
        ours = []
        for one in other.runs:
            best, chosen = -1.0, 0
            for i, (step, triples) in enumerate(
                zip(one.curve["step"], one.curve["triples"], strict=True)
            ):
                if triples <= row["triples"] and one.curve[NDCG][i] > best:
                    best, chosen = one.curve[NDCG][i], step
            ours.append(scores(one, chosen, row["measure"]))
        theirs = [
            scores(static.runs[0], 30, row["measure"]),
            scores(static.runs[1], 20, row["measure"]),
        ]
        test = compare(ours, theirs, comparisons=1)
        assert (row["difference"], row["low"]) == pytest.approx(
            (test.difference, test.ci[0]), abs=1e-12
        )
        assert (row["verdict"], row["p_adjusted"]) == (test.verdict, pytest.approx(test.p_tost))
    assert len(compared) == 2 * 5


def scores(one, step, measure):
    checks = one.checks
    at = checks[(checks["step"] == step) & (checks["measure"] == measure)]
    return dict(zip(at["qid"], at["value"], strict=True))


def test_a_reference_that_still_rises_is_no_yardstick():
    rising = line(TUNED, run([0.3, 0.4, 0.5, 0.55, 0.60]))
    frame = budgets(equivalence([rising, line("adaptive", run([0.3, 0.4, 0.61, 0.55, 0.5]))]))
    assert set(frame["state"]) == {UNSEEN}
    assert frame["budget"].notna().all()  # as far as the reference was trained


def test_a_curve_rises_by_its_mean_over_all_seeds():
    """Not by that over the seeds that are left at the end."""
    assert not rises([run([0.3, 0.5]), run([0.8, 0.8, 0.79], seed=2)], NDCG)
    assert rises([run([0.3, 0.5]), run([0.8, 0.8, 0.81], seed=2)], NDCG)


def test_the_best_student_of_a_teacher_is_a_reference_too():
    weak = line("MarginMSE (dot)", run([0.3, 0.5, 0.4], teacher="t"))
    strong = line(
        "MarginMSE (dot), topics-balanced", run([0.3, 0.7, 0.6], teacher="t"), in_batch=True
    )
    adaptive = line("adaptive", run([0.3, 0.69, 0.4]), in_batch=True)
    found = budgets(equivalence([line(TUNED, run([0.3, 0.7, 0.4])), weak, strong, adaptive]))
    taught = found[found["taught"] & (found["measure"] == NDCG)].set_index("loss")
    assert set(taught["reference"]) == {"MarginMSE (dot), topics-balanced, in-batch"}
    assert set(taught.index) == {TUNED, "MarginMSE (dot)", "adaptive"}
    assert taught["share"]["adaptive"] == pytest.approx(0.5)


def test_curves_are_those_of_all_seeds():
    group = [line("adaptive", run([0.3, 0.5]), run([0.3, 0.4], seed=2))]
    frame = convergence(group)
    assert len(frame) == 2 * 2 * 2 and frame["run_id"].nunique() == 2
    assert frame[frame["measure"] == NDCG]["selected"].tolist() == [False, True] * 2


def test_the_rows_of_a_profile(smoke):
    found = lines(smoke.experiments, smoke.runner)
    names = [(x.encoder, x.loss, x.in_batch) for x in found]
    assert len(set(names)) == len(names)
    wanted = {
        (TUNED, False),
        (TUNED, True),
        ("adaptive", False),
        ("adaptive", True),
        ("distributed", False),
    }
    for encoder in smoke.profile.encoders:
        assert wanted <= {name[1:] for name in names if name[0] == encoder}
    reference = smoke.profile.reference_encoder
    assert (reference, "softmax", True) in names
    for one in found:
        assert len(one.runs) == len(smoke.profile.row_seeds(one.encoder))
    frame = equivalence(found)
    assert set(frame["encoder"]) == set(smoke.profile.encoders)
    assert set(budgets(frame)["state"]) <= {"reached", "not reached", UNSEEN}
    assert set(convergence(found)["measure"]) == set(smoke.profile.measures.rerank)
