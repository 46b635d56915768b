"""The head that training starts from is the best one there is for frozen states."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rig import TINY, nothing_of_the_users, simulate, train

from pref_jax.config_file import load
from pref_jax.experiment import Experiment, find_backbone, load_run
from pref_jax.training import probe
from pref_jax.training.goals import PreferenceGoal, make_goal, read_data
from pref_jax.training.probe import fit_head

LAYOUTS = {
    "single": [],
    "parallel": [("input.layout", "parallel"), ("model.length_features", "true")],
    "scores": [
        ("input.layout", "parallel"),
        ("model.symmetric", "true"),
        ("model.pooling", "cls_mean"),
        ("model.length_features", "true"),
    ],
    "orders": [("model.symmetric", "true"), ("model.pooling", "mean")],
    "decoder": [
        ("input.layout", "decoder"),
        ("model.family", "llama"),
        ("model.lora.rank", "2"),
        ("input.max_length", "128"),
    ],
}


@pytest.fixture(scope="module", autouse=True)
def cached(tmp_path_factory: pytest.TempPathFactory):
    with nothing_of_the_users(tmp_path_factory.mktemp("cache")):
        yield


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulate(tmp_path_factory.mktemp("arena"), rows=160, test_rows=1) / "train.csv"


def prepare(rows: Path, changes: list[tuple[str, str]]) -> tuple[Experiment, Any, Any]:
    name, *flags = TINY
    fields = dict(flag.removeprefix("--config.").split("=") for flag in flags)
    fields |= {"data.train": str(rows)} | dict(changes)
    config = load(name.removeprefix("--config="), list(fields.items()))
    data = read_data(config)
    experiment = Experiment(config, find_backbone(config, data.train))
    goal = make_goal(experiment, data)
    assert isinstance(goal, PreferenceGoal)
    return experiment, goal, goal.make_samples()[0]


def predict(experiment: Experiment, params: Any, samples: Any, numbers: np.ndarray) -> np.ndarray:
    logits = experiment.make_predictor().logits(params, samples, numbers).astype(np.float64)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return logits


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_no_other_head_is_better(rows: Path, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole model with the new head: penalised loss at a minimum, which a step leaves."""
    monkeypatch.setattr(probe, "_PENALTIES", (0.01,))
    monkeypatch.setattr(probe, "_GRADIENT", 1e-7)
    experiment, goal, samples = prepare(rows, LAYOUTS[layout])
    numbers, labels = goal.train_numbers, samples.labels[goal.train_numbers]
    params = experiment.initial_params()
    fitted = fit_head(experiment, params, samples, numbers, goal.groups)
    for name in params:
        assert (fitted[name] is params[name]) == (name != "head")
    states = experiment.make_predictor(states=True).logits(params, samples, numbers)
    scale = states.reshape(len(numbers), experiment.sides, -1).var(axis=0).mean()

    def loss(params: Any) -> float:
        logits = predict(experiment, params, samples, numbers)
        kernels = [leaf for leaf in _leaves(params["head"]) if leaf.ndim > 1]
        squares = sum(float((kernel**2).sum()) for kernel in kernels)
        return -logits[np.arange(len(labels)), labels].mean() + 0.005 * scale * squares

    best = loss(fitted)
    assert best < loss(params) - 0.01
    random = np.random.default_rng(0)
    for _ in range(6):
        moved = jax.tree.map(
            lambda leaf: leaf + random.normal(0, 0.05, leaf.shape).astype(np.float32),
            fitted["head"],
        )
        assert loss({**fitted, "head": moved}) > best


def _leaves(tree: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def test_a_linear_head_is_that_of_scikit_learn(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sklearn.linear_model import LogisticRegression

    monkeypatch.setattr(probe, "_PENALTIES", (0.03,))
    monkeypatch.setattr(probe, "_GRADIENT", 1e-7)
    experiment, goal, samples = prepare(rows, LAYOUTS["single"])
    numbers, labels = goal.train_numbers, samples.labels[goal.train_numbers]
    params = experiment.initial_params()
    fitted = fit_head(experiment, params, samples, numbers, goal.groups)
    states = experiment.make_predictor(states=True).logits(params, samples, numbers)
    # It sums losses where ours are a mean, and C is of the losses.
    strength = 1.0 / (0.03 * states.var(axis=0).mean() * len(numbers))
    theirs = LogisticRegression(C=strength, max_iter=20_000, tol=1e-10)
    theirs.fit(states.astype(np.float64), labels)
    found = predict(experiment, fitted, samples, numbers)
    np.testing.assert_allclose(found, theirs.predict_log_proba(states), atol=5e-3)


def test_the_penalty_is_that_of_prompts_left_out(rows: Path) -> None:
    """Labels that are noise ask for a large one; labels that states tell, for a small one."""
    experiment, goal, samples = prepare(rows, LAYOUTS["single"])
    numbers = goal.train_numbers
    params = experiment.initial_params()
    states = experiment.make_predictor(states=True).logits(params, samples, numbers)

    def choose(labels: np.ndarray, groups: np.ndarray) -> float:
        samples.labels = np.zeros(len(samples.labels), np.int8)
        samples.labels[numbers] = labels
        with jax.enable_x64(True):
            fitter = probe._Fitter(experiment, params["head"], states, samples, numbers)
            return fitter.choose_penalty(groups)

    noise = np.random.default_rng(0).integers(0, 3, len(numbers))
    assert choose(noise, np.arange(len(numbers))) >= 1.0
    centred = states - states.mean(axis=0)
    direction = np.linalg.svd(centred, full_matrices=False)[2][0]
    told = np.digitize(centred @ direction, np.quantile(centred @ direction, [1 / 3, 2 / 3]))
    assert choose(told, np.arange(len(numbers))) < 0.1
    assert choose(told, np.zeros(len(numbers), int)) == max(probe._PENALTIES)


def test_a_run_starts_from_the_fitted_head(rows: Path, tmp_path: Path) -> None:
    still = ("--config.train.learning_rate=1e-12", "--config.train.max_steps=1")
    train(tmp_path / "run", f"--config.data.train={rows}", *still, "--config.train.fit_head=true")
    run = load_run(tmp_path / "run")
    experiment, goal, samples = prepare(rows, [("train.max_steps", "1")])
    params = experiment.initial_params()
    fitted = fit_head(experiment, params, samples, goal.train_numbers, goal.groups)
    for name, leaf in fitted["head"].items():
        np.testing.assert_allclose(run.params["head"][name], leaf, atol=1e-6)
        assert np.abs(np.asarray(leaf) - np.asarray(params["head"][name])).max() > 1e-3
