"""Keys and values of a decoder at fixed addresses, one buffer a block, every row at its own position.

A token's keys and values lie at the slot of its position. Nothing is ever moved or cut: going back is not advancing a row's position,
as what lies behind it is masked and written over. One slot more than a sequence can have takes what nobody reads.

Shapes: ``B`` rows, ``S`` slots, ``Q`` tokens of a row in one call, ``G`` key heads, ``D`` their width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from offramp.core.errors import InvalidInput


class KVCache:
    """Keys and values ``[B, S + 1, G, D]`` of every block.

    Memory of a block is taken when it is first written, since only the block knows its heads.

    Args:
        blocks: how many.
        rows: sequences.
        slots: most tokens of a sequence.
    """

    def __init__(self, blocks: int, rows: int, slots: int) -> None:
        if min(blocks, rows, slots) < 1:
            raise InvalidInput(f"A cache needs blocks, rows and slots, got {blocks}, {rows} and {slots}.")
        self.rows, self.slots = rows, slots
        self.keys: list[Tensor | None] = [None] * blocks
        self.values: list[Tensor | None] = [None] * blocks

    @classmethod
    def holding(cls, keys: Sequence[Tensor], values: Sequence[Tensor]) -> KVCache:
        """A cache of these buffers ``[B, S + 1, G, D]``, one a block."""
        made = cls(len(keys), keys[0].shape[0], keys[0].shape[1] - 1)
        made.keys, made.values = list(keys), list(values)
        return made

    @property
    def nowhere(self) -> int:
        """The slot that nobody reads."""
        return self.slots

    def write(self, block: int, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """Put keys and values ``[B, G, Q, D]`` at slots (int64 ``[B, Q]``)."""
        keys, values = self.keys[block], self.values[block]
        if keys is None or values is None:
            keys = self.keys[block] = key.new_zeros(self.rows, self.slots + 1, key.shape[1], key.shape[3])
            values = self.values[block] = value.new_zeros(self.rows, self.slots + 1, value.shape[1], value.shape[3])
        row = torch.arange(self.rows, device=slots.device)[:, None]
        keys[row, slots] = key.transpose(1, 2)
        values[row, slots] = value.transpose(1, 2)

    def read(self, block: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, G, length, D]`` of the first slots, as views."""
        keys, values = self.keys[block], self.values[block]
        if keys is None or values is None:
            raise InvalidInput(f"Block {block} has not run yet; prefill runs every block on the prompt.")
        return keys[:, :length].transpose(1, 2), values[:, :length].transpose(1, 2)

    @property
    def bytes(self) -> int:
        """Memory taken so far."""
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values) if t is not None)


class Writer:
    """What a block's attention is given as its cache: writes at the slots of this call, answers with what may be read.

    Args:
        cache: where.
        block: whose keys and values these are. The number that the attention was made for is not asked, so that blocks can be equal.
        slots: int64 ``[B, Q]``.
        length: slots that are read.
    """

    def __init__(self, cache: KVCache, block: int, slots: Tensor, length: int) -> None:
        self.cache, self.block, self.slots, self.length = cache, block, slots, length

    def update(self, key: Tensor, value: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, G, length, D]`` after this call's ``[B, G, Q, D]`` are in place. The name is transformers'."""
        self.cache.write(self.block, key, value, self.slots)
        return self.cache.read(self.block, self.length)
