"""LLaMA (Touvron et al. 2023; Grattafiori et al. 2024) as a classifier over packed sequences.

Agrees with `transformers.LlamaForSequenceClassification`: the score of the last real token.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.sharding import Mesh

from pref_jax.config import PROJECTIONS
from pref_jax.mesh import constrain_batch
from pref_jax.models.bert import REMAT_POLICIES, gather_tokens
from pref_jax.models.causal_attention import attend_causal
from pref_jax.models.heads import apply_head
from pref_jax.models.layers import INITIALIZER_RANGE, named
from pref_jax.models.lora import LoRAConfig, Projection
from pref_jax.models.rope import RopeConfig, make_angles, rotate
from pref_jax.models.segment_attention import Segments, find_segments

# Stacks of a decoder's layers: the first ones, where they are frozen, and all others.
FROZEN_LAYERS, LAYERS = "frozen_layers", "layers"
# Behind the sites of all adapters.
_HEAD_SITE = 1_000_000


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Architecture of a decoder.

    Attributes:
      family: "llama".
      vocab_size: rows of the token table.
      hidden_size: width of the hidden states.
      num_layers: decoder layers.
      num_heads, num_kv_heads: heads of queries, and of keys and values; the second divides the
        first.
      head_dim: channels of a head.
      intermediate_size: width of the feed-forward layer.
      max_positions: longest sequence in tokens.
      norm_epsilon: added to the mean square in norms.
      rope: rotary positions.
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_positions: int
    norm_epsilon: float = 1e-5
    rope: RopeConfig = dataclasses.field(default_factory=RopeConfig)

    @property
    def layer_parameters(self) -> int:
        """Weights in the seven projections of a layer."""
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return self.hidden_size * (2 * queries + 2 * keys + 3 * self.intermediate_size)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, computed in float32 (`LlamaRMSNorm`)."""

    epsilon: float
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param(
            "scale",
            named(nn.initializers.ones, "norm"),
            (x.shape[-1],),
            self.param_dtype,
        )
        x = x.astype(jnp.float32)
        x = x * lax.rsqrt((x * x).mean(axis=-1, keepdims=True) + self.epsilon)
        return (x * scale.astype(jnp.float32)).astype(self.dtype)


@dataclasses.dataclass(frozen=True)
class _Options:
    """What every layer of a decoder needs beside its input."""

    config: LlamaConfig
    lora: LoRAConfig | None
    quantization: str
    dtype: jnp.dtype
    frozen_dtype: jnp.dtype
    attention: str
    mesh: Mesh | None

    def projection(self, name: str, features: int, axes: tuple[str, str]) -> Projection:
        has_adapter = self.lora is not None and name in self.lora.targets
        return Projection(
            features,
            axes,
            dtype=self.dtype,
            kernel_dtype=self.frozen_dtype,
            quantization=self.quantization,
            lora=self.lora if has_adapter else None,
            name=name,
        )

    def norm(self, name: str) -> RMSNorm:
        return RMSNorm(self.config.norm_epsilon, self.dtype, self.frozen_dtype, name=name)


class _SelfAttention(nn.Module):
    options: _Options

    @nn.compact
    def __call__(
        self,
        x_BxTxD: jax.Array,
        first_site: jax.Array,
        angles: tuple[jax.Array, jax.Array],
        segment_ids_BxT: jax.Array,
        segments: Segments | None,
        seeds: jax.Array | None,
    ) -> jax.Array:
        options, config = self.options, self.options.config

        def project(name: str, heads: int) -> jax.Array:
            projection = options.projection(name, heads * config.head_dim, ("embed", "heads"))
            y = projection(x_BxTxD, seeds, first_site + PROJECTIONS.index(name))
            return y.reshape(*y.shape[:-1], heads, config.head_dim)

        query_BxTxNxH = rotate(project("q_proj", config.num_heads), *angles)
        key_BxTxKxH = rotate(project("k_proj", config.num_kv_heads), *angles)
        value_BxTxKxH = project("v_proj", config.num_kv_heads)
        out_BxTxNxH = attend_causal(
            query_BxTxNxH,
            key_BxTxKxH,
            value_BxTxKxH,
            segment_ids_BxT,
            implementation=options.attention,
            mesh=options.mesh,
            segments=segments,
        )
        flat_BxTxE = out_BxTxNxH.reshape(*out_BxTxNxH.shape[:-2], -1)
        output = options.projection("o_proj", config.hidden_size, ("heads", "embed"))
        return output(flat_BxTxE, seeds, first_site + PROJECTIONS.index("o_proj"))


