"""``launch/tpu_vm.sh`` beside a stand-in of gcloud, whose VM is a folder of this machine."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rig import REPOSITORY

# One request and its VM: `state` holds what it says of itself, `home` is the VM's disk.
_GCLOUD = r"""#!{python}
import json, os, pathlib, shutil, signal, subprocess, sys, tarfile, time
root = pathlib.Path(os.environ["STAND_IN"])
words = sys.argv[1:]
with open(root / "calls", "a") as file:
    file.write(json.dumps(words) + "\n")
state, home = root / "state", root / "home"
def option(name):
    return next((w.split("=", 1)[1] for w in words if w.startswith(f"--{{name}}=")), None)
def local(path):
    return root / "bucket" / path[5:] if path.startswith("gs://") else pathlib.Path(path)
def switch_off():
    for place in pathlib.Path("/proc").glob("[0-9]*/cwd"):
        try:
            inside = pathlib.Path(os.readlink(place)).is_relative_to(home)
        except OSError:
            continue
        if inside:
            os.kill(int(place.parent.name), signal.SIGKILL)
    shutil.rmtree(home, ignore_errors=True)
fails = (root / "fails").read_text().split() if (root / "fails").exists() else []
if any(word in fails for word in words):
    sys.exit("ERROR: (gcloud) UNAVAILABLE: the network is unreachable")
if (root / "taken").exists() and words[0] == "compute":
    (root / "taken").unlink()
    state.write_text("SUSPENDED")
    switch_off()
if words[:2] == ["storage", "rsync"]:
    source, target = map(local, words[-2:])
    if not source.exists():
        sys.exit("no such place")
    shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*"))
elif words[:2] == ["storage", "cp"]:
    shutil.copy(local(words[-2]), words[-1])
elif words[2] == "queued-resources":
    if words[3] == "create":
        state.write_text((root / "given").read_text())
        home.mkdir(exist_ok=True)
    elif words[3] == "describe":
        print(state.read_text() if state.exists() else sys.exit(
            "ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: Resource "
            "'projects/p/locations/z/queuedResources/my-tpu' was not found"
        ))
    elif words[3] == "delete":
        (root / "deleting").touch()
        print("deleting", flush=True)
        print("deleting", file=sys.stderr, flush=True)
        while (root / "slow").exists():
            time.sleep(0.02)
        state.unlink()
        switch_off()
elif words[3] == "scp":
    # What the archive holds is not for this machine; the part that is tried here goes in.
    shutil.rmtree(root / "made", ignore_errors=True)
    (root / "made/launch").mkdir(parents=True)
    (root / "made/.venv/bin").mkdir(parents=True)
    shutil.copy("{repository}/launch/tpu_host.sh", root / "made/launch")
    (root / "made/launch/environment.sh").write_text("install() {{ touch installed_$1; }}\n")
    (root / "made/launch/train.py").write_text((root / "train.py").read_text())
    (root / "made/.venv/bin/python").symlink_to(sys.executable)
    with tarfile.open(home / "pref_jax.tar.gz", "w:gz") as archive:
        archive.add(root / "made", ".")
elif words[3] == "ssh":
    sys.exit(subprocess.run(["bash", "-c", option("command")], cwd=home).returncode)
"""
# Counts to six, a step each 0.3 s, going on from what the bucket holds.
_TRAIN = r"""
import json, os, pathlib, sys, time
workdir = next(w for w in sys.argv if w.startswith("--workdir=gs://")).split("=gs://", 1)[1]
folder = pathlib.Path(os.environ["STAND_IN"], "bucket", workdir)
folder.mkdir(exist_ok=True)
(folder / "arguments.json").write_text(json.dumps(sys.argv[1:]))
steps = folder / "steps"
done = len(steps.read_text().split()) if steps.exists() else 0
(folder / f"started_at_{done}").touch()
for step in range(done, 6):
    time.sleep(0.3)
    with open(steps, "a") as file:
        file.write(f"{step}\n")
