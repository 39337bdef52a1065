"""How exact decoding is: greedy texts token for token, sampled texts by their law, caches against a forward, rows against their mates.

A small Llama with random weights and prompts of Spec-Bench (random tokens where the data are not given). What is checked does not depend on
how well a model writes, but on how often drafts are right, so every system drafts in three ways: *good*, where the blocks behind the first
add little to what the exit sees; *bad*, where the exit says what it holds for least likely; *random*, where model and exit have nothing in
common. The result tells how many drafts were kept in each, so that nothing passes because nothing was tried.

- greedy: every system that drafts, in each way, by the reference engine and by rounds, batches of 8, 3 and 1 prompts in turn, of different
  lengths, against plain decoding and against transformers' own ``generate``. On a CPU a round is a plain call of what CUDA captures.
- sampling: Pearson's chi-square of all texts of a few tokens over a vocabulary of three, drawn through `offramp.compile`, against the exact
  chance of each, in which temperature and nucleus are transformers'. As a control, texts of the exit alone, which must fail.
- cache: keys and values after a text, tokens that left caught up with, against one forward of transformers over the text.
- mates: rows alone and in a batch of eight, greedy and sampled, for systems that draft, leave or follow a schedule.

Parts and cells that do not fit into the minutes are left out and named; ``--keep`` goes on where an earlier call ended. In float32 every
text must be equal, and a difference is told with its gap in float64; in bfloat16 differences are counted with their gaps in float32.

    python benchmarks/exactness.py --data FOLDER --out benchmarks/results/exactness_cpu.json
    python benchmarks/exactness.py --device cuda --dtype bfloat16 --engines rounds --out benchmarks/results/exactness_cuda.json
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torchvision_operators
from lm_common import Budget, Sheet, asked_parts, compare_texts, in_turn, run_parts, small_tokenizer, spec_bench, tokens_per_round
from torch import Tensor, nn

import offramp
from offramp import systems
from offramp.core.system import System
from offramp.engines.text.generate import exits, write
from offramp.engines.text.rows import Rows
from offramp.engines.text.sampling import Sampling
from offramp.language import LanguageModel, attach_lm
from offramp.measure.clock import environment
from offramp.policies.decoding import Accept, Copy, Plain, Scheduled, Verify, Way

PARTS = ("sampling", "cache", "mates", "greedy")
DRAFTS = ("good", "bad", "random")
ENGINES = ("reference", "rounds")
DRAFTING_FORM = ("self-supervised-early-exits",)
"""Systems that let tokens leave and whose exits draft here besides, as in `lm_systems.py`."""
SPREAD, WRITTEN = 3, 4
"""Tokens of the vocabulary that is sampled from, and of a text."""

# ---- models and systems --------------------------------------------------------------------------------------------------


def llama(vocabulary: int, blocks: int, width: int, positions: int = 512) -> Any:
    """A model of random weights that is sure of something else at every position, so that texts are no one token said again."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=blocks, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=positions, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_((1.0 if "lm_head" in name else 0.3) * torch.randn_like(parameter))
    return model


def damped(model: Any, share: float) -> Any:
    """A copy in which the blocks behind the first add this share of what they did: an early exit sees nearly what the last block leaves."""
    made = copy.deepcopy(model)
    with torch.no_grad():
        for block in made.model.layers[1:]:
            block.self_attn.o_proj.weight.mul_(share)
            block.mlp.down_proj.weight.mul_(share)
    return made


class Wrong(nn.Module):
    """A head turned around: it says what the head holds for least likely."""

    def __init__(self, head: Any) -> None:
        super().__init__()
        self.head, self.cached = head, head.cached

    def forward(self, *given: Any) -> Tensor:
        return -self.head(*given)

    def observe(self, *given: Any) -> None:
        self.head.observe(*given)


def drafting_systems() -> list[str]:
    """Language-model systems whose cards say lossless, and those that draft here besides."""
    cards = [systems.load_card(name) for name in systems.list_systems()]
    lossless = [c.name for c in cards if c.engine == "generate" and c.lossless]
    return [*lossless, *(n for n in DRAFTING_FORM if n not in lossless)]


def composed(name: str, blocks: int, new: int) -> System:
    """A system for a model of so many blocks."""
    given: dict[str, dict[str, Any]] = {
        "layerskip": {"blocks": blocks, "exit_after": 2},
        "free": {"blocks": blocks, "exit_after": 2},
        "skipdecode": {"blocks": blocks, "length": new},
    }
    return systems.build(name, **given.get(name, {}))


