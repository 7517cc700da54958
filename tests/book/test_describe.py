"""The description of a collection: facts, text, and the data sheet as Markdown and as a page."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from bs4 import BeautifulSoup

import warm
from adaptive_margins.book import describe
from adaptive_margins.book.describe import collection_facts, collection_page, datasheet, facts_text
from adaptive_margins.data.collection import Collection, Texts
from adaptive_margins.data.triples import Checked
from adaptive_margins.evaluation.measures import evaluate
from adaptive_margins.retrieval.bm25 import BM25

ROOT = Path(__file__).parents[2]
# What MyST, Sphinx, HTML and tables could trip over.
HOSTILE = (
    "a | b <script>alert(1)</script> {doc}`nowhere` [x](y.md) ``` :::{note} $x_1$ # h %c <!-- c --> <b>&amp;</b>"
    " </table> [^1] {{ s }} *a* \\("
)
PYDOCS = Collection(
    name="PyDocs",
    passages=Texts(["d1", "d2", "d3", "d4"], [HOSTILE, "second text of five words", "third of three", "alone"]),
    queries={
        "test1": Texts(["q3"], ["compute the fast fourier transform of real signals"]),
        "train": Texts(["q1", "q2"], ["compute a fast fourier transform of signals", f"what is {HOSTILE}"]),
    },
    qrels={"test1": {"q3": {"d3": 3, "d4": 2}}, "train": {"q1": {"d2": 3}, "q2": {"d1": 3, "d2": 1}}},
    sources={"python": "3.11.7", "numpy": "2.4.6", "no-such-distribution": "1.0"},
    triples=[("q1", "d2", "d3"), ("q2", "d1", "d4"), ("q1", "d2", "d4")],
)  # fmt: skip
CANDIDATES = {"test1": {"q3": {"d1": 2.0, "d4": 1.0}}}
SCORES = {"test1": {"nDCG@10": 0.12345, "Success(rel=2)@5": 1.0}}


def small(**changes: object) -> Collection:
    parts: dict = {
        "name": "small",
        "passages": Texts(["d1", "d2", "d3", "d4"], [f"the wing {HOSTILE}", "a flow over the wing", "", "heat"]),
        "queries": {
            "train": Texts(["t1", "t2"], ["wing flow", "a cold wing"]),
            "test": Texts(["q1", "q2", "q3"], ["flow of heat", "heat", "not judged"]),
        },
        "qrels": {"train": {"t1": {"d2": 1}}, "test": {"q1": {"d2": 2, "d4": 0}, "q2": {"d1": 1}}},
        "sources": {"layout": "TREC"},
        "triples": [("t1", "d2", "d1")],
    }  # fmt: skip
    return Collection(**{**parts, **changes})


def markdown_rows(text: str) -> dict[str, list[str]]:
    """First cell of each row of a Markdown table → the others; later tables add to earlier ones."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith("|"):
            first, *others = (cell.strip() for cell in line.strip("|").split("|"))
            found.setdefault(first.replace("\\", ""), []).extend(others)
    return found


def shown(collection: Collection, runs: Any = None) -> BeautifulSoup:
    page = collection_page(collection, collection_facts(collection, runs))
    assert page.startswith("<!DOCTYPE html>") and page.endswith("</html>\n")
    # Nothing from elsewhere, nothing that runs, nothing that Markdown or docutils stumbled over.
    soup = BeautifulSoup(page, "html.parser")
    assert not soup.find_all(["script", "link", "img", "iframe", "object"])
    assert not re.search(r"url\(|@import|system-message|problematic|\{cite", page)
    assert not [tag for tag in soup.find_all(href=True) if not tag["href"].startswith("#")]
    for table in soup.find_all("table"):
        assert len({len(row.find_all(["td", "th"])) for row in table.find_all("tr")}) == 1
    return soup


def words(soup: BeautifulSoup) -> str:
    return " ".join(soup.get_text().split())


