"""Small random denoisers and pipelines, built so that every block changes its state by much."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from denoisers import loud
from offramp.core.noise import FlowMatching
from offramp.diffusion import DenoisingNet, attach_denoiser


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
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
}


def unet() -> nn.Module:
    from diffusers import UNet2DModel

    return loud(UNet2DModel(**_UNET, down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D")))


def conditional_unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    return loud(UNet2DConditionModel(**_UNET, down_block_types=down, up_block_types=up, cross_attention_dim=12))


def autoencoder() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        norm_num_groups=8,
        latent_channels=4,
        shift_factor=0.0,
    ).eval()


def schedulers() -> list[Callable[[], Any]]:
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

    return [DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler]


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, state: Tensor, level: Tensor) -> Tensor:
        return state + torch.tanh(self.mix(self.norm(state))) * (1 + level)


class Toy(nn.Module):
    """A denoiser of plain PyTorch: tokens ``[B, 6, 4]``, a time and a label per row."""

    def __init__(self, blocks: int = 4, width: int = 16) -> None:
        super().__init__()
        self.inlet = nn.Linear(4, width)
        self.labels = nn.Embedding(10, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(blocks))
        self.outlet = nn.Linear(width, 4)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        level = (t.float() / 1000).to(x.dtype).view(-1, 1, 1)
        state = self.inlet(x) + torch.sin(5 * level)
        if y is not None:
            state = state + self.labels(y)[:, None]
        for block in self.blocks:
            state = block(state, level)
        return self.outlet(state) * (1 + level)


class ToyHead(nn.Module):
    """A learned head for `Toy`: uncertainty from the state and the noise level, and an output layer."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.probe = nn.Linear(width + 1, 1)
        self.out = nn.Linear(width, 4)

    def uncertainty(self, hidden: Tensor, log_snr: Tensor) -> Tensor:
        level = log_snr.view(-1, 1, 1).expand(-1, hidden.shape[1], 1).to(hidden.dtype)
        return self.probe(torch.cat([hidden, level / 20], -1)).sigmoid().mean((1, 2))

    def output(self, hidden: Tensor, log_snr: Tensor) -> Tensor:
        return self.out(hidden)


TOY_PLACES = ("inlet", *(f"blocks.{k}" for k in range(4)))


def toy(heads: Any = None) -> DenoisingNet:
    """`Toy` cut after its inlet and every block."""
    torch.manual_seed(5)
    given = {"x": torch.randn(2, 6, 4), "t": torch.tensor([500, 300]), "y": torch.tensor([1, 2])}
    return attach_denoiser(Toy().eval(), TOY_PLACES, noise=FlowMatching(), example=given, heads=heads)


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
