"""A small collection of the same kinds as MS MARCO passage, registered with ir_datasets under ids of its own.

Written by the suite: passages and queries are made of a few English words, so that a query's words say which passages
answer it. Ids, files and types are like those of MS MARCO in ir_datasets: docids count the passages, the lists of TREC DL have no
scores, the judged queries are a part of all.
"""

# ruff: noqa: SIM905 (word lists are easier to read as text)

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

NOUNS = """river doctor engine garden lawyer window planet muscle bridge market teacher battery glacier kitchen vaccine
    harbor library protein senator camera forest kidney rocket village""".split()
VERBS = "grow move change heat store carry protect measure clean break repair count freeze burn mix join".split()
KINDS = "old small public cold electric common wild heavy modern deep rare quiet solar foreign young dry".split()
PLACES = (
    "city desert island school hospital valley office ocean factory mountain court station".split()
)
FUNCTION = "the a of in is are what how does do which and it when most can to with why".split()
VOCABULARY = [*FUNCTION, *NOUNS, *VERBS, *KINDS, *PLACES]
"""All words that occur, "café" apart, which tests the encoding."""

_QUERIES = [
    ("how does the {1} {0} {2}", (0, 1, 2)),
    ("what {0} can {2} in the {3}", (0, 2, 3)),
    ("why is a {1} {0} in the {3}", (0, 1, 3)),
    ("which {0} does {2}", (0, 2)),
]


@dataclass(frozen=True)
class Miniature:
    """Its ids and numbers."""

    passages: str
    triples: str
    sets: dict[str, str]
    counts: dict[str, int]

    def settings(self, **changes: Any) -> dict[str, Any]:
        """The ``collection`` of a profile."""
        return {"kind": "ir_datasets", "name": "Miniature", **asdict(self), **changes}


_REGISTERED: dict[str, tuple[tuple[Any, ...], Miniature]] = {}


def register(
    folder: Path,
    prefix: str = "am-test",
    *,
    passages: int = 300,
    train: int = 200,
    test: int = 20,
    triples: int = 4000,
    depth: int = 60,
    seed: int = 1,
) -> Miniature:
    """Write the files into ``folder`` (unless they are there) and register ``prefix``, ``prefix/train`` and
    ``prefix/dl19`` and ``prefix/dl20`` with their ``/judged``.

    ``train`` and ``test`` are numbers of queries (``test`` judged ones in each of the two sets, half as many again unjudged),
    ``depth`` the candidates a query. Registering the same again does nothing; a prefix stands for one collection.
    """
    sizes = (passages, train, test, triples, depth, seed)
    what = (Path(folder).resolve(), *sizes)
    if prefix in _REGISTERED:
        before, miniature = _REGISTERED[prefix]
        if before != what:
            raise ValueError(f"{prefix} is registered as {before}, not {what}")
        return miniature
    done = folder / "done.json"
    if not done.is_file() or json.loads(done.read_text()) != list(sizes):
        _write(folder, *sizes)
        done.write_text(json.dumps(sizes))
    miniature = Miniature(
        passages=prefix,
        triples=f"{prefix}/train",
        sets={name: f"{prefix}/{name}/judged" for name in ("dl19", "dl20")},
        counts={"passages": passages, "train": train, "triples": triples, "dl19": test, "dl20": test},
    )  # fmt: skip
    _register(folder, prefix)
    _REGISTERED[prefix] = what, miniature
    return miniature


