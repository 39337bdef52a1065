"""Training flags come back: nested, after errors, and when threads overlap."""

from __future__ import annotations

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from torch import nn

from offramp.core import modes
from offramp.core.modes import evaluating, modes_kept


def mixed() -> nn.Sequential:
    """In training mode, with a part that is not."""
    made = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(), nn.Linear(2, 2))).train()
    made[1][0].eval()
    return made


def flags(module: nn.Module) -> list[bool]:
    return [m.training for m in module.modules()]


@pytest.mark.parametrize("kept", [evaluating, modes_kept])
def test_every_module_gets_its_own_flag_back(kept: Any) -> None:
    module = mixed()
    before = flags(module)
    assert True in before and False in before
    with kept(module, module[1]):
        module.eval()
        assert not any(flags(module))
    assert flags(module) == before
    with pytest.raises(KeyError), kept(module):
        module.eval()
        raise KeyError
    assert flags(module) == before


def test_nested_it_gives_back_what_it_found() -> None:
    module = mixed()
    before = flags(module)
    with evaluating(module):
        with evaluating(module[1]):
            assert not any(flags(module))
        assert not any(flags(module))
        module.train()
        with evaluating(module):
            assert not any(flags(module))
        assert all(flags(module)), "what was found on entering the inner one"
    assert flags(module) == before


def test_an_error_of_eval_itself() -> None:
    class Refusing(nn.Linear):
        def train(self, mode: bool = True) -> Refusing:
            raise RuntimeError("no")

    module = nn.Sequential(nn.Linear(2, 2), Refusing(2, 2))
    with pytest.raises(RuntimeError, match="no"), evaluating(module):
        raise AssertionError("not reached")
    assert all(flags(module)) and len(modes._USED) == 0


def test_threads_that_overlap() -> None:
    """The first to come leaves first, while the second still runs; then the second leaves."""
    module = mixed()
    before = flags(module)
    second_in, first_out = threading.Event(), threading.Event()

    def second() -> list[bool]:
        with evaluating(module):
            second_in.set()
            assert first_out.wait(10)
            within = flags(module)
            with evaluating(module[1]):
                pass
            return within + flags(module)

    with ThreadPoolExecutor(1) as pool:
        with evaluating(module):
            running = pool.submit(second)
            assert second_in.wait(10)
        first_out.set()
        assert not any(running.result(10)), "the first has left, the second is still within"
    assert flags(module) == before


def test_a_part_that_another_thread_uses() -> None:
    module = mixed()
    before = flags(module)
    entered, over = threading.Event(), threading.Event()

    def other() -> None:
        with evaluating(module[1]):
            entered.set()
            assert over.wait(10)

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(other)
        assert entered.wait(10)
        with evaluating(module):
            pass
        assert module.training and module[0].training and not any(flags(module[1]))
        over.set()
        running.result(10)
    assert flags(module) == before


def test_nothing_is_kept_alive() -> None:
    module = mixed()
    seen = weakref.ref(module)
    with evaluating(module):
        assert len(modes._USED) == len(list(module.modules()))
    assert len(modes._USED) == 0
    del module
    gc.collect()
    assert seen() is None
