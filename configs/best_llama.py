"""The recipe under test for a decoder: configs/llama_lora.py, told how long the responses are.

    python launch/train.py --config=configs/best_llama.py --config.data.train=train.csv
    python launch/train.py --config=configs/best_llama.py:smollm2 --config.data.train=train.csv
    python launch/train.py --config=configs/best_llama.py:tiny --config.data.train=train.csv

Arguments: those of configs/llama_lora.py, ``8b`` (the default), ``smollm2`` or ``tiny``.

Hardware: as for configs/llama_lora.py; ``--config.model.quantization=nf4`` as in
configs/llama_qlora.py.
Expect: in the ablation of SmolLM2 (700 real rows, 22 updates; docs/ablation.md, "A decoder") log
loss 1.056 where configs/llama_lora.py has 1.095; all-linear adapters made no difference there and
are not in it. Not measured yet: ``8b``.

Where the numbers come from: configs/llama_lora.py. On top of it ``model.length_features`` (a cut
response does not show how long it was), from which the head starts (``train.fit_lengths``).
"""

from ml_collections import ConfigDict

from pref_jax.config import llama_config


def get_config(arguments: str | None = None) -> ConfigDict:
    """Takes the size: 8b, smollm2 or tiny."""
    config = llama_config(arguments, quantization="none")
    config.model.length_features = True
    return config
