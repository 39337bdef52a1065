"""What a long command says while it runs."""

from __future__ import annotations

import io
import threading
import time

from rich.console import Console

from offramp.cli.progress import stages


def test_a_log_gets_a_line_a_stage_and_one_for_each_silence() -> None:
    out = io.StringIO()
    before = threading.active_count()
    with stages("first", console=Console(file=out, width=40), every=0.05) as say:
        say("second, of [brackets] and more words than a line of this width could hold")
        deadline = time.monotonic() + 10
        while out.getvalue().count("still running") < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        say("third")
    lines = out.getvalue().splitlines()
    assert lines[0] == "[  0:00] first" and lines[-1].endswith("] third"), lines
    assert lines[1].endswith("] second, of [brackets] and more words than a line of this width could hold"), "one line, as it was given"
    assert sum(line.endswith("could hold, still running") for line in lines) >= 2 and "first, still" not in out.getvalue()
    assert threading.active_count() == before, "nothing goes on speaking"
    ended = out.getvalue()
    time.sleep(0.12)
    assert out.getvalue() == ended


def test_what_is_said_in_time_is_not_repeated() -> None:
    out = io.StringIO()
    with stages("first", console=Console(file=out), every=5.0) as say:
        say("second")
    assert [line.partition("] ")[2] for line in out.getvalue().splitlines()] == ["first", "second"]


def test_a_failure_ends_it() -> None:
    out, before = io.StringIO(), threading.active_count()
    try:
        with stages("first", console=Console(file=out), every=0.01):
            raise KeyError("x")
    except KeyError:
        assert threading.active_count() == before
    else:
        raise AssertionError("the error was swallowed")


def test_a_terminal_gets_one_line_that_changes() -> None:
    out = io.StringIO()
    with stages("first", console=Console(file=out, force_terminal=True, width=60), every=0.01) as say:
        say("second, of [brackets]")
        time.sleep(0.2)
    assert "still running" not in out.getvalue() and "second, of [brackets]" in out.getvalue()
