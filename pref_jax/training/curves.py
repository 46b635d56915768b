"""TensorBoard curves, written by a process of their own.

clu's writer imports TensorFlow: seconds in which the loop's threads would wait for Python's
lock, hundreds of megabytes, C++ log lines on the terminal, and a second library that wants the
accelerators. A process that is sent JSON lines keeps all of that away from the training.
"""

import importlib.util
import json
import logging
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

# A run that ends before TensorFlow is imported waits for its curves at most this long.
_CLOSE_SECONDS = 60.0
_REQUIRED = ("clu", "tensorboard", "tensorflow")
_ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "-1",
    "JAX_PLATFORMS": "cpu",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


class Curves:
    """Event files in a run's folder.

    They are a convenience: whatever fails here is one line in the log, never the run's end.

    Args:
      folder: where the event files go.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._queue: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        missing = [name for name in _REQUIRED if importlib.util.find_spec(name) is None]
        self._on = not missing
        if missing:
            logger.info("no TensorBoard curves without %s; metrics.jsonl has all", missing[0])

    def write(self, step: int, split: str, row: Mapping[str, Any]) -> None:
        """Takes the numbers among the values of ``row``; returns at once."""
        if not self._on:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._feed, name="curves", daemon=True)
            self._thread.start()
        scalars = {
            f"{split}/{name}": value
            for name, value in row.items()
            if name != "step" and isinstance(value, int | float)
        }
        self._queue.put(json.dumps([step, scalars]).encode() + b"\n")

    def close(self) -> None:
        """Returns once all is written, or after a minute."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(_CLOSE_SECONDS)
            self._on, self._thread = False, None

    def _feed(self) -> None:
        """Hands lines on; a pipe that is full while TensorFlow loads blocks only this thread."""
        try:
            process = subprocess.Popen(
                # -P: the folder of this file is no place to import from. A session of its own:
                # Ctrl-C is for the run, which then closes the pipe.
                [sys.executable, "-P", __file__, str(self._folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env={**os.environ, **_ENVIRONMENT},
                start_new_session=True,
            )
            assert process.stdin is not None
            try:
                while (line := self._queue.get()) is not None:
                    process.stdin.write(line)
                    if self._queue.empty():
                        process.stdin.flush()
            except OSError:
                self._on = False  # it has died; its last words come below
            _, errors = process.communicate()
            if process.returncode:
                last = errors.decode(errors="replace").strip().splitlines()[-1:]
                logger.warning("TensorBoard curves end here: %s", ascii("".join(last))[1:-1])
        except Exception as error:
            self._on = False
            logger.warning("no TensorBoard curves: %s", ascii(str(error))[1:-1])


def write_events(folder: str) -> None:
    """Writes the lines ``[step, {tag: value}]`` of standard input as events."""
    import tensorflow as tf
    from clu import metric_writers

    for kind in ("GPU", "TPU"):
        tf.config.set_visible_devices([], kind)
    writer = metric_writers.SummaryWriter(folder)
    # The end of the input is the run's end, however it came about.
    for line in sys.stdin.buffer:
        if line.endswith(b"\n"):
            step, scalars = json.loads(line)
            writer.write_scalars(step, scalars)
            writer.flush()
    writer.close()


if __name__ == "__main__":
    write_events(sys.argv[1])
