"""Looking at texts while captured rounds write them, a round late and without a synchronisation: stop strings and streaming.

Shapes: ``B`` rows, ``S`` slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from offramp.core.errors import InvalidInput
from offramp.engines.text.written import Generation, Streamer


class Board:
    """Tokens and lengths as the device last sent them, in pinned memory.

    Tokens are sent before lengths, in the order of the stream, and a token within a row's length never changes: whoever reads lengths
    first finds every token that they promise, also while the next round is sending.

    Args:
        tokens: int64 ``[B, S]``.
        length: int64 ``[B]``.
    """

    def __init__(self, tokens: Tensor, length: Tensor) -> None:
        pinned = tokens.device.type == "cuda"
        self._tokens = torch.zeros(tokens.shape, dtype=tokens.dtype, pin_memory=pinned)
        self._length = torch.zeros(length.shape, dtype=length.dtype, pin_memory=pinned)

    def post(self, tokens: Tensor, length: Tensor) -> None:
        """Send; part of a graph."""
        self._tokens.copy_(tokens, non_blocking=True)
        self._length.copy_(length, non_blocking=True)

    def read(self) -> tuple[Tensor, Tensor]:
        """Tokens ``[B, S]`` and lengths ``[B]``; tokens behind a row's length mean nothing."""
        length = self._length.clone()
        return self._tokens, length


class Watch:
    """Follows the texts of one call.

    Args:
        prompts: token ids of each row; further rows are not looked at.
        stops: told the tokens of a row so far, says whether the newest is its last.
        streamer: is told of the only row.

    Raises:
        InvalidInput: a streamer and several prompts.
    """

    def __init__(
        self, prompts: Sequence[Sequence[int]], stops: Callable[[list[int]], bool] | None = None, streamer: Streamer | None = None
    ) -> None:
        if streamer is not None and len(prompts) != 1:
            raise InvalidInput(f"A streamer takes the tokens of one text, got {len(prompts)} prompts; give them one at a time.")
        self.texts = [[int(t) for t in p] for p in prompts]
        self.stopped = [False] * len(prompts)
        self._starts = [len(p) for p in prompts]
        self._stops, self._streamer = stops, streamer
        if streamer is not None:
            streamer.put(torch.tensor(self.texts))

    @property
    def over(self) -> bool:
        """Whether every row was stopped."""
        return all(self.stopped)

    def saw(self, tokens: Tensor, length: Tensor) -> list[int]:
        """Take what is new in tokens ``[B, S]`` of lengths ``[B]``, on the host. Returns the rows that are to stop now."""
        found = []
        for row, text in enumerate(self.texts):
            before = len(text)
            for token in tokens[row, before : int(length[row])].tolist() if not self.stopped[row] else ():
                text.append(token)
                if self._stops is not None and self._stops(text):
                    self.stopped[row] = True
                    found.append(row)
                    break
            if self._streamer is not None and len(text) > before:
                self._streamer.put(torch.tensor(text[before:]))
        return found

    def finish(self, result: Generation) -> None:
        """Cut off what rows wrote behind their stop."""
        for row, text in enumerate(self.texts):
            new = len(text) - self._starts[row]
            result.tokens[row], result.depth[row] = result.tokens[row][:new], result.depth[row][:new]
        if self._streamer is not None:
            self._streamer.end()


__all__ = ["Board", "Watch"]
