"""Folds, teachers, symmetric models and their mean, through the commands."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from rig import TINY, call, predict, read_csv, train, write_csv

FAST = (
    "--config.train.learning_rate=3e-3",
    "--config.train.warmup_steps=0",
    "--config.eval.every_steps=100",
    "--config.model.symmetric",
    "--config.model.length_features",  # so that the tiny model has something to tell rows apart by
)


@pytest.fixture(scope="module")
def data(arena: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 rows to train on, 12 to answer, and the same 12 with A and B exchanged."""
    folder = tmp_path_factory.mktemp("rows")
    write_csv(folder / "train.csv", read_csv(arena / "train.csv")[:80], labels=True)
    rows = read_csv(arena / "test.csv")[:12]
    write_csv(folder / "test.csv", rows)
    exchanged = [
        {**row, "response_a": row["response_b"], "response_b": row["response_a"]} for row in rows
    ]
    write_csv(folder / "exchanged.csv", exchanged)
    return folder


@pytest.fixture(scope="module")
def folds(data: Path) -> list[Path]:
    """Two runs of the parallel layout, each with the other half held out."""
    flags = (
        *FAST,
        f"--config.data.train={data}/train.csv",
        *("--config.data.folds=2", "--config.train.epochs=1", "--config.train.ema=0.5"),
        "--config.model.pooling=cls_mean",
    )
    runs = [data / f"fold{fold}" for fold in range(2)]
    for fold, run in enumerate(runs):
        train(run, *flags, f"--config.data.fold={fold}")
    return runs


@pytest.fixture(scope="module")
def teacher(folds: list[Path]) -> Path:
    """What the folds' models said of rows that they had not seen."""
    path = folds[0].parent / "teacher.csv"
    outcome = call("ensemble", *folds, "--out_of_fold", f"--output={path}")
    assert outcome.code == 0, outcome
    return path


@pytest.fixture(scope="module")
def student(data: Path, teacher: Path) -> Path:
    """A run of the single layout, which reads both orders, taught by the folds."""
    run = data / "student"
    train(
        run,
        *FAST,
        *("--config.input.layout=single", "--config.input.budget=(0.1,0.45,0.45)"),
        *(f"--config.data.train={data}/train.csv", "--config.train.max_steps=4"),
        *(f"--config.data.soft_labels={teacher}", "--config.train.distill_weight=0.9"),
    )
    return run


def probabilities(run: Path, data: Path, *flags: str) -> np.ndarray:
    return np.array([row[1:] for row in predict(run, data, *flags)], float)


@pytest.mark.parametrize("name", ["fold0", "student"])
def test_exchanging_the_responses_exchanges_the_probabilities(
    data: Path, folds: list[Path], student: Path, name: str
) -> None:
    run = data / name
    ours = probabilities(run, data / "test.csv")
    other = probabilities(run, data / "exchanged.csv")
    assert np.abs(ours[:, 0] - ours[:, 1]).max() > 1e-3
    np.testing.assert_allclose(other[:, [1, 0, 2]], ours, atol=1e-6)
    np.testing.assert_array_equal(probabilities(run, data / "test.csv", "--swap_average"), ours)


def test_an_ensemble_is_the_weighted_mean(data: Path, folds: list[Path]) -> None:
    parts = [probabilities(run, data / "test.csv") for run in folds]
    assert np.abs(parts[0] - parts[1]).max() > 1e-3
    output = data / "mean.csv"
    outcome = call(
        *("ensemble", *folds, f"--data={data}/test.csv", f"--output={output}", "--weights=3,1")
    )
    assert outcome.code == 0, outcome
    rows = read_csv(output)
    assert [row["id"] for row in rows] == [row["id"] for row in read_csv(data / "test.csv")]
    found = np.array([[float(value) for value in list(row.values())[1:]] for row in rows])
    np.testing.assert_allclose(found, 0.75 * parts[0] + 0.25 * parts[1], atol=2e-8)


def test_joined_folds_hold_every_training_row_once(
    data: Path, folds: list[Path], teacher: Path
) -> None:
    parts = [read_csv(run / "out_of_fold.csv") for run in folds]
    assert all(parts)
    joined = {row["id"]: row for row in read_csv(teacher)}
    assert sorted(joined) == sorted(row["id"] for row in read_csv(data / "train.csv"))
    assert [joined[row["id"]] for part in parts for row in part] == [*parts[0], *parts[1]]


