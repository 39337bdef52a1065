"""Reproductions of systems that fill in masks: settings, and a whole one on a text that is made up."""

from __future__ import annotations

import dataclasses
import json
import lzma
import random
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from masked_models import MASK, looking_both_ways
from offramp import systems
from offramp.cli import app
from offramp.cli.reproduce_unmask import MASKS, UnmaskSettings, judged, read_text, table_rows
from offramp.core.errors import InvalidInput

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

CONFIG = Path(__file__).resolve().parents[3] / "benchmarks" / "configs" / "elastic-cache.toml"


@pytest.fixture
def text(tmp_path: Path) -> str:
    """Words that follow one another in a fixed order, from anywhere in it."""
    words = ["alpha ", "beta ", "gamma ", "delta "]
    source = random.Random(0)
    lines = ["".join(words[(source.randrange(4) + k) % 4] for k in range(source.randrange(3, 9))) for _ in range(400)]
    path = tmp_path / "words.txt.xz"
    path.write_bytes(lzma.compress("\n".join(lines).encode()))
    return str(path)


def small(**options: object) -> UnmaskSettings:
    given = UnmaskSettings(
        blocks=3, width=32, heads=2, steps=12, length=32, batch_size=8, prompts=3, prompt_length=8, new_tokens=12, intervals=(2, 4, 64),
        block_size=4, draws=2, timed=1, rounds=1, sweep={"drift": (-2.0, 0.9, 1.1)}, seeds=(0, 1), system={"window": 4, "confidence": 0.3},
    )  # fmt: skip
    return dataclasses.replace(given, **options)  # type: ignore[arg-type]


def test_a_whole_one(text: str) -> None:
    said: list[str] = []
    result = MASKS.run("elastic-cache", small(), variant="tiny", data=text, say=said.append)
    again = json.loads(json.dumps(result))
    assert again["system"] == "elastic-cache" and again["verdict"] and len(again["seeds"]) == 2 and said
    for seed in result["seeds"]:
        never, middle, always = seed["budgets"]
        assert always["agreement"] == always["same_text"] == 1.0 and always["cost"] > 1.0
        assert never["refresh_rate"] == 0.0 and never["cost"] < 1.0 and never["share"] <= middle["share"] <= always["share"]
        assert seed["full"]["cost"] == seed["full"]["agreement"] == 1.0 and seed["blocks"][0]["agreement"] == 1.0
        assert [r["name"] for r in seed["fixed"]] == ["every 2 steps", "every 4 steps", "every 64 steps"]
        assert all(0 <= r["agreement"] <= 1 and r["nll"] > 0 for r in (*seed["fixed"], *seed["blocks"], *seed["budgets"]))
    columns, rows = table_rows(result)
    assert len(rows) == 3 + 3 + 3 and all(len(r) == len(columns) for r in rows)


def test_the_configuration_is_one() -> None:
    assert set(UnmaskSettings.variants(CONFIG)) == {"tiny", "books"}
    for variant in UnmaskSettings.variants(CONFIG):
        settings = UnmaskSettings.load(CONFIG, variant)
        assert len(settings.seeds) >= 3 and settings.sweep["drift"] and len(settings.intervals) >= 5
        for drift in settings.sweep["drift"]:
            assert systems.build("elastic-cache", **settings.system, drift=drift).fill.refresh.drift == drift


def test_texts_are_judged_by_what_follows_the_prompt_alone() -> None:
    model = looking_both_ways("llama", torch.float32)
    tokens = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))
    both, first = judged(model, tokens, 4, MASK, 3), judged(model, tokens[:1], 4, MASK, 3)
    assert both.shape == (2,) and (both > 0).all() and first.shape == (1,)


@pytest.mark.parametrize(
    ("change", "said"),
    [({"steps": 0}, "at least 1"), ({"seeds": ()}, "must not be empty"), ({"new_tokens": 1}, "new_tokens and length 2")],
)
def test_settings_that_are_refused(change: dict[str, object], said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        small(**change)


def test_texts_that_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(InvalidInput, match="--data"):
        read_text(small(), None)
    with pytest.raises(InvalidInput, match="No text at"):
        read_text(small(), str(tmp_path / "none.txt"))
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(InvalidInput, match="too few"):
        read_text(small(), str(tmp_path / "short.txt"))
    assert read_text(small(), text).alphabet == "".join(sorted(set("alpha beta gamma delta \n")))


def test_from_the_command_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "elastic-cache.toml").write_text(
        "seeds = [0]\nintervals = [2]\n[sweep]\ndrift = [0.9]\n[tiny]\nblocks = 2\nwidth = 16\nheads = 2\nsteps = 2\nlength = 16\n"
        "prompts = 2\nprompt_length = 4\nnew_tokens = 4\ndraws = 1\ntimed = 1\nrounds = 1\n"
    )
    given = ["reproduce", "elastic-cache", "--data", text, "--device", "cpu"]
    result = CliRunner().invoke(app, [*given, "--configs", str(tmp_path / "configs"), "--results", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "every 2 steps" in result.output and "claim" in result.output
    saved = json.loads((tmp_path / "elastic-cache--tiny--cpu.json").read_text())
    assert saved["system"] == "elastic-cache" and saved["settings"]["blocks"] == 2
