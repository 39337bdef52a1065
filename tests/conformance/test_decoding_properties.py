"""What DESIGN promises of every way of writing text: each language-model row of `cases`, attached and run, with bad drafts."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from offramp import systems
from offramp.core.errors import FingerprintMismatch, InvalidInput
from offramp.core.system import System
from offramp.engines.text.generate import generate
from offramp.language import LanguageModel, attach_lm, load_lm
from offramp.network import attach
from offramp.policies.decoding import Accept, Adapting, Copy, Decaying, Plain, Scheduled, Verify, Way

sys.path.insert(0, str(Path(__file__).parent))
from cases import BLOCKS, CASES, Case

TEXT = [c for c in CASES if systems.load_card(c.system).engine == "generate"]
NEW = 20


class Ready:
    """A row, attached, its heads stirred so that they draft badly but not always wrongly."""

    def __init__(self, case: Case) -> None:
        self.system: System = systems.build(case.system, **case.kwargs)
        self.model = case.model()
        self.before = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.lm: LanguageModel = attach_lm(self.model, system=self.system)
        torch.manual_seed(1)
        with torch.no_grad():
            for p in self.lm.heads.parameters():
                p.add_(0.1 * torch.randn_like(p))
        self.prompts = case.inputs(3, 1)
        self.plain = self.write(Plain())

    def write(self, way: Way, prompts: Any = None, **options: Any) -> Any:
        return generate(self.lm, prompts or self.prompts, way, max_new_tokens=NEW, do_sample=False, eos_token_id=[], **options)

    def way(self) -> Way:
        """As the system says, its numbers such that some tokens leave and some do not."""
        if self.system.rule is None or isinstance(self.system.threshold, Adapting):
            return systems.way(self.system)
        scores = torch.tensor(self.write(self.never()).scores)[:, 1:]  # of the last exit
        return systems.way(self.system, float(scores.quantile(0.6)))

    def never(self) -> Way:
        """The system's way with a threshold that no score reaches."""
        if isinstance(self.system.threshold, Adapting):
            return dataclasses.replace(systems.way(self.system), threshold=math.inf)
        return systems.way(self.system, math.inf)


@pytest.fixture(scope="module")
def ready():
    made: dict[str, Ready] = {}
    return lambda case: made.get(case.system) or made.setdefault(case.system, Ready(case))


rows = pytest.mark.parametrize("case", TEXT, ids=lambda c: c.system)
lossless = pytest.mark.parametrize("case", [c for c in TEXT if systems.load_card(c.system).lossless], ids=lambda c: c.system)
leaving = pytest.mark.parametrize("case", [c for c in TEXT if systems.build(c.system).rule is not None], ids=lambda c: c.system)


def test_every_kind_of_way_has_a_row() -> None:
    kinds = {type(systems.way(s, 0.5 if s.threshold is None and s.rule else None)) for s in (systems.build(c.system) for c in TEXT)}
    assert kinds == {Verify, Accept, Scheduled}


@rows
def test_exits_are_where_the_system_puts_them(case: Case, ready) -> None:
    found = ready(case)
    expected = {"layerskip": range(1, BLOCKS), "calm": range(1, BLOCKS), "kangaroo": [1], "eesd": [1], "skipdecode": [], "ee-llm": [2, 4]}
    expected |= {"free": [2], "sorted-llama": [2, 3, 4, 5, 6, 7], "self-supervised-early-exits": [2, 3, 5, 6]}
    assert found.lm.exits == tuple(expected[case.system])
    if isinstance(found.way(), Verify):
        assert 0 <= found.way().exit_index < len(found.lm.exits)


@lossless
@pytest.mark.parametrize("batch", [1, 3])
def test_lossless_means_the_same_tokens(case: Case, batch: int, ready) -> None:
    """Rows of different lengths, drafts that are mostly wrong."""
    found = ready(case)
    written = found.write(found.way(), found.prompts[:batch])
    assert written.tokens == found.plain.tokens[:batch]
    assert sum(written.drafted) > 0 and written.acceptance < 0.9


@lossless
def test_drafts_that_are_always_right_are_all_kept(case: Case, ready) -> None:
    """With blocks behind the exit that add nothing and a head like the model's, the exit is the model."""
    system = ready(case).system
    model = case.model()
    way = systems.way(system)
    lm = attach_lm(model, system=system)
    depth = lm.exits[way.exit_index]
    with torch.no_grad():
        for block in model.model.layers[depth:]:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        for name, p in lm.heads[way.exit_index].named_parameters():
            if "o_proj" in name or "down_proj" in name:  # a block that is an exit adds nothing either
                p.zero_()
    prompts = case.inputs(3, 2)
    settings: Any = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": []}
    written = generate(lm, prompts, way, **settings)
    assert written.tokens == generate(lm, prompts, Plain(), **settings).tokens
    assert written.accepted == written.drafted and written.deep_passes < NEW


