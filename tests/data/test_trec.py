"""TREC's files: what is read, what is refused and how, and the order against pytrec_eval."""

from __future__ import annotations

import gzip
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import pytrec_eval

from adaptive_margins.data.text import DataError
from adaptive_margins.data.trec import (
    qrels_text,
    read_marked_run,
    read_qrels,
    read_run,
    run_tag,
    top,
    write_run,
)


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def refused(read, path: Path) -> str:
    with pytest.raises(DataError) as error:
        read(path)
    return str(error.value).replace(f"{path}:", "")


# ---- order


def test_top_orders_ties_by_descending_docid():
    assert top({"a": 1.0, "c": 1.0, "b": 2.0, "B": 1.0}, 3) == [("b", 2.0), ("c", 1.0), ("a", 1.0)]
    assert top({"a": 1.0}, 9) == [("a", 1.0)]
    assert top({}, 3) == []


def test_top_is_trec_evals_order_also_where_32_bits_cannot_tell_scores_apart():
    rng = np.random.default_rng(3)
    base = rng.integers(0, 6, size=40) / 7
    scores = {f"d{i}": float(x + rng.choice([0, 1e-10])) for i, x in enumerate(base)}
    for position, (docid, _) in enumerate(top(scores), start=1):
        evaluator = pytrec_eval.RelevanceEvaluator({"q": {docid: 1}}, {"recip_rank"})
        assert evaluator.evaluate({"q": scores})["q"]["recip_rank"] == pytest.approx(1 / position)


def test_scores_beyond_32_bits_are_ordered_as_trec_eval_does():
    scores = {"a": 1e40, "b": 1e300, "c": 3.4e38, "d": -1e39, "e": -1e41, "f": 1e-50, "g": 0.0}
    order = [docid for docid, _ in top(scores)]
    assert order == ["b", "a", "c", "g", "f", "e", "d"]
    for position, docid in enumerate(order, start=1):
        evaluator = pytrec_eval.RelevanceEvaluator({"q": {docid: 1}}, {"recip_rank"})
        assert evaluator.evaluate({"q": scores})["q"]["recip_rank"] == pytest.approx(1 / position)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_top_rejects_scores_that_are_not_finite(bad):
    with pytest.raises(ValueError, match=r"'b' must be finite, not"):
        top({"a": 1.0, "b": bad}, 2)


def test_top_rejects_depth_below_one():
    with pytest.raises(ValueError, match="depth must be at least 1, not 0"):
        top({"a": 1.0}, 0)


# ---- run files

RUN = {
    "q10": {"b": 0.1 + 0.2, "a": 1e-30, "c": -2.5},
    "q1": {"d1": 1.0, "d3": 1.0, "d2": float(np.float32(0.1))},
}


@pytest.mark.parametrize("name", ["x.run", "x.run.gz"])
def test_runs_survive_a_round_trip_and_equal_runs_give_equal_bytes(tmp_path, name):
    path = tmp_path / name
    write_run(RUN, path, "tag")
    assert read_run(path) == RUN
    first = path.read_bytes()
    reordered = {q: dict(reversed(RUN[q].items())) for q in reversed(RUN)}
    write_run(reordered, path, "tag")
    assert path.read_bytes() == first
    assert path.suffix != ".gz" or first[4:8] == bytes(4)  # no time stamp
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_run_files_look_as_trec_wants_them(tmp_path):
    write_run(RUN, tmp_path / "x.run", "mine")
    assert (tmp_path / "x.run").read_text().splitlines() == [
        "q1 Q0 d3 1 1.0 mine",
        "q1 Q0 d1 2 1.0 mine",
        "q1 Q0 d2 3 0.10000000149011612 mine",
        "q10 Q0 b 1 0.30000000000000004 mine",
        "q10 Q0 a 2 1e-30 mine",
        "q10 Q0 c 3 -2.5 mine",
    ]


@pytest.mark.parametrize(
    ("run", "tag"),
    [({"q": {"a b": 1.0}}, "t"), ({"": {"a": 1.0}}, "t"), ({"q": {"a": 1.0}}, "a tag")],
)
def test_what_a_run_file_cannot_hold_is_not_written(tmp_path, run, tag):
    with pytest.raises(ValueError, match="non-empty and without white space"):
        write_run(run, tmp_path / "x.run", tag)
    assert list(tmp_path.iterdir()) == []


