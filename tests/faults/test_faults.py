"""Disks, clocks, networks and files that go wrong: recovery, or one clear line."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from annotation.judge import Judge
from faults.conftest import Record
from faults.hub import Hub
from faults.test_kills import assert_same
from faults.trials import (
    Process,
    Trial,
    chain,
    make_annotate,
    make_study,
    run_straight,
)
from rig import REPOSITORY, wait_for

Mount = Callable[[Path, str], None]


@pytest.fixture
def mount() -> Iterator[Mount]:
    """Mounts, or mounts anew, a file system in memory with options such as ``size=1m``."""
    mounted: list[Path] = []

    def mount(folder: Path, options: str) -> None:
        again = ["-o", f"remount,{options}"] if folder in mounted else ["-o", options]
        done = subprocess.run(
            ["mount", "-t", "tmpfs", *again, "tmpfs", str(folder)], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"needs the right to mount: {done.stderr.strip()}")
        mounted.append(folder)

    yield mount
    for folder in dict.fromkeys(mounted):
        subprocess.run(["umount", str(folder)], check=True)


def test_disk_full_and_read_only_while_training(
    training: Trial, straight: Path, mount: Mount, tmp_path: Path, record: Record
) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount(folder, "size=200k")
    line = Process(training, folder).check_one_line(1)
    assert "disk is full" in line or "No space left" in line
    mount(folder, "size=64m")
    mount(folder, "ro,size=64m")
    read_only = Process(training, folder).check_one_line(1, 2)
    assert "Read-only file system" in read_only
    mount(folder, "rw,size=64m")
    assert_same(run_straight(training, folder), training.read(straight))
    record("train: disk full", f"`{_shorten(line)}`", "all up to the last checkpoint; goes on")
    record("train: read-only disk", f"`{_shorten(read_only)}`", "everything; goes on")


def test_disk_full_while_annotating(
    arena: Path, mount: Mount, tmp_path: Path, record: Record
) -> None:
    with Judge() as judge:
        trial = make_annotate(arena, judge.url)
        wanted = run_straight(trial, tmp_path / "straight")
        folder = tmp_path / "disk"
        folder.mkdir()
        mount(folder, "size=24k")
        line = Process(trial, folder).check_one_line(1)
        assert "No space left" in line
        rated = (folder / "A.jsonl").read_bytes().count(b"\n")
        mount(folder, "size=4m")
        assert rated
        before = judge.good.copy()
        assert_same(run_straight(trial, folder), wanted)
        assert (judge.good - before).total() == 24 - rated
    record(
        "annotate: disk full", f"`{_shorten(line)}`", "every rating written; only the rest asked"
    )


@pytest.mark.parametrize("error", ["EROFS", "ENOSPC"])
def test_a_disk_that_refuses_from_some_write_on(
    training: Trial,
    straight: Path,
    training_points: list[str],
    campaign: bool,
    tmp_path: Path,
    error: str,
    record: Record,
) -> None:
    points = [point for point in training_points if point.startswith("before")]
    only = random.Random(error).sample(points, 40 if campaign else 1)
    struck = chain(training, tmp_path / "harmed", error, only)
    assert struck
    assert_same(training.read(tmp_path / "harmed"), training.read(straight))
    record(
        f"train: every write fails with {error} from some write on ({len(struck)} writes tried)",
        "one line, exit code 1 or 2",
        "all up to the last checkpoint; goes on to the same bits",
    )


class JumpingClock:
    """`time.time` goes back and forth by hours; `time.monotonic` does not, by its definition."""

    def install(self) -> None:
        now, moments = time.time, random.Random(0)
        time.time = lambda: now() + moments.uniform(-36000, 36000)


def test_clock_jumps(training: Trial, straight: Path, tmp_path: Path, record: Record) -> None:
    """Orbax waits by the wall clock: a jump while it writes may look to it like ten minutes."""
    folder = tmp_path / "clock"
    folder.mkdir()
    process, happened = Process(training, folder, JumpingClock()), "nothing"
    if process.end() != 0:
        line = process.check_one_line(1)
        assert "the checkpoint could not be written" in line and "a clock that is set" in line
        happened = f"`{_shorten(line)}`"
    assert_same(run_straight(training, folder), training.read(straight))
    record("train: the clock jumps by hours, both ways, all the time", happened, "same bits")


@contextlib.contextmanager
def holding(trial: Trial, folder: Path, lock: Path) -> Iterator[Process]:
    """A process of a trial that holds its lock."""
    folder.mkdir()
    process = Process(trial, folder)
    try:
        wait_for(lambda: lock.exists() and lock.stat().st_size > 0, process.started, process.log)
        yield process
    finally:
        process.started.kill()
        process.started.join()


@pytest.mark.parametrize("name", ["train", "annotate", "reproduce"])
def test_a_second_run_is_refused_before_heavy_imports(
    name: str, training: Trial, arena: Path, tmp_path: Path, record: Record
) -> None:
    folder = tmp_path / "held"
    with Judge(seconds=5) as judge:
        trial, lock = {
            "train": (training, "run/.lock"),
            "annotate": (make_annotate(arena, judge.url), "A.jsonl.lock"),
            "reproduce": (make_study(), "study/.lock"),
        }[name]
        with holding(trial, folder, folder / lock) as first:
            done = subprocess.run(
                [
                    *(sys.executable, "-c", _RUN, str(REPOSITORY / f"launch/{trial.script}.py")),
                    *map(str, trial.arguments(folder)),
                ],
                capture_output=True,
                text=True,
                cwd=REPOSITORY,
                env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            )
            pid = first.started.pid
    assert done.returncode == 2, done
    assert f"is in use by process {pid} on " in done.stderr and done.stderr.count("\n") == 1
    assert done.stdout == "heavy: []\n", done
    line = done.stderr.strip()
    record(f"{name}: a second run", f"`{_shorten(line)}`", "the first goes on undisturbed")


_RUN = """
import atexit, runpy, sys
heavy = ("jax", "tensorflow", "orbax", "sklearn", "matplotlib", "datasets", "tokenizers")
atexit.register(lambda: print("heavy:", [name for name in heavy if name in sys.modules]))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [cut, flip])
def test_damaged_checkpoint_and_caches(
    damage: Callable[[Path], None],
    training: Trial,
    straight: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record: Record,
) -> None:
    """Every file of a checkpoint's arrays, of the cache and of the compiled programs at once."""
    folder, cache = tmp_path / "damaged", tmp_path / "cache"
    shutil.copytree(straight, folder)
    shutil.copytree(os.environ["PREF_JAX_CACHE"], cache)
    (folder / "run" / "result.json").unlink()
    (newest,) = folder.glob("run/checkpoints/4/state/d")
    damaged = [*newest.iterdir(), *(path for path in cache.rglob("*") if path.is_file())]
    for path in damaged:
        if path.stat().st_size and path.name != "CACHEDIR.TAG":
            damage(path)
    monkeypatch.setenv("PREF_JAX_CACHE", str(cache))
    process = Process(training, folder)
    assert process.end() == 0, process.said()
    said = process.said()
    assert "checkpoint 4 is skipped" in said and "is made again" in said
    shutil.rmtree(folder / "run" / "damaged")
    assert_same(training.read(folder), training.read(straight))
    for what in ("newest checkpoint", "every file of the cache"):
        record(
            f"train: {'a bit flipped in' if damage is flip else 'truncated'}, {what}",
            "a warning; " + ("the one before is taken" if "check" in what else "it is made again"),
            "same bits in the end",
        )


