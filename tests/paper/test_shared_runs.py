"""Runs of somebody else: what is taken and refused, and the archive that they come in."""

from __future__ import annotations

import gzip
import importlib
import io
import json
import shutil
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import yaml

from adaptive_margins import files, paper
from adaptive_margins.paper import shared_runs
from adaptive_margins.paper.out_of_domain import FOLDER
from adaptive_margins.paper.shared_runs import SharingError, take

ROOT = Path(__file__).resolve().parents[2]
with pytest.MonkeyPatch.context() as _patch:  # the scripts import each other by their names
    _patch.syspath_prepend(ROOT / "benchmarks")
    export_runs = importlib.import_module("export_runs")


def home_of(smoke, folder: Path, configs=()) -> paper.Reproduction:
    """A home with the collection and some finished runs of the profile smoke."""
    shutil.copytree(smoke.home / "collections", folder / "collections")
    for config in configs:
        path = shutil.copytree(smoke.store.path(config), folder / "runs" / config.run_id)
        files.write_checksums(path)
    reproduction = paper.open("smoke", folder)
    reproduction.inputs.collection = smoke.inputs.collection  # else it looks for sources: seconds
    return reproduction


def sums(folder: Path) -> set[str]:
    return {line[66:] for line in (folder / files.CHECKSUMS).read_text().splitlines()}


@pytest.fixture
def configs(smoke):
    """BM25, a zero-shot encoder, a curve and a static row of Table 3, whose ε this home finds."""
    e = smoke.experiments
    rows = [e.variant_run("minilm-3", "static", False), *e.figure4_runs()[:1]]
    return [e.bm25_run(), e.zero_shot_run("minilm-3"), *rows]


def test_needed_runs_of_a_folder_are_taken_and_others_named(smoke, configs, tmp_path, capsys):
    own, *others = configs
    theirs = home_of(smoke, tmp_path / "theirs", configs)
    mine = home_of(smoke, tmp_path / "mine", [own])
    marker = mine.store.path(own) / "mine"
    marker.touch()
    damaged, misnamed, *good = others
    file = theirs.store.path(damaged) / "result.json"
    file.write_text(file.read_text().replace("0.", "1.", 1))
    shutil.copy(theirs.store.path(own) / "config.json", theirs.store.path(misnamed))
    for changes in ({"collection": "c" * 16}, {"collection": "d" * 16, "depth": 3}):
        other = good[0].model_copy(update=changes)
        folder = shutil.copytree(theirs.store.path(good[0]), theirs.store.path(other))
        (folder / "config.json").write_text(other.model_dump_json())
        files.write_checksums(folder)

    take(mine, str(tmp_path / "theirs"))
    assert {p.name for p in mine.store.folder.iterdir()} == {c.run_id for c in (own, *good)}
    assert marker.exists()
    told = capsys.readouterr().err
    assert f"{len(good)} runs are taken; 1 are here already" in told
    assert f"run {damaged.run_id}: result.json was changed" in told
    assert f"run {misnamed.run_id}: config.json" in told
    here = mine.inputs.fingerprint
    assert f"not taken: collection fingerprint {'c' * 16} → {here} (1)" in told
    assert "not taken: not of profile smoke (1)" in told
    for config in good:
        stored = mine.store.get(config)
        files.check_folder(stored.path)
        assert stored.provenance == {"source": "theirs"}
        assert stored.result == smoke.store.get(config).result
        assert "provenance.json" in sums(stored.path)
    assert not smoke.store.get(own).provenance
    # A folder of runs alone; a third person's home does not become the origin.
    third = home_of(smoke, tmp_path / "third")
    take(third, str(mine.store.folder))
    assert {p.name for p in third.store.folder.iterdir()} == {c.run_id for c in (own, *good)}
    assert third.store.get(good[0]).provenance == {"source": "theirs"}
    assert not list((third.home / "cache").glob("tmp*"))


def export(reproduction, target: Path) -> Path:
    return export_runs.export(reproduction, "smoke", target, by="Jane Doe <b>")


def test_all_runs_on_other_collections_are_taken(smoke, tmp_path, capsys):
    """Not only those of trained encoders: BM25 and zero-shot encoders were ranked there, too."""
    theirs = tmp_path / "theirs"
    shutil.copytree(smoke.home / FOLDER, theirs / FOLDER)
    (theirs / "runs").mkdir()
    mine = home_of(smoke, tmp_path / "mine")
    take(mine, str(theirs))
    taken, given = ({p.name for p in (home / FOLDER).iterdir()} for home in (mine.home, theirs))
    assert taken == given
    assert f"{len(given)} runs are taken" in capsys.readouterr().err


