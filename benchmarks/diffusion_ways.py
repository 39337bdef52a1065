"""What the diffusion benchmark runs: a setting of a system or control as data, the models it runs on, and how it is sampled and timed.

Shapes: ``N`` samples, ``S`` steps of a sampler.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from train_diffusion import Trained, load_models, places, scheduler_for

from offramp.backbones import Cut
from offramp.backbones.graph import Segment
from offramp.backbones.shared_code import SharedCode
from offramp.backbones.taps import first_tensor
from offramp.core.errors import InvalidInput
from offramp.core.parts import part_from_dict, part_to_dict
from offramp.diffusion import DenoisingNet
from offramp.engines.capture import Recorder
from offramp.engines.diffusion.denoise import Denoiser
from offramp.engines.diffusion.graphs import Captured
from offramp.engines.diffusion.model import layout_of
from offramp.engines.diffusion.pipeline import sample
from offramp.engines.diffusion.region_graphs import CapturedRegions
from offramp.engines.diffusion.regions import RegionDenoiser
from offramp.engines.diffusion.report import Report
from offramp.engines.diffusion.run import Runner
from offramp.policies.denoising import DENOISING_PARTS, Chance, Point, Scheduled
from offramp.policies.skips import Layout
from offramp.reduce import regions as token_regions
from offramp.reduce.regions import Regions

PARTS: dict[str, type] = {**DENOISING_PARTS}
PARTS |= {n: getattr(token_regions, n) for n in ("Regions", "ChannelSpread", "ChannelNorm", "AtSteps", "AtLevels")}
"""What a way in a result may name."""

SAMPLERS = ("own", "dpm++", "heun")

# ---- ways ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """One setting of one system or control.

    Attributes:
        name: of the system; settings of one system share it.
        setting: what tells it from the others.
        model: the stage of `train_diffusion.py` whose weights run.
        steps: of the sampler.
        points: what the denoiser skips.
        sampler: one of `SAMPLERS`.
        regions: tokens that are computed, in the place of points.
        control: whether it needs no method.
        ours: whether it is a composition of this library's own.
        about: how it was chosen.
    """

    name: str
    setting: str
    model: str
    steps: int
    points: tuple[Point, ...] = ()
    sampler: str = "own"
    regions: Regions | None = None
    control: bool = False
    ours: bool = False
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return f"{self.name}, {self.setting}" if self.setting else self.name

    @property
    def by_sample(self) -> bool:
        """Whether samples of one step may do different things."""
        return any(not isinstance(p.signal, Scheduled) or isinstance(p.signal, Chance) for p in self.points)

    @property
    def plain(self) -> bool:
        """Whether it is a model as it was trained, whatever the sampler."""
        return not self.points and self.regions is None

    def to_dict(self) -> dict[str, Any]:
        """JSON data; `from_dict` reads it."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("points", "regions")}
        return {**plain, "about": dict(self.about), "points": part_to_dict(self.points), "regions": part_to_dict(self.regions)}

    @property
    def key(self) -> str:
        """Digest of what runs: two ways of one title and other points have other keys."""
        what = {k: v for k, v in self.to_dict().items() if k in ("model", "steps", "points", "sampler", "regions")}
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Way:
        return cls(**{**data, "points": part_from_dict(data["points"], PARTS), "regions": part_from_dict(data["regions"], PARTS)})


def evaluations(sampler: str, steps: int) -> int:
    """How often a sampler asks the model: Heun's method twice a step, but once in the last."""
    return 2 * steps - 1 if sampler == "heun" else steps


def steps_for(sampler: str, cost: float, full: int) -> int:
    """Steps whose evaluations are at most a share of the full sampler's, one at least."""
    most = int(cost * full + 1e-9)
    return max(1, (most + 1) // 2 if sampler == "heun" else most)


def scheduler(kind: str, sampler: str = "own") -> Any:
    """A sampler for a model that predicts what ``kind`` says: ``flow`` or ``noise``."""
    import diffusers

    if sampler == "own":
        return scheduler_for(kind)
    if sampler == "dpm++" and kind == "flow":
        return diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0)
    if sampler == "dpm++":
        # With a largest value of 1 its thresholding is DDIM's clipping of the predicted image.
        return diffusers.DPMSolverMultistepScheduler(beta_schedule="linear", timestep_spacing="trailing", thresholding=True)
    if sampler == "heun" and kind == "flow":
        return diffusers.FlowMatchHeunDiscreteScheduler(num_train_timesteps=1000)
    if sampler == "heun":
        return diffusers.HeunDiscreteScheduler(beta_schedule="linear", timestep_spacing="trailing", clip_sample=True)
    raise InvalidInput(f"sampler must be one of {SAMPLERS}, got {sampler!r}.")


