"""What a way of writing text costs and what it changes, measured by running it: numbers for reproductions of language-model systems.

Cost is what a single text waits for where memory bounds the time: the weights that are read, one pass after another. A pass over several
tokens reads them once. Prompts are left out, and so is the first new token, which a prompt's pass decides.

Agreement asks of every written token whether the full model would choose it after the same text, in one ordinary forward of the model.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from offramp import systems
from offramp.budget.agreement import certify_table
from offramp.budget.risk_control import Procedure
from offramp.core.modes import evaluating
from offramp.core.system import System
from offramp.engines.text.generate import generate
from offramp.engines.text.planner import fingerprint_of
from offramp.exits.lm import OwnOutput
from offramp.language import LanguageModel
from offramp.policies.decoding import Accept, Plain, Way
from offramp.train.recipe import Recipe
from offramp.train.text import NextToken, TextNet


def _size(*modules: nn.Module) -> int:
    return sum(p.numel() for m in modules for p in m.parameters())


class Meter:
    """Counts what a model's blocks, heads and output layer do while text is written, one text at a time.

    Args:
        lm: the model with its exits.
    """

    def __init__(self, lm: LanguageModel) -> None:
        decoder = lm.decoder
        self.lm = lm
        self.blocks = [_size(b) for b in decoder.blocks]
        self.keys = [sum(p.numel() for n, p in b.named_parameters() if "k_proj" in n or "v_proj" in n) for b in decoder.blocks]
        self.output = _size(decoder.output, decoder.norm_module)
        heads = zip(lm.heads, lm.specs, strict=True)
        self.heads = [_size(h) + (0 if isinstance(s, OwnOutput) else _size(decoder.output)) for h, s in heads]
        self.passes, self.weights, self._on = 0, 0, False

    @property
    def plain(self) -> int:
        """Weights that plain decoding reads for a token."""
        return sum(self.blocks) + self.output

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count within, from the end of the first prompt on."""
        lm, decoder = self.lm, self.lm.decoder
        run, project, logits, observe = decoder.run, decoder.project, decoder.logits, lm.observe
        self._on = False

        def counted_run(hidden: Tensor, start: int, stop: int, step: Any) -> Tensor:
            if self._on and hidden.shape[1]:
                self.passes += stop - start
                self.weights += sum(self.blocks[start:stop])
            return run(hidden, start, stop, step)

        def counted_project(hidden: Tensor, start: int, stop: int, step: Any) -> None:
            if self._on:
                self.weights += sum(self.keys[start:stop])
            project(hidden, start, stop, step)

        def counted_logits(hidden: Tensor) -> Tensor:
            if self._on:
                self.weights += self.output
            self._on = True  # the first are the prompt's
            return logits(hidden)

        def counted_observe(hidden: Tensor, exit_index: int, step: Any) -> None:
            if self._on and lm.heads[exit_index].cached:
                self.weights += self.heads[exit_index] - _size(decoder.output)
            observe(hidden, exit_index, step)

        def counted_head(index: int) -> Any:
            def hook(*_: Any) -> None:
                self.weights += self.heads[index] if self._on else 0

            return hook

        with contextlib.ExitStack() as stack:
            for k, head in enumerate(lm.heads):
                stack.callback(head.register_forward_hook(counted_head(k)).remove)
            names: dict[str, Any] = {"run": counted_run, "project": counted_project, "logits": counted_logits}
            for name, counted in names.items():
                setattr(decoder, name, counted)  # on this object, before its class
                stack.callback(delattr, decoder, name)
            lm.__dict__["observe"] = counted_observe
            stack.callback(lm.__dict__.pop, "observe")
            yield


@dataclass(frozen=True)
class Written:
    """Texts that one way wrote, one by one.

    Attributes:
        prompts: token ids.
        tokens: new token ids of each text, equally many.
        depth: of each token, after how many blocks it was decided.
        cost: weights read for a token over those of plain decoding.
        blocks_share: blocks run in turn for a token over those of plain decoding.
        drafted: drafts tried at each place of a round.
        accepted: how many of them were kept.
        rounds: passes over all blocks.
    """

    prompts: tuple[tuple[int, ...], ...]
    tokens: Tensor
    depth: Tensor
    cost: float
    blocks_share: float
    drafted: tuple[int, ...] = ()
    accepted: tuple[int, ...] = ()
    rounds: int = 0

    @property
    def acceptance(self) -> tuple[float | None, ...]:
        """Share of the drafts at each place of a round that were kept, ``None`` where there were none."""
        return tuple(a / d if d else None for d, a in zip(self.drafted, self.accepted, strict=True))

    @property
    def tokens_per_round(self) -> float | None:
        """Tokens for each pass over all blocks, the first token left out; ``None`` where nothing was drafted."""
        later = self.tokens.shape[0] * (self.tokens.shape[1] - 1)
        return later / self.rounds if self.drafted and self.rounds else None


