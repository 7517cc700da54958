"""The book's pages that are written by the build: cover, provenance, drawings and the data sheet.

Every number on them is read from an artefact: the tables' CSV files, receipts, the store.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import yaml

from adaptive_margins.book import describe, released_code, schematics
from adaptive_margins.book.style import measure_label
from adaptive_margins.files import write_text
from adaptive_margins.paper.experiments import Reproduction
from adaptive_margins.paper.experiments import describe as describe_run
from adaptive_margins.paper.store import StoredRun
from adaptive_margins.profiles.config import Profile
from adaptive_margins.progress import clock

LONG = "07_paper_and_released_code"
"""The notebook that is executed only when asked for; else its page is a committed summary."""

OWN = "10_your_collection"
"""The notebook that is no page of the book: it takes a collection, not a profile."""

Receipts = Mapping[str, Mapping[str, Any]]
"""Notebook (without suffix) → its receipt, as `build` writes it."""


def write(home: Path, profile: Profile, receipts: Receipts) -> None:
    """Write the generated pages and images into ``HOME/book/_executed``."""
    folder = home / "book" / "_executed"
    reproduction = Reproduction(profile, home)
    write_images(folder / "images")
    table = folder / "data" / "table4.csv"
    write_text(folder / "cover.md", cover(profile, table if table.is_file() else None))
    write_text(folder / "datasheet.md", describe.profile_datasheet(reproduction))
    write_long(home, profile.name, receipts)
    runs: list[StoredRun[Any]] = [
        StoredRun(home / "runs" / run_id)
        for run_id in sorted({i for r in receipts.values() for i in r.get("results", ())})
        if (home / "runs" / run_id).is_dir()
    ]
    write_text(folder / "provenance.md", provenance(profile, receipts, runs))


def write_long(home: Path, profile: str, receipts: Receipts) -> None:
    """The page of `LONG`: the committed summary, unless the notebook was executed; then its own summary beside the data."""
    folder, name = home / "book" / "_executed", "paper_and_released_code.json"
    page = folder / f"{LONG}.md"
    if not page.with_suffix(".ipynb").is_file():
        committed = (home / "book" / name).read_text("utf-8")
        write_text(page, released_code.summary_page(json.loads(committed)))
        return
    page.unlink(missing_ok=True)
    receipt = receipts[LONG]
    summary = released_code.summary(
        released_code.read_frames(folder / "data"), receipt["machine"], receipt["finished"], profile
    )
    write_text(folder / name, json.dumps(summary, indent=1, ensure_ascii=False) + "\n")


def write_images(folder: Path) -> None:
    """Draw the paper's Figures 1 and 2 anew, as ``regimes.png`` and ``targets.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    for draw in (schematics.regimes, schematics.targets):
        draw().savefig(folder / f"{draw.__name__}.png", dpi=200)


def versions() -> dict[str, str]:
    """Python and every package the project names as a dependency, whichever FAISS included → version."""
    named = importlib.metadata.requires("adaptive-margins") or []
    names = [re.split(r"[^\w.-]", line)[0] for line in named if "extra ==" not in line]
    found = {"Python": platform.python_version()}
    for name in [*names, "faiss-cpu", "faiss-gpu-cu12", "faiss"]:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # only one FAISS is there
    return found


