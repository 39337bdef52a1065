"""Texts to numbers: tokenizers of transformers and tokenizers, and one made on the spot."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from offramp.cli.records import Texts, optional, reason
from offramp.core.errors import InvalidInput


def tokenizer(spec: str, max_length: int = 128) -> Texts:
    """A tokenizer from a folder or hub name of transformers, or from one ``tokenizer.json``.

    Args:
        spec: folder, hub name, or a file ending in ``.json``.
        max_length: texts are cut to this many tokens.

    Raises:
        InvalidInput: it cannot be loaded.
        MissingExtra: transformers or tokenizers is not installed.
    """
    if max_length < 1:
        raise InvalidInput(f"max_length must be at least 1, got {max_length}.")
    if spec.endswith(".json"):
        return _tokenizer_file(Path(spec), max_length)
    transformers = optional("transformers", "hf", f"The tokenizer {spec}")
    try:
        loaded = transformers.AutoTokenizer.from_pretrained(spec)
    except (OSError, ValueError, KeyError) as error:
        raise InvalidInput(f"No tokenizer could be loaded from {spec}: {reason(error)}") from error
    pad = loaded.pad_token_id if loaded.pad_token_id is not None else 0

    def tokenize(items: Sequence[Any]) -> Mapping[str, Sequence[Sequence[int]]]:
        pairs = bool(items) and isinstance(items[0], tuple)
        first = [i[0] for i in items] if pairs else list(items)
        encoded = loaded(first, [i[1] for i in items] if pairs else None, truncation=True, max_length=max_length)
        return {name: encoded[name] for name in encoded}

    return Texts(tokenize, {"input_ids": pad})


def _tokenizer_file(path: Path, max_length: int) -> Texts:
    module = optional("tokenizers", "hf", f"The tokenizer {path}")
    if not path.is_file():
        raise InvalidInput(f"No tokenizer file at {path}.")
    try:
        json.loads(path.read_text(encoding="utf-8"))
        loaded = module.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for a foreign file
        raise InvalidInput(f"{path} is not a tokenizer file: {error}") from error
    loaded.enable_truncation(max_length)
    loaded.no_padding()
    pad = next((i for i in (loaded.token_to_id(t) for t in ("[PAD]", "<pad>", "<|endoftext|>")) if i is not None), 0)

    def tokenize(items: Sequence[Any]) -> Mapping[str, Sequence[Sequence[int]]]:
        encoded = loaded.encode_batch(list(items))
        out = {"input_ids": [e.ids for e in encoded], "attention_mask": [e.attention_mask for e in encoded]}
        if items and isinstance(items[0], tuple):
            out["token_type_ids"] = [e.type_ids for e in encoded]
        return out

    return Texts(tokenize, {"input_ids": pad})


_WORD = re.compile(r"[a-z0-9']+|[^\sa-z0-9']")


def words(texts: Sequence[str], size: int = 8000, max_length: int = 64) -> Texts:
    """A tokenizer made on the spot: lower-cased words, the most frequent of ``texts``, up to ``size`` numbers in all.

    0 pads, 1 begins, 2 is unknown, 3 separates. Needs no package, which suits a model that is trained from scratch.
    """
    counts: dict[str, int] = {}
    for text in texts:
        for word in _WORD.findall(text.lower()):
            counts[word] = counts.get(word, 0) + 1
    ranked = sorted(counts, key=lambda w: (-counts[w], w))[: max(0, size - 4)]
    index = {word: i + 4 for i, word in enumerate(ranked)}

    def ids(item: Any) -> list[int]:
        parts = item if isinstance(item, tuple) else (item,)
        out = [1]
        for number, part in enumerate(parts):
            out += ([3] if number else []) + [index.get(w, 2) for w in _WORD.findall(part.lower())]
        return out[:max_length]

    def tokenize(items: Sequence[Any]) -> Mapping[str, Sequence[Sequence[int]]]:
        rows = [ids(item) for item in items]
        return {"input_ids": rows, "attention_mask": [[1] * len(r) for r in rows]}

    return Texts(tokenize, {"input_ids": 0})
