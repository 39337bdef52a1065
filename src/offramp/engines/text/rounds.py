"""Decoding as captured rounds: the whole of a step or of a round of drafts is one graph, and the host reads its outcome a round late.

The reference is `offramp.engines.text.generate`; this gives the same tokens. All state stands at fixed addresses and every decision is made
on the device, the rule that stops drafting and the threshold that lets a token leave included: a finished row writes nowhere, so that
running on for a round changes nothing. Fixed are the number of rows, the slots of a text, the lengths of rounds and what is sampled;
prompts of any lengths are then served without capturing again. What a round computes is in `round_verify.py` and `round_accept.py`. It is
captured for each of several lengths over the same state, and the host may choose another before every round.

A graph reads weights where they stood when it was captured. Values that change there are followed; where weights now stand elsewhere, are
of another type, or belong to other modules, everything is captured anew before the next text (`Rounds.renew`). Threads that share rounds
wait for each other.

On the CPU a "graph" is a plain call: that is how this file is tested.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from offramp.core.errors import InvalidInput
from offramp.core.modes import evaluating
from offramp.engines.capture import Graph, Mailbox, Recorder, Tuning
from offramp.engines.standing import standing
from offramp.engines.text.draft_lengths import LengthChoice
from offramp.engines.text.generate import exits
from offramp.engines.text.round_accept import AcceptRound, fits
from offramp.engines.text.round_parts import Round
from offramp.engines.text.round_prompt import PromptPass
from offramp.engines.text.round_verify import VerifyRound
from offramp.engines.text.rows import Rows
from offramp.engines.text.sampling import Noise, Sampling
from offramp.engines.text.watch import Board, Watch
from offramp.engines.text.written import Generation, Streamer
from offramp.engines.turn import Turn
from offramp.language import LanguageModel
from offramp.policies.decoding import Accept, CatchUp, Plain, Verify, Way
from offramp.policies.draft_stop import DraftStop

Captured = Plain | Verify | Accept
"""Ways of decoding that rounds know; of `Accept` those that `can_capture` says."""


_BUILT = ("_stood", "_graphs", "model", "device", "recorder", "state", "round", "prompt", "mail", "board")
"""Attributes of `Rounds` that belong to one place in memory: a copy makes its own."""


def can_capture(lm: LanguageModel, way: Way) -> bool:
    """Whether captured rounds write in this way: plain, with verified drafts, or with tokens that leave as `round_accept.fits` says."""
    return isinstance(way, Plain | Verify) or (isinstance(way, Accept) and fits(lm, way))


def length_of(way: Captured) -> int:
    """Places of the longest round less one: none of plain decoding, drafts, or how many tokens wait before the last."""
    if isinstance(way, Accept):
        return way.fill.cap - 1 if isinstance(way.fill, CatchUp) else 0
    return way.draft_length if isinstance(way, Verify) else 0


class Rounds:
    """A captured decoder for ``rows`` texts at a time. Threads wait for each other, and a copy is captured by itself.

    Args:
        lm: from `attach_lm`.
        rows: texts at a time; fewer may be given.
        slots: most tokens of a text, prompt and all.
        draft_length: most drafts in a round; 0 = plain decoding. Several lengths, ascending, where `generate` is to choose among them.
            Where tokens leave, places of a round less one, less than the fill's ``cap``. By default what ``way`` has, else 0.
        exit_index: which exit drafts.
        sampling: what to choose; greedy by default.
        eos_token_id: where a text ends.
        compiled: run the pieces through ``torch.compile``; by default on CUDA. A `Tuning` says what the compiler may try besides.
        stop: whether a row makes another draft. What a captured round computes does not become less by it, but its text is that of the
            reference with this rule.
        sample_drafts: when sampling, draw the drafts too; see `offramp.policies.decoding.Verify`.
        way: in place of ``exit_index``, ``stop`` and ``sample_drafts``; `Accept` lets tokens leave instead of drafting.

    Attributes:
        lengths: of rounds.
        draft_length: the longest of them.
        state: the rows.
        way: of writing.

    Raises:
        InvalidInput: an argument is out of range, the model lacks an exit, or rounds do not know the way; says which.
    """

    def __init__(
        self,
        lm: LanguageModel,
        rows: int = 1,
        slots: int = 1024,
        draft_length: int | Sequence[int] | None = None,
        exit_index: int = 0,
        sampling: Sampling | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        compiled: bool | Tuning | None = None,
        stop: DraftStop | None = None,
        sample_drafts: bool = True,
        *,
        way: Captured | None = None,
    ) -> None:
        asked = draft_length if draft_length is not None else 0 if way is None else length_of(way)
        lengths = (asked,) if isinstance(asked, int) else tuple(asked)
        if not lengths or list(lengths) != sorted(set(lengths)) or rows < 1 or slots < 2 or lengths[0] < 0:
            raise InvalidInput(
                f"rows must be >= 1, slots >= 2 and draft_length >= 0, or several ascending; got {rows}, {slots} and {asked}."
            )
        if way is None:
            drafting: dict[str, Any] = {} if stop is None else {"stop": stop}
            way = Verify(lengths[-1], sample_drafts=sample_drafts, exit_index=exit_index, **drafting) if lengths[-1] else Plain()
        elif exit_index or stop is not None or not sample_drafts:
            raise InvalidInput("exit_index, stop and sample_drafts are parts of a way; give them to it, as in Verify(4, exit_index=1).")
        used, longest = exits(lm, way), length_of(way)
        if not can_capture(lm, way):
            raise InvalidInput(
                f"Captured rounds let tokens leave at one exit, with fill=CatchUp(...) and a threshold that does not adapt; got {way} and "
                f"exits {list(used)}. Use offramp.engines.text.generate for it."
            )
        if lengths[-1] > longest:
            raise InvalidInput(f"Rounds of {way} have lengths from 0 to {longest}; got {list(lengths)}. Give less, or another way.")
        self.lm, self.way, self.lengths, self.draft_length, self.slots = lm, way, lengths, lengths[-1], slots
        self.sampling = sampling if sampling is not None else Sampling()
        if self.sampling.repetition_penalty != 1.0:
            raise InvalidInput("Captured rounds know no repetition_penalty; use offramp.engines.text.generate for it.")
        self.ends = [] if eos_token_id is None else [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
        self._rows, self._compiled, self._turn = rows, compiled, Turn("A captured decoder", "make other Rounds for the texts within")
        self._build()

    def _build(self) -> None:
        """Take memory for the rows on the device where the model is now. Nothing is captured yet."""
        for name in _BUILT:  # what stood before goes first: there may be no memory for both
            self.__dict__.pop(name, None)
        self._stood: list[object] | None = None  # until all is built
        self._graphs: dict[tuple[int, bool], Graph] = {}
        self.model, self.device = self.lm.decoder, self.lm.decoder.device
        self.model.check_unchanged()
        self.recorder = Recorder(self.device, self.device.type == "cuda" if self._compiled is None else self._compiled)
        if self.recorder.tuning.joined_projections:
            self.model = self.model.joined()
        used, longest, given = exits(self.lm, self.way), length_of(self.way), [[0]] * self._rows
        with torch.inference_mode():
            self.state = Rows(self.lm, given, self.slots - 1, self.sampling, [0] * self._rows, self.ends, used, longest)
            logits = self.state.prefill()  # takes the memory of every cache; a compiler that saw it taken would compile once more
            self.prompt = PromptPass(self.state, self.recorder, logits)
            self.round = self._made(self.way)
            self.mail = Mailbox(self.round.count.numel(), self.device)
            self.board = Board(self.state.tokens, self.state.length)
        self._stood = list(standing(self.lm.model, self.lm))

    def renew(self) -> bool:
        """Begin anew if weights stand elsewhere than before, or are others. `generate` does it by itself. Returns whether it was needed."""
        with self._turn:
            return self._renew()

    def _renew(self) -> bool:
        if self._stood == list(standing(self.lm.model, self.lm)):
            return False
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # a round may be in flight where the last text ended in an error
        self._build()
        return True

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in _BUILT}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._build()

    def _made(self, way: Captured) -> Round:
        if isinstance(way, Accept):
            return AcceptRound(self.model, self.state, self.recorder, way)
        return VerifyRound(self.model, self.state, self.recorder, way if isinstance(way, Verify) else None)

    def _run(self, length: int, watched: bool) -> None:
        self.round.run(length)
        if watched:
            self.board.post(self.state.tokens, self.state.length)
        self.mail.post(self.round.count)

    def allow(self, lengths: Sequence[int]) -> None:
        """Rounds of further lengths, no longer than the longest; each is captured when it is first run."""
        if wrong := [k for k in lengths if not 0 <= k <= self.draft_length]:
            raise InvalidInput(f"These rounds have lengths from 0 to {self.draft_length}; got {wrong[0]}. Make others for it.")
        self.lengths = tuple(sorted({*self.lengths, *lengths}))

    # Running it ------------------------------------------------------------------------------------------------------------------

    def graph(self, length: int | None = None, watched: bool = False) -> Graph:
        """A captured round; captured on first use, with no row alive, so that running it changes nothing.

        Args:
            length: which of the lengths; the longest by default.
            watched: whether the host is sent the tokens too.
        """
        with self._turn:
            return self._graph(length, watched)

    def _graph(self, length: int | None, watched: bool) -> Graph:
        key = (self.draft_length if length is None else length, watched)
        if key[0] not in self.lengths:
            raise InvalidInput(f"Rounds were made for the draft lengths {self.lengths}, not for {key[0]}.")
        if key not in self._graphs:
            with torch.inference_mode():
                self.state.alive.zero_()
                self.lm.decoder.captured = True
                self._graphs[key] = self.recorder.graph(lambda: self._run(*key))
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
            choice: chooses the length of every round; without it, all rounds have the longest. Greedy texts are the same whatever is
                chosen, and so are sampled ones where tokens leave; with drafts, sampled ones follow the same law.
            stops: told the tokens of a row so far, says whether the newest is its last. Asked on the host a round late: the row writes
                on for a round or two, and what it wrote too much is cut off.
            streamer: is told of the tokens of the only row, a round late.

        Raises:
            InvalidInput: more texts, or longer, than this was made for; several texts and a streamer; called from within itself, by a
                streamer or ``stops``; the model was changed after exits were attached to it.
        """
        longest = max((len(p) for p in prompts), default=0)
        if not 0 < len(prompts) <= self._rows or longest + max_new_tokens > self.slots:
            raise InvalidInput(
                f"This was made for up to {self._rows} texts of {self.slots} tokens; got {len(prompts)}, the longest of {longest} "
                f"tokens and {max_new_tokens} to come."
            )
        watch = Watch(prompts, stops, streamer) if stops is not None or streamer is not None else None
        with self._turn, torch.inference_mode(), evaluating(self.lm.model, self.lm):
            self._renew()
            chooser = choice.start() if choice is not None else None
            used = chooser.lengths if chooser is not None else (self.draft_length,)
            graphs = {k: self._graph(k, watch is not None) for k in used}
            begun = time.perf_counter()
            state = self._load(prompts, max_new_tokens, list(seeds) if seeds is not None else list(range(len(prompts))))
            first = state.choose(self.prompt())
            state.append(first[:, None], state.alive.long(), torch.full_like(first[:, None], len(self.model)))
            state.result.prompt_s = time.perf_counter() - begun  # appending has waited for the device
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
        self.round.restart()
        return state

    def _done(self, prompts: Sequence[Sequence[int]], watch: Watch | None) -> Generation:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        result = self.state.done()
        result.tokens, result.depth = result.tokens[: len(prompts)], result.depth[: len(prompts)]
        if watch is not None:
            watch.saw(self.state.tokens.cpu(), self.state.length.cpu())
            watch.finish(result)
        self.round.report(result)
        return result
