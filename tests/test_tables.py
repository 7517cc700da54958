"""What Tables 1 to 4 show, cell by cell, and what they say about it."""

import re
from pathlib import Path

import pandas as pd
import pytest
from bs4 import BeautifulSoup

import report_frames as frames
from adaptive_margins.report import published, tables

PAPER = published.load()
NDCG, RECALL = frames.NDCG, frames.RECALL
COLUMNS = [(s, m) for s in frames.TESTS for m in (NDCG, RECALL)]


def parse(html):
    soup = BeautifulSoup(html, "html.parser")
    ours, theirs = soup.select("table.am-table")
    return soup, ours, theirs


def rows(table):
    """Cells of each body row, block titles left out."""
    found = [tr.find_all(["td", "th"], recursive=False) for tr in table.select("tbody > tr")]
    return [cells for cells in found if not cells[0].get("colspan")]


def shown(value):
    return f"{value:.3f}".replace("-", "−")


def text(cell):
    """The cell's first line: without intervals and run ids."""
    cell = BeautifulSoup(str(cell), "html.parser")
    for small in cell.find_all("small"):
        small.extract()
    return cell.get_text()


def check_score(cell, row, underlined=False):
    reference = row["run_id"] == row["reference_run_id"]
    dagger = bool(row["equivalent"]) and not reference
    assert text(cell) == shown(row["value"]) + "†" * dagger
    assert bool(cell.find("strong")) == bool(row["best"])
    assert bool(cell.find("u")) == (reference and underlined)
    small = cell.find("small")
    if reference:
        assert small is None
    else:
        assert small.get_text() == f"[{shown(row['low'])}, {shown(row['high'])}]"
        assert row["reference_run_id"] in cell["title"]
        assert shown(row["difference"]) in cell["title"]


ALL = {
    "table1": tables.table1(frames.table1(), PAPER, heading="PyDocs, <MiniLM>"),
    "table2": tables.table2(frames.table2(), PAPER, heading="PyDocs, <MiniLM>"),
    "table3": tables.table3(frames.table3(), PAPER, heading="PyDocs, <MiniLM>"),
    "table4": tables.table4(frames.table4(), PAPER, heading="PyDocs, <MiniLM>"),
}


@pytest.mark.parametrize("name", ALL)
def test_ours_and_published_are_told_apart(name):
    soup, ours, theirs = parse(ALL[name])
    number = name[-1]
    assert ours.caption.get_text() == f"Paper Table {number}, this run: PyDocs, <MiniLM>"
    assert theirs.caption.get_text().startswith(
        f"Paper Table {number}, published (Gienapp et al.): MS MARCO"
    )
    assert [div["class"] for div in soup.select(".am-scroll")] == [
        ["am-scroll", "am-ours"],
        ["am-scroll", "am-published"],
    ]
    for table in (ours, theirs):  # wide tables scroll in a box that a keyboard reaches
        box = table.parent
        assert box["tabindex"] == "0" and box["aria-labelledby"] == table.caption["id"]
    notes = [li.get_text() for li in soup.select("ul.am-note li")]
    assert notes == PAPER.notes_on(int(number))


@pytest.mark.parametrize("name", ALL)
def test_html_is_well_formed(name):
    """Every cell of every row lies on the grid that the header spans."""
    soup, *both = parse(ALL[name])
    assert ALL[name].count("<div") == ALL[name].count("</div>")
    ids = [tag["id"] for tag in soup.select("[id]")]
    assert len(ids) == len(set(ids))
    for table in both:
        head = table.select("thead > tr")
        width = sum(int(th.get("colspan", 1)) for th in head[0].find_all("th"))
        assert all(th.get("scope") in ("col", "colgroup") for th in table.select("thead th"))
        assert all(th.get("scope") in ("row", "rowgroup") for th in table.select("tbody th"))
        for body in table.find_all("tbody"):
            spanned = 0
            for tr in body.find_all("tr"):
                cells = tr.find_all(["td", "th"], recursive=False)
                own = sum(int(c.get("colspan", 1)) for c in cells)
                assert own + (1 if spanned > 0 else 0) == width
                spanned = max(spanned - 1, *(int(c.get("rowspan", 1)) - 1 for c in cells))


