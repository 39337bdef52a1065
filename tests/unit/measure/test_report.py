"""The report: complete, self-contained, escaped; and drawn by a browser without a complaint where one is installed."""

from __future__ import annotations

import base64
import dataclasses
import html.parser
import json
import re
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from offramp.core.certificate import Certificate, Estimate, Plan
from offramp.core.errors import InvalidInput, MissingExtra
from offramp.core.trace import LatencyTable, Trace
from offramp.measure import Point, curve, outcome, report
from offramp.measure import report as report_function
from offramp.measure.page import pixels, png_uri
from offramp.measure.quality import item_quality
from offramp.policies import Confidence

pytest.importorskip("matplotlib", reason="the report needs the extra 'report'")

INF = float("inf")
EXITS = ("blocks.1", "blocks.3", "output")
ITEMS = 400
NASTY = "<script>alert('x')</script> & \"quotes\" $5 $6"


def make_trace(labels: bool = True, logits: bool = True, seed: int = 0) -> Trace:
    """Ten classes; harder items have weaker evidence, later exits see more of it."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(0, 10, (ITEMS,), generator=generator)
    ease = torch.rand(ITEMS, 1, 1, generator=generator) * 2
    noise = torch.randn(ITEMS, 3, 10, generator=generator)
    signal = torch.nn.functional.one_hot(truth, 10)[:, None] * torch.tensor([1.5, 2.5, 4.0])[:, None] * ease
    z = (signal + noise) * 1.5
    table = LatencyTable(
        (1, 8),
        torch.rand(3, 2, generator=generator).double(),
        torch.tensor([[0.1, 0.1], [0.1, 0.1], [0.0, 0.0]]).double(),
        torch.tensor([0.01, 0.02]).double(),
        0.005,
        NASTY,
    )
    return Trace(
        EXITS,
        z.argmax(-1),
        torch.tensor([3.0e6, 6.2e6, 9.4e6]),
        9.0e6,
        labels=truth if labels else None,
        logits=z if logits else None,
        latency=table,
        fingerprint="f" * 64,
        provenance={"data": NASTY, "nested": {"items": ITEMS}},
    )


def make_plan(a: float, b: float, cost: float = 0.6) -> Plan:
    certificate = Certificate(
        f"Mean cost at most {cost}. {NASTY}",
        "quantile",
        {"mean_cost": cost},
        {"mean_cost": Estimate(cost, cost - 0.02, cost + 0.02)},
        False,
        123,
    )
    return Plan(Confidence(), EXITS, (a, b, -INF), (0.4, 0.3, 0.3), cost, certificate)


RUNS: list[dict[str, Any]] = [
    {
        "name": NASTY,
        "mode": "latency",
        "batch_size": 8,
        "median_ms": 4.0,
        "full_ms": 6.0,
        "exit_efficiency": 0.9,
        "accuracy": 0.8,
        "mean_cost": 0.6,
        "fixed_exit_ms": [2.0, 4.0, 6.5],
    },
    {
        "name": "second",
        "mode": "throughput",
        "batch_size": 64,
        "median_ms": 20.0,
        "p95_ms": 22.0,
        "full_ms": 40.0,
        "accuracy": 0.8,
        "extra": 1,
    },
    {"name": "third", "batch_size": 64, "median_ms": 21.0},
]


class Reader(html.parser.HTMLParser):
    """Collects tags, attributes, ids and text; complains about tags that do not nest."""

    void = frozenset(("meta", "link", "img", "br"))

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open[-1] != tag:
            raise ValueError(f"</{tag}> closes {self.open[-3:]}")
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text.append(data)


def read(path: Path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    assert reader.open == []
    return reader


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with every section."""
    images = torch.rand(ITEMS, 3, 12, 12, generator=torch.Generator().manual_seed(1)) * 4 - 2
    return report(
        tmp_path_factory.mktemp("report") / "deep" / "full.html",
        trace=make_trace(),
        plan=make_plan(0.8, 0.7),
        plans={"cheap": make_plan(0.4, 0.4, 0.4), NASTY: make_plan(0.99, 0.99, 0.9)},
        baselines=[
            Point(NASTY, 0.5, 0.6, latency_ms=0.5, batch_size=8),
            curve("other method", [Point("x", 0.4, 0.5), Point("y", 0.9, 0.7)]),
        ],
        runs=RUNS,
        examples=images,
        class_names=[f"<b>{NASTY}{i}" for i in range(10)],
        title=NASTY,
    )


