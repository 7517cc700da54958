"""PyDocs: a test collection made of the docstrings of installed Python packages.

A query is the summary sentence of a docstring, its passage is the rest. The source files are read
with `ast`; no scanned package is imported. What the rules below are, and why, is said where they
are applied; the data sheet of the book says it for readers.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import importlib.metadata
import importlib.util
import math
import os
import platform
import re
import sysconfig
import textwrap
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import Stemmer
from bm25s.stopwords import STOPWORDS_EN
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from adaptive_margins.data.collection import Collection, Texts
from adaptive_margins.data.trec import Qrels

RULES = 1
"""Raised by hand whenever the same packages would give another collection: texts, qrels, negatives or triples."""
QUERY_WORDS = (4, 30)
"""Fewest and most words of a query."""
MIN_PASSAGE_WORDS = 20
"""Fewest words of a passage."""
MIN_PROSE_WORDS = 10
"""Fewest words that a docstring has beside its summary and its lists of parameters and results. Many
methods of estimators have no more than "X: training data. y: ignored.", which answers nothing."""
MAX_ANSWERS = 8
"""A query that more passages than this answer (grade ≥ 2) asks for nothing in particular; it is
dropped, its passages stay."""
SAME_PASSAGE = 0.9
"""Jaccard similarity of word trigrams from which on two passages are one."""
NEAR_QUERY = 0.8
"""Jaccard similarity of stemmed content words from which on two queries are near-identical."""
OWN, NEAR, NEIGHBOUR = 3, 2, 1
"""Grades: the rest of the query's own docstring; the rest of a docstring whose summary is
near-identical; what its docstring names under "See Also"."""

_SKIPPED_FOLDERS = {
    # Tests, byte code, installed packages, and the programs within the standard library;
    *("test", "tests", "testing", "__pycache__", "site-packages", "dist-packages"),
    *("idlelib", "lib2to3", "turtledemo"),
    # copies of other people's packages.
    *("_lib", "_vendor", "_vendored", "vendor", "vendored", "extern", "externals", "third_party"),
}


def build_pydocs(
    packages: Sequence[str],
    *,
    seed: int,
    validation: int,
    test: int,
    max_passages: int | None,
    max_words: int,
) -> Collection:
    """Build the collection from installed packages; the same versions give the same bytes.

    Args:
        packages: top-level import names; "stdlib" is the running Python's standard library.
        seed: decides ids, subsample and split.
        validation: least number of queries of the set "validation".
        test: least number of queries of "test1", and of "test2". The rest is "train".
        max_passages: keep at most this many (whole connected components are left out).
        max_words: passages are cut after this many words.

    Near-identical passages become one passage, and queries of the same content words in the same
    order one query, which all their passages answer (grade 3). A near-identical query differs in a
    word that may be decisive ("encode", "decode") or not ("by", "via"), so the passage of one gets
    grade 2 for the other: no correct answer counts as wrong. Passages that a docstring names under
    "See Also" have grade 1: its authors call them related, but they document something else.
    Queries that share a passage of grade 2 or 3 go into the same set, near-identical ones therefore
    too.

    Raises:
        ValueError: a package that is not installed, or too few queries for the sets asked for.
    """
    if isinstance(packages, str) or not packages:
        raise ValueError(f"packages must be a non-empty list of names, not {packages!r}")
    if validation < 1 or test < 1:
        raise ValueError(f"validation and test must be at least 1, not {validation} and {test}")
    if max_words < MIN_PASSAGE_WORDS:
        raise ValueError(f"max_words must be at least {MIN_PASSAGE_WORDS}, not {max_words}")
    names = sorted(set(packages))
    roots = {name: _root(name) for name in names}
    docs = [doc for name in names for doc in _scan(name, roots[name], max_words)]

    # Passages and queries are numbered; a number stands for all the texts that count as the same.
    passage_of = _connected(
        len(docs), similar_pairs([_trigrams(d.passage) for d in docs], SAME_PASSAGE)
    )
    forms = {form: n for n, form in enumerate(dict.fromkeys(normal_form(d.query) for d in docs))}
    query_of = [forms[normal_form(doc.query)] for doc in docs]
    passages = _representatives(passage_of, [doc.passage for doc in docs])
    queries = _representatives(query_of, [doc.query for doc in docs])

    judged: list[dict[int, int]] = [{} for _ in queries]  # passage → grade
    for query, neighbours in zip(query_of, _see_also(docs), strict=True):
        judged[query].update((passage_of[i], NEIGHBOUR) for i in neighbours)
    own: list[set[int]] = [set() for _ in queries]
    for query, passage in zip(query_of, passage_of, strict=True):
        own[query].add(passage)
    for one, other in similar_pairs([frozenset(form) for form in forms], NEAR_QUERY):
        judged[one].update(dict.fromkeys(own[other], NEAR))
        judged[other].update(dict.fromkeys(own[one], NEAR))
    for query, found in enumerate(own):
        judged[query].update(dict.fromkeys(found, OWN))
    answers = [sum(grade >= NEAR for grade in grades.values()) for grades in judged]
    asked = [query for query, number in enumerate(answers) if number <= MAX_ANSWERS]

    def position(text: str) -> str:  # an order that tells nothing of package and module
        return hashlib.sha256(f"{seed} {text}".encode()).hexdigest()

    # What must stay together: a query with the passages that answer it, and so, near-identical
    # queries with each other.
    offset = len(passages)
    links = [(p, offset + q) for q in asked for p, grade in judged[q].items() if grade >= NEAR]
    part_of = _connected(offset + len(queries), links)
    parts: dict[int, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for p in range(offset):
        parts[part_of[p]][0].append(p)
    for q in asked:
        parts[part_of[offset + q]][1].append(q)
    order = sorted(parts.values(), key=lambda part: min(position(passages[p]) for p in part[0]))
    if max_passages is not None:
        total = np.cumsum([len(part[0]) for part in order])
        order = order[: int(np.searchsorted(total, max_passages, side="right"))]
    kept = sorted((p for part in order for p in part[0]), key=lambda p: position(passages[p]))
    docids = {p: f"d{number:05d}" for number, p in enumerate(kept, start=1)}
    asked = sorted((q for part in order for q in part[1]), key=lambda q: position(queries[q]))
    qids = {q: f"q{number:05d}" for number, q in enumerate(asked, start=1)}

    wanted = {"validation": validation, "test1": test, "test2": test}
    split: dict[str, list[int]] = {name: [] for name in ("train", *wanted)}
    for _, members in order:
        name = next((name for name, n in wanted.items() if len(split[name]) < n), "train")
        split[name] += members
    if not split["train"] or len(split["test2"]) < test:
        raise ValueError(
            f"too few queries: {', '.join(names)} give {len(asked)}, but validation {validation},"
            f" test1 {test}, test2 {test} and at least one to train on are wanted; name more"
            " packages, or raise max_passages"
        )
    sets: dict[str, Texts] = {}
    qrels: dict[str, Qrels] = {}
    for name, members in split.items():
        members.sort(key=qids.__getitem__)
        sets[name] = Texts([qids[q] for q in members], [queries[q] for q in members])
        qrels[name] = {
            qids[q]: dict(sorted((docids[p], g) for p, g in judged[q].items() if p in docids))
            for q in members
        }
    return Collection(
        name="PyDocs",
        passages=Texts(list(docids.values()), [passages[p] for p in kept]),
        queries=sets,
        qrels=qrels,
        sources=source_versions(names),
    )


# ── Reading packages ──────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Documented:
    """A public function, method or class whose docstring gives a query and a passage."""

    package: str
    module: str
    qualname: str
    query: str
    passage: str
    see_also: tuple[str, ...]

    @property
    def full_name(self) -> str:
        """Module and qualified name."""
        return f"{self.module}.{self.qualname}"

    @property
    def owner(self) -> str:
        """The class that a method belongs to, "" for others."""
        return self.qualname.rpartition(".")[0]


def _root(package: str) -> Path:
    """The folder, or the file, that a package's source is in."""
    if package == "stdlib":
        return Path(sysconfig.get_path("stdlib"))
    try:
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
    except ValueError:  # a module without a spec
        spec = None
    if spec is None:
        raise ValueError(f"package {package!r} is not installed; try: pip install {package}")
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    if spec.origin is None or not spec.origin.endswith(".py"):
        raise ValueError(f"package {package!r} has no Python source to read docstrings from")
    return Path(spec.origin)


