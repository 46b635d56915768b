"""Dropout masks are random enough, and depend on nothing but seed, site and place."""

import jax
import jax.numpy as jnp
import numpy as np

from pref_jax.models.dropout import dropout, unit_seeds


def _mask(seeds: jax.Array, site: int, shape: tuple[int, ...] = (64, 4096)) -> np.ndarray:
    return np.asarray(dropout(jnp.ones(shape), 0.1, seeds[: shape[0]], site)) > 0


SEEDS = unit_seeds(jnp.uint32(1), jnp.int32(5), jnp.arange(64))


def test_the_rate_holds_overall_and_in_every_unit() -> None:
    mask = _mask(SEEDS, 0)
    assert abs(mask.mean() - 0.9) < 5 * np.sqrt(0.09 / mask.size)
    assert np.abs(mask.mean(axis=1) - 0.9).max() < 5 * np.sqrt(0.09 / mask.shape[1])


def test_what_stays_is_scaled_so_that_the_mean_stays() -> None:
    values = np.unique(np.asarray(dropout(jnp.ones((64, 512)), 0.25, SEEDS, 3)))
    np.testing.assert_allclose(values, [0.0, 1 / 0.75], rtol=1e-6)


def test_masks_of_units_sites_steps_and_runs_are_uncorrelated() -> None:
    base = _mask(SEEDS, 0).astype(float)
    others = [
        _mask(SEEDS, 1),
        _mask(SEEDS, 2),
        np.roll(base, 1, axis=0),  # the neighbouring unit
        np.roll(base, 1, axis=1),  # the neighbouring element
        _mask(unit_seeds(jnp.uint32(1), jnp.int32(6), jnp.arange(64)), 0),
        _mask(unit_seeds(jnp.uint32(2), jnp.int32(5), jnp.arange(64)), 0),
    ]
    for other in others:
        correlation = np.corrcoef(base.ravel(), np.asarray(other, float).ravel())[0, 1]
        assert abs(correlation) < 5 / np.sqrt(base.size)


def test_a_unit_has_the_same_mask_alone_and_among_others() -> None:
    together = _mask(SEEDS, 4)
    alone = _mask(SEEDS[7:8], 4, (1, 4096))
    np.testing.assert_array_equal(together[7:8], alone)


def test_without_seeds_nothing_happens() -> None:
    x = jnp.arange(12.0).reshape(3, 4)
    np.testing.assert_array_equal(dropout(x, 0.5, None, 0), x)
