"""What a bidirectional transformer's blocks last knew of every position, when a step computes some of them only.

Unlike in the cache of a decoder (`offramp.backbones.kv`) nothing in it is final: an entry is as of the step that last computed its
position.

Shapes: ``B`` rows, ``R`` of them in one call, ``Q`` positions of a row in one call, ``T`` positions of a text, ``G`` key heads, ``D`` their
width, ``W`` width of the states.
"""

from __future__ import annotations

from torch import Tensor

from offramp.core.errors import InvalidInput


class StateCache:
    """What blocks knew of every position when it was last computed: keys and values, and if asked the state before the block.

    Memory of a block is taken when it is first written. One slot more than there are positions takes what nobody reads.

    Args:
        blocks: how many.
        rows: texts.
        length: positions of each.
        states: whether states are kept too, without which no block can be run on positions that the one before it did not compute.
    """

    def __init__(self, blocks: int, rows: int, length: int, states: bool = False) -> None:
        if min(blocks, rows, length) < 1:
            raise InvalidInput(f"A cache needs blocks, rows and positions, got {blocks}, {rows} and {length}.")
        self.blocks, self.rows, self.length, self.with_states = blocks, rows, length, states
        self.keys: list[Tensor | None] = [None] * blocks
        self.values: list[Tensor | None] = [None] * blocks
        self.states: list[Tensor | None] = [None] * blocks

    @property
    def nowhere(self) -> int:
        """The slot that nobody reads."""
        return self.length

    def exchange(self, block: int, rows: Tensor, slots: Tensor | None, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put keys and values ``[R, G, Q, D]`` at slots (int64 ``[R, Q]``, `None` = every position in order).

        Returns:
            Those of every position of these rows, ``[R, G, T, D]`` each.
        """
        found = []
        for kept, new in ((self.keys, key), (self.values, value)):
            buffer = kept[block]
            if buffer is None:
                buffer = kept[block] = new.new_zeros(self.rows, self.length + 1, new.shape[1], new.shape[3])
            found.append(_put(buffer, rows, slots, new.transpose(1, 2)).transpose(1, 2))
        return found[0], found[1]

    def keep(self, block: int, rows: Tensor, slots: Tensor | None, hidden: Tensor) -> None:
        """Put states ``[R, Q, W]`` before a block. The last block's are not kept, nor any in a cache without states."""
        if not self.with_states or block == self.blocks - 1:
            return
        buffer = self.states[block]
        if buffer is None:
            buffer = self.states[block] = hidden.new_zeros(self.rows, self.length + 1, hidden.shape[2])
        _put(buffer, rows, slots, hidden)

    def kept(self, block: int, rows: Tensor) -> Tensor:
        """States ``[R, T, W]`` of every position before a block, each as it last was."""
        buffer = self.states[block]
        if buffer is None:
            raise InvalidInput(f"No states before block {block} were kept; make the cache with states=True and run every block first.")
        return buffer[rows, : self.length]

    def take(self, rows: Tensor) -> StateCache:
        """The cache of some rows (int64), a copy."""
        other = StateCache(self.blocks, len(rows), self.length, self.with_states)
        for mine, theirs in ((self.keys, other.keys), (self.values, other.values), (self.states, other.states)):
            theirs[:] = [None if t is None else t[rows] for t in mine]
        return other

    @property
    def bytes(self) -> int:
        """Memory taken so far."""
        return sum(t.numel() * t.element_size() for kept in (self.keys, self.values, self.states) for t in kept if t is not None)


def _put(buffer: Tensor, rows: Tensor, slots: Tensor | None, new: Tensor) -> Tensor:
    """Write ``new`` ``[R, Q, ...]`` into ``buffer`` ``[B, T + 1, ...]``; returns these rows' positions ``[R, T, ...]``."""
    length = buffer.shape[1] - 1
    if slots is None:
        buffer[rows, :length] = new
        return new
    buffer[rows[:, None], slots] = new
    return buffer[rows, :length] if len(rows) < len(buffer) else buffer[:, :length]
