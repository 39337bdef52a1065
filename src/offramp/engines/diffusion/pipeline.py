"""A pipeline whose denoiser carries out a plan, and a sampling loop for a denoiser without a pipeline."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from offramp.backbones import diffusers as library
from offramp.core.errors import InvalidInput
from offramp.core.noise import FlowMatching, NoiseScale
from offramp.diffusion import DenoisingNet, attach_denoiser
from offramp.engines.diffusion.denoise import Denoiser
from offramp.engines.diffusion.run import Runner
from offramp.policies.denoising import Point


def attach_pipeline(
    pipe: Any,
    points: Sequence[Point] = (),
    *,
    at: Sequence[str] | None = None,
    example: Any = None,
    noise: NoiseScale | None = None,
    heads: Mapping[str, nn.Module] | None = None,
    net: DenoisingNet | None = None,
    observe: bool = False,
    run: Runner | None = None,
) -> Any:
    """A view of a pipeline in which the denoiser carries out a plan. The pipeline is not changed, so detaching is to drop the view.

    The view has the pipeline's own call and attributes; ``view.denoiser.report`` tells what ran in the last call.
    A trajectory begins with every call and is forgotten when the call ends, also by an error; calls from several threads wait for one
    another. The view's scheduler may be replaced at any time by one of the same noise process.

    Args:
        pipe: of diffusers, or any object with a ``transformer`` or ``unet`` and a ``scheduler`` that is called to sample.
        points: the plan.
        at: module paths of the denoiser to cut after; by default after each of its blocks.
        example: inputs of the denoiser; by default made from its configuration.
        noise: from its timesteps to log-SNR; by default from the pipeline's scheduler.
        heads: learned heads by module path.
        net: a denoiser attached before, instead of the last four.
        observe: note every measured score.
        run: runs the segments; by default eagerly.

    Raises:
        InvalidInput: the pipeline has no denoiser or scheduler, or a point has no such place or does not fit.
        NotCuttable: the denoiser cannot be cut there.
    """
    refuse_attached(pipe)
    model = getattr(pipe, library.denoiser_name(pipe))
    if net is None:
        level = noise if noise is not None else library.noise_scale(pipe.scheduler, model)
        net = attach_denoiser(
            model, at, noise=level, example=example if example is not None else library.example_inputs(model), heads=heads
        )
    elif net.model is not model:
        raise InvalidInput(f"The given net was made for another {type(net.model).__name__} than the pipeline's own.")
    denoiser = Denoiser(net, points, observe=observe, run=run)
    return pipeline_view(pipe, denoiser, follow=noise is None)


def pipeline_view(
    pipe: Any, denoiser: Denoiser, *, scheduler: Any = None, follow: bool = True, steps: Callable[[int], int] | None = None
) -> Any:
    """A view of a pipeline whose denoiser is the given one, made for the pipeline's own model; see `attach_pipeline`.

    Args:
        pipe: the user's.
        denoiser: whose noise levels are those of the scheduler.
        scheduler: by default the pipeline's.
        follow: levels of a scheduler that is set later are asked of it; else they are the denoiser's whatever the scheduler.
        steps: how many steps are taken where so many are asked for; by default as many.

    Raises:
        InvalidInput: steps are to be fewer, and the pipeline's call does not take a number of them.
    """
    refuse_attached(pipe)
    if steps is not None and "num_inference_steps" not in inspect.signature(type(pipe).__call__).parameters:
        raise InvalidInput(f"{type(pipe).__name__} has no num_inference_steps, so its steps cannot be made fewer.")
    name = library.denoiser_name(pipe)
    view, kind = copy.copy(pipe), pipe.__class__
    view.__class__ = _view_class(kind)
    view.__dict__.pop(name, None)
    view.__dict__[name] = view.__dict__["denoiser"] = denoiser
    if scheduler is not None:
        view.scheduler = scheduler
    view.__dict__["_taken"] = steps
    view.__dict__["_levels"] = (view.scheduler, denoiser.noise) if follow else None
    return view


@functools.cache
def _view_class(kind: Any) -> Any:
    """The class of views: the pipeline's own in everything but its call and what would save a half of it."""
    signature = inspect.signature(kind.__call__)

    @functools.wraps(kind.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        own = self.__dict__
        denoiser, share, levels = own["denoiser"], 1.0, None
        if own["_taken"] is not None:
            bound, share = _fewer(signature.bind(self, *args, **kwargs), own["_taken"])
            args, kwargs = bound.args[1:], bound.kwargs
        if own["_levels"] is not None and own["_levels"][0] is not self.scheduler:
            levels = followed_levels(self.scheduler, denoiser.net.model, own["_levels"][1])
            own["_levels"] = self.scheduler, levels
        with denoiser.sampling(lambda: _model_times(self.scheduler, denoiser.noise), share=share, noise=levels):
            return kind.__call__(self, *args, **kwargs)

    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> None:
        raise InvalidInput(
            "A pipeline that offramp made is a view of yours, and its denoiser no component that could be loaded again. Save your own "
            "pipeline, and beside it what was added: save(folder) of what attach gave, and of the plan."
        )

    # Python looks a call up in the class; a view's own class differs from the pipeline's in nothing else.
    names = {"__call__": call, "save_pretrained": save_pretrained, "__module__": kind.__module__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), names)


