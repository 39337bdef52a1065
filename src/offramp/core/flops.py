"""Counted FLOPs of any callable: matrix products, convolutions and attention; one multiply-add = 2 FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def _cpu_attention_flops(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """Two products per head: queries with keys, weights with values. The CPU kernel is missing from torch's own table."""
    *batch, length, width = query
    heads = 1
    for size in batch:
        heads *= int(size)
    return 2 * heads * int(length) * int(key[-2]) * (int(width) + int(value[-1]))


def _mapping() -> dict[Any, Any]:
    operator = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
    return {} if operator is None else {operator: _cpu_attention_flops}


def counter() -> FlopCounterMode:
    """A counting context manager; read ``get_total_flops()`` after or inside it."""
    return FlopCounterMode(display=False, custom_mapping=_mapping())


def count_flops(function: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """FLOPs executed by one call, without gradients."""
    with torch.no_grad(), counter() as counted:
        function(*args, **kwargs)
    return int(counted.get_total_flops())
