"""What a judge wrote becomes the ratings it gave, or a reason; never other ratings."""

import contextlib
import json
from collections.abc import Callable
from typing import Any

import pytest
from annotation.judge import all_twos, fill
from hypothesis import given, settings
from hypothesis import strategies as st

from pref_jax.annotation.answer import BadAnswerError, parse
from pref_jax.annotation.prompt import Prompt, Question
from pref_jax.annotation.properties import Property, PropertySet, load_properties

INLINE = Prompt(load_properties())
TAGGED = Prompt(load_properties(), inline=False)
BOTH = Prompt(load_properties(), both=True)
QUESTION = Question("Why?", ("Because.",))
TWOS = dict.fromkeys(INLINE.properties.rating_names, 2)


def good(prompt: Prompt = INLINE) -> dict[str, Any]:
    return all_twos({"messages": prompt.messages(QUESTION)})


def reject(text: str, prompt: Prompt = INLINE) -> str:
    with pytest.raises(BadAnswerError) as caught:
        parse(text, prompt)
    return str(caught.value)


def with_reasons(*reasons: str) -> dict[str, Any]:
    answer = good()
    for name, reason in zip(answer["ratings"], reasons, strict=False):
        answer["ratings"][name]["reason"] = reason
    return answer


@pytest.mark.parametrize("prompt", [INLINE, TAGGED])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda g: g,
        lambda g: f"```json\n{g}\n```",
        lambda g: f"```python\nd = {{}}\n```\nHere it is:\n{g}",
        lambda g: f"{g}\nI used {{braces}} and {{}} and {{'a': 1}} here.",
        lambda g: f'{g}\nNote: {{"ratings": "none"}} would be wrong, {{"ratings": {{}} too.',
        lambda g: f"<reasoning>{g.replace('2', '0')}</reasoning>{g}",
        lambda g: f"<think>{g.replace('2', '0')}</think>\n{g}",
        lambda g: f"{g.replace('2', '0')}\n</think>\n{g}",
        lambda g: f"<reasoning>a </ reasoning> b</reasoning>{g}",
        lambda g: f'{{"response": {g}}}',
        lambda g: f"{g.replace('2', '1')}\nNo, wait.\n{g}",
        lambda g: json.dumps(json.loads(g), indent=2),
        lambda g: f"\ufeff{g}",
        lambda g: f"{{{{{g}",
    ],
)
def test_the_last_object_of_the_form_counts(prompt: Prompt, wrap: Callable[[str], str]) -> None:
    (rated,) = parse(wrap(json.dumps(good(prompt))), prompt)
    assert rated.ratings == TWOS and set(rated.query.values()) == {0}


def test_texts_may_hold_anything() -> None:
    odd = ["}", "```", "#### }", 'a "quote"', "line\nbreak\u2028", "🙂 {", "</reasoning>", "{}"]
    (rated,) = parse(f"<reasoning>short</reasoning>{json.dumps(with_reasons(*odd))}", INLINE)
    assert rated.ratings == TWOS
    assert list(rated.reasons.values())[: len(odd)] == odd


def test_reasons_are_kept_and_shortened() -> None:
    (rated,) = parse(json.dumps(with_reasons("x" * 500, "  ")), INLINE)
    assert len(next(iter(rated.reasons.values()))) == 200
    assert len(rated.reasons) == 19  # an empty one is none


def test_drafts_in_tags_are_the_reasons() -> None:
    text = "<reasoning>\nfunny: no joke\n- **polite**: kind\nfunny: a pun\n</reasoning>\n{}\n"
    (rated,) = parse(text + json.dumps(good(TAGGED)), TAGGED)
    assert rated.reasons == {"funny": "a pun", "polite": "kind"}


def test_strings_of_digits_are_numbers() -> None:
    text = json.dumps(good()).replace('"rating": 2', '"rating": "2"')
    assert parse(text, INLINE)[0].ratings == TWOS


def test_both_responses() -> None:
    answer = good(BOTH)
    answer["ratings_b"]["funny"]["rating"] = 0
    a, b = parse(json.dumps(answer), BOTH)
    assert a.ratings == TWOS and b.ratings == {**TWOS, "funny": 0}
    del answer["ratings_b"]
    assert reject(json.dumps(answer), BOTH) == "missing: ratings_b"
    assert reject(json.dumps(good()), BOTH) == "missing: ratings_a"


