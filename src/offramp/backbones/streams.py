"""Which of the states that a denoiser carries on is the image's: blocks of joint attention carry the text's beside it, and either may come
first in what they return.

Told by what depends on the noisy input. Before the first block only the image does; a block continues what it is given in the shapes it is
given; and where both are shaped alike, by the name of the argument as which the next block is given each. Where none of these tells, the
model is refused rather than read wrongly.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from offramp.backbones.graph import same
from offramp.backbones.taps import Stream, floats, resolve
from offramp.core.errors import NotCuttable
from offramp.core.modes import evaluating


@dataclass
class _Ran:
    """One run of a module: what it was given by name, what it returned, and which of these moved with the noisy input."""

    path: str
    kind: type
    given: list[tuple[str, Tensor]]
    made: list[Tensor]
    given_moved: list[bool] = field(default_factory=list)
    made_moved: list[bool] = field(default_factory=list)


def image_streams(model: nn.Module, at: Sequence[str], inputs: Mapping[str, Any], sample: str) -> dict[str, Stream]:
    """Find the image's state at every place where it is not the first tensor that the module there returns.

    Runs the model twice, the second time with another noisy input. A model that is given no text (no tensor of three or more dimensions
    beside the noisy input) has one stream and is not run.

    Args:
        model: a denoiser.
        at: module paths.
        inputs: by name.
        sample: name of the noisy input.

    Returns:
        By path. Where the module works on the text alone, that of the image which crosses there: another module made it before.

    Raises:
        NotCuttable: it cannot be told at a place, or a path does not exist.
    """
    image = inputs[sample]
    beside = tree_leaves({n: v for n, v in inputs.items() if n != sample})
    if not any(isinstance(v, Tensor) and v.is_floating_point() and v.ndim >= 3 for v in beside):
        return {}
    watched = _watched(model, at)
    first = _run(model, watched, inputs, int(image.shape[0]), None)
    if len({r.path for r in first}) != len(first):
        first = [r for r in first if sum(r.path == other.path for other in first) == 1]  # what runs more than once is refused elsewhere
    again = {r.path: r for r in first}
    _run(model, watched, {**inputs, sample: _another(image)}, int(image.shape[0]), again)
    return _follow(model, first, at)


def _watched(model: nn.Module, at: Sequence[str]) -> list[str]:
    """The places, the modules beside them and those of the model itself: between them states are handed on."""
    found = dict.fromkeys(n for n, _ in model.named_children())
    for path in at:
        resolve(model, path)
        parent = path.rpartition(".")[0]
        inside = model.get_submodule(parent) if parent else model
        found |= dict.fromkeys(f"{parent}.{n}" if parent else n for n, _ in inside.named_children())
    return list(found)


def _another(image: Tensor) -> Tensor:
    """Another noisy input of the same kind."""
    if not image.is_floating_point():
        return image.flip(-1)
    return image + torch.linspace(-1, 1, image.numel(), device=image.device).view_as(image).to(image.dtype)


def _run(model: nn.Module, watched: Sequence[str], inputs: Mapping[str, Any], rows: int, before: dict[str, _Ran] | None) -> list[_Ran]:
    """Run the model and note what modules are given and return; with ``before``, note there what differs."""
    ran: list[_Ran] = []
    given: dict[str, list[tuple[str, Tensor]]] = {}

    def enter(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            try:
                named = dict(inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments)
            except TypeError:
                named = {**{str(k): v for k, v in enumerate(args)}, **kwargs}
            given[path] = [(n, v) for n, v in named.items() if _is_state(v, rows)]

        return hook

    def leave(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if before is None:
                ran.append(_Ran(path, type(module), given.pop(path, []), floats(output)))
            elif path in before:
                old = before[path]
                old.given_moved = _differ([v for _, v in old.given], [v for _, v in given.pop(path, [])])
                old.made_moved = _differ(old.made, floats(output))

        return hook

    handles = []
    for path in watched:
        module = resolve(model, path)
        handles += [module.register_forward_pre_hook(enter(path), with_kwargs=True), module.register_forward_hook(leave(path))]
    try:
        with torch.no_grad(), evaluating(model):
            model(**tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, dict(inputs)))  # forward may write into its inputs
    finally:
        for handle in handles:
            handle.remove()
    return ran


def _is_state(value: Any, rows: int) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 3 and value.shape[0] == rows


def _differ(old: Sequence[Tensor], new: Sequence[Tensor]) -> list[bool]:
    """Whether each tensor differs; where their number does, all do."""
    return [not same(a, b) for a, b in zip(old, new, strict=True)] if len(old) == len(new) else [True] * len(old)


def _follow(model: nn.Module, ran: Sequence[_Ran], at: Sequence[str]) -> dict[str, Stream]:
    rows = next((v.shape[0] for r in ran for _, v in r.given), 0)
    image: list[tuple[Tensor, Stream]] = []
    names: set[str] = set()  # of the arguments as which blocks are given the image
    chosen: dict[str, int] = {}
    unsure: list[tuple[int, list[int]]] = []
    for k, r in enumerate(ran):
        moved = [i for i, t in enumerate(r.made) if _is_state(t, rows) and r.made_moved and r.made_moved[i]]
        if len(moved) > 1:
            moved = _continues(r, moved, image, names)
        if len(moved) > 1:
            moved = _handed_on(r, moved, ran[k + 1 :], names)
        if len(moved) > 1:
            unsure.append((k, moved))
        elif moved:
            chosen[r.path] = moved[0]
            image.append((r.made[moved[0]], Stream(r.path, moved[0])))
    for k, moved in unsure:
        alike = {chosen[r.path] for r in ran if r.kind is ran[k].kind and r.path in chosen and len(r.made) == len(ran[k].made)}
        if len(alike) == 1 and alike <= set(moved):
            chosen[ran[k].path] = alike.pop()
    found: dict[str, Stream] = {}
    for k, r in enumerate(ran):
        if r.path not in at:
            continue
        stream: Stream | None
        if r.path in chosen:
            stream = Stream(r.path, chosen[r.path])
        elif any(_is_state(t, rows) for t in r.made):  # of the text alone, or not to be told
            stream = None if any(r.path == ran[j].path for j, _ in unsure) else _crosses(k, ran, image)
            if stream is None:
                raise NotCuttable(
                    f"{type(model).__name__} carries the image and its text side by side, and which of "
                    f"{[tuple(t.shape) for t in r.made]} at {r.path!r} is the image cannot be told. Give an example with another number of "
                    "text tokens than image tokens, or name other places.",
                    reason="output",
                    path=r.path,
                )
        else:
            continue
        if stream != Stream(r.path, 0):
            found[r.path] = stream
    return found


def _same(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors are one, or a copy in another order of memory."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    return left.data_ptr() == right.data_ptr() or torch.equal(left, right)


def _known(value: Tensor, image: Sequence[tuple[Tensor, Stream]]) -> Stream | None:
    """Where a tensor was made, if it is the image."""
    return next((stream for tensor, stream in reversed(image) if _same(value, tensor)), None)


def _continues(r: _Ran, moved: list[int], image: Sequence[tuple[Tensor, Stream]], names: set[str]) -> list[int]:
    """Of what a block returns, what may continue the image: all that is shaped like it, and unlike the text where that tells."""
    inside = [n for n, v in r.given if _known(v, image) is not None]
    if len(inside) != 1:
        inside = [n for (n, _), depends in zip(r.given, r.given_moved, strict=False) if depends]
    if len(inside) != 1:
        inside = [n for n, _ in r.given if n in names]
    if len(inside) != 1:
        return moved if len(r.given) > 1 else moved[:1]
    of_image = next(v for n, v in r.given if n == inside[0])
    texts = {tuple(v.shape) for n, v in r.given if n != inside[0] and v.ndim == of_image.ndim}
    if not any(tuple(r.made[i].shape) in texts for i in moved):
        return moved[:1]  # no text goes on: skip connections beside the state, say
    names.add(inside[0])
    like = [i for i in moved if r.made[i].shape == of_image.shape]
    return [i for i in like if tuple(r.made[i].shape) not in texts] or like


def _handed_on(r: _Ran, moved: list[int], later: Sequence[_Ran], names: set[str]) -> list[int]:
    """Of what is shaped alike, what the next modules are given as the image; after the last block, what is read at all."""
    read = {i: {n for other in later for n, v in other.given if _same(v, r.made[i])} for i in moved}
    return [i for i in moved if read[i] & names] or [i for i in moved if read[i]] or moved


def _crosses(k: int, ran: Sequence[_Ran], image: Sequence[tuple[Tensor, Stream]]) -> Stream | None:
    """The image that crosses after run ``k``: what a later module is given first that was made before."""
    made = {r.path for r in ran[:k]}
    for r in ran[k + 1 :]:
        for _, value in r.given:
            if (stream := _known(value, image)) is not None and stream.module in made:
                return stream
    return None


__all__ = ["Stream", "image_streams"]
