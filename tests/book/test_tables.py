"""What Tables 1 to 4 show, cell by cell, and how they compare with the published numbers."""

import base64
import functools
import gzip
import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from bs4 import BeautifulSoup

import report_frames as frames
from adaptive_margins.book import latex, published, tables
from adaptive_margins.book.comparison import comparison, printed_beside
from adaptive_margins.book.render import markdown
from adaptive_margins.book.shown import commands, records
from adaptive_margins.data.trec import write_run
from adaptive_margins.evaluation.measures import evaluate
from adaptive_margins.paper.store import StoredRun

PAPER = published.load()
NDCG, RECALL, DEEP = frames.NDCG, frames.RECALL, "R(rel=2)@1000"
COLUMNS = [(s, m) for s in frames.TESTS for m in (NDCG, RECALL)]
SETS = dict(zip(frames.TESTS, ("TREC-DL19", "TREC-DL20"), strict=True))
NAMES = ["table1", "table2", "table3", "table4"]


@functools.cache
def drawn(name: str):
    """A table of the synthetic frame, drawn once."""
    return getattr(tables, name)(getattr(frames, name)(), heading="PyDocs, <MiniLM>")


def parse(html: str) -> tuple[BeautifulSoup, BeautifulSoup, BeautifulSoup]:
    soup = BeautifulSoup(html, "html.parser")
    ours, theirs = soup.select("table.am-table")
    return soup, ours, theirs


def rows(table) -> list[list]:
    """Cells of the body, each spanning one repeated, as on a grid."""
    found, spanning = [], {}
    for tr in table.select("tbody > tr"):
        cells = [c for c in spanning.values() if c[1] > 0]
        line = [cell for cell, _ in cells] + tr.find_all(["td", "th"], recursive=False)
        spanning = {i: [c, left - 1] for i, (c, left) in enumerate(cells)}
        for place, cell in enumerate(line[len(cells) :], len(cells)):
            if cell.name == "th":
                spanning[place] = [cell, int(cell.get("rowspan", 1)) - 1]
        found.append(line)
    return found


def text(cell) -> str:
    """The cell without interval and run."""
    cell = BeautifulSoup(str(cell), "html.parser")
    for below in cell.find_all(["small", "details"]):
        below.extract()
    return cell.get_text()


def shown(value: float) -> str:
    return f"{value:z.3f}".replace("-", "−")


def check_score(cell, row, underlined=False) -> None:
    reference = row["run_id"] == row["reference_run_id"]
    ci = cell.select_one("small:not(.am-printed)")
    assert text(cell) == shown(row["value"]) + "†" * (bool(row["equivalent"]) and not reference)
    assert bool(cell.find("strong")) == bool(row["best"])
    assert bool(cell.find("u")) == (reference and underlined)
    if reference:
        assert ci is None
    else:
        assert ci.get_text() == f"[{shown(row['low'])}, {shown(row['high'])}]"
        expected = f"difference {shown(row['difference'])} to run {row['reference_run_id']}, p = "
        assert cell["title"].startswith(expected)


def one_row(frame: pd.DataFrame, name: str, measure: str) -> dict:
    (row,) = frame[(frame["set"] == name) & (frame["measure"] == measure)].to_dict("records")
    return row


@pytest.mark.parametrize("name", NAMES)
def test_two_tables_with_their_captions_and_notes(name):
    soup, ours, theirs = parse(drawn(name))
    assert ours.caption.get_text() == f"Paper Table {name[-1]}, this run: PyDocs, <MiniLM>"
    assert theirs.caption.get_text().startswith(
        f"Paper Table {name[-1]}, published (Gienapp et al.): MS MARCO"
    )
    for table in (ours, theirs):  # a wide one scrolls in a box that a keyboard reaches
        assert table.parent["tabindex"] == "0"
        assert table.parent["aria-label"] == table.caption.get_text()
    notes = [li.get_text() for li in soup.select("ul.am-note li")]
    assert notes == PAPER.notes_on(int(name[-1]))