def cells(soup: BeautifulSoup, column: str) -> dict[str, dict[str, str]]:
    """The table that has a column of this name: first cell → header → cell."""
    for table in soup.find_all("table"):
        header, *rows = (
            [cell.get_text(strip=True) for cell in row.find_all(["th", "td"])]
            for row in table.find_all("tr")
        )
        if column in header:
            return {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    raise AssertionError(f"no table has a column {column!r}")


def test_numbers_of_the_books_data_sheet() -> None:
    text = datasheet(PYDOCS, collection_facts(PYDOCS), CANDIDATES, SCORES)
    assert text.startswith("# The collection: PyDocs\n")
    assert f"`{PYDOCS.fingerprint}`" in text and "{cite:t}`gebru2021`" in text
    assert "4 passages and 3 queries." in text and "3 triples of 2 queries" in text
    rows = markdown_rows(text)
    # queries, judgements, grades 3 to 1, passages of grade ≥ 2, queries with several; then BM25
    assert rows["train"] == ["2", "3", "2", "0", "1", "2", "0"]
    assert rows["test1"] == ["1", "2", "1", "1", "0", "2", "1", "1.000", "0.123", "1.000"]
    lengths = [len(text.split()) for text in PYDOCS.passages.texts]
    quantiles = [f"{q:.0f}" for q in np.quantile(lengths, [0, 0.25, 0.5, 0.75, 1])]
    assert rows["passages"] == [f"{np.mean(lengths):.1f}", *quantiles]
    assert "2 different positives (3 of grade 3)" in text
    assert re.search(r"similarity of\s0\.83", text)  # compute fast fourier transform signal; real
    licence = importlib.metadata.metadata("numpy")["License-Expression"]
    assert [x.replace("\\", "") for x in rows["numpy"]] == ["2.4.6", licence]
    assert rows["no-such-distribution"] == ["1.0", "not recorded"]
    other = dataclasses.replace(PYDOCS, name="MS MARCO", triples=[])
    text = datasheet(other, collection_facts(other), {}, {}, official=True)
    assert "There are none." in text and "docstring" not in text


def test_the_data_sheet_of_a_profile() -> None:
    stored = {
        "rerank": {"test1": {"mean": {"nDCG@10": 0.12345}}},
        "full": {"test1": {"mean": {"nDCG@10": 0.12345, "R(rel=2)@20": 0.5}}},
    }
    opened = SimpleNamespace(
        inputs=SimpleNamespace(
            collection=PYDOCS, evaluated_sets=("test1",), top_candidates=CANDIDATES.get
        ),
        profile=SimpleNamespace(
            candidates=SimpleNamespace(source="bm25"),
            measures=SimpleNamespace(rerank=["nDCG@10"], full=["nDCG@10", "R(rel=2)@20"]),
        ),
        bm25=lambda: SimpleNamespace(result=stored),
    )
    scores = {"test1": {"nDCG@10": 0.12345, "R(rel=2)@20": 0.5}}
    assert describe.profile_datasheet(opened) == datasheet(
        PYDOCS, collection_facts(PYDOCS), CANDIDATES, scores
    )  # type: ignore[arg-type]
    opened.profile.measures.full = ["nDCG@10", "R@20"]  # of binary judgements
    assert "grade ≥ 1)" in describe.profile_datasheet(opened)


@pytest.mark.usefixtures("warm_start")
def test_it_builds_strictly_and_shows_the_texts_as_they_are(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(ROOT / "book" / "references.bib", source)
    (source / "conf.py").write_text(
        "extensions = ['myst_parser', 'sphinxcontrib.bibtex']\n"
        "bibtex_bibfiles = ['references.bib']\nbibtex_reference_style = 'author_year'\n"
        "myst_enable_extensions = ['amsmath', 'attrs_block', 'attrs_inline', 'colon_fence',"
        " 'deflist', 'dollarmath', 'html_image', 'linkify', 'replacements', 'smartquotes',"
        " 'substitution', 'tasklist']\n"
    )
    text = datasheet(PYDOCS, collection_facts(PYDOCS), CANDIDATES, SCORES)
    (source / "index.md").write_text(text + "\n```{bibliography}\n:all:\n```\n")
    command = [sys.executable, warm.__file__, "-m", "sphinx", "-nWq", "--keep-going", "-b", "html"]
    built = subprocess.run([*command, source, tmp_path / "out"], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    soup = BeautifulSoup((tmp_path / "out" / "index.html").read_text(), "html.parser")
    found = [cell.get_text() for cell in soup.find_all("td")]
    assert HOSTILE in found and f"what is {HOSTILE}" in found


def test_the_page_shows_what_the_collection_holds() -> None:
    soup = shown(small())
    text = words(soup)
    assert [h.get_text() for h in soup.find_all("h1")] == ["The collection: small"]
    assert soup.title.get_text() == "Data sheet of small"
    assert small().fingerprint in text
    assert "4 passages and 5 queries. 1 of the passages have no text" in text
    assert "book" not in text and "docstring" not in text
    assert cells(soup, "judgements")["test"] == {
        "set": "test", "queries": "3", "judgements": "3", "grade 2": "1", "grade 1": "1", "grade 0": "1",
        "passages of grade ≥ 1": "2", "queries with several": "0",
    }  # fmt: skip
    assert cells(soup, "source")["layout"]["source"] == "TREC"
    assert "a flow over the wing" in [cell.get_text() for cell in soup.find_all("td")]
    assert "1 triples come with the collection" in text
    assert "A data sheet in the sense of Gebru et al. (2021)." in text
    assert "BM25 (Robertson and Zaragoza, 2009; Lù, 2024) in" in text
    assert text.index("Gebru et al. (2021). Datasheets") < text.index("Lù (2024).")
    assert "MS MARCO" not in text


def test_bm25_is_measured_on_the_judged_queries_that_are_not_trained_on(monkeypatch) -> None:
    scores = cells(shown(small()), "with a relevant candidate")
    run = BM25(small().passages).search(small().queries["test"], 100)
    measures = ["nDCG@10", "Success(rel=1)@10", "R(rel=1)@100"]
    expected = evaluate(small().qrels["test"], run, measures).mean
    assert scores == {"test": {
        "set": "test", "with a relevant candidate": "0.500", "nDCG@10": f"{expected['nDCG@10']:.3f}",
        "Hits@10": f"{expected['Success(rel=1)@10']:.3f}", "R@100": f"{expected['R(rel=1)@100']:.3f}",
    }}  # fmt: skip
    assert 0 < expected["nDCG@10"] < 1
    only = small(queries={"train": small().queries["train"]}, qrels={"train": {"t1": {"d2": 1}}})
    assert list(cells(shown(only), "with a relevant candidate")) == ["train"]
    monkeypatch.setattr(describe, "MOST_QUERIES", 1)
    soup = shown(small())
    assert "They are of 1 of the 2 queries with judgements of test" in words(soup)
    assert cells(soup, "with a relevant candidate")["test"]["R@100"] == "1.000"  # q1 alone


def test_texts_are_shown_as_they_are_and_long_ones_truncated() -> None:
    passages = Texts(["d1", "d2"], [HOSTILE + "\n\n# heading\n", "word " * 1000])
    queries, qrels = {"test": Texts(["q1"], [HOSTILE])}, {"test": {"q1": {"d1": 1, "d2": 0}}}
    name = "# 1. - x <script>alert(1)</script> a|b *c* [x](http://y.z) `d` $e$ {f} \\"
    soup = shown(small(name=name, sources={name: name}, passages=passages, queries=queries, qrels=qrels, triples=[]))  # fmt: skip
    assert soup.h1.get_text() == f"The collection: {name}"
    assert soup.title.get_text() == f"Data sheet of {name}"
    assert cells(soup, "source")[name]["source"] == name
    found = [cell.get_text() for cell in soup.find_all("td")]
    assert HOSTILE in found and f"{HOSTILE} # heading" in found
    assert any(t.endswith("word […]") and 900 < len(t) < 1010 for t in found)


def test_without_queries_triples_or_several_grades() -> None:
    text = words(shown(small(queries={}, qrels={}, triples=[])))
    assert "4 passages and 0 queries." in text and "The first passages." in text
    assert "No query is judged" in text and "There are none." in text
    binary = small(qrels={"train": {}, "test": {"q2": {"d4": 1}, "q1": {"d2": 1}}})
    text = words(shown(binary))
    assert text.index("flow of heat") < text.index("a flow over the wing")
    named = shown(small(name="PyDocs"))  # a folder of that name
    assert "docstring" not in named.get_text() and "grade ≥ 1" in named.get_text()
    assert "grade ≥ 2" in shown(dataclasses.replace(PYDOCS)).get_text()


def test_facts() -> None:
    facts = collection_facts(small())
    assert json.loads(json.dumps(facts)) == facts
    lengths = [len(text.split()) for text in small().passages.texts]
    test = {"queries": 3, "judged": 2, "relevant_queries": 2, "judgements": 3, "grades": {"2": 1, "1": 1, "0": 1}}  # fmt: skip
    assert facts == {
        "name": "small", "fingerprint": small().fingerprint, "sources": {"layout": "TREC"},
        "passages": 4, "empty_passages": 1, "bigram_passages": 0,
        "words": {"mean": np.mean(lengths), "median": np.median(lengths), "max": max(lengths)},
        "sets": {
            "train": {"queries": 2, "judged": 1, "relevant_queries": 1, "judgements": 1, "grades": {"1": 1}},
            "test": test,
        },
        "triples": 1, "triples_checked": dataclasses.asdict(Checked(checked=1)), "runs": {},
    }  # fmt: skip
    text = facts_text(facts)
    assert "4, of which 1 have no text" in text and "2: 1, 1: 1, 0: 1" in text
    assert "No queries." in facts_text(collection_facts(small(queries={}, qrels={}, triples=[])))
    qrels = {"train": {}, "test": {"q1": {"d1": 0, "d2": -1}, "q2": {"d1": 0}}}
    with pytest.warns(UserWarning, match="none of the 2 judged queries of 'test' has a relevant"):
        facts = collection_facts(small(qrels=qrels))
    assert [facts["sets"]["test"][k] for k in ("judged", "relevant_queries")] == [2, 0]


def test_runs_that_came_with_it() -> None:
    runs = {
        HOSTILE: {"q1": {"d2": 2.0, "d4": 3.0, "elsewhere": 1.0}, "q2": {"d3": 1.0}, "t1": {}},
        "other": {"of another collection": {"d1": 1.0}},
    }
    facts = collection_facts(small(), runs)
    expected = evaluate(small().qrels["test"], runs[HOSTILE], ["nDCG@10"]).mean["nDCG@10"]
    assert 0 < expected < 1
    assert facts["runs"] == {
        HOSTILE: {"set": "test", "queries": 2, "depth": 3, "unknown": 1, "nDCG@10": expected},
        "other": {"set": None, "queries": 0, "depth": 1, "unknown": 0, "nDCG@10": None},
    }
    listed = cells(shown(small(), runs), "Unknown hits")
    assert [listed[HOSTILE][c] for c in ("nDCG@10", "Set")] == [f"{expected:.4f}", "test"]
    assert listed["other"]["nDCG@10"] == "—" and f"{expected:.4f}" in facts_text(facts)


def test_text_without_spaces_and_queries_without_hits() -> None:
    one = small(
        passages=Texts(["d1", "d2", "d3", "d4"], ["企鹅生活在南极", "a flow", "", "ペンギン and flow"]),
        queries={"test": Texts(["q1", "q2"], ["企鹅吃什么", "C++"])},
        qrels={"test": {"q1": {"d1": 1}, "q2": {"d2": 1}}},
        triples=[],
    )  # fmt: skip
    soup = shown(one)
    assert cells(soup, "with a relevant candidate")["test"]["nDCG@10"] == "0.500"
    assert "2 of 4 passages" in words(soup) and "nothing for 1 of 2 queries of test" in words(soup)
    facts = collection_facts(one)
    assert facts["bigram_passages"] == 2 and "2 passages" in facts_text(facts)
    assert "bigrams" not in facts_text(collection_facts(small()))
    assert "bigrams" not in shown(small()).get_text()
