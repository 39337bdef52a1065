"""Scores of an answer: pure functions ``[B, C] -> [B]``, float32, higher = readier to leave."""

from __future__ import annotations

import torch
from torch import Tensor


def top1(logits: Tensor) -> Tensor:
    """Largest softmax probability, in [1/C, 1] (MSDNet, Huang et al. 2018, section 4)."""
    return torch.softmax(logits.float(), dim=-1).amax(dim=-1)


def margin(logits: Tensor) -> Tensor:
    """Largest minus second largest softmax probability, in [0, 1]."""
    two = torch.softmax(logits.float(), dim=-1).topk(2, dim=-1).values
    return two[..., 0] - two[..., 1]


def negative_entropy(logits: Tensor) -> Tensor:
    """Minus the Shannon entropy in nats, in [-log C, 0] (BranchyNet, Teerapittayanon et al. 2016, section III-C)."""
    log_p = torch.log_softmax(logits.float(), dim=-1)
    return (log_p.exp() * log_p).sum(dim=-1)


def negative_energy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Minus the free energy, ``T * logsumexp(z / T)`` (Liu et al. 2020, equation 4). Unbounded."""
    return temperature * torch.logsumexp(logits.float() / temperature, dim=-1)
