"""What `generate` is given, in the names of transformers' ``generate``: prompts in any usual form, and settings with their defaults.

A setting comes from the argument, else from ``generation_config``, else from the model's own generation configuration, else from the
default of transformers, in that order. Settings that transformers has and that are not known here are refused by name wherever they would
change the text, so that nothing is silently written otherwise than its user asked for.
"""

from __future__ import annotations

import difflib
import numbers
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from offramp.core.errors import InvalidInput
from offramp.engines.text.sampling import Sampling

_DEFAULTS: dict[str, Any] = {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0}
_NEW_TOKENS = 20
_LEAST: dict[str, int] = {"max_new_tokens": 1, "max_length": 1, "top_k": 0, "pad_token_id": 0}
"""The least that may be given for settings that are whole numbers."""

_CHANGE_THE_TEXT: dict[str, Any] = {
    # setting: value that changes nothing, besides None, False and what is empty
    "num_beams": 1,
    "num_return_sequences": 1,
    "min_length": 0,
    "min_new_tokens": 0,
    "max_time": None,
    "min_p": 0.0,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "renormalize_logits": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "remove_invalid_values": None,
    "exponential_decay_length_penalty": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "sequence_bias": None,
    "token_healing": None,
    "guidance_scale": 1.0,
    "watermarking_config": None,
    "penalty_alpha": None,
    "dola_layers": None,
    "constraints": None,
    "force_words_ids": None,
}
_DRAFTING = ("assistant_model", "assistant_early_exit", "assistant_tokenizer", "prompt_lookup_num_tokens", "use_mtp")
_DRAFTS = "drafts of an exit, verified, are written by offramp.compile(lm, Verify(...)).generate(...)"
_OTHERS: dict[str, Any] = {
    # arguments that are refused where given, unless they have the value that changes nothing
    **dict.fromkeys(_DRAFTING),
    "use_cache": True,
    "cache_implementation": None,
    "past_key_values": None,
    "position_ids": None,
    "inputs_embeds": None,
    "logits_processor": None,
    "stopping_criteria": None,
    "prefix_allowed_tokens_fn": None,
    "synced_gpus": None,
    "custom_generate": None,
    "negative_prompt_ids": None,
    "negative_prompt_attention_mask": None,
    "output_scores": None,
    "output_logits": None,
    "output_attentions": None,
    "output_hidden_states": None,
    "return_dict_in_generate": None,
    "early_stopping": None,
    "length_penalty": 1.0,
    "diversity_penalty": 0.0,
    "num_beam_groups": 1,
    "compile_config": None,
    "disable_compile": None,
    "prefill_chunk_size": None,
}
_HINTS = {
    "num_return_sequences": "give each prompt as often as it is to be continued, prompts=[prompt] * n: rows draw with seeds of their own"
}
_KNOWN = (
    "input_ids",
    "attention_mask",
    "tokenizer",
    "max_new_tokens",
    "max_length",
    "eos_token_id",
    "pad_token_id",
    "stop_strings",
    "stop",
    "streamer",
    "generation_config",
    "seed",
    *_DEFAULTS,
)
_SETTINGS = ("max_new_tokens", "max_length", "eos_token_id", "pad_token_id", "stop_strings", *_DEFAULTS)
"""Settings that a generation configuration may have and that are followed here."""


@dataclass(frozen=True)
class Settings:
    """What holds for a call.

    Attributes:
        sampling: what is chosen.
        ends: token ids that end a row.
        pad: token id that fills, if there is one.
        stop_strings: texts that end a row.
        max_new_tokens: most tokens to add, if that was said.
        max_length: most tokens with the longest prompt, if that was said.
    """

    sampling: Sampling
    ends: tuple[int, ...]
    pad: int | None
    stop_strings: tuple[str, ...]
    max_new_tokens: int | None
    max_length: int | None

    @property
    def filling(self) -> int:
        """The token id that fills: the padding, else the first end, else 0."""
        return self.pad if self.pad is not None else self.ends[0] if self.ends else 0

    def new_tokens(self, longest: int, most: int | None) -> int:
        """Most tokens to add.

        Args:
            longest: tokens of the longest prompt.
            most: tokens that the model's positions allow; bounds only what nobody asked for.
        """
        if most is not None and longest > most:
            raise InvalidInput(
                f"The longest prompt has {longest} tokens, more than the {most} positions that the model has. Shorten the prompt: what is "
                "to be added comes behind it."
            )
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        if self.max_length is None:
            return _NEW_TOKENS if most is None else max(1, min(_NEW_TOKENS, most - longest))
        if self.max_length <= longest:
            raise InvalidInput(
                f"max_length is {self.max_length} and the longest prompt has {longest} tokens already; give max_new_tokens, which does not "
                "count the prompt."
            )
        return self.max_length - longest


