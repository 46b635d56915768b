"""The one place that turns a config into parts: data, model, mesh, optimizer, step.

Everything below takes plain arguments; only this module reads the config.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from ml_collections import ConfigDict

from pref_jax import hosts
from pref_jax import mesh as meshes
from pref_jax.accelerators import describe_mixture, find_weakest
from pref_jax.annotation.properties import Property, PropertySet, load_properties
from pref_jax.compilation import compile_program
from pref_jax.config import parse_targets
from pref_jax.data.batches import Geometry, Samples, make_geometry
from pref_jax.data.segments import Layout
from pref_jax.data.tokenizers import TOKENIZER_FILES, load_tokenizer
from pref_jax.errors import InputError
from pref_jax.files import read_json, sync, sync_tree, write_json
from pref_jax.memory import memory_of, shortage_explained
from pref_jax.models.attention import choose_implementation
from pref_jax.models.bert import EncoderConfig
from pref_jax.models.causal_attention import choose_causal_implementation
from pref_jax.models.classifiers import PreferenceClassifier
from pref_jax.models.llama import LlamaClassifier, LlamaConfig
from pref_jax.models.lora import LoRAConfig
from pref_jax.models.rope import RopeConfig
from pref_jax.training.checkpoints import Checkpoints
from pref_jax.training.mirror import local_run
from pref_jax.training.precision import choose_precision
from pref_jax.training.state import is_adapter, split_parameters, trainable_above
from pref_jax.training.tasks import (
    Task,
    make_distillation_task,
    make_rating_task,
    preference_task,
)
from pref_jax.training.workdir import Workdir

if TYPE_CHECKING:
    from pref_jax.data.arena import Comparisons
    from pref_jax.data.tokenizers import Tokenizer
    from pref_jax.evaluation.predict import Predictor

logger = logging.getLogger(__name__)

_MODEL_FILE = "model.json"
_TOKENIZER_FOLDER = "tokenizer"
_NO_MODEL = "give the --workdir of a run that has started to train"


Architecture = EncoderConfig | LlamaConfig


@dataclasses.dataclass(frozen=True)
class Backbone:
    """What stands below the head, and where it comes from.

    Attributes:
      architecture: of the encoder or decoder.
      tokenizer_folder: folder with the tokenizer's files.
      base: identity of the initial weights: ``kind`` ("random", "pretrained" or "run"),
        ``source`` and, but for random weights, ``digest``.
    """

    architecture: Architecture
    tokenizer_folder: Path
    base: dict[str, str]


def make_layout(config: ConfigDict) -> Layout:
    """The input layout of a config."""
    section = config.input
    return Layout(
        name=section.layout,
        max_length=section.max_length,
        budget=tuple(section.budget),
        reuse_unused=section.reuse_unused,
        truncation=section.truncation,
        template=section.template if section.layout == "decoder" else None,
        marker=section.marker,
    )


def find_backbone(config: ConfigDict, texts: "Comparisons") -> Backbone:
    """Finds architecture, tokenizer and identity of the initial weights.

    Args:
      config: the run's config.
      texts: training comparisons; without pretrained weights the vocabulary is learned from them.

    Raises:
      InputError: weights that are not there or do not fit.
    """
    section = config.model
    if section.init_from is not None and section.pretrained is not None:
        raise InputError(
            "--config.model.init_from",
            "model.pretrained is set too",
            "start from one of them; the workdir brings its own architecture",
        )
    if section.init_from is not None:
        workdir = local_run(section.init_from)
        if not (workdir / _MODEL_FILE).is_file():
            raise InputError(
                "--config.model.init_from",
                f"there is no run in {workdir}",
                "train it first, as in launch/train.py --config=configs/multitask_bert.py:minilm, "
                "or name another run",
            )
        architecture, _, _ = read_model(workdir)
        if isinstance(architecture, LlamaConfig):
            raise InputError(
                "--config.model.init_from",
                f"{workdir} is a run of a decoder",
                "start from its base with --config.model.pretrained, or name a run of an encoder",
            )
        if section.family not in (None, architecture.family):
            raise InputError(
                "--config.model.init_from",
                f"{workdir} is a run of a {architecture.family}, model.family is {section.family}",
                "name a run of that family, or leave model.family out",
            )
        digest = run_digest(workdir)
        base = {"kind": "run", "source": str(section.init_from), "digest": digest}
        return Backbone(_adapt(architecture, config), workdir / _TOKENIZER_FOLDER, base)
    if section.pretrained is not None:
        return _pretrained_backbone(config)
    base = {"kind": "random", "source": str(config.seed)}
    if section.family == "llama":
        from pref_jax.data.decoder_tokenizers import write_byte_tokenizer

        folder = write_byte_tokenizer()
        vocab_size = load_tokenizer(folder).vocab_size
        return Backbone(random_architecture(config, vocab_size), folder, base)

    from pref_jax.data.tokenizers import train_wordpiece

    folder = train_wordpiece(texts.iterate_texts, texts.digest)
    vocab_size = load_tokenizer(folder).vocab_size
    return Backbone(random_architecture(config, vocab_size), folder, base)


def _pretrained_backbone(config: ConfigDict) -> Backbone:
    from pref_jax.weights.files import weights_digest
    from pref_jax.weights.huggingface import read_architecture
    from pref_jax.weights.sources import resolve_source

    section = config.model
    source = resolve_source(section.pretrained)
    architecture = read_architecture(source, section.family)
    base = {
        "kind": "pretrained",
        "source": section.pretrained,
        "digest": weights_digest(source),
    }
    folder = source
    if source.is_file():
        from pref_jax.weights.gguf import tokenizer_folder

        folder = tokenizer_folder(source)
    return Backbone(_adapt(architecture, config), folder, base)


def find_architecture(config: ConfigDict) -> Architecture:
    """The architecture of `model.init_from` or `model.pretrained`, of which no weight is read.

    Raises:
      InputError: as for `find_backbone`.
    """
    from pref_jax.weights.huggingface import read_architecture
    from pref_jax.weights.sources import resolve_source

    section = config.model
    if section.init_from is not None:
        architecture, _, _ = read_model(local_run(section.init_from, checkpoint=False))
    else:
        source = resolve_source(section.pretrained)
        architecture = read_architecture(source, section.family)
    return _adapt(architecture, config)


def random_architecture(config: ConfigDict, vocab_size: int) -> Architecture:
    """The architecture that `model.config` describes.

    Args:
      config: the run's config.
      vocab_size: the tokenizer's; `model.config.vocab_size` wins.
    """
    numbers = config.model.config
    family = config.model.family or "bert"
    sizes = {
        "family": family,
        "vocab_size": numbers.vocab_size or vocab_size,
        "hidden_size": numbers.hidden_size,
        "num_layers": numbers.num_layers,
        "num_heads": numbers.num_heads,
        "intermediate_size": numbers.intermediate_size,
        "max_positions": numbers.max_positions,
    }
    if family == "llama":
        rope = RopeConfig(theta=float(numbers.rope_theta))
        if numbers.rope_factor > 1:  # the other three are those of LLaMA 3.1
            rope = dataclasses.replace(
                rope,
                kind="llama3",
                factor=float(numbers.rope_factor),
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_positions=8192,
            )
        return LlamaConfig(
            **sizes,
            num_kv_heads=numbers.num_kv_heads or numbers.num_heads,
            head_dim=numbers.head_dim or numbers.hidden_size // numbers.num_heads,
            norm_epsilon=1e-5,
            rope=rope,
        )
    encoder = EncoderConfig(**sizes, type_vocab_size=2 if family == "bert" else 0)
    return _with_dropout(encoder, config)


def _adapt(architecture: Architecture, config: ConfigDict) -> Architecture:
    """A base's architecture with what the config changes of it."""
    rows = config.model.extend_positions
    if rows is not None:
        where = "--config.model.extend_positions"
        if isinstance(architecture, LlamaConfig):
            raise InputError(where, "a decoder has no table of positions", "leave it out")
        if rows < architecture.max_positions:
            raise InputError(
                where,
                f"{rows} is less than the {architecture.max_positions} positions that are there",
                f"give more than {architecture.max_positions}, or leave it out",
            )
        architecture = dataclasses.replace(architecture, max_positions=rows)
    return _with_dropout(architecture, config)


