"""Token budgets: how much of each segment a model sees (paper, "custom tokenizer")."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from pref_jax.config import LONGEST_INPUT
from pref_jax.errors import InputError

if TYPE_CHECKING:
    from pref_jax.data.tokenizers import Tokenizer

# Segments of one sequence. An encoder has [CLS] before the first and [SEP] behind each; a decoder
# has the pieces of a template before, between and behind them.
SEGMENTS = {
    "single": ("prompt", "response_a", "response_b"),
    "parallel": ("prompt", "response"),
    "response": ("prompt", "response"),
    "decoder": ("prompt", "response_a", "response_b"),
}
TRUNCATIONS = ("head", "tail", "head_tail", "turns")


@dataclass(frozen=True)
class Layout:
    """The form of a model's input.

    Attributes:
      name: "single": one sequence ``[CLS] prompt [SEP] response_a [SEP] response_b [SEP]``;
        "parallel": a pair of sequences ``[CLS] prompt [SEP] response [SEP]``; "response": the
        same sequence for one response at a time; "decoder": one sequence, the three segments in a
        template.
      max_length: tokens of a sequence, special tokens included.
      budget: share of each segment in the room left after special tokens; it gets
        ``floor(room x share)`` tokens, the share taken as the decimal that was typed.
      reuse_unused: whether room that nobody's share uses goes to the segments that need more.
      truncation: what of a longer segment is kept: "head", "tail", "head_tail", or with "turns" the
        head of each turn of the conversation, all turns having the same room.
      template: of "decoder": text with {prompt}, {response_a} and {response_b}, each once and in
        this order, and something behind the last.
      marker: text that stands where a segment was cut, out of the segment's own budget; a segment
        that keeps no more tokens than it has does without. None: nothing does.
      num_fixed: of "decoder": tokens of begin-of-text and template, once the tokenizer is known.

    Raises:
      InputError: the budget cannot be met; names the field of the config.
    """

    name: str
    max_length: int
    budget: tuple[float, ...]
    reuse_unused: bool = False
    truncation: str = "head"
    template: str | None = None
    num_fixed: int = 0
    marker: str | None = None

    def __post_init__(self) -> None:
        if self.name not in SEGMENTS:
            _refuse("layout", self.name, f"use one of {', '.join(SEGMENTS)}")
        if self.truncation not in TRUNCATIONS:
            _refuse("truncation", self.truncation, f"use one of {', '.join(TRUNCATIONS)}")
        if not isinstance(self.reuse_unused, bool | np.bool_):
            _refuse("reuse_unused", self.reuse_unused, "use true or false")
        if self.marker is not None and not self.marker.strip():
            _refuse("marker", self.marker, "give a text such as [...], or none")
        object.__setattr__(self, "budget", tuple(self.budget))
        if self.name == "decoder":
            split_template(self.template)
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
        # A template's tokens are counted later: what is said has to be the whole truth.
        if self.max_length < least and not (self.name == "decoder" and not self.num_fixed):
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
        return 1 if self.name in ("single", "decoder") else 2

    @property
    def pools_last(self) -> bool:
        """Whether a sequence is judged by its last token; else by its first."""
        return self.name == "decoder"

    @property
    def num_special(self) -> int:
        """Tokens per sequence that are not the user's text."""
        if self.name == "decoder":
            return self.num_fixed
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


NO_MARKER = np.zeros(0, np.int32)


