"""A small model and small data on disk, and a way to call the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from offramp.cli import app

MODEL = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x):
        return x + torch.relu(self.linear(x))


def make(num_classes=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Sequential(*[Block() for _ in range(4)]), nn.Linear(16, num_classes))


def not_a_model():
    return 3


def needs_more(width, depth, num_classes=3, **rest):
    return make(num_classes)
"""


@pytest.fixture
def offramp() -> Callable[..., Result]:
    """``offramp("fit", "--epochs", 2)`` runs the command in this process."""
    runner = CliRunner()

    def call(*words: object) -> Result:
        result = runner.invoke(app, [str(w) for w in words], env={"COLUMNS": "200", "TERM": "dumb"})
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return call


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``net.py`` (a model) and ``points.npz`` (600 points of three overlapping classes)."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "net.py").write_text(MODEL)
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, 3, (600,), generator=generator)
    centres = torch.randn(3, 8, generator=generator)
    x = centres[y] + 0.9 * torch.randn(600, 8, generator=generator)
    np.savez(folder / "points.npz", x=x.numpy(), y=y.numpy())
    return folder
