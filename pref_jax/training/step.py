"""The two compiled functions: one optimizer update, and logits of packed rows."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import traverse_util
from jax import lax

from pref_jax.data.batches import Packed, Update
from pref_jax.models.dropout import unit_seeds
from pref_jax.training.optimizer import Schedule
from pref_jax.training.state import TrainState, merge_parameters
from pref_jax.training.tasks import Task, preference_task

TrainStep = Callable[[TrainState, Any, Update], tuple[TrainState, dict[str, jax.Array]]]


# Where the word table lies in the parameters, see `make_gradient`.
_WORDS = ("encoder", "embeddings", "word", "embedding")


def apply_model(
    model: nn.Module,
    params: Any,
    packed: Packed,
    seeds: jax.Array | None,
    words: jax.Array | None = None,
) -> jax.Array:
    """Logits ``[B, R, classes]`` of packed units ``[B, ...]``.

    Adapters are the entry "lora" of the parameters, and a Flax collection of their own.
    """
    variables = {"params": {name: tree for name, tree in params.items() if name != "lora"}}
    if "lora" in params:
        variables["lora"] = params["lora"]
    logits: Any = model.apply(  # Flax does not know what a module returns
        variables,
        packed.input_ids,
        packed.token_types,
        packed.positions,
        packed.segment_ids,
        packed.pool_positions,
        packed.text_lengths,
        seeds,
        words,
    )
    return logits


def _microbatch(packed: Packed, number: jax.Array | int) -> Packed:
    return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, number, keepdims=False), packed)


def make_gradient(
    model: nn.Module, task: Task = preference_task
) -> Callable[..., tuple[Any, dict[str, jax.Array]]]:
    """Makes the function that sums loss and gradient over an update's microbatches.

    The number of microbatches is data: the gradient is taken inside the loop's body, so the loop
    may have a dynamic bound, and updates of any size run the same program.

    The word table is half of a small encoder, and a microbatch touches few of its rows. So where
    the table trains, the gradient is taken for the rows looked up and added to the sum in place; a
    gradient of the whole table, zeros and all, would be written and read back in every microbatch.

    Returns:
      ``gradient(trainable, frozen, update, step, scale) -> (gradients, sums)``: gradients of
      ``scale`` times the mean loss over the update's rows; ``loss`` (unscaled mean) and
      ``accuracy``.
    """

    def gradient(
        trainable: Any, frozen: Any, update: Update, step: jax.Array, scale: jax.Array
    ) -> tuple[Any, dict[str, jax.Array]]:
        rest = traverse_util.flatten_dict(trainable)
        table = rest.pop(_WORDS, None)

        def loss_of(
            rest: Any, words: jax.Array | None, packed: Packed
        ) -> tuple[jax.Array, dict[str, jax.Array]]:
            seeds = unit_seeds(update.seed, step, packed.unit_ids)
            params = merge_parameters(traverse_util.unflatten_dict(rest), frozen)
            logits = apply_model(model, params, packed, seeds, words)
            losses, correct = task(logits, packed)
            weights = packed.weights / update.total_weight
            loss = jnp.sum(losses * weights)
            return loss * scale, {"loss": loss, "accuracy": jnp.sum(correct * weights)}

        def add_microbatch(number: jax.Array, sums: tuple, packed: Packed) -> tuple:
            micro = _microbatch(packed, number)
            words = None if table is None else table.at[micro.input_ids].get(mode="clip")
            (_, values), (gradients, of_words) = jax.value_and_grad(
                loss_of, argnums=(0, 1), has_aux=True
            )(rest, words, micro)
            sum_of_rest, sum_of_table, sum_of_values = sums
            if sum_of_table is not None:
                of_words = of_words.astype(jnp.float32)
                sum_of_table = sum_of_table.at[micro.input_ids].add(of_words)
            return (
                jax.tree.map(jnp.add, sum_of_rest, gradients),
                sum_of_table,
                jax.tree.map(jnp.add, sum_of_values, values),
            )

        zero = jnp.float32(0.0)
        sums = (
            jax.tree.map(jnp.zeros_like, rest),
            None if table is None else jnp.zeros_like(table),
            {"loss": zero, "accuracy": zero},
        )
        for bucket, packed in enumerate(update.buckets):
            sums = lax.fori_loop(
                0,
                update.num_microbatches[bucket],
                lambda number, sums, packed=packed: add_microbatch(number, sums, packed),
                sums,
            )
        gradients, of_table, values = sums
        if of_table is not None:
            gradients = {**gradients, _WORDS: of_table}
        return traverse_util.unflatten_dict(gradients), values

    return gradient


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    *,
    clip_norm: float,
    average_decay: float = 0.0,
    task: Task = preference_task,
) -> TrainStep:
    """Makes the function of one optimizer update, to be jitted by the caller.

    A state with an average keeps ``average = decay * average + (1 - decay) * params``.

    With a loss scale an update with non-finite gradients changes nothing but the scale.

    Returns:
      ``step(state, frozen, update) -> (state, metrics)`` with scalars ``loss``, ``accuracy``,
      ``learning_rate``, ``gradient_norm`` (before clipping) and with a loss scale ``loss_scale``.
    """
    gradient = make_gradient(model, task)

    def step(
        state: TrainState, frozen: Any, update: Update
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        scale = jnp.float32(1.0) if state.loss_scale is None else state.loss_scale.scale
        gradients, metrics = gradient(state.params, frozen, update, state.step, scale)
        norm = optax.global_norm(gradients) / scale
        # The factor of torch.nn.utils.clip_grad_norm_, its epsilon included.
        clip = jnp.minimum(1.0, clip_norm / (norm + 1e-6)) / scale if clip_norm else 1.0 / scale
        gradients = jax.tree.map(lambda leaf: leaf * clip, gradients)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = metrics | {"learning_rate": schedule(state.step), "gradient_norm": norm}
        loss_scale = state.loss_scale
        if loss_scale is not None:
            finite = jnp.isfinite(norm)
            params, opt_state = jax.tree.map(
                lambda new, old: jnp.where(finite, new, old),
                (params, opt_state),
                (state.params, state.opt_state),
            )
            metrics["loss_scale"] = loss_scale.scale
            loss_scale = loss_scale.adjust(finite)
        average = state.average
        if average is not None:
            # Early on the average is over fewer updates, else the start would stay in it.
            count = state.step.astype(jnp.float32)
            decay = jnp.minimum(average_decay, (1.0 + count) / (10.0 + count))
            average = jax.tree.map(
                lambda mean, leaf: mean + (1.0 - decay) * (leaf - mean), average, params
            )
        return TrainState(state.step + 1, params, opt_state, loss_scale, average), metrics

    return step


def make_predict_step(model: nn.Module) -> Callable[[Any, Update], tuple[jax.Array, ...]]:
    """Makes the function that scores packed rows without dropout, to be jitted by the caller.

    Returns:
      ``predict(params, update) -> per bucket float32 logits [K, B, R, classes]``; microbatches that
      are not in use stay zero and cost nothing.
    """

    def predict(params: Any, update: Update) -> tuple[jax.Array, ...]:
        results = []
        for bucket, packed in enumerate(update.buckets):
            shape = jax.eval_shape(
                lambda packed: apply_model(model, params, _microbatch(packed, 0), None), packed
            )

            def score(number: jax.Array, logits: jax.Array, packed: Packed = packed) -> jax.Array:
                part = apply_model(model, params, _microbatch(packed, number), None)
                return lax.dynamic_update_index_in_dim(logits, part, number, 0)

            logits = jnp.zeros((packed.unit_ids.shape[0], *shape.shape), jnp.float32)
            results.append(lax.fori_loop(0, update.num_microbatches[bucket], score, logits))
        return tuple(results)

    return predict


def abstract_update(
    shapes: tuple[tuple[int, int], ...], geometry: Any, unit_sharding: Any, scalar_sharding: Any
) -> Update[jax.ShapeDtypeStruct]:
    """Shapes and shardings of an update, for compiling before there is data."""
    from pref_jax.data.batches import allocate

    def describe(array: np.ndarray) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=unit_sharding)

    buckets = tuple(
        jax.tree.map(describe, allocate(shape, geometry, bucket))
        for bucket, shape in enumerate(shapes)
    )
    scalar = scalar_sharding
    return Update(
        buckets,
        jax.ShapeDtypeStruct((len(buckets),), np.int32, sharding=scalar),
        jax.ShapeDtypeStruct((), np.float32, sharding=scalar),
        jax.ShapeDtypeStruct((), np.uint32, sharding=scalar),
    )
