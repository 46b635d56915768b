"""What is scored and what is dropped in a limited time, by a clock that the models move."""

from __future__ import annotations

import numpy as np
import pytest

from pref_jax.kaggle.schedule import Schedule

ROWS = 1000
FALLBACK = np.tile([0.2, 0.3, 0.5], (ROWS, 1))


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Fake:
    """Answers with its own probabilities, row for row, at its own speed."""

    def __init__(
        self, clock: Clock, name: str, cost: float, speed: float, first: float = 0.6
    ) -> None:
        self.name, self.cost, self.clock, self.speed = name, cost, clock, speed
        self.probabilities = np.array([first, 0.9 - first, 0.1])
        self.opened = self.closed = 0
        self.call = 0.0  # seconds of a call, however few rows it holds
        self.loading = [10.0]  # seconds, of each time and of all after the last
        self.symmetric = False
        self.broken: set[int] = set()
        self.fails = ""

    def open(self) -> None:
        self.clock.now += self.loading[min(self.opened, len(self.loading) - 1)]
        self.opened += 1
        if self.fails == "open":
            raise MemoryError("no room")

    def prepare(self, order: int) -> np.ndarray:
        return np.full(ROWS, 50)

    def score(self, order: int, rows: np.ndarray) -> np.ndarray:
        assert self.opened > self.closed
        self.clock.now += self.call + len(rows) / self.speed
        if self.fails == "later" and rows[-1] > 300:
            raise RuntimeError("lost")
        # What is seen as A is B where the responses are exchanged.
        one = self.probabilities[[1, 0, 2]] if order else self.probabilities
        found = np.tile(one, (len(rows), 1))
        found[np.isin(rows, list(self.broken))] = np.nan
        return found

    def close(self) -> None:
        self.closed += 1


def make(clock: Clock, *models: Fake, deadline: float, both: bool = True) -> Schedule:
    return Schedule(models, FALLBACK, both_orders=both, deadline=deadline, clock=clock)


def statuses(schedule: Schedule) -> dict[tuple[str, int], str]:
    return {(part.model.name, part.order): part.status for part in schedule.parts}


def pair(clock: Clock) -> tuple[Fake, Fake]:
    """A model that takes 110 s for all rows and one that takes 1,010 s; given in this order."""
    return Fake(clock, "large", 9.0, 1.0, first=0.2), Fake(clock, "small", 1.0, 10.0)


@pytest.mark.parametrize(
    ("deadline", "kept"),
    [
        # Second orders fall first, the costlier model's before the other's; then that model.
        (2300, {("small", 0), ("large", 0), ("small", 1), ("large", 1)}),
        (1400, {("small", 0), ("large", 0), ("small", 1)}),
        (1190, {("small", 0), ("large", 0)}),
        # What remains once the model has fallen is enough for the cheap one's second order.
        (500, {("small", 0), ("small", 1)}),
        (140, {("small", 0)}),
    ],
)
def test_drops_in_the_stated_order(deadline: float, kept: set[tuple[str, int]]) -> None:
    clock = Clock()
    schedule = make(clock, *pair(clock), deadline=deadline)
    schedule.run()
    found = statuses(schedule)
    assert {part for part, status in found.items() if status == "finished"} == kept
    dropped = [part for part in schedule.parts if part.status != "finished"]
    assert all(part.status == "dropped" and part.reason for part in dropped)
    assert clock.now <= deadline + 10 + 16  # to load a model, and its first rows
    answers, unknown = schedule.answers()
    names = {name for name, _ in kept}
    expected = np.mean(
        [[0.6, 0.3, 0.1]] * ("small" in names) + [[0.2, 0.7, 0.1]] * ("large" in names), 0
    )
    np.testing.assert_allclose(answers, np.tile(expected, (ROWS, 1)))
    assert not unknown.any()


@pytest.mark.parametrize("call", [1.0, 3.0, 6.0])
def test_a_call_that_is_not_full_tells_no_speed(call: float) -> None:
    clock = Clock()
    large, small = pair(clock)
    large.speed, small.speed = 50.0, 100.0
    large.call = small.call = call
    # By its first 16 rows a part would take 62 calls of 1,000 rows.
    schedule = make(clock, large, small, deadline=140 + 30 * call)
    schedule.run()
    assert set(statuses(schedule).values()) == {"finished"}
    assert large.opened == small.opened == 2


def test_what_falls_first_is_a_second_order_where_calls_are_dear() -> None:
    clock = Clock()
    large, small = pair(clock)
    large.speed, large.call = 20.0, 3.0
    schedule = make(clock, large, small, deadline=220)
    schedule.run()
    found = statuses(schedule)
    assert found["large", 0] == "finished" and found["small", 1] == "dropped"


def test_one_slow_chunk_drops_nothing() -> None:
    clock = Clock()
    large, small = pair(clock)
    large.speed = 5.0
    score, calls = large.score, iter(range(100))

    def slow_once(order: int, rows: np.ndarray) -> np.ndarray:
        clock.now += 50 * (next(calls) == 1)
        return score(order, rows)

    large.score = slow_once  # type: ignore[method-assign]
    schedule = make(clock, large, small, deadline=110 + 300, both=False)
    schedule.run()
    assert set(statuses(schedule).values()) == {"finished"}


