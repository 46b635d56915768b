"""Dense layer, layer norm, embedding (logical axis names on every parameter) and GELU."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from pref_jax.models.products import matmul

# Standard deviation of new weights: `initializer_range` of BERT's published configurations.
INITIALIZER_RANGE = 0.02


def named(initializer: Callable, *axes: str | None) -> Callable:
    """The initializer of a parameter whose axes have these logical names."""
    return nn.with_logical_partitioning(initializer, axes)


class Dense(nn.Module):
    """``x @ kernel + bias``: operands and result in ``dtype``, sums in float32 at least."""

    features: int
    axes: tuple[str | None, str | None]
    dtype: jnp.dtype = jnp.float32
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param(
            "kernel",
            named(nn.initializers.normal(INITIALIZER_RANGE), *self.axes),
            (x.shape[-1], self.features),
            jnp.float32,
        )
        sums = jnp.promote_types(self.dtype, jnp.float32)
        y = matmul(x, kernel, self.dtype, sums)
        if self.use_bias:
            bias = self.param(
                "bias",
                named(nn.initializers.zeros, self.axes[1]),
                (self.features,),
                jnp.float32,
            )
            y = y + bias.astype(sums)
        return y.astype(self.dtype)


class LayerNorm(nn.Module):
    """Layer norm over the last axis, computed in float32 (`torch.nn.LayerNorm`).

    Attributes:
      epsilon: added to the variance.
      dtype: of the result.
      joined: whether all axes but the last are computed as one. XLA's CPU compiler sums over the
        last of three axes an order of magnitude slower, which the gradient does. For one device:
        several would exchange activations to join axes that are cut.
    """

    epsilon: float
    dtype: jnp.dtype = jnp.float32
    joined: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape, width = x.shape, x.shape[-1:]
        scale = self.param("scale", named(nn.initializers.ones, "norm"), width, jnp.float32)
        bias = self.param("bias", named(nn.initializers.zeros, "norm"), width, jnp.float32)
        x = (x.reshape(-1, shape[-1]) if self.joined else x).astype(jnp.float32)
        x = x - x.mean(axis=-1, keepdims=True)
        variance = (x * x).mean(axis=-1, keepdims=True)
        y = x * lax.rsqrt(variance + self.epsilon) * scale.astype(jnp.float32)
        return (y + bias.astype(jnp.float32)).astype(self.dtype).reshape(shape)


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """GELU by the error function (`torch.nn.GELU`), computed in float32, result as ``x``.

    The backward pass keeps ``x`` alone and computes the error function again; what JAX derives
    keeps several arrays of its size, and rounds each step of 16-bit inputs.
    """
    wide = x.astype(jnp.float32)
    return (wide * _normal_cdf(wide)).astype(x.dtype)


def _gelu_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return gelu(x), x


def _gelu_backward(x: jax.Array, d_out: jax.Array) -> tuple[jax.Array]:
    wide = x.astype(jnp.float32)
    density = jnp.exp(-0.5 * wide * wide) * np.float32(1.0 / math.sqrt(2.0 * math.pi))
    slope = _normal_cdf(wide) + wide * density
    return ((d_out.astype(jnp.float32) * slope).astype(x.dtype),)


gelu.defvjp(_gelu_forward, _gelu_backward)


def _normal_cdf(x: jax.Array) -> jax.Array:
    return 0.5 * (1.0 + lax.erf(x * np.float32(math.sqrt(0.5))))


class Embedding(nn.Module):
    """Rows of a table by number; the caller guarantees that numbers are inside the table."""

    num_embeddings: int
    features: int
    axes: tuple[str | None, str | None]

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        table = self.param(
            "embedding",
            named(nn.initializers.normal(INITIALIZER_RANGE), *self.axes),
            (self.num_embeddings, self.features),
            jnp.float32,
        )
        return table.at[ids].get(mode="clip").astype(jnp.float32)
