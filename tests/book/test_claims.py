"""Claims: the rule that decides them, and their statistics against values computed by hand."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from adaptive_margins.book import claim_conditions, claim_statistics, claims
from adaptive_margins.book.claim_statistics import Evidence, halves, interval, published_frames

NDCG, HITS = "nDCG@10", "Success(rel=2)@5"
PAPER = Evidence(published_frames())


class Runs:
    """Writes runs with the scores of 40 queries, and frames of their means."""

    def __init__(self, folder, queries=40, noise=0.0):
        self.folder, self.noise = folder, noise
        self.base = np.random.default_rng(1).uniform(-0.1, 0.1, queries)
        self.base -= self.base.mean()
        self.number = 0
        self.curve = [0.3, 0.5, 0.4]  # of runs of tables
        self.reproduction = SimpleNamespace(
            store=SimpleNamespace(folder=folder),
            profile=SimpleNamespace(
                sets=SimpleNamespace(validation="validation"),
                measures=SimpleNamespace(selection=NDCG),
                comparison=SimpleNamespace(budgets={}),
                encoders={"a": SimpleNamespace(base="minilm"), "b": SimpleNamespace(base="minilm")},
            ),
        )

    def scores(self, mean):
        """Values of queries around a mean, with noise of their own if there is any."""
        rng = np.random.default_rng(self.number)
        values = mean + self.base + self.noise * rng.standard_normal(len(self.base))
        return {f"q{i:02}": float(v) for i, v in enumerate(values)}

    def folder_of(self):
        self.number += 1
        folder = self.folder / f"{self.number:016x}"
        folder.mkdir()
        return folder

    def stored(self, mode, by_set):
        """A run; ``by_set``: set → measure → mean. Yields (set, measure, mean of the scores, run
        id).
        """
        folder = self.folder_of()
        found = {
            s: {"mean": {}, "per_query": {m: self.scores(mean) for m, mean in measures.items()}}
            for s, measures in by_set.items()
        }
        (folder / "result.json").write_text(json.dumps({mode: found}))
        curve = pd.DataFrame({"triples": range(len(self.curve)), NDCG: self.curve})
        curve.to_parquet(folder / "curve.parquet")
        for name, measures in by_set.items():
            for measure in measures:
                values = found[name]["per_query"][measure].values()
                yield name, measure, float(np.mean(list(values))), folder.name

    def figure3(self, curves, seeds=(0.0,), measures=(NDCG, HITS)):
        """From {(encoder, in_batch): {ε: nDCG}}; Hits is the curve of ``measures``' second entry."""
        rows = []
        for (encoder, in_batch), values in curves.items():
            for seed, shift in enumerate(seeds):
                for target, value in values.items():
                    means = value if isinstance(value, tuple) else (value, value)
                    asked = dict(zip(measures, (m + shift for m in means), strict=False))
                    for _, measure, mean, run_id in self.stored("rerank", {"validation": asked}):
                        rows.append((encoder, in_batch, target, seed, measure, mean, run_id))
        columns = "encoder in_batch target seed measure value run_id"
        return pd.DataFrame(rows, columns=columns.split())

    def curves(self, curves):
        """Figure 4 or 5 from {(encoder, in_batch, batch_size): [values, a step of 100 triples
        each]}.
        """
        rows = []
        for (encoder, in_batch, size), values in curves.items():
            folder, checks = self.folder_of(), []
            for step, value in enumerate(values):
                for measure in (NDCG, HITS):
                    scores = self.scores(value)
                    checks += [(step, measure, qid, v) for qid, v in scores.items()]
                    mean = float(np.mean(list(scores.values())))
                    rows.append(
                        (encoder, in_batch, size, step, 100 * step, measure, mean, folder.name)
                    )
            frame = pd.DataFrame(checks, columns=["step", "measure", "qid", "value"])
            frame.to_parquet(folder / "checks.parquet")
        columns = "encoder in_batch batch_size step triples measure value run_id"
        return pd.DataFrame(rows, columns=columns.split())

    def evidence(self, draws=300, **frames):
        return Evidence(frames, self.reproduction, draws)


