"""One arena and one trained run for all tests here; neither may be changed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from rig import TINY, UPDATES, call, finish, simulate, start


@pytest.fixture(scope="session", autouse=True)
def features_apart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Features are cached in a folder of this session; compiled programs where they always are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREF_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module", autouse=True)
def compiled_soon() -> Iterator[None]:
    """Tiny models run a few updates: here a fast compiler is worth more than a fast program.

    What is compared with other programs and other machines, in the other folders, is compiled as
    for users.
    """
    import jax

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # processes of their own
        before = jax.config.read("jax_disable_most_optimizations")
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 300 simulated rows to train on and 60 to answer."""
    return simulate(tmp_path_factory.mktemp("arena"), rows=300, test_rows=60)


@pytest.fixture(scope="session")
def run_arguments(arena: Path) -> tuple[str, ...]:
    """The command that trained `run`, but for its workdir."""
    return (
        *TINY,
        f"--config.data.train={arena}/train.csv",
        "--config.train.epochs=5",
        f"--config.train.max_steps={UPDATES}",
        "--config.train.learning_rate=1e-3",
        "--config.eval.every_steps=6",
        "--config.checkpoint.every_steps=3",
    )


@pytest.fixture(scope="session")
def run(run_arguments: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of a tiny model, trained on one device by a process that nobody disturbed."""
    folder = tmp_path_factory.mktemp("runs")
    workdir, log = folder / "run", folder / "log"
    finish(start(log, "train", *run_arguments, f"--workdir={workdir}"), log)
    return workdir


@pytest.fixture(scope="session")
def exported(run: Path) -> Path:
    """The export of `run`."""
    folder = run.parent / "exported"
    outcome = call("export", f"--workdir={run}", f"--output={folder}")
    assert outcome.code == 0, outcome
    return folder
