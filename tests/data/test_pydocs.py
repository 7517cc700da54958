import importlib.util
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import pytest
import Stemmer
from bm25s.stopwords import STOPWORDS_EN

from adaptive_margins.data.collection import Collection
from adaptive_margins.data.docstrings import MIN_PASSAGE_WORDS
from adaptive_margins.data.pydocs import build_pydocs
from adaptive_margins.data.text import DataError

# ── A miniature package ───────────────────────────────────────────────────────────────────────


def doc(summary: str, seed: str, see_also: str = "") -> str:
    """A docstring whose body is unlike any other's."""
    body = " ".join(f"{seed}{i}" for i in range(25))
    block = f"\n\nSee Also\n--------\n{see_also}" if see_also else ""
    return f'"""{summary}.\n\nBody {body}.{block}\n"""'


def function(name: str, docstring: str) -> str:
    lines = "\n".join("    " + line for line in docstring.splitlines())
    return f"def {name}():\n{lines}\n"


MODULES = {
    "__init__.py": "raise RuntimeError('imported')\n",
    "alpha.py": "\n".join(
        [
            function("twin", doc("Compute the median of every row", "a")),
            function("linked", doc("Draw a histogram with many bins", "b",
                "other : same module\nminipkg.beta.far, nowhere : elsewhere\ntwice\nunique_far")),
            function("other", doc("Shuffle the cards of a deck", "c")),
            function("twice", doc("Count how often something happens", "d")),
            function("_private", doc("Hidden things are hidden well", "e")),
            function("encode", doc("Encode bytes of a long secret message carefully with one fast cipher", "f")),
            function("decode", doc("Decode bytes of a long secret message carefully with one fast cipher", "g")),
            function("copy_one", doc("Paint a fence in white colour", "h")),
            "if True:\n    " + function("conditional", doc("Reach what stands under conditions", "i"))
                .replace("\n", "\n    ") + "\n",
            "class Tool:\n    " + doc("Hold a screw with this tool", "j").replace("\n", "\n    ")
            + "\n    " + function("turn", doc("Turn the screw to the right", "k", "release"))
                .replace("\n", "\n    ")
            + "\n    " + function("release", doc("Release whatever screw was held", "l"))
                .replace("\n", "\n    ")
            + "\nclass _Secret:\n    " + function("open", doc("Open what should stay closed", "m"))
                .replace("\n", "\n    "),
            "def outer():\n    " + function("inner", doc("Inner functions have no readers", "n"))
                .replace("\n", "\n    "),
        ]
    ),
    "sub/__init__.py": "",
    "sub/beta.py": "\n".join(
        [
            function("twin", doc("Computes the medians of every row", "o")),
            function("far", doc("Walk as far as possible today", "p")),
            function("twice", doc("Repeat the whole thing once more", "q")),
            function("release", doc("Publish another version of software", "r")),
            # The body of alpha.copy_one but for its last word; its own query.
            function("copy_two", doc("Cover some wood with bright varnish", "h").replace("h24", "x")),
        ]
    ),
    "beta.py": function("far", doc("Look at stars through a telescope", "s")),
    "gamma.py": function("unique_far", doc("Bake bread in a hot oven", "t")),
    "many.py": "\n".join(function(f"f{i}", doc("Predict the class of samples", f"u{i}x")) for i in range(9)),
    "tests/test_alpha.py": function("checked", doc("Check the checks of checkers", "v")),
    "_vendor/copied.py": function("copied", doc("Copied from somebody else entirely", "w")),
    "test_beta.py": function("checked_too", doc("Check more of the checkers", "y")),
    "broken.py": "def broken(:\n",
    "data.txt": "not Python",
}  # fmt: skip


@pytest.fixture
def minipkg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, source in MODULES.items():
        path = tmp_path / "minipkg" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    info = tmp_path / "mini_dist-1.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mini-dist\nVersion: 1.5\n")
    (info / "top_level.txt").write_text("minipkg\n")
    (info / "RECORD").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    assert "minipkg" not in sys.modules  # importing it would have raised, too


def build(**changes: object) -> Collection:
    arguments = {"seed": 1, "validation": 2, "test": 3, "max_passages": None, "max_words": 60}
    return build_pydocs(["minipkg"], **{**arguments, **changes})  # type: ignore[arg-type]


def judgements(collection: Collection) -> dict[str, dict[str, int]]:
    """Query text → first word of the passage after "Body" → grade."""
    return {
        collection.queries[name][qid]: {collection.passages[d].split()[1]: g for d, g in judged.items()}
        for name, qrels in collection.qrels.items()
        for qid, judged in qrels.items()
    }  # fmt: skip


