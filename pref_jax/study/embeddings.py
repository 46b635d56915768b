"""Logistic regression over frozen embeddings, lengths and cosines: what to beat."""

import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from pref_jax.data.arena import Comparisons
from pref_jax.errors import InputError
from pref_jax.evaluation.baselines import count_words, measure_features
from pref_jax.evaluation.metrics import measure_row_losses
from pref_jax.experiment import Experiment, find_backbone
from pref_jax.models.bert import Encoder, EncoderConfig
from pref_jax.models.classifiers import mean_tokens

_TEXTS = ("prompt", "response_a", "response_b")
_TOKENS = 4096  # of a forward pass
_INVERSE_PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0)
_USUAL_INVERSE_PENALTY = 0.1  # where there are too few rows to choose by
_NUMBERS = 10  # lengths and cosines, behind the vectors


def embed(config: ConfigDict, comparisons: Comparisons) -> np.ndarray:
    """Unit vectors of prompt, response A and response B, float32 ``[rows, 3, D]``.

    The mean over the tokens of the encoder that a recipe starts from, not trained; of each text as
    many tokens as the recipe reads of a sequence.
    """
    experiment = Experiment(config, find_backbone(config, comparisons))
    architecture, tokenizer = experiment.backbone.architecture, experiment.tokenizer
    assert isinstance(architecture, EncoderConfig)
    base = experiment.load_base()
    params = experiment.initial_params()["encoder"] if base is None else base
    encoder = Encoder(architecture, longest=config.input.max_length, every_token=True)

    @jax.jit
    def forward(params: Any, ids: jax.Array, segments: jax.Array) -> jax.Array:
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        states: Any = encoder.apply(
            {"params": params}, ids, jnp.zeros_like(ids), positions, segments
        )
        means = mean_tokens(states, segments, 1)[:, 0]
        return means / jnp.maximum(jnp.linalg.norm(means, axis=-1, keepdims=True), 1e-9)

    sequences: list[np.ndarray] = []
    for batch in comparisons.table.select(list(_TEXTS)).to_batches(256):
        columns = [tokenizer.encode(column.to_pylist()) for column in batch.columns]
        for texts in zip(*columns, strict=True):
            for ids in texts:
                kept = ids[: config.input.max_length - 2]
                sequences.append(np.array([tokenizer.cls_id, *kept, tokenizer.sep_id], np.int32))
    lengths = np.array([len(ids) for ids in sequences])
    vectors = np.zeros((len(sequences), architecture.hidden_size), np.float32)
    longest = config.input.max_length
    widths = [longest // 8, longest // 4, longest // 2, longest]  # few shapes, few compilations
    bucket = np.searchsorted(widths, lengths)
    for number, width in enumerate(widths):
        members = np.flatnonzero(bucket == number)
        size = max(1, _TOKENS // max(width, 1))
        for start in range(0, len(members), size):
            chosen = members[start : start + size]
            ids = np.full((size, width), tokenizer.pad_id, np.int32)
            segments = np.zeros((size, width), np.int32)
            for row, member in enumerate(chosen):
                ids[row, : lengths[member]] = sequences[member]
                segments[row, : lengths[member]] = 1
            vectors[chosen] = np.asarray(forward(params, ids, segments))[: len(chosen)]
    return vectors.reshape(len(comparisons), 3, -1)


def make_features(vectors: np.ndarray, comparisons: Comparisons) -> np.ndarray:
    """Float64 ``[rows, 3 D + 10]``: A - B and its size, the prompt; lengths; cosines."""
    prompt, first, second = np.moveaxis(vectors.astype(np.float64), 1, 0)
    to_first, to_second = (prompt * first).sum(-1), (prompt * second).sum(-1)
    between = (first * second).sum(-1)
    gap = to_first - to_second
    cosines = np.stack([to_first, to_second, gap, np.abs(gap), between], axis=1)
    lengths = measure_features(count_words(comparisons))
    return np.hstack([first - second, np.abs(first - second), prompt, lengths, cosines])


def fit_and_predict(
    features: np.ndarray, labels: np.ndarray, groups: np.ndarray, others: np.ndarray
) -> np.ndarray:
    """Probabilities ``[n, 3]`` of ``others``; the penalty is chosen by folds of the training rows.

    Where these are too few to make folds of, it is the usual one; where all have the same label,
    there is nothing to regress on. Half a row stands in for a label that did not occur.

    Args:
      features: of the training rows. labels: 0, 1, 2. groups: of their prompts.
      others: features of the rows to answer.
    """
    from sklearn.compose import make_column_transformer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def answer(model: Any, rows: np.ndarray) -> np.ndarray:
        probabilities = np.full((len(rows), 3), 0.5 / (len(labels) + 1))
        probabilities[:, model.classes_] += model.predict_proba(rows)
        return probabilities / probabilities.sum(axis=1, keepdims=True)

    def measure(model: Any, rows: np.ndarray, truth: np.ndarray) -> float:
        return -float(measure_row_losses(answer(model, rows), truth).mean())

    if len(np.unique(labels)) < 2:
        counts = np.bincount(labels, minlength=3) + 0.5
        return np.tile(counts / counts.sum(), (len(others), 1))
    # Parts of unit vectors stay small: the penalty falls on them, not on the ten numbers.
    scaled = make_column_transformer(
        (StandardScaler(), slice(-_NUMBERS, None)), remainder="passthrough"
    )
    model = make_pipeline(scaled, LogisticRegression(C=_USUAL_INVERSE_PENALTY, max_iter=2000))
    splits = _split(labels, groups)
    if not splits:
        return answer(model.fit(features, labels), others)
    choices = {"logisticregression__C": _INVERSE_PENALTIES}
    search = GridSearchCV(model, choices, scoring=measure, cv=splits)
    search.fit(features, labels)
    return answer(search.best_estimator_, others)


def _split(labels: np.ndarray, groups: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Up to three folds, no group on both sides; none that would learn from one label only."""
    from sklearn.model_selection import GroupKFold

    folds = min(3, len(np.unique(groups)))
    if folds < 2:
        return []
    splits = GroupKFold(folds).split(labels, groups=groups)
    return [(train, valid) for train, valid in splits if len(np.unique(labels[train])) > 1]


def save_vectors(path: Path, ids: list[str], vectors: np.ndarray) -> None:
    """Writes vectors with the ids that they are of."""
    with open(path, "wb") as file:
        np.savez(file, ids=np.array(ids), vectors=vectors)


def load_vectors(path: Path, ids: list[str]) -> np.ndarray:
    """The vectors of these rows, in this order.

    Raises:
      InputError: no such file, or not written by `save_vectors` for these rows.
    """
    try:
        with np.load(path) as content:
            place = {name: row for row, name in enumerate(content["ids"].tolist())}
            return content["vectors"][[place[name] for name in ids]]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        remedy = f"remove {path.parent} and type the same command again"
        raise InputError(str(path), "does not hold the vectors of these rows", remedy) from error
