"""Which runs the figures and tables of the paper need."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from typing import Any

from adaptive_margins.paper.inputs import Inputs
from adaptive_margins.paper.store import Store, StoreError
from adaptive_margins.paper.teacher import teacher_of
from adaptive_margins.profiles.config import ROWS, CurveSettings, StaticSettings
from adaptive_margins.runs import BM25Run, RunConfig, TrainingRun, ZeroShotRun

VARIANTS = tuple((row.removesuffix(" in-batch"), row.endswith("in-batch")) for row in ROWS)
"""The five rows per encoder of Table 3: target and in-batch negatives."""

DISTILLED = {
    "random": ("Rand.", "Hofstätter et al., Wang and Zuccon"),
    "topics-balanced": ("TAS-B", "Hofstätter et al."),
    "topics-hard": ("TAS-B, hard", "Wang and Zuccon"),
}
"""Samplings of the MarginMSE rows of Table 4: label, and source of the published rows. Those with
random batches are one configuration here, for both sources."""


class Experiments:
    """The runs of a profile as configurations. The margin ε of Table 3 is read from stored runs."""

    def __init__(self, inputs: Inputs, store: Store) -> None:
        self.inputs = inputs
        self.profile = inputs.profile
        self.store = store

    # ---- one run -------------------------------------------------------------------------------

    def bm25_run(self) -> BM25Run:
        """BM25's order of the candidates, and of all passages."""
        version = f"bm25s {importlib.metadata.version('bm25s')} lucene"
        sets = tuple(self.inputs.evaluated_sets)
        return BM25Run(**self._common(), **self.full_ranking(), version=version, rerank_sets=sets)

    def zero_shot_run(self, encoder: str) -> ZeroShotRun:
        """The pretrained encoder: step 0 of all its training runs."""
        return ZeroShotRun(**self._encoder_values(encoder), **self.full_ranking())

    def training_run(self, encoder: str, **values: Any) -> TrainingRun:
        """A training run with the profile's values, and ``values`` (fields of TrainingRun) instead.

        A learning rate "X/B" is divided by the batch size.
        """
        p, t = self.profile, self.profile.training
        size = values.setdefault("batch_size", p.static.batch_size)
        rate = values.pop("learning_rate", t.learning_rate)
        if isinstance(rate, str):
            rate = float(rate.removesuffix("/B")) / size
        same = {"orientation", "weight_decay", "optimizer", "dropout", "chunks"}
        defaults = {
            **t.model_dump(include=same),
            "decay": 1.0,
            "seed": p.seed,
            "evaluate_every": 0,
            "patience": 0,
            "keep": "last",
            "selection": p.measures.selection,
        }
        values = {**self._encoder_values(encoder), **defaults, **values, "learning_rate": rate}
        return TrainingRun.model_validate(values)

    def static_run(
        self, encoder: str, target: float, in_batch: bool, seed: int | None = None
    ) -> TrainingRun:
        """Section 5.1: a point of Figure 3."""
        s = self.profile.static
        values = {**_overrides(s, seed), "batch_size": s.batch_size, "triples": s.triples}
        return self.training_run(encoder, target=target, in_batch=in_batch, **values)

    def curve_run(
        self,
        encoder: str,
        target: float | str | None,
        in_batch: bool = False,
        batch_size: int | None = None,
        **values: Any,
    ) -> TrainingRun:
        """Sections 5.2 and 5.3: a line of Figure 4 or 5; or another run with these settings.

        The batch size is by default that of Figure 4, or the last one of Figure 5.
        """
        s, default = self.profile.distributed, -1
        if target == "adaptive":
            s, default = self.profile.adaptive, 0
        common = {**_overrides(s), **self._curve(s, batch_size or s.batch_sizes[default])}
        loss = {"target": target, "in_batch": in_batch, "keep": "best"}
        return self.training_run(encoder, **{**common, **loss, **values})

    def comparison_run(self, encoder: str, **values: Any) -> TrainingRun:
        """Section 5.4: with decay and early stopping, and ranked in full."""
        s = self.profile.comparison
        own = s.model_dump(include={"patience", "stop_early", "keep"})
        own["validation"] = s.validation or self.profile.sets.validation
        common = {**self._curve(s, s.batch_sizes[0]), **_overrides(s), **self.full_ranking()}
        return self.training_run(encoder, **{**own, **common, **values})

    def variant_run(
        self, encoder: str, target: float | str, in_batch: bool, seed: int | None = None
    ) -> TrainingRun:
        """A row of Table 3 with one seed, by default the first.

        A static row has the ε ``target``; with "static" the tuned one, which needs the runs of
        Figure 3 (else StoreError).
        """
        row = target if isinstance(target, str) else "static"
        if target == "static":
            target = self.tuned_target(encoder, in_batch)
        first, *_ = self.profile.row_seeds(encoder)
        seed = first if seed is None else seed
        reference = encoder == self.profile.reference_encoder and seed == first
        save = reference and target == "distributed"
        budget = self.profile.comparison.budgets.get(row + " in-batch" * in_batch)
        budgets = {"triples": budget} if budget else {}
        return self.comparison_run(
            encoder, target=target, in_batch=in_batch, seed=seed, save_model=save, **budgets
        )

    def tuned_target(self, encoder: str, in_batch: bool) -> float:
        """The profile's ε (``static.tuned``), else that of Figure 3 with the best validation score,
        the smallest of equals.
        """
        if encoder in (fixed := self.profile.static.tuned):
            return fixed[encoder][in_batch]
        name, measure = self.profile.sets.validation, self.profile.measures.selection
        configs, means = tuning_runs(self, [encoder], [in_batch]), {}
        for target, config in zip(self.profile.static.targets, configs, strict=True):
            means[target] = self.store.get(config).evaluation("rerank", name).mean[measure]
        return max(means, key=lambda target: (means[target], -target))

    # ---- the runs of a figure or table ---------------------------------------------------------

    def figure3_runs(self) -> list[TrainingRun]:
        """Static targets: ε × in-batch × encoders, with the further seeds."""
        s = self.profile.static
        return [
            self.static_run(e, target, in_batch, seed)
            for e in self.profile.encoders
            if e not in s.tuned
            for in_batch in (False, True)
            for seed in self.profile.static_seeds(e)
            for target in s.targets
        ]

    def shown_by(self, lines: Sequence[TrainingRun]) -> list[TrainingRun]:
        """For each line the run of Table 3 or 4 with the same curve to its end, else the line."""
        if self.profile.comparison.stop_early:
            return list(lines)
        beside = {*("patience", "stop_early", "keep", "save_model"), *self.full_ranking()}
        rows = [*_rows(self, VARIANTS[2:]), *self.table4_runs()]
        by_curve = {row.model_dump_json(exclude=beside): row for row in reversed(rows)}
        return [by_curve.get(line.model_dump_json(exclude=beside), line) for line in lines]

    def figure4_runs(self) -> list[TrainingRun]:
        """Adaptive targets with and without in-batch negatives."""
        encoders = self.profile.encoders
        if self.profile.tables_only:
            return [self.variant_run(e, *row) for e, row in product(encoders, VARIANTS[2:4])]
        settings = product(encoders, (False, True))
        return self.shown_by([self.curve_run(e, "adaptive", b) for e, b in settings])

    def figure5_runs(self) -> list[TrainingRun]:
        """Distributed targets by batch size."""
        if self.profile.tables_only:
            return [self.variant_run(e, *VARIANTS[4]) for e in self.profile.encoders]
        settings = product(self.profile.encoders, self.profile.distributed.batch_sizes)
        return self.shown_by([self.curve_run(e, "distributed", False, n) for e, n in settings])

    def table3_runs(self) -> list[TrainingRun]:
        """Five rows per encoder, each with its seeds.

        StoreError as long as the runs of Figure 3 are missing.
        """
        return _rows(self, VARIANTS)

    def table4_runs(self) -> list[TrainingRun]:
        """The rows of Table 4 that Table 3 has not: ε = 1 and the softmax loss."""
        e = self.profile.reference_encoder
        losses: tuple[dict[str, Any], ...] = (
            {"target": 1.0, "in_batch": False},
            {"loss": "softmax", "target": None, "in_batch": True},
        )
        settings = product(losses, self.profile.row_seeds(e))
        return [self.comparison_run(e, seed=seed, **loss) for loss, seed in settings]

    # ---- values --------------------------------------------------------------------------------

    def _common(self) -> dict[str, Any]:
        p = self.profile
        return {
            "collection": self.inputs.fingerprint,
            "candidates": p.candidates.source,
            "depth": p.candidates.depth,
            "validation": p.sets.validation,
            "rerank_measures": p.measures.rerank,
        }

    def full_ranking(self) -> dict[str, Any]:
        """The fields of a run that is ranked in full on the test sets."""
        measures = self.profile.measures
        return {
            "test_sets": self.profile.sets.tests,
            "full_measures": measures.full,
            "full_depth": measures.full_depth,
        }

    def _encoder_values(self, encoder: str) -> dict[str, Any]:
        settings, p = self.inputs.settings(encoder), self.profile
        return {
            **self._common(),
            "encoder": encoder,
            "weights": self.inputs.weights(encoder),
            **settings.model_dump(include={"pooling", "layers", "trained_layers"}),
            "query_length": p.lengths.query,
            "passage_length": p.lengths.passage,
            "precision": p.training.precision,
        }

    def _curve(self, settings: CurveSettings, batch_size: int) -> dict[str, Any]:
        return {
            "batch_size": batch_size,
            "triples": settings.triples or self.inputs.triples_count,
            "evaluate_every": max(settings.check_steps(batch_size), 1),
            "decay": settings.decay,
        }


