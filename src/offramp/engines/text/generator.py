"""The engine of a language model as its user holds it: prompts in, texts out, as fast as this device and these texts allow.

On CUDA texts are written by captured rounds (`offramp.engines.text.rounds`), made for buckets of rows and slots when they are first needed
and kept; elsewhere, and for what rounds do not know, by the reference (`offramp.engines.text.generate`). In float32 both write the same
text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch

from offramp.budget.agreement import AcceptPlan
from offramp.core.errors import InvalidInput
from offramp.engines.capture import Tuning
from offramp.engines.text.agreement import Acceptance
from offramp.engines.text.arguments import Settings, StopStrings, one_stop, seeds_of, settings, token_ids
from offramp.engines.text.draft_lengths import LengthChoice
from offramp.engines.text.generate import exits, generate
from offramp.engines.text.kept_rounds import Kept, KeptRounds, Need
from offramp.engines.text.planner import Prediction, SpeculationPlan, choose, even_acceptance, fingerprint_of, plan_speculation
from offramp.engines.text.round_prompt import widths
from offramp.engines.text.round_times import measure, measure_rounds, times_of
from offramp.engines.text.rounds import Captured, Rounds, can_capture, length_of
from offramp.engines.text.sampling import Sampling
from offramp.engines.text.written import Audit, Generation, Streamer
from offramp.engines.turn import Turn
from offramp.language import LanguageModel
from offramp.policies.decoding import Accept, Plain, Scheduled, Verify, Way

LENGTHS = (1, 2, 4, 6)
"""Draft lengths that are captured where the planner chooses among them; times between are interpolated."""
_MOST_WAITING = 16
"""Tokens that wait in the longest round that is captured where they leave; a fill that lets more wait is asked for no more."""
_LEAST_SLOTS = 256


class TextGenerator:
    """Writes texts in one way. Made by `offramp.compile`.

    Captured rounds do plain decoding, verified drafts with any rule that stops drafting, and tokens that leave at one exit and catch up
    (`Accept` with `CatchUp` and a threshold that does not adapt), greedy or sampled, with stop strings and a streamer (both a round late).
    ``repetition_penalty``, `Scheduled` and every other `Accept` are the reference's. The first call for more rows or longer texts than
    before captures, which takes a while; `prepare` does it ahead.

    With a plan, drafting follows what it brings. Captured and greedy: every round has the draft length that measured times and the
    acceptance seen so far favour, none among them. Otherwise the length is chosen once for each size of batch, by times measured for that
    size, and is 0 where drafting would not pay. Captured rounds in which tokens leave have the length that measured times and the share
    that left so far favour, also when sampling: their text does not depend on it.

    Threads may share a generator. Captured rounds write for one of them at a time and the others wait; what is called meanwhile (a
    streamer, a stop criterion) cannot call the same generator. The reference writes for all of them at once. Weights may change between
    two texts: where they stand elsewhere afterwards (moved, assigned, of another type), captured rounds are made anew. A model whose
    modules were replaced after exits were attached to it is refused.

    Args:
        lm: from `offramp.attach`.
        way: how texts are written, or ``None`` where ``plan`` says.
        plan: of `offramp.engines.text.planner`.
        tokenizer: of transformers, for prompts that are texts and for stop strings.
        captured: use captured rounds; by default on CUDA.
        compiled: see `Rounds`.
        max_rows: most texts at a time in captured rounds, at least 1; more are written one part after another.
        keep: most `Rounds` that are kept, at least 1. Each holds a cache for its rows and slots; the one unused for longest goes first.

    Attributes:
        captures: how many `Rounds` have been made.
    """

    def __init__(
        self,
        lm: LanguageModel,
        way: Way | None = None,
        plan: SpeculationPlan | None = None,
        *,
        tokenizer: Any = None,
        captured: bool | None = None,
        compiled: bool | Tuning | None = None,
        max_rows: int = 32,
        keep: int = 4,
    ) -> None:
        if (way is None) == (plan is None):
            raise InvalidInput("Give a way of decoding or a plan, one of them.")
        if max_rows < 1 or keep < 1:
            raise InvalidInput(f"max_rows and keep must be at least 1, got {max_rows} and {keep}.")
        _check(lm, way, plan)
        self.lm, self.plan, self.tokenizer = lm, plan, tokenizer
        self.captured = lm.decoder.device.type == "cuda" if captured is None else captured
        self.max_rows, self.kept = max_rows, KeptRounds(lm, compiled, keep)
        self._way = way
        self._in_rounds = self.captured and (way is None or can_capture(lm, way))
        self._plans: dict[int, SpeculationPlan] = {} if plan is None else {_power(plan.times.rows): plan}
        another = "compile another generator for the texts within"
        self._turn, self._planning = Turn("This captured generator", another), Turn("This generator's planner", another)

    @property
    def _how(self) -> str:
        return "captured rounds" if self._in_rounds else "the reference engine"

    def __str__(self) -> str:
        return f"TextGenerator on {self.lm.decoder.device}, {self._how}\n{self.plan if self.plan is not None else self._way}"

    def __repr__(self) -> str:
        model = f"{type(self.lm.model).__name__} with exits after {list(self.lm.exits)}"
        way = self._way if self.plan is None else f"{self.plan.mode()} of a plan"
        return f"<TextGenerator of {model} on {self.lm.decoder.device}: {way}, {self._how}>"

    def __call__(self, prompts: Any = None, **asked: Any) -> Generation:
        """The same as `generate`."""
        return self.generate(prompts, **asked)

    @property
    def captures(self) -> int:
        return self.kept.made

    # What is asked for -------------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Any = None,
        *,
        input_ids: Any = None,
        attention_mask: Any = None,
        tokenizer: Any = None,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        stop_strings: str | Sequence[str] | None = None,
        stop: str | Sequence[str] | None = None,
        streamer: Streamer | None = None,
        generation_config: Any = None,
        seed: int | Sequence[int] | None = 0,
        **others: Any,
    ) -> Generation:
        """Continue texts. Arguments are those of `offramp.engines.text.generate.generate`, which are those of transformers.

        A prompt may be a text, where a tokenizer is known, or token ids; prompts of a batch may be of any lengths, and none changes what
        is written behind another. `Generation.tokens` has the new ids of each, `Generation.sequences` prompts and new tokens padded.

        Raises:
            InvalidInput: an argument is out of range, unknown or not supported; this call comes from a streamer or stop criterion of
                another, both captured; the model was changed after exits were attached to it. Says which.
        """
        tokenizer = tokenizer if tokenizer is not None else self.tokenizer
        if (prompts is None) == (input_ids is None):
            raise InvalidInput("Give prompts or input_ids, one of them.")
        given: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "max_length": max_length,
            "do_sample": do_sample,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "repetition_penalty": repetition_penalty,
            "eos_token_id": eos_token_id,
            "pad_token_id": pad_token_id,
            "stop_strings": one_stop(stop_strings, stop),
        }
        asked = settings(self.lm.model, given, others, generation_config)
        texts = token_ids(prompts if input_ids is None else input_ids, attention_mask, tokenizer, asked.pad, asked.ends)
        if not self._in_rounds or asked.sampling.repetition_penalty != 1.0:
            passed = {"tokenizer": tokenizer, "streamer": streamer, "generation_config": generation_config, "seed": seed, **others}
            return generate(self.lm, texts, self.way(len(texts)), **given, **passed)
        new = asked.new_tokens(max(map(len, texts)), self.lm.decoder.max_positions)
        stops = StopStrings(tokenizer, asked.stop_strings) if asked.stop_strings else None
        seeds = seeds_of(seed, len(texts))
        if streamer is not None and len(texts) != 1:
            raise InvalidInput(f"A streamer takes the tokens of one text, got {len(texts)} prompts; give them one at a time.")
        parts = []
        with self._turn:
            for first in range(0, len(texts), self.max_rows):
                part = texts[first : first + self.max_rows]
                made, choice = self._rounds(part, new, asked)
                parts.append(made.generate(part, new, seeds[first : first + self.max_rows], choice, stops, streamer))
        found = _joined(parts)
        found.pad_token_id = asked.filling
        return found

    def prepare(self, rows: int = 1, tokens: int = 1024, **asked: Any) -> None:
        """Capture and time what texts of up to ``tokens`` tokens, prompt included, in batches of ``rows`` will need. See `generate`.

        Args:
            rows: texts at a time.
            tokens: of a text, at least 2.
            asked: settings that will be asked for, such as ``do_sample``, ``temperature``, ``eos_token_id``.
        """
        if rows < 1 or tokens < 2:
            raise InvalidInput(f"rows must be at least 1 and tokens at least 2, got {rows} and {tokens}.")
        before = [k.rounds for k in self.kept.all]
        self.generate([[0] * (tokens - 1)] * rows, max_new_tokens=1, **asked)
        for kept in [k for k in self.kept.all if k.rounds not in before]:  # several, where the rows are more than are written at a time
            for width in widths(tokens - 1)[:-1]:
                kept.rounds.generate([[0] * width], 1)  # rows without a text run along

    # How it is done ----------------------------------------------------------------------------------------------------------

    def way(self, rows: int = 1) -> Way:
        """How a batch of so many rows is written by the reference. With a plan, times are measured for a new size of batch first."""
        if self._way is not None:
            return self._way
        with self._planning:
            return self._planned(_power(rows)).mode()

    def _planned(self, rows: int) -> SpeculationPlan:
        first = self._first
        if first.chosen is None and rows >= first.times.rows:  # what does not pay for few rows does not for more
            return first
        if rows not in self._plans:
            best, most = _best(first), max(p.draft_length for p in first.predictions)
            times = measure(self.lm, rows=rows, context=first.times.context or 1, most=most, exits=[best.exit_index], repeats=8)
            self._plans[rows] = choose(times, [_acceptance(first, best)], margin=first.margin)
        return self._plans[rows]

    @property
    def _first(self) -> SpeculationPlan:
        if self.plan is None:
            raise InvalidInput("This generator has no plan.")
        return self.plan

    def _rounds(self, part: Sequence[Sequence[int]], new: int, asked: Settings) -> tuple[Rounds, LengthChoice | None]:
        """Rounds for these texts, and what chooses their lengths."""
        rows = _power(len(part))
        way, lengths = self._asked_of(rows)
        sampling = asked.sampling if asked.sampling.do_sample else Sampling()  # nothing else of it is read
        kept = self.kept.serving(Need(rows, _slots(self.lm, max(map(len, part)) + new), lengths, way, sampling, asked.ends))
        return kept.rounds, self._choice(kept, part, sampling) if len(lengths) > 1 else None

    def _asked_of(self, rows: int) -> tuple[Captured, tuple[int, ...]]:
        """What rounds for so many rows do, and the lengths that are captured."""
        way = self._way
        if self.plan is not None and (self.plan.chosen is not None or rows < self.plan.times.rows):
            best = _best(self.plan)
            most = max(p.draft_length for p in self.plan.predictions)
            lengths = (0, *sorted({k for k in (*LENGTHS, best.draft_length) if k <= most}))
            return Verify(lengths[-1], exit_index=best.exit_index), lengths
        if isinstance(way, Accept):  # 1, 2, 4, ... places
            most = min(length_of(way) + 1, _MOST_WAITING)
            return way, tuple(sorted({min(1 << i, most) - 1 for i in range(most.bit_length() + 1)}))
        return (way, (way.draft_length,)) if isinstance(way, Verify) else (Plain(), (0,))

    def _choice(self, kept: Kept, part: Sequence[Sequence[int]], sampling: Sampling) -> LengthChoice:
        """Among the lengths of some rounds, by what they take here, which is measured behind these texts if it was not before."""
        if kept.times is None:
            kept.times = times_of(kept.rounds, part, warmup=3, repeats=10)
        times = kept.times
        if self.plan is None:
            return LengthChoice(tuple(sorted(times)), tuple(times[k] for k in sorted(times)))
        return self._drafting(self.plan, times, sampling)

    @staticmethod
    def _drafting(plan: SpeculationPlan, times: Mapping[int, float], sampling: Sampling) -> LengthChoice:
        """Among lengths with these times. Sampled texts keep one length, so that a row's text does not depend on the rows beside it."""
        known = _acceptance(plan, _best(plan))
        most = len(known.tokens) - 1
        if sampling.do_sample:
            best = max(times, key=lambda k: known.tokens[k] / times[k])
            times = {best: times[best]}
        return LengthChoice.of(times, even_acceptance(known.tokens[most], most))


