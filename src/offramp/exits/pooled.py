"""Heads with a learned way to pool."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offramp.core.errors import InvalidInput
from offramp.exits.grid import Grid, as_grid
from offramp.exits.pool import ShapedHead, TokenPool, output_layer, vector_norm


@dataclass(frozen=True)
class MixedPool:
    """``alpha * max + (1 - alpha) * mean`` over cells of the map, then linear; alpha is learned, from 0.5.

    SDN (Kaya, Hong, Dumitras 2019, "Shallow-Deep Networks", section 4). Tokens are pooled as one cell.

    Attributes:
        cells: the map is pooled to at most this many cells a side (the paper's 4); 1 = over the whole map.
        norm: layer norm before the projection; ``None`` = for tokens and not for maps.
        channels_last: where a map has its channels, when its sizes do not tell.
    """

    cells: int = 4
    norm: bool | None = None
    channels_last: bool | None = None

    def build(self, hidden_shape: tuple[int, ...], num_outputs: int) -> MixedPoolHead:
        if self.cells < 1:
            raise InvalidInput(f"cells must be at least 1, got {self.cells}.")
        column = (hidden_shape[0], 1) if len(hidden_shape) == 2 else None
        grid = as_grid(hidden_shape, "MixedPool", size=column, channels_last=self.channels_last)
        return MixedPoolHead(grid, self.cells if len(hidden_shape) == 3 else 1, hidden_shape, num_outputs, self.norm)


class MixedPoolHead(ShapedHead):
    """Module of `MixedPool`."""

    def __init__(self, grid: Grid, cells: int, shape: tuple[int, ...], num_outputs: int, norm: bool | None) -> None:
        super().__init__(shape)
        self.grid = grid
        rows, columns = min(cells, grid.height), min(cells, grid.width)
        # Strides that divide evenly and kernels that reach the edge cover every position, whatever the size, without
        # adaptive pooling, which ONNX has only for sizes that divide.
        self.stride = (grid.height // rows, grid.width // columns)
        self.kernel = (grid.height - (rows - 1) * self.stride[0], grid.width - (columns - 1) * self.stride[1])
        self.alpha = nn.Parameter(torch.full((1,), 0.5))
        width = grid.channels * rows * columns
        self.norm = vector_norm(width, shape, norm)
        self.linear = output_layer(width, num_outputs)

    def forward(self, hidden: Tensor, previous: tuple[Tensor, ...] = ()) -> Tensor:
        self.check(hidden)
        x_BCHW = self.grid.to_map(hidden)
        largest = F.max_pool2d(x_BCHW, self.kernel, self.stride)
        mean = F.avg_pool2d(x_BCHW, self.kernel, self.stride)
        mixed = self.alpha * largest + (1 - self.alpha) * mean
        logits: Tensor = self.linear(self.norm(mixed.flatten(1)))
        return logits


@dataclass(frozen=True)
class Pooler:
    """BERT's pooler on the first token: linear, tanh, then linear to the classes. Does not depend on padding.

    One pooler per exit as in ElasticBERT (Liu et al. 2022) and DeeBERT, or one for all exits as in PABEE (Zhou et al. 2020,
    "BERT Loses Patience"); each exit has its own last layer. Sharing is made by `tie` once all heads are built.

    Attributes:
        shared: all exits with ``shared=True`` and the same width use one pooler.
        index: the token that is read.
    """

    shared: bool = False
    index: int = 0

    def build(self, hidden_shape: tuple[int, ...], num_outputs: int) -> PoolerHead:
        pool = TokenPool(self.index)
        return PoolerHead(pool, pool.width(hidden_shape), num_outputs, self.shared)


class PoolerHead(ShapedHead):
    """Module of `Pooler`."""

    def __init__(self, pool: TokenPool, width: int, num_outputs: int, shared: bool) -> None:
        super().__init__((-1, width))
        self.pool = pool
        self.shared = shared
        self.pooler = nn.Linear(width, width)
        self.linear = output_layer(width, num_outputs)

    def forward(self, hidden: Tensor, previous: tuple[Tensor, ...] = ()) -> Tensor:
        self.check(hidden)
        logits: Tensor = self.linear(torch.tanh(self.pooler(self.pool(hidden))))
        return logits


def tie(heads: Iterable[nn.Module]) -> None:
    """Make the heads that ask for it use one pooler, the first one's; heads wrapped in others are found.

    A spec builds one head at a time and knows no others, so this runs once all are built. Repeating it changes nothing.
    Copies of the heads made together stay tied; saved weights are written once per exit and agree.
    """
    first: dict[int, nn.Linear] = {}
    for head in heads:
        for module in head.modules():
            if isinstance(module, PoolerHead) and module.shared:
                module.pooler = first.setdefault(module.pooler.in_features, module.pooler)


__all__ = ["MixedPool", "MixedPoolHead", "Pooler", "PoolerHead", "tie"]
