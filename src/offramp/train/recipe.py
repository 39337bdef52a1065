"""Recipes: how exits are trained, as data. `fit` reads them; every published scheme is a composition of these.

A recipe says what is trained (``trains_model``, ``trains_heads``, ``module``), and turns the answers of one forward into a loss. A recipe
of your own: a frozen dataclass that extends `Recipe` and has ``objective``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from offramp.core.errors import InvalidInput
from offramp.train.losses import ItemLoss, divergence, per_item

if TYPE_CHECKING:
    from offramp.network import MultiExit


@dataclass(frozen=True)
class Seen:
    """What a recipe sees of one micro-batch.

    Attributes:
        logits: K answers ``[B, C]``, the model's own last.
        labels: ``[B, ...]`` or ``None``.
        loss: loss of one answer per item.
        step: optimizer steps taken in this phase; the same for all micro-batches of one step.
        progress: share of this phase that is done, in [0, 1].
        cost: ``[K]`` cost of leaving at each exit, as a share of the whole.
        extra: what the recipe's `observe` returned inside the forward.
    """

    logits: tuple[Tensor, ...]
    labels: Tensor | None
    loss: ItemLoss
    step: int = 0
    progress: float = 0.0
    cost: tuple[float, ...] = ()
    extra: Any = None

    def labelled(self) -> Tensor:
        """The labels.

        Raises:
            InvalidInput: the loader gives none.
        """
        if self.labels is None:
            raise InvalidInput(
                "This recipe needs labels, but the loader yields none. Yield (inputs, labels), or use Frozen(Distill(alpha=1.0))."
            )
        return self.labels


class Objective(NamedTuple):
    """What a recipe asks to be minimised.

    Attributes:
        total: scalar, a mean over rows.
        losses: mean loss of each exit, or ``None`` where the exit takes no part in this step: its head is left alone.
        terms: other parts of the total, by name, for the log.
    """

    total: Tensor
    losses: tuple[Tensor | None, ...]
    terms: Mapping[str, Tensor] = {}


class Phase(NamedTuple):
    """A stretch of training with one recipe, and its share of the whole."""

    recipe: Recipe
    share: float


class Recipe(ABC):
    """Base of recipes. Subclasses are frozen dataclasses."""

    @property
    def trains_model(self) -> bool:
        """Whether the model's weights are trained; otherwise it runs in eval mode and nothing of it changes."""
        return True

    @property
    def trains_heads(self) -> bool:
        """Whether the heads' weights are trained."""
        return True

    @property
    def equilibrium(self) -> bool:
        """Whether the forward has gradient equilibrium."""
        return False

    @property
    def needs_cost(self) -> bool:
        """Whether ``seen.cost`` is read; counting it cuts the model."""
        return False

    @property
    def module(self) -> nn.Module | None:
        """A module trained along with the network (a learned rule), or ``None``."""
        return None

    def around(self, net: MultiExit) -> AbstractContextManager[None]:
        """What holds of the network's forward while this recipe trains it, in training and in evaluation; entered once a phase."""
        return nullcontext()

    def phases(self) -> tuple[Phase, ...]:
        """What is trained in turn; one phase unless the recipe is made of others."""
        return (Phase(self, 1.0),)

    def observe(self, logits: tuple[Tensor, ...], states: tuple[Tensor, ...]) -> Any:
        """Run ``module`` inside the (wrapped) forward; what it returns is ``seen.extra``."""
        return None

    @abstractmethod
    def objective(self, seen: Seen) -> Objective:
        """The loss of one micro-batch."""


# ---- weights of the exits ------------------------------------------------------------------------------------------------


@runtime_checkable
class Weights(Protocol):
    """``(exits K, progress in [0, 1]) -> K weights >= 0``, the model's own answer last. 0 = the exit takes no part."""

    def __call__(self, exits: int, progress: float) -> tuple[float, ...]: ...


@dataclass(frozen=True)
class Equal:
    """1 for every exit: the plain sum (MSDNet, Huang et al. 2018, section 4; BERxiT's joint)."""

    def __call__(self, exits: int, progress: float) -> tuple[float, ...]:
        return (1.0,) * exits


@dataclass(frozen=True)
class IndexWeighted:
    """``k / sum_j j``, k from 1: deeper exits weigh more (PABEE, Zhou et al. 2020, equation 4)."""

    def __call__(self, exits: int, progress: float) -> tuple[float, ...]:
        return tuple(k / (exits * (exits + 1) / 2) for k in range(1, exits + 1))


@dataclass(frozen=True)
class EarlyWeighted:
    """``K, K-1, ..., 2`` for the early exits and 1 for the last: JEI-DNN's warm-up (Regol et al. 2024, released code)."""

    def __call__(self, exits: int, progress: float) -> tuple[float, ...]:
        return tuple(float(exits - k) for k in range(exits))


