"""States read as maps: channels first, channels last, or tokens put back on their grid."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.core.errors import InvalidInput
from offramp.core.pooling import channel_dim

PREFIXES = (0, 1, 2, 4, 5)
"""Tokens before the patches in vision transformers: none, class, class and distillation, registers, class and registers."""
REGISTERS_ONLY = 4
"""The one of them without a class token."""


@dataclass(frozen=True)
class Grid:
    """How a state is read as a map ``[B, C, H, W]``.

    Attributes:
        channels: C.
        height: H.
        width: W.
        prefix: tokens before the grid; the first of them is the class token, but of four, which are registers.
        dim: dimension of the channels in the state: 1, 3, or 2 for tokens.
    """

    channels: int
    height: int
    width: int
    prefix: int
    dim: int

    def to_map(self, hidden: Tensor) -> Tensor:
        """``[B, C, H, W]``, prefix tokens left out."""
        if self.dim == 2:
            return torch.unflatten(hidden[:, self.prefix :].transpose(1, 2), 2, (self.height, self.width))
        return hidden.permute(0, 3, 1, 2) if self.dim == 3 else hidden

    def add_class_token(self, vector: Tensor, hidden: Tensor) -> Tensor:
        """``vector`` ``[B, C]`` plus the class token, if the state has one."""
        return vector if self.prefix in (0, REGISTERS_ONLY) else vector + hidden[:, 0]


def as_grid(
    shape: tuple[int, ...], reader: str, *, size: tuple[int, int] | None = None, channels_last: bool | None = None, square: bool = True
) -> Grid:
    """Read a state's shape as a grid.

    Args:
        shape: of the state without the batch.
        reader: who asks, for the error.
        size: height and width of the tokens' grid when it is not square; else read from the number of tokens.
        channels_last: where a map has its channels, when its sizes do not tell.
        square: whether tokens must lie on a two-dimensional grid; otherwise tokens that do not are one column.

    Raises:
        InvalidInput: a vector, a video, a varying length, or tokens that fit no square grid.
    """
    if len(shape) == 3 and -1 not in shape:
        dim = channel_dim(shape, channels_last)
        channels, height, width = shape if dim == 1 else (shape[2], shape[0], shape[1])
        return Grid(channels, height, width, 0, dim)
    if len(shape) != 2:
        raise InvalidInput(f"{reader} reads a map or tokens of fixed size; this state is {shape} per item. Use PooledLinear() or MLP().")
    tokens, channels = shape
    if tokens == -1:
        raise InvalidInput(
            f"{reader} reads every token, and the number of tokens of this state varies, so padding would change the answer. "
            "Use PooledLinear(TokenPool()), MLP(pool=TokenPool()) or Pooler(), which read one token."
        )
    if size is not None:
        prefix = tokens - size[0] * size[1]
        if prefix < 0:
            raise InvalidInput(
                f"A grid of {size[0]} x {size[1]} needs {size[0] * size[1]} tokens; this state has {tokens}. Correct `size`."
            )
        return Grid(channels, *size, prefix, 2)
    for prefix in PREFIXES:
        side = math.isqrt(max(tokens - prefix, 0))
        if side and side * side == tokens - prefix:
            return Grid(channels, side, side, prefix, 2)
    if square:
        raise InvalidInput(
            f"{reader} puts tokens back on a square grid, which {tokens} tokens (with {', '.join(map(str, PREFIXES))} before the grid) "
            "do not fill. Pass size=(height, width), or use PooledLinear() or MLP()."
        )
    return Grid(channels, tokens, 1, 0, 2)


__all__ = ["PREFIXES", "Grid", "as_grid"]
