"""Pseudo-queries for a corpus without queries: titles, first sentences, and the inverse cloze task.

They are weaker than real queries: they use the words of the passage's author, which a searcher does
not know; they are statements; and only their passage counts as relevant. An encoder can adapt to a
corpus with them, and rankings can be compared with care; they do not measure how well users are
served.
"""

from __future__ import annotations

import itertools
import random
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from adaptive_margins.data.collection import Collection, Texts
from adaptive_margins.data.text import DataError
from adaptive_margins.data.words import STOP_WORDS, without_spaces, words_of
from adaptive_margins.progress import bar

KINDS = ("title", "first sentence", "inverse cloze")
QUERY_WORDS = (4, 32)
"""Fewest and most words of a sentence that is a query; a title may be shorter (`TITLE_WORDS`)."""
TITLE_WORDS = (2, 32)
"""Fewest and most words of a title that is a query."""
MIN_CONTENT = {"title": 2, "first sentence": 3, "inverse cloze": 3}
"""Fewest different words of a query, without English stop words and numbers."""
MIN_TEXT_WORDS = 10
"""Fewest words that a passage has left without its query."""
CUT = 0.9
"""Share of inverse cloze queries whose sentence is removed from its passage (Lee et al. 2019)."""
_SPAN = (6, 14)  # words of a query from text without sentence ends


