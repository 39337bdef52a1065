"""A diffusion method on a user's pipeline or denoiser: what `offramp.attach` gives for them.

`DiffusionModel` holds the denoiser with its places, the method, and the points that its published settings make. It is called as the
pipeline (or the denoiser) is called; `view` gives a real pipeline that carries out a plan. The user's objects are never changed.
"""

from __future__ import annotations

import copy
import functools
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from offramp.backbones import diffusers as library
from offramp.backbones import repeated_blocks
from offramp.backbones.taps import first_tensor
from offramp.budget import NoiseBins
from offramp.core.bundle import check_base, fingerprint, load_bundle, reading, save_bundle
from offramp.core.errors import InvalidInput, NoEffectWarning, NotCuttable
from offramp.core.modes import evaluating
from offramp.core.noise import FlowMatching, NoiseScale, VariancePreserving
from offramp.core.parts import part_from_dict, part_to_dict
from offramp.core.system import System
from offramp.core.warn import warn
from offramp.diffusion import DenoisingNet, attach_denoiser, uncut_denoiser
from offramp.engines.diffusion.denoise import Denoiser
from offramp.engines.diffusion.pipeline import pipeline_view, sample
from offramp.engines.diffusion.region_step import RegionRunner
from offramp.engines.diffusion.regions import RegionDenoiser
from offramp.engines.diffusion.run import Runner
from offramp.exits.denoising import DenoisingExit
from offramp.policies.denoising import DENOISING_PARTS, Point
from offramp.policies.skips import REGIONS, SKIPS, Layout, Skips
from offramp.reduce.regions import Regions

PARTS: dict[str, type] = {**DENOISING_PARTS, **REGIONS, **SKIPS, "DenoisingExit": DenoisingExit}
"""What a saved method or plan may name."""

_KIND, STEM = "denoiser", "denoiser"

# ---- where a denoiser has places -----------------------------------------------------------------------------------------


def layout_of(model: nn.Module, inputs: Mapping[str, Any], noise: NoiseScale) -> Layout:
    """Find a denoiser's places by running it once.

    Args:
        model: the denoiser.
        inputs: by name.
        noise: from its timestep to log-SNR.

    Raises:
        InvalidInput: it has neither repeated blocks nor the down and up blocks of a U-Net; says so.
    """
    name = type(model).__name__

    def edges(size: int) -> tuple[float, ...]:
        return NoiseBins.by_timestep(training_levels(noise), size).edges

    if isinstance(getattr(model, "down_blocks", None), nn.ModuleList) and isinstance(getattr(model, "up_blocks", None), nn.ModuleList):
        branches = len(model.up_blocks) - 1  # type: ignore[arg-type]
        deep = tuple(library.deep_part(model, b) for b in range(branches)) if branches > 0 else ()
        if not deep:
            raise InvalidInput(f"This {name} has one level, so nothing of it is deeper than its first branch.")
        return Layout(name, (), None, deep, edges)
    try:
        blocks = tuple(b.path for b in repeated_blocks(model, (), inputs))
    except NotCuttable as error:
        raise InvalidInput(
            f"{name} has neither repeated blocks nor the down_blocks and up_blocks of a U-Net: {error} Use attach_denoiser with at=[...]."
        ) from error
    return Layout(name, blocks, _inlet(model, blocks[0], inputs), (), edges)


def training_levels(noise: NoiseScale, steps: int = 1000) -> tuple[float, ...]:
    """Log-SNRs at the training time steps, nearly clean first.

    Raises:
        InvalidInput: the scale does not say where its time steps begin and end.
    """
    if isinstance(noise, VariancePreserving):
        return noise.levels
    if isinstance(noise, FlowMatching):
        times = (torch.arange(steps, dtype=torch.float64) + 0.5) * (noise.full / steps)
        return tuple(noise.log_snr(times).tolist())
    raise InvalidInput(
        f"Published schedules divide the training time steps, and a {type(noise).__name__} does not say which these are; choose a schedule "
        "with calibrate(...), which goes by noise level."
    )


