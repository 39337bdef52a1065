"""Families of transformers, and example inputs for a user's model. The only file that imports transformers, inside functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from offramp.backbones.families import Family, Inputs
from offramp.core.errors import InvalidInput, MissingExtra

_VOCABULARY = 99
_SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
_TEXT: dict[str, Any] = {**_SMALL, "vocab_size": _VOCABULARY, "max_position_embeddings": 64, "num_labels": 3}
_IMAGE: dict[str, Any] = {**_SMALL, "image_size": 32, "patch_size": 8, "num_labels": 3}
_STAGES: dict[str, Any] = {"depths": [1, 1, 2, 1], "hidden_sizes": [8, 16, 32, 64], "num_labels": 3}

_TEXT_MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    # family: (model, configuration, its options)
    "bert": ("BertForSequenceClassification", "BertConfig", _TEXT),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", {**_TEXT, "pad_token_id": 1}),
    "xlm_roberta": ("XLMRobertaForSequenceClassification", "XLMRobertaConfig", {**_TEXT, "pad_token_id": 1}),
    "distilbert": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {
            "dim": 32,
            "n_layers": 4,
            "n_heads": 2,
            "hidden_dim": 64,
            "vocab_size": _VOCABULARY,
            "max_position_embeddings": 64,
            "num_labels": 3,
        },
    ),
    "albert": ("AlbertForSequenceClassification", "AlbertConfig", {**_TEXT, "embedding_size": 16}),
    "deberta_v2": (
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        {**_TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16, "share_att_key": True},
    ),
    "electra": ("ElectraForSequenceClassification", "ElectraConfig", {**_TEXT, "embedding_size": 16}),
    "mobilebert": (
        "MobileBertForSequenceClassification",
        "MobileBertConfig",
        {**_TEXT, "embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16},
    ),
    "mpnet": ("MPNetForSequenceClassification", "MPNetConfig", _TEXT),
    "camembert": ("CamembertForSequenceClassification", "CamembertConfig", {**_TEXT, "pad_token_id": 1}),
    "modernbert": (
        "ModernBertForSequenceClassification",
        "ModernBertConfig",
        {**_TEXT, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "convbert": ("ConvBertForSequenceClassification", "ConvBertConfig", {**_TEXT, "embedding_size": 16}),
    "squeezebert": ("SqueezeBertForSequenceClassification", "SqueezeBertConfig", {**_TEXT, "embedding_size": 32}),
    "layoutlm": ("LayoutLMForSequenceClassification", "LayoutLMConfig", _TEXT),
    "fnet": ("FNetForSequenceClassification", "FNetConfig", _TEXT),
    "funnel": (
        "FunnelForSequenceClassification",
        "FunnelConfig",
        {
            "vocab_size": _VOCABULARY,
            "block_sizes": [2, 2],
            "num_decoder_layers": 1,
            "d_model": 32,
            "n_head": 2,
            "d_head": 16,
            "d_inner": 64,
            "num_labels": 3,
        },
    ),
    "xlnet": (
        "XLNetForSequenceClassification",
        "XLNetConfig",
        {"vocab_size": _VOCABULARY, "d_model": 32, "n_layer": 4, "n_head": 2, "d_inner": 64, "num_labels": 3},
    ),
    "t5_encoder": (
        "T5EncoderModel",
        "T5Config",
        {"vocab_size": _VOCABULARY, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 4, "num_heads": 2},
    ),
    "clip_text": (
        "CLIPTextModel",
        "CLIPTextConfig",
        {**_SMALL, "vocab_size": _VOCABULARY, "max_position_embeddings": 64, "eos_token_id": 98, "bos_token_id": 97, "pad_token_id": 1},
    ),
    "gpt2": (
        "GPT2ForSequenceClassification",
        "GPT2Config",
        {
            "vocab_size": _VOCABULARY,
            "n_positions": 64,
            "n_embd": 32,
            "n_layer": 4,
            "n_head": 2,
            "num_labels": 3,
            "pad_token_id": 0,
            "use_cache": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "llama": (
        "LlamaForSequenceClassification",
        "LlamaConfig",
        {**_TEXT, "num_key_value_heads": 2, "pad_token_id": 0, "use_cache": False, "bos_token_id": 1, "eos_token_id": 2},
    ),
}

_IMAGE_MODELS: dict[str, tuple[str, str, str, int, dict[str, Any]]] = {
    # family: (kind, model, configuration, image size, its options)
    "vit": ("vit", "ViTForImageClassification", "ViTConfig", 32, _IMAGE),
    "deit": ("vit", "DeiTForImageClassification", "DeiTConfig", 32, _IMAGE),
    "beit": ("vit", "BeitForImageClassification", "BeitConfig", 32, {**_IMAGE, "use_relative_position_bias": True}),
    "data2vec_vision": ("vit", "Data2VecVisionForImageClassification", "Data2VecVisionConfig", 32, _IMAGE),
    "dinov2": ("vit", "Dinov2ForImageClassification", "Dinov2Config", 32, {**_IMAGE, "mlp_ratio": 2}),
    "clip_vision": ("vit", "CLIPVisionModel", "CLIPVisionConfig", 32, {**_SMALL, "image_size": 32, "patch_size": 8}),
    "siglip_vision": ("vit", "SiglipVisionModel", "SiglipVisionConfig", 32, {**_SMALL, "image_size": 32, "patch_size": 8}),
    "swin": (
        "hierarchical",
        "SwinForImageClassification",
        "SwinConfig",
        32,
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "num_labels": 3},
    ),
    "swinv2": (
        "hierarchical",
        "Swinv2ForImageClassification",
        "Swinv2Config",
        32,
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "num_labels": 3},
    ),
    "segformer": (
        "hierarchical",
        "SegformerForImageClassification",
        "SegformerConfig",
        64,
        {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 48, 64], "num_attention_heads": [1, 2, 2, 4], "num_labels": 3},
    ),
    "pvt": (
        "hierarchical",
        "PvtForImageClassification",
        "PvtConfig",
        64,
        {"image_size": 64, "depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 48, 64], "num_attention_heads": [1, 2, 2, 4], "num_labels": 3},
    ),
    "levit": (
        "hybrid",
        "LevitForImageClassification",
        "LevitConfig",
        64,
        {
            "image_size": 64,
            "hidden_sizes": [16, 32, 48],
            "num_attention_heads": [1, 2, 2],
            "depths": [2, 2, 2],
            "key_dim": [8, 8, 8],
            "num_labels": 3,
        },
    ),
    "convnext": ("cnn", "ConvNextForImageClassification", "ConvNextConfig", 64, _STAGES),
    "convnextv2": ("cnn", "ConvNextV2ForImageClassification", "ConvNextV2Config", 64, _STAGES),
    "resnet": ("cnn", "ResNetForImageClassification", "ResNetConfig", 64, {**_STAGES, "embedding_size": 16}),
    "regnet": ("cnn", "RegNetForImageClassification", "RegNetConfig", 64, {**_STAGES, "embedding_size": 16, "groups_width": 8}),
    "bit": ("cnn", "BitForImageClassification", "BitConfig", 64, {**_STAGES, "hidden_sizes": [128, 128, 256, 256], "embedding_size": 32}),
    "poolformer": ("mlp", "PoolFormerForImageClassification", "PoolFormerConfig", 64, _STAGES),
    "mobilenet_v2": ("cnn", "MobileNetV2ForImageClassification", "MobileNetV2Config", 64, {"depth_multiplier": 0.35, "num_labels": 3}),
    "yolos": (
        "detection",
        "YolosForObjectDetection",
        "YolosConfig",
        32,
        {**_SMALL, "image_size": [32, 32], "patch_size": 8, "num_detection_tokens": 5, "num_labels": 3},
    ),
    "rt_detr_resnet": (
        "detection",
        "RTDetrResNetBackbone",
        "RTDetrResNetConfig",
        64,
        {"depths": [1, 1, 2, 1], "hidden_sizes": [16, 24, 32, 48], "embedding_size": 16, "out_features": ["stage2", "stage3", "stage4"]},
    ),
    "dpt": (
        "dense",
        "DPTForDepthEstimation",
        "DPTConfig",
        32,
        {
            **_SMALL,
            "image_size": 32,
            "patch_size": 8,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [8, 16, 16, 32],
            "fusion_hidden_size": 16,
        },
    ),
}


def _library() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtra("transformers", "hf", "Making a transformers model") from error
    return transformers


def version() -> str:
    """Version of the installed transformers."""
    return str(_library().__version__)


def _text(rows: int, length: int | None) -> Inputs:
    """Token ids with right padding: the mask crosses every cut, and the rows differ in length."""
    size = length or 12
    ids = torch.randint(3, _VOCABULARY - 3, (rows, size))
    mask = torch.ones(rows, size, dtype=torch.long)
    for row in range(rows):
        mask[row, size - row % 4 :] = 0
    return Inputs((), {"input_ids": ids, "attention_mask": mask})


_MASKLESS = ("fnet",)  # mixes tokens by Fourier transforms and takes no mask


def _ids(rows: int, length: int | None) -> Inputs:
    return Inputs((), {"input_ids": _text(rows, length).kwargs["input_ids"]})


def _images(size: int) -> Callable[[int, int | None], Inputs]:
    return lambda rows, length: Inputs((), {"pixel_values": torch.randn(rows, 3, size, size)})


def _builder(model: str, configuration: str, options: dict[str, Any]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        library = _library()
        made: nn.Module = getattr(library, model)(getattr(library, configuration)(**options))
        return made

    return build


def _audio_families() -> list[Family]:
    wave: dict[str, Any] = {
        **_SMALL,
        "vocab_size": 32,
        "conv_dim": (16, 16),
        "conv_kernel": (10, 3),
        "conv_stride": (5, 2),
        "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 2,
        "classifier_proj_size": 16,
        "num_labels": 3,
        "mask_time_prob": 0.0,
    }

    def waves(rows: int, length: int | None) -> Inputs:
        return Inputs((), {"input_values": torch.randn(rows, 400)})

    def spectrograms(name: str, *shape: int) -> Callable[[int, int | None], Inputs]:
        return lambda rows, length: Inputs((), {name: torch.randn(rows, *shape)})

    return [
        Family("transformers/wav2vec2", "audio", _builder("Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", wave), waves),
        Family("transformers/hubert", "audio", _builder("HubertForSequenceClassification", "HubertConfig", wave), waves),
        Family(
            "transformers/ast",
            "audio",
            _builder(
                "ASTForAudioClassification",
                "ASTConfig",
                {**_SMALL, "patch_size": 8, "max_length": 32, "num_mel_bins": 16, "frequency_stride": 8, "time_stride": 8, "num_labels": 3},
            ),
            spectrograms("input_values", 32, 16),
        ),
        Family(
            "transformers/whisper_encoder",
            "audio",
            _builder(
                "WhisperForAudioClassification",
                "WhisperConfig",
                {
                    "vocab_size": _VOCABULARY,
                    "num_mel_bins": 8,
                    "d_model": 32,
                    "encoder_layers": 4,
                    "encoder_attention_heads": 2,
                    "encoder_ffn_dim": 64,
                    "decoder_layers": 1,
                    "decoder_attention_heads": 2,
                    "decoder_ffn_dim": 64,
                    "max_source_positions": 16,
                    "num_labels": 3,
                    "pad_token_id": 0,
                    "bos_token_id": 1,
                    "eos_token_id": 2,
                    "decoder_start_token_id": 1,
                    "use_cache": False,
                },
            ),
            spectrograms("input_features", 8, 32),
        ),
    ]


def _other_families() -> list[Family]:
    def detr() -> nn.Module:
        library = _library()
        backbone = library.ResNetConfig(**{**_STAGES, "embedding_size": 16, "out_features": ["stage4"]})
        options = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
        widths = {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_queries": 5, "num_labels": 3}
        config = library.DetrConfig(
            use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone, **options, **widths
        )
        made: nn.Module = library.DetrForObjectDetection(config)
        return made

    def videos(rows: int, length: int | None) -> Inputs:
        return Inputs((), {"pixel_values": torch.randn(rows, 4, 3, 16, 16)})

    return [
        Family("transformers/detr", "detection", detr, _images(64)),
        Family(
            "transformers/videomae",
            "video",
            _builder(
                "VideoMAEForVideoClassification",
                "VideoMAEConfig",
                {**_SMALL, "image_size": 16, "patch_size": 8, "num_frames": 4, "tubelet_size": 2, "num_labels": 3},
            ),
            videos,
        ),
        Family(
            "transformers/timesformer",
            "video",
            _builder(
                "TimesformerForVideoClassification",
                "TimesformerConfig",
                {**_SMALL, "image_size": 16, "patch_size": 8, "num_frames": 4, "num_labels": 3},
            ),
            videos,
        ),
    ]


def families() -> list[Family]:
    """Small random models over transformers' encoder, vision, audio and detection families."""
    text = [
        Family(f"transformers/{n}", "text", _builder(*spec), _ids if n in _MASKLESS else _text, lengths=(9, 17))
        for n, spec in _TEXT_MODELS.items()
    ]
    image = [
        Family(f"transformers/{n}", kind, _builder(model, configuration, options), _images(size))
        for n, (kind, model, configuration, size, options) in _IMAGE_MODELS.items()
    ]
    return text + image + _audio_families() + _other_families()


