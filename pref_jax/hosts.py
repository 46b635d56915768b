"""Several hosts, one run: who takes part, what they agree on, and what ends them all.

The same command is started once per host. Before JAX is told of the others, the hosts meet over
plain sockets at the coordinator's address: host 0, the leader, listens and the others report in.
The connections stay open for the whole run and carry small things only: the values that hosts
must agree on, decisions of the leader, a sign of life every few seconds, and the last words of a
host that fails. JAX alone would do worse: where a host is lost its client ends the process from
C++, with a stack trace, or waits for ever in a collective.

Without ``--num_hosts`` nothing here does anything: one host agrees with itself.

This module imports nothing heavy, so that a missing host is named before anything is loaded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import logging
import math
import os
import platform
import re
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from absl import flags

from pref_jax.errors import InputError, RunError, Stopped

flags.disclaim_key_flags()  # `define_flags` makes them flags of the script that calls it

Value = TypeVar("Value")

logger = logging.getLogger("pref_jax")

DEFAULT_TIMEOUT = 120.0  # seconds
_DEFAULT_PORT = 8476  # where `auto` meets; the port that JAX takes on a TPU slice
_SHORTEST_SILENCE = 120.0  # seconds
_LONGEST_OUTAGE = 50.0  # seconds: of a machine without power the others know within a minute
_GRACE = 2.0  # seconds that a failure leaves the main thread to end by itself
_RETRY = 0.1  # seconds between two attempts to reach the leader
_LONGEST_LINE = 1 << 24  # bytes of a message; more is no message
_MAGIC = "pref_jax hosts 1"
_END = "the end"  # the last thing that hosts gather
# JAX's own opinion of who is alive must never come before ours: it ends the process in C++.
_JAX_PATIENCE = 7 * 24 * 3600  # seconds
_METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"


@dataclasses.dataclass(frozen=True)
class Settings:
    """One host's place among the others.

    Attributes:
      address, port: where the leader listens.
      count: number of hosts.
      index: this one's number, from 0, the leader's.
      timeout: seconds to wait for a host that does not show up or falls silent.
    """

    address: str
    port: int
    count: int
    index: int
    timeout: float = DEFAULT_TIMEOUT

    @property
    def place(self) -> str:
        """``ADDRESS:PORT``."""
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{host}:{self.port}"


# Flags.

_VARIABLES = {
    "coordinator": "PREF_JAX_COORDINATOR",
    "num_hosts": "PREF_JAX_NUM_HOSTS",
    "host": "PREF_JAX_HOST",
    "host_timeout": "PREF_JAX_HOST_TIMEOUT",
}


def define_flags() -> None:
    """Defines the flags of a command that several hosts can run together."""
    flags.DEFINE_string(
        "num_hosts",
        None,
        "Several hosts: how many run this same command together; auto on a Cloud TPU slice and "
        "under SLURM with one task per node. Also $PREF_JAX_NUM_HOSTS.",
    )
    flags.DEFINE_string(
        "coordinator",
        None,
        "Several hosts: ADDRESS:PORT of host 0, the same on all. Also $PREF_JAX_COORDINATOR.",
    )
    flags.DEFINE_string(
        "host",
        None,
        "Several hosts: this one's number, from 0. Also $PREF_JAX_HOST.",
    )
    flags.DEFINE_string(
        "host_timeout",
        None,
        "Several hosts: seconds to wait for one that does not show up or falls silent, "
        f"{DEFAULT_TIMEOUT:.0f} when nothing is said. Also $PREF_JAX_HOST_TIMEOUT.",
    )


def read_settings(
    typed: Mapping[str, str | None], environment: Mapping[str, str] = os.environ
) -> Settings | None:
    """What the flags say, and the environment where they say nothing; None: one host.

    Raises:
      InputError: something is missing or wrong.
    """
    values: dict[str, str] = {}
    names: dict[str, str] = {}
    for flag, variable in _VARIABLES.items():
        value = typed.get(flag)
        names[flag] = f"--{flag}" if value is not None else f"${variable}"
        values[flag] = (environment.get(variable, "") if value is None else value).strip()
    timeout = DEFAULT_TIMEOUT
    if values["host_timeout"]:
        timeout = math.nan
        with contextlib.suppress(ValueError):
            timeout = float(values["host_timeout"])
        if not 0 < timeout < math.inf:
            raise InputError(
                names["host_timeout"],
                f"{values['host_timeout']!r} is no number of seconds",
                f"give a positive number, such as {DEFAULT_TIMEOUT:.0f}",
            )
    if not values["num_hosts"]:
        for flag in ("coordinator", "host"):
            if values[flag]:
                raise InputError(
                    "--num_hosts", f"{names[flag]} is given and this is missing", _example(flag)
                )
        return None
    if values["num_hosts"].lower() == "auto":
        return _discover(values, names, timeout, environment)
    count = _whole(names["num_hosts"], values["num_hosts"], "auto, or a whole number from 1")
    if count < 1:
        raise InputError(names["num_hosts"], f"is {count}", "give auto, or a number from 1")
    if count == 1:
        return None
    for flag in ("coordinator", "host"):
        if not values[flag]:
            raise InputError(f"--{flag}", f"it is missing for {count} hosts", _example(flag))
    index = _whole(names["host"], values["host"], f"this host's number, 0 to {count - 1}")
    if not 0 <= index < count:
        raise InputError(
            names["host"], f"is {index} of {count} hosts", f"give a number from 0 to {count - 1}"
        )
    address, port = _split_address(names["coordinator"], values["coordinator"])
    return Settings(address, port, count, index, timeout)


def _example(flag: str) -> str:
    return (
        "for example: --coordinator=10.0.0.1:8476 --num_hosts=2 --host=0"
        if flag == "coordinator"
        else "for example: --num_hosts=2 --host=0, and --host=1 on the second one"
    )


def _whole(name: str, text: str, wanted: str) -> int:
    if not re.fullmatch(r"[+-]?\d{1,9}", text, re.ASCII):
        raise InputError(name, f"{text!r} is no whole number", f"give {wanted}")
    return int(text)


def _split_address(name: str, text: str) -> tuple[str, int]:
    found = re.fullmatch(r"(\[[0-9A-Fa-f:.%]+\]|[^\s:/\[\]]+):(\d{1,5})", text, re.ASCII)
    if found is None or not 1 <= int(found[2]) <= 65535:
        raise InputError(
            name, f"{text!r} is no ADDRESS:PORT", "give host 0's, such as 10.0.0.1:8476"
        )
    return found[1].strip("[]"), int(found[2])


def _discover(
    values: Mapping[str, str],
    names: Mapping[str, str],
    timeout: float,
    environment: Mapping[str, str],
) -> Settings | None:
    """Reads a cluster's own description of itself; what the user gave goes first."""
    found = _find_slurm(environment) or _find_tpu_workers(environment) or _find_tpu_metadata()
    if found is None:
        raise InputError(
            names["num_hosts"],
            "is auto, and this is neither a Cloud TPU slice nor a SLURM job",
            "give --coordinator=ADDRESS:PORT --num_hosts=N --host=I",
        )
    address, count, index = found
    if count == 1:
        return None
    port = _DEFAULT_PORT
    if values["coordinator"]:
        address, port = _split_address(names["coordinator"], values["coordinator"])
    if values["host"]:
        index = _whole(names["host"], values["host"], f"this host's number, 0 to {count - 1}")
    if not 0 <= index < count:
        raise InputError(names["host"], f"is {index} of {count} hosts", "give --host=I")
    return Settings(address, port, count, index, timeout)


