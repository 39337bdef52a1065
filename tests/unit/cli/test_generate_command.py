"""``offramp generate`` on a small model and tokenizer saved on the spot."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

from language_models import build, byte_tokenizer, own_greedy, word_tokenizer
from offramp.cli.generate import EXIT_STYLE, FULL_STYLE, PROMPT_STYLE, coloured, pieces
from offramp.cli.records import reason
from offramp.engines.text.generator import TextGenerator, text_generator
from offramp.language import attach_lm

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
Call = Callable[..., Result]
TEXTS = ("w3 w9 w1", "w5")


@pytest.fixture(scope="module")
def model() -> Any:
    made = build("llama", eos_token_id=None)
    with torch.no_grad():  # so that the exit after the second block is right
        for block in made.model.layers[2:]:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    return made


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("language") / "llama"
    model.save_pretrained(path)
    word_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def write(offramp: Call, folder: Path) -> Call:
    """The command with the model and both prompts."""

    def call(*words: object, prompts: tuple[str, ...] = TEXTS) -> Result:
        return offramp("generate", "--model", folder, *[w for p in prompts for w in ("--prompt", p)], "--device", "cpu", *words)

    return call


def expected(model: Any, new: int) -> list[str]:
    tokenizer = word_tokenizer()
    found = own_greedy(model, [tokenizer(t)["input_ids"] for t in TEXTS], new)
    return [tokenizer.decode(row, skip_special_tokens=True) for row in found]


@pytest.mark.parametrize(
    "how",
    [
        [],
        ["--mode", "verify", "--exit", 1, "--draft-length", 3],
        ["--mode", "verify", "--stop-below", 0.5],
        ["--mode", "accept", "--exit", 2],
        ["--mode", "accept", "--exit", 2, "--fill", "recompute", "--cap", 2],
        ["--mode", "accept", "--exit", 2, "--threshold", 1.1, "--fill", "copy"],
    ],
)
def test_texts_are_the_models_own(write: Call, model: Any, how: list[object]) -> None:
    result = write("--max-new-tokens", 9, *how)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == expected(model, 9)


def test_show(write: Call, tmp_path: Path) -> None:
    out = tmp_path / "written.json"
    result = write("--max-new-tokens", 9, "--mode", "verify", "--exit", 2, "--draft-length", 3, "--show", "--out", out)
    assert result.exit_code == 0, result.output
    assert re.search(r"2 of 4 +│ +12 │ +66\.67 %", result.output), result.output
    assert re.search(r"4 of 4 +│ +6 │ +33\.33 %", result.output)
    for place in (1, 2, 3):
        assert re.search(rf"\b{place} +│ +4 │ +4 │ +100\.00 %", result.output)
    assert "4.50 tokens for each pass" in result.output and "100.00 % of drafts kept" in result.output
    record = json.loads(out.read_text())
    assert record["mode"] == "verify" and record["drafted"] == record["accepted"] == [4, 4, 4] and record["deep_passes"] == 2
    assert [len(t) for t in record["tokens"]] == [9, 9] and record["depth"][0] == [4, 2, 2, 2, 4, 2, 2, 2, 4]


def test_show_what_accepting_costs(write: Call) -> None:
    result = write("--max-new-tokens", 9, "--mode", "accept", "--exit", 1, "--threshold", 0, "--show")
    assert re.search(r"16 tokens left early; the model would have chosen otherwise for \d+ \(", result.output), result.output
    assert "Ran 100.00 % of the blocks that plain decoding runs." in result.output


MODES = {
    "plain": ["--mode", "plain"],
    "verify": ["--mode", "verify", "--exit", 2],
    "accept": ["--mode", "accept", "--exit", 1, "--threshold", 0.07],
    "accept, sampled": ["--mode", "accept", "--exit", 1, "--threshold", 0.07, "--do-sample", "--temperature", 0.7],
    "recompute": ["--mode", "accept", "--exit", 1, "--threshold", 0.07, "--fill", "recompute"],
}


@pytest.mark.parametrize("how", MODES)
def test_captured_rounds_write_and_show_the_same(write: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """As on CUDA, where the generator captures by default."""
    made: list[TextGenerator] = []

    def captured(*given: Any, **options: Any) -> TextGenerator:
        made.append(text_generator(*given, **options, captured=True))
        assert options["compiled"] is False, "compiling pays for long texts alone"
        return made[-1]

    def written(name: str) -> tuple[str, dict[str, Any]]:
        result = write("--max-new-tokens", 9, *MODES[how], "--show", "--out", tmp_path / name, "--report", tmp_path / f"{name}.html")
        assert result.exit_code == 0, result.output
        return result.stdout.split("Ran ")[0], json.loads((tmp_path / name).read_text())

    shown, record = written("reference.json")
    monkeypatch.setattr("offramp.cli.generate.text_generator", captured)
    again, found = written("captured.json")
    assert made[0].captures == (0 if how == "recompute" else 1)
    assert again == shown
    for name in ("tokens", "depth", "drafted", "accepted", "audited", "disagreed"):
        assert found[name] == record[name], name
    assert not how.startswith("accept") or 0 < found["audited"] < 16


def test_show_what_copying_saves(write: Call, tmp_path: Path) -> None:
    out = tmp_path / "written.json"
    result = write("--max-new-tokens", 9, "--mode", "accept", "--exit", 1, "--threshold", 0, "--fill", "copy", "--show", "--out", out)
    said = " ".join(result.output.split())  # lines break where the terminal ends
    assert "Ran 25.00 % of the blocks that plain decoding runs, and keys and values alone of others." in said, result.output
    assert "left early" not in result.output  # nobody has looked at them since
    record = json.loads(out.read_text())
    assert (record["blocks_run"], record["blocks_projected"], record["blocks_plain"]) == (16, 48, 64)
    assert [len(row) for row in record["scores"]] == [9, 9] and record["scores"][0][0] is None
    assert all(0 < score <= 1 for score in record["scores"][0][1:])


def test_sampling_follows_the_seed(write: Call) -> None:
    flags = ("--do-sample", "--temperature", 2, "--top-k", 0, "--top-p", 0.9, "--repetition-penalty", 1.2)
    first = write(*flags, "--seed", 1).stdout
    assert first == write(*flags, "--seed", 1).stdout
    assert first != write(*flags, "--seed", 2).stdout


def test_stop(write: Call, model: Any) -> None:
    words = expected(model, 9)[0].split()
    result = write("--max-new-tokens", 9, "--stop", words[5], prompts=TEXTS[:1])
    assert result.stdout.split() == words[: words.index(words[5], 3) + 1]


def test_trained_exits(write: Call, folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    attach_lm(AutoModelForCausalLM.from_pretrained(folder), [1, 2]).save(tmp_path / "heads")
    result = write("--mode", "verify", "--heads", tmp_path / "heads", "--exit", 2, "--max-new-tokens", 5, "--show")
    assert result.exit_code == 0 and "2 of 4" in result.output
    result = write("--mode", "verify", "--heads", tmp_path / "heads", "--exit", 3)
    assert result.exit_code == 2 and "exits after 1, 2 blocks, not after 3" in result.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mode", "guess"], "--mode is one of plain, accept, verify"),
        (["--mode", "audit"], "accept audits"),
        (["--mode", "accept", "--fill", "guess"], "--fill is one of catch-up, recompute, copy"),
        (["--dtype", "float8"], "--dtype is one of"),
        (["--mode", "verify", "--exit", 4], "from 1 to 3"),
        (["--temperature", -1], "temperature"),
        (["--stop-below", 2, "--mode", "verify"], "eta must be in"),
        (["--max-new-tokens", 3, "--device", "nowhere"], "cannot be used here"),
    ],
)
def test_bad_input(write: Call, words: list[object], message: str) -> None:
    result = write(*words)
    assert result.exit_code == 2 and message in result.output, result.output


def test_no_model(offramp: Call, tmp_path: Path) -> None:
    result = offramp("generate", "--model", tmp_path, "--prompt", "w1")
    assert result.exit_code == 2 and "No causal language model" in result.output


def test_no_tokenizer(offramp: Call, model: Any, tmp_path: Path) -> None:
    """Where the library's reason is a list behind a colon, it is said whole."""
    model.save_pretrained(tmp_path)
    result = offramp("generate", "--model", tmp_path, "--prompt", "w1", "--device", "cpu")
    said = " ".join(result.output.split())
    assert result.exit_code == 2 and "holds a language model and no tokenizer" in said and "tokenizer.save_pretrained(folder)" in said, said
    assert not re.search(r": Save the model's", said), said