def text_generator(
    lm: LanguageModel,
    plan: Way | SpeculationPlan | AcceptPlan | None = None,
    *,
    tokenizer: Any = None,
    texts: Any = None,
    starts: Sequence[int] | None = None,
    rows: int = 1,
    context: int = 128,
    sampling: Sampling | None = None,
    margin: float = 0.02,
    captured: bool | None = None,
    compiled: bool | Tuning | None = None,
    max_rows: int = 32,
    keep: int = 4,
) -> TextGenerator:
    """Make the engine of a language model.

    Args:
        lm: from `offramp.attach`.
        plan: how texts are written: `Plain`, `Verify`, `Accept` or `Scheduled` of `offramp.policies.decoding`; what
            `offramp.engines.text.planner` or `offramp.budget.agreement` chose; or ``None``: verified drafts, planned here with ``texts``.
        tokenizer: of transformers, for texts instead of token ids.
        texts: without a plan: texts like those to come, best of all written by the model; strings, lists of ids, or ids ``[N, T]``.
        starts: how many tokens of each are prompt; 1 by default.
        rows: of the batches to plan for first; other sizes are planned for when they come.
        context: tokens before those that are timed.
        sampling: to plan for; greedy by default.
        margin: how much faster than plain decoding drafts must be expected to be; below it they are not made.
        captured: see `TextGenerator`.
        compiled: see `Rounds`.
        max_rows: see `TextGenerator`.
        keep: see `TextGenerator`.

    Raises:
        InvalidInput: neither a plan nor texts, a plan for exits that the model does not have, or texts that are too short.
        FingerprintMismatch: a plan that was made for another model, or with other exits.
    """
    options: dict[str, Any] = {
        "tokenizer": tokenizer, "captured": captured, "compiled": compiled, "max_rows": max_rows, "keep": keep
    }  # fmt: skip
    if isinstance(plan, AcceptPlan):
        plan.check(fingerprint_of(lm))
        way = plan.way
        if not isinstance(way, Accept):
            raise InvalidInput(f"An AcceptPlan for a language model is about an Accept(...), this one is about {way!r}.")
        plan = way
    if isinstance(plan, Plain | Verify | Accept | Scheduled):
        return TextGenerator(lm, plan, **options)
    if isinstance(plan, SpeculationPlan):
        plan.check(lm)
        return TextGenerator(lm, plan=plan, **options)
    if plan is not None:
        raise InvalidInput(
            "A plan for a language model is Plain(), Verify(...), Accept(...), Scheduled(...), a SpeculationPlan or an AcceptPlan; got "
            f"{plan!r}."
        )
    if texts is None:
        raise InvalidInput("Without a plan one is made, which needs texts=...: prompts with what followed. Or give one, such as Verify(4).")
    ids = token_ids(texts, tokenizer=tokenizer)
    used = lm.decoder.device.type == "cuda" if captured is None else captured
    kept = KeptRounds(lm, compiled, keep)
    if used:
        rounds = _kept_for_planning(kept, _power(rows), max(context, *map(len, ids)), sampling)
        times = measure_rounds(lm, rows=_power(rows), context=context, lengths=LENGTHS, make=rounds)
    else:
        times = measure(lm, rows=_power(rows), context=context, most=LENGTHS[-1])
    made = plan_speculation(lm, ids, starts=starts, sampling=sampling, margin=margin, most=LENGTHS[-1], times=times)
    found = TextGenerator(lm, plan=made, **options)
    kept.keep([found._asked_of(_power(rows))[0]])  # what was captured to plan with, of the way that was chosen
    found.kept = kept
    return found


