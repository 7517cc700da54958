import dataclasses
import gzip
import hashlib
import http.server
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ir_datasets
import pytest
from ir_datasets.datasets.base import Dataset
from ir_datasets.formats import TrecQrels, TrecScoredDocs, TsvDocPairs, TsvDocs, TsvQueries
from ir_datasets.util import Download, GzipExtract, RequestsDownload, StringFile

from adaptive_margins.data import converted as msmarco
from adaptive_margins.data import stored
from adaptive_margins.data.collection import Collection
from adaptive_margins.data.converted import StoredCollection, convert, downloads
from adaptive_margins.data.ir_datasets import ACCEPT_VARIABLE, DownloadError, LicenceError
from adaptive_margins.data.text import DataError
from adaptive_margins.profiles.config import IrDatasetsSettings
from conftest import in_child
from irds_miniature import Miniature, register

Convert = Callable[..., StoredCollection]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("source")


@pytest.fixture(scope="module")
def mini(source: Path) -> Miniature:
    return register(source, "am-msmarco")


@pytest.fixture(scope="module")
def uninterrupted(mini: Miniature, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The fingerprint of the miniature."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    settings = IrDatasetsSettings(**mini.settings())
    return convert(settings, folder / "work" / "key", folder / "collections").fingerprint


@pytest.fixture
def copied(mini: Miniature, source: Path, tmp_path: Path) -> tuple[Miniature, Path]:
    """The same collection from files that a test may break."""
    folder = tmp_path / "copied"
    shutil.copytree(source, folder)
    shutil.rmtree(folder / "unpacked", ignore_errors=True)
    return register(folder, f"am-{tmp_path.name}"), folder


@pytest.fixture
def into(tmp_path: Path) -> Convert:
    """Converts into the test's own folders; the miniature's settings, changed as told."""

    def run(mini: Miniature, **changes: Any) -> StoredCollection:
        settings = IrDatasetsSettings(**mini.settings(**changes))
        return convert(settings, tmp_path / "work" / "key", tmp_path / "collections")

    return run


def _lines(path: Path) -> list[str]:
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8").splitlines()


def _finished(tmp_path: Path) -> list[str]:
    folder = tmp_path / "collections"
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


# ---- what comes out ------------------------------------------------------------------------------------------------


def test_a_collection_holds_what_the_files_say(mini, source, into, tmp_path: Path) -> None:
    made = into(mini)
    assert isinstance(made, Collection)
    assert made.name == "Miniature"
    assert made.folder == tmp_path / "collections" / made.fingerprint
    for collection in (made, StoredCollection.load(made.folder)):
        passages = dict(line.split("\t") for line in _lines(source / "collection.tsv.gz"))
        assert dict(zip(collection.passages.ids, collection.passages.texts, strict=True)) == passages  # fmt: skip
        assert collection.passages["0"].endswith(" café")
        assert set(collection.queries) == set(collection.qrels) == {"train", "dl19", "dl20"}
        for name, file in (("train", "train.tsv"), ("dl19", "dl19.tsv.gz"), ("dl20", "dl20.tsv.gz")):  # fmt: skip
            qrels: dict[str, dict[str, int]] = {}
            for line in _lines(source / f"qrels.{name}"):
                qid, _, docid, grade = line.split()
                qrels.setdefault(qid, {})[docid] = int(grade)
            assert collection.qrels[name] == qrels
            rows = [line.split("\t") for line in _lines(source / f"queries.{file}")]
            rows = [row for row in rows if name == "train" or row[0] in qrels]
            queries = collection.queries[name]
            assert [list(pair) for pair in zip(queries.ids, queries.texts, strict=True)] == rows
        triples = [tuple(line.split("\t")) for line in _lines(source / "docpairs.tsv.gz")]
        assert list(collection.triples) == triples
        assert set(collection.candidates) == {"dl19", "dl20"}  # none for training
        for name, run in collection.candidates.items():
            top = [line.split("\t") for line in _lines(source / f"top.{name}.tsv.gz")]
            judged = [pair for pair in top if pair[0] in collection.qrels[name]]
            assert len(judged) < len(top)
            assert sorted([q, d] for q in run for d in run[q]) == sorted(judged)
            assert {score for hits in run.values() for score in hits.values()} == {0.0}
    about = json.loads((made.folder / "sources.json").read_text())
    assert about["counts"] == mini.counts
    assert about["sources"] == {
        "ir_datasets": ir_datasets.__version__, "passages": "am-msmarco", "train": "am-msmarco/train",
        "dl19": "am-msmarco/dl19/judged", "dl20": "am-msmarco/dl20/judged",
    }  # fmt: skip


def test_the_fingerprint_is_that_of_the_content(mini, into, tmp_path: Path) -> None:
    made = into(mini)
    text = "Miniature\n"
    for name, texts in [("passages", made.passages), *sorted(made.queries.items())]:
        text += f"{name} {len(texts)}\n"
        for i, t in zip(texts.ids, texts.texts, strict=True):
            text += f"{i}\t{len(t)}\t{t}\n"
        if name != "passages":
            for kind, table in (("qrels", made.qrels), ("candidates", made.candidates)):
                rows = table.get(name, {})
                text += f"{kind} {len(rows)}\n"
                text += "".join(f"{q}\t{d}\t{rows[q][d]}\n" for q in sorted(rows) for d in sorted(rows[q]))  # fmt: skip
    data = (text + f"triples {len(made.triples)}\n").encode()
    for qid, positive, negative in made.triples:
        for row in (made.queries["train"].row(qid), int(positive), int(negative)):
            data += row.to_bytes(4, "little")
    assert hashlib.sha256(data).hexdigest()[:16] == made.fingerprint


def test_the_fingerprint_depends_on_no_chunk_and_on_every_part(
    mini, into, uninterrupted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in ((stored, "_BATCH"), (msmarco, "_HASHED")):
        monkeypatch.setattr(module, name, 77)
    again = into(mini)
    assert again.fingerprint == uninterrupted

    def changed(**parts: Any) -> str:
        candidates = parts.pop("candidates", again.candidates)
        return msmarco.fingerprint_of(dataclasses.replace(again, **parts), candidates)

    assert changed() == uninterrupted
    qrels, run = again.qrels["dl19"], again.candidates["dl20"]
    qid, other = next(iter(qrels)), next(iter(run))
    docid, hit = next(iter(qrels[qid])), next(iter(run[other]))
    reordered = dict(reversed([(q, dict(reversed(j.items()))) for q, j in qrels.items()]))
    assert changed(qrels={**again.qrels, "dl19": reordered}) == uninterrupted
    fewer = stored.write_triples(
        tmp_path / "t.arrow", again.triples[:-1], again.queries["train"], again.passages
    )
    found = {
        changed(name="Other"),
        changed(passages=again.queries["train"]),
        changed(queries={**again.queries, "dl19": again.queries["dl20"]}),
        changed(qrels={**again.qrels, "dl19": {**qrels, qid: {**qrels[qid], docid: 9}}}),
        changed(triples=fewer),
        changed(candidates={**again.candidates, "dl20": {**run, other: {**run[other], hit: 1.5}}}),
        changed(candidates={}),
    }
    assert len(found) == 7
    assert uninterrupted not in found


def test_without_triples_there_is_no_training_set(mini, into) -> None:
    counts = {name: n for name, n in mini.counts.items() if name not in ("train", "triples")}
    made = into(mini, triples=None, counts=counts)
    assert set(made.queries) == {"dl19", "dl20"}
    assert (len(made.triples), len(made.triples.rows)) == (0, 0)


def test_the_first_triples_of_each_query_are_kept(mini, source, into, tmp_path: Path) -> None:
    every = [tuple(line.split("\t")) for line in _lines(source / "docpairs.tsv.gz")]
    numbers: dict[str, list[int]] = {}
    for number, (qid, _, _) in enumerate(every):
        numbers.setdefault(qid, []).append(number)
    count = 19
    kept = sorted(n for ns in numbers.values() if len(ns) >= count for n in ns[:count])
    assert 0 < len(kept) < len(every) / 2
    made = into(mini, triples_per_query=count)  # counts.triples is what ir_datasets has
    assert list(made.triples) == [every[n] for n in kept]
    assert not [p.name for p in made.folder.iterdir() if p.name.startswith(".")]
    shutil.rmtree(tmp_path / "work")
    with pytest.raises(DataError, match=r"no query has triples_per_query = 999 triples"):
        into(mini, triples_per_query=999)


def test_a_finished_conversion_is_opened(mini, into, tmp_path: Path, monkeypatch) -> None:
    first = into(mini)
    monkeypatch.setattr(ir_datasets, "load", lambda name: pytest.fail("read again"))
    assert into(mini).fingerprint == first.fingerprint
    monkeypatch.undo()
    shutil.rmtree(first.folder)  # a collection that was removed is made again
    assert into(mini).folder.is_dir()
    shutil.rmtree(tmp_path / "work")  # and one whose receipt was lost is found to be there
    stamp = (first.folder / "passages.arrow").stat().st_mtime_ns
    assert into(mini).folder == first.folder
    assert (first.folder / "passages.arrow").stat().st_mtime_ns == stamp
    assert sorted(p.name for p in (tmp_path / "work").rglob("*")) == ["fingerprint", "key"]


# ---- interrupted, broken, incomplete -------------------------------------------------------------------------------


def _kill(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _killed_in_the_passages(path: Path, pairs: Any, **options: Any) -> None:
    def some() -> Iterator[tuple[str, str]]:
        for number, pair in enumerate(pairs):
            if number == 150:
                _kill()
            yield pair

    stored.write_texts(path, some(), **options)


@pytest.mark.parametrize(
    ("step", "does", "kept"),
    [
        ("write_texts", _killed_in_the_passages, 0),
        ("_candidates", _kill, 5),
        ("write_triples", _kill, 9),
        ("fingerprint_of", _kill, 10),
        ("_move", _kill, 11),
    ],
)
def test_a_killed_conversion_goes_on(
    step: str, does: Any, kept: int, mini, into, uninterrupted, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(stored, "_BATCH", 50)
    with monkeypatch.context() as patch:
        patch.setattr(msmarco, step, does)
        assert in_child(lambda: into(mini)) == "died"
    assert _finished(tmp_path) == []
    work = tmp_path / "work" / "key"
    names = [path.name for path in work.iterdir() if not path.name.startswith(".")]
    assert len(names) == kept, names
    before = {name: (work / name).stat().st_mtime_ns for name in names}
    made = into(mini)
    assert _finished(tmp_path) == [made.fingerprint]
    assert not [path.name for path in made.folder.iterdir() if path.name.startswith(".")]
    for name, stamp in before.items():
        if name.endswith(".arrow"):  # what takes long is not written again
            assert (made.folder / name).stat().st_mtime_ns == stamp, name
    assert made.fingerprint == uninterrupted


def test_a_conversion_killed_after_the_selection_goes_on(
    mini, into, tmp_path: Path, monkeypatch
) -> None:
    def select(*arguments: Any) -> None:
        stored.select_triples(*arguments)
        _kill()

    with monkeypatch.context() as patch:
        patch.setattr(msmarco, "select_triples", select)
        assert in_child(lambda: into(mini, triples_per_query=19)) == "died"
    assert (tmp_path / "work" / "key" / ".every-triple.arrow").is_file()
    made = into(mini, triples_per_query=19)
    assert 0 < len(made.triples) < 4000
    assert not [path.name for path in made.folder.iterdir() if path.name.startswith(".")]


def test_two_processes_make_it_once(mini, into, tmp_path: Path, monkeypatch) -> None:
    log = tmp_path / "log"
    write = msmarco._write

    def logged(*arguments: Any) -> str:
        with log.open("a") as file:
            file.write("written\n")
        return write(*arguments)

    monkeypatch.setattr(msmarco, "_write", logged)
    threads = [threading.Thread(target=in_child, args=(lambda: into(mini),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert log.read_text() == "written\n"
    assert len(_finished(tmp_path)) == 1


def test_other_settings_with_the_same_content_may_be_faster(
    mini, into, tmp_path, monkeypatch
) -> None:
    move = msmarco._move

    def late(work: Path, target: Path) -> None:
        shutil.copytree(work, target)
        move(work, target)

    monkeypatch.setattr(msmarco, "_move", late)
    made = into(mini)
    assert _finished(tmp_path) == [made.fingerprint]
    assert [path.name for path in (tmp_path / "work" / "key").iterdir()] == ["fingerprint"]


def test_a_wrong_count_is_an_error(mini, into, tmp_path: Path) -> None:
    for name in ("passages", "train", "triples", "dl19"):
        right = mini.counts[name]
        with pytest.raises(DataError, match=f"{name}: {right + 1:,} expected, {right:,} found"):
            into(mini, counts={**mini.counts, name: right + 1})
        assert _finished(tmp_path) == []
    assert len(into(mini).triples) == mini.counts["triples"]


def test_the_licence_is_accepted_before_anything_is_read(mini, into, tmp_path, monkeypatch) -> None:
    read: list[str] = []
    records = msmarco.read_records
    monkeypatch.setattr(msmarco, "read_records", lambda *a: read.append(a[1]) or records(*a))
    terms = "Terms of Miniature Inc., see <https://terms.example>"
    for given in ("", "no", "am-msmarco/train"):
        monkeypatch.setenv(ACCEPT_VARIABLE, given)
        with pytest.raises(LicenceError) as error:
            into(mini, licence=terms)
        assert terms in str(error.value)
        assert "ADAPTIVE_MARGINS_ACCEPT_LICENCE=am-msmarco" in str(error.value)
    assert (read, _finished(tmp_path)) == ([], [])
    monkeypatch.setenv(ACCEPT_VARIABLE, "am-msmarco")
    into(mini, licence=terms)
    monkeypatch.delenv(ACCEPT_VARIABLE)
    into(mini, licence=terms)  # what is converted was accepted
    shutil.rmtree(tmp_path / "work")
    monkeypatch.setenv(ACCEPT_VARIABLE, "all")
    into(mini, licence=terms)


def test_a_damaged_file_is_named_and_can_be_replaced(copied, into, tmp_path: Path) -> None:
    mini, folder = copied
    path = folder / "docpairs.tsv.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"docpairs of 'am-.*/train' could not be read: EOFError") as error:  # fmt: skip
        into(mini)
    assert f"remove a damaged file, and it is fetched or built again):\n  {path}" in str(
        error.value
    )
    assert "run the same command again" in str(error.value)
    assert _finished(tmp_path) == []
    path.write_bytes(whole)
    assert len(into(mini).triples) == 4000


@pytest.mark.parametrize(
    ("file", "line", "said"),
    [
        ("qrels.train", "1 0 2", "qrels of .* could not be read: RuntimeError: expected 4 columns, got 3"),
        ("qrels.dl19", "QID 0 2 high", r"(?s)queries of .* could not be read: ValueError.*qrels\.dl19\n"),
        ("qrels.train", "QID 0 300 1", "train qrels:181: unknown passage '300'"),
        ("qrels.train", "0 0 7 1", "train qrels:181: unknown query '0'"),
        ("qrels.train", "QID 0 7 1\nQID 0 7 1", "train qrels:18[12]: .* judges '7' twice"),
        ("queries.train.tsv", "QID\tagain", "train queries:.*: id '.*' occurs already in line"),
        ("queries.train.tsv", "0\t ", "train queries:.*: the text of '0' is empty"),
        ("queries.train.tsv", "0", "queries of .*RuntimeError: expected 2 fields, got 1"),
        ("collection.tsv.gz", "7\tagain", "id '7' occurs twice, as number 8 and number 301"),
        ("top.dl20.tsv.gz", "QID\t300", "judged scoreddocs:1201: unknown passage '300'"),
        ("docpairs.tsv.gz", "QID\t7\t300", "train docpairs:4001: unknown negative '300'"),
    ],
)  # fmt: skip
def test_malformed_data_is_named(file: str, line: str, said: str, copied, into, tmp_path) -> None:
    mini, folder = copied
    path = folder / file
    if "QID" in line:
        judged = "qrels.dl20" if "dl20" in file else "qrels.dl19" if "dl19" in file else "qrels.train"  # fmt: skip
        line = line.replace("QID", _lines(folder / judged)[0].split()[0])
    lines = [*_lines(path), line, ""]
    data = "\n".join(lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    with pytest.raises(DataError, match=said):
        into(mini, counts={})
    assert _finished(tmp_path) == []


def test_ids_are_checked_first(mini, into, monkeypatch) -> None:
    monkeypatch.setattr(msmarco, "read_records", lambda *_: pytest.fail("read"))
    for change, said in (
        ({"passages": "am-msmarc"}, "collection.passages: ir_datasets .* has no 'am-msmarc' .did you mean am-msmarco"),
        ({"triples": "am-msmarco/dl19"}, "collection.triples: 'am-msmarco/dl19' of ir_datasets has no docpairs; expected"),
        ({"sets": {"dl21": "am-msmarco"}, "counts": {}}, "collection.sets.dl21: 'am-msmarco' .* has no queries and no qrels"),
    ):  # fmt: skip
        settings = IrDatasetsSettings(**mini.settings(**change))
        with pytest.raises(DataError, match=said):
            into(mini, **change)
        with pytest.raises(DataError, match=said):
            downloads(settings)


def test_a_changed_folder_is_noticed(mini, into, tmp_path: Path) -> None:
    folder = into(mini).folder
    for name in sorted(json.loads((folder / "sources.json").read_text())["files"]):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:-1])
        with pytest.raises(DataError, match=f"{name}: {len(data) - 1} bytes, expected {len(data)}"):
            StoredCollection.load(folder)
        (folder / name).unlink()
        with pytest.raises(DataError, match=f"{name}: file not found"):
            StoredCollection.load(folder)
        (folder / name).write_bytes(data)
    for name in ("qrels.dl19.txt", "queries.train.tsv", "candidates.dl20.run.gz", "triples.arrow"):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:-2] + b"x" + data[-1:])
        with pytest.raises(DataError, match=f"{name}: SHA-256 is"):
            StoredCollection.load(folder)
        (folder / name).write_bytes(data)
    StoredCollection.load(folder)
    moved = folder.rename(folder.with_name("0123456789abcdef"))
    with pytest.raises(DataError, match=r"sources\.json: is of the collection "):
        StoredCollection.load(moved)
    (moved / "sources.json").unlink()
    with pytest.raises(DataError, match=r"sources\.json: file not found"):
        StoredCollection.load(moved)
    with pytest.raises(FileNotFoundError, match="no collection at"):
        StoredCollection.load(folder)


# ---- downloads -----------------------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[tuple[str, dict[str, Any]]]:
    """A web server of this process; what it answers is in the dict: bytes, or bytes and the length to claim."""
    answers: dict[str, Any] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            data, length = answers["file"]
            self.send_response(200)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/docpairs.tsv.gz", answers
        running.shutdown()


def _online(mini: Miniature, source: Path, folder: Path, url: str) -> Miniature:
    """The miniature with triples that are fetched from ``url``."""
    prefix = f"am-{folder.name}-online"
    md5 = hashlib.md5((source / "docpairs.tsv.gz").read_bytes()).hexdigest()
    download = Download(
        [RequestsDownload(url)], expected_md5=md5, cache_path=folder / "pairs.gz", size_hint=1234
    )
    offline = ir_datasets.load(mini.triples)
    ir_datasets.registry.register(
        prefix,
        Dataset(
            offline.queries_handler(), offline.qrels_handler(), TsvDocPairs(GzipExtract(download))
        ),
    )
    return dataclasses.replace(mini, triples=prefix)


def test_a_download_that_breaks_or_differs_goes_on(
    mini, source, into, tmp_path: Path, server, monkeypatch
) -> None:
    monkeypatch.setenv("IR_DATASETS_DL_TRIES", "1")
    url, answers = server
    online = _online(mini, source, tmp_path, url)
    settings = IrDatasetsSettings(**online.settings())
    data = (source / "docpairs.tsv.gz").read_bytes()
    md5 = hashlib.md5(data).hexdigest()
    assert downloads(settings) == [(url, 1234)]
    for answer, said in (
        ((data[: len(data) // 2], len(data)), "IncompleteRead"),
        ((data[:-1] + b"x", len(data)), "HashVerificationError"),
        ((b"", 0), "HashVerificationError"),
    ):
        answers["file"] = answer
        with pytest.raises(DownloadError, match=said) as error:
            into(online)
        assert f"{url} (1,234 bytes, MD5 {md5})" in str(error.value)
        assert f"without a network, put it at {tmp_path / 'pairs.gz'}\n" in str(error.value)
        assert not (tmp_path / "pairs.gz").exists()
        assert _finished(tmp_path) == []
    answers["file"] = (data, len(data))
    assert list(into(online).triples) == list(into(mini).triples)
    assert downloads(settings) == []


def test_other_scores_and_texts_of_several_fields_are_read(into, tmp_path: Path) -> None:
    """Ids that are no numbers, candidates with scores, queries with line breaks and an empty passage."""
    prefix = f"am-{tmp_path.name}-other"
    docs = TsvDocs(StringFile("a-1\tfirst passage\nb/2\t\nc\tthird\n"))
    dataset = Dataset(
        docs,
        TsvQueries(StringFile("q\twhat  is first?\n")),
        TrecQrels(StringFile("q 0 a-1 3\nq 0 b/2 -1\n"), {}),
        TrecScoredDocs(StringFile("q Q0 c 1 7.25 x\nq Q0 a-1 2 7.25 x\nq Q0 b/2 3 -1e-3 x\n")),
    )
    ir_datasets.registry.register(prefix, dataset)
    other = Miniature(prefix, prefix, {"test": prefix}, {})
    made = into(other, triples=None)
    assert list(made.passages.texts) == ["first passage", "", "third"]
    assert made.queries["test"]["q"] == "what  is first?"
    assert made.qrels["test"] == {"q": {"a-1": 3, "b/2": -1}}
    assert list(made.candidates["test"]["q"].items()) == [("c", 7.25), ("a-1", 7.25), ("b/2", -0.001)]  # fmt: skip


KNOWN = json.loads((Path(ir_datasets.__file__).parent / "etc/downloads.json").read_text())
KNOWN = KNOWN["msmarco-passage"]
SETTINGS = """
import json, socket, sys
from pathlib import Path

import ir_datasets

from adaptive_margins.data.converted import convert, downloads
from adaptive_margins.profiles.config import IrDatasetsSettings

socket.socket.connect = None
sets = {f"dl{y}": f"msmarco-passage/trec-dl-20{y}/judged" for y in (19, 20)}
settings = IrDatasetsSettings(
    kind="ir_datasets", name="MS MARCO", passages="msmarco-passage",
    triples="msmarco-passage/train/triples-small", sets=sets,
)
"""


def _of_ms_marco(program: str, home: Path, *arguments: Path) -> str:
    """What a program prints that goes on from SETTINGS, with another home of ir_datasets."""
    done = subprocess.run(
        [sys.executable, "-c", SETTINGS + textwrap.dedent(program), *arguments],
        env={**os.environ, "IR_DATASETS_HOME": str(home)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_downloads_of_ms_marco_are_known_without_a_network(tmp_path: Path) -> None:
    """The list and the sizes are ir_datasets' own; a file that is there is not fetched."""
    program = """
        print(json.dumps(downloads(settings)))
        assert not [path for path in Path(sys.argv[1]).rglob("*") if path.is_file()]
        for file in sys.argv[2:]:
            Path(file).parent.mkdir(exist_ok=True)
            Path(file).touch()
        print(json.dumps(downloads(settings)))
    """
    keys = ["collectionandqueries", "queries", "train/qrels", "train/docpairs/small"]
    for year in (2019, 2020):
        keys += [f"trec-dl-{year}/{what}" for what in ("queries", "qrels", "scoreddocs")]
    # The collection unpacked, from whose archive the triples are made all the same; and the triples.
    there = "msmarco-passage/collection.tsv", f"downloads/{KNOWN['train/docpairs/small']['expected_md5']}"  # fmt: skip
    arguments = [tmp_path, *(tmp_path / name for name in there)]
    first, then = _of_ms_marco(program, tmp_path, *arguments).splitlines()
    assert dict(json.loads(first)) == {KNOWN[key]["url"]: KNOWN[key]["size_hint"] for key in keys}
    keys.remove("train/docpairs/small")
    assert {url for url, _ in json.loads(then)} == {KNOWN[key]["url"] for key in keys}


def test_ms_marco_itself_is_converted_from_files_put_there(tmp_path: Path) -> None:
    """ir_datasets' own readers of MS MARCO, from archives laid out like the real ones, with a few lines in each."""
    home, data = tmp_path / "home", tmp_path / "home" / "msmarco-passage"
    # Encoded twice, as some of the real ones.
    passages = [f"passage {i} caf\xc3\xa9" for i in range(30)]
    queries = {str(700 - 3 * i): f"what is number {i}" for i in range(8)}
    qids = list(queries)
    pairs = [(qids[i % 5], i % 30, (7 * i + 3) % 30) for i in range(60)]

    def tar(path: Path, name: str, lines: list[str]) -> None:
        content = "".join(f"{line}\n" for line in lines).encode()
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w:gz") as archive:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))

    small = home / "downloads" / KNOWN["train/docpairs/small"]["expected_md5"]
    tar(data / "collectionandqueries.tar.gz", "collection.tsv", [f"{i}\t{p}" for i, p in enumerate(passages)])  # fmt: skip
    tar(data / "queries.tar.gz", "queries.train.tsv", [f"{q}\t{text}" for q, text in queries.items()])  # fmt: skip
    tar(small, "triples.train.small.tsv", [f"{queries[q]}\t{passages[p]}\t{passages[n]}" for q, p, n in pairs])  # fmt: skip
    files = {"train/qrels": f"{qids[0]} 0 3 1\n{qids[1]} 0 4 1\n"}
    for year, numbers in ((2019, "30 31 32"), (2020, "40 41 42")):
        a, b, c = numbers.split()
        files[f"trec-dl-{year}/qrels"] = f"{a} Q0 5 3\n{a} Q0 6 0\n{b} Q0 7 2\n"
        files[f"trec-dl-{year}/queries.tsv"] = f"{a}\tone\n{b}\ttwo\n{c}\tnot judged\n"
        files[f"trec-dl-{year}/ms.run"] = f"{a}\t5\n{a}\t9\n{b}\t1\n{c}\t2\n"
    for name, text in files.items():
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_text(text)
    (data / "trec-dl-2020/queries.tsv.gz").write_bytes(gzip.compress(files["trec-dl-2020/queries.tsv"].encode()))  # fmt: skip

    program = """
        handler = ir_datasets.load(settings.triples).docpairs_handler()
        handler._dlc._streamer._streamer._streamer.expected_md5 = None  # a few lines have another one
        assert downloads(settings) == []
        made = convert(settings, Path(sys.argv[1], "work"), Path(sys.argv[1], "collections"))
        sizes = {name: len(texts) for name, texts in made.queries.items()}
        print(json.dumps([
            list(made.passages.texts), sizes, made.qrels, made.candidates, list(made.triples), made.queries["train"].ids,
        ]))
    """
    found = json.loads(_of_ms_marco(program, home, tmp_path))
    texts, sizes, qrels, candidates, triples, ids = found
    assert texts == [f"passage {i} café" for i in range(30)]
    assert sizes == {"train": 8, "dl19": 2, "dl20": 2}
    assert qrels["train"] == {qids[0]: {"3": 1}, qids[1]: {"4": 1}}
    assert qrels["dl20"] == {"40": {"5": 3, "6": 0}, "41": {"7": 2}}
    assert candidates["dl19"] == {"30": {"5": 0.0, "9": 0.0}, "31": {"1": 0.0}}
    assert triples == [[q, str(p), str(n)] for q, p, n in pairs]
    assert ids == qids
