"""Finished runs: one folder each, named by the hash of its configuration, written atomically."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import pandas as pd
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from adaptive_margins.data.trec import Run, read_run, write_run
from adaptive_margins.device import machine
from adaptive_margins.encoder.load import encoder_identity
from adaptive_margins.errors import AdaptiveMarginsError
from adaptive_margins.evaluation.measures import Evaluation
from adaptive_margins.evaluation.significance import compare
from adaptive_margins.files import (
    DamagedError,
    atomic_folder,
    check_folder,
    read_object,
    write_checksums,
)
from adaptive_margins.markup import active
from adaptive_margins.progress import now, say
from adaptive_margins.runs import RunConfig, read_run_config

if TYPE_CHECKING:
    from adaptive_margins.training import TrainingResult

PROVENANCE = "provenance.json"
_MODES = ("rerank", "full", "exact")
_PACKAGES = (
    *("torch", "transformers", "sentence-transformers", "tokenizers", "bitsandbytes", "numpy"),
    *("faiss-cpu", "faiss-gpu-cu12", "bm25s", "PyStemmer", "ir-measures"),
)

R = TypeVar("R", bound=RunConfig)
R_co = TypeVar("R_co", bound=RunConfig, covariant=True)


class StoreError(AdaptiveMarginsError, RuntimeError):
    """An artefact that is missing, damaged or cannot be written, or a run that does not exist."""


def package_versions(packages: Iterable[str] = _PACKAGES) -> dict[str, str]:
    """Versions of those packages that are installed.

    By default of the packages that numbers may depend on; these are stored with every run.
    """
    found = {}
    for name in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


@dataclass(frozen=True)
class StoredRun(Generic[R_co]):
    """A finished run. Its files are read when they are needed; a damaged one raises StoreError."""

    path: Path

    @property
    def run_id(self) -> str:
        """The folder's name."""
        return self.path.name

    def _read(self, name: str, reader: Callable[[Path], Any]) -> Any:
        file = self.path / name
        try:
            check_folder(self.path, only=name)
            return reader(file)
        except FileNotFoundError:
            problem = "is missing"
        except Exception as error:  # every reader has other exceptions for damaged files
            problem = f"cannot be read ({type(error).__name__}: {error})"
        raise StoreError(
            f"{file} {problem}; delete the folder {self.path}, and the run is computed again"
        )

    @cached_property
    def config(self) -> R_co:
        """The configuration."""
        config: R_co = self._read("config.json", lambda file: read_run_config(file.read_text()))
        if config.run_id != self.run_id:
            raise StoreError(
                f"{self.path / 'config.json'} is that of run {config.run_id}; delete the folder"
                f" {self.path}"
            )
        return config

    @cached_property
    def result(self) -> dict[str, Any]:
        """The content of result.json."""
        result: dict[str, Any] = self._read("result.json", _read_result)
        return result

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """Whose a run is that was computed elsewhere (`shared_runs.take`); {} of one's own."""
        return read_object(self.path / PROVENANCE)

    @cached_property
    def curve(self) -> pd.DataFrame:
        """The learning curve: one row per evaluation, step 0 included."""
        return self._read("curve.parquet", pd.read_parquet)

    @cached_property
    def checks(self) -> pd.DataFrame:
        """The curve in long form: one row per evaluation, query and measure."""
        return self._read("checks.parquet", pd.read_parquet)

    def validated(self, measure: str) -> pd.DataFrame:
        """The curve of a measure by query: a row per step, a column per query."""
        checks = self.checks[self.checks["measure"] == measure]
        return checks.pivot(index="step", columns="qid", values="value")

    @cached_property
    def targets(self) -> pd.DataFrame:
        """One row per step: mean, minimum and maximum of raw φ(d⁺, d⁻) over the batch."""
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
        """The ranking that `evaluation` scores."""
        run: Run = self._read(f"{mode}.{query_set}.run.gz", _read_ranking)
        return run

    def weights(self, which: Literal["selected", "last"] = "selected") -> dict[str, Tensor]:
        """The trained parameters of the selected or the last step; stored of a run with test sets.

        They fit `encoder.frozen.LoadedEncoder.fresh` of the run's encoder.
        """
        found: dict[str, Tensor] = self._read(f"{which}.safetensors", load_file)
        return found

    def model(self, device: str) -> Any:
        """The trained encoder, if it is stored. EncoderError for pickles and custom modules."""
        from sentence_transformers import SentenceTransformer

        encoder_identity(folder := str(self.path / "model"))  # checks the files
        return SentenceTransformer(folder, device=device, local_files_only=True)

    def scores(self) -> pd.DataFrame:
        """All mean scores: columns mode, set, measure, value."""
        rows = [
            (mode, name, measure, value)
            for mode in _MODES
            for name, found in self.result.get(mode, {}).items()
            for measure, value in found["mean"].items()
        ]
        return pd.DataFrame(rows, columns=["mode", "set", "measure", "value"])

    def compare(self, other: StoredRun[Any]) -> pd.DataFrame:
        """Compare with another run, by paired tests, wherever both have scores.

        Returns:
            A row per mode, query set and measure: value and other (means), difference with its
            95 % confidence interval (low, high), p_t, p_tost and verdict (see
            `significance.compare`; not corrected for the number of rows).
        """
        rows = []
        for mode in _MODES:
            for name in self.result.get(mode, {}).keys() & other.result.get(mode, {}).keys():
                a, b = (run.evaluation(mode, name) for run in (self, other))
                for measure in a.mean.keys() & b.mean.keys():
                    found = compare(a.per_query[measure], b.per_query[measure])
                    scores = (a.mean[measure], b.mean[measure], found.difference, *found.ci)
                    tests = (found.p_t, found.p_tost, found.verdict)
                    rows.append((mode, name, measure, *scores, *tests))
        keys, values = ["mode", "set", "measure"], ["value", "other", "difference", "low", "high"]
        frame = pd.DataFrame(rows, columns=[*keys, *values, "p_t", "p_tost", "verdict"])
        return frame.sort_values(keys, ignore_index=True)


