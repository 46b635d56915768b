"""From what a judge wrote to ratings, or to the reason why there are none.

The answer is the last JSON object that has the form asked for and stands outside closed reasoning
tags. Objects are found by decoding from each brace on, so that braces, fences and quotes inside
texts, and prose around the object, do no harm. Nothing is repaired.
"""

import bisect
import collections
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pref_jax.annotation.prompt import Prompt

LONGEST_REASON = 200  # characters
_LONGEST_ANSWER = 200_000  # characters
_MOST_ATTEMPTS = 5_000  # braces that begin no object
_SIDES = {1: ("ratings",), 2: ("ratings_a", "ratings_b")}
_TAGS = re.compile(r"<(/?)(reasoning|think|thinking)>", re.IGNORECASE)
_STARTED = re.compile(r'\{\s*"(query|ratings|ratings_a)"\s*:')
_WORDS = 40  # of a wrong name, shown
_COPIED = 200  # characters of the instructions
_TELLING = 8  # ratings that are equal by chance once in 4 ** 8 answers


class BadAnswerError(Exception):
    """No ratings in it; the message is short and begins with what can be counted."""


@dataclass(frozen=True)
class Rated:
    """Ratings of one response.

    Attributes:
      query: 0 or 1 per flag.
      ratings: an index into the scale per property.
      reasons: the judge's draft per property, where it wrote one.
    """

    query: dict[str, int]
    ratings: dict[str, int]
    reasons: dict[str, str]


def parse(text: str, prompt: Prompt) -> tuple[Rated, ...]:
    """The ratings in an answer: of the one response, or of both.

    Raises:
      BadAnswerError: there are none that can be trusted.
    """
    if not text.strip():
        raise BadAnswerError("empty answer")
    if len(text) > _LONGEST_ANSWER:
        raise BadAnswerError("answer too long")
    objects = list(_find_objects(text))
    thoughts = list(_find_thoughts(text, objects))
    candidates = [
        (end, inner)
        for start, end, value in objects
        if not _is_inside(start, thoughts) and (inner := _unwrap(value)) is not None
    ]
    if not candidates:
        raise BadAnswerError("no JSON object" if not objects else "no JSON object of the form")
    end, answer = candidates[-1]
    rest = _blank(text, sorted([*thoughts, *((start, end) for start, end, _ in objects)]))[end:]
    if (cut := _STARTED.search(rest)) and any(
        f'"{name}"' in rest[cut.start() :] for name in prompt.properties.rating_names
    ):
        raise BadAnswerError("broken JSON")  # a later version of the answer was begun
    if answer == prompt.template or _is_echo(text, answer, prompt):
        raise BadAnswerError("echoed prompt")
    return _check(answer, prompt, _read_drafts(text, thoughts, prompt))


def is_one_object(text: str) -> bool:
    """Whether an answer is a JSON object and nothing else: the server enforced a form."""
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


class _Object(dict[str, Any]):
    """A JSON object that remembers a key that was there twice, in it or in a part of it."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.repeated: str | None = None
        if len(self) < len(pairs):
            names = [name for name, _ in pairs]
            self.repeated = collections.Counter(names).most_common(1)[0][0]
        for _, value in pairs:
            if isinstance(value, _Object) and value.repeated is not None:
                self.repeated = self.repeated or value.repeated


_DECODER = json.JSONDecoder(object_pairs_hook=_Object)


def _is_echo(text: str, answer: _Object, prompt: Prompt) -> bool:
    """Whether an example was copied, and not rated alike by chance, as few properties are."""
    if answer not in prompt.examples:
        return False
    is_telling = prompt.inline or len(prompt.properties.ratings) >= _TELLING
    return is_telling or prompt.instructions[:_COPIED] in text


def _find_objects(text: str) -> Iterator[tuple[int, int, _Object]]:
    """Start, end and value of every JSON object that is not inside another one."""
    start, failed = text.find("{"), 0
    while start >= 0:
        try:
            value, end = _DECODER.raw_decode(text, start)
        except (ValueError, RecursionError):
            end, failed = start + 1, failed + 1
            if failed > _MOST_ATTEMPTS:
                raise BadAnswerError("broken JSON") from None
        else:
            yield start, end, value
        start = text.find("{", end)


def _find_thoughts(text: str, objects: list[tuple[int, int, _Object]]) -> Iterator[tuple[int, int]]:
    """Start and end of what stands in closed reasoning tags.

    A tag inside a JSON object is part of a text. A closing tag without an opening one ends what
    began with the answer: some servers put the opening tag into the question.
    """
    opened: int | None = None
    closed = 0
    spans = [(start, end) for start, end, _ in objects]
    for tag in _TAGS.finditer(text):
        if _is_inside(tag.start(), spans):
            continue
        if not tag[1]:
            opened = tag.start() if opened is None else opened
        elif opened is not None:
            yield opened, tag.end()
            opened, closed = None, tag.end()
        else:
            yield closed, tag.end()
            closed = tag.end()


def _unwrap(value: _Object) -> _Object | None:
    """The object that has the form's keys: ``value``, or the only value in it."""
    for _ in range(2):
        if any(isinstance(value.get(name), dict) for names in _SIDES.values() for name in names):
            return value
        inner = list(value.values())
        if value.repeated is not None or len(inner) != 1 or not isinstance(inner[0], _Object):
            return None
        value = inner[0]
    return None


