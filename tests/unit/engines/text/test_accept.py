"""Leaving at several exits, by whatever rule, threshold and fill, against slow runs of the user's own model over whole texts."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from language_models import build, own_greedy, prompts, shared
from offramp.budget.agreement import BetaMixture
from offramp.core.errors import InvalidInput
from offramp.core.types import Readout
from offramp.engines.text.generate import exits, generate, write
from offramp.engines.text.rows import Rows
from offramp.engines.text.sampling import Sampling
from offramp.exits.cached import Adapter, Block
from offramp.language import LanguageModel, attach_lm
from offramp.policies import Confidence, Entropy, Margin, Patience, StateSimilarity
from offramp.policies.decoding import Accept, CatchUp, Copy, Decaying, Plain, Recompute

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

FILLS = [CatchUp(3), CatchUp(1), Recompute(3), Copy()]
SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.1}


@pytest.fixture(autouse=True)
def many_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offramp.engines.text.rows.READ", 8)


@dataclass(frozen=True)
class Restless:
    """A threshold that depends on how many looks it has seen, how sure they were, and whether they were right."""

    looks: int = 0
    right: int = 0
    sure: float = 0.0

    def threshold(self) -> float:
        return (0.02, 0.06, 0.2)[(self.looks + self.right + int(self.sure * 20)) % 3]

    def seen(self, confidence: Tensor, agreed: Tensor) -> Restless:
        return Restless(self.looks + len(agreed), self.right + int(agreed.sum()), self.sure + float(confidence.double().sum()))


def randomised(lm: LanguageModel) -> LanguageModel:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in lm.heads.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return lm


@dataclass
class Slow:
    """What a text should be: every token from one forward of the whole text, exits asked in order."""

    tokens: list[int]
    depth: list[int]
    scores: list[float]
    looks: list[tuple[int, int, float, bool, bool]]  # place, exit, score, agreed, left


def slowly(lm: LanguageModel, prompt: list[int], mode: Accept, new: int) -> Slow:
    used = exits(lm, mode)
    cap = mode.fill.cap if isinstance(mode.fill, CatchUp | Recompute) else 0
    threshold: Any = mode.threshold
    out = Slow([], [], [], [])
    for place in range(new):
        text = torch.tensor([prompt + out.tokens])
        with torch.no_grad():
            found = lm.model(text, output_hidden_states=True, use_cache=False)
            full = int(found.logits[0, -1].argmax())
        if place == 0:
            out.tokens.append(full)
            out.depth.append(len(lm.decoder))
            out.scores.append(math.nan)
            continue
        if hasattr(threshold, "seen"):
            known = [look for look in out.looks if look[0] == place - cap]
            if place - cap >= 1:
                threshold = threshold.seen(torch.tensor([k[2] for k in known]), torch.tensor([k[3] for k in known]))
        state = mode.rule.begin(1, torch.device("cpu"))
        token, depth = full, len(lm.decoder)
        for number, exit_index in enumerate(used):
            hidden = found.hidden_states[lm.exits[exit_index]]
            with torch.no_grad():
                logits = lm.teach(hidden, exit_index)[:, -1]
                score, state = mode.rule.score(exit_index, Readout(logits, hidden[:, -1]), state)
            if isinstance(threshold, Decaying):
                needed = threshold.tau * (0.9 + 0.1 * math.exp(-threshold.temperature * place / new))
            elif isinstance(threshold, tuple):
                needed = threshold[number]
            else:
                needed = threshold if isinstance(threshold, float) else threshold.threshold()
            choice, left = int(logits[0].argmax()), float(score) >= needed
            out.looks.append((place, exit_index, float(score), choice == full, left))
            if left:
                token, depth = choice, lm.exits[exit_index]
                break
        out.tokens.append(token)
        out.depth.append(depth)
        out.scores.append(out.looks[-1][2])
    return out


def close(found: list[float], expected: list[float]) -> None:
    assert found == pytest.approx(expected, abs=1e-5, nan_ok=True)


class TestNeverLeaving:
    @pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
    @pytest.mark.parametrize("fill", FILLS, ids=str)
    def test_is_plain(self, family: str, fill: Any) -> None:
        lm = attach_lm(shared(family), [1, 2, 3])
        expected = own_greedy(shared(family), prompts(), 10)
        for batch in (1, 3, 8):
            found = generate(lm, prompts()[:batch], Accept(math.inf, fill=fill), max_new_tokens=10)
            assert found.sequences[:, -10:].equal(expected[:batch, 17:])
            assert found.depth == [[4] * 10] * batch
            assert found.blocks_run == found.blocks_plain == batch * 9 * 4 and found.blocks_share == 1 and found.mean_depth == 4
            assert found.blocks_projected == found.audited == 0 and found.deep_passes == 9
        drawn = [generate(lm, prompts(), m, max_new_tokens=10, seed=4, **SAMPLED).tokens for m in (Plain(), Accept(math.inf, fill=fill))]
        assert drawn[0] == drawn[1]


MODES: dict[str, Accept] = {
    "one threshold": Accept(0.06, fill=CatchUp(4)),
    "one each": Accept((0.08, 0.07, 0.05), fill=CatchUp(3)),
    "some exits": Accept((0.05, 0.08), fill=CatchUp(3), exits=(0, 2)),
    "cap of one": Accept(0.06, fill=CatchUp(1)),
    "recompute": Accept((0.08, 0.07, 0.05), fill=Recompute(3)),
    "recompute some exits": Accept(0.06, fill=Recompute(5), exits=(1, 2)),
    "margin": Accept(0.02, Margin(), CatchUp(5)),
    "entropy": Accept((-4.2, -4.1, -4.1), Entropy(), CatchUp(5)),
    "patience": Accept(1.0, Patience(), CatchUp(3)),
    "states": Accept((0.0, 0.75, 0.85), StateSimilarity(token=None), Recompute(4)),
    "decaying": Accept(Decaying(0.07, 9.0), fill=CatchUp(4)),
    "adapting": Accept(Restless(), fill=CatchUp(3)),
    "adapting, recompute": Accept(Restless(), fill=Recompute(2)),
}


class TestAgainstTheWholeModel:
    @pytest.mark.parametrize("name", MODES)
    def test_text_depths_and_audit(self, name: str) -> None:
        mode = MODES[name]
        lm = attach_lm(shared("llama", torch.float64), [1, 2, 3])
        texts = prompts((5, 1, 11))
        found = generate(lm, texts, mode, max_new_tokens=18)
        expected = [slowly(lm, text, mode, 18) for text in texts]
        assert found.tokens == [e.tokens for e in expected]
        assert found.depth == [e.depth for e in expected]
        for scores, e in zip(found.scores, expected, strict=True):
            close(scores, e.scores)
        assert len({d for row in found.depth for d in row[1:]}) >= 2, "the setting tries nothing"
        looks = [(b, *look) for b, e in enumerate(expected) for look in e.looks]
        audit = found.audit
        places = zip(audit.row.tolist(), audit.place.tolist(), audit.exit_index.tolist(), strict=True)
        assert list(places) == [look[:3] for look in looks]
        close(audit.score.tolist(), [look[3] for look in looks])
        assert audit.agreed.tolist() == [look[4] for look in looks] and audit.left.tolist() == [look[5] for look in looks]
        assert found.audited == sum(look[5] for look in looks) and found.disagreed == sum(look[5] and not look[4] for look in looks)
        assert len(audit) == len(looks)

    @pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "qwen3"])
    def test_other_families(self, family: str) -> None:
        lm = attach_lm(shared(family, torch.float64), [1, 2, 3])
        for fill in (CatchUp(4), Recompute(4)):
            depths = set()
            for text in prompts((5, 2, 9)):
                levels = sorted(look[2] for look in slowly(lm, text, Accept(math.inf), 14).looks)
                middle = levels[len(levels) // 3 : len(levels) * 9 // 10]
                mode = Accept(max(pairwise(middle), key=lambda two: two[1] - two[0])[0] + 1e-5, fill=fill)
                found, expected = generate(lm, [text], mode, max_new_tokens=14), slowly(lm, text, mode, 14)
                assert found.tokens == [expected.tokens] and found.depth == [expected.depth]
                depths |= set(expected.depth[1:])
            assert len(depths) > 1

    @pytest.mark.parametrize("head", [Adapter(), Block()], ids=["adapter", "block"])
    @pytest.mark.parametrize("fill", [CatchUp(3), Recompute(3)], ids=str)
    def test_heads_that_attend(self, head: Any, fill: Any) -> None:
        """They see every token in order, also those that left before them."""
        lm = randomised(attach_lm(shared("llama", torch.float64), [1, 2, 3], head))
        for text in prompts((5, 1)):
            mode = Accept((0.09, 0.06, 0.05), fill=fill)
            found, expected = generate(lm, [text], mode, max_new_tokens=18), slowly(lm, text, mode, 18)
            assert found.tokens == [expected.tokens] and found.depth == [expected.depth]
            close(found.scores[0], expected.scores)
            assert len(set(expected.depth[1:])) > 2

    @pytest.mark.parametrize("family", ["llama", "gpt2", "olmo2"])
    @pytest.mark.parametrize("name", ["one each", "some exits", "recompute", "adapting", "cap of one"])
    def test_cache_is_that_of_a_full_forward(self, family: str, name: str) -> None:
        model = shared(family, torch.float64)
        lm, texts, mode = attach_lm(model, [1, 2, 3]), prompts((5, 1, 11)), MODES[name]
        free = generate(lm, texts, mode, max_new_tokens=14)
        ends = (free.tokens[0][4],)  # rows end at different places, with tokens waiting
        rows = Rows(lm, texts, 14, Sampling(), [0, 1, 2], ends, exits(lm, mode))
        with torch.inference_mode():
            write(rows, mode)
        found = rows.done()
        assert len(found.tokens[0]) < 14
        for row, text in enumerate(texts):
            whole = torch.tensor([text + found.tokens[row]])[:, :-1]  # no block has seen the newest token
            with torch.no_grad():
                expected = model(whole, use_cache=True).past_key_values
            for block in range(4):
                keys, values = rows.cache.read(block, whole.shape[1])
                torch.testing.assert_close(keys[row], expected.layers[block].keys[0], rtol=1e-6, atol=1e-6)
                torch.testing.assert_close(values[row], expected.layers[block].values[0], rtol=1e-6, atol=1e-6)


def projected(model: Any, block: int, states: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values ``[G, Q, D]`` that a block of the user's model makes of states ``[1, Q, W]`` at positions 0, 1, ..."""
    if hasattr(model, "transformer"):
        part = model.transformer.h[block]
        _, key, value = part.attn.c_attn(part.ln_1(states)).split(states.shape[-1], dim=-1)
        split = (part.attn.num_heads, part.attn.head_dim)
        return key[0].unflatten(-1, split).transpose(0, 1), value[0].unflatten(-1, split).transpose(0, 1)
    from transformers.models.llama.modeling_llama import rotate_half

    part = model.model.layers[block]
    normed = part.input_layernorm(states)
    key, value = (
        p(normed)[0].unflatten(-1, (-1, part.self_attn.head_dim)).transpose(0, 1) for p in (part.self_attn.k_proj, part.self_attn.v_proj)
    )
    cos, sin = model.model.rotary_emb(states, torch.arange(states.shape[1])[None])
    return key * cos + rotate_half(key) * sin, value


