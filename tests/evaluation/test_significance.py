"""Paired tests, against numbers worked by hand, scipy and statsmodels, and by simulation."""

import gc
import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from statsmodels.stats.weightstats import DescrStatsW, ttost_paired

from adaptive_margins.evaluation.significance import (
    RESAMPLES,
    compare,
    holm,
    more_queries,
    paired_interval,
    randomisation_test,
)

PAIR = {"a": 0.1, "b": 0.4, "c": 0.2}


def as_runs(differences, base=0.5):
    qids = [f"q{i}" for i in range(len(differences))]
    return (
        {q: base + d for q, d in zip(qids, differences, strict=True)},
        dict.fromkeys(reversed(qids), base),  # the order of queries must not matter
    )


def test_tost_worked_by_hand():
    # Differences d = .00 .02 .04 .02 .02:
    #   n = 5, mean = .10 / 5 = .02
    #   squared deviations: .0004 0 .0004 0 0, sum .0008; variance .0008 / 4 = .0002
    #   SE = sqrt(.0002 / 5) = sqrt(.00004) = .006324555
    #   lower test: t = (.02 + .05) / SE = 11.0680; upper test: t = (.02 - .05) / SE = -4.7434
    #   p is the larger of the two, that of t = -4.7434 with 4 degrees of freedom. With 4 degrees
    #   P(T < -t) = 1/2 - s (3 - s²) / 4 where s = t / sqrt(t² + 4):
    #     t² = .0009 / .00004 = 22.5; s² = 22.5 / 26.5 = .8490566; s = .9214427;
    #     s (3 - s²) / 4 = .9214427 · 2.1509434 / 4 = .4954928; p = .0045072
    #   t table, 4 degrees: t(.95) = 2.131847, so the interval at 1 - 2 · .05 is
    #     .02 ± 2.131847 · .006324555 = .02 ± .0134830
    a, b = as_runs([0.00, 0.02, 0.04, 0.02, 0.02])
    found = compare(a, b)
    assert (found.n, found.verdict) == (5, "equivalent")
    assert found.difference == pytest.approx(0.02)
    assert found.p_tost == pytest.approx(0.0045072, abs=1e-7)
    interval = paired_interval(a, b, confidence=1 - 2 * 0.05)
    assert interval == pytest.approx((0.02, 0.0065170, 0.0334830), abs=1e-6)

    # Among 4 comparisons: 4 p = .0180290 < .05. t(.9875), 4 degrees, solves
    # 1/2 - s (3 - s²) / 4 = .0125 and is 3.495406: .02 ± 3.495406 · .006324555 = .02 ± .0221069.
    assert compare(a, b, comparisons=4).verdict == "equivalent"
    interval = paired_interval(a, b, confidence=1 - 2 * 0.05 / 4)
    assert interval == pytest.approx((0.02, -0.0021069, 0.0421069), abs=1e-6)
    # Among 12: 12 p = .0540869 > .05.
    assert compare(a, b, comparisons=12).verdict == "undecided"


def test_the_tests_are_those_of_statsmodels_and_the_verdicts_follow_from_them():
    rng = np.random.default_rng(11)
    verdicts = set()
    for _ in range(400):
        n, m = int(rng.integers(2, 300)), int(rng.integers(1, 6))
        margin, alpha = rng.uniform(0.02, 0.1), rng.uniform(0.01, 0.2)
        a, b = as_runs(rng.normal(rng.uniform(-0.08, 0.08), rng.uniform(0.01, 0.3), n))
        x, y = np.array(list(a.values())), np.array([b[q] for q in a])
        found = compare(a, b, margin=margin, alpha=alpha, comparisons=m)
        p_tost = ttost_paired(x, y, -margin, margin)[0]
        p_t = DescrStatsW(x - y).ttest_mean(0)[1]
        exact = {"rel": 1e-12, "abs": 1e-15}
        assert (found.n, found.margin) == (n, margin)
        assert found.difference == pytest.approx((x - y).mean(), **exact)
        assert found.p_tost == pytest.approx(p_tost, **exact)
        assert found.p_t == pytest.approx(p_t, **exact)
        assert found.ci == pytest.approx(DescrStatsW(x - y).tconfint_mean(alpha=0.05), **exact)
        assert paired_interval(a, b)[1:] == pytest.approx(found.ci)

        _, *interval = paired_interval(a, b, confidence=1 - 2 * alpha / m)
        expected = DescrStatsW(x - y).tconfint_mean(alpha=2 * alpha / m)
        assert interval == pytest.approx(expected, **exact)
        assert (-margin < interval[0] and interval[1] < margin) == (p_tost * m < alpha)

        sign = "better" if x.mean() > y.mean() else "worse"
        sign = sign if p_t * m < alpha else "undecided"
        assert found.verdict == ("equivalent" if p_tost * m < alpha else sign)
        small = compare(a, b, margin=margin, alpha=alpha, comparisons=m, however_small=True)
        assert small.verdict == (found.verdict if sign == "undecided" else sign)
        back = compare(b, a, margin=margin, alpha=alpha, comparisons=m)
        assert (back.p_t, back.p_tost) == pytest.approx((found.p_t, found.p_tost))
        verdicts.add(found.verdict)
    assert verdicts == {"better", "worse", "equivalent", "undecided"}


