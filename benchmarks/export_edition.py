"""Write the results of a finished profile compactly, to be committed and shown by the book of other machines.

    python benchmarks/export_edition.py book/laptop_long [--profile laptop-long]

The runs are those of $ADAPTIVE_MARGINS_HOME or this checkout. The new folder has

    about.json         profile, collection, machine, and the command that computes the runs again
    FRAME.csv          what each figure and table shows, with run ids
    claims.csv         the paper's claims, tested
    per_query.parquet  the score of every query in every run; `step` is that of an evaluation during training, else -1
    runs.jsonl         configurations, times, selected steps and package versions
    runs/ID.SET.run.gz rankings of the rows of Tables 3 and 4 (first seed) down to the deepest cutoff of their measures
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pandas as pd

from adaptive_margins import paper
from adaptive_margins.book import claims
from adaptive_margins.book.build import named_runs
from adaptive_margins.data.trec import top, write_run
from adaptive_margins.device import machine
from adaptive_margins.evaluation.measures import cutoff
from adaptive_margins.files import atomic_folder, folder_bytes
from adaptive_margins.paper.convergence import convergence, equivalence, lines
from adaptive_margins.paper.experiments import fixed_runs
from adaptive_margins.paper.store import StoredRun
from adaptive_margins.terminal import new_folder
from adaptive_margins.text_tables import size

FRAMES = [*(f"figure{n}" for n in (3, 4, 5, 6)), *(f"table{n}" for n in (1, 2, 3, 4))]
NAMES = ["run_id", "mode", "set", "measure", "qid"]


def export(reproduction: paper.Reproduction, folder: Path) -> int:
    """Write the folder; returns its bytes. SystemExit if runs are missing: they may take hours."""
    p, store = reproduction.profile, reproduction.store
    command = f"adaptive-margins reproduce --profile {p.name} --runs-only"
    missing = [c.run_id for c in fixed_runs(reproduction.experiments) if not store.has(c)]
    if missing:
        raise SystemExit(
            f"{len(missing)} runs are missing, e.g. {missing[0]}; compute them first: {command}"
        )
    frames = {name: getattr(reproduction, name)() for name in FRAMES}
    curves = lines(reproduction.experiments, reproduction.runner)
    frames |= {"convergence": convergence(curves), "equivalence": equivalence(curves)}
    frames["claims"] = pd.concat(
        claims.table(section, frames, reproduction) for section in claims.CHAPTERS
    )
    named = set().union(*map(named_runs, frames.values()))
    ids = sorted(run_id for run_id in named if not run_id.startswith("supplied"))
    runs = [StoredRun(store.folder / run_id) for run_id in ids]
    rows = {run_id for name in ("table3", "table4") for run_id in frames[name]["run_id"]}
    about = {"profile": p.model_dump(mode="json"), "collection": reproduction.inputs.fingerprint}
    used = [run.result["machine"] for run in runs if "machine" in run.result] or [machine()]
    used = {key: "; ".join(dict.fromkeys(each[key] for each in used)) for key in used[0]}
    about |= {"machine": used, "command": command}
    depth = max(map(cutoff, p.measures.full))
    with atomic_folder(folder) as partial:
        text = json.dumps(about, indent=1, ensure_ascii=False) + "\n"
        (partial / "about.json").write_text(text, "utf-8")
        for name, frame in frames.items():
            frame.to_csv(partial / f"{name}.csv", index=False)
        with (partial / "runs.jsonl").open("w") as file:
            file.writelines(json.dumps(facts(run)) + "\n" for run in runs)
        scores = pd.concat(map(per_query, runs), ignore_index=True).astype(
            dict.fromkeys(NAMES, "category")
        )
        scores.to_parquet(partial / "per_query.parquet", index=False, compression="zstd")
        for run in (run for run in runs if run.run_id in rows):
            for name in p.sets.tests:
                short = {qid: dict(top(hits, depth)) for qid, hits in run.run("full", name).items()}
                write_run(short, partial / "runs" / f"{run.run_id}.{name}.run.gz", run.run_id)
    return folder_bytes(folder)


def facts(run: StoredRun[Any]) -> dict[str, Any]:
    """Configuration, and all of result.json but scores."""
    values = {k: v for k, v in run.result.items() if k == "versions" or not isinstance(v, dict)}
    return {"run_id": run.run_id, "config": run.config.model_dump(mode="json"), **values}


def per_query(run: StoredRun[Any]) -> pd.DataFrame:
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=new_folder)
    parser.add_argument("--profile", default="laptop-long")
    arguments = parser.parse_args()
    print(f"{arguments.folder}: {size(export(paper.open(arguments.profile), arguments.folder))}")
