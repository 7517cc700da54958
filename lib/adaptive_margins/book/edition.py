"""Results of a long profile in a compact folder: committed, and shown by the book of any machine.

``FRAME.csv`` and ``claims.csv`` are what figures, tables and claims show, with run ids;
``per_query.parquet`` has every query's score of every run (``step`` is that of an evaluation during
training, else −1), ``runs.jsonl`` configurations and times, ``runs/ID.SET.run.gz`` the rankings of
the rows of Tables 3 and 4 (first seed) down to the deepest cutoff of their measures.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from adaptive_margins.book import claims
from adaptive_margins.data.trec import top, write_run
from adaptive_margins.errors import AdaptiveMarginsError
from adaptive_margins.evaluation.measures import cutoff
from adaptive_margins.files import atomic_folder, folder_bytes
from adaptive_margins.paper import Reproduction
from adaptive_margins.paper.experiments import fixed_runs
from adaptive_margins.paper.store import StoredRun

LONG = {"laptop": "laptop-long"}
"""Profile → the profile whose committed results decide its claims."""
BOOK = Path(__file__).resolve().parents[3] / "book"
FRAMES = ("figure3", "figure4", "figure5", "figure6", "table1", "table2", "table3", "table4")
MORE = ("convergence", "equivalence")


class EditionError(AdaptiveMarginsError, RuntimeError):
    """Results that cannot be exported because runs are missing."""


def place(profile: str) -> Path:
    """Where the committed results for a profile are, or would be."""
    return BOOK / LONG.get(profile, profile).replace("-", "_")


def read(profile: str, folder: Path | None = None) -> dict[str, pd.DataFrame]:
    """The committed frames for a profile by name, ``claims`` included; none if there are none."""
    files = sorted((folder or place(profile)).glob("*.csv"))
    texts = {"section": str, "run_id": str, "reference_run_id": str}
    return {file.stem: pd.read_csv(file, dtype=texts) for file in files}


def export(reproduction: Reproduction, folder: Path, machine: Mapping[str, str]) -> int:
    """Write the results of a finished profile to a new folder; returns its bytes.

    Raises:
        EditionError: runs are missing.
    """
    p, store = reproduction.profile, reproduction.store
    missing = [c.run_id for c in fixed_runs(reproduction.experiments) if not store.has(c)]
    if missing:
        raise EditionError(
            f"{len(missing)} runs of profile {p.name} are missing, e.g. {missing[0]}; compute them"
            f" with: adaptive-margins reproduce --profile {p.name} --runs-only"
        )
    frames = {name: getattr(reproduction, name)() for name in (*FRAMES, *MORE)}
    tested = [claims.table(section, frames, reproduction) for section in claims.CHAPTERS]
    ids = {
        run_id
        for frame in frames.values()
        for column in frame.columns.intersection(["run_id", "run_ids", "start_run_id"])
        for text in frame[column].unique()
        for run_id in ([] if text.startswith("supplied") else text.split())
    }
    runs: list[StoredRun[Any]] = [StoredRun(store.folder / run_id) for run_id in sorted(ids)]
    shown = {i for name in ("table3", "table4") for i in frames[name]["run_id"]} & ids
    depth = max(map(cutoff, p.measures.full))
    about: dict[str, Any] = {"profile": p.model_dump(mode="json"), "machine": dict(machine)}
    about["collection"] = reproduction.inputs.fingerprint
    about["command"] = f"adaptive-margins reproduce --profile {p.name} --runs-only"
    with atomic_folder(folder) as partial:
        for name, frame in {**frames, "claims": pd.concat(tested)}.items():
            frame.to_csv(partial / f"{name}.csv", index=False)
        (partial / "about.json").write_text(json.dumps(about, indent=1) + "\n")
        with (partial / "runs.jsonl").open("w") as file:
            file.writelines(json.dumps(_facts(run)) + "\n" for run in runs)
        per_query = pd.concat([_per_query(run) for run in runs], ignore_index=True)
        names = ["run_id", "mode", "set", "measure", "qid"]
        per_query.astype(dict.fromkeys(names, "category")).to_parquet(
            partial / "per_query.parquet", index=False, compression="zstd"
        )
        (partial / "runs").mkdir()
        for run in (run for run in runs if run.run_id in shown):
            for name in p.sets.tests:
                ranking = run.run("full", name)
                short = {qid: dict(top(hits, depth)) for qid, hits in ranking.items()}
                write_run(short, partial / "runs" / f"{run.run_id}.{name}.run.gz", run.run_id)
    return folder_bytes(folder)


def _facts(run: StoredRun[Any]) -> dict[str, Any]:
    """Configuration, times, steps and versions: all of result.json but scores."""
    scalars = {k: v for k, v in run.result.items() if not isinstance(v, dict) or k == "versions"}
    return {"run_id": run.run_id, "config": run.config.model_dump(mode="json"), **scalars}


def _per_query(run: StoredRun[Any]) -> pd.DataFrame:
    """run_id, mode, set, step, measure, qid and value of every score of a run."""
    rows = [
        (mode, name, -1, measure, qid, value)
        for mode in ("rerank", "full", "exact")
        for name, found in run.result.get(mode, {}).items()
        for measure, scores in found["per_query"].items()
        for qid, value in scores.items()
    ]
    frame = pd.DataFrame(rows, columns=["mode", "set", "step", "measure", "qid", "value"])
    if run.config.kind == "training":
        during = run.checks.assign(mode="rerank", set=run.config.validation)
        frame = pd.concat([frame, during], ignore_index=True)
    return frame.assign(run_id=run.run_id)
