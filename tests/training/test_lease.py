"""One writer at a time to a run in a bucket, also where holders die or are taken for dead."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator

import pytest

pytest.importorskip("google.cloud.storage", reason="needs pip install pref_jax[gcs]")

from storage import Storage, standing_in

from pref_jax.bucket import Folder
from pref_jax.errors import InputError, RunError
from pref_jax.training import lease as leases
from pref_jax.training.lease import Lease


@pytest.fixture
def storage(monkeypatch: pytest.MonkeyPatch) -> Iterator[Storage]:
    monkeypatch.setattr(leases, "BEAT", 0.1)
    monkeypatch.setattr(leases, "STALE", 0.6)
    with standing_in(monkeypatch) as storage:
        yield storage


def make() -> Lease:
    return Lease(Folder("gs://b/run"))


def move_away(storage: Storage) -> None:
    """The holder is on another machine: nobody here knows whether its process lives."""
    holder = json.loads(storage.get("gs://b/run/.lock")) | {"machine": "far away", "pid": 1}
    storage.put("gs://b/run/.lock", json.dumps(holder).encode())


def test_second_holder_is_refused_and_named(storage: Storage) -> None:
    first = make()
    first.take()
    with pytest.raises(InputError, match=r"^gs://b/run: is in use by process \d+ on .* since "):
        make().take()
    first.check()
    first.release()
    assert storage.names("gs://b/run") == []
    second = make()
    second.take()
    second.release()


def test_holder_on_another_machine_is_refused_while_it_lives(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make()
    monkeypatch.setattr(leases, "_machine", lambda: "far away")
    first.take()
    time.sleep(0.25)  # a sign of life says where it is
    with monkeypatch.context() as here:
        here.setattr(leases, "_is_here", lambda holder: False)
        with pytest.raises(InputError, match="is in use by"):
            make().take()
    first.release()


def test_dead_holder_is_replaced_and_finds_out(storage: Storage) -> None:
    """The second holder waits for it, and the first one may write no more."""
    first = make()
    first.take()
    first._end.set()  # it sleeps: no signs of life
    move_away(storage)
    second = make()
    second.take()
    with pytest.raises(RunError, match="another run has taken it"):
        first.check()
    first.release()
    second.check()
    assert storage.names("gs://b/run") == [".lock"]
    second.release()


def test_holder_that_has_ended_here_is_replaced_at_once(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "BEAT", 60.0)
    monkeypatch.setattr(leases, "STALE", 600.0)
    first = make()
    first.take()
    holder = json.loads(storage.get("gs://b/run/.lock")) | {"pid": 2**22 + 1}
    storage.put("gs://b/run/.lock", json.dumps(holder).encode())
    second = make()
    second.take()
    second.release()


def test_of_many_that_start_together_one_gets_it(storage: Storage) -> None:
    outcomes: list[bool] = []
    holders = []

    def attempt() -> None:
        lease = make()
        try:
            lease.take()
            holders.append(lease)
            outcomes.append(True)
        except InputError:
            outcomes.append(False)

    threads = [threading.Thread(target=attempt) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == [False] * 7 + [True]
    holders[0].release()


def test_network_that_comes_back_costs_nothing(storage: Storage) -> None:
    holder = make()
    holder.take()
    storage.fault = lambda method, name: 403
    time.sleep(0.3)
    storage.fault = lambda method, name: None
    holder.check()
    holder.release()