def test_table1_cells():
    _, ours, theirs = parse(ALL["table1"])
    for cells, row in zip(rows(ours), frames.table1().to_dict("records"), strict=True):
        assert [c.get_text() for c in cells] == [
            row["encoder"].replace("minilm", "MiniLM"),
            row["base"],
            "22.7M",
            f"{row['trained'] / 1e6:.3g}M",
            "mean",
            "384",
            row["run_id"][:8],
        ]
        assert cells[-1].code["title"] == row["run_id"]
        assert not ours.find("a")
    assert [[c.get_text() for c in cells] for cells in rows(theirs)] == [
        ["RoBERTa", "124M", "[CLS] + Linear", "768"],
        ["MPNet", "109M", "[CLS] + Linear", "768"],
        ["distilBERT", "66M", "[CLS]", "768"],
    ]


def test_labels_rename_encoders():
    html = tables.table1(frames.table1(), PAPER, labels={"minilm-4": "two layers"})
    _, ours, _ = parse(html)
    assert [cells[0].get_text() for cells in rows(ours)] == ["MiniLM-3", "two layers", "MiniLM-5"]
    assert ours.caption.get_text() == "Paper Table 1, this run"


def test_table2_cells():
    soup, ours, theirs = parse(ALL["table2"])
    heads = [th.get_text() for th in ours.select("thead th")]
    assert heads == ["", "Text", "ρ", "t", "l² as printed(ρ(d+) − ρ(d−j) − t)²", "l² by Equation 3(margini − t)²"]  # fmt: skip
    for cells, row in zip(rows(ours), frames.table2().to_dict("records"), strict=True):
        assert cells[0].get_text() == row["role"].replace("d-", "d−")
        assert cells[1].get_text().removesuffix(" […]") in row["text"]
        assert cells[1]["title"] == row["text"]
        for cell, name, decimals in zip(
            cells[2:], ("rho", "target", "loss_table", "loss_equation"), (2, 2, 3, 3), strict=True
        ):
            wanted = "—" if pd.isna(row[name]) else f"{row[name]:.{decimals}f}".replace("-", "−")
            assert cell.get_text() == wanted
    assert "Equation 3 keeps the query’s own negative" in soup.select_one("p.am-note").get_text()
    assert soup.select_one("p.am-note code")["title"] == frames.run_id("table2")
    assert [c.get_text() for c in rows(theirs)[2]][2:] == ["0.34", "0.69", "0.06"]


def test_texts_are_escaped_and_cut():
    assert "Fourier &lt;transform&gt;" in ALL["table2"]
    assert "<transform>" not in ALL["table2"] and "<MiniLM>" not in ALL["table2"]
    _, ours, _ = parse(ALL["table2"])
    assert len(rows(ours)[1][1].get_text()) <= 160 + len(" […]")
    assert tables.shorten("one two  three\nfour", 11) == "one two […]"
    assert tables.shorten("one two", 7) == "one two"
    assert tables.shorten("x" * 50, 10) == "x" * 10 + " […]"


