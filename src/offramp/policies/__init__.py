"""Rules: a score per (exit, item), higher = readier to leave, and how scores combine."""

from offramp.policies.threshold import Confidence, Energy, Entropy, Margin

PARTS: dict[str, type] = {c.__name__: c for c in (Confidence, Energy, Entropy, Margin)}
"""Every rule by name: what a saved plan may name."""

__all__ = [*PARTS, "PARTS"]