class _FeedForward(nn.Module):
    options: _Options

    @nn.compact
    def __call__(
        self, x_BxTxD: jax.Array, first_site: jax.Array, seeds: jax.Array | None
    ) -> jax.Array:
        options, config = self.options, self.options.config

        def apply(name: str, x: jax.Array, features: int, axes: tuple[str, str]) -> jax.Array:
            site = first_site + PROJECTIONS.index(name)
            return options.projection(name, features, axes)(x, seeds, site)

        inner = config.intermediate_size
        gate_BxTxF = apply("gate_proj", x_BxTxD, inner, ("embed", "mlp"))
        up_BxTxF = apply("up_proj", x_BxTxD, inner, ("embed", "mlp"))
        hidden_BxTxF = nn.silu(gate_BxTxF) * up_BxTxF
        return apply("down_proj", hidden_BxTxF, config.hidden_size, ("mlp", "embed"))


class DecoderLayer(nn.Module):
    """Self-attention and SwiGLU, each behind a norm and beside a residual."""

    options: _Options

    @nn.compact
    def __call__(
        self,
        x_BxTxD: jax.Array,
        layer: jax.Array,
        angles: tuple[jax.Array, jax.Array],
        segment_ids_BxT: jax.Array,
        segments: Segments | None,
        seeds: jax.Array | None,
    ) -> tuple[jax.Array, None]:
        """One step of a scan: the residual stream ``[B, T, D]`` goes through."""
        options = self.options
        first_site = layer * len(PROJECTIONS)
        x_BxTxD = constrain_batch(x_BxTxD, options.mesh)
        x_BxTxD += _SelfAttention(options, name="self_attn")(
            options.norm("input_layernorm")(x_BxTxD),
            first_site,
            angles,
            segment_ids_BxT,
            segments,
            seeds,
        )
        x_BxTxD = constrain_batch(x_BxTxD, options.mesh)
        x_BxTxD += _FeedForward(options, name="mlp")(
            options.norm("post_attention_layernorm")(x_BxTxD), first_site, seeds
        )
        return constrain_batch(x_BxTxD, options.mesh), None


class TokenTable(nn.Module):
    """Rows of the token table; the caller guarantees that numbers are inside it."""

    num_embeddings: int
    features: int
    options: _Options

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        table = self.param(
            "embedding",
            named(nn.initializers.normal(INITIALIZER_RANGE), "vocab", "embed"),
            (self.num_embeddings, self.features),
            self.options.frozen_dtype,
        )
        return table.at[ids].get(mode="clip").astype(self.options.dtype)


