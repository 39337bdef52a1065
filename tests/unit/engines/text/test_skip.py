"""Blocks by position: what runs, what is read, and that every key and value that is read was written."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from language_models import own_greedy, prompts, shared
from offramp.backbones.decoder import Decoder, Step
from offramp.backbones.kv import KVCache
from offramp.budget.depth_schedule import LinearDepth
from offramp.core.errors import InvalidInput
from offramp.engines.text.generate import generate
from offramp.engines.text.skip import ranges
from offramp.language import attach_lm
from offramp.policies.decoding import Plain, Scheduled

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "top_k": 20, "repetition_penalty": 1.1}
SCHEDULES = [LinearDepth(4, 4, 2), LinearDepth(4, 4, 1, warmup=0), LinearDepth(4, 3, 2), LinearDepth(4, 2, 2)]


@dataclass(frozen=True)
class Given:
    """A schedule that is written down; the last entry serves all that follow."""

    sets: tuple[tuple[int, ...], ...]
    blocks: int = 4

    def executed(self, place: int, length: int) -> tuple[int, ...]:
        return self.sets[min(place, len(self.sets) - 1)]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_all_blocks_are_plain(family: str) -> None:
    lm = attach_lm(shared(family), [2])
    for batch in (1, 3, 8):
        found = generate(lm, prompts()[:batch], Scheduled(LinearDepth(4, 4, 4)), max_new_tokens=10)
        assert found.sequences.equal(own_greedy(shared(family), prompts()[:batch], 10))
        assert found.depth == [[4] * 10] * batch and found.blocks_run == found.blocks_plain
    drawn = [generate(lm, prompts(), m, max_new_tokens=10, seed=4, **SAMPLED).tokens for m in (Plain(), Scheduled(LinearDepth(4, 4, 4)))]
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("blocks", [(0, 1, 3), (2, 3), (0,), (0, 3)])
def test_one_set_of_blocks_is_a_model_of_these_blocks(family: str, blocks: tuple[int, ...]) -> None:
    """Prompts too run these alone."""
    short = copy.deepcopy(shared(family))
    trunk, name = (short.model, "layers") if hasattr(short, "model") else (short.transformer, "h")
    setattr(trunk, name, torch.nn.ModuleList(getattr(trunk, name)[b] for b in blocks))
    for place, block in enumerate(getattr(trunk, name)):
        (block.self_attn if family == "llama" else block.attn).layer_idx = place
    short.config.num_hidden_layers = len(blocks)
    found = generate(attach_lm(shared(family), [2]), prompts((5, 1, 9)), Scheduled(Given((blocks,))), max_new_tokens=12)
    assert found.sequences.equal(own_greedy(short, prompts((5, 1, 9)), 12))
    assert found.depth == [[len(blocks)] * 12] * 3 and found.blocks_share == len(blocks) / 4


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_what_is_read_was_written(schedule: LinearDepth, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots that were never written hold something that would show; a block that jumps back in reads them and does show."""
    lm = attach_lm(shared("llama"), [2])
    clean = generate(lm, prompts((5, 1, 9)), Scheduled(schedule), max_new_tokens=12)
    write, run = KVCache.write, Decoder.run
    looks: list[bool] = []

    def poisoned(self: KVCache, block: int, key: Tensor, value: Tensor, slots: Tensor) -> None:
        fresh = self.keys[block] is None
        write(self, block, key, value, slots)
        if fresh:
            untouched = torch.ones(self.rows, self.slots + 1, dtype=torch.bool).scatter_(1, slots, False)
            for held in (self.keys[block], self.values[block]):
                assert held is not None
                held[untouched] = 1e4

    def watched(self: Decoder, hidden: Tensor, start: int, stop: int, step: Step) -> Tensor:
        out = run(self, hidden, start, stop, step)
        for block in range(start, stop):
            keys, _ = step.cache.read(block, step.length)
            for row in range(len(hidden)):
                counted = step.slots[row] != step.cache.nowhere
                seen = int(step.positions[row][counted].max()) + 1 if bool(counted.any()) else 0
                looks.append(bool((keys[row, :, :seen] == 1e4).any()))
        return out

    monkeypatch.setattr(KVCache, "write", poisoned)
    monkeypatch.setattr(Decoder, "run", watched)
    dirty = generate(lm, prompts((5, 1, 9)), Scheduled(schedule), max_new_tokens=12)
    assert dirty.tokens == clean.tokens and looks and not any(looks)
    monkeypatch.setattr("offramp.engines.text.skip.Skipping.blocks", lambda self, place: (0, 1, 2, 3) if place in (0, 4) else (0, 3))
    generate(lm, prompts((5, 1, 9)), Scheduled(schedule), max_new_tokens=12)
    assert any(looks)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_depth_is_that_of_the_schedule(schedule: LinearDepth) -> None:
    found = generate(attach_lm(shared("llama"), [2]), prompts((5, 1)), Scheduled(schedule), max_new_tokens=9)
    expected = [schedule.depth(t, 9) for t in range(9)]
    assert found.depth == [expected] * 2
    assert found.blocks_run == 2 * sum(expected[1:]) and found.blocks_plain == 2 * 8 * 4
    assert found.mean_depth == sum(expected[1:]) / 8


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_batch_mates_change_nothing(options: dict[str, Any]) -> None:
    lm = attach_lm(shared("llama", torch.float64), [2])
    mode, texts, seeds = Scheduled(LinearDepth(4, 4, 2)), prompts(), [7, 3, 11, 5, 2, 13, 17, 19]
    free = generate(lm, texts, mode, max_new_tokens=12, seed=seeds, **options)
    end = free.tokens[1][3]  # some rows end before the others
    together = generate(lm, texts, mode, max_new_tokens=12, seed=seeds, eos_token_id=end, **options)
    for order in ([0], [1], [6, 2], [5, 4, 7, 1]):
        some = generate(lm, [texts[i] for i in order], mode, max_new_tokens=12, seed=[seeds[i] for i in order], eos_token_id=end, **options)
        assert some.tokens == [together.tokens[i] for i in order] and some.depth == [together.depth[i] for i in order]


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (LinearDepth(5, 4, 2), "for 5 blocks and the model has 4"),
        (Given(((0, 1), (0, 1, 2))), r"At new token 1 of 6 .*only such as ran for every token before.*\[0, 1, 2\] after \[0, 1\]"),
        (Given(((0, 1, 2), (0,), (1,))), "At new token 2 of 6"),
        (Given(((),)), "one block at least"),
        (Given(((1, 0),)), "ascending"),
        (Given(((3, 4),)), "At new token 0"),
    ],
)
def test_refused(schedule: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        generate(attach_lm(shared("llama"), [2]), [[5, 6]], Scheduled(schedule), max_new_tokens=6)


def test_a_schedule_is_asked_for() -> None:
    with pytest.raises(InvalidInput, match="schedule must say which blocks run"):
        Scheduled(3)  # type: ignore[arg-type]


def test_ranges() -> None:
    assert ranges([0, 1, 2]) == [(0, 3)] and ranges([0, 2, 3, 7]) == [(0, 1), (2, 4), (7, 8)] and ranges([]) == []