@dataclass(frozen=True)
class Ramp:
    """1 for the last exit; each early exit rises linearly from ``start`` to its end (Shallow-Deep Networks, Kaya et al. 2019, section 4.2).

    Attributes:
        start: weight at the beginning, >= 0; paper 0.01.
        end: weight of each early exit at the end; ``None`` = ``k / K``, the paper's choice for exits evenly spaced by cost.
    """

    start: float = 0.01
    end: tuple[float, ...] | None = None

    def __call__(self, exits: int, progress: float) -> tuple[float, ...]:
        end = self.end if self.end is not None else tuple(k / exits for k in range(1, exits))
        if len(end) != exits - 1:
            raise InvalidInput(f"Ramp has {len(end)} end weights, but the network has {exits - 1} early exits.")
        return (*(self.start + (e - self.start) * progress for e in end), 1.0)


@dataclass(frozen=True)
class Explicit:
    """The weights as given.

    Attributes:
        values: K weights >= 0, the model's own answer last, not all 0.
        normalise: divide by their sum. LGViT: layer numbers of the exits, then the depth.
    """

    values: tuple[float, ...]
    normalise: bool = False

    def __post_init__(self) -> None:
        if not self.values or any(not 0 <= v < float("inf") for v in self.values) or sum(self.values) <= 0:
            raise InvalidInput(f"Weights of the exits must be >= 0, finite and not all 0, got {self.values}.")

    def __call__(self, exits: int, progress: float) -> tuple[float, ...]:
        if len(self.values) != exits:
            raise InvalidInput(f"{len(self.values)} weights were given, but the network has {exits} exits, its own output included.")
        return tuple(v / sum(self.values) for v in self.values) if self.normalise else tuple(float(v) for v in self.values)


@dataclass(frozen=True)
class FinalOnly:
    """The model's own answer alone, as if there were no exits."""

    def __call__(self, exits: int, progress: float) -> tuple[float, ...]:
        return (0.0,) * (exits - 1) + (1.0,)


def weighted(weights: Weights, seen: Seen) -> Objective:
    """``sum_k w_k mean(loss_k)``."""
    labels = seen.labelled()
    scale = weights(len(seen.logits), seen.progress)
    losses = tuple(per_item(seen.loss, z, labels).mean() if w else None for z, w in zip(seen.logits, scale, strict=True))
    parts = [w * loss for w, loss in zip(scale, losses, strict=True) if loss is not None]
    return Objective(torch.stack(parts).sum(), losses)


def _single(outer: Recipe, inner: Recipe) -> None:
    if len(inner.phases()) != 1 or inner.module is not None:
        name = type(outer).__name__
        raise InvalidInput(f"{name} takes a recipe of one phase and without a rule, got {type(inner).__name__}. Put {name} inside of it.")


# ---- recipes -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Joint(Recipe):
    """Model and heads together on a weighted sum of the exits' losses (BranchyNet, MSDNet).

    Attributes:
        weights: of the exits.
        equilibrium: average the exits' gradients in the trunk instead of summing them; see `offramp.train.equilibrium`.
    """

    weights: Weights = field(default_factory=Equal)
    equilibrium: bool = False

    def objective(self, seen: Seen) -> Objective:
        return weighted(self.weights, seen)


@dataclass(frozen=True)
class Alternating(Recipe):
    """Even steps train the model's own answer alone, odd steps the weighted exits (BERxiT, Xin et al. 2021, section 3.2).

    A step is an optimizer step, so gradient accumulation does not mix the two. With ``weights=Explicit((4, ..., 11, 12),
    normalise=True)`` it is stage 1 of LGViT (Xu et al. 2023, released code).

    Attributes:
        weights: of the odd steps.
        equilibrium: as for `Joint`, in odd steps and even.
    """

    weights: Weights = field(default_factory=Equal)
    equilibrium: bool = False

    def objective(self, seen: Seen) -> Objective:
        return weighted(FinalOnly() if seen.step % 2 == 0 else self.weights, seen)


class Around(Recipe):
    """A recipe made of another, to which it leaves everything that it does not change."""

    inner: Recipe

    @property
    def trains_model(self) -> bool:
        return self.inner.trains_model

    @property
    def trains_heads(self) -> bool:
        return self.inner.trains_heads

    @property
    def equilibrium(self) -> bool:
        return self.inner.equilibrium

    @property
    def needs_cost(self) -> bool:
        return self.inner.needs_cost

    def around(self, net: MultiExit) -> AbstractContextManager[None]:
        return self.inner.around(net)

    def observe(self, logits: tuple[Tensor, ...], states: tuple[Tensor, ...]) -> Any:
        return self.inner.observe(logits, states)

    def objective(self, seen: Seen) -> Objective:
        return self.inner.objective(seen)


