"""Isotonic maps: optimality, what happens outside the fitted range, and the file."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
from sklearn.isotonic import IsotonicRegression

from offramp.budget import PARTS, MonotoneMap, isotonic
from offramp.core.errors import InvalidInput
from offramp.core.parts import part_from_dict, part_to_dict


def test_isotonic_equals_another_implementation():
    for seed in range(30):
        draw = np.random.default_rng(seed)
        n = int(draw.integers(1, 60))
        y = draw.normal(size=n) + np.linspace(0, seed % 4, n)
        if seed % 3 == 0:
            y = y.round(1)
        w = draw.uniform(0.1, 5, n)
        expected = IsotonicRegression().fit_transform(np.arange(n), y, sample_weight=w)
        assert isotonic(y, w) == pytest.approx(expected)
        assert isotonic(y) == pytest.approx(IsotonicRegression().fit_transform(np.arange(n), y))


def test_isotonic_by_hand():
    assert isotonic([1.0, 3.0, 2.0, 4.0]).tolist() == [1.0, 2.5, 2.5, 4.0]
    assert isotonic([3.0, 2.0, 1.0]).tolist() == [2.0, 2.0, 2.0]
    assert isotonic([2.0, 1.0], [1.0, 3.0]).tolist() == [1.25, 1.25]
    for values, weight in (([1.0, math.nan], None), ([1.0], [0.0]), ([1.0], [1.0, 1.0])):
        with pytest.raises(InvalidInput, match="finite values"):
            isotonic(values, weight)


def sample(n: int = 400):
    draw = np.random.default_rng(0)
    x = draw.gamma(2, 0.05, n)
    return x, x**2 + draw.normal(size=n) * 0.01


def test_fit_rises_keeps_its_range_and_predicts_its_knots():
    x, y = sample()
    fitted = MonotoneMap.fit(x, torch.from_numpy(y))
    assert fitted.range == (x.min(), x.max()) and fitted.items == 400
    assert 0.5 < fitted.explained < 1
    grid = np.linspace(x.min() - 0.1, x.max() + 1, 500)
    out = fitted.predict(grid).numpy()
    assert (np.diff(out) >= 0).all() and out[0] == fitted.error[0] and out[-1] == fitted.error[-1]
    assert fitted.predict(fitted.signal).tolist() == pytest.approx(fitted.error)
    order = np.argsort(x)
    assert fitted.predict(x[order]).numpy() == pytest.approx(isotonic(y[order]), abs=0.02)
    assert fitted.predict(x[order]).numpy() == pytest.approx(np.interp(x[order], fitted.signal, fitted.error))


def test_a_polynomial_through_the_same_points_is_no_distance_and_the_map_is():
    """What peers ship: degree 4 by least squares. Outside the fitted signals it falls below zero; the map cannot."""
    x, y = sample(60)
    x, y = x + 0.1, y + 0.02 * np.sin(40 * x)
    polynomial = np.polynomial.Polynomial.fit(x, y, 4)
    wide = np.linspace(0, 2 * x.max(), 200)
    assert polynomial(wide).min() < 0 or (np.diff(polynomial(wide)) < 0).any()
    out = MonotoneMap.fit(x, y).predict(wide).numpy()
    assert (np.diff(out) >= 0).all() and out.min() >= isotonic(y[np.argsort(x)]).min() - 1e-12


def test_outside_the_range_means_compute():
    made = MonotoneMap((0.1, 0.2), (1.0, 2.0))
    signal = torch.tensor([0.05, 0.1, 0.15, 0.2, 0.25, math.inf, -math.inf, math.nan], dtype=torch.float64)
    assert made.outside(signal).tolist() == [True, False, False, False, True, True, True, True]
    assert made.outside(signal, below=False).tolist() == [False, False, False, False, True, True, False, True]
    assert made.predict(signal).tolist() == pytest.approx([1.0, 1.0, 1.5, 2.0, 2.0, 2.0, 1.0, math.inf])


def test_equal_signals_are_pooled_and_weights_count():
    fitted = MonotoneMap.fit([1.0, 1.0, 2.0], [0.0, 4.0, 3.0], [3.0, 1.0, 1.0])
    assert fitted.signal == (1.0, 2.0) and fitted.error == (1.0, 3.0)
    doubled = MonotoneMap.fit([1.0, 1.0, 2.0, 3.0], [5.0, 1.0, 2.0, 4.0], [1.0, 2.0, 2.0, 0.0])
    repeated = MonotoneMap.fit([1.0, 1.0, 1.0, 2.0, 2.0], [5.0, 1.0, 1.0, 2.0, 2.0])
    assert doubled.error == pytest.approx(repeated.error) and doubled.signal == repeated.signal
    assert doubled.explained == pytest.approx(repeated.explained) and doubled.range == (1.0, 2.0)


def test_a_signal_that_says_nothing_explains_nothing():
    draw = np.random.default_rng(0)
    assert MonotoneMap.fit(draw.random(2000), draw.random(2000)).explained < 0.03
    falling = MonotoneMap.fit(np.arange(50.0), -np.arange(50.0))
    assert falling.explained == pytest.approx(0, abs=1e-12) and len(set(falling.error)) == 1 and falling.range == (0.0, 49.0)
    assert MonotoneMap.fit([1.0, 2.0], [3.0, 3.0]).explained == 0.0
    single = MonotoneMap.fit([2.0], [3.0])
    assert single.predict([1.0, 2.0, 4.0]).tolist() == [3.0, 3.0, 3.0] and single.outside([1.0, 2.0]).tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tensors_keep_their_type_and_shape(dtype):
    x, y = sample()
    fitted = MonotoneMap.fit(x, y)
    signal = torch.rand(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype) * 0.3
    out = fitted.predict(signal)
    assert out.dtype == dtype and out.shape == (4, 3)
    precise = fitted.predict(signal.double())
    assert torch.allclose(out.double(), precise, atol=float(torch.finfo(dtype).eps), rtol=4 * float(torch.finfo(dtype).eps))
    assert fitted.predict(torch.empty(0)).shape == (0,)
    assert fitted.predict(signal.T).equal(out.T)
    assert fitted.predict(torch.tensor([1, 2])).dtype == torch.float64


def test_file_and_bad_arguments():
    x, y = sample(50)
    fitted = MonotoneMap.fit(x, y)
    assert part_from_dict(json.loads(json.dumps(part_to_dict(fitted))), PARTS) == fitted
    for signal, error in (((), ()), ((1.0, 1.0), (0.0, 1.0)), ((1.0, 2.0), (1.0, 0.0)), ((1.0,), (1.0, 2.0)), ((1.0,), (math.inf,))):
        with pytest.raises(InvalidInput, match="finite knots"):
            MonotoneMap(signal, error)
    for arguments in itertools.product(([1.0, 2.0],), ([1.0], [1.0, 2.0]), ([0.0, 0.0], [-1.0, 1.0])):
        with pytest.raises(InvalidInput, match="alike"):
            MonotoneMap.fit(*arguments)
    for bad in ([1.0, math.nan], [], [[1.0]]):
        with pytest.raises(InvalidInput, match="signal must be"):
            MonotoneMap.fit(bad, [1.0, 1.0])
