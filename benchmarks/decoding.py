"""Tokens per second of language-model decoding: ours, plain and speculative, beside transformers' own ways, in one run.

Weights are random in the shape asked for: this measures time. For speculation the blocks behind the exit are made to matter less, by one
factor on what they add, found by bisection, until the exit's most likely token is the model's at the wanted share of positions of texts
that the model itself writes after the prompts that are timed. All ways decode that same model from the same prompts, greedily; each is
timed over whole texts, prompt included, and the prompt's own time is taken off by runs of one token. The bandwidth limit is every weight
read once a token at the memory bandwidth measured on this machine.

Parts, each written when it is done, and left out (named in the result) when the budget of time has no room for it any more:

    plain          rows 1
    speculative    rows 1, each draft length; whether the text is the plain one's; synchronisations a round, counted
    transformers   greedy, assistant_early_exit, prompt lookup
    batch          more rows: plain, each draft length, and what the planner chooses from measured rounds
    long           a prompt of 8k tokens: speed and peak memory of plain and verified decoding

    python benchmarks/decoding.py --out benchmarks/results/decoding_llama_1b_h100.json
"""

from __future__ import annotations

import argparse
import copy
import gc
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from lm_common import (
    Budget,
    Sheet,
    asked_parts,
    candidate,
    compare_texts,
    numbers,
    rate,
    round_ms,
    run_parts,
    seconds,
    synchronisations,
    tokens_per_round,
    tuned,
    tuning_argument,
)
from torch import Tensor, nn

from offramp.engines.agreement import Acceptance, agreement
from offramp.engines.generate import Plain, generate
from offramp.engines.planner import Times, choose
from offramp.engines.rounds import Rounds
from offramp.language import LanguageModel, attach_lm
from offramp.measure.clock import environment
from offramp.measure.hardware import ceilings

PARTS = ("plain", "speculative", "transformers", "batch", "long")


def llama(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=args.vocabulary, hidden_size=args.width, num_hidden_layers=args.blocks, num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads, intermediate_size=args.inner, max_position_embeddings=16384,
        bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config).to(dtype).eval()
    model.generation_config.eos_token_id = None
    return model


def agreed_on(lm: LanguageModel, prompts: Sequence[Sequence[int]], new: int) -> float:
    """Share of the tokens that the model writes after prompts at which its exit says the same."""
    texts = generate(lm, prompts, Plain(), max_new_tokens=new, eos_token_id=[]).tokens
    whole = [[*p, *t] for p, t in zip(prompts, texts, strict=True)]
    return float(agreement(lm, whole, starts=[len(p) for p in prompts]).agreed[:, 0].float().mean())


def make_agree(lm: LanguageModel, wanted: float, prompts: Sequence[Sequence[int]], new: int, tries: int = 14) -> tuple[float, float]:
    """Scale what blocks behind the exit add until the exit agrees at ``wanted`` of the positions; the factor and the agreement reached.

    Texts change with the factor, so agreement falls with it only on the whole: of all factors tried, the nearest is kept.
    """
    added = [m for b in list(lm.model.model.layers)[lm.exits[0] :] for m in (b.self_attn.o_proj, b.mlp.down_proj)]
    original = [m.weight.detach().clone() for m in added]

    def scale(factor: float) -> None:
        with torch.no_grad():
            for m, weight in zip(added, original, strict=True):
                m.weight.copy_(weight * factor)

    low, high, seen = 0.0, 4.0, []
    for _ in range(tries):
        middle = (low + high) / 2
        scale(middle)
        seen.append((middle, agreed_on(lm, prompts, new)))
        low, high = (middle, high) if seen[-1][1] > wanted else (low, middle)
    best = min(seen, key=lambda s: abs(s[1] - wanted))
    scale(best[0])
    return best


