"""The training step compiled for a TPU slice: kernels, bytes and loops are those intended."""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rig import REPOSITORY, call

from pref_jax.compile_check import _read_shortage, check, estimate, topology_devices
from pref_jax.config_file import load
from pref_jax.errors import InputError, RunError
from pref_jax.experiment import Backbone, Experiment, one_tree, random_architecture
from pref_jax.hardware import parse_topology
from pref_jax.training.run import CompiledStep

LLAMA = str(REPOSITORY / "configs/llama_lora.py:tiny")
# Heads and length that the TPU kernel takes, and weights that eight devices can share.
SIZES = {
    "model.config.num_layers": 3,
    "model.config.hidden_size": 1024,
    "model.config.intermediate_size": 2048,
    "model.config.num_heads": 8,
    "model.config.num_kv_heads": 2,
    "model.config.vocab_size": 512,
    "input.max_length": 128,
    "train.batch_size": 32,
    "train.microbatch_size": 2,
    "train.remat": "full",
    "mesh.data": 1,
    "mesh.fsdp": -1,
}
ONE_LAYER = 1024 * 2048  # weights in the largest matrix
ITEMS = {"bf16": 2, "f32": 4, "s32": 4, "u32": 4, "f16": 2, "s8": 1, "u8": 1, "pred": 1}

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs libtpu: pip install -e '.[compile-check]'",
)


def make(devices: list[jax.Device] | None = None, **changes: object) -> Experiment:
    fields = SIZES | {name.replace("__", "."): value for name, value in changes.items()}
    config = load(LLAMA, [(name, str(value)) for name, value in fields.items()])
    backbone = Backbone(random_architecture(config, 512), Path(), {"kind": "abstract"})
    return Experiment(config, backbone, devices=devices)


@pytest.fixture(scope="module")
def compiled() -> CompiledStep:
    devices = topology_devices(parse_topology("v5e-8"))
    assert len(devices) == 8 and len({device.process_index for device in devices}) == 1
    experiment = make(devices)
    assert experiment.attention == "splash"
    return CompiledStep(experiment, total_steps=10)


def arrays(text: str, operation: str = r"[\w\-]+") -> Iterator[tuple[str, tuple[int, ...]]]:
    """(dtype, shape) of what the instructions of a program make."""
    for line in text.splitlines():
        if found := re.match(rf"\s*(?:ROOT )?%\S+ = (.*?) {operation}\(", line):
            for dtype, shape in re.findall(r"(\w+)\[([\d,]+)\]", found[1]):
                yield dtype, tuple(map(int, shape.split(",")))


@needs_libtpu
def test_no_layer_is_gathered_with_another(compiled: CompiledStep) -> None:
    text = compiled.executable.as_text()
    assert compiled.compilations == 1
    assert "tpu_custom_call" in text  # the attention kernel
    gathered = [shape for _, shape in arrays(text, r"all-gather(?:-start)?")]
    assert gathered and max(map(math.prod, gathered)) <= ONE_LAYER
    whole = {(3, 1024, 2048), (3, 2048, 1024), (3, 1024, 1024)}
    assert not whole & {shape for _, shape in arrays(text)}


@needs_libtpu
def test_frozen_weights_have_no_gradients(compiled: CompiledStep) -> None:
    """Nothing the size of a device's part of the stacked weights is made, in any dtype."""
    parts = {(3, 128, 2048), (3, 2048, 128), (3, 1024, 128), (3, 128, 1024), (3, 128, 256)}
    made = {
        (dtype, shape)
        for dtype, shape in arrays(compiled.executable.as_text())
        if shape in parts and dtype in ("f32", "bf16")
    }
    assert all(dtype == "bf16" for dtype, _ in made)  # the parameters as they came
    analysis = compiled.executable.memory_analysis()
    frozen = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(compiled.abstract_arguments[1])
    )
    assert analysis.output_size_in_bytes < 0.1 * frozen < analysis.argument_size_in_bytes


@needs_libtpu
def test_command_says_what_a_slice_would_take(tmp_path: Path) -> None:
    output = tmp_path / "check.json"
    outcome = call(
        "compile_check",
        f"--config={LLAMA}",
        "--config.input.max_length=128",
        "--topology=v5litepod-8",
        f"--output={output}",
        f"--hlo={tmp_path}/program.txt",
    )
    assert outcome.code == 0, outcome
    program = (tmp_path / "program.txt").read_text()
    assert program.startswith("HloModule") and "all-reduce(" in program
    result = json.loads(output.read_text())
    assert result["topology"] == "v5e:2x4" and result["fits"] is True
    assert result["hbm_bytes"] == 16 * 2**30 and result["compilations"] == 1
    sizes = result["bytes_per_chip"]
    assert sizes["total"] == sum(size for name, size in sizes.items() if name != "total")
    # Parameters and both of AdamW's moments in float32, and a few counters.
    config = load(LLAMA, [("input.max_length", "128")])
    backbone = Backbone(random_architecture(config, 512), Path(), {"kind": "abstract"})
    trained = Experiment(config, backbone).count_parameters()["trainable"]
    assert 0 < result["checkpoint_bytes"] - 12 * trained < 100
    assert 0 < sizes["temporaries"] < 2**28 and sizes["arguments"] > 2 * 64 * 128 * 3 * 2
    assert result["roofline_seconds"] > 0


