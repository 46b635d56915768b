"""BERT (Devlin et al. 2019) and DistilBERT (Sanh et al. 2019) encoders over packed sequences.

Agrees with `BertModel` and `DistilBertModel` of Hugging Face transformers without their poolers.
The two differ only in token types, so one module serves both.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from pref_jax.models.attention import attend
from pref_jax.models.dropout import dropout
from pref_jax.models.layers import Dense, Embedding, LayerNorm, gelu
from pref_jax.models.products import PRODUCT
from pref_jax.models.segment_attention import Segments, attend_segments, find_segments

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": gelu,
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}

# Dropout sites: three per layer behind the one of the embeddings; heads count from here on down.
_SITES_PER_LAYER = 3


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Architecture of an encoder.

    Attributes:
      family: "bert" or "distilbert".
      vocab_size: rows of the word table.
      hidden_size: width of the hidden states.
      num_layers: encoder layers.
      num_heads: attention heads; divides ``hidden_size``.
      intermediate_size: width of the feed-forward layer.
      max_positions: rows of the position table, the longest sequence in tokens.
      type_vocab_size: rows of the token-type table; 0: none (DistilBERT).
      norm_epsilon: added to the variance in layer norms.
      hidden_dropout: dropout behind embeddings, attention and feed-forward layers.
      attention_dropout: dropout of attention probabilities.
      activation: key of `ACTIVATIONS`.
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_positions: int
    type_vocab_size: int
    norm_epsilon: float = 1e-12
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    activation: str = "gelu"

    @property
    def layer_parameters(self) -> int:
        """Weights in the six matrices of a layer."""
        return self.hidden_size * (4 * self.hidden_size + 2 * self.intermediate_size)


def gather_tokens(x_BxTxD: jax.Array, positions_BxP: jax.Array) -> jax.Array:
    """Hidden states at the given positions, ``[B, P, D]``."""
    return jnp.take_along_axis(x_BxTxD, positions_BxP[..., None], axis=1, mode="clip")


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward layer, each with residual and layer norm behind it."""

    config: EncoderConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x_BxTxD: jax.Array,
        layer: jax.Array | int,
        segment_ids_BxT: jax.Array,
        segments: Segments | None,
        pool_positions_BxP: jax.Array | None,
        seeds: jax.Array | None,
    ) -> jax.Array:
        """Returns ``[B, T, D]``, or ``[B, P, D]`` where only pooled tokens are asked for.

        Keys and values are always those of every token, so a pooled token's result is the same
        either way; what is saved are queries, output projection and feed-forward of the others.
        """
        config, dtype = self.config, self.dtype
        site = 1 + _SITES_PER_LAYER * layer
        heads = (config.num_heads, config.hidden_size // config.num_heads)
        inputs_BxQxD, query_segments_BxQ = x_BxTxD, segment_ids_BxT
        joined = segments is not None  # they are looked for on one CPU device
        if pool_positions_BxP is not None:
            inputs_BxQxD = gather_tokens(x_BxTxD, pool_positions_BxP)
            query_segments_BxQ = jnp.take_along_axis(
                segment_ids_BxT, pool_positions_BxP, axis=1, mode="clip"
            )
            segments = None  # few queries: the plain formula

        attended = _SelfAttention(config, heads, dtype, name="attention")(
            inputs_BxQxD, x_BxTxD, query_segments_BxQ, segment_ids_BxT, segments, seeds, site
        )
        attended = dropout(attended, config.hidden_dropout, seeds, site + 1)
        x_BxQxD = LayerNorm(config.norm_epsilon, dtype, joined, name="attention_norm")(
            inputs_BxQxD + attended
        )
        hidden = Dense(config.intermediate_size, ("embed", "mlp"), dtype, name="intermediate")(
            x_BxQxD
        )
        hidden = ACTIVATIONS[config.activation](hidden)
        hidden = Dense(config.hidden_size, ("mlp", "embed"), dtype, name="output")(hidden)
        hidden = dropout(hidden, config.hidden_dropout, seeds, site + 2)
        return LayerNorm(config.norm_epsilon, dtype, joined, name="output_norm")(x_BxQxD + hidden)


class _SelfAttention(nn.Module):
    config: EncoderConfig
    heads: tuple[int, int]
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self,
        inputs_BxQxD: jax.Array,
        context_BxTxD: jax.Array,
        query_segments_BxQ: jax.Array,
        key_segments_BxT: jax.Array,
        segments: Segments | None,
        seeds: jax.Array | None,
        site: jax.Array | int,
    ) -> jax.Array:
        def project(name: str, x: jax.Array) -> jax.Array:
            y = Dense(self.config.hidden_size, ("embed", "heads"), self.dtype, name=name)(x)
            return y.reshape(*y.shape[:-1], *self.heads)

        heads = (
            project("query", inputs_BxQxD),
            project("key", context_BxTxD),
            project("value", context_BxTxD),
        )
        if segments is None:
            attended = attend(
                *heads,
                query_segments_BxQ,
                key_segments_BxT,
                dropout_rate=self.config.attention_dropout,
                seeds=seeds,
                site=site,
            )
        else:
            attended = attend_segments(
                *heads,
                segments,
                dropout_rate=self.config.attention_dropout,
                seeds=seeds,
                site=site,
            )
        attended = attended.reshape(*attended.shape[:-2], self.config.hidden_size)
        return Dense(self.config.hidden_size, ("heads", "embed"), self.dtype, name="output")(
            attended
        )


