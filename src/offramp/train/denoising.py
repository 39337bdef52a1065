"""Denoisers in the ordinary training loop: the model with its exits, or under a plan, as a `MultiExit`. Batches: `offramp.train.noising`.

An item is an image; its answer at an exit is a prediction ``[C, H, W]`` and its loss a squared error. With that every recipe of
`offramp.train.recipe` holds for denoisers as it is: ``Joint(Mean())`` trains every exit through the model's own final layers, so that a
schedule of any shape may be used afterwards. What noise levels decide is in `offramp.train.denoising_recipes`.

Unlike other networks, denoisers are trained through their cut: an exit's answer is what `offramp.engines.diffusion.denoise` gives there,
the final layers of the model on an earlier state, and those are no module that could be called. The cut shares the model's parameters. It
is exported in evaluation mode, so dropout inside the model does not take part; a view without exits runs the model itself, unless it
is compiled with code that views share.

A denoiser that has learned the variance of its sampler's steps too (DiT, PixArt: twice the channels) is trained on its prediction, the
first channels, at every exit. The variance is left untrained: Nichol and Dhariwal (2021, section 3.1) teach it by the variational bound
with the prediction held, which needs the sampler's posterior. Exits with an output layer of their own answer 0 there, the middle of its
bounds; through the model's final layers it is what these give, which drifts when the model itself is trained. Pipelines of diffusers do
not read it; for a sampler that does, choose a fixed variance after such training.

Shapes: ``B`` rows, ``K`` exits, the model's own answer among them and last; ``C`` channels of the prediction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from offramp.backbones import Cut, CutState
from offramp.backbones.shared_code import SharedCode
from offramp.backbones.taps import first_tensor
from offramp.core.errors import InvalidInput
from offramp.core.modes import evaluating
from offramp.diffusion import BoundPoint, Call, DenoisingNet
from offramp.exits.denoising import DenoisingExit
from offramp.network import Example, Exit, MultiExit
from offramp.policies.denoising import OUTPUT, Moment, NoiseLevel, Place, Point, Scheduled
from offramp.policies.fills import HeadOutput, Identity


def add_heads(net: DenoisingNet, spec: DenoisingExit, at: Sequence[str] | None = None) -> None:
    """Put exits into a denoiser, at every place but the last by default. Those that were there are replaced.

    Raises:
        InvalidInput: a place does not exist, or the spec does not fit the states there.
    """
    call = net.example_call()
    made = net.cut(call)
    places = list(net.at[:-1] if at is None else at)
    indices = [net.boundary(p, made) for p in places]
    with torch.no_grad():
        states = [made.begin(**call.kwargs)]
        for k in range(len(made.segments)):
            states.append(made.run(states[-1], k, k + 1))
        answer = made.end(states[-1])
        channels = net.prediction(answer).shape[1]
        whole = first_tensor(answer)
    for place, index in zip(places, indices, strict=True):
        hidden = states[index].hidden
        if hidden is None:
            raise InvalidInput(f"There is no state at {place!r}; exits go after a module that the denoiser is cut at.")
        head = spec.build(tuple(hidden.shape[1:]), tuple(whole.shape[1:]), channels)  # type: ignore[union-attr]  # it has a prediction
        net.heads[place.replace(".", "/")] = head.to(net.device, net.dtype)


class _SharedLayers(nn.Module):
    """Stands where an exit has nothing of its own: its answer is that of the model's final layers."""


