"""Training exits of a language model, from text to better drafts, on a language small enough to be learned in seconds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lm_texts import acceptance, corpus, speaker, tokenizer

from offramp.core.errors import InvalidInput
from offramp.exits.cached import Adapter, Block
from offramp.exits.lm import OwnNorm
from offramp.language import attach_lm, load_lm
from offramp.train import Distill, Explicit, Frozen, Joint, fit, load_best, packed, text_loader
from offramp.train.text import IGNORED, NextToken, TextNet, texts_in


@pytest.fixture(scope="module")
def blocks() -> torch.Tensor:
    return corpus()


@pytest.fixture
def model() -> Any:
    return speaker()


@pytest.mark.parametrize(("head", "gain"), [(Adapter(), 0.05), (Block(like=1), 0.05), (Block(fresh=True), 0.05)], ids=str)
def test_an_exit_trained_on_the_models_own_answers_drafts_better(model, blocks, head, gain, tmp_path):
    lm = attach_lm(model, [1], head)
    before, base = acceptance(lm), lm.base_fingerprint()
    result = fit(lm, text_loader(blocks, 16), epochs=4, optimizer=lambda p: torch.optim.AdamW(p, 5e-3), progress=False)
    after = acceptance(lm)
    assert after > before + gain, (before, after)
    assert lm.base_fingerprint() == base
    assert result.history[-1]["loss"] < 0.7 * next(r["loss"] for r in result.history if r["event"] == "step")
    lm.save(tmp_path)
    assert acceptance(load_lm(model, tmp_path)) == after
    assert all(p.requires_grad for p in model.parameters()) and not model.training


def test_a_killed_run_goes_on_bit_for_bit(model, blocks, tmp_path):
    recipe = Frozen(Distill(temperature=1.0, alpha=1.0))

    def run(folder: str, **limits: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(5)
        lm = attach_lm(model, [1, 2], Adapter())
        fit(lm, text_loader(blocks[:48], 8), recipe, epochs=2, output_dir=tmp_path / folder, progress=False, seed=3, **limits)
        return lm.heads.state_dict()

    whole = run("whole")
    run("parts", max_steps=5)
    resumed = run("parts")
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    assert (tmp_path / "parts" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


def test_the_models_logits_are_computed_once_a_batch(model, blocks):
    lm = attach_lm(model, [1, 2], OwnNorm())
    calls = []
    handle = model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    body = model.model.register_forward_hook(lambda *_: calls.append(100))
    fit(lm, text_loader(blocks[:4], 4), epochs=1, progress=False)
    handle.remove(), body.remove()
    assert sum(calls) == 100 + 3  # the model once; its output layer for it and for each of two exits


def test_exits_of_the_training_forward_are_those_of_decoding(model, blocks):
    lm = attach_lm(model, [1, 3], Adapter())
    with torch.no_grad():
        for p in lm.heads.parameters():
            p.add_(0.1 * torch.randn_like(p))
        tokens = blocks[:2, :20]
        answers = TextNet(lm)(input_ids=tokens)
        step = lm.decoder.step(lm.decoder.cache(2, 20), torch.arange(20).expand(2, -1))
        hidden, start = lm.decoder.embed(tokens, step), 0
        for k, stop in enumerate((1, 3)):
            hidden, start = lm.decoder.run(hidden, start, stop, step), stop
            torch.testing.assert_close(answers[k], lm.teach(hidden, k), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(answers[-1], model(tokens).logits, rtol=1e-4, atol=1e-4)


def test_hard_labels_and_joint_weights_train_what_they_should(model, blocks):
    loader = text_loader(blocks[:32], 16)
    lm = attach_lm(model, [1], Block())
    base = lm.base_fingerprint()
    heads = {k: v.clone() for k, v in lm.heads.state_dict().items()}
    fit(lm, loader, Frozen(), epochs=1, progress=False)
    assert lm.base_fingerprint() == base and any(not torch.equal(v, heads[k]) for k, v in lm.heads.state_dict().items())
    result = fit(lm, loader, Joint(Explicit((0.1, 1.0))), epochs=1, progress=False)
    assert lm.base_fingerprint() != base
    first = result.history[0]
    assert first["loss"] == pytest.approx(0.1 * first["losses"]["model.layers.0"] + first["losses"]["output"], rel=1e-4)


# ---- texts and the loss --------------------------------------------------------------------------------------------------


def test_texts_are_packed_in_order_with_an_end_after_each():
    found = packed(["abc", [5, 6], "d"], tokenizer, 3, end=27)
    assert found.tolist() == [[1, 2, 3], [27, 5, 6], [27, 4, 27]]
    assert packed([[1, 2, 3, 4, 5]], None, 2).tolist() == [[1, 2], [3, 4]]


def test_texts_of_a_folder(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ["abc", "de"]}).save_to_disk(str(tmp_path / "saved"))
    assert list(texts_in(tmp_path / "saved")) == ["abc", "de"]
    with pytest.raises(InvalidInput, match="no column 'body'"):
        list(texts_in(tmp_path / "saved", "body"))
    plain = tmp_path / "plain"
    plain.mkdir()
    with pytest.raises(InvalidInput, match="neither"):
        list(texts_in(plain))
    (plain / "b.txt").write_text("de")
    (plain / "a.txt").write_text("abc")
    assert packed(plain, tokenizer, 2).tolist() == [[1, 2], [3, 4]]


def test_too_little_text_and_wrong_tokens_are_refused(model):
    with pytest.raises(InvalidInput, match="fewer than one block"):
        packed(["ab"], tokenizer, 3)
    with pytest.raises(InvalidInput, match="no tokenizer"):
        packed(["ab"], None, 2)
    with pytest.raises(InvalidInput, match="at least 2"):
        packed(["ab"], tokenizer, 1)
    lm = attach_lm(model, [1], Adapter())
    with pytest.raises(InvalidInput, match="where a loader is needed"):
        fit(lm, torch.zeros(2, 4, dtype=torch.int64), epochs=1, progress=False)
    with pytest.raises(InvalidInput, match="Token ids range over"):
        fit(lm, text_loader(torch.full((2, 4), 99), 2), epochs=1, progress=False)


def test_the_loss_of_a_text_is_the_mean_over_its_counted_tokens():
    logits, labels = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    labels[1, 3:] = IGNORED
    expected = []
    for row, last in ((0, 5), (1, 3)):
        picked = [-logits[row, t - 1].log_softmax(-1)[labels[row, t]] for t in range(1, last)]
        expected.append(torch.stack(picked).mean())
    torch.testing.assert_close(NextToken()(logits, labels), torch.stack(expected))
    teacher = torch.randn(2, 5, 7)
    soft = -(teacher.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean(1)
    entropy = -(teacher.softmax(-1) * teacher.log_softmax(-1)).sum(-1).mean(1)
    torch.testing.assert_close(NextToken().match(logits, teacher, 1.0), soft - entropy)


def test_checkpoints_of_a_frozen_model_hold_what_is_added_alone(model, blocks, tmp_path):
    lm = attach_lm(model, [1], Adapter())
    fit(lm, text_loader(blocks[:8], 8), epochs=1, output_dir=tmp_path, progress=False)
    (saved,) = (tmp_path / "checkpoints").glob("*/state.safetensors")
    added = sum(p.numel() * p.element_size() for p in lm.heads.parameters())
    assert 3 * added < saved.stat().st_size < 3 * added + 8192  # weights and two moments
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    with pytest.raises(InvalidInput, match="holds another run: weights of the model was"):
        fit(lm, text_loader(blocks[:8], 8), epochs=2, output_dir=tmp_path, progress=False)


def test_the_best_evaluation_is_kept(model, blocks, tmp_path):
    lm = attach_lm(model, [1], Adapter())
    optimizer = lambda p: torch.optim.AdamW(p, 5e-3)  # noqa: E731
    result = fit(
        lm, text_loader(blocks[:32], 8), epochs=2, eval_loader=text_loader(blocks[32:40], 8, shuffle=False), output_dir=tmp_path,
        optimizer=optimizer, progress=False,
    )  # fmt: skip
    assert result.best is not None and result.best["step"] == 8
    best = {k: v.clone() for k, v in lm.heads.state_dict().items()}
    with torch.no_grad():
        for p in lm.heads.parameters():
            p.zero_()
    assert load_best(lm, tmp_path) == 8
    assert all(torch.equal(v, best[k]) for k, v in lm.heads.state_dict().items())
