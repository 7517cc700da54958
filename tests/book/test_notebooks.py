"""The committed notebooks: their cells, and one executed by papermill on finished runs and with
other values.

The one for a custom corpus is no page of the book, and executed in test_explore.py.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest

import warm
from adaptive_margins.book import context
from adaptive_margins.book.claims import CHAPTERS, rules
from adaptive_margins.book.context import PARAMETERS, ParameterError, check_parameters
from adaptive_margins.book.execute import parameter_defaults
from adaptive_margins.book.pages import OWN
from adaptive_margins.profiles.load import ProfileError, load_profile
from conftest import linked

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
    "08_out_of_domain": [],
    "09_beyond_the_paper": [],
    "11_at_convergence": [],
}
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
PAGES = [p for p in NOTEBOOKS if p.stem != OWN]
each_page = pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)


def cells(path: Path, kind: str) -> list[nbformat.NotebookNode]:
    return [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == kind]


def test_all_are_there():
    assert [path.stem for path in NOTEBOOKS] == sorted([*SHOWS, OWN])


@each
def test_every_parameter_is_used_and_explained(path):
    code = "\n".join(
        c.source for c in cells(path, "code") if "parameters" not in c.metadata.get("tags", [])
    )
    read = {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}
    prose = "\n".join(c.source for c in cells(path, "markdown"))
    lines = next(c.source for c in cells(path, "code")).splitlines()
    for name in parameter_defaults(path):
        assert name in read, f"{name} is not used"
        explained = any(re.match(rf"{name} = .+  # \S", line) for line in lines)
        assert explained or f"`{name}`" in prose, f"{name} is not explained"


BAD = {
    "profile": [3, "", None, True], "data_folder": [1, None], "folder": [1, None], "query_set": [2019, ""], "first": ["abc", -1, None, 1.5],
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
            with pytest.raises(ParameterError, match=rf"^{name} is {re.escape(repr(value))}; "):
                exec(first, variables)


def test_good_parameters_pass_and_text_that_looks_like_a_number_has_a_way_out():
    good = {
        "profile": "my.yaml", "data_folder": "", "folder": "", "query_set": None, "first": 0, "seed": 0, "seeds": "1,2", "triples": 1,
        "window": 3, "patience": None, "draws": 5, "learning_rate": 1, "encoder": None, "source": "2024", "output": "o",
        "model": "m", "target": 0, "epsilon": 0,
    }  # fmt: skip
    for values in (good, {"seeds": 3}, {"target": "adaptive"}, {"learning_rate": 1e-5}, {"x": 1}):
        check_parameters(values)
    with pytest.raises(ParameterError, match="2024 as text with -r"):
        check_parameters({"source": 2024})


def set_up(profile: str, **values) -> dict[str, str]:
    """Parts of the set-up with a collection that has two queries, of which one is judged."""
    sets = ("validation", "TREC-DL19", "TREC-DL20")
    some = {"name": "C", "passages": [], "triples": []}
    some["queries"] = {name: ["q1", "q2"] for name in sets}
    some["qrels"] = {name: {"q1": {"d": 1}} for name in sets}
    inputs = SimpleNamespace(collection=SimpleNamespace(**some))
    made = SimpleNamespace(profile=load_profile(profile, **values), inputs=inputs)
    return context.setup(made).data["Here"].to_dict()


def test_the_set_up_has_what_the_runs_have():
    found = set_up("released", static__seeds={"mpnet": [2]})
    assert "MPNet with seeds 166613, 2" in found["Static"]
    assert found["Tuning"] == "TREC-DL19, 1 judged queries"
    found = set_up("paper-night")
    assert found["Static"] == "distilBERT: ε = 0.2, in-batch 0.2"
    assert "static in-batch: 2,240,000 triples" in found["Comparison"]


def test_links_lead_to_the_files(tmp_path):
    frame = pd.DataFrame({"a": [1]})
    for folder, link in (
        (tmp_path / "my data", "my%20data/x.csv)"),
        (tmp_path / "_executed" / ".data-01", "(../book/_executed/data/x.csv)"),
    ):
        assert link in context.save(folder, x=frame).data and (folder / "x.csv").is_file()


def test_unknown_profile_in_the_first_cell():
    _, first, *_ = (c.source for c in cells(NOTEBOOKS[1], "code"))
    values = {**parameter_defaults(NOTEBOOKS[1]), "profile": "latpop"}
    with pytest.raises(ProfileError, match=r"'latpop': known are .*laptop"):
        exec(first, values)


@each
def test_what_a_reader_is_to_run_is_not_run_by_the_build(path):
    """Only a cell that trains beyond the profile's runs is skipped, and it comes last."""
    *others, last = cells(path, "code")
    assert not [c.id for c in others if "skip-execution" in c.metadata.get("tags", [])]
    if "skip-execution" in last.metadata.get("tags", []):
        assert "reproduction.train(" in last.source
        compile(last.source, last.id, "exec")


