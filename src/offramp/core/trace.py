"""Trace and RiskTable: the waist between running a model and choosing thresholds.

A `Trace` is recorded once by running every exit on every item. Calibrators, bounds, curves and comparisons read it and
never touch the model again.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from offramp.core.bundle import load_bundle, reading, save_bundle
from offramp.core.errors import InvalidInput, NotReplayable
from offramp.core.parts import part_key
from offramp.core.protocols import Rule
from offramp.core.types import Readout


@dataclass(frozen=True)
class LatencyTable:
    """Measured time of each segment and head at bucketed batch sizes, on one machine.

    Attributes:
        batch_sizes: ascending sizes that were timed, at least one.
        segment_ms: ``[K, S]`` median milliseconds of segment k at each size.
        head_ms: ``[K, S]`` median milliseconds of head and rule at exit k; zeros for the model's own output.
        gather_ms: ``[S]`` milliseconds to gather the survivors' state, by size before gathering.
        sync_ms: milliseconds until the host knows how many rows left.
        device: what it was measured on, in words.
    """

    batch_sizes: tuple[int, ...]
    segment_ms: Tensor
    head_ms: Tensor
    gather_ms: Tensor
    sync_ms: float
    device: str

    def __post_init__(self) -> None:
        if not self.batch_sizes or list(self.batch_sizes) != sorted(set(self.batch_sizes)) or self.batch_sizes[0] < 1:
            raise InvalidInput(f"batch_sizes must be ascending positive integers, got {self.batch_sizes}.")
        for name in ("segment_ms", "head_ms"):
            t: Tensor = getattr(self, name)
            if t.ndim != 2 or t.shape[1] != len(self.batch_sizes):
                raise InvalidInput(f"{name} must be [exits, {len(self.batch_sizes)}], got {tuple(t.shape)}.")
        if self.head_ms.shape != self.segment_ms.shape:
            raise InvalidInput(f"head_ms must be {tuple(self.segment_ms.shape)} as segment_ms, got {tuple(self.head_ms.shape)}.")
        if self.gather_ms.shape != (len(self.batch_sizes),):
            raise InvalidInput(f"gather_ms must be [{len(self.batch_sizes)}], got {tuple(self.gather_ms.shape)}.")

    def to_dict(self) -> dict[str, Any]:
        return {
            "batch_sizes": list(self.batch_sizes),
            "segment_ms": self.segment_ms.tolist(),
            "head_ms": self.head_ms.tolist(),
            "gather_ms": self.gather_ms.tolist(),
            "sync_ms": self.sync_ms,
            "device": self.device,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LatencyTable:
        return cls(
            tuple(data["batch_sizes"]),
            torch.tensor(data["segment_ms"], dtype=torch.float64),
            torch.tensor(data["head_ms"], dtype=torch.float64),
            torch.tensor(data["gather_ms"], dtype=torch.float64),
            float(data["sync_ms"]),
            str(data["device"]),
        )


@dataclass(frozen=True)
class Trace:
    """Everything that calibration needs, recorded by running every exit.

    Attributes:
        exits: K names, the model's own output last (named ``"output"``).
        predictions: ``[N, K]`` class index (int64), or value (float) for regression.
        cost: ``[K]`` FLOPs per item to leave at exit k, the heads passed on the way included.
        base_cost: FLOPs per item of the model without any head.
        losses: ``[N, K]`` loss of each exit's answer in [0, 1] (0/1 error for classification); ``None`` without labels.
        labels: ``[N]`` or ``None``.
        logits: ``[N, K, C]`` float32, or ``None`` if they were not kept.
        recorded: scores ``[N, K]`` by rule key, for rules that read more than logits.
        latency: measured times, if they were taken.
        fingerprint: of the model and its heads.
        provenance: data set, date, versions, device; free form JSON.
        why_not_replayable: empty when leaving early changes nothing for other items or later steps, else the reason.
        head_cost: ``[K]`` FLOPs per item of each exit's own head, 0 at the last; ``None`` if they are not known, or a head reads earlier
            ones' answers, so that none can be left out.
    """

    exits: tuple[str, ...]
    predictions: Tensor
    cost: Tensor
    base_cost: float
    losses: Tensor | None = None
    labels: Tensor | None = None
    logits: Tensor | None = None
    recorded: Mapping[str, Tensor] = field(default_factory=dict)
    latency: LatencyTable | None = None
    fingerprint: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    why_not_replayable: str = ""
    head_cost: Tensor | None = None

    def __post_init__(self) -> None:
        exits = len(self.exits)
        if self.predictions.ndim != 2 or self.predictions.shape[1] != exits:
            raise InvalidInput(f"predictions must be [items, {exits}], got {tuple(self.predictions.shape)}.")
        if self.cost.shape != (exits,):
            raise InvalidInput(f"cost must be [{exits}], got {tuple(self.cost.shape)}.")
        if self.head_cost is not None and self.head_cost.shape != (exits,):
            raise InvalidInput(f"head_cost must be [{exits}], got {tuple(self.head_cost.shape)}.")
        if self.losses is not None and self.losses.shape != self.predictions.shape:
            raise InvalidInput(f"losses must be {tuple(self.predictions.shape)}, got {tuple(self.losses.shape)}.")
        if self.logits is not None and self.logits.shape[:2] != self.predictions.shape:
            raise InvalidInput(f"logits must be [{self.items}, {exits}, classes], got {tuple(self.logits.shape)}.")
        if self.labels is not None and self.labels.shape[:1] != (self.items,):
            raise InvalidInput(f"labels must be [{self.items}], got {tuple(self.labels.shape)}.")
        for key, scores in self.recorded.items():
            if scores.shape != self.predictions.shape:
                raise InvalidInput(f"The recorded scores of {key} must be {tuple(self.predictions.shape)}, got {tuple(scores.shape)}.")

    def __repr__(self) -> str:
        held = [n for n in ("losses", "labels", "logits", "latency") if getattr(self, n) is not None]
        rules = f", scores of {len(self.recorded)} rules" if self.recorded else ""
        return f"Trace({self.items} items, exits {', '.join(self.exits)}; holds {', '.join(held) or 'predictions alone'}{rules})"

    @property
    def items(self) -> int:
        return int(self.predictions.shape[0])

    def scores(self, rule: Rule, chunk: int = 65536) -> Tensor:
        """Scores ``[N, K]`` (float32) of a rule at every exit; the last column is 0 and never compared.

        Recorded scores are used if the trace has them; otherwise they are computed from the kept logits.

        Raises:
            NotReplayable: the trace is path-dependent, or the rule reads more than logits and was not recorded.
        """
        if self.why_not_replayable:
            raise NotReplayable(f"This trace cannot be replayed: {self.why_not_replayable}.")
        key = part_key(rule)
        if key in self.recorded:
            return self.recorded[key]
        if rule.needs_hidden or self.logits is None:
            need = "reads hidden states" if rule.needs_hidden else "needs logits, which were not kept"
            raise NotReplayable(
                f"{type(rule).__name__} {need}, and its scores are not in this trace (recorded: {list(self.recorded) or 'none'}). "
                "Record again with record(..., rules=[rule])."
            )
        out = torch.zeros(self.items, len(self.exits))
        with torch.no_grad():
            for start in range(0, self.items, chunk):
                block = self.logits[start : start + chunk]
                state = rule.begin(block.shape[0], block.device)
                for k in range(len(self.exits) - 1):
                    out[start : start + chunk, k], state = rule.score(k, Readout(block[:, k]), state)
        return out

    def running_cost(self, thresholds: Sequence[float] | Tensor, rule: Rule) -> Tensor:
        """``[K]`` FLOPs per item to leave at each exit, as an engine runs these thresholds: an exit that is switched off needs no head.

        Args:
            thresholds: K numbers, ``inf`` = off.
            rule: one with a running state needs every head up to the last exit that is open.
        """
        if self.head_cost is None:
            return self.cost
        off = torch.as_tensor(thresholds, dtype=torch.float64).to(self.cost.device)[:-1] == float("inf")
        if rule.stateful:
            off = off.flip(0).int().cumprod(0).flip(0).bool()  # those behind the last that is open
        saved = torch.where(off, self.head_cost[:-1], 0).cumsum(0)
        return self.cost - torch.cat([saved, saved[-1:] if len(saved) else saved.new_zeros(1)])

    def subset(self, rows: Tensor) -> Trace:
        """The same trace for some items (int64 indices or a boolean mask ``[N]``)."""
        return replace(
            self,
            predictions=self.predictions[rows],
            losses=None if self.losses is None else self.losses[rows],
            labels=None if self.labels is None else self.labels[rows],
            logits=None if self.logits is None else self.logits[rows],
            recorded={k: v[rows] for k, v in self.recorded.items()},
        )

    def split(self, fraction: float, seed: int = 0) -> tuple[Trace, Trace]:
        """Two disjoint random parts, the first with ``round(fraction * items)`` items.

        Raises:
            InvalidInput: ``fraction`` is not inside (0, 1) or a part would be empty.
        """
        first = round(fraction * self.items)
        if not 0 < fraction < 1 or first in (0, self.items):
            raise InvalidInput(f"fraction must leave items on both sides, got {fraction} of {self.items} items.")
        order = torch.randperm(self.items, generator=torch.Generator().manual_seed(seed))
        return self.subset(order[:first]), self.subset(order[first:])

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``trace.json`` and ``trace.safetensors`` into ``folder``, atomically."""
        tensors: dict[str, Tensor] = {"predictions": self.predictions, "cost": self.cost}
        for name in ("losses", "labels", "logits", "head_cost"):
            value = getattr(self, name)
            if value is not None:
                tensors[name] = value
        keys = list(self.recorded)
        tensors |= {f"recorded.{i}": self.recorded[k] for i, k in enumerate(keys)}
        content = {
            "exits": list(self.exits),
            "base_cost": self.base_cost,
            "recorded": keys,
            "latency": None if self.latency is None else self.latency.to_dict(),
            "fingerprint": self.fingerprint,
            "provenance": dict(self.provenance),
            "why_not_replayable": self.why_not_replayable,
        }
        save_bundle(folder, "trace", "trace", content, tensors)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Trace:
        """Read a trace that `save` wrote.

        Raises:
            ArtifactError: a file is missing, truncated, altered or foreign.
        """
        content, tensors = load_bundle(folder, "trace", "trace")
        with reading(f"The trace in {folder}"):
            recorded = {key: tensors[f"recorded.{i}"] for i, key in enumerate(content["recorded"])}
            latency = None if content["latency"] is None else LatencyTable.from_dict(content["latency"])
            return cls(
                tuple(content["exits"]),
                tensors["predictions"],
                tensors["cost"],
                float(content["base_cost"]),
                tensors.get("losses"),
                tensors.get("labels"),
                tensors.get("logits"),
                recorded,
                latency,
                content["fingerprint"],
                content["provenance"],
                content["why_not_replayable"],
                tensors.get("head_cost"),
            )


@dataclass(frozen=True)
class RiskTable:
    """Loss and cost of each item under each of M settings; the input of every bound.

    Attributes:
        thresholds: ``[M, K]`` the settings, the last column ``-inf``.
        loss: ``[N, M]`` in [-1, 1] (a signed accuracy gap) or [0, 1].
        cost: ``[N, M]`` FLOPs.
        loss_range: lowest and highest possible loss.
    """

    thresholds: Tensor
    loss: Tensor
    cost: Tensor
    loss_range: tuple[float, float] = (0.0, 1.0)
