"""Averages of weights over training, as diffusion models are sampled with: a general option of any run of `fit`, by its optimizer.

    average = Averaged(lambda parameters: torch.optim.AdamW(parameters, 3e-4), decay=0.999)
    fit(net, loader, optimizer=average, ...)
    with average.weights():
        net.save(...)

The averages are kept in the optimizer's state, so that checkpoints hold them and a resumed run goes on with them exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from offramp.core.errors import InvalidInput

_KEY, _COUNT = "weight_average", "weight_average_steps"


class Averaged:
    """An optimizer factory for `fit` whose optimizers also average the weights they train, exponentially.

    After step ``n`` (from 1) an average moves towards the weight by ``1 - min(decay, n / (n + 9))``: the bound lets short runs forget their
    beginning. Weights that get no gradient stay out of it until they get one. Where a recipe has several phases, each has an optimizer of
    its own, and the averages are those of the last.

    Args:
        optimizer: ``parameters -> optimizer``.
        decay: in [0, 1).
    """

    def __init__(self, optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer], decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise InvalidInput(f"decay must be in [0, 1), got {decay}.")
        self.make, self.decay = optimizer, decay
        self.made: torch.optim.Optimizer | None = None

    def __call__(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        self.made = self.make(parameters)
        self.made.register_step_post_hook(self._follow)
        return self.made

    @torch.no_grad()
    def _follow(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        groups: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
        for p in self._stepped(optimizer):
            state = optimizer.state[p]
            count = state[_COUNT] = int(state.get(_COUNT, 0)) + 1
            if _KEY not in state:
                state[_KEY] = p.detach().clone()
            averages, weights = groups.setdefault(count, ([], []))
            averages.append(state[_KEY])
            weights.append(p.detach())
        for count, (averages, weights) in groups.items():
            torch._foreach_lerp_(averages, weights, 1 - min(self.decay, count / (count + 9)))

    @staticmethod
    def _stepped(optimizer: torch.optim.Optimizer) -> list[Tensor]:
        """Parameters with a gradient in this step; a state begun before the optimizer's own would keep it from beginning its own."""
        return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]

    @property
    def steps(self) -> int:
        """Most steps that any weight was averaged over."""
        states = [] if self.made is None else list(self.made.state.values())
        return max((int(s[_COUNT]) for s in states if _COUNT in s), default=0)

    @torch.no_grad()
    def apply(self) -> None:
        """Put the averages in place of the weights, for good.

        Raises:
            InvalidInput: nothing was trained with this yet.
        """
        for p, average in self._pairs():
            p.copy_(average)

    @contextmanager
    def weights(self) -> Iterator[None]:
        """Within, the weights are their averages.

        Raises:
            InvalidInput: nothing was trained with this yet.
        """
        kept = [(p, p.detach().clone()) for p, _ in self._pairs()]
        self.apply()
        try:
            yield
        finally:
            with torch.no_grad():
                for p, weight in kept:
                    p.copy_(weight)

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        pairs = [] if self.made is None else [(p, s[_KEY]) for p, s in self.made.state.items() if _KEY in s]
        if not pairs:
            raise InvalidInput("There are no averages yet: pass this as fit(..., optimizer=...) and train at least one step.")
        return pairs


__all__ = ["Averaged"]
