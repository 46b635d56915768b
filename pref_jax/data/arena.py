"""Reading and checking files of pairwise comparisons (the arena's ``train.csv``, ``test.csv``).

A file is CSV, gzipped CSV or Parquet. It is read once, row by row, so that memory does not grow
with the number of rows; what was read lies as an Arrow file in the cache, keyed by the content of
the file, and is memory-mapped from there. Nothing is ever written beside the data.

Decisions where the format leaves a choice:

* a text is a JSON list of turns, each a string or null; a null turn is the text ``null``, ``[]``
  is ``[null]``, a lone surrogate is ``?``; in Parquet it may also be a list of strings;
* a bare ``null`` and an empty cell are read as ``[null]`` and said in a warning: a test file that
  holds one still needs an answer for that row; any other bare word is refused;
* a label is ``0`` or ``1``, also written ``0.0``, ``1.0``, ``false`` or ``true``;
* lines that hold nothing at all are skipped, as every CSV reader does; they count as no row;
* CSV is UTF-8, with or without a byte-order mark, or UTF-16 with one, whatever the locale says.
"""

import csv
import functools
import gzip
import hashlib
import io
import json
import logging
import os
import re
import sys
import unicodedata
import zlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa

from pref_jax import cache
from pref_jax.bucket import fetch_file
from pref_jax.errors import InputError

LABELS = ("winner_model_a", "winner_model_b", "winner_tie")
TEXTS = ("prompt", "response_a", "response_b")
TIE = LABELS.index("winner_tie")
UNLABELLED = -1
TURN_SEPARATOR = "\n\n"

_READER_VERSION = "comparisons-1"
_ENTRY_VERSION = 2  # of the columns in the cache
_EXTENSIONS = (".csv", ".csv.gz", ".parquet")
_OPTIONAL = ("model_a", "model_b")
_ROWS_PER_BATCH = 1024
_BYTES_PER_BATCH = 16 << 20
_SURROGATE = re.compile("[\ud800-\udfff]")
_FLAGS = {"0": 0, "0.0": 0, "false": 0, "1": 1, "1.0": 1, "true": 1}

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Comparisons:
    """The rows of one file.

    Attributes:
      path: the file as the user named it.
      digest: hex digest of the file's bytes and of the reader's version.
      table: memory-mapped Arrow table, a row per comparison: ``id``, ``prompt``, ``response_a``,
        ``response_b`` (strings, turns joined by a blank line), ``label`` (int8, index into
        :data:`LABELS`, -1 where unlabelled), ``tie_allowed`` (bool), ``turns`` (int32, turns of
        the prompt), ``group`` (uint64, equal for prompts equal up to case, width and white space),
        ``source`` (string or null), and ``model_a``, ``model_b`` where the file has them. For each
        text also its ``_ends`` (such as ``prompt_ends``): the characters at which its turns end,
        but for the last.
    """

    path: str
    digest: str
    table: pa.Table

    def __len__(self) -> int:
        return self.table.num_rows

    @property
    def labelled(self) -> bool:
        """Whether every row has a label (a file has labels for all rows or for none)."""
        return bool(len(self)) and self.table.column("label")[0].as_py() != UNLABELLED

    @functools.cached_property
    def ids(self) -> list[str]:
        """Identifiers as typed, in the order of the file: a Python object a row."""
        return self.table.column("id").to_pylist()

    def iterate_ids(self) -> Iterator[str]:
        """The same, some at a time."""
        for chunk in self.table.column("id").chunks:
            yield from chunk.to_pylist()

    def iterate_texts(self) -> Iterator[str]:
        """Every prompt and response, some rows at a time."""
        for batch in self.table.select(TEXTS).to_batches():
            for column in batch.columns:
                yield from column.to_pylist()

    def id_at(self, row: int) -> str:
        """The identifier of one row."""
        return self.table.column("id")[row].as_py()

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """int8 [rows]: index into :data:`LABELS`, -1 where unlabelled."""
        return self.table.column("label").to_numpy()

    @functools.cached_property
    def tie_allowed(self) -> np.ndarray:
        """bool [rows]: whether the judge could call a tie."""
        return self.table.column("tie_allowed").to_numpy()

    @functools.cached_property
    def turns(self) -> np.ndarray:
        """int32 [rows]: turns of the prompt."""
        return self.table.column("turns").to_numpy()

    @property
    def groups(self) -> np.ndarray:
        """uint64 [rows]: hash of the normalised prompt; needed once, so not kept."""
        return self.table.column("group").to_numpy()

    @functools.cached_property
    def sources(self) -> list[str | None]:
        """Where each row comes from; None where the file does not say."""
        return self.table.column("source").to_pylist()


