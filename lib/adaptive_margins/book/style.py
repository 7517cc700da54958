"""How an encoder and a measure are written and drawn, and labels that do not cover each other."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from operator import itemgetter
from zlib import crc32

import numpy as np
import pandas as pd
from matplotlib import color_sequences
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.patheffects import withStroke

SMALL = 8.0  # points

_BLACK, _ORANGE, _SKY, _GREEN, _YELLOW, _BLUE, _VERMILION, _PURPLE = (
    to_hex(color) for color in color_sequences["okabe_ito"]
)
_COLORS = (_BLUE, _VERMILION, _GREEN, _PURPLE, _ORANGE, _SKY)  # black and yellow: see design
_STYLES = {
    "minilm-3": (_BLUE, "o"),
    "minilm-4": (_VERMILION, "s"),
    "minilm-5": (_GREEN, "^"),
    "distilbert": (_PURPLE, "D"),
    "roberta": (_ORANGE, "v"),
    "mpnet": (_SKY, "P"),
}
_NAMES = {"minilm": "MiniLM", "distilbert": "distilBERT", "roberta": "RoBERTa", "mpnet": "MPNet"}


@dataclass(frozen=True)
class Style:
    """How an encoder is drawn: colour as #rrggbb and a matplotlib marker."""

    color: str
    marker: str

    @property
    def text(self) -> str:
        """The colour, darkened until text in it has a contrast of 4.5 on white (WCAG AA)."""
        rgb = np.array(to_rgb(self.color))
        while _contrast_on_white(rgb) < 4.5:
            rgb = rgb * 0.95
        return to_hex(rgb.tolist())


def _contrast_on_white(rgb: np.ndarray) -> float:
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return float(1.05 / (linear @ [0.2126, 0.7152, 0.0722] + 0.05))


def style(encoder: str) -> Style:
    """Colour and marker of an encoder: the same in every figure, run and process, for any name."""
    known = _STYLES.get(encoder.lower())
    if known:
        return Style(*known)
    markers = ("X", "p", "<", ">", "h", "*")  # none of a known encoder
    colour, marker = divmod(crc32(encoder.encode()) % (len(_COLORS) * len(markers)), len(markers))
    return Style(_COLORS[colour], markers[marker])


def require(data: pd.DataFrame, columns: Iterable[str], name: str) -> None:
    """Raise ValueError, naming what is missing, unless ``data`` has rows and all ``columns``."""
    missing = [column for column in columns if column not in data]
    if missing:
        raise ValueError(f"{name}: columns {missing} are missing, got {list(data.columns)}")
    if data.empty:
        raise ValueError(f"{name}: the frame has no rows")


def encoder_label(encoder: str, labels: Mapping[str, str] | None = None) -> str:
    """How an encoder is written (minilm-4 is MiniLM-4); ``labels`` goes first, an unknown name stays as it is."""
    if labels and encoder in labels:
        return labels[encoder]
    family, dash, rest = encoder.partition("-")
    return _NAMES.get(family.lower(), family) + dash + rest


def measure_label(measure: str) -> str:
    """How the paper writes a measure given in ir_measures' notation: Success(rel=2)@5 is Hits@5."""
    return re.sub(r"\([^)]*\)", "", measure).replace("Success@", "Hits@")


def score(value: float) -> str:
    """A score in [0, 1] with three decimals and no leading zero: .512."""
    return f"{value:.3f}".removeprefix("0")


