"""What a reproduction on images is made of: a small diffusion transformer, a sampler for it, and a network whose features judge images."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from offramp.core.errors import InvalidInput


class _Embed(nn.Module):
    """Patches as tokens, with a learned position."""

    def __init__(self, channels: int, size: int, patch: int, width: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2, width))

    def forward(self, sample: Tensor) -> Tensor:
        return self.patches(sample).flatten(2).transpose(1, 2) + self.position


class _Time(nn.Module):
    """Sines of a flow's timestep in [0, 1000], and an MLP."""

    speeds: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("speeds", torch.exp(torch.linspace(0, 6.5, width // 2)))
        self.hidden, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, timestep: Tensor) -> Tensor:
        angles = timestep.to(self.speeds.dtype)[:, None] / 1000 * self.speeds
        found: Tensor = self.out(F.silu(self.hidden(torch.cat([angles.sin(), angles.cos()], 1))))
        return found


class _Attention(nn.Module):
    """Self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = (part(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.to_q, self.to_k, self.to_v))
        found: Tensor = self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return found


class _Block(nn.Module):
    """Attention and MLP whose norms are shifted, scaled and gated by time and class (Peebles and Xie 2023, section 3.2, adaLN-Zero)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.attention = _Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(condition))[:, None].chunk(6, -1)
        tokens = tokens + gate1 * self.attention(self.norm1(tokens) * (1 + scale1) + shift1)
        return tokens + gate2 * self.mlp(self.norm2(tokens) * (1 + scale2) + shift2)


class SmallDiT(nn.Module):
    """A class-conditional diffusion transformer that predicts what its input is to change by.

    Args:
        channels: of the images.
        classes: of them.
        size: side of the images, a multiple of the patch.
        depth: blocks, at least 2.
        width: of the state, a multiple of the heads.
        heads: of attention.
        patch: side of a token.
    """

    def __init__(self, channels: int, classes: int, size: int, depth: int = 6, width: int = 48, heads: int = 4, patch: int = 2) -> None:
        super().__init__()
        if depth < 2 or width % heads or size % patch:
            raise InvalidInput(
                f"depth must be at least 2, width a multiple of the heads and size of the patch; got depth {depth}, width {width}, heads "
                f"{heads}, size {size} and patch {patch}."
            )
        self.patch, self.side = patch, size // patch
        self.embed = _Embed(channels, size, patch, width)
        self.time_embed = _Time(width)
        self.class_embed = nn.Embedding(classes, width)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, channels * patch * patch)
        for layer in (self.modulation, self.out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        condition = self.time_embed(timestep) + self.class_embed(class_labels)
        tokens = self.embed(sample)
        for block in self.blocks:
            tokens = block(tokens, condition)
        shift, scale = self.modulation(F.silu(condition))[:, None].chunk(2, -1)
        values = self.out(self.norm(tokens) * (1 + scale) + shift)
        return F.pixel_shuffle(values.transpose(1, 2).unflatten(2, (self.side, self.side)), self.patch)


class EulerFlow:
    """Euler's method for a rectified flow, in evenly spaced steps; of the shape of diffusers' schedulers."""

    init_noise_sigma = 1.0

    def __init__(self) -> None:
        self.timesteps = torch.empty(0)
        self._step = 0

    def set_timesteps(self, steps: int, device: torch.device | str | None = None) -> None:
        """Begin a trajectory of so many steps."""
        self.timesteps = torch.linspace(1000, 0, steps + 1, device=device)[:-1]
        self._step = 0

    def step(self, output: Tensor, timestep: Tensor, sample: Tensor) -> tuple[Tensor]:
        """The sample after the next step."""
        self._step += 1
        after = self.timesteps[self._step] if self._step < len(self.timesteps) else torch.zeros_like(timestep)
        return (sample + (after - timestep) / 1000 * output,)


class Features(nn.Module):
    """A small classifier; what it computes before its last layer, ``[B, dimensions]``, is what images are compared by."""

    def __init__(self, channels: int, classes: int, size: int, width: int = 16, dimensions: int = 32) -> None:
        super().__init__()
        stages, inside = [], channels
        for k in range(max(1, size.bit_length() - 3)):
            stages += [nn.Conv2d(inside, width << k, 3, 1, 1), nn.ReLU(), nn.Conv2d(width << k, width << k, 3, 2, 1), nn.ReLU()]
            inside = width << k
        self.stages = nn.Sequential(*stages)
        with torch.no_grad():
            flat = self.stages(torch.zeros(1, channels, size, size)).numel()
        self.features, self.classes = nn.Linear(flat, dimensions), nn.Linear(dimensions, classes)

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.features(self.stages(images).flatten(1))
        return found

    def fit(self, images: Tensor, labels: Tensor, steps: int, batch: int, seed: int) -> float:
        """Train as a classifier; returns the share of the images that it then classifies rightly."""
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW(self.parameters(), 2e-3, weight_decay=0.01)
        self.train()
        for _ in range(steps):
            rows = torch.randint(len(images), (batch,), generator=generator).to(images.device)
            loss = F.cross_entropy(self.classes(F.relu(self(images[rows]))), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        self.eval()
        with torch.no_grad():
            right = [self.classes(F.relu(self(x))).argmax(1) == y for x, y in zip(images.split(512), labels.split(512), strict=True)]
        return float(torch.cat(right).float().mean())
