"""Ship it: the whole adaptive model as one ONNX file, compaction included, run without PyTorch."""

import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

import offramp
from offramp.budget import ExitShares

if len(sys.argv) > 1:
    folder = Path(sys.argv[1])
else:
    folder = Path(tempfile.mkdtemp(prefix="offramp-"))

torch.manual_seed(0)
layers = [nn.Sequential(nn.Linear(32, 32), nn.ReLU()) for _ in range(4)]
net = offramp.attach(nn.Sequential(*layers, nn.Linear(32, 5)).eval(), at=["0", "2"], example=torch.randn(2, 32))
trace = offramp.record(net, torch.randn(400, 32).split(100), progress=False)
plan = offramp.calibrate(trace, offramp.Confidence(), ExitShares((0.3, 0.3, 0.4)))

path = folder / "adaptive.onnx"
print(offramp.export_onnx(net, plan, path))  # compared with the PyTorch model in ONNX Runtime before it is written

import onnxruntime  # noqa: E402 - only here: a server needs nothing else

session = onnxruntime.InferenceSession(path)
inputs = torch.randn(60, 32)
output, exits = session.run(["output", "exit"], {session.get_inputs()[0].name: inputs.numpy()})
ours = offramp.compile(net, plan, measure=False)(inputs)
same = bool((torch.from_numpy(exits) == ours.exit).all())
print("same exits:", same, " largest difference:", float((torch.from_numpy(output) - ours.output).abs().max()))
