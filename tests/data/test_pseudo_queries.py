from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from adaptive_margins.data import pseudo_queries as pseudo
from adaptive_margins.data.collection import Texts
from adaptive_margins.data.pseudo_queries import KINDS, about, pseudo_collection, sentences
from adaptive_margins.data.text import DataError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One is here. Two is there! Is it? Yes", ["One is here.", "Two is there!", "Is it?", "Yes"]),
        ('He said "stop." Then he left.', ['He said "stop."', "Then he left."]),
        ("It rose (see below.) Then it fell.", ["It rose (see below.)", "Then it fell."]),
        # Abbreviations, initials, numbers, and what goes on in lower case.
        ("See Fig. 3 and Eq. 4, e.g. Smith et al. 1999. Then on.", ["See Fig. 3 and Eq. 4, e.g. Smith et al. 1999.", "Then on."]),
        ("Dr. J. F. Doe of the U.S. Army wrote it.", ["Dr. J. F. Doe of the U.S. Army wrote it."]),
        ("Version 3.5 is out. 4 bugs remain.", ["Version 3.5 is out.", "4 bugs remain."]),
        ("At mach 3. 0 it fails.", ["At mach 3. 0 it fails."]),
        ("1. Introduction to flow. It flows.", ["1. Introduction to flow.", "It flows."]),
        ("He waited... and waited. Then ... no one.", ["He waited... and waited.", "Then ... no one."]),
        # Tokenised, lower case: as Cranfield is.
        ("a wing in a stream . a test was made, i.e., of lift .", ["a wing in a stream .", "a test was made, i.e., of lift ."]),
        ("Größe zählt. Élan auch.", ["Größe zählt.", "Élan auch."]),
        ("no end", ["no end"]),
        ("  ", []),
        ("", []),
        ("...", ["..."]),
    ],
)  # fmt: skip
def test_sentences(text: str, expected: list[str]) -> None:
    assert list(sentences(text)) == expected


def fact(number: int) -> str:
    """A sentence that no other number has."""
    return f"Compound{number} dissolves in solvent{number} at temperature{number}."


PASSAGES = Texts(
    [f"d{n}" for n in range(60)],
    [f"The story of compound{n}: {' '.join(fact(10 * n + k) for k in range(4))}" for n in range(60)],
)  # fmt: skip
TITLES = {f"d{n}": f"The story of compound{n}" for n in range(0, 60, 2)}


def drawn(passages: Texts, titles: dict[str, str] | None = None, count: int = 1000, seed: int = 1):
    return pseudo._draw(passages, titles or {}, count, seed)


def kinds_of(queries: list) -> dict[str, int]:
    return {kind: sum(one.kind == kind for one in queries) for kind in KINDS}


def test_each_kind_leaves_its_query_out_of_the_rest() -> None:
    queries = drawn(PASSAGES, TITLES)
    assert sorted(one.docid for one in queries) == sorted(PASSAGES.ids)  # one a passage
    assert min(kinds_of(queries).values()) > 9
    for one in queries:
        number = int(one.docid[1:])
        facts = [fact(10 * number + k) for k in range(4)]
        titled = one.docid in TITLES
        assert one.qid == f"{one.kind.replace(' ', '-')}:{one.docid}"
        if one.kind == "title":
            assert (one.query, one.rest) == (TITLES[one.docid], " ".join(facts))
        elif one.kind == "first sentence":
            # The other passages begin with a title that is not given.
            first = facts[0] if titled else f"The story of compound{number}: {facts[0]}"
            assert (one.query, one.rest) == (first.rstrip("."), " ".join(facts[1:]))
        else:
            whole = " ".join(facts) if titled else PASSAGES[one.docid]
            assert one.query in whole and one.query not in one.rest
            assert sorted(f"{one.rest} {one.query}.".split()) == sorted(whole.split())


def test_a_tenth_of_inverse_cloze_keeps_its_sentence() -> None:
    many = Texts(
        [str(n) for n in range(4000)],
        [" ".join(fact(5 * n + k) for k in range(4)) for n in range(4000)],
    )
    queries = [one for one in drawn(many, count=4000, seed=4) if one.kind == "inverse cloze"]
    assert len(queries) == 2000  # the other half are first sentences
    kept = sum(one.keeps_query for one in queries)
    assert abs(kept - 200) < 4 * (2000 * 0.1 * 0.9) ** 0.5  # four standard deviations
    later = sum(many[one.docid].index(one.query) > 0 for one in queries)
    assert 0.7 < later / 2000 < 0.8  # any of the four sentences: three are not the first


def test_kinds_share_equally_and_fewer_are_a_prefix_of_more() -> None:
    few = drawn(PASSAGES, TITLES, count=31)
    assert kinds_of(few) == {"title": 11, "first sentence": 10, "inverse cloze": 10}
    assert drawn(PASSAGES, TITLES)[:31] == few
    assert drawn(PASSAGES, TITLES, count=31, seed=2) != few


