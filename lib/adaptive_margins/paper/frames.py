"""What the figures and tables of the paper show, as long data frames with the ids of their runs.

Those that have an `Opened` as their first argument are methods of `reproduction.Reproduction`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch

from adaptive_margins.data.stored import seeded_order
from adaptive_margins.data.trec import Run
from adaptive_margins.encoder.embed import embed
from adaptive_margins.encoder.tokens import tokenize
from adaptive_margins.evaluation.external_runs import read_external_runs, score
from adaptive_margins.evaluation.measures import Evaluation
from adaptive_margins.evaluation.significance import compare, paired_interval
from adaptive_margins.losses import margin_loss
from adaptive_margins.paper.experiments import (
    DISTILLED,
    VARIANTS,
    Experiments,
    teacher_runs,
    tuning_runs,
)
from adaptive_margins.paper.inputs import Inputs
from adaptive_margins.paper.runner import Runner
from adaptive_margins.paper.store import StoredRun
from adaptive_margins.profiles.config import Profile
from adaptive_margins.runs import TrainingRun

TAS_B = "wang-zuccon-tas-b"
"""The external run that the paper's Table 4 tests against; a key of ``book/printed/table4.csv``."""

SOFTMAX, TUNED = "Softmax (MNRL)", "Static (tuned)"

_EMBEDDING = {
    "cls": "[CLS]",
    "cls+linear": "[CLS] + Linear",
    "cls+pooler": "[CLS] + Linear + tanh",
    "mean": "mean",
}


_FIGURE3 = (
    "encoder in_batch target seed measure value low high start maximum collapsed run_id"
    " start_run_id"
)
_CURVE = "encoder in_batch batch_size seed step triples measure value low high maximum run_id"
_GAINS = "encoder loss in_batch batch_size measure start best difference low high step run_id"
_TARGETS = "encoder batch_size part step mean min max window span run_id"
_TESTED = "set measure value best difference low high"
_TABLE3 = (
    f"encoder target epsilon in_batch {_TESTED} p p_adjusted comparisons equivalent seconds"
    " sweep_seconds triples run_id reference_run_id run_ids"
)
_TABLE4 = (
    f"block loss sampling in_batch source {_TESTED} p_adjusted comparisons equivalent refused"
    " missing seconds teacher_seconds triples run_id reference_run_id run_ids"
)


class Opened(Protocol):
    """What figures and tables need of a `reproduction.Reproduction`."""

    profile: Profile
    inputs: Inputs
    runner: Runner
    experiments: Experiments


# --- figures ------------------------------------------------------------------------------------


def figure3(opened: Opened, encoder: str | None = None) -> pd.DataFrame:
    """Static targets: a row per ε, seed and measure, on the validation set after the last step.

    Only ``encoder`` is trained if one is named, else all of the profile.

    ``low`` and ``high`` are the zero-shot score and the 95 % confidence interval of the gain over
    it, paired over the queries.

    A run has ``collapsed`` if the encoder is worse in the selection measure than before training:
    the paired t test finds a loss, and TOST does not find it within ±.05. Fine-tuning that ends
    below a trivial baseline is called failed by Mosbach et al. (ICLR 2021), too; the baseline is
    the zero-shot encoder here.
    """
    shown = [c for c in opened.experiments.figure3_runs() if encoder in (None, c.encoder)]
    names = [encoder] if encoder is not None else list(opened.profile.encoders)
    starts = {name: _zero_shot(opened, name) for name in names}
    rows = []
    for run in opened.runner.ensure(shown):
        c = run.config
        start = starts[c.encoder]
        after, before = (r.evaluation("rerank", c.validation) for r in (run, start))
        both = (x.per_query[c.selection] for x in (after, before))
        collapsed = compare(*both).verdict == "worse"
        for measure, value in after.mean.items():
            key = (c.encoder, c.in_batch, c.target, c.seed, measure, value)
            ends = _ends(after.per_query[measure], before.per_query[measure])
            facts = (*ends, before.mean[measure], False, collapsed)
            rows.append((*key, *facts, run.run_id, start.run_id))
    frame = pd.DataFrame(rows, columns=_FIGURE3.split())
    highest = _is_first_maximum(frame, ["encoder", "in_batch", "seed", "measure"])
    first, *_ = opened.profile.static_seeds(opened.profile.reference_encoder)  # of all encoders
    frame["maximum"] = highest & (frame["seed"] == first)
    return frame


