"""Reproductions on text: settings, what is counted and judged, and a whole small run."""

from __future__ import annotations

import json
import lzma
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from offramp import systems
from offramp.cli import reproduce_text as reproducing
from offramp.cli.reproduce_common import measured
from offramp.cli.text_runs import Meter, Written, agreeing, by_position, perplexities, write
from offramp.cli.text_training import bare, load_corpus, make_model, windows
from offramp.core.errors import InvalidInput
from offramp.core.system import Predicate
from offramp.language import attach_lm
from offramp.policies.decoding import Accept, CatchUp, Copy, Plain, Verify

pytest.importorskip("transformers")
BASE = """
seeds = [0]

[tiny]
blocks = 3
width = 16
heads = 2
smaller = [1]
steps = 4
exit_steps = 2
length = 16
batch_size = 4
prompts = 2
prompt_length = 6
new_tokens = 6
calibration_prompts = 4
thresholds = 2
timed = 1
rounds = 1
evaluated = 4
"""
SETTINGS = reproducing.TextSettings(3, 16, 2, (1,), 4, 2, length=16, prompt_length=6, new_tokens=8)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt.xz"
    with lzma.open(path, "wt", encoding="utf-8") as file:
        file.write("the cat sat on the mat and saw a dog. " * 60)
    return path


@pytest.fixture
def lm() -> Any:
    return attach_lm(make_model(replace(SETTINGS, blocks=3), 11, 3, 0, "cpu"), [1, 2])


PROMPTS = [[1, 2, 3, 4, 5, 6], [3, 1, 4, 1, 5, 9]]


class TestSettings:
    def test_shared_and_own(self, tmp_path: Path) -> None:
        path = tmp_path / "x.toml"
        path.write_text(BASE + "\n[tiny.system]\ncap = 3\n\n[system]\nzeta = 0.5\n\n[sweep]\nzeta = [0.3, 0.4]\n")
        assert reproducing.TextSettings.variants(path) == ["tiny"]
        found = reproducing.TextSettings.load(path, "tiny")
        assert dict(found.system) == {"zeta": 0.5, "cap": 3} and found.seeds == (0,) and found.smaller == (1,)
        assert found.sweep["zeta"] == [0.3, 0.4]

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ("steps = 4", "stepps = 4", "Did you mean 'steps'"),
            ("width = 16\n", "", "'width' is missing"),
            ("smaller = [1]", "smaller = [3]", "below blocks=3"),
            ("seeds = [0]", "seeds = []", "seeds must not be empty"),
            ("new_tokens = 6", "new_tokens = 1", "new_tokens"),
        ],
    )
    def test_mistakes(self, tmp_path: Path, old: str, new: str, message: str) -> None:
        path = tmp_path / "x.toml"
        path.write_text(BASE.replace(old, new, 1))
        with pytest.raises(InvalidInput, match=message):
            reproducing.TextSettings.load(path, "tiny")


class TestText:
    def test_characters(self, text: Path) -> None:
        corpus = load_corpus(SETTINGS, str(text))
        assert corpus.vocabulary == len(set("the cat sat on the mat and saw a dog. "))
        total = len(corpus.train) + len(corpus.calibration) + len(corpus.test)
        assert total == 60 * 38 and len(corpus.train) == total - total // 10

    def test_byte_pairs_and_a_folder(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("the cat sat on the mat. " * 300, encoding="utf-8")
        corpus = load_corpus(replace(SETTINGS, vocabulary=300), str(tmp_path))
        assert int(corpus.train.max()) < corpus.vocabulary <= 300 and len(corpus.train) < 24 * 300 / 2

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidInput, match="--data"):
            load_corpus(SETTINGS, None)
        with pytest.raises(InvalidInput, match="no text at"):
            load_corpus(SETTINGS, str(tmp_path / "none.txt"))
        (tmp_path / "short.txt").write_text("abc" * 10)
        with pytest.raises(InvalidInput, match="too few"):
            load_corpus(SETTINGS, str(tmp_path / "short.txt"))

    def test_windows_are_of_the_text(self) -> None:
        found = windows(torch.arange(50), 20, 5, 3)
        assert found.shape == (20, 5) and bool((found[:, 1:] - found[:, :-1] == 1).all())
        assert torch.equal(found, windows(torch.arange(50), 20, 5, 3)) and not torch.equal(found, windows(torch.arange(50), 20, 5, 4))


