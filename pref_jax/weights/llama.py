"""Reads LLaMA models from Hugging Face folders and GGUF files, a layer's tensor at a time.

The stacked arrays of the decoder are made on the devices and filled layer by layer, so the host
never holds more than the slice of one tensor of one layer that a device is about to get.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pref_jax.errors import InputError
from pref_jax.weights import names
from pref_jax.weights.files import Tensor, open_tensors, read_json
from pref_jax.weights.huggingface import FLOATS, make_reader

if TYPE_CHECKING:
    import jax

    from pref_jax.models.llama import LlamaConfig
    from pref_jax.models.rope import RopeConfig

# Field of LlamaConfig: name in config.json.
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "max_positions": "max_position_embeddings",
}
_NORMS = ("input_layernorm", "post_attention_layernorm")
_PREFIX = "model."
# Of the language model, of a classifier, and buffers that hold no weight.
_IGNORED = ("lm_head.weight", "score.weight", "rotary_emb.inv_freq")


def read_llama_config(folder: Path) -> "LlamaConfig":
    """Architecture of a Hugging Face folder of model type "llama".

    Raises:
      InputError: a field is missing or wrong, or an option changes the mathematics.
    """
    from pref_jax.models.llama import LlamaConfig

    path = folder / "config.json"
    content = read_json(path)
    for name, plain in (
        ("attention_bias", False),
        ("mlp_bias", False),
        ("hidden_act", "silu"),
        ("quantization_config", None),
        ("sliding_window", None),
    ):
        if content.get(name, plain) not in (plain, None):
            raise InputError(
                str(path), f"{name} is {content[name]!r}", "only plain LLaMA models can be loaded"
            )
    sizes = {field: _whole(path, content, name) for field, name in _SIZES.items()}
    heads = sizes["num_heads"]
    kv_heads = _whole(path, content, "num_key_value_heads", heads)
    head_dim = _whole(path, content, "head_dim", sizes["hidden_size"] // heads)
    if heads % kv_heads or head_dim % 2:
        raise InputError(
            str(path),
            f"{kv_heads} key/value heads for {heads} heads of {head_dim} channels",
            "fetch the file again",
        )
    epsilon = content.get("rms_norm_eps", 1e-6)
    if not isinstance(epsilon, int | float) or not 0 <= epsilon < 1:
        raise InputError(str(path), f"rms_norm_eps is {epsilon!r}", "fetch the file again")
    return LlamaConfig(
        family="llama",
        **sizes,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        norm_epsilon=float(epsilon),
        rope=read_rope(path, content, sizes["max_positions"]),
    )


def _whole(path: Path, content: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = content.get(name)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(
            str(path), f"{name} is {value!r}, not a whole number above 0", "fetch the file again"
        )
    return value


def read_rope(path: Path, content: Mapping[str, Any], max_positions: int) -> "RopeConfig":
    """Rotary positions in either spelling: ``rope_parameters`` (transformers 5), or ``rope_theta``
    beside ``rope_scaling``.

    Raises:
      InputError: an unknown scaling, or one whose numbers are missing.
    """
    from pref_jax.models.rope import KINDS, RopeConfig

    scaling = content.get("rope_parameters") or content.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise InputError(str(path), f"rope_scaling is {scaling!r}", "fetch the file again")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in KINDS or scaling.get("partial_rotary_factor", 1.0) != 1.0:
        raise InputError(
            str(path), f"its rope scaling is {scaling!r}", f"known kinds: {', '.join(KINDS)}"
        )
    theta = scaling.get("rope_theta", content.get("rope_theta")) or 10_000.0
    values: dict[str, Any] = {"kind": kind, "theta": theta, "original_max_positions": max_positions}
    if kind in ("llama3", "yarn"):
        original = content.get("original_max_position_embeddings")
        original = original or scaling.get("original_max_position_embeddings", max_positions)
        values["original_max_positions"] = original
    if kind == "yarn" and scaling.get("factor") is None:
        values["factor"] = max_positions / values["original_max_positions"]
    wanted = {
        "linear": ("factor",),
        "dynamic": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    }.get(kind, ())
    optional = ("factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")
    for name in (*wanted, *(optional if kind == "yarn" else ())):
        if scaling.get(name) is not None:
            values[name] = scaling[name]
        elif name in wanted:
            raise InputError(
                str(path), f"its {kind} rope scaling has no {name}", "fetch the file again"
            )
    if kind == "yarn" and "truncate" in scaling:
        values["truncate"] = bool(scaling["truncate"])
    for name, value in values.items():
        if name not in ("kind", "truncate") and not (
            isinstance(value, int | float) and 0 < value < math.inf
        ):
            raise InputError(str(path), f"{name} of its rope is {value!r}", "fetch the file again")
    values["theta"] = float(theta)
    return RopeConfig(**values)


def first_layers(decoder: Mapping[str, Any]) -> dict[str, int]:
    """The stacks of layers in a decoder's tree, and the number of each one's first layer."""
    from pref_jax.models.llama import FROZEN_LAYERS, LAYERS

    first, firsts = 0, {}
    for stack in (FROZEN_LAYERS, LAYERS):
        if stack in decoder:
            firsts[stack] = first
            first += next(iter(names.flatten(decoder[stack]).values())).shape[0]
    return firsts


def group_kernels(leaves: Mapping[names.Path, Any]) -> dict[names.Path, Any]:
    """The same, the arrays of each quantised kernel as one dict under the kernel's path."""
    grouped: dict[names.Path, Any] = {}
    for path, leaf in leaves.items():
        if "kernel" in path[:-1]:
            grouped.setdefault(path[:-1], {})[path[-1]] = leaf
        else:
            grouped[path] = leaf
    return grouped


