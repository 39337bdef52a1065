"""Joules of a callable, read from the energy counter of the device. Nothing is modelled: without a counter there is an error.

An NVIDIA GPU counts through NVML (extra ``energy``), an x86 CPU under Linux through RAPL (``/sys/class/powercap``). Both count what
the whole device draws while the callable runs: its idle power and other processes are included, so measure on a quiet machine and
compare callables on the same one. On a GPU the host's own draw is not included.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from offramp.core.errors import InvalidInput, MissingExtra
from offramp.measure.clock import quantile

POWERCAP = Path("/sys/class/powercap")
_MOST_W = 1000.0
"""No processor package draws as much: how fast a RAPL counter can run at most, hence how long it surely wraps once at most."""


class Counter(Protocol):
    """Energy since some moment, per domain of a device. Made by `counter_of`; anything with these three members will do."""

    @property
    def domains(self) -> tuple[str, ...]:
        """What is counted, e.g. ``("package-0", "package-0/dram")``. Domains do not overlap: their sum is the device's energy."""
        ...

    @property
    def range_j(self) -> tuple[float, ...]:
        """Joules at which each domain starts again from zero; ``inf`` where it does not."""
        ...

    def read_j(self) -> tuple[float, ...]:
        """Joules of each domain now."""
        ...


@dataclass(frozen=True)
class Energy:
    """Energy of one callable.

    Attributes:
        samples_j: joules per call, all domains together, one number per repeat, warm-up excluded.
        samples_s: seconds per call of the same repeats.
        calls: calls per sample; the samples are per call.
        domains: what was counted.
        device: what ran, e.g. ``"cpu"`` or ``"cuda:0"``.
    """

    samples_j: tuple[float, ...]
    samples_s: tuple[float, ...]
    calls: int
    domains: tuple[str, ...]
    device: str

    @property
    def median_j(self) -> float:
        return quantile(self.samples_j, 0.5)

    @property
    def mean_w(self) -> float:
        """Mean power over all samples, in watts."""
        return sum(self.samples_j) / sum(self.samples_s)

    def to_dict(self) -> dict[str, Any]:
        """JSON data, raw samples included."""
        return {
            "median_j": self.median_j,
            "mean_w": self.mean_w,
            "samples_j": list(self.samples_j),
            "samples_s": list(self.samples_s),
            "calls": self.calls,
            "domains": list(self.domains),
            "device": self.device,
        }

    def __str__(self) -> str:
        taken = f"{len(self.samples_j)} samples of {self.calls} calls on {self.device}, {', '.join(self.domains)}"
        return f"{self.median_j:.4g} J median, {self.mean_w:.4g} W mean, {taken}"


@dataclass(frozen=True)
class Nvml:
    """The energy counter of an NVIDIA GPU since its driver was loaded (``nvmlDeviceGetTotalEnergyConsumption``).

    Attributes:
        uuid: of the GPU as NVML writes it, ``"GPU-..."``. Not an index: ``CUDA_VISIBLE_DEVICES`` renumbers torch's devices, not NVML's.
    """

    uuid: str
    _nvml: Any = field(init=False, repr=False, compare=False)
    _handle: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        try:
            import pynvml
        except ImportError as error:
            raise MissingExtra("nvidia-ml-py", "energy", "Reading the energy of an NVIDIA GPU") from error
        object.__setattr__(self, "_nvml", pynvml)
        try:
            pynvml.nvmlInit()
            object.__setattr__(self, "_handle", pynvml.nvmlDeviceGetHandleByUUID(self.uuid))
        except pynvml.NVMLError as error:
            raise InvalidInput(f"NVML does not give access to the GPU {self.uuid}: {error}. `nvidia-smi -L` lists what it sees.") from error
        self.read_j()

    @property
    def domains(self) -> tuple[str, ...]:
        return ("gpu",)

    @property
    def range_j(self) -> tuple[float, ...]:
        return (math.inf,)  # 64 bits of millijoules

    def read_j(self) -> tuple[float, ...]:
        try:
            return (self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1e3,)
        except self._nvml.NVMLError as error:
            raise InvalidInput(
                f"The GPU {self.uuid} does not give its energy: {error}. The counter needs a Volta GPU or newer, whole (no MIG slice, "
                f"no virtual GPU)."
            ) from error


