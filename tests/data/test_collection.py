import dataclasses
import json
import os
from pathlib import Path

import pytest

from adaptive_margins.data.collection import Collection, Texts
from adaptive_margins.data.text import DataError


def small() -> Collection:
    return Collection(
        name="small",
        passages=Texts(["d2", "d1", "d3"], ["second text", "first, größer: 𝄞 \u2028 x", "third"]),
        queries={"train": Texts(["q1"], ["what is first"]), "test1": Texts(["q2"], ["third?"])},
        qrels={"train": {"q1": {"d1": 3, "d2": 1}}, "test1": {"q2": {"d3": 0}}},
        sources={"python": "3.11.7"},
        triples=[("q1", "d1", "d3"), ("q1", "d1", "d3")],
    )


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "small"
    small().save(folder)
    return folder


def test_texts_are_found_by_id_and_row() -> None:
    texts = Texts(["b", "a"], ["B", "A"])
    assert (len(texts), texts.row("a"), texts["b"], "c" in texts) == (2, 1, "B", False)
    with pytest.raises(KeyError, match="'c'"):
        texts.row("c")
    with pytest.raises(ValueError, match="'a' occurs more than once"):
        Texts(["a", "a"], ["x", "y"])
    with pytest.raises(ValueError, match="2 ids but 1 texts"):
        Texts(["a", "b"], ["x"])


def test_it_comes_back_as_it_was_saved(saved: Path) -> None:
    assert Collection.load(saved) == small()
    assert sorted(path.name for path in saved.iterdir()) == [
        "collection.tsv", "qrels.test1.txt", "qrels.train.txt", "queries.test1.tsv",
        "queries.train.tsv", "sources.json", "triples.tsv",
    ]  # fmt: skip
    assert (saved / "qrels.train.txt").read_text() == "q1 0 d1 3\nq1 0 d2 1\n"
    assert (saved / "triples.tsv").read_text() == "q1\td1\td3\n" * 2
    assert (saved / "collection.tsv").read_text().startswith("d2\tsecond text\nd1\tfirst")


def test_the_fingerprint_depends_on_content_and_on_no_order_of_dicts() -> None:
    one = small()
    same = dataclasses.replace(
        one,
        queries=dict(reversed(one.queries.items())),
        qrels={"test1": {"q2": {"d3": 0}}, "train": {"q1": {"d2": 1, "d1": 3}}},
    )
    assert one.fingerprint == same.fingerprint == "65e6aedb78cf495c"
    others = [
        dataclasses.replace(one, name="other"),
        dataclasses.replace(one, sources={"python": "3.11.8"}),
        dataclasses.replace(one, triples=[]),
        dataclasses.replace(one, passages=Texts(["d1", "d2", "d3"], one.passages.texts)),
        dataclasses.replace(one, qrels={**one.qrels, "test1": {"q2": {"d3": 1}}}),
    ]
    assert len({c.fingerprint for c in [one, *others]}) == 1 + len(others)


def test_saving_twice_changes_nothing_and_saving_another_is_refused(saved: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in saved.iterdir()}
    small().save(saved)
    assert {path: path.stat().st_mtime_ns for path in saved.iterdir()} == before
    with pytest.raises(FileExistsError, match="holds another collection"):
        dataclasses.replace(small(), name="other").save(saved)
    assert Collection.load(saved) == small()


def test_nothing_half_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = Path.write_bytes
    calls = []

    def full_disk(path: Path, data: bytes) -> int:
        calls.append(path)
        if len(calls) == 3:
            written(path, data[:5])
            raise OSError(28, "No space left on device")
        return written(path, data)

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="No space left"):
        small().save(tmp_path / "small")
    assert os.listdir(tmp_path) == []


def test_what_a_line_cannot_hold_is_not_saved(tmp_path: Path) -> None:
    for text in ("a\tb", "a\nb", "a\rb", "", "  "):
        passages = Texts(["d1", "d2", "d3"], ["x", "y", text])
        with pytest.raises(ValueError, match="text of 'd3' must be non-empty and without tabs"):
            dataclasses.replace(small(), passages=passages).save(tmp_path / "c")
    for identifier in ("d 1", "", "d\t1", "\ufeffd1"):
        collection = Collection("c", Texts([identifier], ["x"]), {}, {})
        with pytest.raises(ValueError, match="is empty or has white space or a byte"):
            collection.save(tmp_path / "c")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qrels": {"train": {}}}, r"sets \['test1', 'train'\], qrels \['train'\]"),
        ({"qrels": {"train": {"q2": {}}, "test1": {}}}, "unknown query 'q2'"),
        ({"qrels": {"train": {"q1": {"d9": 1}}, "test1": {}}}, "unknown passage 'd9'"),
        (
            {"qrels": {"train": {"q1": {"d1": 1.5}}, "test1": {}}},
            "an integer within ±1,000, not 1.5",
        ),
        ({"qrels": {"train": {"q1": {"d1": -1001}}, "test1": {}}}, "within ±1,000, not -1001"),
        ({"qrels": {"train": {"q1": {"d1": True}}, "test1": {}}}, "within ±1,000, not True"),
        ({"triples": [("q2", "d1", "d2")]}, "unknown training query 'q2'"),
        ({"triples": [("q1", "d1", "d9")]}, "unknown passage 'd9'"),
    ],
)
def test_inconsistent_parts_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(small(), **changes)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("collection.tsv", b"d1\tx\nd2\ty\nd1\tz\n", "collection.tsv:3: id 'd1' occurs already in line 1"),
        ("queries.train.tsv", b"q1\t \n", "queries.train.tsv:1: the text of 'q1' is empty"),
        ("qrels.train.txt", b"q1 0 d1 3\nq1 0 d9 1\n", "qrels.train.txt:2: unknown passage 'd9'"),
        ("triples.tsv", b"q2\td1\td2\n", "triples.tsv:1: unknown training query 'q2'"),
        ("sources.json", b"{", "sources.json: not valid JSON"),
        ("sources.json", b"[]", "sources.json: expected"),
    ],
)  # fmt: skip
def test_malformed_files_are_named_with_their_line(
    saved: Path, name: str, content: bytes, message: str
) -> None:
    (saved / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        Collection.load(saved)


def test_missing_files_are_named(saved: Path) -> None:
    for name in ("collection.tsv", "qrels.train.txt", "triples.tsv", "sources.json"):
        content = (saved / name).read_bytes()
        (saved / name).unlink()
        with pytest.raises(DataError, match=f"{name}: file not found"):
            Collection.load(saved)
        (saved / name).write_bytes(content)


def test_a_changed_text_does_not_fit_the_fingerprint(saved: Path) -> None:
    path = saved / "collection.tsv"
    path.write_text(path.read_text().replace("third", "fourth"))
    with pytest.raises(DataError, match=r"sources\.json has .* changed after"):
        Collection.load(saved)
    about = json.loads((saved / "sources.json").read_text())
    (saved / "sources.json").write_text(json.dumps(about | {"fingerprint": ""}))
    Collection.load(saved)  # without a fingerprint nothing is compared, unless the folder has one
    with pytest.raises(DataError, match="the folder's name has 0123456789abcdef"):
        Collection.load(saved.rename(saved.parent / "0123456789abcdef"))


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no collection at"):
        Collection.load(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no file queries\.SET\.tsv"):
        Collection.load(tmp_path / "empty")
