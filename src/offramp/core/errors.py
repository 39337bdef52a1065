"""Errors and warnings that offramp raises.

::

    OfframpError
    |-- NotCuttable           the model cannot be split at the requested place
    |-- UnsupportedModel      a language model cannot be decoded block by block
    |-- InvalidInput          an argument, file or batch is not what was expected
    |   `-- ArtifactError     a saved file is truncated, altered or foreign
    |-- FingerprintMismatch   an artifact belongs to another model
    |-- BudgetInfeasible      no setting meets the target; carries the best achievable value
    |-- NotReplayable         replay would not equal running; the reason is given
    |-- MissingExtra          an optional dependency is not installed (also an ImportError)
    `-- ExportError           the adaptive model could not be exported

    OfframpWarning (UserWarning)
    |-- NoEffectWarning       the plan never leaves early
    `-- NoSavingWarning       the plan leaves early but is not faster on this machine
"""

from __future__ import annotations

from collections.abc import Sequence


class OfframpError(Exception):
    """Base of every error that offramp raises on purpose."""


class InvalidInput(OfframpError, ValueError):
    """An argument, a file or a batch is not what was expected."""


class ArtifactError(InvalidInput):
    """A saved artifact is truncated, altered, of a foreign format or of a newer version."""


class FingerprintMismatch(OfframpError):
    """An artifact was made for a model with other weights or another structure."""


class NotReplayable(OfframpError):
    """Replaying this trace would not equal running the model."""


class ExportError(OfframpError):
    """The adaptive model could not be exported."""


class NotCuttable(OfframpError):
    """The model cannot be split at the requested place.

    Attributes:
        path: the module path that was asked for, or ``None`` when the whole model is at fault.
        reason: one of ``missing``, ``unreached``, ``repeated``, ``export``, ``batch``, ``live``, ``output``, ``mismatch``.
        suggestions: nearest module paths, best first.
    """

    def __init__(self, message: str, *, reason: str, path: str | None = None, suggestions: Sequence[str] = ()) -> None:
        if suggestions:
            message = f"{message} Nearest module paths: {', '.join(suggestions)}."
        super().__init__(message)
        self.path = path
        self.reason = reason
        self.suggestions = tuple(suggestions)


class UnsupportedModel(OfframpError):
    """A model whose blocks or tokens cannot be run by themselves: the message says what it lacks."""


class BudgetInfeasible(OfframpError):
    """No setting meets the target.

    Attributes:
        requested: the value that was asked for.
        best: the best value that can be reached with these exits and this rule, in the same unit.
        unit: the unit of both.
    """

    def __init__(self, message: str, *, requested: float, best: float, unit: str) -> None:
        super().__init__(message)
        self.requested = requested
        self.best = best
        self.unit = unit


class MissingExtra(OfframpError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package '{package}'. Install it with: pip install 'offramp[{extra}]'")
        self.package = package
        self.extra = extra


class OfframpWarning(UserWarning):
    """Base of offramp's warnings."""


class NoEffectWarning(OfframpWarning):
    """The plan never leaves early, so it changes nothing."""


class NoSavingWarning(OfframpWarning):
    """The plan leaves early but is not faster than the full model on this machine."""
