"""region denoise: at some steps only a share of an image's tokens goes through the denoiser (region-adaptive sampling).

The tokens that are not computed keep their last output, and their keys and values stay in every block, so that those that are computed
still attend to the whole image. Which these are is said by `offramp.reduce.regions.Regions`, for each row by itself; how a model runs some
tokens is `offramp.backbones.image_tokens`. A step whose tokens are all computed is the model itself, bit for bit.

Rows that compute equally many tokens run together, usually all of them. Steps at which some tokens are computed cost one host read: whether
what is remembered is finite. A row in which it is not computes everything.

Shapes: ``B`` rows of a call, ``N`` tokens of an image, ``k`` of them that are computed.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from offramp.backbones import diffusers as library
from offramp.backbones.image_tokens import ImageTokens, TokenStore, prediction, take_rows
from offramp.core.errors import InvalidInput, NoEffectWarning
from offramp.core.flops import counter
from offramp.core.noise import NoiseScale
from offramp.diffusion import Call, DenoisingNet, uncut_denoiser
from offramp.engines.diffusion.denoise import Denoiser
from offramp.engines.diffusion.pipeline import pipeline_view
from offramp.engines.diffusion.report import Report, StepRecord
from offramp.engines.diffusion.trajectory import Branch, Memory
from offramp.reduce.regions import Regions, token_grid


@dataclass
class RegionMemory(Memory):
    """Of one guidance branch: what is known of every token.

    Attributes:
        tokens: keys, values and outputs.
        focus: ``[B, N]`` logarithm of every token's measure in the last output.
        waited: int32 ``[B, N]``, steps since each token was last computed.
        level: log-SNR of every row's last step.
    """

    tokens: TokenStore | None = None
    focus: Tensor | None = None
    waited: Tensor | None = None
    level: tuple[float, ...] = ()

    @property
    def tensors(self) -> list[Tensor]:
        held = self.tokens.kept if self.tokens is not None else []
        return [*super().tensors, *held, *(t for t in (self.focus, self.waited) if t is not None)]


@dataclass(frozen=True)
class _Form:
    """Calls of one shape: tokens of an image, the grid they make, FLOPs of a row by number of tokens that are computed."""

    tokens: int
    grid: tuple[int, int]
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

    Attributes:
        maps: by (branch, step) bool ``[B, N]``, true where a token was computed; of the last trajectory, if observed.

    Raises:
        UnsupportedModel: the model cannot compute some tokens alone; the message says why.
        InvalidInput: the net's example does not fit.
    """

    def __init__(self, net: DenoisingNet, regions: Regions, *, observe: bool = False) -> None:
        if not isinstance(regions, Regions):
            raise InvalidInput(f"regions must be a Regions of offramp.reduce.regions, got {regions!r}.")
        super().__init__(net, observe=observe)
        self.regions = regions
        self.image_tokens = ImageTokens(net.model)
        self.maps: dict[tuple[int, int], Tensor] = {}
        self._forms: dict[Any, _Form] = {}
        self._full = 0
        with torch.no_grad():
            self._form(net.example_call())

    @property
    def report(self) -> Report:
        """What ran since the last `reset`."""
        return Report.of(self._records, self._full, self.image_tokens.blocks, self._peak)

    def token_cost(self) -> tuple[int, float]:
        """Tokens of an image like the example's, and what one token less saves of a step, as a share of all its FLOPs."""
        call = self.net.example_call()
        with torch.no_grad():
            form = self._form(call)
            full, k = form.flops[form.tokens], max(form.tokens // 2, 1)
            if k not in form.flops:
                store = TokenStore()
                self.image_tokens(store, None, call.kwargs)
                some = self._index(list(range(k)), call).expand(call.rows, -1)
                with counter() as counted:
                    self.image_tokens(store, some, call.kwargs)
                form.flops[k] = int(counted.get_total_flops()) // call.rows
        return form.tokens, (full - form.flops[k]) / (full * max(form.tokens - k, 1))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            call = self.net.call(*args, **kwargs)
            form = self._form(call)
            times, final = self._times(call)
            log_snr = self.net.noise.log_snr(torch.tensor(times, dtype=torch.float64)).tolist()
            branch, why = self.trajectory.enter(times, log_snr, call.key, [1])
            if self.trajectory.step == 0 and self.trajectory.branch == 0:
                self._records.clear()
                self.maps.clear()
            memory = branch.memories[0]
            if not isinstance(memory, RegionMemory):
                memory = branch.memories[0] = RegionMemory(call.rows, 1)
            record = StepRecord(self.trajectory.branch, self.trajectory.step, log_snr, form.flops[form.tokens])
            groups = self._groups(form, branch, memory, log_snr, final, why, record)
            if self.observe:
                shape = (call.rows, form.tokens)
                self.maps[record.branch, record.step] = torch.ones(shape, dtype=torch.bool, device=call.kwargs[self.net.sample_name].device)
            output: Any = None
            for k, rows in groups.items():
                made = self._run(form, call, memory, k, rows, record)
                output = made if len(groups) == 1 else _placed(output, made, self._index(rows, call), call.rows)
            self._note(form, call, memory, prediction(output), log_snr)
            self._records.append(record)
            self._peak = max(self._peak, self.trajectory.cache_bytes)
        if call.return_dict:
            return output
        return tuple(output.values()) if isinstance(output, Mapping) else output if isinstance(output, tuple) else (output,)

    def _groups(
        self, form: _Form, branch: Branch, memory: RegionMemory, log_snr: list[float], final: list[bool], why: str, record: StepRecord
    ) -> dict[int, list[int]]:
        """Rows by how many tokens they compute."""
        counts: dict[int, int] = {}
        for row, level in enumerate(log_snr):
            known = bool(memory.noise[row])
            reason = "" if known else why or ("first" if branch.step[row] == 0 else "missing")
            reason = reason or self.regions.must(branch.step[row], memory.level[row] if known else -math.inf, level, final[row])
            counts[row] = form.tokens if reason else self.regions.count(form.tokens, level)
            if not reason and counts[row] == form.tokens:
                reason = "all"
            if reason:
                record.reasons[0, reason] += 1
        asked = [r for r, k in counts.items() if k < form.tokens]
        if asked:
            broken = memory.broken[0].tolist()  # the one host read
            for row in asked:
                if broken[row]:
                    counts[row] = form.tokens
                record.reasons[0, "not finite" if broken[row] else "skipped"] += 1
        groups: dict[int, list[int]] = {}
        for row, k in counts.items():
            groups.setdefault(k, []).append(row)
        return groups

    def _run(self, form: _Form, call: Call, memory: RegionMemory, k: int, rows: list[int], record: StepRecord) -> Any:
        """Outputs of all tokens of some rows, ``k`` of them new."""
        whole = len(rows) == call.rows
        index = self._index(rows, call)
        kwargs = call.kwargs if whole else take_rows(call.kwargs, index, call.rows)
        if k == form.tokens:
            store, active = TokenStore(), None
        else:
            if memory.tokens is None or memory.focus is None or memory.waited is None:
                raise RuntimeError("Rows without a computed step were given tokens to choose from; this is a defect in offramp.")
            store = memory.tokens if whole else memory.tokens.take(index)
            waited = memory.waited[index]
            active = self.regions.select(memory.focus[index], waited, k)
        if k in form.flops:
            output = self.image_tokens(store, active, kwargs)
        else:
            with counter() as counted:
                output = self.image_tokens(store, active, kwargs)
            form.flops[k] = int(counted.get_total_flops()) // len(rows)
        if whole or memory.tokens is None:
            memory.tokens = store
        else:
            memory.tokens.put(index, store)
        fresh = torch.zeros(len(rows), form.tokens, dtype=torch.int32, device=index.device)
        if active is not None:
            fresh = (waited + 1).scatter(1, active, 0)
            if self.observe:
                self.maps[record.branch, record.step][index] = fresh == 0
        memory.waited = fresh if whole or memory.waited is None else memory.waited.index_copy(0, index, fresh)
        for r in rows:
            record.depth[r] = self.image_tokens.blocks
            record.flops[r] = form.flops[k]
            if active is not None:
                record.fired[r].append(0)
        return output

    def _note(self, form: _Form, call: Call, memory: RegionMemory, output: Tensor, log_snr: list[float]) -> None:
        """What the next step is decided by."""
        channels = call.kwargs[self.net.sample_name].shape[1]  # without those of a learned variance
        memory.focus = self.regions.focus(output[:, :channels], form.grid)
        memory.broken = [~output.isfinite().flatten(1).all(1)]
        memory.level = tuple(log_snr)
        memory.noise = [[x] for x in log_snr]

    def _form(self, call: Call) -> _Form:
        """What is known of calls of a shape: on the first, whether the model can compute some tokens alone is tried."""
        if call.key not in self._forms:
            sample: Tensor = call.kwargs[self.net.sample_name]
            if sample.ndim != 4:
                raise InvalidInput(f"Regions are of images [B, C, H, W]; the denoiser was called with {tuple(sample.shape)}.")
            kwargs, rows = call.kwargs, min(call.rows, 2)
            if call.rows > rows:
                kwargs = take_rows(kwargs, torch.arange(rows, device=sample.device), call.rows)
            tokens = self.image_tokens.check(kwargs)
            with counter() as counted:
                output = prediction(self.image_tokens(TokenStore(), None, kwargs))
            if output.shape[0] != rows or output.shape[2:] != sample.shape[2:]:
                raise InvalidInput(
                    f"{type(self.net.model).__name__} gives {tuple(output.shape)} for {rows} images {tuple(sample.shape[1:])}: it takes no "
                    "images of this form (diffusers' DiT takes square ones)."
                )
            grid = token_grid(sample.shape[2:], tokens)
            self.regions.focus(output[:, : sample.shape[1]], grid)  # a measure that does not apply says so here
            if self.regions.ratio < 1 and tokens <= self.regions.multiple:
                warnings.warn(
                    f"An image of {tokens} tokens, rounded up to a multiple of {self.regions.multiple}: all are computed at every step and "
                    "nothing is saved. Give Regions a smaller multiple.",
                    NoEffectWarning,
                    stacklevel=3,
                )
            self._forms[call.key] = _Form(tokens, grid, {tokens: int(counted.get_total_flops()) // rows})
        form = self._forms[call.key]
        self._full = form.flops[form.tokens]
        return form

    def _index(self, rows: list[int], call: Call) -> Tensor:
        return torch.tensor(rows, dtype=torch.int64, device=call.kwargs[self.net.sample_name].device)


def _placed(whole: Any, part: Any, index: Tensor, rows: int) -> Any:
    """An output of all rows with those of a part of them in their places."""
    if whole is None:
        whole = tree_map(lambda t: t.new_zeros(rows, *t.shape[1:]) if isinstance(t, Tensor) else t, part)
    return tree_map(lambda a, b: a.index_copy(0, index, b) if isinstance(a, Tensor) else a, whole, part)


def attach_regions(
    model: nn.Module, regions: Regions, *, noise: NoiseScale, example: Any, timestep: str | None = None, observe: bool = False
) -> RegionDenoiser:
    """A transformer denoiser that computes only some tokens at some steps. The model is not changed and not cut.

    Args:
        model: of diffusers, or built like its transformers (`offramp.backbones.image_tokens`).
        regions: which tokens at which steps.
        noise: from its timestep argument to log-SNR.
        example: inputs as the model takes them; the first tensor is the noisy input.
        timestep: name of the timestep argument, if it is none of ``timestep``, ``timesteps``, ``t`` and ``time``.
        observe: keep which tokens were computed.

    Raises:
        UnsupportedModel: the model cannot compute some tokens alone; the message says why.
        InvalidInput: the example does not fit.
    """
    return RegionDenoiser(uncut_denoiser(model, noise=noise, example=example, timestep=timestep), regions, observe=observe)


def attach_region_pipeline(
    pipe: Any, regions: Regions, *, example: Any = None, noise: NoiseScale | None = None, observe: bool = False
) -> Any:
    """A view of a pipeline whose denoiser computes only some tokens at some steps; else as `attach_pipeline`.

    Args:
        pipe: of diffusers, with a ``transformer`` and a ``scheduler``.
        regions: which tokens at which steps.
        example: inputs of the denoiser; by default made from its configuration.
        noise: from its timesteps to log-SNR; by default from the pipeline's scheduler.
        observe: keep which tokens were computed, in ``view.denoiser.maps``.

    Raises:
        UnsupportedModel: the denoiser cannot compute some tokens alone; the message says why.
        InvalidInput: the pipeline has no denoiser or scheduler.
    """
    model = getattr(pipe, library.denoiser_name(pipe))
    level = noise if noise is not None else library.noise_scale(pipe.scheduler, model)
    given = example if example is not None else library.example_inputs(model)
    return pipeline_view(pipe, attach_regions(model, regions, noise=level, example=given, observe=observe))
