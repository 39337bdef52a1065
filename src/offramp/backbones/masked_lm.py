"""Masked language models as resumable execution: a bidirectional transformer, block by block, over a cache of its own.

A masked-diffusion model such as LLaDA or Dream is a transformer of the Llama or Qwen family run without the causal mask; BERT and RoBERTa
are bidirectional by themselves. Either is seen through copies that share every parameter and whose attention is ours, as in
`offramp.backbones.decoder`. Keys and values of every position are kept, so that a call computes some positions only and lets them look at
all others as they were when those were last computed. That is exact for the first block and stale behind it: which positions are computed
again, and when, is for a rule to say (`offramp.policies.refresh`).

The user's own forward is made bidirectional by giving it a 4-D attention mask of zeros, which transformers takes as it is in place of the
causal one; `bidirectional` does it. That is what ours is compared with before it is used.

LLaDA's released checkpoints come with code of their own, whose module names are not transformers'; their weights are those of a Llama.

Shapes: ``B`` rows of the cache, ``R`` of them in one call, ``Q`` positions of a row in one call, ``T`` positions of a text, ``H`` heads,
``G`` key heads, ``D`` their width, ``W`` width of the states, ``V`` vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from offramp.backbones.attention import masked_attention
from offramp.backbones.decoder import Decoder, Step, _seen_through
from offramp.backbones.kv import KVCache
from offramp.backbones.state_cache import StateCache
from offramp.backbones.tried import check_logits, trying
from offramp.core.errors import InvalidInput, UnsupportedModel
from offramp.core.modes import evaluating

ATTENTION = "offramp_bidirectional"
"""Name of our attention function among those of transformers."""


@dataclass(frozen=True)
class Look:
    """A block's attention, to be looked at while it runs.

    Attributes:
        query: ``[R, H, Q, D]`` of the positions that are computed.
        key: ``[R, G, T, D]`` of all.
        mask: bool ``[R, 1, 1, T]`` or `None`.
        scaling: of the products; ``1 / sqrt(D)`` by default.
        softcap: see `offramp.backbones.attention.masked_attention`.
    """

    query: Tensor
    key: Tensor
    mask: Tensor | None = None
    scaling: float | None = None
    softcap: float | None = None

    def queries(self, places: Tensor) -> Tensor:
        """Those ``[R, H, A, D]`` at some places (int64 ``[R, A]``) among the positions that are computed."""
        return self.query.gather(2, places[:, None, :, None].expand(-1, self.query.shape[1], -1, self.query.shape[3]))

    def rows(self, queries: Tensor) -> Tensor:
        """What queries ``[R, H, A, D]``, of this call or kept from another, attend to: averaged over heads, float32 ``[R, A, T]``.

        One product of ``A`` queries with the keys, ``2 A H D T`` FLOPs: the whole map is never made.
        """
        rows, heads, _, width = queries.shape
        groups, length = self.key.shape[1], self.key.shape[2]
        grouped = queries.reshape(rows, groups, -1, width)  # heads of a group, one after another, share its keys
        scores = (grouped @ self.key.transpose(2, 3)).view(rows, heads, -1, length).float()
        scores = scores * (self.scaling if self.scaling is not None else width**-0.5)
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if self.mask is not None:
            scores = scores.masked_fill(~self.mask, float("-inf"))
        return scores.softmax(-1).mean(1)


@dataclass
class Call:
    """One call of blocks: which positions of which rows.

    Attributes:
        cache: what is known of all positions.
        rows: int64 ``[R]``, which rows of the cache, ascending if they are all.
        positions: int64 ``[R, Q]``, 0-based.
        slots: int64 ``[R, Q]`` where results are put: the positions, or ``cache.nowhere`` for those that do not count; `None` = the call
            computes every position, in order.
        mask: bool ``[R, 1, 1, T]``, which positions are part of each text; `None` = all are.
        watch: is shown the attention of each block that runs.
        rotary: what the blocks are given to rotate by.
    """

    cache: StateCache
    rows: Tensor
    positions: Tensor
    slots: Tensor | None = None
    mask: Tensor | None = None
    watch: Callable[[Look], None] | None = None
    rotary: Step = field(init=False)

    def __post_init__(self) -> None:
        self.rotary = Step(KVCache(1, 1, 1), self.positions, self.positions, 1)  # of which the positions alone are read


def bidirectional_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    offramp_call: Call | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What blocks call for attention: new positions ``[R, H, Q, D]`` over all positions of their texts. Returns ``[R, Q, H, D]``."""
    mask = attention_mask
    if offramp_call is not None:
        call = offramp_call
        key, value = call.cache.exchange(module.layer_idx, call.rows, call.slots, key, value)
        mask = call.mask
        if call.watch is not None:
            call.watch(Look(query, key, mask, scaling, softcap))
    return masked_attention(query, key, value, mask, scaling, softcap).transpose(1, 2).contiguous(), None


# ---- the two kinds of trunk ----------------------------------------------------------------------------------------------