class TestCopy:
    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    @pytest.mark.parametrize("depth", [1, 2, 3])
    def test_deep_keys_and_values_are_made_from_the_state_at_the_exit(self, family: str, depth: int) -> None:
        model = shared(family, torch.float64)
        lm, texts = attach_lm(model, [depth]), prompts((5, 1, 11))
        rows = Rows(lm, texts, 12, Sampling(), [0, 1, 2])
        with torch.inference_mode():
            write(rows, Accept(0.0, fill=Copy()))
        found = rows.done()
        assert found.depth == [[4] + [depth] * 11] * 3 and found.deep_passes == found.audited == len(found.audit) == 0
        assert found.blocks_run == 3 * 11 * depth and found.blocks_projected == 3 * 11 * (4 - depth) and found.mean_depth == depth
        for row, text in enumerate(texts):
            whole = torch.tensor([text + found.tokens[row]])[:, :-1]
            with torch.no_grad():
                states = model(whole, output_hidden_states=True, use_cache=False).hidden_states
                for block in range(4):
                    keys, values = rows.cache.read(block, whole.shape[1])
                    own = projected(model, block, states[block])
                    copied = projected(model, block, states[min(block, depth)])
                    new = slice(len(text), None)  # of the prompt nothing is copied
                    for cached, whole_run, copy in zip((keys[row], values[row]), own, copied, strict=True):
                        torch.testing.assert_close(cached[:, : len(text)], whole_run[:, : len(text)], rtol=1e-6, atol=1e-6)
                        torch.testing.assert_close(cached[:, new], copy[:, new], rtol=1e-6, atol=1e-6)
                        assert block <= depth or not torch.allclose(copy[:, new], whole_run[:, new])

    def test_each_token_from_its_own_exit(self) -> None:
        """Tokens of a batch leave at different exits in the same step; those that leave first have exact states."""
        model = shared("llama", torch.float64)
        lm, texts, mode = attach_lm(model, [1, 2, 3]), prompts((5, 1, 11)), Accept((0.1, 0.08, 0.06), fill=Copy())
        rows = Rows(lm, texts, 16, Sampling(), [0, 1, 2], exits=exits(lm, mode))
        with torch.inference_mode():
            write(rows, mode)
        found = rows.done()
        assert {d for row in found.depth for d in row} == {1, 2, 3, 4}
        assert any(len({row[t] for row in found.depth}) == 3 for t in range(1, 16))
        for row, text in enumerate(texts):
            whole = torch.tensor([text + found.tokens[row]])[:, :-1]
            with torch.no_grad():
                first = model(whole, output_hidden_states=True, use_cache=False).hidden_states[1]
            left = [len(text) + t for t in range(15) if found.depth[row][t + 1] == 1]
            for block in range(1, 4):
                keys, values = rows.cache.read(block, whole.shape[1])
                with torch.no_grad():
                    copied = projected(model, block, first)
                torch.testing.assert_close(keys[row][:, left], copied[0][:, left], rtol=1e-6, atol=1e-6)
                torch.testing.assert_close(values[row][:, left], copied[1][:, left], rtol=1e-6, atol=1e-6)
        expected = sum(d for row in found.depth for d in row[1:])
        assert found.blocks_run == expected and found.blocks_run + found.blocks_projected == found.blocks_plain

    @pytest.mark.parametrize("family", ["qwen2_window", "gemma3", "opt_350m", "phi", "cohere", "starcoder2"])
    def test_every_kind_of_block_can_be_stopped(self, family: str) -> None:
        """Keys and values are those that the block writes when it runs in full on the same state, and no state comes back."""
        lm = attach_lm(shared(family), [2])
        made, states = lm.decoder, torch.randn(2, 3, lm.decoder.width, generator=torch.Generator().manual_seed(0))
        run, stopped = made.cache(2, 8), made.cache(2, 8)
        ran: list[str] = []
        hooks = [m.register_forward_hook(lambda *_, n=n: ran.append(n)) for n, m in lm.model.named_modules() if n.endswith(("mlp", "fc2"))]
        try:
            with torch.inference_mode():
                places = torch.arange(3).expand(2, -1)
                for block in range(4):
                    made.run(states, block, block + 1, made.step(run, places))
                assert ran
                ran.clear()
                made.project(states, 0, 4, made.step(stopped, places))
        finally:
            for hook in hooks:
                hook.remove()
        assert not ran
        for block in range(4):
            for a, b in zip(run.read(block, 3), stopped.read(block, 3), strict=True):
                assert a.equal(b) and a.abs().sum() > 0


