"""What DESIGN promises once for all systems: every row of `cases`, attached, recorded, calibrated and run."""

from __future__ import annotations

import copy
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from offramp import systems
from offramp.budget import MeanCost, calibrate, evaluate, leave_at
from offramp.core.certificate import Plan
from offramp.core.errors import FingerprintMismatch, NoEffectWarning, OfframpWarning
from offramp.core.trace import Trace
from offramp.engines.classify.engine import Answers, Latency, Quota, Throughput, compile, quota_sizes
from offramp.engines.classify.record import record
from offramp.network import MultiExit, attach, load, load_plan, never

sys.path.insert(0, str(Path(__file__).parent))
from cases import CASES, Case

ROWS = 240
CLASSIFY = [c for c in CASES if systems.load_card(c.system).engine == "classify"]


def part(inputs: Any, rows: slice | Tensor) -> Any:
    return {k: v[rows] for k, v in inputs.items()} if isinstance(inputs, dict) else inputs[rows]


def call(function: Any, inputs: Any) -> Any:
    return function(**inputs) if isinstance(inputs, dict) else function(inputs)


def split(inputs: Any, sizes: list[int]) -> list[Any]:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [part(inputs, slice(start, start + size)) for start, size in zip(starts, sizes, strict=True)]


class Ready:
    """A row, ready to run."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.system = systems.build(case.system, **case.kwargs)
        self.model = case.model()
        self.before = copy.deepcopy(self.model.state_dict())
        self.net: MultiExit = attach(self.model, example=case.inputs(2, 0), system=self.system).eval()
        torch.manual_seed(1)
        with torch.no_grad():  # as if trained: answers of different certainty
            for p in self.net.heads.parameters():
                p.add_(0.5 * torch.randn_like(p))
        self.inputs = case.inputs(ROWS, 1)
        self.labels = torch.randint(0, case.classes, (ROWS,), generator=torch.Generator().manual_seed(2))
        batches = [(x, y) for x, y in zip(split(self.inputs, [80] * 3), self.labels.split(80), strict=True)]
        self.trace: Trace = record(self.net, batches, rules=[self.system.rule], progress=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", OfframpWarning)
            # Scores that are whole numbers meet few budgets; on an untrained network the system's own may be "all at one exit".
            for target in (self.system.target, MeanCost(0.7), MeanCost(0.85), MeanCost(0.95)):
                self.plan: Plan = calibrate(self.trace, self.system.rule, target, method=self.system.calibrator)
                if max(self.plan.shares) < 1:
                    break
        self.expected = leave_at(self.trace.scores(self.plan.rule), self.plan.thresholds)

    def logits(self, exits: Tensor) -> Tensor:
        assert self.trace.logits is not None
        return self.trace.logits[torch.arange(len(exits)), exits]

    def run(self, mode: Any, graphs: bool = False, **kwargs: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NoEffectWarning)
            return compile(self.net, self.plan, mode, measure=False, graphs=graphs, **kwargs)


@pytest.fixture(scope="module")
def ready():
    made: dict[str, Ready] = {}

    def get(case: Case) -> Ready:
        return made.setdefault(case.system, made.get(case.system) or Ready(case))

    return get


def joined(answers: list[Answers]) -> tuple[Tensor, Tensor, Tensor]:
    return torch.cat([a.output for a in answers]), torch.cat([a.exit for a in answers]), torch.cat([a.cost for a in answers])


rows = pytest.mark.parametrize("case", CLASSIFY, ids=lambda c: c.system)


def test_every_system_has_a_row() -> None:
    files = {p.stem.replace("_", "-") for p in Path(systems.__file__).parent.glob("*.py") if not p.stem.startswith("_")}
    assert files == {c.system for c in CASES} and len(CASES) == len(files)
    assert CLASSIFY


@rows
def test_plan_is_one_that_tests_something(case: Case, ready) -> None:
    found = ready(case)
    assert len(found.expected.unique()) >= 2 and found.plan.mean_cost < 1.0
    realised = evaluate(found.trace, found.plan.rule, found.plan.thresholds)
    assert realised.shares == pytest.approx(found.plan.shares) and realised.mean_cost.value == pytest.approx(found.plan.mean_cost)


@rows
@pytest.mark.parametrize("graphs", [False, True], ids=["host", "graphs"])
@pytest.mark.parametrize("mode", [Latency(64), Latency(64, compact=False), Throughput(16)], ids=["compacted", "whole", "throughput"])
def test_engine_equals_replay(case: Case, mode: Any, graphs: bool, ready) -> None:
    """Identical exits, the exit's own answer, and the cost that the trace says, for mixed batch sizes."""
    found = ready(case)
    sizes = [1, 64, 7, 0, 100, 1, 1, 16, 50]
    assert sum(sizes) == ROWS
    run = found.run(mode, graphs)
    answers = list(run.stream(split(found.inputs, sizes)))
    assert [len(a.exit) for a in answers] == sizes
    output, exits, cost = joined(answers)
    assert torch.equal(exits, found.expected)
    torch.testing.assert_close(output, found.logits(exits), rtol=1e-4, atol=1e-5)
    assert torch.equal(cost, run.costs[exits])
    if all(run.decide):
        assert float(cost.mean()) / found.trace.base_cost == pytest.approx(found.plan.mean_cost, rel=1e-9)


