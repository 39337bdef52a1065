"""A model with exits: the user's network, heads on its states, and both ways to run them.

Training and recording run one ordinary forward of the untouched model with taps; engines run its cut.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

import offramp.exits
import offramp.policies
from offramp.backbones import Cut, Taps, cut, repeated_blocks
from offramp.core.bundle import check_base, fingerprint, load_bundle, reading, save_bundle
from offramp.core.certificate import Plan
from offramp.core.errors import ArtifactError, FingerprintMismatch, InvalidInput, NotCuttable
from offramp.core.flops import count_flops
from offramp.core.modes import evaluating
from offramp.core.parts import part_from_dict, part_key, part_to_dict
from offramp.core.protocols import HeadSpec, Rule
from offramp.core.system import System
from offramp.exits import Evenly, PooledLinear
from offramp.exits.placement import Placement

OUTPUT = "output"
"""Name of the last exit: the model's own output."""


def answer(output: Any) -> Tensor:
    """The tensor in a model's output that exits imitate: the tensor itself, ``.logits``, ``["logits"]``, or the only tensor.

    Raises:
        InvalidInput: it cannot be told; pass ``select=`` to `attach`.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(getattr(output, "logits", None), Tensor):
        logits: Tensor = output.logits
        return logits
    if isinstance(output, Mapping) and isinstance(output.get("logits"), Tensor):
        return output["logits"]
    tensors = [leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor)]
    if len(tensors) == 1:
        return tensors[0]
    raise InvalidInput(
        f"The model returns a {type(output).__name__} with {len(tensors)} tensors, so its answer cannot be told. "
        "Pass select=lambda output: ... to attach()."
    )


@dataclass(frozen=True)
class OneNumber:
    """The answer of a model that gives one number for each item: ``[B]`` seen as ``[B, 1]``, so that it has the shape of every exit's.

    Attributes:
        select: picks the answer out of the model's output.
    """

    select: Callable[[Any], Tensor]

    def __call__(self, output: Any) -> Tensor:
        return self.select(output).unsqueeze(-1)


class Example(NamedTuple):
    """Inputs to shape a network by: how forward is called, with two rows."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def to(self, device: torch.device, dtype: torch.dtype) -> Example:
        """Tensors moved to a device; floating-point ones to a dtype, as a network's weights are."""

        def move(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            return leaf.to(device, dtype if leaf.is_floating_point() else None, non_blocking=True)

        return Example(*tree_map(move, (self.args, self.kwargs)))


def as_example(example: Any) -> Example:
    """Accept a tensor, a tuple of positional inputs, a mapping of keyword inputs, or ``(args, kwargs)``; keep two rows."""
    if isinstance(example, Example):
        args, kwargs = example
    elif isinstance(example, Tensor):
        args, kwargs = (example,), {}
    elif isinstance(example, Mapping):
        args, kwargs = (), dict(example)
    elif (
        isinstance(example, tuple | list) and len(example) == 2 and isinstance(example[0], tuple | list) and isinstance(example[1], Mapping)
    ):
        args, kwargs = tuple(example[0]), dict(example[1])
    elif isinstance(example, tuple | list):
        args, kwargs = tuple(example), {}
    else:
        raise InvalidInput(f"example must be a tensor, a tuple, a mapping or (args, kwargs); got {type(example).__name__}.")
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor) and t.ndim]
    if not tensors:
        raise InvalidInput("The example holds no tensor with a batch dimension.")
    batch = tensors[0].shape[0]

    def two(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.ndim or leaf.shape[0] != batch:
            return leaf
        return (leaf[:2] if batch >= 2 else torch.cat([leaf, leaf])).detach().clone()

    return Example(*tree_map(two, (args, kwargs)))


@dataclass(frozen=True)
class Exit:
    """One exit.

    Attributes:
        name: module path it reads.
        spec: its head as data, or ``None`` if a module was given.
        hidden_shape: shape of the state it reads, without the batch.
        head_flops: FLOPs per item of its head.
    """

    name: str
    spec: HeadSpec | None
    hidden_shape: tuple[int, ...]
    head_flops: int


class MultiExit(nn.Module):
    """A model with exits. Made by `attach`.

    ``forward`` takes what the model takes and returns K logits ``[B, C]``, the model's own answer last; one number for each item, ``[B]``,
    is ``[B, 1]`` here.

    Attributes:
        model: the user's network, untouched.
        heads: one module per early exit, in execution order.
        exits: what is known about each early exit.
        state_transform: ``(exit index, state) -> state`` applied inside the training forward (gradient equilibrium), or ``None``.
    """

    def __init__(
        self,
        model: nn.Module,
        exits: Sequence[Exit],
        heads: Sequence[nn.Module],
        example: Example,
        select: Callable[[Any], Tensor],
        system: System | None,
    ) -> None:
        super().__init__()
        self.model = model
        self.heads = nn.ModuleList(heads)
        self.exits = tuple(exits)
        self.example = example
        self.select = select
        self.system = system
        self.state_transform: Callable[[int, Tensor], Tensor] | None = None
        self._cut: tuple[Any, Cut] | None = None

    @property
    def at(self) -> tuple[str, ...]:
        """Module paths of the early exits."""
        return tuple(e.name for e in self.exits)

    @property
    def names(self) -> tuple[str, ...]:
        """K exit names, ``"output"`` last."""
        return (*self.at, OUTPUT)

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        return next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        return self.forward_with_states(*args, **kwargs)[0]

    def forward_with_states(self, *args: Any, **kwargs: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Like ``forward``, and the K-1 states the exits read."""
        with Taps(self.model, self.at, self.state_transform) as taps:
            final = self.select(self.model(*args, **kwargs))
            states = taps.states
        cut_off = [p for p, s in zip(self.at, states, strict=True) if not s.requires_grad and _trains(self.model.get_submodule(p))]
        if torch.is_grad_enabled() and final.requires_grad and cut_off:
            raise InvalidInput(
                f"The states at {cut_off} have no gradient although their modules are being trained: reentrant gradient checkpointing "
                "cuts it off. "
                "Use gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})."
            )
        return (*self.read(states), final), states

    def read(self, states: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Logits of every early exit from its state; each head sees the logits of the earlier ones."""
        answers: tuple[Tensor, ...] = ()
        for head, state in zip(self.heads, states, strict=True):
            answers = (*answers, head(state, answers))
        return answers

    def cut(self) -> Cut:
        """The model as segments, made on first use and again after a change of device or dtype."""
        key = (self.device, self.dtype)
        if self._cut is None or self._cut[0] != key:
            example = self.example.to(*key)
            with torch.inference_mode(False):  # engines run in it, and writes in place cannot be seen there
                self._cut = (key, cut(self.model, self.at, example.args, example.kwargs))
        return self._cut[1]

    def costs(self) -> tuple[Tensor, float]:
        """``[K]`` FLOPs per item to leave at each exit, heads on the way included, and FLOPs of the model without heads."""
        segments = torch.tensor([s.flops for s in self.cut().spec.segments], dtype=torch.float64)
        heads = torch.tensor([*(e.head_flops for e in self.exits), 0], dtype=torch.float64)
        return segments.cumsum(0) + heads.cumsum(0), float(segments.sum())

    def head_costs(self) -> Tensor | None:
        """``[K]`` FLOPs per item of each exit's own head, 0 for the model's own output (float64).

        ``None`` where a head reads the answers of earlier ones, so that these run whether anybody may leave there or not.
        """
        if any(getattr(head, "needs_previous", False) for head in self.heads):
            return None
        return torch.tensor([*(e.head_flops for e in self.exits), 0], dtype=torch.float64)

    def fingerprint(self) -> str:
        """Of the model and its heads: what a trace, a plan and its certificate are about. Heads trained further are other heads."""
        digest = hashlib.sha256(self.base_fingerprint().encode())
        for exit_, head in zip(self.exits, self.heads, strict=True):
            made_from = "module" if exit_.spec is None else part_key(exit_.spec)
            digest.update(f"{exit_.name}|{made_from}|{fingerprint(head)}".encode())
        return digest.hexdigest()

    def base_fingerprint(self) -> str:
        """Of the base model alone: what an adapter's heads were trained on."""
        return fingerprint(self.model)

    def detach(self) -> nn.Module:
        """The user's model. Nothing was changed in it, so nothing needs undoing; the heads are dropped by the caller."""
        return self.model

    def save(self, folder: str | os.PathLike[str], *, include_base: bool = False) -> None:
        """Write ``adapter.json`` and ``adapter.safetensors``: the added weights and the fingerprint of the base model.

        Args:
            folder: made if missing.
            include_base: also write the base model's weights, which joint training changed.

        Raises:
            InvalidInput: a head was given as a module, so it cannot be described as data.
        """
        if missing := [e.name for e in self.exits if e.spec is None]:
            raise InvalidInput(f"The heads at {missing} were given as modules; save needs heads given as parts (a HeadSpec).")
        content = {
            "base": type(self.model).__qualname__,
            "fingerprint": self.base_fingerprint(),
            "exits": [
                {"name": e.name, "head": part_to_dict(e.spec), "hidden_shape": list(e.hidden_shape), "head_flops": e.head_flops}
                for e in self.exits
            ],
            "num_outputs": self.num_outputs,
            "system": self.system.card.name if self.system else None,
            "base_included": include_base,
        }
        tensors = {f"heads.{k}": v for k, v in self.heads.state_dict().items()}
        if include_base:
            tensors |= {f"model.{k}": v for k, v in self.model.state_dict().items()}
        save_bundle(folder, "adapter", "adapter", content, tensors)

    @property
    def num_outputs(self) -> int:
        """Width of an answer."""
        return int(self._num_outputs)

    _num_outputs: int = 0


def _called(model: nn.Module, example: Example) -> Any:
    """The model's output for the example.

    Raises:
        InvalidInput: forward does not take what it was given; a batch of a loader, labels included, is the usual reason.
    """
    try:
        return model(*example.args, **example.kwargs)
    except TypeError as error:
        given = ", ".join([f"{len(example.args)} positional"] * bool(example.args) + list(example.kwargs))
        raise InvalidInput(
            f"{type(model).__name__} does not take the example ({given}): {error}. Give inputs alone, without labels, as forward takes "
            "them: a tensor, a tuple of positional or a mapping of keyword inputs, or (args, kwargs)."
        ) from error


def _trains(model: nn.Module) -> bool:
    return any(p.requires_grad for p in model.parameters())


def attach(
    model: nn.Module,
    at: Sequence[str] | int | Placement | None = None,
    *,
    example: Any,
    head: HeadSpec | Sequence[HeadSpec | nn.Module] | None = None,
    system: System | None = None,
    select: Callable[[Any], Tensor] = answer,
    num_outputs: int | None = None,
) -> MultiExit:
    """Attach exits to a model. The model is not changed.

    Args:
        model: any PyTorch module.
        at: module paths to exit after; or how many exits, evenly spaced by cost over the repeated blocks; or a placement. By
            default what ``system`` says, else three.
        example: inputs as the model takes them: a tensor, a tuple, a mapping of keyword inputs, or ``(args, kwargs)``.
        head: one head for every exit, or one per exit; parts of `offramp.exits` or modules ``(hidden, previous) -> logits``.
        system: a published method; gives the defaults of ``at`` and ``head``, and later of `fit` and `calibrate`.
        select: picks the answer out of the model's output.
        num_outputs: width of an answer; by default that of the model's own.

    Returns:
        The network with exits, on the model's device.

    Raises:
        NotCuttable: a path does not exist, is not reached or runs more than once.
        InvalidInput: the example or the heads do not fit.

    Example:
        >>> import torch, offramp
        >>> blocks = [torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU()) for _ in range(4)]
        >>> model = torch.nn.Sequential(*blocks, torch.nn.Linear(8, 3))
        >>> net = offramp.attach(model, at=["1"], example=torch.randn(2, 8))
        >>> [tuple(logits.shape) for logits in net(torch.randn(5, 8))]
        [(5, 3), (5, 3)]
    """
    if not isinstance(model, nn.Module):
        raise InvalidInput(f"attach takes a torch.nn.Module; got {type(model).__name__}.")
    if system is not None and system.card.engine == "generate":
        raise InvalidInput(f"{system.card.name} is of models that write text: offramp.language.attach_lm(model, system=...) takes it.")
    shaped = as_example(example)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    placed = shaped.to(device, dtype)
    if at is None:
        at = system.placement if system is not None and system.placement is not None else Evenly(3)
    if isinstance(at, int):
        at = Evenly(at)
    if isinstance(at, str):
        raise InvalidInput(f"`at` is a list of module paths; got the string {at!r}. Pass at=[{at!r}].")
    paths = list(at) if isinstance(at, Iterable) else at.choose(repeated_blocks(model, placed.args, placed.kwargs))
    if not paths or len(set(paths)) != len(paths):
        raise InvalidInput(f"`at` must name at least one module and none twice, got {paths}.")

    with torch.no_grad(), evaluating(model), Taps(model, paths) as taps:
        final = select(_called(model, placed))
        if not isinstance(final, Tensor) or final.ndim == 0:
            what = f"one number, {final:.4g}, for the whole batch" if isinstance(final, Tensor) else f"a {type(final).__name__}"
            raise InvalidInput(
                f"The answer of {type(model).__name__} is {what}; expected logits [B, C], or [B] of one number for each item. A loss is "
                "no answer: leave labels out of the example, or pick the answer out of the model's output with select=."
            )
        if final.ndim == 1:
            select, final = OneNumber(select), final.unsqueeze(-1)
        states = dict(zip(paths, taps.states, strict=True))
        order = list(taps.order)
    for path in paths:
        if states[path].shape[0] != final.shape[0]:
            raise NotCuttable(
                f"The module at {path!r} returns a tensor of shape {tuple(states[path].shape)} for {final.shape[0]} inputs; an exit reads "
                "a tensor whose first dimension is the batch. Choose an enclosing module.",
                reason="output",
                path=path,
            )
    width = num_outputs if num_outputs is not None else int(final.shape[-1])
    given: Any = head if head is not None else (system.head if system is not None and system.head is not None else PooledLinear())
    specs = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given] * len(paths)
    if len(specs) != len(paths):
        raise InvalidInput(f"{len(specs)} heads were given for {len(paths)} exits {paths}; give one for all or one for each.")
    for spec in specs:
        if isinstance(spec, type) or not isinstance(spec, nn.Module | HeadSpec):
            raise InvalidInput(f"A head is a part of offramp.exits, as in PooledLinear(), or a module; got {spec!r}.")
    pairs = sorted(zip(paths, specs, strict=True), key=lambda pair: order.index(pair[0]))
    paths, specs = [path for path, _ in pairs], [spec for _, spec in pairs]
    dynamic = _dynamic_length(placed)
    exits, heads = [], []
    for path, spec in zip(paths, specs, strict=True):
        shape = tuple(-1 if d == 1 and s in dynamic else s for d, s in enumerate(states[path].shape) if d > 0)
        built = spec if isinstance(spec, nn.Module) else spec.build(shape, width)
        built = built.to(device=device, dtype=dtype)
        heads.append(built)
    offramp.exits.tie(heads)
    answers: tuple[Tensor, ...] = ()
    for path, spec, built in zip(paths, specs, heads, strict=True):
        built.eval()
        flops = count_flops(built, states[path], answers) // final.shape[0]
        with torch.no_grad():
            logits = built(states[path], answers)
        built.train()
        expected = (final.shape[0], *final.shape[1:-1], width)
        if tuple(logits.shape) != expected:
            raise InvalidInput(
                f"The head at {path!r} gives {tuple(logits.shape)}; expected {expected}, the shape of the model's own answer. Give a head "
                "of that shape, or pick the answer out of the model's output with select=."
            )
        answers = (*answers, logits)
        shape = tuple(-1 if d == 1 and s in dynamic else s for d, s in enumerate(states[path].shape) if d > 0)
        exits.append(Exit(path, None if isinstance(spec, nn.Module) else spec, shape, flops))
    net = MultiExit(model, exits, heads, shaped, select, system)
    net._num_outputs = width
    return net


def _dynamic_length(example: Example) -> set[int]:
    """Sizes of the dimensions that the cut makes dynamic: lengths of integer and boolean inputs."""
    leaves = tree_flatten((example.args, example.kwargs))[0]
    return {
        int(leaf.shape[1])
        for leaf in leaves
        if isinstance(leaf, Tensor) and leaf.ndim >= 2 and not leaf.is_floating_point() and not leaf.is_complex() and leaf.shape[1] > 1
    }


def load(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    example: Any,
    select: Callable[[Any], Tensor] = answer,
    system: System | None = None,
) -> MultiExit:
    """Attach saved exits to the model they were trained on.

    Args:
        model: the base model, with the weights it had when the exits were saved; if the bundle includes the base weights, they
            are loaded into it.
        folder: what `MultiExit.save` wrote.
        example: as for `attach`.
        select: as for `attach`.
        system: the method it was made with, if its defaults are wanted.

    Raises:
        FingerprintMismatch: the model has other weights.
        ArtifactError: a file is missing, truncated, altered or foreign.
    """
    content, tensors = load_bundle(folder, "adapter", "adapter")
    with reading(f"The adapter in {folder}"):
        exits = content["exits"]
        specs = [part_from_dict(e["head"], offramp.exits.PARTS) for e in exits]
        paths = [e["name"] for e in exits]
        num_outputs = int(content["num_outputs"])
        expected = content["fingerprint"]
        included = bool(content["base_included"])
    if included:
        weights = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
        own = model.state_dict()
        unlike = [k for k in sorted({*own, *weights}) if k not in own or k not in weights or own[k].shape != weights[k].shape]
        if unlike:
            raise FingerprintMismatch(
                f"The weights in {folder} are of a {content.get('base')} and do not fit this {type(model).__qualname__}: {len(unlike)} "
                f"names or shapes differ, first {unlike[0]!r}. Build the model as it was when the exits were saved."
            )
        model.load_state_dict(weights)
    else:
        check_base(model, content.get("base"), expected, folder)
    net = attach(model, paths, example=example, head=specs, select=select, system=system, num_outputs=num_outputs)
    try:
        net.heads.load_state_dict({k.removeprefix("heads."): v for k, v in tensors.items() if k.startswith("heads.")})
    except RuntimeError as error:
        raise ArtifactError(f"The head weights in {folder} do not fit: {error}.") from error
    return net


def load_plan(folder: str | os.PathLike[str]) -> Plan:
    """Read a plan saved with `Plan.save`; any rule of `offramp.policies` is known."""
    return Plan.load(folder, offramp.policies.PARTS)


def never(net: MultiExit, rule: Rule) -> Plan:
    """A plan that never leaves early: the base model's output, bit for bit."""
    early = len(net.at)
    return Plan(rule, net.names, (float("inf"),) * early + (float("-inf"),), (0.0,) * early + (1.0,), 1.0, fingerprint=net.fingerprint())