def test_table1_cells():
    _, ours, theirs = parse(drawn("table1"))
    for cells, row in zip(rows(ours), frames.table1().to_dict("records"), strict=True):
        assert [text(c) for c in cells] == [
            row["encoder"].replace("minilm", "MiniLM"), row["base"], "22.7M", f"{row['trained'] / 1e6:.3g}M",
            "mean", "384",
        ]  # fmt: skip
        assert cells[0].code["title"] == row["run_id"]
    printed = [[c.get_text() for c in cells] for cells in rows(theirs)]
    assert printed == PAPER.tables[1].to_numpy().tolist()


def test_table2_cells():
    _, ours, theirs = parse(drawn("table2"))
    decimals = {"rho": 2, "target": 2, "loss_table": 3, "loss_equation": 3}
    for cells, row in zip(rows(ours), frames.table2().to_dict("records"), strict=True):
        assert cells[0].get_text() == row["role"].replace("d-", "d−")
        assert cells[1].get_text().removesuffix(" […]") in row["text"]
        assert cells[1]["title"] == row["text"] and len(cells[1].get_text()) <= 164
        for cell, (column, digits) in zip(cells[2:], decimals.items(), strict=True):
            value = row[column]
            wanted = "—" if pd.isna(value) else f"{value:.{digits}f}".replace("-", "−")
            assert cell.get_text() == wanted
    assert [c.get_text() for c in rows(theirs)[2]][2:] == ["0.34", "0.69", "0.06"]
    assert "Fourier &lt;transform&gt;" in drawn("table2") and "<transform>" not in drawn("table2")


def test_table3_cells():
    soup, ours, theirs = parse(drawn("table3"))
    heads = [th.get_text() for th in ours.select("thead th:not(.blank)")]
    assert [h for h in heads if h.strip()] == [
        "test1", "test2", "In-batch", "nDCG@10", "R@20", "nDCG@10", "R@20", "Training time", "Triples", "Encoder",
        "Target, run",
    ]  # fmt: skip
    runs = list(frames.table3().groupby("run_id", sort=False))
    for cells, (id, own) in zip(rows(ours), runs, strict=True):
        encoder, name, in_batch, *scores, time, seen = cells
        one = own.iloc[0]
        static = one["target"] == "static"
        assert encoder.get_text() == one["encoder"].replace("minilm", "MiniLM")
        assert text(name) == ("static, ε = 0.2" if static else one["target"])
        assert name.code["title"] == id and name.code.get_text() == id[:8]
        ticked = one["in_batch"] or one["target"] == "distributed"
        assert in_batch.get_text() == ("✓" if ticked else "✗")
        for cell, column in zip(scores, COLUMNS, strict=True):
            check_score(cell, one_row(own, *column))
        assert time.get_text() == tables.clock(one["seconds"]) + "*" * static
        assert ("sweep" in time.get("title", "")) == static
        assert seen.get_text() == f"{one['triples']:,}"
    note = soup.select_one("p.am-note").get_text()
    assert "for 4 comparisons" in note and "the 97.5% confidence interval" in note
    given = tables.table3(frames.table3().assign(sweep_seconds=0.0), heading="")
    assert not [cells for cells in rows(parse(given)[1]) if "*" in cells[-2].get_text()]
    printed = PAPER.tables[3].drop(columns="key").replace(r"\*\*", "", regex=True).replace("", "—")
    assert [[c.get_text() for c in cells] for cells in rows(theirs)] == printed.to_numpy().tolist()
    assert len(theirs.select("td strong")) == 12