# ---- models --------------------------------------------------------------------------------------------------------------


class Called(nn.Module):
    """A denoiser as a sampler in float32 calls it: inputs in the model's types, its answer in float32 without a learned variance.

    Attributes:
        calls: how often it was called.
        noted: if it is a list, what the denoiser was called with is added to it.
        times: the sampler's list of timesteps in the last run, of which those that were noted are views.
    """

    def __init__(self, inner: nn.Module, net: DenoisingNet, noted: list[dict[str, Any]] | None = None) -> None:
        super().__init__()
        self.inner, self.names = inner, (net.sample_name, net.timestep_name)
        self.dtype, self.time_dtype = net.dtype, net.example[net.timestep_name].dtype
        self.calls, self.noted = 0, noted
        self.times: Tensor | None = None

    def forward(self, **inputs: Any) -> Tensor:
        image, time = self.names
        channels = inputs[image].shape[1]
        given = {**inputs, image: inputs[image].to(self.dtype), time: inputs[time].to(self.time_dtype)}
        self.calls += 1
        if self.noted is not None:  # timesteps stay views of the sampler's list, which a denoiser reads without waiting for the device
            self.noted.append({n: v.clone() if isinstance(v, Tensor) and n != time else v for n, v in given.items()})
        found = first_tensor(self.inner(**given))
        if found is None:
            raise InvalidInput("The denoiser gave no tensor of numbers.")
        return found[:, :channels].float()


def run_sampler(
    called: Called,
    used: Any,
    noise: Tensor,
    steps: int,
    inputs: Mapping[str, Tensor],
    without: Mapping[str, Tensor] | None,
    guidance: float,
) -> Tensor:
    """Sample in float32 with a sampler of diffusers' shape; both guidance branches run in one call.

    Args:
        called: the denoiser; one of this library's begins a trajectory and keeps its report.
        used: the sampler.
        noise: ``[N, ...]`` standard normal.
        steps: of the sampler.
        inputs: the denoiser's other inputs by name.
        without: those of the second guidance branch; ``None`` or ``guidance`` 1 runs one.
        guidance: its weight.
    """
    _list_as(used, called.time_dtype)
    if isinstance(called.inner, Denoiser):
        called.inner.reset(lambda: used.timesteps)
    guided = guidance != 1.0 and without is not None
    try:
        return sample(
            called, used, noise, steps=steps, inputs=inputs, unconditional=without if guided else None,
            guidance=guidance if guided else 1.0, names=called.names,
        )  # fmt: skip
    finally:
        called.times = used.timesteps
        if isinstance(called.inner, Denoiser):
            called.inner.release()


def _list_as(used: Any, dtype: torch.dtype) -> None:
    """Let a sampler that lists whole numbers list them in the model's type: what is cast at every step is no view of the list any more."""
    listing = used.set_timesteps

    def set_timesteps(*args: Any, **kwargs: Any) -> None:
        listing(*args, **kwargs)
        if not used.timesteps.is_floating_point():
            used.timesteps = used.timesteps.to(dtype)

    used.set_timesteps = set_timesteps


@dataclass(frozen=True)
class Drawn:
    """Images of a batch and what they took: ``cost`` is a share of the model's own FLOPs for each of ``calls``."""

    images: Tensor
    report: Report | None
    calls: int
    cost: float


class AnyRows:
    """A segment compiled with its batch dimensions left open, as one code with those that are like it."""

    def __init__(self, segment: Segment, made: Cut, code: SharedCode) -> None:
        self._dims = [made.batch_dims.get(n, ()) for n in segment.inputs]
        self._compiled = code.bind(segment.module)

    def __call__(self, *given: Tensor) -> tuple[Tensor, ...]:
        for tensor, dims in zip(given, self._dims, strict=True):
            for dim in dims:
                torch._dynamo.maybe_mark_dynamic(tensor, dim)
        out: tuple[Tensor, ...] = self._compiled(*given)
        return out