@pytest.mark.usefixtures("minipkg")
def test_what_is_in_the_collection() -> None:
    collection = build()
    found = {text.split()[1] for text in collection.passages.texts}
    # No private names, tests, vendored copies, or functions within functions.
    many = {f"u{i}x0" for i in range(9)}
    assert found == many | {f"{letter}0" for letter in "abcdfghijklopqrst"}
    assert collection.sources["mini-dist"] == "1.5"
    assert set(collection.sources) == {"mini-dist", "python"}
    assert {name: len(texts) for name, texts in collection.queries.items()}.keys() == {
        "train", "validation", "test1", "test2",
    }  # fmt: skip


@pytest.mark.usefixtures("minipkg")
def test_judgements_by_hand() -> None:
    found = judgements(build())
    # Two spellings of one request are one query, which both bodies answer.
    assert "Computes the medians of every row" not in found
    assert found["Compute the median of every row"] == {"a0": 3, "o0": 3}
    # Near-identical, but one word decides: two queries, each other's body graded 2.
    cipher = "bytes of a long secret message carefully with one fast cipher"
    assert found[f"Encode {cipher}"] == {"f0": 3, "g0": 2}
    assert found[f"Decode {cipher}"] == {"g0": 3, "f0": 2}
    # Near-identical passages are one passage, which answers two queries.
    assert found["Paint a fence in white colour"] == {"h0": 3}
    assert found["Cover some wood with bright varnish"] == {"h0": 3}
    # See Also: the same module wins ("twice"), the exact name of two that fit ("beta.far",
    # "sub.beta.far"), nothing for an unknown name, and the only object with this last part.
    assert found["Draw a histogram with many bins"] == {
        "b0": 3, "c0": 1, "d0": 1, "s0": 1, "t0": 1,
    }  # fmt: skip
    # Of two methods or functions called "release", the one of the same class.
    assert found["Turn the screw to the right"] == {"k0": 3, "l0": 1}
    # Nine bodies answer this equally well: no query, but the passages stay.
    assert "Predict the class of samples" not in found
    assert len(found) == 17


@pytest.mark.usefixtures("minipkg")
def test_what_hangs_together_is_in_one_set() -> None:
    cipher = "bytes of a long secret message carefully with one fast cipher"
    pairs = [
        (f"Encode {cipher}", f"Decode {cipher}"),
        ("Paint a fence in white colour", "Cover some wood with bright varnish"),
    ]
    layouts = set()
    for seed in range(6):
        collection = build(seed=seed)
        place = {text: name for name, texts in collection.queries.items() for text in texts.texts}
        assert all(place[one] == place[other] for one, other in pairs)
        sizes = {name: len(texts) for name, texts in collection.queries.items()}
        assert sizes["validation"] >= 2 and sizes["test1"] >= 3 and sizes["test2"] >= 3
        layouts.add(tuple(sorted(place.items())))
    assert len(layouts) == 6  # the seed decides


@pytest.mark.usefixtures("minipkg")
def test_a_subsample_takes_whole_components_and_leaves_the_tests_as_they_are() -> None:
    whole = build()
    part = build(max_passages=len(whole.passages) - 3)
    assert len(whole.passages) - 5 <= len(part.passages) <= len(whole.passages) - 3
    assert set(part.passages.texts) < set(whole.passages.texts)
    for name, qrels in part.qrels.items():
        assert all(3 in judged.values() for judged in qrels.values())
        if name != "train":
            assert part.queries[name].texts == whole.queries[name].texts
    full, fewer = judgements(whole), judgements(part)
    for query, judged in fewer.items():
        own = {docid for docid, grade in full[query].items() if grade == 3}
        assert own == {docid for docid, grade in judged.items() if grade == 3}


@pytest.mark.usefixtures("minipkg")
def test_ids_tell_nothing() -> None:
    collection = build()
    assert collection.passages.ids == [f"d{n:05d}" for n in range(1, len(collection.passages) + 1)]
    qids = sorted(qid for texts in collection.queries.values() for qid in texts.ids)
    assert qids == [f"q{n:05d}" for n in range(1, 18)]
    order = [text.split()[1] for text in collection.passages.texts]
    assert order != sorted(order) and order != [
        text.split()[1] for text in build(seed=2).passages.texts
    ]


