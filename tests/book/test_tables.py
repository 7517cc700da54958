"""What Tables 1 to 4 show, cell by cell, and what they say about it."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from bs4 import BeautifulSoup

import report_frames as frames
from adaptive_margins.book import published, tables
from adaptive_margins.data.trec import write_run
from adaptive_margins.evaluation.measures import evaluate

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
    root = Path(__file__).parents[2]
    css = (root / "book/_static/custom.css").read_text("utf-8")
    assert ":has(div.am-tables)" in css
    assert ALL["table1"].startswith('<div class="am-tables">')


# --- commands ---


def commands(data):
    return {
        id: tables.commands("my profile.yaml", id, "0123456789abcdef", frames.TESTS, [NDCG, RECALL])
        for id in data["run_id"].unique()
    }


@pytest.mark.parametrize("name", ["table3", "table4"])
def test_every_row_opens_to_its_commands(name):
    data = getattr(frames, name)()
    lines = commands(data)
    html = getattr(tables, name)(data, PAPER, heading="PyDocs, <MiniLM>", commands=lines)
    soup, ours, theirs = parse(html)
    opened = ours.find_all("details")
    assert [d.summary.code["title"] for d in opened] == list(dict.fromkeys(data["run_id"]))
    for details in opened:
        id = details.summary.code["title"]
        assert not details.has_attr("open") and details.parent.name == "th"
        assert details.summary.get_text() == id[:8]
        assert details.pre.get_text().split("\n") == lines[id]
        assert len(lines[id]) == 3
    assert not theirs.find("details")
    assert "opens to the commands" in soup.select_one("p.am-note").get_text()
    # Besides them and their sentence nothing changes.
    for details in opened:
        small = soup.new_tag("small")
        small.append(details.summary.code)
        details.replace_with(small)
    plain, *_ = parse(ALL[name])
    note = soup.select_one("p.am-note")
    assert note.get_text().startswith(plain.select_one("p.am-note").get_text())
    note.replace_with(plain.select_one("p.am-note"))
    assert str(soup.select("table")) == str(parse(ALL[name])[0].select("table"))


def test_commands_are_escaped_in_html_and_quoted_for_the_shell():
    data = frames.table4()
    id = data["run_id"].iloc[0]
    (first, *_) = tables.commands("<my profile>.yaml", id, "f", [], [])
    assert shlex.split(first)[-4:] == ["--profile", "<my profile>.yaml", "--run", id]
    html = tables.table4(data, PAPER, commands={id: [first]})
    assert "&lt;my profile&gt;.yaml" in html and "<my profile>" not in html
    assert parse(html)[1].find("details").pre.get_text() == first
    assert len(parse(html)[1].find_all("details")) == 1  # the other runs have none


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
    _, check = tables.commands("paper", id, fingerprint, ["TREC-DL19"], measures)
    program = [str(Path(sys.executable).with_name("ir_measures")), *shlex.split(check)[1:]]
    done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, check=True)
    found = dict(line.split("\t") for line in done.stdout.splitlines())
    mean = evaluate(qrels, run, measures).mean
    assert found == {measure: f"{mean[measure]:.4f}" for measure in measures}
    assert 0 < mean[NDCG] < 1 and 0 < mean["R(rel=2)@2"] < 1


# --- this run beside the published numbers ---

SETS = dict(zip(frames.TESTS, ("TREC-DL19", "TREC-DL20"), strict=True))
DEEP = "R(rel=2)@1000"


def as_in_the_paper(data):
    """The frame with the paper's query sets and measures."""
    return data.assign(set=data["set"].map(SETS), measure=data["measure"].replace(RECALL, DEEP))


THREE = as_in_the_paper(frames.table3(encoders=("distilbert", "roberta", "mpnet")))
FOUR = as_in_the_paper(frames.table4())


def supplied(name, value, refused="", measure=NDCG, name_of_set="TREC-DL19", **more):
    nan = float("nan")
    return {
        "block": "supplied", "loss": f"Run of <{name}>", "sampling": "—", "in_batch": "—", "source": f"supplied: {name}",
        "set": name_of_set, "measure": measure, "value": value, "best": False, "difference": nan, "low": nan, "high": nan,
        "p_adjusted": nan, "equivalent": False, "triples": nan, "run_id": "",
        "reference_run_id": FOUR["reference_run_id"].iloc[0], "refused": refused, **more,
    }  # fmt: skip


