"""A stand-in for CUDA graphs on the CPU that has their hazards.

What is captured is a list of operators on fixed tensors: Python does not run again at a replay, results land where they lay at the capture,
and whatever graphs left in the memory that they share is spoilt when another one replays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

_REFUSED = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "lift_fresh")
"""What waits for the device or copies from memory of the host that a replay would not find again."""


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        given = _tensors((args, kwargs))
        if name in _REFUSED or any(t.is_inference() for t in given):
            raise RuntimeError(f"{name} cannot be captured, or reads a tensor made in inference mode.")
        result = func(*args, **(kwargs or {}))
        places = {t.untyped_storage().data_ptr() for t in given}
        made = [t for t in _tensors(result) if t.untyped_storage().data_ptr() not in places]
        if made or func._schema.is_mutable:
            # A graph knows addresses and not who holds them: what a parameter is later moved to it does not see.
            args, kwargs = tree_map(lambda v: v.detach() if isinstance(v, Tensor) else v, (args, kwargs or {}))
            self.calls.append((func, args, kwargs, made))
        return result


class Tape:
    """Takes the place of `offramp.engines.capture.Graph`."""

    everything: ClassVar[list[Tape]] = []

    def __init__(self, function: Callable[[], object], device: torch.device, pool: Any) -> None:
        for _ in range(2):  # warm up, as on CUDA
            function()
        with _Recording() as recording:
            function()
        self.calls = recording.calls
        Tape.everything.append(self)
        self.spoil()  # a capture runs nothing

    def replay(self) -> None:
        for tape in Tape.everything:
            tape.spoil()
        with torch.no_grad():
            for func, args, kwargs, made in self.calls:
                found = func(*args, **kwargs)
                for place, new in zip(made, _tensors(found), strict=bool(made)):
                    place.copy_(new)

    def milliseconds(self) -> float | None:
        self.replay()
        return None

    def spoil(self) -> None:
        for *_, made in self.calls:
            for tensor in made:
                tensor.fill_(float("nan") if tensor.is_floating_point() else 1)
