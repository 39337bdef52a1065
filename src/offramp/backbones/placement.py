"""Where exits can go: the repeated blocks of a model, and what share of the cost has been spent after each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from offramp.backbones.taps import first_tensor
from offramp.core.errors import NotCuttable
from offramp.core.flops import counter
from offramp.core.modes import evaluating


@dataclass(frozen=True)
class Block:
    """A place for an exit.

    Attributes:
        path: module path.
        spent: share of the model's FLOPs spent when the block ends, in (0, 1].
        crossing: bytes per item that later operations read besides the block's output (skip connections, masks, conditioning).
        hidden: bytes per item of the block's output.
    """

    path: str
    spent: float
    crossing: int = 0
    hidden: int = 0


class _Tape(TorchDispatchMode):
    """Which memory every operation reads and writes, and what it costs. Holds the tensors, so that addresses stay unique."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.time = 0
        self.flops = 0
        self.made: dict[int, int] = {}
        self.read: dict[int, int] = {}
        self.size: dict[int, int] = {}
        self._held: list[Tensor] = list(inputs)
        self._registry = counter().flop_registry
        for t in inputs:
            self._make(t)

    def _make(self, tensor: Tensor) -> None:
        key = _memory(tensor)
        if key not in self.made:
            self.made[key] = self.time
            self.size[key] = tensor.numel() * tensor.element_size()
            self._held.append(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.time += 1
        count = self._registry.get(func._overloadpacket)
        if count is not None:
            self.flops += int(count(*args, **kwargs, out_val=out))
        carries = False
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and _memory(leaf) in self.made:
                carries = True
                self.read[_memory(leaf)] = self.time
        if carries:  # computed from the inputs; what is made of parameters alone needs no carrying
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor):
                    self._make(leaf)
        return out

    def crossing(self, time: int, hidden: int) -> int:
        """Bytes made up to ``time`` and read after it, besides ``hidden``."""
        return sum(self.size[k] for k, born in self.made.items() if born <= time < self.read.get(k, -1) and k != hidden)


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@dataclass(frozen=True)
class _Run:
    """One call of a module."""

    time: int
    work: int
    spent: int
    memory: int
    size: int


def repeated_blocks(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> list[Block]:
    """Blocks of a model in execution order, found by running it once.

    Candidates are the composite children of every ``nn.Sequential`` and ``nn.ModuleList``; where those leave no choice, composite
    siblings of one class; and then leaves of an ``nn.Sequential``. A candidate runs exactly once and returns a tensor with the batch
    first. Candidates inside a residual or parallel branch are left out, by what crosses there: more than at the cleanest place by over
    half of the state itself. (Where that leaves no choice, as in a U-Net, whose skips cross everywhere, all are kept.) Where candidates
    hold further ones that do at least 80 % of their work, the inner ones are taken: the blocks of a stage and not the stage.

    Raises:
        NotCuttable: there are none.
    """
    kwargs = dict(kwargs or {})
    names = {m: n for n, m in model.named_modules() if n}
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    batch = next((t.shape[0] for t in tensors if t.ndim), 0)
    calls: dict[nn.Module, int] = {}
    runs: dict[nn.Module, _Run] = {}
    entered: dict[nn.Module, int] = {}
    handles = []
    try:
        with torch.no_grad(), evaluating(model), _Tape(tensors) as tape:

            def enter(module: nn.Module, _: Any) -> None:
                entered[module] = tape.flops

            def leave(module: nn.Module, _: Any, output: Any) -> None:
                state = first_tensor(output)
                calls[module] = calls.get(module, 0) + 1
                if state is not None and state.ndim >= 2 and state.shape[0] == batch:
                    size = state.numel() * state.element_size()
                    runs[module] = _Run(tape.time, tape.flops - entered[module], tape.flops, _memory(state), size)

            for module in names:
                handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
            model(*args, **kwargs)
            total = tape.flops
    finally:
        for handle in handles:
            handle.remove()
    usable = {m: r for m, r in runs.items() if calls[m] == 1 and r.work > 0}
    crossing = {m: tape.crossing(r.time, r.memory) for m, r in usable.items()}
    least = min(
        (crossing[m] for m, r in usable.items() if r.spent < 0.9 * total), default=0
    )  # what crosses everywhere: masks, conditioning
    levels = [[m for m in level(model) if m in usable] for level in (_contained, _siblings, _leaves)]
    clean = [[m for m in level if crossing[m] <= least + usable[m].size / 2] for level in levels]
    found = next((c for c in clean if _covers([usable[m].spent / total for m in c])), next((level for level in levels if level), []))
    chosen = _descend(found, usable, names)
    if not chosen or total == 0:
        raise NotCuttable(
            f"{type(model).__name__} has no repeated blocks (children of nn.Sequential or nn.ModuleList, or siblings of one class, that "
            "run once and return a tensor with the batch first). Name the modules to exit after: at=[...].",
            reason="missing",
            suggestions=[n for n, _ in model.named_children()][:5],
        )
    chosen.sort(key=lambda m: usable[m].time)
    return [Block(names[m], usable[m].spent / total, crossing[m] // batch, usable[m].size // batch) for m in chosen]


def _contained(model: nn.Module) -> list[nn.Module]:
    lists = [m for m in model.modules() if isinstance(m, nn.Sequential | nn.ModuleList)]
    return list(dict.fromkeys(c for parent in lists for c in parent.children() if next(c.children(), None) is not None))


def _siblings(model: nn.Module) -> list[nn.Module]:
    found = list(_contained(model))
    for parent in model.modules():
        children = [c for c in parent.children() if next(c.children(), None) is not None]
        found += [c for c in children if sum(type(c) is type(other) for other in children) > 1]
    return list(dict.fromkeys(found))


def _leaves(model: nn.Module) -> list[nn.Module]:
    found = [c for parent in model.modules() if isinstance(parent, nn.Sequential) for c in parent.children()]
    return list(dict.fromkeys([*_siblings(model), *found]))


def _covers(spent: Sequence[float]) -> bool:
    """Whether places leave a choice: two early ones, and no gap of most of the model."""
    early = sorted(s for s in spent if s < 1)
    return len(early) >= 2 and max(b - a for a, b in zip([0.0, *early], [*early, 1.0], strict=True)) <= 0.6


def _descend(found: Sequence[nn.Module], runs: Mapping[nn.Module, _Run], names: Mapping[nn.Module, str]) -> list[nn.Module]:
    chosen: list[nn.Module] = []
    for module in _outermost(found, names):
        inner = [m for m in found if names[m].startswith(names[module] + ".")]
        outer = _outermost(inner, names)
        if len(outer) > 1 and sum(runs[m].work for m in outer) >= 0.8 * runs[module].work:
            chosen += _descend(inner, runs, names)
        else:
            chosen.append(module)
    return chosen


def _outermost(modules: Sequence[nn.Module], names: Mapping[nn.Module, str]) -> list[nn.Module]:
    paths = {names[m] for m in modules}
    return [m for m in modules if not any(names[m][:i] in paths for i, c in enumerate(names[m]) if c == ".")]
