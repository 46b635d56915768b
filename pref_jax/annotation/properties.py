"""What a judge rates: flags of a query and ratings of a response, from one declarative file."""

import dataclasses
import hashlib
import json
import re
import tomllib
from pathlib import Path
from typing import Any

from pref_jax.bucket import fetch_file
from pref_jax.errors import InputError

DEFAULT_FILE = Path(__file__).with_name("properties.toml")
_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_REMEDY = "give a file of the form of pref_jax/annotation/properties.toml"


@dataclasses.dataclass(frozen=True)
class Property:
    """One thing that is judged.

    Attributes:
      name: lower case, digits and underscores; the key in answers and files.
      definition: one sentence that says when it holds.
      query_aware: whether it can only be judged with the query at hand.
    """

    name: str
    definition: str
    query_aware: bool = False


@dataclasses.dataclass(frozen=True)
class PropertySet:
    """A judge's form.

    Attributes:
      name: of the set.
      scale: the words for rating 0, 1, ...
      flags: of the query, 0 or 1.
      ratings: of the response, an index into ``scale``; the heads of a multi-task model are in
        this order.
    """

    name: str
    scale: tuple[str, ...]
    flags: tuple[Property, ...]
    ratings: tuple[Property, ...]

    @property
    def flag_names(self) -> tuple[str, ...]:
        return tuple(flag.name for flag in self.flags)

    @property
    def rating_names(self) -> tuple[str, ...]:
        return tuple(rating.name for rating in self.ratings)

    @property
    def digest(self) -> str:
        """Hash of all of it: another wording is another set."""
        content = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


def load_properties(path: str | Path | None = None) -> PropertySet:
    """Reads a set of properties.

    Args:
      path: a TOML file; None: the built-in set of the study, 20 ratings and 5 flags.

    Raises:
      InputError: no such file, or what is wrong in it.
    """
    where = str(DEFAULT_FILE if path is None else path)
    path = Path(fetch_file(where))
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = (error.strerror or "cannot be read").lower()
        raise InputError(where, reason, "check the path") from error
    except (ValueError, RecursionError) as error:  # not TOML, or not UTF-8
        raise InputError(where, f"is not TOML ({error})", _REMEDY) from error
    _only(where, content, ("name", "scale", "flags", "ratings"))
    name, scale = content.get("name"), content.get("scale")
    if not isinstance(name, str) or not name.strip():
        raise InputError(where, "it has no name", _REMEDY)
    if (
        not isinstance(scale, list)
        or not 2 <= len(scale) <= 11
        or not all(isinstance(word, str) and word.strip() for word in scale)
        or len(set(scale)) < len(scale)
    ):
        raise InputError(where, "scale is not a list of 2 to 11 different texts", _REMEDY)
    properties = PropertySet(
        name.strip(),
        tuple(scale),
        _read(where, content, "flags"),
        _read(where, content, "ratings"),
    )
    if not properties.ratings:
        raise InputError(where, "it has no ratings", _REMEDY)
    names = properties.flag_names + properties.rating_names
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(where, f"{repeated[0]} is there twice", "give each property its own name")
    return properties


def _read(where: str, content: dict[str, Any], kind: str) -> tuple[Property, ...]:
    entries = content.get(kind, [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise InputError(where, f"{kind} is not a list of tables", _REMEDY)
    properties = []
    for number, entry in enumerate(entries, start=1):
        place = f"{where}: {kind} {number}"
        _only(place, entry, ("name", "definition", "query_aware"))
        name, definition = entry.get("name"), entry.get("definition")
        query_aware = entry.get("query_aware", False)
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise InputError(
                place, f"its name is {name!r}", "use lower case letters, digits and underscores"
            )
        if not isinstance(definition, str) or not definition.strip():
            raise InputError(
                place, f"{name} has no definition", "say in one sentence what it means"
            )
        if not isinstance(query_aware, bool):
            raise InputError(
                place, f"query_aware of {name} is {query_aware!r}", "use true or false"
            )
        properties.append(Property(name, definition.strip(), query_aware))
    return tuple(properties)


def _only(where: str, table: dict[str, Any], known: tuple[str, ...]) -> None:
    for name in table:
        if name not in known:
            raise InputError(where, f"unknown key {name!r}", f"known: {', '.join(known)}")
