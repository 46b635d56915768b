"""The recipe under test: Parallel, the answers exchangeable, judged by [CLS], mean and lengths.

    python launch/train.py --config=configs/best_encoder.py:minilm --config.data.train=train.csv

Arguments: those of configs/parallel_bert.py, ``bert-base`` (the default), ``distilbert`` or
``minilm``.

Hardware: as for configs/parallel_bert.py; both read two sequences a row.
Expect: with MiniLM at 256 tokens, two epochs and a rate of 1e-4 (README.md, "Results on real
data") log loss 0.95 to 0.96 on 868 real rows, one seed, where configs/parallel_bert.py has 0.983.
``launch/ablate.py`` compares the options on the same folds (docs/ablation.md): these three, with
``train.fit_lengths`` (on by default), gain 0.027 together in five folds of such runs, 0.950 against
0.977, and 0.067 after one epoch at 128 tokens.

Where the numbers come from: configs/parallel_bert.py. On top of it ``model.symmetric`` (which
answer stands first says nothing of which is better), ``model.pooling=cls_mean`` and
``model.length_features`` (a cut response does not show how long it was).
"""

from ml_collections import ConfigDict

from pref_jax.config import encoder_config


def get_config(arguments: str | None = None) -> ConfigDict:
    """Takes the backbone: bert-base, distilbert or minilm."""
    config = encoder_config(arguments, layout="parallel")
    config.model.symmetric = True
    config.model.pooling = "cls_mean"
    config.model.length_features = True
    return config
