"""AdamW as Hugging Face's Trainer runs it, with learning rates per group of parameters."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

from pref_jax.models.llama import LAYERS

Schedule = Callable[[jax.Array], jax.Array]


def make_schedule(name: str, learning_rate: float, warmup_steps: int, total_steps: int) -> Schedule:
    """Learning rate of update number ``step`` (from 0).

    Warm-up is ``step / warmup_steps``; after it "linear" falls to zero at ``total_steps``, so the
    last update still moves (`transformers.get_linear_schedule_with_warmup`), "cosine" follows half
    a wave to the same end, "constant" stays.
    """

    def schedule(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        warm = step / max(1, warmup_steps)
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        rest = {
            "linear": 1.0 - progress,
            "cosine": 0.5 * (1.0 + jnp.cos(jnp.pi * progress)),
            "constant": jnp.ones_like(progress),
        }[name]
        return learning_rate * jnp.where(step < warmup_steps, warm, jnp.maximum(rest, 0.0))

    return schedule


def make_optimizer(
    schedule: Schedule,
    *,
    weight_decay: float,
    head_ratio: float = 1.0,
    layer_decay: float = 1.0,
    num_layers: int = 0,
) -> optax.GradientTransformation:
    """AdamW: betas 0.9 and 0.999, epsilon 1e-8, decoupled decay on matrices only.

    Biases and norm weights are not decayed. As in torch's parameter groups, a group's rate scales
    its decay too.

    Args:
      schedule: learning rate per update.
      weight_decay: decay per unit of learning rate.
      head_ratio: the head's rate over the rate of everything else.
      layer_decay: factor per layer from the top; the embeddings lie below layer 0.
      num_layers: layers of the encoder or decoder.
    """

    def scale(path: str, update: jax.Array) -> jax.Array:
        if path.startswith("head/"):
            return update if head_ratio == 1.0 else update * head_ratio
        if layer_decay == 1.0:
            return update
        if f"/{LAYERS}/" in path:  # all trained layers of a decoder in one array, the top one last
            depths = np.arange(len(update) - 1, -1, -1).reshape(-1, *(1,) * (update.ndim - 1))
            return update * np.asarray(layer_decay**depths, np.float32)
        found = re.search(r"layer_(\d+)/", path)
        depth = num_layers if found is None else num_layers - 1 - int(found[1])
        return update * layer_decay**depth

    def scale_groups(updates: Any, _: Any = None) -> Any:
        flat = traverse_util.flatten_dict(updates, sep="/")
        scaled = {path: scale(path, update) for path, update in flat.items()}
        return traverse_util.unflatten_dict(scaled, sep="/")

    return optax.chain(
        optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8),
        optax.add_decayed_weights(weight_decay, mask=is_decayed),
        optax.scale_by_learning_rate(schedule),
        optax.stateless(scale_groups),
    )


def is_decayed(params: Any) -> Any:
    """True for matrices and tables, False for biases and norm weights; the shape of ``params``."""
    flat = traverse_util.flatten_dict(params)
    return traverse_util.unflatten_dict({path: path[-1] not in ("bias", "scale") for path in flat})
