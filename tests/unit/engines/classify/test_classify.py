"""The engine runs what replay says: every rule, every mode, every batch size, with and without compaction."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from engine_models import (
    AT,
    CLASSES,
    EXITS,
    RULES,
    items,
    joined,
    network,
    plan_of,
    random_batches,
    rules,
    run_of,
    same,
    trace,
    vector_model,
)
from torch import Tensor, nn

from offramp.budget import MeanCost, calibrate, evaluate, leave_at
from offramp.cli.nets import TextTransformer
from offramp.core.certificate import Certificate, Plan
from offramp.core.errors import FingerprintMismatch, InvalidInput, NoEffectWarning, NoSavingWarning
from offramp.core.trace import LatencyTable
from offramp.engines.classify.engine import Latency, Quota, Throughput, compile, measure_table, quota_sizes
from offramp.engines.classify.record import record
from offramp.exits import Cascade, PooledLinear
from offramp.network import attach, never
from offramp.policies import Confidence, Patience

MODES = {
    "latency": (Latency(64), False),
    "latency, no compaction": (Latency(64, compact=False), False),
    "throughput": (Throughput(64), False),
    "latency, graphs": (Latency(64), True),
    "throughput, graphs": (Throughput(64), True),
}


@pytest.mark.parametrize("name", list(RULES))
def test_engine_equals_replay_on_10000_items(name):
    found, rule = trace(), rules()[name]
    plan = plan_of(found, rule)
    expected = leave_at(found.scores(rule), plan.thresholds)
    assert found.items == 10_000
    assert len(expected.unique()) >= (1 if name in ("FixedExit", "Schedule") else 3), "the plan must use several exits"
    answers = found.logits[torch.arange(found.items), expected]
    for seed, (label, (mode, graphs)) in enumerate(MODES.items()):
        run = compile(network(), plan, mode, measure=False, graphs=graphs)
        output, exits, cost = joined(run.stream(random_batches(items(), seed)))
        assert torch.equal(exits, expected), label
        torch.testing.assert_close(output, answers, rtol=1e-5, atol=1e-5, msg=label)
        assert torch.equal(cost, run.costs[expected]), label


@pytest.mark.filterwarnings("ignore::offramp.core.errors.OfframpWarning")
@pytest.mark.parametrize("name", list(RULES))
def test_engine_equals_replay_with_calibrated_thresholds(name):
    """Thresholds as `calibrate` places them, between two scores of the calibration items that may be close together."""
    found, rule = trace(), rules()[name]
    plan = calibrate(found, rule, MeanCost(0.95))
    expected = leave_at(found.scores(rule), plan.thresholds)
    shares = torch.bincount(expected, minlength=EXITS + 1).double() / found.items
    torch.testing.assert_close(shares, torch.tensor(plan.shares, dtype=torch.float64))
    for mode, graphs in ((Latency(500), False), (Throughput(500), True)):
        _, exits, cost = joined(compile(network(), plan, mode, measure=False, graphs=graphs).stream(items().split(500)))
        assert torch.equal(exits, expected)
        assert float(cost.mean()) / found.base_cost <= 0.95 + 1e-9


# ------------------------------------------------------------------------------------------------------------ batches do not matter


@pytest.mark.parametrize("name", ["Confidence", "HaltingCDF", "Nested"])
@pytest.mark.parametrize("compact", [None, True, False])
def test_rows_do_not_see_each_other(name, compact, graphs):
    plan = plan_of(trace(), rules()[name])
    x = items()[:200]
    run = run_of(plan, Latency(200, compact), graphs=graphs)
    whole = run(x)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    permuted = run(x[order])
    assert torch.equal(permuted.exit, whole.exit[order])
    torch.testing.assert_close(permuted.output, whole.output[order], rtol=1e-5, atol=1e-5)
    mates = run(torch.cat([x[:20], items()[5000:5100]]))
    assert torch.equal(mates.exit[:20], whole.exit[:20])
    torch.testing.assert_close(mates.output[:20], whole.output[:20], rtol=1e-5, atol=1e-5)
    alone = torch.cat([run(x[i : i + 1]).exit for i in range(30)])
    assert torch.equal(alone, whole.exit[:30])


@pytest.mark.filterwarnings("ignore::offramp.core.errors.NoSavingWarning")
def test_compaction_that_a_table_decides_changes_no_answer(plan):
    """With every gather dear, with every gather free, and at some exits only."""
    x = items()[:300]
    expected = run_of(plan, Latency(300))(x)
    for gather in ([0.0, 0.0], [1e9, 1e9], [0.0, 0.9]):
        segment = torch.tensor([[0.1, 1.0]] * (EXITS + 1))
        table = LatencyTable((1, 300), segment, torch.zeros(EXITS + 1, 2), torch.tensor(gather), 0.0, "made up")
        same(compile(network(), plan, Latency(300), table=table, drop=False, graphs=False)(x), expected)


def test_compaction_follows_the_measurements(plan):
    segment = torch.tensor([[0.1, 1.0]] * (EXITS + 1))
    table = LatencyTable((1, 64), segment, torch.zeros(EXITS + 1, 2), torch.tensor([0.0, 0.4]), 0.0, "made up")
    run = compile(network(), plan, Latency(64), table=table, drop=False, graphs=False)
    assert run._compaction_pays(0, 64, 16)
    assert not run._compaction_pays(0, 64, 60)
    assert run_of(plan, Latency(64, compact=True))._compaction_pays(0, 64, 63)
    assert not run_of(plan, Latency(64, compact=False))._compaction_pays(0, 64, 1)


def test_rows_that_left_are_not_computed(plan):
    """The rows that every segment sees are those that reach it."""
    run = run_of(plan, Latency(500, compact=True))
    seen: list[int] = []
    for stage in run.stages:
        stage.register_forward_pre_hook(lambda m, rows: seen.append(rows[0].shape[0]))
    exits = run(items()[:500]).exit
    assert seen == [int((exits >= s.exit).sum() if k == 0 else (exits > run.stages[k - 1].exit).sum()) for k, s in enumerate(run.stages)]
    seen.clear()
    assert run(items()[:500][exits == 0]).exit.unique().tolist() == [0]
    assert len(seen) == 1, "the loop ends when nobody is left"


# ---------------------------------------------------------------------------------------------------------------- ends of the range


def test_where_nothing_is_checked_the_model_itself_runs():
    """Its cut would give the same answer, a little later; in training mode only the cut gives it."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, CLASSES)).eval()
    net = attach(model, ["0"], example=torch.randn(2, 6))
    with pytest.warns(NoEffectWarning):
        run = compile(net, never(net, Confidence()), graphs=False)
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(5, 6)
    with torch.inference_mode():
        want = model(x)
    for given in (x, x, x.double(), x[:0], x[3:]):
        calls.clear()
        answers = run(given)
        assert len(calls) == (len(given) > 0) and answers.exit.tolist() == [1] * len(given)
        assert torch.equal(answers.output, want[5 - len(given) :] if len(given) < 5 else want) or len(given) == 0
    with pytest.raises(InvalidInput, match="dimension 1"):
        run(torch.randn(2, 7))
    model.train()
    calls.clear()
    assert torch.equal(run(x).output, want) and not calls


