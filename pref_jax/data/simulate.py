"""A simulated arena with a known truth.

Texts are made of a question about a topic and two answers; every feature that the judge sees can
be read from the text, early in it and throughout:

* quality, 0 to 6: how many of the six quality words in the opening sentence of each turn are good
  ones; in the sentences after it each quality word is good with probability quality / 6;
* length: characters of the whole response; openings also say "In short" and "In detail";
* style: a polite, an informal or an apologetic first sentence, or none;
* format: sentences as a bulleted list;
* topic: 4 % of the responses use the nouns of another topic.

The utility of a response is a weighted sum of these (:data:`WEIGHTS`). With ``s`` the difference of
the two utilities plus a small bonus for the first position, the label is drawn from the softmax of
``(s / 2, -s / 2, TIE_LEVEL - TIE_SLOPE |s|)``: near utilities make a tie likely. No model can have
a lower expected log loss than the mean entropy of these probabilities, which is the
``bayes_log_loss`` of ``truth.json``; ``realised_log_loss`` is the same model's log loss on the
labels as they were drawn.

Shares follow the real file: labels about .35/.34/.31, the longer response wins 61 % of decided
rows, a tenth of the rows has several turns, a tenth repeats an earlier prompt, and :data:`QUIRKS`.
"""

import csv
import hashlib
import io
import json
import math
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pref_jax.annotation.properties import load_properties
from pref_jax.data import phrases
from pref_jax.data.arena import LABELS, TEXTS
from pref_jax.errors import InputError
from pref_jax.files import make_output_folder, refuse_foreign_files, write_durably

# Of a response's utility: per good opening word, per e-fold of length, and per marker.
WEIGHTS = {
    "quality": 0.68,
    "length": 1.2,
    "polite": 0.3,
    "informal": -0.3,
    "apology": -0.6,
    "formatted": 0.4,
    "off_topic": -1.0,
}
POSITION_BONUS = 0.05
TIE_LEVEL = 1.27
TIE_SLOPE = 0.6

# Share of rows with each quirk; files of 300 rows and more have each at least once.
QUIRKS = {
    "lone_surrogate": 0.01,
    "null_both": 0.0004,
    "null_turn": 0.0015,
    "null_side": 0.0015,
    "empty_prompt": 0.0001,
    "special_tokens": 0.005,
    "identical_responses": 0.004,
    "duplicate_row": 0.001,
    "chinese": 0.03,
    "spanish": 0.01,
    "emoji": 0.03,
    "uneven_turns": 0.003,
    "very_long": 0.001,
}
REPEATED_PROMPTS = 0.1
SEVERAL_TURNS = 0.1
_ALWAYS_FROM = 300
# The truth comes first: it tells that the others are an arena's, should the rest be cut short.
FILES = ("truth.json", "train.csv", "test.csv", "test_labels.csv", "annotations.jsonl")
_EMPTY_SIDES: tuple[list[str | None], ...] = ([None], [], [""], [" "], ["", ""])

ANNOTATED_ROWS = 4000  # The study rated about this many queries.

Turns = list[str | None]


@dataclass(frozen=True)
class Response:
    """A response and what a reader can see in it.

    Attributes:
      turns: its texts; None is a null turn.
      quality: good words among the six of each opening.
      style: ``polite``, ``informal``, ``apology`` or empty.
    """

    turns: Turns
    quality: int
    style: str = ""
    formatted: bool = False
    off_topic: bool = False

    @property
    def utility(self) -> float:
        """What the judge thinks of it; differences of it decide."""
        characters = sum(len(turn or "") for turn in self.turns)
        utility = WEIGHTS["quality"] * self.quality + WEIGHTS["length"] * math.log(50 + characters)
        utility += WEIGHTS.get(self.style, 0.0)
        return utility + sum(
            WEIGHTS[name] for name in ("formatted", "off_topic") if getattr(self, name)
        )