def _ends(after: Mapping[str, float], before: Mapping[str, float]) -> tuple[float, float]:
    """The mean before, moved by the ends of the gain's 95 % confidence interval."""
    _, low, high = paired_interval(after, before)
    start = sum(before.values()) / len(before)
    return start + low, start + high


def figure4(opened: Opened) -> pd.DataFrame:
    """Adaptive targets: learning curves on the validation set.

    ``low`` and ``high`` are as in `figure3`, with the gain over step 0.
    """
    return _curves(opened.runner, opened.experiments.figure4_runs())


def figure5(opened: Opened) -> pd.DataFrame:
    """Distributed targets: learning curves by batch size, as in `figure4`."""
    return _curves(opened.runner, opened.experiments.figure5_runs())


def _curves(runner: Runner, configs: Sequence[TrainingRun]) -> pd.DataFrame:
    frames = []
    for run in runner.ensure(configs):
        c = run.config
        long = run.curve.melt(["step", "triples"], list(c.rerank_measures), "measure", "value")
        queries = run.checks.pivot(index="qid", columns=["measure", "step"], values="value")
        ends = [
            _ends(queries[m, step].to_dict(), queries[m, 0].to_dict())
            for m, step in zip(long["measure"], long["step"], strict=True)
        ]
        long[["low", "high"]] = ends
        facts = {name: getattr(c, name) for name in ("encoder", "in_batch", "batch_size", "seed")}
        frames.append(long.assign(**facts, run_id=run.run_id))
    frame = pd.concat(frames, ignore_index=True)
    frame["maximum"] = _is_first_maximum(frame, ["run_id", "measure"])
    return frame[_CURVE.split()]


def gains(opened: Opened, configs: Sequence[TrainingRun]) -> pd.DataFrame:
    """The selected step against step 0 on validation, with its 95 % confidence interval."""
    rows = []
    for run in opened.runner.ensure(configs):
        c, curve = run.config, run.curve.set_index("step")
        step = run.result["kept_step"]
        for measure in c.rerank_measures:
            setting = (c.encoder, c.target, c.in_batch, c.batch_size, measure)
            queries: Any = run.validated(measure)
            interval = paired_interval(queries.loc[step].to_dict(), queries.loc[0].to_dict())
            means = curve.loc[[0, step], measure]
            rows.append((*setting, *means, *interval, step, run.run_id))
    return pd.DataFrame(rows, columns=_GAINS.split())


def figure6(opened: Opened) -> pd.DataFrame:
    """Raw φ(d⁺, d⁻) over training, smoothed, with the largest batch size: all steps, or the first
    and last ``span`` where there are more.
    """
    window, span = opened.profile.target_plot.window, opened.profile.target_plot.span
    configs, frames = opened.experiments.figure5_runs(), []
    size = max(c.batch_size for c in configs)
    for run in opened.runner.ensure([c for c in configs if c.batch_size == size]):
        smooth = run.targets[["mean", "min", "max"]].rolling(window, min_periods=1).mean()
        smooth.insert(0, "step", run.targets["step"])
        parts = {"all": smooth}
        if span and 2 * span < len(smooth):
            parts = {"first": smooth.head(span), "last": smooth.tail(span)}
        for part, rows in parts.items():
            rows = rows.assign(encoder=run.config.encoder, batch_size=size, part=part)
            frames.append(rows.assign(window=window, span=len(rows), run_id=run.run_id))
    return pd.concat(frames, ignore_index=True)[_TARGETS.split()]


# --- tables -------------------------------------------------------------------------------------


def table1(opened: Opened) -> pd.DataFrame:
    """Encoders: parameters, embedding, dimensions."""
    rows = []
    for name, settings in opened.profile.encoders.items():
        run = _zero_shot(opened, name)
        loaded = opened.inputs.encoder(name)
        trained = [p for p in loaded.model.parameters() if p.requires_grad]
        rows.append(
            {
                "encoder": name,
                "base": settings.label or settings.base,
                "parameters": sum(p.numel() for p in loaded.whole.parameters()),
                "trained": sum(p.numel() for p in trained),
                "embedding": _EMBEDDING[settings.pooling],
                "dimensions": loaded.whole.get_embedding_dimension(),
                "run_id": run.run_id,
            }
        )
    return pd.DataFrame(rows)


