"""Denoisers as text-to-image pipelines have them, of random weights: how fast every training-free system runs on them.

Two denoisers with cross attention to a text, each with both guidance branches in one call: a U-Net of Stable Diffusion's shape and a
transformer of PixArt's. Weights are random, so images mean nothing; what a rule measures is random too, and its threshold is the one at
which it costs what was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from diffusion_ways import ByBlock, Called, Whole, run_sampler, scheduler
from torch import Tensor, nn

from offramp import systems
from offramp.budget import threshold_for_cost
from offramp.core.errors import BudgetInfeasible, UnsupportedModel
from offramp.diffusion import attach_denoiser
from offramp.engines.capture import Tuning
from offramp.engines.diffusion.denoise import Denoiser
from offramp.engines.diffusion.model import layout_of
from offramp.engines.diffusion.regions import RegionDenoiser
from offramp.measure.clock import compare
from offramp.policies.denoising import Point
from offramp.reduce.regions import Regions
from offramp.train import linear_betas

TEXT = ("text-unet", "text-transformer")
TEXT_SYSTEMS = ("few-steps", "deepcache", "first-block-cache", "random-skip", "ras")
COST = 0.5
"""Share of the FLOPs at which systems that can be set to a cost are timed."""

RANGES = {"first-block-cache": (-1.0, 0.0), "random-skip": (0.0, 1.0)}
"""Thresholds among which that cost is looked for."""


def text_denoiser(kind: str, tiny: bool) -> tuple[nn.Module, tuple[int, int, int], tuple[int, int]]:
    """A denoiser, the shape of its image, and length and width of its text."""
    import diffusers

    torch.manual_seed(0)
    if kind == "text-unet":
        down = ("CrossAttnDownBlock2D",) * (1 if tiny else 3) + ("DownBlock2D",)
        up = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (1 if tiny else 3)
        model: nn.Module = diffusers.UNet2DConditionModel(
            sample_size=8 if tiny else 64, block_out_channels=(8, 16) if tiny else (320, 640, 1280, 1280), down_block_types=down,
            up_block_types=up, layers_per_block=1 if tiny else 2, cross_attention_dim=12 if tiny else 768,
            attention_head_dim=4 if tiny else 8, norm_num_groups=4 if tiny else 32,
        )  # fmt: skip
        return model.eval(), (4, 8, 8) if tiny else (4, 64, 64), (6, 12) if tiny else (77, 768)
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2 if tiny else 16, attention_head_dim=8 if tiny else 72, in_channels=4, out_channels=4,
        num_layers=4 if tiny else 28, sample_size=8 if tiny else 64, patch_size=2, cross_attention_dim=16 if tiny else 1152,
        caption_channels=12 if tiny else 4096, use_additional_conditions=False, norm_num_groups=4 if tiny else 32,
    )  # fmt: skip
    return model.eval(), (4, 8, 8) if tiny else (4, 64, 64), (6, 12) if tiny else (77, 4096)


class TextModel:
    """A denoiser with text, cut where training-free systems skip.

    Args:
        kind: one of `TEXT`.
        tiny: for a trial.
        device: where.
        dtype: of weights and inputs.
        steps: of the sampler.
        guidance: weight of the second branch.
    """

    def __init__(self, kind: str, tiny: bool, device: torch.device, dtype: torch.dtype, steps: int, guidance: float) -> None:
        self.kind, self.steps, self.guidance, self.device = kind, steps, guidance, device
        model, self.image, self.text = text_denoiser(kind, tiny)
        self.module = model.to(device, dtype)
        self.name = "sample" if kind == "text-unet" else "hidden_states"
        self.noise = linear_betas()
        example = self.inputs(2) | {"timestep": torch.full((2,), 500, device=device)}
        example[self.name] = torch.randn(2, *self.image, device=device, dtype=dtype)
        example = {self.name: example.pop(self.name), **example}
        typed = {n: v.to(dtype) if v.is_floating_point() else v for n, v in example.items()}
        self.layout = layout_of(self.module, typed, self.noise)
        self.skips: dict[str, Callable[[float | None], tuple[Point, ...]]] = {}
        for name in ("deepcache", "first-block-cache", "random-skip"):
            system = systems.build(name)
            self.skips[name] = lambda value, system=system: system.skips.points(self.layout, system.threshold if value is None else value)
        wanted = {p for make in self.skips.values() for q in make(None) for p in (q.at, q.to, getattr(q.signal, "since", None)) if p}
        self.net = attach_denoiser(self.module, sorted(map(str, wanted)), noise=self.noise, example=typed)

    def inputs(self, rows: int) -> dict[str, Tensor]:
        """Text of some rows, random."""
        g = torch.Generator().manual_seed(rows)
        return {"encoder_hidden_states": torch.randn(rows, *self.text, generator=g).to(self.device)}

    def run(self, called: Called, rows: int, steps: int | None = None) -> Tensor:
        """Sample some images."""
        g = torch.Generator().manual_seed(1)
        noise = torch.randn(rows, *self.image, generator=g).to(self.device)
        text = {n: v.to(self.net.dtype) for n, v in self.inputs(rows).items()}
        empty = {n: torch.zeros_like(v) for n, v in text.items()}
        return run_sampler(called, scheduler("noise"), noise, steps or self.steps, text, empty, self.guidance)

    def _cost(self, denoiser: Denoiser) -> float:
        called = Called(denoiser, self.net)
        self.run(called, 1)
        return denoiser.report.cost * called.calls / self.steps

    def _to_cost(self, name: str, low: float, high: float) -> tuple[Point, ...]:
        """Points at the threshold that costs `COST`, as near as a few runs come."""
        make = self.skips[name]
        found = threshold_for_cost(
            lambda t: torch.tensor([self._cost(Denoiser(self.net, make(t)))]), COST, low, high, tolerance=0.03, runs=8
        )
        return make(found.threshold)

    def _made(self, name: str, runner: ByBlock) -> tuple[str, Denoiser]:
        """A system's setting in words and its denoiser.

        Raises:
            UnsupportedModel: it does not run on this denoiser; says why.
        """
        if name == "ras":
            return "half of the tokens", RegionDenoiser(
                self.net, Regions(0.5, first=max(1, self.steps * 4 // 30), multiple=8), run=runner.regions
            )
        setting, points = "every 3" if name == "deepcache" else "published", self.skips[name](None)
        if name in RANGES:
            try:
                setting, points = f"cost {COST:g}", self._to_cost(name, *RANGES[name])
            except BudgetInfeasible as error:
                print(f"{self.kind}: {name}: {error}", flush=True)
                ends = [self.skips[name](value) for value in RANGES[name]]
                setting, points = "as cheap as it gets", min(ends, key=lambda p: self._cost(Denoiser(self.net, p)))
        return setting, Denoiser(self.net, points, run=runner)

    def times(self, batch: int, names: Sequence[str], repeats: int, compiled: bool) -> Iterator[dict[str, Any]]:
        """A row for each system, as soon as it is measured: time over the compiled, captured full model's in the same rounds, and FLOPs."""
        noted: list[dict[str, Any]] = []
        self.run(Called(self.module, self.net, noted), batch, 1)
        whole = Whole(self.net, noted[0])
        full = partial(self.run, Called(whole, self.net), batch)
        rows = len(noted[0][self.name])
        tuning = Tuning(shared_blocks=True) if self.device.type == "cuda" and compiled else False
        runner = ByBlock(self.device, tuning, sorted({max(1, rows // 2), rows}))
        for name in names:
            if name == "few-steps":
                fewer = max(1, self.steps // 2)
                ours = partial(self.run, Called(whole, self.net), batch, fewer)
                ran = {"flops": fewer / self.steps, "cache_bytes": 0.0}
                yield self._timed(name, f"{fewer} steps", full, ours, repeats, ran)
                continue
            try:
                setting, denoiser = self._made(name, runner)
            except UnsupportedModel as error:
                yield {"name": name, "way": name, "unsupported": str(error)}
                continue
            ours = partial(self.run, Called(denoiser, self.net), batch)
            ours()
            ran = {"flops": denoiser.report.cost, "cache_bytes": denoiser.report.cache_bytes / batch}
            yield self._timed(name, setting, full, ours, repeats, ran)

    def _timed(
        self, name: str, setting: str, full: Callable[[], object], ours: Callable[[], object], repeats: int, ran: Mapping[str, Any]
    ) -> dict[str, Any]:
        done = compare({"full": full, "ours": ours}, reference="full", warmup=1, repeats=repeats, device=self.device)
        ratio = done.ratios["ours"]
        return {
            "name": name, "way": f"{name}, {setting}", **ran, "over_full": ratio.value, "over_full_95": [ratio.low, ratio.high],
            "median_ms": done.timings["ours"].median_ms, "full_ms": done.timings["full"].median_ms,
            "samples_ms": {n: list(t.samples_ms) for n, t in done.timings.items()},
        }  # fmt: skip
