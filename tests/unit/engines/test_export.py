"""The exported adaptive model against a run of the untouched model, row by row."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")

import offramp.engines.export as export_file  # noqa: E402
from offramp.core.certificate import Certificate, Estimate, Plan  # noqa: E402
from offramp.core.errors import ExportError, FingerprintMismatch, InvalidInput, MissingExtra  # noqa: E402
from offramp.core.protocols import Head, Rule  # noqa: E402
from offramp.core.types import Readout  # noqa: E402
from offramp.engines.export import AdaptiveModule, export_onnx, export_program  # noqa: E402
from offramp.engines.export_check import Check  # noqa: E402
from offramp.engines.export_trace import Inputs  # noqa: E402
from offramp.network import MultiExit, attach, never  # noqa: E402
from offramp.policies import (  # noqa: E402
    Confidence,
    Energy,
    Entropy,
    HaltingCDF,
    LearnedGate,
    Margin,
    OutputStability,
    Patience,
    Selector,
    StateSimilarity,
    after,
    any_of,
    at,
)

INF = math.inf


class Skips(nn.Module):
    """A small U shape: two skips cross every cut, and a conditioning vector comes in by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.down = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.middle = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
        self.up = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(16, 8, 3, padding=1), nn.ReLU())
        self.shift = nn.Linear(4, 8)
        self.out = nn.Linear(16, 5)

    def forward(self, image: Tensor, *, condition: Tensor) -> dict[str, Tensor]:
        a = self.stem(image)
        b = self.down(a)
        c = self.middle(b) + b
        d = self.up(c) + a + self.shift(condition)[:, :, None, None]
        return {"logits": self.out(torch.cat([d, a], 1).mean((2, 3)))}


class Mixer(nn.Module):
    """Residual perceptrons, the cheapest thing with four places to leave."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(12, 12), nn.Tanh()) for _ in range(4))
        self.last = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)


class Summing(Head):
    """Adds the answers of all earlier exits to its own."""

    needs_previous = True

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.own = nn.Linear(12, 5)
        self.first = first

    def forward(self, hidden: Tensor, previous: tuple[Tensor, ...] = ()) -> Tensor:
        if not self.first and not previous:
            raise RuntimeError("no earlier answers were given")
        return self.own(hidden) + sum(previous, torch.zeros(()))


@dataclass
class Case:
    """A network and inputs for it: ``inputs(rows)`` gives ``(args, kwargs)`` and takes a length where that varies."""

    net: MultiExit
    inputs: Any
    names: tuple[str, ...]
    lengths: tuple[int | None, ...] = (None,)


def _images(size: int) -> Any:
    def inputs(rows: int, length: int | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(rows)),), {}

    return inputs


def _vit() -> Case:
    model = pytest.importorskip("timm").create_model("vit_tiny_patch16_224", img_size=32, embed_dim=32, depth=3, num_heads=2, num_classes=5)
    inputs = _images(32)
    return Case(attach(_shaken(model), ["blocks.0", "blocks.1"], example=inputs(2)), inputs, ("x",))


def _resnet() -> Case:
    model = pytest.importorskip("timm").create_model("resnet10t", num_classes=5, channels=(16, 16, 32, 32))
    inputs = _images(32)
    return Case(attach(_shaken(model), ["layer1", "layer3"], example=inputs(2)), inputs, ("x",))


def _skips() -> Case:
    def inputs(rows: int, length: int | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        g = torch.Generator().manual_seed(rows)
        return (torch.randn(rows, 3, 8, 8, generator=g),), {"condition": torch.randn(rows, 4, generator=g)}

    return Case(attach(_shaken(Skips()), ["stem", "down", "middle"], example=inputs(2)), inputs, ("image", "condition"))


def _bert() -> Case:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=50,
        max_position_embeddings=16,
        num_labels=5,
    )
    model = transformers.BertForSequenceClassification(config)

    def inputs(rows: int, length: int | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        g = torch.Generator().manual_seed(rows)
        length = length or 10
        mask = (torch.arange(length)[None] < torch.randint(2, length + 1, (rows, 1), generator=g)).long()
        return (), {"input_ids": torch.randint(0, 50, (rows, length), generator=g), "attention_mask": mask}

    net = attach(_shaken(model), ["bert.encoder.layer.0", "bert.encoder.layer.1"], example=inputs(2))
    return Case(net, inputs, ("input_ids", "attention_mask"), (10, 4))


def _mixer(head: Any = None) -> Case:
    def inputs(rows: int, length: int | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (torch.randn(rows, 12, generator=torch.Generator().manual_seed(rows)),), {}

    return Case(attach(_shaken(Mixer()), [f"blocks.{i}" for i in range(3)], example=inputs(2), head=head), inputs, ("x",))


def _shaken(model: nn.Module) -> nn.Module:
    """Untrained models answer almost alike for every input; larger weights and real batch statistics part the rows."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
            elif isinstance(module, nn.Linear):
                module.weight.mul_(3)
    return model.eval()


