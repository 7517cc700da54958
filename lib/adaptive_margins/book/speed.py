"""The book's page on speed: ratios to peers, growth and learning curves, all read from ``benchmarks/*.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from adaptive_margins.book.context import markdown_table
from adaptive_margins.book.figures import GREY, WIDTH, drawing
from adaptive_margins.book.style import encoder_label, measure_label, style
from adaptive_margins.files import whole_file, write_text

FIGURE = "growth.png"


def page(benchmarks: Path) -> str:
    """A page of MyST Markdown.

    Args:
        benchmarks: the folder with ``latest.json`` (ratios), ``profile.json`` (what a step spends its time on), ``growth.json``
            and ``curves.json``.
    """
    latest, profile, growth, curves = (
        _read(benchmarks / f"{n}.json") for n in ("latest", "profile", "growth", "curves")
    )
    latest.sort(key=_kind)
    settings = list(dict.fromkeys(row["setting"] for row in latest))
    parts = [
        "# Speed",
        "The paper is about cost, so here is what this project's code costs. Every figure is a **ratio** measured in one process,"
        " the two sides in turns: the median of the rounds, its quartiles in brackets. Above 1 is in this project's favour."
        " `make bench` measures the first ones again in less than ten minutes, `make bench-full` the rest; what was tried and"
        " left out stands in `benchmarks/NOTES.md`.",
        f"Measured on: {'; '.join(_machines([*latest, *profile, *growth]))}.",
        "## Against peers",
        *(part for setting in settings for part in _ratios(setting, latest)),
        "## Where a step goes",
        "A profile of one step of this project's, in per cent of its time:",
        _profile(profile),
        "## Growth",
        "One measurement a size. The exponent is the slope of a straight line through the logarithms: 1 is growth in proportion.",
        f"```{{figure}} images/{FIGURE}\n:alt: Six small plots on logarithmic axes; the exponents are in the table below.\n"
        "How training, encoding and ranking grow.\n```",
        markdown_table(
            ["What", "From … to", "Exponent", "Setting"],
            [
                [
                    f"{g['name']} ({g['unit']})",
                    f"{g['sizes'][0]:,} … {g['sizes'][-1]:,} {g['size_unit']}",
                    _exponent(g),
                    g["setting"],
                ]
                for g in growth
            ],
        ),
        "## The same curves",
        "Before: every column padded, one forward each (code version 2). After: texts deduplicated and packed end to end"
        f" (code version {curves['code_version']}), which changes rounding only. The best validation score of each encoder and"
        " target on the laptop profile, runs with other seeds or ε pooled:",
        _curves(curves["rows"]),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def figure(growth: list[dict[str, Any]]) -> Figure:
    """One panel a quantity of growth.json: value by size on logarithmic axes, with the fitted line."""
    columns = 2
    rows = -(-len(growth) // columns)
    with drawing():
        drawn, axes = plt.subplots(
            rows, columns, figsize=(WIDTH, 2.1 * rows), layout="constrained", squeeze=False
        )
        for ax, g in zip(axes.flat, growth, strict=False):
            sizes, values = np.array(g["sizes"], float), np.array(g["values"], float)
            level = np.exp(np.mean(np.log(values) - g["exponent"] * np.log(sizes)))
            ax.plot(sizes, level * sizes ** g["exponent"], color=GREY, linewidth=0.8, linestyle=":")
            ax.plot(sizes, values, marker="o", color=style("minilm-3").color)
            ax.set(xscale="log", yscale="log", xlabel=g["size_unit"], ylabel=g["unit"])
            # The measured sizes, and the least and the most: a short logarithmic axis has too few ticks of its own, or too many.
            ax.xaxis.set_major_locator(FixedLocator(sizes))
            ax.yaxis.set_major_locator(FixedLocator([values.min(), values.max()]))
            for axis in (ax.xaxis, ax.yaxis):
                axis.set_minor_locator(NullLocator())
                axis.set_major_formatter(lambda x, _: f"{x:,.0f}" if x >= 1000 else f"{x:.3g}")
            ax.set_title(f"{g['name']}: exponent {_exponent(g)}", loc="left")
        for ax in axes.flat[len(growth) :]:
            ax.set_axis_off()
    return drawn


def write(benchmarks: Path, folder: Path) -> None:
    """Write ``speed.md`` and its figure into ``folder``."""
    drawn = figure(_read(benchmarks / "growth.json"))
    (folder / "images").mkdir(parents=True, exist_ok=True)
    with whole_file(folder / "images" / FIGURE) as partial:
        drawn.savefig(partial, format="png", metadata={"Software": None})
    write_text(folder / "speed.md", page(benchmarks))


_KINDS = ("training", "share", "encoding", "reranking", "peak memory", "a run", "margin_loss")
"""How the names of ratios begin, in the order of the page."""


def _kind(row: dict[str, Any]) -> int:
    kinds = (i for i, kind in enumerate(_KINDS) if row["name"].startswith(kind))
    return next(kinds, len(_KINDS))


def _ratios(setting: str, latest: list[dict[str, Any]]) -> list[str]:
    rows = [
        [
            r["name"],
            f"**{r['ratio']:.2f}** [{r['spread'][0]:.2f}, {r['spread'][1]:.2f}]",
            f"{r['ours']:.3g}",
            f"{r['peer']:.3g}",
            r["unit"],
        ]
        for r in latest
        if r["setting"] == setting
    ]
    return [
        f"### {setting}",
        markdown_table(["This project / peer", "Ratio", "Ours", "Peer", "Unit"], rows),
    ]


def _profile(rows: list[dict[str, Any]]) -> str:
    spent = [r["seconds"] for r in rows]
    totals = [sum(seconds.values()) for seconds in spent]
    lines = [
        [group, *(f"{100 * s[group] / total:.0f}" for s, total in zip(spent, totals, strict=True))]
        for group in spent[0]
    ]
    last = ["**all, in seconds**", *(f"{total:.2f}" for total in totals)]
    return markdown_table(["Kind of work", *(r["setting"] for r in rows)], [*lines, last])


def _curves(rows: list[dict[str, Any]]) -> str:
    return markdown_table(
        ["Encoder", "Target", "Batch", "Measure", "Before", "After", "Runs"],
        [
            [
                encoder_label(r["encoder"]),
                f"{r['target']}, in-batch" if r["in_batch"] else r["target"],
                r["batch_size"],
                measure_label(r["measure"]),
                f"{r['before']:.4f}",
                f"{r['after']:.4f}",
                r["runs"],
            ]
            for r in rows
        ],
    )


def _exponent(row: dict[str, Any]) -> str:
    return f"{round(row['exponent'], 2) + 0.0:.2f}"  # no minus before a zero


def _machines(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(f"{row['machine']}, {row['date']}" for row in rows))


def _read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))
