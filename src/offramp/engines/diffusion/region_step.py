"""A step of region-adaptive sampling as a function of tensors, what it remembers, and how it is run.

Which tokens are computed is chosen, run over what is kept of the others and put back among them without a look at any tensor, and how many
there are is a number of the host: so every shape is known beforehand, and a step can be compiled and captured whole
(`offramp.engines.diffusion.region_graphs`).

Shapes: ``B`` rows of a call, ``R`` of them at hand, ``N`` tokens of an image, ``k`` of them that are computed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from offramp.backbones.image_tokens import ImageTokens, TokenStore, prediction, take_rows
from offramp.diffusion import Call
from offramp.engines.capture import Arriving
from offramp.engines.diffusion.trajectory import Memory
from offramp.reduce.regions import Regions


@dataclass
class TokenState:
    """What is known of every token of some rows.

    Attributes:
        store: keys, values and outputs.
        focus: float32 ``[R, N]``, logarithm of every token's measure in the last output.
        waited: int32 ``[R, N]``, steps since each token was last computed.
        broken: bool ``[R]``, whether the last output holds a number that is not finite.
    """

    store: TokenStore
    focus: Tensor
    waited: Tensor
    broken: Tensor

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.store.kept, self.focus, self.waited, self.broken]

    def take(self, rows: Tensor) -> TokenState:
        """A copy of some rows (int64)."""
        return TokenState(self.store.take(rows), *(t.index_select(0, rows) for t in self.tensors[-3:]))

    def put(self, rows: Tensor, other: TokenState) -> None:
        """Write what another holds into rows of this one, in place."""
        for mine, theirs in zip(self.tensors, other.tensors, strict=True):
            mine.index_copy_(0, rows, theirs)

    def first(self, rows: int) -> TokenState:
        """The first rows, in the same memory."""
        return TokenState(TokenStore([t[:rows] for t in self.store.kept]), *(t[:rows] for t in self.tensors[-3:]))

    def copy_(self, other: TokenState) -> None:
        """Take over what another of the same rows holds, in place."""
        for mine, theirs in zip(self.tensors, other.tensors, strict=True):
            mine.copy_(theirs)

    def clone(self) -> TokenState:
        """The same in other memory."""
        return TokenState(TokenStore([t.clone() for t in self.store.kept]), *(t.clone() for t in self.tensors[-3:]))


@dataclass
class RegionMemory(Memory):
    """Of one guidance branch.

    Attributes:
        state: of all rows; ``None`` before a step was computed.
        level: log-SNR of every row's last step.
        flags: which rows of the last step are broken.
    """

    state: TokenState | None = None
    level: tuple[float, ...] = ()
    flags: Arriving | None = None

    @property
    def held(self) -> TokenState:
        """The state, where there must be one."""
        if self.state is None:
            raise RuntimeError("Rows without a computed step were given tokens to choose from; this is a defect in offramp.")
        return self.state

    @property
    def tensors(self) -> list[Tensor]:
        return [*super().tensors, *(self.state.tensors if self.state is not None else ())]


@dataclass(frozen=True)
class TokenStep:
    """A step of rows that all compute as many tokens.

    Attributes:
        tokens: the model, token by token.
        regions: which tokens.
        grid: ``(h, w)`` of the tokens.
        channels: of the output, those of a learned variance left out.
        kept: width and type of everything that is kept of a token, in the order of `TokenStore.kept`.
        k: how many tokens are computed; ``None`` = all.
    """

    tokens: ImageTokens
    regions: Regions
    grid: tuple[int, int]
    channels: int
    kept: tuple[tuple[int, torch.dtype], ...]
    k: int | None = None

    def dense(self, kwargs: Mapping[str, Any]) -> tuple[Any, TokenState]:
        """What the model returns with every token computed, and the state behind it."""
        store = TokenStore()
        output = self.tokens(store, None, kwargs)
        focus, broken = self._seen(output)
        return output, TokenState(store, focus, torch.zeros_like(focus, dtype=torch.int32), broken)

    def some(self, kwargs: Mapping[str, Any], state: TokenState) -> Any:
        """What the model returns with ``k`` tokens of each row computed; the state is brought up to date in place."""
        active = self.regions.select(state.focus, state.waited, self.k or 0)
        output = self.tokens(state.store, active, kwargs)
        focus, broken = self._seen(output)
        state.waited.add_(1).scatter_(1, active, 0)
        state.focus.copy_(focus)
        state.broken.copy_(broken)
        return output

    def _seen(self, output: Any) -> tuple[Tensor, Tensor]:
        """What the next step is decided by: focus and broken."""
        found = prediction(output)
        return self.regions.focus(found[:, : self.channels], self.grid), ~found.isfinite().flatten(1).all(1)


class RegionRunner(ABC):
    """Runs steps: the one place where compiled or captured ones go."""

    @abstractmethod
    def __call__(self, step: TokenStep, call: Call, memory: RegionMemory, index: Tensor | None) -> Any:
        """What the model returns for some rows of a call, the caller's to keep; their memory is brought up to date.

        Args:
            step: what is computed.
            call: of all rows.
            memory: of all rows.
            index: the rows (int64 ``[R]``) on the call's device; ``None`` = all.
        """


class EagerRegions(RegionRunner):
    """Steps as the model's own forward runs them."""

    def __call__(self, step: TokenStep, call: Call, memory: RegionMemory, index: Tensor | None) -> Any:
        kwargs = call.kwargs if index is None else take_rows(call.kwargs, index, call.rows)
        if step.k is None:
            output, state = step.dense(kwargs)
        else:
            state = memory.held if index is None else memory.held.take(index)
            output = step.some(kwargs, state)
        if index is None:
            memory.state = state
        else:
            memory.held.put(index, state)
        return output
