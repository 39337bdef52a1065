"""``offramp export-draft`` and the report of ``offramp generate``, on a small model and tokenizer saved on the spot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result

from language_models import build, own_greedy, word_tokenizer
from offramp.exits.cached import Adapter
from offramp.exits.lm import OwnNorm
from offramp.language import attach_lm

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
Call = Callable[..., Result]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("language") / "llama"
    build("llama").save_pretrained(path)
    word_tokenizer().save_pretrained(path)
    return path


def test_the_draft_assists_the_model(offramp: Call, folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    attach_lm(model, [1, 2], [Adapter(), OwnNorm()]).save(tmp_path / "heads")
    out = tmp_path / "draft"
    result = offramp("export-draft", "--model", folder, "--heads", tmp_path / "heads", "--exit", 2, "--out", out)
    assert result.exit_code == 0 and "2 of 4" in result.output, result.output
    draft = AutoModelForCausalLM.from_pretrained(out)
    ids = AutoTokenizer.from_pretrained(out)("w3 w9")["input_ids"]
    assert torch.equal(own_greedy(model, [ids], 9, assistant_model=draft), own_greedy(model, [ids], 9))
    result = offramp("export-draft", "--model", folder, "--out", out)
    assert result.exit_code == 2 and "give --overwrite to" in result.output and "True" not in result.output
    assert offramp("export-draft", "--model", folder, "--out", out, "--overwrite").exit_code == 0
    assert AutoModelForCausalLM.from_pretrained(out).config.num_hidden_layers == 1
    result = offramp("export-draft", "--model", folder, "--heads", tmp_path / "heads", "--exit", 1, "--out", tmp_path / "other")
    assert result.exit_code != 0 and "no feed-forward" in result.output


def test_texts_in_colours(offramp: Call, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    words = ("--max-new-tokens", 5, "--mode", "verify", "--device", "cpu", "--report", tmp_path / "texts.html")
    result = offramp("generate", "--model", folder, "--prompt", "w3 w9", *words)
    assert result.exit_code == 0, result.output
    text = (tmp_path / "texts.html").read_text()
    assert text.count('title="token ') == 5 and "w3 w9" in text
