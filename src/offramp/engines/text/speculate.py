"""speculate: the exit drafts, the whole model verifies; the text is the model's own, only sooner.

A round: the blocks before the exit write a few drafts, one more token's state is added, and one pass through the blocks behind the exit,
over states that the drafting left, gives the model's logits for every draft and for the token after the last. The blocks before the exit
never run twice, and rows keep as many drafts as each of them may.

How many drafts a row makes is a rule's choice (`offramp.policies.draft_stop`). The text does not depend on it when greedy, and its law does
not when sampling: whether a position is drafted is decided before its draft exists and without the numbers that will judge it, and what a
rule remembers of a round ends with the first rejected draft, so that numbers of discarded positions are as good as unseen when those
positions come again. The rule's own random numbers come from a stream of their own, from the row's seed.

Shapes: ``B`` rows, ``K`` drafts, ``V`` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.core.types import RuleState
from offramp.engines.text.rows import Rows
from offramp.engines.text.sampling import Sampling, accept, draw
from offramp.policies.decoding import Verify


@dataclass(frozen=True)
class Chances:
    """The stop rule's own random numbers: one for each row, start of a round and draft of it, from the row's seed alone.

    Attributes:
        values: ``[B, S, K]`` uniform numbers in [0, 1); ``[B, 1, 1]`` for a rule that needs none.
    """

    values: Tensor

    @classmethod
    def of(cls, rows: Rows, mode: Verify) -> Chances:
        """For the rows of a call."""
        device = rows.length.device
        if not mode.stop.random:
            return cls(torch.zeros(rows.count, 1, 1, device=device))
        # No token is ever written at position 0: its numbers are free to seed another stream.
        free = rows.noise.at(torch.zeros(rows.count, 1, dtype=torch.int64, device=device), 0).squeeze(1)
        seeds = (free.double() * 2**53).long().tolist()
        values = [torch.rand(rows.tokens.shape[1], mode.draft_length, generator=torch.Generator().manual_seed(s)) for s in seeds]
        return cls(torch.stack(values).to(device))

    def at(self, first: Tensor, made: int) -> Tensor:
        """Numbers ``[B]`` for the decision after draft ``made`` (from 1) of the round that starts at ``first`` (int64 ``[B]``).

        Every round starts further on than the last, so no number serves twice.
        """
        row = torch.arange(first.shape[0], device=first.device)
        start = first.clamp(max=self.values.shape[1] - 1)
        return self.values[row, start, min(made, self.values.shape[2]) - 1]


def speculate(rows: Rows, mode: Verify) -> None:
    """Rounds until every row is finished."""
    rows.result.drafted = [0] * mode.draft_length
    rows.result.accepted = [0] * mode.draft_length
    chances = Chances.of(rows, mode)
    state = mode.stop.begin(rows.count, mode.draft_length, rows.length.device)
    while bool(rows.alive.any()):
        state = one_round(rows, mode, chances, state)


def one_round(rows: Rows, mode: Verify, chances: Chances, state: RuleState) -> RuleState:
    """Draft, verify, append. Returns the stop rule's state for the next round."""
    alive = rows.alive
    first = rows.length - 1  # position of the newest token, which no block has seen
    room = (rows.limit - rows.length - 1).clamp(min=0, max=mode.draft_length)  # drafts that can still matter
    counts = torch.zeros_like(first)
    drafting = alive & (room > 0)
    running = alive.clone()
    states: list[Tensor] = []
    drafts: list[Tensor] = []
    drafted: list[Tensor] = []
    seen = rows.seen
    while True:
        made = len(drafts)
        hidden = rows.run(first + made, running.long(), 1, 0, rows.depth_of_exit)
        states.append(hidden)
        if not bool(drafting.any()):
            rows.observe(hidden)  # drafted from by no row, yet a draft of the next round attends to it
            break
        logits = rows.sampling.penalised(rows.draft(hidden)[:, 0], seen)
        likely = logits.float().softmax(-1)
        q, token = _draft(rows, mode, logits, first + made + 1)
        drafts.append(token)
        drafted.append(q)
        counts += drafting
        rows.tokens.scatter_(1, (first + made + 1)[:, None], token[:, None])
        if rows.sampling.repetition_penalty != 1.0:
            seen = seen.scatter(1, token[:, None], True)
        running = drafting
        sure = likely.gather(1, token[:, None]).squeeze(1)
        go, state = mode.stop.go(state, len(drafts), sure, chances.at(first, len(drafts)))
        drafting = drafting & (counts < room) & go
    kept = _verify(rows, first, counts, states, drafts, drafted)
    return mode.stop.learn(state, counts, kept)


def _draft(rows: Rows, mode: Verify, logits: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """The distribution ``[B, V]`` a draft is drawn from, and the draft (int64 ``[B]``)."""
    if rows.sampling.do_sample and mode.sample_drafts:
        q = rows.sampling.probabilities(logits)
        return q, draw(q, rows.noise.at(positions[:, None], 0).squeeze(1))
    q = Sampling().probabilities(logits)
    return q, q.argmax(-1)


def _verify(rows: Rows, first: Tensor, counts: Tensor, states: list[Tensor], drafts: list[Tensor], drafted: list[Tensor]) -> Tensor:
    """The deep pass; appends what is kept and the token after it. Returns how many drafts each row kept (int64 ``[B]``)."""
    blocks = len(rows.model)
    pending = torch.where(rows.alive, counts + 1, 0)
    hidden = rows.run(first, pending, len(states), rows.depth_of_exit, blocks, torch.cat(states, dim=1))
    logits = rows.model.logits(hidden)
    rows.result.deep_passes += 1
    if rows.sampling.repetition_penalty != 1.0:  # a position knows the drafts before it
        seen = [rows.seen]
        for token in drafts:
            seen.append(seen[-1].scatter(1, token[:, None], True))
        logits = rows.sampling.penalised(logits, torch.stack(seen, dim=1))
    wanted = rows.sampling.probabilities(logits)
    tried = torch.stack(drafts, dim=1) if drafts else first.new_zeros(rows.count, 0)
    q = torch.stack(drafted, dim=1) if drafted else wanted[:, :0]
    noise_at = first[:, None] + 1 + torch.arange(len(drafts) + 1, device=first.device)
    kept, after = accept(tried, q, wanted, counts, rows.noise.at(noise_at[:, :-1], 1), rows.noise.at(noise_at, 2))
    for k in range(len(drafts)):
        rows.result.drafted[k] += int((rows.alive & (counts > k)).sum())
        rows.result.accepted[k] += int((rows.alive & (kept > k)).sum())
    written = torch.cat([tried, after[:, None]], dim=1).scatter(1, kept[:, None], after[:, None])
    depths = torch.where(torch.arange(len(drafts) + 1, device=first.device) < kept[:, None], rows.depth_of_exit, blocks)
    rows.append(written, kept + 1, depths)
    return kept
