"""Capturing calls as CUDA graphs, and sending and reading numbers without a synchronisation.

On the CPU a "graph" is a plain call and a mailbox is filled at once: that is how what is built on them is tested.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


@dataclass(frozen=True)
class Tuning:
    """What may be tried beyond the compiler's defaults, for the pieces that are given it alone: its global settings stay as they are.

    Each costs compile time; what each gains depends on the model and the machine, so measure.

    Attributes:
        coordinate_descent: search sizes of each generated kernel one at a time. A product with one row, which is what decoding at batch 1
            consists of, is then generated code too instead of a library call.
        max_autotune: time several implementations of every matrix product and keep the fastest: for the few rows of a verification.
        combo_kernels: launch independent small kernels as one.
        joined_projections: make query, key and value by one product, and gate and up by another, in engines that decode: the model's
            weights become views of larger tensors, values unchanged (`offramp.backbones.decoder.Decoder.joined`).
        shared_blocks: compile a few blocks of a decoder once for all that are like them, instead of the whole model: a fraction of the
            compile time, for what the compiler would have joined across their borders.
    """

    coordinate_descent: bool = False
    max_autotune: bool = False
    combo_kernels: bool = False
    joined_projections: bool = False
    shared_blocks: bool = False

    def options(self) -> dict[str, Any]:
        """Names and values as ``torch.compile(options=...)`` takes them."""
        asked = {
            "coordinate_descent_tuning": self.coordinate_descent,
            "max_autotune": self.max_autotune,
            "combo_kernels": self.combo_kernels,
        }
        return {name: True for name, wanted in asked.items() if wanted}


class Graph:
    """A captured call: ``replay()`` runs it again on the same memory."""

    def __init__(self, function: Callable[[], object], device: torch.device, pool: Any) -> None:
        self._function = function
        self._graph: torch.cuda.CUDAGraph | None = None
        if device.type != "cuda":
            function()  # as below: what is captured has run before, so its effects must not matter
            return
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # compile and warm up outside the capture
                function()
        torch.cuda.current_stream(device).wait_stream(stream)
        torch.cuda.synchronize(device)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            function()

    def replay(self) -> None:
        if self._graph is None:
            self._function()
        else:
            self._graph.replay()

    def milliseconds(self) -> float | None:
        """What a replay takes on the device, the faster of two; not known on the CPU. Waits for the device."""
        if self._graph is None:
            return None
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        marks[0].record()
        for mark in marks[1:]:
            self._graph.replay()
            mark.record()
        marks[-1].synchronize()
        return min(before.elapsed_time(after) for before, after in pairwise(marks))


class Recorder:
    """Makes graphs on one device that share one memory pool.

    Args:
        device: where they run.
        compiled: run what is captured through ``torch.compile``, for each size by itself: code for any size is a seventh slower. A
            `Tuning` says what the compiler may try beyond its defaults.
    """

    def __init__(self, device: torch.device, compiled: bool | Tuning) -> None:
        self.device = device
        self.compiled = bool(compiled)
        self.tuning = compiled if isinstance(compiled, Tuning) else Tuning()
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def wrap(self, function: Callable[..., Any], dynamic: bool = False) -> Callable[..., Any]:
        return torch.compile(function, dynamic=dynamic, options=self.tuning.options() or None) if self.compiled else function

    def graph(self, function: Callable[[], object]) -> Graph:
        # All stages and sizes share one code object, and the compiler limits the versions of it.
        limits: dict[str, Any] = {"recompile_limit": 1024, "accumulated_recompile_limit": 4096}
        with torch._dynamo.config.patch(limits) if self.compiled else contextlib.nullcontext():
            return Graph(function, self.device, self.pool)


class Beside:
    """A stream of its own for what others wait for, also while a graph is captured: then its kernels run beside theirs.

    All that was started must be waited for, and what it makes be held until then.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, functions: Sequence[Callable[[], Any]]) -> Sequence[Callable[[], Any]]:
        """Run these one after another; each answer waits for the result of its own."""
        if self._stream is None:
            return functions
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        waits = []
        with torch.cuda.stream(self._stream):
            for function in functions:
                found, done = function(), torch.cuda.Event()
                done.record(self._stream)
                waits.append(partial(self._wait, found, done))
        return waits

    def _wait(self, found: Any, done: torch.cuda.Event) -> Any:
        torch.cuda.current_stream(self._device).wait_event(done)
        return found


