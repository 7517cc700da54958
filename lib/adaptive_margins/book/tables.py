"""Tables 1 to 4 of the paper as HTML by pandas Styler: this run's table, then the published one.

They are separate tables, because the collections, encoders and cut-offs differ; `compared` has
those scores that do not. Cells are HTML: texts are escaped where they enter one. The notes are in
``templates/``, the look is in ``book/_static/adaptive_margins.css``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from html import escape
from typing import Any, Literal

import pandas as pd
from pandas.io.formats.style import Styler

from adaptive_margins.book import latex
from adaptive_margins.book.comparison import (
    SUPPLIED,
    comparison,
    in_batch,
    printed_beside,
    printed_scores,
)
from adaptive_margins.book.published import load
from adaptive_margins.book.render import data_uri, render
from adaptive_margins.book.style import encoder_label, measure_label, measure_labels
from adaptive_margins.progress import clock, printable

MARGIN, ALPHA = 0.05, 0.05
NONE, DAGGER = "—", "<sup>†</sup>"
MARKS = {
    r"\*\*(.+)\*\*": r"<strong>\1</strong>",
    r"^_(.+)_$": r"<u>\1</u>",
    "†": DAGGER,
    "^$": NONE,
}
"""Marks in the printed tables, as HTML."""
RHO, T, L2 = "<i>ρ</i>", "<i>t</i>", "<i>l</i>²"
ROLES = {
    "q": "<i>q</i>",
    "d+": "<i>d</i><sup>+</sup>",
    "d-max": "<i>d</i><sup>−</sup><sub>max</sub>",
    "d-mid": "<i>d</i><sup>−</sup><sub>mid</sub>",
    "d-min": "<i>d</i><sup>−</sup><sub>min</sub>",
}
HEADINGS = {
    "model": "Model",
    "parameters": "№ Params",
    "embedding": "Embedding",
    "dimensions": "№ Dim.",
    "role": "",
    "text": "Text",
    "rho": RHO,
    "target": T,
    "loss": L2,
    "in_batch": "In-batch",
    "epsilon": "<i>ε</i><sup>‡</sup>",
    "time": "Time (hh:mm)",
    "triples": "Data seen",
    "block": "",
    "source": "Source",
    "sampling": "Sampling",
}
"""Columns of the printed tables → headings; Tables 3 and 4 have words for target and loss."""
INDEX = {1: ["model"], 2: ["role"], 3: ["model", "target"], 4: ["block", "source", "loss"]}
"""Columns of the printed tables that head their rows."""
LEFT = {"Weights", "Embedding", "Text", "In-batch", "Sampling", "Verdict"}
"""Headings of columns of text, which are aligned left."""
LONG = {"Weights", "Text"}
"""Those of them that hold long texts, which are wrapped."""
Opens = Mapping[str, str] | None
"""Run id → the HTML that its row opens to."""


def table1(data: pd.DataFrame, *, heading: str, opens: Opens = None) -> str:
    """Table 1, the encoders; ``data`` is the frame of ``Reproduction.table1``, a row an encoder.

    ``heading`` ends the caption, here as in the other tables: what this run used.
    """
    cells = pd.DataFrame(
        {
            "Encoder, run": data["encoder"].map(encoder_label).map(escape) + _below(data, opens),
            "Weights": data["base"].map(escape),
            "Parameters": data["parameters"].map(millions),
            "Trained": data["trained"].map(millions),
            "Embedding": data["embedding"].map(escape),
            "Dimensions": data["dimensions"].map("{:.0f}".format),
        }
    )
    return _page(1, cells.set_index("Encoder, run"), data, heading, opens=bool(opens))


def table2(data: pd.DataFrame, *, heading: str, opens: Opens = None) -> str:
    """Table 2, a training instance: relevance ρ, target t and loss of its negatives.

    ``data`` is the frame of ``Reproduction.table2``, a row a text: roles are q, d+, d-max, d-mid,
    d-min; a number that a role does not have is NaN.
    """
    formula = f"({RHO}({ROLES['d+']}) − {RHO}(<i>d</i><sup>−</sup><sub>j</sub>) − {T})²"
    equation = f"{L2} by Equation 3<small>(margin<sub>i</sub> − {T})²</small>"
    cells = pd.DataFrame(
        {
            "": data["role"].map(ROLES),
            "Text": [escape(shorten(text, 160)) for text in data["text"]],
            RHO: [_score(value, 2) for value in data["rho"]],
            T: [_score(value, 2) for value in data["target"]],
            f"{L2} as printed<small>{formula}</small>": data["loss_table"].map(_score),
            equation: data["loss_equation"].map(_score),
        }
    )
    titles = pd.DataFrame({"Text": data["text"].map(escape)})
    (run,) = _below(data[:1], opens)
    facts: dict[str, Any] = {"opens": bool(opens), "run": run, "qid": data["qid"].iloc[0]}
    return _page(2, cells.set_index(""), data, heading, titles, **facts)


def table3(
    data: pd.DataFrame, *, heading: str, opens: Opens = None, supplied: pd.DataFrame | None = None
) -> str:
    """Table 3, every encoder and target in full ranking.

    ``data`` is the frame of ``Reproduction.table3``, a row a run, set and measure. † stands where
    ``equivalent`` is true and the run is not the reference. ``supplied``: the frame of Table 4,
    whose supplied runs replace printed numbers.
    """
    data = data.assign(
        row=data.groupby(["encoder", "target", "in_batch"], sort=False).ngroup(),
        printed=printed_beside(data, 3),
    )
    runs = data.drop_duplicates("row")
    static, swept = runs["target"] == "static", runs["sweep_seconds"] > 0
    margins = "static, <i>ε</i> = " + runs["epsilon"].map("{:g}".format)
    cells, titles = _run_rows(
        data,
        index={
            "Encoder": runs["encoder"].map(encoder_label).map(escape),
            "Target, run": runs["target"].where(~static, margins) + _below(runs, opens),
        },
        before={"In-batch": in_batch(runs)},
        after={
            "Training time": runs["seconds"].map(clock) + swept.map({True: "*", False: ""}),
            "Triples": runs["triples"].map(triples),
        },
    )
    sweeps = "of which the sweep over ε: " + runs["sweep_seconds"].map(clock)
    titles["", "Training time"] = sweeps.where(swept, "").to_numpy()
    facts: dict[str, Any] = {"supplied": supplied, "opens": bool(opens), **_test(data)}
    return _page(3, cells, data, heading, titles, **facts)


def table4(data: pd.DataFrame, *, heading: str, opens: Opens = None) -> str:
    """Table 4, the losses next to baselines; its reference is underlined.

    ``data`` is the frame of ``Reproduction.table4``, a row a run, set and measure. A supplied run
    has the source "supplied: NAME", no run id, and for a value that was refused NaN and the reason
    in the column ``refused``; ``missing`` is the number of judged queries that it lacks. Where NAME
    is the key of a published row, its scores replace the printed ones.
    """
    source = data["source"].astype(str)
    data = data.assign(run_id=data["run_id"].where(~source.str.startswith(SUPPLIED), source))
    keys = ["block", "loss", "in_batch", "run_id"]
    rows = data.groupby(keys, sort=False).ngroup()
    data = data.assign(row=rows, printed=printed_beside(data, 4))
    runs = data.drop_duplicates("row")
    blocks = runs["block"].str[:1].str.upper() + runs["block"].str[1:]
    reference = runs[runs["run_id"] == runs["reference_run_id"]]
    teacher = runs["teacher_seconds"].fillna(0)
    star = (teacher > 0).map({True: "*", False: ""})
    times = runs["seconds"].where(runs["seconds"] > 0).map(clock, na_action="ignore")
    of = runs["source"].astype(str)
    of = ("<small>" + of.map(escape) + "</small>").where(of.str.startswith("as "), "")
    cells, titles = _run_rows(
        data,
        index={"": blocks.map(escape), "Loss, run": runs["loss"].map(escape) + _below(runs, opens)},
        before={"Sampling": runs["sampling"].map(escape) + of, "In-batch": runs["in_batch"]},
        after={"Training time": times.fillna(NONE) + star, "Triples": runs["triples"].map(triples)},
        underline=True,
    )
    of_teacher = "of which the teacher: " + teacher.map(clock)
    titles["", "Training time"] = of_teacher.where(teacher > 0, "").to_numpy()
    return _page(
        4,
        cells,
        data,
        heading,
        titles,
        supplied=data,
        opens=bool(opens),
        reference=", ".join(reference["loss"] + " (" + reference["in_batch"] + ")") or "none",
        teacher=blocks.str.startswith("Teacher").any(),
        limits=_limits(data),
        **_test(data),
    )


# --- this run next to the published numbers -------------------------------------------------------


def compared(data: pd.DataFrame, *, table: Literal[3, 4], heading: str, **options: Any) -> str:
    """`comparison` (which takes the ``options``) as HTML; empty where nothing matches.

    ``heading`` names this run's collection with its fingerprint, so that a small one is not taken
    for the paper's.
    """
    rows = comparison(data, table=table, **options)
    if rows.empty:
        return ""
    names = ["Row of the paper", "In-batch", "Set", "Measure"]
    measures = rows["measure"].map(measure_label)
    columns = [rows["name"].map(escape), rows["in_batch"], rows["set"].map(escape), measures]
    signs = ["+" * (round(difference, 3) > 0) for difference in rows["difference"]]
    cells = pd.DataFrame(
        {
            "Ours": rows["ours"].map(_score),
            "Paper": [
                _computed(row["published"], row["printed"], row["key"])
                if row["supplied"]
                else row["printed"]
                for row in rows.to_dict("records")
            ],
            "Difference": signs + rows["difference"].map(_score),
            "Verdict": rows["verdict"],
        }
    ).set_axis(pd.MultiIndex.from_arrays(columns, names=names))
    what = f"this run beside {load().paper['short']}’s numbers: {heading}"
    return render(
        "compared.html",
        table=_html(cells, table, "compared", what),
        number=len(rows),
        counts=rows["verdict"].value_counts().to_dict(),
    )


# --- printed tables and supplied runs -------------------------------------------------------------


def _printed_table(table: int, supplied: pd.DataFrame | None) -> str:
    """A table as printed, marks included; scores of supplied runs replace printed ones."""
    published = load()
    cells = published.tables[table].map(escape)
    names = HEADINGS | ({"target": "Target", "loss": "Loss"} if table > 2 else {})
    index = INDEX[table]
    if table == 2:
        cells["role"] = cells["role"].map(ROLES)
    if table > 2:
        replaced = printed_scores(table, supplied).dropna(subset="computed")
        for row in replaced.to_dict("records"):
            score = _computed(row["computed"], row["printed"], row["key"]) + "†" * row["tested"]
            cells.loc[row["row"], f"{row['set']} {row['measure']}"] = score
    cells = cells.replace(MARKS, regex=True).set_index(index)
    cells.index.names = [names[column] for column in index]
    cells = cells.drop(columns="key", errors="ignore")
    if table > 2:
        columns = [tuple(c.split(" ", 1)) if "@" in c else ("", names[c]) for c in map(str, cells)]
        cells.columns = pd.MultiIndex.from_tuples(columns)
    else:
        cells = cells.rename(columns=names)
    caption = f"published ({published.paper['short']}): {published.headings[table]}"
    return _html(cells, table, "published", caption)


def _computed(score: float, printed: str, key: str) -> str:
    """A published number that was computed from a supplied run."""
    title = f"printed: {printed}; computed from the supplied run {key}"
    return f'<span class="am-computed" title="{title}">{_score(score)}</span>'


def _limits(data: pd.DataFrame) -> list[str]:
    """What is not reported of supplied runs, and what they lack."""
    texts = []
    for row in data.to_dict("records"):
        where = f"{str(row['source']).removeprefix(SUPPLIED)} on {row['set']}"
        if pd.notna(row.get("refused")) and row["refused"]:
            texts.append(f"{where}: {row['refused']}, so it is not reported.")
        if pd.notna(missing := row.get("missing")) and missing:
            texts.append(f"{where}: judged queries without hits, which count 0: {missing:.0f}.")
    return list(dict.fromkeys(texts))


# --- scores of this run ---------------------------------------------------------------------------


def _run_rows(
    data: pd.DataFrame,
    *,
    index: Mapping[str, pd.Series],
    before: Mapping[str, pd.Series],
    after: Mapping[str, pd.Series],
    underline: bool = False,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Cells and titles, a row for each ``row`` of ``data``; a score for each set and measure."""
    shown = [_score_cell(row, underline) for row in data.to_dict("records")]
    names = ["set", "measure"]
    labels = measure_labels(data["measure"])
    long = data[["row", *names]].assign(measure=data["measure"].map(labels))
    pairs = long[names].drop_duplicates()
    pairs = pairs.sort_values("set", key=lambda sets: pd.factorize(sets)[0], kind="stable")
    cells, titles = (
        long.assign(shown=[both[part] for both in shown])
        .pivot(index="row", columns=names, values="shown")
        .reindex(columns=pd.MultiIndex.from_frame(pairs))
        .fillna(blank)
        for part, blank in ((0, NONE), (1, ""))
    )
    for place, (name, values) in enumerate(before.items()):
        cells.insert(place, ("", name), values.to_numpy())
    for name, values in after.items():
        cells["", name] = values.to_numpy()
    cells.index = pd.MultiIndex.from_arrays(
        [x.to_list() for x in index.values()], names=list(index)
    )
    return cells, titles