@leaving
def test_never_leaving_is_plain_decoding(case: Case, ready) -> None:
    found = ready(case)
    written = found.write(found.never())
    assert written.tokens == found.plain.tokens
    assert all(d == BLOCKS for row in written.depth for d in row)


@leaving
def test_always_leaving_is_the_first_exit(case: Case, ready) -> None:
    found = ready(case)
    way = dataclasses.replace(found.never(), threshold=-math.inf)
    written = found.write(way)
    assert all(d == found.lm.exits[0] for row in written.depth for d in row[1:])  # the prompt's pass is a whole one


@leaving
def test_some_leave_and_are_judged(case: Case, ready) -> None:
    found = ready(case)
    way = found.way()
    if isinstance(way.threshold, Adapting):  # random weights are never as sure as its grid
        way = dataclasses.replace(way, threshold=float(torch.tensor(found.write(way).scores)[:, 1:].median()))
    written = found.write(way)
    early = sum(d < BLOCKS for row in written.depth for d in row)
    assert 0 < early < 3 * NEW
    if not isinstance(way.fill, Copy):
        assert written.audited == early and 0 <= written.disagreed <= early


@rows
def test_batch_mates_do_not_matter(case: Case, ready) -> None:
    found = ready(case)
    way = found.way()
    together = found.write(way, seed=[5, 6, 7])
    for row, prompt in enumerate(found.prompts):
        alone = found.write(way, [prompt], seed=[5 + row])
        assert alone.tokens[0] == together.tokens[row] and alone.depth[0] == together.depth[row]


def test_a_schedule_runs_what_it_says(ready) -> None:
    found = ready(next(c for c in TEXT if c.system == "skipdecode"))
    way = found.way()
    written = found.write(way)
    assert all(d == len(way.schedule.executed(t, NEW)) for row in written.depth for t, d in enumerate(row) if t)
    assert written.blocks_share < 0.7


@rows
def test_saved_and_loaded_heads_write_the_same(case: Case, ready, tmp_path: Path) -> None:
    found = ready(case)
    found.lm.save(tmp_path)
    again = load_lm(case.model(), tmp_path)
    assert again.exits == found.lm.exits and again.specs == found.lm.specs
    settings: Any = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": []}
    assert generate(again, found.prompts, found.way(), **settings).tokens == found.write(found.way()).tokens
    changed = case.model()
    with torch.no_grad():
        next(changed.parameters()).add_(1e-3)
    with pytest.raises(FingerprintMismatch):
        load_lm(changed, tmp_path)


@rows
def test_the_model_is_left_as_it_was(case: Case, ready) -> None:
    found = ready(case)
    found.write(found.way())
    state = found.model.state_dict()
    assert list(state) == list(found.before) and all(torch.equal(v, found.before[k]) for k, v in state.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in found.model.modules())
    ids = torch.tensor([found.prompts[0]])
    with torch.no_grad():
        assert torch.equal(found.model(ids).logits, case.model()(ids).logits)


# ---- what is refused -----------------------------------------------------------------------------------------------------


def test_thresholds_that_a_system_has_no_use_for() -> None:
    for name in ("kangaroo", "skipdecode"):
        with pytest.raises(InvalidInput, match="leaves at no threshold"):
            systems.way(systems.build(name), 0.5)
    with pytest.raises(InvalidInput, match="follows the text"):
        systems.way(systems.build("free"), 0.5)
    with pytest.raises(InvalidInput, match="one number for all exits"):
        systems.way(systems.build("calm"), (0.5, 0.6))
    with pytest.raises(InvalidInput, match="on calibration texts"):
        systems.way(systems.build("self-supervised-early-exits"))
    with pytest.raises(InvalidInput, match="does not say how text is written"):
        systems.way(systems.build("branchynet"))
    assert systems.way(systems.build("calm"), 0.4).threshold == Decaying(0.4, 4.0)


def test_methods_of_the_other_kind_of_model() -> None:
    case = TEXT[0]
    with pytest.raises(InvalidInput, match="method of the classify engine"):
        attach_lm(case.model(), system=systems.build("branchynet"))
    with pytest.raises(InvalidInput, match="Say where the exits go"):
        attach_lm(case.model())
    assert attach_lm(case.model(), [3], system=systems.build("kangaroo")).exits == (3,)


def test_networks_that_classify_refuse_methods_of_text() -> None:
    classify = next(c for c in CASES if c.system == "branchynet")
    with pytest.raises(InvalidInput, match="attach_lm"):
        attach(classify.model(), example=classify.inputs(2, 0), system=systems.build("kangaroo"))
