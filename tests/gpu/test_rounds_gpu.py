"""Captured rounds on CUDA: rules that stop drafting, lengths that are chosen, stop strings and streams, against the reference."""

from __future__ import annotations

import pytest
import torch

from language_models import build, prompts, word_tokenizer
from offramp.engines.text.arguments import StopStrings
from offramp.engines.text.draft_lengths import LengthChoice
from offramp.engines.text.generate import generate
from offramp.engines.text.generator import TextGenerator, text_generator
from offramp.engines.text.rounds import Rounds
from offramp.engines.text.sampling import Sampling
from offramp.exits.cached import Adapter
from offramp.language import LanguageModel, attach_lm
from offramp.policies.decoding import Plain, Verify
from offramp.policies.draft_stop import BelowProbability, BetaThompson, CalibratedThompson, DraftStop, MarginalValue

DEVICE = torch.device("cuda")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
GIVEN = prompts((5, 1, 17))


@pytest.fixture(autouse=True)
def _exact():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before
    torch._dynamo.reset()


def language_model(head: object = None) -> LanguageModel:
    """One whose exit is often right."""
    model = build("llama").to(DEVICE)
    with torch.no_grad():
        for block in model.model.layers[2:]:
            block.self_attn.o_proj.weight.mul_(0.3)
            block.mlp.down_proj.weight.mul_(0.3)
    return attach_lm(model, [2], head)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "temperature": 0.7, "top_k": 20}], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    "stop", [BelowProbability(0.1), BetaThompson(2.0, 1.0), CalibratedThompson(), MarginalValue(0.2, 3.0)], ids=lambda s: type(s).__name__
)
def test_rules_stop_on_the_device_as_in_the_reference(stop: DraftStop, sampling: dict, compiled: bool) -> None:
    lm = language_model()
    run = Rounds(lm, 3, 60, 3, sampling=Sampling(**sampling), stop=stop, compiled=compiled)
    expected = generate(lm, GIVEN, Verify(3, stop), max_new_tokens=30, **sampling)
    for _ in range(2):
        found = run.generate(GIVEN, 30)
        assert (found.tokens, found.depth) == (expected.tokens, expected.depth)
        assert (found.drafted, found.accepted, found.deep_passes) == (expected.drafted, expected.accepted, expected.deep_passes)


@pytest.mark.parametrize("head", [None, Adapter()], ids=["shared", "adapter"])
def test_lengths_share_one_state(head: object) -> None:
    lm = language_model(head)
    run = Rounds(lm, 3, 120, (0, 1, 3, 5))
    expected = generate(lm, GIVEN, Plain(), max_new_tokens=90).tokens
    for start in (0.02, 0.98):
        known = LengthChoice((0, 1, 3, 5), (1.0, 1.2, 1.5, 1.9), start, weight=4.0, patience=3)
        found = run.generate(GIVEN, 90, choice=known)
        assert found.tokens == expected and found.drafted[0] > found.drafted[4]


def test_lengths_that_are_chosen_are_the_same_each_time() -> None:
    """Whether or not the round in flight has arrived when the host looks."""
    run = Rounds(language_model(), 1, 160, (1, 3))
    known = LengthChoice((1, 3), (1.0, 1.3), 0.5)
    counts = {tuple(run.generate(GIVEN[:1], 140, choice=known).drafted) for _ in range(10)}
    assert len(counts) == 1


@pytest.mark.parametrize("draft_length", [0, 4])
def test_stop_strings_and_streams(draft_length: int) -> None:
    lm, tokenizer = language_model(), word_tokenizer()
    mode = Verify(draft_length) if draft_length else Plain()
    plain = generate(lm, GIVEN, Plain(), max_new_tokens=40)
    stops = [tokenizer.decode([plain.tokens[0][9]]).strip(), tokenizer.decode([plain.tokens[1][4]]).strip()]
    expected = generate(lm, GIVEN, mode, max_new_tokens=40, tokenizer=tokenizer, stop_strings=stops)
    run = Rounds(lm, 3, 60, draft_length)
    for _ in range(5):
        found = run.generate(GIVEN, 40, stops=StopStrings(tokenizer, stops))
        assert (found.tokens, found.depth) == (expected.tokens, expected.depth)

    class Heard(list):
        def put(self, value: torch.Tensor) -> None:
            self.append(value.flatten().tolist())

        def end(self) -> None:
            self.append([])

    heard = Heard()
    Rounds(lm, 1, 60, draft_length).generate(GIVEN[:1], 40, streamer=heard)
    assert heard[0] == GIVEN[0] and [t for part in heard[1:] for t in part] == plain.tokens[0] and len(heard) > 5


def test_the_generator_uses_rounds_here() -> None:
    lm = language_model()
    run = TextGenerator(lm, Verify(3))
    assert run.captured and run.generate(GIVEN, max_new_tokens=20).tokens == generate(lm, GIVEN, Plain(), max_new_tokens=20).tokens
    assert run.captures == 1


def test_planned_by_times_of_captured_rounds() -> None:
    lm = language_model()
    wrote = generate(lm, GIVEN, Plain(), max_new_tokens=60)
    texts = [p + t for p, t in zip(GIVEN, wrote.tokens, strict=True)]
    run = text_generator(lm, texts=texts, starts=[len(p) for p in GIVEN])
    assert run.plan is not None and str(run.plan.times.device).startswith("cuda")
    for rows in (1, 3):
        assert run.generate(GIVEN[:rows], max_new_tokens=60).tokens == wrote.tokens[:rows]