def test_table4_cells():
    soup, ours, theirs = parse(drawn("table4"))
    runs = list(frames.table4().groupby("run_id", sort=False))
    for cells, (id, own) in zip(rows(ours), runs, strict=True):
        one = own.iloc[0]
        assert cells[0].get_text().lower() == one["block"]
        assert text(cells[1]) == one["loss"] and cells[1].code["title"] == id
        assert [c.get_text() for c in cells[2:4]] == [one["sampling"], one["in_batch"]]
        for cell, column in zip(cells[4:8], COLUMNS, strict=True):
            check_score(cell, one_row(own, *column), underlined=True)
        seen = (
            [tables.clock(one["seconds"]), f"{one['triples']:,}"] if one["triples"] else ["—"] * 2
        )
        assert [c.get_text() for c in cells[8:]] == seen
    note = soup.select_one("p.am-note").get_text()
    assert "the underlined reference, Softmax (MNRL) (✓)" in note
    assert "for 8 comparisons" in note and "98.75%" in note and "needs a teacher model" in note
    frame = PAPER.tables[4].replace(r"\*\*|_", "", regex=True)
    index = ["block", "source", "loss"]
    printed = frame[index].join(frame.drop(columns=["key", *index]))
    assert [[c.get_text() for c in cells] for cells in rows(theirs)] == printed.to_numpy().tolist()
    assert [u.get_text() for u in theirs.select("u")] == ["TAS-B", "TAS-B"]


def test_flags_of_a_csv_file_with_a_gap_are_text(tmp_path):
    data = frames.table3()
    data.assign(equivalent=data["equivalent"].map(str)).to_csv(tmp_path / "x.csv", index=False)
    again = pd.read_csv(tmp_path / "x.csv")
    assert tables.table3(again, heading="PyDocs, <MiniLM>") == drawn("table3")


def test_incomplete_frames():
    data = frames.table4()
    alone = data[data["run_id"] == data["reference_run_id"]]
    soup, ours, _ = parse(tables.table4(alone, heading=""))
    assert "Nothing to compare" in soup.select_one("p.am-note").get_text()
    assert "†" not in ours.get_text() and not ours.select("td small:not(.am-printed)")
    data = frames.table3()
    gone = data.index[(data["set"] == "test2") & (data["measure"] == NDCG)][0]
    _, ours, _ = parse(tables.table3(data.drop(gone), heading=""))
    assert text(rows(ours)[0][5]) == "—"


def test_measures_that_differ_in_the_grade_alone_have_a_column_each():
    data = frames.table3()
    other = data[data["measure"] == RECALL].assign(measure="R(rel=1)@20", value=0.125)
    both = pd.concat([data, other], ignore_index=True)
    _, ours, _ = parse(tables.table3(both, heading=""))
    heads = [th.get_text() for th in ours.select("thead th")]
    assert heads.count("R(rel=2)@20") == heads.count("R(rel=1)@20") == 2 and "R@20" not in heads
    assert [text(cell) for cell in rows(ours)[0][3:9]].count("0.125") == 2


def test_numbers_and_texts_are_written_short():
    counts = [tables.triples(n) for n in (0, float("nan"), 768, 1536, 5_180_000)]
    assert counts == ["—", "—", "768", "1,536", "5.18M"]
    assert [tables.millions(n) for n in (512, 22_713_216, 1_774_464)] == ["512", "22.7M", "1.77M"]
    assert tables.shorten("one two  three\nfour", 11) == "one two […]"
    assert tables.shorten("one two", 7) == "one two"
    assert tables.shorten("x" * 50, 10) == "x" * 10 + " […]"


def test_numbers_of_a_markdown_table_are_on_the_right():
    frame = pd.DataFrame({"a": ["x | y", ""], "b": [".026", "−.012"], "c": [1536, 2], "d": "—"})
    _, rule, first, _ = markdown(frame).splitlines()
    assert re.sub("-+", "-", rule) == "|:-|-:|-:|-:|"
    assert [cell.strip() for cell in first.split(" | ")][1:] == [".026", "1,536", "— |"]


# --- commands ---


