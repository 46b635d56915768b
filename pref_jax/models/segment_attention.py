"""Attention one segment at a time: the work grows with the segments' own lengths.

The plain formula over a packed unit computes scores of every pair of its tokens and throws away
those between segments: with four segments in a unit three quarters of the work. Here a loop with a
dynamic bound visits the segments, cuts each out of the flat token axis at one of a few widths, and
attends inside it; those of a decoder in blocks of queries. `docs/performance.md` says what it is
worth on a CPU.

A dynamic loop has no reverse derivative, so the backward pass is written out. It recomputes the
probabilities from the stored log-sum (Dao et al. 2022, "FlashAttention", appendix B).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pref_jax.models.dropout import keep_elements, site_seeds

# Widths at which keys are cut out. More of them would waste less and compile longer (a second or
# two each). A decoder's are those that its blocks of queries end at, and its texts are never short.
_WIDTHS = (64, 128, 192, 256, 384, 512, 1024, 2048, 4096, 8192)
_CAUSAL_WIDTHS = (128, 256, 384, 512, 768, 1024, 2048, 4096, 8192)
# The most queries of a turn of a decoder: early ones need no late keys. An encoder's need all keys,
# and blocks of them are as fast as whole segments or slower.
_BLOCK = 128
_MASKED = np.float32(-1e30)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("ids", "keys", "queries", "bounds"),
    meta_fields=("widths", "causal"),
)
@dataclasses.dataclass(frozen=True)
class Segments:
    """Where the segments of B packed units of T tokens lie on the flat axis of B x T tokens.

    Attention goes in turns: all of a segment at once, or where it is causal `_BLOCK` of its queries
    with the keys that they may see.

    Attributes:
      ids: int32 ``[B * T]``, a number per segment; 0 is padding.
      keys, queries: int32 ``[n]``, each turn's first key and first query, ordered by width.
      bounds: int32 ``[widths + 1]``; width i has the turns ``bounds[i]`` to ``bounds[i + 1]``.
      widths: at which keys are cut out; the last holds any segment.
      causal: whether a token sees only itself and what stands before it in its segment.
    """

    ids: jax.Array
    keys: jax.Array
    queries: jax.Array
    bounds: jax.Array
    widths: tuple[int, ...]
    causal: bool


def find_segments(
    segment_ids_BxT: jax.Array,
    positions_BxT: jax.Array,
    *,
    most: int,
    longest: int,
    causal: bool = False,
) -> Segments:
    """Finds the segments of packed units; their tokens are contiguous and count from position 0.

    Args:
      segment_ids_BxT: 0 is padding.
      positions_BxT: position of each token in its segment.
      most: the most segments that a unit may hold.
      longest: the most tokens that a segment may have.
      causal: whether tokens see only what stands before them, as those of decoders.
    """
    units, tokens = segment_ids_BxT.shape
    longest = min(longest, tokens)
    known_widths = _CAUSAL_WIDTHS if causal else _WIDTHS
    widths = (*(width for width in known_widths if width < longest), longest)
    block = _BLOCK if causal else longest
    real = (segment_ids_BxT > 0).reshape(-1)
    positions = positions_BxT.reshape(-1)
    offsets = jnp.arange(units, dtype=jnp.int32)[:, None] * (most + 1)
    ids = jnp.where(real, (segment_ids_BxT + offsets).reshape(-1), 0)
    first = real & (positions % block == 0)
    size = units * (most + tokens // block)
    queries = jnp.nonzero(first, size=size, fill_value=0)[0].astype(jnp.int32)
    known = jnp.arange(size) < first.sum()
    seen = jnp.zeros(units * (most + 1) + 1, jnp.int32).at[ids].add(1)[ids[queries]]
    if causal:
        seen = jnp.minimum(seen, positions[queries] + block)
    kinds = jnp.searchsorted(jnp.array(widths, jnp.int32), seen)
    kinds = jnp.where(known, kinds, len(widths))
    order = jnp.argsort(kinds, stable=True)
    bounds = jnp.searchsorted(kinds[order], jnp.arange(len(widths) + 1)).astype(jnp.int32)
    queries = queries[order]
    keys = queries - positions[queries]
    return Segments(ids, keys, queries, bounds, widths, causal)


def attend_segments(
    query_BxTxNxH: jax.Array,
    key_BxTxKxH: jax.Array,
    value_BxTxKxH: jax.Array,
    segments: Segments,
    *,
    dropout_rate: float = 0.0,
    seeds: jax.Array | None = None,
    site: jax.Array | int = 0,
) -> jax.Array:
    """What `pref_jax.models.attention.attend` computes, dropout masks included; padding gets 0.

    Args:
      query_BxTxNxH, key_BxTxKxH, value_BxTxKxH: heads; each of the K serves N / K query heads that
        follow each other.
      segments: of the B x T tokens; causal ones for what
        `pref_jax.models.causal_attention.attend_causal` computes.
      dropout_rate: of the probabilities, where there are ``seeds``.
      seeds: of the B units.
      site: which mask of theirs.

    Returns:
      ``[B, T, N, H]``.
    """
    units, tokens, heads, width = query_BxTxNxH.shape
    rate = dropout_rate if seeds is not None else 0.0
    words = jnp.zeros((units, 2), jnp.uint32) if seeds is None else site_seeds(seeds, site)
    groups = key_BxTxKxH.shape[2]

    def flatten(x: jax.Array) -> jax.Array:
        return x.reshape(units * tokens, groups, -1, width).transpose(1, 2, 0, 3)

    out_KxGxFxH = _attend(
        flatten(query_BxTxNxH),
        flatten(key_BxTxKxH)[:, 0],
        flatten(value_BxTxKxH)[:, 0],
        segments,
        words,
        _Plan(tokens, rate),
    )
    return out_KxGxFxH.transpose(2, 0, 1, 3).reshape(units, tokens, heads, width)


class _Plan(NamedTuple):
    """What is known when a program is traced.

    Attributes:
      tokens: of a unit.
      rate: of dropout.
    """

    tokens: int
    rate: float


class _Window(NamedTuple):
    """A piece of the flat axis.

    Attributes:
      start: int32, where it begins.
      mine: bool ``[width]``, which of its tokens belong to the turn.
      at: uint32 ``[width]``, their places inside the packed unit.
    """

    start: jax.Array
    mine: jax.Array
    at: jax.Array

    def of(self, x: jax.Array, axis: int) -> jax.Array:
        return lax.dynamic_slice_in_dim(x, self.start, self.mine.size, axis)

    def put(self, x: jax.Array, part: jax.Array, axis: int) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(x, part, self.start, axis)


class _Cut(NamedTuple):
    """One turn's queries and keys, and the seed words ``[2]`` of their unit."""

    queries: _Window
    keys: _Window
    words: jax.Array

    def seen(self, causal: bool) -> jax.Array:
        """Which keys a query sees, bool ``[width]`` or ``[queries, width]``."""
        if not causal:
            return self.keys.mine
        return self.keys.mine & (self.queries.at[:, None] >= self.keys.at)

    def factor(self, heads: tuple[int, ...], plan: _Plan) -> jax.Array:
        """Dropout's factors ``[K, G, queries, width]`` for heads of that shape.

        The plain formula's index is (head, query, key) inside the unit.
        """
        numbers = jnp.arange(math.prod(heads), dtype=jnp.uint32).reshape(*heads, 1, 1)
        index = numbers * np.uint32(plan.tokens**2)
        index = index + (self.queries.at * np.uint32(plan.tokens))[:, None] + self.keys.at
        keep = keep_elements(index, self.words[0], self.words[1], plan.rate)
        return jnp.where(keep, np.float32(1.0 / (1.0 - plan.rate)), 0.0)


