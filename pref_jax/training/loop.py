"""The training loop: updates, metrics, evaluations, checkpoints, and a clean end.

The device is never waited for: metrics of update n are fetched after update n + 1 was dispatched,
checkpoints are written in the background, and the next batch is packed by a reading thread.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from pref_jax import hosts
from pref_jax.data.batches import BatchPlan, Update
from pref_jax.errors import RunError, Stopped
from pref_jax.training.checkpoints import Checkpoints
from pref_jax.training.progress import Progress, StopSignals
from pref_jax.training.records import MetricLog
from pref_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Limits:
    """When the loop does what.

    Attributes:
      total_steps: updates of the whole run.
      eval_every: updates between evaluations; the last update is always followed by one.
      checkpoint_every: updates between checkpoints; new bests and the last are always saved.
      log_every: updates between two refreshes of the progress bar.
      deadline: `time.monotonic` seconds at which the process must have ended; None: no limit.
      valid_rows: rows of an evaluation, from which its time is guessed before the first one.
    """

    total_steps: int
    eval_every: int
    checkpoint_every: int
    log_every: int
    deadline: float | None
    valid_rows: int


@dataclasses.dataclass
class History:
    """What a checkpoint remembers beside the state.

    Attributes:
      best_step, best_loss: of the best evaluation so far; 0 and infinity before the first.
      train_seconds: wall time spent in updates, over all sessions.
      rows: rows trained on, over all sessions.
    """

    best_step: int = 0
    best_loss: float = math.inf
    train_seconds: float = 0.0
    rows: int = 0

    def describe(self, valid_loss: float | None) -> dict[str, Any]:
        """The checkpoint's ``info``."""
        return {**dataclasses.asdict(self), "valid_loss": valid_loss}

    @classmethod
    def read(cls, info: Mapping[str, Any]) -> "History":
        return cls(
            best_step=int(info["best_step"]),
            best_loss=float(info["best_loss"]),
            train_seconds=float(info["train_seconds"]),
            rows=int(info["rows"]),
        )


def read_ahead(plan: BatchPlan, start: int, stop: int) -> Iterator[Update]:
    """Updates ``start`` to ``stop``, packed by a thread a few updates ahead of their use."""
    import grain

    class Source:
        def __len__(self) -> int:
            return stop

        def __getitem__(self, step: int) -> Update:
            return plan.update(int(step))

    dataset = grain.MapDataset.source(Source()).slice(slice(start, stop))
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    return iter(dataset.to_iter_dataset(options))


