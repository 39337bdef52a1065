"""Linear head on a pooled state: the cheapest exit and the default."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from offramp.core.errors import InvalidInput
from offramp.core.protocols import Head


@dataclass(frozen=True)
class MeanPool:
    """Mean over everything but the channels. Not for padded sequences: padding would enter the mean."""

    def width(self, shape: tuple[int, ...]) -> int:
        return shape[channel_dim(shape) - 1]

    def __call__(self, hidden: Tensor) -> Tensor:
        channel = channel_dim(tuple(hidden.shape[1:]))
        rest = [d for d in range(1, hidden.ndim) if d != channel]
        return hidden.mean(dim=rest) if rest else hidden


@dataclass(frozen=True)
class TokenPool:
    """One token of ``[B, T, D]``, the class token by default. Does not depend on padding."""

    index: int = 0

    def width(self, shape: tuple[int, ...]) -> int:
        if len(shape) != 2:
            raise InvalidInput(f"A token is taken from a state [tokens, width] per item; this state is {shape}. Use MeanPool().")
        return shape[1]

    def __call__(self, hidden: Tensor) -> Tensor:
        return hidden[:, self.index]


@dataclass(frozen=True)
class AutoPool:
    """The class token where the length varies (padding would enter a mean), else the mean over positions."""

    def resolve(self, shape: tuple[int, ...]) -> MeanPool | TokenPool:
        return TokenPool() if len(shape) == 2 and shape[0] == -1 else MeanPool()


Pool = MeanPool | TokenPool | AutoPool


def channel_dim(shape: tuple[int, ...]) -> int:
    """Dimension of the channels in a state ``[B, *shape]``.

    Vectors and tokens have them last. Maps of rank 4 have them first, unless only the first two of the three sizes agree
    (``14, 14, 384``: channels last, as in Swin).
    """
    if len(shape) <= 2:
        return len(shape)
    if len(shape) == 3 and shape[0] == shape[1] != shape[2]:
        return 3
    return 1


@dataclass(frozen=True)
class PooledLinear:
    """Pool, normalise, project to the classes.

    Attributes:
        pool: how a state becomes a vector.
        norm: layer norm before the projection; ``None`` = for tokens (their scale is free before the model's own last norm) and
            not for maps.
    """

    pool: Pool = AutoPool()
    norm: bool | None = None

    def build(self, hidden_shape: tuple[int, ...], num_outputs: int) -> PooledLinearHead:
        pool = self.pool.resolve(hidden_shape) if isinstance(self.pool, AutoPool) else self.pool
        norm = len(hidden_shape) <= 2 if self.norm is None else self.norm
        return PooledLinearHead(pool, pool.width(hidden_shape), num_outputs, norm)


class PooledLinearHead(Head):
    """Module of `PooledLinear`."""

    def __init__(self, pool: Callable[[Tensor], Tensor], width: int, num_outputs: int, norm: bool) -> None:
        super().__init__()
        self.pool = pool
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.linear = nn.Linear(width, num_outputs)
        nn.init.trunc_normal_(self.linear.weight, std=1 / math.sqrt(width))
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor, previous: tuple[Tensor, ...] = ()) -> Tensor:
        logits: Tensor = self.linear(self.norm(self.pool(hidden)))
        return logits


__all__ = ["AutoPool", "MeanPool", "PooledLinear", "PooledLinearHead", "TokenPool", "channel_dim"]