def drafting(system: System) -> Verify:
    """The system's drafts; of one that lets tokens leave, four from its first exit."""
    way = systems.way(system) if system.draft is not None else Verify(4)
    if not isinstance(way, Verify):
        raise SystemExit(f"{system.card.name} does not draft.")
    return way


def attached(model: Any, system: System, drafts: str) -> LanguageModel:
    """The system's exits, which draft as ``drafts`` says."""
    lm = attach_lm(model, system=system)
    if drafts == "bad":
        return LanguageModel(lm.decoder, lm.exits, [Wrong(h) for h in lm.heads])  # type: ignore[list-item]
    if drafts == "random":
        torch.manual_seed(1)
        with torch.no_grad():
            for p in lm.heads.parameters():
                p.add_(0.3 * torch.randn_like(p))
    return lm


def ragged(prompts: Sequence[Sequence[int]], most: int) -> list[list[int]]:
    """The last tokens of each prompt, from 1 to ``most`` of them, so that neighbours differ in length."""
    return [list(p[-(1 + 7 * k % most) :]) for k, p in enumerate(prompts)]


def between(scores: Tensor) -> float:
    """A threshold near the median of scores ``[N]``, in the middle of the widest gap there: rounding then decides about no token."""
    ordered = scores.double().sort().values
    near = ordered[len(ordered) // 3 : 2 * len(ordered) // 3 + 1]
    widest = int(near.diff().argmax())
    return float(near[widest : widest + 2].mean())


# ---- statistics ----------------------------------------------------------------------------------------------------------


def chi_square(counts: Tensor, chances: Tensor) -> dict[str, Any]:
    """Pearson's test of counts ``[N]`` against the chances ``[N]`` they should come from; cells that expect fewer than five are one.

    Returns:
        ``p``, ``statistic``, ``cells``, and ``impossible``: how often something happened that has no chance.
    """
    expected = chances.double() * float(counts.sum())
    impossible = int(counts[chances == 0].sum())
    rare = expected < 5
    cells = torch.cat([expected[~rare], expected[rare].sum()[None]])
    seen = torch.cat([counts[~rare], counts[rare].sum()[None]]).double()
    if float(cells[-1]) == 0:  # the rest cannot happen
        cells, seen = cells[:-1], seen[:-1]
    value = ((seen - cells).square() / cells).sum()
    p = torch.special.gammaincc(torch.tensor((len(cells) - 1) / 2, dtype=torch.float64), value / 2)
    return {"p": float(p) if not impossible else 0.0, "statistic": float(value), "cells": len(cells), "impossible": impossible}


def uniformity(values: Sequence[float]) -> float:
    """p-value of Kolmogorov and Smirnov's test that numbers in [0, 1] are uniform, by the limit law with Stephens' correction."""
    ordered, n = sorted(values), len(values)
    distance = max(max((k + 1) / n - v, v - k / n) for k, v in enumerate(ordered))
    scaled = (math.sqrt(n) + 0.12 + 0.11 / math.sqrt(n)) * distance
    if scaled < 0.2:
        return 1.0
    return min(1.0, 2 * sum((-1) ** (k - 1) * math.exp(-2 * (k * scaled) ** 2) for k in range(1, 101)))


@torch.no_grad()
def law(model: Any, prompt: Sequence[int], asked: dict[str, Any]) -> Tensor:
    """The chance ``[SPREAD ** WRITTEN]`` of every text, in the order of its digits, by one forward and transformers' own processing."""
    from transformers.generation.logits_process import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

    device = next(model.parameters()).device
    every = torch.cartesian_prod(*[torch.arange(SPREAD)] * WRITTEN).to(device)
    whole = torch.cat([torch.tensor([list(prompt)], device=device).expand(len(every), -1), every], 1)
    logits = model(whole, use_cache=False).logits[:, len(prompt) - 1 : -1].double()
    change = LogitsProcessorList()
    if "temperature" in asked:
        change.append(TemperatureLogitsWarper(asked["temperature"]))
    if "top_p" in asked:
        change.append(TopPLogitsWarper(asked["top_p"]))
    steps = [change(whole, logits[:, k]).softmax(-1) for k in range(WRITTEN)]
    return torch.stack(steps, 1).gather(-1, every[..., None]).squeeze(-1).prod(1).cpu()


# ---- what is measured ----------------------------------------------------------------------------------------------------


class Exactness:
    """The parts over one pair of models: one as it is, one whose exits are good."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.budget = args, Budget(args.minutes)
        self.device, self.dtype = torch.device(args.device), getattr(torch, args.dtype)
        self.wider = torch.float64 if args.dtype == "float32" else torch.float32
        self.compiled = None if args.compiled else False
        base = llama(args.vocabulary, args.blocks, args.width)
        made = {"random": base, "good": damped(base, args.damped)}
        self.models = {k: m.to(self.device, self.dtype) for k, m in made.items()}
        self.exact = {k: copy.deepcopy(m).to(self.wider) for k, m in self.models.items()}
        self.prompts = self._prompts()
        self.own: dict[str, list[list[int]]] = {}
        self.plain: dict[str, list[list[int]]] = {}
        content = {
            "benchmark": "exactness", "device": args.device, "dtype": args.dtype, "prompts": len(self.prompts), "new_tokens": args.new,
            "prompt_tokens": [min(map(len, self.prompts)), max(map(len, self.prompts))], "prompts_from": self.source,
            "shape": {"vocabulary": args.vocabulary, "blocks": args.blocks, "width": args.width, "damped": args.damped},
            "environment": environment(self.device), "rows": [],
        }  # fmt: skip
        same = ("benchmark", "device", "dtype", "prompts", "new_tokens", "prompts_from", "shape")
        self.sheet = Sheet(args.out, content, self.budget, same if args.keep else ())
        self.failures: list[str] = self.sheet.content.setdefault("failures", [])

    def _prompts(self) -> list[list[int]]:
        args = self.args
        path = Path(args.data) / "prompts" / "spec_bench.jsonl.xz" if args.data else None
        if path is None or not path.is_file():
            self.source = "random tokens"
            generator = torch.Generator().manual_seed(5)
            long = torch.randint(args.vocabulary, (args.prompts, args.longest), generator=generator).tolist()
        else:
            self.source = "Spec-Bench"
            tokenizer = small_tokenizer(Path(args.data) / "tokenizer", args.vocabulary)
            found = spec_bench(path, lambda t: tokenizer.encode(t).ids, args.longest)
            long = [p.tokens for p in in_turn(found)][: args.prompts]
        return ragged(long, args.longest)

    def model(self, drafts: str) -> str:
        return "random" if drafts == "random" else "good"

    def judge(self, what: str, met: bool) -> None:
        """Note what was not as it must be; the command then fails in the end."""
        self.failures[:] = [f for f in self.failures if f != what] + ([] if met else [what])

    # Greedy -------------------------------------------------------------------------------------------------------------------

    def baselines(self, kind: str) -> None:
        """What transformers and our plain decoding write with a model."""
        if kind in self.own:
            return
        model, new = self.models[kind], self.args.new
        with self.budget.part(f"transformers: {kind}"):
            texts: list[list[int]] = []
            for start in range(0, len(self.prompts), 8):
                rows = [torch.tensor(p, device=self.device) for p in self.prompts[start : start + 8]]
                ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")
                mask = nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], batch_first=True, padding_side="left")
                done = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0)
                texts += done[:, ids.shape[1] :].tolist()
            self.own[kind] = texts
        with self.budget.part(f"plain: {kind}"):
            self.plain[kind] = self.write(offramp.compile(attach_lm(model, [1]), Plain(), captured=False), [8])[0]
        distinct = sum(len(set(t)) for t in texts) / len(texts)
        self.sheet.content.setdefault("distinct_tokens_of_a_text", {})[kind] = distinct

    def write(self, writer: Any, sizes: Sequence[int]) -> tuple[list[list[int]], list[int], list[int]]:
        """Greedy texts behind all prompts in batches of these sizes in turn; drafts tried and kept by place."""
        texts: list[list[int]] = []
        tried, kept = [0], [0]
        size = itertools.cycle(sizes)
        while len(texts) < len(self.prompts):
            batch = self.prompts[len(texts) : len(texts) + next(size)]
            done = writer.generate(batch, max_new_tokens=self.args.new, do_sample=False, eos_token_id=[])
            texts += done.tokens
            tried = [a + b for a, b in itertools.zip_longest(tried, done.drafted, fillvalue=0)]
            kept = [a + b for a, b in itertools.zip_longest(kept, done.accepted, fillvalue=0)]
        return texts, tried, kept

    def greedy(self) -> None:
        cells = itertools.product(self.args.batch, self.args.engines, ["plain", *drafting_systems()], DRAFTS)
        done = {(str(r["rows"]), r["engine"], r["system"], r["drafts"]) for r in self.sheet.content["rows"]}
        for rows, engine, name, drafts in cells:
            if (rows, engine, name, drafts) not in done and not (name == "plain" and drafts == "bad"):
                self.cell(rows, engine, name, drafts)

    def cell(self, rows: str, engine: str, name: str, drafts: str) -> None:
        label = f"greedy {rows} {engine} {drafts}: {name}"
        sizes = [int(n) for n in rows.split("+")]
        if not self.budget.fits(label, self.args.guess * len(sizes) / sum(sizes)):
            return
        kind = self.model(drafts)
        self.baselines(kind)
        if name == "plain":
            lm, way = attach_lm(self.models[kind], [1]), Plain()
        else:
            system = composed(name, self.args.blocks, self.args.new)
            lm, way = attached(self.models[kind], system, drafts), drafting(system)
            if drafts != "good":
                way = replace(way, draft_length=min(way.draft_length, self.args.shorter))
        with self.budget.part(label):
            writer = offramp.compile(lm, way, captured=engine == "rounds", compiled=self.compiled)
            texts, tried, kept = self.write(writer, sizes)
        found = {
            "way": f"{engine}, {drafts} drafts", "rows": rows, "system": name, "engine": engine, "drafts": drafts,
            "draft_length": way.draft_length if isinstance(way, Verify) else 0, "tokens": sum(map(len, texts)),
            "drafted": tried, "accepted": kept, "acceptance": sum(kept) / max(1, sum(tried)),
            "tokens_per_round": tokens_per_round([len(t) for t in texts], sum(kept)),
        }  # fmt: skip
        for beside, those in (("against_plain", self.plain), ("against_transformers", self.own)):
            compared = compare_texts(self.models[kind], self.exact[kind], self.prompts, those[kind], texts)
            found[beside] = compared
            met = compared["equal"] == compared["texts"] if self.dtype == torch.float32 else not compared["not_near_ties"]
            self.judge(f"{label}, {beside.replace('_', ' ')}", met)
        self.sheet.row(**found)

    # Sampling -----------------------------------------------------------------------------------------------------------------

    def sampling(self) -> None:
        model = llama(SPREAD, 3, 16).to(self.device, torch.float32)
        with torch.no_grad():  # three tokens: none nearly sure, or few drafts would be tried at all
            model.lm_head.weight.mul_(0.35)
        prompt, draws, seeds = [1, 0], self.args.draws, itertools.count(0, self.args.draws)
        digits = SPREAD ** torch.arange(WRITTEN - 1, -1, -1)
        found: list[dict[str, Any]] = []
        for asked in ({"top_k": 0}, {"top_k": 0, "temperature": 0.7, "top_p": 0.8}):
            chances = law(model, prompt, asked)

            def test(
                lm: LanguageModel, way: Way, engine: str, asked: dict[str, Any] = asked, chances: Tensor = chances, **said: Any
            ) -> dict[str, Any]:
                writer = offramp.compile(lm, way, captured=engine == "rounds", compiled=self.compiled, max_rows=draws)
                done = writer.generate([prompt] * draws, max_new_tokens=WRITTEN, do_sample=True, eos_token_id=[], seed=next(seeds), **asked)
                counts = torch.bincount((torch.tensor(done.tokens) * digits).sum(1), minlength=SPREAD**WRITTEN)
                return {**said, "engine": engine, "asked": asked, "acceptance": done.acceptance, **chi_square(counts, chances)}

            for name in drafting_systems():
                system = systems.build("layerskip", blocks=3, exit_after=1) if name == "layerskip" else systems.build(name)
                lm, way = attached(model, system, "random"), drafting(system)
                for sample_drafts, engine in itertools.product((True, False), self.args.engines):
                    label = f"sampling: {name}, {'sampled' if sample_drafts else 'likeliest'} drafts, {engine}"
                    if not self.budget.fits(label, 2.0 * self.args.repeats):
                        continue
                    how = replace(way, sample_drafts=sample_drafts)
                    with self.budget.part(label):
                        for _ in range(self.args.repeats):
                            found.append(test(lm, how, engine, system=name, sample_drafts=sample_drafts))
            lm = attached(model, composed("layerskip", 3, WRITTEN), "random")
            control = test(lm, Accept(0.0, exits=(0,)), "reference", system="control: the exit's own words")
            self.sheet.content.setdefault("control", []).append(control)
            self.judge(f"sampling: the control is told apart {asked}", control["p"] < 1e-6)
        values = [f["p"] for f in found]
        tests = {
            "draws": draws, "tests": len(values), "vocabulary": SPREAD, "tokens": WRITTEN, "lowest_p": min(values, default=1.0),
            "lowest_p_corrected": min(1.0, len(values) * min(values, default=1.0)), "uniformity_p": uniformity(values) if values else None,
            "below_0.05": sum(v < 0.05 for v in values), "rows": found,
        }  # fmt: skip
        self.sheet.content["sampling"] = tests
        self.judge("sampling: chi-square", tests["lowest_p_corrected"] > 0.001 and (not values or tests["uniformity_p"] > 0.001))
        print({k: v for k, v in tests.items() if k != "rows"}, flush=True)

    # Caches -------------------------------------------------------------------------------------------------------------------

    def ways(self, model: Any) -> list[tuple[str, LanguageModel, Way]]:
        """Every language-model system with a way of writing in which some tokens leave or some drafts are kept."""
        found: list[tuple[str, LanguageModel, Way]] = []
        for name in systems.list_systems():
            if systems.load_card(name).engine != "generate":
                continue
            system = composed(name, self.args.blocks, self.args.new)
            lm = attach_lm(model, system=system)
            if system.draft is not None or isinstance(system.fill, Scheduled):
                found.append((name, lm, systems.way(system)))
                continue
            # Random weights are never as sure as a published threshold wants: about half of the tokens leave here.
            rule = Accept(math.inf, system.rule, system.fill)  # type: ignore[arg-type]
            scores = offramp.compile(lm, rule).generate(self.prompts[:4], max_new_tokens=16, do_sample=False, eos_token_id=[]).scores
            threshold = between(torch.tensor(scores)[:, 1:].flatten())
            found.append((name, lm, Accept(threshold, system.rule, system.fill)))  # type: ignore[arg-type]
            if name in DRAFTING_FORM:
                found.append((f"{name}, drafting", lm, Verify(4)))
        return found

    def cache(self) -> None:
        out = []
        model, texts = self.models["good"], self.prompts[:8]
        for name, lm, way in self.ways(model):
            if isinstance(way, Scheduled) or (isinstance(way, Accept) and isinstance(way.fill, Copy)):
                continue  # fewer blocks, copied keys and values: not the full model's, and they say so
            spare = way.draft_length if isinstance(way, Verify) else 0
            rows = Rows(lm, texts, self.args.new, Sampling(), list(range(len(texts))), (), exits(lm, way), spare)
            with self.budget.part(f"cache: {name}"), torch.inference_mode():
                write(rows, way)
                done = rows.done()
                largest = relative = 0.0
                for row, text in enumerate(texts):
                    whole = torch.tensor([[*text, *done.tokens[row]]], device=self.device)[:, :-1]  # no block has seen the newest token
                    layers = model(whole, use_cache=True).past_key_values.layers
                    for block, layer in enumerate(layers):
                        for mine, theirs in zip(rows.cache.read(block, whole.shape[1]), (layer.keys, layer.values), strict=True):
                            off = float((mine[row].float() - theirs[0].float()).abs().max())
                            largest, relative = max(largest, off), max(relative, off / float(theirs.float().std()))
            early = sum(d < len(lm.decoder) for r in done.depth for d in r)
            found = {
                "system": name,
                "way": type(way).__name__,
                "largest_difference": largest,
                "over_spread": relative,
                "early_tokens": early,
            }
            out.append({**found, "tokens": sum(map(len, done.tokens))})
            self.judge(f"cache: {name}", relative < (1e-4 if self.dtype == torch.float32 else 0.1) and early > 0)
            print(out[-1], flush=True)
            self.sheet.content["cache"] = out
            self.sheet.write()

    # Batch mates --------------------------------------------------------------------------------------------------------------

    def mates(self) -> None:
        out = []
        texts = self.prompts[:8]
        for (name, lm, way), sampled in itertools.product(self.ways(self.models["good"]), (False, True)):
            writer = offramp.compile(lm, way, captured="rounds" in self.args.engines and self.device.type == "cuda", compiled=self.compiled)
            asked: dict[str, Any] = {"max_new_tokens": self.args.new, "do_sample": sampled, "eos_token_id": []}
            with self.budget.part(f"mates: {name}, {'sampled' if sampled else 'greedy'}"):
                together = writer.generate(texts, seed=100, **asked)
                alone = [writer.generate([t], seed=100 + k, **asked) for k, t in enumerate(texts)]
            equal = sum(a.tokens[0] == t and a.depth[0] == d for a, t, d in zip(alone, together.tokens, together.depth, strict=True))
            counts = {
                key: [list(map(sum, zip(*(getattr(a, key) for a in alone), strict=True))), getattr(together, key)]
                for key in ("drafted", "accepted")
            }
            for key in ("audited", "disagreed"):
                counts[key] = [[sum(getattr(a, key) for a in alone)], [getattr(together, key)]]
            same = all(a == b for a, b in counts.values())
            out.append(
                {"system": name, "way": type(way).__name__, "sampled": sampled, "rows": len(texts), "equal": equal, "counts": counts}
            )
            self.judge(f"mates: {name}, sampled {sampled}", self.dtype != torch.float32 or (equal == len(texts) and same))
            print({k: v for k, v in out[-1].items() if k != "counts"}, "counts equal" if same else counts, flush=True)
            self.sheet.content["mates"] = out
            self.sheet.write()


def batches(given: str) -> list[str]:
    """Sizes of batches with commas between, a plus between those that take turns."""
    found = given.split(",")
    if any(int(n) < 1 for sizes in found for n in sizes.split("+")):
        raise ValueError(given)
    return found


def measure(args: argparse.Namespace) -> None:
    torchvision_operators.provide()
    run = Exactness(args)
    parts = {"sampling": run.sampling, "cache": run.cache, "mates": run.mates, "greedy": run.greedy}
    run_parts(parts, asked_parts(args.parts, PARTS), run.sheet)
    rows = run.sheet.content["rows"]
    kept = {d: [r["acceptance"] for r in rows if r["drafts"] == d and r["system"] != "plain"] for d in DRAFTS}
    run.sheet.content["acceptance"] = {d: [min(v), max(v)] for d, v in kept.items() if v}
    run.sheet.write()
    equal = [sum(r[b]["equal"] for r in rows) for b in ("against_plain", "against_transformers")]
    print(f"greedy: {len(rows)} cells, {sum(r['against_plain']['texts'] for r in rows)} texts; equal to plain and to transformers: {equal}")
    print(f"acceptance, least and most: {run.sheet.content['acceptance']}")
    if run.failures:
        raise SystemExit(f"Not exact: {'; '.join(run.failures)}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with prompts/ and tokenizer/; without it prompts are random tokens")
    parser.add_argument("--out", default="exactness.json")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--minutes", type=float, default=6.0, help="budget of this call")
    parser.add_argument("--keep", action="store_true", help="go on with the cells that an earlier call left out")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--engines", type=lambda given: asked_parts(given, ENGINES), default=list(ENGINES))
    parser.add_argument("--batch", type=batches, default=["8+3+1"], help="prompts at a time: 8+3+1 in turn, 8,3,1 all of them each")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--new", type=int, default=64, help="tokens of a text")
    parser.add_argument("--longest", type=int, default=24, help="tokens of a prompt; they go from 1 to this many")
    for name, value in {"vocabulary": 512, "blocks": 4, "width": 32}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--damped", type=float, default=0.03, help="what blocks behind the first add where drafts are good")
    parser.add_argument("--shorter", type=int, default=3, help="most drafts of a round where hardly any is kept")
    parser.add_argument("--draws", type=int, default=3000, help="texts of a chi-square test")
    parser.add_argument("--repeats", type=int, default=3, help="chi-square tests of each kind, with other seeds")
    parser.add_argument(
        "--compiled", action="store_true", help="let the compiler at captured rounds on CUDA, which takes a while for each cell"
    )
    parser.add_argument("--guess", type=float, default=60.0, help="seconds that a cell of batch 1 is expected to take before one was run")
    measure(parser.parse_args())


if __name__ == "__main__":
    main()
