"""A small network, every rule on it, and thresholds that rounding cannot move; shared by the tests of the engines."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from every_rule import every_rule
from offramp.budget import leave_at
from offramp.core.certificate import Plan
from offramp.core.protocols import Rule
from offramp.core.trace import Trace
from offramp.engines.classify.engine import Answers, Mode, Runner, compile
from offramp.engines.classify.record import record
from offramp.network import MultiExit, attach

EXITS, CLASSES, WIDTH = 4, 5, 8

RULES = every_rule(CLASSES, WIDTH, token=None, tolerance=3.0, layers=1)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


def vector_model(classes: int = CLASSES) -> nn.Module:
    """Five residual blocks over a vector of 6."""
    torch.manual_seed(1)
    layers = [nn.Linear(6, WIDTH), *(Block() for _ in range(EXITS + 1)), nn.Linear(WIDTH, classes)]
    return nn.Sequential(*layers).eval()


AT = [str(k + 1) for k in range(EXITS)]


@functools.cache
def network() -> MultiExit:
    """`vector_model` with four exits whose answers differ; not to be changed by a test."""
    model = vector_model()
    torch.manual_seed(2)
    net = attach(model, AT, example=torch.randn(2, 6))
    with torch.no_grad():
        for head in net.heads:
            for p in head.parameters():
                p.add_(0.5 * torch.randn_like(p))
    return net.eval()


@functools.cache
def rules() -> dict[str, Rule]:
    made = {}
    for name, make in RULES.items():
        torch.manual_seed(7)
        made[name] = make()
    return made


@functools.cache
def items(count: int = 10_000) -> Tensor:
    return 1.5 * torch.randn(count, 6, generator=torch.Generator().manual_seed(3))


@functools.cache
def trace() -> Trace:
    """10,000 items with the scores of every rule."""
    labels = torch.randint(0, CLASSES, (len(items()),), generator=torch.Generator().manual_seed(4))
    batches = list(zip(items().split(500), labels.split(500), strict=True))
    return record(network(), batches, rules=tuple(rules().values()), progress=False)


def wide_midpoint(scores: Tensor, share: float) -> float:
    """A threshold that about ``share`` of the scores reach, in the middle of the widest gap near there."""
    values = scores[scores.isfinite()].double().unique()
    if not len(values):
        return float("inf")
    if len(values) == 1:  # a rule that does not look at the item: an exit for all or for none
        return 0.5
    middle = int((1 - share) * (len(values) - 1))
    low, high = max(0, middle - 60), min(len(values) - 1, middle + 60)
    gaps = values[low + 1 : high + 1] - values[low:high]
    best = low + int(gaps.argmax())
    return float(((values[best] + values[best + 1]) / 2).float())


def plan_of(found: Trace, rule: Rule, shares: float | tuple[float, ...] = 0.3, off: tuple[int, ...] = ()) -> Plan:
    """About these shares of the rows that come to an exit leave there; exits in ``off`` are switched off."""
    scores = found.scores(rule)
    early = scores.shape[1] - 1
    wanted = (shares,) * early if isinstance(shares, float) else shares
    here = torch.ones(len(scores), dtype=torch.bool)
    thresholds: list[float] = []
    for k in range(early):
        thresholds.append(float("inf") if k in off or not here.any() else wide_midpoint(scores[here, k], wanted[k]))
        here &= scores[:, k] < thresholds[-1]
    thresholds.append(float("-inf"))
    exits = leave_at(scores, thresholds)
    counts = torch.bincount(exits, minlength=early + 1).double() / len(exits)
    cost = float((counts @ found.cost) / found.base_cost)
    return Plan(rule, found.exits, tuple(thresholds), tuple(counts.tolist()), cost, fingerprint=found.fingerprint)


def run_of(plan: Plan, mode: Mode | None = None, *, graphs: bool = False) -> Runner:
    """The engine on `network`, without measuring."""
    return compile(network(), plan, mode, measure=False, graphs=graphs)


def same(got: Answers, expected: Answers) -> None:
    assert torch.equal(got.exit, expected.exit)
    torch.testing.assert_close(got.output, expected.output, rtol=1e-5, atol=1e-5)


def random_batches(
    inputs: Any, seed: int = 0, sizes: tuple[int, ...] = (1, 7, 64), weights: tuple[float, ...] = (0.06, 0.12, 0.82)
) -> Iterator[Any]:
    """Consecutive rows in batches of random sizes; every row once. Inputs are a tensor or a mapping of tensors."""
    rows = len(next(iter(inputs.values()))) if isinstance(inputs, dict) else len(inputs)
    generator = torch.Generator().manual_seed(seed)
    start = 0
    while start < rows:
        size = sizes[int(torch.multinomial(torch.tensor(weights), 1, generator=generator))]
        yield {k: v[start : start + size] for k, v in inputs.items()} if isinstance(inputs, dict) else inputs[start : start + size]
        start += size


def joined(answers: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, exits and costs of many batches as one."""
    found = list(answers)
    return torch.cat([a.output for a in found]), torch.cat([a.exit for a in found]), torch.cat([a.cost for a in found])
