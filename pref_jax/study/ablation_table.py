"""The table of an ablation: losses on the held-out rows of all folds, each beside the base's."""

import contextlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from pref_jax.data.arena import read_comparisons
from pref_jax.errors import InputError
from pref_jax.evaluation.baselines import FILE as BASELINES_FILE
from pref_jax.evaluation.baselines import Baselines
from pref_jax.evaluation.metrics import bootstrap_mean, compare_row_losses, measure_row_losses
from pref_jax.evaluation.predictions import FILE as PREDICTIONS_FILE
from pref_jax.evaluation.predictions import Predictions
from pref_jax.files import read_json, write_durably, write_json
from pref_jax.study.plan import Part
from pref_jax.study.variants import BASE, FOLDS, Stage, Variant, part_name

EVALUATION = "evaluation.json"
_REFERENCES = ("length", "prior")


def write_table(
    folder: Path, stage: Stage, variants: Sequence[Variant], parts: Mapping[str, Part]
) -> Path:
    """Writes ``screen.md`` and ``screen.json``, or as the stage is called.

    Args:
      folder: of the ablation.
      stage: what was run.
      variants: those of which every fold and seed is finished; base first where it is.
      parts: of all variants.

    Returns:
      The Markdown file.

    Raises:
      InputError: a part is damaged.
    """
    content: dict[str, Any] = {
        "stage": stage.name,
        "max_length": stage.max_length,
        "epochs": stage.epochs,
        "folds": stage.folds,
        "seeds": stage.seeds,
        "variants": [],
        "references": {},
        "adversarial": [],
    }
    if variants and variants[0].name == BASE:
        _fill(content, folder, stage, variants, parts)
    write_json(folder / f"{stage.name}.json", content)
    path = folder / f"{stage.name}.md"
    write_durably(path, format_table(content).encode())
    return path


def _fill(
    content: dict[str, Any],
    folder: Path,
    stage: Stage,
    variants: Sequence[Variant],
    parts: Mapping[str, Part],
) -> None:
    read = {v.name: _read(folder, stage, v.name) for v in variants}
    base = read[BASE][0]
    content["rows"] = len(base)
    losses = {name: _average(found) for name, found in read.items()}
    for variant in variants:
        if [p.ids for p in read[variant.name]] != [p.ids for p in read[BASE]]:
            _refuse_other_rows(folder, stage, (BASE, variant.name))
            made = folder / stage.name / variant.name
            raise InputError(f"variant {variant.name}", "is of other rows than base", _again(made))
        line = {
            "name": variant.name,
            "kind": variant.kind,
            "changes": _describe(variant),
            "log_loss": float(losses[variant.name].mean()),
            "log_loss_ci95": _interval(losses[variant.name]),
            "accuracy": float(np.mean([_hits(p).mean() for p in read[variant.name]])),
            "seconds": _count_seconds(folder, stage, variant, parts),
            "passes": _count_passes(variant, stage, parts),
        }
        if variant.name != BASE:
            compared = compare_row_losses(losses[variant.name], losses[BASE])
            line |= {
                "difference": compared["difference"],
                "difference_ci95": compared["ci95"],
                "p_value": compared["p_value"],
            }
        content["variants"].append(line)
    content["references"] = _find_references(folder, stage, "", losses[BASE])
    for variant in variants:
        found = _read(folder, stage, variant.name, "adversarial/", optional=True)
        if found:
            row_losses = _average(found)
            content["adversarial"].append(
                {
                    "name": variant.name,
                    "rows": len(row_losses) // stage.folds,
                    "log_loss": float(row_losses.mean()),
                    "log_loss_ci95": _interval(_by_row(row_losses, stage)),
                    "accuracy": float(np.mean([_hits(p).mean() for p in found])),
                }
            )
    if content["adversarial"]:
        content["adversarial"].append(_measure_lengths(folder, stage))


@contextlib.contextmanager
def reading(part: Path) -> Iterator[None]:
    """Files of a part: one that is damaged is mended by making the part again.

    Raises:
      InputError: what was raised, with that remedy.
    """
    try:
        yield
    except InputError as error:
        raise InputError(error.where, error.what, _again(part)) from error


def _again(part: Path) -> str:
    return f"remove {part} and type the same command again"


def read_predictions(part: Path) -> Predictions:
    """The answers of a part."""
    with reading(part):
        return Predictions.read(part / PREDICTIONS_FILE)


def read_baselines(part: Path) -> Baselines:
    """What needs no encoder, fitted on the training rows of a part."""
    with reading(part):
        return Baselines.load(part / BASELINES_FILE)