def tuning_runs(
    experiments: Experiments, encoders: Iterable[str], in_batch: Iterable[bool] = (False, True)
) -> list[TrainingRun]:
    """The runs of Figure 3 by which ε is tuned; none of an encoder whose ε the profile gives."""
    static = experiments.profile.static
    untuned = [name for name in encoders if name not in static.tuned]
    settings = product(untuned, in_batch, static.targets)
    return [experiments.static_run(name, target, other) for name, other, target in settings]


def teacher_runs(experiments: Experiments) -> list[TrainingRun]:
    """The MarginMSE rows of Table 4, each with its seeds; none without a teacher."""
    profile, teacher = experiments.profile, teacher_of(experiments.inputs)
    if teacher is None:
        return []
    e = profile.reference_encoder
    loss = {"loss": "margin-mse", "target": None, "teacher": teacher.identity}
    loss["similarity"] = teacher.settings.similarity
    return [
        experiments.comparison_run(e, seed=seed, sampling=sampling, in_batch=in_batch, **loss)
        for sampling, in_batch, seed in product(DISTILLED, (False, True), profile.row_seeds(e))
    ]


def fixed_runs(experiments: Experiments) -> list[RunConfig]:
    """All runs that are known before Figure 3 decides about the ε of Table 3."""
    e = experiments
    curves = [*e.figure3_runs(), *e.figure4_runs(), *e.figure5_runs()]
    rows = [*_rows(e, VARIANTS[2:]), *e.table4_runs(), *teacher_runs(e)]
    return [*baseline_runs(e), *curves, *rows]


