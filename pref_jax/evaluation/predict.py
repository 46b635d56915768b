"""Scoring rows with a trained model."""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from pref_jax import mesh as meshes
from pref_jax.compilation import compile_program
from pref_jax.data.batches import Geometry, Samples, Update, prediction_batches, update_shapes
from pref_jax.errors import RunError
from pref_jax.evaluation.metrics import measure_row_losses
from pref_jax.training.step import abstract_update, make_predict_step

# Packed microbatches per call of the compiled function, on accelerators and on one CPU device.
_MICROBATCHES = 8
_CPU_MICROBATCHES = 1
# Calls that compute at the same time on one CPU device. XLA cuts only large operations of a program
# into pieces for several cores, and waits for the slowest piece; two programs fill two cores.
_CPU_CALLS = 2


class Predictor:
    """The compiled forward pass over packed rows: one compilation, whatever the rows.

    Attributes:
      compilations: programs that the function needed: 1, unless it was traced again.
      shapes: ``(K, B)`` of each bucket.
    """

    def __init__(
        self,
        model: nn.Module,
        mesh: Mesh,
        geometry: Geometry,
        *,
        microbatch_size: int,
        abstract_params: Any,
        num_outputs: int = 3,
    ) -> None:
        self._model, self._num_outputs = model, num_outputs
        self._mesh, self._geometry, self._abstract_params = mesh, geometry, abstract_params
        one = update_shapes(geometry, 1, meshes.batch_shards(mesh), microbatch_size)
        one_cpu = meshes.is_one_cpu(mesh)
        microbatches = _CPU_MICROBATCHES if one_cpu else _MICROBATCHES
        self.shapes = tuple((microbatches, units) for _, units in one)
        self._calls = _CPU_CALLS if one_cpu else 1
        self.compilations = 0
        predict = make_predict_step(model)

        def counted(params: Any, update: Update) -> tuple[jax.Array, ...]:
            self.compilations += 1
            return predict(params, update)

        self._function = jax.jit(counted, out_shardings=meshes.replicated(mesh))
        self._compiled: Callable[[Any, Update], tuple[jax.Array, ...]] | None = None

    def compile(self) -> Any:
        """Compiles ahead of the first use; returns the executable."""
        if self._compiled is None:
            update = abstract_update(
                self.shapes,
                self._geometry,
                meshes.batch_sharding(self._mesh, 1),
                meshes.replicated(self._mesh),
            )
            self._compiled = compile_program(
                self._function, (self._abstract_params, update), ("predict", self._model)
            )
            self.compilations = self.compilations or 1  # where it was found compiled
        return self._compiled

    def run(
        self, params: Any, batches: Iterable[Update[np.ndarray]]
    ) -> Iterator[tuple[Update[np.ndarray], tuple[jax.Array, ...]]]:
        """Yields each packed batch with its logits, in order; one is packed while others compute.

        Args:
          params: parameters, placed as the predictor's abstract parameters say.
          batches: of the predictor's `shapes`.
        """
        compiled = self.compile()
        under_way: collections.deque[tuple[Update[np.ndarray], Future]] = collections.deque()

        def call(update: Update[np.ndarray]) -> tuple[jax.Array, ...]:
            outputs = compiled(params, place_update(update, self._mesh))
            # A single thread only dispatches, so that an accelerator finds the next call waiting.
            return outputs if self._calls == 1 else jax.block_until_ready(outputs)

        def take() -> tuple[Update[np.ndarray], tuple[jax.Array, ...]]:
            update, outputs = under_way.popleft()
            return update, outputs.result()

        pool = ThreadPoolExecutor(self._calls)
        try:
            for update in batches:
                under_way.append((update, pool.submit(call, update)))
                if len(under_way) > self._calls:
                    yield take()
            while under_way:
                yield take()
        finally:  # one who stops here waits for what is computed, not for what is not begun
            pool.shutdown(cancel_futures=True)

    def logits(
        self,
        params: Any,
        samples: Samples,
        numbers: np.ndarray,
        *,
        report: Callable[[int], None] | None = None,
        finite: bool = True,
    ) -> np.ndarray:
        """Float32 logits ``[n, outputs]`` of the samples numbered ``numbers``, in that order.

        Args:
          params: parameters, placed as the predictor's abstract parameters say.
          samples: where the rows come from.
          numbers: which of them.
          report: is told how many more rows are done.
          finite: whether a row whose logits are not finite is an error.

        Raises:
          RunError: there is such a row.
        """
        numbers = np.asarray(numbers)
        place = np.full(len(samples.labels), -1, np.int64)
        place[numbers] = np.arange(len(numbers))
        result = np.full((len(numbers), self._num_outputs), np.nan, np.float32)
        batches = prediction_batches(
            samples, numbers, self._geometry, self.shapes, meshes.held(self._mesh, self.shapes)
        )
        for update, outputs in self.run(params, batches):
            done = 0
            for packed, logits in zip(update.buckets, outputs, strict=True):
                filled = packed.samples >= 0
                result[place[packed.samples[filled]]] = np.asarray(logits)[filled]
                done += int(filled.sum())
            if report is not None:
                report(done)
        broken = ~np.isfinite(result).all(axis=1)
        if finite and broken.any():
            raise RunError(
                "the model",
                f"{int(broken.sum())} of {len(numbers)} rows have logits that are not finite",
                "train it again with a lower train.learning_rate, or train.precision=float32",
            )
        return result


