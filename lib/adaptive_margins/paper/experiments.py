"""Which runs each figure and table of the paper needs, as data; and what they show.

A `Reproduction` is a profile with its collection. Each of its methods ``figure3`` … ``table4`` asks the store for the runs it
needs, makes those that are missing, and returns what the figure or table shows, as a long data frame with run ids.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from sentence_transformers import SentenceTransformer

from adaptive_margins.data.stored import seeded_order
from adaptive_margins.encoder.embed import embed
from adaptive_margins.encoder.tokens import tokenize
from adaptive_margins.evaluation.external_runs import Supplied, read_supplied, score
from adaptive_margins.evaluation.measures import Evaluation
from adaptive_margins.evaluation.significance import compare, paired_interval
from adaptive_margins.files import folder_bytes
from adaptive_margins.losses import margin_loss
from adaptive_margins.paper.runner import Runs, describe
from adaptive_margins.paper.store import StoredRun, StoreError
from adaptive_margins.profiles.config import CurveSettings, Profile, StaticSettings, load_profile
from adaptive_margins.progress import clock, say
from adaptive_margins.runs import BM25_NAME, RunConfig, TrainingRun

__all__ = ["BM25_NAME", "VARIANTS", "Plan", "Reproduction", "describe"]

VARIANTS = (
    ("static", False),
    ("static", True),
    ("adaptive", False),
    ("adaptive", True),
    ("distributed", False),
)
"""The five rows per encoder of Table 3: target and in-batch negatives."""


TAS_B = "wang-zuccon-tas-b"
"""The supplied run that the paper's Table 4 tests against (underlined there), by its key in ``book/printed/table4.csv``."""


