"""Published ways to train language models with exits, where `offramp.train.recipe` alone does not say them.

===============================  ===================================================================================================
method                           recipe
===============================  ===================================================================================================
Kangaroo, EESD, self-supervised  ``Frozen(Distill(temperature=1, alpha=1))``: soft cross-entropy to the full model
EE-Tuning                        ``Frozen()``: hard labels, heads alone
EE-LLM                           ``Joint(Warmed((0.1, 0.2, 1.0)))``
Sorted LLaMA                     ``Joint(Mean())`` with the shared head
LayerSkip                        ``LayerDropout(EarlyExitLoss(depths, blocks, curriculum=Rotating(every)), rate)`` with the shared head
SkipDecode                       ``Skipping(LinearDepth(blocks, most, least))``
FREE                             ``ShallowDeep(shallow)``
===============================  ===================================================================================================

Shapes: ``B`` texts, ``T`` tokens of each, ``W`` width of the states, ``L`` blocks, ``K`` exits, the model's own answer among them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from offramp.budget.depth_schedule import LinearDepth
from offramp.core.errors import InvalidInput
from offramp.train.losses import per_item
from offramp.train.recipe import Around, Explicit, FinalOnly, Joint, Objective, Recipe, Seen, weighted
from offramp.train.text import TextNet

if TYPE_CHECKING:
    from offramp.network import MultiExit

# ---- weights of the exits ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mean:
    """``1 / K`` for every exit: the mean over the sub-models (Sorted LLaMA, Kavehzadeh et al. 2024, section 3.2)."""

    def __call__(self, exits: int, progress: float) -> tuple[float, ...]:
        return (1.0 / exits,) * exits


@dataclass(frozen=True)
class Warmed:
    """Early exits rise from 0 to their weights, then stay; the last keeps its own (EE-LLM, Chen et al. 2023, section 5.1).

    Attributes:
        values: K weights >= 0, the model's own answer last; EE-LLM 0.1 and 0.2 at a quarter and half of the depth, and 1.
        share: of the training that the rise takes, in [0, 1]; 0 = none.
        cosine: rise along half a cosine instead of a line.
    """

    values: tuple[float, ...]
    share: float = 0.1
    cosine: bool = False

    def __post_init__(self) -> None:
        Explicit(self.values)
        if not 0 <= self.share <= 1:
            raise InvalidInput(f"share must be in [0, 1], got {self.share}.")

    def __call__(self, exits: int, progress: float) -> tuple[float, ...]:
        *early, last = Explicit(self.values)(exits, progress)
        risen = 1.0 if self.share == 0 else min(1.0, progress / self.share)
        if self.cosine:
            risen = (1 - math.cos(math.pi * risen)) / 2
        return (*(w * risen for w in early), last)


# ---- LayerSkip -----------------------------------------------------------------------------------------------------------


@runtime_checkable
class Curriculum(Protocol):
    """Which early exits take part in a step: ``(early exits, step, progress in [0, 1]) -> one flag each``."""

    def __call__(self, exits: int, step: int, progress: float) -> tuple[bool, ...]: ...


@dataclass(frozen=True)
class Always:
    """All of them, in every step."""

    def __call__(self, exits: int, step: int, progress: float) -> tuple[bool, ...]:
        return (True,) * exits


@dataclass(frozen=True)
class Rotating:
    """Every R-th of them, moving on by one each step (LayerSkip's rotational curriculum, Elhoushi et al. 2024, section 4.1.2).

    Attributes:
        every: R, at least 1.
    """

    every: int

    def __post_init__(self) -> None:
        if self.every < 1:
            raise InvalidInput(f"every must be at least 1, got {self.every}.")

    def __call__(self, exits: int, step: int, progress: float) -> tuple[bool, ...]:
        return tuple((k - step) % self.every == 0 for k in range(exits))


@dataclass(frozen=True)
class Gradual:
    """From the deepest on, one after another, all by half of the training (LayerSkip's gradual curriculum)."""

    def __call__(self, exits: int, step: int, progress: float) -> tuple[bool, ...]:
        return tuple(progress >= (exits - 1 - k) / (2 * exits) for k in range(exits))


@dataclass(frozen=True)
class EarlyExitLoss(Recipe):
    """Weights that grow with depth, scaled to sum to 1 over the exits that take part (LayerSkip, section 4.1.2).

    With blocks counted from 0, block ``l`` weighs ``scale * (0 + 1 + ... + l)``, the last ``L - 1 + scale * (0 + ... + L - 2)``. An exit
    after one block alone therefore has no weight.

    Attributes:
        depths: after how many blocks each early exit reads, as attached.
        blocks: ``L``.
        scale: >= 0; the paper tries 0.1 to 1.
        curriculum: which early exits take part in a step.
    """

    depths: tuple[int, ...]
    blocks: int
    scale: float = 0.2
    curriculum: Curriculum = field(default_factory=Always)

    def __post_init__(self) -> None:
        if not self.depths or not all(0 < d < self.blocks for d in self.depths) or self.scale < 0:
            raise InvalidInput(f"Depths must be from 1 to blocks - 1, scale >= 0; got {self.depths}, {self.blocks} blocks, {self.scale}.")

    def around(self, net: MultiExit) -> AbstractContextManager[None]:
        text = _text(net, self)
        if text.depths != tuple(self.depths) or len(text.blocks) != self.blocks:
            raise InvalidInput(
                f"The recipe is for exits after {self.depths} of {self.blocks} blocks; this model has exits after "
                f"{text.depths} of {len(text.blocks)}."
            )
        return super().around(net)

    def weights(self, step: int, progress: float) -> tuple[float, ...]:
        """K weights that sum to 1."""
        on = self.curriculum(len(self.depths), step, progress)
        early = [self.scale * d * (d - 1) / 2 if o else 0.0 for d, o in zip(self.depths, on, strict=True)]
        last = self.blocks - 1 + self.scale * (self.blocks - 2) * (self.blocks - 1) / 2
        return tuple(w / (sum(early) + last) for w in (*early, last))

    def objective(self, seen: Seen) -> Objective:
        return weighted(Explicit(self.weights(seen.step, seen.progress)), seen)


@dataclass(frozen=True)
class LayerDropout(Around):
    """Each text skips each block by chance, deeper ones more often (LayerSkip, section 4.1.1).

    Block ``l`` of ``L``, counted from 0, is skipped with probability ``rate * (2^(l / (L - 1)) - 1)``: never the first, the last with
    ``rate``. This is the schedule of the paper for continued training, the same at every step. What is kept is not scaled. A skipped block
    still runs, its result is dropped: training gets no faster by it.

    Attributes:
        inner: the loss.
        rate: of the last block, in [0, 1]; paper 0.1 to 0.2.
    """

    inner: Recipe = field(default_factory=Joint)
    rate: float = 0.1

    def __post_init__(self) -> None:
        _trains_model(self, self.inner)
        if not 0 <= self.rate <= 1:
            raise InvalidInput(f"rate must be in [0, 1], got {self.rate}.")

    def rates(self, blocks: int) -> tuple[float, ...]:
        """Chance of each block to be skipped."""
        return tuple(self.rate * (2 ** (k / max(1, blocks - 1)) - 1) for k in range(blocks))

    @contextmanager
    def around(self, net: MultiExit) -> Iterator[None]:
        text = _text(net, self)
        rates = self.rates(len(text.blocks))

        def skip(index: int, module: nn.Module, before: Tensor, after: Tensor) -> Tensor:
            if not module.training or not rates[index]:
                return after
            kept = torch.rand(len(after), device=after.device) >= rates[index]
            return torch.where(kept[:, None, None], after, before)

        with self.inner.around(net), _changed(text, skip):
            yield


# ---- SkipDecode ----------------------------------------------------------------------------------------------------------


def used(schedule: LinearDepth, length: int) -> Tensor:
    """Bool ``[L, T]``: which blocks run at which positions of a text of ``length`` tokens."""
    found = torch.zeros(schedule.blocks, length, dtype=torch.bool)
    for place in range(length):
        found[list(schedule.executed(place, length)), place] = True
    return found


@dataclass(frozen=True)
class Skipping(Around):
    """Trains, and evaluates, a model that skips blocks by position: as it will run (SkipDecode, Del Corro et al. 2023).

    What runs at a position is a part of what ran at every earlier one, so that the keys and values a token misses are missed by nobody.

    Attributes:
        schedule: which blocks run where; each text of a batch is taken as one, from its first token to its last.
        inner: the loss; the model's own answer alone by default.
    """

    schedule: LinearDepth
    inner: Recipe = field(default_factory=lambda: Joint(FinalOnly()))

    def __post_init__(self) -> None:
        _trains_model(self, self.inner)

    @contextmanager
    def around(self, net: MultiExit) -> Iterator[None]:
        text = _text(net, self)
        if len(text.blocks) != self.schedule.blocks:
            raise InvalidInput(f"The schedule is for {self.schedule.blocks} blocks, but the model has {len(text.blocks)}.")

        def skip(index: int, module: nn.Module, before: Tensor, after: Tensor) -> Tensor:
            runs = used(self.schedule, after.shape[1])[index].to(after.device)
            return torch.where(runs[None, :, None], after, before)

        with self.inner.around(net), _changed(text, skip):
            yield


# ---- FREE ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShallowDeep(Recipe):
    """Two depths, each with its cross-entropy, and shallow states that learn from deep ones (FREE, Bae et al. 2023, section 4.1).

    ``(s CE_shallow + L CE_deep) / (s + L) + alpha * KD``. ``KD`` is the mean squared difference between some blocks behind the exit, evenly
    spread, and for each the nearest among the blocks before it, none of which comes before the one found for the last; deep states teach
    and are not changed by it.

    Attributes:
        shallow: ``s``, after how many blocks the only exit reads.
        alpha: weight of the states' part, >= 0; paper 0.5.
    """

    shallow: int
    alpha: float = 0.5

    @contextmanager
    def around(self, net: MultiExit) -> Iterator[None]:
        text = _text(net, self)
        if text.depths != (self.shallow,):
            raise InvalidInput(f"ShallowDeep({self.shallow}) needs one exit, after {self.shallow} blocks; there are after {text.depths}.")
        before = text.watched
        text.watched = text.blocks
        try:
            yield
        finally:
            text.watched = before

    def observe(self, logits: tuple[Tensor, ...], states: tuple[Tensor, ...]) -> tuple[int, Tensor]:
        return len(states), layerwise(states[: self.shallow], states[self.shallow :])

    def objective(self, seen: Seen) -> Objective:
        blocks, gap = seen.extra
        shallow, deep = (per_item(seen.loss, z, seen.labelled()).mean() for z in seen.logits)
        total = (self.shallow * shallow + blocks * deep) / (self.shallow + blocks) + self.alpha * gap
        return Objective(total, (shallow, deep), {"states": gap})


def layerwise(shallow: tuple[Tensor, ...], deep: tuple[Tensor, ...]) -> Tensor:
    """Mean squared difference of deep states, evenly spread and at most as many as shallow ones, to their nearest shallow ones in order."""
    count = min(len(shallow), len(deep))
    chosen = [deep[round((j + 1) * len(deep) / count) - 1].detach() for j in range(count)]
    gaps = torch.stack([torch.stack([(s.float() - d.float()).square().mean() for s in shallow]) for d in chosen])
    found, first = [], 0
    for j, row in enumerate(gaps.tolist()):
        first = min(range(first, len(row)), key=row.__getitem__)
        found.append(gaps[j, first])
    return torch.stack(found).mean()


# ---- hooks ---------------------------------------------------------------------------------------------------------------


def _trains_model(outer: Recipe, inner: Recipe) -> None:
    if len(inner.phases()) != 1 or inner.module is not None or not inner.trains_model or inner.equilibrium or inner.needs_cost:
        name = type(outer).__name__
        raise InvalidInput(
            f"{name} takes a recipe of one phase that trains the model, without a rule, gradient equilibrium or costs; got {inner!r}."
        )


def _text(net: MultiExit, recipe: Recipe) -> TextNet:
    if not isinstance(net, TextNet):
        raise InvalidInput(f"{type(recipe).__name__} is for language models made with attach_lm; this is a network made with attach.")
    return net


@contextmanager
def _changed(net: TextNet, change: Callable[[int, nn.Module, Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Within, the state after each block is ``change(block number, block, state before, state after)``."""

    def hook(index: int) -> Any:
        def changed(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            before = args[0] if args else kwargs["hidden_states"]
            if isinstance(output, Tensor):
                return change(index, module, before, output)
            return (change(index, module, before, output[0]), *output[1:])

        return changed

    with ExitStack() as stack:
        for index, path in enumerate(net.blocks):
            handle = net.model.get_submodule(path).register_forward_hook(hook(index), with_kwargs=True)
            stack.callback(handle.remove)
        yield


__all__ = [
    "Always",
    "Curriculum",
    "EarlyExitLoss",
    "Gradual",
    "LayerDropout",
    "Mean",
    "Rotating",
    "ShallowDeep",
    "Skipping",
    "Warmed",
    "layerwise",
    "used",
]
