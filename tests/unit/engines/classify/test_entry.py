"""What an engine is given: several inputs, nested ones, constants, other types; told apart on every call, however they repeat."""

from __future__ import annotations

import pytest
import torch
from engine_models import WIDTH, items, joined, run_of, same, trace
from torch import Tensor, nn

from offramp.budget import leave_at
from offramp.core.certificate import Plan
from offramp.core.errors import InvalidInput
from offramp.engines.classify.engine import Latency, Quota, Throughput, compile
from offramp.network import attach
from offramp.policies import Confidence


class TwoInputs(nn.Module):
    """Two inputs, one of which is used late, and a number that the graph has built in."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(a))) + b.sum(1, keepdim=True))) * scale


def two_inputs():
    torch.manual_seed(0)
    net = attach(TwoInputs().eval(), ["first"], example=((torch.randn(2, 6), torch.randn(2, 6)), {"scale": 2.0})).eval()
    return net, Plan(Confidence(), net.names, (0.5, float("-inf")), (0.5, 0.5), 0.8)


def test_inputs_are_told_apart_on_every_call(graphs):
    """One tensor given twice, and then two of the same shape."""
    net, plan = two_inputs()
    run = compile(net, plan, Latency(8), measure=False, graphs=graphs)
    a, b = items()[:8], items()[8:16]
    for first, second in ((a, a), (a, b), (b, a)):
        answers = run(first, second, scale=2.0)
        with torch.no_grad():
            expected = net.model(first, second, scale=2.0)
        late = answers.exit == 1
        assert late.any()
        torch.testing.assert_close(answers.output[late], expected[late])


def test_a_constant_that_is_built_in_is_checked_on_every_call(graphs):
    net, plan = two_inputs()
    run = compile(net, plan, Latency(8), measure=False, graphs=graphs)
    a, b = items()[:8], items()[8:16]
    for _ in range(3):
        run(a, b, scale=float("2.0"))
        with pytest.raises(InvalidInput, match="constant"):
            run(a, b, scale=float("3.0"))
    with pytest.raises(InvalidInput, match="structure"):
        run(a, b)


def test_inputs_of_another_type_are_converted(plan, graphs):
    run = run_of(plan, Latency(8), graphs=graphs)
    expected = run(items()[:8])
    for _ in range(2):
        same(run(items()[:8].double()), expected)
        same(run(items()[:8]), expected)
    with pytest.raises(InvalidInput):
        run(torch.randn(8, 7))
    with pytest.raises(InvalidInput):
        run(torch.randn(8, 6, 1))


def test_stream_takes_what_a_loader_yields(plan, graphs):
    x = items()[:12]
    for mode in (Latency(4), Throughput(4), Quota(4)):
        run = run_of(plan, mode, graphs=graphs)
        plain = joined(run.stream(x.split(4)))
        labelled = joined(run.stream([(part, torch.zeros(4, dtype=torch.long)) for part in x.split(4)]))
        pairs = joined(run.stream([((part,), {}) for part in x.split(4)]))
        assert torch.equal(plain[1], labelled[1]) and torch.equal(plain[1], pairs[1])


# ---------------------------------------------------------------------------------------------------------------- nested inputs


class Nested(nn.Module):
    """A sequence and a mapping of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, pair: list[Tensor] | tuple[Tensor, ...], extra: dict[str, Tensor]) -> Tensor:
        hidden = torch.tanh(self.second(torch.tanh(self.first(pair[0]))) + extra["shift"])
        return self.head(hidden) * pair[1].sum(1, keepdim=True)


