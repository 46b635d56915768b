"""The recipe whose options launch/ablate.py changes one by one, on few rows.

    python launch/ablate.py --stage=screen --data=rows.csv --workdir=runs/ablation
    python launch/ablate.py --config=configs/ablation.py:smollm2 --stage=screen --data=rows.csv \
        --workdir=runs/ablation_smollm2

Arguments: ``minilm`` (the default), ``bert-base`` or ``distilbert`` for the layout ``parallel``,
``smollm2`` for a decoder with adapters.

Hardware: two CPU cores.
Expect: docs/ablation.md tells what the ablation does and what it costs.

Where the numbers come from: configs/parallel_bert.py and configs/llama_lora.py, but for a high rate
with a short warm-up and updates of 16 rows, since a fold of a few thousand rows has few updates.
The model is judged once, at the end of training: to choose among checkpoints by the rows that are
held out would flatter it. Length of the sequences and epochs are the stage's.
"""

from ml_collections import ConfigDict

from pref_jax.config import encoder_config, llama_config


def get_config(arguments: str | None = None) -> ConfigDict:
    """Takes the backbone: minilm (the default), bert-base, distilbert or smollm2."""
    if arguments == "smollm2":
        config = llama_config(arguments, quantization="none")
        config.train.learning_rate = 5e-4
        config.train.head_learning_rate = 5e-4
        config.train.warmup_steps = 5
    else:
        config = encoder_config(arguments or "minilm", layout="parallel")
        config.train.learning_rate = 1e-4
        config.train.warmup_steps = 12
    config.train.batch_size = 16
    config.eval.every_steps = 1_000_000
    config.checkpoint.every_steps = 50
    config.checkpoint.keep = 1
    config.logging.tensorboard = False
    config.logging.every_steps = 10
    return config
