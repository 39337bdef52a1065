"""What one phase trains: which parameters, in which modes, by which optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from offramp.core.errors import InvalidInput
from offramp.network import MultiExit
from offramp.train.recipe import Recipe
from offramp.train.setup import OptimizerFactory

MODEL_LR, ADDED_LR = 5e-5, 1e-3
"""Default learning rates: the model's weights are trained already, those of heads and rules are new."""


class Trainee(nn.Module):
    """A network and the rule learned along with it as one module, so that one wrapper (DDP, FSDP) holds everything that is trained.

    Attributes:
        net: the network.
        extra: the recipe's module, or ``None``.
        recipe: of this phase.

    Args:
        net: the network.
        recipe: of this phase.
        still: modules of the network that stay in eval mode.
    """

    def __init__(self, net: MultiExit, recipe: Recipe, still: Sequence[nn.Module] = ()) -> None:
        super().__init__()
        self.net = net
        self.extra = recipe.module
        self.recipe = recipe
        self._still = tuple(still)
        self._no_split_modules = getattr(net.model, "_no_split_modules", None)  # FSDP's wrapping policy asks the outermost module

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Tensor, ...], Any]:
        logits, states = self.net.forward_with_states(*args, **kwargs)
        return logits, self.recipe.observe(logits, states)

    def set_modes(self) -> None:
        """Training mode for what is trained, eval mode for the rest."""
        self.net.train(self.recipe.trains_heads)
        self.net.model.train(self.recipe.trains_model)
        if self.extra is not None:
            self.extra.train()
        for module in self._still:
            module.eval()


@contextmanager
def only_trained(net: MultiExit, recipe: Recipe) -> Iterator[None]:
    """Within, only what the recipe trains requires gradients; parameters the user froze stay frozen."""
    inside = list(net.model.parameters())
    shared = {id(p) for p in inside}
    added = [p for p in net.heads.parameters() if id(p) not in shared]
    off = [*([] if recipe.trains_model else inside), *([] if recipe.trains_heads else added)]
    flags = [(p, p.requires_grad) for p in off]
    for p in off:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)


def own_frozen(module: nn.Module) -> bool:
    """Whether a module has parameters of its own and all are frozen."""
    own = list(module.parameters(recurse=False))
    return bool(own) and not any(p.requires_grad for p in own)


def forget_unused(net: MultiExit, used: list[bool]) -> None:
    """Drop the zero gradients of heads that took no part, so that weight decay and momentum leave them alone."""
    if any(getattr(head, "needs_previous", False) for head in net.heads):
        return
    shared = {id(p) for p in net.model.parameters()}
    kept = {id(p) for head, u in zip(net.heads, used, strict=False) if u for p in head.parameters()}
    for head, u in zip(net.heads, used, strict=False):
        for p in () if u else head.parameters():
            if id(p) not in shared | kept:
                p.grad = None


def make_optimizer(factory: OptimizerFactory | None, trainee: Trainee) -> torch.optim.Optimizer:
    """The caller's optimizer of what requires gradients, or AdamW.

    Raises:
        InvalidInput: nothing requires gradients, or the factory returns no optimizer.
    """
    parameters = [p for p in trainee.parameters() if p.requires_grad]
    if not parameters:
        raise InvalidInput(f"{type(trainee.recipe).__name__} has nothing to train: every parameter it may change has requires_grad=False.")
    if factory is not None:
        made = factory(parameters)
        if not isinstance(made, torch.optim.Optimizer):
            raise InvalidInput(
                f"optimizer must be a function of the parameters that returns a torch optimizer; it returned {type(made).__name__}."
            )
        return made
    inside = {id(p) for p in trainee.net.model.parameters()}
    groups = [([p for p in parameters if id(p) in inside], MODEL_LR), ([p for p in parameters if id(p) not in inside], ADDED_LR)]
    return torch.optim.AdamW([{"params": g, "lr": lr} for g, lr in groups if g])
