"""Two processes train what one trains, with whole weights in each (DDP) and with shards (FSDP2); sharding leaves the network whole."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from train_worker import CAN_SHARD, KINDS, items, network, start_two, together

from offramp.core.bundle import load_bundle
from offramp.core.errors import InvalidInput
from offramp.network import load
from offramp.train import load_best, read_metrics
from offramp.train.recipe import Joint
from offramp.train.sharding import check_sharding, copied
from offramp.train.trainee import Trainee

can_shard = pytest.mark.skipif(not CAN_SHARD, reason="sharding takes two GPUs, or none")


def finished(processes: list[subprocess.Popen[str]]) -> None:
    try:
        for process in processes:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each kind of training in one process, with the global batch of two."""
    folder = tmp_path_factory.mktemp("one")
    for kind in KINDS:
        together(str(folder), 0, 8, kind)
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    finished(start_two(str(folder)))
    return folder


@pytest.fixture
def shards(two: Path) -> Path:
    return two / "fsdp"


def same_as_one(two: Path, one: Path, kind: str) -> None:
    (c0, w0), (c1, w1) = (load_bundle(two / kind, f"rank{r}", "weights") for r in range(2))
    single, expected = load_bundle(one / kind, "rank0", "weights")
    assert all(torch.equal(w0[k], w1[k]) for k in w0)
    assert c0 == c1 and w0.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(w0[name], value, rtol=1e-4, atol=1e-5, msg=name)
    for a, b in zip(c0["history"], single["history"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4) and a["rows"] == b["rows"], (a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_ddp_equals_one_process_with_the_same_global_batch(one: Path, two: Path, kind: str) -> None:
    same_as_one(two / "ddp", one, kind)


@can_shard
@pytest.mark.parametrize("kind", KINDS)
def test_fsdp_equals_one_process_with_the_same_global_batch(one: Path, shards: Path, kind: str) -> None:
    same_as_one(shards, one, kind)


@can_shard
@pytest.mark.parametrize("kind", KINDS)
def test_what_fsdp_trained_is_saved_and_loaded(shards: Path, kind: str) -> None:
    """Also the frozen model: an adapter without it loads only if its weights are what they were, bit for bit."""
    _, weights = load_bundle(shards / kind, "rank0", "weights")
    net = load(network(0.0, kind == "frozen").model, shards / kind / "adapter", example=torch.randn(2, 8)).eval()
    assert all(torch.equal(v, weights[k]) for k, v in net.state_dict().items())
    with torch.no_grad():
        for name, z in zip(net.names, net(items()[0]), strict=True):
            torch.testing.assert_close(z, weights[f"logits.{name}"])


@can_shard
def test_fsdp_did_shard(shards: Path) -> None:
    """Each model, and where classes were named, its parts: three blocks, the model and the network."""
    content, _ = load_bundle(shards, "said0", "weights")
    assert content["units"] == {"alternating": [6], "frozen": [1], "gates": [1], "two phases": [1, 1]}


@can_shard
def test_fsdp_keeps_the_best_weights(shards: Path) -> None:
    net = network(0.0, False)
    evaluations = [r for r in read_metrics(shards / "alternating" / "run" / "metrics.jsonl") if r["event"] == "eval"]
    best = min(evaluations, key=lambda r: r["loss"])
    assert load_best(net, shards / "alternating" / "run") == best["step"]
    inputs, labels = items()
    with torch.no_grad():
        losses = [float(torch.nn.functional.cross_entropy(z, labels[:29])) for z in net.eval()(inputs[:29])]
    assert sum(losses) / len(losses) == pytest.approx(best["loss"], rel=1e-4)


@can_shard
def test_interrupted_fsdp_resumes_bit_identical(shards: Path) -> None:
    """Interrupted inside an epoch of each of two phases."""
    for rank in range(2):
        said, whole = load_bundle(shards, f"whole{rank}", "weights")
        _, parts = load_bundle(shards, f"parts{rank}", "weights")
        assert said["resumed"][:2] == [None, None] and 0 < said["resumed"][2] < len([r for r in said["whole"] if r["event"] == "step"])
        assert said["whole"] == said["parts"]
        assert whole.keys() == parts.keys() and all(torch.equal(v, parts[k]) for k, v in whole.items())


@can_shard
def test_fsdp_in_bfloat16_keeps_weights_in_float32(shards: Path) -> None:
    """Also after an evaluation, which leaves weights gathered in bfloat16."""
    found = load_bundle(shards, "said0", "weights")[0]["bf16"]
    assert found["computed"] == "{torch.bfloat16}" and found["kept"] == "{torch.float32}" and not found["rounded"]
    assert found["losses"][1] < found["losses"][0]


@can_shard
def test_fsdp_says_what_it_cannot_do(shards: Path) -> None:
    content, _ = load_bundle(shards, "said0", "weights")
    said = content["said"]
    if torch.cuda.device_count() < 2:
        assert "set up MULTI_CPU on cpu" in said["passed over"] and "ACCELERATE_USE_FSDP" in said["passed over"]
    assert "FSDP version 1" in said["version 1"] and "fsdp_version=2" in said["version 1"]
    assert "containers" in said["by size"] and "TRANSFORMER_BASED_WRAP" in said["by size"]
    assert "SGD keeps a sharded tensor of shape (4,)" in said["another shape"]
    assert "not finite at step 2" in said["not finite"]
    (_, first), (_, second) = (load_bundle(shards, f"said{rank}", "weights") for rank in range(2))
    assert all(torch.equal(v, second[k]) for k, v in first.items())
    assert content["before"] and all(content["before"].values())  # the weights are those before the step that was not taken


def test_other_ways_to_shard_are_refused() -> None:
    with pytest.raises(InvalidInput, match="DEEPSPEED"):
        check_sharding(SimpleNamespace(distributed_type="DEEPSPEED"))  # type: ignore[arg-type]


def test_a_network_that_cannot_be_copied_is_named(make: Callable[..., Any]) -> None:
    net = make()
    net.cut()
    copy = copied(Trainee(net, Joint()))
    assert copy.net._cut is None and net._cut is not None
    assert not {id(p) for p in copy.parameters()} & {id(p) for p in net.parameters()}
    net.model.lock = threading.Lock()
    with pytest.raises(InvalidInput, match=r"cannot be copied with copy\.deepcopy: cannot pickle"):
        copied(Trainee(net, Joint()))