@pytest.mark.parametrize("name", NAMES)  # the rows of Table 2 are of one run, below it
def test_every_row_opens_to_what_is_known_of_its_run(name):
    data = getattr(frames, name)()
    opens = {id: f"<pre>run {id}</pre>" for id in data["run_id"].unique()}
    soup, ours, theirs = parse(getattr(tables, name)(data, heading="", opens=opens))
    places = soup.select("div.am-note > details") if name == "table2" else ours("details")
    opened = {d.summary.code["title"]: d.pre.get_text() for d in places}
    assert opened == {id: f"run {id}" for id in opens} and list(opened) == list(opens)
    assert not theirs.find("details")
    assert "opens to its commands" in soup.select_one("p.am-note").get_text()


@pytest.fixture
def stored(tmp_path):
    """What `shown` reads of a reproduction, with the runs of Table 3 in a store."""
    data = frames.table3()
    scores = {"q1": 0.25, "q2": 0.75}
    for id in data["run_id"].unique():
        (tmp_path / id).mkdir()
        full = {
            name: {"mean": {NDCG: 0.5}, "per_query": {NDCG: scores, RECALL: scores}}
            for name in frames.TESTS
        }
        (tmp_path / id / "result.json").write_text(json.dumps({"full": full}))
    profile = SimpleNamespace(
        name="<my> profile",
        sets=SimpleNamespace(tests=frames.TESTS),
        measures=SimpleNamespace(full=[NDCG, RECALL]),
    )
    made = SimpleNamespace(
        profile=profile,
        store=SimpleNamespace(folder=tmp_path),
        inputs=SimpleNamespace(fingerprint="0123"),
    )
    return made, data


def test_a_run_opens_to_its_commands_configuration_files_and_scores(stored, monkeypatch):
    reproduction, data = stored
    config = SimpleNamespace(model_dump=lambda mode: {"target": 0.2, "seed": 1})
    monkeypatch.setattr(StoredRun, "config", config)
    found = records(reproduction, data)
    assert list(found) == list(data["run_id"].unique())
    for id, html in found.items():
        soup = BeautifulSoup(html, "html.parser")
        lines = soup.select_one("pre.am-command").get_text().split("\n")
        assert shlex.split(lines[0])[-4:] == ["--profile", "<my> profile.yaml", "--run", id]
        assert len(lines) == 1 + len(frames.TESTS) and "<my>" not in html
        assert soup.details.pre.get_text() == "target: 0.2\nseed: 1"
        files = [code["data-file"] for code in soup.select("code[data-file]")]
        assert files == [f"runs/{id}/full.{name}.run.gz" for name in frames.TESTS]
        content = base64.b64decode(soup.a["href"].split(",")[1])
        scores = pd.read_csv(io.BytesIO(gzip.decompress(content)))
        assert list(scores) == ["set", "qid", NDCG, RECALL]
        assert scores[NDCG].tolist() == [0.25, 0.75] * 2


# --- downloads, and published values beside ours ---


@pytest.mark.parametrize("name", NAMES)
def test_downloads_are_the_frame_and_the_table_in_latex(name):
    soup, ours, theirs = parse(drawn(name))
    links = {a["download"]: a["href"].split(",")[1] for a in soup.select("a[download]")}
    assert list(links) == [f"{name}-ours.tex", f"{name}.csv", f"{name}-published.tex"]
    frame = pd.read_csv(io.BytesIO(base64.b64decode(links[f"{name}.csv"])))
    expected = getattr(frames, name)()
    assert list(frame) == list(expected) and len(frame) == len(expected)
    for kind, table in (("ours", ours), ("published", theirs)):
        tex = base64.b64decode(links[f"{name}-{kind}.tex"]).decode()
        assert all(rule in tex for rule in ("\\toprule", "\\midrule", "\\bottomrule"))
        body = [line for line in tex.split("\\midrule", 1)[1].splitlines() if line.endswith("\\\\")]
        assert len(body) == len(table.select("tbody tr"))
        for line, cells in zip(body, rows(table), strict=True):
            texts = [x.strip() for x in re.split(r"(?<!\\)&", line.removesuffix("\\\\"))]
            assert len(texts) == len(cells)
            for tex_cell, cell in zip(texts, cells, strict=True):
                number = re.match(r"−?[\d.,:]+", text(cell))
                if cell.name == "td" and number:
                    assert number[0].replace("−", "$-$") in tex_cell
                    assert ("textbf" in tex_cell) == bool(cell.find("strong"))
                    assert ("dag" in tex_cell) == ("†" in cell.get_text())


