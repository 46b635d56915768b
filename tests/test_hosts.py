"""Hosts that meet before JAX is told of them: who is missing, who differs, who is lost."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pref_jax import hosts
from pref_jax.errors import InputError, RunError
from pref_jax.hosts import Meeting, Settings, read_settings


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def meet(
    count: int, work: Callable[[Meeting], Any], timeout: float = 10.0, **ends: Any
) -> list[Any]:
    """What ``work`` returned or raised on each of ``count`` hosts, threads of this process."""
    port, results = free_port(), [None] * count

    def run(index: int) -> None:
        meeting = Meeting(Settings("127.0.0.1", port, count, index, timeout), **ends)
        try:
            meeting.join()
            results[index] = work(meeting)
            meeting.finish()
        except Exception as error:
            results[index] = meeting.fail(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in reversed(threads):  # the leader last
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return results


@pytest.fixture
def stray() -> Iterator[list[Any]]:
    """Things to close at the end."""
    with contextlib.ExitStack() as stack:
        things: list[Any] = []
        stack.callback(lambda: [thing.close() for thing in things])
        yield things


def test_everyone_gets_the_values_of_all_in_order() -> None:
    def work(meeting: Meeting) -> list[Any]:
        index = meeting.settings.index
        return [meeting.gather(f"round {number}", [index, number]) for number in range(50)]

    results = meet(3, work)
    assert results == [[[[host, number] for host in range(3)] for number in range(50)]] * 3


def test_missing_host_is_named_to_those_who_came() -> None:
    port, said = free_port(), {}

    def run(index: int) -> None:
        with pytest.raises(RunError) as caught:
            Meeting(Settings("127.0.0.1", port, 4, index, 1.0)).join()
        said[index] = str(caught.value)

    threads = [threading.Thread(target=run, args=(index,)) for index in (2, 0)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert time.monotonic() - began < 5
    assert "host 1, host 3 of 4 did not report" in said[0]
    assert said[2] == said[0]


def test_missing_coordinator_is_named() -> None:
    began = time.monotonic()
    with pytest.raises(RunError, match=r"host 0, the coordinator, did not answer host 1 within 1"):
        Meeting(Settings("127.0.0.1", free_port(), 2, 1, 1.0)).join()
    assert time.monotonic() - began < 4


def test_another_program_at_the_port_is_not_taken_for_the_leader(stray: list[Any]) -> None:
    server = socket.create_server(("127.0.0.1", 0))
    stray.append(server)
    with pytest.raises(RunError, match="did not answer host 1"):
        Meeting(Settings("127.0.0.1", server.getsockname()[1], 2, 1, 0.5)).join()


def test_strangers_at_the_port_do_not_count(stray: list[Any]) -> None:
    port, results = free_port(), {}

    def run(index: int) -> None:
        meeting = Meeting(Settings("127.0.0.1", port, 2, index, 10.0))
        meeting.join()
        results[index] = meeting.gather("value", index)
        meeting.finish()

    leader = threading.Thread(target=run, args=(0,))
    leader.start()
    for content in (b"GET / HTTP/1.0\r\n\r\n", b"\xff\xfe\n", b"[]\n", b""):
        while True:
            with contextlib.suppress(OSError):
                stray.append(socket.create_connection(("127.0.0.1", port), timeout=5))
                break
        stray[-1].sendall(content)
        if not content:
            stray[-1].close()
    follower = threading.Thread(target=run, args=(1,))
    follower.start()
    leader.join(20)
    follower.join(20)
    assert results == {0: [0, 1], 1: [0, 1]}


@pytest.mark.parametrize(
    ("count", "index", "said"), [(3, 2, "was told of 3 hosts"), (2, 1, "is there already")]
)
def test_host_that_does_not_belong_is_refused(
    count: int, index: int, said: str, stray: list[Any]
) -> None:
    port = free_port()
    first = threading.Event()

    def come(settings: Settings) -> None:
        with contextlib.suppress(RunError):
            Meeting(settings).join()
        first.set()

    # A leader of three, so that it still waits while the second host comes.
    leader = 3 if count == 2 else 2
    threads = [threading.Thread(target=come, args=(Settings("127.0.0.1", port, leader, 0, 2.0),))]
    if count == 2:
        threads.append(
            threading.Thread(target=come, args=(Settings("127.0.0.1", port, 3, 1, 2.0),))
        )
    for thread in threads:
        thread.start()
        time.sleep(0.3)
    with pytest.raises(InputError, match=said):
        Meeting(Settings("127.0.0.1", port, leader if count == 2 else count, index, 2.0)).join()
    for thread in threads:
        thread.join(10)


def test_error_of_one_ends_all_with_its_line() -> None:
    def work(meeting: Meeting) -> None:
        if meeting.settings.index == 1:
            raise InputError("train.csv:3", "is wrong", "correct it")
        meeting.gather("never", None)

    name = socket.gethostname()
    results = meet(3, work)
    assert [type(one) for one in results] == [InputError] * 3
    assert str(results[1]) == "train.csv:3: is wrong; correct it"
    for index in (0, 2):
        assert str(results[index]) == f"host 1 ({name}): train.csv:3: is wrong; correct it"


def test_defect_of_one_ends_the_others_as_a_failure() -> None:
    def work(meeting: Meeting) -> None:
        if meeting.settings.index == 0:
            raise ZeroDivisionError
        meeting.gather("never", None)

    results = meet(2, work)
    assert isinstance(results[0], ZeroDivisionError)
    assert isinstance(results[1], RunError) and "failed (ZeroDivisionError)" in str(results[1])


def test_broken_collective_is_told_from_a_defect() -> None:
    """The connection breaks a moment after the collective does."""

    def work(meeting: Meeting) -> None:
        if meeting.settings.index == 1:
            time.sleep(0.3)
            raise ZeroDivisionError
        meeting.raise_loss()

    results = meet(2, work)
    assert isinstance(results[0], RunError) and "host 1 (" in str(results[0])

    def untroubled(meeting: Meeting) -> str:
        meeting.raise_loss()
        return "on"

    assert meet(2, untroubled) == ["on", "on"]


@pytest.mark.parametrize("lost", [0, 1])
def test_lost_host_ends_a_process_that_waits_elsewhere(
    lost: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in a collective: the main thread does not come back to ask."""
    codes: list[int] = []
    gone = threading.Event()

    def work(meeting: Meeting) -> None:
        if meeting.settings.index == lost:
            for link in meeting._links.values():
                link.socket.shutdown(socket.SHUT_RDWR)
            return
        assert gone.wait(20)

    def end(code: int) -> None:
        codes.append(code)
        gone.set()

    port = free_port()
    threads = []
    for index in (0, 1):
        meeting = Meeting(
            Settings("127.0.0.1", port, 2, index, 10.0),
            end=(lambda code: None) if index == lost else end,
        )

        def run(meeting: Meeting = meeting) -> None:
            meeting.join()
            work(meeting)

        threads.append(threading.Thread(target=run))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert codes == [1]
    assert f"error: host {lost} (" in capsys.readouterr().err