@pytest.mark.parametrize("kind", [list, tuple], ids=["unhashable", "hashable"])
@pytest.mark.parametrize("mode", [Latency(8), Quota(8), Throughput(8)], ids=["latency", "quota", "throughput"])
def test_nested_inputs(kind, mode, graphs):
    """Shapes that were seen before with other tensors, the same tensors at other places, other numbers of rows."""
    torch.manual_seed(0)
    example = ((kind([torch.randn(2, 6), torch.randn(2, 6)]),), {"extra": {"shift": torch.randn(2, WIDTH)}})
    net = attach(Nested().eval(), ["first"], example=example).eval()
    run = compile(net, Plan(Confidence(), net.names, (0.6, float("-inf")), (0.5, 0.5), 0.8), mode, measure=False, graphs=graphs)
    shift = torch.randn(8, WIDTH)
    a, b, c = items()[:8], items()[8:16], items()[16:24]
    for first, second, rows in ((a, b, 8), (b, a, 8), (c, c, 8), (a, b, 5), (a, c, 8)):
        answers = run(kind([first[:rows], second[:rows]]), extra={"shift": shift[:rows]})
        with torch.no_grad():
            logits = torch.stack(net(kind([first[:rows], second[:rows]]), extra={"shift": shift[:rows]}), dim=1)
        torch.testing.assert_close(answers.output, logits[torch.arange(rows), answers.exit], rtol=1e-5, atol=1e-5)
        if not isinstance(mode, Quota):
            assert torch.equal(answers.exit, leave_at(torch.softmax(logits, -1).amax(-1), (0.6, float("-inf"))))
    with pytest.raises(InvalidInput, match="structure"):
        run(kind([a, b, c]), extra={"shift": shift})


# ------------------------------------------------------------------------------------------------------------ shapes seen before


class Options(nn.Module):
    """Two tensors, and constants of every plain type, that all change the answer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, a: Tensor, b: Tensor, flip: bool = False, power: int = 1, bias: Tensor | None = None) -> Tensor:
        hidden = torch.tanh(self.second(torch.tanh(self.first(a)))) ** power
        hidden = hidden + (b.sum(1, keepdim=True) if bias is None else bias)
        return self.head(-hidden if flip else hidden)


def options(flip: bool, power: int):
    torch.manual_seed(0)
    example = {"a": torch.randn(2, 6), "b": torch.randn(2, 6), "flip": flip, "power": power, "bias": None}
    net = attach(Options().eval(), ["first"], example=example).eval()
    return net, Plan(Confidence(), net.names, (0.5, float("-inf")), (0.5, 0.5), 0.8)


@pytest.mark.parametrize("constants", [(True, 2), (False, 1), (True, 1), (False, 3)])
def test_constants_that_change_are_refused_also_at_shapes_seen_before(constants, graphs):
    """``True`` is not 2 and ``None`` is no tensor; what was refused once does not change what comes after it."""
    flip, power = constants
    net, plan = options(flip, power)
    run = compile(net, plan, Latency(8), measure=False, graphs=graphs)
    a, b = items()[:8], items()[8:16]
    right = {"flip": flip, "power": power, "bias": None}
    with torch.no_grad():
        logits = torch.stack(net(a, b, **right), dim=1)
    wrong = [{"flip": not flip}, {"power": power + 1}, {"power": power + 2}, {"power": None}, {"flip": None}, {"bias": torch.zeros(8, 1)}]
    for change in ({}, *wrong, {}, *wrong):
        if change:
            with pytest.raises(InvalidInput, match="constant"):
                run(a=a, b=b, **{**right, **change})
        answers = run(a=a, b=b, **right)
        torch.testing.assert_close(answers.output, logits[torch.arange(8), answers.exit])
        assert torch.equal(answers.exit, leave_at(torch.softmax(logits, -1).amax(-1), plan.thresholds))


def test_keywords_may_come_in_any_order(graphs):
    """Two tensors of one shape, told apart by name and not by place."""
    net, plan = options(True, 1)
    run = compile(net, plan, Latency(8), measure=False, graphs=graphs)
    a, b = items()[:8], items()[8:16]
    rest = {"flip": True, "power": 1, "bias": None}
    expected = run(a=a, b=b, **rest)
    for _ in range(2):
        same(run(b=b, a=a, **rest), expected)
        same(run(**rest, a=a, b=b), expected)
    swapped = run(b=a, a=b, **rest)
    with torch.no_grad():
        logits = torch.stack(net(b, a, **rest), dim=1)
    torch.testing.assert_close(swapped.output, logits[torch.arange(8), swapped.exit])
    assert not torch.equal(swapped.output, expected.output)


def test_only_so_many_shapes_are_remembered(plan, monkeypatch):
    monkeypatch.setattr("offramp.engines.classify.engine.MAX_SIGNATURES", 1)
    run = run_of(plan, Latency(8), graphs=True)
    expected = leave_at(trace().scores(plan.rule), plan.thresholds)
    for _ in range(2):
        for rows in range(1, 21):
            assert torch.equal(run(items()[:rows]).exit, expected[:rows])
            assert 1 <= len(run._known) <= 8