def write(lm: LanguageModel, way: Way, prompts: Sequence[Sequence[int]], new: int, *, together: bool = False) -> Written:
    """Continue each prompt greedily by ``new`` tokens. A threshold that adapts goes on from text to text.

    Args:
        lm: the model with its exits.
        way: how.
        prompts: equally long.
        new: tokens, at least 2.
        together: in one batch, which writes the same and counts nothing: costs are NaN.
    """
    meter = Meter(lm)
    tokens, depth, drafted, accepted, rounds = [], [], [], [], 0
    with contextlib.nullcontext() if together else meter.counting():
        for group in [list(prompts)] if together else [[p] for p in prompts]:
            meter._on = False
            found = generate(lm, [list(p) for p in group], way, max_new_tokens=new, do_sample=False, eos_token_id=[])
            tokens += found.tokens
            depth += found.depth
            drafted.append(found.drafted)
            accepted.append(found.accepted)
            rounds += found.deep_passes
            if isinstance(way, Accept) and found.learned is not None:
                way = replace(way, threshold=found.learned)
    later = len(prompts) * (new - 1)
    nan = float("nan")
    return Written(
        tuple(tuple(p) for p in prompts),
        torch.tensor(tokens),
        torch.tensor(depth),
        nan if together else meter.weights / (later * meter.plain),
        nan if together else meter.passes / (later * len(meter.blocks)),
        tuple(map(sum, zip(*drafted, strict=True))),
        tuple(map(sum, zip(*accepted, strict=True))),
        rounds,
    )


def agreeing(model: nn.Module, written: Written) -> Tensor:
    """Which new tokens (bool ``[texts, new]``) a model would choose after the text before them."""
    given = torch.tensor(written.prompts)
    whole = torch.cat([given, written.tokens], 1)
    device = next(model.parameters()).device
    found = []
    with torch.inference_mode(), evaluating(model):
        for rows in whole.split(16):
            chosen = model(rows.to(device), use_cache=False).logits.argmax(-1).cpu()
            found.append(chosen[:, given.shape[1] - 1 : -1] == rows[:, given.shape[1] :])
    return torch.cat(found)


def perplexities(lm: LanguageModel, blocks: Tensor, recipe: Recipe | None = None) -> list[float]:
    """Perplexity of texts (int64 ``[N, T]``) at every exit, the full model's last, as the recipe lets the model run."""
    net, loss = TextNet(lm), NextToken()
    sums: list[Tensor] = []
    with torch.inference_mode(), evaluating(net), recipe.around(net) if recipe is not None else contextlib.nullcontext():
        for rows in blocks.split(32):
            rows = rows.to(lm.decoder.device)
            sums.append(torch.stack([loss(z, rows).sum() for z in net(input_ids=rows)]))
    means = torch.stack(sums).sum(0) / len(blocks)
    return [float(v) for v in means.double().exp()]


def by_position(depth: Tensor) -> float | None:
    """How much of the tokens' depth ``[texts, new]`` their place in the text explains: R squared; ``None`` where all are alike."""
    later = depth[:, 1:].double()
    total = float(later.var(correction=0))
    return float(later.mean(0).var(correction=0)) / total if total > 0 else None


def plain(lm: LanguageModel, prompts: Sequence[Sequence[int]], new: int) -> Tensor:
    """What plain decoding writes, int64 ``[texts, new]``."""
    return write(lm, Plain(), prompts, new, together=True).tokens


def by_threshold(
    lm: LanguageModel, way: Callable[[float], Way], prompts: Sequence[Sequence[int]], new: int, thresholds: int
) -> dict[str, np.ndarray]:
    """What running each of some thresholds gives on each text, as `certify_table` takes it; the first is ``inf``, at which none leaves.

    Args:
        lm: whose tokens leave.
        way: of decoding, at a threshold.
        prompts: equally long.
        new: tokens to write after each.
        thresholds: how many are tried, besides never leaving.
    """
    grid = np.array([math.inf, *np.linspace(0.99, 0.2, thresholds).tolist()])
    runs = [write(lm, way(float(t)), prompts, new, together=True) for t in grid]
    early = [(found.depth < len(lm.decoder))[:, 1:] for found in runs]
    wrong = [~agreeing(lm.model, found)[:, 1:] for found in runs]
    lost, left = (torch.stack([v.double().mean(1) for v in column], 1).numpy() for column in (wrong, early))
    return {"thresholds": grid, "losses": lost, "left": left}


def calibrated(
    system: System,
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    new: int,
    thresholds: int,
    *,
    seed: int = 0,
    seen: dict[str, Any] | None = None,
) -> float | tuple[float, ...] | None:
    """Thresholds that a system's calibrator chooses on texts written after these prompts, ``None`` if it has none.

    A procedure for a target is given what running each threshold gave, all tokens that differ, so that the text judged is the text written;
    what only compares scores is given all that the exits said along the full model's own texts.

    Args:
        system: with the calibrator, and the target.
        lm: its model.
        prompts: equally long; not those that are measured on.
        new: tokens to write after each.
        thresholds: how many are tried where each must be run, besides never leaving.
        seed: of the order in which a procedure reads the texts.
        seen: what was seen on the texts, filled at the first call: settings of a calibrator do not change it.
    """
    if system.calibrator is None:
        return None
    seen = {} if seen is None else seen
    if isinstance(system.calibrator, Procedure):
        if not seen:
            seen |= by_threshold(lm, lambda t: systems.way(system, t), prompts, new, thresholds)
        way = systems.way(system, 1.0)  # of which the threshold is replaced
        about: dict[str, Any] = {"way": way, "fingerprint": fingerprint_of(lm)}
        return certify_table(**seen, **about, risk=system.target, method=system.calibrator, seed=seed).threshold
    if not seen:
        never = systems.way(system, math.inf)
        seen["looks"] = generate(lm, [list(p) for p in prompts], never, max_new_tokens=new, do_sample=False, eos_token_id=[]).audit
    looks, exits = seen["looks"], len(lm.exits)
    chosen: tuple[float, ...] = system.calibrator(looks.score.reshape(-1, exits), looks.agreed.reshape(-1, exits))
    return chosen
