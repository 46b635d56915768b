"""Compiles the real training step for a TPU that is not there, and says what it would take."""

import importlib.util
import math
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from pref_jax import mesh as meshes
from pref_jax.data.batches import update_shapes
from pref_jax.errors import RunError
from pref_jax.experiment import (
    Backbone,
    Experiment,
    find_architecture,
    random_architecture,
)
from pref_jax.files import write_durably
from pref_jax.hardware import Chip, Topology, find_chip
from pref_jax.models.bert import EncoderConfig
from pref_jax.models.llama import LlamaConfig
from pref_jax.quiet import native_libraries_silenced
from pref_jax.training.run import CompiledStep

# libtpu looks for the machine it would run on; there is none, and it need not ask for it.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # compiling holds no device
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}
# Where a config leaves the vocabulary to a tokenizer that is not there.
_BERT_VOCABULARY, _BYTES = 30_522, 512
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Work(NamedTuple):
    """What one update takes over all devices, by formula; see `estimate`.

    Attributes:
      flops: floating-point operations.
      memory_bytes: between the devices and their memories.
      interconnect_bytes: between devices.
    """

    flops: float
    memory_bytes: float
    interconnect_bytes: float

    def seconds(self, chip: Chip, devices: int) -> float:
        """Time if the slowest of the three were never kept waiting."""
        times = [self.flops / chip.peak_flops, self.memory_bytes / chip.bandwidth]
        if chip.interconnect:
            times.append(self.interconnect_bytes / chip.interconnect)
        return max(times) / devices


def check(config: ConfigDict, topology: Topology, *, hlo: str | None = None) -> dict[str, Any]:
    """Compiles the training step of ``config`` for a slice; nothing is loaded or run.

    Where `model.pretrained` is not on this machine the numbers of `model.config` stand for it.

    Args:
      config: of the run.
      topology: the slice.
      hlo: file for the text of the compiled program, which XLA calls HLO; not written where the
        program does not fit.

    Returns:
      The fields of ``launch/compile_check.py``'s JSON.

    Raises:
      InputError: the config does not fit the slice's number of devices.
      RunError: libtpu is missing or refuses the program for another reason than memory.
    """
    devices = topology_devices(topology)
    experiment = Experiment(config, _abstract_backbone(config), devices=devices)
    chip = find_chip(devices[0].device_kind)
    assert chip is not None
    compiled = CompiledStep(experiment, total_steps=1000)
    fits, sizes = _compile(compiled)
    if hlo is not None and fits:
        write_durably(Path(hlo), compiled.executable.as_text().encode())
    work = estimate(experiment)
    return {
        "topology": topology.name,
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "mesh": dict(experiment.mesh.shape),
        "attention": experiment.attention,
        "batch_size": config.train.batch_size,
        "microbatch_size": experiment.microbatch_size,
        "max_length": config.input.max_length,
        "fits": fits,
        "bytes_per_chip": sizes,
        "checkpoint_bytes": _whole_bytes(compiled.abstract),
        "hbm_bytes": chip.memory,
        "flops_per_step": work.flops,
        "bytes_per_step": work.memory_bytes,
        "interconnect_bytes_per_step": work.interconnect_bytes,
        "roofline_seconds": work.seconds(chip, len(devices)),
        "compilations": compiled.compilations,
        "compile_seconds": compiled.compile_seconds,
    }


def topology_devices(topology: Topology) -> list[jax.Device]:
    """Devices of a slice that is not there.

    Raises:
      RunError: libtpu is not installed.
    """
    from jax.experimental import topologies

    if importlib.util.find_spec("libtpu") is None:
        raise RunError(
            "libtpu", "it is not installed", "install it with: pip install -e '.[compile-check]'"
        )
    os.environ.update(_ENVIRONMENT)
    jax.config.update("jax_platforms", "cpu")  # no device is opened
    host = (*topology.host, 1, 1)[:3]  # libtpu wants three dimensions
    try:
        with native_libraries_silenced():
            description = topologies.get_topology_desc(
                topology.name, platform="tpu", chips_per_host_bounds=host
            )
    except Exception as error:
        raise RunError(
            "libtpu", str(error).splitlines()[0], "install the version that belongs to this JAX"
        ) from error
    return list(description.devices)


def _abstract_backbone(config: ConfigDict) -> Backbone:
    """The architecture without tokenizer and weights."""
    section, nowhere = config.model, Path(os.devnull)
    if section.init_from is not None or _is_here(section.pretrained):
        return Backbone(find_architecture(config), nowhere, {"kind": "abstract", "source": ""})
    vocabulary = _BYTES if section.family == "llama" else _BERT_VOCABULARY
    architecture = random_architecture(config, section.config.vocab_size or vocabulary)
    return Backbone(architecture, nowhere, {"kind": "abstract", "source": ""})


def _is_here(pretrained: str | None) -> bool:
    if pretrained is None:
        return False
    return pretrained.startswith("package:") or os.path.exists(os.path.expanduser(pretrained))


def _compile(compiled: CompiledStep) -> tuple[bool, dict[str, int]]:
    """Whether the program fits, and bytes per device by kind.

    ``temporaries`` are what the peak holds beside arguments and output. XLA's own
    ``temp_size_in_bytes`` also counts on-chip memory and buffers that take turns: programs compile
    and fit for which it is more than the memory there is.
    """
    try:
        with native_libraries_silenced():
            analysis = compiled.executable.memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        arguments = sum(map(_bytes_per_device, jax.tree.leaves(compiled.abstract_arguments)))
        return False, _sum(arguments, _read_shortage(str(error), arguments), 0, 0)
    output = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    arguments = analysis.argument_size_in_bytes
    temporaries = analysis.peak_memory_in_bytes - arguments - output
    return True, _sum(arguments, temporaries, output, analysis.generated_code_size_in_bytes)


