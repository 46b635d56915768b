"""Dropout whose random numbers are a hash of where an element stands.

A mask is a function of (seed of the packed unit, site in the network, index inside the unit) and of
nothing else, so the same row sees the same mask on 1 or 8 devices and with any microbatch size, and
the compiler fuses the hash into the multiplication: no random array is ever stored.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Multipliers of the "lowbias32" integer hash (C. Wellons, "Prospecting for hash functions").
_FIRST_MULTIPLIER = np.uint32(0x7FEB352D)
_SECOND_MULTIPLIER = np.uint32(0x846CA68B)
_GOLDEN = np.uint32(0x9E3779B9)
_NOTHING = np.uint32(0)


def mix(x: jax.Array, extra: jax.Array | np.uint32 = _NOTHING) -> jax.Array:
    """Hashes uint32 values; ``extra`` is a second word that enters between the two rounds."""
    x = x ^ (x >> 16)
    x = x * _FIRST_MULTIPLIER
    x = (x ^ (x >> 15)) + extra
    x = x * _SECOND_MULTIPLIER
    return x ^ (x >> 16)


def unit_seeds(seed: jax.Array, step: jax.Array, unit_ids: jax.Array) -> jax.Array:
    """Seeds of the packed units of one update.

    Args:
      seed: uint32 scalar, the run's seed.
      step: int32 scalar, the number of the update.
      unit_ids: int32 ``[B]``, numbers of the units inside the update.

    Returns:
      uint32 ``[B, 2]``.
    """
    base = mix(mix(seed.astype(jnp.uint32) + _GOLDEN) ^ step.astype(jnp.uint32))
    first = mix(base ^ unit_ids.astype(jnp.uint32) * _GOLDEN)
    return jnp.stack([first, mix(first + _GOLDEN, base)], axis=-1)


def dropout(x: jax.Array, rate: float, seeds: jax.Array | None, site: jax.Array | int) -> jax.Array:
    """Zeroes elements with probability ``rate`` and scales the others by ``1 / (1 - rate)``.

    Args:
      x: ``[B, ...]``, one slice per packed unit.
      rate: probability in [0, 1).
      seeds: uint32 ``[B, 2]`` from `unit_seeds`; None leaves ``x`` as it is.
      site: a number that no other dropout of the network has.
    """
    if seeds is None or rate == 0.0:
        return x
    index = _index(x.shape[1:])
    first, second = (
        word.reshape(x.shape[:1] + (1,) * (x.ndim - 1)) for word in site_seeds(seeds, site).T
    )
    keep = keep_elements(index[None], first, second, rate)
    return jnp.where(keep, x * jnp.asarray(1.0 / (1.0 - rate), x.dtype), jnp.zeros((), x.dtype))


def _index(shape: tuple[int, ...]) -> jax.Array:
    """Each element's number. Counted per axis: TPUs' compiler cannot cut a long count to shape."""
    index = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = np.uint32(math.prod(shape[axis + 1 :]) & 0xFFFFFFFF)
        index += lax.broadcasted_iota(jnp.uint32, shape, axis) * stride
    return index


def site_seeds(seeds: jax.Array, site: jax.Array | int) -> jax.Array:
    """Seeds ``[B, 2]`` of one dropout site (traced in a scan over layers), from the units'."""
    if isinstance(site, int):
        return mix(seeds + np.uint32((site + 1) * int(_GOLDEN) & 0xFFFFFFFF))
    return mix(seeds + (site.astype(jnp.uint32) + 1) * _GOLDEN)


def keep_elements(index: jax.Array, first: jax.Array, second: jax.Array, rate: float) -> jax.Array:
    """Which elements stay: a function of their index and of the two seed words of the site."""
    return mix(index ^ first, second) >= np.uint32(round(rate * 2**32))
