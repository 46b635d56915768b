"""Two processes of four devices each train, evaluate and predict one run."""

from __future__ import annotations

import csv
import functools
import json
import os
import shutil
import signal
import socket
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from rig import (
    REPOSITORY,
    TINY,
    call,
    call_apart,
    count_updates,
    read_arrays,
    read_lines,
    start,
    stop_at,
    wait_for,
)

ROWS, STEPS = 37, 10
# Only host 0 writes to JAX's cache of programs: the other one compiles every time.
QUICKLY = "--xla_backend_optimization_level=0"


class Pair(NamedTuple):
    """Two hosts and what each has said."""

    processes: list[ForkServerProcess]
    logs: list[Path]


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """37 rows to train on, 13 to answer, with and without labels."""
    folder = tmp_path_factory.mktemp("hosts")
    outcome = call("simulate", f"--rows={ROWS}", "--test_rows=13", "--seed=7", f"--output={folder}")
    assert outcome.code == 0, outcome
    lines = (folder / "train.csv").read_text().splitlines(keepends=True)
    (folder / "labelled.csv").write_text("".join(lines[:14]))
    return folder


@pytest.fixture(scope="module")
def arguments(arena: Path) -> tuple[str, ...]:
    """The command, but for workdir and hosts: one epoch is five updates."""
    return (
        *TINY,
        "--config.model.config.num_layers=1",
        "--config.model.config.hidden_size=16",
        "--config.model.config.intermediate_size=32",
        "--config.input.layout=single",
        "--config.train.microbatch_size=1",
        f"--config.data.train={arena}/train.csv",
        f"--config.data.valid={arena}/labelled.csv",
        "--config.train.epochs=2",
        f"--config.train.max_steps={STEPS}",
        "--config.train.learning_rate=1e-3",
        "--config.eval.every_steps=5",
        "--config.checkpoint.every_steps=1",
    )


def launch(
    folder: Path,
    name: str,
    *shared: object,
    own: tuple[str, ...] = ("", ""),
    timeout: int = 60,
    before: Sequence[Callable[[], None] | None] = (None, None),
) -> Pair:
    """Starts one command on two hosts; ``own`` is what only one of them is told.

    Args:
      before: is called in each process before the command.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = f"127.0.0.1:{server.getsockname()[1]}"
    logs = [folder / f"log{host}" for host in (0, 1)]
    processes = []
    for host, log in enumerate(logs):
        log.write_text("")
        flags = [f"--coordinator={place}", "--num_hosts=2", f"--host={host}"]
        flags += [f"--host_timeout={timeout}", *filter(None, [own[host]])]
        processes.append(
            start(log, name, *shared, *flags, devices=4, xla_flags=QUICKLY, before=before[host])
        )
    return Pair(processes, logs)


def end(pair: Pair, *codes: int) -> list[str]:
    """Waits for both; returns what they have said."""
    for process in pair.processes:
        process.join(timeout=300)
    said = [log.read_text(encoding="utf-8", errors="replace") for log in pair.logs]
    assert [process.exitcode for process in pair.processes] == list(codes), said
    for text, code in zip(said, codes, strict=True):
        errors = [line for line in text.splitlines() if line.startswith("error: ")]
        assert len(errors) == (code in (1, 2)), said
        assert "Traceback" not in text and "*** Check failure" not in text, said
    return said


@pytest.fixture(scope="module")
def run(arguments: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two hosts that nobody disturbed."""
    folder = tmp_path_factory.mktemp("pair")
    said = end(launch(folder, "train", *arguments, f"--workdir={folder}/run"), 0, 0)
    assert "held-out rows: 13" in said[0] and "held-out rows" not in said[1]
    return folder / "run"


@pytest.fixture(scope="module")
def alone(arguments: tuple[str, ...], run: Path, arena: Path) -> Path:
    """The same run by one process with eight devices, and what it predicts."""
    folder = run.parent / "alone"
    folder.mkdir()
    scored = f"--workdir={run}", f"--data={arena}/labelled.csv"
    outcomes = call_apart(
        folder,
        {
            "train": ["train", *arguments, f"--workdir={folder}/run"],
            "predict": ["predict", *scored, f"--output={folder}/out.csv"],
            "evaluate": ["evaluate", *scored, f"--output={folder}/out.json"],
        },
        devices=8,
    )
    assert all(outcome.code == 0 for outcome in outcomes.values()), outcomes
    return folder


def test_two_hosts_train_as_one_does(run: Path, alone: Path) -> None:
    ours, theirs = read_lines(run), read_lines(alone / "run")
    assert [(row["step"], row["split"]) for row in ours] == [
        (row["step"], row["split"]) for row in theirs
    ]
    assert sum(row["split"] == "train" for row in ours) == STEPS
    np.testing.assert_allclose(
        [row["loss"] for row in ours], [row["loss"] for row in theirs], atol=1e-5
    )
    environment = json.loads((run / "environment.json").read_text())
    assert environment["process_count"] == 2 and environment["devices"][0]["count"] == 8
    assert json.loads((run / "result.json").read_text())["compilations"]["train"] == 1


