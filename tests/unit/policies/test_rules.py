"""Every rule: known answers, and independence from batch mates, compaction, chunking and precision of the caller."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch import Tensor, nn

from every_rule import every_rule, kinds
from offramp.core.bundle import load_bundle, save_bundle
from offramp.core.certificate import Plan
from offramp.core.errors import InvalidInput
from offramp.core.parts import part_from_dict, part_key, part_to_dict
from offramp.core.protocols import Rule
from offramp.core.trace import Trace
from offramp.core.types import Readout
from offramp.policies import (
    PARTS,
    AllOf,
    AnyOf,
    Confidence,
    Energy,
    Entropy,
    FixedExit,
    HaltingCDF,
    LearnedGate,
    Margin,
    OutputStability,
    Patience,
    PredictedUncertainty,
    Schedule,
    Selector,
    StateGate,
    StateSimilarity,
    Tempered,
    after,
    all_of,
    any_of,
    at,
)
from offramp.policies import scores as pure

EXITS, CLASSES, TOKENS, WIDTH = 4, 5, 3, 6
NEVER = float("-inf")


def seeded(make, seed=7):
    torch.manual_seed(seed)
    return make()


RULES = every_rule(CLASSES, WIDTH) | {
    "StateSimilarityMean": lambda: StateSimilarity(token=None),
    "StateGateShared": lambda: StateGate.for_shapes([(-1, WIDTH)] * EXITS, inner=4, shared=True),
    "PredictedUncertaintyMean": lambda: PredictedUncertainty([WIDTH] * EXITS, token=None),
    "HaltingCDFShared": lambda: HaltingCDF.for_shapes([(TOKENS, WIDTH)] * EXITS, layers=1, inner=5, shared=True),
    "AfterPatience": lambda: after(2, Patience()),
}


@pytest.fixture(params=list(RULES))
def rule(request) -> Rule:
    return seeded(RULES[request.param])


def data(rows: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Logits ``[B, K-1, C]`` with runs of equal answers, and states ``[B, K-1, T, D]`` that change slowly."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, 1, CLASSES, generator=g) + 0.8 * torch.randn(rows, EXITS, CLASSES, generator=g)
    states = torch.randn(rows, 1, TOKENS, WIDTH, generator=g) + 0.5 * torch.randn(rows, EXITS, TOKENS, WIDTH, generator=g)
    return logits.to(dtype), states.to(dtype)


@torch.no_grad()
def whole(rule: Rule, logits: Tensor, states: Tensor) -> Tensor:
    state = rule.begin(logits.shape[0], logits.device)
    out = []
    for k in range(logits.shape[1]):
        score, state = rule.score(k, Readout(logits[:, k], states[:, k]), state)
        out.append(score)
    return torch.stack(out, dim=1)


# ---------------------------------------------------------------------------------------------------------------- every rule


def test_every_part_is_covered():
    assert kinds(make() for make in every_rule(CLASSES, WIDTH).values()) == set(PARTS)


def test_contract(rule):
    assert isinstance(rule, Rule)
    logits, states = data(9)
    found = whole(rule, logits, states)
    assert found.shape == (9, EXITS) and found.dtype == torch.float32 and not found.isnan().any()
    if rule.bounds is not None:
        low, high = rule.bounds
        finite = found[found > NEVER]
        assert finite.min() >= low - 1e-6 and finite.max() <= high + 1e-6
    if not rule.stateful:
        state = rule.begin(9, logits.device)
        assert not state
        alone, _ = rule.score(2, Readout(logits[:, 2], states[:, 2]), {})
        torch.testing.assert_close(alone, found[:, 2], rtol=0, atol=0)


def test_reads_what_it_says(rule):
    logits, _ = data(4)
    state = rule.begin(4, logits.device)
    if rule.needs_hidden:
        with pytest.raises(InvalidInput, match="record"):
            for k in range(EXITS):
                _, state = rule.score(k, Readout(logits[:, k]), state)
    else:
        for k in range(EXITS):
            _, state = rule.score(k, Readout(logits[:, k]), state)


@pytest.mark.parametrize("seed", range(2))
def test_compacted_equals_whole(rule, seed):
    logits, states = data(33, seed)
    expected = whole(rule, logits, states)
    g = torch.Generator().manual_seed(100 + seed)
    rows = torch.arange(33)
    state = rule.begin(33, logits.device)
    with torch.no_grad():
        for k in range(EXITS):
            score, state = rule.score(k, Readout(logits[rows, k], states[rows, k]), state)
            torch.testing.assert_close(score, expected[rows, k], rtol=1e-6, atol=1e-6)
            assert all(value.shape[0] == len(rows) for value in state.values())
            keep = torch.randperm(len(rows), generator=g)[: max(1, len(rows) * 2 // 3)]  # survivors, in any order
            rows, state = rows[keep], {name: value.index_select(0, keep) for name, value in state.items()}


def test_chunks_and_replay_equal_whole(rule):
    logits, states = data(64)
    expected = whole(rule, logits, states)
    for size in (1, 7, 64):
        parts = [whole(rule, logits[i : i + size].clone(), states[i : i + size].clone()) for i in range(0, 64, size)]
        torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-6, atol=1e-6)
    if not rule.needs_hidden:
        full = torch.cat([logits, logits[:, :1]], dim=1)
        trace = Trace(tuple(f"e{k}" for k in range(EXITS + 1)), full.argmax(-1), torch.arange(1.0, EXITS + 2), 5.0, logits=full)
        torch.testing.assert_close(trace.scores(rule, chunk=10)[:, :EXITS], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["Confidence", "Margin", "Entropy", "Energy", "Patience", "Tempered"])
def test_batch_size_and_layout_do_not_change_a_bit(name):
    rule = RULES[name]()
    logits, states = data(1000)
    expected = whole(rule, logits, states)
    for size in (1, 7, 129):
        parts = [
            whole(rule, logits[i : i + size].transpose(0, 1).contiguous().transpose(0, 1), states[i : i + size])
            for i in range(0, 1000, size)
        ]
        assert torch.equal(torch.cat(parts), expected)


def test_no_rows(rule):
    logits, states = data(0)
    assert whole(rule, logits, states).shape == (0, EXITS)


def test_bfloat16_answers(rule):
    logits, states = data(6, dtype=torch.bfloat16)
    found = whole(rule, logits, states)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, whole(rule, logits.float(), states.float()), rtol=0.02, atol=0.02)
    if isinstance(rule, nn.Module):
        assert whole(rule.to(torch.bfloat16), logits, states).dtype == torch.float32


class AllExits(nn.Module):
    def __init__(self, rule):
        super().__init__()
        self.rule = rule
        self.weights = rule if isinstance(rule, nn.Module) else nn.Identity()

    def forward(self, logits: Tensor, states: Tensor) -> Tensor:
        state = self.rule.begin(logits.shape[0], logits.device)
        out = []
        for k in range(EXITS):
            score, state = self.rule.score(k, Readout(logits[:, k], states[:, k]), state)
            out.append(score)
        return torch.stack(out, dim=1)


def test_exports_with_dynamic_batch(rule):
    logits, states = data(5)
    batch = {0: torch.export.Dim("rows", min=0)}
    exported = torch.export.export(AllExits(rule), (logits, states), dynamic_shapes=(batch, batch)).module()
    for rows in (5, 1, 12):
        logits, states = data(rows, seed=rows)
        torch.testing.assert_close(exported(logits, states), whole(rule, logits, states), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["HaltingCDF", "Nested"])
def test_compiles_without_a_break(name):
    rule = seeded(RULES[name])
    compiled = torch.compile(AllExits(rule), backend="eager", fullgraph=True)
    logits, states = data(5)
    torch.testing.assert_close(compiled(logits, states), whole(rule, logits, states))


def test_parts_round_trip(rule, tmp_path):
    described = json.loads(json.dumps(part_to_dict(rule), allow_nan=False))
    again = part_from_dict(described, PARTS)
    assert part_to_dict(again) == part_to_dict(rule)
    if isinstance(rule, nn.Module):
        # Other weights are another rule: scores recorded with one must not be taken for the other's.
        assert not rule.state_dict() or part_key(again) != part_key(rule)
        save_bundle(tmp_path, "rule", "rule", {}, rule.state_dict())
        again.load_state_dict(load_bundle(tmp_path, "rule", "rule")[1])
    else:
        assert again == rule and hash(again) == hash(rule)
    assert part_key(again) == part_key(rule)
    logits, states = data(8)
    assert torch.equal(whole(again, logits, states), whole(rule, logits, states))


def test_plan_round_trip(rule, tmp_path):
    plan = Plan(rule, ("a", "output"), (0.5, NEVER), (0.4, 0.6), 0.7)
    plan.save(tmp_path)
    again = Plan.load(tmp_path, PARTS).rule
    logits, states = data(8)
    assert torch.equal(whole(again, logits, states), whole(rule, logits, states))


def test_deepcopy_is_independent(rule):
    logits, states = data(8)
    expected = whole(rule, logits, states)
    copied = copy.deepcopy(rule)
    assert torch.equal(whole(copied, logits, states), expected)
    if isinstance(copied, nn.Module):
        for p in copied.parameters():
            p.data.fill_(0.25)
        assert torch.equal(whole(rule, logits, states), expected)
        if list(copied.parameters()):
            assert not torch.equal(whole(copied, logits, states), expected)


# ---------------------------------------------------------------------------------------------------------------- known answers


def test_answers_of_two_classes():
    logits = torch.tensor([[math.log(3.0), 0.0]])  # p = 3/4, 1/4
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    squared = torch.tensor([0.9, 0.1])  # 9/16 and 1/16, renormalised
    features = [0.75, entropy, 0.5, float(-(squared * squared.log()).sum())]
    assert pure.top1(logits).item() == pytest.approx(0.75)
    assert pure.margin(logits).item() == pytest.approx(0.5)
    assert pure.negative_entropy(logits).item() == pytest.approx(-entropy)
    assert pure.negative_energy(logits).item() == pytest.approx(math.log(4.0))
    assert pure.uncertainty_features(logits)[0].tolist() == pytest.approx(features)


def test_a_class_that_is_ruled_out_adds_no_entropy():
    logits = torch.tensor([[math.log(3.0), float("-inf"), 0.0]])
    assert torch.equal(pure.negative_entropy(logits), pure.negative_entropy(logits[:, [0, 2]]))


def test_extreme_logits_stay_finite():
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e30, 1e30, 0.0]])
    for rule in (Confidence(), Margin(), Entropy(), Energy()):
        assert rule.score(0, Readout(logits), {})[0].isfinite().all()


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_class_rules_refuse_regression(shape):
    for rule in (Confidence(), Margin(), Entropy(), Energy(), Patience(), LearnedGate(1)):
        with pytest.raises(InvalidInput, match="regression"):
            rule.score(0, Readout(torch.zeros(shape)), rule.begin(4, torch.device("cpu")))


def naive_patience(answers, same):
    out = []
    for row in answers:
        count, before = 0, None
        line = []
        for value in row:
            count = count + 1 if before is not None and same(value, before) else 0
            line.append(float(count))
            before = value
        out.append(line)
    return torch.tensor(out)


def test_patience_equals_a_loop():
    g = torch.Generator().manual_seed(3)
    answers = torch.randint(0, 2, (40, 9), generator=g)
    logits = torch.nn.functional.one_hot(answers, 3).float()
    found = whole(Patience(), logits, logits)
    assert torch.equal(found, naive_patience(answers.tolist(), lambda a, b: a == b))
    assert found.max() >= 3  # long runs occur


@pytest.mark.parametrize("shape", [(40, 9), (40, 9, 1)])
def test_regression_patience_equals_a_loop(shape):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(4)) * 0.2
    found = whole(Patience(regression_tolerance=0.2), values, values)
    rows = values.reshape(40, 9)
    expected = naive_patience(rows, lambda a, b: bool((a - b).abs() < 0.2))
    assert torch.equal(found, expected) and 0 < (found > 0).float().mean() < 1


def test_output_stability_measures_the_last_move():
    values = torch.tensor([[[0.0, 0.0], [3.0, 4.0], [3.0, 4.5]]])
    assert whole(OutputStability(), values, values).tolist() == [[NEVER, -4.0, -0.5]]
    assert whole(OutputStability(euclidean=True), values, values).tolist() == [[NEVER, -5.0, -0.5]]
    chunk = torch.zeros(2, 3, 4, 7)  # an action chunk [steps, dims] per item
    chunk[1, 1, 2, 3] = 2.0
    assert whole(OutputStability(), chunk, chunk).tolist() == [[NEVER, 0.0, 0.0], [NEVER, -2.0, -2.0]]


def test_state_similarity_is_the_cosine():
    states = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [0.0, 5.0], [0.0, -1.0]]])
    assert whole(StateSimilarity(), states, states)[0].tolist() == pytest.approx([NEVER, 0.0, 1.0, -1.0], abs=1e-6)
    maps = torch.randn(2, 2, 5, 3, 3)
    found = whole(StateSimilarity(), maps[..., 0, 0], maps)
    pooled = maps.mean(dim=(-2, -1))
    torch.testing.assert_close(found[:, 1], torch.cosine_similarity(pooled[:, 0], pooled[:, 1], dim=-1))


def test_state_similarity_ignores_padding_and_refuses_other_widths():
    states = torch.randn(3, 2, 4, 6)
    padded = torch.cat([states, torch.full((3, 2, 2, 6), 9.0)], dim=2)
    logits = torch.zeros(3, 2, 5)
    assert torch.equal(whole(StateSimilarity(), logits, states), whole(StateSimilarity(), logits, padded))
    rule = StateSimilarity()
    _, state = rule.score(0, Readout(logits[:, 0], torch.zeros(3, 4)), {})
    with pytest.raises(InvalidInput, match="same width; exit 1 has 8 channels and the exit before it 4"):
        rule.score(1, Readout(logits[:, 1], torch.zeros(3, 8)), state)


def test_schedules_ignore_the_item():
    logits, states = data(3)
    assert whole(FixedExit(2), logits, states).tolist() == [[0.0, 0.0, 1.0, 1.0]] * 3
    torch.testing.assert_close(whole(Schedule((0.5, 0.25, 1.0, 2.0)), logits, states), torch.tensor([[0.5, 0.25, 1.0, 2.0]] * 3))
    with pytest.raises(InvalidInput, match="2 early exits"):
        whole(Schedule((0.5, 0.25)), logits, states)


def set_halting(rule: HaltingCDF, chances) -> None:
    for body, chance in zip(rule.lambdas, chances, strict=True):
        nn.init.zeros_(body[-1].weight)
        nn.init.constant_(body[-1].bias, math.log(chance / (1 - chance)))


def test_halting_cdf_is_the_sum_of_the_pdf():
    rule = seeded(lambda: HaltingCDF([WIDTH] * EXITS))
    chances = (0.1, 0.25, 0.5, 0.75)
    set_halting(rule, chances)
    logits, states = data(5)
    found = whole(rule, logits, states)
    pdf = pure.halting_distribution(torch.tensor([chances]))
    assert pdf[0].tolist() == pytest.approx([0.1, 0.9 * 0.25, 0.675 * 0.5, 0.3375 * 0.75, 0.3375 * 0.25])
    torch.testing.assert_close(found, pdf[:, :-1].cumsum(1).expand(5, -1))


def test_halting_cdf_rises_to_at_most_one():
    rule = seeded(lambda: HaltingCDF([WIDTH] * EXITS))
    for body in rule.lambdas:
        nn.init.normal_(body[-1].weight, std=20)  # saturated gates too
    logits, states = data(500)
    found = whole(rule, logits, states)
    assert (found.diff(dim=1) >= 0).all() and found.min() >= 0 and found.max() <= 1
    torch.testing.assert_close(pure.halting_distribution(torch.rand(50, 6)).sum(1), torch.ones(50))


def test_halting_cdf_reads_the_exit_before():
    rule = seeded(lambda: HaltingCDF([WIDTH] * 2))
    logits, states = data(4)
    other = states.clone()
    other[:, 0] += 1
    a = [
        rule.halting(1, Readout(logits[:, 1], states[:, 1]), rule.score(0, Readout(logits[:, 0], s[:, 0]), rule.begin(4, s.device))[1])[0]
        for s in (states, other)
    ]
    assert not torch.allclose(a[0], a[1])


def test_halting_cdf_over_stages_of_different_width():
    shapes = [(8, 6, 6), (16, 3, 3), (3, 3, 32)]
    rule = HaltingCDF.for_shapes(shapes, layers=1)
    assert rule.widths == (8, 16, 32) and rule.token is None
    state = rule.begin(2, torch.device("cpu"))
    for k, shape in enumerate(shapes):
        score, state = rule.score(k, Readout(torch.zeros(2, 3), torch.randn(2, *shape)), state)
        assert score.shape == (2,)
    with pytest.raises(InvalidInput, match="one width"):
        HaltingCDF.for_shapes(shapes, shared=True)


def test_shared_probe_has_one_set_of_weights():
    own, shared = (sum(p.numel() for p in StateGate([WIDTH] * EXITS, shared=s).parameters()) for s in (False, True))
    assert own == EXITS * shared


def test_conditional_gate_follows_the_paper():
    rule = seeded(lambda: LearnedGate(3, conditional=True))
    gates = (0.3, 0.5, 0.9)
    for gate, g in zip(rule.gates, gates, strict=True):
        nn.init.zeros_(gate.weight)
        nn.init.constant_(gate.bias, math.log(g / (1 - g)))
    logits, states = data(2)
    # P = 0.3, 0.5, min(0.9, 0.2): given that the row came here 0.3, 0.5/0.7, 0.2/0.2.
    torch.testing.assert_close(whole(rule, logits[:, :3], states[:, :3]), torch.tensor([[0.3, 0.5 / 0.7, 1.0]] * 2))


def test_conditional_gate_without_a_remainder_leaves():
    rule = LearnedGate(2, conditional=True)
    found, _ = rule.score(1, Readout(torch.zeros(3, 4)), {"left": torch.ones(3)})
    assert found.tolist() == [1.0] * 3


def test_gates_do_not_train_heads_but_probes_may():
    logits, states = data(4)
    logits.requires_grad_()
    states.requires_grad_()
    gate = LearnedGate(EXITS)
    gate.score(0, Readout(logits[:, 0]), {})[0].sum().backward()
    assert logits.grad is None and gate.gates[0].weight.grad.abs().sum() > 0
    StateGate([WIDTH] * EXITS).logit(0, Readout(logits[:, 0], states[:, 0])).sum().backward()
    assert states.grad is not None


def test_predicted_uncertainty_is_minus_a_loss():
    rule = seeded(RULES["PredictedUncertainty"])
    logits, states = data(50)
    found = whole(rule, logits, states)
    assert (found <= 0).all()
    torch.testing.assert_close(found[:, 1], -rule.loss(1, Readout(logits[:, 1], states[:, 1])))


def test_selector_decides_once_from_the_first_exit():
    rule = seeded(RULES["Selector"])
    logits, states = data(20)
    found = whole(rule, logits, states)
    p = torch.softmax(rule.depth_logits(Readout(logits[:, 0], states[:, 0])), dim=-1)
    torch.testing.assert_close(found, p.cumsum(1)[:, :EXITS])
    later = states.clone()
    later[:, 1:] = 0
    assert torch.equal(whole(rule, logits, later), found)
    with pytest.raises(InvalidInput, match="4 early exits"):
        rule.score(EXITS, Readout(logits[:, 0], states[:, 0]), {"by_depth": torch.zeros(20, EXITS + 1)})


def test_learned_rules_name_wrong_widths():
    for rule in (StateGate([WIDTH]), HaltingCDF([WIDTH]), Selector(1, WIDTH)):
        with pytest.raises(InvalidInput, match=r"width 6 at this exit and was given 7.*for_shapes"):
            rule.score(0, Readout(torch.zeros(2, 3), torch.zeros(2, 7)), rule.begin(2, torch.device("cpu")))
        with pytest.raises(InvalidInput, match="early exits"):
            rule.score(3, Readout(torch.zeros(2, 3), torch.zeros(2, 6)), rule.begin(2, torch.device("cpu")))


def test_dynamic_lengths_read_the_first_token():
    assert StateGate.for_shapes([(-1, WIDTH)]).token == 0
    assert StateGate.for_shapes([(9, WIDTH)]).token is None
    assert Selector.for_shapes([(-1, WIDTH), (-1, WIDTH)]).token == 0


# ---------------------------------------------------------------------------------------------------------------- combinators


def test_any_and_all_are_exactly_or_and_and():
    logits, states = data(400)
    a, b = Confidence(), Patience()
    score_a, score_b = whole(a, logits, states), whole(b, logits, states)
    for k in range(EXITS):
        s = score_a[17, k].item()  # a threshold met exactly by one item
        fires_a, fires_b = score_a >= s, score_b >= 2.0
        for scale in (1.0, 0.125, 8.0):
            assert torch.equal(whole(any_of(at(a, s), at(b, 2.0, scale)), logits, states) >= 0, fires_a | fires_b)
            assert torch.equal(whole(all_of(at(a, s), at(b, 2.0, scale)), logits, states) >= 0, fires_a & fires_b)


def test_at_with_a_threshold_per_exit():
    logits, states = data(50)
    thresholds = (0.5, 0.6, 0.4, 0.7)
    found = whole(at(Confidence(), thresholds), logits, states) >= 0
    assert torch.equal(found, whole(Confidence(), logits, states) >= torch.tensor(thresholds))


def test_after_waits_and_keeps_counting():
    logits, states = data(50)
    found, plain = whole(after(2, Patience()), logits, states), whole(Patience(), logits, states)
    assert (found[:, :2] == NEVER).all() and torch.equal(found[:, 2:], plain[:, 2:]) and plain[:, 2:].max() >= 2
    assert torch.equal(whole(after(0, Margin()), logits, states), whole(Margin(), logits, states))


def test_tempered_divides_the_logits():
    logits, states = data(20)
    temperatures = (2.0, 1.5, 1.0, 0.5)
    expected = whole(Confidence(), logits / torch.tensor(temperatures)[:, None], states)
    torch.testing.assert_close(whole(Tempered(Confidence(), temperatures), logits, states), expected)


def test_combined_rules_say_what_they_need():
    assert not any_of(Confidence(), Margin()).stateful
    assert any_of(Confidence(), Patience()).stateful
    assert after(1, StateSimilarity()).needs_hidden and not any_of(Confidence()).needs_hidden
    assert any_of(at(Confidence(), 0.5), at(Margin(), 0.2, scale=2.0)).bounds == (-0.5, 1.6)
    assert any_of(Confidence(), Energy()).bounds is None


def test_states_of_equal_rules_do_not_mix():
    rule = any_of(Patience(), all_of(Patience(), Patience(regression_tolerance=0.5)))
    logits, states = data(6)
    _, state = rule.score(0, Readout(logits[:, 0]), rule.begin(6, logits.device))
    assert set(state) == {"0.count", "0.answer", "1.0.count", "1.0.answer", "1.1.count", "1.1.answer"}
    expected = torch.maximum(
        whole(Patience(), logits, states),
        torch.minimum(whole(Patience(), logits, states), whole(Patience(regression_tolerance=0.5), logits, states)),
    )
    assert torch.equal(whole(rule, logits, states), expected)


def test_weights_inside_combinators_are_theirs():
    gate = LearnedGate(EXITS)
    rule = any_of(at(gate, 0.5), Tempered(after(1, HaltingCDF([WIDTH] * EXITS)), (1.0,) * EXITS))
    assert len(list(rule.parameters())) == len(list(gate.parameters())) + len(list(HaltingCDF([WIDTH] * EXITS).parameters()))
    rule.to(torch.float64)
    assert gate.gates[0].weight.dtype == torch.float64


def test_more_than_ten_rules_keep_their_states_apart():
    logits, states = data(6)
    rule = any_of(*[Patience()] * 12)
    assert torch.equal(whole(rule, logits, states), whole(Patience(), logits, states))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: any_of(), "at least one rule"),
        (lambda: any_of(Confidence), r"an instance, as in Confidence\(\)"),
        (lambda: AllOf((0.5,)), "rule of offramp.policies"),
        (lambda: at(Confidence(), float("inf")), "finite"),
        (lambda: at(Confidence(), 0.5, scale=0.0), "scale"),
        (lambda: at(Confidence(), ()), "finite"),
        (lambda: after(-1, Confidence()), "counts from 0"),
        (lambda: Tempered(Confidence(), (1.0, 0.0)), "positive"),
        (lambda: Schedule(()), "finite"),
        (lambda: Schedule((NEVER,)), "finite"),
        (lambda: FixedExit(-1), "counts from 0"),
        (lambda: Energy(0.0), "positive"),
        (lambda: Entropy(1), "at least 2"),
        (lambda: Patience(regression_tolerance=0.0), "positive"),
        (lambda: LearnedGate(0), "at least 1"),
        (lambda: StateGate([]), "positive width"),
        (lambda: StateGate([-1]), "positive width"),
        (lambda: HaltingCDF([4], layers=-1), "layers"),
        (lambda: HaltingCDF.for_shapes([]), "hidden_shape"),
        (lambda: Selector(0, 4), "at least 1"),
        (lambda: StateGate([4], inner=-1), "inner"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(InvalidInput, match=message):
        make()


def test_any_of_is_a_rule_of_rules():
    assert isinstance(any_of(Confidence(), any_of(Margin())), AnyOf)
