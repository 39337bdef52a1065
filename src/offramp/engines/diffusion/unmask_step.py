"""One step of filling in masks: rows of a batch through all blocks, each computing as many positions as it needs.

Rows are in one of two groups. *Whole* rows compute every position; *narrow* ones a few, over what the cache holds of the others. A narrow
row whose attention drifts at a block becomes whole there. Blocks are run once for each group that has rows.

Shapes: ``B`` rows, ``R`` of them in a call, ``T`` positions, ``Q`` computed, ``C`` candidates, ``L`` blocks, ``W`` width of the states,
``H`` heads, ``D`` their width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from offramp.backbones.masked_lm import Call, Look, MaskedLM
from offramp.backbones.state_cache import StateCache
from offramp.policies.refresh import DriftTest


@dataclass
class Texts:
    """The rows at work; every tensor has a row for each.

    Attributes:
        cache: what blocks know of them.
        ragged: whether they are of unlike length.
        ids: int64 ``[B]``, which prompt each is.
        tokens: int64 ``[B, T + 1]``; the last column takes what does not count.
        start: int64 ``[B]``, length of the prompt.
        total: int64 ``[B]``, positions of the text.
        masked: bool ``[B, T]``, still to be filled in.
        recent: bool ``[B, T]``, filled in at the last step.
        age: int64 ``[B]``, see `offramp.policies.refresh.Progress`; -1 = nothing has been computed yet.
        low: int64 ``[B]``, see `Progress.refreshed_low` there.
        tracked: int64 ``[B, L - 1]``, the token whose attention is watched in each block; no columns without a drift test.
        queries: ``[B, L - 1, H, D]``, its queries when its block was last computed for every position.
        reference: float32 ``[B, L - 1, T]``, what it attended to when its block was last computed for every position, or the step before.
        steps: int64 ``[B]``.
        pairs: int64 ``[B]``, (position, block) pairs that were computed.
        looks: int64 ``[B]``, attention rows that were looked at.
        read: int64 ``[B]``, candidates whose logits were computed.
    """

    cache: StateCache
    ragged: bool
    ids: Tensor
    tokens: Tensor
    start: Tensor
    total: Tensor
    masked: Tensor
    recent: Tensor
    age: Tensor
    low: Tensor
    tracked: Tensor
    queries: Tensor
    reference: Tensor
    steps: Tensor
    pairs: Tensor
    looks: Tensor
    read: Tensor

    @property
    def length(self) -> int:
        """``T``."""
        return self.masked.shape[1]

    @property
    def valid(self) -> Tensor:
        """Positions (bool ``[B, T]``) that are part of each text."""
        return torch.arange(self.length, device=self.total.device) < self.total[:, None]

    def take(self, rows: Tensor) -> Texts:
        """Some rows alone (int64)."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        kept = {name: t[rows] for name, t in tensors.items() if isinstance(t, Tensor)}
        return replace(self, **{**tensors, **kept, "cache": self.cache.take(rows)})


@dataclass
class _Group:
    """Rows (int64 ``[R]``) that compute as many positions, and their states ``[R, Q, W]``."""

    rows: Tensor
    hidden: Tensor


