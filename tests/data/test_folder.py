"""Collections in folders: what each layout gives, and that nothing malformed passes without its file and line."""

from __future__ import annotations

import gzip
import json
import os
import threading
import warnings
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from adaptive_margins.data.collection import Collection, Texts
from adaptive_margins.data.folder import read_dataset, read_folder
from adaptive_margins.data.sources import open_collection
from adaptive_margins.data.text import DataError, Problems
from adaptive_margins.data.trec import read_runs
from adaptive_margins.retrieval.bm25 import BM25

HEADER = "query-id\tcorpus-id\tscore\n"
TREC = {
    "collection.tsv": "d1\ta wing in a flow\nd2\tgrößer\u2028 als 𝄞\nd3\tthe third\n",
    "queries.tsv": "q1\twhat is a wing\nq2\tnobody judged this\n",
    "qrels.txt": "q1 0 d1 3\nq1 Q0 d2 0\n",
}
TRAIN = {
    "queries_train.tsv": "t1\tthird\nt2\tflow\n",
    "qrels_train.txt": "t1 0 d3 1\nt2\t0\td1\t-1\n",
}
DEV = {"queries_dev.tsv": "v1\tgroß\n", "qrels_dev.txt": "v1 0 d2 1\n"}
BEIR = {
    "corpus.jsonl": [
        {"_id": "d1", "title": "Wings", "text": "in a flow", "metadata": {"url": 1}},
        {"_id": "d2", "title": "", "text": "two\nlines\tand a tab"},
        {"_id": "d3", "title": None, "text": "the third"},
        {"_id": "d4", "title": "Only a title", "text": ""},
    ],
    "queries.jsonl": [
        {"_id": "q1", "text": "what is a wing", "metadata": {}},
        {"_id": "q2", "text": "third"},
        {"_id": "q3", "text": "title"},
        {"_id": "q4", "text": "nobody judged this"},
    ],
    "qrels/train.tsv": HEADER + "q2\td3\t1\nq2\td1\t0\n",
    "qrels/dev.tsv": HEADER + "q3\td4\t2\n",
    "qrels/test.tsv": HEADER + "q1\td1\t1\n",
}


def write(folder: Path, files: dict, *, zipped: bool = False) -> Path:
    for name, content in files.items():
        if isinstance(content, list):
            content = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in content)
        data = content if isinstance(content, bytes) else content.encode("utf-8")
        path = folder / (name + ".gz" if zipped else name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(data) if zipped else data)
    return folder


def problems(folder: Path) -> list[str]:
    """The lines of the error, without the folder."""
    with pytest.raises(DataError) as error:
        read_folder(folder)
    lines = [line.strip().replace(f"{folder}/", "") for line in str(error.value).splitlines()]
    return lines[1:] if lines[0] == "malformed data" else lines


def pairs(texts: Texts) -> dict[str, str]:
    return dict(zip(texts.ids, texts.texts, strict=True))


# ---- what comes out ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [False, True])
def test_beir(tmp_path: Path, zipped: bool) -> None:
    folder = write(tmp_path / "small", BEIR, zipped=zipped)
    collection = read_folder(folder)
    assert collection.name == "small"
    assert pairs(collection.passages) == {
        "d1": "Wings in a flow", "d2": "two lines and a tab", "d3": "the third", "d4": "Only a title",
    }  # fmt: skip
    assert {name: pairs(texts) for name, texts in collection.queries.items()} == {
        "train": {"q2": "third"}, "validation": {"q3": "title"}, "test": {"q1": "what is a wing"},
    }  # fmt: skip
    assert collection.qrels == {
        "train": {"q2": {"d3": 1, "d1": 0}}, "validation": {"q3": {"d4": 2}}, "test": {"q1": {"d1": 1}},
    }  # fmt: skip
    assert not collection.triples
    assert collection.titles == {"d1": "Wings", "d4": "Only a title"}
    assert collection.fingerprint == read_folder(folder).fingerprint


def test_a_pipe_is_read_once(tmp_path: Path) -> None:
    path = write(tmp_path / "small", {"corpus.jsonl": BEIR["corpus.jsonl"]}) / "corpus.jsonl"
    content = path.read_bytes()
    path.unlink()
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=(content,))
    writer.start()
    collection = read_folder(path.parent)
    writer.join()
    assert (len(collection.passages), len(collection.titles)) == (4, 2)


