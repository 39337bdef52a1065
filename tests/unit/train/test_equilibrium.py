"""Gradient equilibrium: forward bit for bit, backward the mean of the exits."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from offramp.core.protocols import Head
from offramp.network import attach
from offramp.train.equilibrium import equilibrium


class Copy(Head):
    def forward(self, hidden, previous=()):
        return hidden * 1.0


class Block(nn.Module):
    """Identity with a parameter, so that every exit has the same gradient."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(4))

    def forward(self, x):
        return x + self.shift


class Net(nn.Module):
    def __init__(self, depth, checkpointed=False):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.checkpointed = checkpointed

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed and self.training else block(x)
        return x


def network(depth, checkpointed=False):
    return attach(
        Net(depth, checkpointed),
        at=[f"blocks.{i}" for i in range(depth - 1)],
        example=torch.randn(2, 4),
        head=[Copy() for _ in range(depth - 1)],
    )


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("depth", [2, 3, 6])
def test_equal_heads_give_every_layer_the_gradient_of_one(depth, checkpointed):
    net = network(depth, checkpointed)
    net.train()
    x = torch.randn(5, 4)
    grad = torch.randn(5, 4)

    def gradients():
        net.zero_grad()
        logits = net(x)
        sum((z * grad).sum() for z in logits).backward()
        return logits, [b.shift.grad.clone() for b in net.model.blocks]

    plain_logits, plain = gradients()
    with equilibrium(net):
        logits, balanced = gradients()
    for a, b in zip(plain_logits, logits, strict=True):
        assert torch.equal(a, b)
    for k in range(depth):
        torch.testing.assert_close(plain[k], (depth - k) * grad.sum(0))  # a sum of depth - k terms
        torch.testing.assert_close(balanced[k], grad.sum(0))  # their mean


def test_factors_are_those_of_the_paper():
    """Against the two-scale form: 1/(K-k) before the head branches off, K-k-1 on the trunk after it."""
    torch.manual_seed(0)
    net = attach(
        nn.Sequential(*[nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4)], nn.Linear(6, 3)),
        at=["0", "1", "2"],
        example=torch.randn(2, 6),
    )
    x, exits = torch.randn(7, 6), 4

    def scaled(value, factor):
        return value.detach() * (1 - factor) + value * factor

    with equilibrium(net):
        sum(z.square().sum() for z in net(x)).backward()
    got = {n: p.grad.clone() for n, p in net.named_parameters()}
    net.zero_grad()
    hidden, total = x, 0.0
    for k in range(3):
        hidden = scaled(net.model[k](hidden), 1 / (exits - k))
        total = total + net.heads[k](hidden).square().sum()
        hidden = scaled(hidden, exits - k - 1)
    total = total + net.model[4](net.model[3](hidden)).square().sum()
    total.backward()
    for name, p in net.named_parameters():
        torch.testing.assert_close(got[name], p.grad, msg=name)


def test_undone_on_leaving_also_after_an_error():
    net = network(3)
    with pytest.raises(RuntimeError), equilibrium(net):
        raise RuntimeError
    assert net.state_transform is None
    assert not any(h._forward_pre_hooks for h in net.heads)