def _find_slurm(environment: Mapping[str, str]) -> tuple[str, int, int] | None:
    """The step that ``srun`` started: its first node leads."""
    try:
        nodes = environment["SLURM_STEP_NODELIST"]
        count, index = int(environment["SLURM_NTASKS"]), int(environment["SLURM_PROCID"])
        on_nodes = int(environment["SLURM_STEP_NUM_NODES"])
    except (KeyError, ValueError):
        return None
    if count != on_nodes:
        raise InputError(
            "SLURM",
            f"started {count} tasks on {on_nodes} nodes, and a host's devices belong to one task",
            "give srun --ntasks-per-node=1",
        )
    # "node1", "node1,node2", "node[001-004,007]", "node[3,5]-gpu"
    found = re.match(r"([^,\[]*)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", nodes)
    first = "".join(part or "" for part in found.groups()) if found else ""
    return (first, count, index) if first else None


def _find_tpu_workers(environment: Mapping[str, str]) -> tuple[str, int, int] | None:
    """The variables of TPU workers on GKE and in notebooks."""
    workers = [name.strip() for name in environment.get("TPU_WORKER_HOSTNAMES", "").split(",")]
    workers = [name for name in workers if name]
    if not workers:
        return None
    try:
        return workers[0], len(workers), int(environment.get("TPU_WORKER_ID") or 0)
    except ValueError:
        return None


