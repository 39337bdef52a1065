"""The verbs of the package root. Each looks at what it is given, once, and calls the part that does it.

A kind of network is one entry of `KINDS`: how it is recognised, and which function carries out each verb for it. A new kind is a new entry.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn

from offramp import policies, systems
from offramp.backbones.transformers import tokenizer_beside
from offramp.budget import CostMethod, DriftLimit, MeanCost, Procedure, Quality, Target
from offramp.budget import calibrate as calibrate_trace
from offramp.budget.agreement import AcceptPlan
from offramp.core.certificate import Plan
from offramp.core.errors import ArtifactError, InvalidInput
from offramp.core.protocols import HeadSpec, Rule
from offramp.core.system import System
from offramp.core.trace import Trace
from offramp.engines.capture import Tuning
from offramp.engines.classify import engine as classify
from offramp.engines.classify.engine import Runner
from offramp.engines.classify.modes import Mode
from offramp.engines.classify.record import record as record_trace
from offramp.engines.diffusion.calibrate import calibrate_denoiser
from offramp.engines.diffusion.graphs import Captured
from offramp.engines.diffusion.model import STEM, DiffusionModel, attach_diffusion, changed, check_model, is_pipeline, saved
from offramp.engines.diffusion.plan import DenoisingPlan
from offramp.engines.diffusion.trained import note_trained, warn_untrained
from offramp.engines.text.generator import TextGenerator, text_generator
from offramp.engines.text.planner import SpeculationPlan
from offramp.exits.cached import Adapter, Block
from offramp.exits.denoising import DenoisingExit
from offramp.exits.lm import LMHeadSpec, OwnNorm, OwnOutput, Shared, Trimmed, frequent
from offramp.exits.placement import Placement
from offramp.language import LanguageModel, attach_lm, load_lm
from offramp.measure.image_report import image_report
from offramp.measure.report import report as trace_report
from offramp.measure.text_report import text_report
from offramp.network import MultiExit, answer
from offramp.network import attach as attach_network
from offramp.network import load as load_network
from offramp.network import load_plan as load_network_plan
from offramp.policies.decoding import Way
from offramp.train import FitResult, Recipe
from offramp.train import fit as train_fit
from offramp.train.denoising import PlanView, add_heads
from offramp.train.text import packed, text_loader

HEADS: Mapping[str, type] = {"shared": Shared, "norm": OwnNorm, "output": OwnOutput, "adapter": Adapter, "block": Block, "trimmed": Trimmed}
"""Short words for the exits of a language model, as ``head=`` takes them."""


@dataclass(frozen=True)
class Kind:
    """One kind of network.

    Attributes:
        words: what it is called in an error.
        made: the class that `attach` gives.
        recognises: ``(model, options given to attach) -> bool``.
        verbs: the function of each verb.
        passed: the function that takes what such a function passes on, where its own names do not say what may be given.
        stem: of the file that `load` finds in a saved folder, without ``.json``.
    """

    words: str
    made: type
    recognises: Callable[[Any, Mapping[str, Any]], bool]
    verbs: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    passed: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    stem: str = ""


# ---- language models -----------------------------------------------------------------------------------------------------


def _language_head(head: Any, texts: Any, kept: Sequence[int] | int | None, tokenizer: Any, vocabulary: int) -> Any:
    """Heads as parts, of parts and short words."""
    if isinstance(head, Sequence) and not isinstance(head, str):
        return [_language_head(h, texts, kept, tokenizer, vocabulary) for h in head]
    if not isinstance(head, str):
        return head
    if head not in HEADS:
        raise InvalidInput(f"head={head!r} is not known; words for heads are {', '.join(HEADS)}. Or give a part such as Adapter(heads=4).")
    if head != "trimmed":
        return HEADS[head]()
    if isinstance(kept, Sequence):
        return Trimmed(tuple(int(k) for k in kept))
    if texts is None:
        raise InvalidInput(
            'head="trimmed" keeps the frequent tokens: give kept=[token ids], or texts=... (ids, or strings and a tokenizer) to count '
            "them in and kept=how many."
        )
    from offramp.engines.text.arguments import token_ids

    count = kept if kept is not None else max(1, vocabulary // 8)
    if not 1 <= count <= vocabulary:
        raise InvalidInput(f"kept must be from 1 to the model's {vocabulary} tokens, got {count}.")
    return Trimmed(frequent(token_ids(texts, tokenizer=tokenizer), vocabulary, count))


def _attach_language(
    model: nn.Module,
    *,
    exits: Sequence[int] | None = None,
    head: LMHeadSpec | str | Sequence[LMHeadSpec | str] | None = None,
    system: System | None = None,
    texts: Any = None,
    kept: Sequence[int] | int | None = None,
    tokenizer: Any = None,
) -> LanguageModel:
    if system is not None and system.card.engine != "generate":
        methods = [n for n in systems.list_systems() if systems.load_card(n).engine == "generate"]
        cut = " If the model is to be cut into segments and to answer batches, give at=... and example=... too."
        raise InvalidInput(
            f"{system.card.name} is a method of the {system.card.engine} engine, and this {type(model).__name__} is a language model, "
            f"whose methods are {', '.join(methods)}: attach(model, system=offramp.systems.build({methods[-1]!r}))."
            f"{cut if system.card.engine == 'classify' else ''}"
        )
    if exits is None and system is None:
        exits = [max(1, int(model.config.num_hidden_layers) // 8)]  # type: ignore[union-attr, arg-type]
    if isinstance(exits, int):
        raise InvalidInput(f"exits are numbers of blocks, one for each exit: exits=[{exits}] reads after {exits} blocks.")
    vocabulary = int(model.config.vocab_size) if isinstance(head, str | Sequence) else 0  # type: ignore[union-attr, arg-type]
    return attach_lm(model, exits, _language_head(head, texts, kept, tokenizer, vocabulary), system=system)


def _fit_language(
    net: LanguageModel,
    data: Any,
    recipe: Recipe | None = None,
    *,
    tokenizer: Any = None,
    block: int = 512,
    batch_size: int = 8,
    eval_data: Any = None,
    epochs: int = 1,
    **training: Any,
) -> FitResult:
    def loader(given: Any, shuffle: bool) -> Any:
        blocks = _blocks(given, tokenizer, block, net.model)
        return given if blocks is None else text_loader(blocks, batch_size, shuffle=shuffle)

    net.decoder.check_unchanged()
    if eval_data is not None:
        if "eval_loader" in training:
            raise InvalidInput("Give eval_data or eval_loader, one of them.")
        training["eval_loader"] = loader(eval_data, False)
    return train_fit(net, loader(data, True), recipe, epochs=epochs, **training)


def _blocks(data: Any, tokenizer: Any, block: int, model: nn.Module) -> Tensor | None:
    """Blocks of tokens ``[N, T]`` of texts in any form, or ``None`` for what is a loader already."""
    if hasattr(data, "__array__"):  # of numpy, or a tensor; text_loader says what is wrong with its numbers
        try:
            return torch.as_tensor(data)
        except (TypeError, ValueError) as error:
            raise InvalidInput(f"A {type(data).__name__} is no blocks of tokens [blocks, tokens] of whole numbers: {error}.") from error
    if isinstance(data, str | os.PathLike):
        return _text_blocks(data, tokenizer or tokenizer_beside(model), block)
    if isinstance(data, Sequence) and len(data):
        first = data[0]
        if isinstance(first, str):
            return packed(data, tokenizer or tokenizer_beside(model), block)
        if isinstance(first, Sequence) and len(first) and isinstance(first[0], int):
            return packed(data, tokenizer, block)
    return None


def _text_blocks(data: str | os.PathLike[str], tokenizer: Any, block: int) -> Tensor:
    """Blocks of a folder of texts, of a file, or of a string that is the name of neither and so is a text itself."""
    if os.path.isdir(data):
        return packed(data, tokenizer, block)
    if os.path.isfile(data):
        try:
            return packed([Path(data).read_text(encoding="utf-8")], tokenizer, block)
        except UnicodeDecodeError as error:
            raise InvalidInput(f"{os.fspath(data)} is no text in UTF-8: {error}.") from error
    if not isinstance(data, str) or len(data.split()) < 2:
        raise InvalidInput(f"There is no file or folder of texts at {os.fspath(data)[:80]!r}, and one word is no text to learn from.")
    try:
        return packed([data], tokenizer, block)
    except InvalidInput as error:
        raise InvalidInput(f"{error} The string was taken for a text, as there is no file or folder at {data[:80]!r}.") from error


def _record_language(net: LanguageModel, loader: Any = None, **options: Any) -> Any:
    raise InvalidInput(
        "A trace is of items with one answer each. How often the exits of a language model say what the model says, token by token, is "
        "found by offramp.engines.text.agreement.agreement(lm, texts); compile(lm, texts=...) plans with it."
    )


def _compile_language(net: LanguageModel, plan: Way | SpeculationPlan | AcceptPlan | System | None = None, **options: Any) -> TextGenerator:
    if isinstance(plan, Plan):
        raise InvalidInput(
            "A Plan of calibrate() is for networks that are cut into segments. A language model takes Plain(), Verify(...), Accept(...), "
            "what a planner chose, or None with texts=... to plan here."
        )
    net.check_heads()
    return text_generator(net, systems.way(plan) if isinstance(plan, System) else plan, **options)


def _is_language(model: Any, options: Mapping[str, Any]) -> bool:
    """Whether the model ends in an output layer over tokens; whether it can be decoded is found out by trying."""
    if "exits" in options:
        return isinstance(model, nn.Module)
    if "at" in options or "example" in options or not hasattr(model, "config"):
        return False
    ending = getattr(model, "get_output_embeddings", None)
    return callable(ending) and ending() is not None


# ---- diffusion -----------------------------------------------------------------------------------------------------------


def _attach_diffusion(
    model: Any,
    *,
    system: System,
    scheduler: Any = None,
    noise: Any = None,
    example: Any = None,
    heads: Mapping[str, nn.Module] | None = None,
    timestep: str | None = None,
) -> DiffusionModel:
    made = attach_diffusion(model, system=system, scheduler=scheduler, noise=noise, example=example, heads=heads, timestep=timestep)
    if isinstance(system.head, DenoisingExit) and heads is None:
        add_heads(made.net, system.head, made.layout.blocks[:-1])
    return made


def _fit_diffusion(net: DiffusionModel, data: Any, recipe: Recipe | None = None, **training: Any) -> FitResult:
    used = recipe if recipe is not None else net.system.recipe
    if used is None:
        raise InvalidInput(f"{net.system.card.name} trains nothing: calibrate it, or call it as it is. Or give a recipe.")
    as_run = net.skips is not None and net.skips.as_run and recipe is None and getattr(net.skips, "depths", True)
    net.plan = None  # it was found for the weights there were
    before = net.net.fingerprint()
    try:
        return train_fit(PlanView(net.net, net.points) if as_run else net.net, data, used, **training)
    finally:  # an interrupted training has trained too
        note_trained(net, net.points if as_run else None, in_place=net.net.fingerprint() != before)


def _calibrate_diffusion(net: DiffusionModel, target: Any, **options: Any) -> DenoisingPlan:
    warn_untrained(net)
    net.plan = plan = calibrate_denoiser(net, target, **options)
    return plan


def _compile_diffusion(
    net: DiffusionModel, plan: DenoisingPlan | None = None, *, captured: bool | None = None, compiled: bool | Tuning = False
) -> Any:
    """What runs a plan: a pipeline with the user's own call, or for a denoiser alone a `Denoiser`.

    Args:
        net: from `attach`.
        plan: from `calibrate`; by default what calls of ``net`` carry out: the plan found last, or the published settings.
        captured: run the segments as CUDA graphs; by default where the denoiser is on CUDA.
        compiled: also compile them, which takes minutes at the first call; see `offramp.engines.diffusion.graphs.Captured`.

    Raises:
        FingerprintMismatch: the plan was made for another denoiser.
        InvalidInput: the plan is not of a diffusion method.
    """
    if plan is not None and not isinstance(plan, DenoisingPlan):
        raise InvalidInput(f"A diffusion method runs what calibrate() gave for it, or None for the plan in use; got {plan!r}.")
    if plan is not None:
        plan.check(net)
    wanted = net.net.device.type == "cuda" if captured is None else captured
    run = Captured(net.net.device, compiled=compiled) if wanted or compiled else None
    if plan is None:
        warn_untrained(net)
        return net.view(run=run)
    return plan.watch(net.view(plan.points, regions=plan.regions, steps=plan.steps, run=run))


def _load_diffusion(
    model: Any,
    folder: str | os.PathLike[str],
    *,
    scheduler: Any = None,
    noise: Any = None,
    example: Any = None,
    timestep: str | None = None,
) -> DiffusionModel:
    name, fields, tensors = saved(folder)
    check_model(model, fields, folder)
    system = changed(systems.build(name), fields)
    made = _attach_diffusion(model, system=system, scheduler=scheduler, noise=noise, example=example, timestep=timestep)
    try:
        made.net.heads.load_state_dict(tensors)
    except RuntimeError as error:
        raise ArtifactError(f"The weights in {folder} do not fit their heads: {error}.") from error
    if (trained := fields["trained"]) is not None:
        note_trained(made, trained.points, in_place=trained.in_place)
    return made


def _is_diffusion(model: Any, options: Mapping[str, Any]) -> bool:
    """Whether it is a pipeline, or a denoiser of which the noise levels are told."""
    system = options.get("system")
    return is_pipeline(model) or (isinstance(system, System) and system.card.engine == "denoise")


# ---- the kinds -----------------------------------------------------------------------------------------------------------

KINDS: tuple[Kind, ...] = (
    Kind(
        "a diffusion model",
        DiffusionModel,
        _is_diffusion,
        {
            "attach": _attach_diffusion,
            "fit": _fit_diffusion,
            "calibrate": _calibrate_diffusion,
            "compile": _compile_diffusion,
            "load": _load_diffusion,
        },
        {"fit": train_fit, "calibrate": calibrate_denoiser},
        STEM,
    ),
    Kind(
        "a language model",
        LanguageModel,
        _is_language,
        {"attach": _attach_language, "fit": _fit_language, "record": _record_language, "compile": _compile_language, "load": load_lm},
        {"fit": train_fit, "compile": text_generator},
        "lm",
    ),
    Kind(
        "a network cut into segments",
        MultiExit,
        lambda model, options: isinstance(model, nn.Module),
        {"attach": attach_network, "fit": train_fit, "record": record_trace, "compile": classify.compile, "load": load_network},
        stem="adapter",
    ),
)
"""Kinds of networks; `attach` takes the first that recognises a model, so the most general is last."""


def _call(kind: Kind, verb: str, /, *arguments: Any, **options: Any) -> Any:
    """Carry out a verb; options that belong to another kind are refused by name."""
    if verb not in kind.verbs:
        raise InvalidInput(f"{verb} of {kind.words} is not known; it has {', '.join(kind.verbs)}.")
    function = kind.verbs[verb]
    says_why = verb not in kind.passed and any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())
    if not says_why and (wrong := _unknown(kind, verb, options, len(arguments))):
        others = [k.words for k in KINDS if k is not kind and verb in k.verbs and not _unknown(k, verb, wrong, len(arguments))]
        where = f" {'They belong' if len(wrong) > 1 else 'It belongs'} to {' or '.join(others)}." if others else ""
        takes = ", ".join(p.name for p in _parameters(kind, verb) if not _needed(p)) or "no options"
        raise InvalidInput(f"{verb} of {kind.words} takes no {', '.join(wrong)}.{where} It takes {takes}.")
    if missing := [p.name for p in _parameters(kind, verb) if _awaited(p) and p.name not in options]:
        raise InvalidInput(f"{verb} of {kind.words} needs {' and '.join(missing)}; give {', '.join(f'{name}=...' for name in missing)}")
    return function(*arguments, **options)


def _unknown(kind: Kind, verb: str, options: Iterable[str], given: int) -> list[str]:
    """Names among the options that nothing reads, where so many arguments stand before them."""
    known = {p.name for place, p in enumerate(_parameters(kind, verb), 1) if place >= given or not _needed(p)}
    return [name for name in options if name not in known]


def _needed(parameter: inspect.Parameter) -> bool:
    """Whether it is one of those that the verb itself is called with, such as a loader."""
    return parameter.kind is parameter.POSITIONAL_OR_KEYWORD and parameter.default is parameter.empty


def _awaited(parameter: inspect.Parameter) -> bool:
    """Whether it must be given by name."""
    return parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty


def _parameters(kind: Kind, verb: str) -> list[inspect.Parameter]:
    """What a verb takes behind the network or the model: its own function, then the options of the one that it passes others on to."""
    own = [*inspect.signature(kind.verbs[verb]).parameters.values()][1:]
    if verb in kind.passed:
        known = {p.name for p in own}
        passed = inspect.signature(kind.passed[verb]).parameters.values()
        own += [p for p in passed if p.kind is p.KEYWORD_ONLY and p.name not in known]
    return [p for p in own if p.kind is not p.VAR_KEYWORD]


def _kind_of(net: Any, verb: str) -> Kind:
    for kind in KINDS:
        if isinstance(net, kind.made):
            return kind
    raise InvalidInput(f"{verb} takes what attach or load made ({', '.join(k.made.__name__ for k in KINDS)}); got {type(net).__name__}.")


# ---- verbs ---------------------------------------------------------------------------------------------------------------


@overload
def attach(
    model: nn.Module,
    at: Sequence[str] | int | Placement | None = None,
    *,
    example: Any,
    head: HeadSpec | Sequence[HeadSpec | nn.Module] | None = None,
    system: System | None = None,
    select: Callable[[Any], Tensor] = answer,
    num_outputs: int | None = None,
) -> MultiExit: ...


@overload
def attach(
    model: nn.Module,
    *,
    exits: Sequence[int] | None = None,
    head: LMHeadSpec | str | Sequence[LMHeadSpec | str] | None = None,
    system: System | None = None,
    texts: Any = None,
    kept: Sequence[int] | int | None = None,
    tokenizer: Any = None,
) -> LanguageModel: ...


def attach(model: Any, at: Any = None, **options: Any) -> Any:
    """Attach exits to a model. The model is not changed.

    A causal language model of transformers (or any with ``exits=``) becomes a `LanguageModel`, which writes texts; a pipeline with a
    denoiser and a scheduler, or a denoiser with a diffusion method, a `DiffusionModel`, which is called as the pipeline is; every other
    model, and a language model with ``at=`` or ``example=``, a `MultiExit`, which answers batches.

    Args:
        model: any PyTorch module, or a pipeline of diffusers.
        at: where exits go, of a network that is cut into segments: see `offramp.network.attach`, whose further options are ``example``
            (needed), ``head``, ``system``, ``select`` and ``num_outputs``.
        options: of that, or for a language model: ``exits``, after how many blocks each exit reads (an eighth of them by default);
            ``head``, a part of `offramp.exits` or one of the words ``"shared"``, ``"norm"``, ``"output"``, ``"adapter"``, ``"block"``,
            ``"trimmed"``, one for all or one each; ``kept``, ``texts`` and ``tokenizer`` for ``"trimmed"``: ids to keep, or texts to count
            in and how many to keep; ``system``, a published method. For a pipeline or a denoiser: ``system`` (needed), and see
            `offramp.engines.diffusion.model.attach_diffusion` for ``scheduler``, ``noise``, ``example``, ``heads`` and ``timestep``.

    Returns:
        The network with exits, on the model's device.

    Raises:
        InvalidInput: an option is out of range or belongs to another kind of model.
        UnsupportedModel: a language model cannot be decoded block by block; says why.
        NotCuttable: a path does not exist, is not reached or runs more than once.

    Example:
        >>> import torch, offramp
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> offramp.attach(model, at=["1"], example=torch.randn(2, 8)).at
        ('1',)
    """
    if isinstance(model, LanguageModel):
        raise InvalidInput(
            "This model has its exits already: attach was called on it before. Other exits go on the model itself, lm.model."
        )
    given = {**options, "at": at} if at is not None else options
    kind = next((k for k in KINDS if k.recognises(model, given)), None)
    if kind is None:
        if isinstance(model, str | os.PathLike):
            name = os.fspath(model)
            raise InvalidInput(
                f"attach takes a torch.nn.Module; got {type(model).__name__} {name!r}. Load what it names first: a language model with "
                f"transformers.AutoModelForCausalLM.from_pretrained({name!r}), a pipeline with diffusers.DiffusionPipeline.from_pretrained."
            )
        raise InvalidInput(
            f"attach takes a torch.nn.Module; got {type(model).__name__}. A pipeline is recognised by its scheduler and its transformer or "
            "unet."
        )
    if kind.made is DiffusionModel and not isinstance(options.get("system"), System):
        raise InvalidInput('A pipeline takes a diffusion method: attach(pipe, system=offramp.systems.build("deepcache")).')
    if kind.made is MultiExit and "example" not in options:
        raise InvalidInput(
            f"A {type(model).__name__} is cut into segments by running it once: give example=..., inputs as it takes them. A causal "
            "language model takes exits=[...] instead, numbers of blocks."
        )
    return _call(kind, "attach", model, **given)


def fit(net: Any, data: Any, recipe: Recipe | None = None, **options: Any) -> FitResult:
    """Train the exits of a network, and the network too if the recipe says so. See `offramp.train.loop.fit` for all options.

    Args:
        net: from `attach` or `load`.
        data: a loader. For a language model also: one text, a list of texts or of lists of token ids, the name of a file or a folder of
            texts or of a saved data set (a string that names none of these is a text), or blocks of tokens ``[N, T]``, a tensor or an array
            of whole numbers.
        recipe: how; by default that of the network's system, else `Joint`; for a language model, its exits alone learn what the model says.
        options: ``epochs`` (needed; 1 for a language model), ``output_dir``, ``optimizer``, ``mixed_precision``, ... For a language model
            also ``tokenizer`` for texts that are strings (by default the one saved on this machine where the model was loaded from),
            ``block`` (tokens of a block, 512), ``batch_size`` (8) and ``eval_data`` (in any form of ``data``).

    Returns:
        Metrics and where training ended. The weights are in ``net``.

    Raises:
        InvalidInput: an argument, a batch or its labels do not fit.
        MissingExtra: accelerate is not installed.
    """
    return _call(_kind_of(net, "fit"), "fit", net, data, recipe, **options)


def record(net: MultiExit, loader: Iterable[Any], **options: Any) -> Trace:
    """Run every exit on every item, once; what chooses or compares reads the trace. Options: see
    `offramp.engines.classify.record.record`.

    Args:
        net: from `attach` or `load`.
        loader: batches of items that were not trained on.
        options: ``rules``, ``keep_logits``, ``loss``, ``latency``, ``provenance``, ``progress``.

    Raises:
        InvalidInput: a batch does not fit, or the network has no trace.
    """
    return _call(_kind_of(net, "record"), "record", net, loader, **options)


@overload
def calibrate(trace: Trace, rule: Rule, target: Target, *, method: CostMethod | Procedure | None = None, level: float = 0.95) -> Plan: ...


@overload
def calibrate(trace: DiffusionModel, target: MeanCost | DriftLimit | Quality, **options: Any) -> DenoisingPlan: ...


def calibrate(trace: Any, *arguments: Any, **options: Any) -> Any:
    """Choose what meets a target: thresholds from a recorded trace, or what a diffusion method skips.

    Args:
        trace: what `record` gave; or a `DiffusionModel`.
        arguments: the rule and the target; for a diffusion method the target: `MeanCost`, `offramp.budget.DriftLimit` or
            `offramp.budget.Quality`. They may be named.
        options: of a trace ``method`` and ``level``, see `offramp.budget.calibrate`; of a diffusion method ``calls`` of the pipeline or
            ``noise``, ``steps``, ``data``, ..., see `offramp.engines.diffusion.calibrate.calibrate_denoiser`.

    Returns:
        A `Plan` or a `DenoisingPlan`, with requested and realised values; `compile` makes what runs it.

    Raises:
        BudgetInfeasible: no setting meets the target; carries the best achievable value.
        NotReplayable: a trace cannot stand for a run; says why.
        InvalidInput: an argument does not fit.

    Warns:
        NoEffectWarning: the plan changes nothing.
    """
    if isinstance(trace, DiffusionModel):
        return _call(_kind_of(trace, "calibrate"), "calibrate", trace, *arguments, **options)
    if isinstance(trace, Trace):
        return calibrate_trace(trace, *arguments, **options)
    if isinstance(trace, LanguageModel):
        raise InvalidInput(
            "A language model's exits are not calibrated from a trace. When tokens may leave is promised by "
            "offramp.budget.agreement.certify_agreement, which gives an AcceptPlan; drafts that are verified change no text and are "
            "planned by compile(lm, texts=...)."
        )
    raise InvalidInput(f"calibrate takes a trace that record() gave, or a DiffusionModel that attach() gave; got {type(trace).__name__}.")


@overload
def compile(net: MultiExit, plan: Plan, mode: Mode | None = None, **options: Any) -> Runner: ...  # noqa: A001


@overload
def compile(  # noqa: A001
    net: LanguageModel, plan: Way | SpeculationPlan | AcceptPlan | System | None = None, **options: Any
) -> TextGenerator: ...


@overload
def compile(net: DiffusionModel, plan: DenoisingPlan | None = None, **options: Any) -> Any: ...  # noqa: A001


def compile(net: Any, plan: Any = None, *rest: Any, **options: Any) -> Any:  # noqa: A001 - the verb, as in torch.compile
    """Make the engine that runs a plan.

    Args:
        net: from `attach` or `load`.
        plan: what `calibrate` gave. For a language model a way of decoding (`Plain`, `Verify`, `Accept`, ...), what a planner chose, a
            published method, or ``None``: drafts that are verified, planned here from ``texts=``. For a diffusion model ``None`` runs
            what calls of it do: the plan that `calibrate` found last, or the published settings.
        rest: the mode, of a network cut into segments: `LatencyMode` (default), `ThroughputMode` or `QuotaMode`.
        options: see `offramp.engines.classify.engine.compile`, and `offramp.engines.text.generator.text_generator` for language models
            (``texts``, ``tokenizer``, ``rows``, ``sampling``, ``margin``, ``captured``, ...). For a diffusion model ``captured`` (CUDA
            graphs; by default on CUDA) and ``compiled``.

    Returns:
        A `Runner`, to be called on batches; for a language model a `TextGenerator` with ``generate(prompts, ...)``; for a pipeline a
        pipeline of its own class and call, and for a denoiser alone one that is called as it is.

    Raises:
        InvalidInput: the plan is for another kind of network or for other exits.
        FingerprintMismatch: the plan was made for another model.
    """
    kind = _kind_of(net, "compile")
    if kind.made is MultiExit and not isinstance(plan, Plan):
        raise InvalidInput(f"compile runs a Plan, as calibrate() or never() gives it; got {plan!r}.")
    if kind.made is not MultiExit and rest:
        raise InvalidInput(f"compile of {kind.words} takes no mode; got {rest[0]!r}.")
    return _call(kind, "compile", net, plan, *rest, **options)


@overload
def load(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    example: Any,
    select: Callable[[Any], Tensor] = answer,
    system: System | None = None,
) -> MultiExit: ...


@overload
def load(model: Any, folder: str | os.PathLike[str]) -> LanguageModel: ...


def load(model: Any, folder: str | os.PathLike[str], **options: Any) -> Any:
    """Attach saved exits to the model they were trained on. What they are is told from the folder.

    Args:
        model: with the weights it had when the exits were saved.
        folder: what ``save`` of a `MultiExit`, a `LanguageModel` or a `DiffusionModel` wrote.
        options: ``example`` (needed), ``select`` and ``system`` for a `MultiExit`; a `LanguageModel` takes none; a denoiser alone takes
            ``scheduler`` or ``noise``, as for `attach`.

    Raises:
        FingerprintMismatch: the model has other weights.
        ArtifactError: the folder holds nothing of ours, or a file in it is truncated, altered or foreign.
    """
    found = [kind for kind in KINDS if kind.stem and (Path(folder) / f"{kind.stem}.json").is_file()]
    if len(found) != 1:
        what = "more than one saved network" if found else "no saved exits"
        raise ArtifactError(f"{folder} holds {what}: expected one of {', '.join(f'{k.stem}.json ({k.words})' for k in KINDS if k.stem)}.")
    if found[0].made is MultiExit and "example" not in options:
        raise InvalidInput(
            f"{folder} holds exits of a network that is cut into segments: give example=..., inputs as the model takes them."
        )
    return _call(found[0], "load", model, folder, **options)


PLANS: Mapping[str, Callable[..., Any]] = {
    "plan": load_network_plan,
    "denoising_plan": DenoisingPlan.load,
    "speculation_plan": SpeculationPlan.load,
    "accept_plan": lambda folder: AcceptPlan.load(folder, policies.PARTS | policies.WAYS),
}
"""What reads a plan, by the stem of its file."""


def load_plan(folder: str | os.PathLike[str]) -> Plan | DenoisingPlan | SpeculationPlan | AcceptPlan:
    """Read a plan that was saved, for `compile`: of a network cut into segments, of a diffusion method, or of a language model.

    Raises:
        ArtifactError: there is none or more than one, or a file is truncated, altered or foreign.
    """
    found = [stem for stem in PLANS if (Path(folder) / f"{stem}.json").is_file()]
    if len(found) != 1:
        what = f"{len(found)} plans ({', '.join(found)}); give each a folder of its own" if found else "no plan"
        raise ArtifactError(f"{folder} holds {what}. Expected one of {', '.join(f'{stem}.json' for stem in PLANS)}.")
    plan: Plan | DenoisingPlan | SpeculationPlan | AcceptPlan = PLANS[found[0]](folder)
    return plan


def report(path: str | os.PathLike[str], **about: Any) -> Path:
    """Write one self-contained HTML file.

    Args:
        path: the file.
        about: ``trace=...`` for a network cut into segments: see `offramp.measure.report.report`. ``generation=...`` for texts, with
            ``tokenizer`` and ``blocks`` (or the `LanguageModel` as ``lm``): see `offramp.measure.text_report.text_report`. ``plan=...``
            alone for a diffusion method calibrated for a `offramp.budget.Quality`, with ``features``, ``images``, ``depths`` and
            ``noise``: see `offramp.measure.image_report.image_report`.

    Returns:
        The path.

    Raises:
        InvalidInput: none or several of them were given, or something does not fit.
    """
    told: list[str] = [name for name in ("trace", "generation") if name in about]
    if not told and "plan" in about:  # beside a trace it is a classifier's
        told = ["plan"]
    if len(told) != 1:
        raise InvalidInput(
            "A report is about trace=... (recorded exits, with their plan=... or without), generation=... (texts that were written) or "
            f"plan=... alone (images, of a plan for a Quality), one of them; got {', '.join(about) or 'none'}."
        )
    if told == ["trace"]:
        return trace_report(path, **about)
    if told == ["plan"]:
        plan = about.pop("plan")
        if not isinstance(plan, DenoisingPlan) or len(found := plan.results()) < 2:
            raise InvalidInput("plan=... alone takes what calibrate(fast, Quality(...)) gave: of other plans no FID is known.")
        return image_report(path, full=found[0], results=found[1:], **about)
    lm = about.pop("lm", None)
    if lm is not None:
        about.setdefault("blocks", len(lm.decoder))
    if "blocks" not in about:
        raise InvalidInput("A report of texts needs to know how deep the model is: give lm=..., what attach made, or blocks=....")
    return text_report(path, **about)


__all__ = ["HEADS", "KINDS", "Kind", "attach", "compile", "fit", "load", "record", "report"]
