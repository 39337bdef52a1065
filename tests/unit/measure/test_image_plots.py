"""Pictures and the page about generated images: whole by themselves, showing the numbers they were given, fair to the controls."""

from __future__ import annotations

import base64
import html.parser
import io
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("matplotlib", reason="pictures need the extra 'report'")

from offramp.core.errors import InvalidInput
from offramp.measure.image_plots import CostPoint, cost_quality, decision_map, depth_map, sample_grid
from offramp.measure.image_quality import DensityCoverage, FidFloor, PrecisionRecall, explained_by_step
from offramp.measure.image_report import ImageResult, against_controls, image_report
from offramp.measure.plots import Picture, standalone

SVG = "{http://www.w3.org/2000/svg}"
NASTY = "<script>alert('x')</script> & \"$5"


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def words(picture: Picture) -> str:
    return " | ".join("".join(t.itertext()) for t in ElementTree.fromstring(standalone(picture)).iter(f"{SVG}text"))


def embedded(picture: Picture) -> list[Tensor]:
    """The PNGs of a picture as ``[H, W, C]``."""
    import numpy as np
    from PIL import Image

    found = re.findall(r'href="data:image/png;base64,([^"]+)"', picture.svg)
    return [torch.from_numpy(np.asarray(Image.open(io.BytesIO(base64.b64decode(f)))).copy()) for f in found]


def grid(**change: Any) -> Picture:
    full = normal(3, 3, 8, 8).clamp(-1, 1)
    given: dict[str, Any] = {"key": "grid", "columns": ("a", "b", "c")}
    systems = {"near": (full + 0.02).clamp(-1, 1), "same": full.clone()}
    return sample_grid(full, systems, **(given | change))


def depths() -> Tensor:
    x = torch.linspace(0.2, 0.9, 20)[None] + 0.1 * normal(12, 1) + 0.03 * normal(12, 20, seed=1)
    return x.clamp(0, 1)


def points() -> list[CostPoint]:
    return [
        CostPoint("ours", "a", 0.5, (10.0, 11.0, 12.0)),
        CostPoint("ours", "b", 0.75, (8.0, 9.0, 9.5)),
        CostPoint("few-steps", "25 steps", 0.5, (12.0, 12.5, 13.0), True),
        CostPoint("few-steps", "38 steps", 0.75, (9.0, 9.0, 9.3), True),
    ]


def drawn() -> dict[str, Picture]:
    return {
        "grid": grid(),
        "depth": depth_map(depths(), key="depth"),
        "decisions": decision_map(torch.tensor([[0, 1, 2], [0, 0, 1]]), ("compute", "reuse", "extrapolate"), key="decisions"),
        "cost": cost_quality(points(), key="cost", title="t", full=CostPoint("full model", "", 1.0, (8.0, 8.1, 8.2)), floor=0.5),
    }


