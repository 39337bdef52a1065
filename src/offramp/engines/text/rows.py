"""What every way of decoding shares: the rows of a batch, each at its own position, and passes over parts of the model.

A row holds ``length`` tokens, the newest of which no block has seen. Blocks before the first exit have seen all others; blocks behind an
exit may lag by the tokens that left there, whose states are kept until one pass brings them up. A pass to the end yields the model's own
logits for each of them: to verify drafts, to learn how often an accepted token was the model's own, or just to fill the cache.

Shapes: ``B`` rows, ``Q`` tokens of a row in one pass, ``W`` width of the states, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from offramp.backbones.decoder import Step
from offramp.backbones.kv import KVCache
from offramp.core.errors import InvalidInput
from offramp.engines.text.sampling import Noise, Sampling, draw
from offramp.engines.text.written import Generation, Streamer
from offramp.language import LanguageModel

READ = 64
"""Slots are read in multiples of this many, so that attention does not run over the unused part of a cache."""


class Rows:
    """A batch of texts being written.

    Args:
        lm: the model with its exits.
        prompts: token ids of each row, at least one each, lengths may differ.
        max_new_tokens: most tokens to add to each.
        sampling: what to choose.
        seeds: of each row's randomness.
        ends: token ids after which a row is finished.
        exits: which exits are used, by number, ascending; heads of others see nothing.
        spare: tokens that may be tried beyond the last.
        stops: told the tokens of a row so far, says whether the newest is its last.
        streamer: is told of the tokens of the only row.

    Raises:
        InvalidInput: an argument is out of range, or the model was changed after exits were attached to it; says which.
    """

    def __init__(
        self,
        lm: LanguageModel,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling,
        seeds: Sequence[int],
        ends: Sequence[int] = (),
        exits: Sequence[int] = (0,),
        spare: int = 0,
        stops: Callable[[list[int]], bool] | None = None,
        streamer: Streamer | None = None,
    ) -> None:
        if not prompts or any(len(p) == 0 for p in prompts):
            raise InvalidInput("Every prompt needs at least one token; give a begin-of-text token for an empty one.")
        if max_new_tokens < 1 or len(seeds) != len(prompts):
            raise InvalidInput(f"max_new_tokens must be >= 1 and seeds one per prompt; got {max_new_tokens} and {len(seeds)} seeds.")
        lm.decoder.check_unchanged()  # here, as every way of writing begins with rows
        lm.check_heads()
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
                wrong = next(t for t in given.tolist() if not 0 <= t < self.model.vocabulary)
                raise InvalidInput(
                    f"Prompt {row} has the token id {wrong}; ids of this model are 0 to {self.model.vocabulary - 1}. Is the tokenizer the "
                    "model's own?"
                )
            self.tokens[row, : len(prompt)] = given
        self.start = torch.tensor(lengths, device=device)
        self.length = self.start.clone()
        self.limit = self.start + max_new_tokens
        self.alive = torch.ones(len(prompts), dtype=torch.bool, device=device)
        self.ends = torch.tensor(sorted(ends), dtype=torch.int64, device=device)
        self.noise = Noise.of(list(seeds), slots + spare + 1, device)
        self.exits = tuple(exits)
        self.depth_of_exit = lm.exits[self.exits[0]] if self.exits else len(self.model)
        own = {e: lm.own_cache(e, len(prompts), slots + spare) for e in self.exits}
        self._own: dict[int, KVCache] = {e: cache for e, cache in own.items() if cache is not None}
        self._now: Step | None = None
        self.ran = torch.zeros((), dtype=torch.int64, device=device)  # tokens times blocks, prompts apart
        self.projected = self.ran.clone()
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

    @property
    def own(self) -> KVCache | None:
        """Cache of the first used exit's head, if it has one."""
        return self._own.get(self.exits[0]) if self.exits else None

    def run(self, first: Tensor, counts: Tensor, width: int, start: int, stop: int, states: Tensor | None = None) -> Tensor:
        """States ``[B, width, W]`` after block ``stop - 1`` for ``counts[b]`` tokens of each row from position ``first[b]`` on.

        Tokens beyond a row's count leave no trace. ``states`` are those before block ``start``; the tokens' own embeddings by default.
        """
        step = self._step(first, counts, width)
        self.ran += counts.sum() * (stop - start)
        if states is None:
            states = self.model.embed(self.tokens.gather(1, step.positions), step)
        for exit_index in self._own:
            depth = self.lm.exits[exit_index]
            if start < depth < stop:
                states, start = self.model.run(states, start, depth, step), depth
                self.observe(states, exit_index)
        return self.model.run(states, start, stop, step)

    def run_ranges(self, ranges: Sequence[tuple[int, int]], first: Tensor, counts: Tensor, width: int) -> Tensor:
        """`run` over some ranges of blocks, ``start`` to ``stop - 1`` each, one at least, the others jumped."""
        (start, stop), *others = ranges
        hidden = self.run(first, counts, width, start, stop)
        for start, stop in others:
            hidden = self.run(first, counts, width, start, stop, hidden)
        return hidden

    def project(self, first: Tensor, counts: Tensor, start: int, stop: int, states: Tensor) -> None:
        """Blocks ``start`` to ``stop - 1`` make their keys and values from ``states`` ``[B, width, W]`` and do nothing else; see `run`."""
        self.projected += counts.sum() * (stop - start)
        self.model.project(states, start, stop, self._step(first, counts, states.shape[1]))

    def _step(self, first: Tensor, counts: Tensor, width: int) -> Step:
        offset = torch.arange(width, device=first.device)
        length = min(self.cache.slots, -(-(self.reach + self.spare) // READ) * READ)  # no counted token lies beyond
        self._now = self.model.step(self.cache, first[:, None] + offset, offset < counts[:, None], length)
        return self._now

    def newest(self, hidden: Tensor, first: Tensor, counts: Tensor, exit_index: int) -> Tensor:
        """Of states ``[B, Q, W]`` that the last `run` to an exit gave, that of each row's last token ``[B, 1, W]``, to be drafted from.

        The exit's head is shown the tokens before it.
        """
        if hidden.shape[1] == 1:
            return hidden
        self.observe(hidden, exit_index)
        last = (counts - 1).clamp(min=0)
        self._step(first + last, (counts > 0).long(), 1)
        return hidden.gather(1, last[:, None, None].expand(-1, 1, hidden.shape[2]))

    def draft(self, hidden: Tensor, exit_index: int | None = None) -> Tensor:
        """Logits ``[B, Q, V]`` of an exit (the first by default) from its states ``[B, Q, W]``, which the last `run` to it gave."""
        exit_index = self.exits[0] if exit_index is None else exit_index
        return self.lm.draft(hidden, exit_index, self._own_step(exit_index))

    def observe(self, hidden: Tensor, exit_index: int | None = None) -> None:
        """Show an exit's head states that nothing is drafted from, so that its cache lacks none. For heads without a cache, nothing."""
        exit_index = self.exits[0] if exit_index is None else exit_index
        if exit_index in self._own:
            self.lm.observe(hidden, exit_index, self._own_step(exit_index))

    def _own_step(self, exit_index: int) -> Step | None:
        own = self._own.get(exit_index)
        return None if own is None or self._now is None else replace(self._now, cache=own)

    def prefill(self, ranges: Sequence[tuple[int, int]] | None = None, width: int | None = None) -> Tensor:
        """Run every prompt. Returns the logits ``[B, V]`` of its last token.

        Args:
            ranges: of blocks that run, ``start`` to ``stop - 1`` each; all by default.
            width: tokens of a row in the pass, at least the longest prompt's, which it is by default.
        """
        width = int(self.start.max()) if width is None else width
        hidden = self.run_ranges(ranges if ranges is not None else [(0, len(self.model))], torch.zeros_like(self.start), self.start, width)
        self.ran.zero_()
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

    def tally(self) -> None:
        """Note how many blocks ran."""
        self.result.blocks_run, self.result.blocks_projected = int(self.ran), int(self.projected)
        self.result.blocks_plain = len(self.model) * int((self.length - self.start - 1).clamp(min=0).sum())

    def done(self) -> Generation:
        """The result."""
        for row in range(self.count):
            first, last = int(self.start[row]), int(self.length[row])
            self.result.tokens.append(self.tokens[row, first:last].tolist())
            self.result.depth.append(self.depth[row, first:last].tolist())
        return self.result
