"""The cut: live sets, rows, sizes, outputs, FLOPs, and every way a model cannot be cut."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from offramp.backbones import cut
from offramp.core.errors import InvalidInput, NotCuttable, OfframpWarning
from offramp.core.flops import count_flops


class Blocks(nn.Module):
    """Four blocks and a head; subclasses change how forward uses them."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(4))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def rows_alone_equal(made, model: nn.Module, *inputs: Tensor, rows: Tensor, **kwargs) -> None:
    """Take rows after the first segment; outputs must be those of these rows fed alone."""
    with torch.no_grad():
        state = made.take(made.run(made.begin(*inputs, **kwargs), 0, 1), rows)
        assert state.rows == rows.numel()
        got = made.end(made.run(state, 1, len(made.segments)))
        want = model(*(t[rows] for t in inputs), **{k: t[rows] for k, t in kwargs.items()})
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


# -- what crosses


def test_parameters_are_shared_and_the_model_is_left_as_it_was() -> None:
    model = Blocks().train()
    model.blocks[1].eval()
    modes = [m.training for m in model.modules()]
    made = cut(model, ["blocks.1"], (torch.randn(2, 6),))
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    x = torch.randn(3, 6)
    with torch.no_grad():
        model.head.weight.add_(1.0)
        assert torch.equal(made(x), model.eval()(x))


def test_input_does_not_cross_for_its_size() -> None:
    class Sized(Blocks):
        def forward(self, x: Tensor) -> Tensor:
            batch = x.shape[0]
            hidden = x.flatten(1)[:, :6]
            for block in self.blocks:
                hidden = block(hidden).reshape(batch, 6)
            return self.head(hidden).view(batch, 5)

    model = Sized().eval()
    made = cut(model, ["blocks.0", "blocks.2"], (torch.randn(2, 3, 16, 16),))
    assert [s.live_bytes for s in made.spec.segments] == [24, 24, 0]
    rows_alone_equal(made, model, torch.randn(5, 3, 16, 16), rows=torch.tensor([4, 1]))


def test_skip_connection_live_bytes() -> None:
    class Skips(Blocks):
        def forward(self, x: Tensor) -> Tensor:
            first = self.blocks[0](x)
            second = self.blocks[1](first)
            third = self.blocks[2](second)
            return self.head(self.blocks[3](third) + first)

    model = Skips().eval()
    made = cut(model, ["blocks.0", "blocks.1", "blocks.2", "blocks.3"], (torch.randn(2, 6),))
    assert [s.live_bytes for s in made.spec.segments] == [24, 48, 48, 48, 0]
    assert [s.hidden_shape for s in made.spec.segments] == [(6,)] * 4 + [None]
    assert [len(made.live(k)) for k in range(5)] == [1, 1, 2, 2, 2]
    assert all(t.shape == (None, 6) and t.batch_dims == (0,) and t.dtype == torch.float32 for t in made.live(2))
    rows_alone_equal(made, model, torch.randn(7, 6), rows=torch.tensor([6, 0, 0]))


def test_flops_are_the_models() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(8 * 16, 10)).eval()
    x = torch.randn(4, 3, 8, 8)
    made = cut(model, ["0", "2"], (x,))
    assert made.spec.flops == count_flops(model, x) // 4
    assert made.spec.segments[0].flops == 2 * 8 * 3 * 9 * 36


def test_fused_layers_are_equal_up_to_rounding_and_it_says_so() -> None:
    attention = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False).eval()
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(True)
        with pytest.warns(OfframpWarning, match="rounding"):
            assert not cut(attention, ["layers.0"], (torch.randn(2, 5, 8),)).exact
        torch.backends.mha.set_fastpath_enabled(False)
        made = cut(attention, ["layers.0"], (torch.randn(2, 5, 8),))
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    assert made.exact
    per_layer = 2 * 5 * (8 * 24 + 8 * 8 + 8 * 16 + 16 * 8) + 2 * 2 * 5 * 5 * 8
    assert made.spec.flops == 2 * per_layer


def test_param_bytes() -> None:
    made = cut(Blocks(), ["blocks.1"], (torch.randn(2, 6),))
    assert [s.param_bytes for s in made.spec.segments] == [2 * 4 * (36 + 6), 2 * 4 * (36 + 6) + 4 * (30 + 5)]


# -- sizes after rows have left


