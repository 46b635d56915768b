"""Reading a config file and the overrides of the command line, typed as the fields are.

ml_collections' own flags answer a wrong field, type or file with a traceback, and refuse a value
for a field that is None by default; here each becomes one line that names the field.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import math
import re
import traceback
import types
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from pref_jax.config import default_config, get, resolve, show_budget
from pref_jax.errors import InputError


def take_overrides(arguments: Sequence[str]) -> tuple[list[str], list[tuple[str, str | None]]]:
    """Takes ``--config.section.field=value`` out of a command line.

    Returns:
      The other arguments, and (field, value) in the order typed; the value of a field that is
      true or false may be left out and is then None.
    """
    kinds = _field_types(default_config())
    others: list[str] = []
    overrides: list[tuple[str, str | None]] = []
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        if argument == "--":
            others += [argument, *waiting]
            break
        match = re.fullmatch(r"--?(no)?config\.([^=]*)(?:=(.*))?", argument, re.DOTALL)
        if match is None:
            others.append(argument)
            continue
        negated, name, value = match[1], match[2], match[3]
        if negated:
            value = "false"
        elif value is None and kinds.get(name) is not bool and waiting:
            following = waiting[0]
            if not following.startswith("-") or re.match(r"-[\d.]", following):
                value = waiting.pop(0)
        overrides.append((name, value))
    return others, overrides


def load(
    path: str, overrides: Iterable[tuple[str, str | None]] = (), *, script: str = ""
) -> ConfigDict:
    """Reads ``FILE.py[:arguments]``, applies overrides and checks the result.

    Args:
      path: relative to the working directory, or else to the repository that holds ``script``.
      overrides: (field, value as typed); the last one of a field wins.
      script: path of the script that was started.

    Raises:
      InputError: anything is wrong with the file, its arguments, a field or a value.
    """
    name, _, arguments = path.partition(":")
    file = Path(name)
    if not file.is_absolute() and not file.exists() and script:
        beside = Path(script).resolve().parent.parent / file
        file = beside if beside.exists() else file
    config = _execute(file, name, arguments or None)
    _compare_fields(config, name)
    # The budget comes last: what is said of it depends on the layout.
    for field, value in sorted(overrides, key=lambda pair: pair[0] == "input.budget"):
        override(config, field, value)
    resolve(config)
    return config


def override(config: ConfigDict, name: str, value: str | None) -> None:
    """Sets one field to a value as typed on the command line, converted to the field's type."""
    parent = config
    *sections, leaf = name.split(".")
    schema = default_config()
    for depth, section in enumerate([*sections, leaf]):
        at = ".".join(name.split(".")[:depth])
        if section not in schema:
            close = difflib.get_close_matches(section, list(schema), n=1)
            hint = f"did you mean {close[0]}? known" if close else "known"
            of = f" of {at}" if at else ""
            raise InputError(
                f"--config.{name}",
                f"unknown field {section!r}{of}",
                f"{hint}: {', '.join(sorted(schema))}",
            )
        if depth < len(sections):
            if not isinstance(schema[section], ConfigDict):
                raise InputError(
                    f"--config.{name}",
                    f"{section} is a field, not a section",
                    f"type --config.{'.'.join(name.split('.')[: depth + 1])}=...",
                )
            schema, parent = schema[section], parent[section]
    if isinstance(schema[leaf], ConfigDict):
        raise InputError(
            f"--config.{name}", "it is a section", f"set its fields: {', '.join(schema[leaf])}"
        )
    kind, optional = schema.get_type(leaf), schema[leaf] is None
    if value is None and kind is not bool:
        raise InputError(f"--config.{name}", "its value is missing", f"type --config.{name}=...")
    text = "true" if value is None else value
    if kind is tuple:
        example = show_budget(config.input.layout)  # the only list among the fields
        parent[leaf] = _convert_list(f"--config.{name}", text.strip(), optional, example)
    else:
        parent[leaf] = _convert(f"--config.{name}", text, kind, optional)


