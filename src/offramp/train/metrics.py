"""Metrics as JSON lines: one object per optimizer step, evaluation and epoch, whole lines only, none twice."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from offramp.core.bundle import write_text
from offramp.core.errors import OfframpWarning
from offramp.core.warn import warn


class MetricsLog:
    """Records, in memory and, with a path, in a JSONL file.

    Each line is one ``write`` to a file opened for appending, so a killed process leaves at most one unfinished line, the last.

    Args:
        path: of the file, or ``None`` for memory alone.
        write: whether this process writes it; others only read what an earlier run left.
    """

    def __init__(self, path: Path | None, write: bool = True) -> None:
        self.records: list[dict[str, Any]] = []
        self._path = path
        self._write = write
        self._handle: int | None = None

    def start(self, keep: int) -> None:
        """Keep the first ``keep`` records of an earlier run and append after them; what came later is about to happen again."""
        if self._path is None:
            return
        self.records = read_metrics(self._path)[:keep]
        if len(self.records) < keep:
            warn(
                f"{self._path} holds {len(self.records)} of the {keep} lines the checkpoint knows of; the rest is lost.",
                OfframpWarning,
            )
        if not self._write:
            return
        write_text(self._path, "".join(_line(r) for r in self.records))
        self._handle = os.open(self._path, os.O_WRONLY | os.O_APPEND)

    def add(self, record: Mapping[str, Any]) -> None:
        """Append one record."""
        self.records.append(dict(record))
        if self._handle is not None:
            os.write(self._handle, _line(record).encode())

    def flush(self) -> None:
        """Force the file to disk; called before a checkpoint that counts its lines."""
        if self._handle is not None:
            os.fsync(self._handle)

    def close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Records of a JSONL file up to the first line that is unfinished or garbled; empty if there is no file."""
    file = Path(path)
    if not file.is_file():
        return []
    records: list[dict[str, Any]] = []
    for raw in file.read_bytes().split(b"\n")[:-1]:
        try:
            record = json.loads(raw)
        except ValueError:
            break
        if not isinstance(record, dict):
            break
        records.append(record)
    return records


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, allow_nan=False, separators=(",", ":")) + "\n"
