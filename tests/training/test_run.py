"""How many updates a run has."""

from pathlib import Path

import jax
import numpy as np
import pytest
from rig import make_rows, nothing_of_the_users, train, write_csv

from pref_jax.config import default_config
from pref_jax.errors import InputError
from pref_jax.experiment import load_run
from pref_jax.training.run import count_steps


@pytest.mark.parametrize(
    ("epochs", "max_steps", "expected"),
    [(3.0, None, 30), (0.5, None, 5), (0.3, None, 3), (0.01, None, 1), (3.0, 7, 7), (0.5, 7, 5)],
)
def test_the_smaller_of_epochs_and_steps(epochs, max_steps, expected) -> None:
    config = default_config()
    config.train.epochs, config.train.max_steps = epochs, max_steps
    assert count_steps(config, steps_per_epoch=10) == expected


@pytest.mark.parametrize("epochs", [1e300, 3e9])
def test_more_updates_than_can_be_counted_are_refused(epochs: float) -> None:
    config = default_config()
    config.train.epochs = epochs
    with pytest.raises(InputError, match=r"--config\.train\.epochs"):
        count_steps(config, steps_per_epoch=10)
    config.train.max_steps = 4
    assert count_steps(config, steps_per_epoch=10) == 4


def test_a_head_with_a_rate_of_zero_stays_as_it_was(tmp_path: Path) -> None:
    """Zero is a rate, not the absence of one."""
    rows = write_csv(tmp_path / "rows.csv", make_rows(), labels=True)
    heads = []
    with nothing_of_the_users(tmp_path / "cache"):
        for steps in (1, 2):
            run = tmp_path / f"after{steps}"
            train(
                run,
                *(f"--config.data.train={rows}", "--config.train.head_learning_rate=0"),
                *("--config.train.learning_rate=1e-2", "--config.train.warmup_steps=0"),
                *("--config.train.schedule=constant", f"--config.train.max_steps={steps}"),
                *("--config.train.epochs=9", "--config.eval.every_steps=100"),
            )
            heads.append(load_run(run).params)
    for part, moves in (("head", False), ("encoder", True)):
        pairs = zip(*(jax.tree.leaves(params[part]) for params in heads), strict=True)
        moved = [np.abs(np.asarray(a) - np.asarray(b)).max() > 0 for a, b in pairs]
        assert any(moved) == moves, part
