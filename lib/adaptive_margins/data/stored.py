"""Texts and triples in memory-mapped Arrow files, larger than memory; the order of triples."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from adaptive_margins.data.collection import Texts, Triple, id_fault
from adaptive_margins.data.text import DataError, Problems
from adaptive_margins.files import atomic_file
from adaptive_margins.progress import bar

if TYPE_CHECKING:
    from datasets import Dataset

_BATCH = 10_000  # rows of a record batch: some megabytes of passages
COLUMNS = ("query", "positive", "negative")
_TEXTS = pa.schema({"id": pa.string(), "text": pa.string()})
_TRIPLES = pa.schema(dict.fromkeys(COLUMNS, pa.int32()))


def seeded_order(n: int, seed: int) -> np.ndarray:
    """Return ``numpy.random.default_rng(seed).permutation(n)`` as int32 (int64 from 2³¹ on).

    Runs see triples in this order, at most once; shorter runs see the first ones of longer runs.
    """
    order = np.arange(n, dtype=np.int32 if n < 2**31 else np.int64)
    np.random.default_rng(seed).shuffle(order)
    return order


# ---- texts ---------------------------------------------------------------------------------------


class _Strings(Sequence[str]):
    """A memory-mapped column of texts; a slice of it is a list."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self.column = column

    def __len__(self) -> int:
        return len(self.column)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.column[index].to_pylist()
        return self.column[int(index)].as_py()

    def __iter__(self) -> Iterator[str]:
        for chunk in self.column.chunks:
            yield from chunk.to_pylist()


