"""Throughput mode on the host: batches that are cut up and put together again."""

from __future__ import annotations

import pytest
import torch
from engine_models import items, plan_of, rules, run_of, trace

from offramp.budget import leave_at
from offramp.engines.classify.engine import Throughput


@pytest.mark.parametrize("name", ["Confidence", "Patience"])
def test_a_batch_larger_than_a_bucket_is_split_without_a_copy(name):
    """The first stage sees views of what came in, one behind the other, rule state included."""
    plan = plan_of(trace(), rules()[name])
    run = run_of(plan, Throughput(16))
    seen = []
    run.stages[0].register_forward_pre_hook(lambda module, rows: seen.append(rows))
    x = items()[:40].clone()
    (answers,) = run.stream([x])
    assert [len(rows[0]) for rows in seen] == [16, 16, 8]
    assert [rows[0].data_ptr() - x.data_ptr() for rows in seen] == [start * x.stride(0) * x.element_size() for start in (0, 16, 32)]
    for parts in zip(*seen, strict=True):
        assert len({part.untyped_storage().data_ptr() for part in parts}) == 1
    expected = leave_at(trace().scores(plan.rule), plan.thresholds)[:40]
    assert torch.equal(answers.exit, expected)
    torch.testing.assert_close(answers.output, trace().logits[torch.arange(40), expected], rtol=1e-5, atol=1e-5)


def test_rows_of_several_batches_share_a_bucket(plan):
    """A bucket that takes the rest of one batch and the start of the next; each batch gets its own rows back."""
    run = run_of(plan, Throughput(16))
    seen = []
    run.stages[0].register_forward_pre_hook(lambda module, rows: seen.append(rows[0]))
    sizes = [20, 20, 8]
    answers = list(run.stream(items()[:48].split(sizes)))
    assert [len(rows) for rows in seen] == [16, 16, 16]
    assert torch.equal(torch.cat(seen), items()[:48])
    expected = leave_at(trace().scores(plan.rule), plan.thresholds)[:48]
    assert [len(a.exit) for a in answers] == sizes
    assert torch.equal(torch.cat([a.exit for a in answers]), expected)
