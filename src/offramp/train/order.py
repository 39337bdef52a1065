"""Randomness as a function of where training is, so that a resumed run repeats an uninterrupted one bit for bit.

Before every fetch and every forward the global generators (torch, numpy, random) are seeded from (seed, phase, epoch, batch,
purpose, rank). Nothing depends on what was drawn before, hence the random state of a checkpoint is those few integers.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from offramp.core.errors import InvalidInput


@dataclass
class Place:
    """Where training is. With the seed it fixes all randomness to come.

    Attributes:
        phase: of the recipe.
        epoch: of the phase.
        batch: of the epoch, in this process.
        step: optimizer steps taken.
        phase_step: those of this phase.
    """

    phase: int = 0
    epoch: int = 0
    batch: int = 0
    step: int = 0
    phase_step: int = 0

    def advance(self, batches: int) -> None:
        """One optimizer step on so many batches was taken."""
        self.step += 1
        self.phase_step += 1
        self.batch += batches


def derive(*key: int | str) -> int:
    """A seed in [0, 2^63) from a key; different keys give unrelated seeds."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1


def seed_all(*key: int | str) -> None:
    """Seed the global generators of torch (all devices), numpy and random."""
    value = derive(*key)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(value)
    elif torch.accelerator.is_available() and not torch.cuda.is_available():
        torch.manual_seed(value)
    # Not torch.manual_seed: without an initialised GPU it queues a call with a stack trace for later, at every call.
    torch.default_generator.manual_seed(value)
    np.random.seed(value % 2**32)  # noqa: NPY002 (users' data sets draw from it)
    random.seed(value)


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Give the caller's global random state back on leaving."""
    cpu, array, plain = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        np.random.set_state(array)  # noqa: NPY002
        random.setstate(plain)
        if devices is not None:
            torch.cuda.set_rng_state_all(devices)


def _samplers(loader: Any) -> list[Any]:
    """Samplers inside a loader, each once."""
    found: list[Any] = []
    waiting = [loader]
    while waiting:
        item = waiting.pop()
        for name in ("sampler", "batch_sampler"):
            inner = getattr(item, name, None)
            if inner is not None and all(inner is not f for f in found):
                found.append(inner)
                waiting.append(inner)
    return found


@contextmanager
def seeded_samplers(loader: Any) -> Iterator[list[torch.Generator]]:
    """Put our own generators into the samplers of a loader while training, and theirs back afterwards.

    Yields the generators, to be seeded once an epoch. With them one process and several shuffle alike.
    """
    mine: list[torch.Generator] = []
    before: list[tuple[Any, Any]] = []
    for owner in _samplers(loader):
        if hasattr(owner, "generator"):
            before.append((owner, owner.generator))
            owner.generator = torch.Generator()
            mine.append(owner.generator)
    try:
        yield mine
    finally:
        for owner, generator in before:
            owner.generator = generator


def seed_order(samplers: list[torch.Generator], *key: int | str) -> None:
    """Fix the order that the next iteration of a loader has."""
    for index, generator in enumerate(samplers):
        generator.manual_seed(derive(*key, "order", index))


class Order:
    """Iterates a loader epoch after epoch in an order that (seed, phase, epoch) fixes.

    The loader must be re-iterable and give the same batches when iterated again under the same global seed; a ``DataLoader`` does,
    shuffled or not, whatever its workers and generators. A sampler with ``set_epoch`` is told the epoch. On resuming, the
    batches that were already seen are fetched again and dropped, which repeats random augmentation exactly.

    Args:
        loader: what `fit` was given, prepared for this process.
        samplers: generators from `seeded_samplers`.
        original: the loader before it was prepared.
        key: (seed, phase).

    Raises:
        InvalidInput: the loader is a one-shot iterator.
    """

    def __init__(self, loader: Any, samplers: list[torch.Generator], original: Any, key: tuple[int, ...]) -> None:
        self.loader = loader
        self._samplers = samplers
        self._original = original
        self._key = key

    def epoch(self, epoch: int, skip: int) -> Iterator[Any]:
        """Batches of one epoch from number ``skip`` on."""
        # The order of an epoch is shared by all processes, so the rank is not in this key.
        seed_order(self._samplers, *self._key, epoch)
        for owner in (self.loader, *_samplers(self._original)):
            if callable(getattr(owner, "set_epoch", None)):
                owner.set_epoch(epoch)
        seed_all(*self._key, epoch, "loader")
        iterator = iter(self.loader)
        number = 0
        while True:
            seed_all(*self._key, epoch, number, "fetch")
            try:
                batch = next(iterator)
            except StopIteration:
                break
            if number >= skip:
                yield batch
            number += 1
        if number == 0:
            raise InvalidInput("The training loader yields no batch. It needs at least one; check its data set and drop_last.")


def check_loader(loader: Any) -> None:
    """Refuse what cannot be iterated once an epoch.

    Raises:
        InvalidInput: not iterable, or a one-shot iterator such as a generator.
    """
    if not hasattr(loader, "__iter__"):
        raise InvalidInput(f"A loader must be iterable, got {type(loader).__name__}. Pass a DataLoader or a list of batches.")
    if hasattr(loader, "__next__"):
        raise InvalidInput(
            f"The loader is a one-shot {type(loader).__name__}: it cannot be iterated again for another epoch or to resume. "
            "Pass a DataLoader, a list of batches, or an object whose __iter__ starts anew."
        )
