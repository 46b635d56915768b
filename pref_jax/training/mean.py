"""One run out of several: the mean of their adapters and heads."""

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from pref_jax.errors import InputError
from pref_jax.evaluation.baselines import FILE as BASELINES_FILE
from pref_jax.experiment import (
    Backbone,
    Run,
    load_run,
    make_scoring_experiment,
    read_config,
    run_digest,
)
from pref_jax.training.checkpoints import Checkpoints
from pref_jax.training.mirror import local_run
from pref_jax.training.workdir import Workdir

logger = logging.getLogger(__name__)

# What has to be the same for a mean of weights to mean anything.
_SHARED = ("input", "model")


def mean_adapters(
    runs: Sequence[str], output: str, *, weights: np.ndarray, base: str | None = None
) -> None:
    """Makes a run that predicts, evaluates and exports as any other, in one pass over the base.

    The mean of updates of a weight matrix is itself a low-rank update: the adapters stand side by
    side, of the summed rank, with each ``b`` scaled by its run's weight. (The mean of the factors
    would be another matrix.) The head is a mean too. It is not the mean of probabilities, which
    ``launch/ensemble.py`` writes otherwise: with runs of different seeds, whose heads may read
    different directions, measure it first.

    Args:
      runs: workdirs of one base, with the same fields of ``input`` and ``model``.
      output: the new workdir.
      weights: of the runs, float64 adding up to 1.
      base: where the frozen weights of the runs are now, if they moved.

    Raises:
      InputError: runs without adapters, of another base or model, or an output that is there.
    """
    configs = [read_config(local_run(run)) for run in runs]
    for run, config in zip(runs, configs, strict=True):
        _check(run, config, runs[0], configs[0])
    if Path(output).is_dir() and any(name.name != ".lock" for name in Path(output).iterdir()):
        raise InputError(output, "is not empty", "name a new folder")

    first: Run | None = None
    trees: list[dict[str, np.ndarray]] = []
    losses: list[float] = []
    for run in runs:
        loaded = load_run(run, base=base)
        if first is None:
            first = loaded
        elif _base_of(loaded) != _base_of(first):
            raise InputError(run, f"its base is not that of {runs[0]}", "name runs of one base")
        trainable, _ = loaded.experiment.split(loaded.params)
        flat = traverse_util.flatten_dict(trainable, sep="/")
        trees.append({name: np.asarray(leaf) for name, leaf in flat.items()})
        losses.append(_best_loss(loaded))
        if loaded.temperature != 1.0:
            logger.warning("%s: its temperature is not carried over to the mean", run)
        del loaded
    assert first is not None

    config = configs[0].copy_and_resolve_references()
    lora, scale = config.model.lora, first.experiment.model.lora.scale
    lora.rank *= len(runs)
    lora.alpha, lora.rank_stabilised = scale * lora.rank, False
    config.train.ema = 0.0  # what is judged is what is kept
    merged = {name: _mean(name, [tree[name] for tree in trees], weights) for name in trees[0]}
    _write(config, first, merged, output, runs, info={"valid_loss": float(weights @ losses)})
    print(f"mean of {len(runs)} runs' adapters, rank {lora.rank}: {output}")


def _check(run: str, config: ConfigDict, first: str, like: ConfigDict) -> None:
    if not config.model.lora.rank:
        raise InputError(run, "it was trained without adapters", "leave it out")
    for section in _SHARED:
        ours, theirs = (each[section].to_dict() for each in (config, like))
        if section == "model":  # where the base lies may differ; its content is compared later
            ours["pretrained"] = theirs["pretrained"] = None
        for name in ours:
            if ours[name] != theirs[name]:
                raise InputError(
                    run, f"its {section}.{name} is not that of {first}", "name runs of one model"
                )


def _base_of(run: Run) -> tuple[Any, Any]:
    base = run.experiment.backbone.base
    return run.experiment.backbone.architecture, base.get("digest", base["source"])


def _best_loss(run: Run) -> float:
    checkpoints = Checkpoints(run.workdir / "checkpoints", keep=1, read_only=True)
    return float(checkpoints.infos()[run.step]["valid_loss"])


def _mean(name: str, leaves: list[np.ndarray], weights: np.ndarray) -> np.ndarray:
    """``a`` ``[..., in, rank]`` and ``b`` ``[..., rank, out]`` side by side; else the mean."""
    if name.startswith("lora/") and name.endswith("/a"):
        return np.concatenate(leaves, axis=-1)
    scaled = [leaf * np.float32(w) for leaf, w in zip(leaves, weights, strict=True)]
    if name.startswith("lora/"):
        return np.concatenate(scaled, axis=-2)
    return np.asarray(np.sum(scaled, axis=0), np.float32)


def _write(
    config: ConfigDict,
    first: Run,
    merged: dict[str, np.ndarray],
    output: str,
    runs: Sequence[str],
    *,
    info: dict[str, float],
) -> None:
    """The checkpoint comes last: a folder without one is refused by whoever reads it."""
    backbone = first.experiment.backbone
    tokenizer = first.workdir / "tokenizer"
    written = config.copy_and_resolve_references()
    experiment = make_scoring_experiment(
        config, Backbone(backbone.architecture, tokenizer, backbone.base)
    )
    params = traverse_util.unflatten_dict(merged, sep="/")
    with Workdir(output) as workdir:
        workdir.settle_config(written.to_dict())
        experiment.write_model(workdir.path, {run: run_digest(local_run(run)) for run in runs})
        shutil.copyfile(first.workdir / BASELINES_FILE, workdir.path / BASELINES_FILE)
        with Checkpoints(workdir.checkpoints_path, keep=1, mirror=workdir.mirror) as checkpoints:
            checkpoints.save(0, {"params": params}, info)
