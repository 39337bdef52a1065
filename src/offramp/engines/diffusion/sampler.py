"""What a sampler's steps and a denoiser's noise levels are, in a form that is kept with a plan, and what of it differs from another's."""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

from offramp.core.errors import InvalidInput
from offramp.core.noise import NoiseScale
from offramp.engines.diffusion.places import training_levels

_KEPT = 9  # noise levels of a scale that are kept
_CLOSE = 1e-3  # log-SNRs that differ by less are the same, computed elsewhere


def sampler_settings(scheduler: Any) -> dict[str, Any]:
    """What a sampler was configured with, as JSON data: betas, prediction type, spacing, shift and whatever else it has.

    Args:
        scheduler: of diffusers, or with a mapping ``config``; of another, or of ``None``, nothing is known.

    Returns:
        Its entries without those that begin with ``_``; of a list longer than eight its length and a digest.
    """
    config = getattr(scheduler, "config", None)
    entries = dict(config) if isinstance(config, Mapping) else {}
    return {str(k): _plain(v) for k, v in sorted(entries.items(), key=lambda e: str(e[0])) if not str(k).startswith("_")}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if hasattr(value, "tolist"):  # arrays, tensors and their numbers
        return _plain(value.tolist())
    if isinstance(value, Sequence):
        listed = [_plain(v) for v in value]
        return listed if len(listed) <= 8 else f"{len(listed)} values {hashlib.sha256(repr(listed).encode()).hexdigest()[:12]}"
    return type(value).__name__


def kept_levels(noise: NoiseScale) -> list[float]:
    """Some of the noise levels (log-SNR) that a denoiser is called at, nearly clean first; none of a scale without time steps."""
    try:
        levels = training_levels(noise)
    except InvalidInput:
        return []
    return [round(levels[round(k * (len(levels) - 1) / (_KEPT - 1))], 6) for k in range(_KEPT)]


def same_levels(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two lists of `kept_levels` are the same noise levels, as far as both are known."""
    if not one or not other:
        return True
    return len(one) == len(other) and all(math.isclose(a, b, rel_tol=_CLOSE, abs_tol=_CLOSE) for a, b in zip(one, other, strict=True))


def differing(made: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """In words what two samplers that say an entry both say differently."""

    def same(a: Any, b: Any) -> bool:
        numbers = isinstance(a, int | float) and isinstance(b, int | float) and not isinstance(a, bool) and not isinstance(b, bool)
        return math.isclose(a, b, rel_tol=1e-6) if numbers else bool(a == b)

    return [f"{k} was {made[k]!r} and is {found[k]!r}" for k in made if k in found and not same(made[k], found[k])]


def asked_of(signature: inspect.Signature, arguments: Mapping[str, Any]) -> tuple[int | None, float | None]:
    """Steps and guidance scale that a pipeline's call asks for; ``None`` where it does not say.

    Args:
        signature: of the call.
        arguments: as bound, with what is not given left out.
    """

    def value(name: str) -> Any:
        default = signature.parameters[name].default if name in signature.parameters else None
        return arguments.get(name, None if default is inspect.Parameter.empty else default)

    listed = any(arguments.get(n) is not None for n in ("timesteps", "sigmas"))
    steps, guidance = value("num_inference_steps"), value("guidance_scale")
    return (
        int(steps) if isinstance(steps, int) and not listed else None,
        float(guidance) if isinstance(guidance, int | float) else None,
    )


__all__ = ["asked_of", "differing", "kept_levels", "same_levels", "sampler_settings"]
