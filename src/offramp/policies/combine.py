"""Rules made of rules. All are modules, so that the weights of a learned rule inside are moved, saved and loaded with them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from offramp.core.errors import InvalidInput
from offramp.core.protocols import Rule
from offramp.core.types import Readout, RuleState
from offramp.policies.base import RuleBase, at_exit, constant
from offramp.policies.scores import NEVER


class _Several(RuleBase, nn.Module):
    """Runs every rule at every exit; the state of rule i is kept under ``"i.name"``."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        super().__init__()
        if not rules:
            raise InvalidInput(f"{type(self).__name__} needs at least one rule.")
        for rule in rules:
            _check(rule)
        self.rules = tuple(rules)
        self.learned = nn.ModuleList(r for r in rules if isinstance(r, nn.Module))

    @property
    def config(self) -> Mapping[str, Any]:
        return {"rules": self.rules}

    @property
    def stateful(self) -> bool:
        return any(r.stateful for r in self.rules)

    @property
    def needs_hidden(self) -> bool:
        return any(r.needs_hidden for r in self.rules)

    @property
    def bounds(self) -> tuple[float, float] | None:
        """From the lowest to the highest of the rules' ranges."""
        ranges = [r.bounds for r in self.rules]
        known = [r for r in ranges if r is not None]
        return (min(low for low, _ in known), max(high for _, high in known)) if len(known) == len(ranges) else None

    def begin(self, rows: int, device: torch.device) -> RuleState:
        return {f"{i}.{name}": value for i, rule in enumerate(self.rules) for name, value in rule.begin(rows, device).items()}

    def _scores(self, exit_index: int, readout: Readout, state: RuleState) -> tuple[Tensor, RuleState]:
        """``[B, rules]`` and the next state."""
        found, following = [], {}
        for i, rule in enumerate(self.rules):
            prefix = f"{i}."
            own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            value, own_next = rule.score(exit_index, readout, own)
            found.append(value)
            following.update({f"{prefix}{name}": value for name, value in own_next.items()})
        return torch.stack(found, dim=-1), following


@final
class AnyOf(_Several):
    """The largest score: leaves where any of the rules would. Made by `any_of`."""

    def score(self, exit_index: int, readout: Readout, state: RuleState) -> tuple[Tensor, RuleState]:
        found, state = self._scores(exit_index, readout, state)
        return found.amax(dim=-1), state


@final
class AllOf(_Several):
    """The smallest score: leaves where all of the rules would. Made by `all_of`."""

    def score(self, exit_index: int, readout: Readout, state: RuleState) -> tuple[Tensor, RuleState]:
        found, state = self._scores(exit_index, readout, state)
        return found.amin(dim=-1), state


class _Wrapped(RuleBase, nn.Module):
    """A rule around one rule, whose state it passes through."""

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        _check(rule)
        self.rule: Rule = rule

    @property
    def stateful(self) -> bool:
        return self.rule.stateful

    @property
    def needs_hidden(self) -> bool:
        return self.rule.needs_hidden

    @property
    def bounds(self) -> tuple[float, float] | None:
        return self.rule.bounds

    def begin(self, rows: int, device: torch.device) -> RuleState:
        return self.rule.begin(rows, device)


