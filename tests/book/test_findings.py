"""The sentences follow the numbers: they flip when the data flip, and claim no more than interval or seeds allow."""

import re

import numpy as np
import pandas as pd
import pytest

import report_frames as frames
from adaptive_margins.book import findings
from adaptive_margins.book.published import load

NDCG, HITS, RECALL = frames.NDCG, frames.HITS, frames.RECALL
LAPTOP = frames.ENCODERS


def bullet(text, words):
    (found,) = (line for line in text.splitlines() if words in line)
    return found


def head(text, section, number):
    """What stands in bold before an observation of the paper."""
    return bullet(text, f"(Section {section}, {number})").split("**")[1]


@pytest.mark.parametrize(
    "ours, theirs, want",
    [
        ((6, 6), (4, 6), "Partly"),
        ((5, 6), (4, 6), "As"),
        ((0, 6), (3, 6), "Unlike"),  # one half is on no side
        ((6, 6), (3, 6), "Unlike"),
        ((3, 6), (0, 6), "Unlike"),
        ((3, 6), (6, 6), "Unlike"),
        ((3, 6), (4, 6), "As"),
        ((0, 4), (2, 6), "Partly"),
        ((1, 6), (4, 6), "Unlike"),
        ((2, 9), (7, 18), "As"),  # exactly a sixth apart
        ((0, 0), (0, 6), "Not decided"),
    ],
)
def test_shares(ours, theirs, want):
    flags = [[True] * some + [False] * (all_ - some) for some, all_ in (ours, theirs)]
    assert findings._shares(*flags).startswith(want)


# --- Figure 3: written down by hand, seeds differ by .004 ---


def static(values, seeds=(0.0, 0.004), start=0.4):
    """A frame from {(encoder, in_batch, measure): {ε: value}}; the first encoder has two seeds."""
    rows = []
    first = next(iter(values))[0]
    for (encoder, in_batch, measure), curve in values.items():
        for seed, shift in enumerate(seeds if encoder == first else seeds[:1], 1):
            rows += [
                {
                    "encoder": encoder,
                    "in_batch": in_batch,
                    "target": target,
                    "seed": seed,
                    "measure": measure,
                    "value": value + shift,
                    "start": start,
                    "maximum": False,
                    "run_id": "r",
                    "start_run_id": "s",
                }
                for target, value in curve.items()
            ]
    return frames.mark_maxima(pd.DataFrame(rows), ["encoder", "in_batch", "measure"])


def grid(at, height=0.5, default=0.35):
    """A curve that is highest at one ε and ``default`` at ε = 1."""
    return {
        target: default if target == 1 else height - 0.2 * abs(target - at)
        for target in (0, 0.2, 0.4, 0.6, 0.8, 1)
    }


def cases(peak, in_batch_loss=0.02, default=0.35):
    """Curves of two encoders; ``peak``: ε by (encoder, measure)."""
    return {
        (encoder, in_batch, measure): grid(
            peak[encoder, measure], 0.5 - in_batch_loss * in_batch, default
        )
        for encoder in ("minilm-3", "minilm-4")
        for in_batch in (False, True)
        for measure in (NDCG, HITS)
    }


APART = {
    ("minilm-3", NDCG): 0.2,
    ("minilm-3", HITS): 0.6,
    ("minilm-4", NDCG): 0.4,
    ("minilm-4", HITS): 0.8,
}
TOGETHER = dict.fromkeys(APART, 0.4)


def test_sentence_on_the_best_target():
    data = static(cases(APART))
    assert findings.sentence_best(data, "minilm-3") == (
        "For MiniLM-3 without in-batch negatives the best ε is 0.2 (nDCG@10 .500, at step 0 .400);"
        " the spread over ε is .150, over 2 seeds at most .004: it differs more by ε than by seed."
    )
    assert findings.sentence_best(data, "minilm-4", True, HITS, labels={"minilm-4": "two"}) == (
        "For two with in-batch negatives the best ε is 0.8 (Hits@5 .480, at step 0 .400);"
        " the spread over ε is .160 (one seed)."
    )
    wild = static(cases(APART), seeds=(0.0, -0.3))
    assert findings.sentence_best(wild, "minilm-3").endswith(
        "over 2 seeds at most .300: it differs no more by ε than by seed."
    )


