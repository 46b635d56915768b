"""Makes a simulated arena: texts, votes and annotations with a known truth.

Examples:
  python launch/simulate.py --output=arena
  python launch/simulate.py --rows=300 --test_rows=60 --seed=7 --output=arena

Writes train.csv, test.csv, test_labels.csv, annotations.jsonl and truth.json, which holds the log
loss that the best possible model would reach. The same seed gives the same files.
"""

from typing import Any

from absl import flags

from pref_jax import command

flags.DEFINE_integer("rows", 1500, "Rows of train.csv.")
flags.DEFINE_integer("test_rows", 500, "Rows of test.csv.")
flags.DEFINE_integer("seed", 0, "Another seed, another arena.")
flags.DEFINE_string("output", "arena", "Folder for the files.")


def main(values: Any) -> None:
    from pref_jax.data.simulate import simulate

    simulate(values.rows, values.test_rows, values.seed, values.output)
    print(f"{values.rows} training and {values.test_rows} test rows in {values.output}")


if __name__ == "__main__":
    command.run(main, doc=__doc__)
