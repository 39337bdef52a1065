"""Every language-model system on one trained model: what drafts gain, and what leaving early costs.

The model of `train_lm.py` is where every system starts. Each adds its own exits and is trained by its own recipe for the same time, on the
same text; where a recipe trains the model too, a copy of it. Then, by what a system is:

- drafts that are verified: acceptance, tokens a round and tokens per second at batch 1 in captured rounds, beside plain decoding in
  captured rounds, on prompts of all of Spec-Bench's groups, prompts' own time taken off; texts are compared. Captured rounds draft to the
  longest length whatever a rule says; a rule that stops early cuts what is judged, not what is computed.
- tokens that leave, schedules: weights read and blocks run over those of plain decoding, the share of tokens that the system's full model
  would have chosen, and the perplexity of the text under that model and under the model it started from, beside those of plain decoding.
  By the reference engine, whose times are beside its own plain decoding.
- tokens that leave at the first exit of the first model and catch up, in captured rounds beside plain captured rounds: the threshold
  certified for each of some limits on the share of tokens that the full model would not have chosen.

And transformers on the first model: greedy, assistant_early_exit, prompt lookup.

    python benchmarks/lm_systems.py --data FOLDER --model runs/lm --out benchmarks/results/lm_systems_h100.json
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lm_common import (
    Measurement,
    asked_parts,
    compare_texts,
    grouped,
    in_turn,
    load_model,
    measurement_arguments,
    rate,
    round_ms,
    run_parts,
    seconds,
    tokens_per_round,
)
from torch import Tensor, nn
from train_lm import Text, fit_on_time

from offramp import systems
from offramp.budget.agreement import certify_table
from offramp.budget.targets import Risk
from offramp.cli.text_runs import Written, agreeing, by_threshold, calibrated, write
from offramp.core.system import System
from offramp.engines.text.draft_lengths import LengthChoice
from offramp.engines.text.generate import generate
from offramp.engines.text.planner import fingerprint_of
from offramp.engines.text.round_prompt import padded
from offramp.engines.text.round_times import times_of
from offramp.engines.text.rounds import Rounds
from offramp.engines.text.written import Generation
from offramp.exits.lm import Shared
from offramp.language import LanguageModel, attach_lm
from offramp.policies.decoding import Accept, Plain, Scheduled, Verify, Way

DRAFTING = ("layerskip", "kangaroo", "eesd", "self-supervised-early-exits", "sorted-llama")
LEAVING = ("free", "ee-llm", "calm", "skipdecode", "self-supervised-early-exits")
SHORT = {"drafts": [f"draft:{n}" for n in DRAFTING], "leaves": [f"leave:{n}" for n in LEAVING]}
PARTS = ("transformers", "accept", *SHORT["drafts"], *SHORT["leaves"])
LIMITS = (0.02, 0.05, 0.1)  # on the share of tokens that the full model would not have chosen


def composed(name: str, blocks: int, new: int) -> System:
    """A system for a model of so many blocks: where its builder must know them, exits at the same shares of the depth as its paper's."""
    arguments: dict[str, dict[str, Any]] = {
        "layerskip": {"blocks": blocks, "exit_after": max(1, blocks // 8), "rotate": max(1, blocks // 4)},
        "free": {"blocks": blocks, "exit_after": max(1, blocks // 4)},
        "skipdecode": {"blocks": blocks, "length": new},
    }
    return systems.build(name, **arguments.get(name, {}))


def drafting(system: System) -> Verify:
    """The system's drafts; of one that lets tokens leave, four from its first exit."""
    way = systems.way(system) if system.draft is not None else Verify(4)
    if not isinstance(way, Verify):
        raise SystemExit(f"{system.card.name} does not draft.")
    return way


def perplexity(model: nn.Module, written: Written) -> float:
    """Of the new tokens after the first of each text, under a model that reads the whole text."""
    given = torch.tensor(written.prompts)
    whole = torch.cat([given, written.tokens], 1)
    device = next(model.parameters()).device
    total, count = 0.0, 0
    with torch.inference_mode():
        for rows in whole.split(16):
            logits = model(rows.to(device), use_cache=False).logits[:, given.shape[1] : -1].float()
            wanted = rows[:, given.shape[1] + 1 :].to(device)
            total += float(nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum"))
            count += wanted.numel()
    return math.exp(total / max(1, count))


@dataclass
class Turns:
    """Prompts written by plain captured rounds and by others, in turn.

    Attributes:
        new: tokens of a text.
        samples: seconds by way, of each text and until its first token.
        plain: the texts.
        fast: the others.
    """

    new: int
    samples: list[dict[str, float]] = field(default_factory=list)
    plain: list[Generation] = field(default_factory=list)
    fast: list[Generation] = field(default_factory=list)

    def rates(self) -> dict[str, float]:
        """Tokens per second after each text's first, prompts' time taken off."""
        times = {w: sum(s[w] - s[f"{w}_prompt"] for s in self.samples) for w in ("plain", "fast")}
        written = len(self.samples) * (self.new - 1)
        rates = {"tokens_per_s": written / times["fast"], "plain_tokens_per_s": written / times["plain"]}
        return {**rates, "speedup": times["plain"] / times["fast"]}


class Table(Measurement):
    """One model whose weights each system replaces by its own: plain decoding is captured once for all."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        with self.budget.part("model"):
            self.base = load_model(self.folder, self.dtype).to(self.device)
            self.model = load_model(self.folder, self.dtype).to(self.device)
        self.blocks = int(self.model.config.num_hidden_layers)
        every = self.spec_bench()
        self.prompts = [p.tokens for p in in_turn([p for g in grouped(every).values() for p in g[: args.each]])]
        long = [p.tokens[-args.prompt :] for p in in_turn(every) if len(p.tokens) >= args.prompt]  # equally long, for batches
        self.even, self.calibration = long[: args.even], long[args.even : args.even + args.calibration]
        self.text: Text | None = None
        self.first = attach_lm(self.model, [max(1, self.blocks // 8)], Shared())
        self.plain: Rounds | None = None
        about = {
            "blocks": self.blocks, "even_prompts": len(self.even), "even_prompt_tokens": args.prompt, "even_new_tokens": args.even_new,
            "seconds_of_training": args.seconds,
        }  # fmt: skip
        same = ("dtype", "blocks", "new_tokens", "prompts", "seconds_of_training", "even_new_tokens") if args.keep else ()
        self.open_sheet("lm_systems", len(self.prompts), about, same)

    # ---- training --------------------------------------------------------------------------------------------------------------

    def trained(self, name: str) -> tuple[System, LanguageModel]:
        """A system's exits over `model`, which has the system's weights now; trained if that was not done before."""
        system = composed(name, self.blocks, self.args.even_new)
        folder = self.folder / "systems" / name
        if not (folder / "done").is_file():
            with self.budget.part(f"train: {name}"):
                self._train(name, system, folder)
        weights = torch.load(folder / "weights.pt", map_location=self.device, weights_only=True)
        self.model.load_state_dict(weights["model"] if weights["model"] is not None else self.base.state_dict())
        lm = attach_lm(self.model, system=system)
        lm.heads.load_state_dict(weights["heads"])
        return system, lm

    def _train(self, name: str, system: System, folder: Path) -> None:
        if self.text is None:
            self.text = Text.read(self.args, self.tokenizer)
        exact = load_model(self.folder, torch.float32).to(self.device)
        lm = attach_lm(exact, system=system)
        model_too = system.recipe.trains_model
        learning = self.args.rate if model_too else self.args.head_rate
        found = fit_on_time(name, lm, system.recipe, self.text, folder / "work", self.args.seconds / 60, learning)
        folder.mkdir(parents=True, exist_ok=True)
        heads = lm.heads.to(self.dtype).state_dict()
        torch.save({"model": exact.to(self.dtype).state_dict() if model_too else None, "heads": heads}, folder / "weights.pt")
        (folder / "done").write_text(f"{found['steps']} steps\n")
        self.sheet.content.setdefault("training", {})[name] = {k: v for k, v in found.items() if k != "train_loss"}

    # ---- what drafts gain ------------------------------------------------------------------------------------------------------

    def plain_rounds(self) -> Rounds:
        """Plain decoding, captured once: weights are replaced in place."""
        if self.plain is None:
            self.plain = Rounds(self.first, 1, slots=self.args.context + 1, draft_length=0, compiled=self.compiled)
        return self.plain

    def beside_plain(self, fast: Rounds, choice: LengthChoice | None = None) -> Turns:
        """Every prompt by captured rounds, of the longest length or as chosen, and by plain ones in turn."""
        ways, new = {"plain": self.plain_rounds().generate, "fast": partial(fast.generate, choice=choice)}, self.args.new
        for write_one in ways.values():
            for prompt in {padded(len(p)): p for p in self.prompts}.values():  # every width of prompts is captured before
                write_one([prompt], new)
        found = Turns(new)
        for turn, prompt in enumerate(self.prompts):
            taken: dict[str, float] = {}
            for name in reversed(ways) if turn % 2 else ways:
                taken[name], answer = seconds(partial(ways[name], [prompt], new), self.device)
                taken[f"{name}_prompt"] = answer.prompt_s
                getattr(found, name).append(answer)
            found.samples.append(taken)
        return found

    def draft(self, name: str) -> None:
        if not self.budget.fits(f"system: draft {name}", self.args.guess):
            return
        with self.budget.part(f"system: draft {name}"):
            system, lm = self.trained(name)
            way, new = drafting(system), self.args.new
            fast = Rounds(
                lm, 1, slots=self.args.context + 1, draft_length=way.draft_length, exit_index=way.exit_index, stop=way.stop,
                compiled=self.compiled,
            )  # fmt: skip
            run = self.beside_plain(fast)
            drafted, accepted = (sum(sum(getattr(w, what)) for w in run.fast) for what in ("drafted", "accepted"))
            exact = load_model(self.folder, torch.float32).to(self.device)
            exact.load_state_dict({k: v.float() for k, v in self.model.state_dict().items()})
            same = compare_texts(self.model, exact, self.prompts, *([w.tokens[0] for w in texts] for texts in (run.plain, run.fast)))
            middle = sorted(self.prompts, key=len)[len(self.prompts) // 2]
            ms = {"plain": round_ms(self.plain_rounds(), [middle], 0), "drafts": round_ms(fast, [middle], way.draft_length)}
        self.sheet.row(
            way="drafts", system=name, exit=lm.exits[way.exit_index], draft_length=way.draft_length, stop=repr(way.stop),
            acceptance=accepted / max(1, drafted), tokens_per_round=tokens_per_round([new] * len(self.prompts), accepted), **run.rates(),
            round_ms=ms["drafts"], plain_round_ms=ms["plain"], against_plain=same, samples=run.samples,
        )  # fmt: skip

    def transformers(self) -> None:
        """Its own ways on the first model, a few prompts each."""
        self.model.load_state_dict(self.base.state_dict())
        options: dict[str, dict[str, Any]] = {
            "greedy": {},
            "assistant_early_exit": {"assistant_early_exit": self.first.exits[0]},
            "prompt_lookup": {"prompt_lookup_num_tokens": 5},
        }
        prompts = [torch.tensor([p], device=self.device) for p in self.prompts[: self.args.peer_prompts]]
        for way, extra in options.items():
            if not self.budget.fits(f"transformers: {way}", 40):
                continue
            with self.budget.part(f"transformers: {way}"):

                def said(count: int, extra: dict[str, Any] = extra) -> list[Tensor]:
                    given: dict[str, Any] = {"do_sample": False, "max_new_tokens": count, "pad_token_id": 0, **extra}
                    return [self.model.generate(input_ids=p, attention_mask=torch.ones_like(p), **given) for p in prompts]

                found = rate(said, self.args.peer_new, self.args.peer_repeats, self.device)
                found["tokens_per_s"] *= len(prompts)
            self.sheet.row(way=f"transformers, {way}", system="-", prompts=len(prompts), new_tokens=self.args.peer_new, **found)

    # ---- what leaving costs ----------------------------------------------------------------------------------------------------

    def accept(self) -> None:
        """Leaving with catch-up, captured: a row for each limit on disagreement that lets any token leave."""
        if not self.budget.fits("accept", self.args.guess):
            return
        with self.budget.part("accept"):
            self.model.load_state_dict(self.base.state_dict())
            tried = by_threshold(self.first, Accept, self.calibration, self.args.even_new, self.args.thresholds)
            about = fingerprint_of(self.first)
        known: dict[float, float] = {}
        for limit in LIMITS:
            plan = certify_table(**tried, risk=Risk(max_disagreement=limit), way=Accept(), fingerprint=about)
            known.setdefault(plan.threshold, limit)
        for threshold, limit in known.items():
            if math.isinf(threshold) or not self.budget.fits(f"accept: {limit:g}", self.args.guess):
                continue
            with self.budget.part(f"accept: {limit:g}"):
                fast = Rounds(self.first, 1, self.args.context + 1, (0, 1, 3, 7), way=Accept(threshold), compiled=self.compiled)
                run = self.beside_plain(fast, LengthChoice.of(times_of(fast, self.prompts[:1]), 0.5))
            depths = torch.cat([torch.as_tensor(w.depth[0])[1:] for w in run.fast])
            self.sheet.row(
                way="captured leaves", system=f"ours: catch-up, {limit:g}", exit=self.first.exits[0], limit=limit, threshold=threshold,
                left=float((depths < self.blocks).double().mean()), audited=sum(w.audited for w in run.fast),
                disagreed=sum(w.disagreed for w in run.fast), same_text=sum(a.tokens == b.tokens for a, b in zip(
                    run.plain, run.fast, strict=True)) / len(run.fast), **run.rates(), samples=run.samples,
            )  # fmt: skip

    def leave(self, name: str) -> None:
        if not self.budget.fits(f"system: leave {name}", self.args.guess):
            return
        with self.budget.part(f"system: leave {name}"):
            system, lm = self.trained(name)
            new = self.args.even_new
            threshold = calibrated(system, lm, self.calibration, new, self.args.thresholds)
            way: Way = systems.way(system, threshold)
            if not isinstance(way, Accept | Scheduled):
                raise SystemExit(f"{name} lets no token leave.")
            found = write(lm, way, self.even, new)
            full = write(lm, Plain(), self.even, new, together=True)
            agreed = agreeing(self.model, found)[:, 1:]
            early = (found.depth < self.blocks)[:, 1:]
            alone = self.even[0]
            times = {
                w: seconds(partial(generate, lm, [alone], how, max_new_tokens=new, do_sample=False, eos_token_id=[]), self.device)[0]
                for w, how in (("warm", Plain()), ("plain", Plain()), ("ours", way))
            }
        self.sheet.row(
            way="leaves", system=name, fill=type(system.fill).__name__,
            threshold=str(threshold if threshold is not None else system.threshold),
            cost=found.cost, blocks_share=found.blocks_share, left=float(early.float().mean()),
            mean_depth=float(found.depth[:, 1:].float().mean()), agreement=float(agreed.float().mean()),
            disagreement_of_left=float((early & ~agreed).sum()) / max(1, int(early.sum())),
            same_text=float((found.tokens == full.tokens).all(1).float().mean()),
            perplexity=perplexity(self.model, found), perplexity_plain=perplexity(self.model, full),
            perplexity_first=perplexity(self.base, found), perplexity_first_plain=perplexity(self.base, full),
            reference_s=times["ours"], reference_plain_s=times["plain"],
        )  # fmt: skip


def main() -> None:
    known = f"{', '.join(SHORT)}, or some of {', '.join(PARTS)}"
    parser = measurement_arguments(__doc__, ",".join(("transformers", *SHORT)), known)
    parser.add_argument("--guess", type=float, default=100, help="seconds that the first system is expected to take, training included")
    parser.add_argument("--keep", action="store_true", help="keep rows that an earlier call with the same settings wrote to the same file")
    parser.add_argument("--seconds", type=float, default=25, help="of training for each system")
    parser.add_argument("--rate", type=float, default=3e-4, help="learning rate where the model is trained too")
    parser.add_argument("--head-rate", type=float, default=1e-3)
    parser.add_argument("--tokens", type=int, default=512, help="of a block of text in training")
    parser.add_argument("--batch", type=int, default=16, help="blocks a step")
    parser.add_argument("--passes", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--held", type=int, default=64)
    parser.add_argument("--characters", type=int, default=0, help="most of each text, for trials; 0 = all")
    parser.add_argument("--each", type=int, default=4, help="prompts of a group for drafts")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompts where tokens leave")
    parser.add_argument("--even", type=int, default=12, help="such prompts")
    parser.add_argument("--even-new", type=int, default=64)
    parser.add_argument("--calibration", type=int, default=64, help="such prompts, others, to choose thresholds on")
    parser.add_argument("--thresholds", type=int, default=8, help="that are tried where each must be run")
    parser.add_argument("--peer-prompts", type=int, default=6)
    parser.add_argument("--peer-new", type=int, default=64)
    parser.add_argument("--peer-repeats", type=int, default=1)
    args = parser.parse_args()
    asked = asked_parts(",".join(",".join(SHORT.get(part, [part])) for part in args.parts.split(",")), PARTS)
    table = Table(args)
    parts: dict[str, Any] = {"transformers": table.transformers, "accept": table.accept}
    parts |= {f"draft:{n}": partial(table.draft, n) for n in DRAFTING} | {f"leave:{n}": partial(table.leave, n) for n in LEAVING}
    run_parts(parts, asked, table.sheet)


if __name__ == "__main__":
    main()