def change(path: str, value: Any) -> str:
    answer = good()
    part = answer
    *names, last = path.split("/")
    for name in names:
        part = part[name]
    if value is None:
        del part[last]
    else:
        part[last] = value
    return json.dumps(answer)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty answer"),
        (" \n", "empty answer"),
        ("I would say 2 throughout.", "no JSON object"),
        ("{}", "no JSON object of the form"),
        (json.dumps([1]), "no JSON object"),
        (json.dumps(good())[:-30], "no JSON object of the form"),
        (json.dumps(good()).replace("}}", "},}"), "no JSON object of the form"),
        (json.dumps(good()).replace('"', "'"), "no JSON object"),
        (json.dumps(good())[:-1] + "]", "no JSON object of the form"),
        (f"<reasoning>{json.dumps(good())}</reasoning>", "no JSON object of the form"),
        (f"{json.dumps(good())}</think>", "no JSON object of the form"),
        (f'{{"a": {{"response": {json.dumps(good())}}}}}', "no JSON object of the form"),
        (f"{json.dumps(good())} No:\n{json.dumps(good())[:-20]}", "broken JSON"),
        (f"{json.dumps(good())} No:\n{change('ratings/funny/rating', 9)}", "out of range: funny 9"),
        (change("ratings/polite", None), "missing: polite"),
        (change("query/unclear_intent", None), "missing: unclear_intent"),
        (change("query", None), "missing: query"),
        (change("ratings/kind", {"rating": 1}), "unknown: kind"),
        (change("more", 1), "unknown: more"),
        (change("ratings/funny/rating", 7), "out of range: funny 7"),
        (change("ratings/funny/rating", -1), "out of range: funny -1"),
        (change("query/unclear_intent", 2), "out of range: unclear_intent 2"),
        (change("ratings/funny/rating", 2.0), "not a whole number: funny 2.0"),
        (change("ratings/funny/rating", True), "not a whole number: funny True"),
        (change("ratings/funny/rating", "high"), "not a whole number: funny high"),
        (change("ratings/funny", {"reason": "none"}), "missing: rating"),
        (change("ratings", [2] * 20), "no JSON object of the form"),
        (json.dumps(good()).replace('"Funny"', '"funny"').replace('"polite"', '"Polite"'),
         "missing: polite"),
        (json.dumps(good()).replace('"funny":', '"funny": 1, "funny":'), "duplicate key: funny"),
        (json.dumps(good()).replace('"rating":', '"rating": 3, "rating":'),
         "duplicate key: rating"),
        ("{" * 3000, "no JSON object"),
        ('{"a":' * 3000, "no JSON object"),
        ('{"ratings": ' + "9" * 5000 + "}", "no JSON object"),
    ],
)  # fmt: skip
def test_anything_else_is_a_reason(text: str, reason: str) -> None:
    assert reject(text) == reason


@pytest.mark.parametrize("prompt", [INLINE, TAGGED, BOTH])
def test_the_echoed_prompt_is_no_answer(prompt: Prompt) -> None:
    echo = "\n".join(message["content"] for message in prompt.messages(QUESTION))
    assert reject(echo, prompt) == "echoed prompt"
    up_to_examples = echo[: echo.index("## Scale")]
    assert reject(up_to_examples, prompt) == "echoed prompt"
    rated = parse(f"{echo}\n\n{json.dumps(good(prompt))}", prompt)
    assert all(side.ratings == TWOS for side in rated)


@settings(max_examples=300, deadline=None)
@given(
    st.text(alphabet=st.sampled_from('{}[]":,`#<>/ \nabratings01'), max_size=60) | st.text(),
    st.text(alphabet=st.sampled_from('{}[]":,`#<>/ \nabratings01'), max_size=60) | st.text(),
    st.lists(st.integers(0, 3), min_size=20, max_size=20),
    st.text(max_size=20),
)
def test_prose_around_an_answer_never_changes_it(
    before: str, after: str, values: list[int], reason: str
) -> None:
    given_ratings = dict(zip(INLINE.properties.rating_names, values, strict=True))
    answer = good()
    for name, value in given_ratings.items():
        answer["ratings"][name] = {"reason": reason, "rating": value}
    try:
        (rated,) = parse(before + json.dumps(answer, ensure_ascii=False) + after, INLINE)
    except BadAnswerError:
        return
    assert rated.ratings == given_ratings


def test_a_set_without_flags_and_with_another_scale() -> None:
    prompt = Prompt(PropertySet("mine", ("no", "yes"), (), (Property("short", "It is short."),)))
    assert parse('{"ratings": {"short": {"reason": "", "rating": 1}}}', prompt)[0].query == {}
    assert reject('{"ratings": {"short": 2}}', prompt) == "out of range: short 2"
    assert fill(prompt.template, lambda name, size: 1)["ratings"]["short"]["rating"] == 1


@pytest.mark.parametrize(
    "text",
    [
        "{" * 150_000,
        "{}" * 80_000,
        '{"a":' * 30_000,
        '{"a":1,' * 20_000,
        '{"a":{}}</think>' * 10_000,
        "<think>{}</think>" * 10_000,
        '{"a":1,"b":[{},{},{}' + ",{}" * 60_000,
        "{" + ",".join(f'"k{number}":1' for number in range(15_000)) + ',"k1":1}',
        '{"ratings":' * 10_000 + "1" + "}" * 10_000,
    ],
    ids=lambda text: text[:12],
)
def test_what_is_made_to_be_slow_to_read_is_rejected_soon(text: str) -> None:
    for prompt in (INLINE, TAGGED, BOTH):
        assert reject(text, prompt) in (
            "no JSON object",
            "no JSON object of the form",
            "broken JSON",
        )
    # Around an answer the same text costs no more than itself.
    if "</think>" not in text:
        wrapped = f"<think>{text}</think>{json.dumps(good())}"
        with contextlib.suppress(BadAnswerError):
            assert parse(wrapped, INLINE)[0].ratings == TWOS
