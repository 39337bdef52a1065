"""One user at a time of what stands at fixed addresses: other threads wait, and a thread that would wait for itself is told so."""

from __future__ import annotations

import threading
from types import TracebackType

from offramp.core.errors import InvalidInput

_CHANGED = threading.Condition()
"""Guards all turns: who has one, and who waits for which."""
_WAITING: dict[int, Turn] = {}


class Turn:
    """A lock that is entered by ``with``. A copy, or what is loaded from a file, is a new one that nobody has.

    A thread that already has it cannot enter again, nor wait for a thread that waits for what the first has: both would wait forever.

    Args:
        what: is used in turn, for the message.
        instead: what a call from within should use, for the message.
    """

    def __init__(self, what: str, instead: str) -> None:
        self.what, self.instead = what, instead
        self._owner: int | None = None

    @property
    def mine(self) -> bool:
        """Whether this thread has it."""
        return self._owner == threading.get_ident()

    def __enter__(self) -> None:
        me = threading.get_ident()
        with _CHANGED:
            try:
                while self._owner is not None:
                    self._check(me)
                    _WAITING[me] = self
                    _CHANGED.wait()
            finally:
                _WAITING.pop(me, None)
            self._owner = me

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with _CHANGED:
            self._owner = None
            _CHANGED.notify_all()

    def _check(self, me: int) -> None:
        at: Turn | None = self
        while at is not None and at._owner is not None:
            if at._owner == me:
                raise InvalidInput(
                    f"{self.what} is at work already and would write over what it keeps: a callback, a streamer, a stop criterion or a "
                    f"hook called it again from within. Call it after the first call has returned, or {self.instead}."
                )
            at = _WAITING.get(at._owner)

    def __reduce__(self) -> tuple[type[Turn], tuple[str, str]]:
        return type(self), (self.what, self.instead)


__all__ = ["Turn"]