def _register(folder: Path, prefix: str) -> None:
    import ir_datasets
    from ir_datasets.datasets.base import Dataset, FilteredQueries, FilteredScoredDocs
    from ir_datasets.formats import TrecQrels, TrecScoredDocs, TsvDocPairs, TsvDocs, TsvQueries
    from ir_datasets.util import Cache, GzipExtract, Lazy, LocalDownload

    def file(name: str) -> LocalDownload:
        return LocalDownload(folder / name)

    def unpacked(name: str) -> Cache:
        return Cache(GzipExtract(file(name)), folder / "unpacked" / name.removesuffix(".gz"))

    docs = TsvDocs(unpacked("collection.tsv.gz"), lang="en")
    sets = {
        "train": Dataset(
            docs,
            TsvQueries(file("queries.train.tsv"), lang="en"),
            TrecQrels(file("qrels.train"), {1: "relevant"}),
            TsvDocPairs(GzipExtract(file("docpairs.tsv.gz"))),
        )
    }
    for name in ("dl19", "dl20"):
        sets[name] = Dataset(
            docs,
            TsvQueries(unpacked(f"queries.{name}.tsv.gz"), lang="en"),
            TrecQrels(file(f"qrels.{name}"), {}),
            TrecScoredDocs(unpacked(f"top.{name}.tsv.gz")),
        )
        judged = Lazy(lambda whole=sets[name]: {q.query_id for q in whole.qrels_iter()})
        sets[f"{name}/judged"] = Dataset(
            FilteredQueries(sets[name].queries_handler(), judged),
            FilteredScoredDocs(sets[name].scoreddocs_handler(), judged),
            sets[name],
        )
    ir_datasets.registry.register(prefix, Dataset(docs))
    for name, dataset in sets.items():
        ir_datasets.registry.register(f"{prefix}/{name}", dataset)


def _write(
    folder: Path, passages: int, train: int, test: int, triples: int, depth: int, seed: int
) -> None:
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    lists = (NOUNS, KINDS, VERBS, PLACES)
    keys = [tuple(rng.choice(words) for words in lists) for _ in range(passages)]
    texts = []
    for noun, kind, verb, place in keys:
        other = [rng.choice(words) for words in lists]
        texts.append(
            f"the {kind} {noun} can {verb} in the {place} and it is a {kind} {noun} "
            f"when most {other[0]} {other[2]} with the {other[3]}"
        )
    texts[0] += " café"
    _tsv(folder / "collection.tsv.gz", enumerate(texts))

    def query(passage: int) -> tuple[str, list[int]]:
        """A query that a passage answers, and how many of its words each passage shares."""
        pattern, used = rng.choice(_QUERIES)
        wanted = keys[passage]
        shared = [sum(key[i] == wanted[i] for i in used) for key in keys]
        return pattern.format(*wanted), [3 * n // len(used) for n in shared]

    qids = rng.sample(range(1000, 1000 + 20 * (train + 4 * test)), train + 4 * test)
    own = [rng.randrange(passages) for _ in range(train)]
    grades = []
    with_text = []
    for qid, passage in zip(qids, own, strict=False):
        text, shared = query(passage)
        with_text.append((qid, text))
        grades.append(shared)
    _tsv(folder / "queries.train.tsv", with_text)
    judged = [
        i for i in range(train) if i % 10
    ]  # as in MS MARCO, not every training query is judged
    _lines(folder / "qrels.train", (f"{qids[i]} 0 {own[i]} 1" for i in judged))
    pairs = []
    while len(pairs) < triples:
        i, negative = judged[int(len(judged) * rng.random() ** 1.5)], rng.randrange(passages)
        if grades[i][negative] < 2:
            pairs.append((qids[i], own[i], negative))
    _tsv(folder / "docpairs.tsv.gz", pairs)

    taken = train
    for name in ("dl19", "dl20"):
        count = test + test // 2
        ids, taken = qids[taken : taken + count], taken + count
        rows, qrels, top = [], [], []
        for number, qid in enumerate(ids):
            text, shared = query(rng.randrange(passages))
            rows.append((qid, text))
            ranked = sorted(range(passages), key=lambda p: -shared[p] + 2 * rng.random())[:depth]
            rng.shuffle(ranked)
            top += [(qid, passage) for passage in ranked]
            if number < test:
                pool = {p for p in range(passages) if shared[p] or rng.random() < 0.05}
                qrels += [f"{qid} Q0 {p} {shared[p]}" for p in sorted(pool)]
        _tsv(folder / f"queries.{name}.tsv.gz", rows)
        _lines(folder / f"qrels.{name}", qrels)
        _tsv(folder / f"top.{name}.tsv.gz", top)


def _tsv(path: Path, rows: Iterable[tuple[Any, ...]]) -> None:
    _lines(path, ("\t".join(map(str, row)) for row in rows))


def _lines(path: Path, lines: Iterable[str]) -> None:
    data = "".join(f"{line}\n" for line in lines).encode("utf-8")
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
