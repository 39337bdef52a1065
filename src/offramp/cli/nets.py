"""Small networks that `offramp reproduce` trains from scratch, with the depth as an argument so that shallower ones can be compared."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from offramp.core.errors import InvalidInput


class _Residual(nn.Module):
    """Two 3x3 convolutions with batch norm and a shortcut (He et al. 2016, figure 2)."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outside)
        same = stride == 1 and inside == outside
        self.shortcut = nn.Identity() if same else nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ConvNet(nn.Module):
    """A residual network of ``depth`` blocks in three stages of growing width.

    Args:
        channels: of the input.
        classes: width of the answer.
        depth: residual blocks, at least 1.
        width: channels of the first stage; each of the next has twice as many.
        stages: of equal length; a shallower net has all of them too, since a deep net's first blocks alone make a poor small one.
    """

    def __init__(self, channels: int, classes: int, depth: int, width: int = 16, stages: int = 3) -> None:
        super().__init__()
        if depth < 1:
            raise InvalidInput(f"depth must be at least 1, got {depth}.")
        stage = [i * stages // depth for i in range(depth)]
        widths = [width * 2**s for s in stage]
        self.stem = nn.Sequential(nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.ModuleList(
            _Residual(widths[i - 1] if i else width, w, 2 if i and stage[i] > stage[i - 1] else 1) for i, w in enumerate(widths)
        )
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


class TransformerBlock(nn.Module):
    """Pre-norm transformer block; ``mask`` ``[B, T]`` is 1 where there is a token."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        allowed = None if mask is None else mask[:, None, None, :].bool()
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        x = x + self.out(mixed.transpose(1, 2).reshape(b, t, d))
        return x + self.mlp(self.norm2(x))


class TextTransformer(nn.Module):
    """A transformer encoder over token ids, answering from the first token.

    Args:
        vocabulary: number of token ids.
        classes: width of the answer.
        depth: blocks.
        width: of a token, a multiple of ``heads``.
        heads: of attention.
        length: longest text, in tokens.
        dropout: share of embedding values dropped in training.
    """

    def __init__(
        self, vocabulary: int, classes: int, depth: int, width: int = 128, heads: int = 4, length: int = 64, dropout: float = 0.1
    ) -> None:
        super().__init__()
        if width % heads or depth < 1:
            raise InvalidInput(f"width {width} must be a multiple of heads {heads}, and depth {depth} positive.")
        self.embed = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(length, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(TransformerBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.dropout(self.embed(input_ids) + self.position(places))
        for block in self.blocks:
            x = block(x, attention_mask)
        logits: Tensor = self.head(self.norm(x[:, 0]))
        return logits


class VisionTransformer(nn.Module):
    """A transformer encoder over square patches of an image, answering from a class token (Dosovitskiy et al. 2021).

    Args:
        channels: of the input.
        classes: width of the answer.
        depth: blocks.
        width: of a token, a multiple of ``heads``.
        heads: of attention.
        patch: side of a patch, in pixels.
        size: side of the image, in pixels, a multiple of ``patch``.
    """

    def __init__(self, channels: int, classes: int, depth: int, width: int = 128, heads: int = 4, patch: int = 4, size: int = 32) -> None:
        super().__init__()
        if width % heads or depth < 1 or size % patch:
            raise InvalidInput(
                f"width {width} must be a multiple of heads {heads}, size {size} one of patch {patch}, and depth {depth} positive."
            )
        self.embed = nn.Conv2d(channels, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2 + 1, width))
        self.blocks = nn.ModuleList(TransformerBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(tokens), -1, -1), tokens], 1) + self.position
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x[:, 0]))
        return logits


NETS: dict[str, type[nn.Module]] = {"conv": ConvNet, "text": TextTransformer, "vit": VisionTransformer}
"""Networks that a reproduction's configuration may name."""