class Bench:
    """The model, its captured decoders by rows and draft length, and what they wrote."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = getattr(torch, args.dtype)
        self.compiled = tuned(args.tuning, self.device)
        self.budget = Budget(args.minutes)
        with self.budget.part("model"):
            self.model = llama(args, self.device, self.dtype)
            self.lm = attach_lm(self.model, [args.exit])
        self.exact: nn.Module | None = None
        self.runs: dict[tuple[int, int], Rounds] = {}
        self.texts: dict[int, list[list[list[int]]]] = {}
        generator = torch.Generator().manual_seed(0)
        self.prompts: list[list[list[int]]] = [
            [[int(t) for t in p]] for p in torch.randint(3, args.vocabulary, (args.prompts, args.prompt), generator=generator)
        ]
        self.many = torch.randint(3, args.vocabulary, (max(args.rows), args.prompt), generator=generator).tolist()
        with self.budget.part("agree"):
            factor, reached = make_agree(self.lm, args.agree, [p[0] for p in self.prompts], min(args.new, 128))
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
        weights -= self.model.get_input_embeddings().weight.numel() * self.dtype.itemsize  # one row of it is read
        limit = ceilings(self.device, self.dtype)
        self.sheet = Sheet(
            args.out,
            {
                "benchmark": "decoding",
                "shape": {k: getattr(args, k) for k in ("blocks", "width", "heads", "kv_heads", "inner", "vocabulary")},
                "dtype": args.dtype, "exit": args.exit, "agreement": reached, "factor": factor, "prompt_tokens": args.prompt,
                "new_tokens": args.new, "prompts": args.prompts, "tuning": args.tuning, "weight_bytes": weights,
                "bandwidth_limit_tokens_per_s": 1e3 / limit.floor_ms(0, weights), "ceilings": limit.to_dict(),
                "environment": environment(self.device), "rows": [],
            },
            self.budget,
            same=("shape", "dtype", "exit", "agreement", "prompt_tokens", "new_tokens", "prompts", "tuning") if args.keep else (),
        )  # fmt: skip

    def run(self, rows: int, drafts: int, slots: int | None = None) -> Rounds | None:
        """A captured decoder, if there is time to make one."""
        if (rows, drafts) not in self.runs:
            name = f"capture: {rows} rows, {drafts} drafts"
            if not self.budget.fits(name, self.args.capture_guess):
                return None
            with self.budget.part(name):
                torch._dynamo.reset()
                slots = slots or self.args.prompt + self.args.new + 1
                made = Rounds(self.lm, rows, slots=slots, draft_length=drafts, compiled=self.compiled)
                made.graph()
            self.runs[rows, drafts] = made
        return self.runs[rows, drafts]

    def forget(self) -> None:
        """Free what was captured."""
        self.runs.clear()
        torch._dynamo.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def timed(self, run: Rounds, batches: Sequence[Sequence[Sequence[int]]]) -> dict[str, Any]:
        """Tokens per second of all rows together over some batches, what was kept of drafts, and the texts under ``written``."""
        written: dict[int, list[Any]] = {}

        def write(count: int) -> None:
            written[count] = [run.generate(b, count) for b in batches]

        found = rate(write, self.args.new, self.args.repeats, self.device)
        found["tokens_per_s"] *= sum(map(len, batches))
        done = written[self.args.new]
        kept, tried = sum(sum(g.accepted) for g in done), sum(sum(g.drafted) for g in done)
        if run.draft_length:
            lengths = [len(t) for g in done for t in g.tokens]
            found |= {"acceptance": kept / max(1, tried), "tokens_per_round": tokens_per_round(lengths, kept)}
        return {**found, "round_ms": round_ms(run, batches[0]), "written": [g.tokens for g in done]}

    def same_text(self, prompts: Sequence[Sequence[int]], one: Sequence[Sequence[int]], two: Sequence[Sequence[int]]) -> dict[str, Any]:
        if self.exact is None:
            self.exact = copy.deepcopy(self.model).float()
        return compare_texts(self.model, self.exact, prompts, one, two)

    # ---- parts -----------------------------------------------------------------------------------------------------------------

    def plain(self) -> None:
        run = self.run(1, 0)
        if run is None or not self.budget.fits("time: plain", 60):
            return
        with self.budget.part("time: plain"):
            found = self.timed(run, self.prompts)
            found["synchronisations"] = synchronisations(run, self.prompts[0], self.args.new // 2, self.args.new)
        self.texts[1] = found.pop("written")
        share = found["tokens_per_s"] / self.sheet.content["bandwidth_limit_tokens_per_s"]
        self.sheet.row(way="ours, plain", rows=1, drafts=0, of_bandwidth_limit=share, **found)

    def speculative(self) -> None:
        reference = self.run(1, 0)
        for drafts in self.args.drafts:
            run = self.run(1, drafts)
            if run is None or reference is None or not self.budget.fits("time: speculative", 40):
                continue
            with self.budget.part(f"time: speculative {drafts}"):
                found = self.timed(run, self.prompts)
                found["synchronisations"] = synchronisations(run, self.prompts[0], self.args.new // 2, self.args.new)
                if 1 not in self.texts:
                    self.texts[1] = [reference.generate(p, self.args.new).tokens for p in self.prompts]
                flat = [[t for batch in texts for t in batch] for texts in (self.texts[1], found.pop("written"))]
                found["against_plain"] = self.same_text([p[0] for p in self.prompts], *flat)
            share = found["tokens_per_s"] / self.sheet.content["bandwidth_limit_tokens_per_s"]
            self.sheet.row(way=f"ours, {drafts} drafts", rows=1, drafts=drafts, of_bandwidth_limit=share, **found)

    def transformers(self) -> None:
        options: dict[str, dict[str, Any]] = {
            "greedy": {},
            "assistant_early_exit": {"assistant_early_exit": self.args.exit},
            "prompt_lookup": {"prompt_lookup_num_tokens": 5},
        }
        prompts = [torch.tensor(p, device=self.device) for p in self.prompts[: self.args.peer_prompts]]
        for way, extra in options.items():
            if not self.budget.fits(f"transformers: {way}", 30):
                continue
            with self.budget.part(f"transformers: {way}"):

                def write(count: int, extra: dict[str, Any] = extra) -> list[Tensor]:
                    given: dict[str, Any] = {"do_sample": False, "max_new_tokens": count, "pad_token_id": 0, **extra}
                    return [self.model.generate(input_ids=p, attention_mask=torch.ones_like(p), **given) for p in prompts]

                found = rate(write, self.args.peer_new, self.args.peer_repeats, self.device)
                found["tokens_per_s"] *= len(prompts)
            self.sheet.row(way=f"transformers, {way}", rows=1, new_tokens=self.args.peer_new, prompts=len(prompts), **found)

    def batch(self) -> None:
        """Verify mode beside plain, fixed lengths and the planner's choice among them. The planner sees measured rounds and agreement."""
        whole = [[*p[0], *t] for p, t in self._own_texts()]
        seen = agreement(self.lm, whole, starts=[len(p[0]) for p in self.prompts])
        for rows in (r for r in self.args.rows if r > 1):
            self.forget()
            prompts = self.many[:rows]
            run = self.run(rows, 0)
            if run is None:
                continue
            with self.budget.part(f"time: plain {rows}"):
                base = self.timed(run, [prompts])
            texts = base.pop("written")[0]
            self.sheet.row(way="ours, plain", rows=rows, drafts=0, **base)
            known: dict[int, float] = {}
            speeds: dict[int, float] = {0: base["tokens_per_s"]}
            for drafts in self.args.batch_drafts:
                run = self.run(rows, drafts)
                if run is None or not self.budget.fits(f"time: verify {rows}", 30):
                    continue
                with self.budget.part(f"time: verify {rows}, {drafts}"):
                    found = self.timed(run, [prompts])
                    found["against_plain"] = self.same_text(prompts, texts, found.pop("written")[0])
                known[drafts], speeds[drafts] = found["round_ms"], found["tokens_per_s"]
                self.sheet.row(
                    way=f"ours, {drafts} drafts", rows=rows, drafts=drafts, over_plain=speeds[drafts] / speeds[0], **found
                )  # fmt: skip
            if known:
                self._planned(rows, base["round_ms"], known, Acceptance.of_runs(seen.by_text(0), max(known)), speeds)

    def _own_texts(self) -> list[tuple[list[list[int]], list[int]]]:
        """Every prompt with what the model writes after it."""
        flat = [p[0] for p in self.prompts]
        found = generate(self.lm, flat, Plain(), max_new_tokens=min(self.args.new, 128), eos_token_id=[]).tokens
        return list(zip(self.prompts, found, strict=True))

    def _planned(self, rows: int, full: float, known: dict[int, float], acceptance: Acceptance, speeds: dict[int, float]) -> None:
        """The planner's choice among the lengths that were captured; with none it is plain decoding itself."""
        times = Times(full, (candidate(0, self.args.exit, "shared", full, known),), rows, self.args.prompt, str(self.device))
        plan = choose(times, [acceptance], margin=self.args.margin)
        best = next((p for p in plan.predictions if p.draft_length in known), None)
        chosen = best.draft_length if best is not None and best.speedup > 1 + self.args.margin else 0
        self.sheet.row(
            way="ours, planner", rows=rows, drafts=chosen, tokens_per_s=speeds[chosen], over_plain=speeds[chosen] / speeds[0],
            predicted=best.speedup if chosen and best is not None else 1.0, margin=self.args.margin,
            predictions={p.draft_length: p.speedup for p in plan.predictions},
        )  # fmt: skip

    def long(self) -> None:
        """One long prompt: plain, then verified decoding with the first draft length, each by itself in memory."""
        length, new, self.exact = self.args.long, min(self.args.new, 128), None
        prompt = torch.randint(3, self.args.vocabulary, (1, length), generator=torch.Generator().manual_seed(1)).tolist()
        written: list[list[int]] | None = None
        for drafts in (0, self.args.drafts[0]):
            self.forget()
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            run = self.run(1, drafts, length + new + 1)
            if run is None:
                continue
            with self.budget.part(f"time: long {drafts}"):
                found = rate(partial(run.generate, prompt), new, max(1, self.args.repeats // 2), self.device)
                peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None
                last = run.generate(prompt, new)
                written = written if written is not None else last.tokens
                found |= {"round_ms": round_ms(run, prompt), "peak_bytes": peak, "cache_bytes": run.state.cache.bytes}
                found["prefill_s"] = seconds(lambda run=run: run.generate(prompt, 1), self.device)[0]
            name = f"ours, {drafts} drafts, long prompt" if drafts else "ours, plain, long prompt"
            self.sheet.row(
                way=name, rows=1, drafts=drafts, prompt_tokens=length, equal_to_plain=last.tokens == written,
                acceptance=last.acceptance if drafts else None, **found,
            )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"blocks": 22, "width": 2048, "heads": 32, "kv-heads": 4, "inner": 5632, "vocabulary": 32000}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--exit", type=int, default=4, help="after how many blocks")
    parser.add_argument("--agree", type=float, default=0.9)
    parser.add_argument("--drafts", type=numbers, default=[5, 7, 3], help="draft lengths at one row, the most telling first")
    parser.add_argument("--rows", type=numbers, default=[1, 8, 32])
    parser.add_argument("--batch-drafts", type=numbers, default=[3], help="draft lengths at more rows")
    parser.add_argument("--margin", type=float, default=0.1, help="gain that the planner asks for before it speculates")
    parser.add_argument("--prompts", type=int, default=8, help="texts at one row")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--long", type=int, default=8192, help="tokens of the long prompt")
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peer-prompts", type=int, default=2)
    parser.add_argument("--peer-new", type=int, default=64)
    parser.add_argument("--peer-repeats", type=int, default=3)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--minutes", type=float, default=8.5, help="budget of the whole call")
    parser.add_argument("--capture-guess", type=float, default=60, help="seconds that the first captured decoder is expected to take")
    parser.add_argument("--keep", action="store_true", help="keep rows that an earlier call with the same settings wrote to the same file")
    parser.add_argument("--out", required=True)
    tuning_argument(parser)
    args = parser.parse_args()
    asked = asked_parts(args.parts, PARTS)
    bench = Bench(args)
    print(f"budget {args.minutes:g} minutes for {', '.join(asked)}; agreement {bench.sheet.content['agreement']:.3f}", flush=True)
    run_parts({part: getattr(bench, part) for part in PARTS}, asked, bench.sheet)


if __name__ == "__main__":
    main()