def test_latex_is_escaped():
    assert latex.latex("50 % of a_b &amp; <strong>c</strong>") == r"50 \% of a\_b \& \textbf{c}"
    assert latex.latex("<i>ε</i> = −1<small>x</small>") == r"\textit{$\varepsilon$} = $-$1"


def test_published_values_stand_beside_ours():
    _, ours, _ = parse(drawn("table3"))
    printed = PAPER.scores(3)
    for cells, (_, own) in zip(
        rows(ours), frames.table3().groupby("run_id", sort=False), strict=True
    ):
        one = own.iloc[0]
        tick = "✓" if one["in_batch"] or one["target"] == "distributed" else "✗"
        for cell, (name, measure) in zip(cells[3:7], COLUMNS, strict=True):
            same = printed[(printed["target"] == one["target"]) & (printed["in_batch"] == tick)]
            same = same[same["set"] == SETS[name]]
            same = same[same["measure"] == ("nDCG@10" if measure == NDCG else "R@1000")]["value"]
            found = cell.select_one(".am-printed").get_text()
            assert found == f"{same.min():.3f}–{same.max():.3f}" and len(same) == 3
    html = tables.table3(THREE, heading="")  # encoders of the paper: their own values
    (first, *_) = rows(parse(html)[1])
    assert [c.select_one(".am-printed").get_text() for c in first[3:7]] == [
        "0.647",
        "0.792",
        "0.632",
        "0.821",
    ]
    _, ours, _ = parse(drawn("table4"))
    found = [[x.get_text() for x in tr.select(".am-printed")] for tr in ours.select("tbody tr")]
    assert found[0] == ["0.53", "0.66", "0.55", "0.74"] and found[-1] == []


def test_published_values_of_a_student_are_those_of_its_sources():
    row = frames.table4().iloc[[0]].assign(loss="MarginMSE", in_batch="✗", measure=NDCG)
    for sampling, source, printed in (
        ("TAS-B", "as Hofstätter et al.", "0.69"),
        ("TAS-B, hard", "as Wang and Zuccon", "0.67"),
        ("Rand.", "as Hofstätter et al., Wang and Zuccon", "0.68–0.69"),
    ):
        assert printed_beside(row.assign(sampling=sampling, source=source), 4) == [printed]
    other = row.assign(measure="RR(rel=2)@10", sampling="TAS-B", source="as Hofstätter et al.")
    assert printed_beside(other, 4) == [""]  # no recall


def test_the_command_that_checks_computes_the_score(tmp_path):
    """As a reader would: in the folder of results, by the command as it is shown."""
    qrels = {"q1": {"a": 3, "b": 1, "c": 2}, "q2": {"a": 0, "d": 2, "e": 2}, "q3": {"b": 2}}
    run = {"q1": {"b": 3.0, "a": 2.0, "x": 1.0}, "q2": {"a": 2.0, "e": 1.0, "d": 0.5}}
    id, fingerprint = frames.run_id("x"), "0123456789abcdef"
    folder = tmp_path / "collections" / fingerprint
    folder.mkdir(parents=True)
    (tmp_path / "runs" / id).mkdir(parents=True)
    lines = [f"{q} 0 {d} {g}\n" for q, judged in qrels.items() for d, g in judged.items()]
    (folder / "qrels.TREC-DL19.txt").write_text("".join(lines))
    write_run(run, tmp_path / "runs" / id / "full.TREC-DL19.run.gz", id)
    measures = [NDCG, "R(rel=2)@2"]
    profile = SimpleNamespace(
        name="paper",
        sets=SimpleNamespace(tests=["TREC-DL19"]),
        measures=SimpleNamespace(full=measures),
    )
    inputs = SimpleNamespace(fingerprint=fingerprint)
    _, check = commands(SimpleNamespace(profile=profile, inputs=inputs), id)
    program = [str(Path(sys.executable).with_name("ir_measures")), *shlex.split(check)[1:]]
    done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, check=True)
    found = dict(line.split("\t") for line in done.stdout.splitlines())
    mean = evaluate(qrels, run, measures).mean
    assert found == {measure: f"{mean[measure]:.4f}" for measure in measures}
    assert 0 < mean[NDCG] < 1 and 0 < mean["R(rel=2)@2"] < 1


