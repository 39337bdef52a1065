"""Blocks that exits add to a decoder: of the model's own kind, with weights and a cache of their own.

Shapes: ``B`` rows, ``Q`` tokens of a row in one call, ``W`` width of the states.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from offramp.backbones.decoder import Decoder, Step
from offramp.backbones.kv import KVCache, Writer
from offramp.core.errors import UnsupportedModel


class Passing(KVCache):
    """A cache for one pass over whole texts: a block reads what it has just written, nothing is kept, and gradients flow."""

    def __init__(self, rows: int, slots: int) -> None:
        super().__init__(1, rows, slots)
        self._now: tuple[Tensor, Tensor] | None = None

    def write(self, block: int, key: Tensor, value: Tensor, slots: Tensor) -> None:
        self._now = (key, value)

    def read(self, block: int, length: int) -> tuple[Tensor, Tensor]:
        now, self._now = self._now, None
        return now if now is not None else super().read(block, length)


class OwnBlock(nn.Module):
    """``(hidden [B, Q, W], step) -> [B, Q, W]``: one whole block of the model's kind. ``step.cache`` is a cache of one block.

    Args:
        model: the decoder.
        index: which of its blocks it is like, from 0.
        fresh: new weights instead of copies of that block's.
    """

    def __init__(self, model: Decoder, index: int, fresh: bool = False) -> None:
        super().__init__()
        self._model = (model,)
        self.index = index
        like: Any = model.blocks[index]
        made: Any = copy.deepcopy(like)
        if fresh:
            try:
                new = type(like)(copy.deepcopy(model.model.config), index)
            except TypeError as error:
                raise UnsupportedModel(f"A fresh {type(like).__name__} cannot be made of a configuration and a number: {error}.") from error
            made.load_state_dict(new.state_dict())
        self.block = made.requires_grad_(True)

    def forward(self, hidden: Tensor, step: Step) -> Tensor:
        return self._model[0].call(self.block, self.index, hidden, step, Writer(step.cache, 0, step.slots, step.length))


def whole(model: Decoder, hidden: Tensor) -> Step:
    """The step of one causal pass over whole texts of states ``[B, T, W]``, each from position 0 on."""
    rows, length = hidden.shape[:2]
    positions = torch.arange(length, device=hidden.device).expand(rows, -1)
    return model.step(Passing(rows, length), positions)
