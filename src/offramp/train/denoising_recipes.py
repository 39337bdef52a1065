"""Published ways to train denoisers with exits, where `offramp.train.recipe` alone does not say them.

==========================  ========================================================================================================
method                      recipe
==========================  ========================================================================================================
any schedule                ``Joint(Mean())``: every exit through the model's final layers, at every noise level
ee-diffusion (ASE)          ``Holding(ScheduledDepth(edges, exits), TIME_EMBEDDERS)``, or ``Joint(FinalOnly())`` on a `PlanView`
DeeDiff                     ``UncertaintyAware()`` with the exits of `offramp.exits.denoising.DenoisingExit`
LaTtE-Flow                  ``Joint(FinalOnly())`` on ``PlanView(net, layer_groups(...))`` with `Noising(edges=...)`
==========================  ========================================================================================================

Shapes: ``B`` rows, ``K`` exits, the model's own answer among them and last.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from offramp.core.errors import InvalidInput
from offramp.policies.skips import layer_groups
from offramp.train.denoising import ExitsView
from offramp.train.losses import per_item
from offramp.train.recipe import Around, FinalOnly, Joint, Objective, Recipe, Seen

if TYPE_CHECKING:
    from offramp.network import MultiExit

TIME_EMBEDDERS = ("timestep_embedder", "time_embedding", "time_embed", "time_text_embed")
"""What diffusers calls the layers that embed the timestep."""


def _view(net: MultiExit, recipe: Recipe) -> None:
    if not isinstance(net, ExitsView):
        raise InvalidInput(
            f"{type(recipe).__name__} is for denoisers: fit(attach_denoiser(...), ...) or an ExitsView; got {type(net).__name__}."
        )


@dataclass(frozen=True)
class ScheduledDepth(Recipe):
    """Every row learns at the exit that the schedule gives its noise level (Moon et al. 2024, section 3; released code).

    All blocks run for all rows, as in the released code; a `PlanView` leaves out what the schedule does.

    Attributes:
        edges: ascending log-SNRs between the bins; bin ``b`` holds ``edges[b-1] <= log_snr < edges[b]``.
        exits: for each bin, noisiest first, the number of the exit as attached, from 0; ``None`` = the model's own answer.
    """

    edges: tuple[float, ...]
    exits: tuple[int | None, ...]

    def __post_init__(self) -> None:
        if list(self.edges) != sorted(set(self.edges)) or len(self.exits) != len(self.edges) + 1:
            raise InvalidInput(
                f"{len(self.edges)} ascending edges make {len(self.edges) + 1} bins, each with an exit; got {self.edges}, {self.exits}."
            )

    @contextmanager
    def around(self, net: MultiExit) -> Iterator[None]:
        _view(net, self)
        if wrong := [e for e in self.exits if e is not None and not 0 <= e < len(net.at)]:
            raise InvalidInput(f"There is no exit {wrong[0]}: they are numbered from 0 to {len(net.at) - 1}, {', '.join(net.at)}.")
        yield

    def observe(self, logits: tuple[Tensor, ...], states: tuple[Tensor, ...]) -> Tensor:
        return states[0]

    def objective(self, seen: Seen) -> Objective:
        level: Tensor = seen.extra
        last = len(seen.logits) - 1
        edges = torch.tensor(self.edges, dtype=level.dtype, device=level.device)
        chosen = torch.tensor([last if e is None else e for e in self.exits], device=level.device)
        exit_of = chosen[torch.bucketize(level, edges, right=True)]
        used = sorted({last if e is None else e for e in self.exits})
        each = {k: per_item(seen.loss, seen.logits[k], seen.labelled()) for k in used}
        share = {k: (exit_of == k).to(each[k].dtype) for k in used}
        total = torch.stack([each[k] * share[k] for k in used]).sum(0).mean()
        means = {k: (each[k] * share[k]).sum() / share[k].sum().clamp(min=1) for k in used}
        return Objective(total, tuple(means.get(k) for k in range(last + 1)))


@dataclass(frozen=True)
class Holding(Around):
    """Another recipe, with some of the model's weights held as they are: Moon et al. (2024) do not train the time embedder.

    Attributes:
        inner: how everything else is trained.
        names: parts of module paths; parameters below any of them are held. By default what embeds the timestep.
    """

    inner: Recipe = field(default_factory=lambda: Joint(FinalOnly()))
    names: tuple[str, ...] = TIME_EMBEDDERS

    def __post_init__(self) -> None:
        if len(self.inner.phases()) != 1 or self.inner.module is not None:
            raise InvalidInput(
                f"Holding takes a recipe of one phase and without a rule, got {type(self.inner).__name__}. Put Holding inside."
            )

    @contextmanager
    def around(self, net: MultiExit) -> Iterator[None]:
        held = [p for path, p in net.model.named_parameters() if set(self.names) & set(path.split("."))]
        if not held:
            raise InvalidInput(f"Nothing in {type(net.model).__name__} is called {' or '.join(self.names)}; name what is to be held.")
        flags = [p.requires_grad for p in held]
        for p in held:
            p.requires_grad_(False)
        try:
            with self.inner.around(net):
                yield
        finally:
            for p, flag in zip(held, flags, strict=True):
                p.requires_grad_(flag)


@dataclass(frozen=True)
class UncertaintyAware(Recipe):
    """Exits that learn to predict and to know how wrong they are (DeeDiff, Tang et al. 2023, section 3.3).

    ``L_final + uncertainty * sum_i (u_i - u_i*)^2 + layers * sum_i (1 - u_i) L_i``, where ``u_i*`` is the mean over the image of
    ``|tanh(answer_i - target)|``. Nothing flows back through ``u_i*``, nor through the weight ``1 - u_i``: an exit must not gain by calling
    itself uncertain.

    Attributes:
        uncertainty: weight of the second part, >= 0; paper 1.
        layers: weight of the third part, >= 0; paper 1.
        joint: train the model too, as in the paper. An independent reproduction found images to suffer much by it, so that by default only
            what was added is trained; the first part then has no effect.
    """

    uncertainty: float = 1.0
    layers: float = 1.0
    joint: bool = False

    def __post_init__(self) -> None:
        if not (self.uncertainty >= 0 and self.layers >= 0):
            raise InvalidInput(f"uncertainty and layers are weights >= 0, got {self.uncertainty} and {self.layers}.")

    @property
    def trains_model(self) -> bool:
        return self.joint

    @contextmanager
    def around(self, net: MultiExit) -> Iterator[None]:
        _view(net, self)
        if not net.at or (lacks := [p for p, h in zip(net.at, net.heads, strict=True) if not callable(getattr(h, "uncertainty", None))]):
            where = ", ".join(lacks) if net.at else "anywhere"
            raise InvalidInput(
                f"UncertaintyAware needs exits that tell their uncertainty; none at {where}. Use add_heads(net, DenoisingExit())."
            )
        yield

    def observe(self, logits: tuple[Tensor, ...], states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return states[1:]

    def objective(self, seen: Seen) -> Objective:
        labels = seen.labelled()
        losses = [per_item(seen.loss, z, labels) for z in seen.logits]
        gaps, layers = [], []
        for answer, loss, told in zip(seen.logits[:-1], losses[:-1], seen.extra, strict=True):
            error = (answer.detach().float() - labels.float()).tanh().abs().flatten(1).mean(1)
            gaps.append((told.float() - error).square().mean())
            layers.append(((1 - told.detach().float()) * loss).mean())
        gap, layer = torch.stack(gaps).sum(), torch.stack(layers).sum()
        total = losses[-1].mean() + self.uncertainty * gap + self.layers * layer
        return Objective(total, tuple(loss.mean() for loss in losses), {"uncertainty": gap, "layers": layer})


__all__ = ["TIME_EMBEDDERS", "Holding", "ScheduledDepth", "UncertaintyAware", "layer_groups"]