class TestBatchMates:
    @pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
    @pytest.mark.parametrize("head", [None, Adapter()], ids=["shared", "adapter"])
    @pytest.mark.parametrize(
        "mode",
        [
            MODES["one each"],
            MODES["recompute"],
            replace(MODES["one each"], fill=Copy()),
            MODES["decaying"],
            replace(MODES["decaying"], fill=Copy()),
            MODES["adapting"],
            MODES["adapting, recompute"],
            MODES["patience"],
        ],
        ids=str,
    )
    def test_change_nothing(self, mode: Accept, head: Any, options: dict[str, Any]) -> None:
        lm = randomised(attach_lm(shared("llama", torch.float64), [1, 2, 3], head))
        texts, seeds = prompts(), [7, 3, 11, 5, 2, 13, 17, 19]
        together = generate(lm, texts, mode, max_new_tokens=14, seed=seeds, **options)
        assert len({d for row in together.depth for d in row[1:]}) > 1
        for order in ([0], [6, 2, 7], [1, 4]):
            some = generate(lm, [texts[i] for i in order], mode, max_new_tokens=14, seed=[seeds[i] for i in order], **options)
            assert some.tokens == [together.tokens[i] for i in order]
            assert some.depth == [together.depth[i] for i in order]
            for row, i in enumerate(order):
                close(some.scores[row], together.scores[i])
                mine, its = some.audit.row == row, together.audit.row == i
                assert some.audit.place[mine].equal(together.audit.place[its]) and some.audit.agreed[mine].equal(together.audit.agreed[its])


