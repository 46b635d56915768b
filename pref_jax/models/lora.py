"""Linear layers with a frozen kernel and a trained low-rank adapter (Hu et al. 2021)."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from pref_jax.models import quantize
from pref_jax.models.dropout import dropout
from pref_jax.models.layers import INITIALIZER_RANGE, named


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """The adapters of a model.

    Attributes:
      rank: inner width of an adapter.
      alpha: with ``rank`` the scale of the update.
      dropout: of the adapter's input.
      targets: names of the projections that get one, such as "q_proj".
      rank_stabilised: scale by alpha / sqrt(rank) (Kalajdzievski 2023), not by alpha / rank.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    rank_stabilised: bool = False

    @property
    def scale(self) -> float:
        """Factor of the update."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)


class QuantizedKernel(nn.Module):
    """The arrays of a quantised kernel, as `pref_jax.models.quantize` makes them."""

    features: int
    axes: tuple[str | None, str | None]
    method: str

    @nn.compact
    def __call__(self, features_in: int) -> quantize.Kernel:
        shapes = quantize.shapes(features_in, self.features, self.method)
        row, column = self.axes
        axes = {
            "values": (row, column),
            # int8 has a scale per channel; nf4's lie on the grid of blocks.
            "scales": (column,) if len(shapes["scales"][0]) == 1 else (f"{row}_blocks", column),
            "scale_scales": (f"{row}_blocks", f"{column}_blocks"),
            "scale_means": (None, None),
        }

        def draw(key: jax.Array, name: str) -> jax.Array:
            # The same key for each name, so that the arrays are parts of one kernel.
            weights = jax.random.normal(key, (features_in, self.features)) * INITIALIZER_RANGE
            return quantize.quantize(weights, self.method)[name]

        key = self.make_rng("params") if self.is_initializing() else None
        return {
            name: self.param(
                name,
                named(lambda own, name: draw(own if key is None else key, name), *axes[name]),
                name,
            )
            for name in shapes
        }


class Projection(nn.Module):
    """``x @ kernel + scale * dropout(x) @ a @ b`` without bias.

    The kernel is in the collection "params": a matrix ``[in, out]`` in ``kernel_dtype``, or the
    arrays of a quantised one. ``a`` ``[in, rank]`` and ``b`` ``[rank, out]``, float32, are in the
    collection "lora", so the paths of the base stay those of published checkpoints. ``b`` starts at
    zero: the first update starts from the base model itself.

    Attributes:
      features: width of the result.
      axes: logical axes of the kernel.
      dtype: of operands and result; sums are float32.
      kernel_dtype: of a kernel that is not quantised.
      quantization: one of `quantize.METHODS`.
      lora: None where this projection has no adapter.
    """

    features: int
    axes: tuple[str | None, str | None]
    dtype: jnp.dtype = jnp.float32
    kernel_dtype: jnp.dtype = jnp.float32
    quantization: str = "none"
    lora: LoRAConfig | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, seeds: jax.Array | None = None, site: jax.Array | int = 0
    ) -> jax.Array:
        """``[..., features]``; ``seeds`` and ``site`` are those of `pref_jax.models.dropout`."""
        features_in = x.shape[-1]
        kernel: Any
        if self.quantization == "none":
            initializer = nn.initializers.normal(INITIALIZER_RANGE)
            kernel = self.param(
                "kernel",
                named(initializer, *self.axes),
                (features_in, self.features),
                self.kernel_dtype,
            )
        else:
            kernel = QuantizedKernel(self.features, self.axes, self.quantization, name="kernel")(
                features_in
            )
        y = quantize.matmul(x, kernel, self.dtype)
        if self.lora is not None:
            # Added in float32: an update starts far smaller than what it is added to.
            y = y.astype(jnp.float32) + self._update(x, seeds, site)
        return y.astype(self.dtype)

    def _update(self, x: jax.Array, seeds: jax.Array | None, site: jax.Array | int) -> jax.Array:
        lora, features_in = self.lora, x.shape[-1]
        assert lora is not None

        def draw_a() -> jax.Array:
            # torch's `kaiming_uniform_(a=sqrt(5))`, as PEFT does.
            bound = 1.0 / math.sqrt(features_in)
            key = self.make_rng("params")
            return jax.random.uniform(key, (features_in, lora.rank), jnp.float32, -bound, bound)

        def draw_b() -> jax.Array:
            return jnp.zeros((lora.rank, self.features), jnp.float32)

        row, column = self.axes
        a = self.variable("lora", "a", named(draw_a, row, "lora"))
        b = self.variable("lora", "b", named(draw_b, "lora", column))
        x = dropout(x, lora.dropout, seeds, site)
        inner = quantize.matmul(x, a.value, self.dtype)
        return quantize.matmul(inner, b.value, self.dtype).astype(jnp.float32) * lora.scale
