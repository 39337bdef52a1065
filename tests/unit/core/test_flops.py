"""Counted FLOPs of operations whose count is known by hand."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from offramp.core.flops import count_flops


def test_known_counts():
    assert count_flops(nn.Linear(5, 7), torch.randn(3, 5)) == 2 * 3 * 5 * 7
    assert count_flops(nn.Conv2d(2, 4, 3, padding=1, bias=False), torch.randn(3, 2, 8, 8)) == 2 * 3 * 4 * 8 * 8 * 2 * 9
    assert count_flops(nn.Conv2d(4, 4, 3, groups=4, bias=False), torch.randn(1, 4, 5, 5)) == 2 * 4 * 3 * 3 * 9
    assert count_flops(nn.ReLU(), torch.randn(3)) == 0
    assert count_flops(nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 2)), torch.randn(1, 5)) == 2 * (5 * 7 + 7 * 2)
    assert count_flops(torch.bmm, torch.randn(2, 3, 4), torch.randn(2, 4, 5)) == 2 * 2 * 3 * 4 * 5


def test_attention_is_counted_on_the_cpu():
    """Two products per head: queries with keys, weights with values, also where the lengths differ."""
    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)
    assert count_flops(F.scaled_dot_product_attention, q, k, v) == 2 * 2 * 3 * 5 * 7 * (8 + 8)
    mask = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    assert count_flops(F.scaled_dot_product_attention, q, k, v, attn_mask=mask) == 2 * 2 * 3 * 5 * 7 * (8 + 8)


def test_counting_records_no_gradient():
    layer = nn.Linear(2, 2)
    made = []
    count_flops(lambda x: made.append(layer(x)), torch.randn(1, 2))
    assert not made[0].requires_grad
