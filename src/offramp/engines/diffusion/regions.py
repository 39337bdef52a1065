"""region denoise: at some steps only a share of an image's tokens goes through the denoiser (region-adaptive sampling).

The tokens that are not computed keep their last output, and their keys and values stay in every block, so that those that are computed
still attend to the whole image. Which these are is said by `offramp.reduce.regions.Regions`, for each row by itself; how a model runs some
tokens is `offramp.backbones.image_tokens`. A step whose tokens are all computed is the model itself, bit for bit.

Rows that compute equally many tokens run together, usually all of them: as the model's own forward, or as one captured graph
(`offramp.engines.diffusion.region_graphs`). The host asks one thing, whether what is remembered is finite, and asks it once the step that
needs the answer is on its way, so that the device does not wait: a row in which it is not is run once more and computes everything.

Shapes: ``B`` rows of a call, ``N`` tokens of an image, ``k`` of them that are computed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from offramp.backbones import diffusers as library
from offramp.backbones.image_tokens import ImageTokens, TokenStore, prediction, take_rows
from offramp.core.errors import InvalidInput, NoEffectWarning
from offramp.core.flops import counter
from offramp.core.noise import NoiseScale
from offramp.core.warn import warn
from offramp.diffusion import Call, DenoisingNet, uncut_denoiser
from offramp.engines.capture import Arriving
from offramp.engines.diffusion.denoise import Denoiser
from offramp.engines.diffusion.pipeline import pipeline_view
from offramp.engines.diffusion.region_graphs import region_runner
from offramp.engines.diffusion.region_step import RegionMemory, RegionRunner, TokenStep
from offramp.engines.diffusion.report import Report, StepRecord
from offramp.engines.diffusion.run import Runner
from offramp.engines.diffusion.trajectory import Branch, Host, on_device
from offramp.reduce.regions import Regions, token_grid


@dataclass(frozen=True)
class _Form:
    """Calls of one shape: tokens of an image, a step of all of them, FLOPs of a row by number of tokens that are computed."""

    tokens: int
    step: TokenStep
    flops: dict[int, int]


class RegionDenoiser(Denoiser):
    """A transformer denoiser that computes only some tokens at some steps. Called as the user's model is called, returns what it returns.

    In the report a step's ``depth`` is always all blocks, and what is saved is in ``flops``; ``fired`` is 0 where only some tokens were
    computed. Why all were is a reason of `Regions.must`, ``first``, ``shape``, ``gap``, ``missing``, ``not finite``, or ``all`` where the
    ratio comes to all tokens.

    Args:
        net: from `offramp.diffusion.uncut_denoiser` or `attach_denoiser`.
        regions: which tokens at which steps.
        observe: keep which tokens were computed, in ``maps``.
        run: runs the steps; by default the model's own forward, eagerly. `offramp.engines.diffusion.region_graphs.CapturedRegions`
            compiles and captures; a `Captured` stands for one on its device.

    Attributes:
        maps: by (branch, step) bool ``[B, N]``, true where a token was computed; of the last trajectory, if observed.

    Raises:
        UnsupportedModel: the model cannot compute some tokens alone; the message says why.
        InvalidInput: the net's example does not fit, or ``run`` runs something else.
    """

    def __init__(self, net: DenoisingNet, regions: Regions, *, observe: bool = False, run: RegionRunner | Runner | None = None) -> None:
        if not isinstance(regions, Regions):
            raise InvalidInput(f"regions must be a Regions of offramp.reduce.regions, got {regions!r}.")
        super().__init__(net, observe=observe)
        self._structure = None  # nothing is cut: what is loaded into the model is seen
        self.regions = regions
        self.runner = region_runner(run)
        self.image_tokens = ImageTokens(net.model)
        self.maps: dict[tuple[int, int], Tensor] = {}
        self._forms: dict[Any, _Form] = {}
        self._full = 0
        with torch.no_grad():
            self._form(net.example_call())

    def __deepcopy__(self, memo: dict[int, Any]) -> RegionDenoiser:
        """Another denoiser that remembers nothing; the model is looked at anew."""
        memo[id(self.net._cuts)] = {}
        net = copy.deepcopy(self.net, memo)
        made = memo[id(self)] = type(self)(net, self.regions, observe=self.observe, run=copy.deepcopy(self.runner, memo))
        made.noise = self.noise
        return made

    @property
    def report(self) -> Report:
        """What ran since the last `reset`."""
        return Report.of(list(self._records), self._full, self.image_tokens.blocks, self._peak, self.share)

    def token_cost(self) -> tuple[int, float]:
        """Tokens of an image like the example's, and what one token less saves of a step, as a share of all its FLOPs."""
        call = self.net.example_call()
        with torch.no_grad():
            form = self._form(call)
            full, k = form.flops[form.tokens], max(form.tokens // 2, 1)
            some = self._flops(form, call, k)
        return form.tokens, (full - some) / (full * max(form.tokens - k, 1))

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode(False), torch.no_grad():  # what is remembered may be written to in another mode than it was made in
            call = self.net.call(*args, **kwargs)
            form = self._form(call)
            times, final = self._times(call)
            log_snr = self._log_snr(times)
            branch, why = self.trajectory.enter(times, log_snr, call.key, [1])
            if self.trajectory.step == 0 and self.trajectory.branch == 0:
                self._records.clear()
                self.maps.clear()
            memory = branch.memories[0]
            if not isinstance(memory, RegionMemory):
                memory = branch.memories[0] = RegionMemory(call.rows, 1)
            record = StepRecord(self.trajectory.branch, self.trajectory.step, log_snr, form.flops[form.tokens])
            counts = self._counts(form, branch, memory, log_snr, final, why, record)
            before, asked = memory.flags, [r for r, k in enumerate(counts) if k < form.tokens]
            groups: dict[int, list[int]] = {}
            for row, k in enumerate(counts):
                groups.setdefault(k, []).append(row)
            output: Any = None
            for k, rows in groups.items():
                output = self._run(form, call, memory, k, rows, record, output)
            if asked and before is not None:
                broken = before.read()
                again = [r for r in asked if broken[r]]
                record.reasons[0, "skipped"] += len(asked) - len(again)
                if again:
                    record.reasons[0, "not finite"] += len(again)
                    output = self._run(form, call, memory, form.tokens, again, record, output)
            memory.flags = Arriving(memory.held.broken)
            memory.level = tuple(log_snr)
            memory.note(slice(None), np.asarray(log_snr))
            if self.observe:
                self.maps[record.branch, record.step] = memory.held.waited == 0
            self._records.append(record)
            if form.tokens in groups:  # other steps remember in the same memory
                self._peak = max(self._peak, self.trajectory.cache_bytes)
        if call.return_dict:
            return output
        return tuple(output.values()) if isinstance(output, Mapping) else output if isinstance(output, tuple) else (output,)

    def _counts(
        self, form: _Form, branch: Branch, memory: RegionMemory, log_snr: list[float], final: Host, why: str, record: StepRecord
    ) -> list[int]:
        """How many tokens every row computes, as far as that is known beforehand; rows that stand alike compute as many."""
        found: dict[Any, tuple[int, str]] = {}
        counts = []
        each = zip(log_snr, memory.known.tolist(), branch.step.tolist(), final.tolist(), strict=True)
        for row, (level, known, step, last) in enumerate(each):
            stands = (known, step, memory.level[row] if known else -math.inf, level, last)
            if stands not in found:
                reason = "" if known else why or ("first" if step == 0 else "missing")
                reason = reason or self.regions.must(*stands[1:])
                count = form.tokens if reason else self.regions.count(form.tokens, level)
                found[stands] = count, reason or ("all" if count == form.tokens else "")
            count, reason = found[stands]
            if reason:
                record.reasons[0, reason] += 1
            counts.append(count)
        return counts

    def _run(self, form: _Form, call: Call, memory: RegionMemory, k: int, rows: list[int], record: StepRecord, before: Any) -> Any:
        """Outputs of all rows, new of some of them: ``k`` of their tokens are computed."""
        whole = len(rows) == call.rows
        index = None if whole else on_device(rows, torch.int64, call.kwargs[self.net.sample_name].device)
        step = replace(form.step, regions=self.regions, k=None if k == form.tokens else k)
        flops = self._flops(form, call, k)
        made = self.runner(step, call, memory, index)
        record.depth[rows] = self.image_tokens.blocks
        record.flops[rows] = flops
        record.fired[rows] = -1 if k == form.tokens else 0
        return made if index is None else _placed(before, made, index, call.rows)

    def _form(self, call: Call) -> _Form:
        """What is known of calls of a shape: on the first, whether the model can compute some tokens alone is tried."""
        if call.key not in self._forms:
            sample: Tensor = call.kwargs[self.net.sample_name]
            if sample.ndim != 4:
                raise InvalidInput(f"Regions are of images [B, C, H, W]; the denoiser was called with {tuple(sample.shape)}.")
            kwargs, rows = self._few(call)
            tokens, store = self.image_tokens.check(kwargs), TokenStore()
            with counter() as counted:
                output = prediction(self.image_tokens(store, None, kwargs))
            if output.shape[0] != rows or output.shape[2:] != sample.shape[2:]:
                raise InvalidInput(
                    f"{type(self.net.model).__name__} gives {tuple(output.shape)} for {rows} images {tuple(sample.shape[1:])}: it takes no "
                    "images of this form (diffusers' DiT takes square ones)."
                )
            grid = token_grid(sample.shape[2:], tokens)
            kept = tuple((t.shape[2], t.dtype) for t in store.kept)
            step = TokenStep(self.image_tokens, self.regions, grid, sample.shape[1], kept)
            self.regions.focus(output[:, : step.channels], grid)  # a measure that does not apply says so here
            if self.regions.ratio < 1 and tokens <= self.regions.multiple:
                warn(
                    f"An image of {tokens} tokens, rounded up to a multiple of {self.regions.multiple}: all are computed at every step and "
                    "nothing is saved. Give Regions a smaller multiple.",
                    NoEffectWarning,
                )
            self._forms[call.key] = _Form(tokens, step, {tokens: int(counted.get_total_flops()) // rows})
        form = self._forms[call.key]
        self._full = form.flops[form.tokens]
        return form

    def _few(self, call: Call) -> tuple[Mapping[str, Any], int]:
        """Inputs of two rows at most, and how many they are: to try something with."""
        rows = min(call.rows, 2)
        if call.rows == rows:
            return call.kwargs, rows
        return take_rows(call.kwargs, torch.arange(rows, device=call.kwargs[self.net.sample_name].device), call.rows), rows

    def _flops(self, form: _Form, call: Call, k: int) -> int:
        """FLOPs of a row that computes ``k`` tokens: counted once, beside what runs."""
        if k not in form.flops:
            kwargs, rows = self._few(call)
            store = TokenStore()
            self.image_tokens(store, None, kwargs)
            some = torch.arange(k, device=store.kept[0].device).expand(rows, -1)
            with counter() as counted:
                self.image_tokens(store, some, kwargs)
            form.flops[k] = int(counted.get_total_flops()) // rows
        return form.flops[k]


def _placed(whole: Any, part: Any, index: Tensor, rows: int) -> Any:
    """An output of all rows with those of a part of them in their places."""
    if whole is None:
        whole = tree_map(lambda t: t.new_zeros(rows, *t.shape[1:]) if isinstance(t, Tensor) else t, part)
    return tree_map(lambda a, b: a.index_copy(0, index, b) if isinstance(a, Tensor) else a, whole, part)


def attach_regions(
    model: nn.Module,
    regions: Regions,
    *,
    noise: NoiseScale,
    example: Any,
    timestep: str | None = None,
    observe: bool = False,
    run: RegionRunner | Runner | None = None,
) -> RegionDenoiser:
    """A transformer denoiser that computes only some tokens at some steps. The model is not changed and not cut.

    Args:
        model: of diffusers, or built like its transformers (`offramp.backbones.image_tokens`).
        regions: which tokens at which steps.
        noise: from its timestep argument to log-SNR.
        example: inputs as the model takes them; the first tensor is the noisy input.
        timestep: name of the timestep argument, if it is none of ``timestep``, ``timesteps``, ``t`` and ``time``.
        observe: keep which tokens were computed.
        run: runs the steps; by default eagerly (see `RegionDenoiser`).

    Raises:
        UnsupportedModel: the model cannot compute some tokens alone; the message says why.
        InvalidInput: the example does not fit, or ``run`` runs something else.
    """
    return RegionDenoiser(uncut_denoiser(model, noise=noise, example=example, timestep=timestep), regions, observe=observe, run=run)


def attach_region_pipeline(
    pipe: Any,
    regions: Regions,
    *,
    example: Any = None,
    noise: NoiseScale | None = None,
    observe: bool = False,
    run: RegionRunner | Runner | None = None,
) -> Any:
    """A view of a pipeline whose denoiser computes only some tokens at some steps; else as `attach_pipeline`.

    Args:
        pipe: of diffusers, with a ``transformer`` and a ``scheduler``.
        regions: which tokens at which steps.
        example: inputs of the denoiser; by default made from its configuration.
        noise: from its timesteps to log-SNR; by default from the pipeline's scheduler.
        observe: keep which tokens were computed, in ``view.denoiser.maps``.
        run: runs the steps; by default eagerly (see `RegionDenoiser`).

    Raises:
        UnsupportedModel: the denoiser cannot compute some tokens alone; the message says why.
        InvalidInput: the pipeline has no denoiser or scheduler, or ``run`` runs something else.
    """
    model = getattr(pipe, library.denoiser_name(pipe))
    level = noise if noise is not None else library.noise_scale(pipe.scheduler, model)
    given = example if example is not None else library.example_inputs(model)
    return pipeline_view(pipe, attach_regions(model, regions, noise=level, example=given, observe=observe, run=run))
