"""Collections larger than memory: texts and triples in memory-mapped Arrow files, read in any order."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from adaptive_margins.data.collection import Texts, Triple
from adaptive_margins.data.text import DataError
from adaptive_margins.files import whole_file
from adaptive_margins.progress import Countdown

if TYPE_CHECKING:
    from datasets import Dataset

_TEXT_BATCH = 10_000  # texts in one record batch: some megabytes of passages
_TRIPLE_BATCH = 1_000_000  # triples in one record batch: 12 MB
_LOOKED_UP = 2_000_000  # triples whose ids are looked up at once: a hash table of all ids is built for each lot
_SHOWN = 20
_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"
COLUMNS = ("query", "positive", "negative")
_TEXTS = pa.schema({"id": pa.string(), "text": pa.string()})
_TRIPLES = pa.schema(dict.fromkeys(COLUMNS, pa.int32()))


# ---- texts ---------------------------------------------------------------------------------------------------------


class _Strings(Sequence[str]):
    """A memory-mapped column of texts; a slice of it is a list."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self.column = column

    def __len__(self) -> int:
        return len(self.column)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if not isinstance(index, slice):
            return self.column[int(index)].as_py()
        rows = range(len(self))[index]
        if rows.step == 1:
            return self.column.slice(rows.start, len(rows)).to_pylist()
        return self.column.take(pa.array(rows, pa.int64())).to_pylist()

    def __iter__(self) -> Iterator[str]:
        for chunk in self.column.chunks:
            yield from chunk.to_pylist()


