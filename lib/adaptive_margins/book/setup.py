"""The set-up of the experiments as a table: the paper's, and this run's."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd
from pandas.io.formats.style import Styler

from adaptive_margins.book.published import load
from adaptive_margins.book.style import encoder_label, measure_label
from adaptive_margins.paper import Reproduction
from adaptive_margins.profiles.config import CurveSettings, StaticSettings

OPTIMIZERS = {"adamw_torch_fused": "AdamW", "adamw_torch": "AdamW", "adamw_8bit": "8-bit AdamW"}


def setup(reproduction: Reproduction, *parts: str) -> Styler:
    """Parts of the set-up (keys of ``setup`` in ``published.yaml``): the paper's, and this run's.

    Raises:
        KeyError: an unknown part.
    """
    paper, here = load().setup, _setup(reproduction)
    rows = {part: (paper[part]["text"], here[part]) for part in parts}
    frame = pd.DataFrame.from_dict(rows, orient="index", columns=["Paper", "Here"])
    styler = frame.rename(index=lambda part: part.replace("_", " ").capitalize()).style
    caption = f"Set-up, profile {reproduction.profile.name}"
    return styler.format(escape="html").set_caption(caption).set_uuid("setup")


def _setup(reproduction: Reproduction) -> dict[str, str]:
    p, c = reproduction.profile, reproduction.inputs.collection
    t, s, comparison = p.training, p.static, p.comparison
    stopping = comparison.validation or p.sets.validation
    listed = "passages of BM25" if p.candidates.source == "bm25" else "official BM25 candidates"
    seeds = [
        f"{encoder_label(e)} with seeds {', '.join(map(str, dict.fromkeys([p.seed, *more])))}"
        for e, more in s.seeds.items()
    ]
    static = f"ε in {', '.join(f'{x:g}' for x in s.targets)}; {s.triples:,} triples per run"

    def queries(names: Iterable[str]) -> str:
        return "; ".join(f"{name}, {len(c.queries[name]):,} queries" for name in names)

    def measures(names: Iterable[str]) -> str:
        return ", ".join(map(measure_label, names))

    return {
        "collection": f"{c.name}, {len(c.passages):,} passages, {len(c.triples):,} triples",
        "encoders": "; ".join(
            f"{encoder_label(name)}: {e.label or e.base}" for name, e in p.encoders.items()
        ),
        "lengths": f"at most {p.lengths.query} tokens per query, {p.lengths.passage} per passage",
        "optimizer": f"{OPTIMIZERS[t.optimizer]}, {t.precision}, learning rate"
        f" {_rate(t.learning_rate)}, weight decay {t.weight_decay:g}, seed {p.seed}",
        "tuning": queries([p.sets.validation]),
        "tests": queries(p.sets.tests),
        "rerank": f"the first {p.candidates.depth} {listed} are reranked;"
        f" {measures(p.measures.rerank)}",
        "full": "every passage is ranked, by a FAISS index sized for the collection and exact"
        f" re-ranking, to depth {p.measures.full_depth}; {measures(p.measures.full)}",
        "static": "; ".join([f"{static}, batches of {s.batch_size}", *seeds]) + _own(s),
        "adaptive": _curve(p.adaptive, p.adaptive.batch_sizes[:1]),
        "distributed": _curve(p.distributed, p.distributed.batch_sizes),
        "target_plot": f"rolling mean over {p.target_plot.window} batches, the first and last"
        f" {p.target_plot.span} batches",
        "comparison": f"{_curve(comparison, comparison.batch_sizes[:1])}, decay γ ="
        f" {comparison.decay:g} per step; early stopping after {comparison.patience} evaluations"
        f" without a gain in {measure_label(p.measures.selection)} on {stopping};"
        f" {comparison.keep} checkpoint",
        "reference": f"{encoder_label(p.reference_encoder)}; † against the underlined run",
    }


def _curve(experiment: CurveSettings, batch_sizes: Iterable[int]) -> str:
    every = (
        f"every {experiment.evaluate_every:,} triples"
        if experiment.evaluate_every
        else f"every {experiment.evaluate_every_steps:,} steps"
    )
    triples = "all" if experiment.triples is None else f"{experiment.triples:,}"
    sizes = " and ".join(map(str, batch_sizes))
    return f"{triples} triples per run, batches of {sizes}, evaluated {every}{_own(experiment)}"


def _own(experiment: StaticSettings | CurveSettings) -> str:
    """The learning rate and the seed of an experiment, where they are not the profile's."""
    rate, seed = experiment.learning_rate, experiment.seed
    text = "" if rate is None else f"; learning rate {_rate(rate)}"
    return text + ("" if seed is None else f"; seed {seed}")


def _rate(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"
