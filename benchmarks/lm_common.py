"""What the language-model benchmarks share: a budget of time, results kept after every part, real prompts, and how a text is compared.

Shapes: ``B`` rows, ``T`` tokens, ``V`` vocabulary.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import lzma
import math
import statistics
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from offramp.core.bundle import write_json
from offramp.engines.capture import Tuning
from offramp.engines.text.draft_lengths import LengthChoice
from offramp.engines.text.round_times import Candidate
from offramp.engines.text.rounds import Rounds
from offramp.language import LanguageModel, attach_lm, load_lm
from offramp.measure import clock

END_OF_TEXT = "<|endoftext|>"
GROUPS = ("mt_bench", "translation", "summarization", "qa", "math_reasoning", "rag")
"""Spec-Bench's groups, 80 questions each; those of MT-bench come in eight categories that are one group here."""

# ---- time and results ----------------------------------------------------------------------------------------------------


@dataclass
class Budget:
    """Minutes that a command may take. What would not fit any more is left out and named.

    Attributes:
        minutes: in all, from when this was made.
        taken: seconds of each part that was run, by name.
        skipped: parts that were left out.
    """

    minutes: float
    taken: dict[str, float] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    start: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds."""
        return 60 * self.minutes - (time.monotonic() - self.start)

    def expected(self, kind: str, guess: float) -> float:
        """Seconds that a part of this kind will take: as the longest one so far, before that the guess."""
        return max((s for name, s in self.taken.items() if name.partition(":")[0] == kind), default=guess)

    def fits(self, name: str, guess: float) -> bool:
        """Whether the part ``kind: what`` fits in; if not it is noted as left out."""
        wanted = self.expected(name.partition(":")[0], guess)
        if wanted > self.left:
            self.skipped.append(name)
            print(f"left out: {name}, about {wanted:.0f} s wanted, {self.left:.0f} s left", flush=True)
        return wanted <= self.left

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time a part."""
        start = time.monotonic()
        yield
        self.taken[name] = time.monotonic() - start
        print(f"[{60 * self.minutes - self.left:6.1f} s] {name}: {self.taken[name]:.1f} s", flush=True)


class Sheet:
    """A result that is on disk after every part of it, whole or not at all.

    Args:
        path: of the JSON file; what an earlier call wrote there is kept where ``same`` says it belongs to the same measurement.
        content: what there is before anything was measured.
        budget: whose times and gaps belong to it.
        same: keys of ``content`` that must be equal for earlier rows to stay.
    """

    def __init__(self, path: str | Path, content: dict[str, Any], budget: Budget, same: Sequence[str] = ()) -> None:
        self.path, self.content, self.budget = Path(path), content, budget
        if same and self.path.is_file():
            before = json.loads(self.path.read_text())
            plain = json.loads(json.dumps(content))
            if all(before.get(k) == plain.get(k) for k in same):
                self.content |= {k: v for k, v in before.items() if k not in content or k == "rows"}
                self.content["earlier_environments"] = [*before.get("earlier_environments", []), before.get("environment")]
        self.write()

    def write(self) -> None:
        self.content["seconds"] = {k: round(v, 1) for k, v in self.budget.taken.items()}
        self.content["left_out"] = list(self.budget.skipped)
        write_json(self.path, self.content)

    def row(self, **found: Any) -> None:
        """Add a row, print it without its samples, and write. A row of the same ``way`` and ``rows`` is replaced."""
        key = {k: found.get(k) for k in ("way", "rows", "system", "group")}
        rows = [r for r in self.content.setdefault("rows", []) if {k: r.get(k) for k in key} != key]
        self.content["rows"] = [*rows, found]
        self.write()
        shown = {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in found.items() if not isinstance(v, list | dict)}
        print("  ".join(f"{k}={v}" for k, v in shown.items()), flush=True)


def numbers(given: str) -> list[int]:
    """Whole numbers with commas between."""
    return [int(n) for n in given.split(",") if n]


def tuning_argument(parser: argparse.ArgumentParser) -> None:
    """``--tuning``: what the compiler may try beyond its defaults."""
    names = ", ".join(asdict(Tuning()))
    parser.add_argument("--tuning", default="", help=f"of the compiler, with commas between: {names}; by default none")


