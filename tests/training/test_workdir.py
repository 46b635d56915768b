"""A run's folder belongs to one process and to one config."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pref_jax import files
from pref_jax.errors import InputError, RunError, Stopped
from pref_jax.files import plain, write_json
from pref_jax.training.progress import Progress, StopSignals
from pref_jax.training.workdir import (
    Workdir,
    compare_config,
    describe_environment,
)

CONFIG = {
    "seed": 1,
    "data": {"train": "a.csv"},
    "model": {},
    "train": {"learning_rate": 1e-4, "max_hours": None},
    "mesh": {"data": -1},
    "logging": {"tensorboard": True},
    "input": {"budget": [0.1, 0.45, 0.45]},
}

TRY = """
import sys
from pref_jax.errors import InputError
from pref_jax.training.workdir import Workdir
try:
    with Workdir(sys.argv[1]):
        print("taken")
except InputError as error:
    print(error)
assert "jax" not in sys.modules and "numpy" not in sys.modules, "refusing must not wait for imports"
"""


def try_to_take(path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", TRY, str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def changed(**fields) -> dict:
    config = json.loads(json.dumps(CONFIG))
    for name, value in fields.items():
        section, _, field = name.rpartition("__")
        (config[section] if section else config)[field] = value
    return config


def test_a_second_process_is_refused_at_once_and_told_who_holds_it(tmp_path):
    with Workdir(tmp_path / "run"):
        start = time.monotonic()
        answer = try_to_take(tmp_path / "run")
        took = time.monotonic() - start
        assert f"process {os.getpid()} on {os.uname().nodename}" in answer
        assert "\n" not in answer
        assert took < 2, took  # under a second on a machine with nothing else to do
        with pytest.raises(InputError, match="in use"):
            Workdir(tmp_path / "run").acquire()
    assert try_to_take(tmp_path / "run") == "taken"


def test_a_killed_holder_leaves_the_folder_free(tmp_path):
    code = TRY.replace('print("taken")', 'print("taken", flush=True); sys.stdin.read()')
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "taken"
    assert "in use" in try_to_take(tmp_path)
    process.kill()
    process.wait()
    assert try_to_take(tmp_path) == "taken"


def test_a_file_is_no_workdir(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="file"):
            Workdir(path).acquire()
    assert (tmp_path / "file").read_text() == "x"


def test_a_folder_that_may_not_be_written_is_refused(tmp_path):
    if os.getuid() == 0:
        path = "/proc/pref_jax"  # root may write everywhere else
    else:
        tmp_path.chmod(0o555)
        path = tmp_path / "run"
    with pytest.raises(InputError, match="cannot be written"):
        Workdir(path).acquire()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", '{"model_type": "bert"}', "not the config of a run"),
        ("config.json", "{", "not JSON"),
        ("config.json", "[1]", "not a JSON object"),
        ("config.json", b"\xff\xfe\x00", "not JSON"),
        ("metrics.jsonl", "", "no config.json"),
        ("result.json", "{}", "no config.json"),
        ("thesis.tex", "x", "not of a run, such as thesis.tex; give another --workdir"),
    ],
)
def test_a_folder_with_something_else_in_it_is_refused_unharmed(tmp_path, name, text, message):
    content = text if isinstance(text, bytes) else text.encode()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        Workdir(tmp_path).acquire()
    assert (tmp_path / name).read_bytes() == content
    assert os.listdir(tmp_path) == [name]
    # A refusal holds nothing.
    (tmp_path / name).unlink()
    with Workdir(tmp_path):
        pass


def test_a_log_file_of_the_user_is_no_reason_to_refuse(tmp_path):
    (tmp_path / "log.txt").write_text("x")
    with Workdir(tmp_path) as workdir:
        assert workdir.settle_config(CONFIG) is None
    with Workdir(tmp_path) as workdir:
        assert workdir.settle_config(CONFIG) == CONFIG


def test_a_config_with_another_result_is_refused_by_field_and_both_values(tmp_path):
    with Workdir(tmp_path) as workdir:
        workdir.settle_config(CONFIG)
        before = workdir.config_path.read_bytes()
        new = changed(seed=2, train__learning_rate=2e-4, train__ema=0.9)
        with pytest.raises(InputError) as caught:
            workdir.settle_config(new)
        text = str(caught.value)
        assert "seed was 1 and is now 2" in text
        assert "train.learning_rate was 0.0001 and is now 0.0002" in text
        assert "train.ema was absent and is now 0.9" in text
        assert workdir.config_path.read_bytes() == before


def test_time_limit_logging_and_mesh_may_differ_and_the_new_ones_are_kept(tmp_path):
    new = changed(train__max_hours=0.5, mesh={"data": 2, "fsdp": 4}, logging={"tensorboard": False})
    with Workdir(tmp_path) as workdir:
        workdir.settle_config(CONFIG)
        workdir.settle_config(new)
        assert workdir.read_config() == new


def test_the_same_values_in_other_clothes_are_the_same(tmp_path):
    new = changed(
        seed=np.int64(1), input={"budget": (0.1, 0.45, 0.45)}, train__learning_rate=0.0001
    )
    compare_config(CONFIG, new)
    compare_config(changed(train__epochs=3), changed(train__epochs=3.0))
    with pytest.raises(InputError, match="true"):
        compare_config(changed(seed=1), changed(seed=True))
    with pytest.raises(InputError, match="meshes"):
        compare_config(CONFIG, changed(meshes=1))


def test_reading_where_no_run_is(tmp_path):
    with pytest.raises(InputError, match="no folder"):
        Workdir(tmp_path / "nowhere").read_config()
    with pytest.raises(InputError, match="missing"):
        Workdir(tmp_path).read_config()
    assert Workdir(tmp_path).read_result() is None
    assert not (tmp_path / "nowhere").exists()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    write_json(path, {"a": 1})

    def fail(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(RunError, match="No space left"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_plain_values():
    value = {"a": np.float32(0.5), 1: (np.arange(2), float("inf")), "c": np.bool_(True), "d": None}
    assert plain(value) == {"a": 0.5, "1": [[0, 1], "Infinity"], "c": True, "d": None}
    with pytest.raises(TypeError):
        plain(object())


def test_environment_says_versions_and_devices():
    class Device:
        device_kind, platform = "cpu", "cpu"

    environment = describe_environment([Device(), Device()])
    assert environment["devices"] == [{"kind": "cpu", "count": 2}]
    assert {"python", "jax", "numpy"} <= environment["versions"].keys()
    json.dumps(environment)


def test_first_signal_is_a_wish_and_the_second_interrupt_ends_at_once():
    former = signal.getsignal(signal.SIGINT)
    with StopSignals() as stop:
        assert stop.requested is None
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested == "SIGTERM"
        with pytest.raises(Stopped, match=r"^stopped by SIGTERM; nothing is lost"):
            stop.check()
    with StopSignals(at_once=True) as stop:
        stop.check()
        stop.saving = True
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested == "SIGTERM"
    with StopSignals() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.requested == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is former
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


class Stream:
    def __init__(self, terminal: bool) -> None:
        self.terminal, self.text = terminal, ""

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass


def test_progress_speaks_in_whole_lines_where_there_is_no_terminal():
    stream = Stream(terminal=False)
    with Progress(10, initial=2, every_seconds=60, stream=stream) as progress:
        for step in range(3, 11):
            progress.update(step, rows=32, loss=1 / step)
    first, last = stream.text.splitlines()
    assert first.startswith("train: step 3/10, loss 0.3333, rows/s ") and first.endswith("left")
    assert last.startswith("train: step 10/10, loss 0.1, rows/s ")
    assert "\r" not in stream.text


def test_progress_draws_a_bar_on_a_terminal():
    stream = Stream(terminal=True)
    with Progress(10, initial=2, stream=stream) as progress:
        progress.update(10, rows=32, loss=0.5)
    assert "\r" in stream.text and "10/10" in stream.text
    assert "loss=0.5" in stream.text and "rows/s=" in stream.text


def test_a_folder_that_stays_empty_is_gone_again(tmp_path: Path) -> None:
    with Workdir(tmp_path / "runs" / "new"):
        pass
    assert list(tmp_path.iterdir()) == []
    kept = tmp_path / "kept"
    kept.mkdir()
    with Workdir(kept):
        pass
    assert kept.is_dir()  # it was there before


def test_what_a_killed_start_leaves_is_no_reason_to_refuse(tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    for name in ("model.json", "environment.json", "baselines.json", ".config.json.x1"):
        (tmp_path / name).write_text("{}")
    with Workdir(tmp_path):
        pass


def test_a_holder_with_a_long_command_is_told_in_short(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["launch/train.py", *["--config.seed=1"] * 500])
    with (
        Workdir(tmp_path),
        pytest.raises(InputError, match=r"\(launch/train\.py .*\.\.\.") as caught,
    ):
        Workdir(tmp_path).acquire()
    assert len(caught.value.what) < 300


def test_long_names_lose_their_middle() -> None:
    error = InputError(f"/data/{'x' * 4000}.csv:3", f"is not {'y' * 4000}.csv", "name another")
    assert error.where.startswith("/data/xxx") and error.where.endswith("x.csv:3")
    assert len(error.where) == 300 and len(str(error)) < 600
