"""Writes a LLaMA run for other programs: PEFT's adapter folder, or the whole model merged."""

import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pref_jax.errors import InputError
from pref_jax.weights import names
from pref_jax.weights.export import (
    ADAPTER_FILES,
    DESCRIPTION,
    LABELS,
    check_output,
    describe,
    dump,
    read_tokenizer,
    write_folder,
)
from pref_jax.weights.files import INDEX, SINGLE, read_json
from pref_jax.weights.llama import first_layers, group_kernels, key_of

if TYPE_CHECKING:
    import numpy as np

    from pref_jax.data.segments import Layout
    from pref_jax.models.llama import LlamaConfig
    from pref_jax.models.lora import LoRAConfig

_LARGEST_FLOAT16 = 65504.0
_SHARD_BYTES = 2 * 1024**3
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def export_adapter(
    output: Path,
    *,
    params: Mapping[str, Any],
    lora: "LoRAConfig",
    layout: "Layout",
    tokenizer_folder: Path,
    temperature: float,
    examples: Sequence[Mapping[str, Any]],
    head: str,
    base: str,
    quantization: str,
) -> None:
    """Writes adapters and head as a PEFT folder, whole or not at all.

    ``PeftModel.from_pretrained(LlamaForSequenceClassification of the base, folder)`` loads it; the
    head is saved in full, as PEFT's ``modules_to_save``.

    Args:
      output: the folder; new, empty, or an earlier export, which is replaced.
      params: the run's parameters; of them ``lora`` and ``head`` are written.
      lora: rank, scale and targets of the adapters.
      layout: how a row becomes token ids.
      tokenizer_folder: where the tokenizer's files are.
      temperature: what a program may divide the logits by; 1 is none.
      examples: made-up rows with ``input_ids``, ``token_type_ids``, ``text_lengths`` and
        ``probabilities``.
      head: kind of the head: with "orders" the mean over both orders is up to the other program,
        and so is what the head knows of lengths, where it is told them.
      base: what the run's ``model.pretrained`` says; written where it is a name on the hub.
      quantization: of that base while the adapters were trained, on which the examples are.

    Raises:
      InputError: the folder holds something else or cannot be written, or weights are not finite
        or beyond float16's range, in which GPUs without bfloat16 would turn them into infinity.
      RunError: writing failed.
    """
    import numpy as np

    output = Path(os.path.realpath(output))  # a link is followed, not replaced
    check_output(output)
    score, lengths = _split_head(params["head"], params["decoder"])
    tensors = {"base_model.model.score.weight": score.T}
    for path, stack in names.flatten(params["lora"]["decoder"]).items():
        whole = _checked("/".join(path), stack)
        part = {"a": "lora_A", "b": "lora_B"}[path[-1]]
        for layer, matrix in enumerate(whole):
            key = key_of((*path[:-1], "kernel"), layer).removesuffix(".weight")
            tensors[f"base_model.model.{key}.{part}.weight"] = matrix.T
    settings = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS",
        "base_model_name_or_path": base if _is_hub_name(base) else None,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rank_stabilised,
        "target_modules": list(lora.targets),
        "modules_to_save": ["score"],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    texts = {
        ADAPTER_FILES[0]: dump(settings),
        DESCRIPTION: describe(layout, temperature, examples, quantization, head, lengths),
        **_tokenizer(tokenizer_folder, layout),
    }

    def write_tensors(folder: Path) -> None:
        from safetensors.numpy import save_file

        contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
        save_file(contiguous, folder / ADAPTER_FILES[1], metadata={"format": "pt"})

    write_folder(output, texts, write_tensors)


def _split_head(
    head: Mapping[str, Any], decoder: Mapping[str, Any]
) -> "tuple[np.ndarray, dict[str, Any] | None]":
    """The weights ``[D, 3]`` of the state, which other programs have a place for, and the rest.

    The rest is what `describe` says of lengths; None where the head is not told them.
    """
    kernel = _checked("score", head["kernel"])
    width = decoder["norm"]["scale"].shape[-1]
    if "bias" not in head:
        return kernel, None
    lengths = {
        "weights": kernel[width:].tolist(),
        "bias": _checked("score's bias", head["bias"]).tolist(),
    }
    return kernel[:width], lengths


def _is_hub_name(base: str) -> bool:
    return bool(_HUB_NAME.fullmatch(base)) and not os.path.exists(base)


def _checked(name: str, array: Any) -> "np.ndarray":
    import numpy as np

    values = np.asarray(array, np.float32)
    if not np.isfinite(values).all():
        problem = "is not finite"
    elif np.abs(values).max(initial=0.0) > _LARGEST_FLOAT16:
        problem = f"holds {np.abs(values).max():.3g}, beyond float16's range"
    else:
        return values
    raise InputError(
        "--workdir",
        f"the best checkpoint's {name} {problem}",
        "train again, with a lower learning rate",
    )


def _tokenizer(folder: Path, layout: "Layout") -> dict[str, str]:
    return read_tokenizer(folder, layout.max_length, default_class="PreTrainedTokenizerFast")


