"""Tables of HTML cells as LaTeX with booktabs."""

from __future__ import annotations

import re
from html import unescape

import pandas as pd

_TAGS = {"strong": r"\textbf{", "u": r"\underline{", "i": r"\textit{"}
_TAGS |= {"sup": r"\textsuperscript{", "sub": r"\textsubscript{"}
_MATHS = {"✓": r"\checkmark", "✗": r"\times", "−": "-", "≈": r"\approx", "±": r"\pm"}
_MATHS |= {"ε": r"\varepsilon", "ρ": r"\rho", "φ": r"\varphi", "²": "^2", "⁺": "^+", "⁻": "^-"}
_TEXTS = {"\\": "textbackslash", "~": "textasciitilde", "^": "textasciicircum", "†": "dag"}
_TEXTS |= {"‡": "ddag", "…": "dots"}
_CHARACTERS = {c: f"\\{c}" for c in "&%$#_{}"} | {"№": "No.", "—": "---"}
_CHARACTERS |= {c: f"${maths}$" for c, maths in _MATHS.items()}
_CHARACTERS |= {c: f"\\{name}{{}}" for c, name in _TEXTS.items()}


def table(cells: pd.DataFrame, caption: str) -> str:
    """A table environment; the index of ``cells`` has the row headings. It needs the packages
    booktabs and amssymb.
    """
    count = cells.index.nlevels
    frame = cells.reset_index(col_level=-1)
    heads = frame.iloc[:, :count]
    if count > 1:  # a heading is not repeated below itself
        same = heads.eq(heads.shift()).cummin(axis=1)
        frame.iloc[:, :count] = heads.mask(same, "")
    wide = ["p{6cm}" if name == "Text" else "r" for name in frame.columns.get_level_values(-1)]
    styler = frame.map(latex).style.hide(axis="index").format_index(latex, axis="columns")
    text = styler.to_latex(
        hrules=True,
        multicol_align="c",
        column_format="l" * count + "".join(wide[count:]),
        caption=latex(caption),
        position="htbp",
        position_float="centering",
    )
    if count == 1:
        return text
    head, rule, body = text.partition("\\midrule")  # a rule above each group of rows
    return head + rule + re.sub(r"(?<=\\\\\n)(?=[^ \\&])", r"\\midrule\n", body)


def latex(html: object) -> str:
    """A cell without what it opens to and its small print."""
    html = re.sub(r"<small>.*?</small>|<details>.*</details>", "", str(html), flags=re.DOTALL)
    found = []
    for part in re.split(r"(<[^>]+>)", html):
        if tag := re.match(r"<(/?)(\w+)", part):
            end, name = tag.groups()
            found.append("" if name not in _TAGS else "}" if end else _TAGS[name])
        else:
            found.append("".join(_CHARACTERS.get(c, c) for c in unescape(part)))
    return "".join(found)