REASON = f"{DEEP} needs 1,000 hits a query; the run has at most 100"
TESTED = {"difference": -0.01, "low": -0.04, "high": 0.02, "equivalent": True}
RUNS = [
    supplied("bm25", 0.50583, **TESTED),
    supplied("bm25", float("nan"), REASON, DEEP),
    supplied("repllama", 0.7384, missing=2),
    supplied("repllama", float("nan"), REASON, DEEP, missing=2),
    supplied("mpnet-static", 0.6612, name_of_set="TREC-DL20"),
]
WITH = pd.concat([FOUR, pd.DataFrame(RUNS)], ignore_index=True)


def printed3(row):
    """The one row of our Table 3's frame that a comparison's row must come from."""
    (entry,) = (r for r in PAPER.table3.rows if r.key == row["key"])
    in_batch = entry.in_batch == "✓" and entry.target != "distributed"
    own = THREE[
        (THREE["encoder"] == entry.model.lower())
        & (THREE["target"] == entry.target)
        & (THREE["in_batch"] == in_batch)
    ]
    return entry, own


def printed4(row):
    (entry,) = (r for r in PAPER.table4.rows if r.key == row["key"])
    return entry, FOUR[(FOUR["loss"] == entry.loss) & (FOUR["in_batch"] == entry.in_batch)]


@pytest.mark.parametrize(
    ("number", "data", "find", "recall", "count"),
    [(3, THREE, printed3, "R@1000", 60), (4, FOUR, printed4, "Recall@1000", 28)],
)
def test_comparison_has_every_number_of_both(number, data, find, recall, count):
    found = tables.comparison(data, PAPER, table=number)
    assert len(found) == count and list(found) == tables.COMPARED
    assert not found.duplicated(["key", "set", "measure"]).any()
    for row in found.to_dict("records"):
        entry, own = find(row)
        own = own[(own["set"] == row["set"]) & (own["measure"] == row["measure"])]
        assert len(own) == 1
        assert row["run_id"] == own["run_id"].item() and row["ours"] == own["value"].item()
        text = entry.scores[row["set"]][recall if row["measure"] == DEEP else NDCG].value
        assert row["printed"] == text and row["published"] == float(text)
        assert row["supplied"] == "" and row["in_batch"] == entry.in_batch
        difference = own["value"].item() - float(text)
        assert row["difference"] == pytest.approx(difference, abs=1e-12)
        within = abs(round(difference, 3)) <= 0.02
        assert row["verdict"] == (
            "within ±.02" if within else "higher" if difference > 0 else "lower"
        )
    assert set(found["verdict"]) == {"within ±.02", "higher", "lower"}


def test_verdicts_at_the_edge():
    data = FOUR[(FOUR["loss"] == "BM25") & (FOUR["set"] == "TREC-DL19") & (FOUR["measure"] == NDCG)]
    for value, verdict in [
        (0.52, "within ±.02"), (0.5204, "within ±.02"), (0.5206, "higher"), (0.48, "within ±.02"),
        (0.479, "lower"), (0.5, "within ±.02"),
    ]:  # fmt: skip
        found = tables.comparison(data.assign(value=value), PAPER, table=4)
        assert found["published"].tolist() == [0.50]
        assert found["verdict"].tolist() == [verdict], value
    found = tables.comparison(data.assign(value=0.52), PAPER, table=4, tolerance=0.005)
    assert found["verdict"].tolist() == ["higher"]
    assert tables.comparison(data.assign(value=float("nan")), PAPER, table=4).empty


def test_models_are_matched_as_the_profile_names_them():
    data = THREE[THREE["encoder"] == "distilbert"].assign(encoder="small")
    assert tables.comparison(data, PAPER, table=3).empty
    found = tables.comparison(data, PAPER, table=3, models={"small": "distilBERT"})
    assert len(found) == 20 and found["key"].str.startswith("distilbert-").all()


