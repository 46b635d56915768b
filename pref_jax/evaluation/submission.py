"""The competition's answer file: ``id`` and three probabilities per row, in the input's order."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pref_jax.errors import InputError
from pref_jax.evaluation.metrics import CLASSES, condition_on_ties
from pref_jax.files import check_output_file, write_durably

DIGITS = 8
_UNITS = 10**DIGITS
COLUMNS = ("id", *CLASSES)
# In a workdir: the same of the rows that its run held out in cross-validation.
OUT_OF_FOLD_FILE = "out_of_fold.csv"


def round_probabilities(probabilities: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """The numbers that a submission prints, [n, 3]: 8 digits, above 0, each row summing to 1.

    Scoring these, not the unrounded ones, makes ``evaluate`` agree with the file to the last digit.
    """
    return _count_units(probabilities) / _UNITS


def write_submission(path: str | Path, ids: Sequence[str], probabilities: npt.ArrayLike) -> None:
    """Writes the file whole or not at all; what was there before survives a failure.

    Args:
      path: the CSV; its folder must exist.
      ids: one per row, written exactly as typed in the input (quoted where CSV needs it).
      probabilities: [n, 3], rows summing to 1.

    Raises:
      InputError: the path is a directory, or its folder is missing or cannot be written.
      ValueError: an id twice, another number of ids than rows, or no probabilities.
    """
    target = check_output_file(path)
    units = _count_units(probabilities) if len(ids) else np.zeros((0, 3), np.int64)
    if len(units) != len(ids) or len(set(ids)) != len(ids):
        raise ValueError(f"{len(set(ids))} distinct ids of {len(ids)} for {len(units)} rows")
    lines = [",".join(COLUMNS)]
    lines += [
        ",".join([quote_cell(name), *(f"0.{unit:0{DIGITS}d}" for unit in row)])
        for name, row in zip(ids, units.tolist(), strict=True)
    ]
    write_durably(target, ("\n".join(lines) + "\n").encode())


def read_submission(path: str | Path) -> tuple[list[str], npt.NDArray[np.float64]]:
    """Ids and probabilities [n, 3] of a file in the submission's format.

    Raises:
      InputError: no such file, other columns, a cell that is no probability, a row that does not
        sum to 1 within 1e-4, or an id twice; the row is named.
    """
    where = str(path)
    remedy = "pass a file written by launch/predict.py"
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = list(csv.reader(file))
    except OSError as error:
        raise InputError(where, error.strerror or "cannot be read", remedy) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(where, "is not a CSV file in UTF-8", remedy) from error
    if not rows or tuple(rows[0]) != COLUMNS:
        raise InputError(where, f"does not have the columns {','.join(COLUMNS)}", remedy)
    values = np.zeros((len(rows) - 1, 3))
    seen: dict[str, int] = {}
    for number, row in enumerate(rows[1:], 1):
        try:
            name, *cells = row
            values[number - 1] = [float(cell) for cell in cells]
        except ValueError as error:
            raise InputError(f"{where}:{number}", "is not an id and 3 numbers", remedy) from error
        line = values[number - 1]
        if not (np.isfinite(line) & (line >= 0)).all():
            raise InputError(f"{where}:{number}", "holds a number that is no probability", remedy)
        if abs(line.sum() - 1) > 1e-4:
            raise InputError(f"{where}:{number}", "probabilities do not sum to 1", remedy)
        if name in seen:
            what = f"the id {name!a} stands in row {seen[name]} already"
            raise InputError(f"{where}:{number}", what, "keep one of the two rows")
        seen[name] = number
    return list(seen), values


def quote_cell(text: str) -> str:
    """A CSV cell that every reader gives back unchanged.

    Python's csv module leaves a lone carriage return and outer blanks bare, which others split
    at or strip.
    """
    if text and text == text.strip() and not set(text) & set(',"\r\n'):
        return text
    return '"' + text.replace('"', '""') + '"'


def _count_units(probabilities: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Probabilities as whole units of 1e-8; the largest takes up the rounding."""
    values = condition_on_ties(probabilities)
    units = np.maximum(np.rint(values * _UNITS).astype(np.int64), 1)
    units[np.arange(len(units)), units.argmax(1)] += _UNITS - units.sum(1)
    return units