class TestCounts:
    def test_plain_decoding_costs_one(self, lm: Any) -> None:
        found = write(lm, Plain(), PROMPTS, 8)
        assert found.cost == pytest.approx(1.0) and found.blocks_share == pytest.approx(1.0)
        assert found.tokens_per_round is None and bool(agreeing(lm.model, found).all())

    def test_drafts_by_hand(self, lm: Any) -> None:
        """A draft is a pass over the blocks before the exit and a head; a round one more such pass, the blocks behind, the output."""
        found, meter = write(lm, Verify(2), PROMPTS, 8), Meter(lm)
        tried, rounds = sum(found.drafted), found.rounds
        read = (tried + rounds) * meter.blocks[0] + rounds * sum(meter.blocks[1:]) + tried * meter.heads[0] + rounds * meter.output
        later = 2 * 7
        assert found.cost == pytest.approx(read / (later * meter.plain))
        assert found.blocks_share == pytest.approx((tried + 3 * rounds) / (later * 3))
        assert found.tokens_per_round == pytest.approx(later / rounds)
        assert bool(agreeing(lm.model, found).all())

    def test_leaving_at_the_first_exit(self, lm: Any) -> None:
        meter = Meter(lm)
        copied = write(lm, Accept(-math.inf, fill=Copy(), exits=(0,)), PROMPTS, 8)
        keys = sum(meter.keys[1:])
        assert copied.cost == pytest.approx((meter.blocks[0] + meter.heads[0] + keys) / meter.plain)
        assert copied.blocks_share == pytest.approx(1 / 3) and bool((copied.depth[:, 1:] == 1).all())
        caught = write(lm, Accept(-math.inf, fill=CatchUp(2), exits=(0,)), PROMPTS, 8)
        assert 1 / 3 < caught.blocks_share < 1

    def test_nothing_is_left_behind(self, lm: Any) -> None:
        write(lm, Verify(2), PROMPTS, 8)
        assert "run" not in vars(lm.decoder) and "observe" not in vars(lm) and not any(h._forward_hooks for h in lm.heads)

    def test_together_writes_the_same(self, lm: Any) -> None:
        one, all_ = write(lm, Verify(2), PROMPTS, 8), write(lm, Verify(2), PROMPTS, 8, together=True)
        assert torch.equal(one.tokens, all_.tokens) and math.isnan(all_.cost)

    def test_agreement_and_perplexity_by_hand(self, lm: Any) -> None:
        tokens = torch.tensor(PROMPTS)
        with torch.no_grad():
            logits = lm.model(tokens).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        assert perplexities(lm, tokens)[-1] == pytest.approx(float(loss.exp()), rel=1e-4)
        assert len(perplexities(lm, tokens)) == 3 and len(perplexities(bare(lm.model), tokens)) == 1
        written = Written(((1, 2, 3),), tokens[:1, 3:], tokens[:1, 3:], 1.0, 1.0)
        with torch.no_grad():
            expected = lm.model(torch.tensor([[1, 2, 3, 4, 5, 6]])).logits[:, 2:-1].argmax(-1) == tokens[:1, 3:]
        assert torch.equal(agreeing(lm.model, written), expected)

    def test_depth_that_its_place_explains(self) -> None:
        falling = torch.tensor([[9, 4, 3, 2], [9, 4, 3, 2]])
        assert by_position(falling) == pytest.approx(1.0)
        assert by_position(torch.tensor([[9, 4, 2, 4], [9, 2, 4, 2]])) == pytest.approx(0.0)
        assert by_position(torch.full((2, 4), 3)) is None


