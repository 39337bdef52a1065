"""The distribution that tokens are drawn from: processors against transformers', laws against exact ones."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from language_models import build
from offramp.core.errors import InvalidInput
from offramp.engines.text.generate import generate
from offramp.engines.text.sampling import Noise, Sampling, accept, draw
from offramp.language import attach_lm
from offramp.policies.decoding import Accept, Plain, Verify

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def fits(counts: Tensor, expected: Tensor) -> float:
    """Chance of counts at least so far from a distribution, by chi-square, rare outcomes together. 0 if an impossible one occurs."""
    if bool((counts[expected == 0] > 0).any()):
        return 0.0
    total = expected * counts.sum()
    common = total >= 5
    observed, wanted = counts[common].double(), total[common].double()
    if not bool(common.all()) and float(total[~common].sum()) > 0:
        observed = torch.cat([observed, counts[~common].sum().double()[None]])
        wanted = torch.cat([wanted, total[~common].sum().double()[None]])
    return float(stats.chisquare(observed.numpy(), (wanted / wanted.sum() * observed.sum()).numpy()).pvalue)


class TestProcessors:
    @pytest.mark.parametrize("top_k", [0, 1, 7, 500])
    @pytest.mark.parametrize("top_p", [1.0, 0.9, 0.2, 1e-6])
    def test_equal_transformers(self, top_k: int, top_p: float) -> None:
        for temperature, penalty in itertools.product([1.0, 0.3, 2.5], [1.0, 1.3, 0.7]):
            self.equal(temperature, top_k, top_p, penalty)

    @staticmethod
    def equal(temperature: float, top_k: int, top_p: float, penalty: float) -> None:
        from transformers import (
            LogitsProcessorList,
            RepetitionPenaltyLogitsProcessor,
            TemperatureLogitsWarper,
            TopKLogitsWarper,
            TopPLogitsWarper,
        )

        logits, text = 3 * torch.randn(6, 50), torch.randint(0, 50, (6, 12))
        theirs = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(temperature)])
        if top_k:
            theirs.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            theirs.append(TopPLogitsWarper(top_p))
        ours = Sampling(True, temperature, top_k, top_p, penalty)
        seen = torch.zeros(6, 50, dtype=torch.bool).scatter(1, text, True)
        found = ours.probabilities(ours.penalised(logits, seen))
        expected = theirs(text, logits.clone()).softmax(-1)
        assert torch.equal(found > 0, expected > 0)
        torch.testing.assert_close(found, expected)

    def test_ties_of_top_k_are_all_kept_as_in_transformers(self) -> None:
        from transformers import TopKLogitsWarper

        logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]])
        expected = TopKLogitsWarper(2)(torch.zeros(1, 1, dtype=torch.long), logits).softmax(-1)
        torch.testing.assert_close(Sampling(True, top_k=2).probabilities(logits), expected)

    def test_greedy_is_one_hot(self) -> None:
        assert Sampling(temperature=0.1).probabilities(torch.tensor([[0.0, 3.0, 3.0]])).tolist() == [[0.0, 1.0, 0.0]]

    def test_tokens_that_cannot_be_drafted_stay_impossible(self) -> None:
        logits = torch.full((1, 40), float("-inf"))
        logits[0, [3, 9]] = torch.tensor([1.0, -1.0])
        sampling = Sampling(True, 0.7, 10, 0.95, 1.2)
        seen = torch.ones(1, 40, dtype=torch.bool)
        assert sampling.probabilities(sampling.penalised(logits, seen)).nonzero()[:, 1].tolist() == [3, 9]

    def test_low_precision_is_widened(self) -> None:
        assert Sampling(True).probabilities(torch.randn(2, 9).bfloat16()).dtype == torch.float32
        assert Sampling(True).probabilities(torch.randn(2, 9).double()).dtype == torch.float64

    @pytest.mark.parametrize(
        "bad",
        [{"temperature": 0.0}, {"temperature": -1}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.01}, {"repetition_penalty": 0.0}],
    )
    def test_out_of_range(self, bad: dict[str, Any]) -> None:
        with pytest.raises(InvalidInput, match=next(iter(bad))):
            Sampling(**bad)


class TestDraw:
    def test_edges(self) -> None:
        p = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]]).expand(6, -1)
        below = 1 - 2.0**-53
        noise = torch.tensor([0.0, 0.2499, 0.25, 0.5, below, below], dtype=torch.float64)
        assert draw(p, noise).tolist() == [1, 1, 3, 3, 3, 3]

    def test_never_impossible(self) -> None:
        p = torch.rand(2000, 30).pow(8) * (torch.rand(2000, 30) < 0.3)
        p[:, 4] += 1e-30
        chosen = draw(p, torch.rand(2000, dtype=torch.float64))
        assert bool((p.gather(1, chosen[:, None]) > 0).all())

    def test_law(self) -> None:
        p = torch.tensor([0.1, 0.0, 0.35, 0.05, 0.5])
        chosen = draw(p.expand(20000, -1), torch.rand(20000, dtype=torch.float64))
        assert fits(torch.bincount(chosen, minlength=5), p) > 1e-3


class TestNoise:
    def test_depends_on_the_seed_and_position_alone(self) -> None:
        short, long = Noise.of([3, 9], 5, torch.device("cpu")), Noise.of([9, 4, 3], 200, torch.device("cpu"))
        assert short.values[0].equal(long.values[2, :5]) and short.values[1].equal(long.values[0, :5])
        positions = torch.tensor([[4, 0], [1, 2]])
        for purpose in range(3):
            assert short.at(positions, purpose).equal(
                torch.stack([short.values[0, [4, 0], purpose], short.values[1, [1, 2], purpose]]),
            )

    def test_purposes_and_rows_differ(self) -> None:
        values = Noise.of(list(range(200)), 50, torch.device("cpu")).values
        assert values.unique().numel() == values.numel()
        assert bool((values >= 0).all() and (values < 1).all())
        assert float(torch.corrcoef(values.flatten(0, 1).T).fill_diagonal_(0).abs().max()) < 0.05


P = torch.tensor([[0.5, 0.2, 0.3, 0.0], [0.1, 0.1, 0.2, 0.6], [0.25, 0.25, 0.25, 0.25]])
Q = torch.tensor([[0.2, 0.2, 0.1, 0.5], [0.6, 0.1, 0.2, 0.1]])


class TestAccept:
    @staticmethod
    def tokens(drafted: Tensor, greedy: bool, rows: int = 30000) -> tuple[Tensor, Tensor, Tensor]:
        """First tokens, second tokens where there is one, and which rows have one, of rounds of two drafts."""
        u = torch.rand(rows, 7, dtype=torch.float64)
        tried = Q.argmax(-1).expand(rows, -1) if greedy else torch.stack([draw(Q[k].expand(rows, -1), u[:, k]) for k in range(2)], 1)
        counts = torch.full((rows,), 2)
        kept, after = accept(tried, drafted.expand(rows, -1, -1), P.expand(rows, -1, -1), counts, u[:, 2:4], u[:, 4:7])
        written = torch.cat([tried, after[:, None]], 1).scatter(1, kept[:, None], after[:, None])
        return written[:, 0], written[kept >= 1, 1], written[kept >= 2, 2]

    @pytest.mark.parametrize("greedy", [False, True])
    def test_law(self, greedy: bool) -> None:
        drafted = torch.nn.functional.one_hot(Q.argmax(-1), 4).float() if greedy else Q
        first, second, third = self.tokens(drafted, greedy)
        assert fits(torch.bincount(first, minlength=4), P[0]) > 1e-3
        if not greedy:  # the greedy first draft is impossible under P, so nothing follows it
            assert fits(torch.bincount(second, minlength=4), P[1]) > 1e-3
            assert fits(torch.bincount(third, minlength=4), P[2]) > 1e-3
            assert len(third) > 1000

    def test_likeliest_drafts_verified_as_if_drawn_would_be_found_out(self) -> None:
        """The mistake of a published code base: drafts without chance, judged by the distribution they were not drawn from."""
        first, second, _ = self.tokens(Q, True)
        assert fits(torch.bincount(first, minlength=4), P[0]) < 1e-9 or fits(torch.bincount(second, minlength=4), P[1]) < 1e-9

    def test_greedy_keeps_while_equal(self) -> None:
        wanted = torch.nn.functional.one_hot(torch.tensor([[2, 1, 3], [2, 0, 3], [1, 1, 1], [2, 1, 0]]), 4).float()
        drafts = torch.tensor([[2, 1]]).expand(4, -1)
        u = torch.zeros(4, 3)
        drafted = torch.nn.functional.one_hot(drafts, 4).float()
        kept, after = accept(drafts, drafted, wanted, torch.tensor([2, 2, 2, 1]), u[:, :2], u)
        assert kept.tolist() == [2, 1, 0, 1] and after.tolist() == [3, 0, 1, 1]

    def test_rows_without_drafts_draw_from_the_model(self) -> None:
        rows = 20000
        wanted = P.expand(rows, -1, -1)
        u = torch.rand(rows, 7, dtype=torch.float64)
        tried = torch.zeros(rows, 2, dtype=torch.long)
        kept, after = accept(tried, Q.expand(rows, -1, -1), wanted, torch.zeros(rows, dtype=torch.long), u[:, :2], u[:, 2:5])
        assert not kept.any() and fits(torch.bincount(after, minlength=4), P[0]) > 1e-3
        kept, after = accept(tried[:, :0], Q[:0].expand(rows, -1, -1), wanted, kept, u[:, :0], u[:, 2:5])
        assert not kept.any() and fits(torch.bincount(after, minlength=4), P[0]) > 1e-3


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"top_k": 0},
    "temperature": {"top_k": 0, "temperature": 0.6},
    "top_k": {"top_k": 3},
    "top_p": {"top_k": 0, "top_p": 0.8},
    "penalty": {"top_k": 0, "repetition_penalty": 1.8},
    "all": {"temperature": 1.4, "top_k": 4, "top_p": 0.9, "repetition_penalty": 1.4},
}
MODES: dict[str, Any] = {
    "plain": Plain(),
    "drawn": Verify(2),
    "likeliest": Verify(2, sample_drafts=False),
    "never_leaving": Accept(1.1),
}
ROWS, NEW, SMALL = 3000, 4, 5
PROMPT = [1, 3]


@pytest.fixture(scope="module")
def small() -> Any:
    model = build("llama", vocab_size=SMALL, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    return model


def law(model: Any, options: dict[str, Any]) -> Tensor:
    """Exact distribution ``[V, V, ...]`` of the new tokens."""
    from transformers import (
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    chance = torch.ones(1, dtype=torch.float64)
    for length in range(NEW):
        texts = torch.tensor([[*PROMPT, *tail] for tail in itertools.product(range(SMALL), repeat=length)])
        with torch.no_grad():
            logits = model(texts).logits[:, -1].float()
        logits = RepetitionPenaltyLogitsProcessor(options.get("repetition_penalty", 1.0))(texts, logits)
        logits = TemperatureLogitsWarper(float(options.get("temperature", 1.0)))(texts, logits)
        if options["top_k"]:
            logits = TopKLogitsWarper(options["top_k"])(texts, logits)
        logits = TopPLogitsWarper(options.get("top_p", 1.0))(texts, logits)
        chance = (chance[:, None] * logits.double().softmax(-1)).flatten()
    return chance


class TestLaws:
    @pytest.mark.parametrize(
        ("options", "mode"), [(o, m) for o in SETTINGS for m in MODES if m in ("drawn", "likeliest") or o in ("plain", "all")]
    )
    def test_of_whole_texts(self, small: Any, options: str, mode: str) -> None:
        expected = law(small, SETTINGS[options])
        lm = attach_lm(small, [2])
        found = generate(lm, [PROMPT] * ROWS, MODES[mode], max_new_tokens=NEW, do_sample=True, seed=1000, **SETTINGS[options])
        power = SMALL ** torch.arange(NEW - 1, -1, -1)
        counts = torch.bincount((torch.tensor(found.tokens) * power).sum(1), minlength=SMALL**NEW)
        assert fits(counts, expected) > 1e-3
        if isinstance(MODES[mode], Verify):  # drafts of both fates, or nothing was tried
            assert 0.02 < found.acceptance < 0.98

    def test_settings_differ(self, small: Any) -> None:
        """The laws are far enough apart for the test above to tell them from each other."""
        lm = attach_lm(small, [2])
        found = generate(lm, [PROMPT] * ROWS, Verify(2), max_new_tokens=NEW, do_sample=True, seed=1000, **SETTINGS["plain"])
        counts = torch.bincount((torch.tensor(found.tokens) * SMALL ** torch.arange(NEW - 1, -1, -1)).sum(1), minlength=SMALL**NEW)
        for name, options in SETTINGS.items():
            if name != "plain":
                assert fits(counts, law(small, options)) < 1e-6, name
