"""Arguments and hyperparameters of a fine-tuning."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from adaptive_margins.encoder.embed import Precision
from adaptive_margins.encoder.load import default_device
from adaptive_margins.encoder.options import EncoderOptions
from adaptive_margins.errors import AdaptiveMarginsError, ArgumentError
from adaptive_margins.evaluation.measures import cutoff, evaluate, named
from adaptive_margins.losses import MarginLoss
from adaptive_margins.training import check_reporters

Target = float | Literal["adaptive", "distributed", "softmax", "all"]
ALL: tuple[Target, ...] = ("distributed", "adaptive", "softmax", 0.1, 0.3, 0.5)
"""What the target "all" stands for."""
OnCheck = Callable[[pd.DataFrame], None]


def loss_name(target: Target) -> str:
    """A target as tables and sentences name it."""
    return target if isinstance(target, str) else f"static {target:g}"


class FinetuneError(AdaptiveMarginsError, ValueError):
    """Fine-tuning that cannot begin, or whose result cannot be written or read."""


@dataclass(frozen=True)
class Settings:
    """Training hyperparameters that the paper does not fix; the loss has none."""

    batch_size: int = 32  # triples a step
    memory: float = 2.0  # GB of a step's activations; if there are more, they are computed again
    triples: int = 2048  # at most; about five minutes with MiniLM on two cores
    tokens: int = 800_000  # of these triples, at most, less half of those of all passages, but not
    least_tokens: int = 160_000  # less than that: eight minutes for 5,000 passages of 256 tokens
    passes: int = 5  # over the distinct pairs of query and positive, each with another negative
    learning_rate: float = 2e-5  # customary for encoders that are already trained contrastively
    weight_decay: float = 1e-6  # Section 4
    optimizer: str = "adamw_torch_fused"  # Section 4: 8-bit Adam, 24 times slower a step on a CPU
    precision: Precision = "fp32"  # of matrix products
    checks: int = 8  # evaluations a run, after the one at step 0, and not
    check_steps: int = 4  # more often than at each of these
    patience: int = 3  # evaluations without a gain that end the training
    # Keep the trained encoder only if its validation gain over step 0 exceeds this many standard
    # errors of the paired difference: the one-standard-error rule of Breiman et al. (1984),
    # Classification and Regression Trees, Section 3.4.3.
    standard_errors: float = 1.0
    negatives_depth: int = 100  # of the candidates that negatives are mined from
    check_share: float = 1 / 3  # cost of an evaluation, as a share of the training since the last
    check_passages: int = 1000  # that any evaluation may embed, unless they are of more than
    check_tokens: int = 65_536  # tokens; seven seconds with MiniLM

    @classmethod
    def for_device(cls, device: str | None = None, **given: float | None) -> Settings:
        """On a GPU the paper's batch size and mixed precision, and triples for as many minutes.

        Values ``given`` replace those of the device, unless they are None.
        """
        chosen: dict[str, Any] = {k: value for k, value in given.items() if value is not None}
        if (device or default_device()).startswith("cuda"):
            many = {"triples": 100_000, "tokens": 40_000_000, "least_tokens": 8_000_000}
            chosen = {"batch_size": 128, "memory": 16.0, "precision": "bf16"} | many | chosen
        return cls(**chosen)


@dataclass(frozen=True)
class Job:
    """The arguments of `finetune`."""

    source: str
    output: Path
    model: str
    target: Target
    seed: int
    measures: list[str]
    negatives: str
    device: str
    triples: int | None
    report_to: tuple[str, ...]
    on_check: OnCheck | None
    settings: Settings
    options: EncoderOptions
    folds: int | None
    also: str | None
    cache: bool

    @classmethod
    def of(
        cls,
        output: Path,
        device: str | None,
        settings: Settings | None,
        options: EncoderOptions | None,
        **given: Any,
    ) -> Job:
        """The job of a call, with defaults; ArgumentError for what cannot be."""
        device = device or default_device()
        return cls(
            output=Path(output).expanduser().absolute(),
            device=device,
            settings=settings or Settings.for_device(device),
            options=options or EncoderOptions(),
            **given,
        )._checked()

    def _checked(self) -> Job:
        """The job with complete names of measures."""
        if not 0 <= self.seed < 2**32:  # numpy takes no other
            raise ArgumentError("seed", f"seed is {self.seed}; expected 0 to {2**32 - 1:,}")
        try:
            for target in self.targets:
                MarginLoss(None, target="adaptive" if target == "softmax" else target)
        except ValueError as error:
            raise ArgumentError("target", f'{error}, "softmax" or "all"') from None
        if self.folds is not None and self.folds < 3:
            expected = "expected at least 3: to test, to validate, and to train on"
            raise ArgumentError("folds", f"folds is {self.folds}; {expected}")
        if self.also and Path(self.also).resolve() == Path(self.source).resolve():
            expected = "the collection to train on; expected another one"
            raise ArgumentError("also", f"also is {self.also}, {expected}")
        try:
            measures = [named(measure) for measure in self.measures]
            evaluate({"q": {"d": 1}}, {"q": {"d": 1.0}}, measures)
        except ValueError as error:
            raise ArgumentError("measures", str(error)) from None
        if self.negatives not in ("bm25", "encoder"):
            expected = f"negatives is {self.negatives!r}; expected 'bm25' or 'encoder'"
            raise ArgumentError("negatives", expected)
        if self.triples is not None and self.triples < 2:
            raise ArgumentError("triples", f"triples is {self.triples}; expected at least 2")
        check_reporters(self.report_to)
        return dataclasses.replace(self, measures=measures, report_to=tuple(self.report_to))

    @property
    def targets(self) -> tuple[Target, ...]:
        """Those of all trainings on the same triples."""
        return ALL if self.target == "all" else (self.target,)

    @property
    def depth(self) -> int:
        """Passages ranked for a test query."""
        return max(100, *map(cutoff, self.measures))
