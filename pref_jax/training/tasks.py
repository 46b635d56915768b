"""Loss of the preference task."""

import jax
import jax.numpy as jnp
import numpy as np

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
    log_probabilities = jax.nn.log_softmax(mask_tie(logits, tie_allowed))
    return -jnp.take_along_axis(log_probabilities, labels[..., None], axis=-1)[..., 0]