def _cut(
    segments: Segments, words_Bx2: jax.Array, number: jax.Array, width: int, tokens: int
) -> _Cut:
    flat = segments.ids.shape[0]
    segment = segments.ids[segments.keys[number]]
    unit = segments.keys[number] // tokens

    def window(first: jax.Array, size: int) -> _Window:
        # It may reach into the neighbours; at the end of the axis it is moved back.
        start = jnp.minimum(first, flat - size)
        place = start + jnp.arange(size)
        mine = lax.dynamic_slice_in_dim(segments.ids, start, size) == segment
        return _Window(start, mine & (place >= first), (place - unit * tokens).astype(jnp.uint32))

    queries = keys = window(segments.keys[number], width)
    if segments.causal:
        queries = window(segments.queries[number], min(width, _BLOCK))
    return _Cut(queries, keys, lax.dynamic_index_in_dim(words_Bx2, unit, keepdims=False))


def _visit(
    segments: Segments,
    words_Bx2: jax.Array,
    plan: _Plan,
    visit: Callable[[_Cut, Any], Any],
    carry: Any,
) -> Any:
    """Runs ``visit(cut, carry)`` over all segments, width by width.

    Each turn finds the window of the next: what comes from the turn before is there when the scores
    are computed. Found in its own turn, XLA's CPU compiler fuses it into each computation of scores
    and finds it again for each element, which made attention two to four times as slow.
    """
    for kind, width in enumerate(segments.widths):
        first, behind = segments.bounds[kind], segments.bounds[kind + 1]

        def turn(number: jax.Array, state: tuple[_Cut, Any], width: int = width) -> Any:
            cut, carry = state
            carry = visit(cut, carry)
            return _cut(segments, words_Bx2, number + 1, width, plan.tokens), carry

        start = (_cut(segments, words_Bx2, first, width, plan.tokens), carry)
        _, carry = lax.fori_loop(first, behind, turn, start)
    return carry


