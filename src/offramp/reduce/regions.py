"""Which tokens of an image a denoiser computes at a step; the others keep their last output (region-adaptive sampling, Liu et al. 2025).

`Regions` is the rule, as data: at which steps everything is computed, how many tokens are computed at the others, and which. Every row
takes the tokens that are best for itself and all take equally many, so that a step has one shape and a row does not depend on its batch
mates.
`offramp.engines.diffusion.regions` carries it out.

Shapes: ``B`` rows, ``C`` channels, ``H x W`` pixels in ``h x w`` tokens, ``N = h w`` of them, ``k`` that are computed.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from offramp.core.errors import InvalidInput
from offramp.core.noise import noise_share


class Measure(ABC):
    """What tells tokens apart: a number per pixel of a denoiser's last output.

    The update of a sampler's step is the output times the step in noise level. That factor is the same for all tokens of a row and changes
    no ranking, so the output itself is measured: what a step of zero length (a solver that evaluates twice) would hide is then still there.
    """

    @abstractmethod
    def of(self, output: Tensor) -> Tensor:
        """``[B, H, W]`` float32, not negative, from an output ``[B, C, H, W]``."""


@dataclass(frozen=True)
class ChannelSpread(Measure):
    """Standard deviation over the channels (the paper's section 3.3)."""

    def of(self, output: Tensor) -> Tensor:
        if output.shape[1] < 2:
            raise InvalidInput("ChannelSpread needs an output of two channels at least, and this one has one: use ChannelNorm().")
        return output.float().std(1, correction=0)


@dataclass(frozen=True)
class ChannelNorm(Measure):
    """Euclidean norm over the channels (the released code's other choice)."""

    def of(self, output: Tensor) -> Tensor:
        return output.float().square().sum(1).sqrt()


@dataclass(frozen=True)
class AtSteps:
    """Steps at which every token is computed, by number from 0. The paper's, of 30: 12 and 22.

    Attributes:
        steps: each at least 0.
    """

    steps: tuple[int, ...] = (12, 22)

    def __post_init__(self) -> None:
        if any(s < 0 for s in self.steps):
            raise InvalidInput(f"steps are numbers from 0, got {self.steps}.")

    def due(self, step: int, before: float, now: float) -> bool:
        """Whether a step is one of them."""
        return step in self.steps


@dataclass(frozen=True)
class AtLevels:
    """Noise levels at which every token is computed: at the first step at or past each of them, whatever the sampler and number of steps.

    Attributes:
        log_snr: levels.
    """

    log_snr: tuple[float, ...]

    def __post_init__(self) -> None:
        if not all(math.isfinite(x) for x in self.log_snr):
            raise InvalidInput(f"log_snr must be finite numbers, got {self.log_snr}.")

    def due(self, step: int, before: float, now: float) -> bool:
        """Whether a step from the log-SNR ``before`` to ``now`` reaches one."""
        return any(before < level <= now for level in self.log_snr)


Resets = AtSteps | AtLevels


@dataclass(frozen=True)
class Regions:
    """Which tokens are computed at which steps.

    A token's priority is ``f * exp(direction * staleness * s)``, with ``s`` the steps since it was last computed and ``f`` its measure, or
    one over it. The ``k`` tokens of highest priority are computed.

    Attributes:
        ratio: share of the tokens that are computed at steps that are not dense, in (0, 1]; 1 computes everything. Paper 0.5.
        measure: see `Measure`.
        low: whether tokens of small measure are in focus, as in the released code (``high_ratio = 1``); else those of large measure.
        staleness: kappa, weight of the steps that a token has waited, at least 0. Paper 0.1.
        direction: 1 = waiting raises a token's priority, so that none waits forever: what the paper describes. -1 = it lowers it, as in
            the released code, where the factor is put on a measure of which the smallest are computed; what waits then keeps waiting.
        first: dense steps at the start of a trajectory, at least 1. Paper 4.
        resets: dense steps in between.
        last: whether the last step is dense, where it is known which it is. Not in the paper.
        change: what the ratio gains from pure noise to clean data, linearly in the noise share `offramp.core.noise.noise_share` and around
            ``ratio`` in the middle; the sum is held within (0, 1]. Negative computes fewer tokens towards the end. Paper 0.
        multiple: the number of tokens is rounded up to a multiple of this, at least 1. Paper 64.

    Raises:
        InvalidInput: a number is out of its range.
    """

    ratio: float = 0.5
    measure: Measure = field(default_factory=ChannelSpread)
    low: bool = True
    staleness: float = 0.1
    direction: int = 1
    first: int = 4
    resets: Resets = field(default_factory=AtSteps)
    last: bool = False
    change: float = 0.0
    multiple: int = 8

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise InvalidInput(f"ratio is a share of the tokens in (0, 1], got {self.ratio}.")
        if not (math.isfinite(self.staleness) and self.staleness >= 0):
            raise InvalidInput(f"staleness must be at least 0, got {self.staleness}; its sign is `direction`.")
        if self.direction not in (1, -1):
            raise InvalidInput(f"direction must be 1 (waiting raises priority) or -1 (lowers it), got {self.direction}.")
        if self.first < 1 or self.multiple < 1:
            raise InvalidInput(f"first and multiple must be at least 1, got {self.first} and {self.multiple}.")
        if not math.isfinite(self.change):
            raise InvalidInput(f"change must be finite, got {self.change}.")
        for given, kinds, what in ((self.measure, Measure, "measure"), (self.resets, Resets, "resets")):
            if not isinstance(given, kinds):
                raise InvalidInput(f"{what} must be a part of offramp.reduce.regions, such as ChannelSpread() or AtSteps(); got {given!r}.")

    def must(self, step: int, before: float, now: float, final: bool) -> str:
        """Why a step of a row is dense, or ``""`` where some tokens will do.

        Args:
            step: of the row's trajectory, from 0.
            before: log-SNR of the row's last step; minus infinity at the first.
            now: of this one.
            final: whether it is known to be the last.
        """
        if step < self.first:
            return "first"
        if self.last and final:
            return "last"
        return "reset" if self.resets.due(step, before, now) else ""

    def count(self, tokens: int, log_snr: float) -> int:
        """How many of ``tokens`` are computed at a noise level, from 1 to all of them."""
        share = self.ratio + self.change * (0.5 - noise_share(log_snr))
        wanted = math.ceil(min(max(share, 0.0), 1.0) * tokens / self.multiple - 1e-9) * self.multiple
        return min(max(wanted, self.multiple), tokens)

    def focus(self, output: Tensor, grid: tuple[int, int]) -> Tensor:
        """Logarithm of every token's ``f``, ``[B, N]`` float32, the measure averaged over the token's pixels.

        Args:
            output: ``[B, C, H, W]`` of the last step, channels of a learned variance left out.
            grid: ``(h, w)``, which divide ``(H, W)``.
        """
        patch = (output.shape[2] // grid[0], output.shape[3] // grid[1])
        mean = nn.functional.avg_pool2d(self.measure.of(output)[:, None], patch).flatten(1)
        logarithm = mean.clamp_min(torch.finfo(torch.float32).tiny).log()
        return -logarithm if self.low else logarithm

    def select(self, focus: Tensor, waited: Tensor, k: int) -> Tensor:
        """The tokens to compute: int64 ``[B, k]``, ascending in each row; of equals the first are taken.

        Args:
            focus: ``[B, N]`` from `focus`.
            waited: ``[B, N]``, steps since each token was last computed.
            k: from 1 to ``N``.
        """
        priority = focus + self.direction * self.staleness * waited.to(focus.dtype)
        # A sort is the same whatever the other rows are, also among equals, which a selection of the largest need not be.
        return priority.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(1).values


def token_grid(size: Sequence[int], tokens: int) -> tuple[int, int]:
    """``(h, w)`` of square tokens that cover an image of ``(H, W)`` pixels.

    Raises:
        InvalidInput: no square tokens of whole pixels do.
    """
    height, width = size
    side = math.isqrt(height * width // tokens) if tokens > 0 else 0
    if side < 1 or height % side or width % side or (height // side) * (width // side) != tokens:
        raise InvalidInput(f"{tokens} tokens do not cover an image of {height} x {width} as squares of whole pixels.")
    return height // side, width // side


PARTS: dict[str, type] = {c.__name__: c for c in (Regions, ChannelSpread, ChannelNorm, AtSteps, AtLevels)}
"""What says which tokens are computed, by name: what a saved plan may name."""
