"""How often an exit says what the full model says, from one pass over whole texts, and how many tokens a round of drafts then gains.

It feeds the planner (how many drafts of a round will be kept), the draft-stop rules (which confidence means what) and the calibration of
accepting exits (`offramp.budget.agreement`).

Shapes: ``N`` positions of all texts, ``E`` exits, ``T`` tokens of a text, ``W`` width of the states, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.core.errors import InvalidInput
from offramp.core.modes import evaluating
from offramp.engines.text.sampling import Sampling
from offramp.language import LanguageModel


@dataclass(frozen=True)
class Agreement:
    """Exits against the full model, given the text before each position.

    Attributes:
        exits: after how many blocks each reads.
        agreed: bool ``[N, E]``, whether the most likely tokens are the same.
        confidence: float32 ``[N, E]``, the exit's probability of its most likely token.
        chance: float32 ``[N, E]``, with which verification would keep a draft made there.
        text: int64 ``[N]``, which text, ascending; positions of a text follow one another.
    """

    exits: tuple[int, ...]
    agreed: Tensor
    confidence: Tensor
    chance: Tensor
    text: Tensor

    def by_text(self, exit_index: int) -> list[Tensor]:
        """``chance`` of one exit, ``[T]`` for each text."""
        counts = torch.bincount(self.text)
        return [c for c in self.chance[:, exit_index].split(counts.tolist()) if c.numel()]


def agreement(
    lm: LanguageModel,
    texts: Sequence[Sequence[int]],
    *,
    starts: Sequence[int] | None = None,
    sampling: Sampling | None = None,
    sample_drafts: bool = True,
    chunk: int = 128,
) -> Agreement:
    """Run texts through the model once and compare every exit with the end.

    The figures hold for texts like these. Texts that the model wrote itself are nearest to what it will meet when it writes; where greedy
    texts are given, the kept drafts are exactly those of a verified run.

    Args:
        lm: from `attach_lm`.
        texts: token ids, at least two each.
        starts: how many tokens of each text are prompt and do not count, 1 or more; 1 by default.
        sampling: what is asked of the text; greedy by default. ``repetition_penalty`` is not taken into account.
        sample_drafts: when sampling, whether drafts are drawn or the most likely tokens.
        chunk: positions whose logits are held at a time; heads that attend see whole texts.

    Raises:
        InvalidInput: a text is too short for its start, or the model was changed after it was attached.
    """
    asked = sampling if sampling is not None else Sampling()
    begins = list(starts) if starts is not None else [1] * len(texts)
    if not texts or len(begins) != len(texts) or any(not 1 <= b < len(t) for b, t in zip(begins, texts)):
        raise InvalidInput(
            f"Each text needs a start from 1 to its length less one; got {len(texts)} texts of {[len(t) for t in texts][:8]} tokens and "
            f"starts {begins[:8]}."
        )
    agreed, confidence, chance, index = [], [], [], []
    lm.decoder.check_unchanged()
    with torch.inference_mode(), evaluating(lm.model, lm):
        for number, (text, begin) in enumerate(zip(texts, begins)):
            tokens = torch.as_tensor(text, dtype=torch.int64, device=lm.decoder.device)[None, :-1]  # nothing is known after the last
            states = _states(lm, tokens)
            here: list[list[Tensor]] = []
            whole = [lm.teach(s, e) if lm.heads[e].cached else None for e, s in enumerate(states[:-1])]
            for first in range(begin - 1, tokens.shape[1], chunk):
                at = slice(first, min(first + chunk, tokens.shape[1]))
                p = lm.decoder.logits(states[-1][0, at])
                rows = []
                for e, state in enumerate(states[:-1]):
                    known = whole[e]
                    q = known[0, at] if known is not None else lm.draft(state[:, at], e)[0]
                    rows.append(_compare(p, q, asked, sample_drafts))
                here.append([torch.stack(column, 1) for column in zip(*rows)])
            a, c, k = (torch.cat(parts).cpu() for parts in zip(*here))
            agreed.append(a)
            confidence.append(c)
            chance.append(k)
            index.append(torch.full((a.shape[0],), number, dtype=torch.int64))
    return Agreement(lm.exits, torch.cat(agreed), torch.cat(confidence), torch.cat(chance), torch.cat(index))


def _states(lm: LanguageModel, tokens: Tensor) -> list[Tensor]:
    """States ``[1, T, W]`` at every exit and after the last block."""
    model = lm.decoder
    step = model.step(model.cache(1, tokens.shape[1]), torch.arange(tokens.shape[1], device=tokens.device)[None])
    hidden, start, out = model.embed(tokens, step), 0, []
    for stop in (*lm.exits, len(model)):
        hidden = model.run(hidden, start, stop, step)
        out.append(hidden)
        start = stop
    return out


def _compare(p: Tensor, q: Tensor, asked: Sampling, sample_drafts: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Agreed, confidence and chance ``[T]`` of logits ``[T, V]`` of the model and of an exit."""
    own = q.float().softmax(-1)
    confidence, draft = own.max(-1)
    agreed = p.argmax(-1) == draft
    if not asked.do_sample:
        return agreed, confidence, agreed.float()
    wanted = asked.probabilities(p)
    if sample_drafts:
        kept = torch.minimum(wanted, asked.probabilities(q)).sum(-1)
    else:
        kept = wanted.gather(-1, draft[:, None]).squeeze(-1)
    return agreed, confidence, kept.float().clamp(max=1)