@each_page
def test_shows_and_saves_its_figures_and_tables(path):
    code = {c.id: c for c in cells(path, "code")}
    every = "\n".join(c.source for c in code.values())
    for section in (number for number, notebook in CHAPTERS.items() if notebook == path.stem):
        assert f'claims.table("{section}", ' in every
        assert f"claims_{section.replace('.', '_')}=" in every
        assert {r.shows for r in rules() if r.section == section} <= {*SHOWS[path.stem], "equivalence"}  # fmt: skip
    prose = "\n".join(c.source for c in cells(path, "markdown"))
    for name in SHOWS[path.stem]:
        assert f"= reproduction.{name}(" in every
        assert re.search(rf"context\.save\([^)]*\b{name}=", every)
        kind, number = name[:-1].capitalize(), name[-1]
        assert re.search(rf"{kind}s? (\d, )?{number}|\*\*{kind} {number}\*\*", prose)
        if name.startswith("figure"):
            caption = code[name].metadata["mystnb"]["figure"]["caption"]
            assert caption.startswith(f"Paper Figure {number}, ")
            # Numbers are in the text that is computed.
            words = caption.removeprefix(f"Paper Figure {number}").replace("BM25", "")
            assert not re.search(r"\d", words)
    figures = [c for c in code.values() if "figure" in c.metadata.get("mystnb", {})]
    names = [c.metadata["mystnb"]["figure"]["name"] for c in figures]
    assert len(set(names)) == len(names)
    for cell in figures:  # what `shown` draws has words of its own
        alt = cell.metadata["mystnb"].get("image", {}).get("alt", "")
        assert len(alt) > 80 or "shown.figure(" in cell.source


@each
def test_links_name_files_of_the_repository(path):
    contents = (ROOT / "book" / "_toc.yml").read_text()
    for target in re.findall(r"\]\(([^)#]+)", "\n".join(c.source for c in cells(path, "markdown"))):
        name = target.removeprefix("../book/")
        if name.startswith("_executed/data/"):
            continue  # test_book.py
        if name.startswith("_executed/"):
            assert f"file: {Path(name).stem}\n" in contents
        else:
            assert (path.parent / target).is_file(), target


def runs(home: Path) -> dict[str, int]:
    return {
        p.name: (p / "result.json").stat().st_mtime_ns
        for p in (home / "runs").iterdir()
        if not p.name.startswith(".")
    }


@pytest.mark.slow
def test_papermill_from_any_folder_reads_what_is_there_and_trains_what_is_not(smoke_home, tmp_path):
    home = linked(smoke_home, tmp_path / "home", "runs", "collections", "cache")
    before = runs(home)
    data = tmp_path / "data"
    ours = pd.read_csv(smoke_home / "book" / "_executed" / "data" / "figure4.csv")
    parameters = ["-p", "profile", "smoke", "-p", "data_folder", data, "-p", "seed", "9"]
    done = subprocess.run(
        [sys.executable, warm.__file__, "-m", "papermill", ROOT / "notebooks" / "03_adaptive_targets.ipynb", "out.ipynb", *parameters],
        cwd=tmp_path, env={**os.environ, "ADAPTIVE_MARGINS_HOME": str(home)}, capture_output=True, text=True,
        timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    after = runs(home)
    assert {name: after[name] for name in before} == before  # those that were there are left alone
    other = pd.read_csv(data / "figure4.csv")
    assert set(other["seed"]) == {9}
    assert set(after) - set(before) == set(other["run_id"])  # only the figure's own runs are new
    start, end = (f[f["triples"] == 0].reset_index(drop=True) for f in (ours, other))
    assert (start["value"] == end["value"]).all()  # step 0 is the same encoder
    assert not (ours["value"] == other["value"]).all()