def first_places(wanted: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Places of the true entries of ``wanted`` (bool ``[B, T]``), ascending, ``width`` of each row; and which of them are such.

    Returns:
        int64 and bool ``[B, width]``.
    """
    places = (~wanted).to(torch.int8).argsort(dim=1, stable=True)[:, :width]
    return places, torch.arange(width, device=wanted.device) < wanted.sum(1)[:, None]


class UnmaskStep:
    """One pass of a batch through all blocks. The host looks once a block, at which rows drift, and without a drift test not at all.

    Args:
        lm: the model.
        texts: the rows; what is known of them is brought up to date.
        test: of drift, or `None`.
        candidates: bool ``[B, T]``, whose states are asked for; at most ``most`` in a row.
        need: bool ``[B, T]``, what narrow rows compute, candidates included, and the watched tokens if they are to be fresh; at most
            ``width`` in a row that is not due.
        due: which rows are whole from the first block on.
        width: see ``need``.
        most: see ``candidates``.

    Attributes:
        candidates: int64 ``[B, C]``, their positions, ascending.
        counted: bool ``[B, C]``, which of them there are.
        origin: int64 ``[B]``, the block from which on keys and values of every position are new: 0 = all, ``L`` = none.
    """

    def __init__(
        self,
        lm: MaskedLM,
        texts: Texts,
        test: DriftTest | None,
        candidates: Tensor,
        need: Tensor,
        due: Sequence[bool],
        width: int,
        most: int,
    ) -> None:
        self.lm, self.texts, self.test = lm, texts, test
        self.candidates, self.counted = first_places(candidates, most)
        self.places, there = first_places(need, width)
        self.slots = torch.where(there, self.places, texts.cache.nowhere)
        self.needed = need.sum(1)
        self.rank = need.cumsum(1) - 1  # where a needed position stands among them
        self.everywhere = torch.arange(texts.length, device=need.device)
        self.mask = texts.valid[:, None, None] if texts.ragged else None
        whole, narrow = (
            torch.tensor([row for row, d in enumerate(due) if bool(d) == wanted], dtype=torch.int64, device=need.device)
            for wanted in (True, False)
        )
        self.origin = torch.full((len(due),), len(lm), device=need.device)
        self.origin[whole] = 0
        self.whole = _Group(whole, self._embed(self._call(whole)))
        self.narrow = _Group(narrow, self._embed(self._call(narrow, self.places[narrow], self.slots[narrow])))

    def run(self) -> Tensor:
        """States ``[B, C, W]`` of the candidates behind the last block; those that are not there have any."""
        for k in range(len(self.lm)):
            if len(self.narrow.rows):
                self._narrow(k)
            if len(self.whole.rows):
                self._whole(k)
        width = self.places.shape[1]
        found = self.whole.hidden.new_zeros(*self.candidates.shape, self.whole.hidden.shape[2])
        for group, places in (
            (self.whole, self.candidates[self.whole.rows]),
            (self.narrow, self.rank[self.narrow.rows].gather(1, self.candidates[self.narrow.rows]).clamp(0, width - 1)),
        ):
            found[group.rows] = group.hidden.gather(1, places[..., None].expand(-1, -1, found.shape[2]))
        return found

    def _call(self, rows: Tensor, positions: Tensor | None = None, slots: Tensor | None = None) -> Call:
        positions = self.everywhere.expand(len(rows), -1) if positions is None else positions
        return Call(self.texts.cache, rows, positions, slots, None if self.mask is None else self.mask[rows])

    def _embed(self, call: Call) -> Tensor:
        return self.lm.embed(self.texts.tokens[call.rows].gather(1, call.positions), call)

    def _tests(self, block: int) -> bool:
        """Whether attention is watched in a block: behind the last one there is nothing to compute again."""
        return self.test is not None and block < len(self.lm) - 1

    def _whole(self, block: int) -> None:
        """Run a block on every position of the whole rows; choose what is watched there from now on."""
        texts, rows = self.texts, self.whole.rows
        call = self._call(rows)
        if self._tests(block):
            call.watch = lambda look: self._choose(block, rows, look)
            texts.looks[rows] += self.counted[rows].sum(1) + 1
        self.whole.hidden = self.lm.run(self.whole.hidden, block, call)
        texts.pairs[rows] += texts.total[rows]

    def _choose(self, block: int, rows: Tensor, look: Look) -> None:
        """Of what is written, the token that the candidates attend to most; and what it attends to now."""
        texts = self.texts
        received = (look.rows(look.queries(self.candidates[rows])) * self.counted[rows, :, None]).sum(1)
        written = (texts.tokens[rows, : texts.length] != self.lm.mask_token_id) & texts.valid[rows]
        token = received.masked_fill(~written, -1.0).argmax(1)
        query = look.queries(token[:, None])
        texts.tracked[rows, block], texts.queries[rows, block] = token, query[:, :, 0]
        texts.reference[rows, block] = look.rows(query)[:, 0]

    def _narrow(self, block: int) -> None:
        """Run a block on the needed positions of the narrow rows; those that drift are whole from this block on."""
        texts, rows = self.texts, self.narrow.rows
        call = self._call(rows, self.places[rows], self.slots[rows])
        cosine: list[Tensor] = []
        if self._tests(block):
            call.watch = lambda look: cosine.append(self._compare(block, rows, look))
            texts.looks[rows] += 1
        self.narrow.hidden = self.lm.run(self.narrow.hidden, block, call)
        texts.pairs[rows] += self.needed[rows]
        if self.test is None or not cosine:
            return
        stays = cosine[0] >= self.test.least  # what is not a number does not stay
        drifting = (~stays).nonzero().squeeze(1)
        if not len(drifting):
            return
        moved, kept = rows[drifting], stays.nonzero().squeeze(1)
        self.origin[moved] = block + 1
        self.narrow = _Group(rows[kept], self.narrow.hidden[kept])
        before = texts.cache.kept(block, moved)
        self.whole = _Group(torch.cat([self.whole.rows, moved]), torch.cat([self.whole.hidden, before]))

    def _compare(self, block: int, rows: Tensor, look: Look) -> Tensor:
        """Cosine ``[R]`` of what the watched tokens attend to now and then."""
        if self.test is not None and self.test.fresh:
            query = look.queries(self.rank[rows].gather(1, self.texts.tracked[rows, block, None]))
        else:
            query = self.texts.queries[rows, block][:, :, None]
        now = look.rows(query)[:, 0]
        cosine = F.cosine_similarity(now, self.texts.reference[rows, block], dim=1)
        if self.test is not None and self.test.rolling:
            self.texts.reference[rows, block] = now
        return cosine