def test_masks_made_of_sizes_and_expand() -> None:
    class Masked(Blocks):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.randn(1, 1, 6))

        def forward(self, x: Tensor) -> Tensor:
            batch, length, _ = x.shape
            token = self.token.expand(batch, -1, -1)
            mask = torch.ones(length + 1, length + 1, dtype=torch.bool).tril()[None, None].expand(batch, 1, -1, -1)
            index = torch.arange(batch)
            x = torch.cat([token, x], 1)
            for block in self.blocks:
                x = block(x)
                x = x + F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], attn_mask=mask)[:, 0] + token
            return self.head(x[index, torch.full((batch,), length)])

    model = Masked().eval()
    made = cut(model, ["blocks.0", "blocks.2"], (torch.randn(2, 4, 6),))
    assert [s.live_bytes for s in made.spec.segments] == [5 * 24, 5 * 24, 0]  # token, mask and index are made again
    rows_alone_equal(made, model, torch.randn(6, 4, 6), rows=torch.tensor([5, 2]))
    rows_alone_equal(made, model, torch.randn(6, 4, 6), rows=torch.tensor([3]))


def test_batch_size_in_arithmetic() -> None:
    class Arithmetic(Blocks):
        def forward(self, x: Tensor) -> Tensor:
            batch = x.shape[0]
            scale = torch.full((), batch) / batch  # one, but only if both are of the rows at hand
            for block in self.blocks:
                x = block(x).reshape(batch * 2, -1).reshape(batch, 6) * scale
            return self.head(x) * (x.shape[0] / batch)

    model = Arithmetic().eval()
    made = cut(model, ["blocks.1"], (torch.randn(2, 6),))
    rows_alone_equal(made, model, torch.randn(5, 6), rows=torch.tensor([0, 3]))


def test_mask_that_is_never_compared_with_the_tokens_loses_its_rows_too() -> None:
    class Late(Blocks):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return self.head(x) + mask.float().sum(1, keepdim=True).repeat_interleave(5, 1)

    model = Late().eval()
    made = cut(model, ["blocks.1"], (torch.randn(2, 6),), {"mask": torch.ones(2, 4, dtype=torch.long)})
    assert made.batch_dims["mask"] == (0,)
    rows_alone_equal(made, model, torch.randn(5, 6), rows=torch.tensor([4, 0]), mask=torch.randint(0, 2, (5, 4)))
    with pytest.raises(InvalidInput, match="rows"):
        made.begin(torch.randn(3, 6), mask=torch.ones(2, 4, dtype=torch.long))


def test_batch_in_another_dimension() -> None:
    class SequenceFirst(Blocks):
        def forward(self, x: Tensor) -> Tensor:
            memory = x.transpose(0, 1) * 2
            for block in self.blocks:
                x = block(x)
            return self.head(x + memory.transpose(0, 1))

    model = SequenceFirst().eval()
    made = cut(model, ["blocks.0"], (torch.randn(2, 4, 6),))
    assert (1,) in {t.batch_dims for t in made.live(1)} or (0,) in {t.batch_dims for t in made.live(1)}
    rows_alone_equal(made, model, torch.randn(5, 4, 6), rows=torch.tensor([2, 4]))


def test_strides_survive_take() -> None:
    class ChannelsLast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 1), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x).contiguous(memory_format=torch.channels_last)
            return self.second(x.permute(0, 2, 3, 1).view(x.shape[0], -1, 4)).mean(1)

    model = ChannelsLast().eval()
    made = cut(model, ["first"], (torch.randn(2, 3, 4, 4),))
    rows_alone_equal(made, model, torch.randn(5, 3, 4, 4).contiguous(memory_format=torch.channels_last), rows=torch.tensor([4, 2]))


def test_batch_equal_to_a_size_of_the_model() -> None:
    class Buffered(Blocks):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("bias", torch.randn(3, 6))

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[0] == 3:
                x = x + self.bias
            return super().forward(x)

    model = Buffered().eval()
    made = cut(model, ["blocks.1"], (torch.randn(2, 6),))
    x = torch.randn(7, 6)
    with torch.no_grad():
        assert torch.equal(made(x), model(x))


# -- in-place operations


def test_states_are_not_written_over() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            h += 1
            h.relu_()
            h = self.second(h)
            y = F.relu(h, inplace=True)
            return self.third(y) + h

    model = InPlace().eval()
    made = cut(model, ["first", "second"], (torch.randn(2, 6),))
    x = torch.randn(4, 6)
    with torch.no_grad():
        for segment in range(2):
            state = made.run(made.begin(x), 0, segment + 1)
            before = state.hidden.clone()
            once = made.end(made.run(state, segment + 1, 3))
            again = made.end(made.run(state, segment + 1, 3))
            assert torch.equal(state.hidden, before)
            assert torch.equal(once, again)
            assert torch.equal(once, model(x))
        given = x.clone()
        made(given)
        assert torch.equal(given, x)


