"""A language model with exits: the user's model, the same model block by block, and heads after some of its blocks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from offramp.backbones.decoder import Decoder, decoder
from offramp.core.errors import InvalidInput
from offramp.exits.lm import Ending, LMHead, LMHeadSpec, Shared


class LanguageModel(nn.Module):
    """Made by `attach_lm`. Its own parameters are those of the exits; the model's are not registered here.

    Attributes:
        decoder: the model, block by block.
        exits: after how many blocks each exit reads, ascending.
        heads: one per exit.
    """

    def __init__(self, model: Decoder, exits: Sequence[int], heads: Sequence[LMHead]) -> None:
        super().__init__()
        self._decoder = (model,)
        self.exits = tuple(exits)
        self.heads = nn.ModuleList(heads)

    @property
    def decoder(self) -> Decoder:
        return self._decoder[0]

    @property
    def model(self) -> nn.Module:
        """The user's model."""
        return self.decoder.model

    def draft(self, hidden: Tensor, exit_index: int = 0) -> Tensor:
        """Logits ``[B, Q, V]`` of an exit from the states ``[B, Q, W]`` it reads."""
        logits: Tensor = self.heads[exit_index](hidden)
        return logits


def attach_lm(model: nn.Module, exits: Sequence[int], head: LMHeadSpec | None = None) -> LanguageModel:
    """Put exits on a causal language model.

    Args:
        model: of transformers' AutoModelForCausalLM.
        exits: after how many blocks to read, ascending, each from 1 to the number of blocks less one.
        head: what each exit is; `Shared` by default.

    Raises:
        UnsupportedModel: the model cannot be decoded block by block; says why.
        InvalidInput: an exit is out of range.
    """
    found = decoder(model)
    blocks = len(found)
    if not exits or list(exits) != sorted(set(exits)) or not all(0 < e < blocks for e in exits):
        raise InvalidInput(f"exits must be ascending numbers of blocks from 1 to {blocks - 1}, got {list(exits)}.")
    spec = head if head is not None else Shared()
    ending = Ending(found.norm, found.head, found.norm_module, found.output, found.width, found.vocabulary)
    heads = [spec.build(ending).to(found.device) for _ in exits]
    return LanguageModel(found, exits, heads)