@pytest.mark.parametrize("name", ["grid", "depth", "decisions", "cost"])
def test_pictures_stand_by_themselves(name: str) -> None:
    picture = drawn()[name]
    root = ElementTree.fromstring(standalone(picture))
    assert root.tag == f"{SVG}svg" and "var(" not in standalone(picture)
    assert set(re.findall(r"https?://[^\s\"'<>]+", picture.svg)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    ids = re.findall(r'\bid="([^"]+)"', picture.svg)
    assert ids == [f"{name}-{i}" for i in range(len(ids))]
    assert len(picture.alt) > 30 and picture.rows and all(len(r) == len(picture.header) for r in picture.rows)
    assert drawn()[name].svg == picture.svg, "the same picture has the same bytes"


def test_a_grid_shows_the_pixels_it_was_given() -> None:
    full = normal(3, 3, 8, 8).clamp(-1, 1)
    shown = embedded(grid(gain=10.0))
    assert len(shown) == 15  # the full model, and twice an image and a difference
    expected = ((full + 1) / 2 * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    assert all(torch.equal(a, b) for a, b in zip(shown[:3], expected, strict=True))
    gap = ((full + 0.02).clamp(-1, 1) - full).double() / 2  # as a share of the range
    middle = ((0.5 + 10 * gap).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    assert all(int((a.int() - b.int()).abs().max()) <= 1 for a, b in zip(shown[6:9], middle, strict=True))
    assert all(bool((s == 128).all()) for s in shown[12:]), "no difference is mid-grey"


def test_a_grid_tells_its_numbers() -> None:
    picture = grid()
    assert "difference | 50 times" in words(picture) and all(c in words(picture) for c in ("full model", "near", "same", "a | b | c"))
    assert [r[:2] for r in picture.rows] == [(s, c) for s in ("near", "same") for c in "abc"]
    assert picture.rows[3][2:] == ("equal", "0.0000")
    assert 39.5 < float(picture.rows[0][2]) < 42  # 40 dB but for clamped pixels
    assert "same (some images equal)" in picture.alt


def test_names_are_escaped() -> None:
    full = normal(2, 1, 4, 4)
    picture = sample_grid(full, {NASTY: full + 1}, key="g", columns=(NASTY, "b"))
    assert "<script" not in picture.svg
    assert ElementTree.fromstring(standalone(picture)) is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"columns": ("a",)}, "3 images"),
        ({"low": 1.0}, "low < high"),
        ({"gain": 0.0}, "gain > 0"),
        ({"key": "Bad Key"}, "lower-case"),
    ],
)
def test_a_grid_checks_what_it_gets(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        grid(**change)


def test_a_grid_needs_images_that_match() -> None:
    with pytest.raises(InvalidInput, match="'x' must be finite"):
        sample_grid(normal(2, 3, 4, 4), {"x": normal(2, 3, 4, 5)}, key="g")
    with pytest.raises(InvalidInput, match="systems not empty"):
        sample_grid(normal(2, 3, 4, 4), {}, key="g")


# ------------------------------------------------------------------------------------------------ maps


def test_a_depth_map_says_what_the_step_explains() -> None:
    x = depths()
    picture = depth_map(x, key="d", noise=[float(i) for i in range(20)])
    assert picture.title == f"Depth: the step explains {100 * explained_by_step(x):.1f} % of its variance"
    assert picture.header[1] == "noise level" and len(picture.rows) == 20
    assert picture.rows[4][:3] == ("5", "4", f"{float(x[:, 4].mean()):.4g}")
    (shades,) = [s for s in embedded(picture) if s.shape[:2] == (12, 20)]
    order = x.mean(1).argsort()
    assert torch.equal(shades[..., 3], (x[order].double() / float(x.max()) * 255).round().to(torch.uint8))


def test_many_samples_are_thinned_and_a_constant_is_drawn() -> None:
    picture = depth_map(normal(1000, 5).abs(), key="d")
    assert [tuple(s.shape[:2]) for s in embedded(picture)] == [(256, 5)]
    assert "100.0 %" in depth_map(torch.zeros(4, 5), key="d").title


def test_decisions_are_counted() -> None:
    x = torch.tensor([[0, 1, 2, 1], [0, 0, 1, 1]])
    picture = decision_map(x, ("compute", "reuse", "extrapolate"), key="d", rows="block")
    assert picture.rows[1] == ("2", "50.0 %", "50.0 %", "0.0 %") and picture.title.endswith("compute 37.5 %")
    assert all(n in words(picture) for n in ("compute", "reuse", "extrapolate", "block"))
    (shades,) = embedded(picture)
    assert torch.equal(shades[x == 0], shades[0, :1].expand(3, -1)) and not torch.equal(shades[0, 0], shades[0, 1])
    yes = decision_map(torch.tensor([[True, False]]), key="d")
    assert yes.rows == (("1", "100.0 %", "0.0 %"), ("2", "0.0 %", "100.0 %"))


def test_maps_check_what_they_get() -> None:
    with pytest.raises(InvalidInput, match="one level for each of 20"):
        depth_map(depths(), key="d", noise=[1.0])
    with pytest.raises(InvalidInput, match=">= 0"):
        depth_map(-depths(), key="d")
    with pytest.raises(InvalidInput, match=r"0\.\.1"):
        decision_map(torch.tensor([[2]]), key="d")
    with pytest.raises(InvalidInput, match="integer"):
        decision_map(torch.zeros(2, 2), key="d")
    with pytest.raises(InvalidInput, match="2 to 6"):
        decision_map(torch.zeros(2, 2, dtype=torch.int64), ("one",), key="d")


# ------------------------------------------------------------------------------------------------ cost and quality


def test_every_point_and_control_is_on_the_curve() -> None:
    picture = drawn()["cost"]
    shown = words(picture)
    assert all(w in shown for w in ("ours", "few-steps (control)", "25 steps", "38 steps", "full model"))
    assert "real images against real images: 0.5 (below the axis)" in shown
    assert picture.rows[0] == ("full model", "", "", "100.0 %", "8.1", "8, 8.1, 8.2")
    assert picture.rows[3] == ("few-steps", "25 steps", "control", "50.0 %", "12.5", "12, 12.5, 13")
    assert "Lowest 8.833 at 75.0 % (ours b)" in picture.alt


def test_a_floor_nearby_is_a_line_and_wide_ranges_are_logarithmic() -> None:
    near = cost_quality(points(), key="c", title="t", floor=7.0)
    assert "real images against real images: 7 |" in words(near) + " |" and "below the axis" not in words(near)
    steep = cost_quality([*points(), CostPoint("random", "", 0.5, (400.0,), True)], key="c", title="t", unit="ms", cost="time (ms)")
    assert "(log scale)" in words(steep) and "(log scale)" not in words(near)
    assert steep.rows[0][3] == "0.5 ms"


def test_points_are_checked() -> None:
    with pytest.raises(InvalidInput, match="at least one point"):
        cost_quality([], key="c", title="t")
    for wrong in ((), (float("nan"),)):
        with pytest.raises(InvalidInput, match="finite"):
            CostPoint("a", "", 0.5, wrong)
    with pytest.raises(InvalidInput, match=">= 0"):
        CostPoint("a", "", -0.5, (1.0,))


# ------------------------------------------------------------------------------------------------ the page


def few_steps(*values: tuple[float, tuple[float, ...]], name: str = "few-steps") -> list[ImageResult]:
    return [ImageResult(name, f"{c:g}", fid, c, {8: 100 * c}, True) for c, fid in values]


def test_controls_are_read_at_the_same_cost_seed_by_seed() -> None:
    controls = few_steps((1.0, (1.0, 1.0, 1.0)), (0.2, (40.0, 40.0, 40.0)), (0.4, (20.0, 22.0, 24.0)), (0.8, (10.0, 14.0, 12.0)))
    (found,) = against_controls([ImageResult("ours", "", (12.5, 15.1, 15.9), 0.5), *controls], lambda r: r.flops)
    assert found.control == "few-steps" and found.control_fid == pytest.approx((17.5 + 20 + 21) / 3)  # a quarter of the way
    assert found.difference is not None and found.difference.value == pytest.approx(-5)
    assert found.difference.high - found.difference.value == pytest.approx(4.30265 * 0.1 / 3**0.5, rel=1e-4)  # -5, -4.9, -5.1
    assert found.verdict == "better"


def test_the_best_control_counts_and_a_larger_budget_need_not_be_spent() -> None:
    controls = few_steps((0.4, (20.0, 20.1)), (0.8, (10.0, 10.1))) + few_steps((0.3, (9.0, 9.1)), name="static")
    ours = [
        ImageResult("ours", f"{c:g}", fid, c) for c, fid in ((0.2, (1.0, 1.1)), (0.35, (9.0, 9.1)), (0.5, (12.0, 12.1)), (0.9, (3.0, 3.2)))
    ]
    found = against_controls([*ours, *controls], lambda r: r.flops)
    assert [(v.control, v.verdict) for v in found] == [
        ("", "no control is as cheap"),
        ("static", "within the spread"),
        ("static", "worse"),
        ("static", "better"),
    ]
    assert found[2].control_fid == pytest.approx(9.05)


def test_of_settings_at_one_cost_the_best_counts_and_one_seed_settles_nothing() -> None:
    controls = few_steps((0.5, (9.0,)), (0.5, (7.0,)), (1.0, (6.0,)))
    (same,) = against_controls([ImageResult("ours", "", (1.0,), 0.5), *controls], lambda r: r.flops)
    assert same.control_fid == 7 and same.verdict == "one seed: not clear"
    (between,) = against_controls([ImageResult("ours", "", (1.0,), 0.75), *controls], lambda r: r.flops)
    assert between.control_fid == pytest.approx(6.5)


def test_results_survive_json() -> None:
    result = ImageResult("a", "b", (1.0, 2.0), 0.5, {1: 3.0}, precision_recall=PrecisionRecall(0.1, 0.2), exit_efficiency={8: 0.9})
    assert ImageResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result
    with pytest.raises(InvalidInput, match="not the entries"):
        ImageResult.from_dict({"name": "a", "setting": "", "fid": [1.0], "flops": 0.5, "speed": 3})
    with pytest.raises(InvalidInput, match="not the entries"):
        ImageResult.from_dict({"name": "a"})


def test_results_are_checked() -> None:
    with pytest.raises(InvalidInput, match="same seeds"):
        against_controls([ImageResult("a", "", (1.0,), 0.5), ImageResult("b", "", (1.0, 2.0), 0.5)], lambda r: r.flops)
    with pytest.raises(InvalidInput, match="finite"):
        ImageResult("a", "", (), 0.5)
    with pytest.raises(InvalidInput, match="times > 0"):
        ImageResult("a", "", (1.0,), 0.5, {1: 0.0})


class Tags(html.parser.HTMLParser):
    """What a page refers to, and whether its tags close."""

    VOID = frozenset({"meta", "link", "br", "img", "hr", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id" and value:
                self.ids.append(value)
            if name in ("src", "href", "xlink:href") and value and not value.startswith(("data:", "#")):
                self.outside.append(value)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()


def make_page(path: Path, **change: Any) -> str:
    full = ImageResult("full model", "", (8.0, 8.1, 8.2), 1.0, {1: 50.0, 8: 100.0}, kid=0.001)
    ours = ImageResult(
        NASTY,
        "0.6",
        (8.1, 8.2, 8.3),
        0.6,
        {1: 33.0, 8: 62.0},
        precision_recall=PrecisionRecall(0.61, 0.52),
        density_coverage=DensityCoverage(0.9, 0.8),
        psnr_db=27.25,
        relative_l2=0.123,
        explained=0.87,
        exit_efficiency={8: 0.931},
        cache_bytes=12345,
    )
    images = normal(4, 3, 8, 8).clamp(-1, 1)
    given: dict[str, Any] = {
        "full": full,
        "results": [ours, *few_steps((0.5, (12.0, 12.2, 12.1)), (0.75, (10.0, 10.2, 10.1)))],
        "features": "a small classifier",
        "floor": FidFloor((0.5, 0.52), 5000, 5000),
        "images": (images, {"ours": images + 0.01}),
        "depths": {"ours": depths(), "schedule": torch.linspace(0.2, 1, 20).expand(12, 20)},
        "decisions": {"cache": (torch.tensor([[0, 1], [1, 0]]), ("compute", "reuse"))},
        "environment": {"device_name": "a device"},
        "notes": [NASTY],
    }
    return image_report(path, **(given | change)).read_text(encoding="utf-8")


def test_the_page_is_whole(tmp_path: Path) -> None:
    text = make_page(tmp_path / "deep" / "page.html")
    tags = Tags()
    tags.feed(text)
    assert not tags.open and not tags.outside and len(tags.ids) == len(set(tags.ids))
    assert "<script" not in text and "a device" in text
    for part in (
        "Against the best control at equal cost",
        "Every setting",
        "Samples at equal noise",
        "Where depth goes",
        "more than nine tenths",
    ):
        assert part in text
    for number in ("27.25", "0.123", "0.931", "12,345", "87.0 %", "0.610", "0.620", "better", "FID against measured time, batch 8"):
        assert number in text, number
    assert "right class" not in text  # measured by nobody


def test_a_page_of_little_has_no_empty_sections(tmp_path: Path) -> None:
    one = ImageResult("ours", "", (9.0,), 0.5)
    text = make_page(
        tmp_path / "p.html",
        full=ImageResult("full model", "", (8.0,), 1.0),
        results=[one],
        images=None,
        depths=None,
        decisions=None,
        floor=None,
    )
    assert "no control is as cheap" in text and "one seed" in text
    assert "Samples at equal noise" not in text and "Where depth goes" not in text and "measured time" not in text
    with pytest.raises(InvalidInput, match="results is empty"):
        make_page(tmp_path / "p.html", results=[])
    with pytest.raises(InvalidInput, match="same seeds"):
        make_page(tmp_path / "p.html", results=[one])