@pytest.mark.parametrize("mode", [Latency(8), Throughput(8), Quota(8)])
def test_never_leaving_is_the_model_bit_for_bit(mode, graphs):
    net = network()
    with pytest.warns(NoEffectWarning):
        run = compile(net, never(net, Confidence()), mode, graphs=graphs)
    with torch.no_grad():
        for rows in (1, 3, 8):
            answers = run(items()[:rows])
            if isinstance(mode, Throughput) and graphs:  # runs whole buckets: the kernels are those of a batch of 8
                torch.testing.assert_close(answers.output, net.model(items()[:rows]), rtol=1e-6, atol=1e-6)
                assert torch.equal(answers.output, net.model(items()[:8])[:rows])
            else:
                assert torch.equal(answers.output, net.model(items()[:rows]))
            assert answers.exit.tolist() == [EXITS] * rows
            assert answers.cost.tolist() == [net.costs()[1]] * rows
    assert len(run.stages) == 1


@pytest.mark.parametrize("rule", ["Patience", "HaltingCDF"])
def test_no_head_runs_where_no_decision_follows(rule, plan):
    """Neither heads nor a rule with memory are run for nothing, and the cost says so."""
    torch.manual_seed(0)
    net = attach(vector_model(), AT, example=torch.randn(2, 6), head=Cascade(PooledLinear())).eval()
    plan = replace(never(net, rules()[rule]), thresholds=(-1e9, *[float("inf")] * (EXITS - 1), float("-inf")), shares=(0.5, 0, 0, 0, 0.5))
    run = compile(net, plan, Latency(4), measure=False, graphs=False)
    calls: list[int] = []
    for k, head in enumerate(net.heads):
        head.register_forward_hook(lambda *_, k=k: calls.append(k))
    run(items()[:4])
    assert calls == [0]
    with pytest.warns(NoEffectWarning):
        run = compile(net, never(net, rules()[rule]), graphs=False)
    calls.clear()
    run(items()[:4])
    assert calls == [] and float(run.costs[-1]) == net.costs()[1]


