"""The simulated arena: its truth is what it says, its texts are as odd as the real ones."""

import csv
import json
import math
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pref_jax.annotation.properties import load_properties
from pref_jax.data import phrases, simulate
from pref_jax.data.arena import LABELS, TEXTS, parse_turns, read_comparisons
from pref_jax.errors import InputError

RATINGS = load_properties().rating_names
FILES = ["annotations.jsonl", "test.csv", "test_labels.csv", "train.csv", "truth.json"]


@pytest.fixture(scope="module")
def rows() -> list[simulate.Row]:
    return simulate.generate(4000, "1/train")


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("arena")
    simulate.simulate(300, 60, 7, folder)
    return folder


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_files_and_columns(arena: Path) -> None:
    assert sorted(path.name for path in arena.iterdir()) == FILES
    train, test = read_csv(arena / "train.csv"), read_csv(arena / "test.csv")
    labels = read_csv(arena / "test_labels.csv")
    assert list(train[0]) == ["id", "model_a", "model_b", *TEXTS, *LABELS]
    assert list(test[0]) == ["id", *TEXTS]
    assert list(labels[0]) == ["id", *LABELS]
    assert (len(train), len(test)) == (300, 60)
    assert [row["id"] for row in labels] == [row["id"] for row in test]
    assert not {row["id"] for row in train} & {row["id"] for row in test}
    assert len({row["id"] for row in train}) == 300


def test_the_same_seed_gives_the_same_bytes(arena: Path, tmp_path: Path) -> None:
    simulate.simulate(300, 60, 7, tmp_path / "same")
    simulate.simulate(300, 60, 8, tmp_path / "other")
    for name in FILES:
        expected = (arena / name).read_bytes()
        assert (tmp_path / "same" / name).read_bytes() == expected
        assert (tmp_path / "other" / name).read_bytes() != expected


def test_truth_is_the_mean_entropy_of_the_probabilities(arena: Path) -> None:
    truth = json.loads((arena / "truth.json").read_text())
    made = simulate.generate(300, "7/train", first_id=30192)
    p = np.array([row.probabilities for row in made])
    assert np.allclose(p.sum(axis=1), 1)
    assert truth["bayes_log_loss"]["train"] == pytest.approx(-(p * np.log(p)).sum(axis=1).mean())
    drawn = [-math.log(row.probabilities[row.label]) for row in made]
    assert truth["realised_log_loss"]["train"] == pytest.approx(np.mean(drawn))
    train = read_csv(arena / "train.csv")
    assert [int(row["id"]) for row in train] == [row.id for row in made]
    assert [[row[name] for name in LABELS].index("1") for row in train] == [
        row.label for row in made
    ]


def test_no_guess_does_better_than_the_bayes_loss() -> None:
    """Monte Carlo: labels drawn again and again cost the truth its entropy, and others more."""
    rows = simulate.generate(4000, "2/train")
    p = np.array([row.probabilities for row in rows])
    generator = random.Random(0)
    losses, blurred = [], []
    q = p**0.8 / (p**0.8).sum(axis=1, keepdims=True)
    for _ in range(20):
        for row in rows:
            row.draw_label(generator)
        drawn = np.array([row.label for row in rows])
        index = np.arange(len(rows))
        losses.append(-np.log(p[index, drawn]).mean())
        blurred.append(-np.log(q[index, drawn]).mean())
    bayes = np.mean([row.entropy for row in rows])
    assert 0.7 < bayes < 0.8
    # 80,000 draws with a standard deviation of about 0.75: four standard errors.
    assert np.mean(losses) == pytest.approx(bayes, abs=0.011)
    assert np.mean(blurred) > np.mean(losses)


def test_labels_can_be_read_from_the_text(rows: list[simulate.Row]) -> None:
    """Quality counted in the parsed opening of each response is the quality of the truth."""
    good, bad = {*phrases.ENGLISH.good}, {*phrases.ENGLISH.bad}
    nouns = {noun for topic in phrases.ENGLISH.topics for noun in topic}
    assert not good & bad and not nouns & (good | bad)
    for row in rows:
        if row.language is not phrases.ENGLISH:
            continue
        for response in row.responses:
            text = parse_turns(json.dumps(response.turns))[0]
            words = re.findall(r"[a-z]+", text.lower())
            marked = [word in good for word in words if word in good or word in bad]
            if len(marked) >= phrases.OPENING_SLOTS:
                assert sum(marked[: phrases.OPENING_SLOTS]) == response.quality
                early = [word in good for word in words[:35] if word in good or word in bad]
                assert len(early) >= phrases.OPENING_SLOTS


def test_quality_beats_length(rows: list[simulate.Row]) -> None:
    from sklearn.linear_model import LogisticRegression

    labels = np.array([row.label for row in rows])
    quality = np.array([[r.quality for r in row.responses] for row in rows], dtype=float)
    length = np.log1p([[sum(len(t or "") for t in r.turns) for r in x.responses] for x in rows])

    def loss(values: np.ndarray) -> float:
        gap = values[:, 0] - values[:, 1]
        features = np.c_[gap, abs(gap)]
        model = LogisticRegression().fit(features[::2], labels[::2])
        p = model.predict_proba(features[1::2])
        return float(-np.log(p[np.arange(len(p)), labels[1::2]]).mean())

    bayes = np.mean([row.entropy for row in rows])
    assert 1.03 < loss(length) < 1.095
    assert loss(quality) < bayes + 0.4 * (loss(length) - bayes)