def source_versions(packages: Iterable[str]) -> dict[str, str]:
    """Distribution → version of each top-level package ("unknown" where it has none), and Python's."""
    versions = {"python": platform.python_version()}
    distributions = importlib.metadata.packages_distributions()
    for package in packages:
        if package != "stdlib":
            for name in sorted(distributions.get(package, [])) or [package]:
                try:
                    versions[name] = importlib.metadata.version(name)
                except importlib.metadata.PackageNotFoundError:
                    versions[name] = "unknown"
    return versions


def _scan(package: str, root: Path, max_words: int) -> Iterator[Documented]:
    """All usable docstrings of a package, in an order that no file system decides."""
    files: list[tuple[str, Path]] = [(package, root)] if root.is_file() else []
    top = () if package == "stdlib" else (package,)
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = set(subfolders) - _SKIPPED_FOLDERS
        for name in names:
            if not re.fullmatch(r"(?!test_|conftest).*\.py", name):
                continue
            path = Path(folder, name)
            parts = top + path.relative_to(root).with_suffix("").parts
            files.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    files.sort()
    for module, path in files:
        for qualname, kind, docstring in _docstrings(path):
            if parsed := parse_docstring(docstring, qualname.rpartition(".")[2], kind, max_words):
                yield Documented(package, module, qualname, *parsed)