@pytest.mark.parametrize("zipped", [False, True])
def test_trec(tmp_path: Path, zipped: bool) -> None:
    files = {**TREC, **TRAIN, **DEV, "triples.tsv": "t1\td3\td1\nt1\td3\td2\n", "bm25.run": ""}
    collection = read_folder(write(tmp_path / "small", files, zipped=zipped))
    assert pairs(collection.passages)["d2"] == "größer\u2028 als 𝄞"
    assert {name: list(texts.ids) for name, texts in collection.queries.items()} == {
        "train": ["t1", "t2"], "validation": ["v1"], "test": ["q1", "q2"],
    }  # fmt: skip
    assert collection.qrels == {
        "train": {"t1": {"d3": 1}, "t2": {"d1": -1}},
        "validation": {"v1": {"d2": 1}},
        "test": {"q1": {"d1": 3, "d2": 0}},
    }
    assert collection.triples == [("t1", "d3", "d1"), ("t1", "d3", "d2")]
    assert collection.titles == {}


@pytest.mark.parametrize("called", ["validation", "dev", "valid", "val"])
def test_names_of_sets(tmp_path: Path, called: str) -> None:
    named = {f"queries_{called}.tsv": "v1\tgroß\n", f"qrels_{called}.txt": "v1 0 d2 1\n"}
    named |= {"queries_test.tsv": TREC["queries.tsv"], "qrels_test.txt": TREC["qrels.txt"]}
    passages = {"collection.tsv": TREC["collection.tsv"]}
    assert read_folder(write(tmp_path / "a", {**passages, **named})).qrels == {
        "validation": {"v1": {"d2": 1}}, "test": {"q1": {"d1": 3, "d2": 0}},
    }  # fmt: skip
    beir = {k: v for k, v in BEIR.items() if k != "qrels/dev.tsv"}
    folder = write(tmp_path / "b", {**beir, f"qrels/{called}.tsv": BEIR["qrels/dev.tsv"]})
    assert read_folder(folder).qrels["validation"] == {"q3": {"d4": 2}}


def test_only_the_test_set_and_only_passages(tmp_path: Path) -> None:
    assert set(read_folder(write(tmp_path / "a", TREC)).queries) == {"test"}
    for name, files in (("b", TREC), ("c", BEIR)):
        first = dict(list(files.items())[:1])
        collection = read_folder(write(tmp_path / name, first))
        assert collection.queries == collection.qrels == {} and len(collection.passages) > 2


def test_sets_without_queries_of_their_own_take_them_from_the_common_file(tmp_path: Path) -> None:
    files = {
        "collection.tsv": TREC["collection.tsv"],
        "queries.tsv": "q1\tone\nq2\ttwo\nq3\tthree\nq4\tfour\nq5\tfive\n",
        "qrels.txt": "q1 0 d1 1\n",
        "qrels_validation.txt": "q2 0 d1 1\n",
        "triples.tsv": "q3\td1\td2\nq4\td2\td3\nq3\td3\td2\n",
    }
    collection = read_folder(write(tmp_path / "a", files))
    assert {name: list(texts.ids) for name, texts in collection.queries.items()} == {
        "train": ["q3", "q4"], "validation": ["q2"], "test": ["q1", "q5"],
    }  # fmt: skip
    assert collection.qrels["train"] == {"q3": {"d1": 1, "d3": 1}, "q4": {"d2": 1}}
    del files["qrels.txt"], files["qrels_validation.txt"]
    only = read_folder(write(tmp_path / "b", files))
    assert list(only.queries) == ["train"] and len(only.triples) == 3
    files |= {"queries_train.tsv": "t1\tsix\n", "triples.tsv": "t1\td1\td2\n", "qrels.txt": "q1 0 d1 1\n"}  # fmt: skip
    own = read_folder(write(tmp_path / "c", files))
    assert (own.qrels["train"], len(own.queries["test"])) == ({"t1": {"d1": 1}}, 5)


def test_a_query_of_the_test_set_is_not_trained_on(tmp_path: Path) -> None:
    shared = {**TREC, "triples.tsv": "q2\td1\td3\nq1\td1\td3\n"}
    assert problems(write(tmp_path / "a", shared)) == [
        "triples.tsv:2: query 'q1' is judged in qrels.txt; training must not use it"
    ]
    shared = {**TREC, "qrels_train.txt": "q2 0 d1 1\nq1 0 d3 1\n"}
    assert problems(write(tmp_path / "b", shared)) == [
        "qrels_train.txt:2: query 'q1' is judged in qrels.txt, too; sets must not share queries"
    ]
    shared = {**BEIR, "qrels/train.tsv": HEADER + "q2\td3\t1\nq1\td3\t1\n"}
    (found,) = problems(write(tmp_path / "c", shared))
    assert found == "qrels/train.tsv:3: query 'q1' is judged in test.tsv, too; sets must not share queries"  # fmt: skip
    same_ids = {**TREC, "queries_train.tsv": "q1\tanother\n", "qrels_train.txt": "q1 0 d1 1\n"}
    assert "queries_train.tsv:1: id 'q1' occurs already in queries.tsv:1" in problems(
        write(tmp_path / "d", same_ids)
    )


