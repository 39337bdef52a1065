"""The decoding kernel: how heads are packed and slots split, and, interpreted on the CPU, that it is the masked attention."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch

from offramp.backbones import attention
from offramp.backbones.attention import FEW, PACKED, WHOLE_SLOTS, block_slots, decoding_attention, masked_attention, packing, slot_splits


def test_every_head_of_a_group_is_served_by_as_few_programs_as_there_can_be():
    for group, queries in itertools.product([*range(1, 72), 128], range(1, FEW + 1)):
        served, programs = packing(group, queries)
        assert served * queries <= PACKED
        assert served * (programs - 1) < group <= served * programs, "none is left out, and no program is without a head"
        assert programs == 1 or -(-group // (programs - 1)) * queries > PACKED, "fewer would be too few"


def test_a_common_group_is_one_program():
    assert packing(4, 1) == (4, 1) and packing(8, 6) == (8, 1) and packing(4, FEW) == (4, 1)
    assert packing(7, FEW) == (4, 2) and packing(71, 1) == (36, 2)


@pytest.mark.parametrize(
    ("programs", "slots", "splits"),
    [
        (8, 200, 1),  # too short to split
        (8, WHOLE_SLOTS, 1),
        (8, WHOLE_SLOTS + 1, 3),
        (8, 8192, 32),  # as many as there is work for
        (8, 65536, 33),  # as many as fill the device
        (64, 8192, 4),
        (264, 65536, 1),
        (4096, 65536, 1),  # rows alone fill it
    ],
)
def test_slots_are_split_until_the_device_is_full(programs, slots, splits):
    assert slot_splits(programs, slots, 132) == splits


def test_keys_and_values_of_three_steps_fit_into_shared_memory():
    for padded, itemsize in itertools.product((16, 32, 64, 128, 256), (2, 4)):
        block = block_slots(padded, itemsize)
        assert block >= 16 and block & (block - 1) == 0 and 2 * 3 * block * padded * itemsize <= 96 * 1024


def test_a_compiler_sees_one_graph(monkeypatch):
    """The operator is registered while it traces; that must not break the graph of the blocks around."""
    monkeypatch.setattr(attention, "_launch", lambda wrap, query, *_: query.new_ones(()).expand(query.shape).transpose(1, 2).contiguous())

    def around(query: torch.Tensor, key: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return decoding_attention(query * 2, key, key, positions, window=3) + 1

    given = torch.randn(1, 4, 2, 8), torch.randn(1, 2, 20, 8), torch.arange(2)[None]
    found = torch.compile(around, backend="eager", fullgraph=True)(*given)
    torch.testing.assert_close(found, torch.full((1, 2, 4, 8), 2.0))


CASES = [  # dtype, rows, heads, groups, queries, width, slots, window, softcap; the interpreter knows no products in bfloat16
    ("float32", 1, 8, 2, 1, 32, 150, None, None),  # one program a group, no split
    ("float16", 2, 4, 4, 5, 24, 200, None, None),  # heads of their own, a padded width
    ("float32", 2, 6, 2, 3, 64, 130, 17, None),
    ("float32", 2, 4, 1, 16, 128, 90, 5, 30.0),
    ("float16", 2, 8, 2, 1, 16, 600, None, None),  # split in three
    ("float32", 2, 5, 1, 13, 16, 700, None, 20.0),  # split, and a group shared by two programs, the second not full
    ("float32", 2, 4, 2, 6, 80, 700, 560, None),  # split within the window
    ("float32", 1, 2, 1, 1, 256, 9000, None, None),  # more splits than are added up at once
]


def differences(case: tuple) -> list[float]:
    """How far the interpreted kernel is from the attention by PyTorch, and a row from itself beside another mate."""
    name, rows, heads, groups, queries, width, slots, window, softcap = case
    dtype = getattr(torch, name)
    torch.manual_seed(0)
    key, value = (t[:, :slots].transpose(1, 2) for t in torch.randn(2, rows, slots + 1, groups, width, dtype=dtype))
    query = torch.randn(rows, queries, heads, width, dtype=dtype).transpose(1, 2)
    first = torch.randint(0, slots - queries, (rows, 1))
    first[0], first[-1] = 3, slots - queries  # short rows leave splits without a slot
    positions = first + torch.arange(queries)
    slot = torch.arange(slots)
    seen = slot <= positions[..., None]
    if window is not None:
        seen &= slot > positions[..., None] - window
    expected = masked_attention(query.double(), key.double(), value.double(), seen[:, None], None, softcap).transpose(1, 2)

    def found(positions: torch.Tensor) -> torch.Tensor:
        given = (query, key, value, positions, width**-0.5, softcap or 0.0, window or 0)
        return attention._launch(lambda kernel: kernel, *given).double()

    here = found(positions)
    positions[0] = torch.arange(queries)
    return [(here - expected).abs().max().item(), (here - found(positions))[1:].abs().sum().item()]


def test_the_interpreted_kernel_is_masked_attention():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}  # read when Triton is imported, so in a process of its own
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == len(CASES)
    for case, far, moved in found:
        assert far < {"float32": 5e-6, "float16": 3e-3}[case[0]], (case, far)
        assert moved == 0.0, f"{case}: a row's answer depends on its mates"


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps([[case, *differences(case)] for case in CASES]))
