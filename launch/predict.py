"""Writes the probabilities of A wins, B wins and tie for each row of a file.

Examples:
  python launch/predict.py --workdir=runs/quickstart --data=test.csv --output=submission.csv
  python launch/predict.py --workdir=runs/mine --data=test.csv --output=out.csv --swap_average
"""

from absl import flags

from pref_jax import command

flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
flags.DEFINE_string("data", None, "CSV, CSV.gz or Parquet; labels are not needed.", required=True)
flags.DEFINE_string("output", None, "The submission file to write.", required=True)
flags.DEFINE_bool("swap_average", False, "Score both orders of the responses and average.")
flags.DEFINE_string("base", None, "Where the frozen weights of the run are now, if they moved.")


def main(options):
    from pref_jax.evaluation.commands import predict

    predict(
        options.workdir,
        options.data,
        options.output,
        swap_average=options.swap_average,
        base=options.base,
    )


if __name__ == "__main__":
    command.run(main, doc=__doc__)
