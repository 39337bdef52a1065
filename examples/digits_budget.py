"""Half the compute: train exits on handwritten digits, ask for a mean cost, run."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import offramp

torch.manual_seed(0)
digits = load_digits()
images, labels = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1, torch.tensor(digits.target)
order = torch.randperm(len(labels))
train, calibration, test = (TensorDataset(images[rows], labels[rows]) for rows in (order[:1000], order[1000:1400], order[1400:]))


def block(inside: int, outside: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inside, outside, 3, stride, 1), nn.BatchNorm2d(outside), nn.ReLU())


blocks = [block(1, 16), block(16, 32, 2), block(32, 32), block(32, 64, 2), block(64, 64)]
model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))

net = offramp.attach(model, at=["1", "2", "3"], example=images[:2])
offramp.fit(net, DataLoader(train, 50, shuffle=True), epochs=6, optimizer=lambda weights: torch.optim.AdamW(weights, 3e-3), progress=False)
trace = offramp.record(net, DataLoader(calibration, 100), progress=False)

run_images, run_labels = test.tensors
for fraction in (0.5, 0.7, 0.9):
    plan = offramp.calibrate(trace, offramp.Confidence(), offramp.MeanCost(fraction))
    # measure=False: check every exit of the plan, whether or not this machine gains time by it.
    run = offramp.compile(net, plan, measure=False)
    answers = run(run_images)
    accuracy = (answers.output.argmax(1) == run_labels).float().mean()
    print(f"requested {fraction:.2f}   realised {answers.cost.mean() / trace.base_cost:.3f}   accuracy {accuracy:.3f}")
