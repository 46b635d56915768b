"""The answer file: every row and id kept, digits that add up, nothing harmed by a failure."""

import csv
import os
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pref_jax import files
from pref_jax.errors import InputError, RunError
from pref_jax.evaluation.submission import (
    COLUMNS,
    read_submission,
    round_probabilities,
    write_submission,
)


def _read(path: Path) -> list[list[str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def test_ids_come_back_as_typed_and_in_order(tmp_path: Path) -> None:
    ids = ["007", "7", " 7", "a,b", 'say "x"', "two\nlines", "cr\ronly", "1e3", "é", "", "-0"]
    write_submission(tmp_path / "s.csv", ids, np.full((len(ids), 3), 1 / 3))
    rows = _read(tmp_path / "s.csv")
    assert rows[0] == list(COLUMNS)
    assert [row[0] for row in rows[1:]] == ids
    assert read_submission(tmp_path / "s.csv")[0] == ids


@given(st.lists(st.floats(0, 1e6), min_size=3, max_size=3).filter(lambda row: sum(row) > 1e-9))
def test_printed_numbers_are_positive_and_sum_to_one(row: list[float]) -> None:
    exact = np.array([row]) / sum(row)
    printed = [Decimal(f"{value:.8f}") for value in round_probabilities(exact)[0]]
    assert sum(printed) == 1 and min(printed) > 0
    assert np.abs(np.array(printed, float) - exact).max() <= 3e-8


def test_file_holds_eight_digits_of_the_rounded_numbers(tmp_path: Path) -> None:
    probabilities = np.array([[1, 0, 0], [1 / 3, 1 / 3, 1 / 3], [1e-12, 0.5, 0.5]], np.float32)
    write_submission(tmp_path / "s.csv", ["1", "2", "3"], probabilities)
    cells = [row[1:] for row in _read(tmp_path / "s.csv")[1:]]
    assert cells[0] == ["0.99999998", "0.00000001", "0.00000001"]
    assert all(len(cell) == 10 for row in cells for cell in row)
    assert (np.array(cells, float) == round_probabilities(probabilities)).all()
    assert (read_submission(tmp_path / "s.csv")[1] == np.array(cells, float)).all()


def test_no_rows_give_a_header_only(tmp_path: Path) -> None:
    write_submission(tmp_path / "s.csv", [], np.zeros((0, 3)))
    assert _read(tmp_path / "s.csv") == [list(COLUMNS)]


def test_places_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    for path, what in (
        (tmp_path, "is a directory"),
        (tmp_path / "none" / "s.csv", "does not exist"),
        (tmp_path / "file" / "s.csv", "not a directory"),
        (tmp_path / ("n" * 300), "File name too long"),
        ("", "no file named"),
        (os.devnull, "not a regular file"),
    ):
        with pytest.raises(InputError, match=what):
            write_submission(path, ["1"], [[0.2, 0.3, 0.5]])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]
    assert (tmp_path / "file").read_text() == "kept"


def test_a_failure_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "s.csv"
    write_submission(target, ["1"], [[0.2, 0.3, 0.5]])
    before = target.read_bytes()
    with pytest.raises(ValueError):
        write_submission(target, ["1", "1"], [[0.2, 0.3, 0.5]] * 2)
    with pytest.raises(ValueError):
        write_submission(target, ["1"], [[np.nan, 0.3, 0.5]])

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(RunError, match="No space left"):
        write_submission(target, ["2"], [[0.2, 0.3, 0.5]])
    assert target.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["s.csv"]


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("", ""),
        ("id,a,b,c\n1,0.2,0.3,0.5\n", ""),
        (",".join(COLUMNS) + "\n1,0.2,0.3,0.5\n2,0.2,0.3\n", ":2"),
        (",".join(COLUMNS) + "\n1,0.2,0.3,x\n", ":1"),
        (",".join(COLUMNS) + "\n1,0.2,0.3,0.6\n", ":1"),
        (",".join(COLUMNS) + "\n1,0.2,0.3,0.5\n1,0.2,0.3,0.5\n", ":2"),
        (",".join(COLUMNS) + "\n1,nan,0.3,0.5\n", ":1"),
    ],
)
def test_wrong_files_are_refused_with_the_row(tmp_path: Path, text: str, where: str) -> None:
    path = tmp_path / "s.csv"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        read_submission(path)
    assert str(caught.value).startswith(f"{path}{where}: ")