def test_figure3_all_as_in_the_paper():
    text = findings.figure3(static(cases(APART)))
    for number in (1, 2, 3, 4):
        assert head(text, "5.1", number) == "As in the paper"
    assert "8 of 8 curves; in nDCG@10 by +.130 to +.150, by more than .100 in 4 of 4" in text
    assert "MiniLM-3 0.2, MiniLM-4 0.4" in bullet(text, "(Section 5.1, 2)")
    assert "(+.020)" in bullet(text, "(Section 5.1, 4)")
    assert "is known for MiniLM-3: nDCG@10 .004, Hits@5 .004" in text


def test_figure3_flips_with_the_data():
    flipped = static(cases(TOGETHER, in_batch_loss=-0.02, default=0.55))
    text = findings.figure3(flipped)
    # ε = 1 is now the best of all: same for every encoder and measure, and in-batch negatives help.
    assert head(text, "5.1", 1) == "Unlike the paper"
    assert "higher than ε = 1 in 0 of 8 curves" in text
    for number in (2, 3):
        assert head(text, "5.1", number) == "Unlike the paper"
    text = findings.figure3(static(cases(TOGETHER, in_batch_loss=-0.02)))
    assert head(text, "5.1", 4) == "Unlike the paper"
    assert "the same or higher in 0 of 4 pairs of encoder and measure (−.020)" in text
    assert "higher in 0 of 4 and lower in 4 of 4" in text


def test_figure3_claims_nothing_within_the_seed_spread():
    """Different best ε, but the scores between them differ less than seeds do."""
    text = findings.figure3(static(cases(APART, in_batch_loss=-0.02), seeds=(0.0, 0.2)))
    for number in (1, 2, 3):
        assert head(text, "5.1", number) in ("Not decided by this run", "Unlike the paper")
    assert "within the seed spread of the best for all of them" in bullet(text, "(Section 5.1, 2)")
    assert "by more than the seed spread explains in 0 of 4" in bullet(text, "(Section 5.1, 3)")
    assert head(text, "5.1", 4) == "Not decided by this run"


def test_figure3_without_seeds_speaks_of_this_run_only():
    text = findings.figure3(static(cases(APART), seeds=(0.0,)))
    for number in (1, 2, 3, 4):
        assert head(text, "5.1", number) == "As in the paper, in this run"
    assert "seed spread" not in text
    assert "(one seed)" in text


def test_figure3_without_the_default_target():
    data = static(cases(APART))
    text = findings.figure3(data[data["target"] < 1])
    assert head(text, "5.1", 1) == "Not decided by this run"


def test_seed_spread():
    data = static(cases(APART), seeds=(0.0, 0.004, -0.001))
    assert findings.seed_spread(data) == pytest.approx({NDCG: 0.005, HITS: 0.005})
    assert findings.seed_spread(data[data["seed"] == 1]) == {NDCG: None, HITS: None}


# --- Figures 4 and 5: curves of five points ---


def learning(values, sizes=(32,), kind="adaptive"):
    """A frame from {(encoder, in_batch, batch_size): five values}; Hits@5 is .2 higher."""
    rows = [
        {
            "encoder": encoder,
            "in_batch": in_batch,
            "batch_size": size,
            "seed": 1,
            "step": 100 * i // size,
            "triples": 100 * i,
            "measure": measure,
            "value": value + 0.2 * (measure == HITS),
            "maximum": False,
            "run_id": frames.run_id(kind, encoder, in_batch, size),
        }
        for (encoder, in_batch, size), curve in values.items()
        for measure in (NDCG, HITS)
        for i, value in enumerate(curve)
    ]
    return frames.mark_maxima(pd.DataFrame(rows), ["encoder", "in_batch", "batch_size", "measure"])


