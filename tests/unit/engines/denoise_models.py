"""Small random denoisers and pipelines, built so that every block changes its state by much."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from offramp.core.noise import FlowMatching
from offramp.diffusion import DenoisingNet, attach_denoiser


def loud(model: nn.Module, std: float = 0.1) -> nn.Module:
    """Weights that make skipping visible; zero-initialised gates would hide it."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.copy_(torch.randn(p.shape, generator=generator) * std)
    return model.eval()


def dit(layers: int = 4) -> nn.Module:
    from diffusers import DiTTransformer2DModel

    return loud(
        DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=4,
            num_layers=layers,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=1000,
            norm_num_groups=4,
        )
    )


def pixart() -> nn.Module:
    from diffusers import PixArtTransformer2DModel

    return loud(
        PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=4,
            num_layers=3,
            sample_size=8,
            patch_size=2,
            cross_attention_dim=16,
            caption_channels=12,
            use_additional_conditions=False,
            norm_num_groups=4,
        )
    )


def sd3() -> nn.Module:
    from diffusers import SD3Transformer2DModel

    return loud(
        SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_layers=3,
            num_attention_heads=2,
            attention_head_dim=8,
            joint_attention_dim=12,
            caption_projection_dim=16,
            pooled_projection_dim=10,
            out_channels=4,
        )
    )


_UNET: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (8, 16, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
}


def unet() -> nn.Module:
    from diffusers import UNet2DModel

    down = ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D")
    return loud(UNet2DModel(**_UNET, down_block_types=down, up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D")))


def conditional_unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    down = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
    up = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")
    return loud(UNet2DConditionModel(**_UNET, down_block_types=down, up_block_types=up, cross_attention_dim=12))


def schedulers() -> list[Callable[[], Any]]:
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

    return [DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler]


BLOCKS = tuple(f"transformer_blocks.{k}" for k in range(4))


def example(rows: int = 2, kind: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Inputs of `dit`."""
    return {
        "hidden_states": torch.randn(rows, 4, 8, 8),
        "timestep": torch.linspace(100, 900, rows).to(kind),
        "class_labels": torch.arange(rows),
    }


def attached(model: nn.Module | None = None, heads: Any = None) -> DenoisingNet:
    return attach_denoiser(model if model is not None else dit(), BLOCKS, noise=FlowMatching(), example=example(), heads=heads)
