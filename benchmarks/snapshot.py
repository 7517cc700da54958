"""Pin the numbers that a change of the code must not change, and compare two such snapshots.

    python benchmarks/snapshot.py take FOLDER [--home HOME]   # CSVs of the book in HOME, three corpora, the JSON contracts
    python benchmarks/snapshot.py compare BEFORE AFTER        # every number that differs by more than 0.00005

``take`` calls the command line only, so that it works with the code of any version. The three corpora are made from the
docstrings of networkx: one with queries and judgements, one with triples, one with passages alone.
"""

from __future__ import annotations

import argparse
import ast
import csv
import gzip
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TOLERANCE = 0.00005
IGNORED = re.compile(
    r"seconds|bytes|identity|version|date|folder|model_dir|source|\bpage\b|fingerprint|run_ids?|"
    r"bench|machine|python|path"
)
"""Keys whose values depend on the clock, the machine, or names of files."""


def docstrings(package: str, most: int) -> Iterator[tuple[str, str, str]]:
    """Yield (id, first line, rest) of the docstrings of a package's functions, without importing it."""
    spec = importlib.util.find_spec(package)
    assert spec and spec.origin
    root = Path(spec.origin).parent
    seen: set[str] = set()
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.FunctionDef) or not (text := ast.get_docstring(node)):
                continue
            first, _, rest = text.partition("\n")
            rest = " ".join(rest.split())
            docid = f"{'.'.join(path.relative_to(root).with_suffix('').parts)}.{node.name}"
            if len(first.split()) < 4 or len(rest.split()) < 20 or first in seen or docid in seen:
                continue
            seen |= {first, docid}
            yield docid, " ".join(first.split()), rest
            if len(seen) >= 2 * most:
                return


def write_corpora(folder: Path) -> list[Path]:
    """Write three small collections in BEIR's layout below ``folder``."""
    found = list(docstrings("networkx", 240))
    judged, triples, alone = (folder / name for name in ("judged", "triples", "passages"))
    for place in (judged, triples, alone):
        place.mkdir(parents=True)
        rows = (json.dumps({"_id": d, "title": "", "text": text}) + "\n" for d, _, text in found)
        (place / "corpus.jsonl").write_text("".join(rows), "utf-8")
    for place in (judged, triples):
        rows = (json.dumps({"_id": f"q{n}", "text": q}) + "\n" for n, (_, q, _) in enumerate(found))
        (place / "queries.jsonl").write_text("".join(rows), "utf-8")
        (place / "qrels").mkdir()
    header = "query-id\tcorpus-id\tscore\n"
    lines = [f"q{n}\t{docid}\t1\n" for n, (docid, _, _) in enumerate(found)]
    (judged / "qrels" / "test.tsv").write_text(header + "".join(lines), "utf-8")
    for name, part in (("train", lines[:120]), ("dev", lines[120:180]), ("test", lines[180:])):
        (triples / "qrels" / f"{name}.tsv").write_text(header + "".join(part), "utf-8")
    rows = (f"q{n}\t{found[n][0]}\t{found[(n * 7 + 31) % len(found)][0]}\n" for n in range(120))
    (triples / "triples.tsv").write_text("".join(rows), "utf-8")
    return [judged, triples, alone]


def call(*arguments: str, cwd: Path) -> dict[str, Any]:
    """Return the JSON object that a command prints."""
    command = [sys.executable, "-m", "adaptive_margins.cli", *arguments, "--json"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(arguments)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout)