def _inlet(model: nn.Module, block: str, inputs: Mapping[str, Any]) -> str | None:
    """The outermost module that made the state which the first block is given, if the block's own state is of its shape."""
    made: dict[int, tuple[str, Tensor]] = {}
    found: list[str] = []
    given: dict[int, Tensor] = {}

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.update({id(v): v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)})

    def leave(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tensor = first_tensor(output)
            if name == block and tensor is not None and not found:
                found.extend(made[i][0] for i, t in given.items() if i in made and t.shape == tensor.shape)
            if tensor is not None:
                made[id(tensor)] = (name, tensor)

        return hook

    handles = [m.register_forward_hook(leave(n)) for n, m in model.named_modules() if n]
    handles.append(model.get_submodule(block).register_forward_pre_hook(enter, with_kwargs=True))
    try:
        with torch.no_grad(), evaluating(model):
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


# ---- the object ----------------------------------------------------------------------------------------------------------


class DiffusionModel:
    """A diffusion method on a pipeline or a denoiser. Made by `attach_diffusion`.

    Called as the pipeline is called, with the published settings of the method; attributes it has not are the pipeline's (or the
    denoiser's). `offramp.fit` trains it, `offramp.calibrate` finds a plan for a budget and `offramp.compile` makes what carries a plan out.

    Attributes:
        system: the method.
        net: the denoiser with its places and heads.
        layout: its places.
        pipe: the pipeline, or ``None``.
        scheduler: the sampler, or ``None`` for a denoiser without one.
    """

    def __init__(self, system: System, net: DenoisingNet, layout: Layout, pipe: Any = None, scheduler: Any = None) -> None:
        self.system, self.net, self.layout, self.pipe = system, net, layout, pipe
        self._scheduler = scheduler
        self._published: Any = None

    @property
    def scheduler(self) -> Any:
        """The sampler; setting it does not change the user's pipeline."""
        return self.pipe.scheduler if self._scheduler is None and self.pipe is not None else self._scheduler

    @scheduler.setter
    def scheduler(self, value: Any) -> None:
        self._scheduler, self._published = value, None

    @property
    def skips(self) -> Skips | None:
        """What the method skips; ``None`` for one that computes fewer tokens."""
        found: Skips | None = self.system.skips
        return found

    @property
    def points(self) -> tuple[Point, ...]:
        """Decision points of the published settings.

        Raises:
            InvalidInput: something has to be calibrated first.
        """
        return self.skips.points(self.layout, self.system.threshold) if self.skips is not None else ()

    def run(
        self,
        points: Sequence[Point] | None = None,
        *,
        regions: Regions | None = None,
        observe: bool = False,
        run: RegionRunner | Runner | None = None,
    ) -> Denoiser:
        """The denoiser that carries out some points, or computes the tokens that ``regions`` say; by default the published settings."""
        if self.system.reduction is not None:
            if points:
                raise InvalidInput(f"{self.system.card.name} computes fewer tokens and takes no points.")
            return RegionDenoiser(self.net, self.system.reduction if regions is None else regions, observe=observe, run=run)
        if regions is not None:
            raise InvalidInput(
                f"{self.system.card.name} skips parts of the denoiser; a plan of tokens is for a method that computes some of an image's."
            )
        if isinstance(run, RegionRunner):
            raise InvalidInput(f"{self.system.card.name} skips parts of the denoiser, which a Captured runs, not {type(run).__name__}.")
        return Denoiser(self.net, self.points if points is None else points, observe=observe, run=run)

    def view(
        self,
        points: Sequence[Point] | None = None,
        *,
        regions: Regions | None = None,
        steps: Callable[[int], int] | None = None,
        run: RegionRunner | Runner | None = None,
    ) -> Any:
        """What carries out some points: a pipeline of the user's own class and call, or for a denoiser alone a `Denoiser`.

        Args:
            points: by default those of the published settings.
            regions: which tokens are computed, of a method that computes some of them; by default as published.
            steps: how many steps the sampler takes where so many are asked for; by default what the method says.
            run: runs the segments, or the steps of some tokens; by default eagerly. A `Captured` does either.
        """
        return self.around(self.run(points, regions=regions, run=run), steps)

    def around(self, denoiser: Denoiser, steps: Callable[[int], int] | None = None) -> Any:
        """`view` for a given denoiser."""
        if self.pipe is None:
            return denoiser
        made = pipeline_view(self.pipe, denoiser)
        made.scheduler = self.scheduler
        taken = steps or (self.skips.steps if self.skips is not None else None)
        return made if taken is None or taken(1000) == 1000 else _fewer_steps(made, taken)

    @property
    def published(self) -> Any:
        """`view` with the published settings, made once. A trained method's needs `offramp.fit` first."""
        if self._published is None:
            self._published = self.view()
        return self._published

    @property
    def report(self) -> Any:
        """What ran in the last call."""
        found = self.published
        return (found if self.pipe is None else found.denoiser).report

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.published(*args, **kwargs)
        if self.pipe is not None and self.points and not (self.report.fired >= 0).any():
            warn(
                f"{self.system.card.name} skipped nothing in this call of {self.report.depth.shape[1]} steps. Build it with other "
                "settings, or calibrate it for a cost.",
                NoEffectWarning,
            )
        return output

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in ("pipe", "net"):
            raise AttributeError(name)
        return getattr(self.pipe if self.pipe is not None else self.net.model, name)

    def sample(self, noise: Tensor, *, steps: int, plan: Any = None, scheduler: Any = None, **options: Any) -> Tensor:
        """Sample without a pipeline.

        Args:
            noise: ``[B, ...]`` standard normal.
            steps: of the sampler; a method that takes fewer steps does so.
            plan: from `offramp.calibrate`; by default the published settings.
            scheduler: by default the one given to `offramp.attach`, or the pipeline's.
            options: see `offramp.engines.diffusion.pipeline.sample`.
        """
        used = scheduler if scheduler is not None else self.scheduler
        if used is None:
            raise InvalidInput("There is no scheduler: give scheduler=, here or to attach.")
        denoiser = self.run(None if plan is None else plan.points, regions=getattr(plan, "regions", None))
        taken = self.skips if plan is None else plan
        return sample(denoiser, copy.deepcopy(used), noise, steps=steps if taken is None else taken.steps(steps), **options)

    def fingerprint(self) -> str:
        """Of the denoiser and its heads."""
        heads = "" if not self.net.heads else "-" + fingerprint(self.net.heads)[:16]
        return self.net.fingerprint() + heads

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the method, its places and the weights it added into ``folder``; the denoiser's own weights are the user's to save."""
        content = {
            "system": self.system.card.name,
            "skips": part_to_dict(self.skips),
            "threshold": part_to_dict(self.system.threshold),
            "head": part_to_dict(self.system.head),
            "at": list(self.net.at),
            "base": type(self.net.model).__qualname__,
            "fingerprint": self.net.fingerprint(),
            "sampler": None if self.scheduler is None else type(self.scheduler).__name__,
        }
        if self.system.reduction is not None:
            raise InvalidInput(f"{self.system.card.name} adds no weights, so there is nothing to save; attach it again.")
        save_bundle(folder, STEM, _KIND, content, dict(self.net.heads.state_dict()))

    def detach(self) -> Any:
        """The user's pipeline or denoiser, which was never changed."""
        return self.pipe if self.pipe is not None else self.net.model


def _fewer_steps(view: Any, steps: Callable[[int], int]) -> Any:
    """A pipeline that takes fewer steps than it is asked for."""
    kind = type(view)
    signature = inspect.signature(kind.__call__)
    if "num_inference_steps" not in signature.parameters:
        raise InvalidInput(f"{kind.__name__} has no num_inference_steps, so its steps cannot be made fewer.")

    @functools.wraps(kind.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        if any(bound.arguments.get(n) is not None for n in ("timesteps", "sigmas")):
            raise InvalidInput("Steps that are given one by one (timesteps, sigmas) are not made fewer; give num_inference_steps.")
        bound.apply_defaults()
        bound.arguments["num_inference_steps"] = steps(int(bound.arguments["num_inference_steps"]))
        return kind.__call__(*bound.args, **bound.kwargs)

    view.__class__ = type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__, "__doc__": kind.__doc__})
    return view