@pytest.mark.usefixtures("minipkg")
def test_too_few_queries_and_other_bad_arguments() -> None:
    with pytest.raises(
        DataError, match="too few queries: minipkg give 17, but validation 2, test1 9"
    ):
        build(test=9)
    sizes = {"seed": 1, "validation": 1, "test": 1, "max_passages": None, "max_words": 60}
    for package, message in (
        ("no_such_package", "package 'no_such_package' is not installed; try: pip install"),
        ("a.b", r"package 'a\.b' is not installed"),
        ("itertools", "package 'itertools' has no Python source"),
    ):
        with pytest.raises(DataError, match=message):
            build_pydocs([package], **sizes)
    with pytest.raises(DataError, match=f"max_words must be at least {MIN_PASSAGE_WORDS}, not 5"):
        build(max_words=5)


# ── Installed packages ────────────────────────────────────────────────────────────────────────

_REAL = """
import os, sys
real = os.walk
def shuffled(top):  # a file system with another order
    for folder, subfolders, names in real(top):
        names.sort(key=hash); subfolders.sort(key=hash)
        yield folder, subfolders, names
os.walk = shuffled
before = set(sys.modules)
from adaptive_margins.data.pydocs import build_pydocs
c = build_pydocs(["joblib", "networkx"], seed=3, validation=30, test=60, max_passages=900, max_words=60)
print(c.fingerprint, "networkx" in sys.modules)
"""


@pytest.fixture(scope="module")
def real() -> Collection:
    return build_pydocs(
        ["networkx", "joblib"], seed=3, validation=30, test=60, max_passages=900, max_words=60
    )


def test_same_bytes_whatever_the_hash_seed_the_locale_and_the_file_system(real: Collection) -> None:
    environment = {**os.environ, "PYTHONHASHSEED": "1", "LC_ALL": "C"}
    output = subprocess.run(
        [sys.executable, "-c", _REAL], env=environment, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert output.stdout.split() == [real.fingerprint, "False"]


def test_no_set_leaks_into_another(real: Collection) -> None:
    stem = Stemmer.Stemmer("english").stemWord
    content = {
        (name, qid): {
            stem(w) for w in re.findall(r"[^\W_]+", text.lower()) if w not in STOPWORDS_EN
        }
        for name, texts in real.queries.items()
        for qid, text in zip(texts.ids, texts.texts, strict=True)
    }
    assert len({qid for _, qid in content}) == len(content)  # no query is in two sets
    for (a, one), (b, other) in combinations(content.items(), 2):
        if a[0] != b[0]:
            assert len(one & other) < 0.8 * len(one | other), (a, b)
    own = {
        name: {d for judged in qrels.values() for d, grade in judged.items() if grade >= 2}
        for name, qrels in real.qrels.items()
    }
    for one_set, other_set in combinations(own.values(), 2):
        assert not one_set & other_set


def test_no_two_passages_are_nearly_the_same(real: Collection) -> None:
    words = [re.findall(r"[^\W_]+", text.lower()) for text in real.passages.texts]
    trigrams = [set(zip(w, w[1:], w[2:], strict=False)) for w in words]
    for one, other in combinations(trigrams, 2):
        assert len(one & other) < 0.9 * len(one | other)


def test_every_query_is_answered_and_every_text_fits_a_line(
    real: Collection, tmp_path: Path
) -> None:
    assert len(real.passages) <= 900
    assert len(real.queries["test1"]) >= 60 and len(real.queries["validation"]) >= 30
    for name, qrels in real.qrels.items():
        assert set(qrels) == set(real.queries[name].ids)
        assert all(3 in judged.values() for judged in qrels.values())
    lengths = [len(text.split()) for text in real.passages.texts]
    assert min(lengths) >= MIN_PASSAGE_WORDS and max(lengths) == 60
    queries = [text for texts in real.queries.values() for text in texts.texts]
    assert all(4 <= len(text.split()) <= 30 for text in queries)
    real.save(tmp_path / real.fingerprint)
    assert Collection.load(tmp_path / real.fingerprint) == real


def test_modules_and_the_standard_library(real: Collection) -> None:
    spec = importlib.util.find_spec("typing_extensions")  # a package that is one file
    assert spec is not None
    started = time.perf_counter()
    collection = build_pydocs(
        ["stdlib", "typing_extensions"],
        seed=1,
        validation=30,
        test=60,
        max_passages=None,
        max_words=60,
    )
    assert time.perf_counter() - started < 60
    assert set(collection.sources) == {"python", "typing_extensions"}
    assert len(collection.passages) > 700
    texts = " ".join(text for texts in collection.queries.values() for text in texts.texts)
    assert "Serialize" in texts and "unittest" not in collection.sources
