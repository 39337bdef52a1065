"""The loop: accumulation, precision, checkpointing, errors, and that nothing of the caller's is left changed."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from offramp.core.errors import InvalidInput, MissingExtra
from offramp.network import attach
from offramp.train import Alternating, CrossEntropy, FinalOnly, Frozen, Joint, MeanSquared, NonFiniteLoss, Recipe, fit


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def close(a, b):
    for name, value in a.state_dict().items():
        torch.testing.assert_close(value, b.state_dict()[name], msg=name)


def test_training_learns(make, data):
    net = make()
    result = fit(
        net,
        DataLoader(TensorDataset(*data), batch_size=10, shuffle=True),
        epochs=20,
        eval_loader=[data],
        optimizer=lambda ps: torch.optim.Adam(ps, lr=0.02),
        progress=False,
    )
    evaluations = [r for r in result.history if r["event"] == "eval"]
    assert evaluations[-1]["accuracy"]["output"] > 0.9 > 0.6 > evaluations[0]["accuracy"]["output"]
    assert result.best["loss"] == min(r["loss"] for r in evaluations)
    assert result.steps == 100 and result.epochs == 20


@pytest.mark.parametrize("sizes", [[5, 5, 5], [4, 4, 3], [8, 1]])
def test_accumulation_equals_one_large_batch(make, data, sizes):
    """Also where the batches of a step differ in size, and where an epoch ends inside a step."""
    x, y = data[0][:22], data[1][:22]
    cuts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    small = [(x[a:b], y[a:b]) for a, b in itertools.pairwise(cuts)] + [(x[cuts[-1] :], y[cuts[-1] :])]
    large = [(x[: cuts[-1]], y[: cuts[-1]]), (x[cuts[-1] :], y[cuts[-1] :])]
    a, b = make(norm=False), make(norm=False)
    ra = fit(a, small, epochs=2, optimizer=sgd, gradient_accumulation_steps=len(sizes), progress=False)
    rb = fit(b, large, epochs=2, optimizer=sgd, progress=False)
    close(a, b)
    assert [r["rows"] for r in ra.history] == [r["rows"] for r in rb.history]
    assert [r["loss"] for r in ra.history] == pytest.approx([r["loss"] for r in rb.history], rel=1e-5)


def test_one_step_by_hand(make, data):
    net, by_hand = make(norm=False), make(norm=False)
    fit(net, [data], epochs=1, optimizer=sgd, progress=False, loss=CrossEntropy(0.1))
    loss = sum(nn.functional.cross_entropy(z, data[1], label_smoothing=0.1) for z in by_hand.train()(data[0]))
    optimizer = sgd(by_hand.parameters())
    loss.backward()
    optimizer.step()
    close(net, by_hand)


def test_alternation_follows_optimizer_steps(make, data):
    batches = [(data[0][i : i + 5], data[1][i : i + 5]) for i in range(0, 40, 5)]
    result = fit(make(), batches, Alternating(), epochs=1, gradient_accumulation_steps=2, progress=False)
    assert [len(r["losses"]) for r in result.history if r["event"] == "step"] == [1, 3, 1, 3]


def test_caller_is_left_alone(make, data):
    net = make(dropout=0.2)
    net.eval()
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    loader = DataLoader(TensorDataset(*data), batch_size=16, shuffle=True)
    forward = net.model.forward
    fit(net, loader, Joint(equilibrium=True), epochs=1, progress=False)
    assert torch.equal(torch.rand(3), expected)
    assert not any(m.training for m in net.modules())
    assert loader.sampler.generator is None and net.state_transform is None
    assert net.model.forward == forward and "forward" not in vars(net)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_flags_come_back_after_an_error(make, data):
    net = make()
    net.eval()
    with pytest.raises(InvalidInput):
        fit(net, [(data[0], data[1] + 7)], Frozen(), epochs=1, progress=False)
    assert not net.training and all(p.requires_grad for p in net.parameters())


def test_bfloat16_autocast_and_again_in_float32(make, data):
    loader = DataLoader(TensorDataset(*data), batch_size=16, shuffle=True)
    low, full = make(), make()
    seen = []
    handle = low.model[1][0].register_forward_hook(lambda m, a, o: seen.append(o.dtype))
    result = fit(low, loader, Joint(equilibrium=True), epochs=2, mixed_precision="bf16", progress=False)
    handle.remove()
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in low.parameters()} == {torch.float32}
    reference = fit(full, loader, Joint(equilibrium=True), epochs=2, progress=False)  # accelerate's state was given back
    assert result.history[0]["loss"] == pytest.approx(reference.history[0]["loss"], rel=2e-2)
    assert result.history[0]["loss"] != reference.history[0]["loss"]


class Checkpointed(nn.Module):
    def __init__(self, reentrant=None):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.2)) for _ in range(3))
        self.out = nn.Linear(8, 3)
        self.reentrant = reentrant

    def forward(self, x):
        for block in self.blocks:
            x = block(x) if self.reentrant is None or not self.training else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.out(x)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_gradient_checkpointing_changes_nothing(data):
    nets = []
    for reentrant in (None, False):
        net = attach(Checkpointed(reentrant), at=["blocks.0", "blocks.1"], example=torch.randn(2, 8))
        torch.manual_seed(1)
        for p in net.heads.parameters():
            nn.init.normal_(p, std=0.3)
        fit(net, [data], Joint(equilibrium=True), epochs=3, optimizer=sgd, progress=False)
        nets.append(net)
    close(*nets)
    net = attach(Checkpointed(True), at=["blocks.0", "blocks.1"], example=torch.randn(2, 8))
    with pytest.raises(InvalidInput, match="reentrant"):
        fit(net, [data], epochs=1, progress=False)


def test_regression(data):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Linear(8, 1))
    net = attach(model, at=["0"], example=torch.randn(2, 8))
    target = data[0][:, :2].sum(1)
    result = fit(
        net,
        [(data[0], target)],
        epochs=60,
        loss=MeanSquared(),
        optimizer=lambda ps: torch.optim.Adam(ps, lr=0.02),
        eval_loader=[(data[0], target[:, None])],
        progress=False,
    )
    assert result.history[-1]["loss"] < 0.1 * result.history[0]["loss"]
    assert "accuracy" not in result.best
    with pytest.raises(InvalidInput, match=r"labels.float\(\)"):
        fit(net, [(data[0], data[1])], epochs=1, loss=MeanSquared(), progress=False)
    absolute = fit(net, [(data[0], target)], epochs=1, loss=lambda z, y: (z[:, 0] - y).abs(), progress=False)
    assert absolute.steps == 1
    with pytest.raises(InvalidInput, match="one value per item"):
        fit(net, [(data[0], target)], epochs=1, loss=lambda z, y: (z[:, 0] - y).abs().mean(), progress=False)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (lambda y: y + 1, r"range over \[1, 3\] but the exits have 3 classes"),
        (lambda y: -y, r"range over \[-2, 0\]"),
        (lambda y: y.float(), r"labels.long\(\)"),
        (lambda y: y[:, None], r"class indices \[B\]"),
        (lambda y: y[:7], "50 inputs but labels of shape"),
        (lambda y: None, "the loader yields none"),
    ],
)
def test_bad_labels(make, data, labels, message):
    with pytest.raises(InvalidInput, match=message):
        fit(make(), [(data[0], labels(data[1]))], epochs=1, progress=False)


def test_soft_labels_equal_hard_ones(make, data):
    a, b = make(norm=False), make(norm=False)
    fit(a, [data], epochs=1, optimizer=sgd, progress=False)
    fit(b, [(data[0], nn.functional.one_hot(data[1], 3).float())], epochs=1, optimizer=sgd, progress=False)
    close(a, b)


def test_non_finite_loss_names_step_and_exit_and_takes_no_step(make, data):
    net = make(norm=False)
    fine, bad = (data[0], data[1]), (data[0], data[1])
    calls = [0]

    def poison(module, args, output):
        calls[0] += 1
        return output * float("nan") if calls[0] == 3 else output

    net.heads[1].register_forward_hook(poison)
    weights = []
    net.model.register_forward_pre_hook(lambda m, a: weights.append([p.detach().clone() for p in net.parameters()]))
    with pytest.raises(NonFiniteLoss, match=r"exit 2 is not finite at step 2 .*batch 0") as caught:
        fit(net, [fine, bad], epochs=2, progress=False)
    assert caught.value.step == 2 and caught.value.exits == ("2",)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), weights[-1], strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epochs": 0}, "epochs must be an integer >= 1"),
        ({"epochs": 1, "gradient_accumulation_steps": 0}, "gradient_accumulation_steps"),
        ({"epochs": 1, "max_grad_norm": 0.0}, "max_grad_norm must be > 0"),
        ({"epochs": 1, "recipe": "joint"}, "such as Joint"),
        ({"epochs": 1, "optimizer": lambda ps: None}, "returns a torch optimizer"),
        ({"epochs": 1, "mixed_precision": "int3"}, "mixed_precision='int3'"),
        ({"epochs": 1, "train_loader": iter([])}, "one-shot"),
        ({"epochs": 1, "train_loader": 3}, "must be iterable"),
        ({"epochs": 1, "train_loader": []}, "yields no batch"),
        ({"epochs": 1, "train_loader": [{"x": torch.zeros(2, 8), "label": [0, 1]}]}, "torch.as_tensor"),
    ],
)
def test_bad_arguments(make, data, arguments, message):
    with pytest.raises(InvalidInput, match=message):
        fit(make(), **{"train_loader": [data], "progress": False, **arguments})


def test_default_recipe_is_the_systems(make, data):
    from types import SimpleNamespace

    net = make()
    net.system = SimpleNamespace(recipe=Joint(FinalOnly()))
    result = fit(net, [data], epochs=1, progress=False)
    assert set(result.history[0]["losses"]) == {"output"}


def test_accelerate_missing_is_said(make, data, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(MissingExtra, match=r"offramp\[train\]"):
        fit(make(), [data], epochs=1, progress=False)


def test_progress_bar(make, data, capsys):
    fit(make(), [data], epochs=2)
    assert "2/2" in capsys.readouterr().out


def test_recipe_is_abstract():
    with pytest.raises(TypeError):
        Recipe()
