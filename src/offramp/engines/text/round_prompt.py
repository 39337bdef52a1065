"""The prompts' pass of captured rounds: short prompts run as a graph, made for one of a few widths.

A pass over a short prompt is mostly launches, and a library looks for its way anew at every length it has not met. Prompts are therefore
padded to the next of a few widths and replayed; tokens beyond a prompt's end leave no trace. Where there are more tokens than `MOST`,
arithmetic takes the time, and the pass is made as it is.
"""

from __future__ import annotations

from torch import Tensor

from offramp.engines.capture import Graph, Recorder
from offramp.engines.text.rows import Rows

LEAST, MOST = 16, 2048
"""Tokens of a row in the narrowest graph, and tokens of all rows in the widest."""


def padded(longest: int) -> int:
    """The width for prompts of up to so many tokens: 16, 32, 64, and from there on in steps of half an octave."""
    width = LEAST
    while width < longest:
        width *= 2
    return 3 * width // 4 if width > 64 and longest <= 3 * width // 4 else width


def widths(longest: int) -> list[int]:
    """Every width for prompts of up to so many tokens, ascending."""
    found = [padded(1)]
    while found[-1] < longest:
        found.append(padded(found[-1] + 1))
    return found


class PromptPass:
    """Runs the prompts that stand in some rows. A width is captured when it is first met, which takes a few passes.

    Args:
        state: the rows.
        recorder: captures. Nothing is compiled.
        logits: ``[B, V]``, filled by every call.
    """

    def __init__(self, state: Rows, recorder: Recorder, logits: Tensor) -> None:
        self.state, self.recorder, self._logits = state, recorder, logits
        self._graphs: dict[int, Graph] = {}

    def __call__(self) -> Tensor:
        """Logits ``[B, V]`` of each prompt's last token, to be used before the next call."""
        state = self.state
        width = min(padded(state.reach), state.cache.slots)
        if width * state.count > MOST or width < state.reach:
            return state.prefill()
        if width not in self._graphs:
            self._graphs[width] = self.recorder.graph(lambda: self._run(width))
        self._graphs[width].replay()
        return self._logits

    def _run(self, width: int) -> None:
        reach, self.state.reach = self.state.reach, width
        self._logits.copy_(self.state.prefill(width=width))
        self.state.reach = reach


__all__ = ["LEAST", "MOST", "PromptPass", "padded", "widths"]
