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
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._owner: int | None = None

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
                    f"{self.what} is writing already and would write over its own text: a streamer, a stop criterion or a hook called it "
                    "again from within. Call it after the first call has returned, or compile another generator for the texts within: "
                    "each has memory of its own."
                )
            at = _WAITING.get(at._owner)

    def __reduce__(self) -> tuple[type[Turn], tuple[str]]:
        return type(self), (self.what,)


__all__ = ["Turn"]
