"""Write manual pages as a folder in BEIR's layout: each page's one-line summary has to find it.

    apt install manpages-de                    # or -fr, -it, -es, …: pages that people translated
    python examples/man_pages.py /usr/share/man/de man-de
    adaptive-margins train man-de --output man-encoder

A passage is the beginning of a page's text; it is relevant to the summary of that page.
"""

from __future__ import annotations

import gzip
import json
import re
import sys
from pathlib import Path

MIN_WORDS, MAX_WORDS = 15, 120
_SECTION = re.compile(r'^\.S[Hh] "?(.*?)"?$', re.MULTILINE)
_ESCAPES = {r"\-": "-", r"\(aq": "'", r"\e": "\\", r"\~": " ", r"\ ": " "}
_ESCAPES |= dict.fromkeys([r"\&", r"\,", r"\/", r"\|"], "")
_FONT = re.compile(r"\\f(\(..|\[[^]]*\]|.)|\\s[-+]?\d")
_MARKED = re.compile(r"^\.(B|I|BR|RB|BI|IB|IR|RI|SM|TP|IP) ?")


def plain(roff: str) -> str:
    """The words of a part of a page, without roff's requests and escapes."""
    lines = []
    for line in roff.splitlines():
        line = _MARKED.sub("", line)
        if not line.startswith((".", "'")):
            lines.append(_FONT.sub("", line).replace('"', ""))
    text = " ".join(lines)
    for escape, meaning in _ESCAPES.items():
        text = text.replace(escape, meaning)
    return " ".join(text.split())


def parts(path: Path) -> tuple[str, str]:
    """A page's summary, and the beginning of the longest of the sections after it."""
    roff = gzip.decompress(path.read_bytes()).decode("utf-8", errors="replace")
    sections = _SECTION.split(roff)[2::2]  # whatever they are called: name, synopsis, description
    line = plain(sections[0]).partition(" - ")[2] if sections else ""
    description = max(map(plain, sections[1:4]), key=len, default="")
    return line, " ".join(description.split()[:MAX_WORDS])


def main() -> None:
    """Write corpus.jsonl, queries.jsonl and qrels/test.tsv."""
    source, folder = Path(sys.argv[1]), Path(sys.argv[2])
    (folder / "qrels").mkdir(parents=True)
    seen: set[str] = set()
    corpus, queries, qrels = [], [], ["query-id\tcorpus-id\tscore"]
    for path in sorted(source.glob("man*/*.gz")):
        name = path.name.removesuffix(".gz")
        line, description = parts(path)
        if len(description.split()) < MIN_WORDS or not line or {line, description} & seen:
            continue
        seen |= {line, description}
        corpus.append({"_id": name, "title": "", "text": description})
        queries.append({"_id": f"q-{name}", "text": line})
        qrels.append(f"q-{name}\t{name}\t1")
    for place, rows in (("corpus", corpus), ("queries", queries)):
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (folder / f"{place}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "qrels" / "test.tsv").write_text("\n".join(qrels) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
