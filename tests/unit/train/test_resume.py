"""Killed and resumed = never interrupted; damaged checkpoints; the metrics file."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from train_worker import resumable

from offramp.core.errors import ArtifactError, InvalidInput, OfframpWarning
from offramp.train import Frozen, Joint, Ramp, fit, load_best, read_metrics
from offramp.train.checkpoint import checkpoints, flatten, read_checkpoint, save_checkpoint, unflatten
from offramp.train.metrics import MetricsLog

WORKER = Path(__file__).with_name("train_worker.py")


def run(*arguments: object) -> int:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, str(WORKER), *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=120)
    if done.returncode not in (0, -signal.SIGKILL):
        raise AssertionError(done.stderr)
    return done.returncode


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    net, result = resumable(str(tmp_path_factory.mktemp("whole")), None)
    return net.state_dict(), result


def test_killed_at_random_steps_and_resumed_ends_bit_identical(whole, tmp_path):
    # A run makes 28 training forwards, 7 an epoch; the child dies in the middle of one, twice, then runs to the end here. Forward 10
    # to 13 is after the first step of an epoch, so that resuming has batches to skip.
    generator = random.Random(7)
    assert run("resumable", tmp_path, generator.randrange(10, 14)) == -signal.SIGKILL
    unfinished = read_metrics(tmp_path / "metrics.jsonl")
    assert unfinished and checkpoints(tmp_path / "checkpoints")
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"event":"step","st')  # a line cut short by the kill
    assert run("resumable", tmp_path, generator.randrange(9, 13)) == -signal.SIGKILL
    net, result = resumable(str(tmp_path), None)
    weights, uninterrupted = whole
    assert result.resumed_from is not None and 0 < result.resumed_from < result.steps
    assert same(net.state_dict(), weights)
    assert result.history == uninterrupted.history and result.best == uninterrupted.best
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(result.history)
    steps = [r["step"] for r in lines if r["event"] == "step"]
    assert steps == list(range(1, result.steps + 1))


@pytest.mark.parametrize("stop", [1, 11])
def test_stopped_by_max_steps_and_continued_keeps_the_order_of_the_batches(whole, tmp_path, stop, make, data):
    def train(folder, steps):
        net = make(dropout=0.3)
        fit(
            net,
            DataLoader(TensorDataset(*data), batch_size=8, shuffle=True, generator=torch.Generator()),
            epochs=3,
            output_dir=folder,
            max_steps=steps,
            progress=False,
        )
        return net.state_dict()

    train(tmp_path / "a", stop)
    assert same(train(tmp_path / "a", 18), train(tmp_path / "b", 18))


def test_a_finished_run_is_only_loaded(whole, tmp_path, make, data):
    loader = DataLoader(TensorDataset(*data), batch_size=16, shuffle=True)
    first, second = make(), make(seed=3)
    a = fit(first, loader, Joint(Ramp()), epochs=2, output_dir=tmp_path, progress=False)
    b = fit(second, loader, Joint(Ramp()), epochs=2, output_dir=tmp_path, progress=False)
    assert same(first.state_dict(), second.state_dict()) and b.history == a.history and b.resumed_from == a.steps
    fresh = fit(make(seed=3), loader, Joint(Ramp()), epochs=1, output_dir=tmp_path, progress=False, resume=False)
    assert fresh.resumed_from is None and len(read_metrics(tmp_path / "metrics.jsonl")) == len(fresh.history)


def test_workers_and_iterated_lists_resume_too(tmp_path, make, data):
    batches = [(data[0][i : i + 10], data[1][i : i + 10]) for i in range(0, 50, 10)]
    a, b = make(dropout=0.2), make(dropout=0.2)
    fit(a, batches, epochs=2, output_dir=tmp_path / "a", max_steps=3, progress=False)
    fit(a, batches, epochs=2, output_dir=tmp_path / "a", max_steps=10, progress=False)
    fit(b, batches, epochs=2, max_steps=10, progress=False)
    assert same(a.state_dict(), b.state_dict())


def damaged(folder, how):
    arrays = folder / "state.safetensors"
    if how == "truncated":
        arrays.write_bytes(arrays.read_bytes()[:-7])
    elif how == "altered":
        raw = bytearray(arrays.read_bytes())
        raw[-1] ^= 1
        arrays.write_bytes(bytes(raw))
    elif how == "json":
        (folder / "state.json").write_text((folder / "state.json").read_text()[:100])
    else:
        (folder / "state.json").write_text("{}")


def test_damaged_checkpoints(tmp_path, make, data):
    loader = DataLoader(TensorDataset(*data), batch_size=16, shuffle=True)
    reference = make(dropout=0.1)
    fit(reference, loader, epochs=3, progress=False)
    fit(make(dropout=0.1), loader, epochs=2, output_dir=tmp_path / "start", progress=False)
    for how in ("truncated", "altered", "json", "foreign"):
        shutil.copytree(tmp_path / "start", tmp_path / how)
        old, new = checkpoints(tmp_path / how / "checkpoints")
        damaged(new, how)
        net = make(dropout=0.1)
        with pytest.warns(OfframpWarning, match=f"passed over; training resumes from {old.name}"):
            fit(net, loader, epochs=3, output_dir=tmp_path / how, max_steps=5, progress=False)
        if how == "truncated":
            for folder in checkpoints(tmp_path / how / "checkpoints"):
                damaged(folder, how)
            with pytest.raises(ArtifactError, match=r"No checkpoint in .* can be read.*resume=False"):
                fit(net, loader, epochs=3, output_dir=tmp_path / how, progress=False)
    net = make(dropout=0.1)
    damaged(checkpoints(tmp_path / "start" / "checkpoints")[-1], "altered")
    with pytest.warns(OfframpWarning):
        fit(net, loader, epochs=3, output_dir=tmp_path / "start", progress=False)
    assert same(net.state_dict(), reference.state_dict())


def test_another_run_in_the_folder_is_refused(tmp_path, make, data):
    loader = DataLoader(TensorDataset(*data), batch_size=16)
    fit(make(), loader, epochs=1, output_dir=tmp_path, progress=False)
    with pytest.raises(InvalidInput, match=r"holds another run: recipe was .*Joint.* and is .*Frozen"):
        fit(make(), loader, Frozen(), epochs=1, output_dir=tmp_path, progress=False)
    with pytest.raises(InvalidInput, match="exits was"):
        fit(make(at=("1",)), loader, epochs=1, output_dir=tmp_path, progress=False)
    with pytest.raises(InvalidInput, match="seed was 0 and is 1"):
        fit(make(), loader, epochs=1, output_dir=tmp_path, progress=False, seed=1)
    with pytest.raises(InvalidInput, match="another network"):
        fit(make(depth=6), loader, epochs=1, output_dir=tmp_path, progress=False)
    with pytest.raises(InvalidInput, match="optimizer or scheduler"):
        fit(make(), loader, epochs=2, output_dir=tmp_path, progress=False, scheduler=torch.optim.lr_scheduler.CosineAnnealingLR)


def test_nothing_is_pickled_and_only_the_newest_are_kept(tmp_path, make, data):
    loader = DataLoader(TensorDataset(*data), batch_size=16)
    result = fit(make(), loader, epochs=3, output_dir=tmp_path, progress=False, checkpoint_every=1, keep_checkpoints=3, eval_loader=loader)
    kept = checkpoints(tmp_path / "checkpoints")
    assert [p.name for p in kept] == [f"step-{s:09d}" for s in (10, 11, 12)]
    files = {p.relative_to(tmp_path).suffix for p in tmp_path.rglob("*") if p.is_file()}
    assert files == {".json", ".jsonl", ".safetensors"}
    assert not list(tmp_path.rglob(".*"))
    net = make(seed=4)
    assert load_best(net, tmp_path) == result.best["step"]


def test_optimizer_states_round_trip(tmp_path):
    state = {
        "state": {0: {"step": torch.tensor(3.0), "m": torch.randn(2, 3, dtype=torch.bfloat16)}, 1: {}},
        "groups": [{"lr": 0.1, "betas": (0.9, 0.999), "none": None, "flag": True, "inf": float("inf"), "name": "x"}],
        "tiny": 5e-324,
        "third": 1 / 3,
    }
    save_checkpoint(tmp_path, 1, state, keep=1)
    back = read_checkpoint(checkpoints(tmp_path)[0])
    assert back["groups"] == state["groups"] and back["third"] == 1 / 3 and back["tiny"] == 5e-324
    assert list(back["state"]) == [0, 1] and torch.equal(back["state"][0]["m"], state["state"][0]["m"])
    with pytest.raises(InvalidInput, match=r"state\.f is a function"):
        flatten({"f": lambda: None}, {})
    with pytest.raises(ArtifactError):
        unflatten({"tensor": "t9"}, {})
    with pytest.raises(ArtifactError):
        unflatten({"os.system": "x"}, {})


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, nesterov=True),
        lambda ps: torch.optim.Adam([{"params": ps[:3]}, {"params": ps[3:], "lr": 1e-2}], amsgrad=True),
    ],
)
def test_any_optimizer_resumes(tmp_path, make, data, optimizer):
    loader = DataLoader(TensorDataset(*data), batch_size=16, shuffle=True)
    a, b = make(dropout=0.2), make(dropout=0.2)
    for steps in (3, 8):
        fit(a, loader, epochs=2, output_dir=tmp_path, max_steps=steps, optimizer=optimizer, progress=False)
    fit(b, loader, epochs=2, optimizer=optimizer, progress=False)
    assert same(a.state_dict(), b.state_dict())


def test_metrics_file_is_repaired(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"a":1}\n{"a":2}\n{"a":3}\n{"a":')
    assert read_metrics(path) == [{"a": 1}, {"a": 2}, {"a": 3}]
    log = MetricsLog(path)
    log.start(2)
    log.add({"a": 9})
    log.close()
    assert path.read_bytes() == b'{"a":1}\n{"a":2}\n{"a":9}\n'
    with pytest.warns(OfframpWarning, match="holds 3 of the 5 lines"):
        MetricsLog(path).start(5)
