"""Region-adaptive sampling compiled, and on CUDA captured as graphs: one for every number of rows and of tokens that are computed.

A graph is a whole step: the choice of tokens, the model over what is kept of the others, and all that the next step is decided by. What
a trajectory remembers lies in a *room*, memory at fixed addresses that belongs to one guidance branch of one denoiser as long as its
trajectory lasts and then to the next that asks. Nothing has to be cleared in between: a trajectory begins with a step of all tokens, which
overwrites all of it. Rows that compute another number of tokens than their batch mates are brought to a room of the next power of two
rows, run there, and are brought back.

How many tokens are computed is a number of the host, and each number is a graph of its own: a ratio that changes with the noise level has
as many as `Regions.multiple` leaves it.

On the CPU a "graph" is a plain call: that is how this is tested.

Shapes: ``B`` rows of a call, ``R`` of them at hand.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from offramp.backbones.image_tokens import ImageTokens, TokenStore
from offramp.core.errors import InvalidInput
from offramp.core.modes import evaluating
from offramp.diffusion import Call
from offramp.engines.capture import Graph, Tuning
from offramp.engines.diffusion.graphs import Captured
from offramp.engines.diffusion.region_step import EagerRegions, RegionMemory, RegionRunner, TokenState, TokenStep
from offramp.engines.diffusion.run import Runner


class _Room:
    """Inputs and memory of some rows at fixed addresses.

    Attributes:
        rows: how many.
        leaves: the inputs one by one; those that hold a row each are of ``rows`` rows.
        inputs: the same by name.
        state: the memory.
        tenant: whose it is.
    """

    def __init__(self, step: TokenStep, call: Call, rows: int) -> None:
        leaves, structure = tree_flatten(call.kwargs)
        self.rows = rows
        self.leaves = [
            v.new_zeros(rows, *v.shape[1:]) if _has_rows(v, call.rows) else v.clone() if isinstance(v, Tensor) else v for v in leaves
        ]
        self.inputs: dict[str, Any] = tree_unflatten(self.leaves, structure)
        device = next(v for v in leaves if isinstance(v, Tensor)).device
        tokens = step.grid[0] * step.grid[1]

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(rows, *shape, dtype=dtype, device=device)

        store = TokenStore([zeros(tokens, width, dtype=dtype) for width, dtype in step.kept])
        waited = zeros(tokens, dtype=torch.int32)
        self.state = TokenState(store, zeros(tokens, dtype=torch.float32), waited, zeros(dtype=torch.bool))
        self.tenant: weakref.ref[RegionMemory] | None = None

    @property
    def free(self) -> bool:
        """Whether nobody's trajectory is remembered here."""
        return self.tenant is None or self.tenant() is None

    def give(self, call: Call, index: Tensor | None) -> None:
        """Copy a call's inputs in: of all rows, or of those of ``index`` to the first places."""
        given = tree_flatten(call.kwargs)[0]
        for place, value in zip(self.leaves, given, strict=True):
            if not isinstance(value, Tensor):
                continue
            if index is None or not _has_rows(value, call.rows):
                place.copy_(value)
            else:
                place[: len(index)].copy_(value.index_select(0, index))


@dataclass
class _Entry:
    """A captured step.

    Attributes:
        output: what the model returned, where the graph leaves it.
    """

    graph: Graph | None = None
    output: Any = None


