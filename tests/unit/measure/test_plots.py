"""Pictures as files: whole by themselves, the same bytes each time, and showing the numbers they were given."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest
import torch

pytest.importorskip("matplotlib")

from offramp.core.errors import InvalidInput
from offramp.measure.pareto import Point, curve
from offramp.measure.plots import Picture, overthinking_bars, pareto_chart, promise_histograms, score_distribution, standalone
from offramp.measure.quality import Overthinking

SVG = "{http://www.w3.org/2000/svg}"


def pareto(key: str = "p") -> Picture:
    lines = [curve("a < b & c", [Point("x", 0.2, 0.7), Point("y", 1.0, 0.9)]), curve("other", [Point("z", 0.5, 0.75)])]
    return pareto_chart(lines, dots=[curve("static", [Point("s", 0.6, 0.8)])], key=key, title="Quality & cost", size=(6.0, 3.0))


def test_bars_of_nothing_keep_a_readable_scale() -> None:
    nothing = Overthinking(0.0, 1.0, 1.0, 0.2, torch.zeros(2), torch.zeros(2), torch.zeros(5, dtype=torch.int64))
    words = "".join(ElementTree.fromstring(standalone(overthinking_bars(nothing, ("a", "b", "output"), key="o"))).itertext())
    assert re.search(r"\d %", words) and not re.search(r"\de-\d", words)


def test_a_file_stands_by_itself() -> None:
    picture = pareto()
    text = standalone(picture)
    root = ElementTree.fromstring(text)
    assert root.tag == f"{SVG}svg" and root[0].tag == f"{SVG}title" and root[1].tag == f"{SVG}desc"
    assert (root[0].text, root[1].text) == (picture.title, picture.alt)
    assert "var(" not in text and "aria-hidden" not in text
    assert set(re.findall(r"https?://[^\s\"'<>]+", text)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    box = [float(v) for v in root.attrib["viewBox"].split()]
    assert box[2] == pytest.approx(6.0 * 72)
    assert (int(root.attrib["width"]), int(root.attrib["height"])) == (576, round(box[3] * 4 / 3))
    background = root.find(f"{SVG}rect")
    assert background is not None and background.attrib["fill"] == "#fff"
    words = [t.text for t in root.iter(f"{SVG}text")]
    assert "a < b & c" in words and "static" in words


def test_the_same_picture_has_the_same_bytes() -> None:
    assert standalone(pareto()) == standalone(pareto())
    assert not re.search(r"20\d\d-\d\d-\d\d", standalone(pareto()))


def test_ids_are_numbered_and_used() -> None:
    svg = pareto("some-key").svg
    ids = re.findall(r'\bid="([^"]+)"', svg)
    assert ids == [f"some-key-{i}" for i in range(len(ids))] and ids
    used = re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', svg)
    assert used and {a or b for a, b in used} <= set(ids)


def test_coordinates_are_rounded_and_labels_are_not() -> None:
    scores = torch.linspace(0.1, 0.9, 200)
    svg = score_distribution(scores, None, 0.123, "exit", key="s").svg
    assert "leave at 0.123" in svg
    inside_tags = "".join(re.findall(r"<[^>]+>", svg))
    assert re.search(r"\d\.\d\d\b", inside_tags) and not re.search(r"\d\.\d{3}", inside_tags)


def test_a_foreign_picture_is_refused() -> None:
    with pytest.raises(InvalidInput, match="no view box"):
        standalone(Picture("<svg></svg>", "alt", "title", (), ()))


def test_promises_count_what_lies_beyond() -> None:
    drops = {
        "first": {"safe": [0.0, 0.005, 0.01, 0.02], "daring": [0.02, 0.03, 0.01, 0.04]},
        "second": {"safe": [-0.01, 0.0, 0.0, 0.0], "daring": [0.011, 0.0, 0.0, 0.0]},
    }
    picture = promise_histograms(drops, 0.01, key="g", title="Promise")
    assert [(r[0], r[1], r[2], r[4]) for r in picture.rows] == [
        ("first", "safe", "4", "25.0 %"),  # 0.01 itself is within the limit
        ("first", "daring", "4", "75.0 %"),
        ("second", "safe", "4", "0.0 %"),
        ("second", "daring", "4", "25.0 %"),
    ]
    assert picture.rows[1][3] == "2.50 %"
    words = [t.text for t in ElementTree.fromstring(standalone(picture)).iter(f"{SVG}text")]
    assert {"first", "second", "safe: 25.0 % beyond", "daring: 75.0 % beyond", "promised: at most 1.0 %"} <= set(words)
    assert "second, daring 25.0 %" in picture.alt


@pytest.mark.parametrize("wrong", [{}, {"a": {}}, {"a": {"m": []}}, {"a": {"m": [0.1]}, "b": {"n": [0.1]}}])
def test_promises_need_the_same_methods_everywhere(wrong: dict[str, dict[str, list[float]]]) -> None:
    with pytest.raises(InvalidInput, match="same methods"):
        promise_histograms(wrong, 0.01, key="g", title="Promise")


def test_promises_that_all_came_out_alike_are_drawn() -> None:
    assert promise_histograms({"one": {"m": [0.0, 0.0]}}, 0.0, key="g", title="t").rows[0][4] == "0.0 %"
