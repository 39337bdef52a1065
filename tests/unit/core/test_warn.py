"""Warnings point at the line of whoever called the library."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
import torch
from torch import nn

import offramp
from offramp.core.errors import NoEffectWarning, OfframpWarning
from offramp.core.warn import warn

SOURCE = Path(offramp.__file__).parent


def function_of(package: str, code: str, **known: Any) -> Any:
    """``call`` as code of a module of some package."""
    compiled: CodeType = compile(code, f"{package}.py", "exec")
    namespace: dict[str, Any] = {"__name__": package, **known}
    exec(compiled, namespace)
    return namespace["call"]


def located(call: Any, *arguments: Any) -> warnings.WarningMessage:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call(*arguments)
    (found,) = caught
    return found


def test_the_nearest_line_that_is_a_users() -> None:
    inner = function_of("offramp.engines.deep", "def call(): warn('beware')", warn=warn)
    between = function_of("torch.nn.modules.module", "def call(): inner()", inner=inner)
    outer = function_of("offramp.verbs", "def call(): between()", between=between)
    found = located(outer)
    assert found.filename == __file__ and found.category is OfframpWarning and str(found.message) == "beware"
    theirs = function_of("torch_users.net", "def call(): outer()", outer=outer)
    assert located(theirs).filename == "torch_users.net.py", "a package whose name only begins so is a user's"
    assert located(warn, "beware").filename == __file__, "a user who calls it himself"


def test_the_verbs_point_at_the_users_line() -> None:
    net = offramp.attach(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)), at=["1"], example=torch.randn(2, 4))
    trace = offramp.record(net, [(torch.randn(40, 4), torch.arange(40) % 3)], progress=False)
    never = offramp.network.never(net, offramp.Confidence())
    with pytest.warns(NoEffectWarning) as found:
        offramp.compile(net, never)
        offramp.calibrate(trace, offramp.Confidence(), offramp.Risk(max_disagreement=1e-4))
    assert [w.filename for w in found] == [__file__] * 2 and found[0].lineno + 1 == found[1].lineno


def test_no_other_module_counts_frames() -> None:
    """A number of frames is right for one way of calling and wrong for the next."""
    direct = [p for p in SOURCE.rglob("*.py") if re.search(r"\bwarnings\.warn\(", p.read_text())]
    assert direct == [SOURCE / "core" / "warn.py"]
