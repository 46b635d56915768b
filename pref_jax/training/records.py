"""Measured values over the steps of a run: JSON lines, and TensorBoard beside them."""

import json
import os
import queue
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from absl import logging

from pref_jax.training.workdir import plain, write_durably, write_error

# Importing TensorFlow takes seconds; a run that ends sooner waits for its curves this long.
_CLOSE_SECONDS = 120.0


class MetricLog:
    """Appends to ``metrics.jsonl``; one object a line: ``step``, ``split`` and the values.

    A line reaches the file in one write. Values that are no finite number become the texts
    "NaN", "Infinity" and "-Infinity" (`pref_jax.training.workdir.plain`).

    Args:
      workdir: the run's folder, which exists.
      tensorboard: whether event files are written beside the lines, by a thread of their own.
    """

    def __init__(self, workdir: str | os.PathLike[str], *, tensorboard: bool) -> None:
        self.path = Path(workdir) / "metrics.jsonl"
        self._open()
        self._curves = _Curves(Path(workdir)) if tensorboard else None

    def _open(self) -> None:
        try:
            self._file = os.open(
                self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644
            )
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

    def drop_after(self, step: int) -> None:
        """Removes the lines of later steps, and any that is not whole.

        Called after a checkpoint of ``step`` was restored, so that every step stands once.
        """
        kept, before = [], self.path.read_bytes()
        for line in before.splitlines(keepends=True):
            try:
                row = json.loads(line)
                keep = line.endswith(b"\n") and row["step"] <= step
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


class _Curves:
    """TensorBoard events, written by a thread that imports TensorFlow when the first value comes.

    Curves are a convenience: whatever fails here is one line in the log, never the run's end.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._queue: queue.SimpleQueue[tuple[int, dict[str, float]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def write(self, step: int, split: str, row: Mapping[str, Any]) -> None:
        scalars = {
            f"{split}/{name}": float(value)
            for name, value in row.items()
            if name != "step" and isinstance(value, int | float)
        }
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="tensorboard", daemon=True)
            self._thread.start()
        self._queue.put((step, scalars))

    def close(self) -> None:
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(_CLOSE_SECONDS)

    def _run(self) -> None:
        try:
            writer = _make_writer(self._folder)
        except ImportError as error:
            logging.info("no TensorBoard curves (%s); metrics.jsonl has every value", error)
            return
        except Exception as error:
            logging.warning("no TensorBoard curves (%s)", ascii(str(error)))
            return
        try:
            while (entry := self._queue.get()) is not None:
                writer.write_scalars(*entry)
                if self._queue.empty():
                    writer.flush()
            writer.close()
        except Exception as error:
            logging.warning("TensorBoard curves end here (%s)", ascii(str(error)))


def _make_writer(folder: Path) -> Any:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow as tf
    from clu import metric_writers

    for kind in ("GPU", "TPU"):  # jax needs the accelerators' whole memory
        tf.config.set_visible_devices([], kind)
    return metric_writers.SummaryWriter(str(folder))