class Model:
    """One architecture with the weights of one or more stages of `train_diffusion.py`, cut once; `wear` changes the weights in place.

    Args:
        stages: by name; the first is what all others have the architecture of.
        guidance: 1 is without.
        steps: of the full sampler.
    """

    def __init__(self, stages: Mapping[str, Trained], guidance: float, steps: int) -> None:
        self.base = next(iter(stages.values()))
        self.stages, self.guidance, self.steps = dict(stages), guidance, steps
        self.module, self.kind, self.name = self.base.model, self.base.kind, self.base.name
        self.weights = {n: {k: v.detach().clone() for k, v in t.model.state_dict().items()} for n, t in stages.items()}
        heads = next((t for t in stages.values() if t.about.get("heads")), None)
        at = places(self.module) if hasattr(self.module, "transformer_blocks") else None
        if at is None:
            blocks: Any = self.module
            at = [f"down_blocks.{k}" for k in range(len(blocks.down_blocks) - 1)]
            at += [f"up_blocks.{k}" for k in range(len(blocks.up_blocks) - 1)]
        source = heads or self.base
        # Heads cost nothing where they are not read.
        self.net: DenoisingNet = dataclasses.replace(source, model=self.module).attach(at)
        self.net.heads.to(self.net.device, self.net.dtype)
        self.layout: Layout = layout_of(self.module, self.net.example_call().kwargs, self.net.noise)
        self.flops = float(self.net.cut().spec.flops)
        self.config: Any = self.module.config
        self.classes = int(getattr(self.config, "num_embeds_ada_norm", None) or self.config.num_class_embeds - 1)
        self.worn = self.name

    @property
    def device(self) -> torch.device:
        return self.net.device

    def wear(self, stage: str) -> None:
        """Run with a stage's weights from here on."""
        if stage not in self.weights:
            raise InvalidInput(f"{self.name} has the weights of {', '.join(self.weights)}, not of {stage!r}.")
        if stage != self.worn:
            self.module.load_state_dict(self.weights[stage])
            self.worn = stage

    def compile(self, code: SharedCode) -> None:
        """Compile every segment of the cut in place, once for any number of rows and for all segments that are alike."""
        made = self.net.cut()
        made.segments = tuple(dataclasses.replace(s, module=AnyRows(s, made, code)) for s in made.segments)  # type: ignore[arg-type]

    def noise(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """Standard normal noise ``[N, C, H, W]`` float32 and classes ``[N]`` in turn; a row does not depend on N."""
        size = (self.config.in_channels, self.config.sample_size, self.config.sample_size)
        rows = [
            torch.randn(min(100, count - k), *size, generator=torch.Generator().manual_seed(seed * 10**6 + k)) for k in range(0, count, 100)
        ]
        return torch.cat(rows).to(self.device), (torch.arange(count) % self.classes).to(self.device)

    def levels(self, way: Way | None = None) -> list[float]:
        """Log-SNR of every step of a way's sampler, of the full one by default."""
        used = scheduler(self.kind, "own" if way is None else way.sampler)
        used.set_timesteps(self.steps if way is None else way.steps)
        return [float(x) for x in self.net.noise.log_snr(used.timesteps.double())]

    def denoiser(self, way: Way, run: Runner | None = None) -> Denoiser:
        """What carries a way out; the way's weights must be worn."""
        if way.regions is not None:
            return RegionDenoiser(self.net, way.regions, run=run.regions if isinstance(run, ByBlock) else run)
        return Denoiser(self.net, way.points, run=run)

    def sample(self, called: Called, way: Way, noise: Tensor, labels: Tensor) -> Tensor:
        """Images of a way, as the sampler leaves them."""
        without = {"class_labels": torch.full_like(labels, self.classes)}
        return run_sampler(called, scheduler(self.kind, way.sampler), noise, way.steps, {"class_labels": labels}, without, self.guidance)

    def draw(self, module: nn.Module, way: Way, noise: Tensor, labels: Tensor) -> Drawn:
        """Images in [-1, 1] of a denoiser, or of anything that is called like one, and what ran."""
        called = Called(module, self.net)
        made = self.sample(called, way, noise, labels)
        report = module.report if isinstance(module, Denoiser) else None
        return Drawn(made.clamp(-1, 1), report, called.calls, 1.0 if report is None else report.cost)

    def share(self, drawn: Drawn, base: Model) -> float:
        """Executed FLOPs over those of the base with all of its steps."""
        return drawn.cost * drawn.calls * self.flops / (base.flops * base.steps)


def load_families(
    folder: str | Path, device: torch.device, dtype: torch.dtype, guidance: float, steps: int, names: Sequence[str] | None = None
) -> dict[str, dict[str, Model]]:
    """What was trained, by the model that it belongs to, and within by architecture (the first is the model itself).

    Variants belong to the model that they began with. ``names`` keeps some families.
    """
    found = load_models(folder, None, device, dtype)
    out: dict[str, dict[str, Model]] = {}
    for base in ("flow", "noise", "unet"):
        if base not in found or (names is not None and base not in names):
            continue
        began = "losses" in found[base].about  # only what variants began with has a table of losses
        variants = {n: t for n, t in found.items() if n not in ("flow", "noise", "unet")} if began else {}
        alike = {base: found[base], **{n: t for n, t in variants.items() if n != "shallow"}}
        out[base] = {base: Model(alike, guidance, steps)}
        if "shallow" in variants:
            out[base]["shallow"] = Model({"shallow": variants["shallow"]}, guidance, steps)
    if not out:
        raise SystemExit(f"{folder} holds none of the models asked for: make them with train_diffusion.py.")
    return out


def model_of(family: Mapping[str, Model], way: Way) -> Model:
    """The architecture that a way runs on, wearing its weights."""
    model = next(m for m in family.values() if way.model in m.weights)
    model.wear(way.model)
    return model


# ---- running and timing --------------------------------------------------------------------------------------------------


class ByBlock(Captured):
    """Captured graphs of segments that are compiled once for all that are alike, so that all plans and models share what was compiled."""

    @functools.cached_property
    def regions(self) -> CapturedRegions | None:
        """The same for steps of some tokens, of which all settings share the step of all of them; ``None`` (eager) on a CPU."""
        return CapturedRegions(self.device, self.compiled) if self.device.type == "cuda" else None


class Whole(nn.Module):
    """A model as one compiled function in one captured graph: the strongest form of the full model."""

    def __init__(self, net: DenoisingNet, inputs: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._given = {n: v.clone() if isinstance(v, Tensor) else v for n, v in inputs.items()}
        cuda = net.device.type == "cuda"
        function: Any = torch.compile(net.model, dynamic=False) if cuda else net.model
        self._made: Tensor | None = None

        def call() -> None:
            self._made = first_tensor(function(**self._given))

        with torch.no_grad():
            self._graph = Recorder(net.device, cuda).graph(call)

    def forward(self, **inputs: Any) -> Tensor:
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                self._given[name].copy_(value)
        with torch.no_grad():
            self._graph.replay()
        if self._made is None:
            raise RuntimeError("The captured model left nothing; this is a defect of the benchmark.")
        return self._made.clone()


class Segments:
    """All segments at full rows, one after another: `samples` gets a list of milliseconds for each pass over the chain."""

    def __init__(self, net: DenoisingNet, runner: ByBlock | None, inputs: Mapping[str, Any]) -> None:
        call = net.call(**inputs)
        self.cut, self.device = net.cut(call), net.device
        self.parts: list[tuple[Callable[[], object], list[Tensor]]] = []
        self.samples: list[list[float]] = [[] for _ in self.cut.segments]
        self._marks: list[list[torch.cuda.Event]] = []
        with torch.no_grad():
            state = self.cut.begin(**call.kwargs)
            for k, segment in enumerate(self.cut.segments):
                given = [state.values[n].clone() for n in segment.inputs]
                read = tuple(n for n in self.cut.names(k) if n in segment.inputs)
                made = segment.module if runner is None else runner.function(self.cut, k, k + 1, read)[1]
                ordered = given if runner is None else [given[segment.inputs.index(n)] for n in read]
                recorder = Recorder(self.device, False) if runner is None else runner.recorder
                graph = recorder.graph(lambda made=made, ordered=ordered: made(*ordered))  # type: ignore[misc]
                self.parts.append((graph.replay, given))
                state = self.cut.run(state, k, k + 1)

    def __call__(self) -> None:
        with torch.no_grad():
            if self.device.type == "cuda":
                marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(self.parts) + 1)]
                marks[0].record()
                for (part, _), mark in zip(self.parts, marks[1:], strict=True):
                    part()
                    mark.record()
                self._marks.append(marks)
                return
            for (part, _), times in zip(self.parts, self.samples, strict=True):
                start = time.perf_counter()
                part()
                times.append((time.perf_counter() - start) * 1e3)

    def clear(self) -> None:
        """Forget the samples."""
        self.samples = [[] for _ in self.samples]

    def median_ms(self) -> list[float]:
        """Milliseconds of each segment; call after the device is done."""
        for marks in self._marks:
            for times, first, last in zip(self.samples, marks, marks[1:], strict=False):
                times.append(first.elapsed_time(last))
        self._marks.clear()
        return [statistics.median(times) for times in self.samples]


def ideal_ms(rows: Sequence[int], batch_rows: int, segment_ms: Sequence[float]) -> float:
    """Time of some steps if each segment took only its share of rows: sum of share reaching it times its time on a full batch.

    Args:
        rows: that each segment ran for, over all steps.
        batch_rows: of a step.
        segment_ms: of each segment at so many rows.
    """
    if batch_rows < 1 or len(rows) != len(segment_ms):
        raise InvalidInput(f"Every segment needs rows and a time, of a batch of rows; got {len(rows)}, {len(segment_ms)}, {batch_rows}.")
    return sum(r / batch_rows * ms for r, ms in zip(rows, segment_ms, strict=True))
