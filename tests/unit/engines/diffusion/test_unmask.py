"""Filling in masks: against the user's own forward, against a drift test written out, and row by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from language_models import prompts
from masked_models import MASK, looking_both_ways
from offramp.backbones.masked_lm import MaskedLM, bidirectional, masked_lm
from offramp.core.errors import InvalidInput
from offramp.core.flops import counter
from offramp.engines.diffusion.unmask import Unmasked, unmask
from offramp.policies.refresh import Blocks, Elastic, EveryN, Full, PerBlock, Sliding, Unmask

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

SURE = 0.055  # so that these random models fill in several at a step, but rarely all
NEW = 18


@pytest.fixture(scope="module", params=["llama", "gpt2", "Bert"])
def lm(request: Any) -> MaskedLM:
    return masked_lm(looking_both_ways(request.param), MASK)


@pytest.fixture(scope="module")
def llama() -> MaskedLM:
    return masked_lm(looking_both_ways("llama"), MASK)


WAYS = [
    Unmask(Full(), Sliding(5), SURE),
    Unmask(Full(), Blocks(6), SURE),
    Unmask(EveryN(3), Sliding(5), SURE),
    Unmask(PerBlock(), Blocks(6), SURE),
    Unmask(PerBlock(suffix=True), Blocks(6), SURE),
    Unmask(Elastic(0.98), Sliding(5), SURE),
    Unmask(Elastic(0.98, fresh=True), Sliding(5), SURE),
    Unmask(Elastic(0.99, rolling=True), Sliding(5), SURE),
    Unmask(Elastic(0.995), Blocks(6), SURE),
]


def names(way: Unmask) -> str:
    return f"{way.refresh}-{way.order}"


def by_the_users_forward(lm: MaskedLM, prompt: list[int], way: Unmask, ends: tuple[int, ...] = ()) -> tuple[list[int], int]:
    """New tokens and steps of one text, its whole forward at every step."""
    text, steps = torch.tensor(prompt + [MASK] * NEW), 0
    while True:
        masked = [i for i in range(len(prompt), len(text)) if text[i] == MASK]
        ended = [i for i in range(len(prompt), len(text)) if int(text[i]) in ends]
        masked = [i for i in masked if not ended or i < ended[0]]
        if not masked:
            new = text[len(prompt) :].tolist()
            return (new[: ended[0] - len(prompt) + 1] if ended else new), steps
        if isinstance(way.order, Sliding):
            candidates = masked[: way.order.size]
        else:
            block = (masked[0] - len(prompt)) // way.order.size
            candidates = [i for i in masked if (i - len(prompt)) // way.order.size == block]
        with torch.no_grad():
            logits = bidirectional(lm.model, text[None])[0].float()
        logits[:, MASK] = float("-inf")
        sure, token = logits.softmax(-1).max(-1)
        best = max(candidates, key=lambda i: float(sure[i]))
        for i in candidates:
            if float(sure[i]) >= way.confidence or i == best:
                text[i] = token[i]
        steps += 1


class TestFull:
    @pytest.mark.parametrize("way", WAYS[:2], ids=names)
    def test_is_the_users_own_forward_at_every_step(self, lm: MaskedLM, way: Unmask) -> None:
        given = prompts((5, 1, 9))
        found = unmask(lm, given, NEW, way)
        assert [(t, s) for t, s in zip(found.tokens, found.steps, strict=True)] == [by_the_users_forward(lm, p, way) for p in given]
        assert 1 < found.steps[0] < NEW and all(len(t) == NEW and MASK not in t for t in found.tokens)
        assert found.share == found.flops_share == found.refresh_rate == 1.0
        assert found.refreshed == [[0] * steps for steps in found.steps]

    def test_ends(self, lm: MaskedLM) -> None:
        given = prompts((5, 1, 9))
        way = Unmask(Full(), Sliding(5), SURE)
        ends = tuple({row[NEW // 2] for row in unmask(lm, given, NEW, way).tokens})
        found = unmask(lm, given, NEW, way, ends=ends)
        assert [(t, s) for t, s in zip(found.tokens, found.steps, strict=True)] == [by_the_users_forward(lm, p, way, ends) for p in given]
        assert any(len(t) < NEW for t in found.tokens)


class TestRefreshingAlways:
    @pytest.mark.parametrize("refresh", [EveryN(1), Elastic(1.01)], ids=str)
    @pytest.mark.parametrize("order", [Sliding(5), Blocks(6)], ids=str)
    def test_is_full_token_for_token(self, lm: MaskedLM, refresh: Any, order: Any) -> None:
        given = prompts((5, 1, 9, 4))
        full, found = (unmask(lm, given, NEW, Unmask(r, order, SURE)) for r in (Full(), refresh))
        assert found.tokens == full.tokens and found.steps == full.steps
        again = 1 if isinstance(refresh, Elastic) else 0  # keys and values of the first block are never stale
        assert found.refreshed == [[0] + [again] * (steps - 1) for steps in full.steps]

    def test_one_block_has_nothing_stale_behind_it(self) -> None:
        one = masked_lm(looking_both_ways("llama", num_hidden_layers=1), MASK)
        full, never = (unmask(one, prompts((5, 9)), NEW, Unmask(r, Sliding(4), SURE)) for r in (Full(), Elastic(-2.0)))
        assert never.tokens == full.tokens and never.share < 0.7

    def test_never_refreshing_is_something_else(self, llama: MaskedLM) -> None:
        given = prompts((5, 9, 7, 12))
        full, never = (unmask(llama, given, NEW, Unmask(r, Sliding(4), SURE)) for r in (Full(), Elastic(-2.0)))
        assert never.tokens != full.tokens
        assert never.refreshed == [[0] + [4] * (steps - 1) for steps in never.steps] and never.refresh_rate == 0


@pytest.mark.parametrize("way", WAYS, ids=names)
class TestRows:
    def test_batch_mates_do_not_matter(self, llama: MaskedLM, way: Unmask) -> None:
        """Rows of unlike prompts, that refresh and finish at unlike times."""
        given = prompts((5, 1, 17, 9, 3))
        together = unmask(llama, given, NEW, way)
        assert len(set(together.steps)) > 1
        for row, prompt in enumerate(given):
            alone = unmask(llama, [prompt], NEW, way)
            for name in ("tokens", "steps", "refreshed", "pairs", "full_pairs", "flops", "full_flops"):
                assert getattr(alone, name)[0] == getattr(together, name)[row], name

    def test_what_is_reported_is_what_ran(self, llama: MaskedLM, way: Unmask, monkeypatch: pytest.MonkeyPatch) -> None:
        """One row, so that nothing is padded: positions that blocks were given, and FLOPs counted by operator."""
        ran: list[int] = []
        own = MaskedLM.run

        def run(self: MaskedLM, hidden: Tensor, index: int, call: Any) -> Tensor:
            ran.append(hidden.shape[0] * hidden.shape[1])
            return own(self, hidden, index, call)

        monkeypatch.setattr(MaskedLM, "run", run)
        with counter() as counted:
            found = unmask(llama, prompts((9,)), NEW, way)
        assert sum(ran) == found.pairs[0]
        assert counted.get_total_flops() == found.flops[0]
        assert found.full_pairs[0] == found.steps[0] * (9 + NEW) * 4 and 0.2 < found.share < 1.2
        assert found.cache_bytes > 0


class Written:
    """The drift test of one row, written out with the modules of a Llama and whole attention maps."""

    def __init__(self, model: Any, drift: float, rolling: bool, fresh: bool) -> None:
        self.rolling, self.fresh = rolling, fresh
        self.model, self.drift, self.blocks = model, drift, list(model.model.layers)
        self.states: list[Tensor] = []  # before each block
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.tracked: list[int] = [0] * len(self.blocks)
        self.asking: list[Tensor | None] = [None] * len(self.blocks)
        self.reference: list[Tensor | None] = [None] * len(self.blocks)
        self.refreshed: list[int] = []

    def attended(self, k: int, query: Tensor) -> Tensor:
        """Attention ``[H, n, T]`` of queries ``[H, n, D]`` over the keys of block k."""
        attention = self.blocks[k].self_attn
        keys = self.keys[k].repeat_interleave(attention.num_key_value_groups, 0)
        return (query @ keys.transpose(1, 2) * attention.scaling).softmax(-1)

    def block(self, k: int, places: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Run block k at places; returns its states there, its head-mean attention map ``[len(places), T]`` and its queries."""
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        layer, attention = self.blocks[k], self.blocks[k].self_attn
        hidden = self.states[k][places][None]
        normed = layer.input_layernorm(hidden)
        query, key, value = (
            project(normed).view(1, len(places), -1, attention.head_dim).transpose(1, 2)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *self.model.model.rotary_emb(hidden, torch.tensor([places])))
        self.keys[k][:, places], self.values[k][:, places] = key[0], value[0]
        weights = self.attended(k, query[0])
        mixed = (weights @ self.values[k].repeat_interleave(attention.num_key_value_groups, 0)).transpose(0, 1).reshape(1, len(places), -1)
        hidden = hidden + attention.o_proj(mixed)
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return hidden[0], weights.mean(0), query[0]

    def step(self, text: Tensor, candidates: list[int], need: list[int]) -> Tensor:
        """Logits of the candidates."""
        length, embedded = len(text), self.model.model.embed_tokens(text)
        everything = list(range(length))
        if not self.states:
            config = self.model.config
            shape = (config.num_key_value_heads, length, self.blocks[0].self_attn.head_dim)
            self.states = [torch.zeros_like(embedded) for _ in range(len(self.blocks) + 1)]
            self.keys, self.values = ([torch.zeros(shape, dtype=embedded.dtype) for _ in self.blocks] for _ in range(2))
            origin, places = 0, everything
        else:
            origin, places = len(self.blocks), sorted({*candidates, *need, *(self.tracked[:-1] if self.fresh else ())})
        self.states[0][places] = embedded[places]
        for k in range(len(self.blocks)):
            after, weights, query = self.block(k, places)
            if places != everything and k < len(self.blocks) - 1:
                now = weights[places.index(self.tracked[k])] if self.fresh else self.attended(k, self.asking[k])[:, 0].mean(0)
                then, self.reference[k] = self.reference[k], now if self.rolling else self.reference[k]
                if not F.cosine_similarity(now, then, dim=0) >= self.drift:
                    places, origin = everything, k + 1
                    after, weights, query = self.block(k, places)
            if places == everything:
                written = [i for i in everything if text[i] != MASK]
                self.tracked[k] = max(written, key=lambda i: float(weights[candidates][:, i].sum()))
                self.reference[k] = weights[self.tracked[k]]
                self.asking[k] = query[:, self.tracked[k], None]
            self.states[k + 1][places] = after
        self.refreshed.append(origin)
        return self.model.lm_head(self.model.model.norm(self.states[-1][candidates]))


