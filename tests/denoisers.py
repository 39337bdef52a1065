"""Small denoisers: a diffusion transformer and a U-Net of diffusers, and a U-ViT of plain PyTorch with its long skips."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from offramp.core.noise import FlowMatching
from offramp.diffusion import DenoisingNet, attach_denoiser

BLOCKS = 4


def loud(model: nn.Module, std: float = 0.1) -> nn.Module:
    """Weights with which every block changes its state by much; zero-initialised gates would hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.copy_(torch.randn(p.shape, generator=generator) * std)
    return model.eval()


class _Block(nn.Module):
    def __init__(self, width: int, joins: bool) -> None:
        super().__init__()
        self.norm, self.mix, self.level = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(1, width)
        self.join = nn.Linear(2 * width, width) if joins else None

    def forward(self, state: Tensor, level: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.join is not None and skip is not None:
            state = self.join(torch.cat([state, skip], -1))
        return state + torch.tanh(self.mix(self.norm(state + state.mean(1, keepdim=True))) + self.level(level[:, None]))


class UViT(nn.Module):
    """Patches of 2 of an image ``[B, 3, 8, 8]`` with a class token before them; the last block reads what the first wrote.

    With ``channels=6`` it answers a prediction and a learned variance.
    """

    def __init__(self, width: int = 16, channels: int = 3) -> None:
        super().__init__()
        self.channels = channels
        self.embed = nn.Linear(12, width)
        self.classes = nn.Embedding(11, width)
        self.time_embed = nn.Linear(1, width)
        self.blocks = nn.ModuleList(_Block(width, k == BLOCKS - 1) for k in range(BLOCKS))
        self.outlet = nn.Linear(width, 4 * channels)

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        level = self.time_embed(timestep.float().view(-1, 1) / 1000).sum(1, keepdim=True)
        patches = sample.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        state = torch.cat([self.classes(class_labels)[:, None], self.embed(patches)], 1)
        first = None
        for k, block in enumerate(self.blocks):
            state = block(state, level, first if k == BLOCKS - 1 else None)
            first = state if first is None else first
        out = self.outlet(state)[:, 1:].unflatten(1, (4, 4)).unflatten(3, (self.channels, 2, 2))
        return out.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def dit() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    return loud(
        DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=3, out_channels=3, num_layers=BLOCKS, sample_size=8, patch_size=2,
            num_embeds_ada_norm=10, norm_num_groups=4,
        )
    )  # fmt: skip


def unet() -> nn.Module:
    from diffusers import UNet2DModel

    return loud(
        UNet2DModel(
            sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
            attention_head_dim=4, num_class_embeds=11, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )
    )  # fmt: skip


def batch(rows: int, name: str = "sample", seed: int = 1) -> dict[str, Tensor]:
    """Inputs at all noise levels."""
    g = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(rows, 3, 8, 8, generator=g),
        "timestep": torch.linspace(20, 980, rows),
        "class_labels": torch.randint(0, 11, (rows,), generator=g),
    }


PLACES = {
    "uvit": tuple(f"blocks.{k}" for k in range(BLOCKS)),
    "dit": ("pos_embed", *(f"transformer_blocks.{k}" for k in range(BLOCKS))),
    "unet": ("down_blocks.0.resnets.0", "down_blocks.1.resnets.0", "mid_block", "up_blocks.0.resnets.0", "up_blocks.1"),
}


def attached(kind: str, heads: Any = None) -> DenoisingNet:
    torch.manual_seed(0)
    model = {"uvit": lambda: loud(UViT(), 0.3), "dit": dit, "unet": unet}[kind]()
    name = "hidden_states" if kind == "dit" else "sample"
    return attach_denoiser(model.eval(), PLACES[kind], noise=FlowMatching(), example=batch(2, name), heads=heads)