def _with_dropout(architecture: Architecture, config: ConfigDict) -> Architecture:
    if isinstance(architecture, LlamaConfig):
        return architecture  # it has none
    numbers = config.model.config
    return dataclasses.replace(
        architecture,
        hidden_dropout=float(numbers.hidden_dropout),
        attention_dropout=float(numbers.attention_dropout),
    )


def exchange_responses(comparisons: "Comparisons") -> "Comparisons":
    """The same rows with A and B exchanged, labels included."""
    import pyarrow as pa

    table = comparisons.table
    pairs = (("response_a", "response_b"), ("response_a_ends", "response_b_ends"))
    other = {a: b for pair in pairs for a, b in (pair, pair[::-1])}
    table = table.rename_columns([other.get(name, name) for name in table.column_names])
    labels = np.array([1, 0, 2, -1], np.int8)[table.column("label").to_numpy()]
    at = table.column_names.index("label")
    table = table.set_column(at, "label", pa.array(labels, pa.int8()))
    return dataclasses.replace(comparisons, table=table, digest=f"{comparisons.digest}-exchanged")


class Experiment:
    """A config's model on a mesh, with its abstract parameters.

    Attributes:
      config, backbone: what it was made from.
      layout, geometry: how rows become packed units.
      mesh, precision, model: where, in which dtypes and what is computed.
      properties: what a multi-task model rates; None for a model of preferences.
      microbatch_size: sequences of ``max_length`` per device and forward pass.
      abstract_params: nested dict of `jax.ShapeDtypeStruct` with shardings.
    """

    def __init__(
        self,
        config: ConfigDict,
        backbone: Backbone,
        *,
        properties: PropertySet | None = None,
        devices: Sequence[jax.Device] | None = None,
    ) -> None:
        """Makes the parts.

        Args:
          config: checked config.
          backbone: what `find_backbone` returned.
          properties: of a multi-task run that is there already; else those that the config names.
          devices: all of this process's world when nothing is said; those of a topology to compile
            for devices that are not there.
        """
        self.config, self.backbone = config, backbone
        architecture = backbone.architecture
        self.is_decoder = isinstance(architecture, LlamaConfig)
        self.layout = make_layout(config)
        self._check_layout()
        self.properties = properties
        if properties is None and self.layout.name == "response":
            self.properties = load_properties(config.data.properties)
        self.mesh = meshes.make_mesh(
            config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices=devices
        )
        tensor = self.mesh.shape["tensor"]
        heads = getattr(architecture, "num_kv_heads", architecture.num_heads)
        if heads % tensor:
            raise InputError(
                "--config.mesh.tensor",
                f"{tensor} does not divide {heads} "
                f"{'key/value' if self.is_decoder else 'attention'} heads",
                "choose a divisor",
            )
        device = find_weakest(list(self.mesh.devices.flat))
        self.precision = choose_precision(config.train.precision, device)
        self.attention = self._choose_attention(device)
        packing = config.input.packing
        self.geometry: Geometry = make_geometry(
            self.layout.max_length,
            self.sides,
            packing=packing == "on" or (packing == "auto" and self.attention != "cudnn"),
            label_shape=(len(self.properties.ratings),) if self.properties else (),
        )
        self.microbatch_size: int = config.train.microbatch_size or self._choose_microbatch(device)
        self.model: nn.Module = self._make_model()
        self.abstract_params = meshes.abstract_parameters(self._shapes(), self.mesh)

    def _check_layout(self) -> None:
        architecture, name = self.backbone.architecture, self.layout.name
        if self.is_decoder != (name == "decoder"):
            raise InputError(
                "--config.input.layout",
                f"{name!r} is not for {architecture.family}",
                "choose decoder" if self.is_decoder else "choose single, parallel or response",
            )
        if self.layout.max_length > architecture.max_positions:
            raise InputError(
                "--config.input.max_length",
                f"{self.layout.max_length} is more than the model's {architecture.max_positions} "
                "positions",
                f"choose {architecture.max_positions} or less"
                + ("" if self.is_decoder else ", or raise --config.model.extend_positions"),
            )
        frozen_layers, lora = self.config.model.frozen_layers, self.config.model.lora
        if lora.rank and frozen_layers:
            raise InputError(
                "--config.model.frozen_layers",
                "beside adapters all layers are frozen",
                "set it to 0, or train without adapters (model.lora.rank=0)",
            )
        if frozen_layers > architecture.num_layers:
            raise InputError(
                "--config.model.frozen_layers",
                f"{frozen_layers} is more than the {architecture.num_layers} layers",
                f"choose {architecture.num_layers} or less",
            )

    def _choose_attention(self, device: jax.Device) -> str:
        architecture = self.backbone.architecture
        one_cpu = meshes.is_one_cpu(self.mesh)
        if not isinstance(architecture, LlamaConfig):
            return choose_implementation(one_cpu=one_cpu)
        return choose_causal_implementation(
            device,
            one_cpu=one_cpu,
            head_dim=architecture.head_dim,
            length=self.layout.max_length,
            dtype=self.precision.compute,
            packing=self.config.input.packing,
        )

    def _choose_microbatch(self, device: jax.Device) -> int:
        if device.platform == "cpu":
            return max(1, 512 // self.layout.max_length)
        return max(1, 4096 // self.layout.max_length) if self.is_decoder else 8

    def _make_model(self) -> nn.Module:
        config, architecture = self.config, self.backbone.architecture
        if isinstance(architecture, LlamaConfig):
            section = config.model.lora
            lora = LoRAConfig(
                rank=section.rank,
                alpha=float(section.alpha),
                dropout=float(section.dropout),
                targets=parse_targets(section.targets),
                rank_stabilised=section.rank_stabilised,
            )
            return LlamaClassifier(
                architecture,
                lora=lora if section.rank else None,
                quantization=config.model.quantization,
                head=self.head,
                frozen_layers=config.model.frozen_layers,
                length_features=config.model.length_features,
                head_dropout=float(config.model.head_dropout),
                dtype=self.precision.compute,
                frozen_dtype=self.precision.compute if section.rank else jnp.dtype("float32"),
                remat=config.train.remat,
                attention=self.attention,
                longest=self.layout.max_length,
                mesh=self.mesh,
            )
        return PreferenceClassifier(
            architecture,
            num_classes=self.num_outputs,
            head=self.head,
            pooling=config.model.pooling,
            length_features=config.model.length_features,
            head_dropout=float(config.model.head_dropout),
            dtype=self.precision.compute,
            remat=config.train.remat,
            attention=self.attention,
            longest=self.layout.max_length,
            frozen_layers=config.model.frozen_layers,
        )

    @property
    def reads_both_orders(self) -> bool:
        """Whether a sample is a row in both orders: what makes one sequence a row symmetric."""
        return self.config.model.symmetric and self.layout.sides == 1

    @property
    def sides(self) -> int:
        """Sequences of a sample."""
        return 2 if self.reads_both_orders else self.layout.sides

    @property
    def head(self) -> str:
        """Kind of the head, see `pref_jax.models.heads.apply_head`."""
        if self.reads_both_orders:
            return "orders"
        return "scores" if self.config.model.symmetric else "linear"

    @property
    def num_outputs(self) -> int:
        """Logits of a row: three classes, or those of every rating's head."""
        if self.properties is None:
            return 3
        return len(self.properties.ratings) * len(self.properties.scale)

    @property
    def task(self) -> Task:
        """What the model is trained for."""
        if self.properties is None:
            if self.config.data.soft_labels is None:
                return preference_task
            return make_distillation_task(float(self.config.train.distill_weight))
        return make_rating_task(len(self.properties.ratings))

    def _shapes(self) -> Any:
        units = meshes.batch_shards(self.mesh)  # one for each device, as its kernels expect
        tokens = jax.ShapeDtypeStruct((units, self.layout.max_length), jnp.int32)
        pool = jax.ShapeDtypeStruct((units, 1, self.sides), jnp.int32)
        lengths = jax.ShapeDtypeStruct((units, 1, 2), jnp.int32)
        key = jax.random.key(0)
        return one_tree(jax.eval_shape(self.model.init, key, *[tokens] * 4, pool, lengths))

    @functools.cached_property
    def tokenizer(self) -> "Tokenizer":
        """The tokenizer, checked against the model's table."""
        from pref_jax.data.tokenizers import load_tokenizer

        folder = self.backbone.tokenizer_folder
        tokenizer = load_tokenizer(folder, self.config.input.tokenizer)
        rows = self.backbone.architecture.vocab_size
        if tokenizer.vocab_size > rows and self.backbone.base["kind"] == "random":
            raise InputError(
                "--config.model.config.vocab_size",
                f"{rows} is less than the {tokenizer.vocab_size} tokens of the learned vocabulary",
                f"give at least {tokenizer.vocab_size}, or leave it out",
            )
        if tokenizer.vocab_size > rows:
            raise InputError(
                str(folder),
                f"the tokenizer knows {tokenizer.vocab_size} tokens, the model's table has "
                f"{rows} rows",
                "use the tokenizer that belongs to the weights",
            )
        return tokenizer

    def make_samples(
        self,
        comparisons: "Comparisons",
        *,
        orders: int = 1,
        ratings: np.ndarray | None = None,
        teachers: np.ndarray | None = None,
    ) -> Samples:
        """Tokenises comparisons, through the cache; two orders add A and B exchanged.

        The samples of a multi-task model are responses: ``2 * row + side``, side 0 for A.

        Args:
          comparisons: the file.
          orders: 1 or 2; of a symmetric model 1.
          teachers: soft labels, float32 ``[rows, 3]``; zeros where there are none.
          ratings: of a multi-task model: int8 ``[2 * rows, H]``, -1 where there is none; None: all
            are unknown.
        """
        from pref_jax.data.features import make_features

        if self.properties is not None:
            if ratings is None:
                shape = 2 * len(comparisons), len(self.properties.ratings)
                ratings = np.full(shape, -1, np.int8)
            features = make_features(comparisons, self.tokenizer, self.layout)
            return Samples([features], ratings, np.ones(len(ratings), bool))
        parts = [comparisons]
        if orders > 1 or self.reads_both_orders:
            parts.append(exchange_responses(comparisons))
        return Samples(
            [make_features(part, self.tokenizer, self.layout) for part in parts],
            comparisons.labels,
            comparisons.tie_allowed,
            teachers=teachers,
            paired=self.reads_both_orders,
        )

    def split(self, params: Any) -> tuple[Any, Any]:
        """Trainable and frozen parts of a parameter tree."""
        if self.config.model.lora.rank:
            return split_parameters(params, is_adapter)
        return split_parameters(params, trainable_above(self.config.model.frozen_layers))

    @property
    def trained_share(self) -> float:
        """How much of the layers' matrices has gradients of its own: 0 with adapters."""
        section = self.config.model
        if section.lora.rank:
            return 0.0
        return 1.0 - float(section.frozen_layers) / self.backbone.architecture.num_layers

    def initial_params(self, base: Any = None) -> Any:
        """New head and adapters, and the base as the backbone says; placed on the mesh.

        The order of precedence, where a run has several places to start from, is decided by the
        caller: resume from a checkpoint, else these.

        Args:
          base: what `load_base` returned, where the caller has called it already.
        """
        if base is None:
            base = self.load_base()
        if base is None:
            return self._random(self.abstract_params)
        # Only what is new is drawn: the compiler drops what is not asked for.
        new = {name: tree for name, tree in self.abstract_params.items() if name != self._trunk}
        return {self._trunk: base, **self._random(new)}

    @property
    def _trunk(self) -> str:
        return "decoder" if self.is_decoder else "encoder"

    def _random(self, abstract: Any) -> Any:
        names = set(abstract)

        def draw(key_data: jax.Array) -> Any:
            key = jax.random.wrap_key_data(key_data)
            tokens = jnp.zeros((1, self.layout.max_length), jnp.int32)
            pool = jnp.zeros((1, 1, self.sides), jnp.int32)
            lengths = jnp.zeros((1, 1, 2), jnp.int32)
            params = one_tree(nn.unbox(self.model.init(key, *[tokens] * 4, pool, lengths)))
            return {name: params[name] for name in names}

        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        everywhere = meshes.replicated(self.mesh)
        # As an argument, so that one kept program serves every seed.
        seed = np.asarray(jax.random.key_data(jax.random.key(self.config.seed)))
        key_data = meshes.place(seed, everywhere)
        abstract_key = jax.ShapeDtypeStruct(key_data.shape, key_data.dtype, sharding=everywhere)
        program = compile_program(
            jax.jit(draw, out_shardings=shardings),
            (abstract_key,),
            ("draw", self.model, self.layout, sorted(names)),
        )
        return program(key_data)

    def load_base(self) -> Any:
        """The base's encoder or decoder, onto the mesh shard by shard; None where it is random.

        Raises:
          InputError: the base is gone, damaged or of another shape.
        """
        base, abstract = self.backbone.base, self.abstract_params[self._trunk]
        if base["kind"] == "random":
            return None
        if base["kind"] == "pretrained":
            from pref_jax.weights.sources import resolve_source

            source = resolve_source(base["source"])
            if self.is_decoder:
                from pref_jax.weights.llama import load_decoder

                return load_decoder(source, abstract, self.config.model.quantization)
            from pref_jax.weights.huggingface import load_encoder

            return load_encoder(source, abstract)
        run = load_run(base["source"])
        if run.experiment.backbone.base.get("kind") == "run" and not run.params:
            raise InputError(base["source"], "it has no parameters", "train it first")
        ours = {name: leaf.shape for name, leaf in _flatten(abstract).items()}
        encoder = run.params["encoder"]
        if self.config.model.extend_positions is not None:
            encoder = _extend_positions(encoder, self.backbone.architecture.max_positions)
        theirs = {name: leaf.shape for name, leaf in _flatten(encoder).items()}
        if ours != theirs:
            raise InputError(
                base["source"], "its encoder has another shape", "start from a run of this backbone"
            )
        return jax.tree.map(
            lambda leaf, like: meshes.place(np.asarray(leaf), like.sharding),
            encoder,
            abstract,
        )

    @property
    def is_told_lengths(self) -> bool:
        """Whether it judges preferences by the lengths of the responses too."""
        return bool(self.config.model.length_features) and self.properties is None

    def make_predictor(self) -> "Predictor":
        """The compiled forward pass."""
        from pref_jax.evaluation.predict import Predictor

        # Nothing is kept for a backward pass, and a file has units enough to fill larger products.
        # On a CPU two calls share the cores, and the last call of a file is seldom full.
        tokens = 1024 if meshes.is_one_cpu(self.mesh) else 2048
        least = tokens // (self.layout.max_length * meshes.batch_shards(self.mesh))
        return Predictor(
            self.model,
            self.mesh,
            self.geometry,
            microbatch_size=max(self.microbatch_size, least),
            abstract_params=self.abstract_params,
            num_outputs=self.num_outputs,
        )

    # What a workdir keeps, so that it can be used without the pretrained folder.

    def write_model(self, workdir: Path, data: dict[str, str]) -> None:
        """Writes what the run stands on into its workdir, or compares it with what is there.

        Args:
          workdir: the run's folder.
          data: content hashes of the training and held-out files; their paths may change.

        Raises:
          InputError: the run was started with other weights or other data.
        """
        folder = workdir / _TOKENIZER_FOLDER
        if not folder.exists():
            made = workdir / f".{_TOKENIZER_FOLDER}.unfinished"
            shutil.rmtree(made, ignore_errors=True)  # of a start that was killed
            made.mkdir()
            for name in TOKENIZER_FILES:
                if (self.backbone.tokenizer_folder / name).is_file():
                    shutil.copyfile(self.backbone.tokenizer_folder / name, made / name)
            sync_tree(made)
            made.rename(folder)
            sync(workdir)
        content = {
            "architecture": dataclasses.asdict(self.backbone.architecture),
            "base": self.backbone.base,
            "data": data,
            "parameters": self.count_parameters(),
        }
        if self.properties is not None:
            content["properties"] = dataclasses.asdict(self.properties)
        if (workdir / _MODEL_FILE).exists():
            before = read_json(workdir / _MODEL_FILE, "remove the workdir and train again")
            for name, what in (
                ("data", "data"),
                ("properties", "properties"),
                ("architecture", "weights"),
                ("base", "weights"),
            ):
                if _without_place(before.get(name)) != _without_place(content.get(name)):
                    raise InputError(
                        str(workdir / _MODEL_FILE),
                        f"the run was started with other {what}",
                        f"give the {what} it was started with, or another --workdir",
                    )
            if before == json.loads(json.dumps(content)):
                return
        write_json(workdir / _MODEL_FILE, content)

    def count_parameters(self) -> dict[str, int]:
        """Numbers of all and of the trainable parameters."""
        trainable, _ = self.split(self.abstract_params)
        return {
            "total": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.abstract_params)),
            "trainable": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(trainable)),
        }

    def bytes_per_device(self, *, training: bool) -> int:
        """Of weights, and in training of the gradients and both moments of those that train."""

        def count(tree: Any) -> int:
            return sum(
                math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
                for leaf in jax.tree.leaves(tree)
            )

        trainable, frozen = self.split(self.abstract_params)
        return count(frozen) + count(trainable) * (4 if training else 1)


