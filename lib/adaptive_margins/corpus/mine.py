"""Hard negatives of a collection: mined, filtered, and written for any trainer."""

from __future__ import annotations

import dataclasses
import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from adaptive_margins.corpus.finetuned import about_collection
from adaptive_margins.corpus.prepare import cosines, open_split
from adaptive_margins.corpus.validation import with_positive
from adaptive_margins.data.collection import Collection, Texts, Triple, tsv
from adaptive_margins.data.mining import filter_negatives
from adaptive_margins.data.pseudo_queries import about
from adaptive_margins.data.sources import open_collection
from adaptive_margins.data.text import DataError
from adaptive_margins.data.trec import Qrels, Run
from adaptive_margins.encoder.load import default_device, open_encoder
from adaptive_margins.encoder.options import EncoderOptions
from adaptive_margins.errors import ArgumentError
from adaptive_margins.files import WriteError, atomic_file, check_output, write_text
from adaptive_margins.progress import say
from adaptive_margins.retrieval.bm25 import BM25
from adaptive_margins.retrieval.dense import DenseRetriever
from adaptive_margins.retrieval.embedding_cache import cache_folder
from adaptive_margins.teachers import pair_scores

_COLUMNS = "query_id positive_id negative_id rank score positive_score negative_score"


def mine_negatives(
    source: str,
    output: Path,
    retriever: str = "bm25",
    model: str = "minilm",
    negatives: int = 1,
    depth: int = 100,
    cross_encoder: str | None = None,
    seed: int = 1,
    device: str | None = None,
    options: EncoderOptions | None = None,
) -> dict[str, Any]:
    """Mine hard negatives for the training queries, and write triples or n-tuples.

    Each positive gets ``negatives`` at random from its query's best ``depth`` passages by
    ``retriever`` ("bm25" or "encoder") that `filter_negatives` leaves. Without a set "train", the
    queries are split as by `finetune`. Deterministic for a seed.

    Args:
        source: a collection (`open_collection`).
        output: ``NAME.tsv``: a line of ids per negative, as in ``triples.tsv``, if the collection
            has a set "train"; ``NAME.jsonl``, ``NAME.parquet``: ``query``, ``positive`` and
            ``negative`` (of several ``negative_1``, …, best first) as texts, then their ids; a new
            folder: the collection with these triples. ``NAME.scores.tsv`` next to it has a line per
            negative: ids, rank and score of the retriever (a random passage has no rank), scores in
            the filter. A file without such a neighbour is not replaced.
        cross_encoder: a folder or ORG/NAME@REVISION, whose scores, in (0, 1), replace the cosines
            of the encoder ``model`` in the filter.

    Returns:
        The arguments; ``split``, a sentence if queries were split or generated; ``filtered``
        (`FilterCounts`); ``too_few``, the positives of queries with fewer than ``negatives``,
        which are left out; ``rows``, triples or n-tuples; ….

    Raises:
        ArgumentError, WriteError: an argument is not one of these; the output cannot be written.
        DataError, EncoderError: the collection or a model is at fault, or no negative is left.
    """
    output, device = Path(output).expanduser(), device or default_device()
    asked: dict[str, Any] = {"retriever": retriever, "cross_encoder": cross_encoder}
    asked |= {"negatives": negatives, "depth": depth, "seed": seed, "output": str(output)}
    scores = _checked(source, output, retriever, negatives, depth)
    collection, split = open_collection(source), ""
    if not output.suffix:
        tsv(collection.passages)  # raises now if a folder cannot hold them
    if not with_positive(collection.qrels.get("train", {})):
        if output.suffix == ".tsv":
            expected = "no training set for the ids of triples; expected a folder, .jsonl, .parquet"
            raise ArgumentError("output", f"{collection.name} has {expected}")
        data = open_split(collection, None, seed)
        collection, split = data.collection, data.split or about(data.collection)
    passages, qrels = collection.passages, with_positive(collection.qrels["train"])
    queries = Texts(list(qrels), [collection.queries["train"][qid] for qid in qrels])
    dense: Any = None
    if retriever == "encoder" or not cross_encoder:
        encoder = open_encoder(model, options or EncoderOptions(), device=device)
        dense = DenseRetriever(encoder, passages, cache=cache_folder(), warn=False)
    say(f"ranking {len(queries):,} training queries with {retriever}")
    found = (BM25(passages) if retriever == "bm25" else dense).search(queries, depth)
    if cross_encoder:
        similarity = pair_scores(cross_encoder, queries, passages, device)
    else:
        dense.truncated["queries"] = dense.lost["queries"] = (0, 0)  # a search has counted them
        similarity = cosines(dense, queries)
    kept, counts = filter_negatives(found, qrels, passages, similarity=similarity, seed=seed)
    if dense:
        dense.warn_truncated()
    triples, too_few = _mined(kept, qrels, passages, negatives, seed)
    if not triples:
        why = f"no query has {negatives} negatives left" if kept else counts.none_left()
        raise DataError(f"{collection.name}: {why}")
    ranks = {(q, d): rank for q, hits in found.items() for rank, d in enumerate(hits, start=1)}
    rows = [(q, p, d, ranks.get((q, d)), kept[q][d], *similarity(q, [p, d])) for q, p, d in triples]
    table = pd.DataFrame(rows, columns=_COLUMNS.split()).astype({"rank": "Int64"})
    write_text(scores, table.to_csv(sep="\t", index=False, lineterminator="\n", quoting=3))  # none
    _write(output, dataclasses.replace(collection, triples=triples), negatives)
    return {
        **asked,
        "model": model if dense else None,
        "scores": str(scores),
        "collection": about_collection(collection, source),
        "split": split,
        "filtered": dataclasses.asdict(counts),
        "too_few": too_few,
        "rows": len(triples) // negatives,
    }


