"""A head that is told lengths starts from what they tell."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rig import TINY, nothing_of_the_users, simulate, train

from pref_jax.config_file import load
from pref_jax.experiment import Experiment, find_backbone, load_run
from pref_jax.training.goals import make_goal, read_data
from pref_jax.training.length_prior import fit_lengths

TOLD = ("model.length_features", "true")
KINDS = {
    "linear": [("input.layout", "parallel"), TOLD],
    "scores": [("input.layout", "parallel"), ("model.symmetric", "true"), TOLD],
    "orders": [
        ("input.layout", "single"),
        ("model.symmetric", "true"),
        ("model.pooling", "cls_mean"),
        TOLD,
    ],
    "decoder": [TOLD],
}
_TINY_DECODER = ("--config=configs/llama_lora.py:tiny", "--config.input.max_length=128")


@pytest.fixture(scope="module", autouse=True)
def cached(tmp_path_factory: pytest.TempPathFactory):
    with nothing_of_the_users(tmp_path_factory.mktemp("cache")):
        yield


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulate(tmp_path_factory.mktemp("arena"), rows=160, test_rows=1) / "train.csv"


def prepare(rows: Path, kind: str) -> tuple[Experiment, Any, np.ndarray]:
    name, *flags = _TINY_DECODER if kind == "decoder" else TINY
    fields = dict(flag.removeprefix("--config.").split("=") for flag in flags)
    fields |= {"data.train": str(rows), "train.max_steps": "1"} | dict(KINDS[kind])
    config = load(name.removeprefix("--config="), list(fields.items()))
    data = read_data(config)
    experiment = Experiment(config, find_backbone(config, data.train))
    goal = make_goal(experiment, data)
    return experiment, goal.make_samples()[0], goal.train_numbers


def predict(experiment: Experiment, params: Any, samples: Any, numbers: np.ndarray) -> np.ndarray:
    """Logarithms of the probabilities that the head gives where texts tell nothing."""
    trunk = "decoder" if experiment.is_decoder else "encoder"
    blind = {**params, trunk: jax.tree.map(lambda leaf: leaf * 0.0, params[trunk])}
    logits = experiment.make_predictor().logits(blind, samples, numbers)
    logits = logits.astype(np.float64)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("kind", list(KINDS))
def test_no_other_weights_of_lengths_are_better(rows: Path, kind: str) -> None:
    """Where all weights are zero states are too, so the whole model sees lengths alone."""
    experiment, samples, numbers = prepare(rows, kind)
    assert experiment.head == {"decoder": "linear"}.get(kind, kind)
    labels = samples.labels[numbers]
    params = experiment.initial_params()
    fitted = fit_lengths(experiment, params, samples, numbers)
    assert all(fitted[name] is params[name] for name in params if name != "head")

    def loss(head: Any) -> float:
        logits = predict(experiment, {**fitted, "head": head}, samples, numbers)
        return -float(logits[np.arange(len(labels)), labels].mean())

    best = loss(fitted["head"])
    prior = np.bincount(labels, minlength=3) / len(labels)
    assert best < -float(np.log(prior[labels]).mean()) - 0.02 and best < loss(params["head"])
    random = np.random.default_rng(0)
    for _ in range(5):
        moved = jax.tree.map(
            lambda leaf: leaf + random.normal(0, 0.1, leaf.shape).astype(np.float32),
            fitted["head"],
        )
        assert loss(moved) > best
    # What sees states is as it was drawn.
    flat = [jax.tree.leaves(tree["head"]) for tree in (params, fitted)]
    changed = sum(int((np.asarray(a) != np.asarray(b)).sum()) for a, b in zip(*flat, strict=True))
    assert changed <= {"scores": 6}.get(kind, 12)


def test_a_linear_head_is_a_regression_on_three_numbers(rows: Path) -> None:
    from sklearn.linear_model import LogisticRegression

    experiment, samples, numbers = prepare(rows, "linear")
    fitted = fit_lengths(experiment, experiment.initial_params(), samples, numbers)
    lengths = np.log1p([samples.text_lengths(int(number)) for number in numbers])
    features = np.column_stack([lengths, lengths[:, 0] - lengths[:, 1]])
    theirs = LogisticRegression(C=1.0, max_iter=10_000, tol=1e-9)
    theirs.fit(features, samples.labels[numbers])
    found = predict(experiment, fitted, samples, numbers)
    np.testing.assert_allclose(found, theirs.predict_log_proba(features), atol=0.02)


def test_a_dozen_rows_are_not_learned_by_heart(rows: Path) -> None:
    """Held-out rows lose little by the fit, where there is next to nothing to fit."""
    experiment, samples, numbers = prepare(rows, "scores")
    few, others = numbers[:12], numbers[12:]
    fitted = fit_lengths(experiment, experiment.initial_params(), samples, few)
    logits = predict(experiment, fitted, samples, others)
    loss = -float(logits[np.arange(len(others)), samples.labels[others]].mean())
    assert loss < np.log(3) + 0.25


def test_a_run_starts_from_it_unless_told_not_to(rows: Path, tmp_path: Path) -> None:
    flags = [f"--config.{name}={value}" for name, value in KINDS["scores"]]
    flags += [f"--config.data.train={rows}", "--config.train.max_steps=1"]
    flags += ["--config.train.learning_rate=1e-12"]
    experiment, samples, numbers = prepare(rows, "scores")
    drawn = experiment.initial_params()
    fitted = fit_lengths(experiment, drawn, samples, numbers)
    for told, wanted in (("true", fitted), ("false", drawn)):
        train(tmp_path / told, *flags, f"--config.train.fit_lengths={told}")
        found = load_run(tmp_path / told).params["head"]
        for leaf, other in zip(
            jax.tree.leaves(found), jax.tree.leaves(wanted["head"]), strict=True
        ):
            np.testing.assert_allclose(leaf, other, atol=1e-6)
