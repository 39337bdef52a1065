"""Warnings that point at the line of whoever called the library."""

from __future__ import annotations

import sys
import warnings

from offramp.core.errors import OfframpWarning

_PASSED_OVER = frozenset({"offramp", "torch", "accelerate", "diffusers", "transformers", ""})
"""Packages that are no user's: ours, those through which ours is called (a module's call, a decorator, a pipeline), and code that torch
writes, which has no name."""


def warn(message: str, category: type[OfframpWarning] = OfframpWarning) -> None:
    """Warn at the nearest line on the way here that is in none of these packages, however deep below it the warning arises.

    ``skip_file_prefixes`` of `warnings.warn` does the same from Python 3.12 on.

    Args:
        message: what is the matter and what to do.
        category: of the warning.
    """
    level, frame = 2, sys._getframe(1)
    while frame.f_globals.get("__name__", "").partition(".")[0] in _PASSED_OVER and frame.f_back is not None:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


__all__ = ["warn"]