@pytest.mark.parametrize("k", range(EXITS))
def test_always_leaving_is_segments_and_a_head(k, graphs):
    net = network()
    thresholds = [float("inf")] * EXITS + [float("-inf")]
    thresholds[k] = float("-inf")
    shares = [0.0] * (EXITS + 1)
    shares[k] = 1.0
    plan = Plan(Confidence(), net.names, tuple(thresholds), tuple(shares), 0.5)
    with torch.no_grad():
        x = items()[:9]
        state = net.model[0](x)
        for block in list(net.model)[1 : k + 2]:
            state = block(state)
        expected = net.heads[k](state)
    for mode in (Latency(9), Throughput(4)):
        answers = run_of(plan, mode, graphs=graphs)(x)
        assert answers.exit.tolist() == [k] * 9
        torch.testing.assert_close(answers.output, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", [Latency(4), Throughput(4), Quota(4)])
def test_a_batch_without_rows(mode, plan, graphs):
    answers = run_of(plan, mode, graphs=graphs)(items()[:0])
    assert answers.output.shape == (0, CLASSES) and answers.exit.shape == (0,) and answers.cost.shape == (0,)
    assert answers.exit.dtype == torch.int64 and answers.output.dtype == torch.float32


@pytest.mark.parametrize("mode", [Latency(64), Throughput(8)])
def test_a_score_that_is_not_a_number_never_leaves(mode, graphs):
    """As in replay: a row leaves at ``score >= threshold`` and NaN is not."""

    class Odd(Confidence):
        def score(self, exit_index, readout, state):
            score, state = super().score(exit_index, readout, state)
            return torch.where(readout.logits[:, 0] > 0, score, float("nan")), state

    plan = replace(plan_of(trace(), Confidence()), rule=Odd())
    x = items()[:64]
    found = record(network(), [x], rules=[Odd()], progress=False)
    expected = leave_at(found.recorded[next(iter(found.recorded))], plan.thresholds)
    assert torch.equal(run_of(plan, mode, graphs=graphs)(x).exit, expected)


def test_a_threshold_met_exactly_leaves(graphs):
    """``>=`` and not ``>``, where the score is a whole number."""
    rule = Patience()
    found = trace()
    plan = Plan(rule, found.exits, (9.0, 1.0, 2.0, 3.0, float("-inf")), (0.0, 0.25, 0.25, 0.25, 0.25), 0.9)
    expected = leave_at(found.scores(rule), plan.thresholds)[:256]
    for mode in (Latency(256), Throughput(32)):
        assert torch.equal(run_of(plan, mode, graphs=graphs)(items()[:256]).exit, expected)


# -------------------------------------------------------------------------------------------------------------------------- quota


def test_quota_sizes():
    assert quota_sizes((0.25, 0.25, 0.5), 8) == [6, 4]
    assert quota_sizes((0.0, 0.0, 1.0), 8) == [8, 8]
    assert quota_sizes((1.0, 0.0, 0.0), 8) == [0, 0]
    assert quota_sizes((0.3, 0.3, 0.4), 0) == [0, 0]
    for batch in range(1, 40):
        shares = (0.27, 0.2, 0.15, 0.11, 0.27)
        sizes = quota_sizes(shares, batch)
        assert sizes == sorted(sizes, reverse=True)
        left = [1 - sum(shares[: k + 1]) for k in range(4)]
        assert all(abs(s - batch * share) <= 0.5 + 1e-9 for s, share in zip(sizes, left, strict=True))


@pytest.mark.parametrize("batch", [1, 2, 7, 64])
def test_quota_lets_exactly_the_best_go(batch, plan, graphs):
    run = run_of(plan, Quota(batch), graphs=graphs)
    scores = trace().scores(plan.rule)
    for start in range(0, 3 * batch, batch):
        answers = run(items()[start : start + batch])
        alive = torch.arange(batch)
        expected = torch.full((batch,), EXITS)
        for k, size in enumerate(quota_sizes(plan.shares, batch)):
            order = scores[start : start + batch, k][alive].argsort(descending=True, stable=True)
            gone = alive[order[: len(alive) - size]]
            expected[gone] = k
            alive = alive[torch.isin(alive, gone, invert=True)]
        assert torch.equal(answers.exit, expected)
        torch.testing.assert_close(answers.output, trace().logits[torch.arange(start, start + batch), expected], rtol=1e-5, atol=1e-5)


def test_quota_meets_the_budget_within_rounding(plan, graphs):
    run = run_of(plan, Quota(50), graphs=graphs)
    _, exits, cost = joined(run.stream(items().split(50)))
    spent = float(cost.mean()) / network().costs()[1]
    step = float(run.costs.diff().max()) / network().costs()[1] / 50
    assert abs(spent - plan.mean_cost) <= step * EXITS / 2
    assert len({tuple(e.bincount(minlength=EXITS + 1).tolist()) for e in exits.split(50)}) == 1, "the same number in every batch"


def test_quota_breaks_ties_by_position_in_both_loops():
    shares = (0.25, 0.25, 0.0, 0.25, 0.25)
    rule = rules()["Schedule"]
    plan = Plan(rule, network().names, (0.0, 0.0, 0.0, 0.0, float("-inf")), shares, 0.7)
    host, graph = (run_of(plan, Quota(32), graphs=g)(items()[:32]) for g in (False, True))
    assert torch.equal(host.exit, graph.exit)
    assert host.exit.bincount(minlength=EXITS + 1).tolist() == [8, 8, 0, 8, 8]
    assert torch.equal(host.exit, run_of(plan, Quota(32))(items()[:32]).exit)
    assert (host.exit.diff() <= 0).all(), "of equals the last ones leave first, so the first ones stay"


# --------------------------------------------------------------------------------------------------------------------- throughput


@pytest.mark.parametrize("seed", range(4))
def test_stream_gives_batches_back_in_order(seed, plan, graphs):
    """Any mixture of sizes, among them none, and batches larger than the whole backlog."""
    run = run_of(plan, Throughput(16, backlog=2), graphs=graphs)
    expected = leave_at(trace().scores(plan.rule), plan.thresholds)
    sizes = [[0], [0, 0, 5], [100, 0, 1, 1, 200, 3, 0, 64, 16, 15, 17, 0], [1] * 70 + [90] + [0] + [1] * 5][seed]
    batches = list(items()[: sum(sizes)].split(sizes))
    answers = list(run.stream(batches))
    assert [len(a.exit) for a in answers] == sizes
    start = 0
    for a, size in zip(answers, sizes, strict=True):
        assert torch.equal(a.exit, expected[start : start + size])
        assert a.output.shape == (size, CLASSES)
        start += size
    assert list(run.stream([])) == []


def test_answers_of_a_stream_stay_what_they_were(plan, graphs):
    """They do not share memory with buffers that later rows use."""
    run = run_of(plan, Throughput(8, backlog=2), graphs=graphs)
    kept, copies = [], []
    for a in run.stream(items()[:400].split(5)):
        kept.append(a)
        copies.append((a.output.clone(), a.exit.clone()))
    assert all(torch.equal(a.output, o) and torch.equal(a.exit, e) for a, (o, e) in zip(kept, copies, strict=True))
    single = run_of(plan, Latency(8), graphs=graphs)
    first = single(items()[:8])
    output = first.output.clone()
    single(items()[8:16])
    assert torch.equal(first.output, output)


@pytest.mark.parametrize("mode", [Latency(8), Quota(8), Throughput(8)])
def test_answers_of_the_bare_model_stay_what_they_were(mode, graphs):
    with pytest.warns(NoEffectWarning):
        run = compile(network(), never(network(), Confidence()), mode, graphs=graphs)
    large, small = run(items()[:8]), run(items()[8:10])
    with torch.no_grad():
        assert torch.equal(run(items()[:8]).output, network().model(items()[:8]))
        torch.testing.assert_close(large.output, network().model(items()[:8]))
        torch.testing.assert_close(small.output, network().model(items()[8:10]))


def test_a_stream_left_half_way_leaves_nothing_behind(plan, graphs):
    run = run_of(plan, Throughput(16), graphs=graphs)
    expected = leave_at(trace().scores(plan.rule), plan.thresholds)
    stream = run.stream(items()[1000:2000].split(7))
    for _ in range(5):
        next(stream)
    stream.close()
    again = joined(run.stream(items()[:300].split(9)))
    assert torch.equal(again[1], expected[:300])
    assert torch.equal(run(items()[300:330]).exit, expected[300:330])


def test_a_second_stream_does_not_corrupt_the_first(plan, graphs):
    """Two streams of one engine at once are right, or refused; never wrong."""
    run = run_of(plan, Throughput(16), graphs=graphs)
    expected = leave_at(trace().scores(plan.rule), plan.thresholds)
    first = run.stream(items()[:400].split(8))
    got = [next(first).exit]
    second = run.stream(items()[400:800].split(8))
    other = [next(second).exit]
    try:
        got += [a.exit for a in first]
    except InvalidInput as error:
        assert "one stream at a time" in str(error)
    other += [a.exit for a in second]
    assert torch.equal(torch.cat(other), expected[400:800])
    found = torch.cat(got)
    assert torch.equal(found, expected[: len(found)])


def test_the_consumer_is_not_in_inference_mode(plan, graphs):
    run = run_of(plan, Throughput(8), graphs=graphs)
    for _ in run.stream(items()[:100].split(10)):
        assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
        (torch.ones(2, requires_grad=True) * 2).sum().backward()


def test_input_is_drawn_only_as_far_as_needed(plan, graphs):
    """Memory is bounded: what has been drawn and not given back stays within the backlog, also behind one hard input."""
    run = run_of(plan, Throughput(8, backlog=4), graphs=graphs)
    expected = leave_at(trace().scores(plan.rule), plan.thresholds)
    easy, hard = items()[expected == 0], items()[expected == EXITS]
    for rows in (torch.cat([hard[:1], easy[:700]]), items()[:700]):
        drawn = given = 0

        def source(rows=rows):
            nonlocal drawn
            for part in rows.split(2):
                drawn += len(part)
                yield part

        most = 0
        for a in run.stream(source()):
            most = max(most, drawn - given)
            given += len(a.exit)
        assert given == len(rows)
        assert most <= 8 * (4 + 2) + 2 * 2, "admitted and not yet returned"


def test_stages_run_on_full_buckets(plan):
    """That is what the mode is for: all but a few calls at the end see a whole bucket."""
    run = run_of(plan, Throughput(32, backlog=64))
    seen: list[int] = []
    for stage in run.stages:
        stage.register_forward_pre_hook(lambda m, rows: seen.append(rows[0].shape[0]))
    list(run.stream(items()[:3000].split(5)))
    assert max(seen) == 32
    assert sum(size < 32 for size in seen) <= EXITS + 1


# ----------------------------------------------------------------------------------------------------------------- texts and masks


@pytest.fixture(scope="module")
def texts():
    """A text network, its plan, and batches of different lengths with padding."""
    torch.manual_seed(0)
    model = TextTransformer(vocabulary=30, classes=4, depth=4, width=16, heads=2, length=12, dropout=0.0).eval()

    def batch(rows: int, length: int, seed: int) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(seed)
        ids = torch.randint(1, 30, (rows, length), generator=g)
        mask = (torch.arange(length) < torch.randint(1, length + 1, (rows, 1), generator=g)).long()
        return {"input_ids": ids * mask, "attention_mask": mask}

    net = attach(model, ["blocks.0", "blocks.1", "blocks.2"], example=batch(2, 7, 0)).eval()
    sizes = [(5, 12), (3, 7), (0, 7), (1, 12), (9, 3), (4, 7), (20, 12), (2, 3), (1, 1), (6, 7)] * 3
    batches = [batch(rows, length, i) for i, (rows, length) in enumerate(sizes)]
    found = record(net, [b for b in batches if len(b["input_ids"])], rules=[rules()["Patience"]], progress=False)
    return net, plan_of(found, Confidence()), batches, found


@pytest.mark.parametrize("mode", [Latency(8), Latency(8, compact=False), Throughput(8, backlog=2)])
def test_text_lengths_interleaved(texts, mode, graphs):
    net, plan, batches, found = texts
    run = compile(net, plan, mode, measure=False, graphs=graphs)
    expected = leave_at(found.scores(plan.rule), plan.thresholds)
    assert len(expected.unique()) > 2
    answers = list(run.stream(batches))
    assert [len(a.exit) for a in answers] == [len(b["input_ids"]) for b in batches]
    assert torch.equal(torch.cat([a.exit for a in answers]), expected)
    output = torch.cat([a.output for a in answers])
    torch.testing.assert_close(output, found.logits[torch.arange(found.items), expected], rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------- kinds of answers


@pytest.mark.parametrize("width", [1, None])
def test_regression(width, graphs):
    """Answers of one number, with and without a dimension of their own."""

    class Regressor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = vector_model(1)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) if width else self.net(x)[:, 0]

    net = attach(Regressor().eval(), ["net.1", "net.2", "net.3"], example=torch.randn(2, 6)).eval()
    rule = Patience(regression_tolerance=0.3)
    found = record(net, [items()[:400]], rules=[rule], progress=False)
    plan = plan_of(found, rule)
    expected = leave_at(found.scores(rule), plan.thresholds)
    assert len(expected.unique()) > 1
    for mode in (Latency(64), Throughput(16)):
        output, exits, _ = joined(compile(net, plan, mode, measure=False, graphs=graphs).stream(random_batches(items()[:400])))
        assert torch.equal(exits, expected)
        torch.testing.assert_close(output, found.logits[torch.arange(400), expected], rtol=1e-5, atol=1e-5)


def test_answers_of_different_precision(graphs):
    """A model in bfloat16 that gives its answer in float32 keeps it: heads are brought to the answer's precision."""

    class Upcast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = vector_model().bfloat16()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).float() / 3

    net = attach(Upcast().eval(), ["net.1", "net.2"], example=torch.randn(2, 6)).eval()
    plan = Plan(Confidence(), net.names, (0.5, 0.6, float("-inf")), (0.3, 0.3, 0.4), 0.7)
    x = items()[:64]
    for mode in (Latency(64), Throughput(16), Quota(64)):
        answers = compile(net, plan, mode, measure=False, graphs=graphs)(x)
        with torch.no_grad():
            expected = net.model(x.bfloat16())
        late = answers.exit == 2
        assert late.any() and not late.all() and answers.output.dtype == torch.float32
        torch.testing.assert_close(answers.output[late], expected[late], rtol=1e-2, atol=1e-2)
        assert not torch.equal(answers.output[late].bfloat16().float(), answers.output[late])


