"""Encoders with the paper's classification heads."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from pref_jax.models.bert import Encoder, EncoderConfig
from pref_jax.models.dropout import dropout
from pref_jax.models.layers import Dense

# Beyond every site of an encoder.
_HEAD_SITE = 10_000


class PreferenceClassifier(nn.Module):
    """Logits of (A wins, B wins, tie) from the [CLS] state of each of a row's sequences.

    `single` rows have one sequence, `parallel` rows two, which share the encoder and one forward
    pass. The head is a linear layer straight on the dropped-out, concatenated [CLS] states.

    Attributes:
      config: architecture of the encoder.
      num_classes: width of the head.
      head_dropout: dropout of the [CLS] states.
      dtype: of activations and matrix products; the head is always float32.
      remat, attention, longest: see `Encoder`.
    """

    config: EncoderConfig
    num_classes: int = 3
    head_dropout: float = 0.1
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"
    attention: str = "xla"
    longest: int | None = None

    @nn.compact
    def __call__(
        self,
        input_ids_BxT: jax.Array,
        token_types_BxT: jax.Array,
        positions_BxT: jax.Array,
        segment_ids_BxT: jax.Array,
        pool_positions_BxRxS: jax.Array,
        seeds: jax.Array | None = None,
        words_BxTxD: jax.Array | None = None,
    ) -> jax.Array:
        """Float32 logits ``[B, R, num_classes]`` of the R rows in each of B packed units.

        ``pool_positions_BxRxS`` holds where the S sequences of each row begin; the other arguments
        are those of `Encoder`.
        """
        units, rows, sides = pool_positions_BxRxS.shape
        pooled_BxPxD = Encoder(
            self.config, self.dtype, self.remat, self.attention, self.longest, name="encoder"
        )(
            input_ids_BxT,
            token_types_BxT,
            positions_BxT,
            segment_ids_BxT,
            pool_positions_BxRxS.reshape(units, rows * sides),
            seeds,
            words_BxTxD,
        )
        pooled_BxRxD = pooled_BxPxD.astype(jnp.float32).reshape(units, rows, -1)
        pooled_BxRxD = dropout(pooled_BxRxD, self.head_dropout, seeds, _HEAD_SITE)
        return Dense(self.num_classes, (None, None), jnp.float32, name="head")(pooled_BxRxD)
