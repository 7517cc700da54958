"""The published numbers: complete, and consistent wherever the paper itself is."""

from itertools import product

import pandas as pd

from adaptive_margins.book.published import count, load, minutes

PAPER = load()
SETS = ("TREC-DL19", "TREC-DL20")
MODELS = ("distilBERT", "RoBERTa", "MPNet")
ROWS3 = {(r["model"], r["target"], r["in_batch"]): r for r in PAPER.tables[3].to_dict("records")}
SCORE = r"(\*\*)?[01]\.{digits}(\*\*)?†?"


def score(row: dict, name: str, measure: str) -> float:
    return float(row[f"{name} {measure}"].strip("*†"))


def note(id: str) -> str:
    (text,) = (n["text"] for n in PAPER.notes if n["id"] == id)
    return text


def test_rows_and_columns():
    assert PAPER.tables[1]["model"].tolist() == ["RoBERTa", "MPNet", "distilBERT"]
    assert PAPER.tables[2]["role"].tolist() == ["q", "d+", "d-max", "d-mid", "d-min"]
    variants = [("static", "✗"), ("static", "✓"), ("adaptive", "✗"), ("adaptive", "✓"), ("distributed", "✓")]  # fmt: skip
    assert list(ROWS3) == [(model, *variant) for model in MODELS for variant in variants]
    blocks = PAPER.tables[4]["block"].value_counts(sort=False).to_dict()
    assert blocks == {"Self-distillation": 3, "Teacher distillation": 8, "No distillation": 4}
    for table, measures, digits in ((3, ["nDCG@10", "R@1000"], 3), (4, ["nDCG@10", "Recall@1000"], 2)):  # fmt: skip
        frame = PAPER.tables[table]
        columns = [c for c in frame if "@" in c]
        assert columns == [f"{s} {m}" for s in SETS for m in measures]
        pattern = SCORE.format(digits=rf"\d{{{digits}}}")
        assert all(frame[c].str.fullmatch(pattern).all() for c in columns)
        assert frame["triples"].str.fullmatch(r"—|(≈ )?\d+\.\d+M").all()
    assert PAPER.tables[3]["time"].str.fullmatch(r"\d{1,2}:[0-5]\d\*?").all()


def test_keys_name_their_rows():
    side = {"✗": "", "✓": "-in-batch", "—": ""}
    for (model, target, in_batch), row in ROWS3.items():
        ending = "" if target == "distributed" else side[in_batch]
        assert row["key"] == f"{model.lower()}-{target}{ending}"
    teachers = {"Hofstätter et al.": "hofstaetter", "Wang and Zuccon": "wang-zuccon"}
    sampling = {"Rand.": "random", "TAS-B": "tas-b"}
    names = {"Static (tuned)": "static-tuned", "Static (ε = 1)": "hofstaetter-static"}
    for row in PAPER.tables[4].to_dict("records"):
        name = names.get(row["loss"], row["loss"].lower())
        if row["loss"] == "MarginMSE":
            name = f"{teachers[row['source']]}-{sampling[row['sampling'].strip('_')]}"
        ending = "" if row["loss"] == "Distributed" else side[row["in_batch"]]
        assert row["key"] == name + ending
    assert pd.concat([PAPER.tables[3]["key"], PAPER.tables[4]["key"]]).is_unique


def test_marks_are_where_the_paper_explains_them():
    three, four = PAPER.scores(3), PAPER.scores(4)
    four["teacher"] = four["source"].where(four["block"] == "Teacher distillation", "")
    for frame, by in ((three, ["model"]), (four, ["block", "teacher"])):
        for _, rows in frame.groupby([*by, "set", "measure"]):
            assert rows.loc[rows["bold"], "value"].tolist() == [rows["value"].max()]
    assert not (three["bold"] & three["dagger"]).any()
    assert (three["dagger"].sum(), three["bold"].sum()) == (20, 12)
    assert not four.loc[four["source"] != "Gienapp et al.", "dagger"].any()
    static = PAPER.tables[3]["target"] == "static"
    assert (PAPER.tables[3]["time"].str.endswith("*") == static).all()
    assert ((PAPER.tables[3]["epsilon"] != "") == static).all()
    row = four[(four["key"] == "hofstaetter-tas-b-in-batch") & (four["set"] == "TREC-DL20")]
    assert row["printed"].tolist() == ["0.69", "0.87"] and row["bold"].all()


def test_table2_prints_the_adaptive_in_batch_loss():
    rows = PAPER.tables[2].set_index("role")
    for role in ("d-max", "d-mid", "d-min"):
        rho, target = float(rows.loc[role, "rho"]), float(rows.loc[role, "target"])
        assert f"{(float(rows.loc['d+', 'rho']) - rho - target) ** 2:.2f}" == rows.loc[role, "loss"]
    assert rows.loc["d-mid", "rho"] < rows.loc["d-min", "rho"]  # its note
    assert rows.loc["d-mid", "target"] > rows.loc["d-min", "target"]


