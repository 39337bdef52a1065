"""Programs that the tests run in processes of their own: to be killed, or as one of two ranks."""

from __future__ import annotations

import json
import os
import signal
import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from offramp.core.bundle import save_bundle
from offramp.network import MultiExit, attach
from offramp.train import Alternating, Distill, FitResult, Frozen, IndexWeighted, Joint, TwoStage, fit


class Noisy(Dataset):
    """Random augmentation drawn from the global generator, as user data sets do."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.inputs = torch.randn(40, 8, generator=generator)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.inputs[index]
        return x + 0.1 * torch.randn(8), x[:3].argmax()


def network(dropout: float, norm: bool) -> MultiExit:
    torch.manual_seed(0)
    layers = [
        nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8) if norm else nn.Identity(), nn.Tanh(), nn.Dropout(dropout)) for _ in range(3)
    ]
    return attach(nn.Sequential(*layers, nn.Linear(8, 3)), at=["0", "1"], example=torch.randn(2, 8))


def resumable(folder: str, die_at: int | None, max_steps: int | None = None) -> tuple[MultiExit, FitResult]:
    """Dropout, batch norm, shuffling, augmentation, momentum, a schedule, two phases, an accumulation that does not divide the epoch."""
    net = network(0.3, True)
    steps = [0]

    def killer(*_: object) -> None:
        steps[0] += 1
        if steps[0] == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    handle = net.model[2].register_forward_hook(lambda m, a, o: killer() if m.training or net.heads.training else None)
    result = fit(
        net,
        DataLoader(Noisy(), batch_size=6, shuffle=True),
        TwoStage(Alternating(IndexWeighted(), equilibrium=True), Frozen(Distill(Joint(), alpha=0.5))),
        epochs=4,
        output_dir=folder,
        eval_loader=DataLoader(Noisy(), batch_size=20, shuffle=True),
        optimizer=lambda ps: torch.optim.AdamW(ps, lr=1e-2),
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR,
        gradient_accumulation_steps=2,
        max_grad_norm=1.0,
        checkpoint_every=1,
        seed=5,
        progress=False,
        max_steps=max_steps,
    )
    handle.remove()
    return net, result


def distributed(folder: str, rank: int, batch: int, kind: str) -> None:
    """One rank. The same data, order and global batch whatever the number of ranks."""
    folder = os.path.join(folder, kind)
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(48, 8, generator=generator)
    labels = inputs[:, :3].argmax(1)
    recipe = {"alternating": Alternating(equilibrium=True), "frozen": Frozen(Distill(alpha=0.5))}[kind]
    net = network(0.0, kind == "frozen")
    loader = DataLoader(TensorDataset(inputs, labels), batch_size=batch, shuffle=True)
    result = fit(
        net,
        loader,
        recipe,
        epochs=2,
        output_dir=os.path.join(folder, "run"),
        eval_loader=DataLoader(TensorDataset(inputs[:29], labels[:29]), batch_size=4),
        optimizer=lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
        gradient_accumulation_steps=2,
        max_grad_norm=1.0,
        progress=False,
    )
    save_bundle(folder, f"rank{rank}", "weights", {"history": [dict(r) for r in result.history]}, net.state_dict())


if __name__ == "__main__":
    program, *arguments = sys.argv[1:]
    if program == "resumable":
        folder, die_at = arguments
        trained, outcome = resumable(folder, int(die_at) or None)
        save_bundle(folder, "end", "weights", {"history": [json.loads(json.dumps(r)) for r in outcome.history]}, trained.state_dict())
    else:
        folder, rank, batch = arguments
        for kind in ("alternating", "frozen"):
            distributed(folder, int(rank), int(batch), kind)
        torch.distributed.destroy_process_group()
