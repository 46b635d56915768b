"""Scores of predicted probabilities, each with the definition that makes it reproducible.

Shapes: ``probabilities`` is [n, 3] in the order of `CLASSES`, ``labels`` is [n] with 0, 1 or 2.
A row whose judge could not call a tie (``tie_allowed`` false) scores only A against B: the tie's
probability is taken out and the rest renormalised, in every score below.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

CLASSES = ("winner_model_a", "winner_model_b", "winner_tie")
CALIBRATION_BINS = 15
BOOTSTRAP_SAMPLES = 1000
BOOTSTRAP_SEED = 0
# Lower edges, in words of both responses together.
LENGTH_BUCKETS = (0, 50, 150, 400, 1000)
MOST_TURNS = 4

FloatArray = npt.NDArray[np.float64]


def condition_on_ties(
    probabilities: npt.ArrayLike, tie_allowed: npt.ArrayLike | None = None
) -> FloatArray:
    """Rows as they are scored: without the tie where it was not allowed, each summing to 1.

    A row that puts everything on a forbidden tie says nothing about A and B and gets 1/2 each.

    Raises:
      ValueError: not [n, 3], no rows, not finite, negative, or a row that does not sum to 1
        within 1e-3.
    """
    values = np.array(probabilities, np.float64)
    if values.ndim != 2 or values.shape[1] != len(CLASSES) or not len(values):
        raise ValueError(f"probabilities have shape {values.shape}, not [rows, 3] with rows > 0")
    if not np.isfinite(values).all() or (values < 0).any():
        raise ValueError("probabilities must be finite and not negative")
    if np.abs(values.sum(1) - 1).max() > 1e-3:
        raise ValueError("the probabilities of a row must sum to 1")
    if tie_allowed is not None:
        forbidden = ~_column(tie_allowed, len(values), "tie_allowed").astype(bool)
        values[forbidden, 2] = 0
        empty = forbidden & (values.sum(1) == 0)
        values[empty, :2] = 0.5
    return values / values.sum(1, keepdims=True)


def measure_row_losses(
    probabilities: npt.ArrayLike, labels: npt.ArrayLike, tie_allowed: npt.ArrayLike | None = None
) -> FloatArray:
    """``-ln p(label)`` of each row [n], in nats.

    Probabilities are clipped to [eps, 1 - eps], eps = 2.2e-16 (the float64 epsilon), as
    `sklearn.metrics.log_loss` does for float64 input.
    """
    values = condition_on_ties(probabilities, tie_allowed)
    target = _check_labels(labels, len(values))
    if tie_allowed is not None and (~np.asarray(tie_allowed, bool) & (target == 2)).any():
        raise ValueError("a row is labelled a tie although its tie_allowed is 0")
    epsilon = np.finfo(np.float64).eps
    chosen = np.clip(values[np.arange(len(values)), target], epsilon, 1 - epsilon)
    return np.asarray(-np.log(chosen))


def bootstrap_mean(
    values: npt.ArrayLike, *, samples: int = BOOTSTRAP_SAMPLES, seed: int = BOOTSTRAP_SEED
) -> FloatArray:
    """Means of ``samples`` resamples of the rows, with replacement: [samples].

    Rows are taken as independent; prompts that repeat make the true interval a little wider.
    """
    rows = np.asarray(values, np.float64)
    random = np.random.default_rng(seed)
    draws = (rows[random.integers(len(rows), size=len(rows))].mean() for _ in range(samples))
    return np.fromiter(draws, np.float64, samples)


def compare_row_losses(first: npt.ArrayLike, second: npt.ArrayLike) -> dict[str, Any]:
    """Paired bootstrap of two models on the same rows.

    Args:
      first, second: losses of the same rows in the same order, [n] each.

    Returns:
      ``rows``; ``difference`` (mean of first - second: below zero, the first is better);
      ``ci95`` (percentile interval); ``p_value`` (two-sided: twice the smaller share of resampled
      differences on one side of zero, never below 2 / (resamples + 1)).
    """
    gap = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    if gap.ndim != 1 or not len(gap):
        raise ValueError("paired losses need the same rows, and at least one")
    means = bootstrap_mean(gap)
    one_side = min(int((means <= 0).sum()), int((means >= 0).sum()))
    return {
        "rows": len(gap),
        "difference": float(gap.mean()),
        "ci95": _interval(means),
        "p_value": min(1.0, 2 * (one_side + 1) / (len(means) + 1)),
    }


def bin_reliability(
    probabilities: npt.ArrayLike,
    labels: npt.ArrayLike,
    tie_allowed: npt.ArrayLike | None = None,
    *,
    bins: int = CALIBRATION_BINS,
) -> list[dict[str, float]]:
    """Stated confidence against hit rate, in equal-width bins of the predicted class's probability.

    Returns:
      One dict per bin that holds a row: ``rows``, ``confidence`` (mean probability of the
      predicted class), ``accuracy``.
    """
    values = condition_on_ties(probabilities, tie_allowed)
    target = _check_labels(labels, len(values))
    confidence = values.max(1)
    hit = values.argmax(1) == target
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    return [
        {
            "rows": int((index == i).sum()),
            "confidence": float(confidence[index == i].mean()),
            "accuracy": float(hit[index == i].mean()),
        }
        for i in np.unique(index)
    ]


def measure_calibration_error(bins: Sequence[Mapping[str, float]]) -> float:
    """Expected calibration error (Guo et al. 2017): mean |confidence - accuracy|, by rows."""
    rows = sum(part["rows"] for part in bins)
    gaps = (part["rows"] * abs(part["confidence"] - part["accuracy"]) for part in bins)
    return float(sum(gaps) / rows)


def evaluate(
    probabilities: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    tie_allowed: npt.ArrayLike | None = None,
    baselines: Mapping[str, npt.ArrayLike] | None = None,
    words: npt.ArrayLike | None = None,
    turns: npt.ArrayLike | None = None,
    sources: Sequence[str | None] | None = None,
) -> dict[str, Any]:
    """Everything ``launch/evaluate.py`` writes, as plain Python numbers.

    Args:
      probabilities, labels, tie_allowed: see the module.
      baselines: name -> probabilities [n, 3], scored on the same rows by the same rule.
      words: words of the two responses together [n], for the slices by length.
      turns: turns of the prompt [n]; sources: where each row came from, None where unknown.

    Returns:
      ``rows, log_loss, log_loss_ci95`` (percentile bootstrap over rows, fixed seed),
      ``accuracy, f1{class, macro}`` (0 for a class that is neither predicted nor present),
      ``confusion`` (3 x 3 counts, rows the truth), ``calibration_error`` (15 equal-width bins),
      ``baselines{name: log loss}``, ``slices{kind: {slice: {rows, log_loss}}}``.
    """
    values = condition_on_ties(probabilities, tie_allowed)
    target = _check_labels(labels, len(values))
    losses = measure_row_losses(values, target, tie_allowed)
    confusion = np.zeros((len(CLASSES), len(CLASSES)), np.int64)
    np.add.at(confusion, (target, values.argmax(1)), 1)
    hits = np.diag(confusion)
    seen = confusion.sum(0) + confusion.sum(1)
    f1 = np.divide(2.0 * hits, seen, out=np.zeros(len(CLASSES)), where=seen > 0)
    scores = {name: float(score) for name, score in zip(CLASSES, f1, strict=True)}
    return {
        "rows": len(values),
        "log_loss": float(losses.mean()),
        "log_loss_ci95": _interval(bootstrap_mean(losses)),
        "accuracy": float(hits.sum() / len(values)),
        "f1": {**scores, "macro": float(f1.mean())},
        "confusion": confusion.tolist(),
        "calibration_error": measure_calibration_error(
            bin_reliability(values, target, tie_allowed)
        ),
        "baselines": {
            name: float(measure_row_losses(other, target, tie_allowed).mean())
            for name, other in (baselines or {}).items()
        },
        "slices": slice_losses(losses, words=words, turns=turns, sources=sources),
    }


def slice_losses(
    losses: npt.ArrayLike,
    *,
    words: npt.ArrayLike | None = None,
    turns: npt.ArrayLike | None = None,
    sources: Sequence[str | None] | None = None,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Mean loss per ``length``, ``turns`` and ``source``; only the kinds that are given.

    Every row is in exactly one slice of a kind, so the slices weighted by their rows add up to
    the whole. Slices without rows are left out; sources that are all unknown give no kind.
    """
    rows = np.asarray(losses, np.float64)
    slices = {}
    if words is not None:
        bucket = np.searchsorted(LENGTH_BUCKETS, _column(words, len(rows), "words"), "right") - 1
        slices["length"] = _group(rows, bucket.tolist(), [_name_bucket(int(i)) for i in bucket])
    if turns is not None:
        count = np.minimum(_column(turns, len(rows), "turns").astype(int), MOST_TURNS).tolist()
        names = [f"{n}+" if n == MOST_TURNS else str(n) for n in count]
        slices["turns"] = _group(rows, count, names)
    if sources is not None and any(source is not None for source in sources):
        names = ["unknown" if source is None else str(source) for source in sources]
        _column(names, len(rows), "sources")
        slices["source"] = _group(rows, names, names)
    return slices


