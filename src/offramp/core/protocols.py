"""The contracts between parts. The docstrings are the contract; conformance tests hold every part to them."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from offramp.core.types import BackboneSpec, Readout, RuleState


class State(Protocol):
    """A model stopped between two segments. Opaque to engines but for these fields."""

    @property
    def rows(self) -> int:
        """Items in this state."""
        ...

    @property
    def at(self) -> int:
        """Segments that have run."""
        ...

    @property
    def hidden(self) -> Tensor:
        """What an exit reads here, rows first."""
        ...


class Backbone(Protocol):
    """Resumable execution: ``end(run(begin(x), 0, K))`` equals the model, bit for bit in float32 eager mode."""

    @property
    def spec(self) -> BackboneSpec: ...

    def begin(self, *args: Any, **kwargs: Any) -> Any:
        """Bind inputs. Returns the state before the first segment."""
        ...

    def run(self, state: Any, start: int, stop: int) -> Any:
        """Run segments ``start`` to ``stop - 1`` on a state at ``start``."""
        ...

    def end(self, state: Any) -> Any:
        """Outputs of the model, in the structure the user's forward returns, from a state after the last segment."""
        ...

    def take(self, state: Any, rows: Tensor) -> Any:
        """The state of the given rows (int64 indices, repeats allowed), in that order."""
        ...


@runtime_checkable
class HeadSpec(Protocol):
    """A head as data: ``build`` makes the module once the shape of the state is known from the cut."""

    def build(self, hidden_shape: tuple[int, ...], num_outputs: int) -> Head:
        """Make the head for a state of ``hidden_shape`` (without the batch)."""
        ...


class Head(nn.Module):
    """Reads one state. ``forward(hidden, previous) -> logits``.

    Attributes:
        needs_previous: whether ``forward`` reads the logits of all earlier exits. Engines then carry them, compacted with
            the batch, and never skip an earlier exit.
    """

    needs_previous: bool = False

    def forward(self, hidden: Tensor, previous: tuple[Tensor, ...] = ()) -> Tensor:
        """Logits ``[B, C]`` from ``hidden`` ``[B, ...]`` and the earlier exits' logits, each ``[B, C]``."""
        raise NotImplementedError


@runtime_checkable
class Rule(Protocol):
    """A score per (exit, item), higher = readier to leave. An item leaves at the first exit with ``score >= threshold``.

    ``begin`` and ``score`` run on the device without a host synchronisation and depend on each row alone.
    """

    @property
    def stateful(self) -> bool:
        """Whether the score at an exit depends on earlier exits. No exit before it may then be skipped."""
        ...

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Range of the score when it is known beforehand, independent of data; else ``None``."""
        ...

    @property
    def needs_hidden(self) -> bool:
        """Whether the score reads the hidden state and not only logits; a trace must then record the scores."""
        ...

    def begin(self, rows: int, device: torch.device) -> RuleState:
        """State before the first exit."""
        ...

    def score(self, exit_index: int, readout: Readout, state: RuleState) -> tuple[Tensor, RuleState]:
        """Score ``[B]`` (float32) of each row at exit ``exit_index`` (0-based), and the next state."""
        ...
