"""The folds of an ablation: rows whose judges could call a tie are held out, the others never."""

import csv
import dataclasses
import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa

from pref_jax.data.arena import Comparisons, iterate_cells
from pref_jax.data.split import split_rows
from pref_jax.errors import InputError
from pref_jax.files import read_json, write_durably, write_json

_GROUP = "prompt_group"
_DIGESTS = "digests.json"  # of the files beside it
_KINDS = ("valid", "train", "all")


def check_rows(comparisons: Comparisons, folds: int) -> None:
    """Looks whether the rows that could be a tie make as many folds.

    Raises:
      InputError: they do not, or there are none.
    """
    prompts = len(np.unique(join_groups(comparisons)[comparisons.tie_allowed]))
    if not prompts:
        raise InputError(
            comparisons.path, "no row could be a tie", "write 1 into tie_allowed where it could"
        )
    if prompts < folds:
        raise InputError(
            "--folds",
            f"{comparisons.path} has {prompts} different prompts whose rows could be a tie, too "
            f"few for {folds} folds",
            f"use at most {prompts}" if prompts > 1 else "give more rows",
        )


def write_folds(comparisons: Comparisons, folds: int, folder: Path) -> None:
    """Writes ``train0.csv`` (rows that could be a tie), ``all0.csv`` (also the others) and
    ``valid0.csv``, and so on, and what `check_folds` knows them by.

    No prompt is on both sides, whichever rows train: prompts are the same up to case, width and
    white space, or where a column ``prompt_group`` says so. The rows are enough
    (`check_rows`).
    """
    allowed = comparisons.tie_allowed
    groups = join_groups(comparisons)
    ties = comparisons.table.filter(pa.array(allowed))
    at = ties.column_names.index("group")
    ties = ties.set_column(at, "group", pa.array(groups[allowed], pa.uint64()))
    rows = dataclasses.replace(comparisons, table=ties)
    cells = list(iterate_cells(comparisons.path))
    folder.mkdir(parents=True, exist_ok=True)
    for fold in range(folds):
        _, held_out = split_rows(rows, fold=fold, folds=folds)
        valid = np.zeros(len(allowed), bool)
        valid[np.flatnonzero(allowed)[held_out]] = True
        others = ~np.isin(groups, groups[valid])
        for kind, chosen in zip(_KINDS, (valid, others & allowed, others), strict=True):
            _write(folder / f"{kind}{fold}.csv", [cells[row] for row in np.flatnonzero(chosen)])
    paths = [folder / f"{kind}{fold}.csv" for fold in range(folds) for kind in _KINDS]
    write_json(folder / _DIGESTS, {path.name: _digest(path) for path in paths})


def check_folds(folder: Path, fold: int) -> None:
    """Looks whether the files of a fold are those that `write_folds` wrote.

    Variants are compared row by row: all of them have to be of the same rows. Folds follow from the
    data, so those that are made again are the ones that earlier parts have read.

    Raises:
      InputError: one has changed, or is missing.
    """
    remedy = f"remove its folder {folder} and type the same command again"
    written = read_json(folder / _DIGESTS, remedy)
    for path in (folder / f"{kind}{fold}.csv" for kind in _KINDS):
        if not path.is_file():
            raise InputError(str(path), "is missing", remedy)
        if _digest(path) != written.get(path.name):
            raise InputError(str(path), "has changed since the folds were made", remedy)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def join_groups(comparisons: Comparisons) -> np.ndarray:
    """A number for each row ``[rows]``, equal where prompts or ``prompt_group`` are equal."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    known: dict[str, int] = {}
    named = np.empty(len(comparisons), np.int64)
    for row, cells in enumerate(iterate_cells(comparisons.path)):
        label = str(cells.get(_GROUP) or f"\0{row}")
        named[row] = known.setdefault(label, len(known))
    unique, texts = np.unique(comparisons.groups, return_inverse=True)
    edges = coo_matrix(
        (np.ones(len(texts)), (texts, len(unique) + named)), shape=[len(unique) + len(known)] * 2
    )
    return connected_components(edges, directed=False)[1][texts].astype(np.uint64)


def _write(path: Path, rows: list[dict]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:  # Parquet has lists where CSV has their JSON
        writer.writerow({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()})
    write_durably(path, text.getvalue().encode("utf-8", errors="surrogatepass"))