def _read(
    folder: Path, stage: Stage, name: str, prefix: str = "", *, optional: bool = False
) -> list[Predictions]:
    """For each seed, the rows of all folds behind each other; nothing where a part is missing."""
    joined = []
    for seed in range(stage.seeds):
        made = [
            folder / f"{prefix}{part_name(stage, name, seed, fold)}" for fold in range(stage.folds)
        ]
        if optional and not all((part / PREDICTIONS_FILE).is_file() for part in made):
            return []
        joined.append(_join([read_predictions(part) for part in made]))
    return joined


def _refuse_other_rows(folder: Path, stage: Stage, names: Sequence[str]) -> None:
    """Of variants that do not have the same rows, one has not those of its fold.

    Raises:
      InputError: names the file that has others.
    """
    for name, place in itertools.product(names, stage.repeats):
        part = folder / part_name(stage, name, *place)
        valid = folder / stage.name / FOLDS / f"valid{place[1]}.csv"
        if read_predictions(part).ids != read_comparisons(valid, labelled=True).ids:
            raise InputError(
                str(part / PREDICTIONS_FILE), "is not of the rows of its fold", _again(part)
            )


def _join(parts: Sequence[Predictions]) -> Predictions:
    return Predictions(
        ids=[name for part in parts for name in part.ids],
        probabilities=np.concatenate([part.probabilities for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
        tie_allowed=np.concatenate([part.tie_allowed for part in parts]),
        words=np.concatenate([part.words for part in parts]),
        turns=np.concatenate([part.turns for part in parts]),
        sources=[source for part in parts for source in part.sources],
    )


def _average(found: Sequence[Predictions]) -> np.ndarray:
    """Loss of each row, mean over seeds."""
    return np.mean([predictions.measure_row_losses() for predictions in found], axis=0)


def _by_row(losses: np.ndarray, stage: Stage) -> np.ndarray:
    """Mean over the models of all folds, which have answered the same rows."""
    return losses.reshape(stage.folds, -1).mean(axis=0)


def _hits(predictions: Predictions) -> np.ndarray:
    values = predictions.probabilities.copy()
    values[~predictions.tie_allowed, 2] = 0.0
    return values.argmax(axis=1) == predictions.labels


def _interval(losses: np.ndarray) -> list[float]:
    return [float(bound) for bound in np.percentile(bootstrap_mean(losses), [2.5, 97.5])]


def _describe(variant: Variant) -> str:
    words = [f"{field}={value}" for field, value in variant.config.items()]
    if variant.rows == "all":
        words.append("trained also on rows that could not be a tie")
    if variant.teacher:
        words.append("soft labels of base")
    if variant.read in ("swap_average", "calibrate"):
        words.append(f"base read with {variant.read}")
    if variant.read == "embeddings":
        words.append("logistic regression over frozen embeddings, lengths, cosines")
    return ", ".join(words)


def _count_seconds(
    folder: Path, stage: Stage, variant: Variant, parts: Mapping[str, Part]
) -> float:
    """Of training, over folds and seeds, with all that it needs; evaluation is not counted."""
    needed: set[str] = set()

    def add(name: str) -> None:
        if name not in needed:
            needed.add(name)
            for other in parts[name].needs:
                add(other)

    for place in stage.repeats:
        add(part_name(stage, variant.name, *place))
    total = 0.0
    for name in needed:
        if parts[name].kind == "train":
            total += _read_seconds(folder / name, "result.json", "train_seconds")
        elif parts[name].kind in ("vectors", "embeddings"):
            total += _read_seconds(folder / name, EVALUATION, "seconds")
    return total


def _read_seconds(part: Path, file: str, name: str) -> float:
    with reading(part):
        seconds = read_json(part / file, "").get(name)
        if not _is_number(seconds):
            raise InputError(str(part / file), f"has no number {name}", "")
    return float(seconds)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


def _count_passes(variant: Variant, stage: Stage, parts: Mapping[str, Part]) -> int:
    """How often a row goes through the model to be answered."""
    config = parts[part_name(stage, variant.name, 0, 0)].config
    twice = variant.read == "swap_average"
    if config is not None and config.model.symmetric and config.input.layout != "parallel":
        twice = True
    return 2 if twice else 1


def _baselines(folder: Path, stage: Stage) -> list[Baselines]:
    return [read_baselines(folder / part_name(stage, BASE, 0, fold)) for fold in range(stage.folds)]


def _find_references(
    folder: Path, stage: Stage, prefix: str, base: np.ndarray
) -> dict[str, dict[str, Any]]:
    """What needs no encoder, fitted on each fold's training rows."""
    found: dict[str, dict[str, Any]] = {}
    for name in _REFERENCES:
        losses = []
        for fold, baselines in enumerate(_baselines(folder, stage)):
            rows = read_predictions(folder / f"{prefix}{part_name(stage, BASE, 0, fold)}")
            answers = baselines.predict(name, rows.words)
            losses.append(measure_row_losses(answers, rows.labels, rows.tie_allowed))
        joined = np.concatenate(losses)
        compared = compare_row_losses(joined, base)
        found[name] = {
            "log_loss": float(joined.mean()),
            "log_loss_ci95": _interval(joined),
            "difference": compared["difference"],
            "difference_ci95": compared["ci95"],
        }
    return found


def _measure_lengths(folder: Path, stage: Stage) -> dict[str, Any]:
    """The regression on lengths on the adversarial rows."""
    losses, hits = [], []
    for fold, baselines in enumerate(_baselines(folder, stage)):
        rows = read_predictions(folder / f"adversarial/{part_name(stage, BASE, 0, fold)}")
        answers = baselines.predict("length", rows.words)
        losses.append(measure_row_losses(answers, rows.labels, rows.tie_allowed))
        hits.append((answers[:, :2].argmax(axis=1) == rows.labels).mean())
    by_row = np.mean(losses, axis=0)
    return {
        "name": "length only",
        "rows": len(by_row),
        "log_loss": float(by_row.mean()),
        "log_loss_ci95": _interval(by_row),
        "accuracy": float(np.mean(hits)),
    }


def read_table(folder: Path, stage: str) -> dict[str, Any]:
    """The JSON of a stage.

    Raises:
      InputError: there is none, or it is damaged.
    """
    path = folder / f"{stage}.json"
    content = read_json(path, f"run --stage={stage} first, or name --variants")
    lines = content.get("variants")
    if not isinstance(lines, list) or not all(map(_is_line, lines)):
        raise InputError(
            str(path), "is not a table of variants", f"run --stage={stage} again to write it anew"
        )
    return content


def _is_line(line: Any) -> bool:
    """Whether `pick_best` finds in a line what it needs."""
    return (
        isinstance(line, dict)
        and all(isinstance(line.get(name), str) for name in ("name", "kind"))
        and _is_number(line.get("log_loss"))
    )


def pick_best(content: Mapping[str, Any]) -> list[str]:
    """Base, the best three options and the best set, by log loss."""
    lines = sorted(content["variants"], key=lambda line: line["log_loss"])
    options = [line["name"] for line in lines if line["kind"] == "option"][:3]
    sets = [line["name"] for line in lines if line["kind"] == "set"][:1]
    return [BASE, *options, *sets]


def format_table(content: Mapping[str, Any]) -> str:
    """The table as Markdown, in the order of the list of variants."""
    head = (
        f"{content.get('rows', 0)} held-out rows of {content['folds']} folds, "
        f"{content['max_length']} tokens, {content['epochs']:g} epochs, {content['seeds']} seed(s)"
    )
    lines = [
        head,
        "",
        "| variant | log loss (95 % interval) | difference from base (95 % interval) | accuracy "
        "| training seconds | prediction passes | what it changes |",
        "|---|---|---|---|---|---|---|",
    ]
    for line in content["variants"]:
        lines.append(
            f"| {line['name']} | {_show(line, 'log_loss')} | {_show(line, 'difference', '+')} "
            f"| {line['accuracy']:.3f} | {line['seconds']:.0f} | {line['passes']} "
            f"| {line['changes']} |"
        )
    for name, line in content["references"].items():
        lines.append(
            f"| {name} only | {_show(line, 'log_loss')} | {_show(line, 'difference', '+')} "
            "| | | | |"
        )
    if content["adversarial"]:
        lines += [
            "",
            f"{content['adversarial'][0]['rows']} adversarial rows, A against B:",
            "",
            "| variant | log loss (95 % interval) | accuracy |",
            "|---|---|---|",
        ]
        lines += [
            f"| {line['name']} | {_show(line, 'log_loss')} | {line['accuracy']:.3f} |"
            for line in content["adversarial"]
        ]
    return "\n".join(lines) + "\n"


def _show(line: Mapping[str, Any], name: str, sign: str = "") -> str:
    if name not in line:
        return ""
    low, high = line[f"{name}_ci95"]
    return f"{line[name]:{sign}.4f} ({low:{sign}.4f} to {high:{sign}.4f})"
