"""Compares runs: learning curves, calibration, confusion, and whether differences are real.

Examples:
  python launch/report.py runs/quickstart --output=report
  python launch/report.py runs/single_bert runs/parallel_bert --output=report

Writes index.html (open it in a browser; it needs no other file), the figures as PNG, and
results.csv. Runs that are still going are shown as far as they got.
"""

from typing import Any

from absl import flags

from pref_jax import command

flags.DEFINE_string("output", "report", "Folder for index.html, the figures and results.csv.")
flags.DEFINE_string(
    "truth", None, "truth.json of a simulated arena; by default the one beside the training data."
)


def main(values: Any, runs: list[str]) -> None:
    from pref_jax.evaluation.report import make_report

    print(f"report: {make_report(runs, values.output, values.truth)}")


if __name__ == "__main__":
    command.run(main, doc=__doc__, positional="RUN")
