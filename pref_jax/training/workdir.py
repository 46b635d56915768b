"""A run's folder: who holds it, what it was started with, what came out.

This module imports nothing heavy, so that a wrong or busy folder is refused at once.
"""

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import socket
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pref_jax import hosts, locks
from pref_jax.bucket import is_url
from pref_jax.errors import InputError, Stopped
from pref_jax.files import make_folder, plain, read_json, write_json
from pref_jax.training.mirror import Mirror

# What may differ between the run that started a folder and the one that goes on in it: none of
# these shapes the result beyond rounding. A prefix stands for everything below it.
FREE_FIELDS = ("train.max_hours", "train.microbatch_size", "train.remat", "logging", "mesh")
# Files that only a run leaves; without a config.json beside them nobody can say which run's.
_TRACES = ("checkpoints", "metrics.jsonl", "result.json")
# What a start that was killed leaves; hidden files are its unfinished ones, or of no weight.
_STARTED = ("model.json", "environment.json", "baselines.json", "tokenizer")
_LOGS = (".log", ".out", ".err", "log.txt")  # endings of what a user's redirection writes
_DISK_DELAY = 5.0  # seconds after which every host sees what one wrote to a shared disk
_PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "clu", "datasets"),
    *("pyarrow", "tokenizers", "tensorflow", "tensorflow-text"),
)


class Workdir:
    """A run's folder, held by one process at a time.

    ``with Workdir(path) as workdir:`` makes the folder where it is missing and takes it; the
    kernel gives it back however the process ends. Reading needs no ``with``. Of several hosts the
    leader takes the folder, and the others look whether it is the same one that they see.

    A run in a bucket is trained in a folder of each host (`pref_jax.training.mirror`).

    Args:
      path: the folder, or ``gs://BUCKET/PATH``.

    Attributes:
      path: the folder on this host.
      name: what the user typed.
      mirror: of a run in a bucket, what puts it there.

    Raises:
      InputError: the path is a file, cannot be written, holds something else than a run, is
        held by another process, which is then named, or is not the same folder on all hosts.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.name = os.fspath(path)
        self.mirror = Mirror(self.name) if is_url(self.name) else None
        self.path = Path(path) if self.mirror is None else self.mirror.path
        self._lock: int | None = None
        self._made: list[Path] = []  # folders that were not there before, the innermost first

    @property
    def config_path(self) -> Path:
        return self.path / "config.json"

    @property
    def checkpoints_path(self) -> Path:
        return self.path / "checkpoints"

    @property
    def result_path(self) -> Path:
        return self.path / "result.json"

    def __enter__(self) -> Self:
        if hosts.is_leader():
            self.acquire()
        try:
            if self.mirror is None:
                self._refuse_unshared()
            elif hosts.count() > 1:
                hosts.barrier("workdir")
                if not hosts.is_leader():
                    self.mirror.pull()
                hosts.barrier("the run on all hosts")  # before the leader writes the first object
        except BaseException:
            self.release(failed=True)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release(failed=error is not None and not isinstance(error, Stopped))

    def acquire(self) -> None:
        """Makes the folder and takes it; at once, or an `InputError` that names the holder."""
        if self.mirror is not None:
            self.mirror.take(self._refuse_foreign)
        try:
            self._acquire_folder()
        except BaseException:
            if self.mirror is not None:
                self.mirror.close(failed=True)
            raise

    def _acquire_folder(self) -> None:
        missing: list[Path] = []
        path = self.path / ".lock"
        try:
            missing = make_folder(self.path)
            fresh = not os.path.lexists(path)
            lock = locks.take(
                path, str(self.path), "wait for that run, end it, or give another --workdir"
            )
        except (FileExistsError, NotADirectoryError) as error:
            raise InputError(
                str(self.path), "is, or lies below, a file", "give --workdir a folder"
            ) from error
        except OSError as error:
            raise InputError(
                str(self.path),
                f"cannot be written ({error.strerror})",
                "give --workdir a folder that you may write, on a file system with locks",
            ) from error
        try:
            self._refuse_vanished(lock)
            try:
                self._refuse_foreign(os.listdir(self.path))
                if self.config_path.exists():
                    self.read_config()
            except InputError:
                if fresh:  # the folder stays as it was
                    with contextlib.suppress(OSError):
                        os.unlink(self.path / ".lock")
                raise
            if not os.access(self.path, os.W_OK | os.X_OK):
                raise InputError(
                    str(self.path),
                    "cannot be written",
                    "give --workdir a folder that you may write",
                )
            locks.sign(lock)
        except BaseException:
            os.close(lock)
            raise
        self._lock, self._made = lock, missing

    def release(self, *, failed: bool = False) -> None:
        """Gives the folder back; one that it made and that stayed empty is gone again.

        Elsewhere the lock file stays: removing it could let two processes in.

        Args:
          failed: whether an error is on its way, of which this is the end.
        """
        try:
            if self.mirror is not None and (self._lock is not None or not hosts.is_leader()):
                self.mirror.close(failed=failed)
        finally:
            self._release_folder()

    def _release_folder(self) -> None:
        if self._lock is None:
            return
        with contextlib.suppress(OSError):
            os.ftruncate(self._lock, 0)
            if self._made and os.listdir(self.path) == [".lock"]:
                os.unlink(self.path / ".lock")
                for folder in self._made:
                    folder.rmdir()
        os.close(self._lock)
        self._lock = None

    def _refuse_unshared(self) -> None:
        """Hosts write one checkpoint together, so they need one folder: the leader's lock file."""
        if hosts.count() == 1:
            return
        path = self.path / ".lock"
        wanted = hosts.on_leader("workdir", path.read_text)
        deadline = time.monotonic() + _DISK_DELAY
        while not (found := _holds(path, wanted)) and time.monotonic() < deadline:
            time.sleep(0.1)
        blind = [n for n, sees in enumerate(hosts.gather("shared workdir", found)) if not sees]
        if blind:
            names = " and ".join(hosts.describe(host) for host in blind)
            raise InputError(
                str(self.path),
                f"{names} cannot see there what {hosts.describe(0)} has written",
                "give all hosts a --workdir on one shared disk",
            )

    def _refuse_vanished(self, lock: int) -> None:
        """A holder that leaves an empty folder removes it; a lock on its file locks nothing."""
        try:
            same = os.path.samestat(os.fstat(lock), os.stat(self.path / ".lock"))
        except FileNotFoundError:
            same = False
        if not same:
            raise InputError(
                str(self.path), "another process has just removed it", "type the same command again"
            )

    def _refuse_foreign(self, names: Iterable[str]) -> None:
        """Refuses what lies in the folder where it is not of a run."""
        names = sorted(names)
        if self.config_path.name in names:
            return
        for name in _TRACES:
            if name in names:
                raise InputError(
                    str(self.path),
                    f"holds {name} but no config.json: nobody can tell which run it belongs to",
                    "give another --workdir, or remove the old files",
                )
        for name in names:
            if not (name in _STARTED or name.startswith(".") or name.endswith(_LOGS)):
                raise InputError(
                    str(self.path),
                    f"holds files that are not of a run, such as {name}",
                    "give another --workdir",
                )

    def read_config(self) -> dict[str, Any]:
        """The resolved config that the run was started with."""
        if not self.path.is_dir():
            raise InputError(str(self.path), "is no folder", "give the --workdir of a run")
        config = read_json(self.config_path, "give the --workdir of a run")
        if not all(isinstance(config.get(section), dict) for section in ("data", "model", "train")):
            raise InputError(
                str(self.config_path),
                "is not the config of a run of this project",
                "give another --workdir",
            )
        return config

    def settle_config(
        self, config: Mapping[str, Any], free: Sequence[str] = FREE_FIELDS
    ) -> dict[str, Any] | None:
        """Writes ``config``, after comparing it with the one that a former run left.

        Returns the former config, or None where the folder is new.
        """
        former = self.read_config() if self.config_path.exists() else None
        if former is not None:
            compare_config(former, config, free, where=str(self.config_path))
        write_json(self.config_path, config)
        return former

    def write_environment(self, environment: Mapping[str, Any]) -> None:
        write_json(self.path / "environment.json", environment)

    def write_result(self, result: Mapping[str, Any]) -> None:
        write_json(self.result_path, result)

    def read_result(self) -> dict[str, Any] | None:
        """What the finished run wrote, or None where it has not finished."""
        if not self.result_path.exists():
            return None
        return read_json(self.result_path, "remove it and run the same command again")