@dataclass
class Row:
    """One comparison, its true probabilities and the label drawn from them."""

    id: int
    prompt: Turns
    responses: tuple[Response, Response]
    models: tuple[str, str]
    language: phrases.Language
    topic: tuple[str, ...]
    probabilities: tuple[float, float, float] = field(init=False)
    label: int = field(init=False)

    def __post_init__(self) -> None:
        self.probabilities = true_probabilities(*self.responses)

    def draw_label(self, generator: random.Random) -> None:
        """Draws the judge's answer."""
        draw = generator.random()
        first, second, _ = self.probabilities
        self.label = 0 if draw < first else 1 if draw < first + second else 2

    @property
    def entropy(self) -> float:
        """Expected log loss of the truth on this row, in nats."""
        return -sum(p * math.log(p) for p in self.probabilities)


def true_probabilities(a: Response, b: Response) -> tuple[float, float, float]:
    """Probabilities of ``winner_model_a, winner_model_b, winner_tie``."""
    s = a.utility - b.utility + POSITION_BONUS
    logits = (s / 2, -s / 2, TIE_LEVEL - TIE_SLOPE * abs(s))
    largest = max(logits)
    weights = [math.exp(logit - largest) for logit in logits]
    total = sum(weights)
    return weights[0] / total, weights[1] / total, weights[2] / total


def simulate(rows: int, test_rows: int, seed: int, output: str | os.PathLike[str]) -> None:
    """Writes the files of an arena.

    ``train.csv`` and ``test.csv`` in the competition's columns, ``test_labels.csv``,
    ``annotations.jsonl`` and ``truth.json`` (log loss of the truth on both files). The same
    arguments give the same bytes.

    Args:
      rows: rows of ``train.csv``, at least 1; its first 4,000 rows are annotated.
      test_rows: rows of ``test.csv``, at least 1.
      seed: another seed, another arena.
      output: folder, made if missing; the files of an earlier arena in it are replaced.

    Raises:
      InputError: no rows, the folder cannot be written, or it holds files of these names that are
        not of an arena.
      RunError: the disk is full.
    """
    for flag, value in (("--rows", rows), ("--test_rows", test_rows)):
        if value < 1:
            raise InputError(flag, f"{value} rows", "ask for at least 1")
    folder = make_output_folder(Path(output))
    if not _is_truth(folder / "truth.json"):
        refuse_foreign_files(folder, FILES, "a simulated arena")
    train = generate(rows, f"{seed}/train", first_id=30192)
    test = generate(test_rows, f"{seed}/test", first_id=train[-1].id + 1000)
    truth = {
        "rows": rows,
        "test_rows": test_rows,
        "seed": seed,
        "bayes_log_loss": {"train": _bayes(train), "test": _bayes(test)},
        "realised_log_loss": {"train": _realised(train), "test": _realised(test)},
        "weights": WEIGHTS,
        "position_bonus": POSITION_BONUS,
        "tie_level": TIE_LEVEL,
        "tie_slope": TIE_SLOPE,
    }
    header = ["id", "model_a", "model_b", *TEXTS, *LABELS]
    files: dict[str, Callable[[io.TextIOBase], None]] = {
        "train.csv": lambda file: _write_csv(
            file, header, ([r.id, *r.models, *_texts(r), *_one_hot(r)] for r in train)
        ),
        "test.csv": lambda file: _write_csv(
            file, ["id", *TEXTS], ([r.id, *_texts(r)] for r in test)
        ),
        "test_labels.csv": lambda file: _write_csv(
            file, ["id", *LABELS], ([r.id, *_one_hot(r)] for r in test)
        ),
        "annotations.jsonl": lambda file: file.writelines(
            json.dumps(line) + "\n" for line in _annotations(train[:ANNOTATED_ROWS], seed)
        ),
        "truth.json": lambda file: file.writelines([json.dumps(truth, indent=2), "\n"]),
    }
    for name in FILES:
        text = io.StringIO(newline="")
        files[name](text)
        write_durably(folder / name, text.getvalue().encode())


def write_labelled_test(folder: Path) -> None:
    """Writes ``test_labelled.csv``: the rows of an arena's ``test.csv`` with their labels.

    ``launch/evaluate.py`` reads both from one file.
    """
    csv.field_size_limit(2**31 - 1)
    with open(folder / "test_labels.csv", encoding="utf-8", newline="") as file:
        labels = {row["id"]: row for row in csv.DictReader(file)}
    with open(folder / "test.csv", encoding="utf-8", newline="") as file:
        rows = [row | labels[row["id"]] for row in csv.DictReader(file)]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_durably(folder / "test_labelled.csv", text.getvalue().encode())


