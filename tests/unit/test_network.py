"""Attaching exits: what is refused, what is shaped, that the model stays as it was, and that what is saved comes back."""

from __future__ import annotations

import copy
import itertools
import json
import re
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from offramp.backbones import repeated_blocks
from offramp.budget import Risk, calibrate
from offramp.core.certificate import Plan
from offramp.core.errors import ArtifactError, FingerprintMismatch, InvalidInput, NoEffectWarning, NotCuttable
from offramp.engines.classify.engine import Latency, Quota, Throughput, compile
from offramp.engines.classify.record import record
from offramp.engines.classify.stages import exit_costs
from offramp.exits import MLP, AttentionHead, Cascade, ConvPoolLinear, Evenly, EveryBlock, PooledLinear, TokenPool
from offramp.measure.quality import outcome
from offramp.network import answer, as_example, attach, load, load_plan, never
from offramp.policies import Confidence, HaltingCDF, OutputStability, Patience
from offramp.train import fit


class Plain(nn.Module):
    """Six blocks over a vector; the answer comes in the form that ``wrap`` gives it."""

    def __init__(self, wrap=None, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(6, width)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(6))
        self.head = nn.Linear(width, 3)
        self.wrap = wrap

    def forward(self, x: Tensor):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        logits = self.head(x)
        return logits if self.wrap is None else self.wrap(logits, x)


class Residual(nn.Module):
    """A small ResNet whose activations work in place."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)

        class Block(nn.Module):
            def __init__(self, inside: int, outside: int, stride: int) -> None:
                super().__init__()
                self.conv1, self.bn1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside)
                self.conv2, self.bn2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False), nn.BatchNorm2d(outside)
                self.relu = nn.ReLU(inplace=True)
                self.down = None if inside == outside else nn.Conv2d(inside, outside, 1, stride, bias=False)

            def forward(self, x: Tensor) -> Tensor:
                y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
                y += x if self.down is None else self.down(x)
                return self.relu(y)

        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.layers = nn.Sequential(Block(8, 8, 1), Block(8, 16, 2), Block(16, 16, 1), Block(16, 32, 2))
        self.fc = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layers(self.stem(x)).mean((2, 3)))


class Skips(nn.Module):
    """Down and up with skip connections and a conditioning keyword that is used late."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.down = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.up = nn.ModuleList(nn.Linear(12, 6) for _ in range(3))
        self.embed = nn.Linear(2, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor, *, condition: Tensor, scale: float = 1.0) -> Tensor:
        kept = []
        for layer in self.down:
            x = torch.tanh(layer(x))
            kept.append(x)
        for layer in self.up:
            x = torch.tanh(layer(torch.cat([x, kept.pop()], dim=-1))) * scale
        return self.head(x + self.embed(condition))


@dataclass
class Output:
    logits: Tensor
    hidden: Tensor


class Pair(NamedTuple):
    hidden: Tensor
    answer: Tensor


def vit() -> nn.Module:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    return timm.models.vision_transformer.VisionTransformer(img_size=16, patch_size=8, embed_dim=12, depth=4, num_heads=2, num_classes=5)


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    settings = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 24}
    return transformers.BertForSequenceClassification(transformers.BertConfig(**settings, max_position_embeddings=20, num_labels=3))


def token_batch(rows: int, length: int = 9) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(rows)
    mask = (torch.arange(length) < torch.randint(1, length + 1, (rows, 1), generator=g)).long()
    return {"input_ids": torch.randint(1, 40, (rows, length), generator=g) * mask, "attention_mask": mask}


def images(rows: int) -> tuple[Tensor, ...]:
    return (torch.randn(rows, 3, 16, 16, generator=torch.Generator().manual_seed(rows)),)


def vectors(rows: int) -> tuple[Tensor, ...]:
    return (torch.randn(rows, 6, generator=torch.Generator().manual_seed(rows)),)