class DenoisingView(MultiExit):
    """A denoiser as the training loop sees it: inputs by name; answers ``[B, C, H, W]``; instead of states the noise level of every row.

    Attributes:
        net: the denoiser.
    """

    def __init__(self, net: DenoisingNet, exits: Sequence[Exit], heads: Sequence[nn.Module]) -> None:
        if any(isinstance(v, Tensor) and v.is_inference() for v in net.example.values()):
            raise InvalidInput("The denoiser was attached in inference mode, so it cannot be trained; attach it outside.")
        super().__init__(net.model, exits, heads, Example((), dict(net.example)), net.prediction, None)
        # In a tuple, as its modules are here already: they must not appear twice in what is saved.
        self._net = (net,)
        self._segments: dict[int, Callable[..., Any]] = {}
        self._whole: tuple[Callable[..., Any]] | None = None
        self._code: SharedCode | None = None
        self._in_parts = False
        call = net.example_call()
        with torch.no_grad(), evaluating(net.model):
            self._num_outputs = int(net.prediction(net.model(**call.kwargs)).shape[1])

    @property
    def net(self) -> DenoisingNet:
        return self._net[0]

    def compile(self, code: SharedCode | None = None, **options: Any) -> None:  # type: ignore[override]
        """Run compiled from now on: each segment of the cut, equal ones by the same code; without exits the whole model.

        Args:
            code: shared with other views. A view without exits then runs through the cut too where its net has one, so that nothing
                is compiled that was compiled for another; dropout inside the model does not take part.
            options: of ``torch.compile``; those of ``code`` where that is given.

        Raises:
            InvalidInput: both are given.
        """
        if code is not None and options:
            raise InvalidInput(f"Shared code has its own options; give {', '.join(options)} to SharedCode(...).")
        self._code = code if code is not None else SharedCode(**options)
        self._in_parts = code is not None and bool(self.net.at)
        self._segments.clear()
        self._whole = None

    def _run(self, made: Cut, state: CutState, part: bool = False) -> CutState:
        """The next segment.

        Args:
            made: the cut.
            state: before it.
            part: whether the state has some rows of a batch only. How many changes from step to step, so that where sizes are constants
                of the code, as many codes would be made; then such a state runs uncompiled.
        """
        segment = made.segments[state.at]
        run: Callable[..., Any] = segment.module
        if self._code is not None and not (part and self._code.options.get("dynamic") is False):
            run = self._segments.get(id(run)) or self._segments.setdefault(id(run), self._code.bind(segment.module))
        return made.advance(state, run(*(state.values[n] for n in segment.inputs)))

    def _model(self, kwargs: dict[str, Any]) -> Any:
        """The model itself."""
        if self._whole is None:
            self._whole = (self.model if self._code is None else torch.compile(self.model, **self._code.options),)
        return self._whole[0](**kwargs)

    def _log_snr(self, call: Call) -> Tensor:
        """Noise level of every row, ``[B]`` float32."""
        level: Tensor = self.net.noise.log_snr(call.kwargs[self.net.timestep_name])
        return level.float()

    def _bound(self, cache: dict[Any, tuple[BoundPoint, ...]], points: Sequence[Point], call: Call) -> tuple[Cut, tuple[BoundPoint, ...]]:
        """The cut for calls of this form and points on it; export and its checks want to see neither autocast nor a graph."""
        if call.key not in cache:
            with torch.autocast(call.kwargs[self.net.sample_name].device.type, enabled=False), torch.no_grad():
                self.net.cut(call)  # no points are bound without a cut
                cache[call.key] = self.net.bind(points, call)
        return self.net.cut(call), cache[call.key]