def signed(value: float, decimals: int = 3) -> str:
    """A difference: +.031, −.012, or .000 for what rounds to it."""
    text = f"{value:+.{decimals}f}".replace("-", "−").replace("+0.", "+.").replace("−0.", "−.")
    return text if text.strip("+−.0") else text[1:]


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions at least ``gap`` apart within [low, high], moved as little as possible.

    Least squares by isotonic regression (pool adjacent violators). Where [low, high] is too short,
    the gap shrinks. Returned in the order of ``wanted``.
    """
    count = len(wanted)
    if not count:
        return []
    gap = min(gap, (high - low) / max(count - 1, 1))
    order = np.argsort(wanted, kind="stable")
    blocks: list[tuple[float, int]] = []  # mean, size
    for rank, index in enumerate(order):
        blocks.append((wanted[index] - rank * gap, 1))
        while len(blocks) > 1 and blocks[-2][0] >= blocks[-1][0]:
            (a, n), (b, m) = blocks[-2:]
            blocks[-2:] = [((a * n + b * m) / (n + m), n + m)]
    level = np.clip(
        np.repeat([b[0] for b in blocks], [b[1] for b in blocks]), low, high - (count - 1) * gap
    )
    placed = np.empty(count)
    placed[order] = level + gap * np.arange(count)
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
        axis.annotate(
            "",
            xy=(1, at / points),
            xytext=(9, label_at - at),
            xycoords="axes fraction",
            textcoords="offset points",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": end.color,
                "linewidth": 0.7,
                "shrinkA": 0,
                "shrinkB": 2,
            },
        )
        axis.annotate(
            end.text,
            xy=(1, label_at / points),
            xytext=(11, 0),
            xycoords="axes fraction",
            textcoords="offset points",
            va="center",
            fontsize=SMALL,
            color=end.color,
            annotation_clip=False,
            gid="end",
        )


def value_labels(axis: Axes, dots: Sequence[tuple[float, float, str]]) -> None:
    """Write the value of each maximum (x, y, colour) where it covers no other mark, if it can."""
    if not dots:
        return
    pixel = axis.figure.dpi / 72
    frame = axis.get_window_extent()
    lines = [
        axis.transData.transform(np.column_stack(line.get_data()).astype(float))
        for line in axis.get_lines()
        if str(line.get_gid() or "").startswith("curve")
    ]
    fine = np.linspace(0, 1, 12)[:, None]
    ink = np.concatenate(
        [a + (b - a) * fine for line in lines for a, b in pairwise(line)] or [np.empty((0, 2))]
    )
    centres = axis.transData.transform([(x, y) for x, y, _ in dots])
    taken = [np.array([*(c - 4 * pixel), *(c + 4 * pixel)]) for c in centres]
    half = np.array([1.32 * SMALL, 0.5 * SMALL]) * pixel  # half the size of ".512"
    around = [
        (1.6 * far * across, far * up)
        for far in (9.0, 13.0, 18.0)
        for across, up in product((0, -1, 1), (1, -1, 0))
        if across or up
    ]

    def cost(box: np.ndarray, offset: tuple[float, float], centre: np.ndarray) -> float:
        overlaps: float = sum(
            max(0.0, min(box[2], t[2]) - max(box[0], t[0]))
            * max(0.0, min(box[3], t[3]) - max(box[1], t[1]))
            for t in taken
        )
        # Ink under the label, and between it and its mark, which would seem to belong to another.
        low, high = np.minimum(box[:2], centre), np.maximum(box[2:], centre)
        near = np.hypot(*(ink - centre).T) < 5 * pixel
        under = ((ink > low) & (ink < high)).all(axis=1)[~near].sum()
        out = box[0] < frame.x0 or box[2] > frame.x1 or box[1] < frame.y0 or box[3] > frame.y1
        return 100 * overlaps + 4 * float(under) + 1e6 * out + float(np.hypot(*offset))

    for index in np.argsort(-centres[:, 1], kind="stable"):
        boxes = []
        for offset in around:
            middle = centres[index] + np.array(offset) * pixel
            box = np.concatenate([middle - half, middle + half])
            boxes.append((cost(box, offset, centres[index]), offset, box))
        _, offset, box = min(boxes, key=itemgetter(0))
        taken.append(box)
        x, y, color = dots[index]
        axis.annotate(
            score(y),
            xy=(x, y),
            xytext=offset,
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=SMALL,
            fontweight="bold",
            color=color,
            zorder=6,
            path_effects=[withStroke(linewidth=2, foreground="white")],
            gid="value",
        )