# ---- attaching -----------------------------------------------------------------------------------------------------------


def is_pipeline(given: Any) -> bool:
    """Whether something has a denoiser and a scheduler, as pipelines of diffusers have."""
    return hasattr(getattr(given, "scheduler", None), "set_timesteps") and not isinstance(given, nn.Module)


def attach_diffusion(
    model: Any,
    *,
    system: System,
    scheduler: Any = None,
    noise: NoiseScale | None = None,
    example: Any = None,
    heads: Mapping[str, nn.Module] | None = None,
    timestep: str | None = None,
) -> DiffusionModel:
    """Put a diffusion method on a pipeline or a denoiser, which is not changed.

    Args:
        model: a pipeline of diffusers, recognised by its ``transformer`` or ``unet`` and its ``scheduler``; or a denoiser.
        system: the method, as ``offramp.systems.build("deepcache")`` gives it.
        scheduler: of a denoiser alone: gives its noise levels, and the steps to `calibrate` with.
        noise: from the denoiser's timesteps to log-SNR; by default the scheduler's.
        example: inputs of the denoiser; by default made from its configuration.
        heads: learned heads by module path; by default new ones where the method has them.
        timestep: name of the denoiser's timestep argument, if it is an unusual one.

    Raises:
        InvalidInput: the method is not for denoisers or would change nothing, the denoiser has no such places, or an argument is lacking.
        NotCuttable: the denoiser cannot be cut there.
        UnsupportedModel: the denoiser cannot compute some tokens alone.
    """
    if not isinstance(system, System) or system.card.engine != "denoise":
        what = f"{system.card.name} is a method of the {system.card.engine} engine" if isinstance(system, System) else f"got {system!r}"
        raise InvalidInput(f"A pipeline or a denoiser takes a diffusion method, such as offramp.systems.build('deepcache'); {what}.")
    name, pipe, denoiser = system.card.name, None, model
    if is_pipeline(model):
        pipe, denoiser = model, getattr(model, library.denoiser_name(model))
        if scheduler is not None:
            raise InvalidInput("A pipeline has its own scheduler; set pipe.scheduler.")
    elif not isinstance(model, nn.Module):
        raise InvalidInput(f"attach takes a pipeline with a scheduler or a torch.nn.Module; got {type(model).__name__}.")
    used = model.scheduler if pipe is not None else scheduler
    if noise is None and used is None:
        raise InvalidInput("A denoiser alone needs its noise levels: give scheduler=..., or noise=FlowMatching() for a rectified flow.")
    level = noise if noise is not None else library.noise_scale(used, denoiser)
    inputs = example if example is not None else library.example_inputs(denoiser)
    probe = uncut_denoiser(denoiser, noise=level, example=inputs, timestep=timestep)
    if system.reduction is not None:
        RegionDenoiser(probe, system.reduction)  # says why not, if not
        return DiffusionModel(system, probe, Layout(type(denoiser).__name__, (), None, (), lambda size: ()), pipe, scheduler)
    if not isinstance(system.skips, Skips):
        raise InvalidInput(f"{name} says nothing that a denoiser may skip (System.skips is {system.skips!r}).")
    layout = layout_of(denoiser, probe.example_call().kwargs, level)
    try:
        places = system.skips.places(layout)
    except InvalidInput as error:
        raise InvalidInput(f"{name} cannot be attached to this {layout.model}: {error}") from error
    if not places:
        raise InvalidInput(f"{name} would attach nowhere in this {layout.model}, so it would change nothing.")
    if system.skips.steps(1000) != 1000 and pipe is None and scheduler is None:
        raise InvalidInput(f"{name} changes the sampler: give scheduler=....")
    net = attach_denoiser(denoiser, places, noise=level, example=inputs, heads=heads, timestep=timestep)
    return DiffusionModel(system, net, layout, pipe, scheduler)