@pytest.fixture
def runs(tmp_path):
    return Runs(tmp_path)


def value_of(evidence, name, **arguments):
    return interval(getattr(claim_statistics, name)(evidence, **arguments))


# --- the rule -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "supported", "outcome"),
    [
        (0.01, 0.02, (0, math.inf), "supported"),
        (-0.02, -0.01, (0, math.inf), "not supported"),
        (-0.01, 0.02, (0, math.inf), "not decided"),
        (0.0, 0.02, (0, math.inf), "not decided"),  # the interval contains the end of the range
        (-0.02, 0.0, (0, math.inf), "not decided"),
        (-0.02, -0.01, (-math.inf, 0), "supported"),
        (-0.04, 0.04, (-0.05, 0.05), "supported"),
        (-0.06, 0.04, (-0.05, 0.05), "not decided"),
        (0.06, 0.07, (-0.05, 0.05), "not supported"),
        (math.nan, math.nan, (0, math.inf), "not decided"),
    ],
)
def test_a_claim_is_decided_by_its_interval(low, high, supported, outcome):
    assert claims.decide(low, high, supported) == outcome


def test_every_rule_is_complete():
    for rule in claims.rules():
        assert rule.section in claims.CHAPTERS
        assert set(rule.asks) in (set(), {"question", "answer", "over"})
        assert not rule.asks or rule.supported == [-0.05, 0.05]
        assert rule.of and rule.format in claims.FORMATS
        if rule.untestable:
            continue
        assert callable(getattr(claim_statistics, rule.statistic))
        assert all(callable(getattr(claim_conditions, name)) for name in rule.needs)
        assert rule.supported[0] < rule.supported[1] and np.isfinite(rule.supported).any()
        assert rule.reason.endswith(".")
    assert sum(bool(rule.asks) for rule in claims.rules()) == 2
    assert {name for rule in claims.rules() for name in rule.needs} > set(claim_conditions.FORCED)


def test_halves_have_the_standard_error_of_all_queries():
    scores = np.random.default_rng(3).random(61)
    half = halves(61, "some set", 4000)
    assert (half.sum(axis=1) == 30).all()
    assert len(np.unique(half, axis=0)) == 4000
    for side in (half, ~half):
        means = side @ scores / side.sum(axis=1)
        assert means.mean() == pytest.approx(scores.mean(), abs=0.002)
        assert means.std() == pytest.approx(scores.std(ddof=1) / math.sqrt(61), rel=0.05)


# --- Figures --------------------------------------------------------------------------------------

STATIC = {
    ("a", False): {0.0: (0.40, 0.5), 0.5: (0.52, 0.5), 1.0: (0.38, 0.6)},
    ("b", False): {0.0: (0.56, 0.7), 0.5: (0.50, 0.6), 1.0: (0.40, 0.6)},
    ("a", True): {0.0: (0.40, 0.5), 0.5: (0.50, 0.5), 1.0: (0.38, 0.5)},
    ("b", True): {0.0: (0.40, 0.5), 0.5: (0.50, 0.5), 1.0: (0.40, 0.5)},
}


def test_statistics_of_figure3_by_hand(runs):
    evidence = runs.evidence(figure3=runs.figure3(STATIC))
    # All queries differ alike, so that every half gives the same value.
    for name, arguments, expected in (
        ("tuning_gain", {}, (0.14 + 0.16 + 0.12 + 0.10) / 4),
        # Common ε: 0.5 on both sides (.51 and .50); own: (.52 + .56) / 2 and .50.
        ("gain_of_own_target", {}, (0.54 - 0.51 + 0) / 2),
        # Hits@5 of encoder a without in-batch negatives is best at ε = 1, nDCG@10 at .5.
        ("gain_of_own_measure", {}, 0.1 / 4),
        ("static_in_batch", {"measure": 0}, (0.50 - 0.52 + 0.50 - 0.56) / 2),
        ("static_in_batch", {"measure": -1}, (0.5 - 0.6 + 0.5 - 0.7) / 2),
    ):
        assert value_of(evidence, name, **arguments) == pytest.approx([expected] * 3), name


