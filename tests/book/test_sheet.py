"""The data sheet of any collection as a page, as facts, and as text."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bs4 import BeautifulSoup

from adaptive_margins.book import sheet
from adaptive_margins.book.datasheet import datasheet
from adaptive_margins.book.sheet import collection_facts, collection_page, facts_text
from adaptive_margins.data.collection import Collection, Texts
from adaptive_margins.data.mining import Checked
from adaptive_margins.evaluation.measures import evaluate
from adaptive_margins.retrieval.bm25 import BM25

ROOT = Path(__file__).parents[2]
HOSTILE = "a | b <script>alert(1)</script> {doc}`x` [x](y.md) ``` :::{note} $x$ # h <!-- c --> </table> *a* \\( &amp;"


def small(**changes: object) -> Collection:
    parts: dict = {
        "name": "small",
        "passages": Texts(
            ["d1", "d2", "d3", "d4"], [f"the wing {HOSTILE}", "a flow over the wing", "", "heat"]
        ),
        "queries": {
            "train": Texts(["t1", "t2"], ["wing flow", "a cold wing"]),
            "test": Texts(["q1", "q2", "q3"], ["flow of heat", "heat", "not judged"]),
        },
        "qrels": {"train": {"t1": {"d2": 1}}, "test": {"q1": {"d2": 2, "d4": 0}, "q2": {"d1": 1}}},
        "sources": {"layout": "TREC"},
        "triples": [("t1", "d2", "d1")],
    }
    return Collection(**{**parts, **changes})


def shown(collection: Collection, **options: Any) -> BeautifulSoup:
    page = collection_page(collection, **options)
    assert page.startswith("<!DOCTYPE html>") and page.endswith("</html>\n")
    # Nothing from elsewhere, nothing that runs, nothing that Markdown or docutils stumbled over.
    soup = BeautifulSoup(page, "html.parser")
    assert not soup.find_all(["script", "link", "img", "iframe", "object"])
    assert not re.search(r"url\(|@import|system-message|problematic|\{cite", page)
    assert not [tag for tag in soup.find_all(href=True) if not tag["href"].startswith("#")]
    for table in soup.find_all("table"):
        assert len({len(row.find_all(["td", "th"])) for row in table.find_all("tr")}) == 1
    return soup


def cells(soup: BeautifulSoup, column: str) -> dict[str, dict[str, str]]:
    """The table that has a column of this name: first cell → header → cell."""
    for table in soup.find_all("table"):
        header, *rows = ([cell.get_text() for cell in row.find_all(["th", "td"])] for row in table.find_all("tr"))  # fmt: skip
        if column in header:
            return {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    raise AssertionError(f"no table has a column {column!r}")


def test_the_page_shows_what_the_collection_holds() -> None:
    soup = shown(small(), note="Of 5 queries, 3 are tested: *all* <b>of</b> them.")
    text = " ".join(soup.get_text().split())
    assert [h.get_text() for h in soup.find_all("h1")] == ["The collection: small"]
    assert soup.title.get_text() == "Data sheet of small"
    assert small().fingerprint in text
    assert "Of 5 queries, 3 are tested: *all* <b>of</b> them." in text
    assert "4 passages and 5 queries. 1 of the passages have no text" in text
    assert "when this page is built" in text and "book" not in text and "docstring" not in text
    counts = cells(soup, "judgements")
    assert counts["train"] == {"set": "train", "queries": "2", "judgements": "1", "passages of grade ≥ 1": "1"}  # fmt: skip
    assert counts["test"]["judgements"] == "3" and counts["test"]["passages of grade ≥ 1"] == "2"
    assert cells(soup, "grade 2")["test"]["grade 2"] == "1"
    assert cells(soup, "source")["layout"]["source"] == "TREC"
    examples = [cell.get_text() for cell in soup.find_all("td")]
    assert "a flow over the wing" in examples
    assert "1 triples of the collection's own" in text


def test_bm25_is_measured_on_the_judged_queries_that_are_not_trained_on() -> None:
    scores = cells(shown(small()), "with a relevant candidate")
    assert list(scores) == ["test"]
    bm25 = BM25(small().passages)
    run = bm25.search(small().queries["test"], 100)
    qrels = small().qrels["test"]
    expected = evaluate(qrels, run, ["nDCG@10", "Success(rel=1)@10", "R(rel=1)@100"]).mean
    assert scores["test"] == {
        "set": "test",
        "with a relevant candidate": "0.500",
        "nDCG@10": f"{expected['nDCG@10']:.3f}",
        "Hits@10": f"{expected['Success(rel=1)@10']:.3f}",
        "R@100": f"{expected['R(rel=1)@100']:.3f}",
    }
    assert 0 < expected["nDCG@10"] < 1
    only = small(queries={"train": small().queries["train"]}, qrels={"train": {"t1": {"d2": 1}}})
    assert list(cells(shown(only), "with a relevant candidate")) == ["train"]


def test_large_sets_are_measured_in_part_and_it_is_said(monkeypatch) -> None:
    monkeypatch.setattr(sheet, "MOST_QUERIES", 1)
    soup = shown(small())
    assert "They are of 1 of the 2 judged queries of test, at even distances." in soup.get_text()
    assert cells(soup, "with a relevant candidate")["test"]["R@100"] == "1.000"  # q1 alone


@pytest.mark.parametrize(
    "name", ["<script>alert(1)</script>", "a|b *c* [x](http://y.z) `d` $e$ {f}", "# 1. - x", "\\"]
)
def test_names_that_mean_something_in_markdown(name: str) -> None:
    soup = shown(small(name=name, sources={name: name}))
    assert soup.h1.get_text() == f"The collection: {name}"
    assert soup.title.get_text() == f"Data sheet of {name}"
    assert cells(soup, "source")[name]["source"] == name


def test_texts_are_shown_as_they_are_and_long_ones_cut() -> None:
    long = "word " * 1000
    qrels = {"test": {"q1": {"d1": 1, "d2": 0}}}
    one = small(
        passages=Texts(["d1", "d2"], [HOSTILE + "\n\n# heading\n", long]),
        queries={"test": Texts(["q1"], [HOSTILE])},
        qrels=qrels, triples=[],
    )  # fmt: skip
    found = [cell.get_text() for cell in shown(one).find_all("td")]
    assert HOSTILE in found and f"{HOSTILE} # heading" in found
    assert any(text.startswith("word word") and text.endswith("word […]") and len(text) < 1010 for text in found)  # fmt: skip


def test_without_queries_triples_or_several_grades() -> None:
    passages = shown(small(queries={}, qrels={}, triples=[]))
    text = passages.get_text()
    assert "4 passages and 0 queries." in text and "The first passages." in text
    assert "No query is judged, so there is nothing to score." in text
    assert "There are none." in text
    unjudged = shown(small(queries={"test": Texts(["q"], ["x"])}, qrels={"test": {}}, triples=[]))
    assert "No query is judged" in unjudged.get_text()
    binary = small(qrels={"train": {}, "test": {"q2": {"d4": 1}, "q1": {"d2": 1}}})
    text = shown(binary).get_text()
    assert (
        "The first queries of the set test, in the order of their ids, with a passage that" in text
    )
    assert text.index("flow of heat") < text.index("a flow over the wing")


def test_pydocs_is_described_as_such_and_other_collections_of_that_name_are_not() -> None:
    sources = {"python": "3.11", "numpy": "2"}
    text = " ".join(shown(small(name="PyDocs", sources=sources)).get_text().split())
    assert "PyDocs stands in for MS MARCO (Nguyen et al., 2016)" in text
    assert "passages of grade ≥ 2" in text and "PSF-2.0" in text
    assert "this book" not in text
    other = shown(small(name="PyDocs"))
    assert "docstring" not in other.get_text() and "grade ≥ 1" in other.get_text()


def test_what_is_cited_is_listed_as_in_the_bibliography() -> None:
    entries = re.findall(r"@\w+\{(\w+),(.*?)\n\}", (ROOT / "book" / "references.bib").read_text(), re.S)  # fmt: skip
    bibliography = dict(entries)
    sources = (ROOT / "lib" / "adaptive_margins" / "book" / "datasheet.py").read_text()
    keys = {key for found in re.findall(r"\{cite:[tp]\}`([^`]+)`", sources) for key in found.split(",")}  # fmt: skip
    assert keys == set(sheet._CITED)
    for key, (_, year, rest) in sheet._CITED.items():
        entry = re.sub(r"[{}]", "", bibliography[key])
        title = re.search(r"\btitle\s*= (.*),\n", entry)[1]
        assert rest.startswith(title) and re.search(rf"year\s*= {year}", entry)
    text = " ".join(shown(small()).get_text().split())
    assert "A data sheet in the sense of Gebru et al. (2021)." in text
    assert "BM25 (Robertson and Zaragoza, 2009; Lù, 2024) in" in text
    assert text.index("References") < text.index("Gebru et al. (2021). Datasheets") < text.index("Lù (2024).")  # fmt: skip
    assert "MS MARCO" not in text


def test_the_facts_are_those_of_the_page() -> None:
    facts = collection_facts(small())
    assert json.loads(json.dumps(facts)) == facts and isinstance(facts["words"]["max"], int)
    words = [len(text.split()) for text in small().passages.texts]
    assert facts == {
        "name": "small",
        "fingerprint": small().fingerprint,
        "sources": {"layout": "TREC"},
        "passages": 4,
        "empty_passages": 1,
        "bigram_passages": 0,
        "words": {"mean": np.mean(words), "median": np.median(words), "max": max(words)},
        "sets": {
            "train": {"queries": 2, "judged": 1, "relevant_queries": 1, "judgements": 1, "grades": {"1": 1}},
            "test": {
                "queries": 3, "judged": 2, "relevant_queries": 2, "judgements": 3, "grades": {"2": 1, "1": 1, "0": 1},
            },
        },
        "triples": 1,
        "triples_checked": dataclasses.asdict(Checked(checked=1)),
        "runs": {},
    }  # fmt: skip
    text = facts_text(facts)
    assert "4, of which 1 have no text" in text and "2: 1, 1: 1, 0: 1" in text
    alone = collection_facts(small(queries={}, qrels={}, triples=[]))
    assert alone["sets"] == {} and "No queries." in facts_text(alone)


def test_queries_without_a_relevant_passage_are_counted() -> None:
    qrels = {"train": {}, "test": {"q1": {"d1": 0, "d2": -1}, "q2": {"d1": 0}}}
    with pytest.warns(UserWarning, match="none of the 2 judged queries of 'test' has a relevant"):
        facts = collection_facts(small(qrels=qrels))
    assert facts["sets"]["test"]["judged"] == 2
    assert {name: found["relevant_queries"] for name, found in facts["sets"].items()} == {
        "train": 0, "test": 0,
    }  # fmt: skip


def test_runs_that_came_with_it_are_described() -> None:
    runs = {
        HOSTILE: {"q1": {"d2": 2.0, "d4": 3.0, "elsewhere": 1.0}, "q2": {"d3": 1.0}, "t1": {}},
        "other": {"of another collection": {"d1": 1.0}},
    }
    facts = collection_facts(small(), runs)["runs"]
    qrels = small().qrels["test"]
    expected = evaluate(qrels, runs[HOSTILE], ["nDCG@10"]).mean["nDCG@10"]
    assert 0 < expected < 1
    assert facts == {
        HOSTILE: {"set": "test", "queries": 2, "depth": 3, "unknown": 1, "nDCG@10": expected},
        "other": {"set": None, "queries": 0, "depth": 1, "unknown": 0, "nDCG@10": None},
    }
    shown_runs = cells(shown(small(), runs=facts), "Unknown hits")
    assert (
        shown_runs[HOSTILE]["nDCG@10"] == f"{expected:.4f}" and shown_runs[HOSTILE]["Set"] == "test"
    )
    assert shown_runs["other"]["nDCG@10"] == "—"
    text = facts_text(collection_facts(small(), runs))
    assert f"{expected:.4f}" in text and "Unknown hits" in text
    nothing = small(queries={}, qrels={}, triples=[])
    assert collection_facts(nothing, {"r": {}})["runs"]["r"]["set"] is None


def test_the_book_keeps_its_own_level_and_words() -> None:
    text = datasheet(small(), {}, {})
    assert "when this book is built" in text and "passages of grade ≥ 2" in text
    assert "{cite:t}`gebru2021`" in text


def test_text_without_spaces_and_queries_without_hits_are_told() -> None:
    one = small(
        passages=Texts(["d1", "d2", "d3", "d4"], ["企鹅生活在南极", "a flow", "", "ペンギン and flow"]),
        queries={"test": Texts(["q1", "q2"], ["企鹅吃什么", "C++"])},
        qrels={"test": {"q1": {"d1": 1}, "q2": {"d2": 1}}},
        triples=[],
    )  # fmt: skip
    soup = shown(one)
    assert cells(soup, "with a relevant candidate")["test"]["nDCG@10"] == "0.500"
    text = " ".join(soup.get_text().split())
    assert "2 of 4 passages" in text and "nothing for 1 of 2 queries of test" in text
    facts = collection_facts(one)
    assert facts["bigram_passages"] == 2 and "2 passages" in facts_text(facts)
    assert "bigrams" not in facts_text(collection_facts(small()))
    assert "bigrams" not in shown(small()).get_text()
