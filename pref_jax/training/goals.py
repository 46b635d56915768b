"""The two things a run can learn: preferences between two answers, or ratings of one.

A goal knows which samples train and which are held out, how held-out logits are judged, and what a
finished run leaves behind. Everything else of a run is the same.
"""

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from ml_collections import ConfigDict

from pref_jax import hosts
from pref_jax.annotation.properties import PropertySet
from pref_jax.annotation.ratings import read_ratings
from pref_jax.config import rating_data, training_data
from pref_jax.data.arena import read_comparisons
from pref_jax.data.batches import Samples
from pref_jax.data.split import split_rows
from pref_jax.errors import InputError
from pref_jax.evaluation.baselines import FILE as BASELINES_FILE
from pref_jax.evaluation.baselines import (
    Baselines,
    count_response_words,
    count_words,
    sample_rows,
)
from pref_jax.evaluation.metrics import measure_row_losses
from pref_jax.evaluation.predict import calibrate, to_probabilities
from pref_jax.evaluation.predictions import FILE as PREDICTIONS_FILE
from pref_jax.evaluation.predictions import Predictions
from pref_jax.evaluation.rating_metrics import (
    RatingBaselines,
    evaluate_ratings,
    measure_accuracy,
    measure_response_losses,
    to_rating_probabilities,
)
from pref_jax.evaluation.submission import OUT_OF_FOLD_FILE, write_submission
from pref_jax.experiment import Experiment
from pref_jax.files import write_json
from pref_jax.training.teachers import read_teachers

logger = logging.getLogger(__name__)


class TrainingData:
    """Training and held-out rows.

    Attributes:
      train, valid: comparisons; the same object where rows are held out of one file.
      train_rows, valid_rows: row numbers in them.
      ratings: of their responses, where the run learns these.
    """

    def __init__(self, config: ConfigDict, *, labelled: bool | None = True) -> None:
        """Reads and splits.

        Args:
          config: checked config.
          labelled: whether winners are needed; None: used where they are there.
        """
        section = config.data
        self.train = read_comparisons(training_data(config), labelled=labelled)
        if section.valid is not None:
            if section.fold is not None:
                raise InputError(
                    "--config.data.fold",
                    "data.valid names the held-out rows already",
                    "set one of them",
                )
            self.valid = read_comparisons(section.valid, labelled=labelled)
            self.train_rows = np.arange(len(self.train))
            self.valid_rows = np.arange(len(self.valid))
        else:
            self.valid = self.train
            self.train_rows, self.valid_rows = split_rows(
                self.train,
                split=section.split,
                valid_fraction=section.valid_fraction,
                seed=config.seed,
                fold=section.fold,
                folds=section.folds if section.fold is not None else None,
            )

    @property
    def digests(self) -> dict[str, str]:
        """Content hashes of the files."""
        return {"train": self.train.digest, "valid": self.valid.digest}


class Goal(Protocol):
    """What a run learns.

    Attributes:
      digests: content hashes of everything that it learns from.
      train_numbers, valid_numbers: of samples.
    """

    digests: dict[str, str]
    train_numbers: np.ndarray
    valid_numbers: np.ndarray

    def make_samples(self) -> tuple[Samples, Samples]:
        """Training and held-out samples; the same object where they are of one file."""
        ...

    def fit_baselines(self, workdir: Path) -> None:
        """Fits on training rows what the model has to beat; the leader keeps it."""
        ...

    def measure(self, logits: np.ndarray) -> Mapping[str, float]:
        """``loss`` and ``accuracy`` of held-out logits."""
        ...

    def conclude(self, workdir: Path, logits: np.ndarray) -> dict[str, Any]:
        """Judges the best checkpoint's logits and writes what stays; parts of ``result.json``."""
        ...

    def describe(self, samples: np.ndarray) -> str:
        """Ids of samples, for messages."""
        ...


def read_data(config: ConfigDict) -> TrainingData:
    """The rows that a config names."""
    if config.input.layout != "response":
        return TrainingData(config)
    rating_data(config)  # asked for before anything is read
    return TrainingData(config, labelled=None)


def make_goal(experiment: Experiment, data: TrainingData) -> Goal:
    """The goal of a config."""
    if experiment.properties is None:
        return PreferenceGoal(experiment, data)
    return RatingGoal(experiment, data, experiment.properties)