def machine() -> dict[str, str | int | float]:
    """Processor, cores and memory of this machine; nothing that names it."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file() and (line := re.search(r"model name\s*: (.+)", cpuinfo.read_text())):
        model = line[1]
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1,
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.machine()}",
    }


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    lines = [list(map(str, header))]
    lines += [["---"] * len(lines[0]), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def cover(profile: Profile, table4: Path | None) -> str:
    """What the front page says of this edition: profile, and where BM25 and the softmax loss stand (Table 4)."""
    about = (
        f"This edition was computed with the profile **{profile.name}**. {profile.about.strip()}\n"
    )
    if profile.notes.cover:
        about += (
            "\n:::{admonition} What these numbers are, and what they are not\n:class: important\n\n"
            f"{profile.notes.cover}\n:::\n"
        )
    if table4 is None:
        return about + "\nTable 4 has not been computed in this edition.\n"
    frame = pd.read_csv(table4, keep_default_na=False, na_values=[""])
    own = frame[~frame["source"].str.startswith(("published", "supplied"))]
    labels = own["loss"] + own["in_batch"].map({"✓": ", in-batch"}).fillna("")
    labels = labels.where(~own["loss"].str.startswith("Distributed"), own["loss"])
    own = own.assign(label=labels, measure=own["measure"].map(measure_label))
    cells = {(r.label, r.set, r.measure): f"{r.value:.3f}" for r in own.itertuples()}
    columns = list(dict.fromkeys((name, measure) for _, name, measure in cells))
    header = ["Loss", *(f"{measure}, {name}" for name, measure in columns)]
    rows = [[loss, *(cells[loss, *c] for c in columns)] for loss in own["label"].unique()]
    sentences = [_standing(own[own["set"] == name]) for name in profile.sets.tests]
    return (
        f"{about}\nFull ranking on the test query sets, encoder `{profile.reference_encoder}` "
        f"(BM25 uses none):\n\n{table(header, rows)}\n\n{' '.join(sentences)} "
        "The notebook on baselines has the same rows with their tests and the published numbers beside them.\n"
    )


def _standing(rows: pd.DataFrame) -> str:
    """One set, first measure: BM25, the encoder as it comes, the best margin loss, the softmax loss."""
    rows = rows[rows["measure"] == rows["measure"].iloc[0]]

    def row(word: str) -> pd.Series | None:
        found = rows[rows["loss"].str.contains(word, regex=False)]
        return None if found.empty else found.iloc[0]

    bm25, start, softmax = row("BM25"), row("as it comes"), row("Softmax")
    margins = rows[rows["loss"].str.match("Static|Adaptive|Distributed")]
    best = margins.sort_values("value").iloc[-1]
    text = f"On {best['set']} the highest {best['measure']} among the margin losses is {best['value']:.3f} ({best['label']})"
    others = [
        (bm25, "BM25's own order"),
        (start, "the encoder before training"),
        (softmax, "the softmax loss"),
    ]
    told = [
        f"{name} reaches {other['value']:.3f} ({best['value'] - other['value']:+.3f})".replace(
            "(-", "(−"
        )
        for other, name in others
        if other is not None
    ]
    return f"{text}; {', '.join(told)}; the margin loss's lead in brackets." if told else f"{text}."


def provenance(profile: Profile, receipts: Receipts, runs: Iterable[StoredRun]) -> str:
    """Where the numbers come from: machine, versions, time per notebook and run, fingerprints, profile."""
    runs = list(runs)
    machines = list(
        {
            tuple(r["machine"].items()): r["machine"] for r in receipts.values() if "machine" in r
        }.values()
    )
    collections = sorted({run.config.collection for run in runs})
    configs = [run.config for run in runs]
    weights = sorted({(c.encoder, c.version if c.kind == "bm25" else c.weights) for c in configs})
    trained, evaluated = (
        sum(run.result[key] for run in runs) for key in ("train_seconds", "eval_seconds")
    )
    described = [
        [
            f"`{run.run_id}`",
            run.config.encoder,
            describe_run(run.config),
            getattr(run.config, "seed", ""),
            f"{run.result['train_seconds']:.1f}",
            f"{run.result['eval_seconds']:.1f}",
            f"{run.result['peak_bytes'] / 2**30:.2f}" if run.result["peak_bytes"] else "",
        ]
        for run in sorted(
            runs,
            key=lambda r: (r.config.encoder, describe_run(r.config), getattr(r.config, "seed", 0)),
        )
    ]
    executed = [
        [name, r["finished"], f"{r['seconds']:.1f}"]
        for name, r in receipts.items()
        if "finished" in r
    ]
    values = yaml.safe_dump(
        profile.model_dump(mode="json", exclude={"notes"}), sort_keys=False, allow_unicode=True
    )
    parts = [
        "# Provenance",
        "What this edition of the book was computed from, on what, and how long it took. "
        "{doc}`../reproduce` says how to compute it again and how to check a single number.",
        "## Data and encoders",
        table(
            ["What", "Fingerprint"],
            [["profile", profile.name]]
            + [["collection", f"`{c}`"] for c in collections]
            + [[f"encoder {name}", f"`{identity}`"] for name, identity in weights],
        ),
        "## Machine",
        *(
            table(["What", "Value"], [[key.capitalize(), value] for key, value in m.items()])
            for m in machines
        ),
        "## Notebooks",
        "Time to execute a notebook once the runs it shows are in the store.",
        table(["Notebook", "Finished (UTC)", "Seconds"], executed),
        "## Runs",
        f"The notebooks read {len(runs)} runs: {clock(trained)} of training and {clock(evaluated)} of "
        "evaluation during training (h:mm:ss or m:ss, summed over processes). "
        "Seconds per run; peak memory of the process in GiB.",
        ":::{dropdown} All runs",
        table(["Run", "Encoder", "What", "Seed", "Training", "Evaluation", "Memory"], described),
        ":::",
        "## Versions",
        table(["Package", "Version"], versions().items()),
        "## Profile",
        ":::{dropdown} All values of the profile",
        f"```yaml\n{values}```",
        ":::",
    ]
    return "\n\n".join(parts) + "\n"
