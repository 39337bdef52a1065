"""A denoiser with decision points: the user's model, its cut, its noise scale and the learned heads of its exits.

``attach_denoiser`` makes a `DenoisingNet`; ``engines.diffusion.denoise.Denoiser`` runs a plan (a tuple of
`offramp.policies.denoising.Point`) on it. The model is not changed. Calls are brought to one form, keyword inputs with the timestep as
``[B]``, so that one cut serves a pipeline's positional and keyword, scalar and per-row ways of calling; another shape or dtype makes
another cut, on first use.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from offramp.backbones import Cut, CutState, Taps, cut, repeated_blocks
from offramp.backbones.streams import Stream, image_streams
from offramp.backbones.taps import first_tensor
from offramp.core.bundle import fingerprint
from offramp.core.errors import InvalidInput
from offramp.core.flops import count_flops
from offramp.core.noise import NoiseScale
from offramp.policies.denoising import INPUT, OUTPUT, Measured, Place, Point

_TIMES = ("timestep", "timesteps", "t", "time")
_CUTTING = threading.RLock()
"""Exporting a model is not for two threads at once."""


class _Key:
    """What is hashed once and looked up often."""

    def __init__(self, parts: tuple[Any, ...]) -> None:
        self.parts, self._hash = parts, hash(parts)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, _Key) and self.parts == other.parts)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Key:
        return self  # never changes


@dataclass(frozen=True)
class Call:
    """One call of a denoiser in the form its cut takes.

    Attributes:
        kwargs: inputs by name, the timestep ``[B]`` on the model's device, constants that are the default left out.
        timestep: the timestep as it was given, for reading it without a synchronisation where that is possible.
        rows: B.
        return_dict: whether the caller wants the model's own output class (diffusers' convention).
        key: equal for calls that one cut serves.
    """

    kwargs: dict[str, Any]
    timestep: Any
    rows: int
    return_dict: bool
    key: Any


@dataclass(frozen=True)
class BoundPoint:
    """A point of a plan on one cut.

    Attributes:
        point: as given.
        index: its place in the plan.
        start: boundary where rows are asked.
        stop: boundary where those that skip go on.
        made: names that the fill gives.
        pairs: for each of them the name at the start that it continues; empty if they do not match up.
        since: boundary of the place that the signal names.
        head: the learned head at the start.
        head_flops: per row, where the head is asked for a score.
        fill_flops: per row, where the head gives the output.
    """

    point: Point
    index: int
    start: int
    stop: int
    made: tuple[str, ...]
    pairs: Mapping[str, str]
    since: int | None = None
    head: nn.Module | None = None
    head_flops: int = 0
    fill_flops: int = 0


class DenoisingNet(nn.Module):
    """Made by `attach_denoiser`.

    Attributes:
        model: the user's denoiser.
        at: the places, as module paths in the order in which they run.
        noise: from its timestep argument to log-SNR.
        heads: learned heads by place (dots replaced); each has ``uncertainty(hidden, log_snr [B]) -> [B]`` or ``output(hidden, log_snr)``.
        streams: where the image's state at a place is, if it is not the first tensor that the module there returns: blocks of joint
            attention carry the text's beside it.
    """

    def __init__(
        self,
        model: nn.Module,
        at: Sequence[str],
        noise: NoiseScale,
        example: Mapping[str, Any],
        names: Mapping[str, str],
        heads: nn.ModuleDict,
        streams: Mapping[str, Stream] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.at = tuple(at)
        self.noise = noise
        self.example = dict(example)
        self.heads = heads
        self.streams = dict(streams or {})
        self._time, self._sample = names["timestep"], names["sample"]
        self._signature = inspect.signature(model.forward)
        self._cuts: dict[Any, Cut] = {}
        self._known: dict[Any, tuple[tuple[str, ...], _Key, bool]] = {}
        self._first: list[nn.Parameter] = []

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        return next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)

    @property
    def sample_name(self) -> str:
        """Name of the noisy input."""
        return self._sample

    @property
    def timestep_name(self) -> str:
        """Name of the timestep argument."""
        return self._time

    def call(self, *args: Any, **kwargs: Any) -> Call:
        """Bring a call of the model to the form its cut takes.

        Raises:
            InvalidInput: forward does not take these inputs, or there is no timestep.
        """
        token = None if args else self._token(kwargs)
        if token is not None and token in self._known:
            names, key, returns = self._known[token]
            sample, time = kwargs[self._sample], kwargs[self._time]
            rows = int(sample.shape[0])
            inputs = {n: kwargs[n] for n in names}
            inputs[self._time] = _per_row(time, rows, sample.device)
            return Call(inputs, time, rows, returns, key)
        found = self._call(args, kwargs)
        if token is not None and found.kwargs.keys() <= kwargs.keys():
            if len(self._known) > 256:
                self._known.clear()
            self._known[token] = tuple(found.kwargs), found.key, found.return_dict
        return found

    def _token(self, kwargs: Mapping[str, Any]) -> Any | None:
        """The same for calls of one form, and quick to make; none if an input is neither a tensor nor a plain value."""
        sample = kwargs.get(self._sample)
        if not isinstance(sample, Tensor):
            return None
        if not self._first:
            self._first.extend(p for p in self.model.parameters() if p.is_floating_point())
        form: list[Any] = [self._first[0].dtype if self._first else None, _autocast(sample.device.type)]
        for name, value in kwargs.items():
            if isinstance(value, Tensor):
                form.append((name, value.dtype, value.device, value.shape))
            elif value is None or isinstance(value, bool | int | float | str):
                form.append((name, type(value), None if name == self._time else value))
            else:
                return None
        return tuple(form)

    def _call(self, args: Any, kwargs: Any) -> Call:
        try:
            given = dict(self._signature.bind(*args, **kwargs).arguments)
        except TypeError as error:
            raise InvalidInput(f"{type(self.model).__name__} does not take these inputs: {error}.") from error
        for name, parameter in self._signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                given |= given.pop(name, {})
            elif parameter.kind is inspect.Parameter.VAR_POSITIONAL and given.pop(name, ()):
                raise InvalidInput(f"{type(self.model).__name__} takes unnamed inputs (*{name}); pass inputs by name.")
            elif name in given and _is(given[name], parameter.default):
                del given[name]
        return_dict = given.pop("return_dict", True)
        time, sample = given.get(self._time), given.get(self._sample)
        if time is None or not isinstance(sample, Tensor):
            raise InvalidInput(f"A denoiser is called with a tensor {self._sample!r} and a timestep {self._time!r}; got {sorted(given)}.")
        rows = int(sample.shape[0])
        given[self._time] = _per_row(time, rows, sample.device)
        leaves, structure = tree_flatten({n: given[n] for n in sorted(given)})
        shapes = tuple(
            (v.dtype, v.device, v.ndim, tuple(v.shape[1:]) if v.ndim and v.shape[0] == rows else tuple(v.shape))
            if isinstance(v, Tensor)
            else repr(v)
            for v in leaves
        )
        key = _Key((sample.device, self.dtype, _autocast(sample.device.type), structure, shapes))
        return Call({n: given[n] for n in sorted(given)}, time, rows, bool(return_dict), key)

    def example_call(self) -> Call:
        """The example where the model is now and of its dtype."""

        def place(name: str, leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            return leaf.to(self.device, self.dtype) if leaf.is_floating_point() and name != self._time else leaf.to(self.device)

        return self.call(**{n: tree_map(lambda leaf, n=n: place(n, leaf), v) for n, v in self.example.items()})

    def predicted(self, answer: Tensor) -> int:
        """How many of the channels ``C`` of an answer ``[B, C, H, W]`` are the prediction: they come first, as many as the noisy input has.

        The others are the variance of the sampler's step, where the model has learned it (Nichol and Dhariwal 2021, section 3.1; DiT and
        PixArt answer ``2 C_in`` channels). Of answers of another rank, such as tokens, all is the prediction.
        """
        sample = self.example[self._sample]
        images = answer.ndim == sample.ndim == 4
        return min(answer.shape[1], sample.shape[1]) if images else answer.shape[1]

    def prediction(self, output: Any) -> Tensor:
        """The prediction ``[B, C, ...]`` in what the denoiser returns, without a learned variance beside it.

        Raises:
            InvalidInput: there is no floating-point tensor.
        """
        found = first_tensor(output)
        if found is None:
            raise InvalidInput(f"The denoiser returns a {type(output).__name__} without a floating-point tensor, so it has no prediction.")
        count = self.predicted(found)
        return found if count == found.shape[1] else found[:, :count]

    def cut(self, call: Call | None = None) -> Cut:
        """The model as segments for calls of one form; by default that of the example. Made on first use."""
        call = call or self.example_call()
        if call.key not in self._cuts:
            with _CUTTING, torch.inference_mode(False):  # engines run in it, and writes in place cannot be seen there
                inputs = tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, call.kwargs)
                self._cuts[call.key] = cut(self.model, self.at, (), inputs, batch_size=call.rows, streams=self.streams, ahead=True)
        return self._cuts[call.key]

    def boundary(self, place: Place, made: Cut | None = None) -> int:
        """Number of the boundary at a place.

        Raises:
            InvalidInput: the model is not cut there.
        """
        order = [s.name for s in (made or self.cut()).segments[:-1]]
        if place == INPUT:
            return 0
        if place == OUTPUT:
            return len(order) + 1
        if isinstance(place, int) and -len(order) <= place < len(order):
            return place % len(order) + 1
        if isinstance(place, str) and place in order:
            return order.index(place) + 1
        raise InvalidInput(
            f"No place {place!r}: the denoiser is cut after {', '.join(order)}. Name one of these, its number from 0 to {len(order) - 1}, "
            f"{INPUT!r} or {OUTPUT!r}; or attach with it in at=[...]."
        )

    def head(self, place: int, made: Cut) -> nn.Module | None:
        """The learned head at a boundary, if there is one."""
        name = made.segments[place - 1].name.replace(".", "/") if 0 < place < len(made.segments) else ""
        # Whoever moves the model may not know of its heads: a pipeline does not.
        return self.heads[name].to(device=self.device, dtype=self.dtype) if name in self.heads else None

    def bind(self, points: Sequence[Point], call: Call | None = None) -> tuple[BoundPoint, ...]:
        """A plan on the cut for calls of one form, every point checked on the example's or the call's inputs.

        Raises:
            InvalidInput: a place does not exist, a skip goes nowhere or backward, or its fill does not fit; nothing is attached then.
        """
        if not points:
            return ()
        call = call or self.example_call()
        made = self.cut(call)
        with torch.no_grad():
            states = [made.begin(**call.kwargs)]
            for k in range(len(made.segments)):
                states.append(made.run(states[-1], k, k + 1))
        return tuple(self._bind(point, index, made, states) for index, point in enumerate(points))

    def _bind(self, point: Point, index: int, made: Cut, states: Sequence[CutState]) -> BoundPoint:
        where = f"Point {index} ({point.at!r} to {point.to!r}, {type(point.fill).__name__})"
        start, stop = self.boundary(point.at, made), self.boundary(point.to, made)
        if start >= stop:
            raise InvalidInput(f"{where} skips nothing: it starts at boundary {start} and ends at {stop}. A skip goes forward.")
        names = made.made(start, stop)
        if loose := [n for n in names if len(made.batch_dims.get(n, ())) != 1]:
            raise InvalidInput(
                f"{where} would fill {loose[0]!r}, which does not hold one row per item. Start the skip later or end it earlier."
            )
        before, after = states[start], states[stop]
        pairs = _pairs(before, after, names, made)
        if point.fill.paired and len(pairs) != len(names):
            lacking = next(n for n in names if n not in pairs)
            raise InvalidInput(
                f"{where} continues the state at its start, but nothing there matches {lacking!r} {tuple(after.values[lacking].shape)}. "
                "Use a fill that remembers it (CachedOutput), or other places."
            )
        head = self.head(start, made)
        measured = isinstance(point.signal, Measured)
        needs = (["uncertainty"] if measured and point.signal.reads_head else []) + (["output"] if point.fill.reads_head else [])  # type: ignore[union-attr]
        if lacks := [n for n in needs if not callable(getattr(head, n, None))]:
            raise InvalidInput(
                f"{where} reads a learned head with {lacks[0]}(hidden, log_snr) at {point.at!r}; attach it with heads={{...}}."
            )
        since = self.boundary(point.signal.since, made) if measured and point.signal.since is not None else None  # type: ignore[union-attr]
        if since is not None and not since < start:
            raise InvalidInput(f"{where}: its signal compares with {point.signal.since!r}, which must be before {point.at!r}.")  # type: ignore[union-attr]
        costs = {"uncertainty": 0, "output": 0}
        if needs:
            level = torch.zeros(before.rows, device=self.device)
            with torch.no_grad():
                for name in needs:
                    function = getattr(head, name)
                    costs[name] = count_flops(function, before.hidden, level) // before.rows
                    got = function(before.hidden, level)
                    want = (before.rows,) if name == "uncertainty" else tuple(after.values[names[0]].shape) if len(names) == 1 else ()
                    if not isinstance(got, Tensor) or tuple(got.shape) != want:
                        shape = tuple(got.shape) if isinstance(got, Tensor) else type(got).__name__
                        raise InvalidInput(f"{where}: {name} of the head gives {shape}; expected {want}.")
        return BoundPoint(point, index, start, stop, names, pairs, since, head, costs["uncertainty"], costs["output"])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def forward_with_states(self, *args: Any, **kwargs: Any) -> tuple[Any, tuple[Tensor, ...]]:
        """The model's output in one ordinary forward, and the state at every place; gradients flow. For training heads."""
        with Taps(self.model, self.at, streams=self.streams) as taps:
            return self.model(*args, **kwargs), taps.states

    def fingerprint(self) -> str:
        """Of the model: what a plan and its calibration are about."""
        return fingerprint(self.model)


