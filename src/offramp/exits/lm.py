"""Exits of a language model: what turns a state between two blocks into logits over the vocabulary.

All end in the model's own output layer, which is most of what a draft costs; `Trimmed` keeps only its frequent rows.

Shapes: ``B`` rows, ``Q`` tokens, ``W`` width of the states, ``V`` vocabulary, ``T`` kept tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from offramp.core.errors import InvalidInput


def _no_block(number: int, fresh: bool) -> nn.Module:
    raise InvalidInput("This model's ending was described without its blocks, so an exit cannot have one like them.")


@dataclass(frozen=True)
class Ending:
    """How the model itself ends, which exits reuse.

    Attributes:
        norm: states ``[..., W]`` to normed states.
        head: normed states to logits ``[..., V]``.
        norm_module: the norm as a module, to be copied where an exit has one of its own.
        output: the output layer, whose rows are the vocabulary.
        width: ``W``.
        vocabulary: ``V``.
        after: what the model does between its norm and its output layer; for most, nothing.
        bounded: what it does to every logit behind its output layer: a scale or a bound; for most, nothing.
        attention_heads: of its blocks.
        block: ``(number, fresh) -> module (hidden, step) -> hidden``: a block like the numbered one, with weights of its own.
    """

    norm: Callable[[Tensor], Tensor]
    head: Callable[[Tensor], Tensor]
    norm_module: nn.Module
    output: nn.Module
    width: int
    vocabulary: int
    after: Callable[[Tensor], Tensor] = lambda normed: normed
    bounded: Callable[[Tensor], Tensor] = lambda logits: logits
    attention_heads: int = 1
    block: Callable[[int, bool], nn.Module] = _no_block


@runtime_checkable
class LMHeadSpec(Protocol):
    """An exit of a language model as data."""

    def build(self, ending: Ending) -> LMHead:
        """Make the head for a model that ends so."""
        ...


class LMHead(nn.Module):
    """``forward(hidden [B, Q, W]) -> logits [B, Q, V]``, tokens that are not kept at minus infinity.

    Attributes:
        kept: int64 ``[T]`` ids that it can draft, or ``None`` for all.
        cached: whether it has keys and values of its own (`offramp.exits.cached`); ``forward`` then takes a step too.
    """

    kept: Tensor | None
    cached: bool = False

    def __init__(self, ending: Ending) -> None:
        super().__init__()
        self.ending = (ending,)  # in a tuple: the model's modules are not the exit's
        self.register_buffer("kept", None)

    def forward(self, hidden: Tensor) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class Shared:
    """The model's own norm and output layer, nothing added (LayerSkip, Elhoushi et al. 2024, section 4.2; Sorted LLaMA)."""

    def build(self, ending: Ending) -> LMHead:
        return _Shared(ending)


@dataclass(frozen=True)
class OwnNorm:
    """A norm of its own, started as a copy of the model's, before the model's output layer (EE-LLM, Chen et al. 2023, "embedding norm")."""

    def build(self, ending: Ending) -> LMHead:
        return _OwnNorm(ending)


@dataclass(frozen=True)
class OwnOutput:
    """A norm and an output layer of its own, started as copies of the model's (EE-LLM's untied exits; self-supervised early exits).

    As large as the model's vocabulary times its width; a bound that the model puts on its logits is not applied.
    """

    def build(self, ending: Ending) -> LMHead:
        return _OwnOutput(ending)


@dataclass(frozen=True)
class Trimmed:
    """The model's norm and only some rows of its output layer.

    A draft can then only be one of the kept tokens; verification makes up for it, so the text stays the model's own.

    Attributes:
        kept: ids of the tokens to keep, most frequent first; at least one, no repeats.
    """

    kept: tuple[int, ...]

    def build(self, ending: Ending) -> LMHead:
        ids = sorted(set(self.kept))
        if not ids or len(ids) != len(self.kept) or ids[0] < 0 or ids[-1] >= ending.vocabulary:
            raise InvalidInput(
                f"kept must be different token ids from 0 to {ending.vocabulary - 1}, at least one; got {len(self.kept)}"
                + (f" of which {len(self.kept) - len(ids)} repeat, from {ids[0]} to {ids[-1]}." if ids else ".")
            )
        return _Trimmed(ending, torch.tensor(ids))


def frequent(texts: Sequence[Sequence[int]], vocabulary: int, keep: int) -> tuple[int, ...]:
    """The ``keep`` most frequent token ids of some texts, ties by id."""
    counts = torch.zeros(vocabulary, dtype=torch.int64)
    for text in texts:
        counts += torch.bincount(torch.as_tensor(text, dtype=torch.int64), minlength=vocabulary)
    return tuple(counts.sort(descending=True, stable=True).indices[:keep].tolist())


class _Shared(LMHead):
    def forward(self, hidden: Tensor) -> Tensor:
        return self.ending[0].head(self.ending[0].norm(hidden))


class _OwnNorm(LMHead):
    def __init__(self, ending: Ending) -> None:
        super().__init__(ending)
        self.norm = copy.deepcopy(ending.norm_module).requires_grad_(True)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.ending[0].head(self.ending[0].after(self.norm(hidden)))


class _OwnOutput(_OwnNorm):
    def __init__(self, ending: Ending) -> None:
        super().__init__(ending)
        self.output = copy.deepcopy(ending.output).requires_grad_(True)

    def forward(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.output(self.ending[0].after(self.norm(hidden)))
        return logits


class _Trimmed(LMHead):
    kept: Tensor

    def __init__(self, ending: Ending, kept: Tensor) -> None:
        super().__init__(ending)
        self.register_buffer("kept", kept)

    def forward(self, hidden: Tensor) -> Tensor:
        """All of ``V``; `narrow` gives the kept columns alone, which is what saves."""
        narrow = self.narrow(hidden)
        full = narrow.new_full((*narrow.shape[:-1], self.ending[0].vocabulary), float("-inf"))
        return full.index_copy(-1, self.kept, narrow)

    def narrow(self, hidden: Tensor) -> Tensor:
        """Logits ``[B, Q, T]`` of the kept tokens."""
        output: Any = self.ending[0].output
        normed = self.ending[0].norm(hidden)
        bias = output.bias[self.kept] if getattr(output, "bias", None) is not None else None
        return self.ending[0].bounded(nn.functional.linear(normed, output.weight[self.kept], bias))