class Reproduction(Runs):
    """One profile, its collection, its runs, and what they show."""

    @classmethod
    def open(
        cls, profile: str | Path = "laptop", folder: Path | None = None, **overrides: Any
    ) -> Reproduction:
        """Open a profile by name or YAML path; ``overrides`` as in `profiles.config.load_profile`."""
        return cls(load_profile(profile, **overrides), folder)

    # ---- configurations --------------------------------------------------------------------------------------------

    def static_run(
        self, encoder: str, target: float, in_batch: bool, seed: int | None = None
    ) -> TrainingRun:
        """Section 5.1: one point of Figure 3."""
        s = self.profile.static
        own = _own(s) if seed is None else {**_own(s), "seed": seed}
        return self.training_run(
            encoder, target=target, in_batch=in_batch, batch_size=s.batch_size, triples=s.triples, **own
        )  # fmt: skip

    def curve_run(self, encoder: str, target: str, in_batch: bool, batch_size: int) -> TrainingRun:
        """Sections 5.2 and 5.3: one line of Figure 4 or 5."""
        s = self.profile.adaptive if target == "adaptive" else self.profile.distributed
        return self.training_run(
            encoder, target=target, in_batch=in_batch, batch_size=batch_size, keep="best",
            triples=s.triples or self.triples_count,
            evaluate_every=s.check_steps(batch_size), **_own(s),
        )  # fmt: skip

    def comparison_run(self, encoder: str, **values: Any) -> TrainingRun:
        """Section 5.4: with decay and early stopping, best step kept, ranked in full."""
        s = self.profile.comparison
        size = s.batch_sizes[0]
        return self.training_run(
            encoder, **{
                "batch_size": size, "triples": s.triples or self.triples_count,
                "decay": s.decay, "patience": s.patience, "keep": s.keep,
                "validation": s.validation or self.profile.sets.validation, "evaluate_every": s.check_steps(size),
                **_own(s), **self._full, **values,
            },
        )  # fmt: skip

    def figure3_runs(self) -> list[TrainingRun]:
        """ε × in-batch × encoders, and the further seeds."""
        s = self.profile.static
        first = self.profile.seed if s.seed is None else s.seed
        seeds = {
            e: [first, *(x for x in s.seeds.get(e, ()) if x != first)]
            for e in self.profile.encoders
        }
        return [
            self.static_run(e, target, in_batch, seed)
            for e in self.profile.encoders
            for in_batch in (False, True)
            for seed in seeds[e]
            for target in s.targets
        ]

    def figure4_runs(self) -> list[TrainingRun]:
        """Adaptive targets with and without in-batch negatives."""
        return [
            self.curve_run(e, "adaptive", in_batch, self.profile.adaptive.batch_sizes[0])
            for e in self.profile.encoders
            for in_batch in (False, True)
        ]

    def figure5_runs(self) -> list[TrainingRun]:
        """Distributed targets by batch size."""
        return [
            self.curve_run(e, "distributed", False, size)
            for e in self.profile.encoders
            for size in self.profile.distributed.batch_sizes
        ]

    def tuned_target(self, encoder: str, in_batch: bool) -> float:
        """The ε of Figure 3 with the best selection measure on validation (the smallest of equals)."""
        measure = self.profile.measures.selection
        runs = {
            t: self.store.get(self.static_run(encoder, t, in_batch))
            for t in self.profile.static.targets
        }
        means = {
            t: r.evaluation("rerank", self.profile.sets.validation).mean[measure]
            for t, r in runs.items()
        }
        return max(means, key=lambda t: (means[t], -t))

    def variant_run(self, encoder: str, target: str, in_batch: bool) -> TrainingRun:
        """A row of Table 3; a static row needs Figure 3's runs."""
        value: float | str = self.tuned_target(encoder, in_batch) if target == "static" else target
        save = encoder == self.profile.reference_encoder and target == "distributed"
        return self.comparison_run(encoder, target=value, in_batch=in_batch, save_model=save)

    def table3_runs(self) -> list[TrainingRun]:
        """Five rows per encoder."""
        return [
            self.variant_run(e, *variant) for e in self.profile.encoders for variant in VARIANTS
        ]

    def table4_runs(self) -> list[TrainingRun]:
        """What Table 4 needs beyond Table 3: ε = 1 and the softmax loss, trained alike."""
        e = self.profile.reference_encoder
        return [
            self.comparison_run(e, target=1.0, in_batch=False),
            self.comparison_run(e, loss="softmax", target=None, in_batch=True),
        ]

    def baseline_runs(self) -> list[RunConfig]:
        """BM25 and every encoder as it comes."""
        encoders = [*self.profile.encoders, *self.profile.untrained]
        return [self.bm25_run(), *(self.zero_shot_run(e) for e in encoders)]

    # ---- all runs --------------------------------------------------------------------------------------------------

    def known_runs(self) -> list[RunConfig]:
        """The runs that are known beforehand: starts, figures, and the tables' rows that no ε is tuned for."""
        fixed = [self.variant_run(*variant) for variant in self._variants(static=False)]
        figures = [*self.figure3_runs(), *self.figure4_runs(), *self.figure5_runs()]
        return [*self.baseline_runs(), *figures, *fixed, *self.table4_runs()]

    def tuned_runs(self) -> list[TrainingRun]:
        """Table 3's rows with the ε that Figure 3 finds; StoreError as long as Figure 3's runs are missing."""
        return [self.variant_run(*variant) for variant in self._variants(static=True)]

    def _tunable_runs(self) -> list[TrainingRun]:
        """Table 3's static rows with each ε that Figure 3 may find."""
        return [
            self.comparison_run(encoder, target=target, in_batch=in_batch)
            for encoder, _, in_batch in self._variants(static=True)
            for target in self.profile.static.targets
        ]

    def _variants(self, static: bool) -> list[tuple[str, str, bool]]:
        """Encoder, target and in-batch of those rows of Table 3 whose target is static, or of the others."""
        return [
            (e, target, in_batch)
            for e in self.profile.encoders
            for target, in_batch in VARIANTS
            if (target == "static") == static
        ]

    def run_all(self) -> None:
        """Make every run of the profile that is not in the store."""
        self.announce()
        with self._workers() as pool:
            self._make(self.known_runs(), pool)
            self._make(self.tuned_runs(), pool)

    def run_one(self, run_id: str) -> StoredRun:
        """Make the run of an id (or the beginning of one, if only one run begins so), with what it needs before it.

        Raises StoreError if no run of the profile has it.
        """
        known = dict.fromkeys(self.known_runs())
        found = [c for c in known if c.run_id.startswith(run_id)]
        if not found and any(c.run_id.startswith(run_id) for c in self._tunable_runs()):
            self.ensure(self.figure3_runs())
            found = [c for c in self.tuned_runs() if c.run_id.startswith(run_id)]
        if len(found) > 1:
            raise StoreError(f"{len(found)} runs begin with {run_id!r}; give more of the id")
        if found:
            trained = isinstance(found[0], TrainingRun)
            starts = [self.zero_shot_run(found[0].encoder)] if trained else []
            return self.ensure([*starts, *found])[-1]
        raise StoreError(
            f"profile {self.profile.name!r} has no run {run_id!r} with this collection, these encoders and this version;"
            " `adaptive-margins plan` lists the runs"
        )

    def announce(self) -> None:
        """Say how many runs are missing and how long they will take."""
        plan = self.plan()
        todo = plan.runs[~plan.runs["done"]]
        name, total = self.profile.name, len(plan.runs)
        if todo.empty:
            say(f"profile {name}: all {total} runs are there")
            return
        say(f"profile {name}: {total - len(todo)} of {total} runs are there; to be made:")
        for (encoder, what), group in todo.groupby(["encoder", "what"], sort=False):
            say(f"  {len(group):3d} × {group['seconds'].mean():6.1f} s  {encoder} {what}")
        say(
            f"  {len(todo):3d} runs, about {clock(plan.seconds)} with {self.profile.workers} workers"
        )

    def plan(self) -> Plan:
        """Every run with what it costs; nothing is fetched, and no run is made.

        Static rows of Table 3 stand for any ε as long as Figure 3's runs are missing.
        """
        if self.is_at_hand:
            return self._plan()
        without = type(self)(self.profile, self.home)
        without.fingerprint = "0" * 16  # none yet, so no run of it is done
        return without._plan()

    def _plan(self) -> Plan:
        rows = self.known_runs()
        for encoder, target, in_batch in self._variants(static=True):
            try:
                rows.append(self.variant_run(encoder, target, in_batch))
            except StoreError:  # ε is not known before Figure 3 is
                rows.append(self.comparison_run(encoder, target=0.0, in_batch=in_batch))
        frame = pd.DataFrame(
            {
                "run_id": c.run_id,
                "encoder": c.encoder,
                "what": describe(c, with_target=False),
                "triples": getattr(c, "triples", 0),
                "done": (done := self.store.has(c)),
                "seconds": 0.0 if done else self.expected_seconds(c),
                "disk": folder_bytes(self.store.path(c)) if done else self.disk_bytes(c),
                "scratch": 0 if done else self.scratch_bytes(c),
                "memory": 0 if done else self.memory_bytes(c),
            }
            for c in dict.fromkeys(rows)  # ε = 1 may be the tuned one
        )
        encoders = [*self.profile.encoders, *self.profile.untrained]
        measured = {e: self.speed(e).measured for e in encoders} if not frame["done"].all() else {}
        return Plan(
            runs=frame,
            seconds=float(frame["seconds"].sum()) / self.profile.workers,
            downloads=self.downloads(),
            shared_disk=self.shared_bytes(),
            stated=[e for e, was in measured.items() if not was],
        )

    # ---- what is shown ---------------------------------------------------------------------------------------------

    def table1(self) -> pd.DataFrame:
        """Encoders: parameters, embedding, dimensions."""
        rows = []
        for name, settings in self.profile.encoders.items():
            run = self.ensure([self.zero_shot_run(name)])[0]
            whole, model = self.encoder(name).whole, self.encoder(name).model
            rows.append(
                {
                    "encoder": name,
                    "base": settings.label or settings.base,
                    "parameters": sum(p.numel() for p in whole.parameters()),
                    "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
                    "embedding": _EMBEDDING[settings.pooling],
                    "dimensions": whole.get_embedding_dimension(),
                    "run_id": run.run_id,
                }
            )
        return pd.DataFrame(rows)

    def figure3(self) -> pd.DataFrame:
        """Static targets: a row per ε, seed and measure, on the validation set after the last step."""
        starts = {e: self.ensure([self.zero_shot_run(e)])[0] for e in self.profile.encoders}
        rows = []
        for run in self.ensure(self.figure3_runs()):
            c = run.config
            start = starts[c.encoder]
            before = start.evaluation("rerank", c.validation).mean
            for measure, value in run.evaluation("rerank", c.validation).mean.items():
                rows.append(
                    {
                        "encoder": c.encoder, "in_batch": c.in_batch, "target": c.target, "seed": c.seed, "measure": measure,
                        "value": value, "start": before[measure], "run_id": run.run_id, "start_run_id": start.run_id,
                    }
                )  # fmt: skip
        frame = pd.DataFrame(rows)
        frame.insert(
            7,
            "maximum",
            _is_first_maximum(frame, ["encoder", "in_batch", "seed", "measure"])
            & (frame["seed"] == self.profile.seed),
        )
        return frame

    def figure4(self) -> pd.DataFrame:
        """Adaptive targets: learning curves on the validation set."""
        return self._curves(self.figure4_runs())

    def figure5(self) -> pd.DataFrame:
        """Distributed targets: learning curves by batch size."""
        return self._curves(self.figure5_runs())

    def _curves(self, configs: Sequence[TrainingRun]) -> pd.DataFrame:
        frames = []
        for run in self.ensure(configs):
            c = run.config
            long = run.curve.melt(["step", "triples"], list(c.rerank_measures), "measure", "value")
            frames.append(
                long.assign(
                    encoder=c.encoder,
                    in_batch=c.in_batch,
                    batch_size=c.batch_size,
                    seed=c.seed,
                    run_id=run.run_id,
                )
            )
        frame = pd.concat(frames, ignore_index=True)
        frame["maximum"] = _is_first_maximum(frame, ["run_id", "measure"])
        columns = [
            "encoder",
            "in_batch",
            "batch_size",
            "seed",
            "step",
            "triples",
            "measure",
            "value",
            "maximum",
            "run_id",
        ]
        return frame[columns]

    def gains(self, configs: Sequence[TrainingRun] | None = None) -> pd.DataFrame:
        """Best step against step 0 on validation, with a paired 95 % t interval, for Figures 4 and 5 (or ``configs``)."""
        rows = []
        for run in self.ensure(configs or [*self.figure4_runs(), *self.figure5_runs()]):
            c = run.config
            start = self.ensure([self.zero_shot_run(c.encoder)])[0].evaluation(
                "rerank", c.validation
            )
            kept = run.evaluation("rerank", c.validation)
            for measure in c.rerank_measures:
                difference, low, high = paired_interval(
                    kept.per_query[measure], start.per_query[measure]
                )
                rows.append(
                    {
                        "encoder": c.encoder, "loss": c.target, "in_batch": c.in_batch, "batch_size": c.batch_size,
                        "measure": measure, "start": start.mean[measure], "best": kept.mean[measure],
                        "difference": difference, "low": low, "high": high, "step": run.result["kept_step"],
                        "run_id": run.run_id,
                    }
                )  # fmt: skip
        return pd.DataFrame(rows)

    def figure6(self) -> pd.DataFrame:
        """Distribution of raw φ(d⁺, d⁻) over training, smoothed; first and last batches of Figure 5's largest batch size."""
        window, span = self.profile.target_plot.window, self.profile.target_plot.span
        size = max(self.profile.distributed.batch_sizes)
        frames = []
        for run in self.ensure([c for c in self.figure5_runs() if c.batch_size == size]):
            smooth = run.targets[["mean", "min", "max"]].rolling(window, min_periods=1).mean()
            smooth.insert(0, "step", run.targets["step"])
            for part, rows in (("first", smooth.head(span)), ("last", smooth.tail(span))):
                frames.append(
                    rows.assign(
                        encoder=run.config.encoder,
                        batch_size=size,
                        part=part,
                        window=window,
                        span=len(rows),
                        run_id=run.run_id,
                    )
                )
        columns = [
            "encoder",
            "batch_size",
            "part",
            "step",
            "mean",
            "min",
            "max",
            "window",
            "span",
            "run_id",
        ]
        return pd.concat(frames, ignore_index=True)[columns]

    def table2(self) -> pd.DataFrame:
        """A training instance under the fine-tuned reference encoder: its highest, middle and lowest target.

        From the first training batch, the query whose targets T[i, :] are spread widest; ρ = φ(q_i, ·), t = T[i, j].
        ``loss_table`` is what the paper's Table 2 shows, (ρ(d⁺) − ρ(d⁻_j) − t)²; ``loss_equation`` is Eq. 3 squared.
        """
        self.ensure([c for c in self.figure3_runs() if c.encoder == self.profile.reference_encoder])
        config = self.variant_run(self.profile.reference_encoder, "distributed", False)
        run = self.ensure([config])[0]
        model = SentenceTransformer(str(run.path / "model"), device=self.profile.device)
        order = seeded_order(len(self.triples), config.seed)[: config.batch_size]
        batch = [self.collection.triples[int(i)] for i in order]
        texts, passages = self.collection.queries["train"], self.collection.passages
        q, p, n = (
            torch.from_numpy(embed(model, tokenize(model, column, length)))
            for column, length in (
                ([texts[b[0]] for b in batch], config.query_length),
                ([passages[b[1]] for b in batch], config.passage_length),
                ([passages[b[2]] for b in batch], config.passage_length),
            )
        )
        _, targets = margin_loss(q, p, n, target="distributed", return_targets=True)
        i = int((targets.max(1).values - targets.min(1).values).argmax())
        t = targets[i]
        picks = {
            "d-max": int(t.argmax()),
            "d-mid": int((t - t.mean()).abs().argmin()),
            "d-min": int(t.argmin()),
        }
        rho_positive, rho = float(q[i] @ p[i]), (n @ q[i]).tolist()
        rows: list[dict[str, Any]] = [
            {"role": "q", "id": batch[i][0], "text": texts[batch[i][0]]},
            {"role": "d+", "id": batch[i][1], "text": passages[batch[i][1]], "rho": rho_positive},
        ]
        for role, j in picks.items():
            target = float(t[j])
            rows.append(
                {
                    "role": role, "id": batch[j][2], "text": passages[batch[j][2]], "rho": rho[j], "target": target,
                    "loss_table": (rho_positive - rho[j] - target) ** 2,
                    "loss_equation": (rho_positive - rho[i] - target) ** 2,
                }
            )  # fmt: skip
        columns = ["role", "id", "text", "rho", "target", "loss_table", "loss_equation"]
        return pd.DataFrame(rows, columns=columns).assign(run_id=run.run_id, qid=batch[i][0])

    def table3(self) -> pd.DataFrame:
        """Every encoder × target × in-batch, ranked in full; TOST against the best per encoder, set and measure."""
        self.ensure(self.figure3_runs())
        runs = dict(
            zip(
                ((e, *v) for e in self.profile.encoders for v in VARIANTS),
                self.ensure(self.table3_runs()),
                strict=True,
            )
        )
        rows = []
        ranked = {key: _ranked(run, self.profile) for key, run in runs.items()}
        for (encoder, target, in_batch), run in runs.items():
            sweep = self._sweep_seconds(encoder, in_batch) if target == "static" else 0.0
            siblings = [r for (e, _, _), r in ranked.items() if e == encoder]
            for row in _compare(ranked[encoder, target, in_batch], siblings, None, self.profile):
                rows.append(
                    {
                        "encoder": encoder, "target": target,
                        "epsilon": run.config.target if target == "static" else float("nan"), "in_batch": in_batch,
                        "seconds": run.result["train_seconds"] + sweep, "sweep_seconds": sweep,
                        "triples": run.result["triples"], "run_id": run.run_id, **row,
                    }
                )  # fmt: skip
        columns = [
            "encoder", "target", "epsilon", "in_batch", "set", "measure", "value", "best", "difference", "low", "high", "p",
            "p_adjusted", "comparisons", "equivalent", "seconds", "sweep_seconds", "triples", "run_id", "reference_run_id",
        ]  # fmt: skip
        return pd.DataFrame(rows)[columns]

    def _sweep_seconds(self, encoder: str, in_batch: bool) -> float:
        """Training time of the ε grid that a static row was tuned on."""
        return float(
            sum(
                self.store.get(self.static_run(encoder, t, in_batch)).result["train_seconds"]
                for t in self.profile.static.targets
            )
        )

    def supplied(self) -> dict[str, dict[str, Supplied]]:
        """Run files of others in ``supplied/SET/`` of the home folder, for this profile's test sets; see `supplied`."""
        folder, sets = self.home / "supplied", self.profile.sets.tests
        if not any((folder / name).is_dir() for name in sets):
            return {}  # they belong to another profile, if there are any
        return read_supplied(folder, sets)

    def _ranked_supplied(self, name: str, runs: Mapping[str, Supplied]) -> _Ranked:
        measures, passages = self.profile.measures.full, len(self.collection.passages)
        scored = {
            key: score(one.run, self.collection.qrels[key], measures, passages=passages)
            for key, one in runs.items()
        }
        return _Ranked(
            f"supplied: {name}",
            {key: s.evaluation for key, s in scored.items()},
            {key: s.refused for key, s in scored.items()},
            {key: s.missing for key, s in scored.items()},
        )

    def table4(self) -> pd.DataFrame:
        """The reference encoder's rows beside baselines, and the runs of others that were supplied.

        TOST against the reproduced TAS-B run, as in the paper, if it was supplied, else against the softmax loss, the run
        most people would make.
        """
        self.ensure(self.figure3_runs())
        e = self.profile.reference_encoder
        wanted = [self.variant_run(e, *v) for v in VARIANTS]
        tuned_no, tuned_yes, adaptive_no, adaptive_yes, distributed = self.ensure(wanted)
        default, softmax = self.ensure(self.table4_runs())
        bm25, start = self.ensure([self.bm25_run(), self.zero_shot_run(e)])
        # block, loss, sampling, in-batch, source, run
        listed = [
            ("self-distillation", "Adaptive", "Rand.", "✗", "ours", adaptive_no),
            ("self-distillation", "Adaptive", "Rand.", "✓", "ours", adaptive_yes),
            ("self-distillation", "Distributed", "Rand.", "✓", "ours", distributed),
            ("no distillation", "BM25", "—", "—", "ours", bm25),
            ("no distillation", "Static (tuned)", "Rand.", "✗", "ours", tuned_no),
            ("no distillation", "Static (tuned)", "Rand.", "✓", "ours", tuned_yes),
            ("no distillation", "Static (ε = 1)", "Rand.", "✗", "ours", default),
            ("not in the paper", "Softmax (MNRL)", "Rand.", "✓", "not in the paper", softmax),
            ("not in the paper", "Encoder as it comes", "—", "—", "not in the paper", start),
        ]
        for name, settings in self.profile.untrained.items():
            run = self.ensure([self.zero_shot_run(name)])[0]
            loss = f"{settings.label or name} as it comes"
            listed.append(("not in the paper", loss, "—", "—", "not in the paper", run))
        entries = [
            ({"block": b, "loss": loss, "sampling": sampling, "in_batch": ib, "source": source,
              "triples": run.result["triples"], "run_id": run.run_id}, _ranked(run, self.profile))
            for b, loss, sampling, ib, source, run in listed
        ]  # fmt: skip
        for name, runs in self.supplied().items():
            about = {
                "block": "supplied runs", "loss": name, "sampling": "—", "in_batch": "—", "source": f"supplied: {name}",
                "triples": float("nan"), "run_id": "",
            }  # fmt: skip
            entries.append((about, self._ranked_supplied(name, runs)))
        references = {ranked.run_id: ranked for _, ranked in entries}
        reference = references.get(f"supplied: {TAS_B}", references[softmax.run_id])
        rows = [
            {**about, **row}
            for about, ranked in entries
            for row in _compare(
                ranked,
                [r for a, r in entries if a["block"] == about["block"]],
                reference,
                self.profile,
                len(entries) - 1,
            )
        ]
        columns = [
            "block", "loss", "sampling", "in_batch", "source", "set", "measure", "value", "best", "difference", "low", "high",
            "p_adjusted", "comparisons", "equivalent", "refused", "missing", "triples", "run_id", "reference_run_id",
        ]  # fmt: skip
        return pd.DataFrame(rows)[columns]

    def references(self) -> dict[str, float]:
        """BM25's own order on the validation candidates, by measure."""
        return (
            self.ensure([self.bm25_run()])[0]
            .evaluation("rerank", self.profile.sets.validation)
            .mean
        )


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a profile takes before it is run.

    ``runs``: a row a run: run_id, encoder, what, triples, done, seconds (one worker), and bytes of disk kept, of disk while
    it is made (scratch) and of host memory. ``seconds``: for all that are missing, with the profile's workers.
    ``downloads``: (what, bytes). ``shared_disk``: bytes of the collection and its tokenised texts. ``stated``: encoders
    whose speed was not measured but taken from the profile.
    """

    runs: pd.DataFrame
    seconds: float
    downloads: list[tuple[str, int]]
    shared_disk: int
    stated: list[str]


_EMBEDDING = {
    "cls": "[CLS]",
    "cls+linear": "[CLS] + Linear",
    "cls+pooler": "[CLS] + Linear + tanh",
    "mean": "mean",
}


def _own(experiment: StaticSettings | CurveSettings) -> dict[str, Any]:
    """The values an experiment has of its own."""
    own = {"learning_rate": experiment.learning_rate, "seed": experiment.seed}
    return {key: value for key, value in own.items() if value is not None}


@dataclasses.dataclass(frozen=True)
class _Ranked:
    """Full rankings with their scores by test set: a run of this project, or a supplied one, of which some are refused."""

    run_id: str
    evaluations: Mapping[str, Evaluation]
    refused: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    missing: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def mean(self, query_set: str, measure: str) -> float:
        """The score; NaN where there is none."""
        if query_set not in self.evaluations:
            return float("nan")
        return self.evaluations[query_set].mean.get(measure, float("nan"))


def _ranked(run: StoredRun, profile: Profile) -> _Ranked:
    return _Ranked(run.run_id, {name: run.evaluation("full", name) for name in profile.sets.tests})


def _compare(
    own: _Ranked,
    group: Sequence[_Ranked],
    reference: _Ranked | None,
    profile: Profile,
    comparisons: int | None = None,
) -> Iterator[dict[str, Any]]:
    """For each test set and measure: value, best of ``group`` or not, and TOST against ``reference`` (or that best)."""
    for name in profile.sets.tests:
        for measure in profile.measures.full:
            scores = {r.run_id: r.mean(name, measure) for r in group}
            known = {run_id: value for run_id, value in scores.items() if value == value}
            best_id = max(known or scores, key=scores.__getitem__)
            against = reference or next(r for r in group if r.run_id == best_id)
            row: dict[str, Any] = {
                "set": name, "measure": measure, "value": own.mean(name, measure), "best": own.run_id == best_id,
                **dict.fromkeys(("difference", "low", "high", "p", "p_adjusted"), float("nan")),
                "comparisons": comparisons or len(group) - 1, "equivalent": False,
                "reference_run_id": against.run_id, "refused": own.refused.get(name, {}).get(measure, ""),
                "missing": own.missing.get(name, 0),
            }  # fmt: skip
            both = own.mean(name, measure) + against.mean(name, measure)
            if own.run_id != against.run_id and both == both:
                a, b = (r.evaluations[name].per_query[measure] for r in (own, against))
                count = row["comparisons"]
                found = compare(a, b, comparisons=count)
                _, row["low"], row["high"] = paired_interval(a, b, confidence=1 - 2 * 0.05 / count)
                row |= {
                    "difference": found.difference,
                    "p": found.p_tost,
                    "p_adjusted": min(1.0, found.p_tost * count),
                    "equivalent": found.verdict == "equivalent",
                }
            yield row


def _is_first_maximum(frame: pd.DataFrame, by: list[str]) -> pd.Series:
    """True in the first row of each group that has the group's largest value."""
    best = frame.groupby(by, sort=False)["value"].idxmax()
    return frame.index.to_series().isin(best)
