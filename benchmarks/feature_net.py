"""The networks that image-quality figures are computed with: a small classifier of the same images, and a random one as a second opinion.

    python feature_net.py --data cifar10_20k4k_jpeg.npz --out FOLDER --device cuda
    python feature_net.py --data cifar10_20k4k_jpeg.npz --out FOLDER --steps 60 --width 16 --items 2000      (a trial on a CPU)

Distances are in the features of a classifier trained here, on the images that the generators are trained on. They serve comparisons
between generators of these images and are not comparable with published ones. Few dimensions keep the bias of a Fréchet distance small
at ten thousand images. A network of random weights, its normalisation fitted to real images, has learnt nothing from the training images
and says whether an ordering depends on what the classifier learnt.

Written into FOLDER: ``trained`` and ``random`` (networks), ``trained-train``, ``trained-test``, ``random-train`` and ``random-test``
(statistics of the real images), each as safetensors and JSON, and ``floors.json``: accuracy, and what real images get against real
images. The distance of training from test images also holds what the classifier remembers of its training images; where it is far above
the floor, distances to the test images belong beside those to the training images.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from offramp.cli import data as reading
from offramp.core.bundle import fingerprint, load_bundle, save_bundle, write_json
from offramp.core.errors import ArtifactError, InvalidInput
from offramp.measure.clock import environment
from offramp.measure.image_quality import FeatureStatistics, density_coverage, fid, fid_floor, kid, precision_recall

_KIND = "feature-net"


class Block(nn.Module):
    """Two 3x3 convolutions with batch norm and a shortcut (He et al. 2016, figure 2); halves the image if asked to."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside)
        self.conv2, self.norm2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False), nn.BatchNorm2d(outside)
        self.skip = nn.Identity() if inside == outside and stride == 1 else nn.Conv2d(inside, outside, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(y)) + self.skip(x))


class FeatureNet(nn.Module):
    """Images ``[B, 3, H, W]`` in [-1, 1] to pooled features ``[B, D]``, and a linear classifier on them.

    Args:
        width: channels of the first stage; the second has twice, the third four times as many.
        dimensions: D.
        classes: of the classifier.
        blocks: residual blocks in each stage.
    """

    def __init__(self, width: int = 64, dimensions: int = 128, classes: int = 10, blocks: int = 2) -> None:
        super().__init__()
        self.settings = {"width": width, "dimensions": dimensions, "classes": classes, "blocks": blocks}
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        widths = [width * 2**stage for stage in range(3)]
        stages: list[nn.Module] = []
        for stage, outside in enumerate(widths):
            inside = widths[max(stage - 1, 0)]
            stages += [Block(inside if i == 0 else outside, outside, 2 if stage and i == 0 else 1) for i in range(blocks)]
        self.stages = nn.Sequential(*stages)
        self.last = nn.Sequential(nn.Conv2d(widths[-1], dimensions, 1, bias=False), nn.BatchNorm2d(dimensions), nn.ReLU())
        self.head = nn.Linear(dimensions, classes)

    def features(self, images: Tensor) -> Tensor:
        """Mean over places of the last layer ``[B, D]``."""
        return self.last(self.stages(self.stem(images))).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


@dataclass(frozen=True)
class Features:
    """A frozen network: call it with images ``[B, 3, H, W]`` in [-1, 1] for features ``[B, D]`` float32.

    Attributes:
        net: in evaluation mode.
        network: its fingerprint, for `FeatureStatistics`.
        device: where it runs.
        batch: images at a time.
    """

    net: FeatureNet
    network: str
    device: torch.device
    batch: int = 500

    @torch.no_grad()
    def _each(self, images: Tensor, function: Any) -> Tensor:
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise InvalidInput(f"images must be floats [B, 3, H, W] in [-1, 1], got {images.dtype} {tuple(images.shape)}.")
        if images.numel() and float(images.abs().max()) > 1.5:
            raise InvalidInput(f"images must lie in [-1, 1]; the largest value is {float(images.abs().max()):.4g}. Scale or clamp them.")
        return torch.cat([function(part.to(self.device, torch.float32)).float() for part in images.split(self.batch)])

    def __call__(self, images: Tensor) -> Tensor:
        return self._each(images, self.net.features)

    def classify(self, images: Tensor) -> Tensor:
        """Class of each image ``[B]`` int64: did a generator make what it was asked for?"""
        return self._each(images, self.net).argmax(1)


def frozen(net: FeatureNet, device: str | torch.device = "cpu") -> Features:
    """A network as a feature extractor, on a device and for good."""
    net = net.to(device).eval().requires_grad_(False)
    return Features(net, fingerprint(net), torch.device(device))