def _docstrings(path: Path) -> list[tuple[str, str, str]]:
    """(qualified name, kind, docstring) of the public functions, methods and classes of a file."""
    source = path.read_bytes()
    collecting = gc.isenabled()
    gc.disable()  # a syntax tree is many small objects and no garbage: a third of the time
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(source)
    except (SyntaxError, ValueError):  # templates and files for other Python versions
        return []
    finally:
        if collecting:
            gc.enable()

    found: dict[str, tuple[str, str, str]] = {}

    def visit(body: list[ast.stmt], prefix: str, in_class: bool) -> None:
        for node in body:
            if isinstance(node, ast.If):  # definitions under a condition are public too
                visit(node.body + node.orelse, prefix, in_class)
            elif isinstance(node, ast.Try):
                visit(node.body + [s for h in node.handlers for s in h.body], prefix, in_class)
            elif isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                if node.name.startswith("_"):
                    continue
                qualname = prefix + node.name
                is_class = isinstance(node, ast.ClassDef)
                kind = "class" if is_class else "method" if in_class else "function"
                if docstring := ast.get_docstring(node):
                    found.setdefault(qualname, (qualname, kind, docstring))
                if is_class:
                    visit(node.body, qualname + ".", True)

    visit(tree.body, "", False)
    return list(found.values())


# ── From a docstring to a query and a passage ─────────────────────────────────────────────────

# The parts of a docstring in the order in which a passage shows them: what somebody wrote about
# this object first, field by field descriptions after it. The encoder may read no more than the
# first 32 tokens, and most numpydoc bodies begin with near-identical parameter lists.
_ORDER = {
    **dict.fromkeys(("return", "returns", "yield", "yields"), 1),
    **dict.fromkeys(("note", "notes", "warning", "warnings"), 2),
    **dict.fromkeys(("parameters", "other parameters", "args", "arguments", "attributes"), 3),
    **dict.fromkeys(("keyword args", "keyword arguments", "receives", "raises", "warns"), 3),
    **dict.fromkeys(("methods", "properties"), 3),
    **dict.fromkeys(("example", "examples"), 4),
    **dict.fromkeys(("see also", "reference", "references"), None),  # not part of the passage
}
_PROSE, _FIELDS = {0, 2}, {1, 3}
_KEPT_DIRECTIVES = {"note", "warning", "important", "tip", "hint", "caution", "attention", "danger"}


