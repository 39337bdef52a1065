"""Tokens per second of language-model decoding: ours, plain and speculative, beside transformers' own ways, in one run.

Weights are random in the shape asked for: this measures time. For speculation the blocks behind the exit are made to matter less, by one
factor on what they add, found by bisection, until the exit's most likely token is the model's at the wanted share of positions of texts
that the model itself writes after the prompts that are timed. All ways decode that same model from the same prompts, greedily; each is
timed over whole texts, prompt included, and the prompt's own time is taken off by runs of one token. The bandwidth limit is every weight
read once a token at the memory bandwidth measured on this machine.

Parts, each written when it is done, and left out (named in the result) when the budget of time has no room for it any more:

    plain          rows 1
    speculative    rows 1, each draft length, and chosen before each round; whether the text is the plain one's; synchronisations counted
    transformers   greedy, assistant_early_exit, prompt lookup
    batch          more rows: plain, each draft length, and the length chosen before each round from measured times and what was kept
    long           a prompt of 8k tokens: speed and peak memory of plain and verified decoding
    tuning         only if asked for: a plain step and a round under each of ``--tunings``, and how long each took to compile

    python benchmarks/decoding.py --out benchmarks/results/decoding_llama_1b_h100.json
"""

from __future__ import annotations

import argparse
import copy
import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lm_common import (
    Budget,
    Sheet,
    asked_parts,
    compare_texts,
    fixed,
    numbers,
    rate,
    rates,
    round_ms,
    run_parts,
    seconds,
    synchronisations,
    tokens_per_round,
    tuned,
    tuning_argument,
)
from torch import Tensor, nn

from offramp.engines.text.agreement import agreement
from offramp.engines.text.draft_lengths import LengthChoice
from offramp.engines.text.generate import generate
from offramp.engines.text.rounds import Rounds
from offramp.engines.text.written import Generation
from offramp.language import LanguageModel, attach_lm
from offramp.measure.clock import environment
from offramp.measure.hardware import ceilings
from offramp.policies.decoding import Plain

PARTS = ("plain", "speculative", "transformers", "batch", "long", "tuning")


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


def make_agree(lm: LanguageModel, wanted: float, prompts: Sequence[Sequence[int]], new: int, tries: int = 12) -> tuple[float, float]:
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


