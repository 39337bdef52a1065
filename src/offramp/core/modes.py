"""Training flags of modules, given back on leaving."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

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


@dataclass
class _Used:
    """Who is within `evaluating` with a module: how often each thread, and the flag that the first of them found."""

    flag: bool
    threads: dict[int, int] = field(default_factory=dict)


_USED: WeakKeyDictionary[nn.Module, _Used] = WeakKeyDictionary()
_LOCK = threading.RLock()  # entered again where a `train` of the user's own evaluates something


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Within, ``modules`` are in evaluation mode; every module inside gets its own training flag back on leaving, also after an error.

    Several threads may be within at once with the same module: it stays in evaluation mode until the last of them leaves, which gives
    back the flag that the first of them found.
    """
    thread = threading.get_ident()
    entered = _enter(thread, modules)
    try:
        with _LOCK:
            for module in modules:
                module.eval()
        yield
    finally:
        _leave(thread, entered)


def _enter(thread: int, modules: tuple[nn.Module, ...]) -> dict[nn.Module, bool]:
    """Count a thread in. Returns the flag of every module, to be given back if no other thread needs it otherwise."""
    with _LOCK:
        flags = {m: m.training for module in modules for m in module.modules()}
        for m, flag in flags.items():
            used = _USED.setdefault(m, _Used(flag))
            used.threads[thread] = used.threads.get(thread, 0) + 1
    return flags


def _leave(thread: int, flags: dict[nn.Module, bool]) -> None:
    with _LOCK:
        for m, flag in flags.items():
            used = _USED[m]
            used.threads[thread] -= 1
            if not used.threads[thread]:
                del used.threads[thread]
            if not used.threads:
                del _USED[m]
                m.training = used.flag
            elif used.threads.keys() == {thread}:  # within another `evaluating` of this thread alone
                m.training = flag