def conditioned(rows: int):
    g = torch.Generator().manual_seed(rows)
    return (torch.randn(rows, 6, generator=g),), {"condition": torch.randn(rows, 2, generator=g), "scale": 0.5}


MODELS = {
    "vit": (vit, ["blocks.0", "blocks.2"], images),
    "resnet in place": (Residual, ["layers.0", "layers.2"], images),
    "bert": (bert, ["bert.encoder.layer.0", "bert.encoder.layer.2"], token_batch),
    "skips": (Skips, ["down.1", "up.0"], conditioned),
    "dict": (lambda: Plain(lambda z, x: {"hidden": x, "logits": z}), ["blocks.1", "blocks.3"], vectors),
    "dataclass": (lambda: Plain(lambda z, x: Output(z, x)), ["blocks.1", "blocks.3"], vectors),
    "one in a tuple": (lambda: Plain(lambda z, x: (None, [z])), ["blocks.1", "blocks.3"], vectors),
}


def both(inputs) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    if isinstance(inputs, dict):
        return (), inputs
    return inputs if isinstance(inputs[0], tuple) else (inputs, {})


@pytest.fixture(scope="module")
def networks():
    made = {}

    def get(name: str):
        if name not in made:
            build, paths, inputs = MODELS[name]
            made[name] = (attach(build().eval(), paths, example=inputs(2)).eval(), inputs)
        return made[name]

    return get


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("graphs", [False, True])
def test_never_leaving_equals_the_model_bit_for_bit(networks, name, graphs):
    net, inputs = networks(name)
    for mode in (Latency(3), Throughput(3), Quota(3)):
        with pytest.warns(NoEffectWarning):
            run = compile(net, never(net, Confidence()), mode, graphs=graphs)
        for rows in (1, 3, 7):
            if isinstance(mode, Throughput) and (graphs or rows == 7):
                continue  # runs whole buckets: other kernels, equal up to rounding, tested with the engine
            args, kwargs = both(inputs(rows))
            with torch.no_grad():
                expected = net.select(net.model(*args, **kwargs))
            given = [a.clone() for a in args]
            assert torch.equal(run(*args, **kwargs).output, expected)
            assert all(torch.equal(a, b) for a, b in zip(args, given, strict=True)), "inputs are not written to"


@pytest.mark.parametrize("name", list(MODELS))
def test_always_leaving_equals_segments_and_head(networks, name):
    net, inputs = networks(name)
    for k in range(2):
        thresholds = tuple(float("-inf") if j >= k else float("inf") for j in range(3))
        shares = tuple(float(j == k) for j in range(3))
        plan = Plan(Confidence(), net.names, thresholds, shares, 0.5)
        for mode in (Latency(5), Throughput(5)):
            args, kwargs = both(inputs(5))
            answers = compile(net, plan, mode, measure=False, graphs=False)(*args, **kwargs)
            with torch.no_grad():
                expected = net(*args, **kwargs)[k]
            assert answers.exit.tolist() == [k] * 5
            torch.testing.assert_close(answers.output, expected, rtol=1e-5, atol=1e-6)
            assert answers.cost.tolist() == [float(net.costs()[0][k]) - sum(e.head_flops for e in net.exits[:k])] * 5


