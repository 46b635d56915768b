"""The study's page: losses on the test rows, and the paper's claims one by one."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pref_jax.errors import InputError
from pref_jax.evaluation import figures
from pref_jax.evaluation.baselines import FILE, Baselines
from pref_jax.evaluation.metrics import bootstrap_mean, measure_row_losses
from pref_jax.evaluation.predictions import Predictions
from pref_jax.evaluation.report import Figure, render
from pref_jax.evaluation.runs import read_runs
from pref_jax.evaluation.submission import quote_cell
from pref_jax.files import make_output_folder, plain, read_json, write_durably, write_json
from pref_jax.study.claims import judge, make_claims
from pref_jax.study.plan import DATA, EVALUATION, PREDICTIONS, Model

REPORT = "report"
_GOAL = 1.0  # log loss: what the paper set out to reach


def make_study_report(folder: Path, models: Sequence[Model], seeds: int) -> Path:
    """Writes ``report/`` with ``index.html``, ``study.json``, ``results.csv`` and the figures.

    What is written follows from the parts alone, not from when or how fast they were made.

    Args:
      folder: of the study; every model has been tested with every seed.
      models: those to compare.
      seeds: how many of each.

    Returns:
      The page.

    Raises:
      InputError: a part is damaged.
    """
    losses, tested = _read_losses(folder, models, seeds)
    lines = [_describe(folder, model, losses[model.key], seeds) for model in models]
    _add_comparisons(lines)
    references = _find_references(folder, models[0], tested)
    claims = [judge(claim, losses) for claim in make_claims(models)]
    content = {"seeds": seeds, "models": lines, "references": references, "claims": claims}
    output = make_output_folder(folder / REPORT)
    drawn = _draw(folder, models, lines, references)
    for figure in drawn:
        write_durably(output / f"{figure.name}.png", figure.png)
    write_json(output / "study.json", content)
    write_durably(output / "results.csv", _write_table(lines).encode())
    page = render(
        "pref_jax.study",
        "study.html.jinja",
        lines=lines,
        references=references,
        claims=claims,
        topics=list(dict.fromkeys(claim["topic"] for claim in claims)),
        verdicts={
            name: sum(claim["verdict"] == name for claim in claims)
            for name in ("supported", "contradicted", "undecided")
        },
        titles={model.key: model.title for model in models},
        best=min(lines, key=lambda line: line["log_loss"]),
        figures=drawn,
        seeds=seeds,
        rows=len(tested),
        simulated=not (folder / DATA / "sources.json").exists(),
        configs={
            model.title: json.dumps(
                read_json(folder / f"seed0/{model.key}" / "config.json", "run it again"), indent=2
            )
            for model in models
        },
    )
    write_durably(output / "index.html", page.encode())
    return output / "index.html"


def _read_losses(
    folder: Path, models: Sequence[Model], seeds: int
) -> tuple[dict[str, np.ndarray], Predictions]:
    """Of each model ``[seeds, rows]``, and one of the files for everything else."""
    losses: dict[str, np.ndarray] = {}
    first: Predictions | None = None
    for model in models:
        found = []
        for seed in range(seeds):
            path = folder / "test" / f"seed{seed}" / model.key / PREDICTIONS
            remedy = f"remove {path.parent} and type the same command again"
            try:
                predictions = Predictions.read(path)
            except InputError as error:
                raise InputError(error.where, error.what, remedy) from error
            first = first or predictions
            if predictions.ids != first.ids or (predictions.labels != first.labels).any():
                raise InputError(str(path), "is of other rows", remedy)
            found.append(predictions.measure_row_losses())
        losses[model.key] = np.stack(found)
    assert first is not None
    return losses, first


def _describe(folder: Path, model: Model, losses: np.ndarray, seeds: int) -> dict[str, Any]:
    evaluations = [
        _read_evaluation(folder / "test" / f"seed{seed}" / model.key) for seed in range(seeds)
    ]
    parameters = evaluations[0]["parameters"]
    by_seed = losses.mean(axis=1)
    low, high = np.percentile(bootstrap_mean(losses.mean(axis=0)), [2.5, 97.5])
    return {
        "model": model.key,
        "title": model.title,
        "log_loss": float(losses.mean()),
        "log_loss_ci95": [float(low), float(high)],
        "by_seed": [float(loss) for loss in by_seed],
        "deviation": float(by_seed.std(ddof=1)) if seeds > 1 else None,
        "accuracy": float(np.mean([evaluation["accuracy"] for evaluation in evaluations])),
        "parameters": int(parameters["total"]),
        "trainable": int(parameters["trainable"]),
    }


def _read_evaluation(tested: Path) -> dict[str, Any]:
    remedy = f"remove {tested} and type the same command again"
    found = read_json(tested / EVALUATION, remedy)
    parameters = found.get("parameters")
    numbers = [found.get("accuracy")]
    if isinstance(parameters, dict):
        numbers += [parameters.get("total"), parameters.get("trainable")]
    if len(numbers) < 3 or not all(isinstance(number, int | float) for number in numbers):
        raise InputError(str(tested / EVALUATION), "is not an evaluation of this study", remedy)
    return found


def _add_comparisons(lines: list[dict[str, Any]]) -> None:
    """Improvement over the first model in percent, and efficiency: 1 / (loss x parameters)."""
    base = lines[0]["log_loss"]
    for line in lines:
        line["improvement_percent"] = 100.0 * (base - line["log_loss"]) / base
        line["efficiency"] = 1.0 / (line["log_loss"] * line["parameters"] / 1e6)


def _find_references(folder: Path, model: Model, tested: Predictions) -> dict[str, float]:
    """Losses on the test rows of what needs no model; of the truth where it is known."""
    baselines = Baselines.load(folder / "seed0" / model.key / FILE)
    references = {
        name: float(measure_row_losses(values, tested.labels, tested.tie_allowed).mean())
        for name, values in baselines.predict_all(tested.words).items()
    }
    truth = folder / DATA / "truth.json"
    if truth.exists():
        references["bayes"] = float(read_json(truth, "run it again")["bayes_log_loss"]["test"])
    return references


def _draw(
    folder: Path,
    models: Sequence[Model],
    lines: Sequence[Mapping[str, Any]],
    references: Mapping[str, float],
) -> list[Figure]:
    names = [_abbreviate(line["title"]) for line in lines]
    losses = {
        name: (line["log_loss"], line["log_loss_ci95"])
        for name, line in zip(names, lines, strict=True)
    }
    said = ", ".join(f"{line['title']} {line['log_loss']:.4f}" for line in lines)
    base = lines[0]["title"]
    gains = {name: line["improvement_percent"] for name, line in zip(names, lines, strict=True)}
    del gains[names[0]]
    efficiency = {name: line["efficiency"] for name, line in zip(names, lines, strict=True)}
    runs = read_runs([folder / f"seed0/{model.key}" for model in models])
    curves = {_abbreviate(model.title): run.curves for model, run in zip(models, runs, strict=True)}
    return [
        Figure(
            "test_loss",
            "Test loss (the paper's figure 10)",
            "Mean log loss on the test rows with its 95 % bootstrap interval, and what needs no "
            f"model. The paper's goal was a loss below {_GOAL:g}.",
            f"Test log loss per model: {said}.",
            figures.draw_log_loss(losses, {**references, "goal": _GOAL}),
        ),
        Figure(
            "improvement",
            f"Improvement over {base} (the paper's figure 11)",
            f"By how many percent the test loss is lower than that of {base}.",
            "Improvement per model in percent: "
            + ", ".join(f"{line['title']} {line['improvement_percent']:.2f}" for line in lines[1:])
            + ".",
            figures.draw_bars(gains, label="lower loss, percent", digits=2),
        ),
        Figure(
            "efficiency",
            "Efficiency",
            "One over loss times parameters in millions, all parameters counted: small models win "
            "as long as they are not much worse.",
            "Efficiency per model.",
            figures.draw_bars(efficiency, label="1 / (loss x million parameters)", digits=3),
        ),
        Figure(
            "learning_curves",
            "Learning curves",
            "Thin lines are the training loss, marks the loss on held-out rows, of the first seed.",
            "Training and held-out loss of each model by update.",
            figures.draw_learning_curves(curves, {}),
        ),
    ]


def _abbreviate(title: str) -> str:
    """As a figure has room for it."""
    return title.replace("annotated", "ann.")


def _write_table(lines: Sequence[Mapping[str, Any]]) -> str:
    names = [name for name in lines[0] if name not in ("log_loss_ci95", "by_seed")]
    rows = [[*names, "ci_low", "ci_high"]]
    for line in lines:
        values = [*(line[name] for name in names), *line["log_loss_ci95"]]
        rows.append(
            [
                "" if v is None else f"{v:.6g}" if isinstance(v, float) else quote_cell(str(v))
                for v in plain(values)
            ]
        )
    return "".join(",".join(row) + "\n" for row in rows)
