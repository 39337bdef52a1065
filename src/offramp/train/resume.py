"""Exact resume: what a checkpoint of `fit` holds, and how training goes on from it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from offramp.core.bundle import load_bundle
from offramp.core.errors import InvalidInput
from offramp.core.parts import part_to_dict
from offramp.diffusion import DenoisingNet
from offramp.language import LanguageModel
from offramp.network import MultiExit
from offramp.train.checkpoint import clear_checkpoints, load_into, newest_checkpoint, save_checkpoint
from offramp.train.denoising import ExitsView
from offramp.train.metrics import MetricsLog
from offramp.train.order import Place
from offramp.train.recipe import Recipe
from offramp.train.sharding import gather_optimizer, scatter_optimizer
from offramp.train.text import TextNet

if TYPE_CHECKING:
    from accelerate import Accelerator


_MODEL = "model."


@dataclass
class Checkpoints:
    """The checkpoints of one run of `fit`.

    Attributes:
        folder: the run's, or ``None`` for a run that writes nothing.
        net: the network; what is saved of it, and loaded into it, is whole also where training is sharded. Of a network whose model no
            phase trains, what is added alone is saved.
        recipe: of the whole run.
        accelerator: of the run.
        sharded: whether the optimizer's state is sharded.
        log: metrics; a checkpoint knows how many there were.
        keep: newest ones to keep.
        identity: what else must be the same for a run to be resumed, as JSON data by name.
        resumed: the state that training goes on from, or ``None``.
    """

    folder: Path | None
    net: MultiExit
    recipe: Recipe
    accelerator: Accelerator
    sharded: bool
    log: MetricsLog
    keep: int
    identity: Mapping[str, Any]
    resumed: dict[str, Any] | None = None
    _saved: Place | None = field(default=None, repr=False)

    def begin(self, resume: bool) -> Place:
        """Load network, rules and metrics of the newest checkpoint, or delete what is there if not to ``resume``; where to go on from.

        Raises:
            InvalidInput: the folder holds another run.
            ArtifactError: there are checkpoints but none can be read.
        """
        if self.folder is None:
            return Place()
        config = {"recipe": part_to_dict(self.recipe), "exits": self.net.names, **self.identity}
        self._frozen = not any(phase.recipe.trains_model for phase in self.recipe.phases())
        if self._frozen:  # checkpoints then hold what is added alone, so they must know what it was added to
            config["weights of the model"] = self.net.base_fingerprint()
        self._config = json.dumps(config, sort_keys=True)
        root = self.folder / "checkpoints"
        self.resumed = newest_checkpoint(root) if resume else None
        self.accelerator.wait_for_everyone()
        if not resume and self.accelerator.is_main_process:
            clear_checkpoints(root)
        if self.resumed is not None:
            self._check_same_run(self.resumed)
            self._saved = Place(**self.resumed["place"])
            for phase, weights in zip(self.recipe.phases(), self.resumed["modules"], strict=True):
                if phase.recipe.module is not None:
                    load_into(phase.recipe.module, weights, "The checkpoint's rule")
            kept = {k: v for k, v in self.net.state_dict().items() if self._frozen and k.startswith(_MODEL)}
            load_into(self.net, {**kept, **self.resumed["net"]}, "The checkpoint")
        self.log.start(self.resumed["lines"] if self.resumed is not None else 0)
        self.accelerator.wait_for_everyone()
        return Place() if self._saved is None else replace(self._saved)

    def _check_same_run(self, saved: Mapping[str, Any]) -> None:
        before, now = json.loads(saved["config"]), json.loads(self._config)
        differ = [f"{k} was {before.get(k)!r} and is {now[k]!r}" for k in now if before.get(k) != now[k]]
        if differ:
            raise InvalidInput(
                f"{self.folder} holds another run: {'; '.join(differ)}. Use another output_dir, or resume=False to start afresh there."
            )

    def due(self, place: Place) -> bool:
        """Whether there is something to save."""
        return self.folder is not None and place != self._saved

    def save(self, place: Place, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
        """Write a checkpoint. All processes must call it, with ``net`` and the recipe's modules whole."""
        if self.folder is None:
            return
        main, scaler = self.accelerator.is_main_process, self.accelerator.scaler
        moments = gather_optimizer(optimizer, main) if self.sharded else optimizer.state_dict()
        if main:
            state = {
                "config": self._config,
                "place": asdict(place),
                "lines": len(self.log.records),
                "net": {k: v for k, v in self.net.state_dict().items() if not (self._frozen and k.startswith(_MODEL))},
                "modules": [None if p.recipe.module is None else p.recipe.module.state_dict() for p in self.recipe.phases()],
                "optimizer": moments,
                "scheduler": None if scheduler is None else scheduler.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
            }
            self.log.flush()
            save_checkpoint(self.folder / "checkpoints", place.step, state, self.keep)
        self.accelerator.wait_for_everyone()
        self._saved = replace(place)

    def restore(self, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
        """Load the optimizer, scheduler and scaler of the checkpoint that training goes on from, once.

        Raises:
            InvalidInput: they do not fit.
        """
        saved, self.resumed = self.resumed, None
        if saved is None:
            return
        try:
            if self.sharded:
                scatter_optimizer(optimizer, saved["optimizer"])
            else:
                optimizer.load_state_dict(saved["optimizer"])
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


def load_best(net: MultiExit | LanguageModel | DenoisingNet, output_dir: str | os.PathLike[str]) -> int:
    """Load the weights that evaluated best in a run of `fit` with ``eval_loader`` and ``output_dir``.

    Returns:
        The step they are from.

    Raises:
        ArtifactError: there are none, or the file is truncated or altered.
        InvalidInput: they are of another network.
    """
    content, tensors = load_bundle(Path(output_dir) / "best", "weights", "weights")
    seen = TextNet(net) if isinstance(net, LanguageModel) else ExitsView(net) if isinstance(net, DenoisingNet) else net
    load_into(seen, tensors, f"The weights in {output_dir}")
    return int(content["step"])
