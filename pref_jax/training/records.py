"""Measured values over the steps of a run: JSON lines, and TensorBoard beside them."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pref_jax.files import plain, sync, write_durably, write_error
from pref_jax.training.curves import Curves


class MetricLog:
    """Appends to ``metrics.jsonl``; one object a line: ``step``, ``split`` and the values.

    A line reaches the file in one write. Values that are no finite number become the texts
    "NaN", "Infinity" and "-Infinity" (`pref_jax.training.workdir.plain`).

    Args:
      workdir: the run's folder, which exists.
      tensorboard: whether event files are written beside the lines (`pref_jax.training.curves`).
    """

    def __init__(self, workdir: str | os.PathLike[str], *, tensorboard: bool) -> None:
        self.path = Path(workdir) / "metrics.jsonl"
        self._open()
        self._curves = Curves(Path(workdir)) if tensorboard else None

    def _open(self) -> None:
        try:
            self._file = os.open(
                self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644
            )
            sync(self.path.parent)  # the file itself, should the power fail
            _cut_torn_line(self._file)
        except OSError as error:
            raise write_error(self.path, error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def write(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        """Appends one line; ``values`` are numbers, or what `plain` takes."""
        row = {"step": int(step), "split": split, **plain(values)}
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        try:
            if os.write(self._file, line) != len(line):
                raise OSError("the disk took half a line")
        except OSError as error:
            raise write_error(self.path, error) from error
        if self._curves is not None:
            self._curves.write(step, split, row)

    def sync(self) -> None:
        """Returns once every line written so far has reached the disk."""
        try:
            os.fsync(self._file)
        except OSError as error:
            raise write_error(self.path, error) from error

    def drop_after(self, step: int, *, evaluated: bool = True) -> None:
        """Removes the lines of later steps, and any that cannot be read.

        Called after a checkpoint of ``step`` was restored, so that every step stands once.

        Args:
          evaluated: whether the checkpoint knows of the evaluation of its step; else that one's
            line goes, too.
        """
        kept, before = [], self.path.read_bytes()
        for line in before.splitlines(keepends=True):
            try:
                row = json.loads(line)
                keep = row["step"] <= step
                if row["step"] == step and row["split"] == "valid":
                    keep = evaluated
            except (ValueError, TypeError, KeyError):
                keep = False
            if keep:
                kept.append(line)
        after = b"".join(kept)
        if after != before:
            os.close(self._file)
            write_durably(self.path, after)
            self._open()

    def close(self) -> None:
        """Writes out what is left; the log is of no use afterwards."""
        if self._file < 0:
            return
        try:
            self.sync()
        finally:
            os.close(self._file)
            self._file = -1
            if self._curves is not None:
                self._curves.close()


class UnwrittenLog(MetricLog):
    """The log of a host that leaves the writing to another one."""

    def __init__(self) -> None:
        pass

    def write(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        pass

    def sync(self) -> None:
        pass

    def drop_after(self, step: int, *, evaluated: bool = True) -> None:
        pass

    def close(self) -> None:
        pass


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a ``metrics.jsonl``, also while a run is writing it."""
    rows = []
    for line in path.read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n"):
            rows.append(json.loads(line))
    return rows


def _cut_torn_line(file: int) -> None:
    """Cuts what a kill or a full disk left after the last line's end."""
    end = os.lseek(file, 0, os.SEEK_END)
    position = end
    while position > 0:
        start = max(0, position - 65536)
        newline = os.pread(file, position - start, start).rfind(b"\n")
        if newline >= 0:
            position = start + newline + 1
            break
        position = start
    if position != end:
        os.ftruncate(file, position)
