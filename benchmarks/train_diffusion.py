"""Train small denoisers on real images, and from one of them everything that leaves early, within a few minutes a call.

    python train_diffusion.py flow     --data cifar10_20k4k_jpeg.npz --out runs/diffusion
    python train_diffusion.py noise    ...        the same transformer, trained to predict noise
    python train_diffusion.py unet     ...        a small U-Net, likewise
    python train_diffusion.py variants ... --start flow
    python train_diffusion.py check    ... --features FOLDER        samples, and FID with the networks of feature_net.py
    python train_diffusion.py flow variants check --tiny --out runs/tiny        everything in seconds on a CPU, on scikit-learn's digits

Several names are done in turn; the minutes are of the whole call and shared between what trains. A stage's share is of what is left after
its first step, which may have compiled; the learning rate follows the larger of two shares, of the steps and of that time. A model that is
there already is not trained again; a call that was stopped goes on from its last checkpoint. A stage for which too little time is left is
named in ``training.json`` under ``left_out`` and not saved; another call does it. Stages share what is compiled: transformers are cut at
their blocks, and equal blocks are one code. What is saved are averages of the weights, each model as a folder of diffusers
(``DiTTransformer2DModel.from_pretrained``) with its scheduler beside it, and ``training.json``. ``load_models`` reads them.

Variants begin with the weights of ``--start``. ``ee`` (ee-diffusion's published schedule), ``full`` (its control: the whole model, trained
as long) and ``uniform`` (every exit at every noise level) take the same number of steps. What is cheaper takes a share of the time:
``deediff``, exits on the frozen model; ``latte``, groups of blocks for their noise levels; ``shallow``, the first blocks alone.

diffusers is needed. It is pure Python: on a machine without a network, unpack its wheel (and that of importlib_metadata, if it is missing)
into a folder and put that on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from feature_net import load_features, load_images
from PIL import Image
from torch import Tensor, nn
from train_lm import OutOfTimeError, rate_at

from offramp.backbones.shared_code import SharedCode
from offramp.budget.noise_schedule import NoiseBins, published_schedule
from offramp.core.bundle import load_bundle, save_bundle, write_json
from offramp.core.errors import InvalidInput
from offramp.core.modes import evaluating
from offramp.core.noise import NoiseScale
from offramp.core.parts import part_from_dict, part_to_dict
from offramp.diffusion import DenoisingNet, attach_denoiser, uncut_denoiser
from offramp.engines.diffusion.denoise import Denoiser
from offramp.engines.diffusion.losses import depth_losses
from offramp.engines.diffusion.pipeline import sample
from offramp.exits import DENOISING_PARTS, DenoisingExit
from offramp.measure.clock import environment
from offramp.measure.image_quality import FeatureStatistics, fid
from offramp.policies.denoising import OUTPUT, Point, depth_schedule
from offramp.policies.fills import HeadOutput
from offramp.train import (
    Averaged,
    DenoisingView,
    ExitsView,
    FinalOnly,
    Holding,
    Joint,
    Mean,
    MeanSquared,
    NoisePrediction,
    Noising,
    PlanView,
    Process,
    Recipe,
    RectifiedFlow,
    ScheduledDepth,
    UncertaintyAware,
    add_heads,
    fit,
    layer_groups,
    linear_betas,
    noisy_loader,
    read_metrics,
)

MODELS = ("flow", "noise", "unet")
VARIANTS = ("ee", "full", "uniform", "deediff", "latte", "shallow")
SHARES = {"ee": 0.22, "full": 0.2, "uniform": 0.22, "deediff": 0.12, "latte": 0.12, "shallow": 0.12}
"""Of the variants' time. Steps of the second and third are those that the first took."""

_HEADS = "denoising-exits"


# ---- models --------------------------------------------------------------------------------------------------------------


def processes() -> dict[str, Process]:
    return {"flow": RectifiedFlow(), "noise": NoisePrediction(linear_betas())}