def table2(opened: Opened) -> pd.DataFrame:
    """A query under the fine-tuned reference encoder: its highest, middle and lowest target.

    Of the first training batch, the query whose targets T[i, :] are spread widest. ρ = φ(q_i, ·),
    t = T[i, j]. ``loss_table`` is what the paper's Table 2 shows, (ρ(d⁺) − ρ(d⁻_j) − t)²;
    ``loss_equation`` is Equation 3 squared.
    """
    reference, e = opened.profile.reference_encoder, opened.experiments
    run = opened.runner.ensure([e.variant_run(reference, "distributed", False)])[0]
    batch, q, p, n = _first_batch(run, opened)
    _, targets = margin_loss(q, p, n, target="distributed", return_targets=True)
    i = int((targets.max(1).values - targets.min(1).values).argmax())
    t = targets[i]
    picks = {
        "d-max": int(t.argmax()),
        "d-mid": int((t - t.mean()).abs().argmin()),
        "d-min": int(t.argmin()),
    }
    collection = opened.inputs.collection
    texts, passages = collection.queries["train"], collection.passages
    rho_positive, rho = float(q[i] @ p[i]), (n @ q[i]).tolist()
    qid, positive, _ = batch[i]
    rows: list[dict[str, Any]] = [
        {"role": "q", "id": qid, "text": texts[qid]},
        {"role": "d+", "id": positive, "text": passages[positive], "rho": rho_positive},
    ]
    for role, j in picks.items():
        docid, target = batch[j][2], float(t[j])
        losses = {
            "loss_table": (rho_positive - rho[j] - target) ** 2,
            "loss_equation": (rho_positive - rho[i] - target) ** 2,
        }
        text = passages[docid]
        rows.append(
            {"role": role, "id": docid, "text": text, "rho": rho[j], "target": target} | losses
        )
    return pd.DataFrame(rows).assign(run_id=run.run_id, qid=qid)


def _first_batch(
    run: StoredRun[TrainingRun], opened: Opened
) -> tuple[list[tuple[str, str, str]], torch.Tensor, torch.Tensor, torch.Tensor]:
    """The first batch of a run, and its three columns embedded by the stored model."""
    config, collection = run.config, opened.inputs.collection
    model = run.model(opened.profile.device)
    order = seeded_order(len(opened.inputs.triples), config.seed)[: config.batch_size]
    batch = [collection.triples[int(i)] for i in order]
    columns = [
        ([collection.queries["train"][qid] for qid, _, _ in batch], config.query_length),
        ([collection.passages[docid] for _, docid, _ in batch], config.passage_length),
        ([collection.passages[docid] for _, _, docid in batch], config.passage_length),
    ]
    q, p, n = (
        torch.from_numpy(embed(model, tokenize(model, texts, length))) for texts, length in columns
    )
    return batch, q, p, n


def table3(opened: Opened) -> pd.DataFrame:
    """All encoders × targets × in-batch, ranked in full; TOST against the best of the encoder.

    Values, seconds and triples are means over the seeds of a row; ``run_id`` is the run of the
    first seed, and ``run_ids`` those of all, separated by spaces.
    """
    profile = opened.profile
    opened.runner.ensure(tuning_runs(opened.experiments, profile.encoders))
    stored = iter(opened.runner.ensure(opened.experiments.table3_runs()))
    rows = []
    for encoder in profile.encoders:
        seeds = profile.row_seeds(encoder)
        runs = {variant: [next(stored) for _ in seeds] for variant in VARIANTS}
        group = [_ranked(row, profile) for row in runs.values()]
        for ((target, in_batch), row), ranked in zip(runs.items(), group, strict=True):
            is_static = target == "static"
            sweep = _sweep_seconds(opened, encoder, in_batch) if is_static else 0.0
            epsilon = row[0].config.target if is_static else math.nan
            about = {"encoder": encoder, "target": target, "epsilon": epsilon, "in_batch": in_batch}
            about |= _cost(row, sweep)
            rows += [about | test for test in _tested(ranked, group, None, profile)]
    return pd.DataFrame(rows)[_TABLE3.split()]


def _sweep_seconds(opened: Opened, encoder: str, in_batch: bool) -> float:
    """Training time of the runs by which the ε of a static row is tuned, if it is not given."""
    runs = opened.runner.ensure(tuning_runs(opened.experiments, [encoder], [in_batch]))
    return float(sum(run.result["train_seconds"] for run in runs))


