"""Scores of predicted ratings, and what a model must beat: the majority, and lengths alone.

Shapes: ``labels`` is int ``[n, H]``, the rating of each of n responses under each of H properties,
-1 where there is none; ``probabilities`` is ``[n, H, C]`` over the C ratings of the scale.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pref_jax.errors import InputError
from pref_jax.evaluation.metrics import bootstrap_mean
from pref_jax.files import read_json, write_durably

NAMES = ("majority", "length")
_LARGEST_FEATURE = 4.0  # standardised, as in `pref_jax.evaluation.baselines`

FloatArray = npt.NDArray[np.float64]


def to_rating_probabilities(logits: np.ndarray, num_ratings: int) -> FloatArray:
    """Softmax in float64 of ``[n, H * C]`` logits: ``[n, H, C]``."""
    values = np.asarray(logits, np.float64).reshape(len(logits), num_ratings, -1)
    values = np.exp(values - values.max(axis=-1, keepdims=True))
    return np.asarray(values / values.sum(axis=-1, keepdims=True))


def measure_response_losses(probabilities: FloatArray, labels: np.ndarray) -> FloatArray:
    """Mean cross-entropy of each response's ratings, in nats: ``[n]``.

    A response without a rating has none, NaN.
    """
    given = labels >= 0
    chosen = np.take_along_axis(probabilities, np.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    losses = -np.log(np.maximum(chosen, np.finfo(np.float64).eps))
    count = given.sum(axis=1)
    total = np.where(given, losses, 0.0).sum(axis=1)
    return np.divide(total, count, out=np.full(len(total), np.nan), where=count > 0)


def evaluate_ratings(
    probabilities: FloatArray,
    labels: np.ndarray,
    names: Sequence[str],
    *,
    baselines: "RatingBaselines | None" = None,
    words: np.ndarray | None = None,
) -> dict[str, Any]:
    """Everything ``launch/evaluate.py`` writes about a multi-task run.

    Args:
      probabilities, labels: see the module; every response has a rating.
      names: of the properties.
      baselines: fitted on training rows.
      words: words of prompt and response ``[n, 2]``, for the baselines.

    Returns:
      ``rows`` (responses), ``ratings``, ``log_loss`` (mean over responses of the mean over their
      ratings), ``log_loss_ci95``, ``accuracy`` (likewise), ``macro_f1`` and ``quadratic_kappa``
      (means over properties), ``baselines{name: {log_loss, accuracy, macro_f1}}`` and
      ``properties{name: {ratings, log_loss, accuracy, macro_f1, quadratic_kappa, baselines}}``.
      Macro-F1 is over the ratings that occur or are predicted. Kappa (Cohen 1968) is None where
      only one rating occurs in truth and prediction, which leaves it undefined.
    """
    losses = measure_response_losses(probabilities, labels)
    if not np.isfinite(losses).all():
        raise ValueError("a response without a rating cannot be scored")
    others = {}
    if baselines is not None and words is not None:
        others = {name: baselines.predict(name, words) for name in NAMES}
    properties = {}
    for at, name in enumerate(names):
        given = labels[:, at] >= 0
        if not given.any():
            continue
        truth = labels[given, at]
        properties[name] = {
            "ratings": int(given.sum()),
            **_score_property(probabilities[given, at], truth),
            "baselines": {
                other: _score_property(values[given, at], truth) for other, values in others.items()
            },
        }
    low, high = np.percentile(bootstrap_mean(losses), [2.5, 97.5])
    return {
        "rows": len(labels),
        "ratings": int((labels >= 0).sum()),
        "log_loss": float(losses.mean()),
        "log_loss_ci95": [float(low), float(high)],
        "accuracy": measure_accuracy(probabilities, labels),
        "macro_f1": _mean([part["macro_f1"] for part in properties.values()]),
        "quadratic_kappa": _mean([part["quadratic_kappa"] for part in properties.values()]),
        "baselines": {
            other: {
                "log_loss": float(measure_response_losses(values, labels).mean()),
                "accuracy": measure_accuracy(values, labels),
                "macro_f1": _mean(
                    [part["baselines"][other]["macro_f1"] for part in properties.values()]
                ),
            }
            for other, values in others.items()
        },
        "properties": properties,
    }


def measure_accuracy(probabilities: FloatArray, labels: np.ndarray) -> float:
    """Mean over responses of the share of their ratings that are right."""
    given = labels >= 0
    hits = (probabilities.argmax(axis=-1) == labels) & given
    return float((hits.sum(axis=1) / np.maximum(given.sum(axis=1), 1)).mean())


def _score_property(probabilities: FloatArray, truth: np.ndarray) -> dict[str, Any]:
    from sklearn.metrics import cohen_kappa_score, f1_score

    predicted = probabilities.argmax(axis=-1)
    seen = np.union1d(truth, predicted)
    chosen = probabilities[np.arange(len(truth)), truth]
    kappa = None
    if len(seen) > 1:
        scale = np.arange(probabilities.shape[-1])
        kappa = float(cohen_kappa_score(truth, predicted, weights="quadratic", labels=scale))
    return {
        "log_loss": float(-np.log(np.maximum(chosen, np.finfo(np.float64).eps)).mean()),
        "accuracy": float((predicted == truth).mean()),
        "macro_f1": float(f1_score(truth, predicted, average="macro", labels=seen)),
        "quadratic_kappa": kappa,
    }


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


@dataclass(frozen=True)
class RatingBaselines:
    """Each property's shares of the ratings, and a logistic regression on lengths alone.

    Attributes:
      shares: ``[H, C]``; the majority is the largest of each row.
      mean, scale: of the two features, log(1 + words) of prompt and response.
      coefficients: ``[H, C, 2]``; intercepts: ``[H, C]``.
    """

    shares: FloatArray
    mean: FloatArray
    scale: FloatArray
    coefficients: FloatArray
    intercepts: FloatArray

    @classmethod
    def fit(cls, words: np.ndarray, labels: np.ndarray, num_classes: int) -> "RatingBaselines":
        """Fits on training responses.

        Args:
          words: words of prompt and response ``[n, 2]``.
          labels: ``[n, H]``.
          num_classes: ratings of the scale.
        """
        from sklearn.linear_model import LogisticRegression

        features = np.log1p(np.asarray(words, np.float64))
        mean, scale = features.mean(axis=0), features.std(axis=0)
        scale[scale == 0] = 1.0
        scaled = np.clip((features - mean) / scale, -_LARGEST_FEATURE, _LARGEST_FEATURE)
        heads = labels.shape[1]
        shares = np.zeros((heads, num_classes))
        coefficients = np.zeros((heads, num_classes, 2))
        intercepts = np.zeros((heads, num_classes))
        for head in range(heads):
            given = labels[:, head] >= 0
            truth = labels[given, head]
            # One more of each, so that a rating that never occurs keeps a small probability.
            counts = np.bincount(truth, minlength=num_classes) + 1.0
            shares[head] = counts / counts.sum()
            intercepts[head] = np.log(shares[head])
            seen = np.unique(truth)
            if len(seen) > 1:
                model = LogisticRegression(C=1.0, max_iter=1000).fit(scaled[given], truth)
                weights, biases = model.coef_, model.intercept_
                if len(seen) == 2:  # scikit-learn keeps the second class alone
                    weights = np.concatenate([-weights / 2, weights / 2])
                    biases = np.concatenate([-biases / 2, biases / 2])
                coefficients[head, seen] = weights
                # Ratings that never occur keep the distance that their share has.
                level = np.log(shares[head, seen]).mean() - biases.mean()
                intercepts[head, seen] = biases + level
        return cls(shares, mean, scale, coefficients, intercepts)

    def predict(self, name: str, words: np.ndarray) -> FloatArray:
        """Probabilities ``[n, H, C]`` of one of `NAMES` for word counts ``[n, 2]``."""
        if name == "majority":
            return np.tile(self.shares, (len(words), 1, 1))
        if name != "length":
            raise ValueError(f"no baseline {name!r}; there are {', '.join(NAMES)}")
        features = (np.log1p(np.asarray(words, np.float64)) - self.mean) / self.scale
        features = np.clip(features, -_LARGEST_FEATURE, _LARGEST_FEATURE)
        logits = np.einsum("nf,hcf->nhc", features, self.coefficients) + self.intercepts
        return to_rating_probabilities(logits.reshape(len(words), -1), len(self.shares))

    def save(self, path: Path) -> None:
        """Writes JSON, whole or not at all."""
        content = {name: value.tolist() for name, value in vars(self).items()}
        write_durably(path, (json.dumps(content, indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: Path) -> "RatingBaselines":
        """Reads what `save` wrote.

        Raises:
          InputError: no such file, or another content.
        """
        remedy = "train the run again"
        content = read_json(path, remedy)
        try:
            parts = {name: np.array(content[name], np.float64) for name in cls.__dataclass_fields__}
        except (KeyError, ValueError, TypeError) as error:
            raise InputError(str(path), f"is not of a multi-task run ({error})", remedy) from error
        return cls(**parts)
