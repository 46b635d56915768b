"""Token sequences of a data file, made once, cached by content, memory-mapped.

Two steps, both cached: the tokens of every text (data and tokenizer decide), and the sequences
that a model sees (the layout decides). Another layout costs no new tokenising.

A large file is cut into parts of rows, an entry of the cache each. Processes that share a cache,
such as the hosts of one run, each make the parts that no other has made or is making; what a
killed one had finished stays.
"""

import functools
import hashlib
import json
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pref_jax import cache, hosts
from pref_jax.data.segments import Form, Layout, cut, kept_lengths
from pref_jax.data.tokenizers import Tokenizer

if TYPE_CHECKING:
    import pyarrow as pa

    from pref_jax.data.arena import Comparisons

_VERSION = 3  # of everything here, `tokenizers` and `segments` that shapes a cached file
_ROWS = 512  # per record batch: a few MB of text
_PART_ROWS = 128 * _ROWS
TEXTS = ("prompt", "response_a", "response_b")
# Of each sequence: tokens of its first and of its last response, before cutting.
_LENGTHS = ("first_length", "last_length")

_log = logging.getLogger(__name__)


class _Lists:
    """A column of integer lists in memory-mapped record batches, all but the last of one length.

    Four bytes a list are held, its length.
    """

    def __init__(self, batches: Sequence["pa.RecordBatch"], name: str) -> None:
        columns = [batch.column(name) for batch in batches]
        self._offsets = [column.offsets.to_numpy() for column in columns]
        self._values = [column.values.to_numpy() for column in columns]
        self._step = len(columns[0]) if columns else 1
        self.lengths = np.concatenate(
            [np.zeros(0, np.int32), *(np.diff(offsets) for offsets in self._offsets)]
        )

    def __getitem__(self, index: int) -> np.ndarray:
        batch, place = divmod(index, self._step)
        offsets = self._offsets[batch]
        return self._values[batch][offsets[place] : offsets[place + 1]]


class Tokens:
    """All tokens of every text of a data file, nothing cut.

    Attributes:
      lengths: int32 [rows, 3], tokens of prompt, response A and response B.
    """

    def __init__(self, batches: Sequence["pa.RecordBatch"]) -> None:
        self._columns = [_Lists(batches, name) for name in TEXTS]
        self.lengths = np.stack([column.lengths for column in self._columns], axis=1)

    def __getitem__(self, row: int) -> list[np.ndarray]:
        """Ids of prompt, response A and response B: int32 views into the file."""
        return [column[row] for column in self._columns]


class Features:
    """Sequences as a model sees them.

    A sample is a comparison, except in the layout "response", where sample ``2 * row + side`` is
    one response of it (side 0: A, 1: B).

    Attributes:
      digest: hash of data, tokenizer and layout.
      num_samples: number of samples.
      sides: sequences per sample.
      pools_last: whether a sequence is judged by its last token, not by its first.
      lengths: int32 [num_samples, sides], tokens of each sequence, special tokens included.
    """

    def __init__(self, digest: str, batches: Sequence["pa.RecordBatch"], layout: Layout) -> None:
        self.digest = digest
        self.sides = layout.sides
        self.pools_last = layout.pools_last
        self._ids = _Lists(batches, "ids")
        self._type_starts = [batch.column("type_start").to_numpy() for batch in batches]
        self._text_lengths = [
            [batch.column(name).to_numpy() for batch in batches] for name in _LENGTHS
        ]
        self._step = len(self._type_starts[0]) if batches else 1
        self.lengths = self._ids.lengths.reshape(-1, self.sides)
        self.num_samples = len(self.lengths)

    def __len__(self) -> int:
        return self.num_samples

    def sequence(self, sample: int, side: int = 0) -> np.ndarray:
        """Ids of one sequence: an int32 view into the file, not to be written to."""
        return self._ids[sample * self.sides + side]

    def type_start(self, sample: int, side: int = 0) -> int:
        """Index of the first token of type 1: behind the prompt's separator."""
        batch, place = divmod(sample * self.sides + side, self._step)
        return int(self._type_starts[batch][place])

    def text_lengths(self, sample: int) -> tuple[int, int]:
        """Tokens of A and of B before cutting; of a single response its own, twice."""
        found = []
        for column, side in zip(self._text_lengths, (0, self.sides - 1), strict=True):
            batch, place = divmod(sample * self.sides + side, self._step)
            found.append(int(column[batch][place]))
        return found[0], found[1]


