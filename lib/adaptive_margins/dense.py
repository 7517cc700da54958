"""Dense retrieval with any encoder: exact ranking and reranking, an index on disk, and fusion with BM25.

Passages without text have no embedding of use: they are never returned.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Sequence
from functools import cached_property
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import faiss
import numpy as np

import adaptive_margins
from adaptive_margins import encoders, retrieval
from adaptive_margins.data.arrow import StoredTexts, write_texts
from adaptive_margins.data.collection import Texts
from adaptive_margins.data.text import DataError, Problems, alike
from adaptive_margins.data.trec import Run, top
from adaptive_margins.encoder_checks import MOST_LENGTH
from adaptive_margins.encoders import EncoderError, Precision, Shards, Tokens
from adaptive_margins.files import WriteError, whole_folder, working_folder, write_text
from adaptive_margins.progress import Countdown

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

EXACT_BELOW = 100_000
"""Passages below which an index searches exactly: at 5,000 a quantised one is no faster, and misses up to 6 % of the top 10."""
_TEXTS = ("queries", "passages")
_SLICE = 256  # texts embedded between two lines of progress
_SHARD = 4096  # passages whose embeddings a killed build may lose
_RRF = 60
_FORMAT = 1  # of the index's folder


class DenseRetriever:
    """An encoder and the passages it ranks by cosine similarity.

    Args:
        model: from `encoders.open_encoder`, or any other SentenceTransformer that begins with a transformer. Its prompts for
            queries and passages are used; it is not to be changed afterwards.
        passages: may be memory-mapped.
        passage_length: tokens of a passage at most, special tokens included; None: as many as the model reads.
        query_length: the same of queries. Neither exceeds the model's max_seq_length.
        precision: of the model's matrix products.
        embeddings: (n, D) float32 of length 1, if they are known, one row a passage in its order.
        warn: of truncated texts, when they are ranked.

    Attributes:
        truncated: of "queries" and of "passages", how many of those embedded so far are longer than their length, and of
            how many.

    Raises:
        EncoderError: a length below 1, a prompt that fills it, or embeddings of another shape.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        passages: Texts,
        *,
        passage_length: int | None = None,
        query_length: int | None = None,
        precision: Precision = "fp32",
        embeddings: np.ndarray | None = None,
        warn: bool = True,
    ) -> None:
        self.model, self.passages, self.precision = model, passages, precision
        self.warn = warn
        self._prompts = encoders.prompts(model)
        limits = encoders.length_limits(model)
        lengths = [
            limit if asked is None else asked
            for asked, limit in zip((query_length, passage_length), limits, strict=True)
        ]
        if not 1 <= min(lengths) <= max(lengths) <= MOST_LENGTH:
            raise EncoderError(
                f"passages of at most {lengths[1]} tokens, queries of {lengths[0]}: expected 1 to {MOST_LENGTH:,}"
            )
        self.query_length, self.passage_length = map(min, lengths, limits)
        for what, prompt, length in zip(
            _TEXTS, self._prompts, (self.query_length, self.passage_length), strict=True
        ):
            encoders.check_prompt(model, what, prompt, length)
        self.truncated = {what: (0, 0) for what in _TEXTS}
        if embeddings is not None:
            shape = (len(passages), model.get_embedding_dimension())
            if embeddings.shape != shape:
                raise EncoderError(f"embeddings have shape {embeddings.shape}, expected {shape}")
            self.__dict__["embeddings"] = embeddings  # in the place of the computed ones

    @cached_property
    def rows(self) -> np.ndarray:
        """Rows of the passages that have a text, ascending (int64): those that are searched."""
        return np.flatnonzero([bool(text.strip()) for text in self.passages.texts])

    @cached_property
    def embeddings(self) -> np.ndarray:
        """(n, D) float32 of length 1, one row a passage; 0 where there is no text. Computed on first use."""
        out = np.zeros((len(self.passages), self.model.get_embedding_dimension()), np.float32)
        out[self.rows] = self.embed_passages(self.rows)
        return out

    def embed_queries(self, texts: Sequence[str]) -> np.ndarray:
        """(len(texts), D) float32 of length 1."""
        return self._embed(self._tokens(texts, "queries"), "queries")

    def search(self, queries: Texts, depth: int, *, exclude_self: bool = False) -> Run:
        """The ``depth`` passages of highest cosine with each query, none missed; fewer, if there are no more with text.

        All passages are embedded first, if they are not yet. ``exclude_self`` leaves out the passage whose id is the query's,
        as BEIR does. A warning says how many texts are truncated.
        """
        found, ids = self.embeddings, self.passages.ids
        if len(self.rows) < len(self.passages):
            found, ids = found[self.rows], [ids[row] for row in self.rows.tolist()]
        embedded = self.embed_queries(queries.texts)
        if self.warn:
            self.warn_truncated()
        run = retrieval.exact_search(embedded, found, queries.ids, ids, depth + exclude_self)
        return retrieval.without_self(run, depth) if exclude_self else run

    def rerank(self, queries: Texts, candidates: Run) -> Run:
        """Each query's candidates by cosine; those without text are left out.

        Only the candidates are embedded, unless all passages are already. A warning says how many texts are truncated.

        Raises:
            DataError: a candidate or its query is unknown; the message names it.
        """
        for qid, hits in candidates.items():
            if qid not in queries:
                raise DataError(f"candidates are given for the unknown query {qid!r}")
            if unknown := next((docid for docid in hits if docid not in self.passages), None):
                hint = alike([unknown], self.passages.ids)
                raise DataError(
                    f"a candidate of query {qid!r} is the unknown passage {unknown!r}"
                    + (f"; {hint}" if hint else "")
                )
        wanted = sorted(
            {self.passages.row(docid) for hits in candidates.values() for docid in hits}
        )
        rows = np.array([r for r in wanted if self.passages.texts[r].strip()], np.int64)
        known = "embeddings" in self.__dict__
        found = self.embeddings[rows] if known else self.embed_passages(rows)
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
        return retrieval.rerank(candidates, embedded, qids, found, docids)

    def embed_passages(self, rows: np.ndarray) -> np.ndarray:
        """(len(rows), D) float32 of length 1, of these passages alone, in that order."""
        return self._embed(self.passage_tokens(rows), "passages")

    def passage_tokens(self, rows: np.ndarray) -> Tokens:
        """The passages in ``rows`` as the model reads them: prompt, special tokens, cut at ``passage_length``."""
        texts = self.passages.texts
        if not np.array_equal(rows, np.arange(len(texts))):  # all need not be in memory
            texts = [texts[row] for row in rows.tolist()]
        return self._tokens(texts, "passages")

    def shards(self, folder: Path, dtype: Literal["float32", "float16"]) -> Shards:
        """Embeddings of the passages in ``rows`` alone; if they are not known, computed in ``folder`` by `embed_shards`."""
        if "embeddings" in self.__dict__:
            known = self.embeddings
            return Shards.of(known if len(self.rows) == len(known) else known[self.rows])
        return encoders.embed_shards(
            self.model, self.passage_tokens(self.rows), folder, shard=_SHARD, dtype=dtype,
            devices=(str(self.model.device),), precision=self.precision,
        )  # fmt: skip

    def warn_truncated(self) -> None:
        """Warn of the texts that were truncated so far, if there are any."""
        told = [
            f"{count:,} of {total:,} {what} are longer than {length} tokens"
            for what, length in zip(_TEXTS, (self.query_length, self.passage_length), strict=True)
            for count, total in [self.truncated[what]]
            if count
        ]
        if told:
            warnings.warn(
                f"{' and '.join(told)}, the encoder's limit: the rest of them is not read (BM25"
                " reads all of a text)",
                stacklevel=3,
            )

    def _tokens(self, texts: Sequence[str], what: str) -> Tokens:
        row = _TEXTS.index(what)
        prompt, length = self._prompts[row], (self.query_length, self.passage_length)[row]
        if prompt:
            texts = [prompt + text for text in texts]
        tokens = encoders.tokenize(self.model, texts, length)
        count, total = self.truncated[what]
        count += encoders.count_truncated(self.model, texts, tokens, length)
        self.truncated[what] = count, total + len(texts)
        return tokens

    def _embed(self, tokens: Tokens, what: str) -> np.ndarray:
        order, lengths = np.argsort(tokens.lengths, kind="stable"), tokens.lengths
        out = np.empty((len(tokens), self.model.get_embedding_dimension()), np.float32)
        # Short texts come first and are the quicker ones: the time left follows from tokens, not from texts.
        countdown, done = Countdown(f"embedding {what}", int(lengths.sum()), "tokens"), 0
        for start in range(0, len(order), _SLICE):
            countdown.update(done)
            part = order[start : start + _SLICE]
            out[part] = encoders.embed(self.model, tokens, part, precision=self.precision)
            done += int(lengths[part].sum())
        return out


