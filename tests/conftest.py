"""What every test needs: a torchvision that can be imported, before anything imports timm or transformers, few threads, the shared data."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

torch.set_num_threads(1)

_SPEC = importlib.util.spec_from_file_location(
    "torchvision_operators", Path(__file__).resolve().parents[1] / "benchmarks" / "torchvision_operators.py"
)
assert _SPEC is not None and _SPEC.loader is not None
_OPERATORS = sys.modules["torchvision_operators"] = importlib.util.module_from_spec(_SPEC)  # benchmarks import it by this name
_SPEC.loader.exec_module(_OPERATORS)
_OPERATORS.provide()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with the real data sets: ``OFFRAMP_DATA``, or ``../shared/data`` beside the repository."""
    given = os.environ.get("OFFRAMP_DATA")
    folder = Path(given) if given else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"the data sets are not at {folder}; set OFFRAMP_DATA to the folder that holds them")
    return folder


@pytest.fixture
def render() -> ModuleType:
    """The script that fills the pages, as a module of the test's own."""
    spec = importlib.util.spec_from_file_location("docs_render", Path(__file__).resolve().parents[1] / "docs" / "render.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
