"""Train a language model with shallow exits on books, then heads on its frozen states, within a few minutes.

A Llama-shaped model learns together with exits that share its head, blocks left out by chance as in LayerSkip; then, with the model
frozen, heads learn what it would say: Kangaroo's adapter, EESD's block. Training ends on time: the learning rate follows the larger of
two shares, of the steps and of the minutes, and what was not reached is not waited for. A call that was stopped and is made again goes on
from its last checkpoint. The vocabulary is the beginning of GPT-2's, so that the blocks are what takes the time.

    python benchmarks/train_lm.py --data FOLDER --out runs/lm
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lm_common import (
    END_OF_TEXT,
    Budget,
    load_model,
    numbers,
    small_tokenizer,
    unpacked,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from offramp.core.bundle import write_json
from offramp.exits.cached import Adapter, Block
from offramp.exits.lm import LMHeadSpec, OwnNorm, Shared
from offramp.language import LanguageModel, attach_lm
from offramp.measure.clock import environment
from offramp.train import Distill, EarlyExitLoss, Explicit, Frozen, Joint, LayerDropout, Recipe, fit, load_best, read_metrics
from offramp.train.text import NextToken, TextNet, packed, text_loader

HEADS: dict[str, LMHeadSpec] = {"shared": Shared(), "norm": OwnNorm(), "adapter": Adapter(), "block": Block()}


class OutOfTimeError(Exception):
    """The minutes of a stage are over; what was trained stays."""


class Shifted(Dataset[dict[str, Tensor]]):
    """Blocks of a long text, some passes over it, each cut at other places.

    Args:
        stream: int64 ``[N]``.
        block: tokens of a block.
        passes: over the text.
    """

    def __init__(self, stream: Tensor, block: int, passes: int) -> None:
        self.stream, self.block, self.passes = stream, block, passes
        self.each = (len(stream) - block) // block
        if self.each < 1:
            raise SystemExit(f"The text has {len(stream)} tokens, too few for blocks of {block}.")

    def __len__(self) -> int:
        return self.each * self.passes

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        turn, place = divmod(index, self.each)
        start = place * self.block + turn * self.block // self.passes
        tokens = self.stream[start : start + self.block]
        return {"input_ids": tokens, "labels": tokens}


def encoded(tokenizer: Any, text: str) -> list[int]:
    """Ids of a long text, line by line so that all cores take part."""
    return [number for line in tokenizer.encode_batch(text.splitlines(keepends=True)) for number in line.ids]


def rate_at(share: float, warmup: float = 0.04, least: float = 0.05) -> float:
    """Learning rate over its peak after this share of the training: a line up, half a cosine down."""
    if share < warmup:
        return max(share, 1e-3) / warmup
    done = min(1.0, (share - warmup) / (1 - warmup))
    return least + (1 - least) * (1 + math.cos(math.pi * done)) / 2


def on_time(seconds_left: float, note: Callable[[int, float, float], None]) -> Callable[[torch.optim.Optimizer, int], Any]:
    """A scheduler for `fit` by the larger share of steps and time; it ends the training when the time is over.

    Args:
        seconds_left: from its making. Shares count from the end of the first step on, which may have compiled.
        note: told step, share and seconds now and then.
    """

    def make(optimizer: torch.optim.Optimizer, steps: int) -> Any:
        begun = time.monotonic()
        first, told = [begun], [begun]

        def at(step: int) -> float:
            now = time.monotonic()
            if now - begun >= seconds_left:
                raise OutOfTimeError
            if step <= 1:
                first[0] = now
            share = max(step / steps, (now - first[0]) / (seconds_left - (first[0] - begun)))
            if now - told[0] > 15:
                told[0] = now
                note(step, share, now - begun)
            return rate_at(share)

        return torch.optim.lr_scheduler.LambdaLR(optimizer, at)

    return make


def decayed(rate: float, device: torch.device) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    """AdamW that lets matrices decay and vectors be."""

    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW([g for g in groups if g["params"]], lr=rate, betas=(0.9, 0.95), fused=device.type == "cuda")

    return make


@torch.no_grad()
def validation(lm: LanguageModel, blocks: Tensor, batch: int, precise: bool) -> dict[str, Any]:
    """Loss of every exit and of the model on texts ``[N, T]``, in nats a token, and how often each exit says what the model says."""
    device = lm.decoder.device
    net, loss = TextNet(lm), NextToken()
    was = lm.model.training
    net.eval()
    sums = torch.zeros(2, len(lm.exits) + 1, dtype=torch.float64)
    for part in blocks.split(batch):
        tokens = part.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=not precise):
            answers, _ = net.forward_with_states(input_ids=tokens)
        said = answers[-1].argmax(-1)
        for k, logits in enumerate(answers):
            sums[0, k] += float(loss(logits, tokens).sum())
            sums[1, k] += float((logits.argmax(-1) == said).float().mean(1).sum())
    lm.model.train(was)
    means = (sums / len(blocks)).tolist()
    return {"loss": means[0], "agreement": means[1][:-1], "exits": list(lm.exits), "blocks": len(blocks)}


def recipe_of(args: argparse.Namespace, depths: Sequence[int]) -> Recipe:
    """How model and shallow exits are trained together."""
    if args.recipe == "layerskip":
        return LayerDropout(EarlyExitLoss(tuple(depths), args.blocks, scale=args.scale), rate=args.dropout)
    weights = [float(w) for w in args.weights.split(",")]
    if len(weights) != len(depths):
        raise SystemExit(f"--weights has {len(weights)} numbers for {len(depths)} exits.")
    return LayerDropout(Joint(Explicit((*weights, 1.0), normalise=True)), rate=args.dropout)


@dataclass(frozen=True)
class Text:
    """What is trained on, and how.

    Attributes:
        stream: int64 ``[N]``.
        held: int64 ``[B, T]``, held out.
        batch: blocks a step.
        passes: most passes over the text.
        epochs: stretches they are divided into.
    """

    stream: Tensor
    held: Tensor
    batch: int
    passes: int
    epochs: int

    @classmethod
    def read(cls, args: argparse.Namespace, tokenizer: Any) -> Text:
        """Books of ``args.data``, with an end token after each part."""
        end, folder = tokenizer.token_to_id(END_OF_TEXT), Path(args.data) / "text"
        texts = [unpacked(folder / f"books_{part}.txt.xz") for part in ("train", "val")]
        if args.characters:
            texts = [t[: args.characters] for t in texts]
        ids = [torch.tensor([*encoded(tokenizer, t), end]) for t in texts]
        held = packed([ids[1]], None, args.tokens)[: args.held]
        print(f"{len(ids[0])} tokens of {len(texts[0])} characters; held out: {len(held)} blocks of {args.tokens}", flush=True)
        return cls(ids[0], held, args.batch, args.passes, args.epochs)


@contextlib.contextmanager
def compiled_blocks(model: nn.Module, on: bool) -> Iterator[None]:
    """Within, the forward of each block is compiled, once for all as they are alike; hooks around blocks stay as they are.

    Only for models that `attach_lm` has seen before: what it makes later would copy the compiled forward of another block.
    """
    if not on:
        yield
        return
    blocks = [b for listed in model.modules() if isinstance(listed, nn.ModuleList) for b in listed]
    for block in blocks:
        block.forward = torch.compile(block.forward)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def fit_on_time(
    name: str,
    lm: LanguageModel,
    recipe: Recipe,
    text: Text,
    work: Path,
    minutes: float,
    rate: float,
    checkpoint_every: int | None = None,
    compiled: bool = False,
) -> dict[str, Any]:
    """Train until the steps or the minutes are over, whichever comes first; the weights that evaluated best stay."""
    device = lm.decoder.device
    precision = "bf16" if device.type == "cuda" else "no"
    dataset = Shifted(text.stream, text.held.shape[1], max(1, text.passes // text.epochs))
    loader: Any = DataLoader(dataset, batch_size=text.batch, shuffle=True, drop_last=True)
    losses = work / "metrics.jsonl"

    def note(step: int, share: float, spent: float) -> None:
        last = [r for r in read_metrics(losses)[-3:] if r["event"] == "step"]
        shown = {k: round(v, 3) for k, v in last[-1]["losses"].items()} if last else {}
        print(f"  {name}: step {step}, {share:.0%}, {spent:.0f} s, {1e3 * spent / max(1, step):.0f} ms a step, {shown}", flush=True)

    start, ended = time.monotonic(), "steps"
    try:
        with compiled_blocks(lm.model, compiled):
            fit(
                lm, loader, recipe, epochs=text.epochs, output_dir=work, eval_loader=text_loader(text.held, text.batch, shuffle=False),
                optimizer=decayed(rate, device), scheduler=on_time(60 * minutes, note), mixed_precision=precision, max_grad_norm=1.0,
                checkpoint_every=checkpoint_every, keep_checkpoints=1, progress=False,
            )  # fmt: skip
    except OutOfTimeError:
        ended = "time"
    history = read_metrics(losses)
    steps = [r for r in history if r["event"] == "step"]
    evaluations = [{k: r[k] for k in ("step", "loss", "losses")} for r in history if r["event"] == "eval"]
    found, kept = validation(lm, text.held, text.batch, precision == "no"), "last"
    if evaluations and min(e["loss"] for e in evaluations) < sum(found["loss"]) / len(found["loss"]):
        load_best(lm, work)
        found, kept = validation(lm, text.held, text.batch, precision == "no"), "best"
    taken = time.monotonic() - start
    print(f"{name}: {len(steps)} steps, ended by {ended}, {kept} weights, validation {found}", flush=True)
    return {
        "recipe": repr(recipe), "steps": len(steps), "seconds": taken, "ended_by": ended, "kept": kept, "validation": found,
        "evaluations": evaluations, "train_loss": [r["loss"] for r in steps[:: max(1, len(steps) // 200)]],
        "tokens_seen": len(steps) * text.batch * text.held.shape[1],
    }  # fmt: skip


class Training:
    """Stages in a folder, each done once."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.out, self.budget = args, Path(args.out), Budget(args.minutes)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.out.mkdir(parents=True, exist_ok=True)
        with self.budget.part("text"):
            self.tokenizer = small_tokenizer(Path(args.data) / "tokenizer", args.vocabulary)
            self.text = Text.read(args, self.tokenizer)
        self.sheet = self.out / "training.json"
        self.done: dict[str, Any] = json.loads(self.sheet.read_text()) if self.sheet.is_file() else {}
        self.done |= {"settings": vars(args), "environment": environment(self.device)}

    def finish(self, stage: str, **found: Any) -> None:
        self.done.setdefault("stages", {})[stage] = found
        write_json(self.sheet, self.done)

    def passed(self, stage: str) -> bool:
        return stage in self.done.get("stages", {})

    def fit(self, name: str, lm: LanguageModel, recipe: Recipe, minutes: float, rate: float) -> dict[str, Any]:
        return fit_on_time(
            name, lm, recipe, self.text, self.out / "work" / name, minutes, rate, self.args.checkpoint_every, self.args.compile
        )

    def model(self) -> None:
        """Model and shallow exits together."""
        if self.passed("model"):
            return
        from transformers import LlamaConfig, LlamaForCausalLM

        args = self.args
        config = LlamaConfig(
            vocab_size=args.vocabulary, hidden_size=args.width, num_hidden_layers=args.blocks, num_attention_heads=args.heads,
            num_key_value_heads=args.kv_heads, intermediate_size=args.inner, max_position_embeddings=2 * args.tokens,
            tie_word_embeddings=True, bos_token_id=args.vocabulary - 1, eos_token_id=args.vocabulary - 1,
        )  # fmt: skip
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).to(self.device)
        lm = attach_lm(model, args.exits, Shared())
        count = sum(p.numel() for p in model.parameters())
        print(f"{count / 1e6:.1f} M parameters, {len(self.text.stream) / args.tokens / args.batch:.0f} steps a pass", flush=True)
        with self.budget.part("model"):
            found = self.fit("model", lm, recipe_of(args, args.exits), args.share * args.minutes, args.rate)
        model.to(torch.bfloat16).save_pretrained(self.out / "model")
        self.tokenizer.save(str(self.out / "model" / "tokenizer.json"))
        attach_lm(load_model(self.out, torch.bfloat16), args.exits, Shared()).save(self.out / "exits-shared")
        self.finish("model", parameters=count, **found)

    def head(self, name: str, depth: int, minutes: float) -> None:
        """One head on the frozen model, by what the model would say."""
        stage = f"{name}-{depth}"
        if self.passed(stage) or minutes <= 0:
            return
        exact = load_model(self.out, torch.float32).to(self.device)
        lm = attach_lm(exact, [depth], HEADS[name])
        with self.budget.part(stage):
            found = self.fit(stage, lm, Frozen(Distill(temperature=1.0, alpha=1.0)), minutes, self.args.head_rate)
        made = attach_lm(load_model(self.out, torch.bfloat16), [depth], HEADS[name])
        made.heads.load_state_dict(lm.heads.state_dict())  # rounds to the model's type
        made.save(self.out / f"exits-{stage}")
        self.finish(stage, parameters=sum(p.numel() for p in lm.heads.parameters()), **found)


