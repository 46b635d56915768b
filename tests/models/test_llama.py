"""LLaMA with adapters is the mathematics of transformers and PEFT."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from support import (
    VOCABULARY,
    Rows,
    Trainer,
    abstract_tree,
    make_samples,
    pack_all,
    random_rows,
)

from pref_jax import mesh as meshes
from pref_jax.config import PROJECTIONS
from pref_jax.data.batches import make_geometry
from pref_jax.models.llama import LlamaClassifier, LlamaConfig
from pref_jax.models.lora import LoRAConfig
from pref_jax.models.quantize import dequantize
from pref_jax.models.rope import RopeConfig
from pref_jax.training.state import (
    is_adapter,
    merge_parameters,
    split_parameters,
    trainable_above,
)
from pref_jax.training.step import make_gradient, make_predict_step
from pref_jax.weights.llama import key_of, load_decoder, read_llama_config

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

LONGEST = 600
LENGTHS = [[LONGEST], [1], [2], [64], [333], [LONGEST - 64 - 1], [150]]
LORA = LoRAConfig(rank=4, alpha=8.0, dropout=0.0, targets=PROJECTIONS)
# The trained context is short, so that every scaling changes what 600 tokens compute.
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 700.0},
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 160,
        "beta_fast": 16.0,
    },
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
}


def reference(rope: str = "default", **changes: Any) -> Any:
    """A random LLaMA of transformers, its weights large enough that mistakes show."""
    values = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256 if rope == "dynamic" else 640,
        "rope_parameters": dict(ROPES[rope]),
        "pad_token_id": 0,
        "initializer_range": 0.2,
        "num_labels": 3,
        "attn_implementation": "eager",
    }
    torch.manual_seed(0)
    model = transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(**values | changes)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def adapt(model: Any, lora: LoRAConfig) -> Any:
    """The same with PEFT's adapters, none of them zero."""
    config = peft.LoraConfig(
        task_type="SEQ_CLS",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        target_modules=list(lora.targets),
        use_rslora=lora.rank_stabilised,
    )
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return adapted


def convert(folder: Path, model: Any, ours: LlamaClassifier, *, adapted: bool = True) -> Any:
    """Our parameters, the base through files and the loader."""
    base = model.get_base_model() if adapted else model
    states = {
        name.replace(".base_layer", ""): value.detach().clone()
        for name, value in base.state_dict().items()
        if "lora_" not in name and "modules_to_save" not in name
    }
    states = {name.replace("original_module.", ""): value for name, value in states.items()}
    base.config.save_pretrained(folder)
    from safetensors.torch import save_file

    save_file({k: v.contiguous() for k, v in states.items()}, folder / "model.safetensors")
    mesh = meshes.make_mesh(devices=jax.devices()[:1])
    abstract = abstract_tree(ours, 1, mesh)
    tree = {
        "decoder": load_decoder(folder, abstract["decoder"], ours.quantization),
        "head": {"kernel": head_of(model).detach().numpy().T},
    }
    if ours.lora is not None:
        tree["lora"] = traverse_util.unflatten_dict(
            {
                path: np.stack([adapter_of(model, path, n).detach().numpy().T for n in range(2)])
                for path in traverse_util.flatten_dict(abstract["lora"])
            }
        )
    return jax.tree.map(np.asarray, tree)


def head_of(model: Any) -> Any:
    return (
        next(
            p for n, p in model.named_parameters() if n.endswith("default.weight") and "score" in n
        )
        if hasattr(model, "get_base_model")
        else model.score.weight
    )


def adapter_of(model: Any, path: tuple[str, ...], layer: int) -> Any:
    """PEFT's parameter for ours, such as (decoder, layers, mlp, up_proj, a)."""
    _, _, module, projection, name = path
    layers = model.get_base_model().model.layers
    adapter = getattr(getattr(layers[layer], module), projection)
    return (adapter.lora_A if name == "a" else adapter.lora_B)["default"].weight


def answer(model: Any, rows: Rows, numbers: list[int]) -> Any:
    """Logits of each row alone: no padding, and positions from 0."""
    return torch.cat(
        [model(input_ids=torch.tensor(rows.ids[n][0][None]).long()).logits for n in numbers]
    )


def score(model: LlamaClassifier, params: Any, rows: Rows, *, packing: bool = True) -> np.ndarray:
    update = pack_all(make_samples(rows), make_geometry(LONGEST, 1, packing=packing))
    logits = np.zeros((len(rows.ids), 3))
    outputs = jax.jit(make_predict_step(model))(params, update)
    for packed, part in zip(update.buckets, outputs, strict=True):
        filled = packed.samples >= 0
        logits[packed.samples[filled]] = np.asarray(part)[filled]
    return logits