@pytest.mark.parametrize("fresh", [False, True], ids=["kept queries", "fresh"])
@pytest.mark.parametrize("rolling", [False, True], ids=["since refresh", "rolling"])
@pytest.mark.parametrize("drift", [0.9, 0.98, 0.995])
@pytest.mark.parametrize("prompt", prompts((5, 12)), ids=len)
def test_drift_is_tested_as_written_out(llama: MaskedLM, drift: float, prompt: list[int], rolling: bool, fresh: bool) -> None:
    text = torch.tensor(prompt + [MASK] * NEW)
    other, recent, size = Written(llama.model, drift, rolling, fresh), [], 5
    with torch.no_grad():
        while MASK in text:
            candidates = [i for i in range(len(text)) if text[i] == MASK][:size]
            logits = other.step(text, candidates, recent).float()
            logits[:, MASK] = float("-inf")
            sure, token = logits.softmax(-1).max(-1)
            recent = [i for n, i in enumerate(candidates) if sure[n] >= SURE or n == int(sure.argmax())]
            for n, i in enumerate(candidates):
                if i in recent:
                    text[i] = token[n]
    found = unmask(llama, [prompt], NEW, Unmask(Elastic(drift, rolling, fresh), Sliding(size), SURE))
    assert found.refreshed[0] == other.refreshed and found.tokens[0] == text[len(prompt) :].tolist()
    if drift == 0.995:
        assert len(set(found.refreshed[0])) > 2, "a case in which rows drift at unlike blocks"


