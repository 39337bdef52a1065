"""Choosing tokens: the distribution that a user asks for, and exact acceptance of drafts.

Randomness is drawn once, a few numbers for every row and position, so that a row's text depends on its own seed and not on who else
is in the batch, nor on how many drafts were tried on the way.

Shapes: ``B`` rows, ``Q`` positions, ``K`` drafts, ``V`` vocabulary.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.core.errors import InvalidInput


@dataclass(frozen=True)
class Sampling:
    """The distribution of the next token. Names and order of the steps are those of transformers' ``generate``.

    Attributes:
        do_sample: draw; else the most likely token, ties by id.
        temperature: divides the logits, > 0.
        top_k: keep only the most likely tokens, as many; 0 = all.
        top_p: keep the smallest set of most likely tokens whose probability is at least this, in (0, 1].
        repetition_penalty: > 0; of tokens that the text holds already, positive logits are divided by it and negative multiplied.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.do_sample, bool):
            raise InvalidInput(f"do_sample must be True or False, got {self.do_sample!r}.")
        for name in ("temperature", "top_p", "repetition_penalty"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
                raise InvalidInput(f"{name} must be a finite number, got {value!r}.")
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, numbers.Integral):
            raise InvalidInput(f"top_k must be a whole number, got {self.top_k!r}.")
        if self.temperature <= 0 or self.top_k < 0 or not 0 < self.top_p <= 1 or self.repetition_penalty <= 0:
            raise InvalidInput(
                "temperature and repetition_penalty must be > 0, top_k >= 0 and top_p in (0, 1]; got "
                f"temperature={self.temperature}, repetition_penalty={self.repetition_penalty}, top_k={self.top_k}, top_p={self.top_p}."
            )

    def penalised(self, logits: Tensor, seen: Tensor) -> Tensor:
        """Logits ``[..., V]`` with tokens that occur (bool, same shape) made less likely."""
        if self.repetition_penalty == 1.0:
            return logits
        lower = torch.where(logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty)
        return torch.where(seen, lower, logits)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Distribution ``[..., V]`` to draw from, in float32 or wider, of penalised logits; one-hot when not sampling."""
        if not self.do_sample:
            return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).float()
        logits = (logits if logits.dtype == torch.float64 else logits.float()) / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            lowest = logits.topk(self.top_k, dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < lowest, float("-inf"))
        if self.top_p < 1:
            ordered, index = logits.sort(descending=False, dim=-1)
            dropped = ordered.softmax(-1).cumsum(-1) <= 1 - self.top_p
            dropped[..., -1] = False
            logits = logits.masked_fill(torch.zeros_like(dropped).scatter(-1, index, dropped), float("-inf"))
        return logits.softmax(-1)


def draw(probabilities: Tensor, noise: Tensor) -> Tensor:
    """Tokens (int64 ``[...]``) by inverting the distribution ``[..., V]`` at ``noise`` ``[...]`` in [0, 1)."""
    cumulative = probabilities.double().cumsum(-1)
    chosen = torch.searchsorted(cumulative, (noise.double() * cumulative[..., -1])[..., None], right=True).squeeze(-1)
    last = probabilities.shape[-1] - 1 - (probabilities.flip(-1) > 0).int().argmax(-1)  # rounding never leads past what can be drawn
    return torch.minimum(chosen, last)


@dataclass(frozen=True)
class Noise:
    """Uniform numbers in [0, 1) for every row and position: one to draft with, one to accept with, one to draw with otherwise.

    Attributes:
        values: float64 ``[B, S, 3]``.
    """

    values: Tensor

    @classmethod
    def of(cls, seeds: list[int], positions: int, device: torch.device) -> Noise:
        """Numbers that depend on each row's own seed alone."""
        rows = [torch.rand(positions, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds]
        return cls(torch.stack(rows).to(device))

    def at(self, positions: Tensor, purpose: int) -> Tensor:
        """Numbers at positions ``[B, ...]``; purpose 0 = draft, 1 = accept, 2 = draw."""
        flat = positions.clamp(max=self.values.shape[1] - 1).flatten(1)
        return self.values[..., purpose].gather(1, flat).view(positions.shape)


def accept(drafts: Tensor, drafted: Tensor, wanted: Tensor, counts: Tensor, accepting: Tensor, drawing: Tensor) -> tuple[Tensor, Tensor]:
    """Exact speculative sampling: how many drafts each row keeps, and the token after them.

    A draft is kept with probability ``min(1, p / q)``; at the first that is not, a token is drawn from what ``p`` has over ``q``; after
    the last, from ``p``. The tokens are then distributed as ``p`` says, whatever ``q`` is (Leviathan et al. 2023, appendix A.1; Chen et
    al. 2023, theorem 1). With one-hot ``p`` this is: keep while equal to the most likely token.

    Args:
        drafts: int64 ``[B, K]``.
        drafted: ``[B, K, V]`` distributions ``q`` they were drawn from; one-hot where a draft was chosen without chance.
        wanted: ``[B, K + 1, V]`` distributions ``p`` of the model, given the prompt and the drafts before each position.
        counts: int64 ``[B]`` drafts of each row, at most ``K``.
        accepting: ``[B, K]`` uniform numbers.
        drawing: ``[B, K + 1]`` uniform numbers.

    Returns:
        Kept drafts (int64 ``[B]``) and the next token (int64 ``[B]``).
    """
    rows, most = drafts.shape
    place = torch.arange(most, device=drafts.device)
    p = wanted[:, :most].gather(-1, drafts[..., None]).squeeze(-1)
    q = drafted.gather(-1, drafts[..., None]).squeeze(-1)
    kept = (accepting * q < p) & (place < counts[:, None])
    count = kept.long().cumprod(1).sum(1)
    row = torch.arange(rows, device=drafts.device)
    final = wanted[row, count]
    if most:
        over = (final - drafted[row, count.clamp(max=most - 1)]).clamp(min=0)
        rejected = (count < counts)[:, None] & (over.sum(-1, keepdim=True) > 0)  # nothing over: p equals q, up to rounding
        final = torch.where(rejected, over, final)
    return count, draw(final, drawing[row, count])


def accept_greedy(drafts: Tensor, wanted: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """`accept` without chance: drafts are kept while they are the model's most likely token.

    Args:
        drafts: int64 ``[B, K]``.
        wanted: int64 ``[B, K + 1]`` most likely token at every position.
        counts: int64 ``[B]`` drafts of each row, at most ``K``.

    Returns:
        Kept drafts (int64 ``[B]``) and the next token (int64 ``[B]``).
    """
    place = torch.arange(drafts.shape[1], device=drafts.device)
    kept = (drafts == wanted[:, :-1]) & (place < counts[:, None])
    count = kept.long().cumprod(1).sum(1)
    return count, wanted.gather(1, count[:, None]).squeeze(1)