def save_net(net: FeatureNet, folder: Path, name: str, about: dict[str, Any]) -> None:
    """Write ``<name>.safetensors`` and ``<name>.json``."""
    save_bundle(folder, name, _KIND, {"settings": net.settings, "fingerprint": fingerprint(net), "about": about}, dict(net.state_dict()))


def load_features(folder: str | Path, name: str = "trained", device: str | torch.device = "cpu") -> Features:
    """The feature extractor that this script wrote: images ``[B, 3, H, W]`` in [-1, 1] to ``[B, D]``.

    Args:
        folder: what ``--out`` was.
        name: ``trained``, or ``random`` for the second opinion.
        device: to run on.

    Raises:
        ArtifactError: missing, truncated, altered or foreign files.
    """
    content, tensors = load_bundle(folder, name, _KIND)
    try:
        net = FeatureNet(**content["settings"])
        net.load_state_dict(tensors)
    except (KeyError, TypeError, RuntimeError) as error:
        raise ArtifactError(f"{folder}/{name}.json does not describe its weights: {error}.") from error
    return frozen(net, device)


# ------------------------------------------------------------------------------------------------------------ training


def load_images(path: str | Path, split: str, items: int | None = None) -> tuple[Tensor, Tensor]:
    """Images ``[N, 3, H, W]`` in [-1, 1] and labels ``[N]`` of a split."""
    records = reading.read(str(path), split=split, images=reading.Images(mean=(0.5,), std=(0.5,), channels=3))
    if records.labels is None:
        raise InvalidInput(f"{path} has no labels for {split}.")
    count = len(records) if items is None else min(items, len(records))
    return torch.stack([records[i][0] for i in range(count)]), records.labels[:count]


def varied(images: Tensor, generator: torch.Generator, shift: int = 4, hole: int = 8) -> Tensor:
    """Mirrored half of the time, moved by up to ``shift`` pixels, a square of ``hole`` pixels blanked; each image its own way."""
    b, c, h, w = images.shape
    device = images.device

    def drawn(high: int) -> Tensor:
        return torch.randint(high, (b, 1), generator=generator).to(device)

    rows = torch.arange(h, device=device) + drawn(2 * shift + 1)
    columns = torch.arange(w, device=device) + drawn(2 * shift + 1)
    columns = torch.where(drawn(2) == 1, columns.flip(1), columns)
    padded = nn.functional.pad(images, (shift,) * 4, mode="reflect")
    first, second = torch.arange(b, device=device)[:, None, None, None], torch.arange(c, device=device)[None, :, None, None]
    out = padded[first, second, rows[:, None, :, None], columns[:, None, None, :]]
    down, across = torch.arange(h, device=device) - drawn(h) + hole // 2, torch.arange(w, device=device) - drawn(w) + hole // 2
    blank = ((down >= 0) & (down < hole))[:, :, None] & ((across >= 0) & (across < hole))[:, None, :]
    return out.masked_fill(blank[:, None], 0.0)


