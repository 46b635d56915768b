"""What has been paid for: lines that are on the disk before they count, whatever happens after.

While a run goes on lines are only appended. When it closes, both files are put into the order of
the input with one line per response. A kill at any moment costs the answers in flight, no others.
"""

import asyncio
import contextlib
import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pref_jax import locks
from pref_jax.annotation.ratings import check_entry, parse_line, seal
from pref_jax.errors import InputError, RunError
from pref_jax.files import sync, write_durably, write_error

Place = tuple[str, str]  # id and side
_BEGINNING = b'{"id": '  # of every line
_BUSY = "wait for it, or name another file with --output"


def read_keys(path: Path) -> set[str]:
    """Keys of the ratings at hand, replaced ones among them, whoever is writing the file."""
    files = (path, path.with_name(f"{path.name}.replaced"))
    return {
        str(entry["key"]) for file in files for _, entry in _read_entries(file) if "key" in entry
    }


def refuse_paid_ratings(path: Path) -> None:
    """Refuses to replace what a judge was paid for.

    Raises:
      InputError: there are such ratings in the file.
    """
    for _, entry in _read_entries(path):
        with contextlib.suppress(KeyError, TypeError, AttributeError):
            if entry["cost"] > 0 or any(entry["tokens"].values()):
                raise InputError(
                    str(path),
                    f"holds ratings by the judge {entry['model']!r}",
                    "name another file with --output",
                )


