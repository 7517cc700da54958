"""The committed notebooks: their cells, and one executed by papermill's command on finished runs and with other values.

The one on a collection of one's own is no page of the book, and executed in corpus/test_explore.py.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from adaptive_margins.book.context import PARAMETERS, ParameterError, check_parameters
from adaptive_margins.book.execute import parameter_defaults
from adaptive_margins.book.pages import OWN
from adaptive_margins.profiles.config import ProfileError

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SHOWS = {
    "00_the_loss": [],
    "01_collection": ["table1"],
    "02_static_targets": ["figure3"],
    "03_adaptive_targets": ["figure4"],
    "04_distributed_targets": ["figure5", "figure6", "table2"],
    "05_comparison": ["table3"],
    "06_baselines": ["table4"],
    "07_paper_and_released_code": [],
}
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
each_page = pytest.mark.parametrize(
    "path", [p for p in NOTEBOOKS if p.stem not in (OWN, "00_the_loss")], ids=lambda p: p.stem
)


def cells(path: Path, kind: str) -> list[nbformat.NotebookNode]:
    return [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == kind]


def test_all_are_there():
    assert [path.stem for path in NOTEBOOKS] == [*SHOWS, OWN]


@each_page
def test_opens_with_the_question_and_closes_with_what_was_found(path):
    notebook = nbformat.read(path, as_version=4)
    first, *texts = [c.source for c in cells(path, "markdown")]
    assert re.match(r"# .+\?\n\n", first)  # the title asks
    assert "paper" in first and "Section" in first
    headings = [m for text in texts for m in re.findall(r"^#+ .+", text, re.M)]
    assert headings[-1] == "## What was found"
    assert all(heading.startswith("## ") for heading in headings)
    assert "findings." in notebook.cells[-1].source
    assert notebook.cells[-1].cell_type == "code"


@each
def test_every_parameter_is_used_and_explained(path):
    code = "\n".join(
        c.source for c in cells(path, "code") if "parameters" not in c.metadata.get("tags", [])
    )
    read = {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}
    prose = "\n".join(c.source for c in cells(path, "markdown"))
    for name in parameter_defaults(path):
        assert name in read, f"{name} is not used"
        assert name == "profile" or f"`{name}`" in prose, f"{name} is not explained"


BAD = {
    "profile": [3, "", None, True], "data_folder": [1, None], "query_set": [2019, ""], "first": ["abc", -1, None, 1.5],
    "seed": ["abc", 1.5, -1, True], "seeds": ["a", 1.5, ""], "triples": ["abc", 0, 1.5], "window": ["abc", 0],
    "patience": ["abc", 0], "draws": ["abc", 0], "learning_rate": ["abc", 0, float("nan")], "encoder": [3, ""],
    "source": [2024, "", None], "output": [2024, ""], "model": [3, ""],
    "epsilon": ["abc", float("nan"), None], "target": ["abc", "", float("nan"), True, None],
}  # fmt: skip


@each
def test_first_cell_names_a_parameter_of_the_wrong_kind(path):
    """What papermill makes of `-p source 2024` or `-p triples abc`."""
    parameters, first, *_ = (c.source for c in cells(path, "code"))
    defaults = parameter_defaults(path)
    assert set(defaults) <= set(PARAMETERS)
    check_parameters(defaults)
    for name in defaults:
        for value in BAD[name]:
            variables: dict[str, object] = {}
            exec(parameters, variables)
            variables[name] = value
            with pytest.raises(
                ParameterError, match=rf"^{name} is {re.escape(repr(value))}; expected "
            ):
                exec(first, variables)


def test_good_parameters_pass_and_text_that_looks_like_a_number_has_a_way_out():
    good = {
        "profile": "my.yaml", "data_folder": "", "query_set": None, "first": 0, "seed": 0, "seeds": "1,2", "triples": 1,
        "window": 3, "patience": None, "draws": 5, "learning_rate": 1, "encoder": None, "source": "2024", "output": "o",
        "model": "m", "target": 0,
    }  # fmt: skip
    for values in (
        good,
        {"seeds": 3},
        {"target": "adaptive"},
        {"learning_rate": 1e-5},
        {"other": 1},
    ):
        check_parameters(values)
    with pytest.raises(ParameterError, match="2024 as text with -r"):
        check_parameters({"source": 2024})


def test_unknown_profile_in_the_first_cell():
    _, first, *_ = (c.source for c in cells(NOTEBOOKS[1], "code"))
    values = {**parameter_defaults(NOTEBOOKS[1]), "profile": "latpop"}
    with pytest.raises(ProfileError, match=r"'latpop': known are .*laptop"):
        exec(first, values)


@each_page
def test_code_is_calls(path):
    """Anything that computes belongs in the library; long lines do not fit the page."""
    for cell in cells(path, "code"):
        tree = ast.parse(cell.source)
        forbidden = (ast.For, ast.While, ast.If, ast.FunctionDef, ast.ClassDef, ast.BinOp)
        found = [n for n in ast.walk(tree) if isinstance(n, forbidden)]
        assert all(isinstance(n, ast.BinOp) and isinstance(n.op, ast.Add) for n in found)
        assert max(map(len, cell.source.splitlines())) <= 84, cell.id
        assert len(tree.body) <= 9


@each_page
def test_shows_and_saves_its_figures_and_tables(path):
    code = {c.id: c for c in cells(path, "code")}
    prose = "\n".join(c.source for c in cells(path, "markdown"))
    names = []
    for name in SHOWS[path.stem]:
        cell = code[name]
        assert f"reproduction.{name}()" in cell.source
        assert f'data_folder, "{name}")' in cell.source
        assert f"(../book/_executed/data/{name}.csv)" in prose
        kind, number = name[:-1].capitalize(), name[-1]
        assert re.search(rf"{kind}s? (\d, )?{number}|\*\*{kind} {number}\*\*", prose)
        if name.startswith("table"):
            continue
        figure = cell.metadata["mystnb"]["figure"]
        assert figure["caption"].startswith(f"Paper Figure {number}, ")
        numbers = re.sub(rf"Paper Figure {number}", "", figure["caption"])
        assert not re.search(r"\d", numbers)  # they are in the text that is computed
        names.append(figure["name"])
        assert len(cell.metadata["mystnb"]["image"]["alt"]) > 80
    assert len(set(names)) == len(names)


@each
def test_links_name_files_of_the_repository(path):
    contents = (ROOT / "book" / "_toc.yml").read_text()
    for target in re.findall(r"\]\(([^)#]+)", "\n".join(c.source for c in cells(path, "markdown"))):
        name = target.removeprefix("../book/")
        if name.startswith("_executed/data/"):
            continue  # test_book.py
        if name.startswith("_executed/"):
            assert f"file: {name.removesuffix('.md')}\n" in contents
        else:
            assert (path.parent / target).is_file(), target


def papermill(folder: Path, home: Path, notebook: str, **parameters: object) -> str:
    """Run the command from ``folder``; returns what it said."""
    options = [str(x) for key, value in parameters.items() for x in ("-p", key, value)]
    done = subprocess.run(
        [sys.executable, "-m", "papermill", str(ROOT / "notebooks" / f"{notebook}.ipynb"), "out.ipynb", *options],
        cwd=folder, env={**os.environ, "ADAPTIVE_MARGINS_HOME": str(home)}, capture_output=True, text=True, timeout=280,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


def errors(path: Path) -> str:
    """What the cells of an executed notebook wrote to stderr."""
    notebook = nbformat.read(path, as_version=4)
    return "".join(
        o.text
        for c in notebook.cells
        for o in c.get("outputs", [])
        if o.output_type == "stream" and o.name == "stderr"
    )


def runs(home: Path) -> dict[str, int]:
    return {
        p.name: (p / "result.json").stat().st_mtime_ns
        for p in (home / "runs").iterdir()
        if not p.name.startswith(".")
    }


@pytest.mark.slow
def test_papermill_from_any_folder_reads_what_is_there_and_makes_what_is_not(smoke_home, tmp_path):
    home = tmp_path / "home"
    for name in ("runs", "collections", "cache"):
        shutil.copytree(smoke_home / name, home / name)
    before = runs(home)
    data = tmp_path / "data"
    papermill(tmp_path, home, "03_adaptive_targets", profile="smoke", data_folder=data)
    assert runs(home) == before  # nothing was trained
    assert "triples:" not in errors(tmp_path / "out.ipynb")
    ours = pd.read_csv(data / "figure4.csv")
    pd.testing.assert_frame_equal(
        ours, pd.read_csv(smoke_home / "book" / "_executed" / "data" / "figure4.csv")
    )

    papermill(tmp_path, home, "03_adaptive_targets", profile="smoke", data_folder=data, seed=9)
    after = runs(home)
    assert {name: after[name] for name in before} == before  # those that were there are left alone
    other = pd.read_csv(data / "figure4.csv")
    assert set(other["seed"]) == {9}
    assert set(after) - set(before) == set(other["run_id"])  # only the figure's own runs are new
    assert "triples:" in errors(tmp_path / "out.ipynb")  # a line per run
    start, end = (f[f["triples"] == 0].reset_index(drop=True) for f in (ours, other))
    assert (start["value"] == end["value"]).all()  # step 0 is the same encoder
    assert not (ours["value"] == other["value"]).all()