def relative(ours: Any, theirs: Any) -> float:
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    return float(np.linalg.norm(ours - theirs) / max(np.linalg.norm(theirs), 1e-12))


@pytest.mark.parametrize(
    ("rope", "attention"), [*((rope, "xla") for rope in ROPES), ("llama3", "segments")]
)
def test_logits_and_gradients_equal_peft(rope: str, attention: str, tmp_path: Path) -> None:
    tied = rope == "linear"
    base = reference(rope, tie_word_embeddings=tied)
    theirs = adapt(base, LORA)
    config = read_llama_config_of(base, tmp_path)
    ours = LlamaClassifier(config, lora=LORA, attention=attention)
    params = convert(tmp_path, theirs, ours)
    rows = Rows(LENGTHS, pools_last=True)
    expected = answer(theirs, rows, list(range(len(LENGTHS))))
    for packing in (True, False):
        logits = score(ours, params, rows, packing=packing)
        np.testing.assert_allclose(logits, expected.detach().numpy(), atol=1e-4)
    if rope != "default":
        plain = LlamaClassifier(
            LlamaConfig(**vars(config) | {"rope": RopeConfig(config.rope.theta)}), lora=LORA
        )
        assert np.abs(score(plain, params, rows) - expected.detach().numpy()).max() > 1e-3

    samples = make_samples(rows)
    loss = torch.nn.functional.cross_entropy(expected, torch.tensor(samples.labels))
    loss.backward()
    trainable, frozen = split_parameters(params, is_adapter)
    update = pack_all(samples, make_geometry(LONGEST, 1, packing=True))
    gradients, sums = jax.jit(make_gradient(ours))(
        trainable, frozen, update, jnp.int32(0), jnp.float32(1.0)
    )
    assert abs(float(sums["loss"]) - float(loss)) < 1e-5
    assert set(gradients) == {"lora", "head"}
    assert relative(gradients["head"]["kernel"], head_of(theirs).grad.numpy().T) < 1e-3
    for path, gradient in traverse_util.flatten_dict(gradients["lora"]).items():
        for layer in range(2):
            wanted = adapter_of(theirs, path, layer).grad.numpy().T
            assert relative(gradient[layer], wanted) < 1e-3, (path, layer)


def test_gradients_stop_at_frozen_layers(tmp_path: Path) -> None:
    theirs = reference("llama3", num_hidden_layers=3)
    config = read_llama_config_of(theirs, tmp_path)
    rows = Rows([[40], [9], [64]], pools_last=True)
    samples = make_samples(rows)
    expected = answer(theirs, rows, [0, 1, 2])
    torch.nn.functional.cross_entropy(expected, torch.tensor(samples.labels)).backward()
    wanted = {n: p.grad.numpy() for n, p in theirs.named_parameters() if p.grad is not None}
    update = pack_all(samples, make_geometry(64, 1, packing=True))
    for frozen_layers in (0, 2, 3):
        ours = LlamaClassifier(config, frozen_layers=frozen_layers)
        params = convert(tmp_path, theirs, ours, adapted=False)
        logits = score(ours, params, rows)
        np.testing.assert_allclose(logits, expected.detach().numpy(), atol=1e-4)
        trainable, frozen = split_parameters(params, trainable_above(frozen_layers))
        gradients, _ = jax.jit(make_gradient(ours))(
            trainable, frozen, update, jnp.int32(0), jnp.float32(1.0)
        )
        found = traverse_util.flatten_dict(gradients["decoder"])
        keys = {}
        for path, leaf in found.items():
            if path[0] == "layers":
                keys |= {
                    key_of(path, frozen_layers + layer): leaf[layer] for layer in range(len(leaf))
                }
            else:
                keys[key_of(path)] = leaf
        trained = {f".{layer}." for layer in range(frozen_layers, 3)}
        assert set(keys) == {
            name
            for name in wanted
            if name != "score.weight"
            and (".layers." not in name or any(part in name for part in trained))
        }
        for name, leaf in keys.items():
            is_kernel = leaf.ndim == 2 and "embed" not in name
            assert relative(leaf.T if is_kernel else leaf, wanted[name]) < 1e-3, name
        assert relative(gradients["head"]["kernel"].T, wanted["score.weight"]) < 1e-3


def read_llama_config_of(base: Any, folder: Path) -> LlamaConfig:
    base.config.save_pretrained(folder)
    return read_llama_config(folder)


