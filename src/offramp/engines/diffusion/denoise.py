"""denoise: run a denoiser so that each row of each step computes only what its decision points ask for.

A plan is a tuple of `Point`. One call walks over the boundaries of the cut (`offramp.engines.diffusion.step`): rows that land at a boundary
join, the points there send some away, and the segment runs for the rows that are present. What rows carry is taken and joined by the batch
dimension of every live tensor, so a row's result does not depend on its batch mates. Points known beforehand cost no synchronisation;
measured ones cost one host read each.

Shapes: ``B`` rows of a call, ``T`` steps.
"""

from __future__ import annotations

import contextlib
import copy
import math
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from offramp.backbones import Cut, CutState
from offramp.core.noise import NoiseScale
from offramp.diffusion import BoundPoint, Call, DenoisingNet
from offramp.engines.diffusion.report import Report, StepRecord
from offramp.engines.diffusion.run import Eager, Runner
from offramp.engines.diffusion.step import Walk
from offramp.engines.diffusion.straight import Work, is_straight, note, straight_path
from offramp.engines.diffusion.trajectory import Branch, Host, Trajectory
from offramp.engines.diffusion.unchanged import Structure
from offramp.engines.turn import Turn
from offramp.policies.denoising import Moment, Point

ANOTHER = "make another for the inner call with offramp.compile(...): what is remembered belongs to one sampling run"
"""What a call from within a call should use."""


