"""Families of diffusers; example inputs, noise levels and places of a denoiser. The only file that imports it, inside functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from offramp.backbones.families import Family, Inputs
from offramp.core.errors import InvalidInput, MissingExtra
from offramp.core.noise import FlowMatching, LogSigma, NoiseScale, VariancePreserving


def _library() -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise MissingExtra("diffusers", "diffusers", "Making a diffusers model") from error
    return diffusers


def version() -> str:
    """Version of the installed diffusers."""
    return str(_library().__version__)


def _times(rows: int) -> Tensor:
    return torch.randint(0, 1000, (rows,))


def _unet2d(rows: int, length: int | None) -> Inputs:
    return Inputs((torch.randn(rows, 3, 16, 16), _times(rows)))


def _unet2d_scalar(rows: int, length: int | None) -> Inputs:
    return Inputs((torch.randn(rows, 3, 16, 16), torch.tensor(int(torch.randint(0, 1000, ())))))


def _unet_condition(rows: int, length: int | None) -> Inputs:
    return Inputs((torch.randn(rows, 4, 16, 16), _times(rows)), {"encoder_hidden_states": torch.randn(rows, 6, 32)})


def _dit(rows: int, length: int | None) -> Inputs:
    return Inputs((torch.randn(rows, 4, 8, 8),), {"timestep": _times(rows), "class_labels": torch.randint(0, 10, (rows,))})


def _captioned(rows: int, length: int | None) -> Inputs:
    mask = torch.ones(rows, 6)
    mask[:, 4:] = 0
    inputs = {"encoder_hidden_states": torch.randn(rows, 6, 32), "timestep": _times(rows), "encoder_attention_mask": mask}
    return Inputs((torch.randn(rows, 4, 8, 8),), inputs)


def _pixart(rows: int, length: int | None) -> Inputs:
    given = _captioned(rows, length)
    return Inputs(given.args, {**given.kwargs, "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}})


def _sd3(rows: int, length: int | None) -> Inputs:
    given = {"encoder_hidden_states": torch.randn(rows, 6, 32), "pooled_projections": torch.randn(rows, 24), "timestep": _times(rows)}
    return Inputs((torch.randn(rows, 4, 8, 8),), given)


def _flux(rows: int, length: int | None) -> Inputs:
    given = {
        "encoder_hidden_states": torch.randn(rows, 6, 32),
        "pooled_projections": torch.randn(rows, 24),
        "timestep": torch.rand(rows),
        "img_ids": torch.randn(16, 3).round(),
        "txt_ids": torch.zeros(6, 3),
    }
    return Inputs((torch.randn(rows, 16, 4),), given)


def _uvit(rows: int, length: int | None) -> Inputs:
    ids = torch.randint(0, 30, (rows, 8, 8))
    return Inputs((ids, torch.randn(rows, 6, 32), torch.randn(rows, 24), torch.randn(rows, 5)))


def _transformer2d(rows: int, length: int | None) -> Inputs:
    return Inputs((torch.randn(rows, 32, 8, 8),), {"encoder_hidden_states": torch.randn(rows, 6, 32)})


def _aura(rows: int, length: int | None) -> Inputs:
    return Inputs((torch.randn(rows, 4, 8, 8),), {"encoder_hidden_states": torch.randn(rows, 6, 32), "timestep": torch.rand(rows)})


def _prior(rows: int, length: int | None) -> Inputs:
    given = {
        "proj_embedding": torch.randn(rows, 32),
        "encoder_hidden_states": torch.randn(rows, 7, 32),
        "attention_mask": torch.ones(rows, 7).bool(),
    }
    return Inputs((torch.randn(rows, 32), _times(rows)), given)


def _unet1d(rows: int, length: int | None) -> Inputs:
    return Inputs((torch.randn(rows, 14, 16), _times(rows)))


def _vae(rows: int, length: int | None) -> Inputs:
    return Inputs((torch.randn(rows, 3, 16, 16),))


_UNET: dict[str, Any] = {"sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}
_HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16}

_MODELS: dict[str, tuple[str, str, dict[str, Any], Callable[[int, int | None], Inputs]]] = {
    # family: (kind, model, options, inputs)
    "unet2d": (
        "unet",
        "UNet2DModel",
        {
            **_UNET,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": 8,
        },
        _unet2d,
    ),
    "unet2d_scalar_timestep": (
        "unet",
        "UNet2DModel",
        {
            **_UNET,
            "down_block_types": ("DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D"),
            "attention_head_dim": 8,
        },
        _unet2d_scalar,
    ),
    "unet2d_condition": (
        "unet",
        "UNet2DConditionModel",
        {
            **_UNET,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 32,
            "attention_head_dim": 8,
        },
        _unet_condition,
    ),
    "unet1d": (
        "unet",
        "UNet1DModel",
        {
            "sample_size": 16,
            "in_channels": 14,
            "out_channels": 14,
            "block_out_channels": (32, 64),
            "down_block_types": ("DownResnetBlock1D", "DownResnetBlock1D"),
            "up_block_types": ("UpResnetBlock1D",),
            "mid_block_type": "MidResTemporalBlock1D",
            "out_block_type": "OutConv1DBlock",
            "time_embedding_type": "positional",
            "flip_sin_to_cos": False,
            "use_timestep_embedding": True,
            "freq_shift": 1.0,
            "layers_per_block": 1,
            "act_fn": "mish",
            "norm_num_groups": 8,
            "extra_in_channels": 0,
        },
        _unet1d,
    ),
    "dit": (
        "diffusion transformer",
        "DiTTransformer2DModel",
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 4,
            "sample_size": 8,
            "patch_size": 2,
            "num_embeds_ada_norm": 10,
            "norm_num_groups": 8,
        },
        _dit,
    ),
    "pixart": (
        "diffusion transformer",
        "PixArtTransformer2DModel",
        {
            **_HEADS,
            "num_layers": 4,
            "sample_size": 8,
            "patch_size": 2,
            "cross_attention_dim": 32,
            "caption_channels": 32,
            "use_additional_conditions": False,
        },
        _pixart,
    ),
    "sd3": (
        "diffusion transformer",
        "SD3Transformer2DModel",
        {
            **_HEADS,
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 4,
            "joint_attention_dim": 32,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 24,
            "out_channels": 4,
        },
        _sd3,
    ),
    "flux": (
        "diffusion transformer",
        "FluxTransformer2DModel",
        {
            **_HEADS,
            "patch_size": 1,
            "in_channels": 4,
            "num_layers": 2,
            "num_single_layers": 2,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 24,
            "axes_dims_rope": (4, 4, 8),
        },
        _flux,
    ),
    "aura_flow": (
        "diffusion transformer",
        "AuraFlowTransformer2DModel",
        {
            **_HEADS,
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_mmdit_layers": 2,
            "num_single_dit_layers": 2,
            "joint_attention_dim": 32,
            "caption_projection_dim": 32,
            "pos_embed_max_size": 64,
        },
        _aura,
    ),
    "sana": (
        "diffusion transformer",
        "SanaTransformer2DModel",
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 4,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 16,
            "cross_attention_dim": 32,
            "caption_channels": 32,
            "sample_size": 8,
            "patch_size": 1,
        },
        _captioned,
    ),
    "uvit2d": (
        "diffusion transformer",
        "UVit2DModel",
        {
            "hidden_size": 32,
            "cond_embed_dim": 24,
            "micro_cond_encode_dim": 8,
            "micro_cond_embed_dim": 40,
            "encoder_hidden_size": 32,
            "vocab_size": 32,
            "codebook_size": 30,
            "in_channels": 32,
            "block_out_channels": 32,
            "num_res_blocks": 1,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "block_num_heads": 2,
            "sample_size": 8,
        },
        _uvit,
    ),
    "transformer2d": (
        "diffusion transformer",
        "Transformer2DModel",
        {**_HEADS, "in_channels": 32, "num_layers": 4, "cross_attention_dim": 32, "norm_num_groups": 8},
        _transformer2d,
    ),
    "prior_transformer": (
        "diffusion transformer",
        "PriorTransformer",
        {**_HEADS, "num_layers": 4, "embedding_dim": 32, "num_embeddings": 7, "additional_embeddings": 4},
        _prior,
    ),
    "autoencoder_kl": (
        "autoencoder",
        "AutoencoderKL",
        {
            "block_out_channels": (16, 32),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "norm_num_groups": 8,
            "latent_channels": 4,
        },
        _vae,
    ),
    "vq_model": (
        "autoencoder",
        "VQModel",
        {
            "block_out_channels": (16, 32),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "norm_num_groups": 8,
            "latent_channels": 4,
            "num_vq_embeddings": 16,
        },
        _vae,
    ),
}


def families() -> list[Family]:
    """Small random models over diffusers' denoisers and autoencoders."""

    def builder(model: str, options: dict[str, Any]) -> Callable[[], nn.Module]:
        return lambda: getattr(_library(), model)(**options)

    return [Family(f"diffusers/{n}", kind, builder(model, options), inputs) for n, (kind, model, options, inputs) in _MODELS.items()]


