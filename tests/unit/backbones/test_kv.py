"""The cache: where things are written, what is read, what is refused."""

from __future__ import annotations

import pytest
import torch

from offramp.backbones.kv import KVCache, Writer
from offramp.core.errors import InvalidInput


def test_every_row_at_its_own_slots() -> None:
    cache = KVCache(blocks=2, rows=2, slots=6)
    key, value = torch.randn(2, 3, 2, 4), torch.randn(2, 3, 2, 4)
    cache.write(1, key, value, torch.tensor([[0, 1], [4, 5]]))
    keys, values = cache.read(1, 6)
    assert keys.shape == (2, 3, 6, 4)
    assert keys[0, :, :2].equal(key[0]) and keys[1, :, 4:].equal(key[1])
    assert values[0, :, :2].equal(value[0]) and values[1, :, 4:].equal(value[1])
    assert not keys[0, :, 2:].any() and not keys[1, :, :4].any()


def test_going_back_is_writing_over() -> None:
    cache = KVCache(1, 1, 4)
    for fill in (1.0, 2.0):
        cache.write(0, torch.full((1, 1, 2, 3), fill), torch.full((1, 1, 2, 3), -fill), torch.tensor([[1, 2]]))
    keys, values = cache.read(0, 3)
    assert keys[0, 0, :, 0].tolist() == [0, 2, 2] and values[0, 0, :, 0].tolist() == [0, -2, -2]


def test_nowhere_is_never_read() -> None:
    cache = KVCache(1, 2, 5)
    cache.write(0, torch.ones(2, 1, 3, 2), torch.ones(2, 1, 3, 2), torch.full((2, 3), cache.nowhere))
    keys, values = cache.read(0, 5)
    assert not keys.any() and not values.any()


def test_reading_is_a_view_of_the_beginning() -> None:
    cache = KVCache(1, 2, 64)
    cache.write(0, torch.randn(2, 1, 1, 2), torch.randn(2, 1, 1, 2), torch.zeros(2, 1, dtype=torch.long))
    keys, values = cache.read(0, 8)
    assert keys.shape[2] == values.shape[2] == 8
    assert keys.untyped_storage().data_ptr() == cache.read(0, 64)[0].untyped_storage().data_ptr()


def test_memory_is_taken_block_by_block() -> None:
    cache = KVCache(3, 2, 7)
    assert cache.bytes == 0
    cache.write(0, torch.zeros(2, 2, 1, 4), torch.zeros(2, 2, 1, 4), torch.zeros(2, 1, dtype=torch.long))
    assert cache.bytes == 2 * (2 * 8 * 2 * 4) * 4
    with pytest.raises(InvalidInput, match="Block 1 has not run yet"):
        cache.read(1, 3)


def test_dtype_and_device_are_those_of_what_is_written() -> None:
    cache = KVCache(1, 1, 2)
    cache.write(0, torch.zeros(1, 1, 1, 2, dtype=torch.bfloat16), torch.zeros(1, 1, 1, 2, dtype=torch.bfloat16), torch.tensor([[0]]))
    assert cache.read(0, 1)[0].dtype == torch.bfloat16


def test_writer_answers_with_what_may_be_read() -> None:
    cache = KVCache(2, 1, 8)
    first, then = Writer(cache, 1, torch.tensor([[0, 1]]), 4), Writer(cache, 1, torch.tensor([[2]]), 4)
    first.update(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2), 0)
    keys, values = then.update(2 * torch.ones(1, 1, 1, 2), 3 * torch.ones(1, 1, 1, 2), 0, cache_kwargs={})
    assert keys[0, 0, :, 0].tolist() == [1, 1, 2, 0] and values[0, 0, :, 0].tolist() == [1, 1, 3, 0]
    assert cache.keys[0] is None, "the writer's block, not that of the attention"


def test_a_cache_of_buffers_that_are_there() -> None:
    whole = KVCache(3, 2, 4)
    for block in range(3):
        whole.write(block, torch.full((2, 1, 1, 2), float(block)), torch.ones(2, 1, 1, 2), torch.zeros(2, 1, dtype=torch.int64))
    some = KVCache.holding(whole.keys[1:], whole.values[1:])
    assert (some.rows, some.slots, len(some.keys)) == (2, 4, 2)
    some.write(1, torch.full((2, 1, 1, 2), 7.0), torch.ones(2, 1, 1, 2), torch.ones(2, 1, dtype=torch.int64))
    assert whole.read(2, 2)[0][0, 0, :, 0].tolist() == [2, 7]


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_empty_is_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(InvalidInput, match="needs blocks, rows and slots"):
        KVCache(*sizes)
