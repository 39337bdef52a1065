"""A promise: with probability 90 %, accuracy falls by at most two points. What cannot be promised is refused, with the best that can."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import offramp
from offramp.budget import evaluate
from offramp.core.errors import BudgetInfeasible

torch.manual_seed(0)
inputs = torch.randn(6000, 16)
labels = (inputs[:, :4].sum(1) * inputs[:, 4:8].sum(1) > 0).long() + 2 * (inputs[:, 8] > 0).long()
train, calibration, test = (TensorDataset(inputs[a:b], labels[a:b]) for a, b in ((0, 3000), (3000, 5000), (5000, 6000)))

layers = [nn.Sequential(nn.Linear(16 if i == 0 else 64, 64), nn.ReLU()) for i in range(6)]
net = offramp.attach(nn.Sequential(*layers, nn.Linear(64, 4)), at=["0", "2"], example=inputs[:2])
offramp.fit(net, DataLoader(train, 100, shuffle=True), epochs=8, optimizer=lambda weights: torch.optim.AdamW(weights, 3e-3), progress=False)
trace = offramp.record(net, DataLoader(calibration, 500), progress=False)
unseen = offramp.record(net, DataLoader(test, 500), progress=False)

plan = offramp.calibrate(trace, offramp.Confidence(), offramp.Risk(max_drop=0.02, delta=0.1))
print(plan)

full = float(1 - unseen.losses[:, -1].mean())
seen = evaluate(unseen, plan.rule, plan.thresholds)
print(f"\non {unseen.items} unseen items: accuracy {seen.accuracy:.3f}, full model {full:.3f}, mean cost {seen.mean_cost}")

try:
    offramp.calibrate(trace, offramp.Confidence(), offramp.Risk(max_error=0.0001, delta=0.1))
except BudgetInfeasible as error:
    print(f"\nrefused, as it should be: {error}")