@dataclass(frozen=True)
class ToLast:
    """Every early exit learns from the model's own answer (Phuong and Lampert 2019; LGViT; Dynamic Perceiver)."""

    def teachers(self, logits: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (logits[-1].detach(),) * (len(logits) - 1)


@dataclass(frozen=True)
class ToNext:
    """Every early exit learns from the exit after it."""

    def teachers(self, logits: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(z.detach() for z in logits[1:])


@dataclass(frozen=True)
class Distill(Around):
    """``(1 - alpha) * inner + alpha * sum_k divergence(exit k, teacher)``; no gradient flows into the teacher.

    For classes the divergence is ``T^2 KL(p_teacher^T || p_k^T)``. With ``alpha=1`` no labels are needed (FastBERT, Liu et
    al. 2020, equation 6, inside `Frozen`).

    Attributes:
        inner: the supervised part.
        to: who teaches: `ToLast` or `ToNext`.
        temperature: > 0.
        alpha: in [0, 1]; LGViT 0.3.
    """

    inner: Recipe = field(default_factory=Joint)
    to: ToLast | ToNext = field(default_factory=ToLast)
    temperature: float = 2.0
    alpha: float = 0.3

    def __post_init__(self) -> None:
        if not self.temperature > 0 or not 0 <= self.alpha <= 1:
            raise InvalidInput(f"Distill needs temperature > 0 and alpha in [0, 1], got {self.temperature} and {self.alpha}.")
        _single(self, self.inner)

    def objective(self, seen: Seen) -> Objective:
        if len(seen.logits) < 2:
            raise InvalidInput("Distill needs at least one early exit.")
        teachers = self.to.teachers(seen.logits)
        gaps = [divergence(seen.loss, z, t, self.temperature).mean() for z, t in zip(seen.logits[:-1], teachers, strict=True)]
        distilled = torch.stack(gaps).sum()
        if self.alpha == 1:
            return Objective(distilled, (*gaps, None), {"distill": distilled})
        inner = self.inner.objective(seen)
        losses = tuple(a if a is not None else b for a, b in zip(inner.losses, (*gaps, None), strict=True))
        return Objective((1 - self.alpha) * inner.total + self.alpha * distilled, losses, {**inner.terms, "distill": distilled})


@dataclass(frozen=True)
class Frozen(Around):
    """Heads alone. The model keeps its weights and batch statistics bit for bit, runs in eval mode, and no graph is kept of it.

    Attributes:
        inner: the loss; the model's own answer in it has no effect.
    """

    inner: Recipe = field(default_factory=Joint)

    def __post_init__(self) -> None:
        _single(self, self.inner)

    @property
    def trains_model(self) -> bool:
        return False

    @property
    def equilibrium(self) -> bool:
        return False


@dataclass(frozen=True)
class TwoStage(Recipe):
    """One recipe, then another: fine-tune, then train exits on the frozen model (DeeBERT, Xin et al. 2020, section 3.2).

    FastBERT: ``TwoStage(then=Frozen(Distill(temperature=1.0, alpha=1.0)))``. Each stage has its own optimizer and scheduler.

    Attributes:
        first: first stage.
        then: second stage; may itself be a `TwoStage`.
        share: of the epochs (and of ``max_steps``) that the first stage gets, in (0, 1); each stage gets at least one.
    """

    first: Recipe = field(default_factory=lambda: Joint(FinalOnly()))
    then: Recipe = field(default_factory=Frozen)
    share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise InvalidInput(f"share must lie inside (0, 1), got {self.share}.")

    def phases(self) -> tuple[Phase, ...]:
        first = [Phase(p.recipe, p.share * self.share) for p in self.first.phases()]
        return (*first, *(Phase(p.recipe, p.share * (1 - self.share)) for p in self.then.phases()))

    def objective(self, seen: Seen) -> Objective:
        raise InvalidInput("TwoStage has no loss of its own; take those of its phases().")


def allot(total: int, phases: tuple[Phase, ...], unit: str) -> tuple[int, ...]:
    """Divide ``total`` epochs or steps among phases by their shares, at least one each.

    Raises:
        InvalidInput: there are fewer than phases.
    """
    if total < len(phases):
        raise InvalidInput(f"This recipe has {len(phases)} phases and so needs at least {len(phases)} {unit}, got {total}.")
    spare, given, done = total - len(phases), [], 0.0
    for phase in phases:
        given.append(1 + round(spare * min(1.0, done + phase.share)) - round(spare * done))
        done += phase.share
    return tuple(given)


__all__ = [
    "Alternating",
    "Distill",
    "EarlyWeighted",
    "Equal",
    "Explicit",
    "FinalOnly",
    "Frozen",
    "IndexWeighted",
    "Joint",
    "Objective",
    "Phase",
    "Ramp",
    "Recipe",
    "Seen",
    "ToLast",
    "ToNext",
    "TwoStage",
    "Weights",
    "allot",
]
