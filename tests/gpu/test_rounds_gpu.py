"""Captured rounds on CUDA against the reference: stop rules, tokens that leave, lengths that are chosen, stop strings and streams."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from language_models import build, prompts, word_tokenizer
from offramp.cli import app
from offramp.engines.capture import Tuning
from offramp.engines.text.arguments import StopStrings
from offramp.engines.text.draft_lengths import LengthChoice
from offramp.engines.text.generate import generate
from offramp.engines.text.generator import TextGenerator, text_generator
from offramp.engines.text.rounds import Rounds
from offramp.engines.text.sampling import Sampling
from offramp.engines.text.written import Generation
from offramp.exits.cached import Adapter
from offramp.language import LanguageModel, attach_lm
from offramp.policies import Entropy, Margin
from offramp.policies.decoding import Accept, CatchUp, Decaying, Plain, Recompute, Verify, Way
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


# ---- tokens that leave -------------------------------------------------------------------------------------------------------


def same(found: Generation, expected: Generation) -> None:
    assert (found.tokens, found.depth) == (expected.tokens, expected.depth)
    assert (found.audited, found.disagreed) == (expected.audited, expected.disagreed)
    for name in ("row", "place", "exit_index", "agreed", "left"):
        assert torch.equal(getattr(found.audit, name), getattr(expected.audit, name)), name
    torch.testing.assert_close(found.audit.score, expected.audit.score, rtol=1e-4, atol=1e-5)
    for row, wanted in zip(found.scores, expected.scores, strict=True):
        assert row == pytest.approx(wanted, rel=1e-4, abs=1e-5, nan_ok=True)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "temperature": 0.7, "top_k": 20}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("head", [None, Adapter()], ids=["shared", "adapter"])
def test_tokens_leave_on_the_device_as_in_the_reference(head: object, sampling: dict, compiled: bool) -> None:
    """Rows of every length, used memory, a batch with a row less, and several caps."""
    lm = language_model(head)
    for cap in (1, 4):
        mode = Accept(0.05, fill=CatchUp(cap))
        run = Rounds(lm, 3, 60, sampling=Sampling(**sampling), compiled=compiled, way=mode)
        for given in (GIVEN, GIVEN[:2], GIVEN):
            expected = generate(lm, given, mode, max_new_tokens=30, **sampling)
            same(run.generate(given, 30), expected)
            assert head is not None or 0 < expected.audited < len(expected.audit), "all left or none, so that was not tested"


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "mode",
    [Accept(0.0), Accept((0.006,), Margin(), CatchUp(3)), Accept(-4.26, Entropy()), Accept(Decaying(0.055, 30.0), fill=CatchUp(5))],
    ids=["all", "margin", "entropy", "decaying"],
)
def test_rules_and_thresholds_on_the_device(mode: Accept, compiled: bool) -> None:
    lm = language_model()
    run = Rounds(lm, 3, 60, compiled=compiled, eos_token_id=[5, 7, 11, 40], way=mode)
    same(run.generate(GIVEN, 30), generate(lm, GIVEN, mode, max_new_tokens=30, eos_token_id=[5, 7, 11, 40]))


def test_one_row_makes_the_passes_that_the_reference_makes() -> None:
    lm, mode = language_model(), Accept(0.05, fill=CatchUp(4))
    expected, found = generate(lm, GIVEN[:1], mode, max_new_tokens=40), Rounds(lm, 1, 60, way=mode).generate(GIVEN[:1], 40)
    same(found, expected)
    assert found.deep_passes == expected.deep_passes < 39


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "temperature": 0.7, "top_k": 20}], ids=["greedy", "sampled"])
def test_where_tokens_leave_the_text_stays_whatever_length_is_chosen(sampling: dict) -> None:
    lm, mode = language_model(), Accept(0.05, fill=CatchUp(6))
    run = Rounds(lm, 3, 120, (0, 1, 3, 5), sampling=Sampling(**sampling), way=mode)
    expected = generate(lm, GIVEN, mode, max_new_tokens=90, **sampling)
    for start in (0.02, 0.98):
        same(run.generate(GIVEN, 90, choice=LengthChoice((0, 1, 3, 5), (1.0, 1.3, 1.9, 2.5), start, weight=4.0, patience=3)), expected)


def test_tokens_leave_in_bfloat16_and_with_joined_projections() -> None:
    """Rounding may part the texts; what is counted has to add up all the same."""
    lm = attach_lm(language_model().model.to(torch.bfloat16), [2])
    run = Rounds(lm, 3, 60, compiled=Tuning(joined_projections=True), way=Accept(0.05, fill=CatchUp(4)))
    found = run.generate(GIVEN, 30)
    assert [len(t) for t in found.tokens] == [30] * 3 and len(found.audit) == 3 * 29
    early = sum(d < len(lm.decoder) for row in found.depth for d in row)
    assert found.audited == early > 0 and 10 <= found.deep_passes < 30


def test_the_generator_lets_tokens_leave_in_rounds_where_they_can() -> None:
    """With lengths chosen by times of this device; other fills are the reference's."""
    lm = language_model()
    for mode, captures in ((Accept(0.05, fill=CatchUp(6)), 1), (Accept(0.05, fill=Recompute(6)), 0)):
        run = TextGenerator(lm, mode)
        for _ in range(2):
            same(run.generate(GIVEN, max_new_tokens=40), generate(lm, GIVEN, mode, max_new_tokens=40))
        assert run.captures == captures


