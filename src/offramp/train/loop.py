"""One small training loop on accelerate: any `MultiExit`, any recipe, exact resume.

Every forward goes through the wrapped module, so DDP, FSDP, mixed precision and gradient checkpointing work as they always do.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from offramp.core.batches import Batch, unpack_batch
from offramp.core.bundle import load_bundle, save_bundle
from offramp.core.errors import InvalidInput
from offramp.core.parts import part_to_dict
from offramp.network import MultiExit
from offramp.train.checkpoint import clear_checkpoints, load_into, newest_checkpoint, save_checkpoint
from offramp.train.equilibrium import equilibrium
from offramp.train.losses import CrossEntropy, ItemLoss, NonFiniteLoss, per_item
from offramp.train.metrics import MetricsLog
from offramp.train.order import Order, check_loader, preserved_random_state, seed_all, seeded_samplers
from offramp.train.recipe import Joint, Objective, Recipe, Seen, allot
from offramp.train.setup import (
    Bar,
    OptimizerFactory,
    SchedulerFactory,
    Settings,
    check_settings,
    forget_unused,
    modes_restored,
    only_trained,
    own_accelerator,
    own_frozen,
    progress_bar,
)

if TYPE_CHECKING:
    from accelerate import Accelerator

MODEL_LR, ADDED_LR = 5e-5, 1e-3
"""Default learning rates: the model's weights are trained already, those of heads and rules are new."""


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


class _Trainee(nn.Module):
    """Network and learned rule as one module, so that one wrapper holds everything that is trained."""

    def __init__(self, net: MultiExit, recipe: Recipe) -> None:
        super().__init__()
        self.net = net
        self.extra = recipe.module
        self._recipe = recipe

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Tensor, ...], Any]:
        logits, states = self.net.forward_with_states(*args, **kwargs)
        return logits, self._recipe.observe(logits, states)


@dataclass
class _Place:
    """Where training is. With the seed it fixes all randomness to come."""

    phase: int = 0
    epoch: int = 0
    batch: int = 0
    step: int = 0
    phase_step: int = 0


