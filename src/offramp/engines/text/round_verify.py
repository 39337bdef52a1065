"""A round of drafts: the exit drafts, one pass behind it verifies. Without drafts it is a step of plain decoding.

`offramp.engines.text.speculate` as one graph: the rule that stops drafting is evaluated on the device. What a round computes does not
become less by it; its text is that of the reference with this rule.

Shapes: ``B`` rows, ``K`` drafts, ``W`` width of the states, ``V`` vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from offramp.backbones.decoder import Decoder
from offramp.core.types import RuleState
from offramp.engines.capture import Recorder
from offramp.engines.text.round_parts import Round
from offramp.engines.text.rows import Rows
from offramp.engines.text.sampling import Sampling, accept, accept_greedy, draw
from offramp.engines.text.speculate import Chances
from offramp.engines.text.written import Generation
from offramp.policies.decoding import Verify
from offramp.policies.draft_stop import FixedLength


class VerifyRound(Round):
    """See the module.

    Args:
        model: see `Round`.
        state: see `Round`.
        recorder: see `Round`.
        mode: the drafts, ``draft_length`` the most of any round; ``None`` = none.
    """

    def __init__(self, model: Decoder, state: Rows, recorder: Recorder, mode: Verify | None) -> None:
        super().__init__(model, state, recorder)
        self.most = 0 if mode is None else mode.draft_length
        self.mode = mode if mode is not None else Verify(1)
        self.stop = self.mode.stop
        self.fixed = isinstance(self.stop, FixedLength)
        self.sampling = state.sampling
        self.sample_drafts = self.mode.sample_drafts and self.sampling.do_sample
        self.rule: RuleState = {name: value.clone() for name, value in self._fresh_rule().items()}
        self.chances = Chances.of(state, self.mode)
        self.tried = torch.zeros(max(1, self.most), dtype=torch.int64, device=self.device)
        self.kept = torch.zeros_like(self.tried)
        wrap = recorder.wrap
        self._begin, self._draft, self._observe = wrap(self._open), wrap(self._make_draft), wrap(self._show)
        self._go, self._settle = wrap(self._decide), wrap(self._end)

    def _fresh_rule(self) -> RuleState:
        return self.stop.begin(self.state.count, self.most, self.device)

    # The pieces --------------------------------------------------------------------------------------------------------------

    def _open(self, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Position of each row's newest token, that token, and how many drafts it can still use, 0 for rows that are finished."""
        state = self.state
        first, token = self._newest()
        room = (state.limit - state.length - 1).clamp(min=0, max=length)
        return first, token, torch.where(state.alive, room, 0)

    def _make_draft(self, hidden: Tensor, noise: Tensor, positions: Tensor, running: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A draft, the distribution it is from (empty where tokens are compared instead), and how sure the exit was of it."""
        logits = self.lm.draft(hidden, self.exit_index, self._own_step(positions, running))[:, 0]
        if self.sample_drafts:
            q = self.sampling.probabilities(logits)
            token = draw(q, noise)
        else:
            token = logits.argmax(-1)
            q = Sampling().probabilities(logits) if self.sampling.do_sample else logits.new_zeros(len(logits), 0)
        if self.fixed:  # asks nothing
            return token, q, noise
        return token, q, logits.float().softmax(-1).gather(1, token[:, None]).squeeze(1)

    def _show(self, hidden: Tensor, positions: Tensor, running: Tensor) -> None:
        """Let an exit with a cache of its own see a token that it drafts nothing from."""
        self.lm.observe(hidden, self.exit_index, self._own_step(positions, running))

    def _decide(
        self, rule: RuleState, made: int, sure: Tensor, first: Tensor, drafting: Tensor, counts: Tensor, room: Tensor
    ) -> tuple[Tensor, Tensor, RuleState]:
        """After draft ``made``: which rows make another, how many each has, and the rule's state."""
        counts = counts + drafting
        go, after = self.stop.go(rule, made, sure, self.chances.at(first, made))
        return drafting & (counts < room) & go, counts, after

    def _end(self, logits: Tensor, first: Tensor, drafts: Tensor, drafted: Tensor, counts: Tensor, rule: RuleState) -> None:
        state, width = self.state, logits.shape[1]
        if self.sampling.do_sample:
            noise_at = first[:, None] + 1 + torch.arange(width, device=first.device)
            wanted = self.sampling.probabilities(logits)
            kept, after = accept(drafts, drafted, wanted, counts, state.noise.at(noise_at[:, :-1], 1), state.noise.at(noise_at, 2))
        else:
            kept, after = accept_greedy(drafts, logits.argmax(-1), counts)
        for name, value in self.stop.learn(rule, counts, kept).items():
            self.rule[name].copy_(value)
        place = torch.arange(width, device=first.device)
        if width > 1:
            self.tried[: width - 1] += (place[:-1] < counts[:, None]).sum(0)
            self.kept[: width - 1] += (place[:-1] < kept[:, None]).sum(0)
        written = torch.cat([drafts, after[:, None]], dim=1).scatter(1, kept[:, None], after[:, None])
        depths = torch.where(place < kept[:, None], self.depth, len(self.model))
        self._commit(written, state.taken(written, kept + 1), depths, torch.minimum(counts, kept + 1), kept)

    # A round -----------------------------------------------------------------------------------------------------------------

    def run(self, length: int) -> None:
        state, rule = self.state, self.rule
        first, token, room = self._begin(length)
        # Without a rule every row drafts alike: what lies beyond a row's room is thrown away with the row, and no mask is needed.
        running, drafting, counts = state.alive, room > 0, room if self.fixed else torch.zeros_like(room)
        states: list[Tensor] = []
        drafts: list[Tensor] = []
        drafted: list[Tensor] = []
        for made in range(length):
            hidden = self._shallow(token, first + made, running)
            states.append(hidden)
            chance = state.noise.at((first + made + 1)[:, None], 0).squeeze(1) if self.sample_drafts else first
            token, q, sure = self._draft(hidden, chance, first + made, running)
            drafts.append(token)
            drafted.append(q)
            if not self.fixed:
                running = drafting
                drafting, counts, rule = self._go(rule, made + 1, sure, first, drafting, counts, room)
        hidden = self._shallow(token, first + length, running)
        states.append(hidden)
        if state.own is not None:
            self._observe(hidden, first + length, running)
        logits = self._deep(torch.cat(states, dim=1), first, torch.where(state.alive, counts + 1, 0))
        tried = torch.stack(drafts, dim=1) if drafts else first.new_zeros(state.count, 0)
        q = torch.stack(drafted, dim=1) if drafted else logits.new_zeros(state.count, 0, logits.shape[-1])
        self._settle(logits, first, tried, q, counts, rule)

    def restart(self) -> None:
        super().restart()
        for name, value in self._fresh_rule().items():
            self.rule[name].copy_(value)
        self.chances.values.copy_(Chances.of(self.state, self.mode).values)
        self.tried.zero_()
        self.kept.zero_()

    def report(self, result: Generation) -> None:
        super().report(result)
        result.drafted, result.accepted = self.tried.tolist()[: self.most], self.kept.tolist()[: self.most]


__all__ = ["VerifyRound"]
