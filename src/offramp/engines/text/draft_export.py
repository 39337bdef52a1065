"""The draft as a model of its own: the first blocks and an exit as a checkpoint that other libraries load.

transformers takes it as ``assistant_model=`` of ``generate``, servers as a draft model. Nothing of this library is needed to run it: it is
the user's own class with fewer blocks. Before the folder appears, what was written is loaded again and compared with the exit.
"""

from __future__ import annotations

import copy
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from offramp.core.errors import ExportError, InvalidInput
from offramp.core.modes import evaluating
from offramp.exits.cached import Adapter, Block
from offramp.exits.lm import OwnNorm, OwnOutput, Shared, Trimmed
from offramp.language import LanguageModel

_BY_BLOCK = ("layer_types", "no_rope_layers")
"""Settings of transformers' configurations that hold one value for each block."""
_ON_LOGITS: dict[str, Any] = {"logit_scale": 1.0, "logits_scaling": 1.0, "final_logit_softcapping": None}
"""Settings by which models change their logits, and the value that changes nothing."""
_TOKENS = 12


@dataclass(frozen=True)
class DraftCheckpoint:
    """What was written.

    Attributes:
        folder: for ``from_pretrained``.
        blocks: of the draft.
        parameters: of the draft.
        difference: largest between its logits, loaded again, and those of the exit, over the spread of the logits.
        remark: what the draft does otherwise than the exit, or ``""``.
    """

    folder: Path
    blocks: int
    parameters: int
    difference: float
    remark: str = ""


def export_draft(
    lm: LanguageModel,
    folder: str | os.PathLike[str],
    exit_index: int = 0,
    *,
    tokenizer: Any = None,
    overwrite: bool = False,
    tolerance: float = 1e-3,
) -> DraftCheckpoint:
    """Write the blocks before an exit, and the exit, as a checkpoint of the model's own class.

    `Shared`, `OwnNorm` and `OwnOutput` are a final norm and an output layer, which every class has; `Block` is one block more. `Trimmed`
    is written with the whole output layer: a checkpoint cannot leave rows out, and a draft of a token that was not kept is verified like
    any other. `Adapter` is refused: an attention without a feed-forward is no block of any class.

    Args:
        lm: from `offramp.attach`.
        folder: made; must not exist or be empty, unless ``overwrite``.
        exit_index: which exit.
        tokenizer: of transformers, saved beside it.
        overwrite: replace the folder and all that is in it.
        tolerance: largest difference of logits allowed, relative to their spread; 128 times as much below float32.

    Raises:
        ExportError: the exit is no checkpoint of the model's class; says why.
        InvalidInput: there is no such exit, its head was given as a module, or the folder is in use.
    """
    if not 0 <= exit_index < len(lm.exits):
        raise InvalidInput(f"exit_index must be from 0 to {len(lm.exits) - 1}, as the model has {len(lm.exits)} exits; got {exit_index}.")
    if len(lm.specs) != len(lm.exits):
        raise InvalidInput("The heads were given as modules, so what they are is not known; make the model with offramp.attach.")
    target = Path(folder)
    if in_use(target) and not overwrite:
        raise InvalidInput(f"{target} exists and is not empty. Choose another folder, or give overwrite=True to replace it.")
    draft = _built(lm, exit_index)
    expected = _exit_logits(lm, exit_index)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as held:
        made = Path(held) / "draft"
        draft.save_pretrained(made)
        if tokenizer is not None:
            tokenizer.save_pretrained(made)
        difference = _compared(type(draft).from_pretrained(made, dtype=lm.decoder.dtype), expected, lm, exit_index, tolerance)
        if target.is_dir():
            os.replace(target, Path(held) / "before")  # deleted with the temporary folder
        elif target.exists():
            target.unlink()
        made.chmod(0o777 & ~_umask())
        os.replace(made, target)
    remark = ""
    if isinstance(lm.specs[exit_index], Trimmed):
        remark = "The exit drafts kept tokens only; the checkpoint has the whole output layer and may draft any."
    return DraftCheckpoint(target, int(draft.config.num_hidden_layers), sum(p.numel() for p in draft.parameters()), difference, remark)


def in_use(folder: Path) -> bool:
    """Whether something stands where a checkpoint is to be written: a file, or a folder that is not empty."""
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


