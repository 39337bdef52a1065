"""The graph loops, run as plain calls: buckets, mailboxes, buffers, and every row placed once."""

from __future__ import annotations

import threading
import time
from itertools import pairwise

import pytest
import torch
from engine_models import EXITS, items, joined, plan_of, rules, run_of, trace
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from offramp.budget import leave_at
from offramp.core.certificate import Plan
from offramp.core.errors import InvalidInput
from offramp.engines.capture import Graph, Mailbox
from offramp.engines.classify.buffers import buckets
from offramp.engines.classify.engine import Latency, Quota, Throughput, compile, quota_sizes
from offramp.engines.classify.graphs import in_order, ranks
from offramp.network import attach
from offramp.policies import Confidence

CPU = torch.device("cpu")


@given(st.integers(1, 600), st.floats(0.0, 1.0))
@settings(max_examples=200, deadline=None)
def test_buckets(rows, reach):
    """Ascending, none twice, the last holds every row, the expected number has one near it."""
    sizes = buckets(rows, reach)
    assert sizes[-1] == rows and list(sizes) == sorted(set(sizes)) and sizes[0] >= 1 and len(sizes) <= 7
    mean = rows * reach
    fitting = min(s for s in sizes if s >= mean)
    assert fitting - mean <= 8 or fitting == rows or fitting <= 1.5 * mean


def test_buckets_known():
    assert buckets(1, 0.3) == (1,)
    assert buckets(64, 1.0) == (64,)
    assert buckets(64, 0.0) == (64,)
    assert all(b % 8 == 0 for b in buckets(256, 0.4))


def test_mailbox():
    box = Mailbox(3, CPU)
    box.clear()
    threading.Timer(0.02, lambda: box.post(torch.tensor([4, 0, 7]))).start()
    start = time.perf_counter()
    assert box.wait() == [4, 0, 7] and time.perf_counter() - start > 0.01
    box.clear()
    box.post(torch.tensor([1, 2, 3]))
    assert box.wait() == [1, 2, 3]


