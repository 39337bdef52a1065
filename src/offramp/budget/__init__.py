"""Budgets: from a recorded trace and a target to thresholds with a certificate. Array code; no model in memory.

`calibrate` is the verb. `targets` say what is wanted, mean-cost methods and risk procedures say how, `bounds` carry the statistics,
and `replay` answers what given thresholds do. In a sampler, where a decision changes what later steps see, thresholds are found by
running (`step_thresholds`) and schedules over noise levels by exact search (`schedule_search`, `cache_plan`).
"""

from offramp.budget.bounds import WSR, Bentkus, Bound, ClopperPearson, Hoeffding, HoeffdingBentkus, Sample
from offramp.budget.cache_plan import CacheChoice, CachePlan, best_cache_plan, cache_front, power_plan, uniform_plan
from offramp.budget.calibrate import calibrate, exit_latency_ms
from offramp.budget.drift import DriftMonitor, DriftReference, DriftReport
from offramp.budget.mean_cost import (
    CostMethod,
    ExponentialWeights,
    GeometricShares,
    OptimalStopping,
    QuantileCost,
    geometric_shares,
    geometric_thresholds,
)
from offramp.budget.monotone import MonotoneMap, isotonic
from offramp.budget.naive import PointEstimate
from offramp.budget.noise_schedule import PUBLISHED_DEPTHS, DepthByNoise, NoiseBins, published_schedule
from offramp.budget.replay import Loss, Realised, disagreement_loss, drop_loss, error_loss, evaluate, leave_at, path_curve, risk_table
from offramp.budget.risk_control import CRC, LTT, RCPS, DesignedPath, Procedure, SharedThreshold
from offramp.budget.schedule_search import JointChoice, SamplerSteps, ScheduleChoice, best_schedule, joint_front, schedule_front
from offramp.budget.step_thresholds import DriftLimit, ThresholdPlan, Tried, run_settings, threshold_for_cost, threshold_for_quality
from offramp.budget.targets import All, ExitShares, Latency, MeanCost, PeakCost, Quality, Risk, Target, Utility

PARTS: dict[str, type] = {c.__name__: c for c in (NoiseBins, DepthByNoise, CachePlan, MonotoneMap)}
"""Schedules and maps by name: what a saved file may name."""

__all__ = [
    "CRC",
    "LTT",
    "PARTS",
    "PUBLISHED_DEPTHS",
    "RCPS",
    "WSR",
    "All",
    "Bentkus",
    "Bound",
    "CacheChoice",
    "CachePlan",
    "ClopperPearson",
    "CostMethod",
    "DepthByNoise",
    "DesignedPath",
    "DriftLimit",
    "DriftMonitor",
    "DriftReference",
    "DriftReport",
    "ExitShares",
    "ExponentialWeights",
    "GeometricShares",
    "Hoeffding",
    "HoeffdingBentkus",
    "JointChoice",
    "Latency",
    "Loss",
    "MeanCost",
    "MonotoneMap",
    "NoiseBins",
    "OptimalStopping",
    "PeakCost",
    "PointEstimate",
    "Procedure",
    "Quality",
    "QuantileCost",
    "Realised",
    "Risk",
    "Sample",
    "SamplerSteps",
    "ScheduleChoice",
    "SharedThreshold",
    "Target",
    "ThresholdPlan",
    "Tried",
    "Utility",
    "best_cache_plan",
    "best_schedule",
    "cache_front",
    "calibrate",
    "disagreement_loss",
    "drop_loss",
    "error_loss",
    "evaluate",
    "exit_latency_ms",
    "geometric_shares",
    "geometric_thresholds",
    "isotonic",
    "joint_front",
    "leave_at",
    "path_curve",
    "power_plan",
    "published_schedule",
    "risk_table",
    "run_settings",
    "schedule_front",
    "threshold_for_cost",
    "threshold_for_quality",
    "uniform_plan",
]