class _CausalTrunk(Decoder):
    """A causal language model of transformers, its blocks run without the causal mask."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        if any(w is not None for w in self.windows):
            raise UnsupportedModel(
                f"{type(model).__name__} has blocks that see a sliding window; a masked language model here sees its whole text in every "
                "block. Switch the window off in its configuration."
            )
        self.paths = [_attention_path(model, block) for block in self.blocks]

    def states(self, tokens: Tensor, call: Call) -> Tensor:
        return self.embed(tokens, call.rotary)

    def given(self, index: int, hidden: Tensor, call: Call) -> dict[str, Any]:
        given: dict[str, Any] = {"position_ids": call.positions}
        if self._rotary is not None:
            given["position_embeddings"] = self._rotation(hidden, call.rotary, self._kinds[index])
        return given

    def head_flops(self) -> int:
        return 2 * self.width * self.vocabulary


class _EncoderTrunk:
    """A BERT-like masked language model: embeddings, an encoder of blocks, a head."""

    def __init__(self, model: Any) -> None:
        self.model: Any = model
        self.trunk: Any = model.base_model
        blocks = getattr(getattr(self.trunk, "encoder", None), "layer", None)
        head = getattr(model, "cls", None) or getattr(model, "lm_head", None)
        if not isinstance(blocks, nn.ModuleList) or not len(blocks) or head is None or not hasattr(self.trunk, "embeddings"):
            raise UnsupportedModel(
                f"{type(model).__name__} is no masked language model that is known here: neither a causal language model of transformers, "
                "to be run without its causal mask, nor one with `embeddings`, `encoder.layer` and a head named `cls` or `lm_head`, as "
                "BERT and RoBERTa have them."
            )
        config = model.config
        self.blocks, self._head = list(blocks), head
        self.paths = [_attention_path(model, block) for block in blocks]
        offset = getattr(self.trunk.embeddings, "padding_idx", None)  # RoBERTa counts positions from behind it
        self._offset = 0 if offset is None else int(offset) + 1
        self.vocabulary, self.width = int(config.vocab_size), int(config.hidden_size)
        self.head_width = self.width // int(config.num_attention_heads)
        self.max_positions: int | None = int(config.max_position_embeddings) - self._offset

    def states(self, tokens: Tensor, call: Call) -> Tensor:
        found: Tensor = self.trunk.embeddings(
            input_ids=tokens, position_ids=call.positions + self._offset, token_type_ids=torch.zeros_like(tokens)
        )
        return found

    def given(self, index: int, hidden: Tensor, call: Call) -> dict[str, Any]:
        return {}

    def logits(self, hidden: Tensor) -> Tensor:
        found: Tensor = self._head(hidden)
        return found

    def head_flops(self) -> int:
        return 2 * (self.width**2 + self.width * self.vocabulary)


def _attention_path(model: Any, block: nn.Module) -> list[str]:
    """Where in a block its attention is: the one module that reads a configuration and knows its block's number."""
    found = [n for n, m in block.named_modules() if n and hasattr(m, "config") and getattr(m, "layer_idx", None) is not None]
    if len(found) != 1:
        raise UnsupportedModel(
            f"A block of {type(model).__name__} has {len(found)} modules that read `config` and know their `layer_idx`, where its "
            "attention should be the only one, so that its cache cannot be ours."
        )
    return found[0].split(".")


def _viewed(module: Any, path: list[str], config: Any) -> Any:
    if not path:
        return _seen_through(module, config=config)
    return _seen_through(module, **{path[0]: _viewed(getattr(module, path[0]), path[1:], config)})


# ---- the model -----------------------------------------------------------------------------------------------------------


