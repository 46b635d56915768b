"""Attention of decoders: each token sees itself and what stands before it in its own segment."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from pref_jax.accelerators import BFLOAT16_FROM, compute_capability
from pref_jax.mesh import BATCH_AXES
from pref_jax.models.segment_attention import Segments, attend_segments

_MASKED = np.float32(-1e30)
_LANES = 128  # the TPU kernel takes heads and lengths in multiples of its lanes
_LONGEST_BLOCK = 512


def choose_causal_implementation(
    device: jax.Device,
    *,
    one_cpu: bool,
    head_dim: int,
    length: int,
    dtype: jnp.dtype,
    packing: str,
) -> str:
    """Chooses the attention of a decoder; the one place where that happens.

    - "splash": the Pallas kernel for TPU v5e and later (it does not compile for v3). Takes segment
      ids; heads and unit lengths in multiples of 128.
    - "cudnn": flash attention on NVIDIA GPUs from Ampere, 16-bit. Takes no segment ids, so each row
      has a unit of its own; not where ``packing`` is "on".
    - "segments": one segment at a time, as encoders on one CPU device.
    - "xla": the plain formula.

    Args:
      device: one of the mesh.
      one_cpu: whether it is a CPU and the only one.
      head_dim: channels of a head.
      length: tokens of a unit.
      dtype: of queries, keys and values.
      packing: `input.packing` of the config.
    """
    if device.platform == "tpu":
        new = any(name in device.device_kind for name in ("v5", "v6", "v7"))
        return "splash" if new and head_dim % _LANES == 0 and length % _LANES == 0 else "xla"
    if device.platform == "gpu":
        capability = compute_capability(device) or (0, 0)
        fits = jnp.dtype(dtype).itemsize == 2 and head_dim <= 128 and head_dim % 8 == 0
        return "cudnn" if capability >= BFLOAT16_FROM and fits and packing != "on" else "xla"
    return "segments" if one_cpu else "xla"


def attend_causal(
    query_BxTxNxH: jax.Array,
    key_BxTxKxH: jax.Array,
    value_BxTxKxH: jax.Array,
    segment_ids_BxT: jax.Array,
    *,
    implementation: str = "xla",
    mesh: Mesh | None = None,
    segments: Segments | None = None,
) -> jax.Array:
    """Softmax attention with scores scaled by 1 / sqrt(H), float32 inside.

    Each of the K key/value heads serves N / K query heads that follow each other (grouped-query
    attention, Ainslie et al. 2023).

    Args:
      query_BxTxNxH, key_BxTxKxH, value_BxTxKxH: heads.
      segment_ids_BxT: tokens of one segment are contiguous and see no other segment.
      implementation: what `choose_causal_implementation` returned.
      mesh: for "splash", whose kernel runs on each device's part.
      segments: for "segments", causal ones.

    Returns:
      ``[B, T, N, H]`` in the dtype of the queries.
    """
    if implementation == "cudnn":
        # Rows begin their units, so padding stands behind them and nothing real sees it.
        return jax.nn.dot_product_attention(
            query_BxTxNxH, key_BxTxKxH, value_BxTxKxH, is_causal=True, implementation="cudnn"
        )
    if implementation == "splash":
        assert mesh is not None
        return _attend_splash(query_BxTxNxH, key_BxTxKxH, value_BxTxKxH, segment_ids_BxT, mesh)
    if implementation == "segments":
        assert segments is not None and segments.causal
        return attend_segments(query_BxTxNxH, key_BxTxKxH, value_BxTxKxH, segments)
    return _attend_plain(query_BxTxNxH, key_BxTxKxH, value_BxTxKxH, segment_ids_BxT)


def _attend_plain(
    query_BxTxNxH: jax.Array,
    key_BxTxKxH: jax.Array,
    value_BxTxKxH: jax.Array,
    segment_ids_BxT: jax.Array,
) -> jax.Array:
    units, tokens, heads, width = query_BxTxNxH.shape
    groups = key_BxTxKxH.shape[2]
    query_BxTxKxGxH = query_BxTxNxH.reshape(units, tokens, groups, heads // groups, width)
    scores_BxKxGxTxS = jnp.einsum(
        "btkgh,bskh->bkgts", query_BxTxKxGxH, key_BxTxKxH, preferred_element_type=jnp.float32
    )
    same_BxTxS = segment_ids_BxT[:, :, None] == segment_ids_BxT[:, None, :]
    order = jnp.arange(tokens)
    seen_BxTxS = same_BxTxS & (order[:, None] >= order[None, :])
    scores_BxKxGxTxS = jnp.where(
        seen_BxTxS[:, None, None], scores_BxKxGxTxS * np.float32(width**-0.5), _MASKED
    )
    # The maximum only guards against overflow and cancels out: no gradient through it.
    scores_BxKxGxTxS -= lax.stop_gradient(scores_BxKxGxTxS.max(axis=-1, keepdims=True))
    weights_BxKxGxTxS = jnp.exp(scores_BxKxGxTxS)
    weights_BxKxGxTxS /= weights_BxKxGxTxS.sum(axis=-1, keepdims=True)
    dtype = query_BxTxNxH.dtype
    out_BxTxKxGxH = jnp.einsum(
        "bkgts,bskh->btkgh",
        weights_BxKxGxTxS.astype(dtype),
        value_BxTxKxH,
        preferred_element_type=jnp.float32,
    ).astype(dtype)
    return out_BxTxKxGxH.reshape(units, tokens, heads, width)


def _attend_splash(
    query_BxTxNxH: jax.Array,
    key_BxTxKxH: jax.Array,
    value_BxTxKxH: jax.Array,
    segment_ids_BxT: jax.Array,
    mesh: Mesh,
) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernels,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    width, tokens = query_BxTxNxH.shape[-1], query_BxTxNxH.shape[1]
    per_group = query_BxTxNxH.shape[2] // key_BxTxKxH.shape[2]
    block = math.gcd(tokens, _LONGEST_BLOCK)
    sizes = kernels.BlockSizes(*(block, block, block), *(block, block, block), *(block, block))
    kernel = kernels.make_splash_mqa_single_device(
        mask=masks.MultiHeadMask([masks.CausalMask((tokens, tokens))] * per_group),
        block_sizes=sizes,
    )

    def on_each(query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array) -> Any:
        units, _, heads, _ = query.shape
        groups = key.shape[2]
        query_BxKxGxTxH = (
            (query * np.asarray(width**-0.5, query.dtype))
            .reshape(units, tokens, groups, heads // groups, width)
            .transpose(0, 2, 3, 1, 4)
        )

        def unit(q_KxGxTxH: jax.Array, k_KxTxH: jax.Array, v_KxTxH: jax.Array, ids_T: jax.Array):
            ids = kernels.SegmentIds(q=ids_T, kv=ids_T)
            return jax.vmap(lambda q, k, v: kernel(q, k, v, segment_ids=ids))(
                q_KxGxTxH, k_KxTxH, v_KxTxH
            )

        out_BxKxGxTxH = jax.vmap(unit)(
            query_BxKxGxTxH, key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3), segments
        )
        return out_BxKxGxTxH.transpose(0, 3, 1, 2, 4).reshape(units, tokens, heads, width)

    heads_spec = PartitionSpec(BATCH_AXES, None, "tensor", None)
    mapped = jax.shard_map(
        on_each,
        mesh=mesh,
        in_specs=(heads_spec, heads_spec, heads_spec, PartitionSpec(BATCH_AXES, None)),
        out_specs=heads_spec,
        check_vma=False,
    )
    return mapped(query_BxTxNxH, key_BxTxKxH, value_BxTxKxH, segment_ids_BxT)
