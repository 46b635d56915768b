"""Answers do not depend on how the weights lie on the devices that score."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from pref_jax import experiment
from pref_jax.data.arena import read_comparisons
from pref_jax.evaluation.commands import score


def test_weights_that_do_not_fit_a_device_are_cut_over_all(
    run: Path, arena: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = read_comparisons(arena / "test.csv", labelled=False)
    whole = experiment.load_run(run)
    held = whole.experiment.bytes_per_device(training=False)
    assert dict(whole.experiment.mesh.shape) == {"data": 8, "fsdp": 1, "tensor": 1}

    monkeypatch.setattr(experiment, "memory_of", lambda device: held)  # nothing left to work with
    cut = experiment.load_run(run)
    assert dict(cut.experiment.mesh.shape) == {"data": 1, "fsdp": 8, "tensor": 1}
    largest = max(jax.tree.leaves(cut.params), key=lambda leaf: leaf.size)
    assert largest.addressable_shards[0].data.size == largest.size // 8
    np.testing.assert_allclose(score(cut, rows), score(whole, rows), atol=1e-6)