def scheduler_for(process: str) -> Any:
    """The sampler that a model is checked with."""
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    if process == "flow":
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000)
    return DDIMScheduler(num_train_timesteps=1000, beta_schedule="linear", clip_sample=True, timestep_spacing="trailing")


def transformer(args: argparse.Namespace, size: int, classes: int, blocks: int) -> nn.Module:
    """A diffusion transformer that begins as the identity between embedding and output (Peebles and Xie 2023, section 3.2)."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(args.seed)
    model: nn.Module = DiTTransformer2DModel(
        num_attention_heads=args.heads, attention_head_dim=args.width // args.heads, in_channels=3, out_channels=3, num_layers=blocks,
        sample_size=size, patch_size=2, num_embeds_ada_norm=classes, norm_num_groups=1,
    )  # fmt: skip
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
            if name.endswith("norm1.linear") or name in ("proj_out_1", "proj_out_2"):
                nn.init.zeros_(module.weight)
    return _quiet(model)


def unet(args: argparse.Namespace, size: int, classes: int) -> nn.Module:
    from diffusers import UNet2DModel

    torch.manual_seed(args.seed)
    widths = (32, 32) if args.tiny else (96, 128, 192)
    kinds = ("DownBlock2D", *["AttnDownBlock2D"] * (len(widths) - 1))
    model: nn.Module = UNet2DModel(
        sample_size=size, in_channels=3, out_channels=3, layers_per_block=1 if args.tiny else 2, block_out_channels=widths,
        down_block_types=kinds, up_block_types=tuple(k.replace("Down", "Up") for k in reversed(kinds)), attention_head_dim=32,
        num_class_embeds=classes + 1,
    )  # fmt: skip
    return model


def _quiet(model: nn.Module) -> nn.Module:
    """Without diffusers' own dropping of labels: each block of a DiT would draw for itself, so that a row is neither with nor without."""
    for module in model.modules():
        if type(module).__name__ == "LabelEmbedding":
            module.dropout_prob = 0.0
    return model


def places(model: nn.Module) -> list[str]:
    """Where a transformer is cut: after the patch embedding and after every block."""
    return ["pos_embed", *(f"transformer_blocks.{k}" for k in range(len(model.transformer_blocks)))]  # type: ignore[arg-type]


def image_name(model: nn.Module) -> str:
    return "hidden_states" if hasattr(model, "transformer_blocks") else "sample"


def example(model: nn.Module) -> dict[str, Tensor]:
    config: Any = model.config
    size, device = config.sample_size, next(model.parameters()).device
    return {
        image_name(model): torch.randn(2, 3, size, size, device=device),
        "timestep": torch.full((2,), 500, device=device),
        "class_labels": torch.zeros(2, dtype=torch.int64, device=device),
    }


def named(batch_example: dict[str, Tensor], process: Process) -> dict[str, Tensor]:
    """The example with timesteps of the type that the process gives."""
    return batch_example | {"timestep": process.times(2).to(batch_example["timestep"].device)}


