"""Reading labelled data: image folders, arrays, tables of text and saved data sets.

What can be given as a data spec:

=============================================  ==================================================================================
``folder/``                                    images in class sub-folders (``folder/cat/1.png``), or with splits above them
                                               (``folder/train/cat/1.png`` and ``split="train"``)
``arrays.npz``                                 arrays ``x`` and ``y``; with a split ``x_<split>`` and ``y_<split>``
``arrays.npz::x_key,y_key``                    arrays by name
``table.csv``, ``.tsv``, ``.parquet``          one row per item; also ``.csv.xz``, ``.csv.gz``, ``.tsv.xz``, ``.tsv.gz``
``table.csv::text,label``                      columns by name, the label last; two text columns make a pair
a folder written by ``Dataset.save_to_disk``   read with ``datasets.load_from_disk``
=============================================  ==================================================================================

Images in arrays are ``[N, H, W]``, ``[N, H, W, C]`` or ``[N, C, H, W]``; ``uint8`` is divided by 255. A one-dimensional ``uint8`` array
holds encoded image files one after another: its offsets (N + 1 integers) are read from the key whose part before the first
underscore is replaced by ``off`` (``jpg_train`` and ``off_train``; ``jpg`` and ``off``). Other ``[N, ...]`` arrays are taken as they are.

CSV follows the usual quoting; in TSV quotes are ordinary characters, as in GLUE. Text is UTF-8.
"""

from __future__ import annotations

import csv
import gzip
import io
import lzma
import math
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offramp.cli.records import Images, Records, Texts, optional, pad_batch
from offramp.cli.tokens import tokenizer, words
from offramp.core.errors import InvalidInput

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff"})
SPLIT_NAMES = ("train", "training", "val", "valid", "validation", "dev", "calibration", "test", "testing")
LABEL_COLUMNS = ("label", "labels", "class", "target", "y")
PAIR_COLUMNS = (
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("text_a", "text_b"),
    ("question1", "question2"),
    ("question", "sentence"),
)
TEXT_COLUMNS = ("text", "sentence", "review", "content", "document")
IMAGE_COLUMNS = ("image", "img", "picture")


def read(
    spec: str,
    *,
    split: str | None = None,
    images: Images | None = None,
    texts: Texts | None = None,
    text_columns: Sequence[str] = (),
    label_column: str | None = None,
    classes: Sequence[str] = (),
    labels_needed: bool = True,
) -> Records:
    """Read a data spec (see the module's table).

    Args:
        spec: path, with ``::keys`` for arrays and tables.
        split: name of a split inside it.
        images: how images become tensors.
        texts: how texts become tensors; needed for text.
        text_columns: one or two columns; by default the usual names.
        label_column: by default the usual names.
        classes: names in the order of the model's outputs; by default sorted from the data.
        labels_needed: whether missing labels are an error.

    Raises:
        InvalidInput: missing file, wrong key, empty folder, label out of range, unreadable image, not-a-number.
        MissingExtra: a reader needs a package that is not installed.
    """
    location, _, keys = spec.partition("::")
    names = [k.strip() for k in keys.split(",") if k.strip()]
    path = Path(location).expanduser()
    if not path.exists():
        siblings = sorted(p.name for p in path.parent.iterdir())[:8] if path.parent.is_dir() else []
        beside = f" {path.parent} holds: {', '.join(siblings)}." if siblings else ""
        raise InvalidInput(f"No file or folder at {path}.{beside}")
    options = _Options(
        spec, split, images or Images(), texts, tuple(text_columns), label_column, tuple(classes), labels_needed, tuple(names)
    )
    if path.is_dir():
        if any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json", "state.json")):
            return _saved_dataset(path, options)
        return _image_folder(path, options)
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes[-1:] == [".npz"]:
        return _arrays(path, options)
    if suffixes[-1:] and suffixes[-1] in (".xz", ".gz"):
        suffixes = suffixes[:-1]
    if suffixes[-1:] and suffixes[-1] in (".csv", ".tsv", ".parquet"):
        return _table(path, suffixes[-1], options)
    raise InvalidInput(
        f"{path}: unknown kind of data. Known: a folder of images, .npz, .csv, .tsv, .parquet, a folder written by Dataset.save_to_disk."
    )