def test_two_runs_that_find_nothing_are_undecided():
    nothing = dict.fromkeys("abcdef", 0.0)
    found = compare(nothing, nothing)
    assert (found.p_t, found.p_tost, found.verdict) == (1, 1, "undecided")
    one = {**nothing, "a": 0.5}
    assert (
        compare(one, one).verdict == compare(one, one, however_small=True).verdict == "equivalent"
    )


@pytest.mark.parametrize(
    ("difference", "p", "verdicts"),
    [
        (0.0, (1, 0), ("equivalent", "equivalent")),
        (0.02, (0, 0), ("equivalent", "better")),
        (-0.049, (0, 0), ("equivalent", "worse")),
        (0.05, (0, 1), ("better", "better")),
        (-0.05, (0, 1), ("worse", "worse")),
        (-0.3, (0, 1), ("worse", "worse")),
    ],
)
def test_differences_without_variance(difference, p, verdicts, recwarn):
    base = np.random.default_rng(0).uniform(0.3, 0.6, 43)  # so that differences differ by rounding
    a = {f"q{i}": x + difference for i, x in enumerate(base)}
    b = {f"q{i}": x for i, x in enumerate(base)}
    for however_small, verdict in zip((False, True), verdicts, strict=True):
        found = compare(a, b, comparisons=4, however_small=however_small)
        assert (found.verdict, found.p_t, found.p_tost) == (verdict, *p)
        assert (found.difference, *found.ci) == pytest.approx((difference,) * 3)
    assert paired_interval(a, b, confidence=0.9) == pytest.approx((difference,) * 3)
    assert len(recwarn) == 0


