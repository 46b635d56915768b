"""Runs a script and harms it at a chosen write: a kill, a power cut, a disk that refuses.

The product knows nothing of this: the primitives of `os` by which Python code makes, writes, syncs,
renames and removes files are replaced in the process before the script starts. A point is a side
and a primitive on a path, such as ``after replace config.json``; what is random in a name becomes
``#``. Writers in C++ (tensorstore, Arrow) are not seen; what they wrote counts as lost in a power
cut unless the Python side has synced it since.

By hand:
  python tests/faults/launcher.py --root=runs/mine --note=points.txt \
      --only="after rename checkpoints/3" -- launch/train.py --config=... --workdir=runs/mine
"""

from __future__ import annotations

import argparse
import builtins
import dataclasses
import errno
import io
import os
import pickle
import re
import runpy
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_RANDOM = re.compile(
    r"[0-9a-f]{16,}|(?<=\.)[a-z0-9_]{8}(?=$|/)|(?<=/tmp)[a-z0-9_]{8}$|-[0-9a-f-]{16,}|\d{9,}"
)
_CREATING = os.O_CREAT | os.O_TRUNC
_PATHS = ("replace", "rename", "link", "symlink", "unlink", "remove", "rmdir", "mkdir", "truncate")
_FILES = ("fsync", "fdatasync", "ftruncate", "write", "pwrite")


@dataclasses.dataclass(frozen=True)
class Fault:
    """What is to happen, and where.

    Attributes:
      roots: folders whose writes count.
      note: file that gets every point that was passed, one a line; the last one is where it struck.
      action: "kill"; "cut" (a power cut: killed, and what was not synced is to be lost, see
        `lose_unsynced`); or the name of an error, such as "ENOSPC", which from then on every
        write gets.
      done: points that are passed this time.
      only: where given, the points at which it may strike.
      ignored: pattern of points that do not count.
    """

    roots: tuple[str, ...]
    note: str
    action: str = "kill"
    done: frozenset[str] = frozenset()
    only: frozenset[str] | None = None
    ignored: str | None = None

    def install(self) -> None:
        """Replaces the primitives of this process."""
        _Watch(self).install()


