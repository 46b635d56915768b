"""What a waiting person sees, and how a run is asked to stop."""

import contextlib
import io
import math
import os
import signal
import sys
import time
from collections.abc import Mapping
from types import FrameType, TracebackType
from typing import Any, Self, TextIO

from pref_jax import hosts
from pref_jax.errors import Stopped


class Progress:
    """A bar on a terminal (standard error); elsewhere a plain line now and then on standard
    output, since standard error is kept for the one line of an error.

    Args:
      total: steps in all.
      initial: steps done before (a resumed run).
      unit: what one step is called.
      description: what is being done.
      every_seconds: least time between two plain lines.
      stream: where to write, where that is settled by the caller.
      shown: false where another host shows the same.
    """

    def __init__(
        self,
        total: int,
        *,
        initial: int = 0,
        unit: str = "step",
        description: str = "train",
        every_seconds: float = 30.0,
        stream: TextIO | None = None,
        shown: bool = True,
    ) -> None:
        self._total, self._unit, self._description = total, unit, description
        self._every_seconds = every_seconds
        if not shown:
            self._every_seconds = math.inf
            stream = io.StringIO()
        if stream is None:
            stream = sys.stderr if sys.stderr.isatty() else sys.stdout
        self._stream = stream
        self._first = self._step = initial
        self._started = self._spoken = time.monotonic()
        self._spoken_step: int | None = None
        self._rows = 0
        self._values: dict[str, float] = {}
        self._bar: Any = None
        if self._stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total,
                initial=initial,
                unit=f" {unit}s",
                desc=description,
                file=self._stream,
                dynamic_ncols=True,
                mininterval=0.2,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def update(self, step: int, *, rows: int = 0, **values: float) -> None:
        """Says that ``step`` steps are done.

        Args:
          rows: rows handled since the last call.
          values: numbers to show, such as ``loss``; those not given keep their last value.
        """
        advance, self._step = step - self._step, step
        self._rows += rows
        self._values.update({name: float(value) for name, value in values.items()})
        now = time.monotonic()
        if self._bar is not None:
            self._bar.set_postfix(self._shown(now), refresh=False)
            self._bar.update(advance)
        elif self._spoken_step is None or now - self._spoken >= self._every_seconds:
            self._speak(now)

    def note(self, text: str) -> None:
        """Writes one line without tearing the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Leaves the last state on the screen."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        elif self._spoken_step is not None and self._spoken_step != self._step:
            self._speak(time.monotonic())

    def _shown(self, now: float) -> Mapping[str, str]:
        shown = {name: f"{value:.4g}" for name, value in self._values.items()}
        if self._rows:
            shown["rows/s"] = f"{self._rows / max(now - self._started, 1e-9):.1f}"
        return shown

    def _speak(self, now: float) -> None:
        parts = [f"{self._description}: {self._unit} {self._step}/{self._total}"]
        parts += [f"{name} {value}" for name, value in self._shown(now).items()]
        done = self._step - self._first
        if done > 0 and self._step < self._total:
            left = (now - self._started) / done * (self._total - self._step)
            parts.append(f"{_duration(left)} left")
        print(", ".join(parts), file=self._stream, flush=True)
        self._spoken, self._spoken_step = now, self._step


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class StopSignals:
    """Turns SIGTERM and the first Ctrl-C into a wish that the loop reads between two steps.

    A second Ctrl-C raises KeyboardInterrupt at once. The former handlers come back at the end.
    Only for the main thread, as Python's signals are.

    Attributes:
      requested: the signal's name, such as "SIGTERM"; None while nobody asked.
      saving: whether there is something to save, so that a signal is only noted.
    """

    def __init__(self, *, at_once: bool = False) -> None:
        """Sets nothing yet.

        Args:
          at_once: whether a signal ends the process, with one line and exit code 0, while there
            is nothing to save; several hosts end together at the next `check` instead.
        """
        self.requested: str | None = None
        self.saving = False
        self._at_once = at_once
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._former.items():
            # None: the former handler was not set from Python and cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._former.clear()

    def check(self) -> None:
        """All hosts come here; raises `Stopped` on all of them where one was asked to stop."""
        name = hosts.first("stop", self.requested)
        if name is not None:
            raise Stopped(name)

    def _note(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGINT and self.requested == name:
            raise KeyboardInterrupt
        self.requested = name
        if self._at_once and not self.saving and hosts.count() == 1:
            # No exception: callbacks drop it, and imports of extensions turn it into others.
            with contextlib.suppress(OSError, RuntimeError, ValueError):
                sys.stdout.flush()
            with contextlib.suppress(OSError):
                os.write(1, f"{Stopped(name)}\n".encode())
            os._exit(0)
