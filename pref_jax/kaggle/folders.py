"""A folder that is written whole or not at all, and takes the place only of one of its kind."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from pref_jax.errors import InputError, RunError
from pref_jax.files import check_room, refuse_bucket, replace_folder, sync_tree

# What `kaggle datasets init` and `kaggle kernels init` put into a folder; it stays there.
_KEPT = ("dataset-metadata.json", "kernel-metadata.json")


def check_folder(output: str, list_ours: Callable[[Path], Iterable[str]]) -> Path:
    """The folder's real path, if it can be written.

    Args:
      output: what the user named.
      list_ours: the files that an earlier call wrote into a folder, as it says itself; raises
        `InputError` where it says nothing.

    Raises:
      InputError: it holds anything else, or cannot be written.
    """
    refuse_bucket(output, "--output")
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
    elif foreign := _find_foreign(target, list_ours):
        raise InputError(
            where, f"it holds {foreign}, which is of no bundle", "name a new or an empty folder"
        )
    return target


def _find_foreign(folder: Path, list_ours: Callable[[Path], Iterable[str]]) -> str | None:
    """The first file, link or empty folder that an earlier call did not write."""
    try:
        ours = {*list_ours(folder), *_KEPT}
    except InputError:
        ours = set()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        is_folder = path.is_dir() and not path.is_symlink()
        if not any(path.iterdir()) if is_folder else name not in ours:
            return name
    return None


@contextlib.contextmanager
def replaced_folder(output: str, list_ours: Callable[[Path], Iterable[str]]) -> Iterator[Path]:
    """A folder to write into, which becomes ``output`` when all has gone well.

    Raises:
      InputError: as `check_folder`.
      RunError: writing failed.
    """
    target = check_folder(output, list_ours)
    made: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        made.chmod(0o755)
        yield made
        for name in _KEPT:
            if (target / name).is_file():
                shutil.copyfile(target / name, made / name)
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
