"""Published recipes for language models: their schedules by hand, their forwards against a plain computation, and what they train."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lm_texts import acceptance, corpus, llama, speaker
from torch import nn

import offramp.train as train
from offramp.budget.depth_schedule import LinearDepth
from offramp.core.errors import InvalidInput
from offramp.core.parts import part_from_dict, part_to_dict
from offramp.exits.cached import Block
from offramp.language import attach_lm
from offramp.network import attach
from offramp.train import (
    Always,
    Distill,
    EarlyExitLoss,
    FinalOnly,
    Frozen,
    Gradual,
    Joint,
    LayerDropout,
    Mean,
    Rotating,
    ShallowDeep,
    Skipping,
    Warmed,
    fit,
    text_loader,
)
from offramp.train.text import TextNet
from offramp.train.text_recipes import layerwise, used

RECIPES = [
    Joint(Mean()),
    Joint(Warmed((0.1, 1.0), cosine=True)),
    LayerDropout(EarlyExitLoss((2,), 4, 0.5, Rotating(2)), 0.3),
    EarlyExitLoss((2,), 4, curriculum=Gradual()),
    Skipping(LinearDepth(4, 4, 2)),
    ShallowDeep(2),
]


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: type(r).__name__)
def test_every_recipe_learns_the_language_and_leaves_the_model_as_a_model(recipe):
    model = llama()
    lm = attach_lm(model, [2])
    optimizer = lambda p: torch.optim.AdamW(p, 5e-3)  # noqa: E731
    result = fit(lm, text_loader(corpus()[:96], 16), recipe, epochs=4, optimizer=optimizer, progress=False)
    losses = [r["losses"]["output"] for r in result.history if r["event"] == "step"]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    assert hooks(model) == 0


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: type(r).__name__)
def test_recipes_are_data(recipe):
    assert part_from_dict(part_to_dict(recipe), train.PARTS) == recipe


def test_sorted_training_makes_the_shared_exit_draft_better():
    model = speaker()
    lm = attach_lm(model, [1])
    before = acceptance(lm)
    fit(lm, text_loader(corpus(), 16), Joint(Mean()), epochs=4, optimizer=lambda p: torch.optim.AdamW(p, 3e-3), progress=False)
    assert acceptance(lm) > before + 0.1


def test_layer_dropout_resumes_bit_for_bit(tmp_path):
    def run(folder: str, **limits: Any) -> dict[str, torch.Tensor]:
        model = llama()
        lm = attach_lm(model, [2])
        recipe = LayerDropout(EarlyExitLoss((2,), 4, 0.5, Rotating(2)), 0.5)
        fit(lm, text_loader(corpus()[:32], 8), recipe, epochs=2, output_dir=tmp_path / folder, progress=False, **limits)
        return model.state_dict()

    whole = run("whole")
    run("parts", max_steps=5)
    resumed = run("parts")
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


# ---- schedules -----------------------------------------------------------------------------------------------------------


def test_early_exits_are_warmed_up():
    line = Warmed((0.1, 0.2, 1.0), share=0.5)
    assert [line(3, p) for p in (0.0, 0.25, 0.5, 1.0)] == [(0.0, 0.0, 1.0), (0.05, 0.1, 1.0), (0.1, 0.2, 1.0), (0.1, 0.2, 1.0)]
    assert Warmed((0.4, 1.0), share=0.5, cosine=True)(2, 0.125)[0] == pytest.approx(0.4 * (1 - 2**-0.5) / 2)
    assert Warmed((0.4, 1.0), share=0.0)(2, 0.0) == (0.4, 1.0)
    with pytest.raises(InvalidInput, match="share"):
        Warmed((0.1, 1.0), share=2)


def test_layerskip_weights_by_hand():
    # blocks 1, 2, 3 of 0 to 4: sums 1, 3, 6 times a half; the last 4 + (1 + 2 + 3) / 2 = 7
    found = EarlyExitLoss((2, 3, 4), 5, 0.5).weights(0, 0.0)
    assert found == pytest.approx((0.5 / 12, 1.5 / 12, 3 / 12, 7 / 12))
    turned = EarlyExitLoss((2, 3, 4), 5, 0.5, Rotating(3))
    assert [[w > 0 for w in turned.weights(t, 0.0)] for t in range(3)] == [
        [True, False, False, True], [False, True, False, True], [False, False, True, True],
    ]  # fmt: skip
    assert all(sum(turned.weights(t, 0.0)) == pytest.approx(1) for t in range(5))
    assert [Gradual()(4, 0, p) for p in (0.0, 0.124, 0.125, 0.375)] == [
        (False, False, False, True), (False, False, False, True), (False, False, True, True), (True,) * 4,
    ]  # fmt: skip
    assert Always()(2, 7, 0.1) == (True, True)


def test_heads_out_of_turn_are_left_alone():
    lm = attach_lm(llama(), [2, 3], Block())
    before = {k: v.clone() for k, v in lm.heads.state_dict().items()}
    recipe = EarlyExitLoss((2, 3), 4, 0.5, Rotating(2))
    fit(lm, text_loader(corpus()[:8], 8), recipe, epochs=1, progress=False)  # one step: the first exit's turn
    changed = {k.split(".")[0] for k, v in lm.heads.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"0"}


def test_layer_dropout_drops_deeper_blocks_more_and_only_in_training():
    assert LayerDropout(rate=0.2).rates(3) == pytest.approx((0.0, 0.2 * (2**0.5 - 1), 0.2))
    lm = attach_lm(speaker(), [1])
    net, tokens = TextNet(lm), corpus()[:400, :8]
    tokens = tokens.repeat(400 // len(tokens) + 1, 1)[:400]
    with torch.no_grad():
        plain = net(input_ids=tokens)
        with LayerDropout(rate=0.6).around(net):
            assert all(torch.equal(a, b) for a, b in zip(net(input_ids=tokens), plain, strict=True))
            net.train()
            ends: list[torch.Tensor] = []
            blocks = [net.model.get_submodule(p) for p in net.blocks]
            handles = [b.register_forward_hook(lambda _, a, out: ends.append((out == a[0]).all(-1).all(-1))) for b in blocks]
            net(input_ids=tokens)
            for handle in handles:
                handle.remove()
    shares = [float(e.float().mean()) for e in ends]
    assert shares[0] == 0
    for found, expected in zip(shares, LayerDropout(rate=0.6).rates(4), strict=True):
        assert found == pytest.approx(expected, abs=0.08)
    assert hooks(net.model) == 0


# ---- SkipDecode ----------------------------------------------------------------------------------------------------------


def test_a_schedule_never_needs_a_block_that_an_earlier_position_skipped():
    for schedule in (LinearDepth(8, 8, 2), LinearDepth(8, 8, 8, 3), LinearDepth(8, 5, 3, 2)):
        runs = used(schedule, 11)
        assert runs.sum(0).tolist() == [schedule.depth(t, 11) for t in range(11)]
        assert runs[: schedule.warmup].all() and (runs[:, 1:] <= runs[:, :-1]).all()
    with pytest.raises(InvalidInput, match="the model has 4"):
        fit(attach_lm(llama(), [2]), text_loader(corpus()[:4], 4), Skipping(LinearDepth(5, 3, 2)), epochs=1, progress=False)


def test_training_under_the_schedule_sees_what_decoding_under_it_would():
    lm = attach_lm(speaker(), [1])
    net, schedule, tokens = TextNet(lm), LinearDepth(4, 4, 2), corpus()[:3, :12]
    with torch.no_grad(), Skipping(schedule).around(net):
        found = net(input_ids=tokens)[-1]
    cache, runs, expected = lm.decoder.cache(3, 12), used(schedule, 12), []
    with torch.no_grad():
        for t in range(12):
            step = lm.decoder.step(cache, torch.full((3, 1), t), length=t + 1)
            hidden = lm.decoder.embed(tokens[:, t : t + 1], step)
            for k in range(4):
                if runs[k, t]:
                    hidden = lm.decoder.run(hidden, k, k + 1, step)
            expected.append(lm.decoder.logits(hidden))
        expected_full = net(input_ids=tokens)[-1]
    torch.testing.assert_close(found, torch.cat(expected, dim=1), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, expected_full, atol=1e-2)


# ---- FREE ----------------------------------------------------------------------------------------------------------------


def test_deep_states_teach_their_nearest_shallow_ones_in_order():
    shallow = tuple(torch.full((1, 1, 1), v, requires_grad=True) for v in (1.0, 2.0, 5.0))
    deep = tuple(torch.full((1, 1, 1), v, requires_grad=True) for v in (9.0, 2.5, 9.0, 0.5, 9.0, 6.0))  # every second one is chosen
    gap = layerwise(shallow, deep)
    # 2.5 -> 2; 0.5 would be nearest to 1, but not before 2: -> 2; 6 -> 5
    assert gap.item() == pytest.approx((0.25 + 2.25 + 1.0) / 3)
    gap.backward()
    assert all(d.grad is None for d in deep) and shallow[0].grad is not None and shallow[0].grad.item() == 0
    assert layerwise(shallow, deep[:1]).item() == pytest.approx(16.0)


def test_free_weighs_both_depths_and_the_states():
    lm = attach_lm(speaker(), [1])
    record = fit(lm, text_loader(corpus()[:8], 8), ShallowDeep(1, alpha=0.7), epochs=1, progress=False).history[0]
    shallow, deep = record["losses"]["model.layers.0"], record["losses"]["output"]
    assert record["terms"]["states"] > 0
    assert record["loss"] == pytest.approx((shallow + 4 * deep) / 5 + 0.7 * record["terms"]["states"], rel=1e-4)


def test_recipes_of_language_models_refuse_what_they_do_not_fit():
    lm = attach_lm(llama(), [2])
    loader = text_loader(corpus()[:4], 4)
    with pytest.raises(InvalidInput, match="exits after"):
        fit(lm, loader, EarlyExitLoss((1,), 4), epochs=1, progress=False)
    with pytest.raises(InvalidInput, match="needs one exit"):
        fit(lm, loader, ShallowDeep(3), epochs=1, progress=False)
    with pytest.raises(InvalidInput, match="trains the model"):
        LayerDropout(Frozen(Distill()))
    net = attach(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), ["0"], example=torch.randn(2, 4))
    with pytest.raises(InvalidInput, match="language models made with attach_lm"):
        fit(net, [(torch.randn(4, 4), torch.zeros(4, dtype=torch.long))], LayerDropout(Joint(FinalOnly())), epochs=1, progress=False)
