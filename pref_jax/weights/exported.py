"""Reads exported folders back, for scoring where there is no workdir.

Beside what `export` writes, such a folder holds `RUN_FILE`: the run's config and architecture, and
which base its adapters belong to.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pref_jax.errors import InputError
from pref_jax.files import read_json, write_json
from pref_jax.weights import names
from pref_jax.weights.export import ADAPTER_FILES, DESCRIPTION
from pref_jax.weights.files import SINGLE, Tensor, open_tensors, weights_digest

if TYPE_CHECKING:
    import jax

    from pref_jax.experiment import Experiment, Run

RUN_FILE = "run.json"
_REMEDY = "build the bundle again with launch/kaggle.py"
# Paths of the machine that trained; nothing is read from there.
_PLACES = {
    "data": ("train", "valid", "annotations", "properties", "soft_labels"),
    "model": ("pretrained", "init_from"),
}


def write_run(folder: Path, run: "Run", *, form: str, quantization: str | None = None) -> None:
    """Writes `RUN_FILE` into the export of ``run``.

    Args:
      folder: what `export_run` wrote.
      run: what was exported.
      form: "encoder", "adapter" or "merged" (a whole decoder).
      quantization: of the base under adapters, where it shall not be that of the training.
    """
    config = run.experiment.config.to_dict()
    for section, fields in _PLACES.items():
        config[section] |= {name: None for name in fields if name in config[section]}
    config["train"]["microbatch_size"] = None  # that of the device that scores
    if form == "merged":
        config["model"]["quantization"] = "none"
        config["model"]["lora"]["rank"] = 0
    elif quantization is not None:
        config["model"]["quantization"] = quantization
    base = run.experiment.backbone.base
    write_json(
        folder / RUN_FILE,
        {
            "form": form,
            "step": run.step,
            "config": config,
            "architecture": dataclasses.asdict(run.experiment.backbone.architecture),
            "base": {"digest": base["digest"]} if form == "adapter" else None,
        },
    )


def load_exported(folder: Path, base: Path | None = None) -> "Run":
    """A model as `load_run` gives it, from an exported folder, on all devices of this machine.

    bfloat16 becomes float16 where the hardware has none. Weights that would fill a device are cut
    over all of them.

    Args:
      folder: an export with `RUN_FILE` in it.
      base: folder or ``.gguf`` file that adapters belong to.

    Raises:
      InputError: files are missing, damaged or of another model, or the base is another.
    """
    import jax

    from pref_jax.experiment import (
        Backbone,
        Run,
        fill_config,
        make_scoring_experiment,
        parse_architecture,
    )
    from pref_jax.training.precision import choose_precision

    path = folder / RUN_FILE
    content, about = read_json(path, _REMEDY), read_json(folder / DESCRIPTION, _REMEDY)
    temperature: Any = about.get("temperature")
    step: Any = content.get("step")
    if type(temperature) not in (int, float) or not 0 < temperature < math.inf:
        raise InputError(
            str(folder / DESCRIPTION), "temperature: it is not a number above 0", _REMEDY
        )
    if type(step) is not int:
        raise InputError(str(path), "step: it is not a whole number", _REMEDY)
    config = fill_config(content.get("config") or {}, path)
    device = jax.devices()[0]
    if config.train.precision == "bfloat16" and choose_precision("auto", device).loss_scaling:
        config.train.precision = "float16"
    backbone = Backbone(parse_architecture(content, path), folder, {"kind": "exported"})

    experiment = make_scoring_experiment(config, backbone)
    if content.get("form") == "adapter":
        digest = (content.get("base") or {}).get("digest", "")
        params = _load_adapter(folder, experiment, base, digest, about.get("lengths"))
    elif content.get("form") == "merged":
        params = _load_merged(folder, experiment, about.get("lengths"))
    else:
        params = _load_encoder(folder, experiment)
    return Run(folder, experiment, step, params, float(temperature))


def _load_encoder(folder: Path, experiment: "Experiment") -> dict[str, Any]:
    abstract = experiment.abstract_params
    family = experiment.backbone.architecture.family
    keys = {}
    for path in names.flatten(abstract["encoder"]):
        entry = names.entry_of(path, family)
        keys["encoder", *path] = (f"encoder.{entry.key}", entry.transposed)
    for path in names.flatten(abstract["head"]):
        keys["head", *path] = names.head_key(path)
    with open_tensors(folder) as tensors:
        return _read_all(folder / SINGLE, tensors, names.flatten(abstract), keys)


def _load_merged(folder: Path, experiment: "Experiment", lengths: Any) -> dict[str, Any]:
    from pref_jax.weights.llama import load_decoder

    decoder = load_decoder(folder, experiment.abstract_params["decoder"], "none")
    with open_tensors(folder) as tensors:
        head = _read_head(folder / SINGLE, tensors, "score.weight", experiment, lengths)
    return {"decoder": decoder, "head": head}


def _read_head(
    path: Path, tensors: dict[str, Tensor], key: str, experiment: "Experiment", lengths: Any
) -> dict[str, Any]:
    """A decoder's head: weights of the state in a tensor, what it knows of lengths beside them.

    Args:
      path: of the file with the tensor, which is taken out of ``tensors``.
      lengths: what `describe` said of them, where the head is told them.
    """
    import numpy as np

    abstract = experiment.abstract_params["head"]
    shape = (abstract["kernel"].shape[1], experiment.backbone.architecture.hidden_size)
    score = _take(path, tensors, key, shape)
    parts = {"kernel": np.asarray(score.slices[:, :], np.float32).T}
    if experiment.is_told_lengths:
        try:
            weights = np.array(lengths["weights"], np.float32)
            parts["kernel"] = np.concatenate([parts["kernel"], weights])
            parts["bias"] = np.array(lengths["bias"], np.float32)
        except (KeyError, TypeError, ValueError) as error:
            where = str(path.parent / DESCRIPTION)
            raise InputError(where, "lengths: missing or damaged", _REMEDY) from error
    called = {"kernel": key, "bias": "bias"}
    found = {called[n]: Tensor(called[n], path, x.shape, "F32", x) for n, x in parts.items()}
    keys: dict[names.Path, tuple[str, bool]] = {(n,): (called[n], False) for n in parts}
    return _read_all(path, found, names.flatten(abstract), keys)


def _load_adapter(
    folder: Path, experiment: "Experiment", base: Path | None, digest: str, lengths: Any
) -> dict[str, Any]:
    import numpy as np

    from pref_jax.weights.llama import first_layers, key_of, load_decoder

    if base is None or not base.exists():
        raise InputError(
            str(base or folder),
            "the base of these adapters is not there",
            "attach it, or build the bundle without --kaggle_base",
        )
    found = weights_digest(base)
    if found != digest:
        raise InputError(
            str(base),
            f"its weights have the hash {found[:12]}, the adapters belong to {digest[:12]}",
            "attach the base that the run was trained on",
        )
    abstract = experiment.abstract_params
    wanted = {"lora": abstract["lora"]}
    path = folder / ADAPTER_FILES[1]
    with open_tensors(folder, [path]) as tensors:
        score = "base_model.model.score.weight"
        head = _read_head(path, tensors, score, experiment, lengths)
        firsts = first_layers(abstract["decoder"])
        # The file holds a matrix per layer, the tree a stack of them: layers are joined first.
        stacks: dict[str, Tensor] = {}
        keys: dict[names.Path, tuple[str, bool]] = {}
        for place, leaf in names.flatten(wanted).items():
            _, _, *below = place
            part = {"a": "lora_A", "b": "lora_B"}[below[-1]]
            layers = []
            for layer in range(leaf.shape[0]):
                key = key_of((*below[:-1], "kernel"), firsts[below[0]] + layer)
                name = f"base_model.model.{key.removesuffix('.weight')}.{part}.weight"
                layers.append(_take(path, tensors, name, leaf.shape[:0:-1]))
            whole = np.stack([np.asarray(tensor.slices[:, :]).T for tensor in layers])
            key = "/".join(place)
            stacks[key] = Tensor(key, path, whole.shape, layers[0].dtype, whole)
            keys[place] = (key, False)
        params = _read_all(path, tensors | stacks, names.flatten(wanted), keys)
    quantization = experiment.config.model.quantization
    decoder = load_decoder(base, abstract["decoder"], quantization)
    return {**params, "head": head, "decoder": decoder}


def _take(path: Path, tensors: dict[str, Tensor], key: str, shape: tuple[int, ...]) -> Tensor:
    tensor = tensors.pop(key, None)
    if tensor is None:
        raise InputError(str(path), f"tensor {key} is missing", _REMEDY)
    if tensor.shape != tuple(shape):
        raise InputError(
            str(path), f"tensor {key} has shape {list(tensor.shape)}, not {list(shape)}", _REMEDY
        )
    return tensor


def _read_all(
    path: Path,
    tensors: Mapping[str, Tensor],
    wanted: Mapping[names.Path, "jax.ShapeDtypeStruct"],
    keys: Mapping[names.Path, tuple[str, bool]],
) -> dict[str, Any]:
    """The tree of ``wanted``; ``keys`` says where each leaf is and whether it lies transposed."""
    import jax

    from pref_jax.weights.huggingface import make_reader

    left = dict(tensors)
    loaded = {}
    for place, leaf in wanted.items():
        key, transposed = keys[place]
        shape = tuple(leaf.shape)
        tensor = _take(path, left, key, shape[::-1] if transposed else shape)
        loaded[place] = jax.make_array_from_callback(
            shape, leaf.sharding, make_reader(tensor, leaf.dtype, transposed)
        )
    if left:
        raise InputError(str(path), f"tensor {next(iter(left))} is no part of the model", _REMEDY)
    return names.unflatten(loaded)
