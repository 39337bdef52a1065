"""Joules with counters and a clock that the test controls: calls are counted, counters wrap, and what is missing is said."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from offramp.core.errors import InvalidInput, MissingExtra
from offramp.measure import Energy, measure_energy
from offramp.measure import energy as energy_module
from offramp.measure.energy import Nvml, Rapl, counter_of, spent_j


@dataclass
class Machine:
    """A clock and a counter of two domains; work takes seconds and draws watts."""

    now: float = 0.0
    joules: list[float] = field(default_factory=lambda: [0.0, 0.0])
    domains: tuple[str, ...] = ("package-0", "package-0/dram")
    range_j: tuple[float, ...] = (math.inf, math.inf)
    calls: int = 0

    def perf_counter(self) -> float:
        return self.now

    def read_j(self) -> tuple[float, ...]:
        return tuple(j % limit for j, limit in zip(self.joules, self.range_j, strict=True))

    def work(self, seconds: float = 0.25, watts: tuple[float, float] = (40.0, 8.0)) -> None:
        self.calls += 1
        self.now += seconds
        self.joules = [j + w * seconds for j, w in zip(self.joules, watts, strict=True)]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()
    monkeypatch.setattr(energy_module, "time", made)
    return made


def test_joules_per_call_of_all_domains(machine: Machine) -> None:
    result = measure_energy(machine.work, warmup=3, repeats=4, min_seconds=1.0, counter=machine)
    assert result.calls == 4  # of a quarter of a second each
    assert machine.calls == 3 + 1 + 4 * 4
    assert result.samples_j == pytest.approx((12.0,) * 4)  # (40 + 8) W x 0.25 s
    assert result.samples_s == pytest.approx((0.25,) * 4)
    assert result.median_j == pytest.approx(12.0)
    assert result.mean_w == pytest.approx(48.0)
    assert (result.domains, result.device) == (machine.domains, "cpu")
    assert json.loads(json.dumps(result.to_dict()))["samples_j"] == list(result.samples_j)
    assert str(result).startswith("12 J median, 48 W mean, 4 samples of 4 calls on cpu")


def test_a_compiling_first_call_does_not_shorten_samples(machine: Machine) -> None:
    def work() -> None:
        machine.work(10.0 if machine.calls == 0 else 0.125)

    assert measure_energy(work, warmup=1, repeats=1, min_seconds=1.0, counter=machine).calls == 8


def test_mean_power_weighs_samples_by_their_time() -> None:
    assert Energy((1.0, 9.0), (1.0, 3.0), 1, ("gpu",), "cuda:0").mean_w == pytest.approx(2.5)


def test_counters_that_wrap_while_measuring(machine: Machine) -> None:
    machine.range_j = (1500.0, 1200.0)
    machine.joules = [1490.0, 1199.0]
    result = measure_energy(machine.work, warmup=0, repeats=60, min_seconds=1.0, counter=machine)
    assert machine.joules[0] > 1500 and machine.joules[1] > 1200, "the counters must have wrapped"
    assert result.samples_j == pytest.approx((12.0,) * 60)


def test_one_wrap_by_hand() -> None:
    assert spent_j([90.0, 5.0], [10.0, 7.5], [100.0, math.inf], 0.05) == pytest.approx((20.0, 2.5))
    assert spent_j([10.0], [10.0], [100.0], 0.05) == (0.0,)


def test_a_second_wrap_could_go_unseen(machine: Machine) -> None:
    machine.range_j = (2000.0, math.inf)
    with pytest.raises(InvalidInput, match=r"took 2 s; a counter that starts again at 2000 J .* fewer seconds"):
        measure_energy(machine.work, warmup=0, repeats=1, min_seconds=2.0, counter=machine)


def test_a_counter_without_end_does_not_go_back() -> None:
    with pytest.raises(InvalidInput, match=r"went back from 5\.0 J to 3\.0 J"):
        spent_j([5.0], [3.0], [math.inf], 1.0)


def test_a_counter_that_stands_still_is_an_error(machine: Machine) -> None:
    with pytest.raises(InvalidInput, match=r"did not move in 1 s\. Raise min_seconds"):
        measure_energy(lambda: machine.work(0.5, (0.0, 0.0)), repeats=1, min_seconds=1.0, counter=machine)


@pytest.mark.parametrize(
    "wrong", [{"warmup": -1}, {"repeats": 0}, {"min_seconds": 0.0}, {"min_seconds": math.inf}, {"min_seconds": math.nan}]
)
def test_settings_out_of_range(machine: Machine, wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match="min_seconds > 0, got"):
        measure_energy(machine.work, counter=machine, **wrong)


# ------------------------------------------------------------------------------------------------ RAPL


def zone(folder: Path, name: str, energy_uj: int, range_uj: int = 262_143_328_850) -> Path:
    folder.mkdir(parents=True)
    for file, value in (("name", name), ("energy_uj", energy_uj), ("max_energy_range_uj", range_uj)):
        (folder / file).write_text(f"{value}\n")
    return folder


@pytest.fixture
def powercap(tmp_path: Path) -> Path:
    """Two packages with what lies in, beside and around them, and the second way to the same package counter."""
    for number in (0, 1):
        package = zone(tmp_path / f"intel-rapl:{number}", f"package-{number}", 1_000_000 * (number + 1))
        zone(package / f"intel-rapl:{number}:0", "core", 700_000)
        zone(package / f"intel-rapl:{number}:1", "dram", 250_000, 65_712_999_613)
    zone(tmp_path / "intel-rapl:2", "psys", 9_000_000)
    zone(tmp_path / "intel-rapl-mmio:0", "package-0", 1_000_000)
    (tmp_path / "intel-rapl").mkdir()
    return tmp_path


def test_rapl_adds_what_does_not_overlap(powercap: Path) -> None:
    rapl = Rapl(powercap)
    assert rapl.domains == ("package-0", "package-0/dram", "package-1", "package-1/dram")
    assert rapl.read_j() == (1.0, 0.25, 2.0, 0.25)
    assert rapl.range_j == pytest.approx((262143.32885, 65712.999613, 262143.32885, 65712.999613))


def test_rapl_is_read_anew_each_time_and_wraps(powercap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rapl, machine = Rapl(powercap), Machine()
    monkeypatch.setattr(energy_module, "time", machine)
    counter = powercap / "intel-rapl:0" / "energy_uj"
    counter.write_text("262143000000\n")

    def work() -> None:
        machine.work()
        counter.write_text(f"{(int(counter.read_text()) + 3_000_000) % 262_143_328_850}\n")

    result = measure_energy(work, warmup=0, repeats=2, min_seconds=0.25, counter=rapl)
    assert result.samples_j == pytest.approx((3.0, 3.0))
    assert int(counter.read_text()) < 10_000_000, "the counter must have wrapped"


def test_no_rapl_says_what_is_missing(tmp_path: Path) -> None:
    zone(tmp_path / "intel-rapl:0", "psys", 1)
    for folder in (tmp_path, tmp_path / "nothing here"):
        with pytest.raises(InvalidInput, match="intel_rapl_msr loaded, and virtual machines rarely pass it on"):
            Rapl(folder)


def test_rapl_for_root_only_says_how_to_allow_it(powercap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *args: Any, **kwargs: Any) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, *args, **kwargs)

    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", refuse)  # root, who may run the tests, is refused nothing
    with pytest.raises(InvalidInput, match=r"read by root only.*sudo chmod a\+r .*energy_uj"):
        Rapl(powercap)


def test_rapl_that_holds_no_number(powercap: Path) -> None:
    (powercap / "intel-rapl:1" / "energy_uj").write_text("unknown\n")
    with pytest.raises(InvalidInput, match="does not hold a whole number of microjoules"):
        Rapl(powercap)


# ------------------------------------------------------------------------------------------------ NVML


class NVMLError(Exception):
    pass


@dataclass
class FakeNvml:
    """The few functions of pynvml that are used; one GPU."""

    millijoules: int = 5_000
    supported: bool = True
    started: int = 0
    NVMLError: type[Exception] = NVMLError

    def nvmlInit(self) -> None:
        self.started += 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != "GPU-1234":
            raise NVMLError("Not Found")
        return "handle"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        assert self.started and handle == "handle"
        if not self.supported:
            raise NVMLError("Not Supported")
        return self.millijoules


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake


def test_nvml_counts_millijoules(nvml: FakeNvml) -> None:
    counter = Nvml("GPU-1234")
    assert (counter.domains, counter.range_j, counter.read_j()) == (("gpu",), (math.inf,), (5.0,))
    nvml.millijoules += 1_500
    assert counter.read_j() == (6.5,)


def test_nvml_without_the_gpu_or_its_counter(nvml: FakeNvml) -> None:
    with pytest.raises(InvalidInput, match="GPU-none: Not Found"):
        Nvml("GPU-none")
    nvml.supported = False
    with pytest.raises(InvalidInput, match=r"Not Supported.*no MIG slice"):
        Nvml("GPU-1234")


def test_nvml_missing_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(MissingExtra, match=r"nvidia-ml-py.*offramp\[energy\]"):
        Nvml("GPU-1234")


def test_the_counter_of_a_cuda_device_is_found_by_uuid(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234"))
    found = counter_of("cuda:0")
    assert isinstance(found, Nvml) and found.uuid == "GPU-1234"
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(InvalidInput, match="ROCm"):
        counter_of("cuda:0")


def test_devices_without_a_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidInput, match="cpu and cuda devices, got meta"):
        counter_of("meta")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InvalidInput, match="sees no CUDA device"):
        counter_of("cuda")
