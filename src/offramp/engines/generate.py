"""generate: write text token by token, each as deep as it needs.

This is the reference: plain tensor code that runs on any device and that every faster way is tested against. Three ways to decide, over the
same cache: *plain* runs every block for every token; *accept* lets a token leave at the exit when its score reaches a threshold, and brings
the blocks behind up to date later, several tokens in one pass; *verify* (in `offramp.engines.speculate`) takes what the exit says as a
draft that the whole model confirms.

Shapes: ``B`` rows, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from offramp.core.errors import InvalidInput
from offramp.core.modes import evaluating
from offramp.engines.decoding import Generation, Rows
from offramp.engines.sampling import Sampling
from offramp.engines.speculate import Verify, speculate
from offramp.language import LanguageModel


@dataclass(frozen=True)
class Plain:
    """Every block for every token."""


@dataclass(frozen=True)
class Accept:
    """Leave at the exit when its most likely token is likely enough; what lies behind is computed later, exactly.

    The cache is then that of the full model for the text as written; the text itself may differ from the full model's.

    Attributes:
        threshold: least probability, in [0, 1]; above 1 no token leaves.
        cap: most tokens of a row that may wait for the blocks behind the exit, at least 1.
        exit_index: which exit.
    """

    threshold: float = 0.9
    cap: int = 8
    exit_index: int = 0

    def __post_init__(self) -> None:
        if self.cap < 1:
            raise InvalidInput(f"cap must be at least 1, got {self.cap}.")


Mode = Plain | Accept | Verify


def generate(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    mode: Mode | None = None,
    *,
    max_new_tokens: int = 20,
    eos_token_id: int | Sequence[int] | None = None,
    seed: int | Sequence[int] = 0,
    **sampling: Any,
) -> Generation:
    """Continue texts.

    Args:
        lm: from `attach_lm`.
        prompts: token ids, one sequence a row, of any lengths.
        mode: `Plain` (default), `Accept` or `Verify`.
        max_new_tokens: most tokens to add.
        eos_token_id: where a row ends; the model's generation configuration by default.
        seed: of the randomness; one number (each row then has its own, counted up from it) or one a row.
        sampling: fields of `Sampling`, named as in transformers' ``generate``.

    Raises:
        InvalidInput: an argument is out of range.
    """
    mode = mode if mode is not None else Plain()
    if eos_token_id is None:
        eos_token_id = getattr(getattr(lm.model, "generation_config", None), "eos_token_id", None)
    ends = [] if eos_token_id is None else [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    seeds = list(range(seed, seed + len(prompts))) if isinstance(seed, int) else list(seed)
    if not isinstance(mode, Plain):
        exits = len(lm.exits)
        if not 0 <= mode.exit_index < exits:
            raise InvalidInput(f"exit_index must be from 0 to {exits - 1}, as the model has {exits} exits; got {mode.exit_index}.")
    with torch.inference_mode(), evaluating(lm.model, lm):
        rows = Rows(
            lm,
            prompts,
            max_new_tokens,
            Sampling(**sampling),
            seeds,
            ends,
            None if isinstance(mode, Plain) else mode.exit_index,
            mode.draft_length if isinstance(mode, Verify) else 0,
        )
        first = rows.choose(rows.prefill())
        rows.append(first[:, None], torch.ones_like(rows.length), torch.full_like(first[:, None], len(rows.model)))
        if isinstance(mode, Plain):
            _plain(rows)
        elif isinstance(mode, Accept):
            _accept(rows, mode)
        else:
            speculate(rows, mode)
        return rows.done()


def _plain(rows: Rows) -> None:
    while bool(rows.alive.any()):
        one = rows.alive.long()
        hidden = rows.run(rows.length - 1, one, 1, 0, len(rows.model))
        rows.append(rows.choose(rows.model.logits(hidden[:, 0]))[:, None], one, torch.full_like(one[:, None], len(rows.model)))
        rows.result.deep_passes += 1


def _accept(rows: Rows, mode: Accept) -> None:
    """Tokens that left wait, with their states at the exit, until a row does not leave or has ``cap`` waiting; then all rows catch up.

    The catch-up also says what the full model would have chosen for each: counted in ``audited`` and ``disagreed``.
    """
    depth, blocks = rows.depth_of_exit, len(rows.model)
    waiting = torch.zeros_like(rows.length)  # states kept for each row; the newest is that of its newest token
    kept: Tensor | None = None
    row = torch.arange(rows.count, device=rows.length.device)
    while bool(rows.alive.any()):
        one = rows.alive.long()
        hidden = rows.run(rows.length - 1, one, 1, 0, depth)
        if kept is None:
            kept = hidden.new_zeros(rows.count, mode.cap, hidden.shape[2])
        kept[row, waiting.clamp(max=mode.cap - 1)] = torch.where(
            rows.alive[:, None], hidden[:, 0], kept[row, waiting.clamp(max=mode.cap - 1)]
        )
        waiting += one
        logits = rows.draft(hidden)[:, 0]
        sure = logits.float().softmax(-1).amax(-1) >= mode.threshold
        leaving = rows.alive & sure & (waiting < mode.cap)
        token, used = rows.choose(logits), torch.full_like(rows.length, depth)
        if bool((rows.alive & ~leaving).any()):
            chosen, after = _catch_up(rows, kept, waiting, leaving, blocks)
            token = torch.where(leaving, token, chosen)
            used = torch.where(leaving, used, blocks)
            waiting = after
        rows.append(token[:, None], one, used[:, None])


def _catch_up(rows: Rows, kept: Tensor, waiting: Tensor, leaving: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """Run what waits through the blocks behind the exit. Returns the full model's next token of each row, and what waits now."""
    most = int(waiting.max())
    first = rows.length - waiting
    hidden = rows.run(first, waiting, most, rows.depth_of_exit, blocks, kept[:, :most])
    logits = rows.model.logits(hidden)
    rows.result.deep_passes += 1
    if not rows.sampling.do_sample:
        place = torch.arange(most, device=first.device)
        wanted = logits.argmax(-1)  # for the token after each that waited
        written = rows.tokens.gather(1, (first[:, None] + 1 + place).clamp(max=rows.tokens.shape[1] - 1))
        looked = (place < (waiting - 1)[:, None]) & rows.alive[:, None]
        rows.result.audited += int(looked.sum())
        rows.result.disagreed += int((looked & (wanted != written)).sum())
    last = logits[torch.arange(rows.count, device=first.device), (waiting - 1).clamp(min=0)]
    return rows.choose(last), torch.zeros_like(waiting)