def test_every_section_and_figure_is_there(full: Path) -> None:
    page = read(full)
    ids = [a["id"] for t, a in page.tags if t == "section"]
    assert ids == ["summary", "cost", "exits", "reliability", "overthinking", "examples", "latency", "machine"]
    # budget, flops, two batch sizes, shares, 2 scores, 3 reliabilities, overthinking
    assert sum(t == "svg" for t, _ in page.tags) == 11
    figures = [a for t, a in page.tags if t == "div" and a.get("role") == "img"]
    assert len(figures) == 11 and all(len(a["aria-label"] or "") > 30 for a in figures)
    assert sum(t == "figure" for t, _ in page.tags) == 11
    assert all(a.get("alt") for t, a in page.tags if t == "img")
    headings = "".join(page.text)
    assert all(word in headings for word in ("Easiest", "Hardest", "Overthought", "Requested and realised", "Certificate"))


def test_nothing_is_fetched_and_nothing_runs(full: Path) -> None:
    page = read(full)
    assert not {t for t, _ in page.tags} & {"script", "iframe", "object", "embed", "base", "form"}
    for _, attributes in page.tags:
        assert not [a for a in attributes if a.startswith("on")]
        for name in ("src", "href", "xlink:href"):
            target = attributes.get(name)
            assert target is None or target.startswith(("#", "data:")), target
    text = full.read_text()
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    assert set(re.findall(r"https?://[^\s\"'<>]+", text)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_user_text_is_escaped_and_not_parsed_as_mathematics(full: Path) -> None:
    page = read(full)
    assert not any(t == "b" and "alert" in str(a) for t, a in page.tags)
    seen = " ".join(page.text)
    assert "<script>alert('x')</script>" in seen  # as text
    assert "$5 $6" in seen


def test_ids_are_unique_and_references_resolve(full: Path) -> None:
    page = read(full)
    ids = [a["id"] for _, a in page.tags if a.get("id")]
    assert len(ids) == len(set(ids))
    text = full.read_text()
    targets = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
    assert targets and targets <= set(ids)


def test_numbers_on_the_page_are_those_of_the_trace(full: Path) -> None:
    trace, plan = make_trace(), make_plan(0.8, 0.7)
    result = outcome(trace, plan)
    text = "".join(read(full).text)
    assert f"{100 * result.mean_quality:.2f} %" in text
    assert f"{100 * float(item_quality(trace).values[:, -1].mean()):.2f} %" in text
    assert f"{100 * result.mean_cost:.1f} %" in text
    assert f"{100 * (result.mean_cost - 0.6):+.1f} points" in text
    for share in result.shares.tolist():
        assert f"{100 * share:.2f} %" in text
    assert "1.50" in text  # 6 ms over 4 ms
    assert NASTY in text and "123 items" in text


def test_colours_follow_the_page(full: Path) -> None:
    text = full.read_text()
    assert "prefers-color-scheme:dark" in text and "var(--c1, #1f5fa8)" in text
    assert not re.search(r"#(0[1-9])\1\1\b", text)  # no stand-in is left
    used = set(re.findall(r"var\(--([a-z0-9]+)", text))
    defined = set(re.findall(r"--([a-z0-9]+):", text))
    assert used <= defined


def test_same_input_same_bytes(tmp_path: Path) -> None:
    pages = []
    for name in ("one", "two"):
        pages.append(report(tmp_path / name, trace=make_trace(), plan=make_plan(0.8, 0.7), environment={"device": "x"}).read_bytes())
    assert pages[0] == pages[1]


def test_texts(tmp_path: Path) -> None:
    texts = [f"review {i} {NASTY} " + "long " * 200 for i in range(ITEMS)]
    page = read(report(tmp_path / "t.html", trace=make_trace(), plan=make_plan(0.8, 0.7), examples=texts))
    assert sum(t == "blockquote" for t, _ in page.tags) >= 16
    assert not any(t == "img" for t, _ in page.tags)


def test_examples_are_the_right_items(tmp_path: Path) -> None:
    trace, plan = make_trace(), make_plan(0.8, 0.7)
    result = outcome(trace, plan)
    text = report(tmp_path / "t.html", trace=trace, plan=plan, examples=[f"item-{i}." for i in range(ITEMS)]).read_text()
    blocks = {h: re.findall(r"item-(\d+)\.", body) for h, body in re.findall(r"<h3>(\w+)</h3>(.*?)</ul>", text, re.DOTALL)}
    easy, hard, spoilt = ([int(i) for i in blocks[h]] for h in ("Easiest", "Hardest", "Overthought"))
    first = result.exits == 0
    assert easy == [int(i) for i in result.scores[:, 0].where(first, torch.tensor(-1.0)).argsort(descending=True)[:8]]
    best = result.scores[:, :-1].amax(1)
    assert len(hard) == 8 and all(int(result.exits[i]) == 2 for i in hard)
    assert sorted(float(best[i]) for i in hard) == sorted(best[result.exits == 2].tolist())[:8]
    right = trace.predictions == trace.labels[:, None]  # type: ignore[index]
    assert spoilt and all(bool(right[i, :-1].any()) and not bool(right[i, -1]) for i in spoilt)


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("logits", [True, False])
def test_without_labels_logits_or_plan(tmp_path: Path, labels: bool, logits: bool) -> None:
    page = read(report(tmp_path / "t.html", trace=make_trace(labels, logits)))
    text = "".join(page.text)
    assert ("Not available" in text) == (not labels or not logits)
    assert ("agreement with the full model" in text) == (not labels)


def test_a_trace_that_cannot_be_replayed_says_why(tmp_path: Path) -> None:
    trace = dataclasses.replace(make_trace(), why_not_replayable="keys of later tokens are copied")
    text = "".join(read(report(tmp_path / "t.html", trace=trace, plan=make_plan(0.8, 0.7), runs=RUNS)).text)
    assert "keys of later tokens are copied" in text and "Measured runs" in text


def test_plans_that_never_or_always_leave(tmp_path: Path) -> None:
    for a, b in ((-INF, -INF), (INF, INF)):
        text = "".join(read(report(tmp_path / "t.html", trace=make_trace(), plan=make_plan(a, b), examples=["x"] * ITEMS)).text)
        assert ("switched off" in text) == (INF in (a, b))


def test_many_exits_are_thinned_and_the_page_says_so(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    exits = (*(f"blocks.{i}" for i in range(23)), "output")
    z = torch.randn(50, 24, 3, generator=generator)
    trace = Trace(exits, z.argmax(-1), torch.arange(1.0, 25.0), 24.0, labels=torch.randint(0, 3, (50,), generator=generator), logits=z)
    plan = Plan(Confidence(), exits, (*(0.9,) * 23, -INF), (1.0, *(0.0,) * 23), 0.5)
    page = read(report(tmp_path / "t.html", trace=trace, plan=plan))
    text = "".join(page.text)
    assert "8 of 23 early exits are shown" in text and "8 of 24 exits are shown" in text


def test_regression(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(60, 3, generator=generator)
    rule = Confidence()
    from offramp.core.parts import part_key

    trace = Trace(
        EXITS, values, torch.tensor([1.0, 2.0, 3.0]), 3.0, losses=values, recorded={part_key(rule): torch.rand(60, 3, generator=generator)}
    )
    text = "".join(read(report(tmp_path / "t.html", trace=trace, plan=make_plan(0.5, 0.5), examples=["x"] * 60)).text)
    assert "quality, full model" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"plan": dataclasses.replace(make_plan(0.5, 0.5), exits=("x", "y", "output"))}, "'x'"),
        ({"examples": ["one"]}, "400 items in order, got 1"),
        ({"plan": make_plan(0.8, 0.7), "examples": torch.zeros(ITEMS, 5, 6, 7)}, r"one item is \(5, 6, 7\)"),
        ({"runs": [{"name": "a", "batch_size": 1}]}, r"runs\[0\] lacks median_ms"),
        ({"runs": [{"name": "a", "batch_size": 1, "median_ms": 1.0, "fixed_exit_ms": [1.0]}]}, "fixed_exit_ms of 1 exits"),
        ({"runs": [{"name": "a", "batch_size": 0, "median_ms": 1.0}]}, "batch_size >= 1"),
    ],
)
def test_refusals(tmp_path: Path, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        report(tmp_path / "t.html", trace=make_trace(), **arguments)
    assert not list(tmp_path.iterdir())  # nothing half-written


def test_missing_matplotlib_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra, match=r"offramp\[report\]"):
        report_function(tmp_path / "t.html", trace=make_trace())