def _find_tpu_metadata() -> tuple[str, int, int] | None:
    """What a Cloud TPU VM knows of its slice."""
    try:
        index = int(_read_metadata("agent-worker-number"))
        endpoints = _read_metadata("worker-network-endpoints").split(",")
    except (OSError, ValueError):
        return None
    # A list of addresses, or of name:number:address.
    workers = [endpoint.strip().split(":")[-1] for endpoint in endpoints]
    return workers[0], len(workers), index


def _read_metadata(name: str) -> str:
    import urllib.request

    request = urllib.request.Request(_METADATA + name, headers={"Metadata-Flavor": "Google"})
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(request, timeout=5) as answer:
        return answer.read().decode()


# What the rest of the project asks. One host is alone and agrees with itself.

_meeting: Meeting | None = None


def count() -> int:
    """Number of hosts."""
    return 1 if _meeting is None else _meeting.settings.count


def index() -> int:
    """This host's number, from 0."""
    return 0 if _meeting is None else _meeting.settings.index


def describe(host: int) -> str:
    """``host 1 (its name)``."""
    return f"host {host}" if _meeting is None else _meeting.describe(host)


def is_leader() -> bool:
    """Whether this host writes the run's files."""
    return index() == 0


def gather(what: str, value: Value) -> list[Value]:
    """The value of every host, in order; all hosts have to ask. JSON has to hold it.

    Args:
      what: name of the value; hosts that ask for different things have gone apart.
    """
    return [value] if _meeting is None else _meeting.gather(what, value)


def barrier(what: str) -> None:
    """Returns once all hosts have come here."""
    gather(what, None)


def broadcast(what: str, value: Value) -> Value:
    """The leader's value, on every host."""
    return gather(what, value if is_leader() else None)[0]  # type: ignore[return-value]


def on_leader(what: str, work: Callable[[], Value]) -> Value:
    """Calls ``work`` on the leader alone; its result on every host, once it is done.

    Where it fails, all hosts end with its error.
    """
    return broadcast(what, work() if is_leader() else None)  # type: ignore[return-value]


def first(what: str, wish: str | None) -> str | None:
    """The wish of the first host that has one; None: nobody has."""
    if _meeting is None:
        return wish
    return next((one for one in gather(what, wish) if one is not None), None)


def raise_loss() -> None:
    """Raises the loss or failure of another host, if there is one.

    For those who take an exception for something else: a collective breaks where a host is gone.
    """
    if _meeting is not None:
        _meeting.raise_loss()


def agree(where: str, values: Mapping[str, Any], remedy: str) -> None:
    """Refuses to go on where hosts differ in what must be the same everywhere.

    Args:
      where: the place named in the error.
      values: named values, as JSON holds them.
      remedy: what to do about a difference.

    Raises:
      InputError: on all hosts alike; names the values, the hosts and what they have.
    """
    if _meeting is None:
        return
    everyone = gather("agreement", dict(values))
    for name in dict.fromkeys(name for one in everyone for name in one):
        shown = [json.dumps(one.get(name), sort_keys=True) for one in everyone]
        if len(set(shown)) > 1:
            parts = [
                f"{_show(text)} on {_meeting.join_names(shown, text)}" for text in _unique(shown)
            ]
            raise InputError(where, f"the hosts differ in {name}: {', '.join(parts)}", remedy)


def _unique(texts: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(texts))