def _built(lm: LanguageModel, exit_index: int) -> Any:
    """The draft, with copies of the weights, on the model's device."""
    spec, depth, model = lm.specs[exit_index], lm.exits[exit_index], lm.decoder.model
    head: Any = lm.heads[exit_index]
    if isinstance(spec, Adapter):
        raise ExportError(
            "An Adapter is an attention with norms of its own and no feed-forward, which no model class has as its last block. Fit a "
            "Shared, OwnNorm, OwnOutput or Block exit to export, or use the adapter here."
        )
    if not isinstance(spec, Shared | OwnNorm | OwnOutput | Trimmed | Block):
        raise ExportError(f"It is not known how a {type(spec).__name__} is written as a final norm and an output layer.")
    like = [*range(depth), spec.like % len(lm.decoder)] if isinstance(spec, Block) else [*range(depth)]
    config = _cut(model.config, like, len(lm.decoder))
    if isinstance(spec, OwnOutput):
        config.tie_word_embeddings = False
        for name, nothing in _ON_LOGITS.items():  # a layer of its own gives its logits as they are
            if getattr(config, name, None) is not None:
                setattr(config, name, nothing)
    with torch.random.fork_rng(devices=[]):  # weights are drawn and then replaced: the caller's random state is not spent
        try:
            draft: Any = type(model)(config)
        except (TypeError, ValueError, IndexError) as error:
            raise ExportError(f"A {type(model).__name__} of {len(like)} blocks cannot be made of its configuration: {error}.") from error
    draft = draft.to(device=lm.decoder.device, dtype=lm.decoder.dtype).eval()
    own, wanted = model.state_dict(), draft.state_dict()
    blocks = tuple(f"{path}." for path in lm.block_paths)
    taken: dict[str, Tensor] = {}
    for name in wanted:
        number = next((k for k, prefix in enumerate(blocks) if name.startswith(prefix)), None)
        taken[name] = head.block.block.state_dict()[name[len(blocks[number]) :]] if number == depth and number is not None else own[name]
    draft.load_state_dict(taken)
    if isinstance(spec, OwnNorm | OwnOutput | Block):
        mine = head.after if isinstance(spec, Block) else head.norm
        _place(lm, draft, lm.decoder.norm_module, mine, "final norm")
    if isinstance(spec, OwnOutput):
        draft.get_output_embeddings().load_state_dict(head.output.state_dict())
    draft.generation_config = copy.deepcopy(model.generation_config)
    return draft


def _cut(config: Any, like: list[int], blocks: int) -> Any:
    """The configuration of a model whose blocks are like those numbered."""
    out = copy.deepcopy(config)
    out.num_hidden_layers = len(like)
    for name in _BY_BLOCK:
        values = getattr(config, name, None)
        if isinstance(values, list | tuple) and len(values) == blocks:
            setattr(out, name, [values[k] for k in like])
    return out


def _place(lm: LanguageModel, draft: Any, theirs: nn.Module, mine: nn.Module, what: str) -> None:
    """Give the draft's module that stands where ``theirs`` stands in the model the weights of ``mine``."""
    path = next((name for name, module in lm.model.named_modules() if module is theirs), None)
    if path is None:
        if any(True for _ in mine.parameters()):
            raise ExportError(f"A {type(lm.model).__name__} has no {what}, so that of the exit has no place in it.")
        return
    draft.get_submodule(path).load_state_dict(mine.state_dict())


def _tokens(lm: LanguageModel) -> Tensor:
    return torch.arange(2 * _TOKENS, device=lm.decoder.device).reshape(2, _TOKENS) * 7 % lm.decoder.vocabulary


def _exit_logits(lm: LanguageModel, exit_index: int) -> Tensor:
    """Logits ``[2, T, V]`` that the exit gives for some tokens; of a trimmed one those of the whole output layer, which is written."""
    model, tokens = lm.decoder, _tokens(lm)
    with torch.no_grad(), evaluating(lm.model, lm):
        step = model.step(model.cache(*tokens.shape), torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape))
        hidden = model.run(model.embed(tokens, step), 0, lm.exits[exit_index], step)
        trimmed = isinstance(lm.specs[exit_index], Trimmed)
        return (model.logits(hidden) if trimmed else lm.teach(hidden, exit_index)).float()


def _compared(draft: Any, expected: Tensor, lm: LanguageModel, exit_index: int, tolerance: float) -> float:
    """Largest difference of the loaded draft's logits."""
    with torch.no_grad():
        found = draft.to(lm.decoder.device).eval()(_tokens(lm), use_cache=False).logits.float()
    difference = float((found - expected).abs().max() / expected.std().clamp(min=1e-6))
    allowed = tolerance if lm.decoder.dtype in (torch.float32, torch.float64) else 128 * tolerance
    if not difference <= allowed:
        raise ExportError(
            f"Loaded again, a {type(draft).__name__} of the blocks before exit {exit_index} differs from the exit by {difference:.3g} of "
            f"the spread of its logits (at most {allowed:.3g} is rounding): the class does something that depends on how many blocks it "
            "has, or to its logits. Nothing was written."
        )
    return difference


def _umask() -> int:
    found = os.umask(0)
    os.umask(found)
    return found


__all__ = ["DraftCheckpoint", "export_draft", "in_use"]
