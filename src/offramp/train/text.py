"""Language models in the ordinary training loop: blocks of tokens, the loss of a text, and the model with its exits as a `MultiExit`.

An item is a text; its answer at an exit is the logits ``[T, V]`` of all its tokens, and its loss a mean over them. With that, every recipe
of `offramp.train.recipe` holds for language models as it is: ``Frozen(Distill(temperature=1, alpha=1))`` is the soft cross-entropy to the
full model by which Kangaroo, EESD and self-supervised early exits train what they add.

Shapes: ``N`` blocks, ``B`` texts, ``T`` tokens of each, ``V`` vocabulary, ``W`` width of the states.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from offramp.backbones import Taps
from offramp.core.errors import InvalidInput, MissingExtra
from offramp.core.whole import is_whole
from offramp.language import LanguageModel
from offramp.network import Example, Exit, MultiExit, answer

IGNORED = -100
"""Label of a token that is not counted, as in transformers."""


@dataclass(frozen=True)
class NextToken:
    """Cross-entropy of each token given those before it, averaged over a text's counted tokens.

    Labels are the tokens themselves (whole numbers ``[B, T]``), `IGNORED` where a token is not to be learned; they are shifted here.
    """

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        wanted = labels[:, 1:].long()
        losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), wanted.flatten(), ignore_index=IGNORED, reduction="none")
        counted = (wanted != IGNORED).sum(1).clamp(min=1)
        return losses.view(wanted.shape).sum(1) / counted

    def check(self, labels: Tensor, width: int) -> None:
        """Refuse labels that are not tokens of ``width`` kinds.

        Raises:
            InvalidInput: wrong shape or dtype, or an id outside the vocabulary.
        """
        if labels.ndim != 2 or not is_whole(labels) or labels.shape[1] < 2:
            raise InvalidInput(
                f"Labels of texts are token ids, whole numbers [B, T] with T >= 2; got {labels.dtype} of shape {tuple(labels.shape)}."
            )
        labels = labels.long()
        known = labels[labels != IGNORED]
        if known.numel() and (int(known.min()) < 0 or int(known.max()) >= width):
            raise InvalidInput(
                f"Token ids range over [{int(known.min())}, {int(known.max())}], but the model has {width} tokens. "
                "Tokenize with the tokenizer of this model."
            )

    def match(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """``T^2 KL(teacher || student)`` ``[B]``, averaged over the tokens; with temperature 1, soft cross-entropy up to a constant."""
        log_s = F.log_softmax(student.float() / temperature, dim=-1)
        log_t = F.log_softmax(teacher.float() / temperature, dim=-1)
        return temperature**2 * F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1).mean(1)


# ---- texts ---------------------------------------------------------------------------------------------------------------


def texts_in(folder: str | os.PathLike[str], column: str = "text") -> Iterator[str]:
    """Texts of a data set saved by Hugging Face datasets, or of the ``.txt`` files in a folder, by name. No network.

    Raises:
        InvalidInput: there is neither, or no such column.
        MissingExtra: it is a saved data set, and datasets is not installed.
    """
    root = Path(folder)
    if (root / "state.json").is_file():
        try:
            from datasets import load_from_disk  # type: ignore[import-untyped]
        except ImportError as error:
            raise MissingExtra("datasets", "data", "Reading a saved data set") from error
        table: Any = load_from_disk(str(root))
        if column not in getattr(table, "column_names", ()):
            raise InvalidInput(f"The data set in {root} has no column {column!r}; it has {table.column_names}.")
        for row in table:
            yield str(row[column])
        return
    files = sorted(root.glob("*.txt"))
    if not files:
        raise InvalidInput(f"{root} holds neither a saved data set (state.json) nor .txt files.")
    for file in files:
        yield file.read_text(encoding="utf-8")


def packed(
    texts: Iterable[str | Sequence[int]] | str | os.PathLike[str],
    tokenizer: Callable[[str], Any] | None,
    block: int,
    *,
    end: int | None = None,
) -> Tensor:
    """Texts one after another, an end token after each, cut into blocks of equal length; what does not fill the last one is dropped.

    Args:
        texts: strings or token ids, or a folder for `texts_in`.
        tokenizer: of transformers, or any function from a string to token ids; ``None`` where all texts are token ids.
        block: tokens of a block ``T``, at least 2.
        end: id put after each text; the tokenizer's ``eos_token_id`` by default, if it has one.

    Returns:
        int64 ``[N, T]``.

    Raises:
        InvalidInput: there is less text than one block, or a string and no tokenizer.
    """
    if block < 2:
        raise InvalidInput(f"A block needs at least 2 tokens, one to learn from and one to learn; got {block}.")
    if isinstance(texts, str | os.PathLike):
        texts = texts_in(texts)
    ending = end if end is not None else getattr(tokenizer, "eos_token_id", None)
    parts: list[Tensor] = []
    for text in texts:
        if isinstance(text, str):
            if tokenizer is None:
                raise InvalidInput("A text is a string, but no tokenizer was given. Give the tokenizer of the model, or token ids.")
            found = tokenizer(text)
            ids = found["input_ids"] if hasattr(found, "keys") else found
        else:
            ids = text
        parts.append(torch.as_tensor(ids, dtype=torch.int64).flatten())
        if ending is not None:
            parts.append(torch.tensor([ending]))
    stream = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)
    count = len(stream) // block
    if count == 0:
        raise InvalidInput(f"The texts hold {len(stream)} tokens, fewer than one block of {block}. Give more text or a smaller block.")
    return stream[: count * block].view(count, block)


class _Blocks(Dataset[dict[str, Tensor]]):
    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def text_loader(blocks: Tensor, batch_size: int, *, shuffle: bool = True) -> DataLoader[dict[str, Tensor]]:
    """A loader of blocks (whole numbers ``[N, T]``, as `packed` gives them) for `fit`: inputs and labels are the same tokens.

    Raises:
        InvalidInput: the blocks are no whole numbers, or of another shape.
    """
    if blocks.ndim != 2 or not is_whole(blocks):
        raise InvalidInput(f"Blocks of tokens are whole numbers [blocks, tokens], got {blocks.dtype} of shape {tuple(blocks.shape)}.")
    return DataLoader(_Blocks(blocks.long()), batch_size=batch_size, shuffle=shuffle)


# ---- the model -----------------------------------------------------------------------------------------------------------


class _Taught(nn.Module):
    """An exit of a language model as a head of `MultiExit`: whole texts in one pass."""

    def __init__(self, lm: LanguageModel, index: int) -> None:
        super().__init__()
        self.head = lm.heads[index]
        self._lm, self.index = (lm,), index

    def forward(self, hidden: Tensor, previous: Sequence[Tensor]) -> Tensor:
        return self._lm[0].teach(hidden, self.index)


class TextNet(MultiExit):
    """A language model with exits as the training loop sees it: one ordinary forward of the untouched model, tapped after blocks.

    Training it trains the heads of ``lm`` (and its model, if the recipe does).

    Attributes:
        blocks: module path of every block, in order.
        depths: after how many blocks each exit reads.
        watched: module paths whose states `forward_with_states` returns; those of the exits unless a recipe asks for more.
    """

    def __init__(self, lm: LanguageModel) -> None:
        self.blocks = lm.block_paths
        self.depths = lm.exits
        at = [self.blocks[depth - 1] for depth in lm.exits]
        width = lm.decoder.width
        exits = [Exit(path, None, (-1, width), 0) for path in at]
        tokens = {"input_ids": torch.zeros(2, 2, dtype=torch.int64), "use_cache": False}
        super().__init__(lm.model, exits, [_Taught(lm, k) for k in range(len(at))], Example((), tokens), answer, None)
        self._num_outputs = lm.decoder.vocabulary
        self.watched: tuple[str, ...] = self.at

    def forward_with_states(self, *args: Any, **kwargs: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Answers ``[B, T, V]`` of every exit and of the model, and the states ``[B, T, W]`` of the `watched` blocks."""
        if self.watched == self.at:
            return super().forward_with_states(*args, **{"use_cache": False} | kwargs)
        with Taps(self.model, self.watched, self.state_transform) as taps:
            final = self.select(self.model(*args, **{"use_cache": False} | kwargs))
            states = dict(zip(self.watched, taps.states, strict=True))
        return (*self.read([states[path] for path in self.at]), final), tuple(states.values())


__all__ = ["IGNORED", "NextToken", "TextNet", "packed", "text_loader", "texts_in"]