# ---- reading what was trained --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """A model that this script wrote.

    Attributes:
        name: of its stage.
        model: of diffusers, in evaluation mode.
        kind: ``flow`` or ``noise``: what it predicts.
        about: its part of ``training.json``.
        folder: where it was read.
    """

    name: str
    model: nn.Module
    kind: str
    about: dict[str, Any]
    folder: Path

    @property
    def process(self) -> Process:
        return processes()[self.kind]

    @property
    def noise(self) -> NoiseScale:
        return self.process.noise

    def scheduler(self) -> Any:
        return scheduler_for(self.kind)

    def attach(self, at: Sequence[str] | None = None) -> DenoisingNet:
        """The model cut at its blocks or at the places given, with the exits that were trained for it."""
        inputs = named(example(self.model), self.process)
        blocks = places(self.model) if at is None and hasattr(self.model, "transformer_blocks") else at
        net = attach_denoiser(self.model, blocks, noise=self.noise, example=inputs)
        if self.about.get("heads"):
            content, tensors = load_bundle(self.folder / "deediff", "heads", _HEADS)
            add_heads(net, part_from_dict(content["spec"], DENOISING_PARTS), content["at"])
            net.heads.load_state_dict(tensors)
        return net.eval()

    def plan(self) -> tuple[Point, ...]:
        """What the model was trained to run by: the schedule of ``ee``, the groups of ``latte``; else nothing, all of it."""
        if not hasattr(self.model, "transformer_blocks"):
            return ()
        before, *blocks = places(self.model)
        if "depths" in self.about:
            exits = [None if d == len(blocks) else blocks[d - 1] for d in self.about["depths"]]
            return depth_schedule(self.about["edges"], exits)
        if "groups" in self.about:
            return layer_groups(before, blocks, self.about["groups"], self.about["edges"])
        return ()


def load_models(
    folder: str | Path, names: Sequence[str] | None = None, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> dict[str, Trained]:
    """Models that this script wrote, by the names of their stages; ``deediff`` is its start with exits added.

    Args:
        folder: what ``--out`` was.
        names: which; all by default.
        device: where they go.
        dtype: of their weights.

    Raises:
        InvalidInput: there is no such model.
    """
    import diffusers

    root = Path(folder)
    sheet = root / "training.json"
    stages = json.loads(sheet.read_text())["stages"] if sheet.is_file() else {}
    if missing := [n for n in names or [] if n not in stages]:
        raise InvalidInput(f"{root} has no model {missing[0]!r}; it has {', '.join(stages) or 'none'}.")
    found = {}
    for name in names or stages:
        about = stages[name]
        made = getattr(diffusers, about["class"]).from_pretrained(root / about["weights"], torch_dtype=dtype)
        found[name] = Trained(name, _quiet(made).to(device).eval(), about["process"], about, root)
    return found


# ---- training ------------------------------------------------------------------------------------------------------------


def images_of(args: argparse.Namespace) -> dict[str, tuple[Tensor, Tensor]]:
    """Images in [-1, 1] and classes of both splits."""
    if args.data is not None:
        return {s: load_images(args.data, s, args.items) for s in ("train", "test")}
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1) / 8 - 1
    classes = torch.tensor(digits.target)
    return {"train": (images[:1500].contiguous(), classes[:1500]), "test": (images[1500:].contiguous(), classes[1500:])}


class LeftOutError(Exception):
    """A stage is not worth saving or cannot begin; the message says why. Others go on."""


class Timed:
    """A scheduler factory for `fit` that ends a training on time. Its time begins after the first step, which may have compiled.

    Args:
        seconds: asked after the first step: how long the steps after it may take.
        least: steps in all, those before a resume included, below which a training is not worth keeping. Where they are out of reach
            even at the pace of the fastest of the first few, it ends after these.
        note: told step, share and seconds since the first step now and then.

    Attributes:
        first: seconds that the first step of this call took; 0 before.
        pace: steps per second after it; 0 before.
    """

    PROBE, EVERY = 5, 15.0

    def __init__(self, seconds: Callable[[], float], least: int, note: Callable[[int, float, float], None]) -> None:
        self.seconds, self.least, self.note = seconds, least, note
        self.first = self.pace = 0.0

    def __call__(self, optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
        begun = last = told = time.monotonic()
        limit, taken, fastest = 0.0, -1, float("inf")

        def at(step: int) -> float:
            nonlocal last, told, limit, taken, fastest
            now, taken = time.monotonic(), taken + 1  # asked once when it is made and after every step
            spent = now - begun - self.first
            if taken == 0:
                return rate_at(0.0)
            if taken == 1:
                self.first, limit, told, spent = now - begun, self.seconds(), now, 0.0
                self.note(step, step / steps, 0.0)
            else:
                fastest, self.pace = min(fastest, now - last), (taken - 1) / max(spent, 1e-9)
            last = now
            if spent >= limit:
                raise OutOfTimeError
            if taken == self.PROBE and step + (limit - spent) / fastest < min(self.least, steps):
                raise OutOfTimeError
            share = max(step / steps, spent / limit)
            if now - told > self.EVERY:
                told = now
                self.note(step, share, spent)
            return rate_at(share)

        return torch.optim.lr_scheduler.LambdaLR(optimizer, at)


class Training:
    """Stages in a folder, each done once."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.out = args, Path(args.out)
        self.start = time.monotonic()
        self.device = torch.device(args.device)
        self.precision = "bf16" if self.device.type == "cuda" else "no"
        self.images = images_of(args)
        self.classes = int(self.images["train"][1].max()) + 1
        self.size = int(self.images["train"][0].shape[-1])
        self.sheet = self.out / "training.json"
        self.out.mkdir(parents=True, exist_ok=True)
        self.done: dict[str, Any] = json.loads(self.sheet.read_text()) if self.sheet.is_file() else {}
        self.done |= {"settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}}
        self.done |= {"environment": environment(self.device)}
        self.done.setdefault("stages", {})
        # Some stages hold weights that others train; that is no reason to compile anew.
        self.code = SharedCode(same_gradients=True, dynamic=False)
        self.end = self.start + 60 * (args.minutes - args.reserve)
        print(f"{len(self.images['train'][0])} images read in {time.monotonic() - self.start:.1f} s", flush=True)

    @property
    def left(self) -> float:
        """Seconds of the call that training may still take."""
        return self.end - time.monotonic()

    def noising(self, model: nn.Module, process: Process, edges: Sequence[float] = (), train: bool = True) -> Noising:
        return Noising(
            process, image_name(model), label="class_labels", no_class=self.classes, drop=0.1 if train else 0.0,
            flip=train and self.args.data is not None, edges=tuple(edges),
        )  # fmt: skip

    def held_out(self, model: nn.Module, process: Process, passes: int = 1) -> list[dict[str, Tensor]]:
        """Noisy test images at levels drawn evenly in time, the same for every model; other noise in every pass over the images."""
        process = replace(process, spread=None) if isinstance(process, RectifiedFlow) else process
        images, classes = self.images["test"]
        loader = noisy_loader(images, self.noising(model, process, train=False), min(200, len(images)), classes=classes, shuffle=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return [batch for _ in range(passes) for batch in loader]

    def fit(
        self, name: str, view: DenoisingView, recipe: Recipe, process: Process, share: float, rate: float, steps: int | None = None,
        edges: Sequence[float] = (), decay: float | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Train until the steps or the time are over; the weights end as their averages.

        Args:
            name: of the stage.
            view: what is trained.
            recipe: how.
            process: what it predicts.
            share: of the time that is left after the first step.
            rate: learning rate at its peak.
            steps: most of them.
            edges: log-SNRs that no batch goes across.
            decay: of the average.

        Raises:
            LeftOutError: there were too few steps; the weights are of no use.
        """
        args = self.args
        if self.left <= 0:
            raise LeftOutError("no time was left for it")
        work = Path(args.work or self.out / "work") / name
        most = steps or args.steps
        least = min(args.least_steps, most)
        images, classes = self.images["train"]
        loader = noisy_loader(
            images, self.noising(view.model, process, edges), args.batch, classes=classes, draws=most * args.batch, workers=args.workers
        )
        if args.compile:
            view.compile(self.code)
        average = Averaged(adam(rate, self.device), args.average if decay is None else decay)
        metrics = work / "metrics.jsonl"

        def note(step: int, done: float, spent: float) -> None:
            if not spent:
                print(f"  {name}: first step after {timed.first:.1f} s", flush=True)
            else:
                print(f"  {name}: step {step}, {done:.0%}, {spent:.0f} s, {timed.pace:.2f} steps/s", flush=True)

        timed = Timed(lambda: share * self.left, least, note)
        begun, ended = time.monotonic(), "steps"
        try:
            fit(
                view, loader, recipe, epochs=1, output_dir=work, optimizer=average, scheduler=timed, mixed_precision=self.precision,
                max_grad_norm=1.0, checkpoint_every=args.checkpoint_every, keep_checkpoints=1, progress=False, max_steps=most,
            )  # fmt: skip
        except OutOfTimeError:
            ended = "time"
        taken, done = time.monotonic() - begun, average.steps
        pace = f"first step after {timed.first:.1f} s, then {timed.pace:.2f} steps/s"
        if done < least:
            raise LeftOutError(f"too few steps would fit into its time, of which {done} were done ({pace}; at least {least} are wanted)")
        average.apply()
        records = [r for r in read_metrics(metrics) if r["event"] == "step"]
        found = {
            "recipe": repr(recipe), "steps": done, "seconds": taken, "first_step_seconds": timed.first, "steps_per_second": timed.pace,
            "ended_by": ended, "images": done * args.batch, "parameters": sum(p.numel() for p in view.model.parameters()),
            "train_loss": [round(r["loss"], 5) for r in records[:: max(1, len(records) // 100)]],
        }  # fmt: skip
        print(f"{name}: {done} steps in {taken:.1f} s, ended by {ended}; {pace}", flush=True)
        return found

    def attempt(self, name: str, stage: Callable[[], None]) -> None:
        """Do a stage, or say why it is left out."""
        try:
            stage()
        except LeftOutError as why:
            self.done.setdefault("left_out", {})[name] = str(why)
            write_json(self.sheet, self.done)
            print(f"{name}: LEFT OUT, {why}. Another call with the same --out does it.", flush=True)
        print(f"[{time.monotonic() - self.start:6.1f} s] {name}", flush=True)

    def finish(self, name: str, kind: str, model: nn.Module | None, **found: Any) -> None:
        """Write a stage's weights and say what it is."""
        weights = name
        if model is None:
            weights = self.args.start
        else:
            saved: Any = copy.deepcopy(model).to(torch.bfloat16) if self.args.half else model
            saved.save_pretrained(self.out / name, max_shard_size=self.args.shard)
            scheduler_for(kind).save_pretrained(self.out / name)
        about = {"process": kind, "weights": weights, "class": type(model).__name__ if model is not None else "DiTTransformer2DModel"}
        self.done["stages"][name] = {**about, **found}
        left_out = self.done.get("left_out", {})
        left_out.pop(name, None)
        if not left_out:
            self.done.pop("left_out", None)
        write_json(self.sheet, self.done)

    # ---- stages ----------------------------------------------------------------------------------------------------------

    def attached(self, model: nn.Module, process: Process) -> DenoisingNet:
        """A transformer cut at its blocks, whose code all stages share, where there is to be code; any other model is left whole."""
        inputs = named(example(model), process)
        if self.args.compile and hasattr(model, "transformer_blocks"):
            return attach_denoiser(model, places(model), noise=process.noise, example=inputs)
        return uncut_denoiser(model, noise=process.noise, example=inputs)

    def model(self, name: str, share: float) -> None:
        """A denoiser from nothing, for a share of the time."""
        args, kind = self.args, "noise" if name == "unet" else name
        model = unet(args, self.size, self.classes) if name == "unet" else transformer(args, self.size, self.classes, args.blocks)
        model.to(self.device)
        process = processes()[kind]
        net = self.attached(model, process)
        found = self.fit(name, ExitsView(net, []), Joint(FinalOnly()), process, share, args.rate)
        found["held_out_loss"] = self.loss(ExitsView(net, []), process)
        self.finish(name, kind, model, **found)

    @torch.no_grad()
    def loss(self, view: DenoisingView, process: Process) -> float:
        """Mean loss of the model's own answer on the test images. A new view is not compiled, which would take longer than this."""
        total, rows = 0.0, 0
        with evaluating(view):
            for batch in self.held_out(view.model, process):
                inputs = {n: v.to(self.device) for n, v in batch.items()}
                target = inputs.pop("labels")
                total += float(MeanSquared()(view(**inputs)[-1], target).sum())
                rows += len(target)
        return total / rows

    def tables(self, net: DenoisingNet, process: Process, edges: Sequence[float], **how: Any) -> dict[str, Any]:
        """Loss and drift of every exit by noise level, on the test images."""
        batches = self.held_out(net.model, process, passes=4 if self.args.tiny else 2)
        found = depth_losses(net, batches, edges, **how)
        return {
            "edges": list(found.edges), "places": list(found.places), "loss": found.loss.tolist(), "drift": found.drift.tolist(),
            "flops": list(found.flops), "count": found.count.tolist(), "uncertainty": found.uncertainty.nan_to_num(-1).tolist(),
        }  # fmt: skip

    def variants(self, whole: float, names: Sequence[str] = VARIANTS) -> None:
        """Everything that begins with the weights of ``--start``, or some of it, in a share of the time."""
        args = self.args
        waiting = [n for n in names if n not in self.done["stages"]]
        if args.start in self.done.get("left_out", {}):
            for name in waiting:
                self.attempt(name, self.without(args.start))
            return
        if args.start not in self.done["stages"] or args.start == "unet":
            raise SystemExit(f"--start {args.start} is not there: train it first (flow or noise).")
        start = load_models(self.out, [args.start], self.device)[args.start]
        process, kind, model = start.process, start.kind, start.model
        begun = {n: v.detach().clone() for n, v in model.state_dict().items()}
        at, count = places(model), len(model.transformer_blocks)  # type: ignore[arg-type]
        net = attach_denoiser(model, at, noise=process.noise, example=named(example(model), process))
        edges = process.noise.log_snr(torch.arange(900, 0, -100, dtype=torch.float64)).tolist()
        schedule = published_schedule(count, NoiseBins(tuple(edges)))
        used = sorted({d for d in schedule.depths if d < count})
        exits = tuple(None if d == count else used.index(d) for d in schedule.depths)
        quarters = process.noise.log_snr(torch.arange(1000, 0, -1000 // args.groups, dtype=torch.float64)[1:]).tolist()
        blocks = at[1:]
        print(f"schedule, noisiest first: {schedule.depths} of {count} blocks", flush=True)
        if "losses" not in self.done["stages"][args.start]:
            self.done["stages"][args.start]["losses"] = self.tables(net, process, edges, at=blocks[:-1])

        def steps() -> int:
            """Of the stages that are compared at equal steps."""
            if "ee" not in self.done["stages"]:
                self.without("ee")()
            taken: int = self.done["stages"]["ee"]["steps"]
            return taken

        def ee(share: float) -> None:
            view = ExitsView(net, [blocks[d - 1] for d in used])
            recipe = Holding(ScheduledDepth(tuple(edges), exits))
            found = self.fit("ee", view, recipe, process, share, args.tune_rate)
            tables = self.tables(net, process, edges, at=blocks[:-1])
            self.finish("ee", kind, model, **found, edges=edges, depths=schedule.depths, losses=tables)

        def full(share: float) -> None:
            found = self.fit("full", ExitsView(net, []), Holding(), process, min(0.9, 2 * share), args.tune_rate, steps())
            self.finish("full", kind, model, **found, losses=self.tables(net, process, edges, at=blocks[:-1]))

        def uniform(share: float) -> None:
            view = ExitsView(net, blocks[:-1])
            found = self.fit("uniform", view, Holding(Joint(Mean())), process, min(0.9, 2 * share), args.tune_rate, steps())
            self.finish("uniform", kind, model, **found, losses=self.tables(net, process, edges, at=blocks[:-1]))

        def deediff(share: float) -> None:
            spec = DenoisingExit()
            torch.manual_seed(args.seed)  # whatever was done before
            add_heads(net, spec, blocks[:-1])
            try:
                found = self.fit("deediff", ExitsView(net, blocks[:-1]), UncertaintyAware(), process, share, args.head_rate)
                tables = self.tables(net, process, edges, at=blocks[:-1], to=OUTPUT, fill=HeadOutput())
                save_bundle(self.out / "deediff", "heads", _HEADS, {"spec": part_to_dict(spec), "at": blocks[:-1]}, net.heads.state_dict())
            finally:  # the stages after it have none
                net.heads.clear()
            self.finish("deediff", kind, None, **found, heads=True, losses=tables)

        def latte(share: float) -> None:
            plan = layer_groups(at[0], blocks, args.groups, quarters)
            found = self.fit("latte", PlanView(net, plan), Joint(FinalOnly()), process, share, args.rate / 2, edges=quarters)
            loss = self.loss(PlanView(net, plan), process)
            self.finish("latte", kind, model, **found, held_out_loss=loss, edges=quarters, groups=args.groups)

        def shallow(share: float) -> None:
            small = transformer(args, self.size, self.classes, args.shallow).to(self.device)
            small.load_state_dict({n: v for n, v in begun.items() if n in small.state_dict()})
            own = self.attached(small, process)
            found = self.fit("shallow", ExitsView(own, []), Joint(FinalOnly()), process, share, args.rate / 2)
            loss = self.loss(ExitsView(own, []), process)
            self.finish("shallow", kind, small, **found, held_out_loss=loss, blocks=args.shallow)

        stages: dict[str, Callable[[float], None]] = {
            "ee": ee, "full": full, "uniform": uniform, "deediff": deediff, "latte": latte, "shallow": shallow,
        }  # fmt: skip
        # What is left after variants belongs to others. Export, saving and tables come out of what is left for the next ones.
        kept, self.end = self.end, time.monotonic() + whole * self.left
        try:
            for index, name in enumerate(waiting):
                share = 0.9 * SHARES[name] / sum(SHARES[n] for n in waiting[index:])
                model.load_state_dict(begun)
                self.attempt(name, partial(stages[name], share))
        finally:
            self.end = kept

    def without(self, name: str) -> Callable[[], None]:
        """A stage that cannot begin."""

        def stage() -> None:
            raise LeftOutError(f"it needs {name}, which is not there")

        return stage

    def check(self) -> None:
        """Samples of every model, and their FID if there are feature networks."""
        args = self.args
        features = None if args.features is None else load_features(args.features, device=self.device)
        real = None if features is None else FeatureStatistics.load(args.features, "trained-train")
        longest = 0.0
        for name, trained in load_models(self.out, None, self.device).items():
            if trained.about.get("heads"):  # images are those of its start until exits are taken
                continue
            if longest > self.left + 60 * args.reserve:
                print(f"{name}: not sampled, {longest:.0f} s wanted", flush=True)
                continue
            begun = time.monotonic()
            made = self.samples(trained, args.samples if features is not None else 80)
            Image.fromarray(grid(made[:80])).save(self.out / f"{name}.png")
            found: dict[str, Any] = {"samples": len(made), "steps": args.sampler_steps, "guidance": args.guidance}
            found["plan"] = bool(trained.plan())
            if features is not None and real is not None:
                stats = FeatureStatistics.of((features(part) for part in made.split(1000)), features.network)
                found |= {"fid": fid(real, stats), "reference": "training images, features of feature_net.py"}
            self.done["stages"][name]["check"] = found
            write_json(self.sheet, self.done)
            longest = max(longest, 1.2 * (time.monotonic() - begun))
            print(f"{name}: {found}, {time.monotonic() - begun:.1f} s", flush=True)

    @torch.no_grad()
    def samples(self, trained: Trained, count: int) -> Tensor:
        """Images in [-1, 1], the same noise and classes for every model; a model with a plan runs by it."""
        args, out = self.args, []
        plan = trained.plan()
        # Under autocast the types of a cut's states would not be those it was made with.
        runner: nn.Module = Denoiser(trained.attach(), plan) if plan else trained.model
        half = self.precision == "bf16" and not plan
        for first in range(0, count, args.sample_batch):
            rows = min(args.sample_batch, count - first)
            g = torch.Generator().manual_seed(args.seed + 1 + first)
            noise = torch.randn(rows, 3, self.size, self.size, generator=g).to(self.device)
            labels = (torch.arange(first, first + rows) % self.classes).to(self.device)
            inputs, without = {"class_labels": labels}, {"class_labels": torch.full_like(labels, self.classes)}
            guided = args.guidance != 1.0
            with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
                made = sample(
                    runner, trained.scheduler(), noise, steps=args.sampler_steps, inputs=inputs,
                    unconditional=without if guided else None, guidance=args.guidance, names=(image_name(trained.model), "timestep"),
                )  # fmt: skip
            out.append(made.float().clamp(-1, 1).cpu())
        return torch.cat(out)


def adam(rate: float, device: torch.device) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.99), weight_decay=0.0, fused=device.type == "cuda")

    return make


def grid(images: Tensor, columns: int = 10) -> Any:
    """Images ``[N, 3, H, W]`` in [-1, 1] side by side as uint8 ``[rows H, columns W, 3]``; each column is a class."""
    rows = len(images) // columns
    tiles = images[: rows * columns].unflatten(0, (rows, columns)).permute(0, 3, 1, 4, 2)
    return ((tiles.flatten(2, 3).flatten(0, 1) + 1) * 127.5).round().byte().numpy()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=(*MODELS, "variants", *VARIANTS, "check"), help="models, all variants or some, samples")
    parser.add_argument("--data", type=Path, default=None, help="images with splits train and test; scikit-learn's digits by default")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=None, help="folder for checkpoints and metrics; OUT/work by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=8.5, help="of the whole call")
    parser.add_argument("--reserve", type=float, default=0.6, help="minutes kept back for loading and saving")
    parser.add_argument("--start", default="flow", help="model that variants begin with")
    parser.add_argument("--steps", type=int, default=100_000, help="most steps of a stage")
    parser.add_argument("--least-steps", type=int, default=100, help="a stage with fewer, for want of time, is left out")
    for name, value in {"width": 256, "heads": 4, "blocks": 12, "shallow": 4, "groups": 4, "batch": 512, "items": None}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--tune-rate", type=float, default=5e-5, help="of fine-tuning; the published one is 1e-5 with far more steps")
    parser.add_argument("--head-rate", type=float, default=1e-3)
    parser.add_argument("--average", type=float, default=0.999, help="decay of the weights' average")
    parser.add_argument("--checkpoint-every", type=int, default=2000, help="steps")
    parser.add_argument("--workers", type=int, default=4, help="processes that make batches")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None, help="by default, except in a trial")
    parser.add_argument("--half", action="store_true", help="save weights as bfloat16")
    parser.add_argument("--shard", default="10GB", help="largest file of weights, as diffusers takes it")
    parser.add_argument("--features", type=Path, default=None, help="folder that feature_net.py wrote")
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--sample-batch", type=int, default=1000)
    parser.add_argument("--sampler-steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="a trial in seconds")
    args = parser.parse_args(arguments)
    if args.tiny:
        trial = {"width": 32, "heads": 2, "blocks": 4, "shallow": 2, "groups": 2, "batch": 64, "steps": 24, "workers": 0}
        trial |= {"least_steps": 2, "compile": False, "checkpoint_every": 20, "sampler_steps": 5, "samples": 80, "sample_batch": 80}
        for name, value in trial.items():
            if getattr(args, name) == parser.get_default(name):
                setattr(args, name, value)
    args.compile = args.compile is not False
    torch.set_float32_matmul_precision("high")
    run = Training(args)
    some = [w for w in args.what if w in VARIANTS] if "variants" not in args.what else list(VARIANTS)
    waiting = [w for w in args.what if w in MODELS and w not in run.done["stages"]] + ["variants"] * bool(some)
    for index, what in enumerate(waiting):
        share = 1 / (len(waiting) - index)
        if what == "variants":
            run.variants(share, some)
        else:
            run.attempt(what, partial(run.model, what, share))
    if "check" in args.what:
        run.check()
    size = sum(f.stat().st_size for f in run.out.rglob("*") if f.is_file() and "work" not in f.relative_to(run.out).parts)
    print(f"{run.out}: {size / 1e6:.1f} MB without work/, {time.monotonic() - run.start:.0f} s in all", flush=True)


if __name__ == "__main__":
    main()