class _Counting(Mapping[str, int]):
    """Rows of the ids "0", "1", "2", … (as in MS MARCO), without a dictionary in memory."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __getitem__(self, identifier: str) -> int:
        row = int(identifier) if identifier.isdecimal() and len(identifier) < 20 else self.count
        if row >= self.count or str(row) != identifier:  # "007" is not 7
            raise KeyError(identifier)
        return row

    def __iter__(self) -> Iterator[str]:
        return map(str, range(self.count))

    def __len__(self) -> int:
        return self.count


class StoredTexts(Texts):
    """`Texts` in a memory-mapped Arrow file that `write_texts` wrote.

    A slice of ``ids`` or ``texts`` is a list. The first lookup of an id builds a dictionary of all
    ids, unless they are the row numbers.

    Raises:
        DataError: the file is missing, damaged, or has other columns.
    """

    ids: _Strings
    texts: _Strings

    def __init__(self, path: Path) -> None:
        table = _mapped(path, _TEXTS)
        # As frozen dataclasses set their fields.
        object.__setattr__(self, "ids", _Strings(table["id"]))
        object.__setattr__(self, "texts", _Strings(table["text"]))

    @cached_property
    def _rows(self) -> Mapping[str, int]:
        if _are_counted(self.ids.column):
            return _Counting(len(self.ids))
        return {identifier: row for row, identifier in enumerate(self.ids)}


def _are_counted(ids: pa.ChunkedArray) -> bool:
    """Whether the ids are "0", "1", "2", …"""
    counted = pc.cast(pa.array(np.arange(len(ids), dtype=np.int32)), pa.string())
    return ids.equals(pa.chunked_array([counted]))


def write_texts(
    path: Path, pairs: Iterable[tuple[str, str]], *, what: str, expected: int | None = None
) -> StoredTexts:
    """Write (id, text) pairs in their order, atomically; only ids are all in memory.

    ``what`` the texts are ("passages") is for errors and progress.

    Raises:
        DataError: an id that is empty, has white space or occurs twice (with both positions, from
            1), or another number of texts than ``expected`` (None: any).
    """

    def checked() -> Iterator[tuple[str, str]]:
        listed = bar(f"writing {what}", pairs, total=expected, unit="texts")
        for number, (identifier, text) in enumerate(listed, start=1):
            fault = id_fault(identifier)
            if not isinstance(text, str):
                fault = f"expected a text, not {text!r}"
            if fault:
                raise DataError(f"{what}, number {number}: {fault}")
            yield identifier, text

    with atomic_file(Path(path)) as partial:
        check_count(what, _write_rows(partial, _TEXTS, checked()), expected)
        _check_unique(what, _mapped(partial, _TEXTS)["id"])
    return StoredTexts(Path(path))


def _check_unique(what: str, ids: pa.ChunkedArray) -> None:
    if _are_counted(ids):  # a hash table of millions needs half a gigabyte
        return
    counts = pc.value_counts(ids)
    repeated = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
    if len(repeated):
        places = np.flatnonzero(pc.equal(ids, repeated[0]).to_numpy())
        raise DataError(
            f"{what}: id {repeated[0].as_py()!r} occurs twice, as number {places[0] + 1} and number"
            f" {places[1] + 1} ({len(repeated)} such ids)"
        )


# ---- triples -------------------------------------------------------------------------------------


class StoredTriples(Sequence[Triple]):
    """Triples in a memory-mapped Arrow file that `write_triples` wrote, as rows of texts.

    Its items are ids: (query id, docid of the positive, docid of the negative).

    Raises:
        DataError: the file is missing, damaged, or has other columns.
    """

    def __init__(self, path: Path, queries: Texts, passages: Texts) -> None:
        self.path, self._ids = Path(path), (queries.ids, passages.ids, passages.ids)
        self._table = _mapped(self.path, _TRIPLES)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        columns = zip(self._ids, self._table.columns, strict=True)
        return tuple(ids[column[int(index)].as_py()] for ids, column in columns)

    @cached_property
    def rows(self) -> Dataset:
        """The triples as a memory-mapped Hugging Face dataset with the int32 `COLUMNS`."""
        from datasets import Dataset

        return Dataset.from_file(str(self.path))

    def column(self, name: str) -> np.ndarray:
        """One of the `COLUMNS` in memory, int32."""
        return self._table[name].to_numpy()

    def chunks(self) -> Iterator[np.ndarray]:
        """All rows in order, as int32 matrices (n, 3)."""
        for batch in self._table.to_batches():
            yield np.column_stack([column.to_numpy() for column in batch.columns])


def write_triples(
    path: Path,
    triples: Iterable[Sequence[str]],
    queries: Texts,
    passages: Texts,
    *,
    what: str = "triples",
    expected: int | None = None,
) -> StoredTriples:
    """Write (query id, docid, docid) triples in their order, as rows, atomically.

    ``what`` the triples are is for errors and progress.

    Raises:
        DataError: unknown ids (with the position of the first of each kind, from 1), or another
            number of triples than ``expected`` (None: any).
    """
    problems = Problems()
    query_row, passage_row = queries.row, passages.row

    def numbered() -> Iterator[tuple[int, int, int]]:
        listed = bar(f"writing {what}", triples, total=expected, unit="triples")
        for number, (query, positive, negative) in enumerate(listed, start=1):
            try:
                yield query_row(query), passage_row(positive), passage_row(negative)
            except KeyError:
                if query not in queries:
                    problems.add(Path(what), number, f"unknown query {query!r}")
                for name, docid in (("positive", positive), ("negative", negative)):
                    if docid not in passages:
                        problems.add(Path(what), number, f"unknown {name} {docid!r}")

    with atomic_file(Path(path)) as partial:
        count = _write_rows(partial, _TRIPLES, numbered())
        problems.check()
        check_count("triples", count, expected)
    return StoredTriples(Path(path), queries, passages)


def select_triples(path: Path, triples: StoredTriples, numbers: np.ndarray) -> None:
    """Write the triples with these row numbers, in this order, atomically."""
    chosen = pa.table([triples.column(name)[numbers] for name in COLUMNS], schema=_TRIPLES)
    with atomic_file(Path(path)) as partial, _stream_writer(partial, _TRIPLES) as writer:
        writer.write_table(chosen, max_chunksize=_BATCH)


def first_per_query(queries: np.ndarray, count: int) -> np.ndarray:
    """Row numbers, ascending, of the first ``count`` rows of each query that has so many.

    ``queries`` is the (N,) column of query rows. The authors' released code selects its triples
    this way (count 128). Takes about 24 bytes a row.
    """
    order = np.argsort(queries, kind="stable")
    _, starts, sizes = np.unique(queries[order], return_index=True, return_counts=True)
    enough = starts[sizes >= count]
    return np.sort(order[(enough[:, None] + np.arange(count)).ravel()])


# ---- files ---------------------------------------------------------------------------------------


def _mapped(path: Path, schema: pa.Schema) -> pa.Table:
    """The table in an Arrow stream file, memory-mapped."""
    try:
        table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{path} cannot be read as an Arrow stream: {error}") from error
    if table.schema != schema:
        raise DataError(f"{path} has the columns {table.schema.names}, expected {schema.names}")
    return table


@contextmanager
def _stream_writer(path: Path, schema: pa.Schema) -> Iterator[Any]:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        yield writer


def _write_rows(path: Path, schema: pa.Schema, rows: Iterable[Sequence[Any]]) -> int:
    """Write rows to an Arrow stream file in batches; return their number."""
    count = 0
    with _stream_writer(path, schema) as writer:
        iterator = iter(rows)
        while batch := list(itertools.islice(iterator, _BATCH)):
            columns = zip(zip(*batch, strict=True), schema.types, strict=True)
            arrays = [pa.array(column, kind) for column, kind in columns]
            writer.write_batch(pa.record_batch(arrays, schema=schema))
            count += len(batch)
    return count


def check_count(what: str, count: int, expected: int | None) -> None:
    """Raise `DataError` if another number was ``expected``; None is any."""
    if expected is not None and count != expected:
        raise DataError(f"{what}: {expected:,} expected, {count:,} found")
