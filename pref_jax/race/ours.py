"""Our turn of a race: the parts of ``launch/train.py`` in its order, then the prediction."""

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pref_jax.compilation import keep_compiled_programs
from pref_jax.config import training_data
from pref_jax.data.arena import read_comparisons
from pref_jax.data.features import make_tokens
from pref_jax.evaluation.predict import place_update
from pref_jax.experiment import Experiment, find_backbone, read_config
from pref_jax.memory import peak_bytes
from pref_jax.race import turn
from pref_jax.race.prepare import texts_to_tokenise
from pref_jax.training.loop import read_ahead
from pref_jax.training.run import CompiledStep, make_plan


def run(folder: Path, job: dict[str, Any], started: float) -> dict[str, Any]:
    """Trains one update and then a whole epoch, predicts every row, tokenises the texts."""
    keep_compiled_programs()
    config = read_config(folder)
    comparisons = read_comparisons(training_data(config), labelled=True)
    experiment = Experiment(config, find_backbone(config, comparisons))
    _ = experiment.tokenizer
    compiled = CompiledStep(experiment, total_steps=-(-len(comparisons) // job["batch_size"]) + 1)
    compiled.start()
    samples = experiment.make_samples(comparisons)
    rows = np.arange(len(comparisons))
    plan = make_plan(experiment, samples, rows)
    trainable, frozen = experiment.split(experiment.initial_params())
    state = compiled.create_state(trainable)
    del trainable  # the state has its own copy
    executable, mesh = compiled.executable, experiment.mesh
    state, values = executable(state, frozen, place_update(plan.update(0), mesh))
    jax.block_until_ready((state, values))
    first_update_seconds = time.time() - started
    first_loss = float(values["loss"])

    # As in `TrainingLoop`: an update's metrics are fetched after the next one was dispatched.
    losses: list[float] = []
    pending = None
    mark = time.perf_counter()
    for update in read_ahead(plan, 0, plan.steps_per_epoch):
        state, values = executable(state, frozen, place_update(update, mesh))
        if pending is not None:
            losses.append(float(pending["loss"]))
        pending = values
    assert pending is not None
    losses.append(float(pending["loss"]))
    jax.block_until_ready(state)
    training_seconds = time.perf_counter() - mark
    device = mesh.devices.flat[0]
    memory = peak_bytes(device)

    del state, frozen, pending, values
    predictor = experiment.make_predictor()
    params = experiment.initial_params()
    predictor.logits(params, samples, rows[:1])
    mark = time.perf_counter()
    logits = predictor.logits(params, samples, rows)
    prediction_seconds = time.perf_counter() - mark
    del params

    comparisons = texts_to_tokenise(config, job["source"])
    with tempfile.TemporaryDirectory(dir=folder) as cache:  # tokens of earlier turns are there
        os.environ["PREF_JAX_CACHE"] = cache
        mark = time.perf_counter()
        make_tokens(comparisons, experiment.tokenizer, progress=False)
        tokenising_seconds = time.perf_counter() - mark
    return {
        "first_update_seconds": first_update_seconds,
        "compile_seconds": compiled.compile_seconds,
        "training_rows_per_second": len(rows) / training_seconds,
        "prediction_rows_per_second": len(rows) / prediction_seconds,
        "tokenising_rows_per_second": len(comparisons) / tokenising_seconds,
        "peak_memory_bytes": memory,
        "losses": [first_loss, *losses],
        "logits": logits.tolist(),
        "device": f"{mesh.devices.size} x {device.device_kind}",
        "attention": experiment.attention,
    }


if __name__ == "__main__":
    turn.serve(run)
