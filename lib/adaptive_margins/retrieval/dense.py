"""Dense retrieval with any encoder: exact ranking, reranking, and fusion with BM25."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from adaptive_margins import progress
from adaptive_margins.data.collection import Texts
from adaptive_margins.data.text import DataError, alike
from adaptive_margins.data.trec import Run, top
from adaptive_margins.encoder.checks import MOST_LENGTH, EncoderError
from adaptive_margins.encoder.embed import Precision, embed, embed_shards
from adaptive_margins.encoder.load import check_prompt, length_limits, prompts
from adaptive_margins.encoder.tokens import Tokens, count_truncated, stored_tokens, tokenize
from adaptive_margins.files import read_object, write_text
from adaptive_margins.ray_tasks import ray_options
from adaptive_margins.retrieval.embedding_cache import cached_embeddings
from adaptive_margins.retrieval.exact import exact_search, rerank, without_self

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_TEXTS = ("queries", "passages")
_SLICE = 256  # texts embedded between two states of a progress bar
_SHARD = 4096  # passages whose embeddings a killed build may lose
_RRF = 60
FUSED = 1000
"""Depth of rankings to fuse, at least: scores are scaled by the lowest one (as Bruch et al. do)."""


class DenseRetriever:
    """An encoder and the passages it ranks by cosine similarity.

    Args:
        model: from `open_encoder`, or another SentenceTransformer that begins with a transformer,
            whose prompts are used. It must not be changed afterwards.
        passages: may be memory-mapped.
        passage_length: maximum length of a passage in tokens, special tokens included; at most and
            by default the model's.
        query_length: the same of queries.
        precision: of the model's matrix products.
        cache: a folder where they are looked up, and left (`cached_embeddings`), unless Ray embeds.
        ray: where `embed_into` embeds, if not here: see `embed_shards`.
        warn: whether ranking warns of truncated texts.

    Attributes:
        truncated: "queries" and "passages" → (truncated, embedded) so far.
        lost: the same → tokens (not read, read) so far.

    Raises:
        EncoderError: a length below 1, or a prompt that fills it.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        passages: Texts,
        *,
        passage_length: int | None = None,
        query_length: int | None = None,
        precision: Precision = "fp32",
        cache: Path | None = None,
        ray: str = "",
        warn: bool = True,
    ) -> None:
        self.model, self.passages, self.precision, self.warn = model, passages, precision, warn
        self.cache, self.ray = None if ray else cache, ray
        if ray:  # its errors come before any work
            ray_options(ray, None)
        self._prompts, limits = prompts(model), length_limits(model)
        lengths = [
            limit if asked is None else asked
            for asked, limit in zip((query_length, passage_length), limits, strict=True)
        ]
        if not 1 <= min(lengths) <= max(lengths) <= MOST_LENGTH:
            raise EncoderError(
                f"passages of at most {lengths[1]} tokens, queries of {lengths[0]}: expected 1 to"
                f" {MOST_LENGTH:,}"
            )
        self.query_length, self.passage_length = self._lengths = tuple(map(min, lengths, limits))
        for what, prompt, length in zip(_TEXTS, self._prompts, self._lengths, strict=True):
            check_prompt(model, what, prompt, length)
        self.truncated, self.lost = (dict.fromkeys(_TEXTS, (0, 0)) for _ in range(2))

    @cached_property
    def rows(self) -> np.ndarray:
        """Rows of the passages with a text, ascending (int64), which are searched."""
        return np.flatnonzero([bool(text.strip()) for text in self.passages.texts])

    @cached_property
    def embeddings(self) -> np.ndarray:
        """(len(rows), D) float32 of length 1, one for each of `rows`; computed on first use."""
        found = cached_embeddings(self, self.cache)
        return self.embed_passages(self.rows) if found is None else found

    def embeddings_of(self, rows: np.ndarray) -> np.ndarray:
        """Return the embeddings of the passages in ``rows`` from `embeddings`; 0 without text."""
        place = np.searchsorted(self.rows, rows)
        has_text = np.take(self.rows, place, mode="clip") == rows
        found = np.zeros((len(rows), self.embeddings.shape[1]), np.float32)
        found[has_text] = self.embeddings[place[has_text]]
        return found

    def embed_queries(self, texts: Sequence[str]) -> np.ndarray:
        """Embed queries: (len(texts), D) float32 of length 1."""
        return self._embed(self._tokens(texts, "queries"), "queries")

    def embed_passages(self, rows: np.ndarray) -> np.ndarray:
        """Embed the passages in ``rows``, in that order: (len(rows), D) float32 of length 1."""
        return self._embed(self.passage_tokens(rows), "passages")

    def stored_embeddings(self, folder: Path, dtype: Literal["float32", "float16"]) -> np.ndarray:
        """Return the embeddings of `rows`: known, cached, or computed in ``folder``."""
        if "embeddings" in vars(self):
            return self.embeddings
        cached = cached_embeddings(self, self.cache)
        return self.embed_into(folder, dtype) if cached is None else cached

    def embed_into(self, folder: Path, dtype: Literal["float32", "float16"]) -> np.ndarray:
        """Embed `rows` by `embed_shards`, unless it is done. Their tokens are in FOLDER.tokens."""
        return embed_shards(
            self.model,
            self.passage_tokens(self.rows, folder.with_name(f"{folder.name}.tokens")),
            folder,
            shard=_SHARD,
            dtype=dtype,
            devices=(str(self.model.device),),
            precision=self.precision,
            ray=self.ray,
        )

    def search(self, queries: Texts, depth: int, *, exclude_self: bool = False) -> Run:
        """Return the ``depth`` passages with text of highest cosine with each query (exact search).

        ``exclude_self`` leaves out the passage with the query's id, as BEIR does. There is a
        warning of truncated texts.
        """
        found, ids = self.embeddings, self.passages.ids
        if len(found) < len(ids):
            ids = [ids[row] for row in self.rows.tolist()]
        embedded = self.embed_queries(queries.texts)
        if self.warn:
            self.warn_truncated()
        run = exact_search(embedded, found, queries.ids, ids, depth + exclude_self)
        return without_self(run, depth) if exclude_self else run

    def rerank(self, queries: Texts, candidates: Run) -> Run:
        """Rank each query's candidates with a text by cosine, with a warning of truncated texts.

        Only the candidates are embedded, unless all passages are already.

        Raises:
            DataError: a candidate or its query is unknown; the message names it.
        """
        for qid, hits in candidates.items():
            if qid not in queries:
                raise DataError(f"candidates are given for the unknown query {qid!r}")
            if unknown := next((docid for docid in hits if docid not in self.passages), None):
                message = f"a candidate of query {qid!r} is the unknown passage {unknown!r}"
                hint = alike([unknown], self.passages.ids)
                raise DataError(f"{message}; {hint}" if hint else message)
        wanted = {self.passages.row(docid) for hits in candidates.values() for docid in hits}
        rows = np.array([r for r in sorted(wanted) if self.passages.texts[r].strip()], np.int64)
        known = "embeddings" in vars(self)
        found = self.embeddings_of(rows) if known else self.embed_passages(rows)
        docids = [self.passages.ids[row] for row in rows.tolist()]
        kept = set(docids)
        candidates = {
            qid: {docid: score for docid, score in hits.items() if docid in kept}
            for qid, hits in candidates.items()
        }
        qids = list(candidates)
        embedded = self.embed_queries([queries[qid] for qid in qids])
        if self.warn:
            self.warn_truncated()
        return rerank(candidates, embedded, qids, found, docids)

    @property
    def truncation(self) -> dict[str, Any]:
        """Truncated "queries" and "passages" so far, and "lost": the share of all their tokens."""
        shares = {what: lost / max(1, lost + read) for what, (lost, read) in self.lost.items()}
        return {**{what: count for what, (count, _) in self.truncated.items()}, "lost": shares}

    def warn_truncated(self) -> None:
        """Warn of the texts that were truncated so far, if there are any."""
        shares = self.truncation["lost"]
        counts = [
            f"{count:,} of {total:,} {what} are longer than {length} tokens"
            f" ({100 * shares[what]:.3g} % of the tokens of all {what} are not read)"
            for what, length in zip(_TEXTS, self._lengths, strict=True)
            for count, total in [self.truncated[what]]
            if count
        ]
        if counts:
            warnings.warn(
                f"{' and '.join(counts)}, the limit of the encoder or of --max-length; BM25 reads"
                " complete texts",
                stacklevel=3,
            )

    def passage_tokens(self, rows: np.ndarray, folder: Path | None = None) -> Tokens:
        """Tokenise the passages in ``rows`` as `_tokens` does."""
        texts = self.passages.texts
        if not np.array_equal(rows, np.arange(len(texts))):  # all need not be in memory
            texts = [texts[row] for row in rows.tolist()]
        return self._tokens(texts, "passages", folder)

    def _tokens(self, texts: Sequence[str], what: str, folder: Path | None = None) -> Tokens:
        """Tokenise texts with prompt and special tokens, and count truncated ones.

        With a ``folder``, tokens are cached there, and memory-mapped; their count next to it.
        """
        prompt, length = self._prompts[_TEXTS.index(what)], self._lengths[_TEXTS.index(what)]
        if prompt:
            texts = [prompt + text for text in texts]
        if folder is None:
            tokens = tokenize(self.model, texts, length)
        else:
            tokens = stored_tokens(lambda: self.model.tokenizer, texts, length, folder)
        self.count(texts, tokens, what, folder and folder.with_suffix(".json"))
        return tokens

    def count(
        self, texts: Sequence[str], tokens: Tokens, what: str, cache: Path | None = None
    ) -> None:
        """Add ``texts``, which include their prompts, to `truncated` and `lost`."""
        length = self._lengths[_TEXTS.index(what)]
        known = read_object(cache).get("truncated") if cache else None
        longer, lost = known or count_truncated(self.model, texts, tokens, length)
        if cache and not known:
            write_text(cache, json.dumps({"truncated": [longer, lost]}))
        (count, total), (gone, read) = self.truncated[what], self.lost[what]
        self.truncated[what] = count + longer, total + len(texts)
        self.lost[what] = gone + lost, read + int(tokens.offsets[-1])

    def _embed(self, tokens: Tokens, what: str) -> np.ndarray:
        order, lengths = np.argsort(tokens.lengths, kind="stable"), tokens.lengths
        out = np.empty((len(tokens), self.model.get_embedding_dimension()), np.float32)
        # Short texts are first, and faster: the time left is estimated from tokens.
        with progress.bar(f"embedding {what}", total=int(lengths.sum()), unit="tokens") as bar:
            for start in range(0, len(order), _SLICE):
                part = order[start : start + _SLICE]
                out[part] = embed(self.model, tokens, part, precision=self.precision)
                bar.update(int(lengths[part].sum()))
        return out


