"""Running the parts of a denoiser: the one place where compiled or captured ones go.

Shapes: ``B`` rows of a call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from offramp.backbones import Cut, CutState
from offramp.core.noise import noise_share
from offramp.diffusion import BoundPoint
from offramp.engines.diffusion.rows import EagerRows, Rows
from offramp.engines.diffusion.straight import Work, weigh
from offramp.engines.diffusion.trajectory import Memory, on_device


class Runner(Protocol):
    """Runs the parts of a denoiser."""

    def forget(self) -> None:
        """Weights have moved in memory: give up what holds their addresses."""
        ...

    def rows(
        self, cut: Cut, points: Sequence[BoundPoint], values: Mapping[str, Tensor], sample: Tensor, level: Sequence[float], owner: Any
    ) -> Rows:
        """What is done to some rows of one call.

        Args:
            cut: the model.
            points: the plan on it.
            values: at the first boundary, by name.
            sample: the noisy input ``[B, ...]``.
            level: log-SNR of every row.
            owner: whose memories will be given: a denoiser and a branch.
        """
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
    """Everything as it was exported."""

    def forget(self) -> None:
        pass

    def rows(
        self, cut: Cut, points: Sequence[BoundPoint], values: Mapping[str, Tensor], sample: Tensor, level: Sequence[float], owner: Any
    ) -> Rows:
        return EagerRows(cut, values, sample, level)

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
        for i in work.path.stored:
            own = work.points[i].stop == last  # the caller may write into what it is given
            new = {n: t.clone() if own else t for n, t in kept.get(i, {}).items()}
            memories[i].put(None, new, (), check=False)
            memories[i].note(slice(None), noise_share(log_snr))
        reused = any(work.points[i].stop == last for i in work.path.fired)
        return {n: t.clone() if reused else t for n, t in outputs.items()}
