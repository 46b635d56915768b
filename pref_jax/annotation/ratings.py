"""Ratings as a multi-task model trains on them, read from a file of annotations."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pref_jax.annotation.properties import PropertySet
from pref_jax.bucket import fetch_file
from pref_jax.errors import InputError
from pref_jax.files import unique_keys

MISSING = -1
_CHECK = "check"
_MOST = 1e15  # of what can be counted or paid
SIDES = ("a", "b")


@dataclasses.dataclass(frozen=True)
class Ratings:
    """Ratings of n responses, in the order of the file.

    Attributes:
      ids: of the comparisons, as text.
      sides: ``a`` or ``b`` each; no pair of id and side is there twice.
      values: int8 [n, heads], heads in the order of the property set; -1 where there is no rating.
    """

    ids: tuple[str, ...]
    sides: tuple[str, ...]
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def align(self, ids: Sequence[str]) -> np.ndarray:
        """Ratings of the two responses of each of these comparisons: int8 [2 * rows, heads].

        Response ``2 * row`` is A's, the next one B's; -1 where there is no rating. What is rated
        and not among ``ids`` is left out.
        """
        row_of = {str(name): row for row, name in enumerate(ids)}
        labels = np.full((2 * len(ids), self.values.shape[1]), MISSING, np.int8)
        for name, side, values in zip(self.ids, self.sides, self.values, strict=True):
            if name in row_of:
                labels[2 * row_of[name] + SIDES.index(side)] = values
        return labels


def read_ratings(path: str | Path, properties: PropertySet) -> Ratings:
    """Reads the ``id``, ``side`` and ``ratings`` of each line; a rating may be absent or null.

    Args:
      path: JSON lines, as ``launch/annotate.py`` and ``launch/simulate.py`` write them.
      properties: what was rated; its names and its scale are all that is allowed.

    Raises:
      InputError: no such file, nothing in it, or a line that is wrong (named ``FILE:LINE``).
    """
    columns = {name: column for column, name in enumerate(properties.rating_names)}
    lines: dict[tuple[str, str], int] = {}
    values = []
    for number, entry in read_lines(path):
        where = f"{path}:{number}"
        place = identify(where, entry)
        if place in lines:
            raise InputError(
                where,
                f"id {place[0]}, side {place[1]} is there already (line {lines[place]})",
                "keep one of them",
            )
        lines[place] = number
        row = [MISSING] * len(columns)
        ratings = entry.get("ratings")
        if not isinstance(ratings, dict):
            raise InputError(where, "it has no object 'ratings'", "mend or remove the line")
        for name, rating in ratings.items():
            if name not in columns:
                raise InputError(
                    where,
                    f"rating {name!r} is not of the set {properties.name!r}",
                    "name the file of properties that was rated",
                )
            if rating is None:
                continue
            if type(rating) is not int or not 0 <= rating < len(properties.scale):
                raise InputError(
                    where,
                    f"{name} is {rating!r}",
                    f"ratings are whole numbers from 0 to {len(properties.scale) - 1}",
                )
            row[columns[name]] = rating
        values.append(row)
    if not lines:
        raise InputError(str(path), "holds no ratings", "make some with launch/annotate.py")
    ids, sides = zip(*lines, strict=True)
    return Ratings(ids, sides, np.array(values, np.int8))


def read_lines(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number, counted from 1, and object of each line that is not blank.

    Raises:
      InputError: no such file, or a line that is not a JSON object or has a key twice.
    """
    try:
        content = Path(fetch_file(path)).read_bytes()
    except OSError as error:
        reason = (error.strerror or "cannot be read").lower()
        raise InputError(str(path), reason, "check the path") from error
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            yield number, parse_line(f"{path}:{number}", line)


def parse_line(where: str, line: bytes) -> dict[str, Any]:
    """The object on a line.

    Raises:
      InputError: it is not a JSON object, a key is in it twice, or it was changed since the
        annotation wrote it.
    """
    try:
        entry = json.loads(line, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise InputError(where, f"is not JSON ({error})", "mend or remove the line") from error
    if not isinstance(entry, dict):
        raise InputError(where, "is not a JSON object", "mend or remove the line")
    if _CHECK in entry and entry != seal(entry):
        raise InputError(
            where,
            f"was changed since it was written: its {_CHECK} does not fit",
            f"remove the line; where the change is meant, remove its {_CHECK} alone",
        )
    return entry


def seal(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The entry with a check sum over all else at its end, by which a flipped bit is found."""
    content = {name: value for name, value in entry.items() if name != _CHECK}
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return {**content, _CHECK: digest[:16]}


def check_entry(where: str, entry: dict[str, Any], *, rated: bool) -> None:
    """Checks a line of a file that the annotation goes on with: one whose entry is ``rated``, or
    one of a failure.

    Raises:
      InputError: it was not written by the annotation, or was changed since.
    """
    identify(where, entry)
    for name in ("ratings", "query", "tokens"):
        if name not in entry and not (rated and name == "ratings"):
            continue
        part = entry.get(name)
        if not isinstance(part, dict) or any(
            value is not None and (type(value) is not int or value < 0) for value in part.values()
        ):
            raise InputError(
                where, f"its {name} are not whole numbers by name", "mend or remove the line"
            )
    for name in ("attempts", "cost"):
        value = entry.get(name, 0)
        if type(value) not in (int, float) or not 0 <= value < _MOST:
            raise InputError(where, f"its {name} is {value!r}", "mend or remove the line")


def identify(where: str, entry: dict[str, Any]) -> tuple[str, str]:
    """Id, as text, and side of an entry.

    Raises:
      InputError: one of them is absent or cannot be one.
    """
    identity, side = entry.get("id"), entry.get("side")
    if type(identity) not in (str, int) or identity == "":
        raise InputError(where, f"its id is {identity!r}", "give the id of the comparison")
    if side not in SIDES:
        raise InputError(where, f"its side is {side!r}", "use a or b")
    return str(identity), side