class TestWork:
    """Always leaving after two of four blocks: seven tokens after the first."""

    def widths(self, monkeypatch: pytest.MonkeyPatch, mode: Accept, at: list[int]) -> tuple[Any, list[tuple[int, int, int]]]:
        seen: list[tuple[int, int, int]] = []
        run = Rows.run

        def spied(self: Rows, first: Tensor, counts: Tensor, width: int, start: int, stop: int, states: Tensor | None = None) -> Tensor:
            seen.append((start, stop, width))
            return run(self, first, counts, width, start, stop, states)

        monkeypatch.setattr(Rows, "run", spied)
        found = generate(attach_lm(shared("llama"), at), prompts((5, 2)), mode, max_new_tokens=8)
        return found, seen[1:]

    def test_catch_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        found, seen = self.widths(monkeypatch, Accept(0.0, fill=CatchUp(3)), [2])
        once = [(0, 2, 1)] * 3 + [(2, 4, 3)]
        assert seen == [*once, *once, (0, 2, 1), (2, 4, 1)]
        assert found.blocks_run == found.blocks_plain == 2 * 7 * 4 and found.mean_depth == 2 and found.deep_passes == 3

    def test_recompute(self, monkeypatch: pytest.MonkeyPatch) -> None:
        found, seen = self.widths(monkeypatch, Accept(0.0, fill=Recompute(3)), [2])
        once = [(0, 2, 1), (0, 2, 2), (0, 2, 3), (2, 4, 3)]
        assert seen == [*once, *once, (0, 2, 1), (0, 2, 1), (2, 4, 1)]
        assert found.blocks_run == 2 * (2 * (6 * 2 + 3 * 2) + 2 + 4) and found.blocks_plain == 2 * 7 * 4

    def test_copy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        found, seen = self.widths(monkeypatch, Accept(0.0, fill=Copy()), [2])
        assert seen == [(0, 2, 1)] * 7
        assert found.blocks_share == 0.5 and found.blocks_projected == 2 * 7 * 2

    def test_what_waits_in_all_is_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Tokens that left at the second exit count towards what may wait, as those that left at the first do."""
        found, seen = self.widths(monkeypatch, Accept((2.0, 0.0), fill=CatchUp(3)), [1, 2])
        once = [(0, 1, 1), (1, 2, 1)] * 3 + [(2, 4, 3)]
        assert seen == [*once, *once, (0, 1, 1), (1, 2, 1), (2, 4, 1)]
        assert found.depth == [[4] + [2] * 7] * 2

    def test_a_pass_goes_no_further_than_it_must(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A token that leaves at the second exit takes those that wait before the second segment, and those behind it go on waiting."""
        lm = attach_lm(shared("llama", torch.float64), [1, 2])
        sure = generate(lm, prompts((5,)), Accept((0.06, 0.0), fill=CatchUp(20)), max_new_tokens=16)
        depths = sure.depth[0][1:]
        assert set(depths) == {1, 2}
        shallow_work = 15 + 2 * 15 + 15  # in the end every block has run once for each token
        assert sure.blocks_run == shallow_work and sure.deep_passes == 1