def pseudo_collection(
    passages: Texts,
    name: str,
    sources: Mapping[str, str],
    titles: Mapping[str, str] | None,
    *,
    count: int,
    test: int,
    validation: int,
    seed: int,
) -> Collection:
    """Return a collection with pseudo-queries in the sets "train", "validation" and "test".

    A passage gives at most one query, which is one of these, in equal shares if possible:

    - "title": its title.
    - "first sentence": the first sentence after the title.
    - "inverse cloze": any sentence after the title, at random. In text without any sentence end
      (such as lower-case abstracts), 6 to 14 consecutive words replace the sentence.

    A title or sentence of several passages is not used, so that each query has one positive, of
    grade 1. Words are separated by white space, so text without spaces has no pseudo-queries.
    Limits: `QUERY_WORDS`, `TITLE_WORDS`, `MIN_CONTENT`, `MIN_TEXT_WORDS`.

    A query is removed from its passage, or matching words would suffice to find it (300 test
    queries of Cranfield, nDCG@10 of first sentences and inverse cloze: BM25 .98 and .99, MiniLM .93
    and .70; removed, BM25 .74 and .47, MiniLM .71 and .45). Only in "train", a tenth of the inverse
    cloze queries stay in their passages, so that the encoder does not unlearn to match words (Lee,
    Chang & Toutanova, Latent Retrieval for Weakly Supervised Open Domain Question Answering, ACL
    2019, Section 4). For searching, index the original passages.

    Args:
        passages: docids and texts; unchanged.
        name: the collection's.
        sources: of the texts; an entry on the pseudo-queries is added.
        titles: docid → title, of passages that have one, if any.
        count: queries to train on, at most.
        test: queries to measure with; at most a quarter of all.
        validation: queries to stop by; at most an eighth of all.
        seed: of the queries and of the split. The other sets do not depend on ``count``, unless
            they are limited to a quarter or an eighth of all.

    Raises:
        ValueError: a number below 1.
        DataError: there are fewer than 8 queries.
    """
    wanted = {"test": test, "validation": validation, "train": count}
    for what, number in wanted.items():
        if number < 1:
            raise ValueError(f"{what} must be at least 1, not {number}")
    drawn = _draw(passages, titles or {}, sum(wanted.values()), seed)
    if len(drawn) < 8:
        raise DataError(
            f"{name}: its {len(passages)} passages give {len(drawn)} pseudo-queries; at least 8 are"
            f" needed to train, to stop and to measure with{_without_spaces(passages)}"
        )
    texts = list(passages.texts)
    queries: dict[str, Texts] = {}
    qrels = {}
    start = 0
    shares = {"test": len(drawn) // 4, "validation": len(drawn) // 8, "train": len(drawn)}
    for part, share in shares.items():
        chosen = drawn[start : start + min(wanted[part], share)]
        start += len(chosen)
        queries[part] = Texts([one.qid for one in chosen], [one.query for one in chosen])
        qrels[part] = {one.qid: {one.docid: 1} for one in chosen}
        for one in chosen:
            if not (part == "train" and one.keeps_query):
                texts[one.row] = one.rest
    origin = f"{', '.join(KINDS)}; seed {seed}"
    return Collection(
        name=name,
        passages=Texts(passages.ids, texts),
        queries=queries,
        qrels=qrels,
        sources={**sources, "pseudo-queries": origin},
    )


def about(collection: Collection) -> str:
    """Describe the pseudo-queries of a `pseudo_collection`: numbers by kind, and their weakness."""
    kinds = Counter(
        qid.partition(":")[0].replace("-", " ")
        for queries in collection.queries.values()
        for qid in queries.ids
    )
    numbers = ", ".join(f"{kind}: {kinds[kind]:,}" for kind in KINDS if kinds[kind])
    return (
        f"There are no real queries: {kinds.total():,} pseudo-queries are parts of the passages"
        f" ({numbers}). They are weaker than real queries: they use the words of the passage's"
        " author, they are statements, and only the passage they are from counts as"
        " relevant. The measures show how well a passage is found by a part removed from it,"
        " not how well the queries of users are answered."
    )


# ---- from a passage to a query -------------------------------------------------------------------


class _Drawn(NamedTuple):
    """A query, and the text of its passage without it."""

    kind: str
    row: int
    docid: str
    query: str
    rest: str
    keeps_query: bool  # to be trained on with the complete passage

    @property
    def qid(self) -> str:
        return f"{self.kind.replace(' ', '-')}:{self.docid}"


def _draw(passages: Texts, titles: Mapping[str, str], count: int, seed: int) -> list[_Drawn]:
    """Up to ``count`` queries of different passages, the kinds in turn; a prefix of more."""
    repeated = _repeated(passages, titles)
    taken: set[int] = set()

    def of_kind(kind: str) -> Iterator[_Drawn]:
        order = list(range(len(passages)))
        random.Random(f"{seed} {kind}").shuffle(order)
        for row in order:
            if row in taken:
                continue
            docid = passages.ids[row]
            # A generator per passage: its draws do not depend on which other passages there are.
            rng = random.Random(f"{seed} {kind} {docid}")
            parts = _parts(passages.texts[row], titles.get(docid, ""))
            if found := _asked(kind, *parts, rng, repeated):
                taken.add(row)
                keeps_query = kind == "inverse cloze" and rng.random() >= CUT
                yield _Drawn(kind, row, docid, *found, keeps_query)

    turns = itertools.zip_longest(*map(of_kind, KINDS))
    drawn = list(itertools.islice(filter(None, itertools.chain.from_iterable(turns)), count))
    if not drawn:
        raise DataError(
            f"none of {len(passages)} passages gives a pseudo-query ({', '.join(KINDS)}): a query"
            f" needs {QUERY_WORDS[0]} to {QUERY_WORDS[1]} words (a title {TITLE_WORDS[0]}) that no"
            f" other passage has in this order, and {MIN_TEXT_WORDS} more words in its passage"
            f"{_without_spaces(passages)}"
        )
    return drawn


def _without_spaces(passages: Texts) -> str:
    """Why passages give few queries, and the way out, if they are written without spaces."""
    if not (count := sum(map(without_spaces, passages.texts))):
        return ""
    return (
        f"; {count:,} of them are written without spaces between words, and such text gives no"
        " pseudo-queries: add queries and judgements (queries.jsonl and qrels/test.tsv, or"
        " queries.tsv and qrels.txt)"
    )


def _repeated(passages: Texts, titles: Mapping[str, str]) -> set[int]:
    """The hashes of all titles and sentences that more than one passage has."""
    hashes = array("q")
    pairs = zip(passages.ids, passages.texts, strict=True)
    listed = bar("reading passages", pairs, total=len(passages), unit="passages")
    for docid, text in listed:
        title, body = _parts(text, titles.get(docid, ""))
        hashes.extend({hash(_form(part)) for part in (title, *sentences(body))})
    ordered = np.sort(np.frombuffer(hashes, dtype=np.int64)) if hashes else np.zeros(0, np.int64)
    return set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())


def _parts(text: str, title: str) -> tuple[str, str]:
    """The title and the text after it, if the text begins with it; with single spaces."""
    text, title = " ".join(text.split()), " ".join(title.split())
    end = len(title)
    if text[:end].casefold() == title.casefold() and not text[end : end + 1].isalnum():
        return title, text[end:].lstrip(" .:;–—-")
    return title, text


