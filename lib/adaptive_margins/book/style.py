"""How an encoder and a measure are written and drawn, and labels that do not cover each other."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from zlib import crc32

import numpy as np
from matplotlib import color_sequences
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.patheffects import withStroke
from scipy.optimize import isotonic_regression

SMALL = 8.0  # points

OKABE_ITO = [to_hex(color) for color in color_sequences["okabe_ito"]]
BLACK, ORANGE, SKY, GREEN, _, BLUE, VERMILION, PURPLE = OKABE_ITO
_COLORS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
_OF_TEXT = dict(
    zip(_COLORS, ["#0072b2", "#c05500", "#00815e", "#9e5e81", "#996900", "#39779b"], strict=True)
)
_KNOWN = ("minilm-3", "minilm-4", "minilm-5", "distilbert", "roberta", "mpnet")
_STYLES = dict(zip(_KNOWN, zip(_COLORS, "os^DvP", strict=True), strict=True))
_NAMES = {"minilm": "MiniLM", "distilbert": "distilBERT", "roberta": "RoBERTa", "mpnet": "MPNet"}


@dataclass(frozen=True)
class Style:
    """How an encoder is drawn: colour as #rrggbb and a matplotlib marker."""

    color: str
    marker: str

    @property
    def text(self) -> str:
        """The colour of text: darker, with a contrast of 4.5 on white (WCAG AA)."""
        return _OF_TEXT[self.color]


def style(encoder: str) -> Style:
    """Colour and marker of an encoder: the same in every figure, run and process, for any name."""
    known = _STYLES.get(encoder.lower())
    if known:
        return Style(*known)
    markers = ("X", "p", "<", ">", "h", "*")  # none of a known encoder
    colour, marker = divmod(crc32(encoder.encode()) % (len(_COLORS) * len(markers)), len(markers))
    return Style(_COLORS[colour], markers[marker])


def encoder_label(encoder: str) -> str:
    """How an encoder is written: minilm-4 is MiniLM-4."""
    family, dash, rest = encoder.partition("-")
    return _NAMES.get(family.lower(), family) + dash + rest


def measure_label(measure: str) -> str:
    """How the paper writes a measure given in ir_measures' notation: Success(rel=2)@5 is Hits@5."""
    return re.sub(r"\([^)]*\)", "", measure).replace("Success@", "Hits@")


def measure_labels(measures: Iterable[str]) -> dict[str, str]:
    """Measure → `measure_label`, or its full notation where another measure has the same label."""
    labels = {measure: measure_label(measure) for measure in measures}
    count = Counter(labels.values())
    return {m: label if count[label] == 1 else m for m, label in labels.items()}


def score(value: float) -> str:
    """A score in [0, 1] with three decimals and no leading zero: .512."""
    return f"{value:.3f}".removeprefix("0")