# -------------------------------------------------------------------------------------------------------------------------- costs


@pytest.mark.parametrize("name", ["Confidence", "Patience"])
def test_realised_cost_is_the_replayed_cost(name):
    plan = plan_of(trace(), rules()[name])
    run = run_of(plan, Latency(500))
    assert torch.equal(run.costs, trace().cost)
    _, _, cost = joined(run.stream(items().split(500)))
    replayed = evaluate(trace(), trace().scores(plan.rule), plan.thresholds).mean_cost.value
    assert float(cost.mean()) / network().costs()[1] == pytest.approx(replayed, rel=1e-12)
    assert replayed == pytest.approx(plan.mean_cost, rel=1e-9)


def test_heads_that_do_not_run_cost_nothing():
    net = network()
    segments = [s.flops for s in net.cut().spec.segments]
    head = [e.head_flops for e in net.exits]
    plan = plan_of(trace(), Confidence(), off=(0, 2))
    assert run_of(plan).costs.tolist() == [
        segments[0],
        sum(segments[:2]) + head[1],
        sum(segments[:3]) + head[1],
        sum(segments[:4]) + head[1] + head[3],
        sum(segments) + head[1] + head[3],
    ]
    plan = plan_of(trace(), rules()["HaltingCDF"], off=(0, 2))
    assert run_of(plan).costs.tolist() == trace().cost.tolist(), "a rule with memory needs every head before the last decision"
    plan = plan_of(trace(), rules()["HaltingCDF"], off=(2, 3))
    assert float(run_of(plan).costs[-1]) == sum(segments) + head[0] + head[1]


