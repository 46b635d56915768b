"""Runs the paper's whole study: data, annotations, nine models, their test, the claims.

Examples:
  python launch/reproduce.py --scale=tiny --workdir=runs/study
  python launch/reproduce.py --scale=minilm --workdir=runs/minilm --seeds=3 --data=train.csv \
      --test=test_labelled.csv --annotations=annotations.jsonl
  python launch/reproduce.py --scale=paper --plan

The same command again goes on where it was stopped; what is finished is not run again, and a
changed setting runs what depends on it. --scale=tiny trains narrow stand-ins in minutes on two
cores, minilm four models from MiniLM's real weights (./launch/weights.sh minilm), paper the nine
models of the paper. Without --data an arena is simulated.
"""

from typing import Any

from absl import flags

from pref_jax import command
from pref_jax.study.plan import SCALES

flags.DEFINE_enum("scale", "tiny", SCALES, "How large the models are.")
flags.DEFINE_string("workdir", None, "Folder of the study; by default runs/study_ and the scale.")
flags.DEFINE_string("data", None, "Labelled rows to train on; simulated when none are named.")
flags.DEFINE_string("test", None, "Labelled rows to test on.")
flags.DEFINE_string("annotations", None, "Ratings of responses in --data: JSON lines.")
flags.DEFINE_string("properties", None, "What was rated, a TOML file; by default the paper's 20.")
flags.DEFINE_list("rows", None, "Simulated rows to train on and to test, as in 640,400.")
flags.DEFINE_integer("seeds", 1, "Train everything so often, with seeds 0, 1, ...", lower_bound=1)
flags.DEFINE_multi_string(
    "set", [], "PATTERN:field=value changes a config field of the runs whose name the pattern fits."
)
flags.DEFINE_bool("plan", False, "Print what would be run and how long it takes, and run nothing.")


def main(options: Any) -> None:
    from pref_jax.study.plan import make_parts
    from pref_jax.study.run import (
        describe_plan,
        find_sources,
        parse_rows,
        print_summary,
        refuse_busy,
        reproduce,
    )

    workdir = options.workdir or f"runs/study_{options.scale}"
    if not options.plan:
        refuse_busy(workdir)
    sources = find_sources(
        options.scale,
        options.data,
        options.test,
        options.annotations,
        options.properties,
        parse_rows(options.rows),
    )
    if options.plan or options.scale == "paper":
        parts = make_parts(options.scale, sources, options.seeds, options.set)
        print(describe_plan(parts, sources))
        if options.plan:
            return
    page = reproduce(options.scale, workdir, sources, seeds=options.seeds, changes=options.set)
    print_summary(page.parent)
    print(f"\nreport: {page}")


if __name__ == "__main__":
    command.run(main, doc=__doc__)
