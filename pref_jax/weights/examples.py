"""The rows that an exported folder carries so that any program can check itself.

Made up, and chosen for what ports get wrong: several turns, other scripts, accents, text that
spells special tokens, empty answers, identical answers, and answers longer than the budget.
"""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from pref_jax.data.batches import Samples

_STORY = "The lamp on the pier went out, and the old keeper counted the steps back to the door. "

ROWS: tuple[tuple[list[str], list[str], list[str]], ...] = (
    (
        ["What is the capital of Portugal?"],
        ["Lisbon."],
        ["The capital of Portugal is Lisbon, on the river Tagus."],
    ),
    (
        ["Write a short story about a lighthouse."],
        [_STORY * 40],
        [_STORY],
    ),
    (
        ["Name a prime above 20.", "And the next one?"],
        ["23", "29"],
        ["21 is a prime.", "I am sorry: 23 is, and then 29."],
    ),
    (
        ["Translate 'good morning' into French, German and Japanese."],
        ["Bonjour, Guten Morgen, おはようございます."],
        ["Bonne matinée à toutes et à tous; schönen Morgen; 早上好."],
    ),
    (
        ["What does [SEP] do in BERT's input, and what is [MASK]?"],
        ["[SEP] ends a segment, [MASK] hides a token: [CLS] a [SEP] b [SEP]."],
        ["They are words in brackets."],
    ),
    (
        ["Say nothing."],
        [""],
        ["..."],
    ),
    (
        ["def add(a, b):\n    return a - b\n\nWhat is wrong here? " * 12],
        ["It subtracts. Write `return a + b`."],
        ["It subtracts. Write `return a + b`."],
    ),
    (
        ["Is it safe to mix bleach and vinegar? 🤔"],
        ["Yes, it cleans better."],
        ["No. The mixture gives off chlorine gas. Open a window and leave the room."],
    ),
)


def write_rows(path: Path) -> None:
    """Writes `ROWS` as a CSV with the columns of the competition's test file."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "prompt", "response_a", "response_b"])
        for number, row in enumerate(ROWS):
            writer.writerow([number, *(json.dumps(turns) for turns in row)])


def describe_rows(
    samples: "Samples", probabilities: "np.ndarray | Sequence[Sequence[float]]"
) -> list[dict[str, Any]]:
    """The examples of an export, from the samples of `ROWS` and what the model says of them.

    Args:
      samples: of the rows, in order; one sample a row.
      probabilities: [rows, 3].
    """
    import numpy as np

    examples = []
    for sample in range(samples.num_rows):
        ids = [samples.sequence(sample, side) for side in range(samples.sides)]
        types = [
            # A decoder has no token types.
            (np.arange(len(ids[side])) >= samples.type_start(sample, side)).astype(int)
            * (not samples.pools_last)
            for side in range(samples.sides)
        ]
        lists = [(part.tolist(), kinds.tolist()) for part, kinds in zip(ids, types, strict=True)]
        flat = len(lists) == 1
        examples.append(
            {
                "input_ids": lists[0][0] if flat else [part for part, _ in lists],
                "token_type_ids": lists[0][1] if flat else [kinds for _, kinds in lists],
                "text_lengths": list(samples.text_lengths(sample)),
                "probabilities": [float(value) for value in probabilities[sample]],
            }
        )
    return examples
