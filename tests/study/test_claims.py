"""A claim is decided where the evidence lies on one side, and left open where it does not."""

from collections import Counter

import numpy as np
import pytest

from pref_jax.study.claims import Claim, judge, make_claims
from pref_jax.study.plan import make_models

CLAIM = Claim("topic", "a is better than b", "a", "b")


def draw(seeds: int, rows: int, gap: float, noise: float, seed: int = 0) -> dict[str, np.ndarray]:
    """Losses of two models that differ by ``gap`` on average; hard rows are hard for both."""
    generator = np.random.default_rng(seed)
    common = generator.gamma(2.0, 0.5, rows)
    first = common + gap + noise * generator.standard_normal((seeds, rows))
    return {"a": first, "b": np.tile(common, (seeds, 1))}


@pytest.mark.parametrize(
    ("gap", "lower", "verdict"),
    [
        (-0.05, True, "supported"),
        (0.05, True, "contradicted"),
        (-0.05, False, "contradicted"),
        (0.05, False, "supported"),
        (0.0, True, "undecided"),
        (0.0, False, "undecided"),
    ],
)
def test_the_verdict_follows_the_interval(gap: float, lower: bool, verdict: str) -> None:
    claim = Claim("topic", "text", "a", "b", lower=lower)
    outcome = judge(claim, draw(1, 500, gap, 0.2))
    assert outcome["verdict"] == verdict
    low, high = outcome["ci95"]
    assert low < outcome["difference"] < high and outcome["rows"] == 500


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    covered = 0
    for seed in range(100):
        low, high = judge(CLAIM, draw(1, 200, 0.03, 0.3, seed))["ci95"]
        covered += low <= 0.03 <= high
    assert 88 <= covered <= 100


def test_luck_between_seeds_widens_the_interval() -> None:
    losses = draw(4, 2000, 0.0, 0.1)
    alike = judge(CLAIM, losses)
    lucky = judge(CLAIM, {**losses, "a": losses["a"] + np.array([[-0.2], [0.05], [-0.1], [0.1]])})
    width, wider = (outcome["ci95"][1] - outcome["ci95"][0] for outcome in (alike, lucky))
    assert wider > 5 * width and lucky["verdict"] == "undecided" and lucky["seeds"] == 4


def test_the_papers_statements() -> None:
    claims = make_claims(make_models("paper"))
    assert Counter(claim.topic for claim in claims) == {
        "Two sequences beat one": 2,
        "Annotations help, but for one model": 4,
        "Larger is better": 2,
        "LLaMA is best": 8,
    }
    keys = {model.key for model in make_models("paper")}
    assert len(keys) == 9 and all({claim.first, claim.second} <= keys for claim in claims)
    (exception,) = [claim for claim in claims if not claim.lower]
    assert exception.first == "parallel_bert-base_annotated"
    # Of one backbone there is nothing to say about size or LLaMA.
    assert len(make_claims(make_models("minilm"))) == 1 + 2
