"""Passages, embeddings, a FAISS index and BM25 in a folder, ready to be searched."""

from __future__ import annotations

import dataclasses
import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import faiss
import numpy as np

import adaptive_margins
from adaptive_margins.data.collection import Texts
from adaptive_margins.data.stored import StoredTexts, write_texts
from adaptive_margins.data.text import DataError, Problems, check_file
from adaptive_margins.data.trec import Run
from adaptive_margins.encoder.checks import EncoderError
from adaptive_margins.encoder.load import encoder_identity, open_encoder, options_of
from adaptive_margins.encoder.options import EncoderOptions
from adaptive_margins.files import (
    WriteError,
    atomic_folder,
    digest,
    file_sha256,
    working_folder,
    write_text,
)
from adaptive_margins.retrieval.bm25 import BM25
from adaptive_margins.retrieval.dense import FUSED, DenseRetriever, hybrid
from adaptive_margins.retrieval.exact import blocks
from adaptive_margins.retrieval.faiss_index import (
    IndexSettings,
    build_index,
    choose_index,
    search_index,
)

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

EXACT_BELOW = 100_000
"""Passages below which an index is exact: at 5,000, a quantised one is no faster, and misses up to
6 % of the top 10."""
_FORMAT = 1  # of the index's folder


class DenseIndex:
    """Passages, their embeddings, a FAISS index and BM25 in a folder, ready to be searched.

    ``passages.faiss`` is a FAISS index (``faiss.read_index``) whose vector i is row i of
    ``passages.arrow`` (docid, text: only passages with text) and of ``embeddings.npy``;
    ``bm25.*`` are of bm25s; ``index.json`` has their settings, sizes and SHA-256s. All are
    memory-mapped.

    Attributes:
        folder: of the files.
        about: the content of ``index.json``.
        passages: docids and texts, in the order of the index's vectors.
        encoder: name of the encoder for `open_encoder`.
        identity: the encoder's `encoder_identity`.
        options: that the encoder is opened with.
        settings: the index's kind and sizes.
        index: the FAISS index.
        embeddings: of the passages.
        truncated: of the last search: (truncated queries, queries).
        weight: of the encoder in its fusion with BM25; None for reciprocal ranks.
    """

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        """Use `open` or `build`."""
        self.folder, self.about = folder, about
        self.encoder, self.identity = about["encoder"]["name"], about["encoder"]["identity"]
        self.options = EncoderOptions(**about["options"])
        self.settings = IndexSettings(**about["index"])
        self.passages = StoredTexts(folder / "passages.arrow")
        self.embeddings = np.load(folder / "embeddings.npy", mmap_mode="r")
        self.index = faiss.read_index(str(folder / "passages.faiss"), faiss.IO_FLAG_MMAP_IFC)
        self.truncated = (0, 0)
        self.weight: float | None = about["bm25"]["weight"]
        hybrid({}, {}, 1, self.weight)  # a wrong weight is an error here
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
        weight: float | None = None,
        dtype: Literal["float32", "float16"] = "float32",
        seed: int = 1,
    ) -> DenseIndex:
        """Embed the passages, index them as `choose_index` chooses, and write a folder atomically.

        Embeddings are in FOLDER.work until the end: the next call resumes a killed build.

        Args:
            retriever: its model, passages, lengths and precision; its embeddings, if known.
            collection_name: of the collection.
            encoder: the name that the retriever's model was opened by.
            folder: does not exist, or is empty.
            fingerprint: of the collection, for ``index.json``.
            weight: of the encoder in its fusion with BM25 (`hybrid`), for ``index.json``.
            dtype: of ``embeddings.npy``, by which hits are reranked. Float16 changes scores by less
                than 0.001.
            seed: of the index's k-means clusterings.

        Raises:
            DataError: no passage has a text, or an id is not one word.
            EncoderError: the encoder's name is unknown, or the disk lacks space.
            EmbeddingError: an embedding is not finite; no files are left.
            WriteError: the folder is not empty, another process writes to it, or a file could not
                be written.
        """
        folder, rows = Path(folder).absolute(), retriever.rows
        if not len(rows):
            count = len(retriever.passages)
            raise DataError(f"{collection_name}: none of the {count} passages has a text")
        if encoder != "minilm" and Path(encoder).is_dir():
            encoder = str(Path(encoder).resolve())
        about: dict[str, Any] = {
            "format": _FORMAT,
            "collection": {
                "name": collection_name,
                "fingerprint": fingerprint,
                "passages": len(retriever.passages),
                "indexed": len(rows),
            },
            "encoder": {"name": encoder, "identity": encoder_identity(encoder)},
            "options": options_of(retriever.model),
            "lengths": {"query": retriever.query_length, "passage": retriever.passage_length},
            "precision": retriever.precision,
            "dtype": dtype,
            "seed": seed,
            "bm25": {"weight": weight},
            "versions": {
                "adaptive-margins": adaptive_margins.__version__,
                "faiss": faiss.__version__,
            },
        }
        try:
            with (
                working_folder(folder) as work,
                atomic_folder(folder, same=lambda _: False) as partial,
            ):
                _write_index_files(retriever, about, work, partial)
        except OSError as error:
            if isinstance(error, WriteError):
                raise
            raise WriteError(f"{folder} could not be written: {error}") from error
        retriever.warn_truncated()
        return cls.open(folder)

    @classmethod
    def open(cls, folder: Path) -> DenseIndex:
        """Open an index that `build` wrote, and check the SHA-256 of all its files.

        Raises:
            DataError: there is no index, or a file is missing or changed.
        """
        path = Path(folder) / "index.json"
        try:
            about = json.loads(path.read_bytes())
            if about["format"] != _FORMAT:
                raise DataError(
                    f"{path}: format {about['format']!r} is not {_FORMAT}, which this version"
                    " reads; build the index again"
                )
            problems = Problems()
            for file, expected in about["files"].items():
                if not file.replace(".", "").isidentifier():
                    raise DataError(f"{path}: {file!r} is not the name of a file next to it")
                check_file(path.parent / file, expected["bytes"], expected["sha256"], problems)
            problems.check()
            return cls(path.parent, about)
        except DataError:
            raise
        except OSError as error:
            raise DataError(f"no index of passages at {folder}: {error}") from error
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:  # FAISS's
            raise DataError(f"{path} does not describe an index; build it again") from error

    def open_encoder(
        self, name: str | None = None, *, device: str | None = None
    ) -> SentenceTransformer:
        """Open the index's encoder with the index's options, by ``name`` if it was moved.

        Raises:
            EncoderError: as `open_encoder`, or the weights are not those of the index.
        """
        name = name or self.encoder
        if (found := encoder_identity(name)) != self.identity:
            raise EncoderError(
                f"{self.folder} was built with encoder {self.encoder!r} ({self.identity}), but"
                f" {name!r} is now {found}; build the index again"
            )
        return open_encoder(name, self.options, device=device)

    def search(self, model: Any, queries: Texts, depth: int, *, weight: float | None = 1.0) -> Run:
        """Return the ``depth`` best passages of each query by the index, ordered by exact cosine.

        ``model`` is from `open_encoder`; queries are truncated at the index's query length. With
        another ``weight`` than 1, the ranking is fused with BM25's (`hybrid`); 0 needs no model.

        Raises:
            EncoderError: ``model`` embeds passages of the index differently.
        """
        if weight != 1:
            deeper = max(depth, FUSED)
            dense = self.search(model, queries, deeper) if weight != 0 else {}
            return hybrid(dense, self.bm25.search(queries, deeper), depth, weight)
        retriever = DenseRetriever(
            model,
            self.passages,
            passage_length=self.about["lengths"]["passage"],
            query_length=self.about["lengths"]["query"],
            precision=self.about["precision"],
        )
        if model is not self._checked:
            self._check_model(retriever)
            self._checked = model
        # Ranking 16 · depth hits again is cheap here, and fewer of the best are missed.
        settings = dataclasses.replace(self.settings, k_factor=max(16, self.settings.k_factor))
        embedded = retriever.embed_queries(queries.texts)
        retriever.warn_truncated()
        self.truncated = retriever.truncated["queries"]
        return search_index(
            self.index, settings, embedded, queries.ids, self.passages.ids, depth, self.embeddings
        )

    @cached_property
    def bm25(self) -> BM25:
        """BM25 over the passages."""
        has_terms = "bm25.vocab.json" in self.about["files"]  # else, there was nothing to write
        return BM25(self.passages, folder=str(self.folder) if has_terms else "")

    def _check_model(self, retriever: DenseRetriever) -> None:
        """Raise EncoderError if three passages are embedded differently than in the index."""
        some = np.unique([0, len(self.passages) // 2, len(self.passages) - 1])
        expected, found = self.embeddings[some], retriever.embed_passages(some)
        retriever.truncated["passages"] = (0, 0)  # no warning of these few
        # Mixed precision moves a unit vector by less than 0.05, training by more.
        same = found.shape == expected.shape
        if not same or np.linalg.norm(found - expected, axis=1).max() > 0.1:
            raise EncoderError(
                f"{self.folder} was built with encoder {self.encoder!r} ({self.identity}); this one"
                " embeds its passages differently"
            )


def _write_index_files(
    retriever: DenseRetriever, about: dict[str, Any], work: Path, folder: Path
) -> None:
    passages, rows, dtype = retriever.passages, retriever.rows, about["dtype"]
    stored = folder / "passages.arrow"
    pairs = zip(passages.ids, passages.texts, strict=True)
    with_text = ((docid, text) for docid, text in pairs if text.strip())
    BM25(write_texts(stored, with_text, what="passages", expected=len(rows))).save(str(folder))
    embeddings = retriever.stored_embeddings(work / digest([about, file_sha256(stored)]), dtype)
    _write_matrix(folder / "embeddings.npy", embeddings, np.dtype(dtype))
    n, dim = embeddings.shape
    settings = IndexSettings("Flat", dim) if n < EXACT_BELOW else choose_index(n, dim)
    threads = 1 if settings.quick else faiss.omp_get_max_threads()
    index = build_index(embeddings, settings, about["seed"], threads=threads)
    try:
        faiss.write_index(index, str(folder / "passages.faiss"))
    except RuntimeError as error:  # FAISS's error of a full disk
        raise OSError(str(error)) from error
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(folder.iterdir())
    }
    about |= {"index": dataclasses.asdict(settings), "files": files}
    write_text(folder / "index.json", json.dumps(about, indent=2) + "\n")


def _write_matrix(path: Path, embeddings: np.ndarray, dtype: np.dtype) -> None:
    """Embeddings as a .npy file, block by block. (`np.save` does not notice a full disk.)"""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {**header, "shape": embeddings.shape})
        for _, block in blocks(embeddings):
            file.write(block.astype(dtype, copy=False).data)
