"""Files on disk: asked for before the long work, written whole or not at all, JSON both ways.

This module imports nothing heavy, so that a wrong place is refused at once.
"""

import contextlib
import errno
import fcntl
import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pref_jax.errors import InputError, RunError

# Of a run's config, section "data".
_DATA_FILES = ("train", "valid", "soft_labels", "annotations", "properties")


def check_output_file(
    path: str | Path,
    flag: str = "--output",
    inputs: Iterable[str | Path | None] = (),
    outside: str | Path | None = None,
) -> Path:
    """The path, if a file can be written there; call it before hours of work, not after.

    Args:
      path: the file to be written.
      flag: what names it on the command line.
      inputs: data files that the command reads, which it must not replace; None names none.
      outside: a run's folder that the file must not lie in.

    Raises:
      InputError: nothing given, a directory, not a regular file, one of the inputs, inside the
        run, no such folder, or a folder that cannot be written.
    """
    if not str(path):
        raise InputError(flag, "no file named", f"name one, as in {flag}=submission.csv")
    refuse_bucket(path, flag)
    target = Path(path)
    if os.path.isdir(target):
        raise InputError(str(target), "is a directory", f"name a file in it with {flag}")
    if os.path.exists(target) and not os.path.isfile(target):
        raise InputError(str(target), "is not a regular file", f"name another with {flag}")
    for read in inputs:
        with contextlib.suppress(OSError, ValueError):  # one of them is not there
            if read is not None and os.path.samefile(target, read):
                raise InputError(
                    str(target), "is the data itself", f"name another file with {flag}"
                )
    if outside is not None and target.resolve().is_relative_to(Path(outside).resolve()):
        raise InputError(
            str(target), "lies inside the run's folder", f"name a file elsewhere with {flag}"
        )
    folder = target.parent
    if not os.path.isdir(folder):
        what = "is not a directory" if os.path.exists(folder) else "does not exist"
        raise InputError(str(folder), what, f"create it, or name another file with {flag}")
    try:
        _probe(folder)
        with contextlib.suppress(FileNotFoundError):
            os.lstat(target)
    except OSError as error:  # no permission, or a longer name than the file system takes
        raise _explain(target, error) from error
    return target


def run_inputs(workdir: str | Path) -> list[str]:
    """The files that a run on this machine learned from, as its config names them.

    They are for `check_output_file`; a run that cannot be read has none here, its reader says why.
    """
    try:
        data = read_json(Path(workdir) / "config.json", "").get("data")
    except InputError:
        return []
    if not isinstance(data, dict):
        return []
    return [data[name] for name in _DATA_FILES if isinstance(data.get(name), str)]


def check_room(path: Path) -> None:
    """Looks whether ``path``, which is not there, could be made.

    Raises:
      OSError: it lies below a file, or in a folder that cannot be written; or the disk is full.
    """
    _probe(next((folder for folder in path.parents if folder.exists()), Path(".")))


def make_output_folder(path: str | Path, flag: str = "--output") -> Path:
    """The folder, made where it is missing.

    Raises:
      InputError: nothing given, a file is in the way, or it cannot be made.
    """
    if not str(path):
        raise InputError(flag, "no folder named", f"name one, as in {flag}=report")
    refuse_bucket(path, flag)
    folder = Path(path)
    try:
        make_folder(folder)
        _probe(folder)
    except FileExistsError as error:
        raise InputError(str(folder), "is a file", f"name a folder with {flag}") from error
    except NotADirectoryError as error:
        raise InputError(str(folder), "lies below a file", f"name another with {flag}") from error
    except OSError as error:
        raise _explain(folder, error) from error
    return folder


