"""Decoding as captured rounds: the whole of a step or of a speculation round is one graph, and the host reads its outcome a round late.

The reference is `offramp.engines.text.generate`; this gives the same tokens. All state stands at fixed addresses and every decision is made
on the device, the rule that stops drafting included: a finished row writes nowhere, so that running on for a round changes nothing. Fixed
are the number of rows, the slots of a text, the draft lengths and what is sampled; prompts of any lengths are then served without capturing
again. A round is captured for each of several draft lengths over the same state, and the host may choose another before every round.

On the CPU a "graph" is a plain call: that is how this file is tested.

Shapes: ``B`` rows, ``K`` drafts, ``W`` width of the states, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from offramp.backbones.decoder import Step
from offramp.core.errors import InvalidInput
from offramp.core.modes import evaluating
from offramp.core.types import RuleState
from offramp.engines.capture import Graph, Mailbox, Recorder, Tuning
from offramp.engines.text.draft_lengths import LengthChoice
from offramp.engines.text.rows import Rows
from offramp.engines.text.sampling import Noise, Sampling, accept, accept_greedy, draw
from offramp.engines.text.speculate import Chances
from offramp.engines.text.watch import Board, Watch
from offramp.engines.text.written import Generation, Streamer
from offramp.language import LanguageModel
from offramp.policies.decoding import Verify
from offramp.policies.draft_stop import DraftStop, FixedLength


class Rounds:
    """A captured decoder for ``rows`` texts at a time.

    Args:
        lm: from `attach_lm`.
        rows: texts at a time; fewer may be given.
        slots: most tokens of a text, prompt and all.
        draft_length: most drafts in a round; 0 = plain decoding. Several lengths, ascending, where `generate` is to choose among them.
        exit_index: which exit drafts.
        sampling: what to choose; greedy by default.
        eos_token_id: where a text ends.
        compiled: run the pieces through ``torch.compile``; by default on CUDA. A `Tuning` says what the compiler may try besides.
        stop: whether a row makes another draft. What a captured round computes does not become less by it, but its text is that of the
            reference with this rule.
        sample_drafts: when sampling, draw the drafts too; see `offramp.policies.decoding.Verify`.
    """

    def __init__(
        self,
        lm: LanguageModel,
        rows: int = 1,
        slots: int = 1024,
        draft_length: int | Sequence[int] = 0,
        exit_index: int = 0,
        sampling: Sampling | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        compiled: bool | Tuning | None = None,
        stop: DraftStop | None = None,
        sample_drafts: bool = True,
    ) -> None:
        lengths = (draft_length,) if isinstance(draft_length, int) else tuple(draft_length)
        if not lengths or list(lengths) != sorted(set(lengths)) or rows < 1 or slots < 2 or lengths[0] < 0:
            raise InvalidInput(
                f"rows must be >= 1, slots >= 2 and draft_length >= 0, or several ascending; got {rows}, {slots} and {draft_length}."
            )
        most = lengths[-1]
        if most and not 0 <= exit_index < len(lm.exits):
            raise InvalidInput(
                f"exit_index must be from 0 to {len(lm.exits) - 1}, as the model has {len(lm.exits)} exits; got {exit_index}."
            )
        self.lm, self.model, self.lengths, self.draft_length = lm, lm.decoder, lengths, most
        self.sampling = sampling if sampling is not None else Sampling()
        if self.sampling.repetition_penalty != 1.0:
            raise InvalidInput("Captured rounds know no repetition_penalty; use offramp.engines.text.generate for it.")
        self.device = self.model.device
        self.ends = [] if eos_token_id is None else [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
        self.stop = stop if stop is not None else FixedLength()
        self.fixed = isinstance(self.stop, FixedLength)
        self.sample_drafts = sample_drafts and self.sampling.do_sample
        cuda = self.device.type == "cuda"
        self.recorder = Recorder(self.device, cuda if compiled is None else compiled)
        if self.recorder.tuning.joined_projections:
            self.model = self.model.joined()
        self.exit_index = exit_index
        with torch.inference_mode():
            self.state = Rows(lm, [[0]] * rows, slots - 1, self.sampling, [0] * rows, self.ends, (exit_index,) if most else (), most)
            self.rule: RuleState = {name: value.clone() for name, value in self.stop.begin(rows, most, self.device).items()}
            self.chances = self._chances()
            # Rounds, rows alive, longest row; drafts that were judged and drafts kept, before this round and after it. 56 bytes, which
            # arrive at the host at once.
            self.count = torch.zeros(7, dtype=torch.int64, device=self.device)
            self.tried = torch.zeros(max(1, most), dtype=torch.int64, device=self.device)
            self.kept = torch.zeros_like(self.tried)
            self.passes = torch.zeros((), dtype=torch.int64, device=self.device)
            self.mail = Mailbox(7, self.device)
            self.board = Board(self.state.tokens, self.state.length)
        self.slots = slots
        self.depth = lm.exits[exit_index] if most else len(self.model)
        wrap = self.recorder.wrap
        self._shallow, self._draft, self._observe = wrap(self._run_shallow), wrap(self._make_draft), wrap(self._show)
        self._begin, self._go = wrap(self._open), wrap(self._decide)
        self._deep, self._settle = wrap(self._run_deep), wrap(self._end)
        self._graphs: dict[tuple[int, bool], Graph] = {}

    # What a round is made of. Each piece is compiled by itself, as most run several times in a round. -----------------------------

    def _run_shallow(self, tokens: Tensor, positions: Tensor, running: Tensor) -> Tensor:
        step = self.model.step(self.state.cache, positions[:, None], running[:, None])
        return self.model.run(self.model.embed(tokens[:, None], step), 0, self.depth, step)

    def _make_draft(self, hidden: Tensor, noise: Tensor, positions: Tensor, running: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A draft, the distribution it is from (empty where tokens are compared instead), and how sure the exit was of it."""
        logits = self.lm.draft(hidden, self.exit_index, self._own_step(positions, running))[:, 0]
        if self.sample_drafts:
            q = self.sampling.probabilities(logits)
            token = draw(q, noise)
        else:
            token = logits.argmax(-1)
            q = Sampling().probabilities(logits) if self.sampling.do_sample else logits.new_zeros(len(logits), 0)
        if self.fixed:  # asks nothing
            return token, q, noise
        return token, q, logits.float().softmax(-1).gather(1, token[:, None]).squeeze(1)

    def _show(self, hidden: Tensor, positions: Tensor, running: Tensor) -> None:
        """Let an exit with a cache of its own see a token that it drafts nothing from."""
        self.lm.observe(hidden, self.exit_index, self._own_step(positions, running))

    def _own_step(self, positions: Tensor, running: Tensor) -> Step | None:
        own = self.state.own
        return None if own is None else self.model.step(own, positions[:, None], running[:, None])

    def _open(self, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Position of each row's newest token, that token, and how many drafts it can still use, 0 for rows that are finished."""
        state = self.state
        first = state.length - 1
        room = (state.limit - state.length - 1).clamp(min=0, max=length)
        return first, state.tokens.gather(1, first[:, None]).squeeze(1), torch.where(state.alive, room, 0)

    def _decide(
        self, rule: RuleState, made: int, sure: Tensor, first: Tensor, drafting: Tensor, counts: Tensor, room: Tensor
    ) -> tuple[Tensor, Tensor, RuleState]:
        """After draft ``made``: which rows make another, how many each has, and the rule's state."""
        counts = counts + drafting
        go, after = self.stop.go(rule, made, sure, self.chances.at(first, made))
        return drafting & (counts < room) & go, counts, after

    def _run_deep(self, states: Tensor, first: Tensor, pending: Tensor) -> Tensor:
        place = torch.arange(states.shape[1], device=first.device)
        step = self.model.step(self.state.cache, first[:, None] + place, place < pending[:, None])
        return self.model.logits(self.model.run(states, self.depth, len(self.model), step))

    def _end(self, logits: Tensor, first: Tensor, drafts: Tensor, drafted: Tensor, counts: Tensor, rule: RuleState) -> None:
        state, width = self.state, logits.shape[1]
        if self.sampling.do_sample:
            noise_at = first[:, None] + 1 + torch.arange(width, device=first.device)
            wanted = self.sampling.probabilities(logits)
            kept, after = accept(drafts, drafted, wanted, counts, state.noise.at(noise_at[:, :-1], 1), state.noise.at(noise_at, 2))
        else:
            kept, after = accept_greedy(drafts, logits.argmax(-1), counts)
        for name, value in self.stop.learn(rule, counts, kept).items():
            self.rule[name].copy_(value)
        place = torch.arange(width, device=first.device)
        if width > 1:
            self.tried[: width - 1] += (place[:-1] < counts[:, None]).sum(0)
            self.kept[: width - 1] += (place[:-1] < kept[:, None]).sum(0)
        self.count[3:5] = self.count[5:7]
        self.count[5] += torch.minimum(counts, kept + 1).sum()
        self.count[6] += kept.sum()
        self.passes += state.alive.any()
        written = torch.cat([drafts, after[:, None]], dim=1).scatter(1, kept[:, None], after[:, None])
        depths = torch.where(place < kept[:, None], self.depth, len(self.model))
        state.commit(written, state.taken(written, kept + 1), depths)
        self.count[0] += 1
        self.count[1] = state.alive.sum()
        self.count[2] = state.length.max()

    def _round(self, length: int, watched: bool) -> None:
        state, rule = self.state, self.rule
        first, token, room = self._begin(length)
        # Without a rule every row drafts alike: what lies beyond a row's room is thrown away with the row, and no mask is needed.
        running, drafting, counts = state.alive, room > 0, room if self.fixed else torch.zeros_like(room)
        states: list[Tensor] = []
        drafts: list[Tensor] = []
        drafted: list[Tensor] = []
        for made in range(length):
            hidden = self._shallow(token, first + made, running)
            states.append(hidden)
            chance = state.noise.at((first + made + 1)[:, None], 0).squeeze(1) if self.sample_drafts else first
            token, q, sure = self._draft(hidden, chance, first + made, running)
            drafts.append(token)
            drafted.append(q)
            if not self.fixed:
                running = drafting
                drafting, counts, rule = self._go(rule, made + 1, sure, first, drafting, counts, room)
        hidden = self._shallow(token, first + length, running)
        states.append(hidden)
        if state.own is not None:
            self._observe(hidden, first + length, running)
        logits = self._deep(torch.cat(states, dim=1), first, torch.where(state.alive, counts + 1, 0))
        tried = torch.stack(drafts, dim=1) if drafts else first.new_zeros(state.count, 0)
        q = torch.stack(drafted, dim=1) if drafted else logits.new_zeros(state.count, 0, logits.shape[-1])
        self._settle(logits, first, tried, q, counts, rule)
        if watched:
            self.board.post(state.tokens, state.length)
        self.mail.post(self.count)

    # Running it ------------------------------------------------------------------------------------------------------------------

    def graph(self, length: int | None = None, watched: bool = False) -> Graph:
        """A captured round; captured on first use, with no row alive, so that running it changes nothing.

        Args:
            length: which of the draft lengths; the longest by default.
            watched: whether the host is sent the tokens too.
        """
        key = (self.draft_length if length is None else length, watched)
        if key[0] not in self.lengths:
            raise InvalidInput(f"Rounds were made for the draft lengths {self.lengths}, not for {key[0]}.")
        if key not in self._graphs:
            with torch.inference_mode():
                self.state.alive.zero_()
                self.lm.decoder.captured = True
                self._graphs[key] = self.recorder.graph(lambda: self._round(*key))
        return self._graphs[key]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int = 20,
        seeds: Sequence[int] | None = None,
        choice: LengthChoice | None = None,
        stops: Callable[[list[int]], bool] | None = None,
        streamer: Streamer | None = None,
    ) -> Generation:
        """Continue texts; as `offramp.engines.text.generate.generate` would.

        Args:
            prompts: token ids, at most ``rows`` texts.
            max_new_tokens: most tokens to add to each.
            seeds: of each row's randomness; 0, 1, ... by default.
            choice: chooses the draft length of every round; without it, all rounds have the longest. Greedy texts are the same
                whatever is chosen, sampled ones follow the same law.
            stops: told the tokens of a row so far, says whether the newest is its last. Asked on the host a round late: the row writes
                on for a round or two, and what it wrote too much is cut off.
            streamer: is told of the tokens of the only row, a round late.

        Raises:
            InvalidInput: more texts, or longer, than this was made for; several texts and a streamer.
        """
        longest = max((len(p) for p in prompts), default=0)
        if not 0 < len(prompts) <= self.state.count or longest + max_new_tokens > self.slots:
            raise InvalidInput(
                f"This was made for up to {self.state.count} texts of {self.slots} tokens; got {len(prompts)}, the longest of {longest} "
                f"tokens and {max_new_tokens} to come."
            )
        watch = Watch(prompts, stops, streamer) if stops is not None or streamer is not None else None
        with torch.inference_mode(), evaluating(self.lm.model, self.lm):
            chooser = choice.start() if choice is not None else None
            used = chooser.lengths if chooser is not None else (self.draft_length,)
            graphs = {k: self.graph(k, watch is not None) for k in used}
            state = self._load(prompts, max_new_tokens, list(seeds) if seeds is not None else list(range(len(prompts))))
            first = state.choose(state.prefill())
            state.append(first[:, None], state.alive.long(), torch.full_like(first[:, None], len(self.model)))
            if watch is not None:
                self._stop_rows(watch.saw(state.tokens.cpu(), state.length.cpu()))
            if bool(state.alive.any()):
                self.mail.clear()
                launched, length = 0, used[0] if chooser is None else chooser.length
                while True:
                    graphs[length].replay()
                    launched += 1
                    if launched == 1:
                        continue  # one round is always in flight: the host waits for the one before it
                    news = self.mail.at_least(launched - 1)
                    if watch is not None:
                        self._stop_rows(watch.saw(*self.board.read()))
                    if not news[1] or (watch is not None and watch.over):
                        break
                    if chooser is not None:  # of the round before the one in flight, whether or not that has arrived already
                        length = chooser.saw(*(news[3:5] if news[0] == launched else news[5:7]))
            return self._done(prompts, watch)

    def _stop_rows(self, rows: Sequence[int]) -> None:
        for row in rows:
            self.state.alive[row].fill_(False)  # in the order of the stream, after the round in flight

    def _chances(self) -> Chances:
        return Chances.of(self.state, Verify(max(1, self.draft_length), self.stop))

    def _load(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, seeds: list[int]) -> Rows:
        """Put prompts in place of whatever was written before. Rows without one are not alive."""
        state, spare = self.state, self.state.count - len(prompts)
        given = Rows(self.lm, [*prompts, *([[0]] * spare)], max_new_tokens, self.sampling, [*seeds, *([0] * spare)], self.ends, ())
        width = given.tokens.shape[1]
        state.tokens.zero_()
        state.tokens[:, :width] = given.tokens
        state.depth.zero_()
        for name in ("start", "length", "limit"):
            getattr(state, name).copy_(getattr(given, name))
        state.alive.copy_(torch.arange(state.count, device=self.device) < len(prompts))
        state.noise.values.copy_(Noise.of([*seeds, *([0] * spare)], state.noise.values.shape[1], self.device).values)
        state.reach = max(len(p) for p in prompts)
        state.result = Generation([], [], prompts=[[int(t) for t in p] for p in prompts])
        for name, value in self.stop.begin(state.count, self.draft_length, self.device).items():
            self.rule[name].copy_(value)
        self.chances.values.copy_(self._chances().values)
        for counted in (self.count, self.tried, self.kept, self.passes):
            counted.zero_()
        return state

    def _done(self, prompts: Sequence[Sequence[int]], watch: Watch | None) -> Generation:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        result = self.state.done()
        result.tokens, result.depth = result.tokens[: len(prompts)], result.depth[: len(prompts)]
        result.drafted, result.accepted = self.tried.tolist()[: self.draft_length], self.kept.tolist()[: self.draft_length]
        result.deep_passes = int(self.passes)
        if watch is not None:
            watch.saw(self.state.tokens.cpu(), self.state.length.cpu())
            watch.finish(result)
        return result
