"""What surrounds the loop: settings, accelerate, loaders and batches, the progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from offramp.core.batches import Batch, unpack_batch
from offramp.core.errors import InvalidInput, MissingExtra
from offramp.network import MultiExit
from offramp.train.losses import ItemLoss
from offramp.train.recipe import Recipe

if TYPE_CHECKING:
    from accelerate import Accelerator

OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
SchedulerFactory = Callable[[torch.optim.Optimizer, int], Any]


@dataclass(frozen=True)
class Settings:
    """Arguments of `fit` that the loop reads; described there."""

    epochs: int
    loss: ItemLoss
    optimizer: OptimizerFactory | None = None
    scheduler: SchedulerFactory | None = None
    gradient_accumulation_steps: int = 1
    max_grad_norm: float | None = None
    seed: int = 0
    checkpoint_every: int | None = None
    keep_checkpoints: int = 2
    max_steps: int | None = None
    folder: Path | None = None


def check_settings(net: Any, recipe: Any, settings: Settings, accelerator: Any, mixed_precision: str | None) -> None:
    """Refuse arguments of `fit` that do not fit, before anything runs.

    Raises:
        InvalidInput: says which.
    """
    if not isinstance(net, MultiExit):
        raise InvalidInput(
            f"fit takes a network with exits, got {type(net).__name__}. Make one with offramp.attach(model, example=...), or of a language "
            "model with attach_lm(model, exits)."
        )
    if not isinstance(recipe, Recipe):
        raise InvalidInput(f"recipe must be a Recipe such as Joint(), got {recipe!r}.")
    for name in ("epochs", "gradient_accumulation_steps", "keep_checkpoints", "checkpoint_every", "max_steps"):
        value = getattr(settings, name)
        if value is None and name in ("checkpoint_every", "max_steps"):
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InvalidInput(f"{name} must be an integer >= 1, got {value!r}.")
    if settings.max_grad_norm is not None and not settings.max_grad_norm > 0:
        raise InvalidInput(f"max_grad_norm must be > 0, got {settings.max_grad_norm!r}.")
    if accelerator is not None and mixed_precision is not None:
        raise InvalidInput("Pass mixed_precision or accelerator, not both: Accelerator(mixed_precision=...) has its own.")
    if accelerator is not None and accelerator.gradient_accumulation_steps != 1:
        raise InvalidInput("Give gradient_accumulation_steps to fit and not to the Accelerator: fit divides by the items of a step itself.")


@contextmanager
def own_accelerator(mixed_precision: str | None) -> Iterator[Accelerator]:
    """An accelerator of our own; accelerate's global state is put back so that a later one may differ."""
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from accelerate.utils import DistributedDataParallelKwargs
    except ImportError as error:
        raise MissingExtra("accelerate", "train", "Training") from error
    fresh = not AcceleratorState._shared_state
    try:
        # Users' models may have parameters that a forward does not reach (BERT's pooler, say).
        accelerator = Accelerator(
            mixed_precision=mixed_precision, kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)]
        )
    except (ValueError, ImportError) as error:
        raise InvalidInput(f"accelerate refuses mixed_precision={mixed_precision!r}: {error}") from error
    try:
        yield accelerator
    finally:
        if fresh:
            AcceleratorState._reset_state()


def share_out(loader: Any, accelerator: Accelerator) -> Any:
    """Each process's share of a loader. One process iterates the loader as it is.

    Raises:
        InvalidInput: there are several processes, and it is no ``DataLoader``.
    """
    if accelerator.num_processes == 1:
        return loader
    if not isinstance(loader, torch.utils.data.DataLoader):
        raise InvalidInput(
            f"In {accelerator.num_processes} processes a loader must be a torch DataLoader, so that it can be shared out; "
            f"got {type(loader).__name__}."
        )
    return accelerator.prepare_data_loader(loader, device_placement=False)


def checked_batch(raw: Any, loss: ItemLoss, width: int) -> Batch:
    """What a loader yields as a batch, its labels checked by the loss where that has a ``check``."""
    batch = unpack_batch(raw)
    check = getattr(loss, "check", None)
    if batch.labels is not None and check is not None:
        check(batch.labels, width)
    return batch


class Bar:
    """A rich progress bar, or nothing."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._task: Any = None

    def start(self, text: str, total: int | None, done: int) -> None:
        if self._bar is not None:
            self._task = self._bar.add_task(text, total=total, completed=done, loss="")

    def step(self, record: Mapping[str, Any]) -> None:
        if self._bar is not None:
            self._bar.update(self._task, advance=1, loss=f"epoch {record['epoch'] + 1}  loss {record['loss']:.4f}")


@contextmanager
def progress_bar(show: bool) -> Iterator[Bar]:
    if not show:
        yield Bar(None)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[loss]}")
    ) as bar:
        yield Bar(bar)