def make_features(
    comparisons: "Comparisons", tokenizer: Tokenizer, layout: Layout, *, progress: bool = True
) -> Features:
    """The features of a data file, from the cache where they are there.

    Memory does not grow with the file beyond a few numbers per row: texts are read, and ids
    written and read, through memory-mapped Arrow files.

    Args:
      comparisons: a data file.
      tokenizer: its `digest` is part of the cache's key.
      layout: form of the model's input.
      progress: show a bar on a terminal, lines elsewhere.
    """
    form = Form(layout, tokenizer)
    settings = {**asdict(form.layout), "budget": [str(share) for share in layout.budget]}
    settings["fixed"] = [piece.tolist() for piece in form.fixed]
    tokens_key = _tokens_key(comparisons, tokenizer)
    key = _hash([tokens_key, {name: str(value) for name, value in settings.items()}])

    @functools.cache
    def tokens() -> Tokens:  # asked for only where a part has to be made
        return make_tokens(comparisons, tokenizer, progress=progress)

    def make(rows: range, path: Path) -> None:
        ends = None
        if layout.truncation == "turns":
            ends = functools.partial(turn_ends, comparisons, tokenizer)
        _write(path, _sequences(tokens(), form, rows, ends), _sequence_schema())

    return Features(key, _load_parts("features", key, len(comparisons), make), layout)


def make_tokens(
    comparisons: "Comparisons", tokenizer: Tokenizer, *, progress: bool = True
) -> Tokens:
    """All tokens of a data file, from the cache where they are there."""
    with _Progress("tokenising", len(comparisons), progress) as bar:

        def make(rows: range, path: Path) -> None:
            _write(path, _encode(comparisons, tokenizer, rows, bar), _token_schema())

        key = _tokens_key(comparisons, tokenizer)
        return Tokens(_load_parts("tokens", key, len(comparisons), make))


def turn_ends(
    comparisons: "Comparisons", tokenizer: Tokenizer, rows: range
) -> list[list[list[int]]]:
    """How many of a text's tokens come before the end of each of its turns, but for the last.

    A token that holds the end of one turn and what follows it belongs to the first.

    Returns:
      For each of the rows, and of it for each of `TEXTS`.
    """
    table = comparisons.table.slice(rows.start, len(rows))
    columns = []
    for name in TEXTS:
        texts, ends = table[name].to_pylist(), table[f"{name}_ends"].to_pylist()
        starts = [text[:end] for text, row in zip(texts, ends, strict=True) for end in row]
        counts = iter([len(ids) for ids in tokenizer.encode(starts)] if starts else [])
        columns.append([[next(counts) for _ in row] for row in ends])
    return [list(row) for row in zip(*columns, strict=True)]


def _load_parts(
    kind: str, key: str, num_rows: int, make: Callable[[range, Path], None]
) -> list["pa.RecordBatch"]:
    """The record batches of all parts of a file; ``make`` writes those of some rows."""
    parts = {}
    for start in range(0, num_rows, _PART_ROWS):
        rows = range(start, min(start + _PART_ROWS, num_rows))
        name = key if num_rows <= _PART_ROWS else f"{key}-{start}"
        parts[name] = functools.partial(make, rows)
    # Hosts start at different parts and pass over what another is making; the rest is waited for.
    names = list(parts)
    first = len(names) * hosts.index() // hosts.count()
    for name in names[first:] + names[:first]:
        cache.entry(kind, name, parts[name], wait=False)
    loaded = [cache.load(kind, name, parts[name], _read) for name in names]
    return [batch for batches in loaded for batch in batches]


def _tokens_key(comparisons: "Comparisons", tokenizer: Tokenizer) -> str:
    return _hash([_VERSION, comparisons.digest, tokenizer.digest])


