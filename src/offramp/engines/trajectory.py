"""What a denoiser remembers along a trajectory: per row, guidance branch and decision point; explicit, counted and forgotten at once.

Shapes: ``B`` rows of a call, ``R`` of them at hand.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from offramp.policies.fills import Tensors

MAX_BRANCHES = 8
"""Calls at one timestep that are taken for guidance branches; one more is a new trajectory."""


@dataclass
class Memory:
    """Of one point in one branch. Lists have one entry per row.

    Attributes:
        rows: B.
        depth: computed steps that are kept.
        snapshots: what the fill keeps of them, newest first, each ``[B, ...]`` by name.
        noise: noise level of each, newest first; empty where nothing is remembered.
        reference: what the signal watched in the last computed step.
        broken: ``[B]`` for every snapshot, whether it holds a number that is not finite.
        age: steps since the last computed one.
    """

    rows: int
    depth: int
    snapshots: list[dict[str, Tensor]] = field(default_factory=list)
    noise: list[list[float]] = field(default_factory=list)
    reference: tuple[Tensor, ...] = ()
    broken: list[Tensor] = field(default_factory=list)
    age: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.noise = self.noise or [[] for _ in range(self.rows)]
        self.age = self.age or [0] * self.rows

    def store(self, rows: Sequence[int], index: Tensor | None, kept: Tensors, watched: tuple[Tensor, ...], noise: Sequence[float]) -> None:
        """Remember a computed step of some rows.

        Args:
            rows: which, R of them.
            index: the same on the device, or ``None`` if they are all rows in order.
            kept: what the fill keeps, ``[R, ...]`` by name.
            watched: what the signal watched, each ``[R, ...]``.
            noise: noise level of each row of the batch.
        """
        depth = max(self.depth, 1)
        for r in rows:
            self.noise[r] = [noise[r], *self.noise[r]][:depth]
            self.age[r] = 0
        if kept:
            bad = ~torch.stack([_finite(t) for t in kept.values()]).all(0)
            if index is None:
                self.snapshots = [dict(kept), *self.snapshots][:depth]
                self.broken = [bad, *self.broken][:depth]
            else:  # never in place: what is remembered may be shared with the state or with another point's memory
                if len(self.snapshots) < depth:
                    self.snapshots = [*self.snapshots, {n: t.new_zeros(self.rows, *t.shape[1:]) for n, t in kept.items()}]
                    self.broken = [*self.broken, bad.new_zeros(self.rows)]
                newer = [kept, *({n: t[index] for n, t in s.items()} for s in self.snapshots[:-1])]
                self.snapshots = [{n: s[n].index_copy(0, index, m[n]) for n in s} for s, m in zip(self.snapshots, newer, strict=True)]
                worse = [bad, *(b[index] for b in self.broken[:-1])]
                self.broken = [b.index_copy(0, index, m) for b, m in zip(self.broken, worse, strict=True)]
        if watched:
            before: Sequence[Tensor | None] = self.reference or [None] * len(watched)
            self.reference = tuple(_placed(old, new, index, self.rows) for old, new in zip(before, watched, strict=True))

    def forget(self, rows: Sequence[int]) -> None:
        """Nothing is remembered of these rows; their tensors are no longer read."""
        for r in rows:
            self.noise[r] = []
            self.age[r] = 0

    def skipped(self, rows: Iterable[int]) -> None:
        """A step of these rows was not computed."""
        for r in rows:
            self.age[r] += 1

    @property
    def tensors(self) -> list[Tensor]:
        return [*(t for s in self.snapshots for t in s.values()), *self.broken, *self.reference]


def on_device(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers of the host as a tensor, without waiting for the device."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def _finite(tensor: Tensor) -> Tensor:
    return tensor.isfinite().flatten(1).all(1)


def _placed(old: Tensor | None, new: Tensor, index: Tensor | None, rows: int) -> Tensor:
    if index is None:
        return new
    return (old if old is not None else new.new_zeros(rows, *new.shape[1:])).index_copy(0, index, new)


@dataclass
class Branch:
    """Of one guidance branch: a memory per point, the step and the key of every row, and the step it was last called at."""

    memories: list[Memory]
    step: list[int]
    visited: int
    keys: list[int] = field(default_factory=list)


class Trajectory:
    """Everything a denoiser remembers. Also finds out which call this is: a branch of the same step, the next step, or a new trajectory.

    Rows are new where their noise level rises again. All of them are where the number of rows, their shape or dtype changes. Calls at the
    same timesteps are guidance branches in the order in which they come, each with memories of its own. A branch that missed a step starts
    anew. In one call with both guidance branches every row has its own memory anyway.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.branches: dict[int, Branch] = {}
        self.times: list[float] = []
        self.log_snr: list[float] = []
        self.form: Any = None
        self.step = -1
        self.branch = 0

    def enter(self, times: list[float], log_snr: list[float], form: Any, depths: Sequence[int]) -> tuple[Branch, str]:
        """Find the memories of a call.

        Args:
            times: timestep of every row.
            log_snr: noise level of every row.
            form: what must not change along a trajectory: shapes and dtypes.
            depths: for every point, how many computed steps it keeps.

        Returns:
            The branch, and why it has nothing to remember (``"first"``, ``"shape"``, ``"gap"``), or ``""``.
        """
        rows = len(times)
        why = ""
        if self.form is not None and (self.form != form or len(self.times) != rows):
            self.reset()
            why = "shape"
        if times == self.times and self.branch + 1 < MAX_BRANCHES:
            self.branch += 1
        elif times == self.times:
            self.reset()
            self.step = 0
        else:
            anew = [r for r in range(rows) if self.times and log_snr[r] < self.log_snr[r]]
            if len(anew) == rows:
                self.reset()
            for branch in self.branches.values():
                for memory in branch.memories:
                    memory.forget(anew)
                for r in anew:
                    branch.step[r] = -1
            self.branch = 0
            self.step += 1
        self.times, self.log_snr, self.form = times, log_snr, form
        found = self.branches.get(self.branch)
        if found is None or found.visited != self.step - 1:
            why = why or ("gap" if found is not None else "first")
            found = self.branches[self.branch] = Branch([Memory(rows, d) for d in depths], [-1] * rows, self.step)
        found.visited = self.step
        found.step = [s + 1 for s in found.step]
        return found, why

    @property
    def cache_bytes(self) -> int:
        """Bytes of everything remembered, each memory once."""
        held = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for b in self.branches.values()
            for m in b.memories
            for t in m.tensors
        }
        return sum(held.values())