class Decoder(nn.Module):
    """Token table, layers and final norm.

    The layers are one scan, so a program holds one layer whatever the depth, and one layer's
    weights are gathered at a time. The first of them may be frozen: these are a scan and arrays of
    their own, so that no gradient of theirs is ever made. The norm is applied to pooled tokens
    only.
    """

    options: _Options
    remat: str
    frozen_layers: int
    longest: int | None

    @nn.compact
    def __call__(
        self,
        input_ids_BxT: jax.Array,
        positions_BxT: jax.Array,
        segment_ids_BxT: jax.Array,
        pool_positions_BxP: jax.Array,
        seeds: jax.Array | None,
    ) -> jax.Array:
        """Normed hidden states ``[B, P, D]`` of the tokens at ``pool_positions_BxP``."""
        options, config = self.options, self.options.config
        x_BxTxD = TokenTable(config.vocab_size, config.hidden_size, options, name="embed_tokens")(
            input_ids_BxT
        )
        x_BxTxD = constrain_batch(x_BxTxD, options.mesh)
        angles = make_angles(config.rope, config.head_dim, positions_BxT, segment_ids_BxT)
        segments = None
        if options.attention == "segments":
            segments = find_segments(
                segment_ids_BxT,
                positions_BxT,
                most=pool_positions_BxP.shape[1],  # one pooled token a sequence
                longest=self.longest or config.max_positions,
                causal=True,
            )
        block: type[nn.Module] = DecoderLayer
        policy = REMAT_POLICIES[self.remat]
        if policy is not None:
            # The scan keeps the recomputation apart by itself: no barriers against merging it.
            block = nn.remat(DecoderLayer, policy=policy, prevent_cse=False)
        numbers = jnp.arange(config.num_layers, dtype=jnp.int32)
        frozen = dataclasses.replace(options, frozen_dtype=options.dtype)
        for name, part, part_options in (
            (FROZEN_LAYERS, numbers[: self.frozen_layers], frozen),
            (LAYERS, numbers[self.frozen_layers :], options),
        ):
            if not part.size:
                continue
            layers = nn.scan(
                block,
                variable_axes={"params": 0, "lora": 0},
                split_rngs={"params": True},
                in_axes=(0, *(nn.broadcast,) * 4),
                length=part.size,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )(part_options, name=name)
            x_BxTxD, _ = layers(x_BxTxD, part, angles, segment_ids_BxT, segments, seeds)
        return options.norm("norm")(gather_tokens(x_BxTxD, pool_positions_BxP))


class LlamaClassifier(nn.Module):
    """Logits of (A wins, B wins, tie) from the last token of each row.

    Attributes:
      config: architecture.
      lora: adapters; None trains the whole model.
      quantization: of the projections: "none", "int8" or "nf4".
      num_classes: width of the head, a linear layer without bias where lengths are not told.
      head: kind of the head, "linear" or "orders", see `pref_jax.models.heads.apply_head`.
      frozen_layers: how many of the first layers are not trained, where there are no adapters.
      length_features: whether the head is told the responses' lengths before cutting.
      head_dropout: dropout of the pooled state.
      dtype: of activations and matrix products; head, norms and softmax are float32.
      frozen_dtype: of the base's weights where they are not quantised; frozen layers beside
        trained ones are of ``dtype``.
      remat: "none", "dots" or "full", see `pref_jax.models.bert.Encoder`.
      attention: what `choose_causal_implementation` returned.
      longest: the most tokens of a sequence; None: what the architecture takes.
      mesh: pins activations to the batch axes; None on one device.
    """

    config: LlamaConfig
    lora: LoRAConfig | None = None
    quantization: str = "none"
    num_classes: int = 3
    head: str = "linear"
    frozen_layers: int = 0
    length_features: bool = False
    head_dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    frozen_dtype: jnp.dtype = jnp.float32
    remat: str = "none"
    attention: str = "xla"
    longest: int | None = None
    mesh: Mesh | None = None

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

        The arguments are those of `PreferenceClassifier`; ``pool_positions_BxRxS`` holds each row's
        last token. Token types and looked-up words are not used: a decoder has none.
        """
        units, rows, sides = pool_positions_BxRxS.shape
        options = _Options(
            self.config,
            self.lora,
            self.quantization,
            self.dtype,
            self.frozen_dtype,
            self.attention,
            self.mesh,
        )
        pooled_BxPxD = Decoder(
            options, self.remat, self.frozen_layers, self.longest, name="decoder"
        )(
            input_ids_BxT,
            positions_BxT,
            segment_ids_BxT,
            pool_positions_BxRxS.reshape(units, rows * sides),
            seeds,
        )
        return apply_head(
            self.head,
            pooled_BxPxD.reshape(units, rows, sides, -1),
            text_lengths_BxRx2 if self.length_features else None,
            seeds,
            dropout_rate=self.head_dropout,
            site=_HEAD_SITE,
            num_classes=self.num_classes,
            use_bias=self.length_features,
        )