def _scores(query: jax.Array, key: jax.Array) -> jax.Array:
    scale = np.float32(query.shape[-1] ** -0.5)
    return _product("kgqh,ksh->kgqs", query, key) * scale


def _product(form: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(form, x, y.astype(x.dtype), preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(
    query_KxGxFxH: jax.Array,
    key_KxFxH: jax.Array,
    value_KxFxH: jax.Array,
    segments: Segments,
    words: jax.Array,
    plan: _Plan,
) -> jax.Array:
    return _attend_forward(query_KxGxFxH, key_KxFxH, value_KxFxH, segments, words, plan)[0]


# Both passes are traced once for all layers of a network: they differ by their arguments only.
@functools.partial(jax.jit, static_argnums=5)
def _attend_forward(
    query_KxGxFxH: jax.Array,
    key_KxFxH: jax.Array,
    value_KxFxH: jax.Array,
    segments: Segments,
    words: jax.Array,
    plan: _Plan,
) -> tuple[jax.Array, Any]:
    dtype = query_KxGxFxH.dtype

    def visit(cut: _Cut, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        out, log_sums = carry
        queries, keys = cut.queries, cut.keys
        scores = _scores(queries.of(query_KxGxFxH, 2), keys.of(key_KxFxH, 1))
        scores = jnp.where(cut.seen(segments.causal), scores, _MASKED)
        top = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = weights.sum(axis=-1, keepdims=True)
        if plan.rate:
            weights = weights * cut.factor(scores.shape[:2], plan)
        part = _product("kgqs,ksh->kgqh", weights.astype(dtype), keys.of(value_KxFxH, 1))
        # Divided behind the product: there are fewer of these than of the scores.
        part = (part / total).astype(dtype)
        log_sum = (top + jnp.log(total))[..., 0]
        return (
            queries.put(out, jnp.where(queries.mine[:, None], part, queries.of(out, 2)), 2),
            queries.put(log_sums, jnp.where(queries.mine, log_sum, queries.of(log_sums, 2)), 2),
        )

    start = (jnp.zeros_like(query_KxGxFxH), jnp.zeros(query_KxGxFxH.shape[:3], jnp.float32))
    out, log_sums = _visit(segments, words, plan, visit, start)
    return out, (query_KxGxFxH, key_KxFxH, value_KxFxH, segments, words, out, log_sums)


def _attend_backward(plan: _Plan, saved: Any, d_out: jax.Array) -> tuple:
    segments, words = saved[3:5]
    no_gradient = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), (segments, words))
    return (*_gradients(plan, saved, d_out), *no_gradient)


@functools.partial(jax.jit, static_argnums=0)
def _gradients(plan: _Plan, saved: Any, d_out: jax.Array) -> tuple[jax.Array, ...]:
    """Those of query, key and value."""
    query, key, value, segments, words, out, log_sums = saved
    dtype = query.dtype
    scale = np.float32(query.shape[-1] ** -0.5)
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1)

    def visit(cut: _Cut, carry: tuple) -> tuple:
        queries, keys = cut.queries, cut.keys
        pair = queries.mine[:, None] & cut.seen(segments.causal)
        log_sum, shift = queries.of(log_sums, 2)[..., None], queries.of(delta, 2)[..., None]
        part_query, part_key = queries.of(query, 2), keys.of(key, 1)
        part_out = queries.of(d_out, 2)
        weights = jnp.where(pair, jnp.exp(_scores(part_query, part_key) - log_sum), 0.0)
        d_weights = _product("kgqh,ksh->kgqs", part_out, keys.of(value, 1))
        dropped = weights
        if plan.rate:
            factor = cut.factor(weights.shape[:2], plan)
            dropped, d_weights = weights * factor, d_weights * factor
        d_scores = (weights * (d_weights - shift) * scale).astype(dtype)
        d_query = _product("kgqs,ksh->kgqh", d_scores, part_key)
        d_key = _product("khgq,kgqs->khs", jnp.moveaxis(part_query, -1, 1), d_scores)
        dropped = dropped.astype(dtype)
        d_value = _product("khgq,kgqs->khs", jnp.moveaxis(part_out, -1, 1), dropped)
        parts = ((queries, d_query), (keys, d_key), (keys, d_value))
        return tuple(
            window.put(total, window.of(total, 2) + part, 2)
            for total, (window, part) in zip(carry, parts, strict=True)
        )

    # Those of key and value stand transposed: a product that sums over the first axis of a matrix
    # of scores is several times as slow on a CPU.
    start = tuple(jnp.zeros(x.shape, jnp.float32) for x in (query, key.mT, value.mT))
    d_query, d_key, d_value = _visit(segments, words, plan, visit, start)
    return d_query.astype(dtype), d_key.astype(dtype).mT, d_value.astype(dtype).mT


_attend.defvjp(_attend_forward, _attend_backward)
