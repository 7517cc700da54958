"""Figures and tables as notebooks show them: with their runs, notes and downloads.

HTML has a figure as SVG whose points lead to their runs; LaTeX gets a PNG.
"""

from __future__ import annotations

import base64
import gzip
import re
import shlex
from html import escape
from io import BytesIO
from typing import Any

import pandas as pd
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from adaptive_margins.book import figures, tables
from adaptive_margins.book.render import Shown, data_uri, render
from adaptive_margins.book.style import encoder_label, measure_label, score
from adaptive_margins.paper import Reproduction
from adaptive_margins.paper.frames import external_runs
from adaptive_margins.paper.runner import describe
from adaptive_margins.paper.store import StoredRun
from adaptive_margins.profiles.load import available

# --- figures --------------------------------------------------------------------------------------


def figure(reproduction: Reproduction, drawn: Figure, data: pd.DataFrame, name: str) -> Shown:
    """A figure drawn from a frame with ids of runs, with the facts that its caption cannot have.

    ``name`` names its files, and the places to which its points lead.
    """
    text, runs = _note(reproduction, data), []
    for run_id in data["run_id"].unique():
        run: StoredRun[Any] = StoredRun(reproduction.store.folder / run_id)
        what = f"{encoder_label(run.config.encoder)}, {describe(run.config)}"
        command, *_ = commands(reproduction, run_id)
        runs.append({"id": run_id, "what": f"{what}, seed {run.config.seed}", "command": command})
    html = render(
        "figure.html",
        name=name,
        svg=svg(drawn, name),
        note=text,
        runs=runs,
        csv=data_uri(data.to_csv(index=False).encode(), "text/csv"),
        png=data_uri(image := png(drawn, text), "image/png"),
    )
    return Shown(html, **{"image/png": base64.b64encode(image).decode()})


def svg(drawn: Figure, name: str) -> str:
    """A figure as SVG for HTML: text is text, points are links to ``#NAME-RUN``."""
    text = re.sub(r"^.*?<svg ", "<svg ", figures.svg(drawn, name), count=1, flags=re.DOTALL)
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="(column-\d+|yaxis|xlabel)"', r'<g class="am-\1"', text)  # for shown.js
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # not unique, and nothing refers to them
    link = rf'<a class="am-point" href="#{name}-\1" aria-label="\2"><title>\2</title>'
    text = re.sub(r'<a xlink:href="#([^"|]*)\|([^"]*)"[^>]*>', link, text)
    label = escape(" ".join(filter(None, map(_words, drawn.axes))))
    text = re.sub(r'width="[^"]*pt" height="[^"]*pt"', "", text, count=1)
    text = text.replace("<svg ", f'<svg role="group" aria-label="{label}" ', 1)
    return re.sub(r"\s*\n\s*", "\n", text)


def png(drawn: Figure, note: str) -> bytes:
    """A figure as PNG, with the note below it."""
    file = BytesIO()
    words = drawn.text(0.01, -0.02, note, va="top", fontsize=7, color=figures.GREY, wrap=True)
    drawn.savefig(file, format="png", dpi=200, bbox_inches="tight")
    words.remove()
    few = Image.open(file).convert("RGB").quantize(256)  # looks the same, in a third
    few.save(small := BytesIO(), format="png", dpi=(200, 200), optimize=True)
    return small.getvalue()


def _words(axis: Axes) -> str:
    """A panel in words: the value of each maximum, or the end of each line of Figure 6."""
    lines = {str(line.get_gid()): line.get_xydata() for line in axis.get_lines()}
    maxima = [(gid.split(" ", 1)[1], at[0]) for gid, at in lines.items() if gid[:8] == "maximum "]
    found = [f"{encoder_label(encoder)} {score(y)} at {x:,g}" for encoder, (x, y) in maxima]
    ends = [(gid, lines[gid][[0, -1], 1]) for gid in ("max", "mean", "min") if gid in lines]
    found += [f"{gid} {first:.2f} to {last:.2f}" for gid, (first, last) in ends]
    title = ", ".join(map(measure_label, str(axis.get_label()).split(" | ")))
    return f"{title}: {'; '.join(found)}." if found else ""


