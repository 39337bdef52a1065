"""One row per system: a tiny backbone, inputs for it and arguments of the builder. Nothing else is needed to test a system.

Rows of language models have prompts as inputs, and Llamas of eight blocks with random weights: drafts are bad, which losslessness must not
mind. Rows of denoisers have noise and class labels as inputs, for a diffusion transformer of four blocks with loud random weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from offramp.cli.nets import ConvNet, TextTransformer


@dataclass(frozen=True)
class Case:
    """A row.

    Attributes:
        system: name of the system.
        model: makes the backbone, the same each time.
        inputs: ``(rows, seed) -> inputs`` as the model takes them: a tensor, or a mapping of keyword inputs; for language models prompts of
            different lengths, lists of token ids.
        classes: width of the answer.
        kwargs: arguments of the system's builder.
    """

    system: str
    model: Callable[[], nn.Module]
    inputs: Callable[[int, int], Any]
    classes: int = 4
    kwargs: Mapping[str, Any] = field(default_factory=dict)


def conv() -> nn.Module:
    """Residual network of six blocks over 8x8 maps."""
    torch.manual_seed(0)
    return ConvNet(channels=1, classes=4, depth=6, width=4).eval()


def images(rows: int, seed: int) -> Any:
    """``[rows, 1, 8, 8]``."""
    return torch.randn(rows, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def encoder() -> nn.Module:
    """Text encoder of six blocks."""
    torch.manual_seed(0)
    return TextTransformer(vocabulary=30, classes=4, depth=6, width=16, heads=2, length=12, dropout=0.0).eval()


def texts(rows: int, seed: int) -> Any:
    """Token ids of different lengths, padded to 12."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 30, (rows, 12), generator=generator)
    lengths = torch.randint(3, 13, (rows, 1), generator=generator)
    mask = (torch.arange(12) < lengths).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


BLOCKS, VOCABULARY = 8, 41


def llama() -> nn.Module:
    """Causal language model of eight blocks, its weights stirred so that exits and the model do not agree by chance alone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=BLOCKS, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def prompts(rows: int, seed: int) -> Any:
    """Lists of 3 to 12 token ids."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 13, (rows,), generator=generator).tolist()
    return [torch.randint(0, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def dit() -> nn.Module:
    """Diffusion transformer of four blocks, each of which changes the state by much."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=4, sample_size=8, patch_size=2,
        num_embeds_ada_norm=10, norm_num_groups=4,
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def noises(rows: int, seed: int) -> Any:
    """Noise ``[rows, 4, 8, 8]`` and the denoiser's other inputs."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 10, (rows,), generator=generator)
    return {"noise": torch.randn(rows, 4, 8, 8, generator=generator), "inputs": {"class_labels": labels}}


def _images(system: str, **kwargs: Any) -> Case:
    return Case(system, dit, noises, 4, kwargs)


def _text(system: str, **kwargs: Any) -> Case:
    return Case(system, llama, prompts, VOCABULARY, kwargs)


CASES: tuple[Case, ...] = (
    Case("branchynet", conv, images),
    _text("calm", threshold=0.1),
    _text("ee-llm", threshold=0.1),
    Case("eero", conv, images),
    _text("elastic-cache", drift=0.995, window=4, confidence=0.06),
    _text("eesd"),
    _text("free", blocks=BLOCKS, exit_after=2),
    _text("kangaroo"),
    _text("layerskip", blocks=BLOCKS, exit_after=2),
    Case("msdnet-budget", conv, images),
    Case("pabee", encoder, texts, kwargs={"patience": 2}),
    _text("self-supervised-early-exits"),
    _text("skipdecode", blocks=BLOCKS, length=24),
    _text("sorted-llama"),
    _images("deediff", theta=0.5),
    _images("deepcache", interval=2),
    _images("ee-diffusion"),
    _images("few-steps", share=0.6),
    _images("first-block-cache", change=0.4),
    _images("latte-flow", groups=2),
    _images("random-skip"),
    _images("ras", ratio=0.5, first=1, resets=(3,), multiple=1),
    _images("shallow"),
    _images("static-schedule"),
)
