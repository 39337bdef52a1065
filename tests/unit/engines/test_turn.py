"""Turns: threads wait for each other, nobody waits for himself, and whatever happens within gives the turn back."""

from __future__ import annotations

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from offramp.core.errors import InvalidInput
from offramp.engines import turn as turns
from offramp.engines.turn import Turn


def test_one_at_a_time() -> None:
    turn, within, most = Turn("It", "wait"), 0, 0

    def use(_: int) -> None:
        nonlocal within, most
        with turn:
            within += 1
            most = max(most, within)
            threading.Event().wait(0.002)
            within -= 1

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(use, range(12)))
    assert most == 1 and within == 0


def test_within_it_cannot_be_entered_again() -> None:
    turn = Turn("The oven", "wait")
    with turn, pytest.raises(InvalidInput, match="The oven is at work already"), turn:
        raise AssertionError("not reached")
    with turn:  # the refusal took nothing
        pass


def test_an_error_gives_it_back() -> None:
    turn = Turn("It", "wait")
    for kind in (ValueError, KeyboardInterrupt):
        with pytest.raises(kind), turn:
            raise kind
    with turn:
        pass


def test_threads_that_would_wait_for_each_other() -> None:
    """The last to come is told; the others go on when it has left."""
    first, second = Turn("The first", "wait"), Turn("The second", "wait")
    holds, waits = threading.Event(), threading.Event()

    def other() -> str:
        with second:
            holds.set()
            assert waits.wait(10)
            with first:
                return "had both"

    with ThreadPoolExecutor(1) as pool:
        with first:
            running = pool.submit(other)
            assert holds.wait(10)
            waits.set()
            while not _waiting_for(first):
                threading.Event().wait(0.001)
            with pytest.raises(InvalidInput, match="The second"), second:
                raise AssertionError("not reached")
        assert running.result(10) == "had both"


def _waiting_for(turn: Turn) -> bool:
    with turns._CHANGED:
        return turn in turns._WAITING.values()


def test_copies_are_free() -> None:
    turn = Turn("It", "wait")
    with turn:
        for made in (copy.deepcopy(turn), pickle.loads(pickle.dumps(turn))):
            with made:
                assert made.what == "It"
