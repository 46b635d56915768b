"""Frozen weights in 8 or 4 bits.

A quantised kernel is a dict of arrays in place of one array; leading axes (a stack of layers) pass
through.

"int8": ``values`` int8 ``[..., in, out]``, ``scales`` float32 ``[..., out]``: symmetric, one scale
per output channel.

"nf4" (Dettmers et al. 2023, "QLoRA", section 3): ``values`` uint8 ``[..., in / 2, out]``, two codes
a byte, and a scale per block of 64 weights along the input axis, so that cutting the input axis
over devices cuts no block. The scales are quantised themselves ("double quantisation"): ``scales``
int8 ``[..., in / 64, out]`` around their mean (``scale_means`` float32 ``[..., 1, 1]``), with one
float32 factor (``scale_scales``) per 64 of them along the output axis. QLoRA takes 8-bit floats in
blocks of 256 there; whole numbers in blocks of 64 are as small to within 0.01 bit a weight, closer
to the scale's value, and need no block across devices.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from pref_jax.models import products

METHODS = ("none", "int8", "nf4")
BLOCK = 64  # weights along the input axis that share an nf4 scale
_SCALE_BLOCK = 64  # nf4 scales along the output axis that share a factor

# Quantiles of a standard normal distribution, made symmetric around an exact zero and scaled to
# [-1, 1]: the published code book of QLoRA (its appendix E).
NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
# A value takes the code whose half of the gap it lies in.
_MIDDLES = ((NF4[1:].astype(np.float64) + NF4[:-1].astype(np.float64)) / 2).astype(np.float32)

Kernel = dict[str, jax.Array]


def block_size(features_in: int) -> int:
    """Weights per nf4 block: 64, or for a narrower input axis what divides it."""
    return math.gcd(features_in, BLOCK)


def scale_block_size(features_out: int) -> int:
    """Scales per factor: 64, or what divides the output axis."""
    return math.gcd(features_out, _SCALE_BLOCK)


def quantize(kernel: jax.Array, method: str) -> Kernel:
    """Quantises float weights ``[..., in, out]`` by "int8" or "nf4".

    Raises:
      ValueError: an unknown method, or for nf4 an odd input axis.
    """
    if method == "int8":
        return quantize_int8(kernel)
    if method == "nf4":
        return quantize_scales(quantize_nf4(kernel))
    raise ValueError(f"no quantisation is called {method!r}; known: {', '.join(METHODS)}")


def quantize_int8(kernel: jax.Array) -> Kernel:
    """Symmetric int8 with one scale per output channel, the largest magnitude at 127."""
    kernel = kernel.astype(jnp.float32)
    scales = jnp.abs(kernel).max(axis=-2) / 127.0
    scales = jnp.where(scales > 0, scales, 1.0)
    values = jnp.round(kernel / scales[..., None, :]).astype(jnp.int8)
    return {"values": values, "scales": scales}


def quantize_nf4(kernel: jax.Array) -> Kernel:
    """nf4 codes with float32 scales (the largest magnitude of each block), before double
    quantisation."""
    *lead, features_in, features_out = kernel.shape
    if features_in % 2:
        raise ValueError(f"two codes share a byte: the input axis {features_in} must be even")
    block = block_size(features_in)
    blocks = kernel.astype(jnp.float32).reshape(*lead, features_in // block, block, features_out)
    scales = jnp.abs(blocks).max(axis=-2)
    unit = blocks / jnp.where(scales > 0, scales, 1.0)[..., None, :]
    codes = jnp.zeros(unit.shape, jnp.uint8)
    for middle in _MIDDLES:
        codes += (unit > middle).astype(jnp.uint8)
    pairs = codes.reshape(*lead, features_in // 2, 2, features_out)
    return {"values": pairs[..., 0, :] << 4 | pairs[..., 1, :], "scales": scales}


def quantize_scales(kernel: Kernel) -> Kernel:
    """Double quantisation of nf4 scales."""
    scales = kernel["scales"]
    mean = scales.mean(axis=(-2, -1), keepdims=True)
    block = scale_block_size(scales.shape[-1])
    grouped = (scales - mean).reshape(*scales.shape[:-1], -1, block)
    factors = jnp.abs(grouped).max(axis=-1) / 127.0
    factors = jnp.where(factors > 0, factors, 1.0)
    values = jnp.round(grouped / factors[..., None]).astype(jnp.int8).reshape(scales.shape)
    return {
        "values": kernel["values"],
        "scales": values,
        "scale_scales": factors,
        "scale_means": mean,
    }


def _float_scales(kernel: Kernel) -> jax.Array:
    scales = kernel["scales"]
    if "scale_scales" not in kernel:
        return scales.astype(jnp.float32)
    factors = kernel["scale_scales"]
    grouped = scales.astype(jnp.float32).reshape(*factors.shape, -1) * factors[..., None]
    return grouped.reshape(scales.shape) + kernel["scale_means"]


def _look_up(codes: jax.Array) -> jax.Array:
    """``NF4[codes]`` as choices between constants by bit: vector units have no table look-up."""
    level: list[Any] = list(NF4)
    for bit in range(4):
        is_set = (codes >> bit) & 1 == 1
        level = [
            jnp.where(is_set, high, low) for low, high in zip(level[::2], level[1::2], strict=True)
        ]
    return level[0]


def dequantize(kernel: Kernel, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """Weights ``[..., in, out]`` in ``dtype``; the product of code and scale is float32."""
    values = kernel["values"]
    if values.dtype == jnp.int8:
        full = values.astype(jnp.float32) * kernel["scales"][..., None, :]
        return full.astype(dtype)
    scales = _float_scales(kernel)
    *lead, half, features_out = values.shape
    codes = jnp.stack([values >> 4, values & 15], axis=-2).reshape(*lead, half * 2, features_out)
    blocks = scales.shape[-2]
    unit = _look_up(codes).reshape(*lead, blocks, -1, features_out)
    return (unit * scales[..., None, :]).reshape(*lead, half * 2, features_out).astype(dtype)


def matmul(x: jax.Array, kernel: jax.Array | Kernel, dtype: jnp.dtype) -> jax.Array:
    """``x @ kernel``: operands and result ``[..., out]`` in ``dtype``, sums in float32.

    A quantised kernel is frozen: it has no gradient, and for that of ``x`` it is dequantised once
    more, so that no float copy of it waits for the backward pass. int8 scales are applied behind
    the product, which is the same sum and leaves the weights in 8 bits until they are multiplied.
    """
    if isinstance(kernel, dict):
        return checkpoint_name(_quantized_product(x, kernel, dtype), products.PRODUCT)
    return products.matmul(x, kernel, dtype, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _quantized_product(x: jax.Array, kernel: Kernel, dtype: jnp.dtype) -> jax.Array:
    if kernel["values"].dtype == jnp.int8:
        product = products.contract(
            x.astype(dtype), [x.ndim - 1], kernel["values"].astype(dtype), [0], jnp.float32
        )
        return (product * kernel["scales"]).astype(dtype)
    return products.matmul(x, dequantize(kernel, dtype), dtype, dtype)


def _quantized_forward(x: jax.Array, kernel: Kernel, dtype: jnp.dtype) -> tuple[jax.Array, Any]:
    # An empty array carries the dtype of x, which the cotangent must have.
    return _quantized_product(x, kernel, dtype), (kernel, jnp.zeros((0,), x.dtype))


def _quantized_backward(dtype: jnp.dtype, saved: Any, d_out: jax.Array) -> tuple[jax.Array, Any]:
    kernel, like = saved
    if kernel["values"].dtype == jnp.int8:
        weights = kernel["values"].astype(dtype)
        d_out = (d_out.astype(jnp.float32) * kernel["scales"]).astype(dtype)
    else:
        weights = dequantize(kernel, dtype)
    d_x = products.contract(d_out, [d_out.ndim - 1], weights, [1], dtype).astype(like.dtype)

    def nothing(leaf: jax.Array) -> Any:
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.zeros_like(leaf)
        return np.zeros(leaf.shape, jax.dtypes.float0)

    return d_x, jax.tree.map(nothing, kernel)


_quantized_product.defvjp(_quantized_forward, _quantized_backward)


def shapes(features_in: int, features_out: int, method: str) -> dict[str, tuple[tuple, Any]]:
    """Shape and dtype of each array of a quantised kernel."""
    abstract = jax.eval_shape(
        lambda kernel: quantize(kernel, method),
        jax.ShapeDtypeStruct((features_in, features_out), jnp.float32),
    )
    return {name: (leaf.shape, leaf.dtype) for name, leaf in abstract.items()}