def tuned(given: str, device: torch.device) -> bool | Tuning | None:
    """``compiled`` of `Rounds` from ``--tuning``; ``None``, its default, without it. A CPU compiles nothing."""
    names = [n for n in given.split(",") if n]
    if unknown := set(names) - set(asdict(Tuning())):
        raise SystemExit(f"--tuning knows {', '.join(asdict(Tuning()))}; got {', '.join(sorted(unknown))}.")
    return Tuning(**dict.fromkeys(names, True)) if names and device.type == "cuda" else None


def run_parts(parts: Mapping[str, Callable[[], None]], asked: Sequence[str], sheet: Sheet) -> None:
    """Run parts in their order. One that fails is written down with its error and does not cost the others; the command then fails."""
    failed = sheet.content.setdefault("errors", {})
    for name, part in parts.items():
        if name not in asked:
            continue
        failed.pop(name, None)
        try:
            part()
        except Exception as error:
            traceback.print_exc()
            failed[name] = f"{type(error).__name__}: {error}"
        sheet.write()
    if failed:
        raise SystemExit(f"Failed: {', '.join(failed)}.")


def asked_parts(given: str, known: Sequence[str]) -> list[str]:
    """Parts named with commas between.

    Raises:
        SystemExit: one is unknown.
    """
    asked = given.split(",")
    if unknown := set(asked) - set(known):
        raise SystemExit(f"--parts knows {', '.join(known)}; got {', '.join(sorted(unknown))}.")
    return asked


# ---- data ----------------------------------------------------------------------------------------------------------------


def unpacked(path: Path) -> str:
    """Text of a file, compressed or not."""
    if path.suffix == ".xz":
        with lzma.open(path, "rt", encoding="utf8", newline="\n") as file:
            return file.read()
    return path.read_text(encoding="utf8")