EARLY = [0.40, 0.44, 0.46, 0.45, 0.44]  # best after half of the triples
LATE = [0.40, 0.41, 0.42, 0.43, 0.44]


def adaptive(plain=EARLY, in_batch=LATE):
    return learning(
        {
            (e, side, 32): curve
            for e in ("minilm-3", "minilm-4")
            for side, curve in ((False, plain), (True, in_batch))
        }
    )


def intervals(data, half, loss="adaptive"):
    best = data[data["maximum"]]
    start = data[data["triples"] == 0].set_index(["run_id", "measure"])["value"]
    before = np.array([start[r.run_id, r.measure] for r in best.itertuples()])
    difference = best["value"] - before
    return best.assign(
        loss=loss,
        start=before,
        best=best["value"],
        difference=difference,
        low=difference - half,
        high=difference + half,
    )


def test_figure4_as_in_the_paper():
    text = findings.figure4(adaptive())
    assert head(text, "5.2", 1) == "As in the paper, in this run"
    assert head(text, "5.2", 2) == "As in the paper, in this run"
    assert "MiniLM-3 50%, MiniLM-4 50%" in text and "lower at the end in 2 of 2" in text
    assert "is lower with than without in-batch negatives in 2 of 2 encoders (−.020)" in text
    assert "comes later in 2 of 2" in text


def test_figure4_flips_with_the_data():
    text = findings.figure4(adaptive(plain=LATE, in_batch=EARLY))
    assert head(text, "5.2", 1) == "Unlike the paper, in this run"
    assert head(text, "5.2", 2) == "Unlike the paper, in this run"
    assert "MiniLM-3 100%" in text and "in 0 of 2 encoders (+.020)" in text


def test_figure4_differences_within_the_seed_spread():
    text = findings.figure4(adaptive(), noise={NDCG: 0.05, HITS: 0.05})
    assert "beyond the seed spread of .050 in 0 of 2" in text
    assert head(text, "5.2", 2) == "Partly as in the paper, in this run"  # it still comes later


@pytest.mark.parametrize(("half", "word"), [(0.01, "(a gain)"), (0.07, "(not told apart from 0)")])
def test_a_gain_needs_an_interval(half, word):
    data = adaptive()
    line = findings.figure4(data, gains=intervals(data, half)).splitlines()[0]
    assert line.count(word) == 2
    assert f"from .400 to .460, +.060 [{'+' if half < 0.06 else '−'}." in line
    without = findings.figure4(data).splitlines()[0]
    assert without.count("(higher in this run, no interval)") == 2 and "a gain" not in without


def test_a_loss_is_called_one():
    """The measure of the best step can fall below step 0, e.g. when another one chose the step."""
    data = adaptive()
    worse = intervals(data, 0.01).assign(best=0.35, low=-0.06, high=-0.04)
    line = findings.figure4(data, gains=worse).splitlines()[0]
    assert "from .400 to .350, −.050 [−.060, −.040] (a loss)" in line


def test_reference_is_passed_or_not():
    data = adaptive()
    assert "order (.450) in 1 of 2 settings" in findings.figure4(data, references={NDCG: 0.45})
    assert "order (.480) in 0 of 2 settings" in findings.figure4(data, references={NDCG: 0.48})
    assert "BM25" not in findings.figure4(data)


def distributed(small, large):
    return learning(
        {
            (e, False, size): curve
            for e in ("minilm-3", "minilm-4")
            for size, curve in ((16, small), (32, large))
        },
        kind="distributed",
    )


SOONER = [0.40, 0.474, 0.46, 0.45, 0.44]
SOON = [0.40, 0.45, 0.475, 0.46, 0.45]
SLOW = [0.40, 0.41, 0.42, 0.44, 0.46]