class TestVerdict:
    ROWS = (
        {"budget": 0.5, "excess": 0.01, "speedup": 1.5},
        {"budget": 0.8, "excess": -0.03, "speedup": 0.9},
        {"budget": 1.1, "speedup": 0.6},
    )

    @pytest.mark.parametrize(
        ("predicate", "lossless", "value"),
        [
            (Predicate("excess", "<=", 0.0), False, -0.01),
            (Predicate("excess", "<=", 0.0, over="worst"), False, 0.01),
            (Predicate("excess", "<=", 0.0, over="best"), False, -0.03),
            (Predicate("speedup", ">=", 1.0), False, 1.2),
            (Predicate("speedup", ">=", 1.0), True, 1.0),  # what cannot change the text counts at any cost
            (Predicate("speedup", ">=", 1.0, over="worst"), True, 0.6),
            (Predicate("excess", "<=", 0.0, budget=0.52), False, 0.01),  # whole blocks meet a share only nearly
            (Predicate("excess", "<=", 0.0, budget=0.3), True, None),
            (Predicate("agreement", ">=", 0.9), False, None),
        ],
    )
    def test_measured(self, predicate: Predicate, lossless: bool, value: float | None) -> None:
        built = systems.build("calm")
        system = replace(built, card=replace(built.card, predicate=predicate, lossless=lossless))
        found = measured(predicate, self.ROWS, partial(reproducing.counts, system))
        assert found == (value if value is None else pytest.approx(value))


@pytest.mark.slow
class TestRun:
    @pytest.mark.parametrize("name", ["kangaroo", "calm", "free", "self-supervised-early-exits", "skipdecode", "sorted-llama"])
    @pytest.mark.filterwarnings("ignore:No threshold is certified")
    def test_every_kind(self, name: str, text: Path, tmp_path: Path, offramp: Callable[..., Any]) -> None:
        own = {"skipdecode": "blocks = 3\nlength = 6\nshare = 0.7", "free": "blocks = 3\nexit_after = 1"}
        config = BASE + f"\n[tiny.system]\n{own.get(name, '')}\n"
        (tmp_path / f"{name}.toml").write_text(config)
        done = offramp("reproduce", name, "--data", text, "--configs", tmp_path, "--results", tmp_path, "--device", "cpu")
        assert done.exit_code == 0, done.output
        assert "verdict" in done.output and "claim" in done.output
        found = json.loads((tmp_path / f"{name}--tiny--cpu.json").read_text())
        assert found["settings"]["blocks"] == 3 and found["environment"]["versions"]["torch"] == metadata.version("torch")
        seed = found["seeds"][0]
        row = seed["budgets"][-1]
        assert len(row["timing"]["timings"]["ours"]["samples_ms"]) == 1 and seed["static"][0]["cost"] < 1
        if systems.load_card(name).lossless:
            assert row["agreement"] == row["same_text"] == 1.0
        if systems.build(name).rule is not None:
            assert row["disagreement_of_all"] == pytest.approx(1 - row["agreement"])
            assert row["disagreement_of_left"] * row["left"] <= row["disagreement_of_all"] + 1e-9
        assert ("perplexity_ratio" in row) == (name == "skipdecode") and all(math.isfinite(p) for p in seed["exit_perplexity"])

    def test_models_are_trained_once(self, text: Path) -> None:
        said: list[str] = []
        bases = reproducing.Bases(said.append)
        corpus = load_corpus(SETTINGS, str(text))
        for _ in range(2):
            bases.get(SETTINGS, corpus, 0, "cpu", 3)
            bases.get(replace(SETTINGS, system={"cap": 2}, seeds=(5,)), corpus, 0, "cpu", 3, 2)
        assert said == ["seed 0: 3 blocks without exits", "seed 0: 3 blocks without exits, 2 steps more"]

    def test_a_classifier_is_refused(self) -> None:
        with pytest.raises(InvalidInput, match="classify engine"):
            reproducing.TEXTS.run("branchynet", SETTINGS, variant="tiny")
