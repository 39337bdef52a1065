"""What a decoding run gives back: the texts, how deep each token went, and what was seen on the way."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from offramp.policies.decoding import Adapting


class Streamer(Protocol):
    """What is told of new tokens while they are written; transformers' streamers are such."""

    def put(self, value: Tensor) -> None:
        """Take tokens on the CPU: the prompt ``[1, P]`` first, then what is written ``[N]``, one or more at a time."""

    def end(self) -> None:
        """Nothing follows."""


@dataclass(frozen=True)
class Audit:
    """Every look of an exit at a token that a full pass has judged since, row by row; ``N`` looks.

    Attributes:
        row: int64 ``[N]``, of the batch.
        place: int64 ``[N]``, which new token of the row was being chosen, from 0.
        exit_index: int64 ``[N]``, which exit looked.
        score: float32 ``[N]``, higher = surer.
        agreed: bool ``[N]``, whether the exit chose what the full model chooses there.
        left: bool ``[N]``, whether the token left there.
    """

    row: Tensor
    place: Tensor
    exit_index: Tensor
    score: Tensor
    agreed: Tensor
    left: Tensor

    def __len__(self) -> int:
        return int(self.row.numel())


def _no_audit() -> Audit:
    none = torch.zeros(0, dtype=torch.int64)
    return Audit(none, none, none, none.float(), none.bool(), none.bool())


@dataclass
class Generation:
    """What was written.

    Attributes:
        tokens: new token ids of each row, up to and with the end token.
        depth: for each of them how many blocks had run when it was decided.
        scores: for each of them the score of the last exit that looked at it, NaN where none did; empty for ways without scores.
        drafted: drafts tried at each place of a round, from the first on.
        accepted: how many of them were kept.
        audited: tokens that left at an exit and that a full pass has looked at since.
        disagreed: those of them that the full model would have chosen otherwise.
        audit: every look that was judged so, to set thresholds by.
        learned: a threshold that adapts, after this run: what was given, having seen the audit. Give it to the next run.
        deep_passes: passes over the blocks behind the last exit used; of plain and scheduled decoding, all steps.
        row_passes: rows times the deep passes over them; ``None`` where all rows were written together, which is `deep_passes` times
            the rows.
        blocks_run: blocks times tokens that ran after the prompts, catching up and rejected drafts included; 0 where it is not counted
            (captured rounds).
        blocks_projected: blocks times tokens of which only keys and values were made.
        blocks_plain: blocks times tokens that plain decoding would run for these texts; 0 where it is not counted.
        prompt_s: seconds that the prompts took, until every row had its first token; all parts of a large batch together.
        prompts: token ids of each row's prompt.
        pad_token_id: what fills `sequences`.
    """

    tokens: list[list[int]]
    depth: list[list[int]]
    scores: list[list[float]] = field(default_factory=list)
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    audited: int = 0
    disagreed: int = 0
    audit: Audit = field(default_factory=_no_audit)
    learned: Adapting | None = None
    deep_passes: int = 0
    row_passes: int | None = None
    blocks_run: int = 0
    blocks_projected: int = 0
    blocks_plain: int = 0
    prompt_s: float = field(default=0.0, compare=False)
    prompts: list[list[int]] = field(default_factory=list)
    pad_token_id: int = 0

    @property
    def sequences(self) -> Tensor:
        """Prompts and new tokens, int64 ``[B, P + N]``: prompts padded on the left, new tokens on the right, as transformers has them."""
        before, after = max(map(len, self.prompts)), max(map(len, self.tokens))
        pad = self.pad_token_id
        rows = zip(self.prompts, self.tokens, strict=True)
        return torch.tensor([[pad] * (before - len(p)) + p + new + [pad] * (after - len(new)) for p, new in rows])

    @property
    def acceptance(self) -> float:
        """Share of tried drafts that were kept."""
        return sum(self.accepted) / max(1, sum(self.drafted))

    @property
    def tokens_per_pass(self) -> float:
        """New tokens for each deep pass of a row."""
        passes = self.row_passes if self.row_passes is not None else self.deep_passes * len(self.tokens)
        return sum(map(len, self.tokens)) / max(1, passes)

    @property
    def mean_depth(self) -> float:
        """Blocks after which a new token was decided, on average, the first of each row left out: the prompt's pass decides it."""
        depths = list(self._later_depths())
        return sum(depths) / len(depths) if depths else math.nan

    @property
    def blocks_share(self) -> float:
        """`blocks_run` over `blocks_plain`; NaN where nothing was counted. Heads are apart."""
        return self.blocks_run / self.blocks_plain if self.blocks_plain else math.nan

    def _later_depths(self) -> Iterator[int]:
        for row in self.depth:
            yield from row[1:]
