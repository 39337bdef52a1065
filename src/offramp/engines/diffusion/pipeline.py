"""A pipeline whose denoiser carries out a plan, and a sampling loop for a denoiser without a pipeline."""

from __future__ import annotations

import copy
import functools
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
    A trajectory begins with every call and is forgotten when the call ends, also by an error. The scheduler may be replaced at any time.

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
    name = library.denoiser_name(pipe)
    model = getattr(pipe, name)
    if net is None:
        level = noise if noise is not None else library.noise_scale(pipe.scheduler, model)
        net = attach_denoiser(
            model, at, noise=level, example=example if example is not None else library.example_inputs(model), heads=heads
        )
    elif net.model is not model:
        raise InvalidInput(f"The given net was made for another {type(net.model).__name__} than the pipeline's {name}.")
    denoiser = Denoiser(net, points, observe=observe, run=run)
    return pipeline_view(pipe, denoiser)


def pipeline_view(pipe: Any, denoiser: Denoiser) -> Any:
    """A view of a pipeline whose denoiser is the given one, made for the pipeline's own model; see `attach_pipeline`."""
    name = library.denoiser_name(pipe)
    view = copy.copy(pipe)
    kind = type(pipe)

    @functools.wraps(kind.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        denoiser.reset(lambda: _model_times(self.scheduler, denoiser.net.noise))
        try:
            return kind.__call__(self, *args, **kwargs)
        finally:
            denoiser.release()

    # Python looks a call up in the class; the view's own class differs from the pipeline's in nothing else.
    view.__class__ = type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__, "__doc__": kind.__doc__})
    view.__dict__.pop(name, None)
    view.__dict__[name] = view.__dict__["denoiser"] = denoiser
    return view


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
    scheduler.set_timesteps(steps, device=noise.device)
    if isinstance(denoiser, Denoiser):
        denoiser.reset(lambda: scheduler.timesteps)
    current = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    more = {"generator": generator} if generator is not None else {}
    try:
        with torch.no_grad():
            for time in scheduler.timesteps:
                scaled = scheduler.scale_model_input(current, time) if hasattr(scheduler, "scale_model_input") else current
                scaled = torch.cat([scaled, scaled]) if unconditional is not None else scaled
                at = time.expand(scaled.shape[0])
                output = (
                    denoiser(scaled, at, **given) if sample_name is None else denoiser(**{sample_name: scaled, str(time_name): at}, **given)
                )
                found = select(output) if select is not None else _first(output)[:, : current.shape[1]]
                if unconditional is not None:
                    with_, without = found.chunk(2)
                    found = without + guidance * (with_ - without)
                current = scheduler.step(found, time, current, **more)[0]
    finally:
        if isinstance(denoiser, Denoiser):
            denoiser.release()
    return current


def _first(output: Any) -> Tensor:
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found
