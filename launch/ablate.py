"""Compares the options of a recipe on held-out folds of real rows, in one table.

Examples:
  python launch/ablate.py --stage=screen --data=rows.csv --workdir=runs/ablation
  python launch/ablate.py --stage=confirm --data=rows.csv --workdir=runs/ablation
  python launch/ablate.py --stage=screen --data=rows.csv --workdir=runs/ablation \
      --variants=symmetric,ema --max_hours=1

Each variant changes the recipe of --config. The same command goes on where it was stopped; what is
finished is not run again. DIR/screen.md, which is written anew after each part, holds what is
finished. Rows with tie_allowed=0 are never held out. confirm takes the best of screen.
"""

import dataclasses
from typing import Any

from absl import flags

from pref_jax import command

flags.DEFINE_enum("stage", "screen", ("screen", "confirm"), "How closely to look.")
flags.DEFINE_string("data", None, "Labelled rows.", required=True)
flags.DEFINE_string("workdir", "runs/ablation", "Folder of the ablation.")
flags.DEFINE_list("variants", None, "Names; by default all, or the best of the screen.")
flags.DEFINE_string("list", None, "A TOML file of variants instead of the project's own.")
flags.DEFINE_string("adversarial", None, "Labelled rows without ties to try the best on.")
flags.DEFINE_integer("folds", None, "Folds; by default 2, or 5 to confirm.", lower_bound=2)
flags.DEFINE_integer("seeds", 1, "Train each variant so often.", lower_bound=1)
flags.DEFINE_integer("max_length", None, "Tokens; by default 128, or 256.", lower_bound=8)
flags.DEFINE_float("epochs", None, "Epochs; by default 1, or 2.", lower_bound=0.0)
flags.DEFINE_float("max_hours", None, "Begin no part later than this.", lower_bound=0.0)


def main(options: Any, config: Any) -> None:
    from pref_jax.study.ablation import ablate
    from pref_jax.study.variants import STAGES

    given = {name: options[name].value for name in ("folds", "seeds", "max_length", "epochs")}
    stage = dataclasses.replace(
        STAGES[options.stage], **{name: value for name, value in given.items() if value is not None}
    )
    table = ablate(
        config,
        options.data,
        options.workdir,
        stage,
        names=options.variants,
        variants_file=options.list,
        adversarial=options.adversarial,
        max_hours=options.max_hours,
    )
    print(table.read_text(), end="")
    print(f"\ntable: {table}")


if __name__ == "__main__":
    command.run(main, doc=__doc__, config="configs/ablation.py")