def hybrid(dense: Run, bm25: Run, depth: int, weight: float | None = None) -> Run:
    """Fuse two rankings by reciprocal rank, or by a convex combination of their scores.

    A passage's score is the sum over the rankings that have it: of 1 / (60 + rank), with ranks from
    1 in the order of `top` (Cormack et al., SIGIR 2009); or with a ``weight`` in [0, 1] of weight ·
    dense and (1 − weight) · BM25, scaled to [0, 1] by the minimum and maximum of a query (Bruch et
    al., TOIS 2023). Weights 1 and 0 return one ranking as it is. Rank at least `FUSED` passages of
    a query with both; the result has the ``depth`` best ones.

    Raises:
        ValueError: ``depth`` is below 1, or the weight is not in [0, 1].
    """
    if weight is not None and not 0 <= weight <= 1:
        raise ValueError(f"weight must lie between 0 and 1, not {weight}")
    if weight in (0, 1):  # scaling could make ties
        alone = dense if weight else bm25
        return {qid: dict(top(alone.get(qid, {}), depth)) for qid in {**dense, **bm25}}
    other = None if weight is None else 1 - weight
    run: Run = {}
    for qid in {**dense, **bm25}:
        a, b = _summands(dense.get(qid, {}), weight), _summands(bm25.get(qid, {}), other)
        scores = {docid: a.get(docid, 0.0) + b.get(docid, 0.0) for docid in {**a, **b}}
        run[qid] = dict(top(scores, depth))
    return run


def _summands(hits: Mapping[str, float], share: float | None) -> dict[str, float]:
    """What a ranking adds to the scores of its passages."""
    if share is None:
        return {docid: 1 / (_RRF + rank) for rank, (docid, _) in enumerate(top(hits), start=1)}
    low = min(hits.values(), default=0.0)
    spread = max(hits.values(), default=0.0) - low
    return {d: share * ((s - low) / spread if spread else 1.0) for d, s in hits.items()}
