"""``launch/predict.py`` and ``launch/evaluate.py``: from a workdir and a file to answers."""

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pref_jax import compilation, hosts
from pref_jax.annotation.ratings import read_ratings
from pref_jax.annotation.store import refuse_paid_ratings
from pref_jax.data.arena import Comparisons, read_comparisons
from pref_jax.data.batches import Samples
from pref_jax.errors import InputError
from pref_jax.evaluation.baselines import Baselines, count_response_words
from pref_jax.evaluation.predict import Predictor, to_probabilities
from pref_jax.evaluation.predictions import Predictions
from pref_jax.evaluation.rating_metrics import (
    RatingBaselines,
    evaluate_ratings,
    to_rating_probabilities,
)
from pref_jax.evaluation.submission import round_probabilities, write_submission
from pref_jax.experiment import Run, load_run
from pref_jax.files import check_output_file, run_inputs, write_durably, write_json
from pref_jax.memory import shortage_explained
from pref_jax.training.progress import Progress


def score(
    run: Run, comparisons: Comparisons, *, swap_average: bool = False, swap_share: float = 1.0
) -> np.ndarray:
    """Probabilities ``[n, 3]`` of a file's rows.

    Args:
      run: the trained run.
      comparisons: the file.
      swap_average: mean over both orders of the responses, the exchanged one turned back; a
        symmetric model says the same of both, and is asked once.
      swap_share: of the rows, the share whose other order is read: those that `closest_rows` picks.
    """
    if run.experiment.config.model.symmetric:
        swap_average = False
    samples = run.experiment.make_samples(comparisons, orders=2 if swap_average else 1)
    predictor, count = run.experiment.make_predictor(), len(comparisons)

    def ask(numbers: np.ndarray) -> np.ndarray:
        logits = _score_samples(run, predictor, samples, numbers)
        return to_probabilities(logits, temperature=run.temperature)

    if not swap_average:
        return ask(np.arange(count))
    if swap_share >= 1:
        first, second = np.split(ask(np.arange(2 * count)), 2)
        return (first + second[:, [1, 0, 2]]) / 2.0
    probabilities = ask(np.arange(count))
    rows = closest_rows(probabilities, swap_share)
    exchanged = ask(count + rows)
    probabilities[rows] = (probabilities[rows] + exchanged[:, [1, 0, 2]]) / 2.0
    return probabilities


def closest_rows(probabilities: np.ndarray, share: float) -> np.ndarray:
    """Numbers of the rows with the smallest |P(A) - P(B)|, at least one, in the file's order.

    A clear row stays clear whichever answer stands first; a close one may turn. docs/ablation.md
    measures what they gain, beside rows picked by P(A) P(B) and at random.

    Args:
      probabilities: ``[n, 3]`` from one order.
      share: of the rows, above 0; rounded up.
    """
    count = min(len(probabilities), math.ceil(share * len(probabilities)))
    ranked = np.argsort(np.abs(probabilities[:, 0] - probabilities[:, 1]), kind="stable")
    return np.sort(ranked[:count])


def score_responses(run: Run, comparisons: Comparisons) -> np.ndarray:
    """A multi-task run's probabilities ``[2 * rows, H, C]`` of each rating of each response."""
    properties = run.experiment.properties
    assert properties is not None
    samples = run.experiment.make_samples(comparisons)
    predictor = run.experiment.make_predictor()
    logits = _score_samples(run, predictor, samples, np.arange(len(samples.labels)))
    return to_rating_probabilities(logits, len(properties.ratings))


def _score_samples(
    run: Run, predictor: Predictor, samples: Samples, numbers: np.ndarray
) -> np.ndarray:
    with shortage_explained(run.experiment, "predict"):
        predictor.compile()  # before the clock starts that tells the time left
        with Progress(
            len(numbers), unit="row", description="score", shown=hosts.is_leader()
        ) as progress:
            done = 0

            def report(more: int) -> None:
                nonlocal done
                done += more
                progress.update(done, rows=more)

            return predictor.logits(run.params, samples, numbers, report=report)


