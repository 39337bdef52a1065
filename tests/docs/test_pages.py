"""Code blocks in README and the documentation run; figures come from committed results; links point somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
MARK = "<!-- not run -->"


def blocks(page: Path) -> list[str]:
    """Python blocks of a page in order. One that follows the mark is shown and not run."""
    text = page.read_text()
    return [m.group(1) for m in BLOCK.finditer(text) if not text[: m.start()].rstrip().endswith(MARK)]


WITH_CODE = [p for p in PAGES if blocks(p)]


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda p: str(p.relative_to(ROOT)))
def test_code_blocks_run(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The blocks of one page run one after the other, in one namespace that begins with what a reader has: a model and data."""
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(256, 3, 8, 8, generator=generator)
    labels = images.mean((2, 3)).argmax(1)
    data = torch.utils.data.TensorDataset(images, labels)

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = torch.nn.Conv2d(3, 16, 3, 2, 1)
            self.blocks = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Conv2d(16, 16, 3, 1, 1), torch.nn.ReLU()) for _ in range(12))
            self.head = torch.nn.Linear(16, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            for block in self.blocks:
                x = x + block(x)
            return self.head(x.mean((2, 3)))

    torch.manual_seed(0)
    namespace = {
        "model": Net(),
        "images": images[:8],
        "texts": None,
        "train_loader": torch.utils.data.DataLoader(data, 64, shuffle=True),
        "calibration_loader": torch.utils.data.DataLoader(data, 64),
        "__name__": "docs",
    }
    with warnings.catch_warnings():
        # Tiny networks on a busy machine may well not be faster; the warning that says so is not an error of the page.
        warnings.simplefilter("ignore")
        for number, code in enumerate(blocks(page), 1):
            exec(compile(code, f"{page.name}, block {number}", "exec"), namespace)


def test_the_ten_line_start_has_ten_lines() -> None:
    first = blocks(ROOT / "README.md")[0]
    assert len([line for line in first.splitlines() if line.strip()]) <= 10


def test_rendered_blocks_are_up_to_date() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "docs" / "render.py"), "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_inside_the_project_point_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_measured_figure_is_typed(page: Path) -> None:
    """Speed-ups and accuracies in prose age unnoticed. Between render marks they come from a result; elsewhere there are none."""
    prose = re.sub(r"<!-- render: .*? -->.*?<!-- end -->", "", page.read_text(), flags=re.DOTALL)
    prose = re.sub(r"^```.*?^```", "", prose, flags=re.MULTILINE | re.DOTALL)
    typed = re.findall(r"\b\d+(?:\.\d+)?\s?(?:(?:x|×)\s(?:faster|speed)|ms\b|% (?:accura|faster|less|fewer))", prose)
    assert not typed, f"{page.name} types figures: {typed}"