def compare_config(
    saved: Mapping[str, Any],
    new: Mapping[str, Any],
    free: Sequence[str] = FREE_FIELDS,
    *,
    where: str = "config.json",
) -> None:
    """Refuses to go on with a run under a config that would give another result.

    Args:
      saved: the config that the run was started with, as read from JSON.
      new: the config of this command.
      free: dotted prefixes of fields that may differ.

    Raises:
      InputError: names every field that differs, with both values.
    """
    before, after = bound_fields(saved, free), bound_fields(new, free)
    different = []
    for field in sorted(before.keys() | after.keys()):
        was, now = (_show(side, field) for side in (before, after))
        if was != now:
            different.append(f"{field} was {was} and is now {now}")
    if different:
        raise InputError(
            where,
            f"the run in this folder has another config: {', '.join(different)}",
            "type the former values to go on with it, or give another --workdir",
        )


def bound_fields(config: Mapping[str, Any], free: Sequence[str]) -> dict[str, Any]:
    """The fields of a config under their dotted names, without those below a prefix in ``free``."""
    return {
        field: value
        for field, value in _flatten(plain(config))
        if not any(field == prefix or field.startswith(f"{prefix}.") for prefix in free)
    }


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and (value or not prefix):
        for name, part in value.items():
            yield from _flatten(part, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, value


def _show(fields: Mapping[str, Any], field: str) -> str:
    if field not in fields:
        return "absent"
    value = fields[field]
    # 1 and 1.0 are one value: JSON readers and flag parsers differ in which they make.
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    return json.dumps(value)


def describe_environment(
    devices: Sequence[Any] = (), *, process_index: int = 0, process_count: int = 1
) -> dict[str, Any]:
    """What a reader of the results needs to know of the machine.

    Args:
      devices: ``jax.devices()``; passed in, because this module does not import jax.
    """
    versions = {"python": platform.python_version()}
    for package in ("pref_jax", *_PACKAGES):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    kinds: dict[str, int] = {}
    for device in devices:
        kinds[device.device_kind] = kinds.get(device.device_kind, 0) + 1
    return {
        "versions": versions,
        "backend": devices[0].platform if devices else None,
        "devices": [{"kind": kind, "count": count} for kind, count in kinds.items()],
        "process_index": process_index,
        "process_count": process_count,
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "cpu": {"model": _cpu_model(), "cores": _usable_cores()},
        "command": list(sys.argv),
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def _holds(path: Path, text: str) -> bool:
    try:
        os.listdir(path.parent)  # a network disk looks at a folder again that is opened
        return path.read_text() == text
    except (OSError, ValueError):
        return False


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_model() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
