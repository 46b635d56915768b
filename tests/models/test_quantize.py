"""Quantised weights equal an independent reading of the definitions bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pref_jax.models.quantize import (
    NF4,
    dequantize,
    matmul,
    quantize,
    quantize_int8,
    quantize_nf4,
    quantize_scales,
)


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * np.float32(0.02)


def test_the_code_book_is_that_of_normal_quantiles() -> None:
    """QLoRA, appendix E: even quantiles on either side of an exact zero, scaled to [-1, 1]."""
    from scipy.stats import norm

    offset = 0.9677083
    positive = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    negative = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    codes = np.sort(np.concatenate([positive, [0.0], negative])) / positive.max()
    np.testing.assert_allclose(NF4, codes, atol=1e-6)


def test_nf4_takes_the_nearest_code() -> None:
    weights = draw(128, 48)
    weights[:64, 0] = 0.0  # a block of nothing
    ours = np.asarray(dequantize(quantize_nf4(jnp.asarray(weights))))
    expected = np.zeros_like(weights)
    for column in range(48):
        for start in (0, 64):
            block = weights[start : start + 64, column]
            scale = np.abs(block).max()
            unit = block / scale if scale else block
            nearest = np.abs(unit[:, None].astype(np.float64) - NF4.astype(np.float64)).argmin(1)
            expected[start : start + 64, column] = NF4[nearest] * scale
    np.testing.assert_array_equal(ours, expected)


def test_int8_is_symmetric_per_channel() -> None:
    weights = draw(96, 40)
    weights[:, 3] = 0.0
    kernel = quantize_int8(jnp.asarray(weights))
    scales = np.abs(weights).max(axis=0) / np.float32(127)
    scales[scales == 0] = 1
    values = np.rint(weights / scales).astype(np.int8)
    np.testing.assert_array_equal(kernel["values"], values)
    # XLA's division by 127 on a CPU may be off by one in the last bit; all else is exact.
    np.testing.assert_allclose(kernel["scales"], scales, rtol=1.2e-7)
    exact = values.astype("f4") * np.asarray(kernel["scales"])
    np.testing.assert_array_equal(np.asarray(dequantize(kernel)), exact)


def test_double_quantisation_costs_little() -> None:
    weights = jnp.asarray(draw(256, 128))
    single = quantize_nf4(weights)
    double = quantize_scales(single)
    scales = single["scales"]
    error = np.abs(np.asarray(dequantize(double)) - np.asarray(dequantize(single))).max()
    step = float(jnp.abs(scales - scales.mean()).max()) / 127
    assert 0 < error <= 0.51 * step
    bits = 8 * sum(leaf.nbytes for leaf in double.values()) / weights.size
    assert bits < 4.14


@pytest.mark.parametrize("method", ["int8", "nf4"])
def test_a_stack_is_its_layers(method: str) -> None:
    weights = jnp.asarray(draw(3, 128, 64))
    stacked = quantize(weights, method)
    for layer in range(3):
        alone = quantize(weights[layer], method)
        for name, leaf in alone.items():
            np.testing.assert_array_equal(stacked[name][layer], leaf, err_msg=name)


@pytest.mark.parametrize("method", ["int8", "nf4"])
def test_products_and_gradients_are_those_of_the_values(method: str) -> None:
    kernel = quantize(jnp.asarray(draw(128, 64)), method)
    x, weights = jnp.asarray(draw(5, 128, seed=1)), dequantize(kernel)
    y = matmul(x, kernel, jnp.float32)
    np.testing.assert_allclose(y, x @ weights, rtol=1e-5, atol=1e-6)
    gradient = jax.grad(lambda x: (matmul(x, kernel, jnp.float32) ** 2).sum())(x)
    wanted = jax.grad(lambda x: ((x @ weights) ** 2).sum())(x)
    np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-6)


def test_no_float_copy_waits_for_the_backward_pass() -> None:
    kernel = quantize(jnp.asarray(draw(128, 64)), "nf4")
    x = jnp.asarray(draw(5, 128, seed=1))
    _, backward = jax.vjp(lambda x: matmul(x, kernel, jnp.float32), x)
    assert all(leaf.size < 128 * 64 for leaf in jax.tree.leaves(backward))