# -- inputs and outputs


@dataclass
class Answer:
    logits: Tensor
    extra: dict[str, Tensor] | None = None
    nothing: Tensor | None = None


def test_outputs_are_restored() -> None:
    class Structured(Blocks):
        def forward(self, x: Tensor) -> Answer:
            h = self.blocks[0](x)
            return Answer(self.head(h), {"h": h, "twice": h * 2})

    class Nested(Blocks):
        def forward(self, x: Tensor):
            h = self.blocks[0](x)
            return {"a": (h, [self.head(h), None]), "n": 3, "x": x}

    class Pair(Blocks):
        def forward(self, x: Tensor):
            h = self.blocks[0](x)
            return self.head(h), h

    x = torch.randn(5, 6)
    for model in (Structured().eval(), Nested().eval(), Pair().eval()):
        made = cut(model, ["blocks.0"], (torch.randn(2, 6),))
        with torch.no_grad():
            got, want = made(x), model(x)
        assert type(got) is type(want)
        if isinstance(want, Answer):
            assert torch.equal(got.logits, want.logits) and torch.equal(got.extra["twice"], want.extra["twice"]) and got.nothing is None
        elif isinstance(want, dict):
            assert torch.equal(got["a"][1][0], want["a"][1][0]) and got["a"][1][1] is None and got["n"] == 3 and torch.equal(got["x"], x)
            with torch.no_grad():
                part = made.end(made.take(made.run(made.begin(x), 0, 2), torch.tensor([1])))
            assert torch.equal(part["x"], x[[1]])
        else:
            assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_keywords_in_any_order_constants_and_scalars() -> None:
    class Conditioned(Blocks):
        def forward(self, x: Tensor, *, time: Tensor, scale: float = 1.0, unused: Tensor | None = None) -> Tensor:
            for block in self.blocks:
                x = block(x) + time.expand(x.shape[0])[:, None]
            return self.head(x) * scale

    model = Conditioned().eval()
    kwargs = {"time": torch.tensor(0.5), "scale": 2.0, "unused": None}
    made = cut(model, ["blocks.1"], (torch.randn(2, 6),), kwargs)
    x, later = torch.randn(3, 6), torch.tensor(0.25)
    with torch.no_grad():
        assert torch.equal(made(x, unused=None, scale=2.0, time=later), model(x, time=later, scale=2.0))
    with pytest.raises(InvalidInput, match=r"scale.*3\.0.*constant 2\.0"):
        made.begin(x, time=later, scale=3.0, unused=None)


def test_wrong_inputs_say_what_is_wrong() -> None:
    made = cut(Blocks(), ["blocks.1"], (torch.randn(2, 6),))
    with pytest.raises(InvalidInput, match="dimension 1"):
        made.begin(torch.randn(2, 5))
    with pytest.raises(InvalidInput, match="rank"):
        made.begin(torch.randn(2, 6, 1))
    with pytest.raises(InvalidInput, match="float64"):
        made.begin(torch.randn(2, 6, dtype=torch.float64))
    with pytest.raises(InvalidInput, match=r"structure.*given \(tensor, tensor, n=list of 1\); expected \(tensor\)"):
        made.begin(torch.randn(2, 6), torch.randn(2, 6), n=[1])
    state = made.begin(torch.randn(2, 6))
    with pytest.raises(InvalidInput, match="Cannot run"):
        made.run(state, 1, 2)
    with pytest.raises(InvalidInput, match="run the rest"):
        made.end(state)
    with pytest.raises(InvalidInput, match="boundary"):
        made.live(2)


def test_wrong_arguments() -> None:
    model, x = Blocks(), torch.randn(2, 6)
    with pytest.raises(InvalidInput, match="at least one"):
        cut(model, [], (x,))
    with pytest.raises(InvalidInput, match="list"):
        cut(model, "blocks.1", (x,))
    with pytest.raises(InvalidInput, match="twice"):
        cut(model, ["blocks.1", "blocks.1"], (x,))
    with pytest.raises(InvalidInput, match="no tensor"):
        cut(model, ["blocks.1"], (3,))
    with pytest.raises(InvalidInput, match="9 rows"):
        cut(model, ["blocks.1"], (x,), batch_size=9)


# -- what cannot be cut


def test_missing_path_names_the_nearest() -> None:
    with pytest.raises(NotCuttable, match=r"block\.1") as caught:
        cut(Blocks(), ["block.1"], (torch.randn(2, 6),))
    assert caught.value.reason == "missing" and caught.value.path == "block.1" and "blocks.1" in caught.value.suggestions