@dataclass(frozen=True)
class Acceptance:
    """Tokens that a row gains in a round.

    Attributes:
        tokens: expected number with 0, 1, ... K drafts; the first is 1.
    """

    tokens: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.tokens) < 2 or self.tokens[0] != 1 or any(not 1 <= t <= k + 1 + 1e-6 for k, t in enumerate(self.tokens)):
            raise InvalidInput(f"tokens must be 1 for no draft and from 1 to k + 1 for k drafts, at least one; got {self.tokens}.")

    @classmethod
    def constant(cls, chance: float, most: int) -> Acceptance:
        """Every draft is kept with the same chance, independently: ``(1 - a^(k+1)) / (1 - a)`` (Leviathan et al. 2023, equation 1)."""
        return cls.by_place([chance] * most)

    @classmethod
    def by_place(cls, chances: Sequence[float]) -> Acceptance:
        """From the chance of each draft of a round to be kept, given that those before it were."""
        if not chances or not all(0 <= c <= 1 for c in chances):
            raise InvalidInput(f"Chances must be in [0, 1], at least one; got {list(chances)}.")
        tokens, reach = [1.0], 1.0
        for c in chances:
            reach *= c
            tokens.append(tokens[-1] + reach)
        return cls(tuple(tokens))

    @classmethod
    def seen(cls, drafted: Sequence[int], accepted: Sequence[int]) -> Acceptance:
        """From the counts of a `Generation` of fixed draft length; a rule that stops makes its later drafts look better than they are."""
        if len(drafted) != len(accepted) or not drafted or min(drafted) < 1:
            raise InvalidInput(f"Every place of a round needs drafts that were tried, got {list(drafted)} and {list(accepted)}.")
        tokens = [1.0]
        for d, a in zip(drafted, accepted):
            tokens.append(tokens[-1] + a / d)
        return cls(tuple(tokens))

    @classmethod
    def of_runs(cls, texts: Sequence[Tensor], most: int) -> Acceptance:
        """By walking through texts, given the chance ``[T]`` of a draft to be kept at each position.

        Easy and hard positions come in runs, and rounds do not start anywhere: each starts behind a token that the full model chose,
        often since the exit had it wrong. So the mean chance says little, and the rounds are followed instead: the probability that one
        starts at each position, exactly, and what it gains from there.

        Raises:
            InvalidInput: no text has more than ``most`` positions.
        """
        if most < 1:
            raise InvalidInput(f"most must be at least 1, got {most}.")
        values = [[min(1.0, max(0.0, float(c))) for c in t.tolist()] for t in texts if t.numel() > most]
        if not values:
            raise InvalidInput(f"No text is longer than {most} positions; give longer texts, or plan shorter rounds.")
        tokens = [1.0]
        for k in range(1, most + 1):
            rounds = gained = 0.0
            for chances in values:
                starts = [1.0] + [0.0] * (len(chances) + 1)
                for t in range(len(chances) - k):  # a round near the end of a text would be cut short
                    weight = starts[t]
                    if weight == 0.0:
                        continue
                    reach, total = weight, weight
                    for j in range(k):
                        c = chances[t + j]
                        starts[t + j + 1] += reach * (1 - c)
                        reach *= c
                        total += reach
                    starts[t + k + 1] += reach
                    rounds, gained = rounds + weight, gained + total
            tokens.append(gained / rounds)
        return cls(tuple(tokens))