def _checked(source: str, output: Path, retriever: str, negatives: int, depth: int) -> Path:
    """The file of ranks and scores, if the arguments are possible."""
    if retriever not in ("bm25", "encoder"):
        raise ArgumentError("retriever", f"expected 'bm25' or 'encoder', not {retriever!r}")
    if not 1 <= negatives <= depth:
        raise ArgumentError("negatives", f"expected 1 to the depth, {depth}, not {negatives}")
    if not output.name or output.suffix not in (".tsv", ".jsonl", ".parquet", ""):
        expected = "NAME.tsv, NAME.jsonl, NAME.parquet, or a folder without a dot in its name"
        raise ArgumentError("output", f"expected {expected}, not {output}")
    scores = output.with_name(f"{output.stem}.scores.tsv")
    check_output(output, folder=not output.suffix)
    check_output(scores)
    if output.is_file() and output.resolve() == Path(source).expanduser().resolve():
        raise WriteError(f"{output} is the collection; name another file")
    if output.is_file() and not scores.exists():
        raise WriteError(f"{output} exists and was not mined (no {scores.name}); name another file")
    return scores


def _mined(
    kept: Run, qrels: Qrels, passages: Texts, negatives: int, seed: int
) -> tuple[list[Triple], int]:
    """``negatives`` of each positive, best first, others for each if there are enough; too few."""
    triples: list[Triple] = []
    too_few = 0
    for qid, hits in kept.items():
        positives = sorted(d for d, g in qrels[qid].items() if g > 0 and passages[d].strip())
        if len(candidates := list(hits)) < negatives:
            too_few += len(positives)
            continue
        rng = random.Random(f"{seed} {qid} mined")
        places = itertools.cycle(rng.sample(range(len(hits)), len(hits)))
        for positive in positives:
            turn = sorted(itertools.islice(places, negatives))
            triples += [(qid, positive, candidates[place]) for place in turn]
    return triples, too_few


def _write(output: Path, collection: Collection, negatives: int) -> None:
    """Write the triples of a collection in the form of the output's name."""
    if not output.suffix:
        return collection.save(output)
    if output.suffix == ".tsv":
        return write_text(output, "".join("\t".join(t) + "\n" for t in collection.triples))
    rows = np.array(collection.triples, object).reshape(-1, negatives, 3)
    names = ["negative"] if negatives == 1 else [f"negative_{i + 1}" for i in range(negatives)]
    ids = {"query": rows[:, 0, 0], "positive": rows[:, 0, 1]}
    ids |= {name: rows[:, number, 2] for number, name in enumerate(names)}
    of = {"query": collection.queries["train"]}
    texts = {n: [of.get(n, collection.passages)[i] for i in column] for n, column in ids.items()}
    frame = pd.DataFrame({**texts, **{f"{name}_id": column for name, column in ids.items()}})
    if output.suffix == ".jsonl":
        return write_text(output, frame.to_json(orient="records", lines=True, force_ascii=False))
    with atomic_file(output) as partial:
        frame.to_parquet(partial, index=False)
