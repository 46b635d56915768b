"""Soft labels: the probabilities that a teacher gave the training rows."""

import logging
from collections.abc import Sequence

import numpy as np

from pref_jax.bucket import fetch_file
from pref_jax.errors import InputError
from pref_jax.evaluation.submission import read_submission

logger = logging.getLogger(__name__)


def read_teachers(path: str, ids: Sequence[str], rows: np.ndarray) -> np.ndarray:
    """A teacher's probabilities, lined up with the rows of a data file.

    Args:
      path: a CSV with the columns that launch/predict.py writes.
      ids: of all rows of the data file, in order.
      rows: numbers of the rows that train.

    Returns:
      float32 ``[len(ids), 3]``; zeros in rows of which the file says nothing.

    Raises:
      InputError: the file is not of that form, or says nothing of any row that trains.
    """
    names, probabilities = read_submission(fetch_file(path))
    known = dict(zip(names, probabilities.astype(np.float32), strict=True))
    teachers = np.zeros((len(ids), 3), np.float32)
    found = 0
    for row in rows:
        if (values := known.get(str(ids[row]))) is not None:
            teachers[row] = values
            found += 1
    if not found:
        raise InputError(
            path,
            "none of its ids is that of a training row",
            "give the probabilities of the rows in --config.data.train",
        )
    if found < len(rows):
        logger.warning(
            "%s: %d of %d training rows have no soft label and learn from their label alone",
            path,
            len(rows) - found,
            len(rows),
        )
    return teachers
