"""Running the parts of a denoiser: the one place where compiled or captured ones go.

Shapes: ``B`` rows of a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from offramp.backbones import Cut, CutState
from offramp.core.noise import noise_share
from offramp.engines.diffusion.straight import Work, weigh
from offramp.engines.diffusion.trajectory import Memory, on_device


class Runner(Protocol):
    """Runs segments: the one place where compiled or captured ones go.

    Attributes:
        reuses: whether the tensors it returns are written over by its next call, so that what outlives this call must be copied.
    """

    @property
    def reuses(self) -> bool: ...

    def forget(self) -> None:
        """Weights have moved in memory: give up what holds their addresses."""
        ...

    def __call__(self, cut: Cut, state: CutState, stop: int) -> CutState:
        """The state at boundary ``stop``. No decision falls between."""
        ...

    def step(self, work: Work, state: CutState, memories: Sequence[Memory], log_snr: float, owner: Any) -> dict[str, Tensor]:
        """A whole step that is the same for every row; memories are brought up to date.

        Args:
            work: what to do.
            state: at the first boundary.
            memories: one per point.
            log_snr: noise level of all rows.
            owner: whose memories they are: a denoiser and a branch.

        Returns:
            The outputs by name, the caller's to keep.
        """
        ...


class Eager:
    """Segments as they were exported."""

    reuses = False

    def forget(self) -> None:
        pass

    def __call__(self, cut: Cut, state: CutState, stop: int) -> CutState:
        return cut.run(state, state.at, stop)

    def step(self, work: Work, state: CutState, memories: Sequence[Memory], log_snr: float, owner: Any) -> dict[str, Tensor]:
        remembered, weights = {}, {}
        device = next(iter(state.values.values())).device
        for i in work.path.fired:
            point, memory = work.points[i], memories[i]
            remembered[i] = memory.snapshots
            if point.point.fill.keeps > 1:
                weights[i] = on_device([weigh(point, memory, log_snr)[: len(memory.snapshots)]], torch.float32, device).expand(
                    work.rows, -1
                )
        level = torch.full((work.rows,), log_snr, device=device)
        outputs, kept = work(state.values, remembered, weights, level)
        last = len(work.cut.segments)
        everyone = range(work.rows)
        for i in work.path.stored:
            own = work.points[i].stop == last  # the caller may write into what it is given
            new = {n: t.clone() if own else t for n, t in kept.get(i, {}).items()}
            memories[i].store(everyone, None, new, (), [noise_share(log_snr)] * work.rows, check=False)
        reused = any(work.points[i].stop == last for i in work.path.fired)
        return {n: t.clone() if reused else t for n, t in outputs.items()}