def predict(
    workdir: str,
    data: str,
    output: str,
    *,
    swap_average: bool,
    swap_share: float = 1.0,
    base: str | None = None,
    microbatch_size: int | None = None,
) -> None:
    """Writes the submission for ``data``; ``base`` is where the frozen weights are now.

    ``microbatch_size`` counts the sequences of a device and forward pass; as in training where
    nothing is said.

    A multi-task run writes the likeliest ratings of each response instead, a JSON line each as
    launch/annotate.py does.

    Raises:
      InputError: anything about workdir, data or output; nothing is written then.
    """
    _check_share(swap_average, swap_share)
    hosts.on_leader("output", lambda: _check_output(output, data, workdir))
    compilation.keep_compiled_programs()
    comparisons = read_comparisons(data, labelled=False)
    _agree_on_data(data, comparisons, swap_average, swap_share)
    run = load_run(workdir, base=base, microbatch_size=microbatch_size)
    if run.experiment.properties is not None:
        _refuse_swap(swap_average)
        ratings = score_responses(run, comparisons).argmax(axis=-1)
        if hosts.is_leader():
            write_ratings(Path(output), run, comparisons, ratings)
            print(f"{len(ratings)} responses: {output}")
        return
    probabilities = score(run, comparisons, swap_average=swap_average, swap_share=swap_share)
    if not hosts.is_leader():
        return
    write_submission(Path(output), comparisons.ids, probabilities)
    print(f"{len(comparisons)} rows: {output}")


def evaluate(
    workdir: str,
    data: str,
    *,
    output: str | None,
    swap_average: bool,
    swap_share: float = 1.0,
    base: str | None = None,
    annotations: str | None = None,
    microbatch_size: int | None = None,
) -> dict[str, Any]:
    """Prints a table of the run's results on labelled ``data``; writes JSON where asked.

    Args:
      workdir, data, output, swap_average, swap_share, base, microbatch_size: as in `predict`.
      annotations: the labels of a multi-task run, ratings of the responses in ``data``.

    Raises:
      InputError: anything about workdir, data or output; nothing is written then.
    """
    _check_share(swap_average, swap_share)
    hosts.on_leader("output", lambda: _check_output(output, data, workdir))
    compilation.keep_compiled_programs()
    comparisons = read_comparisons(data, labelled=None if annotations else True)
    _agree_on_data(data, comparisons, swap_average, swap_share)
    run = load_run(workdir, base=base, microbatch_size=microbatch_size)
    if (run.experiment.properties is not None) != (annotations is not None):
        raise InputError(
            "--annotations",
            "the run learned preferences" if annotations else "the run learned ratings",
            "leave it out" if annotations else "name the file of ratings to judge it by",
        )
    if annotations is not None:
        _refuse_swap(swap_average)
        return _evaluate_ratings(run, comparisons, annotations, output)
    # The digits that `predict` writes, ties not yet taken away: what is scored is that file.
    probabilities = round_probabilities(
        score(run, comparisons, swap_average=swap_average, swap_share=swap_share)
    )
    baselines = Baselines.load(run.workdir / "baselines.json")
    result = Predictions.collect(comparisons, probabilities).evaluate(baselines)
    _show(result, print_evaluation, output)
    return result


def _evaluate_ratings(
    run: Run, comparisons: Comparisons, annotations: str, output: str | None
) -> dict[str, Any]:
    properties = run.experiment.properties
    assert properties is not None
    labels = read_ratings(annotations, properties).align(comparisons.ids)
    rated = np.flatnonzero((labels >= 0).any(axis=1))
    if not len(rated):
        raise InputError(
            annotations,
            f"it rates no response of {comparisons.path}",
            "give the ratings of its ids",
        )
    result = evaluate_ratings(
        score_responses(run, comparisons)[rated],
        labels[rated],
        properties.rating_names,
        baselines=RatingBaselines.load(run.workdir / "baselines.json"),
        words=count_response_words(comparisons)[rated],
    )
    _show(result, print_ratings, output)
    return result


def _show(
    result: dict[str, Any], print_table: Callable[[dict[str, Any]], None], output: str | None
) -> None:
    """Prints a result on the leader, and writes it where asked."""
    if not hosts.is_leader():
        return
    print_table(result)
    if output is not None:
        write_json(Path(output), result)
        print(f"written: {output}")


