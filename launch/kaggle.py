"""Builds what a Kaggle notebook needs: to score without internet, or to train.

    python launch/kaggle.py --workdir=runs/mine --output=bundle --accelerator=cuda12
    python launch/kaggle.py --workdir=runs/mine --workdir=runs/llama --output=bundle --swap_average
    python launch/kaggle.py --train=gpu --output=training

The first two write models, wheels, a manifest and submit.ipynb, which writes submission.csv within
--max_hours; upload the folder as a dataset. The third writes train_gpu.ipynb with the project.
"""

import sys
from pathlib import Path

from absl import flags

from pref_jax import command
from pref_jax.errors import InputError

_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"

flags.DEFINE_multi_string("workdir", None, "A run, also gs://...; several: commas, or again.")
flags.DEFINE_string("output", None, "Folder to write: new, or an earlier bundle.", required=True)
flags.DEFINE_float("max_hours", 8.5, "In which the notebook ends, set-up included.")
flags.DEFINE_bool("swap_average", False, "Score both orders of the responses and average.")
flags.DEFINE_enum("train", None, ["tpu", "gpu"], "Write a training notebook instead.")
flags.DEFINE_enum("python", _PYTHON, ["3.11", "3.12", "3.13"], "The notebook's Python.")
flags.DEFINE_string("platform", "manylinux_2_31_x86_64", "The notebook's platform.")
flags.DEFINE_enum("accelerator", "cpu", ["cpu", "cuda12"], "What the notebook's jax computes on.")
flags.DEFINE_string("base", None, "Where the frozen weights of the runs are now, if they moved.")
flags.DEFINE_string("kaggle_base", None, "Where the notebook finds them; else they are copied.")
flags.DEFINE_enum("quantization", None, ["none", "int8", "nf4"], "Of the frozen weights.")
flags.DEFINE_bool(
    "wheels",
    None,
    "Whether all packages are in the folder. Scoring: yes; no where the notebook has them already. "
    "Training: no, the notebook fetches them.",
)

_SCORING_ONLY = (
    *("workdir", "max_hours", "swap_average", "accelerator"),
    *("base", "kaggle_base", "quantization"),
)


def main(options: flags.FlagValues) -> None:
    from pref_jax.kaggle.bundle import Options, build_bundle
    from pref_jax.kaggle.wheels import Target

    repository = Path(__file__).resolve().parent.parent
    if options.train is not None:
        for name in _SCORING_ONLY:
            if options[name].present:
                raise InputError(f"--{name}", "it is of no use beside --train", "leave one out")
        from pref_jax.kaggle.training import build_training

        folder = build_training(
            options.output,
            repository,
            accelerator=options.train,
            python=options.python,
            platform=options.platform,
            wheels=bool(options.wheels),
        )
        _print_folder(folder, f"train_{options.train}.ipynb")
        return
    if options.workdir is None:
        raise command.missing("--workdir", __doc__)
    named = [
        part
        for text in options.workdir
        for part in ([text] if Path(text).is_dir() else text.split(","))
    ]
    folder = build_bundle(
        named,
        options.output,
        repository,
        Options(
            max_hours=options.max_hours,
            swap_average=options.swap_average,
            target=Target(options.python, options.platform, options.accelerator),
            base=options.base,
            kaggle_base=options.kaggle_base,
            quantization=options.quantization,
            with_wheels=options.wheels is not False,
        ),
    )
    _print_folder(folder, "submit.ipynb")


def _print_folder(folder: Path, notebook: str) -> None:
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 1e6:.0f} MB, notebook {folder / notebook}")


if __name__ == "__main__":
    command.run(main, doc=__doc__)
