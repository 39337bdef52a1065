"""Where a denoiser has places: its repeated blocks, or the branches of a U-Net, and the noise levels of its training time steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from offramp.backbones import diffusers as library
from offramp.backbones import repeated_blocks
from offramp.backbones.taps import first_tensor
from offramp.budget import NoiseBins
from offramp.core.errors import InvalidInput, NotCuttable
from offramp.core.modes import evaluating
from offramp.core.noise import FlowMatching, NoiseScale, VariancePreserving
from offramp.policies.skips import Layout


def layout_of(model: nn.Module, inputs: Mapping[str, Any], noise: NoiseScale) -> Layout:
    """Find a denoiser's places by running it once.

    Args:
        model: the denoiser.
        inputs: by name.
        noise: from its timestep to log-SNR.

    Raises:
        InvalidInput: it has neither repeated blocks nor the down and up blocks of a U-Net; says so.
    """
    name, edges = type(model).__name__, edges_of(noise)
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


def edges_of(noise: NoiseScale) -> Callable[[int], tuple[float, ...]]:
    """From a number of bins to the ascending log-SNRs that part the training time steps into equally many."""
    return lambda size: NoiseBins.by_timestep(training_levels(noise), size).edges


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


__all__ = ["edges_of", "layout_of", "training_levels"]
