"""Reads BERT and DistilBERT from Hugging Face folders, tensor slice by tensor slice.

The host never holds more than the slice that a device is about to get. Every key of the files is
accounted for before the first weight is read: mapped, or known as not part of the encoder.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pref_jax.errors import InputError
from pref_jax.weights import names
from pref_jax.weights.files import Tensor, open_tensors, read_json, weights_digest
from pref_jax.weights.sources import resolve_source

if TYPE_CHECKING:
    import jax
    import numpy as np

    from pref_jax.models.bert import EncoderConfig
    from pref_jax.models.llama import LlamaConfig

__all__ = ["load_encoder", "read_encoder_config", "resolve_source", "weights_digest"]

FAMILIES = ("bert", "distilbert", "llama")

# Field of EncoderConfig: (name in config.json, what transformers takes where it is absent).
_FIELDS: dict[str, dict[str, tuple[str, Any]]] = {
    "bert": {
        "vocab_size": ("vocab_size", 30522),
        "hidden_size": ("hidden_size", 768),
        "num_layers": ("num_hidden_layers", 12),
        "num_heads": ("num_attention_heads", 12),
        "intermediate_size": ("intermediate_size", 3072),
        "max_positions": ("max_position_embeddings", 512),
        "type_vocab_size": ("type_vocab_size", 2),
        "norm_epsilon": ("layer_norm_eps", 1e-12),
        "hidden_dropout": ("hidden_dropout_prob", 0.1),
        "attention_dropout": ("attention_probs_dropout_prob", 0.1),
        "activation": ("hidden_act", "gelu"),
    },
    "distilbert": {
        "vocab_size": ("vocab_size", 30522),
        "hidden_size": ("dim", 768),
        "num_layers": ("n_layers", 6),
        "num_heads": ("n_heads", 12),
        "intermediate_size": ("hidden_dim", 3072),
        "max_positions": ("max_position_embeddings", 512),
        "hidden_dropout": ("dropout", 0.1),
        "attention_dropout": ("attention_dropout", 0.1),
        "activation": ("activation", "gelu"),
    },
}
_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_heads",
    "intermediate_size",
    "max_positions",
    "type_vocab_size",
)
# Names of transformers for the functions of `pref_jax.models.bert.ACTIVATIONS`.
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "relu": "relu",
}
_POSITIONS: names.Path = ("embeddings", "position", "embedding")
# Types of weights that can be loaded, and what they are read as.
FLOATS = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def read_model_type(folder: Path, family: str | None = None) -> str:
    """``model_type`` of a folder's config.json.

    Args:
      folder: the Hugging Face folder.
      family: what it has to be, where the user said so.

    Raises:
      InputError: it is no family of ours, or not the one asked for.
    """
    path = folder / "config.json"
    model_type = read_json(path).get("model_type")
    if model_type == "pref_jax":
        raise InputError(
            str(path),
            "this is an exported classifier",
            "to start from its encoder set --config.model.init_from to its workdir",
        )
    if family is not None and model_type != family:
        raise InputError(
            str(path),
            f"its model_type is {model_type!r}, but --config.model.family is {family!r}",
            "leave --config.model.family away or name other weights",
        )
    if model_type not in FAMILIES:
        raise InputError(
            str(path),
            f"its model_type is {model_type!r}",
            f"encoders of these types can be loaded: {', '.join(FAMILIES)}",
        )
    return model_type


def read_architecture(source: Path, family: str | None = None) -> "EncoderConfig | LlamaConfig":
    """Architecture of a Hugging Face folder or a GGUF file, whatever its family.

    Args:
      source: the folder or file.
      family: what it has to be, where the user said so.

    Raises:
      InputError: another family, or an option that the models here do not have.
    """
    if source.is_file():
        from pref_jax.weights.gguf import read_gguf_config

        if family not in (None, "llama"):
            raise InputError(
                "--config.model.family",
                f"{family!r} cannot be read from a GGUF file",
                "leave it away, or name a Hugging Face folder",
            )
        return read_gguf_config(source)
    if read_model_type(source, family) == "llama":
        from pref_jax.weights.llama import read_llama_config

        return read_llama_config(source)
    return read_encoder_config(source, family)


def read_encoder_config(folder: Path, family: str | None = None) -> "EncoderConfig":
    """Architecture of a Hugging Face folder, from its config.json.

    Args:
      folder: the folder.
      family: ``model_type`` it has to have, where the user said so.

    Raises:
      InputError: another model type, or an option that the encoders here do not have.
    """
    from pref_jax.models.bert import EncoderConfig

    path = folder / "config.json"
    model_type = read_model_type(folder, family)
    content = read_json(path)
    _refuse_other_mathematics(path, content)
    values: dict[str, Any] = {"type_vocab_size": 0}
    for field, (name, default) in _FIELDS[model_type].items():
        value = content.get(name, default)
        values[field] = _check_value(path, name, field, value)
    if values["hidden_size"] % values["num_heads"]:
        raise InputError(
            str(path),
            f"{values['num_heads']} heads do not divide the width {values['hidden_size']}",
            "fetch the file again",
        )
    if model_type == "bert" and values["type_vocab_size"] < 2:
        raise InputError(
            str(path),
            f"type_vocab_size is {values['type_vocab_size']}, but prompt and responses need two",
            "name other weights",
        )
    return EncoderConfig(family=model_type, **values)


def _check_value(path: Path, name: str, field: str, value: Any) -> Any:
    if field in _SIZES:
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
        wanted = "a whole number above 0"
    elif field == "activation":
        if isinstance(value, str) and value in _ACTIVATIONS:
            return _ACTIVATIONS[value]
        wanted = f"one of {', '.join(_ACTIVATIONS)}"
    else:
        number = float(value) if isinstance(value, int | float) else math.nan
        if 0 <= number < 1:
            return number
        wanted = "a number from 0 to below 1"
    raise InputError(str(path), f"{name} is {value!r}, not {wanted}", "name other weights")


def _refuse_other_mathematics(path: Path, content: Mapping[str, Any]) -> None:
    """Options that keep the shapes and change what is computed must not pass unseen."""
    positions = content.get("position_embedding_type", "absolute")
    if positions not in ("absolute", None):
        raise InputError(
            str(path),
            f"position_embedding_type is {positions!r}",
            "only absolute positions can be loaded",
        )
    for name in ("is_decoder", "add_cross_attention", "quantization_config", "pruned_heads"):
        if content.get(name):
            raise InputError(
                str(path), f"{name} is {content[name]!r}", "only plain encoders can be loaded"
            )


def load_encoder(folder: Path, abstract: Mapping[str, Any]) -> dict[str, Any]:
    """Weights of a Hugging Face folder as sharded arrays.

    Args:
      folder: the folder (config.json and safetensors files, whole or in shards).
      abstract: nested dict of `jax.ShapeDtypeStruct` with ``sharding`` set: the tree below
        ``encoder``, kernels as [in, out]. Weights are cast to its dtypes.

    Returns:
      The same tree of `jax.Array`.

    Raises:
      InputError: a file is damaged, or a tensor is missing, unknown, there twice, of another
        shape, not of floating point, or not finite. Found by name before weights are read (but
        for the last).
    """
    family = read_model_type(folder)
    wanted = names.flatten(abstract)
    # A longer table of positions than the file's repeats it; all else has the file's shape.
    rows, width = wanted[_POSITIONS].shape
    positions = (min(rows, read_encoder_config(folder).max_positions), width)
    with open_tensors(folder) as tensors:
        found = _match(folder, tensors, wanted, family, positions)
        loaded = {
            path: _load(found[path], leaf, names.entry_of(path, family).transposed)
            for path, leaf in wanted.items()
        }
    return names.unflatten(loaded)


def repeat_rows(table: "np.ndarray", rows: int) -> "np.ndarray":
    """A table ``[n, D]`` as ``[rows, D]``, from its first row again behind its last.

    Text further back than pretraining ever saw keeps the neighbourhoods that it saw (Beltagy et
    al. 2020, section 5, copy BERT's 512 positions so).
    """
    import numpy as np

    return table[np.arange(rows) % len(table)]


def _match(
    folder: Path,
    tensors: Mapping[str, Tensor],
    wanted: Mapping[names.Path, "jax.ShapeDtypeStruct"],
    family: str,
    positions: tuple[int, int],
) -> dict[names.Path, Tensor]:
    """The tensor of every path, with nothing left over on either side."""
    table = names.path_table(wanted, family)
    found: dict[names.Path, Tensor] = {}
    for tensor in tensors.values():
        modern = names.modern_key(tensor.key, family)
        path = table.get(modern)
        if path is None:
            if names.is_ignored(modern, family):
                continue
            raise InputError(
                str(tensor.file),
                f"tensor {tensor.key} is no part of a {family} of {_layers(wanted)} layers",
                "config.json and the weights are of different models: fetch the folder again",
            )
        if path in found:
            raise InputError(
                str(tensor.file),
                f"tensors {found[path].key} and {tensor.key} are the same parameter",
                "remove one of them",
            )
        transposed = names.entry_of(path, family).transposed
        shape = positions if path == _POSITIONS else tuple(wanted[path].shape)
        if tensor.shape != (shape[::-1] if transposed else shape):
            raise InputError(
                str(tensor.file),
                f"tensor {tensor.key} has shape {list(tensor.shape)}, not "
                f"{list(shape[::-1] if transposed else shape)}",
                "config.json and the weights are of different models: fetch the folder again",
            )
        if tensor.dtype not in FLOATS:
            raise InputError(
                str(tensor.file),
                f"tensor {tensor.key} is of type {tensor.dtype}",
                f"weights of these types can be loaded: {', '.join(FLOATS)}",
            )
        found[path] = tensor
    missing = [names.entry_of(path, family).key for path in wanted if path not in found]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(
            str(folder), f"tensor {missing[0]}{more} is missing", "fetch the folder again"
        )
    return found


def _layers(wanted: Mapping[names.Path, Any]) -> int:
    return len({path[0] for path in wanted if path[0].startswith("layer_")})


def _load(tensor: Tensor, leaf: "jax.ShapeDtypeStruct", transposed: bool) -> "jax.Array":
    import jax

    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    read = make_reader(tensor, leaf.dtype, transposed)
    if transposed or tensor.shape == tuple(leaf.shape):
        return jax.make_array_from_callback(leaf.shape, sharding, read)
    longer = repeat_rows(read(None), leaf.shape[0])
    return jax.make_array_from_callback(leaf.shape, sharding, longer.__getitem__)


def make_reader(
    tensor: Tensor, dtype: Any, transposed: bool
) -> Callable[[tuple[slice, ...] | None], "np.ndarray"]:
    """The callback of `jax.make_array_from_callback` that reads one tensor.

    Args:
      tensor: where it lies.
      dtype: that of the array.
      transposed: whether the file holds [out, in] where the array is [in, out].
    """
    import numpy as np

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        index = index or (slice(None),) * len(tensor.shape)
        values = tensor.slices[index[::-1]].T if transposed else tensor.slices[index]
        with np.errstate(over="ignore"):  # what overflows is found in the next line
            values = np.ascontiguousarray(values, dtype)
        if not np.isfinite(values).all():
            raise InputError(
                str(tensor.file),
                f"tensor {tensor.key} holds values that are not finite in {np.dtype(dtype)}",
                "fetch the file again, or name other weights",
            )
        return values

    return read