def settings(model: Any, given: Mapping[str, Any], others: Mapping[str, Any], config: Any = None) -> Settings:
    """The settings of a call.

    Args:
        model: has a ``generation_config``, or none.
        given: arguments that are known here; ``None`` = not given.
        others: arguments that are not.
        config: a generation configuration that goes before the model's: one of transformers, or its settings as a mapping.

    Raises:
        InvalidInput: an argument is unknown, or known to transformers only, or out of range, or the configuration is none.
    """
    config = _configuration(config)
    sources = [c for c in (config, getattr(model, "generation_config", None)) if c is not None]
    _refuse(others, sources)

    def find(name: str, default: Any = None) -> Any:
        found = [given.get(name), *(getattr(c, name, None) for c in sources)]
        return next((value for value in found if value is not None), default)

    _in_range(given)
    pad, stops = find("pad_token_id"), find("stop_strings", ())
    total = given.get("max_length")  # goes before a number of new tokens that is a default
    return Settings(
        Sampling(**{name: find(name, default) for name, default in _DEFAULTS.items()}),
        _ends(find("eos_token_id")),
        int(pad) if pad is not None else None,
        _stops(stops),
        given.get("max_new_tokens") if total is not None else find("max_new_tokens"),
        find("max_length"),
    )


def _configuration(config: Any) -> Any:
    """A generation configuration as an object with settings as attributes.

    Raises:
        InvalidInput: it is none, or a mapping with a setting that is not known.
    """
    if config is None:
        return None
    if isinstance(config, Mapping):
        wrong = [k for k in config if not isinstance(k, str)]
        if wrong:
            raise InvalidInput(f"generation_config has a setting {wrong[0]!r}; settings have names.")
        # A whole configuration written as a mapping also says where it is from, and has settings that are not set.
        told = {k: v for k, v in config.items() if v is not None and not k.startswith("_") and k != "transformers_version"}
        _refuse({k: v for k, v in told.items() if k not in _SETTINGS}, [])
        _in_range(told)
        return SimpleNamespace(**told)
    if isinstance(config, type) or not any(hasattr(config, name) for name in _SETTINGS):
        raise InvalidInput(
            "generation_config is a GenerationConfig of transformers or a mapping of its settings, such as {'max_new_tokens': 50}; got "
            f"{_short(config)}."
        )
    return config


def _in_range(given: Mapping[str, Any]) -> None:
    for name, least in _LEAST.items():
        value = given.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, numbers.Integral) or int(value) < least):
            raise InvalidInput(f"{name} must be a whole number, at least {least}, got {value!r}.")


def one_stop(stop_strings: Any, stop: Any) -> Any:
    """The texts that end a row, which have two names.

    Raises:
        InvalidInput: both were given.
    """
    if stop is not None and stop_strings is not None:
        raise InvalidInput("stop is another name of stop_strings; give one of them.")
    return stop_strings if stop is None else stop


