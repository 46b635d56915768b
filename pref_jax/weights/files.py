"""The safetensors files of a Hugging Face folder, checked before a single weight is read."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pref_jax.errors import InputError
from pref_jax.files import read_json as read_object

if TYPE_CHECKING:
    import numpy as np

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file.

    Attributes:
      key: its name there.
      file: the file.
      shape: its shape there.
      dtype: safetensors' name of its type, such as "F32".
      slices: indexed with one slice per axis it reads just that part as a NumPy array.
    """

    key: str
    file: Path
    shape: tuple[int, ...]
    dtype: str
    slices: Any


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a Hugging Face folder.

    Raises:
      InputError: it is missing, unreadable, not JSON, no object, or says a name twice.
    """
    return read_object(path, "name a complete Hugging Face folder, or fetch the file again")


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights, in order; a stray file beside them is not among them.

    Raises:
      InputError: there are none in safetensors form, or one that the index names is missing.
    """
    if (single := folder / SINGLE).is_file():
        return [single]
    if (folder / INDEX).is_file():
        return sorted({folder / name for name in _read_index(folder).values()})
    others = sorted(
        path.name
        for path in _entries(folder)
        if path.suffix in (".bin", ".pt", ".pth", ".h5", ".msgpack", ".ckpt", ".gguf")
    )
    if others:
        raise InputError(
            str(folder / others[0]),
            "only weights in the safetensors form are read",
            f"convert them: load the folder with transformers and save_pretrained it ({SINGLE})",
        )
    raise InputError(
        str(folder),
        f"there is neither {SINGLE} nor {INDEX}",
        "name a complete Hugging Face folder",
    )


def weights_digest(source: Path) -> str:
    """SHA-256 over the weight files of a folder (not its config) or over one file, as hexadecimal
    text."""
    total = hashlib.sha256()
    for path in [source] if source.is_file() else weight_files(source):
        try:
            with path.open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise InputError(
                str(path), f"it cannot be read ({error.strerror})", "check the file"
            ) from None
    return total.hexdigest()


class Slices:
    """Parts of one tensor in a safetensors file, each read into memory of its own.

    The file is mapped for the moment of reading only: pages that stay mapped count as memory of the
    process, and a large model read through them would seem to be there twice.
    """

    def __init__(self, path: Path, offset: int, shape: tuple[int, ...], dtype: str) -> None:
        self._path, self._offset, self._shape, self._dtype = path, offset, shape, dtype

    def __getitem__(self, index: tuple[slice, ...]) -> "np.ndarray":
        import ml_dtypes
        import numpy as np

        names = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": ml_dtypes.bfloat16}
        mapped = np.memmap(
            self._path, np.dtype(names[self._dtype]), "r", self._offset, self._shape or (1,)
        )
        return np.array(mapped[index] if self._shape else mapped[0])


def _read_offsets(path: Path) -> dict[str, int]:
    """Where each tensor of a safetensors file begins; the file has been checked already."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    start = 8 + size
    return {
        key: start + entry["data_offsets"][0]
        for key, entry in header.items()
        if key != "__metadata__"
    }


@contextmanager
def open_tensors(folder: Path, files: list[Path] | None = None) -> Iterator[dict[str, Tensor]]:
    """All tensors of a folder, by key. Opening reads the headers only.

    Args:
      folder: the folder.
      files: which of its files; those of the model when nothing is said.

    Raises:
      InputError: a file is damaged or cut, or the index and the files disagree.
    """
    from safetensors import SafetensorError, safe_open

    index = None
    if files is None:
        files = weight_files(folder)
        index = None if files == [folder / SINGLE] else _read_index(folder)
    tensors: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for path in files:
            try:
                file = stack.enter_context(safe_open(path, framework="numpy"))
            except (SafetensorError, OSError) as error:
                raise InputError(
                    str(path),
                    f"not a whole safetensors file ({error})",
                    "it was probably cut while being copied: fetch it again",
                ) from None
            offsets = _read_offsets(path)
            for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                if index is not None and index.get(key) != path.name:
                    says = (
                        f"the index puts it into {index[key]}"
                        if key in index
                        else ("the index does not list it")
                    )
                    raise InputError(str(path), f"tensor {key} is here, but {says}", _FETCH)
                part = file.get_slice(key)
                shape, dtype = tuple(part.get_shape()), str(part.get_dtype())
                slices = Slices(path, offsets[key], shape, dtype)
                tensors[key] = Tensor(key, path, shape, dtype, slices)
        for key, name in (index or {}).items():
            if key not in tensors:
                raise InputError(
                    str(folder / name), f"tensor {key} is not here, but the index says so", _FETCH
                )
        yield tensors


_FETCH = "files of different models are mixed: fetch the folder again"


def _read_index(folder: Path) -> dict[str, str]:
    path = folder / INDEX
    table = read_json(path).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise InputError(str(path), "weight_map is missing or empty", "fetch it again")
    for key, name in table.items():
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
            raise InputError(
                str(path), f"tensor {key} is in {name!r}, no file of this folder", "fetch it again"
            )
        if not (folder / name).is_file():
            raise InputError(
                str(folder / name), f"there is no such file, but {INDEX} names it", "fetch it again"
            )
    return table


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise InputError(
            str(folder), f"it cannot be read ({error.strerror})", "check the folder"
        ) from None
