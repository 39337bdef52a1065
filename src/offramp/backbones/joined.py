"""Layers of a block that read the same states as one product: query, key and value; gate and up.

Few rows are bound by how fast weights are read, and a small matrix takes as long as a larger one: the three products of an attention
take three kernels' time for one kernel's weights. Here the weights stand one behind another in one tensor, which one product reads; the
model's own parameters become views of it, so that nothing is held twice and whoever changes them in place changes both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

PROJECTIONS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of the layers of a module that read the same states, as transformers calls them."""


class _Product:
    """One product that several layers take their part of. It is forgotten once each has."""

    def __init__(self, weight: Tensor, bias: Tensor | None, sizes: Sequence[int]) -> None:
        self.weight, self.bias = weight, bias
        self.ends = [sum(sizes[: k + 1]) for k in range(len(sizes))]
        self.given: Tensor | None = None
        self.made: Tensor | None = None
        self.waiting = 0

    def part(self, index: int, hidden: Tensor) -> Tensor:
        if self.given is not hidden or self.made is None or not self.waiting & (1 << index):
            self.given, self.waiting = hidden, (1 << len(self.ends)) - 1
            self.made = nn.functional.linear(hidden, self.weight, self.bias)
        found = self.made[..., self.ends[index - 1] if index else 0 : self.ends[index]]
        self.waiting &= ~(1 << index)
        if not self.waiting:
            self.given = self.made = None
        return found


class _Part(nn.Module):
    def __init__(self, product: _Product, index: int) -> None:
        super().__init__()
        self.product, self.index = product, index

    def forward(self, hidden: Tensor) -> Tensor:
        return self.product.part(self.index, hidden)


def joined_projections(module: nn.Module, kept: list[Tensor] | None = None) -> dict[str, nn.Module]:
    """Layers to stand in for those of an attention or a gated network, sharing one product; none where they are not plain layers.

    Plain is an `nn.Linear` itself, without hooks, of one width, type and device, and all with a bias or none. Quantised or adapted
    layers stay as they are. Parameters keep their values and identity, but stand in other memory afterwards.

    Args:
        module: the model's own.
        kept: takes what held the parameters until now, for who still reads it, such as a captured graph.
    """
    for names in PROJECTIONS:
        layers = [getattr(module, name, None) for name in names]
        linear = [m for m in layers if isinstance(m, nn.Linear) and type(m) is nn.Linear and _untouched(m)]
        weights = [m.weight for m in linear]
        biases = [m.bias for m in linear if m.bias is not None]
        alike = len({(w.shape[1], w.dtype, w.device) for w in weights}) == 1 and len({id(w) for w in weights}) == len(names)
        if alike and len(biases) in (0, len(names)):
            product = _Product(_together(weights, kept), _together(biases, kept) if biases else None, [len(w) for w in weights])
            return {name: _Part(product, k) for k, name in enumerate(names)}
    return {}


def _untouched(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(hooks) and all(type(p) is nn.Parameter and not p.is_inference() and p.is_contiguous() for p in module.parameters())


def _together(parameters: Sequence[Tensor], kept: list[Tensor] | None) -> Tensor:
    """One tensor that holds parameters of the same trailing shape one behind another; they are views of it."""
    first = parameters[0].detach()
    place, storage = first.storage_offset(), first.untyped_storage().data_ptr()
    for p in parameters:
        if p.untyped_storage().data_ptr() != storage or p.storage_offset() != place:
            break
        place += p.numel()
    else:
        with torch.inference_mode(False), torch.no_grad():
            return first.as_strided((sum(len(p) for p in parameters), *first.shape[1:]), first.stride())
    with torch.inference_mode(False), torch.no_grad():
        whole = torch.cat([p.detach() for p in parameters])
        if kept is not None:
            kept.extend(p.data for p in parameters)
        for p, part in zip(parameters, whole.split([len(p) for p in parameters]), strict=True):
            p.data = part
    return whole