def test_other_collections_are_not_compared():
    """The laptop's sets and cut-offs: nothing matches, and the page says so."""
    for number, data in ((3, frames.table3()), (4, frames.table4())):
        found = tables.comparison(data, PAPER, table=number)
        assert found.empty and list(found) == tables.COMPARED
        html = tables.compared(data, PAPER, table=number, heading="PyDocs")
        soup = BeautifulSoup(html, "html.parser")
        assert not soup.find("table") and len(soup.select("p.am-note")) == 1
        assert "no counterpart in this run" in soup.get_text()
    # The sets alone, or the measures alone, are not enough.
    only_sets = frames.table4().assign(measure=RECALL).replace({"set": SETS})
    assert tables.comparison(only_sets, PAPER, table=4).empty
    exponential = FOUR[FOUR["measure"] == NDCG].assign(measure="nDCG(dcg='exp-log2')@10")
    assert tables.comparison(exponential, PAPER, table=4).empty
    with pytest.raises(ValueError, match="not Table 2"):
        tables.comparison(FOUR, PAPER, table=2)
    with pytest.raises(ValueError, match=r"comparison of Table 3: columns \['encoder', 'target'\]"):
        tables.comparison(FOUR, PAPER, table=3)


@pytest.mark.parametrize(("number", "data"), [(3, THREE), (4, WITH)])
def test_compared_shows_the_comparison(number, data):
    heading = "MS MARCO in small <0123456789abcdef>, profile paper"
    html = tables.compared(data, PAPER, table=number, heading=heading, supplied=WITH)
    soup = BeautifulSoup(html, "html.parser")
    (table,) = soup.select("table")
    assert table.caption.get_text() == (
        f"Paper Table {number}, this run beside Gienapp et al.’s numbers: {heading}"
    )
    heads = [[th.get_text() for th in tr.find_all("th")] for tr in table.select("thead tr")]
    assert heads == [
        ["Row of the paper", "In-batch", "TREC-DL19", "TREC-DL20"],
        ["nDCG@10", "R@1000"] * 2,
        ["Ours", "Paper", "Diff."] * 4,
    ]
    frame = tables.comparison(data, PAPER, table=number, supplied=WITH)
    columns = [(s, m) for s in SETS.values() for m in (NDCG, DEEP)]
    for cells, (_, own) in zip(rows(table), frame.groupby("key", sort=False), strict=True):
        assert [c.get_text() for c in cells[:2]] == own[["name", "in_batch"]].iloc[0].tolist()
        for i, (name, measure) in enumerate(columns):
            ((_, row),) = own[(own["set"] == name) & (own["measure"] == measure)].iterrows()
            ours, theirs, difference = cells[2 + 3 * i : 5 + 3 * i]
            assert ours.get_text() == shown(row["ours"])
            assert theirs.get_text() == (
                shown(row["published"]) if row["supplied"] else row["printed"]
            )
            assert bool(theirs.select(".am-computed")) == bool(row["supplied"])
            assert text(difference).lstrip("+") == shown(row["difference"])
            assert difference.small.get_text() == row["verdict"]
    note = soup.select_one("p.am-note").get_text()
    counts = frame["verdict"].value_counts()
    assert note.startswith(
        f"Of {len(frame)} numbers {counts['within ±.02']} are within ±.02 of the published ones,"
        f" {counts['higher']} higher and {counts['lower']} lower."
    )
    assert ("two digits" in note) == (number == 4)
    key = {3: "mpnet-static (printed: TREC-DL20 nDCG@10 0.646)", 4: "bm25 (printed: TREC-DL19 nDCG@10 0.50)"}  # fmt: skip
    assert note.endswith(f"These are {key[number]}.")


# --- supplied runs ---


