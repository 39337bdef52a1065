"""What pays: interpolation and the choice of exits, on tables whose answer is known."""

from __future__ import annotations

import itertools
import time

import pytest
import torch
from engine_models import AT, EXITS, vector_model

from offramp.core.certificate import Plan
from offramp.core.trace import LatencyTable
from offramp.engines.classify.profile import expected_ms, interpolate, median_ms, worthwhile
from offramp.engines.classify.stages import exit_costs
from offramp.exits import Cascade, PooledLinear
from offramp.network import attach
from offramp.policies import Confidence, Patience

INF = float("inf")


def test_interpolate():
    sizes, times = (1, 4, 8), (1.0, 2.0, 6.0)
    assert [interpolate(sizes, times, r) for r in (0, -3, 0.5, 1, 2.5, 4, 6, 8, 16)] == [0.0, 0.0, 0.5, 1.0, 1.5, 2.0, 4.0, 6.0, 12.0]
    assert interpolate((4,), (2.0,), 1) == 0.5
    values = [interpolate(sizes, times, r / 4) for r in range(80)]
    assert values == sorted(values)


def test_median_ms():
    calls = []
    assert 2.0 <= median_ms(lambda: (calls.append(1), time.sleep(0.002)), torch.device("cpu"), warmup=1, repeats=5) < 50
    assert len(calls) == 6
    calls.clear()
    median_ms(lambda: (calls.append(1), time.sleep(0.003)), torch.device("cpu"), warmup=0, repeats=50, budget_ms=1.0)
    assert len(calls) == 3, "at least three, also beyond the time allowed"


def plan(shares, rule=None) -> Plan:
    early = len(shares) - 1
    return Plan(rule or Confidence(), (*(f"e{k}" for k in range(early)), "output"), (0.5,) * early + (-INF,), shares, 0.5)


def table(segments, heads, sync=0.0, gather=0.0, sizes=(1, 10)) -> LatencyTable:
    """Times proportional to the rows."""
    scale = torch.tensor(sizes, dtype=torch.float64)
    segment = torch.tensor(segments, dtype=torch.float64)[:, None] * scale
    head = torch.tensor([*heads, 0.0], dtype=torch.float64)[:, None] * scale
    return LatencyTable(sizes, segment, head, gather * scale, sync, "made up")


def test_an_exit_pays_when_it_saves_more_than_its_head():
    """At batch 1: half leave, one segment of 1 ms follows, so 0.5 ms is saved."""
    for head, pays in ((0.4, True), (0.499, True), (0.501, False), (5.0, False)):
        assert worthwhile(plan((0.5, 0.5)), table([1.0, 1.0], [head]), 1, [True]) == [pays]
    assert worthwhile(plan((0.0, 1.0)), table([1.0, 1.0], [1e-9]), 1, [True]) == [False], "nobody leaves"
    assert worthwhile(plan((1.0, 0.0)), table([1.0, 1.0], [0.99]), 1, [True]) == [True], "everybody leaves"


def test_waiting_for_the_count_is_paid_too():
    for sync, pays in ((0.3, True), (0.5, False)):
        assert worthwhile(plan((0.5, 0.5)), table([1.0, 1.0], [0.1], sync=sync), 1, [True]) == [pays]
    # A batch of ten saves five times a segment's millisecond and waits once.
    assert worthwhile(plan((0.5, 0.5)), table([1.0, 1.0], [0.0], sync=4.9), 10, [True]) == [True]
    assert worthwhile(plan((0.5, 0.5)), table([1.0, 1.0], [0.0], sync=5.1), 10, [True]) == [False]


def test_gathering_is_paid_by_batches_and_not_by_single_rows():
    dear = table([1.0, 1.0], [0.0], gather=0.6)
    assert worthwhile(plan((0.5, 0.5)), dear, 1, [True]) == [True]
    assert worthwhile(plan((0.5, 0.5)), dear, 10, [True]) == [False]
    assert worthwhile(plan((0.5, 0.5)), table([1.0, 1.0], [0.0], gather=0.4), 10, [True]) == [True]


def test_what_a_dropped_exit_let_go_leaves_at_the_next():
    """Alone, the second exit lets 10 % go and would not pay its head of 0.15; with the first one's 30 % it does."""
    shares = (0.3, 0.1, 0.6)
    heads = [5.0, 0.15]
    assert worthwhile(plan(shares), table([1.0, 0.1, 1.0], heads), 1, [True, True]) == [False, True]
    assert worthwhile(plan(shares), table([1.0, 0.1, 1.0], heads), 1, [False, True]) == [False, True]
    assert worthwhile(plan((0.3, 0.1, 0.6)), table([1.0, 0.1, 1.0], [0.0, 0.15]), 1, [True, True]) == [True, False]