def _fewer(given: inspect.BoundArguments, steps: Callable[[int], int]) -> tuple[inspect.BoundArguments, float]:
    """A call with fewer steps than it asks for, and their share."""
    if any(given.arguments.get(n) is not None for n in ("timesteps", "sigmas")):
        raise InvalidInput("Steps that are given one by one (timesteps, sigmas) are not made fewer; give num_inference_steps.")
    given.apply_defaults()
    asked = int(given.arguments["num_inference_steps"])
    given.arguments["num_inference_steps"] = steps(asked)
    return given, steps(asked) / asked if asked else 1.0


def followed_levels(scheduler: Any, model: nn.Module, before: NoiseScale) -> NoiseScale:
    """Noise levels of a scheduler that was set in another one's place.

    Raises:
        InvalidInput: they are of another kind, or not known.
    """
    now = library.noise_scale(scheduler, model)
    if type(now) is not type(before):
        raise InvalidInput(
            f"{type(model).__name__} was attached with the noise levels of a {type(before).__name__} process, and "
            f"{type(scheduler).__name__} samples a {type(now).__name__} one, for which what is skipped at a level would mean something "
            "else. Use a scheduler of the process that the denoiser was trained for; or attach again with this one, or with noise=... that "
            "says what its timesteps mean."
        )
    return now


def refuse_attached(given: Any) -> None:
    """Refuse what a method was put on already: the one that is put on it second would not run.

    Raises:
        InvalidInput: says how methods are composed.
    """
    inner = getattr(given, "__dict__", {}).get("denoiser")
    if isinstance(given, Denoiser) or isinstance(inner, Denoiser):
        raise InvalidInput(
            f"This {type(given).__name__} carries out a method already, and a second one cannot be put on top. Attach to your own "
            "pipeline or denoiser (detach() gives it). To compose methods, attach each to it and give their points to one denoiser: "
            "offramp.engines.diffusion.compose.composed(first, second)."
        )


def _model_times(scheduler: Any, noise: NoiseScale) -> Tensor:
    """What the model will be called with: some pipelines scale a flow's timesteps to [0, 1]."""
    times: Tensor = scheduler.timesteps
    full = float(getattr(getattr(scheduler, "config", None), "num_train_timesteps", 1000) or 1000)
    return times * (noise.full / full) if isinstance(noise, FlowMatching) and noise.full != full else times


def sample(
    denoiser: Denoiser | nn.Module,
    scheduler: Any,
    noise: Tensor,
    *,
    steps: int,
    inputs: Mapping[str, Any] | None = None,
    unconditional: Mapping[str, Any] | None = None,
    guidance: float = 1.0,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    select: Callable[[Any], Tensor] | None = None,
    names: tuple[str, str] | None = None,
) -> Tensor:
    """Sample with a scheduler of diffusers' shape (``set_timesteps``, ``timesteps``, ``step``).

    Args:
        denoiser: a `Denoiser`, or a plain model to compare with.
        scheduler: its state is set anew.
        noise: ``[B, ...]`` standard normal.
        steps: of the scheduler, at least 1.
        inputs: further inputs of the denoiser by name, ``[B, ...]`` each.
        unconditional: the same for the second guidance branch; both branches then run in one call of 2B rows.
        guidance: ``unconditional + guidance * (conditional - unconditional)``.
        generator: for schedulers that add noise.
        select: picks the prediction out of the model's output; by default its first tensor, of which the first channels are taken if it has
            more than the sample.
        names: of the noisy input and the timestep, for a plain model; a `Denoiser` knows them.

    Returns:
        ``[B, ...]`` samples.

    Raises:
        InvalidInput: ``steps`` is below 1, or guidance is asked for without unconditional inputs.
    """
    if steps < 1:
        raise InvalidInput(f"steps must be at least 1, got {steps}.")
    if guidance != 1.0 and unconditional is None:
        raise InvalidInput("Guidance needs the inputs of the second branch: unconditional={...}.")
    sample_name, time_name = (
        (denoiser.net.sample_name, denoiser.net.timestep_name) if isinstance(denoiser, Denoiser) else names or (None, None)
    )
    given = dict(inputs or {})
    if unconditional is not None:
        given = {n: torch.cat([v, unconditional[n]]) if isinstance(v, Tensor) else v for n, v in given.items()}
    more = {"generator": generator} if generator is not None else {}
    with (
        denoiser.sampling(lambda: scheduler.timesteps) if isinstance(denoiser, Denoiser) else contextlib.nullcontext(),
        torch.no_grad(),
    ):
        scheduler.set_timesteps(steps, device=noise.device)
        current = noise * getattr(scheduler, "init_noise_sigma", 1.0)
        for time in scheduler.timesteps:
            scaled = scheduler.scale_model_input(current, time) if hasattr(scheduler, "scale_model_input") else current
            scaled = torch.cat([scaled, scaled]) if unconditional is not None else scaled
            at = time.expand(scaled.shape[0])
            noisy = {str(sample_name): scaled, str(time_name): at}
            output = denoiser(scaled, at, **given) if sample_name is None else denoiser(**noisy, **given)
            found = select(output) if select is not None else _first(output)[:, : current.shape[1]]
            if unconditional is not None:
                with_, without = found.chunk(2)
                found = without + guidance * (with_ - without)
            current = scheduler.step(found, time, current, **more)[0]
    return current


def _first(output: Any) -> Tensor:
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found
