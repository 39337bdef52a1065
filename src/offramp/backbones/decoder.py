"""Autoregressive decoders as resumable execution: a causal language model, block by block, over a cache of our own.

The model's own modules run. Each block is seen through a copy that shares every parameter but whose attention reads the configuration
of a copy, in which the attention function is ours: the user's model, its configuration and its forward stay as they are. Weights that
change are followed. Modules that are put in the place of those that are seen are not, and `Decoder.check_unchanged` says so.

What is needed of a model is small and read from its structure: token embeddings, a list of blocks, a final norm, an output layer,
positions by rotation or by a learned table. Whether that was all is not believed but tried: the decoder's logits are compared with the
model's own before it is used, and a model that does something else besides is refused with the difference.

Shapes: ``B`` rows, ``Q`` tokens of a row in one call, ``W`` width of the states, ``V`` vocabulary, ``L`` slots that may be read.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from offramp.backbones.attention import decoding_attention, masked_attention, wants_kernel
from offramp.backbones.joined import joined_projections
from offramp.backbones.kv import KVCache, Writer
from offramp.backbones.tried import check_logits, trying
from offramp.core.errors import InvalidInput, UnsupportedModel
from offramp.core.modes import evaluating

ATTENTION = "offramp_cached"
"""Name of our attention function among those of transformers."""

_TRUNKS = ("model.decoder", "model", "transformer", "gpt_neox")
_BLOCKS = ("layers", "h")
_ATTENTIONS = ("self_attn", "attn", "attention")
_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm")
_LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass
class Step:
    """One call of blocks: where its tokens stand and what they may see.

    Attributes:
        cache: keys and values.
        positions: int64 ``[B, Q]``, 0-based.
        slots: int64 ``[B, Q]`` where keys and values are put: the positions, or ``cache.nowhere`` for tokens that do not count.
        length: slots that are read, more than any position that counts.
        rotary: what the blocks are given to rotate by, computed once, by kind of block (`None` where there is one kind).
        masks: ``[B, 1, Q, length]`` bool by window, computed once.
    """

    cache: KVCache
    positions: Tensor
    slots: Tensor
    length: int
    rotary: dict[str | None, Any] = field(default_factory=dict)
    masks: dict[int | None, Tensor] = field(default_factory=dict)

    def mask(self, window: int | None) -> Tensor:
        """Which slots each token sees: those up to its own position, the last ``window`` of them if it has one."""
        if window not in self.masks:
            slot = torch.arange(self.length, device=self.positions.device)
            seen = slot <= self.positions[..., None]
            if window is not None:
                seen &= slot > self.positions[..., None] - window
            self.masks[window] = seen[:, None]
        return self.masks[window]


def cached_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    cache_positions: Tensor | None = None,
    cache_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What blocks call for attention: `masked_attention` with a mask, `decoding_attention` without. Returns ``[B, Q, H, D]``."""
    if attention_mask is None and cache_positions is not None:
        return decoding_attention(query, key, value, cache_positions, scaling, softcap, cache_window), None
    return masked_attention(query, key, value, attention_mask, scaling, softcap).transpose(1, 2).contiguous(), None


class _Written(Exception):
    """Keys and values are in place, and the rest of the block is not wanted."""


