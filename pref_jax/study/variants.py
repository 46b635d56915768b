"""An ablation as a graph of parts: one recipe, variants of it, each trained on the same folds."""

import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from pref_jax.config import resolve
from pref_jax.config_file import override
from pref_jax.errors import InputError
from pref_jax.files import plain
from pref_jax.study.plan import Part

BASE = "base"
_CHOICES = {
    "kind": (BASE, "option", "set", "reference"),
    "rows": ("tie", "all"),
    "read": ("model", "swap_average", "calibrate", "embeddings"),
}
_TYPES = {
    "name": (str, "a text"),
    "kind": (str, "a text"),
    "config": (dict, "a table of fields"),
    "rows": (str, "a text"),
    "teacher": (bool, "true or false"),
    "read": (str, "a text"),
}
# Folders of the ablation's own beside those of the variants.
FOLDS, _VECTORS, _TEACHERS = "folds", "vectors", ("teacher0", "teacher1")
_RESERVED = (FOLDS, _VECTORS, *_TEACHERS, ".", "..")
_LONGEST_NAME = 200  # bytes; file systems take 255
# Fields that follow from the ablation, and what to do to change them.
_OWN = {
    "seed": "give --seeds",
    "data.train": "give --data",
    "data.valid": "folds of --data are held out",
    "data.fold": "give --folds",
    "data.soft_labels": "teacher = true makes them",
    "input.max_length": "give --max_length",
    "train.epochs": "give --epochs",
}


@dataclasses.dataclass(frozen=True)
class Variant:
    """One line of the table.

    Attributes:
      name: of its folder. kind, rows, read: see ablation.toml.
      config: fields of the base recipe that it changes.
      teacher: whether it learns from the base recipe's probabilities too.
    """

    name: str
    kind: str
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rows: str = "tie"
    teacher: bool = False
    read: str = "model"


@dataclasses.dataclass(frozen=True)
class Stage:
    """How closely variants are looked at: tokens of a sequence, epochs, folds, seeds."""

    name: str
    max_length: int
    epochs: float
    folds: int
    seeds: int = 1

    @property
    def repeats(self) -> list[tuple[int, int]]:
        """Every (seed, fold)."""
        return [(seed, fold) for seed in range(self.seeds) for fold in range(self.folds)]


STAGES = {
    "screen": Stage("screen", max_length=128, epochs=1.0, folds=2),
    "confirm": Stage("confirm", max_length=256, epochs=2.0, folds=5),
}


def read_variants(path: str | None = None) -> dict[str, Variant]:
    """The variants of a TOML file, by name: base, then the others in its order.

    Args:
      path: the file; None: the project's own.

    Raises:
      InputError: no such file, or an entry that is wrong.
    """
    file: Any = Path(path) if path else resources.files("pref_jax.study") / "ablation.toml"
    where = path or "ablation.toml"
    try:
        entries = tomllib.loads(file.read_text(encoding="utf-8")).get("variant", [])
    except OSError as error:
        raise InputError(where, error.strerror or "cannot be read", "check the path") from error
    except ValueError as error:
        raise InputError(where, f"is not TOML ({error})", "mend it") from error
    if not isinstance(entries, list):
        raise InputError(where, "variant is no list of tables", "write [[variant]] above each")
    variants: dict[str, Variant] = {}
    for number, entry in enumerate(entries, 1):
        here = f"{where}:variant {number}"
        variant = _read_variant(here, entry)
        if variant.name in variants or not _is_folder(variant.name):
            raise InputError(here, f"the name {variant.name!r} is no new folder", "rename it")
        variants[variant.name] = variant
    if [v.name for v in variants.values() if v.kind == BASE] != [BASE]:
        raise InputError(where, "no single variant of kind base, called base", "add it")
    return {BASE: variants[BASE], **variants}  # the others are compared with it


def _read_variant(here: str, entry: Any) -> Variant:
    if not isinstance(entry, dict) or not {"name", "kind"} <= entry.keys() <= _TYPES.keys():
        raise InputError(
            here, "has not the right fields", f"give name, kind; known: {', '.join(_TYPES)}"
        )
    for name, value in entry.items():
        kind, words = _TYPES[name]
        if not isinstance(value, kind):
            raise InputError(here, f"{name} is {value!r}", f"it has to be {words}")
    variant = Variant(**entry)
    for name, choices in _CHOICES.items():
        value = getattr(variant, name)
        if value not in choices:
            raise InputError(here, f"{name} is {value!r}", f"known: {', '.join(choices)}")
    if variant.read != "model":
        for name in ("config", "rows", "teacher"):
            if name in entry:
                raise InputError(
                    here, f"read = {variant.read!r} trains nothing", f"leave out {name}"
                )
    return variant


