"""Words of a text, and its terms: words, or bigrams in scripts without spaces between words."""

from __future__ import annotations

import re
import unicodedata

import regex
from bm25s.stopwords import STOPWORDS_EN

STOP_WORDS = frozenset(STOPWORDS_EN)
_SCRIPTS = (
    "Han Hiragana Katakana Bopomofo Yi Thai Lao Khmer Myanmar Tibetan Tai_Le New_Tai_Lue Tai_Tham"
    " Tai_Viet Javanese Balinese"
)
_SCRIPT = "".join(rf"\p{{Script={script}}}" for script in _SCRIPTS.split())
_SCRIPT += "〆ー\u3099\u309aｰﾞﾟ"  # shared by scripts: marks of sound and length, and an ideograph
_FORMS = r"\p{Block=Halfwidth_And_Fullwidth_Forms}\p{Block=CJK_Compatibility}"
_WITHOUT_SPACES = regex.compile(rf"(?V1)([[{_SCRIPT}]&&[\p{{L}}\p{{N}}\p{{M}}]]+)")
_VARIANTS = regex.compile(rf"(?V1)[{_SCRIPT}{_FORMS}]+")
_WORD = regex.compile(r"[\p{L}\p{N}_][\p{L}\p{N}\p{M}_]*")  # Hindi has marks (M) within words
# Neither marks nor those scripts are among these: Latin, Greek, Cyrillic and symbols, for speed.
_PLAIN = re.compile(r"[\x00-\u02df\u0370-\u0482\u048a-\u0590\u2000-\u20cf\u2100-\u2bff]*")
_PLAIN_WORD = re.compile(r"\w+")


def words_of(text: str) -> list[str]:
    """Return the runs of letters and digits of a text, lower case."""
    return re.findall(r"[^\W_]+", text.lower())


def without_spaces(text: str) -> bool:
    """Return whether a text has letters of a script without spaces (Chinese, Thai, …)."""
    return not _PLAIN.fullmatch(text) and bool(_WITHOUT_SPACES.search(text))


def terms(text: str, *, shortest: int = 2) -> list[str]:
    """Return a text's words of at least ``shortest`` characters, and bigrams, in their order.

    A word is a run of letters, digits, combining marks and underscores. Of a run of characters in a
    script without spaces (Chinese, Japanese, Thai, …; Korean has spaces) the terms are its
    overlapping bigrams, or its single character. Such characters and half- and full-width forms are
    normalised to NFKC, all others to NFC.
    """
    text = unicodedata.normalize("NFC", text)
    if _PLAIN.fullmatch(text):
        return [word for word in _PLAIN_WORD.findall(text) if len(word) >= shortest]
    text = _VARIANTS.sub(lambda found: unicodedata.normalize("NFKC", found[0]).lower(), text)
    found: list[str] = []
    for number, part in enumerate(_WITHOUT_SPACES.split(text)):  # every second one is a run
        if number % 2 == 0:
            found += [word for word in _WORD.findall(part) if len(word) >= shortest]
        elif len(part) == 1:
            found.append(part)
        else:
            found += [part[i : i + 2] for i in range(len(part) - 1)]
    return found