class TrainingLoop:
    """Runs updates from a state to the end of training, or to the wish to stop."""

    def __init__(
        self,
        *,
        train_step: Callable[[TrainState, Update], tuple[TrainState, dict[str, jax.Array]]],
        place: Callable[[Update], Update],
        evaluate: Callable[[TrainState, Callable[[int], None]], Mapping[str, float]],
        plan: BatchPlan,
        checkpoints: Checkpoints,
        metrics: MetricLog,
        limits: Limits,
        describe_rows: Callable[[np.ndarray], str],
        describe_memory: Callable[[], str],
    ) -> None:
        """Collects the parts.

        Args:
          train_step: the compiled update.
          place: puts a packed update onto the devices.
          evaluate: metrics on the held-out rows, ``loss`` among them; calls its second argument
            after every batch, which may end it.
          plan: the batch plan.
          checkpoints, metrics: where results go.
          limits: when to do what.
          describe_rows: ids of samples, for messages.
          describe_memory: the line on its use, said after the first update.
        """
        self._train_step = train_step
        self._place = place
        self._evaluate = evaluate
        self._plan = plan
        self._checkpoints = checkpoints
        self._metrics = metrics
        self._limits = limits
        self._describe_rows = describe_rows
        self._describe_memory: Callable[[], str] | None = describe_memory
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._eval_seconds: float | None = None
        self._unreported = 0  # rows since the last line of progress

    def run(
        self,
        state: TrainState,
        step: int,
        history: History,
        signals: StopSignals,
        *,
        evaluated: bool = True,
    ) -> tuple[TrainState, str | None]:
        """Trains from ``step`` updates on.

        Args:
          state: the state to go on from; it is donated.
          step: updates done.
          history: is kept up to date.
          signals: say when to stop.
          evaluated: whether the evaluation after ``step`` was done, where one was due.

        Returns:
          the last state, and why the loop stopped early: a signal's name, "max_hours" or None.

        Raises:
          RunError: a loss or gradient is not finite, or a checkpoint could not be written.
        """
        limits, self._history, self._signals = self._limits, history, signals
        stopped: str | None = None
        with Progress(
            limits.total_steps, initial=step, description="train", shown=hosts.is_leader()
        ) as self._progress:
            self._mark = time.monotonic()
            if not evaluated and self._is_due(step):  # a signal came before its end
                stopped = self._settle(state, step, None, evaluate=True, save=True)
            if stopped is None and step < limits.total_steps:
                updates = read_ahead(self._plan, step, limits.total_steps)
                upcoming = self._place(next(updates))
                self._mark = time.monotonic()
            while stopped is None and step < limits.total_steps:
                state, values = self._train_step(state, upcoming)
                previous, self._pending = self._pending, (step, values)
                step += 1
                if step < limits.total_steps:
                    upcoming = self._place(next(updates))
                self._record(previous)
                last = step == limits.total_steps
                if not last:
                    # One message per update; all hosts stop after the same one.
                    stopped = hosts.first("stop", self._wish())
                # The wall-clock limit ends a run: it leaves an evaluated model behind.
                evaluate = self._is_due(step) or stopped == "max_hours"
                save = last or stopped is not None or step % limits.checkpoint_every == 0
                if evaluate or save:
                    stopped = self._settle(state, step, stopped, evaluate=evaluate, save=save)
        self._checkpoints.wait()
        return state, stopped

    def _is_due(self, step: int) -> bool:
        """Whether update ``step`` is followed by an evaluation."""
        return step == self._limits.total_steps or step % self._limits.eval_every == 0

    def _wish(self) -> str | None:
        """Why this host wants to stop now."""
        if self._signals.requested is not None:
            return self._signals.requested
        return "max_hours" if self._time_is_up() else None

    def _record(self, entry: tuple[int, dict[str, jax.Array]] | None) -> None:
        """Fetches one update's metrics, checks and writes them."""
        if entry is None:
            return
        step, arrays = entry
        values = {name: float(value) for name, value in jax.device_get(arrays).items()}
        now = time.monotonic()
        numbers = self._plan.sample_numbers(step)
        self._history.train_seconds += now - self._mark
        self._history.rows += len(numbers)
        rate = len(numbers) / max(now - self._mark, 1e-9)
        self._mark = now
        finite = math.isfinite(values["loss"])
        if "loss_scale" not in values:
            finite = finite and math.isfinite(values["gradient_norm"])
        if not finite:
            raise RunError(
                f"update {step + 1}",
                f"loss {values['loss']} and gradient norm {values['gradient_norm']} at learning "
                f"rate {values['learning_rate']:.3g}, rows {self._describe_rows(numbers)}",
                "look at these rows, or lower train.learning_rate; the last checkpoint is kept",
            )
        self._metrics.write(step + 1, "train", values | {"rows_per_second": rate})
        if self._describe_memory is not None:
            self._progress.note(self._describe_memory())
            self._describe_memory = None
        self._unreported += len(numbers)
        if (step + 1) % self._limits.log_every == 0:
            self._progress.update(step + 1, rows=self._unreported, loss=values["loss"])
            self._unreported = 0

    def _settle(
        self, state: TrainState, step: int, stopped: str | None, *, evaluate: bool, save: bool
    ) -> str | None:
        """Brings metrics up to date; evaluates and saves where that is due.

        A signal leaves no time for an evaluation: the checkpoint without one tells the next start
        to make up for it.

        Args:
          stopped: why the loop stops after this.

        Returns:
          the same, or the signal that ended the evaluation.
        """
        pending, self._pending = self._pending, None
        self._record(pending)
        loss: float | None = None
        history = self._history
        values: Mapping[str, float] | None = None
        if evaluate and stopped in (None, "max_hours"):
            started = time.monotonic()
            try:
                values = dict(self._evaluate(state, lambda _: self._signals.check()))
            except Stopped as stop:
                stopped, save = stop.signal, True
        if values is not None:
            # Summed on each host; the last bit decides which checkpoint is the best.
            values = hosts.broadcast("evaluation", values)
            self._eval_seconds = time.monotonic() - started
            loss = float(values["loss"])
            self._metrics.write(step, "valid", values)
            self._progress.note(
                f"step {step}: "
                + ", ".join(f"valid {name} {value:.4f}" for name, value in values.items())
            )
            if not math.isfinite(loss):
                raise RunError(
                    f"evaluation after update {step}",
                    f"the loss on held-out rows is {loss}",
                    "lower train.learning_rate; the last checkpoint is kept",
                )
            if loss < history.best_loss:
                history.best_loss, history.best_step = loss, step
                save = True
        if save:
            self._checkpoints.save(step, state, history.describe(loss), before=self._metrics.sync)
        self._mark = time.monotonic()
        return stopped

    def _time_is_up(self) -> bool:
        """Whether another update could leave too little time to evaluate and save."""
        deadline, history = self._limits.deadline, self._history
        if deadline is None:
            return False
        now = time.monotonic()
        per_update = now - self._mark if self._pending is None else 0.0
        if history.rows:
            per_row = history.train_seconds / history.rows
            per_update = max(per_update, per_row * self._plan.batch_size)
        reserve = 3.0 * per_update + 10.0
        evaluation = self._eval_seconds
        if evaluation is None:  # a forward pass costs about a third of an update
            evaluation = per_update / 3.0 * self._limits.valid_rows / self._plan.batch_size
        return now + reserve + 1.2 * evaluation > deadline