def cut(
    ids: np.ndarray,
    kept: int,
    truncation: str,
    marker: np.ndarray = NO_MARKER,
    ends: Sequence[int] = (),
) -> np.ndarray:
    """What a model sees of a segment: ``kept`` ids, those of a marker included where it is cut.

    A view where it is one piece of the segment.

    Args:
      ids: of the whole segment.
      kept: how many may stay.
      truncation: one of `TRUNCATIONS`.
      marker: stands where ids are missing.
      ends: for "turns": where turns end in ``ids``, but for the last.
    """
    if kept >= len(ids):
        return ids
    if truncation == "turns":
        # Counted on beginnings of the text, which byte pairs may cut into a token more.
        turns = np.split(ids, np.maximum.accumulate(np.minimum(ends, len(ids)).astype(int)))
        rooms = _divide([len(turn) for turn in turns], kept)
        pairs = zip(turns, rooms, strict=True)
        return np.concatenate([cut(turn, room, "head", marker) for turn, room in pairs])
    if len(marker) >= kept:
        marker = NO_MARKER
    kept -= len(marker)
    first = {"head": kept, "tail": 0, "head_tail": (kept + 1) // 2}[truncation]
    pieces = [ids[:first], marker, ids[len(ids) - (kept - first) :]]
    filled = [piece for piece in pieces if len(piece)]
    return filled[0] if len(filled) == 1 else np.concatenate([ids[:0], *filled])


def _divide(lengths: Sequence[int], room: int) -> list[int]:
    """The same room for each of several texts; what short ones leave goes to the longer ones, and
    what cannot be divided to the longest."""
    rooms = [0] * len(lengths)
    shortest_first = sorted(range(len(lengths)), key=lambda index: lengths[index])
    for place, index in enumerate(shortest_first):
        rooms[index] = min(lengths[index], room // (len(lengths) - place))
        room -= rooms[index]
    return rooms


def split_template(template: str | None) -> list[str]:
    """The four pieces of text around the segments of a decoder.

    Raises:
      InputError: a placeholder is missing, twice or out of order, or nothing closes the template.
    """
    where = "--config.input.template"
    pieces, rest = [], template or ""
    for name in SEGMENTS["decoder"]:
        placeholder = "{" + name + "}"
        if rest.count(placeholder) != 1:
            raise InputError(
                where,
                f"{placeholder} has to be there once, behind what comes before it",
                "give a text with {prompt}, {response_a} and {response_b} in this order",
            )
        before, rest = rest.split(placeholder)
        pieces.append(before)
    if not rest.strip():
        raise InputError(
            where,
            "it ends with {response_b}",
            "add a closing line that asks for the verdict: its last token is read",
        )
    return [*pieces, rest]


class Form:
    """How the segments of one sequence, cut already, are put together.

    Attributes:
      layout: the layout, with the number of tokens that are not the user's.
      fixed: the ids around the segments, int32, one array more than there are segments.
      marker: the ids that stand where a segment was cut, int32; empty where nothing does.
    """

    def __init__(self, layout: Layout, tokenizer: "Tokenizer") -> None:
        """Raises: InputError: the template leaves no room, the tokenizer none of the marker."""
        self.marker = NO_MARKER
        if layout.marker is not None:
            (self.marker,) = tokenizer.encode([layout.marker])
            if not len(self.marker):
                _refuse("marker", layout.marker, "this tokenizer has no token for it: give another")
        if layout.name == "decoder":
            # Each piece by itself, so that no text of a user can merge with it.
            pieces = tokenizer.encode(split_template(layout.template))
            if tokenizer.bos_id is not None:
                pieces[0] = np.concatenate([np.array([tokenizer.bos_id], np.int32), pieces[0]])
            self.layout = dataclasses.replace(layout, num_fixed=sum(map(len, pieces)))
            self.fixed = pieces
        else:
            separator = np.array([tokenizer.sep_id], np.int32)
            self.layout = layout
            start = np.array([tokenizer.cls_id], np.int32)
            self.fixed = [start, *[separator] * len(SEGMENTS[layout.name])]

    def join(self, segments: Sequence[np.ndarray]) -> tuple[np.ndarray, int]:
        """One sequence: its ids (int32), and where token type 1 starts: behind the prompt's
        separator."""
        parts = [self.fixed[0]]
        for segment, piece in zip(segments, self.fixed[1:], strict=True):
            parts += [segment.astype(np.int32, copy=False), piece]
        return np.concatenate(parts), sum(map(len, parts[:3]))