# --- this run next to the published numbers; supplied runs ---


def as_in_the_paper(data: pd.DataFrame) -> pd.DataFrame:
    """The frame with the paper's query sets and measures."""
    return data.assign(set=data["set"].map(SETS), measure=data["measure"].replace(RECALL, DEEP))


THREE = as_in_the_paper(frames.table3(encoders=("distilbert", "roberta", "mpnet")))
FOUR = as_in_the_paper(frames.table4())
REASON = f"{DEEP} needs 1,000 hits a query; the run has at most 100"
SUPPLIED = pd.DataFrame(
    [
        ("bm25", "TREC-DL19", NDCG, 0.50583, True, "", None),
        ("bm25", "TREC-DL19", DEEP, None, False, REASON, None),
        ("repllama", "TREC-DL19", NDCG, 0.7384, False, "", 2),
        ("mpnet-static", "TREC-DL20", NDCG, 0.6612, False, "", None),
    ],
    columns=["source", "set", "measure", "value", "equivalent", "refused", "missing"],
)
SUPPLIED["loss"] = "Run of <" + SUPPLIED["source"] + ">"
SUPPLIED["source"] = "supplied: " + SUPPLIED["source"]
SUPPLIED = SUPPLIED.assign(
    block="supplied", sampling="—", in_batch="—", best=False, run_id="",
    reference_run_id=FOUR["reference_run_id"].iloc[0],
)  # fmt: skip
WITH = pd.concat([FOUR, SUPPLIED], ignore_index=True)


@pytest.mark.parametrize(("table", "data", "count"), [(3, THREE, 60), (4, FOUR, 28)])
def test_comparison_has_every_number_of_both(table, data, count):
    found = comparison(data, table=table)
    assert len(found) == count
    assert not found.duplicated(["key", "set", "measure"]).any()
    printed = PAPER.scores(table).replace({"measure": {"R@1000": DEEP, "Recall@1000": DEEP}})
    for row in found.to_dict("records"):
        entry = one_row(printed[printed["key"] == row["key"]], row["set"], row["measure"])
        ours = one_row(data[data["run_id"] == row["run_id"]], row["set"], row["measure"])
        if table == 3:
            assert ours["encoder"] == entry["model"].lower() and ours["target"] == entry["target"]
            ticked = ours["in_batch"] or ours["target"] == "distributed"
            assert ticked == (entry["in_batch"] == "✓")
        else:
            assert all(ours[c] == entry[c] for c in ("loss", "sampling", "in_batch"))
        assert (row["ours"], row["published"]) == (ours["value"], float(entry["printed"]))
        difference = row["ours"] - row["published"]
        assert row["difference"] == pytest.approx(difference, abs=1e-12)
        within = abs(round(difference, 3)) <= 0.02
        assert row["verdict"] == (
            "within ±.02" if within else "higher" if difference > 0 else "lower"
        )
    assert set(found["verdict"]) == {"within ±.02", "higher", "lower"}
    html = tables.compared(data, table=table, heading="MS MARCO in small <0123>")
    table_ = BeautifulSoup(html, "html.parser").table
    cells = [[c.get_text() for c in line] for line in rows(table_)]
    assert [line[4:6] for line in cells] == [
        [shown(row["ours"]), row["printed"]] for row in found.to_dict("records")
    ]
    assert table_.caption.get_text().endswith("Gienapp et al.’s numbers: MS MARCO in small <0123>")


