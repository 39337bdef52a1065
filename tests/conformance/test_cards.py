"""Every file in systems/ has the same form, a row in `cases` and a reproduction; every card says true and checkable things."""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
from pathlib import Path

import pytest

from offramp import systems
from offramp.cli.reproduce import Settings
from offramp.cli.reproduce_images import ImageSettings
from offramp.cli.reproduce_text import TextSettings
from offramp.cli.reproduce_unmask import UnmaskSettings
from offramp.core.parts import part_to_dict
from offramp.core.system import Card, System
from offramp.network import attach

sys.path.insert(0, str(Path(__file__).parent))
from cases import CASES, Case

NAMES = systems.list_systems()
CONFIGS = Path(__file__).resolve().parents[2] / "benchmarks" / "configs"
CLASSIFY, GENERATE, UNMASK, DENOISE = (
    [n for n in NAMES if systems.load_card(n).engine == engine] for engine in ("classify", "generate", "unmask", "denoise")
)
METRICS = {
    "classify": {"accuracy", "drop", "gain_over_fixed", "gain_over_random", "gain_over_static", "excess"},
    "generate": {"agreement", "perplexity_ratio", "acceptance", "tokens_per_round", "blocks_share", "speedup", "gain_over_fixed",
                 "gain_over_static", "excess"},
    "unmask": {"agreement", "gain_over_fixed"},
    "denoise": {"fid_ratio", "gain_over_steps", "gain_over_schedule", "gain_over_random", "gain_over_shallow", "explained", "excess"},
}  # fmt: skip
AXIS_OF = {
    "rule": "rule",
    "score": "rule",
    "head": "head",
    "axis": "placement",
    "train": "recipe",
    "calibrate": "calibrator",
    "fill": "fill",
    "draft": "draft",
    "threshold": "threshold",
    "skips": "skips",
}
"""What cards call an axis, and the field of a system it is."""


def tree(name: str) -> ast.Module:
    return ast.parse(systems.source(name).read_text(encoding="utf-8"))


def test_one_row_per_system() -> None:
    assert sorted(case.system for case in CASES) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_card(name: str) -> None:
    card = systems.load_card(name)
    assert isinstance(card, Card)
    assert card.name == name == systems.source(name).stem.replace("_", "-")
    for field in ("title", "authors", "venue", "claim", "bibtex"):
        assert getattr(card, field).strip(), field
    assert 1990 <= card.year <= 2100
    assert card.arxiv == "" or re.fullmatch(r"\d{4}\.\d{4,5}", card.arxiv)
    assert card.delta_from == "" or card.delta_from in NAMES
    assert bool(card.delta_from) == bool(card.delta)
    assert card.predicate is not None and card.predicate.metric in METRICS[card.engine]


@pytest.mark.parametrize("name", NAMES)
def test_bibtex(name: str) -> None:
    card = systems.load_card(name)
    entry = inspect.cleandoc(card.bibtex)
    assert re.match(r"@\w+\{\w+,\n", entry) and entry.endswith("}")
    assert entry.count("{") == entry.count("}")
    fields = dict(re.findall(r"^\s*(\w+)\s*=\s*\{(.*)\},?$", entry, flags=re.MULTILINE))
    assert fields["year"] == str(card.year)
    assert fields["title"].replace("{", "").replace("}", "") == card.title
    surnames = [author.split(",")[0].strip() for author in fields["author"].split(" and ")]
    assert all(surname in card.authors for surname in surnames) and len(surnames) == len(card.authors.split(", "))


@pytest.mark.parametrize("name", NAMES)
def test_form_of_the_file(name: str) -> None:
    card, text, module = systems.load_card(name), systems.source(name).read_text(encoding="utf-8"), tree(name)
    assert len(text.splitlines()) <= 140
    doc = ast.get_docstring(module) or ""
    assert re.search(r"^Delta", doc, re.M) and re.search(r"^Deviations", doc, re.M) and re.search(r"^Reference: ", doc, re.M)
    assert not card.arxiv or f"arXiv:{card.arxiv}" in doc
    assert not re.search(r"\d\s*(x|times)\b.{0,12}(fast|speed)|speed-?up of", text, re.I), "figures live in benchmarks/results"
    public = [n.name for n in module.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.name.startswith("_")]
    assert public == [systems.source(name).stem], "one public name beside CARD: the builder, named like the file"


