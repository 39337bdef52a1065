"""Convolutional heads: for the shallow states of networks whose features are still local.

Their batch norm uses running statistics in evaluation mode, where every row is independent of the others; in training mode
it mixes the rows of a batch, as everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from offramp.core.errors import InvalidInput
from offramp.exits.grid import Grid, as_grid
from offramp.exits.pool import ShapedHead, output_layer, vector_norm


@dataclass(frozen=True)
class ConvPoolLinear:
    """Stride-2 convolutions with batch norm and ReLU, mean over what is left of the map, linear.

    MSDNet (Huang et al. 2018, "Multi-Scale Dense Networks", section 4 and appendix): two 3x3 convolutions of 128 channels, a
    2x2 mean, a projection. Here no convolution takes the map below 2x2, and the mean is over the rest, so any map will do.
    Prefix tokens of a vision transformer are not read.

    Attributes:
        width: channels of the convolutions; ``None`` = those of the state (the paper's ImageNet heads).
        convs: how many, at most; at least 1.
        size: height and width of a token grid that is not square.
        channels_last: where a map has its channels, when its sizes do not tell.
    """

    width: int | None = 128
    convs: int = 2
    size: tuple[int, int] | None = None
    channels_last: bool | None = None

    def build(self, hidden_shape: tuple[int, ...], num_outputs: int) -> ConvPoolHead:
        if self.convs < 1 or (self.width is not None and self.width < 1):
            raise InvalidInput(f"ConvPoolLinear needs convs >= 1 and width >= 1, got convs={self.convs}, width={self.width}.")
        grid = as_grid(hidden_shape, "ConvPoolLinear", size=self.size, channels_last=self.channels_last)
        return ConvPoolHead(grid, grid.channels if self.width is None else self.width, self.convs, hidden_shape, num_outputs)


class ConvPoolHead(ShapedHead):
    """Module of `ConvPoolLinear`."""

    def __init__(self, grid: Grid, width: int, convs: int, shape: tuple[int, ...], num_outputs: int) -> None:
        super().__init__(shape)
        self.grid = grid
        layers: list[nn.Module] = []
        channels, side = grid.channels, min(grid.height, grid.width)
        while len(layers) < convs and side > 2:
            layers.append(
                nn.Sequential(nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
            )
            channels, side = width, (side + 1) // 2
        self.convs = nn.Sequential(*layers)
        self.linear = output_layer(channels, num_outputs)

    def forward(self, hidden: Tensor, previous: tuple[Tensor, ...] = ()) -> Tensor:
        self.check(hidden)
        logits: Tensor = self.linear(self.convs(self.grid.to_map(hidden)).mean(dim=(2, 3)))
        return logits


@dataclass(frozen=True)
class ConvLocal:
    """Local perception: 1x1, 3x3 depthwise, 1x1 convolutions around a residual; mean over the map plus class token; linear.

    LGViT (Xu et al. 2023, "LGViT: Dynamic Early Exiting for Accelerating Vision Transformer", section 3.2), whose exits in the
    middle use ``kernel=1``: the two 1x1 convolutions alone.

    Attributes:
        kernel: of the depthwise convolution, odd; 1 leaves it out.
        norm: layer norm before the projection; ``None`` = for tokens and not for maps. The paper has none.
        size: height and width of a token grid that is not square.
        channels_last: where a map has its channels, when its sizes do not tell.
    """

    kernel: int = 3
    norm: bool | None = None
    size: tuple[int, int] | None = None
    channels_last: bool | None = None

    def build(self, hidden_shape: tuple[int, ...], num_outputs: int) -> ConvLocalHead:
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise InvalidInput(f"kernel must be odd and positive, got {self.kernel}.")
        grid = as_grid(hidden_shape, "ConvLocal", size=self.size, channels_last=self.channels_last)
        return ConvLocalHead(grid, self.kernel, hidden_shape, num_outputs, self.norm)


class ConvLocalHead(ShapedHead):
    """Module of `ConvLocal`."""

    def __init__(self, grid: Grid, kernel: int, shape: tuple[int, ...], num_outputs: int, norm: bool | None) -> None:
        super().__init__(shape)
        self.grid = grid
        width = grid.channels
        layers: list[nn.Module] = [nn.Conv2d(width, width, 1), nn.GELU(), nn.BatchNorm2d(width)]
        if kernel > 1:
            layers += [nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width), nn.GELU(), nn.BatchNorm2d(width)]
        layers += [nn.Conv2d(width, width, 1), nn.BatchNorm2d(width)]
        self.local = nn.Sequential(*layers)
        self.norm = vector_norm(width, shape, norm)
        self.linear = output_layer(width, num_outputs)

    def forward(self, hidden: Tensor, previous: tuple[Tensor, ...] = ()) -> Tensor:
        self.check(hidden)
        x_BCHW = self.grid.to_map(hidden)
        pooled = (x_BCHW + self.local(x_BCHW)).mean(dim=(2, 3))
        logits: Tensor = self.linear(self.norm(self.grid.add_class_token(pooled, hidden)))
        return logits


__all__ = ["ConvLocal", "ConvLocalHead", "ConvPoolHead", "ConvPoolLinear"]
