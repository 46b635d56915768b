"""Averages the probabilities of several runs: folds, seeds, or different models.

Examples:
  python launch/ensemble.py runs/fold0 runs/fold1 --data=test.csv --output=submission.csv
  python launch/ensemble.py runs/bert runs/llama --weights=1,2 --data=test.csv --output=out.csv
  python launch/ensemble.py runs/fold0 runs/fold1 --out_of_fold --output=teacher.csv
  python launch/ensemble.py runs/fold0 runs/fold1 --mean_adapters --output=runs/mean

With --out_of_fold nothing is computed: what each run said of the fold that it had not seen is
joined into one file, the soft labels for --config.data.soft_labels=teacher.csv.

With --mean_adapters the runs are of one base with adapters; the new workdir is a run whose adapters
and head are the mean of theirs, for the price of one: predict, evaluate and export take it.
"""

from typing import Any

from absl import flags

from pref_jax import command

flags.DEFINE_string("data", None, "CSV, CSV.gz or Parquet; labels are not needed.")
flags.DEFINE_string(
    "output", None, "The submission file to write, or the new workdir.", required=True
)
flags.DEFINE_bool("swap_average", False, "Score both orders of the responses and average.")
flags.DEFINE_string("weights", None, "A number for each run, commas between; by default equal.")
flags.DEFINE_string("base", None, "Where the frozen weights of the runs are now, if they moved.")
flags.DEFINE_bool("out_of_fold", False, "Join the held-out folds of the runs instead.")
flags.DEFINE_bool("mean_adapters", False, "Make one run of the mean of the runs' adapters instead.")


def main(options: Any, runs: list[str]) -> None:
    from pref_jax.errors import InputError
    from pref_jax.evaluation.ensemble import ensemble, join_folds, parse_weights

    instead = [name for name in ("out_of_fold", "mean_adapters") if options[name].value]
    if len(instead) > 1:
        raise InputError("--out_of_fold", "--mean_adapters is there too", "leave one of them out")
    if bool(instead) == (options.data is not None):
        raise InputError(
            "--data",
            f"is not read with --{instead[0]}" if instead else "no file is named",
            "leave one of them out" if instead else "type --data=test.csv",
        )
    read = {"out_of_fold": (), "mean_adapters": ("weights", "base")}
    for name in ("swap_average", "weights", "base"):
        if instead and options[name].value and name not in read[instead[0]]:
            raise InputError(f"--{name}", f"is not read with --{instead[0]}", "leave it out")
    if options.out_of_fold:
        join_folds(runs, options.output)
        return
    if options.mean_adapters:
        from pref_jax.training.mean import mean_adapters

        weights = parse_weights(options.weights, runs)
        mean_adapters(runs, options.output, weights=weights, base=options.base)
        return
    ensemble(
        runs,
        options.data,
        options.output,
        swap_average=options.swap_average,
        weights=options.weights,
        base=options.base,
    )


if __name__ == "__main__":
    command.run(main, doc=__doc__, positional="RUN")
