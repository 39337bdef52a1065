"""Learned rules: each lesson by hand or against a known answer, and what it must leave alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from offramp import policies
from offramp.core.errors import InvalidInput
from offramp.core.parts import part_from_dict, part_to_dict
from offramp.core.types import Readout
from offramp.policies import HaltingCDF, LearnedGate, PredictedUncertainty, Selector, StateGate
from offramp.train import (
    PARTS,
    Alternating,
    BestDepth,
    CrossEntropy,
    Gates,
    Joint,
    MeanSquared,
    Ponder,
    PredictLoss,
    Seen,
    TargetExit,
    Wrongness,
    fit,
)

SHAPES = [(8,), (8,)]
LESSONS = [
    (lambda: LearnedGate(2), TargetExit(0.5)),
    (lambda: StateGate.for_shapes(SHAPES, shared=True), Wrongness()),
    (lambda: PredictedUncertainty.for_shapes(SHAPES), PredictLoss()),
    (lambda: HaltingCDF.for_shapes(SHAPES, inner=8), Ponder()),
    (lambda: Selector.for_shapes(SHAPES), BestDepth(0.3)),
]


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.02)


def loader(data):
    return DataLoader(TensorDataset(*data), batch_size=25, shuffle=True)


@pytest.mark.parametrize(("rule", "lesson"), LESSONS, ids=[type(x).__name__ for _, x in LESSONS])
def test_after_the_network_only_the_rule_changes_and_its_loss_falls(make, data, rule, lesson):
    torch.manual_seed(0)
    net, gate = make(), rule()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    result = fit(net, loader(data), Gates(gate, lesson), epochs=15, optimizer=adam, progress=False)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    terms = [r["terms"]["rule"] for r in result.history if r["event"] == "step"]
    assert sum(terms[-4:]) < sum(terms[:4])
    assert all(p.requires_grad for p in net.parameters())


def test_target_exit_by_hand():
    # Costs 0.2, 0.6, 1: with losses as given and trade-off 1 the best exits are 0, 2, 1.
    losses = torch.tensor([[0.1, 0.1, 0.1], [3.0, 3.0, 0.0], [2.0, 0.2, 0.2]])
    logits = torch.tensor([[0.5, -1.0], [0.2, 0.3], [-0.4, 2.0]])
    seen = Seen((torch.zeros(3, 2),) * 3, torch.zeros(3, dtype=torch.long), CrossEntropy(), cost=(0.2, 0.6, 1.0))
    target = torch.tensor([[1.0, 1.0], [0.0, 0.0], [0.0, 1.0]])
    weight = torch.tensor([2.0, 2.0])  # (3 - 1) / 1 for both gates
    by_hand = -(weight * target * F.logsigmoid(logits) + (1 - target) * F.logsigmoid(-logits)).mean()
    assert TargetExit(1.0).loss(logits, losses, seen).item() == pytest.approx(by_hand.item(), rel=1e-6)
    assert TargetExit(1.0, (0.2, 0.6, 1.0)).loss(logits, losses, seen).item() == pytest.approx(by_hand.item(), rel=1e-6)
    with pytest.raises(InvalidInput, match="cost has 2 values"):
        TargetExit(1.0, (0.2, 1.0)).loss(logits, losses, seen)


def test_best_depth_by_hand():
    losses = -torch.tensor([[0.9, 0.95, 0.99], [0.1, 0.2, 0.9]]).log()
    seen = Seen((torch.zeros(2, 2),) * 3, None, CrossEntropy(), cost=(0.2, 0.6, 1.0))
    depths = torch.tensor([[1.0, 0.0, -1.0], [0.3, 0.2, 0.1]])
    expected = F.cross_entropy(depths, torch.tensor([0, 2]))
    assert BestDepth(0.5).loss(depths, losses, seen).item() == pytest.approx(expected.item())


def test_wrongness_of_classes_and_of_values():
    observed = torch.tensor([[0.0, 2.0], [1.0, -1.0]])
    logits = (torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 1.0]]), torch.zeros(2, 2))
    seen = Seen(logits, torch.tensor([0, 1]), CrossEntropy())
    right = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert Wrongness().loss(observed, torch.zeros(2, 3), seen).item() == pytest.approx(
        (torch.sigmoid(observed) - right).square().mean().item()
    )
    values = (torch.tensor([[1.0], [2.0]]), torch.tensor([[0.5], [0.0]]), torch.zeros(2, 1))
    right = 1 - torch.tanh(torch.tensor([[1.0, 0.5], [1.0, 1.0]]))
    seen = Seen(values, torch.tensor([0.0, 1.0]), MeanSquared())
    assert Wrongness().loss(observed, torch.zeros(2, 3), seen).item() == pytest.approx(
        (torch.sigmoid(observed) - right).square().mean().item()
    )


def test_ponder_by_hand_and_zero_divergence_at_the_prior():
    losses = torch.tensor([[1.0, 2.0, 3.0]])
    seen = Seen((torch.zeros(1, 2),) * 3, None, CrossEntropy())
    at_prior = Ponder(beta=10.0, prior=0.25).loss(torch.tensor([[0.25, 0.25]]), losses, seen)
    p = [0.25, 0.75 * 0.25, 0.75**2]
    assert at_prior.item() == pytest.approx(sum(a * b for a, b in zip(p, (1, 2, 3), strict=True)), rel=1e-6)
    chances = torch.tensor([[0.5, 0.4]])
    q = [0.5, 0.2, 0.3]
    gap = sum(a * torch.tensor(a / b).log().item() for a, b in zip(p, q, strict=True))
    assert Ponder(10.0, 0.25).loss(chances, losses, seen).item() == pytest.approx(0.5 + 0.4 + 0.9 + 10 * gap, rel=1e-5)
    certain = torch.tensor([[1.0, 0.0]], requires_grad=True)
    Ponder().loss(certain, losses, seen).backward()
    assert certain.grad.isfinite().all()


def test_counted_cost_reaches_the_lesson(make, data):
    net = make()
    costs = net.costs()[0]

    class Spy(TargetExit):
        got: list = []  # noqa: RUF012

        def loss(self, observed, item_losses, seen):
            self.got.append(seen.cost)
            return super().loss(observed, item_losses, seen)

    fit(net, [data], Gates(LearnedGate(2), Spy()), epochs=1, progress=False)
    assert Spy.got[0] == pytest.approx(tuple((costs / costs[-1]).tolist()))


def test_joint_training_detached_does_not_disturb_the_network(make, data):
    alone, along = make(dropout=0.0), make(dropout=0.0)
    gate = StateGate.for_shapes(SHAPES, shared=True)
    start = {k: v.clone() for k, v in gate.state_dict().items()}
    fit(alone, loader(data), Alternating(), epochs=2, progress=False)
    fit(along, loader(data), Gates(gate, Wrongness(), Alternating()), epochs=2, progress=False)
    assert all(torch.equal(v, alone.state_dict()[k]) for k, v in along.state_dict().items())
    assert any(not torch.equal(v, start[k]) for k, v in gate.state_dict().items())


def test_ponder_trains_everything_through_the_expected_loss(make, data):
    torch.manual_seed(0)
    net, rule = make(norm=False), HaltingCDF.for_shapes(SHAPES, inner=8)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    result = fit(
        net,
        loader(data),
        Gates(rule, Ponder(), Joint(), task=0.0, detach=False),
        epochs=25,
        optimizer=adam,
        progress=False,
        eval_loader=[data],
    )
    assert all(not torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert result.best["loss"] < 0.6 * result.history[1]["loss"] or result.best["accuracy"]["output"] > 0.85


def test_trained_gate_is_a_rule_that_ranks_right_answers_first(make, data):
    torch.manual_seed(0)
    net, rule = make(norm=False), StateGate.for_shapes(SHAPES)
    inputs, labels = data
    shifted = torch.where(inputs[:, 3] > 0.2, (labels + 1) % 3, labels)  # where the network will be wrong can be told from the input
    fit(net, loader(data), Joint(), epochs=20, optimizer=adam, progress=False)
    fit(net, loader((inputs, shifted)), Gates(rule, Wrongness()), epochs=80, optimizer=adam, progress=False)
    net.eval()
    with torch.no_grad():
        logits, states = net.forward_with_states(data[0])
        score, _ = rule.score(0, Readout(logits[0], states[0]), {})
    right = logits[0].argmax(1) == shifted
    assert 0 < right.sum() < len(right)
    assert score[right].mean() > score[~right].mean() + 0.3


def test_resumes_with_the_rule(tmp_path, make, data):
    ends = []
    for folder, stops in (("a", (3, 8)), ("b", (8,))):
        torch.manual_seed(0)
        net, rule = make(dropout=0.2), HaltingCDF.for_shapes(SHAPES, inner=8)
        for stop in stops:
            fit(
                net,
                loader(data),
                Gates(rule, Ponder(), Joint(), task=0.5, detach=False),
                epochs=4,
                output_dir=tmp_path / folder,
                max_steps=stop,
                progress=False,
            )
        ends.append({**net.state_dict(), **{f"rule.{k}": v for k, v in rule.state_dict().items()}})
    assert all(torch.equal(v, ends[1][k]) for k, v in ends[0].items())


def test_gates_are_data_and_say_what_does_not_fit(make, data):
    recipe = Gates(LearnedGate(2, conditional=True), TargetExit(0.1, (0.1, 0.5, 1.0)), Alternating())
    back = part_from_dict(part_to_dict(recipe), {**policies.PARTS, **PARTS})
    assert part_to_dict(back) == part_to_dict(recipe)
    with pytest.raises(InvalidInput, match="through its method `halting`; LearnedGate has none"):
        fit(make(), [data], Gates(LearnedGate(2), Ponder()), epochs=1, progress=False)
    with pytest.raises(InvalidInput, match="nothing would train the network"):
        Gates(LearnedGate(2), TargetExit(), Joint(), task=0.0)
    with pytest.raises(InvalidInput, match="rule with weights"):
        Gates(policies.Confidence(), TargetExit())
    with pytest.raises(InvalidInput, match="without a rule"):
        Gates(LearnedGate(2), TargetExit(), recipe)
    assert isinstance(recipe.module, nn.Module)