def test_every_kind_of_fault_is_named_with_its_first_line(tmp_path):
    path = written(
        tmp_path / "x.run",
        b"q Q0 a 1 2.0 t\n"
        b"q Q0 b 2 1.0\n"
        b"q Q0 a 3 0.5 t\n"
        b"q Q0 c 4 nan t\n"
        b"q Q0 d 5 high t\n"
        b"\n"
        b"q Q0 \xff 6 0.1 t\n",
    )
    columns = "6 columns expected (query id, Q0, docid, rank, score, tag)"
    assert [line.strip() for line in refused(read_run, path).splitlines()[1:]] == [
        f"2: {columns}, 5 found",
        "3: passage 'a' occurs twice for query 'q'",
        "4: score 'nan' is not a finite number (and 1 more line like it)",
        rf"6: {columns}, found a blank line; remove such lines: sed -i '/^\s*$/d' FILE",
        "7: not valid UTF-8 (byte 6 of the line); if it is Latin-1: iconv -f LATIN1 -t UTF-8",
    ]


@pytest.mark.parametrize(
    ("score", "value"),
    [("39e-47", 39e-47), ("1e5", 1e5), ("0x1.8p1", 3.0), ("-0X10", -16.0), ("+.5", 0.5), ("5.", 5.0), ("1e40", 1e40)],
)  # fmt: skip
def test_scores_are_read_as_c_reads_them(tmp_path, score, value):
    path = written(tmp_path / "x.run", f"q Q0 a 1 {score} t\n")
    assert read_run(path) == {"q": {"a": value}}


@pytest.mark.parametrize(
    "score",
    ["3_0", "٣٩", "３", "−1", "0x", "inf", "-INF", "nan", "NAN(1)", "1e400", "0x1p5000", "1e", "--1"],
)  # fmt: skip
def test_what_is_no_number_is_refused_with_its_line(tmp_path, score):
    path = written(tmp_path / "x.run", f"q Q0 a 1 2 t\nq Q0 b 2 {score} t\n")
    assert refused(read_run, path) == f"2: score {score!r} is not a finite number"


def test_a_decimal_comma_is_told(tmp_path):
    path = written(tmp_path / "x.run", "q Q0 a 1 1,5 t\n")
    assert refused(read_run, path).startswith("1: score '1,5' is not a finite number; write a deci")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"qid": "1", "docid": "2"}\n', "JSON"),
        ("[\n  {\n", "JSON"),
        ("1\t7\t1\n1\t8\t2\n", r"MS MARCO's three .*awk '\{print \$1, \"Q0\", \$2, \$3, -\$3"),
        ("1\t7\twhat is it\tit is a thing\n", "MS MARCO's top1000"),
        ("1 0 7 2\n", r"judgements \(qrels\)"),
        ("query-id\tcorpus-id\tscore\n1\t7\t1\n", r"judgements \(qrels\)"),
        ("# a comment\n1 Q0 7 1 2 t\n", "a comment"),
        ("qid Q0 docid rank score tag\n1 Q0 7 1 2 t\n", "header.*sed -i 1d"),
        ("1,Q0,7,1,2.5,t\n", "commas"),
        ("1 Q0 7 1 2.5\n", "5 found"),
        ("", "the file is empty"),
    ],
)  # fmt: skip
def test_another_kind_of_file_than_a_run_is_named_in_one_line(tmp_path, content, told):
    path = written(tmp_path / "x.run", content)
    with pytest.raises(DataError, match=told) as error:
        read_run(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"qid": "1"}\n', "JSON"),
        ("1 Q0 7 1 2.5 t\n", "found 6, as a run has"),
        ("1\t7\t1\n1\t8\t0\n", r"found 3; .*query-id\\tcorpus-id\\tscore"),
        ("qid\tpid\tlabel\n1\t7\t1\n", r"found 3; .*'1c query-id\\tcorpus-id\\tscore"),
        ("query-id\titer\tcorpus-id\tscore\n1\t0\t7\t1\n", ":1: grade 'score'.*header.*sed -i 1d"),
        ("1 0 7 1\n# pool\n1 0 8 1\n", ":2: .*a comment"),
        ("1 0 7 1\n# by hand 1\n", ":2: .*a comment"),
        ("1 0 7 1\n\n1 0 8 1\n", ":2: .*a blank line"),
        ("1 0 7 1\n1 0 7 1\n", ":2: '1' judges '7' twice$"),
        ("1 0 7 1\n1 0 8 1.0\n", ":2: grade '1.0' is not an integer; convert: sed "),
        ("1 0 7 1\n1 0 8 1.5\n", ":2: grade '1.5' is not an integer$"),
        ("1 0 7 1\n1 0 8 1_0\n", ":2: grade '1_0' is not an integer$"),
        ("1 0 7 1\n1 0 8 ٣\n", ":2: grade '٣' is not an integer$"),
        ("1 0 7 1\n1 0 8 1001\n", ":2: grade of '8' must be an integer within ±1,000, not 1001$"),
        ("1 0 7 1\n1 0 8 -999999999\n", ":2: grade of '8' .* not -999999999$"),
        ("1 0 7 1\n1 0 8 " + "9" * 5000 + "\n", ":2: grade of '8' .* within ±1,000, not 9+$"),
    ],
)  # fmt: skip
def test_other_files_than_qrels_are_named_with_the_first_line_at_fault(tmp_path, content, told):
    path = written(tmp_path / "qrels.txt", content)
    with pytest.raises(DataError, match=told) as error:
        read_qrels(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        "q1 0 a 1\nq1 0 b -2\nq2 0 a +0",
        "  q1\t0\ta\t1\nq1 0  b   -2 \nq2 x a 000\n",
        "query-id\tcorpus-id\tscore\nq1\ta\t1\nq1\tb\t-2\nq2\ta\t0\n",
        "query-id corpus-id score\nq1 a 1\nq1 b -2\nq2 a 0\n",
        "q1 0 a 1\r\nq1 0 b -2\r\nq2 0 a 0\r\n",
        "\ufeffq1 0 a 1\nq1 0 b -2\nq2 0 a 0\n",
        gzip.compress(b"q1 0 a 1\nq1 0 b -2\n", mtime=0) + gzip.compress(b"q2 0 a 0\n", mtime=0),
    ],
)
@pytest.mark.filterwarnings("ignore:.*(BOM|CRLF)")
def test_qrels_in_other_dress_are_read_whole(tmp_path, content):
    found = read_qrels(written(tmp_path / "qrels", content))
    assert found == {"q1": {"a": 1, "b": -2}, "q2": {"a": 0}}
    assert read_qrels(written(tmp_path / "again", qrels_text(found))) == found