def _kept_for_planning(
    kept: KeptRounds, rows: int, tokens: int, sampling: Sampling | None
) -> Callable[[LanguageModel, int | None], Rounds]:
    """Rounds of an exit, or plain ones, made as texts of up to so many tokens will need them if the plan turns out so."""
    choice = sampling if sampling is not None and sampling.do_sample and sampling.repetition_penalty == 1.0 else Sampling()
    ends = settings(kept.lm.model, {}, {}).ends

    def made(lm: LanguageModel, exit_index: int | None) -> Rounds:
        way: Captured = Plain() if exit_index is None else Verify(LENGTHS[-1], exit_index=exit_index)
        lengths = (0,) if exit_index is None else (0, *LENGTHS)
        most = lm.decoder.max_positions
        wanted = tokens + LENGTHS[-1] + 2 if most is None else min(tokens + LENGTHS[-1] + 2, most + 1)
        return kept.serving(Need(rows, _slots(lm, wanted), lengths, way, choice, ends)).rounds

    return made


def _check(lm: LanguageModel, way: Way | None, plan: SpeculationPlan | None) -> None:
    exits(lm, way if way is not None else Verify(1, exit_index=_best(plan).exit_index) if plan is not None else Plain())
    if isinstance(way, Scheduled) and way.schedule.blocks != len(lm.decoder):
        raise InvalidInput(f"The schedule is for {way.schedule.blocks} blocks, the model has {len(lm.decoder)}.")


