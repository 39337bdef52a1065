"""Compiled code of equal segments: how often it is made, for which rows, and that training with it is the training without."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from denoisers import BLOCKS, PLACES, UViT, attached, batch, dit, loud
from offramp.backbones.shared_code import SharedCode
from offramp.core.errors import InvalidInput
from offramp.core.noise import FlowMatching
from offramp.diffusion import DenoisingNet, attach_denoiser
from offramp.exits import DenoisingExit
from offramp.policies.denoising import depth_schedule
from offramp.train import (
    DenoisingView,
    ExitsView,
    FinalOnly,
    Holding,
    Joint,
    Mean,
    Noising,
    PlanView,
    Recipe,
    RectifiedFlow,
    ScheduledDepth,
    UncertaintyAware,
    add_heads,
    fit,
    layer_groups,
    noisy_loader,
)

ROWS = 8
EDGES = (-1.0, 1.0)


class Counting:
    """A backend that says what it was given."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.rows.append(max(int(v.shape[0]) for v in inputs if isinstance(v, Tensor) and not isinstance(v, nn.Parameter)))
        return graph.forward

    def since(self) -> int:
        """Graphs since last asked."""
        found = len(self.rows)
        self.rows.clear()
        return found


def train(
    view: DenoisingView, recipe: Recipe, edges: Sequence[float] = (), steps: int = 3, name: str = "sample", precision: str | None = None
) -> None:
    g = torch.Generator().manual_seed(3)
    images, classes = torch.rand(32, 3, 8, 8, generator=g) * 2 - 1, torch.arange(32) % 10
    noising = Noising(RectifiedFlow(), name, label="class_labels", no_class=10, edges=tuple(edges))
    loader = noisy_loader(images, noising, ROWS, classes=classes, draws=steps * ROWS)
    fit(view, loader, recipe, epochs=1, optimizer=lambda p: torch.optim.SGD(p, 0.1), progress=False, mixed_precision=precision)


def uvit() -> DenoisingNet:
    torch.manual_seed(0)
    return attach_denoiser(loud(UViT(), 0.2), PLACES["uvit"], noise=FlowMatching(), example=batch(2))


def test_equal_blocks_are_compiled_once_for_all_stages() -> None:
    pytest.importorskip("diffusers")
    net, counting = attached("dit"), Counting()
    code = SharedCode(same_gradients=True, dynamic=False, backend=counting)
    inlet, *blocks = net.at

    def stage(view: DenoisingView, recipe: Recipe, edges: Sequence[float] = ()) -> int:
        view.compile(code)
        train(view, recipe, edges, steps=2, name="hidden_states", precision="bf16")
        return counting.since()

    assert stage(ExitsView(net, []), Joint(FinalOnly())) == 3, "what is before the blocks, a block, what is behind them"
    assert stage(ExitsView(net, blocks[:2]), Holding(ScheduledDepth(EDGES, (0, 1, None)))) == 0
    assert stage(ExitsView(net, blocks[:-1]), Holding(Joint(Mean()))) == 0
    assert stage(PlanView(net, layer_groups(inlet, blocks, 2, (0.0,))), Joint(FinalOnly()), (0.0,)) == 0
    shallow: Any = dit()
    del shallow.transformer_blocks[2:]
    other = attach_denoiser(shallow.eval(), PLACES["dit"][:3], noise=net.noise, example=batch(2, "hidden_states"))
    assert stage(ExitsView(other, []), Joint(FinalOnly())) == 0
    add_heads(net, DenoisingExit(), blocks[:-1])
    assert stage(ExitsView(net, blocks[:-1]), UncertaintyAware()) == 3, "without gradients it is other code, again once"
    assert len(code) == 3 < BLOCKS


@pytest.fixture(scope="module")
def codes() -> dict[bool, SharedCode]:
    """By whether held weights are differentiated too; the stages of all tests share them, as those of a script do."""
    return {same: SharedCode(same_gradients=same, dynamic=False, backend="aot_eager") for same in (False, True)}


STAGES: dict[str, tuple[Callable[[DenoisingNet], DenoisingView], Recipe, tuple[float, ...]]] = {
    "without exits": (lambda net: ExitsView(net, []), Joint(FinalOnly()), ()),
    "every exit": (lambda net: ExitsView(net), Joint(Mean()), ()),
    "some held": (lambda net: ExitsView(net, ["blocks.0", "blocks.2"]), Holding(ScheduledDepth(EDGES, (0, 1, None))), ()),
    "groups": (lambda net: PlanView(net, layer_groups("blocks.0", ["blocks.1", "blocks.2"], 2, (0.0,))), Joint(FinalOnly()), (0.0,)),
    "rows apart": (lambda net: PlanView(net, depth_schedule(EDGES, ["blocks.0", "blocks.2", None])), Joint(FinalOnly()), ()),
}