def test_what_was_saved_comes_back_with_the_usual_sets(tmp_path: Path) -> None:
    texts = Texts(["d1", "d2"], ["first", "second"])
    saved = Collection(
        "saved", texts,
        {name: Texts([f"q{i}"], [f"query {i}"]) for i, name in enumerate(["train", "dev", "test1", "test2"])},
        {name: {f"q{i}": {"d1": i}} for i, name in enumerate(["train", "dev", "test1", "test2"])},
        {"python": "3"}, [("q0", "d1", "d2")],
    )  # fmt: skip
    saved.save(tmp_path / "small")
    collection = read_folder(tmp_path / "small")
    assert {name: list(texts.ids) for name, texts in collection.queries.items()} == {
        "train": ["q0"], "validation": ["q1"], "test": ["q2", "q3"],
    }  # fmt: skip
    assert collection.qrels["test"] == {"q2": {"d1": 2}, "q3": {"d1": 3}}
    assert (collection.name, collection.triples) == ("saved", [("q0", "d1", "d2")])


def test_runs_are_listed_by_name(tmp_path: Path) -> None:
    line = "q Q0 d 1 1 x\n"
    write(tmp_path, {"tas-b.run": line, "z.bm25.trec": line, "notes.txt": "", "c.run.gz": line})
    assert list(read_runs(tmp_path)) == ["c", "tas-b", "z.bm25"]
    write(tmp_path, {"c.trec": ""})
    with pytest.raises(DataError, match=r"c\.trec: c\.run\.gz is a run named 'c', too"):
        read_runs(tmp_path)


def test_what_is_no_run_is_left_out_with_a_warning(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "mine.run": "q1 Q0 d1 1 2.0 t\n",
            "._mine.run": b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        ",
            ".DS_Store": b"\x00\x00\x00\x01Bud1",
            "install.run": "#!/bin/sh\nexit 0\n",
            "other.trec": "q1 0 d1 1\n",
        },
    )
    (tmp_path / "gone.run").symlink_to("nowhere.run")
    (tmp_path / "folder.run").mkdir()
    with pytest.warns(UserWarning) as caught:
        assert read_runs(tmp_path) == {"mine": {"q1": {"d1": 2.0}}}
    gone, install, other = (str(warning.message) for warning in caught)
    assert f"{tmp_path}/gone.run: is a link to nowhere.run, which does not exist" in gone
    assert f"{tmp_path}/install.run:1: 6 columns expected" in install
    assert f"{tmp_path}/other.trec:1: " in other and "judgements" in other