def example_inputs(model: nn.Module, rows: int = 2, length: int = 16) -> dict[str, Tensor]:
    """Keyword inputs for a user's transformers model, from its configuration and ``main_input_name``.

    Args:
        model: a text, image, audio (waveform) or spectrogram model.
        rows: batch size.
        length: tokens of a text, at most what the model takes.

    Raises:
        InvalidInput: the model names an input of another kind; pass an example instead.
    """
    config: Any = getattr(model, "config", None)
    name = getattr(model, "main_input_name", None)
    if name == "input_ids" and getattr(config, "vocab_size", None):
        size = min(length, int(getattr(config, "max_position_embeddings", length) or length))
        ids = torch.randint(0, int(config.vocab_size), (rows, size))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name == "pixel_values" and getattr(config, "image_size", None):
        size_ = config.image_size
        height, width = size_ if isinstance(size_, tuple | list) else (size_, size_)
        return {"pixel_values": torch.randn(rows, int(getattr(config, "num_channels", 3)), int(height), int(width))}
    if name == "input_values" and getattr(config, "num_mel_bins", None):
        return {"input_values": torch.randn(rows, int(config.max_length), int(config.num_mel_bins))}
    if name == "input_values":
        return {"input_values": torch.randn(rows, 16000)}
    raise InvalidInput(f"{type(model).__name__} takes {name!r}, whose shape its configuration does not tell; pass an example instead.")


def register_attention(name: str, function: Callable[..., Any]) -> None:
    """Make an attention function known to transformers under a name. No model uses it unless its configuration says so.

    Raises:
        MissingExtra: transformers is not installed.
    """
    try:
        from transformers import AttentionInterface
    except ImportError as error:
        raise MissingExtra("transformers", "hf", "Decoding a language model") from error
    AttentionInterface.register(name, function)


def tokenizer_beside(model: nn.Module) -> Any:
    """The tokenizer saved where a model of transformers was loaded from, as far as that is on this machine; else ``None``."""
    where = getattr(model, "name_or_path", "")
    if not where:
        return None
    try:
        return _library().AutoTokenizer.from_pretrained(where, local_files_only=True)
    except (OSError, ValueError, KeyError):  # there is none, or it is not on this machine: who needs one asks for it
        return None
