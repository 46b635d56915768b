"""Runs in a bucket: the same bits as in a folder, whatever happens to processes and network.

The bucket is a stand-in on localhost. Another machine is an empty cache.
"""

from __future__ import annotations

import itertools
import json
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
from rig import TINY, UNSTEADY, call, finish, read_arrays, read_lines, start, wait_for

pytest.importorskip("google.cloud.storage", reason="needs pip install pref_jax[gcs]")

from storage import Storage

STEPS = 10


@pytest.fixture(scope="module")
def storage(arena: Path) -> Iterator[Storage]:
    storage = Storage("b")
    storage.put("gs://b/data/train.csv", (arena / "train.csv").read_bytes())
    storage.put("gs://b/data/test.csv", (arena / "test.csv").read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", storage.address)
        yield storage
    storage.close()


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[itertools.count[int]]:
    """``next(machine)``: from here on everything runs where nothing has run before."""

    class Machines(itertools.count):  # type: ignore[type-arg]
        def __next__(self) -> int:
            number = super().__next__()
            monkeypatch.setenv("PREF_JAX_CACHE", str(tmp_path / f"machine{number}"))
            return number

    return Machines()  # type: ignore[return-value]


def make_command(*changes: str, data: str = "gs://b/data/train.csv") -> tuple[str, ...]:
    return (
        *TINY,
        "--config.model.config.num_layers=1",
        "--config.model.config.hidden_size=16",
        "--config.model.config.intermediate_size=32",
        "--config.input.layout=single",
        f"--config.data.train={data}",
        f"--config.train.max_steps={STEPS}",
        "--config.train.learning_rate=1e-3",
        "--config.eval.every_steps=5",
        "--config.checkpoint.every_steps=2",
        *changes,
    )


@pytest.fixture(scope="module")
def local(arena: Path, storage: Storage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in a folder."""
    folder = tmp_path_factory.mktemp("local")
    command = make_command(data=f"{arena}/train.csv")
    finish(start(folder / "log", "train", *command, f"--workdir={folder}/run"), folder / "log")
    return folder / "run"


def bring(storage: Storage, url: str, folder: Path) -> Path:
    """The whole run as a folder."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in storage.names(url):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(storage.get(f"{url}/{name}"))
    return folder


def assert_same(ours: Path, theirs: Path) -> None:
    lines = read_lines(ours)
    assert [row["step"] for row in lines if row["split"] == "train"] == [*range(1, STEPS + 1)]
    assert lines == read_lines(theirs)
    arrays, wanted = (read_arrays(folder, STEPS) for folder in (ours, theirs))
    assert arrays.keys() == wanted.keys() and len(arrays) > 20
    for name, array in arrays.items():
        assert array.tobytes() == wanted[name].tobytes(), name
    results = [json.loads((folder / "result.json").read_text()) for folder in (ours, theirs)]
    for result in results:
        for name in UNSTEADY:
            del result[name]
    assert results[0] == results[1]
    steps = [sorted(path.name for path in (f / "checkpoints").iterdir()) for f in (ours, theirs)]
    assert steps[0] == steps[1]


def test_run_in_a_bucket_that_fails_at_times_is_the_local_one(
    storage: Storage, local: Path, machine: Iterator[int], tmp_path: Path
) -> None:
    next(machine)
    number = itertools.count(1)

    def fail_at_times(method: str, name: str) -> int | str | None:
        count = next(number)
        return 503 if count % 11 == 0 else "cut" if count % 13 == 0 else None

    storage.fault = fail_at_times
    log = tmp_path / "log"
    said = finish(start(log, "train", *make_command(), "--workdir=gs://b/runs/one"), log)
    storage.fault = lambda method, name: None
    assert "run: gs://b/runs/one" in said and str(tmp_path) not in said
    run = bring(storage, "gs://b/runs/one", tmp_path / "run")
    assert_same(run, local)
    assert ".lock" not in storage.names("gs://b/runs/one")
    assert not list((tmp_path / "machine0/workdirs").iterdir())
    files = [
        # Orbax names the arrays' own files at random.
        {p.relative_to(f) for p in f.rglob("[!.]*") if p.is_file() and p.parent.name != "d"}
        for f in (run, local)
    ]
    assert files[0] == files[1]

    # All that reads a run reads it there.
    for workdir in ("gs://b/runs/one", local):
        name = f"{tmp_path}/{Path(workdir).name}"
        for outcome in (
            call(
                "predict",
                f"--workdir={workdir}",
                "--data=gs://b/data/test.csv",
                f"--output={name}.csv",
            ),
            call(
                "evaluate",
                f"--workdir={workdir}",
                "--data=gs://b/data/train.csv",
                f"--output={name}.json",
            ),
            call("export", f"--workdir={workdir}", f"--output={name}.exported"),
        ):
            assert outcome.code == 0, outcome
    for one in ("csv", "json", "exported/model.safetensors"):
        ours, theirs = tmp_path / f"one.{one}", tmp_path / f"{local.name}.{one}"
        assert ours.read_bytes() == theirs.read_bytes()
    outcome = call("report", "gs://b/runs/one", local, f"--output={tmp_path}/report")
    assert outcome.code == 0, outcome
    assert (tmp_path / "report/results.csv").read_text().count("\n") == 3
    outcome = call("train", *make_command(), "--workdir=gs://b/runs/one")
    assert outcome.code == 0 and "is finished" in outcome.stdout, outcome
    outcome = call("train", *make_command(), "--workdir=gs://b/runs/one", "--config.seed=1")
    assert outcome.code == 2, outcome
    assert outcome.stderr.startswith("error: gs://b/runs/one/config.json: the run in this folder")


def test_kills_and_refusals_change_nothing(
    storage: Storage, local: Path, machine: Iterator[int], tmp_path: Path
) -> None:
    """Each time it goes on where nothing of it is left but the bucket."""
    url, log = "gs://b/runs/killed", tmp_path / "log"
    command = "train", *make_command(), f"--workdir={url}"

    def begin(step: int, name: str) -> tuple[ForkServerProcess, threading.Event]:
        """Starts, and lets the write of an object of a checkpoint fail until the process ends."""
        next(machine)
        reached = threading.Event()

        def fault(method: str, wanted: str) -> int | None:
            if method == "POST" and f"/checkpoints/{step}/{name}" in wanted:
                reached.set()
                return 503
            return None

        storage.fault = fault
        log.write_text("")
        process = start(log, *command)
        wait_for(reached.is_set, process, log)
        return process, reached

    # All of a checkpoint is there but its manifest.
    process, _ = begin(4, "manifest.json")
    second = call(*command)
    assert second.code == 2 and f"{url}: is in use by process {process.pid}" in second.stderr
    assert second.stderr.count("\n") == 1
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    there = storage.names(url)
    assert "checkpoints/2/manifest.json" in there and "checkpoints/4/state/d/" in "".join(there)
    assert "checkpoints/4/manifest.json" not in there

    # The metrics are ahead of the last checkpoint.
    process, _ = begin(8, "")
    assert f"resumed {url} at update 2 of {STEPS}" in log.read_text()
    process.kill()
    process.join()

    # The right to write is taken away.
    next(machine)
    storage.fault = lambda method, name: (
        403 if method == "POST" and "/checkpoints/8/" in name else None
    )
    log.write_text("")
    said = finish(start(log, *command), log, code=2)
    assert f"resumed {url} at update 6 of {STEPS}" in said
    (error,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert error.startswith(f"error: {url}/checkpoints/8/") and "no permission" in error
    storage.fault = lambda method, name: None

    # A checkpoint is damaged in the bucket.
    (damaged,) = [n for n in storage.names(url) if "checkpoints/6/state/d/" in n][:1]
    content = bytearray(storage.get(f"{url}/{damaged}"))
    content[len(content) // 2] ^= 1
    storage.put(f"{url}/{damaged}", bytes(content))
    next(machine)
    log.write_text("")
    said = finish(start(log, *command), log)
    assert "checkpoint 6 is skipped" in said and f"resumed {url} at update 5 of {STEPS}" in said
    assert_same(bring(storage, url, tmp_path / "run"), local)


def test_what_is_no_run_is_not_touched(
    storage: Storage, machine: Iterator[int], tmp_path: Path
) -> None:
    next(machine)
    before = dict(storage.objects)
    for workdir, said in (
        ("gs://b/data", "gs://b/data: holds files that are not of a run, such as test.csv"),
        ("gs://none/run", "gs://none/run: there is no such bucket or object"),
    ):
        outcome = call("train", *make_command(), f"--workdir={workdir}")
        assert outcome.code == 2 and outcome.stderr.startswith(f"error: {said}"), outcome
    outcome = call("evaluate", "--workdir=gs://b/data", "--data=gs://b/data/train.csv")
    assert outcome.code == 2 and "gs://b/data: there is no run" in outcome.stderr
    outcome = call("simulate", "--rows=10", "--test_rows=4", "--output=gs://b/new")
    assert outcome.code == 2 and "name a local place" in outcome.stderr
    assert storage.objects == before


def test_two_hosts_need_no_shared_disk(
    storage: Storage, arena: Path, machine: Iterator[int], tmp_path: Path
) -> None:
    """Parameters are cut over both; one host is lost on the way and both start from nothing."""
    command = (*make_command("--config.mesh.data=2", "--config.mesh.fsdp=4"), "--num_hosts=2")

    def launch(workdir: str, *codes: int, kill_after: str = "") -> list[str]:
        with socket.create_server(("127.0.0.1", 0)) as server:
            place = f"127.0.0.1:{server.getsockname()[1]}"
        logs, processes = [tmp_path / "log0", tmp_path / "log1"], []
        for host, log in enumerate(logs):
            next(machine)
            log.write_text("")
            where = f"--workdir={workdir}", f"--coordinator={place}", f"--host={host}"
            flags = "--xla_backend_optimization_level=0"
            processes.append(start(log, "train", *command, *where, devices=4, xla_flags=flags))
        if kill_after:
            wait_for(lambda: kill_after in storage.names(workdir), processes[0], logs[0])
            processes[1].kill()
        for process in processes:
            process.join(timeout=300)
        said = [log.read_text(errors="replace") for log in logs]
        assert [process.exitcode for process in processes] == list(codes), said
        assert "Traceback" not in "".join(said), said
        return said

    launch(f"{tmp_path}/shared", 0, 0)
    launch("gs://b/runs/two", 1, -signal.SIGKILL, kill_after="checkpoints/4/manifest.json")
    said = launch("gs://b/runs/two", 0, 0)
    assert "resumed gs://b/runs/two at update" in said[0] and "is skipped" not in said[0]
    assert_same(bring(storage, "gs://b/runs/two", tmp_path / "run"), tmp_path / "shared")