def baseline_runs(experiments: Experiments) -> list[BM25Run | ZeroShotRun]:
    """BM25 and all zero-shot encoders."""
    e = experiments
    encoders = [*e.profile.encoders, *e.profile.untrained]
    return [e.bm25_run(), *(e.zero_shot_run(name) for name in encoders)]


def _rows(experiments: Experiments, variants: Sequence[tuple[str, bool]]) -> list[TrainingRun]:
    """Rows of Table 3 with their seeds; all but the first two variants need no runs of Figure 3."""
    encoders, seeds = experiments.profile.encoders, experiments.profile.row_seeds
    settings = ((e, *v, seed) for e in encoders for v in variants for seed in seeds(e))
    return [experiments.variant_run(*setting) for setting in settings]


def static_rows(experiments: Experiments) -> dict[tuple[str, bool], list[TrainingRun]]:
    """Table 3's static rows by encoder and in-batch, with each ε that Figure 3 may decide for."""
    e, static, found = experiments, experiments.profile.static, {}
    for name, in_batch in product(e.profile.encoders, (False, True)):
        targets = (static.tuned[name][in_batch],) if name in static.tuned else static.targets
        found[name, in_batch] = [
            e.variant_run(name, target, in_batch, seed)
            for target in targets
            for seed in e.profile.row_seeds(name)
        ]
    return found


def find_run(
    experiments: Experiments, run_id: str, ensure: Callable[[list[TrainingRun]], Any]
) -> RunConfig:
    """The run of an id, or of its beginning.

    For a static row of Table 3, ``ensure`` is called with the runs by which its ε is tuned.

    Raises:
        StoreError: no run of the profile, or more than one, has an id that begins so.
    """
    found = [c for c in dict.fromkeys(fixed_runs(experiments)) if c.run_id.startswith(run_id)]
    for (encoder, in_batch), rows in static_rows(experiments).items() if not found else ():
        if tunable := [c for c in rows if c.run_id.startswith(run_id)]:
            ensure(tuning_runs(experiments, [encoder], [in_batch]))
            tuned = experiments.tuned_target(encoder, in_batch)
            found += [c for c in tunable if c.target == tuned]
    if len(found) > 1:
        raise StoreError(f"{len(found)} runs begin with {run_id!r}; give more of the id")
    if not found:
        raise StoreError(
            f"profile {experiments.profile.name!r} has no run {run_id!r} with this collection,"
            " these encoders and this version; `adaptive-margins plan --every` lists the runs"
        )
    return found[0]


def _overrides(
    experiment: StaticSettings | CurveSettings, seed: int | None = None
) -> dict[str, Any]:
    """The values an experiment has instead of the profile's."""
    seed = experiment.seed if seed is None else seed
    values = {"learning_rate": experiment.learning_rate, "seed": seed}
    return {key: value for key, value in values.items() if value is not None}
