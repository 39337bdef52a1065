"""Throughput: inputs arrive a few at a time, stages run on full buckets, answers come back in order and depend on no neighbour."""

import time

import torch
from torch import nn

import offramp
from offramp.budget import ExitShares

torch.manual_seed(0)
torch.set_grad_enabled(False)
layers = [nn.Sequential(nn.Linear(512, 512), nn.GELU()) for _ in range(8)]
model = nn.Sequential(*layers, nn.Linear(512, 10)).eval()
net = offramp.attach(model, at=["1", "3", "5"], example=torch.randn(2, 512))

# An untrained network has nothing to say, but what it costs to run is real: a quarter of the items leaves at each exit.
calibration = torch.randn(1000, 512)
trace = offramp.record(net, calibration.split(250), progress=False)
plan = offramp.calibrate(trace, offramp.Confidence(), ExitShares((0.25, 0.25, 0.25, 0.25)))

inputs = torch.randn(2048, 512)
arriving = inputs.split(24)
run = offramp.compile(net, plan, offramp.ThroughputMode(bucket=256), drop=False)
answers = list(run.stream(arriving))

assert [len(a.exit) for a in answers] == [len(batch) for batch in arriving]
alone = offramp.compile(net, plan, measure=False)(inputs)
assert torch.equal(torch.cat([a.exit for a in answers]), alone.exit)
assert torch.allclose(torch.cat([a.output for a in answers]), alone.output, atol=1e-5)

for name, work in {"full model": lambda: [model(batch) for batch in arriving], "throughput": lambda: list(run.stream(arriving))}.items():
    start = time.perf_counter()
    work()
    print(f"{name:<12} {1e3 * (time.perf_counter() - start):7.1f} ms for {len(inputs)} inputs in {len(arriving)} batches")
print(f"leaving at each exit: {torch.bincount(alone.exit, minlength=4).tolist()}")
