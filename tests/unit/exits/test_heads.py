"""Every head: shapes read from the state, independence of rows, export, copies and saved weights; known answers."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import Tensor, nn

from offramp.core.errors import InvalidInput
from offramp.core.parts import part_from_dict, part_to_dict
from offramp.core.protocols import Head, HeadSpec
from offramp.exits import (
    MLP,
    PARTS,
    AttentionHead,
    AutoPool,
    Cascade,
    ConvLocal,
    ConvPoolLinear,
    Evenly,
    EveryBlock,
    Fractions,
    GeometricEnsemble,
    MeanPool,
    MixedPool,
    PooledLinear,
    Pooler,
    TokenPool,
    tie,
)
from offramp.exits.grid import as_grid
from offramp.exits.pooled import PoolerHead
from offramp.network import attach, load

CLASSES = 5
STATES = {
    "map": (12, 7, 7),
    "wide": (12, 6, 9),
    "small": (12, 2, 2),
    "nhwc": (6, 6, 12),
    "class_token": (17, 12),
    "patches": (16, 12),
    "text": (12, 12),
    "dynamic": (-1, 12),
    "vector": (12,),
    "video": (12, 2, 4, 4),
}
MAPS = {"map", "wide", "small", "nhwc"}
SQUARE = {"class_token", "patches"}
HEADS = {
    "PooledLinear": (PooledLinear(), set(STATES)),
    "PooledLinearToken": (PooledLinear(TokenPool()), {"class_token", "patches", "text", "dynamic"}),
    "MLP": (MLP(), set(STATES)),
    "MLPInner": (MLP(inner=3, pool=MeanPool(), norm=False), set(STATES)),
    "MixedPool": (MixedPool(), MAPS | SQUARE | {"text"}),
    "MixedPoolWhole": (MixedPool(cells=1, norm=True), MAPS | SQUARE | {"text"}),
    "Pooler": (Pooler(), SQUARE | {"text", "dynamic"}),
    "PoolerShared": (Pooler(shared=True), SQUARE | {"text", "dynamic"}),
    "ConvPoolLinear": (ConvPoolLinear(width=8), MAPS | SQUARE),
    "ConvPoolLinearOwnWidth": (ConvPoolLinear(width=None, convs=1), MAPS | SQUARE),
    "ConvLocal": (ConvLocal(), MAPS | SQUARE),
    "ConvLocalPointwise": (ConvLocal(kernel=1, norm=False), MAPS | SQUARE),
    "AttentionHead": (AttentionHead(), MAPS | SQUARE | {"text"}),
    "AttentionHeadR3": (AttentionHead(ratio=3, heads=5), MAPS | SQUARE | {"text"}),
    "Cascade": (Cascade(PooledLinear()), set(STATES)),
    "GeometricEnsemble": (GeometricEnsemble(MLP(4)), set(STATES)),
    "Both": (GeometricEnsemble(Cascade(ConvLocal())), MAPS | SQUARE),
}
CASES = [(h, s) for h, (_, fits) in HEADS.items() for s in STATES if s in fits]
REFUSED = [(h, s) for h, (_, fits) in HEADS.items() for s in STATES if s not in fits]
VARIANTS = {
    "PooledLinearToken",
    "MLPInner",
    "MixedPoolWhole",
    "PoolerShared",
    "ConvPoolLinearOwnWidth",
    "ConvLocalPointwise",
    "AttentionHeadR3",
}
EXPORTED = [(h, s) for h, s in CASES if h not in VARIANTS and s in {"map", "class_token", "dynamic"}] + [("ConvLocal", "nhwc")]


def state(name: str, rows: int, tokens: int = 9, seed: int = 0) -> Tensor:
    shape = tuple(tokens if s == -1 else s for s in STATES[name])
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(seed))


def answers(rows: int, count: int = 2) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(rows)
    return tuple(torch.randn(rows, CLASSES, generator=g) for _ in range(count))


def build(head: str, where: str) -> Head:
    torch.manual_seed(1)
    made = HEADS[head][0].build(STATES[where], CLASSES).eval()
    for module in made.modules():  # running statistics that matter
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return made


# ---------------------------------------------------------------------------------------------------------------- every head


def test_every_head_is_covered():
    placements = {"AfterBlocks", "Evenly", "EveryBlock", "Fractions"}
    pools = {"AutoPool", "MeanPool", "TokenPool"}
    assert {type(h).__name__ for h, _ in HEADS.values()} == set(PARTS) - placements - pools


@pytest.mark.parametrize(("head", "where"), CASES)
def test_reads_the_state(head, where):
    made = build(head, where)
    assert isinstance(HEADS[head][0], HeadSpec) and isinstance(made, Head)
    x, previous = state(where, 6), answers(6)
    with torch.no_grad():
        logits = made(x, previous)
        assert logits.shape == (6, CLASSES) and logits.isfinite().all()
        rows = torch.tensor([4, 1, 1])
        picked = made(x[rows], tuple(p[rows] for p in previous))
        torch.testing.assert_close(picked, logits[rows], rtol=1e-5, atol=1e-5)
        assert made(x[:0], tuple(p[:0] for p in previous)).shape == (0, CLASSES)
        assert made(x, ()).shape == (6, CLASSES)
        half = made.to(torch.bfloat16)(x.bfloat16(), tuple(p.bfloat16() for p in previous))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), logits, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(("head", "where"), CASES)
def test_every_parameter_trains(head, where):
    made = build(head, where).train()
    x = state(where, 6).requires_grad_()
    made(x, ()).square().sum().backward()  # the first exit, where nothing came before
    assert x.grad is not None and x.grad.abs().sum() > 0
    assert all(p.grad is not None for p in made.parameters())


@pytest.mark.parametrize(("head", "where"), REFUSED)
def test_refuses_and_names_a_head_that_fits(head, where):
    with pytest.raises(InvalidInput, match=r"Pool|size=") as caught:
        build(head, where)
    assert str(STATES[where][0]) in str(caught.value) or where == "dynamic"


@pytest.mark.parametrize(("head", "where"), EXPORTED)
def test_exports_with_dynamic_batch(head, where):
    made = build(head, where)
    x, previous = state(where, 3), answers(3)
    rows = torch.export.Dim("rows", min=0)
    shapes = ({0: rows, 1: torch.export.Dim("length", min=1)} if where == "dynamic" else {0: rows}, tuple({0: rows} for _ in previous))
    exported = torch.export.export(made, (x, previous), dynamic_shapes=shapes).module()
    for size, tokens in ((3, 9), (1, 4), (7, 12)):
        x, previous = state(where, size, tokens, seed=size), answers(size)
        with torch.no_grad():
            torch.testing.assert_close(exported(x, previous), made(x, previous), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head", HEADS)
def test_part_round_trip(head):
    spec = HEADS[head][0]
    again = part_from_dict(json.loads(json.dumps(part_to_dict(spec), allow_nan=False)), PARTS)
    assert again == spec and hash(again) == hash(spec)


@pytest.mark.parametrize("part", [AutoPool(), MeanPool(True), TokenPool(2), Evenly(4), EveryBlock(), Fractions((0.25, 0.5))])
def test_other_parts_round_trip(part):
    assert part_from_dict(json.loads(json.dumps(part_to_dict(part))), PARTS) == part


@pytest.mark.parametrize("head", HEADS)
def test_wrong_states_are_named(head):
    where = "class_token" if "class_token" in HEADS[head][1] else "map"
    with pytest.raises(InvalidInput, match=r"was given \(17, 13\)|was given \(4, 4\)"):
        made = build(head, where)
        made(torch.zeros(2, 17, 13), ())
    with pytest.raises(InvalidInput, match="was given"):
        made(torch.zeros(2, 3, 4, 5, 6, 7), ())


# ---------------------------------------------------------------------------------------------------------------- whole networks


class Stem(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.embed = nn.Conv2d(1, 8, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return x.flatten(2).transpose(1, 2) if self.kind == "tokens" else x


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=1) if x.ndim == 3 else x.mean(dim=(2, 3))


def model(kind: str) -> nn.Sequential:
    torch.manual_seed(0)
    block = (
        (lambda: nn.Sequential(nn.Linear(8, 8), nn.GELU()))
        if kind == "tokens"
        else lambda: nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
    )
    return nn.Sequential(Stem(kind), block(), block(), block(), Mean(), nn.Linear(8, CLASSES)).eval()


def images(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["tokens", "map"])
@pytest.mark.parametrize("head", HEADS)
def test_attach_copy_save_load(head, kind, tmp_path):
    where = "patches" if kind == "tokens" else "map"
    spec, fits = HEADS[head]
    base = model(kind)
    if where not in fits:
        with pytest.raises(InvalidInput):
            attach(base, ["1", "2", "3"], example=images(2), head=spec)
        return
    net = attach(base, ["1", "2", "3"], example=images(2), head=spec)
    tie(net.heads)
    for p in net.heads.parameters():
        p.data.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    net.eval()
    with torch.no_grad():
        expected = net(images(4))
        copied = copy.deepcopy(net)
        assert all(torch.equal(a, b) for a, b in zip(copied(images(4)), expected, strict=True))
        net.save(tmp_path)
        loaded = load(model(kind), tmp_path, example=images(2)).eval()
        tie(loaded.heads)
        assert all(torch.equal(a, b) for a, b in zip(loaded(images(4)), expected, strict=True))
    unique = [len({p.data_ptr() for p in n.heads.parameters()}) for n in (net, copied, loaded)]
    assert unique[0] == unique[1] == unique[2]


def test_one_pooler_for_all_exits():
    own, shared = (attach(model("tokens"), ["1", "2", "3"], example=images(2), head=Pooler(shared=s)) for s in (False, True))
    tie(own.heads)
    tie(shared.heads)
    tie(shared.heads)
    pooler = 8 * 8 + 8
    assert sum(p.numel() for p in own.heads.parameters()) - sum(p.numel() for p in shared.heads.parameters()) == 2 * pooler
    assert shared.heads[0].pooler is shared.heads[2].pooler and shared.heads[0].linear is not shared.heads[2].linear
    shared.heads[0].pooler.weight.data.zero_()
    copied = copy.deepcopy(shared)
    assert copied.heads[0].pooler is copied.heads[1].pooler is not shared.heads[0].pooler
    sum(logits.sum() for logits in shared.read([torch.randn(2, 16, 8) for _ in range(3)])).backward()
    assert shared.heads[0].pooler.weight.grad is not None


def test_wrapped_poolers_are_tied_within_a_network_only():
    a, b = ([Cascade(Pooler(shared=True)).build((4, w), 3) for w in (6, 6, 8)] for _ in range(2))
    tie(a)
    tie(b)
    assert a[0].inner.pooler is a[1].inner.pooler is not b[0].inner.pooler
    assert a[2].inner.pooler.in_features == 8


# ---------------------------------------------------------------------------------------------------------------- known answers


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((12, 7, 7), (12, 7, 7, 0, 1)),
        ((14, 14, 384), (384, 14, 14, 0, 3)),
        ((197, 768), (768, 14, 14, 1, 2)),
        ((198, 768), (768, 14, 14, 2, 2)),
        ((196, 768), (768, 14, 14, 0, 2)),
        ((201, 384), (384, 14, 14, 5, 2)),
    ],
)
def test_grids(shape, expected):
    grid = as_grid(shape, "test")
    assert (grid.channels, grid.height, grid.width, grid.prefix, grid.dim) == expected


def test_grid_of_given_size_and_layout():
    assert as_grid((129, 8), "test", size=(8, 16)).prefix == 1
    with pytest.raises(InvalidInput, match="20 x 20 needs 400 tokens; this state has 129"):
        as_grid((129, 8), "test", size=(20, 20))
    with pytest.raises(InvalidInput, match="square grid, which 128 tokens"):
        as_grid((128, 8), "test")
    assert as_grid((4, 6, 8), "test", channels_last=True).channels == 8


def test_tokens_return_to_their_places():
    x_BCHW = torch.arange(2 * 3 * 4 * 4.0).reshape(2, 3, 4, 4)
    tokens = torch.cat([torch.full((2, 1, 3), -1.0), x_BCHW.flatten(2).transpose(1, 2)], dim=1)
    assert torch.equal(as_grid((17, 3), "test").to_map(tokens), x_BCHW)
    assert torch.equal(as_grid((4, 4, 3), "test").to_map(x_BCHW.permute(0, 2, 3, 1)), x_BCHW)


@pytest.mark.parametrize(
    "spec", [ConvLocal(norm=False), AttentionHead(norm=False), ConvPoolLinear(4), MixedPool(norm=False), PooledLinear(norm=False)]
)
def test_layouts_agree(spec):
    torch.manual_seed(0)
    first, last = spec.build((8, 5, 5), 3).eval(), spec.build((5, 5, 8), 3).eval()
    last.load_state_dict(first.state_dict())
    x = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(first(x), last(x.permute(0, 2, 3, 1)))


def test_class_token_enters_local_and_global_heads():
    for spec in (ConvLocal(), AttentionHead()):
        head = spec.build((17, 8), 3).eval()
        x = torch.randn(2, 17, 8)
        other = x.clone()
        other[:, 0] += 1 + torch.arange(8.0)
        assert not torch.allclose(head(x), head(other))


def test_mixed_pool_mixes():
    head = MixedPool(cells=2).build((1, 4, 4), 2)
    head.norm, head.linear = nn.Identity(), nn.Identity()
    x = torch.tensor([[[[4.0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 8, 0], [0, 0, 0, 0]]]])
    head.alpha.data.fill_(0.25)
    assert head(x).tolist() == [[0.25 * 4 + 0.75 * 1, 0.0, 0.0, 0.25 * 8 + 0.75 * 2]]


@pytest.mark.parametrize("side", range(1, 16))
def test_mixed_pool_covers_every_position(side):
    head = MixedPool(cells=4).build((1, side, side), 2)
    x = torch.randn(1, 1, side, side, requires_grad=True)
    head(x).sum().backward()
    assert head.linear.in_features == min(side, 4) ** 2 and (x.grad != 0).all()


@pytest.mark.parametrize(("side", "convs"), [(1, 0), (2, 0), (3, 1), (4, 1), (5, 2), (7, 2), (8, 2), (32, 2)])
def test_convolutions_stop_at_small_maps(side, convs):
    head = ConvPoolLinear(4).build((3, side, side), 2)
    assert len(head.convs) == convs and head.train()(torch.randn(1, 3, side, side)).shape == (1, 2)


def test_attention_reads_a_subsample_of_keys():
    head = AttentionHead(ratio=2, norm=False).build((8, 4, 4), 3).eval()
    nn.init.eye_(head.linear.weight)
    x = torch.randn(1, 8, 4, 4)
    moved = x.clone()
    moved[..., 1, 1] += torch.randn(8)  # not among the keys: only this position's own query changes
    with torch.no_grad():
        head.project.weight.zero_(), head.project.bias.zero_()
        plain = head(x)
    torch.testing.assert_close(plain, head.linear(x.mean(dim=(2, 3))))
    seen = []
    head.key_value.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    head(x), head(moved)
    assert seen[0].shape == (1, 4, 8) and torch.equal(seen[0], seen[1])


def test_attention_heads_divide_the_channels():
    assert AttentionHead(heads=8).build((12, 4, 4), 2).heads == 4
    assert AttentionHead(heads=8).build((7, 4, 4), 2).heads == 1


def test_padding_does_not_reach_a_dynamic_head():
    for spec in (PooledLinear(), MLP(), Pooler(), Cascade(Pooler())):
        head = spec.build((-1, 8), 3).eval()
        x = torch.randn(2, 5, 8)
        padded = torch.cat([x, torch.full((2, 3, 8), 7.0)], dim=1)
        assert torch.equal(head(x), head(padded))


def test_cascade_equals_concatenation():
    torch.manual_seed(0)
    head = Cascade(PooledLinear(norm=False)).build((6,), CLASSES)
    x, previous = torch.randn(4, 6), answers(4, 3)
    both = torch.cat([x, nn.functional.layer_norm(previous[-1], (CLASSES,))], dim=1)
    weight = torch.cat([head.inner.body.weight, head.linear.weight], dim=1)
    torch.testing.assert_close(head(x, previous), both @ weight.T + head.inner.body.bias)


def test_geometric_ensemble_known_answer():
    torch.manual_seed(0)
    head = GeometricEnsemble(PooledLinear()).build((6,), CLASSES)
    x, previous = torch.randn(4, 6), answers(4, 2)
    own = head.inner(x)
    mean = sum(torch.log_softmax(z, -1) for z in (own, *previous)) / 3
    torch.testing.assert_close(head(x, previous), mean)
    head.weights.data[:3] = torch.tensor([2.0, 0.5, 3.0]).log()
    head.bias.data[1] = 0.7
    expected = (2 * own.log_softmax(-1) + 0.5 * previous[0].log_softmax(-1) + 3 * previous[1].log_softmax(-1)) / 3
    expected[:, 1] += 0.7
    torch.testing.assert_close(head(x, previous), expected)


@pytest.mark.parametrize("spec", [Cascade(PooledLinear()), GeometricEnsemble(PooledLinear()), GeometricEnsemble(Cascade(MLP()))])
def test_gradients_stop_at_earlier_answers(spec):
    head = spec.build((6,), CLASSES)
    previous = tuple(p.requires_grad_() for p in answers(4))
    head(torch.randn(4, 6), previous)[:, 0].sum().backward()
    assert all(p.grad is None for p in previous)
    assert all(p.grad is not None for p in head.parameters())
    net = attach(model("tokens"), ["1", "3"], example=images(2), head=spec)
    net(images(3))[1][:, 0].sum().backward()
    assert all(p.grad is None for p in net.heads[0].parameters()) and any(p.grad is not None for p in net.heads[1].parameters())


def test_cascade_of_a_regression():
    head = Cascade(PooledLinear()).build((6,), 1)
    x = torch.randn(4, 6)
    a, b = head(x, (torch.zeros(4, 1),)), head(x, (torch.ones(4, 1),))
    assert a.shape == (4, 1) and not torch.allclose(a, b)


def test_heads_say_whether_they_read_earlier_answers():
    for spec, needs in (
        (PooledLinear(), False),
        (Pooler(), False),
        (Cascade(PooledLinear()), True),
        (GeometricEnsemble(PooledLinear()), True),
    ):
        assert spec.build((17, 12), CLASSES).needs_previous is needs


def test_too_many_exits_for_an_ensemble():
    head = GeometricEnsemble(PooledLinear(), most=2).build((6,), CLASSES)
    with pytest.raises(InvalidInput, match="most=3"):
        head(torch.randn(2, 6), answers(2, 3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GeometricEnsemble(PooledLinear()).build((6,), 1), "one value"),
        (lambda: GeometricEnsemble(PooledLinear(), most=0).build((6,), 3), "most"),
        (lambda: MLP(inner=0).build((6,), 3), "inner"),
        (lambda: MixedPool(cells=0).build((6, 4, 4), 3), "cells"),
        (lambda: ConvPoolLinear(convs=0).build((6, 4, 4), 3), "convs"),
        (lambda: ConvLocal(kernel=2).build((6, 4, 4), 3), "odd"),
        (lambda: AttentionHead(ratio=0).build((6, 4, 4), 3), "ratio"),
        (lambda: PooledLinear().build((), 3), "wider module"),
        (lambda: Pooler(index=20).build((16, 12), 3), "has 16 tokens"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(InvalidInput, match=message):
        make()


def test_channels_last_can_be_said():
    assert PooledLinear(MeanPool(channels_last=True)).build((4, 6, 10), 3).body.in_features == 10
    assert PooledLinear().build((4, 6, 10), 3).body.in_features == 4


def test_pooler_head_is_found_by_type():
    assert isinstance(Pooler().build((4, 6), 3), PoolerHead)


def test_registers_are_no_class_token():
    grid = as_grid((13, 8), "test")
    x, vector = torch.randn(2, 13, 8), torch.randn(2, 8)
    assert grid.prefix == 4 and torch.equal(grid.add_class_token(vector, x), vector)
    torch.testing.assert_close(as_grid((10, 8), "test").add_class_token(vector, x), vector + x[:, 0])