def _hash(parts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _token_schema() -> "pa.Schema":
    import pyarrow as pa

    return pa.schema([(name, pa.list_(pa.int32())) for name in TEXTS])


def _sequence_schema() -> "pa.Schema":
    import pyarrow as pa

    counts = [(name, pa.int32()) for name in ("type_start", *_LENGTHS)]
    return pa.schema([("ids", pa.list_(pa.int32())), *counts])


def _write(path: Path, batches: Iterator[list["pa.Array"]], schema: "pa.Schema") -> None:
    import pyarrow as pa

    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for columns in batches:
            writer.write_batch(pa.record_batch(columns, schema=schema))


def _read(path: Path) -> list["pa.RecordBatch"]:
    import pyarrow as pa

    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    return [reader.get_batch(index) for index in range(reader.num_record_batches)]


def _list_array(arrays: Sequence[np.ndarray]) -> "pa.Array":
    import pyarrow as pa

    offsets = np.zeros(len(arrays) + 1, np.int32)
    np.cumsum([len(array) for array in arrays], out=offsets[1:])
    return pa.ListArray.from_arrays(offsets, np.concatenate([np.zeros(0, np.int32), *arrays]))


def _encode(
    comparisons: "Comparisons", tokenizer: Tokenizer, rows: range, bar: "_Progress"
) -> Iterator[list["pa.Array"]]:
    """Tokenises each text once, in threads: both tokenizers work outside Python's lock."""
    table = comparisons.table.slice(rows.start, len(rows))

    def encode(start: int) -> list["pa.Array"]:
        part = table.slice(start, _ROWS)
        texts = [text for name in TEXTS for text in part[name].to_pylist()]
        ids = tokenizer.encode(texts)
        return [_list_array(ids[i * len(part) : (i + 1) * len(part)]) for i in range(len(TEXTS))]

    workers = min(8, os.cpu_count() or 1)
    pending: deque[Future[list[pa.Array]]] = deque()
    starts = iter(range(0, len(table), _ROWS))
    with ThreadPoolExecutor(workers, "tokenize") as pool:
        try:
            while True:
                # No more in flight than are worked on: memory stays flat.
                while len(pending) <= workers and (start := next(starts, None)) is not None:
                    pending.append(pool.submit(encode, start))
                if not pending:
                    return
                columns = pending.popleft().result()
                yield columns
                bar.advance(len(columns[0]))
        finally:
            pool.shutdown(cancel_futures=True)


def _sequences(
    tokens: Tokens,
    form: Form,
    rows: range,
    ends_of: Callable[[range], list[list[list[int]]]] | None,
) -> Iterator[list["pa.Array"]]:
    import pyarrow as pa

    layout = form.layout
    # Columns of the row's segments that go into each of its sequences.
    picks = [[0, 1, 2]] if layout.sequences_per_row == 1 else [[0, 1], [0, 2]]
    for start in range(rows.start, rows.stop, _ROWS):
        some = range(start, min(start + _ROWS, rows.stop))
        lengths = tokens.lengths[some.start : some.stop]
        turns = ends_of(some) if ends_of else [[()] * len(TEXTS)] * len(some)
        kept = [kept_lengths(lengths[:, pick], layout) for pick in picks]
        sequences: list[np.ndarray] = []
        type_starts: list[int] = []
        # The prompt is a sequence's first segment.
        ends = [
            np.stack([lengths[:, pick[at]] for pick in picks], axis=1).reshape(-1) for at in (1, -1)
        ]
        for row in range(len(lengths)):
            segments = tokens[start + row]
            for pick, keep in zip(picks, kept, strict=True):
                parts = [
                    cut(
                        segments[column],
                        int(count),
                        layout.truncation,
                        form.marker,
                        turns[row][column],
                    )
                    for column, count in zip(pick, keep[row], strict=True)
                ]
                ids, type_start = form.join(parts)
                sequences.append(ids)
                type_starts.append(type_start)
        yield [
            _list_array(sequences),
            pa.array(type_starts, pa.int32()),
            *(pa.array(column, pa.int32()) for column in ends),
        ]


class _Progress:
    """A bar on a terminal; elsewhere a line every 10 s."""

    def __init__(self, what: str, total: int, shown: bool) -> None:
        self._what, self._total, self._shown = what, total, shown
        self._done, self._next = 0, time.monotonic() + 10
        self._bar: Any = None

    def __enter__(self) -> "_Progress":
        if self._shown and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self._total, desc=self._what, unit=" rows")
        return self

    def advance(self, rows: int) -> None:
        self._done += rows
        if self._bar is not None:
            self._bar.update(rows)
        elif self._shown and time.monotonic() >= self._next:
            self._next = time.monotonic() + 10
            _log.info("%s: %d of %d rows", self._what, self._done, self._total)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
