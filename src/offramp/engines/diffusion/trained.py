"""What a diffusion method was trained for, kept with it: a calibration stays within that.

A denoiser that was trained under a plan learned the depths of that plan at its noise levels and no others; where every exit was trained,
every schedule of depths may follow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from offramp.core.errors import OfframpWarning
from offramp.core.parts import part_from_dict, part_to_dict
from offramp.core.warn import warn
from offramp.policies.denoising import DENOISING_PARTS, Point
from offramp.policies.skips import ALWAYS

if TYPE_CHECKING:
    from offramp.engines.diffusion.model import DiffusionModel


@dataclass(frozen=True)
class Trained:
    """What was trained.

    Attributes:
        points: the plan that the denoiser was trained under; ``None`` where every exit was trained.
        in_place: whether the denoiser's own weights were trained, or only the exits that were added.
    """

    points: tuple[Point, ...] | None
    in_place: bool

    def to_dict(self) -> dict[str, Any]:
        """JSON data; `from_dict` reads it."""
        return {"points": part_to_dict(self.points), "in_place": self.in_place}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Trained:
        """What `to_dict` gave."""
        return cls(part_from_dict(data["points"], DENOISING_PARTS), bool(data["in_place"]))


def trained_alone(net: DiffusionModel) -> tuple[Point, ...] | None:
    """The one plan that a denoiser was trained under; ``None`` where others may be run too."""
    known = net.trained
    return None if known is None else known.points


def depths_in_words(points: Sequence[Point], blocks: Sequence[str]) -> str:
    """How many of the blocks the points of a plan leave."""
    counts = sorted({blocks.index(p.at) + 1 for p in points if p.at in blocks})
    always = len(points) == 1 and points[0].threshold == ALWAYS
    return f"{', '.join(map(str, counts))} of {len(blocks)} blocks{'' if always else ' by noise level, or all'}"


def note_trained(net: DiffusionModel, points: Sequence[Point] | None, *, in_place: bool) -> None:
    """Keep with a method what it was trained for.

    Args:
        net: the method.
        points: the plan that it was trained under; ``None`` where every exit was.
        in_place: whether the denoiser's own weights were trained.
    """
    before = net.trained
    net.trained = Trained(None if points is None else tuple(points), in_place or (before is not None and before.in_place))


def warn_untrained(net: DiffusionModel) -> None:
    """Warn where a method needs a denoiser or exits that were trained for it and none were trained or loaded here.

    Whoever trained the weights before says so with `note_trained`.

    Warns:
        OfframpWarning: what the method runs may give noise.
    """
    card = net.system.card
    if card.trained and net.trained is None:
        warn(
            f"{card.name} runs a model that was trained for it, and nothing was trained or loaded here: its images may be noise. Call "
            "offramp.fit(fast, data) first, or offramp.load(model, folder) with what was saved. If these weights were trained for it "
            "before, say so: offramp.engines.diffusion.trained.note_trained(fast, fast.points, in_place=True).",
            OfframpWarning,
        )


__all__ = ["Trained", "depths_in_words", "note_trained", "trained_alone", "warn_untrained"]