def test_only_one_is_dropped_at_a_time():
    """Of two equal exits side by side neither pays while both are there; one of them alone does."""
    found = worthwhile(plan((0.2, 0.2, 0.6)), table([1.0, 0.0, 1.0], [0.3, 0.3]), 1, [True, True])
    assert found.count(True) == 1


def test_exits_that_are_off_stay_off():
    free = table([1.0, 1.0, 1.0], [0.0, 0.0])
    assert worthwhile(plan((0.0, 0.5, 0.5)), free, 1, [False, True]) == [False, True]
    assert worthwhile(plan((0.5, 0.0, 0.5)), free, 1, [False, False]) == [False, False]


# ------------------------------------------------------------------------------------------------------------ heads that need others


CHAINS = {"heads": (None, True), "rule": (Patience(), False)}
"""Heads that read earlier answers, and a rule that counts them."""


@pytest.fixture(params=list(CHAINS))
def chain(request):
    return CHAINS[request.param]


def test_a_head_is_saved_only_if_no_later_checked_exit_needs_it(chain):
    """At batch 1 the first exit lets 30 % skip 1 ms and its head takes 0.7 ms, which runs for the second exit anyway."""
    rule, chained = chain
    shares, times = (0.3, 0.4, 0.3), table([1.0, 1.0, 1.0], [0.7, 0.0])
    assert worthwhile(plan(shares), times, 1, [True, True]) == [False, True]
    assert worthwhile(plan(shares, rule), times, 1, [True, True], chained=chained) == [True, True]
    assert worthwhile(plan(shares, rule), times, 1, [True, False], chained=chained) == [False, False], "no exit after it"


def test_the_last_of_chained_heads_is_saved(chain):
    rule, chained = chain
    dear_at_the_end = table([1.0, 1.0, 1.0], [0.0, 9.0])
    assert worthwhile(plan((0.4, 0.3, 0.3), rule), dear_at_the_end, 1, [True, True], chained=chained) == [True, False]


def test_a_checked_exit_pays_for_the_heads_before_it(chain):
    """Also of exits that are not checked."""
    rule, chained = chain
    dear_at_the_start = table([1.0, 1.0, 1.0], [9.0, 0.0])
    assert worthwhile(plan((0.0, 0.7, 0.3)), dear_at_the_start, 1, [False, True]) == [False, True]
    assert worthwhile(plan((0.0, 0.7, 0.3), rule), dear_at_the_start, 1, [False, True], chained=chained) == [False, False]


def test_chained_exits_that_lose_only_together_go_together(chain):
    """4.08 ms with all three, more without any one of them, 4 ms without all."""
    rule, chained = chain
    shares, times = (0.1, 0.1, 0.5, 0.3), table([1.0] * 4, [0.4] * 3)
    every = [True] * 3
    made = plan(shares, rule)
    assert expected_ms(made, times, 1, every, True) == pytest.approx(4.08)
    assert all(expected_ms(made, times, 1, [j != k for j in range(3)], True) > 4.08 for k in range(3))
    assert worthwhile(made, times, 1, every, chained=chained) == [False] * 3
    assert worthwhile(plan(shares), times, 1, every) == [False, False, True]


@pytest.mark.parametrize("head", [PooledLinear(), Cascade(PooledLinear())], ids=["alone", "chained"])
@pytest.mark.parametrize("rule", [Confidence(), Patience()], ids=["stateless", "stateful"])
def test_heads_are_paid_where_the_engine_counts_their_cost(head, rule):
    """With FLOPs for times, the expected time is the mean of the costs that the engine gives its answers."""
    net = attach(vector_model(), AT, example=torch.randn(2, 6), head=head).eval()
    shares = (0.1, 0.2, 0.15, 0.25, 0.3)
    made = Plan(rule, net.names, (0.5,) * EXITS + (-INF,), shares, 0.5)
    flops = table([float(s.flops) for s in net.cut().spec.segments], [float(e.head_flops) for e in net.exits])
    for keep in itertools.product([False, True], repeat=EXITS):
        leaving, waiting = [0.0] * (EXITS + 1), 0.0
        for k, share in enumerate(shares):
            waiting += share
            if k == EXITS or keep[k]:
                leaving[k], waiting = waiting, 0.0
        mean = float(torch.tensor(leaving, dtype=torch.float64) @ exit_costs(net, made, keep))
        chained = isinstance(head, Cascade) or rule.stateful
        assert expected_ms(made, flops, 1, keep, chained) == pytest.approx(mean, rel=1e-12)
