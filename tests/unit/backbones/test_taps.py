"""Taps: states under autocast, checkpointing and DDP; nothing is left behind."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from offramp.backbones import Taps
from offramp.core.errors import NotCuttable


class Net(nn.Module):
    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3))
        self.head = nn.Linear(6, 4)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return self.head(x)


AT = ("blocks.0", "blocks.2")


def hooks(model: nn.Module) -> list[int]:
    return [len(getattr(m, name)) for m in model.modules() for name in vars(m) if name.endswith("_hooks") or "hooks_" in name]


def test_states_are_the_modules_outputs_in_the_order_asked_for() -> None:
    model, x = Net(), torch.randn(3, 6)
    with Taps(model, ("blocks.2", "blocks.0")) as taps:
        model(x)
        late, early = taps.states
        assert taps.order == ("blocks.0", "blocks.2")
    assert torch.equal(early, model.blocks[0](x))
    assert torch.equal(late, model.blocks[2](model.blocks[1](early)))


def test_detach_restores_the_model_exactly() -> None:
    model = Net()
    kept = model.blocks[0].register_forward_hook(lambda *_: None)
    before, weights = hooks(model), copy.deepcopy(model.state_dict())
    described = {n: sorted(vars(m)) for n, m in model.named_modules()}
    with Taps(model, AT):
        assert hooks(model) != before
        model(torch.randn(2, 6)).sum().backward()
    assert hooks(model) == before
    assert {n: sorted(vars(m)) for n, m in model.named_modules()} == described
    assert all(torch.equal(a, b) for a, b in zip(weights.values(), model.state_dict().values(), strict=True))
    kept.remove()


def test_an_error_in_forward_leaves_no_hook() -> None:
    model = Net()
    before = hooks(model)
    with pytest.raises(RuntimeError, match="mat1"), Taps(model, AT):
        model(torch.randn(2, 7))
    assert hooks(model) == before


def test_a_missing_path_leaves_no_hook() -> None:
    model = Net()
    before = hooks(model)
    with pytest.raises(NotCuttable, match="no module"), Taps(model, ("blocks.0", "blocks.9")):
        pass
    assert hooks(model) == before


def test_autocast() -> None:
    model = Net()
    with torch.autocast("cpu", torch.bfloat16), Taps(model, ("blocks.0",)) as taps:
        out = model(torch.randn(2, 6))
        (state,) = taps.states
    assert out.dtype == torch.bfloat16 and state.dtype == torch.bfloat16
    (state.float().sum() + out.float().sum()).backward()
    assert model.blocks[0][0].weight.grad is not None


def test_checkpointing_records_once_and_gives_the_same_gradients() -> None:
    plain = Net()
    saved = copy.deepcopy(plain)
    saved.checkpointed = True
    x = torch.randn(4, 6)
    for model in (plain, saved):
        with Taps(model, AT) as taps:
            out = model(x)
            states = taps.states
            (out.sum() + sum((s**2).sum() for s in states)).backward()  # recomputes the blocks, with the hooks in place
            # The recomputation runs the hooks again; what was recorded in the forward must already be in the caller's hands.
        assert all(s.requires_grad for s in states)
    for a, b in zip(plain.parameters(), saved.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_data_parallel(tmp_path: Path) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        plain = Net()
        wrapped = DistributedDataParallel(copy.deepcopy(plain))
        x = torch.randn(4, 6)
        with Taps(wrapped.module, AT) as taps:
            out = wrapped(x)
            (out.sum() + sum(s.sum() for s in taps.states)).backward()
        with Taps(plain, AT) as taps:
            out = plain(x)
            (out.sum() + sum(s.sum() for s in taps.states)).backward()
        for a, b in zip(plain.parameters(), wrapped.module.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)
    finally:
        torch.distributed.destroy_process_group()


class Pair(nn.Module):
    def __init__(self, kind: type) -> None:
        super().__init__()
        self.linear, self.kind = nn.Linear(6, 6), kind

    def forward(self, x: Tensor):
        return self.kind((self.linear(x), x.sum()))


@pytest.mark.parametrize("kind", [tuple, list])
def test_transform_replaces_the_state_in_a_tuple(kind: type) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair, self.head = Pair(kind), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            state, _ = self.pair(x)
            return self.head(state)

    model, x = Outer(), torch.randn(3, 6)
    with Taps(model, ("pair",), transform=lambda index, state: state * 0) as taps:
        out = model(x)
        assert torch.equal(taps.states[0], torch.zeros(3, 6))
    assert torch.equal(out, model.head.bias.expand(3, 2))


def test_transform_scales_gradients_and_not_the_forward() -> None:
    model, x = Net(), torch.randn(3, 6)
    with Taps(model, ("blocks.0",), transform=lambda _, s: 0.5 * s + 0.5 * s.detach()):
        half = torch.autograd.grad(model(x).sum(), model.blocks[0][0].weight)[0]
    full = torch.autograd.grad(model(x).sum(), model.blocks[0][0].weight)[0]
    torch.testing.assert_close(half, 0.5 * full)


def test_state_written_over_later() -> None:
    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.act, self.head = nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.act(self.first(x)))

    model = Writing()
    with Taps(model, ("first",)) as taps:
        model(torch.randn(2, 6))
        with pytest.raises(NotCuttable, match="written over") as caught:
            _ = taps.states
    assert caught.value.reason == "output"
    with Taps(model, ("act",)) as taps:
        model(torch.randn(2, 6))
        assert (taps.states[0] >= 0).all()
    with Taps(model, ("first",), copy=True) as taps:
        x = torch.randn(2, 6)
        model(x)
        assert torch.equal(taps.states[0], model.first(x))


def test_unreached_and_repeated() -> None:
    class Odd(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.blocks[0](self.blocks[0](x)))

    model = Odd()
    for path, reason in (("blocks.0", "repeated"), ("blocks.1", "unreached")):
        with Taps(model, (path,)) as taps:
            model(torch.randn(2, 6))
            with pytest.raises(NotCuttable) as caught:
                _ = taps.states
        assert caught.value.reason == reason and caught.value.path == path
        assert caught.value.suggestions[0] == "blocks" and path not in caught.value.suggestions
