"""Training: recipes as data and one small loop on accelerate."""

from offramp.budget.depth_schedule import LinearDepth
from offramp.train.averaging import Averaged
from offramp.train.denoising import DenoisingView, ExitsView, PlanView, add_heads
from offramp.train.denoising_recipes import TIME_EMBEDDERS, Holding, ScheduledDepth, UncertaintyAware, layer_groups
from offramp.train.gates import BestDepth, Gates, Lesson, Ponder, PredictLoss, TargetExit, Wrongness
from offramp.train.loop import FitResult, fit, load_best
from offramp.train.losses import CrossEntropy, ItemLoss, MeanSquared, NonFiniteLoss
from offramp.train.metrics import read_metrics
from offramp.train.noising import NoisePrediction, Noising, Process, RectifiedFlow, VelocityPrediction, linear_betas, noisy_loader
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
        Holding, ScheduledDepth, UncertaintyAware,
    )
}  # fmt: skip
"""Every part of this folder by name: what a saved recipe may name (a rule inside of `Gates` comes from `offramp.policies.PARTS`)."""

__all__ = [
    *PARTS,
    "PARTS",
    "TIME_EMBEDDERS",
    "Averaged",
    "DenoisingView",
    "ExitsView",
    "FitResult",
    "ItemLoss",
    "Lesson",
    "NoisePrediction",
    "Noising",
    "NonFiniteLoss",
    "Objective",
    "PlanView",
    "Process",
    "Recipe",
    "RectifiedFlow",
    "Seen",
    "VelocityPrediction",
    "Weights",
    "add_heads",
    "fit",
    "layer_groups",
    "linear_betas",
    "load_best",
    "noisy_loader",
    "packed",
    "read_metrics",
    "text_loader",
    "texts_in",
]