# ---- ranks and ties


def warned(path: Path, **how) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read_run(path, **how)
    return [str(warning.message).removeprefix(f"{path}: ") for warning in caught]


def test_ranks_that_contradict_scores_and_scores_that_tie_are_told_once_a_file(tmp_path):
    lines = [
        "a Q0 x 1 0.1 t", "a Q0 y 2 0.9 t",  # distances in the place of scores
        "b Q0 x 1 0.2 t", "b Q0 y 2 0.9 t",
        "c Q0 x 1 1.0 t", "c Q0 y 2 1.0 t",  # tied
        "d Q0 y 2 0.1 t", "d Q0 x 1 0.9 t",  # lines in another order than ranks
        "e Q0 x 1 0.1 t",
        "f Q0 x 0 0.9 t", "f Q0 y 0 0.1 t", "f Q0 z 0 0.5 t",  # no ranks at all
    ]  # fmt: skip
    contradict, tie = warned(written(tmp_path / "x.run", "\n".join(lines) + "\n"))
    assert contradict.startswith("ranks contradict scores") and "(2 of 6 queries)" in contradict
    assert "all scores" in tie and "(1 of 6 queries)" in tie
    assert warned(tmp_path / "x.run", trusted=True) == []


def test_a_run_that_was_written_here_has_no_contradiction(tmp_path):
    # Equal in 32 bits, so that docids decide; in 64 bits the order would be the other one.
    write_run({"q": {"a": 1.0, "b": 1.0 - 1e-12, "c": 0.5}}, tmp_path / "x.run", "t")
    assert warned(tmp_path / "x.run") == []


def test_a_column_of_ranks_without_numbers_is_ignored(tmp_path):
    path = written(tmp_path / "x.run", "q Q0 a - 1 t\nq Q0 b - 2 t\nr Q0 a 1 1 t\nr Q0 b - 2 t\n")
    assert warned(path) == []


def test_a_complete_run_is_marked_and_its_parts_are_not(tmp_path):
    run = {"q1": {"a": 2.0, "b": 1.0, "c": 0.5}, "q2": {"a": 1.0}}
    cases = [(4, 9, True), (3, 9, False), (3, 3, True), (100, 9, True), (2, 9, False)]
    for depth, passages, complete in cases:
        path = tmp_path / "x.run"
        write_run(run, path, run_tag("sys", run, depth, passages))
        assert read_marked_run(path) == (run, complete)
        assert read_run(path) == run
        assert path.read_text().splitlines()[0].split()[-1].startswith("sys")
    write_run(run, path, run_tag("sys", run, 4, 9))
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if line.split()[3] != "3"))
    assert not read_marked_run(path)[1]  # the first two hits of each query
    path.write_text("".join(lines) + "q3 Q0 a 1 1.0 theirs\n")
    assert not read_marked_run(path)[1]
