"""What loaders may yield."""

from __future__ import annotations

from collections import UserDict

import pytest
import torch

from offramp.core.batches import Batch, unpack_batch
from offramp.core.errors import InvalidInput
from offramp.network import attach
from offramp.train import fit

X, M, Y = torch.randn(4, 3), torch.ones(4, 3), torch.tensor([0, 1, 1, 0])


@pytest.mark.parametrize(
    ("batch", "args", "kwargs", "labelled"),
    [
        (X, 1, set(), False),
        ((X,), 1, set(), False),
        ([X, Y], 1, set(), True),
        ((X, None), 1, set(), False),
        ((X, M, Y), 2, set(), True),
        (((X, M), Y), 2, set(), True),
        (({"ids": X, "mask": M}, Y), 0, {"ids", "mask"}, True),
        ({"ids": X, "mask": M, "labels": Y}, 0, {"ids", "mask"}, True),
        ({"ids": X, "label": Y}, 0, {"ids"}, True),
        (UserDict({"ids": X, "labels": Y}), 0, {"ids"}, True),
        ({"ids": X}, 0, {"ids"}, False),
        (Batch((X,), {}, Y), 1, set(), True),
    ],
)
def test_forms(batch, args, kwargs, labelled):
    got = unpack_batch(batch)
    assert len(got.args) == args and set(got.kwargs) == kwargs and (got.labels is not None) == labelled
    assert got.rows == 4
    moved = got.to("meta")
    assert all(t.device.type == "meta" for t in (*moved.args, *moved.kwargs.values()))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (3, "yields a int"),
        ((), "yields a tuple"),
        ((X, [0, 1, 1, 0]), "torch.as_tensor"),
        ((X, "abcd"), "must be a tensor; got str"),
        ((X, Y[:2]), r"4 inputs but labels of shape \(2,\)"),
        ((X, torch.tensor(1)), r"labels of shape \(\)"),
        ({"labels": Y}, "no tensor with a batch dimension"),
    ],
)
def test_refused(batch, message):
    with pytest.raises(InvalidInput, match=message):
        unpack_batch(batch)


class Keyword(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.block = torch.nn.Linear(3, 3)
        self.out = torch.nn.Linear(3, 2)

    def forward(self, ids, mask):
        return {"logits": self.out(torch.tanh(self.block(ids * mask)))}


def test_fit_takes_keyword_batches():
    net = attach(Keyword(), at=["block"], example={"ids": X, "mask": M})
    assert fit(net, [{"ids": X, "mask": M, "labels": Y}], epochs=1, progress=False).steps == 1
    with pytest.raises(InvalidInput, match="the loader yields none"):
        fit(net, [{"ids": X, "mask": M}], epochs=1, progress=False)
