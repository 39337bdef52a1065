"""One generator in several hands: threads wait for each other, nobody writes into his own text, a copy is on its own."""

from __future__ import annotations

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from language_models import build, prompts, word_tokenizer
from offramp.core.errors import InvalidInput
from offramp.engines.text.generate import generate
from offramp.engines.text.generator import TextGenerator
from offramp.engines.text.rounds import Rounds
from offramp.language import LanguageModel, attach_lm
from offramp.policies.decoding import Plain, Verify

NEW = 25


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return attach_lm(build("llama"), [2])


class Streamer:
    """Calls something when tokens come, and lets other threads run."""

    def __init__(self, call: Any = None, at: int = 3) -> None:
        self.call, self.at, self.heard, self.ended = call, at, 0, False

    def put(self, value: torch.Tensor) -> None:
        self.heard += 1
        threading.Event().wait(0.001)
        if self.call is not None and self.heard == self.at:
            self.call()

    def end(self) -> None:
        self.ended = True


@pytest.fixture(params=["generator", "rounds"])
def write(lm: LanguageModel, request: Any) -> Any:
    if request.param == "rounds":
        rounds = Rounds(lm, 1, slots=60, draft_length=2)
        return lambda prompt, streamer=None, stops=None: rounds.generate([prompt], NEW, streamer=streamer, stops=stops).tokens[0]
    run = TextGenerator(lm, Verify(2), captured=True, tokenizer=word_tokenizer())
    return lambda prompt, streamer=None: run.generate([prompt], max_new_tokens=NEW, streamer=streamer).tokens[0]


def test_threads_wait_for_each_other(lm: LanguageModel, write: Any) -> None:
    given = prompts((5, 1, 9))
    expected = [generate(lm, [p], Plain(), max_new_tokens=NEW).tokens[0] for p in given]
    write(given[0])
    together = threading.Barrier(3)

    def one(k: int) -> list[int]:
        together.wait(10)
        found: list[int] = write(given[k], streamer=Streamer())
        return found

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(one, range(3))) == expected


def test_called_from_within_it_says_so_and_goes_on(lm: LanguageModel, write: Any) -> None:
    first, other = prompts((5, 9))
    expected = generate(lm, [first], Plain(), max_new_tokens=NEW).tokens[0]
    refused = []

    def again() -> None:
        with pytest.raises(InvalidInput, match=r"another generator|other Rounds") as error:
            write(other)
        refused.append(error)

    assert write(first, streamer=Streamer(again)) == expected and refused
    with pytest.raises(InvalidInput, match="at work already"):
        write(first, streamer=Streamer(lambda: write(other)))
    assert write(first) == expected, "an error gives it back"


def test_a_stop_criterion_that_writes(lm: LanguageModel) -> None:
    rounds = Rounds(lm, 1, slots=60, draft_length=2)
    with pytest.raises(InvalidInput, match="at work already"):
        rounds.generate(prompts((5,)), NEW, stops=lambda tokens: bool(rounds.generate(prompts((3,)), 2)))


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_an_error_lets_the_next_thread_in(lm: LanguageModel, write: Any, kind: type[BaseException]) -> None:
    given = prompts((5,))[0]

    def fail() -> None:
        raise kind

    with pytest.raises(kind):
        write(given, streamer=Streamer(fail))
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(write, given).result(60) == generate(lm, [given], Plain(), max_new_tokens=NEW).tokens[0]


def test_two_generators_one_in_the_other(lm: LanguageModel) -> None:
    outer, inner = (TextGenerator(lm, Verify(2), captured=True) for _ in range(2))
    first, other = prompts((5, 9))
    found: list[list[int]] = []
    write = lambda run, p, **o: run.generate([p], max_new_tokens=NEW, **o).tokens[0]  # noqa: E731
    streamer = Streamer(lambda: found.append(write(inner, other)))
    assert write(outer, first, streamer=streamer) == generate(lm, [first], Plain(), max_new_tokens=NEW).tokens[0]
    assert found == generate(lm, [other], Plain(), max_new_tokens=NEW).tokens


def test_the_reference_may_be_called_from_within(lm: LanguageModel) -> None:
    run = TextGenerator(lm, Verify(2), captured=False)
    first, other = prompts((5, 9))
    found = []
    streamer = Streamer(lambda: found.extend(run.generate([other], max_new_tokens=NEW).tokens))
    assert run.generate([first], max_new_tokens=NEW, streamer=streamer).tokens == generate(lm, [first], max_new_tokens=NEW).tokens
    assert found == generate(lm, [other], max_new_tokens=NEW).tokens


# ---- copies ------------------------------------------------------------------------------------------------------------------


def test_a_copy_writes_by_itself_and_follows_its_own_model(lm: LanguageModel) -> None:
    run = TextGenerator(lm, Verify(2), captured=True)
    given = prompts((5,))
    expected = run.generate(given, max_new_tokens=NEW).tokens
    made = copy.deepcopy(run)
    assert made.lm.model is not lm.model and made.kept.all[0].rounds.lm is made.lm
    within: list[Any] = []
    streamer = Streamer(lambda: within.extend(made.generate(given, max_new_tokens=NEW).tokens))
    assert run.generate(given, max_new_tokens=NEW, streamer=streamer).tokens == expected == within
    with torch.no_grad():
        made.lm.model.lm_head.weight.neg_()
    assert made.generate(given, max_new_tokens=NEW).tokens == generate(made.lm, given, max_new_tokens=NEW).tokens != expected
    assert run.generate(given, max_new_tokens=NEW).tokens == expected


def test_pickled() -> None:
    """Models whose exits hold no functions made on the way, such as those without exits."""
    bare = LanguageModel(attach_lm(build("llama"), [2]).decoder, (), ())
    given = prompts((5,))
    for captured in (False, True):
        run = TextGenerator(bare, Plain(), captured=captured)
        expected = run.generate(given, max_new_tokens=9).tokens
        made = pickle.loads(pickle.dumps(run))
        assert made.generate(given, max_new_tokens=9).tokens == expected and made.captures == int(captured)


# ---- what it says ------------------------------------------------------------------------------------------------------------


def test_tokens_for_each_pass_of_a_batch_in_parts(lm: LanguageModel) -> None:
    """Two parts of three rows and one of one, each with its own number of passes."""
    given, ends = prompts((5, 1, 9, 3, 7, 2, 4)), 11
    for way in (Plain(), Verify(3)):
        run = TextGenerator(lm, way, captured=True, max_rows=3)
        found = run.generate(given, max_new_tokens=20, eos_token_id=ends)
        parts = [run.generate(given[k : k + 3], max_new_tokens=20, eos_token_id=ends) for k in (0, 3, 6)]
        passes = sum(p.deep_passes * len(p.tokens) for p in parts)
        assert found.tokens_per_pass == pytest.approx(sum(map(len, found.tokens)) / passes)
        assert found.deep_passes == sum(p.deep_passes for p in parts) and found.row_passes == passes
    whole = TextGenerator(lm, Plain(), captured=True).generate(given, max_new_tokens=20)
    split = TextGenerator(lm, Plain(), captured=True, max_rows=2).generate(given, max_new_tokens=20)
    assert whole.row_passes is None and split.tokens_per_pass == whole.tokens_per_pass == pytest.approx(20 / 19)


def test_repr(lm: LanguageModel) -> None:
    found = repr(TextGenerator(lm, Verify(2), captured=True))
    assert found.startswith("<TextGenerator of LlamaForCausalLM with exits after [2] on cpu: Verify(draft_length=2") and "captured" in found
    assert "the reference engine" in repr(TextGenerator(lm, Plain(), captured=False))
