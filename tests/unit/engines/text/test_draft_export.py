"""The draft as a checkpoint: loaded by transformers alone it says what the exit says, and assisted writing stays greedy writing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from language_models import FAMILIES, build, own_greedy, prompts, word_tokenizer
from offramp.core.errors import ExportError, InvalidInput
from offramp.engines.text.draft_export import export_draft
from offramp.exits.cached import Adapter, Block
from offramp.exits.lm import OwnNorm, OwnOutput, Shared, Trimmed
from offramp.language import LanguageModel, attach_lm

HEADS = [Shared(), OwnNorm(), OwnOutput(), Block(), Block(like=1)]
CROSSED = ("llama", "gemma2", "cohere", "gpt2", "opt_350m")


def fitted(family: str, head: Any, exits: tuple[int, ...] = (2,)) -> LanguageModel:
    """Exits whose weights are not those they started from."""
    lm = attach_lm(build(family), exits, head)
    with torch.no_grad():
        for p in lm.heads.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return lm


def drafted(lm: LanguageModel, ids: list[int], exit_index: int = 0) -> torch.Tensor:
    """Logits of the exit, by the model's own forward up to it."""
    with torch.no_grad():
        states = lm.model(torch.tensor([ids]), output_hidden_states=True, use_cache=False).hidden_states[lm.exits[exit_index]]
        return lm.teach(states, exit_index)


def same(lm: LanguageModel, folder: Path, exit_index: int = 0) -> Any:
    draft = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = prompts((17,))[0]
    with torch.no_grad():
        torch.testing.assert_close(draft(torch.tensor([ids])).logits, drafted(lm, ids, exit_index), rtol=1e-4, atol=1e-4)
    return draft


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_drafts_alone(family, tmp_path):
    """The first blocks and the model's own end, and the same with a norm of its own."""
    lm = fitted(family, [Shared(), OwnNorm()], (1, 3))
    for exit_index, blocks in ((0, 1), (1, 3)):
        found = export_draft(lm, tmp_path / str(exit_index), exit_index)
        assert found.blocks == blocks and found.difference < 1e-3
        same(lm, tmp_path / str(exit_index), exit_index)


@pytest.mark.parametrize("family", CROSSED)
@pytest.mark.parametrize("head", HEADS[2:], ids=str)
def test_heads_of_their_own(family, head, tmp_path):
    lm = fitted(family, head)
    assert export_draft(lm, tmp_path / "draft").blocks == (3 if isinstance(head, Block) else 2)
    same(lm, tmp_path / "draft")


@pytest.mark.parametrize("head", HEADS[:4], ids=str)
def test_assisted_writing_is_greedy_writing(head, tmp_path):
    lm = fitted("llama", head)
    export_draft(lm, tmp_path / "draft")
    draft = AutoModelForCausalLM.from_pretrained(tmp_path / "draft")
    for prompt in prompts((5, 9)):
        expected = own_greedy(lm.model, [prompt], 20)
        assert torch.equal(own_greedy(lm.model, [prompt], 20, assistant_model=draft), expected)


def test_the_model_and_the_random_state_stay(tmp_path):
    lm = fitted("gpt2", OwnOutput())
    before, weights = torch.get_rng_state(), {k: v.clone() for k, v in lm.model.state_dict().items()}
    config = lm.model.config.to_dict()
    export_draft(lm, tmp_path / "draft")
    assert torch.equal(torch.get_rng_state(), before) and lm.model.config.to_dict() == config
    assert all(torch.equal(v, weights[k]) for k, v in lm.model.state_dict().items())
    assert lm.model.get_output_embeddings().weight is lm.model.get_input_embeddings().weight, "GPT-2 ties them, and so they stay"


def test_a_trimmed_exit_is_written_whole_and_an_adapter_refused(tmp_path):
    lm = attach_lm(build("cohere"), [1, 2], [Trimmed(tuple(range(40))), Adapter()])
    found = export_draft(lm, tmp_path / "draft")
    assert "may draft any" in found.remark
    logits = AutoModelForCausalLM.from_pretrained(tmp_path / "draft")(torch.tensor([[5, 6]])).logits
    assert bool(logits.isfinite().all())
    with pytest.raises(ExportError, match="no feed-forward"):
        export_draft(lm, tmp_path / "other", 1)
    assert not (tmp_path / "other").exists()


def test_a_folder_in_use_is_left_alone(tmp_path):
    lm = fitted("llama", Shared())
    (tmp_path / "draft").mkdir()
    (tmp_path / "draft" / "mine.txt").write_text("mine")
    with pytest.raises(InvalidInput, match="overwrite=True"):
        export_draft(lm, tmp_path / "draft")
    assert [p.name for p in (tmp_path / "draft").iterdir()] == ["mine.txt"]
    export_draft(lm, tmp_path / "draft", tokenizer=word_tokenizer(), overwrite=True)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in (tmp_path / "draft").iterdir()}
    assert [p.name for p in tmp_path.iterdir()] == ["draft"], "nothing temporary is left"


def test_what_does_not_say_the_same_is_not_written(tmp_path):
    """A class whose answer depends on the number of its blocks cannot be cut."""
    model = build("gpt2", scale_attn_by_inverse_layer_idx=True)  # block 2 of the model is scaled by its number
    lm = attach_lm(model, [2], Block(like=0))
    with pytest.raises(ExportError, match="depends on how many blocks"):
        export_draft(lm, tmp_path / "draft")
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_there(tmp_path):
    lm = fitted("llama", Shared())
    with pytest.raises(InvalidInput, match="exit_index"):
        export_draft(lm, tmp_path, 1)
    bare = LanguageModel(lm.decoder, lm.exits, list(lm.heads))
    with pytest.raises(InvalidInput, match="given as modules"):
        export_draft(bare, tmp_path)
