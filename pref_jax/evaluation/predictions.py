"""Predictions of labelled rows with what is needed to judge and slice them, as one CSV.

Every run keeps that of its held-out rows (`FILE`), so that runs can be compared row by row later.
"""

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pref_jax.errors import InputError
from pref_jax.evaluation import metrics
from pref_jax.evaluation.baselines import Baselines, count_words
from pref_jax.evaluation.submission import quote_cell
from pref_jax.files import write_durably

FILE = "valid_predictions.csv"
COLUMNS = (
    "id",
    *metrics.CLASSES,
    "label",
    "tie_allowed",
    "words_prompt",
    "words_a",
    "words_b",
    "turns",
    "source",
)


@dataclass(frozen=True)
class Predictions:
    """Columns of n labelled rows.

    Attributes:
      ids: as typed. probabilities: [n, 3]. labels: [n], 0 A, 1 B, 2 tie.
      tie_allowed: [n] bool. words: [n, 3], of prompt, A, B. turns: [n], of the prompt.
      sources: None where unknown.
    """

    ids: list[str]
    probabilities: npt.NDArray[np.float64]
    labels: npt.NDArray[np.int64]
    tie_allowed: npt.NDArray[np.bool_]
    words: npt.NDArray[np.int64]
    turns: npt.NDArray[np.int64]
    sources: list[str | None]

    @classmethod
    def collect(
        cls, comparisons: Any, probabilities: npt.ArrayLike, rows: npt.ArrayLike | None = None
    ) -> "Predictions":
        """Joins probabilities [n, 3] with ``rows`` of an `arena.Comparisons` (all by default)."""
        chosen = np.arange(len(comparisons)) if rows is None else np.asarray(rows)
        ids, sources = comparisons.ids, comparisons.sources
        return cls(
            ids=[ids[i] for i in chosen],
            probabilities=np.asarray(probabilities, np.float64),
            labels=np.asarray(comparisons.labels)[chosen].astype(np.int64),
            tie_allowed=np.asarray(comparisons.tie_allowed)[chosen].astype(bool),
            words=count_words(comparisons, rows),
            turns=np.asarray(comparisons.turns)[chosen].astype(np.int64),
            sources=[None if sources is None else sources[i] for i in chosen],
        )

    def __len__(self) -> int:
        return len(self.ids)

    def evaluate(self, baselines: Baselines | None = None) -> dict[str, Any]:
        """`metrics.evaluate` of these rows, against the baselines where given."""
        return metrics.evaluate(
            self.probabilities,
            self.labels,
            tie_allowed=self.tie_allowed,
            baselines=None if baselines is None else baselines.predict_all(self.words),
            words=self.words[:, 1:].sum(1),
            turns=self.turns,
            sources=self.sources,
        )

    def measure_row_losses(self) -> npt.NDArray[np.float64]:
        """Loss of each row, [n], in nats."""
        return metrics.measure_row_losses(self.probabilities, self.labels, self.tie_allowed)

    def write(self, path: Path) -> None:
        """Writes the CSV, whole or not at all."""
        text = io.StringIO()
        text.write(",".join(COLUMNS) + "\n")
        for row in range(len(self)):
            numbers = [
                *(repr(float(value)) for value in self.probabilities[row]),
                str(self.labels[row]),
                str(int(self.tie_allowed[row])),
                *(str(count) for count in self.words[row]),
                str(self.turns[row]),
            ]
            source = self.sources[row]
            last = "" if source is None else quote_cell(source)
            text.write(",".join([quote_cell(self.ids[row]), *numbers, last]) + "\n")
        write_durably(path, text.getvalue().encode())

    @classmethod
    def read(cls, path: Path) -> "Predictions":
        """Reads what `write` wrote.

        Raises:
          InputError: no such file, or not of this form; the row is named.
        """
        remedy = "make it again with launch/train.py or launch/evaluate.py"
        try:
            with open(path, encoding="utf-8", newline="") as file:
                rows = list(csv.DictReader(file, strict=True))
        except OSError as error:
            raise InputError(str(path), error.strerror or "cannot be read", remedy) from error
        except (UnicodeDecodeError, csv.Error) as error:
            raise InputError(str(path), "is not a CSV file in UTF-8", remedy) from error
        if not rows or tuple(rows[0]) != COLUMNS:
            what = f"has no rows, or not the columns {','.join(COLUMNS)}"
            raise InputError(str(path), what, remedy)
        values = np.zeros((len(rows), 3))
        numbers = np.zeros((len(rows), 6), np.int64)
        for i, row in enumerate(rows):
            values[i], numbers[i] = _parse(row, f"{path}:{i + 1}", remedy)
        return cls(
            ids=[row["id"] for row in rows],
            probabilities=values,
            labels=numbers[:, 0],
            tie_allowed=numbers[:, 1].astype(bool),
            words=numbers[:, 2:5],
            turns=numbers[:, 5],
            sources=[row["source"] or None for row in rows],
        )


def _parse(row: Mapping[str, str], where: str, remedy: str) -> tuple[list[float], list[int]]:
    try:
        values = [float(row[name]) for name in metrics.CLASSES]
        numbers = [int(row[name]) for name in COLUMNS[4:10]]
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(where, "a cell is not a number", remedy) from error
    label, allowed = numbers[:2]
    total = sum(values)
    good = min(values) >= 0 and abs(total - 1) < 1e-3
    if not good or label not in (0, 1, 2) or (label == 2 and not allowed):
        raise InputError(where, "probabilities or label are not possible", remedy)
    return values, numbers