def place_update(update: Update[np.ndarray], mesh: Mesh) -> Update[jax.Array]:
    """Puts a packed update onto the devices, units cut over the batch axes."""
    units, scalar = meshes.batch_sharding(mesh, 1), meshes.replicated(mesh)
    buckets = jax.tree.map(lambda array: meshes.place(array, units), update.buckets)
    return Update(buckets, *(meshes.place(np.asarray(value), scalar) for value in update[1:]))


def to_probabilities(
    logits: np.ndarray, *, temperature: float = 1.0, tie_allowed: np.ndarray | None = None
) -> np.ndarray:
    """Softmax in float64.

    Args:
      logits: ``[n, 3]``.
      temperature: divides the logits.
      tie_allowed: bool ``[n]``; where false the tie gets (next to) nothing. None: everywhere.
    """
    scaled = np.asarray(logits, np.float64) / temperature
    if tie_allowed is not None:
        scaled[~np.asarray(tie_allowed), 2] = -1e30
    scaled -= scaled.max(axis=1, keepdims=True)
    weights = np.exp(scaled)
    return weights / weights.sum(axis=1, keepdims=True)


def fit_temperature(logits: np.ndarray, labels: np.ndarray, tie_allowed: np.ndarray) -> float:
    """The temperature with the least log loss on labelled rows (Guo et al. 2017, section 4.2)."""
    from scipy.optimize import minimize_scalar

    def loss(log_temperature: float) -> float:
        probabilities = to_probabilities(
            logits, temperature=float(np.exp(log_temperature)), tie_allowed=tie_allowed
        )
        return float(measure_row_losses(probabilities, labels).mean())

    return float(np.exp(minimize_scalar(loss, bounds=(-2.5, 2.5), method="bounded").x))


def calibrate(
    logits: np.ndarray, labels: np.ndarray, tie_allowed: np.ndarray
) -> tuple[float, np.ndarray]:
    """The temperature for other rows, and probabilities ``[n, 3]`` to judge it by.

    The temperature is fitted to all rows, the probabilities of every second row by that of the
    others: rows that a temperature was fitted to would flatter it.
    """
    probabilities = np.zeros(np.shape(logits))
    for first in range(2):
        half, others = slice(first, None, 2), slice(1 - first, None, 2)
        known = others if len(labels) > 1 else slice(None)
        temperature = fit_temperature(logits[known], labels[known], tie_allowed[known])
        probabilities[half] = to_probabilities(
            logits[half], temperature=temperature, tie_allowed=tie_allowed[half]
        )
    return fit_temperature(logits, labels, tie_allowed), probabilities
