"""Errors are what callers may catch, and carry what their docstrings say."""

from __future__ import annotations

import pytest

from offramp.core import errors
from offramp.core.errors import ArtifactError, BudgetInfeasible, InvalidInput, MissingExtra, NotCuttable, OfframpError, OfframpWarning


def test_hierarchy():
    classes = [c for c in vars(errors).values() if isinstance(c, type) and c.__module__ == errors.__name__]
    for c in classes:
        assert issubclass(c, OfframpWarning if issubclass(c, Warning) else OfframpError)
        assert c.__doc__ and c.__name__ in (errors.__doc__ or "")
    assert issubclass(InvalidInput, ValueError) and issubclass(ArtifactError, InvalidInput) and issubclass(MissingExtra, ImportError)
    assert issubclass(OfframpWarning, UserWarning)


def test_what_they_carry():
    cuttable = NotCuttable("No.", reason="missing", path="a.b", suggestions=["a.c", "a.d"])
    assert (cuttable.path, cuttable.reason, cuttable.suggestions) == ("a.b", "missing", ("a.c", "a.d"))
    assert str(cuttable) == "No. Nearest module paths: a.c, a.d." and str(NotCuttable("No.", reason="export")) == "No."
    budget = BudgetInfeasible("No.", requested=0.1, best=0.3, unit="ms")
    assert (budget.requested, budget.best, budget.unit) == (0.1, 0.3, "ms")
    with pytest.raises(ImportError, match=r"pip install 'offramp\[hf\]'") as found:
        raise MissingExtra("transformers", "hf", "Reading texts")
    assert isinstance(found.value, MissingExtra) and (found.value.package, found.value.extra) == ("transformers", "hf")
