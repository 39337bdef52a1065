"""A language model with exits: the user's model, the same model block by block, and heads after some of its blocks."""

from __future__ import annotations

import hashlib
import operator
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from offramp.backbones.added import OwnBlock, whole
from offramp.backbones.decoder import ATTENTION, Decoder, Step, cached_attention, decoder
from offramp.backbones.kv import KVCache
from offramp.backbones.transformers import register_attention
from offramp.core.bundle import check_base, fingerprint, load_bundle, save_bundle
from offramp.core.errors import ArtifactError, FingerprintMismatch, InvalidInput
from offramp.core.parts import part_from_dict, part_to_dict
from offramp.core.system import System
from offramp.exits.cached import Adapter, Block
from offramp.exits.lm import Ending, LMHead, LMHeadSpec, OwnNorm, OwnOutput, Shared, Trimmed

LM_PARTS: dict[str, type] = {c.__name__: c for c in (Shared, OwnNorm, OwnOutput, Trimmed, Adapter, Block)}
"""Heads of language models by name: what a saved file may name."""

_STEM, _KIND = "lm", "lm exits"
_LOW = (torch.bfloat16, torch.float16)
"""Precisions in which a model may be served whose exits were trained in a higher one."""
_WRITES = (
    "A LanguageModel is a model and its exits, and writes nothing by itself: offramp.compile(lm, offramp.Verify(4)).generate(prompts, ...) "
    "does. lm.model is the model as it was given, with its own call and generate; lm.teach gives an exit's logits for whole texts."
)


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

    def __repr__(self) -> str:
        model = self.decoder
        heads = self.specs if len(self.specs) == len(self.exits) else [type(h).__name__ for h in self.heads]
        read = ", ".join(f"{h} after {e}" for e, h in zip(self.exits, heads, strict=True)) or "none"
        kind = str(model.dtype).removeprefix("torch.")
        return f"LanguageModel({type(self.model).__name__} of {len(model)} blocks, {kind} on {model.device}; exits: {read})"

    def __getattr__(self, name: str) -> Any:
        if name == "generate":
            raise AttributeError(_WRITES)
        return super().__getattr__(name)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        register_attention(ATTENTION, cached_attention)  # what blocks call by name, in the process that this was unpickled in

    def forward(self, *given: Any, **named: Any) -> Any:
        """There is no one answer of a model with exits.

        Raises:
            InvalidInput: always; says what is called instead.
        """
        raise InvalidInput(_WRITES)

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

    def check_heads(self) -> None:
        """Refuse exits that cannot read the model's states. Within autocast, which converts, all can.

        Raises:
            InvalidInput: their weights have another precision than the model's, or are on another device.
        """
        model = self.decoder
        if torch.is_autocast_enabled(model.device.type):
            return
        for exit_index, head in enumerate(self.heads):
            for weight in head.parameters():
                if weight.is_floating_point() and (weight.dtype, weight.device) != (model.dtype, model.device):
                    raise InvalidInput(
                        f"Exit {exit_index} is {weight.dtype} on {weight.device}, the model {model.dtype} on {model.device}. What moves or "
                        "converts the model leaves its exits where they are: lm.to(lm.decoder.device, lm.decoder.dtype) takes them along."
                    )

    def base_fingerprint(self) -> str:
        """Of the user's model: what the heads were trained on."""
        return fingerprint(self.model)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``lm.json`` and ``lm.safetensors``: the added weights alone, and the fingerprint of the model they were trained on.

        With it go those of its weights rounded to bfloat16 and to float16, so that the model may be served in these.

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
            "dtype": _precision(self.model),
            "rounded": {_name(d): digest for d, digest in _rounded(self.model, _LOW).items()},
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
        raise InvalidInput(
            f"{system.card.name} is a method of the {system.card.engine} engine and has no exits for a language model, whose methods are "
            "of the generate engine."
        )
    if any(p.is_meta for p in model.parameters()):
        raise InvalidInput(
            f"Weights of this {type(model).__name__} are on the meta device: they have shapes and no values. Load them first, for instance "
            "with from_pretrained and without offloading."
        )
    if exits is None and system is None:
        raise InvalidInput("Say where the exits go: exits=[4], after how many blocks, or a system that knows.")
    found = decoder(model)
    blocks = len(found)
    if blocks < 2 and (exits is not None or (system is not None and system.placement is not None)):
        raise InvalidInput(
            f"This {type(model).__name__} has {blocks} block. An exit stands between blocks, so it takes a model of two or more."
        )
    if exits is None:
        exits = _placed(system, blocks)
        _check_depth(system, len(exits), blocks)
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


