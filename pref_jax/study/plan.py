"""The paper's study as a graph of parts: what is made, from what, with which config.

A part has a fingerprint over its own settings and those of everything it needs, so that a change
is found to concern just what depends on it.
"""

import dataclasses
import fnmatch
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from pref_jax import __version__
from pref_jax.config import encoder_config, llama_config, rating_config, resolve
from pref_jax.config_file import override
from pref_jax.errors import InputError
from pref_jax.files import plain

SCALES = ("tiny", "minilm", "paper")
LAYOUTS = ("single", "parallel")
# Smallest first.
BACKBONES = {"tiny": ("distilbert", "bert-base"), "paper": ("distilbert", "bert-base")}
TITLES = {
    "distilbert": "DistilBERT",
    "bert-base": "BERT-base",
    "minilm": "MiniLM",
    "single": "Single",
    "parallel": "Parallel",
}
# Rows that are simulated where no data is named: to train on and to test.
SIMULATED_ROWS = {"tiny": (640, 400), "minilm": (1500, 500), "paper": (57_477, 5_000)}
DATA = "data"
# Fields that follow from the study, and what to do to change them.
_OWN = {
    "seed": "give --seeds",
    "data.train": "give --data",
    "data.valid": "the study holds rows of --data out",
    "data.annotations": "give --annotations",
    "data.properties": "give --properties",
    "model.init_from": "annotated models start from the study's own multi-task runs",
}
# Of a test.
PREDICTIONS, EVALUATION = "predictions.csv", "evaluation.json"


@dataclasses.dataclass(frozen=True)
class Part:
    """One thing that the study makes, in a folder of its name.

    Attributes:
      name: path below the study's folder.
      kind: "data", "rate" (a multi-task run), "train" (a run that learns preferences) or "test"
        (such a run's answers on the test rows).
      needs: names of the runs that it starts from.
      settings: what else it is made from, as JSON has it: config and content of the data it reads.
      config: of a run; paths are filled in when it starts.
    """

    name: str
    kind: str
    needs: tuple[str, ...]
    settings: Mapping[str, Any]
    config: ConfigDict | None = None


@dataclasses.dataclass(frozen=True)
class Model:
    """One of the models that are compared.

    Attributes:
      key: name of its runs' folders.
      title: as figures call it.
      layout, backbone, annotated: what tells it from the others; backbone "llama" for the last.
    """

    key: str
    title: str
    layout: str
    backbone: str
    annotated: bool


@dataclasses.dataclass(frozen=True)
class Sources:
    """Where rows and ratings come from; all None: simulated.

    Attributes:
      train, test: labelled files. annotations: ratings of responses in ``train``. properties: what
      was rated. digests: content hashes of all of these that are there.
      rows: simulated rows to train on and to test.
    """

    train: str | None = None
    test: str | None = None
    annotations: str | None = None
    properties: str | None = None
    digests: Mapping[str, str] = dataclasses.field(default_factory=dict)
    rows: tuple[int, int] = (0, 0)

    def identity(self, *names: str) -> dict[str, Any]:
        """What the content of the named sources follows from; of all where none is named."""
        if self.train is None:
            return {"rows": list(self.rows)}  # simulated together
        return {name: digest for name, digest in self.digests.items() if name in names or not names}


def make_models(scale: str) -> list[Model]:
    """The models of a scale: the paper's nine, or four of one backbone."""
    models = [
        Model(
            f"{layout}_{backbone}" + ("_annotated" if annotated else ""),
            f"{TITLES[layout]} {TITLES[backbone]}" + (", annotated" if annotated else ""),
            layout,
            backbone,
            annotated,
        )
        for annotated in (False, True)
        for backbone in BACKBONES.get(scale, ("minilm",))
        for layout in LAYOUTS
    ]
    if scale in BACKBONES:
        name = "LLaMA 3.1 8B, LoRA" if scale == "paper" else "LLaMA, LoRA"
        models.append(Model("llama", name, "decoder", "llama", False))
    return models


