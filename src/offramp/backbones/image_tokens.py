"""Transformer denoisers token by token: a call computes some tokens of an image and lets them look at all others as they last were.

The model's own forward runs, seen through a copy that shares every parameter. Three kinds of modules in the copy are wrapped: what turns an
image into tokens then gives those that are computed; in the attention over image tokens, what makes keys and what makes values gives those
of all tokens, the new ones put among those that are kept; and what turns states into outputs gives the outputs of all tokens likewise. All
else, the attention function included, is the model's and neither knows nor cares: norms, conditioning, feed-forward layers and attention to
text treat a token by itself. With every token computed the copy does exactly what the model does.

That nothing else mixes tokens or goes by their place is not believed but tried: `ImageTokens.check` computes some tokens of a call whose
other keys and values are new and compares with the model.

Needed of a model (diffusers' DiT, PixArt and Stable Diffusion 3 have it): a module from image to tokens, positions included (``pos_embed``
or ``embed``); a list ``transformer_blocks`` or ``blocks``, in each a module of attention with ``to_q``, ``to_k`` and ``to_v``, which lets
there be more keys than queries; and a module from states to outputs (``proj_out_2``, ``proj_out`` or ``out``).

Shapes: ``B`` rows of a call, ``N`` tokens of an image, ``k`` of them that are computed, ``W`` width of what is kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from offramp.backbones.decoder import _seen_through
from offramp.backbones.taps import first_tensor
from offramp.core.errors import InvalidInput, UnsupportedModel
from offramp.core.modes import evaluating

EMBEDDINGS = ("pos_embed", "embed")
BLOCKS = ("transformer_blocks", "blocks")
OUTPUTS = ("proj_out_2", "proj_out", "out")
"""Where to look for what has to be wrapped."""


@dataclass
class TokenStore:
    """Keys, values and outputs of all tokens of some rows.

    Attributes:
        kept: each ``[B, N, W]``: of every attention its keys and its values, and last the outputs; empty before a call of all tokens.
    """

    kept: list[Tensor] = field(default_factory=list)

    def take(self, rows: Tensor) -> TokenStore:
        """A copy of some rows (int64 ``[R]``)."""
        return TokenStore([t.index_select(0, rows) for t in self.kept])

    def put(self, rows: Tensor, other: TokenStore) -> None:
        """Write what another store holds into rows of this one."""
        for mine, theirs in zip(self.kept, other.kept, strict=True):
            mine.index_copy_(0, rows, theirs)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.nbytes for t in self.kept)


@dataclass
class _Now:
    """The call that is under way.

    Attributes:
        kept: what is known of all tokens, by place.
        active: int64 ``[B, k]`` tokens that are computed, or ``None`` for all.
        rows: int64 ``[B, 1]``, each row's number, where only some are.
        tokens: N.
    """

    kept: list[Tensor | None]
    active: Tensor | None
    rows: Tensor | None = None
    tokens: int = 0


class _Around(nn.Module):
    """A module whose result goes through a function; in all else it is that module."""

    def __init__(self, inner: nn.Module, after: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.after = inner, after

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.after(self.inner(*args, **kwargs))


class ImageTokens:
    """A transformer denoiser, token by token. Made from the model, which is not changed.

    Attributes:
        model: the user's.
        blocks: how many blocks it has.
        places: tensors that are kept of every token.
        embedding: name of the module from image to tokens.
        version: how often the model was seen anew because its modules were replaced.

    Raises:
        UnsupportedModel: something is missing; the message says what.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._now: _Now | None = None
        self.version = 0
        self._see()

    def _see(self) -> None:
        """Make the copy."""
        model, name = self.model, type(self.model).__name__
        found = [
            next((n for n in names if isinstance(getattr(model, n, None), kind)), None)
            for names, kind in ((EMBEDDINGS, nn.Module), (BLOCKS, nn.ModuleList), (OUTPUTS, nn.Module))
        ]
        wanted = (
            f"{_either(EMBEDDINGS)}, which turns the image into tokens",
            f"a list {_either(BLOCKS)}",
            f"{_either(OUTPUTS)}, which turns states into outputs",
        )
        if missing := [what for what, name in zip(wanted, found, strict=True) if name is None]:
            raise UnsupportedModel(f"{name} cannot compute some tokens of an image alone: it lacks {'; and '.join(missing)}.")
        self.embedding, listed, output = map(str, found)
        blocks: Any = getattr(model, listed)
        if not len(blocks):
            raise UnsupportedModel(f"{name} cannot compute some tokens of an image alone: its list `{listed}` is empty.")
        self.blocks = len(blocks)
        self.places = 0
        self._originals: list[nn.Module] = [model]
        seen = [self._block(block, f"{listed}.{k} of {name}") for k, block in enumerate(blocks)]
        replaced = {
            self.embedding: _Around(getattr(model, self.embedding), self._choose),
            listed: nn.ModuleList(seen),
            output: self._kept(getattr(model, output), True),
        }
        self._view = _seen_through(model, **replaced)
        self._view._compiled_call_impl = None  # compiled, it would be the model itself that runs
        self._parts = self._own()

    def _own(self) -> list[Any]:
        """What the copies have of their own: were it replaced in the model, they would not know."""
        return [part for m in self._originals for part in (*m._modules.values(), getattr(m, "processor", None))]

    def refresh(self) -> None:
        """See the model anew if its modules were replaced: adapters were loaded, or another attention function was set.

        Raises:
            UnsupportedModel: what there is now lacks something.
        """
        parts = self._own()
        if len(parts) != len(self._parts) or any(a is not b for a, b in zip(parts, self._parts, strict=True)):
            self._see()
            self.version += 1

    def _block(self, block: nn.Module, where: str) -> nn.Module:
        """A view of a block, its attention over image tokens with it."""
        attentions = {}
        self._originals.append(block)
        for name, child in block.named_children():
            if not hasattr(child, "to_q") or getattr(child, "is_cross_attention", False):
                continue  # keys and values of text are the same for every token
            if getattr(child, "fused_projections", False) or not isinstance(getattr(child, "to_k", None), nn.Module):
                raise UnsupportedModel(
                    f"{where}: {name} makes keys and values in one layer; call unfuse_qkv_projections() on the model first."
                )
            self._originals.append(child)
            attentions[name] = _seen_through(child, to_k=self._kept(child.to_k), to_v=self._kept(child.to_v))
        if not attentions:
            raise UnsupportedModel(
                f"{where} has no attention with `to_q`, `to_k` and `to_v` among {[n for n, _ in block.named_children()]}."
            )
        view: nn.Module = _seen_through(block, **attentions)
        return view

    def _kept(self, module: Any, output: bool = False) -> nn.Module:
        place = self.places
        self.places += 1
        return _Around(module, lambda new: self._exchange(place, new, output))

    def _choose(self, tokens: Tensor) -> Tensor:
        now = self._under_way()
        if not isinstance(tokens, Tensor) or tokens.ndim != 3:
            found = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
            raise UnsupportedModel(
                f"`{self.embedding}` of {type(self.model).__name__} gives {found}; expected tokens [B, N, W] of an image."
            )
        now.tokens = tokens.shape[1]
        return tokens if now.active is None else tokens.gather(1, now.active[..., None].expand(-1, -1, tokens.shape[2]))

    def _exchange(self, place: int, new: Tensor, output: bool) -> Tensor:
        """Of some tokens ``[B, k, W]`` in, of all of them ``[B, N, W]`` out."""
        now = self._under_way()
        count = now.tokens if now.active is None else now.active.shape[1]
        if new.ndim != 3 or new.shape[1] != count:
            raise UnsupportedModel(
                f"{type(self.model).__name__} makes keys, values or outputs {tuple(new.shape)} where {count} tokens are computed: "
                "what its blocks attend to is not the tokens of the image."
            )
        if now.active is None or now.rows is None:
            now.kept[place] = new.clone() if output else new  # the caller may write into an output
            return new
        old = now.kept[place]
        if old is None:
            raise UnsupportedModel(f"{type(self.model).__name__} ran through other modules than those that are seen here.")
        # By index and not by scattering: compilers write this where it stands, and that only into a copy of everything.
        old.index_put_((now.rows, now.active), new.to(old.dtype))
        return old.clone() if output else old

    def _under_way(self) -> _Now:
        if self._now is None:
            raise RuntimeError("A view of a model ran by itself; this is a defect in offramp.")
        return self._now

    def __call__(self, store: TokenStore, active: Tensor | None, kwargs: Mapping[str, Any]) -> Any:
        """The model's outputs of all tokens: new of those that are computed, the last ones of the others.

        Args:
            store: of these rows; brought up to date, in place where only some tokens are computed.
            active: int64 ``[B, k]``, tokens to compute, each once in a row; ``None`` = all.
            kwargs: inputs by name.

        Returns:
            What the model returns; no part of it is shared with the store.

        Raises:
            UnsupportedModel: the model did not run through the modules that are seen here.
        """
        if not torch.compiler.is_compiling():  # what is compiled was looked at before
            self.refresh()
            if not torch.is_inference_mode_enabled():  # else they cannot be written into
                store.kept = [t.clone() if t.is_inference() else t for t in store.kept]
        if active is None:
            now = _Now([None] * self.places, None)
        else:
            now = _Now(list(store.kept), active, torch.arange(active.shape[0], device=active.device)[:, None])
        self._now = now
        try:
            with evaluating(self.model) if self.model.training else contextlib.nullcontext():
                made = self._view(**kwargs)
        finally:
            self._now = None
        kept = [t for t in now.kept if t is not None]
        if len(kept) != self.places:
            raise UnsupportedModel(
                f"{type(self.model).__name__} ran through other modules than those that are seen here: its forward is replaced (by a hook "
                "or a compiler), or a block has no part in it."
            )
        store.kept = kept
        return made

    def check(self, kwargs: Mapping[str, Any], tolerance: float = 1e-3) -> int:
        """Compare with the model on a call: all tokens, then some of them over keys and values that are all new.

        Args:
            kwargs: inputs by name.
            tolerance: largest difference allowed, relative to the spread of the outputs; 128 times as much below float32.

        Returns:
            N, how many tokens the image has.

        Raises:
            UnsupportedModel: the outputs differ, or the model cannot run with some tokens alone.
            InvalidInput: the model's outputs are not finite.
        """
        name = type(self.model).__name__
        store = TokenStore()
        with torch.no_grad():
            with evaluating(self.model):
                expected = prediction(self.model(**kwargs))
            whole = prediction(self(store, None, kwargs))
            rows, tokens = store.kept[-1].shape[:2]
            # Every other token, from the other end in every second row: what goes by a token's place in the list is found out.
            one = torch.arange(0, tokens, 2, device=whole.device)
            active = torch.stack([one if r % 2 == 0 else tokens - 1 - one for r in range(rows)])
            for tensor in store.kept:  # what is not computed anew is missed
                tensor.scatter_(1, active[..., None].expand(-1, -1, tensor.shape[2]), 0)
            try:
                some = prediction(self(store, active, kwargs))
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
                raise UnsupportedModel(
                    f"{name} does not run with some of its {tokens} tokens alone: "
                    f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"
                ) from error
        sound = expected.isfinite()
        if not bool(sound.any()):
            raise InvalidInput(f"{name} gives no finite number on this call, so that nothing can be compared.")
        allowed = tolerance if expected.dtype in (torch.float32, torch.float64) else 128 * tolerance
        for what, found in (("all of its tokens", whole), ("some of its tokens", some)):
            gap = (found.float() - expected.float())[sound].abs().max() / expected.float()[sound].std(correction=0).clamp_min(1e-6)
            if not float(gap) <= allowed:
                raise UnsupportedModel(
                    f"{name} does more with tokens than is known here: with {what} computed, outputs differ by {float(gap):.3g} of their "
                    f"spread (at most {allowed:.3g} is rounding). Tokens must meet in the attention of its blocks alone."
                )
        return tokens


def _either(names: tuple[str, ...]) -> str:
    return " or ".join(f"`{n}`" for n in names)


def prediction(output: Any) -> Tensor:
    """The prediction in what a denoiser returns: the first tensor of numbers.

    Raises:
        UnsupportedModel: there is none.
    """
    found = first_tensor(output)
    if found is None:
        raise UnsupportedModel(f"The model returned a {type(output).__name__} without a tensor of numbers; expected its prediction.")
    return found


def take_rows(kwargs: Mapping[str, Any], rows: Tensor, count: int) -> dict[str, Any]:
    """Some rows (int64 ``[R]``) of the inputs of a call: of every tensor whose first dimension is the call's ``count`` rows."""

    def one(value: Any) -> Any:
        return value.index_select(0, rows) if isinstance(value, Tensor) and value.ndim and value.shape[0] == count else value

    return {n: tree_map(one, v) for n, v in kwargs.items()}
