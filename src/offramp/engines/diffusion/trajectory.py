"""What a denoiser remembers along a trajectory: per row, guidance branch and decision point; explicit, counted and forgotten at once.

Shapes: ``B`` rows of a call, ``R`` of them at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from offramp.policies.fills import Tensors

Host = npt.NDArray[Any]
"""Numbers of rows on the host."""

MAX_BRANCHES = 8
"""Calls at one timestep that are taken for guidance branches; one more is a new trajectory."""


@dataclass
class Memory:
    """Of one point in one branch.

    Attributes:
        rows: B.
        depth: computed steps that are kept.
        snapshots: what the fill keeps of them, newest first, each ``[B, ...]`` by name.
        noise: float64 ``[max(depth, 1), B]`` noise level of each, newest first; NaN where nothing is remembered.
        reference: what the signal watched in the last computed step.
        broken: ``[B]`` for every snapshot, whether it holds a number that is not finite; none where nobody asks.
        gone: how many rows the point sent away when it was last asked; ``None`` before.
        age: int64 ``[B]`` steps since the last computed one.
    """

    rows: int
    depth: int
    snapshots: list[dict[str, Tensor]] = field(default_factory=list)
    reference: tuple[Tensor, ...] = ()
    broken: list[Tensor] = field(default_factory=list)
    gone: int | None = None

    def __post_init__(self) -> None:
        self.noise: Host = np.full((max(self.depth, 1), self.rows), np.nan)
        self.age: Host = np.zeros(self.rows, dtype=np.int64)

    @property
    def known(self) -> Host:
        """Bool ``[B]``: whether a computed step of a row is remembered."""
        return ~np.isnan(self.noise[0])

    def levels(self, row: int) -> list[float]:
        """Noise levels of what is remembered of a row, newest first."""
        held = self.noise[:, row]
        return [float(x) for x in held[~np.isnan(held)]]

    def note(self, rows: Host | slice, noise: Host | float) -> None:
        """Rows computed a step at some noise level each."""
        self.noise[1:, rows] = self.noise[:-1, rows].copy()
        self.noise[0, rows] = noise
        self.age[rows] = 0

    def put(self, index: Tensor | None, kept: Tensors, watched: tuple[Tensor, ...], *, check: bool = True) -> None:
        """Remember the tensors of a computed step of R rows.

        Args:
            index: which, on the device (int64 ``[R]``), or ``None`` if they are all rows in order.
            kept: what the fill keeps, ``[R, ...]`` by name.
            watched: what the signal watched, each ``[R, ...]``.
            check: note which rows of ``kept`` are finite: for points that measure. A schedule reuses without a look at any tensor.
        """
        depth = max(self.depth, 1)
        if kept:
            if check:
                self.broken = _pushed(self.broken, not_finite(kept), index, self.rows, depth)
            names = list(kept)
            columns = [_pushed([s[n] for s in self.snapshots], kept[n], index, self.rows, depth) for n in names]
            self.snapshots = [dict(zip(names, held, strict=True)) for held in zip(*columns, strict=True)]
        if watched:
            before: Sequence[Tensor | None] = self.reference or [None] * len(watched)
            self.reference = tuple(_placed(old, new, index, self.rows) for old, new in zip(before, watched, strict=True))

    def forget(self, rows: Host) -> None:
        """Nothing is remembered of these rows; their tensors are no longer read."""
        self.noise[:, rows] = np.nan
        self.age[rows] = 0

    def skipped(self, rows: Host | slice) -> None:
        """A step of these rows was not computed."""
        self.age[rows] += 1

    @property
    def tensors(self) -> list[Tensor]:
        return [*(t for s in self.snapshots for t in s.values()), *self.broken, *self.reference]


def on_device(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers of the host as a tensor, without waiting for the device."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def not_finite(kept: Tensors) -> Tensor:
    """Bool ``[R]``: whether a row of any tensor holds a number that is not finite."""
    sound = [t.isfinite().flatten(1).all(1) for t in kept.values()]
    return ~(sound[0] if len(sound) == 1 else torch.stack(sound).all(0))


def _pushed(held: list[Tensor], new: Tensor, index: Tensor | None, rows: int, depth: int) -> list[Tensor]:
    """The last values with a new one before them, ``depth`` at most; those of other rows than ``index`` stay where they are."""
    if index is None:
        return [new, *held][:depth]
    if len(held) < depth:
        held = [*held, new.new_zeros(rows, *new.shape[1:])]
    newer = [new, *(t[index] for t in held[:-1])]
    # Never in place: what is remembered may be shared with the state or with another point's memory.
    return [old.index_copy(0, index, t) for old, t in zip(held, newer, strict=True)]


def _placed(old: Tensor | None, new: Tensor, index: Tensor | None, rows: int) -> Tensor:
    if index is None:
        return new
    return (old if old is not None else new.new_zeros(rows, *new.shape[1:])).index_copy(0, index, new)


@dataclass
class Branch:
    """Of one guidance branch.

    Attributes:
        memories: one per point.
        step: int64 ``[B]`` of every row.
        visited: the step it was last called at.
        form: of its calls.
        keys: of every row.
    """

    memories: list[Memory]
    step: Host
    visited: int
    form: Any = None
    keys: list[int] = field(default_factory=list)


class Trajectory:
    """Everything a denoiser remembers. Also finds out which call this is: a branch of the same step, the next step, or a new trajectory.

    Rows are new where their noise level rises again. All of them are where the number of rows, their shape or dtype changes. Calls at the
    same timesteps are guidance branches in the order in which they come, each with memories and a form (the length of its text) of its own.
    A branch that missed a step starts anew. In one call with both guidance branches every row has its own memory anyway. Samplers that call
    the model twice at a timestep (Heun) are two branches too.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.branches: dict[int, Branch] = {}
        self.times: list[float] = []
        self.log_snr: list[float] = []
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
        again = times == self.times
        if self.branches and (len(self.times) != rows or (not again and self.branches[0].form != form)):
            self.reset()
            why = "shape"
        if again and self.branch + 1 < MAX_BRANCHES:
            self.branch += 1
        elif again:
            self.reset()
            self.step = 0
        else:
            anew = np.flatnonzero(np.less(log_snr, self.log_snr)) if self.times else np.empty(0, dtype=np.int64)
            if anew.size == rows:
                self.reset()
            elif anew.size:
                for branch in self.branches.values():
                    for memory in branch.memories:
                        memory.forget(anew)
                    branch.step[anew] = -1
            self.branch = 0
            self.step += 1
        self.times, self.log_snr = times, log_snr
        found = self.branches.get(self.branch)
        if found is None or found.visited != self.step - 1 or found.form != form:
            why = why or ("first" if found is None else "shape" if found.form != form else "gap")
            found = self.branches[self.branch] = Branch([Memory(rows, d) for d in depths], np.full(rows, -1), self.step, form)
        found.visited = self.step
        found.step += 1
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