@pytest.mark.parametrize("name", NAMES)
def test_imports(name: str) -> None:
    for node in ast.walk(tree(name)):
        target = node.module if isinstance(node, ast.ImportFrom) else None
        imported = [a.name for a in node.names] if isinstance(node, ast.Import) else [target] if target else []
        for module in imported:
            assert not re.match(r"offramp\.(engines|backbones|systems|cli|serve|network|language)", str(module)), module


@pytest.mark.parametrize("name", NAMES)
def test_builder(name: str) -> None:
    builder = next(n for n in tree(name).body if isinstance(n, ast.FunctionDef) and n.name == systems.source(name).stem)
    doc = ast.get_docstring(builder) or ""
    arguments = [a.arg for a in (*builder.args.args, *builder.args.kwonlyargs)]
    for argument in arguments:
        assert re.search(rf"^\s+{argument}: ", doc, re.M), argument
    built = systems.build(name)
    assert isinstance(built, System) and built.card is systems.load_card(name)
    for axis in systems.AXES:
        json.dumps(part_to_dict(getattr(built, axis)))


@pytest.mark.parametrize("name", [n for n in NAMES if systems.load_card(n).delta_from])
def test_named_delta_is_the_computed_one(name: str) -> None:
    card = systems.load_card(name)
    computed = {d.axis.split(".")[0] for d in systems.diff(card.delta_from, name)} - {"target"}
    assert {AXIS_OF[axis] for axis in card.delta or {}} == computed


@pytest.mark.parametrize("name", CLASSIFY)
def test_reproduction(name: str) -> None:
    path = CONFIGS / f"{name}.toml"
    assert {"digits"} < set(Settings.variants(path))
    predicate = systems.load_card(name).predicate
    for variant in Settings.variants(path):
        settings = Settings.load(path, variant)
        assert systems.build(name, **settings.system).card.name == name
        assert settings.smaller and len(settings.seeds) >= 3 and len(settings.budgets) >= 5
        assert predicate is not None and (predicate.budget is None or 0 < predicate.budget <= 1)


@pytest.mark.parametrize("name", GENERATE)
def test_reproduction_of_text(name: str) -> None:
    path = CONFIGS / f"{name}.toml"
    assert set(TextSettings.variants(path)) == {"tiny", "books"}
    for variant in TextSettings.variants(path):
        settings = TextSettings.load(path, variant)
        built = systems.build(name, **settings.system)
        assert settings.smaller and len(settings.seeds) >= 3
        if built.card.lossless:
            assert systems.way(built) == built.draft
        for blocks in getattr(getattr(built.fill, "schedule", None), "blocks", None), getattr(built.recipe, "blocks", None):
            assert blocks is None or blocks == settings.blocks, "the builder's blocks are those of the variant"


@pytest.mark.parametrize("name", UNMASK)
def test_reproduction_of_masks_filled_in(name: str) -> None:
    path = CONFIGS / f"{name}.toml"
    assert set(UnmaskSettings.variants(path)) == {"tiny", "books"}
    for variant in UnmaskSettings.variants(path):
        settings = UnmaskSettings.load(path, variant)
        assert len(settings.seeds) >= 3 and len(settings.intervals) >= 5, "the control"
        for key, values in settings.sweep.items():
            assert all(systems.build(name, **{**settings.system, key: value}).card.name == name for value in values)


@pytest.mark.parametrize("name", DENOISE)
def test_reproduction_of_images(name: str) -> None:
    path = CONFIGS / f"{name}.toml"
    assert set(ImageSettings.variants(path)) == {"tiny", "cifar"}
    for variant in ImageSettings.variants(path):
        settings = ImageSettings.load(path, variant)
        assert len(settings.seeds) >= 3 and settings.budgets == (0.75, 0.6, 0.5)
        predicate = systems.load_card(name).predicate
        assert predicate is not None and (predicate.budget is None or predicate.budget in settings.budgets)
        assert systems.build(name, **settings.system).card.name == name


@pytest.mark.parametrize("case", [c for c in CASES if c.system in CLASSIFY], ids=lambda c: c.system)
def test_attaches_to_its_backbone(case: Case) -> None:
    built = systems.build(case.system, **case.kwargs)
    model = case.model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    net = attach(model, example=case.inputs(2, 0), system=built)
    inputs = case.inputs(3, 1)
    net.eval()
    logits = net(**inputs) if isinstance(inputs, dict) else net(inputs)
    assert [tuple(z.shape) for z in logits] == [(3, case.classes)] * len(net.names) and len(net.names) >= 3
    alone = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    assert (logits[-1] == alone).all()
    assert all((v == before[k]).all() for k, v in net.detach().state_dict().items())