def make_parts(
    scale: str, sources: Sources, seeds: int, changes: Sequence[str] = ()
) -> dict[str, Part]:
    """All parts by name, each behind what it needs.

    Args:
      scale: "tiny", "minilm" or "paper".
      sources: rows and ratings.
      seeds: how often everything is trained, with seeds 0, 1, ...
      changes: ``PATTERN:field=value``: config fields of the runs whose name a pattern fits.

    Raises:
      InputError: a change that fits no run, or whose field or value is wrong.
    """
    parts = {DATA: Part(DATA, "data", (), {"made_of": sources.identity()})}
    used: set[str] = set()
    for seed in range(seeds):
        backbones = dict.fromkeys(model.backbone for model in make_models(scale))
        for backbone in (name for name in backbones if name != "llama"):
            name = f"seed{seed}/multitask_{backbone}"
            config = _rating_config(scale, backbone)
            read = sources.identity("train", "annotations", "properties")
            parts[name] = _make_run(name, "rate", (), config, read, seed, changes, used)
        for model in make_models(scale):
            name = f"seed{seed}/{model.key}"
            needs = (f"seed{seed}/multitask_{model.backbone}",) if model.annotated else ()
            config, read = _preference_config(scale, model), sources.identity("train")
            parts[name] = _make_run(name, "train", needs, config, read, seed, changes, used)
            tested = f"test/{name}"
            parts[tested] = Part(tested, "test", (name,), {"data": sources.identity("test")})
    for change in changes:
        if change not in used:
            raise InputError(
                "--set",
                f"{change!r} fits no run",
                f"give PATTERN:field=value, with a pattern for names as {list(parts)[-2]}",
            )
    return parts


def fingerprint(part: Part, parts: Mapping[str, Part]) -> str:
    """Hash of everything that the part's content follows from."""
    content = {
        "version": __version__,
        "kind": part.kind,
        "settings": plain(part.settings),
        "needs": [fingerprint(parts[name], parts) for name in part.needs],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _make_run(
    name: str,
    kind: str,
    needs: tuple[str, ...],
    config: ConfigDict,
    read: Mapping[str, Any],
    seed: int,
    changes: Sequence[str],
    used: set[str],
) -> Part:
    config.seed = seed
    for change in changes:
        pattern, colon, assignment = change.partition(":")
        field, equals, value = assignment.partition("=")
        if not (colon and equals):
            raise InputError("--set", f"{change!r} is not PATTERN:field=value", "mend it")
        if field in _OWN:
            raise InputError("--set", f"the study sets {field} itself", _OWN[field])
        if fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*/{pattern}"):
            override(config, field, value)
            used.add(change)
    resolve(config)
    settings = plain(config.to_dict())
    for field in ("logging", "mesh"):  # these change no result
        settings.pop(field)
    return Part(name, kind, needs, {"config": settings, "data": read}, config)


def _rating_config(scale: str, backbone: str) -> ConfigDict:
    config = rating_config(backbone)
    if scale == "tiny":
        _shrink(config, backbone)
        config.train.epochs = 4.0
    elif scale == "minilm":
        _quicken(config)
        config.train.epochs = 3.0
    return config


def _preference_config(scale: str, model: Model) -> ConfigDict:
    if model.backbone == "llama":
        config = llama_config("8b" if scale == "paper" else "tiny", quantization="none")
        if scale == "tiny":
            config.input.max_length = 384  # bytes; the template alone takes 100
            config.model.config.max_positions = 384
            config.train.learning_rate, config.train.head_learning_rate = 1e-2, 1e-2
            config.train.epochs = 2.0
            _quicken_updates(config)
        return config
    words = f"{model.backbone},annotated" if model.annotated else model.backbone
    config = encoder_config(words, layout=model.layout)
    if scale == "tiny":
        _shrink(config, model.backbone)
    elif scale == "minilm":
        _quicken(config)
        config.train.epochs = 1.0
    return config


def _shrink(config: ConfigDict, backbone: str) -> None:
    """Stand-ins that train in a minute on two cores: the same layers in proportion, narrow."""
    config.model.pretrained = None
    config.model.family = "distilbert" if backbone == "distilbert" else "bert"
    sizes = config.model.config
    sizes.num_layers = 4 if backbone == "distilbert" else 6
    sizes.hidden_size = 48 if backbone == "distilbert" else 64
    sizes.num_heads, sizes.intermediate_size = 2, 2 * sizes.hidden_size
    sizes.max_positions = 64
    config.input.max_length = 64
    config.input.tokenizer = "tokenizers"  # one library less to load
    config.train.learning_rate = 1e-3
    config.train.epochs = 3.0
    _quicken_updates(config)


def _quicken(config: ConfigDict) -> None:
    config.input.max_length = 128
    config.train.learning_rate = 1e-4
    _quicken_updates(config)


def _quicken_updates(config: ConfigDict) -> None:
    config.train.batch_size = 16
    config.train.warmup_steps = 10
    config.eval.every_steps = 40
    config.checkpoint.every_steps = 40
    config.checkpoint.keep = 1
    config.logging.tensorboard = False
    config.logging.every_steps = 20