def _show(text: str) -> str:
    """A hash by its beginning, anything else as it is."""
    return text[1:13] if re.fullmatch(r'"[0-9a-f]{32,}"', text) else text


@contextlib.contextmanager
def joined(options: Any) -> Iterator[None]:
    """Runs the block on all hosts together; on one host just runs it.

    Args:
      options: the parsed flags of `define_flags`.

    Raises:
      InputError: wrong flags, or hosts that do not fit together.
      RunError: a host is missing, was lost, or has failed.
    """
    global _meeting
    settings = read_settings({name: getattr(options, name) for name in _VARIABLES})
    if settings is None:
        yield
        return
    meeting = Meeting(settings)
    try:
        meeting.join()
        _meeting = meeting
        logger.info("%d hosts: %s", settings.count, ", ".join(meeting.names))
        if settings.index != 0:  # the others compute the same: once is enough
            logger.info("host 0 tells of the run")
            logger.setLevel(logging.WARNING)
        agree(
            "--num_hosts",
            {"versions": _versions(), "script": os.path.basename(sys.argv[0])},
            "start the same command, in the same environment, on every host",
        )
        stopped = None
        try:
            yield
        except Stopped as error:  # on all hosts at the same point
            stopped = error
        meeting.finish()
        if stopped is not None:
            raise stopped
    except Stopped:
        raise
    except BaseException as error:
        reported = meeting.fail(error)
        if reported is error:
            raise
        raise reported from error
    finally:
        _meeting = None


