"""What is in a bundle: every file with its size and hash, the models, the machine it is for."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pref_jax.errors import InputError
from pref_jax.files import read_json, write_json

FILE = "manifest.json"
FORMAT = "pref_jax scoring bundle 1"
_REMEDY = "build the bundle again with launch/kaggle.py, or upload it again"


def write_manifest(folder: Path, about: Mapping[str, Any]) -> None:
    """Writes `FILE` over all files below ``folder``; ``about`` is what else it says."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        name = path.relative_to(folder).as_posix()
        if name != FILE:
            files[name] = {"bytes": path.stat().st_size, "sha256": digest}
    write_json(folder / FILE, {"format": FORMAT, **about, "files": files})


def read_manifest(folder: Path) -> dict[str, Any]:
    """The content of `FILE`.

    Raises:
      InputError: it is missing, damaged or of something else.
    """
    content = read_json(folder / FILE, _REMEDY)
    if content.get("format") != FORMAT:
        raise InputError(str(folder / FILE), "is not of a scoring bundle", _REMEDY)
    return content
