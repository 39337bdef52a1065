"""Names of ours that prose mentions exist: in the documentation, in docstrings, comments and messages, and where the API pages ask."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROSE = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), ROOT / "benchmarks" / "README.md"]
CODE = [p for folder in ("src", "benchmarks", "examples", "docs") for p in sorted((ROOT / folder).rglob("*.py"))]
NAME = re.compile(r"""(?<![\w"'./-])offramp(?:\.[A-Za-z_]\w*)+(?![\w/"'])""")  # in quotes it is a key of a file, behind a path a folder
API = re.compile(r"^::: (\S+)\n(?:    options:\n(?:      (?!members).*\n)*(?:      members: \[(.*)\])?)?", re.MULTILINE)


@cache
def found(name: str) -> Any:
    """What a dotted name stands for.

    Raises:
        LookupError: nothing.
    """
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            thing: Any = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError as error:
            if not str(error.name).startswith("offramp"):
                raise
            continue
        for part in parts[end:]:
            if hasattr(thing, part):
                thing = getattr(thing, part)
            elif any(part in getattr(base, "__annotations__", {}) for base in getattr(thing, "__mro__", ())):
                thing = None  # a field: what it holds is an object's
            else:
                raise LookupError(f"{name}: {'.'.join(parts[:end])} has no {part}")
        return thing
    raise LookupError(f"{name}: no such module")


def dead(names: Iterator[str]) -> list[str]:
    out = []
    for name in dict.fromkeys(names):
        try:
            found(name)
        except LookupError as error:
            out.append(str(error))
    return out


def test_a_name_that_is_not_there_is_told() -> None:
    assert dead(iter(["offramp.core.trace.Trace.exits", "offramp.attach", "offramp.policies.skips", "offramp"])) == []
    gone = ["offramp.engines.record", "offramp.core.trace.Trace.nothing", "offramp.attach.nothing", "offramp.nothing"]
    assert len(dead(iter(gone))) == 4
    text = 'see `offramp.attach` (offramp.fit). "offramp.rule" offramp.report/1 src/offramp.py offramp.core.trace.'
    assert NAME.findall(text) == ["offramp.attach", "offramp.fit", "offramp.core.trace"]


@pytest.mark.parametrize("page", PROSE, ids=lambda p: str(p.relative_to(ROOT)))
def test_names_in_the_documentation(page: Path) -> None:
    assert dead(iter(NAME.findall(page.read_text()))) == []


def test_names_in_docstrings_comments_and_messages() -> None:
    """Whole files are read: an import of something that is not there would not get this far."""
    problems = {str(p.relative_to(ROOT)): bad for p in CODE if (bad := dead(iter(NAME.findall(p.read_text()))))}
    assert problems == {}


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "api").glob("*.md")), ids=lambda p: p.name)
def test_the_api_pages_ask_for_what_there_is(page: Path) -> None:
    """`mkdocs build --strict` says the same, and needs the documentation's own packages."""
    asked = API.findall(page.read_text())
    assert len(asked) == page.read_text().count(":::") > 0
    assert dead(iter(module for module, _ in asked)) == []
    for module, members in asked:
        for name in filter(None, (m.strip() for m in members.split(","))):
            thing = found(f"{module}.{name}")
            assert getattr(thing, "__doc__", None), f"{page.name}: {module}.{name} has no docstring, so the page would not show it"


def test_every_page_is_in_the_menu() -> None:
    menu = re.findall(r":\s([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    pages = {str(p.relative_to(ROOT / "docs")) for p in (ROOT / "docs").rglob("*.md")}
    assert sorted(menu) == sorted(pages)


@pytest.mark.parametrize("page", PROSE, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_that_are_named_are_there(page: Path) -> None:
    """By their path from the root, from the package or from the page's folder, or by their own name where a folder was named before."""
    named = set(re.findall(r"`((?:[\w-]+/)*(?!x[_-]y\b)[\w-]+\.(?:py|toml|yml))`", page.read_text()))  # x-y: a method to be added
    folders = [ROOT / name for name in ("src", "tests", "benchmarks", "examples", "docs")]
    files = {str(p.relative_to(ROOT)) for folder in folders for p in folder.rglob("*.*")}
    files |= {p.name for p in ROOT.glob("*.*")}
    assert [name for name in sorted(named) if not any(f == name or f.endswith(f"/{name}") for f in files)] == []
