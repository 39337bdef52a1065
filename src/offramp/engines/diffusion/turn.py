"""Whose turn it is with something that serves one sampling run at a time."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from offramp.core.errors import InvalidInput


class Turn:
    """Other threads wait until a run has ended, by an error or an interrupt too. A copy is free."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: int | None = None

    def __reduce__(self) -> tuple[type[Turn], tuple[()]]:
        return Turn, ()

    @property
    def mine(self) -> bool:
        """Whether this thread is inside."""
        return self._thread == threading.get_ident()

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Wait for the turn and keep it.

        Raises:
            InvalidInput: this thread has it already and would wait for itself.
        """
        if self.mine:
            raise InvalidInput(
                "This was called while a call of it is under way in the same thread, such as from a callback. What is remembered belongs "
                "to one sampling run at a time: make another for the inner call with offramp.compile(...)."
            )
        with self._lock:
            self._thread = threading.get_ident()
            try:
                yield
            finally:
                self._thread = None


__all__ = ["Turn"]