@pytest.mark.parametrize("length", [2, 9, 17])
def test_texts_of_another_length_than_the_example(networks, length):
    net, _ = networks("bert")
    assert [e.hidden_shape for e in net.exits] == [(-1, 16), (-1, 16)]
    batch = token_batch(4, length)
    with torch.no_grad():
        expected = net(**batch)
        cut = net.cut()
        state = cut.begin(**batch)
        for k in range(2):
            state = cut.run(state, k, k + 1)
            assert state.hidden.shape == (4, length, 16)
            torch.testing.assert_close(net.heads[k](state.hidden), expected[k], rtol=1e-5, atol=1e-6)
    padded = {k: torch.cat([v, torch.zeros(4, 3, dtype=torch.long)], 1) for k, v in batch.items()}
    with torch.no_grad():
        for one, other in zip(expected, net(**padded), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------------ the model itself


@pytest.mark.parametrize("name", ["vit", "resnet in place", "bert", "skips"])
def test_the_model_is_left_as_it_was(name):
    build, paths, inputs = MODELS[name]
    model = build().train()
    next(iter(model.children())).eval()
    for p in list(model.parameters())[::2]:
        p.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    names = [n for n, _ in model.named_modules()]
    flags = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    pointers = [p.data_ptr() for p in model.parameters()]
    net = attach(model, paths, example=inputs(2))
    net.cut()
    args, kwargs = both(inputs(3))
    net(*args, **kwargs)
    assert ([m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]) == flags
    assert net.detach() is model and [n for n, _ in model.named_modules()] == names
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    fresh = attach(build().eval(), paths, example=inputs(2))
    assert set(fresh.model.state_dict()) == set(before)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if "running" not in k and "num_batches" not in k)


def test_attaching_twice_gives_independent_exits():
    model = Plain().eval()
    one, two = attach(model, ["blocks.1"], example=vectors(2)), attach(model, ["blocks.1", "blocks.3"], example=vectors(2))
    assert one.model is two.model is model and one.heads[0] is not two.heads[0] and len(two.heads) == 2
    assert one.base_fingerprint() == two.base_fingerprint() and one.fingerprint() != two.fingerprint()


@pytest.mark.parametrize(
    ("model", "example", "head", "message"),
    [
        (Plain(), (*vectors(2), torch.zeros(2)), None, "does not take the example.*without labels"),
        (Plain(), {"x": vectors(2)[0], "labels": torch.zeros(2)}, None, "does not take the example.*x, labels.*without labels"),
        (torch.relu, vectors(2), None, r"takes a torch\.nn\.Module"),
        (Plain(), vectors(2), "linear", r"A head is a part of offramp\.exits.*'linear'"),
    ],
)
def test_what_attach_cannot_take(model, example, head, message):
    with pytest.raises(InvalidInput, match=message):
        attach(model, ["blocks.1"], example=example, head=head)


def test_the_fingerprint_covers_heads_as_well_as_the_model():
    """A plan is about the exits it was calibrated on: heads that were trained further, or made anew, are others."""
    model = Plain().eval()
    net = attach(model, ["blocks.1", "blocks.3"], example=vectors(2))
    plan, before = never(net, Confidence()), net.fingerprint()
    plan.check(net.fingerprint())
    with torch.no_grad():
        next(net.heads[0].parameters()).add_(1)
    assert net.fingerprint() != before and net.base_fingerprint() == attach(model, ["blocks.1"], example=vectors(2)).base_fingerprint()
    with pytest.raises(FingerprintMismatch, match="these heads"):
        plan.check(net.fingerprint())
    other = attach(model, ["blocks.1", "blocks.3"], example=vectors(2), head=PooledLinear(norm=False))
    assert other.fingerprint() != before


def test_training_forward_equals_the_model_and_reaches_every_head():
    net = attach(Plain(), ["blocks.1", "blocks.3"], example=vectors(2), head=Cascade(PooledLinear()))
    logits = net(*vectors(4))
    assert torch.equal(logits[-1], net.model(*vectors(4)))
    sum(z.sum() for z in logits).backward()
    assert all(p.grad is not None for p in net.parameters())


