"""A temperature is judged by rows that it was not fitted to."""

import numpy as np
from scipy.special import softmax

from pref_jax.evaluation.predict import calibrate, fit_temperature, to_probabilities


def draw(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and labels drawn from them at a temperature of 1 (even rows) or 3 (odd ones)."""
    generator = np.random.default_rng(0)
    logits = 2.0 * generator.normal(size=(rows, 3))
    chances = softmax(logits / np.where(np.arange(rows) % 2, 3.0, 1.0)[:, None], axis=1)
    return logits, np.array([generator.choice(3, p=row) for row in chances])


def test_each_half_has_the_temperature_of_the_other() -> None:
    logits, labels = draw(41)
    allowed = (np.arange(41) % 5 != 0) | (labels == 2)
    temperature, probabilities = calibrate(logits, labels, allowed)
    assert temperature == fit_temperature(logits, labels, allowed)
    for half, others in (
        (slice(0, None, 2), slice(1, None, 2)),
        (slice(1, None, 2), slice(0, None, 2)),
    ):
        own = fit_temperature(logits[others], labels[others], allowed[others])
        expected = to_probabilities(logits[half], temperature=own, tie_allowed=allowed[half])
        np.testing.assert_array_equal(probabilities[half], expected)
    # The two temperatures differ by far: a label of its own half would be seen.
    own = to_probabilities(logits, temperature=temperature, tie_allowed=allowed)
    assert np.abs(own - probabilities).max() > 0.05


def test_a_change_of_a_label_moves_only_the_other_half() -> None:
    logits, labels = draw(30)
    allowed = np.ones(30, bool)
    before = calibrate(logits, labels, allowed)[1]
    labels[4] = (labels[4] + 1) % 3
    after = calibrate(logits, labels, allowed)[1]
    np.testing.assert_array_equal(before[::2], after[::2])
    assert np.abs(before[1::2] - after[1::2]).max() > 1e-6


def test_one_row_keeps_its_own() -> None:
    temperature, probabilities = calibrate(
        np.array([[2.0, 0.0, 0.0]]), np.array([0]), np.ones(1, bool)
    )
    np.testing.assert_allclose(probabilities[0], softmax(np.array([2.0, 0, 0]) / temperature))
