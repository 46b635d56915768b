"""Attention among the tokens of one packed sequence, kept inside each segment."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pref_jax.models.dropout import dropout

# Added to scores of pairs in different segments. Finite, so that padding (which has a segment of
# its own) never produces a NaN; far below any real score in float32.
_MASKED = np.float32(-1e30)


def choose_implementation(*, one_cpu: bool) -> str:
    """Chooses the attention of an encoder; the one place where that happens.

    - "segments": one segment at a time (`pref_jax.models.segment_attention`). Its loop cuts along
      the token axis, which several devices would have to exchange, so it is for one CPU device.
    - "xla": the plain formula over the packed unit. Attention dropout, which encoders have in
      training, needs the probabilities, and fused kernels do not hand them out.
    """
    return "segments" if one_cpu else "xla"


def attend(
    query_BxQxNxH: jax.Array,
    key_BxKxNxH: jax.Array,
    value_BxKxNxH: jax.Array,
    query_segments_BxQ: jax.Array,
    key_segments_BxK: jax.Array,
    *,
    dropout_rate: float = 0.0,
    seeds: jax.Array | None = None,
    site: jax.Array | int = 0,
) -> jax.Array:
    """Softmax attention (Vaswani et al. 2017, 3.2.1) where only equal segments see each other.

    Scores and softmax are float32 whatever the precision of the arguments; the result has theirs.

    Returns:
      ``[B, Q, N, H]``.
    """
    dtype = query_BxQxNxH.dtype
    scale = np.float32(query_BxQxNxH.shape[-1] ** -0.5)
    scores_BxNxQxK = jnp.einsum(
        "bqnh,bknh->bnqk", query_BxQxNxH, key_BxKxNxH, preferred_element_type=jnp.float32
    )
    same_Bx1xQxK = query_segments_BxQ[:, None, :, None] == key_segments_BxK[:, None, None, :]
    scores_BxNxQxK = jnp.where(same_Bx1xQxK, scores_BxNxQxK * scale, _MASKED)
    # The maximum only guards against overflow and cancels out: no gradient through it.
    scores_BxNxQxK -= lax.stop_gradient(scores_BxNxQxK.max(axis=-1, keepdims=True))
    weights_BxNxQxK = jnp.exp(scores_BxNxQxK)
    weights_BxNxQxK /= weights_BxNxQxK.sum(axis=-1, keepdims=True)
    if dropout_rate and seeds is not None:
        # Several units of 1,024 tokens crash the TPU compiler (libtpu 0.0.42.1) where it fuses the
        # softmax with dropout and the product. The backward pass keeps these weights anyway.
        weights_BxNxQxK = lax.optimization_barrier(weights_BxNxQxK)
    weights_BxNxQxK = dropout(weights_BxNxQxK, dropout_rate, seeds, site)
    return jnp.einsum(
        "bnqk,bknh->bqnh",
        weights_BxNxQxK.astype(dtype),
        value_BxKxNxH,
        preferred_element_type=jnp.float32,
    ).astype(dtype)