def test_an_archive_is_the_same_for_the_same_runs_and_others_start_from_it(
    smoke, configs, tmp_path, capsys, monkeypatch
):
    for variable in ("USER", "LOGNAME", "USERNAME"):
        monkeypatch.setenv(variable, "user-of-this")
    monkeypatch.setattr("platform.node", lambda: "host-of-this")
    monkeypatch.setattr("socket.gethostname", lambda: "host-of-this")
    theirs = home_of(smoke, tmp_path / "theirs", configs)
    site = theirs.home / "_build" / "html"
    site.mkdir(parents=True)
    (site / "index.html").write_text("<p>A book</p>")
    receipts = theirs.home / "book" / "_executed" / "receipts"
    receipts.mkdir(parents=True)
    machine = {"processor": "P", "cores": "2"}
    receipt = {"key": {"profile": ["smoke", ""]}, "finished": "2026-01-02", "machine": machine}
    (receipts / "01_x.json").write_text(json.dumps(receipt))
    archive = export(theirs, tmp_path / "a" / "runs.tar.gz")
    again = home_of(smoke, tmp_path / "copied", reversed(configs))
    shutil.copytree(theirs.home / "_build", again.home / "_build")
    shutil.copytree(theirs.home / "book", again.home / "book")
    assert export(again, tmp_path / "b.tar.gz").read_bytes() == archive.read_bytes()

    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "out", filter="data")
    (root,) = (tmp_path / "out").iterdir()
    assert root.name == "adaptive-margins-smoke"
    files.check_folder(root)
    listed = sums(root)
    present = {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}
    assert present == {*listed, files.CHECKSUMS}
    assert {"README.md", "LICENSE", "CITATION.cff", "constraints.txt", "book/index.html"} <= present
    assert "torch==" in (root / "requirements.txt").read_text()
    names = [tmp_path, smoke.home, ROOT, f"{Path.home()}/", "user-of-this", "host-of-this"]
    for name in present:
        content = (root / name).read_bytes()
        content = gzip.decompress(content) if name.endswith(".gz") else content
        assert not [n for n in names if str(n).encode() in content], name

    bm25, row = configs[0], configs[2]
    scores = pd.read_parquet(root / "per_query.parquet")
    found = scores[(scores["run_id"] == bm25.run_id) & (scores["mode"] == "full")]
    mean = found.groupby(["set", "measure"], observed=True)["value"].mean()
    stored = smoke.store.get(bm25).evaluation("full", "test1").mean
    assert mean["test1"].to_dict() == pytest.approx(stored)
    ranking = root / "runs" / row.run_id / "full.test1.run.gz"
    about = yaml.safe_load(ranking.with_name("full.test1.ir_metadata.yml").read_text())
    assert list(about) == [
        "schema-version", "run-version", "tag", "platform", "research goal", "implementation",
        "method", "actor", "data",
    ]  # fmt: skip
    with gzip.open(ranking, "rt") as file:
        assert file.readline().split()[-1] == about["tag"] == row.run_id
    assert about["actor"]["name"] == "Jane Doe <b>"
    assert about["method"]["retrieval"][0]["params"]["target"] == row.target
    assert (root / about["data"]["test collection"]["qrels"]).is_file()

    # From a URL, and from the same files as ZIP.
    packed = shutil.make_archive(str(tmp_path / "runs"), "zip", tmp_path / "out")
    for number, source in enumerate((archive.as_uri(), packed)):
        mine = home_of(smoke, tmp_path / f"mine{number}")
        take(mine, source)
        assert {p.name for p in mine.store.folder.iterdir()} == {c.run_id for c in configs}
        whose = mine.store.get(row).provenance
        assert whose["by"] == "Jane Doe <b>" and whose["computed"]
        assert whose["source"] == (archive.name, "runs.zip")[number]
        told = capsys.readouterr().err
        assert "by: Jane Doe <b>" in told and "torch" in told and "4 runs are taken" in told
    assert export_runs.has_book(theirs.home, "smoke")
    assert not export_runs.has_book(theirs.home, "laptop")


@pytest.fixture
def nobody(tmp_path):
    """What `take` needs before it has found runs."""
    return SimpleNamespace(home=tmp_path / "home", experiments=None)


def member(tar: tarfile.TarFile, name: str, **values: object) -> None:
    info = tarfile.TarInfo(name)
    info.size = 4 if info.isreg() else 0
    for key, value in values.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(b"evil"))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("../evil", {}),
        ("runs/../../evil", {}),
        ("/tmp/../evil", {"type": tarfile.LNKTYPE, "linkname": "../../../etc/passwd", "size": 0}),
        ("runs/link", {"type": tarfile.SYMTYPE, "linkname": "../../../evil", "size": 0}),
        ("runs/fifo", {"type": tarfile.CHRTYPE, "size": 0}),
    ],
)
def test_members_cannot_leave_the_folder(nobody, tmp_path, name, values):
    with tarfile.open(tmp_path / "bad.tar.gz", "w:gz") as tar:
        member(tar, name, **values)
    with pytest.raises(SharingError, match="cannot be read"):
        take(nobody, str(tmp_path / "bad.tar.gz"))
    assert {p.name for p in tmp_path.rglob("*")} == {"bad.tar.gz", "home", "cache"}


def test_zip_members_cannot_leave_the_folder(nobody, tmp_path):
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as packed:
        packed.writestr("../../evil", "evil")
        packed.writestr("/evil", "evil")
    with pytest.raises(SharingError, match="has no runs"):
        take(nobody, str(tmp_path / "bad.zip"))
    assert {p.name for p in tmp_path.rglob("*")} == {"bad.zip", "home", "cache"}


def test_a_source_that_cannot_be_used_is_one_message(nobody, tmp_path, monkeypatch):
    with tarfile.open(tmp_path / "good.tar.gz", "w:gz") as tar:
        member(tar, "runs/file")
    cut = tmp_path / "cut.tar.gz"
    cut.write_bytes((tmp_path / "good.tar.gz").read_bytes()[:-40])
    for source, words in (
        (str(tmp_path / "none.zip"), "cannot be read"),
        (str(cut), "cannot be read"),
        (str(tmp_path), "has no runs"),
        ("http://127.0.0.1:9/runs.tar.gz", "download it by hand"),
        ("nothing://runs.tar.gz", "download it by hand"),
    ):
        with pytest.raises(SharingError, match=words):
            take(nobody, source)
    monkeypatch.setattr(shared_runs, "_RESERVE", shutil.disk_usage(tmp_path).free)
    with pytest.raises(SharingError, match="do not fit on the disk"):
        take(nobody, str(tmp_path / "good.tar.gz"))
    assert not list((nobody.home / "cache").iterdir())
