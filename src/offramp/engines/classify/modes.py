"""How the classify engine may run: the three modes, as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Latency:
    """One batch at a time, back as soon as possible.

    Attributes:
        batch_size: rows a batch usually has: what the engine measures and decides for. Other sizes run too.
        compact: gather survivors: ``None`` = where measurements say it pays, ``True`` = always, ``False`` = never (for comparison).
    """

    batch_size: int = 1
    compact: bool | None = None


@dataclass(frozen=True)
class Throughput:
    """A stream of inputs of any batch size, each stage run on full buckets; results come in input order.

    Attributes:
        bucket: rows a stage runs on.
        backlog: inputs admitted before the oldest must be finished, in buckets; bounds memory and the wait of a hard input.
    """

    bucket: int = 64
    backlog: int = 8


@dataclass(frozen=True)
class Quota:
    """A fixed number of rows leaves at each exit: the best-scoring ones of the batch, by the plan's shares.

    Answers depend on batch mates. Shapes are static, nothing waits for the host, and the budget is met exactly.

    Attributes:
        batch_size: rows a batch usually has.
    """

    batch_size: int = 32


Mode = Latency | Throughput | Quota


def quota_sizes(shares: Sequence[float], batch: int) -> list[int]:
    """Rows left after each exit, ``round(batch * (1 - cumulative share))``, never rising; one entry per early exit."""
    left = 1.0
    sizes: list[int] = []
    for share in shares[:-1]:
        left -= share
        sizes.append(max(0, min(round(batch * left), sizes[-1] if sizes else batch)))
    return sizes
