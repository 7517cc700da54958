"""Terms: English as bm25s splits it, bigrams of scripts without spaces, words with marks."""

from __future__ import annotations

import re
import sys
import unicodedata
import warnings

import bm25s
import pytest
import Stemmer

from adaptive_margins.data.collection import Texts
from adaptive_margins.data.words import terms, without_spaces
from adaptive_margins.retrieval.bm25 import BM25, without_hits

BM25S = re.compile(r"(?u)\b\w\w+\b")  # the default pattern of bm25s


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("企鹅吃什么？", ["企鹅", "鹅吃", "吃什", "什么"]),
        ("茶。20天", ["茶", "20", "天"]),
        ("使用python3的foo_bar c++", ["使用", "python3", "的", "foo_bar"]),
        ("パン、々〆", ["パン", "々〆"]),
        ("ﾊﾟﾝとｶﾞｽ １２ａｂ", ["パン", "ンと", "とガ", "ガス", "12ab"]),
        ("か\u3099き", ["がき"]),  # a mark of its own, as macOS writes it
        ("สวัสดี", ["สว", "วั", "ัส", "สด", "ดี"]),
        ("ລາວ ខ្មែរ", ["ລາ", "າວ", "ខ្", "្ម", "មែ", "ែរ"]),
        ("བོད་ཡིག", ["བོ", "ོད", "ཡི", "ིག"]),
        ("大韓民國은 한국어 물", ["大韓", "韓民", "民國", "한국어"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("كِتَاب كتاب", ["كِتَاب", "كتاب"]),
        ("größe привет cafe\u0301s", ["größe", "привет", "caf\u00e9s"]),
        ("🎉 👍🎉", []),
    ],
)
def test_terms(text, expected):
    assert terms(text) == expected
    assert terms(unicodedata.normalize("NFD", text)) == terms(unicodedata.normalize("NFC", text))


def test_one_letter_words_are_left_out_by_default():
    assert terms("c is a é") == ["is"]
    assert terms("c is a é", shortest=1) == ["c", "is", "a", "é"]


def test_every_other_character_is_split_as_bm25s_splits_it():
    skipped = 0
    for character in map(chr, range(sys.maxunicode + 1)):
        category = unicodedata.category(character)
        if category[0] in "CM" and category != "Cf":
            continue
        normal = unicodedata.normalize("NFKC", character)
        if without_spaces(normal) or normal != character:
            skipped += 1
            continue
        text = f"ab{character}cd {character}{character} x"
        assert terms(text) == BM25S.findall(text), hex(ord(character))
    assert skipped < 130_000  # 98,000 ideographs, 11,172 syllables of Korean are not among them


def test_without_spaces():
    assert [t for t in ("", "a", "é", "한국어", "हिन्दी", "ー", "a天", "ไทย", "ｶ") if without_spaces(t)] == [
        "ー", "a天", "ไทย", "ｶ",
    ]  # fmt: skip


def test_bm25_is_bm25s_on_text_with_spaces():
    texts = [
        "The naïve café’s menu: 3.5 m² of text_with_underscores, e.g. C++ and R.",
        "Élan vital; größere Straßen; привет, мир! ΑΣ ας",
        "Nothing here — but “quotes”, §5, ½ and x² — is left out.",
    ]
    queries = ["cafés of the naïve", "STRASSEN größer", "x² quote", "R"]
    kwargs = {"stopwords": "en", "stemmer": Stemmer.Stemmer("english"), "show_progress": False}
    plain = bm25s.BM25(method="lucene", k1=0.9, b=0.4)
    plain.index(bm25s.tokenize(texts, return_ids=False, **kwargs), show_progress=False)
    ids = ["a", "b", "c"]
    bm25 = BM25(Texts(ids, texts))
    run = bm25.search(Texts(queries, queries), 3)
    asked = bm25s.tokenize(queries, return_ids=False, **kwargs)
    for query, words in zip(queries, asked, strict=True):
        known = [word for word in words if word in plain.vocab_dict]
        scores = plain.get_scores(known).tolist() if known else []
        assert run[query] == {i: s for i, s in zip(ids, scores, strict=False) if s > 0}
    assert bm25.bigram_passages == 0


def test_bm25_finds_text_without_spaces():
    passages = [
        "企鹅生活在南极",
        "大熊猫住在四川",
        "ペンギンは南極に住む",
        "นกเพนกวินอยู่ขั้วโลกใต้",
        "the penguin",
    ]
    queries = ["熊猫吃什么", "ﾍﾟﾝｷﾞﾝ", "เพนกวิน", "penguins"]
    bm25 = BM25(Texts(list("abcde"), passages))
    run = bm25.search(Texts(queries, queries), 5)
    assert [next(iter(run[query])) for query in queries] == ["b", "c", "d", "e"]
    assert bm25.bigram_passages == 4


def test_queries_without_hits_are_counted_and_told():
    passages = Texts(["a", "b"], ["the wing of a plane", "a flow"])
    queries = Texts(["q1", "q2", "q3"], ["C++", "wing", "🎉"])
    run = BM25(passages).search(queries, 5)
    with pytest.warns(UserWarning, match="2 of 3 queries, 'q1'"):
        assert without_hits(run) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert without_hits({"q2": run["q2"]}) == 0