class DenseIndex:
    """Passages, their embeddings and a FAISS index in a folder, ready to be searched.

    ``passages.faiss`` is an ordinary FAISS index (``faiss.read_index``) whose vector i is row i of ``passages.arrow`` (docid,
    text: only passages with text) and of ``embeddings.npy``; ``index.json`` says what made them, their sizes and SHA-256s.
    Everything is memory-mapped.

    Attributes:
        folder: where it lies.
        about: what ``index.json`` says.
        passages: docids and texts, in the order of the index's vectors.
        encoder: name of the encoder, as `encoders.open_encoder` takes it.
        identity: the encoder's `encoders.encoder_identity`.
        settings: the index's kind and sizes.
        index: the FAISS index.
        embeddings: of the passages.
        truncated: how many queries of the last search were longer than their limit, and of how many.
    """

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        """Use `open` or `build`."""
        self.folder, self.about = folder, about
        self.encoder, self.identity = about["encoder"]["name"], about["encoder"]["identity"]
        self.settings = retrieval.IndexSettings(**about["index"])
        self.passages = StoredTexts(folder / "passages.arrow")
        matrix = np.load(folder / "embeddings.npy", mmap_mode="r")
        self.embeddings = Shards([matrix], matrix.shape[1])
        self.index = faiss.read_index(str(folder / "passages.faiss"), faiss.IO_FLAG_MMAP_IFC)
        self.truncated = (0, 0)
        self._checked: SentenceTransformer | None = None

    @classmethod
    def build(
        cls,
        retriever: DenseRetriever,
        collection_name: str,
        encoder: str,
        folder: Path,
        *,
        fingerprint: str = "",
        dtype: Literal["float32", "float16"] = "float32",
        seed: int = 1,
    ) -> DenseIndex:
        """Embed the passages, build the index that `retrieval.choose_index` chooses, and write all of it to a new folder.

        The folder appears when it is whole. Embeddings are kept in FOLDER.work until then: a killed build goes on where it
        was, if it is called again. Progress and the time left are said on stderr.

        Args:
            retriever: its model, passages, lengths and precision; its embeddings, if it has them.
            collection_name: what the collection is called.
            encoder: the name that the retriever's model was opened by.
            folder: does not exist, or is empty.
            fingerprint: the collection's, to be noted.
            dtype: of ``embeddings.npy``, which hits are ranked again from. Float16 halves it, and moves scores by less than
                0.001.
            seed: of the index's k-means clusterings.

        Raises:
            DataError: no passage has a text, or an id is not one word.
            EncoderError: the encoder's name is unknown, or there is no room for embeddings.
            EmbeddingError: an embedding is not finite; nothing is left behind.
            WriteError: something is in the folder, another process writes to it, or a file could not be written.
        """
        folder, passages, rows = Path(folder).absolute(), retriever.passages, retriever.rows
        if not len(rows):
            raise DataError(f"{collection_name}: none of the {len(passages)} passages has a text")
        if Path(encoder).is_dir():
            encoder = str(Path(encoder).resolve())
        about: dict[str, Any] = {
            "format": _FORMAT,
            "collection": {
                "name": collection_name, "fingerprint": fingerprint, "passages": len(passages), "indexed": len(rows),
            },
            "encoder": {"name": encoder, "identity": encoders.encoder_identity(encoder)},
            "lengths": {"query": retriever.query_length, "passage": retriever.passage_length},
            "precision": retriever.precision,
            "dtype": dtype,
            "seed": seed,
            "versions": {"adaptive-margins": adaptive_margins.__version__, "faiss": faiss.__version__},
        }  # fmt: skip
        try:
            with (
                working_folder(folder) as work,
                whole_folder(folder, same=lambda _: False) as partial,
            ):
                stored = partial / "passages.arrow"
                with_text = compress(
                    zip(passages.ids, passages.texts, strict=True),
                    np.isin(np.arange(len(passages)), rows),
                )
                write_texts(stored, with_text, what="passages", expected=len(rows))
                key = json.dumps([about, encoders.file_sha256(stored)]).encode()
                embeddings = retriever.shards(work / hashlib.sha256(key).hexdigest()[:16], dtype)
                _write_matrix(partial / "embeddings.npy", embeddings, np.dtype(dtype))
                settings = _index_settings(len(rows), embeddings.dim)
                threads = 1 if settings.quick else faiss.omp_get_max_threads()
                index = retrieval.build_index(embeddings, settings, seed, threads=threads)
                _write_index(partial / "passages.faiss", index)
                files = {
                    path.name: {"bytes": path.stat().st_size, "sha256": encoders.file_sha256(path)}
                    for path in sorted(partial.iterdir())
                }
                about |= {"index": dataclasses.asdict(settings), "files": files}
                write_text(partial / "index.json", json.dumps(about, indent=2) + "\n")
        except OSError as error:
            if isinstance(error, WriteError):
                raise
            raise WriteError(f"{folder} could not be written: {error}") from error
        retriever.warn_truncated()
        return cls.open(folder)

    @classmethod
    def open(cls, folder: Path) -> DenseIndex:
        """An index that `build` wrote; all its files are read once, to check their SHA-256.

        Raises:
            DataError: there is no index, or a file is missing, damaged, or not the one that was written.
        """
        path = Path(folder) / "index.json"
        problems = Problems()
        try:
            about = json.loads(path.read_bytes())
            if about["format"] != _FORMAT:
                raise DataError(
                    f"{path}: format {about['format']!r} is not {_FORMAT}, which this version reads; build the index anew"
                )
            for name, expected in about["files"].items():
                file = path.with_name(name)
                if not file.is_file():
                    problems.add(file, 0, "file not found")
                elif (size := file.stat().st_size) != expected["bytes"]:
                    problems.add(file, 0, f"{size} bytes, expected {expected['bytes']}")
                elif (found := encoders.file_sha256(file)) != expected["sha256"]:
                    problems.add(file, 0, f"SHA-256 is {found}, expected {expected['sha256']}")
            problems.check()
            return cls(path.parent, about)
        except DataError:
            raise
        except OSError as error:
            raise DataError(f"no index of passages at {folder}: {error}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} does not describe an index; build it again") from error

    def open_encoder(self, name: str | None = None, *, device: str = "cpu") -> SentenceTransformer:
        """The encoder that the index was built with; ``name``, if its folder has another name now.

        Raises:
            EncoderError: as `encoders.open_encoder`, or its weights are other ones than the index was built with.
        """
        name = name or self.encoder
        if (found := encoders.encoder_identity(name)) != self.identity:
            raise EncoderError(
                f"{self.folder} was built with encoder {self.encoder!r} ({self.identity}), but {name!r} is now {found}; "
                "build the index anew"
            )
        return encoders.open_encoder(name, device=device)

    def search(self, model: SentenceTransformer, queries: Texts, depth: int) -> Run:
        """The ``depth`` best passages of each query: found by the index, ordered by their exact cosine.

        Args:
            model: the encoder that the index was built with, see `open_encoder`.
            queries: cut at the query length that the index was built for.
            depth: hits wanted.

        Raises:
            EncoderError: another encoder: it embeds passages of the index otherwise.
        """
        lengths = self.about["lengths"]
        retriever = DenseRetriever(
            model, self.passages, passage_length=lengths["passage"], query_length=lengths["query"],
            precision=self.about["precision"],
        )  # fmt: skip
        if model is not self._checked:
            some = np.unique([0, len(self.passages) // 2, len(self.passages) - 1])
            expected, found = self.embeddings.take(some), retriever.embed_passages(some)
            retriever.truncated["passages"] = (0, 0)  # of these few nothing need be said
            # Mixed precision moves a unit vector by less than 0.05, training by more.
            if (
                found.shape != expected.shape
                or np.linalg.norm(found - expected, axis=1).max() > 0.1
            ):
                raise EncoderError(
                    f"{self.folder} was built with encoder {self.encoder!r} ({self.identity}); the one given embeds its "
                    "passages otherwise"
                )
            self._checked = model
        # Ranking 16 · depth hits again is cheap here, and fewer of the best are missed.
        settings = dataclasses.replace(self.settings, k_factor=16)
        embedded = retriever.embed_queries(queries.texts)
        retriever.warn_truncated()
        self.truncated = retriever.truncated["queries"]
        return retrieval.search_index(
            self.index, settings, embedded, queries.ids, self.passages.ids, depth, self.embeddings
        )


def _index_settings(n: int, dim: int) -> retrieval.IndexSettings:
    """Exact search where it is as fast as any; else what `retrieval.choose_index` chooses."""
    if n < EXACT_BELOW:
        return retrieval.IndexSettings("Flat", dim)
    return retrieval.choose_index(n, dim)


def hybrid(dense: Run, bm25: Run, depth: int) -> Run:
    """Two rankings fused by reciprocal rank: Σ 1 / (60 + rank), over those that have the passage (Cormack et al., SIGIR 2009).

    Ranks count from 1, in trec_eval's order; the fused run has the ``depth`` best of each query that either has.
    """
    run: Run = {}
    for qid in [*dense, *(qid for qid in bm25 if qid not in dense)]:
        scores: dict[str, float] = {}
        for hits in (dense.get(qid, {}), bm25.get(qid, {})):
            for rank, (docid, _) in enumerate(top(hits), start=1):
                scores[docid] = scores.get(docid, 0.0) + 1 / (_RRF + rank)
        run[qid] = dict(top(scores, depth))
    return run


def _write_matrix(path: Path, embeddings: Shards, dtype: np.dtype) -> None:
    """Embeddings as a .npy file, block by block."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {**header, "shape": (len(embeddings), embeddings.dim)}
        )
        for _, block in embeddings.blocks():
            file.write(block.astype(dtype, copy=False).data)


def _write_index(path: Path, index: faiss.Index) -> None:
    try:
        faiss.write_index(index, str(path))
    except RuntimeError as error:  # what FAISS makes of a full disk
        raise OSError(str(error)) from error
