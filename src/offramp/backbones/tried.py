"""A language model that is run block by block is tried before it is used: on a short text it must give the logits of its own forward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from offramp.core.errors import UnsupportedModel


@contextlib.contextmanager
def trying(fails: str) -> Iterator[None]:
    """Run what a model may not be made for.

    Args:
        fails: what an error within says of the model.

    Raises:
        UnsupportedModel: there was one, memory that ran out apart; says which.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
        reason = str(error).splitlines()[0] if str(error) else "no reason given"
        raise UnsupportedModel(f"{fails}: {type(error).__name__}: {reason}") from error


def check_logits(model: nn.Module, found: Tensor, expected: Tensor, tolerance: float, otherwise: str, advice: str = "") -> None:
    """Refuse a model whose logits are not those of its blocks.

    Args:
        model: the user's.
        found: logits ``[B, T, V]``, block by block.
        expected: those of its own forward.
        tolerance: largest difference allowed, relative to the spread of the logits; 128 times as much below float32.
        otherwise: what it does where they differ.
        advice: what to do then.

    Raises:
        UnsupportedModel: they differ; says how far.
    """
    dtype = next(model.parameters()).dtype
    difference = float((found.float() - expected.float()).abs().max() / expected.float().std().clamp(min=1e-6))
    allowed = tolerance if dtype in (torch.float32, torch.float64) else 128 * tolerance
    if not difference <= allowed:
        raise UnsupportedModel(
            f"{type(model).__name__} {otherwise}: run block by block, its logits differ by {difference:.3g} of their spread (at most "
            f"{allowed:.3g} is rounding). {advice}".rstrip()
        )


__all__ = ["check_logits", "trying"]
