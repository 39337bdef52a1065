"""generate: write text token by token, each as deep as it needs.

This is the reference: plain tensor code that runs on any device and that every faster way is tested against. The ways of
`offramp.policies.decoding`, over the same cache: *plain* runs every block for every token; *accept* (`accept.py`) lets a token leave at an
exit when its score reaches a threshold, and fills in what lies behind; *verify* (`speculate.py`) takes what an exit says as a draft that
the whole model confirms; *scheduled* (`skip.py`) runs fewer blocks by position.

Shapes: ``B`` rows, ``V`` vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from offramp.core.errors import InvalidInput
from offramp.core.modes import evaluating
from offramp.engines.text.accept import accept, exits_used
from offramp.engines.text.arguments import StopStrings, one_stop, seeds_of, settings, token_ids
from offramp.engines.text.rows import Rows
from offramp.engines.text.skip import Skipping
from offramp.engines.text.speculate import speculate
from offramp.engines.text.written import Generation, Streamer
from offramp.language import LanguageModel
from offramp.policies.decoding import Accept, Plain, Scheduled, Verify, Way


def generate(
    lm: LanguageModel,
    prompts: Any = None,
    mode: Way | None = None,
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
    stop: str | Sequence[str] | None = None,
    streamer: Streamer | None = None,
    generation_config: Any = None,
    seed: int | Sequence[int] | None = 0,
    **others: Any,
) -> Generation:
    """Continue texts. Names and defaults are those of transformers' ``generate``.

    What is not given comes from ``generation_config``, then from the model's own, then from transformers' defaults (among them
    ``top_k=50`` when sampling).

    Args:
        lm: from `attach_lm`.
        prompts: token ids, one list a row, of any lengths; or a tensor ``[B, P]`` with ``attention_mask``, padded on either side; or texts
            with ``tokenizer``; or what a tokenizer answers.
        mode: `Plain` (default), `Accept`, `Verify` or `Scheduled`.
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
        stop: another name of ``stop_strings``.
        streamer: told of the prompt and of new tokens as they are written, a few at a time when drafts are kept; one prompt only.
        generation_config: settings that go before the model's: a configuration of transformers, or a mapping.
        seed: of the randomness; one number (each row then has its own, counted up from it) or one a row. The same seed writes the same text
            again; ``None`` draws others at every call, from PyTorch's own generator, which ``torch.manual_seed`` sets.
        others: arguments of transformers that are not supported here are refused, unless they change nothing.

    Raises:
        InvalidInput: an argument is out of range, unknown or not supported; says which.
    """
    mode = mode if mode is not None else Plain()
    if not isinstance(mode, Way):
        raise InvalidInput(f"mode must be Plain(), Accept(...), Verify(...) or Scheduled(...), got {mode!r}.")
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
        "stop_strings": one_stop(stop_strings, stop),
    }
    asked = settings(lm.model, given, others, generation_config)
    texts = token_ids(prompts if input_ids is None else input_ids, attention_mask, tokenizer, asked.pad, asked.ends)
    most = lm.decoder.max_positions
    used = exits(lm, mode)
    with torch.inference_mode(), evaluating(lm.model, lm):
        rows = Rows(
            lm,
            texts,
            asked.new_tokens(max(map(len, texts)), most),
            asked.sampling,
            seeds_of(seed, len(texts)),
            asked.ends,
            used,
            mode.draft_length if isinstance(mode, Verify) else 0,
            stops=StopStrings(tokenizer, asked.stop_strings) if asked.stop_strings else None,
            streamer=streamer,
        )
        rows.result.pad_token_id = asked.filling
        write(rows, mode)
        return rows.done()


def exits(lm: LanguageModel, mode: Way) -> tuple[int, ...]:
    """Numbers of the exits that a way of decoding uses.

    Raises:
        InvalidInput: the model lacks one; says which.
    """
    if isinstance(mode, Accept):
        return exits_used(lm, mode)
    if not isinstance(mode, Verify):
        return ()
    if not 0 <= mode.exit_index < len(lm.exits):
        raise InvalidInput(
            f"exit_index must be from 0 to {len(lm.exits) - 1}, as the model has {len(lm.exits)} exits; got {mode.exit_index}."
        )
    return (mode.exit_index,)


def write(rows: Rows, mode: Way) -> None:
    """Run the prompts and write until every row is finished."""
    if rows.streamer is not None:
        rows.streamer.put(rows.tokens[:, : int(rows.start[0])].cpu())
    begun = time.perf_counter()
    skipping = Skipping(rows, mode) if isinstance(mode, Scheduled) else None
    first = rows.choose(rows.prefill() if skipping is None else skipping.first())
    depth = len(rows.model) if skipping is None else len(skipping.before)
    rows.append(first[:, None], torch.ones_like(rows.length), torch.full_like(first[:, None], depth))
    rows.result.prompt_s = time.perf_counter() - begun  # appending has waited for the device
    if skipping is not None:
        skipping.write()
    elif isinstance(mode, Accept):
        accept(rows, mode)
    elif isinstance(mode, Verify):
        speculate(rows, mode)
    else:
        _plain(rows)
    rows.tally()
    if rows.streamer is not None:
        rows.streamer.end()


def _plain(rows: Rows) -> None:
    while bool(rows.alive.any()):
        one = rows.alive.long()
        hidden = rows.run(rows.length - 1, one, 1, 0, len(rows.model))
        rows.append(rows.choose(rows.model.logits(hidden[:, 0]))[:, None], one, torch.full_like(one[:, None], len(rows.model)))
        rows.result.deep_passes += 1
