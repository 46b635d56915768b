"""How many updates a run has."""

import pytest

from pref_jax.config import default_config
from pref_jax.errors import InputError
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
