"""Masked diffusion: what is hidden, what it weighs, and that a small model learns to fill in a text."""

from __future__ import annotations

import math

import pytest
import torch

from masked_models import MASK, looking_both_ways
from offramp.backbones.masked_lm import masked_lm
from offramp.core.errors import InvalidInput
from offramp.engines.diffusion.unmask import unmask
from offramp.policies.refresh import Sliding, Unmask
from offramp.train.masked_text import LEAST_SHARE, fit_masked, hide, masked_diffusion_loss

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TestHide:
    def test_each_text_has_its_own_share(self) -> None:
        tokens = torch.randint(3, 90, (6, 5000), generator=generator())
        given = hide(tokens, MASK, generator(1))
        assert len(given.share.unique()) == 6 and ((given.share >= LEAST_SHARE) & (given.share <= 1)).all()
        torch.testing.assert_close(given.hidden.float().mean(1), given.share, atol=0.03, rtol=0)
        assert (given.tokens[given.hidden] == MASK).all() and torch.equal(given.tokens[~given.hidden], tokens[~given.hidden])

    def test_shares_are_uniform_and_stratified_ones_evenly_so(self) -> None:
        tokens = torch.zeros(4, 1, dtype=torch.int64)
        for stratified in (False, True):
            source = generator(2)
            drawn = torch.stack([hide(tokens, MASK, source, stratified=stratified).share for _ in range(2000)])
            for column in drawn.T:
                counts = torch.histc(column, 5, 0, 1) / len(column)
                assert (counts - 0.2).abs().max() < 0.04
            spread = drawn.sort(1).values.diff(dim=1)
            assert (spread.std() < 1e-4) == stratified

    def test_prompts_are_never_hidden(self) -> None:
        tokens = torch.randint(3, 90, (2, 10), generator=generator())
        answer = torch.arange(10) >= torch.tensor([[4], [0]])
        given = hide(tokens, MASK, generator(), answer, share=torch.ones(2))
        assert torch.equal(given.hidden, answer) and torch.equal(given.tokens[0, :4], tokens[0, :4])


class TestLoss:
    def test_known_answer(self) -> None:
        """Two of four hidden at t = 0.4, under a uniform guess among 8: (1 / (0.4 * 4)) * 2 log 8; with a prompt of two, n is 2."""
        tokens = torch.tensor([[1, 2, 3, 4]])
        given = hide(tokens, 7, generator(), share=torch.tensor([0.4]))
        given = type(given)(torch.tensor([[1, 2, 7, 7]]), torch.tensor([[False, False, True, True]]), given.share)
        loss = masked_diffusion_loss(torch.zeros(1, 4, 8), tokens, given)
        assert loss.item() == pytest.approx(2 * math.log(8) / (0.4 * 4))
        behind = torch.tensor([[False, False, True, True]])
        assert masked_diffusion_loss(torch.zeros(1, 4, 8), tokens, given, behind).item() == pytest.approx(2 * math.log(8) / (0.4 * 2))

    def test_the_mean_does_not_depend_on_how_much_is_hidden(self) -> None:
        """What a model that sees nothing should be charged is the entropy of its guess, at any t."""
        tokens = torch.randint(8, (4000, 16), generator=generator())
        logits = torch.log(torch.tensor([0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05])).expand(4000, 16, 8)
        expected = -logits[0, 0].mean().item()  # tokens are uniform
        for share in (0.1, 0.5, 1.0):
            given = hide(tokens, 7, generator(3), share=torch.full((4000,), share))
            assert masked_diffusion_loss(logits, tokens, given).mean().item() == pytest.approx(expected, rel=0.03)


class TestFit:
    def test_learns_to_fill_in(self) -> None:
        """Texts count up in steps of one or of three: which of them shows in the first two tokens."""
        model = looking_both_ways("llama", torch.float32, num_hidden_layers=2)
        start = torch.arange(20)[:, None]
        blocks = torch.cat([5 + (start + step * torch.arange(12)) % 20 for step in (1, 3)])
        losses = fit_masked(model, blocks, MASK, steps=220, batch_size=32, learning_rate=1e-2, prefix=0.5)
        assert sum(losses[-20:]) < 0.3 * sum(losses[:20])
        lm = masked_lm(model, MASK)
        found = unmask(lm, blocks[::5, :4].tolist(), 8, Unmask(order=Sliding(4)))
        wanted = blocks[::5, 4:].tolist()
        right = sum(a == b for x, y in zip(found.tokens, wanted, strict=True) for a, b in zip(x, y, strict=True))
        assert right >= 0.8 * 8 * len(wanted)

    def test_the_same_again(self) -> None:
        blocks = torch.randint(5, 25, (8, 10), generator=generator())
        first, second = (fit_masked(looking_both_ways("Bert", torch.float32), blocks, MASK, steps=3, batch_size=4) for _ in range(2))
        assert first == second and len(first) == 3

    def test_refused(self) -> None:
        model = looking_both_ways("llama", torch.float32)
        with pytest.raises(InvalidInput, match=f"mask token {MASK} occurs"):
            fit_masked(model, torch.full((2, 4), MASK), MASK, steps=1)
        with pytest.raises(InvalidInput, match="whole"):
            fit_masked(model, torch.zeros(2, 4), MASK, steps=1)
        with pytest.raises(InvalidInput, match="prefix in"):
            fit_masked(model, torch.ones(2, 4, dtype=torch.int64), MASK, steps=1, prefix=1.5)