def test_two_hosts_score_each_row_once(run: Path, alone: Path, arena: Path, tmp_path: Path) -> None:
    output, report = tmp_path / "out.csv", tmp_path / "out.json"
    scored = f"--workdir={run}", f"--data={arena}/labelled.csv"
    said = end(launch(tmp_path, "predict", *scored, f"--output={output}"), 0, 0)
    assert "13 rows" in said[0] and "rows" not in said[1]
    with output.open(newline="") as ours, (alone / "out.csv").open(newline="") as theirs:
        mine, wanted = list(csv.reader(ours)), list(csv.reader(theirs))
    assert [row[0] for row in mine] == [row[0] for row in wanted] and len(mine) == 14
    np.testing.assert_allclose(
        np.array([row[1:] for row in mine[1:]], float),
        np.array([row[1:] for row in wanted[1:]], float),
        atol=1e-6,
    )
    end(launch(tmp_path, "evaluate", *scored, f"--output={report}"), 0, 0)
    mine_too, wanted_too = (json.loads(path.read_text()) for path in (report, alone / "out.json"))
    assert mine_too["rows"] == 13
    assert abs(mine_too["log_loss"] - wanted_too["log_loss"]) < 1e-6
    assert sorted(os.listdir(tmp_path)) == ["log0", "log1", "out.csv", "out.json"]


def test_two_hosts_share_a_decoder(arena: Path, tmp_path: Path) -> None:
    """Frozen weights cut over the devices of both, adapters on top."""
    decoder = (
        f"--config={REPOSITORY}/configs/llama_lora.py:tiny",
        f"--config.data.train={arena}/train.csv",
        f"--config.data.valid={arena}/labelled.csv",
        "--config.input.max_length=128",
        "--config.mesh.data=1",
        "--config.mesh.fsdp=4",
        "--config.mesh.tensor=2",
        "--config.model.quantization=int8",
        "--config.train.microbatch_size=1",
        "--config.train.batch_size=8",
        "--config.train.epochs=4",
        "--config.train.max_steps=20",
        "--config.logging.tensorboard=false",
    )
    end(launch(tmp_path, "train", *decoder, f"--workdir={tmp_path}/two"), 0, 0)
    outcome = call_apart(
        tmp_path, {"one": ["train", *decoder, f"--workdir={tmp_path}/one"]}, devices=8
    )["one"]
    assert outcome.code == 0, outcome
    losses = [
        [row["loss"] for row in read_lines(tmp_path / name) if row["split"] == "train"]
        for name in ("two", "one")
    ]
    assert len(losses[0]) == 20
    np.testing.assert_allclose(*losses, atol=1e-5)


def test_missing_host_is_named_in_time(arguments: tuple[str, ...], tmp_path: Path) -> None:
    pairs = []
    for present in (0, 1):
        folder = tmp_path / str(present)
        folder.mkdir()
        pair = launch(folder, "train", *arguments, f"--workdir={folder}/run", timeout=2)
        pair.processes[1 - present].kill()  # long before it could report
        pairs.append(pair)
    for present, pair in enumerate(pairs):
        process = pair.processes[present]
        process.join(timeout=300)
        said = pair.logs[present].read_text()
        assert process.exitcode == 1, said
        assert said.startswith("error: ") and said.count("\n") == 1, said
        assert ("host 1 of 2 did not report" if present == 0 else "host 0, the coord") in said
        assert not (tmp_path / str(present) / "run").exists()


def assert_goes_on(folder: Path, command: tuple[str, ...], run: Path) -> None:
    """The same command on both hosts resumes ``folder / "run"`` and ends as ``run`` did."""
    said = end(launch(folder, *command), 0, 0)
    assert "resumed" in said[0] and "is skipped" not in said[0]
    assert_same(folder / "run", run)


def test_loss_and_stop_change_nothing(
    arguments: tuple[str, ...], run: Path, tmp_path: Path
) -> None:
    """One host is killed, later one is asked to stop; the same command goes on."""
    workdir = tmp_path / "run"
    command = "train", *arguments, f"--workdir={workdir}"

    pair = launch(tmp_path, *command)
    wait_for(lambda: count_updates(workdir) >= 5, *one(pair, 0))
    pair.processes[1].kill()
    said = end(pair, 1, -signal.SIGKILL)
    assert "error: host 1 (" in said[0] and "is gone" in said[0]

    lost = count_updates(workdir)
    pair = launch(tmp_path, *command)
    wait_for(lambda: "train: step" in pair.logs[0].read_text(), *one(pair, 0))
    os.kill(pair.processes[1].pid or 0, signal.SIGTERM)
    said = end(pair, 0, 0)
    stopped = count_updates(workdir)
    assert f"stopped by SIGTERM and saved at update {stopped} of {STEPS}" in said[0]
    assert lost <= stopped < STEPS and (workdir / "checkpoints" / str(stopped)).is_dir()
    assert not (workdir / "result.json").exists()

    assert_goes_on(tmp_path, command, run)


