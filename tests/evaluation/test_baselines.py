"""Baselines: sensible on data, alive on data that is hardly there."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import log_loss

from pref_jax.errors import InputError
from pref_jax.evaluation.baselines import NAMES, Baselines, count_words, sample_rows

SHARED = Path(os.environ.get("PREF_JAX_SHARED", Path(__file__).parents[3] / "shared"))


def _biased_rows(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Judges who like the longer response, and call a tie where lengths are alike."""
    random = np.random.default_rng(seed)
    words = np.exp(random.normal(4, 1, (rows, 3))).astype(int)
    gap = np.log1p(words[:, 1]) - np.log1p(words[:, 2])
    tie = random.random(rows) < 0.6 * np.exp(-np.abs(gap))
    first = random.random(rows) < 1 / (1 + np.exp(-2 * gap))
    return words, np.where(tie, 2, np.where(first, 0, 1))


def test_length_finds_the_length_bias_and_the_prior_does_not() -> None:
    words, labels = _biased_rows(2000)
    fitted = Baselines.fit(words, labels)
    test_words, test_labels = _biased_rows(2000, seed=1)
    loss = {
        name: log_loss(test_labels, fitted.predict(name, test_words), labels=[0, 1, 2])
        for name in NAMES
    }
    assert loss["uniform"] == pytest.approx(np.log(3))
    assert loss["length"] < loss["prior"] - 0.1 < loss["uniform"] - 0.1


def test_prior_is_the_shares_of_the_labels() -> None:
    words, labels = _biased_rows(500)
    shares = np.bincount(labels, minlength=3) / 500
    assert Baselines.fit(words, labels).predict("prior", words)[0] == pytest.approx(shares)


def test_rows_that_could_not_tie_say_nothing_about_ties() -> None:
    words, labels = _biased_rows(400)
    more_words, more_labels = words[labels != 2], np.zeros((labels != 2).sum(), int)
    allowed = np.r_[np.ones(400, bool), np.zeros(len(more_words), bool)]
    alone = Baselines.fit(words, labels)
    mixed = Baselines.fit(np.r_[words, more_words], np.r_[labels, more_labels], allowed)
    for name in ("prior", "length"):
        with_them, without = mixed.predict(name, words), alone.predict(name, words)
        assert with_them[:, 2] == pytest.approx(without[:, 2])
        assert (with_them[:, 0] > without[:, 0]).all()


@pytest.mark.parametrize(
    "labels", [[], [2], [0], [1, 1], [0, 0, 2], [0, 1], [2, 2, 2], [-1, -1], [0, 1, 2]]
)
def test_few_rows_and_missing_classes_give_whole_positive_rows(labels: list[int]) -> None:
    words = np.arange(3 * len(labels)).reshape(-1, 3)
    fitted = Baselines.fit(words, np.array(labels, int))
    for name in NAMES:
        got = fitted.predict(name, np.array([[0, 0, 0], [10, 99999, 1]]))
        assert got.shape == (2, 3) and (got > 0).all() and np.isfinite(got).all()
        assert got.sum(1) == pytest.approx(1)


def test_a_saved_file_predicts_the_same(tmp_path: Path) -> None:
    words, labels = _biased_rows(100)
    fitted = Baselines.fit(words, labels)
    fitted.save(tmp_path / "baselines.json")
    loaded = Baselines.load(tmp_path / "baselines.json")
    assert loaded == fitted
    assert (loaded.predict("length", words) == fitted.predict("length", words)).all()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        *(("", "is not JSON"), ("[]", "is not a JSON object")),
        *((text, "not a file of fitted baselines") for text in ("{}", '{"prior": [1, 2]}')),
    ],
)
def test_another_file_is_refused(tmp_path: Path, content: str, expected: str) -> None:
    path = tmp_path / "baselines.json"
    path.write_text(content)
    with pytest.raises(InputError, match=expected):
        Baselines.load(path)
    with pytest.raises(InputError, match="is missing"):
        Baselines.load(tmp_path / "none.json")


def test_words_are_counted_for_the_rows_asked_for_in_their_order() -> None:
    import pyarrow as pa

    class Comparisons:
        table = pa.table(
            {
                "id": ["1", "2"],
                "prompt": ["one two", ""],
                "response_a": [" a\n\nb  c ", "x"],
                "response_b": ["", "y z"],
            }
        )

    assert count_words(Comparisons()).tolist() == [[2, 3, 0], [0, 1, 2]]
    assert count_words(Comparisons(), [1, 0, 1]).tolist() == [[0, 1, 2], [2, 3, 0], [0, 1, 2]]


def test_many_rows_are_fitted_on_a_sample_that_says_the_same() -> None:
    words, labels = _biased_rows(250_000)
    rows = np.arange(len(labels))[::-1]
    chosen = sample_rows(rows)
    assert len(np.unique(chosen)) == 100_000 and chosen[0] > 249_000 and chosen[-1] < 1000
    np.testing.assert_array_equal(sample_rows(rows[:100_000]), rows[:100_000])
    test_words, test_labels = _biased_rows(5000, seed=1)
    losses = []
    for part in (rows, chosen):
        fitted = Baselines.fit(words[part], labels[part])
        losses.append(log_loss(test_labels, fitted.predict("length", test_words)))
    assert abs(losses[0] - losses[1]) < 1e-3


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real data at {SHARED} (PREF_JAX_SHARED)")
def test_real_benchmark(tmp_path: Path) -> None:
    tool = SHARED / "tools" / "split_benchmark.py"
    subprocess.run([sys.executable, str(tool), str(tmp_path)], check=True, capture_output=True)
    names = ("winner_model_a", "winner_model_b", "winner_tie")

    def read(name: str) -> tuple[np.ndarray, np.ndarray]:
        csv.field_size_limit(10**9)
        with open(tmp_path / name, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        sides = ("prompt", "response_a", "response_b")
        words = [[len(" ".join(map(str, json.loads(r[s]))).split()) for s in sides] for r in rows]
        return np.array(words), np.array([[int(r[n]) for n in names] for r in rows]).argmax(1)

    fitted = Baselines.fit(*read("train.csv"))
    words, labels = read("test.csv")
    loss = {name: log_loss(labels, fitted.predict(name, words), labels=[0, 1, 2]) for name in NAMES}
    assert loss["prior"] == pytest.approx(1.083, abs=0.001)
    assert loss["length"] == pytest.approx(1.028, abs=0.001)