def _score_cell(row: Mapping[Any, Any], underline: bool) -> tuple[str, str]:
    """A score (bold if best, † if equivalent) with its confidence interval; and its title."""
    text, title = _score(row["value"]), row.get("refused")
    reference = row["run_id"] == row["reference_run_id"]
    if underline and reference:
        text = f"<u>{text}</u>"
    if row["best"]:
        text = f"<strong>{text}</strong>"
    if not reference and pd.notna(row["low"]):
        ends = f"[{_score(row['low'])}, {_score(row['high'])}]"
        text += DAGGER * bool(row["equivalent"]) + f"<small>{ends}</small>"
        title = f"difference {_score(row['difference'])} to run {row['reference_run_id']}"
        if pd.notna(row["p_adjusted"]):
            title += f", p = {row['p_adjusted']:.2g} after Bonferroni"
    if row["printed"]:
        text += f'<small class="am-printed">{row["printed"]}</small>'
    return text, "" if pd.isna(title) else escape(title)


def _test(data: pd.DataFrame) -> dict[str, Any]:
    """Facts for the note on the equivalence test: comparisons, levels of the intervals, and
    whether a row has several seeds.
    """
    tested = data[(data["run_id"] != data["reference_run_id"]) & data["value"].notna()]
    counts = sorted({int(count) for count in tested["comparisons"].dropna()})
    levels = [f"{100 * (1 - 2 * ALPHA / count):.4g}%" for count in counts]
    seeds = any(len(ids) > 1 for ids in _seeds(data))
    return {"margin": MARGIN, "alpha": ALPHA, "counts": counts, "levels": levels, "seeds": seeds}


