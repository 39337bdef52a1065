"""Families of timm, and example inputs for a user's timm model. The only file that imports timm, and only inside functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from offramp.backbones.families import Family, Inputs
from offramp.core.errors import InvalidInput, MissingExtra

_MODELS: dict[str, tuple[str, str, int, dict[str, Any]]] = {
    # family: (kind, registered name, image size, what is made smaller)
    "vit": ("vit", "vit_tiny_patch16_224", 32, {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}),
    "deit_distilled": (
        "vit",
        "deit_tiny_distilled_patch16_224",
        32,
        {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2},
    ),
    "beit": ("vit", "beit_base_patch16_224", 32, {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}),
    "eva": ("vit", "eva02_tiny_patch14_224", 28, {"img_size": 28, "patch_size": 7, "embed_dim": 48, "depth": 4, "num_heads": 2}),
    "cait": ("vit", "cait_xxs24_224", 32, {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}),
    "xcit": ("vit", "xcit_nano_12_p16_224", 64, {"img_size": 64, "embed_dim": 32, "depth": 4, "num_heads": 2}),
    "volo": ("vit", "volo_d1_224", 64, {"img_size": 64}),
    "tnt": ("vit", "tnt_s_patch16_224", 32, {"img_size": 32, "embed_dim": 32, "inner_dim": 8, "depth": 4, "num_heads_outer": 2}),
    "hiera": ("hierarchical", "hiera_tiny_224", 64, {"img_size": (64, 64), "embed_dim": 16, "stages": (1, 1, 2, 1)}),
    "swin": (
        "hierarchical",
        "swin_tiny_patch4_window7_224",
        56,
        {"img_size": 56, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)},
    ),
    "swinv2": (
        "hierarchical",
        "swinv2_tiny_window8_256",
        64,
        {"img_size": 64, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)},
    ),
    "pvt_v2": ("hierarchical", "pvt_v2_b0", 64, {"depths": (1, 1, 1, 1)}),
    "twins": ("hierarchical", "twins_svt_small", 64, {"depths": (1, 1, 2, 1), "embed_dims": (16, 32, 64, 128), "img_size": 64}),
    "mvitv2": ("hierarchical", "mvitv2_tiny", 64, {"img_size": 64}),
    "davit": ("hierarchical", "davit_tiny", 64, {"depths": (1, 1, 1, 1), "embed_dims": (24, 48, 96, 192), "num_heads": (2, 4, 8, 8)}),
    "focalnet": ("hierarchical", "focalnet_tiny_srf", 64, {}),
    "gcvit": ("hierarchical", "gcvit_xxtiny", 64, {"img_size": 64, "window_size": (2, 2, 2, 2)}),
    "nest": ("hierarchical", "nest_tiny", 64, {"img_size": 64}),
    "tiny_vit": ("hierarchical", "tiny_vit_5m_224", 64, {"depths": (1, 1, 2, 1)}),
    "convnext": ("cnn", "convnext_atto", 64, {"depths": (1, 1, 2, 1), "dims": (8, 16, 32, 64)}),
    "convnextv2": ("cnn", "convnextv2_atto", 64, {"depths": (1, 1, 2, 1), "dims": (8, 16, 32, 64)}),
    "resnet": ("cnn", "resnet18", 64, {"layers": (1, 1, 2, 1), "channels": (8, 16, 32, 64)}),
    "resnet_bottleneck": ("cnn", "resnet26", 64, {"layers": (1, 1, 2, 1), "channels": (8, 16, 32, 64)}),
    "eca_resnet": ("cnn", "ecaresnet26t", 64, {"layers": (1, 1, 1, 1)}),
    "sknet": ("cnn", "skresnet18", 64, {"layers": (1, 1, 1, 1)}),
    "res2net": ("cnn", "res2net50_14w_8s", 64, {"layers": (1, 1, 1, 1)}),
    "resnest": ("cnn", "resnest14d", 64, {}),
    "resnetv2": ("cnn", "resnetv2_50", 64, {"layers": (1, 1, 1, 1), "channels": (32, 64, 128, 256)}),
    "regnet": ("cnn", "regnetx_002", 64, {}),
    "densenet": ("cnn", "densenet121", 64, {"block_config": (2, 2, 2, 2), "growth_rate": 8}),
    "vgg": ("cnn", "vgg11_bn", 64, {}),
    "dla": ("cnn", "dla46x_c", 64, {}),
    "dpn": ("cnn", "dpn48b", 64, {"k_sec": (1, 1, 1, 1)}),
    "hrnet": ("cnn", "hrnet_w18_small", 64, {}),
    "inception_v3": ("cnn", "inception_v3", 96, {}),
    "inception_v4": ("cnn", "inception_v4", 96, {}),
    "xception": ("cnn", "legacy_xception", 64, {}),
    "efficientnet": ("cnn", "efficientnet_b0", 64, {}),
    "mobilenetv3": ("cnn", "mobilenetv3_small_050", 64, {}),
    "mobilenetv4": ("cnn", "mobilenetv4_conv_small_035", 64, {}),
    "ghostnetv2": ("cnn", "ghostnetv2_100", 64, {}),
    "repvgg": ("cnn", "repvgg_a0", 64, {}),
    "vovnet": ("cnn", "ese_vovnet19b_slim", 64, {}),
    "hgnetv2": ("cnn", "hgnetv2_b0", 64, {}),
    "starnet": ("cnn", "starnet_s050", 64, {}),
    "nfnet": ("cnn", "nf_regnet_b0", 64, {}),
    "mambaout": ("cnn", "mambaout_femto", 64, {"depths": (1, 1, 2, 1), "dims": (8, 16, 32, 64)}),
    "inception_next": ("cnn", "inception_next_atto", 64, {"depths": (1, 1, 2, 1), "dims": (32, 48, 64, 96)}),
    "mixer": ("mlp", "mixer_s32_224", 64, {"img_size": 64}),
    "resmlp": ("mlp", "resmlp_12_224", 32, {"img_size": 32}),
    "gmlp": ("mlp", "gmlp_ti16_224", 32, {"img_size": 32}),
    "convmixer": ("mlp", "convmixer_768_32", 28, {}),
    "poolformer": ("mlp", "poolformerv2_s12", 64, {}),
    "sequencer": ("mlp", "sequencer2d_s", 64, {"layers": (1, 1, 1, 1), "img_size": 64}),
    "maxvit": ("hybrid", "maxvit_rmlp_pico_rw_256", 64, {"img_size": 64}),
    "coatnet": ("hybrid", "coatnet_nano_rw_224", 64, {"img_size": 64}),
    "mobilevit": ("hybrid", "mobilevit_xxs", 64, {}),
    "levit": ("hybrid", "levit_128s", 64, {"img_size": 64}),
    "efficientformer": ("hybrid", "efficientformer_l1", 224, {"depths": (1, 1, 1, 2)}),
    "efficientvit": ("hybrid", "efficientvit_b0", 64, {}),
    "fastvit": ("hybrid", "fastvit_t8", 64, {"layers": (1, 1, 1, 1)}),
    "edgenext": ("hybrid", "edgenext_xx_small", 64, {}),
    "visformer": ("hybrid", "visformer_tiny", 64, {"img_size": 64}),
    "repvit": ("hybrid", "repvit_m0_9", 64, {}),
    "crossvit": ("hybrid", "crossvit_tiny_240", 240, {}),
    "vit_relpos": (
        "vit",
        "vit_relpos_small_patch16_224",
        32,
        {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2},
    ),
}


def _library() -> Any:
    try:
        import timm
    except ImportError as error:
        raise MissingExtra("timm", "timm", "Making a timm model") from error
    return timm


def version() -> str:
    """Version of the installed timm."""
    return str(_library().__version__)


def families() -> list[Family]:
    """Small random models over timm's architecture families."""

    def builder(name: str, options: dict[str, Any]) -> Callable[[], nn.Module]:
        return lambda: _library().create_model(name, pretrained=False, num_classes=10, **options)

    def images(size: int) -> Callable[[int, int | None], Inputs]:
        return lambda rows, length: Inputs((torch.randn(rows, 3, size, size),))

    return [Family(f"timm/{family}", kind, builder(name, options), images(size)) for family, (kind, name, size, options) in _MODELS.items()]


def example_inputs(model: nn.Module, rows: int = 2) -> tuple[Tensor]:
    """Images for a user's timm model, of the size its ``pretrained_cfg`` declares.

    Raises:
        InvalidInput: the model declares no input size.
    """
    declared = getattr(model, "pretrained_cfg", None) or {}
    size = declared.get("input_size")
    embedding = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if embedding is not None and size is not None:  # the size the model was made with, where it differs from the published one
        height, width = embedding if isinstance(embedding, tuple | list) else (embedding, embedding)
        size = (size[0], int(height), int(width))
    if size is None:
        raise InvalidInput(f"{type(model).__name__} declares no pretrained_cfg['input_size']; pass an example instead.")
    return (torch.randn(rows, *size),)