@dataclass(frozen=True)
class _Options:
    source: str
    split: str | None
    images: Images
    texts: Texts | None
    text_columns: tuple[str, ...]
    label_column: str | None
    classes: tuple[str, ...]
    labels_needed: bool
    keys: tuple[str, ...]


def encode_labels(values: Sequence[Any], classes: Sequence[str], source: str) -> tuple[Tensor, tuple[str, ...]]:
    """Labels as class indices.

    Whole numbers (also written as text) are indices; other text is looked up in ``classes``, or in the sorted distinct values.

    Returns:
        int64 indices and the class names.

    Raises:
        InvalidInput: a label is missing, negative, out of range, fractional or unknown; the error names the row.
    """
    whole: list[int] | None = []
    for row, value in enumerate(values):
        if value is None or value == "" or (isinstance(value, float | np.floating) and math.isnan(value)):
            raise InvalidInput(f"{source}: row {row} has no label. Remove the row or fill in its label.")
        if isinstance(value, float | np.floating):
            if not float(value).is_integer():
                raise InvalidInput(f"{source}: row {row} has label {float(value):g}; labels are class indices or class names.")
            value = int(value)
        if whole is not None:
            try:
                whole.append(int(value))
            except (TypeError, ValueError):
                whole = None
    if classes and (whole is None or all(str(v) in classes for v in values)):
        index = {str(name): i for i, name in enumerate(classes)}
        for row, value in enumerate(values):
            if str(value) not in index:
                raise InvalidInput(f"{source}: row {row} has the unknown label {value!r}. Known: {', '.join(map(str, classes[:10]))}.")
        return torch.tensor([index[str(v)] for v in values], dtype=torch.long), tuple(map(str, classes))
    if whole is None:
        names = sorted({str(v) for v in values})
        return encode_labels([str(v) for v in values], names, source)
    labels = torch.tensor(whole, dtype=torch.long)
    limit = len(classes) if classes else None
    bad = torch.nonzero((labels < 0) | (labels >= limit) if limit else labels < 0)
    if bad.numel():
        row = int(bad[0])
        expected = f"0 to {limit - 1}" if limit else "0 or more"
        raise InvalidInput(f"{source}: row {row} has label {int(labels[row])}; expected {expected}.")
    return labels, tuple(map(str, classes)) if classes else tuple(str(i) for i in range(int(labels.max()) + 1 if len(labels) else 0))


def _labelled(values: Sequence[Any] | None, options: _Options, default: Sequence[str] = ()) -> tuple[Tensor | None, tuple[str, ...]]:
    if values is None:
        return None, options.classes or tuple(default)
    return encode_labels(values, options.classes or default, options.source)


def _finish(
    kind: str,
    count: int,
    fetch: Callable[[int], Any],
    raw: Callable[[int], Any],
    labels: Tensor | None,
    classes: tuple[str, ...],
    options: _Options,
) -> Records:
    if count == 0:
        raise InvalidInput(f"{options.source} holds no items.")
    if labels is not None and labels.numel() != count:
        raise InvalidInput(f"{options.source}: {count} items but {labels.numel()} labels.")
    pad = options.texts.pad if kind == "text" and options.texts else {}
    return Records(kind, options.source, fetch, raw, torch.arange(count), labels, classes, pad)


# Images in folders


def _image_folder(path: Path, options: _Options) -> Records:
    if options.keys:
        raise InvalidInput(f"{options.source}: an image folder has no keys; drop '::{','.join(options.keys)}'.")
    folders = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    if options.split is not None:
        chosen = next((p for p in folders if p.name == options.split), None)
        if chosen is None:
            raise InvalidInput(f"{path} has no split {options.split!r}; it holds: {', '.join(p.name for p in folders) or 'no folders'}.")
        return _image_folder(chosen, replace(options, split=None, source=str(chosen)))
    if folders and all(p.name in SPLIT_NAMES for p in folders):
        raise InvalidInput(f"{path} holds the splits {', '.join(p.name for p in folders)}: choose one with --split.")
    files: list[Path] = []
    names: list[str] = []
    for folder in folders:
        inside = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))
        files += inside
        names += [folder.name] * len(inside)
    labels: list[str] | None = names
    if not files:
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        if files and options.labels_needed:
            raise InvalidInput(
                f"{path} holds {len(files)} images but no class folders, so there are no labels. Sort the images into one folder per class."
            )
        labels = None
    if not files:
        raise InvalidInput(f"{path} holds no images. Expected class folders with files ending in {', '.join(sorted(IMAGE_SUFFIXES))}.")
    index, classes = _labelled(labels, options, [p.name for p in folders] if labels is not None else ())
    return _finish(
        "image",
        len(files),
        lambda row: options.images.picture(_open(files[row])),
        lambda row: np.asarray(_open(files[row])),
        index,
        classes,
        options,
    )


