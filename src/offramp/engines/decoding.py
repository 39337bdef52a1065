"""What every way of decoding shares: the rows of a batch, each at its own position, and passes over parts of the model.

A row holds ``length`` tokens, the newest of which no block has seen. Blocks before the exit have seen all others; blocks behind it may lag
by the row's *pending* tokens, whose states at the exit are kept until one pass brings them up. That pass yields the model's own logits for
each of them: to verify drafts, to learn how often an accepted token was the model's own, or just to fill the cache.

Shapes: ``B`` rows, ``Q`` tokens of a row in one pass, ``M`` most pending tokens, ``W`` width of the states, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from offramp.backbones.decoder import Step
from offramp.core.errors import InvalidInput
from offramp.engines.sampling import Noise, Sampling, draw
from offramp.language import LanguageModel

READ = 64
"""Slots are read in multiples of this many, so that attention does not run over the unused part of a cache."""


class Streamer(Protocol):
    """What is told of new tokens while they are written; transformers' streamers are such."""

    def put(self, value: Tensor) -> None:
        """Take tokens on the CPU: the prompt ``[1, P]`` first, then what is written ``[N]``, one or more at a time."""

    def end(self) -> None:
        """Nothing follows."""


@dataclass
class Generation:
    """What was written.

    Attributes:
        tokens: new token ids of each row, up to and with the end token.
        depth: for each of them after how many blocks it was decided.
        drafted: drafts tried at each place of a round, from the first on.
        accepted: how many of them were kept.
        audited: accepted tokens that a full pass has looked at since.
        disagreed: those of them that the full model would have chosen otherwise.
        deep_passes: passes over the blocks behind the exit; of plain decoding, all steps.
        prompts: token ids of each row's prompt.
        pad_token_id: what fills `sequences`.
    """

    tokens: list[list[int]]
    depth: list[list[int]]
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    audited: int = 0
    disagreed: int = 0
    deep_passes: int = 0
    prompts: list[list[int]] = field(default_factory=list)
    pad_token_id: int = 0

    @property
    def sequences(self) -> Tensor:
        """Prompts and new tokens, int64 ``[B, P + N]``: prompts padded on the left, new tokens on the right, as transformers has them."""
        before, after = max(map(len, self.prompts)), max(map(len, self.tokens))
        pad = self.pad_token_id
        rows = zip(self.prompts, self.tokens, strict=True)
        return torch.tensor([[pad] * (before - len(p)) + p + new + [pad] * (after - len(new)) for p, new in rows])

    @property
    def acceptance(self) -> float:
        """Share of tried drafts that were kept."""
        return sum(self.accepted) / max(1, sum(self.drafted))

    @property
    def tokens_per_pass(self) -> float:
        """New tokens for each deep pass of a row."""
        return sum(map(len, self.tokens)) / max(1, self.deep_passes * len(self.tokens))


