"""What a judge rates is one file, and a wrong file is one line."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from pref_jax.annotation.properties import DEFAULT_FILE, load_properties
from pref_jax.errors import InputError


def test_the_study_has_eighteen_and_two_ratings_and_five_flags() -> None:
    properties = load_properties()
    assert len(properties.flags) == 5 and len(properties.ratings) == 20
    aware = [rating.name for rating in properties.ratings if rating.query_aware]
    assert aware == ["relevance", "novelty"]
    # The order of the taxonomy's ids 0 to 19, which the heads follow.
    assert properties.rating_names[0] == "harmlessness"
    assert properties.rating_names[15:] == (
        "non_repetitive",
        "clear_and_understandable",
        "relevance",
        "novelty",
        "information_richness",
    )
    assert len(properties.scale) == 4


def test_another_set_is_another_digest(tmp_path: Path) -> None:
    text = DEFAULT_FILE.read_text()
    same, other = tmp_path / "same.toml", tmp_path / "other.toml"
    same.write_text("# A remark changes nothing.\n" + text)
    other.write_text(text.replace("and could.", "and does."))
    assert load_properties(same) == load_properties()
    assert load_properties(other).digest != load_properties().digest


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: "", "it has no name"),
        (lambda t: "name = ", "is not TOML"),
        (lambda t: t.replace("[[flags]]", "[[flag]]"), "unknown key 'flag'"),
        (lambda t: t.replace('"perfectly"', '"not at all"'), "scale"),
        (lambda t: t[: t.index("[[ratings]]")], "it has no ratings"),
        (lambda t: t.replace('"funny"', '"polite"'), "polite is there twice"),
        (lambda t: t.replace('"funny"', '"Funny!"'), "ratings 7"),
        (lambda t: t.replace("query_aware = true", "query_aware = 1"), "query_aware"),
        (lambda t: re.sub("definition = .*could.*", "", t), "no definition"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, change: Callable[[str], str], named: str) -> None:
    path = tmp_path / "set.toml"
    path.write_text(change(DEFAULT_FILE.read_text()))
    with pytest.raises(InputError, match=re.escape(named)) as caught:
        load_properties(path)
    assert str(path) in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_properties(tmp_path / "none.toml")
