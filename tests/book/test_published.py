"""The published numbers: complete, and consistent wherever the paper itself is."""

from itertools import product

import pytest
import yaml

from adaptive_margins.book import published as module
from adaptive_margins.book.published import Row3, Row4, Score, count, load

SETS = ("TREC-DL19", "TREC-DL20")
PAPER = load()


def row3(model: str, target: str, in_batch: str) -> Row3:
    (row,) = (
        r for r in PAPER.table3.rows if (r.model, r.target, r.in_batch) == (model, target, in_batch)
    )
    return row


def test_rows_and_columns():
    assert [r.model for r in PAPER.table1.rows] == ["RoBERTa", "MPNet", "distilBERT"]
    assert [r.role for r in PAPER.table2.rows] == ["q", "d+", "d-max", "d-mid", "d-min"]
    variants = [
        ("static", "✗"),
        ("static", "✓"),
        ("adaptive", "✗"),
        ("adaptive", "✓"),
        ("distributed", "✓"),
    ]
    assert [(r.model, r.target, r.in_batch) for r in PAPER.table3.rows] == [
        (model, *variant) for model in ("distilBERT", "RoBERTa", "MPNet") for variant in variants
    ]
    assert [r.block for r in PAPER.table4.rows] == (
        ["Self-distillation"] * 3 + ["Teacher distillation"] * 8 + ["No distillation"] * 4
    )
    for row, measures in [
        *((r, ["nDCG@10", "R@1000"]) for r in PAPER.table3.rows),
        *((r, ["nDCG@10", "Recall@1000"]) for r in PAPER.table4.rows),
    ]:
        assert {name: list(by) for name, by in row.scores.items()} == dict.fromkeys(SETS, measures)


def test_decimals_as_printed():
    for rows, decimals in ((PAPER.table3.rows, 3), (PAPER.table4.rows, 2)):
        for row in rows:
            for by in row.scores.values():
                assert all(len(score.value) == 2 + decimals for score in by.values())


def test_keys_name_their_rows():
    """As the head of the file explains them."""
    side = {"✗": "", "✓": "-in-batch", "—": ""}
    for row in PAPER.table3.rows:
        ending = "" if row.target == "distributed" else side[row.in_batch]
        assert row.key == f"{row.model.lower()}-{row.target}{ending}"
    teachers = {"Hofstätter et al.": "hofstaetter", "Wang and Zuccon": "wang-zuccon"}
    sampling = {"Rand.": "random", "TAS-B": "tas-b"}
    for row in PAPER.table4.rows:
        ending = "" if row.loss == "Distributed" else side[row.in_batch]
        if row.loss == "MarginMSE":
            assert row.key == f"{teachers[row.source]}-{sampling[row.sampling]}{ending}"
        else:
            names = {"Static (tuned)": "static-tuned", "Static (ε = 1)": "hofstaetter-static"}
            assert row.key == names.get(row.loss, row.loss.lower()) + ending
    keys = [row.key for table in (PAPER.table3, PAPER.table4) for row in table.rows]
    assert len(set(keys)) == 30


def groups4() -> dict[tuple[str, str], list[Row4]]:
    """The paper's four blocks; teacher distillation is two of them."""
    groups: dict[tuple[str, str], list[Row4]] = {}
    for row in PAPER.table4.rows:
        teacher = row.source if row.block == "Teacher distillation" else ""
        groups.setdefault((row.block, teacher), []).append(row)
    return groups


def test_bold_is_the_maximum_of_its_column():
    blocks = [
        [r for r in PAPER.table3.rows if r.model == model]
        for model in ("distilBERT", "RoBERTa", "MPNet")
    ]
    for block in [*blocks, *groups4().values()]:
        for name, measure in product(SETS, block[0].scores[SETS[0]]):
            scores: list[Score] = [row.scores[name][measure] for row in block]
            (bold,) = (s for s in scores if s.bold)
            assert bold.number == max(s.number for s in scores), (name, measure)


def test_dagger_in_table3_never_on_the_maximum():
    scores = [s for r in PAPER.table3.rows for by in r.scores.values() for s in by.values()]
    assert not any(s.bold and s.dagger for s in scores)
    assert sum(s.dagger for s in scores) == 20
    assert sum(s.bold for s in scores) == 12


def test_star_is_on_static_rows_only():
    for row in PAPER.table3.rows:
        assert row.time.star == (row.target == "static") == (row.epsilon is not None)


