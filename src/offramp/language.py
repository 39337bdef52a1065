"""A language model with exits: the user's model, the same model block by block, and heads after some of its blocks."""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from offramp.backbones.added import OwnBlock, whole
from offramp.backbones.decoder import Decoder, Step, decoder
from offramp.backbones.kv import KVCache
from offramp.core.bundle import check_base, fingerprint, load_bundle, save_bundle
from offramp.core.errors import ArtifactError, InvalidInput
from offramp.core.parts import part_from_dict, part_to_dict
from offramp.core.system import System
from offramp.exits.cached import Adapter, Block
from offramp.exits.lm import Ending, LMHead, LMHeadSpec, OwnNorm, OwnOutput, Shared, Trimmed

LM_PARTS: dict[str, type] = {c.__name__: c for c in (Shared, OwnNorm, OwnOutput, Trimmed, Adapter, Block)}
"""Heads of language models by name: what a saved file may name."""

_STEM, _KIND = "lm", "lm exits"


class LanguageModel(nn.Module):
    """Made by `attach_lm`. Its own parameters are those of the exits; the model's are not registered here.

    Attributes:
        decoder: the model, block by block.
        exits: after how many blocks each exit reads, ascending.
        heads: one per exit.
        specs: the heads as data.
    """

    def __init__(self, model: Decoder, exits: Sequence[int], heads: Sequence[LMHead], specs: Sequence[LMHeadSpec] = ()) -> None:
        super().__init__()
        self._decoder = (model,)
        self.exits = tuple(exits)
        self.heads = nn.ModuleList(heads)
        self.specs = tuple(specs)

    @property
    def decoder(self) -> Decoder:
        return self._decoder[0]

    @property
    def model(self) -> nn.Module:
        """The user's model."""
        return self.decoder.model

    @property
    def block_paths(self) -> tuple[str, ...]:
        """Module path of every block of the user's model, in order."""
        trunk = self.decoder.trunk
        prefix = next(name for name, module in self.model.named_modules() if module is trunk)
        listed = next(n for n, m in trunk.named_children() if isinstance(m, nn.ModuleList) and len(m) == len(self.decoder))
        return tuple(".".join(filter(None, (prefix, listed, str(k)))) for k in range(len(self.decoder)))

    def draft(self, hidden: Tensor, exit_index: int = 0, step: Step | None = None) -> Tensor:
        """Logits ``[B, Q, V]`` of an exit from the states ``[B, Q, W]`` it reads.

        Args:
            hidden: states of the tokens after the exit's block.
            exit_index: which exit.
            step: where the tokens stand, with a cache from `own_cache`; needed by heads that have one, not read by others.
        """
        head = self.heads[exit_index]
        logits: Tensor = head(hidden, step) if head.cached else head(hidden)
        return logits

    def observe(self, hidden: Tensor, exit_index: int, step: Step | None) -> None:
        """Show a head with a cache of its own the states ``[B, Q, W]`` of tokens that nothing is drafted from; others need not see them."""
        head: Any = self.heads[exit_index]
        if head.cached:
            head.observe(hidden, step)

    def own_cache(self, exit_index: int, rows: int, slots: int) -> KVCache | None:
        """An empty cache for an exit's head, or ``None`` if it needs none."""
        return KVCache(1, rows, slots) if self.heads[exit_index].cached else None

    def teach(self, hidden: Tensor, exit_index: int = 0) -> Tensor:
        """Logits ``[B, T, V]`` of an exit for whole texts in one pass, from the states ``[B, T, W]``; gradients flow."""
        return self.draft(hidden, exit_index, whole(self.decoder, hidden) if self.heads[exit_index].cached else None)

    def base_fingerprint(self) -> str:
        """Of the user's model: what the heads were trained on."""
        return fingerprint(self.model)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``lm.json`` and ``lm.safetensors``: the added weights alone, and the fingerprint of the model they were trained on.

        A model that was trained along with its exits is another one than before; save it too, with its own ``save_pretrained``.

        Args:
            folder: made if missing.

        Raises:
            InvalidInput: the heads were given as modules, so they cannot be described as data.
        """
        if len(self.specs) != len(self.exits):
            raise InvalidInput("The heads were given as modules; save needs heads given as parts. Make the model with attach_lm.")
        content = {
            "base": type(self.model).__qualname__,
            "fingerprint": self.base_fingerprint(),
            "exits": [{"after": e, "head": part_to_dict(s)} for e, s in zip(self.exits, self.specs, strict=True)],
        }
        save_bundle(folder, _STEM, _KIND, content, self.heads.state_dict())


def attach_lm(
    model: nn.Module,
    exits: Sequence[int] | None = None,
    head: LMHeadSpec | Sequence[LMHeadSpec] | None = None,
    *,
    system: System | None = None,
) -> LanguageModel:
    """Put exits on a causal language model.

    Args:
        model: of transformers' AutoModelForCausalLM.
        exits: after how many blocks to read, ascending, each from 1 to the number of blocks less one. By default where ``system`` puts
            them; a system that has none (a schedule of depths) gives a model without exits.
        head: what each exit is, one for all or one each; by default what ``system`` says, else `Shared`.
        system: a published method; gives the defaults of ``exits`` and ``head``.

    Raises:
        UnsupportedModel: the model cannot be decoded block by block; says why.
        InvalidInput: an exit is out of range, a head is not one, or neither exits nor a system of language models were given.
    """
    if system is not None and system.card.engine != "generate":
        raise InvalidInput(f"{system.card.name} is a method of the {system.card.engine} engine; offramp.attach takes it, with an example.")
    if exits is None and system is None:
        raise InvalidInput("Say where the exits go: exits=[4], after how many blocks, or a system that knows.")
    found = decoder(model)
    blocks = len(found)
    if exits is None:
        exits = _placed(system, blocks)
    else:
        exits = _depths(exits, blocks)
    if head is None and system is not None:
        head = system.head
    given = head if head is not None else Shared()
    specs = list(given) if isinstance(given, Sequence) else [given] * len(exits)
    if len(specs) != len(exits):
        raise InvalidInput(f"{len(specs)} heads were given for {len(exits)} exits; give one for all or one for each.")
    for spec in specs:
        if isinstance(spec, type) or not isinstance(spec, LMHeadSpec):
            raise InvalidInput(f"A head is a part such as Shared() or Adapter(), got {spec!r}.")
    return _attached(found, exits, specs)


def _depths(exits: Sequence[int], blocks: int) -> list[int]:
    """Exits as whole numbers of whatever type, ascending and inside the model."""
    given = list(exits)
    try:
        found = [operator.index(e) for e in given if not isinstance(e, bool)]
    except TypeError:
        found = []
    if not found or len(found) != len(given) or found != sorted(set(found)) or not all(0 < e < blocks for e in found):
        raise InvalidInput(f"exits must be ascending numbers of blocks from 1 to {blocks - 1}, got {given}.")
    return found


def _attached(found: Decoder, exits: Sequence[int], specs: Sequence[LMHeadSpec]) -> LanguageModel:
    blocks = len(found)

    def like(number: int, fresh: bool) -> nn.Module:
        if not -blocks <= number < blocks:
            raise InvalidInput(f"The model has {blocks} blocks; there is no block {number} to be like.")
        return OwnBlock(found, number % blocks, fresh)

    ending = Ending(
        found.norm,
        found.head,
        found.norm_module,
        found.output,
        found.width,
        found.vocabulary,
        found.after_norm,
        found.bounded,
        int(found.model.config.num_attention_heads),
        like,
    )
    heads = [spec.build(ending).to(device=found.device, dtype=found.dtype) for spec in specs]
    return LanguageModel(found, exits, heads, specs)


@dataclass(frozen=True)
class _Block:
    """A block as placements see it: blocks of a language model cost alike."""

    path: str
    spent: float


def _placed(system: System | None, blocks: int) -> list[int]:
    """After how many blocks a system has its exits."""
    if system is None or system.placement is None:
        return []
    chosen = system.placement.choose([_Block(str(k), k / blocks) for k in range(1, blocks + 1)])
    return sorted(int(path) for path in chosen)


def load_lm(model: nn.Module, folder: str | os.PathLike[str]) -> LanguageModel:
    """Put saved exits on the model they were trained on.

    Args:
        model: with the weights it had when the exits were saved.
        folder: what `LanguageModel.save` wrote.

    Raises:
        FingerprintMismatch: the model has other weights.
        ArtifactError: a file is missing, truncated, altered or foreign.
        UnsupportedModel: the model cannot be decoded block by block.
    """
    content, tensors = load_bundle(folder, _STEM, _KIND)
    try:
        exits = [int(e["after"]) for e in content["exits"]]
        specs = [part_from_dict(e["head"], LM_PARTS) for e in content["exits"]]
        expected = str(content["fingerprint"])
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"The exits in {folder} lack or garble a field: {error}.") from error
    check_base(model, content.get("base"), expected, folder)
    made = attach_lm(model, exits, specs) if exits else _attached(decoder(model), (), ())
    try:
        made.heads.load_state_dict(tensors)
    except RuntimeError as error:
        raise ArtifactError(f"The weights in {folder} do not fit their heads: {error}.") from error
    return made
