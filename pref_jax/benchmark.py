"""Speed of the real step on real rows, warm."""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from pref_jax.config import training_data
from pref_jax.data.arena import read_comparisons
from pref_jax.data.batches import Samples, Update, padding_fraction, prediction_batches
from pref_jax.evaluation.predict import place_update
from pref_jax.experiment import Experiment, find_backbone
from pref_jax.hardware import find_chip
from pref_jax.memory import peak_bytes, shortage_explained
from pref_jax.models.bert import EncoderConfig
from pref_jax.models.llama import LlamaConfig
from pref_jax.training.loop import read_ahead
from pref_jax.training.run import CompiledStep, make_plan


def encoder_flops(
    config: EncoderConfig, lengths: np.ndarray, *, training: bool, trained_share: float = 1.0
) -> float:
    """Floating-point operations that encoding sequences of these lengths takes.

    A matrix product of weights costs 2 x parameters x tokens forward, attention 4 x n^2 x width per
    layer and sequence of n tokens; the backward pass costs twice the forward pass, but for the
    weights of frozen layers, which have no gradient. In the last layer only keys and values of
    every token count, since only the first token's state is used. Embeddings, norms, activations
    and the head (under 0.1 %) are left out, padding counts nothing.

    Args:
      config: the encoder.
      lengths: tokens of each sequence.
      training: forward and backward, or forward alone.
      trained_share: of the layers; the first ones are frozen.
    """
    width, inner = config.hidden_size, config.intermediate_size
    tokens, squares = float(lengths.sum()), float((lengths.astype(np.float64) ** 2).sum())
    sequences = float(lengths.size)
    per_token = 2.0 * config.layer_parameters
    layers = config.num_layers - 1
    full = layers * (per_token * tokens + 4.0 * squares * width)
    last = 2.0 * 2.0 * width * width * tokens  # keys and values
    last += sequences * 2.0 * (2.0 * width * width + 2.0 * width * inner) + 4.0 * tokens * width
    if not training:
        return full + last
    untouched = (1.0 - trained_share) * config.num_layers * per_token * tokens
    return (full + last) * 3.0 - untouched


def decoder_flops(
    config: LlamaConfig, lengths: np.ndarray, *, training: bool, trained_share: float
) -> float:
    """Floating-point operations that reading sequences of these lengths takes.

    Forward: 2 x parameters of the projections x tokens, and causal attention's 2 x n^2 x width of
    the query heads per layer and sequence of n tokens (half of the full square's 4 x n^2 x width).
    Backward: attention costs twice its forward pass; a frozen projection needs only the gradient of
    its input, so 4 x parameters x tokens in all, where trained ones take 6 x. Adapters of rank 4
    (0.02 %), the token table, norms and the head are left out, padding and recomputation count
    nothing.

    Args:
      config: the decoder.
      lengths: tokens of each sequence.
      training: forward and backward, or forward alone.
      trained_share: of the projections; 0 with adapters.
    """
    heads = config.num_heads * config.head_dim
    tokens, squares = float(lengths.sum()), float((lengths.astype(np.float64) ** 2).sum())
    products = 2.0 * config.num_layers * config.layer_parameters * tokens
    attention = 2.0 * config.num_layers * heads * squares
    if not training:
        return products + attention
    return products * (2.0 + trained_share) + attention * 3.0


def peak_flops(device: jax.Device, devices: int) -> float:
    """Published peak of all devices; on CPU what a large float32 matrix product reaches here."""
    if device.platform == "cpu":
        x, y = jnp.ones((4096, 768)), jnp.ones((768, 3072))
        multiply = jax.jit(jnp.matmul)
        multiply(x, y).block_until_ready()
        seconds = []
        for _ in range(5):
            started = time.perf_counter()
            multiply(x, y).block_until_ready()
            seconds.append(time.perf_counter() - started)
        return 2.0 * 4096 * 768 * 3072 / min(seconds)
    chip = find_chip(device.device_kind)
    return devices * (math.nan if chip is None else chip.peak_flops)


