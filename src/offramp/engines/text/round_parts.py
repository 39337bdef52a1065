"""What captured rounds share: rows that stand at fixed addresses, passes over parts of the model, and what the host is told.

A round of length ``k`` has ``k + 1`` places. It begins at each row's newest token, which no block has seen; the blocks before the exit run
place by place, the blocks behind it once over all places. What is decided between the places, and what of it stands, differs: drafts are
verified (`round_verify.py`, of which plain decoding is the round without drafts) or tokens leave (`round_accept.py`). Nothing in a round
asks the host, and a row that is finished writes nowhere.

Shapes: ``B`` rows, ``P`` places, ``W`` width of the states, ``V`` vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from offramp.backbones.decoder import Decoder, Step
from offramp.engines.capture import Recorder
from offramp.engines.text.rows import Rows
from offramp.engines.text.written import Generation


class Round(ABC):
    """One way to decide, at work on rows.

    Each piece is compiled by itself, as most run several times in a round.

    Args:
        model: that of the rows, or the same with other products.
        state: the rows, with the exit that is used, if one is.
        recorder: compiles.

    Attributes:
        count: int64 ``[7]``, 56 bytes, which arrive at the host at once: rounds, rows alive, longest row; what an exit said that the full
            model has judged and how much of it stands, before this round and after it.
        passes: over the blocks behind the exit.
    """

    def __init__(self, model: Decoder, state: Rows, recorder: Recorder) -> None:
        self.lm, self.model, self.state = state.lm, model, state
        self.exit_index = state.exits[0] if state.exits else 0
        self.depth = state.depth_of_exit
        self.device = state.length.device
        self.count = torch.zeros(7, dtype=torch.int64, device=self.device)
        self.passes = torch.zeros((), dtype=torch.int64, device=self.device)
        wrap = recorder.wrap
        if recorder.compiled and recorder.tuning.shared_blocks:
            self.model = model.sharing(wrap, _at_a_time(self.depth, len(model)))
            self._embed, self._place, self._logits = wrap(self._embedded), wrap(self._placed), wrap(model.logits)
            self._shallow, self._deep = self._run_shallow, self._run_deep
        else:
            self._embed, self._place, self._logits = self._embedded, self._placed, model.logits
            self._shallow, self._deep = wrap(self._run_shallow), wrap(self._run_deep)

    @abstractmethod
    def run(self, length: int) -> None:
        """A round of ``length + 1`` places."""

    def restart(self) -> None:
        """Other texts are in place."""
        self.count.zero_()
        self.passes.zero_()

    def report(self, result: Generation) -> None:
        """Write down what was seen, in a result that holds the texts."""
        result.deep_passes = int(self.passes)

    def _newest(self) -> tuple[Tensor, Tensor]:
        """Position of each row's newest token, and that token (both int64 ``[B]``)."""
        first = self.state.length - 1
        return first, self.state.tokens.gather(1, first[:, None]).squeeze(1)

    def _embedded(self, tokens: Tensor, first: Tensor, counts: Tensor) -> tuple[Tensor, Step]:
        """States ``[B, P, W]`` before the first block of ``tokens`` ``[B, P]``, and where they stand; see `_placed`."""
        step = self._at(first, counts, tokens.shape[1])
        hidden = self.model.embed(tokens, step)
        return hidden, self.model.prepare(hidden, step)

    def _placed(self, states: Tensor, first: Tensor, counts: Tensor) -> Step:
        """Where states ``[B, P, W]`` stand: of each row those from position ``first[b]`` on, of which ``counts[b]`` count."""
        return self.model.prepare(states, self._at(first, counts, states.shape[1]))

    def _at(self, first: Tensor, counts: Tensor, width: int) -> Step:
        place = torch.arange(width, device=first.device)
        return self.model.step(self.state.cache, first[:, None] + place, place < counts[:, None])

    def _run_shallow(self, tokens: Tensor, positions: Tensor, running: Tensor) -> Tensor:
        """States ``[B, 1, W]`` at the exit of one token a row; where a row does not run (bool ``[B]``) it leaves no trace."""
        hidden, step = self._embed(tokens[:, None], positions, running.long())
        return self.model.run(hidden, 0, self.depth, step)

    def _run_deep(self, states: Tensor, first: Tensor, pending: Tensor) -> Tensor:
        """The full model's logits ``[B, P, V]`` from states ``[B, P, W]`` at the exit, of which the first ``pending[b]`` count."""
        return self._logits(self.model.run(states, self.depth, len(self.model), self._place(states, first, pending)))

    def _own_step(self, positions: Tensor, running: Tensor) -> Step | None:
        """Where tokens stand in the cache of the exit's head, if it has one."""
        own = self.state.own
        return None if own is None else self.model.step(own, positions[:, None], running[:, None])

    def _commit(self, written: Tensor, taken: Tensor, depths: Tensor, judged: Tensor, kept: Tensor) -> None:
        """Add what is taken of ``written`` (both ``[B, P]``), and count.

        Args:
            written: tokens.
            taken: bool, from `Rows.taken`.
            depths: that decided them.
            judged: of what an exit said, how much the full model has judged (int64 ``[B]``).
            kept: how much of that stands (int64 ``[B]``).
        """
        state = self.state
        self.count[3:5] = self.count[5:7]
        self.count[5] += judged.sum()
        self.count[6] += kept.sum()
        self.passes += state.alive.any()
        state.commit(written, taken, depths)
        self.count[0] += 1
        self.count[1] = state.alive.sum()
        self.count[2] = state.length.max()


def _at_a_time(depth: int, blocks: int) -> int:
    """How many blocks share code: as many as divide both parts of the model, at most 4, so that no others need code of their own."""
    return next(n for n in (4, 3, 2, 1) if depth % n == 0 and (blocks - depth) % n == 0)


__all__ = ["Round"]
