"""The build on tiny notebooks: what counts as finished, what happens when something fails or is killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from bs4 import BeautifulSoup

from adaptive_margins import device
from adaptive_margins.book import build as build_module
from adaptive_margins.book import pages
from adaptive_margins.book.build import BuildError, Site, build, select
from adaptive_margins.book.execute import (
    NotebookError,
    check_parameters,
    execute,
    parameter_defaults,
)
from adaptive_margins.files import WriteError, locked
from adaptive_margins.profiles.load import load_profile
from conftest import run_config

PARAMETERS = 'profile = "laptop"\ndata_folder = ""'
ROOT = Path(__file__).resolve().parents[2]


def write_notebook(path: Path, *sources: str, parameters: str | None = PARAMETERS) -> Path:
    cells = [nbformat.v4.new_markdown_cell(f"# Notebook {path.stem}")]
    if parameters is not None:
        cells.append(nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    cells += [nbformat.v4.new_code_cell(source) for source in sources]
    path.parent.mkdir(parents=True, exist_ok=True)
    kernel = {"name": "python3", "display_name": "Mine", "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path


def write_run(home: Path, run_id: str, content: str = "{}") -> None:
    folder = home / "runs" / run_id
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(content)


WRITES_DATA = """
from pathlib import Path
from types import SimpleNamespace
import os, sys, warnings
(Path(data_folder) / "figure3.csv").write_text("encoder,value,run_id\\nminilm-1,0.5,aa11\\n")
print(profile, data_folder, sys.executable, os.environ["ADAPTIVE_MARGINS_HOME"])
warnings.warn("look")
"""


@pytest.fixture
def site(tmp_path, forked_workers, warm_start):
    home = tmp_path / "home"
    write_run(home, "aa11")
    return Site(home, "smoke")


def test_a_finished_notebook_is_left_alone_until_something_changes(site, tmp_path, capsys):
    first = write_notebook(tmp_path / "notebooks" / "01_data.ipynb", WRITES_DATA)
    second = write_notebook(tmp_path / "notebooks" / "02_plain.ipynb", "1 + 1")
    site.execute([first, second])

    page = (site.pages / "01_data.ipynb").read_text()
    assert "smoke book/_executed/data" in page  # the parameters that were passed
    for place in (tmp_path, Path.home(), sys.prefix, ROOT):
        assert str(place) not in page
    executed = nbformat.reads(page, as_version=4)
    tags = [cell.metadata.get("tags", []) for cell in executed.cells]
    assert ["injected-parameters", "remove-cell"] in tags
    assert executed.metadata.kernelspec.name == "python3"
    assert "papermill" not in page
    assert (site.pages / "data" / "figure3.csv").is_file()
    assert sorted(p.name for p in site.pages.iterdir() if not p.name.startswith("0")) == [
        "data",
        "receipts",
    ]
    receipt = json.loads(site.receipt(first).read_text())
    assert list(receipt["results"]) == ["aa11"]
    assert set(receipt["outputs"]) == {"01_data.ipynb", "data/figure3.csv"}
    assert receipt["key"]["versions"]["torch"].startswith("2.")
    assert receipt["seconds"] > 0

    before = (site.pages / "01_data.ipynb").stat().st_mtime_ns
    site.execute([first, second])
    assert "2 of 2 are finished" in capsys.readouterr().err
    assert (site.pages / "01_data.ipynb").stat().st_mtime_ns == before

    def becomes_stale(change, undo):
        assert site.finished(first)
        change()
        stale = not site.finished(first)
        undo()
        return stale and site.finished(second)

    result = site.home / "runs" / "aa11" / "result.json"
    data = site.pages / "data" / "figure3.csv"
    kept, source = data.read_text(), first.read_text()
    text = site.receipt(first).read_text()
    assert becomes_stale(lambda: result.write_text('{"other": 1}'), lambda: result.write_text("{}"))
    assert becomes_stale(result.unlink, lambda: result.write_text("{}"))
    assert becomes_stale(data.unlink, lambda: data.write_text(kept))
    assert becomes_stale(lambda: data.write_text(kept + "x"), lambda: data.write_text(kept))
    assert becomes_stale(
        lambda: first.write_text(source.replace("look", "see")), lambda: first.write_text(source)
    )
    assert becomes_stale(
        lambda: site.receipt(first).write_text(text[: len(text) // 2]),
        lambda: site.receipt(first).write_text(text),
    )
    external = site.home / "supplied" / "test1" / "theirs.run"
    external.parent.mkdir(parents=True)
    external.write_text("q1 Q0 d1 1 2.0 x\n")
    assert not site.finished(first)
    external.unlink()
    assert site.finished(first)
    assert not Site(site.home, "laptop").finished(first)


def test_other_code_or_versions_make_a_notebook_stale(site, tmp_path, monkeypatch):
    notebook = write_notebook(tmp_path / "01_x.ipynb")
    before = site.key(notebook)
    assert site.key(notebook) == before
    monkeypatch.setattr(pages, "versions", lambda: {"torch": "1"})
    monkeypatch.setattr(build_module, "library_hash", lambda: "other")
    after = site.key(notebook)
    assert {k for k in before if before[k] != after[k]} == {"library", "versions"}


def test_failed_and_killed_notebooks_are_kept_and_named_and_no_other_begins(site, tmp_path):
    folder = tmp_path / "notebooks"
    waiting = [write_notebook(folder / f"0{i}_waits.ipynb", "1 + 1") for i in range(1, 7)]
    error = write_notebook(folder / "08_error.ipynb", "print('so far')", "1 / 0")
    killed = write_notebook(folder / "09_killed.ipynb", "import os; os._exit(9)", "2")
    with pytest.raises(BuildError) as caught:
        site.execute([*waiting, error, killed])
    message = str(caught.value)
    assert "ZeroDivisionError" in message
    for notebook in (error, killed):
        kept = site.pages / f"{notebook.stem}.failed.ipynb"
        assert kept.is_file()
        assert str(kept) in message
    assert "so far" in (site.pages / "08_error.failed.ipynb").read_text()
    for notebook in (waiting[0], error, killed):
        assert not site.finished(notebook)
        assert not (site.pages / notebook.name).exists()
        assert not site.receipt(notebook).exists()
    assert not list(site.pages.glob("*.running.ipynb"))


SLEEPS = """
import os, time
from pathlib import Path
from types import SimpleNamespace
Path("pid").write_text(str(os.getpid()))
while not Path("go").exists():
    time.sleep(0.1)
