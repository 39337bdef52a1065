"""Which tokens are computed: measures, priorities, counts and schedules."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offramp.core.errors import InvalidInput
from offramp.core.parts import part_from_dict, part_to_dict
from offramp.reduce.regions import PARTS, AtLevels, AtSteps, ChannelNorm, ChannelSpread, Regions, token_grid


def test_the_measure_is_that_of_the_paper_by_hand() -> None:
    output = torch.randn(2, 3, 4, 6)
    rows, columns = 2, 3
    for low, sign in ((True, -1.0), (False, 1.0)):
        spread = Regions(low=low).focus(output, (rows, columns)).reshape(2, rows, columns)
        norm = Regions(low=low, measure=ChannelNorm()).focus(output, (rows, columns)).reshape(2, rows, columns)
        for b in range(2):
            for r in range(rows):
                for c in range(columns):
                    pixels = output[b, :, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].reshape(3, 4)
                    mean = sum(float((x - x.mean()).square().mean().sqrt()) for x in pixels.T) / 4
                    assert float(spread[b, r, c]) == pytest.approx(sign * math.log(mean), abs=1e-5)
                    assert float(norm[b, r, c]) == pytest.approx(sign * math.log(sum(float(x.norm()) for x in pixels.T) / 4), abs=1e-5)


def test_the_length_of_a_samplers_step_changes_no_choice() -> None:
    output, waited = torch.randn(3, 4, 8, 8), torch.randint(0, 5, (3, 16))
    for regions in (Regions(), Regions(low=False, measure=ChannelNorm(), direction=-1)):
        chosen = regions.select(regions.focus(output, (4, 4)), waited, 6)
        for step in (1e-4, -0.3, 20.0):
            assert torch.equal(regions.select(regions.focus(step * output, (4, 4)), waited, 6), chosen)


def test_one_channel_has_no_spread() -> None:
    with pytest.raises(InvalidInput, match="ChannelNorm"):
        Regions().focus(torch.randn(1, 1, 4, 4), (2, 2))
    assert Regions(measure=ChannelNorm()).focus(torch.randn(1, 1, 4, 4), (2, 2)).shape == (1, 4)


def test_an_output_of_zeros_gives_finite_priorities() -> None:
    for low in (True, False):
        assert Regions(low=low).focus(torch.zeros(1, 2, 4, 4), (2, 2)).isfinite().all()


def test_small_measures_are_in_focus_unless_large_ones_are() -> None:
    output = torch.randn(1, 4, 4, 4) * torch.tensor([0.1, 0.1, 5.0, 5.0])  # the left half is quiet
    none = torch.zeros(1, 4)
    assert Regions().select(Regions().focus(output, (2, 2)), none, 2).tolist() == [[0, 2]]
    assert Regions(low=False).select(Regions(low=False).focus(output, (2, 2)), none, 2).tolist() == [[1, 3]]


def starved(direction: int, steps: int = 60) -> int:
    """Longest wait of any token where the measures never change."""
    regions = Regions(direction=direction, staleness=0.1)
    focus, waited, longest = torch.linspace(0, 2, 16)[None], torch.zeros(1, 16, dtype=torch.int32), 0
    for _ in range(steps):
        waited = (waited + 1).scatter(1, regions.select(focus, waited, 8), 0)
        longest = max(longest, int(waited.max()))
    return longest


def test_waiting_raises_the_priority_and_in_the_released_direction_it_starves() -> None:
    # A token of the lowest focus, 2 below the highest, must wait about 2 / 0.1 steps and no longer than its competitors make it.
    assert starved(1) <= 25
    assert starved(-1) == 60


def test_the_released_direction_is_the_smallest_of_measure_times_exp() -> None:
    """The release computes the smallest ``m exp(kappa D)``."""
    measured, waited = torch.rand(2, 12) + 0.1, torch.randint(0, 9, (2, 12))
    released = (measured * torch.exp(0.1 * waited)).argsort(1)[:, :5].sort(1).values
    assert torch.equal(Regions(direction=-1).select(-measured.log(), waited, 5), released)


@given(st.integers(1, 12), st.integers(1, 24), st.integers(0, 10**6))
def test_a_row_takes_its_own_best_whatever_the_others_are(k: int, tokens: int, seed: int) -> None:
    k = min(k, tokens)
    generator = torch.Generator().manual_seed(seed)
    focus = torch.randint(0, 4, (3, tokens), generator=generator).float()  # many equals
    waited = torch.randint(0, 3, (3, tokens), generator=generator)
    chosen = Regions().select(focus, waited, k)
    assert chosen.shape == (3, k) and chosen.dtype == torch.int64
    for row in range(3):
        assert torch.equal(Regions().select(focus[row : row + 1], waited[row : row + 1], k), chosen[row : row + 1])
        own = chosen[row].tolist()
        assert own == sorted(set(own))
        priority = focus[row] + 0.1 * waited[row]
        rest = [t for t in range(tokens) if t not in own]
        assert not rest or priority[own].min() >= priority[rest].max()


@given(st.floats(0.01, 1), st.integers(1, 300), st.integers(1, 64), st.floats(-1, 1), st.floats(-20, 20))
def test_how_many_is_a_multiple_and_never_fewer_than_asked(ratio: float, tokens: int, multiple: int, change: float, level: float) -> None:
    k = Regions(ratio=ratio, multiple=multiple, change=change).count(tokens, level)
    assert 1 <= k <= tokens
    assert k == tokens or k % multiple == 0
    if change == 0:
        assert k >= ratio * tokens - 1e-6 and (k - ratio * tokens < multiple or k == multiple)


def test_published_numbers_and_the_linear_change() -> None:
    regions = Regions(multiple=64)
    assert [regions.count(4096, x) for x in (-5.0, 5.0)] == [2048, 2048]
    falling = Regions(change=-0.4, multiple=1)
    assert [falling.count(100, x) for x in (-20.0, 0.0, 20.0)] == [70, 50, 31]  # 20 is not quite clean: 30.0..1 is rounded up
    dense = [s for s in range(30) if regions.must(s, -1.0, 1.0, s == 29)]
    assert dense == [0, 1, 2, 3, 12, 22]
    assert Regions(last=True).must(29, 0.0, 1.0, True) == "last" and not Regions(last=True).must(29, 0.0, 1.0, False)
    assert Regions(ratio=1.0).count(64, 0.0) == 64


def test_resets_by_noise_level_come_once_whatever_the_sampler() -> None:
    resets = AtLevels((-1.0, 2.5))
    for steps in (7, 20, 33):
        levels = torch.linspace(-8, 8, steps).tolist()
        due = [s for s in range(steps) if resets.due(s, levels[s - 1] if s else -math.inf, levels[s])]
        assert len([s for s in due if s]) == 2
        assert all(levels[s - 1] < x <= levels[s] for s, x in zip([s for s in due if s], (-1.0, 2.5), strict=True))


def test_saves_and_reads_back() -> None:
    regions = Regions(0.25, ChannelNorm(), False, 0.2, -1, 2, AtLevels((-1.0, 2.0)), True, -0.3, 4)
    for part in (regions, Regions()):
        assert part_from_dict(json.loads(json.dumps(part_to_dict(part))), PARTS) == part


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"ratio": 0.0}, "ratio"),
        ({"ratio": 1.1}, "ratio"),
        ({"ratio": math.nan}, "ratio"),
        ({"staleness": -0.1}, "direction"),
        ({"staleness": math.inf}, "staleness"),
        ({"direction": 0}, "direction"),
        ({"first": 0}, "first"),
        ({"multiple": 0}, "multiple"),
        ({"change": math.nan}, "change"),
        ({"measure": "std"}, "measure must be"),
        ({"resets": (12, 22)}, "resets must be"),
    ],
)
def test_bad_numbers_are_refused(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        Regions(**kwargs)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="numbers from 0"):
        AtSteps((-1,))
    with pytest.raises(InvalidInput, match="finite"):
        AtLevels((math.inf,))


def test_grids() -> None:
    assert token_grid((8, 8), 16) == (4, 4) and token_grid((8, 12), 24) == (4, 6) and token_grid((5, 7), 35) == (5, 7)
    for size, tokens in (((8, 8), 15), ((8, 8), 0), ((6, 9), 13), ((8, 8), 32)):
        with pytest.raises(InvalidInput, match="do not cover"):
            token_grid(size, tokens)


def test_defaults_are_the_papers() -> None:
    assert Regions().measure == ChannelSpread() and Regions().resets == AtSteps((12, 22))
    assert (Regions().ratio, Regions().staleness, Regions().first, Regions().change) == (0.5, 0.1, 4, 0.0)
    assert Regions().direction == 1, "but for the sign"