def test_tables_3_and_4_differ_exactly_where_the_note_says():
    names = {"Adaptive": "adaptive", "Distributed": "distributed", "Static (tuned)": "static"}
    differ = []
    for row in PAPER.tables[4].to_dict("records"):
        if row["source"] != "Gienapp et al.":
            continue
        long = ROWS3["distilBERT", names[row["loss"]], row["in_batch"]]
        assert abs(count(row["triples"]) - count(long["triples"])) <= 0.05e6
        for name, measure in product(SETS, ("nDCG@10", "R@1000")):
            here = score(row, name, measure.replace("R@", "Recall@"))
            there = score(long, name, measure)
            if abs(here - there) > 0.0051:
                differ.append((row["loss"], row["in_batch"], name, measure, here, there))
    assert differ == [
        ("Adaptive", "✗", "TREC-DL19", "nDCG@10", 0.53, 0.537),
        ("Adaptive", "✗", "TREC-DL20", "nDCG@10", 0.55, 0.542),
        ("Static (tuned)", "✓", "TREC-DL19", "nDCG@10", 0.56, 0.574),
        ("Static (tuned)", "✓", "TREC-DL19", "R@1000", 0.77, 0.786),
        ("Static (tuned)", "✓", "TREC-DL20", "nDCG@10", 0.53, 0.569),
    ]
    text = note("tables-differ")
    assert all(f"{value:g}" in text for *_, here, there in differ for value in (here, there))


def test_notes_on_time_recall_and_data():
    low = []
    for model, in_batch in product(MODELS, "✗✓"):
        static, adaptive = (ROWS3[model, t, in_batch]["time"] for t in ("static", "adaptive"))
        ratio = minutes(static) / minutes(adaptive)
        if ratio < 7:
            low.append((model, in_batch))
            assert f"{static.rstrip('*')} / {adaptive} = {ratio:.1f}x" in note("speed-up")
    assert low == [("distilBERT", "✗"), ("RoBERTa", "✓"), ("MPNet", "✗"), ("MPNet", "✓")]
    for model, times in zip(MODELS, (3, 4, 6), strict=True):  # as the text has them
        static, other = ROWS3[model, "static", "✗"], ROWS3[model, "distributed", "✓"]
        assert minutes(static["time"]) // minutes(other["time"]) == times
    others = [
        (row["model"], row["set"])
        for row in PAPER.scores(3).to_dict("records")
        if row["measure"] == "R@1000" and row["bold"] and (row["target"], row["in_batch"]) != ("adaptive", "✓")
    ]  # fmt: skip
    assert sorted(others) == [("RoBERTa", "TREC-DL20"), ("distilBERT", "TREC-DL19")]
    assert "0.822" in note("highest-recall") and "0.812" in note("highest-recall")
    more = []
    for (model, target, in_batch), row in ROWS3.items():
        static = ROWS3[model, "static", "✗" if target == "distributed" else in_batch]
        if count(row["triples"]) > count(static["triples"]):
            more.append((model, target, in_batch))
            both = f"{row['triples']} against {static['triples']}"
            assert model != "MPNet" or both in note("data-seen")
    assert more == [
        ("distilBERT", "distributed", "✓"), ("MPNet", "adaptive", "✗"), ("MPNet", "adaptive", "✓"),
    ]  # fmt: skip


def test_notes_on_table4():
    rows = PAPER.tables[4].set_index("key")
    ours, peer = (rows.loc[k, "triples"] for k in ("adaptive-in-batch", "wang-zuccon-tas-b"))
    assert 0.135 <= count(ours) / count(peer) < 0.136
    assert f"{ours} / {peer.removeprefix('≈ ')}" in note("data-share")
    scores = PAPER.scores(4)
    marked = scores[scores["dagger"] & (scores["measure"] == "nDCG@10")]
    assert set(marked["key"]) == {"distributed", "static-tuned"}
    underlined = rows.index[rows["sampling"] == "_TAS-B_"]
    assert list(underlined) == ["wang-zuccon-tas-b", "wang-zuccon-tas-b-in-batch"]
    values = scores.pivot(index=["set", "measure"], columns="key", values="value")[underlined]
    assert (values.iloc[:, 0] > values.iloc[:, 1]).all()


def test_words():
    assert PAPER.notes_on(1) == [] and len(PAPER.notes_on(2)) == 2
    assert [count("≈ 14.6M"), count("5.18M"), minutes("15:07*")] == [14_600_000, 5_180_000, 907]
    assert count("—") != count("—")  # NaN