def read_comparisons(path: str | os.PathLike[str], *, labelled: bool | None = None) -> Comparisons:
    """Reads and checks a file of comparisons, from the cache where the same bytes were read before.

    Args:
      path: a ``.csv``, ``.csv.gz`` or ``.parquet`` file; also ``gs://BUCKET/PATH``.
      labelled: True: the three winner columns are required; False: they are not looked at; None:
        they are used where the file has them.

    Raises:
      InputError: the file cannot be read, or a row of it is wrong (named ``FILE:ROW``).
      RunError: the disk of the cache is full, or a bucket cannot be reached.
    """
    named = os.fspath(path)
    path = fetch_file(named)
    status = _regular_file(path)
    digest = _digest(path)

    def make(folder: Path) -> None:
        folder.mkdir()
        notes = _write_rows(path, folder / "rows.arrow", labelled)
        now = os.stat(path)
        if (status.st_size, status.st_mtime_ns) != (now.st_size, now.st_mtime_ns):
            raise InputError(path, "the file changed while it was read", "run the command again")
        (folder / "notes.json").write_text(json.dumps(notes), encoding="utf-8")

    kind = "unlabelled" if labelled is False else "rows"
    notes, table = cache.load("comparisons", f"{digest}-{kind}-{_ENTRY_VERSION}", make, _read_entry)
    if labelled and not notes["labelled"]:
        _columns_wanted(path, notes["columns"], labelled)
    if notes["empty_texts"]:
        _log.warning(
            "%s:%d: empty cell or bare null read as [null] (%d such cells in the file)",
            path,
            notes["first_empty_text"],
            notes["empty_texts"],
        )
    return Comparisons(path=named, digest=digest, table=table)


def _read_entry(folder: Path) -> tuple[dict[str, Any], pa.Table]:
    """Notes and memory-mapped rows of an entry of the cache."""
    notes = json.loads((folder / "notes.json").read_text(encoding="utf-8"))
    with pa.memory_map(str(folder / "rows.arrow")) as source:
        return notes, pa.ipc.open_file(source).read_all()


