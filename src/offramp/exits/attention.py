"""Attention head: global aggregation for states whose features need context more than detail."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offramp.core.errors import InvalidInput
from offramp.exits.grid import Grid, as_grid
from offramp.exits.pool import ShapedHead, output_layer, vector_norm


@dataclass(frozen=True)
class AttentionHead:
    """Attention of every position over positions subsampled with stride r, residual, mean plus class token, linear.

    LGViT (Xu et al. 2023, section 3.2, global aggregation head). Subsampled means every r-th row and column, not averaged.
    Every position enters the answer, so a state of varying length is refused: its padding would.

    Attributes:
        ratio: r >= 1; the paper's exits use 2 and then 3.
        heads: attention heads; lowered to a divisor of the channels if it is none.
        norm: layer norm before the projection; ``None`` = for tokens and not for maps.
        size: height and width of a token grid that is not square; otherwise such tokens are subsampled in one dimension.
        channels_last: where a map has its channels, when its sizes do not tell.
    """

    ratio: int = 2
    heads: int = 8
    norm: bool | None = None
    size: tuple[int, int] | None = None
    channels_last: bool | None = None

    def build(self, hidden_shape: tuple[int, ...], num_outputs: int) -> GlobalAggregation:
        if self.ratio < 1 or self.heads < 1:
            raise InvalidInput(f"AttentionHead needs ratio >= 1 and heads >= 1, got ratio={self.ratio}, heads={self.heads}.")
        grid = as_grid(hidden_shape, "AttentionHead", size=self.size, channels_last=self.channels_last, square=False)
        return GlobalAggregation(grid, self.ratio, math.gcd(self.heads, grid.channels), hidden_shape, num_outputs, self.norm)


class GlobalAggregation(ShapedHead):
    """Module of `AttentionHead`."""

    def __init__(self, grid: Grid, ratio: int, heads: int, shape: tuple[int, ...], num_outputs: int, norm: bool | None) -> None:
        super().__init__(shape)
        self.grid = grid
        self.ratio = ratio
        self.heads = heads
        width = grid.channels
        self.norm_in = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.project = nn.Linear(width, width)
        self.norm = vector_norm(width, shape, norm)
        self.linear = output_layer(width, num_outputs)

    def forward(self, hidden: Tensor, previous: tuple[Tensor, ...] = ()) -> Tensor:
        self.check(hidden)
        x_BCHW = self.grid.to_map(hidden)
        x_BTC = x_BCHW.flatten(2).transpose(1, 2)
        few_BSC = x_BCHW[:, :, :: self.ratio, :: self.ratio].flatten(2).transpose(1, 2)
        query = self._split(self.query(self.norm_in(x_BTC)))
        key, value = (self._split(half) for half in self.key_value(self.norm_in(few_BSC)).chunk(2, dim=-1))
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        pooled = (x_BTC + self.project(attended)).mean(dim=1)
        logits: Tensor = self.linear(self.norm(self.grid.add_class_token(pooled, hidden)))
        return logits

    def _split(self, x_BTC: Tensor) -> Tensor:
        return torch.unflatten(x_BTC, 2, (self.heads, self.grid.channels // self.heads)).transpose(1, 2)


__all__ = ["AttentionHead", "GlobalAggregation"]
