"""Writes a trained encoder as a folder that plain transformers loads.

The folder holds `config.json`, `model.safetensors`, the tokenizer's files, the modelling file that
`auto_map` names, and `pref_jax.json`: how inputs are laid out, the labels in order, the
temperature (not applied to the exported logits) and rows by which any program can check itself.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pref_jax.data.tokenizers import TOKENIZER_FILES
from pref_jax.errors import InputError, RunError
from pref_jax.files import check_room, refuse_bucket, replace_folder, sync_tree
from pref_jax.weights import names
from pref_jax.weights.files import INDEX, SINGLE, read_json

if TYPE_CHECKING:
    import numpy as np

    from pref_jax.data.segments import Layout
    from pref_jax.models.bert import EncoderConfig

LABELS = ("winner_model_a", "winner_model_b", "winner_tie")
MODELING = "modeling_pref_jax.py"
DESCRIPTION = "pref_jax.json"

_BAD_PLACE = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOENT,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
)
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_OURS = {"config.json", SINGLE, INDEX, MODELING, DESCRIPTION, *ADAPTER_FILES, *TOKENIZER_FILES}
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
# Where the tokenizer came from: a place on this machine, of no use on another.
_LOCAL_FIELDS = (
    "name_or_path",
    "_name_or_path",
    "tokenizer_file",
    "vocab_file",
    "cache_dir",
    "special_tokens_map_file",
    "auto_map",
)


def export_encoder(
    output: Path,
    *,
    params: Mapping[str, Any],
    config: "EncoderConfig",
    layout: "Layout",
    tokenizer_folder: Path,
    temperature: float,
    examples: Sequence[Mapping[str, Any]],
    dropout: float,
    head: str = "linear",
    pooling: str = "cls",
    length_features: bool = False,
) -> None:
    """Writes the folder, whole or not at all.

    Args:
      output: the folder; new, empty, or an earlier export, which is replaced.
      params: nested dict of NumPy arrays with ``encoder`` and ``head``, kernels as [in, out].
      config: the encoder's architecture.
      layout: how a row becomes token ids.
      tokenizer_folder: where the tokenizer's files are.
      temperature: what a program may divide the logits by; 1 is none.
      examples: made-up rows: ``input_ids`` and ``token_type_ids`` as flat unpadded lists
        (parallel, and with both orders: two of them), ``text_lengths`` (tokens of both responses
        before cutting) and ``probabilities``.
      dropout: rate in front of the head.
      head, pooling, length_features: of the `PreferenceClassifier`.

    Raises:
      InputError: the folder holds something else or cannot be written, the layout is not that of a
        classifier of A, B and tie, weights are not finite, or the tokenizer's files are missing.
      RunError: writing failed.
    """
    output = Path(os.path.realpath(output))  # a link is followed, not replaced
    check_output(output)
    if layout.name not in ("single", "parallel"):
        raise InputError(
            "--workdir",
            f"a model of layout {layout.name} does not choose between A, B and tie",
            "export a run of layout single or parallel",
        )
    sides = 2 if head == "orders" else layout.sides
    tensors = _tensors(params, config)
    tokenizer = read_tokenizer(tokenizer_folder, layout.max_length)
    ids = _special_ids(tokenizer_folder)
    _check_examples(examples, sides, config)
    settings = _model_config(config, layout, dropout, ids)
    settings |= {"head": head, "pooling": pooling, "length_features": length_features}
    texts = {
        "config.json": dump(settings),
        DESCRIPTION: describe(layout, temperature, examples, head=head),
        MODELING: Path(__file__).with_name(MODELING).read_text(encoding="utf-8"),
        **tokenizer,
    }

    def write_tensors(folder: Path) -> None:
        from safetensors.numpy import save_file

        # transformers refuses a file that does not say which framework wrote it
        save_file(tensors, folder / SINGLE, metadata={"format": "pt"})

    write_folder(output, texts, write_tensors)


def check_output(output: Path) -> None:
    """Refuses an output folder that holds anything but an earlier export.

    Raises:
      InputError: it does, or is no folder.
    """
    refuse_bucket(output, "--output")
    where = f"--output={output}"
    if not os.path.lexists(output):
        try:
            check_room(output)
        except OSError as error:
            raise _explain(where, error) from error
        return
    if not os.path.isdir(output):
        raise InputError(where, "it is not a folder", "name a new folder")
    try:
        held = {path.name for path in output.iterdir()}
    except OSError as error:
        raise InputError(
            where, f"it cannot be read ({error.strerror})", "name a new folder"
        ) from None
    earlier = DESCRIPTION in held and bool({"config.json", ADAPTER_FILES[0]} & held)
    ours = _OURS | {name for name in held if _SHARD.fullmatch(name)}
    strange = sorted(held - ours) if earlier else sorted(held)
    if strange:
        raise InputError(
            where, f"it already holds {strange[0]!r}, no part of an export", "name a new folder"
        )


def _tensors(params: Mapping[str, Any], config: "EncoderConfig") -> dict[str, "np.ndarray"]:
    """Float32 tensors under the modelling file's names."""
    import numpy as np

    tensors: dict[str, np.ndarray] = {}
    for path, value in names.flatten(params["encoder"]).items():
        entry = names.entry_of(path, config.family)
        array = np.asarray(value, np.float32)
        tensors[f"encoder.{entry.key}"] = np.ascontiguousarray(
            array.T if entry.transposed else array
        )
    for path, value in names.flatten(params["head"]).items():
        key, transposed = names.head_key(path)
        array = np.asarray(value, np.float32)
        tensors[key] = np.ascontiguousarray(array.T if transposed else array)
    for name, array in tensors.items():
        if not np.isfinite(array).all():
            raise InputError(
                "--workdir",
                f"the best checkpoint's {name} is not finite",
                "train again, with a lower learning rate",
            )
    return tensors


