"""Scores of ratings, by hand and beside scikit-learn."""

from pathlib import Path

import numpy as np
import pytest
from sklearn import metrics

from pref_jax.errors import InputError
from pref_jax.evaluation.rating_metrics import (
    RatingBaselines,
    evaluate_ratings,
    measure_response_losses,
    to_rating_probabilities,
)

NAMES = ("funny", "polite", "short")


def draw(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 4, (count, 3))
    labels[generator.random((count, 3)) < 0.3] = -1
    labels[(labels < 0).all(axis=1), 0] = 1
    return to_rating_probabilities(generator.standard_normal((count, 12)), 3), labels


def test_a_response_counts_once_whatever_it_is_rated_for() -> None:
    probabilities = np.array([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]], [[0.2, 0.2, 0.6]] * 2])
    labels = np.array([[0, 2], [2, -1]])
    losses = measure_response_losses(probabilities, labels)
    np.testing.assert_allclose(losses, [(-np.log(0.5) - np.log(0.8)) / 2, -np.log(0.6)], rtol=1e-12)
    result = evaluate_ratings(probabilities, labels, NAMES[:2])
    assert result["log_loss"] == pytest.approx(losses.mean())
    assert result["accuracy"] == 1 and result["ratings"] == 3
    # Only one rating occurs in truth and prediction of the second property.
    assert result["properties"]["polite"]["quadratic_kappa"] is None


def test_scores_of_each_property_are_those_of_its_ratings() -> None:
    probabilities, labels = draw(200)
    result = evaluate_ratings(probabilities, labels, NAMES)
    for at, name in enumerate(NAMES):
        given = labels[:, at] >= 0
        truth, found = labels[given, at], probabilities[given, at].argmax(-1)
        part = result["properties"][name]
        assert part["ratings"] == given.sum()
        assert part["accuracy"] == metrics.accuracy_score(truth, found)
        assert part["macro_f1"] == pytest.approx(metrics.f1_score(truth, found, average="macro"))
        weighted = metrics.cohen_kappa_score(truth, found, weights="quadratic")
        assert part["quadratic_kappa"] == pytest.approx(weighted)
        assert part["log_loss"] == pytest.approx(
            metrics.log_loss(truth, probabilities[given, at], labels=range(4))
        )
    parts = result["properties"].values()
    assert result["macro_f1"] == pytest.approx(np.mean([part["macro_f1"] for part in parts]))


def test_what_has_to_be_beaten(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    words = np.exp(generator.normal(4, 1, (2000, 2))).astype(int)
    # The first property is the response's length, the second nothing, the third always 2.
    long = np.searchsorted(np.quantile(words[:, 1], [0.25, 0.5, 0.75]), words[:, 1])
    luck = np.where(generator.random(2000) < 0.6, 3, generator.integers(0, 4, 2000))
    labels = np.stack([long, luck, np.full(2000, 2)], axis=1)
    labels[::7, 1] = -1
    fitted = RatingBaselines.fit(words, labels, 4)
    fitted.save(tmp_path / "baselines.json")
    again = RatingBaselines.load(tmp_path / "baselines.json")
    result = evaluate_ratings(
        to_rating_probabilities(np.zeros((2000, 12)), 3),
        labels,
        NAMES,
        baselines=again,
        words=words,
    )
    parts = {name: result["properties"][name]["baselines"] for name in NAMES}
    assert parts["funny"]["length"]["accuracy"] > 0.8 > parts["funny"]["majority"]["accuracy"]
    for name in ("majority", "length"):
        # Neither can know more than the shares: their entropy, to the noise of fitting.
        truth = labels[labels[:, 1] >= 0, 1]
        shares = np.bincount(truth) / len(truth)
        assert parts["polite"][name]["log_loss"] == pytest.approx(
            -(shares * np.log(shares)).sum(), abs=0.01
        )
        assert parts["short"][name]["accuracy"] == 1
        # A rating that never occurred is not impossible.
        values = again.predict(name, np.array([[1, 1], [10**6, 10**6]]))
        assert values.min() > 0 and np.allclose(values.sum(-1), 1)
    with pytest.raises(InputError, match="multi-task"):
        (tmp_path / "baselines.json").write_text("{}")
        RatingBaselines.load(tmp_path / "baselines.json")