def _open(file: Path | io.BytesIO, name: str = "") -> Any:
    module = optional("PIL.Image", "timm", "Reading images")
    try:
        with module.open(file) as image:
            return image.convert("RGB") if image.mode not in ("L", "RGB") else image.copy()
    except (OSError, ValueError, SyntaxError) as error:
        raise InvalidInput(f"{name or file} is not a readable image ({error}). Replace or remove it.") from error


# Arrays


def _arrays(path: Path, options: _Options) -> Records:
    try:
        archive = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InvalidInput(f"{path} is not an .npz file, or is truncated ({error}).") from error
    with archive:
        held = list(archive.files)
        if len(options.keys) > 2:
            raise InvalidInput(f"{options.source}: give at most two keys, x_key,y_key.")
        suffix = "" if options.split is None else f"_{options.split}"
        if options.keys:
            x_key: str | None = options.keys[0]
            y_key = options.keys[1] if len(options.keys) == 2 else None
        else:
            x_key = _first(held, [f"{n}{suffix}" for n in ("x", "X", "images", "data", "jpg", "png", "webp")])
            y_key = _first(held, [f"{n}{suffix}" for n in ("y", "labels", "label", "targets")])
        for key, role in ((x_key, "x"), (y_key, "y")):
            if key is not None and key not in held:
                raise InvalidInput(f"{path} has no array {key!r} (asked for as {role}); it holds: {', '.join(held)}.")
        if x_key is None:
            raise InvalidInput(
                f"{path} has no array named x{suffix}; it holds: {', '.join(held)}. Choose with {path.name}::x_key,y_key"
                + ("" if options.split else " or give --split")
                + "."
            )
        if y_key is None and options.labels_needed:
            raise InvalidInput(
                f"{path} has no labels named y{suffix}; it holds: {', '.join(held)}. Choose with {path.name}::{x_key},y_key."
            )
        try:
            x = archive[x_key]
            y = None if y_key is None else archive[y_key]
            names = [str(n) for n in archive["classes"]] if "classes" in held and archive["classes"].ndim == 1 else []
            offsets = None
            if x.ndim == 1 and x.dtype == np.uint8:
                off_key = "_".join(["off", *x_key.split("_")[1:]])
                if off_key not in held:
                    raise InvalidInput(
                        f"{path}: {x_key!r} holds encoded images but their offsets {off_key!r} are missing; it holds: {', '.join(held)}."
                    )
                offsets = archive[off_key]
        except ValueError as error:  # pickled objects are refused by numpy; InvalidInput is a ValueError of ours
            if isinstance(error, InvalidInput):
                raise
            raise InvalidInput(f"{path}: an array cannot be read ({error}). Only plain arrays are read, nothing is unpickled.") from error
    if y is not None and y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y is not None and y.ndim != 1:
        raise InvalidInput(f"{path}: {y_key!r} must hold one label per item, its shape is {y.shape}.")
    labels, classes = _labelled(None if y is None else y.tolist(), options, names)
    if offsets is not None:
        return _encoded(path, x, offsets, labels, classes, options)
    if x.dtype.kind not in "fiub":
        raise InvalidInput(f"{path}: {x_key!r} holds {x.dtype}; numbers are expected.")
    if x.dtype.kind == "f":
        finite = np.isfinite(x).reshape(len(x), -1).all(1)
        if not finite.all():
            raise InvalidInput(
                f"{path}: row {int(np.argmin(finite))} of {x_key!r} holds NaN or infinity ({int((~finite).sum())} rows do). Clean the data."
            )
    if x.ndim < 2:
        raise InvalidInput(f"{path}: {x_key!r} must be [items, ...], its shape is {x.shape}.")
    if x.ndim == 3 and x.dtype == np.uint8:
        x = x[:, None]
    elif x.ndim == 4 and x.shape[-1] in (1, 3) and x.shape[1] not in (1, 3):
        x = np.moveaxis(x, -1, 1)
    if x.ndim == 4 and x.shape[1] in (1, 3):
        return _finish(
            "image",
            len(x),
            lambda row: options.images.array(torch.from_numpy(x[row].copy())),
            lambda row: np.moveaxis(x[row], 0, -1),
            labels,
            classes,
            options,
        )
    return _finish("array", len(x), lambda row: torch.from_numpy(x[row].copy()).float(), lambda row: x[row], labels, classes, options)


