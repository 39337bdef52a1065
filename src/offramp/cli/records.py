"""Items as they were read: inputs, labels, class names, and how they form batches."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from offramp.core.errors import InvalidInput, MissingExtra


def optional(module: str, extra: str, purpose: str) -> Any:
    """Import an optional dependency.

    Raises:
        MissingExtra: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtra(module.partition(".")[0], extra, purpose) from error


def reason(error: Exception) -> str:
    """What another library's error says: its first line, and all others where that announces them with a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    said = " ".join(lines) if lines[0].endswith(":") else lines[0]
    return said if said.endswith((".", "!", "?")) else f"{said}."


@dataclass(frozen=True)
class Images:
    """How images become tensors ``[C, H, W]``.

    Attributes:
        size: height and width; ``None`` keeps the size (all must then agree).
        mean: subtracted per channel after scaling to [0, 1]; ``None`` = 0.
        std: divided by per channel; ``None`` = 1.
        channels: 1 or 3; ``None`` keeps what the data have (3 for image files).
        crop: share of the shorter side that is kept by a centre crop when resizing, in (0, 1]; the aspect ratio is kept. ``None``
            stretches to ``size``.
    """

    size: tuple[int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    channels: int | None = None
    crop: float | None = None

    def __post_init__(self) -> None:
        if self.std is not None and min(self.std) <= 0:
            raise InvalidInput(f"std must be positive, got {self.std}.")
        if self.crop is not None and not 0 < self.crop <= 1:
            raise InvalidInput(f"crop must lie in (0, 1], got {self.crop}.")

    def picture(self, image: Any) -> Tensor:
        """Tensor of a Pillow image."""
        modules = optional("PIL.Image", "timm", "Reading images")
        image = image.convert("L" if self.channels == 1 else "RGB")
        if self.size is not None:
            height, width = self.size
            if self.crop is not None:
                scale = max(height / image.height, width / image.width) / self.crop
                image = image.resize(
                    (max(width, round(image.width * scale)), max(height, round(image.height * scale))), modules.Resampling.BICUBIC
                )
                left, top = (image.width - width) // 2, (image.height - height) // 2
                image = image.crop((left, top, left + width, top + height))
            elif (image.height, image.width) != (height, width):
                image = image.resize((width, height), modules.Resampling.BICUBIC)
        array = np.asarray(image, dtype=np.uint8)
        return self.array(torch.from_numpy(array.copy()).reshape(array.shape[0], array.shape[1], -1).movedim(-1, 0))

    def array(self, image: Tensor) -> Tensor:
        """Tensor of an array ``[C, H, W]``: scaled, channels matched, resized, normalised."""
        out = image.float() / 255 if image.dtype == torch.uint8 else image.float()
        if self.channels == 3 and out.shape[0] == 1:
            out = out.expand(3, -1, -1)
        elif self.channels == 1 and out.shape[0] == 3:
            out = out.mean(0, keepdim=True)
        if self.size is not None and tuple(out.shape[1:]) != self.size:
            out = torch.nn.functional.interpolate(out[None], self.size, mode="bilinear", antialias=True, align_corners=False)[0]
        for given, name in ((self.mean, "mean"), (self.std, "std")):
            if given is not None and len(given) not in (1, out.shape[0]):
                raise InvalidInput(f"{name} has {len(given)} values for images with {out.shape[0]} channels.")
        if self.mean is not None:
            out = out - torch.tensor(self.mean).reshape(-1, 1, 1)
        if self.std is not None:
            out = out / torch.tensor(self.std).reshape(-1, 1, 1)
        return out.contiguous()


@dataclass(frozen=True)
class Texts:
    """How texts become tensors.

    Attributes:
        tokenize: list of texts, or of pairs, to a mapping of lists of integers per text (``input_ids`` and so on).
        pad: value that fills each of these up to the longest text of a batch, by name.
    """

    tokenize: Callable[[Sequence[Any]], Mapping[str, Sequence[Sequence[int]]]]
    pad: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Records(Dataset[tuple[Any, Tensor]]):
    """A data set as read: inputs by index, labels, class names.

    Attributes:
        kind: ``image``, ``array`` or ``text``.
        source: where it came from, for messages.
        fetch: row to input: a float tensor, or a mapping of integer tensors for text.
        raw: row to something a person can look at: a text, or a ``uint8`` image.
        rows: rows of the source that belong to this data set, in order.
        labels: class index of each of ``rows`` (int64), or ``None``.
        classes: names of the classes.
        pad: fill values of text.
    """

    kind: str
    source: str
    fetch: Callable[[int], Any]
    raw: Callable[[int], Any]
    rows: Tensor
    labels: Tensor | None
    classes: tuple[str, ...]
    pad: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return int(self.rows.numel())

    def __getitem__(self, index: int) -> tuple[Any, Tensor]:
        label = torch.tensor(-1) if self.labels is None else self.labels[index]
        return self.fetch(int(self.rows[index])), label

    def subset(self, keep: Tensor) -> Records:
        """The same for some positions (int64)."""
        return replace(self, rows=self.rows[keep], labels=None if self.labels is None else self.labels[keep])

    def part(self, start: float, stop: float, seed: int = 0) -> Records:
        """Items between two fractions of one fixed random order, so that ``0:0.6``, ``0.6:0.8`` and ``0.8:1`` do not overlap.

        Raises:
            InvalidInput: the fractions are not ``0 <= start < stop <= 1`` or the part is empty.
        """
        if not 0 <= start < stop <= 1:
            raise InvalidInput(f"A part is START:STOP with 0 <= START < STOP <= 1, got {start:g}:{stop:g}.")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        keep = order[round(start * len(self)) : round(stop * len(self))].sort().values
        if not keep.numel():
            raise InvalidInput(f"The part {start:g}:{stop:g} of {self.source} ({len(self)} items) is empty.")
        return self.subset(keep)

    def check_labels(self, num_outputs: int) -> None:
        """Compare the labels with the width of a model's answer.

        Raises:
            InvalidInput: a label is out of range; the error names the row.
        """
        if self.labels is None:
            return
        bad = torch.nonzero((self.labels < 0) | (self.labels >= num_outputs))
        if bad.numel():
            row = int(bad[0])
            raise InvalidInput(
                f"{self.source}: row {int(self.rows[row])} has label {int(self.labels[row])}, but the model answers with "
                f"{num_outputs} classes (0 to {num_outputs - 1}). Give the right --num-classes, or correct the label."
            )

    def collate(self, batch: Sequence[tuple[Any, Tensor]]) -> Any:
        """One batch: ``(inputs, labels)``, or the inputs alone where there are no labels."""
        inputs: Any = [item for item, _ in batch]
        if self.kind == "text":
            inputs = pad_batch(inputs, self.pad)
        else:
            shapes = {tuple(i.shape) for i in inputs}
            if len(shapes) > 1:
                raise InvalidInput(f"{self.source}: images of different sizes {sorted(shapes)[:4]} cannot form a batch. Give --image-size.")
            inputs = torch.stack(inputs)
        return inputs if self.labels is None else (inputs, torch.stack([label for _, label in batch]))

    def loader(self, batch_size: int, *, shuffle: bool = False, workers: int = 0) -> DataLoader[Any]:
        """Batches of this data set."""
        if batch_size < 1:
            raise InvalidInput(f"The batch size must be at least 1, got {batch_size}.")
        return DataLoader(self, batch_size, shuffle=shuffle, num_workers=workers, collate_fn=self.collate)

    def inputs(self, rows: int) -> Any:
        """A batch of the first rows' inputs, to shape a network by."""
        batch = self.collate([self[i] for i in range(min(rows, len(self)))])
        return batch if self.labels is None else batch[0]


def pad_batch(items: Sequence[Mapping[str, Tensor]], pad: Mapping[str, int]) -> dict[str, Tensor]:
    """Integer vectors of different lengths to ``[B, longest]`` per name."""
    longest = max(len(next(iter(i.values()))) for i in items)
    out = {}
    for name in items[0]:
        block = torch.full((len(items), longest), pad.get(name, 0), dtype=torch.long)
        for row, item in enumerate(items):
            block[row, : len(item[name])] = item[name]
        out[name] = block
    return out