def _is(value: Any, default: Any) -> bool:
    """Whether an argument is its default, so that giving it says nothing."""
    plain = isinstance(value, bool | int | float | str) and type(value) is type(default)
    return value is default or (plain and bool(value == default))


def _inputs(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Accept a mapping of keyword inputs, a tuple of positional ones, or ``(args, kwargs)``."""
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, tuple | list):
        if len(example) == 2 and isinstance(example[0], tuple | list) and isinstance(example[1], Mapping):
            return tuple(example[0]), dict(example[1])
        return tuple(example), {}
    raise InvalidInput(f"example must be a mapping of keyword inputs, a tuple or (args, kwargs); got {type(example).__name__}.")


def _autocast(kind: str) -> torch.dtype | None:
    """The dtype that a type of device computes in on its own now: what is exported in one holds casts to it."""
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _per_row(time: Any, rows: int, device: torch.device) -> Tensor:
    """A timestep as ``[rows]``, without waiting for the device."""
    if not isinstance(time, Tensor):
        return torch.full((rows,), time, dtype=torch.float64 if isinstance(time, float) else torch.int64, device=device)
    if time.numel() not in (1, rows) or time.ndim > 1:
        raise InvalidInput(f"The timestep is shaped {tuple(time.shape)}; expected one number, or one per row ({rows}).")
    if time.device.type == "cpu" and device.type == "cuda":
        time = time.pin_memory().to(device, non_blocking=True)
    return time.to(device).reshape(-1).expand(rows)


def _pairs(before: CutState, after: CutState, names: Sequence[str], made: Cut) -> dict[str, str]:
    """For each tensor that is made, the one at the start that it continues: hidden for hidden, else the only one of its shape."""
    if before.at == 0 or after.at == len(made.segments):
        return {}

    def like(a: str, b: str) -> bool:
        left, right = before.values[a], after.values[b]
        return left.shape == right.shape and left.dtype == right.dtype and made.batch_dims.get(a) == made.batch_dims.get(b)

    hidden = made.segments[before.at - 1].hidden
    final = made.segments[after.at - 1].hidden
    pairs: dict[str, str] = {}
    if hidden is not None and final in names and like(hidden, str(final)):
        pairs[str(final)] = hidden
    gone = [n for n in before.values if n not in after.values and made.batch_dims.get(n)]
    for name in names:
        found = [n for n in gone if n not in pairs.values() and like(n, name)]
        if name not in pairs and len(found) == 1:
            pairs[name] = found[0]
    return pairs


def attach_denoiser(
    model: nn.Module,
    at: Sequence[str] | None = None,
    *,
    noise: NoiseScale,
    example: Any,
    heads: Mapping[str, nn.Module] | None = None,
    timestep: str | None = None,
) -> DenoisingNet:
    """Find the places of a denoiser where rows may skip. The model is not changed.

    Args:
        model: any module that predicts noise, velocity or data from a noisy input and a timestep. Its weights may change later, its modules
            not: load adapters (LoRA) before.
        at: module paths to cut after; by default after each of its repeated blocks.
        noise: from its timestep argument to log-SNR; of a diffusers scheduler with `offramp.backbones.diffusers.noise_scale`.
        example: inputs as the model takes them: a mapping of keyword inputs, a tuple, or ``(args, kwargs)``; the first tensor is the
            noisy input.
        heads: learned heads by module path.
        timestep: name of the timestep argument, if it is none of ``timestep``, ``timesteps``, ``t`` and ``time``.

    Raises:
        NotCuttable: a path does not exist, is not reached or runs more than once, or the model cannot be exported.
        InvalidInput: the example or a head does not fit.
    """
    probe = uncut_denoiser(model, noise=noise, example=example, timestep=timestep)
    names = {"timestep": probe.timestep_name, "sample": probe.sample_name}
    inputs = probe.example_call().kwargs
    paths = list(at) if at is not None else [b.path for b in repeated_blocks(model, (), inputs)]
    if isinstance(at, str) or not paths or len(set(paths)) != len(paths):
        raise InvalidInput(f"`at` must be a list that names at least one module and none twice, got {at!r}.")
    given = dict(heads or {})
    if unknown := [p for p in given if p not in paths]:
        raise InvalidInput(f"A head is given for {unknown[0]!r}, which is not one of the places {paths}.")
    kept = nn.ModuleDict({p.replace(".", "/"): h for p, h in given.items()}).to(device=probe.device, dtype=probe.dtype)
    streams = image_streams(model, paths, inputs, probe.sample_name)
    net = DenoisingNet(model, paths, noise, inputs, names, kept, streams)
    order = [s.name for s in net.cut().segments[:-1]]
    net.at = tuple(order)
    return net


def uncut_denoiser(model: nn.Module, *, noise: NoiseScale, example: Any, timestep: str | None = None) -> DenoisingNet:
    """How a denoiser is called and its noise levels, without places and without a cut: for engines that run it in another way.

    Args:
        model: as for `attach_denoiser`, and so are the others.
        noise: from its timestep argument to log-SNR.
        example: inputs as the model takes them.
        timestep: name of the timestep argument.

    Raises:
        InvalidInput: the example does not fit.
    """
    if not isinstance(model, nn.Module):
        raise InvalidInput(f"attach_denoiser takes a torch.nn.Module; got {type(model).__name__}.")
    if not isinstance(noise, NoiseScale):
        raise InvalidInput(f"noise must map timesteps to log-SNR, such as FlowMatching(); got {noise!r}.")
    if getattr(model, "is_cache_enabled", False):
        raise InvalidInput(f"{type(model).__name__} has a cache of its library enabled; call disable_cache() first.")
    if any(hasattr(m, "_hf_hook") for m in model.modules()):
        raise InvalidInput(f"{type(model).__name__} is moved by accelerate's hooks, which a cut cannot follow; remove them first.")
    args, kwargs = _inputs(example)
    parameters = inspect.signature(model.forward).parameters
    time = timestep or next((n for n in _TIMES if n in parameters), None)
    if time is None or time not in parameters:
        raise InvalidInput(f"{type(model).__name__}.forward has no argument {timestep or ' or '.join(_TIMES)!r}; name it: timestep=...")
    try:
        bound = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
    except TypeError as error:
        raise InvalidInput(
            f"The example does not fit {type(model).__name__}.forward: {error}. It takes {', '.join(parameters)}."
        ) from error
    sample = next((n for n, v in bound.items() if isinstance(v, Tensor) and n != time), None)
    if sample is None or time not in bound:
        raise InvalidInput(f"The example must hold a noisy input and the timestep {time!r}; got {sorted(bound)}.")
    names = {"timestep": time, "sample": sample}
    probe = DenoisingNet(model, (), noise, {}, names, nn.ModuleDict())
    probe.example = probe.call(*args, **kwargs).kwargs
    return probe
