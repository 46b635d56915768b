"""A head that knows from the start what lengths tell.

A head that is told lengths has one weight for each, and a few hundred updates at an encoder's rate
move a weight by a hundredth: the lengths stay unused, though alone they are worth more than what so
short a training gets out of the texts. So the weights of the lengths and the biases are fitted
before the first update, by the run's own loss, as if texts told nothing.
"""

import logging
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.flatten_util import ravel_pytree

from pref_jax import mesh as meshes
from pref_jax.data.batches import Samples
from pref_jax.experiment import Experiment
from pref_jax.models.heads import apply_head

logger = logging.getLogger(__name__)

# Of half the squares, beside the sum of the rows' losses: one row's worth, scikit-learn's C = 1. On
# thousands of rows it does nothing, on a dozen it keeps the head from learning them by heart.
_PENALTY = 1.0


class _LengthsHead(nn.Module):
    """The head of a network whose states have no dimensions."""

    kind: str

    @nn.compact
    def __call__(self, states_BxRxSx0: jax.Array, lengths_BxRx2: jax.Array) -> jax.Array:
        return apply_head(self.kind, states_BxRxSx0, lengths_BxRx2, None, dropout_rate=0.0, site=0)


def fit_lengths(experiment: Experiment, params: Any, samples: Samples, numbers: np.ndarray) -> Any:
    """Fits what the head knows of lengths, and its biases.

    Args:
      experiment: with `model.length_features`, that learns preferences.
      params: all parameters, placed on the mesh.
      samples: labelled rows.
      numbers: which of them train.

    Returns:
      ``params`` with these weights changed.
    """
    from scipy.optimize import minimize

    module = _LengthsHead(experiment.head)
    # In float64, on the host: an optimiser's line search sees no descent in float32.
    with jax.default_device(jax.local_devices(backend="cpu")[0]), jax.enable_x64(True):
        lengths = jnp.array([[samples.text_lengths(int(number)) for number in numbers]])
        states = jnp.zeros((1, len(numbers), experiment.sides, 0), jnp.float64)
        labelled: Any = types.SimpleNamespace(  # of packed rows, what a task reads
            labels=jnp.asarray(samples.labels[numbers])[None],
            tie_allowed=jnp.asarray(samples.tie_allowed[numbers])[None],
            teachers=_teachers(samples, numbers),
        )
        shapes = jax.eval_shape(module.init, jax.random.key(0), states, lengths)
        empty = jax.tree.map(lambda leaf: np.zeros(leaf.shape), nn.unbox(shapes)["params"])
        start, unravel = ravel_pytree(empty)

        @jax.jit
        @jax.value_and_grad
        def loss(flat: jax.Array) -> jax.Array:
            logits: Any = module.apply({"params": unravel(flat)}, states, lengths)
            losses, _ = experiment.task(logits, labelled)
            return losses.mean() + 0.5 * _PENALTY / len(numbers) * (flat * flat).sum()

        def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
            value, gradient = loss(flat)
            return float(value), np.asarray(gradient)

        found = minimize(objective, np.asarray(start), jac=True, method="L-BFGS-B")
        fitted = jax.tree.map(np.asarray, unravel(jnp.asarray(found.x)))
    logger.info("fitted the head to the lengths of %d rows: loss %.4f", len(numbers), found.fun)
    head = jax.tree.map(np.array, params["head"])
    _insert(head, fitted["head"], experiment.head)
    placed = jax.tree.map(_place_like, head, params["head"])
    return {**params, "head": placed}


def _insert(head: Any, fitted: Any, kind: str) -> None:
    """Writes the weights of lengths into the rows of a whole head that see them."""
    if kind == "scores":
        # Rows of the score: states, length. Of the tie: differences of both, sums of both, gap.
        width = len(head["score"]["kernel"]) - 1
        head["score"]["kernel"][width:] = fitted["score"]["kernel"]
        head["tie"]["kernel"][[width, 2 * width + 1, 2 * width + 2]] = fitted["tie"]["kernel"]
        for name in ("score", "tie"):
            head[name]["bias"][:] = fitted[name]["bias"]
        return
    rows = len(fitted["kernel"])
    head["kernel"][-rows:] = fitted["kernel"]
    head["bias"][:] = fitted["bias"]


def _place_like(new: np.ndarray, old: Any) -> jax.Array:
    return meshes.place(new.astype(old.dtype), old.sharding)


def _teachers(samples: Samples, numbers: np.ndarray) -> jax.Array | None:
    found = [row for number in numbers if (row := samples.teacher(int(number))) is not None]
    return jnp.asarray(np.stack(found))[None] if found else None
