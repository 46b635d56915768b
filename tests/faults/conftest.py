"""One arena and one straight run for all tests here, and the table of what happened.

``PREF_JAX_FAULTS=all`` strikes at every point instead of a sample, and writes the table at the end
of pytest's output.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faults.trials import Trial, list_points, make_train, run_straight
from rig import nothing_of_the_users, simulate

Record = Callable[[str, str, str], None]
_ROWS = pytest.StashKey[list[tuple[str, str, str]]]()


@pytest.fixture(scope="session")
def campaign() -> bool:
    """Whether everything is tried, not a sample."""
    return os.environ.get("PREF_JAX_FAULTS") == "all"


@pytest.fixture(scope="session", autouse=True)
def cache_apart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with nothing_of_the_users(tmp_path_factory.mktemp("cache")):
        yield


@pytest.fixture(scope="session")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 40 simulated rows to train on and 12 to answer."""
    return simulate(tmp_path_factory.mktemp("arena"), rows=40, test_rows=12)


@pytest.fixture(scope="session")
def training(arena: Path) -> Trial:
    return make_train(arena)


@pytest.fixture(scope="session")
def straight(training: Trial, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nobody disturbed; not to be changed."""
    folder = tmp_path_factory.mktemp("straight")
    run_straight(training, folder)
    return folder


@pytest.fixture(scope="session")
def training_points(
    training: Trial, straight: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[str]:
    """Every point of a straight run; the features are in the cache by then."""
    return list_points(training, tmp_path_factory.mktemp("points") / "run")


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Record:
    """Adds a line to the table: fault, what happened, what was kept."""
    rows = request.config.stash.setdefault(_ROWS, [])
    return lambda *cells: rows.append(cells)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    rows = terminalreporter.config.stash.get(_ROWS, [])
    if not rows or os.environ.get("PREF_JAX_FAULTS") != "all":
        return
    terminalreporter.write_sep("=", "faults")
    lines = ["| fault | what happened | what was kept |", "|---|---|---|"]
    lines += ["| " + " | ".join(cells) + " |" for cells in rows]
    terminalreporter.write_line("\n".join(lines))
