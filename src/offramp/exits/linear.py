"""Heads on one vector per item: the cheapest exits, and the default."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from offramp.core.errors import InvalidInput
from offramp.core.pooling import channel_dim
from offramp.exits.pool import AutoPool, MeanPool, Pool, ShapedHead, TokenPool, only_channels, output_layer, resolve, vector_norm


@dataclass(frozen=True)
class PooledLinear:
    """Pool, normalise, project to the classes.

    Attributes:
        pool: how a state becomes a vector.
        norm: layer norm before the projection; ``None`` = for vectors and tokens (their scale is free before the model's own
            last norm) and not for maps.
    """

    pool: Pool = AutoPool()
    norm: bool | None = None

    def build(self, hidden_shape: tuple[int, ...], num_outputs: int) -> VectorHead:
        pool, width, expects = _vector(self.pool, hidden_shape)
        return VectorHead(expects, pool, vector_norm(width, hidden_shape, self.norm), output_layer(width, num_outputs))


@dataclass(frozen=True)
class MLP:
    """Pool, normalise, one hidden layer with GELU, project to the classes.

    Attributes:
        inner: width of the hidden layer; ``None`` = that of the pooled state.
        pool: how a state becomes a vector.
        norm: as in `PooledLinear`.
    """

    inner: int | None = None
    pool: Pool = AutoPool()
    norm: bool | None = None

    def build(self, hidden_shape: tuple[int, ...], num_outputs: int) -> VectorHead:
        pool, width, expects = _vector(self.pool, hidden_shape)
        inner = width if self.inner is None else self.inner
        if inner < 1:
            raise InvalidInput(f"inner must be a positive width or None, got {inner}.")
        body = nn.Sequential(nn.Linear(width, inner), nn.GELU(), output_layer(inner, num_outputs))
        return VectorHead(expects, pool, vector_norm(width, hidden_shape, self.norm), body)


class VectorHead(ShapedHead):
    """Module of `PooledLinear` and `MLP`."""

    def __init__(self, expects: tuple[int, ...], pool: MeanPool | TokenPool, norm: nn.Module, body: nn.Module) -> None:
        super().__init__(expects)
        self.pool = pool
        self.norm = norm
        self.body = body

    def forward(self, hidden: Tensor, previous: tuple[Tensor, ...] = ()) -> Tensor:
        self.check(hidden)
        logits: Tensor = self.body(self.norm(self.pool(hidden)))
        return logits


def _vector(pool: Pool, shape: tuple[int, ...]) -> tuple[MeanPool | TokenPool, int, tuple[int, ...]]:
    """The resolved pool, the width it gives and the states it accepts."""
    resolved = resolve(pool, shape)
    last = resolved.channels_last if isinstance(resolved, MeanPool) else None
    return resolved, resolved.width(shape), only_channels(shape, channel_dim(shape, last))


__all__ = ["MLP", "PooledLinear", "VectorHead"]