@pytest.mark.parametrize(("name", "same_gradients"), [*((n, True) for n in STAGES), ("some held", False)])
def test_training_is_what_it_is_without_a_compiler(name: str, same_gradients: bool, codes: dict[bool, SharedCode]) -> None:
    make, recipe, edges = STAGES[name]
    code = codes[same_gradients]
    weights = []
    begun = {n: p.detach().clone() for n, p in uvit().model.named_parameters()}
    for compiled in (False, True):
        net = uvit()
        view = make(net)
        if compiled:
            view.compile(code)
        train(view, recipe, edges, steps=4)
        weights.append({n: p.detach() for n, p in net.model.named_parameters()})
    plain, found = weights
    moved = {n for n, p in plain.items() if not torch.equal(p, begun[n])}
    assert moved and moved == {n for n, p in found.items() if not torch.equal(p, begun[n])}, "what is held stays as it was"
    assert any(n.startswith("time_embed") for n in begun) and (name == "some held") == (not any(n.startswith("time_embed") for n in moved))
    for n, p in plain.items():
        torch.testing.assert_close(found[n], p, atol=1e-6, rtol=1e-5)
    assert len(code) > 0


def test_what_is_held_gets_no_gradient(codes: dict[bool, SharedCode]) -> None:
    net = uvit()
    view = ExitsView(net)
    view.compile(codes[True])
    for p in net.model.time_embed.parameters():  # type: ignore[union-attr,operator]
        p.requires_grad_(False)
    sum(a.square().mean() for a in view(**batch(ROWS))).backward()  # type: ignore[union-attr]
    without = {n for n, p in net.model.named_parameters() if p.grad is None}
    assert without == {"time_embed.weight", "time_embed.bias"}


@pytest.mark.parametrize(("options", "rows"), [({"dynamic": False}, {9}), ({"dynamic": True}, None)])
def test_parts_of_a_batch_make_no_code_of_their_own(options: dict[str, Any], rows: set[int] | None) -> None:
    """How many rows leave differs in every step; constants of the code must not follow that."""
    net, counting = uvit(), Counting()
    view = PlanView(net, depth_schedule(EDGES, ["blocks.0", "blocks.2", None]))
    inputs = batch(9)
    plain = view(**inputs)[0]
    view.compile(SharedCode(backend=counting, **options))
    torch.testing.assert_close(view(**inputs)[0], plain)
    for times in ((20.0, 400.0, 980.0), (20.0, 30.0, 980.0), (500.0, 20.0, 20.0)):
        view(**inputs | {"timestep": torch.tensor(times).repeat(3)})
    assert 0 < len(counting.rows) <= BLOCKS + 1, "at most one code for every segment"
    assert rows is None or set(counting.rows) == rows


class Step(nn.Module):
    def __init__(self, scale: float, width: int) -> None:
        super().__init__()
        self.inner, self.scale = nn.Linear(width, width), scale

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor]:
        return (torch.tanh(self.inner(x)) * self.scale + y,)


def flat(module: nn.Module, width: int) -> fx.GraphModule:
    made = torch.export.export(module, (torch.randn(3, width), torch.randn(3, width))).module(check_guards=False)
    graph = fx.Graph()
    graph.output(graph.graph_copy(made.graph, {}))
    return fx.GraphModule(made, graph)


def test_equal_graphs_are_one_function_and_others_are_not() -> None:
    code = SharedCode(backend="eager")
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    steps = [Step(2.0, 4), Step(2.0, 4), Step(3.0, 4), Step(2.0, 5)]
    modules = [flat(s, s.inner.in_features) for s in steps]
    bound = [code.bind(m) for m in modules]
    assert len(code) == 3, "another constant and another width are other functions"
    for step, run in zip(steps[:3], bound, strict=False):
        torch.testing.assert_close(run(x, y), step(x, y))
    with torch.no_grad():
        steps[0].inner.weight.zero_()
    torch.testing.assert_close(bound[0](x, y), steps[0](x, y))
    modules[0].inner.bias = nn.Parameter(torch.ones(4))  # type: ignore[union-attr]
    torch.testing.assert_close(bound[0](x, y)[0], torch.tanh(torch.ones(3, 4)) * 2 + y)


def test_strides_make_no_other_code() -> None:
    counting = Counting()
    code = SharedCode(backend=counting, dynamic=False)
    run = code.bind(flat(Step(2.0, 4), 4))
    x = torch.randn(4, 4)
    torch.testing.assert_close(run(x.t(), x), run(x.t().contiguous(), x))
    assert len(counting.rows) == 1


def test_a_graph_that_is_not_flat_is_compiled_alone() -> None:
    step, code = Step(2.0, 4), SharedCode(backend="eager")
    traced = fx.symbolic_trace(step)
    x = torch.randn(3, 4)
    torch.testing.assert_close(code.bind(traced)(x, x), step(x, x))
    assert len(code) == 0


def test_options_are_given_once() -> None:
    with pytest.raises(InvalidInput, match="dynamic"):
        ExitsView(uvit(), []).compile(SharedCode(), dynamic=False)