def benchmark(config: ConfigDict, *, mode: str, steps: int, rows: int | None) -> dict[str, Any]:
    """Runs the compiled training step or the compiled prediction and measures it.

    Args:
      config: as for training; nothing is written.
      mode: "train" times ``steps`` updates, "predict" scores rows of the file.
      steps: updates, or calls of the compiled prediction at most.
      rows: how many rows of the file to use; None: all.

    Returns:
      The fields of ``launch/benchmark.py``'s JSON.
    """
    labelled = None if config.input.layout == "response" else True
    comparisons = read_comparisons(training_data(config), labelled=labelled)
    experiment = Experiment(config, find_backbone(config, comparisons))
    samples = experiment.make_samples(comparisons, orders=1 if config.data.swap == "none" else 2)
    chosen = np.arange(samples.num_rows)[:rows]
    device = experiment.mesh.devices.flat[0]
    run = _time_training if mode == "train" else _time_prediction
    with shortage_explained(experiment, "benchmark"):
        timing = run(experiment, samples, chosen, steps)
    updates, seconds = timing["updates"], np.array(timing["seconds"])
    lengths = np.concatenate([_sequence_lengths(update) for update in updates])
    scored = sum(int((packed.samples >= 0).sum()) for u in updates for packed in u.buckets)
    padding = padding_fraction(updates)
    total = float(seconds.sum())
    architecture = experiment.backbone.architecture
    is_decoder = isinstance(architecture, LlamaConfig)
    count: Callable[..., float] = decoder_flops if is_decoder else encoder_flops
    share = experiment.trained_share
    flops = count(architecture, lengths, training=mode == "train", trained_share=share)
    peak = peak_flops(device, experiment.mesh.devices.size)
    return {
        "mode": mode,
        "rows": scored,
        "padding_fraction": padding,
        "rows_per_second": scored / total,
        "tokens_per_second": float(lengths.sum()) / (1.0 - padding) / total,
        "real_tokens_per_second": float(lengths.sum()) / total,
        "model_flops_utilization": flops / total / peak,
        "peak_flops_per_second": peak,
        "step_ms": {
            "median": float(np.median(seconds)) * 1e3,
            "p90": float(np.percentile(seconds, 90)) * 1e3,
        },
        "compile_seconds": timing["compile_seconds"],
        "compilations": timing["compilations"],
        "peak_memory_bytes": peak_bytes(device),
        "device": f"{experiment.mesh.devices.size} x {device.device_kind}",
    }


def _sequence_lengths(update: Update) -> np.ndarray:
    lengths = []
    for packed in update.buckets:
        segments = packed.segment_ids.reshape(-1, packed.segment_ids.shape[-1])
        most = int(segments.max(initial=0))
        for segment in range(1, most + 1):
            counts = (segments == segment).sum(axis=1)
            lengths.append(counts[counts > 0])
    return np.concatenate(lengths)


def _time_training(
    experiment: Experiment, samples: Samples, rows: np.ndarray, steps: int
) -> dict[str, Any]:
    compiled = CompiledStep(experiment, total_steps=steps + 1)
    executable = compiled.executable
    plan = make_plan(experiment, samples, rows)
    trainable, frozen = experiment.split(experiment.initial_params())
    state = compiled.create_state(trainable)
    updates, seconds = [], []
    source: Iterator[Update] = read_ahead(plan, 0, steps + 1)
    mesh = experiment.mesh
    # The first update warms caches and allocators up.
    state, _ = executable(state, frozen, place_update(next(source), mesh))
    jax.block_until_ready(state)
    mark = time.perf_counter()
    for update in source:
        state, metrics = executable(state, frozen, place_update(update, mesh))
        jax.block_until_ready(metrics)
        now = time.perf_counter()
        seconds.append(now - mark)
        updates.append(update)
        mark = now
    return {
        "updates": updates,
        "seconds": seconds,
        "compile_seconds": compiled.compile_seconds,
        "compilations": compiled.compilations,
    }


def _time_prediction(
    experiment: Experiment, samples: Samples, rows: np.ndarray, steps: int
) -> dict[str, Any]:
    predictor = experiment.make_predictor()
    started = time.perf_counter()
    predictor.compile()
    compile_seconds = time.perf_counter() - started
    params = experiment.initial_params()
    batches = prediction_batches(samples, rows, experiment.geometry, predictor.shapes)
    updates = [update for update, _ in zip(batches, range(steps), strict=False)]
    list(predictor.run(params, updates[:1]))
    seconds = []  # from one answer to the next: calls overlap
    mark = time.perf_counter()
    for _, outputs in predictor.run(params, updates):
        jax.block_until_ready(outputs)
        now = time.perf_counter()
        seconds.append(now - mark)
        mark = now
    return {
        "updates": updates,
        "seconds": seconds,
        "compile_seconds": compile_seconds,
        "compilations": predictor.compilations,
    }