class Embeddings(nn.Module):
    """Sum of word, position and token-type rows, layer norm, dropout."""

    config: EncoderConfig
    dtype: jnp.dtype = jnp.float32
    one_device: bool = False

    @nn.compact
    def __call__(
        self,
        input_ids_BxT: jax.Array,
        token_types_BxT: jax.Array,
        positions_BxT: jax.Array,
        seeds: jax.Array | None,
        words_BxTxD: jax.Array | None,
    ) -> jax.Array:
        config = self.config

        def table(name: str, rows: int, ids: jax.Array) -> jax.Array:
            return Embedding(rows, config.hidden_size, (None, "embed"), name=name)(ids)

        x_BxTxD = words_BxTxD
        if x_BxTxD is None:
            x_BxTxD = table("word", config.vocab_size, input_ids_BxT)
        x_BxTxD += table("position", config.max_positions, positions_BxT)
        if config.type_vocab_size:
            x_BxTxD += table("token_type", config.type_vocab_size, token_types_BxT)
        x_BxTxD = LayerNorm(config.norm_epsilon, self.dtype, self.one_device, name="norm")(x_BxTxD)
        return dropout(x_BxTxD, config.hidden_dropout, seeds, 0)


REMAT_POLICIES: dict[str, Callable | None] = {
    "none": None,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(PRODUCT),
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Encoder(nn.Module):
    """Embeddings and encoder layers.

    Attributes:
      config: the architecture.
      dtype: of activations and matrix products.
      remat: what the backward pass keeps: "none" recomputes nothing, "dots" keeps matrix products,
        "full" keeps the input of each layer.
      attention: what `pref_jax.models.attention.choose_implementation` returns.
      longest: the most tokens of a sequence; None: the position table's rows.
      every_token: compute the last layer for every token, though only some are pooled.
      frozen_layers: how many of the first layers do not train.
    """

    config: EncoderConfig
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"
    attention: str = "xla"
    longest: int | None = None
    every_token: bool = False
    frozen_layers: int = 0

    @nn.compact
    def __call__(
        self,
        input_ids_BxT: jax.Array,
        token_types_BxT: jax.Array,
        positions_BxT: jax.Array,
        segment_ids_BxT: jax.Array,
        pool_positions_BxP: jax.Array | None = None,
        seeds: jax.Array | None = None,
        words_BxTxD: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states behind the last layer.

        Args:
          input_ids_BxT: token numbers, padding anything inside the table.
          token_types_BxT: 0 or 1 (ignored by DistilBERT).
          positions_BxT: position of each token inside its own segment.
          segment_ids_BxT: equal numbers see each other; padding has a number of its own.
          pool_positions_BxP: compute the last layer for these tokens only, one of each sequence.
          seeds: uint32 ``[B, 2]`` switches dropout on.
          words_BxTxD: the rows of the word table for ``input_ids_BxT``, where the caller has looked
            them up itself.

        Returns:
          ``[B, P, D]``, or ``[B, T, D]`` without ``pool_positions_BxP`` or with `every_token`.
        """
        layer_type = EncoderLayer
        policy = REMAT_POLICIES[self.remat]
        if policy is not None:
            layer_type = nn.remat(EncoderLayer, policy=policy)
        one_device = self.attention == "segments"  # which is chosen for one CPU device
        x_BxTxD = Embeddings(self.config, self.dtype, one_device, name="embeddings")(
            input_ids_BxT, token_types_BxT, positions_BxT, seeds, words_BxTxD
        )
        segments = None
        if one_device:
            pooled = segment_ids_BxT if pool_positions_BxP is None else pool_positions_BxP
            segments = find_segments(
                segment_ids_BxT,
                positions_BxT,
                most=pooled.shape[1],  # one pooled token a sequence
                longest=self.longest or self.config.max_positions,
            )
        layers = self.config.num_layers
        only_BxP = None if self.every_token else pool_positions_BxP
        alike = layers if only_BxP is None else layers - 1
        scanned = 0
        # In 16 bits XLA's CPU compiler converts the whole stack that a scan saves in each turn.
        if one_device and self.dtype == jnp.float32 and not self.is_initializing():
            scanned, frozen = alike, min(self.frozen_layers, alike)
            # Apart, since gradients are taken of the weights of a scan all together.
            for some in (range(frozen), range(frozen, alike)):
                x_BxTxD = self._scan_layers(some, x_BxTxD, segment_ids_BxT, segments, seeds)
        for layer in range(scanned, layers):
            x_BxTxD = layer_type(self.config, self.dtype, name=f"layer_{layer}")(
                x_BxTxD,
                layer,
                segment_ids_BxT,
                segments,
                None if layer < alike else only_BxP,
                seeds,
            )
        return x_BxTxD

    def _scan_layers(
        self,
        layers: range,
        x_BxTxD: jax.Array,
        segment_ids_BxT: jax.Array,
        segments: Segments | None,
        seeds: jax.Array | None,
    ) -> jax.Array:
        """The same as one layer after the other, in a program that holds one of them.

        XLA's CPU compiler takes a loop per width of a segment, and loads a program in a time that
        grows faster than its operations: a step of six layers takes 4 seconds, and 1 so.
        """
        if not layers:
            return x_BxTxD
        one = EncoderLayer(self.config, self.dtype, parent=None)

        def turn(x_BxTxD: jax.Array, layer: tuple[jax.Array, Any]) -> tuple[jax.Array, None]:
            number, params = layer
            y: Any = one.apply(
                {"params": params}, x_BxTxD, number, segment_ids_BxT, segments, None, seeds
            )
            return y, None

        policy = REMAT_POLICIES[self.remat]
        if policy is not None:
            # A scan keeps the recomputation apart by itself: no barriers against merging it.
            turn = jax.checkpoint(turn, policy=policy, prevent_cse=False)
        params = [self.variables["params"][f"layer_{layer}"] for layer in layers]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
        return lax.scan(turn, x_BxTxD, (jnp.array(layers), stacked))[0]