class TestAdapting:
    def test_what_was_learned_is_given_back(self) -> None:
        lm = attach_lm(shared("llama"), [2])
        mixture = BetaMixture(zeta=0.3, low=0.02, high=0.2)
        first = generate(lm, prompts(), Accept(mixture, fill=CatchUp(3)), max_new_tokens=30)
        assert isinstance(first.learned, BetaMixture)
        assert first.learned.agree.count == int(first.audit.agreed.sum()) and first.learned.disagree.count == int(
            (~first.audit.agreed).sum()
        )
        assert len(first.audit) == 8 * 29  # every token was looked at, and every look judged
        assert first.learned.threshold() != mixture.threshold()
        again = generate(lm, prompts(), Accept(first.learned, fill=CatchUp(3)), max_new_tokens=30)
        assert isinstance(again.learned, BetaMixture)
        assert again.learned.agree.count + again.learned.disagree.count == 2 * 8 * 29
        assert again.depth != first.depth

    def test_nothing_is_learned_without_one(self) -> None:
        found = generate(attach_lm(shared("llama"), [2]), prompts((3,)), Accept(0.05), max_new_tokens=5)
        assert found.learned is None and generate(attach_lm(shared("llama"), [2]), [[5]], max_new_tokens=3).scores == []


class TestRefused:
    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: CatchUp(0), "cap must be"),
            (lambda: CatchUp("8"), "cap must be a whole number"),
            (lambda: Recompute(-1), "cap must be"),
            (lambda: Accept(math.nan), "threshold must be"),
            (lambda: Accept(()), "threshold must be"),
            (lambda: Accept("sure"), "threshold must be"),
            (lambda: Accept(0.5, exits=(1, 0)), "ascending"),
            (lambda: Accept(0.5, exits=()), "at least one"),
            (lambda: Accept(0.5, rule="confidence"), "rule of offramp.policies"),
            (lambda: Accept(0.5, fill="copy"), "fill must be"),
            (lambda: Accept(BetaMixture(), fill=Copy()), "adapts"),
            (lambda: Decaying(-1.0), "tau and temperature"),
        ],
    )
    def test_as_data(self, make: Any, message: str) -> None:
        with pytest.raises(InvalidInput, match=message):
            make()

    @pytest.mark.parametrize(
        ("mode", "message"),
        [
            (Accept(0.5, exits=(0, 2)), "from 0 to 1, as the model has 2 exits"),
            (Accept((0.5,)), "1 thresholds were given for 2 exits"),
            (Accept((0.5, 0.5, 0.5)), "3 thresholds"),
            (Accept(1.0, Patience(), exits=(1,)), "none may be left out"),
        ],
    )
    def test_by_the_model(self, mode: Accept, message: str) -> None:
        lm = attach_lm(shared("llama"), [1, 3])
        with pytest.raises(InvalidInput, match=message):
            generate(lm, [[5]], mode, max_new_tokens=3)


def test_more_exits_than_tokens_and_one_token_only() -> None:
    lm = attach_lm(build("llama"), [1, 2, 3])
    for fill in FILLS:
        found = generate(lm, prompts((4, 1)), Accept(0.0, Confidence(), fill), max_new_tokens=1)
        assert found.depth == [[4], [4]] and found.blocks_run == 0 and math.isnan(found.blocks_share) and math.isnan(found.mean_depth)
        assert math.isnan(found.scores[0][0]) and len(found.audit) == 0
