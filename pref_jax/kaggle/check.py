"""Checks that a submission has every row of a test file, as the scoring notebook does in the end.

python -m pref_jax.kaggle.check --data=test.csv --output=submission.csv
"""

from absl import flags

from pref_jax import command

flags.DEFINE_string("data", None, "The test file.", required=True)
flags.DEFINE_string("output", None, "The submission for it.", required=True)


def main(options: flags.FlagValues) -> None:
    from pref_jax.kaggle.scoring import check_submission

    print(f"{check_submission(options.data, options.output)} rows, each with its probabilities")


if __name__ == "__main__":
    command.run(main, doc=__doc__)
