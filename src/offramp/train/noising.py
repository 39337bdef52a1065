"""What a denoiser learns: how images become noise, at which levels, what is to be predicted, and batches of it for `fit`.

Shapes: ``B`` rows, ``N`` images.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

from offramp.core.errors import InvalidInput
from offramp.core.noise import FlowMatching, NoiseScale, VariancePreserving
from offramp.policies.denoising import bin_of


class Process(ABC):
    """How an image becomes noise, at which levels a model learns, and what it is to predict.

    Attributes:
        noise: from the model's timestep to log-SNR.
    """

    @property
    @abstractmethod
    def noise(self) -> NoiseScale:
        """From the model's timestep to log-SNR."""

    @abstractmethod
    def times(self, count: int) -> Tensor:
        """Timesteps ``[count]`` to learn at, drawn from the global generator of the CPU."""

    @abstractmethod
    def noised(self, clean: Tensor, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """What the model sees and what it is to predict, both ``[B, ...]``, of images in about [-1, 1] and standard normal noise."""


@dataclass(frozen=True)
class RectifiedFlow(Process):
    """``x = (1 - s) image + s noise``, and the model predicts the velocity ``noise - image`` (Liu et al. 2023; diffusers' sign).

    Levels are drawn as ``s = sigmoid(mean + spread * normal)`` (Esser et al. 2024, section 3.1).

    Attributes:
        full: the timestep of pure noise; as `FlowMatching`.
        mean: above 0 draws more noise.
        spread: > 0, or ``None`` for uniform levels.
    """

    full: float = 1000.0
    mean: float = 0.0
    spread: float | None = 1.0

    def __post_init__(self) -> None:
        if self.spread is not None and not self.spread > 0:
            raise InvalidInput(f"spread must be > 0, or None for uniform levels; got {self.spread}.")
        FlowMatching(self.full)

    @property
    def noise(self) -> FlowMatching:
        return FlowMatching(self.full)

    def times(self, count: int) -> Tensor:
        share = torch.rand(count) if self.spread is None else torch.sigmoid(self.mean + self.spread * torch.randn(count))
        return share * self.full

    def noised(self, clean: Tensor, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        share = _beside(times / self.full, clean)
        return torch.lerp(clean, noise, share), noise - clean


@dataclass(frozen=True)
class _Preserving(Process):
    """``x = alpha image + sigma noise`` with ``alpha^2 + sigma^2 = 1``, at timesteps drawn evenly from those of training.

    Attributes:
        scale: log-SNR at every timestep.
    """

    scale: VariancePreserving

    @property
    def noise(self) -> VariancePreserving:
        return self.scale

    def times(self, count: int) -> Tensor:
        return torch.randint(len(self.scale.levels), (count,))

    def _weights(self, clean: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        level = self.scale.log_snr(times)
        return tuple(_beside(torch.sigmoid(v).sqrt().to(clean.dtype), clean) for v in (level, -level))  # type: ignore[return-value]


@dataclass(frozen=True)
class NoisePrediction(_Preserving):
    """The model predicts the noise (Ho et al. 2020, equation 14)."""

    def noised(self, clean: Tensor, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self._weights(clean, times)
        return alpha * clean + sigma * noise, noise


@dataclass(frozen=True)
class VelocityPrediction(_Preserving):
    """The model predicts ``alpha noise - sigma image`` (Salimans and Ho 2022, appendix D)."""

    def noised(self, clean: Tensor, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self._weights(clean, times)
        return alpha * clean + sigma * noise, alpha * noise - sigma * clean


def linear_betas(steps: int = 1000, first: float = 1e-4, last: float = 0.02) -> VariancePreserving:
    """The noise levels of DDPM (Ho et al. 2020, section 4), which are the defaults of diffusers' schedulers."""
    betas = torch.linspace(first, last, steps, dtype=torch.float64)
    return VariancePreserving.from_alphas((1 - betas).cumprod(0))


def _beside(values: Tensor, images: Tensor) -> Tensor:
    return values.view(-1, *[1] * (images.ndim - 1))


# ---- batches -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Noising:
    """Makes a batch of images a batch of a denoiser: the ``collate_fn`` of a ``DataLoader`` that yields ``(image, class)`` or images.

    Attributes:
        process: how, and what is to be predicted.
        sample: name of the model's noisy input.
        timestep: name of its timestep.
        label: name of its class label, or ``None`` for a model without.
        no_class: the label that stands for no class, with which guidance compares (Ho and Salimans 2022); ``None`` drops none.
        drop: share of the labels that become it, in [0, 1].
        flip: mirror half of the images.
        edges: ascending log-SNRs. If given, all rows of a batch have levels of one bin between them: that of a level drawn by ``process``.
    """

    process: Process
    sample: str = "sample"
    timestep: str = "timestep"
    label: str | None = None
    no_class: int | None = None
    drop: float = 0.1
    flip: bool = False
    edges: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.drop <= 1:
            raise InvalidInput(f"drop is a share of the labels in [0, 1], got {self.drop}.")
        if list(self.edges) != sorted(set(self.edges)):
            raise InvalidInput(f"edges must be ascending log-SNRs, got {self.edges}.")

    def __call__(self, items: Any) -> dict[str, Tensor]:
        images, classes = _stacked(items)
        if self.label is not None and classes is None:
            raise InvalidInput(f"The model's {self.label!r} needs a class for every image, but the data set yields images alone.")
        rows = len(images)
        if self.flip:
            images = torch.where(_beside(torch.rand(rows) < 0.5, images), images.flip(-1), images)
        times = self._times(rows)
        seen, target = self.process.noised(images, torch.randn_like(images), times)
        batch = {self.sample: seen, self.timestep: times, "labels": target}
        if self.label is not None and classes is not None:
            dropped = torch.rand(rows) < (self.drop if self.no_class is not None else 0)
            batch[self.label] = classes.masked_fill(dropped, self.no_class or 0)
        return batch

    def _times(self, rows: int) -> Tensor:
        drawn = self.process.times(rows)
        if not self.edges:
            return drawn
        wanted = bin_of(float(self.process.noise.log_snr(drawn[:1])), self.edges)
        edges = torch.tensor(self.edges, dtype=torch.float64)
        found: list[Tensor] = []
        while sum(map(len, found)) < rows:  # ends: the bin was drawn before and so has a share of the levels
            found.append(drawn[torch.bucketize(self.process.noise.log_snr(drawn), edges, right=True) == wanted])
            drawn = self.process.times(rows * (len(edges) + 1))
        return torch.cat(found)[:rows]


def _stacked(items: Any) -> tuple[Tensor, Tensor | None]:
    """Images ``[B, ...]`` and classes ``[B]`` from what a data set yields."""
    if isinstance(items, tuple):
        return items[0], items[1]
    if items and isinstance(items[0], Tensor):
        return torch.stack(list(items)), None
    try:
        return torch.stack([i[0] for i in items]), torch.as_tensor([int(i[1]) for i in items])
    except (TypeError, IndexError, ValueError) as error:
        raise InvalidInput("A data set of images must yield image tensors, or (image tensor, class).") from error


class _Images(Dataset[Any]):
    """Images held in memory; a batch is taken at once."""

    def __init__(self, images: Tensor, classes: Tensor | None) -> None:
        self.images, self.classes = images, classes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        return self.images[index] if self.classes is None else (self.images[index], self.classes[index])

    def __getitems__(self, indices: Sequence[int]) -> Any:
        at = torch.as_tensor(indices)
        return self.images[at], None if self.classes is None else self.classes[at]


def noisy_loader(
    images: Tensor,
    noising: Noising,
    batch_size: int,
    *,
    classes: Tensor | None = None,
    shuffle: bool = True,
    draws: int | None = None,
    workers: int = 0,
) -> DataLoader[dict[str, Tensor]]:
    """A loader for `fit` of images held in memory: every batch has new noise. The last rows of an epoch that fill no batch are left out.

    Args:
        images: ``[N, C, H, W]`` in about [-1, 1].
        noising: what becomes of them.
        batch_size: B, at most N.
        classes: int64 ``[N]``.
        shuffle: another order in every epoch.
        draws: rows of an epoch, drawn with replacement, for long epochs of few images; by default every image once.
        workers: processes that make batches.

    Raises:
        InvalidInput: there are fewer images than a batch, or another number of classes.
    """
    if not 1 <= batch_size <= len(images) or (classes is not None and len(classes) != len(images)):
        given = "" if classes is None else f" and {len(classes)} classes"
        raise InvalidInput(f"batch_size must be from 1 to the number of images; got {batch_size} with {len(images)} images{given}.")
    held = _Images(images, classes)
    sampler = None if draws is None else RandomSampler(held, replacement=True, num_samples=draws)
    return DataLoader(
        held, batch_size, shuffle=shuffle and sampler is None, sampler=sampler, drop_last=True, collate_fn=noising, num_workers=workers,
        persistent_workers=workers > 0, pin_memory=torch.cuda.is_available(),
    )  # fmt: skip


__all__ = ["NoisePrediction", "Noising", "Process", "RectifiedFlow", "VelocityPrediction", "linear_betas", "noisy_loader"]