def _is_truth(path: Path) -> bool:
    try:
        return "bayes_log_loss" in json.loads(path.read_bytes())
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def generate(rows: int, seed: str, first_id: int = 0) -> list[Row]:
    """Comparisons with their truth; ids rise from ``first_id`` with gaps, as in the real file."""
    plan = random.Random(f"{seed}/plan")
    quirks = _plan_quirks(rows, plan)
    made: list[Row] = []
    identity = first_id
    for index in range(rows):
        generator = random.Random(f"{seed}/{index}")
        identity += 1 + int(generator.expovariate(1 / 60_000))
        row = _row(identity, generator, quirks.get(index, ""), made)
        row.draw_label(generator)
        made.append(row)
    return made


def _plan_quirks(rows: int, generator: random.Random) -> dict[int, str]:
    """Which row has which quirk: exact shares, spread at random, one quirk a row."""
    order = list(range(rows))
    generator.shuffle(order)
    plan: dict[int, str] = {}
    shares = {**QUIRKS, "repeated_prompt": REPEATED_PROMPTS}
    for name, share in shares.items():
        count = round(rows * share) or (1 if rows >= _ALWAYS_FROM else 0)
        while count and order:
            plan[order.pop()] = name
            count -= 1
    return plan


def _row(identity: int, generator: random.Random, quirk: str, made: Sequence[Row]) -> Row:
    first, second = generator.sample(phrases.MODELS, 2)
    models = (first, second)
    earlier = made[int(generator.random() * len(made))] if made else None
    if quirk == "duplicate_row" and earlier:
        return Row(identity, earlier.prompt, earlier.responses, models, *_about(earlier))
    language = {"chinese": phrases.CHINESE, "spanish": phrases.SPANISH}.get(quirk, phrases.ENGLISH)
    topic = _pick(generator, language.topics)
    turns = 1
    if generator.random() < SEVERAL_TURNS or quirk in ("null_turn", "uneven_turns"):
        turns = 2 + min(int(generator.expovariate(1.0)), 6)
    if quirk == "repeated_prompt" and earlier:
        prompt, (language, topic), turns = earlier.prompt, _about(earlier), len(earlier.prompt)
    else:
        prompt = [_prompt_turn(generator, language, topic) for _ in range(turns)]
    if quirk == "empty_prompt":
        prompt = [""]
    common = generator.gauss(0, 1)
    a, b = (
        _response(generator, language, topic, max(turns, 1), common, quirk == "very_long")
        for _ in range(2)
    )
    a, b, prompt = _with_quirk(generator, quirk, a, b, prompt)
    return Row(identity, prompt, (a, b), models, language, topic)


def _about(row: Row) -> tuple[phrases.Language, tuple[str, ...]]:
    return row.language, row.topic


def _with_quirk(
    generator: random.Random, quirk: str, a: Response, b: Response, prompt: Turns
) -> tuple[Response, Response, Turns]:
    """The row as the real file would have it."""
    side = generator.random() < 0.5
    changed = a if side else b
    if quirk == "lone_surrogate":
        # Half of an emoji, as when a text is cut between its two UTF-16 units.
        half = chr(0xD83D if generator.random() < 0.7 else 0xDE00)
        changed = _with_turns(changed, [*changed.turns[:-1], f"{changed.turns[-1]} {half}"])
    elif quirk == "null_both":
        return Response([None], 0), Response([None], 0), prompt
    elif quirk == "null_turn":
        changed = _with_turns(changed, [*changed.turns[:-1], None])
    elif quirk == "null_side":
        changed = Response(list(_pick(generator, _EMPTY_SIDES)), 0)
    elif quirk == "special_tokens":
        token = _pick(generator, phrases.SPECIAL_TOKENS)
        prompt = [f"What does {token} mean? {prompt[0]}", *prompt[1:]]
        changed = _with_turns(changed, [f"{changed.turns[0]} {token}", *changed.turns[1:]])
    elif quirk == "identical_responses":
        return a, a, prompt
    elif quirk == "emoji":
        emoji = _pick(generator, phrases.EMOJI)
        prompt = [f"{prompt[0]} {emoji}", *prompt[1:]]
        changed = _with_turns(changed, [f"{changed.turns[0]} {emoji}", *changed.turns[1:]])
    elif quirk == "uneven_turns":
        changed = _with_turns(changed, changed.turns[:-1])
    return (changed, b, prompt) if side else (a, changed, prompt)


