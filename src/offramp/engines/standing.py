"""Where the weights of modules stand: what a captured graph depends on besides their values."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

from torch import nn


def standing(*modules: nn.Module) -> Iterator[object]:
    """Which modules there are inside some, their hooks, where their weights are and of what type; equal where a graph still holds.

    Buffers that are not saved are left out: some models write them anew in every pass.
    """
    waiting: list[nn.Module | None] = list(modules)
    while waiting:
        module = waiting.pop()
        if module is None:
            continue
        yield weakref.ref(module)  # equal while the module lives, and never to one that took its address
        yield (*module._forward_pre_hooks, *module._forward_hooks)  # numbers that are not given twice
        unsaved = module._non_persistent_buffers_set
        buffers = (b for name, b in module._buffers.items() if name not in unsaved)
        for tensor in (*module._parameters.values(), *buffers):
            if tensor is not None:
                yield place(tensor), tensor.dtype, tensor.shape
        waiting += module._modules.values()


def place(tensor: Any) -> object:
    """Where a tensor's values are; of one that consists of others, such as a quantised one, where those of each are."""
    if hasattr(tensor, "__tensor_flatten__"):
        return tuple(place(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.data_ptr()


__all__ = ["place", "standing"]