def _cost(runs: Sequence[StoredRun[Any]], sweep: float) -> dict[str, Any]:
    """Seconds and triples of a row, means over its runs, and the ids of these."""
    teacher = float(runs[0].result.get("teacher", {}).get("seconds", 0.0))
    return {
        "seconds": _mean(runs, "train_seconds") + teacher + sweep,
        "sweep_seconds": sweep,
        "teacher_seconds": teacher,
        "triples": _mean(runs, "triples"),
        "run_id": runs[0].run_id,
        "run_ids": " ".join(run.run_id for run in runs),
    }


def table4(opened: Opened) -> pd.DataFrame:
    """The reference encoder's rows next to baselines and external runs.

    TOST against the external TAS-B run, as in the paper, if there is one, else against the row of
    its configuration, else against the softmax loss, which is what most people would train with.
    ``seconds`` are of training, of tuned rows also of the sweep, and of MarginMSE rows also of the
    teacher's fine-tuning and scoring (``teacher_seconds``).
    """
    profile = opened.profile
    entries: list[tuple[dict[str, Any], _Ranked]] = []
    names = ("block", "loss", "sampling", "in_batch", "source")
    for *about, runs in _table4_rows(opened):
        sweep = 0.0
        if about[1] == TUNED:
            sweep = _sweep_seconds(opened, profile.reference_encoder, about[3] == "✓")
        row = dict(zip(names, about, strict=True)) | _cost(runs, sweep)
        entries.append((row, _ranked(runs, profile)))
    named = {(row["loss"], row["sampling"], row["in_batch"]): ranked for row, ranked in entries}
    own = named.get(("MarginMSE", "TAS-B, hard", "✗"), named[SOFTMAX, "Rand.", "✓"])
    for name, files in external_runs(opened.runner).items():
        values = ("supplied runs", name, "—", "—", f"supplied: {name}")
        row = dict.fromkeys(("seconds", "teacher_seconds", "triples"), math.nan)
        row |= dict.fromkeys(("run_id", "run_ids"), "") | dict(zip(names, values, strict=True))
        entries.append((row, _ranked_external(name, files, opened)))
    references = {ranked.run_id: ranked for _, ranked in entries}
    reference = references.get(f"supplied: {TAS_B}", own)
    rows = []
    for row, ranked in entries:
        group = [r for other, r in entries if other["block"] == row["block"]]
        tested = _tested(ranked, group, reference, profile, len(entries) - 1)
        rows += [row | test for test in tested]
    return pd.DataFrame(rows)[_TABLE4.split()]


def _table4_rows(opened: Opened) -> Iterator[tuple[Any, ...]]:
    """Block, loss, sampling, in-batch, source and runs, one for each seed, of each row."""
    e, profile, ensure = opened.experiments, opened.profile, opened.runner.ensure
    encoder, seeds = profile.reference_encoder, profile.row_seeds(profile.reference_encoder)
    ensure(tuning_runs(e, [encoder]))
    tuned_no, tuned_yes, adaptive_no, adaptive_yes, distributed = (
        ensure([e.variant_run(encoder, *v, seed) for seed in seeds]) for v in VARIANTS
    )
    yield "self-distillation", "Adaptive", "Rand.", "✗", "ours", adaptive_no
    yield "self-distillation", "Adaptive", "Rand.", "✓", "ours", adaptive_yes
    yield "self-distillation", "Distributed", "Rand.", "✓", "ours", distributed
    distilled, block = iter(ensure(teacher_runs(e))), "teacher distillation"
    for label, source in DISTILLED.values():
        for in_batch in ("✗", "✓") if profile.teacher else ():
            runs = [next(distilled) for _ in seeds]
            yield block, "MarginMSE", label, in_batch, f"as {source}", runs
    others = ensure(e.table4_runs())
    yield "no distillation", "BM25", "—", "—", "ours", ensure([e.bm25_run()])
    yield "no distillation", TUNED, "Rand.", "✗", "ours", tuned_no
    yield "no distillation", TUNED, "Rand.", "✓", "ours", tuned_yes
    yield "no distillation", "Static (ε = 1)", "Rand.", "✗", "ours", others[: len(seeds)]
    block = "not in the paper"
    yield block, SOFTMAX, "Rand.", "✓", block, others[len(seeds) :]
    yield block, "Zero-shot encoder", "—", "—", block, [_zero_shot(opened, encoder)]
    for name, settings in profile.untrained.items():
        kind = "as published" if settings.pooling == "own" else "zero-shot"
        label = f"{settings.label or name}, {kind}"
        yield block, label, "—", "—", block, [_zero_shot(opened, name)]


