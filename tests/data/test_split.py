"""Held-out rows: no prompt on both sides, the same rows however the file is sorted."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pref_jax.data.arena import Comparisons
from pref_jax.data.split import split_rows
from pref_jax.errors import InputError


def make_comparisons(groups: list[int] | np.ndarray, ids: list[str] | None = None) -> Comparisons:
    ids = ids or [f"id{i}" for i in range(len(groups))]
    table = pa.table({"id": ids, "group": pa.array(np.asarray(groups, dtype=np.uint64))})
    return Comparisons(path="x.csv", digest="", table=table)


@pytest.fixture
def repeated() -> Comparisons:
    """1,000 rows of 700 prompts, one of them 40 times."""
    generator = np.random.default_rng(0)
    return make_comparisons(np.r_[generator.integers(0, 700, 960), np.full(40, 999)])


@pytest.mark.parametrize("split", ["grouped", "random"])
@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.9])
def test_every_row_is_on_one_side(repeated: Comparisons, split: str, fraction: float) -> None:
    train, valid = split_rows(repeated, split=split, valid_fraction=fraction, seed=3)
    assert sorted([*train, *valid]) == list(range(1000))
    assert abs(len(valid) - 1000 * fraction) <= 1
    assert (np.diff(train) > 0).all() and (np.diff(valid) > 0).all()


def test_grouped_keeps_prompts_apart_and_random_does_not(repeated: Comparisons) -> None:
    for split, shared in (("grouped", False), ("random", True)):
        train, valid = split_rows(repeated, split=split, valid_fraction=0.1, seed=0)
        groups = repeated.groups
        assert bool(set(groups[train]) & set(groups[valid])) == shared


@pytest.mark.parametrize("fold", [None, 1])
@pytest.mark.parametrize("split", ["grouped", "random"])
def test_the_order_of_the_file_does_not_matter(
    repeated: Comparisons, split: str, fold: int | None
) -> None:
    if split == "random" and fold is not None:
        pytest.skip("folds are grouped")
    order = np.random.default_rng(1).permutation(1000)
    shuffled = make_comparisons(repeated.groups[order], [repeated.ids[i] for i in order])
    options: dict[str, Any] = {
        "split": split,
        "valid_fraction": 0.1,
        "seed": 5,
        "fold": fold,
        "folds": 4,
    }
    valid = split_rows(repeated, **options)[1]
    other = split_rows(shuffled, **options)[1]
    assert {repeated.ids[i] for i in valid} == {shuffled.ids[i] for i in other}


@pytest.mark.parametrize("split", ["grouped", "random"])
def test_the_seed_decides(repeated: Comparisons, split: str) -> None:
    first, again, other = (
        set(split_rows(repeated, split=split, seed=seed)[1].tolist()) for seed in (0, 0, 1)
    )
    assert first == again
    assert len(first & other) < 40


def test_folds_hold_out_every_row_once(repeated: Comparisons) -> None:
    parts = [split_rows(repeated, seed=2, fold=fold, folds=5) for fold in range(5)]
    assert sorted(np.concatenate([valid for _, valid in parts])) == list(range(1000))
    assert {len(valid) for _, valid in parts} <= {199, 200, 201}
    for train, valid in parts:
        assert not set(repeated.groups[train]) & set(repeated.groups[valid])


def test_groups_larger_than_the_part_asked_for() -> None:
    train, valid = split_rows(make_comparisons([1] * 6 + [2] * 4), valid_fraction=0.1)
    assert (len(train), len(valid)) == (6, 4)


@pytest.mark.parametrize(
    ("groups", "options", "message"),
    [
        ([1, 2], {"split": "group"}, "--config.data.split: unknown split 'group'"),
        ([1, 2], {"valid_fraction": 0.0}, "--config.data.valid_fraction: 0.0 is not"),
        ([1, 2], {"valid_fraction": 1.0}, "--config.data.valid_fraction: 1.0 is not"),
        ([1, 2], {"valid_fraction": float("nan")}, "--config.data.valid_fraction"),
        ([1, 2], {"valid_fraction": True}, "--config.data.valid_fraction"),
        ([1, 1], {}, "x.csv: all rows have the same prompt"),
        ([1], {}, "x.csv: all rows have the same prompt"),
        ([1], {"split": "random"}, "x.csv: one row cannot be split"),
        ([1, 2], {"fold": 0}, "--config.data.folds: data.fold is set"),
        ([1, 2], {"fold": 0, "folds": 1}, "--config.data.folds"),
        ([1, 2], {"fold": 2, "folds": 2}, "--config.data.fold: there is no fold 2 of 2"),
        ([1, 2], {"fold": -1, "folds": 2}, "--config.data.fold"),
        ([1, 2, 2], {"fold": 0, "folds": 3}, "2 different prompts, too few for 3 folds"),
        ([1, 2], {"fold": 0, "folds": 2, "split": "random"}, "cross-validation is grouped"),
    ],
)
def test_impossible_splits_are_refused(
    groups: list[int], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as caught:
        split_rows(make_comparisons(groups), **options)
    assert message in str(caught.value)
