"""The engine on CUDA: graphs give the exits of the host loop, the bare model's answers, and nothing crashes in bfloat16.

Tests are few and the networks small, since every stage is compiled for every size that is captured.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from offramp.budget import leave_at
from offramp.cli.nets import ConvNet, TextTransformer
from offramp.core.errors import NoEffectWarning
from offramp.engines.classify.engine import Latency, Quota, Throughput, compile, quota_sizes
from offramp.engines.classify.graphs import in_order, ranks
from offramp.engines.classify.record import record
from offramp.network import attach, load_plan, never
from offramp.policies import Confidence, LearnedGate, Patience

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit" / "engines"))
from engine_models import plan_of

DEVICE = torch.device("cuda")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(autouse=True)
def _exact():
    """Plain float32 products, so that a score near a threshold falls on the same side in every kernel; no compiled code is kept."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    torch._dynamo.reset()


def conv(dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    model = ConvNet(channels=1, classes=4, depth=4, width=8).eval().to(DEVICE, dtype)
    net = attach(model, ["blocks.0", "blocks.2"], example=images(2)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for p in net.heads.parameters():
            p.add_(0.5 * torch.randn_like(p))
    return net


def images(rows: int) -> torch.Tensor:
    return torch.randn(rows, 1, 8, 8, generator=torch.Generator().manual_seed(rows)).to(DEVICE)


@pytest.mark.parametrize("rule", [Confidence(), Patience(), LearnedGate(2, conditional=True)], ids=lambda r: type(r).__name__)
def test_graphs_give_the_exits_of_the_host_loop_and_of_replay(rule):
    """The learned rule is given on the CPU: engine and recording place a copy."""
    net = conv()
    x = images(300)
    found = record(net, x.split(100), rules=[rule], progress=False)
    plan = plan_of(found, rule)
    expected = leave_at(found.scores(rule), plan.thresholds)
    assert len(expected.unique()) > 1
    host = compile(net, plan, Latency(32), measure=False, graphs=False)
    graph = compile(net, plan, Latency(32), measure=False)
    stream = compile(net, plan, Throughput(32, backlog=2), measure=False)
    sizes = [32, 5, 32, 1, 32, 32, 32, 32, 32, 32, 32, 6]
    for run in (host, graph, stream):
        answers = list(run.stream(x.split(sizes)))
        assert torch.equal(torch.cat([a.exit for a in answers]).cpu(), expected)
        output = torch.cat([a.output for a in answers]).cpu()
        torch.testing.assert_close(output, found.logits[torch.arange(300), expected], rtol=1e-3, atol=1e-4)
    again = list(stream.stream(x.split(50)))
    assert torch.equal(torch.cat([a.exit for a in again]).cpu(), expected), "the ring and the queues are used again"


@pytest.mark.parametrize("mode", [Latency(16), Throughput(16), Quota(16)], ids=lambda m: type(m).__name__)
def test_never_leaving_is_the_model(mode):
    net = conv()
    with pytest.warns(NoEffectWarning):
        run = compile(net, never(net, Confidence()), mode)
    for rows in (16, 4, 16):  # the answers of the larger graph must not be those of the smaller one
        x = images(rows)
        with torch.no_grad():
            expected = net.model(x)
        answers = run(x)
        torch.testing.assert_close(answers.output, expected, rtol=1e-3, atol=1e-4)
        assert answers.exit.tolist() == [2] * rows


def test_quota_leaves_the_same_rows_as_on_the_host():
    net = conv()
    found = record(net, [images(64)], progress=False)
    plan = plan_of(found, Confidence())
    host, graph = (compile(net, plan, Quota(64), measure=False, graphs=g)(images(64)) for g in (False, None))
    assert torch.equal(host.exit, graph.exit)
    left = [int((graph.exit > k).sum()) for k in range(2)]
    assert left == quota_sizes(plan.shares, 64)
    torch.testing.assert_close(graph.output, host.output, rtol=1e-3, atol=1e-4)


def test_ties_are_broken_by_position():
    score = torch.tensor([0.5, 0.25, 0.5, 0.25, 1.0], device=DEVICE)
    assert in_order(ranks(score), 5).tolist() == [1, 3, 0, 2, 4]


@pytest.mark.filterwarnings("ignore::offramp.core.errors.NoSavingWarning")
@pytest.mark.parametrize("mode", [Latency(16), Throughput(16), Quota(16)], ids=lambda m: type(m).__name__)
def test_bfloat16_with_measured_times(mode):
    net = conv(torch.bfloat16)
    found = record(net, [images(64)], progress=False)
    run = compile(net, plan_of(found, Confidence()), mode)
    assert run.table is not None and torch.cuda.get_device_name() in run.table.device and (run.table.segment_ms >= 0).all()
    for rows in (16, 3, 16):
        answers = run(images(rows).bfloat16())
        assert answers.output.shape == (rows, 4) and answers.output.dtype == torch.bfloat16 and answers.output.isfinite().all()
        assert ((answers.exit >= 0) & (answers.exit < 3)).all() and (answers.cost > 0).all()
    assert run(images(0).bfloat16()).output.shape == (0, 4)


def test_texts_of_two_lengths():
    torch.manual_seed(0)
    model = TextTransformer(vocabulary=30, classes=4, depth=3, width=16, heads=2, length=12, dropout=0.0).eval().to(DEVICE)

    def batch(rows: int, length: int) -> dict[str, torch.Tensor]:
        g = torch.Generator().manual_seed(rows)
        ids = torch.randint(1, 30, (rows, length), generator=g)
        mask = (torch.arange(length) < torch.randint(1, length + 1, (rows, 1), generator=g)).long()
        return {"input_ids": (ids * mask).to(DEVICE), "attention_mask": mask.to(DEVICE)}

    net = attach(model, ["blocks.0", "blocks.1"], example=batch(2, 7)).eval()
    batches = [batch(8, 12), batch(3, 7), batch(8, 12)]
    found = record(net, batches, progress=False)
    plan = plan_of(found, Confidence())
    expected = leave_at(found.scores(plan.rule), plan.thresholds)
    for mode in (Latency(8), Throughput(8)):
        answers = list(compile(net, plan, mode, measure=False).stream(batches))
        assert torch.equal(torch.cat([a.exit for a in answers]).cpu(), expected)


def test_inputs_and_plans_from_the_host(tmp_path):
    """Inputs are moved, a saved plan is placed, and cost comes back on the device."""
    net = conv()
    rule = LearnedGate(2)
    found = record(net, [images(64)], rules=[rule], progress=False)
    plan_of(found, rule).save(tmp_path)
    plan = load_plan(tmp_path)
    assert next(plan.rule.parameters()).device.type == "cpu"
    run = compile(net, plan, Latency(8), measure=False)
    for _ in range(2):
        moved, there = run(images(8).cpu()), run(images(8))
        assert torch.equal(moved.exit, there.exit) and moved.output.device.type == "cuda" == moved.cost.device.type
    assert next(plan.rule.parameters()).device.type == "cpu"
    host = compile(net, plan, Latency(8), measure=False, graphs=False)
    assert host(images(8)).exit.tolist() == there.exit.tolist()
