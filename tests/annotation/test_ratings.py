"""A file of annotations becomes an array; what is wrong in it is named by its line."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rig import call

from pref_jax.annotation.properties import load_properties
from pref_jax.annotation.ratings import read_ratings
from pref_jax.errors import InputError

PROPERTIES = load_properties()
FIRST = {"id": "7", "side": "a", "ratings": {"polite": 3, "novelty": 0}}


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    return path


def test_missing_ratings_are_minus_one_and_order_is_kept(tmp_path: Path) -> None:
    second = {"id": "007", "side": "b", "ratings": {"polite": None, "funny": 2}}
    found = read_ratings(write(tmp_path / "a.jsonl", FIRST, "", second), PROPERTIES)
    assert found.ids == ("7", "007") and found.sides == ("a", "b")
    assert found.values.dtype == np.int8 and found.values.shape == (2, 20)
    named = [dict(zip(PROPERTIES.rating_names, row, strict=True)) for row in found.values.tolist()]
    assert named[0].pop("polite") == 3 and named[0].pop("novelty") == 0
    assert named[1].pop("funny") == 2
    assert {value for row in named for value in row.values()} == {-1}


def test_simulated_annotations_are_read(tmp_path: Path) -> None:
    assert call("simulate", "--rows=5", "--test_rows=1", f"--output={tmp_path}").code == 0
    found = read_ratings(tmp_path / "annotations.jsonl", PROPERTIES)
    assert len(found) == 10 and found.sides == ("a", "b") * 5
    assert found.values.min() >= 0 and found.values.max() <= 3


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ('{"id": "8"', ":2: is not JSON"),
        ("[1]", ":2: is not a JSON object"),
        ('{"id": "8", "id": "9", "side": "a", "ratings": {}}', "duplicate key: id"),
        ({**FIRST, "id": True}, ":2: its id is True"),
        ({**FIRST, "id": "8", "side": "c"}, ":2: its side is 'c'"),
        ({"id": "8", "side": "a"}, ":2: it has no object 'ratings'"),
        ({**FIRST, "id": "8", "ratings": {"kind": 1}}, ":2: rating 'kind' is not of the set"),
        ({**FIRST, "id": "8", "ratings": {"polite": 4}}, ":2: polite is 4"),
        ({**FIRST, "id": "8", "ratings": {"polite": -1}}, ":2: polite is -1"),
        ({**FIRST, "id": "8", "ratings": {"polite": 1.0}}, ":2: polite is 1.0"),
        ({**FIRST, "id": "8", "ratings": {"polite": True}}, ":2: polite is True"),
        (FIRST, ":2: id 7, side a is there already (line 1)"),
        ({**FIRST, "id": 7}, ":2: id 7, side a is there already (line 1)"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: Any, named: str) -> None:
    path = write(tmp_path / "a.jsonl", FIRST, line)
    with pytest.raises(InputError, match=re.escape(named)) as caught:
        read_ratings(path, PROPERTIES)
    assert str(caught.value).startswith(f"{path}:2: ")


def test_no_file_and_no_lines(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_ratings(tmp_path / "none.jsonl", PROPERTIES)
    with pytest.raises(InputError, match="holds no ratings"):
        read_ratings(write(tmp_path / "a.jsonl"), PROPERTIES)
