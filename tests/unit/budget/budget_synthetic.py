"""Small synthetic traces whose scores are given."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from offramp.core.parts import part_key
from offramp.core.trace import LatencyTable, Trace


@dataclass(frozen=True)
class Given:
    """A rule whose scores are recorded in the trace."""

    bounds: tuple[float, float] | None = (0.0, 1.0)
    stateful: bool = False
    needs_hidden: bool = True


RULE = Given()


def trace_of(
    scores: torch.Tensor, losses: torch.Tensor | None, cost: list[float] | None = None, rule: Given = RULE, **fields: object
) -> Trace:
    """A trace with these scores ``[N, K]``; an answer is class 0 when right and class 1 when wrong."""
    n, exits = scores.shape
    predictions = torch.zeros(n, exits, dtype=torch.int64) if losses is None else (losses > 0.5).to(torch.int64)
    fields.setdefault("predictions", predictions)
    return Trace(
        exits=tuple([f"e{k}" for k in range(exits - 1)] + ["output"]),
        cost=torch.tensor(cost or [float(k + 1) for k in range(exits)], dtype=torch.float64),
        base_cost=float(cost[-1] if cost else exits),
        losses=losses,
        recorded={part_key(rule): scores},
        fingerprint="f00d",
        **fields,  # type: ignore[arg-type]
    )


def synthetic(n: int, exits: int = 4, seed: int = 0, *, uneven: bool = True, **fields: object) -> Trace:
    """Deeper exits are right on harder items; scores follow correctness with noise, on a scale that differs between exits if uneven."""
    g = torch.Generator().manual_seed(seed)
    difficulty = torch.rand(n, 1, generator=g)
    depth = torch.arange(1, exits + 1) / exits
    margin = 2.5 * (0.3 + 0.7 * depth - difficulty)
    losses = (torch.rand(n, exits, generator=g) > torch.sigmoid(4 * margin)).float()
    scale = torch.linspace(3.0, 1.0, exits) if uneven else torch.ones(exits)
    scores = torch.sigmoid(scale * (2 * margin + 0.7 * torch.randn(n, exits, generator=g))).clamp(1e-6, 1 - 1e-6)
    return trace_of(scores, losses, **fields)  # type: ignore[arg-type]


def latency(exits: int) -> LatencyTable:
    """1 ms a segment at batch 1, 2 ms at batch 8; heads 0.1 ms; synchronisation 0.2 ms."""
    segment = torch.tensor([[1.0, 2.0]] * exits, dtype=torch.float64)
    head = torch.tensor([[0.1, 0.1]] * (exits - 1) + [[0.0, 0.0]], dtype=torch.float64)
    return LatencyTable((1, 8), segment, head, torch.zeros(2, dtype=torch.float64), 0.2, "test")