def _encoded(
    path: Path, data: np.ndarray, offsets: np.ndarray, labels: Tensor | None, classes: tuple[str, ...], options: _Options
) -> Records:
    if (
        offsets.ndim != 1
        or offsets.dtype.kind not in "iu"
        or np.any(np.diff(offsets.astype(np.int64)) <= 0)
        or int(offsets[-1]) > len(data)
    ):
        raise InvalidInput(f"{path}: the offsets must be ascending integers that end within the {len(data)} bytes of the images.")

    def image(row: int) -> Any:
        return _open(io.BytesIO(data[int(offsets[row]) : int(offsets[row + 1])].tobytes()), f"{path}, image {row}")

    return _finish(
        "image",
        len(offsets) - 1,
        lambda row: options.images.picture(image(row)),
        lambda row: np.asarray(image(row)),
        labels,
        classes,
        options,
    )


def _first(held: Sequence[str], wanted: Sequence[str]) -> str | None:
    return next((w for w in wanted if w in held), None)


# Text


def _open_text(path: Path) -> io.TextIOBase:
    opener: Any = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix.lower(), open)
    stream: io.TextIOBase = opener(path, "rt", encoding="utf-8", newline="")
    return stream


def _table(path: Path, suffix: str, options: _Options) -> Records:
    if options.split is not None:
        raise InvalidInput(f"{path}: a table has no splits. Give the file of the split {options.split!r}, or choose a part with --part.")
    if suffix == ".parquet":
        parquet = optional("pyarrow.parquet", "hf", "Reading Parquet")
        try:
            columns = parquet.read_table(path).to_pydict()
        except (OSError, ValueError) as error:
            raise InvalidInput(f"{path} is not a Parquet file ({error}).") from error
    else:
        columns = _delimited(path, suffix)
    return _columns(columns, options)


def _delimited(path: Path, suffix: str) -> dict[str, list[str]]:
    quoting: Any = csv.QUOTE_NONE if suffix == ".tsv" else csv.QUOTE_MINIMAL
    limit = csv.field_size_limit(1 << 30)  # documents are longer than csv's default of 131,072 characters
    try:
        with _open_text(path) as stream:
            rows: Iterator[list[str]] = csv.reader(stream, delimiter="\t" if suffix == ".tsv" else ",", quoting=quoting)
            header = next(rows, None)
            if not header:
                raise InvalidInput(f"{path} is empty; expected a header line and one line per item.")
            columns: dict[str, list[str]] = {name.strip().lstrip("\ufeff"): [] for name in header}
            for number, row in enumerate(rows):
                if not row:
                    continue
                if len(row) != len(header):
                    raise InvalidInput(f"{path}: row {number} has {len(row)} fields, the header has {len(header)}.")
                for name, value in zip(columns, row, strict=True):
                    columns[name].append(value)
    except (UnicodeDecodeError, lzma.LZMAError, EOFError, gzip.BadGzipFile, csv.Error) as error:
        raise InvalidInput(f"{path} cannot be read as UTF-8 text ({error}).") from error
    finally:
        csv.field_size_limit(limit)
    return columns


