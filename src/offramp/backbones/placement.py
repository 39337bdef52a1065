"""Where exits can go: the repeated blocks of a model, and what share of the cost has been spent after each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from offramp.backbones.taps import first_tensor
from offramp.core.errors import NotCuttable
from offramp.core.flops import counter


@dataclass(frozen=True)
class Block:
    """A place for an exit.

    Attributes:
        path: module path.
        spent: share of the model's FLOPs spent when the block ends, in (0, 1].
    """

    path: str
    spent: float


def repeated_blocks(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> list[Block]:
    """Blocks of a model in execution order, found by running it once.

    A block is a composite child of an ``nn.Sequential`` or ``nn.ModuleList`` that runs exactly once and returns a tensor with
    the batch first. Where such children hold further ones that do at least 80 % of their work, the inner ones are taken:
    the blocks of a stage and not the stage.

    Raises:
        NotCuttable: there are none.
    """
    names = {m: n for n, m in model.named_modules()}
    listed = [
        child
        for parent in model.modules()
        if isinstance(parent, nn.Sequential | nn.ModuleList)
        for child in parent.children()
        if next(child.children(), None) is not None
    ]
    calls: dict[nn.Module, int] = {}
    before: dict[nn.Module, int] = {}
    work: dict[nn.Module, int] = {}
    ended: dict[nn.Module, int] = {}
    fits: dict[nn.Module, bool] = {}
    batch = next((leaf.shape[0] for leaf in torch.utils._pytree.tree_leaves((args, dict(kwargs or {}))) if isinstance(leaf, torch.Tensor) and leaf.ndim), 0)
    was_training = {m: m.training for m in model.modules()}
    handles = []
    model.eval()
    try:
        with torch.no_grad(), counter() as counted:

            def enter(module: nn.Module, _: Any) -> None:
                before[module] = counted.get_total_flops()

            def leave(module: nn.Module, _: Any, output: Any) -> None:
                state = first_tensor(output)
                calls[module] = calls.get(module, 0) + 1
                ended[module] = counted.get_total_flops()
                work[module] = ended[module] - before[module]
                fits[module] = state is not None and state.ndim >= 2 and state.shape[0] == batch

            for module in dict.fromkeys(listed):
                handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
            model(*args, **dict(kwargs or {}))
            total = counted.get_total_flops()
    finally:
        for handle in handles:
            handle.remove()
        for module, flag in was_training.items():
            module.training = flag
    usable = [m for m in dict.fromkeys(listed) if calls.get(m) == 1 and fits.get(m) and work.get(m, 0) > 0]
    chosen: list[nn.Module] = []

    def descend(modules: Sequence[nn.Module]) -> None:
        for module in modules:
            inner = _outermost([m for m in usable if m is not module and names[m].startswith(names[module] + ".")], names)
            if len(inner) > 1 and sum(work[m] for m in inner) >= 0.8 * work[module]:
                descend(inner)
            else:
                chosen.append(module)

    descend(_outermost(usable, names))
    if not chosen or total == 0:
        raise NotCuttable(
            f"{type(model).__name__} has no repeated blocks (composite children of nn.Sequential or nn.ModuleList that run once). "
            "Name the modules to exit after: at=[...].",
            reason="missing",
            suggestions=[n for n, _ in model.named_children()][:5],
        )
    chosen.sort(key=lambda m: ended[m])
    return [Block(names[m], ended[m] / total) for m in chosen]


def _outermost(modules: Sequence[nn.Module], names: Mapping[nn.Module, str]) -> list[nn.Module]:
    paths = {names[m] for m in modules}
    return [m for m in modules if not any(names[m].startswith(p + ".") for p in paths)]
