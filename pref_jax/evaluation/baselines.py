"""What a model must beat to have learned anything: uniform, the labels' shares, lengths alone.

Fitted on training rows once and kept as JSON in the workdir, so that a file can be judged later
without the training data. All three answer in two steps, P(tie) and P(A | no tie): a row whose
judge could not call a tie teaches only the second.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pref_jax.errors import InputError
from pref_jax.files import read_json, write_durably

NAMES = ("uniform", "prior", "length")
FILE = "baselines.json"
# Inverse strength of the penalty and the choice of features: 5 folds of the training part of the
# real benchmark, grouped by prompt. Without |log a - log b| (a tie is likelier between equals)
# the same folds lose 0.013.
_INVERSE_PENALTY = 0.1
# Standardised features are cut here, so that a text longer than all seen cannot force a 0 or 1.
_LARGEST_FEATURE = 4.0
# A regression of five numbers; its memory and time should not grow with the data.
_MOST_ROWS = 100_000
_FEATURES = 5
_MOST = 1e15  # of a number in the file

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Logit:
    """A binary logistic regression over length features; all-zero coefficients are a constant."""

    mean: list[float]
    scale: list[float]
    coefficients: list[float]
    intercept: float

    def predict(self, features: FloatArray) -> FloatArray:
        """Probability of the event, [n], for features [n, 5]."""
        scaled = _scale(features, np.array(self.mean), np.array(self.scale))
        return 1 / (1 + np.exp(-(scaled @ np.array(self.coefficients) + self.intercept)))

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> "Logit":
        """Takes it out of JSON.

        Raises:
          ValueError, TypeError, KeyError: it is none.
        """
        names = ("mean", "scale", "coefficients")
        lists = [[_finite(number) for number in content[name]] for name in names]
        if any(len(numbers) != _FEATURES for numbers in lists) or min(lists[1]) <= 0:
            raise ValueError(f"no regression of {_FEATURES} features")
        mean, scale, coefficients = lists
        return cls(mean, scale, coefficients, _finite(content["intercept"]))


@dataclass(frozen=True)
class Baselines:
    """``prior`` [3] and the two regressions of ``length``.

    Attributes:
      rows: labelled training rows they were fitted on.
      prior: shares of the labels, A, B, tie.
      tie: regression of a tie, over rows that could be one.
      first: regression of A winning, over rows that are no tie.
    """

    rows: int
    prior: tuple[float, float, float]
    tie: Logit
    first: Logit

    @classmethod
    def fit(
        cls,
        words: npt.ArrayLike,
        labels: npt.ArrayLike,
        tie_allowed: npt.ArrayLike | None = None,
    ) -> "Baselines":
        """Fits on training rows; a class that never occurs keeps a small probability.

        Args:
          words: words of prompt, response A, response B, [n, 3] (see `count_words`).
          labels: 0 A, 1 B, 2 tie, -1 unlabelled (left out), [n].
          tie_allowed: false where the judge could not call a tie, [n]; absent: all could.
        """
        target = np.asarray(labels).astype(int)
        allowed = np.ones(len(target), bool) if tie_allowed is None else np.asarray(tie_allowed)
        features = measure_features(words)
        can_tie = (target >= 0) & allowed.astype(bool)
        decided = (target == 0) | (target == 1)
        tie_rate = _rate(target[can_tie] == 2, nothing_known=1 / 3)
        first_rate = _rate(target[decided] == 0, nothing_known=1 / 2)
        return cls(
            rows=int((target >= 0).sum()),
            prior=((1 - tie_rate) * first_rate, (1 - tie_rate) * (1 - first_rate), tie_rate),
            tie=_fit_logit(features[can_tie], target[can_tie] == 2, tie_rate),
            first=_fit_logit(features[decided], target[decided] == 0, first_rate),
        )

    def predict(self, name: str, words: npt.ArrayLike) -> FloatArray:
        """Probabilities [n, 3] of one of `NAMES` for rows with these word counts [n, 3]."""
        features = measure_features(words)
        if name == "uniform":
            return np.full((len(features), 3), 1 / 3)
        if name == "prior":
            return np.tile(np.array(self.prior), (len(features), 1))
        if name == "length":
            tie, first = self.tie.predict(features), self.first.predict(features)
            return np.stack([(1 - tie) * first, (1 - tie) * (1 - first), tie], 1)
        raise ValueError(f"no baseline {name!r}; there are {', '.join(NAMES)}")

    def predict_all(self, words: npt.ArrayLike) -> dict[str, FloatArray]:
        """All of `NAMES`, ready for `metrics.evaluate(..., baselines=...)`."""
        return {name: self.predict(name, words) for name in NAMES}

    def save(self, path: Path) -> None:
        """Writes JSON, whole or not at all."""
        content = {
            "rows": self.rows,
            "prior": list(self.prior),
            "tie": vars(self.tie),
            "first": vars(self.first),
        }
        write_durably(path, (json.dumps(content, indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: Path) -> "Baselines":
        """Reads what `save` wrote.

        Raises:
          InputError: no such file, or not written by `save`.
        """
        remedy = "train the run again, or take the file from where it was trained"
        try:
            content = read_json(path, remedy)
            first, second, tie = (_finite(value) for value in content["prior"])
            if min(first, second, tie) < 0 or not 0.99 < first + second + tie < 1.01:
                raise ValueError("no shares")
            return cls(
                rows=int(_finite(content["rows"])),
                prior=(first, second, tie),
                tie=Logit.read(content["tie"]),
                first=Logit.read(content["first"]),
            )
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise InputError(str(path), "is not a file of fitted baselines", remedy) from error


def sample_rows(rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The rows to fit on: all, or so many of them that more would not change the fit."""
    if len(rows) <= _MOST_ROWS:
        return rows
    chosen = np.random.default_rng(0).choice(len(rows), _MOST_ROWS, replace=False, shuffle=False)
    return rows[np.sort(chosen)]