# --- texts and HTML -------------------------------------------------------------------------------


def _score(value: Any, decimals: int = 3) -> str:
    return NONE if pd.isna(value) else f"{value:z.{decimals}f}".replace("-", "−")


def millions(count: float) -> str:
    """A number of parameters: 22.7M, or 512 below ten thousand."""
    return f"{count / 1e6:.3g}M" if count >= 1e4 else f"{count:,.0f}"


def triples(count: float) -> str:
    """A number of triples: 1,536 or, from a million on, 5.18M; a dash for none."""
    if pd.isna(count) or count == 0:
        return NONE
    return f"{count / 1e6:.2f}M" if count >= 1e6 else f"{count:,.0f}"


def shorten(text: str, max_chars: int) -> str:
    """The text in one line, truncated after a complete word, marked "[…]" as in the paper."""
    text = printable(" ".join(text.split()))
    if len(text) <= max_chars:
        return text
    return text[: max_chars + 1].rsplit(" ", 1)[0][:max_chars] + " […]"


def _html(
    cells: pd.DataFrame,
    table: int,
    kind: str,
    caption: str,
    titles: pd.DataFrame | None = None,
    data: pd.DataFrame | None = None,
) -> str:
    """A captioned table that scrolls in its box; the index of ``cells`` has the row headings.

    ``data`` is the frame that is offered as CSV, if any.
    """
    depth = cells.index.nlevels
    frame = cells.set_index(pd.RangeIndex(len(cells)), append=True)  # Styler wants unique labels
    names = [column[-1] if isinstance(column, tuple) else column for column in frame]
    frame.columns.names = [""] * frame.columns.nlevels
    caption = escape(f"Paper Table {table}, {caption}")
    styler = Styler(frame, uuid=f"table{table}-{kind}", caption=caption)
    styler.hide(axis="index", level=depth)
    if depth == 1:  # its name goes into the row of the columns' names
        frame.columns.names = [*frame.columns.names[:-1], cells.index.name]
        styler.hide(axis="index", names=True)
    left = {
        c: "am-long" if n in LONG else "am-text"
        for c, n in zip(frame, names, strict=True)
        if n in LEFT
    }
    styler.set_td_classes(pd.DataFrame(left, index=frame.index))
    heading = {name: "text-align: left" for name in LEFT}.get
    styler.map_index(
        lambda name: heading(name, ""), axis="columns", level=frame.columns.nlevels - 1
    )
    if titles is not None:
        styler.set_tooltips(titles.set_index(frame.index), as_title_attribute=True)
    # A phone shows a row as a list: its cells have their headings as text for the style sheet.
    heads = [" ".join(filter(None, c)) if isinstance(c, tuple) else str(c) for c in cells]
    labels = [re.sub(r"<small>.*?</small>|<[^>]*>", "", head) for head in heads]
    styler.set_table_styles(
        [{"selector": f"td.col{i}", "props": [("--label", f'"{x}"')]} for i, x in enumerate(labels)]
    )
    html = styler.set_table_attributes('class="am-table"').to_html()
    box = f'class="am-scroll am-{kind}" role="region" tabindex="0" aria-label="{caption}"'
    downloads = _downloads(table, kind, latex.table(cells, caption), data)
    return f"<div {box}>\n{html}</div>\n{downloads}"