def _sum(arguments: int, temporaries: int, output: int, program: int) -> dict[str, int]:
    return {
        "arguments": arguments,
        "temporaries": temporaries,
        "output": output,
        "program": program,
        "total": arguments + temporaries + output + program,
    }


def _bytes_per_device(leaf: jax.ShapeDtypeStruct) -> int:
    assert leaf.sharding is not None
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _whole_bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _read_shortage(text: str, arguments: int) -> int:
    """Bytes of temporaries from the compiler's message about a program that does not fit.

    Raises:
      RunError: it says something else.
    """
    for pattern, others in (
        (r"required for HLO temporaries \(([\d.]+)([KMGT]?)\)", 0),
        (r"[Uu]sed ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", arguments),
    ):
        if found := re.search(pattern, text):
            return round(float(found[1]) * _UNITS[found[2]]) - others
    raise RunError("the TPU compiler", text.splitlines()[0], "use --debug to see all that it says")


def estimate(experiment: Experiment) -> Work:
    """What an update takes in which every row is as long as `input.max_length` allows.

    FLOPs, with P parameters in matrices and T tokens: 2 P T forward, 2 P T for the gradients of
    inputs, 2 P T for those of trained weights, 2 P T more where `train.remat` computes the forward
    pass again. Attention: 4 n^2 x width per layer and sequence of n tokens forward, half of it
    where a kernel skips what a causal mask hides, twice that backward.

    Bytes to and from memory: the weights once in each of these passes and microbatches, twice more
    where they are first gathered from other devices (written, then read); and per token and layer
    the activations that cannot stay on the chip between two matrix products, written and read once
    each pass (backward counts twice).

    Bytes between devices: gathering weights that `mesh.fsdp` cuts, in each pass; reducing the
    gradients of trained weights over the batch axes, float32, once an update; reducing activations
    over `mesh.tensor` twice a layer and pass.

    Norms, the head, embeddings and adapters (under 1 %) are left out. XLA's own analysis is of no
    use here: it counts the body of a loop once, whatever its trips.
    """
    config, mesh = experiment.config, experiment.mesh
    architecture = experiment.backbone.architecture
    sides, length = experiment.layout.sides, experiment.layout.max_length
    rows = config.train.batch_size * (2 if config.data.swap == "both" else 1)
    tokens = float(rows * sides * length)
    shapes = update_shapes(
        experiment.geometry, rows, meshes.batch_shards(mesh), experiment.microbatch_size
    )
    units, length_of_unit = shapes[-1][1], experiment.geometry.unit_lengths[-1]
    microbatches = math.ceil(tokens / (units * length_of_unit))
    adapters = bool(config.model.lora.rank)
    trained = experiment.trained_share
    again = 1.0 if config.train.remat == "full" else 0.0
    shape = _describe(architecture)

    products = 2.0 * shape.parameters * tokens
    causal = experiment.is_decoder and experiment.attention in ("splash", "cudnn")
    attention = 4.0 * shape.layers * shape.query_width * length * tokens * (0.5 if causal else 1.0)
    flops = products * (2.0 + again + trained) + attention * (3.0 + again)

    passes = 2.0 + again
    item = experiment.precision.compute.itemsize
    weights = _weight_bytes(experiment.abstract_params)
    devices, cut = mesh.devices.size, mesh.shape["fsdp"]
    copies = devices / mesh.shape["tensor"]  # every batch shard reads all of the weights
    read = weights * copies * microbatches * passes * (3.0 if cut > 1 else 1.0)
    moved = tokens * shape.layers * shape.activations * item * 2.0 * (3.0 + again)
    gathered = weights * copies * microbatches * passes * (cut - 1) / cut
    shards = meshes.batch_shards(mesh)
    gradients = 0.0 if adapters else 4.0 * shape.parameters * trained
    reduced = 2.0 * gradients * (shards - 1) / shards * copies
    tensor = mesh.shape["tensor"]
    crossed = 4.0 * shape.layers * tokens * shape.width * item * passes * (tensor - 1)
    return Work(flops, read + moved, gathered + reduced + crossed)


class _Shape(NamedTuple):
    """Sizes that the formulas need; ``activations`` in numbers per token and layer."""

    layers: int
    width: int
    query_width: int
    parameters: float
    activations: float


def _describe(architecture: EncoderConfig | LlamaConfig) -> _Shape:
    width, inner, layers = (
        architecture.hidden_size,
        architecture.intermediate_size,
        architecture.num_layers,
    )
    if isinstance(architecture, LlamaConfig):
        query = architecture.num_heads * architecture.head_dim
        key = architecture.num_kv_heads * architecture.head_dim
        # Residual, norm and projection outputs; queries, keys and values before and behind their
        # rotation; gate, up and their product.
        activations = 6 * width + 3 * query + 4 * key + 3 * inner
    else:
        query = width
        activations = 10 * width + 2 * inner
    parameters = float(layers * architecture.layer_parameters)
    return _Shape(layers, width, query, parameters, float(activations))


def _weight_bytes(params: Any) -> float:
    """Bytes of all layers' weights, as they are stored."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return float(
        sum(
            math.prod(leaf.shape) * leaf.dtype.itemsize
            for path, leaf in leaves
            if any("layer" in str(getattr(key, "key", "")) for key in path)
        )
    )