class _WriteOnly(Writer):
    """A cache that stops the block that writes to it."""

    def update(self, key: Tensor, value: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        self.cache.write(self.block, key, value, self.slots)
        raise _Written


def _seen_through(module: nn.Module, **replaced: Any) -> Any:
    """A copy of a module that shares its parameters and children, but for those replaced, and is always in evaluation mode."""
    view = copy.copy(module)
    view.__dict__["_modules"] = dict(module._modules)
    view.training = False  # a flag is not shared: the model may have been training when it was seen
    for name, value in replaced.items():
        setattr(view, name, value)
    return view


def _own_forward(module: nn.Module) -> Any:
    """What was put in place of a module's ``forward`` on the module itself, or ``None``; its class's own put back is nothing put there."""
    found = module.__dict__.get("forward")
    return None if getattr(found, "__func__", None) is type(module).forward else found


def _first(module: nn.Module, names: tuple[str, ...]) -> tuple[str, nn.Module] | None:
    """The first of some submodule paths that exists."""
    for name in names:
        found: Any = module
        for part in name.split("."):
            found = getattr(found, part, None)
        if isinstance(found, nn.Module):
            return name, found
    return None


class _SharedBlocks:
    """Code for some blocks at a time, whose weights and caches are its inputs.

    Compiled as a whole, equal blocks are traced and lowered one by one. Here the compiler finds the code it made for others like them.
    """

    def __init__(self, compiled: Callable[[Callable[..., Any]], Callable[..., Any]], at_a_time: int) -> None:
        self.at_a_time, self._code = at_a_time, compiled(self._several)

    def run(self, model: Decoder, hidden: Tensor, start: int, stop: int, step: Step) -> Tensor:
        for first in range(start, stop, self.at_a_time):
            some = range(first, min(first + self.at_a_time, stop))
            about = [(model._kinds[k], model.windows[k]) for k in some]
            keys, values = [step.cache.keys[k] for k in some], [step.cache.values[k] for k in some]
            if any(buffer is None for buffer in (*keys, *values)):
                raise InvalidInput(f"Blocks {some.start} to {some.stop - 1} have not run yet; prefill runs every block on the prompt.")
            # Not the step as it is: its cache holds all blocks' buffers, and code that has seen them is code for these.
            given = (step.positions, step.slots, step.length, step.rotary, step.masks)
            hidden = self._code(model, [model.blocks[k] for k in some], about, hidden, given, keys, values)
        return hidden

    @staticmethod
    def _several(
        model: Decoder, blocks: list[Any], about: list[Any], hidden: Tensor, given: tuple[Any, ...], keys: list[Tensor],
        values: list[Tensor],
    ) -> Tensor:  # fmt: skip
        cache = KVCache.holding(keys, values)
        positions, slots, length, rotary, masks = given
        step = Step(cache, positions, slots, length, rotary, masks)
        for n, (block, (kind, window)) in enumerate(zip(blocks, about, strict=True)):
            hidden = model._call(block, kind, window, hidden, step, Writer(cache, n, slots, length))
        return hidden


class Decoder:
    """A causal language model, block by block. Made by `decoder`.

    Attributes:
        model: the user's model, untouched.
        blocks: its blocks, seen through copies.
        windows: how far back each block sees; ``None`` = to the start.
        vocabulary: size of the output.
        max_positions: most tokens that can be embedded, or ``None`` where nothing bounds positions: a table of them, or rotations that
            change beyond a length.
        captured: whether a graph reads the parameters where they are.
    """

    def __init__(self, model: Any) -> None:
        self.model: Any = model
        self.captured = False
        self._before: list[Tensor] = []
        self._shared: _SharedBlocks | None = None
        name = type(model).__name__
        config = getattr(model, "config", None)
        if config is None or not hasattr(model, "get_output_embeddings"):
            raise UnsupportedModel(
                f"{name} is not a causal language model of transformers: it has no `config` or no `get_output_embeddings`. "
                "Give an AutoModelForCausalLM, or use offramp.attach with an example for other models."
            )
        trunk = _first(model, _TRUNKS)
        blocks = _first(trunk[1], _BLOCKS) if trunk else None
        head = model.get_output_embeddings()
        missing = [
            what
            for what, found in (
                (f"a trunk ({', '.join(_TRUNKS)})", trunk),
                (f"a list of blocks in it ({', '.join(_BLOCKS)})", blocks),
                ("an output layer (get_output_embeddings)", head),
            )
            if found is None
        ]
        if missing or trunk is None or blocks is None or not isinstance(blocks[1], nn.ModuleList) or not len(blocks[1]):
            raise UnsupportedModel(f"{name} cannot be decoded block by block: it lacks {' and '.join(missing) or 'a list of blocks'}.")
        self.trunk: Any = trunk[1]
        self._head: Any = head
        self._embed_tokens = model.get_input_embeddings()
        self._rotary: Any = getattr(self.trunk, "rotary_emb", None)
        kinds = self._rotary is not None and "layer_type" in inspect.signature(self._rotary.forward).parameters
        self._kinds: list[str | None] = list(config.layer_types) if kinds else [None] * config.num_hidden_layers
        self._table: Any = getattr(self.trunk, "wpe", None) or getattr(self.trunk, "embed_positions", None)
        norm = _first(self.trunk, _NORMS)
        self._norm = norm[1] if norm else nn.Identity()  # OPT-350m has none
        if self._rotary is None and self._table is None:
            raise UnsupportedModel(
                f"{name} has neither rotary positions (`rotary_emb`) nor a table of positions (`wpe`, `embed_positions`) in its trunk; "
                "other kinds of positions are not known here."
            )
        self.vocabulary = int(config.vocab_size)
        self.head_width = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        unknown = sorted(set(getattr(config, "layer_types", None) or ()) - set(_LAYER_TYPES))
        if unknown:
            raise UnsupportedModel(
                f"{name} has blocks of the kinds {', '.join(unknown)}; blocks that see all before them or a sliding window are known here "
                f"({', '.join(_LAYER_TYPES)})."
            )
        rotations = _rotations(self._rotary)
        if any("dynamic" in kind for kind in rotations):
            raise UnsupportedModel(
                f"{name} rotates by frequencies that change with the length of the text (rope_type 'dynamic'), so that keys in a cache "
                "would go stale and rows of a batch would change each other."
            )
        self.max_positions: int | None = getattr(config, "max_position_embeddings", None) if self._table is not None else None
        if "longrope" in rotations:  # whose frequencies change beyond this length
            self.max_positions = _original_length(config)
        self.blocks: list[Any] = []
        self.windows: list[int | None] = []
        self._keyword = ""
        ours = copy.copy(config)
        ours._attn_implementation_internal = ATTENTION
        for block in blocks[1]:
            attention = _first(block, _ATTENTIONS)
            if attention is None or not hasattr(attention[1], "config") or getattr(attention[1], "layer_idx", None) is None:
                raise UnsupportedModel(
                    f"Block {len(self.blocks)} of {name} has no attention among {', '.join(_ATTENTIONS)} that reads `config` and knows its "
                    "`layer_idx`, so that its cache cannot be ours."
                )
            self.blocks.append(_seen_through(block, **{attention[0]: _seen_through(attention[1], config=ours)}))
            self.windows.append(_window(attention[1], config))
            self._keyword = "layer_past" if attention[0] == "attention" else "past_key_values"
        self._seen = self._parts()

    def _parts(self) -> dict[str, Any]:
        """What is seen of the model, by path, as it is now: what `check_unchanged` compares."""
        model = self.model
        found: dict[str, Any] = {"the input embeddings": model.get_input_embeddings(), "the output layer": model.get_output_embeddings()}
        name, trunk = _first(model, _TRUNKS) or ("", None)
        found[name or "the trunk"] = trunk
        if trunk is None:
            return found
        for part in ("rotary_emb", "wpe", "embed_positions"):
            found[f"{name}.{part}"] = getattr(trunk, part, None)
        norm, blocks = _first(trunk, _NORMS) or ("the final norm", None), _first(trunk, _BLOCKS)
        found[f"{name}.{norm[0]}"] = norm[1]
        if blocks is None:
            return found
        for number, block in enumerate(blocks[1].children()):
            path = f"{name}.{blocks[0]}.{number}"
            found[path], found[f"{path}.forward"] = block, _own_forward(block)
            for child, module in block._modules.items():
                found[f"{path}.{child}"] = module
                if child in _ATTENTIONS and module is not None:
                    found[f"{path}.{child}.forward"] = _own_forward(module)
                    found |= {f"{path}.{child}.{part}": inner for part, inner in module._modules.items()}
        return found

    def check_unchanged(self) -> None:
        """See that what is seen of the model is still what the model runs: its embeddings, blocks, what they consist of, norm and head.

        Identities are compared, in well under a millisecond, so that new values, types and devices of weights, modules replaced deeper
        inside (an adapter inside an ``mlp``) and hooks, all of which are followed, pass.

        Raises:
            InvalidInput: a module was replaced, added or taken away, or the vocabulary resized; says which.
        """
        now, seen = self._parts(), self._seen
        changed = [path for path in (*seen, *(p for p in now if p not in seen)) if now.get(path) is not seen.get(path)]
        vocabulary = int(self.model.config.vocab_size)
        if vocabulary != self.vocabulary:
            changed.insert(0, f"the vocabulary ({self.vocabulary} tokens then, {vocabulary} now)")
        if changed:
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise InvalidInput(
                f"This {type(self.model).__name__} was changed after exits were attached to it: {', '.join(changed[:3])}{more}. The text "
                "would be that of the model as it was. Change the model first (adapters, other embeddings or layers), then attach again "
                "with offramp.attach; new values of the same weights need no new attaching."
            )

    def __len__(self) -> int:
        return len(self.blocks)

    def joined(self) -> Decoder:
        """This decoder with one product for the layers of a block that read the same states, where they are plain layers of their own.

        The model's parameters keep their values and identity, but become views of larger tensors (`offramp.backbones.joined`). Memory
        that graphs of ours read is kept; a graph that somebody else captured of this model before must be captured again. Such a
        model is saved by ``save_pretrained`` and by safetensors' ``save_file`` as before; its ``save_model`` refuses views.
        """
        kept = self._before if self.captured else None
        made = copy.copy(self)
        made.blocks = []
        for block in self.blocks:
            parts = {name: found for name, child in block.named_children() if (found := joined_projections(child, kept))}
            views = {name: _seen_through(getattr(block, name), **found) for name, found in parts.items()}
            made.blocks.append(_seen_through(block, **views) if views else block)
        return made

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def cache(self, rows: int, slots: int) -> KVCache:
        """An empty cache for this model."""
        return KVCache(len(self), rows, slots)

    def embed(self, tokens: Tensor, step: Step) -> Tensor:
        """States ``[B, Q, W]`` before the first block, of tokens (int64 ``[B, Q]``)."""
        hidden: Tensor = self._embed_tokens(tokens)
        if getattr(self.model.config, "embedding_multiplier", None):  # Granite
            hidden = hidden * self.model.config.embedding_multiplier
        if self._table is not None:
            if hasattr(self._table, "offset"):  # OPT: the table is asked with a mask and knows its own offset
                places = self._table(torch.ones_like(tokens), position_ids=step.positions)
            else:
                places = self._table(step.positions)
            if getattr(self.trunk, "project_in", None) is not None:
                hidden = self.trunk.project_in(hidden)
            hidden = hidden + places.to(hidden.dtype)
        return hidden

    def run(self, hidden: Tensor, start: int, stop: int, step: Step) -> Tensor:
        """States ``[B, Q, W]`` after blocks ``start`` to ``stop - 1``; their keys and values are in the cache afterwards."""
        if self._shared is not None:
            return self._shared.run(self, hidden, start, stop, step)
        for k in range(start, stop):
            hidden = self.call(self.blocks[k], k, hidden, step, Writer(step.cache, k, step.slots, step.length))
        return hidden

    def project(self, hidden: Tensor, start: int, stop: int, step: Step) -> None:
        """Each of blocks ``start`` to ``stop - 1`` makes its keys and values from the same states ``[B, Q, W]``, and no more of it runs.

        What comes before them in the block (a norm) runs too, and the queries where the block makes them along.
        """
        for k in range(start, stop):
            with contextlib.suppress(_Written):
                self.call(self.blocks[k], k, hidden, step, _WriteOnly(step.cache, k, step.slots, step.length))

    def call(self, block: Any, index: int, hidden: Tensor, step: Step, writer: Writer) -> Tensor:
        """States ``[B, Q, W]`` after a block of the kind of block ``index``: that one, or a copy with weights of its own."""
        return self._call(block, self._kinds[index], self.windows[index], hidden, step, writer)

    def _call(self, block: Any, kind: str | None, window: int | None, hidden: Tensor, step: Step, writer: Writer) -> Tensor:
        given: dict[str, Any] = {self._keyword: writer}
        if self._rotary is not None:
            given["position_embeddings"] = self._rotation(hidden, step, kind)
        kernel = wants_kernel(hidden.device, hidden.shape[1], self.head_width)
        if kernel:  # it knows what to read from the positions
            given |= {"cache_positions": step.positions, "cache_window": window}
        mask = None if kernel else step.mask(window)
        after: Tensor = block(hidden, attention_mask=mask, position_ids=step.positions, **given)
        return after

    def prepare(self, hidden: Tensor, step: Step) -> Step:
        """The step with all that blocks look up in it computed, for states ``[B, Q, W]``."""
        for kind in set(self._kinds) if self._rotary is not None else ():
            self._rotation(hidden, step, kind)
        if not wants_kernel(hidden.device, hidden.shape[1], self.head_width):
            for window in set(self.windows):
                step.mask(window)
        return step

    def sharing(self, compiled: Callable[[Callable[..., Any]], Callable[..., Any]], at_a_time: int) -> Decoder:
        """This decoder with its blocks compiled ``at_a_time``, once for all that are alike: `run` then wants a step that is prepared."""
        made = copy.copy(self)
        made._shared, made.blocks = _SharedBlocks(compiled, at_a_time), []
        for block in self.blocks:  # which one it is the cache is told: with one number for all, code of equal blocks is equal
            attention = _first(block, _ATTENTIONS)
            views = {} if attention is None else {attention[0]: _seen_through(attention[1], layer_idx=0)}
            made.blocks.append(_seen_through(block, **views))
        return made

    def _rotation(self, hidden: Tensor, step: Step, kind: str | None) -> Any:
        if kind not in step.rotary:
            extra = {} if kind is None else {"layer_type": kind}
            step.rotary[kind] = self._rotary(hidden, position_ids=step.positions, **extra)
        return step.rotary[kind]

    def norm(self, hidden: Tensor) -> Tensor:
        """The model's final norm, and the projection some models have after it."""
        return self.after_norm(self._norm(hidden))

    def after_norm(self, normed: Tensor) -> Tensor:
        """What the model does between its norm and its output layer: for most, nothing."""
        after = getattr(self.trunk, "project_out", None)
        return after(normed) if after is not None else normed

    def head(self, normed: Tensor) -> Tensor:
        """Logits ``[..., V]`` of normed states."""
        return self.bounded(self._head(normed))

    def bounded(self, logits: Tensor) -> Tensor:
        """What the model does to its output layer's answers, each by itself: scales or bounds them; for most, nothing."""
        config = self.model.config
        if getattr(config, "logit_scale", None):  # Cohere
            logits = logits * config.logit_scale
        if getattr(config, "logits_scaling", None):  # Granite
            logits = logits / config.logits_scaling
        cap = getattr(config, "final_logit_softcapping", None)
        return cap * torch.tanh(logits / cap) if cap else logits

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits ``[..., V]`` of the states after the last block."""
        return self.head(self.norm(hidden))

    @property
    def norm_module(self) -> nn.Module:
        """The final norm."""
        return self._norm

    @property
    def output(self) -> nn.Module:
        """The output layer, a row for each token."""
        found: nn.Module = self._head
        return found

    @property
    def width(self) -> int:
        """Width of the states."""
        return int(self.model.config.hidden_size)

    def step(self, cache: KVCache, positions: Tensor, counted: Tensor | None = None, length: int | None = None) -> Step:
        """A call at positions (int64 ``[B, Q]``).

        Args:
            cache: keys and values.
            positions: of the tokens; those that do not count may have any.
            counted: bool ``[B, Q]``, which tokens count; the others leave no trace. All by default.
            length: slots to read; all by default.
        """
        slots = positions if counted is None else torch.where(counted, positions, cache.nowhere)
        length = length if length is not None else cache.slots
        last = length if self.max_positions is None else min(length, self.max_positions)  # tokens that do not count may lie beyond
        return Step(cache, positions.clamp(max=last - 1), slots, length)


def _rotations(rotary: Any) -> set[str]:
    """Kinds of rotation that a model's blocks use, by transformers' names."""
    kind = getattr(rotary, "rope_type", None)
    return set(map(str, kind.values())) if isinstance(kind, dict) else set() if kind is None else {str(kind)}


def _original_length(config: Any) -> int | None:
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    found = getattr(config, "original_max_position_embeddings", None) or given.get("original_max_position_embeddings")
    return int(found) if found else None


def _window(attention: Any, config: Any) -> int | None:
    """How far back a block sees: too far for the check below to notice, so every sign of a window is believed."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and kinds[attention.layer_idx] != "sliding_attention":
        return None
    found = getattr(attention, "sliding_window", None)
    return found if found is not None else getattr(config, "sliding_window", None)


def _by_blocks(made: Decoder, tokens: Tensor) -> Tensor:
    """Logits ``[B, 7, V]`` of tokens ``[B, 7]``: a prompt, then token by token, as it will be used."""
    cache = made.cache(len(tokens), 7)
    found = []
    for first, last in ((0, 5), (5, 6), (6, 7)):
        step = made.step(cache, torch.arange(first, last, device=made.device).expand(len(tokens), -1))
        found.append(made.logits(made.run(made.embed(tokens[:, first:last], step), 0, len(made), step)))
    return torch.cat(found, dim=1)


def decoder(model: nn.Module, tolerance: float = 1e-3) -> Decoder:
    """See a causal language model as a decoder, and check that nothing was missed.

    Args:
        model: of transformers' AutoModelForCausalLM, on any device.
        tolerance: largest difference allowed between its logits and ours on a short text, relative to the spread of the logits;
            128 times as much below float32.

    Raises:
        UnsupportedModel: something is missing, or the logits differ; the message says what or how far.
    """
    from offramp.backbones.transformers import register_attention

    register_attention(ATTENTION, cached_attention)
    made = Decoder(model)
    tokens = torch.arange(2 * 7, device=made.device).reshape(2, 7) % made.vocabulary
    with torch.no_grad(), evaluating(model):
        expected = model(tokens, use_cache=False).logits
        with trying(f"The blocks of {type(model).__name__} do not run one by one over a cache as those of known models do"):
            found = _by_blocks(made, tokens)
    more, advice = "does more than its blocks, norm and output layer", "It cannot be decoded here; its own `generate` can."
    check_logits(model, found, expected, tolerance, more, advice)
    return made
