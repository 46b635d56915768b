"""What can be made again: prepared data, features, vocabularies, compiled programs.

Everything lies under ``$PREF_JAX_CACHE`` (default ``~/.cache/pref_jax``) in one folder per kind,
named by a hash of the content it was made from. It is shared by runs and safe to delete at any
time.
"""

import errno
import fcntl
import hashlib
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from pref_jax.errors import InputError, RunError
from pref_jax.files import sync, sync_tree, write_durably

Loaded = TypeVar("Loaded")

logger = logging.getLogger(__name__)

VARIABLE = "PREF_JAX_CACHE"

# https://bford.info/cachedir/: backup tools skip a folder with this file, and `clear` deletes no
# folder without it, so that a variable that points at somebody's home costs nobody his files.
_TAG = "CACHEDIR.TAG"
_TAG_TEXT = "Signature: 8a477f597d28d172789f06886806bc55\n# A cache of pref_jax. Safe to delete.\n"


def cache_dir() -> Path:
    """The cache's folder, made if missing; `InputError` where it cannot be written."""
    typed = os.environ.get(VARIABLE, "")
    path = Path(typed).expanduser() if typed else Path.home() / ".cache" / "pref_jax"
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "Permission denied")
    except OSError as error:
        raise _refuse(path, error) from error
    return path.absolute()


def folder(kind: str) -> Path:
    """The folder of one kind of entry ("features", "compiled", ...), made if missing."""
    path = cache_dir() / kind
    tag = path / _TAG
    try:
        path.mkdir(exist_ok=True)
        if not tag.exists():
            write_durably(tag, _TAG_TEXT.encode())
    except OSError as error:
        raise _refuse(path, error) from error
    except RunError as error:
        raise InputError(error.where, error.what, f"set {VARIABLE} to another folder") from error
    return path


def _refuse(path: Path, error: OSError) -> InputError:
    return InputError(
        str(path),
        f"the cache folder cannot be written ({error.strerror})",
        f"set {VARIABLE} to a folder that can be",
    )


def clear() -> list[Path]:
    """Empties the cache; other files that happen to lie in its folder stay.

    Returns:
      The folders removed. One that another process is filling meanwhile may stay.
    """
    ours = [path for path in sorted(cache_dir().iterdir()) if (path / _TAG).is_file()]
    for path in ours:
        shutil.rmtree(path, ignore_errors=True)
    return [path for path in ours if not path.exists()]


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Holds an exclusive lock on the file ``path`` between processes.

    The kernel frees the lock when its holder dies, however it dies. The file is removed on the
    way out. Yields whether the lock is held: false where another process has it and ``wait`` is
    false, and where the file system knows no locks.
    """
    descriptor = None
    try:
        while descriptor is None:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except OSError:  # taken (BlockingIOError), or not supported here
                yield False
                return
            # Its last holder may have removed the file while we waited for it.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    break
            os.close(descriptor)
            descriptor = None
        try:
            yield True
        finally:
            with suppress(FileNotFoundError):
                os.unlink(path)
    finally:
        if descriptor is not None:
            os.close(descriptor)


def entry(kind: str, key: str, make: Callable[[Path], None], *, wait: bool = True) -> Path:
    """The finished entry ``key`` of a kind, made if it is not there.

    Args:
      kind: folder of the entry.
      key: hash of everything the entry follows from.
      make: gets a path at which nothing is yet, and leaves a file or a folder there.
      wait: whether to wait for another process that makes the entry at the moment; without, the
        path may be that of an entry that is still to come.

    Returns:
      A path at which the whole entry lies, or nothing at all: it is made under another name,
      flushed and renamed. A second process waits for the first. What a killed process left
      behind is deleted by the next one that makes an entry of this kind. An entry that has not
      the SHA-256 any more that it was made with is made again.

    Raises:
      RunError: the disk is full. Whatever else ``make`` raises goes through.
    """
    parent = folder(kind)
    final, sum_file = parent / key, parent / f".{key}.sha256"
    lock = parent / f".{key}.lock"
    if _is_whole(final, sum_file):
        if lock.exists():  # its maker was killed behind its last write
            with locked(lock, wait=False):
                pass
        return final
    with locked(lock, wait=wait) as alone:
        if _is_whole(final, sum_file) or not (alone or wait):
            return final
        if final.exists():
            logger.warning("%s was damaged and is made again", final)
            remove(final)
        _remove_leftovers(parent, key if alone else None)
        temporary = parent / f".{key}.{uuid.uuid4().hex}.tmp"
        try:
            make(temporary)
            sync_tree(temporary)
            write_durably(sum_file, _digest(temporary).encode())
            try:
                os.rename(temporary, final)
            except OSError:
                if not final.exists():  # else another process was faster: same key, same content
                    raise
            sync(parent)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise RunError(
                    str(parent), "the disk is full", f"free some space or set {VARIABLE}"
                ) from error
            raise
        finally:
            remove(temporary)
    return final


def find(kind: str, key: str) -> Path | None:
    """The entry where it is there and whole."""
    parent = folder(kind)
    final = parent / key
    return final if _is_whole(final, parent / f".{key}.sha256") else None


def load(
    kind: str, key: str, make: Callable[[Path], None], read: Callable[[Path], Loaded]
) -> Loaded:
    """What ``read`` makes of an `entry`; one that it cannot read is made again.

    ``read`` tells of that by the errors of pyarrow, json and the file system.
    """
    import pyarrow as pa

    path = entry(kind, key, make)
    try:
        return read(path)
    except (pa.ArrowInvalid, ValueError, OSError, KeyError) as error:
        logger.warning("%s cannot be read (%s) and is made again", path, error)
        remove(path)
        return read(entry(kind, key, make))


def remove(path: Path) -> None:
    """Deletes a file or a folder, also one that is not there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


# Entries that this process has looked through, by what changes when they are written.
_looked_through: set[tuple[str, int, int]] = set()


def _is_whole(path: Path, sum_file: Path) -> bool:
    try:
        status = path.stat()
        seen = (str(path), status.st_ino, status.st_mtime_ns)
        if seen not in _looked_through:
            if sum_file.read_bytes() != _digest(path).encode():
                return False
            _looked_through.add(seen)
        return True
    except OSError:  # one of them is not there, or the disk cannot read it
        return False


def _digest(path: Path) -> str:
    """SHA-256 of a file, or of the names and contents of all files in a folder."""
    parts = sorted(path.rglob("*")) if path.is_dir() else [path]
    total = hashlib.sha256()
    for part in parts:
        if not part.is_dir():
            with part.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            total.update(f"{part.relative_to(path)} {content}\n".encode())
    return total.hexdigest()


def _remove_leftovers(parent: Path, held: str | None) -> None:
    """Deletes temporaries whose maker is dead: nobody holds the lock of their key."""
    for temporary in parent.glob(".*.tmp"):
        key = temporary.name[1:].rsplit(".", 2)[0]
        if key == held:
            remove(temporary)
            continue
        with locked(parent / f".{key}.lock", wait=False) as dead:
            if dead:
                remove(temporary)
