"""planner: whether to speculate, from which exit and how far, by measured times and by how often the exit agrees.

A round of ``k`` drafts writes ``1 + c_1 + c_1 c_2 + ...`` tokens a row in the time that `Candidate.round` gives; plain decoding takes
``full`` for one. The setting with the best ratio is chosen, and where none is better than plain the answer is not to speculate. Times come
from this machine (`measure` for the reference engine, `measure_rounds` for captured rounds) or, before there is a machine, from counting
blocks (`Times.modelled`); acceptance from texts (`agreement`) or from what was seen while writing.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from typing import Any

from offramp.core.bundle import fingerprint, load_bundle, reading, save_bundle
from offramp.core.errors import FingerprintMismatch, InvalidInput
from offramp.core.parts import part_key
from offramp.engines.text.agreement import Acceptance, agreement
from offramp.engines.text.round_times import Candidate, Times, measure
from offramp.engines.text.sampling import Sampling
from offramp.language import LanguageModel
from offramp.policies.acceptance import AcceptanceBins
from offramp.policies.decoding import Plain, Verify
from offramp.policies.draft_stop import DraftStop, MarginalValue


def fingerprint_of(lm: LanguageModel) -> str:
    """SHA-256 of a language model and its exits: what a plan and its certificate are about. Exits trained further are other exits."""
    digest = hashlib.sha256(lm.base_fingerprint().encode())
    for after, head, spec in zip_longest(lm.exits, lm.heads, lm.specs):
        digest.update(f"{after}|{'module' if spec is None else part_key(spec)}|{fingerprint(head)}".encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class Prediction:
    """What one setting is expected to give.

    Attributes:
        exit_index: which exit.
        depth: blocks before it.
        head: name of the head.
        draft_length: drafts of a round.
        tokens_per_round: of a row.
        round_time: of a round, in the unit of the times.
        speedup: over plain decoding.
    """

    exit_index: int
    depth: int
    head: str
    draft_length: int
    tokens_per_round: float
    round_time: float
    speedup: float


@dataclass(frozen=True)
class SpeculationPlan:
    """The setting to use, or that plain decoding is better, and every setting that was looked at.

    Attributes:
        times: what was measured.
        chosen: the best setting, or ``None`` where speculation is off.
        predictions: all settings, best first.
        margin: gain over plain that was asked for.
        fingerprints: of the models with their exits that were measured, by the name of their heads; see `fingerprint_of`.
    """

    times: Times
    chosen: Prediction | None
    predictions: tuple[Prediction, ...]
    margin: float = 0.0
    fingerprints: Mapping[str, str] = field(default_factory=dict)

    @property
    def best(self) -> Prediction:
        """The chosen setting; where speculation is off, the one that came nearest."""
        return self.chosen or self.predictions[0]

    def check(self, lm: LanguageModel) -> None:
        """Refuse a model, or exits, that the plan was not made for.

        Raises:
            FingerprintMismatch: it was made for others, or the plan does not say for which.
        """
        head = self.best.head
        if head not in self.fingerprints:
            raise FingerprintMismatch(
                f"The plan does not say which model its times and acceptance with heads {head!r} are of. Make it with plan_speculation, or "
                "give choose(..., fingerprints={name: fingerprint_of(lm)})."
            )
        if (found := fingerprint_of(lm)) != (own := self.fingerprints[head]):
            raise FingerprintMismatch(
                f"The plan is for the language model and exits with fingerprint {own[:12]!r} (heads {head!r}), these have {found[:12]!r}: "
                "other weights, exits or another dtype. Load the exits it was made with, or plan again with texts."
            )

    @property
    def speedup(self) -> float:
        """Expected over plain decoding; 1 where speculation is off."""
        return 1.0 if self.chosen is None else self.chosen.speedup

    @property
    def tokens_per_second(self) -> float:
        """Expected, of all rows together, where times are milliseconds."""
        return 1000 * self.times.rows * self.speedup / self.times.full

    def mode(self, stop: DraftStop | None = None, sample_drafts: bool = True) -> Plain | Verify:
        """What to give `offramp.engines.text.generate.generate`, with a rule that stops drafting earlier if one is given."""
        if self.chosen is None:
            return Plain()
        given = {} if stop is None else {"stop": stop}
        return Verify(self.chosen.draft_length, sample_drafts=sample_drafts, exit_index=self.chosen.exit_index, **given)

    def marginal(self, bins: AcceptanceBins | None = None) -> MarginalValue:
        """The rule that stops when a draft is no longer worth its time, with the times of the chosen setting, else of the best one."""
        best = self.best
        candidate = next(c for c in self.times.candidates if (c.exit_index, c.head) == (best.exit_index, best.head))
        step = max(candidate.step, 1e-6 * self.times.full)
        given = {} if bins is None else {"bins": bins}
        chance = min(0.99, max(0.01, even_acceptance(best.tokens_per_round, best.draft_length)))
        return MarginalValue(step, max(candidate.round(1) - step, 1e-6 * self.times.full), self.times.full, chance, **given)

    def __str__(self) -> str:
        t = self.times
        lines = [
            f"Plain decoding: {t.full:.4g} {t.unit} a step, {t.rows} rows, context {t.context}, {t.device}",
            "Speculation: off, no setting is expected to be faster"
            if self.chosen is None
            else f"Speculation: exit after block {self.chosen.depth}, head {self.chosen.head}, {self.chosen.draft_length} drafts: "
            f"{self.chosen.speedup:.3f} times plain",
            f"  {'exit':>5}  {'head':<12}{'drafts':>7}{'tokens/round':>14}{'round, ' + t.unit:>15}{'speed-up':>10}",
        ]
        best: dict[tuple[int, str], Prediction] = {}
        for p in self.predictions:  # best first
            best.setdefault((p.depth, p.head), p)
        for p in best.values():
            lines.append(
                f"  {p.depth:>5}  {p.head:<12}{p.draft_length:>7}{p.tokens_per_round:>14.3f}{p.round_time:>15.4g}{p.speedup:>10.3f}"
            )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """JSON data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SpeculationPlan:
        """Inverse of `to_dict`.

        Raises:
            ArtifactError: a field is missing or unknown.
        """
        with reading("The speculation plan"):
            times = dict(data["times"])
            times["candidates"] = tuple(Candidate(**{**c, "deep": tuple(c["deep"])}) for c in times["candidates"])
            chosen = None if data["chosen"] is None else Prediction(**data["chosen"])
            predictions = tuple(Prediction(**p) for p in data["predictions"])
            return cls(Times(**times), chosen, predictions, float(data["margin"]), dict(data["fingerprints"]))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``speculation_plan.json`` into ``folder``, atomically."""
        save_bundle(folder, "speculation_plan", "speculation_plan", self.to_dict())

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> SpeculationPlan:
        """Read what `save` wrote.

        Raises:
            ArtifactError: the file is missing, truncated, altered or foreign.
        """
        content, _ = load_bundle(folder, "speculation_plan", "speculation_plan")
        return cls.from_dict(content)


def even_acceptance(tokens: float, drafts: int) -> float:
    """The constant acceptance that gives so many tokens in a round of so many drafts."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if Acceptance.constant(middle, drafts).tokens[-1] < tokens else (low, middle)
    return low


