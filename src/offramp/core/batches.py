"""What a data loader yields, in one shape: positional inputs, keyword inputs, labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from offramp.core.errors import InvalidInput

LABEL_KEYS = ("labels", "label")
"""Keys under which a mapping holds its labels, first found first."""


class Batch(NamedTuple):
    """One batch, ready for ``net(*args, **kwargs)``.

    Attributes:
        args: positional inputs.
        kwargs: keyword inputs.
        labels: ``[B, ...]``, or ``None`` if the loader gave none.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    labels: Tensor | None

    @property
    def rows(self) -> int:
        """Items in the batch: dimension 0 of the labels, else of the first input tensor.

        Raises:
            InvalidInput: there is no tensor with a batch dimension.
        """
        for leaf in (self.labels, *tree_leaves((self.args, self.kwargs))):
            if isinstance(leaf, Tensor) and leaf.ndim:
                return int(leaf.shape[0])
        raise InvalidInput("The batch holds no tensor with a batch dimension. Yield tensors whose dimension 0 is the item.")

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with every tensor on ``device``."""

        def move(leaf: Any) -> Any:
            return leaf.to(device, non_blocking=True) if isinstance(leaf, Tensor) else leaf

        args, kwargs, labels = tree_map(move, (self.args, self.kwargs, self.labels))
        return Batch(tuple(args), dict(kwargs), labels)


def unpack_batch(batch: Any) -> Batch:
    """Take apart what a loader yields.

    ==============================================  =====================================================
    the loader yields                               it becomes
    ==============================================  =====================================================
    ``Batch``                                       itself
    mapping with a key ``labels`` or ``label``      the rest as keyword inputs, that entry as labels
    mapping without                                 keyword inputs, no labels
    ``(inputs, labels)``                            ``inputs``: a tensor, a tuple of positional or a mapping of keyword inputs
    ``(a, b, ..., labels)``                         positional inputs ``a, b, ...``
    ``(inputs,)`` or a tensor                       positional inputs, no labels
    ==============================================  =====================================================

    Raises:
        InvalidInput: it is none of these, the labels are not a tensor, or inputs and labels differ in number.
    """
    if isinstance(batch, Batch):
        return batch
    if isinstance(batch, Mapping):
        inputs: Any = {str(k): v for k, v in batch.items()}
        key = next((k for k in LABEL_KEYS if k in inputs), None)
        labels = inputs.pop(key) if key is not None else None
    elif isinstance(batch, Tensor):
        inputs, labels = (batch,), None
    elif isinstance(batch, tuple | list) and len(batch) == 1:
        inputs, labels = batch[0], None
    elif isinstance(batch, tuple | list) and len(batch) == 2:
        inputs, labels = batch
    elif isinstance(batch, tuple | list) and len(batch) > 2:
        inputs, labels = tuple(batch[:-1]), batch[-1]
    else:
        raise InvalidInput(
            f"The loader yields a {type(batch).__name__}; expected (inputs, labels), or a mapping with the labels under 'labels'. "
            "Pass a collate_fn to the DataLoader that returns one of these."
        )
    if isinstance(labels, int | float) or (isinstance(labels, list | tuple) and all(isinstance(y, int | float) for y in labels)):
        raise InvalidInput(
            f"The labels of a batch are {type(labels).__name__}, not a tensor. Convert them in the collate_fn: torch.as_tensor(labels)."
        )
    if labels is not None and not isinstance(labels, Tensor):
        raise InvalidInput(
            f"The last element of a batch is taken as its labels and must be a tensor; got {type(labels).__name__}. "
            "Yield (inputs, labels) with inputs a tensor, a tuple or a mapping; or a mapping with the labels under 'labels'."
        )
    if isinstance(inputs, Mapping):
        unpacked = Batch((), dict(inputs), labels)
    else:
        unpacked = Batch(tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,), {}, labels)
    if labels is not None:
        first = Batch(unpacked.args, unpacked.kwargs, None).rows
        if labels.ndim == 0 or labels.shape[0] != first:
            raise InvalidInput(
                f"A batch holds {first} inputs but labels of shape {tuple(labels.shape)}; dimension 0 of both must be the item."
            )
    return unpacked
