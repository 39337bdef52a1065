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

from torch import Tensor, nn

from offramp.backbones import diffusers as library
from offramp.core.bundle import check_base, fingerprint, load_bundle, reading, save_bundle
from offramp.core.errors import FingerprintMismatch, InvalidInput, NoEffectWarning, OfframpWarning
from offramp.core.noise import NoiseScale
from offramp.core.parts import part_from_dict, part_to_dict
from offramp.core.system import System
from offramp.core.warn import warn
from offramp.diffusion import DenoisingNet, attach_denoiser, uncut_denoiser
from offramp.engines.diffusion.denoise import ANOTHER, Denoiser
from offramp.engines.diffusion.pipeline import followed_levels, pipeline_view, refuse_attached, sample
from offramp.engines.diffusion.places import edges_of, layout_of, training_levels
from offramp.engines.diffusion.region_step import RegionRunner
from offramp.engines.diffusion.regions import RegionDenoiser
from offramp.engines.diffusion.run import Runner
from offramp.engines.diffusion.trained import Trained
from offramp.engines.diffusion.unchanged import Structure
from offramp.engines.turn import Turn
from offramp.exits.denoising import DenoisingExit
from offramp.policies.denoising import DENOISING_PARTS, Point
from offramp.policies.skips import REGIONS, SKIPS, Layout, Skips
from offramp.reduce.regions import Regions

PARTS: dict[str, type] = {**DENOISING_PARTS, **REGIONS, **SKIPS, "DenoisingExit": DenoisingExit}
"""What a saved method or plan may name."""

_KIND, STEM = "denoiser", "denoiser"

# ---- the object ----------------------------------------------------------------------------------------------------------


