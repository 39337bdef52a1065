"""Programs that the tests run in processes of their own: to be killed, or as one of two processes that train together."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from offramp.core.bundle import save_bundle
from offramp.core.errors import InvalidInput
from offramp.network import MultiExit, attach
from offramp.policies import LearnedGate
from offramp.train import Alternating, Distill, FitResult, Frozen, Gates, IndexWeighted, Joint, NonFiniteLoss, TwoStage, Wrongness, fit
from offramp.train.sharding import gather_optimizer

KINDS = ("alternating", "frozen", "gates")

CAN_SHARD = torch.cuda.device_count() > 1 or torch.accelerator.current_accelerator() is None
"""Where torch knows of GPUs it shards over GPUs, and two processes need two."""


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


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def resumable(
    folder: str, die_at: int | None, max_steps: int | None = None, die: Callable[[], None] = kill, **options: Any
) -> tuple[MultiExit, FitResult]:
    """Dropout, batch norm, shuffling, augmentation, momentum, a schedule, two phases, an accumulation that does not divide the epoch."""
    net = network(0.3, True)
    steps = [0]

    def killer(*_: object) -> None:
        steps[0] += 1
        if steps[0] == die_at:
            die()

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
        **options,
    )
    handle.remove()
    return net, result


def items() -> tuple[torch.Tensor, torch.Tensor]:
    inputs = torch.randn(48, 8, generator=torch.Generator().manual_seed(1))
    return inputs, inputs[:, :3].argmax(1)


def together(folder: str, rank: int, batch: int, kind: str, **options: Any) -> None:
    """One process. The same data, order and global batch whatever their number."""
    folder = os.path.join(folder, kind)
    inputs, labels = items()
    net = network(0.0, kind == "frozen")
    rule = LearnedGate(2)
    recipe = {
        "alternating": Alternating(equilibrium=True),
        "frozen": Frozen(Distill(alpha=0.5)),
        "gates": Gates(rule, Wrongness(), Joint()),
    }[kind]
    result = fit(
        net,
        DataLoader(TensorDataset(inputs, labels), batch_size=batch, shuffle=True),
        recipe,
        epochs=2,
        output_dir=os.path.join(folder, "run"),
        eval_loader=DataLoader(TensorDataset(inputs[:29], labels[:29]), batch_size=4),
        optimizer=lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
        gradient_accumulation_steps=2,
        max_grad_norm=1.0,
        progress=False,
        **options,
    )
    net.cpu().eval()
    with torch.no_grad():
        logits = {f"logits.{name}": z for name, z in zip(net.names, net(inputs), strict=True)}
    weights = {**net.state_dict(), **{f"rule.{k}": v for k, v in rule.state_dict().items()}, **logits}
    save_bundle(folder, f"rank{rank}", "weights", {"history": [dict(r) for r in result.history]}, weights)
    if rank == 0:
        net.save(os.path.join(folder, "adapter"), include_base=kind != "frozen")


def sharding(version: int = 2, mixed_precision: str = "no", **options: Any) -> Any:
    """An accelerator that shards: on GPUs as accelerate sets it up, on a CPU over gloo, which torch can and accelerate does not."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    AcceleratorState._reset_state()
    plugin = FullyShardedDataParallelPlugin(fsdp_version=version, **options)
    accelerator = Accelerator(fsdp_plugin=plugin, mixed_precision=mixed_precision)
    if accelerator.device.type == "cpu":
        accelerator.state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
        if mixed_precision != "no":
            plugin.set_mixed_precision(mixed_precision)
    return accelerator


def sharded_units(accelerator: Any) -> list[int]:
    """How many parts of each model that was trained gather their parameters on their own."""
    from torch.distributed.fsdp import FSDPModule

    return [sum(isinstance(m, FSDPModule) for m in model.modules()) for model in accelerator._models]


def refusal(accelerator: Any) -> str:
    try:
        fit(network(0.0, False), DataLoader(TensorDataset(*items()), batch_size=4), epochs=1, accelerator=accelerator, progress=False)
    except InvalidInput as error:
        return str(error)
    return ""


class Interrupted(Exception):
    """Stands for a crash of all processes at the same place."""


def interrupt() -> None:
    raise Interrupted


