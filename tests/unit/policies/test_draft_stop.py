"""Draft-stop rules: known answers, and that a rule remembers nothing of drafts behind the first rejected one."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from offramp.core.errors import InvalidInput
from offramp.core.parts import part_from_dict, part_to_dict
from offramp.policies.acceptance import AcceptanceBins
from offramp.policies.draft_stop import (
    STOPS,
    BelowProbability,
    BetaThompson,
    CalibratedThompson,
    DraftStop,
    FixedLength,
    MarginalValue,
)

MOST = 5
CPU = torch.device("cpu")
RULES: list[DraftStop] = [
    FixedLength(),
    BelowProbability(0.6),
    BetaThompson(),
    BetaThompson(3.0, 0.5),
    CalibratedThompson(),
    MarginalValue(1.0, 4.0),
    MarginalValue(0.5, 2.0, plain=3.0, acceptance=0.4, bins=AcceptanceBins.trusting(4, 1.0)),
]


@pytest.fixture(params=RULES, ids=lambda r: type(r).__name__)
def rule(request) -> DraftStop:
    return request.param


def drafting(rule: DraftStop, state, confidence: Tensor, noise: Tensor):
    """Ask after every draft; decisions ``[B, MOST]`` and the state."""
    said = []
    for k in range(MOST):
        go, state = rule.go(state, k + 1, confidence[:, k], noise[:, k])
        said.append(go)
    return torch.stack(said, 1), state


def test_parts_are_listed_and_saved(rule):
    assert {type(r).__name__ for r in RULES} | {"AcceptanceBins"} == set(STOPS)
    assert part_from_dict(json.loads(json.dumps(part_to_dict(rule))), STOPS) == rule


def test_nothing_is_known_of_drafts_behind_the_first_rejected(rule):
    """What makes sampling exact: see the top of draft_stop.py."""
    g = torch.Generator().manual_seed(1)
    rows = 400
    drafts = torch.randint(0, MOST + 1, (rows,), generator=g)
    kept = (torch.rand(rows, generator=g) * (drafts + 1)).long()
    other = torch.where(kept < drafts, kept + 1 + (torch.rand(rows, generator=g) * (MOST - kept)).long(), drafts)
    assert ((other > kept) == (drafts > kept)).all() and (other != drafts).any()
    confidence, noise = torch.rand(rows, MOST, generator=g), torch.rand(rows, MOST, generator=g)
    known = torch.arange(MOST) <= torch.where(kept < drafts, kept, kept - 1)[:, None]
    changed = torch.where(known, confidence, torch.rand(rows, MOST, generator=g))
    assert (changed != confidence).any()
    first = rule.begin(rows, MOST, CPU)
    one = rule.learn(drafting(rule, first, confidence, noise)[1], drafts, kept)
    two = rule.learn(drafting(rule, first, changed, noise)[1], other, kept)
    assert set(one) == set(two)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=0)


def test_a_decision_does_not_know_later_drafts_nor_other_rows(rule):
    g = torch.Generator().manual_seed(2)
    confidence, noise = torch.rand(30, MOST, generator=g), torch.rand(30, MOST, generator=g)
    whole, state = drafting(rule, rule.begin(30, MOST, CPU), confidence, noise)
    drafts = torch.full((30,), MOST)
    kept = torch.randint(0, MOST + 1, (30,), generator=g)
    again, _ = drafting(rule, rule.learn(state, drafts, kept), confidence, noise)
    later = confidence.clone()
    later[:, 3:] = torch.rand(30, 2, generator=g)
    assert torch.equal(drafting(rule, rule.begin(30, MOST, CPU), later, noise)[0][:, :3], whole[:, :3])
    for row in range(0, 30, 7):
        at = slice(row, row + 1)
        alone, state = drafting(rule, rule.begin(1, MOST, CPU), confidence[at], noise[at])
        assert torch.equal(alone, whole[at])
        after, _ = drafting(rule, rule.learn(state, drafts[at], kept[at]), confidence[at], noise[at])
        assert torch.equal(after, again[at])


def test_a_row_without_drafts_learns_nothing(rule):
    state = rule.begin(3, MOST, CPU)
    none = torch.zeros(3, dtype=torch.int64)
    after = rule.learn(state, none, none)
    assert set(after) == set(state)
    for name in state:
        assert torch.equal(after[name], state[name])


def test_a_graph_can_hold_it(rule):
    """On tensors without values, nothing can wait for one: no synchronisation, no shape that depends on data."""
    with FakeTensorMode():
        state = rule.begin(4, MOST, CPU)
        drafts = torch.randint(0, MOST, (4,))
        for k in range(MOST):
            go, state = rule.go(state, k + 1, torch.rand(4), torch.rand(4))
            assert go.shape == (4,) and go.dtype == torch.bool
        after = rule.learn(state, drafts, drafts)
    first = rule.begin(4, MOST, CPU)
    assert {k: (v.shape, v.dtype) for k, v in after.items()} == {k: (v.shape, v.dtype) for k, v in first.items()}


def test_kangaroo_stops_after_a_draft_below_eta():
    go, _ = BelowProbability(0.6).go({}, 1, torch.tensor([0.59, 0.6, 0.61, 0.0, 1.0]), torch.zeros(5))
    assert go.tolist() == [False, True, True, False, True]


def test_thompson_counts_as_published():
    rule = BetaThompson()
    state = rule.begin(3, MOST, CPU)
    state = rule.learn(state, torch.tensor([4, 4, 0]), torch.tensor([4, 1, 0]))
    assert state["a"].tolist() == [5, 2, 1] and state["b"].tolist() == [1, 2, 1]
    state = rule.learn(state, torch.tensor([2, 2, 0]), torch.tensor([0, 2, 0]))
    assert state["a"].tolist() == [5, 4, 1] and state["b"].tolist() == [2, 2, 1]


def test_one_number_decides_like_a_drawn_theta():
    """Going has the same law as drawing theta from Beta(a, b) and then going with probability theta."""
    n = 200_000
    g = torch.Generator().manual_seed(0)
    for a, b in ((1.0, 1.0), (5.0, 2.0), (0.7, 9.0)):
        state = {"a": torch.full((n,), a), "b": torch.full((n,), b)}
        ours = BetaThompson().go(state, 1, torch.zeros(n), torch.rand(n, generator=g))[0].double().mean()
        torch.manual_seed(0)
        theta = torch.distributions.Beta(a, b).sample((n,))
        theirs = (torch.rand(n, generator=g) < theta).double().mean()
        spread = 2 * (0.25 / n) ** 0.5
        assert abs(float(ours) - a / (a + b)) < 4 * spread and abs(float(ours - theirs)) < 4 * spread


def test_calibrated_thompson_learns_from_the_bin_of_each_judged_draft():
    rule = CalibratedThompson(AcceptanceBins.trusting(2, 2.0))
    state = rule.begin(1, 3, CPU)
    for k, c in enumerate((0.9, 0.2, 0.8)):
        _, state = rule.go(state, k + 1, torch.tensor([c]), torch.tensor([0.5]))
    state = rule.learn(state, torch.tensor([3]), torch.tensor([1]))  # 0.9 kept, 0.2 rejected, 0.8 never judged
    assert state["accepted"].tolist() == [[0.5, 2.5]] and state["rejected"].tolist() == [[2.5, 0.5]]
    go, _ = rule.go(state, 1, torch.tensor([0.7]), torch.tensor([2.5 / 3 - 1e-3]))
    stop, _ = rule.go(state, 1, torch.tensor([0.7]), torch.tensor([2.5 / 3 + 1e-3]))
    assert bool(go) and not bool(stop)


def test_bins_are_calibrated_by_what_was_seen():
    g = torch.Generator().manual_seed(3)
    confidence = torch.rand(40_000, generator=g)
    accepted = torch.rand(40_000, generator=g) < confidence**2
    bins = AcceptanceBins.trusting(10, 2.0).fitted(confidence, accepted)
    state = bins.begin(1, CPU)
    for i in range(10):
        middle = torch.tensor([(i + 0.5) / 10])
        expected = float(middle**2) + 1 / 1200  # the mean of c^2 over a bin of width 1/10
        assert abs(float(bins.estimate(state, middle)) - expected) < 0.03
    assert all(a + b == pytest.approx(50) for a, b in zip(bins.accepted, bins.rejected, strict=True))


def by_hand(rule: MarginalValue, confidences: list[float]) -> int:
    """Drafts of a fresh row, by the rule's definition."""
    a = rule.acceptance
    worth = min((k * rule.draft + rule.verify) / sum(a**i for i in range(k + 1)) for k in range(1, MOST + 1))
    worth = worth if rule.plain is None else min(worth, rule.plain)
    bins = len(rule.bins.accepted)
    made, reach = 1, 1.0
    while made < MOST:
        i = min(bins - 1, int(confidences[made - 1] * bins))
        reach *= rule.bins.accepted[i] / (rule.bins.accepted[i] + rule.bins.rejected[i])
        if not reach * a * worth > rule.draft:
            break
        made += 1
    return made


