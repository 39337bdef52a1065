"""Where the channels of a state are, and how a state becomes one vector per item. Heads and rules agree through this file."""

from __future__ import annotations

from torch import Tensor

from offramp.core.errors import InvalidInput


def channel_dim(shape: tuple[int, ...], channels_last: bool | None = None) -> int:
    """Dimension of the channels in a state ``[B, *shape]``.

    Vectors and tokens have them last. Maps have them first, unless only the first two of three sizes agree (``14, 14, 384``:
    channels last, as in Swin).

    Args:
        shape: of the state without the batch; ``-1`` where it varies.
        channels_last: says where a map has them, when its sizes do not tell; ignored for vectors and tokens.

    Raises:
        InvalidInput: the state has no dimension but the batch.
    """
    if not shape:
        raise InvalidInput("The state has one number per item, so it has no channels to read. Place the exit after a wider module.")
    if len(shape) <= 2:
        return len(shape)
    if channels_last is not None:
        return len(shape) if channels_last else 1
    if len(shape) == 3 and shape[0] == shape[1] != shape[2]:
        return 3
    return 1


def mean_pool(hidden: Tensor, channels_last: bool | None = None) -> Tensor:
    """Mean over everything but batch and channels: ``[B, *shape]`` to ``[B, C]``. Padding, if there is any, enters it."""
    channel = channel_dim(tuple(hidden.shape[1:]), channels_last)
    rest = [d for d in range(1, hidden.ndim) if d != channel]
    return hidden.mean(dim=rest) if rest else hidden


def pool(hidden: Tensor, token: int | None = None) -> Tensor:
    """One vector per item, ``[B, C]``.

    Args:
        hidden: a vector ``[B, C]``, tokens ``[B, T, C]`` or a map.
        token: which token stands for a sequence, so that padding does not enter; ``None`` takes the mean. Ignored for
            vectors and maps.
    """
    return hidden[:, token] if token is not None and hidden.ndim == 3 else mean_pool(hidden)


def pooled_width(shape: tuple[int, ...]) -> int:
    """Width of `pool` of a state ``[B, *shape]``."""
    return shape[channel_dim(shape) - 1]


__all__ = ["channel_dim", "mean_pool", "pool", "pooled_width"]