@dataclass
class CapturedRegions(RegionRunner):
    """Runs steps as captured graphs.

    One that is shared by several denoisers of one model shares what it compiled and captured; then they must not run at the same time. What
    is loaded into the model while a trajectory is under way is seen at its next step of all tokens.

    Args:
        device: where the denoiser is.
        compiled: run through ``torch.compile``, for each number of rows and tokens by itself.
        most: graphs that are kept; of more, the oldest are given up.

    Raises:
        InvalidInput: ``most`` is below 1.
    """

    device: torch.device
    compiled: bool | Tuning = True
    most: int = 64
    _rooms: dict[Any, list[_Room]] = field(default_factory=dict, repr=False)
    _entries: dict[Any, _Entry] = field(default_factory=dict, repr=False)
    _functions: dict[Any, Any] = field(default_factory=dict, repr=False)
    _views: dict[nn.Module, ImageTokens] = field(default_factory=dict, repr=False)
    _seen: dict[nn.Module, tuple[Any, int, int]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.device = torch.device(self.device)
        if self.most < 1:
            raise InvalidInput(f"most must leave one graph at least, got {self.most}.")
        self._graphs = Captured(self.device, self.compiled)

    def __deepcopy__(self, memo: dict[int, Any]) -> CapturedRegions:
        return CapturedRegions(self.device, self.compiled, self.most)  # graphs are of one model's memory

    def __call__(self, step: TokenStep, call: Call, memory: RegionMemory, index: Tensor | None) -> Any:
        self._check(call)
        step = self._known(step)
        if index is None:
            room = self._home(step, call, memory)
            room.give(call, None)
            return tree_map(_copied, self._run(step, call, room))
        count = len(index)
        size = min(1 << (count - 1).bit_length(), call.rows)
        room = self._free(step, call, size)
        room.give(call, index)
        if step.k is not None:
            room.state.first(count).copy_(memory.held.take(index))
        output = self._run(step, call, room)
        memory.held.put(index, room.state.first(count))
        # What the rows beyond them hold was computed along and is read by nobody.
        return tree_map(lambda t: t[:count].clone() if _has_rows(t, size) else _copied(t), output)

    def _check(self, call: Call) -> None:
        found = next(v for v in tree_flatten(call.kwargs)[0] if isinstance(v, Tensor)).device
        if found.type != self.device.type or self.device.index not in (None, found.index):
            raise InvalidInput(
                f"The denoiser was called on {found}, and its captured runner is for {self.device}: make it with "
                f"CapturedRegions(torch.device({str(found)!r}))."
            )

    def _known(self, step: TokenStep) -> TokenStep:
        """The step on the view of its model that graphs were made of; they are given up if the model is no longer what it was."""
        model = step.tokens.model
        view = self._views.setdefault(model, step.tokens)
        if step.k is None:
            view.refresh()
        if model not in self._seen:
            self._seen[model] = next(model.parameters(), None), -1, -1
        first, place, version = self._seen[model]
        # Weights move to another device and back, or with an adapter: graphs read the old ones.
        now = 0 if first is None else first.data_ptr(), view.version
        if now != (place, version):
            self._seen[model] = first, *now
            kept: dict[Any, Any]
            for kept in (self._rooms, self._entries, self._functions):
                for key in [k for k in kept if k[0] is model]:
                    del kept[key]
        return replace(step, tokens=view)

    def _home(self, step: TokenStep, call: Call, memory: RegionMemory) -> _Room:
        """The room of a trajectory that is under way, or of one that begins; its memory lies there from now on."""
        rooms = self._rooms.get((step.tokens.model, call.key, call.rows), [])
        room = next((r for r in rooms if r.tenant is not None and r.tenant() is memory), None)
        if room is None:
            room = self._free(step, call, call.rows)
            room.tenant = weakref.ref(memory)
        if memory.state is not None and memory.state is not room.state:  # it was made elsewhere
            room.state.copy_(memory.state)
        memory.state = room.state
        return room

    def _free(self, step: TokenStep, call: Call, rows: int) -> _Room:
        rooms = self._rooms.setdefault((step.tokens.model, call.key, rows), [])
        room = next((r for r in rooms if r.free), None)
        if room is None:
            room = _Room(step, call, rows)
            rooms.append(room)
        return room

    def _run(self, step: TokenStep, call: Call, room: _Room) -> Any:
        """Replay a step in a room. What it returns lies in memory that graphs share: copy it before another one runs."""
        work = (step.tokens.model, call.key, step.k, step.grid, step.channels, _choice(step))
        entry = self._entries.get((*work, room))
        if entry is None:
            while len(self._entries) >= self.most:
                self._give_up(next(iter(self._entries)), room)
            entry = self._entries[*work, room] = self._capture(step, work, room)
        if entry.graph is not None:
            entry.graph.replay()
        return entry.output

    def _give_up(self, key: Any, used: _Room) -> None:
        """Drop a graph, and its room if that was the last one in it and nobody is there."""
        del self._entries[key]
        room: _Room = key[-1]
        if room is not used and room.free and not any(k[-1] is room for k in self._entries):
            for rooms in self._rooms.values():
                rooms[:] = [r for r in rooms if r is not room]

    def _capture(self, step: TokenStep, work: Any, room: _Room) -> _Entry:
        function = self._functions.get(work)
        if function is None:
            function = self._functions[work] = self._graphs.recorder.wrap(_function(step))
        entry, state = _Entry(), room.state

        def call() -> None:
            entry.output = function(room.inputs, state.store.kept, state.focus, state.waited, state.broken)

        before = None if step.k is None else state.clone()
        model = step.tokens.model
        with evaluating(model) if model.training else contextlib.nullcontext():  # here, so that no compiler sees the flags change
            entry.graph = self._graphs.capture(call)
        if before is not None:  # capturing has run it
            state.copy_(before)
        return entry


def region_runner(run: RegionRunner | Runner | None) -> RegionRunner:
    """What runs the steps: as given, as graphs for a `Captured`, eagerly for nothing.

    Raises:
        InvalidInput: it is none of these.
    """
    if run is None:
        return EagerRegions()
    if isinstance(run, Captured):
        return CapturedRegions(run.device, run.compiled)
    if not isinstance(run, RegionRunner):
        raise InvalidInput(
            f"Steps of some tokens are run by a CapturedRegions (or a Captured, for its device), or eagerly without run; got {run!r}."
        )
    return run


def _function(step: TokenStep) -> Any:
    """A step as a function of inputs and memory, which it brings up to date in place."""

    def run(inputs: dict[str, Any], kept: Sequence[Tensor], focus: Tensor, waited: Tensor, broken: Tensor) -> Any:
        state = TokenState(TokenStore(list(kept)), focus, waited, broken)
        if step.k is not None:
            return step.some(inputs, state)
        output, made = step.dense(inputs)
        state.copy_(made)
        return output

    return run


def _choice(step: TokenStep) -> tuple[Any, ...]:
    """What a graph holds of the rule; which steps are dense, and how many tokens the others compute, is the host's to say."""
    rule = step.regions
    if rule.measure.__hash__ is None:
        raise InvalidInput(f"{rule.measure!r} has no hash to know its graphs by: make its class a frozen dataclass.")
    return rule.measure, rule.low, rule.staleness, rule.direction


def _has_rows(value: Any, rows: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == rows


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
