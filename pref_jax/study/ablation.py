"""``launch/ablate.py``: trains the variants of a recipe that are missing, then their table."""

import dataclasses
import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from ml_collections import ConfigDict

from pref_jax.data.arena import TIE, Comparisons, read_comparisons
from pref_jax.errors import InputError
from pref_jax.evaluation.predict import fit_temperature, to_probabilities
from pref_jax.evaluation.predictions import FILE as PREDICTIONS_FILE
from pref_jax.evaluation.predictions import Predictions
from pref_jax.files import make_output_folder, write_json
from pref_jax.study.ablation_table import (
    EVALUATION,
    pick_best,
    read_baselines,
    read_predictions,
    read_table,
    reading,
    write_table,
)
from pref_jax.study.folds import check_folds, check_rows, write_folds
from pref_jax.study.plan import Part
from pref_jax.study.run import ABLATION, held, is_finished, make_missing, train_whole
from pref_jax.study.variants import (
    Stage,
    Variant,
    choose_variants,
    make_parts,
    make_possible_parts,
    part_name,
    read_variants,
)

logger = logging.getLogger(__name__)

_VECTORS, _TEACHER = "vectors.npz", "teacher.csv"


def ablate(
    config: ConfigDict,
    data: str,
    workdir: str,
    stage: Stage,
    *,
    names: Sequence[str] | None = None,
    variants_file: str | None = None,
    adversarial: str | None = None,
    max_hours: float | None = None,
) -> Path:
    """Makes the parts of a stage that are missing; after each, the table of what is finished.

    Args:
      config: the recipe that variants change.
      data: labelled rows; those whose judges could call a tie are held out, fold by fold.
      workdir: folder of the ablation, for all of its stages.
      stage: tokens, epochs, folds and seeds.
      names: of variants; None: all that go with the recipe, or in the stage "confirm" base, the
        best three options and the best set of the table of "screen", and the regression.
      variants_file: TOML; None: the project's own list.
      adversarial: rows without ties that the base, the best three options and the best set answer
        at the end.
      max_hours: no part is begun later than this.

    Returns:
      The table, Markdown; beside it the same as JSON.

    Raises:
      InputError: wrong input, or a folder that holds something else.
      RunError: a part failed, or was stopped.
    """
    from pref_jax import compilation

    started = time.monotonic()
    _check_flags(stage, names, max_hours)
    variants = read_variants(variants_file)
    comparisons = read_comparisons(data, labelled=True)
    check_rows(comparisons, stage.folds)
    tricky = None if adversarial is None else _read_decided(adversarial)
    folder = make_output_folder(workdir, "--workdir")
    possible, refused = make_possible_parts(config, variants, stage, comparisons.digest)
    if names is None:
        if variants_file is not None and refused:  # the user's own entry is wrong
            raise next(iter(refused.values()))
        names = _find_names(variants, refused, stage, folder)
    chosen = choose_variants(variants, names)
    parts = make_parts(config, chosen, stage, comparisons.digest)

    def make(part: Part) -> None:
        _make(part, folder, comparisons, tricky)

    def report() -> Path:
        finished = [
            variant
            for variant in variants.values()
            if all(
                name in possible and is_finished(folder, possible[name], possible)
                for name in (part_name(stage, variant.name, *place) for place in stage.repeats)
            )
        ]
        return write_table(folder, stage, finished, possible)

    def is_late() -> bool:
        if max_hours is None or time.monotonic() - started <= max_hours * 3600.0:
            return False
        logger.info("%g hours are over; the same command goes on", max_hours)
        return True

    def go_on(wanted: dict[str, Part]) -> bool:
        """Whether all of it was done in time."""
        if is_late():  # reading the data takes a while, too
            return False
        for _ in make_missing(folder, wanted, make, possible | wanted):
            report()
            if is_late():
                return False
        return True

    with held(folder, ABLATION):
        compilation.keep_compiled_programs()
        if go_on(parts) and tricky is not None:
            report()
            best = pick_best(read_table(folder, stage.name))
            trained = [v for v in variants.values() if v.name in best and v.read == "model"]
            go_on(_make_adversarial_parts(trained, stage, tricky.digest))
        return report()


def _check_flags(stage: Stage, names: Sequence[str] | None, max_hours: float | None) -> None:
    if not 0 < stage.epochs < math.inf:
        raise InputError("--epochs", f"{stage.epochs:g} is out of range", "it must be above 0")
    if names is not None and not names:
        raise InputError("--variants", "it is empty", "name variants, or leave it out for all")
    if max_hours is not None and math.isnan(max_hours):
        raise InputError("--max_hours", "nan is not a number of hours", "give 0 or more")


def _find_names(
    variants: Mapping[str, Variant], refused: Mapping[str, InputError], stage: Stage, folder: Path
) -> list[str]:
    """The variants of a stage where none are named.

    Raises:
      InputError: no table of "screen" to confirm, or one of another list.
    """
    fitting = [v for v in variants.values() if v.name not in refused]
    if stage.name != "confirm":
        for error in refused.values():
            logger.warning("left out: %s", error)
        return [v.name for v in fitting]
    best = pick_best(read_table(folder, "screen"))
    for name in best:
        if name not in variants:
            raise InputError(
                str(folder / "screen.json"),
                f"the variant {name!r} is not in the list any more",
                "run --stage=screen again, or name --variants",
            )
    return [*best, *(v.name for v in fitting if v.read == "embeddings")]


