"""What is scored in a limited time, in which order, and what is dropped.

Parts are run in this order: each model over the rows as they are, the cheapest first; then each
model over the rows with A and B exchanged, the cheapest first. So what falls out when time is short
is the second order before a model, and a costlier model before a cheaper one; what nearly fitted is
tried once more in the end. The first part is what every row gets; of it, unlike of the others, a
beginning is used.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

logger = logging.getLogger(__name__)

# Rows of the first chunk, and the seconds that later ones may take.
_FIRST_ROWS = 16
_CHUNK_SECONDS = 30.0
# A call costs much the same however few rows it holds, so chunks are doubled, as long as that takes
# no more than this share of what is left, until doubling gains less than this in speed.
_TRIAL_SHARE = 0.25
_GAIN = 1.1
# A dropped part is tried once more in the end if it seemed to need at most so many times the rest.
_DOUBT = 2.0
ORDERS = ("as given", "exchanged")


class Model(Protocol):
    """A model that the schedule can run.

    Attributes:
      name: as in the bundle.
      cost: of a row, in units that the models share.
      symmetric: whether a second order would only say the same again.
    """

    name: str
    cost: float
    symmetric: bool

    def open(self) -> None:
        """Loads and compiles it."""
        ...

    def prepare(self, order: int) -> np.ndarray:
        """Tokenises the rows in an order of `ORDERS`; returns their lengths in tokens, [n]."""
        ...

    def score(self, order: int, rows: np.ndarray) -> np.ndarray:
        """Probabilities [len(rows), 3] of A, B, tie of the given rows; not finite where unknown."""
        ...

    def close(self) -> None:
        """Gives its memory back."""
        ...


@dataclass
class Part:
    """One model over all rows in one order.

    Attributes:
      status: "waiting", "running", "finished", "partial" (the rows that time allowed), "dropped" or
        "failed".
      rows: scored so far.
      seconds: spent on it, loading and tokenising included.
      reason: why it was dropped or failed.
      needs: seconds that it seemed to need when it was dropped for that; None: it was not.
      probabilities: [n, 3], NaN where there are none.
    """

    model: Model
    order: int
    status: str = "waiting"
    rows: int = 0
    seconds: float = 0.0
    rows_per_second: float | None = None
    reason: str = ""
    needs: float | None = None
    probabilities: np.ndarray | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        return f"{self.model.name}, responses {ORDERS[self.order]}"

    def describe(self) -> dict[str, Any]:
        """For `scoring.json`."""
        return {
            "model": self.model.name,
            "order": ORDERS[self.order],
            "status": self.status,
            "rows": self.rows,
            "seconds": round(self.seconds, 1),
            "rows_per_second": self.rows_per_second and round(self.rows_per_second, 2),
            "reason": self.reason,
        }


class Schedule:
    """The parts, run one after the other until the time is up.

    Args:
      models: in any order.
      fallback: probabilities [n, 3] of a row that no model could score.
      both_orders: whether the exchanged rows are scored too.
      deadline: until when parts may work, in the seconds of ``clock``.
      clock: monotonic seconds.
      save: is called, with this, whenever more rows have their answer, and now and then.
    """

    def __init__(
        self,
        models: Sequence[Model],
        fallback: np.ndarray,
        *,
        both_orders: bool,
        deadline: float,
        clock: Callable[[], float] = time.monotonic,
        save: Callable[["Schedule"], None] = lambda schedule: None,
    ) -> None:
        cheapest_first = sorted(models, key=lambda model: model.cost)
        orders = (0, 1) if both_orders else (0,)
        self.parts = [
            Part(model, order)
            for order in orders
            for model in cheapest_first
            if not (order and model.symmetric)
        ]
        self._fallback, self._deadline = np.asarray(fallback, float), deadline
        self._clock, self._save = clock, save
        self._open: Model | None = None
        self._main: Part | None = None  # the part of which a beginning is used
        # Held while answers change or are written: a watchdog writes from another thread.
        self.lock = threading.RLock()

    @property
    def num_rows(self) -> int:
        return len(self._fallback)

    def left(self) -> float:
        """Seconds until the deadline."""
        return self._deadline - self._clock()

    def answers(self) -> tuple[np.ndarray, np.ndarray]:
        """Probabilities [n, 3], and which rows [n] have them from no model.

        A row's answer is the mean over the models, each of them the mean over its orders, of the
        parts that are finished and of the main one.
        """
        with self.lock:
            used = [part for part in self.parts if part.status == "finished" or part is self._main]
            by_model: dict[str, list[np.ndarray]] = {}
            for part in used:
                if part.probabilities is not None:
                    by_model.setdefault(part.model.name, []).append(part.probabilities)
            means = [_mean(parts) for parts in by_model.values()]
            answer = _mean(means) if means else np.full_like(self._fallback, np.nan)
            unknown = ~np.isfinite(answer).all(axis=1)
            return np.where(unknown[:, None], self._fallback, answer), unknown

    def run(self) -> None:
        """Runs the parts; a model that fails is put aside and the others go on."""
        failed: set[str] = set()
        for part in [*self.parts, *self.parts]:
            again = part.status != "waiting"
            if again and not self._is_worth_another_try(part):
                continue
            if part.model.name in failed:
                self._drop(part, "its model failed")
                continue
            try:
                self._run(part, again)
            except Exception as error:  # whatever it is, the other models' rows are worth having
                logger.debug("%s", part.name, exc_info=True)
                failed.add(part.model.name)
                with self.lock:
                    part.status, part.reason = "failed", _one_line(error)
                    part.probabilities, part.rows = None, 0
                    self._main = None if self._main is part else self._main
                logger.warning("%s: failed: %s", part.name, part.reason)
                self._close()
                self._save(self)
        self._close()
        self._save(self)

    def stop(self) -> None:
        """Settles what is running or waiting when the time is up, and saves."""
        with self.lock:
            for part in self.parts:
                if part.status == "running" and part is self._main:
                    self._settle(part)
                elif part.status in ("running", "waiting"):
                    self._drop(part, "the time was up")
            self._save(self)

    def _is_worth_another_try(self, part: Part) -> bool:
        return (
            part.status == "dropped"
            and part.needs is not None
            and part.needs <= _DOUBT * self.left()
        )

    def _run(self, part: Part, again: bool) -> None:
        """Begins a part, or goes on with one that was dropped."""
        started = self._clock() - part.seconds
        estimate = None if again else self._estimate(part)
        if self.left() <= 0 or (estimate is not None and estimate > self.left()):
            needs = "" if estimate is None else f"it would take {_minutes(estimate)}, "
            self._drop(part, f"{needs}{_minutes(self.left())} were left", needs=estimate)
            return
        part.status, part.reason, part.needs = "running", "", None
        if self._main is None:
            self._main = part
        if self._open is not part.model:
            self._close()
            self._open = part.model
            part.model.open()
        lengths = np.asarray(part.model.prepare(part.order), float)
        with self.lock:
            if part.probabilities is None:
                part.probabilities = np.full((self.num_rows, 3), np.nan)
        logger.info("%s: ready after %.0f s", part.name, self._clock() - started)
        self._score_rows(part, lengths, started)
        part.seconds = self._clock() - started
        if part.status == "running":
            self._settle(part)
            self._save(self)

    def _score_rows(self, part: Part, lengths: np.ndarray, started: float) -> None:
        """Chunk by chunk, each as many rows as the last one's speed allows in `_CHUNK_SECONDS`."""
        first, entered = part.rows, self._clock()
        said = saved = entered
        size, growing = _FIRST_ROWS, True
        speeds = [0.0, 0.0]  # of the last two chunks, in tokens a second
        while part.rows < self.num_rows:
            if self.left() <= 0:
                if part is not self._main:
                    self._drop(part, "the time was up")
                return
            begun = self._clock()
            rows = np.arange(part.rows, min(part.rows + size, self.num_rows))
            found = part.model.score(part.order, rows)
            if part.order == 1:
                found = found[:, [1, 0, 2]]
            spent = max(self._clock() - begun, 1e-9)
            with self.lock:
                assert part.probabilities is not None
                part.probabilities[rows] = found
                part.rows = int(rows[-1]) + 1
                part.seconds = self._clock() - started
            part.rows_per_second = (part.rows - first) / max(self._clock() - entered, 1e-9)
            speeds = [speeds[1], max(lengths[rows].sum(), 1.0) / spent]
            growing = (
                growing
                and speeds[1] > _GAIN * speeds[0]
                and 2 * spent <= _TRIAL_SHARE * self.left()
            )
            # The better of two: one chunk that something else has slowed drops nothing.
            needed = lengths[part.rows :].sum() / max(speeds)
            seconds = _CHUNK_SECONDS
            if part is self._main:  # of which a beginning counts
                seconds = min(seconds, max(self.left() / 10, 1.0))
            elif growing:
                seconds = min(seconds, _TRIAL_SHARE * self.left())
            size = max(1, math.floor(len(rows) / spent * seconds))
            if growing:
                size = max(size, 2 * len(rows))
            if self._clock() - said >= _CHUNK_SECONDS or part.rows == self.num_rows:
                said = self._clock()
                logger.info(
                    "%s: %d of %d rows, %.1f rows/s, %s to go, %s left",
                    part.name,
                    part.rows,
                    self.num_rows,
                    part.rows_per_second,
                    _minutes(needed),
                    _minutes(self.left()),
                )
            if part is self._main:
                if self._clock() - saved >= 2 * _CHUNK_SECONDS:
                    saved = self._clock()
                    self._save(self)
            elif needed > self.left() and not growing:
                self._drop(
                    part,
                    f"at {part.rows_per_second:.1f} rows/s it would take {_minutes(needed)} more, "
                    f"{_minutes(self.left())} were left",
                    needs=needed,
                )
                return

    def _estimate(self, part: Part) -> float | None:
        """Seconds of a part whose model has scored the other order; None: not known."""
        for other in self.parts:
            if other.model is part.model and other.status == "finished":
                return other.seconds
        return None

    def _settle(self, part: Part) -> None:
        with self.lock:
            whole = part.rows == self.num_rows
            part.status = "finished" if whole else "partial"
            if not whole:
                part.reason = f"the time was up after {part.rows} of {self.num_rows} rows"
                logger.warning("%s: %s", part.name, part.reason)

    def _drop(self, part: Part, reason: str, *, needs: float | None = None) -> None:
        with self.lock:
            part.status, part.reason, part.needs = "dropped", reason, needs
        logger.warning("dropped: %s: %s", part.name, reason)

    def _close(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None


def _mean(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Mean per row over those parts [n, 3] that are finite there; NaN where none is."""
    stack = np.stack(parts)
    finite = np.isfinite(stack).all(axis=2, keepdims=True)
    count = finite.sum(axis=0)
    with np.errstate(invalid="ignore"):
        return np.where(finite, stack, 0.0).sum(axis=0) / np.where(count, count, np.nan)


def summarise(parts: Sequence[Part]) -> Mapping[str, list[str]]:
    """Names of the parts by status."""
    found: dict[str, list[str]] = {}
    for part in parts:
        found.setdefault(part.status, []).append(part.name)
    return found


def _minutes(seconds: float) -> str:
    seconds = max(0.0, seconds)
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