def write_ratings(path: Path, run: Run, comparisons: Comparisons, ratings: np.ndarray) -> None:
    """Writes ratings ``[2 * rows, H]`` as JSON lines, two a row, in the file's order."""
    properties = run.experiment.properties
    assert properties is not None
    model = f"{run.workdir.resolve().name}@{run.step}"
    lines = []
    texts = comparisons.table.select(["prompt", "response_a", "response_b"])
    cells_of = (cells for batch in texts.to_batches(1000) for cells in batch.to_pylist())
    for row, cells in enumerate(cells_of):
        for side, text in enumerate((cells["response_a"], cells["response_b"])):
            values = ratings[2 * row + side].tolist()
            content = json.dumps([cells["prompt"], text, properties.digest, model])
            line = {
                "id": str(comparisons.ids[row]),
                "side": "ab"[side],
                "query": {},
                "ratings": dict(zip(properties.rating_names, values, strict=True)),
                "reasons": {},
                "key": hashlib.sha256(content.encode()).hexdigest(),
                "model": model,
                "attempts": 1,
                "tokens": {"prompt": 0, "completion": 0},
                "cost": 0.0,
            }
            lines.append(json.dumps(line, ensure_ascii=False))
    write_durably(path, ("\n".join(lines) + "\n").encode())


def _refuse_swap(swap_average: bool) -> None:
    if swap_average:
        raise InputError(
            "--swap_average", "a multi-task run reads one response at a time", "leave it out"
        )


def _check_share(swap_average: bool, swap_share: float) -> None:
    if not 0 < swap_share <= 1:
        raise InputError(
            "--swap_share", f"{swap_share:g} is out of range", "it must be above 0 and at most 1"
        )
    if swap_share < 1 and not swap_average:
        raise InputError(
            "--swap_share", "it is of --swap_average, which is not there", "add --swap_average"
        )


def _check_output(output: str | None, data: str, workdir: str) -> None:
    if output is not None:
        check_output_file(output, inputs=(data, *run_inputs(workdir)), outside=workdir)
        refuse_paid_ratings(Path(output))


def _agree_on_data(
    data: str, comparisons: Comparisons, swap_average: bool, swap_share: float
) -> None:
    flags = {"--swap_average": swap_average, "--swap_share": swap_share}
    hosts.agree(
        data,
        {"content": comparisons.digest, **flags},
        "give every host the same file and flags",
    )


def print_ratings(result: dict[str, Any]) -> None:
    """The table of a multi-task run, beside the majority's and the lengths' macro-F1."""
    low, high = result["log_loss_ci95"]
    print(f"{'responses':<34}{result['rows']}")
    print(f"{'log loss':<34}{result['log_loss']:.4f}  (95 %: {low:.4f} to {high:.4f})")
    for name, part in result["baselines"].items():
        print(f"{f'  {name} baseline':<34}{part['log_loss']:.4f}")
    print(f"{'accuracy':<34}{result['accuracy']:.4f}")
    print(f"{'property':<34}macro F1  kappa  majority  length  ratings")
    properties = {f"  {name}": part for name, part in result["properties"].items()}
    for name, part in {**properties, "mean": result}.items():
        kappa = part["quadratic_kappa"]
        print(
            f"{name:<34}{part['macro_f1']:8.3f}"
            f"{'      -' if kappa is None else f'{kappa:7.3f}'}"
            f"{part['baselines']['majority']['macro_f1']:10.3f}"
            f"{part['baselines']['length']['macro_f1']:8.3f}{part['ratings']:9d}"
        )


def print_evaluation(result: dict[str, Any]) -> None:
    """The table on the terminal."""
    low, high = result["log_loss_ci95"]
    print(f"{'rows':<24}{result['rows']}")
    print(f"{'log loss':<24}{result['log_loss']:.4f}  (95 %: {low:.4f} to {high:.4f})")
    for name, loss in result["baselines"].items():
        print(f"{f'  {name} baseline':<24}{loss:.4f}")
    print(f"{'accuracy':<24}{result['accuracy']:.4f}")
    print(f"{'macro F1':<24}{result['f1']['macro']:.4f}")
    print(f"{'calibration error':<24}{result['calibration_error']:.4f}")
    for kind, slices in result["slices"].items():
        for name, values in slices.items():
            print(f"{f'  {kind}: {name}':<44}{values['log_loss']:.4f}  ({values['rows']} rows)")
