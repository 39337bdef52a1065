"""One row per system: a tiny backbone, inputs for it and arguments of the builder. Nothing else is needed to test a system."""

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
        inputs: ``(rows, seed) -> inputs`` as the model takes them: a tensor, or a mapping of keyword inputs.
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


CASES: tuple[Case, ...] = (
    Case("branchynet", conv, images),
    Case("eero", conv, images),
    Case("msdnet-budget", conv, images),
    Case("pabee", encoder, texts, kwargs={"patience": 2}),
)