def _without_place(value: Any) -> Any:
    """What has to stay the same of an entry of the model file: weights may move, not change."""
    if isinstance(value, dict) and "digest" in value:
        value = {name: part for name, part in value.items() if name != "source"}
    return json.loads(json.dumps(value))


def _flatten(tree: Any) -> dict[str, Any]:
    return traverse_util.flatten_dict(tree, sep="/")


def _extend_positions(encoder: Any, rows: int) -> Any:
    """The tree with a longer table of positions, as `load_encoder` makes it."""
    from pref_jax.weights.huggingface import repeat_rows

    tables = encoder["embeddings"]
    longer = {"embedding": repeat_rows(np.asarray(tables["position"]["embedding"]), rows)}
    return encoder | {"embeddings": tables | {"position": longer}}


def one_tree(variables: Any) -> Any:
    """Parameters and adapters, two Flax collections, as the one tree that is trained and kept."""
    tree = dict(variables["params"])
    return tree | {"lora": variables["lora"]} if "lora" in variables else tree


def read_model(workdir: Path) -> tuple[Architecture, dict[str, str], dict[str, Any]]:
    """Architecture, base and the whole content of a workdir's model file.

    Raises:
      InputError: it is missing, or not of this project.
    """
    path = workdir / _MODEL_FILE
    content = read_json(path, _NO_MODEL)
    return parse_architecture(content, path), content["base"], content


