"""unmask: write text by filling in masks, with a masked language model and a cache that is refreshed when it has to be.

A prompt is followed by masks, all of which are there from the beginning. At each step a few positions of each row are computed, looking at
all others as they last were; of the masks that may be filled in, the sure ones are. How much is computed again is the refresh's to say
(`offramp.policies.refresh`): everything, everything now and then, or, where attention drifts in some block, everything from there on.

For the last of these the cache holds the state of every position before each block. A row that drifts at a block runs that block again for
every position over keys and values as they are, and then all blocks behind it: those are the first whose keys and values change. (Going on
from the kept states behind the block instead would give the next one the very keys and values that it has.) Keys and values of the first
block depend on tokens alone and are never stale, so that a row that drifts at once has everything exact.

Every row decides for itself, and finished rows leave the batch. This is the reference: plain tensor code for any device. The host looks
once a step (how many positions are needed, which rows are finished, which are due) and, with a drift test, once a block (which rows drift).

Shapes: ``B`` rows, ``T`` positions, ``C`` candidates, ``V`` vocabulary, ``W`` width of the states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from offramp.backbones.masked_lm import MaskedLM
from offramp.backbones.state_cache import StateCache
from offramp.core.errors import InvalidInput
from offramp.core.modes import evaluating
from offramp.engines.diffusion.unmask_step import Texts, UnmaskStep
from offramp.policies.refresh import Progress, Unmask


@dataclass
class Unmasked:
    """What was written, and what it took. Lists have an entry for each row.

    Attributes:
        prompts: token ids that were given.
        blocks: of the model.
        tokens: new token ids, up to and with the end token.
        steps: steps a row took.
        refreshed: for each of these, the block from which on every position was computed: 0 = everything, ``blocks`` = nothing.
        pairs: (position, block) pairs that were computed, a row's own; padding is left out.
        full_pairs: what computing everything at each of its steps would have been.
        flops: FLOPs of ``pairs``, of the attention rows that drift tests looked at, and of the candidates' logits.
        full_flops: FLOPs of ``full_pairs`` and of the same logits.
        cache_bytes: of what was kept for all rows.
    """

    prompts: list[list[int]]
    blocks: int
    tokens: list[list[int]] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    refreshed: list[list[int]] = field(default_factory=list)
    pairs: list[int] = field(default_factory=list)
    full_pairs: list[int] = field(default_factory=list)
    flops: list[int] = field(default_factory=list)
    full_flops: list[int] = field(default_factory=list)
    cache_bytes: int = 0

    @property
    def share(self) -> float:
        """Share of the (position, block) pairs that were computed."""
        return sum(self.pairs) / max(1, sum(self.full_pairs))

    @property
    def flops_share(self) -> float:
        """`share` in FLOPs, drift tests and logits included."""
        return sum(self.flops) / max(1, sum(self.full_flops))

    @property
    def tokens_per_step(self) -> float:
        """New tokens for each step of a row."""
        return sum(map(len, self.tokens)) / max(1, sum(self.steps))

    @property
    def refresh_rate(self) -> float:
        """Share of the steps behind the first at which some block was computed for every position."""
        later = [origin < self.blocks for row in self.refreshed for origin in row[1:]]
        return sum(later) / max(1, len(later))


def unmask(
    lm: MaskedLM,
    prompts: Sequence[Sequence[int]],
    gen_length: int,
    way: Unmask | None = None,
    *,
    ends: Sequence[int] = (),
) -> Unmasked:
    """Continue texts by filling in masks, with the most likely tokens.

    Args:
        lm: from `masked_lm`.
        prompts: token ids of each row, at least one each; lengths may differ. What a row becomes does not depend on the others.
        gen_length: masks behind each prompt, at least 1.
        way: what is filled in and what is computed again; by default everything, over a sliding window.
        ends: token ids that end a row: what lies behind the first of them is not filled in.

    Raises:
        InvalidInput: an argument is out of range; says which.
    """
    way = way if way is not None else Unmask()
    if not isinstance(way, Unmask):
        raise InvalidInput(f"way must be Unmask(...), got {way!r}.")
    if lm.mask_token_id in ends:
        raise InvalidInput(f"The mask token {lm.mask_token_id} cannot end a row; it is never written.")
    with torch.inference_mode(), evaluating(lm.model):
        test = way.refresh.test
        texts = _begin(lm, prompts, gen_length, test is not None)
        ending = torch.tensor(sorted(ends), dtype=torch.int64, device=lm.device)
        result = _nothing_yet(lm, prompts)
        history: list[Tensor] = []
        while True:
            scope = way.order.scope(texts.masked, texts.start)
            progress = Progress(scope, texts.recent, texts.age, texts.low, texts.valid)
            due = way.refresh.due(progress) | (texts.age < 0)
            need = scope.candidates | way.refresh.queried(progress)
            if test is not None and test.fresh:
                need = need.scatter(1, texts.tracked, True)
            counts = torch.stack([texts.masked.sum(1), need.sum(1), scope.candidates.sum(1), due.long()])
            masks, needed, candidates, whole = counts.tolist()  # the host's look
            if not all(masks):
                result.cache_bytes = max(result.cache_bytes, texts.cache.bytes)
                for row in (row for row, count in enumerate(masks) if not count):
                    _record(lm, result, texts, row, set(ends))
                if not any(masks):
                    break
                texts = texts.take(torch.tensor([row for row, count in enumerate(masks) if count], device=lm.device))
                continue
            width = max((n for n, w in zip(needed, whole, strict=True) if not w), default=1)
            step = UnmaskStep(lm, texts, test, scope.candidates, need, [bool(w) for w in whole], width, max(candidates))
            hidden = step.run()
            history.append(torch.stack([texts.ids, step.origin]))
            all_new = step.origin == 0
            texts.age, texts.low = torch.where(all_new, 0, texts.age + 1), torch.where(all_new, scope.low, texts.low)
            _fill_in(lm, texts, step, hidden, way.confidence, ending)
        for row, origin in torch.cat(history, dim=1).T.tolist():
            result.refreshed[row].append(origin)
        return result


def _begin(lm: MaskedLM, prompts: Sequence[Sequence[int]], gen_length: int, watch: bool) -> Texts:
    if not prompts or any(len(p) == 0 for p in prompts):
        raise InvalidInput("Every prompt needs at least one token; give a begin-of-text token for an empty one.")
    if gen_length < 1:
        raise InvalidInput(f"gen_length must be at least 1, got {gen_length}.")
    lengths, device = [len(p) for p in prompts], lm.device
    rows, length = len(prompts), max(lengths) + gen_length
    if lm.max_positions is not None and length > lm.max_positions:
        raise InvalidInput(
            f"The longest prompt has {max(lengths)} tokens and gen_length is {gen_length}, together more than the {lm.max_positions} "
            "positions that the model has."
        )
    tokens = torch.full((rows, length + 1), lm.mask_token_id, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        given = torch.as_tensor(prompt, dtype=torch.int64)
        if given.min() < 0 or given.max() >= lm.vocabulary:
            raise InvalidInput(f"Prompt {row} has token ids outside 0 to {lm.vocabulary - 1}.")
        tokens[row, : len(prompt)] = given
    start = torch.tensor(lengths, device=device)
    place = torch.arange(length, device=device)
    masked = (place >= start[:, None]) & (place < start[:, None] + gen_length)
    watched = len(lm) - 1 if watch else 0
    zero = torch.zeros_like(start)
    return Texts(
        cache=StateCache(len(lm), rows, length, states=watch),
        ragged=len(set(lengths)) > 1,
        ids=torch.arange(rows, device=device),
        tokens=tokens.to(device),
        start=start,
        total=start + gen_length,
        masked=masked,
        recent=torch.zeros_like(masked),
        age=zero - 1,
        low=start,
        tracked=torch.zeros(rows, watched, dtype=torch.int64, device=device),
        queries=torch.zeros(rows, watched, lm.heads, lm.head_width, device=device, dtype=lm.dtype),
        reference=torch.zeros(rows, watched, length, device=device),
        steps=zero,
        pairs=zero.clone(),
        looks=zero.clone(),
        read=zero.clone(),
    )


def _fill_in(lm: MaskedLM, texts: Texts, step: UnmaskStep, hidden: Tensor, confidence: float, ending: Tensor) -> None:
    """Write the sure ones of the candidates, and in each row at least the surest."""
    logits = lm.logits(hidden).float()
    logits[..., lm.mask_token_id] = float("-inf")
    sure, token = logits.softmax(-1).max(-1)
    sure = sure.masked_fill(~step.counted, -1.0)
    place = torch.arange(sure.shape[1], device=sure.device)
    chosen = (sure >= confidence) | (place == sure.argmax(1, keepdim=True))
    at = torch.where(chosen, step.candidates, texts.length)
    texts.tokens.scatter_(1, at, token)
    texts.recent = torch.zeros_like(texts.tokens, dtype=torch.bool).scatter_(1, at, True)[:, : texts.length]
    texts.masked = texts.masked & ~texts.recent
    texts.steps = texts.steps + 1
    texts.read += step.counted.sum(1)
    if ending.numel():
        everywhere = torch.arange(texts.length, device=sure.device)
        ended = torch.isin(texts.tokens[:, : texts.length], ending) & (everywhere >= texts.start[:, None])
        before = (ended.int().cumsum(1) - ended.int()) == 0  # up to and with the first end
        texts.masked = texts.masked & before


def _nothing_yet(lm: MaskedLM, prompts: Sequence[Sequence[int]]) -> Unmasked:
    found = Unmasked([[int(t) for t in p] for p in prompts], len(lm), [[] for _ in prompts], refreshed=[[] for _ in prompts])
    for counts in (found.steps, found.pairs, found.full_pairs, found.flops, found.full_flops):
        counts.extend([0] * len(prompts))
    return found


def _record(lm: MaskedLM, result: Unmasked, texts: Texts, row: int, ends: set[int]) -> None:
    """Write down what became of a finished row."""
    numbers = (texts.ids, texts.start, texts.total, texts.steps, texts.pairs, texts.looks, texts.read)
    at, start, total, steps, pairs, looks, read = torch.stack([t[row] for t in numbers]).tolist()
    new = texts.tokens[row, start:total].tolist()
    last = next((i for i, token in enumerate(new) if token in ends), len(new) - 1)
    result.tokens[at] = new[: last + 1]
    result.steps[at], result.pairs[at], result.full_pairs[at] = steps, pairs, steps * total * len(lm)
    logits = read * lm.head_flops()
    result.flops[at] = pairs * lm.block_flops(total) + looks * lm.look_flops(total) + logits
    result.full_flops[at] = result.full_pairs[at] * lm.block_flops(total) + logits


__all__ = ["Unmasked", "unmask"]
