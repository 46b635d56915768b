"""What a model is trained for: the loss of a row, from logits and labels."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pref_jax.data.batches import Packed

# Losses in nats and share of right answers of each row, both ``[..., R]``, from the logits
# ``[..., R, outputs]`` of packed rows.
Task = Callable[[jax.Array, Packed], tuple[jax.Array, jax.Array]]

# Instead of minus infinity, whose gradient through log-softmax is NaN.
_IMPOSSIBLE = np.float32(-1e30)


def mask_tie(logits: jax.Array, tie_allowed: jax.Array) -> jax.Array:
    """Takes the tie away from rows whose judge could not call one.

    Args:
      logits: float32 ``[..., 3]``.
      tie_allowed: bool ``[...]``.
    """
    possible = jnp.stack([jnp.ones_like(tie_allowed), jnp.ones_like(tie_allowed), tie_allowed], -1)
    return jnp.where(possible, logits, _IMPOSSIBLE)


def preference_losses(logits: jax.Array, labels: jax.Array, tie_allowed: jax.Array) -> jax.Array:
    """Cross-entropy of each row in nats, ``[...]``."""
    return _cross_entropies(mask_tie(logits, tie_allowed), labels)


def preference_task(logits: jax.Array, packed: Packed) -> tuple[jax.Array, jax.Array]:
    """The `Task` of A, B or tie."""
    losses = preference_losses(logits, packed.labels, packed.tie_allowed)
    return losses, logits.argmax(axis=-1) == packed.labels


def make_distillation_task(weight: float) -> Task:
    """The `Task` of labels and a teacher's probabilities.

    A row's loss is ``(1 - weight)`` times the cross-entropy of its label and ``weight`` times that
    of the teacher's distribution, which differs from the Kullback-Leibler divergence by the
    teacher's entropy, a constant. A row without a teacher has its label's alone.

    Args:
      weight: of the teacher, 0 to 1.
    """

    def task(logits: jax.Array, packed: Packed) -> tuple[jax.Array, jax.Array]:
        losses, correct = preference_task(logits, packed)
        # Where no tie could be called the teacher's tie is no answer either.
        possible = jnp.stack([*[jnp.ones_like(packed.tie_allowed)] * 2, packed.tie_allowed], -1)
        teachers = jnp.where(possible, packed.teachers, 0.0)
        total = teachers.sum(axis=-1, keepdims=True)
        teachers /= jnp.where(total > 0, total, 1.0)
        log_probabilities = jax.nn.log_softmax(mask_tie(logits, packed.tie_allowed))
        soft = -jnp.sum(jnp.where(teachers > 0, teachers * log_probabilities, 0.0), axis=-1)
        mixed = (1.0 - weight) * losses + weight * soft
        return jnp.where(total[..., 0] > 0, mixed, losses), correct

    return task


def make_rating_task(num_ratings: int) -> Task:
    """The `Task` of several ratings of a response, one head each.

    A row's loss is the mean cross-entropy of the ratings that it has (of all twenty in the paper);
    a missing one, label -1, adds nothing and has no gradient.

    Args:
      num_ratings: heads; logits are ``[..., R, num_ratings * classes]``.
    """

    def task(logits: jax.Array, packed: Packed) -> tuple[jax.Array, jax.Array]:
        logits = logits.reshape(*logits.shape[:-1], num_ratings, -1)
        given = packed.labels >= 0
        count = jnp.maximum(given.sum(axis=-1), 1)
        losses = _cross_entropies(logits, jnp.maximum(packed.labels, 0))
        correct = logits.argmax(axis=-1) == packed.labels
        return (
            jnp.where(given, losses, 0.0).sum(axis=-1) / count,
            (correct & given).sum(axis=-1) / count,
        )

    return task


def _cross_entropies(logits: jax.Array, labels: jax.Array) -> jax.Array:
    log_probabilities = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(log_probabilities, labels[..., None], axis=-1)[..., 0]
