"""What a run tells at its end, what it would take, and how far two judges agree."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pref_jax.annotation.budget import Budget
from pref_jax.annotation.properties import PropertySet, load_properties
from pref_jax.annotation.ratings import MISSING, read_ratings
from pref_jax.annotation.store import Place, Store
from pref_jax.errors import InputError

_WIDTH = 34  # of the column of names


@dataclass(frozen=True)
class Estimate:
    """What asking would take.

    Attributes:
      messages: of the first question.
      responses: asked about in all.
      requests: questions whose answers are not there yet.
      prompt, completion: tokens, from lengths.
      cost: by the prices given.
    """

    messages: Sequence[Mapping[str, str]]
    responses: int
    requests: int
    prompt: int
    completion: int
    cost: float


def print_estimate(estimate: Estimate) -> None:
    """The first question in full, then the numbers."""
    for message in estimate.messages:
        print(f"--- {message['role']}\n{message['content']}")
    if estimate.messages:
        print("---")
    print(
        f"{estimate.requests} requests for {estimate.responses} responses; about "
        f"{estimate.prompt:,} tokens of questions and {estimate.completion:,} of answers; "
        f"cost about {estimate.cost:.4f} (--price_prompt, --price_completion per million tokens)"
    )


def print_summary(
    properties: PropertySet, places: Sequence[Place], store: Store, budget: Budget, output: str
) -> None:
    """Counts, reasons of failures, what this call spent, and how the ratings are spread."""
    entries = [entry for place in places if (entry := store.rated(place)) is not None]
    failures = [entry for place in places if (entry := store.failed(place)) is not None]
    print(f"{len(entries)} of {len(places)} responses rated, {len(failures)} failed: {output}")
    reasons = Counter(str(failure["reason"]).split(":")[0] for failure in failures)
    for reason, count in reasons.most_common():
        print(f"  {count:>6}  {reason}")
    usage = budget.total
    print(
        f"this call: {budget.requests:,} requests, {usage.prompt:,} tokens of questions, "
        f"{usage.completion:,} of answers, cost {usage.cost:.4f}"
    )
    if entries:
        _print_distribution(properties, entries)


def _print_distribution(properties: PropertySet, entries: Sequence[Mapping[str, Any]]) -> None:
    size = len(properties.scale)
    head = "".join(f"{value:>7}" for value in range(size))
    print(f"{'rating':<{_WIDTH}}{head}   mean")
    for name in properties.rating_names:
        found = [entry["ratings"].get(name) for entry in entries]
        values = [value for value in found if value is not None]
        if not values:
            continue
        counts = np.bincount(values, minlength=size)
        print(
            f"{name:<{_WIDTH}}{''.join(f'{count:>7}' for count in counts)}{np.mean(values):>7.2f}"
        )
    for name in properties.flag_names:
        share = np.mean([entry.get("query", {}).get(name, 0) for entry in entries])
        print(f"{f'query: {name}':<{_WIDTH}}{share:>7.1%}")


def compare(first: str, second: str, properties: str | None) -> None:
    """Prints how far two files agree on the responses that both rate.

    Per property: responses rated by both, share of equal ratings, Cohen's kappa with quadratic
    weights, and how much higher the second rates on average.

    Raises:
      InputError: a file is wrong, or they have no response in common.
    """
    names = load_properties(properties)
    tables = [read_ratings(path, names) for path in (first, second)]
    rows = [
        dict(zip(zip(table.ids, table.sides, strict=True), table.values, strict=True))
        for table in tables
    ]
    common = [place for place in rows[0] if place in rows[1]]
    if not common:
        raise InputError(
            second, f"rates no response that {first} rates", "compare runs over one file"
        )
    a, b = (np.stack([table[place] for place in common]) for table in rows)
    print(f"{len(common)} responses in both of {first} and {second}")
    print(f"{'rating':<{_WIDTH}}{'n':>7}{'equal':>8}{'kappa':>8}{'higher':>8}")
    for column, name in enumerate(names.rating_names):
        known = (a[:, column] != MISSING) & (b[:, column] != MISSING)
        values = a[known, column], b[known, column]
        print(_agreement(name, *values, size=len(names.scale)))


def _agreement(name: str, a: np.ndarray, b: np.ndarray, size: int) -> str:
    from sklearn.metrics import cohen_kappa_score

    if not len(a):
        return f"{name:<{_WIDTH}}{0:>7}{'-':>8}{'-':>8}{'-':>8}"
    kappa = math.nan
    if len({*a.tolist(), *b.tolist()}) > 1:  # of one value only it is not defined
        kappa = cohen_kappa_score(a, b, labels=list(range(size)), weights="quadratic")
    shown = "-" if math.isnan(kappa) else f"{kappa:.3f}"
    higher = float(np.mean(b.astype(float) - a))
    return f"{name:<{_WIDTH}}{len(a):>7}{np.mean(a == b):>8.3f}{shown:>8}{higher:>+8.2f}"