def _with_turns(response: Response, turns: Turns) -> Response:
    return Response(turns, response.quality, response.style, response.formatted, response.off_topic)


# Texts


def _pick(generator: random.Random, values: Sequence[Any]) -> Any:
    return values[int(generator.random() * len(values))]


def _prompt_turn(generator: random.Random, language: phrases.Language, topic: Sequence[str]) -> str:
    words = 15 * math.exp(generator.gauss(0, 0.9))
    context = [_pick(generator, language.contexts)] if language.contexts else []
    text = _fill(generator, _pick(generator, language.questions), topic, context)
    while _count(text, language) + 6 < words:
        detail = _fill(generator, _pick(generator, language.details), topic)
        text = f"{text}{language.space}{detail}"
    return text


def _response(
    generator: random.Random,
    language: phrases.Language,
    topic: Sequence[str],
    turns: int,
    common: float,
    very_long: bool,
) -> Response:
    # More very good and very bad answers than middling ones: sin^2 of a uniform angle.
    ends = math.sin(generator.random() * math.pi / 2) ** 2
    quality = min(int(ends * (phrases.OPENING_SLOTS + 1)), phrases.OPENING_SLOTS)
    style = _pick(generator, ("polite", "polite", "informal", "apology", "", "", "", ""))
    formatted = generator.random() < 0.25
    off_topic = generator.random() < 0.04
    if off_topic:
        topic = _pick(generator, [other for other in language.topics if other != topic])
    # Median 160 words, mean about 205; the two sides of a row share part of their length.
    words = 160 * math.exp(0.45 * common + 0.53 * generator.gauss(0, 1))
    if very_long:
        words = generator.uniform(2500, 9000)
    texts: Turns = []
    for turn in range(turns):
        lead = getattr(language, style) if style and not turn else ""
        if not turn:
            lead += language.short if words < 100 else language.long if words > 260 else ""
        texts.append(lead + _answer(generator, language, topic, quality, words / turns, formatted))
    return Response(texts, quality, style, formatted, off_topic)


def _answer(
    generator: random.Random,
    language: phrases.Language,
    topic: Sequence[str],
    quality: int,
    words: float,
    formatted: bool,
) -> str:
    draw = generator.random
    share = quality / phrases.OPENING_SLOTS
    slots = [True] * quality + [False] * (phrases.OPENING_SLOTS - quality)
    generator.shuffle(slots)
    good, bad = language.good, language.bad
    opening = (
        (good[int(draw() * len(good))] if slot else bad[int(draw() * len(bad))]) for slot in slots
    )
    body = iter(
        lambda: good[int(draw() * len(good))] if draw() < share else bad[int(draw() * len(bad))],
        None,
    )
    sentences = [_fill(generator, _pick(generator, language.openings), topic, opening)]
    count = _count(sentences[0], language)
    while count < words - 6:
        sentence = _fill(generator, _pick(generator, language.bodies), topic, body)
        count += _count(sentence, language)
        sentences.append(sentence)
    return ("\n- " if formatted else language.space).join(sentences)


def _fill(
    generator: random.Random,
    template: tuple[str, str],
    topic: Sequence[str],
    words: Iterable[str] = (),
) -> str:
    """A sentence: ``n`` slots from the topic, all others in order from ``words``."""
    draw = generator.random
    text, kinds = template
    words = iter(words)
    return text % tuple(
        topic[int(draw() * len(topic))] if kind == "n" else next(words) for kind in kinds
    )


def _count(text: str, language: phrases.Language) -> float:
    """Words; Chinese has about 1.7 characters to an English word."""
    return text.count(" ") + 1 if language.space else len(text) / 1.7


# Annotations


