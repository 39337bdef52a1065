"""Training of learned rules: what each is taught, and the recipe that teaches it after the network or along with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from offramp.core.errors import InvalidInput
from offramp.core.types import Readout
from offramp.policies.scores import halting_distribution
from offramp.train.losses import per_item
from offramp.train.recipe import Objective, Recipe, Seen


@runtime_checkable
class Lesson(Protocol):
    """What a rule is taught."""

    @property
    def needs_cost(self) -> bool:
        """Whether ``seen.cost`` is read."""
        ...

    def observe(self, rule: Any, readouts: tuple[Readout, ...]) -> Tensor:
        """Run the rule on the early exits' readouts, inside the forward."""
        ...

    def loss(self, observed: Tensor, item_losses: Tensor, seen: Seen) -> Tensor:
        """Scalar loss, a mean over rows, from what was observed and the exits' losses ``[B, K]``."""
        ...


def _method(rule: Any, name: str, lesson: object) -> Any:
    method = getattr(rule, name, None)
    if method is None:
        raise InvalidInput(
            f"{type(lesson).__name__} trains a rule through its method `{name}`; {type(rule).__name__} has none. Choose another lesson."
        )
    return method


def _logits(rule: Any, readouts: tuple[Readout, ...], lesson: object) -> Tensor:
    logit = _method(rule, "logit", lesson)
    return torch.stack([logit(k, r) for k, r in enumerate(readouts)], dim=1)


def _shares(given: tuple[float, ...] | None, seen: Seen, like: Tensor) -> Tensor:
    cost = given if given is not None else seen.cost
    if len(cost) != len(seen.logits):
        raise InvalidInput(f"cost has {len(cost)} values; the network has {len(seen.logits)} exits, its own output included.")
    return torch.tensor(cost, dtype=like.dtype, device=like.device)


@dataclass(frozen=True)
class TargetExit:
    """Each gate learns whether the best exit is here or was before: ``BCE(g_k, 1[k >= argmin_j (loss_j + trade_off * cost_j)])``.

    JEI-DNN (Regol et al. 2024, section 4.2). For rules with ``logit(exit_index, readout)``. Positives of gate k weigh
    ``min((B - n_k) / n_k, max_positive_weight)``, with ``n_k`` the rows of the batch whose best exit is k (the released code counts
    on a validation set once an epoch).

    Attributes:
        trade_off: loss units that the whole model's cost is worth, >= 0; paper 0.15 to 0.7.
        cost: ``[K]`` share of the whole cost spent when leaving at each exit; ``None`` = counted FLOPs, heads included.
        max_positive_weight: >= 1.
    """

    trade_off: float = 0.7
    cost: tuple[float, ...] | None = None
    max_positive_weight: float = 5.0

    @property
    def needs_cost(self) -> bool:
        return self.cost is None

    def observe(self, rule: Any, readouts: tuple[Readout, ...]) -> Tensor:
        return _logits(rule, readouts, self)

    def loss(self, observed: Tensor, item_losses: Tensor, seen: Seen) -> Tensor:
        best = (item_losses + self.trade_off * _shares(self.cost, seen, item_losses)).argmin(1)
        gates = torch.arange(observed.shape[1], device=observed.device)
        target = (gates >= best[:, None]).to(observed.dtype)
        here = (gates == best[:, None]).sum(0).to(observed.dtype)
        weight = ((len(best) - here) / here.clamp(min=1)).clamp(max=self.max_positive_weight)
        weight = torch.where(here > 0, weight, torch.full_like(weight, self.max_positive_weight))
        return F.binary_cross_entropy_with_logits(observed, target, pos_weight=weight)


