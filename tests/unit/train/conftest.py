"""A small model with everything that makes resuming hard: dropout, batch norm, exits that differ."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from offramp.network import MultiExit, attach


def blocks(dropout: float = 0.0, norm: bool = True, depth: int = 4) -> nn.Sequential:
    layers = [
        nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8) if norm else nn.Identity(), nn.Tanh(), nn.Dropout(dropout)) for _ in range(depth)
    ]
    return nn.Sequential(*layers, nn.Linear(8, 3))


@pytest.fixture
def make() -> Callable[..., MultiExit]:
    def build(dropout: float = 0.0, norm: bool = True, depth: int = 4, seed: int = 0, at: tuple[str, ...] = ("0", "2")) -> MultiExit:
        torch.manual_seed(seed)
        return attach(blocks(dropout, norm, depth), at=list(at), example=torch.randn(2, 8))

    return build


@pytest.fixture
def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(50, 8, generator=generator)
    return inputs, inputs[:, :3].argmax(1)
