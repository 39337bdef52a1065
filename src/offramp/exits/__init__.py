"""Heads and where they go, as data."""

from offramp.exits.linear import AutoPool, MeanPool, PooledLinear, TokenPool
from offramp.exits.placement import Evenly, EveryBlock, Fractions

PARTS: dict[str, type] = {c.__name__: c for c in (AutoPool, MeanPool, PooledLinear, TokenPool, Evenly, EveryBlock, Fractions)}
"""Every part of this folder by name: what a saved file may name."""

__all__ = [*PARTS, "PARTS"]