def _make_adversarial_parts(
    variants: Sequence[Variant], stage: Stage, digest: str
) -> dict[str, Part]:
    parts = {}
    for variant in variants:
        for place in stage.repeats:
            trained = part_name(stage, variant.name, *place)
            name = f"adversarial/{trained}"
            parts[name] = Part(name, "adversarial", (trained,), {"data": digest})
    return parts


def _read_decided(path: str) -> Comparisons:
    """Rows of which none is a tie, the tie taken out of what models may say."""
    read = read_comparisons(path, labelled=True)
    if (read.labels == TIE).any():
        raise InputError(path, "a row is a tie", "leave ties out of the adversarial rows")
    at = read.table.column_names.index("tie_allowed")
    forbidden = pa.array(np.zeros(len(read), bool))
    return dataclasses.replace(read, table=read.table.set_column(at, "tie_allowed", forbidden))


def _make(part: Part, folder: Path, data: Comparisons, tricky: Comparisons | None) -> None:
    output, fold = folder / part.name, part.settings.get("fold")
    if part.kind == "folds":
        write_folds(data, part.settings["folds"], output)
        return
    if part.kind == "vectors":
        _embed(part, output, data)
        return
    if part.kind == "adversarial":
        assert tricky is not None
        _answer(folder / part.needs[0], tricky, output, swap_average=False)
        return
    files = folder / part.needs[0]  # every other part needs the folds first
    check_folds(files, part.settings["fold"])
    if part.kind == "train":
        _train(part, folder, files)
        return
    valid = read_comparisons(files / f"valid{fold}.csv", labelled=True)
    if part.kind == "swap_average":
        _answer(folder / part.needs[1], valid, output, swap_average=True)
    elif part.kind == "calibrate":
        _calibrate(part, folder, output)
    else:
        train = read_comparisons(files / f"train{fold}.csv", labelled=True)
        _regress(folder / part.needs[1] / _VECTORS, train, valid, output)


def _train(part: Part, folder: Path, files: Path) -> None:
    from pref_jax.evaluation.ensemble import join_folds
    from pref_jax.evaluation.submission import OUT_OF_FOLD_FILE, read_submission

    assert part.config is not None
    config, fold = part.config.copy_and_resolve_references(), part.settings["fold"]
    rows = "all" if part.settings["rows"] == "all" else "train"
    with config.unlocked():
        config.data.train = str(files / f"{rows}{fold}.csv")
        if config.data.fold is None:
            config.data.valid = str(files / f"valid{fold}.csv")
        if len(part.needs) > 1:
            teachers = [str(folder / name) for name in part.needs[1:]]
            config.data.soft_labels = str((folder / part.name).with_suffix(f".{_TEACHER}"))
            Path(config.data.soft_labels).parent.mkdir(parents=True, exist_ok=True)
            for teacher in map(Path, teachers):
                with reading(teacher):
                    read_submission(teacher / OUT_OF_FOLD_FILE)
            join_folds(teachers, config.data.soft_labels)
    train_whole(config, folder / part.name)


def _answer(workdir: Path, rows: Comparisons, output: Path, *, swap_average: bool) -> None:
    """A trained run's answers on other rows."""
    from pref_jax.evaluation.commands import score
    from pref_jax.experiment import load_run

    run = load_run(workdir)
    _write(output, Predictions.collect(rows, score(run, rows, swap_average=swap_average)), workdir)


def _calibrate(part: Part, folder: Path, output: Path) -> None:
    """The base's answers at the temperature that fits the other folds best.

    A temperature fitted to the rows that it is judged by would flatter it.
    """
    fold = part.settings["fold"]
    read = [read_predictions(folder / name) for name in part.needs[1:]]
    others = [predictions for number, predictions in enumerate(read) if number != fold]
    logits = [np.log(np.maximum(p.probabilities, 1e-300)) for p in others]
    temperature = fit_temperature(
        np.concatenate(logits),
        np.concatenate([p.labels for p in others]),
        np.concatenate([p.tie_allowed for p in others]),
    )
    mine = np.log(np.maximum(read[fold].probabilities, 1e-300))
    answers = to_probabilities(mine, temperature=temperature, tie_allowed=read[fold].tie_allowed)
    answered = dataclasses.replace(read[fold], probabilities=answers)
    _write(output, answered, folder / part.needs[1 + fold], temperature=temperature)


def _embed(part: Part, output: Path, data: Comparisons) -> None:
    from pref_jax.study.embeddings import embed, save_vectors

    assert part.config is not None
    started = time.monotonic()
    kept = dataclasses.replace(data, table=data.table.filter(pa.array(data.tie_allowed)))
    vectors = embed(part.config, kept)
    output.mkdir(parents=True, exist_ok=True)
    save_vectors(output / _VECTORS, kept.ids, vectors)
    write_json(output / EVALUATION, {"seconds": time.monotonic() - started})


def _regress(vectors: Path, train: Comparisons, valid: Comparisons, output: Path) -> None:
    from pref_jax.study.embeddings import fit_and_predict, load_vectors, make_features

    started = time.monotonic()
    answers = fit_and_predict(
        make_features(load_vectors(vectors, train.ids), train),
        train.labels,
        train.groups,
        make_features(load_vectors(vectors, valid.ids), valid),
    )
    seconds = time.monotonic() - started
    _write(output, Predictions.collect(valid, answers), None, seconds=seconds)


def _write(output: Path, predictions: Predictions, run: Path | None, **more: Any) -> None:
    output.mkdir(parents=True, exist_ok=True)
    predictions.write(output / PREDICTIONS_FILE)
    baselines = None if run is None else read_baselines(run)
    write_json(output / EVALUATION, {**predictions.evaluate(baselines), **more})