@dataclass(frozen=True)
class Wrongness:
    """Each gate's certainty learns whether this exit is right: squared error to ``1 - wrong_k``.

    BERxiT's learning to exit (Xin et al. 2021, section 4.2): ``wrong`` is 1 for a wrong class, and ``tanh |error|`` for
    regression. For rules with ``logit(exit_index, readout)``.
    """

    needs_cost: ClassVar[bool] = False

    def observe(self, rule: Any, readouts: tuple[Readout, ...]) -> Tensor:
        return _logits(rule, readouts, self)

    def loss(self, observed: Tensor, item_losses: Tensor, seen: Seen) -> Tensor:
        labels = seen.labelled()
        early = torch.stack([z.detach() for z in seen.logits[:-1]], dim=1)
        if labels.is_floating_point() and (early.ndim == 2 or early.shape[-1] == 1):
            wrong = torch.tanh((early.reshape(len(labels), -1) - labels.reshape(-1, 1)).abs())
        else:
            classes = labels.argmax(-1) if labels.is_floating_point() else labels
            wrong = (early.argmax(-1) != classes[:, None]).float()
        return (torch.sigmoid(observed) - (1 - wrong)).square().mean()


@dataclass(frozen=True)
class PredictLoss:
    """The rule's predicted loss learns the exit's: squared error, so that it becomes the mean loss given the state.

    After Yoo and Kweon 2019, who rank pairs instead. For rules with ``loss(exit_index, readout)``.
    """

    needs_cost: ClassVar[bool] = False

    def observe(self, rule: Any, readouts: tuple[Readout, ...]) -> Tensor:
        predict = _method(rule, "loss", self)
        return torch.stack([predict(k, r) for k, r in enumerate(readouts)], dim=1)

    def loss(self, observed: Tensor, item_losses: Tensor, seen: Seen) -> Tensor:
        return (observed - item_losses[:, :-1]).square().mean()


@dataclass(frozen=True)
class BestDepth:
    """A selector learns the depth of highest utility: ``CE(depths, argmax_k (quality_k - trade_off * cost_k))``.

    ECO-M2F (Yao et al. 2024, gating network). ``quality = exp(-loss)`` in (0, 1]: for cross-entropy the probability of the label.
    For rules with ``depth_logits(readout)``.

    Attributes:
        trade_off: quality that the whole model's cost is worth, >= 0.
        cost: as for `TargetExit`.
    """

    trade_off: float = 0.1
    cost: tuple[float, ...] | None = None

    @property
    def needs_cost(self) -> bool:
        return self.cost is None

    def observe(self, rule: Any, readouts: tuple[Readout, ...]) -> Tensor:
        depths: Tensor = _method(rule, "depth_logits", self)(readouts[0])
        return depths

    def loss(self, observed: Tensor, item_losses: Tensor, seen: Seen) -> Tensor:
        utility = torch.exp(-item_losses) - self.trade_off * _shares(self.cost, seen, item_losses)
        return F.cross_entropy(observed, utility.argmax(1))


@dataclass(frozen=True)
class Ponder:
    """Halting as a latent exit: ``sum_k p_k loss_k + beta * KL(geometric prior || p)``, ``p_k = lambda_k prod_{j<k} (1 - lambda_j)``.

    PALBERT (Balagansky and Gavrilov 2022, section 3), after PonderNet (Banino et al. 2021); the last exit takes what remains of p
    and of the prior. For rules with ``halting(exit_index, readout, state)``.

    Attributes:
        beta: >= 0; paper 0.5.
        prior: halting probability of the geometric prior, in (0, 1); paper 0.1.
    """

    beta: float = 0.5
    prior: float = 0.1
    needs_cost: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.beta >= 0 or not 0 < self.prior < 1:
            raise InvalidInput(f"Ponder needs beta >= 0 and prior in (0, 1), got {self.beta} and {self.prior}.")

    def observe(self, rule: Any, readouts: tuple[Readout, ...]) -> Tensor:
        halting = _method(rule, "halting", self)
        first = readouts[0].logits
        state = rule.begin(first.shape[0], first.device)
        chances = []
        for k, readout in enumerate(readouts):
            chance, state = halting(k, readout, state)
            chances.append(chance)
        return torch.stack(chances, dim=1)

    def loss(self, observed: Tensor, item_losses: Tensor, seen: Seen) -> Tensor:
        p = halting_distribution(observed)
        prior = halting_distribution(torch.full_like(observed[:1], self.prior))
        # The floor keeps the logarithm finite where halting is certain; there its gradient is 0.
        gap = (prior * (prior.log() - p.clamp(min=1e-8).log())).sum(1)
        return ((p * item_losses).sum(1) + self.beta * gap).mean()