def test_figure5_as_in_the_paper():
    other = adaptive(plain=[0.40, 0.42, 0.44, 0.46, 0.45])
    text = findings.figure5(distributed(SOONER, SOON), adaptive=other)
    assert [head(text, "5.3", n) for n in (1, 2, 3)] == ["As in the paper, in this run"] * 3
    assert (
        "targets in 2 of 2 encoders, and with batches of 16 after fewer than with 32 in 2 of 2"
        in text
    )
    assert (
        "(+.035) and that of adaptive targets without in-batch negatives in 2 of 2 encoders (+.015)"
        in text
    )
    assert "differs from that with 16 by +.001 (up to .010 counts as hardly)" in text


def test_figure5_flips_with_the_data():
    other = adaptive(plain=[0.40, 0.50, 0.44, 0.46, 0.45], in_batch=[0.40, 0.49, 0.4, 0.4, 0.4])
    text = findings.figure5(distributed([0.4, 0.4, 0.4, 0.4, 0.48], SLOW), adaptive=other)
    assert [head(text, "5.3", n) for n in (1, 2, 3)] == ["Unlike the paper, in this run"] * 3
    assert "by −.020" in bullet(text, "(Section 5.3, 3)")


def test_figure5_within_the_seed_spread_decides_nothing():
    text = findings.figure5(distributed(SOONER, SOON), adaptive=adaptive(), noise={NDCG: 0.2})
    assert head(text, "5.3", 2) == "Not decided by this run"
    text = findings.figure5(distributed(SOONER, SOON), adaptive=adaptive(), noise={NDCG: 0.002})
    assert head(text, "5.3", 2) == "As in the paper"


def test_figure5_alone_compares_batch_sizes_only():
    text = findings.figure5(distributed(SOONER, SOON))
    assert "adaptive targets" not in re.sub(r"\*The paper.*", "", text)
    assert "with batches of 16 after fewer than with 32 in 2 of 2" in text
    one = distributed(SOONER, SOON)
    text = findings.figure5(one[one["batch_size"] == 32])
    assert "Section" not in text and "MiniLM-3" in text


# --- Figure 6 ---


def spread_of_targets(means, above=0.5, below=0.2):
    """A frame from {encoder: (mean at first, mean in the end)}."""
    return pd.DataFrame(
        {
            "encoder": encoder,
            "batch_size": 32,
            "part": part,
            "step": step,
            "mean": mean,
            "min": mean - below,
            "max": mean + above,
        }
        for encoder, both in means.items()
        for step, (part, mean) in enumerate(zip(("first", "last"), both, strict=True))
    )


def test_figure6_follows_the_data():
    same = findings.figure6(spread_of_targets({"a": (0.6, 0.01), "b": (0.2, -0.02)}))
    assert [head(same, "5.3", n) for n in (1, 2, 3)] == ["As in the paper, in this run"] * 3
    assert "a from .60 to .01, b from .20 to −.02" in same
    assert "(.40 apart at first, .03 in the end)" in same
    other = spread_of_targets({"a": (0.6, 0.3), "b": (0.2, -0.2)}, above=0.1, below=0.4)
    other = findings.figure6(other)
    assert [head(other, "5.3", n) for n in (1, 2, 3)] == ["Unlike the paper, in this run"] * 3
    alike = findings.figure6(spread_of_targets({"a": (0.2, 0.2), "b": (0.2, 0.0)}))
    assert head(alike, "5.3", 1) == "Partly as in the paper, in this run"
    assert head(alike, "5.3", 3) == "Not decided by this run"


# --- Tables ---


def test_table1_reads_the_frame():
    assert findings.table1(frames.table1()) == (
        "- MiniLM-3 trains 8% of its 22.7M parameters; MiniLM-4 trains 16% of its 22.7M parameters;"
        " MiniLM-5 trains 23% of its 22.7M parameters. Embeddings have 384 dimensions (paper: 768)."
    )


