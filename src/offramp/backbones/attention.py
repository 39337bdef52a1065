"""Attention of a few new tokens over a cache, read only as far as each row goes.

A general kernel is given a mask over the whole buffer and reads all of it. Decoding knows better: row ``b`` needs the slots up to its own
position. On CUDA a kernel (Triton) does that for all rows and heads, whatever their lengths, so that one captured graph serves all lengths.
Elsewhere, and for long prompts, PyTorch's attention with a mask does the same.

A program of the kernel serves heads that share keys and values together, so that these are read once. Where rows and heads alone make too
few programs to keep the device busy, each row's slots are split among several, and a second kernel adds up what they found, as in
Flash-Decoding (Dao, Haziza, Massa and Sizov, 2023). How many splits is decided from shapes, on the host; which slots each walks, on the
device, from where the row stands.

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

PACKED = 64
"""Most (head, token) pairs that one program of the kernel serves: the rows of its products."""

SPLIT_SLOTS = 256
"""Slots for which a split is worth its share of the second kernel."""

WHOLE_SLOTS = 512
"""Slots that one program walks through sooner than two do and a second kernel adds up what they found."""

PROGRAMS = 2
"""Programs of the kernel that each multiprocessor is given, so that one computes while another waits for memory."""

PROCESSORS = 132
"""Multiprocessors of a device that is not there to be asked, as where the kernel is interpreted."""


_TRITON = importlib.util.find_spec("triton") is not None  # looked for once, and not in what a compiler traces


def kernel_available() -> bool:
    """Whether Triton is installed."""
    return _TRITON


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
    _registered()
    found: Tensor = torch.ops.offramp.decoding_attention(
        query,
        key,
        value,
        positions,
        scaling if scaling is not None else query.shape[-1] ** -0.5,
        softcap if softcap is not None else 0.0,
        window if window is not None else 0,
    )
    return found


def packing(group: int, queries: int) -> tuple[int, int]:
    """How the heads of a key group are served: heads of one program, and programs of a group. As few programs as `PACKED` allows.

    Args:
        group: heads that share keys and values.
        queries: new tokens of a row, at most `FEW`.
    """
    programs = -(-group // (PACKED // queries))
    return -(-group // programs), programs


def slot_splits(programs: int, slots: int, processors: int) -> int:
    """Among how many programs the slots of a row are split.

    Args:
        programs: how many there are without splitting.
        slots: most that a row can see.
        processors: multiprocessors of the device.
    """
    if slots <= WHOLE_SLOTS:
        return 1
    return max(1, min(PROGRAMS * processors // programs, -(-slots // SPLIT_SLOTS)))


def block_slots(padded: int, itemsize: int) -> int:
    """Slots that a program reads at once.

    A step takes much the same time for few slots as for many: few steps are wanted, and two steps' keys and values under way while one is
    computed. At 16 KiB for the keys of a step, what two programs need for this fits into the shared memory of a multiprocessor.

    Args:
        padded: width of a head, a power of two from 16 to 256.
        itemsize: bytes of an element.
    """
    return min(128, 16 * 1024 // (padded * itemsize))


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else PROCESSORS


# Each kernel is one function without helpers: a compiler carries its source elsewhere, and finds there only `tl`.


@functools.cache
def _attend() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def attend(
        query, key, value, positions, out, marks,
        query_b, query_h, query_q, key_b, key_g, key_l, value_b, value_g, value_l,
        scaling, softcap, window,
        GROUP: tl.constexpr, SERVED: tl.constexpr, SHARES: tl.constexpr, QUERIES: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
        PADDED_R: tl.constexpr, PADDED_D: tl.constexpr, BLOCK: tl.constexpr,
        CAPPED: tl.constexpr, WINDOWED: tl.constexpr, SPLIT: tl.constexpr,
    ):  # fmt: skip
        scaling, softcap = tl.cast(scaling, tl.float32), tl.cast(softcap, tl.float32)  # a compiler hands Python's numbers over as float64
        row, group, share = tl.program_id(0).to(tl.int64), tl.program_id(1) // SHARES, tl.program_id(1) % SHARES
        pair, d, n = tl.arange(0, PADDED_R), tl.arange(0, PADDED_D), tl.arange(0, BLOCK)
        q, member = pair % QUERIES, share * SERVED + pair // QUERIES
        head = group * GROUP + member
        real, wide = (pair < SERVED * QUERIES) & (member < GROUP), d < WIDTH
        kept = real[:, None] & wide

        place = tl.load(positions + row * QUERIES + q, mask=real, other=0).to(tl.int32)
        asked = tl.load(query + row * query_b + head[:, None] * query_h + q[:, None] * query_q + d, mask=kept, other=0.0)
        start = 0
        if WINDOWED:
            start = tl.maximum(tl.load(positions + row * QUERIES).to(tl.int32) - window + 1, 0)
        stop = tl.load(positions + row * QUERIES + QUERIES - 1).to(tl.int32) + 1
        last = stop - 1
        if SPLIT:  # the blocks of this row's own range, in equal shares; the last programs may be left without any
            chunk = tl.cdiv(tl.cdiv(stop - start, BLOCK), tl.num_programs(2)) * BLOCK
            start += tl.program_id(2) * chunk
            stop = tl.minimum(start + chunk, stop)

        keys = key + row * key_b + group * key_g
        values = value + row * value_b + group * value_g
        highest = tl.full([PADDED_R], -1e30, tl.float32)
        total = tl.zeros([PADDED_R], tl.float32)
        summed = tl.zeros([PADDED_R, PADDED_D], tl.float32)
        for begin in range(start, stop, BLOCK):
            slot = begin + n
            there = (slot <= last)[:, None] & wide
            far = tl.cast(begin, tl.int64)
            k = tl.load(keys + far * key_l + (n[:, None] * key_l + d), mask=there, other=0.0)
            v = tl.load(values + far * value_l + (n[:, None] * value_l + d), mask=there, other=0.0)
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

        if SPLIT:  # to be added up by `combine`; who saw nothing says so and writes no sum
            at = ((row * HEADS + head) * QUERIES + q) * tl.num_programs(2) + tl.program_id(2)
            tl.store(marks + at * 2, highest, mask=real)
            tl.store(marks + at * 2 + 1, total, mask=real)
            tl.store(out + at[:, None] * WIDTH + d, summed, mask=kept & (total > 0)[:, None])
        else:
            answer = summed / tl.maximum(total, 1e-30)[:, None]
            where = out + ((row * QUERIES + q[:, None]) * HEADS + head[:, None]) * WIDTH + d
            tl.store(where, answer.to(out.dtype.element_ty), mask=kept)

    return attend


@functools.cache
def _combine() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def combine(
        sums, marks, out, splits,
        QUERIES: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, PADDED_D: tl.constexpr, STEP: tl.constexpr,
    ):  # fmt: skip
        row, pair = tl.program_id(0).to(tl.int64), tl.program_id(1)
        d, n = tl.arange(0, PADDED_D), tl.arange(0, STEP)
        first = (row * (HEADS * QUERIES) + pair) * splits
        highest = tl.full([1], -1e30, tl.float32)
        total = tl.zeros([1], tl.float32)
        summed = tl.zeros([PADDED_D], tl.float32)
        for begin in range(0, splits, STEP):
            there, at = begin + n < splits, first + begin + n
            mark = tl.load(marks + at * 2, mask=there, other=-1e30)
            part = tl.load(marks + at * 2 + 1, mask=there, other=0.0)
            found = tl.load(sums + at[:, None] * WIDTH + d, mask=(part > 0)[:, None] & (d < WIDTH), other=0.0)
            higher = tl.maximum(highest, tl.max(mark, 0))
            weight = tl.exp(mark - higher)
            shrink = tl.exp(highest - higher)
            total = total * shrink + tl.sum(weight * part, 0)
            summed = summed * shrink + tl.sum(weight[:, None] * found, 0)
            highest = higher
        where = out + ((row * QUERIES + pair % QUERIES) * HEADS + pair // QUERIES) * WIDTH + d
        tl.store(where, (summed / total).to(out.dtype.element_ty), mask=d < WIDTH)

    return combine


def _launch(wrap: Any, query: Tensor, key: Tensor, value: Tensor, positions: Tensor, scaling: float, softcap: float, window: int) -> Tensor:
    rows, heads, queries, width = query.shape
    groups, slots = key.shape[1], key.shape[2]
    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    positions = positions.contiguous()
    served, shares = packing(heads // groups, queries)
    splits = slot_splits(rows * groups * shares, min(slots, window + queries - 1) if window else slots, _processors(query.device))
    padded = max(16, 1 << (width - 1).bit_length())
    out = query.new_empty(rows, queries, heads, width)
    marks = query.new_empty(rows, heads, queries, splits, 2, dtype=torch.float32)  # of each split, the maximum and the total of its weights
    sums = query.new_empty(rows, heads, queries, splits, width, dtype=torch.float32) if splits > 1 else out
    wrap(_attend())[(rows, groups * shares, splits)](
        query, key, value, positions, sums, marks,
        query.stride(0), query.stride(1), query.stride(2), key.stride(0), key.stride(1), key.stride(2),
        value.stride(0), value.stride(1), value.stride(2),
        scaling, softcap, window,
        GROUP=heads // groups, SERVED=served, SHARES=shares, QUERIES=queries, HEADS=heads, WIDTH=width,
        PADDED_R=max(16, 1 << (served * queries - 1).bit_length()), PADDED_D=padded, BLOCK=block_slots(padded, query.element_size()),
        CAPPED=softcap > 0, WINDOWED=window > 0, SPLIT=splits > 1,
        num_warps=8 if query.element_size() > 2 else 4, num_stages=3,  # products in float32 are not for tensor cores and need registers
    )  # fmt: skip
    if splits > 1:
        step = min(8192 // padded, 1 << (splits - 1).bit_length())
        wrap(_combine())[(rows, heads * queries)](
            sums, marks, out, splits,
            QUERIES=queries, HEADS=heads, WIDTH=width, PADDED_D=padded, STEP=step, num_warps=4,
        )  # fmt: skip
    return out


@functools.cache
def _register() -> None:
    """Make the kernels an operator that a compiler sees through."""

    @torch.library.triton_op("offramp::decoding_attention", mutates_args={})
    def operator(query: Tensor, key: Tensor, value: Tensor, positions: Tensor, scaling: float, softcap: float, window: int) -> Tensor:
        return _launch(torch.library.wrap_triton, query, key, value, positions, scaling, softcap, window)


@torch.compiler.assume_constant_result
def _registered() -> bool:
    """Register the operator once, also while a compiler traces: it looks through a cache and would break its graph at what is behind."""
    _register()
    return True
