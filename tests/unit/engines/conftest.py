"""Makes `engine_models` importable beside the tests; what most of them take."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from offramp.core.certificate import Plan
from offramp.policies import Confidence

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="module")
def plan() -> Plan:
    """About a third of the rows leave at each exit."""
    from engine_models import plan_of, trace

    return plan_of(trace(), Confidence())


@pytest.fixture(params=[False, True], ids=["host", "graphs"])
def graphs(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture(params=["plain calls", "tapes"])
def plain_and_tapes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test twice: with plain calls for graphs, and with what has the hazards of CUDA's."""
    from tape import Tape

    if request.param == "tapes":
        monkeypatch.setattr("offramp.engines.capture.Graph", Tape)
    yield
    Tape.everything.clear()
