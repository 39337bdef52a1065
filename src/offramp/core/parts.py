"""Parts as JSON: frozen dataclasses and configured modules become plain data and come back by an explicit table of types.

Nothing is unpickled and no name is imported from a file: a type that the table does not list is refused.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from offramp.core.bundle import fingerprint
from offramp.core.errors import ArtifactError, InvalidInput


def part_to_dict(part: Any) -> Any:
    """Describe a part (or a nested tuple of parts) as JSON data: ``{"type": name, "args": {...}}``.

    A dataclass gives its fields; a module gives its ``config`` mapping (its weights are saved separately).

    Raises:
        InvalidInput: the value is neither plain data nor a part.
    """
    if part is None or isinstance(part, bool | int | float | str):
        return part
    if isinstance(part, list | tuple):
        return [part_to_dict(p) for p in part]
    if isinstance(part, Mapping):
        return {str(k): part_to_dict(v) for k, v in part.items()}
    if isinstance(part, nn.Module):
        config = getattr(part, "config", None)
        if not isinstance(config, Mapping):
            raise InvalidInput(
                f"{type(part).__name__} cannot be described as data: a module used as a part needs a `config` mapping "
                "of the arguments it was made with."
            )
        return {"type": type(part).__name__, "args": {k: part_to_dict(v) for k, v in config.items()}}
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        args = {f.name: part_to_dict(getattr(part, f.name)) for f in dataclasses.fields(part) if f.init}
        return {"type": type(part).__name__, "args": args}
    raise InvalidInput(f"{part!r} ({type(part).__name__}) is neither plain data nor a part, so it cannot be saved.")


def part_from_dict(data: Any, known: Mapping[str, type]) -> Any:
    """Inverse of `part_to_dict`; lists come back as tuples.

    Args:
        data: what `part_to_dict` returned.
        known: the types that may be made, by name.

    Raises:
        ArtifactError: the data names a type that is not in ``known``, or its arguments do not fit.
    """
    if isinstance(data, list):
        return tuple(part_from_dict(d, known) for d in data)
    if isinstance(data, Mapping) and set(data) == {"type", "args"}:
        kind = data["type"]
        if kind not in known:
            raise ArtifactError(f"The file names a part of type {kind!r}; known types: {', '.join(sorted(known))}.")
        args = {k: part_from_dict(v, known) for k, v in data["args"].items()}
        try:
            return known[kind](**args)
        except TypeError as error:
            raise ArtifactError(f"The arguments stored for part {kind!r} do not fit this version: {error}.") from error
    if isinstance(data, Mapping):
        return {k: part_from_dict(v, known) for k, v in data.items()}
    return data


def part_key(part: Any) -> str:
    """A canonical string that equals for equal parts, learned weights included; names recorded scores in a trace."""
    key = json.dumps(part_to_dict(part), sort_keys=True, separators=(",", ":"))
    if isinstance(part, nn.Module) and part.state_dict():
        key += "#" + fingerprint(part)[:16]
    return key
