"""Encoders with a classification head."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from pref_jax.models.bert import Encoder, EncoderConfig, gather_tokens
from pref_jax.models.heads import apply_head

# Beyond every site of an encoder.
_HEAD_SITE = 10_000

POOLINGS = ("cls", "mean", "cls_mean")


class PreferenceClassifier(nn.Module):
    """Logits of (A wins, B wins, tie) from the pooled state of each of a row's sequences.

    `single` rows have one sequence, `parallel` rows two, which share the encoder and one forward
    pass; so do rows in both orders. The paper's head is a linear layer straight on the dropped-out,
    concatenated [CLS] states.

    Attributes:
      config: architecture of the encoder.
      num_classes: width of the head.
      head: kind of the head, see `pref_jax.models.heads.apply_head`.
      pooling: what a sequence is judged by: its [CLS] state ("cls"), the mean over its tokens,
        [CLS] and [SEP] included ("mean"), or both behind each other ("cls_mean").
      length_features: whether the head is told the responses' lengths before cutting.
      head_dropout: dropout of the pooled states.
      dtype: of activations and matrix products; the head is always float32.
      remat, attention, longest, frozen_layers: see `Encoder`.
    """

    config: EncoderConfig
    num_classes: int = 3
    head: str = "linear"
    pooling: str = "cls"
    length_features: bool = False
    head_dropout: float = 0.1
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"
    attention: str = "xla"
    longest: int | None = None
    frozen_layers: int = 0

    @nn.compact
    def __call__(
        self,
        input_ids_BxT: jax.Array,
        token_types_BxT: jax.Array,
        positions_BxT: jax.Array,
        segment_ids_BxT: jax.Array,
        pool_positions_BxRxS: jax.Array,
        text_lengths_BxRx2: jax.Array | None = None,
        seeds: jax.Array | None = None,
        words_BxTxD: jax.Array | None = None,
    ) -> jax.Array:
        """Float32 logits ``[B, R, num_classes]`` of the R rows in each of B packed units.

        ``pool_positions_BxRxS`` holds where the S sequences of each row begin,
        ``text_lengths_BxRx2`` the tokens of its responses before cutting; the other arguments are
        those of `Encoder`.
        """
        units, rows, sides = pool_positions_BxRxS.shape
        pool_positions_BxP = pool_positions_BxRxS.reshape(units, rows * sides)
        states = Encoder(
            self.config,
            self.dtype,
            self.remat,
            self.attention,
            self.longest,
            every_token=self.pooling != "cls",
            frozen_layers=self.frozen_layers,
            name="encoder",
        )(
            input_ids_BxT,
            token_types_BxT,
            positions_BxT,
            segment_ids_BxT,
            pool_positions_BxP,
            seeds,
            words_BxTxD,
        )
        pooled_BxPxD = states
        if self.pooling == "mean":
            pooled_BxPxD = mean_tokens(states, segment_ids_BxT, rows * sides)
        elif self.pooling == "cls_mean":
            pooled_BxPxD = jnp.concatenate(
                [
                    gather_tokens(states, pool_positions_BxP).astype(jnp.float32),
                    mean_tokens(states, segment_ids_BxT, rows * sides),
                ],
                axis=-1,
            )
        return apply_head(
            self.head,
            pooled_BxPxD.reshape(units, rows, sides, -1),
            text_lengths_BxRx2 if self.length_features else None,
            seeds,
            dropout_rate=self.head_dropout,
            site=_HEAD_SITE,
            num_classes=self.num_classes,
        )


def mean_tokens(x_BxTxD: jax.Array, segment_ids_BxT: jax.Array, sequences: int) -> jax.Array:
    """Mean state of each of a unit's sequences, float32 ``[B, sequences, D]``.

    Sequences are the segments 1, 2, ...; one that is not there has a mean of 0.
    """
    numbers = jnp.arange(1, sequences + 1, dtype=segment_ids_BxT.dtype)
    members_BxPxT = (segment_ids_BxT[:, None, :] == numbers[:, None]).astype(x_BxTxD.dtype)
    sums = jnp.einsum("BPT,BTD->BPD", members_BxPxT, x_BxTxD, preferred_element_type=jnp.float32)
    counts = members_BxPxT.sum(axis=-1, dtype=jnp.float32)
    return sums / jnp.maximum(counts, 1.0)[..., None]