def _annotations(rows: Sequence[Row], seed: int) -> Iterator[dict[str, Any]]:
    """Ratings of every response, noisy functions of what is in the text."""
    model = "simulated-judge"
    flags = load_properties().flag_names
    for row in rows:
        generator = random.Random(f"{seed}/annotations/{row.id}")
        query = {
            name: int(generator.random() < share)
            for name, share in zip(flags, _FLAG_SHARES, strict=True)
        }
        query["explicit_constraints"] |= any("Keep it under" in (t or "") for t in row.prompt)
        query["subjective_stances"] |= any("My own view" in (t or "") for t in row.prompt)
        prompt, *texts = _texts(row)
        for side, response, text in zip("ab", row.responses, texts, strict=True):
            ratings = _ratings(generator, response)
            content = json.dumps([prompt, text, "simulated-1", model])
            tokens = {"prompt": 900 + len(prompt + text) // 4, "completion": 420}
            yield {
                "id": str(row.id),
                "side": side,
                "query": query,
                "ratings": ratings,
                "reasons": {name: _REASONS[rating] for name, rating in ratings.items()},
                "key": hashlib.sha256(content.encode()).hexdigest(),
                "model": model,
                "attempts": 1 if generator.random() < 0.95 else 2,
                "tokens": tokens,
                "cost": round(tokens["prompt"] * 1e-6 + tokens["completion"] * 3e-6, 8),
            }


_FLAG_SHARES = (0.1, 0.08, 0.05, 0.05, 0.06)
_REASONS = ("no trace of it", "a little of it", "mostly there", "fully there")


def _ratings(generator: random.Random, response: Response) -> dict[str, int]:
    q = (response.quality - 3) / 2
    characters = sum(len(turn or "") for turn in response.turns)
    length = max(min(math.log((50 + characters) / 1000), 2.0), -2.0)
    polite, informal, apology = (
        float(response.style == name) for name in ("polite", "informal", "apology")
    )
    formatted, off_topic = float(response.formatted), float(response.off_topic)
    centres = {
        "harmlessness": 2.6 + 0.3 * q,
        "grammar_and_spelling": 2.1 + 0.5 * q - 0.6 * informal,
        "friendly": 1.0 + 0.3 * q + 1.2 * polite + 0.8 * informal,
        "polite": 1.1 + 0.3 * q + 1.6 * polite - 0.8 * informal + 0.6 * apology,
        "interactive": 0.6 + 0.7 * polite + 0.6 * informal,
        "authoritative_tone": 1.4 + 0.5 * q - 0.9 * apology - 0.7 * informal,
        "funny": 0.2 + 1.5 * informal,
        "figures_of_speech": 0.4 + 0.3 * length,
        "complex_words_and_sentences": 1.2 + 0.5 * length,
        "explicit_supporting_materials": 1.0 + 0.4 * q + 0.5 * length,
        "well_formatted": 0.8 + 0.2 * q + 1.7 * formatted,
        "admits_limitations_or_mistakes": 0.3 + 2.2 * apology,
        "persuades_the_user": 1.2 + 0.7 * q,
        "step_by_step_solution": 0.6 + 1.3 * formatted + 0.3 * length,
        "informal_expressions": 0.2 + 2.3 * informal,
        "non_repetitive": 1.9 - 0.6 * length,
        "clear_and_understandable": 1.5 + 1.0 * q,
        "relevance": 2.0 + 0.6 * q - 1.8 * off_topic,
        "novelty": 1.0 + 0.4 * q,
        "information_richness": 1.5 + 0.5 * q + 0.8 * length,
    }
    return {
        name: min(max(round(centre + generator.gauss(0, 0.45)), 0), 3)
        for name, centre in centres.items()
    }


# Files


def _texts(row: Row) -> list[str]:
    # ASCII escapes, as the real file has them: also the only way to write a lone surrogate.
    return [json.dumps(turns) for turns in (row.prompt, *(r.turns for r in row.responses))]


def _one_hot(row: Row) -> list[int]:
    return [int(row.label == label) for label in range(len(LABELS))]


def _bayes(rows: Sequence[Row]) -> float:
    return math.fsum(row.entropy for row in rows) / len(rows)


def _realised(rows: Sequence[Row]) -> float:
    return math.fsum(-math.log(row.probabilities[row.label]) for row in rows) / len(rows)


def _write_csv(file: io.TextIOBase, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
