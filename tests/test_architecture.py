"""A module imports only from those left of it.

losses → data → encoder → retrieval → evaluation → training → paper → book → corpus → cli: `ORDER` and `DATA` have all of them.
"""

from __future__ import annotations

import ast
import functools
import importlib
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import adaptive_margins
from conftest import in_child

PACKAGE = Path(adaptive_margins.__file__).parent
ORDER = [
    "errors", "markup", "distributed", "losses", "cached_loss", "device", "processes", "ray_tasks", "profiles", "progress", "files", "text_tables", "data", "encoder",
    "retrieval", "evaluation", "runs", "teachers", "topics", "checkpoints", "training_step", "training", "paper", "book", "corpus",
    "terminal", "cli_corpus", "cli",
]  # fmt: skip
DATA = [
    "words", "text", "trec", "collection", "stored", "triples", "mining", "pseudo_queries", "docstrings", "pydocs",
    "folder", "ir_datasets", "converted", "splits", "sources",
]  # fmt: skip


def name_of(path: Path) -> str:
    parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(p for p in parts if p != "__init__")


@functools.cache
def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text("utf-8"))))


@functools.cache
def imported(path: Path) -> set[str]:
    """Full names of all modules, and of all names in modules, that a file imports, wherever in it."""
    found = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:  # from . import x: level 1 is the file's own package
                base = ["adaptive_margins", *path.relative_to(PACKAGE).parts][: -node.level]
                module = ".".join([*base, module]).strip(".")
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def imports(path: Path) -> set[str]:
    """The modules of this package that a file imports."""
    ours = {name for name in imported(path) if name.startswith("adaptive_margins.")}
    return {name.removeprefix("adaptive_margins.") for name in ours} & MODULES.keys()


MODULES: dict[str, Path] = {name_of(path): path for path in PACKAGE.rglob("*.py")}


def test_every_module_has_a_place():
    assert {name.split(".")[0] for name in MODULES if name} == set(ORDER)


def test_every_module_is_listed_for_contributors():
    text = (PACKAGE.parents[1] / "CONTRIBUTING.md").read_text("utf-8")
    rows = "".join(line for line in text.splitlines() if line.startswith("| `"))
    for path in PACKAGE.iterdir():
        name = f"{path.name}/" if path.is_dir() else path.name
        assert name in ("__pycache__/", "py.typed") or f"`{name}`" in rows, name


def test_modules_import_from_the_left():
    for name, path in MODULES.items():
        if not name:  # the public names, which are imported when they are used
            continue
        part = name.split(".")[0]
        for other in imports(path):
            theirs = other.split(".")[0]
            if theirs != part:
                assert ORDER.index(theirs) < ORDER.index(part), f"{name} imports {other}"
            elif part == "data" and "." in other and "." in name:
                assert DATA.index(other.split(".")[1]) < DATA.index(name.split(".")[1]), name


def test_there_is_no_circle():
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " → ".join((*path, name))
        if name in done:
            return
        for other in imports(MODULES[name]) - {name}:
            visit(other, (*path, name))
        done.add(name)

    for name in filter(None, MODULES):
        visit(name, ())


def test_nothing_reaches_into_notebooks_tests_or_benchmarks():
    for path in MODULES.values():
        tops = {name.split(".")[0] for name in imported(path)}
        assert not tops & {"notebooks", "tests", "benchmarks", "conftest"}, path


def printed_by(program: str, folder: Path | None = None) -> list[str]:
    """The lines that a program prints, in a process of its own."""
    command = [sys.executable, "-c", textwrap.dedent(program)]
    return subprocess.check_output(command, text=True, cwd=folder).splitlines()