@pytest.mark.parametrize("files", [TREC, BEIR])
def test_hidden_files_are_ignored(tmp_path: Path, files: dict) -> None:
    collection = read_folder(write(tmp_path / "a", files))
    junk = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        "
    names = [*(str(Path(name).with_name("._" + Path(name).name)) for name in files), ".DS_Store"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_folder(write(tmp_path / "a", dict.fromkeys(names, junk))) == collection
    collection.save(write(tmp_path / "b", {".DS_Store": junk}) / "c")
    write(tmp_path / "b" / "d", {".DS_Store": junk})
    with pytest.raises(DataError, match="found: nothing"):
        read_folder(tmp_path / "b" / "d")


def test_dangling_links_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", {**TREC, "qrels.txt": "x"})
    for name in ("qrels.txt", "collection.tsv"):
        (folder / name).unlink()
        (folder / name).symlink_to("/nowhere/data")
        assert problems(folder) == [f"{name}: is a link to /nowhere/data, which does not exist"]
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(DataError, match="link is a link to nowhere, which does not exist"):
        open_collection(str(tmp_path / "link"))


IDS = ["NA", "null", "nan", "None", "1e5", "007", "-1", "true", "inf", "0x10", "1_000", "#1", '"q"', "é", "e\u0301"]  # fmt: skip


def test_ids_come_through_exactly(tmp_path: Path) -> None:
    files = {
        "collection.tsv": "".join(f"{i}\ttext {i}\n" for i in IDS),
        "queries.tsv": "".join(f"{i}\tquery {i}\n" for i in IDS),
        "qrels.txt": "".join(f"{i} 0 {i} 1\n" for i in IDS[1:]) + f"{IDS[0]} 0 {IDS[0]} 1\n",
        "mine.run": "".join(f"{i} Q0 {i} 1 1.0 t\n" for i in IDS),
    }
    collection = read_folder(write(tmp_path / "a", files))
    assert list(collection.passages.ids) == list(collection.queries["test"].ids) == IDS
    assert collection.qrels["test"] == {i: {i: 1} for i in IDS}
    assert read_runs(tmp_path / "a") == {"mine": {i: {i: 1.0} for i in IDS}}
    beir = {
        "corpus.jsonl": [{"_id": i, "text": f"text {i}"} for i in IDS],
        "queries.jsonl": [{"_id": i, "text": f"query {i}"} for i in IDS],
        "qrels/test.tsv": HEADER + "".join(f"{i}\t{i}\t1\n" for i in IDS),
    }
    again = read_folder(write(tmp_path / "b", beir))
    assert (again.passages, again.qrels) == (collection.passages, collection.qrels)


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"qrels.txt": "q1 0 cafe\u0301 1\n"},
         r"'cafe\u0301' is similar to the known 'caf\xe9'"),
        ({"qrels.txt": "q1 0 CAFÉ 1\nq1 0 zzz 1\n"}, r"'CAF\xc9' is similar to the known 'caf\xe9'"),
        ({"qrels.txt": "Q1 0 café 1\n"}, "'Q1' is similar to the known 'q1'"),
    ],
)  # fmt: skip
def test_unknown_ids_that_look_like_known_ones_are_shown_escaped(
    tmp_path: Path, change: dict, hint: str
) -> None:
    files = {"collection.tsv": "café\tx\n", "queries.tsv": "q1\ty\n", **change}
    (found,) = problems(write(tmp_path, files))
    assert found.startswith("qrels.txt:1: unknown ") and found.endswith(f"; {hint}")


# ---- what is wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "expected"),
    [

        ({"collection.tsv": "d1\tx\nd 2\ty\n\tz\n"},
         ["collection.tsv:2: id 'd 2' is empty or has white space or a byte order mark (and 1 more line like it)"]),
        ({"qrels.txt": "q1 0 d1 1\nq9 0 d1 1\nq1 0 d9 1\n"},
         ["qrels.txt:2: unknown query 'q9'", "qrels.txt:3: unknown passage 'd9'"]),
        ({"triples.tsv": "t9\td1\td2\nt1\td9\td1\nt1\td1\td1\nt1 d1 d2\n", **TRAIN},
         ["triples.tsv:1: unknown training query 't9'", "triples.tsv:2: unknown passage 'd9'",
          "triples.tsv:4: 3 tab-separated columns expected, 1 found"]),
        ({"triples.tsv": "qid\tpos\tneg\nt1\td1\td2\n", **TRAIN},
         ["triples.tsv:1: unknown ids 'qid', 'pos', 'neg'; if this is a header, remove it: sed -i 1d FILE"]),
        ({"triples.tsv": "how to\tso\tand so\nwhy\tas it is\tno\n", **TRAIN},
         ["triples.tsv:1: expected the ids of a query and of two passages, found texts; a Hugging Face dataset on disk"
          " (columns query, positive, negative) may have texts (and 1 more line like it)"]),
        ({"triples.tsv": "t9\td1\td2\n"}, ["triples.tsv:1: unknown query 't9'"]),
        ({"queries_validation.tsv": "v1\tx\n"},
         ["qrels_validation.txt: file not found; it should judge queries_validation.tsv"]),
        ({"queries_validation.tsv": "v1\tx\n", **DEV},
         ["queries_dev.tsv: queries_validation.tsv exists, too; keep one of them"]),
        ({"collection.tsv.gz": b"x"}, ["collection.tsv.gz: collection.tsv exists, too; keep one of them"]),
    ],
)  # fmt: skip
def test_malformed_trec_is_named_with_its_line(
    tmp_path: Path, change: dict, expected: list
) -> None:
    found = problems(write(tmp_path, {**TREC, **change}))
    # A passage or query that is left out for its own fault is then unknown elsewhere.
    mine = [line for line in found if line.split(":")[0] in change]
    assert expected in (mine, found)


def test_missing_files_of_trec(tmp_path: Path) -> None:
    passages, queries, qrels = ({name: content} for name, content in TREC.items())
    for number, (files, expected) in enumerate([
        ({**passages, **queries}, "qrels.txt: file not found; it should judge queries.tsv"),
        ({**passages, **qrels}, "qrels.txt: there is no queries.tsv, which it judges"),
        ({**passages, "triples.tsv": "q1\td1\td2\n"},
         "triples.tsv: there is no queries_train.tsv, which it refers to"),
        ({**passages, "queries_train.tsv": "t1\tx\n"},
         "qrels_train.txt: file not found; it should judge queries_train.tsv"),
    ]):  # fmt: skip
        assert problems(write(tmp_path / str(number), files)) == [expected]