def test_a_graph_runs_once_when_captured_and_again_when_replayed():
    calls = []
    graph = Graph(lambda: calls.append(1), CPU, None)
    captured = len(calls)
    graph.replay()
    graph.replay()
    assert captured == 1 and len(calls) == 3


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, float("-inf")]), min_size=0, max_size=40))
@settings(max_examples=100, deadline=None)
def test_ranks_are_those_of_a_stable_sort(values):
    score = torch.tensor(values)
    assert torch.equal(in_order(ranks(score), len(values)), score.sort(stable=True).indices)
    assert torch.equal(in_order(ranks(score), len(values) // 2), score.sort(stable=True).indices[: len(values) // 2])


def test_ranks_of_many():
    score = torch.rand(1500).mul(100).round()
    assert torch.equal(in_order(ranks(score), 1500), score.sort(stable=True).indices)


@pytest.mark.parametrize("rows", [5, 1500])
def test_what_is_not_a_number_stays_longest(rows):
    score = torch.arange(rows, dtype=torch.float32)
    score[[1, 3]] = float("nan")
    assert in_order(ranks(score), 3).tolist() == [1, 3, 0]


def test_batch_sizes_change_from_call_to_call(plan):
    """Buffers grow and graphs are added; no answer is left from an earlier, larger batch."""
    run = run_of(plan, Latency(16), graphs=True)
    expected = leave_at(trace().scores(plan.rule), plan.thresholds)
    start = 0
    for size in (3, 16, 1, 40, 2, 130, 7, 129, 64, 1, 5):
        answers = run(items()[start : start + size])
        assert torch.equal(answers.exit, expected[start : start + size])
        logits = trace().logits[torch.arange(start, start + size), expected[start : start + size]]
        torch.testing.assert_close(answers.output, logits, rtol=1e-5, atol=1e-5)
        start += size


@pytest.mark.parametrize("mode", [Latency(8), Quota(8)])
def test_rows_that_all_leave_or_all_stay(mode, plan):
    expected = leave_at(trace().scores(plan.rule), plan.thresholds)
    for k in (0, EXITS):
        x = items()[expected == k][:8]
        run = run_of(plan, mode, graphs=True)
        wanted = [k] * 8
        if isinstance(mode, Quota):  # whatever the scores, the same number leaves
            left = [8, *quota_sizes(plan.shares, 8), 0]
            wanted = [j for j, (before, behind) in enumerate(pairwise(left)) for _ in range(before - behind)]
        for _ in range(2):
            assert sorted(run(x).exit.tolist()) == wanted


def test_the_state_of_a_rule_begins_anew_with_every_batch():
    """Its first value is copied once; nothing that a batch leaves behind may be in it."""
    for name in ("Patience", "HaltingCDF", "LearnedGateConditional", "Selector"):
        plan = plan_of(trace(), rules()[name])
        expected = leave_at(trace().scores(plan.rule), plan.thresholds)
        run = run_of(plan, Latency(32), graphs=True)
        for start in (0, 32, 500, 0, 1000):
            assert torch.equal(run(items()[start : start + 32]).exit, expected[start : start + 32]), name
        assert torch.equal(run(items()[:100]).exit, expected[:100])
        assert torch.equal(run(items()[:32]).exit, expected[:32])


@given(st.integers(1, 12), st.integers(1, 3), st.lists(st.integers(0, 30), min_size=1, max_size=12))
@settings(max_examples=25, deadline=None)
def test_a_stream_of_any_sizes_with_any_bucket(bucket, backlog, sizes):
    plan = plan_of(trace(), Confidence())
    expected = leave_at(trace().scores(plan.rule), plan.thresholds)
    run = run_of(plan, Throughput(bucket, backlog), graphs=True)
    for _ in range(2):  # the ring of answers is used again
        answers = list(run.stream(items()[: sum(sizes)].split(sizes)))
        assert [len(a.exit) for a in answers] == sizes
        assert torch.equal(torch.cat([a.exit for a in answers]), expected[: sum(sizes)])


def test_the_ring_of_answers_wraps_many_times(plan):
    run = run_of(plan, Throughput(4, backlog=1), graphs=True)
    expected = leave_at(trace().scores(plan.rule), plan.thresholds)
    output, exits, _ = joined(run.stream(items()[:1000].split(3)))
    assert torch.equal(exits, expected[:1000])
    torch.testing.assert_close(output, trace().logits[torch.arange(1000), expected[:1000]], rtol=1e-5, atol=1e-5)


class Conditioned(nn.Module):
    """A mask without a batch dimension and a skip connection cross every cut."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        hidden = x
        for block in self.blocks:
            hidden = torch.tanh(block(hidden) * weight) + 0.1 * x
        return self.head(hidden)


def conditioned():
    torch.manual_seed(0)
    net = attach(Conditioned().eval(), ["blocks.0", "blocks.2"], example=(torch.randn(2, 6), torch.randn(6))).eval()
    return net, Plan(Confidence(), net.names, (0.45, 0.5, float("-inf")), (0.25, 0.25, 0.5), 0.8)


def weight(seed: int) -> Tensor:
    """An input without a batch: rows with another value of it are of another signature."""
    return torch.randn(6, generator=torch.Generator().manual_seed(seed))


def check(net, plan, answers, x: Tensor, scale: Tensor, quota: bool = False) -> None:
    """Each answer is the one of its exit, and the exit is the one of replay."""
    with torch.no_grad():
        logits = torch.stack(net(x, scale), dim=1)
    torch.testing.assert_close(answers.output, logits[torch.arange(len(x)), answers.exit], rtol=1e-5, atol=1e-5)
    if not quota:
        assert torch.equal(answers.exit, leave_at(torch.softmax(logits, -1).amax(-1), plan.thresholds))


@pytest.mark.parametrize("mode", [Latency(8), Throughput(4), Quota(8)])
def test_what_has_no_batch_crosses_too_and_may_change_between_calls(mode, graphs):
    net, plan = conditioned()
    run = compile(net, plan, mode, measure=False, graphs=graphs)
    for seed in range(3):
        x = items()[:8]
        check(net, plan, run(x, weight(seed)), x, weight(seed), isinstance(mode, Quota))


@pytest.mark.parametrize("mode", [Latency(8), Quota(8)])
def test_memory_of_old_signatures_is_given_up(mode, monkeypatch):
    """Four signatures where two are kept: the newest two stay as they are, the others are made anew, answers are right."""
    monkeypatch.setattr("offramp.engines.classify.graphs.MAX_SIGNATURES", 2)
    net, plan = conditioned()
    run = compile(net, plan, mode, measure=False, graphs=True)
    for start, seed in enumerate((0, 1, 2, 3, 0, 3, 2, 1, 1)):
        x = items()[8 * start : 8 * start + 8]
        check(net, plan, run(x, weight(seed)), x, weight(seed), isinstance(mode, Quota))
        assert len(run.loop.benches) == min(start + 1, 2)
    kept = list(run.loop.benches.values())
    for seed in (2, 1):
        run(items()[:8], weight(seed))
    assert all(a is b for a, b in zip(kept, run.loop.benches.values(), strict=True))
    x = items()[:20]  # more rows than the memory holds: made anew, and the other one stays
    check(net, plan, run(x, weight(2)), x, weight(2), isinstance(mode, Quota))
    assert len(run.loop.benches) == 2 and any(b is kept[1] for b in run.loop.benches.values())


def test_memory_of_old_streams_is_given_up(monkeypatch):
    """As above in throughput mode, with signatures that follow each other in one stream."""
    monkeypatch.setattr("offramp.engines.classify.graph_stream.MAX_SIGNATURES", 2)
    net, plan = conditioned()
    run = compile(net, plan, Throughput(4, backlog=2), measure=False, graphs=True)
    seeds = [0, 0, 1, 2, 2, 3, 0, 1, 3, 3, 2]
    sizes = [5, 1, 9, 4, 0, 3, 12, 1, 2, 30, 7]
    rows = items()[: sum(sizes)].split(sizes)
    for _ in range(2):
        count = 0
        given = [((x, weight(seed)), {}) for x, seed in zip(rows, seeds, strict=True)]
        for x, seed, answers in zip(rows, seeds, run.stream(given), strict=True):
            assert len(answers.exit) == len(x)
            if len(x):
                check(net, plan, answers, x, weight(seed))
            assert len(run._streams.made) <= 2
            count += 1
        assert count == len(sizes) and len(run._streams.made) == 2


def test_a_batch_in_two_dimensions_is_refused_by_graphs_and_runs_without():
    class Pairs(nn.Module):
        """Similarities of every row with every other, of which each row uses its own."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            pairs = x @ x.T
            hidden = torch.tanh(self.second(torch.tanh(self.first(x))))
            return self.head(hidden) + pairs.diagonal().unsqueeze(1)

    net = attach(Pairs().eval(), ["first"], example=torch.randn(2, 6)).eval()
    plan = Plan(Confidence(), net.names, (0.45, float("-inf")), (0.5, 0.5), 0.8)
    dims = net.cut().batch_dims
    if not any(len(dims[n]) > 1 for n in net.cut().segments[0].live):
        pytest.skip("the exporter moved the product behind the cut, so nothing holds the batch twice")
    x = items()[:16]
    answers = compile(net, plan, Latency(16), measure=False, graphs=False)(x)
    with torch.no_grad():
        logits = torch.stack(net(x), dim=1)
    torch.testing.assert_close(answers.output, logits[torch.arange(16), answers.exit], rtol=1e-5, atol=1e-5)
    with pytest.raises(InvalidInput, match="graphs=False"):
        compile(net, plan, Latency(16), measure=False, graphs=True)(x)