def parse_architecture(content: dict[str, Any], path: Path) -> Architecture:
    """The ``architecture`` of a file's content that also names a ``base``.

    Raises:
      InputError: one of the two is missing or has other fields.
    """
    try:
        values, _ = content["architecture"], content["base"]
        if values["family"] == "llama":
            return LlamaConfig(**values | {"rope": RopeConfig(**values["rope"])})
        return EncoderConfig(**values)
    except (KeyError, TypeError) as error:
        raise InputError(
            str(path), f"is not a model of this project ({error})", _NO_MODEL
        ) from error


def _read_properties(workdir: Path, content: dict[str, Any]) -> PropertySet | None:
    """What a multi-task run rates: its own copy, since the file may have changed."""
    values = content.get("properties")
    if values is None:
        return None
    try:
        return PropertySet(
            values["name"],
            tuple(values["scale"]),
            tuple(Property(**flag) for flag in values["flags"]),
            tuple(Property(**rating) for rating in values["ratings"]),
        )
    except (KeyError, TypeError) as error:
        raise InputError(
            str(workdir / _MODEL_FILE), f"properties: {error}", "train the run again"
        ) from error


def run_digest(workdir: Path) -> str:
    """Identity of a run's best checkpoint: its manifest holds the hash of every file."""
    checkpoints = Checkpoints(workdir / "checkpoints", keep=1, read_only=True)
    best = checkpoints.best_step()
    if best is None:
        raise InputError(
            str(workdir), "it has no evaluated checkpoint", "train that run first, to its end"
        )
    digest = hashlib.sha256()
    for path in sorted((workdir / "checkpoints" / str(best)).rglob("*manifest*.json")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


@dataclasses.dataclass
class Run:
    """A trained run, ready to predict.

    Attributes:
      workdir: its folder.
      experiment: its parts.
      step: the best checkpoint.
      params: all parameters of that checkpoint, placed on the mesh.
      temperature: divides the logits; 1 unless the run was calibrated.
    """

    workdir: Path
    experiment: Experiment
    step: int
    params: Any
    temperature: float


def read_config(workdir: Path) -> ConfigDict:
    """The config that a workdir was trained with.

    Raises:
      InputError: no workdir, or one that another version of the project wrote.
    """
    return fill_config(Workdir(workdir).read_config(), workdir / "config.json")


def fill_config(saved: dict[str, Any], path: Path) -> ConfigDict:
    """A config from the values that the file ``path`` holds.

    Raises:
      InputError: it has a field that is unknown here.
    """
    from pref_jax.config import default_config

    config = default_config()

    def fill(section: ConfigDict, values: dict[str, Any], prefix: str) -> None:
        for name, value in values.items():
            if name not in section:
                raise InputError(
                    str(path),
                    f"it has the field {prefix}{name}, unknown here",
                    "use the version of the project that trained it",
                )
            inner = section[name]
            try:
                if isinstance(inner, ConfigDict):
                    fill(inner, dict(value), f"{prefix}{name}.")
                elif value is None and inner is not None:
                    raise TypeError("null")
                else:
                    section[name] = tuple(value) if isinstance(value, list) else value
            except (TypeError, ValueError) as error:
                raise InputError(
                    str(path),
                    f"its field {prefix}{name} has a value of another type",
                    "bring back the file that the training wrote",
                ) from error

    fill(config, saved, "")
    return config


# Of a device's memory, what the weights may take before they are cut over all devices.
_WEIGHTS_SHARE = 0.6


def make_scoring_experiment(
    config: ConfigDict, backbone: Backbone, *, properties: PropertySet | None = None
) -> Experiment:
    """An experiment that scores: every device its own rows, with all weights where these fit.

    Else the weights are cut over all devices, whatever the mesh of the training was.
    """
    config.mesh.update({"data": -1, "fsdp": 1, "tensor": 1})
    experiment = Experiment(config, backbone, properties=properties)
    memory = memory_of(experiment.mesh.local_devices[0])
    held = experiment.bytes_per_device(training=False)
    if memory is None or held <= _WEIGHTS_SHARE * memory or experiment.mesh.devices.size == 1:
        return experiment
    config.mesh.update({"data": 1, "fsdp": -1, "tensor": 1})
    return Experiment(config, backbone, properties=properties)


def load_run(
    workdir: str | Path,
    *,
    base: str | None = None,
    microbatch_size: int | None = None,
) -> Run:
    """Loads the best checkpoint of a workdir onto this machine's devices.

    Args:
      workdir: a run that has been evaluated at least once; also ``gs://BUCKET/PATH``.
      base: where the frozen weights are now, if not where the run found them.
      microbatch_size: sequences per device and forward pass; None: as in training.

    Raises:
      InputError: no run, no evaluated checkpoint, or a base that is gone or has changed.
    """
    workdir = local_run(workdir)
    config = read_config(workdir)
    config.train.microbatch_size = microbatch_size or config.train.microbatch_size
    architecture, origin, content = read_model(workdir)
    if base is not None:
        if origin.get("kind") != "pretrained":
            raise InputError(
                "--base",
                "the run did not start from pretrained weights",
                "leave it out",
            )
        origin = {**origin, "source": base}
    experiment = make_scoring_experiment(
        config,
        Backbone(architecture, workdir / _TOKENIZER_FOLDER, origin),
        properties=_read_properties(workdir, content),
    )
    checkpoints = Checkpoints(workdir / "checkpoints", keep=1, read_only=True)
    step = checkpoints.best_step()
    if hosts.count() > 1:
        hosts.agree(
            str(workdir),
            {"best checkpoint": step, "its content": run_digest(workdir)},
            "let all hosts see the same run, or wait until their copies are complete",
        )
    if step is None:
        raise InputError(
            str(workdir),
            "it has no evaluated checkpoint yet",
            "train it to its first evaluation: launch/train.py with the same --config",
        )
    trainable, _ = experiment.split(experiment.abstract_params)
    kept = judged_name(config)
    with shortage_explained(experiment, "predict"):
        state, _ = checkpoints.restore(step, {kept: trainable})
        params = _flatten(state[kept]) | _flatten(load_frozen(experiment))
    return Run(
        workdir=workdir,
        experiment=experiment,
        step=step,
        params=traverse_util.unflatten_dict(params, sep="/"),
        temperature=_read_temperature(workdir),
    )


def judged_name(config: ConfigDict) -> str:
    """Which part of a checkpoint the results belong to: `TrainState.judged`."""
    return "average" if config.train.ema else "params"


def load_frozen(experiment: Experiment) -> Any:
    """The parameters that a run did not train, from its base; nothing is read if there are none.

    Raises:
      InputError: the base is gone, or has changed since.
    """
    if not experiment.split(experiment.abstract_params)[1]:
        return {}
    base = experiment.backbone.base
    if base["kind"] == "pretrained":
        from pref_jax.weights.files import weights_digest
        from pref_jax.weights.sources import resolve_source

        try:
            found = weights_digest(resolve_source(base["source"]))
        except InputError as error:
            raise InputError(
                base["source"],
                f"the base of this run is not there any more ({error.what})",
                "bring it back, or name its new place: --base=FOLDER to predict, evaluate and "
                "export, --config.model.pretrained=FOLDER to train on",
            ) from error
    elif base["kind"] == "run":
        found = run_digest(local_run(base["source"]))
    else:
        found = base.get("digest", "")
    if found != base.get("digest", ""):
        raise InputError(
            base["source"],
            f"its weights have the hash {found[:12]}, the run was trained on {base['digest'][:12]}",
            "bring back the weights that the run was started from",
        )
    return experiment.split(experiment.initial_params())[1]


_HOTTEST = 1e6  # far above what is fitted


def _read_temperature(workdir: Path) -> float:
    path = workdir / "calibration.json"
    if not path.exists():
        return 1.0
    remedy = "train the run again"
    temperature = read_json(path, remedy).get("temperature")
    if not isinstance(temperature, int | float) or not 0 < temperature < _HOTTEST:
        raise InputError(str(path), f"its temperature is {temperature!r}", remedy)
    return float(temperature)


def log_parts(experiment: Experiment) -> None:
    """Says once what was chosen."""
    counts = experiment.count_parameters()
    device = experiment.mesh.devices.flat[0]
    logger.info(
        "%d %s device(s), mesh %s, %s, attention %s, %.1f M parameters (%.1f M trainable)",
        experiment.mesh.devices.size,
        device.device_kind,
        "x".join(str(size) for size in experiment.mesh.shape.values()),
        experiment.precision.compute,
        experiment.attention,
        counts["total"] / 1e6,
        counts["trainable"] / 1e6,
    )
    mixture = describe_mixture(
        list(experiment.mesh.devices.flat), str(experiment.precision.compute)
    )
    if mixture is not None:
        logger.warning("%s", mixture)