def _model_config(
    config: "EncoderConfig", layout: "Layout", dropout: float, ids: Mapping[str, int]
) -> dict[str, Any]:
    """config.json. The encoder's own part must not say `model_type`: stock classes would take it
    for themselves and answer with a random head."""
    encoder: dict[str, Any]
    if config.family == "bert":
        encoder = {
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "intermediate_size": config.intermediate_size,
            "max_position_embeddings": config.max_positions,
            "type_vocab_size": config.type_vocab_size,
            "layer_norm_eps": config.norm_epsilon,
            "hidden_dropout_prob": config.hidden_dropout,
            "attention_probs_dropout_prob": config.attention_dropout,
            "hidden_act": config.activation,
        }
    else:
        encoder = {
            "vocab_size": config.vocab_size,
            "max_position_embeddings": config.max_positions,
            "attention_dropout": config.attention_dropout,
            "dim": config.hidden_size,
            "n_layers": config.num_layers,
            "n_heads": config.num_heads,
            "hidden_dim": config.intermediate_size,
            "dropout": config.hidden_dropout,
            "activation": config.activation,
        }
    module = MODELING.removesuffix(".py")
    return {
        "model_type": "pref_jax",
        "architectures": ["PrefJaxForSequenceClassification"],
        "auto_map": {
            "AutoConfig": f"{module}.PrefJaxConfig",
            "AutoModelForSequenceClassification": f"{module}.PrefJaxForSequenceClassification",
        },
        "family": config.family,
        "layout": layout.name,
        "encoder": {**encoder, "pad_token_id": ids["pad"]},
        "head_dropout": dropout,
        "id2label": {str(number): label for number, label in enumerate(LABELS)},
        "label2id": {label: number for number, label in enumerate(LABELS)},
        "problem_type": "single_label_classification",
        "pad_token_id": ids["pad"],
        "sep_token_id": ids["sep"],
        "dtype": "float32",
    }


def describe(
    layout: "Layout",
    temperature: float,
    examples: Sequence[Mapping[str, Any]],
    quantization: str | None = None,
    head: str = "linear",
    lengths: Mapping[str, Any] | None = None,
) -> str:
    """The text of `pref_jax.json`.

    Args:
      layout, temperature, examples: as in `export_encoder`.
      quantization: of the base that adapters belong to.
      head: with "orders" a row is two sequences, A before B and B before A; the logits are the mean
        of both, the second's first two exchanged.
      lengths: what a decoder's head knows of lengths, and its class in transformers does not:
        "weights" ``[3, 3]`` and "bias" ``[3]``. With a and b, the logarithms of 1 + text_lengths
        of A and B less that of 129, ``[a, b, a - b] @ weights + bias`` is added to a sequence's
        logits; a and b are exchanged for the sequence in which B stands first.
    """
    content: dict[str, Any] = {
        "input": {
            "layout": layout.name,
            "max_length": layout.max_length,
            "budget": [float(share) for share in layout.budget],
            "template": layout.template,
            "reuse_unused": bool(layout.reuse_unused),
            "truncation": layout.truncation,
            "marker": layout.marker,
            "both_orders": head == "orders",
        },
        "labels": list(LABELS),
        "temperature": float(temperature),
        "examples": [
            {
                "input_ids": _plain(example["input_ids"]),
                "token_type_ids": _plain(example["token_type_ids"]),
                "text_lengths": _plain(example["text_lengths"]),
                "probabilities": [float(value) for value in example["probabilities"]],
            }
            for example in examples
        ],
    }
    if quantization is not None:
        content["base_quantization"] = quantization
    if lengths is not None:
        content["lengths"] = dict(lengths)
    return dump(content)