def test_the_same_in_another_process() -> None:
    program = "from test_pseudo_queries import *; print(build().fingerprint)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parent,
        env={**os.environ, "PYTHONHASHSEED": "1"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == build().fingerprint


def test_what_several_passages_have_is_no_query() -> None:
    boiler = "Permission is granted to copy this notice."
    texts = [f"{boiler} {fact(10 * n)} {fact(10 * n + 1)} {fact(10 * n + 2)}" for n in range(40)]
    texts[7] = texts[8]  # the same passage twice
    titles = {str(n): "Copper and its alloys" if n % 2 else f"Alloy number{n}" for n in range(40)}
    queries = drawn(Texts([str(n) for n in range(40)], texts), titles)
    assert kinds_of(queries)["first sentence"] == 0
    assert {"Copper and its alloys", boiler.rstrip(".")}.isdisjoint(one.query for one in queries)
    assert {"inverse-cloze:7", "inverse-cloze:8"}.isdisjoint(one.qid for one in queries)
    assert len(queries) == 39  # all but one of the equal passages; the other one has a title
    # Capitals, punctuation and white space do not make another sentence.
    texts = [f"{fact(1)} {fact(2)} {fact(3)}", f"{fact(1).upper()}  {fact(4)} {fact(5)}, {fact(6)}"]
    assert kinds_of(drawn(Texts(["a", "b"], texts)))["first sentence"] == 0


FACTS = " ".join(map(fact, (1, 2, 3)))


@pytest.mark.parametrize(
    ("text", "title", "kinds"),
    [
        (FACTS, "Long enough title", {"title", "first sentence", "inverse cloze"}),
        (FACTS, "Short", {"first sentence", "inverse cloze"}),
        (FACTS, "2 and 3 of 4", {"first sentence", "inverse cloze"}),
        (f"Too short. {FACTS}", "", {"inverse cloze"}),
        (f"It is as it was in that. {FACTS}", "", {"inverse cloze"}),
        (f"{fact(1)} {fact(2)}", "", set()),  # too little is left
        ("word " * 33 + "ends. " + "Word " * 33 + "ends.", "", set()),  # too long
        (fact(1), "", set()),
        ("", "A long enough title", set()),
    ],
)  # fmt: skip
def test_limits(text: str, title: str, kinds: set[str]) -> None:
    parts = pseudo._parts(text, title)
    found = {k for k in KINDS if pseudo._asked(k, *parts, random.Random(1), set())}
    assert found == kinds


def test_text_without_sentence_ends_gives_consecutive_words() -> None:
    texts = [" ".join(f"word{n}x{k}" for k in range(40)) for n in range(50)]
    queries = drawn(Texts([str(n) for n in range(50)], texts))
    assert kinds_of(queries) == {"title": 0, "first sentence": 0, "inverse cloze": 50}
    for one in queries:
        assert 6 <= len(one.query.split()) <= 14
        before, _, after = texts[one.row].partition(one.query)
        assert one.rest == f"{before.strip()} {after.strip()}".strip()


def test_nothing_to_make_queries_from_is_an_error() -> None:
    with pytest.raises(DataError, match=r"none of 2 passages gives a pseudo-query \(title, first"):
        drawn(Texts(["a", "b"], ["", "Short."]))
    with pytest.raises(DataError, match="none of 0 passages"):
        drawn(Texts([], []))


def build(count: int = 1000, test: int = 12, validation: int = 5, seed: int = 1):
    return pseudo_collection(
        PASSAGES, "Facts", {"source": "1"}, TITLES, count=count, test=test, validation=validation, seed=seed,
    )  # fmt: skip


def test_collection_has_disjoint_sets_and_passages_without_their_queries() -> None:
    collection = build()
    sizes = {name: len(queries) for name, queries in collection.queries.items()}
    assert sizes == {"test": 12, "validation": 5, "train": 43}
    positives = [
        docid for qrels in collection.qrels.values() for j in qrels.values() for docid in j
    ]
    assert len(positives) == len(set(positives)) == 60
    assert collection.passages.ids == PASSAGES.ids
    whole = 0
    for name, qrels in collection.qrels.items():
        for qid, judged in qrels.items():
            ((docid, grade),) = judged.items()
            assert (grade, qid.partition(":")[2]) == (1, docid)
            text, query = collection.passages[docid], collection.queries[name][qid]
            assert query in PASSAGES[docid]
            if query in text:
                assert name == "train" and qid.startswith("inverse-cloze") and text == PASSAGES[docid]  # fmt: skip
                whole += 1
    assert whole < 10
    for name in ("test", "validation"):  # the kinds in equal parts
        kinds = [qid.partition(":")[0] for qid in collection.queries[name].ids]
        assert max(map(kinds.count, kinds)) - min(map(kinds.count, kinds)) <= 1
    assert collection.sources == {"source": "1", "pseudo-queries": "title, first sentence, inverse cloze; seed 1"}  # fmt: skip


def test_more_queries_to_train_on_leave_the_other_sets_and_passages_without_a_query_as_they_are() -> None:  # fmt: skip
    few, more = build(count=10), build(count=20)
    assert few.queries["test"] == build(count=10).queries["test"]
    assert few.qrels["train"].items() <= build(count=10).qrels["train"].items()
    assert len(few.queries["train"]) == 10 and len(more.queries["train"]) == 20
    sources = {docid for qrels in few.qrels.values() for judged in qrels.values() for docid in judged}  # fmt: skip
    untouched = [docid for docid in PASSAGES.ids if docid not in sources]
    # 27 were asked for, of which a quarter and an eighth at most are held out.
    assert {name: len(queries) for name, queries in few.queries.items()} == {"test": 6, "validation": 3, "train": 10}  # fmt: skip
    assert all(few.passages[docid] == PASSAGES[docid] for docid in untouched) and untouched
    big, bigger = build(count=36, test=5, validation=4), build(count=40, test=5, validation=4)
    for name in ("test", "validation"):
        assert big.queries[name] == bigger.queries[name]
    assert list(bigger.qrels["train"].items())[:36] == list(big.qrels["train"].items())
    assert build(seed=2).fingerprint != build(seed=1).fingerprint == build(seed=1).fingerprint


def test_too_few_passages_for_three_sets_is_an_error() -> None:
    few = Texts(PASSAGES.ids[:5], PASSAGES.texts[:5])
    with pytest.raises(DataError, match="Few: its 5 passages give 5 pseudo-queries; at least 8"):
        pseudo_collection(few, "Few", {}, TITLES, count=9, test=3, validation=3, seed=1)
    with pytest.raises(ValueError, match="validation must be at least 1, not 0"):
        build(validation=0)


def test_what_is_said_about_them_has_their_numbers() -> None:
    collection = build()
    text = about(collection)
    numbers = {kind: int(text.split(f"{kind}: ")[1].split(",")[0].split(")")[0]) for kind in KINDS}
    qids = [qid.partition(":")[0] for texts in collection.queries.values() for qid in texts.ids]
    assert numbers == {kind: qids.count(kind.replace(" ", "-")) for kind in KINDS}


def naive_sentences(text: str) -> list[str]:
    """`sentences` as it is defined, at quadratic cost."""

    def ends(start: int, mark: int, end: int) -> bool:
        before, following = text[start:mark], text[end:].lstrip()[:1]
        if not any(c.isalpha() for c in before) or (
            not before[-1].isspace() and following.islower()
        ):
            return False
        if before[-1].isspace() or text[mark] != ".":
            return True
        word = before.split()[-1].lstrip("([\"'“‘")
        if word.isdigit() and following.isdigit():
            return False
        return not pseudo._ABBREVIATION.match(word)

    found, start = [], 0
    for mark in pseudo._MARK.finditer(text):
        if ends(start, mark.start(), mark.end()):
            found.append(text[start : mark.end()].strip())
            start = mark.end()
    return [part for part in [*found, text[start:].strip()] if part]


def test_sentences_are_those_of_the_definition() -> None:
    rng = random.Random(5)
    pieces = ["A", "b", "e.g", "U.S", "3", "word", "²", ".", "!", "…", ". ", ".) ", '."', "  ", "\n", "(",
              "Fig", "。", " ", " "]  # fmt: skip
    several = 0
    for _ in range(2000):
        text = "".join(rng.choices(pieces, k=rng.randrange(40)))
        expected = naive_sentences(text)
        assert list(sentences(text)) == expected
        assert "".join("".join(expected).split()) == "".join(text.split())  # nothing is lost
        several += len(expected) > 1
    assert several > 400


@pytest.mark.parametrize(
    "form", ["A b c. ", "1. ", "word . ", ". ", "One sentence is it. ", "a", '."', "- e.g. x\n"]
)
def test_the_time_grows_with_the_length_and_not_with_its_square(form: str) -> None:
    ordinary = [
        f"Passage {i} is an ordinary one. It says little in some words more than ten of them."
        for i in range(30)
    ]

    def seconds(size: int) -> float:
        texts = Texts([f"d{i}" for i in range(31)], [*ordinary, form * (size // len(form))])
        since = time.process_time()
        assert drawn(texts, count=40)
        return time.process_time() - since

    long, short = seconds(160_000), seconds(40_000)
    assert long < 4
    assert long < 10 * max(0.05, short)  # 4 times, not 16


def test_text_without_spaces_is_named_as_the_reason() -> None:
    passages = Texts(
        ["a", "b", "c"], ["企鹅生活在南极的海边。", "大熊猫住在四川的竹林里。", "one word"]
    )
    with pytest.raises(DataError, match="2 of them are written without spaces"):
        drawn(passages)
    with pytest.raises(DataError) as raised:
        drawn(Texts(["a"], ["one word"]))
    assert "without spaces" not in str(raised.value)
