"""Run folders, read for comparison: also those still going, never changed by it."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pref_jax.errors import InputError
from pref_jax.evaluation import baselines, predictions
from pref_jax.evaluation.baselines import Baselines
from pref_jax.evaluation.predictions import Predictions
from pref_jax.files import read_json
from pref_jax.training.mirror import local_run

_PARTS = ("config.json", "metrics.jsonl", "result.json")


@dataclass(frozen=True)
class Run:
    """What a workdir tells.

    Attributes:
      name: short, and different from those of the runs beside it.
      config, result, environment: the JSON files; empty where there is none (yet).
      curves: ``train`` and ``valid`` -> (steps, losses).
      predictions: of the held-out rows, with the best checkpoint.
      baselines: as fitted on the run's training rows.
      scores: `metrics.evaluate` of the predictions.
    """

    name: str
    path: Path
    config: dict[str, Any]
    result: dict[str, Any]
    environment: dict[str, Any]
    curves: dict[str, tuple[list[int], list[float]]]
    predictions: Predictions | None
    baselines: Baselines | None
    scores: dict[str, Any] | None

    @property
    def finished(self) -> bool:
        return bool(self.result)

    @property
    def last_step(self) -> int:
        return max((steps[-1] for steps, _ in self.curves.values() if steps), default=0)

    @property
    def log_loss(self) -> float | None:
        """On the held-out rows; of a run still going, the lowest so far."""
        if self.scores is not None:
            return float(self.scores["log_loss"])
        recorded = self.result.get("valid", {}).get("log_loss")
        if isinstance(recorded, int | float):
            return float(recorded)
        return min(self.curves["valid"][1], default=None)

    @property
    def baseline_losses(self) -> dict[str, float]:
        """Name -> log loss of `baselines.NAMES` on the held-out rows, where known."""
        known = (self.scores or {}).get("baselines") or self.result.get("baselines") or {}
        return {name: float(known[name]) for name in baselines.NAMES if name in known}


def read_runs(paths: Sequence[str | Path]) -> list[Run]:
    """Reads run folders, in this order.

    Raises:
      InputError: none given, one given twice, no run folder, one without a single measurement,
        or a file in it that is damaged.
    """
    if not paths:
        raise InputError("RUN", "no run named", "name the folders that launch/train.py wrote")
    folders = [local_run(path, checkpoint=False) for path in paths]
    real = [folder.resolve() for folder in folders]
    for place, folder in enumerate(real):
        if folder in real[:place]:
            raise InputError(str(folders[place]), "is named twice", "name each run once")
    return [_read_run(folder, name) for folder, name in zip(folders, name_runs(real), strict=True)]


def _read_run(folder: Path, name: str) -> Run:
    remedy = "name a folder that launch/train.py wrote"
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise InputError(str(folder), what, remedy)
    if not any((folder / part).is_file() for part in _PARTS):
        raise InputError(str(folder), f"is not a run: it has none of {', '.join(_PARTS)}", remedy)
    config = _read_json(folder / "config.json")
    if config.get("input", {}).get("layout") == "response":
        raise InputError(
            str(folder), "is a multi-task run, whose loss is of ratings", "leave it out"
        )
    curves = _read_curves(folder / "metrics.jsonl")
    rows = folder / predictions.FILE
    fitted = folder / baselines.FILE
    held_out = Predictions.read(rows) if rows.is_file() else None
    base = Baselines.load(fitted) if fitted.is_file() else None
    return Run(
        name=name,
        path=folder,
        config=config,
        result=_read_json(folder / "result.json"),
        environment=_read_json(folder / "environment.json"),
        curves=curves,
        predictions=held_out,
        baselines=base,
        scores=None if held_out is None else held_out.evaluate(base),
    )


def name_runs(folders: Sequence[Path]) -> list[str]:
    """The fewest last parts of the paths that tell them apart."""
    for parts in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-parts:]) for folder in folders]
        if len(set(names)) == len(names):
            break
    return names


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path, "run the training again") if path.is_file() else {}


def _read_curves(path: Path) -> dict[str, tuple[list[int], list[float]]]:
    remedy = "wait for its first update, or leave this run out"
    if not path.is_file():
        raise InputError(str(path), "there are no measurements", remedy)
    curves: dict[str, tuple[list[int], list[float]]] = {"train": ([], []), "valid": ([], [])}
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(str(path), "cannot be read", "leave this run out") from error
    # What follows the last line break is a line that is being written just now.
    for number, line in enumerate(lines[:-1], 1):
        try:
            entry = json.loads(line)
            steps, losses = curves.get(entry["split"], ([], []))
            step, loss = int(entry["step"]), float(entry["loss"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            what = "is not a measurement with step, split and loss"
            raise InputError(f"{path}:{number}", what, "leave this run out") from error
        if math.isfinite(loss):
            steps.append(step)
            losses.append(loss)
    if not any(steps for steps, _ in curves.values()):
        raise InputError(str(path), "there are no measurements", remedy)
    return curves
