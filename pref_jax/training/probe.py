"""A head that is fitted before the network below it is trained.

Fine-tuning from a random head first bends what pretraining has learned towards noise, and a few
hundred updates at an encoder's rate are too few for a head to use a feature of its own, such as a
length. So the head is fitted on frozen states, and training starts there: linear probing, then
fine-tuning (Kumar et al. 2022, arXiv 2202.10054).
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

_ROWS = 8_000  # as many at most: a head has a few thousand weights
_FOLDS = 3
# Of the mean loss, for weights that see features of variance 1.
_PENALTIES = (30.0, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01)
# Where a fit ends: norm of the gradient for features of variance 1; the loss is then right to 1e-4.
_GRADIENT = 1e-2


class _Head(nn.Module):
    """The head alone, its parameters where the whole model has them."""

    kind: str
    num_classes: int
    use_bias: bool

    @nn.compact
    def __call__(self, states_BxRxSxD: jax.Array, lengths_BxRx2: jax.Array | None) -> jax.Array:
        return apply_head(
            self.kind,
            states_BxRxSxD,
            lengths_BxRx2,
            None,
            dropout_rate=0.0,
            site=0,
            num_classes=self.num_classes,
            use_bias=self.use_bias,
        )


def fit_head(
    experiment: Experiment, params: Any, samples: Samples, numbers: np.ndarray, groups: np.ndarray
) -> Any:
    """Fits the head by the run's own loss, on the states that the network has now.

    The square of its weights is penalised by as much as is best for rows of prompts that were left
    out; of more than 8,000 rows a part is used.

    Args:
      experiment: says what the head is and what it learns.
      params: all parameters, placed on the mesh.
      samples: labelled rows.
      numbers: which of them train.
      groups: of their prompts, ``[len(numbers)]``.

    Returns:
      ``params`` with another head.
    """
    if len(numbers) > _ROWS:
        chosen = np.random.default_rng(experiment.config.seed).choice(
            len(numbers), _ROWS, replace=False
        )
        numbers, groups = numbers[np.sort(chosen)], groups[np.sort(chosen)]
    predictor = experiment.make_predictor(states=True)
    states = predictor.logits(params, samples, numbers)
    # In float64, on the host: states have a large mean, along which float32 sees no descent.
    with jax.default_device(jax.local_devices(backend="cpu")[0]), jax.enable_x64(True):
        fitter = _Fitter(experiment, params["head"], states, samples, numbers)
        penalty = fitter.choose_penalty(groups)
        weights = fitter.fit(np.ones(len(numbers)), penalty)
        loss = fitter.measure(weights, np.ones(len(numbers)))
        head = fitter.unravel(weights)
    logger.info(
        "fitted the head to %d rows: loss %.4f with a penalty of %g", len(numbers), loss, penalty
    )
    return {**params, "head": jax.tree.map(_place_like, head, params["head"])}


class _Fitter:
    """Penalised fits of one head to the same states."""

    def __init__(
        self,
        experiment: Experiment,
        head: Any,
        states: np.ndarray,
        samples: Samples,
        numbers: np.ndarray,
    ) -> None:
        """Takes states ``[n, S * D]`` of the samples ``numbers``, and the head before."""
        self._start, self._unravel = ravel_pytree(
            jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), head)
        )
        module = _Head(experiment.head, experiment.num_outputs, not experiment.is_decoder)
        by_side = states.astype(np.float64).reshape(1, len(numbers), experiment.sides, -1)
        # One variance for all: directions in which states differ little count little.
        scale = float(by_side.var(axis=1).mean())
        lengths = None
        if experiment.config.model.length_features and not experiment.is_decoder:
            lengths = jnp.array([[samples.text_lengths(number) for number in numbers]])
        labelled: Any = types.SimpleNamespace(  # of packed rows, what a task reads
            labels=jnp.asarray(samples.labels[numbers])[None],
            tie_allowed=jnp.asarray(samples.tie_allowed[numbers])[None],
            teachers=_teachers(samples, numbers),
        )

        def loss(
            flat: jax.Array, states: jax.Array, weights: jax.Array, penalty: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            params = self._unravel(flat)
            logits: Any = module.apply({"params": {"head": params}}, states, lengths)
            losses, _ = experiment.task(logits, labelled)
            mean = (losses[0] * weights).sum() / weights.sum()
            kernels = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim > 1]
            squares = sum(jnp.sum(kernel * kernel) for kernel in kernels)
            return mean + 0.5 * penalty * scale * squares, mean

        self._deviation = scale**0.5
        self._states = jnp.asarray(by_side)
        self._loss = jax.jit(jax.value_and_grad(loss, has_aux=True))

        def curvature(flat: jax.Array, along: jax.Array, *rest: jax.Array) -> jax.Array:
            gradient = jax.grad(lambda flat: loss(flat, *rest)[0])
            return jax.jvp(gradient, (flat,), (along,))[1]

        self._curvature = jax.jit(curvature)

    def fit(
        self, weights: np.ndarray, penalty: float, start: np.ndarray | None = None
    ) -> np.ndarray:
        """Flat parameters for rows of these weights; sooner where ``start`` is near."""
        from scipy.optimize import minimize

        def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
            (value, _), gradient = self._loss(flat, self._states, weights, penalty)
            return float(value), np.asarray(gradient)

        def curvature(flat: np.ndarray, along: np.ndarray) -> np.ndarray:
            return np.asarray(self._curvature(flat, along, self._states, weights, penalty))

        return minimize(
            objective,
            np.asarray(self._start) if start is None else start,
            jac=True,
            hessp=curvature,
            method="trust-ncg",  # a few large curvatures, along the mean, do not slow it down
            options={"gtol": _GRADIENT * self._deviation},
        ).x

    def measure(self, flat: np.ndarray, weights: np.ndarray) -> float:
        """Mean loss of rows of these weights, in nats."""
        (_, mean), _ = self._loss(flat, self._states, weights, 0.0)
        return float(mean)

    def choose_penalty(self, groups: np.ndarray) -> float:
        """The penalty with the least loss on rows whose groups were left out."""
        _, names = np.unique(groups, return_inverse=True)
        folds = min(_FOLDS, int(names.max()) + 1)
        if folds < 2:
            return _PENALTIES[0]
        place = np.random.default_rng(0).permutation(names.max() + 1)[names] % folds
        found: list[np.ndarray | None] = [None] * folds
        least = np.inf
        # From the largest on, each from where the last one ended: small ones take long, and behind
        # the best one all are worse.
        for number, penalty in enumerate(_PENALTIES):
            loss = 0.0
            for fold in range(folds):
                left_out = (place == fold).astype(float)
                flat = self.fit(1.0 - left_out, penalty, found[fold])
                loss += self.measure(flat, left_out) * left_out.sum() / len(place)
                found[fold] = flat
            if loss >= least:
                return _PENALTIES[number - 1]
            least = loss
        return _PENALTIES[-1]

    def unravel(self, flat: np.ndarray) -> Any:
        """Parameters of the head from flat ones."""
        return jax.tree.map(np.asarray, self._unravel(jnp.asarray(flat)))


def _place_like(new: np.ndarray, old: Any) -> jax.Array:
    return meshes.place(new.astype(old.dtype), old.sharding)


def _teachers(samples: Samples, numbers: np.ndarray) -> jax.Array | None:
    found = [row for number in numbers if (row := samples.teacher(int(number))) is not None]
    return jnp.asarray(np.stack(found))[None] if found else None
