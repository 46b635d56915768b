"""Averages the probabilities of several runs: folds, seeds, or different models.

Examples:
  python launch/ensemble.py runs/fold0 runs/fold1 --data=test.csv --output=submission.csv
  python launch/ensemble.py runs/bert runs/llama --weights=1,2 --data=test.csv --output=out.csv
  python launch/ensemble.py runs/fold0 runs/fold1 --out_of_fold --output=teacher.csv

With --out_of_fold nothing is computed: what each run said of the fold that it had not seen is
joined into one file, the soft labels for --config.data.soft_labels=teacher.csv.
"""

from typing import Any

from absl import flags

from pref_jax import command

flags.DEFINE_string("data", None, "CSV, CSV.gz or Parquet; labels are not needed.")
flags.DEFINE_string("output", None, "The submission file to write.", required=True)
flags.DEFINE_bool("swap_average", False, "Score both orders of the responses and average.")
flags.DEFINE_string("weights", None, "A number for each run, commas between; by default equal.")
flags.DEFINE_string("base", None, "Where the frozen weights of the runs are now, if they moved.")
flags.DEFINE_bool("out_of_fold", False, "Join the held-out folds of the runs instead.")


def main(options: Any, runs: list[str]) -> None:
    from pref_jax.errors import InputError
    from pref_jax.evaluation.ensemble import ensemble, join_folds

    if options.out_of_fold == (options.data is not None):
        raise InputError(
            "--data",
            "is not read with --out_of_fold" if options.out_of_fold else "no file is named",
            "leave one of them out" if options.out_of_fold else "type --data=test.csv",
        )
    if options.out_of_fold:
        join_folds(runs, options.output)
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
