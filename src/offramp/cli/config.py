"""One TOML file for all commands.

Keys are the long flags, with ``-`` or ``_``. Keys at the top apply to every command that has them; a table named after a command
applies to that command and wins over the top; flags on the command line win over both::

    model = "timm:resnet18"
    data = "photos"
    out = "runs/photos"

    [fit]
    part = "0:0.6"
    epochs = 10

    [record]
    part = "0.6:0.8"
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from offramp.core.bundle import write_text
from offramp.core.errors import InvalidInput


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        InvalidInput: it is missing or malformed; the error has the line.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InvalidInput(f"No configuration file at {path}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, IsADirectoryError) as error:
        raise InvalidInput(f"{path} is not a TOML file: {error}.") from error


def unknown_key(key: str, known: Sequence[str], where: str) -> InvalidInput:
    """The error for a key that nothing reads, with the nearest one that something does."""
    near = difflib.get_close_matches(key.replace("-", "_"), [k.replace("-", "_") for k in known], n=1, cutoff=0.3)
    hint = f" Did you mean {near[0]!r}?" if near else f" Known: {', '.join(sorted(known))}."
    return InvalidInput(f"{where}: unknown key {key!r}.{hint}")


def defaults_for(command: str, config: Mapping[str, Any], flags: Mapping[str, Sequence[str]], where: str) -> dict[str, Any]:
    """Values that a configuration gives to the flags of one command.

    Args:
        command: whose.
        config: what `read_toml` returned.
        flags: names of the flags of every command.
        where: the file, for messages.

    Raises:
        InvalidInput: a key is known to no command, or a table's key is unknown to its command.
    """
    everywhere = sorted({flag for names in flags.values() for flag in names})
    top: dict[str, Any] = {}
    own: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            if key not in flags:
                raise unknown_key(key, list(flags), f"{where}: tables are named after commands; [{key}]")
            for inner, setting in value.items():
                if inner.replace("-", "_") not in flags[key]:
                    raise unknown_key(inner, flags[key], f"{where}, table [{key}]")
                if key == command:
                    own[inner.replace("-", "_")] = setting
        else:
            name = key.replace("-", "_")
            if name not in everywhere:
                raise unknown_key(key, everywhere, where)
            if name in flags[command]:
                top[name] = value
    return {**top, **own}


def write_toml(path: Path, values: Mapping[str, Any]) -> None:
    """Write settings atomically; ``None`` and empty lists are left out, tables come last.

    Raises:
        InvalidInput: a value is not a number, text, truth value, list or table of these.
    """
    lines = [f"{k} = {_toml(v)}" for k, v in values.items() if not isinstance(v, Mapping) and v not in (None, [], ())]
    for name, table in values.items():
        if isinstance(table, Mapping):
            lines += ["", f"[{name}]", *(f"{k} = {_toml(v)}" for k, v in table.items() if v not in (None, [], ()))]
    write_text(path, "\n".join(lines) + "\n")


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str | Path):
        escaped = "".join(
            c if c.isprintable() and c not in '"\\' else f"\\u{ord(c):04x}" if ord(c) < 0x10000 else f"\\U{ord(c):08x}" for c in str(value)
        )
        return f'"{escaped}"'
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    raise InvalidInput(f"{value!r} cannot be written to a configuration file.")
