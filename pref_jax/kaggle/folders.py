"""A folder that is written whole or not at all, and takes the place only of one of its kind."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from pref_jax.errors import InputError, RunError
from pref_jax.files import check_room, replace_folder, sync_tree


def check_folder(output: str, is_ours: Callable[[Path], bool]) -> Path:
    """The folder's real path, if it can be written.

    Raises:
      InputError: it holds anything that ``is_ours`` does not know, or cannot be written.
    """
    where, target = f"--output={output}", Path(os.path.realpath(output))
    if not target.exists():
        try:
            check_room(target)
        except OSError as error:
            raise InputError(
                where, f"it cannot be written there ({error.strerror})", "name another folder"
            ) from error
    elif not target.is_dir():
        raise InputError(where, "it is not a folder", "name a new folder")
    elif any(target.iterdir()) and not is_ours(target):
        raise InputError(where, "it holds something else", "name a new or an empty folder")
    return target


@contextlib.contextmanager
def replaced_folder(output: str, is_ours: Callable[[Path], bool]) -> Iterator[Path]:
    """A folder to write into, which becomes ``output`` when all has gone well.

    Raises:
      InputError: as `check_folder`.
      RunError: writing failed.
    """
    target = check_folder(output, is_ours)
    made: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        made.chmod(0o755)
        yield made
        sync_tree(made)
        old = made.with_name(f"{made.name}.old")
        replace_folder(made, target, old)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise RunError(
            f"--output={output}", f"writing it failed ({error.strerror or error})", "make room"
        ) from error
    finally:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)