@pytest.mark.parametrize("rule", [MarginalValue(1.0, 4.0), MarginalValue(0.3, 6.0), MarginalValue(1.0, 4.0, plain=1.5, acceptance=0.9)])
def test_marginal_value_is_what_it_says(rule):
    found = set()
    for seed in range(40):
        confidence = torch.rand(1, MOST, generator=torch.Generator().manual_seed(seed))
        said, _ = drafting(rule, rule.begin(1, MOST, CPU), confidence, torch.zeros(1, MOST))
        made = 1
        while made < MOST and bool(said[0, made - 1]):
            made += 1
        assert made == by_hand(rule, confidence[0].tolist())
        found.add(made)
    assert len(found) > 1


def rate(rule: DraftStop, draft: float, verify: float, seed: int, rounds: int = 1500, rows: int = 32) -> float:
    """Tokens per second of simulated rounds whose drafts are kept with probability equal to the square of their confidence."""
    g = torch.Generator().manual_seed(seed)
    state, tokens, time = rule.begin(rows, MOST, CPU), 0.0, 0.0
    for _ in range(rounds):
        confidence = torch.where(torch.rand(rows, MOST, generator=g) < 0.6, 0.97, 0.35) + 0.02 * torch.rand(rows, MOST, generator=g)
        right = torch.rand(rows, MOST, generator=g) < confidence**2
        said, state = drafting(rule, state, confidence, torch.rand(rows, MOST, generator=g))
        count = (1 + said[:, : MOST - 1].long().cumprod(1).sum(1)).clamp(max=MOST)
        kept = torch.minimum(right.long().cumprod(1).sum(1), count)
        tokens += float((kept + 1).sum())
        time += float((count * draft + verify).sum())
        state = rule.learn(state, count, kept)
    return tokens / time