def _read_result(file: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(file.read_text())
    shown = [{name: value for name, value in result.items() if name not in _MODES}]
    for mode in _MODES:
        for query_set, found in result.get(mode, {}).items():
            if not {"mean", "per_query"} <= set(found):
                raise ValueError(f"mean and per_query are missing in {mode}")
            shown.append({query_set: found["mean"]})
    if fault := active(shown):
        raise ValueError(fault)
    return result


def _read_ranking(file: Path) -> Run:
    if not file.stat().st_size:
        raise ValueError("the file is empty")  # without any hit, it would still be a gzip file
    return read_run(file, trusted=True)


class Store:
    """The folder ``runs/`` of a home folder; with ``leases``, shared (`shared_store`)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.leases: Any = None

    def path(self, config: RunConfig) -> Path:
        """The folder of the run, whether it exists or not."""
        return self.folder / config.run_id

    def has(self, config: RunConfig) -> bool:
        """Whether the run is finished."""
        return self.path(config).is_dir()

    def missing(self, configs: Iterable[R]) -> list[R]:
        """Those that are not finished, each once; the folder is read once for all of them."""
        names = set(os.listdir(self.folder)) if self.folder.is_dir() else set()
        return [config for config in dict.fromkeys(configs) if config.run_id not in names]

    def publish(self, config: RunConfig) -> None:
        """Share a finished run with other machines, which see those of a folder."""

    def get(self, config: R) -> StoredRun[R]:
        """The finished run of ``config``. Raises StoreError if there is none."""
        if not self.has(config):
            raise StoreError(
                f"run {config.run_id} ({config.encoder}, {config.kind}) is not in {self.folder}"
            )
        return StoredRun(self.path(config))

    def damaged(self, runs: str = "[!.]*", *, aside: bool = False) -> list[str]:
        """What is wrong with each of ``runs``, a pattern, that differs from its checksums.

        With ``aside``, they are moved to ``cache/damaged/`` of the home folder, with a message.
        """
        found = []
        for folder in sorted(self.folder.glob(runs)):
            try:
                check_folder(folder)
            except DamagedError as error:
                found.append(f"run {folder.name} is damaged: {error}")
                place = self.folder.parent / "cache" / "damaged" / folder.name
                if aside:
                    say(f"{found[-1]}; it is moved to {place} and computed again", always=True)
                    place.parent.mkdir(parents=True, exist_ok=True)
                    shutil.rmtree(place, ignore_errors=True)  # an earlier one
                    shutil.move(folder, place)  # perhaps to another disk
        return found

    def put(
        self,
        config: R,
        training: TrainingResult | None,
        evaluations: Mapping[str, Mapping[str, Evaluation]],
        runs: Mapping[str, Mapping[str, Run]],
        *,
        extra: Mapping[str, Any] | None = None,
        save_model: Callable[[Path], None] | None = None,
    ) -> StoredRun[R]:
        """Write a finished run; ``evaluations`` and ``runs`` are mode → query set → value.

        If another process has stored the same run meanwhile, that one stays.

        Raises:
            StoreError: it cannot be written.
        """
        result: dict[str, Any] = {
            mode: {name: {"mean": e.mean, "per_query": e.per_query} for name, e in sets.items()}
            for mode, sets in evaluations.items()
        }
        names = ("train_seconds", "eval_seconds", "best_step", "kept_step", "stop_step", "triples")
        for name in (*names, "peak_bytes"):  # 0 where nothing was trained
            result[name] = getattr(training, name) if training else 0
        result |= {"versions": package_versions(), "machine": machine(), "finished": now()}
        result |= extra or {}
        path = self.path(config)
        try:
            with atomic_folder(path) as folder:
                values = json.dumps(config.model_dump(mode="json"), indent=1)
                (folder / "config.json").write_text(values + "\n")
                (folder / "result.json").write_text(json.dumps(result) + "\n")
                if training is not None:
                    training.curve.to_parquet(folder / "curve.parquet", index=False)
                    training.checks.to_parquet(folder / "checks.parquet", index=False)
                    training.targets.to_parquet(folder / "targets.parquet", index=False)
                    for name, state in training.states.items() if config.test_sets else ():
                        save_file(state, folder / f"{name}.safetensors")
                for mode, sets in runs.items():
                    for name, run in sets.items():
                        write_run(run, folder / f"{mode}.{name}.run.gz", config.run_id)
                if save_model is not None:
                    save_model(folder / "model")
                write_checksums(folder)
        except (OSError, SafetensorError) as error:
            raise StoreError(f"{path} could not be written: {error}; nothing is left") from error
        return StoredRun(path)
