"""Samples to calibrate a diffusion method with: the same noise and conditioning at every run, in batches, some of them held out.

A sampler that adds noise (DDPM, ancestral) draws it from the generator it is given, or from torch's own, which is what some pipelines leave
it to. Here both begin at the same place whenever a batch is run, so that two settings differ by what they skip and by nothing else.

Shapes: ``N`` samples.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offramp.core.errors import InvalidInput
from offramp.engines.diffusion.denoise import Denoiser
from offramp.engines.diffusion.model import DiffusionModel
from offramp.engines.diffusion.pipeline import sample
from offramp.engines.diffusion.report import Report
from offramp.policies.skips import FewerSteps


@dataclass(frozen=True)
class Ran:
    """Images ``[N, ...]`` and cost ``[N]`` as a share of the full model's with all steps, and a report of each batch."""

    images: Tensor
    cost: Tensor
    reports: tuple[Report, ...]


@contextmanager
def drawing_from(seed: int, batch: int, device: torch.device) -> Iterator[None]:
    """Let everything that is drawn inside begin at one place; afterwards torch's own generators are as they were before.

    Args:
        seed: of the samples.
        batch: number of the batch, or of its first row.
        device: where the denoiser is; its generator is set and the CPU's.
    """
    # Another seed than that of the noise which samples begin with: the same numbers twice in a trajectory are no noise.
    drawn = int.from_bytes(hashlib.sha256(f"steps {seed} {batch}".encode()).digest()[:7], "big")
    on_cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_cuda else []):
        torch.default_generator.manual_seed(drawn)
        if on_cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(drawn)
        yield


class Samples(ABC):
    """Samples to calibrate with: the same noise and conditioning at every run.

    Attributes:
        guidance: for the record.
        asked: steps of the full sampler.
    """

    guidance: float = 1.0
    asked: int = 0

    @abstractmethod
    def batches(self, held_out: bool) -> Iterable[Callable[[Denoiser, float], Tensor]]:
        """For each batch of samples a function that runs it, with a share of the steps, and gives its images."""

    def each(self, make: Callable[[], Denoiser], held_out: bool, share: float = 1.0) -> Iterator[tuple[Tensor, Tensor, Report]]:
        """Run batch after batch: images ``[B, ...]`` float32 where they were made, cost ``[B]`` and the report of each."""
        taken = FewerSteps(share).steps(self.asked) / self.asked
        for batch in self.batches(held_out):
            denoiser = make()
            got = batch(denoiser, share)
            # Guidance branches follow one another, in one call or in several.
            yield got.float(), denoiser.report.row_cost.reshape(-1, len(got)).mean(0) * taken, denoiser.report

    def run(self, make: Callable[[], Denoiser], held_out: bool, share: float = 1.0) -> Ran:
        """Run all batches, each with a denoiser of its own."""
        images, costs, reports = zip(*self.each(make, held_out, share), strict=True)
        return Ran(torch.cat([i.cpu() for i in images]), torch.cat(costs), reports)


class FromNoise(Samples):
    """Samples of a denoiser and a scheduler.

    Args:
        scheduler: of diffusers' shape.
        noise: ``[N, ...]`` standard normal.
        steps: of the scheduler.
        batch_size: samples at a time.
        chosen: rows of the noise to choose by.
        held_out: rows to measure with what was chosen.
        options: ``inputs`` and ``unconditional`` of `sample`; tensors with a row for each of the noise are divided as it is.
        guidance: see `sample`.
        seed: of what the scheduler draws on the way.
    """

    def __init__(
        self, scheduler: Any, noise: Tensor, steps: int, batch_size: int, chosen: range, held_out: range, options: Mapping[str, Any],
        guidance: float, seed: int = 0,
    ) -> None:  # fmt: skip
        self.scheduler, self.noise, self.asked, self.size, self.seed = scheduler, noise, steps, batch_size, seed
        self.rows = {False: chosen, True: held_out}
        self.options, self.guidance = options, guidance

    def batches(self, held_out: bool) -> Iterable[Callable[[Denoiser, float], Tensor]]:
        rows = self.rows[held_out]
        for start in range(rows.start, rows.stop, self.size):
            yield self._runs(slice(start, min(start + self.size, rows.stop)))

    def _runs(self, rows: slice) -> Callable[[Denoiser, float], Tensor]:
        def run(denoiser: Denoiser, share: float) -> Tensor:
            given: dict[str, Any] = {
                name: {k: v[rows] if isinstance(v, Tensor) and v.ndim and len(v) == len(self.noise) else v for k, v in part.items()}
                for name, part in self.options.items()
                if part is not None
            }
            steps = FewerSteps(share).steps(self.asked)
            with drawing_from(self.seed, rows.start, self.noise.device):
                return sample(denoiser, copy.deepcopy(self.scheduler), self.noise[rows], steps=steps, guidance=self.guidance, **given)

        return run


class FromCalls(Samples):
    """Calls of a pipeline; those that are held out are the same calls with other noise.

    Args:
        net: on a pipeline.
        calls: keyword arguments of the pipeline, one mapping for each call.
        steps: of the sampler; by default what the calls say.
        seed: of the noise.
        endless: begin with the first call again, and other noise, after the last; whoever reads the batches stops.
    """

    def __init__(
        self, net: DiffusionModel, calls: Sequence[Mapping[str, Any]], steps: int | None, seed: int, *, endless: bool = False
    ) -> None:
        if isinstance(calls, Mapping) or not all(isinstance(c, Mapping) for c in calls):
            raise InvalidInput("calls must be a list of mappings, the keyword arguments of one call each: calls=[{...}].")
        if any("generator" in c for c in calls):
            raise InvalidInput("Calls to calibrate with take their noise from seed=...; leave generator out of them.")
        names = inspect.signature(type(net.pipe).__call__).parameters
        if not calls or "generator" not in names or "num_inference_steps" not in names:
            raise InvalidInput(
                f"calls must hold one call or more of a {type(net.pipe).__name__} that takes generator and num_inference_steps."
            )
        more = {"output_type": "np"} if "output_type" in names else {}
        asked = {int(steps or c.get("num_inference_steps", names["num_inference_steps"].default)) for c in calls}
        if len(asked) != 1:
            raise InvalidInput(f"All calls must take one number of steps, got {sorted(asked)}.")
        self.asked = asked.pop()
        scales = [float(c.get("guidance_scale", getattr(names.get("guidance_scale"), "default", 1.0))) for c in calls]
        self.net, self.seed, self.guidance, self.endless = net, seed, scales[0], endless
        self.calls = [{**more, **c, "num_inference_steps": self.asked} for c in calls]

    def batches(self, held_out: bool) -> Iterable[Callable[[Denoiser, float], Tensor]]:
        for turn in itertools.count() if self.endless else (0,):
            for k, call in enumerate(self.calls):
                yield self._runs(call, self.seed + k + len(self.calls) * (2 * turn + held_out))

    def _runs(self, call: Mapping[str, Any], seed: int) -> Callable[[Denoiser, float], Tensor]:
        def run(denoiser: Denoiser, share: float) -> Tensor:
            view = self.net.around(denoiser, FewerSteps(share).steps)
            with drawing_from(seed, 0, self.net.net.device):
                got = view(**call, generator=torch.Generator().manual_seed(seed)).images
            if isinstance(got, Tensor):
                return got
            images = torch.as_tensor(np.stack([np.asarray(image) for image in got]))
            return images.movedim(-1, 1) if images.ndim == 4 else images  # arrays and pictures have their channels last

        return run


__all__ = ["FromCalls", "FromNoise", "Ran", "Samples"]
