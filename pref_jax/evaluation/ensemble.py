"""``launch/ensemble.py``: one answer of several runs."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pref_jax import compilation
from pref_jax.annotation.store import refuse_paid_ratings
from pref_jax.data.arena import read_comparisons
from pref_jax.errors import InputError
from pref_jax.evaluation.commands import score
from pref_jax.evaluation.metrics import measure_row_losses
from pref_jax.evaluation.submission import OUT_OF_FOLD_FILE, read_submission, write_submission
from pref_jax.experiment import load_run
from pref_jax.files import check_output_file, read_json, run_inputs
from pref_jax.training.mirror import local_run


def parse_weights(text: str | None, runs: Sequence[str]) -> np.ndarray:
    """Weights of the runs, float64 adding up to 1; equal where nothing is said.

    Raises:
      InputError: not one number above 0 for each run.
    """
    if text is None:
        return np.full(len(runs), 1.0 / len(runs))
    try:
        weights = np.array([float(part) for part in text.split(",")])
    except ValueError as error:
        raise InputError("--weights", f"{text!r} is no list of numbers", "type 2,1,1") from error
    if len(weights) != len(runs) or not (np.isfinite(weights) & (weights > 0)).all():
        raise InputError(
            "--weights",
            f"{text!r} is not one number above 0 for each of {len(runs)} runs",
            "give as many as there are runs",
        )
    return weights / weights.sum()


def ensemble(
    runs: Sequence[str],
    data: str,
    output: str,
    *,
    swap_average: bool = False,
    weights: str | None = None,
    base: str | None = None,
) -> None:
    """Writes the weighted mean of the runs' probabilities; one run is in memory at a time.

    Where ``data`` has labels, prints the log loss of each run and of the mean.

    Args:
      runs: workdirs.
      data, output, swap_average, base: as for `pref_jax.evaluation.commands.predict`.
      weights: numbers with commas between; None: all the same.

    Raises:
      InputError: anything about the runs, data or output; nothing is written then.
    """
    shares = parse_weights(weights, runs)
    _check(runs, output, data)
    compilation.keep_compiled_programs()
    comparisons = read_comparisons(data, labelled=None)
    labels, allowed = comparisons.labels, comparisons.tie_allowed
    labelled = bool((labels >= 0).all())
    mean = np.zeros((len(comparisons), 3))
    for workdir, share in zip(runs, shares, strict=True):
        run = load_run(workdir, base=base)
        if run.experiment.properties is not None:
            raise InputError(
                workdir, "is a multi-task run, which knows no preferences", "leave it out"
            )
        probabilities = score(run, comparisons, swap_average=swap_average)
        mean += share * probabilities
        if labelled:
            _print_loss(workdir, probabilities, labels, allowed)
        del run  # before the next one is loaded
    write_submission(Path(output), comparisons.ids, mean)
    if labelled:
        _print_loss("all together", mean, labels, allowed)
    print(f"{len(comparisons)} rows, mean of {len(runs)} runs: {output}")


def join_folds(runs: Sequence[str], output: str) -> None:
    """Writes what each run said of the fold that it had not seen, all folds in one file.

    It is what a teacher's probabilities should be (`data.soft_labels`): no row's comes from a model
    that was trained on it. Rows that several runs held out get the mean.

    Raises:
      InputError: a run without a held-out fold, or of other data; nothing is written then.
    """
    _check(runs, output, None)
    folders = [local_run(workdir, checkpoint=False) for workdir in runs]
    missing = _check_folds(runs, folders)
    sums: dict[str, np.ndarray] = {}
    counts: dict[str, int] = {}
    for folder in folders:
        path = folder / OUT_OF_FOLD_FILE
        if not path.is_file():
            raise InputError(
                str(path), "is missing", "train that run to its end with --config.data.fold"
            )
        ids, probabilities = read_submission(path)
        for name, values in zip(ids, probabilities, strict=True):
            sums[name] = sums.get(name, 0.0) + values
            counts[name] = counts.get(name, 0) + 1
    mean = np.stack([sums[name] / counts[name] for name in sums])
    write_submission(Path(output), list(sums), mean)
    print(f"{len(sums)} rows of {len(runs)} folds: {output}")
    for line in missing:
        print(line)


def _check_folds(runs: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """Whether the runs, read from ``folders``, are folds of one file.

    Returns:
      A line for each cross-validation of which no run has some fold.

    Raises:
      InputError: runs of other data than the first one's.
    """
    remedy = "name a run of launch/train.py"
    models = [read_json(folder / "model.json", remedy) for folder in folders]
    digests = [model.get("data", {}).get("train") for model in models]
    found: dict[tuple[int, int], set[int]] = {}
    for workdir, folder, digest in zip(runs, folders, digests, strict=True):
        if digest != digests[0]:
            what = f"was trained on other data than {runs[0]}"
            raise InputError(workdir, what, "join runs whose --config.data.train is one file")
        config = read_json(folder / "config.json", remedy)
        data = config.get("data", {})
        if data.get("fold") is not None:
            found.setdefault((data["folds"], config["seed"]), set()).add(data["fold"])
    return [
        f"note: of {folds} folds (seed {seed}) no run has {', '.join(map(str, sorted(left)))}:"
        " their rows are not in the file"
        for (folds, seed), seen in found.items()
        if (left := set(range(folds)) - seen)
    ]


def _check(runs: Sequence[str], output: str, data: str | None) -> None:
    for number, workdir in enumerate(runs):
        check_output_file(output, inputs=(data, *run_inputs(workdir)), outside=workdir)
        if Path(workdir).resolve() in [Path(other).resolve() for other in runs[:number]]:
            raise InputError(workdir, "is named twice", "name it once; --weights gives it more")
    refuse_paid_ratings(Path(output))


def _print_loss(
    name: str, probabilities: np.ndarray, labels: np.ndarray, allowed: np.ndarray
) -> None:
    loss = float(measure_row_losses(probabilities, labels, allowed).mean())
    print(f"{name:<40}{loss:.4f}")