class DiffusionModel:
    """A diffusion method on a pipeline or a denoiser. Made by `attach_diffusion`.

    Called as the pipeline is called, with the plan that `offramp.calibrate` found last, or before that with the published settings of the
    method. Attributes it has not are the pipeline's (or the denoiser's), and what is set on the pipeline is seen at the next call; a method
    of the pipeline that returns the pipeline, such as ``to``, returns this. `offramp.fit` trains it, `offramp.calibrate` finds a plan for a
    budget and `offramp.compile` makes what carries a plan out by itself. Calls from several threads wait for one another: `offramp.compile`
    makes one for each thread.

    Args:
        system: the method.
        net: the denoiser with its places and heads.
        layout: its places.
        pipe: the pipeline, or ``None``.
        trained: what it was trained for; ``None`` where that is not known, as of weights that were trained before they came here.
        scheduler: of a denoiser alone.
        levels_given: the net's noise levels hold whatever the scheduler; by default they are asked of each one that is set.

    Attributes:
        system: the method.
        net: the denoiser with its places and heads.
        pipe: the pipeline, or ``None``.
        trained: what it was trained for; ``None`` where that is not known, as of weights that were trained before they came here.
    """

    def __init__(
        self, system: System, net: DenoisingNet, layout: Layout, pipe: Any = None, scheduler: Any = None, *, levels_given: bool = False
    ) -> None:
        self.system, self.net, self.pipe = system, net, pipe
        self._layout, self._scheduler, self._levels_given = layout, scheduler, levels_given
        self.trained: Trained | None = None
        self._plan: Any = None
        self._denoiser: Denoiser | None = None
        self._turn = Turn("This denoiser", ANOTHER)
        self._structure = Structure(net.model) if system.reduction is None else None
        self._sampled_by = self.scheduler

    @property
    def scheduler(self) -> Any:
        """The sampler, or ``None`` for a denoiser without one; setting it does not change the user's pipeline.

        Raises:
            InvalidInput: what is set samples another kind of process than the one attached with.
        """
        return self.pipe.scheduler if self._scheduler is None and self.pipe is not None else self._scheduler

    @scheduler.setter
    def scheduler(self, value: Any) -> None:
        before, self._scheduler = self._scheduler, value
        try:
            self._follow()
        except InvalidInput:
            self._scheduler = before
            raise

    @property
    def layout(self) -> Layout:
        """The denoiser's places, at the noise levels of the scheduler."""
        self._follow()
        return self._layout

    @property
    def plan(self) -> Any:
        """The `DenoisingPlan` that calls carry out; ``None`` = the published settings. `offramp.calibrate` sets it; set it at will.

        Raises:
            InvalidInput: what is set is no plan.
            FingerprintMismatch: it is of another method or was made for another denoiser.
        """
        return self._plan

    @plan.setter
    def plan(self, value: Any) -> None:
        if value is not None:
            self.check_plan(value)
            value.check(self)
        self._plan, self._denoiser = value, None

    def check_plan(self, plan: Any) -> None:
        """Refuse a plan of another method: its places and settings mean nothing here.

        Raises:
            InvalidInput: it is no plan.
            FingerprintMismatch: names both methods.
        """
        name = self.system.card.name
        made = getattr(plan, "system", name)  # points alone, with how many steps are taken, are of no method
        if not hasattr(plan, "points") or not hasattr(plan, "steps"):
            raise InvalidInput(f"A diffusion method runs a plan that calibrate() gave for it; got {plan!r}.")
        if made != name:
            raise FingerprintMismatch(
                f"This plan is of {made} and the method here is {name}: attach the pipeline with "
                f"system=offramp.systems.build({made!r}), or calibrate {name}."
            )

    def _follow(self) -> None:
        """See what was set on the pipeline since the last look: noise levels are those of the scheduler that is there now."""
        if self.pipe is not None and getattr(self.pipe, library.denoiser_name(self.pipe)) is not self.net.model:
            raise InvalidInput(
                f"The pipeline's {library.denoiser_name(self.pipe)} is another module than the {type(self.net.model).__name__} that was "
                "attached: attach again."
            )
        used = self.scheduler
        if used is self._sampled_by:
            return
        if used is not None and not self._levels_given:
            levels = followed_levels(used, self.net.model, self.net.noise)
            if levels != self.net.noise:
                self.net.noise, self._denoiser = levels, None
                if self._layout.blocks or self._layout.deep:
                    self._layout = replace(self._layout, edges=edges_of(levels))
        self._sampled_by = used

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
        """The denoiser that carries out some points, or computes the tokens that ``regions`` say; by default the published settings.

        Raises:
            InvalidInput: the arguments are of another kind of method, or the model is not what was attached any more.
        """
        self._follow()
        if self._structure is not None:
            self._structure.check()
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
        chosen = self.points if points is None else points
        return Denoiser(self.net, chosen, observe=observe, run=run, structure=copy.copy(self._structure))

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
            points: by default what calls carry out (see ``plan``).
            regions: which tokens are computed, of a method that computes some of them; likewise.
            steps: how many steps the sampler takes where so many are asked for; likewise, and for other points what the method says.
            run: runs the segments, or the steps of some tokens; by default eagerly. A `Captured` does either.
        """
        if points is None and regions is None:
            return self.around(self._planned(run), steps or self.taken)
        return self.around(self.run(points, regions=regions, run=run), steps)

    def _planned(self, run: RegionRunner | Runner | None = None) -> Denoiser:
        return self.run(run=run) if self._plan is None else self.run(self._plan.points, regions=self._plan.regions, run=run)

    @property
    def taken(self) -> Callable[[int], int] | None:
        """How many steps are taken where so many are asked for, by the plan or else by the method."""
        source = self._plan if self._plan is not None else self.skips
        return None if source is None else source.steps

    def around(self, denoiser: Denoiser, steps: Callable[[int], int] | None = None) -> Any:
        """`view` for a given denoiser."""
        if self.pipe is None:
            return denoiser
        taken = steps or (self.skips.steps if self.skips is not None else None)
        taken = None if taken is None or taken(1000) == 1000 else taken
        return pipeline_view(self.pipe, denoiser, scheduler=self.scheduler, follow=not self._levels_given, steps=taken)

    @property
    def published(self) -> Any:
        """`view` with what calls carry out: the plan that was calibrated, else the published settings. A trained method's needs
        `offramp.fit` first. The denoiser in it is made once; the view around it shows the user's pipeline as it is now.
        """
        self._follow()
        if self._denoiser is None:
            self._denoiser = self._planned()
        made = self.around(self._denoiser, self.taken)
        return made if self._plan is None else self._plan.watch(made)

    @property
    def report(self) -> Any:
        """What ran in the last call."""
        found = self.published
        return (found if self.pipe is None else found.denoiser).report

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.pipe is None:
            return self.published(*args, **kwargs)
        with self._turn:
            run = self.published
            output, report = run(*args, **kwargs), run.denoiser.report
        if run.denoiser.points and not (report.fired >= 0).any():
            warn(
                f"{self.system.card.name} skipped nothing in this call of {report.depth.shape[1]} steps. Build it with other "
                "settings, or calibrate it for a cost.",
                NoEffectWarning,
            )
        return output

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in ("pipe", "net", "system"):
            raise AttributeError(name)
        owner = self.pipe if self.pipe is not None else self.net.model
        found = getattr(owner, name)
        return _chained(self, owner, found) if inspect.ismethod(found) and found.__self__ is owner else found

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_") and name not in _OWN:
            what = "pipeline" if self.__dict__.get("pipe") is not None else "denoiser"
            raise InvalidInput(
                f"What offramp attached has no {name} of its own to set, only {', '.join(_OWN)}. Set it on the {what}, which detach() "
                f"gives, and the next call sees it: fast.detach().{name} = ..."
            )
        super().__setattr__(name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> DiffusionModel:
        made = type(self).__new__(type(self))
        memo |= {id(self): made, id(self.net._cuts): {}}  # cuts are made anew, on first use
        made.__dict__ = {n: copy.deepcopy(v, memo) for n, v in self.__dict__.items() if n != "_denoiser"}
        made._denoiser = None
        return made

    def sample(self, noise: Tensor, *, steps: int, plan: Any = None, scheduler: Any = None, **options: Any) -> Tensor:
        """Sample without a pipeline.

        Args:
            noise: ``[B, ...]`` standard normal.
            steps: of the sampler; a method that takes fewer steps does so.
            plan: from `offramp.calibrate`; by default what calls carry out.
            scheduler: by default the one given to `offramp.attach`, or the pipeline's.
            options: see `offramp.engines.diffusion.pipeline.sample`.
        """
        used = scheduler if scheduler is not None else self.scheduler
        if used is None:
            raise InvalidInput("There is no scheduler: give scheduler=, here or to attach.")
        if plan is not None:
            self.check_plan(plan)
        denoiser = self._planned() if plan is None else self.run(plan.points, regions=getattr(plan, "regions", None))
        if used is not self.scheduler and not self._levels_given:
            denoiser.noise = followed_levels(used, self.net.model, self.net.noise)
        taken = self.taken if plan is None else plan.steps
        return sample(denoiser, copy.deepcopy(used), noise, steps=steps if taken is None else taken(steps), **options)

    def fingerprint(self) -> str:
        """Of the denoiser and its heads."""
        heads = "" if not self.net.heads else "-" + fingerprint(self.net.heads)[:16]
        return self.net.fingerprint() + heads

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the method, its places and the weights it added into ``folder``; the denoiser's own weights are the user's to save.

        Warns:
            OfframpWarning: they were trained in place, so that what is written is of use with them alone.
        """
        content = {
            "system": self.system.card.name,
            "skips": part_to_dict(self.skips),
            "threshold": part_to_dict(self.system.threshold),
            "head": part_to_dict(self.system.head),
            "at": list(self.net.at),
            "base": type(self.net.model).__qualname__,
            "fingerprint": self.net.fingerprint(),
            "sampler": None if self.scheduler is None else type(self.scheduler).__name__,
            "trained": None if self.trained is None else self.trained.to_dict(),
        }
        if self.system.reduction is not None:
            raise InvalidInput(f"{self.system.card.name} adds no weights, so there is nothing to save; attach it again.")
        save_bundle(folder, STEM, _KIND, content, dict(self.net.heads.state_dict()))
        if self.trained is not None and self.trained.in_place:
            how = "pipe.save_pretrained(...)" if self.pipe is not None else "safetensors.torch.save_model(model, ...)"
            warn(
                f"The weights of {type(self.net.model).__name__} were trained in place and are not in {folder}, which holds what was "
                f"added: save them too, {how}, and load them before offramp.load.",
                OfframpWarning,
            )

    def detach(self) -> Any:
        """The user's pipeline or denoiser. Nothing but training changed it: what was attached, and the plan, stay with this object."""
        return self.pipe if self.pipe is not None else self.net.model


