"""What is in the bucket, and in which order it came there, while checkpoints are written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

pytest.importorskip("google.cloud.storage", reason="needs pip install pref_jax[gcs]")

from storage import Storage, standing_in

from pref_jax import bucket, cache
from pref_jax.errors import InputError, RunError
from pref_jax.training import mirror
from pref_jax.training.checkpoints import Checkpoints
from pref_jax.training.mirror import Mirror, local_run
from pref_jax.training.workdir import Workdir

URL = "gs://b/run"


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Storage]:
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(bucket, "PATIENCE", 1.0)
    monkeypatch.setattr(mirror, "PATIENCE", 3.0)
    with standing_in(monkeypatch) as storage:
        yield storage


def make_state(step: int) -> dict[str, Any]:
    return {"weights": np.arange(40.0) + step, "step": np.int32(step)}


ABSTRACT = {
    "weights": jax.ShapeDtypeStruct((40,), np.float64),
    "step": jax.ShapeDtypeStruct((), np.int32),
}


def open_checkpoints(workdir: Workdir) -> Checkpoints:
    return Checkpoints(workdir.checkpoints_path, keep=2, mirror=workdir.mirror)


def work(*steps: int, losses: tuple[float, ...] = ()) -> None:
    """A run that writes these checkpoints, and a line of metrics before each."""
    with Workdir(URL) as workdir, open_checkpoints(workdir) as checkpoints:
        checkpoints.restore_latest(ABSTRACT)
        workdir.config_path.write_text(json.dumps({"data": {}, "model": {}, "train": {}}))
        for number, step in enumerate(steps):
            with (workdir.path / "metrics.jsonl").open("a") as file:
                file.write(f'{{"step": {step}}}\n{{"torn": ')
            loss = losses[number] if losses else 1.0 / step
            checkpoints.save(step, make_state(step), {"valid_loss": loss})
            checkpoints.wait()
        (workdir.path / "result.json").write_text("{}")


def restore() -> tuple[int, Any]:
    with Workdir(URL) as workdir, open_checkpoints(workdir) as checkpoints:
        restored = checkpoints.restore_latest(ABSTRACT)
        assert restored is not None
        return restored[0], restored[1]


def steps(storage: Storage) -> list[str]:
    return sorted({n.split("/")[1] for n in storage.names(URL) if n.startswith("checkpoints/")})


def test_the_manifest_comes_last_and_the_result_after_it(storage: Storage) -> None:
    work(1, 2)
    writes = [name.removeprefix("run/") for method, name in storage.requests if method == "POST"]
    order = [name for name in writes if name != ".lock"]
    for step in (1, 2):
        own = [place for place, name in enumerate(order) if name.startswith(f"checkpoints/{step}/")]
        assert order[own[-1]] == f"checkpoints/{step}/manifest.json" and len(own) > 3
        assert "metrics.jsonl" in order[: own[0]]
    assert order[0] == "config.json" and order[-1] == "result.json"
    # The holder shows that it lives just before it commits.
    manifest = writes.index("checkpoints/1/manifest.json")
    assert ".lock" in writes[manifest - 1]
    assert storage.get(f"{URL}/metrics.jsonl").endswith(b"\n")


def test_steps_are_kept_as_in_a_folder(storage: Storage) -> None:
    work(1, 2, 3, 4, 5, losses=(5.0, 1.0, 3.0, 3.0, 4.0))
    assert steps(storage) == ["2", "4", "5"]
    step, state = restore()
    assert step == 5 and (state["weights"] == make_state(5)["weights"]).all()
    run = local_run(URL)  # brings the best one alone
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["2"]
    assert run.name == "run"
    assert not (local_run(URL, checkpoint=False) / "checkpoints").exists()


def test_half_a_checkpoint_is_none(storage: Storage) -> None:
    work(1, 2)
    del storage.objects["b", "run/checkpoints/2/manifest.json"]
    assert restore()[0] == 1
    work(3)
    assert steps(storage) == ["1", "3"]


@pytest.mark.parametrize("damage", ["flip", "cut", "lose"])
def test_damaged_checkpoint_is_passed_over_and_written_again(storage: Storage, damage: str) -> None:
    work(1, 2)
    name = max(
        (n for n in storage.names(URL) if n.startswith("checkpoints/2/state/")),
        key=lambda name: len(storage.get(f"{URL}/{name}")),
    )
    content = bytearray(storage.get(f"{URL}/{name}"))
    if damage == "lose":
        del storage.objects["b", f"run/{name}"]
    else:
        content[len(content) // 2] ^= 1
        storage.put(f"{URL}/{name}", bytes(content[: -1 if damage == "cut" else None]))
    assert restore()[0] == 1
    work(2)
    step, state = restore()
    assert step == 2 and (state["weights"] == make_state(2)["weights"]).all()


def test_nothing_counts_that_is_only_here(storage: Storage) -> None:
    """A run that ended before its last checkpoint was in the bucket."""
    work(1)
    storage.fault = lambda method, name: (
        403 if method == "POST" and "/checkpoints/" in name else None
    )
    with pytest.raises(InputError, match=r"^gs://b/run/checkpoints/2/.*: no permission"):
        work(2)
    path = Mirror(URL).path
    assert (path / "checkpoints/2").is_dir()
    storage.fault = lambda method, name: None
    assert restore()[0] == 1
    assert not path.exists()


def test_writer_that_was_replaced_writes_no_more(storage: Storage) -> None:
    with (
        pytest.raises(RunError, match="another run has taken it"),
        Workdir(URL) as workdir,
        open_checkpoints(workdir) as checkpoints,
    ):
        workdir.config_path.write_text("{}")
        storage.put(f"{URL}/.lock", b"{}")
        checkpoints.save(1, make_state(1), {})
        checkpoints.wait()
    assert storage.names(URL) == [".lock"]


def test_foreign_files_are_not_fetched(storage: Storage) -> None:
    for name in ("holiday.jpg", "checkpoints/1/manifest.json"):
        storage.put(f"{URL}/{name}", b"x")
        with pytest.raises(InputError, match=r"^gs://b/run: holds "), Workdir(URL):
            pass
        assert not [name for method, name in storage.requests if method == "GET" and name]
        storage.objects.clear()


def test_a_run_waits_longer_for_its_bucket_than_a_start(storage: Storage) -> None:
    with (
        pytest.raises(RunError, match="could not be reached for 3 s"),
        Workdir(URL) as workdir,
        open_checkpoints(workdir) as checkpoints,
    ):
        storage.fault = lambda method, name: 503
        checkpoints.save(1, make_state(1), {})
    with pytest.raises(RunError, match="could not be reached for 1 s"), Workdir(URL):
        pass