@pytest.mark.parametrize("k", range(EXITS))
def test_mean_cost_rises_with_each_threshold(k, plan):
    before = 0.0
    for quantile in (0.0, 0.25, 0.5, 0.75, 1.0):
        thresholds = list(plan.thresholds)
        thresholds[k] = float(trace().scores(plan.rule)[:, k].quantile(quantile)) + (1.0 if quantile == 1 else 0.0)
        cost = float(run_of(replace(plan, thresholds=tuple(thresholds)), Latency(2000))(items()[:2000]).cost.mean())
        assert cost >= before
        before = cost


# -------------------------------------------------------------------------------------------------------- which exits are checked


def table_of(segment: float, head: list[float]) -> LatencyTable:
    heads = torch.tensor([[h, h] for h in (*head, 0.0)])
    return LatencyTable((1, 64), torch.full((EXITS + 1, 2), segment), heads, torch.zeros(2), 0.0, "made up")


def test_an_exit_that_does_not_pay_is_dropped(plan, graphs):
    """Its head is not run, who would have left there leaves later, and the engine says so."""
    table = table_of(1.0, [0.0, 100.0, 0.0, 0.0])
    run = compile(network(), plan, Latency(1), table=table, graphs=graphs)
    assert run.decide == (True, False, True, True)
    assert list(run.dropped) == [AT[1]] and f"{plan.shares[1]:.1%}" in run.dropped[AT[1]]
    assert f"dropped {AT[1]}" in str(run) and "checks 1, 3, 4" in str(run)
    calls: list[int] = []
    handles = [h.register_forward_hook(lambda *_, k=k: calls.append(k)) for k, h in enumerate(network().heads)]
    exits = joined(run.stream(items()[:100].split(1)))[1]
    for handle in handles:
        handle.remove()
    assert 1 not in calls and 2 in calls and 1 not in exits
    without = (plan.thresholds[0], float("inf"), *plan.thresholds[2:])
    assert torch.equal(exits, leave_at(trace().scores(plan.rule), without)[:100])
    assert float(run.costs[-1]) == float(trace().cost[-1]) - network().exits[1].head_flops


