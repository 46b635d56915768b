"""Scores a run's best checkpoint on a labelled file, beside baselines and in slices.

Examples:
  python launch/evaluate.py --workdir=runs/quickstart --data=test_labelled.csv
  python launch/evaluate.py --workdir=runs/mine --data=valid.csv --output=valid.json --swap_average
  python launch/evaluate.py --workdir=runs/multitask_bert --data=train.csv \
      --annotations=annotations.jsonl

Several hosts share the work: the same command on each; host 0 prints and writes.
  python launch/evaluate.py --workdir=runs/mine --data=valid.csv \
      --coordinator=10.0.0.1:8476 --num_hosts=2 --host=0   # and --host=1 on the second one
"""

from absl import flags

from pref_jax import command, hosts

flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
flags.DEFINE_string("data", None, "Labelled CSV, CSV.gz or Parquet.", required=True)
flags.DEFINE_string("output", None, "JSON file to write.")
flags.DEFINE_string("annotations", None, "Ratings to judge a multi-task run by: JSON lines.")
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
        from pref_jax.evaluation.commands import evaluate

        hosts.start_jax()
        evaluate(
            options.workdir,
            options.data,
            output=options.output,
            swap_average=options.swap_average,
            swap_share=options.swap_share,
            base=options.base,
            annotations=options.annotations,
            microbatch_size=options.microbatch_size,
        )


if __name__ == "__main__":
    command.run(main, doc=__doc__)
