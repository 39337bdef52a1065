"""Decoding against transformers' own: tokens, caches, batch mates, and what is left of the user's model."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from language_models import FAMILIES, FULL_ATTENTION, VOCABULARY, build, own_greedy, prompts, shared
from offramp.backbones.kv import KVCache
from offramp.core.errors import InvalidInput
from offramp.engines.text.generate import exits, generate, write
from offramp.engines.text.rows import Rows
from offramp.engines.text.sampling import Sampling
from offramp.exits.cached import Adapter, Block
from offramp.exits.lm import Ending, LMHead
from offramp.language import LanguageModel, attach_lm
from offramp.policies.decoding import Accept, CatchUp, Plain, Verify

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.1}


class _Head(LMHead):
    def __init__(self, ending: Ending, kind: str) -> None:
        super().__init__(ending)
        self.kind = kind
        self.weight = nn.Parameter(torch.randn(ending.vocabulary, ending.width))

    def forward(self, hidden: Tensor) -> Tensor:
        if self.kind == "random":
            return nn.functional.linear(hidden, self.weight.to(hidden.dtype))
        return -self.ending[0].head(self.ending[0].norm(hidden))


@dataclass(frozen=True)
class Bad:
    """Drafts that are ``"random"``, or ``"worst"``: what the model's own head finds least likely."""

    kind: str

    def build(self, ending: Ending) -> LMHead:
        return _Head(ending, self.kind)