@dataclass(frozen=True)
class Gates(Recipe):
    """Train a learned rule.

    ====================================================  ============================================================
    ``Gates(rule, TargetExit())``                         after the network, which stays as it is
    ``Gates(rule, Wrongness(), Alternating())``           along with it: BERxiT
    ``Gates(rule, Ponder(), Joint(), task=0, detach=False)``  the exits' losses weighted by the rule alone: PALBERT
    ``TwoStage(Joint(), Gates(rule, ...))``               one after the other
    ====================================================  ============================================================

    Attributes:
        rule: an ``nn.Module`` of `offramp.policies`; trained in place.
        lesson: what it is taught.
        inner: recipe of the network, or ``None`` to leave the network alone.
        weight: of the lesson's loss, > 0.
        task: weight of ``inner``'s loss, >= 0; at 0 ``inner`` only says what is trained.
        detach: keep the lesson's gradient out of the network. The rule sees detached answers and states, and the lesson detached losses.
    """

    rule: nn.Module
    lesson: Lesson
    inner: Recipe | None = None
    weight: float = 1.0
    task: float = 1.0
    detach: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.rule, nn.Module):
            raise InvalidInput(f"Gates trains a rule with weights (an nn.Module), got {type(self.rule).__name__}.")
        if self.inner is not None and (len(self.inner.phases()) != 1 or self.inner.module is not None):
            raise InvalidInput(f"Gates takes an inner recipe of one phase without a rule of its own, got {type(self.inner).__name__}.")
        if not self.weight > 0 or not self.task >= 0:
            raise InvalidInput(f"Gates needs weight > 0 and task >= 0, got {self.weight} and {self.task}.")
        if self.inner is not None and self.task == 0 and self.detach:
            raise InvalidInput("With task=0 and detach=True nothing would train the network. Use inner=None, or detach=False.")

    @property
    def trains_model(self) -> bool:
        return self.inner is not None and self.inner.trains_model

    @property
    def trains_heads(self) -> bool:
        return self.inner is not None and self.inner.trains_heads

    @property
    def equilibrium(self) -> bool:
        return self.inner is not None and self.inner.equilibrium

    @property
    def needs_cost(self) -> bool:
        return self.lesson.needs_cost

    @property
    def module(self) -> nn.Module:
        return self.rule

    def observe(self, logits: tuple[Tensor, ...], states: tuple[Tensor, ...]) -> Tensor:
        pairs = zip(logits[:-1], states, strict=True)
        readouts = tuple(Readout(z.detach(), h.detach()) if self.detach else Readout(z, h) for z, h in pairs)
        return self.lesson.observe(self.rule, readouts)

    def objective(self, seen: Seen) -> Objective:
        labels = seen.labelled()
        losses = torch.stack([per_item(seen.loss, z, labels) for z in seen.logits], dim=1)
        lesson = self.lesson.loss(seen.extra.float(), losses.detach() if self.detach else losses, seen)
        if self.inner is None or self.task == 0:
            return Objective(self.weight * lesson, tuple(losses.mean(0).unbind()), {"rule": lesson})
        inner = self.inner.objective(seen)
        # Where the lesson's gradient reaches the heads, all of them take part.
        parts = inner.losses if self.detach else tuple(losses.mean(0).unbind())
        return Objective(self.task * inner.total + self.weight * lesson, parts, {**inner.terms, "rule": lesson})
