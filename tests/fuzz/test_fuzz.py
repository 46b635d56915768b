"""Whatever stands in a file, on a command line or in an answer is read, or refused in one line.

PREF_JAX_FUZZ=20000 tries so many inputs for each target instead of a hundred; `run.py` goes on for
as long as it is told to, guided by what the code does with them.
"""

from __future__ import annotations

import os
import tracemalloc

import pytest
from fuzz import targets
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

# Readers allocate what the content calls for; a length in a header is no reason for more.
MOST_TRACED = 30e6  # bytes

fuzz = settings(
    max_examples=int(os.environ.get("PREF_JAX_FUZZ", "120")),
    derandomize="PREF_JAX_FUZZ" not in os.environ,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@st.composite
def damage(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """One of the seeds with up to four parts of it replaced."""
    damaged = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(damaged) - 1)))
        length = draw(st.integers(0, 20))
        what = draw(st.one_of(st.sampled_from(targets.WORDS), st.binary(max_size=6)))
        damaged[at : at + length] = what
    return bytes(damaged)


@pytest.mark.parametrize("name", sorted(targets.TARGETS))
def test_what_is_whole_is_read(name: str) -> None:
    for seed in targets.TARGETS[name].seeds():
        line = targets.run(name, seed)
        assert line is None, line


@pytest.mark.parametrize("name", sorted(targets.TARGETS))
def test_what_once_failed_does_not_fail_again(name: str) -> None:
    for content in targets.beginnings(name):
        targets.run(name, content)


@pytest.mark.parametrize("name", sorted(targets.TARGETS))
def test_damage_is_read_or_refused(name: str) -> None:
    seeds = targets.TARGETS[name].seeds()
    for seed in seeds:  # what is imported late is not counted
        targets.run(name, seed)

    @fuzz
    @given(content=damage(seeds))
    def run(content: bytes) -> None:
        tracemalloc.start()
        try:
            targets.run(name, content)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < MOST_TRACED, f"{peak / 1e6:.0f} MB"

    run()


def test_a_defect_is_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: object, content: bytes) -> None:
        raise KeyError(content)

    monkeypatch.setitem(targets.TARGETS, "csv", targets.Target(fail, list))
    with pytest.raises(KeyError):
        targets.run("csv", b"")
    hungry = targets.Target(lambda folder, content: bytearray(10**8).count(b"x"), list)
    monkeypatch.setitem(targets.TARGETS, "csv", hungry)
    monkeypatch.setattr(targets, "MOST_SECONDS", 0.0)
    with pytest.raises(AssertionError, match=r" s$"):
        targets.run("csv", b"")
