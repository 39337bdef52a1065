"""Checkpoints: folders of one safetensors and one JSON file each, written beside and renamed into place; nothing is pickled."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offramp.core.bundle import load_bundle, reading, save_bundle
from offramp.core.errors import ArtifactError, InvalidInput, OfframpWarning
from offramp.core.warn import warn

_PREFIX = "step-"
_TEMPORARY = ".tmp-"


def flatten(value: Any, tensors: dict[str, Tensor], where: str = "state") -> Any:
    """Plain JSON for a nested state; tensors are moved into ``tensors`` and referred to by key.

    Mappings become lists of pairs, so that integer keys survive; tuples and lists are told apart; floats round-trip exactly.

    Raises:
        InvalidInput: something in it is neither plain data nor a tensor.
    """
    if value is None or isinstance(value, bool | str | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, np.generic):
        return flatten(value.item(), tensors, where)
    if isinstance(value, Tensor):
        key = f"t{len(tensors)}"
        tensors[key] = value
        return {"tensor": key}
    if isinstance(value, Mapping):
        return {"map": [[flatten(k, tensors, where), flatten(v, tensors, f"{where}.{k}")] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [flatten(v, tensors, f"{where}[{i}]") for i, v in enumerate(value)]}
    raise InvalidInput(
        f"{where} is a {type(value).__name__}, which a checkpoint cannot hold: only plain data and tensors are saved, nothing is pickled. "
        "Give the optimizer or scheduler a state_dict without it, or fit without output_dir."
    )


def unflatten(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Inverse of `flatten`.

    Raises:
        ArtifactError: the data is not what `flatten` makes.
    """
    if not isinstance(value, dict):
        if isinstance(value, list):
            raise ArtifactError("A checkpoint holds a bare list where a described value was expected.")
        return value
    entry: tuple[str, Any] = next(iter(value.items())) if len(value) == 1 else ("", None)
    kind, inner = entry
    if kind == "float":
        return float(inner)
    if kind == "tensor":
        if inner not in tensors:
            raise ArtifactError(f"A checkpoint refers to the tensor {inner!r}, which it does not hold.")
        return tensors[inner]
    if kind == "map":
        return {unflatten(k, tensors): unflatten(v, tensors) for k, v in inner}
    if kind in ("list", "tuple"):
        items = [unflatten(v, tensors) for v in inner]
        return items if kind == "list" else tuple(items)
    raise ArtifactError(f"A checkpoint holds an unknown description: {sorted(value)}.")


def _sync_folder(folder: Path) -> None:
    # A rename is durable only once the folder that holds the name is flushed.
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_checkpoint(root: Path, step: int, state: Mapping[str, Any], keep: int) -> Path:
    """Write ``root/step-<step>`` and drop all but the newest ``keep``. Killed at any moment, it leaves whole checkpoints only."""
    root.mkdir(parents=True, exist_ok=True)
    for left in root.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(left)
    temporary, target = root / f"{_TEMPORARY}{step:09d}", root / f"{_PREFIX}{step:09d}"
    tensors: dict[str, Tensor] = {}
    content = {"state": flatten(state, tensors)}
    save_bundle(temporary, "state", "checkpoint", content, tensors)
    _sync_folder(temporary)
    if target.exists():
        shutil.rmtree(target)
    os.replace(temporary, target)
    _sync_folder(root)
    for old in checkpoints(root)[:-keep]:
        shutil.rmtree(old)
    return target


def checkpoints(root: Path) -> list[Path]:
    """Checkpoints in ``root``, oldest first."""
    return sorted(p for p in root.glob(f"{_PREFIX}*") if p.is_dir()) if root.is_dir() else []


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """Read one checkpoint.

    Raises:
        ArtifactError: it is truncated, altered or foreign.
    """
    content, tensors = load_bundle(folder, "state", "checkpoint")
    with reading(f"The checkpoint {folder}"):
        state = unflatten(content["state"], tensors)
    if not isinstance(state, dict):
        raise ArtifactError(f"The checkpoint {folder} holds a {type(state).__name__}, not a mapping.")
    return state


def newest_checkpoint(root: Path) -> dict[str, Any] | None:
    """State of the newest readable checkpoint, or ``None`` if there is none. A damaged one is passed over with a warning.

    Raises:
        ArtifactError: there are checkpoints but none can be read.
    """
    found = checkpoints(root)
    problems: list[str] = []
    for folder in reversed(found):
        try:
            state = read_checkpoint(folder)
        except ArtifactError as error:
            problems.append(f"{folder.name}: {error}")
            continue
        if problems:
            warn(
                f"Damaged checkpoints were passed over; training resumes from {folder.name}. {' '.join(problems)}",
                OfframpWarning,
            )
        return state
    if problems:
        raise ArtifactError(
            f"No checkpoint in {root} can be read. {' '.join(problems)} Use resume=False to start afresh, which deletes them."
        )
    return None


def clear_checkpoints(root: Path) -> None:
    """Delete every checkpoint in ``root``."""
    for folder in [*checkpoints(root), *root.glob(f"{_TEMPORARY}*")]:
        shutil.rmtree(folder)


def load_into(module: torch.nn.Module, weights: Mapping[str, Tensor], what: str) -> None:
    """Load weights, all of them.

    Raises:
        InvalidInput: names or shapes differ.
    """
    try:
        module.load_state_dict(dict(weights))
    except RuntimeError as error:
        raise InvalidInput(f"{what} was made by another network than this one: {error} Use another output_dir, or resume=False.") from error