class MaskedLM:
    """A masked language model, block by block. Made by `masked_lm`.

    Attributes:
        model: the user's model, untouched.
        mask_token_id: stands where a token is to be filled in; never an answer.
        blocks: its blocks, seen through copies.
        vocabulary: size of the output.
        width: of the states.
        max_positions: most positions of a text, or `None` where nothing bounds them.
    """

    def __init__(self, model: Any, mask_token_id: int) -> None:
        self.model, self.mask_token_id = model, mask_token_id
        config = getattr(model, "config", None)
        if config is None or not hasattr(model, "get_input_embeddings"):
            raise UnsupportedModel(f"{type(model).__name__} is not a language model of transformers: it has no `config` or no embeddings.")
        bert = hasattr(getattr(model, "base_model", None), "encoder")
        self._trunk: _CausalTrunk | _EncoderTrunk = _EncoderTrunk(model) if bert else _CausalTrunk(model)
        ours = copy.copy(config)
        ours._attn_implementation_internal = ATTENTION
        self.blocks = [_viewed(block, path, ours) for block, path in zip(self._trunk.blocks, self._trunk.paths, strict=True)]
        self.vocabulary, self.width, self.max_positions = self._trunk.vocabulary, self._trunk.width, self._trunk.max_positions
        self.heads, self.head_width = int(config.num_attention_heads), self._trunk.head_width
        if not 0 <= mask_token_id < self.vocabulary:
            raise InvalidInput(f"mask_token_id must be a token, from 0 to {self.vocabulary - 1}, got {mask_token_id}.")

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def embed(self, tokens: Tensor, call: Call) -> Tensor:
        """States ``[R, Q, W]`` before the first block, of the tokens (int64 ``[R, Q]``) at a call's positions."""
        return self._trunk.states(tokens, call)

    def run(self, hidden: Tensor, index: int, call: Call) -> Tensor:
        """States ``[R, Q, W]`` after block ``index``; what the cache knows of these positions is then new."""
        call.cache.keep(index, call.rows, call.slots, hidden)
        given = self._trunk.given(index, hidden, call)
        after = self.blocks[index](hidden, attention_mask=None, offramp_call=call, **given)
        found: Tensor = after[0] if isinstance(after, tuple) else after
        return found

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits ``[..., V]`` of the states after the last block."""
        return self._trunk.logits(hidden)

    def block_flops(self, length: int) -> int:
        """FLOPs of one position in one block, looking at ``length`` positions."""
        matrices = sum(p.numel() for p in self.blocks[0].parameters() if p.dim() == 2)
        return 2 * matrices + 4 * self.heads * self.head_width * length

    def look_flops(self, length: int) -> int:
        """FLOPs of one row of attention over ``length`` positions, values left out: see `Look.rows`."""
        return 2 * self.heads * self.head_width * length

    def head_flops(self) -> int:
        """FLOPs of one position's logits."""
        return self._trunk.head_flops()


def bidirectional(model: Any, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits ``[B, T, V]`` of the user's own forward, every position seeing every other; gradients flow.

    Args:
        model: a causal or masked language model of transformers.
        tokens: int64 ``[B, T]``.
        mask: bool ``[B, T]``, which positions are part of each text; all by default.
    """
    rows, length = tokens.shape
    dtype = next(model.parameters()).dtype
    seen = torch.zeros(rows, 1, length, length, dtype=dtype, device=tokens.device)
    if mask is not None:
        seen = seen.masked_fill(~mask[:, None, None, :], torch.finfo(dtype).min)
    logits: Tensor = model(input_ids=tokens, attention_mask=seen).logits
    return logits


def masked_lm(model: nn.Module, mask_token_id: int | None = None, tolerance: float = 1e-3) -> MaskedLM:
    """See a language model as one that fills in masks, and check that nothing was missed.

    Args:
        model: trained to fill in masks: a causal language model of transformers in its architecture, run without the causal mask (Llama
            and Qwen families; others whose blocks see all before them), or one like BERT.
        mask_token_id: which token is the mask; by default what the configuration says.
        tolerance: largest difference allowed between its logits in bidirectional mode (see `bidirectional`) and ours on a short text,
            relative to the spread of the logits; 128 times as much below float32.

    Raises:
        UnsupportedModel: something is missing, or the logits differ; the message says what or how far.
        InvalidInput: no mask token is known.
    """
    from offramp.backbones.transformers import register_attention

    register_attention(ATTENTION, bidirectional_attention)
    token = mask_token_id if mask_token_id is not None else getattr(getattr(model, "config", None), "mask_token_id", None)
    if token is None:
        raise InvalidInput(f"The configuration of {type(model).__name__} names no mask token; give mask_token_id.")
    made = MaskedLM(model, int(token))
    tokens = 5 + torch.arange(2 * 7, device=made.device).reshape(2, 7)  # behind the special tokens, which some models place apart
    tokens = tokens % made.vocabulary
    sees_all = "with a 4-D attention mask (attn_implementation 'sdpa' and 'eager' take one)"
    fails = f"{type(model).__name__} does not run block by block, or not {sees_all}"
    with torch.no_grad(), evaluating(model), trying(fails):
        expected = bidirectional(model, tokens)
        found = _in_pieces(made, tokens)
    more = "does more than its blocks and output layer, or does not heed a 4-D attention mask"
    check_logits(model, found, expected, tolerance, more)
    return made


def _in_pieces(made: MaskedLM, tokens: Tensor) -> Tensor:
    """Logits ``[B, T, V]``: every position once, then some of them again over the cache, as it will be used."""
    rows, length = torch.arange(len(tokens), device=tokens.device), tokens.shape[1]
    cache = StateCache(len(made), *tokens.shape)
    found = []
    for picked in (slice(None), slice(2, length, 2)):
        positions = torch.arange(length, device=tokens.device)[picked].expand(len(tokens), -1)
        call = Call(cache, rows, positions, None if picked == slice(None) else positions)
        hidden = made.embed(tokens[:, picked], call)
        for k in range(len(made)):
            hidden = made.run(hidden, k, call)
        found.append(made.logits(hidden))
    found[0][:, 2:length:2] = found[1]
    return found[0]


__all__ = ["Call", "Look", "MaskedLM", "bidirectional", "masked_lm"]