def test_published_competitors_have_no_dagger():
    for row in PAPER.table4.rows:
        if row.source != "Gienapp et al.":
            assert not any(s.dagger for by in row.scores.values() for s in by.values())


def test_table2_prints_the_adaptive_in_batch_loss():
    rows = {r.role: r for r in PAPER.table2.rows}
    positive = float(rows["d+"].rho)
    for role in ("d-max", "d-mid", "d-min"):
        row = rows[role]
        loss = (positive - float(row.rho) - float(row.target)) ** 2
        assert f"{loss:.2f}" == row.loss
    # Its note: the text's claim about the order of ρ.
    assert float(rows["d-mid"].rho) < float(rows["d-min"].rho)
    assert float(rows["d-mid"].target) > float(rows["d-min"].target)


def test_tables_3_and_4_differ_exactly_where_the_note_says():
    names = {"Adaptive": "adaptive", "Distributed": "distributed", "Static (tuned)": "static"}
    differ = []
    for row in PAPER.table4.rows:
        if row.source != "Gienapp et al.":
            continue
        long = row3("distilBERT", names[row.loss], row.in_batch)
        assert abs(count(row.triples) - count(long.triples)) <= 0.05e6
        for name, measure in product(SETS, ("nDCG@10", "R@1000")):
            here = row.scores[name][measure.replace("R@", "Recall@")].number
            there = long.scores[name][measure].number
            if abs(here - there) > 0.0051:
                differ.append((row.loss, row.in_batch, name, measure, here, there))
    assert differ == [
        ("Adaptive", "✗", "TREC-DL19", "nDCG@10", 0.53, 0.537),
        ("Adaptive", "✗", "TREC-DL20", "nDCG@10", 0.55, 0.542),
        ("Static (tuned)", "✓", "TREC-DL19", "nDCG@10", 0.56, 0.574),
        ("Static (tuned)", "✓", "TREC-DL19", "R@1000", 0.77, 0.786),
        ("Static (tuned)", "✓", "TREC-DL20", "nDCG@10", 0.53, 0.569),
    ]
    text = note("tables-differ")
    assert all(f"{value:g}" in text for *_, here, there in differ for value in (here, there))


def note(id: str) -> str:
    (text,) = (n.text for n in PAPER.notes if n.id == id)
    return text


def test_note_on_speed_up():
    text = note("speed-up")
    low = []
    for model, in_batch in product(("distilBERT", "RoBERTa", "MPNet"), "✗✓"):
        static = row3(model, "static", in_batch).time
        adaptive = row3(model, "adaptive", in_batch).time
        ratio = static.minutes / adaptive.minutes
        assert ratio < 15
        if ratio < 7:
            low.append((model, in_batch))
            assert f"{static.value} / {adaptive.value} = {ratio:.1f}x" in text
    assert low == [("distilBERT", "✗"), ("RoBERTa", "✓"), ("MPNet", "✗"), ("MPNet", "✓")]
    # The ratios to distributed targets hold as the text has them: 3x (distilBERT) to 6x (MPNet).
    ratios = [
        row3(m, "static", "✗").time.minutes / row3(m, "distributed", "✓").time.minutes
        for m in ("distilBERT", "RoBERTa", "MPNet")
    ]
    assert [int(r) for r in ratios] == [3, 4, 6]


def test_note_on_highest_recall():
    text = note("highest-recall")
    others = []
    for model, name in product(("distilBERT", "RoBERTa", "MPNet"), SETS):
        rows = [r for r in PAPER.table3.rows if r.model == model]
        top = max(rows, key=lambda r: r.scores[name]["R@1000"].bold)
        if (top.target, top.in_batch) != ("adaptive", "✓"):
            others.append((model, name))
            if name == "TREC-DL20":
                assert top.scores[name]["R@1000"].value in text
                assert row3(model, "adaptive", "✓").scores[name]["R@1000"].value in text
    assert others == [("distilBERT", "TREC-DL19"), ("RoBERTa", "TREC-DL20")]


def test_note_on_data_seen():
    text = note("data-seen")
    more = []
    for model, (target, in_batch) in product(
        ("distilBERT", "RoBERTa", "MPNet"),
        (("adaptive", "✗"), ("adaptive", "✓"), ("distributed", "✓")),
    ):
        row = row3(model, target, in_batch)
        static = row3(model, "static", "✗" if target == "distributed" else in_batch)
        if count(row.triples) > count(static.triples):
            more.append((model, target, in_batch))
            if model == "MPNet":
                assert f"{row.triples} against {static.triples}" in text
    assert more == [
        ("distilBERT", "distributed", "✓"), ("MPNet", "adaptive", "✗"), ("MPNet", "adaptive", "✓"),
    ]  # fmt: skip


