"""A model so small that deciding costs more than running it is run as it is, and that is said. Times are given, not taken."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from offramp.core.certificate import Plan
from offramp.core.errors import NoSavingWarning
from offramp.engines.classify import engine as classify
from offramp.engines.classify.engine import Latency, compile
from offramp.network import attach
from offramp.policies import Confidence


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)])
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(x))


def test_deciding_costs_more_than_running(monkeypatch):
    monkeypatch.setattr(classify, "whole_ms", lambda *_: 0.0)
    torch.manual_seed(0)
    net = attach(Tiny().eval(), ["blocks.0", "blocks.1"], example=torch.randn(2, 4)).eval()
    plan = Plan(Confidence(), net.names, (0.5, 0.5, float("-inf")), (0.3, 0.3, 0.4), 0.0, fingerprint=net.fingerprint())
    with pytest.warns(NoSavingWarning, match="runs as it is"):
        run = compile(net, plan, Latency(8))
    assert run.table is not None and not any(run.decide)
    x = torch.randn(8, 4)
    with torch.no_grad():
        assert torch.equal(run(x).output, net.model(x))