def test_stop_outside_the_updates_changes_nothing(
    arguments: tuple[str, ...], run: Path, tmp_path: Path
) -> None:
    """One host is asked to stop in an evaluation, later both before their first update."""
    workdir = tmp_path / "run"
    command = "train", *arguments, f"--workdir={workdir}"
    in_evaluation = functools.partial(stop_at, "pref_jax.evaluation.predict:Predictor.logits", 1)
    said = end(launch(tmp_path, *command, before=(None, in_evaluation)), 0, 0)
    assert f"stopped by SIGTERM and saved at update 5 of {STEPS}" in said[0]
    assert [row["split"] for row in read_lines(workdir)] == ["train"] * 5

    early = functools.partial(stop_at, "pref_jax.training.run:make_plan", 1)
    said = end(launch(tmp_path, *command, before=(early, early)), 0, 0)
    assert said[0].endswith("stopped by SIGTERM; nothing is lost, the same command goes on\n")
    assert count_updates(workdir) == 5

    assert_goes_on(tmp_path, command, run)


def test_loss_of_the_leader_changes_nothing(
    arguments: tuple[str, ...], run: Path, tmp_path: Path
) -> None:
    """The host that writes everything dies; the other one ends within a minute."""
    workdir = tmp_path / "run"
    command = "train", *arguments, f"--workdir={workdir}"
    pair = launch(tmp_path, *command)
    wait_for(lambda: count_updates(workdir) >= 5, *one(pair, 0))
    pair.processes[0].kill()
    pair.processes[1].join(60)
    assert pair.processes[1].exitcode is not None
    said = end(pair, -signal.SIGKILL, 1)
    assert "error: host 0 (" in said[1] and "is gone" in said[1]

    assert_goes_on(tmp_path, command, run)


def assert_same(workdir: Path, run: Path) -> None:
    """Metrics and all arrays equal those of the undisturbed run bit for bit."""
    assert read_lines(workdir) == read_lines(run)
    ours, theirs = (read_arrays(folder, STEPS) for folder in (workdir, run))
    assert ours.keys() == theirs.keys() and len(ours) > 20
    for name, array in ours.items():
        assert array.tobytes() == theirs[name].tobytes(), name


def one(pair: Pair, host: int) -> tuple[ForkServerProcess, Path]:
    return pair.processes[host], pair.logs[host]


def test_lost_leader_ends_the_others(run: Path, arena: Path, tmp_path: Path) -> None:
    """JAX's client would abort the process as soon as its coordinator is gone."""
    output = tmp_path / "out.csv"
    scored = f"--workdir={run}", f"--data={arena}/test.csv", f"--output={output}"
    pair = launch(tmp_path, "predict", *scored)
    # The line of the first collective: from here on both are connected through JAX.
    wait_for(lambda: "[Gloo]" in pair.logs[1].read_text(), *one(pair, 1))
    pair.processes[0].kill()
    said = end(pair, -signal.SIGKILL, 1)
    assert "error: host 0 (" in said[1] and "is gone" in said[1]
    assert not output.exists()


def test_other_data_on_one_host_is_refused(
    arguments: tuple[str, ...], arena: Path, tmp_path: Path
) -> None:
    lines = (arena / "train.csv").read_text().splitlines(keepends=True)
    shorter = tmp_path / "train.csv"
    shorter.write_text("".join(lines[:-1]))
    own = ("", f"--config.data.train={shorter}")
    command: tuple[Any, ...] = ("train", *arguments, f"--workdir={tmp_path}/run")
    for text in end(launch(tmp_path, *command, own=own), 2, 2):
        assert "the hosts differ in data.train" in text
        assert "host 0 (" in text and "host 1 (" in text
    assert not (tmp_path / "run" / "config.json").exists()


def test_folders_apart_are_refused(arguments: tuple[str, ...], run: Path, tmp_path: Path) -> None:
    """Each host has a folder of its own, and the second one lacks the newest checkpoint."""
    for host in (0, 1):
        shutil.copytree(run, tmp_path / str(host))
        (tmp_path / str(host) / "result.json").unlink()
    shutil.rmtree(tmp_path / "1" / "checkpoints" / str(STEPS))
    own = f"--workdir={tmp_path}/0", f"--workdir={tmp_path}/1"
    for text in end(launch(tmp_path, "train", *arguments, own=own), 2, 2):
        assert "host 1 (" in text and "cannot see there what host 0 (" in text
    assert (tmp_path / "0" / "checkpoints" / str(STEPS)).is_dir()
