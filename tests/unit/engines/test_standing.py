"""Weights that move are seen to have moved, values that change are not; nothing is kept alive for it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from offramp.engines.standing import standing


def made() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Sequential(nn.Linear(3, 2)))


def _other(module: nn.Sequential) -> None:
    module[2][0] = nn.Linear(3, 2)


def _other_without_weights(module: nn.Sequential) -> None:
    module[2] = nn.Sequential(module[2][0])


def _hook(module: nn.Sequential) -> None:
    module[0].register_forward_pre_hook(lambda *_: None)


def _data(module: nn.Sequential) -> None:
    module[0].bias.data = module[0].bias.data.clone()


def _buffer(module: nn.Sequential) -> None:
    module[1].running_mean = module[1].running_mean.clone()


def _part_of_two(module: nn.Sequential) -> None:
    module[0].weight.b = module[0].weight.b.clone()


@pytest.mark.parametrize(
    "change", [_other, _other_without_weights, _hook, _data, _buffer, nn.Module.double, nn.Module.bfloat16], ids=lambda c: c.__name__
)
def test_what_moves(change: Callable[[nn.Sequential], object]) -> None:
    module = made()
    before = list(standing(module))
    assert before == list(standing(module))
    change(module)
    assert before != list(standing(module)) and list(standing(module)) == list(standing(module))


def test_what_does_not() -> None:
    module = made()
    before = list(standing(module))
    module(torch.randn(4, 3)).sum().backward()
    torch.optim.SGD(module.parameters(), lr=0.1).step()
    module.load_state_dict(made().state_dict())
    module.eval().requires_grad_(False)
    assert before == list(standing(module))


def test_tensors_of_tensors() -> None:
    """As quantised weights are."""
    module = made()
    module[0].weight = nn.Parameter(TwoTensor(torch.ones(3, 3), torch.ones(3, 3)))
    before = list(standing(module))
    assert before == list(standing(module))
    _part_of_two(module)
    assert before != list(standing(module))


def test_nothing_is_kept_alive() -> None:
    module = made()
    before, seen = list(standing(module)), weakref.ref(module[0].weight)
    del module
    gc.collect()
    assert seen() is None and before
