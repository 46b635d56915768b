"""Builds the folder that a training notebook needs: the project and the notebook."""

import configparser
import shutil
from pathlib import Path
from typing import Any

from pref_jax.errors import InputError
from pref_jax.files import read_json, write_json
from pref_jax.kaggle.folders import replaced_folder
from pref_jax.kaggle.notebook import build_notebook
from pref_jax.kaggle.wheels import PYTHONS, Target, build_wheel, collect_wheels

FILE = "training_bundle.json"
# What fits the machine: LLaMA's frozen weights take 15 GB, which eight chips share and two T4 do
# not hold; there they have four bits.
CONFIGS = {"tpu": "configs/llama_lora.py", "gpu": "configs/llama_qlora.py"}
_JAX = {"tpu": "tpu", "gpu": "cuda12"}


def build_training(
    output: str, repository: Path, *, accelerator: str, python: str, platform: str, wheels: bool
) -> Path:
    """Writes the project's wheel, its commands and presets, and ``train_ACCELERATOR.ipynb``.

    Args:
      output: a new or empty folder, or an earlier one of these, which is replaced.
      repository: the project's folder.
      accelerator: "tpu" or "gpu".
      python, platform: of the notebook, where its packages are to be in the folder.
      wheels: whether they are; else the notebook fetches them, for which it needs the internet.

    Raises:
      InputError: anything about the output or the target; nothing is written then.
      RunError: wheels cannot be had, or writing failed.
    """
    target = Target(python, platform, _JAX[accelerator])
    target.platforms  # noqa: B018 (refuses an unknown one)
    with replaced_folder(output, _list_ours) as made:
        (made / "wheels").mkdir()
        if wheels:
            collect_wheels(made / "wheels", read_packages(repository), target, repository, ())
        else:
            build_wheel(made / "wheels", repository)
        shutil.copyfile(repository / "constraints.txt", made / "constraints.txt")
        project = made / "project"
        (project / "launch").mkdir(parents=True)
        shutil.copyfile(repository / "launch" / "train.py", project / "launch" / "train.py")
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(repository / "configs", project / "configs", ignore=ignored)
        values: dict[str, Any] = {"ACCELERATOR": accelerator, "CONFIG": CONFIGS[accelerator]}
        text = build_notebook(repository / "launch" / "kaggle" / "train.py", values)
        (made / f"train_{accelerator}.ipynb").write_text(text, encoding="utf-8")
        pythons = [python] if wheels else list(PYTHONS)
        files = [path.relative_to(made) for path in made.rglob("*") if path.is_file()]
        about = {"accelerator": accelerator, "pythons": pythons, "files": sorted(files)}
        write_json(made / FILE, about)
    return Path(output)


def _list_ours(folder: Path) -> list[str]:
    files = read_json(folder / FILE, "").get("files")
    return [*map(str, files), FILE] if isinstance(files, list) else []


def read_packages(repository: Path) -> list[str]:
    """What the project requires, as setup.cfg says.

    Raises:
      InputError: no such file.
    """
    parser = configparser.ConfigParser()
    if not parser.read(repository / "setup.cfg", encoding="utf-8"):
        raise InputError(
            str(repository / "setup.cfg"), "is missing", "type the command in the repository"
        )
    lines = parser["options"]["install_requires"].splitlines()
    return [line for line in lines if line and not line.startswith("#")]
