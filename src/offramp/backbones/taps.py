"""Taps: one ordinary forward of the untouched model, with the states recorded at chosen module paths.

Training and recording use taps and not the cut, so that DDP, FSDP, autocast and gradient checkpointing work as always.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from offramp.core.errors import NotCuttable


def resolve(model: nn.Module, path: str) -> nn.Module:
    """The submodule at ``path``.

    Raises:
        NotCuttable: there is none; the error names the nearest paths.
    """
    modules = dict(model.named_modules())
    if path and path in modules:
        return modules[path]
    near = _near(model, path)
    raise NotCuttable(f"{type(model).__name__} has no module at {path!r}.", reason="missing", path=path, suggestions=near)


def _near(model: nn.Module, path: str) -> list[str]:
    """Up to five module paths spelled like ``path``; it and what is inside it are left out."""
    names = [n for n, _ in model.named_modules() if n and n != path and not n.startswith(f"{path}.")]
    return difflib.get_close_matches(path, names, n=5, cutoff=0.3) or names[:5]


def _instead(model: nn.Module, path: str) -> list[str]:
    """Up to five modules to take instead of one that exists: the one around it first."""
    parent = path.rpartition(".")[0]
    return list(dict.fromkeys([*([parent] if parent else []), *_near(model, path)]))[:5]


def floats(output: Any) -> list[Tensor]:
    """The floating-point tensors in a module's output, depth first."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def first_tensor(output: Any) -> Tensor | None:
    """The first floating-point tensor in a module's output, depth first: the state that an exit reads."""
    return next(iter(floats(output)), None)


@dataclass(frozen=True)
class Stream:
    """Where a state is: one of the floating-point tensors that a module returns.

    Attributes:
        module: its path.
        index: from 0, depth first.
    """

    module: str
    index: int = 0


class Taps:
    """Records the output of modules during one forward.

    Use as a context manager around forwards. ``states`` then holds one tensor per path, in the order the modules ran.
    The hooks are removed on leaving, also after an error, which leaves the model exactly as it was.

    Args:
        model: the user's model.
        paths: module paths; each must run exactly once in a forward.
        transform: applied to the state in place, in the forward (gradient equilibrium scales gradients here); ``None``
            leaves the forward as it is.
        copy: keep copies, so that a later in-place operation of the model does not change what was recorded.
        streams: where the state at a path is, if it is not the first floating-point tensor that the module there returns.

    Raises:
        NotCuttable: a path does not exist; or, when ``states`` is read, a module was not reached, ran more than once, or its output
            was written over later in the forward.
    """

    def __init__(
        self,
        model: nn.Module,
        paths: Sequence[str],
        transform: Callable[[int, Tensor], Tensor] | None = None,
        *,
        copy: bool = False,
        streams: Mapping[str, Stream] | None = None,
    ) -> None:
        self.model = model
        self.paths = tuple(paths)
        self._streams = [(streams or {}).get(p, Stream(p)) for p in self.paths]
        for path in self.paths:
            resolve(model, path)
        self._modules = [resolve(model, s.module) for s in self._streams]
        self._transform = transform
        self._copy = copy
        self._versions: dict[str, int] = {}
        self._handles: list[RemovableHandle] = []
        self._seen: dict[str, Tensor] = {}
        self._calls: dict[str, int] = {}

    def __enter__(self) -> Taps:
        for index, (path, module) in enumerate(zip(self.paths, self._modules, strict=True)):
            self._handles.append(module.register_forward_hook(self._hook(index, path)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def clear(self) -> None:
        """Forget the states of the last forward."""
        self._seen.clear()
        self._calls.clear()
        self._versions.clear()

    def _hook(self, index: int, path: str) -> Callable[..., Any]:
        def record(module: nn.Module, args: Any, output: Any) -> Any:
            found = floats(output)[self._streams[index].index :]
            state = found[0] if found else None
            if state is None:
                raise NotCuttable(
                    f"The module at {path!r} returns no floating-point tensor for an exit to read.", reason="output", path=path
                )
            self._calls[path] = self._calls.get(path, 0) + 1
            changed = state if self._transform is None else self._transform(index, state)
            self._seen[path] = changed.clone() if self._copy else changed
            self._versions[path] = _version(self._seen[path])
            return None if self._transform is None else _replace_first(output, state, changed)

        return record

    @property
    def order(self) -> tuple[str, ...]:
        """Paths in the order in which their modules ran."""
        return tuple(self._seen)

    @property
    def states(self) -> tuple[Tensor, ...]:
        """One tensor per path, in the order of ``paths``."""
        for path in self.paths:
            calls = self._calls.get(path, 0)
            if calls == 0:
                raise NotCuttable(
                    f"The module at {path!r} did not run in this forward. Choose a module that every input passes through.",
                    reason="unreached",
                    path=path,
                    suggestions=_instead(self.model, path),
                )
            if calls > 1:
                raise NotCuttable(
                    f"The module at {path!r} ran {calls} times in one forward (shared or looped), so a state there is ambiguous. "
                    "Choose a module that runs once.",
                    reason="repeated",
                    path=path,
                    suggestions=_instead(self.model, path),
                )
            if _version(self._seen[path]) != self._versions[path]:
                raise NotCuttable(
                    f"The output of the module at {path!r} was written over later in the same forward (an in-place operation such as "
                    "ReLU(inplace=True) follows it), so an exit there would read something else. Choose the module after it, or make that "
                    "operation not in-place.",
                    reason="output",
                    path=path,
                )
        return tuple(self._seen[p] for p in self.paths)


def _version(state: Tensor) -> int:
    """Counts writes to a tensor; tensors made in inference mode do not count."""
    return 0 if state.is_inference() else state._version


def _replace_first(output: Any, old: Tensor, new: Tensor) -> Any:
    if isinstance(output, Tensor):
        return new
    if isinstance(output, tuple | list):
        items = [new if item is old else item for item in output]
        return type(output)(items) if not hasattr(output, "_fields") else type(output)(*items)
    raise NotCuttable(
        f"A module that returns a {type(output).__name__} cannot have its state replaced; gradient scaling needs a tensor or a tuple.",
        reason="output",
    )