def test_a_part_is_tried_again_while_time_is_left() -> None:
    clock = Clock()
    small = Fake(clock, "small", 1.0, 10.0)
    small.loading = [200.0, 1.0]  # it has to be compiled only once
    schedule = make(clock, small, deadline=301 + 150)
    schedule.run()
    assert statuses(schedule) == {("small", 0): "finished", ("small", 1): "finished"}
    assert not schedule.parts[1].reason


def test_far_too_little_time_is_not_overrun_by_dear_calls() -> None:
    clock = Clock()
    large, small = pair(clock)
    large.call = small.call = 7.0
    schedule = make(clock, large, small, deadline=40)
    schedule.run()
    assert schedule.parts[0].status == "partial" and clock.now < 40 + 7 + 5
    assert {part.status for part in schedule.parts[1:]} == {"dropped"}


def test_no_row_is_left_out_when_the_cheapest_is_too_slow() -> None:
    clock = Clock()
    schedule = make(clock, *pair(clock), deadline=60)
    schedule.run()
    answers, unknown = schedule.answers()
    main = schedule.parts[0]
    assert main.status == "partial" and 300 < main.rows < 700 and str(main.rows) in main.reason
    np.testing.assert_allclose(answers[: main.rows], np.tile([0.6, 0.3, 0.1], (main.rows, 1)))
    np.testing.assert_allclose(answers[main.rows :], FALLBACK[main.rows :])
    assert unknown.sum() == ROWS - main.rows
    assert clock.now < 60 + 10  # a chunk is no longer than a tenth of what was left
    assert {part.status for part in schedule.parts[1:]} == {"dropped"}


def test_a_chunk_never_overruns_by_much() -> None:
    clock = Clock()
    slow = Fake(clock, "slow", 1.0, 0.5)
    schedule = make(clock, slow, deadline=400, both=False)
    schedule.run()
    assert 390 < clock.now < 420


@pytest.mark.parametrize("fails", ["open", "later"])
def test_a_model_that_fails_leaves_the_others(fails: str) -> None:
    clock = Clock()
    large, small = pair(clock)
    small.fails = fails
    schedule = make(clock, large, small, deadline=1e6)
    schedule.run()
    assert statuses(schedule) == {
        ("small", 0): "failed",
        ("small", 1): "dropped",
        ("large", 0): "finished",
        ("large", 1): "finished",
    }
    answers, unknown = schedule.answers()
    np.testing.assert_allclose(answers, np.tile([0.2, 0.7, 0.1], (ROWS, 1)))
    assert not unknown.any()
    assert small.opened == small.closed == 1


def test_rows_that_are_not_finite_have_the_other_models_answer() -> None:
    clock = Clock()
    large, small = pair(clock)
    small.broken, large.broken = {3, 7}, {7}
    schedule = make(clock, large, small, deadline=1e6, both=False)
    schedule.run()
    answers, unknown = schedule.answers()
    np.testing.assert_allclose(answers[3], [0.2, 0.7, 0.1])
    np.testing.assert_allclose(answers[7], FALLBACK[7])
    assert np.flatnonzero(unknown).tolist() == [7]


def test_stopping_keeps_what_is_done() -> None:
    clock = Clock()
    large, small = pair(clock)
    schedule = make(clock, large, small, deadline=1e6)
    seen: list[float] = []

    def stop_late(self: Schedule) -> None:
        seen.append(float((~self.answers()[1]).mean()))

    schedule._save = stop_late
    score, calls = small.score, iter(range(100))

    def interrupted(order: int, rows: np.ndarray) -> np.ndarray:
        if next(calls) == 2:
            schedule.stop()
            raise KeyboardInterrupt
        return score(order, rows)

    small.score = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        schedule.run()
    assert schedule.parts[0].status == "partial" and 0 < seen[-1] < 1
    assert {part.status for part in schedule.parts[1:]} == {"dropped"}


def test_the_next_model_answers_as_far_as_it_gets_where_the_first_fails() -> None:
    clock = Clock()
    large, small = pair(clock)
    small.fails = "open"
    schedule = make(clock, large, small, deadline=500, both=False)
    schedule.run()
    assert statuses(schedule) == {("small", 0): "failed", ("large", 0): "partial"}
    assert 0 < schedule.answers()[1].sum() < ROWS


def test_a_symmetric_model_is_asked_once() -> None:
    clock = Clock()
    models = [Fake(clock, "one", 1, 100), Fake(clock, "two", 2, 100)]
    models[0].symmetric = True
    fallback = np.full((20, 3), 1 / 3)
    schedule = Schedule(models, fallback, both_orders=True, deadline=1e9, clock=clock)
    assert [(part.model.name, part.order) for part in schedule.parts] == [
        ("one", 0),
        ("two", 0),
        ("two", 1),
    ]
