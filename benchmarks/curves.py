"""Best validation score of each run of two homes side by side: does faster training code end at the same curves?

    python benchmarks/curves.py BEFORE AFTER

A home is a folder with ``runs/``. Runs are matched by what they are, their code version apart. Writes curves.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from adaptive_margins.runs import CODE_VERSION, TrainingRun, read_run_config

CURVES = Path(__file__).parent / "curves.json"


class Run(NamedTuple):
    """A stored run, of whatever code version (`StoredRun` would refuse the id of an older one)."""

    config: TrainingRun
    curve: pd.DataFrame


def trained(home: Path) -> dict[str, Run]:
    """The trained runs of a home by everything that is configured but the code; of several versions the newest."""
    found: dict[str, Run] = {}
    for file in sorted((home / "runs").glob("*/config.json")):
        config = read_run_config(file.read_text())
        if not isinstance(config, TrainingRun):
            continue
        key = config.model_dump_json(exclude={"code_version", "chunks"})
        if key not in found or config.code_version > found[key].config.code_version:
            found[key] = Run(config, pd.read_parquet(file.with_name("curve.parquet")))
    return found


def kind(config: TrainingRun) -> str:
    """The target in a word; "softmax" for the softmax loss."""
    if config.loss == "softmax":
        return config.loss
    return config.target if isinstance(config.target, str) else "static"


def best(run: Run) -> float:
    """The best value of the measure that selects, step 0 included."""
    return float(run.curve[run.config.selection].max())


def compare(before: Path, after: Path) -> list[dict[str, Any]]:
    """A row an encoder, target, in-batch and batch size: the best of its runs before and after."""
    old, new = trained(before), trained(after)
    rows = [
        {
            "encoder": c.encoder, "target": kind(c), "in_batch": c.in_batch, "batch_size": c.batch_size,
            "measure": c.selection, "before": best(old[key]), "after": best(run),
        }
        for key, run in new.items() if key in old for c in [run.config]
    ]  # fmt: skip
    if not rows:
        raise SystemExit(f"{before} and {after} have no run in common")
    by = ["encoder", "target", "in_batch", "batch_size", "measure"]
    grouped = pd.DataFrame(rows).groupby(by)
    summary = grouped[["before", "after"]].max().assign(runs=grouped.size())
    return summary.reset_index().to_dict("records")


def main() -> None:
    """Print the rows and write them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    given = parser.parse_args()
    rows = compare(given.before, given.after)
    print(pd.DataFrame(rows).to_string(index=False, float_format="%.4f"))
    CURVES.write_text(
        json.dumps({"code_version": CODE_VERSION, "rows": rows}, indent=1, ensure_ascii=False)
        + "\n"
    )


if __name__ == "__main__":
    main()
