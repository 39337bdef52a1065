"""Gradient equilibrium: the forward stays as it is, bit for bit; the backward averages the exits instead of summing them.

With K exits and loss ``sum_k L_k``, the gradient that reaches the state of exit k (0-based) is a sum of K - k terms, so early
layers are trained with a larger step than late ones. Scaling the gradient of that state by ``1/(K - k)`` before it
branches, and that of the trunk by ``K - k - 1`` after the head has branched off, makes it their mean (Li et al., Improved
Techniques for Training Adaptive Deep Networks, ICCV 2019, section 3.2; used by ElasticBERT, Liu et al. 2022). Both factors
are applied here in the two places a tap can reach, with the same product: ``(K - k - 1)/(K - k)`` on the state, which trunk
and head share, and ``1/(K - k - 1)`` on what the head reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from offramp.network import MultiExit


class _Scale(torch.autograd.Function):
    # No tensor is saved for the backward: a recomputed forward under gradient checkpointing, where taps are absent, then
    # saves the same tensors as the first.
    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


def scale_gradient(value: Tensor, factor: float) -> Tensor:
    """``value`` itself; its gradient is multiplied by ``factor``."""
    scaled: Tensor = _Scale.apply(value, factor)  # type: ignore[no-untyped-call]
    return scaled


@contextmanager
def equilibrium(net: MultiExit) -> Iterator[None]:
    """Within, every training forward of ``net`` has gradient equilibrium. Undone on leaving, also after an error."""
    exits = len(net.names)
    before = net.state_transform

    def on_state(index: int, state: Tensor) -> Tensor:
        shaped = state if before is None else before(index, state)
        return scale_gradient(shaped, (exits - index - 1) / (exits - index))

    def on_head(index: int) -> Any:
        def scale(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (scale_gradient(args[0], 1 / (exits - index - 1)), *args[1:])

        return scale

    handles = [head.register_forward_pre_hook(on_head(index)) for index, head in enumerate(net.heads)]
    net.state_transform = on_state
    try:
        yield
    finally:
        net.state_transform = before
        for handle in handles:
            handle.remove()
