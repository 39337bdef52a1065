"""Where a diffusion or flow model stands: the log signal-to-noise ratio of a timestep.

Schedules are indexed by it and not by a step number, so that one plan serves any sampler and any number of steps. With data weighted
``alpha`` and noise ``sigma``, ``log_snr = 2 log(alpha / sigma)``: it rises while sampling, from noise to data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from offramp.core.errors import InvalidInput

LIMIT = 20.0
"""Log-SNRs are held within this of zero: pure noise and clean data would be infinite."""


@runtime_checkable
class NoiseScale(Protocol):
    """From a denoiser's timestep argument to the noise level."""

    def log_snr(self, timesteps: Tensor) -> Tensor:
        """``[B]`` float64 on the timesteps' device, in [-20, 20], from the timesteps ``[B]`` that the model is called with."""
        ...


@dataclass(frozen=True)
class VariancePreserving:
    """``alpha^2 + sigma^2 = 1`` with a table over the training timesteps (DDPM and what samples its models).

    Fractional timesteps, which some samplers use, are interpolated linearly in log-SNR.

    Attributes:
        levels: log-SNR at timesteps 0, 1, ...: falling.
    """

    levels: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.levels) < 2 or any(not b <= a for a, b in zip(self.levels, self.levels[1:], strict=False)):
            raise InvalidInput("levels must be at least two log-SNRs that do not rise with the timestep.")

    @classmethod
    def from_alphas(cls, alphas_cumprod: Tensor) -> VariancePreserving:
        """From the products of ``1 - beta`` at every training timestep, ``[T]`` in [0, 1]: ``alpha^2`` of each."""
        kept = alphas_cumprod.double().cpu()
        return cls(tuple((kept.log() - (1 - kept).log()).clamp(-LIMIT, LIMIT).tolist()))

    @cached_property
    def _table(self) -> Tensor:
        with torch.inference_mode(False):  # it outlives the mode that it is first asked for in
            return torch.tensor(self.levels, dtype=torch.float64)

    def log_snr(self, timesteps: Tensor) -> Tensor:
        table = self._table.to(timesteps.device)
        place = timesteps.double().clamp(0, len(self.levels) - 1)
        low = place.floor().long()
        high = (low + 1).clamp_max(len(self.levels) - 1)
        return torch.lerp(table[low], table[high], place - low)


@dataclass(frozen=True)
class FlowMatching:
    """``alpha = 1 - sigma`` with ``sigma = timestep / full`` (rectified flow).

    Attributes:
        full: the timestep of pure noise, above 0: 1000 for diffusers' schedulers, 1 for models that are called with sigma itself.
    """

    full: float = 1000.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.full) and self.full > 0):
            raise InvalidInput(f"full is the timestep of pure noise, above 0; got {self.full}.")

    def log_snr(self, timesteps: Tensor) -> Tensor:
        sigma = (timesteps.double() / self.full).clamp(0, 1)
        return (2 * ((1 - sigma).log() - sigma.log())).clamp(-LIMIT, LIMIT)


@dataclass(frozen=True)
class LogSigma:
    """``alpha = 1`` and the timestep is ``scale * log(sigma)`` (Karras et al. 2022, section 5: ``c_noise``, scale 1/4).

    Attributes:
        scale: factor on the logarithm, above 0.
    """

    scale: float = 0.25

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise InvalidInput(f"scale must be above 0, got {self.scale}.")

    def log_snr(self, timesteps: Tensor) -> Tensor:
        return (-2 * timesteps.double() / self.scale).clamp(-LIMIT, LIMIT)


def noise_share(log_snr: float) -> float:
    """``sigma / (alpha + sigma)`` in [0, 1]: the noise level as a bounded coordinate, which in a rectified flow is sigma itself."""
    return 1 / (1 + math.exp(log_snr / 2))
