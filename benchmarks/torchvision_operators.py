"""Where torchvision's compiled operators do not load, as beside a PyTorch for CPUs alone, what timm and transformers need to import it.

They need two schemas and none of the operators. The schemas are defined only after torchvision has failed for want of them: operators that
load after their schemas were defined by another end the process.
"""

from __future__ import annotations

import torch

_KEPT: list[torch.library.Library] = []
"""Schemas last as long as the library that defined them."""


def provide() -> None:
    """Make ``import torchvision`` possible, where it is installed."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return
    except RuntimeError as error:
        if "nms" not in str(error):
            raise
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)
