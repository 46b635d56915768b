"""The folds of an ablation: rows whose judges could call a tie are held out, the others never."""

import csv
import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa

from pref_jax.data.arena import Comparisons, iterate_cells
from pref_jax.data.split import split_rows
from pref_jax.errors import InputError
from pref_jax.files import write_durably

_GROUP = "prompt_group"


def write_folds(comparisons: Comparisons, folds: int, folder: Path) -> None:
    """Writes ``train0.csv`` (rows that could be a tie), ``all0.csv`` (also the others) and
    ``valid0.csv``, and so on.

    No prompt is on both sides, whichever rows train: prompts are the same up to case, width and
    white space, or where a column ``prompt_group`` says so.

    Raises:
      InputError: too few rows could be a tie.
    """
    allowed = comparisons.tie_allowed
    groups = join_groups(comparisons)
    if not allowed.any():
        raise InputError(
            comparisons.path, "no row could be a tie", "write 1 into tie_allowed where it could"
        )
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
        for name, chosen in (("valid", valid), ("train", others & allowed), ("all", others)):
            _write(folder / f"{name}{fold}.csv", [cells[row] for row in np.flatnonzero(chosen)])


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