def export_merged(
    output: Path,
    *,
    params: Mapping[str, Any],
    config: "LlamaConfig",
    lora: "LoRAConfig | None",
    dtype: str,
    layout: "Layout",
    tokenizer_folder: Path,
    temperature: float,
    examples: Sequence[Mapping[str, Any]],
    head: str,
) -> None:
    """Writes a whole ``LlamaForSequenceClassification`` folder, the adapters added to the base.

    A quantised base is dequantised. Files of 2 GB are written one after the other, so the host
    never holds the model.

    Args:
      params: all parameters of the run.
      config: the architecture.
      lora: the adapters; None where the whole model was trained.
      dtype: of the written weights: "float32", "bfloat16" or "float16".
      output, layout, tokenizer_folder, temperature, examples, head: as for `export_adapter`.

    Raises:
      InputError, RunError: as `export_adapter`.
    """
    output = Path(os.path.realpath(output))
    check_output(output)
    score, lengths = _split_head(params["head"], params["decoder"])
    texts = {
        "config.json": dump(_model_config(config, dtype, tokenizer_folder)),
        DESCRIPTION: describe(layout, temperature, examples, head=head, lengths=lengths),
        **_tokenizer(tokenizer_folder, layout),
    }
    tensors = itertools.chain(_merged(params, lora), [("score.weight", score.T)])
    write_folder(output, texts, lambda folder: _write_shards(folder, tensors, config, dtype))


def _merged(
    params: Mapping[str, Any], lora: "LoRAConfig | None"
) -> Iterator[tuple[str, "np.ndarray"]]:
    """Every tensor of the model but its head under its key, float32, one at a time."""
    import jax
    import jax.numpy as jnp

    from pref_jax.models.quantize import dequantize

    decoder, adapters = params["decoder"], params.get("lora", {}).get("decoder", {})
    yield "model.embed_tokens.weight", _checked("embedding", decoder["embed_tokens"]["embedding"])
    for name, first in first_layers(decoder).items():
        layers = names.flatten(decoder[name])
        kernels = group_kernels(layers)
        for layer in range(next(iter(layers.values())).shape[0]):
            for path, stack in kernels.items():
                weights = jax.tree.map(lambda leaf, at=layer: leaf[at], stack)
                if isinstance(weights, dict):
                    weights = dequantize(weights)
                node: Any = adapters.get(name, {})
                for part in path[:-1]:
                    node = node.get(part, {})
                weights = jnp.asarray(weights, jnp.float32)
                if node and lora is not None:
                    update = jnp.matmul(node["a"][layer], node["b"][layer], precision="highest")
                    weights = weights + update * lora.scale
                values = _checked("/".join(path), weights)
                is_kernel = path[-1] == "kernel"
                yield key_of((name, *path), first + layer), values.T if is_kernel else values
    yield "model.norm.weight", _checked("norm", decoder["norm"]["scale"])


def _write_shards(
    folder: Path, tensors: Iterator[tuple[str, "np.ndarray"]], config: "LlamaConfig", dtype: str
) -> None:
    import json

    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file

    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    shards: list[list[str]] = []
    waiting: dict[str, np.ndarray] = {}
    size = total = 0

    def flush() -> None:
        nonlocal waiting, size
        if waiting:
            path = folder / f"part-{len(shards):05d}"
            save_file(waiting, path, metadata={"format": "pt"})
            shards.append(list(waiting))
            waiting, size = {}, 0

    for name, values in tensors:
        data = np.ascontiguousarray(values).astype(kind)
        if size and size + data.nbytes > _SHARD_BYTES:
            flush()
        waiting[name] = data
        size, total = size + data.nbytes, total + data.nbytes
    flush()
    if len(shards) == 1:
        (folder / "part-00000").rename(folder / SINGLE)
        return
    index: dict[str, str] = {}
    for number, held in enumerate(shards):
        name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"part-{number:05d}").rename(folder / name)
        index |= dict.fromkeys(held, name)
    content = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _model_config(config: "LlamaConfig", dtype: str, tokenizer_folder: Path) -> dict[str, Any]:
    rope, kind = config.rope, config.rope.kind
    parameters: dict[str, Any] = {"rope_type": kind, "rope_theta": rope.theta}
    if kind != "default":
        parameters["factor"] = rope.factor
    if kind in ("llama3", "yarn"):
        parameters["original_max_position_embeddings"] = rope.original_max_positions
    if kind == "llama3":
        parameters["low_freq_factor"] = rope.low_freq_factor
        parameters["high_freq_factor"] = rope.high_freq_factor
    if kind == "yarn":
        parameters |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
        parameters["truncate"] = rope.truncate
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            if getattr(rope, name) is not None:
                parameters[name] = getattr(rope, name)
    from pref_jax.data.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_folder)
    return {
        "architectures": ["LlamaForSequenceClassification"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_epsilon,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rope_parameters": parameters,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_id,
        # What is padded with is never the last token of a row, which is the template's.
        "pad_token_id": _pad_id(tokenizer_folder, tokenizer.bos_id),
        "id2label": {str(number): label for number, label in enumerate(LABELS)},
        "label2id": {label: number for number, label in enumerate(LABELS)},
        "dtype": dtype,
    }


def _pad_id(folder: Path, begin: int | None) -> int:
    content = read_json(folder / "tokenizer.json")
    ids = {token["content"]: token["id"] for token in content.get("added_tokens") or []}
    settings_file = folder / "tokenizer_config.json"
    settings = read_json(settings_file) if settings_file.is_file() else {}
    for name in ("pad_token", "eos_token"):
        token = settings.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if token in ids:
            return int(ids[token])
    return 0 if begin is None else begin