def _columns(columns: Mapping[str, Sequence[Any]], options: _Options, default_classes: Sequence[str] = ()) -> Records:
    text, label = _choose_columns(list(columns), options)
    values = [columns[name] for name in text]
    for name, column in zip(text, values, strict=True):
        bad = next((row for row, v in enumerate(column) if not isinstance(v, str) or not v.strip()), None)
        if bad is not None:
            raise InvalidInput(f"{options.source}: row {bad} has no text in column {name!r} (it holds {column[bad]!r}).")
    if options.texts is None:
        raise InvalidInput(f"{options.source} holds text, which needs a tokenizer: give --tokenizer, or a model hf:PATH that has one.")
    items: list[Any] = [v[0] if len(text) == 1 else tuple(v) for v in zip(*values, strict=True)]
    labels, classes = _labelled(None if label is None else columns[label], options, default_classes)
    encoded = options.texts.tokenize(items) if items else {}
    names = list(encoded)
    return _finish(
        "text",
        len(items),
        lambda row: {n: torch.as_tensor(encoded[n][row], dtype=torch.long) for n in names},
        lambda row: items[row] if len(text) == 1 else "\n".join(items[row]),
        labels,
        classes,
        options,
    )


def _choose_columns(held: list[str], options: _Options) -> tuple[list[str], str | None]:
    """Text columns and the label column."""
    text, label = list(options.text_columns), options.label_column
    if options.keys:
        if len(options.keys) < 2 and options.labels_needed:
            raise InvalidInput(f"{options.source}: name the text column(s) and then the label: ::text,label.")
        *front, last = options.keys
        text, label = (front, last) if front else ([last], None)
    elif label is None:
        label = _first(held, LABEL_COLUMNS)
    if not text:
        pair = next((p for p in PAIR_COLUMNS if all(c in held for c in p)), None)
        single = _first(held, TEXT_COLUMNS)
        text = list(pair) if pair else [single] if single else []
    if label is None and options.labels_needed:
        raise InvalidInput(
            f"{options.source} has no column named {' or '.join(LABEL_COLUMNS)}; it has: {', '.join(held)}. Choose with --label-column."
        )
    for name in [*text, *([label] if label else [])]:
        if name not in held:
            raise InvalidInput(f"{options.source} has no column {name!r}; it has: {', '.join(held)}.")
    if not 1 <= len(text) <= 2:
        raise InvalidInput(
            f"{options.source}: cannot tell the text column among: {', '.join(held)}. Choose one, or two for pairs, with --text-column."
        )
    return text, label


# Data sets saved by the datasets library


def _saved_dataset(path: Path, options: _Options) -> Records:
    datasets = optional("datasets", "hf", f"Reading {path}")
    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{path} is not a readable data set folder ({error}).") from error
    if isinstance(loaded, Mapping):
        if options.split is None or options.split not in loaded:
            given = "no split was chosen" if options.split is None else f"there is no split {options.split!r}"
            raise InvalidInput(f"{path}: {given}; it holds: {', '.join(loaded)}. Choose with --split.")
        loaded = loaded[options.split]
    elif options.split is not None:
        raise InvalidInput(f"{path} is a single data set without splits; drop --split {options.split}.")
    held = list(loaded.column_names)
    picture = (
        _first(held, IMAGE_COLUMNS)
        if not options.keys
        else (options.keys[0] if isinstance(loaded.features.get(options.keys[0]), datasets.Image) else None)
    )
    label = options.label_column or (options.keys[-1] if len(options.keys) > 1 else _first(held, LABEL_COLUMNS))
    names = list(getattr(loaded.features.get(label), "names", None) or []) if label else []
    if picture is None:
        return _columns({name: loaded[name][:] for name in held}, options, names)
    if label not in held and options.labels_needed:
        raise InvalidInput(f"{path} has no label column {label or ''}; it has: {', '.join(held)}. Choose with --label-column.")
    labels, classes = _labelled(loaded[label][:] if label in held else None, options, names)

    def image(row: int) -> Any:
        try:
            return loaded[row][picture]
        except (OSError, ValueError, SyntaxError) as error:
            raise InvalidInput(f"{path}: image {row} is not readable ({error}).") from error

    return _finish(
        "image", len(loaded), lambda row: options.images.picture(image(row)), lambda row: np.asarray(image(row)), labels, classes, options
    )


__all__ = ["Images", "Records", "Texts", "encode_labels", "optional", "pad_batch", "read", "tokenizer", "words"]