def _is_folder(name: str) -> bool:
    """Whether a folder can be called so beside those of the ablation's own."""
    if name.lower() in _RESERVED or "/" in name or not name.isprintable():
        return False
    return 0 < len(name.encode()) <= _LONGEST_NAME


def choose_variants(variants: Mapping[str, Variant], names: Sequence[str]) -> list[Variant]:
    """The named variants in the order of the list, base among them.

    Raises:
      InputError: an unknown name.
    """
    for name in names:
        if name not in variants:
            raise InputError(
                "--variants", f"there is no variant {name!r}", f"known: {', '.join(variants)}"
            )
    return [v for v in variants.values() if v.name in names or v.kind == BASE]


def make_parts(
    config: ConfigDict, variants: Sequence[Variant], stage: Stage, digest: str
) -> dict[str, Part]:
    """All parts by name, each behind what it needs, variant by variant.

    Args:
      config: the base recipe.
      variants: base first.
      stage: tokens, epochs, folds, seeds.
      digest: of the data.

    Raises:
      InputError: a variant whose fields do not go with the recipe.
    """
    folds, vectors = f"{stage.name}/{FOLDS}", f"{stage.name}/{_VECTORS}"
    parts = {folds: Part(folds, "folds", (), {"data": digest, "folds": stage.folds})}

    def add(name: str, kind: str, needs: Sequence[str], place: tuple[int, int], **more: Any) -> str:
        seed, fold = place
        changed = more.pop("config", None)
        settings: dict[str, Any] = {"fold": fold, "seed": seed, **more}
        if changed is not None:
            settings["config"] = plain(changed.to_dict())
            for field in ("logging", "mesh"):  # these change no result
                settings["config"].pop(field)
        parts[name] = Part(name, kind, (folds, *needs), settings, changed)
        return name

    for variant in variants:
        if variant.read == "embeddings":
            changed = change_config(config, variants[0], stage, 0)
            if changed.input.layout == "decoder":
                raise InputError(f"variant {variant.name}", "a decoder embeds no text", "leave out")
            add(vectors, "vectors", (), (0, 0), config=changed)
        for seed, fold in stage.repeats:
            name, place = part_name(stage, variant.name, seed, fold), (seed, fold)
            bases = [part_name(stage, BASE, seed, other) for other in range(stage.folds)]
            if variant.read == "embeddings":
                add(name, "embeddings", (vectors,), place)
            elif variant.read == "swap_average":
                add(name, variant.read, (bases[fold],), place)
            elif variant.read == "calibrate":
                add(name, variant.read, bases, place)
            else:
                teachers = []
                for half, called in enumerate(_TEACHERS if variant.teacher else ()):
                    taught = change_config(config, variants[0], stage, seed)
                    taught.data.folds, taught.data.fold = 2, half
                    teacher = part_name(stage, called, seed, fold)
                    teachers.append(add(teacher, "train", (), place, config=taught, rows="tie"))
                changed = change_config(config, variant, stage, seed)
                add(name, "train", teachers, place, config=changed, rows=variant.rows)
    return parts


def part_name(stage: Stage, variant: str, seed: int, fold: int) -> str:
    """The folder of a variant's answers on one fold."""
    return f"{stage.name}/{variant}/seed{seed}_fold{fold}"


def change_config(config: ConfigDict, variant: Variant, stage: Stage, seed: int) -> ConfigDict:
    """The recipe of a variant, without the paths of its data.

    Raises:
      InputError: names the variant and the field.
    """
    changed = config.copy_and_resolve_references()
    changed.seed, changed.train.epochs = seed, stage.epochs
    changed.input.max_length = stage.max_length
    recipe = changed.to_dict()
    try:
        for field, value in variant.config.items():
            if field in _OWN:
                raise InputError(field, "the ablation sets it", _OWN[field])
            override(changed, field, str(value))
        differs = variant.rows != "tie" or variant.teacher or changed.to_dict() != recipe
        if variant.config and not differs:
            raise InputError("config", "the recipe is so already", "leave the variant out")
        with changed.unlocked():
            for field in ("train", "valid", "fold", "soft_labels"):
                changed.data[field] = None
        resolve(changed)
    except InputError as error:
        where = f"variant {variant.name}, {error.where.removeprefix('--config.')}"
        raise InputError(where, error.what, error.remedy) from error
    return changed


def make_possible_parts(
    config: ConfigDict, variants: Mapping[str, Variant], stage: Stage, digest: str
) -> tuple[dict[str, Part], dict[str, InputError]]:
    """`make_parts` of all variants that go with the recipe.

    Returns:
      The parts, and by name of each other variant what is wrong with it.

    Raises:
      InputError: the recipe itself is wrong.
    """
    base = variants[BASE]
    parts, refused = make_parts(config, [base], stage, digest), {}
    for variant in variants.values():
        try:
            parts |= make_parts(config, [base, variant], stage, digest)
        except InputError as error:
            refused[variant.name] = error
    return parts, refused
