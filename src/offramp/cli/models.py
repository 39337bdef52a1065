"""Models from a spec on the command line, and how their pictures want to be prepared.

=================================  ============================================================================================
``timm:NAME``                      ``timm.create_model(NAME)``; ``--pretrained`` fetches its weights
``hf:PATH`` or ``hf:PATH:CLASS``   ``transformers.CLASS.from_pretrained(PATH)``; PATH is a folder or a hub name, CLASS an auto class
``python:module:function``         a function of an installed module, called without arguments (or with ``num_classes``)
``python:file.py:function``        the same from a file
=================================  ============================================================================================

Weights are read from safetensors files only: nothing is unpickled.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from offramp.cli.data import Images, optional
from offramp.cli.records import reason
from offramp.core.errors import InvalidInput


@dataclass(frozen=True)
class Loaded:
    """A model and what its own configuration says about inputs.

    Attributes:
        model: in evaluation mode.
        images: preparation of pictures the model was made for, or ``None``.
        tokenizer: where its tokenizer is, or ``None``.
    """

    model: nn.Module
    images: Images | None = None
    tokenizer: str | None = None


def load_model(
    spec: str, *, kind: str | None = None, num_classes: int | None = None, weights: str | Path | None = None, pretrained: bool = False
) -> Loaded:
    """Make the model that ``spec`` names (see the module's table).

    Args:
        spec: what to make.
        kind: ``image`` or ``text``; chooses the auto class of ``hf:PATH``. ``None`` asks the configuration.
        num_classes: width of the answer; ``None`` leaves the model's own.
        weights: a safetensors file to load into it.
        pretrained: fetch timm's weights.

    Raises:
        InvalidInput: the spec is malformed, or names nothing that can be made.
        MissingExtra: the library is not installed.
    """
    scheme, _, rest = spec.partition(":")
    makers = {"timm": _timm, "hf": _hf, "python": _python}
    if scheme not in makers or not rest:
        raise InvalidInput(f"A model is timm:NAME, hf:PATH[:CLASS], python:module:function or python:file.py:function; got {spec!r}.")
    loaded = makers[scheme](rest, kind, num_classes, pretrained)
    if weights is not None:
        load_weights(loaded.model, Path(weights))
    loaded.model.eval()
    return loaded


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a safetensors file into a model; names and shapes must match.

    Raises:
        InvalidInput: the file is missing or foreign, or does not fit the model.
    """
    if not path.is_file():
        raise InvalidInput(f"No weights at {path}.")
    if path.suffix != ".safetensors":
        raise InvalidInput(
            f"{path}: weights are read from .safetensors files only. Convert with safetensors.torch.save_file(model.state_dict(), ...)."
        )
    try:
        state = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise InvalidInput(f"{path} is not a safetensors file: {error}.") from error
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise InvalidInput(f"The weights in {path} do not fit {type(model).__name__}: {' '.join(str(error).split())[:600]}") from error


def _timm(name: str, kind: str | None, num_classes: int | None, pretrained: bool) -> Loaded:
    timm = optional("timm", "timm", f"The model timm:{name}")
    if name not in timm.list_models() and not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.4)
        raise InvalidInput(f"timm has no model {name!r}." + (f" Nearest: {', '.join(near)}." if near else ""))
    extra = {} if num_classes is None else {"num_classes": num_classes}
    model = timm.create_model(name, pretrained=pretrained, **extra)
    config = timm.data.resolve_data_config({}, model=model)
    channels, height, width = config["input_size"]
    return Loaded(model, Images((height, width), tuple(config["mean"]), tuple(config["std"]), channels, float(config["crop_pct"])))


def _hf(rest: str, kind: str | None, num_classes: int | None, pretrained: bool) -> Loaded:
    transformers = optional("transformers", "hf", f"The model hf:{rest}")
    path, _, name = rest.partition(":")
    try:
        config = transformers.AutoConfig.from_pretrained(path, **({} if num_classes is None else {"num_labels": num_classes}))
        if not name:
            picture = kind == "image" or (kind is None and getattr(config, "image_size", None) is not None)
            name = "AutoModelForImageClassification" if picture else "AutoModelForSequenceClassification"
        maker = getattr(transformers, name, None)
        if maker is None or not callable(getattr(maker, "from_pretrained", None)):
            raise InvalidInput(f"transformers has no model class {name!r}.")
        model = maker.from_pretrained(path, config=config)
    except InvalidInput:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise InvalidInput(f"transformers cannot load {path}: {reason(error)}") from error
    if kind == "text" or getattr(config, "vocab_size", None) is not None:
        return Loaded(model, tokenizer=path)
    return Loaded(model, images=_preprocessor(Path(path), config))


def _preprocessor(folder: Path, config: Any) -> Images:
    """Size, mean and standard deviation from ``preprocessor_config.json`` where there is one."""
    size = getattr(config, "image_size", None)
    height, width = (size, size) if isinstance(size, int) else tuple(size) if size else (224, 224)
    mean = std = None
    file = folder / "preprocessor_config.json"
    if file.is_file():
        stored = json.loads(file.read_text(encoding="utf-8"))
        given = stored.get("size") or {}
        if isinstance(given, dict) and "height" in given:
            height, width = int(given["height"]), int(given["width"])
        mean, std = stored.get("image_mean"), stored.get("image_std")
    return Images((height, width), tuple(mean) if mean else None, tuple(std) if std else None, int(getattr(config, "num_channels", 3)))


def _python(rest: str, kind: str | None, num_classes: int | None, pretrained: bool) -> Loaded:
    where, _, name = rest.rpartition(":")
    if not where or not name:
        raise InvalidInput(f"python:{rest} needs a function: python:module:function or python:file.py:function.")
    if where.endswith(".py"):
        file = Path(where).expanduser()
        if not file.is_file():
            raise InvalidInput(f"No file at {file}.")
        found = importlib.util.spec_from_file_location(file.stem, file)
        if found is None or found.loader is None:
            raise InvalidInput(f"{file} cannot be imported.")
        module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(where)
        except ModuleNotFoundError as error:
            raise InvalidInput(f"There is no Python module {error.name!r} (asked for by python:{rest}).") from error
    make = getattr(module, name, None)
    if not callable(make):
        public = [n for n in vars(module) if not n.startswith("_") and callable(getattr(module, n))]
        near = difflib.get_close_matches(name, public, n=3, cutoff=0.4)
        raise InvalidInput(f"{where} has no function {name!r}." + (f" Nearest: {', '.join(near)}." if near else ""))
    takes = inspect.signature(make).parameters
    empty = inspect.Parameter.empty
    positional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    given = {"num_classes": num_classes} if num_classes is not None and "num_classes" in takes else {}
    missing = [n for n, p in takes.items() if p.default is empty and p.kind not in positional and n not in given]
    if missing:
        hint = " Give --num-classes." if missing == ["num_classes"] else ""
        raise InvalidInput(f"python:{rest} is called with num_classes at most, but it also needs {', '.join(missing)}.{hint}")
    model = make(**given)
    if not isinstance(model, nn.Module):
        raise InvalidInput(f"python:{rest} returned a {type(model).__name__}; expected a torch.nn.Module.")
    return Loaded(model, images=getattr(model, "offramp_images", None))