# --- tests --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Ranked:
    """Scores of full rankings by test set and seed; some scores of external runs are refused."""

    run_ids: tuple[str, ...]
    evaluations: Mapping[str, Sequence[Evaluation]]
    refused: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    missing: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def run_id(self) -> str:
        """The run of the first seed."""
        return self.run_ids[0]

    def mean(self, query_set: str, measure: str) -> float:
        """The mean score over the seeds; NaN if there is none."""
        found = [e.mean.get(measure, math.nan) for e in self.evaluations.get(query_set, ())]
        return sum(found) / len(found) if found else math.nan


def _ranked(runs: Sequence[StoredRun[Any]], profile: Profile) -> _Ranked:
    evaluations = {name: [r.evaluation("full", name) for r in runs] for name in profile.sets.tests}
    return _Ranked(tuple(run.run_id for run in runs), evaluations)


def _mean(runs: Sequence[StoredRun[Any]], value: str) -> float:
    """The mean of a number in result.json."""
    return float(sum(run.result[value] for run in runs)) / len(runs)


def external_runs(runner: Runner) -> dict[str, dict[str, Run]]:
    """Run files of other systems in ``supplied/SET/`` of the home folder, for the test sets."""
    folder, sets = runner.inputs.home / "supplied", runner.profile.sets.tests
    if not any((folder / name).is_dir() for name in sets):
        return {}  # if there are any, they belong to another profile
    return read_external_runs(folder, sets)


def _ranked_external(name: str, runs: Mapping[str, Run], opened: Opened) -> _Ranked:
    collection, measures = opened.inputs.collection, opened.profile.measures.full
    scored = {
        key: score(run, collection.qrels[key], measures, passages=len(collection.passages))
        for key, run in runs.items()
    }
    return _Ranked(
        (f"supplied: {name}",),
        {key: [s.evaluation] for key, s in scored.items()},
        {key: s.refused for key, s in scored.items()},
        {key: s.missing for key, s in scored.items()},
    )


def _tested(
    ranked: _Ranked,
    group: Sequence[_Ranked],
    reference: _Ranked | None,
    profile: Profile,
    comparisons: int | None = None,
) -> Iterator[dict[str, Any]]:
    """For each test set and measure: the value, whether it is the best of ``group``, and TOST.

    The test is against ``reference``, or, if that is None, against the best of the group.
    """
    count = comparisons or len(group) - 1
    for name in profile.sets.tests:
        for measure in profile.measures.full:
            means = [r.mean(name, measure) for r in group]
            best = group[int(np.nan_to_num(means, nan=-math.inf).argmax())]
            against, value = reference or best, ranked.mean(name, measure)
            yield {
                "set": name,
                "measure": measure,
                "value": value,
                "best": ranked.run_id == best.run_id and not math.isnan(value),
                "comparisons": count,
                "reference_run_id": against.run_id,
                "refused": ranked.refused.get(name, {}).get(measure, ""),
                "missing": ranked.missing.get(name, 0),
                **_tost(ranked, against, name, measure, count),
            }


def _tost(a: _Ranked, b: _Ranked, query_set: str, measure: str, count: int) -> dict[str, Any]:
    """TOST corrected for ``count`` comparisons, and the interval that decides it; else NaN."""
    numbers = dict.fromkeys(("difference", "low", "high", "p", "p_adjusted"), float("nan"))
    without = any(math.isnan(r.mean(query_set, measure)) for r in (a, b))
    if a.run_id == b.run_id or without:
        return {**numbers, "equivalent": False}
    x, y = ([e.per_query[measure] for e in r.evaluations[query_set]] for r in (a, b))
    found = compare(x, y, comparisons=count)
    _, low, high = paired_interval(x, y, confidence=1 - 2 * 0.05 / count)
    return {
        "difference": found.difference,
        "low": low,
        "high": high,
        "p": found.p_tost,
        "p_adjusted": min(1.0, found.p_tost * count),
        "equivalent": found.verdict == "equivalent",
    }


def _zero_shot(opened: Opened, encoder: str) -> StoredRun[Any]:
    return opened.runner.ensure([opened.experiments.zero_shot_run(encoder)])[0]


def _is_first_maximum(frame: pd.DataFrame, by: list[str]) -> pd.Series:
    """True in the first row of each group that has the group's largest value."""
    best = frame.groupby(by, sort=False)["value"].idxmax()
    return frame.index.to_series().isin(best)