class Arriving:
    """Numbers on their way to the host: whoever reads them waits for what made them, and not for what was launched since.

    Args:
        values: of any shape; may be written over once this returns.
    """

    def __init__(self, values: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        if values.device.type != "cuda":
            self._values = values.clone()
            return
        self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        self._values.copy_(values, non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record(torch.cuda.current_stream(values.device))

    def read(self) -> npt.NDArray[Any]:
        """They."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values.numpy()


class Outbox:
    """Integers that the host sends to a device, each time from another place of pinned memory.

    A host that only launches runs far ahead of the device, so half of the places are waited for before any of them is written again.

    Args:
        width: most integers of one sending.
        device: where to.
        places: how many, even.
    """

    def __init__(self, width: int, device: torch.device, places: int = 64) -> None:
        self._device, self._cuda = device, device.type == "cuda"
        held = torch.empty(places, width, dtype=torch.int64, pin_memory=self._cuda)
        self._places, self._views = list(held), list(held.numpy())
        self._half, self._next = places // 2, 0
        self._sent: list[torch.cuda.Event | None] = [None, None]
        self._stream: torch.cuda.Stream | None = None

    def begin(self) -> None:
        """What is sent from now on is sent on the current stream."""
        if self._cuda and self._stream != (stream := torch.cuda.current_stream(self._device)):
            if self._stream is not None:
                self._stream.synchronize()
            self._stream = stream

    def send(self, values: npt.NDArray[np.int64], to: Tensor) -> None:
        """Write them to a tensor ``[n]`` of the device (int64), the last one repeated where ``n`` is larger, without waiting for it."""
        place, count = self._next, len(to)
        if place % self._half == 0 and (mark := self._sent[place // self._half]) is not None:
            mark.synchronize()
        view = self._views[place]
        view[: len(values)], view[len(values) : count] = values, values[-1]
        to.copy_(self._places[place][:count], non_blocking=True)
        self._next = (place + 1) % len(self._places)
        if self._cuda and self._next % self._half == 0:
            self._sent[place // self._half] = mark = torch.cuda.Event()
            mark.record(self._stream)


class Mailbox:
    """Integers that the device writes and the host waits for, without a synchronisation.

    The host marks the box empty, launches work that ends in `post`, and spins in `wait` on pinned memory.

    Attributes:
        waits: how often the host has waited for the device here.
    """

    EMPTY = -1

    def __init__(self, size: int, device: torch.device) -> None:
        self._device, self._cuda = device, device.type == "cuda"
        host = torch.full((size,), self.EMPTY, dtype=torch.int64)
        self._host = host.pin_memory() if self._cuda else host
        self._view = self._host.numpy()
        self.waits = 0

    def clear(self) -> None:
        self._view.fill(self.EMPTY)

    def post(self, values: Tensor) -> None:
        """Copy device values ``[size]``, none negative, to the host; part of a graph."""
        self._host.copy_(values, non_blocking=True)

    @property
    def ready(self) -> bool:
        """Whether all values have arrived."""
        return bool(self._view[-1] >= 0 and self._view.min() >= 0)

    def at_least(self, first: int) -> list[int]:
        """Spin until the first value, a counter that only rises, has reached ``first``. Returns all; the others may be newer."""
        self.waits += 1
        while self._view[0] < first:
            pass
        values: list[int] = self._view.tolist()
        return values

    def wait(self) -> list[int]:
        """Spin until all values have arrived."""
        self.waits += 1
        while not self.ready:
            pass
        values: list[int] = self._view.tolist()
        return values

    def arrived(self) -> npt.NDArray[np.int64]:
        """All values, as soon as they are there; other threads of the host may go on meanwhile.

        Raises:
            RuntimeError: they will not come: the device has failed, or nothing that it was given posts them.
        """
        self.waits += 1
        polls = 0
        while not self.ready:
            time.sleep(0)
            polls += 1
            idle = not self._cuda or (polls % 4096 == 0 and torch.cuda.current_stream(self._device).query())  # raises what went wrong
            if idle and not self.ready:
                raise RuntimeError("The device has done all it was given and has not answered; this is a defect of the engine.")
        return self._view.copy()
