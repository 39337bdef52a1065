"""Filling in masks on CUDA: the same text, steps and refreshes as on the CPU, in double precision."""

from __future__ import annotations

import pytest
import torch

from language_models import prompts
from masked_models import MASK, looking_both_ways
from offramp.backbones.masked_lm import masked_lm
from offramp.engines.diffusion.unmask import unmask
from offramp.policies.refresh import Blocks, Elastic, EveryN, Full, PerBlock, Sliding, Unmask
from offramp.train.masked_text import fit_masked

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

WAYS = [
    Unmask(Full(), Sliding(5), 0.055),
    Unmask(EveryN(3), Sliding(5), 0.055),
    Unmask(PerBlock(), Blocks(6), 0.055),
    Unmask(Elastic(0.995), Sliding(5), 0.055),
]


@pytest.mark.parametrize("way", WAYS, ids=lambda w: str(w.refresh))
@pytest.mark.parametrize("family", ["llama", "Bert"])
def test_the_cpus_text(family: str, way: Unmask) -> None:
    given = prompts((5, 1, 17, 9))
    here, there = (unmask(masked_lm(looking_both_ways(family).to(device), MASK), given, 18, way) for device in ("cpu", "cuda"))
    assert (there.tokens, there.refreshed, there.pairs) == (here.tokens, here.refreshed, here.pairs)


def test_training() -> None:
    blocks = torch.randint(5, 25, (8, 10), generator=torch.Generator().manual_seed(0))
    here, there = (fit_masked(looking_both_ways("llama").to(d), blocks, MASK, steps=5, batch_size=4, prefix=0.5) for d in ("cpu", "cuda"))
    torch.testing.assert_close(torch.tensor(there), torch.tensor(here), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_writes(dtype: torch.dtype) -> None:
    lm = masked_lm(looking_both_ways("llama", dtype).cuda(), MASK)
    found = unmask(lm, prompts((5, 9)), 18, WAYS[-1])
    assert all(len(t) == 18 and MASK not in t for t in found.tokens)
