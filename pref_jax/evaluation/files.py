"""Output files: asked for before the long work, written whole or not at all."""

import errno
import os
import tempfile
from pathlib import Path

from pref_jax.errors import InputError, RunError


def check_output_file(path: str | Path, flag: str = "--output") -> Path:
    """The path, if a file can be written there; call it before hours of work, not after.

    Raises:
      InputError: nothing given, a directory, not a regular file, no such folder, or a folder
        that cannot be written.
    """
    if not str(path):
        raise InputError(flag, "no file named", f"name one, as in {flag}=submission.csv")
    target = Path(path)
    if os.path.isdir(target):
        raise InputError(str(target), "is a directory", f"name a file in it with {flag}")
    if os.path.exists(target) and not os.path.isfile(target):
        raise InputError(str(target), "is not a regular file", f"name another with {flag}")
    folder = target.parent
    if not os.path.isdir(folder):
        what = "is not a directory" if os.path.exists(folder) else "does not exist"
        raise InputError(str(folder), what, f"create it, or name another file with {flag}")
    try:
        _probe(folder)
        if not os.path.lexists(target):
            os.lstat(target)
    except FileNotFoundError:
        pass
    except OSError as error:  # no permission, or a longer name than the file system takes
        raise _explain(target, error) from error
    return target


def make_output_folder(path: str | Path, flag: str = "--output") -> Path:
    """The folder, made where it is missing.

    Raises:
      InputError: nothing given, a file is in the way, or it cannot be made.
    """
    if not str(path):
        raise InputError(flag, "no folder named", f"name one, as in {flag}=report")
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _probe(folder)
    except FileExistsError as error:
        raise InputError(str(folder), "is a file", f"name a folder with {flag}") from error
    except NotADirectoryError as error:
        raise InputError(str(folder), "lies below a file", f"name another with {flag}") from error
    except OSError as error:
        raise _explain(folder, error) from error
    return folder


def write_durably(path: Path, content: bytes) -> None:
    """Replaces ``path`` by ``content`` in one step, on disk when it returns.

    Raises:
      InputError: the place cannot be written. RunError: the disk is full or fails.
    """
    temporary = path.with_name(f".pref_jax-{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise _explain(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def _probe(folder: Path) -> None:
    handle, name = tempfile.mkstemp(dir=folder)
    os.close(handle)
    os.unlink(name)


def _explain(path: Path, error: OSError) -> InputError | RunError:
    what = f"cannot be written: {error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
        return RunError(str(path), what, "free some space and run the command again")
    return InputError(str(path), what, "choose a place that can be written")