class TestFastDLLM:
    def test_everything_is_computed_when_a_block_begins(self, llama: MaskedLM) -> None:
        found = unmask(llama, prompts((7, 2)), NEW, Unmask(PerBlock(), Blocks(6), 2.0))
        assert found.steps == [NEW, NEW] and found.refreshed == [[0, 4, 4, 4, 4, 4] * 3] * 2
        assert found.pairs == [4 * 3 * (total + 5 * 6) for total in (7 + NEW, 2 + NEW)]

    def test_the_suffix_too(self, llama: MaskedLM) -> None:
        found = unmask(llama, prompts((7,)), NEW, Unmask(PerBlock(suffix=True), Blocks(6), 2.0))
        assert found.pairs == [4 * sum(7 + NEW + 5 * (NEW - 6 * block) for block in range(3))]


class TestCounts:
    def test_one_at_a_step_above_one(self, llama: MaskedLM) -> None:
        found = unmask(llama, prompts((4, 4)), 7, Unmask(Full(), Sliding(3), 1.5))
        assert found.steps == [7, 7] and found.tokens_per_step == 1.0

    def test_all_candidates_at_once(self, llama: MaskedLM) -> None:
        assert unmask(llama, prompts((4,)), 7, Unmask(Full(), Sliding(3), 1e-9)).steps == [3]

    def test_nothing_was_written(self) -> None:
        empty = Unmasked([], 2)
        assert empty.share == empty.flops_share == empty.tokens_per_step == empty.refresh_rate == 0.0


def test_a_model_in_training_is_given_back_so_and_dropout_is_off() -> None:
    model = looking_both_ways("Bert", torch.float32, hidden_dropout_prob=0.5).train()
    lm = masked_lm(model, MASK)
    first, second = (unmask(lm, prompts((5,)), 8) for _ in range(2))
    assert model.training and first.tokens == second.tokens


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (([], 4), "at least one token"),
        (([[3], []], 4), "at least one token"),
        (([[3]], 0), "gen_length must be at least 1"),
        (([[3, 97]], 4), "Prompt 0 has token ids outside"),
        (([[3]], 4, Elastic()), "way must be Unmask"),
    ],
)
def test_refused(llama: MaskedLM, arguments: tuple[Any, ...], said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        unmask(llama, *arguments)


def test_refused_for_a_reason_of_the_model(llama: MaskedLM) -> None:
    with pytest.raises(InvalidInput, match="cannot end a row"):
        unmask(llama, [[3]], 4, ends=[MASK])
    short = masked_lm(looking_both_ways("Bert", max_position_embeddings=16), MASK)
    with pytest.raises(InvalidInput, match="more than the 16 positions"):
        unmask(short, [[3] * 10], 7)
