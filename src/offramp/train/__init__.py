"""Training: recipes as data and one small loop on accelerate."""

from offramp.budget.depth_schedule import LinearDepth
from offramp.train.gates import BestDepth, Gates, Lesson, Ponder, PredictLoss, TargetExit, Wrongness
from offramp.train.loop import FitResult, fit, load_best
from offramp.train.losses import CrossEntropy, ItemLoss, MeanSquared, NonFiniteLoss
from offramp.train.metrics import read_metrics
from offramp.train.recipe import (
    Alternating,
    Distill,
    EarlyWeighted,
    Equal,
    Explicit,
    FinalOnly,
    Frozen,
    IndexWeighted,
    Joint,
    Objective,
    Ramp,
    Recipe,
    Seen,
    ToLast,
    ToNext,
    TwoStage,
    Weights,
)
from offramp.train.text import NextToken, packed, text_loader, texts_in
from offramp.train.text_recipes import (
    Always,
    EarlyExitLoss,
    Gradual,
    LayerDropout,
    Mean,
    Rotating,
    ShallowDeep,
    Skipping,
    Warmed,
)

PARTS: dict[str, type] = {
    c.__name__: c
    for c in (
        Alternating, BestDepth, CrossEntropy, Distill, EarlyWeighted, Equal, Explicit, FinalOnly, Frozen, Gates, IndexWeighted, Joint,
        MeanSquared, NextToken, Ponder, PredictLoss, Ramp, TargetExit, ToLast, ToNext, TwoStage, Wrongness,
        Always, EarlyExitLoss, Gradual, LayerDropout, LinearDepth, Mean, Rotating, ShallowDeep, Skipping, Warmed,
    )
}  # fmt: skip
"""Every part of this folder by name: what a saved recipe may name (a rule inside of `Gates` comes from `offramp.policies.PARTS`)."""

__all__ = [
    *PARTS,
    "PARTS",
    "FitResult",
    "ItemLoss",
    "Lesson",
    "NonFiniteLoss",
    "Objective",
    "Recipe",
    "Seen",
    "Weights",
    "fit",
    "load_best",
    "packed",
    "read_metrics",
    "text_loader",
    "texts_in",
]
