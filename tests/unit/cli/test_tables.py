"""Tables that are wider than the terminal."""

from __future__ import annotations

import pytest
from rich.console import Console

from offramp.cli import base

COLUMNS = ("", "cost", "blocks share", "agreement", "tokens per round", "perplexity ratio", "gain over fixed")
ROWS = [("default", *["0.783"] * 6), ("static: 4 blocks trained alone", *["-"] * 5, "[b]1.013[/b]")]


def printed(monkeypatch: pytest.MonkeyPatch, width: int, rows: list[tuple[str, ...]] = ROWS, **options: str) -> str:
    monkeypatch.setattr(base, "console", Console(width=width, record=True, color_system=None))
    base.table("Numbers", COLUMNS[: len(rows[0])], rows, **options)  # type: ignore[arg-type]
    return base.console.export_text()


@pytest.mark.parametrize("width", [60, 80, 200])
def test_no_number_and_no_word_is_broken(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    found = printed(monkeypatch, width)
    assert found.count("0.783") == 6 and found.count("1.013") == 1 and found.count("Numbers") == 1
    for word in ["cost", "blocks", "share", "agreement", "tokens", "per", "round", "perplexity", "ratio", "gain", "over", "fixed"]:
        assert word in found
    assert max(map(len, found.splitlines())) <= width
    assert found.count("static: 4 blocks trained alone") == found.count("default") == (1 if width == 200 else 2 if width == 80 else 3)


def test_a_narrow_terminal_still_gets_every_column() -> None:
    assert base.least_widths(COLUMNS, ROWS) == [30, 5, 6, 9, 6, 10, 5]
    assert base.fitting([30, 5, 6, 9], 10) == [[0, 1], [0, 2], [0, 3]]
    assert base.fitting([4], 10) == [[0]] and base.fitting([], 10) == [] and base.fitting([4, 4], 80) == [[0, 1]]


def test_words_are_wrapped_and_not_taken_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    found = printed(monkeypatch, 40, [("name", "a sentence that is longer than the terminal is wide")], justify="left")
    assert found.count("name") == 1 and "sentence" in found