def test_verdicts_at_the_edge():
    data = FOUR[(FOUR["loss"] == "BM25") & (FOUR["set"] == "TREC-DL19") & (FOUR["measure"] == NDCG)]
    edges = {0.52: "within ±.02", 0.5204: "within ±.02", 0.5206: "higher", 0.48: "within ±.02", 0.479: "lower"}  # fmt: skip
    for value, verdict in edges.items():
        found = comparison(data.assign(value=value), table=4)
        assert (found["published"].tolist(), found["verdict"].tolist()) == ([0.50], [verdict])
    assert comparison(data.assign(value=float("nan")), table=4).empty


def test_what_is_not_compared():
    data = THREE[THREE["encoder"] == "distilbert"].assign(encoder="small")
    assert comparison(data, table=3).empty
    found = comparison(data, table=3, models={"small": "distilBERT"})
    assert len(found) == 20 and found["key"].str.startswith("distilbert-").all()
    for table, data in ((3, frames.table3()), (4, frames.table4())):  # other sets and cut-offs
        assert comparison(data, table=table).empty
        assert tables.compared(data, table=table, heading="PyDocs") == ""
    exponential = FOUR[FOUR["measure"] == NDCG].assign(measure="nDCG(dcg='exp-log2')@10")
    assert comparison(exponential, table=4).empty


def test_supplied_runs_are_shown_and_replace_printed_numbers():
    soup, ours, theirs = parse(tables.table4(WITH, heading=""))
    supplied = [line for line in rows(ours) if line[0].get_text() == "Supplied"]
    assert [[text(c) for c in line[1:]] for line in supplied] == [
        ["Run of <bm25>", "—", "—", "0.506", "—", "—", "—", "—", "—"],
        ["Run of <repllama>", "—", "—", "0.738", "—", "—", "—", "—", "—"],
        ["Run of <mpnet-static>", "—", "—", "—", "—", "0.661", "—", "—", "—"],
    ]
    assert supplied[0][1].small.get_text() == "supplied: bm25" and supplied[0][5]["title"] == REASON
    assert [li.get_text() for li in soup.select("ul.am-note")[0]("li")] == [
        f"bm25 on TREC-DL19: {REASON}, so it is not reported.",
        "repllama on TREC-DL19: judged queries without hits, which count 0: 2.",
    ]
    (replaced,) = theirs.select("td:has(.am-computed)")
    assert replaced.get_text() == "0.506†" and replaced.find_parent("tr").th.get_text() != ""
    assert replaced.span["title"] == "printed: 0.50; computed from the supplied run bm25"
    assert "A † on it is against" in soup.get_text()
    _, _, theirs = parse(tables.table3(THREE, heading="", supplied=WITH))
    (replaced,) = theirs.select("td:has(.am-computed)")
    assert replaced.get_text() == "0.661" and rows(theirs)[10][6] is replaced
    before, after = (comparison(data, table=4) for data in (FOUR, WITH))
    (row,) = after.loc[before.compare(after).index].to_dict("records")
    assert (row["key"], row["supplied"], row["measure"]) == ("bm25", "bm25", NDCG)
    assert (row["printed"], row["published"]) == ("0.50", 0.50583)
    assert row["difference"] == pytest.approx(row["ours"] - 0.50583)


def test_a_supplied_run_can_be_the_reference():
    """As in the paper, which tests against a run of Wang and Zuccon: named by its source."""
    data = WITH[(WITH["set"] == "TREC-DL19") & (WITH["measure"] == NDCG)]
    data = data.assign(reference_run_id="supplied: bm25")
    soup, ours, _ = parse(tables.table4(data, heading=""))
    assert [u.get_text() for u in ours.find_all("u")] == ["0.506"]
    assert "reference, Run of <bm25> (—)" in soup.select_one("p.am-note").get_text()