def _plain(ids: Any) -> list[Any]:
    return [_plain(part) if hasattr(part, "__len__") else int(part) for part in ids]


def _check_examples(
    examples: Sequence[Mapping[str, Any]], sides: int, config: "EncoderConfig"
) -> None:
    """A defect of the caller, so no message for users."""
    import numpy as np

    for example in examples:
        ids, types = _plain(example["input_ids"]), _plain(example["token_type_ids"])
        if sides == 1:
            ids, types = [ids], [types]
        if len(ids) != sides or [len(part) for part in ids] != [len(part) for part in types]:
            raise ValueError("an example's input_ids and token_type_ids differ in shape")
        if not all(0 <= token < config.vocab_size for part in ids for token in part):
            raise ValueError("an example holds an id outside the table")
        if not np.isclose(sum(example["probabilities"]), 1, atol=1e-4):
            raise ValueError("an example's probabilities do not sum to one")


def read_tokenizer(
    folder: Path, max_length: int, default_class: str = "BertTokenizer"
) -> dict[str, str]:
    """Texts of the tokenizer's files, without what belongs to the machine or to another task."""
    texts = {
        name: (folder / name).read_text(encoding="utf-8")
        for name in TOKENIZER_FILES
        if (folder / name).is_file()
    }
    if not {"vocab.txt", "tokenizer.json"} & set(texts):
        raise InputError(
            str(folder), "there is neither vocab.txt nor tokenizer.json", "put it back to export"
        )
    settings = {}
    if "tokenizer_config.json" in texts:
        settings = read_json(folder / "tokenizer_config.json")
    for field in _LOCAL_FIELDS:
        settings.pop(field, None)
    settings.setdefault("tokenizer_class", default_class)
    settings["model_max_length"] = max_length
    texts["tokenizer_config.json"] = dump(settings)
    if "tokenizer.json" in texts:
        content = read_json(folder / "tokenizer.json")
        # Sentence encoders ship a cut at 128 tokens here, which other programs would apply.
        content["truncation"] = content["padding"] = None
        texts["tokenizer.json"] = dump(content)
    return texts


def _special_ids(folder: Path) -> dict[str, int]:
    from pref_jax.data.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(folder)
    return {"pad": int(tokenizer.pad_id), "sep": int(tokenizer.sep_id)}


def dump(content: Mapping[str, Any]) -> str:
    """JSON as every exported file has it."""
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_folder(
    output: Path, texts: Mapping[str, str], write_tensors: Callable[[Path], None]
) -> None:
    """Writes everything beside `output` and then moves it there.

    Args:
      output: the folder; what is there is an earlier export and is replaced.
      texts: content of the text files, by name.
      write_tensors: writes safetensors files into a folder.

    Raises:
      InputError: nothing can be written there.
      RunError: writing failed.
    """
    from safetensors import SafetensorError

    _remove_unfinished(output)
    mark = f".{output.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}"
    made, replaced = output.with_name(f"{mark}.new"), output.with_name(f"{mark}.old")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        made.mkdir()
        for name, text in texts.items():
            (made / name).write_text(text, encoding="utf-8")
        write_tensors(made)
        # safetensors writes for the owner's eyes alone
        for path in made.glob("*.safetensors"):
            shutil.copymode(made / DESCRIPTION, path)
        sync_tree(made)
        replace_folder(made, output, replaced)
    except (OSError, SafetensorError) as error:
        raise _explain(f"--output={output}", error) from error
    finally:
        shutil.rmtree(made, ignore_errors=True)
        if os.path.lexists(output):  # else the earlier export is all there is
            shutil.rmtree(replaced, ignore_errors=True)


def _explain(where: str, error: Exception) -> InputError | RunError:
    """The one line of a failure to write."""
    reason = getattr(error, "strerror", None) or str(error)
    if getattr(error, "errno", None) in _BAD_PLACE:
        return InputError(where, f"it cannot be written there ({reason})", "name another folder")
    return RunError(where, f"writing it failed ({reason})", "make room or name another folder")


def _remove_unfinished(output: Path) -> None:
    """Removes what exports to the same place left that were killed while they wrote."""
    form = re.compile(rf"\.{re.escape(output.name)}\.(\d+)-[0-9a-f]{{8}}\.new")
    with contextlib.suppress(OSError):
        for path in output.parent.iterdir():
            found = form.fullmatch(path.name)
            if found and not _is_alive(int(found[1])):
                shutil.rmtree(path, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True
