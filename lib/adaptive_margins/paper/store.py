"""Results are artefacts: one folder a run, named by the hash of its configuration, and whole if it exists."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import pandas as pd
from safetensors import SafetensorError

from adaptive_margins.data.trec import Run, read_run, write_run
from adaptive_margins.errors import AdaptiveMarginsError
from adaptive_margins.evaluation.measures import Evaluation
from adaptive_margins.files import HOME_VARIABLE as HOME_VARIABLE
from adaptive_margins.files import home as home
from adaptive_margins.files import whole_folder
from adaptive_margins.runs import RunConfig, read_run_config
from adaptive_margins.training import TrainingResult


class StoreError(AdaptiveMarginsError, RuntimeError):
    """An artefact that is missing, damaged, or cannot be written; the message names the file and what to do."""


R_co = TypeVar("R_co", bound=RunConfig, covariant=True)
R = TypeVar("R", bound=RunConfig)


@dataclass(frozen=True)
class StoredRun(Generic[R_co]):
    """A finished run. What it holds is read when asked for; a damaged file is a StoreError that names it."""

    path: Path

    @property
    def run_id(self) -> str:
        """The folder's name."""
        return self.path.name

    def _read(self, name: str, reader: Callable[[Path], Any]) -> Any:
        file = self.path / name
        try:
            return reader(file)
        except FileNotFoundError:
            problem = "is missing"
        except Exception as error:  # every reader has its own words for "damaged"
            problem = f"cannot be read ({type(error).__name__}: {error})"
        raise StoreError(
            f"{file} {problem}; delete the folder {self.path} and the run is made anew"
        )

    @cached_property
    def config(self) -> R_co:
        """What was run."""
        config: R_co = self._read("config.json", lambda file: read_run_config(file.read_text()))
        if config.run_id != self.run_id:
            raise StoreError(
                f"{self.path / 'config.json'} is that of run {config.run_id}; delete the folder {self.path}"
            )
        return config

    @cached_property
    def result(self) -> dict[str, Any]:
        """result.json as it is."""
        result: dict[str, Any] = self._read("result.json", _read_result)
        return result

    @cached_property
    def curve(self) -> pd.DataFrame:
        """One row an evaluation, step 0 included."""
        return self._read("curve.parquet", pd.read_parquet)

    @cached_property
    def checks(self) -> pd.DataFrame:
        """What the curve's means are of: a row per evaluation, query and measure (step, qid, measure, value)."""
        return self._read("checks.parquet", pd.read_parquet)

    @cached_property
    def targets(self) -> pd.DataFrame:
        """One row a step: mean, min and max of raw φ(d⁺, d⁻)."""
        return self._read("targets.parquet", pd.read_parquet)

    def evaluation(self, mode: str, query_set: str) -> Evaluation:
        """Measures of ``mode`` ("rerank", "full" or "exact") on a query set."""
        try:
            found = self.result[mode][query_set]
        except KeyError:
            there = {m: sorted(self.result[m]) for m in _MODES if m in self.result}
            raise StoreError(
                f"{self.path / 'result.json'} has no {mode} on {query_set!r}; it has {there}"
            ) from None
        return Evaluation(mean=found["mean"], per_query=found["per_query"])

    def run(self, mode: str, query_set: str) -> Run:
        """The ranking behind `evaluation`."""
        run: Run = self._read(f"{mode}.{query_set}.run.gz", _read_ranking)
        return run


_MODES = ("rerank", "full", "exact")


def _read_result(file: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(file.read_text())
    for mode in _MODES:
        for found in result.get(mode, {}).values():
            if not {"mean", "per_query"} <= set(found):
                raise ValueError(f"mean and per_query are missing in {mode}")
    return result


def _read_ranking(file: Path) -> Run:
    if not file.stat().st_size:
        raise ValueError("the file is empty")  # without any hit, it would still be a gzip file
    return read_run(file, own=True)


class Store:
    """The folder ``runs/`` of a home folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, config: RunConfig) -> Path:
        """Where the run of ``config`` lies, or would."""
        return self.folder / config.run_id

    def has(self, config: RunConfig) -> bool:
        """Whether the run is finished."""
        return self.path(config).is_dir()

    def get(self, config: R) -> StoredRun[R]:
        """The finished run of ``config``; StoreError if there is none."""
        if not self.has(config):
            raise StoreError(
                f"run {config.run_id} ({config.encoder}, {config.kind}) is not in {self.folder}"
            )
        return StoredRun(self.path(config))

    def put(
        self,
        config: RunConfig,
        training: TrainingResult | None,
        evaluations: Mapping[str, Mapping[str, Evaluation]],
        runs: Mapping[str, Mapping[str, Run]],
        *,
        extra: Mapping[str, Any] | None = None,
        save_model: Callable[[Path], None] | None = None,
    ) -> StoredRun:
        """Write a finished run; ``evaluations`` and ``runs`` are mode → query set → value.

        If another process stored the same run meanwhile, that one is kept. StoreError if it cannot be written.
        """
        result: dict[str, Any] = {
            mode: {name: {"mean": e.mean, "per_query": e.per_query} for name, e in sets.items()}
            for mode, sets in evaluations.items()
        }
        result |= {
            "train_seconds": training.train_seconds if training else 0.0,
            "eval_seconds": training.eval_seconds if training else 0.0,
            "best_step": training.best_step if training else 0,
            "kept_step": training.kept_step if training else 0,
            "stop_step": training.stop_step if training else 0,
            "triples": training.triples if training else 0,
            "peak_bytes": training.peak_bytes if training else 0,
            **(extra or {}),
        }
        path = self.path(config)
        try:
            with whole_folder(path) as folder:
                (folder / "config.json").write_text(
                    json.dumps(config.model_dump(mode="json"), indent=1) + "\n"
                )
                (folder / "result.json").write_text(json.dumps(result) + "\n")
                if training is not None:
                    training.curve.to_parquet(folder / "curve.parquet", index=False)
                    training.checks.to_parquet(folder / "checks.parquet", index=False)
                    training.targets.to_parquet(folder / "targets.parquet", index=False)
                for mode, sets in runs.items():
                    for name, run in sets.items():
                        write_run(run, folder / f"{mode}.{name}.run.gz", config.run_id)
                if save_model is not None:
                    save_model(folder / "model")
        except (OSError, SafetensorError) as error:
            message = f"{path} could not be written: {error}; nothing was left there"
            raise StoreError(message) from error
        return StoredRun(path)