def test_nothing_is_dropped_when_told_so_or_when_a_guarantee_is_about_these_exits(plan):
    table = table_of(1.0, [0.0, 100.0, 0.0, 0.0])
    assert compile(network(), plan, table=table, drop=False, graphs=False).decide == (True,) * EXITS
    promise = Certificate("kept", "LTT", {}, {}, guaranteed=True, items=100, delta=0.1)
    guaranteed = replace(plan, certificate=promise)
    run = compile(network(), guaranteed, table=table, graphs=False)
    assert run.decide == (True,) * EXITS and not run.dropped
    assert compile(network(), guaranteed, table=table, drop=True, graphs=False).decide == (True, False, True, True)
    estimate = replace(plan, certificate=replace(promise, guaranteed=False, delta=None))
    assert compile(network(), estimate, table=table, graphs=False).decide == (True, False, True, True)


@pytest.mark.parametrize("head", [PooledLinear(), Cascade(PooledLinear())], ids=["alone", "chained"])
def test_dropping_an_exit_saves_its_head_only_if_no_later_one_reads_it(head, graphs):
    """At batch 1 the first exit costs 0.5 ms and lets a fifth of the rows skip the 1 ms until the next."""
    net = attach(vector_model(), AT, example=torch.randn(2, 6), head=head).eval()
    plan = Plan(Confidence(), net.names, (0.5,) * EXITS + (float("-inf"),), (0.2,) * (EXITS + 1), 0.6)
    run = compile(net, plan, Latency(1), table=table_of(1.0, [0.5, 0.0, 0.0, 0.0]), graphs=graphs)
    assert run.decide == (isinstance(head, Cascade), True, True, True)