def iterate_cells(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The rows of a file as they stand in it, unchecked: names of columns to cells.

    For a file that :func:`read_comparisons` accepts.
    """
    stack: list[IO[bytes]] = []
    try:
        rows = _open_rows(fetch_file(path), stack)
        for cells in rows.cells:
            yield dict(zip(rows.columns, cells, strict=False))
    finally:
        for file in reversed(stack):
            file.close()


def normalise_prompt(turns: Sequence[str]) -> str:
    """The form in which two prompts count as the same: NFKC, no case, white space collapsed."""
    text = unicodedata.normalize("NFKC", TURN_SEPARATOR.join(turns)).casefold()
    return " ".join(text.split())


def parse_turns(cell: Any) -> list[str]:
    """The turns of one text, always at least one.

    Args:
      cell: a JSON list of strings and nulls, or such a list itself (Parquet). None, an empty cell
        and a bare ``null`` count as ``[null]``.

    Raises:
      ValueError: anything else, with what is wrong.
    """
    if isinstance(cell, str):
        if _is_empty(cell):
            cell = None
        else:
            try:
                cell = json.loads(cell)
            except json.JSONDecodeError as error:
                raise ValueError(f"not valid JSON ({error.msg} at character {error.pos})") from None
            except (ValueError, RecursionError):
                raise ValueError("JSON, but not a list of texts") from None
    if cell is None or cell == []:
        return ["null"]
    if not isinstance(cell, list):
        raise ValueError(f"{_json_type(cell)}, not a list of texts")
    turns = []
    for number, turn in enumerate(cell, start=1):
        if turn is None:
            turn = "null"
        elif not isinstance(turn, str):
            raise ValueError(f"turn {number} is {_json_type(turn)}, not a text or null")
        elif not turn.isascii():
            # The parser has joined true pairs; what is left has no UTF-8 form.
            turn = _SURROGATE.sub("?", turn)
        turns.append(turn)
    return turns


def _is_empty(cell: Any) -> bool:
    return cell is None or (isinstance(cell, str) and cell.strip() in ("", "null"))


def _json_type(value: Any) -> str:
    names: dict[type, str] = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a single text",
        dict: "an object",
        list: "a list",
    }
    return names.get(type(value), "a value")


# Files


def _regular_file(path: str) -> os.stat_result:
    name = os.path.basename(path).lower()
    if os.path.isdir(path):
        raise InputError(path, "is a folder, not a file", "name the CSV file inside it")
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        what = "no such file" if isinstance(error, FileNotFoundError) else _reason(error)
        raise InputError(path or "(no path)", what, "check the path") from None
    if not os.path.isfile(path):
        raise InputError(path, "is not a regular file", "save the data to a file first")
    if name.endswith((".zip", ".tar", ".tgz", ".tar.gz", ".7z", ".xz", ".bz2", ".zst")):
        raise InputError(path, "is a packed archive", "unpack it and name the CSV file")
    if not name.endswith(_EXTENSIONS):
        raise InputError(
            path, "unknown kind of file", f"use one that ends in {', '.join(_EXTENSIONS)}"
        )
    if status.st_size == 0:
        raise InputError(path, "the file is empty", "check how it was made or download it again")
    return status


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error)


def _open(path: str) -> IO[bytes]:
    try:
        return open(path, "rb")
    except OSError as error:
        raise InputError(
            path, f"cannot be opened: {_reason(error)}", "check its permissions"
        ) from error


def _digest(path: str) -> str:
    digest = hashlib.sha256(_READER_VERSION.encode())
    try:
        with _open(path) as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise InputError(path, f"cannot be read: {_reason(error)}", "check the disk") from error
    return digest.hexdigest()


# Raw rows: every format becomes the names of its columns and an iterator of lists of cells.


@dataclass
class _Rows:
    columns: list[str]
    cells: Iterator[Sequence[Any]]


def _open_rows(path: str, stack: list[IO[bytes]]) -> _Rows:
    file = _open(path)
    stack.append(file)
    magic = file.read(4)
    file.seek(0)
    parquet = path.lower().endswith(".parquet")
    if parquet != (magic == b"PAR1"):
        what = "not a Parquet file" if parquet else "a Parquet file under another name"
        raise InputError(path, what, "give the file the ending of what it holds")
    if parquet:
        return _parquet_rows(path, file)
    if magic == b"PK\x03\x04":
        raise InputError(path, "a zip archive (or a workbook)", "unpack it or save it as CSV")
    if magic[:2] == b"\x1f\x8b":
        file = gzip.GzipFile(fileobj=file)  # type: ignore[assignment]
        stack.append(file)
    return _csv_rows(path, file)


def _csv_rows(path: str, file: IO[bytes]) -> _Rows:
    rows = _csv_lists(path, file)
    columns = next(rows, None)
    if columns is None:
        raise InputError(path, "the file is empty", "check how it was made or download it again")
    return _Rows([str(name).strip() for name in columns], rows)


def _csv_lists(path: str, file: IO[bytes]) -> Iterator[list[str]]:
    """Every non-empty record of a CSV file, the header first."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    row = 0
    encoding = "utf-8-sig"
    try:
        buffered = io.BufferedReader(file, 1 << 18)  # type: ignore[type-var]
        if buffered.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff"):
            encoding = "utf-16"
        # newline="": the csv module alone decides where a record ends.
        text = io.TextIOWrapper(buffered, encoding=encoding, newline="")
        for record in csv.reader(text, strict=True):
            if record:
                yield record
                row += 1
    except UnicodeDecodeError as error:
        where = path if encoding == "utf-16" else _undecodable_row(path)
        raise InputError(
            where,
            f"not {encoding.removesuffix('-sig').upper()} text ({error.reason})",
            "save the file as UTF-8",
        ) from error
    except csv.Error as error:
        cut = "unexpected end" in str(error)
        raise InputError(
            f"{path}:{max(row, 1)}",
            "the file ends inside a quoted cell" if cut else f"broken CSV ({error})",
            "download the file again" if cut else "quote the cell and double the quotes in it",
        ) from error
    except EOFError as error:
        raise InputError(
            f"{path}:{max(row, 1)}", "the gzip file is cut short here", "download it again"
        ) from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise InputError(
            f"{path}:{max(row, 1)}", f"damaged gzip file ({error})", "download it again"
        ) from error


def _undecodable_row(path: str) -> str:
    """``FILE:ROW`` of the first record that is not UTF-8 (the decoder reads ahead of the rows)."""
    with _open(path) as raw:
        file: Any = gzip.GzipFile(fileobj=raw) if raw.read(2) == b"\x1f\x8b" else raw
        raw.seek(0)
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        row = 0
        try:
            for record in csv.reader(text):
                if any(_SURROGATE.search(cell) for cell in record):
                    return f"{path}:{row}" if row else path
                row += bool(record)
        except (csv.Error, EOFError, OSError, zlib.error):
            pass
    return path


def _parquet_rows(path: str, file: IO[bytes]) -> _Rows:
    import pyarrow.parquet as parquet

    damaged = InputError(path, "damaged Parquet file", "write or download it again")
    try:
        source = parquet.ParquetFile(file)
        columns = source.schema_arrow.names
    except (pa.ArrowException, OSError, ValueError) as error:
        raise damaged from error
    known = [name for name in columns if name in {"id", *TEXTS, *LABELS, *_OPTIONAL, *_EXTRAS}]

    def cells() -> Iterator[Sequence[Any]]:
        try:
            for batch in source.iter_batches(batch_size=256, columns=known):
                lists = [batch.column(name).to_pylist() for name in known]
                yield from zip(*lists, strict=True)
        except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
            raise damaged from error

    # An unknown column is not read at all; only known ones line up with the cells.
    repeated = [name for name in columns if columns.count(name) > 1 and name in known]
    return _Rows(repeated or known, cells())


# Checking


_EXTRAS = ("tie_allowed", "source")


def _columns_wanted(path: str, columns: Sequence[str], labelled: bool | None) -> bool:
    """Checks the names of the columns; returns whether labels are read."""
    repeated = sorted({name for name in columns if columns.count(name) > 1})
    wanted = {"id", *TEXTS, *LABELS, *_OPTIONAL, *_EXTRAS}
    repeated = [name for name in repeated if name in wanted]
    if repeated:
        raise InputError(path, f"column {repeated[0]} is there twice", "keep one of them")
    present = [name for name in LABELS if name in columns]
    needed = ["id", *TEXTS]
    if labelled or (labelled is None and present):
        needed += LABELS
    missing = [name for name in needed if name not in columns]
    if missing:
        found = ", ".join(ascii(name)[1:-1][:40] for name in columns[:12]) or "none"
        plural = "columns" if len(missing) > 1 else "column"
        raise InputError(
            path,
            f"{plural} {', '.join(missing)} missing (found: {found})",
            "add a header line that names every column, with commas between",
        )
    return labelled is not False and len(present) == len(LABELS)


@dataclass
class _Batch:
    """Columns of rows checked so far, written out when large enough."""

    schema: pa.Schema
    columns: dict[str, list[Any]] = field(default_factory=dict)
    size: int = 0

    def __post_init__(self) -> None:
        self.columns = {name: [] for name in self.schema.names}

    def add(self, row: Mapping[str, Any]) -> None:
        for name, values in self.columns.items():
            values.append(row[name])
        self.size += sum(len(row[name]) for name in TEXTS)

    @property
    def full(self) -> bool:
        return len(self.columns["id"]) >= _ROWS_PER_BATCH or self.size >= _BYTES_PER_BATCH

    def take(self) -> pa.RecordBatch:
        batch = pa.record_batch([self.columns[name] for name in self.schema.names], self.schema)
        self.size = 0
        self.__post_init__()
        return batch


def _write_rows(path: str, output: Path, labelled: bool | None) -> dict[str, Any]:
    stack: list[IO[bytes]] = []
    try:
        rows = _open_rows(path, stack)
        uses_labels = _columns_wanted(path, rows.columns, labelled)
        models = [name for name in _OPTIONAL if name in rows.columns]
        schema = _schema(models)
        notes: dict[str, Any] = {
            "columns": rows.columns[:64],
            "labelled": uses_labels,
            "empty_texts": 0,
            "first_empty_text": 0,
        }
        id_hashes = array("Q")  # Eight bytes a row are all that stays in memory.
        batch = _Batch(schema)
        with pa.OSFile(str(output), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for number, cells in enumerate(rows.cells, start=1):
                row = _checked_row(f"{path}:{number}", rows.columns, cells, uses_labels)
                empty = row.pop("empty_texts")
                if empty:
                    notes["empty_texts"] += empty
                    notes["first_empty_text"] = notes["first_empty_text"] or number
                id_hashes.append(_hash(row["id"]))
                batch.add(row)
                if batch.full:
                    writer.write_batch(batch.take())
            if batch.columns["id"]:
                writer.write_batch(batch.take())
    finally:
        for file in reversed(stack):
            file.close()
    if not id_hashes:
        raise InputError(path, "there is a header but no row", "check how the file was made")
    _check_unique(path, output, np.frombuffer(id_hashes, dtype=np.uint64))
    return notes


def _schema(models: Sequence[str]) -> pa.Schema:
    return pa.schema(
        [("id", pa.string())]
        + [(name, pa.string()) for name in TEXTS]
        + [
            ("label", pa.int8()),
            ("tie_allowed", pa.bool_()),
            ("turns", pa.int32()),
            ("group", pa.uint64()),
            ("source", pa.string()),
        ]
        + [(f"{name}_ends", pa.list_(pa.int32())) for name in TEXTS]
        + [(name, pa.string()) for name in models]
    )


def _checked_row(
    where: str, columns: Sequence[str], cells: Sequence[Any], uses_labels: bool
) -> dict[str, Any]:
    if len(cells) != len(columns):
        raise InputError(
            where,
            f"{len(cells)} cells where the header names {len(columns)} columns",
            "quote cells that hold commas or line breaks",
        )
    raw = dict(zip(columns, cells, strict=True))
    row: dict[str, Any] = {"id": "" if raw["id"] is None else str(raw["id"])}
    if not row["id"].strip():
        raise InputError(where, "the id is empty", "give every row its own id")
    empty_texts = 0
    for name in TEXTS:
        try:
            turns = parse_turns(raw[name])
        except ValueError as error:
            raise InputError(
                where,
                f"{name} is {_article(str(error))}: {_excerpt(raw[name])}",
                'write a JSON list of texts, such as ["one turn"]',
            ) from None
        empty_texts += _is_empty(raw[name])
        row[name] = TURN_SEPARATOR.join(turns)
        row[f"{name}_ends"] = _ends(turns)
        if name == "prompt":
            row["turns"] = len(turns)
            row["group"] = _hash(normalise_prompt(turns))
    row["empty_texts"] = empty_texts
    row["tie_allowed"] = _tie_allowed(where, raw.get("tie_allowed"))
    row["label"] = _label(where, raw, row["tie_allowed"]) if uses_labels else UNLABELLED
    source = raw.get("source")
    row["source"] = None if source is None or not str(source).strip() else str(source)
    for name in _OPTIONAL:
        if name in raw:
            row[name] = None if raw[name] is None else str(raw[name])
    return row


def _ends(turns: Sequence[str]) -> list[int]:
    """Where turns end in the joined text, but for the last."""
    ends: list[int] = []
    for turn in turns[:-1]:
        ends.append((ends[-1] + len(TURN_SEPARATOR) if ends else 0) + len(turn))
    return ends


def _article(what: str) -> str:
    return "wrong: " + what if what.startswith("turn ") else what


def _excerpt(cell: Any) -> str:
    text = ascii(cell)
    return text if len(text) <= 60 else text[:57] + "..."


def _flag(value: Any) -> int | None:
    return _FLAGS.get(str(value).strip().lower())


def _label(where: str, raw: Mapping[str, Any], tie_allowed: bool) -> int:
    flags = [_flag(raw[name]) for name in LABELS]
    for name, flag in zip(LABELS, flags, strict=True):
        if flag is None:
            raise InputError(
                where, f"{name} is {_excerpt(raw[name])}, not 0 or 1", "correct the label"
            )
    if sum(flag or 0 for flag in flags) != 1:
        written = ", ".join(f"{name}={flag}" for name, flag in zip(LABELS, flags, strict=True))
        raise InputError(
            where, f"{written}: exactly one must be 1", "correct the three winner columns"
        )
    label = flags.index(1)
    if label == TIE and not tie_allowed:
        raise InputError(
            where, "a tie in a row with tie_allowed=0", "correct the label or tie_allowed"
        )
    return label


def _tie_allowed(where: str, value: Any) -> bool:
    if value is None or not str(value).strip():
        return True
    flag = _flag(value)
    if flag is None:
        raise InputError(
            where, f"tie_allowed is {_excerpt(value)}, not 0 or 1", "write 0, 1 or nothing"
        )
    return bool(flag)


def _hash(text: str) -> int:
    # surrogatepass: an id from Parquet or a header can never stop the reader here.
    data = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _check_unique(path: str, rows: Path, hashes: np.ndarray) -> None:
    """Raises where two rows have one id; equal hashes of different ids are told apart."""
    ascending = np.sort(hashes)
    if not (ascending[1:] == ascending[:-1]).any():
        return
    order = np.argsort(hashes, kind="stable")
    repeats = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
    with pa.memory_map(str(rows)) as source:
        ids = pa.ipc.open_file(source).read_all().column("id")
        seen: dict[str, int] = {}
        suspects = np.unique(np.concatenate([order[repeats], order[repeats + 1]]))
        for index in suspects.tolist():
            name = ids[index].as_py()
            if name in seen:
                raise InputError(
                    f"{path}:{index + 1}",
                    f"id {_excerpt(name)} is already the id of row {seen[name] + 1}",
                    "give every row its own id",
                )
            seen[name] = index