def example_inputs(model: nn.Module, rows: int = 2) -> dict[str, Tensor]:
    """Keyword inputs for a user's denoiser from its configuration: an image ``sample``/``hidden_states``, a timestep a row, conditioning.

    Raises:
        InvalidInput: the model takes something that its configuration does not tell; pass an example instead.
    """
    import inspect

    config: Any = getattr(model, "config", None)
    names = inspect.signature(model.forward).parameters
    size, channels = getattr(config, "sample_size", None), getattr(config, "in_channels", None)
    image = next((n for n in ("sample", "hidden_states") if n in names), None)
    if image is None or size is None or channels is None:
        raise InvalidInput(f"{type(model).__name__} does not declare sample_size and in_channels; pass an example instead.")
    height, width = size if isinstance(size, tuple | list) else (size, size)
    inputs = {image: torch.randn(rows, int(channels), int(height), int(width)), "timestep": _times(rows)}
    width_ = (
        getattr(config, "caption_channels", None)
        or getattr(config, "joint_attention_dim", None)
        or getattr(config, "cross_attention_dim", None)
    )
    if "encoder_hidden_states" in names and isinstance(width_, int):
        inputs["encoder_hidden_states"] = torch.randn(rows, 8, width_)
    if "class_labels" in names and getattr(config, "num_embeds_ada_norm", None):
        inputs["class_labels"] = torch.randint(0, int(config.num_embeds_ada_norm), (rows,))
    if "pooled_projections" in names and getattr(config, "pooled_projection_dim", None):
        inputs["pooled_projections"] = torch.randn(rows, int(config.pooled_projection_dim))
    return inputs