def test_marginal_value_is_worth_it():
    """Where acceptance varies and confidence tells, it beats every fixed length."""
    draft, verify = 1.0, 4.0
    marginal = rate(MarginalValue(draft, verify), draft, verify, 0)

    class UpTo(DraftStop):
        def __init__(self, length: int) -> None:
            self.length = length

        def go(self, state, made, probability, noise):
            return torch.full_like(probability, float(made < self.length), dtype=torch.float32) > 0, state

    fixed = [rate(UpTo(k), draft, verify, 0) for k in range(1, MOST + 1)]
    assert marginal > 1.02 * max(fixed)


@pytest.mark.parametrize(
    "make",
    [
        lambda: BelowProbability(1.5),
        lambda: BetaThompson(0.0, 1.0),
        lambda: MarginalValue(0.0, 1.0),
        lambda: MarginalValue(1.0, 1.0, plain=float("inf")),
        lambda: MarginalValue(1.0, 1.0, acceptance=1.0),
        lambda: AcceptanceBins((1.0,), (1.0, 2.0)),
        lambda: AcceptanceBins((), ()),
        lambda: AcceptanceBins.trusting(0),
        lambda: AcceptanceBins.trusting().fitted(torch.tensor([1.2]), torch.tensor([True])),
        lambda: AcceptanceBins.trusting().fitted(torch.tensor([0.2, 0.3]), torch.tensor([True])),
    ],
)
def test_refuses(make):
    with pytest.raises(InvalidInput):
        make()
