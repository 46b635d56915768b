"""What the paper says of its models, each claim with what was measured here."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pref_jax.study.plan import LAYOUTS, TITLES, Model

RESAMPLES = 2000
SUPPORTED, CONTRADICTED, UNDECIDED = "supported", "contradicted", "undecided"


@dataclasses.dataclass(frozen=True)
class Claim:
    """One statement that comes down to two models.

    Attributes:
      topic: the paper's sentence that it is a part of.
      text: the statement.
      first, second: keys of the models; the statement is about loss of first - loss of second.
      lower: whether the first is said to have the lower loss; else not to.
    """

    topic: str
    text: str
    first: str
    second: str
    lower: bool = True


def make_claims(models: Sequence[Model]) -> list[Claim]:
    """The paper's claims about these models."""
    keys = {model.key for model in models}
    titles = {model.key: model.title for model in models}
    backbones = list(dict.fromkeys(m.backbone for m in models if m.backbone != "llama"))
    claims = [
        Claim(
            "Two sequences beat one",
            f"{TITLES['parallel']} {TITLES[backbone]} is better than {TITLES['single']}",
            f"parallel_{backbone}",
            f"single_{backbone}",
        )
        for backbone in backbones
    ]
    for backbone in backbones:
        for layout in LAYOUTS:
            # The paper found the one exception; of other backbones it says nothing.
            helps = (layout, backbone) != ("parallel", "bert-base")
            name = f"{TITLES[layout]} {TITLES[backbone]}"
            claims.append(
                Claim(
                    "Annotations help, but for one model",
                    f"Annotations make {name} better"
                    if helps
                    else f"Annotations do not make {name} better",
                    f"{layout}_{backbone}_annotated",
                    f"{layout}_{backbone}",
                    lower=helps,
                )
            )
    if {"single_bert-base", "single_distilbert"} <= keys:
        claims += [
            Claim(
                "Larger is better",
                f"{TITLES[layout]} BERT-base is better than DistilBERT",
                f"{layout}_bert-base",
                f"{layout}_distilbert",
            )
            for layout in LAYOUTS
        ]
    if "llama" in keys:
        claims += [
            Claim("LLaMA is best", f"LLaMA is better than {titles[key]}", "llama", key)
            for key in titles
            if key != "llama"
        ]
    return claims


def judge(claim: Claim, losses: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Tests a claim on the test rows, over all seeds.

    Args:
      claim: what is said.
      losses: of each model ``[seeds, rows]``, the same rows in the same order.

    Returns:
      ``difference`` (mean of first - second), ``ci95`` (percentile bootstrap over rows, and over
      seeds where there are several), ``seeds``, ``rows`` and ``verdict``: supported or contradicted
      where the interval lies on one side of zero, else undecided.
    """
    gap = losses[claim.first] - losses[claim.second]
    seeds, rows = gap.shape
    generator = np.random.default_rng(0)
    means = np.empty(RESAMPLES)
    for sample in range(RESAMPLES):
        drawn = gap[generator.integers(seeds, size=seeds)] if seeds > 1 else gap
        means[sample] = drawn.mean(axis=0)[generator.integers(rows, size=rows)].mean()
    low, high = (float(bound) for bound in np.percentile(means, [2.5, 97.5]))
    verdict = UNDECIDED
    if high < 0 or low > 0:
        verdict = SUPPORTED if (high < 0) == claim.lower else CONTRADICTED
    return {
        "topic": claim.topic,
        "claim": claim.text,
        "first": claim.first,
        "second": claim.second,
        "difference": float(gap.mean()),
        "ci95": [low, high],
        "seeds": seeds,
        "rows": rows,
        "verdict": verdict,
    }