"""


def test_a_killed_build_leaves_nothing_that_counts_and_goes_on(site, tmp_path):
    notebook = write_notebook(tmp_path / "notebooks" / "01_sleeps.ipynb", SLEEPS)
    pid = notebook.parent / "pid"
    # A fork has everything imported already; what it starts are processes of their own all the same.
    child = multiprocessing.get_context("fork").Process(target=site.execute, args=([notebook],))
    child.start()
    try:
        wait_for(lambda: pid.is_file() and pid.read_text(), 60)
    finally:
        child.kill()
        child.join()
    kernel = int(pid.read_text())
    wait_for(lambda: not alive(kernel), 30)
    assert not site.finished(notebook)
    assert not (site.pages / notebook.name).exists()
    (notebook.parent / "go").touch()
    site.execute([notebook])
    assert site.finished(notebook)
    assert not (site.pages / "01_sleeps.running.ipynb").exists()


def wait_for(condition, seconds):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.1)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/status")  # a zombie that nobody reaps is not alive
    return not (status.is_file() and "\nState:\tZ" in status.read_text())


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (None, "has 0 code cells tagged `parameters`, expected exactly one"),
        ('profile = "laptop"', "has no parameter data_folder; it has profile"),
        ('profile = "laptop"\ndata_folder = []', "plain scalars, found: data_folder = []"),
        ("import os", "plain scalars, found: import os"),
        ("profile = ", "invalid syntax"),
    ],
)
def test_wrong_parameters_stop_the_build_before_any_run(tmp_path, parameters, message):
    (tmp_path / "_config.yml").touch()
    write_notebook(tmp_path / "notebooks" / "01_ok.ipynb")
    write_notebook(tmp_path / "notebooks" / "02_bad.ipynb", parameters=parameters)
    called = []
    with pytest.raises(NotebookError, match=r"02_bad\.ipynb") as caught:
        build("smoke", home=tmp_path, source=tmp_path, run=lambda: called.append(1))
    assert message in str(caught.value)
    assert not called


def test_an_unknown_parameter_names_those_there_are(tmp_path):
    notebook = write_notebook(tmp_path / "01_a.ipynb", parameters='profile: str = "x"\nsteps = -1')
    assert parameter_defaults(notebook) == {"profile": "x", "steps": -1}
    with pytest.raises(NotebookError, match="has no parameter step; it has profile, steps"):
        check_parameters(notebook, {"step": 3})
    (tmp_path / "02_b.ipynb").write_text(notebook.read_text()[:50])
    with pytest.raises(NotebookError, match=r"02_b\.ipynb is not a notebook"):
        parameter_defaults(tmp_path / "02_b.ipynb")


def test_a_full_disk_leaves_no_page_and_no_receipt(site, tmp_path, monkeypatch):
    notebook = write_notebook(tmp_path / "notebooks" / "01_x.ipynb", "1")
    page = site.pages / "01_x.ipynb"

    def full(source, output, **kwargs):
        Path(output).write_text("{")  # papermill had begun to write
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("papermill.execute_notebook", full)
        with pytest.raises(NotebookError, match="No space left on device"):
            execute(notebook, page, {}, cwd=tmp_path)
    assert not page.exists()

    def no_receipt(path, text):
        raise WriteError(f"{path} could not be written: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(build_module, "write_text", no_receipt)
        with pytest.raises(BuildError, match=r"01_x\.ipynb.*No space left on device"):
            site.execute([notebook])
    assert not site.finished(notebook)


def test_two_builds_do_not_mix(tmp_path):
    write_notebook(tmp_path / "notebooks" / "01_x.ipynb")
    (tmp_path / "_config.yml").touch()
    with locked(tmp_path / "_build"), pytest.raises(WriteError, match="another process is writing"):
        build("smoke", home=tmp_path, source=tmp_path)


def test_notebooks_are_selected_by_number_or_name(tmp_path):
    paths = [
        write_notebook(tmp_path / f"0{i}_{n}.ipynb") for i, n in ((1, "a"), (2, "b"), (3, "c"))
    ]
    assert select(tmp_path) == paths
    assert select(tmp_path, ["03", "notebooks/01_a.ipynb"]) == [paths[0], paths[2]]
    with pytest.raises(BuildError, match=r"no notebook '07'; there are 01_a, 02_b, 03_c"):
        select(tmp_path, ["07"])
    with pytest.raises(BuildError, match="has no notebooks"):
        select(tmp_path / "none")


def test_the_notebook_on_ones_own_collection_is_no_page(tmp_path):
    page = write_notebook(tmp_path / "notebooks" / "01_a.ipynb")
    own = write_notebook(
        tmp_path / "notebooks" / f"{pages.OWN}.ipynb", parameters='source = "pydocs"'
    )
    assert (ROOT / "notebooks" / own.name).is_file()
    assert select(own.parent) == [page]
    assert select(own.parent, ["10"]) == select(own.parent, [pages.OWN]) == [own]
    (tmp_path / "_config.yml").touch()
    with pytest.raises(
        BuildError, match=rf"papermill notebooks/{own.name} out\.ipynb .* -p source"
    ):
        build("smoke", home=tmp_path, source=tmp_path, notebooks=["10"])


CONTENTS = """
format: jb-book
root: index
chapters: [{file: prose}, {file: datasheet}, {file: 01_first}]
"""


def test_the_book_is_built_strictly_and_only_when_something_changed(tmp_path, monkeypatch, capsys):
    """The real configuration, with a few short pages in the place of the real ones."""
    texts = {"datasheet.md": "# Data sheet\n\nStub.\n"}
    monkeypatch.setattr(pages, "texts", lambda *_: texts)
    monkeypatch.setattr(Site, "execute", pretend_to_execute)
    source, home = tmp_path / "checkout", tmp_path / "home"
    write_notebook(source / "notebooks" / "01_first.ipynb")
    (source / "book").mkdir()
    (source / "lib").mkdir()
    (source / "_config.yml").write_bytes((ROOT / "_config.yml").read_bytes())
    prose = source / "book" / "prose.md"
    for folder in ("_static", "_templates"):
        shutil.copytree(ROOT / "book" / folder, source / "book" / folder)
    for file, text in (
        (source / "book" / "_toc.yml", CONTENTS), (source / "book" / "references.bib", ""),
        (source / "book" / "index.md", "# A book\n"),
        (source / "book" / "measured.yaml", "speed: {step: 12}\n"),
        (prose, "# Prose\n\n{{ measured.speed.step }} of {{ profiles.paper.lengths.query }}\n"),
    ):  # fmt: skip
        file.write_text(text)
    there = sorted(source.rglob("*"))

    index = build("smoke", home=home, source=source, every=True)
    assert index == home / "_build" / "html" / "index.html"
    assert sorted(source.rglob("*")) == there  # the checkout is not touched
    html = BeautifulSoup(index.read_text(), "html.parser")
    links = {a["href"] for a in html.select("nav.bd-links a")}
    assert {"prose.html", "datasheet.html", "01_first.html"} <= links
    assert "Stub." in (index.parent / "datasheet.html").read_text()
    assert "12 of 30" in (index.parent / "prose.html").read_text()
    assert f"Open {index}" in capsys.readouterr().err

    built = index.stat().st_mtime_ns
    build("smoke", home=home, source=source, every=True)
    assert "nothing has changed" in capsys.readouterr().err
    assert index.stat().st_mtime_ns == built

    prose.write_text(prose.read_text() + "\n{ref}`nowhere`, {{ measured.speed.other }}\n")
    with pytest.raises(BuildError, match=r"prose\.md.*nowhere") as caught:
        build("smoke", home=home, source=source, every=True)
    assert "no attribute 'other'" in str(caught.value)
    assert index.stat().st_mtime_ns == built  # the last whole book is still there
    assert not (home / ".book.partial").exists()  # so that no warning is missing the next time


def pretend_to_execute(site, notebooks, *, force=False):
    site.pages.mkdir(parents=True, exist_ok=True)
    for notebook in notebooks:
        (site.pages / notebook.name).write_bytes(notebook.read_bytes())


def markdown_rows(text: str) -> dict[str, list[str]]:
    """First cell of each row of Markdown tables → the others, without escapes."""
    lines = [line for line in text.splitlines() if line.startswith("|") and "---" not in line]
    rows = [[c.strip().replace("\\", "") for c in re.split(r"(?<!\\)\|", x)[1:-1]] for x in lines]
    return {first: others for first, *others in rows}


def test_machine_and_versions_name_no_machine():
    facts = device.machine()
    assert int(facts["cores"]) >= 1
    assert str(facts["memory"]).endswith("GiB")
    assert os.uname().nodename not in json.dumps(facts)
    found = pages.versions()
    assert {"Python", "torch", "papermill", "jupyter-book", "faiss-cpu"} <= set(found)
    assert "ruff" not in found


def test_provenance_lists_machine_notebooks_runs_and_fingerprints():
    config = run_config(
        encoder="minilm-1", weights="sha256:53aa", collection="c0ffee", target=0.2, in_batch=True,
        batch_size=32, triples=64, seed=7,
    )  # fmt: skip
    result = {"train_seconds": 61.25, "eval_seconds": 2.0, "peak_bytes": 3 << 29}
    whose = {"by": "Jane | Doe", "source": "runs.zip"}
    run = SimpleNamespace(run_id="aa11", config=config, result=result, provenance=whose)
    machine = {"processor": "P | Q", "cores": 2}
    receipt = {"machine": machine, "finished": "2026-01-01T00:00:00Z", "seconds": 12.5}
    text = pages.provenance(load_profile("smoke"), {"01_x": receipt, "02_y": receipt}, [run])
    cells = markdown_rows(text)
    what = "static ε = 0.2, in-batch, B 32, 64 triples"
    assert cells["aa11"] == ["minilm-1", what, "7", "61.2", "2.0", "1.50"]
    assert "1:01 of training" in text
    assert cells["collection"] == ["c0ffee"] and cells["encoder minilm-1"] == ["sha256:53aa"]
    assert cells["02_y"] == ["2026-01-01T00:00:00Z", "12.5"]
    assert cells["Processor"] == ["P | Q"] and text.count("Processor") == 1
    assert "name: smoke" in text
    assert (
        r"1 of them were computed elsewhere, and taken from runs\.zip\, by\: Jane \| Doe." in text
    )
    run.provenance = {}
    text = pages.provenance(load_profile("smoke"), {"01_x": receipt}, [run])
    assert "elsewhere" not in text
