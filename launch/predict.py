"""Writes the probabilities of A wins, B wins and tie for each row of a file.

A multi-task run (configs/multitask_bert.py) writes the ratings of each response instead.

Examples:
  python launch/predict.py --workdir=runs/quickstart --data=test.csv --output=submission.csv
  python launch/predict.py --workdir=runs/mine --data=test.csv --output=out.csv --swap_average
  python launch/predict.py --workdir=runs/multitask_bert --data=test.csv --output=ratings.jsonl

Several hosts share the work: the same command on each; host 0 writes the file.
  python launch/predict.py --workdir=runs/mine --data=test.csv --output=submission.csv \
      --coordinator=10.0.0.1:8476 --num_hosts=2 --host=0   # and --host=1 on the second one
"""

from absl import flags

from pref_jax import command, hosts

flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
flags.DEFINE_string("data", None, "CSV, CSV.gz or Parquet; labels are not needed.", required=True)
flags.DEFINE_string("output", None, "The submission file to write.", required=True)
flags.DEFINE_bool("swap_average", False, "Score both orders of the responses and average.")
flags.DEFINE_float(
    "swap_share", 1.0, "Of --swap_average: for the share of rows in which A and B are closest."
)
flags.DEFINE_string("base", None, "Where the frozen weights of the run are now, if they moved.")
flags.DEFINE_integer(
    "microbatch_size",
    None,
    "Sequences per device and forward pass; as in training when nothing is said.",
    lower_bound=1,
)
hosts.define_flags()


def main(options):
    with hosts.joined(options):
        from pref_jax.evaluation.commands import predict

        hosts.start_jax()
        predict(
            options.workdir,
            options.data,
            options.output,
            swap_average=options.swap_average,
            swap_share=options.swap_share,
            base=options.base,
            microbatch_size=options.microbatch_size,
        )


if __name__ == "__main__":
    command.run(main, doc=__doc__)
