"""The benchmark counts the work that XLA counts, and reports what it ran."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rig import make_rows, write_csv

from pref_jax.benchmark import benchmark, decoder_flops, encoder_flops
from pref_jax.config_file import load
from pref_jax.experiment import one_tree
from pref_jax.models.bert import EncoderConfig
from pref_jax.models.classifiers import PreferenceClassifier
from pref_jax.models.llama import LlamaClassifier, LlamaConfig
from pref_jax.training.state import merge_parameters, split_parameters, trainable_above

REPOSITORY = Path(__file__).parents[1]
TOKENS = 256
ENCODER = EncoderConfig(
    family="bert",
    vocab_size=64,
    hidden_size=512,
    num_layers=3,
    num_heads=4,
    intermediate_size=2048,
    max_positions=TOKENS,
    type_vocab_size=2,
)
# One layer: XLA counts the body of a loop over layers once.
DECODER = LlamaConfig(
    family="llama",
    vocab_size=64,
    hidden_size=256,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    intermediate_size=1024,
    max_positions=TOKENS,
)


def counted(model: PreferenceClassifier | LlamaClassifier, frozen_layers: int) -> tuple:
    """FLOPs of the forward pass, and with the gradients of what is not frozen.

    As XLA counts them, so activations and norms (2 %) are in.
    """
    ids, pool = jnp.zeros((1, TOKENS), jnp.int32), jnp.zeros((1, 1, 1), jnp.int32)
    params = one_tree(jax.eval_shape(lambda: model.init(jax.random.key(0), *[ids] * 4, pool)))
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    trained, frozen = split_parameters(params, trainable_above(frozen_layers))

    def score(trained: dict, frozen: dict) -> jax.Array:
        variables = {"params": merge_parameters(trained, frozen)}
        return jnp.asarray(model.apply(variables, *[ids] * 4, pool)).sum()

    programs = (score, jax.value_and_grad(score))
    return tuple(
        jax.jit(program).lower(trained, frozen).compile().cost_analysis()["flops"]
        for program in programs
    )


@pytest.mark.parametrize("frozen_layers", [0, 2])
def test_flops_of_an_encoder(frozen_layers: int) -> None:
    forward, both = counted(PreferenceClassifier(ENCODER, longest=TOKENS), frozen_layers)
    lengths, share = np.array([TOKENS]), 1 - frozen_layers / 3
    ours = encoder_flops(ENCODER, lengths, training=False)
    assert abs(ours / forward - 1) < 0.03, (ours, forward)
    ours = encoder_flops(ENCODER, lengths, training=True, trained_share=share)
    assert abs(ours / both - 1) < 0.03, (ours, both)


@pytest.mark.parametrize("frozen_layers", [0, 1])
def test_flops_of_a_decoder(frozen_layers: int) -> None:
    forward, both = counted(LlamaClassifier(DECODER, frozen_layers=frozen_layers), frozen_layers)
    lengths = np.array([TOKENS])
    # XLA computes the whole square of attention here, we count what the mask leaves.
    hidden = 2.0 * DECODER.num_heads * DECODER.head_dim * TOKENS**2
    ours = decoder_flops(DECODER, lengths, training=False, trained_share=1.0) + hidden
    assert abs(ours / forward - 1) < 0.03, (ours, forward)
    share = 1.0 - frozen_layers
    ours = decoder_flops(DECODER, lengths, training=True, trained_share=share) + 3 * hidden
    assert abs(ours / both - 1) < 0.03, (ours, both)


@pytest.mark.parametrize("mode", ["train", "predict"])
def test_what_is_reported_is_what_ran(tmp_path: Path, mode: str) -> None:
    data = write_csv(tmp_path / "rows.csv", make_rows(), labels=True)
    config = load(
        f"{REPOSITORY}/configs/llama_lora.py:tiny",
        [("data.train", str(data)), ("input.max_length", "128"), ("train.batch_size", "4")],
    )
    result = benchmark(config, mode=mode, steps=2, rows=None)
    assert result["compilations"] == 1 and result["rows"] >= 4
    assert 0 <= result["padding_fraction"] < 1
    ratio = result["real_tokens_per_second"] / result["tokens_per_second"]
    assert ratio == pytest.approx(1 - result["padding_fraction"])
    assert 0 < result["step_ms"]["median"] <= result["step_ms"]["p90"]
    assert 0 < result["model_flops_utilization"] < 1.5