def test_supplied_rows_are_shown_as_scored():
    soup, ours, _ = parse(tables.table4(WITH, PAPER))
    (block,) = (b for b in ours.find_all("tbody") if b.th.get_text() == "Supplied")
    cells = [tr.find_all(["td", "th"]) for tr in block.find_all("tr")[1:]]
    assert [[text(c) for c in row] for row in cells] == [
        ["Run of <bm25>", "—", "—", "0.506†", "—", "—", "—", "—"],
        ["Run of <repllama>", "—", "—", "0.738", "—", "—", "—", "—"],
        ["Run of <mpnet-static>", "—", "—", "—", "—", "0.661", "—", "—"],
    ]
    assert [row[0].small.get_text() for row in cells] == [
        "supplied: bm25", "supplied: repllama", "supplied: mpnet-static",
    ]  # fmt: skip
    assert cells[0][3].small.get_text() == "[−0.040, 0.020]"
    assert cells[0][4]["title"] == cells[1][4]["title"] == REASON
    assert not cells[2][4].get("title")  # not refused, not there
    assert [li.get_text() for li in soup.select("ul.am-note")[0].find_all("li")] == [
        f"bm25 on TREC-DL19: {REASON}, so it is not reported.",
        "repllama on TREC-DL19: judged queries without hits, which count 0: 2.",
        f"repllama on TREC-DL19: {REASON}, so it is not reported.",
    ]
    # The rest of the table is as without them.
    without = parse(tables.table4(FOUR, PAPER))[1]
    block.extract()
    assert ours.thead == without.thead and ours.find_all("tbody") == without.find_all("tbody")


def test_a_supplied_run_replaces_the_printed_number():
    soup, _, theirs = parse(tables.table4(WITH, PAPER))
    _, _, plain = parse(tables.table4(FOUR, PAPER))
    changed = [
        (old, new)
        for a, b in zip(rows(plain), rows(theirs), strict=True)
        for old, new in zip(a, b, strict=True)
        if str(old) != str(new)
    ]
    ((old, new),) = changed
    assert old.get_text() == "0.50" and new.get_text() == "0.506†"
    assert new["title"] == "printed: 0.50; computed from the supplied run bm25"
    assert new.select_one(".am-computed").get_text() == "0.506"
    bm25 = [c.get_text() for c in rows(theirs)[11]]
    assert bm25[0] == "BM25" and bm25[5] == "0.74"  # refused: the printed number stands
    footnote = soup.select("p.am-note")[-2].get_text()
    assert "bm25 (printed: TREC-DL19 nDCG@10 0.50)." in footnote
    assert "A † on such a number is against Softmax (MNRL) (✓)" in footnote

    _, _, theirs = parse(tables.table3(THREE, PAPER, supplied=WITH))
    (new,) = theirs.select("td:has(.am-computed)")
    assert new.get_text() == "0.661" and new["title"].startswith("printed: 0.646;")
    assert rows(theirs)[10][-4] is new
    assert tables.table3(THREE, PAPER, supplied=FOUR) == tables.table3(THREE, PAPER)


def test_the_comparison_is_with_the_supplied_run():
    before = tables.comparison(FOUR, PAPER, table=4)
    after = tables.comparison(WITH, PAPER, table=4)
    differ = before.compare(after).index
    (row,) = after.loc[differ].to_dict("records")
    assert (row["key"], row["supplied"], row["measure"]) == ("bm25", "bm25", NDCG)
    assert row["printed"] == "0.50" and row["published"] == 0.50583
    assert row["difference"] == pytest.approx(row["ours"] - 0.50583)
    three = tables.comparison(THREE, PAPER, table=3, supplied=WITH)
    (row,) = three[three["supplied"] != ""].to_dict("records")
    assert (row["key"], row["set"]) == ("mpnet-static", "TREC-DL20")
    assert row["published"] == 0.6612 and row["printed"] == "0.646"


def test_supplied_rows_survive_csv(tmp_path):
    WITH.to_csv(tmp_path / "x.csv", index=False)
    again = pd.read_csv(tmp_path / "x.csv")
    assert tables.table4(again, PAPER) == tables.table4(WITH, PAPER)
    pd.testing.assert_frame_equal(
        tables.comparison(again, PAPER, table=4), tables.comparison(WITH, PAPER, table=4)
    )


def test_a_supplied_run_can_be_the_reference():
    """As in the paper, which tests against a run of Wang and Zuccon: named by its source."""
    own = WITH[WITH["source"] != "supplied: mpnet-static"].copy()
    own = own[(own["set"] == "TREC-DL19") & (own["measure"] == NDCG)]
    own["reference_run_id"] = "supplied: bm25"
    soup, ours, _ = parse(tables.table4(own, PAPER))
    assert [u.get_text() for u in ours.find_all("u")] == ["0.506"]
    assert "reference, Run of <bm25> (—)" in soup.select_one("p.am-note").get_text()
