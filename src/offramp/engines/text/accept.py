"""accept: a token leaves at the first exit that is sure enough, and the blocks behind are brought up to date as the fill says.

The blocks run segment by segment, exit by exit, until every row's token has left or the model has run to its end; it runs to its end also
when a row has as many tokens waiting as it may. A pass that reaches the end over tokens that left says for free what the full model would
have chosen for them: they are audited.

A row's text depends on that row alone. When other rows make a segment run, a row's waiting tokens are taken along, and what it chose
stays. A threshold that adapts is each row's own, and when it chooses at a position it knows what was seen ``cap`` positions and more back:
by then those have been judged, whatever the others did.

Shapes: ``B`` rows, ``E`` exits used, ``S`` positions, ``Q`` tokens of a row in one pass, ``V`` vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from offramp.core.errors import InvalidInput
from offramp.core.types import Readout, RuleState
from offramp.engines.text.fills import Filling, Pass, filling
from offramp.engines.text.rows import Rows
from offramp.engines.text.written import Audit
from offramp.language import LanguageModel
from offramp.policies.decoding import Accept, Adapting, Copy, Decaying


def exits_used(lm: LanguageModel, mode: Accept) -> tuple[int, ...]:
    """Numbers of the exits that are used.

    Raises:
        InvalidInput: the model lacks one, there is not one threshold for each, or the rule needs one that is left out.
    """
    have = len(lm.exits)
    used = mode.exits if mode.exits is not None else tuple(range(have))
    if not used or used[-1] >= have:
        raise InvalidInput(f"exits must be numbers from 0 to {have - 1}, as the model has {have} exits; got {list(used)}.")
    if isinstance(mode.threshold, tuple) and len(mode.threshold) != len(used):
        raise InvalidInput(f"{len(mode.threshold)} thresholds were given for {len(used)} exits; give one number, or one for each exit.")
    if mode.rule.stateful and used != tuple(range(len(used))):
        raise InvalidInput(
            f"{type(mode.rule).__name__} compares an exit with those before it, so none may be left out before the last one used; got "
            f"exits {list(used)}."
        )
    return used


def accept(rows: Rows, mode: Accept) -> None:
    """Write until every row is finished, then bring the cache up to date, so that it is whole and every token has been looked at."""
    fill, looks = filling(rows, mode.fill), _Looks(rows, mode)
    while bool(rows.alive.any()):
        token, depth = _choose(rows, fill, looks)
        fill.settle()
        rows.append(token[:, None], rows.alive.long(), depth[:, None])
    rest = fill.finish()
    if rest is not None:
        looks.judge(rest)
        rows.result.deep_passes += 1
    looks.report()


def _choose(rows: Rows, fill: Filling, looks: _Looks) -> tuple[Tensor, Tensor]:
    """The next token of each row and the depth that decided it (int64 ``[B]``)."""
    token, depth = torch.zeros_like(rows.length), torch.full_like(rows.length, len(rows.model))
    going, any_going = rows.alive, True
    state, thresholds = looks.begin()
    for segment, exit_index in enumerate(rows.exits):
        passed = fill.run(segment, going)
        if not any_going:  # a full pass over what waits: nobody asks this exit, but its head has to see them
            rows.observe(passed.states, exit_index)
            continue
        newest = rows.newest(*passed, exit_index)
        leaving, choice, state = looks.at(segment, newest, going, state, thresholds[:, segment])
        fill.leave(segment, leaving, newest)
        token, depth = torch.where(leaving, choice, token), torch.where(leaving, fill.cuts[segment + 1], depth)
        going = going & ~leaving
        any_going = bool(going.any())
        if not any_going and not fill.full():
            return token, depth
    passed = fill.run(fill.last, going)
    rows.result.deep_passes += 1
    return torch.where(going, looks.judge(passed), token), depth


class _Looks:
    """What exits saw, chose and were judged to be, by position of the token whose state they read."""

    def __init__(self, rows: Rows, mode: Accept) -> None:
        self.rows, self.mode = rows, mode
        self.exits = len(rows.exits)
        self.cap = 1 if isinstance(mode.fill, Copy) else mode.fill.cap
        shape = (*rows.tokens.shape, self.exits)
        device = rows.length.device
        self.score = torch.full(shape, torch.nan, device=device)
        self.choice = torch.full(shape, -1, dtype=torch.int64, device=device)  # -1: did not look
        self.agreed = torch.zeros(shape, dtype=torch.bool, device=device)
        self.judged = torch.zeros(shape[:2], dtype=torch.bool, device=device)
        self.left = torch.full(shape[:2], self.exits, dtype=torch.int64, device=device)
        self.row = torch.arange(rows.count, device=device)
        self.own: list[Adapting] = [mode.threshold] * rows.count if isinstance(mode.threshold, Adapting) else []

    def begin(self) -> tuple[RuleState, Tensor]:
        """A new token: the rule's state, and the threshold of each row at each exit, float32 ``[B, E]``."""
        rows, given = self.rows, self.mode.threshold
        state = self.mode.rule.begin(rows.count, rows.length.device)
        if isinstance(given, Decaying):
            by_row = given.at(rows.length - rows.start, rows.limit - rows.start)
        elif isinstance(given, Adapting):
            self._learn()
            by_row = torch.tensor([t.threshold() for t in self.own], dtype=torch.float32, device=rows.length.device)
        else:
            numbers = given if isinstance(given, tuple) else (given,) * self.exits
            return state, torch.tensor(numbers, dtype=torch.float32, device=rows.length.device).expand(rows.count, -1)
        return state, by_row[:, None].expand(-1, self.exits)

    def _learn(self) -> None:
        """Each row that is alive learns what was seen ``cap`` positions before its newest token."""
        rows = self.rows
        place = rows.length - 1 - self.cap
        for b in (rows.alive & (place >= rows.start)).nonzero().flatten().tolist():
            p = int(place[b])
            looked = self.choice[b, p] >= 0
            self.own[b] = self.own[b].seen(self.score[b, p][looked], self.agreed[b, p][looked])

    def at(self, number: int, newest: Tensor, going: Tensor, state: RuleState, threshold: Tensor) -> tuple[Tensor, Tensor, RuleState]:
        """One exit looks at the newest tokens.

        Args:
            number: of the exit among those used.
            newest: states ``[B, 1, W]``.
            going: rows that have not left (bool ``[B]``).
            state: of the rule.
            threshold: float32 ``[B]``.

        Returns:
            Which rows leave (bool ``[B]``), what the exit chose (int64 ``[B]``), and the rule's next state.
        """
        rows, exit_index = self.rows, self.rows.exits[number]
        logits = rows.draft(newest, exit_index)[:, 0]
        score, state = self.mode.rule.score(exit_index, Readout(logits, newest[:, 0]), state)
        choice = rows.choose(logits)
        leaving = going & (score >= threshold)
        place = torch.where(going, rows.length - 1, self.score.shape[1] - 1)  # the last column is read by nobody
        self.score[self.row, place, number] = score.float()
        self.choice[self.row, place, number] = choice
        self.left[self.row, place] = torch.where(leaving, number, self.exits)
        return leaving, choice, state

    def judge(self, passed: Pass) -> Tensor:
        """Compare what exits chose with the full model, from its last states. Returns the newest tokens that it chooses, int64 ``[B]``.

        The text before a token is as it was written. Under `Copy` earlier keys and values are not the full model's, so nothing is judged.
        """
        rows, (states, first, counts) = self.rows, passed
        offset = torch.arange(states.shape[1], device=first.device)
        place = first[:, None] + offset
        wanted = rows.wanted(rows.model.logits(states), place + 1)
        if not isinstance(self.mode.fill, Copy):
            place = torch.where(offset < counts[:, None], place, self.score.shape[1] - 1)
            at = (self.row[:, None], place)
            self.agreed[at] = self.choice[at] == wanted[..., None]
            self.judged[at] = offset < counts[:, None]
        return wanted.gather(1, (counts - 1).clamp(min=0)[:, None]).squeeze(1)

    def report(self) -> None:
        """Write down what was seen."""
        rows, result = self.rows, self.rows.result
        number = torch.arange(self.exits, device=self.row.device)
        looked = (self.choice >= 0) & self.judged[..., None]
        looked[:, -1] = False
        at = looked.nonzero()
        left = self.left[..., None] == number
        used = torch.tensor(rows.exits, device=self.row.device)
        result.audit = Audit(
            at[:, 0].cpu(),
            (at[:, 1] + 1 - rows.start[at[:, 0]]).cpu(),
            used[at[:, 2]].cpu(),
            self.score[looked].cpu(),
            self.agreed[looked].cpu(),
            left[looked].cpu(),
        )
        result.audited = int((looked & left).sum())
        result.disagreed = int((looked & left & ~self.agreed).sum())
        last = self.left.clamp(max=self.exits - 1)
        scores = self.score.gather(2, last[..., None]).squeeze(2)
        for b in range(rows.count):
            first, end = int(rows.start[b]), int(rows.length[b])
            result.scores.append([float("nan"), *scores[b, first : end - 1].tolist()])
        if isinstance(self.mode.threshold, Adapting):
            result.learned = self.mode.threshold.seen(result.audit.score, result.audit.agreed)