def test_warns_when_no_exit_pays(plan, graphs):
    table = table_of(1.0, [100.0] * EXITS)
    with pytest.warns(NoSavingWarning, match="the model runs as it is"):
        run = compile(network(), plan, table=table, graphs=graphs)
    assert run.decide == (False,) * EXITS and len(run.dropped) == EXITS and "checks no exit" in str(run)
    with torch.no_grad():
        assert torch.equal(run(items()[:3]).output, network().model(items()[:3]))
    with pytest.warns(NoSavingWarning, match="kept"):
        assert all(compile(network(), plan, table=table, drop=False, graphs=graphs).decide)


def test_quota_is_carried_over_a_dropped_exit(plan, graphs):
    """What would have left at a dropped exit leaves at the next one, so the number that remains is the same there."""
    table = table_of(1.0, [0.0, 100.0, 0.0, 0.0])
    table = replace(table, segment_ms=torch.tensor([[0.1, 6.4]] * (EXITS + 1)), head_ms=table.head_ms * torch.tensor([0.1, 6.4]))
    run = compile(network(), plan, Quota(64), table=table, graphs=graphs)
    assert run.decide == (True, False, True, True)
    counts = run(items()[:64]).exit.bincount(minlength=EXITS + 1)
    sizes = quota_sizes(plan.shares, 64)
    assert counts.tolist() == [64 - sizes[0], 0, sizes[0] - sizes[2], sizes[2] - sizes[3], sizes[3]]