def _name_bucket(index: int) -> str:
    low = LENGTH_BUCKETS[index]
    last = index == len(LENGTH_BUCKETS) - 1
    return f"{low}+ words" if last else f"{low}-{LENGTH_BUCKETS[index + 1] - 1} words"


def _group(losses: FloatArray, keys: list[Any], names: list[str]) -> dict[str, dict[str, Any]]:
    members: dict[Any, list[int]] = {}
    for row, key in enumerate(keys):
        members.setdefault(key, []).append(row)
    return {
        names[rows[0]]: {"rows": len(rows), "log_loss": float(losses[rows].mean())}
        for _, rows in sorted(members.items())
    }


def _interval(means: FloatArray) -> list[float]:
    return [float(bound) for bound in np.percentile(means, [2.5, 97.5])]


def _column(values: npt.ArrayLike, rows: int, name: str) -> npt.NDArray[Any]:
    column = np.asarray(values)
    if column.shape != (rows,):
        raise ValueError(f"{name} has shape {column.shape}, not ({rows},)")
    return column


def _check_labels(labels: npt.ArrayLike, rows: int) -> npt.NDArray[np.int64]:
    target = _column(labels, rows, "labels").astype(np.int64)
    if not np.isin(target, (0, 1, 2)).all():
        raise ValueError("labels must be 0, 1 or 2")
    return target
