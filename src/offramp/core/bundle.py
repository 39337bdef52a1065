"""Saving and loading: safetensors for arrays, JSON for the rest, both written atomically, nothing unpickled.

A bundle is a folder with ``<name>.json`` and, where there are arrays, ``<name>.safetensors``; the JSON carries the
SHA-256 of the arrays and of itself, so that a truncated or altered file is refused instead of read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from offramp.core.errors import ArtifactError, FingerprintMismatch

FORMAT = "offramp"
FORMAT_VERSION = 1


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over the class, and the names, shapes, dtypes and bytes of all parameters and persistent buffers.

    Devices do not matter; a changed weight, name or dtype does.
    """
    digest = hashlib.sha256(type(model).__qualname__.encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}".encode())
        flat = tensor.detach().to("cpu").contiguous().reshape(-1)
        digest.update(memoryview(flat.view(torch.uint8).numpy()))
    return digest.hexdigest()


def check_base(model: nn.Module, base: object, expected: str, folder: str | os.PathLike[str]) -> None:
    """Refuse a model that exits were not trained on.

    Args:
        model: to put them on.
        base: class name of the model they were trained on, for the message.
        expected: its fingerprint.
        folder: where they are saved, for the message.

    Raises:
        FingerprintMismatch: it is another model, or has other weights.
    """
    if (found := fingerprint(model)) != expected:
        raise FingerprintMismatch(
            f"The exits in {folder} were trained on a {base} with fingerprint {expected[:12]}...; this {type(model).__qualname__} has "
            f"{found[:12]}.... Load the weights the exits were trained on, or attach and fit new ones."
        )


def write_atomic(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Call ``write`` on a temporary file beside ``path``, flush it to disk and rename it over ``path``.

    Readers see the old file or the new one, never a part of either, also when the process is killed.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 text atomically."""
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: str | os.PathLike[str], data: Any) -> None:
    """Write JSON atomically, indented, with a closing newline. NaN and infinities are refused by JSON and by this."""
    write_text(path, json.dumps(data, indent=2, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read JSON.

    Raises:
        ArtifactError: the file is missing or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(f"No file at {path}.") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ArtifactError(f"{path} is not JSON (truncated or foreign): {error}.") from error


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(record: Mapping[str, Any]) -> str:
    """SHA-256 of a record as read back from JSON, white space and order of keys aside, without the digest it carries."""
    plain = json.loads(json.dumps({k: v for k, v in record.items() if k != "sha256"}))
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def save_bundle(
    folder: str | os.PathLike[str], name: str, kind: str, content: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None
) -> None:
    """Write ``<name>.safetensors`` (if there are tensors) and then ``<name>.json`` into ``folder``.

    Args:
        folder: made if missing.
        name: file stem.
        kind: what the bundle is (``trace``, ``plan``, ``adapter``); checked on loading.
        content: JSON data.
        tensors: arrays; moved to the CPU and made contiguous.
    """
    root = Path(folder)
    record: dict[str, Any] = {"format": FORMAT, "version": FORMAT_VERSION, "kind": kind, "content": dict(content)}
    if tensors:
        arrays = {k: t.detach().to("cpu").contiguous().clone() for k, t in tensors.items()}
        path = root / f"{name}.safetensors"

        def write(temporary: Path) -> None:
            save_file(arrays, temporary, metadata={"format": FORMAT, "kind": kind})
            record["tensors"] = {"file": path.name, "sha256": _sha256(temporary), "names": sorted(arrays)}
            record["sha256"] = _digest(record)
            json.dumps(record, allow_nan=False)  # fails, if it fails, before anything is replaced

        write_atomic(path, write)
    else:
        record["sha256"] = _digest(record)
    write_json(root / f"{name}.json", record)


@contextlib.contextmanager
def reading(what: str, *more: type[Exception]) -> Iterator[None]:
    """Read the fields of what was loaded.

    Args:
        what: it is, and where it was found, for the message.
        more: errors that a garbled field ends in here, beside those of a missing key, a wrong type or a wrong value.

    Raises:
        ArtifactError: a field was missing, or not what it should be.
    """
    garbled: tuple[type[Exception], ...] = (KeyError, TypeError, ValueError, *more)
    try:
        yield
    except garbled as error:
        raise ArtifactError(f"{what} lacks or garbles a field: {error}.") from error


def load_bundle(folder: str | os.PathLike[str], name: str, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what `save_bundle` wrote.

    Returns:
        The content and the tensors (empty if none were saved).

    Raises:
        ArtifactError: a file is missing, truncated, altered, of another kind or of a newer version.
    """
    root = Path(folder)
    path = root / f"{name}.json"
    record = read_json(path)
    if not isinstance(record, dict) or record.get("format") != FORMAT or "content" not in record:
        raise ArtifactError(f"{path} was not written by offramp (no '{FORMAT}' header).")
    if record.get("kind") != kind:
        raise ArtifactError(f"{path} holds a {record.get('kind')!r}; a {kind!r} was expected.")
    version = record.get("version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ArtifactError(f"{path} has format version {version!r}; this offramp reads up to {FORMAT_VERSION}. Upgrade offramp.")
    if "sha256" in record and record["sha256"] != _digest(record):
        raise ArtifactError(f"{path} was altered: its SHA-256 differs from the one it carries. Make it anew; it is not for editing.")
    tensors: dict[str, Tensor] = {}
    if "tensors" in record:
        listed = record["tensors"]
        if not isinstance(listed, dict):
            raise ArtifactError(f"{path}: 'tensors' is not an object.")
        arrays = root / Path(str(listed.get("file", ""))).name
        if not arrays.is_file():
            raise ArtifactError(f"{path} refers to {arrays.name}, which is missing beside it.")
        if _sha256(arrays) != listed.get("sha256"):
            raise ArtifactError(f"{arrays} is truncated or was altered: its SHA-256 differs from the one in {path.name}.")
        try:
            tensors = load_file(arrays)
        except SafetensorError as error:
            raise ArtifactError(f"{arrays} is not a safetensors file: {error}.") from error
    content = record["content"]
    if not isinstance(content, dict):
        raise ArtifactError(f"{path}: 'content' is not an object.")
    return content, tensors