D = '{"_id": "d1", "text": "x"}\n'


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"corpus.jsonl": D + '{"_id": "d2", "text": \n'}, "corpus.jsonl:2: not valid JSON"),
        ({"corpus.jsonl": D + "[" * 100_000 + "\n"}, "corpus.jsonl:2: not valid JSON"),
        ({"corpus.jsonl": "[\n" + D}, "corpus.jsonl:1: JSON lines expected, found an array"),
        ({"corpus.jsonl": "[" + D.strip() + "]\n"}, "corpus.jsonl:1: JSON lines expected, found an array"),
        ({"corpus.jsonl": "{\n" + D[1:]}, "corpus.jsonl:1: JSON lines expected, found an object"),
        ({"corpus.jsonl": D + "\n" + D}, "corpus.jsonl:2: not valid JSON (a blank line"),
        ({"corpus.jsonl": D.replace("_id", "docid")}, "corpus.jsonl:1: '_id' is missing; found 'docid', 'text'"),
        ({"corpus.jsonl": D + D}, "corpus.jsonl:2: id 'd1' occurs already in line 1"),
        ({"corpus.jsonl": D + '["d2", "x"]\n'}, 'corpus.jsonl:2: expected {"_id": text, "text": text}'),

        ({"corpus.jsonl": D + '{"_id": 2, "title": 0, "text": null}\n'},
         "corpus.jsonl:2: 'title' must be a text, not 0; 'text' must be a text, not None"),
        ({"corpus.jsonl": D + '{"_id": "\\ufeffd2", "text": "x"}\n'}, r"corpus.jsonl:2: id '\ufeffd2' is empty or has white space"),
        ({"corpus.jsonl": D + f'{{"_id": {"9" * 5000}, "text": "x"}}\n'}, "corpus.jsonl:2: not valid JSON (Exceeds the limit"),
        ({"corpus.jsonl": D + '{"_id": "d2", "text": "\\ud83d"}\n'}, "corpus.jsonl:2: an escape in the JSON is half"),
        ({"queries.jsonl": '{"_id": "q1", "text": ""}\n'}, "queries.jsonl:1: the text of 'q1' is empty"),
        ({"qrels/test.tsv": "q1\td1\t1\n"},
         "qrels/test.tsv:1: 4 columns expected (query id, 0, docid, grade), found 3; BEIR's judgements"),

        ({"qrels/test.tsv": HEADER + "q1\td9\t1\nq9\td1\t1\n"}, "qrels/test.tsv:2: unknown passage 'd9'"),
        ({"qrels/test.tsv": HEADER + "q1\t0\td1\t1\n"},
         "qrels/test.tsv:2: 3 columns expected (query-id, corpus-id, score), 4 found"),
        ({"qrels/test.tsv": HEADER}, "qrels/test.tsv: no judgement found"),
    ],
)  # fmt: skip
def test_malformed_beir_is_named_with_its_line(tmp_path: Path, change: dict, expected: str) -> None:
    found = problems(write(tmp_path, {**BEIR, **change}))
    assert any(line.startswith(expected) for line in found), found


def test_missing_files_of_beir(tmp_path: Path) -> None:
    files = {k: v for k, v in BEIR.items() if not k.startswith("qrels")}
    expected = ["qrels/test.tsv: file not found; it should judge queries.jsonl"]
    assert problems(write(tmp_path / "a", files)) == expected
    files = {k: v for k, v in BEIR.items() if k != "queries.jsonl"}
    assert problems(write(tmp_path / "b", files)) == [
        f"qrels/{name}.tsv: there is no queries.jsonl, which it judges" for name in ("test", "train", "dev")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("files", "unread"),
    [
        ({**BEIR, "qrels/more.jsonl": ""}, "qrels/more.jsonl"),
        ({**TREC, "qrels_eval.txt": ""}, "qrels_eval.txt"),
        ({"train.jsonl": '{"query": "a", "positive": "b"}', "eval.jsonl.gz": b""}, "eval.jsonl.gz"),
    ],
)  # fmt: skip
def test_files_of_sets_with_another_name_are_told(tmp_path: Path, files: dict, unread: str) -> None:
    with pytest.warns(UserWarning, match=f"{unread} is not read; known sets are train, valid"):
        read_folder(write(tmp_path, files))


