"""A run's configuration as a TOML file: a flat table with an entry per option."""

from __future__ import annotations

import difflib
import json
import os
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class ConfigError(ValueError):
    """A file that is not a configuration; the message names the file and what is wrong in it."""


def read_config(path: str | os.PathLike[str], known: Collection[str]) -> dict[str, Any]:
    """Read the entries of a configuration.

    Args:
        path: a TOML file, such as one made of `as_toml`.
        known: the names that an entry may have.

    Returns:
        Strings, numbers, booleans, and lists of them, by name.

    Raises:
        OSError: the file cannot be read.
        ConfigError: it is not TOML, or has an entry of another name or type.
    """
    try:
        entries = tomllib.loads(Path(path).read_bytes().decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: no TOML ({error})") from error
    for name, value in entries.items():
        if name not in known:
            near = difflib.get_close_matches(name.replace("-", "_"), known, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else f"allowed are {', '.join(sorted(known))}"
            raise ConfigError(f"{path}: unknown entry {name}; {hint}")
        for item in value if isinstance(value, list) else [value]:
            if not isinstance(item, (str, int, float)):  # bool is an int
                allowed = "a string, a number, true or false, or a list of them"
                raise ConfigError(f"{path}: {name} must be {allowed}, got {type(item).__name__}")
    return entries


def as_toml(entries: Mapping[str, Any]) -> str:
    """Entries as TOML, one per line; those that are None are left out.

    Numbers round-trip exactly. TypeError if a value is not a string, number, boolean, or list of them.
    """
    return "".join(f"{name} = {_value(name, value)}\n" for name, value in entries.items() if value is not None)


def _value(name: str, value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_value(name, item) for item in value)}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        # JSON's escapes are TOML's, but that TOML wants one for DEL too and has none for half a surrogate pair.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    raise TypeError(f"as_toml: {name} must be a string, a number, a boolean or a list of them, got {value!r}")