def test_network_gone_in_the_middle_of_a_download(
    tmp_path: Path, straight: Path, record: Record
) -> None:
    files = {"config.json": b"{}", "model.safetensors": os.urandom(1 << 20), "vocab.txt": b"a\n"}

    def fetch() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", _FETCH, "owner/model"],
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
            env={
                **os.environ,
                "PYTHONPATH": str(REPOSITORY),
                "HF_ENDPOINT": hub.url,
                "HF_HUB_OFFLINE": "0",
                "HF_HOME": str(tmp_path / "hub"),
                "HF_HUB_DISABLE_XET": "1",
            },
            timeout=300,
        )

    with Hub("owner/model", files) as hub:
        hub.lost = "model.safetensors"
        first = fetch()
        while_gone = fetch()
        hub.lost, hub.gone = None, False
        last = fetch()
    for done in (first, while_gone):
        assert done.returncode == 2, done
        assert done.stderr.startswith("error: --config.model.pretrained=owner/model: "), done
        assert done.stderr.count("\n") == 1, done
    assert last.returncode == 0, last
    found = Path(last.stdout.strip())
    assert {path.name: path.read_bytes() for path in found.iterdir()} == files
    line = first.stderr.strip()
    record(
        "network gone in the middle of a hub download",
        f"`{_shorten(line)}`",
        "what was fetched; never a half file in the folder; the same command fetches the rest",
    )


_FETCH = """
import sys
import pref_jax.command
from pref_jax.errors import InputError
from pref_jax.weights.files import weight_files
from pref_jax.weights.sources import resolve_source
try:
    folder = resolve_source(sys.argv[1])
    weight_files(folder)
except InputError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
print(folder)
"""


def test_a_loss_that_is_not_finite(training: Trial, tmp_path: Path, record: Record) -> None:
    folder = tmp_path / "wild"
    folder.mkdir()
    wild = Trial(
        training.script,
        lambda place: (
            *training.arguments(place),
            "--config.train.learning_rate=1e38",
            "--config.eval.every_steps=9",
        ),
        training.read,
    )
    line = Process(wild, folder).check_one_line(1)
    assert "learning rate" in line and "rows" in line
    record("train: a loss that is not finite", f"`{_shorten(line)}`", "the last good checkpoint")


def _shorten(line: str) -> str:
    """A message without the folders of this run."""
    words = [word.rpartition("/")[2] if "/" in word else word for word in line.split()]
    text = " ".join(words).replace("|", "/")
    return text if len(text) < 200 else f"{text[:200]}..."
