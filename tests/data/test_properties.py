"""Readers of what others wrote, on any bytes and there and back. $ADAPTIVE_MARGINS_FUZZ=N: N random examples a test."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from adaptive_margins.data.collection import Collection, Texts, read_queries, tsv
from adaptive_margins.data.folder import read_folder
from adaptive_margins.data.trec import MAX_GRADE, qrels_text, read_qrels, read_run, run_text
from adaptive_margins.errors import AdaptiveMarginsError
from adaptive_margins.profiles.load import load_profile

EXAMPLES = int(os.environ.get("ADAPTIVE_MARGINS_FUZZ", "0"))
some = settings(
    max_examples=EXAMPLES or 50, derandomize=not EXAMPLES, deadline=None, database=None,
    suppress_health_check=list(HealthCheck), print_blob=bool(EXAMPLES),
)  # fmt: skip
few = settings(some, max_examples=EXAMPLES or 10)  # of profiles, 50 ms each

MARKS = [b"\n", b"\t", b" ", b"\r\n", b"\xef\xbb\xbf", b"\xff", b"\0", b"\x85", b"\x1c", b"\xc2\xa0", b"#", b"q1", b"d1", b"0", b"1"]  # fmt: skip
NUMBERS = [b"-1", b"+0", b"1.0", b"1e999", b"-1e-999", b"nan", b"inf", b"0x1p3", b"0x", b"1_0", b"9" * 5000, "١".encode()]  # fmt: skip
LINES = [b"q1 0 d1 1\n", b"q1 Q0 d1 1 0.5 tag\n", b"query-id\tcorpus-id\tscore\n", b"q1\td1\t1\n", b"d1\ttext\n"]  # fmt: skip
JSON = [b'{"_id": "d1", "text": "a"}\n', b'{"_id": 1, "text": null}', b"{", b"}", b"[", b'"', b'"_id"', b'"text"', b":", b",",
    b"\\ud800", b"\\u0000", b"[" * 3000, b"null", b"1e9999", b"-Infinity"]  # fmt: skip
YAML = [b"extends: smoke\n", b"name: ", b"about: ", b"seed: ", b"static: ", b"encoders: ", b"notes: {cover: ", b"targets: ", b"sets: ",
    b"{", b"}", b"[", b"]", b", ", b": ", b"- ", b"? ", b"&a ", b"*a", b"<<: ", b"!!binary ", b"!!set ", b"!!timestamp ", b"!!int ",
    b"!!float ", b"!!python/object/apply:os.system [x]", b"2026-13-41", b"2026-01-01", b"0x_", b"0b_", b"1:99", b".inf", b"~", b"|\n ",
    b">\n ", b'"', b"'", b"\\ud800", b"%YAML 1.1\n", b"---\n", b"...\n", b"@", b"`", b"yes", b"[" * 400]  # fmt: skip
PACKED = [b"\x1f\x8b\x08\0\0\0\0\0", b"PK\x03\x04", b"PAR1\x15", b"\x80\x04", b"#!", b"BZh91AY&SY", b"\x93NUMPY"]  # fmt: skip


def anything(*parts: bytes) -> st.SearchStrategy[bytes]:
    """Any bytes, mostly of what the format is made of."""
    piece = st.sampled_from([*parts, *MARKS]) | st.binary(max_size=6)
    begin = st.sampled_from([b"", b"", b"", *PACKED])
    return st.builds(lambda head, body: head + b"".join(body), begin, st.lists(piece, max_size=30))


ids = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"], exclude_characters="\ufeff#"),
    min_size=1, max_size=8,
).filter(lambda text: text.split() == [text])  # fmt: skip
lines = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=30
).filter(str.strip)
scores = st.floats(allow_nan=False, allow_infinity=False)


def judged(values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, dict[str, Any]]]:
    return st.dictionaries(ids, st.dictionaries(ids, values, min_size=1, max_size=5), min_size=1, max_size=5)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("properties")


def reads(reader: Callable[[Path], object], path: Path, content: bytes, what: Path) -> None:
    """The reader returns a value, or an error of this library that names the file."""
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            assert reader(what) is not None
        except AdaptiveMarginsError as error:
            assert path.name in str(error), error
            assert str(error).isprintable() or "\n  " in str(error), error


# ---- any bytes -----------------------------------------------------------------------------------


@some
@given(anything(*LINES, *NUMBERS))
def test_any_bytes_as_qrels(folder, content):
    reads(read_qrels, folder / "qrels.txt", content, folder / "qrels.txt")


@some
@given(anything(*LINES, *NUMBERS))
def test_any_bytes_as_a_run(folder, content):
    reads(read_run, folder / "a.run", content, folder / "a.run")


@some
@given(anything(*LINES))
def test_any_bytes_as_queries(folder, content):
    reads(read_queries, folder / "queries.tsv", content, folder / "queries.tsv")


@some
@given(anything(*JSON))
def test_any_bytes_as_a_corpus(folder, content):
    place = folder / "beir"
    place.mkdir(exist_ok=True)
    reads(read_folder, place / "corpus.jsonl", content, place)


@some
@given(anything(*JSON, b'{"query": "q", "pos": ["a"], "neg": [], "labels": [1]}', b"PAR1"))
def test_any_bytes_as_rows(folder, content):
    for name in ("train.jsonl", "train.parquet"):
        (folder / name.replace(".", "-")).mkdir(exist_ok=True)
        path = folder / name.replace(".", "-") / name
        reads(read_folder, path, content, path.parent)


@some
@given(anything(*JSON, b'{"name": "x", "fingerprint": "", "sources": {}}'))
def test_any_bytes_as_sources(folder, content):
    place = folder / "saved"
    if not place.exists():
        Collection("x", Texts(["d"], ["x"]), {"test": Texts([], [])}, {"test": {}}).save(place)
    reads(Collection.load, place / "sources.json", content, place)


@some
@given(anything(*YAML, *NUMBERS))
@example(b"seed: !!int ")  # PyYAML has plain errors of these four
@example(b"seed: !!timestamp ")
@example(b"seed: !!bool x")
@example(b"seed: 2026-13-01")
@example(b"extends: smoke\nencoders: &a {x: *a}")
@example(b"extends: smoke\nseed: [" + b"[" * 400)
def test_any_bytes_as_a_profile(folder, content):
    reads(load_profile, folder / "p.yaml", content, folder / "p.yaml")


@few
@given(
    st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates(),
        lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=8) | st.integers(), part, max_size=3), max_leaves=6),
    st.sampled_from(["static", "encoders", "collection", "sets", "teacher", "notes", "measures", "seed", "extends", "out_of_domain"]),
)  # fmt: skip
def test_any_value_in_a_profile(folder, value, key):
    content = yaml.safe_dump({"extends": "smoke", key: value}, allow_unicode=True).encode("utf-8", "surrogatepass")  # fmt: skip
    reads(load_profile, folder / "p.yaml", content, folder / "p.yaml")


# ---- there and back ------------------------------------------------------------------------------


@some
@given(judged(st.integers(-MAX_GRADE, MAX_GRADE)))
def test_qrels_there_and_back(folder, qrels):
    (folder / "qrels.txt").write_text(qrels_text(qrels), "utf-8", newline="")
    assert read_qrels(folder / "qrels.txt", trusted=True) == qrels


@some
@given(judged(scores))
def test_a_run_there_and_back(folder, run):
    (folder / "a.run").write_text(run_text(run, "tag"), "utf-8", newline="")
    assert read_run(folder / "a.run", trusted=True) == run


@some
@given(st.dictionaries(ids, lines, min_size=1, max_size=5))
def test_queries_there_and_back(folder, queries):
    texts = Texts(list(queries), list(queries.values()))
    (folder / "queries.tsv").write_text(tsv(texts), "utf-8", newline="")
    found = read_queries(folder / "queries.tsv")
    assert dict(zip(found.ids, found.texts, strict=True)) == queries


@some
@given(st.dictionaries(ids, st.text(max_size=20), min_size=1, max_size=5), st.booleans())
def test_a_corpus_there_and_back(folder, passages, escaped):
    place = folder / "beir"
    place.mkdir(exist_ok=True)
    rows = [json.dumps({"_id": i, "text": t}, ensure_ascii=escaped) for i, t in passages.items()]
    (place / "corpus.jsonl").write_text("".join(f"{row}\n" for row in rows), "utf-8", newline="")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # passages without text
        found = read_folder(place).passages
    assert list(found.ids) == list(passages)
    for text, expected in zip(found.texts, passages.values(), strict=True):
        spaced = "".join(" " if c in "\t\r\n" else c for c in expected)
        assert text == (spaced if expected.strip() else "")


@few
@given(
    st.fixed_dictionaries({}, optional={
        "seed": st.integers(0, 2**32 - 1), "workers": st.integers(1, 99),
        "static": st.fixed_dictionaries({"targets": st.lists(st.floats(-2, 2), min_size=1, max_size=4, unique=True)}),
        "training": st.fixed_dictionaries({"learning_rate": st.floats(1e-9, 1), "weight_decay": st.floats(0, 1)}),
        "name": st.from_regex(r"\A[a-z][a-z0-9 .+-]{0,9}\Z"),
    })
)  # fmt: skip
def test_a_profile_there_and_back(folder, values):
    (folder / "p.yaml").write_text(yaml.safe_dump({"extends": "smoke", **values}), "utf-8")
    profile = load_profile(folder / "p.yaml")
    whole = profile.model_dump(mode="json")
    (folder / "q.yaml").write_text(yaml.safe_dump(whole, allow_unicode=True), "utf-8")
    assert load_profile(folder / "q.yaml") == profile
    for key, value in values.items():
        found = whole[key] if not isinstance(value, dict) else {k: whole[key][k] for k in value}
        assert found == value
