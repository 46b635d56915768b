"""Heads: from the pooled states of a row's sequences to logits of (A wins, B wins, tie)."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from pref_jax.models.dropout import dropout
from pref_jax.models.layers import Dense

# "linear" is the paper's; the other two are symmetric, see `apply_head`.
HEADS = ("linear", "orders", "scores")

# What the columns of a row in the other order are in its own: A and B are exchanged.
_EXCHANGED = (1, 0, 2)
# Lengths are centred here, so that new weights see numbers of the size of a hidden state.
_USUAL_LENGTH = 128


def apply_head(
    kind: str,
    pooled_BxRxSxD: jax.Array,
    text_lengths_BxRx2: jax.Array | None,
    seeds: jax.Array | None,
    *,
    dropout_rate: float,
    site: int,
    num_classes: int = 3,
    use_bias: bool = True,
) -> jax.Array:
    """Logits ``[B, R, num_classes]``, float32 or more; to be called inside a compact module.

    Args:
      kind: "linear": one linear layer on the concatenated states. "orders": the two sequences of a
        row are A before B and B before A; one linear layer on each, the second's logits turned
        back, the mean of both. "scores": the two sequences are one response each; `ScoresHead`.
        With the last two, exchanging A and B exchanges the first two logits by construction.
      pooled_BxRxSxD: states of the S sequences of each row.
      text_lengths_BxRx2: tokens of A and B before anything was cut; None: the head is not told.
      seeds: uint32 ``[B, 2]`` switches dropout on.
      dropout_rate: of the states.
      site: number of this dropout, beyond those of the layers below.
      num_classes: width of the linear layer.
      use_bias: whether it has a bias.
    """
    dtype = jnp.promote_types(pooled_BxRxSxD.dtype, jnp.float32)
    states = dropout(pooled_BxRxSxD.astype(dtype), dropout_rate, seeds, site)
    lengths_BxRx2 = None
    if text_lengths_BxRx2 is not None:
        logarithms = jnp.log1p(text_lengths_BxRx2.astype(dtype))
        lengths_BxRx2 = logarithms - jnp.log1p(float(_USUAL_LENGTH))
    if kind == "scores":
        return ScoresHead(name="head")(states, lengths_BxRx2)

    linear = Dense(num_classes, (None, None), dtype, use_bias=use_bias, name="head")
    if kind == "linear":
        features = states.reshape(*states.shape[:2], -1)
        if lengths_BxRx2 is not None:
            features = _append_lengths(features, lengths_BxRx2)
        return linear(features)
    if lengths_BxRx2 is not None:
        orders = jnp.stack([lengths_BxRx2, lengths_BxRx2[..., ::-1]], axis=2)
        states = _append_lengths(states, orders)
    logits_BxRx2xC = linear(states)
    return (logits_BxRx2xC[:, :, 0] + logits_BxRx2xC[:, :, 1, jnp.array(_EXCHANGED)]) / 2.0


class ScoresHead(nn.Module):
    """A score of each response by one shared layer, and a tie from what has no order.

    The logit of a response is its own score (Bradley and Terry 1952, with a tie beside it as in
    Davidson 1970). The tie's comes from the absolute difference and the sum of the two states and
    of the two lengths, and from the distance of the scores: all of these are the same for (A, B)
    as for (B, A).
    """

    @nn.compact
    def __call__(self, states_BxRx2xD: jax.Array, lengths_BxRx2: jax.Array | None) -> jax.Array:
        """Logits ``[B, R, 3]``."""
        if lengths_BxRx2 is not None:
            states_BxRx2xD = jnp.concatenate([states_BxRx2xD, lengths_BxRx2[..., None]], axis=-1)
        dtype = states_BxRx2xD.dtype
        scores_BxRx2 = Dense(1, (None, None), dtype, name="score")(states_BxRx2xD)[..., 0]
        first, second = states_BxRx2xD[:, :, 0], states_BxRx2xD[:, :, 1]
        gap = jnp.abs(scores_BxRx2[..., :1] - scores_BxRx2[..., 1:])
        evidence = jnp.concatenate([jnp.abs(first - second), first + second, gap], axis=-1)
        tie_BxRx1 = Dense(1, (None, None), dtype, name="tie")(evidence)
        return jnp.concatenate([scores_BxRx2, tie_BxRx1], axis=-1)


def _append_lengths(states: jax.Array, lengths: jax.Array) -> jax.Array:
    """Both logarithms and their difference behind the states."""
    difference = lengths[..., :1] - lengths[..., 1:]
    return jnp.concatenate([states, lengths, difference], axis=-1)