# Denoisers that their pipelines call with sigma itself and not with the scheduler's timestep.
_CALLED_WITH_SIGMA = ("FluxTransformer2DModel", "AuraFlowTransformer2DModel")


def denoiser_name(pipe: Any) -> str:
    """Which component of a pipeline is its denoiser.

    Raises:
        InvalidInput: it has none, or no scheduler.
    """
    name = next((n for n in ("transformer", "unet") if isinstance(getattr(pipe, n, None), nn.Module)), None)
    if name is None or not hasattr(getattr(pipe, "scheduler", None), "timesteps"):
        raise InvalidInput(
            f"{type(pipe).__name__} has no denoiser (a module `transformer` or `unet`) with a `scheduler`. For a denoiser alone "
            "use attach_denoiser and sample."
        )
    return name


def noise_scale(scheduler: Any, model: nn.Module | None = None) -> NoiseScale:
    """Noise levels of the timesteps that a scheduler gives to a denoiser.

    Args:
        scheduler: of diffusers, or one with its ``alphas_cumprod`` or ``config``.
        model: the denoiser; some are called with sigma and not with the timestep.

    Raises:
        InvalidInput: the scheduler says neither; pass a noise scale.
    """
    config: Any = dict(getattr(scheduler, "config", None) or {})
    steps = float(config.get("num_train_timesteps") or 1000)
    flow = "FlowMatch" in type(scheduler).__name__ or config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
    if flow:
        return FlowMatching(1.0 if type(model).__name__ in _CALLED_WITH_SIGMA else steps)
    if "EDM" in type(scheduler).__name__ or config.get("timestep_type") == "continuous":
        return LogSigma(0.25)
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if isinstance(alphas, Tensor):
        return VariancePreserving.from_alphas(alphas)
    raise InvalidInput(f"The noise levels of {type(scheduler).__name__} are not known; pass noise=, such as FlowMatching().")


def deep_part(model: nn.Module, branch: int = 0) -> tuple[str, str]:
    """The places between which a U-Net is deeper than a branch: after that down block, and after the up block below its mirror image.

    Args:
        model: with ``down_blocks`` and ``up_blocks``.
        branch: 0 is the shallowest: all but the first down block and the last up block is deep.

    Raises:
        InvalidInput: the model is no such U-Net or has no such branch.
    """
    down, up = getattr(model, "down_blocks", None), getattr(model, "up_blocks", None)
    if not isinstance(down, nn.ModuleList) or not isinstance(up, nn.ModuleList) or len(down) != len(up):
        raise InvalidInput(f"{type(model).__name__} has no down_blocks and up_blocks that mirror each other.")
    if not 0 <= branch < len(up) - 1:
        raise InvalidInput(f"branch must be from 0 to {len(up) - 2}, got {branch}.")
    return f"down_blocks.{branch}", f"up_blocks.{len(up) - 2 - branch}"