def test_hosts_that_have_gone_apart_are_stopped() -> None:
    results = meet(2, lambda meeting: meeting.gather(f"step {meeting.settings.index}", None))
    for one in results:
        assert isinstance(one, RunError) and "have gone apart" in str(one)


@pytest.mark.parametrize("delay", [0.0, 0.3])
def test_agreement_names_value_and_hosts(monkeypatch: pytest.MonkeyPatch, delay: float) -> None:
    """Also on the host that gets the values last, when another has refused them already."""
    local, send = threading.local(), Meeting._send

    def send_slowly(meeting: Meeting, host: int, message: Any) -> None:
        if message["kind"] == "values" and host == list(meeting._links)[-1]:
            time.sleep(delay)
        send(meeting, host, message)

    monkeypatch.setattr(Meeting, "_send", send_slowly)

    class Here:
        """The module's meeting is one per process; here one per thread."""

        def __getattr__(self, name: str) -> Any:
            return getattr(local.meeting, name)

    monkeypatch.setattr(hosts, "_meeting", Here())

    def work(meeting: Meeting) -> None:
        local.meeting = meeting
        index = meeting.settings.index
        hosts.agree("a.csv", {"rows": 3, "content": "a" * 64}, "mend it")
        assert hosts.broadcast("one", index) == 0
        assert hosts.on_leader("two", lambda: [index]) == [0]
        assert hosts.first("three", "stop" if index else None) == "stop"
        hosts.agree("b.csv", {"rows": 3, "content": f"{index // 2}" * 64}, "mend it")

    results = meet(3, work)
    name = socket.gethostname()
    for one in results:
        assert isinstance(one, InputError)
        assert str(one) == (
            f"b.csv: the hosts differ in content: 000000000000 on host 0 ({name}) and "
            f"host 1 ({name}), 111111111111 on host 2 ({name}); mend it"
        )


