"""``launch/predict.py`` and ``launch/evaluate.py``: from a workdir and a file to answers."""

from pathlib import Path
from typing import Any

import numpy as np

from pref_jax import compilation, hosts
from pref_jax.data.arena import Comparisons, read_comparisons
from pref_jax.evaluation.baselines import Baselines
from pref_jax.evaluation.predict import to_probabilities
from pref_jax.evaluation.predictions import Predictions
from pref_jax.evaluation.submission import round_probabilities, write_submission
from pref_jax.experiment import Run, load_run
from pref_jax.files import check_output_file, write_json
from pref_jax.training.progress import Progress


def score(run: Run, comparisons: Comparisons, *, swap_average: bool = False) -> np.ndarray:
    """Probabilities ``[n, 3]`` of a file's rows.

    Args:
      run: the trained run.
      comparisons: the file.
      swap_average: mean over both orders of the responses, the exchanged one turned back.
    """
    experiment = run.experiment
    orders = 2 if swap_average else 1
    samples = experiment.make_samples(comparisons, orders=orders)
    rows = len(comparisons)
    with Progress(
        rows * orders, unit="row", description="score", shown=hosts.is_leader()
    ) as progress:
        done = 0

        def report(more: int) -> None:
            nonlocal done
            done += more
            progress.update(done, rows=more)

        logits = experiment.make_predictor().logits(
            run.params, samples, np.arange(rows * orders), report=report
        )
    parts = [
        to_probabilities(part, temperature=run.temperature) for part in np.split(logits, orders)
    ]
    return (parts[0] + parts[1][:, [1, 0, 2]]) / 2.0 if swap_average else parts[0]


def predict(
    workdir: str, data: str, output: str, *, swap_average: bool, base: str | None = None
) -> None:
    """Writes the submission for ``data``; ``base`` is where the frozen weights are now.

    Raises:
      InputError: anything about workdir, data or output; nothing is written then.
    """
    hosts.on_leader("output", lambda: _check_output(output, data, workdir))
    compilation.keep_compiled_programs()
    comparisons = read_comparisons(data, labelled=False)
    _agree_on_data(data, comparisons, swap_average)
    run = load_run(Path(workdir), base=base)
    probabilities = score(run, comparisons, swap_average=swap_average)
    if not hosts.is_leader():
        return
    write_submission(Path(output), comparisons.ids, probabilities)
    print(f"{len(comparisons)} rows: {output}")


def evaluate(
    workdir: str, data: str, *, output: str | None, swap_average: bool, base: str | None = None
) -> dict[str, Any]:
    """Prints a table of the run's results on labelled ``data``; writes JSON where asked.

    Args: as in `predict`.

    Raises:
      InputError: anything about workdir, data or output; nothing is written then.
    """
    hosts.on_leader("output", lambda: _check_output(output, data, workdir))
    compilation.keep_compiled_programs()
    comparisons = read_comparisons(data, labelled=True)
    _agree_on_data(data, comparisons, swap_average)
    run = load_run(Path(workdir), base=base)
    # The digits that `predict` writes, ties not yet taken away: what is scored is that file.
    probabilities = round_probabilities(score(run, comparisons, swap_average=swap_average))
    baselines = Baselines.load(run.workdir / "baselines.json")
    result = Predictions.collect(comparisons, probabilities).evaluate(baselines)
    if not hosts.is_leader():
        return result
    print_evaluation(result)
    if output is not None:
        write_json(Path(output), result)
        print(f"written: {output}")
    return result


def _check_output(output: str | None, data: str, workdir: str) -> None:
    if output is not None:
        check_output_file(output, inputs=(data,), outside=workdir)


def _agree_on_data(data: str, comparisons: Comparisons, swap_average: bool) -> None:
    hosts.agree(
        data,
        {"content": comparisons.digest, "--swap_average": swap_average},
        "give every host the same file and flags",
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
