"""A round of tokens that leave: the exit writes while it is sure enough, then one pass behind it catches up with them.

`offramp.engines.text.accept` as one graph, for one exit whose tokens wait and catch up. Leaving so is drafting without rejection: a row
takes the exit's token at place after place while its score reaches the threshold. The pass behind the exit then runs over the states of all
of them and of the first that was not sure enough, whose token is the full model's; if all were sure, over all of them, and the last token
is the exit's too. What the full model says at the other places is the audit.

A row's text does not depend on how long its rounds are: which tokens leave is decided place by place, and each place has its own random
number, whoever draws with it. With several rows fewer passes are made than the reference makes, in which a row that needs the full model
takes all others along.

Shapes: ``B`` rows, ``P`` places, ``V`` vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from offramp.backbones.decoder import Decoder
from offramp.core.types import Readout
from offramp.engines.capture import Recorder
from offramp.engines.text.accept import exits_used
from offramp.engines.text.round_parts import Round
from offramp.engines.text.rows import Rows
from offramp.engines.text.written import Audit, Generation
from offramp.language import LanguageModel
from offramp.policies.decoding import Accept, Adapting, CatchUp, Decaying


def fits(lm: LanguageModel, mode: Accept) -> bool:
    """Whether rounds can let tokens leave so: by one exit, with `CatchUp`, at thresholds that do not follow the text.

    Other fills run or write something behind the exit at every token; several exits would each need a pass of their own; and a threshold
    that adapts is fitted on the host.
    """
    return isinstance(mode.fill, CatchUp) and not isinstance(mode.threshold, Adapting) and len(exits_used(lm, mode)) == 1


class AcceptRound(Round):
    """See the module.

    Args:
        model: see `Round`.
        state: see `Round`; its exit is the one that ``mode`` uses.
        recorder: see `Round`.
        mode: for which `fits` holds.
    """

    def __init__(self, model: Decoder, state: Rows, recorder: Recorder, mode: Accept) -> None:
        super().__init__(model, state, recorder)
        self.rule, self.threshold = mode.rule, mode.threshold
        number = self.threshold[0] if isinstance(self.threshold, tuple) else self.threshold
        self.constant = torch.full_like(state.start, number if isinstance(number, int | float) else 0.0, dtype=torch.float32)
        # Of the exit's look at each token of a text; the last column takes what belongs to none.
        self.score = torch.full(state.tokens.shape, torch.nan, device=self.device)
        self.agreed = torch.zeros(state.tokens.shape, dtype=torch.bool, device=self.device)
        wrap = recorder.wrap
        self._begin, self._look, self._settle = wrap(self._open), wrap(self._ask), wrap(self._end)

    # The pieces --------------------------------------------------------------------------------------------------------------

    def _open(self) -> tuple[Tensor, Tensor, Tensor]:
        """Position of each row's newest token, that token, and how many looks the row has had in this round: none."""
        first, token = self._newest()
        return first, token, torch.zeros_like(first)

    def _ask(self, hidden: Tensor, positions: Tensor, looks: Tensor, running: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The exit looks at the tokens at ``positions`` of the rows that run.

        Returns:
            What it chooses to follow them, its score, how many looks each row has had, and which rows go on: those whose token left.
        """
        state = self.state
        logits = self.lm.draft(hidden, self.exit_index, self._own_step(positions, running))[:, 0]
        begun = self.rule.begin(state.count, self.device)
        score, _ = self.rule.score(self.exit_index, Readout(logits, hidden[:, 0]), begun)
        choice = state.wanted(logits[:, None], positions[:, None] + 1).squeeze(1)
        return choice, score.float(), looks + running, running & (score >= self._least(positions + 1 - state.start))

    def _least(self, place: Tensor) -> Tensor:
        """The score that new token ``place`` (int64 ``[B]``, from 0) needs to leave."""
        if isinstance(self.threshold, Decaying):
            return self.threshold.at(place, self.state.limit - self.state.start)
        return self.constant

    def _end(self, logits: Tensor, first: Tensor, choices: Tensor, scores: Tensor, looks: Tensor, running: Tensor) -> None:
        """Judge and write, from the full model's logits ``[B, P, V]``, choices and scores ``[B, P]``, and the last outcome of `_ask`."""
        state = self.state
        place = torch.arange(logits.shape[1], device=first.device)
        wanted = state.wanted(logits, first[:, None] + 1 + place)
        left = looks - (state.alive & ~running).long()  # of each row; all but its last look, or all
        written = torch.where(place < left[:, None], choices, wanted)
        taken = state.taken(written, looks)
        at = torch.where(taken, state.length[:, None] + place, state.tokens.shape[1] - 1)
        self.score.scatter_(1, at, scores)
        self.agreed.scatter_(1, at, choices == wanted)
        self._commit(written, taken, torch.where(place < left[:, None], self.depth, len(self.model)), looks, left)

    # A round -----------------------------------------------------------------------------------------------------------------

    def run(self, length: int) -> None:
        first, token, looks = self._begin()
        running = self.state.alive
        states: list[Tensor] = []
        choices: list[Tensor] = []
        scores: list[Tensor] = []
        for place in range(length + 1):
            hidden = self._shallow(token, first + place, running)
            token, score, looks, running = self._look(hidden, first + place, looks, running)
            states.append(hidden)
            choices.append(token)
            scores.append(score)
        logits = self._deep(torch.cat(states, dim=1), first, looks)
        self._settle(logits, first, torch.stack(choices, dim=1), torch.stack(scores, dim=1), looks, running)

    def report(self, result: Generation) -> None:
        super().report(result)
        count = len(result.tokens)
        start = torch.tensor([len(p) for p in result.prompts])
        end = start + torch.tensor([len(t) for t in result.tokens])
        score, agreed, depth = (of[:count].cpu() for of in (self.score, self.agreed, self.state.depth))
        column = torch.arange(score.shape[1])
        looked = (column > start[:, None]) & (column < end[:, None])  # the prompt's pass decides each row's first token
        at = looked.nonzero()
        left = depth[looked] < len(self.model)
        result.audit = Audit(
            at[:, 0], at[:, 1] - start[at[:, 0]], torch.full_like(at[:, 0], self.exit_index), score[looked], agreed[looked], left
        )
        result.audited, result.disagreed = int(left.sum()), int((left & ~agreed[looked]).sum())
        result.scores = [[torch.nan, *row[first + 1 : last].tolist()] for row, first, last in zip(score, start, end, strict=True)]


__all__ = ["AcceptRound", "fits"]
