"""Recording: every exit on every item, equal to what the segments give, and refused where it would be wrong."""

from __future__ import annotations

import pytest
import torch
from engine_models import AT, CLASSES, EXITS, items, network, rules, vector_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from offramp.core.errors import InvalidInput
from offramp.core.parts import part_key
from offramp.core.trace import Trace
from offramp.core.types import Readout
from offramp.engines.classify.record import record, zero_one
from offramp.exits import Cascade, PooledLinear
from offramp.network import attach
from offramp.policies import Confidence, Entropy, Patience, StateSimilarity


def labels(rows: int) -> Tensor:
    return torch.randint(0, CLASSES, (rows,), generator=torch.Generator().manual_seed(5))


def batches(rows: int = 60, size: int = 25):
    return list(zip(items()[:rows].split(size), labels(rows).split(size), strict=True))


def test_what_is_recorded():
    net = network()
    found = record(net, batches(), provenance={"data": "made up"}, progress=False)
    assert isinstance(found, Trace) and found.items == 60 and found.exits == (*AT, "output")
    with torch.no_grad():
        expected = torch.stack(net(items()[:60]), dim=1)
    torch.testing.assert_close(found.logits, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(found.predictions, found.logits.argmax(-1)) and torch.equal(found.labels, labels(60))
    assert torch.equal(found.losses, (found.predictions != labels(60)[:, None]).float())
    cost, base = net.costs()
    assert torch.equal(found.cost, cost) and found.base_cost == base and (found.cost.diff() > 0).all()
    assert found.fingerprint == net.fingerprint() and found.why_not_replayable == ""
    known = {"data": "made up", "dtype": "float32", "torch": torch.__version__}
    assert {k: found.provenance[k] for k in known} == known
    assert all(t.device.type == "cpu" and not t.is_inference() for t in (found.logits, found.predictions, found.cost))
    (found.logits * torch.ones(1, requires_grad=True)).sum().backward()


def test_taps_and_cut_agree():
    """The trace is recorded in one forward with hooks; the engine runs segments. Both give the same answers at every exit."""
    net = network()
    found = record(net, batches(), progress=False)
    cut = net.cut()
    with torch.no_grad():
        state = cut.begin(items()[:60])
        for k in range(EXITS):
            state = cut.run(state, k, k + 1)
            torch.testing.assert_close(net.heads[k](state.hidden), found.logits[:, k], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(cut.end(cut.run(state, EXITS, EXITS + 1)), found.logits[:, -1], rtol=1e-6, atol=1e-6)


def test_batch_size_does_not_matter():
    one, other = record(network(), batches(size=60), progress=False), record(network(), batches(size=7), progress=False)
    torch.testing.assert_close(one.logits, other.logits, rtol=1e-6, atol=1e-6)
    assert torch.equal(one.labels, other.labels)


def test_scores_recorded_equal_scores_from_logits():
    chosen = [rules()[n] for n in ("Confidence", "Entropy", "Patience", "LearnedGateConditional", "Tempered", "SelectorLogits")]
    found = record(network(), batches(), rules=chosen, progress=False)
    plain = record(network(), batches(), progress=False)
    for rule in chosen:
        torch.testing.assert_close(found.recorded[part_key(rule)], plain.scores(rule), rtol=1e-6, atol=1e-6)


def test_a_rule_that_reads_states_is_recorded_on_them():
    rule = StateSimilarity(token=None)
    found = record(network(), batches(), rules=[rule], progress=False).scores(rule)
    with torch.no_grad():
        logits, states = network().forward_with_states(items()[:60])
    state = rule.begin(60, torch.device("cpu"))
    for k, hidden in enumerate(states):
        score, state = rule.score(k, Readout(logits[k], hidden), state)
        torch.testing.assert_close(found[:, k], score, rtol=1e-5, atol=1e-6)
    assert (found[:, 0] == float("-inf")).all() and not found[:, -1].any()


def test_heads_that_read_earlier_answers():
    net = attach(vector_model(), AT, example=torch.randn(2, 6), head=Cascade(PooledLinear())).eval()
    found = record(net, batches(), progress=False)
    with torch.no_grad():
        logits, states = net.forward_with_states(items()[:60])
        again = net.heads[2](states[2], tuple(logits[:2]))
    torch.testing.assert_close(found.logits[:, 2], again, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", ["tensor", "one", "pair", "mapping", "mapping with labels", "mapping with label", "args and labels"])
def test_what_a_loader_may_yield(form):
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = vector_model()

        def forward(self, pixels: Tensor, scale: Tensor | None = None) -> Tensor:
            return self.net(pixels) if scale is None else self.net(pixels) * scale

    x, y = items()[:8], labels(8)
    batch, labelled = {
        "tensor": (x, False),
        "one": ((x,), False),
        "pair": ((x, y), True),
        "mapping": ({"pixels": x}, False),
        "mapping with labels": ({"pixels": x, "labels": y}, True),
        "mapping with label": ({"label": y, "pixels": x}, True),
        "args and labels": ((x, torch.ones(8, 1), y), True),
    }[form]
    example = (x[:2], torch.ones(2, 1)) if form == "args and labels" else {"pixels": x[:2]} if "mapping" in form else x[:2]
    net = attach(Named().eval(), ["net.1", "net.3"], example=example)
    found = record(net, [batch], progress=False)
    assert found.items == 8 and (found.losses is not None) == (found.labels is not None) == labelled
    with torch.no_grad():
        torch.testing.assert_close(found.logits[:, -1], net.model.net(x), rtol=1e-6, atol=1e-6)


def test_without_logits():
    found = record(network(), batches(), keep_logits=False, rules=[Confidence()], progress=False)
    assert found.logits is None and found.scores(Confidence()).shape == (60, EXITS + 1)
    torch.testing.assert_close(found.scores(Confidence()), record(network(), batches(), progress=False).scores(Confidence()))


def test_modes_are_put_back():
    net = attach(nn.Sequential(*vector_model(), nn.Dropout(0.5)), AT, example=torch.randn(2, 6)).train()
    net.model[2].eval()
    net.heads[1].eval()
    before = [m.training for m in net.modules()]
    one, two = (record(net, batches(), progress=False) for _ in range(2))
    assert torch.equal(one.logits, two.logits), "recorded in evaluation mode"
    assert [m.training for m in net.modules()] == before
    with pytest.raises(InvalidInput):
        record(net, [], progress=False)
    with pytest.raises(RuntimeError):
        record(net, [torch.randn(2, 7)], progress=False)
    assert [m.training for m in net.modules()] == before
    assert not any(m._forward_hooks for m in net.modules())


def test_a_loader_of_an_iterable_data_set_has_no_length():
    class Rows(IterableDataset):
        def __iter__(self):
            yield from ((x, y) for images, targets in batches() for x, y in zip(images, targets, strict=True))

    found, listed = record(network(), DataLoader(Rows(), 25)), record(network(), batches())
    assert torch.equal(found.predictions, listed.predictions) and torch.equal(found.losses, listed.losses)


def test_an_empty_loader():
    with pytest.raises(InvalidInput, match="no batch"):
        record(network(), [], progress=False)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_named(bad):
    x = items()[:20].clone()
    x[13] = bad
    with pytest.raises(InvalidInput, match=r"Exit '1' .*item 13"):
        record(network(), x.split(5), progress=False)


@pytest.mark.parametrize("which", [0, 1])
def test_labels_for_some_batches_only(which):
    parts: list[object] = batches(50, 25)
    parts[which] = parts[which][0]
    with pytest.raises(InvalidInput, match="25 of 50 items have labels"):
        record(network(), parts, progress=False)


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_a_loss_outside_its_range(value):
    with pytest.raises(InvalidInput, match=r"\[0, 1\]"):
        record(network(), batches(), loss=lambda z, y: torch.full((len(y),), value), progress=False)


def test_the_default_loss_is_for_classes():
    assert zero_one(torch.tensor([[0.0, 1.0], [2.0, 1.0]]), torch.tensor([1, 1])).tolist() == [0.0, 1.0]
    net = attach(vector_model(1), AT, example=torch.randn(2, 6))
    values = torch.randn(8)
    with pytest.raises(InvalidInput, match=r"loss=\.\.\."):
        record(net, [(items()[:8], values)], progress=False)
    with pytest.raises(InvalidInput, match="integers"):
        record(network(), [(items()[:8], torch.eye(8)[:, :CLASSES])], progress=False)
    found = record(net, [(items()[:8], values)], loss=lambda z, y: (z[:, 0] - y).abs().clamp(max=1), progress=False)
    assert found.predictions.is_floating_point() and torch.equal(found.predictions, found.logits[..., 0])
    assert found.losses is not None and found.losses.shape == (8, EXITS + 1)


def test_saved_and_loaded(tmp_path):
    found = record(network(), batches(), rules=[StateSimilarity(token=None)], progress=False)
    found.save(tmp_path)
    again = Trace.load(tmp_path)
    for rule in (Confidence(), Entropy(CLASSES), Patience(), StateSimilarity(token=None)):
        assert torch.equal(again.scores(rule), found.scores(rule))
    assert dict(again.provenance) == dict(found.provenance)
