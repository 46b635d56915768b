"""Run folders made by hand, as `launch/train.py` leaves them."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pref_jax.evaluation.baselines import Baselines
from pref_jax.evaluation.predictions import Predictions

MakeRun = Callable[..., Path]


def make_rows(rows: int, skill: float, seed: int = 0) -> Predictions:
    """Rows whose verdicts do not depend on ``skill``, predictions that do (1: perfect odds)."""
    random = np.random.default_rng(seed)
    words = np.exp(random.normal(4.5, 1, (rows, 3))).astype(int)
    gap = np.log1p(words[:, 1]) - np.log1p(words[:, 2])
    logits = np.stack([gap, -gap, 0.8 - np.abs(gap)], 1) + random.normal(0, 1, (rows, 3))
    truth = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = np.array([random.choice(3, p=row) for row in truth])
    guess = np.exp(skill * logits)
    sources = np.array(["chat <arena>", "forum & co", None], object)[np.arange(rows) % 3]
    return Predictions(
        ids=[f"{seed}-{row}" for row in range(rows)],
        probabilities=guess / guess.sum(1, keepdims=True),
        labels=labels,
        tie_allowed=np.where(labels == 2, True, np.arange(rows) % 7 != 0),
        words=words,
        turns=1 + np.arange(rows) % 5,
        sources=sources.tolist(),
    )


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """``make_run(name, skill=, finished=, rows=, seed=)`` -> the folder."""

    def make(
        name: str, skill: float = 0.6, finished: bool = True, rows: int = 300, seed: int = 0
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        config = {"seed": 0, "data": {"train": str(tmp_path / "train.csv")}, "skill": skill}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "environment.json").write_text('{"device": "cpu"}')
        random = np.random.default_rng(seed)
        lines = []
        for step in range(1, 201):
            loss = 1.1 - 0.15 * skill * step / 200 + random.normal(0, 0.05)
            lines.append({"step": step, "split": "train", "loss": loss, "rows_per_second": 9.5})
            if step % 40 == 0:
                loss = 1.1 - 0.13 * skill * step / 200
                lines.append({"step": step, "split": "valid", "loss": loss, "log_loss": loss})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        if finished:
            training = make_rows(400, 0, seed=99)
            fitted = Baselines.fit(training.words, training.labels, training.tie_allowed)
            fitted.save(folder / "baselines.json")
            held_out = make_rows(rows, skill, seed)
            held_out.write(folder / "valid_predictions.csv")
            scores = held_out.evaluate(fitted)
            result = {
                "steps": 200,
                "best_step": 160,
                "valid": scores,
                "baselines": scores["baselines"],
                "rows_per_second": 9.53,
                "train_seconds": 672.0,
            }
            (folder / "result.json").write_text(json.dumps(result))
        return folder

    return make