@final
class At(_Wrapped):
    """``(score - threshold) * scale``: a rule brought to threshold 0, where rules of different units can be combined.

    Args:
        rule: gives the score.
        threshold: finite; one number, or one per early exit.
        scale: > 0; how much this rule counts when the common threshold is moved from 0. The sign at 0 does not depend on it.
    """

    def __init__(self, rule: Rule, threshold: float | Sequence[float], scale: float = 1.0) -> None:
        super().__init__(rule)
        values = (threshold,) if isinstance(threshold, int | float) else tuple(threshold)
        if not values or not all(math.isfinite(t) for t in values):
            raise InvalidInput(f"threshold must be finite, got {threshold}. To keep a rule from an exit use after(exit_index, rule).")
        if not (math.isfinite(scale) and scale > 0):
            raise InvalidInput(f"scale must be positive and finite, got {scale}.")
        self.threshold: float | tuple[float, ...] = float(threshold) if isinstance(threshold, int | float) else values
        self.scale = float(scale)

    @property
    def config(self) -> Mapping[str, Any]:
        return {"rule": self.rule, "threshold": self.threshold, "scale": self.scale}

    @property
    def bounds(self) -> tuple[float, float] | None:
        inner = self.rule.bounds
        if inner is None:
            return None
        shifts = (self.threshold,) if isinstance(self.threshold, float) else self.threshold
        return ((inner[0] - max(shifts)) * self.scale, (inner[1] - min(shifts)) * self.scale)

    def score(self, exit_index: int, readout: Readout, state: RuleState) -> tuple[Tensor, RuleState]:
        value, state = self.rule.score(exit_index, readout, state)
        shift = self.threshold if isinstance(self.threshold, float) else at_exit(self.threshold, exit_index, self)
        # The sign of a float difference is exact (underflow is gradual), so >= 0 here is >= threshold there.
        return (value - shift) * self.scale, state


@final
class After(_Wrapped):
    """`NEVER` before exit ``exit_index`` (0-based), the rule's score from there on; the rule sees all exits.

    ``bounds`` is the range from there on.
    """

    def __init__(self, exit_index: int, rule: Rule) -> None:
        super().__init__(rule)
        if exit_index < 0:
            raise InvalidInput(f"exit_index counts from 0, got {exit_index}.")
        self.exit_index = exit_index

    @property
    def config(self) -> Mapping[str, Any]:
        return {"exit_index": self.exit_index, "rule": self.rule}

    def score(self, exit_index: int, readout: Readout, state: RuleState) -> tuple[Tensor, RuleState]:
        if exit_index >= self.exit_index:
            return self.rule.score(exit_index, readout, state)
        if self.rule.stateful:
            state = self.rule.score(exit_index, readout, state)[1]
        return constant(NEVER, readout), state


@final
class Tempered(_Wrapped):
    """A rule on temperature-scaled logits (Guo et al. 2017, "On Calibration of Modern Neural Networks", section 4.2).

    Args:
        rule: gives the score.
        temperatures: one positive number per early exit; above 1 softens the answer.
    """

    def __init__(self, rule: Rule, temperatures: Sequence[float]) -> None:
        super().__init__(rule)
        self.temperatures = tuple(float(t) for t in temperatures)
        if not self.temperatures or not all(math.isfinite(t) and t > 0 for t in self.temperatures):
            raise InvalidInput(f"temperatures must be one positive number per early exit, got {temperatures}.")

    @property
    def config(self) -> Mapping[str, Any]:
        return {"rule": self.rule, "temperatures": self.temperatures}

    def score(self, exit_index: int, readout: Readout, state: RuleState) -> tuple[Tensor, RuleState]:
        temperature = at_exit(self.temperatures, exit_index, self)
        return self.rule.score(exit_index, readout._replace(logits=readout.logits.float() / temperature), state)


def any_of(*rules: Rule) -> AnyOf:
    """Leaves where any rule would. ``any_of(at(a, s), at(b, t))`` at threshold 0 is exactly ``a >= s or b >= t``."""
    return AnyOf(rules)


def all_of(*rules: Rule) -> AllOf:
    """Leaves where all rules would. ``all_of(at(a, s), at(b, t))`` at threshold 0 is exactly ``a >= s and b >= t``."""
    return AllOf(rules)


def at(rule: Rule, threshold: float | Sequence[float], scale: float = 1.0) -> At:
    """A rule brought to threshold 0; see `At`."""
    return At(rule, threshold, scale)


def after(exit_index: int, rule: Rule) -> After:
    """A rule that cannot fire before exit ``exit_index`` (0-based)."""
    return After(exit_index, rule)


def _check(rule: object) -> None:
    if isinstance(rule, type) or not isinstance(rule, Rule):
        raise InvalidInput(f"A rule of offramp.policies was expected (an instance, as in Confidence()), got {rule!r}.")


__all__ = ["After", "AllOf", "AnyOf", "At", "Tempered", "after", "all_of", "any_of", "at"]
