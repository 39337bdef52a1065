"""When a denoiser's row may skip: signals, guards, and the decision points of a plan.

A signal gives a score per row, higher = readier to skip, and a point fires at ``score >= threshold``. *Scheduled* signals are known on the
host before the step and cost no synchronisation; *measured* ones read tensors on the device. Every score depends on its own row alone.

A plan is a tuple of `Point`. ``engines.diffusion.denoise.Denoiser`` carries it out.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from offramp.core.errors import InvalidInput
from offramp.policies.fills import FILLS, Fill, Identity

Place = str | int
"""Where: a module path that the denoiser is cut after; the number of such a place in order (from 0; negative from the end); ``INPUT``
(before everything) or ``OUTPUT`` (the model's own output)."""

INPUT = "input"
OUTPUT = "output"


@dataclass(frozen=True)
class Moment:
    """What is known on the host about the rows of one call before it runs; each list has one entry per row.

    Attributes:
        log_snr: noise level.
        step: calls since the row's trajectory began, 0 at the first.
        branch: which guidance branch the call is.
        keys: a number that a row has whatever its batch mates; 0 unless a signal asks for it (``needs_keys``).
    """

    log_snr: list[float]
    step: list[int]
    branch: int = 0
    keys: list[int] = field(default_factory=list)


class Seen(NamedTuple):
    """What a measured signal may look at, for the rows it is asked about.

    Attributes:
        state: the tensors that the skipped part would continue, at the start of the skip; usually the hidden state alone.
        since: the hidden state at the place that the signal names, or ``None``.
        sample: the noisy input.
    """

    state: tuple[Tensor, ...]
    since: Tensor | None
    sample: Tensor


class Scheduled(ABC):
    """A signal that is known before the step."""

    needs_keys: bool = False

    @abstractmethod
    def known(self, moment: Moment, place: int) -> list[float]:
        """Score of every row at the point that is ``place``-th in the plan."""


class Measured(ABC):
    """A signal that is measured in the step.

    Attributes:
        compares: whether it compares with the last computed step, and so needs one.
        since: a place whose hidden state it reads too.
        reads_head: whether it reads a learned head at the start of the skip.
    """

    compares: bool = True
    since: Place | None = None
    reads_head: bool = False

    def watch(self, seen: Seen) -> tuple[Tensor, ...]:
        """The tensors that are compared, remembered at every computed step."""
        return seen.state

    @abstractmethod
    def score(self, now: tuple[Tensor, ...], reference: tuple[Tensor, ...] | None, log_snr: Tensor, head: Any) -> Tensor:
        """Score ``[R]`` (float32).

        Args:
            now: what ``watch`` gives in this step.
            reference: what it gave in the last computed step of each row, if ``compares``.
            log_snr: noise level ``[R]`` float32.
            head: the learned head, if ``reads_head``.
        """


Signal = Scheduled | Measured


@dataclass(frozen=True)
class NoiseLevel(Scheduled):
    """Minus the log-SNR: with threshold ``-x`` a point fires wherever the log-SNR is at most ``x``, where noise is strong."""

    def known(self, moment: Moment, place: int) -> list[float]:
        return [-x for x in moment.log_snr]


@dataclass(frozen=True)
class NoiseSchedule(Scheduled):
    """1 in some bins of log-SNR and 0 in the others: a schedule of any shape.

    Attributes:
        edges: ascending log-SNRs between the bins; bin ``b`` holds ``edges[b-1] <= log_snr < edges[b]``.
        skip: whether to skip, for each of the ``len(edges) + 1`` bins, noisiest first.
    """

    edges: tuple[float, ...]
    skip: tuple[bool, ...]

    def __post_init__(self) -> None:
        if len(self.skip) != len(self.edges) + 1 or list(self.edges) != sorted(set(self.edges)):
            raise InvalidInput(
                f"{len(self.edges)} ascending edges make {len(self.edges) + 1} bins; got edges {self.edges} and {self.skip}."
            )

    def known(self, moment: Moment, place: int) -> list[float]:
        found = {x: float(self.skip[bin_of(x, self.edges)]) for x in set(moment.log_snr)}  # mostly one level for all rows
        return [found[x] for x in moment.log_snr]


@dataclass(frozen=True)
class Every(Scheduled):
    """0 at every ``n``-th step of a row's trajectory, from its first, and 1 between them.

    Attributes:
        n: the interval, at least 1; 1 never skips.
    """

    n: int

    def __post_init__(self) -> None:
        if self.n < 1:
            raise InvalidInput(f"n must be at least 1, got {self.n}.")

    def known(self, moment: Moment, place: int) -> list[float]:
        return [float(s % self.n != 0) for s in moment.step]


@dataclass(frozen=True)
class Chance(Scheduled):
    """A uniform number in [0, 1) per row and step: the control that a signal must beat. Threshold ``1 - rate`` skips a share ``rate``.

    A row's numbers depend on its first input, its step, the point and the seed, and not on its batch mates.

    Attributes:
        seed: of all draws.
    """

    seed: int = 0
    needs_keys = True

    def known(self, moment: Moment, place: int) -> list[float]:
        keys = np.array([k & _ALL for k in moment.keys], dtype=np.uint64)
        found: list[float] = _uniform(self.seed, keys, np.array(moment.step), place).tolist()
        return found


_ALL = 0xFFFFFFFFFFFFFFFF


def _uniform(*numbers: Any) -> Any:
    """Numbers in [0, 1) from integers, each one or an array of them (SplitMix64, Steele et al. 2014)."""
    state = np.zeros(1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for number in numbers:
            given = number.astype(np.uint64) if isinstance(number, np.ndarray) else np.uint64(number & _ALL)
            state = (state ^ given) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ state >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ state >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
            state = state ^ state >> np.uint64(31)
    return (state >> np.uint64(11)) / float(1 << 53)


def _size(tensor: Tensor) -> Tensor:
    """L1 norm of every row, ``[R]`` float32, in one pass over the tensor."""
    found: Tensor = torch.linalg.vector_norm(tensor.flatten(1), ord=1, dim=1, dtype=torch.float32)
    return found


class _Change(Measured):
    """Minus the relative L1 change since the last computed step, always below 0: with threshold 0 nothing is ever reused."""

    def score(self, now: tuple[Tensor, ...], reference: tuple[Tensor, ...] | None, log_snr: Tensor, head: Any) -> Tensor:
        if reference is None:
            raise InvalidInput(f"{type(self).__name__} compares with the last computed step and was given none.")
        moved = sum(_size(tensor.float() - old) for tensor, old in zip(now, reference, strict=True))
        size = sum(_size(old) for old in reference)
        tiny = torch.finfo(torch.float32).tiny
        return -(moved / size.clamp_min(tiny)).clamp_min(tiny)  # type: ignore[union-attr]


@dataclass(frozen=True)
class StateChange(_Change):
    """How far the state at the point is from that of the row's last computed step."""


@dataclass(frozen=True)
class ResidualChange(_Change):
    """The same for what the blocks between a place and the point added (first-block caching compares the first block's residual).

    Attributes:
        since: the place before those blocks; its state is shaped like the point's.
    """

    since: Place = 0

    def watch(self, seen: Seen) -> tuple[Tensor, ...]:
        if seen.since is None or seen.since.shape != seen.state[0].shape:
            raise InvalidInput(f"ResidualChange needs a state at {self.since!r} shaped like the point's {tuple(seen.state[0].shape)}.")
        return (seen.state[0] - seen.since,)


@dataclass(frozen=True)
class InputChange(_Change):
    """How far the noisy input is from that of the row's last computed step."""

    def watch(self, seen: Seen) -> tuple[Tensor, ...]:
        return (seen.sample,)


@dataclass(frozen=True)
class Uncertainty(Measured):
    """Minus what a learned head at the point says the exit's error is (DeeDiff, Tang et al. 2023, section 3.2)."""

    compares = False
    reads_head = True

    def score(self, now: tuple[Tensor, ...], reference: tuple[Tensor, ...] | None, log_snr: Tensor, head: Any) -> Tensor:
        found: Tensor = head.uncertainty(now[0], log_snr)
        return -found.float()


@dataclass(frozen=True)
class Guard:
    """What limits reuse, whatever the score.

    Attributes:
        max_reuse: steps in a row that may go without computing, at least 0; ``None`` = any number.
        first: steps at the start of a trajectory that are computed, at least 0.
        last: whether the last step is computed, where it is known which it is.
    """

    max_reuse: int | None = 2
    first: int = 1
    last: bool = True

    def __post_init__(self) -> None:
        if (self.max_reuse is not None and self.max_reuse < 0) or self.first < 0:
            raise InvalidInput(f"max_reuse and first must be at least 0, got {self.max_reuse} and {self.first}.")


FREE = Guard(max_reuse=None, first=0, last=False)
"""No limits: what a schedule says is done."""


@dataclass(frozen=True)
class Point:
    """A decision point: at ``at``, a row whose score reaches the threshold goes to ``to`` at once, with the fill.

    Attributes:
        at: where rows are asked.
        to: where those that skip go on: after this module. Later than ``at``.
        fill: what stands for what they skip.
        signal: the score.
        threshold: infinite never fires; the default suits signals that are 0 or 1.
        guard: limits; by default `Guard()` where a measured signal decides about reuse, else none.
    """

    at: Place
    to: Place
    fill: Fill
    signal: Signal
    threshold: float = 0.5
    guard: Guard | None = None

    def __post_init__(self) -> None:
        for given, kind, what in ((self.fill, Fill, "fill"), (self.signal, Signal, "signal")):
            if not isinstance(given, kind):
                raise InvalidInput(f"{what} must be a part of offramp.policies, such as Identity() or StateChange(); got {given!r}.")
        if math.isnan(self.threshold):
            raise InvalidInput("threshold must be a number, got NaN.")

    @cached_property
    def limits(self) -> Guard:
        """The guard that holds."""
        if self.guard is not None:
            return self.guard
        return Guard() if isinstance(self.signal, Measured) and self.remembers else FREE

    @cached_property
    def remembers(self) -> bool:
        """Whether it needs a computed step of the row's trajectory."""
        return self.fill.keeps > 0 or (isinstance(self.signal, Measured) and self.signal.compares)

    @cached_property
    def follows(self) -> bool:
        """Whether it matters which rows computed all of what it may skip: to remember them, or to count the steps since."""
        return self.remembers or self.limits.max_reuse is not None


def bin_of(log_snr: float, edges: Sequence[float]) -> int:
    """Which bin a log-SNR lies in; bin ``b`` holds ``edges[b-1] <= log_snr < edges[b]``."""
    return sum(log_snr >= e for e in edges)


def depth_schedule(edges: Sequence[float], exits: Sequence[Place | None], to: Place = -1, fill: Fill | None = None) -> tuple[Point, ...]:
    """Points that leave at a place by noise level alone (Moon et al. 2024, section 3, with log-SNR for the timestep).

    Args:
        edges: ascending log-SNRs between the bins.
        exits: for each bin, noisiest first, where to leave; ``None`` runs everything.
        to: where to go on; by default after the last place, at the final layers.
        fill: `Identity` by default.
    """
    if len(exits) != len(edges) + 1:
        raise InvalidInput(f"{len(edges)} edges make {len(edges) + 1} bins; got {len(exits)} exits.")
    places = list(dict.fromkeys(e for e in exits if e is not None))
    return tuple(
        Point(place, to, fill or Identity(), NoiseSchedule(tuple(edges), tuple(e is not None and e == place for e in exits)))
        for place in places
    )


SIGNALS: dict[str, type] = {
    c.__name__: c for c in (NoiseLevel, NoiseSchedule, Every, Chance, StateChange, ResidualChange, InputChange, Uncertainty)
}
"""Every signal by name."""

DENOISING_PARTS: dict[str, type] = {**SIGNALS, **FILLS, "Guard": Guard, "Point": Point}
"""Every part of a denoising plan by name: what a saved plan may name."""