def first_merges(vocab: dict[str, int], merges: Sequence[str], size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The ``size`` first tokens of a byte-level vocabulary whose merges are in order, an end-of-text token last: vocabulary and merges.

    The 256 bytes come first and every merge makes the next token, so the beginning of such a vocabulary is one itself.
    """
    kept = size - 1 - 256
    if kept < 0 or kept > len(merges):
        raise SystemExit(f"A vocabulary of {size} tokens was asked for; from 257 to {257 + len(merges)} can be made.")
    pairs = [tuple(m.split(" ")) for m in merges[:kept]]
    small = {token: number for token, number in vocab.items() if number < 256 + kept}
    if len(small) != size - 1 or any("".join(p) not in small for p in pairs):
        raise SystemExit("The merges are not in the order of the vocabulary, so its beginning is no vocabulary.")
    return {**small, END_OF_TEXT: size - 1}, [(a, b) for a, b in pairs]


def small_tokenizer(folder: Path, size: int) -> Any:
    """The first ``size`` tokens of the GPT-2 vocabulary in a folder as a tokenizer that knows every byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    merges = [line for line in unpacked(folder / "gpt2_merges.txt.xz").split("\n")[1:] if line]
    vocab, pairs = first_merges(json.loads(unpacked(folder / "gpt2_vocab.json.xz")), merges, size)
    made = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


@dataclass(frozen=True)
class Prompt:
    """A question.

    Attributes:
        group: one of `GROUPS`.
        number: of the question.
        tokens: its ids, the last ``most`` of them.
        cut: tokens that were left out before those.
    """

    group: str
    number: int
    tokens: list[int]
    cut: int


def spec_bench(path: Path, encode: Callable[[str], list[int]], most: int, each: int | None = None) -> list[Prompt]:
    """Spec-Bench's questions, group by group.

    Args:
        path: ``spec_bench.jsonl.xz``.
        encode: text to ids.
        most: tokens of a prompt; what came earlier is cut off.
        each: questions of a group; all by default.
    """
    found: dict[str, list[Prompt]] = {group: [] for group in GROUPS}
    for line in unpacked(path).splitlines():
        question = json.loads(line)
        group = question["category"] if question["category"] in found else "mt_bench"
        ids = encode(question["turns"][0])
        found[group].append(Prompt(group, int(question["question_id"]), ids[-most:], max(0, len(ids) - most)))
    return [p for group in GROUPS for p in found[group][:each]]


def grouped(prompts: Sequence[Prompt]) -> dict[str, list[Prompt]]:
    """Prompts by group, in order."""
    found: dict[str, list[Prompt]] = {}
    for p in prompts:
        found.setdefault(p.group, []).append(p)
    return found


def in_turn(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The first prompt of each group, the second of each, and so on: what is cut short is cut short evenly."""
    return [p for column in itertools.zip_longest(*grouped(prompts).values()) for p in column if p is not None]


# ---- what training leaves -----------------------------------------------------------------------------------------------


def load_model(folder: Path, dtype: torch.dtype) -> Any:
    """The trained model on the CPU."""
    from transformers import LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = LlamaForCausalLM.from_pretrained(folder / "model", dtype=dtype).eval()
    model.generation_config.eos_token_id = None
    return model


def exits_in(folder: Path, model: Any) -> dict[str, LanguageModel]:
    """Every exit in a training's folder by itself, named ``head-depth``, over one model."""
    found = {}
    for path in sorted(folder.glob("exits-*")):
        whole = load_lm(model, path)
        name = path.name.removeprefix("exits-").partition("-")[0]
        for k, depth in enumerate(whole.exits):
            one = whole if len(whole.exits) == 1 else attach_lm(model, [depth], whole.specs[k])
            if one is not whole:
                one.heads[0].load_state_dict(whole.heads[k].state_dict())
            found[f"{name}-{depth}"] = one
    return found


def over(lm: LanguageModel, model: Any) -> LanguageModel:
    """The same exits with the same weights on a copy of the model, of whatever type."""
    made = attach_lm(model, lm.exits, lm.specs)
    made.heads.load_state_dict(lm.heads.state_dict())
    return made


class Measurement:
    """What a command that measures the trained model begins with. Abstract: a command adds what it measures.

    Attributes:
        args: of `measurement_arguments`, and the command's own.
        budget: of time, from now on.
        folder: of the training.
        device: CUDA where there is one.
        dtype: of the weights.
        compiled: for `Rounds`.
        tokenizer: that the model was trained with.
        sheet: the result, from `open_sheet` on.
    """

    sheet: Sheet

    def __init__(self, args: argparse.Namespace) -> None:
        from tokenizers import Tokenizer

        self.args, self.budget, self.folder = args, Budget(args.minutes), Path(args.model)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype: torch.dtype = getattr(torch, args.dtype)
        self.compiled = tuned(args.tuning, self.device)
        self.tokenizer = Tokenizer.from_file(str(self.folder / "model" / "tokenizer.json"))

    def spec_bench(self, each: int | None = None) -> list[Prompt]:
        """Spec-Bench's questions, ``each`` of a group, cut so that the text behind them fits into the context."""
        path = Path(self.args.data) / "prompts" / "spec_bench.jsonl.xz"
        return spec_bench(path, lambda text: self.tokenizer.encode(text).ids, self.args.context - self.args.new, each)

    def open_sheet(self, benchmark: str, prompts: int, content: Mapping[str, Any], same: Sequence[str] = ()) -> None:
        """Begin the result: what every such measurement says of itself, and ``content``; for ``same`` see `Sheet`."""
        args = self.args
        said: dict[str, Any] = {
            "benchmark": benchmark, "dtype": args.dtype, "new_tokens": args.new, "context": args.context, "prompts": prompts,
            "tuning": args.tuning, "environment": clock.environment(self.device), "rows": [],
        }  # fmt: skip
        self.sheet = Sheet(args.out, said | dict(content), self.budget, same)


def measurement_arguments(description: str | None, parts: str, parts_help: str | None = None) -> argparse.ArgumentParser:
    """The arguments that a `Measurement` reads.

    Args:
        description: of the command.
        parts: measured by default, with commas between.
        parts_help: what else there is.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with text/ and prompts/")
    parser.add_argument("--model", default="runs/lm", help="folder that train_lm.py made")
    parser.add_argument("--out", required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--parts", default=parts, help=parts_help)
    parser.add_argument("--minutes", type=float, default=8.5)
    parser.add_argument("--context", type=int, default=512, help="most tokens of prompt and text")
    parser.add_argument("--new", type=int, default=128)
    tuning_argument(parser)
    return parser


# ---- times ---------------------------------------------------------------------------------------------------------------


def seconds(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Wall-clock time of a call with the device's work, and its answer."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    answer = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, answer


def rates(ways: Mapping[str, Callable[[int], Any]], new: int, repeats: int, device: torch.device) -> dict[str, dict[str, Any]]:
    """Tokens per second after the first, of a row: whole texts less texts of one token, medians of rounds that have every way in turn.

    Args:
        ways: each writes so many tokens to every row of every batch that it stands for.
        new: tokens to write.
        repeats: samples of both, after a round that is not counted; every second round runs in reverse order.
        device: where.
    """
    samples: dict[str, dict[int, list[float]]] = {name: {new: [], 1: []} for name in ways}
    for turn in range(repeats + 1):
        for name in ways if turn % 2 == 0 else reversed(ways):
            for count, times in samples[name].items():
                times.append(seconds(partial(ways[name], count), device)[0])
    out = {}
    for name, taken in samples.items():
        whole, one = (statistics.median(times[1:]) for times in taken.values())
        out[name] = {
            "tokens_per_s": (new - 1) / (whole - one), "whole_s": whole, "prompt_s": one, "samples_s": taken[new][1:],
            "prompt_samples_s": taken[1][1:],
        }  # fmt: skip
    return out


def rate(write: Callable[[int], Any], new: int, repeats: int, device: torch.device) -> dict[str, Any]:
    """`rates` of one way."""
    return rates({"": write}, new, repeats, device)[""]


def fixed(drafts: int) -> LengthChoice:
    """Every round with so many drafts."""
    return LengthChoice((drafts,), (1.0,))


def round_ms(run: Rounds, prompts: Sequence[Sequence[int]], drafts: int, repeats: int = 30) -> float:
    """Median time of a whole captured round behind these prompts: what the planner takes for its choice."""
    run.generate(prompts, 1, choice=fixed(drafts))  # texts in place and finished: a round runs in full and changes nothing
    with torch.inference_mode():
        return clock.measure(run.graph(drafts).replay, warmup=5, repeats=repeats, device=run.device).median_ms


def candidate(exit_index: int, depth: int, head: str, full: float, known: dict[int, float]) -> Candidate:
    """A candidate of the planner from measured rounds; lengths between those measured lie on the line between them.

    Args:
        exit_index: which exit.
        depth: blocks before it.
        head: its name.
        full: milliseconds of a plain step.
        known: milliseconds of a round by its number of drafts.
    """
    points = sorted({0: full, **known}.items())
    rounds = []
    for k in range(1, points[-1][0] + 1):
        (a, low), (b, high) = next(pair for pair in itertools.pairwise(points) if pair[0][0] < k <= pair[1][0])
        rounds.append(low + (high - low) * (k - a) / (b - a))
    return Candidate.of_rounds(exit_index, depth, head, rounds)


def tokens_per_round(lengths: Sequence[int], accepted: int) -> float:
    """Tokens for each round of a row, which gives what it accepts and one more; a row's first token comes from the prompt's pass."""
    written = sum(lengths) - len(lengths)
    return written / max(1, written - accepted)


def synchronisations(run: Rounds, prompts: Sequence[Sequence[int]], short: int, long: int, choice: LengthChoice) -> dict[str, Any]:
    """How often the host waits for the device in a round, counted: a longer text less a shorter one, over their difference in rounds.

    Two kinds are counted. Calls that PyTorch itself knows to synchronise (``torch.cuda.set_sync_debug_mode``): reading a value,
    finding indices, copying to memory that is not pinned. And waits at the mailbox, which are reads of pinned memory and no call.
    On a CPU the first are none.
    """
    counted = []
    for new in (short, long):
        before = run.mail.waits
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if run.device.type == "cuda":
                torch.cuda.set_sync_debug_mode("warn")
            try:
                rounds = run.generate(prompts, new, choice=choice).deep_passes
            finally:
                if run.device.type == "cuda":
                    torch.cuda.set_sync_debug_mode("default")
        calls = sum("synchroniz" in str(w.message).lower() for w in caught)
        counted.append((rounds, calls, run.mail.waits - before))
    (r0, c0, w0), (r1, c1, w1) = counted
    more = max(1, r1 - r0)
    return {
        "per_round": ((c1 - c0) + (w1 - w0)) / more, "calls_per_round": (c1 - c0) / more, "waits_per_round": (w1 - w0) / more,
        "calls_per_text": c0, "rounds": [r0, r1],
    }  # fmt: skip


# ---- texts that differ ---------------------------------------------------------------------------------------------------


def first_difference(one: Sequence[int], two: Sequence[int]) -> int | None:
    """Place of the first token that differs, or ``None``; a text that ends earlier differs where it ends."""
    for place, (a, b) in enumerate(zip(one, two)):
        if a != b:
            return place
    return None if len(one) == len(two) else min(len(one), len(two))


def spacing(value: float, dtype: torch.dtype) -> float:
    """Distance from a number to the next larger one that a floating-point type has."""
    exponent = math.floor(math.log2(max(abs(value), torch.finfo(dtype).tiny)))
    return 2.0**exponent * torch.finfo(dtype).eps


@torch.no_grad()
def divergence(model: nn.Module, exact: nn.Module, text: Sequence[int], one: int, two: int) -> dict[str, Any]:
    """Two tokens that two ways of the same model chose after the same text: how near a tie this is.

    A way that computes with other shapes rounds otherwise, so each logit carries an error like the one seen here between the model and its
    copy in float32. The difference of two logits, and of that between two ways, adds four of them; three standard deviations of that sum
    is the bound below which a divergence is rounding.

    Args:
        model: as it ran.
        exact: the same in float32.
        text: ids before the tokens.
        one: what the plain way chose.
        two: what the other way chose.

    Returns:
        Gaps of the first token over the second, ``rounding`` (root mean square over all logits), ``spacing`` of the model's type at the
        larger logit, both gaps in units of it, and ``near_tie``.
    """
    ids = torch.tensor([list(text)], device=next(model.parameters()).device)
    own = model(ids, use_cache=False).logits[0, -1].float()
    true = exact(ids, use_cache=False).logits[0, -1].float()
    dtype = next(model.parameters()).dtype
    gap, gap32 = float(own[one] - own[two]), float(true[one] - true[two])
    step = spacing(float(own[[one, two]].abs().max()), dtype)
    rounding = float((own - true).square().mean().sqrt())
    return {
        "tokens": [one, two], "gap": gap, "gap_float32": gap32, "gap_in_spacings": gap / step, "gap_float32_in_spacings": gap32 / step,
        "spacing": step, "rounding": rounding, "near_tie": abs(gap32) <= max(6 * rounding, step),
    }  # fmt: skip


def compare_texts(
    model: nn.Module, exact: nn.Module | None, prompts: Sequence[Sequence[int]], one: Sequence[Sequence[int]], two: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """Whether two ways wrote the same, and each first difference with its gap.

    Args:
        model: as it ran.
        exact: the same in float32; ``None`` leaves the gaps out.
        prompts: of the texts.
        one: what plain decoding wrote.
        two: what the other way wrote.
    """
    found = []
    for index, (prompt, a, b) in enumerate(zip(prompts, one, two, strict=True)):
        place = first_difference(a, b)
        if place is None:
            continue
        known: dict[str, Any] = {"text": index, "place": place}
        if exact is not None and place < min(len(a), len(b)):
            known |= divergence(model, exact, [*prompt, *a[:place]], a[place], b[place])
        found.append(known)
    far = None if exact is None else sum(not f.get("near_tie", False) for f in found)
    return {"texts": len(one), "equal": len(one) - len(found), "not_near_ties": far, "divergences": found}
