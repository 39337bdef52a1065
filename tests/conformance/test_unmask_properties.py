"""What holds for every system that fills in masks: rows of `cases`, over a Llama that is run without its causal mask."""

from __future__ import annotations

import copy
import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from offramp import systems
from offramp.backbones.masked_lm import masked_lm
from offramp.core.parts import part_from_dict, part_to_dict
from offramp.engines.diffusion.unmask import Unmasked, unmask
from offramp.policies.refresh import Blocks, Elastic, EveryN, Full, PerBlock, Sliding, Unmask

sys.path.insert(0, str(Path(__file__).parent))
from cases import CASES, VOCABULARY, Case

FILLING = [c for c in CASES if systems.load_card(c.system).engine == "unmask"]
KNOWN: dict[str, type] = {c.__name__: c for c in (Full, EveryN, PerBlock, Elastic, Sliding, Blocks, Unmask)}
ROWS, NEW, MASK = 6, 16, VOCABULARY - 1

rows = pytest.mark.parametrize("case", FILLING, ids=lambda c: c.system)


def way_of(case: Case) -> Unmask:
    found: Any = systems.build(case.system, **case.kwargs).fill
    assert isinstance(found, Unmask)
    return found


def written(case: Case, way: Unmask) -> Unmasked:
    return unmask(masked_lm(case.model().double(), MASK), case.inputs(ROWS, 1), NEW, way)


@rows
def test_saves_and_reads_back(case: Case) -> None:
    assert part_from_dict(part_to_dict(way_of(case)), KNOWN) == way_of(case)


@rows
def test_refreshing_always_is_no_cache(case: Case) -> None:
    way = way_of(case)
    assert isinstance(way.refresh, Elastic)
    always = written(case, dataclasses.replace(way, refresh=dataclasses.replace(way.refresh, drift=1.01)))
    full = written(case, dataclasses.replace(way, refresh=Full()))
    assert always.tokens == full.tokens and always.steps == full.steps


@rows
def test_saves_work_and_decides_row_by_row(case: Case) -> None:
    found = written(case, way_of(case))
    assert found.share < 1 and len({tuple(r) for r in found.refreshed}) > 1, "a case in which something is decided"
    assert all(len(t) == NEW and MASK not in t for t in found.tokens)


@rows
def test_batch_mates_do_not_matter(case: Case) -> None:
    together = written(case, way_of(case))
    lm = masked_lm(case.model().double(), MASK)
    for row, prompt in enumerate(case.inputs(ROWS, 1)):
        alone = unmask(lm, [prompt], NEW, way_of(case))
        assert (alone.tokens[0], alone.refreshed[0]) == (together.tokens[row], together.refreshed[row])


@rows
def test_the_users_model_stays_what_it_was(case: Case) -> None:
    model = case.model()
    before, text = copy.deepcopy(model.state_dict()), torch.tensor([case.inputs(1, 3)[0]])
    with torch.no_grad():
        logits = model(text).logits
        unmask(masked_lm(model, MASK), case.inputs(2, 1), NEW, way_of(case))
        assert torch.equal(model(text).logits, logits)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
