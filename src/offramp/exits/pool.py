"""How a state becomes a vector, as data; what heads have in common."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from offramp.core.errors import InvalidInput
from offramp.core.pooling import channel_dim, mean_pool
from offramp.core.protocols import Head


@dataclass(frozen=True)
class MeanPool:
    """Mean over everything but the channels. Not for padded sequences: padding would enter the mean.

    Attributes:
        channels_last: where a map has its channels, when its sizes do not tell (channels last and not square).
    """

    channels_last: bool | None = None

    def width(self, shape: tuple[int, ...]) -> int:
        return shape[channel_dim(shape, self.channels_last) - 1]

    def __call__(self, hidden: Tensor) -> Tensor:
        return mean_pool(hidden, self.channels_last)


@dataclass(frozen=True)
class TokenPool:
    """One token of ``[B, T, D]``, the class token by default. Does not depend on padding."""

    index: int = 0

    def width(self, shape: tuple[int, ...]) -> int:
        if len(shape) != 2:
            raise InvalidInput(f"A token is taken from a state [tokens, width] per item; this state is {shape}. Use MeanPool().")
        if shape[0] != -1 and not -shape[0] <= self.index < shape[0]:
            raise InvalidInput(f"Token {self.index} was asked for, but the state has {shape[0]} tokens. Use TokenPool(0) or MeanPool().")
        return shape[1]

    def __call__(self, hidden: Tensor) -> Tensor:
        return hidden[:, self.index]


@dataclass(frozen=True)
class AutoPool:
    """The class token where the length varies (padding would enter a mean), else the mean over positions."""

    def resolve(self, shape: tuple[int, ...]) -> MeanPool | TokenPool:
        return TokenPool() if len(shape) == 2 and shape[0] == -1 else MeanPool()


Pool = MeanPool | TokenPool | AutoPool


def resolve(pool: Pool, shape: tuple[int, ...]) -> MeanPool | TokenPool:
    """The pool itself, or what `AutoPool` chooses for a state of this shape."""
    return pool.resolve(shape) if isinstance(pool, AutoPool) else pool


class ShapedHead(Head):
    """A head that knows which states it reads and refuses others by name.

    Args:
        expects: sizes without the batch; ``-1`` where any size will do.
    """

    def __init__(self, expects: tuple[int, ...]) -> None:
        super().__init__()
        self.expects = expects

    def check(self, hidden: Tensor) -> None:
        """Refuse a state of another shape.

        Raises:
            InvalidInput: rank or a fixed size differs.
        """
        sizes = tuple(hidden.shape[1:])
        if len(sizes) != len(self.expects) or any(want not in (-1, size) for size, want in zip(sizes, self.expects, strict=True)):
            raise InvalidInput(
                f"{type(self).__name__} was built for a state {self.expects} per item (-1 = any) and was given {sizes}. "
                "Attach the exit again with an example of the size you use."
            )


def only_channels(shape: tuple[int, ...], channel: int) -> tuple[int, ...]:
    """``shape`` with every size but the channels' free: what a head that pools expects."""
    return tuple(s if d == channel else -1 for d, s in enumerate(shape, start=1))


def vector_norm(width: int, shape: tuple[int, ...], wanted: bool | None) -> nn.Module:
    """Layer norm, or nothing. ``None``: for vectors and tokens (their scale is free before the model's own last norm), not for maps."""
    return nn.LayerNorm(width) if (len(shape) <= 2 if wanted is None else wanted) else nn.Identity()


def output_layer(width: int, num_outputs: int) -> nn.Linear:
    """The last projection of a head, started small enough that untrained answers are near uniform."""
    linear = nn.Linear(width, num_outputs)
    nn.init.trunc_normal_(linear.weight, std=1 / math.sqrt(width))
    nn.init.zeros_(linear.bias)
    return linear


__all__ = ["AutoPool", "MeanPool", "Pool", "ShapedHead", "TokenPool", "only_channels", "output_layer", "resolve", "vector_norm"]