def test_table3_cells():
    data = frames.table3()
    _, ours, _ = parse(ALL["table3"])
    top = [(th.get_text(), th.get("colspan")) for th in ours.select("thead tr:first-child th")]
    assert [t for t in top if t[1]] == [("test1", "2"), ("test2", "2")]
    measures = [th.get_text() for th in ours.select("thead tr:last-child th")]
    assert measures == ["nDCG@10", "R@20"] * 2
    runs = list(data.groupby("run_id", sort=False))
    assert len(runs) == len(rows(ours)) == 15
    for position, (cells, (id, own)) in enumerate(zip(rows(ours), runs, strict=True)):
        one = own.iloc[0]
        if position % 5 == 0:
            assert cells[0].get_text() == one["encoder"].replace("minilm", "MiniLM")
            assert cells[0]["rowspan"] == "5"
            cells = cells[1:]
        name, in_batch, *scores, time, seen = cells
        static = one["target"] == "static"
        assert text(name) == ("static, ε = 0.2" if static else one["target"])
        assert name.code["title"] == id and name.code.get_text() == id[:8]
        assert in_batch.get_text() == (
            "✓" if one["in_batch"] or one["target"] == "distributed" else "✗"
        )
        for cell, column in zip(scores, COLUMNS, strict=True):
            ((_, row),) = own[(own["set"] == column[0]) & (own["measure"] == column[1])].iterrows()
            check_score(cell, row)
        assert time.get_text() == tables.duration(one["seconds"]) + "*" * static
        assert ("sweep" in time.get("title", "")) == static
        assert seen.get_text() == f"{one['triples']:,}"


def test_table3_published_is_as_printed():
    _, _, theirs = parse(ALL["table3"])
    for cells, row in zip(rows(theirs), PAPER.table3.rows, strict=True):
        cells = cells[-8:]
        if row.target == "static":
            assert cells[0].get_text() == f"static, ε = {row.epsilon}‡"
        else:
            assert cells[0].get_text() == row.target
        scores = [s for by in row.scores.values() for s in by.values()]
        assert [c.get_text() for c in cells[2:6]] == [s.value + "†" * s.dagger for s in scores]
        assert [bool(c.find("strong")) for c in cells[2:6]] == [s.bold for s in scores]
        assert cells[6].get_text() == row.time.value + "*" * row.time.star
        assert cells[7].get_text() == row.triples


def test_table3_says_what_the_marks_mean():
    soup, *_ = parse(ALL["table3"])
    note = soup.select_one("p.am-note").get_text()
    assert "after Bonferroni correction for 4 comparisons" in note
    assert "the 97.5% interval of the difference" in note and "margin ±0.05" in note


def test_dagger_follows_the_frame():
    data = frames.table3()
    for equivalent in (True, False):
        _, ours, _ = parse(tables.table3(data.assign(equivalent=equivalent), PAPER))
        not_reference = data["run_id"] != data["reference_run_id"]
        assert ours.get_text().count("†") == (not_reference.sum() if equivalent else 0)


def test_a_frame_read_from_csv_gives_the_same_tables(tmp_path):
    for name, make in (("table3", tables.table3), ("table4", tables.table4)):
        data = getattr(frames, name)()
        data.to_csv(tmp_path / "x.csv", index=False)
        again = make(pd.read_csv(tmp_path / "x.csv"), PAPER, heading="PyDocs, <MiniLM>")
        assert again == ALL[name]
        # Flags with a gap come back as text.
        flags = data.assign(equivalent=data["equivalent"].map(str))
        assert make(flags, PAPER, heading="PyDocs, <MiniLM>") == ALL[name]


def test_table4_cells():
    data = frames.table4()
    _, ours, _ = parse(ALL["table4"])
    titles = [th.get_text() for th in ours.select("th.am-block")]
    assert titles == ["Self-distillation", "Teacher distillation", "No distillation", "Not in the paper"]  # fmt: skip
    runs = list(data.groupby("run_id", sort=False))
    assert len(rows(ours)) == len(runs) == 9
    for cells, (id, own) in zip(rows(ours), runs, strict=True):
        one = own.iloc[0]
        assert text(cells[0]) == one["loss"]
        assert cells[0].code["title"] == id
        assert [c.get_text() for c in cells[1:3]] == [one["sampling"], one["in_batch"]]
        for cell, column in zip(cells[3:7], COLUMNS, strict=True):
            ((_, row),) = own[(own["set"] == column[0]) & (own["measure"] == column[1])].iterrows()
            check_score(cell, row, underlined=True)
        assert cells[7].get_text() == (f"{one['triples']:,}" if one["triples"] else "—")


