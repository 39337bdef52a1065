from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from offramp.backbones import Cut, CutState, cut
from offramp.core.errors import InvalidInput


class Skips(nn.Module):
    """Three layers in a row and a long skip from the first over the next two."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        first = self.a(x)
        deep = self.c(torch.relu(self.b(first)) * scale[:, None])
        return self.d(deep + first)


@pytest.fixture(scope="module")
def made() -> Cut:
    torch.manual_seed(0)
    return cut(Skips().eval(), ["a", "b", "c"], (torch.randn(2, 4), torch.ones(2)))


def inputs(rows: int) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 4), torch.rand(rows)


def test_only_what_is_made_along_a_skip_must_be_filled(made: Cut) -> None:
    hidden = [s.hidden for s in made.segments]
    assert made.made(1, 2) == (hidden[1],)
    assert made.made(1, 3) == (hidden[2],)  # what `a` made crosses anyway; `scale` is not read any more
    assert made.made(0, 3) == (hidden[0], hidden[2])
    assert made.made(1, 4) == ("out0",) == made.names(4)
    assert set(made.names(0)) == {"x", "scale"}
    for start, stop in ((2, 2), (3, 1), (-1, 2), (0, 5)):
        with pytest.raises(InvalidInput, match="forward inside"):
            made.made(start, stop)
    with pytest.raises(InvalidInput, match=r"boundary must be in \[0, 4\]"):
        made.names(5)


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (0, 3), (1, 2), (1, 3), (2, 3), (0, 4), (3, 4)])
def test_a_skip_filled_with_what_would_have_been_made_changes_nothing(made: Cut, start: int, stop: int) -> None:
    given = inputs(3)
    state = made.run(made.begin(*given), 0, start)
    through = made.run(state, start, stop)
    jumped = made.skip(state, stop, {n: through.values[n] for n in made.made(start, stop)})
    assert jumped.at == stop and jumped.rows == 3 and jumped.values.keys() == through.values.keys()
    assert jumped.hidden is through.hidden or torch.equal(jumped.hidden, through.hidden)
    assert torch.equal(made.end(made.run(jumped, stop, 4)), made(*given))


def test_a_fill_that_is_missing_or_of_other_rows_is_named(made: Cut) -> None:
    state = made.run(made.begin(*inputs(3)), 0, 1)
    name = made.made(1, 3)[0]
    with pytest.raises(InvalidInput, match=f"missing: '{name}'"):
        made.skip(state, 3, {})
    with pytest.raises(InvalidInput, match="must hold 3 rows"):
        made.skip(state, 3, {name: torch.zeros(2, 4)})


def test_rows_are_put_among_the_others_whatever_the_order(made: Cut) -> None:
    given = inputs(5)
    state = made.run(made.begin(*given), 0, 2)
    values: dict[str, Tensor] = {}
    for rows in (torch.tensor([4, 1]), torch.tensor([0]), torch.tensor([2, 3])):
        some = made.take(state, rows)
        for name in made.names(2):
            before = values.get(name)
            kept = None if before is None else before.clone()
            values[name] = made.place(name, before, some.values[name], rows, 5)
            assert before is None or torch.equal(before, kept), "what was there is not written to"
    assert all(torch.equal(values[n], state.values[n]) for n in values)
    torch.testing.assert_close(made.end(made.run(CutState(values, 5, 2), 2, 4)), made(*given))


def test_rows_of_what_holds_the_batch_twice_are_refused(made: Cut, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(made.batch_dims, "pairs", (0, 1))
    with pytest.raises(InvalidInput, match=r"dimensions \(0, 1\)"):
        made.place("pairs", None, torch.zeros(2, 2), torch.tensor([0, 1]), 3)