@needs_libtpu
def test_wrong_slices_and_meshes_are_refused() -> None:
    for arguments, said in (
        (["--topology=v5e:3x3"], "v5e:2x4 (v5e-8)"),
        (["--topology="], "--topology"),
        (["--topology=v5e-8", "--config.mesh.fsdp=3"], "does not divide 8 devices"),
    ):
        outcome = call("compile_check", f"--config={LLAMA}", *arguments)
        assert outcome.code == 2 and said in outcome.stderr, outcome
        assert outcome.stderr.count("\n") == 1


@needs_libtpu
def test_what_does_not_fit_is_said() -> None:
    fields = {
        "train.batch_size": 4096,
        "train.microbatch_size": 4096,
        "input.max_length": 2048,
        "model.config.max_positions": 4096,
        "train.remat": "none",
    }
    config = load(LLAMA, [(name, str(value)) for name, value in fields.items()])
    result = check(config, parse_topology("v5e:1x1"))
    assert result["fits"] is False
    assert result["bytes_per_chip"]["total"] > result["hbm_bytes"]


def test_shortages_are_read_from_what_the_compiler_says() -> None:
    early = "total memory required for HLO temporaries (27.50G) exceeds available HBM (15.75G)."
    assert _read_shortage(early, 2**30) == 27.5 * 2**30
    late = "Ran out of memory in memory space hbm. Used 20.00G of 15.75G hbm. Exceeded by 4.25G."
    assert _read_shortage(late, 2**30) == 19 * 2**30
    with pytest.raises(RunError, match="something else"):
        _read_shortage("something else", 0)


def test_flops_are_those_of_the_traced_step() -> None:
    """XLA counts a loop's body once: one layer, one microbatch."""
    experiment = make(
        model__config__num_layers=1,
        train__remat="none",
        train__batch_size=8,
        train__microbatch_size=1,
        mesh__fsdp=1,
        mesh__data=-1,
    )
    architecture, model = experiment.backbone.architecture, experiment.model
    ids = jnp.zeros((8, 128), jnp.int32)
    pool = jnp.zeros((8, 1, 1), jnp.int32)
    shapes = jax.eval_shape(lambda: one_tree(model.init(jax.random.key(0), *[ids] * 4, pool)))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), shapes)

    def loss(words: jax.Array, params: dict) -> jax.Array:
        lora = params.pop("lora")
        params["decoder"]["embed_tokens"]["embedding"] = words
        variables = {"params": params, "lora": lora}
        return model.apply(variables, *[ids] * 4, pool).sum()

    words = jax.ShapeDtypeStruct((512, architecture.hidden_size), jnp.float32)
    forward = jax.jit(loss).lower(words, shapes).cost_analysis()["flops"]
    both = jax.jit(jax.value_and_grad(loss)).lower(words, shapes).cost_analysis()["flops"]
    ours = estimate(experiment).flops
    assert abs(ours / both - 1) < 0.1, (ours, both)
    assert 1.8 < both / forward < 2.3  # frozen weights: the backward pass costs one more


def test_estimates_grow_as_they_must() -> None:
    base = estimate(make())
    longer = estimate(make(input__max_length=256))
    assert longer.flops > 2 * base.flops  # attention grows with the square
    kept = estimate(make(train__remat="none"))
    assert kept.flops < base.flops and kept.memory_bytes < base.memory_bytes
    whole = estimate(make(mesh__fsdp=1, mesh__data=-1))
    assert whole.interconnect_bytes == 0 < base.interconnect_bytes
    np.testing.assert_allclose(whole.flops, base.flops)


_LONG_UNITS = """
import jax, jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from pref_jax.compile_check import topology_devices
from pref_jax.hardware import parse_topology
from pref_jax.models.attention import attend

place = SingleDeviceSharding(topology_devices(parse_topology("v5e-8"))[0])
shapes = [((2, 1024, 12, 64), "bfloat16")] * 3 + [((2, 1024), "int32"), ((2, 2), "uint32")]

def run(query, key, value, segments, seeds):
    return attend(query, key, value, segments, segments, dropout_rate=0.1, seeds=seeds, site=3)

arguments = [jax.ShapeDtypeStruct(*shape, sharding=place) for shape in shapes]
jax.jit(run).lower(*arguments).compile()
"""


@needs_libtpu
def test_dropout_over_several_long_units_compiles() -> None:
    """A part of `parallel_bert` that once crashed the compiler, hence a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", _LONG_UNITS],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@needs_libtpu
def test_a_mesh_that_the_links_of_a_slice_do_not_allow_is_refused() -> None:
    devices = topology_devices(parse_topology("v6e-256"))
    with pytest.raises(InputError, match=r"--config\.mesh: data=4 x fsdp=64 x tensor=1"):
        make(devices, mesh__data=4, mesh__fsdp=64)
    assert make(devices, mesh__data=16, mesh__fsdp=16).mesh.devices.size == 256
