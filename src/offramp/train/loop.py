"""One small training loop on accelerate: any `MultiExit`, any recipe, exact resume.

Every forward goes through the wrapped module, so DDP, FSDP, mixed precision and gradient checkpointing work as they always do.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from offramp.core.batches import Batch
from offramp.core.bundle import save_bundle
from offramp.core.errors import InvalidInput
from offramp.core.modes import evaluating, modes_kept
from offramp.diffusion import DenoisingNet
from offramp.language import LanguageModel
from offramp.network import MultiExit
from offramp.train.denoising import DenoisingView, ExitsView
from offramp.train.equilibrium import equilibrium
from offramp.train.evaluate import evaluate
from offramp.train.losses import CrossEntropy, ItemLoss, MeanSquared, NonFiniteLoss
from offramp.train.metrics import MetricsLog
from offramp.train.order import Order, Place, check_loader, preserved_random_state, seed_all, seed_order, seeded_samplers
from offramp.train.recipe import Distill, Frozen, Joint, Recipe, allot
from offramp.train.resume import Checkpoints, load_best
from offramp.train.setup import (
    Bar,
    OptimizerFactory,
    SchedulerFactory,
    Settings,
    check_settings,
    checked_batch,
    own_accelerator,
    progress_bar,
    share_out,
)
from offramp.train.sharding import agree, check_sharding, copied, gather, prepare
from offramp.train.step import Work, take_step
from offramp.train.text import NextToken, TextNet
from offramp.train.text_recipes import Mean
from offramp.train.trainee import Trainee, make_optimizer, only_trained, own_frozen

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class FitResult:
    """What `fit` did.

    Attributes:
        history: every record of the metrics file, in order: ``event`` is ``step``, ``eval`` or ``epoch``.
        steps: optimizer steps taken, those before a resume included.
        epochs: epochs finished.
        best: the ``eval`` record with the lowest mean loss over the exits, or ``None`` without ``eval_loader``.
        resumed_from: step of the checkpoint that training went on from, or ``None``.
    """

    history: tuple[Mapping[str, Any], ...]
    steps: int
    epochs: int
    best: Mapping[str, Any] | None = None
    resumed_from: int | None = None


def fit(
    net: MultiExit | LanguageModel | DenoisingNet,
    train_loader: Iterable[Any],
    recipe: Recipe | None = None,
    *,
    epochs: int,
    output_dir: str | os.PathLike[str] | None = None,
    eval_loader: Iterable[Any] | None = None,
    loss: ItemLoss | None = None,
    optimizer: OptimizerFactory | None = None,
    scheduler: SchedulerFactory | None = None,
    accelerator: Accelerator | None = None,
    mixed_precision: str | None = None,
    gradient_accumulation_steps: int = 1,
    max_grad_norm: float | None = None,
    seed: int = 0,
    checkpoint_every: int | None = None,
    keep_checkpoints: int = 2,
    resume: bool = True,
    progress: bool = True,
    max_steps: int | None = None,
) -> FitResult:
    """Train the exits of a network, and the network too if the recipe says so.

    A run that was killed, also by SIGKILL, and is started again with the same arguments goes on from its last checkpoint and
    ends with the weights of an uninterrupted run (bit for bit where the kernels are deterministic, as on a CPU). For that
    the loader must give the same batches when iterated again under the same global seed, as a ``DataLoader`` does (see
    `offramp.train.order`), and modules must draw from the global generators only. Training flags, ``requires_grad`` and the
    caller's random state are given back; the network stays on the device accelerate put it on (with FSDP, where it was).

    Args:
        net: made by `offramp.attach`, or a language model from `offramp.language.attach_lm` (its batches: `offramp.train.text_loader`),
            or a denoiser from `offramp.diffusion.attach_denoiser` (its batches: `offramp.train.noisy_loader`). Parameters with
            ``requires_grad=False`` stay as they are, and a module in eval mode whose parameters are all frozen (a batch norm, say) stays in
            eval mode.
        train_loader: a ``DataLoader`` or any re-iterable of batches; what a batch may be: `offramp.core.batches.unpack_batch`.
            In several processes it must be a ``DataLoader``; each process takes its share of the batches.
        recipe: how; by default that of ``net.system``, else `Joint`; for a language model, its exits alone learn what the model would say;
            for a denoiser, the model and every exit at every noise level.
        epochs: > 0; divided among the phases of a recipe such as `TwoStage`.
        output_dir: gets ``metrics.jsonl``, ``checkpoints/`` and, with ``eval_loader``, ``best/``. ``None`` writes nothing.
        eval_loader: evaluated after each epoch.
        loss: ``(logits, labels) -> [B]``; `CrossEntropy` by default, `NextToken` for language models, `MeanSquared` for
            denoisers and regression, or any function.
        optimizer: ``parameters -> optimizer``; AdamW by default, at 5e-5 for the model's weights and 1e-3 for new ones. Made
            anew for each phase.
        scheduler: ``(optimizer, steps of the phase) -> learning rate scheduler``, stepped once an optimizer step;
            ``torch.optim.lr_scheduler.CosineAnnealingLR`` fits as it is.
        accelerator: made by default; pass one for FSDP or special settings. For FSDP give it
            ``FullyShardedDataParallelPlugin(fsdp_version=2)``: a copy of the network is sharded and trained, while ``net`` stays where it
            is and gets the whole weights back, in every process, at checkpoints and at the end.
        mixed_precision: ``"no"``, ``"bf16"`` or ``"fp16"``, as accelerate takes it; not together with ``accelerator``.
        gradient_accumulation_steps: batches to an optimizer step. The gradient is the mean over their items, whatever the
            batch sizes; the last step of an epoch takes what is left.
        max_grad_norm: clip the gradient's norm to this.
        seed: of everything random.
        checkpoint_every: optimizer steps between checkpoints; there is always one after an epoch.
        keep_checkpoints: newest ones to keep, >= 1.
        resume: go on from the newest readable checkpoint in ``output_dir``. ``False`` deletes those there and starts afresh.
        progress: show a progress bar (main process only).
        max_steps: stop after this many optimizer steps.

    Returns:
        Metrics and where training ended. The weights are in ``net``.

    Raises:
        InvalidInput: an argument, a batch or its labels do not fit, or ``output_dir`` holds another run.
        NonFiniteLoss: the loss of an exit is NaN or infinite; the weights are those before that step.
        ArtifactError: no checkpoint in ``output_dir`` can be read.
        MissingExtra: accelerate is not installed.
    """
    if isinstance(net, LanguageModel):
        if accelerator is not None and check_sharding(accelerator):
            raise InvalidInput("Sharded training of a language model with exits is not supported; use one process or DDP.")
        if isinstance(train_loader, Tensor):
            raise InvalidInput("Blocks of tokens were given where a loader is needed: fit(lm, text_loader(blocks, batch_size=8), ...).")
        net, loss = TextNet(net), loss or NextToken()
        recipe = recipe if recipe is not None else Frozen(Distill(temperature=1.0, alpha=1.0))
    if isinstance(net, DenoisingNet):
        net = ExitsView(net)
    if isinstance(net, DenoisingView):
        if accelerator is not None and check_sharding(accelerator):
            raise InvalidInput("Sharded training of a denoiser is not supported: its cut shares the weights. Use one process or DDP.")
        loss, recipe = loss or MeanSquared(), recipe if recipe is not None else Joint(Mean())
    chosen = recipe if recipe is not None else (net.system.recipe if net.system is not None and net.system.recipe is not None else Joint())
    settings = Settings(
        epochs,
        loss or CrossEntropy(),
        optimizer,
        scheduler,
        gradient_accumulation_steps,
        max_grad_norm,
        seed,
        checkpoint_every,
        keep_checkpoints,
        max_steps,
        None if output_dir is None else Path(output_dir),
    )
    check_settings(net, chosen, settings, accelerator, mixed_precision)
    check_loader(train_loader)
    if eval_loader is not None:
        check_loader(eval_loader)
    with ExitStack() as stack:
        stack.enter_context(preserved_random_state())
        stack.enter_context(modes_kept(net, *(p.recipe.module for p in chosen.phases() if p.recipe.module is not None)))
        owned = accelerator is None
        accelerator = stack.enter_context(own_accelerator(mixed_precision)) if accelerator is None else accelerator
        run = _Run(net, chosen, accelerator, owned, settings)
        stack.callback(run.log.close)
        return run.go(train_loader, eval_loader, resume, stack.enter_context(progress_bar(progress and accelerator.is_main_process)))


class _Run:
    """State of one call of `fit`."""

    def __init__(self, net: MultiExit, recipe: Recipe, accelerator: Accelerator, owned: bool, settings: Settings) -> None:
        self.net, self.accelerator, self.owned, self.settings = net, accelerator, owned, settings
        self.phases = recipe.phases()
        self.epochs = allot(settings.epochs, self.phases, "epochs")
        self.max_steps = (None,) * len(self.phases) if settings.max_steps is None else allot(settings.max_steps, self.phases, "max_steps")
        self.still = [m for m in net.modules() if not m.training and own_frozen(m)]
        self.sharded = check_sharding(accelerator)
        self.log = MetricsLog(None if settings.folder is None else settings.folder / "metrics.jsonl", write=accelerator.is_main_process)
        identity = {
            "seed": settings.seed,
            "gradient_accumulation_steps": settings.gradient_accumulation_steps,
            "processes": accelerator.num_processes,
            "epochs of earlier phases": self.epochs[:-1],
        }
        keep = settings.keep_checkpoints
        self.checkpoints = Checkpoints(settings.folder, net, recipe, accelerator, self.sharded, self.log, keep, identity)

    # ---- the run, top to bottom -----------------------------------------------------------------------------------------

    def go(self, train_loader: Iterable[Any], eval_loader: Iterable[Any] | None, resume: bool, bar: Bar) -> FitResult:
        self.place = self.checkpoints.begin(resume)
        resumed_from = None if self.checkpoints.resumed is None else self.place.step
        # Training last: where both loaders are one, its generators are those in use.
        with seeded_samplers(eval_loader) as self.eval_samplers, seeded_samplers(train_loader) as samplers:
            train = share_out(train_loader, self.accelerator)
            evaluation = None if eval_loader is None else share_out(eval_loader, self.accelerator)
            for index in range(self.place.phase, len(self.phases)):
                self._phase(index, Order(train, samplers, train_loader, (self.settings.seed, index)), evaluation, bar)
        evaluations = [r for r in self.log.records if r["event"] == "eval"]
        finished = sum(r["event"] == "epoch" for r in self.log.records)
        best = min(evaluations, key=lambda r: r["loss"]) if evaluations else None
        return FitResult(tuple(self.log.records), self.place.step, finished, best, resumed_from)

    def _phase(self, index: int, order: Order, evaluation: Any, bar: Bar) -> None:
        recipe = self.phases[index].recipe
        with only_trained(self.net, recipe):
            own = Trainee(self.net, recipe, self.still)
            trainee = copied(own) if self.sharded else own
            with equilibrium(trainee.net) if recipe.equilibrium else nullcontext(), recipe.around(trainee.net):
                work = self._prepare(index, own, trainee, order.loader)
                bar.start(f"phase {index + 1}/{len(self.phases)}" if len(self.phases) > 1 else "fit", work.steps, self.place.phase_step)
                try:
                    self._epochs(index, work, order, evaluation, bar)
                except NonFiniteLoss:  # raised in every process alike, and the weights from before that step are promised
                    self._settle(work)
                    raise
                self._settle(work)
        if index + 1 < len(self.phases):
            if self.owned:
                self.accelerator.free_memory()
            self.place = Place(index + 1, 0, 0, self.place.step, 0)

    def _prepare(self, index: int, own: Trainee, trainee: Trainee, loader: Any) -> Work:
        made = make_optimizer(self.settings.optimizer, trainee)
        model, optimizer = prepare(trainee, made, self.accelerator) if self.sharded else self.accelerator.prepare(trainee, made)
        steps = self._total_steps(index, loader)
        cost = self._cost() if trainee.recipe.needs_cost else ()
        scheduler = None
        if self.settings.scheduler is not None:
            if steps is None:
                raise InvalidInput("The loader has no length, so the scheduler cannot know how many steps there are. Pass max_steps.")
            scheduler = self.settings.scheduler(made, steps)
        self.checkpoints.restore(made, scheduler)
        return Work(own, trainee, model, optimizer, scheduler, steps, cost)

    def _epochs(self, index: int, work: Work, order: Order, evaluation: Any, bar: Bar) -> None:
        place, limit, every = self.place, self.max_steps[index], self.settings.checkpoint_every
        while place.epoch < self.epochs[index] and (limit is None or place.phase_step < limit):
            stopped = False  # by max_steps, inside the epoch
            for window in self._windows(order.epoch(place.epoch, place.batch)):
                if every and place.phase_step and place.phase_step % every == 0:
                    self._checkpoint(work)
                work.trainee.set_modes()
                record = take_step(window, work, place, self.accelerator, self.settings)
                place.advance(len(window))
                self.log.add(record)
                bar.step(record)
                if limit is not None and place.phase_step >= limit:
                    stopped = True
                    break
            self._end_epoch(work, evaluation, stopped)
            self._checkpoint(work)

    def _end_epoch(self, work: Work, evaluation: Any, stopped: bool) -> None:
        place, records = self.place, self.log.records
        if evaluation is not None:
            if self.sharded:
                agree(work.trainee, self.accelerator)
            key = (self.settings.seed, place.phase, place.epoch, "eval")
            seed_order(self.eval_samplers, *key)
            seed_all(*key)
            batches = map(self._batch, evaluation)
            found = evaluate(work.model, batches, self.settings.loss, self.net.names, self.accelerator, place.step)
            earlier = [r["loss"] for r in records if r["event"] == "eval"]
            self.log.add({"event": "eval", "step": place.step, "phase": place.phase, "epoch": place.epoch, **found})
            if self.settings.folder is not None and found["loss"] <= min(earlier, default=math.inf):
                self._bring_back(work)
                if self.accelerator.is_main_process:
                    content = {"step": place.step, "loss": found["loss"]}
                    save_bundle(self.settings.folder / "best", "weights", "weights", content, self.net.state_dict())
        if stopped:
            return  # a later call with a larger max_steps goes on in the middle of this epoch
        steps = [r for r in records if r["event"] == "step" and r["phase"] == place.phase and r["epoch"] == place.epoch]
        rows = sum(r["rows"] for r in steps)
        mean = sum(r["loss"] * r["rows"] for r in steps) / rows
        self.log.add({"event": "epoch", "step": place.step, "phase": place.phase, "epoch": place.epoch, "rows": rows, "loss": mean})
        place.epoch, place.batch = place.epoch + 1, 0

    def _checkpoint(self, work: Work) -> None:
        if self.checkpoints.due(self.place):
            self._bring_back(work)
            self.checkpoints.save(self.place, work.optimizer.optimizer, work.scheduler)

    def _bring_back(self, work: Work) -> None:
        """The weights of a sharded copy into the caller's network and rule."""
        if self.sharded:
            gather(work.trainee, work.own, self.accelerator)

    def _settle(self, work: Work) -> None:
        """The caller's network as it was trained, the same in every process."""
        self._bring_back(work)
        if self.accelerator.num_processes > 1 and not self.sharded:  # DDP copies buffers before a forward, not after the last one
            agree(self.net, self.accelerator)

    # ---- batches, steps, gradients --------------------------------------------------------------------------------------

    def _batch(self, raw: Any) -> Batch:
        return checked_batch(raw, self.settings.loss, self.net.num_outputs)

    def _windows(self, batches: Iterator[Any]) -> Iterator[list[Batch]]:
        """The batches of each optimizer step; fewer at the end of an epoch."""
        while window := [self._batch(raw) for raw in islice(batches, self.settings.gradient_accumulation_steps)]:
            yield window

    def _total_steps(self, index: int, loader: Any) -> int | None:
        limit = self.max_steps[index]
        try:
            steps = self.epochs[index] * math.ceil(len(loader) / self.settings.gradient_accumulation_steps)
        except TypeError:
            return limit
        return steps if limit is None else min(steps, limit)

    def _cost(self) -> tuple[float, ...]:
        """Share of the whole cost spent when leaving at each exit. Counting runs the cut."""
        with evaluating(self.net):
            spent = self.net.costs()[0]
        return tuple(float(c / spent[-1]) for c in spent)


__all__ = ["FitResult", "fit", "load_best"]
