"""Exits of a language model as a file: the added weights alone, on the model they were trained on, or refused."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from offramp.backbones.decoder import ATTENTION
from offramp.core.bundle import load_bundle, save_bundle
from offramp.core.errors import ArtifactError, FingerprintMismatch, InvalidInput
from offramp.engines.text.generate import generate
from offramp.exits.cached import Adapter, Block
from offramp.exits.lm import OwnNorm, OwnOutput, Shared, Trimmed
from offramp.language import LanguageModel, attach_lm, load_lm
from offramp.policies.decoding import Verify

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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_weights_in_a_lower_precision_pass(model, tmp_path, dtype):
    lm = made(model)
    lm.save(tmp_path)
    low = copy.deepcopy(model).to(dtype)
    back = load_lm(low, tmp_path)
    assert {p.dtype for p in back.heads.parameters()} == {dtype}, "heads have the model's precision"
    for mine, theirs in zip(back.heads.parameters(), lm.heads.parameters(), strict=True):
        assert torch.equal(mine, theirs.to(dtype))
    back.check_heads()
    assert load_lm(low.float(), tmp_path).exits == lm.exits, "the rounded weights, held in float32"
    with torch.no_grad():
        low.to(dtype).lm_head.weight[0, 0] *= 1.01
    with pytest.raises(FingerprintMismatch, match="Load the weights the exits were trained on"):
        load_lm(low, tmp_path)


def test_weights_that_only_round_alike_are_other_weights(model, tmp_path):
    made(model).save(tmp_path / "high")
    other = copy.deepcopy(model)
    with torch.no_grad():
        weight = other.lm_head.weight[0, 0].clone()
        near = torch.nextafter(weight, torch.zeros(()))
        near = near if near.bfloat16() == weight.bfloat16() else torch.nextafter(weight, 2 * weight)
        other.lm_head.weight[0, 0] = near
    assert near != weight and near.bfloat16() == weight.bfloat16()
    with pytest.raises(FingerprintMismatch, match="Load the weights the exits were trained on"):
        load_lm(other, tmp_path / "high")
    # Exits of the rounded model are for the rounded weights, whatever holds them, and not for those they were rounded from.
    low = copy.deepcopy(model).bfloat16()
    made(low).save(tmp_path / "low")
    assert load_lm(low.float(), tmp_path / "low").heads[1].norm.weight.dtype == torch.float32
    with pytest.raises(FingerprintMismatch, match=r"these weights rounded to bfloat16.*dtype=torch\.bfloat16"):
        load_lm(model, tmp_path / "low")


def test_files_that_know_no_roundings_say_that_it_may_be_the_precision(model, tmp_path):
    lm = made(model)
    lm.save(tmp_path)
    content, tensors = load_bundle(tmp_path, "lm", "lm exits")
    old = {k: v for k, v in content.items() if k not in ("rounded", "dtype")}
    save_bundle(tmp_path, "lm", "lm exits", old, tensors)
    assert load_lm(model, tmp_path).exits == lm.exits
    with pytest.raises(FingerprintMismatch, match=r"or with these in another precision than bfloat16.*model\.to\(torch\.bfloat16\)"):
        load_lm(copy.deepcopy(model).bfloat16(), tmp_path)
    save_bundle(tmp_path, "lm", "lm exits", {**content, "rounded": 3}, tensors)
    with pytest.raises(ArtifactError, match="'rounded' is a int"):
        load_lm(copy.deepcopy(model).bfloat16(), tmp_path)


def test_what_a_language_model_is_and_what_it_is_not(model):
    lm = attach_lm(model, [2, 3], [Shared(), OwnNorm()])
    assert repr(lm) == "LanguageModel(LlamaForCausalLM of 6 blocks, float32 on cpu; exits: Shared() after 2, OwnNorm() after 3)"
    assert "exits: _Shared after 2" in repr(LanguageModel(lm.decoder, (2,), [lm.heads[0]])) and not hasattr(lm, "generate")
    with pytest.raises(InvalidInput, match=r"offramp\.compile\(lm, offramp\.Verify\(4\)\)\.generate"):
        lm(torch.tensor([[1, 2]]))
    with pytest.raises(AttributeError, match=r"offramp\.compile\(lm, offramp\.Verify\(4\)\)\.generate"):
        lm.generate([[1, 2]])


def test_a_pickled_model_drafts_as_before(model):
    from transformers import AttentionInterface

    lm = made(model)
    AttentionInterface._global_mapping.pop(ATTENTION)  # as in a new process, which has not attached anything
    back = pickle.loads(pickle.dumps(lm))
    states = torch.randn(2, 5, 16)
    assert back.exits == lm.exits and back.base_fingerprint() == lm.base_fingerprint()
    assert all(torch.equal(back.teach(states, k), lm.teach(states, k)) for k in range(len(HEADS)))
    assert generate(back, [[1, 2, 3]], Verify(2), max_new_tokens=6).tokens == generate(lm, [[1, 2, 3]], Verify(2), max_new_tokens=6).tokens


def test_models_that_no_exit_fits_are_refused(model):
    with pytest.raises(InvalidInput, match="on the meta device"):
        attach_lm(copy.deepcopy(model).to("meta"), [2])
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = 1
    with pytest.raises(InvalidInput, match=r"has 1 block\. An exit stands between blocks"):
        attach_lm(LlamaForCausalLM(config).eval(), [1])


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