def _check(
    answer: _Object, prompt: Prompt, drafts: tuple[dict[str, str], ...]
) -> tuple[Rated, ...]:
    if answer.repeated is not None:
        raise BadAnswerError(f"duplicate key: {answer.repeated[:_WORDS]}")
    sides = _SIDES[prompt.sides]
    flags = prompt.properties.flag_names
    parts = (["query"] if flags else []) + list(sides)
    _check_names(answer.keys() - {"reasons"}, parts)  # drafts apart do no harm
    query = _read_numbers(answer["query"], flags, 2)[0] if flags else {}
    rated = []
    for side, drafted in zip(sides, drafts, strict=True):
        ratings, reasons = _read_numbers(
            answer[side], prompt.properties.rating_names, len(prompt.properties.scale)
        )
        rated.append(Rated(query, ratings, drafted | reasons))
    return tuple(rated)


def _check_names(found: Any, wanted: Any) -> None:
    if missing := next((name for name in wanted if name not in found), None):
        raise BadAnswerError(f"missing: {missing}")
    if unknown := next((name for name in found if name not in wanted), None):
        raise BadAnswerError(f"unknown: {unknown[:_WORDS]}")


def _read_numbers(
    part: Any, names: tuple[str, ...], size: int
) -> tuple[dict[str, int], dict[str, str]]:
    """Numbers below ``size`` and drafts by name; a value is a number or an object that holds it."""
    if not isinstance(part, dict):
        raise BadAnswerError(f"missing: {names[0]}")
    _check_names(part, names)
    numbers, reasons = {}, {}
    for name in names:
        value = part[name]
        if isinstance(value, dict):
            _check_names(value.keys() - {"reason"}, ["rating"])
            reason, value = value.get("reason"), value["rating"]
            if isinstance(reason, str) and reason.strip():
                reasons[name] = _shorten(reason)
        if isinstance(value, str) and re.fullmatch(r"[0-9]{1,2}", value.strip()):
            value = int(value)
        if type(value) is not int:
            raise BadAnswerError(f"not a whole number: {name} {str(value)[:_WORDS]}")
        if not 0 <= value < size:
            raise BadAnswerError(f"out of range: {name} {str(value)[:_WORDS]}")
        numbers[name] = value
    return numbers, reasons


def _read_drafts(
    text: str, thoughts: list[tuple[int, int]], prompt: Prompt
) -> tuple[dict[str, str], ...]:
    """Lines "name: draft" in the reasoning, per response; of two for one name the last counts."""
    drafts: tuple[dict[str, str], ...] = tuple({} for _ in range(prompt.sides))
    if prompt.inline:
        return drafts
    names = "|".join(map(re.escape, prompt.properties.rating_names))
    line = re.compile(rf"^[\s*#-]*({names})(?: ([AB]))?[*\s]*:(.*)$", re.MULTILINE)
    for start, end in thoughts:
        for name, side, draft in line.findall(text[start:end]):
            if draft.strip() and bool(side) == prompt.both:
                drafts[side == "B"][name] = _shorten(draft.strip())
    return drafts


def _is_inside(place: int, spans: list[tuple[int, int]]) -> bool:
    """Whether a character is in one of some spans, which are in order and do not overlap."""
    before = bisect.bisect_right(spans, place, key=lambda span: span[0])
    return before > 0 and place < spans[before - 1][1]


def _blank(text: str, spans: list[tuple[int, int]]) -> str:
    """The text with spaces for the spans, which are in order and may overlap."""
    pieces, done = [], 0
    for start, end in spans:
        pieces += [text[done:start], " " * (end - max(start, done))]
        done = max(done, end)
    return "".join([*pieces, text[done:]])


def _shorten(text: str) -> str:
    return text if len(text) <= LONGEST_REASON else f"{text[: LONGEST_REASON - 1]}…"