def parse_docstring(
    docstring: str, name: str, kind: str, max_words: int
) -> tuple[str, str, tuple[str, ...]] | None:
    """Query, passage and "See Also" names of a docstring; None where it does not give both texts.

    Args:
        docstring: with its indentation cleaned, as `ast.get_docstring` does.
        name: the documented object's own name, masked by ``kind`` in both texts.
        kind: "function", "method" or "class".
        max_words: passages are cut after this many words.
    """
    sections = _sections(_without_code(docstring.splitlines()))
    lead, *paragraphs = _paragraphs(sections[0][1]) or [""]
    if paragraphs and re.fullmatch(r"[\w.]+\(.*\)(\s*->.*)?", lead):  # a signature comes first
        lead, *paragraphs = paragraphs
    summary, rest = _first_sentence(lead)
    query = _plain(summary, name, kind).rstrip(".:; ")
    content = set(normal_form(query)) - {"function", "method", "class"}
    if not QUERY_WORDS[0] <= len(query.split()) <= QUERY_WORDS[1] or len(content) < 2:
        return None

    see_also: dict[str, None] = {}  # a set that keeps its order
    parts = [(0, text) for text in [rest, *paragraphs]]
    for title, lines in sections[1:]:
        rank = _ORDER.get(title, 0)
        if title == "see also":
            see_also |= dict.fromkeys(_names(lines))
        elif rank is not None:
            texts = _fields(lines, named=rank == 3) if rank in _FIELDS else _paragraphs(lines)
            parts += [(rank, text) for text in texts]
    parts.sort(key=lambda part: part[0])

    prose = _plain("\n".join(text for rank, text in parts if rank in _PROSE), name, kind).split()
    if len(prose) < MIN_PROSE_WORDS:
        return None
    words = _plain("\n".join(text for _, text in parts), name, kind).split()
    if len(words) < MIN_PASSAGE_WORDS:
        return None
    return query, " ".join(words[:max_words]), tuple(see_also)


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _without_code(lines: list[str]) -> list[str]:
    """Drop doctests with their output, literal blocks, tables' rules, comments and directives.

    Of notes, warnings and the like the text stays; "seealso" becomes a section.
    """
    kept: list[str] = []
    i = 0
    while i < len(lines):
        line = re.sub(r"^(\s*)(?:[-*+•]|#\.)\s+", r"\1  ", lines[i])  # without a bullet
        text = line.strip()
        i += 1
        if text.startswith(">>>"):
            while i < len(lines) and lines[i].strip():
                i += 1
            continue
        if field := re.match(r":(\w+)\s*([^:`]*):(?!`)\s*(.*)", text):  # ":param x: what it is"
            kept.append("")
            if field[3] and field[1] not in ("type", "rtype"):
                kept.append(f"{field[2]}: {field[3]}" if field[2] else field[3])
            continue
        directive = re.match(r"\.\.(?:\s+([\w-]+)::|\s|$)\s*(.*)", text)
        if directive:
            kind, argument = directive.groups()
            block = [argument]
            while i < len(lines) and (not lines[i].strip() or _indent(lines[i]) > _indent(line)):
                block.append(lines[i])
                i += 1
            if kind == "seealso":
                kept += ["See Also", "--------", *(t.strip() for t in block), ""]
            elif kind in _KEPT_DIRECTIVES:
                indent = " " * _indent(line)
                rest = textwrap.dedent("\n".join(block[1:])).splitlines()
                kept += ["", *(indent + t for t in [argument, *_without_code(rest)]), ""]
            continue
        if text.endswith("::"):
            kept.append(line.replace("::", ":"))
            while i < len(lines) and (not lines[i].strip() or _indent(lines[i]) > _indent(line)):
                i += 1
            continue
        kept.append(line)
    return kept


def _sections(lines: list[str]) -> list[tuple[str, list[str]]]:
    """Split at numpydoc ("Notes" over dashes) and Google ("Returns:") headings; titles lower case."""
    sections: list[tuple[str, list[str]]] = [("", [])]
    for i, line in enumerate(lines):
        following = lines[i + 1].strip() if i + 1 < len(lines) else ""
        google = re.fullmatch(r"([A-Z][A-Za-z ]+):{1,2}", line)
        if line[:1].strip() and re.fullmatch(r"-{3,}|={3,}|~{3,}|\^{3,}", following):
            sections.append((line.strip(" :").lower(), []))
        elif google and google[1].lower() in _ORDER:
            sections.append((google[1].lower(), []))
        elif not re.fullmatch(r"[\s=~^|+*#`.:_-]{3,}", line):  # a heading's or a table's rule
            sections[-1][1].append(line)
    return sections


def _paragraphs(lines: list[str]) -> list[str]:
    return [" ".join(p.split()) for p in re.split(r"\n\s*\n", "\n".join(lines)) if p.strip()]


def _fields(lines: list[str], *, named: bool) -> list[str]:
    """The descriptions of a field list, with the fields' names but without their types."""
    fields: list[list[str]] = []
    for line in textwrap.dedent("\n".join(lines)).splitlines():
        if not line.strip():
            continue
        if line[0] == " ":
            if fields:
                fields[-1].append(line.strip())
            continue
        google = re.match(r"([\w*][\w*., ]*?)(?: ?\([^)]*\))?:\s+(.+)", line)
        if re.search(r"\s:(\s|$)", line):  # numpydoc: "name : type"
            fields.append([line.split(" :")[0].strip() + ":" if named else ""])
        elif google:
            fields.append([google[1] + ":" if named else "", google[2]])
        elif len(line.split()) > 4 or line.endswith("."):  # prose where a field was expected
            fields.append(["", line])
        else:  # a name or a type alone
            fields.append([line + ":" if named else ""])
    return [" ".join(filter(None, field)) for field in fields if len(field) > 1]


