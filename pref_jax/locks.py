"""Who works on a folder or a file: a lock that the kernel gives back, with the holder's name in it.

This module imports nothing heavy, so that a second process is refused at once.
"""

import contextlib
import datetime
import fcntl
import json
import os
import shlex
import socket
import sys
from pathlib import Path
from typing import Any

from pref_jax.errors import InputError, shorten

_LONGEST_COMMAND = 120


def take(path: Path, what: str, remedy: str) -> int:
    """Locks a lock file, which is made where it is missing.

    Args:
      path: the lock file.
      what: the folder or file that the lock stands for, for the message.
      remedy: what to do where another process has it.

    Returns:
      The file's descriptor; closing it, or the process's end, gives the lock back.

    Raises:
      InputError: another process has it; it is named.
      OSError: the file cannot be made, or the file system knows no locks.
    """
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        _lock(lock, what, remedy)
    except BaseException:
        os.close(lock)
        raise
    return lock


def sign(lock: int) -> None:
    """Writes into a lock file that is held who holds it."""
    with contextlib.suppress(OSError):  # a full disk: the lock itself needs no room
        os.ftruncate(lock, 0)
        os.pwrite(lock, json.dumps(name_this_process()).encode(), 0)


def name_this_process() -> dict[str, Any]:
    """What is written where others look for a holder; see `describe_holder`."""
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "command": shlex.join(sys.argv),
        "since": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def describe_holder(holder: Any) -> str:
    """The words of a message for what `name_this_process` says, or for whatever was found."""
    try:
        command = shorten(ascii(holder["command"])[1:-1], _LONGEST_COMMAND)
        return f"process {holder['pid']} on {holder['host']} since {holder['since']} ({command})"
    except (KeyError, TypeError):
        return "another process"


def refuse_held(path: Path, what: str, remedy: str) -> None:
    """Looks, before anything is read or imported, whether another process has a lock.

    Whoever wants to write takes the lock all the same: another one may be faster.

    Raises:
      InputError: it has; it is named.
    """
    with contextlib.suppress(OSError):  # no such file; or what `take` will tell of
        lock = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            _lock(lock, what, remedy)
        finally:
            os.close(lock)


def _lock(lock: int, what: str, remedy: str) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(what, f"is in use by {_read_holder(lock)}", remedy) from error


def _read_holder(lock: int) -> str:
    try:
        return describe_holder(json.loads(os.pread(lock, 65536, 0)))
    except (OSError, ValueError):
        return describe_holder(None)