def test_a_student_depends_on_its_teacher(data: Path, student: Path, teacher: Path) -> None:
    content = json.loads((student / "model.json").read_text())
    assert "soft_labels" in content["data"]
    opposite = [
        {**row, "winner_model_a": row["winner_model_b"], "winner_model_b": row["winner_model_a"]}
        for row in read_csv(teacher)
    ]
    path = data / "opposite.csv"
    columns = list(opposite[0])
    lines = [",".join(columns), *(",".join(row[name] for name in columns) for row in opposite)]
    path.write_text("\n".join(lines) + "\n")
    command = (
        *FAST,
        *("--config.input.layout=single", "--config.input.budget=(0.1,0.45,0.45)"),
        *(f"--config.data.train={data}/train.csv", "--config.train.max_steps=4"),
        *(f"--config.data.soft_labels={path}", "--config.train.distill_weight=0.9"),
    )
    train(data / "misled", *command)
    moved = probabilities(data / "misled", data / "test.csv")
    assert np.abs(moved - probabilities(student, data / "test.csv")).max() > 1e-4
    # Another teacher is other data: a run cannot go on with it.
    outcome = call("train", *TINY, f"--workdir={student}", *command)
    assert outcome.code == 2 and "started with other data" in outcome.stderr, outcome


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--data={data}/test.csv", "--weights=1"), "--weights: '1' is not one number"),
        (("--data={data}/test.csv", "--weights=1,-1"), "above 0"),
        (("--data={data}/test.csv", "--out_of_fold"), "is not read with --out_of_fold"),
        (("--weights=2,1", "--out_of_fold"), "--weights: is not read with --out_of_fold"),
        (("--swap_average", "--out_of_fold"), "--swap_average: is not read with"),
        ((), "no file is named"),
    ],
)
def test_wrong_use_is_one_line(
    data: Path, folds: list[Path], flags: tuple[str, ...], words: str
) -> None:
    output = data / "refused.csv"
    typed = [flag.format(data=data) for flag in flags]
    outcome = call("ensemble", *folds, *typed, f"--output={output}")
    assert outcome.code == 2 and words in outcome.stderr, outcome
    assert outcome.stderr.count("\n") == 1 and not output.exists()


def test_the_rows_that_taught_the_runs_are_not_written_over(data: Path, folds: list[Path]) -> None:
    before = (data / "train.csv").read_bytes()
    outcome = call("ensemble", *folds, "--out_of_fold", f"--output={data}/train.csv")
    assert outcome.code == 2 and "train.csv: is the data itself" in outcome.stderr, outcome
    assert (data / "train.csv").read_bytes() == before


def test_a_fold_that_no_run_has_is_told(data: Path, folds: list[Path]) -> None:
    outcome = call("ensemble", folds[0], "--out_of_fold", f"--output={data}/half.csv")
    assert outcome.code == 0 and "of 2 folds (seed 0) no run has 1:" in outcome.stdout, outcome
    both = call("ensemble", *folds, "--out_of_fold", f"--output={data}/both.csv")
    assert both.code == 0 and "no run has" not in both.stdout, both


def test_folds_of_other_rows_are_not_joined(data: Path, folds: list[Path]) -> None:
    """The same ids may stand for other texts."""
    strange = data / "strange_fold"
    strange.mkdir()
    for name in ("config.json", "model.json", "out_of_fold.csv"):
        (strange / name).write_bytes((folds[1] / name).read_bytes())
    model = json.loads((strange / "model.json").read_text())
    model["data"]["train"] = "0" * 64
    (strange / "model.json").write_text(json.dumps(model))
    output = data / "refused.csv"
    outcome = call("ensemble", folds[0], strange, "--out_of_fold", f"--output={output}")
    assert outcome.code == 2 and "strange_fold: was trained on other data" in outcome.stderr
    assert outcome.stderr.count("\n") == 1 and not output.exists()


def test_a_run_without_a_fold_is_named(data: Path, student: Path) -> None:
    outcome = call("ensemble", student, "--out_of_fold", f"--output={data}/refused.csv")
    assert outcome.code == 2 and "out_of_fold.csv: is missing" in outcome.stderr, outcome


def test_a_teacher_of_other_rows_is_refused(data: Path, teacher: Path) -> None:
    path = data / "strange.csv"
    lines = teacher.read_text().splitlines()
    path.write_text("\n".join([lines[0], *(f"x{line}" for line in lines[1:])]) + "\n")
    outcome = call(
        "train",
        *(f"--config={Path(__file__).parents[2]}/configs/quickstart.py", *FAST),
        *("--config.model.pretrained=none", f"--config.data.train={data}/train.csv"),
        *(f"--config.data.soft_labels={path}", f"--workdir={data}/refused"),
    )
    assert outcome.code == 2 and "strange.csv: none of its ids" in outcome.stderr, outcome


@pytest.mark.parametrize("name", ["fold0", "student"])
def test_every_head_is_read_back_from_its_export(
    data: Path, folds: list[Path], student: Path, tmp_path: Path, name: str
) -> None:
    import jax

    from pref_jax.experiment import load_run
    from pref_jax.weights.exported import load_exported, write_run
    from pref_jax.weights.run import export_loaded

    run = load_run(data / name)
    export_loaded(run, tmp_path / "exported", merge=False)
    write_run(tmp_path / "exported", run, form="encoder")
    again = load_exported(tmp_path / "exported")
    assert jax.tree.structure(again.params) == jax.tree.structure(run.params)
    assert jax.tree.all(jax.tree.map(np.array_equal, again.params, run.params))
    assert again.experiment.model == run.experiment.model
