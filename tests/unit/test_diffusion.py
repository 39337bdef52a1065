from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offramp.core.errors import InvalidInput, NotCuttable
from offramp.core.noise import FlowMatching
from offramp.diffusion import DenoisingNet, attach_denoiser
from offramp.engines.diffusion.denoise import Denoiser
from offramp.policies.denoising import Every, Point, ResidualChange, StateChange, Uncertainty
from offramp.policies.fills import CachedOutput, CachedResidual, HeadOutput, Identity


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor, timestep: Tensor, y: Tensor | None = None, gain: float = 1.0, return_dict: bool = True) -> Any:
        state = self.a(x) * gain + timestep[:, None].float() / 1000
        if y is not None:
            state = state + y
        out = self.c(torch.relu(self.b(torch.relu(state))))
        return {"sample": out} if return_dict else (out,)


class Head(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.out = nn.Linear(6, width)

    def uncertainty(self, hidden: Tensor, log_snr: Tensor) -> Tensor:
        return hidden.mean(1, keepdim=True)

    def output(self, hidden: Tensor, log_snr: Tensor) -> Tensor:
        return self.out(hidden)


def attach(**kwargs: Any) -> DenoisingNet:
    given: Any = {"at": ["b", "a"], "noise": FlowMatching(), "example": {"x": torch.randn(2, 4), "timestep": torch.tensor([500, 20])}}
    return attach_denoiser(Net().eval(), **{**given, **kwargs})


@pytest.fixture(scope="module")
def net() -> DenoisingNet:
    return attach()


def test_places_are_in_the_order_in_which_they_run(net: DenoisingNet) -> None:
    assert net.at == ("a", "b")
    assert [net.boundary(p) for p in ("input", "a", "b", "output", 0, 1, -1, -2)] == [0, 1, 2, 3, 1, 2, 2, 1]
    for place in ("c", 2, -3):
        with pytest.raises(InvalidInput, match="No place"):
            net.boundary(place)


def test_calls_of_one_model_in_many_ways_are_one_cut(net: DenoisingNet) -> None:
    x, time = torch.randn(3, 4), torch.tensor([7, 7, 7])
    runner = Denoiser(net)
    want = net.model(x, time)["sample"]
    assert torch.equal(runner(x, time)["sample"], want)
    assert torch.equal(runner(x=x, timestep=time[:1], y=None)["sample"], want)
    assert torch.equal(runner(x, timestep=time[0], gain=1.0)["sample"], want)
    assert torch.equal(runner(x, 7, return_dict=False)[0], want)
    assert len(net._cuts) == 1
    torch.testing.assert_close(runner(x, 7.0, torch.ones(3, 6), gain=2.0)["sample"], net.model(x, time, torch.ones(3, 6), 2.0)["sample"])
    assert len(net._cuts) == 2
    for wrong in (lambda: runner(x), lambda: runner(x, torch.zeros(2)), lambda: runner(x, time, nothing=1)):
        with pytest.raises(InvalidInput):
            wrong()


def test_points_that_do_not_fit_are_refused_with_the_reason(net: DenoisingNet) -> None:
    for point, reason in (
        (Point("z", "b", Identity(), Every(2)), "No place 'z'.*cut after a, b"),
        (Point("b", "a", Identity(), Every(2)), "skips nothing"),
        (Point("b", "b", Identity(), Every(2)), "skips nothing"),
        (Point("a", "output", Identity(), Every(2)), "nothing there matches 'out0'"),
        (Point("a", "output", CachedResidual(), Every(2)), "Use a fill that remembers"),
        (Point("a", "output", HeadOutput(), Every(2)), r"learned head with output\("),
        (Point("a", "b", Identity(), Uncertainty()), r"learned head with uncertainty\("),
        (Point("a", "b", CachedOutput(), ResidualChange("b")), "must be before"),
    ):
        with pytest.raises(InvalidInput, match=reason):
            Denoiser(net, [Point("a", "b", Identity(), Every(2)), point])


def test_heads_that_do_not_fit_are_refused() -> None:
    net = attach(heads={"a": Head(5)})
    with pytest.raises(InvalidInput, match=r"output of the head gives \(2, 5\); expected \(2, 4\)"):
        Denoiser(net, [Point("a", "output", HeadOutput(), Every(2))])
    with pytest.raises(InvalidInput, match=r"uncertainty of the head gives \(2, 1\); expected \(2,\)"):
        Denoiser(net, [Point("a", "b", Identity(), Uncertainty())])
    with pytest.raises(InvalidInput, match="not one of the places"):
        attach(heads={"c": Head(4)})
    double = attach_denoiser(Net().double().eval(), ["a"], noise=FlowMatching(), example=(torch.randn(2, 4), 5), heads={"a": Head(4)})
    assert double.heads["a"].out.weight.dtype == torch.float64  # a head is where the model is and of its type


def test_what_cannot_be_attached_says_why() -> None:
    with pytest.raises(NotCuttable, match="no module at 'block'"):
        attach(at=["block"])
    with pytest.raises(InvalidInput, match="names at least one"):
        attach(at=[])
    with pytest.raises(InvalidInput, match="none twice"):
        attach(at=["a", "a"])
    with pytest.raises(InvalidInput, match="log-SNR"):
        attach(noise="linear")
    with pytest.raises(InvalidInput, match="no argument 'time_step'"):
        attach(timestep="time_step")
    with pytest.raises(InvalidInput, match="must hold a noisy input and the timestep"):
        attach(example={"x": torch.randn(2, 4)})
    with pytest.raises(InvalidInput, match="example must be"):
        attach(example=3)
    with pytest.raises(InvalidInput, match=r"takes a torch\.nn\.Module"):
        attach_denoiser("model", ["a"], noise=FlowMatching(), example={})  # type: ignore[arg-type]
    moved = Net()
    moved.b._hf_hook = object()  # type: ignore[assignment]
    with pytest.raises(InvalidInput, match="accelerate's hooks"):
        attach_denoiser(moved, ["a"], noise=FlowMatching(), example={})
    cached = Net()
    cached.is_cache_enabled = True  # type: ignore[assignment]
    with pytest.raises(InvalidInput, match="disable_cache"):
        attach_denoiser(cached, ["a"], noise=FlowMatching(), example={})


def test_an_example_of_other_names_is_refused_with_those_that_the_model_takes() -> None:
    with pytest.raises(InvalidInput, match=r"does not fit Net.forward: got an unexpected keyword argument 'noisy'. It takes x, timestep"):
        attach(example={"noisy": torch.randn(2, 4), "timestep": torch.tensor([1, 2])})


def test_a_signal_that_is_never_asked_for_needs_nothing(net: DenoisingNet) -> None:
    x = torch.randn(2, 4)
    runner = Denoiser(net, [Point("a", "b", CachedOutput(), StateChange(), float("inf"))])
    assert torch.equal(runner(x, 5)["sample"], net.model(x, torch.tensor([5, 5]))["sample"])
    assert runner.trajectory.cache_bytes == 0 and runner.report.reasons == {}


def test_an_ordinary_forward_with_states_for_training(net: DenoisingNet) -> None:
    output, states = net.forward_with_states(torch.randn(2, 4), torch.tensor([1, 2]))
    assert [tuple(s.shape) for s in states] == [(2, 6), (2, 6)]
    output["sample"].sum().backward()
    assert net.model.a.weight.grad is not None  # type: ignore[union-attr]
