"""Recipes: their losses by hand, and what they leave alone."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from offramp.core.errors import ArtifactError, InvalidInput
from offramp.core.parts import part_from_dict, part_to_dict
from offramp.train import (
    PARTS,
    Alternating,
    CrossEntropy,
    Distill,
    EarlyWeighted,
    Equal,
    Explicit,
    FinalOnly,
    Frozen,
    IndexWeighted,
    Joint,
    MeanSquared,
    Ramp,
    Seen,
    ToNext,
    TwoStage,
    fit,
)
from offramp.train.recipe import Phase, allot

LABELS = torch.tensor([0, 2, 1, 1])


def seen(step: int = 0, progress: float = 0.0, labels: torch.Tensor | None = LABELS) -> Seen:
    generator = torch.Generator().manual_seed(0)
    logits = tuple(torch.randn(4, 3, generator=generator, requires_grad=True) for _ in range(3))
    return Seen(logits, labels, CrossEntropy(), step, progress)


@pytest.mark.parametrize(
    ("weights", "progress", "expected"),
    [
        (Equal(), 0.0, (1, 1, 1)),
        (IndexWeighted(), 0.0, (1 / 6, 2 / 6, 3 / 6)),
        (EarlyWeighted(), 0.0, (3, 2, 1)),
        (Ramp(0.01, (0.3, 0.6)), 0.0, (0.01, 0.01, 1)),
        (Ramp(0.01, (0.3, 0.6)), 1.0, (0.3, 0.6, 1)),
        (Ramp(0.0), 0.5, (1 / 6, 2 / 6, 1)),
        (Explicit((4, 8, 12), normalise=True), 0.0, (4 / 24, 8 / 24, 0.5)),
        (FinalOnly(), 0.0, (0, 0, 1)),
    ],
)
def test_weights(weights, progress, expected):
    assert weights(3, progress) == pytest.approx(expected)
    item = seen(progress=progress)
    by_hand = sum(w * F.cross_entropy(z, LABELS) for w, z in zip(expected, item.logits, strict=True))
    objective = Joint(weights).objective(item)
    assert objective.total.item() == pytest.approx(by_hand.item(), rel=1e-6)
    assert [part is None for part in objective.losses] == [w == 0 for w in expected]


def test_weights_of_another_network_are_refused():
    with pytest.raises(InvalidInput, match="2 weights were given, but the network has 3"):
        Joint(Explicit((1, 2))).objective(seen())
    with pytest.raises(InvalidInput, match="not all 0"):
        Explicit((0.0, 0.0))


def test_alternating_trains_the_last_exit_in_even_steps():
    recipe = Alternating(IndexWeighted())
    even, odd = recipe.objective(seen(step=2)), recipe.objective(seen(step=3))
    assert [p is None for p in even.losses] == [True, True, False]
    assert odd.total.item() == pytest.approx(Joint(IndexWeighted()).objective(seen()).total.item())


class Watching(Joint):
    """Reads what a step costs and what is observed in the forward."""

    @property
    def needs_cost(self):
        return True

    def observe(self, logits, states):
        return len(logits), len(states)


@pytest.mark.parametrize("outer", [Distill, Frozen])
def test_a_recipe_around_another_leaves_to_it_what_it_does_not_change(outer):
    inner = Watching(equilibrium=True)
    made = outer(inner)
    assert made.needs_cost and made.observe((1, 2), (3,)) == (2, 1) and made.trains_heads
    assert made.trains_model is (outer is Distill) and made.equilibrium is (outer is Distill)


@pytest.mark.parametrize("to_next", [False, True])
def test_distillation_by_hand_and_no_gradient_into_the_teacher(to_next):
    item = seen()
    recipe = Distill(Joint(), ToNext() if to_next else PARTS["ToLast"](), temperature=2.0, alpha=0.3)
    teachers = item.logits[1:] if to_next else (item.logits[2], item.logits[2])
    gap = 0.0
    for z, t in zip(item.logits[:2], teachers, strict=True):
        p, q = torch.softmax(t / 2, -1), torch.softmax(z / 2, -1)
        gap += 4 * (p * (p / q).log()).sum(-1).mean().item()
    supervised = sum(F.cross_entropy(z, LABELS).item() for z in item.logits)
    objective = recipe.objective(item)
    assert objective.total.item() == pytest.approx(0.7 * supervised + 0.3 * gap, rel=1e-5)

    label_free = seen(labels=None)
    free = Distill(to=recipe.to, alpha=1.0).objective(label_free)
    free.total.backward()
    assert label_free.logits[2].grad is None
    assert label_free.logits[0].grad.abs().sum() > 0


def test_regression_distils_by_squared_difference():
    logits = tuple(torch.full((2, 1), v, requires_grad=True) for v in (1.0, 3.0))
    item = Seen(logits, torch.tensor([0.0, 0.0]), MeanSquared())
    objective = Distill(alpha=0.5).objective(item)
    assert objective.total.item() == pytest.approx(0.5 * (1 + 9) + 0.5 * 4)


@pytest.mark.parametrize(
    "recipe",
    [
        Joint(Ramp(0.01, (0.3, 0.6)), equilibrium=True),
        Frozen(Distill(Joint(IndexWeighted()), ToNext(), 3.0, 0.4)),
        TwoStage(Alternating(Explicit((1.0, 2.0, 3.0), True)), Frozen(Distill(alpha=1.0)), 0.25),
        TwoStage(TwoStage(), Joint(EarlyWeighted())),
    ],
)
def test_recipes_are_data(recipe):
    assert part_from_dict(part_to_dict(recipe), PARTS) == recipe
    with pytest.raises(ArtifactError):
        part_from_dict({"type": "system", "args": {}}, PARTS)


def test_phases_divide_the_whole_and_nest():
    nested = TwoStage(TwoStage(Joint(), Frozen(), 0.5), Frozen(), 0.5)
    assert [p.share for p in nested.phases()] == pytest.approx([0.25, 0.25, 0.5])
    for total in range(3, 40):
        parts = allot(total, nested.phases(), "epochs")
        assert sum(parts) == total and min(parts) >= 1
    assert allot(10, (Phase(Joint(), 0.5), Phase(Joint(), 0.5)), "epochs") == (5, 5)
    with pytest.raises(InvalidInput, match="at least 3 epochs, got 2"):
        allot(2, nested.phases(), "epochs")
    with pytest.raises(InvalidInput, match="one phase"):
        Distill(TwoStage())


def loader(data):
    return DataLoader(TensorDataset(*data), batch_size=16, shuffle=True)


def test_frozen_leaves_the_model_bit_identical_and_gives_flags_back(make, data):
    net = make(dropout=0.3)
    net.model[1][0].weight.requires_grad_(False)
    net.model[3].eval()
    before = {k: v.clone() for k, v in net.model.state_dict().items()}
    heads = {k: v.clone() for k, v in net.heads.state_dict().items()}
    flags = [(m.training) for m in net.modules()]
    grads = [p.requires_grad for p in net.parameters()]
    fit(net, loader(data), Frozen(), epochs=2, progress=False)
    assert all(torch.equal(v, before[k]) for k, v in net.model.state_dict().items())
    assert any(not torch.equal(v, heads[k]) for k, v in net.heads.state_dict().items())
    assert [m.training for m in net.modules()] == flags
    assert [p.requires_grad for p in net.parameters()] == grads
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_user_frozen_parameters_and_batch_norms_stay(make, data):
    net = make(at=("1", "2"))
    for p in net.model[0].parameters():
        p.requires_grad_(False)
    net.model[0].eval()
    net.model[2][1].eval()  # trainable: trained like the rest
    before = {k: v.clone() for k, v in net.model.state_dict().items()}
    fit(net, loader(data), Joint(), epochs=1, progress=False)
    after = net.model.state_dict()
    assert all(torch.equal(after[k], before[k]) for k in after if k.startswith("0."))
    assert not torch.equal(after["2.1.running_mean"], before["2.1.running_mean"])
    assert not torch.equal(after["1.0.weight"], before["1.0.weight"])


def test_heads_out_of_the_loss_are_left_alone_even_by_weight_decay(make, data):
    net = make()
    before = {k: v.clone() for k, v in net.heads.state_dict().items()}
    fit(
        net,
        loader(data),
        Joint(FinalOnly()),
        epochs=1,
        progress=False,
        optimizer=lambda ps: torch.optim.AdamW(ps, lr=0.1, weight_decay=0.5),
    )
    assert all(torch.equal(v, before[k]) for k, v in net.heads.state_dict().items())


def test_two_stage_trains_model_then_heads(make, data):
    net = make(norm=False)
    result = fit(net, loader(data), TwoStage(share=0.5), epochs=4, progress=False)
    steps = [r for r in result.history if r["event"] == "step"]
    assert [set(r["losses"]) for r in steps[:1] + steps[-1:]] == [{"output"}, {"0", "2", "output"}]
    assert {r["phase"] for r in steps} == {0, 1} and result.epochs == 4


def test_nothing_to_train_is_said(make, data):
    with pytest.raises(InvalidInput, match="does not depend on anything it may train"):
        fit(make(), loader(data), Frozen(Joint(FinalOnly())), epochs=1, progress=False)
    net = make()
    for p in net.parameters():
        p.requires_grad_(False)
    with pytest.raises(InvalidInput, match="nothing to train"):
        fit(net, loader(data), epochs=1, progress=False)
