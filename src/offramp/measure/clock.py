"""The clock: medians over synchronised repeats, several callables timed in turn, and what machine this is."""

from __future__ import annotations

import datetime
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from offramp.core.certificate import Estimate
from offramp.core.errors import InvalidInput


@dataclass(frozen=True)
class Timing:
    """Times of one callable.

    Attributes:
        samples_ms: one number per repeat, in the order they were taken, warm-up excluded.
        warmup: calls made before the first sample.
        calls: calls per sample; the samples are per call.
        device: what ran, e.g. ``"cpu"`` or ``"cuda:0"``.
        clock: ``"host"`` (wall clock around a synchronised call, the host's loop included) or ``"events"`` (device time only).
    """

    samples_ms: tuple[float, ...]
    warmup: int
    calls: int
    device: str
    clock: str

    @property
    def median_ms(self) -> float:
        return quantile(self.samples_ms, 0.5)

    @property
    def p95_ms(self) -> float:
        return quantile(self.samples_ms, 0.95)

    @property
    def min_ms(self) -> float:
        return min(self.samples_ms)

    def to_dict(self) -> dict[str, Any]:
        """JSON data, raw samples included."""
        return {
            "median_ms": self.median_ms,
            "p95_ms": self.p95_ms,
            "min_ms": self.min_ms,
            "samples_ms": list(self.samples_ms),
            "warmup": self.warmup,
            "calls": self.calls,
            "device": self.device,
            "clock": self.clock,
        }

    def __str__(self) -> str:
        taken = f"{len(self.samples_ms)} samples on {self.device} ({self.clock} clock)"
        return f"{self.median_ms:.4g} ms median, {self.p95_ms:.4g} ms p95, {taken}"


@dataclass(frozen=True)
class Comparison:
    """Several callables timed in turn.

    Attributes:
        timings: by name.
        reference: the name that ratios divide by.
        ratios: time over the reference's time *of the same round*: median with a distribution-free interval. Below 1 is faster.
    """

    timings: Mapping[str, Timing]
    reference: str
    ratios: Mapping[str, Estimate]

    def to_dict(self) -> dict[str, Any]:
        """JSON data, raw samples included."""
        return {
            "reference": self.reference,
            "timings": {name: t.to_dict() for name, t in self.timings.items()},
            "ratios": {name: [e.value, e.low, e.high, e.level] for name, e in self.ratios.items()},
        }


def quantile(values: tuple[float, ...] | list[float], q: float) -> float:
    """Quantile by linear interpolation between order statistics.

    Args:
        values: at least one number.
        q: in [0, 1].
    """
    if not values or not 0 <= q <= 1:
        raise InvalidInput(f"A quantile needs values and q in [0, 1], got {len(values)} values and q={q}.")
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def median_interval(values: tuple[float, ...] | list[float], level: float = 0.95) -> Estimate:
    """Median with the order-statistic interval: exact whatever the distribution, as the count below it is Binomial(n, 1/2).

    With too few values for ``level`` (five or fewer at 0.95) the interval is the range and its ``level`` is what that covers.
    """
    if not values or not 0 < level < 1:
        raise InvalidInput(f"An interval needs values and a level in (0, 1), got {len(values)} values and level={level}.")
    ordered = sorted(values)
    count = len(ordered)
    tail, below, cut = 0.0, 0.0, 0
    for r in range(count // 2):
        # P(count below the median <= r): dropping r + 1 values on each side loses twice that.
        tail += math.exp(math.lgamma(count + 1) - math.lgamma(r + 1) - math.lgamma(count - r + 1) - count * math.log(2))
        if 2 * tail > 1 - level:
            break
        below, cut = tail, r
    covered = 1 - 2 * below if below else 1 - 2.0 ** (1 - count)
    return Estimate(quantile(ordered, 0.5), ordered[cut], ordered[count - 1 - cut], covered)


def _sampler(fn: Callable[[], Any], device: torch.device, calls: int, events: bool) -> Callable[[], float]:
    """One sample in milliseconds per call."""

    def host() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter_ns()
        for _ in range(calls):
            fn()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter_ns() - start) / 1e6 / calls

    def on_device() -> float:
        with torch.cuda.device(device):
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize(device)
            first.record()
            for _ in range(calls):
                fn()
            last.record()
            torch.cuda.synchronize(device)
            return float(first.elapsed_time(last)) / calls

    return on_device if events else host


def _settings(warmup: int, repeats: int, calls: int, device: torch.device | str, events: bool) -> torch.device:
    if warmup < 0 or repeats < 1 or calls < 1:
        raise InvalidInput(f"warmup must be >= 0, repeats and calls >= 1, got {warmup}, {repeats} and {calls}.")
    where = torch.device(device)
    if where.type not in ("cpu", "cuda"):
        raise InvalidInput(f"Only cpu and cuda devices can be timed, got {where}.")
    if where.type == "cuda" and not torch.cuda.is_available():
        raise InvalidInput(f"device={where} was given, but torch sees no CUDA device on this machine.")
    if events and where.type != "cuda":
        raise InvalidInput(f"events=True reads CUDA events, which {where} does not have; leave it False.")
    return where


