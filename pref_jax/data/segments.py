"""Token budgets: how much of each segment a model sees (paper, "custom tokenizer")."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from pref_jax.config import LONGEST_INPUT
from pref_jax.errors import InputError

# Segments of one sequence, each followed by a separator; [CLS] stands before the first.
SEGMENTS = {
    "single": ("prompt", "response_a", "response_b"),
    "parallel": ("prompt", "response"),
    "response": ("prompt", "response"),
}
TRUNCATIONS = ("head", "tail", "head_tail")


@dataclass(frozen=True)
class Layout:
    """The form of a model's input.

    Attributes:
      name: "single": one sequence ``[CLS] prompt [SEP] response_a [SEP] response_b [SEP]``;
        "parallel": a pair of sequences ``[CLS] prompt [SEP] response [SEP]``; "response": the
        same sequence for one response at a time.
      max_length: tokens of a sequence, special tokens included.
      budget: share of each segment in the room left after special tokens; it gets
        ``floor(room x share)`` tokens, the share taken as the decimal that was typed.
      reuse_unused: whether room that nobody's share uses goes to the segments that need more.
      truncation: what of a longer segment is kept: "head", "tail" or "head_tail".

    Raises:
      InputError: the budget cannot be met; names the field of the config.
    """

    name: str
    max_length: int
    budget: tuple[float, ...]
    reuse_unused: bool = False
    truncation: str = "head"

    def __post_init__(self) -> None:
        if self.name not in SEGMENTS:
            _refuse("layout", self.name, f"use one of {', '.join(SEGMENTS)}")
        if self.truncation not in TRUNCATIONS:
            _refuse("truncation", self.truncation, f"use one of {', '.join(TRUNCATIONS)}")
        if not isinstance(self.reuse_unused, bool | np.bool_):
            _refuse("reuse_unused", self.reuse_unused, "use true or false")
        object.__setattr__(self, "budget", tuple(self.budget))
        names = SEGMENTS[self.name]
        if len(self.budget) != len(names):
            _refuse("budget", self.budget, f"give one share each for {', '.join(names)}")
        if not all(_is_share(share) for share in self.budget):
            _refuse("budget", self.budget, "give shares above 0 and at most 1")
        if sum(self._shares) > 1:
            _refuse("budget", self.budget, "give shares that add up to 1 at most")
        if not isinstance(self.max_length, int | np.integer) or isinstance(self.max_length, bool):
            _refuse("max_length", self.max_length, "give a whole number of tokens")
        least = self.num_special + max(math.ceil(1 / share) for share in self._shares)
        if least > LONGEST_INPUT:
            raise InputError(
                "--config.input.budget",
                f"with {self.budget} a segment gets no token below a max_length of {least:,}, and "
                f"that can be {LONGEST_INPUT:,} at most",
                "give larger shares",
            )
        if self.max_length < least:
            _refuse(
                "max_length",
                self.max_length,
                f"give at least {least}, or other shares: with {self.budget} a segment gets none",
            )

    @property
    def sides(self) -> int:
        """Sequences per sample."""
        return 2 if self.name == "parallel" else 1

    @property
    def sequences_per_row(self) -> int:
        """Sequences per comparison: in "response" each of its two responses is a sample."""
        return 1 if self.name == "single" else 2

    @property
    def num_special(self) -> int:
        """Special tokens per sequence."""
        return 1 + len(SEGMENTS[self.name])

    @property
    def room(self) -> int:
        """Tokens per sequence that are left for text."""
        return int(self.max_length) - self.num_special

    @property
    def limits(self) -> tuple[int, ...]:
        """Tokens that each segment may have before unused room moves on."""
        return tuple(math.floor(self.room * share) for share in self._shares)

    @property
    def _shares(self) -> tuple[Fraction, ...]:
        # 0.29 as a float is less than 0.29: of 100 tokens it would take 28.
        return tuple(Fraction(str(float(share))) for share in self.budget)


def _is_share(share: object) -> bool:
    return (
        isinstance(share, int | float | np.number)
        and not isinstance(share, bool)
        and 0 < float(share) <= 1
    )


def _refuse(field: str, value: object, remedy: str) -> None:
    shown = tuple(value) if isinstance(value, tuple | list) else value
    raise InputError(f"--config.input.{field}", f"{shown!r} is not possible", remedy)


def kept_lengths(lengths: np.ndarray, layout: Layout) -> np.ndarray:
    """Tokens kept of each segment.

    Args:
      lengths: tokens of each segment, int [n, segments], columns as in `SEGMENTS`.
      layout: budgets.

    Returns:
      int64 [n, segments]. Unused room moves on in proportion to the shares; a token or two that
      cannot be divided so stay unused, because whoever got them would have an advantage that
      does not follow A and B when they are swapped.
    """
    lengths = np.asarray(lengths, np.int64)
    kept = np.minimum(lengths, np.array(layout.limits, np.int64))
    if not layout.reuse_unused:
        return kept
    millionths = np.array([max(1, round(float(share) * 1e6)) for share in layout.budget], np.int64)
    while True:
        spare = layout.room - kept.sum(axis=1, keepdims=True)
        wanted = lengths - kept
        weights = np.where(wanted > 0, millionths, 0)
        given = spare * weights // np.maximum(weights.sum(axis=1, keepdims=True), 1)
        given = np.minimum(given, wanted)
        if not given.any():
            return kept
        kept += given


def cut(ids: np.ndarray, kept: int, truncation: str) -> np.ndarray:
    """The part of a segment that is kept: a view where it is one piece."""
    if kept >= len(ids):
        return ids
    if truncation == "head":
        return ids[:kept]
    if truncation == "tail":
        return ids[len(ids) - kept :]
    first = (kept + 1) // 2
    return np.concatenate([ids[:first], ids[len(ids) - (kept - first) :]])


def join(segments: Sequence[np.ndarray], cls_id: int, sep_id: int) -> tuple[np.ndarray, int]:
    """One sequence of segments that are cut already.

    Returns:
      Its ids (int32) and the index where token type 1 starts: behind the prompt's separator.
    """
    separator = np.array([sep_id], np.int32)
    parts = [np.array([cls_id], np.int32)]
    for segment in segments:
        parts += [segment.astype(np.int32, copy=False), separator]
    return np.concatenate(parts), len(segments[0]) + 2