def sharded(folder: str, rank: int) -> None:
    """Everything about FSDP that takes two processes."""
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

    said = {}
    passed_over = Accelerator(fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2))
    if passed_over.device.type == "cpu":
        said["passed over"] = refusal(passed_over)
    said["version 1"] = refusal(sharding(1))
    said["by size"] = refusal(sharding(auto_wrap_policy="SIZE_BASED_WRAP", min_num_params=1))

    # The network, the model and each block as units of their own; everything as one unit.
    classes = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_cls_names_to_wrap": ["Sequential", "MultiExit"]}
    plugins: list[dict[str, Any]] = [classes, {}, {}]
    units = {}
    for kind, options in zip(KINDS, plugins, strict=True):
        accelerator = sharding(**options)
        together(folder, rank, 4, kind, accelerator=accelerator)
        units[kind] = sharded_units(accelerator)

    accelerator = sharding()
    whole, result = resumable(os.path.join(folder, "whole"), None, accelerator=accelerator)
    units["two phases"] = sharded_units(accelerator)
    resumed: list[int | None] = []
    for die_at in (8, 10, None):
        try:
            net, again = resumable(os.path.join(folder, "parts"), die_at, die=interrupt, accelerator=sharding())
            resumed.append(again.resumed_from)
        except Interrupted:
            resumed.append(None)
    steps = {"whole": [dict(r) for r in result.history], "parts": [dict(r) for r in again.history], "resumed": resumed}
    save_bundle(folder, f"whole{rank}", "weights", steps, whole.state_dict())
    save_bundle(folder, f"parts{rank}", "weights", {}, net.state_dict())

    inputs, labels = items()
    net, seen = network(0.0, False), set()
    handle = net.model[1].register_forward_hook(lambda m, a, o: seen.add(o.dtype))
    loader = DataLoader(TensorDataset(inputs, labels), batch_size=4)
    result = fit(net, loader, epochs=2, eval_loader=loader, accelerator=sharding(mixed_precision="bf16"), progress=False)
    handle.remove()
    precisions = {
        "computed": str(seen),
        "kept": str({p.dtype for p in net.parameters()}),
        "rounded": all(bool(torch.equal(p, p.bfloat16().float())) for p in net.parameters()),
        "losses": [r["loss"] for r in result.history if r["event"] == "epoch"],
    }

    normed = network(0.0, True)  # nothing but the end of training makes its batch statistics the same in both processes
    fit(normed, loader, epochs=1, accelerator=sharding(), progress=False)

    net = network(0.0, False)
    poisoned = [(inputs[:4], labels[:4])] * 6
    poisoned[4:] = [(inputs[:4] * float("nan"), labels[:4])] * 2
    before = {}
    try:
        loader = DataLoader([(x, y) for xs, ys in poisoned for x, y in zip(xs, ys, strict=True)], batch_size=4)
        fit(net, loader, epochs=1, accelerator=sharding(), progress=False)
    except NonFiniteLoss as error:
        said["not finite"] = str(error)
        reference = network(0.0, False)
        fit(reference, loader, epochs=1, max_steps=error.step, accelerator=sharding(), progress=False)
        before = {k: bool(torch.equal(v, net.state_dict()[k])) for k, v in reference.state_dict().items()}

    mesh = init_device_mesh("cuda" if torch.cuda.device_count() > 1 else "cpu", (2,))
    parameter = nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)]))
    optimizer = torch.optim.SGD([parameter])
    optimizer.state[parameter] = {"rows": distribute_tensor(torch.ones(4), mesh, [Shard(0)])}
    assert isinstance(optimizer.state[parameter]["rows"], DTensor)
    try:
        gather_optimizer(optimizer, keep=True)
    except InvalidInput as error:
        said["another shape"] = str(error)
    save_bundle(folder, f"said{rank}", "weights", {"said": said, "before": before, "units": units, "bf16": precisions}, normed.state_dict())


def start_two(folder: str) -> list[subprocess.Popen[str]]:
    """Start two processes that train together, on two GPUs if there are."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    if torch.cuda.device_count() < 2:
        common |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    processes = []
    for rank in ("0", "1"):
        environment = {**common, "RANK": rank, "LOCAL_RANK": rank, "CAN_SHARD": str(CAN_SHARD)}
        arguments = [sys.executable, __file__, "together", folder, rank]
        processes.append(subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    return processes


if __name__ == "__main__":
    program, folder, number = sys.argv[1:]
    if program == "resumable":
        trained, outcome = resumable(folder, int(number) or None)
        save_bundle(folder, "end", "weights", {"history": [json.loads(json.dumps(r)) for r in outcome.history]}, trained.state_dict())
    else:
        for kind in KINDS:
            together(os.path.join(folder, "ddp"), int(number), 4, kind)
        if os.environ["CAN_SHARD"] == "True":
            sharded(os.path.join(folder, "fsdp"), int(number))
        torch.distributed.destroy_process_group()