sys.exit(CODE)
"""


def heed_signals() -> None:
    """What a terminal gives a command; under nohup tests start with signals that are ignored."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class StandIn:
    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "bin").mkdir()
        (root / "bucket/b").mkdir(parents=True)
        (root / "bucket/b/train.csv").write_text("id\n")
        self.write("given", "ACTIVE")
        self.write("train.py", _TRAIN.replace("CODE", "0"))
        text = _GCLOUD.format(python=sys.executable, repository=REPOSITORY)
        for name, content in (("gcloud", text), ("sudo", "#!/bin/sh\n")):
            (root / "bin" / name).write_text(content)
            (root / "bin" / name).chmod(0o755)

    def write(self, name: str, text: str) -> None:
        (self.root / name).write_text(text)

    def start(self, action: str, *flags: str) -> subprocess.Popen[str]:
        environment = {
            **os.environ,
            "PATH": f"{self.root}/bin:{os.environ['PATH']}",
            "STAND_IN": str(self.root),
            "HOME": str(self.root),
            "PREF_JAX_TPU_POLL": "0.2",
            "PREF_JAX_TPU_OUTAGE": "2",
        }
        return subprocess.Popen(
            ["bash", str(REPOSITORY / "launch/tpu_vm.sh"), action, *flags],
            env=environment | ({"PREF_JAX_TPU_HOUR": "2"} if "--max_hours=1" in flags else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=heed_signals,
        )

    def call(self, action: str, *flags: str) -> tuple[int, str, str]:
        process = self.start(action, *flags)
        said, errors = process.communicate(timeout=60)
        return process.returncode, said, errors

    def calls(self, *words: str) -> list[list[str]]:
        path = self.root / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        found = [json.loads(line) for line in lines]
        return [call for call in found if set(words) <= set(call)]

    @property
    def bucket(self) -> Path:
        return self.root / "bucket/b/run"

    def has_vm(self) -> bool:
        return (self.root / "state").exists()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.fixture
def cloud(tmp_path: Path) -> StandIn:
    return StandIn(tmp_path)


WHERE = ("my-tpu", "--zone=us-west4-a", "--type=v5litepod-8")
TRAIN = (*WHERE, "--bucket=gs://b/run", "--copy=gs://b/train.csv")
FLAGS = ("--", "--config=configs/llama_lora.py", "--config.data.train=my $file.csv")


def test_all_of_it_and_nothing_left(cloud: StandIn) -> None:
    code, said, errors = cloud.call("train", *TRAIN, *FLAGS)
    assert code == 0, errors
    assert not cloud.has_vm() and (cloud.bucket / "steps").read_text().split() == list("012345")
    assert json.loads((cloud.bucket / "arguments.json").read_text()) == [
        "--workdir=gs://b/run",
        "--num_hosts=auto",
        "--config.train.max_hours=24",
        *FLAGS[1:],
    ]
    (create,) = cloud.calls("queued-resources", "create")
    assert {"--accelerator-type=v5litepod-8", "--valid-until-duration=6h"} <= set(create)
    assert "--spot" not in create
    (command,) = [c for c in cloud.calls("ssh") if "systemd-run" in c[-1]]
    assert "--on-active=25h gcloud compute tpus queued-resources delete my-tpu" in command[-1]
    # Everything that changes something was printed, so that a shell would read it back.
    printed = [shlex.split(line[2:]) for line in said.splitlines() if line.startswith("+ gcloud")]
    asked = [["gcloud", *call] for call in cloud.calls() if call[0] == "compute"]
    for words in ("create", "delete", "scp"):
        assert [call for call in asked if words in call] == [
            call for call in printed if words in call
        ]


def test_a_pre_empted_run_goes_on_without_a_person(cloud: StandIn) -> None:
    process = cloud.start("train", *TRAIN, "--spot", *FLAGS)
    steps = cloud.bucket / "steps"
    cloud.wait_for(lambda: steps.exists() and steps.read_text().count("\n") >= 2)
    cloud.write("taken", "")
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "pre-empted" in said and not cloud.has_vm()
    assert len(cloud.calls("queued-resources", "create", "--spot")) == 2
    assert steps.read_text().split() == list("012345")
    assert len(list(cloud.bucket.glob("started_at_*"))) == 2  # once from 0, once from the bucket


def test_training_that_fails_leaves_nothing_running(cloud: StandIn) -> None:
    cloud.write("train.py", _TRAIN.replace("CODE", "1"))
    code, _, _ = cloud.call("train", *TRAIN, *FLAGS)
    assert code == 1 and not cloud.has_vm() and (cloud.bucket / "steps").exists()


def test_the_time_is_over(cloud: StandIn) -> None:
    cloud.write("train.py", "import time; time.sleep(20)")
    code, _, errors = cloud.call("train", *TRAIN, "--max_hours=1", *FLAGS)
    assert code == 1 and "did not end within --max_hours=1" in errors and not cloud.has_vm()


def start_training(cloud: StandIn, *flags: str) -> subprocess.Popen[str]:
    """A `train` whose training has begun and goes on until the VM is gone."""
    cloud.write("train.py", _TRAIN.replace("time.sleep(0.3)", "time.sleep(20)"))
    process = cloud.start("train", *TRAIN, *flags, *FLAGS)
    cloud.wait_for(lambda: (cloud.bucket / "started_at_0").exists())
    return process


@pytest.mark.parametrize(
    ("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_leaves_nothing_running(cloud: StandIn, sent: signal.Signals, code: int) -> None:
    process = start_training(cloud)
    cloud.write("slow", "")
    process.send_signal(sent)
    cloud.wait_for(lambda: (cloud.root / "deleting").exists())
    process.send_signal(sent)  # a second one does not end the deletion
    (cloud.root / "slow").unlink()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code and not cloud.has_vm()
    assert f"error: my-tpu: interrupted by {sent.name}; it is cleaned up, please wait\n" in errors


def test_a_terminal_that_is_gone_leaves_nothing_running(cloud: StandIn) -> None:
    process = start_training(cloud)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    process.stderr.close()
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=60) == 129 and not cloud.has_vm()


def test_a_signal_leaves_what_is_to_be_kept(cloud: StandIn) -> None:
    process = start_training(cloud, "--keep")
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and cloud.has_vm() and "my-tpu is kept, and billed: " in said
    assert cloud.call("delete", *WHERE)[0] == 0


DELETES = "./launch/tpu_vm.sh delete my-tpu --zone=us-west4-a"


def test_what_cannot_be_deleted_is_named(cloud: StandIn) -> None:
    process = start_training(cloud)
    cloud.write("fails", "delete")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143 and cloud.has_vm()
    last = errors.splitlines()[-1]
    assert last.startswith("error: my-tpu: it could not be deleted") and last.endswith(DELETES)
    cloud.write("fails", "")
    assert cloud.call("delete", *WHERE)[0] == 0


def test_a_request_that_cannot_be_taken_back_is_named(cloud: StandIn) -> None:
    cloud.write("state", "SUSPENDED")
    cloud.write("fails", "delete")
    code, _, errors = cloud.call("train", *TRAIN, *FLAGS)
    assert code == 1 and not cloud.calls("create")
    assert "error: my-tpu: it could not be deleted; the request stays" in errors


def test_an_outage_here_is_no_loss_of_the_vm(cloud: StandIn) -> None:
    process = cloud.start("train", *TRAIN, *FLAGS)
    cloud.wait_for(lambda: (cloud.bucket / "started_at_0").exists())
    cloud.write("fails", "describe ssh")
    time.sleep(0.6)  # some polls
    cloud.write("fails", "")
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "it could not be asked for (ERROR: (gcloud) UNAVAILABLE" in said
    assert len(cloud.calls("create")) == len(cloud.calls("delete")) == 1 and not cloud.has_vm()


def test_an_outage_without_end_leaves_the_vm_and_says_so(cloud: StandIn) -> None:
    process = start_training(cloud)
    cloud.write("fails", "describe ssh")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and cloud.has_vm()
    assert not cloud.calls("delete") and len(cloud.calls("create")) == 1
    assert errors.startswith("error: my-tpu: no answer for ") and errors.count("\n") == 1
    assert "may be running and billed" in errors and errors.rstrip().endswith(DELETES)
    # The same command goes on with it; a host that does not answer is not set up again.
    cloud.write("fails", "ssh")
    code, _, errors = cloud.call("train", *TRAIN, *FLAGS)
    assert code == 1 and "its first host does not answer" in errors and cloud.has_vm()
    assert len(cloud.calls("scp")) == 1 and not cloud.calls("delete")
    cloud.write("fails", "")
    assert cloud.call("delete", *WHERE)[0] == 0


def test_hours_are_read_as_decimal(cloud: StandIn) -> None:
    code, said, errors = cloud.call("train", *TRAIN, "--max_hours=08", "--dry_run", *FLAGS)
    assert code == 0 and "max_hours=8" in said and errors == ""


def test_it_may_be_kept(cloud: StandIn) -> None:
    code, said, _ = cloud.call("train", *TRAIN, "--keep", *FLAGS)
    assert code == 0 and cloud.has_vm() and "kept, and billed" in said
    assert cloud.call("delete", *WHERE)[0] == 0 and not cloud.has_vm()


@pytest.mark.parametrize("step", ["create", "scp"])
def test_what_cannot_be_made_leaves_nothing(cloud: StandIn, step: str) -> None:
    cloud.write("fails", step)
    code, _, errors = cloud.call("train", *TRAIN, *FLAGS)
    assert code == 1 and not cloud.has_vm() and "error: my-tpu: it could not be" in errors


def test_a_request_that_is_not_given_is_taken_back(cloud: StandIn) -> None:
    cloud.write("given", "FAILED")
    code, _, errors = cloud.call("train", *TRAIN, *FLAGS)
    assert code == 1 and "try another zone" in errors and not cloud.has_vm()


def test_every_host_is_told_the_same(cloud: StandIn) -> None:
    """Hosts have nothing in common but the bucket: all of them train into it."""
    code, _, errors = cloud.call("train", *TRAIN, *FLAGS)
    assert code == 0, errors
    for word in ("launch/tpu_host.sh", "storage cp", "tar -xzf"):
        (call,) = [call for call in cloud.calls("ssh") if word in call[-1]]
        assert "--worker=all" in call
    (scp,) = cloud.calls("scp")
    assert "--worker=all" in scp


def test_single_actions(cloud: StandIn) -> None:
    assert cloud.call("create", *WHERE, "--spot", "--version=v9")[0] == 0
    assert cloud.calls("create", "--spot", "--runtime-version=v9")
    assert cloud.call("setup", *WHERE)[0] == 0
    assert (cloud.root / "home/pref_jax/installed_tpu,gcs").exists()
    (cloud.root / "home/pref_jax/train.log").write_text("step 7\n")
    code, said, _ = cloud.call("status", *WHERE)
    assert code == 0 and "my-tpu: ACTIVE" in said and "step 7" in said and "training" in said
    assert "step 7" in cloud.call("logs", *WHERE)[1]
    cloud.bucket.mkdir()
    (cloud.bucket / "result.json").write_text("{}")
    folder = cloud.root / "mine"
    assert cloud.call("fetch", *WHERE, "--bucket=gs://b/run", f"--workdir={folder}")[0] == 0
    assert (folder / "result.json").exists()
    assert cloud.call("delete", *WHERE)[0] == 0 and not cloud.has_vm()


def test_a_dry_run_calls_nobody(cloud: StandIn) -> None:
    for action in ("create", "setup", "status", "logs", "delete"):
        code, said, _ = cloud.call(action, *WHERE, "--dry_run")
        assert code == 0 and said.startswith("+ ")
    code, said, _ = cloud.call("train", *TRAIN, "--dry_run", *FLAGS)
    kinds = [
        re.sub(r"^\+ (\S+ )?.*?(create|archive|scp|ssh|delete) .*", r"\2", line)
        for line in said.splitlines()
    ]
    assert code == 0 and kinds == ["create", "archive", "scp", "ssh", "ssh", "delete"]
    assert cloud.calls() == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fly", "my-tpu"], "fly: no such action"),
        (["create"], "NAME: it is missing"),
        (["create", "My_TPU", "--zone=z"], "NAME: My_TPU"),
        (["create", "x; rm -rf ~", "--zone=z"], "NAME: x; rm"),
        (["create", "my-tpu", "--type=v5litepod-8"], "--zone: it is missing"),
        (["create", "my-tpu", "--zone=z"], "--type: it is missing"),
        (["train", *WHERE, *FLAGS], "--bucket: it is missing"),
        (["train", *WHERE, "--bucket=mine", *FLAGS], "does not begin with gs://"),
        (["train", *TRAIN], "training's flags are missing"),
        (["train", *TRAIN, *FLAGS, "--workdir=x"], "the run lies in --bucket"),
        (["train", *TRAIN, "--max_hours=0.5", *FLAGS], "not a whole number"),
        (["train", *TRAIN, f"--max_hours={'9' * 20}", *FLAGS], "number from 1 to 8760"),
        (["train", *TRAIN, "--max_hours=0", *FLAGS], "number from 1 to 8760"),
        (["train", *TRAIN, "--config=configs/x.py"], "--config=configs/x.py: no such flag"),
        (["fetch", *WHERE], "--bucket: it is missing"),
    ],
)
def test_wrong_use_is_one_line(cloud: StandIn, arguments: list[str], said: str) -> None:
    code, _, errors = cloud.call(*arguments)
    assert code == 2 and errors.count("\n") == 1
    assert errors.startswith("error: ") and said in errors
    assert cloud.calls() == []
