"""Rules: a score per (exit, item), higher = readier to leave, and how scores combine."""

from offramp.policies.agreement import OutputStability, Patience, StateSimilarity
from offramp.policies.combine import After, AllOf, AnyOf, At, Tempered, after, all_of, any_of, at
from offramp.policies.decoding import Accept, CatchUp, Copy, Decaying, Plain, Recompute, Scheduled, Verify
from offramp.policies.learned import HaltingCDF, LearnedGate, PredictedUncertainty, Selector, StateGate
from offramp.policies.schedule import FixedExit, Schedule
from offramp.policies.threshold import Confidence, Energy, Entropy, Margin

PARTS: dict[str, type] = {
    c.__name__: c
    for c in (
        *(Confidence, Margin, Entropy, Energy),
        *(Patience, OutputStability, StateSimilarity),
        *(Schedule, FixedExit),
        *(LearnedGate, StateGate, PredictedUncertainty, HaltingCDF, Selector),
        *(AnyOf, AllOf, At, After, Tempered),
    )
}
"""Every rule by name: what a saved plan may name."""

WAYS: dict[str, type] = {c.__name__: c for c in (Plain, Verify, Accept, Scheduled, CatchUp, Recompute, Copy, Decaying)}
"""Ways of decoding, and what they are made of, by name."""

__all__ = [*PARTS, *WAYS, "PARTS", "WAYS", "after", "all_of", "any_of", "at"]