class _Watch:
    def __init__(self, fault: Fault) -> None:
        self._fault = fault
        self._roots = [os.path.realpath(root) for root in fault.roots]
        self._note = os.open(fault.note, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._write = os.write
        self._lock = threading.RLock()
        self._error = 0
        self._inside = threading.local()
        self._durable = _Durable(self._roots) if fault.action == "cut" else None

    def install(self) -> None:
        for name in _PATHS + _FILES:
            setattr(os, name, self._wrap(name, getattr(os, name)))
        os.open = self._wrap_open(os.open)  # type: ignore[assignment]
        builtins.open = io.open = self._wrap_builtin(builtins.open)  # type: ignore[assignment]

    def _wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(first: Any, *rest: Any, **named: Any) -> Any:
            target = rest[0] if name in ("replace", "rename", "link", "symlink") else first
            folder = named.get("dst_dir_fd", named.get("dir_fd"))
            return self._do(name, target, folder, lambda: function(first, *rest, **named), first)

        return call

    def _wrap_open(self, function: Callable[..., int]) -> Callable[..., int]:
        def call(path: Any, flags: int, *rest: Any, **named: Any) -> int:
            def opening() -> int:
                return function(path, flags, *rest, **named)

            if not flags & _CREATING:
                return opening()
            return self._do("open", path, named.get("dir_fd"), opening, None)

        return call

    def _wrap_builtin(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(file: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
            def opening() -> Any:
                return function(file, mode, *rest, **named)

            if isinstance(file, int) or not set(mode) & set("wax+"):
                return opening()
            return self._do("open", file, None, opening, None)

        return call

    def _do(self, name: str, target: Any, folder: int | None, act: Callable[[], Any], first: Any):
        place = None if getattr(self._inside, "on", False) else self._find(target, folder)
        if place is None:
            return act()
        point = f"{name} {place}"
        if isinstance(target, int) and place.endswith(".jsonl"):  # grows: each line is a write
            point += f" behind line {Path(f'/proc/self/fd/{target}').read_bytes().count(10)}"
        self._inside.on = True
        try:
            with self._lock:
                self._reach(f"before {point}")
            if self._error and name not in ("unlink", "remove", "rmdir"):
                raise OSError(self._error, os.strerror(self._error), str(target))
            if self._durable is not None and name in ("unlink", "remove"):
                self._durable.forget(target, folder)
            result = act()
            if self._durable is not None and name in ("fsync", "fdatasync"):
                self._durable.sync(first)
            with self._lock:
                self._reach(f"after {point}")
            return result
        finally:
            self._inside.on = False

    def _find(self, target: Any, folder: int | None) -> str | None:
        """The path below a root, as points name it."""
        if isinstance(target, int):
            path = os.readlink(f"/proc/self/fd/{target}")
        else:
            path = os.fsdecode(target)
            if folder is not None:
                path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
            parent, name = os.path.split(os.path.abspath(path))
            path = os.path.join(os.path.realpath(parent), name)
        for root in self._roots:
            if path == root or path.startswith(root + os.sep):
                return _RANDOM.sub("#", os.path.relpath(path, root))
        return None

    def _reach(self, point: str) -> None:
        fault = self._fault
        if fault.ignored is not None and re.search(fault.ignored, point):
            return
        self._write(self._note, f"{point}\n".encode())
        if self._error or point in fault.done:
            return
        if fault.only is not None and point not in fault.only:
            return
        if fault.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault.action == "cut":
            assert self._durable is not None
            with open(f"{fault.note}.durable", "wb") as file:
                pickle.dump(self._durable.snapshot(eager=point.startswith("after")), file)
            os.kill(os.getpid(), signal.SIGKILL)
        elif point.startswith("before"):
            self._error = getattr(errno, fault.action)


class _Durable:
    """What a power cut would leave of some folders.

    A file keeps the bytes of its last fsync, a folder the entries of its last fsync; where
    ``eager``, the entries have reached the disk before the bytes, as journals of file systems like
    to do.
    """

    def __init__(self, roots: list[str]) -> None:
        self._roots = roots
        self._bytes: dict[int, bytes] = {}  # by inode
        self._entries: dict[int, dict[str, tuple[bool, int, bytes]]] = {}
        for root in roots:
            for below, _, names in os.walk(root):
                for name in names:
                    path = os.path.join(below, name)
                    self._bytes[os.stat(path).st_ino] = Path(path).read_bytes()
            for below, _, _ in os.walk(root):
                self._entries[os.stat(below).st_ino] = self._list(below)

    def sync(self, descriptor: int) -> None:
        status = os.fstat(descriptor)
        path = f"/proc/self/fd/{descriptor}"
        if os.path.isdir(path):
            self._entries[status.st_ino] = self._list(path)
            return
        content = Path(path).read_bytes()
        self._bytes[status.st_ino] = content
        for entries in self._entries.values():
            for name, (is_folder, inode, _) in entries.items():
                if inode == status.st_ino and not is_folder:
                    entries[name] = (False, inode, content)

    def forget(self, target: Any, folder: int | None) -> None:
        """The inode of a file that is removed may come again for another one."""
        if folder is not None:
            target = os.path.join(f"/proc/self/fd/{folder}", os.fsdecode(target))
        if os.path.isfile(target) and os.stat(target).st_nlink == 1:
            self._bytes.pop(os.stat(target).st_ino, None)

    def snapshot(self, *, eager: bool) -> dict[str, bytes | None]:
        """Path to bytes, None for a folder, of everything that is left."""
        left: dict[str, bytes | None] = {}
        for root in self._roots:
            left[root] = None
            self._collect(root, os.stat(root).st_ino, left, eager)
        return left

    def _collect(self, path: str, inode: int, left: dict[str, bytes | None], eager: bool) -> None:
        entries = self._list(path) if eager else self._entries.get(inode, {})
        for name, (is_folder, inside, content) in entries.items():
            below = os.path.join(path, name)
            left[below] = None if is_folder else content
            if is_folder:
                self._collect(below, inside, left, eager)

    def _list(self, folder: str) -> dict[str, tuple[bool, int, bytes]]:
        found = {}
        for entry in os.scandir(folder):
            inode = entry.inode()
            is_folder = entry.is_dir(follow_symlinks=False)
            found[entry.name] = (is_folder, inode, self._bytes.get(inode, b""))
        return found


def lose_unsynced(note: str | Path) -> None:
    """After a "cut": makes the folders what the disk would hold when the power comes back."""
    with open(f"{note}.durable", "rb") as file:
        left: Mapping[str, bytes | None] = pickle.load(file)
    for path, content in left.items():  # roots come before what is in them
        if content is None and not any(Path(path).is_relative_to(p) for p in left if p != path):
            shutil.rmtree(path, ignore_errors=True)
    for path, content in left.items():
        if content is None:
            os.makedirs(path, exist_ok=True)
        else:
            Path(path).write_bytes(content)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--root", action="append", required=True)
    parser.add_argument("--note", required=True)
    parser.add_argument("--action", default="kill")
    parser.add_argument("--only", action="append")
    parser.add_argument("script", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    script = [word for word in options.script if word != "--"]
    only = frozenset(options.only or ())
    Fault(tuple(options.root), options.note, options.action, only=only).install()
    sys.argv = script
    runpy.run_path(script[0], run_name="__main__")


if __name__ == "__main__":
    main()