def test_light_parts_stay_light():
    """The loss needs torch alone; profiles and measures need no torch; the command's help needs neither.

    A notebook whose runs are finished starts seconds sooner without what only training needs.
    """
    program = """
        import json, sys
        training = ["transformers", "sentence_transformers", "datasets", "sklearn", "statsmodels"]
        heavy = ["torch", *training, "faiss", "pandas", "matplotlib"]
        found = {}
        import adaptive_margins.cli
        found["cli"] = [m for m in heavy if m in sys.modules]
        import adaptive_margins.profiles.load
        adaptive_margins.profiles.load.available()
        found["profiles"] = [m for m in heavy if m in sys.modules]
        import adaptive_margins.evaluation, adaptive_margins.evaluation.external_runs
        found["runs"] = [m for m in heavy if m in sys.modules]
        import adaptive_margins.losses
        found["losses"] = [m for m in heavy if m in sys.modules]
        from adaptive_margins import paper
        paper.open("laptop").experiments
        found["paper"] = [m for m in training if m in sys.modules]
        print(json.dumps(found))
    """
    assert json.loads(*printed_by(program)) == {
        "cli": [], "profiles": [], "runs": [], "losses": ["torch"], "paper": [],
    }  # fmt: skip


def test_compare_imports_nothing_heavy(tmp_path):
    """A comparison of two runs is to take about a second; each of these takes a good part of one."""
    (tmp_path / "qrels.txt").write_text("".join(f"{q} 0 d{q} 1\n" for q in range(5)))
    for name in "ab":
        hits = "".join(f"{q} Q0 d{d} 1 {-d} x\n" for q in range(5) for d in range(10))
        (tmp_path / f"{name}.run").write_text(hits)
    program = """
        import json, sys
        from adaptive_margins import cli
        sys.argv = ["adaptive-margins", "compare", "--qrels", "qrels.txt", "a.run", "b.run"]
        try:
            cli.main()
        except SystemExit as end:
            assert not end.code, end.code
        heavy = ["scipy.stats", "statsmodels", "pandas", "pyarrow", "datasets", "torch", "transformers",
                 "sentence_transformers", "faiss", "bm25s", "sklearn", "matplotlib", "ir_datasets", "ranx"]
        print(json.dumps([m for m in heavy if m in sys.modules]))
    """
    *told, loaded = printed_by(program, tmp_path)
    assert json.loads(loaded) == []
    assert told[0].split()[:2] == ["run", "mean"]


def test_no_module_needs_what_windows_and_macos_lack():
    """Every module is imported where the modules of POSIX alone and Linux's names of `os` are missing."""
    # Packages that have a way without them, on Windows, where `sys.platform` is another.
    for name in (
        "IPython", "bm25s", "datasets", "faiss", "filelock", "ir_datasets", "ir_measures", "jupyter_client", "matplotlib",
        "multiprocessing.popen_spawn_posix", "nbclient", "papermill", "psutil", "sentence_transformers",
    ):  # fmt: skip
        importlib.import_module(name)

    def imported() -> None:  # in a process that has imported everything else
        for name in [name for name in sys.modules if name.startswith("adaptive_margins")]:
            del sys.modules[name]
        for name in ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty"):
            sys.modules[name] = None
        lacking = "fork posix_fallocate sched_setaffinity sched_getaffinity getuid mkfifo"
        for name in lacking.split():
            if hasattr(os, name):
                delattr(os, name)
        for name in MODULES:
            importlib.import_module(f"adaptive_margins.{name}".rstrip("."))

    assert in_child(imported) == ""


def test_what_is_for_speed_alone_has_a_door():
    """Other modules use these names of it, and none knows how texts are packed."""
    doors = {
        "encoder.speed": {"adapt", "batcher", "default_chunks", "register", "tokens_within"},
        "encoder.frozen": {"LoadedEncoder", "for_training"},
    }
    for name, path in MODULES.items():
        text = path.read_text("utf-8")
        if name == "encoder.speed":
            continue
        assert "cu_seq_lens" not in text and "position_ids" not in text, name
        for node in nodes(path):
            if isinstance(node, ast.ImportFrom) and node.module:
                allowed = doors.get(node.module.removeprefix("adaptive_margins."))
                assert allowed is None or {alias.name for alias in node.names} <= allowed, name
