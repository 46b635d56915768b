"""Rates and decay per update and per group, against torch and transformers."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from pref_jax.training.optimizer import is_decayed, make_optimizer, make_schedule
from pref_jax.training.state import split_parameters, trainable_above


@pytest.mark.parametrize(("warmup", "total"), [(0, 6), (3, 10), (500, 20)])
def test_linear_schedule_equals_transformers(warmup: int, total: int) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    reference = transformers.get_linear_schedule_with_warmup(optimizer, warmup, total)
    ours = make_schedule("linear", 0.5, warmup, total)
    for step in range(total):
        assert abs(float(ours(jnp.int32(step))) - reference.get_last_lr()[0]) < 1e-6
        optimizer.step()
        reference.step()


@pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
def test_the_last_update_still_moves(name: str) -> None:
    schedule = make_schedule(name, 1.0, 2, 10)
    rates = [float(schedule(jnp.int32(step))) for step in range(10)]
    assert rates[:3] == [0.0, 0.5, 1.0]
    assert rates[-1] > 0
    assert all(a >= b for a, b in itertools.pairwise(rates[2:]))


def _params() -> dict:
    one = jnp.ones((2,))
    return {
        "encoder": {
            "embeddings": {"word": {"embedding": one}, "norm": {"scale": one, "bias": one}},
            "layer_0": {"output": {"kernel": one, "bias": one}},
            "layer_1": {"output": {"kernel": one, "bias": one}},
        },
        "head": {"kernel": one, "bias": one},
    }


def test_decay_touches_matrices_and_tables_alone() -> None:
    decayed = is_decayed(_params())
    assert decayed["encoder"]["embeddings"]["word"]["embedding"]
    assert decayed["head"]["kernel"]
    assert not decayed["encoder"]["embeddings"]["norm"]["scale"]
    assert not decayed["encoder"]["layer_0"]["output"]["bias"]


def test_rates_per_group() -> None:
    optimizer = make_optimizer(
        make_schedule("constant", 0.1, 0, 10),
        weight_decay=0.0,
        head_ratio=3.0,
        layer_decay=0.5,
        num_layers=2,
    )
    params = _params()
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    # The first Adam step has size 1 whatever the gradient.
    sizes = {
        "head": updates["head"]["kernel"],
        "layer_1": updates["encoder"]["layer_1"]["output"]["kernel"],
        "layer_0": updates["encoder"]["layer_0"]["output"]["kernel"],
        "embeddings": updates["encoder"]["embeddings"]["word"]["embedding"],
    }
    expected = {"head": 0.3, "layer_1": 0.1, "layer_0": 0.05, "embeddings": 0.025}
    for name, update in sizes.items():
        np.testing.assert_allclose(update, -expected[name], rtol=1e-5)


def test_frozen_layers_leave_the_tree_and_embeddings_stay() -> None:
    trainable, frozen = split_parameters(_params(), trainable_above(1))
    assert set(trainable["encoder"]) == {"embeddings", "layer_1"}
    assert set(frozen["encoder"]) == {"layer_0"}
