"""The names of ``import adaptive_margins``."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import adaptive_margins
from conftest import ROOT


@pytest.mark.parametrize("name", adaptive_margins.__all__)
def test_a_public_name_is_that_of_its_module(name):
    found = getattr(adaptive_margins, name)
    assert getattr(found, "__doc__", None)
    home = getattr(found, "__module__", found.__name__)
    assert home.startswith("adaptive_margins.")
    if home != found.__name__:
        assert getattr(sys.modules[home], name) is found


def test_type_checkers_see_the_names_of_python():
    tree = ast.parse(Path(adaptive_margins.__file__).read_text("utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    assert {alias.asname for node in block.body for alias in node.names} == {
        *adaptive_margins.__all__
    }
    assert dir(adaptive_margins) == sorted([*adaptive_margins.__all__, "__version__"])


def test_the_api_page_has_every_name():
    page = (ROOT / "book" / "api.md").read_text("utf-8")
    shown = re.findall(r"\.\. auto\w+:: (?:adaptive_margins\.)?([\w.]+)", page)
    assert {name.split(".")[0] for name in shown} == {*adaptive_margins.__all__}


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(adaptive_margins, "no_such_name")


def test_the_import_loads_nothing_outside_the_standard_library():
    program = (
        "import json, sys; before = set(sys.modules); import adaptive_margins;"
        "found = {m.split('.')[0] for m in set(sys.modules) - before};"
        "print(json.dumps(sorted(found - sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert json.loads(done.stdout) == ["adaptive_margins"]
