"""The report of texts: every token is there with its depth, text cannot become markup, and the figures are those of the run."""

from __future__ import annotations

import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from offramp.core.errors import InvalidInput
from offramp.engines.text.written import Generation
from offramp.measure.text_report import pieces, text_report

pytest.importorskip("matplotlib")

EVIL = {7: "<script>alert(1)</script>", 8: "&amp;", 9: '" onmouseover="x', 10: "\u202e", 11: " word"}


class Letters:
    """A tokenizer that says what tests want."""

    def decode(self, ids: list[int], skip_special_tokens: bool = True, **_: Any) -> str:
        return "".join(EVIL.get(i, f"<{i}>") for i in ids)


def written(**changed: Any) -> Generation:
    fields: dict[str, Any] = {
        "drafted": [4, 3, 0], "accepted": [3, 1, 0], "deep_passes": 4, "prompts": [[1, 2], [3]], "audited": 20, "disagreed": 3,
        "blocks_run": 30, "blocks_plain": 40,
    }  # fmt: skip
    return Generation([[7, 8, 9, 10], [11, 7]], [[8, 2, 2, 8], [8, 3]], **{**fields, **changed})


class Page(HTMLParser):
    """Tags, and the spans of tokens: class, title, text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.spans: list[list[str]] = []
        self._open = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        found = dict(attrs)
        assert not any(name.startswith("on") for name in found), "an attribute that runs something"
        if tag == "span" and "title" in found:
            self.spans.append([str(found["class"]), str(found["title"]), ""])
            self._open = True

    def handle_endtag(self, tag: str) -> None:
        self._open = self._open and tag != "span"

    def handle_data(self, data: str) -> None:
        if self._open:
            self.spans[-1][2] += data


def made(tmp_path: Path, generation: Generation, **options: Any) -> str:
    path = text_report(tmp_path / "texts.html", generation=generation, **{"blocks": 8, "tokenizer": Letters(), **options})
    return path.read_text(encoding="utf-8")


def row(text: str, first: str) -> list[str]:
    """Cells of the table row with this first cell."""
    for found in re.findall(r"<tr>(.*?)</tr>", text):
        cells = [unescape(c) for c in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", found)]
        if cells and cells[0] == first:
            return cells
    raise AssertionError(f"no row {first}")


def test_every_token_with_its_depth_and_as_text(tmp_path):
    page = Page(made(tmp_path, written()))
    assert "script" not in page.tags and "link" in page.tags
    assert [s[2] for s in page.spans] == [EVIL[7], EVIL[8], EVIL[9], EVIL[10], EVIL[11], EVIL[7]]
    assert [s[1] for s in page.spans[:2]] == ["token 7, decided after 8 of 8 blocks", "token 8, decided after 2 of 8 blocks"]
    shades = [s[0] for s in page.spans]
    assert shades[0] == shades[3] == "t full" and shades[1] == shades[2] == "t d0" and shades[5] == "t d1"


def test_nothing_is_fetched(tmp_path):
    text = made(tmp_path, written(), title="<b>title</b>")
    assert "default-src 'none'" in text and "&lt;b&gt;title" in text and "<b>title" not in text
    assert not re.search(r"(?:src|href)=[\"'](?!#|data:)", text) and "url(" not in re.sub(r"url\(#", "", text)


def test_figures_are_those_of_the_run(tmp_path):
    text = made(tmp_path, written())
    assert row(text, "after 2")[1:] == ["2", "33.3 %"] and row(text, "all 8")[1:] == ["3", "50.0 %"]
    assert row(text, "1")[1:4] == ["4", "3", "75.0 %"]
    assert row(text, "2")[1:4] == ["3", "1", "33.3 %"]
    assert row(text, "1 to 1")[1:] == ["2", "8.00", "0.0 %"] and row(text, "2 to 2")[1:] == ["2", "2.50", "100.0 %"]
    for value in ("3 of 6 tokens", "5.17", "4 of 7", "3 of 20", "75.0 %"):
        assert value in text, value
    with pytest.raises(AssertionError, match="no row 3"):
        row(text, "3")  # a place that was never tried has no acceptance


def test_plain_texts_have_no_drafts(tmp_path):
    text = made(tmp_path, written(drafted=[], accepted=[], audited=0, disagreed=0, blocks_plain=0), tokenizer=None)
    assert "Drafts by" not in text and "disagreed" not in text and "counted token by token" not in text
    assert [s[2] for s in Page(text).spans] == [" 7", " 8", " 9", " 10", " 11", " 7"], "without a tokenizer, ids"


def test_many_texts_are_counted_and_some_shown(tmp_path):
    many = Generation([[7]] * 30, [[8]] * 30, prompts=[[1]] * 30)
    text = made(tmp_path, many)
    assert len(Page(text).spans) == 24 and "6 more texts are counted and not shown" in text and "30 texts" in text


def test_what_does_not_fit(tmp_path):
    with pytest.raises(InvalidInput, match="no tokens"):
        made(tmp_path, Generation([[]], [[]], prompts=[[1]]))
    with pytest.raises(InvalidInput, match="from 2 to 8; a model of 4 blocks"):
        made(tmp_path, written(), blocks=4)
    assert list(tmp_path.iterdir()) == []


def test_pieces_make_the_text():
    assert pieces(Letters(), [11], [7, 11]) == [EVIL[7], EVIL[11]]
