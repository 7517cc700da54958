"""Docstrings of installed packages, read without importing them: a query and a passage each."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import sysconfig
import textwrap
import warnings
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import Stemmer

from adaptive_margins.data.text import DataError
from adaptive_margins.data.words import STOP_WORDS, words_of

QUERY_WORDS = (4, 30)
"""Fewest and most words of a query."""
MIN_PASSAGE_WORDS = 20
"""Fewest words of a passage."""
MIN_PROSE_WORDS = 10
"""Fewest words of a docstring outside of its summary and its lists of parameters and results. Many
methods of estimators have no more than "X: training data. y: ignored.", which answers nothing."""
_SKIPPED_FOLDERS = {
    # Tests, byte code, installed packages, and programs of the standard library;
    *("test", "tests", "testing", "__pycache__", "site-packages", "dist-packages"),
    *("idlelib", "lib2to3", "turtledemo"),
    # copies of other packages.
    *("_lib", "_vendor", "_vendored", "vendor", "vendored", "extern", "externals", "third_party"),
}


# ── Reading packages ──────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Documented:
    """A public function, method or class whose docstring has a query and a passage."""

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


def package_root(package: str) -> Path:
    """Return the folder or file of a package's source; DataError if there is none."""
    if package == "stdlib":
        return Path(sysconfig.get_path("stdlib"))
    try:
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
    except ValueError:  # a module without a spec
        spec = None
    if spec is None:
        raise DataError(f"package {package!r} is not installed; try: pip install {package}")
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    if spec.origin is None or not spec.origin.endswith(".py"):
        raise DataError(f"package {package!r} has no Python source to read docstrings from")
    return Path(spec.origin)


def scan(package: str, root: Path, max_words: int) -> Iterator[Documented]:
    """Yield all usable docstrings of a package, sorted by module."""
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
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(source)
    except (SyntaxError, ValueError):  # templates and files for other Python versions
        return []

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


# ── From a docstring to a query and a passage ─────────────────────────────────────────────────────

# Rank of each section in a passage: prose before lists of fields, because an encoder may read no
# more than 32 tokens, and most numpydoc bodies begin with near-identical parameter lists.
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
    """Return query, passage and "See Also" names of a docstring; None if a text is too short.

    Args:
        docstring: with its indentation cleaned, as `ast.get_docstring` does.
        name: the documented object's name, masked by ``kind`` in both texts.
        kind: "function", "method" or "class".
        max_words: passages are truncated after this many words.
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
    """Drop doctests, literal blocks, comments and directives, except the text of notes etc."""
    kept: list[str] = []
    rest = deque(lines)
    while rest:
        line = re.sub(r"^(\s*)(?:[-*+•]|#\.)\s+", r"\1  ", rest.popleft())  # without a bullet
        text = line.strip()
        if text.startswith(">>>"):
            while rest and rest[0].strip():
                rest.popleft()
        elif field := re.match(r":(\w+)\s*([^:`]*):(?!`)\s*(.*)", text):  # ":param x: what it is"
            kept.append("")
            if field[3] and field[1] not in ("type", "rtype"):
                kept.append(f"{field[2]}: {field[3]}" if field[2] else field[3])
        elif directive := re.match(r"\.\.(?:\s+([\w-]+)::|\s|$)\s*(.*)", text):
            kept += _directive(directive[1], directive[2], _block(rest, line), _indent(line))
        elif text.endswith("::"):
            kept.append(line.replace("::", ":"))
            _block(rest, line)
        else:
            kept.append(line)
    return kept


def _block(rest: deque[str], line: str) -> list[str]:
    """Remove and return the following lines that are blank or further indented than ``line``."""
    block = []
    while rest and (not rest[0].strip() or _indent(rest[0]) > _indent(line)):
        block.append(rest.popleft())
    return block


def _directive(kind: str | None, argument: str, block: list[str], indent: int) -> list[str]:
    """The lines that a reST directive is replaced by."""
    if kind == "seealso":
        return ["See Also", "--------", *(line.strip() for line in [argument, *block]), ""]
    if kind in _KEPT_DIRECTIVES:
        inner = _without_code(textwrap.dedent("\n".join(block)).splitlines())
        return ["", *(" " * indent + line for line in [argument, *inner]), ""]
    return []


def _sections(lines: list[str]) -> list[tuple[str, list[str]]]:
    """Split at numpydoc (title over dashes) and Google ("Returns:") headings; titles lower case."""
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
    """The descriptions of a field list, without types, and without names unless ``named``."""
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
    """Mask the object's name, strip reST markup, and put everything on one line."""
    text = mask_name(text, name, kind)
    for pattern, replacement in _MARKUP:
        text = pattern.sub(replacement, text)
    text = re.sub(rf"\b{kind} {kind}\b", kind, text)  # "the HermiteE class"
    return " ".join(text.split())


def mask_name(text: str, name: str, kind: str) -> str:
    """Replace an object's name by its kind wherever it is code.

    Code is in backticks, qualified ("np.sort", "sort.axis"), called ("sort(a)"), or no possible
    English word (with an underscore, a digit, or inner capitals). The plain word "sort" stays.
    """
    if name not in text:
        return text
    qualified = rf"(?<![\w.])(?:[A-Za-z_]\w*\.)*{name}(?!\w)"
    if re.search(r"[_0-9]|[a-z][A-Z]|[A-Z]{2}[a-z]", name):
        return re.sub(qualified, kind, text)
    marked = re.sub(r"`+[^`]+`+", lambda match: re.sub(qualified, kind, match[0]), text)
    code = rf"(?<![\w.])(?:(?:[A-Za-z_]\w*\.)+{name}(?!\w)|{name}(?=\(|\.[A-Za-z_]))"
    return re.sub(code, kind, marked)


_stem = lru_cache(maxsize=None)(Stemmer.Stemmer("english").stemWord)


def normal_form(query: str) -> tuple[str, ...]:
    """Return the stemmed content words of a query, in their order."""
    return tuple(_stem(word) for word in words_of(query) if word not in STOP_WORDS)
