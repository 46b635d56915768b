"""Who may write to a run in a bucket: one object that its holder renews while it lives.

A bucket has no locks that end with their holder. What it has is a write that succeeds only where
the object is of the generation that the writer has seen, so of two writers one fails. The holder
writes the object again every `BEAT` seconds; one that has not been written for `STALE` seconds, or
whose process has ended on this same machine, is taken over. A holder that was taken for dead finds
out before it writes the next manifest.
"""

import contextlib
import datetime
import json
import logging
import os
import threading
import time
import uuid
from typing import Any

from pref_jax.bucket import Conflict, Entry, Folder
from pref_jax.errors import InputError, RunError
from pref_jax.locks import describe_holder, name_this_process

logger = logging.getLogger(__name__)

NAME = ".lock"
BEAT = 10.0  # seconds between two signs of life
STALE = 120.0  # seconds of silence after which a holder counts as dead
_POLL = 1.0  # seconds


class Lease:
    """The right to write below ``folder``; at most one process has it."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._token = uuid.uuid4().hex
        self._name = name_this_process()
        self._beats = 0
        self._guard = threading.Lock()
        # Guarded by `_guard`:
        self._generation = 0  # of our last sign of life; 0: not held
        self._lost = False
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self) -> None:
        """Takes it; returns at once where nobody holds it.

        Raises:
          InputError: another process holds it, which is then named. To see whether it lives takes
            up to `BEAT` seconds.
        """
        first: Entry | None = None
        seen = time.monotonic()
        while True:
            entry = self._folder.find(NAME)
            if entry is None:
                if self._write(0):
                    break
                continue
            holder = self._read_holder()
            if entry.generation != (first or entry).generation or _lives_here(holder):
                raise InputError(
                    self._folder.url,
                    f"is in use by {describe_holder(holder)}",
                    "wait for that run, end it, or give another --workdir",
                )
            if first is None:
                first, seen = entry, time.monotonic()
            watched = time.monotonic() - seen
            age = (datetime.datetime.now(datetime.UTC) - entry.updated).total_seconds()
            # A clock that is wrong does not kill a holder that was seen alive.
            dead = watched >= STALE or (age >= STALE and watched >= 1.5 * BEAT)
            if _ended_here(holder) or dead:
                if self._write(entry.generation):
                    logger.info("took %s over from %s", self._folder.url, describe_holder(holder))
                    break
                continue
            if entry is first:
                logger.info(
                    "%s is held by %s: does it live?",
                    self._folder.url,
                    describe_holder(holder),
                )
            time.sleep(min(_POLL, BEAT / 2.0))
        self._thread = threading.Thread(target=self._live, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Renews it: for `STALE` seconds from here on nobody takes it.

        Raises:
          RunError: another process has it, or the bucket cannot be reached.
        """
        with self._guard:
            self._renew()
            if self._lost:
                raise RunError(
                    self._folder.url,
                    "another run has taken it, since no sign of life of this one arrived",
                    "leave it to the other one",
                )

    def release(self) -> None:
        """Gives it back, if it is still ours."""
        self._end.set()
        if self._thread is not None:
            self._thread.join()
        with self._guard, contextlib.suppress(Conflict, InputError, RunError):
            if self._generation and not self._lost:
                self._folder.remove([NAME], generation=self._generation)
            self._generation = 0

    def _live(self) -> None:
        while not self._end.wait(BEAT):
            with self._guard, contextlib.suppress(InputError, RunError):  # `check` will tell
                self._renew()

    def _renew(self) -> None:
        if not self._lost and not self._write(self._generation):
            self._lost = True

    def _write(self, generation: int) -> bool:
        self._beats += 1
        content = {
            "token": self._token,
            "beat": self._beats,
            "machine": _machine(),
            **self._name,
        }
        try:
            written = self._folder.write(NAME, json.dumps(content).encode(), generation=generation)
        except Conflict:
            return False
        self._generation = written.generation
        return True

    def _read_holder(self) -> dict[str, Any]:
        try:
            holder = json.loads(self._folder.read(NAME))
            return holder if isinstance(holder, dict) else {}
        except (InputError, ValueError):  # it has just been given back
            return {}


def _machine() -> str:
    """This boot of this machine, as far as process numbers mean the same."""
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        return f"{file.read().strip()}-{os.stat('/proc/self/ns/pid').st_ino}"
    return ""


def _is_here(holder: dict[str, Any]) -> bool:
    return bool(_machine()) and holder.get("machine") == _machine()


def _runs(holder: dict[str, Any]) -> bool:
    try:
        os.kill(int(holder["pid"]), 0)
    except (ProcessLookupError, KeyError, TypeError, ValueError):
        return False
    except PermissionError:
        pass
    return True


def _lives_here(holder: dict[str, Any]) -> bool:
    return _is_here(holder) and _runs(holder)


def _ended_here(holder: dict[str, Any]) -> bool:
    return _is_here(holder) and not _runs(holder)