def fit(
    net: MultiExit,
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
    caller's random state are given back; the network stays on the device accelerate put it on.

    Args:
        net: made by `offramp.attach`. Parameters with ``requires_grad=False`` stay as they are, and a module in eval mode
            whose parameters are all frozen (a batch norm, say) stays in eval mode.
        train_loader: a ``DataLoader`` or any re-iterable of batches; what a batch may be: `offramp.core.batches.unpack_batch`.
            In several processes it must be a ``DataLoader``; each process takes its share of the batches.
        recipe: how; by default that of ``net.system``, else `Joint`.
        epochs: > 0; divided among the phases of a recipe such as `TwoStage`.
        output_dir: gets ``metrics.jsonl``, ``checkpoints/`` and, with ``eval_loader``, ``best/``. ``None`` writes nothing.
        eval_loader: evaluated after each epoch.
        loss: ``(logits, labels) -> [B]``; `CrossEntropy` by default, `MeanSquared` for regression, or any function.
        optimizer: ``parameters -> optimizer``; AdamW by default, at 5e-5 for the model's weights and 1e-3 for new ones. Made
            anew for each phase.
        scheduler: ``(optimizer, steps of the phase) -> learning rate scheduler``, stepped once an optimizer step;
            ``torch.optim.lr_scheduler.CosineAnnealingLR`` fits as it is.
        accelerator: made by default; pass one for FSDP or special settings.
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
        stack.enter_context(modes_restored(net, chosen))
        owned = accelerator is None
        accelerator = stack.enter_context(own_accelerator(mixed_precision)) if accelerator is None else accelerator
        run = _Run(net, chosen, accelerator, owned, settings)
        stack.callback(run.log.close)
        return run.go(train_loader, eval_loader, resume, stack.enter_context(progress_bar(progress and accelerator.is_main_process)))


class _Run:
    """State of one call of `fit`."""

    def __init__(self, net: MultiExit, recipe: Recipe, accelerator: Accelerator, owned: bool, settings: Settings) -> None:
        self.net, self.recipe, self.accelerator, self.owned, self.settings = net, recipe, accelerator, owned, settings
        self.loss, self.seed, self.folder = settings.loss, settings.seed, settings.folder
        self.phases = recipe.phases()
        self.epochs = allot(settings.epochs, self.phases, "epochs")
        self.max_steps = (None,) * len(self.phases) if settings.max_steps is None else allot(settings.max_steps, self.phases, "max_steps")
        self.place = _Place()
        self.log = MetricsLog(None if self.folder is None else self.folder / "metrics.jsonl", write=accelerator.is_main_process)
        self.keep_eval = [m for m in net.modules() if not m.training and own_frozen(m)]
        self.sharded = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type)) == "FSDP"

    # ---- the run, top to bottom -----------------------------------------------------------------------------------------

    def go(self, train_loader: Iterable[Any], eval_loader: Iterable[Any] | None, resume: bool, bar: Bar) -> FitResult:
        saved = self._begin(resume)
        with seeded_samplers(train_loader) as samplers:
            train = self._distribute(train_loader)
            evaluation = None if eval_loader is None else self._distribute(eval_loader)
            for index in range(self.place.phase, len(self.phases)):
                order = Order(train, samplers, train_loader, (self.seed, index))
                self._phase(index, order, evaluation, saved, bar)
                saved = None
        evaluations = [r for r in self.log.records if r["event"] == "eval"]
        finished = sum(r["event"] == "epoch" for r in self.log.records)
        best = min(evaluations, key=lambda r: r["loss"]) if evaluations else None
        return FitResult(tuple(self.log.records), self.place.step, finished, best, self.resumed_from)

    def _phase(self, index: int, order: Order, evaluation: Any, saved: dict[str, Any] | None, bar: Bar) -> None:
        recipe, place = self.phases[index].recipe, self.place
        with only_trained(self.net, recipe), equilibrium(self.net) if recipe.equilibrium else nullcontext():
            trainee = _Trainee(self.net, recipe)
            parameters = [p for p in trainee.parameters() if p.requires_grad]
            if not parameters:
                raise InvalidInput(f"{type(recipe).__name__} has nothing to train: every parameter it may change has requires_grad=False.")
            made = self._optimizer(parameters)
            model, optimizer = self.accelerator.prepare(trainee, made)
            total = self._total_steps(index, order.loader)
            self.cost = self._cost() if recipe.needs_cost else ()
            scheduler = None if self.settings.scheduler is None else self._scheduler(made, total)
            if saved is not None:
                self._restore(saved, model, optimizer, scheduler)
            bar.start(f"phase {index + 1}/{len(self.phases)}" if len(self.phases) > 1 else "fit", total, place.phase_step)
            limit = self.max_steps[index]
            while place.epoch < self.epochs[index] and (limit is None or place.phase_step < limit):
                windows = self._windows(order.epoch(place.epoch, place.batch))
                stopped = False  # by max_steps, inside the epoch
                for window in windows:
                    if (
                        place.phase_step
                        and self.settings.checkpoint_every
                        and place.phase_step % self.settings.checkpoint_every == 0
                        and not self._just_saved
                    ):
                        self._checkpoint(model, optimizer, scheduler)
                    self._modes(recipe)
                    record = self._step(window, model, optimizer, scheduler, recipe, total, parameters)
                    bar.step(record)
                    if limit is not None and place.phase_step >= limit:
                        stopped = True
                        break
                self._end_epoch(model, recipe, evaluation, stopped)
                self._checkpoint(model, optimizer, scheduler)
            self._settle()
        if index + 1 < len(self.phases):
            if self.owned:
                self.accelerator.free_memory()
            self.place = _Place(index + 1, 0, 0, place.step, 0)
            self._just_saved = False

    def _step(
        self,
        window: list[Batch],
        model: nn.Module,
        optimizer: Any,
        scheduler: Any,
        recipe: Recipe,
        total_steps: int | None,
        parameters: list[nn.Parameter],
    ) -> dict[str, Any]:
        place, accelerator = self.place, self.accelerator
        processes, exits = accelerator.num_processes, len(self.net.names)
        rows = torch.tensor([float(b.rows) for b in window], device=accelerator.device)
        everywhere = float(self._sum(rows.sum()))
        done = 0.0 if not total_steps else min(1.0, place.phase_step / total_steps)
        optimizer.zero_grad(set_to_none=True)
        sums: Tensor | None = None
        names: list[str] = []
        used = [False] * exits
        for position, raw in enumerate(window):
            batch = raw.to(accelerator.device)
            seed_all(self.seed, place.phase, place.epoch, place.batch + position, "forward", accelerator.process_index)
            with nullcontext() if position + 1 == len(window) else accelerator.no_sync(model):
                logits, extra = model(batch.args, batch.kwargs)
                target = recipe.objective(Seen(logits, batch.labels, self.loss, place.phase_step, done, self.cost, extra))
                if not target.total.requires_grad:
                    raise InvalidInput(
                        f"The loss of {type(recipe).__name__} does not depend on anything it may train. Give the early exits a weight > 0."
                    )
                # DDP averages the processes' gradients: this factor makes them the mean over all items of the step.
                objective = target.total * (batch.rows * processes / everywhere)
                if processes > 1:
                    # DDP waits for a gradient of every parameter, also of heads that take no part in this step.
                    objective = objective + sum(z.sum() * 0.0 for z, part in zip(logits, target.losses, strict=True) if part is None)
                accelerator.backward(objective)
            used = [u or part is not None for u, part in zip(used, target.losses, strict=True)]
            names = ["loss", *self.net.names, *target.terms]
            values = _values(target) * batch.rows
            sums = values if sums is None else sums + values
        forget_unused(self.net, used)
        assert sums is not None  # a window is never empty
        means = (self._sum(sums) / everywhere).tolist()
        self._check_finite(dict(zip(names, means, strict=True)), used, optimizer)
        norm = None
        if self.settings.max_grad_norm is not None:
            norm = self._clip(model, parameters, self.settings.max_grad_norm)
            if not math.isfinite(norm) and accelerator.scaler is None:
                optimizer.zero_grad(set_to_none=True)
                raise NonFiniteLoss(
                    f"The gradient's norm is {norm} at step {place.step}. Lower the learning rate.", step=place.step, exits=()
                )
        rates = [float(g["lr"]) for g in optimizer.param_groups]
        optimizer.step()
        if scheduler is not None and not accelerator.optimizer_step_was_skipped:
            scheduler.step()
        place.step += 1
        place.phase_step += 1
        place.batch += len(window)
        self._just_saved = False
        record: dict[str, Any] = {
            "event": "step",
            "step": place.step,
            "phase": place.phase,
            "epoch": place.epoch,
            "rows": int(everywhere),
            "loss": means[0],
        }
        record["losses"] = {n: m for n, m, u in zip(self.net.names, means[1:], used, strict=False) if u}
        record["terms"] = dict(zip(names[1 + exits :], means[1 + exits :], strict=True))
        record["lr"] = rates
        if norm is not None:
            record["grad_norm"] = norm if math.isfinite(norm) else None
        self.log.add(record)
        return record

    def _end_epoch(self, model: nn.Module, recipe: Recipe, evaluation: Any, stopped: bool) -> None:
        place = self.place
        if evaluation is not None:
            record = {"event": "eval", "step": place.step, "phase": place.phase, "epoch": place.epoch, **self._evaluate(model, evaluation)}
            earlier = [r["loss"] for r in self.log.records if r["event"] == "eval"]
            self.log.add(record)
            if (
                self.folder is not None
                and self.accelerator.is_main_process
                and not self.sharded
                and record["loss"] <= min(earlier, default=math.inf)
            ):
                save_bundle(self.folder / "best", "weights", "weights", {"step": place.step, "loss": record["loss"]}, self.net.state_dict())
        if stopped:
            return  # a later call with a larger max_steps goes on in the middle of this epoch
        steps = [r for r in self.log.records if r["event"] == "step" and r["phase"] == place.phase and r["epoch"] == place.epoch]
        rows = sum(r["rows"] for r in steps)
        mean = sum(r["loss"] * r["rows"] for r in steps) / rows
        self.log.add({"event": "epoch", "step": place.step, "phase": place.phase, "epoch": place.epoch, "rows": rows, "loss": mean})
        place.epoch, place.batch = place.epoch + 1, 0
        self._just_saved = False

    @torch.no_grad()
    def _evaluate(self, model: nn.Module, loader: Any) -> dict[str, Any]:
        """Mean loss, and accuracy for class labels, of every exit."""
        modes = {m: m.training for m in model.modules()}
        model.eval()
        sums: Tensor | None = None
        count, classes = 0, True
        for raw in loader:
            batch = self._batch(raw).to(self.accelerator.device)
            if batch.labels is None:
                raise InvalidInput("The evaluation loader yields no labels. Yield (inputs, labels), or leave eval_loader out.")
            logits, _ = model(batch.args, batch.kwargs)
            classes = classes and not batch.labels.is_floating_point() and logits[-1].ndim == 2
            losses = torch.stack([per_item(self.loss, z, batch.labels) for z in logits], 1)
            right = torch.stack([z.argmax(-1) == batch.labels for z in logits], 1) if classes else torch.zeros_like(losses)
            both = torch.cat([losses.double(), right.double()], 1)
            both = self.accelerator.gather_for_metrics(both) if self.accelerator.num_processes > 1 else both
            count += both.shape[0]
            sums = both.sum(0) if sums is None else sums + both.sum(0)
        for module, flag in modes.items():
            module.training = flag
        if sums is None:
            raise InvalidInput("The evaluation loader yields no batch.")
        means = (sums / count).tolist()
        exits = len(self.net.names)
        if bad := tuple(n for n, v in zip(self.net.names, means, strict=False) if not math.isfinite(v)):
            raise NonFiniteLoss(
                f"The evaluation loss of {', '.join(bad)} is not finite after step {self.place.step}.", step=self.place.step, exits=bad
            )
        record: dict[str, Any] = {
            "loss": sum(means[:exits]) / exits,
            "losses": dict(zip(self.net.names, means, strict=False)),
            "rows": count,
        }
        if classes:
            record["accuracy"] = dict(zip(self.net.names, means[exits:], strict=True))
        return record

    # ---- batches --------------------------------------------------------------------------------------------------------

    def _distribute(self, loader: Any) -> Any:
        """Each process's share of a loader. One process iterates the loader as it is."""
        if self.accelerator.num_processes == 1:
            return loader
        if not isinstance(loader, torch.utils.data.DataLoader):
            raise InvalidInput(
                f"In {self.accelerator.num_processes} processes a loader must be a torch DataLoader, so that it can be shared out; "
                f"got {type(loader).__name__}."
            )
        return self.accelerator.prepare_data_loader(loader, device_placement=False)

    def _batch(self, raw: Any) -> Batch:
        batch = unpack_batch(raw)
        check = getattr(self.loss, "check", None)
        if batch.labels is not None and check is not None:
            check(batch.labels, self.net.num_outputs)
        return batch

    def _windows(self, batches: Iterator[Any]) -> Any:
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
        """Share of the whole cost spent when leaving at each exit. Counting runs the cut, in eval mode."""
        modes = {m: m.training for m in self.net.modules()}
        self.net.eval()
        try:
            spent = self.net.costs()[0]
        finally:
            for module, flag in modes.items():
                module.training = flag
        return tuple(float(c / spent[-1]) for c in spent)

    def _sum(self, value: Tensor) -> Tensor:
        if self.accelerator.num_processes == 1:
            return value
        reduced: Tensor = self.accelerator.reduce(value, reduction="sum")
        return reduced

    # ---- what is trained ------------------------------------------------------------------------------------------------

    def _optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        if self.settings.optimizer is not None:
            made = self.settings.optimizer(parameters)
            if not isinstance(made, torch.optim.Optimizer):
                raise InvalidInput(
                    f"optimizer must be a function of the parameters that returns a torch optimizer; it returned {type(made).__name__}."
                )
            return made
        inside = {id(p) for p in self.net.model.parameters()}
        groups = [([p for p in parameters if id(p) in inside], MODEL_LR), ([p for p in parameters if id(p) not in inside], ADDED_LR)]
        return torch.optim.AdamW([{"params": g, "lr": lr} for g, lr in groups if g])

    def _scheduler(self, optimizer: torch.optim.Optimizer, total: int | None) -> Any:
        if total is None:
            raise InvalidInput("The loader has no length, so the scheduler cannot know how many steps there are. Pass max_steps.")
        assert self.settings.scheduler is not None
        return self.settings.scheduler(optimizer, total)

    def _modes(self, recipe: Recipe) -> None:
        self.net.train(recipe.trains_heads)
        self.net.model.train(recipe.trains_model)
        if recipe.module is not None:
            recipe.module.train()
        for module in self.keep_eval:
            module.eval()

    def _clip(self, model: nn.Module, parameters: list[nn.Parameter], limit: float) -> float:
        """Clip the gradient and return its norm before."""
        if not self.sharded:
            return float(self.accelerator.clip_grad_norm_(parameters, limit))
        # Sharding replaced the parameters, and accelerate finds its own only by comparing tensors.
        self.accelerator.unscale_gradients()
        own = getattr(model, "clip_grad_norm_", None)  # FSDP 1
        norm = own(limit) if own is not None else torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def _check_finite(self, means: Mapping[str, float], used: list[bool], optimizer: Any) -> None:
        bad = tuple(n for n, u in zip(self.net.names, used, strict=True) if u and not math.isfinite(means[n]))
        if not bad and all(math.isfinite(v) for v in means.values()):
            return
        optimizer.zero_grad(set_to_none=True)
        place = self.place
        who = f"of exit {', '.join(bad)}" if bad else f"term {', '.join(n for n, v in means.items() if not math.isfinite(v))}"
        raise NonFiniteLoss(
            f"The loss {who} is not finite at step {place.step} (phase {place.phase}, epoch {place.epoch}, batch {place.batch}). "
            "No step was taken with it. Look for NaN in the inputs, lower the learning rate, clip with max_grad_norm, "
            "or use bf16 instead of fp16.",
            step=place.step,
            exits=bad,
        )

    def _settle(self) -> None:
        """Equal buffers in every process: DDP copies them before a forward, not after the last one."""
        if self.accelerator.num_processes > 1 and not self.sharded:
            from accelerate.utils import broadcast

            for buffer in self.net.buffers():
                buffer.copy_(broadcast(buffer.clone()))

    # ---- checkpoints ----------------------------------------------------------------------------------------------------

    resumed_from: int | None = None
    cost: tuple[float, ...] = ()
    _just_saved = False

    def _begin(self, resume: bool) -> dict[str, Any] | None:
        if self.folder is None:
            return None
        self.config = json.dumps(
            {
                "recipe": part_to_dict(self.recipe),
                "exits": self.net.names,
                "seed": self.seed,
                "gradient_accumulation_steps": self.settings.gradient_accumulation_steps,
                "processes": self.accelerator.num_processes,
                "epochs of earlier phases": self.epochs[:-1],
            },
            sort_keys=True,
        )
        root = self.folder / "checkpoints"
        saved = None
        if resume:
            saved = newest_checkpoint(root)
        self.accelerator.wait_for_everyone()
        if not resume and self.accelerator.is_main_process:
            clear_checkpoints(root)
        if saved is not None:
            self._check_same_run(saved)
            self.place = _Place(**saved["place"])
            self.resumed_from = self.place.step
            self._just_saved = True
            for phase, weights in zip(self.phases, saved["modules"], strict=True):
                if phase.recipe.module is not None:
                    load_into(phase.recipe.module, weights, "The checkpoint's rule")
            if not self.sharded:
                load_into(self.net, saved["net"], "The checkpoint")
        self.log.start(saved["lines"] if saved is not None else 0)
        self.accelerator.wait_for_everyone()
        return saved

    def _check_same_run(self, saved: Mapping[str, Any]) -> None:
        before, now = json.loads(saved["config"]), json.loads(self.config)
        differ = [f"{k} was {before.get(k)!r} and is {now[k]!r}" for k in now if before.get(k) != now[k]]
        if differ:
            raise InvalidInput(
                f"{self.folder} holds another run: {'; '.join(differ)}. Use another output_dir, or resume=False to start afresh there."
            )

    def _checkpoint(self, model: nn.Module, optimizer: Any, scheduler: Any) -> None:
        if self.folder is None:
            return
        accelerator = self.accelerator
        if self.sharded:
            from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

            weights, moments = get_state_dict(model, optimizer.optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        else:
            weights, moments = self.net.state_dict(), optimizer.optimizer.state_dict()
        if accelerator.is_main_process:
            state = {
                "config": self.config,
                "place": dict(vars(self.place)),
                "lines": len(self.log.records),
                "net": weights,
                "modules": [None if p.recipe.module is None else p.recipe.module.state_dict() for p in self.phases],
                "optimizer": moments,
                "scheduler": None if scheduler is None else scheduler.state_dict(),
                "scaler": None if accelerator.scaler is None else accelerator.scaler.state_dict(),
            }
            self.log.flush()
            save_checkpoint(self.folder / "checkpoints", self.place.step, state, self.settings.keep_checkpoints)
        accelerator.wait_for_everyone()
        self._just_saved = True

    def _restore(self, saved: Mapping[str, Any], model: nn.Module, optimizer: Any, scheduler: Any) -> None:
        try:
            if self.sharded:
                from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

                set_state_dict(
                    model,
                    optimizer.optimizer,
                    model_state_dict=saved["net"],
                    optim_state_dict=saved["optimizer"],
                    options=StateDictOptions(full_state_dict=True),
                )
            else:
                optimizer.optimizer.load_state_dict(saved["optimizer"])
            if (scheduler is None) != (saved["scheduler"] is None):
                raise ValueError("a scheduler is given on one side only")
            if scheduler is not None:
                scheduler.load_state_dict(saved["scheduler"])
        except (ValueError, KeyError) as error:
            raise InvalidInput(
                f"The optimizer or scheduler of the checkpoint in {self.folder} does not fit the one given now: {error}. "
                "Give the same ones, use another output_dir, or resume=False."
            ) from error
        if self.accelerator.scaler is not None and saved["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(saved["scaler"])


def load_best(net: MultiExit, output_dir: str | os.PathLike[str]) -> int:
    """Load the weights that evaluated best in a run of `fit` with ``eval_loader`` and ``output_dir``.

    Returns:
        The step they are from.

    Raises:
        ArtifactError: there are none, or the file is truncated or altered.
        InvalidInput: they are of another network.
    """
    content, tensors = load_bundle(Path(output_dir) / "best", "weights", "weights")
    load_into(net, tensors, f"The weights in {output_dir}")
    return int(content["step"])


def _values(target: Objective) -> Tensor:
    """Total, losses of the exits (0 where unused) and terms, as one tensor: one host read a step."""
    zero = target.total.detach() * 0
    parts = [target.total, *(zero if part is None else part for part in target.losses), *target.terms.values()]
    return torch.stack([p.detach().float().reshape(()) for p in parts])
