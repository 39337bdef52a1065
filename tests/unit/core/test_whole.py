"""Whole numbers of any width."""

from __future__ import annotations

import pytest
import torch

from offramp.core.whole import as_whole, is_whole

WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32)


@pytest.mark.parametrize("held", WHOLE)
@pytest.mark.parametrize("wanted", WHOLE)
def test_what_fits_is_the_same_numbers(held: torch.dtype, wanted: torch.dtype) -> None:
    given = torch.tensor([0, 7, 127]).to(held)
    found = as_whole(given, wanted)
    assert found is not None and found.dtype == wanted and found.tolist() == [0, 7, 127]
    assert (found is given) == (held == wanted) and is_whole(given)


@pytest.mark.parametrize(
    ("values", "held", "wanted"),
    [
        ([2**40], torch.int64, torch.int32),
        ([-1], torch.int64, torch.uint8),
        ([-1], torch.int8, torch.uint16),
        ([200], torch.uint8, torch.int8),
        ([2**31], torch.uint32, torch.int32),
    ],
)
def test_what_does_not_fit_is_none(values: list[int], held: torch.dtype, wanted: torch.dtype) -> None:
    assert as_whole(torch.tensor(values).to(held), wanted) is None


def test_what_is_not_whole() -> None:
    assert as_whole(torch.tensor([True, False])).tolist() == [1, 0]  # type: ignore[union-attr]
    assert as_whole(torch.tensor([1.0])) is None and as_whole(torch.tensor([1]), torch.float32) is None
    assert as_whole(torch.tensor([1]), torch.bool) is None and not is_whole(torch.tensor([True])) and not is_whole(torch.tensor([1.0]))
    assert as_whole(torch.zeros(0, dtype=torch.int64), torch.int8).dtype == torch.int8  # type: ignore[union-attr]