def key_of(path: names.Path, layer: int | None = None) -> str:
    """The key that holds the parameter at ``path`` below ``decoder``, of one layer where stacked.

    Raises:
      KeyError: no decoder has such a parameter.
    """
    match path:
        case ("embed_tokens", "embedding"):
            return f"{_PREFIX}embed_tokens.weight"
        case ("norm", "scale"):
            return f"{_PREFIX}norm.weight"
        case (_, norm, "scale") if norm in _NORMS:
            return f"{_PREFIX}layers.{layer}.{norm}.weight"
        case (_, module, projection, "kernel"):
            return f"{_PREFIX}layers.{layer}.{module}.{projection}.weight"
    raise KeyError(f"no parameter of llama is called {'/'.join(path)}")


@contextmanager
def open_decoder(source: Path) -> Iterator[dict[str, Tensor]]:
    """All tensors of a folder or a GGUF file, by today's Hugging Face names."""
    if source.is_file():
        from pref_jax.weights.gguf import open_gguf

        with open_gguf(source) as tensors:
            yield tensors
        return
    with open_tensors(source) as tensors:
        # A bare LlamaModel's keys have no prefix.
        bare = not any(key.startswith(_PREFIX) for key in tensors)
        yield {
            f"{_PREFIX}{key}" if bare and not key.endswith(_IGNORED) else key: tensor
            for key, tensor in tensors.items()
        }


def load_decoder(source: Path, abstract: Mapping[str, Any], quantization: str) -> dict[str, Any]:
    """Weights of a folder or a GGUF file as sharded arrays, quantised on the way where asked.

    Args:
      source: folder with config.json and safetensors files, or a ``.gguf`` file.
      abstract: nested dict of `jax.ShapeDtypeStruct` with shardings: the tree below ``decoder``.
      quantization: of the projections: "none", "int8" or "nf4".

    Returns:
      The same tree of `jax.Array`.

    Raises:
      InputError: a file is damaged, or a tensor is missing, unknown, there twice, of another
        shape, not of floating point, or not finite. Found by name before weights are read (but
        for the last).
    """

    leaves = names.flatten(abstract)
    targets = group_kernels(leaves)
    firsts = first_layers(abstract)
    with open_decoder(source) as tensors:
        _check(source, tensors, targets, firsts)
        loaded: dict[names.Path, Any] = {}
        for path, target in targets.items():
            if path[0] in firsts:
                keys = [key_of(path, layer) for layer in _layers(target, firsts[path[0]])]
                filled = _fill(tensors, keys, target, quantization)
            else:
                filled = _read(tensors[key_of(path)], target.shape, target.dtype, target.sharding)
            loaded |= names.flatten(filled, path) if isinstance(filled, dict) else {path: filled}
        return names.unflatten({path: loaded[path] for path in leaves})


