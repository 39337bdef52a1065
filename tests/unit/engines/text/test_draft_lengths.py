"""Which draft length the next round has: the best at the acceptance seen so far, none where drafts do not pay, and another try later."""

from __future__ import annotations

import math
import random

import pytest

from offramp.core.errors import InvalidInput
from offramp.engines.text.draft_lengths import LengthChoice

TIMES = {0: 1.0, 1: 1.25, 2: 1.5, 4: 2.0, 6: 2.5}


@pytest.mark.parametrize("acceptance", [0.0, 0.2, 0.5, 0.8, 0.95, 1.0])
def test_the_best_is_that_of_all(acceptance):
    known = LengthChoice.of(TIMES, acceptance)
    rates = {k: sum(acceptance**j for j in range(k + 1)) / t for k, t in TIMES.items()}
    assert known.start().length == known.best(acceptance) == max(rates, key=lambda k: (rates[k], -k))
    assert known.best(0.0) == 0 and known.best(1.0) == 6


@pytest.mark.parametrize("memory", [64.0, math.inf])
def test_it_finds_out(memory):
    """Started with the wrong idea, it drafts long where drafts are kept, and not at all where none is."""
    coin = random.Random(0)
    for chance, expected in ((0.95, 6), (0.05, 0)):
        chooser = LengthChoice(tuple(TIMES), tuple(TIMES.values()), 1 - chance, memory=memory).start()
        judged = kept = 0
        lengths = []
        for _ in range(300):
            length = chooser.length
            good = next((k for k in range(length) if coin.random() >= chance), length)
            judged, kept = judged + min(length, good + 1), kept + good
            lengths.append(chooser.saw(judged, kept))
        assert lengths[200:].count(expected) > 80
        assert chooser.acceptance == pytest.approx(chance, abs=0.2)


def test_where_nothing_is_drafted_it_is_tried_again():
    chooser = LengthChoice((0, 2), (1.0, 2.0), 0.0, patience=5).start()
    assert [chooser.saw(0, 0) for _ in range(13)] == [0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 2, 0]
    assert LengthChoice((0,), (1.0,), 0.0, patience=1).start().saw(0, 0) == 0


def test_texts_that_change_are_followed():
    chooser = LengthChoice.of(TIMES, 0.9).start()
    judged = kept = 0
    for _ in range(60):
        judged, kept = judged + chooser.length, kept + chooser.length
        chooser.saw(judged, kept)
    assert chooser.length == 6
    rounds = 0
    while chooser.length:
        judged += 1  # the first draft of every round is rejected
        chooser.saw(judged, kept)
        rounds += 1
    assert rounds < 700 and chooser.acceptance < 0.3


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (((), ()), "ascending"),
        (((1, 0), (1.0, 1.0)), "ascending"),
        (((0, 1), (1.0,)), "a time"),
        (((0, 1), (1.0, 0.0)), "a time"),
        (((0,), (1.0,), 1.5), "acceptance"),
        (((0,), (1.0,), 0.5, 0.0), "weight"),
        (((0,), (1.0,), 0.5, 1.0, 0.0), "memory"),
        (((0,), (1.0,), 0.5, 1.0, 1.0, 0), "patience"),
    ],
)
def test_what_makes_no_sense_is_refused(given, words):
    with pytest.raises(InvalidInput, match=words):
        LengthChoice(*given)
