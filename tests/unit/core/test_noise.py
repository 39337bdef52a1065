from __future__ import annotations

import math

import pytest
import torch

from offramp.core.errors import InvalidInput
from offramp.core.noise import FlowMatching, LogSigma, NoiseScale, VariancePreserving, noise_share


def test_flow_matching_is_a_straight_line_between_noise_and_data() -> None:
    sigma = torch.tensor([0.0, 0.25, 0.5, 1.0])
    want = torch.tensor([20.0, 2 * math.log(3), 0.0, -20.0], dtype=torch.float64)
    torch.testing.assert_close(FlowMatching().log_snr(sigma * 1000), want)
    torch.testing.assert_close(FlowMatching(1.0).log_snr(sigma), want)
    assert [noise_share(x) for x in want[1:3].tolist()] == pytest.approx([0.25, 0.5])


def test_variance_preserving_interpolates_and_stays_inside_its_table() -> None:
    level = VariancePreserving.from_alphas(torch.tensor([1.0, 0.9, 0.5, 0.0]))
    assert level.log_snr(torch.tensor([0, 2, 3, 7, -1])).tolist() == pytest.approx([20, 0, -20, -20, 20])
    assert level.log_snr(torch.tensor([1.5])).item() == pytest.approx(math.log(9) / 2)
    with pytest.raises(InvalidInput, match="do not rise"):
        VariancePreserving((0.0, 1.0))


def test_logarithm_of_sigma() -> None:
    assert LogSigma().log_snr(0.25 * torch.tensor([2.0, 0.5]).log()).tolist() == pytest.approx([-2 * math.log(2), 2 * math.log(2)])
    for scale in (FlowMatching(), LogSigma(), VariancePreserving((1.0, 0.0))):
        assert isinstance(scale, NoiseScale)
    for bad in (lambda: FlowMatching(0), lambda: LogSigma(-1), lambda: FlowMatching(math.nan)):
        with pytest.raises(InvalidInput):
            bad()
