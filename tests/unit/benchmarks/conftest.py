"""The benchmarks' scripts as modules, and traces that need no model."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from offramp.core.parts import part_key
from offramp.core.protocols import Rule
from offramp.core.trace import Trace
from offramp.policies import Confidence

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"


@pytest.fixture(scope="session")
def script() -> Callable[[str], ModuleType]:
    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def made_up() -> Callable[..., Trace]:
    """Two early exits and an answer: confident items are right more often, deeper exits too."""

    def make(items: int, seed: int, rule: Rule | None = None) -> Trace:
        g = torch.Generator().manual_seed(seed)
        skill = torch.rand(items, 1, generator=g)
        right = torch.rand(items, 3, generator=g) < skill * 0.4 + torch.tensor([0.5, 0.55, 0.6])
        scores = 0.5 + 0.45 * skill + 0.05 * torch.rand(items, 3, generator=g)
        return Trace(
            exits=("blocks.0", "blocks.1", "output"),
            cost=torch.tensor([110.0, 220.0, 320.0], dtype=torch.float64),
            base_cost=300.0,
            predictions=(~right).long(),
            losses=(~right).float(),
            labels=torch.zeros(items, dtype=torch.long),
            logits=torch.zeros(items, 3, 2),
            recorded={part_key(rule or Confidence()): scores},
        )

    return make
