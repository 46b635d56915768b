"""Every measured value stands once, whole, and as valid JSON."""

import importlib.util
import json
import os
import resource
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pref_jax.errors import RunError
from pref_jax.training import curves
from pref_jax.training.records import MetricLog, read_metrics


def read_lines(folder) -> list[dict]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def write_steps(folder, steps) -> None:
    with MetricLog(folder, tensorboard=False) as log:
        for step in steps:
            log.write(step, "train", {"loss": 1 / step})


def test_values_come_back_exactly_and_a_line_is_there_at_once(tmp_path):
    log = MetricLog(tmp_path, tensorboard=False)
    values = {
        "loss": 0.1 + 0.2,
        "single": np.float32(0.1),
        "count": np.int64(3),
        "bad": float("nan"),
        "worse": -np.inf,
    }
    log.write(1, "valid", values)
    (row,) = read_lines(tmp_path)
    assert list(row)[:2] == ["step", "split"]
    assert (row["step"], row["split"], row["count"]) == (1, "valid", 3)
    assert row["loss"] == 0.1 + 0.2
    assert np.float32(row["single"]) == np.float32(0.1)
    assert np.isnan(float(row["bad"])) and float(row["worse"]) == -np.inf
    log.close()
    log.close()


def test_a_resumed_run_has_every_step_once(tmp_path):
    write_steps(tmp_path, range(1, 8))
    with MetricLog(tmp_path, tensorboard=False) as log:
        log.drop_after(4)
        log.write(5, "train", {"loss": 0.5})
    assert [row["step"] for row in read_lines(tmp_path)] == [1, 2, 3, 4, 5]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("torn", [b'{"step": 3, "spl', b'{"step": 3, "split": "train"}', b"\0" * 9])
def test_a_torn_last_line_goes_and_the_next_one_stays_whole(tmp_path, torn):
    write_steps(tmp_path, [1, 2])
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(torn)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2
    with MetricLog(tmp_path, tensorboard=False) as log:
        log.write(3, "train", {"loss": 0.5})
    assert [row["step"] for row in read_lines(tmp_path)] == [1, 2, 3]


def test_a_file_of_nothing_but_a_torn_line_becomes_empty(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b"x" * 200_000)
    MetricLog(tmp_path, tensorboard=False).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_damaged_lines_in_the_middle_go_on_resume(tmp_path):
    write_steps(tmp_path, [1, 2])
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\0\0\n[]\n" + path.read_bytes())
    with MetricLog(tmp_path, tensorboard=False) as log:
        log.drop_after(2)
    assert [row["step"] for row in read_lines(tmp_path)] == [1, 2]


def test_nothing_is_rewritten_where_nothing_goes(tmp_path):
    write_steps(tmp_path, [1, 2])
    before = (tmp_path / "metrics.jsonl").stat().st_ino
    with MetricLog(tmp_path, tensorboard=False) as log:
        log.drop_after(2)
    assert (tmp_path / "metrics.jsonl").stat().st_ino == before


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_one_line(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    log = MetricLog(tmp_path, tensorboard=False)
    with pytest.raises(RunError, match="No space left"):
        log.write(1, "train", {"loss": 1.0})


def test_half_a_line_is_an_error_and_gone_when_the_run_goes_on(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    log = MetricLog(tmp_path, tensorboard=False)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        log.write(1, "train", {"loss": 1.0})
        with pytest.raises(RunError, match="half a line"):
            log.write(2, "train", {"loss": 1.0, "note": "x" * 100})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    write_steps(tmp_path, [2])
    assert [row["step"] for row in read_lines(tmp_path)] == [1, 2]


def test_without_tensorflow_the_lines_are_written_all_the_same(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    monkeypatch.setattr(curves, "subprocess", None)  # nothing is started
    with MetricLog(tmp_path, tensorboard=True) as log:
        log.write(1, "train", {"loss": 1.0})
    assert len(read_lines(tmp_path)) == 1
    assert not [one for one in caplog.records if one.levelname == "WARNING"]


def test_a_failing_curve_writer_does_not_end_the_run(tmp_path, monkeypatch, caplog):
    (tmp_path / "dead.py").write_text("raise SystemExit('no room')")
    monkeypatch.setattr(curves, "__file__", str(tmp_path / "dead.py"))
    with MetricLog(tmp_path, tensorboard=True) as log:
        for step in range(1, 2000):  # more than a pipe holds
            log.write(step, "train", {"loss": 1.0})
    assert len(read_lines(tmp_path)) == 1999
    (warning,) = [one for one in caplog.records if one.levelname == "WARNING"]
    assert "no room" in warning.getMessage()


def read_curve(folder: Path, tag: str) -> dict[int, float]:
    """The values of one curve, by step; reads the event files without TensorFlow."""
    from tensorboard.compat.proto.event_pb2 import Event

    curve = {}
    for path in folder.glob("events.out.tfevents.*"):
        content, position = path.read_bytes(), 0
        while position < len(content):  # each: length, its checksum, the event, its checksum
            (length,) = struct.unpack_from("<Q", content, position)
            event = Event.FromString(content[position + 12 : position + 12 + length])
            position += length + 16
            for value in event.summary.value:
                if value.tag == tag:
                    (curve[event.step],) = np.frombuffer(value.tensor.tensor_content, np.float32)
    return curve


def test_curves_hold_the_same_numbers_and_training_never_waits(tmp_path):
    for package in ("clu", "tensorboard", "tensorflow"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    code = """
import sys, time
from pref_jax.training.records import MetricLog
with MetricLog(sys.argv[1], tensorboard=True) as log:
    start = time.monotonic()
    for step in range(1, 2001):
        log.write(step, "train", {"loss": 0.5 / step, "bad": float("nan"), "name": "x"})
    assert time.monotonic() - start < 1, "writing waited for TensorFlow"
assert "tensorflow" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    wanted = {step: np.float32(0.5 / step) for step in range(1, 2001)}
    assert read_curve(tmp_path, "train/loss") == wanted
    assert read_curve(tmp_path, "train/bad") == {}
