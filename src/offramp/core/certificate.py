"""Certificate and Plan: what was promised, on which evidence, and the thresholds that keep the promise."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from offramp.core.bundle import load_bundle, reading, save_bundle
from offramp.core.errors import FingerprintMismatch, InvalidInput
from offramp.core.parts import part_from_dict, part_to_dict
from offramp.core.protocols import Rule


@dataclass(frozen=True)
class Estimate:
    """A value with a two-sided interval.

    Attributes:
        value: point estimate.
        low: lower end.
        high: upper end.
        level: coverage of the interval, in (0, 1).
    """

    value: float
    low: float
    high: float
    level: float = 0.95

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


@dataclass(frozen=True)
class Certificate:
    """What was promised, at which confidence, on how many items, for which model.

    Attributes:
        statement: the promise in one sentence.
        method: how the thresholds were chosen, e.g. ``"LTT, Hoeffding-Bentkus"``.
        requested: what was asked for, by name (``mean_cost``, ``max_drop``, ``delta`` ...).
        realised: what the calibration items gave, by the same names where they apply.
        guaranteed: whether a statistical guarantee backs the statement; otherwise it is an estimate.
        delta: probability that the guarantee fails, over the draw of calibration items; ``None`` without guarantee, and where it is one in
            expectation.
        items: calibration items used for the promise.
        fingerprint: of the model and its heads.
        assumptions: what the promise rests on, in words.
    """

    statement: str
    method: str
    requested: Mapping[str, float]
    realised: Mapping[str, Estimate]
    guaranteed: bool
    items: int
    fingerprint: str = ""
    delta: float | None = None
    assumptions: str = "calibration items are exchangeable with the items that will be served"

    def __str__(self) -> str:
        lines = [self.statement, f"  method     {self.method}; {self.items:,} items"]
        for name in dict.fromkeys([*self.requested, *self.realised]):
            asked = f"{self.requested[name]:.4g}" if name in self.requested else "-"
            got = str(self.realised[name]) if name in self.realised else "-"
            lines.append(f"  {name:<22} requested {asked:>9}   realised {got}")
        lines.append(f"  guarantee  {self.guarantee}")
        return "\n".join(lines)

    @property
    def guarantee(self) -> str:
        """How the promise holds, in words."""
        if not self.guaranteed:
            return "none: an estimate"
        if self.delta is None:
            return "holds in expectation over calibration items and the item served"
        return f"holds with probability >= {1 - self.delta:g}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "statement": self.statement,
            "method": self.method,
            "requested": dict(self.requested),
            "realised": {k: [e.value, e.low, e.high, e.level] for k, e in self.realised.items()},
            "guaranteed": self.guaranteed,
            "items": self.items,
            "fingerprint": self.fingerprint,
            "delta": self.delta,
            "assumptions": self.assumptions,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Certificate:
        fields = dict(data)
        fields["realised"] = {k: Estimate(*e) for k, e in fields["realised"].items()}
        return cls(**fields)


@dataclass(frozen=True)
class Plan:
    """A rule with the thresholds that meet a target: all an engine needs besides the network.

    Attributes:
        rule: gives the scores.
        exits: K exit names, the model's own output last.
        thresholds: K numbers; a row leaves at the first exit with ``score >= threshold``. ``inf`` switches an exit off; the
            last is ``-inf``.
        shares: K expected shares of items leaving at each exit, summing to 1.
        mean_cost: expected FLOPs per item over FLOPs of the model without heads; heads of exits that are switched off do not run.
        certificate: what was promised.
        fingerprint: of the model and its heads.
    """

    rule: Rule
    exits: tuple[str, ...]
    thresholds: tuple[float, ...]
    shares: tuple[float, ...]
    mean_cost: float
    certificate: Certificate | None = None
    fingerprint: str = ""
    notes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.exits:
            raise InvalidInput("A plan needs at least one exit, the model's own output.")
        if not len(self.exits) == len(self.thresholds) == len(self.shares):
            raise InvalidInput(
                f"A plan needs one threshold and one share per exit: {len(self.exits)} exits, {len(self.thresholds)} thresholds, "
                f"{len(self.shares)} shares."
            )
        if self.thresholds[-1] != float("-inf"):
            raise InvalidInput(f"The last threshold must be -inf (everything left leaves there), got {self.thresholds[-1]}.")
        if any(t != t for t in self.thresholds):
            raise InvalidInput(f"A threshold is not a number: {self.thresholds}. Use inf to switch an exit off.")
        if not abs(sum(self.shares) - 1) <= 1e-6 or min(self.shares) < 0:
            raise InvalidInput(f"shares must be non-negative and sum to 1, got {self.shares}.")

    def __str__(self) -> str:
        rows = "\n".join(
            f"  {name:<24} threshold {t:>10.4g}   share {s:6.1%}"
            for name, t, s in zip(self.exits, self.thresholds, self.shares, strict=True)
        )
        head = f"Plan: {type(self.rule).__name__}, mean cost {self.mean_cost:.3f} of the full model\n{rows}"
        return head if self.certificate is None else f"{head}\n{self.certificate}"

    def check(self, fingerprint: str) -> None:
        """Refuse a model that the plan was not made for.

        Raises:
            FingerprintMismatch: the plan names another model.
        """
        if self.fingerprint and fingerprint and self.fingerprint != fingerprint:
            raise FingerprintMismatch(
                f"The plan was calibrated for the model with fingerprint {self.fingerprint[:12]}..., this one is {fingerprint[:12]}... "
                "Its thresholds and its certificate say nothing about this model and these heads: record and calibrate again, or load the "
                "adapter it was calibrated with."
            )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``plan.json`` (and ``plan.safetensors`` for a learned rule) into ``folder``, atomically."""
        content = {
            "rule": part_to_dict(self.rule),
            "exits": list(self.exits),
            "thresholds": [str(t) for t in self.thresholds],  # JSON has no infinity
            "shares": list(self.shares),
            "mean_cost": self.mean_cost,
            "certificate": None if self.certificate is None else self.certificate.to_dict(),
            "fingerprint": self.fingerprint,
            "notes": dict(self.notes),
        }
        weights = self.rule.state_dict() if isinstance(self.rule, nn.Module) else {}
        save_bundle(folder, "plan", "plan", content, weights)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], parts: Mapping[str, type]) -> Plan:
        """Read a plan that `save` wrote.

        Args:
            folder: where it is.
            parts: the rules that the file may name, by name.

        Raises:
            ArtifactError: a file is missing, truncated, altered or foreign, or names an unknown rule.
        """
        content, weights = load_bundle(folder, "plan", "plan")
        with reading(f"The plan in {folder}", RuntimeError):  # weights of a rule that do not fit
            rule = part_from_dict(content["rule"], parts)
            if isinstance(rule, nn.Module):
                rule.load_state_dict(weights)
            certificate = None if content["certificate"] is None else Certificate.from_dict(content["certificate"])
            return cls(
                rule,
                tuple(content["exits"]),
                tuple(float(t) for t in content["thresholds"]),
                tuple(content["shares"]),
                float(content["mean_cost"]),
                certificate,
                content["fingerprint"],
                content["notes"],
            )
