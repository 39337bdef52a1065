"""Whole numbers of any width: token ids, class indices and masks come as whatever a tokenizer, a file or a data loader has."""

from __future__ import annotations

import torch
from torch import Tensor


def is_whole(values: Tensor) -> bool:
    """Whether these are whole numbers; booleans are none."""
    return not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool)


def as_whole(values: Tensor, dtype: torch.dtype = torch.int64) -> Tensor | None:
    """The same numbers in an integer type, booleans as 0 and 1; the tensor itself if it is of that type.

    Args:
        values: any tensor.
        dtype: integer type that is wanted.

    Returns:
        ``None`` if they are no whole numbers, or one of them does not fit; that is looked at only where it may be.
    """
    if values.dtype == dtype:
        return values
    if dtype == torch.bool or dtype.is_floating_point or dtype.is_complex or not (is_whole(values) or values.dtype == torch.bool):
        return None
    if values.dtype != torch.bool and values.numel():
        held, wanted = torch.iinfo(values.dtype), torch.iinfo(dtype)
        if held.min < wanted.min or held.max > wanted.max:
            widest = values.to(torch.int64)
            if int(widest.min()) < max(held.min, wanted.min) or int(widest.max()) > wanted.max:
                return None
    return values.to(dtype)


__all__ = ["as_whole", "is_whole"]