def _note(reproduction: Reproduction, data: pd.DataFrame) -> str:
    """What was measured: rows, queries, candidates, seeds, bands, smoothing."""
    p = reproduction.profile
    if "window" in data:
        one = data.iloc[0]
        part = "all" if one["part"] == "all" else f"the first and last {one['span']}"
        sizes = " and ".join(map(str, data["batch_size"].unique()))
        return (
            f"Batches of {sizes}; rolling mean over {one['window']} batches; {part} batches shown."
        )
    rows = [measure_label(measure) for measure in data["measure"].unique()]
    places = ["Upper row", "lower row"] if len(rows) == 2 else ["Row"] * len(rows)
    queries = len(reproduction.inputs.collection.qrels[p.sets.validation])
    seeds = ", ".join(map(str, sorted(data["seed"].unique())))
    small = "" if data["seed"].nunique() == 1 else " (small marks: the others)"
    return (
        "; ".join(f"{place}: {row}" for place, row in zip(places, rows, strict=True))
        + f". {queries:,} judged queries of {p.sets.validation}, {p.candidates.depth:,} candidates"
        f" reranked, seed {seeds}{small}. Bands: 95 % confidence intervals of the gain over the"
        " zero-shot encoder, paired over the queries."
    )


# --- tables ---------------------------------------------------------------------------------------


def heading(reproduction: Reproduction) -> str:
    """Collection, its fingerprint and the profile, for the caption of a table."""
    collection = reproduction.inputs.collection
    return f"{collection.name} {collection.fingerprint}, profile {reproduction.profile.name}"


def table1(reproduction: Reproduction, data: pd.DataFrame) -> Shown:
    """Table 1 next to the published one."""
    opens = records(reproduction, data)
    return Shown(tables.table1(data, heading=heading(reproduction), opens=opens))


def table2(reproduction: Reproduction, data: pd.DataFrame) -> Shown:
    """Table 2 next to the published one."""
    opens = records(reproduction, data)
    return Shown(tables.table2(data, heading=heading(reproduction), opens=opens))


def table3(reproduction: Reproduction, data: pd.DataFrame) -> Shown:
    """Table 3, then its scores next to the published ones, where there are any to compare with."""
    models = {n: e.published for n, e in reproduction.profile.encoders.items() if e.published}
    supplied = reproduction.table4() if external_runs(reproduction.runner) else None
    about: dict[str, Any] = {"heading": heading(reproduction), "supplied": supplied}
    html = tables.table3(data, opens=records(reproduction, data), **about)
    return Shown(html + tables.compared(data, table=3, models=models, **about))


def table4(reproduction: Reproduction, data: pd.DataFrame) -> Shown:
    """Table 4, then its scores next to the published ones, if the reference encoder is that of the
    paper.
    """
    p = reproduction.profile
    about = f"{heading(reproduction)}, encoder {encoder_label(p.reference_encoder)}"
    html = tables.table4(data, heading=about, opens=records(reproduction, data))
    if p.encoders[p.reference_encoder].published == "distilBERT":
        html += tables.compared(data, table=4, heading=about)
    return Shown(html)


# --- runs -----------------------------------------------------------------------------------------


def records(reproduction: Reproduction, data: pd.DataFrame) -> dict[str, str]:
    """Run id → what its row of a table opens to: commands, configuration, rankings and scores."""
    sets, found = reproduction.profile.sets.tests, {}
    for run_id in filter(None, data["run_id"].unique()):
        run: StoredRun[Any] = StoredRun(reproduction.store.folder / run_id)
        per_query = pd.concat(
            {name: pd.DataFrame(run.evaluation("full", name).per_query) for name in sets},
            names=["set", "qid"],
        )
        values = yaml.safe_dump(run.config.model_dump(mode="json"), sort_keys=False)
        found[run_id] = render(
            "run.html",
            run_id=run_id,
            commands=commands(reproduction, run_id),
            config=values.strip(),
            files=[f"runs/{run_id}/full.{name}.run.gz" for name in sets],
            elsewhere=run.provenance,
            scores=data_uri(
                gzip.compress(per_query.to_csv().encode(), mtime=0), "application/gzip"
            ),
        )
    return found


def commands(reproduction: Reproduction, run_id: str) -> list[str]:
    """Shell commands that compute a run, and that score its full rankings without this project.

    Paths are relative to the folder that has ``collections/`` and ``runs/``.
    """
    p, fingerprint = reproduction.profile, reproduction.inputs.fingerprint
    profile = p.name if p.name in available() else f"{p.name}.yaml"
    lines = [["adaptive-margins", "reproduce", "--profile", profile, "--run", run_id]]
    for name in p.sets.tests:
        qrels = f"collections/{fingerprint}/qrels.{name}.txt"
        ranking = f"runs/{run_id}/full.{name}.run.gz"
        lines.append(["ir_measures", qrels, ranking, " ".join(p.measures.full)])
    return [shlex.join(line) for line in lines]