def test_faults_of_a_kind_are_told_once_and_twenty_kinds_shown(tmp_path: Path) -> None:
    bad = {"qrels.txt": "".join(f"q1 0 x{i} 1\n" for i in range(18)), "queries.tsv": "q1\tx\n" + "q\n" * 9}  # fmt: skip
    assert problems(write(tmp_path / "a", {**TREC, **bad})) == [
        "queries.tsv:2: 2 tab-separated columns expected, 1 found (and 8 more lines like it)",
        "qrels.txt:1: unknown passage 'x0' (and 17 more lines like it)",
    ]
    noted = Problems()
    for letter in "abcdefghijklmnopqrstuvwxyz":
        noted.add(tmp_path, 1, letter)
    with pytest.raises(DataError) as error:
        noted.check()
    lines = str(error.value).splitlines()
    assert len(lines) == 22 and lines[-1] == "  … and 6 more kinds of faults"


def test_a_folder_without_a_collection_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"(?s)none does not exist.*corpus\.jsonl.*collection\.tsv"):
        read_folder(tmp_path / "none")
    write(tmp_path / "a", {"docs.csv": ""})
    with pytest.raises(DataError, match=r"(?s)has no collection \(found: docs\.csv\).*qrels/train"):
        read_folder(tmp_path / "a")
    with pytest.raises(DataError, match="is a file, not a folder"):
        read_folder(tmp_path / "a" / "docs.csv")
    with pytest.raises(DataError, match=r"has both corpus\.jsonl and collection\.tsv"):
        read_folder(write(tmp_path / "b", {**TREC, **BEIR}))
    with pytest.raises(DataError, match=r"has both collection\.tsv and state\.json"):
        read_folder(write(tmp_path / "d", {**TREC, "state.json": "{}"}))
    write(tmp_path / "c", {"passages.arrow": "", "sources.json": ""})
    with pytest.raises(DataError, match="name its ir_datasets id"):
        read_folder(tmp_path / "c")


def test_what_is_kept_with_a_warning(tmp_path: Path) -> None:
    files = {
        **TREC,
        **TRAIN,
        "collection.tsv": "d1\twing\nd2\t\nd3\t \nd4\tflow\n",
        "queries_train.tsv": "t1\twhat is a wing\nt2\tflow\n",
    }
    with pytest.warns(UserWarning) as caught:
        collection = read_folder(write(tmp_path, files))
    empty, twice = (str(warning.message) for warning in caught)
    assert empty == (
        f"{tmp_path}/collection.tsv: passages without text are never returned by a search:"
        " 2, 'd2' (line 2), 'd3' (line 3)"
    )
    assert "queries of train and test with the same text: 1, 't1' and 'q1'" in twice
    assert pairs(collection.passages)["d2"] == ""
    found = BM25(collection.passages).search(Texts(["q"], ["wing flow"]), 10)
    assert set(found["q"]) == {"d1", "d4"}


# ---- Hugging Face datasets -----------------------------------------------------------------------------------------


def test_triples_of_a_dataset(tmp_path: Path) -> None:
    train = {
        "positive": ["wing", "flow", "wing"],
        "negative": ["rib\tcage", "wing", "spar"],
        "anchor": ["what?", "why?", "what?"],
    }
    test = {"query": ["why?", "how?"], "positive": ["flow", "so"]}
    saved = DatasetDict(test=Dataset.from_dict(test), train=Dataset.from_dict(train))
    saved.save_to_disk(tmp_path / "small")
    with pytest.warns(UserWarning, match="queries of train and test with the same text: 1, 'q2'"):
        collection = read_folder(tmp_path / "small")
    assert pairs(collection.passages) == {
        "d1": "wing", "d2": "rib cage", "d3": "flow", "d4": "spar", "d5": "so",
    }  # fmt: skip
    assert {name: pairs(texts) for name, texts in collection.queries.items()} == {
        "train": {"q1": "what?", "q2": "why?"}, "test": {"q3": "why?", "q4": "how?"},
    }  # fmt: skip
    assert collection.qrels == {
        "train": {"q1": {"d1": 1}, "q2": {"d3": 1}}, "test": {"q3": {"d3": 1}, "q4": {"d5": 1}},
    }  # fmt: skip
    assert collection.triples == [("q1", "d1", "d2"), ("q2", "d3", "d1"), ("q1", "d1", "d4")]


