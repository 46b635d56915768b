"""Losses of both tasks are torch's."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pref_jax.training.tasks import make_distillation_task, make_rating_task, preference_task

torch = pytest.importorskip("torch")


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).standard_normal(shape).astype(np.float32) * 2


def packed(**fields: Any) -> Any:
    return SimpleNamespace(**{name: jnp.asarray(value) for name, value in fields.items()})


def test_preferences_leave_out_a_tie_that_could_not_be_called() -> None:
    logits, labels = draw(1, 6, 3), np.array([[0, 1, 2, 0, 1, 1]])
    allowed = np.array([[True, True, True, False, False, True]])
    losses, correct = preference_task(logits, packed(labels=labels, tie_allowed=allowed))
    for row in range(6):
        classes = 3 if allowed[0, row] else 2
        theirs = torch.nn.functional.cross_entropy(
            torch.tensor(logits[0, row, :classes]), torch.tensor(labels[0, row])
        )
        assert float(losses[0, row]) == pytest.approx(float(theirs), rel=1e-5)
    np.testing.assert_array_equal(correct, logits.argmax(-1) == labels)


def test_ratings_are_the_mean_of_the_cross_entropies_that_there_are() -> None:
    heads, classes = 5, 4
    logits = draw(2, 3, heads * classes)
    labels = np.random.default_rng(1).integers(0, classes, (2, 3, heads))
    labels[0, 0, 2] = labels[1, 1, :4] = labels[1, 2] = -1
    task = make_rating_task(heads)

    def total(logits: jax.Array) -> jax.Array:
        return task(logits, packed(labels=labels))[0].sum()

    losses, correct = task(jnp.asarray(logits), packed(labels=labels))
    theirs = torch.tensor(logits, requires_grad=True)
    sums = []
    for unit in range(2):
        for row in range(3):
            given = labels[unit, row] >= 0
            if not given.any():
                assert float(losses[unit, row]) == 0 == float(correct[unit, row])
                continue
            loss = torch.nn.functional.cross_entropy(
                theirs[unit, row].reshape(heads, classes),
                torch.tensor(labels[unit, row]),
                ignore_index=-1,
            )
            assert float(losses[unit, row]) == pytest.approx(float(loss), rel=1e-5)
            hits = logits[unit, row].reshape(heads, classes).argmax(-1) == labels[unit, row]
            assert float(correct[unit, row]) == pytest.approx(hits[given].mean())
            sums.append(loss)
    torch.stack(sums).sum().backward()
    gradient = np.asarray(jax.grad(total)(jnp.asarray(logits)))
    np.testing.assert_allclose(gradient, theirs.grad.numpy(), atol=1e-6)
    by_head = gradient.reshape(2, 3, heads, classes)
    assert not by_head[labels < 0].any() and np.abs(by_head[labels >= 0]).max() > 0.01


def test_a_teacher_shares_the_loss_with_the_label() -> None:
    logits, labels = draw(1, 6, 3), np.array([[0, 1, 2, 0, 1, 1]])
    allowed = np.array([[True, True, True, False, False, True]])
    teachers = np.random.default_rng(5).dirichlet(np.ones(3), (1, 6)).astype(np.float32)
    teachers[0, 5] = 0  # nothing is known of this row
    fields = packed(labels=labels, tie_allowed=allowed, teachers=teachers)
    losses, _ = make_distillation_task(0.3)(jnp.asarray(logits), fields)
    for row in range(6):
        classes = 3 if allowed[0, row] else 2
        given = torch.tensor(logits[0, row, :classes])
        theirs = torch.nn.functional.cross_entropy(given, torch.tensor(labels[0, row]))
        if row < 5:
            teacher = torch.tensor(teachers[0, row, :classes])
            soft = torch.nn.functional.cross_entropy(given, teacher / teacher.sum())
            theirs = 0.7 * theirs + 0.3 * soft
        assert float(losses[0, row]) == pytest.approx(float(theirs), rel=1e-5)
    gradient = jax.grad(lambda x: make_distillation_task(0.3)(x, fields)[0].sum())(
        jnp.asarray(logits)
    )
    assert np.isfinite(gradient).all()
