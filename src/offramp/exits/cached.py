"""Exits of a language model that attend: they see the states at the exit token by token, so they keep keys and values of their own.

Such a head must be shown every token's state, also those that nothing is drafted from: `CachedHead.observe` for them,
``forward`` for the others. Places in its cache are the tokens' positions, as in the model's own, so that going back is not advancing.

Shapes: ``B`` rows, ``Q`` tokens of a row in one call, ``W`` width of the states, ``V`` vocabulary, ``H`` heads, ``D`` their width.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from offramp.core.errors import InvalidInput
from offramp.exits.lm import Ending, LMHead


class Memory(Protocol):
    """Keys and values of one block."""

    def write(self, block: int, key: Tensor, value: Tensor, slots: Tensor) -> None: ...

    def read(self, block: int, length: int) -> tuple[Tensor, Tensor]: ...


class Moment(Protocol):
    """Where the tokens of one call stand and what they see: `offramp.backbones.decoder.Step`, with the head's own cache."""

    cache: Any
    positions: Tensor
    slots: Tensor
    length: int

    def mask(self, window: int | None) -> Tensor: ...


class CachedHead(LMHead):
    """``forward(hidden [B, Q, W], step) -> logits [B, Q, V]``; keys and values of the tokens are in ``step.cache`` afterwards."""

    cached = True

    def forward(self, hidden: Tensor, step: Moment | None = None) -> Tensor:
        if step is None:
            raise InvalidInput(
                f"{type(self).__name__} attends to earlier tokens: give the step; LanguageModel.teach makes one for whole texts."
            )
        return self.ending[0].head(self.mixed(hidden, step))

    def mixed(self, hidden: Tensor, step: Moment) -> Tensor:
        """Normed states ``[B, Q, W]``, ready for the output layer."""
        raise NotImplementedError

    def observe(self, hidden: Tensor, step: Moment) -> None:
        """Keep keys and values of tokens that nothing is drafted from; no logits are computed."""
        self.mixed(hidden, step)


@dataclass(frozen=True)
class Adapter:
    """One self-attention with a norm before and one after it, no feed-forward, then the model's output layer.

    Kangaroo (Liu et al. 2024, section 3.2). Untrained it is the `Shared` exit: its last projection starts at 0 and its last norm as a copy
    of the model's.

    Attributes:
        heads: of attention; ``None`` = the model's.
        key_heads: of keys and values, a divisor of ``heads``; ``None`` = ``heads``.
        theta: base of the rotation of positions, > 0.
    """

    heads: int | None = None
    key_heads: int | None = None
    theta: float = 10000.0

    def build(self, ending: Ending) -> LMHead:
        heads = self.heads if self.heads is not None else ending.attention_heads
        key_heads = self.key_heads if self.key_heads is not None else heads
        if heads < 1 or key_heads < 1 or heads % key_heads or ending.width % heads or (ending.width // heads) % 2 or self.theta <= 0:
            raise InvalidInput(
                f"An adapter of {heads} heads and {key_heads} key heads does not fit states of width {ending.width}: heads must divide the "
                f"width into even parts, key heads must divide heads, and theta ({self.theta}) be > 0."
            )
        return _Adapter(ending, heads, key_heads, self.theta)


@dataclass(frozen=True)
class Block:
    """A whole block of the model's own kind, a norm of its own, then the model's output layer.

    EESD (Liu et al. 2024, section 3.1); EE-LLM's heaviest exit, which EE-Tuning starts as a copy of the model's last block and norm (Pan et
    al. 2024, section 3.2).

    Attributes:
        like: number of the block it is like, negative from the end; the last by default.
        fresh: new weights instead of copies.
    """

    like: int = -1
    fresh: bool = False

    def build(self, ending: Ending) -> LMHead:
        return _Block(ending, ending.block(self.like, self.fresh))


class _Adapter(CachedHead):
    def __init__(self, ending: Ending, heads: int, key_heads: int, theta: float) -> None:
        super().__init__(ending)
        width, each = ending.width, ending.width // heads
        self.heads, self.key_heads, self.theta = heads, key_heads, theta
        self.before = nn.RMSNorm(width, eps=1e-6)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, key_heads * each, bias=False)
        self.value = nn.Linear(width, key_heads * each, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.out.weight)
        self.after = copy.deepcopy(ending.norm_module).requires_grad_(True)

    def mixed(self, hidden: Tensor, step: Moment) -> Tensor:
        normed = self.before(hidden)
        self._keep(normed, step)
        keys, values = step.cache.read(0, step.length)
        query = self._rotated(self._split(self.query(normed), self.heads), step)
        found = F.scaled_dot_product_attention(query, keys, values, attn_mask=step.mask(None), enable_gqa=self.heads != self.key_heads)
        hidden = hidden + self.out(found.transpose(1, 2).flatten(2))
        return self.ending[0].after(self.after(hidden))

    def observe(self, hidden: Tensor, step: Moment) -> None:
        self._keep(self.before(hidden), step)

    def _keep(self, normed: Tensor, step: Moment) -> None:
        key = self._rotated(self._split(self.key(normed), self.key_heads), step)
        step.cache.write(0, key, self._split(self.value(normed), self.key_heads), step.slots)

    def _split(self, flat: Tensor, heads: int) -> Tensor:
        return flat.unflatten(-1, (heads, -1)).transpose(1, 2)

    def _rotated(self, vectors: Tensor, step: Moment) -> Tensor:
        """Halves of each vector ``[B, H, Q, D]`` turned against each other by its position (Su et al. 2021, section 3.2)."""
        half = vectors.shape[-1] // 2
        rates = self.theta ** (-torch.arange(half, device=vectors.device, dtype=torch.float32) / half)
        angles = step.positions[:, None, :, None].float() * rates
        cos, sin = angles.cos().to(vectors.dtype), angles.sin().to(vectors.dtype)
        one, two = vectors.split(half, dim=-1)
        return torch.cat([one * cos - two * sin, two * cos + one * sin], dim=-1)


class _Block(CachedHead):
    def __init__(self, ending: Ending, block: nn.Module) -> None:
        super().__init__(ending)
        self.block = block
        self.after = copy.deepcopy(ending.norm_module).requires_grad_(True)

    def mixed(self, hidden: Tensor, step: Moment) -> Tensor:
        return self.ending[0].after(self.after(self.block(hidden, step)))
