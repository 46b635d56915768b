"""Which rows train and which are held out.

Everything is decided by hashes of (seed, prompt group) or (seed, id), so the same rows are held
out however the file is sorted.
"""

import hashlib
import heapq

import numpy as np

from pref_jax.data.arena import Comparisons
from pref_jax.errors import InputError

SPLITS = ("grouped", "random")


def split_rows(
    comparisons: Comparisons,
    *,
    split: str = "grouped",
    valid_fraction: float = 0.1,
    seed: int = 0,
    fold: int | None = None,
    folds: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Splits the rows of one file into training and held-out rows.

    Args:
      comparisons: the file.
      split: ``grouped``: no prompt on both sides; ``random``: rows one by one, the paper's way,
        which leaks repeated prompts.
      valid_fraction: share of the rows to hold out, above 0 and below 1; a grouped split comes as
        near as whole groups allow without going over it.
      seed: another seed, another split.
      fold: with ``folds``, which fold of a grouped cross-validation is held out, from 0; every row
        is held out in exactly one fold.
      folds: how many folds, at least 2.

    Returns:
      Two ascending int64 arrays of row numbers (from 0): training rows, held-out rows. Neither is
      empty.

    Raises:
      InputError: an unknown split, or one that these rows do not allow.
    """
    if split not in SPLITS:
        raise InputError(
            "--config.data.split", f"unknown split {split!r}", f"use {' or '.join(SPLITS)}"
        )
    if fold is not None:
        if split != "grouped":
            raise InputError(
                "--config.data.fold",
                f"cross-validation is grouped, but data.split is {split!r}",
                "set --config.data.split=grouped",
            )
        held_out = _fold_rows(comparisons, seed, fold, folds)
    else:
        if isinstance(valid_fraction, bool) or not 0 < valid_fraction < 1:
            raise InputError(
                "--config.data.valid_fraction",
                f"{valid_fraction} is not a share above 0 and below 1",
                "use 0.1, or name a file in data.valid",
            )
        target = min(max(round(valid_fraction * len(comparisons)), 1), len(comparisons) - 1)
        if split == "random":
            held_out = _random_rows(comparisons, target, seed)
        else:
            held_out = _grouped_rows(comparisons, target, seed)
    rows = np.arange(len(comparisons))
    return rows[~held_out], rows[held_out]


def _random_rows(comparisons: Comparisons, target: int, seed: int) -> np.ndarray:
    if len(comparisons) < 2:
        raise InputError(comparisons.path, "one row cannot be split", _OWN_FILE)
    keys = (_hash(seed, name.encode()) for name in comparisons.iterate_ids())
    order = np.argsort(np.fromiter(keys, np.uint64, len(comparisons)), kind="stable")
    held_out = np.zeros(len(comparisons), dtype=bool)
    held_out[order[:target]] = True
    return held_out


def _grouped_rows(comparisons: Comparisons, target: int, seed: int) -> np.ndarray:
    _, sizes, member, order = _groups(comparisons, seed)
    taken = np.zeros(len(sizes), dtype=bool)
    total = 0
    for group in order:
        if total + sizes[group] <= target:
            taken[group] = True
            total += int(sizes[group])
            if total == target:
                break
    if not total:
        # Every group is larger than what was asked for: the least of them comes nearest.
        taken[order[np.argmin(sizes[order])]] = True
    return taken[member]


def _fold_rows(comparisons: Comparisons, seed: int, fold: int, folds: int | None) -> np.ndarray:
    if folds is None or folds < 2:
        raise InputError(
            "--config.data.folds",
            f"data.fold is set, but data.folds is {folds}",
            "say how many folds there are, at least 2",
        )
    if not 0 <= fold < folds:
        raise InputError(
            "--config.data.fold", f"there is no fold {fold} of {folds}", f"use 0 to {folds - 1}"
        )
    unique, sizes, member, order = _groups(comparisons, seed)
    if len(unique) < folds:
        raise InputError(
            "--config.data.folds",
            f"{comparisons.path} has {len(unique)} different prompts, too few for {folds} folds",
            f"use at most {len(unique)} folds",
        )
    # Largest group first, always into the smallest fold: folds differ by little more than a row.
    order = order[np.argsort(-sizes[order], kind="stable")]
    heap = [(0, number) for number in range(folds)]
    fold_of_group = np.empty(len(unique), dtype=np.int64)
    for group in order:
        rows, number = heapq.heappop(heap)
        fold_of_group[group] = number
        heapq.heappush(heap, (rows + int(sizes[group]), number))
    return fold_of_group[member] == fold


_OWN_FILE = "add rows, or name a file of held-out rows in --config.data.valid"


def _groups(
    comparisons: Comparisons, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Distinct groups, rows of each, group of each row, and the seed's order of the groups."""
    unique, member, sizes = np.unique(comparisons.groups, return_inverse=True, return_counts=True)
    if len(unique) < 2:
        raise InputError(
            comparisons.path,
            "all rows have the same prompt: no group can be held out",
            _OWN_FILE,
        )
    keys = (_hash(seed, group.tobytes()) for group in unique)
    order = np.argsort(np.fromiter(keys, np.uint64, len(unique)), kind="stable")
    return unique, sizes, member, order


def _hash(seed: int, data: bytes) -> int:
    digest = hashlib.blake2b(data, digest_size=8, key=str(seed).encode()[:64]).digest()
    return int.from_bytes(digest, "little")
