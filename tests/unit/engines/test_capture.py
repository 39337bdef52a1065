"""What the compiler is asked for, piece by piece, and how the host's waits are counted."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch
import torch._inductor

from offramp.engines.capture import Mailbox, Recorder, Tuning

CPU = torch.device("cpu")


def test_every_tuning_is_an_option_that_the_compiler_knows() -> None:
    everything = Tuning(**dict.fromkeys(asdict(Tuning()), True)).options()
    assert len(everything) == len(set(asdict(Tuning())) - {"joined_projections", "shared_blocks"})  # which are the decoder's affair
    assert set(everything) <= set(torch._inductor.list_options())


def test_tuning_reaches_the_pieces_and_no_global_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(torch, "compile", lambda function, **given: (asked.append(given), function)[1])
    before = torch._inductor.config.coordinate_descent_tuning
    for compiled in (Tuning(coordinate_descent=True), True, Tuning(), False):
        Recorder(CPU, compiled).wrap(lambda: None)
    assert [a["options"] for a in asked] == [{"coordinate_descent_tuning": True}, None, None]  # and False compiles nothing
    assert all(a["dynamic"] is False for a in asked)
    assert torch._inductor.config.coordinate_descent_tuning == before


def test_a_mailbox_counts_how_often_the_host_has_waited() -> None:
    box = Mailbox(2, CPU)
    box.post(torch.tensor([3, 0]))
    box.wait()
    box.at_least(2)
    assert box.waits == 2
