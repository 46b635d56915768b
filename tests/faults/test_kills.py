"""Killed, or without power, at every write or at any moment: nothing lost, nothing doubled."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from annotation.judge import Judge, rate, read_texts
from faults.conftest import Record
from faults.trials import (
    Process,
    Trial,
    chain,
    list_points,
    make_annotate,
    make_cache,
    make_study,
    run_straight,
)

_SAMPLE = {"train": 2, "annotate": 4, "cache": 3}
_RANDOM_KILLS = {"train": 14, "annotate": 10, "cache": 8, "reproduce": 8}


def answer(body: dict[str, Any], times: int) -> str:
    """The good answer; a few texts are never rated."""
    return "no" if read_texts(body)[2] in "01" else json.dumps(rate(body))


@pytest.fixture
def judge() -> Iterator[Judge]:
    with Judge(answer, seconds=0.01) as server:
        yield server


@pytest.fixture
def trial(request: pytest.FixtureRequest, name: str) -> Trial:
    """The command of that name."""
    if name == "train":
        return request.getfixturevalue("training")
    if name == "reproduce":
        return make_study()
    arena = request.getfixturevalue("arena")
    if name == "cache":
        return make_cache(arena, request.getfixturevalue("straight"))
    return make_annotate(arena, request.getfixturevalue("judge").url)


def assert_same(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name] == value, name


@pytest.mark.parametrize("action", ["kill", "cut"])
@pytest.mark.parametrize("name", ["train", "annotate", "cache", "reproduce"])
def test_struck_at_its_writes(
    name: str,
    action: str,
    trial: Trial,
    judge: Judge,
    campaign: bool,
    tmp_path: Path,
    record: Record,
    request: pytest.FixtureRequest,
) -> None:
    if name == "reproduce" and not campaign:
        pytest.skip("minutes long: PREF_JAX_FAULTS=all")
    if name == "train":
        points = request.getfixturevalue("training_points")
        wanted = trial.read(request.getfixturevalue("straight"))
    else:
        points = list_points(trial, tmp_path / "straight")
        wanted = trial.read(tmp_path / "straight")
    assert len(points) > 20
    only = None
    if not campaign:
        only = random.Random(f"{name} {action}").sample(points, _SAMPLE[name])
    asked = judge.good.copy()
    struck: list[str] = []
    # A chain may end before it has met all points: where a run goes on, it takes other ways.
    while more := chain(trial, tmp_path / f"harmed{len(struck)}", action, only, struck):
        assert_same(trial.read(tmp_path / f"harmed{len(struck)}"), wanted)
        struck += more
        if only is not None:
            break
    assert len(struck) >= len(only or points) // 2
    if name == "annotate":
        check_judge(judge, asked, len(struck))
    what = "killed" if action == "kill" else "power cut, what was not synced is lost"
    record(
        f"{name}: {what} before and after each of its writes ({len(struck)} points)",
        "the same command goes on",
        "result equals the straight run's bit for bit; no checkpoint, line or rating lost",
    )


def check_judge(judge: Judge, before: Counter[str], kills: int) -> None:
    """What was on the disk is not paid again: per kill at most those on their way, four."""
    more = judge.good - before
    rated = [count for texts, count in more.items() if texts[2] not in "01"]
    assert sum(rated) - len(rated) <= 4 * kills


@pytest.mark.parametrize("name", ["train", "annotate", "cache", "reproduce"])
def test_killed_at_any_moment(
    name: str, trial: Trial, judge: Judge, campaign: bool, tmp_path: Path, record: Record
) -> None:
    if not campaign:
        pytest.skip("the sample strikes at writes; any moment: PREF_JAX_FAULTS=all")
    (tmp_path / "warm").mkdir()
    run_straight(trial, tmp_path / "warm")
    began = time.monotonic()
    wanted = run_straight(trial, tmp_path / "straight")
    seconds = time.monotonic() - began
    moments = random.Random(name)
    kills = ends = 0
    while kills < _RANDOM_KILLS[name] or (tmp_path / f"harmed{ends}").exists():
        folder = tmp_path / f"harmed{ends}"
        folder.mkdir(exist_ok=True)
        kept = trial.kept(folder)
        process = Process(trial, folder)
        if kills < _RANDOM_KILLS[name]:
            process.started.join(moments.uniform(0.3, seconds))
            process.started.kill()
        if process.end() == 0:
            assert_same(trial.read(folder), wanted)
            ends += 1
        else:
            assert process.started.exitcode == -9, process.said()
            kills += 1
            assert trial.kept(folder) >= kept
    record(
        f"{name}: killed at {kills} random moments",
        "the same command goes on",
        f"{ends} runs ended, each equal to the straight one",
    )
