"""Notebooks are the cells of their sources."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rig import REPOSITORY, make_rows, write_csv

from pref_jax.errors import InputError, RunError
from pref_jax.evaluation.submission import write_submission
from pref_jax.kaggle.notebook import build_notebook
from pref_jax.kaggle.scoring import check_submission

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


def run_cells(name: str, cells: slice, **values: object) -> dict[str, object]:
    """Runs some of a notebook's code cells, the first one's names given as ``values``."""
    notebook = json.loads(build_notebook(REPOSITORY / "launch" / "kaggle" / name, {}))
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    names: dict[str, object] = {}
    exec(code[0], names)
    names.update(values)
    for cell in code[1:][cells]:
        exec(cell, names)
    return names


@pytest.mark.parametrize("foreign", ["ä".encode("latin-1"), b"\xff\xfe{", b"[1", b""])
def test_a_foreign_manifest_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, foreign: bytes
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("manifest.json").write_bytes(foreign)
    Path("test.csv").write_text("")
    with pytest.raises(SystemExit, match=r"There is no manifest\.json here or below"):
        run_cells("submit.py", slice(1), PACKAGES=None)
    Path("manifest.json").write_text('{"format": "pref_jax scoring bundle 1"}')
    assert run_cells("submit.py", slice(1), PACKAGES=None)["bundle"] == Path()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_submission_is_checked_with_the_projects_reader(tmp_path: Path, encoding: str) -> None:
    data, output = write_csv(tmp_path / "test.csv", make_rows()), tmp_path / "out.csv"
    text = data.read_text(encoding="utf-8").replace("id,", "id ,", 1)
    data.write_text(text, encoding=encoding)
    ids = [str(row["id"]) for row in make_rows()]
    write_submission(output, ids, [[0.2, 0.3, 0.5]] * 6)
    assert check_submission(str(data), str(output)) == 6
    for wrong in (ids[1:], [*ids[1:], ids[0]]):
        write_submission(output, wrong, [[0.2, 0.3, 0.5]] * len(wrong))
        with pytest.raises(RunError, match=r"out\.csv: rows of .* are missing or in another order"):
            check_submission(str(data), str(output))
    output.write_text(output.read_text().replace("0.2", "0.20001", 1))
    with pytest.raises((RunError, InputError), match=r"out\.csv"):
        check_submission(str(data), str(output))


def test_an_attached_run_is_taken_over_after_an_interrupted_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs, working = tmp_path / "input", tmp_path / "working"
    for step in ("3", "6"):
        (inputs / "earlier" / "run" / "checkpoints" / step).mkdir(parents=True)
        (inputs / "earlier" / "run" / "checkpoints" / step / "manifest.json").write_text(step)
    (inputs / "earlier" / "run" / "config.json").write_text("{}")
    values: dict[str, object] = {
        "INPUTS": str(inputs),
        "WORKING": str(working),
        "PACKAGES": None,
        "BUNDLE": str(tmp_path),
        "TRAIN": str(tmp_path / "train.csv"),
    }
    (tmp_path / "training_bundle.json").write_text('{"pythons": []}')
    for left in ("run", ".run.copying"):  # by a copy that was cut off
        (working / left / "checkpoints" / "6").mkdir(parents=True)
        (working / left / "config.json").write_text("{")

    def cut_off(source: Path, target: Path, **options: object) -> None:
        (target / "checkpoints" / "3").mkdir(parents=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.copytree", cut_off)
        with pytest.raises(KeyboardInterrupt):
            run_cells("train.py", slice(3), **values)
        assert not (working / "run").exists()
    run_cells("train.py", slice(3), **values)
    assert "which has 6 updates" in capsys.readouterr().out
    wanted = {path.relative_to(inputs / "earlier") for path in inputs.glob("earlier/run/**/*")}
    found = {path.relative_to(working) for path in working.glob("run/**/*")}
    assert found == wanted and not (working / ".run.copying").exists()
    (working / "run" / "config.json").write_text("went on")
    run_cells("train.py", slice(3), **values)
    assert "goes on where it stopped" in capsys.readouterr().out
    assert (working / "run" / "config.json").read_text() == "went on"
