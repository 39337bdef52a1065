"""Training flags of modules, given back on leaving."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def modes_kept(*modules: nn.Module) -> Iterator[None]:
    """Give every module inside ``modules`` its own training flag back on leaving, also after an error."""
    flags = {m: m.training for module in modules for m in module.modules()}
    try:
        yield
    finally:
        for m, flag in flags.items():
            m.training = flag


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Within, ``modules`` are in evaluation mode."""
    with modes_kept(*modules):
        for module in modules:
            module.eval()
        yield