def test_measured_table(plan):
    table = measure_table(network(), plan, [1, 8])
    assert table.batch_sizes == (1, 8) and table.segment_ms.shape == table.head_ms.shape == (EXITS + 1, 2)
    assert (table.segment_ms >= 0).all() and (table.segment_ms.sum(0) > 0).all()
    assert (table.head_ms[:-1] > 0).all() and (table.head_ms[-1] == 0).all()
    assert (table.gather_ms > 0).all() and table.sync_ms >= 0.0 and table.device.startswith("CPU")


@pytest.mark.filterwarnings("ignore::offramp.core.errors.NoSavingWarning")
@pytest.mark.parametrize("mode", [Latency(1), Latency(16), Throughput(16), Quota(16)])
def test_measuring_changes_no_answer(plan, mode, graphs):
    run = compile(network(), plan, mode, drop=False, graphs=graphs)
    assert run.table is not None and run.table.segment_ms.shape == (EXITS + 1, len(run.table.batch_sizes))
    same(run(items()[:16]), run_of(plan, mode, graphs=graphs)(items()[:16]))


# -------------------------------------------------------------------------------------------------------------------------- errors


def test_a_plan_for_another_network_is_refused(plan):
    with pytest.raises(FingerprintMismatch, match="record and calibrate again"):
        compile(network(), replace(plan, fingerprint="0" * 64))
    other = attach(network().model, AT[:2], example=torch.randn(2, 6))
    with pytest.raises(InvalidInput, match="exits"):
        compile(other, plan)


@pytest.mark.parametrize("mode", [Latency(0), Throughput(0), Throughput(8, backlog=0), Quota(-1)])
def test_sizes_must_be_positive(mode, plan):
    with pytest.raises(InvalidInput, match="at least 1"):
        compile(network(), plan, mode, measure=False)
