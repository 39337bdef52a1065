"""Whether a model is still what was cut: its modules, tensors and hooks.

Weights that are changed in place, or moved with ``to``, are followed by a cut, which shares them. What puts other objects in their place is
not: ``load_state_dict(assign=True)``, adapters that replace layers, hooks, offloading. Comparing identities takes no look at any number, so
it is done once a sampling run.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from offramp.core.errors import InvalidInput
from offramp.engines.standing import place

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


class Structure:
    """A model as it was when this was made.

    Args:
        model: held, with all that it consists of.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._modules = dict(model.named_modules())
        self._weights = {path: dict(m._parameters) for path, m in self._modules.items()}
        self._buffers = {path: dict(m._buffers) for path, m in self._modules.items()}
        self._around = {path: _around(m) for path, m in self._modules.items()}
        self._places = self._pointers()
        self._note()

    def __deepcopy__(self, memo: dict[int, Any]) -> Structure:
        return Structure(copy.deepcopy(self.model, memo))

    def check(self) -> bool:
        """Refuse a model that is not what it was.

        Returns:
            Whether weights have moved in memory since the last look: what was captured with their addresses must be given up.

        Raises:
            InvalidInput: modules, parameters, buffers or hooks are others; says which and what to do.
        """
        if not self._intact():
            self._look_closely()
            self._note()
        before, self._places = self._places, self._pointers()
        return before != self._places

    def _note(self) -> None:
        """All that may not change, beside where it is: looked through in a fraction of a millisecond, as the device waits."""
        kinds = ("_modules", "_parameters", "_buffers", *_HOOKS)
        dictionaries = [getattr(m, kind) for m in self._modules.values() for kind in kinds]
        self._held = [(tuple(d.items()), d) for d in dictionaries]
        self._forwards = [(m.__dict__.get("forward"), m.__dict__) for m in self._modules.values()]

    def _intact(self) -> bool:
        for held, now in self._held:
            if len(held) != len(now):
                return False
            for name, value in held:
                if now.get(name) is not value:
                    return False
        return all(now.get("forward") is held for held, now in self._forwards)

    def _look_closely(self) -> None:
        """Refuse what is not followed, saying where it is."""
        now = dict(self.model.named_modules())
        self._check_modules(now)
        for path, module in now.items():
            self._check_around(path, module)
            if not _same(self._weights[path], module._parameters):
                self._refuse(path, "its parameters are other tensors, as load_state_dict(assign=True) or merged adapters make them")
            if not _same(self._buffers[path], module._buffers):
                if not _equal(self._buffers[path], module._buffers):
                    self._refuse(path, "its buffers are other tensors with other values")
                self._buffers[path] = dict(module._buffers)

    def _check_modules(self, now: dict[str, nn.Module]) -> None:
        for path in [*now, *self._modules]:
            if now.get(path) is not self._modules.get(path):
                what = "is another module" if path in self._modules and path in now else "is new" if path in now else "is gone"
                self._refuse(path, f"it {what}, such as an adapter that was put on or taken off")

    def _check_around(self, path: str, module: nn.Module) -> None:
        before, after = self._around[path], _around(module)
        if len(before) == len(after) and all(a is b for a, b in zip(before, after, strict=True)):
            return
        if hasattr(module, "_hf_hook"):
            raise InvalidInput(
                f"{type(self.model).__name__} is offloaded by accelerate since it was attached: its weights come and go around each "
                "forward, which its parts run one by one do not follow. Keep the denoiser on one device: pipe.remove_all_hooks(), then "
                "pipe.to(...); offload the other components alone."
            )
        self._refuse(path, "a forward hook was added or removed, or its forward replaced, which its parts run one by one do not follow")

    def _refuse(self, path: str, what: str) -> None:
        raise InvalidInput(
            f"The {type(self.model).__name__} changed since it was attached: {f'at {path!r} ' if path else ''}{what}. Its parts were cut "
            "before and would go on as they were. Undo it, or attach and compile again."
        )

    def _pointers(self) -> list[object]:
        return [place(p) for weights in self._weights.values() for p in weights.values() if p is not None]


def _around(module: nn.Module) -> tuple[Any, ...]:
    """What runs around a module's forward, and the forward if it is the object's own."""
    own = module.__dict__.get("forward")
    return (*((own,) if own is not None else ()), *(h for name in _HOOKS for h in getattr(module, name).values()))


def _same(before: dict[str, Tensor | None], after: dict[str, Any]) -> bool:
    return len(before) == len(after) and all(after.get(n) is t for n, t in before.items())


def _equal(before: dict[str, Tensor | None], after: dict[str, Any]) -> bool:
    """Whether buffers hold the same: moving a model makes other tensors of them."""
    if before.keys() != after.keys():
        return False
    for name, old in before.items():
        new = after[name]
        if (old is None) != (new is None):
            return False
        if old is not None and new is not old and (old.shape != new.shape or not torch.equal(old.to(new.device, new.dtype), new)):
            return False
    return True


__all__ = ["Structure"]