def test_the_command_writes_what_the_reference_writes(tmp_path: Path) -> None:
    """``offramp generate`` on this device: the same tokens in the same colours."""
    lm = language_model()
    lm.model.config.eos_token_id = None  # the model is read again, with the settings of its configuration
    lm.model.save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    words = [
        "generate",
        "--model",
        tmp_path / "model",
        "--prompt",
        "w3 w9 w1",
        "--prompt",
        "w5",
        "--exit",
        2,
        "--max-new-tokens",
        20,
        "--show",
    ]
    ids = [word_tokenizer()(text)["input_ids"] for text in ("w3 w9 w1", "w5")]
    for name, more, mode in (
        ("accept", ["--threshold", 0.05, "--cap", 4], Accept(0.05, fill=CatchUp(4))),
        ("verify", ["--draft-length", 3], Verify(3)),
        ("plain", [], Plain()),
    ):
        asked = [*words, "--mode", name, *more, "--device", "cuda", "--out", tmp_path / name]
        result = CliRunner().invoke(app, [str(w) for w in asked], env={"COLUMNS": "200", "TERM": "dumb"})
        assert result.exit_code == 0, result.output
        found, expected = json.loads((tmp_path / name).read_text()), generate(lm, ids, mode, max_new_tokens=20)
        assert (found["tokens"], found["depth"]) == (expected.tokens, expected.depth)
        assert (found["audited"], found["disagreed"]) == (expected.audited, expected.disagreed)
        assert found["blocks_run"] == 0, "written by the reference engine"


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_prompts_of_any_length(family: str) -> None:
    """Padded to few widths, each a graph: what is written is what the reference writes, whatever stood there before."""
    lm = attach_lm(build(family).to(DEVICE), [2], Adapter())
    run = Rounds(lm, 2, 110, 2, compiled=False)
    for first, second in ((3, 3), (17, 40), (1, 70), (90, 16), (33, 5), (15, 15)):
        given = prompts((first, second))
        same(run.generate(given, 12), generate(lm, given, Verify(2), max_new_tokens=12))


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("mode", [Plain(), Verify(3), Accept(0.05, fill=CatchUp(4))], ids=lambda m: type(m).__name__)
def test_blocks_share_code(mode: Way, joined: bool) -> None:
    lm = language_model()
    run = Rounds(lm, 3, 60, compiled=Tuning(shared_blocks=True, joined_projections=joined), way=mode)
    for _ in range(2):
        same(run.generate(GIVEN, 30), generate(lm, GIVEN, mode, max_new_tokens=30))


# ---- stop strings and streams ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [Plain(), Verify(4), Accept(0.05, fill=CatchUp(3))], ids=lambda m: type(m).__name__)
def test_stop_strings_and_streams(mode: Way) -> None:
    lm, tokenizer = language_model(), word_tokenizer()
    plain = generate(lm, GIVEN, mode, max_new_tokens=40)
    stops = [tokenizer.decode([plain.tokens[0][9]]).strip(), tokenizer.decode([plain.tokens[1][4]]).strip()]
    expected = generate(lm, GIVEN, mode, max_new_tokens=40, tokenizer=tokenizer, stop_strings=stops)
    run = Rounds(lm, 3, 60, way=mode)
    for _ in range(5):
        found = run.generate(GIVEN, 40, stops=StopStrings(tokenizer, stops))
        same(found, expected)

    class Heard(list):
        def put(self, value: torch.Tensor) -> None:
            self.append(value.flatten().tolist())

        def end(self) -> None:
            self.append([])

    heard = Heard()
    Rounds(lm, 1, 60, way=mode).generate(GIVEN[:1], 40, streamer=heard)
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
    run = text_generator(lm, texts=texts, starts=[len(p) for p in GIVEN], compiled=False)
    assert run.plan is not None and str(run.plan.times.device).startswith("cuda")
    for rows in (1, 3):
        assert run.generate(GIVEN[:rows], max_new_tokens=60).tokens == wrote.tokens[:rows]
