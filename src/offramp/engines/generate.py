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
from offramp.engines.arguments import StopStrings, settings, token_ids
from offramp.engines.decoding import Generation, Rows, Streamer
from offramp.engines.speculate import Verify, speculate
from offramp.language import LanguageModel


@dataclass(frozen=True)
class Plain:
    """Every block for every token."""


@dataclass(frozen=True)
class Accept:
    """Leave at the exit when its most likely token is likely enough; what lies behind is computed later, exactly.

    The cache is then that of the full model for the text as written; the text itself may differ from the full model's. Which tokens leave
    depends on the row alone: when others make the blocks behind the exit run, a row catches up with them and its choices stay.

    Attributes:
        threshold: least probability, at least 0; above 1 no token leaves.
        cap: most tokens of a row that may wait for the blocks behind the exit, at least 1.
        exit_index: which exit.
    """

    threshold: float = 0.9
    cap: int = 8
    exit_index: int = 0

    def __post_init__(self) -> None:
        if self.cap < 1 or not self.threshold >= 0:
            raise InvalidInput(f"cap must be at least 1 and threshold at least 0, got cap={self.cap} and threshold={self.threshold}.")


Mode = Plain | Accept | Verify


def generate(
    lm: LanguageModel,
    prompts: Any = None,
    mode: Mode | None = None,
    *,
    input_ids: Any = None,
    attention_mask: Any = None,
    tokenizer: Any = None,
    max_new_tokens: int | None = None,
    max_length: int | None = None,
    do_sample: bool | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    stop_strings: str | Sequence[str] | None = None,
    streamer: Streamer | None = None,
    generation_config: Any = None,
    seed: int | Sequence[int] = 0,
    **others: Any,
) -> Generation:
    """Continue texts. Names and defaults are those of transformers' ``generate``.

    What is not given comes from ``generation_config``, then from the model's own, then from transformers' defaults (among them
    ``top_k=50`` when sampling).

    Args:
        lm: from `attach_lm`.
        prompts: token ids, one list a row, of any lengths; or a tensor ``[B, P]`` with ``attention_mask``, padded on either side; or texts
            with ``tokenizer``; or what a tokenizer answers.
        mode: `Plain` (default), `Accept` or `Verify`.
        input_ids: another name of ``prompts``, so that ``**tokenizer(texts, return_tensors="pt", padding=True)`` can be given.
        attention_mask: 0 where a tensor is padded.
        tokenizer: of transformers, for texts and ``stop_strings``.
        max_new_tokens: most tokens to add to a row.
        max_length: most tokens of a row, the longest prompt included; ``max_new_tokens`` goes before it.
        do_sample: draw; else the most likely token.
        temperature: see `Sampling`.
        top_k: see `Sampling`; 0 = all.
        top_p: see `Sampling`.
        repetition_penalty: see `Sampling`; padding does not count as having occurred.
        eos_token_id: token or tokens that end a row; none with an empty list.
        pad_token_id: fills `Generation.sequences`; the first end token by default.
        stop_strings: texts that end a row as soon as a token completes one.
        streamer: told of the prompt and of new tokens as they are written, a few at a time when drafts are kept; one prompt only.
        generation_config: settings that go before the model's.
        seed: of the randomness; one number (each row then has its own, counted up from it) or one a row.
        others: arguments of transformers that are not supported here are refused, unless they change nothing.

    Raises:
        InvalidInput: an argument is out of range, unknown or not supported; says which.
    """
    mode = mode if mode is not None else Plain()
    if not isinstance(mode, Plain | Accept | Verify):
        raise InvalidInput(f"mode must be Plain(), Accept(...) or Verify(...), got {mode!r}.")
    if (prompts is None) == (input_ids is None):
        raise InvalidInput("Give prompts or input_ids, one of them.")
    given = {
        "max_new_tokens": max_new_tokens,
        "max_length": max_length,
        "do_sample": do_sample,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "repetition_penalty": repetition_penalty,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
        "stop_strings": stop_strings,
    }
    asked = settings(lm.model, given, others, generation_config)
    texts = token_ids(prompts if input_ids is None else input_ids, attention_mask, tokenizer, asked.pad, asked.ends)
    most = lm.decoder.max_positions
    if not isinstance(mode, Plain) and not 0 <= mode.exit_index < len(lm.exits):
        raise InvalidInput(
            f"exit_index must be from 0 to {len(lm.exits) - 1}, as the model has {len(lm.exits)} exits; got {mode.exit_index}."
        )
    with torch.inference_mode(), evaluating(lm.model, lm):
        rows = Rows(
            lm,
            texts,
            asked.new_tokens(max(map(len, texts)), most),
            asked.sampling,
            _seeds(seed, len(texts)),
            asked.ends,
            None if isinstance(mode, Plain) else mode.exit_index,
            mode.draft_length if isinstance(mode, Verify) else 0,
            stops=StopStrings(tokenizer, asked.stop_strings) if asked.stop_strings else None,
            streamer=streamer,
        )
        rows.result.pad_token_id = asked.filling
        write(rows, mode)
        return rows.done()


