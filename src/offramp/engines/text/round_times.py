"""What a round of drafts and a plain step take: measured on this machine, part by part or in whole captured rounds, or counted in blocks.

A round with ``k`` drafts takes ``k (shallow + draft) + shallow + deep(k + 1) + rest``.

Shapes: ``B`` rows, ``K`` most drafts of a round.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from offramp.core.errors import InvalidInput
from offramp.core.modes import evaluating
from offramp.engines.capture import Tuning
from offramp.engines.text.rounds import Rounds
from offramp.engines.text.rows import Rows
from offramp.engines.text.sampling import Sampling
from offramp.engines.text.speculate import Chances, one_round
from offramp.language import LanguageModel
from offramp.measure import clock
from offramp.policies.decoding import Verify


@dataclass(frozen=True)
class Candidate:
    """An exit with a head, and what it takes for the whole batch, in the unit of `Times`.

    Attributes:
        exit_index: which exit.
        depth: blocks before it.
        head: name of the head.
        shallow: one token a row through the blocks before the exit.
        draft: the head and choosing a draft.
        deep: blocks behind the exit, head and choosing, for 1, 2, ... K + 1 tokens a row.
        rest: what else a round takes: judging drafts, appending.
    """

    exit_index: int
    depth: int
    head: str
    shallow: float
    draft: float
    deep: tuple[float, ...]
    rest: float = 0.0

    def __post_init__(self) -> None:
        if len(self.deep) < 2 or min(self.shallow, self.draft, self.rest, *self.deep) < 0 or self.round(1) <= 0:
            raise InvalidInput(f"Times must be at least 0, of a round more, with deep times for 1 and 2 tokens or more; got {self}.")

    @classmethod
    def of_rounds(cls, exit_index: int, depth: int, head: str, rounds: Sequence[float]) -> Candidate:
        """From times of whole rounds with 1, 2, ... K drafts, as an engine that captures them can measure."""
        return cls(exit_index, depth, head, 0.0, 0.0, (0.0, *rounds))

    @property
    def most(self) -> int:
        """Most drafts that times are known for."""
        return len(self.deep) - 1

    def round(self, drafts: int) -> float:
        """Time of a round."""
        return drafts * (self.shallow + self.draft) + self.shallow + self.deep[drafts] + self.rest

    @property
    def step(self) -> float:
        """Time that one more draft adds to a round, on average."""
        return (self.round(self.most) - self.round(1)) / (self.most - 1) if self.most > 1 else self.shallow + self.draft


@dataclass(frozen=True)
class Times:
    """What decoding takes, for a batch of some size.

    Attributes:
        full: a token a row of plain decoding.
        candidates: exits and heads.
        rows: of the batch.
        context: tokens before those that were timed.
        device: in words.
        unit: of all times.
    """

    full: float
    candidates: tuple[Candidate, ...]
    rows: int = 1
    context: int = 0
    device: str = ""
    unit: str = "ms"

    def __post_init__(self) -> None:
        if not self.full > 0 or not self.candidates or self.rows < 1:
            raise InvalidInput(
                f"full must be > 0, with a candidate and a row or more; got {self.full}, {len(self.candidates)}, {self.rows}."
            )

    @classmethod
    def modelled(
        cls,
        blocks: int,
        head: float,
        exits: Sequence[int],
        *,
        heads: Mapping[str, float] | None = None,
        overhead: float = 0.0,
        most: int = 8,
        growth: Callable[[int], float] = lambda width: 1.0,
        rows: int = 1,
    ) -> Times:
        """By counting: one block at one token is 1.

        Args:
            blocks: of the model.
            head: of the model, in blocks.
            exits: after how many blocks.
            heads: draft heads by name, in blocks; the model's own by default.
            overhead: of every step and of the deep pass: launches, synchronisation.
            most: drafts.
            growth: cost of a pass over so many tokens, over that of one; 1 while weights are what takes the time.
            rows: of the batch, which count in ``growth``.
        """
        found = [
            Candidate(
                e, depth, name, depth * growth(rows), h * growth(rows) + overhead,
                tuple((blocks - depth + head) * growth(rows * (k + 1)) for k in range(most + 1)), overhead,
            )
            for name, h in (heads or {"own": head}).items()
            for e, depth in enumerate(exits)
        ]  # fmt: skip
        return cls((blocks + head) * growth(rows) + overhead, tuple(found), rows, 0, "counted in blocks", "blocks")


def measure(
    lms: LanguageModel | Mapping[str, LanguageModel],
    *,
    rows: int = 1,
    context: int = 128,
    most: int = 6,
    exits: Sequence[int] | None = None,
    warmup: int = 3,
    repeats: int = 20,
) -> Times:
    """Time the parts of a round and a plain step of the reference engine on the model's device. Medians, milliseconds.

    Args:
        lms: the model with its exits; or several, by the name of their heads, over the same model.
        rows: of the batch.
        context: tokens of each row before.
        most: drafts of a round, at least 1.
        exits: numbers of the exits to time; all by default.
        warmup: calls before timing.
        repeats: samples of each time.

    Raises:
        InvalidInput: an argument is out of range, or the model has no exits.
    """
    named = dict(lms) if isinstance(lms, Mapping) else {"own": lms}
    if rows < 1 or context < 1 or most < 1 or not named or any(not lm.exits for lm in named.values()):
        raise InvalidInput(f"rows, context and most must be at least 1 and every model have exits; got {rows}, {context}, {most}.")
    _check_exits(named, exits)
    device = next(iter(named.values())).decoder.device

    def timed(fn: Callable[[], Any]) -> float:
        return clock.measure(fn, warmup=warmup, repeats=repeats, device=device).median_ms

    full = 0.0
    found: list[Candidate] = []
    for name, lm in named.items():
        with torch.inference_mode(), evaluating(lm.model, lm):
            for e in exits if exits is not None else range(len(lm.exits)):
                here = _Scratch(lm, e, rows, context, most)
                if not found:
                    full = timed(here.plain)
                shallow, draft = timed(here.shallow), timed(here.draft)
                deep = tuple(timed(partial(here.deep, k + 1)) for k in range(most + 1))
                rest = timed(here.round) - most * (shallow + draft) - shallow - deep[most]
                found.append(Candidate(e, lm.exits[e], name, shallow, draft, deep, max(0.0, rest)))
    return Times(full, tuple(found), rows, context, str(device))


def measure_rounds(
    lms: LanguageModel | Mapping[str, LanguageModel],
    *,
    rows: int = 1,
    context: int = 128,
    lengths: Sequence[int] = (1, 2, 4, 6),
    exits: Sequence[int] | None = None,
    slots: int | None = None,
    warmup: int = 5,
    repeats: int = 30,
    compiled: bool | Tuning | None = None,
    make: Callable[[LanguageModel, int | None], Rounds] | None = None,
) -> Times:
    """Time whole rounds of `offramp.engines.text.rounds.Rounds`, and its plain step, on the model's device. Medians, milliseconds.

    This is what a user of captured rounds waits for. Every length is captured by itself, so only some are timed and those between are
    interpolated; a round grows by one draft step and one position of the deep pass at a time.

    Args:
        lms: the model with its exits; or several, by the name of their heads, over the same model.
        rows: of the batch.
        context: tokens of each row before.
        lengths: numbers of drafts to time, ascending, each at least 1.
        exits: numbers of the exits to time; all by default.
        slots: most tokens of a text that the decoder is made for; just enough by default.
        warmup: calls before timing.
        repeats: samples of each time.
        compiled: see `Rounds`.
        make: gives the rounds of an exit, ``lengths`` among theirs, or those of plain decoding (``None``), so that they can be kept; by
            default they are made for this alone, as ``slots`` and ``compiled`` say.

    Raises:
        InvalidInput: an argument is out of range, or the model has no exits.
    """
    named = dict(lms) if isinstance(lms, Mapping) else {"own": lms}
    if not lengths or list(lengths) != sorted(set(lengths)) or lengths[0] < 1:
        raise InvalidInput(f"lengths must be ascending numbers of drafts from 1 on, got {list(lengths)}.")
    if rows < 1 or context < 1 or not named or any(not lm.exits for lm in named.values()):
        raise InvalidInput(f"rows and context must be at least 1 and every model have exits; got {rows} and {context}.")
    _check_exits(named, exits)
    device = next(iter(named.values())).decoder.device

    def alone(lm: LanguageModel, exit_index: int | None) -> Rounds:
        drafts = (0,) if exit_index is None else lengths
        return Rounds(lm, rows, slots or context + max(drafts) + 2, drafts, exit_index or 0, compiled=compiled)

    def timed(lm: LanguageModel, exit_index: int | None) -> dict[int, float]:
        return times_of((make or alone)(lm, exit_index), _prompts(lm, rows, context), warmup=warmup, repeats=repeats)

    full = timed(next(iter(named.values())), None)[0]
    found = []
    for name, lm in named.items():
        for e in exits if exits is not None else range(len(lm.exits)):
            known = sorted((k, t) for k, t in timed(lm, e).items() if k)
            found.append(Candidate.of_rounds(e, lm.exits[e], name, _between(known, full)))
    return Times(full, tuple(found), rows, context, str(device))


def times_of(rounds: Rounds, prompts: Sequence[Sequence[int]], *, warmup: int = 5, repeats: int = 30) -> dict[int, float]:
    """What a captured round of each of its draft lengths takes behind these prompts: medians, milliseconds."""
    rounds.generate(prompts, 1)  # texts in place and finished: a round runs in full and changes nothing
    with torch.inference_mode(), evaluating(rounds.lm.model, rounds.lm):
        graphs = {k: rounds.graph(k) for k in rounds.lengths}
        return {
            k: clock.measure(graph.replay, warmup=warmup, repeats=repeats, device=rounds.device).median_ms for k, graph in graphs.items()
        }


def _check_exits(named: Mapping[str, LanguageModel], exits: Sequence[int] | None) -> None:
    fewest = min(len(lm.exits) for lm in named.values())
    if exits is not None and (not exits or not all(0 <= e < fewest for e in exits)):
        raise InvalidInput(f"exits must be numbers of exits from 0 to {fewest - 1}, at least one; got {list(exits)}.")


def _between(known: Sequence[tuple[int, float]], full: float) -> list[float]:
    """Times of 1, 2, ... drafts, straight between those known; before the first, from the plain step to it."""
    points = [(0, full), *known]
    out = []
    for k in range(1, points[-1][0] + 1):
        (a, low), (b, high) = next(pair for pair in pairwise(points) if pair[0][0] < k <= pair[1][0])
        out.append(low + (high - low) * (k - a) / (b - a))
    return out


def _prompts(lm: LanguageModel, rows: int, context: int) -> list[list[int]]:
    found: list[list[int]] = torch.randint(0, lm.decoder.vocabulary, (rows, context), generator=torch.Generator().manual_seed(0)).tolist()
    return found


class _Scratch:
    """Rows that take one and the same step again and again."""

    def __init__(self, lm: LanguageModel, exit_index: int, rows: int, context: int, most: int) -> None:
        self.mode = Verify(most, exit_index=exit_index)
        self.rows = Rows(lm, _prompts(lm, rows, context), most + 3, Sampling(), list(range(rows)), (), (exit_index,), most)
        first = self.rows.choose(self.rows.prefill())
        self.one = torch.ones_like(self.rows.length)
        self.rows.append(first[:, None], self.one, self.one[:, None])
        self.length = self.rows.length.clone()
        self.rows.result.drafted, self.rows.result.accepted = [0] * most, [0] * most
        self.chances = Chances.of(self.rows, self.mode)
        self.state = self.mode.stop.begin(rows, most, self.length.device)
        self.hidden = self.shallow()

    def plain(self) -> None:
        rows = self.rows
        hidden = rows.run(rows.length - 1, self.one, 1, 0, len(rows.model))
        rows.append(rows.choose(rows.model.logits(hidden[:, 0]))[:, None], self.one, self.one[:, None])
        rows.length.copy_(self.length)

    def shallow(self) -> Tensor:
        return self.rows.run(self.length - 1, self.one, 1, 0, self.rows.depth_of_exit)

    def draft(self) -> Tensor:
        logits = self.rows.draft(self.hidden)[:, 0]
        return logits.float().softmax(-1).gather(1, logits.argmax(-1, keepdim=True))

    def deep(self, width: int) -> Tensor:
        rows = self.rows
        states = self.hidden.expand(-1, width, -1)
        return rows.model.logits(rows.run(self.length - 1, width * self.one, width, rows.depth_of_exit, len(rows.model), states)).argmax(-1)

    def round(self) -> None:
        one_round(self.rows, self.mode, self.chances, self.state)
        self.rows.length.copy_(self.length)
