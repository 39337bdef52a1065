"""Checking an exported file: ONNX Runtime against one ordinary forward of the untouched model with all heads, nothing compacted.

Shape legend: ``B`` rows, ``K`` exits, the model's own output last.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from offramp.core.errors import ExportError
from offramp.core.modes import evaluating
from offramp.core.types import Readout
from offramp.engines.export_module import THRESHOLDS, AdaptiveModule
from offramp.engines.export_trace import Inputs, has_length
from offramp.network import MultiExit

_ROWS = (1, 2, 7)


class Sample(NamedTuple):
    """Inputs and what the PyTorch model makes of them.

    Attributes:
        tensors: the inputs.
        answers: ``[B, K, ...]``, float32.
        scores: ``[B, K - 1]``; NaN, which meets no threshold, where the plan has no exit.
    """

    tensors: Sequence[Tensor]
    answers: Tensor
    scores: Tensor


class Comparison(NamedTuple):
    """One run of the file that agreed.

    Attributes:
        name: what was compared.
        rows: how many.
        difference: largest absolute difference of an answer.
        ties: rows that left elsewhere because their score is within the tolerance of a threshold.
    """

    name: str
    rows: int
    difference: float
    ties: int


@dataclass(frozen=True)
class Check:
    """Compares files with a network.

    Attributes:
        net: the network.
        module: the adaptive model that the file was made of.
        inputs: of the network.
        names: the file's names of ``inputs.tensors``.
        atol: tolerance; see `offramp.engines.export.export_onnx`.
    """

    net: MultiExit
    module: AdaptiveModule
    inputs: Inputs
    names: Sequence[str]
    atol: float

    def run(self, runtime: Any, shipped: bytes, tunable: bytes) -> tuple[Comparison, ...]:
        """Compare the file, and for other thresholds than the plan's the same file with thresholds as input.

        Raises:
            ExportError: a file cannot be run, or it gives other exits or answers.
        """
        options = runtime.SessionOptions()
        options.log_severity_level = 4  # failures are raised below
        try:
            plain, variant = (runtime.InferenceSession(d, options, providers=["CPUExecutionProvider"]) for d in (shipped, tunable))
        except Exception as error:  # onnxruntime has no public base class of its errors
            raise ExportError(f"ONNX Runtime cannot load the exported model: {error}") from error
        found = []
        for rows in _ROWS:
            sample = self.sample(_varied(self.inputs, rows))
            found.append(self.compare(f"{rows} rows, the plan", plain, sample))
            for name, thresholds in self._extremes(sample).items():
                found.append(self.compare(f"{rows} rows, {name}", variant, sample, thresholds))
        shorter = _shorter(plain, self.names, sample.tensors)
        if shorter is not None and self.module.active:
            sample = self.sample(shorter)
            found.append(self.compare("another length", variant, sample, _parting(self.module.active, sample.scores)))
        return tuple(found)

    def _extremes(self, sample: Sample) -> Mapping[str, Tensor]:
        if not self.module.active:
            return {}
        plan = self.module.thresholds.cpu()
        cases = {"all leave at once": torch.full_like(plan, -math.inf), "nobody leaves": torch.full_like(plan, math.inf)}
        if len(sample.scores) > 2:
            cases["rows part at every exit"] = _parting(self.module.active, sample.scores)
        return cases

    @torch.no_grad()
    def sample(self, tensors: Sequence[Tensor]) -> Sample:
        """Run the untouched model."""
        args, kwargs = self.inputs.call(tensors)
        with evaluating(self.net, self.module):
            answers, states = self.net.forward_with_states(*args, **kwargs)
        shaped = torch.stack([self.module.shaped(a).float().cpu() for a in answers], 1)
        scores = torch.full((len(shaped), len(states)), math.nan)
        memory = self.module.rule.begin(len(shaped), self.net.device)
        for k in sorted(self.module.scored):
            score, memory = self.module.rule.score(k, Readout(answers[k], states[k]), memory)
            if k in self.module.active:
                scores[:, k] = score.cpu()
        return Sample(tensors, shaped, scores)

    def compare(self, name: str, session: Any, sample: Sample, thresholds: Tensor | None = None) -> Comparison:
        """Run a file and compare exits and answers; with the plan's thresholds, which it knows, if none are given.

        Raises:
            ExportError: they differ, or the file cannot be run.
        """
        tensors, answers, scores = sample
        known = {i.name for i in session.get_inputs()}
        feed = {n: t.cpu().numpy() for n, t in zip(self.names, tensors, strict=True) if n in known}
        if thresholds is None:
            thresholds = self.module.thresholds.cpu()
        else:
            feed[THRESHOLDS] = thresholds.numpy()
        try:
            output, exits = (torch.from_numpy(a.copy()) for a in session.run(["output", "exit"], feed))
        except Exception as error:  # onnxruntime has no public base class of its errors
            raise ExportError(f"ONNX Runtime cannot run the exported model ({name}): {error}") from error

        last = scores.shape[1]
        leaves = torch.cat([scores >= thresholds, torch.ones(len(scores), 1, dtype=torch.bool)], 1)
        expected = leaves.int().argmax(1)
        near = (scores - thresholds).abs() <= self.atol * thresholds.abs().nan_to_num(posinf=1.0).clamp_min(1.0)
        if self.module.rule.stateful:  # counters meet their thresholds exactly; only what was computed in floating point can be tied
            near &= scores != scores.round()
        reached = torch.arange(last)[None] <= torch.maximum(expected, exits)[:, None]
        moved = exits != expected
        tied = moved & (near & reached).any(1)
        if bool((moved & ~tied).any()):
            row = int((moved & ~tied).nonzero()[0])
            raise ExportError(
                f"The exported model sends rows to other exits than PyTorch ({name}): {int((moved & ~tied).sum())} of {len(moved)} rows, "
                f"e.g. row {row} to exit {int(exits[row])} instead of {int(expected[row])}, where its scores are {scores[row].tolist()}."
            )
        want = answers[torch.arange(len(expected)), expected]
        gap = (output.to(want.dtype) - want).abs()
        gap = torch.where(output.isnan() & want.isnan(), torch.zeros_like(gap), gap)[~tied]
        largest = float(gap.max()) if gap.numel() else 0.0
        if not largest <= self.atol * max(1.0, float(want.abs().nan_to_num().max())):
            raise ExportError(
                f"The exported model gives other answers than PyTorch ({name}): largest difference {largest:.3g}, accepted {self.atol:g}. "
                "If the model is meant to differ that much (half precision), pass a larger atol."
            )
        return Comparison(name, len(expected), largest, int(tied.sum()))


def _parting(active: Sequence[int], scores: Tensor) -> Tensor:
    """Thresholds midway between the scores, so that about half of the rows still there leave at every exit."""
    thresholds = torch.full((scores.shape[1],), math.inf)
    here = torch.ones(len(scores), dtype=torch.bool)
    for k in active:
        levels = scores[here, k].unique()  # type: ignore[no-untyped-call]
        if len(levels) > 1:
            thresholds[k] = (levels[len(levels) // 2 - 1] + levels[len(levels) // 2]) / 2
            here &= ~(scores[:, k] >= thresholds[k])
    return thresholds


def _varied(inputs: Inputs, rows: int) -> list[Tensor]:
    """The example's rows over and over, later ones changed: noise on numbers, tokens rolled along the length."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for leaf in inputs.tensors:
        if not inputs.has_batch(leaf):
            made.append(leaf)
            continue
        picked = leaf[torch.arange(rows, device=leaf.device) % inputs.rows].clone()
        for row in range(inputs.rows, rows):
            if leaf.is_floating_point():
                noise = torch.randn(leaf.shape[1:], generator=generator).to(leaf.device, leaf.dtype)
                picked[row] += noise * leaf.float().std().nan_to_num().to(leaf.dtype)
            elif leaf.ndim == 2 and not leaf.is_complex():
                picked[row] = picked[row].roll(row // inputs.rows)
        made.append(picked)
    return made


def _shorter(session: Any, names: Sequence[str], tensors: Sequence[Tensor]) -> list[Tensor] | None:
    """The same rows at half the length, or ``None`` where the length is fixed, too small, or in more than one dimension."""
    shapes = {i.name: i.shape for i in session.get_inputs()}
    varies = [has_length(t) and isinstance(shapes.get(n, (0, 0))[1], str) for n, t in zip(names, tensors, strict=True)]
    if not any(varies) or any(v and (t.ndim > 2 or t.shape[1] < 4) for v, t in zip(varies, tensors, strict=True)):
        return None
    return [t[:, : t.shape[1] // 2] if v else t for v, t in zip(varies, tensors, strict=True)]


__all__ = ["Check", "Comparison", "Sample"]