def test_table2_follows_the_data():
    data = frames.table2()
    text = findings.table2(data)
    assert "the relevance of the negatives falls (0.310, 0.050, −0.020)" in text
    assert "in its printed numbers it does not fall" in text  # .34, .06, .12
    assert (
        "The loss as the paper prints it does not fall with the target (0.144, 0.029, 0.102)"
        in text
    )
    assert "in the paper it falls. By Equation 3 it falls (0.144, 0.008, 0.000)" in text
    data.loc[data["role"] == "d-min", ["rho", "loss_table"]] = [0.2, 0.001]
    text = findings.table2(data)
    assert "relevance of the negatives does not fall (0.310, 0.050, 0.200)" in text
    assert "as the paper prints it falls with the target (0.144, 0.029, 0.001)" in text


def prefer(*winners):
    """Table 3 in which ``winners`` (target, in_batch, measure) are best, .1 above the others."""

    def edit(encoder, target, in_batch, measure, value):
        return 0.6 if (target, in_batch, measure) in winners else 0.5 if measure == NDCG else 0.4

    return frames.table3(edit=edit)


def test_table3_as_in_the_paper():
    text = findings.table3(prefer(("static", False, NDCG), ("adaptive", True, RECALL)))
    line = bullet(text, "have the highest nDCG@10")
    assert line.startswith("- **As in the paper**: static") and "6 of 6" in line
    assert "(paper, nDCG@10: 6 of 6)" in line
    line = bullet(text, "have the highest R@20")
    assert "in 6 of 6" in line and "(paper, R@1000: 4 of 6)" in line
    assert line.startswith("- **Partly as in the paper**")
    # .1 below the best with a half-width of .03: none is equivalent, all are lower.
    assert "distributed targets are best or equivalent to the best in nDCG@10 in 0 of 6" in text
    assert "Comparisons with the best: 48. Equivalent: 0; lower, with an interval" in text
    assert "excludes 0: 48, of which 0" in text


def test_table3_flips_with_the_data():
    text = findings.table3(prefer(("distributed", False, NDCG), ("distributed", False, RECALL)))
    line = bullet(text, "have the highest nDCG@10")
    assert line.startswith("- **Unlike the paper**") and "in 0 of 6" in line
    line = bullet(text, "best or equivalent to the best in nDCG@10")
    assert line.startswith("- **As in the paper**") and "in 6 of 6" in line
    assert "(paper, nDCG@10: 5 of 6)" in line


def test_table3_time_and_data():
    data = prefer(("static", False, NDCG), ("static", False, RECALL))
    seconds = data["target"].map({"static": 300.0, "adaptive": 30.0, "distributed": 60.0})
    triples = data["target"].map({"static": 2000, "adaptive": 1000, "distributed": 3000})
    text = findings.table3(data.assign(seconds=seconds, triples=triples))
    line = bullet(text, "training time")
    assert line.startswith("- **As in the paper**")
    assert (
        "took 5.0 times the training time of distributed targets (paper: 3.8 to 6.2 times)" in line
    )
    assert "and 10.0 times that of adaptive ones (paper: 4.3 to 12.7 times)" in line
    assert "fewer triples than static ones in 6 of 9 comparisons (paper: 6 of 9)" in text
    text = findings.table3(data.assign(seconds=600 - seconds, triples=triples))
    assert bullet(text, "training time").startswith("- **Unlike the paper**")


def test_table4_follows_the_test():
    text = findings.table4(frames.table4())
    line = bullet(text, "Distributed against Softmax (MNRL) with in-batch negatives")
    assert "+.005 [−.025, +.035], equivalent on test1" in line
    assert "Highest in this run: test1 nDCG@10 Distributed (.492)" in text
    assert "higher than BM25 in nDCG@10 on 2 of 2 test sets in this run (+.045)" in text
    assert "higher than Encoder as it comes" in text
    worse = frames.table4(edit=lambda loss, b, m, v: v - 0.1 * (loss == "Distributed"))
    text = findings.table4(worse)
    line = bullet(text, "Distributed against")
    assert "−.095 [−.125, −.065], lower on test1" in line and "equivalent" not in line
    assert "higher than BM25 in nDCG@10 on 0 of 2 test sets in this run (−.055)" in text
    assert "nDCG@10 Distributed" not in text