def _finite(value: Any) -> float:
    """``value``, if nothing that is computed with it can overflow."""
    if not isinstance(value, int | float) or not abs(value) < _MOST:
        raise ValueError("a number is missing or out of range")
    return float(value)


def count_words(comparisons: Any, rows: npt.ArrayLike | None = None) -> npt.NDArray[np.int64]:
    """Words (separated by white space) of prompt, response A and response B: [n, 3].

    Args:
      comparisons: `pref_jax.data.arena.Comparisons`; rows: which of them, in this order.
    """
    import pyarrow as pa

    table = comparisons.table.select(["prompt", "response_a", "response_b"])
    wanted = np.arange(len(table)) if rows is None else np.asarray(rows)
    counts = np.zeros((len(wanted), 3), np.int64)
    order = np.argsort(wanted, kind="stable")
    ascending = wanted[order]
    start = 0
    # A small batch of texts at a time: the table is memory-mapped and may not fit.
    for batch in table.to_batches(max_chunksize=256):
        low, high = np.searchsorted(ascending, (start, start + len(batch)))
        if low < high:
            chosen = batch.take(pa.array(ascending[low:high] - start))
            for side in range(3):
                texts = chosen.column(side).to_pylist()
                counts[order[low:high], side] = [len(text.split()) for text in texts]
        start += len(batch)
    return counts


def count_response_words(comparisons: Any) -> npt.NDArray[np.int64]:
    """Words of prompt and response of each response [2 * rows, 2], A's before B's."""
    prompt, first, second = count_words(comparisons).T
    both = np.stack([first, second], axis=1).reshape(-1)
    return np.stack([np.repeat(prompt, 2), both], axis=1)


def measure_features(words: npt.ArrayLike) -> FloatArray:
    """[n, 5]: log(1 + words) of A, of B, their difference, its size, and the prompt's."""
    counts = np.asarray(words, np.float64)
    if counts.ndim != 2 or counts.shape[1] != 3:
        raise ValueError(f"words have shape {counts.shape}, not [rows, 3]")
    prompt, first, second = np.log1p(counts).T
    return np.stack([first, second, first - second, np.abs(first - second), prompt], 1)


def _rate(event: npt.NDArray[np.bool_], nothing_known: float) -> float:
    """Share of the event; half a row stands in for one that always or never happens."""
    if not len(event):
        return nothing_known
    floor = 0.5 / (len(event) + 1)
    return float(np.clip(event.mean(), floor, 1 - floor))


def _fit_logit(features: FloatArray, event: npt.NDArray[np.bool_], rate: float) -> Logit:
    if len(np.unique(event)) < 2:
        width = features.shape[1]
        constant = float(np.log(rate / (1 - rate)))
        return Logit([0.0] * width, [1.0] * width, [0.0] * width, constant)
    from sklearn.linear_model import LogisticRegression

    mean, scale = features.mean(0), features.std(0)
    scale = np.where(scale > 1e-9, scale, 1.0)
    model = LogisticRegression(C=_INVERSE_PENALTY, max_iter=1000)
    model.fit(_scale(features, mean, scale), event)
    return Logit(mean.tolist(), scale.tolist(), model.coef_[0].tolist(), float(model.intercept_[0]))


def _scale(features: FloatArray, mean: FloatArray, scale: FloatArray) -> FloatArray:
    return np.clip((features - mean) / scale, -_LARGEST_FEATURE, _LARGEST_FEATURE)