def _convert(where: str, text: str, kind: type, optional: bool) -> Any:
    text = text.strip()
    if optional and text.lower() in ("none", ""):
        return None
    if kind is bool:
        if text.lower() in ("true", "1", "yes"):
            return True
        if text.lower() in ("false", "0", "no"):
            return False
        raise InputError(where, f"{text!r} is not true or false", f"type {where}=true")
    if kind is int:
        return _whole_number(where, text)
    if kind is float:
        try:
            return float(text)
        except ValueError as error:
            raise InputError(where, f"{text!r} is not a number", f"type {where}=0.1") from error
    if not text:
        raise InputError(where, "it is empty", f"type {where}=VALUE")
    return text


def _convert_list(where: str, text: str, optional: bool, example: str) -> Any:
    if optional and text.lower() in ("none", ""):
        return None
    try:
        value = ast.literal_eval(text)
        values = value if isinstance(value, (tuple, list)) else (value,)
        if any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in values):
            raise ValueError
        return tuple(float(v) for v in values)
    except (ValueError, SyntaxError, TypeError, OverflowError, RecursionError, MemoryError):
        raise InputError(where, f"{text!r} is not a list of numbers", example) from None


def _whole_number(where: str, text: str) -> int:
    with contextlib.suppress(ValueError):
        return int(text)
    with contextlib.suppress(ValueError):
        number = float(text)  # 1e2 is exactly a hundred; 0.5 is not a whole number
        if math.isfinite(number) and number == int(number):
            return int(number)
    raise InputError(where, f"{text!r} is not a whole number", f"type {where}=1")


def _execute(file: Path, shown: str, arguments: str | None) -> ConfigDict:
    """Runs a config file, as the author's code, and names its line where that fails."""
    try:
        source = file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        presets = sorted(f"configs/{p.name}" for p in Path("configs").glob("*.py"))
        raise InputError(
            "--config",
            f"there is no file {shown!r}",
            f"known: {', '.join(presets)}" if presets else "name a file such as configs/x.py",
        ) from error
    except (OSError, UnicodeDecodeError, ValueError) as error:
        why = getattr(error, "strerror", None) or "it is not Python source"
        raise InputError("--config", f"cannot read {shown!r}: {why}", "name a .py file") from error
    module = types.ModuleType("config_file")
    module.__file__ = str(file)
    try:
        exec(compile(source, str(file), "exec"), module.__dict__)
        if not callable(getattr(module, "get_config", None)):
            raise InputError(
                shown,
                "it does not define get_config(arguments)",
                "start from configs/quickstart.py",
            )
        config = module.get_config(arguments)
    except InputError as error:
        if error.where == "--config":
            raise InputError(f"--config={shown}", error.what, error.remedy) from error
        raise
    except SyntaxError as error:
        line = error.lineno if error.filename == str(file) else 0
        raise InputError(f"{shown}:{line}", f"{error.msg}", "mend that line") from error
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        line = next((f.lineno for f in reversed(frames) if f.filename == str(file)), 0)
        # ml_collections lists the other fields by their representation, which helps nobody.
        message = str(error).split(" Other fields present")[0].lstrip("'\"")
        raise InputError(
            f"{shown}:{line}", f"{type(error).__name__}: {message}", "mend that line"
        ) from error
    if not isinstance(config, ConfigDict):
        raise InputError(
            shown,
            f"get_config returned a {type(config).__name__}",
            "let it return the ConfigDict of pref_jax.config.default_config()",
        )
    return config


def _field_types(config: ConfigDict, prefix: str = "") -> dict[str, type]:
    kinds: dict[str, type] = {}
    for name in config:
        if isinstance(config[name], ConfigDict):
            kinds |= _field_types(config[name], f"{prefix}{name}.")
        else:
            kinds[prefix + name] = config.get_type(name)
    return kinds


def _compare_fields(config: ConfigDict, shown: str) -> None:
    """A config file may have built its own ConfigDict: fields and types must be the known ones."""
    known, present = _field_types(default_config()), _field_types(config)
    for name in present.keys() - known.keys():
        raise InputError(shown, f"unknown field {name}", "see default_config in pref_jax/config.py")
    for name in known.keys() - present.keys():
        raise InputError(shown, f"the field {name} is missing", "start from default_config()")
    defaults = default_config()
    for name, kind in known.items():
        value = get(config, name)
        if value is None and get(defaults, name) is None:
            continue
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            continue
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise InputError(
                f"--config.{name}",
                f"{value!r} is not of type {kind.__name__}",
                f"change it in {shown}",
            )
