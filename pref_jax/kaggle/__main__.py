"""Scores a test file with a bundle of launch/kaggle.py, as its notebook does.

python -m pref_jax.kaggle --bundle=bundle --data=test.csv --output=submission.csv
"""

from absl import flags

from pref_jax import command

flags.DEFINE_string("bundle", None, "Folder that launch/kaggle.py wrote.", required=True)
flags.DEFINE_string("data", None, "The test file.", required=True)
flags.DEFINE_string("output", None, "The submission file to write.", required=True)
flags.DEFINE_float("max_hours", None, "In which it ends; the bundle's own when nothing is said.")
flags.DEFINE_float("started", None, "Seconds since 1970 from which the hours count.")


def main(flag_values: flags.FlagValues) -> None:
    from pref_jax.kaggle.scoring import score_file

    score_file(
        flag_values.bundle,
        flag_values.data,
        flag_values.output,
        max_hours=flag_values.max_hours,
        started=flag_values.started,
    )


if __name__ == "__main__":
    command.run(main, doc=__doc__)