@dataclass(frozen=True)
class _Like:
    """Makes blocks like those of a model; no closure, so that a model with exits can be pickled, for a process of its own."""

    model: Decoder

    def __call__(self, number: int, fresh: bool) -> nn.Module:
        blocks = len(self.model)
        if not -blocks <= number < blocks:
            raise InvalidInput(f"The model has {blocks} blocks; there is no block {number} to be like.")
        return OwnBlock(self.model, number % blocks, fresh)


def _attached(found: Decoder, exits: Sequence[int], specs: Sequence[LMHeadSpec]) -> LanguageModel:
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
        _Like(found),
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


def _check_depth(system: System | None, exits: int, blocks: int) -> None:
    """Refuse a system that was composed for a model of another depth than the one it was put on."""
    if system is None:
        return
    name = system.card.name
    again = f'Compose it for this model: offramp.systems.build("{name}", blocks={blocks}).'
    schedule = getattr(system.fill, "schedule", None)
    if schedule is not None and schedule.blocks != blocks:
        raise InvalidInput(f"{name} was composed for a model of {schedule.blocks} blocks; this one has {blocks}. {again}")
    if system.draft is not None and not system.draft.exit_index < exits:
        raise InvalidInput(
            f"{name} drafts after {system.draft.exit_index + 1} blocks, for which this model of {blocks} blocks has no exit. {again}"
        )


def load_lm(model: nn.Module, folder: str | os.PathLike[str]) -> LanguageModel:
    """Put saved exits on the model they were trained on.

    Args:
        model: with the weights it had when the exits were saved, or exactly those rounded to bfloat16 or float16, in whatever precision
            holds them. The exits get the model's precision.
        folder: what `LanguageModel.save` wrote.

    Raises:
        FingerprintMismatch: the model has other weights; says so where it is their precision alone.
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
    _check_weights(model, content, expected, folder)
    made = attach_lm(model, exits, specs) if exits else _attached(decoder(model), (), ())
    try:
        made.heads.load_state_dict(tensors)
    except RuntimeError as error:
        raise ArtifactError(f"The weights in {folder} do not fit their heads: {error}.") from error
    return made


# ---- precision -----------------------------------------------------------------------------------------------------------


def _check_weights(model: nn.Module, content: Mapping[str, Any], expected: str, folder: str | os.PathLike[str]) -> None:
    """Refuse a model whose weights are not those that exits were trained on, nor exactly those rounded to a lower precision."""
    if fingerprint(model) == expected:
        return
    known, now, trained = content.get("rounded"), _precision(model), content.get("dtype")
    if known is None and now != "float32":  # saved before roundings were kept
        raise FingerprintMismatch(
            f"The exits in {folder} were trained on a {content.get('base')} with other weights, or with these in another precision than "
            f"{now}, which their file does not tell apart. If it is the precision: load the model in the one they were trained in, then "
            f"the exits, and convert both: model.to(torch.{now}) and lm.to(torch.{now}). lm.save then keeps what tells them apart."
        )
    if not isinstance(known, Mapping | None):
        raise ArtifactError(f"The exits in {folder} garble a field: 'rounded' is a {type(known).__name__}.")
    for dtype, digest in _rounded(model, [d for d in _LOW if _name(d) in (known or {})]).items():
        if known is None or digest != known[_name(dtype)]:
            continue
        if _holds(model, dtype):
            return
        if trained == _name(dtype):
            raise FingerprintMismatch(
                f"The exits in {folder} were trained on these weights rounded to {trained}; here they are in {now} and say other things. "
                f"Load the model with dtype=torch.{trained}, or attach and fit new exits."
            )
    check_base(model, content.get("base"), expected, folder)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _precision(model: nn.Module) -> str:
    """Name of the precision of all weights that are no whole numbers, or ``mixed``."""
    found = {t.dtype for t in model.state_dict().values() if t.is_floating_point()}
    return _name(found.pop()) if len(found) == 1 else "mixed"


def _rounded(model: nn.Module, dtypes: Sequence[torch.dtype]) -> dict[torch.dtype, str]:
    """For each precision, SHA-256 over the class, and the names, shapes and values of the weights and buffers when rounded to it."""
    digests = {d: hashlib.sha256(type(model).__qualname__.encode()) for d in dtypes}
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().to("cpu").contiguous().reshape(-1)
        for dtype, digest in digests.items():
            low = flat.to(dtype) if flat.is_floating_point() else flat
            digest.update(f"{name}|{tuple(tensor.shape)}|{low.dtype}".encode())
            digest.update(memoryview(low.view(torch.uint8).numpy()))
    return {dtype: digest.hexdigest() for dtype, digest in digests.items()}


def _holds(model: nn.Module, dtype: torch.dtype) -> bool:
    """Whether rounding the weights to a precision changes none of them."""
    floating = (t for t in model.state_dict().values() if t.is_floating_point())
    return all(torch.equal(t, t.to(dtype).to(t.dtype)) for t in floating)
