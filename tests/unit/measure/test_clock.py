"""Medians, intervals and interleaving with a clock that the test controls."""

from __future__ import annotations

import json
import math
import time

import pytest
import torch

from offramp.core.errors import InvalidInput
from offramp.measure import Ceilings, ceilings, compare, environment, measure
from offramp.measure import clock as clock_module
from offramp.measure.clock import Timing, median_interval, quantile


class FakeClock:
    """Stands in for the `time` module; advances only when a callable says so."""

    def __init__(self) -> None:
        self.now = 0

    def perf_counter_ns(self) -> int:
        return self.now


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    clock = FakeClock()
    monkeypatch.setattr(clock_module, "time", clock)
    return clock


def test_quantiles_by_hand() -> None:
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([1.0, 2.0, 3.0, 4.0], 0.5) == 2.5
    assert quantile([float(v) for v in range(101)], 0.95) == pytest.approx(95.0)
    assert quantile([7.0], 0.95) == 7.0
    with pytest.raises(InvalidInput, match=r"q=1\.5"):
        quantile([1.0], 1.5)


def test_measure_counts_calls_and_divides(fake: FakeClock) -> None:
    calls = []

    def work() -> None:
        calls.append(1)
        fake.now += 2_000_000  # 2 ms

    timing = measure(work, warmup=3, repeats=5, calls=4)
    assert len(calls) == 3 + 5 * 4
    assert timing.samples_ms == (2.0,) * 5
    assert timing.median_ms == timing.p95_ms == timing.min_ms == 2.0
    assert (timing.warmup, timing.calls, timing.device, timing.clock) == (3, 4, "cpu", "host")
    assert json.loads(json.dumps(timing.to_dict()))["samples_ms"] == [2.0] * 5


def test_measure_sees_real_time() -> None:
    timing = measure(lambda: time.sleep(0.002), warmup=0, repeats=3)
    assert 2.0 <= timing.min_ms < 200


def test_compare_alternates_and_pairs_ratios(fake: FakeClock) -> None:
    order: list[str] = []
    drift = {"value": 1_000}

    def make(name: str, factor: int):  # type: ignore[no-untyped-def]
        def work() -> None:
            order.append(name)
            if order[4:] and len(order) % 2:  # a new round starts: the machine slows down for both alike
                drift["value"] *= 2
            fake.now += factor * drift["value"]

        return work

    result = compare({"a": make("a", 1), "b": make("b", 3)}, warmup=2, repeats=6)
    assert order == ["a", "a", "b", "b"] + ["a", "b", "b", "a"] * 3
    # Times differ 32-fold between rounds, the paired ratio not at all.
    assert result.timings["a"].samples_ms[-1] / result.timings["a"].samples_ms[0] == pytest.approx(32)
    assert result.ratios["b"].value == pytest.approx(3)
    assert (result.ratios["b"].low, result.ratios["b"].high) == (pytest.approx(3), pytest.approx(3))
    assert result.ratios["a"].value == 1
    json.dumps(result.to_dict())


def test_compare_reference() -> None:
    result = compare({"x": lambda: None, "y": lambda: None}, reference="y", warmup=0, repeats=1)
    assert result.reference == "y" and result.ratios["y"].value == 1
    with pytest.raises(InvalidInput, match="'z'"):
        compare({"x": lambda: None}, reference="z")
    with pytest.raises(InvalidInput, match="reference"):
        compare({})


def test_median_interval_order_statistics() -> None:
    # n = 10: [x(2), x(9)] covers 1 - 2 * 11/1024; the textbook sign-test interval.
    interval = median_interval([float(v) for v in range(1, 11)])
    assert (interval.value, interval.low, interval.high) == (5.5, 2.0, 9.0)
    assert interval.level == pytest.approx(1 - 22 / 1024)
    # n = 5 cannot reach 95 %: the range, at what it covers.
    small = median_interval([5.0, 1.0, 4.0, 2.0, 3.0])
    assert (small.low, small.high, small.level) == (1.0, 5.0, pytest.approx(1 - 2 / 32))


def test_median_interval_covers() -> None:
    generator = torch.Generator().manual_seed(0)
    samples = torch.empty(2000, 30).exponential_(generator=generator)
    hits = sum(e.low <= math.log(2) <= e.high for e in (median_interval(row.tolist()) for row in samples))
    assert hits / 2000 >= 0.95 - 0.012


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"repeats": 0}, "repeats"),
        ({"warmup": -1}, "warmup"),
        ({"calls": 0}, "calls"),
        ({"device": "meta"}, "meta"),
        ({"events": True}, "events=True"),
    ],
)
def test_measure_refuses(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        measure(lambda: None, **arguments)  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_measure_without_cuda() -> None:
    with pytest.raises(InvalidInput, match="no CUDA device"):
        measure(lambda: None, device="cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_events_and_host_agree_on_cuda() -> None:
    a = torch.randn(4096, 4096, device="cuda")
    host = measure(lambda: a @ a, device="cuda", repeats=10)
    events = measure(lambda: a @ a, device="cuda", repeats=10, events=True)
    assert events.clock == "events"
    assert events.median_ms == pytest.approx(host.median_ms, rel=0.3)


def test_timing_prints() -> None:
    assert str(Timing((1.0, 2.0, 3.0), 1, 1, "cpu", "host")) == "2 ms median, 2.9 ms p95, 3 samples on cpu (host clock)"


def test_environment_is_json_and_names_what_matters() -> None:
    facts = json.loads(json.dumps(environment()))
    assert facts["versions"]["torch"]
    assert facts["torch_threads"] == torch.get_num_threads()
    assert facts["device"] == "cpu" and facts["device_name"]
    assert facts["date"].endswith("+00:00")
    assert facts["commit"] is None or len(facts["commit"]) == 40


def test_environment_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    facts = environment()
    assert facts["commit"] is None and facts["uncommitted_changes"] is None


def test_roofline_floor() -> None:
    machine = Ceilings(bytes_per_s=1e9, flops_per_s=1e12, dtype="torch.float32", device="cpu")
    assert machine.balance == 1000
    assert machine.floor_ms(flops=1e9, bytes_moved=0) == pytest.approx(1.0)
    assert machine.floor_ms(flops=1e9, bytes_moved=5e6) == pytest.approx(5.0)  # memory-bound
    with pytest.raises(InvalidInput, match="-1"):
        machine.floor_ms(-1, 0)


def test_ceilings_of_this_machine_are_plausible() -> None:
    found = ceilings(copy_bytes=2**24, matmul_size=256, repeats=3)
    assert 1e8 < found.bytes_per_s < 1e13
    assert 1e7 < found.flops_per_s < 1e15
    assert found.dtype == "torch.float32"
    json.dumps(found.to_dict())
    with pytest.raises(InvalidInput, match="size"):
        ceilings(matmul_size=0, copy_bytes=1024, repeats=1)