def _downloads(table: int, kind: str, text: str, data: pd.DataFrame | None) -> str:
    links = {"LaTeX": (f"table{table}-{kind}.tex", data_uri(text.encode(), "text/plain"))}
    if data is not None:
        file = data.drop(columns=["row", "printed"], errors="ignore").to_csv(index=False)
        links["CSV"] = (f"table{table}.csv", data_uri(file.encode(), "text/csv"))
    listed = ", ".join(f'<a download="{f}" href="{u}">{n}</a>' for n, (f, u) in links.items())
    return f'<p class="am-downloads">Download: {listed}.</p>'


def _code(id: str) -> str:
    return f'<code title="{escape(id)}">{escape(id[:8])}</code>'


def _below(runs: pd.DataFrame, opens: Opens) -> list[str]:
    """Below the name of a row: its run id, which opens to what is known of the run."""
    found = []
    for id, seeds in zip(runs["run_id"], _seeds(runs), strict=True):
        more = f" and {len(seeds) - 1} more by seed" if len(seeds) > 1 else ""
        if id.startswith(SUPPLIED):
            found.append(f"<small>{escape(id)}</small>")
        elif not opens or id not in opens:
            found.append(f"<small>{_code(id)}{more}</small>")
        else:
            others = f"<p>Other seeds: {', '.join(seeds[1:])}</p>" if more else ""
            summary = f"<summary>{_code(id)}{more}</summary>"
            found.append(f"<details>{summary}{opens[id]}{others}</details>")
    return found


def _seeds(runs: pd.DataFrame) -> list[list[str]]:
    """The ids of a row's runs, one a seed."""
    return [str(ids).split() for ids in runs.get("run_ids", runs["run_id"])]


def _page(
    table: int,
    cells: pd.DataFrame,
    data: pd.DataFrame,
    heading: str,
    titles: pd.DataFrame | None = None,
    *,
    supplied: pd.DataFrame | None = None,
    **values: Any,
) -> str:
    """This run's table, the published one, and their notes."""
    ours = _html(cells, table, "ours", f"this run: {heading}", titles, data)
    printed = _printed_table(table, supplied)
    return render(
        "tables.html",
        table=table,
        ours=ours,
        printed=printed,
        computed="am-computed" in printed,
        notes=load().notes_on(table),
        **values,
    )