@rows
def test_batch_mates_do_not_matter(case: Case, ready) -> None:
    found = ready(case)
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(3))
    run = found.run(Latency(64))
    one, other = call(run, found.inputs), call(run, part(found.inputs, order))
    assert torch.equal(other.exit, one.exit[order])
    torch.testing.assert_close(other.output, one.output[order], rtol=1e-4, atol=1e-5)
    for i in (0, 17, 101):
        alone = call(run, part(found.inputs, slice(i, i + 1)))
        assert alone.exit.tolist() == one.exit[i : i + 1].tolist()


@rows
@pytest.mark.parametrize("graphs", [False, True], ids=["host", "graphs"])
def test_quota_is_exact(case: Case, graphs: bool, ready) -> None:
    found = ready(case)
    run = found.run(Quota(60), graphs)
    shares = run.stage_shares()
    for batch in split(found.inputs, [60] * 4):
        answers = call(run, batch)
        left = [int((answers.exit > stage.exit).sum()) for stage in run.stages[:-1]]
        assert left == quota_sizes(shares, 60)


@rows
@pytest.mark.parametrize("graphs", [False, True], ids=["host", "graphs"])
def test_never_leaving_is_the_model_bit_for_bit(case: Case, graphs: bool, ready) -> None:
    found = ready(case)
    with pytest.warns(NoEffectWarning):
        run = compile(found.net, never(found.net, found.system.rule), Latency(8), graphs=graphs)
    for count in (1, 3, 8):
        batch = part(found.inputs, slice(count))
        with torch.no_grad():
            assert torch.equal(call(run, batch).output, call(found.model, batch))


@rows
def test_always_leaving_is_the_first_exit(case: Case, ready) -> None:
    found = ready(case)
    early = len(found.net.at)
    plan = Plan(found.system.rule, found.net.names, (float("-inf"),) * (early + 1), (1.0,) + (0.0,) * early, 0.5)
    answers = call(compile(found.net, plan, Latency(8), measure=False, graphs=False), part(found.inputs, slice(8)))
    with torch.no_grad():
        expected = call(found.net, part(found.inputs, slice(8)))[0]
    assert not answers.exit.any()
    torch.testing.assert_close(answers.output, expected, rtol=1e-4, atol=1e-5)


@rows
def test_mean_cost_rises_with_each_threshold(case: Case, ready) -> None:
    found = ready(case)
    scores = found.trace.scores(found.plan.rule)
    for k in range(len(found.net.at)):
        before = 0.0
        column = scores[:, k][scores[:, k].isfinite()]
        for level in (float("-inf"), *column.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist(), float("inf")):
            thresholds = [*found.plan.thresholds[:k], level, *found.plan.thresholds[k + 1 :]]
            cost = float(found.trace.cost[leave_at(scores, thresholds)].mean())
            assert cost >= before
            before = cost


@rows
def test_the_target_is_met_on_the_calibration_items(case: Case, ready) -> None:
    found = ready(case)
    certificate = found.plan.certificate
    assert certificate is not None and certificate.items == ROWS and certificate.fingerprint == found.net.fingerprint()
    for name, asked in certificate.requested.items():
        if name == "mean_cost":
            assert certificate.realised[name].value <= asked + 1e-9


@rows
def test_saved_and_loaded_gives_the_same_answers(case: Case, ready, tmp_path: Path) -> None:
    found = ready(case)
    found.net.save(tmp_path)
    found.plan.save(tmp_path)
    found.trace.save(tmp_path)
    assert {p.suffix for p in tmp_path.iterdir()} <= {".json", ".safetensors"}
    net = load(case.model(), tmp_path, example=case.inputs(2, 0), system=found.system).eval()
    plan = load_plan(tmp_path)
    assert (plan.exits, plan.thresholds, plan.shares) == (found.plan.exits, found.plan.thresholds, found.plan.shares)
    assert plan.certificate == found.plan.certificate and plan.fingerprint == found.plan.fingerprint
    again = compile(net, plan, Latency(64), measure=False, graphs=False)
    one, other = call(found.run(Latency(64)), found.inputs), call(again, found.inputs)
    assert torch.equal(one.exit, other.exit) and torch.equal(one.output, other.output)
    assert torch.equal(Trace.load(tmp_path).scores(plan.rule), found.trace.scores(found.plan.rule))
    changed = case.model()
    with torch.no_grad():
        next(changed.parameters()).add_(1e-3)
    with pytest.raises(FingerprintMismatch):
        load(changed, tmp_path, example=case.inputs(2, 0))
    with pytest.raises(FingerprintMismatch):
        compile(attach(changed, found.net.at, example=case.inputs(2, 0)), plan)


@rows
def test_the_model_is_left_as_it_was(case: Case, ready) -> None:
    """After attaching, recording, compiling and running."""
    found = ready(case)
    call(found.run(Latency(8)), part(found.inputs, slice(8)))
    model = found.net.detach()
    assert model is found.model
    state = model.state_dict()
    assert list(state) == list(found.before) and all(torch.equal(v, found.before[k]) for k, v in state.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    fresh = case.model()
    batch = part(found.inputs, slice(5))
    with torch.no_grad():
        assert torch.equal(call(model, batch), call(fresh, batch))