@pytest.mark.parametrize(
    ("low", "high", "equivalent", "words"),
    [
        (-0.01, 0.01, True, "equivalent"),
        (0.01, 0.03, True, "higher but equivalent"),
        (-0.03, -0.01, True, "lower but equivalent"),
        (0.01, 0.09, False, "higher"),
        (-0.03, 0.09, False, "undecided"),
    ],
)
def test_table4_words(low, high, equivalent, words):
    data = frames.table4()
    data.loc[data["loss"] == "Distributed", ["low", "high", "equivalent"]] = [low, high, equivalent]
    line = bullet(findings.table4(data), "Distributed against")
    assert f"], {words} on test1; " in line


def test_table4_tuned_against_default():
    line = bullet(findings.table4(frames.table4()), "a tuned static target")
    assert line.startswith("- **As in the paper**") and "in 4 of 4" in line
    assert "nDCG@10 +.058 (paper: nDCG@10 +.03 to +.05)" in line
    assert "R@20 +.050 (paper: Recall@1000 +.06 to +.08)" in line
    flipped = frames.table4(edit=lambda loss, b, m, v: v + 0.2 * (loss == "Static (ε = 1)"))
    assert bullet(findings.table4(flipped), "a tuned static").startswith("- **Unlike the paper**")


def test_table4_without_the_rows_it_asks_for():
    data = frames.table4()
    text = findings.table4(data[data["loss"].isin(["Adaptive", "BM25"])])
    assert "Highest in this run" in text and "against" not in text.split("Teacher")[0]
    both = pd.concat([data, load().scores(4).assign(source="published: the paper")])
    assert findings.table4(both) == findings.table4(data)


# --- all ---

ALL = {
    "figure3": lambda: findings.figure3(frames.figure3()),
    "figure4": lambda: findings.figure4(frames.figure4(), gains=frames.gains()),
    "figure5": lambda: findings.figure5(frames.figure5(), adaptive=frames.figure4()),
    "figure6": lambda: findings.figure6(frames.figure6()),
    "table1": lambda: findings.table1(frames.table1()),
    "table2": lambda: findings.table2(frames.table2()),
    "table3": lambda: findings.table3(frames.table3()),
    "table4": lambda: findings.table4(frames.table4()),
}


@pytest.mark.parametrize("name", ALL)
def test_bullets_are_whole_sentences(name):
    for line in ALL[name]().splitlines():
        assert re.match(r"- (\*\*|[A-Z])", line) and line.rstrip("*").endswith(".")
        assert not re.search(r"nan|None|  |\.\.|,\.| ,|\(\)", line), line


@pytest.mark.parametrize("name", ALL)
def test_missing_columns_are_named(name):
    data = getattr(frames, name)()
    column = {"figure6": "mean", "table1": "trained", "table2": "rho"}.get(name, "measure")
    with pytest.raises(ValueError, match=rf"{name}: columns \['{column}'\] are missing"):
        getattr(findings, name)(data.drop(columns=column))


def test_a_single_encoder_and_setting_is_enough():
    """The smallest profile: sentences say that there is nothing to compare."""
    data = frames.figure3(encoders=("minilm-3",), seeds={})
    data = data[~data["in_batch"] & (data["measure"] == NDCG)]
    text = findings.figure3(data)
    assert [head(text, "5.1", n) for n in (2, 3, 4)] == ["Not decided by this run"] * 3
    curve = frames.figure4(encoders=("minilm-3",), in_batches=(False,))
    assert head(findings.figure4(curve), "5.2", 2) == "Not decided by this run"
    assert (
        head(findings.figure6(frames.figure6(encoders=("minilm-3",))), "5.3", 3)
        == "Not decided by this run"
    )
