"""Scores of an answer: pure functions, float32, higher = readier to leave. Each row's score depends on that row alone."""

from __future__ import annotations

import torch
from torch import Tensor

from offramp.core.errors import InvalidInput

NEVER = float("-inf")
"""Score of a row that cannot leave here: no finite threshold lets it go."""


def _classes(logits: Tensor) -> Tensor:
    """Float32 logits of at least two classes. Contiguous, so that a slice of a trace is summed in the order a batch is."""
    if logits.ndim < 2 or logits.shape[-1] < 2:
        raise InvalidInput(
            f"This score compares classes and needs logits [rows, classes >= 2]; given {tuple(logits.shape)}. For regression use "
            "OutputStability(), Patience(regression_tolerance=...) or PredictedUncertainty."
        )
    return logits.float().contiguous()


def top1(logits: Tensor) -> Tensor:
    """Largest softmax probability ``[B]`` of ``[B, C]``, in [1/C, 1] (MSDNet, Huang et al. 2018, section 4)."""
    return torch.softmax(_classes(logits), dim=-1).amax(dim=-1)


def margin(logits: Tensor) -> Tensor:
    """Largest minus second largest softmax probability ``[B]`` of ``[B, C]``, in [0, 1]."""
    two = torch.softmax(_classes(logits), dim=-1).topk(2, dim=-1).values
    return two[..., 0] - two[..., 1]


def negative_entropy(logits: Tensor) -> Tensor:
    """Minus the Shannon entropy in nats, in [-log C, 0] (BranchyNet, Teerapittayanon et al. 2016, section III-C)."""
    log_p = torch.log_softmax(_classes(logits), dim=-1)
    p = log_p.exp()
    return torch.where(p > 0, p * log_p, 0.0).sum(dim=-1)  # a class that is ruled out (logit minus infinity) adds nothing


def negative_energy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Minus the free energy, ``T * logsumexp(z / T)`` (Liu et al. 2020, equation 4). Unbounded."""
    return temperature * torch.logsumexp(_classes(logits) / temperature, dim=-1)


def uncertainty_features(logits: Tensor) -> Tensor:
    """``[B, 4]``: top probability, entropy, margin, entropy of the squared and renormalised probabilities (JEI-DNN, section 4).

    Entropies are in nats.
    """
    clean = _classes(logits)
    return torch.stack([top1(clean), -negative_entropy(clean), margin(clean), -negative_entropy(2 * clean)], dim=-1)


def as_values(logits: Tensor) -> Tensor:
    """Float32 ``[B, D]`` of an answer read as numbers: ``[B]``, ``[B, 1]``, ``[B, C]`` or an action chunk ``[B, T, A]``."""
    return logits.float()[:, None] if logits.ndim == 1 else logits.float().flatten(1)


def halting_distribution(halting: Tensor) -> Tensor:
    """Probability of leaving at each of K exits, ``[B, K]``, from K-1 halting probabilities ``[B, K-1]``.

    ``p_k = lambda_k * prod_{j<k} (1 - lambda_j)``; the last exit takes the rest, so rows sum to 1 (PonderNet, Banino et al. 2021,
    equation 6).
    """
    survival = torch.cumprod(1 - halting, dim=-1)
    before = torch.cat([torch.ones_like(halting[:, :1]), survival], dim=-1)
    return torch.cat([before[:, :-1] * halting, before[:, -1:]], dim=-1)