@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_five_optimizer_steps_equal_peft(tmp_path: Path, rank_stabilised: bool) -> None:
    lora = LoRAConfig(4, 8.0, 0.0, ("q_proj", "v_proj"), rank_stabilised)
    theirs = adapt(reference("llama3"), lora)
    config = read_llama_config_of(theirs.get_base_model(), tmp_path)
    ours = LlamaClassifier(config, lora=lora)
    params = convert(tmp_path, theirs, ours)
    rows = random_rows(40, 1, 48, pools_last=True)
    samples = make_samples(rows)
    trainer = Trainer(ours, samples, longest=48, total_steps=100, is_trainable=is_adapter)
    losses, state = trainer.losses(params, 5)
    named = [p for p in theirs.parameters() if p.requires_grad]
    assert len(named) == 2 * 2 * 2 + 1  # nothing of the base
    optimizer = torch.optim.AdamW(named, lr=1e-3, weight_decay=0.01)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 0, 100)
    for number in range(5):
        numbers = list(trainer.plan.sample_numbers(number))
        logits = answer(theirs, rows, numbers)
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(samples.labels[numbers]))
        assert abs(float(loss) - losses[number]) < 1e-4
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(named, 1.0)
        optimizer.step()
        schedule.step()
    assert relative(state.params["head"]["kernel"], head_of(theirs).detach().numpy().T) < 1e-3
    for path, leaf in traverse_util.flatten_dict(state.params["lora"]).items():
        for layer in range(2):
            wanted = adapter_of(theirs, path, layer).detach().numpy().T
            assert relative(leaf[layer], wanted) < 1e-3, (path, layer)


def test_the_first_step_equals_the_base(tmp_path: Path) -> None:
    theirs = reference()
    config = read_llama_config_of(theirs, tmp_path)
    with_adapters = LlamaClassifier(config, lora=LORA)
    base = LlamaClassifier(config)
    params = convert(tmp_path, theirs, base, adapted=False)
    drawn = with_adapters.init(
        jax.random.key(0), *[jnp.zeros((1, 8), jnp.int32)] * 4, jnp.zeros((1, 1, 1), jnp.int32)
    )
    from flax import linen as nn

    lora = nn.unbox(drawn)["lora"]
    rows = Rows([[9], [30]], pools_last=True)
    first = score(with_adapters, {**params, "lora": lora}, rows)
    np.testing.assert_array_equal(first, score(base, params, rows))
    flat = traverse_util.flatten_dict(lora)
    assert all(not np.asarray(leaf).any() for path, leaf in flat.items() if path[-1] == "b")
    assert all(np.asarray(leaf).any() for path, leaf in flat.items() if path[-1] == "a")


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("pad", [0, 5])
def test_any_padding_of_the_reference_gives_our_logits(
    tmp_path: Path, padding_side: str, pad: int
) -> None:
    theirs = reference(pad_token_id=pad)
    config = read_llama_config_of(theirs, tmp_path)
    ours = LlamaClassifier(config)
    params = convert(tmp_path, theirs, ours, adapted=False)
    rows = Rows([[20], [7], [13]], pools_last=True)
    for (ids,) in rows.ids:
        ids[-2] = pad  # pad == eos: it stands in the text too
        ids[-1] = 7
    longest = 20
    batch, mask = np.full((3, longest), pad), np.zeros((3, longest), int)
    for row, (ids,) in enumerate(rows.ids):
        at = slice(longest - len(ids), None) if padding_side == "left" else slice(0, len(ids))
        batch[row, at], mask[row, at] = ids, 1
    expected = theirs(
        input_ids=torch.tensor(batch).long(), attention_mask=torch.tensor(mask)
    ).logits
    np.testing.assert_allclose(score(ours, params, rows), expected.detach().numpy(), atol=1e-4)