def test_gradients_through_the_state_transform():
    net = attach(Plain(), ["blocks.1"], example=vectors(2))
    seen = []
    net.state_transform = lambda k, state: seen.append(k) or state * 1.0
    assert torch.equal(net(*vectors(3))[-1], net.model(*vectors(3))) and seen == [0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    net = attach(Plain().to(dtype).eval(), ["blocks.1", "blocks.3"], example=vectors(2)).eval()
    assert net.dtype == dtype and all(p.dtype == dtype for p in net.parameters())
    plan = Plan(Confidence(), net.names, (0.4, 0.45, float("-inf")), (0.3, 0.3, 0.4), 0.7)
    for mode in (Latency(8), Throughput(4), Quota(8)):
        for graphs in (False, True):
            answers = compile(net, plan, mode, measure=False, graphs=graphs)(*vectors(8))
            assert answers.output.dtype == dtype and answers.output.isfinite().all() and answers.cost.dtype == torch.float64


def test_the_cut_follows_a_change_of_precision():
    net = attach(Plain().eval(), ["blocks.1"], example=vectors(2)).eval()
    first = net.cut()
    assert net.cut() is first
    net.double()
    assert net.cut() is not first and net.dtype == torch.float64
    with torch.no_grad():
        x = vectors(3)[0].double()
        assert torch.equal(net.cut()(x), net.model(x))


def test_weights_changed_after_the_cut_are_used():
    net = attach(Plain().eval(), ["blocks.1"], example=vectors(2)).eval()
    net.cut()
    with torch.no_grad():
        net.model.head.weight.mul_(2)
        assert torch.equal(net.cut()(*vectors(3)), net.model(*vectors(3)))


# ----------------------------------------------------------------------------------------------------------------------- where and what


@pytest.mark.parametrize(
    ("at", "error", "message"),
    [
        ("blocks.1", InvalidInput, r"at=\['blocks.1'\]"),
        (["blocks.1", "blocks.1"], InvalidInput, "twice"),
        ([], InvalidInput, "at least one"),
        (0, InvalidInput, "At least one exit"),
        (["blocks.9"], NotCuttable, r"'blocks.9'.*Nearest module paths: blocks\."),
        ([""], NotCuttable, "no module at ''"),
        (["unused"], NotCuttable, "did not run"),
        (["shared"], NotCuttable, "ran 2 times"),
    ],
)
def test_bad_places(at, error, message):
    class Model(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.unused, self.shared = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.shared(self.shared(super().forward(x)))

    with pytest.raises(error, match=message):
        attach(Model(), at, example=vectors(2))


def test_a_place_without_a_batch():
    class Model(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.turned = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.turned(x.T).T)

    with pytest.raises(NotCuttable, match="first dimension is the batch"):
        attach(Model(), ["turned"], example=torch.randn(5, 6))


def test_places_in_any_order_with_their_heads():
    """Exits are kept in the order in which they run; each keeps the head that was given for it."""
    heads = [MLP(inner=5), PooledLinear()]
    net = attach(Plain(), ["blocks.4", "blocks.1"], example=vectors(2), head=heads)
    assert net.at == ("blocks.1", "blocks.4") and net.names == ("blocks.1", "blocks.4", "output")
    assert [e.spec for e in net.exits] == [PooledLinear(), MLP(inner=5)]


def test_default_places():
    blocks = [b.path for b in repeated_blocks(Plain(), vectors(2))]
    assert blocks == [f"blocks.{i}" for i in range(6)]
    assert attach(Plain(), example=vectors(2)).at == tuple(Evenly(3).choose(repeated_blocks(Plain(), vectors(2))))
    assert len(attach(Plain(), example=vectors(2)).at) == 3
    assert attach(Plain(), 2, example=vectors(2)).at == attach(Plain(), Evenly(2), example=vectors(2)).at
    assert attach(Plain(), EveryBlock(), example=vectors(2)).at == tuple(blocks[:-1])


@pytest.mark.parametrize("head", [[PooledLinear()], [PooledLinear()] * 3, []])
def test_the_wrong_number_of_heads(head):
    with pytest.raises(InvalidInput, match=f"{len(head)} heads were given for 2 exits"):
        attach(Plain(), ["blocks.1", "blocks.3"], example=vectors(2), head=head)


@pytest.mark.parametrize("shape", [(4,), (3, 1), (1, 3)])
def test_a_head_that_gives_another_shape(shape):
    class Odd(nn.Module):
        def forward(self, hidden: Tensor, previous: tuple[Tensor, ...] = ()) -> Tensor:
            return hidden.new_zeros(hidden.shape[0], *shape)

    with pytest.raises(InvalidInput, match=r"'blocks.1' gives .*expected \(2, 3\)"):
        attach(Plain(), ["blocks.1"], example=vectors(2), head=[Odd()])


@pytest.mark.parametrize("head", [PooledLinear, "linear", [PooledLinear], 3])
def test_what_is_no_head(head):
    with pytest.raises(InvalidInput, match="head"):
        attach(Plain(), ["blocks.1"], example=vectors(2), head=head)


def test_heads_as_modules_and_parts():
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 3)

        def forward(self, hidden: Tensor, previous: tuple[Tensor, ...] = ()) -> Tensor:
            return self.linear(hidden)

    mine = Mine()
    net = attach(Plain(), ["blocks.1", "blocks.3"], example=vectors(2), head=[mine, PooledLinear()])
    assert net.heads[0] is mine and net.exits[0].spec is None and net.exits[0].head_flops == 2 * 8 * 3
    with pytest.raises(InvalidInput, match=r"\['blocks.1'\] were given as modules"):
        net.save("nowhere")


def test_flops_of_exits():
    net = attach(Plain(), ["blocks.1", "blocks.3"], example=vectors(2), head=PooledLinear(norm=False))
    cost, base = net.costs()
    block, head = 2 * 8 * 8, 2 * 8 * 3
    assert base == 2 * 6 * 8 + 6 * block + head
    assert cost.tolist() == [2 * 6 * 8 + 2 * block + head, 2 * 6 * 8 + 4 * block + 2 * head, base + 2 * head]
    assert cost.dtype == torch.float64


def test_examples_in_every_form():
    x, y = torch.randn(5, 3), torch.arange(5)
    for given, expected in (
        (x, ((x[:2],), {})),
        ((x, y), ((x[:2], y[:2]), {})),
        ([x], ((x[:2],), {})),
        ({"x": x, "y": 3}, ((), {"x": x[:2], "y": 3})),
        (((x,), {"y": y}), ((x[:2],), {"y": y[:2]})),
        ((x, 0.5, None), ((x[:2], 0.5, None), {})),
        ((x[:1], y[:1]), ((x[[0, 0]], y[[0, 0]]), {})),
        ((x, torch.tensor(2.0), torch.randn(7)), None),
    ):
        found = as_example(given)
        if expected is None:
            assert found.args[1].ndim == 0 and found.args[2].shape == (7,), "what has another size is no batch"
            continue
        assert len(found.args) == len(expected[0]) and found.kwargs.keys() == expected[1].keys()
        for one, other in zip((*found.args, *found.kwargs.values()), (*expected[0], *expected[1].values()), strict=True):
            assert torch.equal(one, other) if isinstance(one, Tensor) else one == other
    found = as_example(x)
    found.args[0].zero_()
    assert x.abs().sum() > 0, "a copy is kept"
    assert torch.equal(as_example(found).args[0], found.args[0])
    for bad in (3, "text", None, (), {}, (1, 2), {"x": 1.0}):
        with pytest.raises(InvalidInput, match="example"):
            as_example(bad)


def test_which_tensor_is_the_answer():
    z, x = torch.randn(2, 3), torch.randn(2, 4)
    assert answer(z) is z and answer({"logits": z, "x": x}) is z and answer(Output(z, x)) is z and answer((None, [z])) is z
    for unclear in ((z, x), {"a": z, "b": x}, Pair(x, z), None, 3):
        with pytest.raises(InvalidInput, match="select="):
            answer(unclear)
    net = attach(Plain(lambda z, x: Pair(x, z)).eval(), ["blocks.1"], example=vectors(2), select=lambda out: out.answer).eval()
    assert net.num_outputs == 3
    with pytest.warns(NoEffectWarning):
        run = compile(net, never(net, Confidence()), graphs=False)
    with torch.no_grad():
        assert torch.equal(run(*vectors(3)).output, net.model(*vectors(3)).answer)


def test_one_number_for_each_item():
    """A model that answers ``[B]`` answers ``[B, 1]`` here, in training, in a trace and in every engine."""
    net = attach(Plain(lambda z, x: z[:, 0]), ["blocks.1", "blocks.3"], example=vectors(2))
    assert net.num_outputs == 1 and [tuple(z.shape) for z in net(*vectors(5))] == [(5, 1)] * 3
    batch = (*vectors(6), torch.randn(6, 1))
    trace = record(net, [batch], rules=[OutputStability()], loss=lambda z, y: (z - y).square().flatten().clamp(max=1), progress=False)
    assert trace.predictions.shape == (6, 3) and trace.predictions.is_floating_point()
    net.eval()
    with torch.no_grad():
        whole = net.model(batch[0])[:, None]
    for thresholds in ((float("inf"), float("inf")), (float("-inf"), float("inf"))):
        plan = Plan(OutputStability(), net.names, (*thresholds, float("-inf")), (0.0, 0.0, 1.0), 1.0)
        for mode in (Latency(6), Throughput(3), Quota(6)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", NoEffectWarning)
                answers = compile(net, plan, mode, measure=False, graphs=False)(batch[0])
            left = answers.exit < 2
            assert answers.output.shape == (6, 1) and torch.equal(answers.output[~left], whole[~left])
    with pytest.raises(InvalidInput, match=r"one number, .*, for the whole batch.*leave labels out"):
        attach(Plain(lambda z, x: z.mean()), ["blocks.1"], example=vectors(2))
    with pytest.raises(InvalidInput, match=r"Plain is a list; expected logits"):
        attach(Plain(), ["blocks.1"], example=vectors(2), select=lambda z: z.tolist())


class Words(nn.Module):
    """Token ids and which of them count."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3))
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        return self.head((x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
@pytest.mark.parametrize("made_with", [torch.int64, torch.int32])
def test_whole_numbers_of_any_width(dtype, made_with):
    ids, mask = torch.randint(50, (6, 7), generator=torch.Generator().manual_seed(1)), (torch.arange(7) < 5).expand(6, 7)
    labels = torch.arange(6) % 3
    net = attach(Words(), ["blocks.0", "blocks.1"], example={"ids": ids.to(made_with), "mask": mask.to(made_with)}).eval()
    given = {"ids": ids.to(dtype), "mask": mask.to(dtype)}
    wide = {"ids": ids, "mask": mask.long()}
    with torch.no_grad():
        middle = float(net(**wide)[0].softmax(-1).amax(-1).median())
    leaves = Plan(Confidence(), net.names, (middle, float("inf"), float("-inf")), (0.5, 0.0, 0.5), 0.5)
    run = compile(net, leaves, measure=False, graphs=False)
    expected = run(**wide)
    assert 0 < int((expected.exit == 0).sum()) < 6
    for answers in (run(**given), run(ids=given["ids"], mask=mask)):
        assert torch.equal(answers.output, expected.output) and torch.equal(answers.exit, expected.exit)
    if dtype in (torch.int32, torch.int64):  # the others an embedding itself does not take, and here it is the model that runs
        with pytest.warns(NoEffectWarning):
            whole = compile(net, never(net, Confidence()), measure=False, graphs=False)
        assert torch.equal(whole(**given).output, net.model(**wide))
        trace = record(net, [{**given, "labels": labels.to(dtype)}], progress=False)
        assert torch.equal(trace.losses, record(net, [{**wide, "labels": labels}], progress=False).losses)
        assert torch.equal(trace.labels.long(), labels)
        fit(net, [(given, labels.to(dtype))], epochs=1, progress=False)


def test_numbers_that_do_not_fit_and_numbers_that_are_not_whole_are_refused():
    net = attach(Words(), ["blocks.0"], example={"ids": torch.ones(2, 7, dtype=torch.int32), "mask": torch.ones(2, 7)})
    with pytest.raises(InvalidInput, match=r"'ids' is torch.int64 of rank 2; expected a tensor of torch.int32"):
        net.cut().begin(ids=torch.full((2, 7), 2**40), mask=torch.ones(2, 7))
    with pytest.raises(InvalidInput, match=r"'ids' is torch.float32"):
        net.cut().begin(ids=torch.ones(2, 7), mask=torch.ones(2, 7))
    with pytest.raises(InvalidInput, match=r"'mask' is torch.int64"):
        net.cut().begin(ids=torch.ones(2, 7, dtype=torch.int64), mask=torch.ones(2, 7, dtype=torch.int64))


@pytest.mark.parametrize("rule", [Confidence(), Patience()])
@pytest.mark.parametrize("head", [PooledLinear(), Cascade(PooledLinear())])
def test_what_a_trace_says_that_thresholds_cost_is_what_running_them_costs(rule, head):
    """Heads of exits that are switched off do not run, unless what follows needs them."""
    net = attach(Plain(), ["blocks.0", "blocks.2", "blocks.4"], example=vectors(2), head=head).eval()
    trace = record(net, [(*vectors(40), torch.arange(40) % 3)], progress=False)
    assert (trace.head_cost is None) == isinstance(head, Cascade)
    for decide in itertools.product([True, False], repeat=3):
        thresholds = (*(0.0 if yes else float("inf") for yes in decide), float("-inf"))
        run = exit_costs(net, Plan(rule, net.names, thresholds, (0.0, 0.0, 0.0, 1.0), 1.0), decide)
        here = torch.tensor([*decide, True])
        said = trace.running_cost(thresholds, rule)
        if trace.head_cost is None:
            assert (said >= run).all()
        else:
            assert torch.equal(said[here], run[here]), (decide, said, run)
    if trace.head_cost is not None:
        with pytest.warns(NoEffectWarning):
            plan = calibrate(trace, rule, Risk(max_disagreement=1e-4))
        assert plan.mean_cost == 1.0 and "mean cost 1.000" in str(plan), "nothing but the model runs"
        assert outcome(trace, plan).mean_cost == 1.0


# -------------------------------------------------------------------------------------------------------------------- save and load


def test_save_and_load(tmp_path):
    model = Residual().eval()
    heads = [ConvPoolLinear(), Cascade(PooledLinear())]
    net = attach(model, ["layers.0", "layers.2"], example=images(2), head=heads).eval()
    with torch.no_grad():
        for p in net.heads.parameters():
            p.add_(torch.randn_like(p))
    net.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter.json", "adapter.safetensors"]
    assert (tmp_path / "adapter.safetensors").stat().st_size < 4 * sum(p.numel() for p in net.heads.parameters()) + 4000
    again = load(copy.deepcopy(model), tmp_path, example=images(2)).eval()
    assert again.at == net.at and [e.spec for e in again.exits] == heads and again.num_outputs == 5
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(net(*images(4)), again(*images(4)), strict=True))
    assert [e.hidden_shape for e in again.exits] == [e.hidden_shape for e in net.exits] and torch.equal(again.costs()[0], net.costs()[0])


def test_other_weights_are_refused(tmp_path):
    net = attach(Plain(), ["blocks.1"], example=vectors(2))
    net.save(tmp_path)
    other = Plain()
    with torch.no_grad():
        other.head.bias[0] += 1e-6
    with pytest.raises(FingerprintMismatch, match="Load the weights the exits were trained on"):
        load(other, tmp_path, example=vectors(2))
    with pytest.raises(FingerprintMismatch):
        load(Residual(), tmp_path, example=images(2))


def test_weights_of_the_model_can_be_saved_too(tmp_path):
    net = attach(Plain().eval(), ["blocks.1"], example=vectors(2)).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1)
    net.save(tmp_path, include_base=True)
    model = Plain().eval()
    again = load(model, tmp_path, example=vectors(2)).eval()
    assert again.model is model and again.fingerprint() == net.fingerprint()
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(net(*vectors(3)), again(*vectors(3)), strict=True))
    other = Residual()
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(FingerprintMismatch, match="do not fit"):
        load(other, tmp_path, example=images(2))
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())
    wider = Plain(width=9)
    before = copy.deepcopy(wider.state_dict())
    with pytest.raises(FingerprintMismatch, match="do not fit"):
        load(wider, tmp_path, example=vectors(2))
    assert all(torch.equal(v, before[k]) for k, v in wider.state_dict().items()), "refused before anything is copied"


@pytest.mark.parametrize("part", ["adapter.json", "adapter.safetensors"])
@pytest.mark.parametrize("keep", [0.0, 0.4, 0.97])
def test_truncated(tmp_path, part, keep):
    attach(Plain(), ["blocks.1"], example=vectors(2)).save(tmp_path)
    data = (tmp_path / part).read_bytes()
    (tmp_path / part).write_bytes(data[: int(keep * len(data))])
    with pytest.raises(ArtifactError, match=re.escape(part)):
        load(Plain(), tmp_path, example=vectors(2))


def test_altered_foreign_and_missing(tmp_path):
    with pytest.raises(ArtifactError, match="No file"):
        load(Plain(), tmp_path, example=vectors(2))
    attach(Plain(), ["blocks.1"], example=vectors(2)).save(tmp_path)
    path = tmp_path / "adapter.json"
    text = path.read_text()
    path.write_text(text.replace("blocks.1", "blocks.2"))
    with pytest.raises(ArtifactError, match="altered"):
        load(Plain(), tmp_path, example=vectors(2))
    for change in ({"exits": [{"name": "blocks.1"}]}, {"num_outputs": "many"}, {"exits": 3}):
        record = json.loads(text)
        record["content"] |= change
        del record["sha256"]
        path.write_text(json.dumps(record))
        with pytest.raises(ArtifactError, match="lacks or garbles"):
            load(Plain(), tmp_path, example=vectors(2))
    record = json.loads(text)
    record["content"]["exits"][0]["head"]["type"] = "os.system"
    del record["sha256"]
    path.write_text(json.dumps(record))
    with pytest.raises(ArtifactError, match="known types"):
        load(Plain(), tmp_path, example=vectors(2))
    path.write_text('{"peft_type": "LORA"}')
    with pytest.raises(ArtifactError, match="not written by offramp"):
        load(Plain(), tmp_path, example=vectors(2))


def test_a_plan_is_no_adapter(tmp_path):
    net = attach(Plain(), ["blocks.1"], example=vectors(2))
    never(net, HaltingCDF([8])).save(tmp_path)
    plan = load_plan(tmp_path)
    assert isinstance(plan.rule, HaltingCDF) and plan.thresholds == (float("inf"), float("-inf")) and plan.fingerprint == net.fingerprint()
    (tmp_path / "adapter.json").write_text((tmp_path / "plan.json").read_text())
    with pytest.raises(ArtifactError, match="'adapter' was expected"):
        load(Plain(), tmp_path, example=vectors(2))


def test_heads_for_tokens():
    net = attach(vit().eval(), ["blocks.1"], example=images(2), head=[AttentionHead()]).eval()
    assert net(*images(3))[0].shape == (3, 5)
    net = attach(bert().eval(), ["bert.encoder.layer.1"], example=token_batch(2), head=PooledLinear(TokenPool(0))).eval()
    assert net(**token_batch(3, 12))[0].shape == (3, 3)