class ExitsView(DenoisingView):
    """Every exit of a denoiser in one pass: its own output layer where a head has one, else the model's final layers.

    What `fit` makes of a `DenoisingNet`. Answers are those that ``engines.diffusion.denoise.Denoiser`` gives for `HeadOutput` and for
    `Identity`. "States" are the noise level ``[B]`` and, for every exit, the uncertainty ``[B]`` that its head tells, or an empty tensor.

    Args:
        net: the denoiser.
        at: places of the exits, in order; by default all that lie before ``to``. With none, the model itself runs, and may be a net of
            `offramp.diffusion.uncut_denoiser`.
        to: where exits without an output layer go on: after this place.

    Raises:
        InvalidInput: a place does not exist or its state does not continue at ``to``; name the places that do.
    """

    def __init__(self, net: DenoisingNet, at: Sequence[str] | None = None, to: Place = -1) -> None:
        places = list(at) if at is not None else list(net.at[: net.boundary(to) - 1])
        heads = [net.head(net.boundary(p), net.cut()) for p in places]  # without exits nothing is cut
        if sorted(places, key=net.boundary) != places or len(set(places)) != len(places):
            raise InvalidInput(f"Exits are named once each, in the order in which they run; got {places}.")
        self.points = tuple(
            Point(place, OUTPUT if own else to, HeadOutput() if own else Identity(), NoiseLevel(), math.inf)
            for place, own in zip(places, (callable(getattr(h, "output", None)) for h in heads), strict=True)
        )
        bound = {net.example_call().key: net.bind(self.points)} if places else {}
        super().__init__(net, [Exit(p, None, (-1,), 0) for p in places], [_SharedLayers() if h is None else h for h in heads])
        self._points: dict[Any, tuple[BoundPoint, ...]] = bound

    def forward_with_states(self, *args: Any, **kwargs: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Answers of every exit and of the model, and the noise level ``[B]`` with the exits' uncertainties ``[B]``."""
        if self.state_transform is not None:
            raise InvalidInput("Gradient equilibrium is not known for denoisers; use a recipe without it.")
        call = self.net.call(*args, **kwargs)
        level = self._log_snr(call)
        if not self.points and not self._in_parts:
            return (self.select(self._model(call.kwargs)),), (level,)
        made, points = self._bound(self._points, self.points, call)
        state, answers, uncertain = made.begin(**call.kwargs), [], []
        for boundary in range(len(made.segments)):
            for point in (p for p in points if p.start == boundary):
                answers.append(self._leave(made, state, point, level))
                ask = getattr(point.head or self.heads[point.index], "uncertainty", None)
                uncertain.append(ask(state.hidden, level) if callable(ask) else level.new_empty(0))
            state = self._run(made, state)
        return (*answers, self.select(made.end(state))), (level, *uncertain)

    def _leave(self, made: Cut, state: CutState, point: BoundPoint, level: Tensor) -> Tensor:
        if point.point.fill.reads_head:
            return self.select(point.head.output(state.hidden, level))  # type: ignore[union-attr,operator]
        state = made.skip(state, point.stop, {n: state.values[b] for n, b in point.pairs.items()})
        while state.at < len(made.segments):
            state = self._run(made, state)
        return self.select(made.end(state))


class PlanView(DenoisingView):
    """A denoiser as a plan will run it: every row computes what the plan leaves it, in training and in evaluation. One answer.

    Rows that skip wait where they land, so a step costs what the plan costs. This trains a model for a schedule (Moon et al. 2024) or
    a group of blocks for its noise levels (LaTtE-Flow).

    Args:
        net: the denoiser.
        points: of signals that are known beforehand and fills that remember nothing.

    Raises:
        InvalidInput: a point measures or remembers, or does not fit.
    """

    def __init__(self, net: DenoisingNet, points: Sequence[Point]) -> None:
        for point in points:
            if not isinstance(point.signal, Scheduled) or point.remembers or getattr(point.signal, "needs_keys", False):
                raise InvalidInput(
                    f"Training follows plans that the noise level decides; the point at {point.at!r} has {type(point.signal).__name__} "
                    f"and {type(point.fill).__name__}. Use NoiseSchedule or NoiseLevel, with Identity or HeadOutput."
                )
        self.points = tuple(points)
        call = net.example_call()
        bound = net.bind(self.points, call)
        super().__init__(net, [], [])
        # Output layers that the plan uses are trained along.
        self.outputs = nn.ModuleList(dict.fromkeys(p.head for p in bound if p.head is not None))
        self._points: dict[Any, tuple[BoundPoint, ...]] = {call.key: bound}

    def forward_with_states(self, *args: Any, **kwargs: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The answer ``[B, C, H, W]`` of every row at the end of its way, and the noise level ``[B]``."""
        call = self.net.call(*args, **kwargs)
        made, points = self._bound(self._points, self.points, call)
        level = self._log_snr(call)
        exact = self.net.noise.log_snr(call.kwargs[self.net.timestep_name]).tolist()  # one host read a step
        moment = Moment(exact, [0] * call.rows)
        fires = [[s >= p.point.threshold for s in p.point.signal.known(moment, p.index)] for p in points]  # type: ignore[union-attr]
        values: dict[str, Tensor] = dict(made.begin(**call.kwargs).values)
        here = list(range(call.rows))
        landing: dict[int, list[tuple[BoundPoint, list[int]]]] = {}
        for boundary in range(len(made.segments) + 1):
            for point, rows in landing.pop(boundary, []):
                filled = self._fill(made, point, _taken(made, values, rows, point.start, call.rows), level[rows])
                _place(made, values, filled, rows, call.rows)
                here = sorted([*here, *rows])
            if boundary == len(made.segments):
                break
            for point in (p for p in points if p.start == boundary):
                if gone := [r for r in here if fires[point.index][r]]:
                    landing.setdefault(point.stop, []).append((point, gone))
                    here = [r for r in here if not fires[point.index][r]]
            if here:
                done = self._run(made, _taken(made, values, here, boundary, call.rows), part=len(here) < call.rows)
                _place(made, values, {n: done.values[n] for n in made.made(boundary, boundary + 1)}, here, call.rows)
        last = len(made.segments)
        return (self.select(made.end(CutState({n: values[n] for n in made.names(last)}, call.rows, last))),), (level,)

    def _fill(self, made: Cut, point: BoundPoint, state: CutState, level: Tensor) -> dict[str, Tensor]:
        if point.point.fill.reads_head:
            found = {point.made[0]: point.head.output(state.hidden, level)}  # type: ignore[union-attr,operator]
        else:
            found = point.point.fill.fill({n: state.values[b] for n, b in point.pairs.items()}, (), None)
        return {n: found[n] for n in made.made(point.start, point.stop)}


def _taken(made: Cut, values: Mapping[str, Tensor], rows: list[int], boundary: int, count: int) -> CutState:
    """The state of some of ``count`` rows at a boundary."""
    chosen = {n: values[n] for n in made.names(boundary)}
    if len(rows) < count:
        chosen = {n: made.select(n, t, torch.tensor(rows, device=t.device)) for n, t in chosen.items()}
    name = made.hidden_name(boundary)
    return CutState(chosen, len(rows), boundary, None if name is None else chosen[name])


def _place(made: Cut, values: dict[str, Tensor], new: Mapping[str, Tensor], rows: list[int], count: int) -> None:
    """Put what was made of some rows among all."""
    for name, tensor in new.items():
        if len(rows) < count:
            tensor = made.place(name, values.get(name), tensor, torch.tensor(rows, device=tensor.device), count)
        values[name] = tensor


__all__ = ["DenoisingView", "ExitsView", "PlanView", "add_heads"]