def _seeds(seed: int | Sequence[int], rows: int) -> list[int]:
    if isinstance(seed, int):
        return list(range(seed, seed + rows))
    if not isinstance(seed, Sequence) or not all(isinstance(s, int) for s in seed):
        raise InvalidInput(f"seed must be a whole number, or one for each of the {rows} prompts; got {seed!r}.")
    return list(seed)


def write(rows: Rows, mode: Mode) -> None:
    """Run the prompts and write until every row is finished."""
    if rows.streamer is not None:
        rows.streamer.put(rows.tokens[:, : int(rows.start[0])].cpu())
    first = rows.choose(rows.prefill())
    rows.append(first[:, None], torch.ones_like(rows.length), torch.full_like(first[:, None], len(rows.model)))
    if isinstance(mode, Plain):
        _plain(rows)
    elif isinstance(mode, Accept):
        _accept(rows, mode)
    else:
        speculate(rows, mode)
    if rows.streamer is not None:
        rows.streamer.end()


def _plain(rows: Rows) -> None:
    while bool(rows.alive.any()):
        one = rows.alive.long()
        hidden = rows.run(rows.length - 1, one, 1, 0, len(rows.model))
        rows.append(rows.choose(rows.model.logits(hidden[:, 0]))[:, None], one, torch.full_like(one[:, None], len(rows.model)))
        rows.result.deep_passes += 1


@dataclass
class _Waiting:
    """States ``[B, cap, W]`` at the exit of tokens that the blocks behind it have not seen, from position ``first[b]`` on."""

    first: Tensor
    count: Tensor
    states: Tensor


def _accept(rows: Rows, mode: Accept) -> None:
    """Tokens that left wait, with their states at the exit, until a row does not leave or has ``cap`` waiting; then all rows catch up.

    The catch-up also says what the full model would have chosen for each: counted in ``audited`` and ``disagreed``.
    """
    depth, blocks = rows.depth_of_exit, len(rows.model)
    waiting: _Waiting | None = None
    row = torch.arange(rows.count, device=rows.length.device)
    while bool(rows.alive.any()):
        alive = rows.alive
        hidden = rows.run(rows.length - 1, alive.long(), 1, 0, depth)
        if waiting is None:
            waiting = _Waiting(rows.length - 1, torch.zeros_like(rows.length), hidden.new_zeros(rows.count, mode.cap, hidden.shape[2]))
        waiting.first = torch.where(alive & (waiting.count == 0), rows.length - 1, waiting.first)
        waiting.states[row, waiting.count] = torch.where(alive[:, None], hidden[:, 0], waiting.states[row, waiting.count])
        waiting.count = waiting.count + alive
        logits = rows.draft(hidden)[:, 0]
        leaving = alive & (logits.float().softmax(-1).amax(-1) >= mode.threshold)
        token, used = rows.choose(logits), torch.full_like(rows.length, depth)
        if bool((alive & ~leaving).any() or (waiting.count == mode.cap).any()):
            token = torch.where(leaving, token, _catch_up(rows, waiting, token, leaving))
            used = torch.where(leaving, used, blocks)
        rows.append(token[:, None], alive.long(), used[:, None])
    if waiting is not None and bool(waiting.count.any()):  # so that the cache is whole and every token has been looked at
        _catch_up(rows, waiting, rows.length, torch.zeros_like(rows.alive))


def _catch_up(rows: Rows, waiting: _Waiting, token: Tensor, leaving: Tensor) -> Tensor:
    """Run what waits through the blocks behind the exit. Returns the full model's next token of each row (int64 ``[B]``).

    Args:
        rows: the batch.
        waiting: is empty afterwards.
        token: what the exit chose for the rows that are leaving now; not written yet.
        leaving: those rows.
    """
    most, first, count = int(waiting.count.max()), waiting.first, waiting.count
    hidden = rows.run(first, count, most, rows.depth_of_exit, len(rows.model), waiting.states[:, :most])
    rows.result.deep_passes += 1
    place = torch.arange(most, device=first.device)
    after = first[:, None] + 1 + place  # position of the token after each that waited
    wanted = rows.wanted(rows.model.logits(hidden), after)
    written = rows.tokens.gather(1, after.clamp(max=rows.tokens.shape[1] - 1))
    written = torch.where((after == rows.length[:, None]) & leaving[:, None], token[:, None], written)
    looked = (place < count[:, None]) & ((after < rows.length[:, None]) | leaving[:, None])
    rows.result.audited += int(looked.sum())
    rows.result.disagreed += int((looked & (wanted != written)).sum())
    waiting.count = torch.zeros_like(count)
    return wanted.gather(1, (count - 1).clamp(min=0)[:, None]).squeeze(1)
