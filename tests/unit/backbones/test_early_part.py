"""A segment in two gives what it gave, and what runs early has not seen the state."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from denoisers import attached, batch
from offramp.backbones.early_part import early_part


@pytest.mark.parametrize("kind", ["uvit", "dit", "unet"])
def test_both_halves_of_every_segment_are_the_segment_bit_for_bit(kind: str) -> None:
    """For other rows than the model was exported with, too."""
    net = attached(kind)
    cut = net.cut()
    for rows in (2, 5):
        call = net.call(**batch(rows, net.sample_name, seed=rows))
        state = cut.begin(**call.kwargs)
        split = 0
        for k, segment in enumerate(cut.segments):
            before = cut.names(k - 1) if k else ()
            given = [state.values[n] for n in segment.inputs]
            halves = early_part(segment.module, [n in before for n in segment.inputs])
            if halves is not None:
                split += 1
                read = [segment.inputs[i] for i in halves.reads]
                assert cut.hidden_name(k) not in read
                found = halves.rest(*given, *halves.first(*(state.values[n] for n in read)))
                assert all(torch.equal(a, b) for a, b in zip(found, segment.module(*given), strict=True))
                if kind == "dit":
                    assert set(read) == {"timestep", "class_labels"}
            state = cut.run(state, k, k + 1)
        assert split >= 2


def traced(module: nn.Module, *given: Tensor) -> fx.GraphModule:
    """As an exporter leaves it: flat, with the tensors that each node gave."""
    exported = torch.export.export(module, given)
    found = exported.module()
    assert isinstance(found, fx.GraphModule)
    for node in list(found.graph.nodes):
        if node.op == "call_module":
            found.graph.erase_node(node)
    found.recompile()
    return found


class Conditioned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.level, self.mix = nn.Linear(3, 8), nn.Linear(4, 4)

    def forward(self, state: Tensor, level: Tensor) -> tuple[Tensor, ...]:
        scale, shift = self.level(torch.sin(level)).chunk(2, 1)
        return (self.mix(state) * (1 + scale) + shift,)


class Alone(Conditioned):
    """No product waits for the level alone."""

    def forward(self, state: Tensor, level: Tensor) -> tuple[Tensor, ...]:
        return (self.mix(state) * level.sum(1, keepdim=True).sin(),)


class Writing(Conditioned):
    """Writes into what it was given, so that order matters."""

    def forward(self, state: Tensor, level: Tensor) -> tuple[Tensor, ...]:
        moved = level.clone().add_(1.0)
        return (self.mix(state) + self.level(moved)[:, :4],)


def test_what_is_split_off_ends_with_the_last_product() -> None:
    state, level = torch.randn(2, 4), torch.randn(2, 3)
    module = traced(Conditioned(), state, level)
    halves = early_part(module, [False, True])
    assert halves is not None and halves.reads == (1,)
    (made,) = halves.first(level)
    assert made.shape == (2, 8), "the product; the two halves of it are views, and the sum is read in place"
    assert torch.equal(halves.rest(state, level, made)[0], module(state, level)[0])
    assert dict(halves.first.named_parameters())["level.weight"] is dict(module.named_parameters())["level.weight"]


def test_a_segment_with_nothing_to_run_early_is_left_whole() -> None:
    given = torch.randn(2, 4), torch.randn(2, 3)
    assert early_part(traced(Conditioned(), *given), [False, False]) is None, "no input is there before"
    assert early_part(traced(Alone(), *given), [False, True]) is None
    assert early_part(traced(Writing(), *given), [False, True]) is None
