"""Rotary position embeddings (Su et al. 2021) with the scalings of LLaMA-like models.

Agrees with `transformers.modeling_rope_utils`: "default", "linear", "dynamic", "yarn", "llama3".
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

KINDS = ("default", "linear", "dynamic", "yarn", "llama3")


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """How positions turn into angles.

    Attributes:
      theta: base of the geometric series of wavelengths.
      kind: one of `KINDS`.
      factor: how many times the trained context is stretched.
      original_max_positions: context in training, in tokens ("llama3" and "yarn": before it was
        stretched).
      low_freq_factor, high_freq_factor: "llama3": wavelengths above original / low are stretched by
        ``factor``, below original / high left alone, in between interpolated.
      beta_fast, beta_slow: "yarn": turns within the trained context that bound the same two ranges.
      attention_factor: "yarn": multiplies sine and cosine; None: 0.1 ln(factor) + 1, or the ratio
        that ``mscale`` and ``mscale_all_dim`` give.
      truncate: "yarn": whether the range's bounds are whole numbers.
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Angle per position of each pair of channels, float32 ``[head_dim / 2]``.

    For "dynamic" these hold up to the trained context, see `rotate`.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    plain = (np.float32(1.0) / np.float32(rope.theta) ** exponents).astype(np.float32)
    if rope.kind in ("default", "dynamic"):
        return plain
    if rope.kind == "linear":
        return plain / np.float32(rope.factor)
    if rope.kind == "llama3":
        return _llama3(rope, plain)
    if rope.kind == "yarn":
        return _yarn(rope, plain, head_dim)
    raise ValueError(f"no rope scaling is called {rope.kind!r}; known: {', '.join(KINDS)}")


def _llama3(rope: RopeConfig, plain: np.ndarray) -> np.ndarray:
    wavelengths = 2.0 * math.pi / plain
    context = rope.original_max_positions
    smooth = (context / wavelengths - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    between = (1.0 - smooth) * plain / rope.factor + smooth * plain
    scaled = np.where(wavelengths > context / rope.low_freq_factor, plain / rope.factor, between)
    short = wavelengths < context / rope.high_freq_factor
    return np.where(short, plain, scaled).astype(np.float32)


def _yarn(rope: RopeConfig, plain: np.ndarray, head_dim: int) -> np.ndarray:
    def channel(turns: float) -> float:
        """The channel pair that turns so often within the trained context."""
        wavelength = rope.original_max_positions / (turns * 2.0 * math.pi)
        return head_dim * math.log(wavelength) / (2.0 * math.log(rope.theta))

    low, high = channel(rope.beta_fast), channel(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001
    stretched = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / width, 0.0, 1.0)
    return (plain / rope.factor * stretched + plain * (1.0 - stretched)).astype(np.float32)


def attention_scale(rope: RopeConfig) -> float:
    """What sine and cosine are multiplied with ("yarn"; 1 for the others)."""
    if rope.kind != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor

    def log_scale(multiplier: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * multiplier * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return log_scale(rope.mscale) / log_scale(rope.mscale_all_dim)
    return log_scale(1.0)


def make_angles(
    rope: RopeConfig, head_dim: int, positions_BxT: jax.Array, segment_ids_BxT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of every token, float32 ``[B, T, head_dim]`` each.

    "dynamic" scaling depends on how long a sequence is. In transformers that is the longest of the
    batch, so a row's result depends on its neighbours; here it is the row's own, which is what
    transformers computes for the row alone.

    Args:
      rope: the scaling.
      head_dim: channels of a head.
      positions_BxT: position of each token in its own segment.
      segment_ids_BxT: which tokens belong together.
    """
    inverse = jnp.asarray(inverse_frequencies(rope, head_dim))
    if rope.kind == "dynamic":
        same = segment_ids_BxT[:, :, None] == segment_ids_BxT[:, None, :]
        lengths_BxT = jnp.max(jnp.where(same, positions_BxT[:, None, :], 0), axis=-1) + 1
        stretch = rope.factor * jnp.maximum(lengths_BxT, rope.original_max_positions)
        stretch = stretch / rope.original_max_positions - (rope.factor - 1.0)
        bases_BxT = rope.theta * stretch ** (head_dim / (head_dim - 2))
        exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
        inverse = 1.0 / bases_BxT[..., None] ** exponents
    half_BxTxF = positions_BxT[..., None].astype(jnp.float32) * inverse
    angles_BxTxH = jnp.concatenate([half_BxTxF, half_BxTxF], axis=-1)
    scale = np.float32(attention_scale(rope))
    return jnp.cos(angles_BxTxH) * scale, jnp.sin(angles_BxTxH) * scale


def rotate(x_BxTxNxH: jax.Array, cos_BxTxH: jax.Array, sin_BxTxH: jax.Array) -> jax.Array:
    """Turns channel ``i`` with channel ``i + head_dim / 2``, in float32; keeps the dtype."""
    x = x_BxTxNxH.astype(jnp.float32)
    first, second = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    cos, sin = cos_BxTxH[:, :, None, :], sin_BxTxH[:, :, None, :]
    return (x * cos + turned * sin).astype(x_BxTxNxH.dtype)
