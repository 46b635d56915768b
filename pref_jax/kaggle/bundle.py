"""Builds the folder that a scoring notebook without internet needs."""

import logging
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pref_jax.errors import InputError
from pref_jax.evaluation.runs import name_runs
from pref_jax.files import read_json
from pref_jax.kaggle.folders import check_folder, replaced_folder
from pref_jax.kaggle.manifest import FILE, read_manifest, write_manifest
from pref_jax.kaggle.notebook import build_notebook
from pref_jax.kaggle.scoring import BASES, FALLBACK, MODELS, check_hours
from pref_jax.kaggle.wheels import SCORING, Target, collect_wheels
from pref_jax.training.mirror import local_run

if TYPE_CHECKING:
    from pref_jax.experiment import Run

logger = logging.getLogger(__name__)

NOTEBOOK = "submit.ipynb"
WHEELS = "wheels"


@dataclass(frozen=True)
class Options:
    """What a bundle is built for.

    Attributes:
      max_hours: in which the notebook has to end.
      swap_average: whether both orders of the responses are scored.
      target: Python, platform and accelerator of the notebook.
      base: where the frozen weights of the runs are here, if they moved.
      kaggle_base: where the notebook finds them; None: they are copied into the bundle.
      quantization: of the frozen weights, where it shall not be that of the training.
      with_wheels: false where the notebook's environment has the packages.
    """

    max_hours: float
    swap_average: bool
    target: Target
    base: str | None = None
    kaggle_base: str | None = None
    quantization: str | None = None
    with_wheels: bool = True


def build_bundle(workdirs: Sequence[str], output: str, repository: Path, options: Options) -> Path:
    """Writes models, wheels, manifest and notebook into ``output``, whole or not at all.

    Args:
      workdirs: the runs; also ``gs://BUCKET/PATH``.
      output: a new or empty folder, or an earlier bundle, which is replaced.
      repository: the project's folder.
      options: what for.

    Raises:
      InputError: anything about the runs, the output or the target; nothing is written then.
      RunError: wheels cannot be had, or writing failed.
    """
    folders = _check(workdirs, output, options)
    names = [name.replace("/", "-") for name in name_runs(folders)]
    with replaced_folder(output, _list_ours) as made:
        needed = list(SCORING)
        models = []
        for workdir, folder, name in zip(workdirs, folders, names, strict=True):
            entry = _add_model(folder, made, name, options)
            models.append(entry)
            if str(entry.get("base", "")).endswith(".gguf") and "gguf" not in needed:
                needed.append("gguf")
            logger.info("%s: %s, as the model %s", workdir, entry["form"], name)
        cheapest = min(range(len(models)), key=lambda number: models[number]["cost"])
        shutil.copyfile(folders[cheapest] / "baselines.json", made / FALLBACK)
        if options.with_wheels:
            logger.info("fetching wheels for Python %s", options.target.python)
            (made / WHEELS).mkdir()
            collect_wheels(made / WHEELS, needed, options.target, repository)
        values: dict[str, Any] = {"MAX_HOURS": options.max_hours, "PYTHON": options.target.python}
        if not options.with_wheels:
            values["PACKAGES"] = None
        text = build_notebook(repository / "launch" / "kaggle" / "submit.py", values)
        (made / NOTEBOOK).write_text(text, encoding="utf-8")
        write_manifest(made, _describe(models, options))
    return Path(output)


def _check(workdirs: Sequence[str], output: str, options: Options) -> list[Path]:
    """What can be refused before hours of work; returns the runs' folders on this machine."""
    from pref_jax.experiment import read_config, read_model

    if not workdirs:
        raise InputError("--workdir", "it is missing", "name the run, or several")
    if not all(workdirs):
        raise InputError("--workdir", "a name is empty", "name a run's folder, or leave it out")
    check_hours(options.max_hours)
    options.target.platforms  # noqa: B018 (refuses an unknown one)
    target = check_folder(output, _list_ours)
    real = [Path(os.path.realpath(local_run(workdir))) for workdir in workdirs]
    adapters = set()
    for place, (workdir, folder) in enumerate(zip(workdirs, real, strict=True)):
        if folder in real[:place]:
            raise InputError(f"--workdir={workdir}", "it is named twice", "name each run once")
        config = read_config(folder)
        if config.input.layout == "response":
            raise InputError(
                workdir,
                "is a multi-task run, which knows no preferences",
                "name a run that started from it (--config.model.init_from)",
            )
        if target == folder or target.is_relative_to(folder) or folder.is_relative_to(target):
            raise InputError(
                f"--output={output}",
                f"the run {workdir} lies on its way",
                "name a folder elsewhere",
            )
        read_json(folder / "baselines.json", "train the run again")
        if config.model.lora.rank:
            adapters.add(read_model(folder)[1].get("digest", ""))
    for flag, value in (
        ("kaggle_base", options.kaggle_base),
        ("quantization", options.quantization),
    ):
        if value is not None and not adapters:
            raise InputError(f"--{flag}", "no run has adapters on a base", "leave it out")
    if options.kaggle_base is not None and len(adapters) > 1:
        raise InputError(
            "--kaggle_base", "the runs have several bases", "build a bundle for each of them"
        )
    return real


