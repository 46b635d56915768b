"""Scoring rows gives each row its own answer, on one CPU by two calls at a time."""

import threading
from typing import Any

import jax
import numpy as np
import pytest
from support import abstract_tree, make_params, make_samples, random_rows, tiny_config

from pref_jax.data.batches import make_geometry
from pref_jax.evaluation.predict import Predictor
from pref_jax.mesh import make_mesh
from pref_jax.models.classifiers import PreferenceClassifier

ROWS = 60


@pytest.fixture(scope="module")
def samples() -> Any:
    return make_samples(random_rows(ROWS, 1, 32))


def make_predictor(devices: int) -> tuple[Predictor, Any]:
    model = PreferenceClassifier(
        tiny_config(), attention="segments" if devices == 1 else "xla", longest=32
    )
    mesh = make_mesh(devices, devices=jax.devices()[:devices])
    abstract = abstract_tree(model, 1, mesh)
    params = jax.tree.map(
        lambda leaf, place: jax.device_put(leaf, place.sharding), make_params(model, 1), abstract
    )
    geometry = make_geometry(32, 1, packing=True)
    return Predictor(model, mesh, geometry, microbatch_size=2, abstract_params=abstract), params


def test_two_calls_at_a_time_answer_as_eight_devices_do(samples, monkeypatch) -> None:
    numbers = np.random.default_rng(0).permutation(ROWS)
    many, params = make_predictor(8)
    expected = many.logits(params, samples, numbers)

    predictor, params = make_predictor(1)
    compiled, together = predictor.compile(), threading.Barrier(2)
    calls: list[int] = []

    def call(*arguments: Any) -> Any:
        calls.append(threading.get_ident())
        if len(calls) <= 2:
            together.wait(timeout=60)  # broken unless a second call comes meanwhile
        return compiled(*arguments)

    monkeypatch.setattr(predictor, "compile", lambda: call)
    done: list[int] = []
    found = predictor.logits(params, samples, numbers, report=done.append)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert len(np.unique(found[:, 0])) == ROWS
    assert sum(done) == ROWS and len(done) == len(calls) > 4
    assert len(set(calls)) == 2
    alone = predictor.logits(params, samples, numbers[7:8])
    np.testing.assert_allclose(alone[0], found[7], atol=1e-5)


def test_a_call_that_fails_ends_the_prediction(samples, monkeypatch) -> None:
    predictor, params = make_predictor(1)
    compiled = predictor.compile()
    calls: list[None] = []

    def call(*arguments: Any) -> Any:
        calls.append(None)
        if len(calls) == 3:
            raise MemoryError("no room")
        return compiled(*arguments)

    monkeypatch.setattr(predictor, "compile", lambda: call)
    with pytest.raises(MemoryError, match="no room"):
        predictor.logits(params, samples, np.arange(ROWS))
    assert len(calls) < 8  # what was waiting behind it is not begun
