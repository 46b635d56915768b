"""How long training takes at most: operations over what hardware reaches."""

import numpy as np
from ml_collections import ConfigDict

from pref_jax.benchmark import decoder_flops, encoder_flops
from pref_jax.hardware import CHIPS
from pref_jax.models.bert import EncoderConfig
from pref_jax.models.llama import LlamaConfig
from pref_jax.models.rope import RopeConfig

# Devices, and how many: the Kaggle TPU counts cores.
HARDWARE = {
    "TPU v3-8": ("TPU v3", 8),
    "TPU v5e-8": ("TPU v5e", 8),
    "2 x T4": ("T4", 2),
    "H100": ("H100", 1),
}
_REACHED = 0.4  # of the published peak


def estimate_hours(config: ConfigDict, rows: int) -> dict[str, float]:
    """Hours of training on each `HARDWARE`, every row at full length.

    Args:
      config: of a run.
      rows: comparisons in the training file, of which `data.valid_fraction` is held out.
    """
    layout = config.input.layout
    used = rows * (1.0 - config.data.valid_fraction) * config.train.epochs
    sequences = used * (2 if layout in ("parallel", "response") else 1)
    lengths = np.array([config.input.max_length])
    sizes = config.model.config
    if layout == "decoder":
        heads = sizes.num_heads
        architecture = LlamaConfig(
            family="llama",
            vocab_size=sizes.vocab_size or 256,
            hidden_size=sizes.hidden_size,
            num_layers=sizes.num_layers,
            num_heads=heads,
            num_kv_heads=sizes.num_kv_heads or heads,
            head_dim=sizes.head_dim or sizes.hidden_size // heads,
            intermediate_size=sizes.intermediate_size,
            max_positions=sizes.max_positions,
            rope=RopeConfig(),
        )
        share = 0.0 if config.model.lora.rank else 1.0
        one = decoder_flops(architecture, lengths, training=True, trained_share=share)
        # Recomputing the forward pass is work too, if not of the kind that utilisation counts.
        if config.train.remat == "full":
            one += decoder_flops(architecture, lengths, training=False, trained_share=share)
    else:
        encoder = EncoderConfig(
            family=config.model.family or "bert",
            vocab_size=sizes.vocab_size or 30_522,
            hidden_size=sizes.hidden_size,
            num_layers=sizes.num_layers,
            num_heads=sizes.num_heads,
            intermediate_size=sizes.intermediate_size,
            max_positions=sizes.max_positions,
            type_vocab_size=2,
        )
        share = 1.0 - config.model.frozen_layers / sizes.num_layers
        one = encoder_flops(encoder, lengths, training=True, trained_share=share)
    return {
        name: one * sequences / (CHIPS[chip].peak_flops * count * _REACHED) / 3600.0
        for name, (chip, count) in HARDWARE.items()
    }