def saved(folder: str | os.PathLike[str]) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """What `DiffusionModel.save` wrote: the method's name, the fields in which it was changed, and the tensors.

    Raises:
        ArtifactError: a file is missing, truncated, altered or foreign.
    """
    content, tensors = load_bundle(Path(folder), STEM, _KIND)
    with reading(f"The method in {folder}"):
        fields = {k: part_from_dict(content[k], PARTS) for k in ("skips", "threshold", "head")}
        return str(content["system"]), {**fields, "base": content["base"], "fingerprint": str(content["fingerprint"])}, tensors


def changed(system: System, fields: Mapping[str, Any]) -> System:
    """A method with the settings that were saved."""
    return replace(system, **{k: fields[k] for k in ("skips", "threshold", "head")})


def check_model(model: Any, fields: Mapping[str, Any], folder: str | os.PathLike[str]) -> None:
    """Refuse a pipeline or denoiser that what was saved does not belong to."""
    denoiser = getattr(model, library.denoiser_name(model)) if is_pipeline(model) else model
    check_base(denoiser, fields["base"], fields["fingerprint"], folder)


__all__ = ["PARTS", "STEM", "DiffusionModel", "attach_diffusion", "changed", "check_model", "is_pipeline", "layout_of", "saved",
           "training_levels"]  # fmt: skip