def _best(plan: SpeculationPlan) -> Prediction:
    return plan.chosen or plan.predictions[0]


def _acceptance(plan: SpeculationPlan, best: Prediction) -> Acceptance:
    """What the plan expects of the best one's exit, for every draft length."""
    same = [p for p in plan.predictions if (p.exit_index, p.head) == (best.exit_index, best.head)]
    return Acceptance((1.0, *(p.tokens_per_round for p in sorted(same, key=lambda p: p.draft_length))))


def _slots(lm: LanguageModel, tokens: int) -> int:
    """Slots for texts of so many tokens: some more, so that longer ones share them."""
    most = lm.decoder.max_positions
    step = max(_LEAST_SLOTS, _power(tokens) // 8)
    slots = -(-tokens // step) * step
    return slots if most is None else max(tokens, min(slots, most + 1))  # the last token is written and not read


def _power(count: int) -> int:
    """The next power of two."""
    return 1 << max(0, math.ceil(math.log2(count)))


def _joined(parts: Sequence[Generation]) -> Generation:
    """Parts of a batch that were written one after another."""
    if len(parts) == 1:
        return parts[0]

    def added(name: str) -> list[int]:
        return [sum(column) for column in zip_longest(*(getattr(p, name) for p in parts), fillvalue=0)]

    before = [sum(len(p.tokens) for p in parts[:k]) for k in range(len(parts))]
    looks = [torch.cat([getattr(p.audit, name) for p in parts]) for name in ("place", "exit_index", "score", "agreed", "left")]
    return Generation(
        [t for p in parts for t in p.tokens],
        [d for p in parts for d in p.depth],
        scores=[s for p in parts for s in p.scores],
        drafted=added("drafted"),
        accepted=added("accepted"),
        audited=sum(p.audited for p in parts),
        disagreed=sum(p.disagreed for p in parts),
        audit=Audit(torch.cat([p.audit.row + rows for p, rows in zip(parts, before, strict=True)]), *looks),
        deep_passes=sum(p.deep_passes for p in parts),
        row_passes=sum(p.deep_passes * len(p.tokens) for p in parts),
        prompt_s=sum(p.prompt_s for p in parts),
        prompts=[t for p in parts for t in p.prompts],
    )


__all__ = ["LENGTHS", "TextGenerator", "text_generator"]
