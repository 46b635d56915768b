"""Scores against scikit-learn, and the rules that scikit-learn does not have."""

import json

import numpy as np
import pytest
from sklearn import metrics as oracle

from pref_jax.evaluation import metrics


def _random(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.dirichlet([1.5, 1.2, 0.7], rows), random.integers(0, 3, rows)


@pytest.mark.parametrize("rows", [1, 13, 257])
def test_scores_are_those_of_scikit_learn(rows: int) -> None:
    probabilities, labels = _random(rows)
    got = metrics.evaluate(probabilities, labels)
    predicted, classes = probabilities.argmax(1), [0, 1, 2]
    assert got["rows"] == rows
    assert got["log_loss"] == pytest.approx(
        oracle.log_loss(labels, probabilities, labels=classes), abs=1e-12
    )
    assert got["accuracy"] == pytest.approx(oracle.accuracy_score(labels, predicted))
    assert got["confusion"] == oracle.confusion_matrix(labels, predicted, labels=classes).tolist()
    each = oracle.f1_score(labels, predicted, labels=classes, average=None, zero_division=0)
    assert [got["f1"][name] for name in metrics.CLASSES] == pytest.approx(each.tolist())
    assert got["f1"]["macro"] == pytest.approx(each.mean())
    assert json.loads(json.dumps(got)) == got


def test_one_class_only_and_certain_mistakes_are_finite() -> None:
    probabilities, _ = _random(7)
    ties = np.full(7, 2)
    got = metrics.evaluate(probabilities, ties)["log_loss"]
    assert got == pytest.approx(oracle.log_loss(ties, probabilities, labels=[0, 1, 2]))
    wrong, label = np.array([[1.0, 0.0, 0.0]]), np.array([1])
    assert metrics.evaluate(wrong, label)["log_loss"] == pytest.approx(
        oracle.log_loss(label, wrong, labels=[0, 1, 2])
    )


def test_a_row_without_ties_scores_only_a_against_b() -> None:
    probabilities = np.array([[0.3, 0.1, 0.6], [0.2, 0.3, 0.5], [0.0, 0.0, 1.0]])
    allowed = np.array([False, True, False])
    losses = metrics.measure_row_losses(probabilities, [0, 2, 1], allowed)
    assert losses == pytest.approx(-np.log([0.75, 0.5, 0.5]))
    got = metrics.evaluate(probabilities, [0, 2, 1], tie_allowed=allowed)
    assert got["confusion"] == [[1, 0, 0], [1, 0, 0], [0, 0, 1]]
    with pytest.raises(ValueError, match="tie_allowed"):
        metrics.measure_row_losses(probabilities, [2, 0, 0], allowed)


def test_slices_weighted_by_rows_add_up_to_the_whole() -> None:
    probabilities, labels = _random(200, seed=3)
    random = np.random.default_rng(1)
    got = metrics.evaluate(
        probabilities,
        labels,
        words=random.integers(0, 3000, 200),
        turns=random.integers(1, 9, 200),
        sources=["only once", *random.choice(["x", "y", None], 199).tolist()],
    )
    assert set(got["slices"]) == {"length", "turns", "source"}
    assert got["slices"]["source"]["only once"]["rows"] == 1
    for slices in got["slices"].values():
        assert sum(part["rows"] for part in slices.values()) == 200
        total = sum(part["rows"] * part["log_loss"] for part in slices.values())
        assert total / 200 == pytest.approx(got["log_loss"], abs=1e-12)


def test_length_buckets_are_in_order_and_hold_their_lower_edge() -> None:
    words = np.array([5000, 1000, 999, 50, 49, 0])
    slices = metrics.slice_losses(np.ones(6), words=words)["length"]
    assert [(name, part["rows"]) for name, part in slices.items()] == [
        ("0-49 words", 2),
        ("50-149 words", 1),
        ("400-999 words", 1),
        ("1000+ words", 2),
    ]


def test_calibration_error_of_a_hand_made_case() -> None:
    # Ten rows say 0.7 for A, six are right: the gap is 0.1.
    probabilities = np.tile([0.7, 0.2, 0.1], (10, 1))
    got = metrics.evaluate(probabilities, [0] * 6 + [1] * 4)
    assert got["calibration_error"] == pytest.approx(0.1)


def test_interval_is_reproducible_and_covers_the_normal_one() -> None:
    probabilities, labels = _random(2000, seed=5)
    first, second = (metrics.evaluate(probabilities, labels) for _ in range(2))
    assert first == second
    losses = metrics.measure_row_losses(probabilities, labels)
    half = 1.96 * losses.std() / np.sqrt(len(losses))
    low, high = first["log_loss_ci95"]
    assert low == pytest.approx(losses.mean() - half, abs=0.15 * half)
    assert high == pytest.approx(losses.mean() + half, abs=0.15 * half)


def test_paired_comparison_sees_a_shift_that_unpaired_intervals_hide() -> None:
    random = np.random.default_rng(2)
    losses = random.gamma(2, 0.5, 400)
    got = metrics.compare_row_losses(losses + 0.01 + random.normal(0, 0.01, 400), losses)
    assert got["rows"] == 400 and 0 < got["ci95"][0] < got["difference"] < got["ci95"][1]
    assert got["p_value"] < 0.01
    same = metrics.compare_row_losses(losses, losses)
    assert same["difference"] == 0 and same["ci95"] == [0, 0] and same["p_value"] == 1


@pytest.mark.parametrize(
    ("probabilities", "labels"),
    [
        ([[0.5, 0.5, 0.5]], [0]),
        ([[np.nan, 0.5, 0.5]], [0]),
        ([[1.5, -0.5, 0.0]], [0]),
        ([[0.5, 0.5]], [0]),
        (np.zeros((0, 3)), []),
        ([[0.2, 0.3, 0.5]], [-1]),
        ([[0.2, 0.3, 0.5]], [0, 1]),
    ],
)
def test_impossible_input_is_refused(probabilities: object, labels: object) -> None:
    with pytest.raises(ValueError):
        metrics.evaluate(probabilities, labels)  # type: ignore[arg-type]