def signed(value: float, decimals: int = 3) -> str:
    """A difference: +.031, −.012, or .000 for what rounds to it."""
    text = f"{value:+.{decimals}f}".replace("-", "−").replace("+0.", "+.").replace("−0.", "−.")
    return text if text.strip("+−.0") else text[1:]


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions at least ``gap`` apart within [low, high], moved least (least squares).

    Where [low, high] is too short, the gap shrinks. Returned in the order of ``wanted``.
    """
    count = len(wanted)
    if not count:
        return []
    gap = min(gap, (high - low) / max(count - 1, 1))
    order, steps = np.argsort(wanted, kind="stable"), gap * np.arange(count)
    level = isotonic_regression(np.asarray(wanted, dtype=float)[order] - steps).x
    placed = np.empty(count)
    placed[order] = np.clip(level, low, high - steps[-1]) + steps
    return placed.tolist()


@dataclass(frozen=True)
class End:
    """A label at the end of a line."""

    y: float
    text: str
    color: str


def end_labels(axis: Axes, ends: Sequence[End]) -> None:
    """Write labels right of the axes, nudged apart, each with a leader from its height."""
    points = axis.get_window_extent().height * 72 / axis.figure.dpi
    low, high = axis.get_ylim()
    wanted = [(end.y - low) / (high - low) * points for end in ends]
    for end, at, label_at in zip(ends, wanted, spread(wanted, SMALL * 1.3, 0, points), strict=True):
        leader = {
            "arrowstyle": "-",
            "color": end.color,
            "linewidth": 0.7,
            "shrinkA": 0,
            "shrinkB": 2,
        }
        common: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points"}
        common["annotation_clip"] = False
        axis.annotate(
            "", xy=(1, at / points), xytext=(9, label_at - at), arrowprops=leader, **common
        )
        text = {"va": "center", "fontsize": SMALL, "color": end.color, "gid": "end", **common}
        axis.annotate(end.text, xy=(1, label_at / points), xytext=(11, 0), **text)


def value_labels(axis: Axes, maxima: Sequence[tuple[float, float, str]]) -> None:
    """Write the value of each maximum (x, y, colour) next to it: on no line, no mark and no other
    label, and never above the label of a higher value. Limits must be final.
    """
    points = 72 / axis.figure.dpi
    frame = axis.get_window_extent()
    corners = np.array([[frame.x0, frame.y0], [frame.x1, frame.y1]]) * points
    lines = np.vstack(
        [_dense(line.get_transform(), line.get_xydata()) for line in axis.get_lines()]
    )
    white, taken = [withStroke(linewidth=2, foreground="white")], np.empty((0, 2))
    look: dict[str, Any] = {"fontsize": SMALL, "fontweight": "bold", "zorder": 6, "gid": "value"}
    look |= {"ha": "center", "va": "center", "textcoords": "offset points", "path_effects": white}
    for x, y, color in sorted(maxima, key=lambda maximum: -maximum[1]):
        place = axis.transData.transform((x, y)) * points
        offset = _free_place(place, lines * points, taken, corners)
        taken = np.vstack([taken, place + offset])
        axis.annotate(score(y), (x, y), offset, color=color, **look)
        if np.hypot(*offset) > 2.5 * SMALL:
            leader = {"arrowstyle": "-", "color": color, "linewidth": 0.6, "shrinkB": 4}
            axis.annotate("", (x, y), 0.75 * offset, textcoords="offset points", arrowprops=leader)


_LABEL = np.array([2.9, 1.2]) * SMALL
"""Width and height of a value, in points, with a margin."""


def _dense(transform: Any, path: Any) -> np.ndarray:
    """Points on a line, a few apart, in pixels."""
    ends = transform.transform(np.asarray(path, dtype=float))
    return np.vstack([ends[-1:], *(np.linspace(a, b, 60) for a, b in pairwise(ends))])


def _free_place(
    place: np.ndarray, lines: np.ndarray, taken: np.ndarray, corners: np.ndarray
) -> np.ndarray:
    """The nearest offset at which a value covers nothing, or as little as possible."""
    grid = np.stack(np.meshgrid(np.arange(-5, 5.1, 0.5), np.arange(-6, 6.1, 0.3)), axis=-1)
    offsets = grid.reshape(-1, 2) * SMALL
    at = place + offsets
    reach = abs(offsets).max(axis=0) + _LABEL
    lines = lines[(abs(lines - place) < reach).all(axis=1)]
    hidden = (abs(at[:, None] - lines) < (_LABEL + 2) / 2).all(axis=2).sum(axis=1)
    mark = (abs(offsets) < (_LABEL + 9) / 2).all(axis=1)
    apart = abs(at[:, None] - taken)
    labels = (apart < _LABEL).all(axis=2).any(axis=1)
    above = ((apart[..., 0] < 2.5 * _LABEL[0]) & (at[:, None, 1] > taken[:, 1] - SMALL / 2)).any(
        axis=1
    )
    outside = ((at - _LABEL / 2 < corners[0]) | (at + _LABEL / 2 > corners[1])).any(axis=1)
    far = np.hypot(*offsets.T) - 0.3 * SMALL * (offsets[:, 1] > 0)
    cost = far + 40 * (hidden > 0) + hidden + 1e3 * mark + 1e4 * (labels | above | outside)
    return np.asarray(offsets[cost.argmin()])
