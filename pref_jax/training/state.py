"""What training changes, and what it does not."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct, traverse_util
from jax.sharding import NamedSharding

from pref_jax.models.llama import FROZEN_LAYERS
from pref_jax.training.precision import LossScale


class TrainState(struct.PyTreeNode):
    """Everything that a resumed run needs.

    Attributes:
      step: int32 scalar, updates done.
      params: trainable parameters, a nested dict; frozen ones are no part of the state.
      opt_state: the optimizer's state.
      loss_scale: None unless the precision is float16.
      average: moving average of ``params``, the weights that are judged and kept for use; None
        where there is none.
    """

    step: Any  # jax.Array, or like all other leaves jax.ShapeDtypeStruct in an abstract state
    params: Any
    opt_state: Any
    loss_scale: LossScale | None
    average: Any = None

    @property
    def judged(self) -> Any:
        """The trainable parameters that an evaluation takes."""
        return self.params if self.average is None else self.average


def split_parameters(params: Any, is_trainable: Callable[[str], bool]) -> tuple[Any, Any]:
    """Splits a nested dict by path (``encoder/layer_0/...``) into trainable and frozen."""
    flat = traverse_util.flatten_dict(params, sep="/")
    parts: tuple[dict, dict] = ({}, {})
    for path, leaf in flat.items():
        parts[0 if is_trainable(path) else 1][path] = leaf
    trainable, frozen = (traverse_util.unflatten_dict(part, sep="/") for part in parts)
    return trainable, frozen


def merge_parameters(trainable: Any, frozen: Any) -> Any:
    """The inverse of `split_parameters`."""
    flat = traverse_util.flatten_dict(frozen) | traverse_util.flatten_dict(trainable)
    return traverse_util.unflatten_dict(flat)


def is_adapter(path: str) -> bool:
    """Paths that train beside a frozen base: the adapters and the head."""
    return path.startswith(("lora/", "head/"))


def trainable_above(frozen_layers: int) -> Callable[[str], bool]:
    """Paths outside the first ``frozen_layers`` layers; the embeddings train."""
    layers = (f"encoder/layer_{layer}/" for layer in range(frozen_layers))
    frozen = (f"decoder/{FROZEN_LAYERS}/", *layers)
    return lambda path: not path.startswith(frozen)


def abstract_state(
    params: Any,
    optimizer: optax.GradientTransformation,
    *,
    loss_scaling: bool,
    averaging: bool = False,
    scalar_sharding: NamedSharding,
) -> TrainState:
    """Shapes and shardings of the state over abstract trainable parameters.

    Moments lie where their parameters lie.
    """

    def scalar(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=scalar_sharding)

    opt_state = jax.eval_shape(optimizer.init, params)
    opt_state = optax.tree.map_params(
        optimizer,
        lambda leaf, param: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=param.sharding),
        opt_state,
        params,
        transform_non_params=scalar,
    )
    loss_scale = jax.eval_shape(LossScale.create) if loss_scaling else None
    return TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32, sharding=scalar_sharding),
        params=params,
        opt_state=opt_state,
        loss_scale=jax.tree.map(scalar, loss_scale),
        average=params if averaging else None,
    )


def make_create_state(optimizer: optax.GradientTransformation, abstract: TrainState) -> Any:
    """The jitted function from trainable parameters to the state before the first update.

    Args:
      optimizer: whose state is created.
      abstract: shapes and shardings of the state.
    """

    def create(params: Any) -> TrainState:
        return TrainState(
            step=jnp.int32(0),
            params=params,
            opt_state=optimizer.init(params),
            loss_scale=None if abstract.loss_scale is None else LossScale.create(),
            average=None if abstract.average is None else jax.tree.map(jnp.copy, params),
        )

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(create, out_shardings=shardings)
