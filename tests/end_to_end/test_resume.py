"""A run that is killed, stopped, damaged or moved goes on to the same bits as one left alone."""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from rig import (
    UNSTEADY,
    UPDATES,
    call,
    count_updates,
    finish,
    read_arrays,
    read_lines,
    start,
    stop_at,
    wait_for,
)

from pref_jax.training.workdir import Workdir

KILLS = 10


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, as a kill just before its end would have left it."""
    workdir = Path(shutil.copytree(run, tmp_path / "run"))
    (workdir / "result.json").unlink()
    return workdir


def assert_same(workdir: Path, run: Path) -> None:
    """Parameters, optimizer, metrics and result equal those of the undisturbed run bit for bit."""
    lines = read_lines(workdir)
    steps = [row["step"] for row in lines if row["split"] == "train"]
    assert steps == list(range(1, UPDATES + 1))
    assert lines == read_lines(run)
    ours, theirs = (read_arrays(folder, UPDATES) for folder in (workdir, run))
    assert ours.keys() == theirs.keys() and len(ours) > 100
    for name, array in ours.items():
        assert array.tobytes() == theirs[name].tobytes(), name
    results = [json.loads((folder / "result.json").read_text()) for folder in (workdir, run)]
    for result in results:
        for name in UNSTEADY:
            del result[name]
    assert results[0] == results[1]


def is_saving(workdir: Path) -> bool:
    """Whether a checkpoint is being written at this moment."""
    folder = workdir / "checkpoints"
    return folder.is_dir() and any(not name.isdecimal() for name in os.listdir(folder))


def test_kills_change_nothing(run_arguments: tuple[str, ...], run: Path, tmp_path: Path) -> None:
    workdir, log = tmp_path / "run", tmp_path / "log"
    moments = random.Random(4)
    half_written = 0
    for kill in range(KILLS):
        before = count_updates(workdir)
        process = start(log, "train", *run_arguments, f"--workdir={workdir}")
        if kill % 3 == 0:  # while a checkpoint is being written
            # First what the kill before left half written has to be gone.
            wait_for(lambda: not is_saving(workdir), process, log)
            wait_for(lambda: is_saving(workdir), process, log)
            time.sleep(moments.uniform(0, 0.01))
        else:  # some updates later, or earlier where lines behind the checkpoint were dropped
            wanted = before + moments.randrange(1, 4)
            wait_for(lambda wanted=wanted: count_updates(workdir) >= wanted, process, log)
            time.sleep(moments.uniform(0, 0.1))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, log.read_text()
        half_written += is_saving(workdir)
    assert half_written > 0
    said = finish(start(log, "train", *run_arguments, f"--workdir={workdir}"), log)
    assert "resumed" in said and "is skipped" not in said
    assert_same(workdir, run)


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_damaged_newest_checkpoint_costs_a_warning(
    run_arguments: tuple[str, ...], run: Path, copied: Path, tmp_path: Path, damage: str
) -> None:
    newest = copied / "checkpoints" / str(UPDATES)
    largest = max(newest.rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    content = bytearray(largest.read_bytes())
    if damage == "cut":
        del content[len(content) // 2 :]
    else:
        content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    log = tmp_path / "log"
    said = finish(start(log, "train", *run_arguments, f"--workdir={copied}"), log)
    assert f"checkpoint {UPDATES} is skipped" in said
    assert f"resumed {copied} at update {UPDATES - 3} of {UPDATES}" in said
    assert_same(copied, run)


def test_signals_stop_cleanly(run_arguments: tuple[str, ...], run: Path, tmp_path: Path) -> None:
    workdir, log = tmp_path / "run", tmp_path / "log"
    for number, (name, asked) in enumerate([("SIGTERM", 4), ("SIGINT", 14)]):
        process = start(log, "train", *run_arguments, f"--workdir={workdir}")
        wait_for(lambda asked=asked: count_updates(workdir) >= asked, process, log)
        if number == 0:  # a second run in the same folder, while the first one works
            second = call("train", *run_arguments, f"--workdir={workdir}")
            assert second.code == 2 and f"is in use by process {process.pid}" in second.stderr
        os.kill(process.pid or 0, getattr(signal, name))
        said = finish(process, log).splitlines()
        stopped = count_updates(workdir)
        assert any(f"stopped by {name} and saved at update {stopped} of" in line for line in said)
        assert (workdir / "checkpoints" / str(stopped)).is_dir()
        assert not (workdir / "result.json").exists()
    said_last = finish(start(log, "train", *run_arguments, f"--workdir={workdir}"), log)
    assert f"resumed {workdir} at update {stopped}" in said_last
    # An extra checkpoint is no difference; an evaluation would be one.
    assert_same(workdir, run)


def test_signal_in_an_evaluation_stops_before_its_end(
    run_arguments: tuple[str, ...], run: Path, tmp_path: Path
) -> None:
    """The checkpoint is saved without it, and the next start makes up for it first."""
    workdir, log = tmp_path / "run", tmp_path / "log"
    command = "train", *run_arguments, f"--workdir={workdir}"
    score = "pref_jax.evaluation.predict:Predictor.logits"
    # In the first evaluation, in the same one once more, and in the one after the last update.
    for call_number, stopped in ((1, 6), (1, 6), (8, UPDATES)):
        process = start(log, *command, before=functools.partial(stop_at, score, call_number))
        said = finish(process, log).splitlines()
        assert f"stopped by SIGTERM and saved at update {stopped} of {UPDATES}" in said[-2]
        assert count_updates(workdir) == stopped
        lines = [row["step"] for row in read_lines(workdir) if row["split"] == "valid"]
        assert lines == list(range(6, stopped, 6))
        assert (workdir / "checkpoints" / str(stopped)).is_dir()
    # A kill behind the line of the evaluation, before its checkpoint knows of it.
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": UPDATES, "split": "valid", "loss": 1.0}) + "\n")
    before = functools.partial(stop_at, "pref_jax.training.goals:PreferenceGoal.conclude", 1)
    said = finish(start(log, *command, before=before), log).splitlines()
    assert said[-1] == "stopped by SIGTERM; nothing is lost, the same command goes on"
    assert not (workdir / "result.json").exists()
    finish(start(log, *command), log)
    assert_same(workdir, run)
    ours, theirs = (
        json.loads((folder / f"checkpoints/{UPDATES}/manifest.json").read_text())["info"]
        for folder in (workdir, run)
    )
    assert ours | {"train_seconds": 0} == theirs | {"train_seconds": 0}


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("pref_jax.hosts:start_jax", "SIGTERM"),
        ("pref_jax.training.run:make_plan", "SIGINT"),  # while a thread compiles
        ("pref_jax.training.checkpoints:Checkpoints.restore_latest", "SIGTERM"),
    ],
)
def test_signal_before_the_first_update_stops_cleanly(
    run_arguments: tuple[str, ...], tmp_path: Path, place: str, name: str
) -> None:
    workdir, log = tmp_path / "run", tmp_path / "log"
    before = functools.partial(stop_at, place, 1, name)
    said = finish(start(log, "train", *run_arguments, f"--workdir={workdir}", before=before), log)
    assert said.splitlines()[-1] == f"stopped by {name}; nothing is lost, the same command goes on"
    assert said.count("stopped by") == 1 and "Traceback" not in said and "error" not in said
    assert count_updates(workdir) == 0
    with Workdir(workdir):  # it was given back
        pass


def test_time_limit_stops_saved_and_evaluated(
    run_arguments: tuple[str, ...], tmp_path: Path
) -> None:
    workdir, log = tmp_path / "run", tmp_path / "log"
    limit = "--config.train.max_hours=1e-6"
    finish(start(log, "train", *run_arguments, f"--workdir={workdir}", limit), log)
    result = json.loads((workdir / "result.json").read_text())
    done = result["steps"]
    assert result["stopped"] == "max_hours" and result["best_step"] == done == 1
    assert [(row["step"], row["split"]) for row in read_lines(workdir)] == [
        (1, "train"),
        (1, "valid"),
    ]
    # Another limit is no other run: the next session goes on where this one ended.
    said = finish(start(log, "train", *run_arguments, f"--workdir={workdir}", limit), log)
    assert f"resumed {workdir} at update 1 of {UPDATES}" in said
    assert count_updates(workdir) == 2


def test_another_config_is_refused(run_arguments: tuple[str, ...], copied: Path) -> None:
    before = read_lines(copied)
    outcome = call(
        "train",
        *run_arguments,
        f"--workdir={copied}",
        "--config.seed=1",
        "--config.train.learning_rate=2e-3",
    )
    assert outcome.code == 2
    assert outcome.stderr.startswith(f"error: {copied}/config.json: ")
    assert "seed was 0 and is now 1" in outcome.stderr
    assert "train.learning_rate was 0.001 and is now 0.002" in outcome.stderr
    assert read_lines(copied) == before


def test_other_data_is_refused(run_arguments: tuple[str, ...], arena: Path, copied: Path) -> None:
    other = copied.parent / "other.csv"
    lines = (arena / "train.csv").read_bytes()
    other.write_bytes(lines[: lines.rindex(b"\n", 0, -1) + 1].replace(b",1,0,0\n", b",0,1,0\n", 1))
    flag = f"--config.data.train={other}"
    outcome = call("train", *run_arguments, f"--workdir={copied}", flag)
    assert outcome.code == 2 and "the run was started with other data" in outcome.stderr
    # The same content under another name is the same data.
    shutil.copy(arena / "train.csv", other)
    shutil.copy(copied.parent / "run" / "config.json", copied.parent / "config.json")
    (copied / "result.json").write_text(json.dumps({"steps": UPDATES, "best_step": 1}))
    assert call("train", *run_arguments, f"--workdir={copied}", flag).code != 2


def test_another_mesh_goes_on(run_arguments: tuple[str, ...], run: Path, copied: Path) -> None:
    """One device before, eight here: the same losses but for rounding."""
    shutil.rmtree(copied / "checkpoints" / str(UPDATES))
    outcome = call("train", *run_arguments, f"--workdir={copied}", "--config.mesh.fsdp=2")
    assert outcome.code == 0, outcome
    assert f"resumed {copied} at update {UPDATES - 3} of {UPDATES}" in outcome.stdout
    ours, theirs = read_lines(copied), read_lines(run)
    assert [(row["step"], row["split"]) for row in ours] == [
        (row["step"], row["split"]) for row in theirs
    ]
    np.testing.assert_allclose(
        [row["loss"] for row in ours], [row["loss"] for row in theirs], atol=1e-5
    )


def test_finished_run_is_left_alone(
    run_arguments: tuple[str, ...], run: Path, tmp_path: Path
) -> None:
    workdir = Path(shutil.copytree(run, tmp_path / "run"))

    def look() -> dict[str, tuple[int, bytes]]:
        names = [*workdir.glob("checkpoints/*/manifest.json"), workdir / "metrics.jsonl"]
        names += [workdir / "result.json", *workdir.glob("checkpoints/*/state/*")]
        return {
            str(path): (path.stat().st_mtime_ns, path.read_bytes())
            for path in names
            if path.is_file()
        }

    before, began = look(), time.monotonic()
    outcome = call("train", *run_arguments, f"--workdir={workdir}")
    assert outcome.code == 0 and "is finished" in outcome.stdout
    assert time.monotonic() - began < 5
    assert look() == before and len(before) > 5


def test_folder_in_use_is_refused_at_once(run_arguments: tuple[str, ...], copied: Path) -> None:
    with Workdir(copied):
        began = time.monotonic()
        outcome = call("train", *run_arguments, f"--workdir={copied}")
        assert outcome.code == 2 and "is in use by process" in outcome.stderr
        assert outcome.stderr.count("\n") == 1
        assert time.monotonic() - began < 3