def measure(
    fn: Callable[[], Any], *, warmup: int = 10, repeats: int = 50, device: torch.device | str = "cpu", calls: int = 1, events: bool = False
) -> Timing:
    """Time a callable.

    On CUDA the device is synchronised before and after every sample, so a sample holds the whole call, the host's loop
    included. That is what a user waits for, and what speed-ups should be quoted from.

    Args:
        fn: called without arguments; its inputs should already be on the device.
        warmup: calls before the first sample, >= 0.
        repeats: samples, >= 1.
        device: where ``fn`` runs.
        calls: calls per sample, >= 1; more than one for calls shorter than the clock resolves.
        events: on CUDA, time with events instead: device time from the first to the last kernel.

    Raises:
        InvalidInput: a count is out of range, or the device is missing.
    """
    where = _settings(warmup, repeats, calls, device, events)
    sample = _sampler(fn, where, calls, events)
    for _ in range(warmup):
        fn()
    return Timing(tuple(sample() for _ in range(repeats)), warmup, calls, str(where), "events" if events else "host")


def compare(
    functions: Mapping[str, Callable[[], Any]],
    *,
    reference: str | None = None,
    warmup: int = 10,
    repeats: int = 50,
    device: torch.device | str = "cpu",
    calls: int = 1,
    events: bool = False,
    level: float = 0.95,
) -> Comparison:
    """Time several callables in turn, one sample of each per round, so that drift of the machine hits all alike.

    Every second round runs in reverse order (A B, B A, A B ...), so that no callable always inherits the same cache state.
    Ratios are taken within a round.

    Args:
        functions: by name, at least one.
        reference: the name to divide by; the first by default.
        warmup: calls of each before the first round, >= 0.
        repeats: rounds, >= 1.
        device: where the callables run.
        calls: calls per sample, >= 1.
        events: on CUDA, device time only; see `measure`.
        level: of the ratios' intervals.

    Raises:
        InvalidInput: no callables, an unknown reference, or settings that `measure` refuses.
    """
    names = list(functions)
    base = reference if reference is not None else (names[0] if names else "")
    if base not in functions:
        raise InvalidInput(f"reference must be one of {names}, got {base!r}.")
    where = _settings(warmup, repeats, calls, device, events)
    samplers = {name: _sampler(fn, where, calls, events) for name, fn in functions.items()}
    for fn in functions.values():
        for _ in range(warmup):
            fn()
    samples: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats):
        for name in names if turn % 2 == 0 else reversed(names):
            samples[name].append(samplers[name]())
    timings = {n: Timing(tuple(s), warmup, calls, str(where), "events" if events else "host") for n, s in samples.items()}
    ratios = {}
    for name in names:
        # max(): a clock tick of 0 would divide by zero; the smallest tick is 1 ns.
        paired = [a / max(b, 1e-6) for a, b in zip(samples[name], samples[base], strict=True)]
        ratios[name] = median_interval(paired, level)
    return Comparison(timings, base, ratios)


def _git(*args: str) -> str | None:
    """Output of git in the folder of this source file, or ``None`` where git or a checkout is missing."""
    here = Path(__file__).resolve()
    try:
        done = subprocess.run(["git", *args], cwd=here.parent, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What a measurement depends on, as JSON data: commit, versions, device, threads, date.

    The commit is given only when this very source file is tracked there: an installed copy inside some other project's
    checkout has none. Where the source travels without its repository, the variable ``OFFRAMP_COMMIT`` names it; it goes before
    what a repository around says, and ``uncommitted_changes`` is then unknown (``None``).

    Args:
        device: what the measurement ran on; CUDA is asked for its name only if this is a CUDA device.
    """
    where = torch.device(device)
    named = os.environ.get("OFFRAMP_COMMIT")
    commit = _git("rev-parse", "HEAD") if not named and _git("ls-files", "--error-unmatch", Path(__file__).name) else None
    versions: dict[str, str] = {"python": platform.python_version()}
    for package in ("offramp", "torch", "numpy", "transformers", "timm", "diffusers", "onnxruntime"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    out: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": named or commit,
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")) if commit else None,
        "versions": versions,
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "device": str(where),
    }
    if where.type == "cuda" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(where)
        out["device_name"] = properties.name
        out["device_memory_bytes"] = properties.total_memory
        out["cuda"] = torch.version.cuda
        out["cudnn"] = torch.backends.cudnn.version()
    else:
        out["device_name"] = out["cpu"]
    return out