def test_notes_on_table4():
    rows = {(r.loss, r.sampling, r.in_batch, r.source): r for r in PAPER.table4.rows}
    ours = rows["Adaptive", "Rand.", "✓", "Gienapp et al."]
    peer = rows["MarginMSE", "TAS-B", "✗", "Wang and Zuccon"]
    assert 0.135 <= count(ours.triples) / count(peer.triples) < 0.136
    assert f"{ours.triples} / {peer.triples.removeprefix('≈ ')}" in note("data-share")
    assert not any(by["nDCG@10"].dagger for by in ours.scores.values())
    assert all(by["Recall@1000"].dagger for by in ours.scores.values())
    daggers = {
        (r.loss, r.in_batch)
        for r in PAPER.table4.rows
        if any(by["nDCG@10"].dagger for by in r.scores.values())
    }
    assert daggers == {("Distributed", "✓"), ("Static (tuned)", "✗")}
    underlined = [r for r in PAPER.table4.rows if r.underlined]
    assert [r.in_batch for r in underlined] == ["✗", "✓"]
    for name, measure in product(SETS, ("nDCG@10", "Recall@1000")):
        first, second = (r.scores[name][measure].number for r in underlined)
        assert first > second


def test_observations_cover_figures_3_to_6():
    assert [sum(o.figure == f for o in PAPER.observations) for f in (3, 4, 5, 6)] == [4, 2, 3, 3]
    assert PAPER.observation("skew").section == "5.3"
    with pytest.raises(KeyError, match="no observation 'scew'; there are"):
        PAPER.observation("scew")


def test_every_table_has_its_notes():
    assert PAPER.notes_on(1) == []
    assert len(PAPER.notes_on(2)) == 2
    assert any("34:55 / 8:10 = 4.3x" in text for text in PAPER.notes_on(3))
    assert any("13.5%" in text for text in PAPER.notes_on(4))


def test_count():
    assert count("≈ 14.6M") == 14_600_000
    assert count("5.18M") == 5_180_000
    assert count("—") != count("—")  # NaN


def test_table4_frame():
    frame = PAPER.table4_frame()
    assert len(frame) == 15 * 4
    assert (frame.run_id == "").all() and not frame.equivalent.any()
    assert frame.source.str.startswith("published: ").all()
    row = frame[(frame.loss == "MarginMSE") & (frame["set"] == "TREC-DL20") & (frame.value == 0.87)]
    assert row.measure.tolist() == ["Recall@1000"] and row.best.all()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('value: "0.647"', 'value: "0,647"', r"table3\.rows\.0\.scores.*got '0,647'"),
        ("target: distributed", "target: distribted", r"table3\.rows\.4\.target.*distribted"),
        ("row: 15", "row: 16", "not numbered"),
        ("key: mpnet-static\n", "key: bm25\n", "occurs twice: bm25"),
        ("key: bm25", "key: BM25", r"table4\.rows\.11\.key.*got 'BM25'"),
        ("dagger: true", "daggger: true", "daggger"),
        ("id: speed-up", "id: tables-differ", "occurs twice"),
        ("R@1000: {value: \"0.792\"", "R@100: {value: \"0.792\"", "differ in their columns"),
        ("table1:", "table1: [", "is not YAML"),
    ],
)  # fmt: skip
def test_broken_files_are_refused(tmp_path, old, new, message):
    text = (module.files("adaptive_margins.book") / "published.yaml").read_text("utf-8")
    assert old in text
    path = tmp_path / "published.yaml"
    path.write_text(text.replace(old, new, 1), "utf-8")
    with pytest.raises(ValueError, match=message) as error:
        load(path)
    assert str(path) in str(error.value)


def test_no_value_is_read_as_a_number():
    """A score that YAML reads as a float would lose its trailing zero."""
    text = (module.files("adaptive_margins.book") / "published.yaml").read_text("utf-8")
    for table in ("table3", "table4"):
        for row in yaml.safe_load(text)[table]["rows"]:
            for by in row["scores"].values():
                assert all(isinstance(score["value"], str) for score in by.values())