def choose(
    times: Times, acceptance: Sequence[Acceptance], *, margin: float = 0.0, fingerprints: Mapping[str, str] | None = None
) -> SpeculationPlan:
    """The setting with the most tokens per second, or none.

    Args:
        times: measured or modelled.
        acceptance: of each of its candidates, in order.
        margin: how much faster than plain it must be expected to be, e.g. 0.02; at least 0.
        fingerprints: of the models that these are of, by the name of their heads; `offramp.compile` takes no plan without.

    Raises:
        InvalidInput: not one acceptance for each candidate, or a negative margin.
    """
    if len(acceptance) != len(times.candidates) or not margin >= 0:
        raise InvalidInput(f"{len(times.candidates)} candidates need an acceptance each and margin >= 0, got {len(acceptance)}, {margin}.")
    found = []
    for c, a in zip(times.candidates, acceptance):
        for k in range(1, min(c.most, len(a.tokens) - 1) + 1):
            taken = c.round(k)
            found.append(Prediction(c.exit_index, c.depth, c.head, k, a.tokens[k], taken, a.tokens[k] * times.full / taken))
    found.sort(key=lambda p: (-p.speedup, p.draft_length, p.depth))
    chosen = found[0] if found[0].speedup > 1 + margin else None
    return SpeculationPlan(times, chosen, tuple(found), margin, dict(fingerprints or {}))


def plan_speculation(
    lms: LanguageModel | Mapping[str, LanguageModel],
    texts: Sequence[Sequence[int]],
    *,
    starts: Sequence[int] | None = None,
    rows: int = 1,
    context: int = 128,
    most: int = 6,
    sampling: Sampling | None = None,
    margin: float = 0.0,
    times: Times | None = None,
) -> SpeculationPlan:
    """Measure times, estimate acceptance on calibration texts, choose.

    Args:
        lms: the model with its exits; or several, by the name of their heads, over the same model.
        texts: token ids; best of all, texts that the model wrote.
        starts: how many tokens of each are prompt; see `agreement`.
        rows: of the batch to plan for.
        context: tokens before.
        most: drafts of a round to consider.
        sampling: of the texts to be written; greedy by default.
        margin: see `choose`.
        times: if they were measured already, by `measure` or `measure_rounds` with the same ``lms``.

    Raises:
        InvalidInput: texts are too short, or an argument is out of range.
    """
    named = dict(lms) if isinstance(lms, Mapping) else {"own": lms}
    found: list[Acceptance] = []
    for lm in named.values():
        seen = agreement(lm, texts, starts=starts, sampling=sampling)
        found.extend(Acceptance.of_runs(seen.by_text(e), most) for e in range(len(lm.exits)))
    known = times if times is not None else measure(named, rows=rows, context=context, most=most)
    return choose(known, found, margin=margin, fingerprints={name: fingerprint_of(lm) for name, lm in named.items()})