def _list_ours(folder: Path) -> list[str]:
    return [*read_manifest(folder)["files"], FILE]


def _add_model(workdir: Path, made: Path, name: str, options: Options) -> dict[str, Any]:
    """Exports a run into the bundle, its base too; returns its entry in the manifest."""
    from pref_jax.experiment import load_run
    from pref_jax.weights.export import DESCRIPTION
    from pref_jax.weights.exported import write_run
    from pref_jax.weights.run import export_loaded

    run = load_run(workdir, base=options.base)
    experiment = run.experiment
    adapters = bool(experiment.config.model.lora.rank)
    # A random base is in no folder, so the whole model is written.
    merge = experiment.is_decoder and not (
        adapters and experiment.backbone.base["kind"] == "pretrained"
    )
    folder = made / MODELS / name
    (made / MODELS).mkdir(exist_ok=True)
    export_loaded(run, folder, merge=merge)
    form = "encoder" if not experiment.is_decoder else "merged" if merge else "adapter"
    trained_in = experiment.config.model.quantization
    quantization = (options.quantization or trained_in) if form == "adapter" else "none"
    write_run(folder, run, form=form, quantization=quantization)
    entry: dict[str, Any] = {
        "name": name,
        "form": form,
        "step": run.step,
        "cost": _count_operations(run),
        "input": read_json(folder / DESCRIPTION, "")["input"],
        "temperature": run.temperature,
        "symmetric": bool(experiment.config.model.symmetric),
        "quantization": quantization,
        "requantised": form == "adapter" and quantization != trained_in,
    }
    if form == "adapter":
        base = experiment.backbone.base
        entry["base"] = options.kaggle_base or _copy_base(made, base["source"], base["digest"])
        entry["base_digest"] = base["digest"]
    return entry


def _count_operations(run: "Run") -> float:
    """Of the longest row: two for each weight that is not looked up, and each token."""
    experiment = run.experiment
    architecture, layout = experiment.backbone.architecture, experiment.layout
    tables = architecture.vocab_size * architecture.hidden_size
    weights = experiment.count_parameters()["total"] - tables
    return 2.0 * weights * layout.max_length * experiment.sides


def _copy_base(made: Path, source: str, digest: str) -> str:
    """Copies a base once, however many adapters belong to it; returns its place in the bundle."""
    from pref_jax.weights.files import INDEX, weight_files
    from pref_jax.weights.sources import resolve_source

    place = resolve_source(source)
    name = f"{BASES}/{digest[:16]}{'.gguf' if place.is_file() else ''}"
    target = made / name
    if target.exists():
        return name
    target.parent.mkdir(exist_ok=True)
    if place.is_file():
        shutil.copyfile(place, target)
        return name
    target.mkdir()
    files = [*weight_files(place), place / "config.json"]
    if (place / INDEX).is_file():
        files.append(place / INDEX)
    for path in files:
        shutil.copyfile(path, target / path.name)
    return name


def _describe(models: list[dict[str, Any]], options: Options) -> dict[str, Any]:
    import jax

    from pref_jax import __version__

    return {
        "models": models,
        "swap_average": options.swap_average,
        "max_hours": options.max_hours,
        "python": options.target.python,
        "platform": options.target.platform,
        "accelerator": options.target.accelerator,
        "built_with": {
            "pref_jax": __version__,
            "jax": jax.__version__,
            "python": ".".join(map(str, sys.version_info[:2])),
        },
    }