@dataclass(frozen=True)
class Rapl:
    """The energy counters of the processor packages and of the memory beside them.

    Package zones hold cores, caches and integrated graphics. Their ``dram`` zone is counted apart and therefore added; ``core`` and
    ``uncore`` lie within the package, and ``psys`` around it, so they are not.

    Attributes:
        root: folder of the powercap zones.
    """

    root: Path = POWERCAP
    _zones: tuple[tuple[str, Path, float], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        zones: list[tuple[str, Path, float]] = []
        for package in self._named(self.root, r"intel-rapl:\d+", r"package-.*"):  # the driver's name on AMD too
            for zone, name in [(package[0], package[1])] + [
                (path, f"{package[1]}/dram") for path, _ in self._named(package[0], re.escape(package[0].name) + r":\d+", "dram")
            ]:
                zones.append((name, zone / "energy_uj", _number(zone / "max_energy_range_uj") / 1e6))
        if not zones:
            raise InvalidInput(
                f"There is no package-level energy counter in {self.root}: RAPL needs Linux on an Intel or AMD processor with the kernel "
                f"module intel_rapl_msr loaded, and virtual machines rarely pass it on. Measure on the machine itself."
            )
        object.__setattr__(self, "_zones", tuple(zones))
        self.read_j()

    @staticmethod
    def _named(folder: Path, file: str, name: str) -> list[tuple[Path, str]]:
        """Zones right under a folder whose directory and whose own name match."""
        inside = sorted(folder.iterdir()) if folder.is_dir() else []
        zones = [(path, (path / "name").read_text().strip()) for path in inside if re.fullmatch(file, path.name)]
        return [(path, own) for path, own in zones if re.fullmatch(name, own)]

    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(name for name, _, _ in self._zones)

    @property
    def range_j(self) -> tuple[float, ...]:
        return tuple(limit for _, _, limit in self._zones)

    def read_j(self) -> tuple[float, ...]:
        return tuple(_number(path) / 1e6 for _, path, _ in self._zones)


def _number(path: Path) -> int:
    try:
        return int(path.read_text())
    except PermissionError as error:
        raise InvalidInput(
            f"{path} may be read by root only, Linux's default. Run as root, or allow it until the next boot: sudo chmod a+r {path}"
        ) from error
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{path} does not hold a whole number of microjoules: {error}") from error


def counter_of(device: torch.device | str = "cpu") -> Counter:
    """The energy counter of a device.

    Args:
        device: ``cpu`` (all packages of the machine) or a CUDA device.

    Raises:
        InvalidInput: the device has no counter, or it may not be read; says why and what to do.
        MissingExtra: the device is an NVIDIA GPU and nvidia-ml-py is not installed.
    """
    where = torch.device(device)
    if where.type == "cpu":
        return Rapl()
    if where.type != "cuda":
        raise InvalidInput(f"Energy counters are known for cpu and cuda devices, got {where}. Give a counter of your own.")
    if not torch.cuda.is_available():
        raise InvalidInput(f"device={where} was given, but torch sees no CUDA device on this machine.")
    if torch.version.cuda is None:
        raise InvalidInput(f"device={where} is not an NVIDIA GPU (this torch is built for ROCm), and NVML counts no other. Give a counter.")
    uuid = str(torch.cuda.get_device_properties(where).uuid)
    return Nvml(uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")


def spent_j(before: Sequence[float], after: Sequence[float], range_j: Sequence[float], seconds: float) -> tuple[float, ...]:
    """Joules between two readings of each domain, each having wrapped at most once.

    Args:
        before: first reading.
        after: second reading.
        range_j: see `Counter`.
        seconds: between them, at least.

    Raises:
        InvalidInput: a counter went back although it never wraps, or enough time has passed for it to wrap twice unseen.
    """
    spent = []
    for first, last, limit in zip(before, after, range_j, strict=True):
        if seconds * _MOST_W >= limit:
            raise InvalidInput(
                f"A sample took {seconds:.4g} s; a counter that starts again at {limit:.4g} J could by then have done so unseen. "
                f"Measure a shorter callable, or fewer seconds per sample."
            )
        if last < first and math.isinf(limit):
            raise InvalidInput(f"The energy counter went back from {first} J to {last} J: it was reset while measuring. Measure again.")
        spent.append(last - first if last >= first else last - first + limit)
    return tuple(spent)


def measure_energy(
    fn: Callable[[], Any],
    *,
    warmup: int = 3,
    repeats: int = 5,
    min_seconds: float = 2.0,
    device: torch.device | str = "cpu",
    counter: Counter | None = None,
) -> Energy:
    """Joules of a callable.

    Counters move in steps (RAPL about every millisecond, NVML up to every tenth of a second), so a sample repeats the callable for
    ``min_seconds``; steps at its two ends are then a small part of it.

    Args:
        fn: called without arguments; its inputs should already be on the device.
        warmup: calls before anything is read, >= 0; one more is then timed, to choose the calls per sample.
        repeats: samples, >= 1.
        min_seconds: length of a sample, > 0.
        device: where ``fn`` runs; CUDA is synchronised around samples.
        counter: what counts; that of the device by default.

    Raises:
        InvalidInput: a setting is out of range, the device has no readable counter, or the counter did not move.
        MissingExtra: see `counter_of`.
    """
    if warmup < 0 or repeats < 1 or not 0 < min_seconds < math.inf:
        raise InvalidInput(f"warmup must be >= 0, repeats >= 1 and min_seconds > 0, got {warmup}, {repeats} and {min_seconds}.")
    where = torch.device(device)
    reader = counter if counter is not None else counter_of(where)

    def seconds_of(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            fn()
        if where.type == "cuda":
            torch.cuda.synchronize(where)
        return time.perf_counter() - start

    seconds_of(warmup)
    # max(): a call shorter than a clock tick; a million calls of it are enough.
    calls = max(1, math.ceil(min_seconds / max(seconds_of(1), min_seconds / 1e6)))
    joules, seconds = [], []
    for _ in range(repeats):
        before = reader.read_j()
        taken = seconds_of(calls)
        total = sum(spent_j(before, reader.read_j(), reader.range_j, taken))
        if total <= 0:
            raise InvalidInput(f"The energy counter did not move in {taken:.4g} s. Raise min_seconds ({min_seconds} given).")
        joules.append(total / calls)
        seconds.append(taken / calls)
    return Energy(tuple(joules), tuple(seconds), calls, tuple(reader.domains), str(where))
