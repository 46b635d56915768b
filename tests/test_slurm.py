"""``launch/slurm.sbatch`` beside stand-ins of SLURM's commands and of the training command."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from rig import REPOSITORY

# Takes srun's own options away and becomes the task, which gets its signals.
_SRUN = """#!/usr/bin/env bash
echo "srun $*" >> "$NOTES"
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
_SCONTROL = '#!/usr/bin/env bash\necho "scontrol $*" >> "$NOTES"\n'
_PYTHON = """#!/usr/bin/env bash
trap 'sleep 0.3; echo saved >> "$NOTES"; exit 0' TERM
echo started >> "$NOTES"
for _ in $(seq 100); do
  [[ -n $TASK_CODE ]] && exit "$TASK_CODE"
  sleep 0.1
done
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    for name, text in (
        ("bin/srun", _SRUN),
        ("bin/scontrol", _SCONTROL),
        ("venv/bin/python", _PYTHON),
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "NOTES": str(tmp_path / "notes"),
        "PREF_JAX_VENV": str(tmp_path / "venv"),
        "SLURM_JOB_ID": "17",
        "SLURM_SUBMIT_DIR": str(REPOSITORY),
        "TASK_CODE": "",
    }


def submit(environment: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", str(REPOSITORY / "launch/slurm.sbatch"), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def read_notes(environment: dict[str, str]) -> list[str]:
    path = Path(environment["NOTES"])
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize(
    ("sent", "notes"),
    [(signal.SIGUSR1, ["saved", "scontrol requeue 17"]), (signal.SIGTERM, ["saved"])],
    ids=["time is over", "cancelled"],
)
def test_a_signal_saves_the_run_and_only_lost_time_queues_it_again(
    environment: dict[str, str], sent: signal.Signals, notes: list[str]
) -> None:
    process = submit(environment, "--config=c.py", "--workdir=/shared/a run")
    deadline = time.monotonic() + 30
    while "started" not in read_notes(environment):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(sent)
    assert process.wait(timeout=30) == 0
    srun, *rest = read_notes(environment)
    assert "launch/train.py --num_hosts=auto --config=c.py --workdir=/shared/a run" in srun
    assert "--ntasks-per-node=1" in srun and rest == ["started", *notes]


@pytest.mark.parametrize("code", [0, 1, 2])
def test_a_run_that_ends_by_itself_is_not_queued_again(
    environment: dict[str, str], code: int
) -> None:
    process = submit({**environment, "TASK_CODE": str(code)}, "--workdir=/shared/run")
    assert process.wait(timeout=30) == code
    assert read_notes(environment)[1:] == ["started"]


@pytest.mark.parametrize(
    ("changes", "arguments", "said"),
    [
        ({"SLURM_JOB_ID": ""}, ["--workdir=x"], "start it with sbatch"),
        ({}, ["--config=c.py"], "--workdir: it is missing"),
        ({"SLURM_SUBMIT_DIR": "/tmp"}, ["--workdir=x"], "submit from the repository's folder"),
        ({"PREF_JAX_VENV": "/nowhere"}, ["--workdir=x"], "/nowhere/bin/python: it is missing"),
    ],
)
def test_wrong_use_is_one_line(
    environment: dict[str, str], changes: dict[str, str], arguments: list[str], said: str
) -> None:
    process = submit({**environment, **changes}, *arguments)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 2 and errors.count("\n") == 1
    assert errors.startswith("error: ") and said in errors
    assert read_notes(environment) == []