class Rows:
    """A batch of texts being written.

    Args:
        lm: the model with its exits.
        prompts: token ids of each row, at least one each, lengths may differ.
        max_new_tokens: most tokens to add to each.
        sampling: what to choose.
        seeds: of each row's randomness.
        ends: token ids after which a row is finished.
        exit_index: which exit is used, or ``None`` for none; a head with a cache of its own then sees nothing.
        spare: tokens that may be tried beyond the last.
        stops: told the tokens of a row so far, says whether the newest is its last.
        streamer: is told of the tokens of the only row.
    """

    def __init__(
        self,
        lm: LanguageModel,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling,
        seeds: Sequence[int],
        ends: Sequence[int] = (),
        exit_index: int | None = 0,
        spare: int = 0,
        stops: Callable[[list[int]], bool] | None = None,
        streamer: Streamer | None = None,
    ) -> None:
        if not prompts or any(len(p) == 0 for p in prompts):
            raise InvalidInput("Every prompt needs at least one token; give a begin-of-text token for an empty one.")
        if max_new_tokens < 1 or len(seeds) != len(prompts):
            raise InvalidInput(f"max_new_tokens must be >= 1 and seeds one per prompt; got {max_new_tokens} and {len(seeds)} seeds.")
        self.lm, self.model, self.sampling = lm, lm.decoder, sampling
        device = self.model.device
        lengths = [len(p) for p in prompts]
        slots = max(lengths) + max_new_tokens
        limit = self.model.max_positions
        if limit is not None and slots - 1 > limit:  # the last token is written and not read
            raise InvalidInput(
                f"The longest prompt has {max(lengths)} tokens and max_new_tokens is {max_new_tokens}, together more than the {limit} "
                f"positions that the model has (and one token after them). Ask for at most {max(0, limit + 1 - max(lengths))} new tokens "
                "or shorten the prompt."
            )
        if streamer is not None and len(prompts) != 1:
            raise InvalidInput(f"A streamer takes the tokens of one text, got {len(prompts)} prompts; give them one at a time.")
        self.stops, self.streamer, self.spare = stops, streamer, spare
        self.cache = self.model.cache(len(prompts), slots + spare)
        self.tokens = torch.zeros(len(prompts), slots + spare + 1, dtype=torch.int64, device=device)
        for row, prompt in enumerate(prompts):
            given = torch.as_tensor(prompt, dtype=torch.int64)
            if given.min() < 0 or given.max() >= self.model.vocabulary:
                raise InvalidInput(f"Prompt {row} has token ids outside 0 to {self.model.vocabulary - 1}.")
            self.tokens[row, : len(prompt)] = given
        self.start = torch.tensor(lengths, device=device)
        self.length = self.start.clone()
        self.limit = self.start + max_new_tokens
        self.alive = torch.ones(len(prompts), dtype=torch.bool, device=device)
        self.ends = torch.tensor(sorted(ends), dtype=torch.int64, device=device)
        self.noise = Noise.of(list(seeds), slots + spare + 1, device)
        self.exit_index = exit_index or 0
        self.depth_of_exit = lm.exits[self.exit_index] if lm.exits else len(self.model)
        self.own = None if exit_index is None or not lm.exits else lm.own_cache(exit_index, len(prompts), slots + spare)
        self._at_exit: Step | None = None
        self.depth = torch.zeros_like(self.tokens)
        self.result = Generation([], [], prompts=[[int(t) for t in p] for p in prompts])
        self.seen = torch.zeros(len(prompts), self.model.vocabulary, dtype=torch.bool, device=device)
        if sampling.repetition_penalty != 1.0:
            for row, prompt in enumerate(prompts):
                self.seen[row, torch.as_tensor(prompt, device=device)] = True
        self.reach = max(lengths)  # the host knows no row that is longer

    @property
    def count(self) -> int:
        return self.tokens.shape[0]

    def run(self, first: Tensor, counts: Tensor, width: int, start: int, stop: int, states: Tensor | None = None) -> Tensor:
        """States ``[B, width, W]`` after block ``stop - 1`` for ``counts[b]`` tokens of each row from position ``first[b]`` on.

        Tokens beyond a row's count leave no trace. ``states`` are those before block ``start``; the tokens' own at block 0.
        """
        offset = torch.arange(width, device=first.device)
        positions = first[:, None] + offset
        counted = offset < counts[:, None]
        length = min(self.cache.slots, -(-(self.reach + self.spare) // READ) * READ)  # no counted token lies beyond
        step = self.model.step(self.cache, positions, counted, length)
        if states is None:
            states = self.model.embed(self.tokens.gather(1, step.positions), step)
        if self.own is not None and start < self.depth_of_exit < stop:
            states = self.model.run(states, start, self.depth_of_exit, step)
            self._at_exit, start = step, self.depth_of_exit
            self.observe(states)
        elif stop == self.depth_of_exit:
            self._at_exit = step
        return self.model.run(states, start, stop, step)

    def draft(self, hidden: Tensor) -> Tensor:
        """Logits ``[B, Q, V]`` of the exit from its states ``[B, Q, W]``, which the last `run` up to the exit gave."""
        return self.lm.draft(hidden, self.exit_index, self._own_step())

    def observe(self, hidden: Tensor) -> None:
        """Show the exit's head states that nothing is drafted from, so that its cache lacks none. For heads without a cache, nothing."""
        if self.own is not None:
            self.lm.observe(hidden, self.exit_index, self._own_step())

    def _own_step(self) -> Step | None:
        return None if self.own is None or self._at_exit is None else replace(self._at_exit, cache=self.own)

    def prefill(self) -> Tensor:
        """Run every prompt through all blocks. Returns the logits ``[B, V]`` of its last token."""
        width = int(self.start.max())
        zero = torch.zeros_like(self.start)
        hidden = self.run(zero, self.start, width, 0, len(self.model))
        return self.model.logits(hidden[torch.arange(self.count, device=hidden.device), self.start - 1])

    def choose(self, logits: Tensor, purpose: int = 2, ahead: int = 0) -> Tensor:
        """The next token (int64 ``[B]``) by ``logits`` ``[B, V]``, ``ahead`` places after the row's next."""
        if not self.sampling.do_sample:
            return self.sampling.penalised(logits, self.seen).argmax(-1)
        wanted = self.sampling.probabilities(self.sampling.penalised(logits, self.seen))
        return draw(wanted, self.noise.at((self.length + ahead)[:, None], purpose).squeeze(1))

    def wanted(self, logits: Tensor, positions: Tensor) -> Tensor:
        """What is chosen (int64 ``[B, Q]``) by ``logits`` ``[B, Q, V]`` for the given positions, of the text as it is before each."""
        if self.sampling.repetition_penalty != 1.0:
            before = torch.arange(self.tokens.shape[1], device=positions.device) < positions[..., None]
            ids = self.tokens[:, None].expand(before.shape)
            seen = torch.zeros(logits.shape, dtype=torch.int64, device=logits.device).scatter_add_(2, ids, before.long()) > 0
            logits = self.sampling.penalised(logits, seen)
        if not self.sampling.do_sample:
            return logits.argmax(-1)
        return draw(self.sampling.probabilities(logits), self.noise.at(positions, 2))

    def taken(self, tokens: Tensor, counts: Tensor) -> Tensor:
        """Which of ``tokens`` ``[B, Q]`` are added (bool): the first ``counts[b]`` of rows alive, up to their end token or limit."""
        place = torch.arange(tokens.shape[1], device=tokens.device)
        taken = (place < counts[:, None]) & self.alive[:, None] & (self.length[:, None] + place < self.limit[:, None])
        if self.ends.numel():
            ended = torch.isin(tokens, self.ends)
            taken &= (ended.long().cumsum(1) - ended.long()) == 0  # up to and with the first end
        return taken

    def commit(self, tokens: Tensor, taken: Tensor, depths: Tensor) -> None:
        """Add what is taken, without a look by the host."""
        place = torch.arange(tokens.shape[1], device=tokens.device)
        at = torch.where(taken, self.length[:, None] + place, self.tokens.shape[1] - 1)
        self.tokens.scatter_(1, at, torch.where(taken, tokens, 0))
        self.depth.scatter_(1, at, torch.where(taken, depths, 0))
        added = taken.sum(1)
        self.length += added
        last = self.tokens.gather(1, (self.length - 1)[:, None]).squeeze(1)
        self.alive &= ~((self.length >= self.limit) | (torch.isin(last, self.ends) & (added > 0)))

    def append(self, tokens: Tensor, counts: Tensor, depths: Tensor) -> None:
        """Add the first ``counts[b]`` of ``tokens`` ``[B, Q]`` to the rows that are alive, up to their end token, stop string or limit."""
        taken = self.taken(tokens, counts)
        stopped = self._stop(self.stops, tokens, taken) if self.stops is not None else None
        if self.sampling.repetition_penalty != 1.0:
            mark = torch.zeros_like(self.seen).scatter_(1, tokens, taken) if tokens.shape[1] == 1 else self._marks(tokens, taken)
            self.seen |= mark
        self.commit(tokens, taken, depths)
        if stopped is not None:
            self.alive &= ~stopped
        self.reach = int(self.length.max())
        if self.streamer is not None and bool(taken.any()):
            self.streamer.put(tokens[0, : int(taken.sum())].cpu())

    def _stop(self, stops: Callable[[list[int]], bool], tokens: Tensor, taken: Tensor) -> Tensor:
        """Cut what is taken after the first token that stops a row. Returns the rows that stop (bool ``[B]``)."""
        stopped = torch.zeros_like(self.alive)
        for row, (new, count) in enumerate(zip(tokens.tolist(), taken.sum(1).tolist(), strict=True)):
            text = self.tokens[row, : int(self.length[row])].tolist() if count else []
            for place in range(count):
                text.append(new[place])
                if stops(text):
                    stopped[row] = True
                    taken[row, place + 1 :] = False
                    break
        return stopped

    def _marks(self, tokens: Tensor, taken: Tensor) -> Tensor:
        counts = torch.zeros(self.seen.shape, dtype=torch.int64, device=self.seen.device)
        return counts.scatter_add_(1, tokens, taken.long()) > 0

    def done(self) -> Generation:
        """The result."""
        for row in range(self.count):
            first, last = int(self.start[row]), int(self.length[row])
            self.result.tokens.append(self.tokens[row, first:last].tolist())
            self.result.depth.append(self.depth[row, first:last].tolist())
        return self.result