class Denoiser(nn.Module):
    """A denoiser that carries out a plan. Called as the user's model is called, returns what it returns.

    Attributes the model has (``config``, ``dtype``, ...) are the model's, so that a pipeline takes it for the model. Runs without gradients
    and in evaluation mode. Everything remembered is in ``trajectory``; `reset` forgets it and starts another report.

    What is remembered belongs to one sampling run. `sampling` is such a run: other threads wait for its end. Called without it, from a
    loop of the caller's own, a call from another thread than the last one begins a trajectory: threads that take turns in two loops get
    the images of the loops alone, and reuse nothing.

    Args:
        net: from `attach_denoiser`.
        points: the plan; without points it is the plain model.
        observe: note every measured score in the report, for calibration.
        run: runs the segments; by default as they were exported, eagerly. `offramp.engines.diffusion.graphs.Captured` compiles
            and captures.
        structure: the model as it was attached, by default as it is now; at each run it must still be that.

    Attributes:
        straight: steps that are known beforehand and the same for every row are run as one function; the results are the same without.
        noise: from the timestep to log-SNR; the net's, unless a run is sampled with other levels.
        share: of the steps that were asked for, those that the last run took.

    Raises:
        InvalidInput: a point has no such place or its fill does not fit.
    """

    def __init__(
        self,
        net: DenoisingNet,
        points: Sequence[Point] = (),
        *,
        observe: bool = False,
        run: Runner | None = None,
        structure: Structure | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        self.points = tuple(points)
        self.observe = observe
        self.straight = True
        self.run: Runner = run if run is not None else Eager()
        self.noise: NoiseScale = net.noise
        self.share = 1.0
        self._structure: Structure | None = structure if structure is not None else Structure(net.model)
        self._turn = Turn("This denoiser", ANOTHER)
        self._caller = 0
        self.trajectory = Trajectory()
        self._bound: dict[Any, tuple[BoundPoint, ...]] = {}
        self._inputs: dict[Any, tuple[tuple[str, str], ...]] = {}
        self._works: dict[Any, Work] = {}
        self._schedule: Any = None
        self._host: tuple[Tensor, list[float]] | None = None
        self._levels: dict[float, float] = {}
        self._records: deque[StepRecord] = deque(maxlen=4096)
        self._peak = 0
        net.bind(self.points)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            net: Any = super().__getattr__("net")
            return getattr(net.model, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Denoiser:
        """Another denoiser that remembers nothing; cuts are made anew, on first use."""
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        memo |= {
            id(self._bound): {},
            id(self._inputs): {},
            id(self._works): {},
            id(self.net._cuts): {},
            id(self.trajectory): Trajectory(),
            id(self._records): deque(maxlen=4096),
        }
        made.__dict__ = {n: copy.deepcopy(v, memo) for n, v in self.__dict__.items() if n not in ("_schedule", "_host")}
        made._schedule = made._host = None
        return made

    @contextlib.contextmanager
    def sampling(
        self, timesteps: Tensor | Callable[[], Tensor] | None = None, *, share: float = 1.0, noise: NoiseScale | None = None
    ) -> Iterator[None]:
        """One sampling run: begins with nothing remembered and forgets everything at its end, also by an error. Other threads wait.

        Args:
            timesteps: as for `reset`.
            share: steps that are taken, of those that were asked for; for the report.
            noise: from the timestep to log-SNR in this run and the next; by default as it was.

        Raises:
            InvalidInput: a run is under way in this thread, or the model is not what was attached any more.
        """
        with self._turn:
            self._check()
            self.reset(timesteps)
            self.share = share
            if noise is not None:
                self.noise = noise
            try:
                yield
            finally:
                self.release()

    def _check(self) -> None:
        """Refuse a model that has changed; give up what was captured of one whose weights have moved."""
        if self._structure is not None and self._structure.check():
            self.run.forget()

    def reset(self, timesteps: Tensor | Callable[[], Tensor] | None = None) -> None:
        """Begin a trajectory: forget everything and begin another report.

        Args:
            timesteps: what the sampler will step through, ``[T]`` or per row ``[B, T]``, or a function that gives it at the first step;
                without it the last step is not known and not guarded.
        """
        self.release()
        self._records.clear()
        self._peak = 0
        self._schedule, self._host = timesteps, None
        self._levels.clear()

    def release(self) -> None:
        """Forget what is remembered and keep the report."""
        self.trajectory.reset()

    @property
    def report(self) -> Report:
        """What ran since the last `reset`."""
        return Report.of(list(self._records), self.net.cut().spec.flops, len(self.net.at) + 1, self._peak, self.share)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._turn.mine:
            return self._step(*args, **kwargs)
        with self._turn:
            if self._caller != (caller := threading.get_ident()):
                self.trajectory.reset()
                self._caller = caller
            return self._step(*args, **kwargs)

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self._forward(*args, **kwargs)
        except BaseException:
            self.trajectory.reset()  # half a step is no step: whoever tries again begins anew
            raise

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode(False), torch.no_grad():  # what is remembered may be written to in another mode than it was made in
            net = self.net
            call = net.call(*args, **kwargs)
            made = net.cut(call)
            if call.key not in self._bound:
                self._bound[call.key] = net.bind(self.points, call)
            points = self._bound[call.key]
            sample: Tensor = call.kwargs[net.sample_name]
            times, final = self._times(call)
            log_snr = self._log_snr(times)
            branch, why = self.trajectory.enter(times, log_snr, call.key, [p.point.fill.keeps for p in points])
            moment = Moment(log_snr, branch.step.tolist(), self.trajectory.branch, self._keys(branch, sample))
            if self.trajectory.step == 0 and self.trajectory.branch == 0:
                self._check()
                self._records.clear()
            record = StepRecord(self.trajectory.branch, self.trajectory.step, log_snr, made.spec.flops)
            state = self._begin(made, call)
            owner = (self, self.trajectory.branch)
            if self.straight and is_straight(points, branch, moment, final):
                path = straight_path(points, len(made.segments), branch, moment, final, why)
                work = self._work(Work(made, points, path, call.rows))
                values = self.run.step(work, state, branch.memories, log_snr[0], owner)
                note(record, work)
                for p in points:
                    if p.point.follows and p.index not in path.stored:
                        branch.memories[p.index].skipped(slice(None))
            else:
                rows = self.run.rows(made, points, state.values, sample, log_snr, owner)
                Walk(made, points, branch, moment, final, why, rows, record, self.observe).all()
                values = rows.outputs()
            state = CutState(values, call.rows, len(made.segments))
            plain = None if call.return_dict else made.end_as_tuple(state)
            output = made.end(state) if plain is None else plain
            self._records.append(record)
            self._peak = max(self._peak, self.trajectory.cache_bytes)
        if call.return_dict:
            return output
        if isinstance(output, Mapping):
            return tuple(v for v in output.values() if v is not None)
        return output if isinstance(output, tuple) else (output,)

    def _begin(self, made: Cut, call: Call) -> CutState:
        """The inputs bound. Calls of one form differ in their tensors alone, so later ones are not looked through again."""
        known = self._inputs.get(call.key)
        if known is not None:
            return CutState({n: call.kwargs[given] for n, given in known}, call.rows, 0)
        state = made.begin(**call.kwargs)
        given = {n: v for n, v in call.kwargs.items() if isinstance(v, Tensor)}
        names = {id(v): n for n, v in given.items()}
        if len(names) == len(given) and all(id(v) in names for v in state.values.values()):
            self._inputs[call.key] = tuple((n, names[id(v)]) for n, v in state.values.items())
        return state

    def _work(self, work: Work) -> Work:
        """The same object for the same work, with what is counted once."""
        if len(self._works) > 1024:
            self._works.clear()
        return self._works.setdefault((work.cut, id(work.points), work.path, work.rows), work)

    def _log_snr(self, times: list[float]) -> list[float]:
        """Noise level of every row; each timestep is asked for once in a trajectory, so that equal ones have equal levels."""
        if missing := [t for t in dict.fromkeys(times) if t not in self._levels]:
            if len(self._levels) > 4096:
                self._levels.clear()
                missing = list(dict.fromkeys(times))
            if self._host is not None and self._host[0].ndim == 1:  # all that are to come at once
                missing = list(dict.fromkeys([*missing, *self._host[1]]))
            self._levels |= zip(missing, self.noise.log_snr(torch.tensor(missing, dtype=torch.float64)).tolist(), strict=True)
        return [self._levels[t] for t in times]

    def _times(self, call: Call) -> tuple[list[float], Host]:
        """Every row's timestep on the host, read from the sampler's list where it is an entry of it, and whether it is the row's last."""
        if self._host is None and self._schedule is not None:
            listed = self._schedule() if callable(self._schedule) else self._schedule
            self._host = (listed, listed.double().cpu().tolist())
        given = call.timestep
        if not isinstance(given, Tensor):
            times = [float(given)] * call.rows
        elif given.device.type != "cpu" and self._host is not None and (found := _listed(given, *self._host)) is not None:
            times = [found] * call.rows
        else:
            times = [float(t) for t in given.reshape(-1).tolist()]
            times = times * call.rows if len(times) == 1 else times
        if self._host is None:
            return times, np.zeros(call.rows, dtype=bool)
        ends = self._host[1]
        each: list[Any] = [e[-1] for e in ends] if ends and isinstance(ends[0], list) else [ends[-1]] * call.rows  # type: ignore[index]
        each = each if len(each) == call.rows else each * (call.rows // len(each))
        last = {pair: math.isclose(*pair, rel_tol=1e-6, abs_tol=1e-9) for pair in set(zip(times, each, strict=True))}
        return times, np.array([last[pair] for pair in zip(times, each, strict=True)])

    def _keys(self, branch: Branch, sample: Tensor) -> list[int]:
        """A number of every row from its first input, if a signal asks for it."""
        if not any(getattr(p.signal, "needs_keys", False) for p in self.points):
            return []
        anew = np.flatnonzero(branch.step == 0).tolist()
        if len(branch.keys) != len(branch.step):
            branch.keys = [0] * len(branch.step)
        if anew:
            bits = sample.float().contiguous().view(torch.int32).flatten(1).long()
            weights = torch.arange(1, bits.shape[1] + 1, device=bits.device)
            sums = (bits * weights).sum(1).tolist()
            for r in anew:
                branch.keys[r] = sums[r]
        return branch.keys


def _listed(given: Tensor, listed: Tensor, host: list[Any]) -> float | None:
    """The value of a timestep that is a view of an entry of the sampler's list."""
    same = listed.device == given.device and listed.dtype == given.dtype and listed.ndim == 1
    if not same or any(s != 0 and n > 1 for s, n in zip(given.stride(), given.shape, strict=True)):
        return None
    if given.untyped_storage().data_ptr() != listed.untyped_storage().data_ptr() or listed.stride(0) == 0:
        return None
    place = (given.storage_offset() - listed.storage_offset()) // listed.stride(0)
    return float(host[place]) if 0 <= place < len(host) else None