def make_folder(path: Path) -> list[Path]:
    """Makes a folder, and those above it, where they are missing, so that a power cut leaves them.

    Returns:
      Those that were missing, the innermost first.

    Raises:
      OSError: it cannot be made.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync(folder.parent)
    return missing


def replace_folder(made: Path, target: Path, aside: Path) -> None:
    """Moves a finished folder to where another one may be, which comes back where that fails.

    Args:
      made: flushed already.
      target: where it goes.
      aside: where what was there lies afterwards; the caller removes it.

    Raises:
      OSError: it cannot be moved.
    """
    if os.path.lexists(target):
        target.rename(aside)
    try:
        made.rename(target)
    except OSError:
        if aside.exists():
            aside.rename(target)
        raise
    sync(target.parent)


def refuse_foreign_files(folder: Path, names: Iterable[str], what: str) -> None:
    """Refuses to replace files that an earlier call did not write.

    Raises:
      InputError: names the first of ``names`` that is there.
    """
    for name in names:
        if os.path.lexists(folder / name):
            raise InputError(
                str(folder / name), f"is there and not of {what}", "give an empty folder"
            )


def plain(value: Any) -> Any:
    """``value`` as JSON holds it: numpy numbers as Python's, tuples as lists, paths as text.

    JSON has no number for NaN and the infinities; they become the texts "NaN", "Infinity" and
    "-Infinity", which Python's ``float()`` reads back.
    """
    if isinstance(value, Mapping):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(part) for part in value]
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # numpy and jax arrays and scalars
        return plain(value.tolist())
    if hasattr(value, "to_dict"):  # ml_collections
        return plain(value.to_dict())
    raise TypeError(f"{type(value).__name__} has no JSON form")


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` so that ``path`` holds either the old or the new text, whatever happens.

    Raises:
      RunError: the text could not be written (disk full).
    """
    text = json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_durably(path, text.encode("utf-8", errors="replace"))


def write_durably(path: Path, content: bytes) -> None:
    """Replaces the bytes of ``path`` in one step that survives a kill and a power cut.

    Raises:
      RunError: the disk is full, or the folder is gone or cannot be written any more.
      InputError: the path is a directory.
    """
    temporary = path.with_name(f".{path.name}.unfinished")
    try:
        handle = _open_alone(temporary)
        try:
            os.fchmod(handle, 0o644)
            os.ftruncate(handle, 0)
            with open(handle, "wb", closefd=False) as file:
                file.write(content)
            os.fsync(handle)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        finally:
            os.close(handle)
        sync(path.parent)
    except OSError as error:
        raise write_error(path, error) from error


def _open_alone(path: Path) -> int:
    """A file that no other process writes meanwhile, in place of what a kill has left there.

    One name for all attempts, so that kills do not litter the folder.
    """
    while True:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        # The one that we have waited for has renamed it.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        os.close(handle)


def sync(path: Path) -> None:
    """Returns once a file's bytes, or the renames inside a folder, have reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(path: Path) -> None:
    """`sync` of a file, or of a folder and everything below it."""
    for part in [*path.rglob("*"), path] if path.is_dir() else [path]:
        sync(part)


def write_error(path: Path, error: OSError) -> InputError | RunError:
    """The one line for a write that failed."""
    if isinstance(error, IsADirectoryError):
        return InputError(str(path), "is a directory", "remove it or name another place")
    return RunError(
        str(path),
        f"cannot be written ({error.strerror or error})",
        "make room or mend the permissions, then run the same command again",
    )


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      InputError: no such file, or no JSON object in it, or one that says a name twice.
    """
    try:
        value = json.loads(path.read_bytes(), object_pairs_hook=unique_keys)
    except FileNotFoundError as error:
        raise InputError(str(path), "is missing", remedy) from error
    except OSError as error:
        raise InputError(str(path), f"cannot be read ({error.strerror})", remedy) from error
    except (ValueError, RecursionError) as error:
        raise InputError(str(path), f"is not JSON ({error})", remedy) from error
    if not isinstance(value, dict):
        raise InputError(str(path), "is not a JSON object", remedy)
    return value


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads(object_pairs_hook=)`: a key that is there twice is no choice of ours.

    Raises:
      ValueError: names the key.
    """
    value: dict[str, Any] = {}
    for name, part in pairs:
        if name in value:
            raise ValueError(f"duplicate key: {name}")
        value[name] = part
    return value


def refuse_bucket(path: str | Path, flag: str) -> None:
    """Refuses to write to a place in a bucket.

    Raises:
      InputError: it is one.
    """
    if str(path).startswith("gs:/"):
        raise InputError(
            flag, "only the runs of launch/train.py are written to a bucket", "name a local place"
        )


def _probe(folder: Path) -> None:
    """Makes a file; one without a name, which no kill leaves behind, where the system knows it."""
    try:
        os.close(os.open(folder, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    except (AttributeError, IsADirectoryError):
        pass
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
    else:
        return
    handle, name = tempfile.mkstemp(prefix=".", dir=folder)
    os.close(handle)
    os.unlink(name)


def _explain(path: Path, error: OSError) -> InputError | RunError:
    what = f"cannot be written: {error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
        return RunError(str(path), what, "free some space and run the command again")
    return InputError(str(path), what, "choose a place that can be written")