def test_pairs_of_a_dataset(tmp_path: Path) -> None:
    rows = {"question": ["a", "b", "a"], "positive": ["x", "y", "z"]}
    Dataset.from_dict(rows).save_to_disk(tmp_path / "pairs")
    collection = read_dataset(tmp_path / "pairs")
    assert collection.qrels == {"train": {"q1": {"d1": 1, "d3": 1}, "q2": {"d2": 1}}}
    assert not collection.triples and collection.name == "pairs"


def test_datasets_of_another_form_are_refused(tmp_path: Path) -> None:
    def saved(name: str, **splits: dict) -> Path:
        made = DatasetDict({split: Dataset.from_dict(rows) for split, rows in splits.items()})
        made.save_to_disk(tmp_path / name)
        return tmp_path / name

    good = {"query": ["a"], "positive": ["x"]}
    (found,) = problems(saved("a", train=good, extra=good))
    known = "expected train, validation (or dev, valid, val) and test, each once"
    assert f"split 'extra': {known}" in found
    bad = {"query": ["a", ""], "positive": ["x", "y"]}
    (found,) = problems(saved("b", train=bad))
    assert found == "train:2: 'query' must be a text that is not empty, not ''"
    (folder := saved("d", train=good)).joinpath("train", "state.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read as a Hugging Face dataset"):
        read_folder(folder)
    folder = saved("e", test={"query": ["abcdef"], "positive": ["x"]})
    (file,) = folder.glob("*/*.arrow")
    file.write_bytes(file.read_bytes().replace(b"abcdef", b"abc\xffef"))
    with pytest.raises(DataError, match="test cannot be read as a Hugging Face dataset: 'utf-8'"):
        read_folder(folder)


# ---- rows of texts in other layouts, and Parquet -----------------------------------------------------------------------

ROWS = {
    "n-tuples": {"anchor": ["a", "b"], "positive": ["p", "q"], "negative_1": ["m", "m"], "negative_2": ["n", "p"], "__index_level_0__": [4, 7]},
    "labelled list": {
        "query": ["a", "b", "c"], "passages": [["m", "p", "n"], ["q", "p", "m"], ["m"]], "labels": [[0, 1, 0], [1, 0, -1], [0]],
    },
    "BGE": {
        "query": ["a", "b"], "pos": [["p"], ["q"]], "neg": [["m", "n"], ["p", "m"]], "pos_scores": [[1.5], [2.5]], "prompt": ["", ""],
    },
    "Tevatron": {
        "query_id": ["7", "8"], "query": ["a", "b"],
        "positive_passages": [[{"docid": "1", "title": "", "text": "p"}], [{"docid": "2", "title": "q", "text": ""}]],
        "negative_passages": [[{"docid": "3", "title": "", "text": t} for t in pair] for pair in ("mn", "pm")],
    },
}  # fmt: skip