class StoredTexts(Texts):
    """`Texts` in a memory-mapped Arrow file, as `write_texts` leaves them.

    ``ids`` and ``texts`` are sequences whose items are read when asked for; a slice is a list. The rows in the order of
    their ids lie beside the file (``NAME.order.npy``, int32), for a binary search.

    Raises:
        DataError: a file is missing, cut short, or holds something else.
    """

    def __init__(self, path: Path) -> None:
        table = _mapped(path, _TEXTS)
        order_path = _order_path(path)
        try:
            order = np.load(order_path, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise DataError(f"{order_path} cannot be read: {error}") from error
        if order.shape != (len(table),) or order.dtype != np.int32:
            raise DataError(
                f"{order_path} orders {len(order)} ids, {path} has {len(table)}; one of them was changed"
            )
        # A frozen dataclass sets its fields this way, too.
        object.__setattr__(self, "path", path)
        object.__setattr__(self, "ids", _Strings(table["id"]))
        object.__setattr__(self, "texts", _Strings(table["text"]))
        object.__setattr__(self, "_order", order)

    path: Path
    _order: np.ndarray

    def _find(self, identifier: str) -> int | None:
        # Where ids count the rows, as MS MARCO's passages do, no search is needed.
        if identifier.isdecimal() and len(identifier) < 11:
            row = int(identifier)
            if row < len(self) and self.ids[row] == identifier:
                return row
        wanted = identifier.encode("utf-8")  # Arrow sorts by bytes
        low, high = 0, len(self)
        while low < high:
            middle = (low + high) // 2
            if self.ids[self._order[middle]].encode("utf-8") < wanted:
                low = middle + 1
            else:
                high = middle
        if low < len(self) and self.ids[self._order[low]] == identifier:
            return int(self._order[low])
        return None

    def __contains__(self, identifier: str) -> bool:
        return self._find(identifier) is not None

    def row(self, identifier: str) -> int:
        """The position of an id; KeyError names the id."""
        row = self._find(identifier)
        if row is None:
            raise KeyError(f"no text has the id {identifier!r} ({len(self)} ids)")
        return row


def write_texts(
    path: Path, pairs: Iterable[tuple[str, str]], *, what: str, expected: int | None = None
) -> StoredTexts:
    """Write (id, text) pairs in their order, a batch at a time; only the ids are ever in memory together.

    ``path`` appears when everything is written and checked, or not at all; a finished file is replaced. ``what`` names
    the texts in errors and in the progress on stderr, which has the time left if the number ``expected`` is known.
    A text may be empty, an id may not.

    Raises:
        DataError: an id that is empty, has white space or occurs twice (with both positions, counted from 1), or
            another number of texts than ``expected``.
    """
    path = Path(path)
    with whole_file(path) as partial:
        count = 0
        countdown = Countdown(what, expected, "texts")
        with _stream_writer(partial, _TEXTS) as writer:
            for batch in _batches(pairs, _TEXT_BATCH):
                ids, texts = ([pair[side] for pair in batch] for side in (0, 1))
                for position, (identifier, text) in enumerate(batch, start=count + 1):
                    if identifier.split() != [identifier]:
                        raise DataError(
                            f"{what}, number {position}: id {identifier!r} is empty or has white space"
                        )
                    if not isinstance(text, str):
                        raise DataError(f"{what}, number {position}: expected a text, not {text!r}")
                writer.write_batch(pa.record_batch([pa.array(ids), pa.array(texts)], schema=_TEXTS))
                count += len(batch)
                countdown.update(count)
        check_count(what, count, expected)
        ids = _mapped(partial, _TEXTS)["id"].combine_chunks()
        order = pc.sort_indices(ids)  # stable: equal ids keep the order of their positions
        ordered = ids.take(order)
        twice = np.flatnonzero(pc.equal(ordered[1:], ordered[:-1]).to_numpy(zero_copy_only=False))
        if len(twice):
            first = int(twice[0])
            raise DataError(
                f"{what}: id {ordered[first].as_py()!r} occurs twice, as number {order[first].as_py() + 1}"
                f" and number {order[first + 1].as_py() + 1} ({len(twice)} such pairs)"
            )

        # First the order: the texts' own name says that both are there.
        with whole_file(_order_path(path)) as partial_order, partial_order.open("wb") as file:
            np.save(file, order.to_numpy().astype(np.int32))
    return StoredTexts(path)


def _order_path(path: Path) -> Path:
    return path.with_suffix(".order.npy")


# ---- triples -------------------------------------------------------------------------------------------------------


class StoredTriples(Sequence[Triple]):
    """Triples as rows of training queries and passages in a memory-mapped Arrow file, as `write_triples` leaves them.

    As a sequence it gives ids: (query id, docid of the positive, docid of the negative).

    Raises:
        DataError: the file is missing, cut short, or holds something else.
    """

    def __init__(self, path: Path, queries: Texts, passages: Texts) -> None:
        self.path, self._ids = Path(path), (queries.ids, passages.ids, passages.ids)
        self._table = _mapped(self.path, _TRIPLES)

    def __len__(self) -> int:
        return len(self._table)

    @overload
    def __getitem__(self, index: int) -> Triple: ...
    @overload
    def __getitem__(self, index: slice) -> list[Triple]: ...
    def __getitem__(self, index: int | slice) -> Triple | list[Triple]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        query, positive, negative = (
            ids[column[index].as_py()]
            for ids, column in zip(self._ids, self._table.columns, strict=True)
        )
        return query, positive, negative

    @cached_property
    def rows(self) -> Dataset:
        """The triples as a memory-mapped Hugging Face dataset: int32 columns query, positive, negative."""
        from datasets import Dataset

        return Dataset.from_file(str(self.path))

    def column(self, name: str) -> np.ndarray:
        """One column (query, positive or negative) in memory, int32."""
        return self._table[name].to_numpy()

    def chunks(self) -> Iterator[np.ndarray]:
        """All rows in order, as int32 matrices (n, 3)."""
        for batch in self._table.to_batches():
            yield np.column_stack([column.to_numpy() for column in batch.columns])


def write_triples(
    path: Path,
    triples: Iterable[tuple[str, str, str]],
    queries: Texts,
    passages: Texts,
    *,
    expected: int | None = None,
) -> StoredTriples:
    """Write (query id, docid, docid) triples in their order as rows, a batch at a time.

    ``path`` appears when everything is written and checked, or not at all; a finished file is replaced.

    Raises:
        DataError: ids that ``queries`` or ``passages`` do not have (the first 20, with their positions, counted from 1),
            or another number of triples than ``expected``.
    """
    finders = [_finder(queries), _finder(passages)]
    with whole_file(Path(path)) as partial:
        count = 0
        countdown = Countdown("triples", expected, "triples")
        unknown: list[str] = []
        with _stream_writer(partial, _TRIPLES) as writer:
            for columns in _columns(triples, 3, _LOOKED_UP):
                length = len(columns[0])
                # Positives and negatives together: one lookup instead of two.
                found = [
                    finders[0](columns[0]),
                    finders[1](pa.concat_arrays([columns[1], columns[2]])),
                ]
                rows = [found[0], found[1][:length], found[1][length:]]
                missing = np.flatnonzero(np.any([column < 0 for column in rows], axis=0))
                for at in missing[: _SHOWN - len(unknown)]:
                    unknown.append(
                        f"triple {count + at + 1}: "
                        + ", ".join(
                            f"unknown {name} {column[int(at)].as_py()!r}"
                            for name, column, row in zip(COLUMNS, columns, rows, strict=True)
                            if row[at] < 0
                        )
                    )
                count += length
                if len(unknown) == _SHOWN:
                    break
                for start in range(0, length, _TRIPLE_BATCH):
                    part = [pa.array(column[start : start + _TRIPLE_BATCH]) for column in rows]
                    writer.write_batch(pa.record_batch(part, schema=_TRIPLES))
                countdown.update(count)
        if unknown:
            raise DataError(
                f"triples name ids that the collection does not have (at most {_SHOWN} shown)\n  "
                + "\n  ".join(unknown)
            )
        check_count("triples", count, expected)
    return StoredTriples(Path(path), queries, passages)


def select_triples(path: Path, triples: StoredTriples, numbers: np.ndarray) -> None:
    """Write only the triples of these row numbers, in their order, whole or not at all."""
    with whole_file(Path(path)) as partial, _stream_writer(partial, _TRIPLES) as writer:
        columns = [triples.column(name) for name in COLUMNS]
        for start in range(0, len(numbers), _TRIPLE_BATCH):
            chosen = numbers[start : start + _TRIPLE_BATCH]
            part = [pa.array(column[chosen]) for column in columns]
            writer.write_batch(pa.record_batch(part, schema=_TRIPLES))


def first_per_query(queries: np.ndarray, count: int) -> np.ndarray:
    """Row numbers, ascending, of the first ``count`` rows of each query; queries with fewer rows are dropped.

    ``queries`` is the (N,) column of query rows. This is how the authors' released code chooses its triples (count 128).
    Needs about 24 bytes a row while it works.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, not {count}")
    order = np.argsort(queries, kind="stable")
    grouped = queries[order]
    starts = np.flatnonzero(np.r_[True, grouped[1:] != grouped[:-1]][: len(grouped)])
    sizes = np.diff(np.r_[starts, len(grouped)])
    enough = starts[sizes >= count]
    kept = order[(enough[:, None] + np.arange(count)).ravel()]
    kept.sort()
    return kept


# ---- random order --------------------------------------------------------------------------------------------------


def seeded_order(n: int, seed: int, start: int, stop: int) -> np.ndarray:
    """Positions ``start`` to ``stop`` (exclusive) of a pseudo-random permutation of range(n), int64.

    The permutation is never held in memory: a balanced Feistel network over the smallest even number of bits (at least 8)
    that holds n, applied again to what falls outside range(n) ("cycle walking"), is a bijection of range(n)
    (Black & Rogaway, Ciphers with Arbitrary Finite Domains, CT-RSA 2002; Luby & Rackoff 1988). The round function
    is the 64-bit finaliser of splitmix64 (Steele, Lea & Flood 2014). Not meant for secrets. The result depends on n and
    ``seed`` alone, never on how a range is cut into parts.

    Raises:
        ValueError: not 0 ≤ start ≤ stop ≤ n, or n above 2⁶⁰.
    """
    if not 0 <= start <= stop <= n <= 2**60:
        raise ValueError(f"expected 0 ≤ start ≤ stop ≤ n ≤ 2⁶⁰, not {start}, {stop}, {n}")
    half = max(4, -(-max(n - 1, 1).bit_length() // 2))
    keys = np.random.SeedSequence([n, seed]).generate_state(8, np.uint64)
    values = _feistel(np.arange(start, stop, dtype=np.uint64), half, keys)
    outside = np.flatnonzero(values >= n)
    while len(outside):
        values[outside] = _feistel(values[outside], half, keys)
        outside = outside[values[outside] >= n]
    return values.astype(np.int64)


def _feistel(values: np.ndarray, half: int, keys: np.ndarray) -> np.ndarray:
    """A bijection of the integers of 2 · ``half`` bits; one round a key."""
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mixed(right + key) & mask)
    return (left << shift) | right


def _mixed(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64; sums and products are modulo 2⁶⁴."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class SeededBatches:
    """The first ``steps`` batches of `seeded_order`, as lists of row numbers: a batch sampler for torch's DataLoader.

    No row occurs twice, and every iteration gives the same batches.

    Raises:
        ValueError: there are fewer than steps · batch_size rows, or a number is not positive.
    """

    _CHUNK = 2**16  # rows whose order is computed at once

    def __init__(self, n: int, seed: int, batch_size: int, steps: int) -> None:
        if batch_size < 1 or steps < 0:
            raise ValueError(
                f"batch_size must be at least 1 and steps at least 0, not {batch_size}, {steps}"
            )
        if steps * batch_size > n:
            raise ValueError(
                f"{steps} steps of {batch_size} need {steps * batch_size} rows, there are {n}"
            )
        self.n, self.seed, self.batch_size, self.steps = n, seed, batch_size, steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        chunk = max(self._CHUNK // self.batch_size, 1) * self.batch_size
        stop = self.steps * self.batch_size
        for start in range(0, stop, chunk):
            rows = seeded_order(self.n, self.seed, start, min(start + chunk, stop))
            yield from rows.reshape(-1, self.batch_size).tolist()


# ---- files ---------------------------------------------------------------------------------------------------------


def _mapped(path: Path, schema: pa.Schema) -> pa.Table:
    """The table in an Arrow stream file, memory-mapped."""
    try:
        with path.open("rb") as file:
            file.seek(-min(len(_END_OF_STREAM), path.stat().st_size), os.SEEK_END)
            if file.read() != _END_OF_STREAM:  # Arrow itself takes a shorter stream for a whole one
                raise DataError(f"{path} is cut short: the end of an Arrow stream is missing")
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


def check_count(what: str, count: int, expected: int | None) -> None:
    """Raise `DataError`, naming both numbers, if another one was ``expected``."""
    if expected is not None and count != expected:
        raise DataError(f"{what}: {expected:,} expected, {count:,} found")


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def _columns(items: Iterable[Any], width: int, size: int) -> Iterator[list[pa.Array]]:
    """Tuples of texts as Arrow columns, ``size`` rows at a time; never so many as Python objects."""
    parts: list[list[pa.Array]] = []
    for batch in _batches(items, _TEXT_BATCH):
        parts.append([pa.array(column, pa.string()) for column in zip(*batch, strict=True)])
        if sum(len(part[0]) for part in parts) >= size:
            yield [pa.concat_arrays([part[i] for part in parts]) for i in range(width)]
            parts = []
    if parts:
        yield [pa.concat_arrays([part[i] for part in parts]) for i in range(width)]


def _finder(texts: Texts) -> Callable[[pa.Array], np.ndarray]:
    """A function from ids to their rows (int32), −1 for unknown ones."""
    stored = texts.ids if isinstance(texts.ids, _Strings) else None
    ids = stored.column if stored else pa.chunked_array([texts.ids], pa.string())

    def search(wanted: pa.Array) -> np.ndarray:
        return pc.fill_null(pc.index_in(wanted, value_set=ids), -1).to_numpy()

    def convert(wanted: pa.Array) -> np.ndarray:
        try:
            rows = pc.cast(wanted, pa.int32())
        except pa.ArrowInvalid:  # some are not numbers: find out which
            return search(wanted)
        in_range = pc.and_(pc.greater_equal(rows, 0), pc.less(rows, len(ids)))
        known = pc.and_(in_range, pc.equal(pc.cast(rows, pa.string()), wanted))  # "007" is not 7
        return pc.if_else(known, rows, pa.scalar(-1, pa.int32())).to_numpy()

    # Ids that count the rows, as MS MARCO's passages do, are converted: 20 times as fast as looking them up.
    counted = pc.cast(pa.array(np.arange(len(ids), dtype=np.int32)), pa.string())
    return convert if ids.equals(pa.chunked_array([counted])) else search