def _read_entries(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Lines, and the objects on them, of a file that need not be whole or there."""
    if not path.is_file():
        return
    for line in path.read_bytes().split(b"\n"):
        with contextlib.suppress(ValueError, RecursionError):
            if isinstance(entry := json.loads(line), dict):
                yield line, entry


class Store:
    """The files of one output: ratings, failures beside them, and what newer ratings replaced.

    Only one process can have it open. Use as a context manager.

    Args:
      path: the ratings, ``A.jsonl``; failures are in ``A.jsonl.failures``, former ratings of the
        same responses (by another prompt or model, or of another text) in ``A.jsonl.replaced``.
      wanted: per response of the input, in its order, the keys that a rating of it may have.

    Raises:
      InputError: another process has it open, or a file holds something else.
      RunError: the disk is full.
    """

    def __init__(self, path: Path, wanted: Mapping[Place, frozenset[str]]) -> None:
        self.path = path = Path(os.path.realpath(path))  # one lock, whatever the file is called
        self._wanted = wanted
        self._paths = [path, path.with_name(f"{path.name}.failures")]
        self._replaced = path.with_name(f"{path.name}.replaced")
        self._lock_path = path.with_name(f"{path.name}.lock")
        self._rated: dict[Place, dict[str, bytes]] = {}  # by key, in the order of the file
        self._failed: dict[Place, bytes] = {}
        self._by_key: dict[str, bytes] = {}
        self._waiting: list[tuple[int, bytes, asyncio.Future[None]]] = []
        self._flusher: asyncio.Task[None] | None = None
        self._unwritten: list[tuple[int, bytes]] = []
        self._files: list[int] = []
        self._lock = _lock(self._lock_path)
        try:
            self._open()
        except BaseException:
            self._release()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except RunError:
            if error is None:
                raise

    def rated(self, place: Place) -> dict[str, Any] | None:
        """The entry of a response that is rated as wanted."""
        line = self._choose(place)
        return None if line is None else json.loads(line)

    def find(self, keys: Iterable[str]) -> dict[str, Any] | None:
        """An entry with one of the keys, of whichever response."""
        line = next((self._by_key[key] for key in keys if key in self._by_key), None)
        return None if line is None else json.loads(line)

    def failed(self, place: Place) -> dict[str, Any] | None:
        """The entry of a response that could not be rated, in this call or an earlier one."""
        if self._choose(place) is not None or place not in self._failed:
            return None
        return json.loads(self._failed[place])

    @property
    def outdated(self) -> int:
        """Responses of the input whose ratings have a key that is not wanted."""
        return sum(place in self._rated and self._choose(place) is None for place in self._wanted)

    async def save(self, entries: Sequence[dict[str, Any]], *, failures: bool = False) -> None:
        """Returns once the entries are on the disk, written in one piece.

        Raises:
          RunError: they are not (the disk is full); `close` tries once more.
        """
        lines = [_line(entry) for entry in entries]
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((int(failures), b"".join(lines), future))
        if self._flusher is None or self._flusher.done():
            self._flusher = asyncio.create_task(self._flush())
        await future
        for entry, line in zip(entries, lines, strict=True):
            self._take(failures, entry, line)

    def close(self) -> None:
        """Puts both files into order, each in one step; the same content is not written again.

        Raises:
          RunError: there is no room; every line that was written is still there.
        """
        if self._lock < 0:
            return
        try:
            self._write_rest()
            self._compact()
        finally:
            self._release()

    # Reading

    def _open(self) -> None:
        for path in (*self._paths, self._replaced):  # of a kill while files were put into order
            path.with_name(f".{path.name}.unfinished").unlink(missing_ok=True)
        for path in self._paths:
            try:
                flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
                self._files.append(os.open(path, flags, 0o644))
            except OSError as error:
                raise write_error(path, error) from error
        sync(self.path.parent)  # the files themselves, should the power fail
        contents = [path.read_bytes() for path in self._paths]
        for kind, (path, content) in enumerate(zip(self._paths, contents, strict=True)):
            for number, line in enumerate(_whole_lines(path, content), start=1):
                if not line.strip():
                    continue
                entry = parse_line(f"{path}:{number}", line)
                check_entry(f"{path}:{number}", entry, rated=not kind)
                self._take(bool(kind), entry, line + b"\n")
        for content, file in zip(contents, self._files, strict=True):  # all of it is ours
            _mend_end(content, file)
        for line, entry in _read_entries(self._replaced):
            with contextlib.suppress(InputError):
                check_entry("", parse_line("", line), rated=True)
                self._by_key.setdefault(str(entry.get("key")), line)

    def _take(self, failure: bool, entry: Mapping[str, Any], line: bytes) -> None:
        place = (str(entry["id"]), str(entry["side"]))
        if failure:
            self._failed[place] = line
            return
        key = str(entry.get("key"))
        self._rated.setdefault(place, {}).setdefault(key, line)
        self._by_key.setdefault(key, line)

    def _choose(self, place: Place) -> bytes | None:
        rated = self._rated.get(place, {})
        keys = self._wanted.get(place, frozenset())
        return next((line for key, line in rated.items() if key in keys), None)

    # Writing

    async def _flush(self) -> None:
        """Writes what is waiting, and syncs once for all of it."""
        while self._waiting:
            batch, self._waiting = self._waiting, []
            try:
                await asyncio.to_thread(self._append, [(kind, blob) for kind, blob, _ in batch])
            except OSError as error:
                failure = write_error(self.path, error)
                self._unwritten += [(kind, blob) for kind, blob, _ in batch]
                for _, _, future in batch:
                    future.set_exception(failure)
            else:
                for _, _, future in batch:
                    future.set_result(None)

    def _append(self, blobs: Iterable[tuple[int, bytes]]) -> None:
        """All of the blobs, or none of them."""
        sizes = [os.fstat(file).st_size for file in self._files]
        try:
            for kind, blob in blobs:
                if os.write(self._files[kind], blob) < len(blob):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            for file in self._files:
                os.fsync(file)
        except OSError:
            for file, size in zip(self._files, sizes, strict=True):
                os.ftruncate(file, size)
            raise

    def _write_rest(self) -> None:
        unwritten = self._unwritten + [(kind, blob) for kind, blob, _ in self._waiting]
        self._unwritten, self._waiting = [], []
        if not unwritten:
            return
        try:
            self._append(unwritten)
        except OSError as error:
            raise write_error(self.path, error) from error
        for kind, blob in unwritten:
            for line in blob.splitlines(keepends=True):
                self._take(bool(kind), json.loads(line), line)

    def _compact(self) -> None:
        chosen, left = [], []
        for place in self._wanted:
            lines = list(self._rated.get(place, {}).values())
            if lines:
                # Where no rating is as wanted, a former one is better than none.
                kept = self._choose(place) or lines[-1]
                chosen.append(kept)
                left += [line for line in lines if line != kept]
        failures = [
            self._failed[place]
            for place in self._wanted
            if place in self._failed and self._choose(place) is None
        ]
        others = [
            [
                line
                for place, lines in self._rated.items()
                for line in lines.values()
                if place not in self._wanted
            ],
            [line for place, line in self._failed.items() if place not in self._wanted],
        ]
        if left:
            known = self._replaced.read_bytes() if self._replaced.exists() else b""
            there = set(known.splitlines(keepends=True))
            if new := [line for line in left if line not in there]:
                write_durably(self._replaced, known + b"".join(new))
        for path, lines in zip(
            self._paths, (chosen + others[0], failures + others[1]), strict=True
        ):
            content = b"".join(lines)
            if path.read_bytes() != content:
                write_durably(path, content)

    def _release(self) -> None:
        for file in self._files:
            os.close(file)
        self._files = []
        if self._lock >= 0:
            # Removed while it is held: whoever waits for it looks again whether it is still there.
            self._lock_path.unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = -1


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(seal(entry)).encode() + b"\n"


def refuse_busy(path: str | Path) -> None:
    """Refuses an output that another process is writing; reads and imports nothing for it.

    Raises:
      InputError: names that process.
    """
    real = Path(os.path.realpath(path))
    locks.refuse_held(real.with_name(f"{real.name}.lock"), str(real), _BUSY)


def _lock(path: Path) -> int:
    """A file descriptor that holds the lock, which the kernel frees with the process."""
    while True:
        try:
            file = locks.take(path, str(path).removesuffix(".lock"), _BUSY)
            if os.path.exists(path) and os.path.samestat(os.fstat(file), os.stat(path)):
                locks.sign(file)
                return file
        except OSError as error:
            raise write_error(path, error) from error
        os.close(file)


def _whole_lines(path: Path, content: bytes) -> list[bytes]:
    """The lines of a file, without a last one that a kill has torn.

    Raises:
      InputError: its only line cannot be the beginning of one of ours.
    """
    *lines, last = content.split(b"\n")
    if last and not _is_torn(last):
        lines.append(last)  # whole, but for its end: not ours, or an editor's
    elif last and not lines and not (last.startswith(_BEGINNING) or _BEGINNING.startswith(last)):
        raise InputError(
            str(path), "holds something that is no rating", "name another file with --output"
        )
    return lines


def _mend_end(content: bytes, file: int) -> None:
    """Cuts a torn last line off a file, or ends a whole one."""
    last = content.rpartition(b"\n")[2]
    if last and _is_torn(last):
        os.ftruncate(file, len(content) - len(last))
    elif last:
        os.write(file, b"\n")


def _is_torn(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return True
    except RecursionError:  # nothing of ours
        return False
    return False
