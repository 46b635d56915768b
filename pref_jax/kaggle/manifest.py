"""What is in a bundle: every file with its size and hash, the models, the machine it is for."""

import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pref_jax.errors import InputError
from pref_jax.files import read_json, write_json

FILE = "manifest.json"
FORMAT = "pref_jax scoring bundle 1"
_FIELDS = {"models": list, "files": dict, "swap_average": bool, "max_hours": float}
_MODEL_FIELDS = {"name": str, "cost": float, "symmetric": bool}
_KINDS = {
    list: "a list",
    dict: "an object",
    bool: "true or false",
    str: "a text",
    float: "a number above 0",
}
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
    path = folder / FILE
    content = read_json(path, _REMEDY)
    if content.get("format") != FORMAT:
        raise InputError(str(path), "is not of a scoring bundle", _REMEDY)
    _check_fields(content, _FIELDS, path, "")
    if not content["models"]:
        raise InputError(str(path), "models: there is none", _REMEDY)
    for place, entry in enumerate(content["models"]):
        _check_fields(entry, _MODEL_FIELDS, path, f"models[{place}].")
        if not isinstance(entry.get("base"), str | None):
            raise InputError(str(path), f"models[{place}].base: it is not a text", _REMEDY)
    if len({entry["name"] for entry in content["models"]}) < len(content["models"]):
        raise InputError(str(path), "models: a name is there twice", _REMEDY)
    return content


def _check_fields(content: Any, fields: Mapping[str, type], path: Path, prefix: str) -> None:
    for name, kind in fields.items():
        value: Any = content.get(name) if isinstance(content, dict) else None
        if kind is float:
            good = type(value) in (int, float) and 0 < value <= sys.float_info.max
        else:
            good = isinstance(value, kind)
        if not good:
            raise InputError(str(path), f"{prefix}{name}: it is not {_KINDS[kind]}", _REMEDY)
