"""Notebooks are the cells of their sources."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pref_jax.kaggle.notebook import build_notebook

SOURCE = '''"""Left out."""

# %% [markdown]
# # Title
# Two lines.

# %%
import time
HOURS = 8.5  # of nine
PLACE = None

# %%
print(f"{HOURS} {PLACE}")
'''


def test_cells_and_values(tmp_path: Path) -> None:
    (tmp_path / "source.py").write_text(SOURCE)
    text = build_notebook(tmp_path / "source.py", {"HOURS": 1.5, "PLACE": "/a b"})
    notebook = json.loads(text)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    kinds = [cell["cell_type"] for cell in notebook["cells"]]
    assert kinds == ["markdown", "code", "code"]
    sources = ["".join(cell["source"]) for cell in notebook["cells"]]
    assert sources[0] == "# Title\nTwo lines."
    assert sources[1] == "import time\nHOURS = 1.5  # of nine\nPLACE = '/a b'"
    assert sources[2] == 'print(f"{HOURS} {PLACE}")'
    assert len({cell["id"] for cell in notebook["cells"]}) == 3
    for cell in notebook["cells"][1:]:
        assert cell["outputs"] == [] and cell["execution_count"] is None


def test_a_value_that_nothing_takes_is_a_defect(tmp_path: Path) -> None:
    (tmp_path / "source.py").write_text(SOURCE)
    with pytest.raises(ValueError, match="SPEED"):
        build_notebook(tmp_path / "source.py", {"SPEED": 1})
