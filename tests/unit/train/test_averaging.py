"""Averages of weights: their values, their place in checkpoints, and that they disturb nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from offramp.core.errors import InvalidInput
from offramp.network import MultiExit, attach
from offramp.train import Averaged, Joint, TwoStage, fit


def made() -> MultiExit:
    torch.manual_seed(0)
    return attach(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)), at=["0"], example=torch.randn(2, 4))


def batches() -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 4, generator=g), torch.randint(0, 3, (8,), generator=g)) for _ in range(7)]


def test_averages_follow_the_weights_and_training_does_not_notice() -> None:
    seen: list[list[Tensor]] = []

    def noting(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(parameters, 1e-2)
        optimizer.register_step_post_hook(lambda *_: seen.append([p.detach().clone() for p in parameters]))
        return optimizer

    net, average = made(), Averaged(noting, decay=0.5)
    fit(net, batches(), epochs=1, optimizer=average, progress=False)
    plain = made()
    fit(plain, batches(), epochs=1, optimizer=lambda p: torch.optim.AdamW(p, 1e-2), progress=False)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), plain.parameters(), strict=True))
    expected = seen[0]
    for step, weights in enumerate(seen[1:], 2):
        rate = 1 - min(0.5, step / (step + 9))
        expected = [e + rate * (w - e) for e, w in zip(expected, weights, strict=True)]
    trained = [p.detach().clone() for p in net.parameters()]
    with average.weights():
        inside = [p.detach().clone() for p in net.parameters()]
    for a, b in zip(inside, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert all(torch.equal(p, t) for p, t in zip(net.parameters(), trained, strict=True))
    assert average.steps == 7
    average.apply()
    assert all(torch.equal(p, i) for p, i in zip(net.parameters(), inside, strict=True))


def test_a_resumed_run_has_the_averages_of_an_uninterrupted_one(tmp_path: Path) -> None:
    def run(folder: Path, *stops: int) -> list[Tensor]:
        for stop in stops:
            net, average = made(), Averaged(lambda p: torch.optim.AdamW(p, 1e-2))
            fit(net, batches(), epochs=2, optimizer=average, output_dir=folder, max_steps=stop, progress=False)
        average.apply()
        return [p.detach().clone() for p in net.parameters()]

    for a, b in zip(run(tmp_path / "a", 11), run(tmp_path / "b", 4, 11), strict=True):
        assert torch.equal(a, b)


def test_weights_that_get_no_gradient_are_left_out_until_they_do() -> None:
    net, average = made(), Averaged(lambda p: torch.optim.AdamW(p, 1e-2))
    fit(net, batches(), TwoStage(then=Joint()), epochs=2, optimizer=average, progress=False)
    assert average.steps == 7


def test_errors() -> None:
    with pytest.raises(InvalidInput, match="decay"):
        Averaged(torch.optim.AdamW, decay=1.0)
    with pytest.raises(InvalidInput, match="no averages"):
        Averaged(torch.optim.AdamW).apply()
