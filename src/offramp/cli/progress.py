"""What a long command is doing: a line that changes on a terminal, plain lines one below the other anywhere else."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.markup import escape

from offramp.cli.options import errors

Say = Callable[[str], None]
"""Is told what begins now."""


@contextlib.contextmanager
def stages(what: str, *, console: Console = errors, every: float = 30.0) -> Iterator[Say]:
    """Show which stage a command is in.

    On a terminal that is one line with a spinner. A log gets a line with the time since the start when a stage begins and again for every
    ``every`` seconds in which nothing else was said, so that a run that takes long is told from one that hangs.

    Args:
        what: the first stage.
        console: where to; by default the error stream, so that what a command prints stays its own.
        every: longest silence, in seconds, above 0.

    Yields:
        What is to be told the name of each further stage.
    """
    if console.is_terminal:
        with console.status(escape(what)) as status:
            yield lambda stage: status.update(escape(stage))
        return
    lines = _Lines(console, every)
    beat = threading.Thread(target=lines.beat, name="offramp-stages", daemon=True)
    lines.say(what)
    beat.start()
    try:
        yield lines.say
    finally:
        lines.done.set()
        beat.join()


class _Lines:
    """Plain lines, and one more after each silence."""

    def __init__(self, console: Console, every: float) -> None:
        self.console, self.every, self.start, self.done = console, every, time.monotonic(), threading.Event()
        self.stage, self.last = "", self.start

    def say(self, stage: str) -> None:
        self.stage = stage
        self._print(stage)

    def beat(self) -> None:
        """Runs beside the work until `done` is set."""
        while not self.done.wait(max(0.0, self.last + self.every - time.monotonic())):
            if time.monotonic() >= self.last + self.every:  # otherwise something was said while this waited
                self._print(f"{self.stage}, still running")

    def _print(self, text: str) -> None:
        self.last = time.monotonic()
        minutes, seconds = divmod(int(self.last - self.start), 60)
        self.console.print(f"[{minutes:3d}:{seconds:02d}] {text}", markup=False, highlight=False, soft_wrap=True)


__all__ = ["Say", "stages"]