def write_rows(columns: dict, path: Path) -> Path:
    """The rows as JSON lines, Parquet, or a saved dataset, by the name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = Dataset.from_dict(columns)
    if path.suffix == ".parquet":
        data.to_parquet(str(path))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in data), "utf-8")
    else:
        data.save_to_disk(path)
    return path


@pytest.mark.parametrize("form", ["saved", "train.jsonl", "train.parquet"])
@pytest.mark.parametrize("layout", ROWS)
def test_each_negative_of_a_row_makes_a_triple(tmp_path: Path, layout: str, form: str) -> None:
    path = write_rows(ROWS[layout], tmp_path / "rows" / form)
    collection = open_collection(path)
    texts, asked = pairs(collection.passages), pairs(collection.queries["train"])
    found = [(asked[q], texts[p], texts[n]) for q, p, n in collection.triples]
    assert sorted(found) == [("a", "p", "m"), ("a", "p", "n"), ("b", "q", "m"), ("b", "q", "p")]
    judged = {asked[q]: {texts[d]: g for d, g in row.items()} for q, row in collection.qrels["train"].items()}  # fmt: skip
    assert judged == {"a": {"p": 1}, "b": {"q": 1}}  # a query without a positive is not judged
    assert set(asked.values()) == {"a", "b"} | ({"c"} if layout == "labelled list" else set())
    if form != "saved":  # the folder has the same rows
        assert open_collection(path.parent).triples == collection.triples


def test_labels_are_grades_and_sets_are_files(tmp_path: Path) -> None:
    docs, labels = [["x", "y", "z", "x"], ["x"]], [[2.0, 0, 1, 1], [1]]  # the highest grade counts
    rows = {"query": ["a", "a"], "docs": docs, "labels": labels}
    write_rows({"query": ["b"], "positive": ["y"]}, tmp_path / "dev.jsonl")
    write_rows(rows, tmp_path / "train.parquet")
    collection = read_folder(tmp_path)
    assert collection.qrels == {"train": {"q1": {"d1": 2, "d2": 1}}, "validation": {"q2": {"d3": 1}}}  # fmt: skip
    assert collection.triples == [("q1", "d1", "d3"), ("q1", "d2", "d3")]
    write_rows(rows, tmp_path / "train.jsonl")
    assert problems(tmp_path)[0] == "train.parquet: train.jsonl exists, too; keep one of them"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"query": "a", "docs": ["x"], "labels": [1, 0]}, "'docs' and 'labels' must be lists of the same length"),
        ({"query": "a", "docs": None, "labels": [1]}, "'docs' and 'labels' must be lists of the same length"),
        ({"query": "a", "docs": ["x"], "labels": [0.5]}, "'labels' must be integers within ±1,000, not 0.5"),
        ({"query": "a", "pos": "x"}, "'pos' must be a list, not 'x'"),
        ({"query": "a", "pos": ["x", ""], "neg": [3]}, "'pos' must be a text that is not empty, not ''; 'neg' must be"),
        ({"query": "a", "positive_passages": [{"docid": "1"}]}, "'positive_passages' must be a text that is not empty"),
        ({"query": "a", "positive": "x", "label": 0}, "found the columns 'query', 'positive', 'label'; expected query"),
        ({"query": "a", "positive": "\ud83d"}, "'positive' must be a text that is not empty, not"),
        ({"sentence1": "a", "sentence2": "x"}, "found the columns 'sentence1', 'sentence2'; expected query"),
        (["a", "x"], "expected {"),
    ],
)  # fmt: skip
def test_malformed_rows_are_named_with_their_line(tmp_path: Path, row: dict, expected: str) -> None:
    lines = map(json.dumps, [{"query": "a", "pos": ["x"], "neg": None}, row])
    folder = write(tmp_path, {"train.jsonl": "\n".join(lines)})
    (found,) = problems(folder)
    assert found.startswith(f"train.jsonl:2: {expected}")


def test_beir_as_parquet_and_with_triples(tmp_path: Path) -> None:
    expected = read_folder(write(tmp_path / "a" / "beir", {**BEIR, "triples.tsv": "q2\td3\td1\n"}))
    assert expected.triples == [("q2", "d3", "d1")]
    folder = write(tmp_path / "b" / "beir", {
        "triples.tsv": "q2\td3\td1\n",
        "qrels/dev.jsonl": [{"query-id": "q3", "corpus-id": "d4", "score": 2}],
    })  # fmt: skip
    for name in ("corpus", "queries"):
        kept = [{k: r.get(k) for k in ("_id", "title", "text")} for r in BEIR[f"{name}.jsonl"]]
        Dataset.from_list(kept).to_parquet(str(folder / f"{name}.parquet"))
    judged = {"query_id": ["q2", "q2"], "corpus_id": ["d3", "d1"], "score": ["1.0", "0"]}
    write_rows(judged, folder / "qrels" / "train.parquet")
    write_rows({"query-id": ["q1"], "corpus-id": ["d1"], "score": [1.0]}, folder / "qrels.parquet")
    assert read_folder(folder).fingerprint == expected.fingerprint
    write_rows({"query-id": ["q1", "q9"], "corpus-id": ["d1", "d1"]}, folder / "qrels.parquet")
    (folder / "corpus.parquet").write_bytes(b"PAR1 damaged")
    assert problems(folder)[0].startswith("corpus.parquet: cannot be read as Parquet (")
    write_rows({"_id": [], "text": []}, folder / "corpus.parquet")
    assert problems(folder) == ["corpus.parquet: the file is empty"]


def test_judgements_as_records_are_checked_as_lines(tmp_path: Path) -> None:
    found = problems(write(tmp_path, {
        "corpus.jsonl": [*BEIR["corpus.jsonl"], {"_id": 5, "text": "x"}], "queries.jsonl": BEIR["queries.jsonl"],
        "qrels.jsonl": [
            {"query-id": "q1", "corpus-id": "d1", "score": 1}, {"query-id": "q1", "corpus-id": "d2", "score": 0.5},
            {"query-id": "q1", "corpus-id": "d1", "score": 2}, {"query-id": "q1", "score": 2},
            {"query-id": "q1", "corpus-id": 5, "score": 1},
        ],
    }))  # fmt: skip
    assert [line.split(";")[0] for line in found] == [
        "qrels.jsonl:2: grade '0.5' is not an integer",
        "qrels.jsonl:3: 'q1' judges 'd1' twice",
        "qrels.jsonl:4: 3 columns expected (query-id, corpus-id, score), 2 found",
    ]