def test_one_host_is_alone() -> None:
    assert hosts.count() == 1 and hosts.is_leader()
    assert hosts.gather("x", 3) == [3] and hosts.broadcast("x", 3) == 3
    assert hosts.first("x", None) is None
    hosts.agree("x", {"y": object()}, "z")
    assert read_settings({}, {}) is None
    assert read_settings({"num_hosts": "1"}, {}) is None


def test_flags_go_before_variables() -> None:
    variables = {
        "PREF_JAX_COORDINATOR": "[::1]:80",
        "PREF_JAX_NUM_HOSTS": "3",
        "PREF_JAX_HOST": "2",
        "PREF_JAX_HOST_TIMEOUT": "7.5",
    }
    assert read_settings({}, variables) == Settings("::1", 80, 3, 2, 7.5)
    typed = {"coordinator": "a.b:81", "host": "1"}
    assert read_settings(typed, variables) == Settings("a.b", 81, 3, 1, 7.5)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ({"host": "0"}, "--num_hosts: --host is given and this is missing"),
        ({"num_hosts": "2", "host": "0"}, "--coordinator: it is missing for 2 hosts"),
        ({"num_hosts": "2", "coordinator": "a:1"}, "--host: it is missing for 2 hosts"),
        ({"num_hosts": "x"}, "--num_hosts: 'x' is no whole number"),
        ({"num_hosts": "0"}, "--num_hosts: is 0"),
        ({"num_hosts": "2", "coordinator": "a:1", "host": "2"}, "--host: is 2 of 2 hosts"),
        ({"num_hosts": "2", "coordinator": "a", "host": "1"}, "--coordinator: 'a' is no ADDR"),
        ({"num_hosts": "2", "coordinator": "a:99999", "host": "1"}, "--coordinator: 'a:99999'"),
        ({"host_timeout": "nan"}, "--host_timeout: 'nan' is no number of seconds"),
        ({"host_timeout": "-1"}, "--host_timeout: '-1' is no number of seconds"),
    ],
)
def test_wrong_flags_are_refused(typed: dict[str, str], said: str) -> None:
    with pytest.raises(InputError) as caught:
        read_settings(typed, {})
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(
    ("nodes", "leader"),
    [
        ("gpu7", "gpu7"),
        ("gpu7,gpu9", "gpu7"),
        ("gpu[007-009,12]", "gpu007"),
        ("rack[3,5]-gpu,other", "rack3-gpu"),
    ],
)
def test_slurm_job_is_found(nodes: str, leader: str) -> None:
    job = {
        "SLURM_STEP_NODELIST": nodes,
        "SLURM_NTASKS": "4",
        "SLURM_PROCID": "3",
        "SLURM_STEP_NUM_NODES": "4",
    }
    found = read_settings({"num_hosts": "auto"}, job)
    assert found == Settings(leader, 8476, 4, 3, hosts.DEFAULT_TIMEOUT)
    with pytest.raises(InputError, match="ntasks-per-node=1"):
        read_settings({"num_hosts": "auto"}, {**job, "SLURM_STEP_NUM_NODES": "2"})


def test_tpu_slice_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    workers = {"TPU_WORKER_HOSTNAMES": "t1k-w0,t1k-w1", "TPU_WORKER_ID": "1"}
    auto = {"num_hosts": "auto"}
    assert read_settings(auto, workers) == Settings("t1k-w0", 8476, 2, 1, hosts.DEFAULT_TIMEOUT)
    assert read_settings(auto, {"TPU_WORKER_HOSTNAMES": "localhost"}) is None
    answers = {"agent-worker-number": "2", "worker-network-endpoints": "a:0:10.0.0.1,b:1:10.0.0.2"}
    monkeypatch.setattr(hosts, "_read_metadata", answers.__getitem__)
    with pytest.raises(InputError, match="is 2 of 2 hosts"):
        read_settings(auto, {})
    answers["agent-worker-number"] = "1"
    assert read_settings(auto, {}) == Settings("10.0.0.1", 8476, 2, 1, hosts.DEFAULT_TIMEOUT)

    def nowhere(name: str) -> str:
        raise OSError

    monkeypatch.setattr(hosts, "_read_metadata", nowhere)
    with pytest.raises(InputError, match="neither a Cloud TPU slice nor a SLURM job"):
        read_settings(auto, {})