def agreeing(family: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    """A model whose last two blocks add nothing, so that an exit after the second says what the model says."""
    model = build(family, dtype)
    with torch.no_grad():
        for block in model.model.layers[2:]:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    return model


@pytest.fixture(autouse=True)
def many_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read in small multiples, so that short texts cross many of their edges."""
    monkeypatch.setattr("offramp.engines.text.rows.READ", 8)


def rows_of(lm: LanguageModel, texts: list[list[int]], mode: Any, new: int, **sampling: Any) -> Rows:
    spare = mode.draft_length if isinstance(mode, Verify) else 0
    return Rows(lm, texts, new, Sampling(**sampling), list(range(len(texts))), exits=exits(lm, mode), spare=spare)


class TestEqualToTransformers:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_greedy(self, family: str) -> None:
        model, texts, new = shared(family), prompts(), 12
        lm = attach_lm(model, [1, 3])
        expected = own_greedy(model, texts, new)
        modes = [Plain(), Verify(4), Verify(3, exit_index=1), Accept(1.1)]
        for mode in modes:
            assert torch.equal(generate(lm, texts, mode, max_new_tokens=new).sequences, expected), mode
        for mode in modes:
            assert generate(lm, texts[:3], mode, max_new_tokens=new).sequences[:, 17:].equal(expected[:3, 17:]), mode
            assert generate(lm, texts[2:3], mode, max_new_tokens=new).sequences.equal(expected[2:3]), mode

    def test_two_hundred_prompts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("offramp.engines.text.rows.READ", 64)
        model = shared("llama")
        lm = attach_lm(model, [1, 3])
        texts = prompts([1 + (7 * i) % 23 for i in range(200)])
        expected = own_greedy(model, texts, 64)[:, 23:].tolist()
        for mode in (Plain(), Verify(4), Verify(5, exit_index=1)):
            assert generate(lm, texts, mode, max_new_tokens=64).tokens == expected

    @pytest.mark.parametrize("kind", ["all", "none", "random"])
    def test_drafts_of_any_quality(self, kind: str) -> None:
        model = agreeing() if kind == "all" else shared("llama")
        lm = attach_lm(model, [2], None if kind == "all" else Bad("worst" if kind == "none" else "random"))
        texts = prompts()
        expected = own_greedy(model, texts, 18)
        for length in (1, 5):
            for batch in (1, 3, 8):
                found = generate(lm, texts[:batch], Verify(length), max_new_tokens=18)
                start = found.sequences.shape[1] - 18
                assert found.sequences[:, start:].equal(expected[:batch, 17:]), (length, batch)
                assert all(a <= d for a, d in zip(found.accepted, found.drafted, strict=True))
                if kind == "all":
                    assert found.acceptance == 1.0
                    assert found.deep_passes == -(-17 // (length + 1))
                if kind == "none":
                    assert found.acceptance == 0.0 and found.deep_passes == 17
        depths = generate(lm, texts[:1], Verify(3), max_new_tokens=9).depth[0]
        assert depths == {"all": [4, 2, 2, 2, 4, 2, 2, 2, 4], "none": [4] * 9}.get(kind, depths)

    def test_over_the_real_reading_edge(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A draft may stand beyond the last multiple that the newest token needs."""
        monkeypatch.setattr("offramp.engines.text.rows.READ", 64)
        model = agreeing()
        lm = attach_lm(model, [2])
        for length in (58, 60, 61, 62, 63, 64):
            texts = prompts((length, 3))
            expected = own_greedy(model, texts, 12)
            assert generate(lm, texts, Verify(6), max_new_tokens=12).sequences.equal(expected), length

    def test_repetition_penalty(self) -> None:
        model = shared("llama")
        lm = attach_lm(model, [1, 3])
        text = prompts((9,))
        expected = own_greedy(model, text, 30, repetition_penalty=1.7)
        for mode in (Plain(), Verify(4, exit_index=1), Accept(1.1)):
            assert generate(lm, text, mode, max_new_tokens=30, repetition_penalty=1.7).sequences.equal(expected)
        assert not own_greedy(model, text, 30).equal(expected)

    def test_tied_and_untied_output(self) -> None:
        for tied in (True, False):
            model = build("llama", tie_word_embeddings=tied)
            found = generate(attach_lm(model, [2]), prompts((4,)), Verify(2), max_new_tokens=8)
            assert found.sequences.equal(own_greedy(model, prompts((4,)), 8))


class TestExitsWithACache:
    """Heads that attend to earlier tokens must be shown every token once, in every mode."""

    @pytest.mark.parametrize("head", [Adapter(), Block()], ids=["adapter", "block"])
    def test_verify_is_lossless_and_batch_mates_change_nothing(self, head: Any) -> None:
        model = shared("llama", torch.float64)
        lm = attach_lm(model, [1, 3], head)
        with torch.no_grad():
            for parameter in lm.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        texts = prompts((5, 1, 9, 3))
        expected = own_greedy(model, texts, 14)
        for mode in (Verify(3), Verify(4, exit_index=1)):
            assert generate(lm, texts, mode, max_new_tokens=14).sequences.equal(expected)
        for mode in (Verify(3, exit_index=1), Accept(0.05, fill=CatchUp(3), exits=(1,))):
            for options in ({}, SAMPLED):
                together = generate(lm, texts, mode, max_new_tokens=14, seed=3, **options)
                for row, text in enumerate(texts):
                    alone = generate(lm, [text], mode, max_new_tokens=14, seed=3 + row, **options)
                    assert alone.tokens[0] == together.tokens[row] and alone.depth[0] == together.depth[row]


class TestAccept:
    def test_always_leaving_writes_what_the_first_blocks_write(self) -> None:
        model = shared("llama")
        short = copy.deepcopy(model)
        short.model.layers = short.model.layers[:2]
        short.config.num_hidden_layers = 2
        lm = attach_lm(model, [2])
        for text in prompts((5, 1, 12)):
            found = generate(lm, [text], Accept(0.0, fill=CatchUp(4)), max_new_tokens=20)
            begun = text + found.tokens[0][:1]
            assert own_greedy(short, [begun], 19)[0].tolist() == text + found.tokens[0]
            assert found.depth[0] == [4] + [2] * 19
            assert found.deep_passes == 5 and found.audited == 19  # ceil(19 / 4)

    def test_audit_counts_what_the_full_model_says(self) -> None:
        lm = attach_lm(shared("llama"), [2])
        texts = prompts((5, 1, 12))
        for penalty in (1.0, 1.5):
            found = generate(lm, texts, Accept(0.05, fill=CatchUp(3)), max_new_tokens=20, repetition_penalty=penalty)
            left = disagreed = 0
            for text, new, depth in zip(texts, found.tokens, found.depth, strict=True):
                for place, (token, deep) in enumerate(zip(new, depth, strict=True)):
                    if deep == 2:
                        left += 1
                        full = generate(lm, [text + new[:place]], max_new_tokens=1, repetition_penalty=penalty).tokens[0][0]
                        disagreed += full != token
            assert left == found.audited > 0
            assert disagreed == found.disagreed > 0

    def test_agreeing_exit_never_disagrees(self) -> None:
        lm = attach_lm(agreeing(), [2])
        for options in ({}, SAMPLED):
            found = generate(lm, prompts(), Accept(0.0), max_new_tokens=20, **options)
            assert found.audited == 8 * 19 and found.disagreed == 0

    def test_cap_bounds_what_waits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        lm = attach_lm(shared("llama"), [2])
        widths: list[int] = []
        run = Rows.run

        def spied(self: Rows, first: Tensor, counts: Tensor, width: int, start: int, stop: int, states: Tensor | None = None) -> Tensor:
            if start == 2:
                widths.append(width)
            return run(self, first, counts, width, start, stop, states)

        monkeypatch.setattr(Rows, "run", spied)
        generate(lm, prompts((5, 2)), Accept(0.0, fill=CatchUp(5)), max_new_tokens=13)
        assert widths == [5, 5, 2]


class TestCache:
    @pytest.mark.parametrize("family", FULL_ATTENTION)
    def test_equals_a_full_forward_over_the_text(self, family: str) -> None:
        model = shared(family, torch.float64)
        lm = attach_lm(model, [1, 3])
        texts = prompts((5, 1, 11))
        for mode in (Plain(), Verify(4), Verify(3, exit_index=1), Accept(0.0, fill=CatchUp(3)), Accept(0.08, fill=CatchUp(4), exits=(1,))):
            rows = rows_of(lm, texts, mode, 12)
            with torch.inference_mode():
                write(rows, mode)
            found = rows.done()
            for row, text in enumerate(texts):
                whole = torch.tensor([text + found.tokens[row]])[:, :-1]  # no block has seen the newest token
                with torch.no_grad():
                    expected = model(whole, use_cache=True).past_key_values
                for block in range(4):
                    keys, values = rows.cache.read(block, whole.shape[1])
                    torch.testing.assert_close(keys[row], expected.layers[block].keys[0], rtol=1e-6, atol=1e-6)
                    torch.testing.assert_close(values[row], expected.layers[block].values[0], rtol=1e-6, atol=1e-6)

    def test_of_rows_that_end_early(self) -> None:
        """A row that ended with tokens waiting is brought up to date at its own positions, whenever its batch mates make the others run."""
        model = shared("llama", torch.float64)
        lm = attach_lm(model, [2])
        texts = prompts((5, 3, 11))
        free = generate(lm, texts, Accept(0.05, fill=CatchUp(6)), max_new_tokens=16)
        ends = {free.tokens[0][3], free.tokens[2][6]}
        rows = Rows(lm, texts, 16, Sampling(), [0, 1, 2], tuple(ends))
        with torch.inference_mode():
            write(rows, Accept(0.05, fill=CatchUp(6)))
        found = rows.done()
        assert len({len(t) for t in found.tokens}) > 1
        for row, text in enumerate(texts):
            whole = torch.tensor([text + found.tokens[row]])[:, :-1]
            with torch.no_grad():
                expected = model(whole, use_cache=True).past_key_values
            for block in range(4):
                torch.testing.assert_close(
                    rows.cache.read(block, whole.shape[1])[0][row], expected.layers[block].keys[0], rtol=1e-6, atol=1e-6
                )

    def test_reads_no_more_than_the_next_multiple(self, monkeypatch: pytest.MonkeyPatch) -> None:
        lm = attach_lm(shared("llama"), [2])
        asked: list[int] = []
        read = KVCache.read

        def spied(self: KVCache, block: int, length: int) -> tuple[Tensor, Tensor]:
            asked.append(length)
            return read(self, block, length)

        monkeypatch.setattr(KVCache, "read", spied)
        for mode, spare in ((Plain(), 0), (Accept(0.05), 0), (Verify(3), 3)):
            asked.clear()
            generate(lm, prompts((5, 13)), mode, max_new_tokens=40)
            assert asked[:4] == [16] * 4, mode  # the prompt reads itself, not what will follow
            assert all(length % 8 == 0 or length == 53 + spare for length in asked), mode
            assert asked == sorted(asked) and max(asked) <= 53 + spare, mode
            assert len(set(asked)) >= 5, mode  # it grows with the text

    def test_prefill_computes_logits_of_last_tokens_only(self) -> None:
        model = shared("llama")
        shapes: list[tuple[int, ...]] = []
        hook = model.lm_head.register_forward_hook(lambda module, given, out: shapes.append(tuple(out.shape)))
        try:
            lm = attach_lm(model, [2])
            shapes.clear()
            generate(lm, prompts((30, 4)), max_new_tokens=2)
        finally:
            hook.remove()
        assert [shape[:-1] for shape in shapes] == [(2,), (2,)]


class TestBatchMates:
    @pytest.mark.parametrize(
        "mode", [Plain(), Verify(4, exit_index=1), Verify(3, sample_drafts=False), Accept(0.05, fill=CatchUp(3), exits=(1,))]
    )
    @pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
    def test_change_nothing(self, mode: Any, options: dict[str, Any]) -> None:
        lm = attach_lm(shared("llama", torch.float64), [1, 3])
        texts, seeds = prompts(), [7, 3, 11, 5, 2, 13, 17, 19]
        together = generate(lm, texts, mode, max_new_tokens=16, seed=seeds, **options)
        for order in ([0], [3], [6, 2], [5, 4, 7, 1]):
            some = generate(lm, [texts[i] for i in order], mode, max_new_tokens=16, seed=[seeds[i] for i in order], **options)
            assert some.tokens == [together.tokens[i] for i in order]
            assert some.depth == [together.depth[i] for i in order]

    def test_seed_counts_up(self) -> None:
        lm = attach_lm(shared("llama"), [1])
        a = generate(lm, prompts((4, 4, 4)), max_new_tokens=9, seed=5, **SAMPLED).tokens
        assert a == generate(lm, prompts((4, 4, 4)), max_new_tokens=9, seed=[5, 6, 7], **SAMPLED).tokens
        assert a != generate(lm, prompts((4, 4, 4)), max_new_tokens=9, seed=6, **SAMPLED).tokens

    @pytest.mark.parametrize("mode", [Plain(), Verify(3), Accept(0.05)])
    def test_limits_do_not_change_the_beginning(self, mode: Any) -> None:
        lm = attach_lm(shared("llama"), [1])
        options = {} if isinstance(mode, Verify) else SAMPLED  # near the limit a token is drawn with other numbers than a draft
        long = generate(lm, prompts((4, 9)), mode, max_new_tokens=20, **options).tokens
        short = generate(lm, prompts((4, 9)), mode, max_new_tokens=7, **options).tokens
        assert [t[:7] for t in long] == short


class TestEnds:
    @pytest.mark.parametrize("mode", [Plain(), Verify(6), Accept(0.0, fill=CatchUp(4))])
    def test_end_token_at_any_place_of_a_run(self, mode: Any) -> None:
        model = agreeing()
        lm = attach_lm(model, [2])
        texts = prompts((5, 1, 9))
        free = generate(lm, texts, mode, max_new_tokens=16)
        for place in (0, 1, 3, 6, 8):
            end = free.tokens[0][place]
            found = generate(lm, texts, mode, max_new_tokens=16, eos_token_id=[end, VOCABULARY - 1], pad_token_id=0)
            for row, whole in enumerate(free.tokens):
                hits = [i for i, t in enumerate(whole) if t in (end, VOCABULARY - 1)]
                assert found.tokens[row] == whole[: hits[0] + 1 if hits else None]
                assert len(found.depth[row]) == len(found.tokens[row])
            own = own_greedy(model, texts, 16, eos_token_id=[end, VOCABULARY - 1], pad_token_id=0)
            assert found.sequences.equal(own)

    @pytest.mark.parametrize("new", [1, 2, 3, 4, 5, 6, 11])
    def test_limit(self, new: int) -> None:
        model = agreeing()
        lm = attach_lm(model, [2])
        expected = own_greedy(model, prompts((1, 4)), new)
        for mode in (Plain(), Verify(4), Accept(0.0, fill=CatchUp(3))):
            found = generate(lm, prompts((1, 4)), mode, max_new_tokens=new)
            assert [len(t) for t in found.tokens] == [new, new]
            assert found.sequences.equal(expected), mode

    @pytest.mark.parametrize("family", ["gpt2", "opt", "opt_350m"])
    def test_prompts_at_the_position_limit(self, family: str) -> None:
        model = shared(family)
        lm = attach_lm(model, [3])
        for length, new in ((128, 1), (127, 2), (120, 9), (120, 8)):
            texts = prompts((length,))
            expected = own_greedy(model, texts, new)
            for mode in (Plain(), Verify(5), Accept(0.0)):
                found = generate(lm, [*texts, *prompts((3,))], mode, max_new_tokens=new)
                if not isinstance(mode, Accept):
                    assert found.tokens[0] == expected[0, length:].tolist(), (length, new, mode)
                assert len(found.tokens[0]) == new
        with pytest.raises(InvalidInput, match=r"128 positions.*at most 9 new tokens"):
            generate(lm, prompts((120,)), max_new_tokens=10)

    def test_nothing_to_start_from(self) -> None:
        lm = attach_lm(shared("llama"), [3])
        for bad in ([[]], [[1, 2], []]):
            with pytest.raises(InvalidInput, match="at least one token"):
                generate(lm, bad)
        with pytest.raises(InvalidInput, match="token id 97; ids of this model are 0 to 96"):
            generate(lm, [[1, 97]])
        with pytest.raises(InvalidInput, match="max_new_tokens"):
            generate(lm, [[1]], max_new_tokens=0)
        with pytest.raises(InvalidInput, match="one for each of the 1 prompts"):
            generate(lm, [[1]], seed=[1, 2])


class TestTheUsersModel:
    @pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox", "gemma3"])
    @pytest.mark.parametrize("training", [False, True])
    def test_is_untouched_also_after_an_error(self, family: str, training: bool) -> None:
        model = build(family).train(training)
        own = {
            "config": copy.deepcopy(model.config.to_dict()),
            "generation": copy.deepcopy(model.generation_config.to_dict()),
            "attention": model.config._attn_implementation,
            "modules": [(name, id(module), module.training) for name, module in model.named_modules()],
            "parameters": [(name, id(p), p.requires_grad, p._version) for name, p in model.named_parameters()],
            "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
            "attributes": [sorted(vars(m)) for m in model.modules()],
            "forward": model.forward.__func__,
        }
        before = own_greedy(copy.deepcopy(model).eval(), prompts((5, 9)), 6)
        lm = attach_lm(model, [2])
        for mode in (Plain(), Verify(2), Accept(0.1)):
            generate(lm, prompts((5, 9)), mode, max_new_tokens=6)

        def broken(*given: Any) -> None:
            raise RuntimeError("on purpose")

        hook = model.get_output_embeddings().register_forward_hook(broken)
        for mode in (Plain(), Verify(2), Accept(0.1)):
            with pytest.raises(RuntimeError, match="on purpose"):
                generate(lm, prompts((5, 9)), mode, max_new_tokens=6)
        hook.remove()
        assert own == {
            "config": model.config.to_dict(),
            "generation": model.generation_config.to_dict(),
            "attention": model.config._attn_implementation,
            "modules": [(name, id(module), module.training) for name, module in model.named_modules()],
            "parameters": [(name, id(p), p.requires_grad, p._version) for name, p in model.named_parameters()],
            "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
            "attributes": [sorted(vars(m)) for m in model.modules()],
            "forward": model.forward.__func__,
        }
        assert own_greedy(model.eval(), prompts((5, 9)), 6).equal(before)

    def test_gradients_flow_afterwards(self) -> None:
        model = build("llama")
        generate(attach_lm(model, [2]), prompts((5,)), Verify(2), max_new_tokens=6)
        ids = torch.tensor(prompts((9,)))
        model(ids, labels=ids).loss.backward()
        assert all(p.grad is not None for p in model.parameters())

    def test_weights_are_shared(self) -> None:
        model = build("llama")
        lm = attach_lm(model, [2])
        before = generate(lm, prompts((5,)), max_new_tokens=8).tokens
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight.neg_()
        after = generate(lm, prompts((5,)), max_new_tokens=8)
        assert after.tokens != before
        assert after.sequences.equal(own_greedy(model, prompts((5,)), 8))
