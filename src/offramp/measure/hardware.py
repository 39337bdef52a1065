"""Ceilings of this machine, measured, and the roofline floor they put under any computation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from offramp.core.errors import InvalidInput
from offramp.measure.clock import measure


@dataclass(frozen=True)
class Ceilings:
    """The best rates that plain library calls reach here.

    Attributes:
        bytes_per_s: memory traffic of a large copy, reads and writes both counted.
        flops_per_s: floating-point operations of a large square matrix product (one multiply-add = 2).
        dtype: of the matrix product, e.g. ``"torch.bfloat16"``.
        device: what was measured.
    """

    bytes_per_s: float
    flops_per_s: float
    dtype: str
    device: str

    @property
    def balance(self) -> float:
        """FLOPs per byte at which a computation turns from memory-bound to compute-bound."""
        return self.flops_per_s / self.bytes_per_s

    def floor_ms(self, flops: float, bytes_moved: float) -> float:
        """No run of ``flops`` operations over ``bytes_moved`` bytes is faster than this, in milliseconds.

        The larger of the two times: a perfect machine overlaps them (roofline, Williams, Waterman and Patterson 2009).

        Raises:
            InvalidInput: a negative amount.
        """
        if flops < 0 or bytes_moved < 0:
            raise InvalidInput(f"flops and bytes_moved must be >= 0, got {flops} and {bytes_moved}.")
        return 1e3 * max(flops / self.flops_per_s, bytes_moved / self.bytes_per_s)

    def to_dict(self) -> dict[str, Any]:
        return {"bytes_per_s": self.bytes_per_s, "flops_per_s": self.flops_per_s, "dtype": self.dtype, "device": self.device}


def copy_bandwidth(device: torch.device | str = "cpu", *, size_bytes: int | None = None, repeats: int = 10) -> float:
    """Bytes per second of a large copy: bytes read plus bytes written, over the fastest of ``repeats`` samples.

    Args:
        device: whose memory.
        size_bytes: of the source; 1 GiB on CUDA and 256 MiB on a CPU by default, well beyond their caches.
        repeats: samples, >= 1.
    """
    where = torch.device(device)
    size = size_bytes if size_bytes is not None else (2**30 if where.type == "cuda" else 2**28)
    if size < 1:
        raise InvalidInput(f"size_bytes must be >= 1, got {size}.")
    source = torch.ones(size, dtype=torch.uint8, device=where)
    target = torch.empty_like(source)
    best = measure(lambda: target.copy_(source), warmup=2, repeats=repeats, device=where).min_ms
    return 2 * size / (best / 1e3)


def matmul_rate(
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, *, size: int | None = None, repeats: int = 10
) -> float:
    """FLOPs per second of a square matrix product, over the fastest of ``repeats`` samples.

    Args:
        device: what computes.
        dtype: of both factors. On CUDA, float32 follows ``torch.backends.cuda.matmul`` (TF32 or not) as it stands.
        size: rows and columns; 8192 on CUDA and 1024 on a CPU by default.
        repeats: samples, >= 1.
    """
    where = torch.device(device)
    side = size if size is not None else (8192 if where.type == "cuda" else 1024)
    if side < 1:
        raise InvalidInput(f"size must be >= 1, got {side}.")
    a = torch.randn(side, side, device=where).to(dtype)
    b = torch.randn(side, side, device=where).to(dtype)
    out = torch.empty_like(a)
    best = measure(lambda: torch.mm(a, b, out=out), warmup=3, repeats=repeats, device=where).min_ms
    return 2 * side**3 / (best / 1e3)


def ceilings(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    copy_bytes: int | None = None,
    matmul_size: int | None = None,
    repeats: int = 10,
) -> Ceilings:
    """Measure both ceilings.

    Args:
        device: ``cpu`` (with torch's present number of threads) or a CUDA device.
        dtype: of the matrix product.
        copy_bytes: see `copy_bandwidth`.
        matmul_size: see `matmul_rate`.
        repeats: samples of each, >= 1.
    """
    return Ceilings(
        copy_bandwidth(device, size_bytes=copy_bytes, repeats=repeats),
        matmul_rate(device, dtype, size=matmul_size, repeats=repeats),
        str(dtype),
        str(torch.device(device)),
    )
