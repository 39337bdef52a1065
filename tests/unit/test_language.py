"""Exits of a language model as a file: the added weights alone, on the model they were trained on, or refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from offramp.core.errors import ArtifactError, FingerprintMismatch, InvalidInput
from offramp.exits.cached import Adapter, Block
from offramp.exits.lm import OwnNorm, OwnOutput, Shared, Trimmed
from offramp.language import LanguageModel, attach_lm, load_lm

HEADS = [Shared(), OwnNorm(), Trimmed((3, 1, 2)), Adapter(heads=2), Block(fresh=True)]


@pytest.fixture
def model() -> Any:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=6, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def made(model: Any) -> Any:
    lm = attach_lm(model, [1, 2, 3, 4, 5], HEADS)
    with torch.no_grad():
        for p in lm.heads.parameters():
            p.add_(torch.randn_like(p))
    return lm


def test_a_loaded_model_drafts_as_the_saved_one(model, tmp_path):
    lm = made(model)
    lm.save(tmp_path)
    back = load_lm(model, tmp_path)
    assert back.exits == lm.exits and back.specs == lm.specs == tuple(Trimmed(h.kept) if isinstance(h, Trimmed) else h for h in HEADS)
    states = torch.randn(2, 5, 16)
    for k in range(len(HEADS)):
        assert torch.equal(back.teach(states, k), lm.teach(states, k))


def test_only_added_weights_are_written(model, tmp_path):
    attach_lm(model, [2], Shared()).save(tmp_path / "none")
    assert [p.name for p in (tmp_path / "none").iterdir()] == ["lm.json"]
    assert load_lm(model, tmp_path / "none").exits == (2,)
    lm = attach_lm(model, [2], OwnNorm())
    lm.save(tmp_path / "norm")
    assert json.loads((tmp_path / "norm" / "lm.json").read_text())["tensors"]["names"] == ["0.norm.weight"]


def test_another_model_is_refused(model, tmp_path):
    made(model).save(tmp_path)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    with pytest.raises(FingerprintMismatch, match="Load the weights the exits were trained on"):
        load_lm(model, tmp_path)


def test_damaged_and_foreign_files_are_refused(model, tmp_path):
    lm = made(model)
    lm.save(tmp_path)
    arrays, described = tmp_path / "lm.safetensors", tmp_path / "lm.json"
    good, text = arrays.read_bytes(), described.read_text()
    arrays.write_bytes(good[:-7])
    with pytest.raises(ArtifactError, match="truncated or was altered"):
        load_lm(model, tmp_path)
    arrays.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(ArtifactError, match="truncated or was altered"):
        load_lm(model, tmp_path)
    arrays.write_bytes(good)
    described.write_text(text[: len(text) // 2])
    with pytest.raises(ArtifactError, match="not JSON"):
        load_lm(model, tmp_path)
    described.write_text(text.replace('"after": 1', '"after": 0'))
    with pytest.raises(ArtifactError, match="was altered"):
        load_lm(model, tmp_path)
    record = json.loads(text)
    described.write_text(json.dumps(record | {"kind": "adapter"}))
    with pytest.raises(ArtifactError, match="was expected"):
        load_lm(model, tmp_path)
    with pytest.raises(ArtifactError, match="No file"):
        load_lm(model, tmp_path / "nothing")


def test_a_failed_save_leaves_the_old_file(model, tmp_path, monkeypatch):
    lm = made(model)
    lm.save(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("offramp.core.bundle.save_file", fail)
    with torch.no_grad():
        next(lm.heads.parameters()).add_(1)
    with pytest.raises(OSError, match="disk full"):
        lm.save(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_heads_must_be_parts_and_one_each(model):
    with pytest.raises(InvalidInput, match="2 heads were given for 1 exits"):
        attach_lm(model, [2], [Shared(), Shared()])
    with pytest.raises(InvalidInput, match="A head is a part"):
        attach_lm(model, [2], [Shared])
    for wrong in ([], [0], [6], [3, 2], [1.5], ["1"], [True], [2, 2]):
        with pytest.raises(InvalidInput, match="ascending numbers of blocks from 1 to 5"):
            attach_lm(model, wrong)
    for right in ((1, 3), range(1, 4, 2), torch.tensor([1, 3])):
        assert attach_lm(model, right).exits == (1, 3)


def test_heads_given_as_modules_cannot_be_saved(model, tmp_path):
    lm = attach_lm(model, [2])
    with pytest.raises(InvalidInput, match="given as modules"):
        LanguageModel(lm.decoder, lm.exits, list(lm.heads)).save(tmp_path)


def test_an_output_layer_of_its_own_comes_back(model, tmp_path):
    lm = attach_lm(model, [2], OwnOutput())
    states = torch.randn(2, 3, 16)
    assert torch.equal(lm.draft(states), attach_lm(model, [2]).draft(states))
    with torch.no_grad():
        lm.heads[0].output.weight.add_(1)
    assert not torch.equal(lm.draft(states), attach_lm(model, [2]).draft(states))
    lm.save(tmp_path)
    assert torch.equal(load_lm(model, tmp_path).draft(states), lm.draft(states))
