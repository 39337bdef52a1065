"""Decoding as captured rounds: the whole of a step or of a speculation round is one graph, and the host reads its outcome a round late.

The reference is `offramp.engines.generate`; this gives the same tokens. All state stands at fixed addresses and every decision is made on
the device: a finished row writes nowhere, so that running on for a round changes nothing. Fixed are the number of rows, the slots of a
text, the draft length and what is sampled; prompts of any lengths are then served without capturing again.

On the CPU a "graph" is a plain call: that is how this file is tested.

Shapes: ``B`` rows, ``K`` drafts, ``W`` width of the states, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from offramp.backbones.decoder import Step
from offramp.core.errors import InvalidInput
from offramp.core.modes import evaluating
from offramp.engines.capture import Graph, Mailbox, Recorder
from offramp.engines.decoding import Generation, Rows
from offramp.engines.sampling import Noise, Sampling, accept, accept_greedy, draw
from offramp.language import LanguageModel


class Rounds:
    """A captured decoder for ``rows`` texts at a time.

    Args:
        lm: from `attach_lm`.
        rows: texts at a time; fewer may be given.
        slots: most tokens of a text, prompt and all.
        draft_length: drafts in a round; 0 = plain decoding.
        exit_index: which exit drafts.
        sampling: what to choose; greedy by default.
        eos_token_id: where a text ends.
        compiled: run the pieces through ``torch.compile``; by default on CUDA.
    """

    def __init__(
        self,
        lm: LanguageModel,
        rows: int = 1,
        slots: int = 1024,
        draft_length: int = 0,
        exit_index: int = 0,
        sampling: Sampling | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        compiled: bool | None = None,
    ) -> None:
        if rows < 1 or slots < 2 or draft_length < 0:
            raise InvalidInput(f"rows must be >= 1, slots >= 2 and draft_length >= 0, got {rows}, {slots} and {draft_length}.")
        if draft_length and not 0 <= exit_index < len(lm.exits):
            raise InvalidInput(
                f"exit_index must be from 0 to {len(lm.exits) - 1}, as the model has {len(lm.exits)} exits; got {exit_index}."
            )
        self.lm, self.model, self.draft_length = lm, lm.decoder, draft_length
        self.sampling = sampling if sampling is not None else Sampling()
        if self.sampling.repetition_penalty != 1.0:
            raise InvalidInput("Captured rounds know no repetition_penalty; use offramp.engines.generate for it.")
        self.device = self.model.device
        self.ends = [] if eos_token_id is None else [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
        cuda = self.device.type == "cuda"
        self.recorder = Recorder(self.device, cuda if compiled is None else compiled)
        self.exit_index = exit_index
        with torch.inference_mode():
            self.state = Rows(
                lm, [[0]] * rows, slots - 1, self.sampling, [0] * rows, self.ends, exit_index if draft_length else None, draft_length
            )
            self.count = torch.zeros(3, dtype=torch.int64, device=self.device)  # rounds, rows alive, longest row
            self.tried = torch.zeros(max(1, draft_length), dtype=torch.int64, device=self.device)
            self.kept = torch.zeros_like(self.tried)
            self.mail = Mailbox(3, self.device)
        self.slots = slots
        self.depth = lm.exits[exit_index] if draft_length else len(self.model)
        wrap = self.recorder.wrap
        self._shallow, self._draft, self._observe = wrap(self._run_shallow), wrap(self._make_draft), wrap(self._show)
        self._deep, self._settle = wrap(self._run_deep), wrap(self._end)
        self._graph: Graph | None = None

    # What a round is made of. Each piece is compiled by itself, as the first two run several times in a round. ---------------------

    def _run_shallow(self, tokens: Tensor, positions: Tensor, running: Tensor) -> Tensor:
        step = self.model.step(self.state.cache, positions[:, None], running[:, None])
        return self.model.run(self.model.embed(tokens[:, None], step), 0, self.depth, step)

    def _make_draft(self, hidden: Tensor, noise: Tensor, positions: Tensor, running: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.lm.draft(hidden, self.exit_index, self._own_step(positions, running))[:, 0]
        if not self.sampling.do_sample:  # no distribution is needed to compare tokens
            return logits.argmax(-1), logits[:, :0]
        q = self.sampling.probabilities(logits)
        return draw(q, noise), q

    def _show(self, hidden: Tensor, positions: Tensor, running: Tensor) -> None:
        """Let an exit with a cache of its own see a token that it drafts nothing from."""
        self.lm.observe(hidden, self.exit_index, self._own_step(positions, running))

    def _own_step(self, positions: Tensor, running: Tensor) -> Step | None:
        own = self.state.own
        return None if own is None else self.model.step(own, positions[:, None], running[:, None])

    def _run_deep(self, states: Tensor, first: Tensor, alive: Tensor) -> Tensor:
        positions = first[:, None] + torch.arange(states.shape[1], device=first.device)
        step = self.model.step(self.state.cache, positions, alive[:, None].expand_as(positions))
        return self.model.logits(self.model.run(states, self.depth, len(self.model), step))

    def _end(self, logits: Tensor, first: Tensor, drafts: Tensor, drafted: Tensor) -> None:
        state, width = self.state, logits.shape[1]
        room = (state.limit - state.length - 1).clamp(min=0, max=self.draft_length)
        if self.sampling.do_sample:
            noise_at = first[:, None] + 1 + torch.arange(width, device=first.device)
            wanted = self.sampling.probabilities(logits)
            kept, after = accept(drafts, drafted, wanted, room, state.noise.at(noise_at[:, :-1], 1), state.noise.at(noise_at, 2))
        else:
            kept, after = accept_greedy(drafts, logits.argmax(-1), room)
        place = torch.arange(width, device=first.device)
        if width > 1:
            self.tried += (state.alive[:, None] & (place[:-1] < room[:, None])).sum(0)
            self.kept += (state.alive[:, None] & (place[:-1] < kept[:, None])).sum(0)
        written = torch.cat([drafts, after[:, None]], dim=1).scatter(1, kept[:, None], after[:, None])
        depths = torch.where(place < kept[:, None], self.depth, len(self.model))
        state.commit(written, state.taken(written, kept + 1), depths)
        self.count[0] += 1
        self.count[1] = state.alive.sum()
        self.count[2] = state.length.max()

    def _round(self) -> None:
        state = self.state
        first = state.length - 1
        token = state.tokens.gather(1, first[:, None]).squeeze(1)
        states: list[Tensor] = []
        drafts: list[Tensor] = []
        drafted: list[Tensor] = []
        for made in range(self.draft_length + 1):
            hidden = self._shallow(token, first + made, state.alive)
            states.append(hidden)
            if made < self.draft_length:
                chance = state.noise.at((first + made + 1)[:, None], 0).squeeze(1) if self.sampling.do_sample else first
                token, q = self._draft(hidden, chance, first + made, state.alive)
                drafts.append(token)
                drafted.append(q)
            elif state.own is not None:
                self._observe(hidden, first + made, state.alive)
        logits = self._deep(torch.cat(states, dim=1), first, state.alive)
        empty = first.new_zeros(state.count, 0)
        tried = torch.stack(drafts, dim=1) if drafts else empty
        q = torch.stack(drafted, dim=1) if drafted else logits.new_zeros(state.count, 0, logits.shape[-1])
        self._settle(logits, first, tried, q)
        self.mail.post(self.count)

    # Running it ------------------------------------------------------------------------------------------------------------------

    def graph(self) -> Graph:
        """The captured round; captured on first use, with no row alive, so that running it changes nothing."""
        if self._graph is None:
            with torch.inference_mode():
                self.state.alive.zero_()
                self._graph = self.recorder.graph(self._round)
        return self._graph

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int = 20, seeds: Sequence[int] | None = None) -> Generation:
        """Continue texts; as `offramp.engines.generate.generate` would.

        Args:
            prompts: token ids, at most ``rows`` texts.
            max_new_tokens: most tokens to add to each.
            seeds: of each row's randomness; 0, 1, ... by default.

        Raises:
            InvalidInput: more texts, or longer, than this was made for.
        """
        longest = max((len(p) for p in prompts), default=0)
        if not 0 < len(prompts) <= self.state.count or longest + max_new_tokens > self.slots:
            raise InvalidInput(
                f"This was made for up to {self.state.count} texts of {self.slots} tokens; got {len(prompts)}, the longest of {longest} "
                f"tokens and {max_new_tokens} to come."
            )
        with torch.inference_mode(), evaluating(self.lm.model, self.lm):
            graph = self.graph()
            state = self._load(prompts, max_new_tokens, list(seeds) if seeds is not None else list(range(len(prompts))))
            first = state.choose(state.prefill())
            state.append(first[:, None], state.alive.long(), torch.full_like(first[:, None], len(self.model)))
            launched = 0
            if not bool(state.alive.any()):
                return self._done(len(prompts), 0)
            self.mail.clear()
            while True:
                graph.replay()
                launched += 1
                # One round is always in flight: the host waits for the one before it.
                if launched > 1 and not self.mail.at_least(launched - 1)[1]:
                    break
            return self._done(len(prompts), launched)

    def _load(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, seeds: list[int]) -> Rows:
        """Put prompts in place of whatever was written before. Rows without one are not alive."""
        state, spare = self.state, self.state.count - len(prompts)
        given = Rows(self.lm, [*prompts, *([[0]] * spare)], max_new_tokens, self.sampling, [*seeds, *([0] * spare)], self.ends, None)
        width = given.tokens.shape[1]
        state.tokens.zero_()
        state.tokens[:, :width] = given.tokens
        state.depth.zero_()
        for name in ("start", "length", "limit"):
            getattr(state, name).copy_(getattr(given, name))
        state.alive.copy_(torch.arange(state.count, device=self.device) < len(prompts))
        state.noise.values.copy_(Noise.of([*seeds, *([0] * spare)], state.noise.values.shape[1], self.device).values)
        state.reach = max(len(p) for p in prompts)
        state.result = Generation([], [])
        self.count.zero_()
        self.tried.zero_()
        self.kept.zero_()
        return state

    def _done(self, prompts: int, launched: int) -> Generation:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        result = self.state.done()
        result.tokens, result.depth = result.tokens[:prompts], result.depth[:prompts]
        result.drafted, result.accepted = self.tried.tolist()[: self.draft_length], self.kept.tolist()[: self.draft_length]
        result.deep_passes = launched
        return result
