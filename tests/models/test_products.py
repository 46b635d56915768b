"""Gradients of matrix products: as exact as their operands allow, and as fast."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from pref_jax.models.bert import REMAT_POLICIES
from pref_jax.models.layers import Dense
from pref_jax.models.lora import Projection
from pref_jax.models.products import matmul

BFLOAT16 = jnp.dtype("bfloat16")
LAYER = Dense(8, ("embed", "mlp"), BFLOAT16)
INT8 = Projection(8, ("embed", "mlp"), dtype=BFLOAT16, quantization="int8")
FROZEN = Projection(8, ("embed", "mlp"), dtype=BFLOAT16, kernel_dtype=BFLOAT16)


def draw(*shape: int, seed: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape).astype(BFLOAT16)


@pytest.mark.parametrize("out", ["bfloat16", "float32"])
def test_gradients_are_sums_in_float32_of_rounded_operands(out: str) -> None:
    x, kernel, d_out = draw(4, 100, 32, seed=0), draw(32, 8, seed=1), draw(4, 100, 8, seed=2)
    weights = kernel.astype(jnp.float32)  # as trained weights are
    y, backward = jax.vjp(lambda x, w: matmul(x, w, BFLOAT16, jnp.dtype(out)), x, weights)
    d_x, d_weights = backward(d_out.astype(out))
    assert (y.dtype, d_x.dtype, d_weights.dtype) == (jnp.dtype(out), BFLOAT16, jnp.float32)
    exact = [np.asarray(array, np.float64) for array in (x, kernel, d_out)]
    wanted = np.einsum("bti,bto->io", exact[0], exact[2])
    np.testing.assert_allclose(d_weights, wanted, rtol=1e-5, atol=1e-5)
    rounded = np.asarray(jnp.asarray(exact[2] @ exact[1].T).astype(BFLOAT16), np.float64)
    np.testing.assert_allclose(np.asarray(d_x, np.float64), rounded, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("module", [LAYER, FROZEN], ids=["layer", "frozen"])
def test_a_layer_in_bfloat16_multiplies_16_bit_operands_into_32_bits(module: nn.Module) -> None:
    """Forward and backward; XLA on a CPU would multiply anything else as float32."""
    x = draw(4, 32, seed=0)
    variables = module.init(jax.random.key(1), x)

    def loss(x: jax.Array, variables: dict) -> jax.Array:
        return (module.apply(variables, x).astype(jnp.float32) ** 2).sum()

    trained = (0,) if module is FROZEN else (0, 1)
    text = jax.jit(jax.grad(loss, argnums=trained)).lower(x, variables).as_text()
    products = re.findall(r"dot_general.*: \((.*)\) -> (.*)", text)
    assert len(products) == 1 + len(trained), text
    assert not [operands for operands, _ in products if "f32" in operands]
    assert not [result for _, result in products if "f32" not in result]


@pytest.mark.parametrize("module", [LAYER, FROZEN, INT8], ids=["layer", "frozen", "int8"])
@pytest.mark.parametrize(("remat", "products"), [("dots", 2), ("full", 3)])
def test_what_is_kept_of_products_is_not_computed_again(
    module: nn.Module, remat: str, products: int
) -> None:
    """The product, that of its gradient, and under "full" the product once more."""
    x = draw(4, 32, seed=0)
    variables = module.init(jax.random.key(1), x)

    def apply(x: jax.Array) -> jax.Array:
        y = jnp.sin(module.apply(variables, x).astype(jnp.float32))
        return jnp.cos(y * y).sum()

    checkpointed = jax.checkpoint(apply, policy=REMAT_POLICIES[remat])
    text = jax.jit(jax.value_and_grad(checkpointed)).lower(x).as_text()
    assert text.count("stablehlo.dot_general") == products, text