def test_matplotlib_is_only_imported_inside_functions() -> None:
    folder = Path(sys.modules["offramp.measure.plots"].__file__ or "").parent
    found = [
        (path.name, line)
        for path in folder.glob("*.py")
        for line in path.read_text().splitlines()
        if re.search("import.*matplotlib|from matplotlib", line)
    ]
    assert found and all(name in ("plots.py", "image_plots.py") and line.startswith("    ") for name, line in found)


def test_drawing_leaves_matplotlib_settings_alone(tmp_path: Path) -> None:
    import matplotlib

    matplotlib.rcParams["font.size"] = 13.0
    try:
        report(tmp_path / "t.html", trace=make_trace())
        assert matplotlib.rcParams["font.size"] == 13.0
    finally:
        matplotlib.rcdefaults()


def decode(uri: str) -> tuple[int, int, int, bytes]:
    """Width, height, colour type and raw bytes of a PNG without line filters, checksums checked."""
    data = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    place, chunks = 8, {}
    while place < len(data):
        (size,) = struct.unpack(">I", data[place : place + 4])
        kind, body = data[place + 4 : place + 8], data[place + 8 : place + 8 + size]
        assert struct.unpack(">I", data[place + 8 + size : place + 12 + size]) == (zlib.crc32(kind + body),)
        chunks[kind] = body
        place += 12 + size
    width, height, depth, colour = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    assert depth == 8
    raw = zlib.decompress(chunks[b"IDAT"])
    stride = len(raw) // height
    assert all(raw[i * stride] == 0 for i in range(height))
    return width, height, colour, b"".join(raw[i * stride + 1 : (i + 1) * stride] for i in range(height))


