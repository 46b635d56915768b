"""Attention one segment at a time equals the plain formulas: values, gradients, dropout."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pref_jax.models.attention import attend
from pref_jax.models.causal_attention import attend_causal
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


LAYOUTS = [
    (96, [[96], [1, 2, 3], [64, 32], []]),
    (200, [[65, 64, 63], [1, 190], [128, 72]]),  # the last segments touch the end
    (16, [[16], [5, 11]]),
]


@pytest.mark.parametrize("rate", [0.0, 0.1])
@pytest.mark.parametrize(("tokens", "units"), LAYOUTS)
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
        return attend(*heads, segments, segments, **noise) * weights

    def by_segment(*heads: jax.Array) -> jax.Array:
        found = find_segments(jnp.asarray(segments), jnp.asarray(positions), most=4, longest=tokens)
        return attend_segments(*heads, found, **noise) * weights

    assert_alike(by_segment, plain, query, key, value)


@pytest.mark.parametrize(
    ("tokens", "units", "groups"),
    [
        (*LAYOUTS[0], 1),
        (*LAYOUTS[1], 2),
        (*LAYOUTS[2], 6),
        (300, [[300], [128, 129, 43], [20, 257]], 2),  # several blocks of queries
    ],
)
def test_equals_the_plain_formula_of_decoders(
    tokens: int, units: list[list[int]], groups: int
) -> None:
    segments, positions = map(np.stack, zip(*(_unit(u, tokens) for u in units), strict=True))
    generator = np.random.default_rng(0)
    query, key, value, weights = (
        jnp.asarray(generator.standard_normal((len(units), tokens, heads, WIDTH)), jnp.float32)
        for heads in (6, groups, groups, 6)
    )
    weights = weights * (segments > 0)[:, :, None, None]

    def plain(*heads: jax.Array) -> jax.Array:
        return attend_causal(*heads, segments) * weights

    def by_segment(*heads: jax.Array) -> jax.Array:
        found = find_segments(
            jnp.asarray(segments), jnp.asarray(positions), most=4, longest=tokens, causal=True
        )
        out = attend_causal(*heads, segments, implementation="segments", segments=found)
        return out * weights

    assert_alike(by_segment, plain, query, key, value)


def assert_alike(
    one: Callable[..., jax.Array], other: Callable[..., jax.Array], *heads: jax.Array
) -> None:
    """The same values, and the same gradients of query, key and value."""

    def run(attention: Callable[..., jax.Array]) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        def total(*heads: jax.Array) -> tuple[jax.Array, jax.Array]:
            out = attention(*heads)
            return out.sum(), out

        gradients, out = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(*heads)
        return out, gradients

    for a, b in zip(jax.tree.leaves(run(one)), jax.tree.leaves(run(other)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