_OWN = ("system", "net", "pipe", "scheduler", "plan", "trained")
"""What may be set on a `DiffusionModel`."""


def _chained(fast: DiffusionModel, owner: Any, method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of the pipeline that gives what was attached where it would give the pipeline."""

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        output = method(*args, **kwargs)
        return fast if output is owner else output

    return call


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
    refuse_attached(model)
    if isinstance(model, DiffusionModel):
        raise InvalidInput(
            f"{model.system.card.name} is attached already, and {name} on top of it would not run. Attach {name} to the pipeline itself "
            "(detach() gives it). To compose both, attach each to it, and give their points to one denoiser: "
            "offramp.engines.diffusion.compose.composed(first, second)."
        )
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
        empty = Layout(type(denoiser).__name__, (), None, (), lambda size: ())
        return DiffusionModel(system, probe, empty, pipe, scheduler, levels_given=noise is not None)
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
    return DiffusionModel(system, net, layout, pipe, scheduler, levels_given=noise is not None)


def saved(folder: str | os.PathLike[str]) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """What `DiffusionModel.save` wrote: the method's name, the fields in which it was changed, and the tensors.

    Raises:
        ArtifactError: a file is missing, truncated, altered or foreign.
    """
    content, tensors = load_bundle(Path(folder), STEM, _KIND)
    with reading(f"The method in {folder}"):
        fields = {k: part_from_dict(content[k], PARTS) for k in ("skips", "threshold", "head")}
        fields["trained"] = Trained.from_dict(known) if (known := content.get("trained")) else None  # older folders do not say
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