def train(net: FeatureNet, images: Tensor, labels: Tensor, steps: int, batch: int, seed: int, say: bool = True) -> float:
    """Train in place, on the device of the images; the loss of the last step.

    SGD with Nesterov momentum, learning rate up over a fifth of the steps and down to zero over the rest, label smoothing 0.1.
    """
    if steps < 1 or not 1 <= batch <= len(images):
        raise InvalidInput(f"steps must be >= 1 and batch within 1..{len(images)} images, got {steps} and {batch}.")
    device = images.device
    cuda = device.type == "cuda"
    net.to(device).train()
    if cuda:
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3 * min(1.0, batch / 512), momentum=0.9, nesterov=True, weight_decay=5e-4)
    rise = max(1, steps // 5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / rise, (steps - s) / max(1, steps - rise)))
    generator = torch.Generator().manual_seed(seed)
    order, loss = torch.empty(0, dtype=torch.int64), torch.zeros(())
    for step in range(steps):
        if len(order) < batch:
            order = torch.randperm(len(images), generator=generator)
        rows, order = order[:batch].to(device), order[batch:]
        x = varied(images[rows], generator)
        if cuda:
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            logits = net(x)
        loss = nn.functional.cross_entropy(logits.float(), labels[rows], label_smoothing=0.1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if say and (step + 1) % max(1, steps // 8) == 0:
            print(f"step {step + 1:5d} of {steps}: loss {float(loss.detach()):.3f}", flush=True)
    net.to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
    return float(loss.detach())


@torch.no_grad()
def random_net(images: Tensor, seed: int = 0, **settings: int) -> FeatureNet:
    """Random weights, normalisation fitted to real images so that every layer has a signal.

    Args:
        images: ``[N, 3, H, W]`` in [-1, 1].
        seed: of the weights.
        settings: of `FeatureNet`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = FeatureNet(**settings)
    net.to(images.device).train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the plain average of all batches
    for part in images.split(500):
        net.features(part)
    return net.eval()


# ------------------------------------------------------------------------------------------------------------ floors


def floors(features: Features, train_images: Tensor, test_images: Tensor, folder: Path | None, name: str) -> dict[str, Any]:
    """What real images get against real images in these features; the statistics of both sets are saved."""
    made = {"train": features(train_images), "test": features(test_images)}
    stats = {part: FeatureStatistics.of(x.split(1000), features.network) for part, x in made.items()}
    if folder is not None:
        for part, s in stats.items():
            s.save(folder, f"{name}-{part}")
    half = len(train_images) // 2
    inside = fid_floor(made["train"], half)
    few = min(len(test_images), half)
    same = fid_floor(made["train"], few, len(train_images) - few)
    kernel = kid(made["train"], made["test"])
    some = made["train"][: len(test_images)]
    shares, dense = precision_recall(some, made["test"]), density_coverage(some, made["test"])
    return {
        "dimensions": stats["train"].dimensions,
        "variance": float(stats["train"].covariance.trace()),
        "train_against_train": {"values": list(inside.values), "mean": inside.mean, "count": half, "reference": half},
        "train_against_train_as_test": {
            "values": list(same.values),
            "mean": same.mean,
            "count": few,
            "reference": len(train_images) - few,
        },
        "train_against_test": {"fid": fid(stats["train"], stats["test"]), "train": len(train_images), "test": len(test_images)},
        "kid_train_test": {"mean": kernel.mean, "spread": kernel.spread, "subsets": kernel.subsets, "size": kernel.size},
        "precision_recall_train_test": [shares.precision, shares.recall],
        "density_coverage_train_test": [dense.density, dense.coverage],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="images with splits train and test, e.g. cifar10_20k4k_jpeg.npz")
    parser.add_argument("--out", type=Path, required=True, help="folder for networks, statistics and floors.json")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--dimensions", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--items", type=int, default=None, help="images of each split; all by default")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)

    started = time.perf_counter()
    x, y = load_images(args.data, "train", args.items)
    held, truth = load_images(args.data, "test", args.items)
    device = torch.device(args.device)
    x, y, held, truth = x.to(device), y.to(device), held.to(device), truth.to(device)
    print(f"{len(x)} training and {len(held)} test images read in {time.perf_counter() - started:.1f} s", flush=True)

    settings = {"width": args.width, "dimensions": args.dimensions, "classes": int(y.max()) + 1, "blocks": args.blocks}
    torch.manual_seed(args.seed)
    net = FeatureNet(**settings)
    begun = time.perf_counter()
    loss = train(net, x, y, args.steps, min(args.batch, len(x)), args.seed)
    seconds = time.perf_counter() - begun
    trained = frozen(net, device)
    accuracy = float((trained.classify(held) == truth).double().mean())
    seen = float((trained.classify(x) == y).double().mean())
    print(f"trained in {seconds:.1f} s: test accuracy {accuracy:.4f}, training accuracy {seen:.4f}", flush=True)
    about = {
        "images": args.data.name,
        "items": [len(x), len(held)],
        "steps": args.steps,
        "batch": args.batch,
        "seed": args.seed,
        "loss": loss,
        "test_accuracy": accuracy,
        "train_accuracy": seen,
        "training_s": seconds,
    }
    save_net(net, args.out, "trained", about)
    other = random_net(x, args.seed, **settings)
    save_net(other, args.out, "random", {"images": args.data.name, "items": [len(x)], "seed": args.seed})
    found = {
        "trained": floors(trained, x, held, args.out, "trained"),
        "random": floors(frozen(other, device), x, held, args.out, "random"),
    }
    write_json(args.out / "floors.json", {"about": about, **found, "environment": environment(args.device)})
    for name, f in found.items():
        inside, same, across = f["train_against_train"], f["train_against_train_as_test"], f["train_against_test"]
        print(f"{name}: FID floor {inside['mean']:.4g} ({inside['count']} against {inside['reference']} training images)")
        print(
            f"{name}: training against test images {across['fid']:.4g}; as many training images against others {same['mean']:.4g}; "
            f"variance {f['variance']:.4g}"
        )
        print(f"{name}: " + json.dumps({k: v for k, v in f.items() if k.startswith(("kid", "precision", "density"))}))
    print(f"done in {time.perf_counter() - started:.1f} s, written to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
