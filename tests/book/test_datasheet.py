import dataclasses
import importlib.metadata
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from bs4 import BeautifulSoup

from adaptive_margins.book.datasheet import datasheet, page
from adaptive_margins.data.collection import Collection, Texts

# What MyST, Sphinx, HTML and tables could trip over.
HOSTILE = "a | b {doc}`nowhere` [x](y.md) ``` :::{note} $x_1$ # h %c <b>&amp;</b> </table> [^1] {{ s }} *a* \\("


def small() -> Collection:
    return Collection(
        name="PyDocs",
        passages=Texts(
            ["d1", "d2", "d3", "d4"],
            [HOSTILE, "second text of five words", "third of three", "alone"],
        ),
        queries={
            "test1": Texts(["q3"], ["compute the fast fourier transform of real signals"]),
            "train": Texts(
                ["q1", "q2"], ["compute a fast fourier transform of signals", f"what is {HOSTILE}"]
            ),
        },
        qrels={
            "test1": {"q3": {"d3": 3, "d4": 2}},
            "train": {"q1": {"d2": 3}, "q2": {"d1": 3, "d2": 1}},
        },
        sources={"python": "3.11.7", "numpy": "2.4.6", "no-such-distribution": "1.0"},
        triples=[("q1", "d2", "d3"), ("q2", "d1", "d4"), ("q1", "d2", "d4")],
    )


CANDIDATES = {"test1": {"q3": {"d1": 2.0, "d4": 1.0}}}
BM25 = {"test1": {"nDCG@10": 0.12345, "Success(rel=2)@5": 1.0}}


def sheet() -> str:
    return datasheet(small(), CANDIDATES, BM25)


def test_the_numbers_are_those_of_the_arguments() -> None:
    text = sheet()
    assert text.startswith("# The collection: PyDocs\n")
    assert f"`{small().fingerprint}`" in text
    assert "4 passages and 3 queries." in text
    counts, lengths, grades = re.findall(r"(?:^\|.*\n)+", text, re.M)[:3]
    assert "| train | 2 | 3 | 2 |" in counts
    assert "| test1 | 1 | 2 | 2 |" in counts
    assert "| passages | 7.0 | 1 | 2 | 4 | 8 | 19 |" in lengths
    assert "| queries, train | 14.0 | 7 | 10 | 14 | 18 | 21 |" in lengths
    assert "| set | grade 3 | grade 2 | grade 1 | queries with several of grade ≥ 2 |" in grades
    assert "| train | 2 | 0 | 1 | 0 |" in grades
    assert "| test1 | 1 | 1 | 0 | 1 |" in grades
    assert "| set | with a relevant candidate | nDCG@10 | Hits@5 |" in text
    assert "| test1 | 1.000 | 0.123 | 1.000 |" in text
    assert "3 triples of 2 queries, 2 different positives (3 of grade 3) and 2 different" in text
    assert "similarity of 0.83" in text  # compute fast fourier transform signal, and real


def test_licences_are_those_of_the_installed_distributions() -> None:
    text = sheet()
    expression = importlib.metadata.metadata("numpy")["License-Expression"]
    assert f"| numpy | 2.4.6 | {expression} |" in text
    assert "| no-such-distribution | 1.0 | not recorded |" in text
    assert "| Python (its standard library, where chosen) | 3.11.7 | PSF-2.0 |" in text


def test_without_triples_candidates_or_a_second_set() -> None:
    one = dataclasses.replace(
        small(),
        name="MS MARCO",
        queries={"dev": small().queries["test1"]},
        qrels={"dev": small().qrels["test1"]},
        triples=[],
    )
    text = datasheet(one, {}, {})
    assert text.startswith("# The collection: MS MARCO\n")
    assert "There are none." in text and "docstring" not in text
    assert "are not distributed with this book" in text
    again = datasheet(dataclasses.replace(one, name="PyDocs"), {}, {})
    assert "No two queries of different sets" in again


def test_the_page_of_a_profile() -> None:
    class Result:
        result = {  # noqa: RUF012
            "rerank": {"test1": {"mean": {"nDCG@10": 0.12345}}},
            "full": {"test1": {"mean": {"nDCG@10": 0.12345, "R(rel=2)@20": 0.5}}},
        }

    class Opened:
        collection = small()
        evaluated_sets = ("test1",)
        profile = SimpleNamespace(candidates=SimpleNamespace(source="bm25"))

        def bm25_run(self) -> str:
            return "bm25"

        def ensure(self, configs: list[str]) -> list[type[Result]]:
            assert configs == ["bm25"]
            return [Result]

        def top_candidates(self, name: str) -> dict:
            return CANDIDATES[name]

    text = page(Opened())  # type: ignore[arg-type]
    assert text == datasheet(
        small(), CANDIDATES, {"test1": {"nDCG@10": 0.12345, "R(rel=2)@20": 0.5}}
    )


def test_it_builds_strictly_and_shows_the_texts_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(__file__).parents[2]
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(root / "book" / "references.bib", source)
    (source / "conf.py").write_text(
        "extensions = ['myst_parser', 'sphinxcontrib.bibtex']\n"
        "bibtex_bibfiles = ['references.bib']\n"
        "bibtex_reference_style = 'author_year'\n"
        "myst_enable_extensions = ['amsmath', 'attrs_block', 'attrs_inline', 'colon_fence',"
        " 'deflist', 'dollarmath', 'html_image', 'linkify', 'replacements', 'smartquotes',"
        " 'substitution', 'tasklist']\n"
    )
    (source / "index.md").write_text(sheet() + "\n```{bibliography}\n:all:\n```\n")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "sphinx", "-n", "-W", "--keep-going", "-q", "-b", "html"]
    built = subprocess.run([*command, source, out], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    shown = BeautifulSoup((out / "index.html").read_text(), "html.parser")
    tables = shown.find_all("table")
    cells = [cell.get_text() for table in tables for cell in table.find_all("td")]
    assert HOSTILE in cells and f"what is {HOSTILE}" in cells
    for table in tables:
        widths = {len(row.find_all(["td", "th"])) for row in table.find_all("tr")}
        assert len(widths) == 1
