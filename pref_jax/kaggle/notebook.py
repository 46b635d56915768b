"""Notebooks from Python files whose cells begin with ``# %%``, text cells with ``# %% [markdown]``.

The form is nbformat 4.5, which needs no more than JSON.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_CELL = re.compile(r"^# %%(?: \[(markdown)\])?$", re.MULTILINE)


def build_notebook(source: Path, values: Mapping[str, Any]) -> str:
    """The text of the notebook.

    Args:
      source: the Python file; what stands before its first cell is left out.
      values: of names that the first code cell assigns at the start of a line; each is replaced.

    Raises:
      ValueError: such a name is not assigned there.
    """
    _, *parts = _CELL.split(source.read_text(encoding="utf-8"))
    cells = []
    for number, (kind, text) in enumerate(zip(parts[::2], parts[1::2], strict=True)):
        cell: dict[str, Any] = {"cell_type": kind or "code", "id": f"cell-{number}", "metadata": {}}
        if kind:
            text = re.sub(r"^# ?", "", text, flags=re.MULTILINE)
        else:
            cell |= {"execution_count": None, "outputs": []}
        cells.append({**cell, "source": text.strip("\n")})
    first = next(cell for cell in cells if cell["cell_type"] == "code")
    for name, value in values.items():
        found = re.search(rf"^{name} = [^#\n]*?(?=\s*(#|$))", first["source"], re.MULTILINE)
        if found is None:
            raise ValueError(f"{source}: its first cell assigns no {name}")
        start, end = found.span()
        first["source"] = f"{first['source'][:start]}{name} = {value!r}{first['source'][end:]}"
    for cell in cells:
        cell["source"] = cell["source"].splitlines(keepends=True)
    language = {"name": "python", "file_extension": ".py", "mimetype": "text/x-python"}
    kernel = {"name": "python3", "language": "python", "display_name": "Python 3"}
    content = {
        "cells": cells,
        "metadata": {"kernelspec": kernel, "language_info": language},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"