def test_reasons_of_other_libraries() -> None:
    assert reason(ValueError("No file at x\nmuch more")) == "No file at x."
    assert reason(ValueError("One of: \n(1) this, \n(2) that.\n")) == "One of: (1) this, (2) that."
    assert reason(KeyError()) == "KeyError."


@pytest.mark.parametrize("spec", ["hf:{}:AutoModelForCausalLM", "python:{}/net.py:make"])
def test_fitting_says_where_language_models_are_trained(offramp: Call, folder: Path, tmp_path: Path, spec: str) -> None:
    (tmp_path / "net.py").write_text(
        f"from transformers import AutoModelForCausalLM\n\ndef make():\n    return AutoModelForCausalLM.from_pretrained({str(folder)!r})\n"
    )
    (tmp_path / "texts.tsv").write_text("text\tlabel\nw1 w2\tgood\nw3 w4\tbad\n")
    given = spec.format(folder if spec.startswith("hf") else tmp_path)
    result = offramp("fit", "--model", given, "--data", tmp_path / "texts.tsv", "--tokenizer", folder, "--out", tmp_path / "run")
    said = " ".join(result.output.split())
    assert result.exit_code == 2 and "offramp.fit(lm" in said and "docs/language-models.md" in said, said


class TestPieces:
    def test_add_up_to_the_text(self) -> None:
        tokenizer = word_tokenizer()
        assert pieces(tokenizer, [5], [7, 8, 2, 9]) == [" w3", " w4", "", " w5"]
        assert pieces(tokenizer, [5], []) == []

    def test_a_character_of_several_tokens_comes_with_its_last(self) -> None:
        tokenizer = byte_tokenizer()
        ids = tokenizer.convert_tokens_to_ids(["a", "Ã", "©", "b"])
        assert pieces(tokenizer, ids[:1], ids) == ["a", "", "é", "b"]

    def test_colours(self) -> None:
        text = coloured("[w1]", [" w3", " [x]", " w5"], [4, 2, 4], blocks=4)
        assert text.plain == "[w1] w3 [x] w5" and str(text.style) == PROMPT_STYLE
        found = [(text.plain[s.start : s.end], s.style) for s in text.spans]
        assert found == [(" w3", FULL_STYLE), (" [x]", EXIT_STYLE), (" w5", FULL_STYLE)]