def seeds_of(seed: Any, rows: int) -> list[int]:
    """A seed for each of so many rows, of one that is counted up from or one for each; of none, drawn from PyTorch's own generator.

    Raises:
        InvalidInput: neither, or too large for a generator.
    """
    if seed is None:  # as transformers draws: another text at every call, the same again after torch.manual_seed
        return torch.randint(2**62, (rows,)).tolist()
    single = isinstance(seed, int) and not isinstance(seed, bool)
    found = list(range(seed, seed + rows)) if single else list(seed) if isinstance(seed, Sequence) else []
    if len(found) != rows or not all(isinstance(s, int) and -(2**63) <= s < 2**63 for s in found):
        raise InvalidInput(
            f"seed must be a whole number of 64 bits, one for each of the {rows} prompts, or None to draw other texts at every call; got "
            f"{seed!r}."
        )
    return found


def _ends(given: Any) -> tuple[int, ...]:
    if given is None:
        return ()
    found = given.flatten().tolist() if isinstance(given, Tensor) else given if isinstance(given, Sequence) else [given]
    if not all(isinstance(e, numbers.Integral) for e in found):
        raise InvalidInput(f"eos_token_id must be a token id or a list of them, got {given!r}.")
    return tuple(int(e) for e in found)


def _stops(given: Any) -> tuple[str, ...]:
    found = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, Sequence) else (given,)
    if not all(isinstance(t, str) and t for t in found):
        raise InvalidInput(f"stop_strings must be texts that are not empty, got {given!r}.")
    return found


def _refuse(others: Mapping[str, Any], sources: Sequence[Any]) -> None:
    for name, value in others.items():
        known = {**_CHANGE_THE_TEXT, **_OTHERS}
        if name not in known:
            close = difflib.get_close_matches(name, [*_KNOWN, *known], n=3)
            hint = f" Did you mean {' or '.join(close)}?" if close else f" Known are {', '.join(_KNOWN)}."
            raise InvalidInput(f"generate has no argument {name!r}.{hint}")
        if not _neutral(value, known[name]):
            hint = _DRAFTS if name in _DRAFTING else _HINTS.get(name, "the model's own generate has it")
            raise InvalidInput(f"{name}={_short(value)} is known to transformers and not supported by generate of offramp; {hint}.")
    for source in sources:
        for name, nothing in _CHANGE_THE_TEXT.items():
            value = getattr(source, name, None)
            if name not in others and not _neutral(value, nothing):
                raise InvalidInput(
                    f"The generation configuration asks for {name}={_short(value)}, which generate of offramp does not support. "
                    f"Give {name}=None to write without it, or change the configuration."
                )


def _neutral(value: Any, nothing: Any) -> bool:
    if value is None or value is False or (isinstance(value, list | tuple | dict) and not value):
        return True
    return nothing is not None and isinstance(value, int | float) and value == nothing


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{type(value).__name__}(...)"


def token_ids(
    prompts: Any, attention_mask: Any = None, tokenizer: Any = None, pad: int | None = None, ends: Sequence[int] = ()
) -> list[list[int]]:
    """Prompts as token ids, one list a row.

    Args:
        prompts: lists of ids; a tensor or an array of ids ``[B, P]`` or ``[P]``; a text or texts; or what a tokenizer answers.
        attention_mask: ``[B, P]``, 0 where a tensor is padded, on the left or on the right.
        tokenizer: of transformers, for texts.
        pad: id of padding. Without a mask, a tensor's rows are padded where they begin with it, unless it is also an end (transformers
            guesses the mask in the same way).
        ends: ids that end a text.

    Raises:
        InvalidInput: none of these, or padding in the middle.
    """
    if isinstance(prompts, Mapping) or hasattr(prompts, "input_ids"):
        mask = prompts["attention_mask"] if attention_mask is None and "attention_mask" in prompts else attention_mask
        return token_ids(prompts["input_ids"], mask, tokenizer, pad, ends)
    if isinstance(prompts, str):
        prompts = [prompts]
    if hasattr(prompts, "__array__") and not isinstance(prompts, Tensor):
        prompts = torch.as_tensor(prompts)
    if isinstance(prompts, Tensor):
        return _from_tensor(prompts, attention_mask, pad, ends)
    if not isinstance(prompts, Sequence) or not len(prompts):
        raise InvalidInput(
            f"prompts must be texts, lists of token ids or a tensor of them, got {type(prompts).__name__}, {_short(prompts)}."
        )
    if all(isinstance(p, str) for p in prompts):
        if tokenizer is None:
            raise InvalidInput("Texts need a tokenizer: give tokenizer=AutoTokenizer.from_pretrained(...), or token ids.")
        return [[int(i) for i in tokenizer(text)["input_ids"]] for text in prompts]
    rows = [prompts] if all(isinstance(p, numbers.Integral) for p in prompts) else prompts
    if not all(isinstance(row, Sequence | Tensor) and not isinstance(row, str) for row in rows):
        raise InvalidInput("prompts must be all texts or all lists of token ids; got a mixture.")
    masks = [None] * len(rows) if attention_mask is None else attention_mask if rows is prompts else [attention_mask]
    if len(masks) != len(rows):
        raise InvalidInput(f"attention_mask has {len(masks)} rows, the token ids {len(rows)}; they must be as many.")
    return [_from_row(row, mask, pad, ends) for row, mask in zip(rows, masks, strict=True)]