MODELS = {"vit": _vit, "resnet": _resnet, "skips": _skips, "bert": _bert}


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    return {}


@pytest.fixture
def case(request: pytest.FixtureRequest, cases: dict[str, Case]) -> Case:
    name = request.param
    if name not in cases:
        torch.manual_seed(0)
        cases[name] = MODELS[name]()
    return cases[name]


@pytest.fixture(scope="module")
def mixer() -> Case:
    torch.manual_seed(0)
    return _mixer()


def row(inputs: tuple[tuple[Any, ...], dict[str, Any]], i: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return tuple(t[i : i + 1] for t in inputs[0]), {k: t[i : i + 1] for k, t in inputs[1].items()}


@torch.no_grad()
def all_scores(net: MultiExit, rule: Rule, inputs: Any) -> Tensor:
    """``[B, K - 1]``, nobody leaving."""
    logits, states = net.eval().forward_with_states(*inputs[0], **inputs[1])
    memory, scores = rule.begin(len(logits[0]), torch.device("cpu")), []
    for k, state in enumerate(states):
        score, memory = rule.score(k, Readout(logits[k], state), memory)
        scores.append(score)
    return torch.stack(scores, 1)


@torch.no_grad()
def row_by_row(net: MultiExit, rule: Rule, thresholds: Any, inputs: Any, rows: int) -> tuple[Tensor, Tensor]:
    """Every row on its own through the untouched model, rule state from scratch: no batch, no compaction, no cut."""
    net.eval()
    outputs, exits = [], []
    for i in range(rows):
        args, kwargs = row(inputs, i)
        logits, states = net.forward_with_states(*args, **kwargs)
        memory = rule.begin(1, torch.device("cpu"))
        leaves = len(states)
        for k, state in enumerate(states):
            score, memory = rule.score(k, Readout(logits[k], state), memory)
            if float(score[0]) >= thresholds[k]:
                leaves = k
                break
        outputs.append(logits[leaves][0])
        exits.append(leaves)
    return torch.stack(outputs), torch.tensor(exits)


def parting(net: MultiExit, rule: Rule, inputs: Any) -> tuple[float, ...]:
    """Thresholds in the widest gap near the middle of the scores still there, so that rows leave everywhere and none is at a tie."""
    scores = all_scores(net, rule, inputs)
    here = torch.ones(len(scores), dtype=torch.bool)
    thresholds = []
    for k in range(scores.shape[1]):
        levels = scores[here, k].unique()
        gaps = levels.diff()
        low, high = len(gaps) // 4, max(len(gaps) // 4 + 1, 3 * len(gaps) // 4)
        if len(gaps) == 0:
            thresholds.append(INF)
            continue
        best = low + int(gaps[low:high].argmax())
        thresholds.append(float(levels[best] + levels[best + 1]) / 2)
        here &= scores[:, k] < thresholds[-1]
    return tuple(thresholds)


def plan_of(net: MultiExit, rule: Rule, thresholds: Any, certificate: Certificate | None = None) -> Plan:
    count = len(net.names)
    return Plan(rule, net.names, (*thresholds, -INF), (1 / count,) * count, 0.5, certificate, fingerprint=net.fingerprint())


def feed(case: Case, inputs: Any) -> dict[str, Any]:
    return dict(zip(case.names, (t.numpy() for t in (*inputs[0], *inputs[1].values())), strict=True))


def run(path: Any, feeds: dict[str, Any]) -> tuple[Tensor, Tensor]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    output, exits = session.run(["output", "exit"], feeds)
    return torch.from_numpy(output), torch.from_numpy(exits)


def agree(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    assert got[1].tolist() == want[1].tolist()
    torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", MODELS, indirect=True)
def test_file_equals_rows_run_alone(case: Case, tmp_path: Any) -> None:
    thresholds = parting(case.net, Confidence(), case.inputs(60))
    report = export_onnx(case.net, plan_of(case.net, Confidence(), thresholds), tmp_path / "model.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    assert "If" not in report.operators and "Loop" not in report.operators
    assert report.operators["NonZero"] == len(case.net.at)
    assert tuple(report.inputs) == case.names and tuple(report.outputs) == ("output", "exit")
    assert all(shape[0] == "batch" for shape in (*report.inputs.values(), *report.outputs.values()))
    assert any("all leave" in n for n in report.checked) and any("nobody" in n for n in report.checked)
    assert any("length" in n for n in report.checked) == (len(case.lengths) > 1)
    assert report.largest_difference < 1e-4
    for rows in (60, 7, 1):
        for length in case.lengths:
            inputs = case.inputs(rows, length)
            want = row_by_row(case.net, Confidence(), thresholds, inputs, rows)
            agree(run(report.path, feed(case, inputs)), want)
            if rows == 60 and length == case.lengths[0]:
                assert len(want[1].unique()) == len(case.net.names)  # rows do leave everywhere, so the comparison means something


@pytest.mark.parametrize("case", ["skips", "bert"], indirect=True)
def test_program_equals_rows_run_alone(case: Case) -> None:
    thresholds = parting(case.net, Confidence(), case.inputs(60))
    for chosen in (thresholds, (-INF,) * len(thresholds)):
        module = export_program(case.net, plan_of(case.net, Confidence(), chosen)).module()
        for rows in (60, 7, 1):
            inputs = case.inputs(rows, case.lengths[-1])
            with torch.no_grad():
                agree(module(*inputs[0], **inputs[1]), row_by_row(case.net, Confidence(), chosen, inputs, rows))


def _rules(case: Case) -> dict[str, Rule]:
    shapes = [e.hidden_shape for e in case.net.exits]
    return {
        "entropy": Entropy(),
        "margin": Margin(),
        "energy": Energy(2.0),
        "patience": Patience(),
        "output stability": OutputStability(),
        "state similarity": StateSimilarity(),
        "gate": LearnedGate(3, conditional=True),
        "halting": HaltingCDF.for_shapes(shapes),
        "selector": Selector.for_shapes(shapes),
        "any of, stateful": any_of(at(Confidence(), 0.5), at(HaltingCDF.for_shapes(shapes), 0.5)),
        "after": after(1, Margin()),
    }


@pytest.mark.parametrize("name", _rules(_mixer()))
def test_module_with_every_rule(name: str, mixer: Case) -> None:
    torch.manual_seed(1)
    rule = _rules(mixer)[name]
    inputs = mixer.inputs(60)
    thresholds = parting(mixer.net, rule, inputs)
    module = AdaptiveModule(mixer.net, plan_of(mixer.net, rule, thresholds)).eval()
    want = row_by_row(mixer.net, rule, thresholds, inputs, 60)
    assert len(want[1].unique()) >= 2
    with torch.no_grad():
        agree(module(*inputs[0]), want)


@pytest.mark.parametrize("name", ["patience", "any of, stateful"])
def test_file_with_rules_that_remember(name: str, mixer: Case, tmp_path: Any) -> None:
    torch.manual_seed(1)
    rule = _rules(mixer)[name]
    thresholds = parting(mixer.net, rule, mixer.inputs(60))
    report = export_onnx(mixer.net, plan_of(mixer.net, rule, thresholds), tmp_path / "model.onnx")
    for rows in (60, 7, 1):
        inputs = mixer.inputs(rows)
        agree(run(report.path, feed(mixer, inputs)), row_by_row(mixer.net, rule, thresholds, inputs, rows))


def test_heads_that_read_earlier_answers(tmp_path: Any) -> None:
    """The exit in the middle is off, and the one after it still reads its answer, compacted."""
    torch.manual_seed(0)
    case = _mixer([Summing(True), Summing(False), Summing(False)])
    inputs = case.inputs(60)
    low, _, high = parting(case.net, Entropy(), inputs)
    report = export_onnx(case.net, plan_of(case.net, Entropy(), (low, INF, high)), tmp_path / "model.onnx")
    assert report.exits == ("blocks.0", "blocks.2", "output") and report.operators["NonZero"] == 2
    want = row_by_row(case.net, Entropy(), (low, INF, high), inputs, 60)
    assert want[1].unique().tolist() == [0, 2, 3]
    agree(run(report.path, feed(case, inputs)), want)


def test_exits_that_are_off_are_not_in_the_file(mixer: Case, tmp_path: Any) -> None:
    full = export_onnx(mixer.net, never(mixer.net, Confidence()), tmp_path / "never.onnx")
    assert full.exits == ("output",) and full.operators.get("NonZero", 0) == 0 and full.operators.get("Softmax", 0) == 0
    inputs = mixer.inputs(7)
    output, exits = run(full.path, feed(mixer, inputs))
    with torch.no_grad():
        torch.testing.assert_close(output, mixer.net.model(*inputs[0]))
    assert exits.tolist() == [3] * 7
    assert AdaptiveModule(mixer.net, plan_of(mixer.net, Confidence(), (INF, 0.5, INF))).read == {1}
    # A rule that remembers must see the exits before, though nobody may leave there.
    halting = HaltingCDF.for_shapes([e.hidden_shape for e in mixer.net.exits])
    assert AdaptiveModule(mixer.net, plan_of(mixer.net, halting, (INF, 0.5, INF))).read == {0, 1}


def test_metadata_and_optional_thresholds(mixer: Case, tmp_path: Any) -> None:
    certificate = Certificate("promise", "LTT", {"delta": 0.1}, {"drop": Estimate(0.0, 0.0, 0.1)}, True, 100, delta=0.1)
    plan = plan_of(mixer.net, Confidence(), (0.4, INF, 0.6), certificate)
    before = {k: v.clone() for k, v in mixer.net.train().state_dict().items()}
    code = [s.module.code for s in mixer.net.cut().segments]
    report = export_onnx(mixer.net, plan, tmp_path / "model.onnx", thresholds_as_input=True, opset=18)
    # The network is left as it was.
    assert all(m.training for m in mixer.net.modules())
    assert all(torch.equal(v, before[k]) for k, v in mixer.net.state_dict().items())
    assert [s.module.code for s in mixer.net.cut().segments] == code
    assert report.opset == 18 and "blocks.0" in str(report) and "same exits" in str(report)
    stored = {p.key: p.value for p in onnx.load(report.path).metadata_props}
    assert stored["offramp.fingerprint"] == mixer.net.fingerprint()
    assert json.loads(stored["offramp.thresholds"]) == ["0.4", "inf", "0.6", "-inf"]
    assert json.loads(stored["offramp.exits"]) == list(mixer.net.names)
    assert Certificate.from_dict(json.loads(stored["offramp.certificate"])) == certificate
    assert json.loads(stored["offramp.rule"])["type"] == "Confidence"
    inputs = mixer.inputs(9)
    agree(run(report.path, feed(mixer, inputs)), row_by_row(mixer.net, Confidence(), plan.thresholds, inputs, 9))
    for thresholds in ([-INF, INF, INF], [INF, INF, INF], [2.0, INF, 0.3]):
        feeds = {**feed(mixer, inputs), "thresholds": torch.tensor(thresholds).numpy()}
        agree(run(report.path, feeds), row_by_row(mixer.net, Confidence(), thresholds, inputs, 9))


def test_a_wrong_file_is_not_written(mixer: Case, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight that is off changes answers; a comparison the wrong way round changes who leaves."""
    target = tmp_path / "model.onnx"
    target.write_text("the file that was there")
    plan = plan_of(mixer.net, Confidence(), (0.4, INF, INF))
    right = export_file._to_onnx(AdaptiveModule(mixer.net, plan), Inputs(mixer.net), ["x"], None)

    heavier = onnx.ModelProto()
    heavier.CopyFrom(right)
    truth = mixer.net.model.last.bias.detach().numpy()
    values = [onnx.numpy_helper.to_array(t) for t in heavier.graph.initializer]
    (place,) = (i for i, v in enumerate(values) if v.shape == truth.shape and (v == truth).all())
    tensor = heavier.graph.initializer[place]
    tensor.CopyFrom(onnx.numpy_helper.from_array(values[place] + 0.01, tensor.name))

    reverse = onnx.ModelProto()
    reverse.CopyFrom(right)
    (compare,) = (n for n in reverse.graph.node if n.op_type == "GreaterOrEqual")
    compare.op_type = "Less"

    for wrong, message in ((heavier, r"largest difference 0\.01"), (reverse, "other exits")):
        with monkeypatch.context() as patch:
            patch.setattr(export_file, "_to_onnx", lambda *_, wrong=wrong: wrong)
            with pytest.raises(ExportError, match=message):
                export_onnx(mixer.net, plan, target)
    assert target.read_text() == "the file that was there" and [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


class _Answers:
    """Stands for a session that sends every row to the given exits and answers as those exits do."""

    def __init__(self, answers: Tensor, exits: list[int]) -> None:
        self.answers, self.exits = answers, torch.tensor(exits)

    def get_inputs(self) -> list[Any]:
        return []

    def run(self, names: Any, feeds: Any) -> list[Any]:
        return [self.answers[torch.arange(len(self.exits)), self.exits].numpy(), self.exits.numpy()]


def test_ties_are_excused_and_only_ties(mixer: Case) -> None:
    def compare(rule: Rule, shift: float) -> Any:
        module = AdaptiveModule(mixer.net, plan_of(mixer.net, rule, (0.5, INF, INF)))
        check = Check(mixer.net, module, Inputs(mixer.net), ("x",), 1e-4)
        sample = check.sample(mixer.inputs(2)[0])
        scores = sample.scores[:, 0]
        first = int(scores.argmax())
        thresholds = torch.tensor([float(scores[first]) + shift, INF, INF])
        expected = torch.where(scores >= thresholds[0], 0, 3)
        other = expected.clone()
        other[first] = 3 - other[first]
        return check.compare("a case", _Answers(sample.answers, other.tolist()), sample, thresholds)

    assert compare(Confidence(), 1e-6).ties == 1 and compare(Confidence(), -1e-6).ties == 1
    with pytest.raises(ExportError, match="other exits"):
        compare(Confidence(), 1e-2)
    with pytest.raises(ExportError, match="other exits"):
        compare(Patience(), 0.0)  # a counter equals its threshold whenever it fires: no tie


def test_refusals(mixer: Case, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(mixer.net, Confidence(), (0.4, 0.5, 0.6))
    with pytest.raises(InvalidInput, match=r"blocks\.0"):
        export_onnx(mixer.net, Plan(Confidence(), ("a", "output"), (0.5, -INF), (0.5, 0.5), 0.5), tmp_path / "m.onnx")
    with pytest.raises(FingerprintMismatch):
        foreign = Plan(Confidence(), mixer.net.names, plan.thresholds, plan.shares, 0.5, fingerprint="another")
        export_program(mixer.net, foreign)
    with monkeypatch.context() as patch:
        patch.setattr(export_file, "PROTOBUF_LIMIT", 100)
        with pytest.raises(ExportError, match="half precision"):
            export_onnx(mixer.net, plan, tmp_path / "m.onnx")
    for package in ("onnx", "onnxscript", "onnxruntime"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(MissingExtra, match=rf"{package}.*offramp\[onnx\]"):
                export_onnx(mixer.net, plan, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_heads_that_branch_on_values_are_named(tmp_path: Any) -> None:
    class Branching(Head):
        def __init__(self) -> None:
            super().__init__()
            self.own = nn.Linear(12, 5)

        def forward(self, hidden: Tensor, previous: tuple[Tensor, ...] = ()) -> Tensor:
            return self.own(hidden) if float(hidden.sum()) > 0 else self.own(-hidden)

    case = _mixer([Branching(), Branching(), Branching()])
    with pytest.raises(ExportError, match="must not branch"):
        export_onnx(case.net, plan_of(case.net, Confidence(), (0.4, 0.5, 0.6)), tmp_path / "m.onnx")