def _names(lines: list[str]) -> list[str]:
    """The names of a "See Also" section: "a, b : why", ":func:`a`", or one a line."""
    names: list[str] = []
    for line in lines:
        marked = re.findall(r"`+~?!?([\w.]+)(?:\(\))?`+", line)
        if marked:
            names += marked
        elif line[:1].strip():
            names += [n.strip(" ~`()*") for n in re.split(r"\s:(?:\s|$)|:\s", line)[0].split(",")]
    return [name for name in names if re.fullmatch(r"[A-Za-z_][\w.]*", name)]


_SENTENCE_END = re.compile(
    r"(?<!\be\.g)(?<!\bi\.e)(?<!\betc)(?<!\bvs)(?<!\bcf)(?<!\bal)[.!?]['\")`]*(?=\s+[^a-z\s]|\s*$)"
)


def _first_sentence(paragraph: str) -> tuple[str, str]:
    end = _SENTENCE_END.search(paragraph)
    return (paragraph[: end.end()], paragraph[end.end() :]) if end else (paragraph, "")


_MARKUP = [
    (re.compile(r"Read more in the :ref:`[^`]*`\.?"), " "),  # a link, and the first words of many
    (re.compile(r":ref:`[^`<]*`"), " "),  # a label, whose title is elsewhere
    (re.compile(r"%\([^)]*\)s"), " "),  # what a decorator would fill in
    (re.compile(r":math:`([^`]*)`"), r"\1"),
    (re.compile(r":[\w:+.-]+:`~([^`<>]*\.)?([^`<>.]+)`"), r"\2"),  # :func:`~a.b` is shown as b
    (re.compile(r":[\w:+.-]+:`!?([^`<>]+?)\s*(?:<[^`>]*>)?`"), r"\1"),
    (re.compile(r"`([^`<>]+?)\s*<[^`>]*>`_*"), r"\1"),  # links
    (re.compile(r"\s?\[[\w.#*]+\]_"), ""),  # citations
    # What is left around them.
    (re.compile(r"\s?\((?:see|cf\.)\s*\)|[,;]? see:?\s*(?=\.(?:\s|$))", re.I), ""),
    (re.compile(r"`+~?([^`]*)`+_*"), r"\1"),
    (re.compile(r"(?<![\w*'\"])\*{1,2}(\w(?:[^*'\"]*\w)?)\*{1,2}(?![\w*])"), r"\1"),
    (re.compile(r"<?https?://[^\s>]+>?"), " "),
    (re.compile(r"[\\$|]"), " "),
    (re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]"), " "),  # "\a" in a docstring is a bell
]


def _plain(text: str, name: str, kind: str) -> str:
    """Mask the object's own name, strip reST markup, and put everything on one line."""
    text = mask_name(text, name, kind)
    for pattern, replacement in _MARKUP:
        text = pattern.sub(replacement, text)
    text = re.sub(rf"\b{kind} {kind}\b", kind, text)  # "the HermiteE class"
    return " ".join(text.split())


def mask_name(text: str, name: str, kind: str) -> str:
    """Replace an object's own name by its kind wherever it is code, so that it gives nothing away.

    Code is: in backticks, qualified ("np.sort", "sort.axis"), called ("sort(a)"), or an identifier
    that no word of English looks like (with an underscore, a digit, or capitals within). The plain
    word "sort" stays.
    """
    if name not in text:
        return text
    own = rf"(?<![\w.])(?:[A-Za-z_]\w*\.)*{name}(?!\w)"  # with what qualifies it
    if re.search(r"[_0-9]|[a-z][A-Z]|[A-Z]{2}[a-z]", name):
        return re.sub(own, kind, text)
    marked = re.sub(r"`+[^`]+`+", lambda match: re.sub(own, kind, match[0]), text)
    code = rf"(?<![\w.])(?:(?:[A-Za-z_]\w*\.)+{name}(?!\w)|{name}(?=\(|\.[A-Za-z_]))"
    return re.sub(code, kind, marked)


# ── What counts as the same ───────────────────────────────────────────────────────────────────