def _asked(
    kind: str, title: str, body: str, rng: random.Random, repeated: set[int]
) -> tuple[str, str] | None:
    """The query of a kind, and its passage without it; None if there is no usable one."""
    if kind == "inverse cloze":
        return _inverse_cloze(body, rng, repeated)
    query, rest = title, body
    if kind == "first sentence":
        query = next(sentences(body), "")
        rest = body[len(query) :].strip()
    asks = _asks(kind, query, len(words_of(rest)), repeated)
    return (_trimmed(query), rest) if asks else None


def _inverse_cloze(body: str, rng: random.Random, repeated: set[int]) -> tuple[str, str] | None:
    parts = list(sentences(body))
    choices = list(range(len(parts)))
    if len(parts) == 1 and not _MARK.search(body):
        words = body.split()
        if hash(_form(body)) in repeated or len(words) < (length := rng.randint(*_SPAN)):
            return None
        at = rng.randrange(len(words) - length + 1)
        cut = words[:at], words[at : at + length], words[at + length :]
        parts, choices = [" ".join(part) for part in cut], [1]
    else:
        rng.shuffle(choices)
    counts = [len(words_of(part)) for part in parts]
    total = sum(counts)
    for i in choices:
        if _asks("inverse cloze", parts[i], total - counts[i], repeated):
            return _trimmed(parts[i]), " ".join(filter(None, parts[:i] + parts[i + 1 :]))
    return None


def _trimmed(query: str) -> str:
    return query.strip(" .,:;–—*•-")


def _asks(kind: str, query: str, left: int, repeated: set[int]) -> bool:
    """Whether a text is a usable query of a ``kind`` whose passage has ``left`` other words."""
    form = _form(query)
    words = form.split()
    low, high = TITLE_WORDS if kind == "title" else QUERY_WORDS
    content = {word for word in words if word not in STOP_WORDS and not word.isdigit()}
    return (
        low <= len(words) <= high
        and len(content) >= MIN_CONTENT[kind]
        and left >= MIN_TEXT_WORDS
        and hash(form) not in repeated
    )


# ---- sentences -----------------------------------------------------------------------------------

_MARK = re.compile(r"(?:[.!?]|…)['\"’”)\]]*(?=\s|$)")
_ABBREVIATION = re.compile(
    r"(?:e\.g|i\.e|cf|vs|viz|etc|al|approx|resp|incl|ca|figs?|eqs?|nos?|vols?|pp?|refs?|secs?"
    r"|chs?|eds?|dept|univ|inc|ltd|dr|mrs?|ms|prof|st|jr|sr|gen|col|lt|hon|rev"
    r"|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|(?:[a-z]\.)*[a-z])\Z",
    re.IGNORECASE,
)  # the last: initials, and "U.S."
_SOLID = re.compile(r"\S")


def sentences(text: str) -> Iterator[str]:
    """Split a text at its sentence ends; only white space around them is lost.

    A sentence ends at ".", "!", "?" or "…" (and closing quotes or brackets) before white space,
    unless a lower-case letter follows, or a full stop belongs to a common English abbreviation, an
    initial, or a number. A mark between white space always ends one, as in tokenised text.
    """
    text = text.strip()
    start = letter = 0
    for mark in _MARK.finditer(text):
        # Each character is read once, also if many marks end no sentence ("1. Introduction").
        while letter < mark.start() and not text[letter].isalpha():
            letter += 1
        if letter < mark.start() and _ends(text, start, mark.start(), mark.end()):
            yield text[start : mark.end()].strip()
            start = letter = mark.end()
    if rest := text[start:].strip():
        yield rest


def _ends(text: str, start: int, mark: int, end: int) -> bool:
    """Whether a mark ends a sentence that has a letter, by its word and the next character."""
    at = mark
    while at > start and not text[at - 1].isspace():
        at -= 1
    if at == mark:
        return True
    following = next_character[0] if (next_character := _SOLID.search(text, end)) else ""
    if following.islower():
        return False
    if text[mark] != ".":
        return True
    word = text[at:mark].lstrip("([\"'“‘")
    if word.isdigit() and following.isdigit():  # "3. 0"
        return False
    return not _ABBREVIATION.match(word)


def _form(text: str) -> str:
    """A text's words: two texts with the same words count as the same."""
    return " ".join(words_of(text))