@pytest.mark.parametrize("method", ["int8", "nf4"])
def test_gradients_over_a_quantised_base_are_those_over_its_values(
    tmp_path: Path, method: str
) -> None:
    theirs = adapt(reference("llama3", hidden_size=64, intermediate_size=128), LORA)
    config = read_llama_config_of(theirs.get_base_model(), tmp_path)
    quantised = LlamaClassifier(config, lora=LORA, quantization=method, remat="full")
    params = convert(tmp_path, theirs, quantised)
    plain = LlamaClassifier(config, lora=LORA)

    def restore(tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        if "values" in tree:
            return np.asarray(dequantize(tree))
        return {name: restore(part) for name, part in tree.items()}

    restored = restore(params)
    kernel = restored["decoder"]["layers"]["mlp"]["up_proj"]["kernel"]
    exact = theirs.get_base_model().model.layers[1].mlp.up_proj.base_layer.weight
    error = relative(kernel[1], exact.detach().numpy().T)
    assert 1e-4 < error < {"int8": 0.01, "nf4": 0.12}[method]
    update = pack_all(
        make_samples(Rows([[40], [9]], pools_last=True)), make_geometry(64, 1, packing=True)
    )
    results = []
    for model, tree in ((quantised, params), (plain, restored)):
        trainable, frozen = split_parameters(tree, is_adapter)
        results.append(
            jax.jit(make_gradient(model))(trainable, frozen, update, jnp.int32(0), jnp.float32(1.0))
        )
    (ours, sums), (wanted, wanted_sums) = results
    assert abs(float(sums["loss"]) - float(wanted_sums["loss"])) < 1e-5
    for path, leaf in traverse_util.flatten_dict(wanted, sep="/").items():
        assert relative(traverse_util.flatten_dict(ours, sep="/")[path], leaf) < 1e-4, path


@pytest.mark.parametrize(
    ("remat", "attention"), [("dots", "xla"), ("full", "xla"), ("full", "segments")]
)
def test_remat_recomputes_and_changes_nothing(remat: str, attention: str) -> None:
    config = LlamaConfig("llama", VOCABULARY, 32, 2, 4, 2, 8, 48, 512)
    models = [
        LlamaClassifier(config, lora=LORA, remat=name, attention=attention)
        for name in ("none", remat)
    ]
    samples = make_samples(Rows([[20], [9]], pools_last=True))
    update = pack_all(samples, make_geometry(32, 1, packing=True))
    from support import make_params

    trainable, frozen = split_parameters(make_params(models[0], 1), is_adapter)
    arguments = (trainable, frozen, update, np.int32(0), np.float32(1))
    results = [jax.jit(make_gradient(model))(*arguments)[0] for model in models]
    for ours, wanted in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-6)
    texts = [str(jax.make_jaxpr(make_gradient(model))(*arguments)) for model in models]
    assert texts[1].count(" exp ") > texts[0].count(" exp ")  # the softmax once more


@pytest.mark.parametrize(
    ("mesh", "order"),
    [
        ((8, 1, 1), range(8)),
        ((1, 8, 1), range(8)),
        ((1, 2, 4), range(8)),
        ((1, 4, 2), range(8)),
        ((2, 2, 2), (5, 2, 7, 0, 3, 6, 1, 4)),
    ],
)
def test_losses_do_not_depend_on_the_mesh(
    mesh: tuple[int, int, int], order: Sequence[int], tmp_path: Path
) -> None:
    config = LlamaConfig("llama", VOCABULARY, 32, 2, 8, 4, 8, 48, 512)
    lora = LoRAConfig(4, 8.0, 0.1, PROJECTIONS)
    model = LlamaClassifier(config, lora=lora, attention="segments")  # as on one CPU device
    samples = make_samples(random_rows(40, 1, 32, pools_last=True))
    from support import make_params

    params = make_params(model, 1)
    options: dict[str, Any] = {"longest": 32, "is_trainable": is_adapter, "learning_rate": 1e-3}
    one = Trainer(model, samples, **options)
    wanted, _ = one.losses(params, 20)
    devices = [jax.devices()[number] for number in order]
    many = Trainer(
        LlamaClassifier(config, lora=lora, mesh=meshes.make_mesh(*mesh, devices=devices)),
        samples,
        mesh=mesh,
        order=order,
        microbatch_size=1,
        **options,
    )
    losses, _ = many.losses(params, 20)
    np.testing.assert_allclose(losses, wanted, atol=1e-5)
    assert many.traces == 1


def test_eight_billion_parameters_fit_where_they_should() -> None:
    config = LlamaConfig(
        "llama", 128_256, 4096, 32, 32, 8, 128, 14_336, 131_072,
        rope=RopeConfig(500_000.0, "llama3", 8.0, 8192),
    )  # fmt: skip
    lora = LoRAConfig(4, 8.0, 0.05, ("q_proj", "v_proj"))
    mesh = meshes.make_mesh(devices=jax.devices()[:1])
    sizes = {}
    for method in ("none", "int8", "nf4"):
        model = LlamaClassifier(
            config, lora=lora, quantization=method, frozen_dtype=jnp.dtype("bfloat16")
        )
        trainable, frozen = split_parameters(abstract_tree(model, 1, mesh), is_adapter)
        sizes[method] = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(frozen))
        assert sum(leaf.size for leaf in jax.tree.leaves(trainable)) == 1_703_936 + 3 * 4096
    assert 15.0e9 < sizes["none"] < 15.1e9  # the language model's head is not loaded
    assert sizes["int8"] <= 8.6e9 and sizes["nf4"] <= 5.0e9


def test_merging_split_parts_gives_the_tree() -> None:
    tree = {"decoder": {"norm": {"scale": 1}}, "lora": {"a": 2}, "head": {"kernel": 3}}
    assert merge_parameters(*split_parameters(tree, is_adapter)) == tree