_stem = lru_cache(maxsize=None)(Stemmer.Stemmer("english").stemWord)
_STOP_WORDS = frozenset(STOPWORDS_EN)


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def normal_form(query: str) -> tuple[str, ...]:
    """The stemmed content words of a query, in their order."""
    return tuple(_stem(word) for word in _words(query) if word not in _STOP_WORDS)


def _trigrams(passage: str) -> frozenset[tuple[str, ...]]:
    words = _words(passage)
    return frozenset(zip(words, words[1:], words[2:], strict=False))


def similar_pairs(sets: Sequence[frozenset[Any]], threshold: float) -> list[tuple[int, int]]:
    """All pairs of positions whose sets have a Jaccard similarity of at least ``threshold``.

    Such sets share one of the ⌊(1 − threshold) n⌋ + 1 rarest members of either, n being its size
    (prefix filtering: Chaudhuri, Ganti and Kaushik, ICDE 2006), so only pairs that do are compared.
    """
    frequency = Counter(member for members in sets for member in members)
    by_rarity = sorted(frequency, key=lambda member: (frequency[member], member))
    number = {member: column for column, member in enumerate(by_rarity)}

    def matrix(rows: list[list[int]]) -> sparse.csr_matrix:
        columns = np.array([column for row in rows for column in row], dtype=np.int64)
        starts = np.cumsum([0, *(len(row) for row in rows)])
        shape = (len(rows), len(number))
        return sparse.csr_matrix((np.ones(len(columns), dtype=np.int32), columns, starts), shape)

    rows = [sorted(number[member] for member in members) for members in sets]
    whole = matrix(rows)
    # The small number is for products such as 0.9 × 70, which floats put above 63.
    prefix = matrix([row[: len(row) - math.ceil(threshold * len(row) - 1e-9) + 1] for row in rows])
    left, right = sparse.triu(prefix @ prefix.T, k=1).nonzero()
    shared = np.asarray(whole[left].multiply(whole[right]).sum(axis=1)).ravel()
    size = np.array([len(row) for row in rows])
    same = shared >= threshold * (size[left] + size[right] - shared) - 1e-9
    return sorted(zip(left[same].tolist(), right[same].tolist(), strict=True))


def _connected(n: int, links: Sequence[tuple[int, int]]) -> list[int]:
    """For each of ``n`` nodes the number of its connected component."""
    rows, columns = np.array(links, dtype=np.int64).reshape(-1, 2).T
    graph = sparse.coo_matrix((np.ones(len(links)), (rows, columns)), (n, n))
    return connected_components(graph, directed=False)[1].tolist()


def _representatives(labels: Sequence[int], texts: Sequence[str]) -> list[str]:
    """For each label its most frequent text; of several, the first in the alphabet."""
    groups: dict[int, Counter[str]] = defaultdict(Counter)
    for label, text in zip(labels, texts, strict=True):
        groups[label][text] += 1
    return [min(groups[g], key=lambda t: (-groups[g][t], t)) for g in range(len(groups))]


def _see_also(docs: Sequence[Documented]) -> list[list[int]]:
    """For each object, the objects of its package that its "See Also" names.

    A name fits an object with the same last part whose full name has the other parts in this order
    (packages re-export: "numpy.sort" is numpy._core.fromnumeric.sort). Of several that fit, the one
    of exactly this name wins, then those of the same class, then those of the same module; a name
    that still fits several is left.
    """
    by_name: dict[tuple[str, str], list[int]] = defaultdict(list)
    for i, doc in enumerate(docs):
        by_name[doc.package, doc.qualname.rpartition(".")[2]].append(i)
    result: list[list[int]] = []
    for i, doc in enumerate(docs):
        found: list[int] = []
        for name in doc.see_also:
            parts = name.removeprefix("np.").split(".")
            same = [j for j in by_name[doc.package, parts[-1]] if j != i]
            fitting = [j for j in same if _in_order(parts, docs[j].full_name.split("."))]
            exact = [j for j in fitting if docs[j].full_name == name]
            here = [j for j in fitting if docs[j].module == doc.module]
            siblings = [j for j in here if docs[j].owner == doc.owner]
            scopes = (fitting, exact, siblings, here)
            found += next((scope for scope in scopes if len(scope) == 1), [])
        result.append(found)
    return result


def _in_order(parts: Sequence[str], path: Iterable[str]) -> bool:
    remaining = iter(path)
    return all(part in remaining for part in parts)
