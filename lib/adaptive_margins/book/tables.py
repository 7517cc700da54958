"""Tables 1 to 4 of the paper as HTML: first this run's numbers, then the published ones as they were printed.

They are two HTML tables in one ``<div class="am-tables">``, with their own captions, headers and frames, because the
collections, encoders and cut-offs differ. Where they do not, `comparison` and `compared` set the numbers of Tables 3 and 4
side by side. Numbers come from the frames of ``experiments`` and from ``published.yaml``; texts are escaped. A wide
table scrolls inside its box.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import groupby
from typing import Any, Literal

import pandas as pd

from adaptive_margins.book.published import Published, Row3, Row4, Scores
from adaptive_margins.book.style import encoder_label, measure_label, require

ROLES = {
    "q": "<i>q</i>",
    "d+": "<i>d</i><sup>+</sup>",
    "d-max": "<i>d</i><sup>−</sup><sub>max</sub>",
    "d-mid": "<i>d</i><sup>−</sup><sub>mid</sub>",
    "d-min": "<i>d</i><sup>−</sup><sub>min</sub>",
}
ENCODERS = ["encoder", "base", "parameters", "trained", "embedding", "dimensions", "run_id"]
INSTANCE = ["role", "text", "rho", "target", "loss_table", "loss_equation", "run_id", "qid"]
SCORED = [
    "in_batch", "set", "measure", "value", "best", "difference", "low", "high", "equivalent", "triples", "run_id",
    "reference_run_id",
]  # fmt: skip
COMPARED = [
    "key", "name", "in_batch", "set", "measure", "ours", "published", "difference", "verdict", "printed", "supplied", "run_id",
]  # fmt: skip
SUPPLIED = "supplied: "
"""What the source of a supplied run starts with; its name follows."""
NONE = "—"
# Hanging, so that digits stay in line.
DAGGER, STAR = '<sup class="am-hang">†</sup>', '<span class="am-hang">*</span>'
YES_NO = {True: "✓", False: "✗"}

# Greys with transparency and inherited colours are legible on light and dark pages alike. The frame on the left tells
# the two tables apart without colour: solid for this run, double for the published numbers.
CSS = """\
.am-tables { margin: 1em 0; font-size: .8125rem; line-height: 1.35; color: inherit; }
.am-tables .am-scroll { container-type: inline-size; overflow-x: auto; max-width: 100%; margin: 0 0 1em; padding-left: .75em;
  border-left: 5px solid #0072b2; }
.am-tables .am-scroll.am-published { border-left: 6px double #8c8c8c; }
.am-tables .am-scroll > table.am-table { width: auto; margin: 0; border-collapse: collapse; border: 0;
  font-size: inherit; color: inherit; background: none; font-variant-numeric: tabular-nums; }
.am-tables table.am-table > caption { caption-side: top; text-align: left; color: inherit; padding: 0 0 .5em;
  font-size: inherit; }
.am-tables table.am-table > caption > span { display: inline-block; position: sticky; left: 0;
  max-width: calc(100cqw - 1em); }
.am-tables .am-scroll table.am-table tr, .am-tables .am-scroll table.am-table tr:hover { background: none; }
.am-tables .am-scroll table.am-table > * > tr > * { padding: .25em .4em; border: 0; color: inherit; background: none;
  text-align: right; vertical-align: top; white-space: nowrap; font-weight: inherit; }
.am-tables .am-scroll table.am-table > * > tr > .am-text { text-align: left; }
.am-tables .am-scroll table.am-table > * > tr > .am-long { text-align: left; white-space: normal; min-width: 16em; }
.am-tables .am-scroll table.am-table > thead > tr > th { border-bottom: 1px solid #8c8c8c; font-weight: 600;
  vertical-align: bottom; white-space: normal; }
.am-tables .am-scroll table.am-table > thead > tr > th[colspan] { text-align: center; }
.am-tables .am-scroll table.am-table > tbody { border-bottom: 1px solid #8c8c8c80; }
.am-tables .am-scroll table.am-table > tbody > tr > th.am-block { font-weight: 600; padding-top: .6em; }
.am-tables table.am-table small { display: block; opacity: .85; font-size: .8em; }
.am-tables table.am-table sup, .am-tables table.am-table sub { line-height: 0; }
.am-tables table.am-table .am-hang { display: inline-block; width: 0; }
.am-tables table.am-table code { font-size: .85em; padding: 0; background: none; color: inherit; border: 0; }
.am-tables .am-published table.am-table > tbody > tr > td { font-style: italic; }
.am-tables .am-scroll.am-compared { border-left: 5px dashed #0072b2; }
.am-tables .am-scroll.am-compared table.am-table > tbody > tr > td:nth-child(3n) { padding-left: 1em; }
.am-tables table.am-table .am-computed { text-decoration: underline dotted; text-underline-offset: .2em; font-style: normal; }
.am-tables table.am-table summary { font-size: .8em; opacity: .85; cursor: pointer; }
.am-tables table.am-table pre { width: 0; margin: 0; padding: 0; overflow: visible; border: 0; background: none;
  position: relative; z-index: 1; color: inherit; }
.am-tables table.am-table pre code { display: block; width: max-content; max-width: calc(100cqw - 9em);
  white-space: pre-wrap; overflow-wrap: anywhere; padding: .25em 0; }
.am-tables .am-note { margin: 0 0 .75em; max-width: 50em; }
.am-tables ul.am-note { padding-left: 1.25em; }
"""


def table1(
    data: pd.DataFrame,
    published: Published,
    *,
    heading: str = "",
    labels: Mapping[str, str] | None = None,
) -> str:
    """Table 1, the encoders.

    ``data`` has one row an encoder: encoder, base, parameters, trained (numbers of parameters), embedding, dimensions,
    run_id. ``heading`` says what this run used, e.g. "PyDocs, MiniLM"; ``labels`` renames encoders.
    """
    require(data, ENCODERS, "table1")
    head = ["Encoder", "Weights", "Parameters", "Trained", "Embedding", "Dimensions", "Run"]
    body = [
        [
            _row_head(escape(encoder_label(row["encoder"], labels))),
            _text(row["base"]),
            _number(millions(row["parameters"])),
            _number(millions(row["trained"])),
            _text(row["embedding"]),
            _number(f"{int(row['dimensions'])}"),
            _run(row["run_id"]),
        ]
        for row in _records(data)
    ]
    ours = _table(1, "ours", heading, [_heads(head, text={0, 1, 4, 6})], [body])
    table = published.table1
    printed = [
        [
            _row_head(escape(r.model)),
            _number(r.parameters),
            _text(r.embedding),
            _number(str(r.dimensions)),
        ]
        for r in table.rows
    ]
    head = ["Model", "№ Params", "Embedding", "№ Dim."]
    theirs = _table(
        1, "published", table.heading, [_heads(head, text={0, 2})], [printed], published
    )
    return _page([ours, theirs, *_notes(1, published)])


def table2(
    data: pd.DataFrame,
    published: Published,
    *,
    heading: str = "",
    max_chars: int = 160,
) -> str:
    """Table 2, a training instance: relevance ρ, target t and loss of its negatives.

    ``data`` has one row a text: role (q, d+, d-max, d-mid, d-min), text, rho, target, loss_table, loss_equation (NaN
    where there is none), run_id, qid. Texts are cut at a word before ``max_chars`` characters.
    """
    require(data, INSTANCE, "table2")
    first = ["", "Text", "<i>ρ</i>", "<i>t</i>"]
    formula = f"(<i>ρ</i>({ROLES['d+']}) − <i>ρ</i>(<i>d</i><sup>−</sup><sub>j</sub>) − <i>t</i>)²"
    as_printed = f"<i>l</i>² as printed<small>{formula}</small>"
    equation = "<i>l</i>² by Equation 3<small>(margin<sub>i</sub> − <i>t</i>)²</small>"
    body = [
        [
            _row_head(ROLES[row["role"]]),
            _cell("td", escape(shorten(row["text"], max_chars)), "am-long", title=row["text"]),
            *(_number(_score(row[column], 2)) for column in ("rho", "target")),
            *(_number(_score(row[column], 3)) for column in ("loss_table", "loss_equation")),
        ]
        for row in _records(data)
    ]
    ours = _table(2, "ours", heading, [_heads([*first, as_printed, equation], text={0, 1})], [body])
    row = data.iloc[0]
    explanation = (
        "The loss of the printed table compares the positive with each negative <i>j</i> of the batch. Equation 3 keeps"
        " the query’s own negative: margin<sub>i</sub> = <i>ρ</i>(<i>d</i><sup>+</sup>) −"
        " <i>ρ</i>(<i>d</i><sup>−</sup><sub>i</sub>) is the same in every row, and only the target differs."
        f" Run {_code(row['run_id'])}, query {_code(row['qid'])}."
    )
    table = published.table2
    printed = [
        [_row_head(ROLES[r.role]), _cell("td", escape(r.text), "am-long")]
        + [_number(value or NONE) for value in (r.rho, r.target, r.loss)]
        for r in table.rows
    ]
    head = _heads([*first, "<i>l</i>²"], text={0, 1})
    theirs = _table(2, "published", table.heading, [head], [printed], published)
    return _page([ours, _note(explanation), theirs, *_notes(2, published)])


def table3(
    data: pd.DataFrame,
    published: Published,
    *,
    heading: str = "",
    labels: Mapping[str, str] | None = None,
    margin: float = 0.05,
    alpha: float = 0.05,
    commands: Mapping[str, Sequence[str]] | None = None,
    supplied: pd.DataFrame | None = None,
) -> str:
    """Table 3, every encoder and target in full ranking.

    ``data`` has one row a run, set and measure: encoder, target, epsilon (NaN unless static), in_batch, set, measure,
    value, best, difference, low, high, p_adjusted, comparisons, equivalent, seconds (training, with the sweep),
    sweep_seconds, triples, run_id, reference_run_id. † stands where ``equivalent`` is true and the run is not its own
    reference. ``margin`` and ``alpha`` are those of the test, for the note. ``commands``: run id → the lines that the
    run's row opens to, as `commands` gives them. ``supplied``: the frame of `table4`, whose supplied runs replace printed
    numbers here, too.
    """
    require(data, ["encoder", "target", "epsilon", "seconds", "sweep_seconds", *SCORED], "table3")
    columns = _columns(data)
    groups = []
    for encoder, rows in data.groupby("encoder", sort=False):
        runs = [run for _, run in rows.groupby(["target", "in_batch"], sort=False)]
        name = _row_head(
            escape(encoder_label(str(encoder), labels)), rowspan=len(runs), scope="rowgroup"
        )
        body = []
        for run in runs:
            one = run.iloc[0]
            static = one["target"] == "static"
            target = f"static, <i>ε</i> = {one['epsilon']:g}" if static else escape(one["target"])
            in_batch = bool(one["in_batch"]) or one["target"] == "distributed"
            sweep = (
                f"of which the sweep over ε: {duration(one['sweep_seconds'])}" if static else None
            )
            body.append(
                [
                    _row_head(target + _run_below(one["run_id"], commands)),
                    _cell("td", YES_NO[in_batch], "am-text"),
                    *_scores(run, columns),
                    _cell("td", duration(one["seconds"]) + STAR * static, title=sweep),
                    _number(triples(one["triples"])),
                ]
            )
        body[0].insert(0, name)
        groups.append(body)
    first = ["Encoder", "Target, run", "In-batch"]
    head = _scored_heads(first, columns, ["Training time", "Triples"])
    ours = _table(3, "ours", heading, head, groups)
    marks = _marks("the best of the same encoder and column", data, margin, alpha)
    more = (
        "* includes the sweep over <i>ε</i>. Time is training until it stopped, evaluation apart (h:mm:ss or m:ss)."
        " Distributed targets take their targets from the batch, so they have a ✓, as in the paper."
    )
    table = published.table3
    stand_ins = _supplied(supplied)
    printed_groups = []
    for model, printed_rows in groupby(table.rows, key=lambda r: r.model):
        members = list(printed_rows)
        printed = [
            [
                _row_head(
                    r.target
                    if r.epsilon is None
                    else f"static, <i>ε</i> = {r.epsilon:g}<sup>‡</sup>"
                ),
                _cell("td", r.in_batch, "am-text"),
                *_printed_scores(r, stand_ins),
                _number(r.time.value + STAR * r.time.star),
                _number(r.triples),
            ]
            for r in members
        ]
        printed[0].insert(0, _row_head(escape(model), rowspan=len(members), scope="rowgroup"))
        printed_groups.append(printed)
    head = _scored_heads(
        ["Encoder", "Target", "In-batch"],
        _printed_columns(table.rows[0].scores),
        ["Time (hh:mm)", "Data seen"],
    )
    theirs = _table(3, "published", table.heading, head, printed_groups, published)
    footnote = "Marks as printed. * includes the sweep. ‡ from the released code, not printed."
    footnote += _replaced(table.rows, stand_ins)
    marks = f"{marks} {more}{_opens(commands)}"
    return _page([ours, _note(marks), theirs, _note(footnote), *_notes(3, published)])


def table4(
    data: pd.DataFrame,
    published: Published,
    *,
    heading: str = "",
    margin: float = 0.05,
    alpha: float = 0.05,
    commands: Mapping[str, Sequence[str]] | None = None,
) -> str:
    """Table 4, the losses beside baselines; published teacher distillation appears in the published table only.

    ``data`` has one row a run, set and measure: block, loss, sampling, in_batch ("✗", "✓", "—"), source, set, measure,
    value, best, difference, low, high, p_adjusted, equivalent, triples, run_id, reference_run_id. Rows whose source
    starts with "published" are left out: their numbers come from ``published``. The reference is underlined.

    Rows of supplied runs have the source "supplied: NAME", no run id (as a reference they are named by their source),
    a NaN for a value that was refused, and the reason in a column ``refused`` (else empty). A column ``missing`` may have
    the number of judged queries that the run lacks. Where NAME is the key of a published row, the run's scores replace
    the printed ones. ``commands`` as for `table3`.
    """
    require(data, ["block", "loss", "sampling", "source", *SCORED], "table4")
    data = data[~data["source"].astype(str).str.startswith("published")]
    others = data["source"].astype(str).str.startswith(SUPPLIED)
    data = data.assign(run_id=data["run_id"].where(~others, data["source"]))
    columns = _columns(data)
    first = ["Loss, run", "Sampling", "In-batch"]
    width = len(first) + len(columns) + 1
    groups = []
    blocks = list(dict.fromkeys(data["block"]))
    for block in blocks:
        rows = data[data["block"] == block]
        body = [[_block(block, width)]]
        for _, run in rows.groupby(["loss", "in_batch", "run_id"], sort=False):
            one = run.iloc[0]
            body.append(
                [
                    _row_head(escape(one["loss"]) + _run_below(one["run_id"], commands)),
                    *(_text(one[column]) for column in ("sampling", "in_batch")),
                    *_scores(run, columns, underline=True),
                    _number(triples(one["triples"])),
                ]
            )
        groups.append(body)
        if block.lower() == "self-distillation" and "teacher distillation" not in map(
            str.lower, blocks
        ):
            missing = "needs a teacher model; see the published numbers below"
            groups.append(
                [
                    [_block("Teacher distillation", width)],
                    [_cell("td", missing, "am-text", colspan=width)],
                ]
            )
    ours = _table(4, "ours", heading, _scored_heads(first, columns, ["Triples"]), groups)
    reference = data[data["run_id"] == data["reference_run_id"]]
    name = (
        ", ".join(dict.fromkeys(f"{r['loss']} ({r['in_batch']})" for r in _records(reference)))
        or "none"
    )
    marks = _marks(
        f"the underlined reference, {escape(name)}", data, margin, alpha, best="block and column"
    )

    table = published.table4
    stand_ins = _supplied(data)
    printed_groups = []

    def block_of(row: Row4) -> tuple[str, str]:
        return row.block, row.source if row.block.startswith("Teacher") else ""

    for (block, source), members in groupby(table.rows, key=block_of):
        title = f"{block}: {source}" if source else block
        printed_groups.append(
            [
                [_block(title, 9)],
                *(
                    [
                        _row_head(escape(r.loss)),
                        _cell(
                            "td",
                            f"<u>{escape(r.sampling)}</u>" if r.underlined else escape(r.sampling),
                            "am-text",
                        ),
                        _text(r.in_batch),
                        _text(r.source),
                        *_printed_scores(r, stand_ins, dagger=True),
                        _number(r.triples),
                    ]
                    for r in members
                ),
            ]
        )
    head = _scored_heads(
        ["Loss", "Sampling", "In-batch", "Source"],
        _printed_columns(table.rows[0].scores),
        ["Data seen"],
    )
    theirs = _table(4, "published", table.heading, head, printed_groups, published)
    footnote = "Marks as printed: bold per block, † against the underlined runs. Rows of other authors carry no †."
    if replaced := _replaced(table.rows, stand_ins):
        footnote += (
            f"{replaced} A † on such a number is against {escape(name)} of this run’s table."
        )
    return _page(
        [
            ours,
            _note(marks + _opens(commands)),
            *_limits(data),
            theirs,
            _note(footnote),
            *_notes(4, published),
        ]
    )


def commands(
    profile: str, run_id: str, fingerprint: str, sets: Iterable[str], measures: Iterable[str]
) -> list[str]:
    """Shell commands that make a run, and that score its full rankings of ``sets`` without this project.

    Paths are relative to the folder that has ``collections/`` and ``runs/``; ``fingerprint`` is the collection's.
    ``measures`` in ir_measures' notation.
    """
    asked = " ".join(measures)
    lines = [["adaptive-margins", "reproduce", "--profile", profile, "--run", run_id]]
    for name in sets:
        qrels = f"collections/{fingerprint}/qrels.{name}.txt"
        lines.append(["ir_measures", qrels, f"runs/{run_id}/full.{name}.run.gz", asked])
    return [shlex.join(line) for line in lines]


# --- this run beside the published numbers ----------------------------------------------------------------------------


def comparison(
    data: pd.DataFrame,
    published: Published,
    *,
    table: Literal[3, 4],
    models: Mapping[str, str] | None = None,
    tolerance: float = 0.02,
    supplied: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Scores of this run's Table 3 or 4 that the paper printed, too: same row, query set, and measure but for its level.

    Args:
        data: the frame of `table3` or `table4`.
        published: the paper's numbers.
        table: which of the two tables.
        models: this profile's encoder name → model as printed; others are written by `encoder_label`.
        tolerance: the largest difference, rounded to three decimals, that is called "within".
        supplied: for Table 3, the frame of `table4` with supplied runs; Table 4's own has them.

    Returns:
        One row a score: key, name and in_batch of the published row; set; measure (this run's); ours, published and
        their difference (ours - published); verdict ("within ±.02", "higher", "lower"); printed (the number in the
        paper, as text); supplied (the name of the run that ``published`` was computed from, or ""); run_id. No rows
        where nothing matches.
    """
    if table not in (3, 4):
        raise ValueError(f"only Tables 3 and 4 have scores to compare, not Table {table}")
    own = ["encoder", "target", *SCORED] if table == 3 else ["loss", "sampling", "source", *SCORED]
    require(data, own, f"comparison of Table {table}")
    known: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in _records(data):
        if table == 3:
            in_batch = bool(row["in_batch"]) or row["target"] == "distributed"
            what = (encoder_label(row["encoder"], models), row["target"], YES_NO[in_batch])
        elif str(row["source"]).startswith((SUPPLIED, "published")):
            continue
        else:
            what = (row["loss"], row["sampling"], row["in_batch"])
        if not _missing(row["value"]):
            known[(*what, row["set"], _level_free(row["measure"]))] = row
    stand_ins = _supplied(data if supplied is None else supplied)
    printed = published.table3.rows if table == 3 else published.table4.rows
    found = []
    for entry in printed:
        identity: tuple[str, ...]
        if isinstance(entry, Row3):
            name, identity = f"{entry.model}, {entry.target}", (entry.model, entry.target)
        else:
            name, identity = entry.loss, (entry.loss, entry.sampling)
        for query_set, measure in _printed_columns(entry.scores):
            column = (query_set, _level_free(measure))
            ours = known.get((*identity, entry.in_batch, *column))
            if ours is None:
                continue
            score = entry.scores[query_set][measure]
            stand_in = stand_ins.get((entry.key, *column))
            theirs = stand_in["value"] if stand_in else score.number
            difference = ours["value"] - theirs
            found.append(
                {
                    "key": entry.key, "name": name, "in_batch": entry.in_batch, "set": query_set,
                    "measure": ours["measure"], "ours": ours["value"], "published": theirs, "difference": difference,
                    "verdict": _verdict(difference, tolerance), "printed": score.value,
                    "supplied": entry.key if stand_in else "", "run_id": ours["run_id"],
                }
            )  # fmt: skip
    return pd.DataFrame(found, columns=COMPARED)


def compared(
    data: pd.DataFrame,
    published: Published,
    *,
    table: Literal[3, 4],
    heading: str,
    models: Mapping[str, str] | None = None,
    tolerance: float = 0.02,
    supplied: pd.DataFrame | None = None,
) -> str:
    """`comparison` as HTML: a row per published row, and per set and measure ours, published, difference and verdict.

    ``heading`` is in the caption and names this run's collection with its fingerprint, so that a small one is not taken
    for the paper's. Where nothing matches, a sentence says so.
    """
    rows = comparison(
        data, published, table=table, models=models, tolerance=tolerance, supplied=supplied
    )
    if rows.empty:
        text = (
            "The published numbers have no counterpart in this run: query sets, measures or encoders differ, so no"
            " differences are shown."
        )
        return _page([_note(text)])
    columns = _columns(rows)
    body = []
    for _, own in rows.groupby("key", sort=False):
        by_column = {(row["set"], row["measure"]): row for row in _records(own)}
        one = own.iloc[0]
        cells = [_row_head(escape(one["name"])), _cell("td", one["in_batch"], "am-text")]
        for column in columns:
            cells += _beside(by_column.get(column))
        body.append(cells)
    top, *below = _scored_heads(["Row of the paper", "In-batch"], columns, [], each=3)
    names = ["Ours", "Paper", "Diff."] * len(columns)
    head = [top, *below, "".join(_cell("th", n, scope="col") for n in names)]
    html = _table(table, "compared", heading, head, [body], published)
    counts = rows["verdict"].value_counts()
    within = _verdict(0, tolerance)
    reasons = "other seeds, of whose spread the paper says nothing"
    if table == 4:
        reasons += ", and for numbers that are printed with two digits (up to .005)"
    note = (
        f"Of {len(rows)} numbers {counts.get(within, 0)} are {within} of the published ones, {counts.get('higher', 0)} higher"
        f" and {counts.get('lower', 0)} lower. The tolerance is a choice and not a test; it allows for {reasons}."
        " Measures are matched by name and cut-off, whatever grade counts as relevant."
    )
    stand_ins = {(r["supplied"], r["set"], _level_free(r["measure"])): r for r in _records(rows)}
    printed = published.table3.rows if table == 3 else published.table4.rows
    return _page([html, _note(note + _replaced(printed, stand_ins))])


def _verdict(difference: float, tolerance: float) -> str:
    # Of the difference as it is shown: 0.62 - 0.60 is above 0.02 in binary.
    if abs(round(difference, 3)) <= tolerance:
        return f"within ±{f'{tolerance:g}'.removeprefix('0')}"
    return "higher" if difference > 0 else "lower"


def _beside(row: Mapping[str, Any] | None) -> list[str]:
    """Ours, published, and the difference with its verdict."""
    if row is None:
        return [_number(NONE)] * 3
    theirs = _number(row["printed"])
    if row["supplied"]:
        theirs = _computed(row["published"], row["printed"], row["supplied"])
    sign = "+" * (round(row["difference"], 3) > 0)
    difference = f"{sign}{_score(row['difference'])}<small>{row['verdict']}</small>"
    return [_number(_score(row["ours"])), theirs, _number(difference)]


# --- supplied runs ----------------------------------------------------------------------------------------------------


def _level_free(measure: str) -> str:
    """A measure's name without relevance level: R@1000 for R(rel=2)@1000, and for the paper's Recall@1000."""
    return re.sub(r"\(rel=\d+\)", "", measure).replace("Recall@", "R@")


def _supplied(data: pd.DataFrame | None) -> dict[tuple[str, str, str], dict[str, Any]]:
    """Scores of supplied runs: name, set, measure without level → row. Refused ones are left out."""
    if data is None or "source" not in data:
        return {}
    return {
        (row["source"].removeprefix(SUPPLIED), row["set"], _level_free(row["measure"])): row
        for row in _records(data)
        if str(row["source"]).startswith(SUPPLIED) and not _missing(row["value"])
    }


def _computed(value: float, printed: str, name: str, dagger: bool = False) -> str:
    """A published number that was computed from a supplied run."""
    text = f'<span class="am-computed">{_score(value)}</span>{DAGGER * dagger}'
    return _cell("td", text, title=f"printed: {printed}; computed from the supplied run {name}")


def _replaced(rows: Iterable[Row3 | Row4], stand_ins: Mapping[tuple[str, str, str], Any]) -> str:
    """Which printed numbers were replaced, and what they were."""
    listed = []
    for row in rows:
        scores = [
            f"{name} {measure} {row.scores[name][measure].value}"
            for name, measure in _printed_columns(row.scores)
            if (row.key, name, _level_free(measure)) in stand_ins
        ]
        if scores:
            listed.append(f"{row.key} (printed: {', '.join(scores)})")
    if not listed:
        return ""
    return (
        ' <span class="am-computed">Dotted</span>: computed from a supplied run in place of the printed number.'
        f" These are {escape('; '.join(listed))}."
    )


def _limits(data: pd.DataFrame) -> list[str]:
    """What is not reported of supplied runs, and what they lack."""
    texts: dict[str, None] = {}
    for row in _records(data):
        name = str(row["source"]).removeprefix(SUPPLIED)
        if row.get("refused") and not _missing(row["refused"]):
            texts[f"{name} on {row['set']}: {row['refused']}, so it is not reported."] = None
        if row.get("missing") and not _missing(row["missing"]):
            count = int(row["missing"])
            texts[f"{name} on {row['set']}: judged queries without hits, which count 0: {count}."] = None  # fmt: skip
    return _listed("On the supplied runs:", texts)


# --- values -----------------------------------------------------------------------------------------------------------


def _missing(value: Any) -> bool:
    return value is None or bool(pd.isna(value))


def _true(value: Any) -> bool:
    """A flag that may have passed through a CSV file with gaps."""
    return not _missing(value) and str(value).lower() in ("true", "1", "1.0")


def _score(value: Any, decimals: int = 3) -> str:
    return NONE if _missing(value) else f"{value:.{decimals}f}".replace("-", "−")


def interval(low: float, high: float) -> str:
    """An interval in brackets, with real minus signs: [−0.012, 0.031]."""
    return f"[{_score(low)}, {_score(high)}]"


def duration(seconds: float) -> str:
    """Seconds as m:ss or, from an hour on, h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def millions(count: float) -> str:
    """A number of parameters: 22.7M, or 512 below ten thousand."""
    return f"{count / 1e6:.3g}M" if count >= 1e4 else f"{count:,.0f}"


def triples(count: float) -> str:
    """A number of triples: 1,536 or, from a million on, 5.18M; a dash for none."""
    if _missing(count) or count == 0:
        return NONE
    return f"{count / 1e6:.2f}M" if count >= 1e6 else f"{count:,.0f}"


def shorten(text: str, max_chars: int) -> str:
    """The text in one line, cut after a whole word, marked "[…]" as in the paper."""
    text = " ".join(text.split())
    if len(text) <= max_chars:
        return text
    return text[: max_chars + 1].rsplit(" ", 1)[0][:max_chars] + " […]"


# --- pieces of HTML ---------------------------------------------------------------------------------------------------


def _records(data: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(key): value for key, value in row.items()} for row in data.to_dict("records")]


def _cell(tag: str, content: str, css: str = "", **attributes: Any) -> str:
    """``content`` is HTML, attributes are text; None and empty ones are left out."""
    pairs = {"class": css, **attributes}
    inside = "".join(f' {k}="{escape(str(v))}"' for k, v in pairs.items() if v not in (None, ""))
    return f"<{tag}{inside}>{content}</{tag}>"


def _row_head(content: str, scope: str = "row", **attributes: Any) -> str:
    return _cell("th", content, "am-text", scope=scope, **attributes)


def _block(title: str, width: int) -> str:
    return _cell(
        "th",
        escape(title[:1].upper() + title[1:]),
        "am-text am-block",
        scope="rowgroup",
        colspan=width,
    )


def _text(value: Any) -> str:
    return _cell("td", escape(str(value)), "am-text")


def _number(text: str) -> str:
    return _cell("td", text)


def _code(id: str) -> str:
    return _cell("code", escape(str(id)[:8]), title=id)


def _run_below(id: str, commands: Mapping[str, Sequence[str]] | None = None) -> str:
    if id.startswith(SUPPLIED):
        return f"<small>{escape(id)}</small>"
    if not commands or id not in commands:
        return f"<small>{_code(id)}</small>"
    lines = escape("\n".join(commands[id]))
    return f"<details><summary>{_code(id)}</summary><pre><code>{lines}</code></pre></details>"


def _opens(commands: Mapping[str, Sequence[str]] | None) -> str:
    if not commands:
        return ""
    return (
        " A run’s id opens to the commands that make it and that compute its scores again from its rankings, in the folder"
        " that has <code>runs/</code> and <code>collections/</code>."
    )


def _run(id: str) -> str:
    return _cell("td", _code(id), "am-text")


def _heads(names: Sequence[str], text: set[int]) -> str:
    return "".join(
        _cell("th", n, "am-text" if i in text else "", scope="col") for i, n in enumerate(names)
    )


Column = tuple[str, str]  # set, measure


def _columns(data: pd.DataFrame) -> list[Column]:
    """Sets in order, and within each its measures."""
    pairs = data[["set", "measure"]].drop_duplicates()
    return [
        (s, m) for s in dict.fromkeys(pairs["set"]) for m in pairs.loc[pairs["set"] == s, "measure"]
    ]


def _printed_columns(scores: Scores) -> list[Column]:
    return [(name, measure) for name, measures in scores.items() for measure in measures]


def _scored_heads(
    first: Sequence[str], columns: Sequence[Column], last: Sequence[str], each: int = 1
) -> list[str]:
    """Two header rows: query sets span their measures, all else spans both rows.

    With ``each`` above 1 a measure spans as many columns, and a third row is to name them.
    """
    tall: dict[str, Any] = {"scope": "col", "rowspan": 2 if each == 1 else 3}
    wide: dict[str, Any] = {"scope": "col"} if each == 1 else {"scope": "colgroup", "colspan": each}
    sets = [(name, list(group)) for name, group in groupby(columns, key=lambda column: column[0])]
    top = "".join(_cell("th", n, "am-text", **tall) for n in first)
    top += "".join(
        _cell("th", escape(name), scope="colgroup", colspan=each * len(group))
        for name, group in sets
    )
    top += "".join(_cell("th", n, **tall) for n in last)
    return [top, "".join(_cell("th", escape(measure_label(m)), **wide) for _, m in columns)]


def _scores(run: pd.DataFrame, columns: Sequence[Column], underline: bool = False) -> list[str]:
    """The cells of one run: value, bold if best, † if equivalent, and the interval of the test."""
    by_column = {(row["set"], row["measure"]): row for row in _records(run)}
    cells = []
    for column in columns:
        row = by_column.get(column)
        if row is None:
            cells.append(_cell("td", NONE))
            continue
        text = _score(row["value"])
        is_reference = row["run_id"] == row["reference_run_id"]
        if underline and is_reference:
            text = f"<u>{text}</u>"
        if _true(row["best"]):
            text = f"<strong>{text}</strong>"
        refused = row.get("refused")
        title = None if _missing(refused) else refused
        if not is_reference and not _missing(row["low"]):
            text += (
                DAGGER * _true(row["equivalent"])
                + f"<small>{interval(row['low'], row['high'])}</small>"
            )
            p = (
                ""
                if _missing(row.get("p_adjusted"))
                else f", p = {row['p_adjusted']:.2g} after Bonferroni"
            )
            title = f"difference {_score(row['difference'])} to run {row['reference_run_id']}{p}"
        cells.append(_cell("td", text, title=title))
    return cells


def _printed_scores(
    row: Row3 | Row4, stand_ins: Mapping[tuple[str, str, str], Any], dagger: bool = False
) -> list[str]:
    """The cells of a published row; a computed number has the † of its own test if ``dagger``, and none as printed."""
    cells = []
    for name, measure in _printed_columns(row.scores):
        score = row.scores[name][measure]
        text = f"<strong>{score.value}</strong>" if score.bold else score.value
        cell = _cell("td", text + DAGGER * score.dagger)
        if own := stand_ins.get((row.key, name, _level_free(measure))):
            mark = dagger and _true(own["equivalent"])
            cell = _computed(own["value"], score.value, row.key, mark)
        cells.append(cell)
    return cells


def _marks(
    reference: str,
    data: pd.DataFrame,
    margin: float,
    alpha: float,
    best: str = "encoder and column",
) -> str:
    """What bold, † and the brackets mean, with the test's numbers."""
    tested = data[(data["run_id"] != data["reference_run_id"]) & data["value"].notna()]
    if "comparisons" in data:
        counts = sorted({int(c) for c in tested["comparisons"].dropna()})
    else:
        counts = sorted({int(c) for c in tested.groupby(["set", "measure"])["run_id"].nunique()})
    if not counts:
        return f"Bold: best per {best}. Nothing to compare, so no test."
    levels = ", ".join(f"{100 * (1 - 2 * alpha / m):.4g}%" for m in counts)
    comparisons = ", ".join(map(str, counts))
    return (
        f"Bold: best per {best}. †: statistically equivalent to {reference} (paired TOST, margin ±{margin:g},"
        f" <i>p</i> &lt; {alpha:g} after Bonferroni correction for {comparisons} comparisons). In brackets: the"
        f" {levels} interval of the difference to it, which lies within ±{margin:g} exactly where there is a †."
    )


def _table(
    number: int,
    kind: str,
    heading: str,
    head: Iterable[str],
    groups: Iterable[Iterable[Iterable[str]]],
    published: Published | None = None,
) -> str:
    """A captioned table; ``groups`` of rows of cells become its bodies."""
    what = "this run"
    if published is not None:
        short = escape(published.paper.short)
        what = (
            f"published ({short})" if kind == "published" else f"this run beside {short}’s numbers"
        )
    caption = f"<strong>Paper Table {number}</strong>, {what}"
    if heading:
        caption += f": {escape(heading)}"
    rows = "".join(f"<tr>{row}</tr>" for row in head)
    bodies = "".join(
        "<tbody>" + "".join(f"<tr>{''.join(cells)}</tr>" for cells in body) + "</tbody>\n"
        for body in groups
    )
    label = f"am-table{number}-{kind}"
    return (
        f'<div class="am-scroll am-{kind}" role="region" tabindex="0" aria-labelledby="{label}"><table class="am-table">\n'
        f'<caption id="{label}"><span>{caption}</span></caption>\n<thead>{rows}</thead>\n{bodies}</table></div>'
    )


def _note(html: str) -> str:
    return f'<p class="am-note">{html}</p>'


def _notes(table: int, published: Published) -> list[str]:
    return _listed("On the published numbers:", published.notes_on(table))


def _listed(title: str, texts: Iterable[str]) -> list[str]:
    items = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return [_note(title), f'<ul class="am-note">{items}</ul>'] if items else []


def _page(parts: Iterable[str]) -> str:
    return f'<div class="am-tables">\n<style>\n{CSS}</style>\n' + "\n".join(parts) + "\n</div>"
