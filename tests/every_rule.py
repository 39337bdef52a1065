"""One rule of every kind, for a network of any size; shared by the tests of the rules and of what runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from offramp import policies
from offramp.core.parts import part_to_dict
from offramp.core.protocols import Rule


def every_rule(
    classes: int, width: int, *, token: int | None = 0, tolerance: float = 0.9, layers: int = 3
) -> dict[str, Callable[[], Rule]]:
    """What makes each rule, by name, for four early exits.

    Args:
        classes: width of the answers.
        width: of the pooled states.
        token: which token of a state `StateSimilarity` reads; ``None`` where states are no sequences.
        tolerance: of answers that are numbers.
        layers: of a `HaltingCDF`.
    """
    widths = [width] * 4
    return {
        "Confidence": policies.Confidence,
        "Margin": policies.Margin,
        "Entropy": lambda: policies.Entropy(classes),
        "Energy": lambda: policies.Energy(2.0),
        "Patience": policies.Patience,
        "PatienceRegression": lambda: policies.Patience(regression_tolerance=tolerance),
        "OutputStability": policies.OutputStability,
        "OutputStabilityL2": lambda: policies.OutputStability(euclidean=True),
        "StateSimilarity": lambda: policies.StateSimilarity(token),
        "Schedule": lambda: policies.Schedule((0.1, 0.3, 0.2, 0.9)),
        "FixedExit": lambda: policies.FixedExit(2),
        "LearnedGate": lambda: policies.LearnedGate(4),
        "LearnedGateConditional": lambda: policies.LearnedGate(4, conditional=True),
        "StateGate": lambda: policies.StateGate(widths),
        "PredictedUncertainty": lambda: policies.PredictedUncertainty(widths),
        "HaltingCDF": lambda: policies.HaltingCDF(widths, layers=layers),
        "Selector": lambda: policies.Selector(4, width),
        "SelectorLogits": lambda: policies.Selector(4, classes, reads_logits=True, inner=3),
        "AnyOf": lambda: policies.any_of(policies.at(policies.Confidence(), 0.5), policies.at(policies.Patience(), 2.0, scale=0.25)),
        "AllOf": lambda: policies.all_of(
            policies.at(policies.Margin(), (0.2, 0.3, 0.1, 0.0)), policies.at(policies.HaltingCDF(widths, layers=layers), 0.5)
        ),
        "After": lambda: policies.after(2, policies.Confidence()),
        "Tempered": lambda: policies.Tempered(policies.Confidence(), (2.0, 1.5, 1.0, 0.5)),
        "Nested": lambda: policies.any_of(
            policies.after(1, policies.all_of(policies.Patience(), policies.StateSimilarity(token))),
            policies.at(policies.any_of(policies.OutputStability(), policies.Confidence()), 0.3),
        ),
    }


def kinds(parts: Iterable[Any]) -> set[str]:
    """Names of the types in some parts, of those inside others too."""
    found: set[str] = set()

    def walk(described: Any) -> None:
        if isinstance(described, list):
            described = dict(enumerate(described))
        if isinstance(described, dict):
            if set(described) == {"type", "args"}:
                found.add(described["type"])
            for value in described.values():
                walk(value)

    for part in parts:
        walk(part_to_dict(part))
    return found