def test_unreached_module() -> None:
    class Skipping(Blocks):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.blocks[0](x))

    with pytest.raises(NotCuttable) as caught:
        cut(Skipping(), ["blocks.2"], (torch.randn(2, 6),))
    assert caught.value.reason == "unreached" and caught.value.path == "blocks.2"


def test_identity_leaves_no_operation() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Identity(), nn.Linear(6, 2))
    with pytest.raises(NotCuttable, match="no operation") as caught:
        cut(model, ["1"], (torch.randn(2, 6),))
    assert caught.value.reason == "unreached"


def test_repeated_module() -> None:
    class Shared(Blocks):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.blocks[0](self.blocks[0](x)))

    with pytest.raises(NotCuttable, match="2 times") as caught:
        cut(Shared(), ["blocks.0"], (torch.randn(2, 6),))
    assert caught.value.reason == "repeated" and caught.value.path == "blocks.0"


def test_not_exportable() -> None:
    class Branching(Blocks):
        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 0:
                x = x + 1
            return super().forward(x)

    with pytest.raises(NotCuttable, match="cannot export Branching") as caught:
        cut(Branching(), ["blocks.0"], (torch.randn(2, 6),))
    assert caught.value.reason == "export"


def test_a_model_that_returns_a_cache_names_the_way_out() -> None:
    class Cache:
        pass

    class Remembering(Blocks):
        def forward(self, x: Tensor):
            return super().forward(x), Cache()

    with pytest.raises(NotCuttable, match=r"Cache.*use_cache = False"):
        cut(Remembering(), ["blocks.1"], (torch.randn(2, 6),))


def test_batch_specialised_away() -> None:
    class Fixed(Blocks):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(torch.stack([x[i] for i in range(x.shape[0])]))

    with pytest.raises(NotCuttable, match="batch dimension") as caught:
        cut(Fixed(), ["blocks.0"], (torch.randn(2, 6),))
    assert caught.value.reason == "batch"


def test_folded_live_set() -> None:
    class Folded(Blocks):
        def forward(self, x: Tensor) -> Tensor:
            side = x.reshape(x.shape[0] * 2, 3)
            for block in self.blocks:
                x = block(x)
            return self.head(x + (side * 2).reshape(x.shape[0], 6))

    with pytest.raises(NotCuttable, match="folded") as caught:
        cut(Folded(), ["blocks.1"], (torch.randn(2, 6),))
    assert caught.value.reason == "live"


def test_state_without_the_batch_first() -> None:
    class Transposed(Blocks):
        def __init__(self) -> None:
            super().__init__()
            self.turn = Turn()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.turn(self.blocks[0](x)).transpose(0, 1))

    class Turn(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.transpose(0, 1) * 2

    with pytest.raises(NotCuttable, match="first dimension is the") as caught:
        cut(Transposed(), ["turn"], (torch.randn(2, 6),))
    assert caught.value.reason == "output" and caught.value.path == "turn"


@pytest.mark.parametrize("early", [True, False])
def test_random_in_evaluation_mode(early: bool) -> None:
    class Noisy(Blocks):
        def forward(self, x: Tensor) -> Tensor:
            x = x + torch.randn_like(x) if early else x
            for block in self.blocks:
                x = block(x)
            return self.head(x if early else x + torch.randn_like(x))

    with pytest.raises(NotCuttable, match="random in evaluation") as caught:
        cut(Noisy(), ["blocks.1"], (torch.randn(2, 6),))
    assert caught.value.reason == "mismatch"


@pytest.mark.parametrize("early", [True, False])
def test_rows_mixed_in_evaluation_mode(early: bool) -> None:
    class Mixing(Blocks):
        def forward(self, x: Tensor) -> Tensor:
            x = x - x.mean(0) if early else x
            for block in self.blocks:
                x = block(x)
            return self.head(x if early else x - x.mean(0))

    with pytest.raises(NotCuttable, match="mixes the rows") as caught:
        cut(Mixing(), ["blocks.1"], (torch.randn(2, 6),))
    assert caught.value.reason == "mismatch"


def test_inner_module_that_returns_no_tensor() -> None:
    class Strange(nn.Module):
        def forward(self, x: Tensor) -> dict[str, int]:
            return {"n": x.shape[1]}

    class Outer(Blocks):
        def __init__(self) -> None:
            super().__init__()
            self.strange = Strange()

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * self.strange(x)["n"])

    with pytest.raises(NotCuttable) as caught:
        cut(Outer(), ["strange"], (torch.randn(2, 6),))
    assert caught.value.reason == "output"