def _check(
    source: Path,
    tensors: Mapping[str, Tensor],
    targets: Mapping[names.Path, Any],
    firsts: Mapping[str, int],
) -> None:
    """The tensors are those of the model: nothing is missing, left over or of another shape."""

    wanted: dict[str, tuple[int, ...]] = {}
    for path, target in targets.items():
        shape = _full_shape(target)
        if path[0] not in firsts:
            wanted[key_of(path)] = shape
            continue
        one = shape[1:][::-1]  # files hold [out, in]
        wanted |= {key_of(path, layer): one for layer in _layers(target, firsts[path[0]])}
    for key, tensor in tensors.items():
        if key not in wanted:
            if key.endswith(_IGNORED):
                continue
            raise InputError(
                str(tensor.file),
                f"tensor {tensor.key} is no part of this llama",
                "config.json and the weights are of different models: fetch the folder again",
            )
        if tensor.shape != wanted[key]:
            raise InputError(
                str(tensor.file),
                f"tensor {tensor.key} has shape {list(tensor.shape)}, not {list(wanted[key])}",
                "config.json and the weights are of different models: fetch the folder again",
            )
        if tensor.dtype not in FLOATS:
            raise InputError(
                str(tensor.file),
                f"tensor {tensor.key} is of type {tensor.dtype}",
                f"weights of these types can be loaded: {', '.join(FLOATS)}",
            )
    missing = [key for key in wanted if key not in tensors]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(
            str(source), f"tensor {missing[0]}{more} is missing", "fetch the folder again"
        )


def _layers(target: Any, first: int) -> range:
    """Numbers of the layers that a stack holds."""
    return range(first, first + _full_shape(target)[0])


def _full_shape(target: Any) -> tuple[int, ...]:
    """Shape of the float array that a target stands for."""
    if not isinstance(target, dict):
        return tuple(target.shape)
    *lead, rows, columns = target["values"].shape
    return (*lead, rows * (1 if target["values"].dtype == "int8" else 2), columns)


def _read(tensor: Tensor, shape: tuple[int, ...], dtype: Any, sharding: Any) -> "jax.Array":
    import jax

    transposed = len(shape) == 2 and tensor.shape != tuple(shape)
    return jax.make_array_from_callback(shape, sharding, make_reader(tensor, dtype, transposed))


def _fill(
    tensors: Mapping[str, Tensor], keys: Sequence[str], target: Any, quantization: str
) -> Any:
    """The stack of the tensors with these keys, one for each layer."""
    import jax
    import jax.numpy as jnp
    from jax import lax
    from jax.sharding import NamedSharding, PartitionSpec

    from pref_jax.models.quantize import quantize

    full = _full_shape(target)
    is_kernel = len(full) == 3
    values = target["values"] if isinstance(target, dict) else target
    spec = tuple(values.sharding.spec) + (None,) * (len(full) - len(values.sharding.spec))
    one = NamedSharding(values.sharding.mesh, PartitionSpec(*spec[1:]))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, target)

    def allocate() -> Any:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), target)

    def put(stack: Any, weights: Any, layer: Any) -> Any:
        part = quantize(weights, quantization) if isinstance(target, dict) else weights
        return jax.tree.map(
            lambda whole, new: lax.dynamic_update_index_in_dim(whole, new, layer, 0), stack, part
        )

    put = jax.jit(put, donate_argnums=0, out_shardings=shardings)
    stack = jax.jit(allocate, out_shardings=shardings)()
    for layer, key in enumerate(keys):
        tensor = tensors[key]
        # A file's 16-bit weights are quantised from float32 on the device, not on the host.
        dtype = FLOATS[tensor.dtype] if isinstance(target, dict) else target.dtype
        weights = jax.make_array_from_callback(
            full[1:], one, make_reader(tensor, dtype, transposed=is_kernel)
        )
        # One at a time, else dispatched copies pile up on the host.
        stack = jax.block_until_ready(put(stack, weights, layer))
    return stack
