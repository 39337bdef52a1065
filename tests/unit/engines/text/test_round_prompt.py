"""Prompts of captured rounds are padded to few widths, and what is written stays what the reference writes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from language_models import build
from offramp.engines.capture import Graph, Recorder
from offramp.engines.text import round_prompt
from offramp.engines.text.generate import generate
from offramp.engines.text.round_prompt import padded, widths
from offramp.engines.text.rounds import Rounds
from offramp.exits.cached import Adapter
from offramp.language import LanguageModel, attach_lm
from offramp.policies.decoding import Plain, Verify

pytest.importorskip("transformers")
NEW = 9


@pytest.fixture(scope="module", params=["llama", "opt"])  # positions by rotation, and by a table that ends
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    return attach_lm(build(request.param), [2])


def prompt(lm: LanguageModel, tokens: int) -> list[int]:
    found: list[int] = torch.randint(0, lm.decoder.vocabulary, (tokens,), generator=torch.Generator().manual_seed(tokens)).tolist()
    return found


def test_widths_are_few_and_never_too_narrow() -> None:
    found = [padded(n) for n in range(1, 3000)]
    assert all(w >= n for n, w in enumerate(found, 1)) and found == sorted(found)
    assert all(w <= 1.5 * n for n, w in enumerate(found, 1) if n > 64)
    assert sorted(set(found))[:8] == [16, 32, 64, 96, 128, 192, 256, 384] and len(set(found)) < 16
    assert all(widths(n) == sorted(set(found[:n])) for n in (1, 16, 17, 65, 96, 97, 2999))


def test_prompts_of_one_width_share_a_graph(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Graph] = []
    once = Recorder.graph

    def noted(self: Recorder, function: Callable[[], object]) -> Graph:
        made.append(once(self, function))
        return made[-1]

    monkeypatch.setattr(Recorder, "graph", noted)
    run = Rounds(lm, 1, slots=100, draft_length=2)
    run.graph()
    made.clear()
    for tokens in (3, 15, 16, 17, 30, 5, 65, 66, 91):
        text = prompt(lm, tokens)
        assert run.generate([text], NEW).tokens == generate(lm, [text], Verify(2), max_new_tokens=NEW).tokens
    assert len(made) == len({padded(n) for n in (3, 17, 65)}) == 3


def test_rows_of_unequal_lengths_after_one_another(lm: LanguageModel) -> None:
    run = Rounds(lm, 3, slots=60)
    for lengths in ((40, 2, 17), (1, 1, 3), (51, 51), (33,)):
        texts = [prompt(lm, n) for n in lengths]
        assert run.generate(texts, NEW).tokens == generate(lm, texts, Plain(), max_new_tokens=NEW).tokens


@pytest.mark.parametrize("slots", [20, 26, 120])
def test_widths_end_at_the_slots(lm: LanguageModel, slots: int) -> None:
    text = prompt(lm, 17)
    run = Rounds(lm, 1, slots=slots)
    new = min(NEW, slots - 17)
    assert run.generate([text], new).tokens == generate(lm, [text], Plain(), max_new_tokens=new).tokens


def test_many_tokens_are_run_as_they_are(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(round_prompt, "MOST", 40)
    widths: list[Any] = []
    run = Rounds(lm, 2, slots=60)
    before = run.state.prefill

    def noted(*given: Any, **named: Any) -> torch.Tensor:
        widths.append(named.get("width"))
        return before(*given, **named)

    monkeypatch.setattr(run.state, "prefill", noted)
    for tokens, width in ((10, 16), (30, None)):
        texts = [prompt(lm, tokens), prompt(lm, 4)]
        widths.clear()
        assert run.generate(texts, NEW).tokens == generate(lm, texts, Plain(), max_new_tokens=NEW).tokens
        assert set(widths) == {width}


def test_a_head_with_a_cache_sees_the_prompt_once() -> None:
    lm = attach_lm(build("llama"), [2], Adapter())
    run = Rounds(lm, 1, slots=60, draft_length=3)
    for tokens in (20, 7):
        text = prompt(lm, tokens)
        found, expected = run.generate([text], 20), generate(lm, [text], Verify(3), max_new_tokens=20)
        assert (found.tokens, found.drafted, found.accepted) == (expected.tokens, expected.drafted, expected.accepted)


def test_the_prompts_time_is_part_of_the_whole(lm: LanguageModel) -> None:
    run = Rounds(lm, 1, slots=60)
    run.graph()
    for write in (lambda: run.generate([prompt(lm, 12)], 20), lambda: generate(lm, [prompt(lm, 12)], Plain(), max_new_tokens=20)):
        begun = time.perf_counter()
        found = write()
        assert 0 < found.prompt_s < time.perf_counter() - begun