def train(args: argparse.Namespace) -> None:
    run = Training(args)
    run.model()
    heads = [(n, int(d)) for n, _, d in (h.partition("@") for h in args.train_heads.split(",") if h)]
    for k, (name, depth) in enumerate(heads):
        spare = run.budget.left / 60 - args.reserve
        run.head(name, depth, spare / (len(heads) - k))
    size = sum(f.stat().st_size for f in run.out.rglob("*") if f.is_file() and "work" not in f.relative_to(run.out).parts)
    print(f"{run.out}: {size / 1e6:.1f} MB without work/, {60 * args.minutes - run.budget.left:.0f} s in all", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"blocks": 24, "width": 512, "heads": 8, "kv-heads": 4, "inner": 1408, "vocabulary": 4096}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--data", required=True, help="folder with text/, tokenizer/ and prompts/")
    parser.add_argument("--out", default="runs/lm")
    parser.add_argument("--minutes", type=float, default=7.0, help="budget of the whole call")
    parser.add_argument("--share", type=float, default=0.6, help="of the minutes that the model may take; its heads share the rest")
    parser.add_argument("--reserve", type=float, default=0.4, help="minutes kept back for loading and saving")
    parser.add_argument("--tokens", type=int, default=512, help="of a block of text")
    parser.add_argument("--batch", type=int, default=32, help="blocks a step")
    parser.add_argument("--passes", type=int, default=12, help="most passes over the text")
    parser.add_argument("--epochs", type=int, default=4, help="stretches they are divided into; evaluation and a checkpoint after each")
    parser.add_argument("--checkpoint-every", type=int, default=1000, help="steps; there is one after every stretch anyway")
    parser.add_argument("--compile", action="store_true", help="compile the blocks: a minute or so, then shorter steps")
    parser.add_argument("--exits", type=numbers, default=[3, 6, 12], help="after how many blocks")
    parser.add_argument("--recipe", choices=("joint", "layerskip"), default="joint")
    parser.add_argument("--weights", default="0.4,0.2,0.2", help="joint: of the exits, where the model's own answer has 1")
    parser.add_argument("--scale", type=float, default=1.0, help="layerskip: of the exits' weights, which grow with depth")
    parser.add_argument("--dropout", type=float, default=0.1, help="chance of the last block to be left out")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--train-heads", default="adapter@3,block@3", help=f"head@blocks, from {', '.join(HEADS)}")
    parser.add_argument("--head-rate", type=float, default=1e-3)
    parser.add_argument("--held", type=int, default=128, help="most blocks of held-out text")
    parser.add_argument("--characters", type=int, default=0, help="most of each text, for trials; 0 = all")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