class PreferenceGoal:
    """P(A wins), P(B wins), P(tie) of each row."""

    def __init__(self, experiment: Experiment, data: TrainingData) -> None:
        self._experiment, self._data = experiment, data
        self._config = experiment.config
        self.digests = data.digests
        self.train_numbers, self.valid_numbers = data.train_rows, data.valid_rows
        self._teachers: np.ndarray | None = None
        if self._config.data.soft_labels is not None:
            path = self._config.data.soft_labels
            self._teachers = read_teachers(path, data.train.ids, self.train_numbers)
            learned = hashlib.sha256(self._teachers.tobytes()).hexdigest()
            self.digests = {**data.digests, "soft_labels": learned}

    def make_samples(self) -> tuple[Samples, Samples]:
        data, experiment = self._data, self._experiment
        orders = 1 if self._config.data.swap == "none" else 2
        samples = experiment.make_samples(data.train, orders=orders, teachers=self._teachers)
        return samples, samples if data.valid is data.train else experiment.make_samples(data.valid)

    def fit_baselines(self, workdir: Path) -> None:
        train, rows = self._data.train, sample_rows(self._data.train_rows)
        self._baselines = Baselines.fit(
            count_words(train, rows), train.labels[rows], train.tie_allowed[rows]
        )
        if hosts.is_leader():
            self._baselines.save(workdir / BASELINES_FILE)

    @property
    def _labels(self) -> tuple[np.ndarray, np.ndarray]:
        valid, rows = self._data.valid, self._data.valid_rows
        return valid.labels[rows], valid.tie_allowed[rows]

    def measure(self, logits: np.ndarray) -> Mapping[str, float]:
        labels, tie_allowed = self._labels
        probabilities = to_probabilities(logits, tie_allowed=tie_allowed)
        return {
            "loss": float(measure_row_losses(probabilities, labels).mean()),
            "accuracy": float((probabilities.argmax(axis=1) == labels).mean()),
        }

    def conclude(self, workdir: Path, logits: np.ndarray) -> dict[str, Any]:
        labels, tie_allowed = self._labels
        temperature = 1.0
        if self._config.eval.calibrate:
            temperature, probabilities = calibrate(logits, labels, tie_allowed)
            if hosts.is_leader():
                write_json(workdir / "calibration.json", {"temperature": temperature})
        else:
            probabilities = to_probabilities(logits, tie_allowed=tie_allowed)
        predictions = Predictions.collect(self._data.valid, probabilities, self._data.valid_rows)
        if hosts.is_leader():
            predictions.write(workdir / PREDICTIONS_FILE)
            if self._config.data.fold is not None:
                write_submission(workdir / OUT_OF_FOLD_FILE, predictions.ids, probabilities)
        valid = predictions.evaluate(self._baselines)
        return {"valid": valid, "baselines": valid["baselines"], "temperature": temperature}

    def describe(self, samples: np.ndarray) -> str:
        train = self._data.train
        return _list([train.id_at(int(sample) % len(train)) for sample in samples[:9]])


class RatingGoal:
    """The ratings of each response, one head per property (the paper's multi-task model)."""

    def __init__(self, experiment: Experiment, data: TrainingData, properties: PropertySet) -> None:
        """Raises: InputError: no training or no held-out response is rated."""
        self._experiment, self._data, self._properties = experiment, data, properties
        path = rating_data(experiment.config)
        ratings = read_ratings(path, properties)
        self._train_labels = ratings.align(data.train.ids)
        self._valid_labels = self._train_labels
        if data.valid is not data.train:
            self._valid_labels = ratings.align(data.valid.ids)
        # What is learned of the file: reasons and costs may change.
        learned = hashlib.sha256(self._train_labels.tobytes() + self._valid_labels.tobytes())
        self.digests = {**data.digests, "annotations": learned.hexdigest()}
        self.train_numbers = _rated(data.train_rows, self._train_labels)
        self.valid_numbers = _rated(data.valid_rows, self._valid_labels)
        for numbers, what in (
            (self.train_numbers, "training"),
            (self.valid_numbers, "held-out"),
        ):
            if not len(numbers):
                raise InputError(
                    str(path),
                    f"it rates no response of the {what} rows",
                    "give ratings of this file's ids, or hold out another share with "
                    "--config.data.valid_fraction",
                )
        _warn_of_unrated(properties, self._train_labels[self.train_numbers])
        logger.info(
            "%d rated responses to train on, %d held out",
            len(self.train_numbers),
            len(self.valid_numbers),
        )

    def make_samples(self) -> tuple[Samples, Samples]:
        data, make = self._data, self._experiment.make_samples
        samples = make(data.train, ratings=self._train_labels)
        if data.valid is data.train:
            return samples, samples
        return samples, make(data.valid, ratings=self._valid_labels)

    def fit_baselines(self, workdir: Path) -> None:
        labels = self._train_labels[self.train_numbers]
        words = count_response_words(self._data.train)[self.train_numbers]
        self._baselines = RatingBaselines.fit(words, labels, len(self._properties.scale))
        if hosts.is_leader():
            self._baselines.save(workdir / BASELINES_FILE)

    def measure(self, logits: np.ndarray) -> Mapping[str, float]:
        labels = self._valid_labels[self.valid_numbers]
        probabilities = to_rating_probabilities(logits, labels.shape[1])
        return {
            "loss": float(measure_response_losses(probabilities, labels).mean()),
            "accuracy": measure_accuracy(probabilities, labels),
        }

    def conclude(self, workdir: Path, logits: np.ndarray) -> dict[str, Any]:
        labels = self._valid_labels[self.valid_numbers]
        valid = evaluate_ratings(
            to_rating_probabilities(logits, labels.shape[1]),
            labels,
            self._properties.rating_names,
            baselines=self._baselines,
            words=count_response_words(self._data.valid)[self.valid_numbers],
        )
        losses = {name: part["log_loss"] for name, part in valid["baselines"].items()}
        return {"valid": valid, "baselines": losses}

    def describe(self, samples: np.ndarray) -> str:
        ids = self._data.train.ids
        return _list([f"{ids[sample // 2]} {'ab'[sample % 2]}" for sample in samples[:9]])


def _warn_of_unrated(properties: PropertySet, labels: np.ndarray) -> None:
    names = np.array(properties.rating_names)
    unrated = names[(labels < 0).all(axis=0)].tolist()
    if unrated:
        logger.warning(
            "no training response is rated by %s: %s learn nothing; if another set was rated, name "
            "its file with --config.data.properties",
            _list(unrated),
            "their heads" if len(unrated) > 1 else "its head",
        )


def _rated(rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
    numbers = np.stack([2 * rows, 2 * rows + 1], axis=1).reshape(-1)
    return numbers[(labels[numbers] >= 0).any(axis=1)]


def _list(names: list[str]) -> str:
    return ", ".join(names[:8]) + (" ..." if len(names) > 8 else "")
