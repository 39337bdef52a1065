"""Attention of a few new tokens over a cache, read only as far as each row goes.

A general kernel is given a mask over the whole buffer and reads all of it. Decoding knows better: row ``b`` needs the slots up to its own
position. On CUDA one kernel (Triton) does that for all rows and heads, whatever their lengths, so that one captured graph serves every
length. Elsewhere, and for long prompts, PyTorch's attention with a mask does the same.

Shapes: ``B`` rows, ``Q`` new tokens of a row, ``H`` heads, ``G`` key heads (``G`` divides ``H``), ``D`` their width, ``L`` readable slots.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

FEW = 16
"""Most new tokens of a row for which the decoding kernel is used; more are a prompt."""


@functools.cache
def kernel_available() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def wants_kernel(device: torch.device, queries: int, width: int) -> bool:
    """Whether the decoding kernel runs for this many new tokens; then no mask is needed."""
    return device.type == "cuda" and queries <= FEW and width <= 256 and kernel_available()


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, softcap: float | None
) -> Tensor:
    """Attention by PyTorch. Returns ``[B, H, Q, D]``.

    Args:
        query: ``[B, H, Q, D]``.
        key: ``[B, G, L, D]``.
        value: ``[B, G, L, D]``.
        mask: bool ``[B, 1, Q, L]``, true where a token may look; all without.
        scaling: of the products; ``1 / sqrt(D)`` by default.
        softcap: bounds the scaled products by ``softcap * tanh(. / softcap)``, as Gemma 2 does.
    """
    grouped = query.shape[1] != key.shape[1]
    if softcap is None:
        return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=grouped)
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, dim=1), value.repeat_interleave(repeat, dim=1)
    scores = query @ key.transpose(2, 3) * (scaling if scaling is not None else query.shape[-1] ** -0.5)
    scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype) @ value


def decoding_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Attention of each new token over the slots up to its own position, by the kernel. Returns ``[B, Q, H, D]``.

    Args:
        query: ``[B, H, Q, D]``, ``Q`` at most `FEW`.
        key: ``[B, G, L, D]`` views of the cache.
        value: the same.
        positions: int64 ``[B, Q]``, ascending in each row, all below ``L``.
        scaling: of the products; ``1 / sqrt(D)`` by default.
        softcap: see `masked_attention`.
        window: each token sees this many slots, its own included; all by default.
    """
    return _operator()(
        query,
        key,
        value,
        positions,
        scaling if scaling is not None else query.shape[-1] ** -0.5,
        softcap if softcap is not None else 0.0,
        window if window is not None else 0,
    )


@functools.cache
def _kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def attend(
        query, key, value, positions, out,
        query_b, query_h, query_q, key_b, key_g, key_l, value_b, value_g, value_l,
        scaling, softcap, window,
        GROUP: tl.constexpr, QUERIES: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr,
        PADDED_Q: tl.constexpr, PADDED_D: tl.constexpr, BLOCK: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr,
    ):  # fmt: skip
        scaling, softcap = tl.cast(scaling, tl.float32), tl.cast(softcap, tl.float32)  # a compiler hands Python's numbers over as float64
        row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
        group = head // GROUP
        q, d, n = tl.arange(0, PADDED_Q), tl.arange(0, PADDED_D), tl.arange(0, BLOCK)
        real, wide = q < QUERIES, d < WIDTH
        place = tl.load(positions + row * QUERIES + q, mask=real, other=0)
        asked = tl.load(query + row * query_b + head * query_h + q[:, None] * query_q + d, mask=real[:, None] & wide, other=0.0)
        last = tl.load(positions + row * QUERIES + QUERIES - 1)
        first = 0
        if WINDOWED:
            first = tl.maximum(tl.load(positions + row * QUERIES) - window + 1, 0) // BLOCK * BLOCK
        highest = tl.full([PADDED_Q], -1e30, tl.float32)
        total = tl.zeros([PADDED_Q], tl.float32)
        summed = tl.zeros([PADDED_Q, PADDED_D], tl.float32)
        for start in range(first, last + 1, BLOCK):
            slot = start + n
            there = (slot <= last)[:, None] & wide
            k = tl.load(key + row * key_b + group * key_g + slot[:, None] * key_l + d, mask=there, other=0.0)
            v = tl.load(value + row * value_b + group * value_g + slot[:, None] * value_l + d, mask=there, other=0.0)
            score = tl.dot(asked, tl.trans(k), input_precision="ieee") * scaling
            if CAPPED:
                score = softcap * (1 - 2 / (tl.exp(2 * score / softcap) + 1))
            seen = slot[None, :] <= place[:, None]
            if WINDOWED:
                seen = seen & (slot[None, :] > place[:, None] - window)
            score = tl.where(seen, score, -1e30)
            higher = tl.maximum(highest, tl.max(score, 1))
            weight = tl.where(seen, tl.exp(score - higher[:, None]), 0.0)
            shrink = tl.exp(highest - higher)
            total = total * shrink + tl.sum(weight, 1)
            summed = summed * shrink[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
            highest = higher
        answer = summed / tl.maximum(total, 1e-30)[:, None]
        where = out + ((row * QUERIES + q[:, None]) * HEADS + head) * WIDTH + d
        tl.store(where, answer.to(out.dtype.element_ty), mask=real[:, None] & wide)

    return attend


def _launch(wrap: Any, query: Tensor, key: Tensor, value: Tensor, positions: Tensor, scaling: float, softcap: float, window: int) -> Tensor:
    rows, heads, queries, width = query.shape
    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    positions = positions.contiguous()
    out = query.new_empty(rows, queries, heads, width)
    padded = max(16, 1 << (width - 1).bit_length())
    wrap(_kernel())[(rows, heads)](
        query, key, value, positions, out,
        query.stride(0), query.stride(1), query.stride(2), key.stride(0), key.stride(1), key.stride(2),
        value.stride(0), value.stride(1), value.stride(2),
        scaling, softcap, window,
        GROUP=heads // key.shape[1], QUERIES=queries, WIDTH=width, HEADS=heads,
        PADDED_Q=16, PADDED_D=padded, BLOCK=64, CAPPED=softcap > 0, WINDOWED=window > 0,
    )  # fmt: skip
    return out


@functools.cache
def _operator() -> Any:
    """The kernel as an operator that a compiler sees through."""

    @torch.library.triton_op("offramp::decoding_attention", mutates_args={})
    def operator(query: Tensor, key: Tensor, value: Tensor, positions: Tensor, scaling: float, softcap: float, window: int) -> Tensor:
        return _launch(torch.library.wrap_triton, query, key, value, positions, scaling, softcap, window)

    return operator