@pytest.mark.parametrize("test", [paired_interval, compare])
@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (PAIR, {"a": 0.1, "b": 0.2}, r"1 queries are missing in the second run, e\.g\. \['c'\]"),
        ({"b": 0.1}, PAIR, r"2 queries are missing in the first run, e\.g\. \['a', 'c'\]"),
        ({"a": 0.1}, {"a": 0.1}, "at least 2 queries, got 1"),
        ({}, {}, "at least 2 queries, got 0"),
        (PAIR, {**PAIR, "b": math.nan}, "query 'b' has a value that is not finite: 0.4, nan"),
        ({**PAIR, "c": math.inf}, PAIR, "query 'c' has a value that is not finite: inf, 0.2"),
    ],
)
def test_what_cannot_be_paired_is_refused(test, a, b, message):
    with pytest.raises(ValueError, match=message):
        test(a, b)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"margin": 0.0}, "margin must be above 0, not 0.0"),
        ({"margin": math.nan}, "margin must be above 0, not nan"),
        ({"alpha": 0.5}, "alpha must lie between 0 and 0.5, not 0.5"),
        ({"alpha": 0.0}, "alpha must lie between 0 and 0.5, not 0.0"),
        ({"comparisons": 0}, "comparisons must be at least 1, not 0"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        compare(PAIR, PAIR, **options)


# ---- several seeds -------------------------------------------------------------------------------


def seeds(values):
    """One mapping a seed from (Q, S) values."""
    return [{f"q{i}": x for i, x in enumerate(column)} for column in np.asarray(values).T]


def naive(d):
    """Variance of the mean and its degrees of freedom, loop by loop, for (Q, S) differences."""
    q, s = d.shape
    grand = sum(d[i, j] for i in range(q) for j in range(s)) / (q * s)
    rows = [sum(d[i]) / s for i in range(q)]
    columns = [sum(d[:, j]) / q for j in range(s)]
    ms_q = s * sum((r - grand) ** 2 for r in rows) / (q - 1)
    ms_s = q * sum((c - grand) ** 2 for c in columns) / (s - 1)
    ms_e = sum(
        (d[i, j] - rows[i] - columns[j] + grand) ** 2 for i in range(q) for j in range(s)
    ) / ((q - 1) * (s - 1))
    if ms_s <= ms_e:
        return grand, ms_q / (q * s), q - 1
    total = ms_q + ms_s - ms_e
    freedom = total**2 / (ms_q**2 / (q - 1) + ms_s**2 / (s - 1) + ms_e**2 / ((q - 1) * (s - 1)))
    return grand, total / (q * s), max(freedom, 1)


@pytest.mark.parametrize("spread", [0.0, 0.02, 0.2])
def test_seeds_and_queries_are_both_random(spread):
    rng = np.random.default_rng(7)
    both = set()
    for _ in range(20):
        q, s = int(rng.integers(4, 40)), int(rng.integers(2, 6))
        a = rng.random((q, s)) + rng.normal(0, spread, s)
        b = rng.random((q, s))
        mean, variance, freedom = naive(a - b)
        both.add(freedom == q - 1)
        found = compare(seeds(a), seeds(b), margin=0.1)
        half = stats.t.ppf(0.975, freedom) * math.sqrt(variance)
        assert found.n == q
        assert (found.difference, *found.ci) == pytest.approx((mean, mean - half, mean + half))
        assert found.p_t == pytest.approx(2 * stats.t.sf(abs(mean) / math.sqrt(variance), freedom))
        one_sided = [stats.t.sf((0.1 + x) / math.sqrt(variance), freedom) for x in (mean, -mean)]
        assert found.p_tost == pytest.approx(max(one_sided))
        assert paired_interval(seeds(a), seeds(b)) == pytest.approx((mean, *found.ci))
    assert True in both if spread == 0 else False in both


def test_degrees_of_freedom_are_at_least_one():
    """Where the queries differ less than chance would have them, Satterthwaite's are near 0."""
    d = np.array([[0.11, 0.01], [0.08, 0.03], [0.10, 0.01], [0.07, 0.04]]) - 0.06
    d[:, 1] += 0.05
    mean, variance, freedom = naive(d)
    assert freedom == 1
    found = compare(seeds(d), seeds(np.zeros((4, 1))))
    assert found.ci[1] - found.ci[0] == pytest.approx(2 * 12.7062 * math.sqrt(variance), rel=1e-4)
    assert found.p_t == pytest.approx(2 * stats.t.sf(abs(mean) / math.sqrt(variance), 1))


def test_one_seed_is_compared_with_each_of_the_others():
    rng = np.random.default_rng(3)
    a, b = rng.random((9, 3)), rng.random((9, 1))
    repeated = seeds(np.repeat(b, 3, axis=1))
    assert (
        compare(seeds(a), seeds(b)[0]) == compare(seeds(a), seeds(b)) == compare(seeds(a), repeated)
    )
    assert compare(seeds(b), seeds(b[::-1])) == compare(seeds(b)[0], seeds(b[::-1])[0])


def test_seeds_whose_differences_cancel_for_each_query_do_not_vary():
    a, b = seeds([[0.5, 0.1], [0.1, 0.5], [0.3, 0.3]]), seeds([[0.3], [0.3], [0.3]])
    found = compare(a, b)
    assert (found.p_t, found.p_tost, found.verdict) == (1, 0, "equivalent")
    assert (found.difference, *found.ci) == pytest.approx((0, 0, 0))


def test_seeds_that_do_not_fit():
    values = seeds(np.random.default_rng(3).random((5, 3)))
    with pytest.raises(ValueError, match="2 seeds cannot be paired with 3"):
        compare(values[:2], values)
    less = [values[0], {q: x for q, x in values[1].items() if q != "q2"}]
    with pytest.raises(ValueError, match="the seeds of a run have scores of different queries"):
        compare(less, less)


def test_error_rates_with_three_seeds():
    """At a true difference of 0 the t test, at one of the margin TOST, errs in about 5 % of cases.

    A paired t test of the means over the seeds errs in more than 10 % where seeds differ.
    """
    rng = np.random.default_rng(0)
    cases, queries = 500, 300
    zero = seeds(np.zeros((queries, 3)))
    for of_seeds in (0.0, 0.01, 0.02):
        wrong = np.zeros(3)
        for _ in range(cases):
            d = rng.normal(0, 0.3, (queries, 1)) + rng.normal(0, of_seeds, (1, 3))
            d += rng.normal(0, 0.1, (queries, 3))
            wrong[0] += compare(seeds(d), zero).p_t < 0.05
            wrong[1] += compare(seeds(d + 0.05), zero).p_tost < 0.05
            wrong[2] += stats.ttest_1samp(d.mean(1), 0).pvalue < 0.05
        t, tost, of_means = wrong / cases
        assert 0.025 < t < 0.085 and 0.025 < tost < 0.085
        assert of_means > 0.07 if of_seeds == 0.02 else True


def test_two_seeds_that_differ_much_err_more_often():
    """As the page "Threats to validity" states."""
    rng, cases, queries = np.random.default_rng(0), 400, 300
    zero, wrong = seeds(np.zeros((queries, 2))), 0
    for _ in range(cases):
        d = rng.normal(0, 0.3, (queries, 1)) + rng.normal(0, 0.04, (1, 2))
        wrong += compare(seeds(d + rng.normal(0, 0.1, (queries, 2))), zero).p_t < 0.05
    assert 0.06 < wrong / cases < 0.14


# ---- many comparisons, randomisation, and queries that would decide ------------------------------


def test_holm_is_the_step_down_of_its_definition_and_that_of_statsmodels(monkeypatch):
    monkeypatch.setattr(gc, "collect", int)  # multipletests collects all garbage in each call
    rng = np.random.default_rng(5)
    for _ in range(200):
        p = np.round(rng.random(int(rng.integers(1, 9))) ** 3, 2).tolist()  # some are equal
        adjusted = holm(p)
        assert adjusted == pytest.approx(multipletests(p, method="holm")[1])
        for alpha in (0.011, 0.051, 0.31):
            rejected = set()
            for step, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
                if not p[i] < alpha / (len(p) - step):
                    break
                rejected.add(i)
            assert {i for i, x in enumerate(adjusted) if x < alpha} == rejected


def test_randomisation_is_the_exact_test_of_scipy_but_for_chance():
    rng = np.random.default_rng(3)
    shift = np.linspace(0, 0.6, 8)
    smooth = rng.normal(shift, 0.5, (12, 8))
    ties = (
        rng.choice([-1.0, 0.0, 0.0, 1.0, 1.0], (12, 8)) / 3
    )  # sums of thirds tie but for rounding
    for differences in (smooth, ties, np.zeros((12, 2)), smooth - smooth.mean(axis=0)):
        exact = [
            stats.permutation_test((x,), np.mean, permutation_type="samples").pvalue
            for x in differences.T
        ]
        spread = np.sqrt(np.multiply(exact, np.subtract(1, exact)) / RESAMPLES)
        found = randomisation_test(differences)
        assert (np.abs(np.subtract(found, exact)) <= 4 * spread + 2 / RESAMPLES).all()
        assert found == randomisation_test(differences)  # the same flips
        assert found[1] == pytest.approx(randomisation_test(differences[:, 1:2])[0])


def observed(n, mean, sd, **options):
    """A comparison with exactly this mean and standard deviation of the differences."""
    x = stats.zscore(np.random.default_rng(1).normal(size=n), ddof=1)
    return compare(*as_runs(mean + sd * x), **options)


@pytest.mark.parametrize(
    ("n", "mean", "sd", "alpha", "shown"),
    [
        (50, 0.06, 0.4, 0.05, "a difference"),
        (30, -0.04, 0.2, 0.05 / 3, "a difference"),
        (40, 0.0, 0.2, 0.05, "equivalence"),
        (60, -0.01, 0.3, 0.05 / 4, "equivalence"),
    ],
)
def test_more_queries_give_the_power(n, mean, sd, alpha, shown):
    found = observed(n, mean, sd)
    assert found.p_t >= alpha and found.p_tost >= alpha
    more = more_queries(found, alpha)
    assert more["would_show"] == shown
    assert more["more"] > 0 and float(f"{more['more']:.2g}") == more["more"]
    if shown == "a difference":
        needed = TTestPower().solve_power(abs(mean) / sd, alpha=alpha, power=0.8)
        assert n + more["more"] == pytest.approx(needed, rel=0.06)
    total, trials = n + more["more"], 800
    x = np.random.default_rng(2).normal(mean, sd, (total, trials))
    p = stats.ttest_1samp(x, 0).pvalue
    if shown == "equivalence":
        above = stats.ttest_1samp(x, -0.05, alternative="greater").pvalue
        p = np.maximum(above, stats.ttest_1samp(x, 0.05, alternative="less").pvalue)
    assert 0.74 < (p < alpha).mean() < 0.86
