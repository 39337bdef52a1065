"""Tokens per second of language-model decoding: ours, plain and speculative, beside transformers' own ways, in one run.

Weights are random in the shape asked for: this measures time. For speculation the blocks behind the exit are made to matter less, by one
factor on what they add, found by bisection, until the exit's most likely token is the model's at the wanted share of positions. All ways
decode that same model from the same prompts, greedily; each is timed over whole texts, prompt included, and the prompt's own time is taken
off by a run of one token. The floor is every weight read once a token at the memory bandwidth measured on this machine.

    python benchmarks/decoding.py --out benchmarks/results/decoding_llama_1b_h100.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from offramp.core.bundle import write_json
from offramp.engines.rounds import Rounds
from offramp.language import LanguageModel, attach_lm
from offramp.measure.clock import environment
from offramp.measure.hardware import ceilings


def llama(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=args.vocabulary, hidden_size=args.width, num_hidden_layers=args.blocks, num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads, intermediate_size=args.inner, max_position_embeddings=4096,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config).to(dtype).eval()
    model.generation_config.eos_token_id = None
    return model


def agreement(lm: LanguageModel, tokens: Tensor) -> float:
    """Share of positions of some texts ``[B, T]`` at which the first exit's most likely token is the model's."""
    model = lm.decoder
    step = model.step(model.cache(*tokens.shape), torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens))
    with torch.inference_mode():
        early = model.run(model.embed(tokens, step), 0, lm.exits[0], step)
        late = model.run(early, lm.exits[0], len(model), step)
        return float((lm.draft(early).argmax(-1) == model.logits(late).argmax(-1)).float().mean())


def make_agree(lm: LanguageModel, wanted: float, tokens: Tensor) -> float:
    """Scale what blocks behind the exit add until the exit agrees at ``wanted`` of the positions. Returns the agreement reached."""
    added = [m for b in list(lm.model.model.layers)[lm.exits[0] :] for m in (b.self_attn.o_proj, b.mlp.down_proj)]
    original = [m.weight.detach().clone() for m in added]

    def scaled(factor: float) -> float:
        with torch.no_grad():
            for m, weight in zip(added, original, strict=True):
                m.weight.copy_(weight * factor)
        return agreement(lm, tokens)

    low, high = 0.0, 4.0
    for _ in range(18):
        middle = (low + high) / 2
        low, high = (middle, high) if scaled(middle) > wanted else (low, middle)
    return scaled(low)


def rate(write: Callable[[int], Any], new: int, repeats: int, sync: Callable[[], None]) -> dict[str, Any]:
    """Tokens per second after the first: whole texts less texts of one token, medians of runs in turn."""
    samples: dict[int, list[float]] = {new: [], 1: []}
    for _ in range(repeats + 1):
        for count, times in samples.items():
            sync()
            start = time.perf_counter()
            write(count)
            sync()
            times.append(time.perf_counter() - start)
    whole, one = (statistics.median(times[1:]) for times in samples.values())
    return {"tokens_per_s": (new - 1) / (whole - one), "whole_s": whole, "prompt_s": one, "samples_s": samples[new][1:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"blocks": 22, "width": 2048, "heads": 32, "kv-heads": 4, "inner": 5632, "vocabulary": 32000}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--exit", type=int, default=4)
    parser.add_argument("--agree", type=float, default=0.9)
    parser.add_argument("--drafts", default="3,5,7")
    parser.add_argument("--rows", default="1")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peers", default="greedy,assistant_early_exit,prompt_lookup")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, args.dtype)

    def sync() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    model = llama(args, device, dtype)
    lm = attach_lm(model, [args.exit])
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(3, args.vocabulary, (8, 256), generator=generator).to(device)
    agreed = make_agree(lm, args.agree, texts)
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) - model.get_input_embeddings().weight.numel() * dtype.itemsize
    limit = ceilings(device, dtype)
    done: dict[str, Any] = {
        "shape": {k: getattr(args, k) for k in ("blocks", "width", "heads", "kv_heads", "inner", "vocabulary")},
        "dtype": args.dtype, "exit": args.exit, "agreement": agreed, "prompt_tokens": args.prompt, "new_tokens": args.new,
        "weight_bytes": weights, "environment": environment(device), "ceilings": limit.to_dict(),
        "bandwidth_limit_tokens_per_s": 1e3 / limit.floor_ms(0, weights), "rows": [],
    }  # fmt: skip

    def keep(name: str, rows: int, write: Callable[[int], Any], extra: Callable[[], dict[str, Any]] | None = None) -> None:
        found = {"way": name, "rows": rows, **rate(write, args.new, args.repeats, sync)}
        found["tokens_per_s"] *= rows
        found |= extra() if extra is not None else {}
        done["rows"].append(found)
        write_json(args.out, done)
        shown = {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in found.items() if not k.endswith("samples_s")}
        print("  ".join(f"{k}={v}" for k, v in shown.items()), flush=True)

    for rows in (int(r) for r in args.rows.split(",")):
        prompts = torch.randint(3, args.vocabulary, (rows, args.prompt), generator=generator)
        lists = prompts.tolist()
        for drafts in (0, *(int(d) for d in args.drafts.split(","))):
            torch._dynamo.reset()
            run = Rounds(lm, rows, slots=args.prompt + args.new + 1, draft_length=drafts)
            texts_written: list[list[list[int]]] = []

            def write(count: int, run: Rounds = run, kept: list[Any] = texts_written) -> None:
                kept.append(run.generate(lists, count))

            def extra(kept: list[Any] = texts_written, drafts: int = drafts) -> dict[str, Any]:
                last = next(g for g in reversed(kept) if len(g.tokens[0]) == args.new)
                return {"acceptance": last.acceptance if drafts else None, "tokens_per_round": last.tokens_per_pass}

            keep(f"ours, {drafts} drafts" if drafts else "ours, plain", rows, write, extra)
        if rows == 1:
            given = {"input_ids": prompts.to(device), "attention_mask": torch.ones_like(prompts, device=device), "do_sample": False}
            options = {
                "greedy": {},
                "assistant_early_exit": {"assistant_early_exit": args.exit},
                "prompt_lookup": {"prompt_lookup_num_tokens": 5},
            }
            for peer in filter(None, args.peers.split(",")):
                keep(f"transformers, {peer}", rows, lambda n, peer=peer: model.generate(**given, max_new_tokens=n, **options[peer]))


if __name__ == "__main__":
    main()