def _versions() -> dict[str, str]:
    versions = {"python": ".".join(platform.python_version_tuple()[:2])}
    for package in ("pref_jax", "jax", "jaxlib", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def start_jax() -> None:
    """Tells JAX of the other hosts; before the first device is touched."""
    if _meeting is not None:
        _meeting.start_jax()


class Meeting:
    """The connections between the hosts of one run.

    Args:
      settings: this host's place.
      end: ends the process where the main thread cannot; for tests.
    """

    def __init__(self, settings: Settings, *, end: Callable[[int], Any] = os._exit) -> None:
        self.settings, self._end = settings, end
        self.names = ["?"] * settings.count
        self.names[settings.index] = socket.gethostname()
        self._links: dict[int, _Link] = {}
        self._news = threading.Condition()
        # Guarded by `_news`:
        self._gathered: dict[int, dict[int, tuple[str, Any]]] = {}  # round -> host -> what, value
        self._answers: dict[int, Any] = {}  # round -> values of all
        self._failure: InputError | RunError | None = None
        self._failed_at = math.inf
        self._reported = False  # whether the main thread answers for the end
        self._ended: set[int] = set()  # hosts that have come to the end of their work
        self._round = 0
        self._jax_port = 0
        self._jax_started = False
        self._wake, self._waker = socket.socketpair()

    # Coming together.

    def join(self) -> None:
        """Returns once all hosts are connected.

        Raises:
          RunError: some are missing; they are named.
          InputError: the address is of no use, or a host does not belong here.
        """
        if self.settings.index == 0:
            self._receive_all()
        else:
            self._report_in()
        threading.Thread(target=self._watch, name="hosts", daemon=True).start()

    def describe(self, index: int) -> str:
        """``host 1 (name)``, or ``host 1`` while its name is not known."""
        name = self.names[index]
        return f"host {index}" if name == "?" else f"host {index} ({name})"

    def join_names(self, values: Sequence[Any], value: Any) -> str:
        """The hosts whose value is ``value``."""
        return " and ".join(
            self.describe(index) for index, one in enumerate(values) if one == value
        )

    def _receive_all(self) -> None:
        settings = self.settings
        deadline = time.monotonic() + settings.timeout
        with _listen(settings) as server:
            while len(self._links) < settings.count - 1:
                left = deadline - time.monotonic()
                if left <= 0:
                    missing = [
                        f"host {n}" for n in range(1, settings.count) if n not in self._links
                    ]
                    error = RunError(
                        settings.place,
                        f"{', '.join(missing)} of {settings.count} did not report to host 0 within "
                        f"{settings.timeout:g} s",
                        "start the same command on every host, each with its own --host",
                    )
                    self._tell_all(error)
                    raise error
                server.settimeout(min(left, 1.0))
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    continue
                self._admit(connection, min(5.0, max(left, 0.1)))
            address = server.getsockname()[0]
        self._jax_port = _free_port(address, settings.port + 1)
        self._bind_address = f"[{address}]" if ":" in address else address
        for link in self._links.values():
            link.send(
                {
                    "kind": "welcome",
                    "names": self.names,
                    "jax_port": self._jax_port,
                }
            )

    def _admit(self, connection: socket.socket, patience: float) -> None:
        """Lets a host in that belongs here; tells the others why not."""
        settings = self.settings
        link = _Link(connection)
        hello = link.read_one(patience)
        if hello is None or hello.get("magic") != _MAGIC:
            link.close()  # something else that knocks at ports
            return
        number, name = int(hello.get("host", -1)), str(hello.get("name"))
        wrong = None
        if hello.get("hosts") != settings.count:
            wrong = f"was told of {hello.get('hosts')} hosts, and host 0 of {settings.count}"
        elif not 0 < number < settings.count:
            wrong = f"has no number from 1 to {settings.count - 1}"
        elif number in self._links and self._links[number].is_open():
            wrong = f"is there already, on {self.names[number]}"
        if wrong is not None:
            error = InputError(
                f"host {number} ({name})",
                wrong,
                "give every host its own --host, and all the same --num_hosts",
            )
            link.send(_encode_failure(error))
            link.close()
            return
        self._links[number] = link
        self.names[number] = name

    def _report_in(self) -> None:
        settings = self.settings
        deadline = time.monotonic() + settings.timeout
        reached, reason = False, "nobody listens there"
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise RunError(
                    settings.place,
                    f"host 0, the coordinator, did not answer host {settings.index} within "
                    f"{settings.timeout:g} s ({reason})",
                    "start the same command with --host=0 there, or correct --coordinator",
                )
            try:
                connection = socket.create_connection(
                    (settings.address, settings.port), timeout=min(left, 5.0)
                )
            except OSError as error:
                reason = error.strerror or str(error) or type(error).__name__
                time.sleep(min(_RETRY, left))
                continue
            link = _Link(connection)
            try:
                link.send(
                    {
                        "kind": "hello",
                        "magic": _MAGIC,
                        "host": settings.index,
                        "hosts": settings.count,
                        "name": self.names[settings.index],
                    }
                )
                # The leader began to wait before us or after; it gives up by its own clock.
                answer = link.read_one(max(deadline - time.monotonic(), 0.1) + _GRACE)
            except OSError:
                answer = None
            if answer is None:
                link.close()
                reason = "it answers and hangs up: another program, or a run that is ending"
                if reached:
                    time.sleep(_RETRY)
                reached = True
                continue
            if answer.get("kind") == "failed":
                raise _decode_failure(answer)
            self.names = [str(name) for name in answer["names"]]
            self._jax_port = int(answer["jax_port"])
            self._links[0] = link
            return

    # JAX.

    def start_jax(self) -> None:
        """`jax.distributed.initialize`, with the addresses that the hosts have agreed on.

        Raises:
          RunError: it failed.
        """
        import jax

        settings = self.settings
        # Its handler of SIGTERM would keep the signal from us; the training loop has its own.
        jax.config.update("jax_enable_preemption_service", False)
        bind = None
        if settings.index == 0:
            bind = f"{self._bind_address}:{self._jax_port}"
            address = f"{_reach(self._bind_address)}:{self._jax_port}"
        else:
            # JAX's client ends the process from C++ as soon as its connection to the leader
            # breaks. So it speaks through a relay in this process, whose end never breaks, and
            # the line of `_watch` is what the user sees.
            address = f"127.0.0.1:{_relay(settings.address, self._jax_port)}"
        try:
            jax.distributed.initialize(
                coordinator_address=address,
                num_processes=settings.count,
                process_id=settings.index,
                cluster_detection_method="deactivate",
                initialization_timeout=math.ceil(settings.timeout),
                heartbeat_timeout_seconds=_JAX_PATIENCE,
                shutdown_timeout_seconds=math.ceil(settings.timeout),
                coordinator_bind_address=bind,
            )
        except RuntimeError as error:
            raise RunError(
                settings.place,
                f"JAX could not connect the hosts ({str(error).splitlines()[0]})",
                "start the same command on every host again",
            ) from error
        self._jax_started = True
        if jax.process_index() != settings.index or jax.process_count() != settings.count:
            raise RunError(
                f"host {settings.index} of {settings.count}",
                f"JAX takes it for number {jax.process_index()} of {jax.process_count()}",
                "number the hosts as the hardware does: --num_hosts=auto",
            )

    # Speaking, from the main thread alone: rounds are counted.

    def gather(self, what: str, value: Any) -> list[Any]:
        """See `pref_jax.hosts.gather`."""
        self._round += 1
        number = self._round
        if self.settings.index != 0:
            self._send(0, {"kind": "value", "round": number, "what": what, "value": value})
            self._wait_for(lambda: number in self._answers)
            answer = self._answers.pop(number)
        else:
            # Through JSON as the others' values go, so that all hosts see the same types.
            with self._news:
                mine = self._gathered.setdefault(number, {})
                mine[0] = (what, json.loads(json.dumps(value)))
            self._wait_for(lambda: len(self._gathered[number]) == self.settings.count)
            everyone = self._gathered.pop(number)
            answer = {
                "whats": [everyone[n][0] for n in range(self.settings.count)],
                "values": [everyone[n][1] for n in range(self.settings.count)],
            }
            with self._news:  # a failure that these cause must not overtake them
                for host in self._links:
                    self._send(host, {"kind": "values", "round": number, **answer})
        if len(set(answer["whats"])) > 1:
            parts = [
                f"{self.join_names(answer['whats'], one)} at {one!r}"
                for one in _unique(answer["whats"])
            ]
            raise RunError(
                self.settings.place,
                f"the hosts have gone apart: {', '.join(parts)}",
                "start the same command on every host again",
            )
        return answer["values"]

    def _wait_for(self, condition: Callable[[], bool]) -> None:
        with self._news:
            # What has arrived is used before a failure is raised: hosts that are refused
            # together leave one after another.
            self._news.wait_for(lambda: condition() or self._failure is not None)
            if not condition():
                assert self._failure is not None
                raise self._failure

    def _send(self, host: int, message: Mapping[str, Any]) -> None:
        # A connection that is gone is the watching thread's to name.
        with contextlib.suppress(OSError):
            self._links[host].send(message)

    # The end.

    def finish(self) -> None:
        """Ends the meeting after all hosts have done their work.

        Raises:
          InputError, RunError: another host failed instead.
        """
        self.gather(_END, None)
        if self._jax_started:
            import jax

            jax.distributed.shutdown()
        self._stop_watching()

    def fail(self, error: BaseException) -> BaseException:
        """Tells the others of an error that ends this host; returns the one to report.

        A collective breaks a moment before the loss of its host is known, or a moment after.
        """
        known = isinstance(error, InputError | RunError | KeyboardInterrupt | SystemExit)
        with self._news:
            if not known:
                self._wait_for_loss()
            self._reported = True
            if self._failure is not None and not isinstance(error, InputError):
                return self._failure
        if isinstance(error, InputError | RunError):
            kind = type(error)
            told: InputError | RunError = kind(
                f"{self.describe(self.settings.index)}: {error.where}", error.what, error.remedy
            )
        else:
            what = "was interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            name = "" if isinstance(error, KeyboardInterrupt) else f" ({type(error).__name__})"
            told = RunError(
                self.describe(self.settings.index),
                what + name,
                "its own last lines say why; then start the same command on every host again",
            )
        self._tell_all(told)
        return error

    def raise_loss(self) -> None:
        """See `pref_jax.hosts.raise_loss`."""
        with self._news:
            self._wait_for_loss()
            if self._failure is not None:
                raise self._failure

    def _wait_for_loss(self) -> None:
        if self._links:
            self._news.wait_for(lambda: self._failure is not None, timeout=_GRACE)

    def _tell_all(self, error: InputError | RunError) -> None:
        for host in list(self._links):
            self._send(host, _encode_failure(error))

    def _stop_watching(self) -> None:
        with contextlib.suppress(OSError):
            self._waker.send(b".")

    # Listening: one thread.

    def _watch(self) -> None:
        """Reads what the others send, sends signs of life, and ends the process where it must."""
        timeout = self.settings.timeout
        beat = min(timeout / 4.0, 5.0)
        # Of a process that has ended or a machine that is gone the kernel tells. A process that
        # is there and silent may be loading a library from a slow disk, Python's lock in hand.
        silence = max(2.0 * timeout, _SHORTEST_SILENCE)
        selector = selectors.DefaultSelector()
        selector.register(self._wake, selectors.EVENT_READ, None)
        heard = {}
        for host, link in self._links.items():
            link.keep_alive(min(timeout, _LONGEST_OUTAGE))
            selector.register(link.socket, selectors.EVENT_READ, host)
            heard[host] = time.monotonic()
            for message in link.take():  # arrived together with its greeting
                self._handle(host, message)
        next_beat = 0.0
        while True:
            now = time.monotonic()
            if now >= next_beat:
                next_beat = now + beat
                for host in heard:
                    self._send(host, {"kind": "alive"})
            for key, _ in selector.select(min(beat, 0.5)):
                if key.data is None:
                    return
                host = key.data
                messages = self._links[host].receive()
                if messages is None:
                    selector.unregister(self._links[host].socket)
                    heard.pop(host, None)
                    self._lose(host, "is gone: its process has ended, or the network")
                    continue
                heard[host] = time.monotonic()
                for message in messages:
                    self._handle(host, message)
            now = time.monotonic()
            for host in [host for host, when in heard.items() if now - when > silence]:
                heard.pop(host)
                self._lose(host, f"has been silent for {silence:g} s")
            self._end_if_stuck()

    def _handle(self, host: int, message: Mapping[str, Any]) -> None:
        kind = message.get("kind")
        with self._news:
            if kind == "value":
                entry = (str(message["what"]), message["value"])
                self._gathered.setdefault(int(message["round"]), {})[host] = entry
                if message["what"] == _END:
                    self._ended.add(host)
            elif kind == "values":
                self._answers[int(message["round"])] = message
                if message["whats"][0] == _END:
                    self._ended.add(host)
            elif kind == "failed":
                self._note_failure(_decode_failure(message), source=host)
            self._news.notify_all()

    def _lose(self, host: int, what: str) -> None:
        with self._news:
            if host in self._ended:
                return
            self._note_failure(
                RunError(
                    self.describe(host),
                    f"{what}, and this host cannot go on alone",
                    "start the same command on every host again",
                ),
                source=host,
            )
            self._news.notify_all()

    def _note_failure(self, error: InputError | RunError, source: int) -> None:
        """Keeps the first failure; the leader passes it on."""
        if self._failure is not None:
            return
        self._failure, self._failed_at = error, time.monotonic()
        for other in self._links:
            if other != source:
                self._send(other, _encode_failure(error))

    def _end_if_stuck(self) -> None:
        """Ends the process if the main thread does not: it waits inside a collective."""
        with self._news:
            if self._reported or time.monotonic() < self._failed_at + _GRACE:
                return
            self._reported = True
            code = 2 if isinstance(self._failure, InputError) else 1
            with contextlib.suppress(OSError, ValueError):
                print(f"error: {self._failure}", file=sys.stderr, flush=True)
            self._end(code)


class _Link:
    """One connection: lines of JSON in both directions."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sending = threading.Lock()
        self._buffer = b""

    def send(self, message: Mapping[str, Any]) -> None:
        with self._sending:
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """The messages that have come; waits for bytes; None: the other end is gone."""
        try:
            received = self.socket.recv(1 << 16)
        except OSError:
            return None
        if not received or len(self._buffer) > _LONGEST_LINE:
            return None
        self._buffer += received
        return self.take()

    def take(self) -> list[dict[str, Any]]:
        """Whole messages among the bytes received so far."""
        *lines, self._buffer = self._buffer.split(b"\n")
        return [json.loads(line) for line in lines]

    def read_one(self, patience: float) -> dict[str, Any] | None:
        """The first message; None where none comes in so many seconds, or it is no message."""
        deadline = time.monotonic() + patience
        try:
            while b"\n" not in self._buffer:
                self.socket.settimeout(max(deadline - time.monotonic(), 0.01))
                received = self.socket.recv(1 << 16)
                if not received or len(self._buffer) > 1 << 16:
                    return None
                self._buffer += received
            line, self._buffer = self._buffer.split(b"\n", 1)
            message = json.loads(line)
        except (OSError, ValueError):
            return None
        finally:
            self.socket.settimeout(None)
        return message if isinstance(message, dict) else None

    def keep_alive(self, timeout: float) -> None:
        """Lets the kernel find out that the other machine, or the way to it, is gone."""
        seconds = max(1, int(timeout))
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (
            ("TCP_KEEPIDLE", max(1, seconds // 4)),
            ("TCP_KEEPINTVL", max(1, seconds // 4)),
            ("TCP_KEEPCNT", 3),
            ("TCP_USER_TIMEOUT", seconds * 1000),
        ):
            if hasattr(socket, name):  # Linux has them all
                self.socket.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def is_open(self) -> bool:
        """Whether the other end is still there."""
        try:
            return bool(self.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except BlockingIOError:
            return True
        except OSError:
            return False

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.socket.close()


def _encode_failure(error: InputError | RunError) -> dict[str, Any]:
    return {
        "kind": "failed",
        "input": isinstance(error, InputError),
        "text": [error.where, error.what, error.remedy],
    }


def _decode_failure(message: Mapping[str, Any]) -> InputError | RunError:
    where, what, remedy = (str(part) for part in message["text"])
    return (InputError if message["input"] else RunError)(where, what, remedy)


def _listen(settings: Settings) -> socket.socket:
    """A server at the coordinator's address; at all of this host's where that is not its own."""
    try:
        found = socket.getaddrinfo(settings.address, settings.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise InputError(
            "--coordinator",
            f"the address {settings.address} is not known ({error.strerror})",
            "give an address of host 0 that all hosts can reach",
        ) from error
    places = [(family, address[:2]) for family, _, _, _, address in found]
    places.append((socket.AF_INET, ("", settings.port)))
    for family, address in places:
        try:
            return socket.create_server(address, family=family, backlog=settings.count + 8)
        except OSError as error:
            reason = error
    raise InputError(
        "--coordinator",
        f"host 0 cannot listen at {settings.place} ({reason.strerror})",
        "end what uses the port, or give another one on all hosts",
    ) from reason


def _free_port(address: str, wished: int) -> int:
    """A free port of this host, the wished one where it is; for JAX, which opens it later."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    for port in (wished, 0):
        with (
            contextlib.suppress(OSError, OverflowError),
            socket.create_server((address, port), family=family) as server,
        ):
            return server.getsockname()[1]
    raise RunError(address, "has no free port", "end some of the programs on host 0")


def _reach(address: str) -> str:
    """Where a server that is bound to ``address`` can be reached from its own host."""
    return {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(address, address)


def _relay(address: str, port: int) -> int:
    """Opens a port of this host that leads to ``address``; returns its number.

    When the far end breaks, the near one stays open and silent.
    """
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> NoReturn:
        while True:
            near, _ = server.accept()
            try:
                far = socket.create_connection((address, port), timeout=30)
            except OSError:
                near.close()  # the client tries again
                continue
            far.settimeout(None)
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for pump in (_send_on, _send_back):
                threading.Thread(target=pump, args=(near, far), name="relay", daemon=True).start()

    threading.Thread(target=serve, name="relay", daemon=True).start()
    return server.getsockname()[1]


def _send_on(near: socket.socket, far: socket.socket) -> None:
    """Copies bytes until the near end is closed, which closes the far one."""
    try:
        while received := near.recv(1 << 16):
            with contextlib.suppress(OSError):
                far.sendall(received)
    except OSError:
        pass
    with contextlib.suppress(OSError):
        far.shutdown(socket.SHUT_RDWR)


def _send_back(near: socket.socket, far: socket.socket) -> None:
    """Copies bytes until the far end breaks, of which the near one learns nothing."""
    with contextlib.suppress(OSError):
        while received := far.recv(1 << 16):
            near.sendall(received)