def test_nothing_is_gained_by_choosing_among_equals(tmp_path):
    """The best of eleven equal ε looks better than ε = 1 on the queries that it was chosen by."""
    runs = Runs(tmp_path, noise=0.3)
    equal = {("a", False): {round(0.1 * i, 1): 0.5 for i in range(11)}}
    frame = runs.figure3(equal)
    value, low, high = value_of(runs.evidence(figure3=frame), "tuning_gain")
    naive = frame[frame["measure"] == NDCG].set_index("target")["value"]
    assert naive.max() - naive[1.0] > 0.05
    assert low < 0 < high and abs(value) < naive.max() - naive[1.0]


def test_seeds_widen_the_interval(tmp_path):
    frames = []
    for number, seeds in enumerate([(0.0, 0.0), (-0.05, 0.05)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        runs = Runs(folder)
        evidence = runs.evidence(figure3=runs.figure3(STATIC, seeds))
        frames.append(evidence.scores("figure3"))
    same, apart = frames
    assert same[0].to_numpy() == pytest.approx(apart[0].to_numpy())  # the mean of both seeds
    assert set(np.round((apart - same).iloc[0, 1:], 6)) == {-0.05, 0.0, 0.05}


EARLY, LATE = [0.40, 0.44, 0.46, 0.45, 0.44], [0.40, 0.41, 0.42, 0.44, 0.43]


def test_statistics_of_figures_4_and_5_by_hand(runs):
    adaptive = {(e, side, 32): EARLY if not side else LATE for e in "ab" for side in (False, True)}
    distributed = {("a", False, 16): [0.4, 0.47, 0.46, 0.4, 0.4], ("b", False, 16): EARLY}
    distributed |= {("a", False, 32): [0.4, 0.48, 0.46, 0.4, 0.4], ("b", False, 32): EARLY}
    evidence = runs.evidence(figure4=runs.curves(adaptive), figure5=runs.curves(distributed))
    plain, both = ({"figure": "figure4", "in_batch": side} for side in (False, True))
    small, large, same = (
        {"figure": "figure5", "batch_size": size} for size in ("small", "large", "figure4")
    )
    for name, arguments, expected in (
        ("share_at_maximum", {"a": plain}, 0.5),
        ("fall_after_maximum", plain, 0.02),
        ("highest", {"a": both, "b": plain, "measure": 0}, -0.02),
        ("share_at_maximum", {"a": both, "b": plain}, 0.25),
        ("share_at_maximum", {"a": same, "b": plain}, (0.25 - 0.5 + 0) / 2),
        ("share_at_maximum", {"a": small, "b": large}, 0.0),
        ("highest", {"a": same, "b": both}, (0.04 + 0.02) / 2),
        ("highest", {"a": same, "b": plain}, (0.02 + 0) / 2),
        ("highest", {"a": large, "b": small}, 0.01 / 2),
    ):
        found = value_of(evidence, name, **arguments)
        assert found == pytest.approx([expected] * 3, abs=1e-9), name
    assert claim_conditions.maximum_seen(evidence, **plain) == ""


def test_a_maximum_at_the_end_cannot_be_told_from_one_after_it(runs):
    rising = runs.curves({(e, False, 32): [0.4, 0.41, 0.42, 0.43, 0.44] for e in "ab"})
    found = claims.table("5.2", {"figure4": rising}, runs.reproduction).set_index("claim")
    first = found.iloc[0]
    assert first["outcome"] == "cannot be seen here" and "2 of 2 curves" in first["why"]
    # There are no runs with in-batch negatives.
    lower = found.loc["With in-batch negatives adaptive targets reach a lower nDCG@10."]
    assert lower["outcome"] == "cannot be seen here" and math.isnan(lower["here"])


def test_statistics_of_figure6_and_table2_by_hand(runs):
    rows = [("a", 1, 0.6, 0.9, 0.5), ("b", 1, 0.2, 0.5, 0.1), ("a", 9, 0.02, 0.6, -0.2), ("b", 9, -0.04, 0.5, -0.2)]  # fmt: skip
    figure6 = pd.DataFrame(rows, columns=["encoder", "step", "mean", "max", "min"])
    negatives = {"role": ["q", "d-max", "d-mid", "d-min"], "target": [math.nan, 0.7, 0.5, 0.4]}
    table2 = pd.DataFrame({**negatives, "rho": [math.nan, 0.3, 0.0, 0.1]})
    evidence = runs.evidence(figure6=figure6.assign(batch_size=32), table2=table2)
    mean, low, high = value_of(evidence, "final_mean")
    half = 12.706 * 0.06 / math.sqrt(2) / math.sqrt(2)  # t with one degree of freedom, sd .0424
    assert (mean, low, high) == pytest.approx((-0.01, -0.01 - half, -0.01 + half), abs=1e-4)
    assert value_of(evidence, "final_skew")[0] == pytest.approx((0.36 + 0.38) / 2)
    assert value_of(evidence, "spread_of_means")[0] == pytest.approx(0.06 / 0.4)
    assert value_of(evidence, "order_by_target", column="rho")[0] == pytest.approx(1 / 3)
    assert claim_conditions.several_models(evidence) != ""


# --- Tables ---------------------------------------------------------------------------------------


def test_the_papers_statistics_are_computed_from_its_tables():
    for name, arguments, expected in (
        # Table 3, by hand: distilBERT .647 − .639, .632 − .615; RoBERTa …; MPNet …
        ("lead", {"variant": "static", "measure": 0}, (0.008 + 0.017 + 0.017 + 0.031 + 0.020 + 0.024) / 6),
        ("lead", {"variant": "adaptive in-batch", "measure": -1}, (-0.002 + 0 + 0.002 - 0.010 + 0.026 + 0.008) / 6),
        ("difference", {"frame": "table3", "a": "static in-batch", "b": "static", "measure": 0}, -0.0823),
        ("static_over", {"column": "seconds", "target": "distributed"},
         np.mean([(907 + 810) / 236, (1871 + 1869) / 379, (2095 + 2031) / 337]) / 2),
        ("static_over", {"column": "triples", "target": "adaptive"},
         np.mean([5.18 / 4.93 + 2.24 / 1.98, 6.53 / 3.97 + 6.53 / 5.12, 5.63 / 6.21 + 4.74 / 5.95]) / 2),
        ("difference", {"frame": "table4", "a": "Distributed", "b": "BM25", "measure": 0}, 0.14),
        ("to_teacher", {"measure": 0}, (0.64 - 0.67 + 0.62 - 0.66) / 2),
        ("difference_of_gains", {"a": "Static (tuned)", "b": "Static (ε = 1)"}, 0.07 - 0.04),
        ("order_by_target", {"column": "rho"}, 1 / 3),
        ("order_by_target", {"column": "loss_table"}, 1),
    ):  # fmt: skip
        assert value_of(PAPER, name, **arguments)[0] == pytest.approx(expected, abs=5e-5), name


def test_claims_of_table3_follow_its_runs(runs):
    def table3(static, distributed):
        rows = []
        means = {
            ("static", False): static,
            ("distributed", False): distributed,
            ("adaptive", True): 0.3,
        }
        for (target, in_batch), mean in means.items():
            asked = {name: {NDCG: mean, "R(rel=2)@20": mean} for name in ("test1", "test2")}
            for name, measure, value, run_id in runs.stored("full", asked):
                rows.append(("a", target, in_batch, name, measure, value, run_id, 60.0, 6.0, 1536))
        columns = "encoder target in_batch set measure value run_id seconds sweep_seconds triples"
        return pd.DataFrame(rows, columns=columns.split())

    claim = "Distributed targets are equivalent to tuned static ones in nDCG@10."
    for static, distributed, outcome in ((0.5, 0.48, "supported"), (0.5, 0.42, "not supported")):
        frames = {"table3": table3(static, distributed)}
        found = claims.table("5.4", frames, runs.reproduction)
        row = found.set_index("claim").loc[claim]
        assert row["here"] == pytest.approx(distributed - static)
        assert (row["outcome"], row["paper"]) == (outcome, "−.020")
    timed = found[found["statistic"].str.startswith("training time")]
    assert set(timed["outcome"]) == {"cannot be tested here"}  # every run saw as many triples
    assert timed["why"].str.contains("were trained to the end").all()
    frames = {"table3": frames["table3"].assign(sweep_seconds=0.0)}
    again, why = claims.table("5.4", frames, runs.reproduction), "The profile gives ε"
    timed = again[again["statistic"].str.startswith("training time")]
    assert len(timed) == 2 and timed["why"].str.startswith(why).all()
    runs.reproduction.profile.comparison.budgets = {"static": 1536}
    again = claims.table("5.4", frames, runs.reproduction)
    seen = again[again["statistic"].str.startswith("triples seen")]
    assert len(seen) == 2 and seen["why"].str.startswith("The profile gives the triples").all()
    page = claims.show(found).to_html()
    assert "−.080 [−.080, −.080]" in page and page.count("<tr>") == 1 + len(found)
    with pytest.raises(KeyError, match="table3"):
        claims.table("5.4", {}, runs.reproduction)


def test_claims_about_rows_whose_curves_still_rise_cannot_be_seen(runs):
    claim = "Static targets without in-batch negatives have the highest nDCG@10."
    for curve, seen in (([0.3, 0.5, 0.4], True), ([0.3, 0.4, 0.5], False)):
        runs.curve = curve
        rows = [
            ("a", target, False, name, measure, value, run_id, 60.0, 6.0, triples)
            for target, mean, triples in (("static", 0.5, 9), ("distributed", 0.4, 8))
            for name, measure, value, run_id in runs.stored("full", {"test1": {NDCG: mean}})
        ]
        columns = "encoder target in_batch set measure value run_id seconds sweep_seconds triples"
        frame = pd.DataFrame(rows, columns=columns.split())
        row = (
            claims.table("5.4", {"table3": frame}, runs.reproduction).set_index("claim").loc[claim]
        )
        assert row["outcome"] == ("supported" if seen else "cannot be seen here")
        assert row["here"] == pytest.approx(0.1)
        assert seen or "1 of 1 curves" in row["why"]


def students(**values):
    row = {"encoder": "a", "loss": "adaptive", "in_batch": True, "measure": NDCG, "taught": True}
    row |= {"reference_triples": 1000.0, "reference_rises": False, **values}
    steps = ((0, -0.2), (100, -0.04), (200, -0.01), (300, 0.0))
    return pd.DataFrame(
        row | {"triples": n, "difference": d, "low": d - 0.02, "high": d + 0.02} for n, d in steps
    )


def test_what_a_share_of_the_data_reaches_is_read_after_it(runs):
    def row(frame):
        return claims.table("1", {"equivalence": frame}, runs.reproduction).iloc[0]

    found = row(students())  # .135 of 1000: the first evaluation after it is that at 200
    assert (found["here"], found["low"], found["outcome"]) == (-0.01, -0.03, "supported")
    assert row(students(reference_triples=700.0))["outcome"] == "not decided"  # after 100
    assert row(students(reference_rises=True))["outcome"] == "cannot be seen here"
    none = row(students(taught=False))
    assert none["outcome"] == "cannot be seen here" and "No encoder is distilled" in none["why"]


def test_to_teacher_takes_the_student_that_was_trained_here(runs):
    rows = []
    for loss, sampling, in_batch, mean in (
        ("Distributed", "Rand.", "✓", 0.45), ("MarginMSE", "TAS-B, hard", "✗", 0.5), ("MarginMSE", "TAS-B, hard", "✓", 0.4),
    ):  # fmt: skip
        for name, measure, value, run_id in runs.stored("full", {"t": {NDCG: mean}}):
            rows.append((loss, sampling, in_batch, "ours", name, measure, value, run_id))
    columns = "loss sampling in_batch source set measure value run_id"
    evidence = runs.evidence(table4=pd.DataFrame(rows, columns=columns.split()))
    assert value_of(evidence, "to_teacher", measure=0) == pytest.approx([-0.05] * 3)
    assert claim_conditions.teacher_supplied(evidence) == ""
    external = [("Distributed", "ours", "a", 0.5), ("Distributed", "ours", "b", 0.3)]
    external.append(("wang-zuccon-tas-b", "supplied: wang-zuccon-tas-b", "a", 0.45))  # of one set
    frame = pd.DataFrame(external, columns=["loss", "source", "set", "value"]).assign(measure=NDCG)
    assert value_of(runs.evidence(table4=frame), "to_teacher", measure=0)[0] == pytest.approx(0.05)
    without = pd.DataFrame(rows[:1], columns=columns.split())
    assert claim_conditions.teacher_supplied(runs.evidence(table4=without)) != ""


def edition(outcome, here=-0.02):
    rule = next(rule for rule in claims.rules() if rule.asks)
    row = {"claim": rule.claim, "section": rule.section, "paper": "−.020", "outcome": outcome}
    return pd.DataFrame(
        [row | {"here": here, "low": here - 0.01, "high": here + 0.01, "why": "W."}]
    )


def test_the_long_edition_decides_and_the_quick_one_stands_next_to_it():
    quick, long = edition("cannot be seen here", -0.09), edition("supported")
    (row,) = claims.overview({"laptop-long": long, "laptop": quick})
    assert row["outcome"] == "supported" and row["laptop-long"] == "−.020 [−.030, −.010]"
    assert row["laptop"] == "−.090 [−.100, −.080] (cannot be seen here)"
    assert row["chapter"] == "05_comparison"
    (answer,) = claims.answers({"laptop-long": long, "laptop": quick})
    assert answer["question"].endswith("?") and answer["verdict"].startswith("Yes")
    assert "−.020 [−.030, −.010] (profile `laptop-long`" in answer["text"]
    for outcome in claims.ANSWERS:
        (answer,) = claims.answers({"laptop": edition(outcome)})
        assert answer["text"].endswith(("the paper has −.020).", "The paper has −.020."))
        assert answer["text"].startswith("W.") == outcome.startswith("cannot")
    assert claims.answers({"laptop": quick.assign(claim="another")}) == []
    (answer,) = claims.answers({"laptop": edition("not supported", 0.08)})
    assert answer["verdict"].startswith("Yes") and "−" not in answer["text"].split("(")[0]
    (answer,) = claims.answers(
        {"paper": edition("not decided").assign(low=math.nan, high=math.nan)}
    )
    assert "no confidence interval" in answer["verdict"] and "CI" not in answer["text"]
    for here, verdict in ((-0.045, "It scores lower"), (0.045, "It scores higher"), (0.0, "Not")):
        (answer,) = claims.answers({"laptop": edition("not decided", here)})
        assert answer["verdict"].startswith(verdict)


def test_the_figure_has_the_numbers_of_the_claims():
    rows = pd.concat([edition("supported", 0.01), edition("cannot be seen here", -0.2)])
    (narrow,) = claims.figure(rows, narrow=True).axes
    assert len(narrow.texts) == 2 and not narrow.get_yticklabels()
    (axis,) = claims.figure(rows).axes
    dots = [line for line in axis.get_lines() if line.get_marker() == "o"]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in dots] == [(0.01, 0), (-0.2, 1)]
    assert [line.get_markerfacecolor() == "white" for line in dots] == [False, True]
    paper = [line for line in axis.get_lines() if line.get_marker() == "D"]
    assert [line.get_xdata()[0] for line in paper] == [-0.02, -0.02]
    intervals = [line.get_xdata() for line in axis.get_lines() if len(line.get_xdata()) == 2]
    assert any(list(ends) == [pytest.approx(0.0), pytest.approx(0.02)] for ends in intervals)
    ranges = [shade.get_paths()[0].get_extents() for shade in axis.collections]
    assert [(r.x0, r.x1) for r in ranges] == [(-0.05, 0.05)] * 2
    assert claims.figure(edition("cannot be tested here")) is None
    far = edition("supported", 0.01).assign(paper="+.140")  # the paper's value is on the axis, too
    assert claims.figure(far).axes[0].get_xlim()[1] > 0.14
    for other in (  # differences in Hits@k, and in how much two measures gain
        "The best ε depends on the measure.",
        "Tuning the static target improves recall more than nDCG@10.",
    ):
        assert claims.figure(edition("supported").assign(claim=other)) is None