def test_table4_takes_published_rows_from_the_paper_only():
    """A frame that carries them too (for the CSV) gives the same table, and they get no † from it."""
    both = pd.concat([frames.table4(), PAPER.table4_frame().assign(equivalent=True, value=0.111)])
    assert tables.table4(both, PAPER, heading="PyDocs, <MiniLM>") == ALL["table4"]


def test_table4_published_is_as_printed():
    _, _, theirs = parse(ALL["table4"])
    titles = [th.get_text() for th in theirs.select("th.am-block")]
    assert titles == [
        "Self-distillation",
        "Teacher distillation: Hofstätter et al.",
        "Teacher distillation: Wang and Zuccon",
        "No distillation",
    ]
    for cells, row in zip(rows(theirs), PAPER.table4.rows, strict=True):
        assert [c.get_text() for c in cells[:4]] == [
            row.loss,
            row.sampling,
            row.in_batch,
            row.source,
        ]
        scores = [s for by in row.scores.values() for s in by.values()]
        assert [c.get_text() for c in cells[4:8]] == [s.value + "†" * s.dagger for s in scores]
        assert bool(cells[1].find("u")) == row.underlined


def test_table4_names_reference_and_comparisons():
    soup, *_ = parse(ALL["table4"])
    note = soup.select_one("p.am-note").get_text()
    assert "the underlined reference, Softmax (MNRL) (✓)" in note
    assert "for 8 comparisons" in note and "98.75% interval" in note


def test_a_run_alone_has_no_test():
    data = frames.table4()
    alone = data[data["run_id"] == data["reference_run_id"]]
    soup, ours, _ = parse(tables.table4(alone, PAPER))
    assert "Nothing to compare" in soup.select_one("p.am-note").get_text()
    assert "†" not in ours.get_text() and not ours.select("td small")


def test_a_missing_score_is_a_dash():
    data = frames.table3()
    id = data["run_id"].iloc[0]
    gone = (data["run_id"] == id) & (data["set"] == "test2") & (data["measure"] == NDCG)
    _, ours, _ = parse(tables.table3(data[~gone], PAPER))
    assert [text(c) for c in rows(ours)[0]][5] == "—"


def test_numbers_are_written_as_said():
    assert [tables.duration(s) for s in (0, 59.4, 60, 3599.6, 9552)] == [
        "0:00",
        "0:59",
        "1:00",
        "1:00:00",
        "2:39:12",
    ]
    assert [tables.triples(n) for n in (0, float("nan"), 768, 1536, 5_180_000)] == [
        "—",
        "—",
        "768",
        "1,536",
        "5.18M",
    ]
    assert [tables.millions(n) for n in (512, 22_713_216, 1_774_464)] == ["512", "22.7M", "1.77M"]
    assert tables.interval(-0.0123, 0.0311) == "[−0.012, 0.031]"


def test_every_number_of_this_run_is_in_the_frame():
    """Nothing is typed: changed values change every score of our table."""
    data = frames.table4()
    _, ours, _ = parse(tables.table4(data.assign(value=0.123, low=-0.2, high=0.3), PAPER))
    numbers = set(re.findall(r"\d\.\d{3}", ours.get_text()))
    assert numbers == {"0.123", "0.200", "0.300"}


@pytest.mark.parametrize("name", ALL)
def test_missing_columns_are_named(name):
    data = getattr(frames, name)().drop(columns="run_id")
    with pytest.raises(ValueError, match=rf"{name}: columns \['run_id'\] are missing"):
        getattr(tables, name)(data, PAPER)


def test_stylesheet_of_the_book_fits():
    """It lifts the theme's light box in dark mode from exactly the element that the tables have."""
    root = Path(__file__).parents[1]
    css = (root / "book/_static/custom.css").read_text("utf-8")
    assert ":has(div.am-tables)" in css
    assert ALL["table1"].startswith('<div class="am-tables">')
