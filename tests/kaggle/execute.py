"""Runs the cells of a notebook one after the other, as Kaggle does; needs nothing but Python.

    python tests/kaggle/execute.py NOTEBOOK '{"MAX_HOURS": 0.5}'

The second argument gives other values to names of the first code cell, right after it.
"""

import json
import sys


def main(path: str, values: str) -> None:
    with open(path, encoding="utf-8") as file:
        notebook = json.load(file)
    names: dict[str, object] = {"__name__": "__main__"}
    waiting = json.loads(values)
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        exec(compile("".join(cell["source"]), f"{path}:{cell['id']}", "exec"), names)
        names.update(waiting)
        waiting = {}


if __name__ == "__main__":
    main(*sys.argv[1:3])
