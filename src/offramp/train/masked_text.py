"""Training a language model to fill in masks: masked diffusion.

A share ``t ~ U(0, 1)`` of a text's tokens is hidden behind masks, and the model is to name them all from those it sees. Each hidden
token's cross-entropy weighs ``1 / t``, which makes the mean over ``t`` an upper bound on the negative log-likelihood of the text (LLaDA,
Nie et al. 2025, equation 3; Shi et al. 2024; Sahoo et al. 2024). With a prompt only what follows it is hidden (LLaDA, equation 5).

Shapes: ``N`` blocks, ``B`` texts, ``T`` tokens of each, ``V`` vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from offramp.backbones.masked_lm import bidirectional
from offramp.core.errors import InvalidInput
from offramp.core.modes import modes_kept
from offramp.core.whole import is_whole

LEAST_SHARE = 1e-3
"""Smallest share that is hidden, so that no weight is unbounded (LLaDA's released code)."""


@dataclass(frozen=True)
class Hidden:
    """Texts with some tokens behind masks.

    Attributes:
        tokens: int64 ``[B, T]``, with masks.
        hidden: bool ``[B, T]``, where they are.
        share: ``[B]``, the probability with which each token was hidden.
    """

    tokens: Tensor
    hidden: Tensor
    share: Tensor


def hide(
    tokens: Tensor,
    mask_token_id: int,
    generator: torch.Generator,
    answer: Tensor | None = None,
    share: Tensor | None = None,
    stratified: bool = False,
) -> Hidden:
    """Hide tokens, each text's with a probability of its own.

    Args:
        tokens: int64 ``[B, T]``.
        mask_token_id: what stands in their place.
        generator: of the randomness, on the CPU.
        answer: bool ``[B, T]``, which tokens may be hidden; all by default.
        share: ``[B]`` in (0, 1]; uniform by default.
        stratified: spread the uniform shares of a batch evenly, which lowers the variance and leaves each uniform (low-discrepancy sampler,
            Kingma et al. 2021, appendix I.1).
    """
    rows = tokens.shape[0]
    if share is None:
        drawn = torch.rand(1 if stratified else rows, generator=generator)
        drawn = (drawn + torch.arange(rows) / rows) % 1 if stratified else drawn
        share = LEAST_SHARE + (1 - LEAST_SHARE) * drawn
    hidden = (torch.rand(tokens.shape, generator=generator) < share.cpu()[:, None]).to(tokens.device)
    if answer is not None:
        hidden &= answer
    return Hidden(torch.where(hidden, mask_token_id, tokens), hidden, share.to(tokens.device))


def masked_diffusion_loss(logits: Tensor, tokens: Tensor, given: Hidden, answer: Tensor | None = None) -> Tensor:
    """``1 / (t n) sum`` of the hidden tokens' cross-entropy, for each text ``[B]``; ``n`` of its tokens might be hidden.

    Args:
        logits: ``[B, T, V]`` on the masked text.
        tokens: int64 ``[B, T]``, the text.
        given: what was hidden.
        answer: bool ``[B, T]``, which tokens might have been; all by default.
    """
    losses = F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten(), reduction="none").view(tokens.shape)
    counted = torch.full_like(given.share, tokens.shape[1]) if answer is None else answer.sum(1).clamp(min=1)
    return (losses * given.hidden).sum(1) / (given.share * counted)


def fit_masked(
    model: nn.Module,
    blocks: Tensor,
    mask_token_id: int,
    *,
    steps: int,
    batch_size: int = 16,
    learning_rate: float = 2e-3,
    weight_decay: float = 0.01,
    warmup: float = 0.1,
    prefix: float = 0.0,
    seed: int = 0,
) -> list[float]:
    """Train a language model of transformers, run without its causal mask, to fill in masks.

    A small loop for models of a size that one device trains in minutes: AdamW, a learning rate that rises and falls by a cosine, gradients
    clipped at norm 1.

    Args:
        model: is changed, on whichever device it is.
        blocks: whole numbers ``[N, T]``, tokens as `offramp.train.packed` gives them.
        mask_token_id: a token that does not occur in them.
        steps: optimizer steps, at least 1.
        batch_size: texts of a step.
        learning_rate: highest.
        weight_decay: of AdamW.
        warmup: share of the steps over which the rate rises, in [0, 1].
        prefix: share of the texts, in [0, 1], whose first part, of uniform length, is never hidden: so that prompts look as they will.
        seed: of which texts are seen and what is hidden.

    Returns:
        The loss of each step.

    Raises:
        InvalidInput: an argument is out of range, or the mask occurs in the texts.
    """
    if blocks.ndim != 2 or not is_whole(blocks) or not len(blocks):
        raise InvalidInput(
            f"blocks must be token ids, whole numbers [N, T] with N >= 1; got {blocks.dtype} of shape {tuple(blocks.shape)}."
        )
    blocks = blocks.long()
    if bool((blocks == mask_token_id).any()):
        raise InvalidInput(f"The mask token {mask_token_id} occurs in the texts; it must stand for nothing else.")
    if steps < 1 or batch_size < 1 or not 0 <= warmup <= 1 or not 0 <= prefix <= 1:
        raise InvalidInput(
            f"steps and batch_size must be at least 1, warmup and prefix in [0, 1]; got {steps}, {batch_size}, {warmup} and {prefix}."
        )
    generator = torch.Generator().manual_seed(seed)
    device, length = next(model.parameters()).device, blocks.shape[1]
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay, betas=(0.9, 0.98))
    rising = max(1, round(warmup * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min(1.0, (s + 1) / rising) * (0.5 + 0.5 * math.cos(math.pi * max(0, s - rising) / max(1, steps - rising))),
    )
    losses: list[Tensor] = []
    with modes_kept(model):
        model.train()
        for _ in range(steps):
            tokens = blocks[torch.randint(len(blocks), (batch_size,), generator=generator)].to(device)
            kept = torch.randint(length, (batch_size,), generator=generator) * (torch.rand(batch_size, generator=generator) < prefix)
            answer = torch.arange(length, device=device) >= kept.to(device)[:, None]
            given = hide(tokens, mask_token_id, generator, answer, stratified=True)
            loss = masked_diffusion_loss(bidirectional(model, given.tokens), tokens, given, answer).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
    return torch.stack(losses).tolist()


__all__ = ["Hidden", "fit_masked", "hide", "masked_diffusion_loss"]