@pytest.mark.parametrize(("channels", "colour"), [(1, 0), (3, 2), (4, 6)])
def test_png_round_trip(channels: int, colour: int) -> None:
    image = torch.randint(0, 256, (5, 7, channels), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert decode(png_uri(image)) == (7, 5, colour, bytes(image.flatten().tolist()))


def test_pixels_of_all_layouts() -> None:
    whole = torch.randint(0, 256, (6, 5, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pixels([whole])[0], whole)
    assert torch.equal(pixels([whole.permute(2, 0, 1).float() / 255])[0], whole)
    assert pixels([torch.rand(8, 8)])[0].shape == (8, 8, 1)
    stretched = pixels([torch.tensor([[-2.0, 2.0]])])[0]
    assert stretched.flatten().tolist() == [0, 255]
    assert pixels([torch.rand(3, 400, 800)])[0].shape == (96, 192, 3)


# ------------------------------------------------------------------------------------------------ in a browser

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine; install it to see the report drawn")

PROBE = """<script>addEventListener('load', () => {
  const boxes = [...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect());
  console.log('PROBE' + JSON.stringify({
    width: innerWidth, scroll: document.documentElement.scrollWidth,
    figures: boxes.filter(b => b.width > 100 && b.height > 100).length,
    broken: [...document.images].filter(i => !i.complete || i.naturalWidth === 0).length, images: document.images.length,
    background: getComputedStyle(document.body).backgroundColor,
  }) + 'END');
});</script>"""


def browse(page: Path, folder: Path, *flags: str) -> tuple[str, Path]:
    """What the browser's console said, and a screenshot."""
    shot = folder / "shot.png"
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"]
    command += [
        f"--user-data-dir={folder / 'profile'}",
        "--window-size=1280,1600",
        f"--screenshot={shot}",
        "--enable-logging=stderr",
        "--v=0",
    ]
    done = subprocess.run([*command, *flags, page.as_uri()], capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line), shot


def probed(full: Path, folder: Path) -> Path:
    """A copy that reports on itself; the policy against scripts is taken out of the copy only."""
    text = full.read_text()
    bare = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    assert bare != text
    target = folder / "probed.html"
    target.write_text(bare.replace("</body>", PROBE + "</body>"))
    return target


@needs_browser
def test_a_browser_draws_it_without_a_word(full: Path, tmp_path: Path) -> None:
    console, shot = browse(full, tmp_path)
    assert console == ""
    image = pytest.importorskip("PIL.Image").open(shot).convert("RGB")
    colours = {colour for _, colour in image.getcolors(1 << 24)}
    assert (0x1F, 0x5F, 0xA8) in colours  # the figures' blue
    assert image.getpixel((2, 2)) == (255, 255, 255)


@needs_browser
def test_a_blocked_fetch_would_be_noticed(full: Path, tmp_path: Path) -> None:
    """The control: the same check does see an error, and the page's policy does stop a fetch."""
    spoilt = tmp_path / "spoilt.html"
    spoilt.write_text(full.read_text().replace("</main>", '<img src="http://localhost:9/x.png" alt=""></main>'))
    console, _ = browse(spoilt, tmp_path)
    assert "Content Security Policy" in console


@needs_browser
@pytest.mark.parametrize("width", [390, 1280])
def test_figures_fit_a_phone_and_a_desk(full: Path, tmp_path: Path, width: int) -> None:
    inner = probed(full, tmp_path)
    frame = tmp_path / "frame.html"  # windows do not get as narrow as a phone, frames do
    frame.write_text(f'<body style="margin:0"><iframe src="{inner.name}" style="width:{width}px;height:4000px;border:0"></iframe></body>')
    console, _ = browse(frame, tmp_path)
    found = json.loads(console.split("PROBE")[1].split("END")[0].replace('\\"', '"'))
    assert found["width"] == width and found["scroll"] <= width
    assert found["figures"] == 11
    assert found["images"] >= 16 and found["broken"] == 0


@needs_browser
def test_dark(full: Path, tmp_path: Path) -> None:
    console, _ = browse(probed(full, tmp_path), tmp_path, "--force-dark-mode")
    assert '"background":"rgb(20, 23, 26)"' in console.replace('\\"', '"')


def test_a_share_of_none_is_not_certain() -> None:
    """A bootstrap of a hundred zeros is [0, 0]; Wilson's interval says how much a hundred items can say."""
    mean = sys.modules["offramp.measure.report"]._mean
    nothing = mean(torch.zeros(100))
    assert nothing.value == nothing.low == 0 and nothing.high == pytest.approx(0.037, abs=0.001)
    some = mean(torch.tensor([0.25, 0.5, 0.75] * 30))
    assert some.value == pytest.approx(0.5) and some.low < 0.5 < some.high