def _from_row(row: Any, mask: Any, pad: int | None, ends: Sequence[int]) -> list[int]:
    """One row of a list: as it is, or, with a mask, without its padding. Rows of a list may have any lengths, masked or not."""
    try:
        ids = [operator.index(i) for i in (row.tolist() if isinstance(row, Tensor) else row)]
    except TypeError as error:
        raise InvalidInput(f"Token ids are whole numbers, got {_short(row)}.") from error
    return ids if mask is None else _from_tensor(torch.tensor(ids, dtype=torch.int64), mask, pad, ends)[0]


def _from_tensor(ids: Tensor, mask: Any, pad: int | None, ends: Sequence[int]) -> list[list[int]]:
    ids = ids[None] if ids.dim() == 1 else ids
    if ids.dim() != 2 or ids.is_floating_point():
        raise InvalidInput(f"Token ids are whole numbers [rows, tokens], got {ids.dtype} of shape {tuple(ids.shape)}.")
    if mask is None:
        guess = pad is not None and pad not in ends and bool((ids == pad).any())
        mask = (ids != pad) if guess else torch.ones_like(ids)
    mask = torch.as_tensor(mask).to(ids.device)
    mask = (mask[None] if mask.dim() == 1 else mask).bool()
    if mask.shape != ids.shape:
        raise InvalidInput(f"attention_mask has shape {tuple(mask.shape)}, the token ids {tuple(ids.shape)}; they must be the same.")
    rows = []
    for row, (tokens, kept) in enumerate(zip(ids.tolist(), mask.tolist(), strict=True)):
        if True in kept:
            first, last = kept.index(True), len(kept) - kept[::-1].index(True)
            if not all(kept[first:last]):
                raise InvalidInput(f"attention_mask of row {row} has zeros in the middle; padding belongs on the left or on the right.")
            rows.append(tokens[first:last])
        else:
            rows.append([])
    return rows


class StopStrings:
    """Says whether the newest token of a row completes one of some texts, as transformers' ``stop_strings`` do.

    A text may begin in the prompt and end within a token; it must end in the newest one.

    Args:
        tokenizer: of transformers.
        texts: at least one, none empty.
    """

    def __init__(self, tokenizer: Any, texts: Sequence[str]) -> None:
        if tokenizer is None:
            raise InvalidInput("stop_strings need the tokenizer: give tokenizer=AutoTokenizer.from_pretrained(...).")
        self.tokenizer, self.texts = tokenizer, _stops(texts)
        self.tail = 8 + 4 * max(map(len, self.texts))  # a character has at most four tokens (bytes), a special token no character

    def __call__(self, tokens: Sequence[int]) -> bool:
        """Whether the last of ``tokens`` completes a text."""
        tail = list(tokens[-self.tail :])
        text, before = self._text(tail), self._text(tail[:-1])
        for stop in self.texts:
            at = text.rfind(stop)
            if at >= 0 and at + len(stop) > len(before):
                return True
        return False

    def _text(self, tokens: list[int]) -> str:
        decoded: str = self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return decoded.rstrip("\ufffd")  # what is not yet a character
