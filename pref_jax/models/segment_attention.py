"""Attention one segment at a time: the work grows with the segments' own lengths.

The plain formula over a packed unit computes scores of every pair of its tokens and throws away
those between segments: with four segments in a unit three quarters of the work. Here a loop with a
dynamic bound visits the segments, cuts each out of the flat token axis at one of a few widths, and
attends inside it. On a CPU forward and backward pass are 3 to 4 times as fast as the plain formula
at units of 512 and 1,024 tokens.

A dynamic loop has no reverse derivative, so the backward pass is written out. It recomputes the
probabilities from the stored log-sum (Dao et al. 2022, "FlashAttention", appendix B).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pref_jax.models.dropout import keep_elements, site_seeds

# Widths at which segments are cut out. More of them would waste less and compile longer.
_WIDTHS = (64, 128, 192, 256, 384, 512, 1024, 2048, 4096, 8192)
_MASKED = np.float32(-1e30)


class Segments(NamedTuple):
    """Where the segments of B packed units of T tokens lie on the flat axis of B x T tokens.

    Attributes:
      ids: int32 ``[B * T]``, a number per segment; 0 is padding.
      starts: int32 ``[n]``, first tokens, ordered by width.
      bounds: int32 ``[widths + 1]``; width i has the starts ``bounds[i]`` to ``bounds[i + 1]``.
    """

    ids: jax.Array
    starts: jax.Array
    bounds: jax.Array


def _widths(longest: int) -> tuple[int, ...]:
    """Widths in use where no segment has more than ``longest`` tokens; the last holds any."""
    return (*(width for width in _WIDTHS if width < longest), longest)


def find_segments(
    segment_ids_BxT: jax.Array, positions_BxT: jax.Array, *, most: int, longest: int
) -> Segments:
    """Finds the segments of packed units; their tokens are contiguous and count from position 0.

    Args:
      segment_ids_BxT: 0 is padding.
      positions_BxT: position of each token in its segment.
      most: the most segments that a unit may hold.
      longest: the most tokens that a segment may have.
    """
    units, tokens = segment_ids_BxT.shape
    longest = min(longest, tokens)
    real = (segment_ids_BxT > 0).reshape(-1)
    offsets = jnp.arange(units, dtype=jnp.int32)[:, None] * (most + 1)
    ids = jnp.where(real, (segment_ids_BxT + offsets).reshape(-1), 0)
    first = real & (positions_BxT.reshape(-1) == 0)
    starts = jnp.nonzero(first, size=units * most, fill_value=0)[0].astype(jnp.int32)
    known = jnp.arange(units * most) < first.sum()
    own = jnp.where(known, ids[starts], -1)
    lengths = jnp.zeros(units * (most + 1) + 1, jnp.int32).at[ids].add(1)[own]
    widths = jnp.array(_widths(longest), jnp.int32)
    kinds = jnp.where(known, jnp.searchsorted(widths, lengths), len(widths))
    order = jnp.argsort(kinds, stable=True)
    bounds = jnp.searchsorted(kinds[order], jnp.arange(len(widths) + 1)).astype(jnp.int32)
    return Segments(ids, starts[order], bounds)


def attend_segments(
    query_BxTxNxH: jax.Array,
    key_BxTxNxH: jax.Array,
    value_BxTxNxH: jax.Array,
    segments: Segments,
    *,
    longest: int,
    dropout_rate: float = 0.0,
    seeds: jax.Array | None = None,
    site: int = 0,
) -> jax.Array:
    """What `pref_jax.models.attention.attend` computes, dropout masks included; padding gets 0.

    Returns:
      ``[B, T, N, H]``.
    """
    units, tokens, heads, width = query_BxTxNxH.shape
    rate = dropout_rate if seeds is not None else 0.0
    words = jnp.zeros((units, 2), jnp.uint32) if seeds is None else site_seeds(seeds, site)

    def flatten(x: jax.Array) -> jax.Array:
        return x.reshape(units * tokens, heads, width).transpose(1, 0, 2)

    out_NxFxH = _attend(
        flatten(query_BxTxNxH),
        flatten(key_BxTxNxH),
        flatten(value_BxTxNxH),
        segments,
        words,
        (tokens, min(longest, tokens)),
        rate,
    )
    return out_NxFxH.transpose(1, 0, 2).reshape(units, tokens, heads, width)


class _Cut:
    """One segment's window on the flat axis."""

    def __init__(
        self, segments: Segments, number: jax.Array, width: int, flat: int, tokens: int
    ) -> None:
        start = segments.starts[number]
        self.width, self.tokens = width, tokens
        self.unit = start // tokens
        # A window may reach into the neighbours; at the end of the axis it is moved back.
        self.start = jnp.minimum(start, flat - width)
        self.mine = lax.dynamic_slice_in_dim(segments.ids, self.start, width) == segments.ids[start]

    def of(self, x: jax.Array) -> jax.Array:
        return lax.dynamic_slice_in_dim(x, self.start, self.width, axis=1)

    def put(self, x: jax.Array, part: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(x, part, self.start, axis=1)

    def keep(self, words: jax.Array, heads: int, rate: float) -> jax.Array:
        """The mask of the plain formula: its index is (head, query, key) inside the unit."""
        at = (self.start - self.unit * self.tokens + jnp.arange(self.width)).astype(jnp.uint32)
        head = jnp.arange(heads, dtype=jnp.uint32) * np.uint32(self.tokens**2)
        index = head[:, None, None] + (at * np.uint32(self.tokens))[:, None] + at
        own = lax.dynamic_index_in_dim(words, self.unit, keepdims=False)
        return keep_elements(index, own[0], own[1], rate)


def _visit(segments: Segments, flat: int, sizes: tuple[int, int], visit: Any, carry: Any) -> Any:
    """Runs ``visit(cut, carry)`` over all segments, width by width."""
    tokens, longest = sizes
    for kind, width in enumerate(_widths(longest)):
        carry = lax.fori_loop(
            segments.bounds[kind],
            segments.bounds[kind + 1],
            lambda number, carry, width=width: visit(
                _Cut(segments, number, width, flat, tokens), carry
            ),
            carry,
        )
    return carry


def _scores(query: jax.Array, key: jax.Array) -> jax.Array:
    scale = np.float32(query.shape[-1] ** -0.5)
    return _product("nqh,nkh->nqk", query, key) * scale


def _product(form: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(form, x, y.astype(x.dtype), preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(
    query_NxFxH: jax.Array,
    key_NxFxH: jax.Array,
    value_NxFxH: jax.Array,
    segments: Segments,
    words: jax.Array,
    sizes: tuple[int, int],
    rate: float,
) -> jax.Array:
    return _attend_forward(query_NxFxH, key_NxFxH, value_NxFxH, segments, words, sizes, rate)[0]


# Both passes are traced once for all layers of a network: they differ by their arguments only.
@functools.partial(jax.jit, static_argnums=(5, 6))
def _attend_forward(
    query_NxFxH: jax.Array,
    key_NxFxH: jax.Array,
    value_NxFxH: jax.Array,
    segments: Segments,
    words: jax.Array,
    sizes: tuple[int, int],
    rate: float,
) -> tuple[jax.Array, Any]:
    heads, flat, _ = query_NxFxH.shape
    dtype = query_NxFxH.dtype

    def visit(cut: _Cut, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        out, log_sums = carry
        scores = _scores(cut.of(query_NxFxH), cut.of(key_NxFxH))
        scores = jnp.where(cut.mine, scores, _MASKED)
        top = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = weights.sum(axis=-1, keepdims=True)
        weights = weights / total
        if rate:
            weights = jnp.where(
                cut.keep(words, heads, rate), weights * np.float32(1.0 / (1.0 - rate)), 0.0
            )
        part = _product("nqk,nkh->nqh", weights.astype(dtype), cut.of(value_NxFxH)).astype(dtype)
        log_sum = (top + jnp.log(total))[..., 0]
        return (
            cut.put(out, jnp.where(cut.mine[:, None], part, cut.of(out))),
            cut.put(log_sums, jnp.where(cut.mine, log_sum, cut.of(log_sums))),
        )

    start = (jnp.zeros_like(value_NxFxH), jnp.zeros((heads, flat), jnp.float32))
    out, log_sums = _visit(segments, flat, sizes, visit, start)
    return out, (query_NxFxH, key_NxFxH, value_NxFxH, segments, words, out, log_sums)


def _attend_backward(sizes: tuple[int, int], rate: float, saved: Any, d_out: jax.Array) -> tuple:
    segments, words = saved[3:5]
    no_gradient = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), (segments, words))
    return (*_gradients(sizes, rate, saved, d_out), *no_gradient)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _gradients(
    sizes: tuple[int, int], rate: float, saved: Any, d_out: jax.Array
) -> tuple[jax.Array, ...]:
    """Those of query, key and value."""
    query, key, value, segments, words, out, log_sums = saved
    heads, flat, _ = query.shape
    dtype = query.dtype
    scale = np.float32(query.shape[-1] ** -0.5)
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1)

    def visit(cut: _Cut, carry: tuple) -> tuple:
        pair = cut.mine[:, None] & cut.mine[None, :]
        log_sum, shift = cut.of(log_sums)[..., None], cut.of(delta)[..., None]
        part_query, part_key = cut.of(query), cut.of(key)
        part_out = cut.of(d_out)
        weights = jnp.where(pair, jnp.exp(_scores(part_query, part_key) - log_sum), 0.0)
        d_weights = _product("nqh,nkh->nqk", part_out, cut.of(value))
        dropped = weights
        if rate:
            factor = jnp.where(cut.keep(words, heads, rate), np.float32(1.0 / (1.0 - rate)), 0.0)
            dropped, d_weights = weights * factor, d_weights * factor
        d_scores = (weights * (d_weights - shift) * scale).astype(dtype)
        parts = (
            _product("nqk,nkh->nqh", d_scores, part_key),
            _product("nqk,nqh->nkh", d_scores, part_query),
            _product("nqk,nqh->nkh", dropped.astype(dtype), part_out),
        )
        return tuple(
            cut.put(total, cut.of(total) + part) for total, part in zip(carry, parts, strict=True)
        )

    start = tuple(jnp.zeros(x.shape, jnp.float32) for x in (query, key, value))
    gradients = _visit(segments, flat, sizes, visit, start)
    return tuple(gradient.astype(dtype) for gradient in gradients)


_attend.defvjp(_attend_forward, _attend_backward)
