"""Cost and quality: the clock, energy, this machine's ceilings, statistics, Pareto curves and the report."""

from offramp.measure.clock import Comparison, Timing, compare, environment, measure
from offramp.measure.energy import Energy, measure_energy
from offramp.measure.hardware import Ceilings, ceilings
from offramp.measure.pareto import Curve, Point, curve, relative_score
from offramp.measure.quality import ItemQuality, Outcome, item_quality, outcome
from offramp.measure.report import report
from offramp.measure.text_report import text_report

__all__ = [
    "Ceilings",
    "Comparison",
    "Curve",
    "Energy",
    "ItemQuality",
    "Outcome",
    "Point",
    "Timing",
    "ceilings",
    "compare",
    "curve",
    "environment",
    "item_quality",
    "measure",
    "measure_energy",
    "outcome",
    "relative_score",
    "report",
    "text_report",
]
