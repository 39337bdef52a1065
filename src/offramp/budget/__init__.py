"""Budgets: from a recorded trace and a target to thresholds with a certificate. Array code; no model in memory.

`calibrate` is the verb. `targets` say what is wanted, mean-cost methods and risk procedures say how, `bounds` carry the statistics,
and `replay` answers what given thresholds do.
"""

from offramp.budget.bounds import WSR, Bentkus, Bound, ClopperPearson, Hoeffding, HoeffdingBentkus, Sample
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
from offramp.budget.naive import PointEstimate
from offramp.budget.replay import Loss, Realised, disagreement_loss, drop_loss, error_loss, evaluate, leave_at, path_curve, risk_table
from offramp.budget.risk_control import CRC, LTT, RCPS, DesignedPath, Procedure, SharedThreshold
from offramp.budget.targets import All, ExitShares, Latency, MeanCost, PeakCost, Risk, Target, Utility

__all__ = [
    "CRC",
    "LTT",
    "RCPS",
    "WSR",
    "All",
    "Bentkus",
    "Bound",
    "ClopperPearson",
    "CostMethod",
    "DesignedPath",
    "DriftMonitor",
    "DriftReference",
    "DriftReport",
    "ExitShares",
    "ExponentialWeights",
    "GeometricShares",
    "Hoeffding",
    "HoeffdingBentkus",
    "Latency",
    "Loss",
    "MeanCost",
    "OptimalStopping",
    "PeakCost",
    "PointEstimate",
    "Procedure",
    "QuantileCost",
    "Realised",
    "Risk",
    "Sample",
    "SharedThreshold",
    "Target",
    "Utility",
    "calibrate",
    "disagreement_loss",
    "drop_loss",
    "error_loss",
    "evaluate",
    "exit_latency_ms",
    "geometric_shares",
    "geometric_thresholds",
    "leave_at",
    "path_curve",
    "risk_table",
]
