"""The pages that the build writes next to the notebooks, as text: cover, data sheet, provenance.

Every number on them is read from an artefact: the tables' CSV files, receipts, the store.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from adaptive_margins.book import claims, describe, edition, figures, released_code
from adaptive_margins.book.claim_statistics import variants
from adaptive_margins.book.render import render
from adaptive_margins.book.style import measure_labels
from adaptive_margins.paper import Reproduction
from adaptive_margins.paper.out_of_domain import FOLDER
from adaptive_margins.paper.runner import describe as describe_run
from adaptive_margins.paper.store import StoredRun, package_versions
from adaptive_margins.profiles.config import Profile
from adaptive_margins.profiles.load import available, load_profile
from adaptive_margins.progress import clock

LONG = "07_paper_and_released_code"
"""The notebook that is executed only when asked for; else its page is a committed summary."""

OWN = "10_your_collection"
"""The notebook that is no page of the book: it takes a collection, not a profile."""

SUMMARY = "paper_and_released_code.json"
"""Summary of `LONG`: committed in ``book/``, written to ``book/_executed`` when executed."""

STORES = ("runs", FOLDER)
"""Folders of runs in the home folder."""

Receipts = Mapping[str, Mapping[str, Any]]
"""Notebook (without suffix) → its receipt, as `build` writes it."""


def texts(home: Path, profile: Profile, receipts: Receipts, summary: Path) -> dict[str, str]:
    """File name below ``HOME/book/_executed`` → its text; ``summary``: the committed `SUMMARY`."""
    folder = home / "book" / "_executed"
    table4 = folder / "data" / "table4.csv"
    read = {run_id for receipt in receipts.values() for run_id in receipt.get("results", ())}
    runs: list[StoredRun] = [
        StoredRun(home / store / run_id)
        for store in STORES
        for run_id in sorted(read)
        if (home / store / run_id).is_dir()
    ]
    found = {
        **tested(profile, folder / "data"),
        "cover.md": cover(profile, table4 if table4.is_file() else None),
        "datasheet.md": describe.profile_datasheet(Reproduction(profile, home)),
        "provenance.md": provenance(profile, receipts, runs),
    }
    if LONG in receipts:
        frames, receipt = edition.read(folder / "data"), receipts[LONG]
        about = receipt["machine"], receipt["finished"], profile.name
        written = released_code.summary(frames, *about)
        found[SUMMARY] = json.dumps(written, indent=1, ensure_ascii=False) + "\n"
    else:
        committed = json.loads(summary.read_text("utf-8"))
        found[f"{LONG}.md"] = released_code.summary_page(committed)
        compared = pd.DataFrame(committed["compared"])
        found["data/paper_and_released_code.csv"] = compared.to_csv(index=False)
    return found


def values(source: Path) -> dict[str, Any]:
    """What ``{{ profiles.laptop.lengths.query }}`` and the like on pages of ``source`` stand for.

    ``profiles``: settings of the packaged profiles; ``measured``: ``book/measured.yaml``.
    """
    measured = yaml.safe_load((source / "book" / "measured.yaml").read_text("utf-8"))
    profiles = {name: load_profile(name).model_dump(mode="json") for name in available()}
    return {"profiles": profiles, "measured": measured}


def versions() -> dict[str, str]:
    """Python and every direct dependency, the installed FAISS included → version."""
    named = importlib.metadata.requires("adaptive-margins") or []
    names = [re.split(r"[^\w.-]", line)[0] for line in named if "extra ==" not in line]
    found = package_versions([*names, "faiss-cpu", "faiss-gpu-cu12", "faiss"])
    return {"Python": platform.python_version(), **found}


def cover(profile: Profile, table4: Path | None) -> str:
    """What the front page shows of this edition: the profile, and the scores of Table 4."""
    if table4 is None:
        return render("cover.md", profile=profile, scores=None)
    frame = pd.read_csv(table4, keep_default_na=False, na_values=[""])
    frame = frame[~frame["source"].str.startswith("supplied")]
    frame = frame.assign(
        Loss=variants(frame).str.replace(" in-batch", ", in-batch"),
        column=frame["measure"].map(measure_labels(frame["measure"])) + ", " + frame["set"],
        cell=frame["value"].map("{:.3f}".format),
    )
    rows, columns = frame["Loss"].unique(), frame["column"].unique()
    scores = frame.pivot_table("cell", "Loss", "column", aggfunc="last").loc[rows, columns]
    return render("cover.md", profile=profile, scores=scores.reset_index())


def tested(profile: Profile, data: Path) -> dict[str, str]:
    """``answer.md``, ``claims.md`` and two ``.svg`` for the front page; from ``data/claims_*.csv``.

    Committed results of a longer profile (`edition`) decide, if there are any.
    """
    found = {}
    if long := edition.committed(profile.name):
        found[edition.LONG[profile.name]] = long["claims"]
    here = [frame for name, frame in edition.read(data).items() if name.startswith("claims_")]
    if here:
        found[profile.name] = pd.concat(here)
    values = {"profiles": list(found), "long": edition.LONG.get(profile.name, "")}
    rows = claims.overview(found) if found else []
    answers = claims.answers(found) if found else []
    drawn = {}
    for name, narrow in (("claims", False), ("claims_narrow", True)) if found else ():
        if figure := claims.figure(next(iter(found.values())), narrow=narrow):
            drawn[f"{name}.svg"] = figures.svg(figure, name)
    return {
        "answer.md": render("answer.md", answers=answers, drawn=bool(drawn), **values),
        "claims.md": render("claims.md", rows=rows, **values),
        **drawn,
    }


def provenance(profile: Profile, receipts: Receipts, runs: Iterable[StoredRun]) -> str:
    """Where the numbers come from: machine, versions, times, fingerprints, profile."""
    rows, inputs, trained, evaluated = [], {("profile", profile.name)}, 0.0, 0.0
    runs = list(runs)
    whose = [run.provenance for run in runs if run.provenance]
    elsewhere = Counter(f"{w.get('source')}, by: {w.get('by', 'not stated')}" for w in whose)
    for run in runs:
        config, result = run.config, run.result
        inputs.add(("collection", config.collection))
        inputs.add((f"encoder {config.encoder}", getattr(config, "weights", "")))
        trained += result["train_seconds"]
        evaluated += result["eval_seconds"]
        memory = result["peak_bytes"]
        rows.append(
            {
                "Run": run.run_id,
                "Encoder": config.encoder,
                "What": describe_run(config),
                "Seed": str(getattr(config, "seed", "")),
                "Training": f"{result['train_seconds']:.1f}",
                "Evaluation": f"{result['eval_seconds']:.1f}",
                "Memory": f"{memory / 2**30:.2f}" if memory else "",
            }
        )
    executed = {name: r for name, r in receipts.items() if "finished" in r}
    machines = {tuple(receipt["machine"].items()) for receipt in executed.values()}
    values = profile.model_dump(mode="json", exclude={"notes"})
    by = ["Encoder", "What", "Seed"]
    return render(
        "provenance.md",
        inputs=pd.DataFrame(sorted(i for i in inputs if i[1]), columns=["What", "Fingerprint"]),
        machines=[
            pd.DataFrame([(k.capitalize(), str(v)) for k, v in items], columns=["What", "Value"])
            for items in sorted(machines)
        ],
        notebooks=pd.DataFrame(
            [(name, r["finished"], f"{r['seconds']:.1f}") for name, r in executed.items()],
            columns=["Notebook", "Finished (UTC)", "Seconds"],
        ),
        runs=pd.DataFrame(rows, columns=list(rows[0]) if rows else by).sort_values(by),
        elsewhere=elsewhere,
        trained=clock(trained),
        evaluated=clock(evaluated),
        versions=pd.DataFrame(versions().items(), columns=["Package", "Version"]),
        values=yaml.safe_dump(values, sort_keys=False, allow_unicode=True),
    )
