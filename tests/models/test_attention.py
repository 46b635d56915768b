"""Attention one segment at a time equals the plain formula: values, gradients, dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pref_jax.models.attention import attend
from pref_jax.models.dropout import unit_seeds
from pref_jax.models.segment_attention import attend_segments, find_segments

HEADS, WIDTH = 2, 4


def _unit(lengths: list[int], tokens: int) -> tuple[np.ndarray, np.ndarray]:
    segments, positions = np.zeros(tokens, np.int32), np.zeros(tokens, np.int32)
    start = 0
    for number, length in enumerate(lengths):
        segments[start : start + length] = number + 1
        positions[start : start + length] = np.arange(length)
        start += length
    return segments, positions


@pytest.mark.parametrize("rate", [0.0, 0.1])
@pytest.mark.parametrize(
    ("tokens", "units"),
    [
        (96, [[96], [1, 2, 3], [64, 32], []]),
        (200, [[65, 64, 63], [1, 190], [128, 72]]),  # the last segments touch the end
        (16, [[16], [5, 11]]),
    ],
)
def test_equals_the_plain_formula(tokens: int, units: list[list[int]], rate: float) -> None:
    segments, positions = map(np.stack, zip(*(_unit(u, tokens) for u in units), strict=True))
    generator = np.random.default_rng(0)
    shape = (len(units), tokens, HEADS, WIDTH)
    query, key, value, weights = (
        jnp.asarray(generator.standard_normal(shape), jnp.float32) for _ in range(4)
    )
    weights = weights * (segments > 0)[:, :, None, None]  # nothing is asked of padding
    seeds = unit_seeds(jnp.uint32(0), jnp.int32(1), jnp.arange(len(units)))
    noise = {"dropout_rate": rate, "seeds": seeds, "site": 3}

    def plain(*heads: jax.Array) -> jax.Array:
        return (attend(*heads, segments, segments, **noise) * weights).sum()

    def by_segment(*heads: jax.Array) -> jax.Array:
        found = find_segments(jnp.asarray(segments), jnp.asarray(positions), most=4, longest=tokens)
        return (attend_segments(*heads, found, longest=tokens, **noise) * weights).sum()

    ours = jax.jit(jax.value_and_grad(by_segment, argnums=(0, 1, 2)))(query, key, value)
    theirs = jax.jit(jax.value_and_grad(plain, argnums=(0, 1, 2)))(query, key, value)
    np.testing.assert_allclose(ours[0], theirs[0], atol=1e-4)
    for a, b in zip(ours[1], theirs[1], strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
