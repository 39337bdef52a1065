"""What the compiler is asked for, piece by piece, and how the host's waits are counted."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
import torch._inductor

from offramp.engines.capture import Arriving, Beside, Mailbox, Outbox, Recorder, Tuning

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


def test_an_outbox_sends_from_its_places_in_turn_and_repeats_the_last() -> None:
    box, to = Outbox(6, CPU, places=4), torch.full((6,), -1)
    for k in range(9):  # more often than there are places
        values = np.arange(k, k + 3)
        box.send(values, to[:5])
        assert to.tolist() == [k, k + 1, k + 2, k + 2, k + 2, -1]
    box.send(np.array([7]), to[:1])
    assert to[0] == 7


def test_what_arrives_is_what_was_there_when_it_was_sent() -> None:
    values = torch.tensor([3, 1], dtype=torch.int8)
    arriving = Arriving(values)
    values.zero_()
    assert arriving.read().tolist() == [3, 1]


def test_what_runs_beside_is_answered_in_any_order() -> None:
    waits = Beside(CPU).start([lambda: 1, lambda: 2])
    assert [waits[1](), waits[0]()] == [2, 1]


def test_whoever_waits_for_what_nobody_posts_is_told() -> None:
    box = Mailbox(2, CPU)
    with pytest.raises(RuntimeError, match="has not answered"):
        box.arrived()
    box.post(torch.tensor([2, 1]))
    assert box.arrived().tolist() == [2, 1]
