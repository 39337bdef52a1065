"""A model family as data: how to make a small model of it, and inputs for any number of rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn


class Inputs(NamedTuple):
    """Inputs as a model's forward takes them."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Family:
    """One architecture family with a small random configuration, made on the spot; nothing is downloaded.

    Attributes:
        name: ``library/family``.
        kind: what it is, in words: ``cnn``, ``vit``, ``hierarchical``, ``mlp``, ``hybrid``, ``text``, ``audio``, ``detection``,
            ``unet``, ``diffusion transformer`` ...
        build: makes the model with random weights, in evaluation mode or not.
        inputs: ``(rows, length) -> Inputs``. ``length`` is the sequence length, ``None`` for the default; ignored by families
            whose inputs have a fixed size. Random values are drawn from the global generator.
        lengths: sequence lengths to try besides the default; empty where the inputs have a fixed size.
    """

    name: str
    kind: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int, int | None], Inputs]
    lengths: tuple[int, ...] = ()

    @property
    def library(self) -> str:
        return self.name.split("/", 1)[0]
