"""What every test needs: torchvision's operator schemas before anything imports timm or transformers, few threads, the shared data."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)

# On a CPU-only torch the registry's torchvision does not load its compiled operators; timm and transformers import it and need
# the schemas only. Where the operators are there, defining them again fails, and that is fine.
with contextlib.suppress(RuntimeError):
    _LIBRARY = torch.library.Library("torchvision", "DEF")
    _LIBRARY.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _LIBRARY.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with the real data sets: ``OFFRAMP_DATA``, or ``../shared/data`` beside the repository."""
    given = os.environ.get("OFFRAMP_DATA")
    folder = Path(given) if given else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"the data sets are not at {folder}; set OFFRAMP_DATA to the folder that holds them")
    return folder


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