@dataclass(frozen=True)
class Way:
    """A captured decoder and how it chooses the draft length of a round."""

    run: Rounds
    choice: LengthChoice


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
        self.runs: dict[tuple[int, tuple[int, ...]], Rounds] = {}
        self.captured: set[tuple[int, int]] = set()
        generator = torch.Generator().manual_seed(0)
        self.prompts: list[list[list[int]]] = [
            [[int(t) for t in p]] for p in torch.randint(3, args.vocabulary, (args.prompts, args.prompt), generator=generator)
        ]
        self.many = torch.randint(3, args.vocabulary, (max(args.rows), args.prompt), generator=generator).tolist()
        with self.budget.part("agree"):
            factor, reached = make_agree(self.lm, args.agree, [p[0] for p in self.prompts], min(args.new, 64))
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
        weights -= self.model.get_input_embeddings().weight.numel() * self.dtype.itemsize  # one row of it is read
        limit = ceilings(self.device, self.dtype)
        self.sheet = Sheet(
            args.out,
            {
                "benchmark": "decoding",
                "shape": {k: getattr(args, k) for k in ("blocks", "width", "heads", "kv_heads", "inner", "vocabulary")},
                "dtype": args.dtype, "exit": args.exit, "agree": args.agree, "agreement": reached, "factor": factor,
                "prompt_tokens": args.prompt,
                "new_tokens": args.new, "prompts": args.prompts, "tuning": args.tuning, "weight_bytes": weights,
                "bandwidth_limit_tokens_per_s": 1e3 / limit.floor_ms(0, weights), "ceilings": limit.to_dict(),
                "environment": environment(self.device), "rows": [],
            },
            self.budget,
            same=("shape", "dtype", "exit", "agree", "prompt_tokens", "new_tokens", "prompts", "tuning") if args.keep else (),
        )  # fmt: skip

    def run(self, rows: int, lengths: Sequence[int], slots: int | None = None) -> Rounds:
        """A decoder for these draft lengths, nothing captured yet."""
        key = (rows, tuple(lengths))
        if key not in self.runs:
            torch._dynamo.reset()
            slots = slots or self.args.prompt + self.args.new + 1
            self.runs[key] = Rounds(self.lm, rows, slots=slots, draft_length=lengths, compiled=self.compiled)
        return self.runs[key]

    def ready(self, run: Rounds, drafts: int) -> bool:
        """Whether a round of so many drafts is captured, or could be in the time that is left."""
        key = (id(run), drafts)
        name = f"capture: {run.state.count} rows, {drafts} drafts of {run.lengths}"
        if key not in self.captured and self.budget.fits(name, self.args.capture_guess):
            with self.budget.part(name):
                run.graph(drafts)
            self.captured.add(key)
        return key in self.captured

    def forget(self) -> None:
        """Free what was captured."""
        self.runs.clear()
        self.captured.clear()
        torch._dynamo.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def timed(self, ways: Mapping[str, Way], batches: Sequence[Sequence[Sequence[int]]]) -> dict[str, dict[str, Any]]:
        """Tokens per second of all rows together over some batches, all ways in turn; what was kept of drafts; texts as ``written``."""
        texts: dict[str, list[Generation]] = {}

        def write(name: str, count: int) -> None:
            done = [ways[name].run.generate(b, count, choice=ways[name].choice) for b in batches]
            if count == self.args.new:
                texts[name] = done

        found = rates({name: partial(write, name) for name in ways}, self.args.new, self.args.repeats, self.device)
        for name, taken in found.items():
            done = texts[name]
            taken["tokens_per_s"] *= sum(map(len, batches))
            kept, tried = sum(sum(g.accepted) for g in done), sum(sum(g.drafted) for g in done)
            if ways[name].run.draft_length:
                lengths = [len(t) for g in done for t in g.tokens]
                taken |= {"acceptance": kept / max(1, tried), "tokens_per_round": tokens_per_round(lengths, kept)}
            taken["written"] = [t for g in done for t in g.tokens]
        return found

    def same_text(self, prompts: Sequence[Sequence[int]], one: Sequence[Sequence[int]], two: Sequence[Sequence[int]]) -> dict[str, Any]:
        if self.exact is None:
            self.exact = copy.deepcopy(self.model).float()
        return compare_texts(self.model, self.exact, prompts, one, two)

    # ---- parts -----------------------------------------------------------------------------------------------------------------

    def plain(self) -> None:
        way = Way(self.run(1, [0]), fixed(0))
        if not self.ready(way.run, 0) or not self.budget.fits("time: plain", 25):
            return
        with self.budget.part("time: plain"):
            self._row("ours, plain", way, self.timed({"": way}, self.prompts)[""], None)

    def speculative(self) -> None:
        """Every draft length, and the length chosen before each round by what the texts show, in turn with plain decoding."""
        plain, run = self.run(1, [0]), self.run(1, sorted({0, *self.args.drafts}))
        if not self.ready(plain, 0):
            return
        times = {k: round_ms(run, self.prompts[0], k) for k in (*self.args.drafts, 0) if self.ready(run, k)}
        ways = {"ours, plain": Way(plain, fixed(0)), **{f"ours, {k} drafts": Way(run, fixed(k)) for k in times if k}}
        if len(times) > 1:
            ways["ours, length by round"] = Way(run, LengthChoice.of(times, self.sheet.content["agreement"]))
        with self.budget.part("time: speculative"):
            found = self.timed(ways, self.prompts)
        base = found["ours, plain"]
        for name, way in ways.items():
            self._row(name, way, found[name], None if name == "ours, plain" else base)

    def _row(self, name: str, way: Way, found: dict[str, Any], base: dict[str, Any] | None) -> None:
        """A row of the part with one text at a time, its waits counted and its texts compared with those of ``base``."""
        waits = synchronisations(way.run, self.prompts[0], self.args.new // 2, self.args.new, way.choice)
        length = way.choice.lengths[0] if len(way.choice.lengths) == 1 else None
        extra: dict[str, Any] = {} if length is None else {"round_ms": round_ms(way.run, self.prompts[0], length)}
        if base is not None:
            extra["against_plain"] = self.same_text([p[0] for p in self.prompts], base["written"], found["written"])
        measured = {k: v for k, v in found.items() if k != "written"}
        self.sheet.row(way=name, rows=1, of_bandwidth_limit=self._of_limit(found), synchronisations=waits, **extra, **measured)

    def _of_limit(self, found: dict[str, Any]) -> float:
        return float(found["tokens_per_s"] / self.sheet.content["bandwidth_limit_tokens_per_s"])

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
        """Verified drafts beside plain decoding: fixed lengths, and the length chosen before each round, plain among them."""
        for rows in (r for r in self.args.rows if r > 1):
            self.forget()
            prompts, plain = self.many[:rows], self.run(rows, [0])
            if not self.ready(plain, 0):
                continue
            run = self.run(rows, sorted({0, *self.args.batch_drafts}))
            times = {k: round_ms(run, prompts, k) for k in (*self.args.batch_drafts, 0) if self.ready(run, k)}
            ways = {"ours, plain": Way(plain, fixed(0)), **{f"ours, {k} drafts": Way(run, fixed(k)) for k in times if k}}
            if len(times) > 1:
                ways["ours, length by round"] = Way(run, LengthChoice.of(times, self.sheet.content["agreement"]))
            with self.budget.part(f"time: {rows} rows"):
                found = self.timed(ways, [prompts])
            base = found["ours, plain"]
            for name in ways:
                extra: dict[str, Any] = {"round_ms": round_ms(plain, prompts, 0)} if name == "ours, plain" else {"round_times_ms": times}
                if name != "ours, plain":
                    extra["against_plain"] = self.same_text(prompts, base["written"], found[name]["written"])
                over = found[name]["tokens_per_s"] / base["tokens_per_s"]
                self.sheet.row(way=name, rows=rows, over_plain=over, **extra, **{k: v for k, v in found[name].items() if k != "written"})

    def tuning(self) -> None:
        """Milliseconds of a plain step and of a round under other settings of the compiler, in ``tunings`` of the result."""
        found = self.sheet.content.setdefault("tunings", {})
        for given in self.args.tunings.split(","):
            for drafts in (0, self.args.drafts[0]):
                name = f"tuning: {given or 'default'}, {drafts} drafts"
                if not self.budget.fits(name, 2 * self.args.capture_guess):
                    continue
                self.forget()
                with self.budget.part(name):
                    compiled = tuned(given.replace("+", ","), self.device)
                    run = Rounds(self.lm, 1, slots=self.args.prompt + self.args.new + 1, draft_length=drafts, compiled=compiled)
                    taken, _ = seconds(run.graph, self.device)
                    ms = round_ms(run, self.prompts[0], drafts)
                found.setdefault(given or "default", {})[str(drafts)] = {"round_ms": ms, "capture_s": taken}
                print(f"{name}: {ms:.4f} ms, captured in {taken:.1f} s", flush=True)
                self.sheet.write()

    def long(self) -> None:
        """One long prompt: plain, then verified decoding with the first draft length, each by itself in memory."""
        length, new, self.exact = self.args.long, min(self.args.new, 128), None
        prompt = torch.randint(3, self.args.vocabulary, (1, length), generator=torch.Generator().manual_seed(1)).tolist()
        written: list[list[int]] | None = None
        for drafts in (0, self.args.drafts[0]):
            self.forget()
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            run = self.run(1, [drafts], length + new + 1)
            if not self.ready(run, drafts):
                continue
            with self.budget.part(f"time: long {drafts}"):
                found = rate(partial(run.generate, prompt), new, max(1, self.args.repeats // 2), self.device)
                peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None
                last = run.generate(prompt, new)
                written = written if written is not None else last.tokens
                found |= {"round_ms": round_ms(run, prompt, drafts), "peak_bytes": peak, "cache_bytes": run.state.cache.bytes}
                found["prefill_s"] = seconds(lambda run=run: run.generate(prompt, 1), self.device)[0]
            name = f"ours, {drafts} drafts, long prompt" if drafts else "ours, plain, long prompt"
            self.sheet.row(
                way=name, rows=1, prompt_tokens=length, equal_to_plain=last.tokens == written,
                acceptance=last.acceptance if drafts else None, **found,
            )  # fmt: skip


def expected_seconds(args: argparse.Namespace, asked: Sequence[str]) -> dict[str, float]:
    """What parts will take on a GPU: captures, which are most of it, and timing."""
    more = sum(r > 1 for r in args.rows)
    captures = {"plain": 1, "speculative": len(args.drafts) + 1, "batch": more * (len(args.batch_drafts) + 2), "long": 2}
    captures["tuning"] = 4 * len(args.tunings.split(","))
    timing = {"plain": 25.0, "speculative": 60.0, "transformers": 40.0, "batch": 15.0 * more, "long": 20.0, "tuning": 0.0}
    return {part: captures.get(part, 0) * args.capture_guess + timing[part] for part in PARTS if part in asked}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"blocks": 22, "width": 2048, "heads": 32, "kv-heads": 4, "inner": 5632, "vocabulary": 32000}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--exit", type=int, default=4, help="after how many blocks")
    parser.add_argument("--agree", type=float, default=0.9)
    parser.add_argument("--drafts", type=numbers, default=[5, 7], help="draft lengths at one row, the most telling first")
    parser.add_argument("--rows", type=numbers, default=[1, 8, 32])
    parser.add_argument("--batch-drafts", type=numbers, default=[3], help="draft lengths at more rows")
    parser.add_argument("--prompts", type=int, default=8, help="texts at one row")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--long", type=int, default=8192, help="tokens of the long prompt")
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peer-prompts", type=int, default=2)
    parser.add_argument("--peer-new", type=int, default=64)
    parser.add_argument("--peer-repeats", type=int, default=3)
    parser.add_argument("--parts", default=",".join(PARTS[:-1]))
    parser.add_argument("--tunings", default=",coordinate_descent,coordinate_descent+combo_kernels,max_autotune", help="for that part")
    parser.add_argument("--minutes", type=float, default=8.5, help="budget of the whole call")
    parser.add_argument("--capture-guess", type=float, default=40, help="seconds that a captured round is expected to take to compile")
    parser.add_argument("--keep", action="store_true", help="keep rows that an earlier call with the same settings wrote to the same file")
    parser.add_argument("--out", required=True)
    tuning_argument(parser)
    args = parser.parse_args()
    asked = asked_parts(args.parts, PARTS)
    expected = expected_seconds(args, asked)
    print(f"expected seconds: {expected}, {sum(expected.values()):.0f} of {60 * args.minutes:.0f}", flush=True)
    bench = Bench(args)
    print(f"budget {args.minutes:g} minutes for {', '.join(asked)}; agreement {bench.sheet.content['agreement']:.3f}", flush=True)
    run_parts({part: getattr(bench, part) for part in PARTS}, asked, bench.sheet)


if __name__ == "__main__":
    main()