def test_shares_follow_the_real_file(rows: list[simulate.Row]) -> None:
    shares = np.bincount([row.label for row in rows]) / len(rows)
    assert np.allclose(shares, [0.349, 0.342, 0.309], atol=0.025)
    words = np.array(
        [sum(len((t or "").split()) for t in r.turns) for x in rows for r in x.responses]
    )
    assert 145 < np.median(words) < 175 and 190 < words.mean() < 225 and words.max() > 2500
    prompts = [sum(len((t or "").split()) for t in row.prompt) for row in rows]
    assert 13 <= np.median(prompts) <= 19
    several = np.mean([len(row.prompt) > 1 for row in rows])
    assert 0.08 < several < 0.13
    distinct = len({json.dumps(row.prompt) for row in rows})
    assert 0.84 < distinct / len(rows) < 0.92
    decided = [row for row in rows if row.label < 2]
    longer = [
        (sum(len(t or "") for t in row.responses[row.label].turns))
        > (sum(len(t or "") for t in row.responses[1 - row.label].turns))
        for row in decided
    ]
    assert np.mean(longer) == pytest.approx(0.611, abs=0.025)


def test_quirks_are_there_and_readable(arena: Path) -> None:
    text = (arena / "train.csv").read_text(encoding="utf-8")
    train = read_csv(arena / "train.csv")
    cells = [[json.loads(row[name]) for name in TEXTS] for row in train]
    responses = [side for row in cells for side in row[1:]]
    joined = ["".join(t or "" for t in turns) for row in cells for turns in row]
    assert any(re.search("[\ud800-\udfff]", cell) for cell in joined), "lone surrogate"
    assert any(row[1] == row[2] == [None] for row in cells), "both null"
    assert any(len(turns) > 1 and None in turns for turns in responses), "null among turns"
    assert any(turns in ([None], [], [""], [" "], ["", ""]) for turns in responses)
    assert any(row[0] == [""] for row in cells), "empty prompt"
    assert any(row[1] == row[2] != [None] for row in cells), "identical responses"
    assert any(token in text for token in phrases.SPECIAL_TOKENS)
    assert any(re.search("[\u4e00-\u9fff]", cell) for cell in joined), "Chinese"
    assert any(emoji in cell for emoji in phrases.EMOJI for cell in joined), "emoji"
    assert any(len(row[0]) > 1 for row in cells), "several turns"
    assert any(len(row[1]) != len(row[2]) and len(row[0]) > 1 for row in cells), "uneven turns"
    assert len({json.dumps(row) for row in cells}) < len(cells), "duplicate rows"
    assert any(len(turns[0] or "") > 10_000 for turns in responses if turns), "very long"
    rows = read_comparisons(arena / "train.csv", labelled=True)
    assert len(rows) == 300
    assert len(read_comparisons(arena / "test.csv")) == 60


def test_small_arenas() -> None:
    for count in (1, 2, 13):
        assert len(simulate.generate(count, "0/x")) == count


def test_annotations(arena: Path) -> None:
    lines = [json.loads(line) for line in (arena / "annotations.jsonl").read_text().splitlines()]
    train = read_csv(arena / "train.csv")
    assert [(line["id"], line["side"]) for line in lines] == [
        (row["id"], side) for row in train for side in "ab"
    ]
    keys = ["id", "side", "query", "ratings", "reasons", "key", "model"]
    assert list(lines[0]) == [*keys, "attempts", "tokens", "cost"]
    for line in lines:
        assert list(line["ratings"]) == list(line["reasons"]) == list(RATINGS)
        assert set(line["ratings"].values()) <= {0, 1, 2, 3}
        assert len(line["query"]) == 5 and set(line["query"].values()) <= {0, 1}
    ratings = {name: [line["ratings"][name] for line in lines] for name in RATINGS}
    made = simulate.generate(300, "7/train", first_id=30192)
    quality = [response.quality for row in made for response in row.responses]
    assert np.corrcoef(quality, ratings["clear_and_understandable"])[0, 1] > 0.8
    assert all(len(set(values)) > 1 for values in ratings.values())


def test_wrong_arguments(tmp_path: Path) -> None:
    cases: list[tuple[Any, ...]] = [(0, 1, "--rows"), (1, -1, "--test_rows")]
    for count, test_count, flag in cases:
        with pytest.raises(InputError, match=flag):
            simulate.simulate(count, test_count, 0, tmp_path)
    (tmp_path / "file").write_text("kept")
    with pytest.raises(InputError, match="is a file"):
        simulate.simulate(5, 5, 0, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"


def test_only_an_arena_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_text("mine")
    with pytest.raises(InputError, match=r"test\.csv: is there and not .*; give an empty folder"):
        simulate.simulate(5, 5, 0, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["test.csv"]
    arena = tmp_path / "arena"
    simulate.simulate(5, 5, 0, arena)
    (arena / "settings").write_text("kept")
    before = (arena / "train.csv").read_bytes()
    simulate.simulate(5, 5, 1, arena)
    assert (arena / "train.csv").read_bytes() != before
    assert (arena / "settings").read_text() == "kept"