def take(folder: Path, home: Path) -> None:
    """Write a snapshot: CSVs of a finished home, and what the commands print for three corpora."""
    folder.mkdir(parents=True)
    data = home / "book" / "_executed" / "data"
    if not data.is_dir():
        sys.exit(f"{data} does not exist; run `adaptive-margins reproduce` there first")
    for path in sorted(data.glob("*.csv")):
        shutil.copy(path, folder / path.name)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        for corpus in write_corpora(work):
            kind = corpus.name
            output = work / f"{kind}.encoder"
            options = ["--output", output.name, "--triples", "96"]
            report = call("train", kind, *options, cwd=work)
            _write(folder / f"{kind}.train.json", report)
            training = json.loads((output / "training.json").read_text("utf-8"))
            _write(folder / f"{kind}.training.json", training)
            for run in sorted((output / "runs").glob("*.gz")):
                text = gzip.decompress(run.read_bytes())
                (folder / f"{kind}.{run.name.removesuffix('.gz')}").write_bytes(text)
        for mode in ("full", "rerank"):
            options = ["--model", "minilm", "--mode", mode, "--per-query"]
            options += ["--run-out", f"{mode}.run"]
            _write(folder / f"evaluate.{mode}.json", call("evaluate", "judged", *options, cwd=work))
            shutil.copy(work / f"{mode}.run", folder / f"evaluate.{mode}.run")
        qrels = work / "qrels.txt"
        judgements = (work / "judged" / "qrels" / "test.tsv").read_text("utf-8").splitlines()[1:]
        rows = (line.split("\t") for line in judgements)
        qrels.write_text("".join(f"{q} 0 {d} {grade}\n" for q, d, grade in rows), "utf-8")
        options = ["--qrels", "qrels.txt", "full.run", "rerank.run", "--per-query"]
        _write(folder / "compare.json", call("compare", *options, cwd=work))


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", "utf-8")


def values(path: Path) -> dict[str, Any]:
    """Return every value of a file of a snapshot, by where it stands."""
    if path.suffix == ".json":
        return dict(_leaves("", json.loads(path.read_text("utf-8"))))
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        return {
            f"{number}.{key}": value
            for number, row in enumerate(rows, start=2)
            for key, value in row.items()
            if not IGNORED.search(key)
        }
    found = {}
    for line in path.read_text("utf-8").splitlines():
        qid, _, docid, rank, score, _ = line.split()
        found[f"{qid}.{docid}.rank"], found[f"{qid}.{docid}.score"] = rank, score
    return found


def _leaves(where: str, value: Any) -> Iterator[tuple[str, Any]]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in pairs:
        if IGNORED.search(str(key)):
            continue
        if isinstance(inner, dict | list):
            yield from _leaves(f"{where}{key}.", inner)
        else:
            yield f"{where}{key}", inner


def same(a: Any, b: Any) -> bool:
    """Whether two values are equal, numbers up to the tolerance."""
    try:
        return abs(float(a) - float(b)) <= TOLERANCE or str(a) == str(b)
    except (TypeError, ValueError):
        return str(a) == str(b)


def compare(before: Path, after: Path) -> int:
    """Print what differs between two snapshots, a line a value; return how many values do."""
    names = {p.name for p in before.iterdir()} | {p.name for p in after.iterdir()}
    differing = 0
    for name in sorted(names):
        if not all((place / name).is_file() for place in (before, after)):
            print(f"{name}: only in {before if (before / name).is_file() else after}")
            differing += 1
            continue
        old, new = values(before / name), values(after / name)
        found = [k for k in old if k not in new or not same(old[k], new[k])]
        added = [k for k in new if k not in old]
        print(f"{name}: {len(old)} values, {len(found)} differ, {len(added)} new")
        for key in found:
            print(f"  {key}: {old[key]} -> {new.get(key, '(gone)')}")
        differing += len(found)
    return differing


def main() -> None:
    """Take a snapshot, or compare two."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    taking = commands.add_parser("take")
    taking.add_argument("folder", type=Path)
    taking.add_argument("--home", type=Path, default=Path.cwd())
    comparing = commands.add_parser("compare")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "take":
        take(arguments.folder, arguments.home)
    elif compare(arguments.before, arguments.after):
        sys.exit(1)


if __name__ == "__main__":
    main()
