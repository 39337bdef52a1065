"""Region-adaptive sampling from captured graphs: against the eager engine, with plain calls for graphs and with the hazards of CUDA's."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

import pytest
import torch
from denoise_models import autoencoder, dit, schedulers
from test_region_denoise import LITTLE, MODELS, NAMES, Own, close, conditions, families, images, of
from torch import Tensor, nn

from offramp.core.errors import InvalidInput, UnsupportedModel
from offramp.core.noise import FlowMatching
from offramp.engines.diffusion.graphs import Captured
from offramp.engines.diffusion.pipeline import sample
from offramp.engines.diffusion.region_graphs import CapturedRegions
from offramp.engines.diffusion.regions import RegionDenoiser, attach_region_pipeline, attach_regions
from offramp.engines.diffusion.run import Eager
from offramp.reduce.regions import AtLevels, AtSteps, ChannelNorm, Measure, Regions

pytest.importorskip("diffusers")

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("plain_and_tapes")


def captured(**options: Any) -> CapturedRegions:
    return CapturedRegions(CPU, compiled=False, **options)


def counts(run: CapturedRegions) -> list[tuple[int, int | None]]:
    """Rows and tokens of every graph."""
    return sorted(((key[-1].rows, key[2]) for key in run._entries), key=str)


def rooms(run: CapturedRegions) -> int:
    return sum(len(found) for found in run._rooms.values())


def same_reports(one: RegionDenoiser, other: RegionDenoiser) -> None:
    a, b = one.report, other.report
    assert torch.equal(a.flops, b.flops) and torch.equal(a.fired, b.fired) and torch.equal(a.depth, b.depth)
    assert a.reasons == b.reasons and a.cache_bytes == b.cache_bytes
    assert list(one.maps) == list(other.maps) and all(torch.equal(one.maps[k], other.maps[k]) for k in one.maps)


@families
def test_images_are_those_of_the_eager_engine_bit_for_bit(family: str) -> None:
    model, given = MODELS[family](), conditions(family, 2)
    eager, fast = of(family, model=model, observe=True), of(family, model=model, observe=True, run=captured())
    for scheduler in schedulers():
        want = sample(eager, scheduler(), images(2), steps=7, inputs=given)
        for _ in range(2):  # the second time from the graphs of the first
            assert torch.equal(sample(fast, scheduler(), images(2), steps=7, inputs=given), want)
            same_reports(fast, eager)
    assert eager.report.reasons == {(0, "first"): 4, (0, "reset"): 2, (0, "skipped"): 8}
    assert set(counts(fast.runner)) == {(2, 8), (2, None)}  # type: ignore[arg-type]


@families
def test_all_tokens_are_the_plain_model_bit_for_bit(family: str) -> None:
    fast, given = of(family, Regions(first=100), run=captured()), conditions(family, 2)
    plain = sample(fast.net.model, schedulers()[2](), images(2), steps=4, inputs=given, names=NAMES)
    assert torch.equal(sample(fast, schedulers()[2](), images(2), steps=4, inputs=given), plain)


def test_every_number_of_tokens_is_a_graph() -> None:
    rule = dataclasses.replace(LITTLE, multiple=4, change=0.8, resets=AtLevels((0.5,)), last=True)
    model, given = dit(), conditions("dit", 3)
    run = captured()
    eager, fast = of("dit", rule, model, observe=True), of("dit", rule, model, observe=True, run=run)
    want = sample(eager, schedulers()[2](), images(3), steps=12, inputs=given)
    assert torch.equal(sample(fast, schedulers()[2](), images(3), steps=12, inputs=given), want)
    same_reports(fast, eager)
    assert counts(run) == [(3, 12), (3, 4), (3, 8), (3, None)]


@pytest.mark.parametrize("rule", [
    Regions(0.4, ChannelNorm(), low=False, multiple=1, first=1, resets=AtSteps(())),
    Regions(0.3, multiple=1, first=2, resets=AtSteps(()), direction=-1, staleness=0.4),
    Regions(0.3, multiple=1, first=1, resets=AtSteps(()), staleness=3.0),
])  # fmt: skip
def test_other_rules_choose_as_they_do_eagerly_and_never_from_each_others_graphs(rule: Regions) -> None:
    model, given, run = dit(), conditions("dit", 2), captured()
    eager, fast = of("dit", LITTLE, model, observe=True), of("dit", LITTLE, model, observe=True, run=run)
    seen = []
    for regions in (LITTLE, rule, dataclasses.replace(rule, low=not rule.low)):
        eager.regions = fast.regions = regions
        seen.append(sample(eager, schedulers()[2](), images(2), steps=8, inputs=given))
        assert torch.equal(sample(fast, schedulers()[2](), images(2), steps=8, inputs=given), seen[-1])
        same_reports(fast, eager)
    assert not torch.equal(seen[1], seen[2])


class TestMemory:
    def test_it_is_counted_and_given_back_and_taken_again(self) -> None:
        run = captured()
        fast, given = of("dit", run=run), conditions("dit", 2)
        first = sample(fast, schedulers()[2](), images(2), steps=5, inputs=given)
        kept = 2 * 4 * (2 * 4 * 16 * 16 + 16 * 16 + 16) + 2 * 16 * 4 + 2  # keys, values, outputs, focus; waits; flags
        assert fast.report.cache_bytes == kept and fast.trajectory.cache_bytes == 0
        (room,) = next(iter(run._rooms.values()))
        assert room.free
        for tensor in room.state.tensors:  # whatever is left of a trajectory has no part in the next
            tensor.fill_(math.nan if tensor.is_floating_point() else 1)
        other = of("dit", model=fast.net.model, run=run)
        for denoiser in (fast, other):
            assert torch.equal(sample(denoiser, schedulers()[2](), images(2), steps=5, inputs=given), first)
        assert rooms(run) == 1 and len(run._entries) == 2

    @torch.no_grad()
    def test_branches_and_denoisers_that_take_turns_never_share_it(self) -> None:
        model, run = dit(), captured()
        both, lone = of("dit", model=model, run=run), of("dit", model=model, run=run)
        eager = [of("dit", model=model) for _ in range(3)]
        labels = (torch.tensor([3, 4]), torch.tensor([1000, 1000]), torch.tensor([7, 8]))
        for time in (900, 800, 700, 600, 500, 400):
            image = torch.randn(2, 4, 8, 8)
            call: Any = {"hidden_states": image, "timestep": torch.tensor(time)}
            found = [d(**call, class_labels=y).sample for d, y in zip((both, both, lone), labels, strict=True)]
            for one, alone, y in zip(found, eager, labels, strict=True):
                assert torch.equal(one, alone(**call, class_labels=y).sample)
        assert both.report.flops.shape == (4, 6) and rooms(run) == 3

    @torch.no_grad()
    def test_what_is_returned_is_the_callers(self) -> None:
        from diffusers import DiTTransformer2DModel

        config = {k: v for k, v in dict(dit().config).items() if not k.startswith("_")}
        model = DiTTransformer2DModel(**{**config, "patch_size": 1, "sample_size": 4}).eval()  # tokens are pixels
        example = {"hidden_states": images(1, 4, 4), "timestep": torch.tensor([600]), "class_labels": torch.tensor([3])}
        one, other = (attach_regions(model, LITTLE, noise=FlowMatching(), example=example, run=captured()) for _ in range(2))
        for time in (900, 800, 700, 600):
            call = {"hidden_states": torch.randn(1, 4, 4, 4), "timestep": torch.tensor(time), "class_labels": torch.tensor([3])}
            kept = one(**call).sample
            copied = kept.clone()
            given = other(**call).sample
            assert torch.equal(given, copied)
            given.fill_(7.0)
            one(**{**call, "timestep": torch.tensor(time - 50)})
            other(**{**call, "timestep": torch.tensor(time - 50)}).sample.fill_(7.0)
            assert torch.equal(kept, copied)
        assert one.report.reasons[0, "skipped"] == 5

    @torch.no_grad()
    def test_inputs_are_read_before_the_call_returns(self) -> None:
        model = dit()
        eager, fast = of("dit", model=model), of("dit", model=model, run=captured())
        for time in (900, 800, 700, 600):
            image, labels = torch.randn(2, 4, 8, 8), torch.tensor([3, 4])
            want = eager(hidden_states=image, timestep=torch.tensor(time), class_labels=labels).sample
            found = fast(hidden_states=image, timestep=torch.tensor(time), class_labels=labels).sample
            image.fill_(math.nan)
            labels.fill_(9)
            assert torch.equal(found, want)

    @torch.no_grad()
    def test_graphs_that_are_given_up_are_made_again(self) -> None:
        model = dit()
        eager, run = of("dit", model=model), captured(most=1)
        fast = of("dit", model=model, run=run)
        for rows in (2, 3, 2):
            given = conditions("dit", rows)
            want = sample(eager, schedulers()[2](), images(rows), steps=7, inputs=given)
            assert torch.equal(sample(fast, schedulers()[2](), images(rows), steps=7, inputs=given), want)
            assert len(run._entries) == 1 and rooms(run) <= 2

    @torch.no_grad()
    def test_a_half_step_is_no_step(self) -> None:
        model: Any = dit()
        eager, fast = of("dit", model=model, observe=True), of("dit", model=model, observe=True, run=captured())
        call: Any = {"class_labels": torch.tensor([3, 4])}
        for time in (900, 800, 700):
            image = torch.randn(2, 4, 8, 8)
            want = eager(hidden_states=image, timestep=torch.tensor(time), **call).sample
            assert torch.equal(fast(hidden_states=image, timestep=torch.tensor(time), **call).sample, want)
        for denoiser in (eager, fast):
            with pytest.raises(InvalidInput):
                denoiser(hidden_states=torch.randn(2, 4, 8, 8))  # without a timestep
            assert denoiser.trajectory.cache_bytes == 0
            denoiser(hidden_states=images(2), timestep=torch.tensor(600), **call)
            assert bool(denoiser.maps[0, 0].all())


class TestRows:
    @torch.no_grad()
    def test_rows_at_different_steps_go_their_own_ways(self) -> None:
        model, run = dit(), captured()
        eager, fast = of("dit", model=model, observe=True), of("dit", model=model, observe=True, run=run)
        times = [(700, 300), (600, 200), (500, 900), (400, 800), (300, 700), (200, 600), (100, 500)]
        labels = torch.tensor([3, 4, 5, 6, 7])
        for going, anew in times:
            call: Any = {"hidden_states": torch.randn(5, 4, 8, 8), "timestep": torch.tensor([going, anew, going, going, anew])}
            close(fast(**call, class_labels=labels).sample, eager(**call, class_labels=labels).sample)
            same_reports(fast, eager)
        assert counts(run) == [(2, 8), (2, None), (4, 8), (4, None), (5, 8), (5, None)]

    @torch.no_grad()
    def test_what_is_not_finite_is_computed_again(self) -> None:
        model = dit()
        labels = torch.tensor([3, 4, 5])
        eager, fast = of("dit", model=model, observe=True), of("dit", model=model, observe=True, run=captured())
        for step, time in enumerate((900, 800, 700, 600, 500, 450)):
            image = torch.randn(3, 4, 8, 8)
            if step == 2:
                image[1, 0] = torch.nan
            if step == 4:
                image[:] = torch.inf
            call: Any = {"hidden_states": image, "timestep": torch.tensor(time), "class_labels": labels}
            found, want = fast(**call).sample, eager(**call).sample
            torch.testing.assert_close(found, want, rtol=0, atol=1e-5, equal_nan=True)
            same_reports(fast, eager)
            if step == 3:
                torch.testing.assert_close(found[1], model(image, call["timestep"].expand(3), labels).sample[1], rtol=0, atol=1e-5)
        assert eager.report.reasons[0, "not finite"] == 1

    @torch.no_grad()
    @pytest.mark.parametrize("seed", range(4))
    def test_any_trajectories_give_the_same_in_both_ways(self, seed: int) -> None:
        rng = random.Random(seed)
        resets: Any = rng.choice([AtSteps((3,)), AtLevels((0.0,))])
        rule = Regions(
            rng.choice([0.2, 0.5, 0.7]), rng.choice([ChannelNorm(), Regions().measure]), rng.random() < 0.5, first=rng.randint(1, 3),
            resets=resets, change=rng.choice([0.0, 0.6]), multiple=rng.choice([1, 4]),
        )  # fmt: skip
        family = rng.choice(list(MODELS))
        rows, model = rng.randint(2, 4), MODELS[family]()
        eager, fast = of(family, rule, model, observe=True), of(family, rule, model, observe=True, run=captured())
        times = [rng.choice([900, 900, 700]) for _ in range(rows)]
        for _ in range(8):
            call: Any = {"hidden_states": torch.randn(rows, 4, 8, 8), "timestep": torch.tensor(times), **conditions(family, rows)}
            for _ in range(rng.randint(1, 2)):  # guidance branches, now and then one that is missing
                close(fast(**call).sample, eager(**call).sample)
            assert fast.report.reasons == eager.report.reasons and torch.equal(
                fast.report.flops.nan_to_num(), eager.report.flops.nan_to_num()
            )
            times = [t - rng.choice([60, 60, 100]) if t > 200 else 950 for t in times]


class TestChanges:
    @torch.no_grad()
    def test_shapes_and_inference_mode_may_change(self) -> None:
        model = MODELS["pixart"]()
        eager, fast = of("pixart", model=model), of("pixart", model=model, run=captured())
        sizes = [(2, 8, 8)] * 3 + [(2, 8, 12)] * 4 + [(3, 8, 8)] * 3
        for k, size in enumerate(sizes):
            call: Any = {"hidden_states": images(*size), "timestep": torch.tensor(950 - 90 * k), **conditions("pixart", size[0])}
            with torch.inference_mode(k % 3 == 0):
                if k % 3 == 0:
                    call = {n: v.clone() if isinstance(v, Tensor) else v for n, v in call.items()}
                assert torch.equal(fast(**call).sample, eager(**call).sample)
        assert fast.report.reasons == eager.report.reasons and fast.report.reasons[0, "shape"] == 3

    def test_weights_may_move(self) -> None:
        model, given, run = dit(), conditions("dit", 2), captured()
        eager, fast = of("dit", model=model), of("dit", model=model, run=run)
        before = sample(fast, schedulers()[2](), images(2), steps=7, inputs=given)
        with torch.no_grad():
            model.pos_embed.proj.weight.mul_(1.1)  # type: ignore[union-attr,operator]
        changed = sample(fast, schedulers()[2](), images(2), steps=7, inputs=given)
        assert torch.equal(changed, sample(eager, schedulers()[2](), images(2), steps=7, inputs=given)) and not torch.equal(changed, before)
        for p in model.parameters():
            p.data = p.data * 1.1  # as ``to`` does: other memory
        moved = sample(fast, schedulers()[2](), images(2), steps=7, inputs=given)
        assert torch.equal(moved, sample(eager, schedulers()[2](), images(2), steps=7, inputs=given)) and not torch.equal(changed, moved)
        assert len(run._entries) == 2

    @torch.no_grad()
    def test_weights_may_move_while_a_trajectory_is_under_way(self) -> None:
        model = dit()
        eager, fast = of("dit", model=model), of("dit", model=model, run=captured())
        for step, time in enumerate((900, 800, 700, 600, 500)):
            if step == 3:
                for p in model.parameters():
                    p.data = p.data * 1.1
            call: Any = {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.tensor(time), "class_labels": torch.tensor([3, 4])}
            assert torch.equal(fast(**call).sample, eager(**call).sample)

    @families
    def test_what_is_loaded_into_the_model_afterwards_is_seen(self, family: str) -> None:
        model: Any = MODELS[family]()
        eager, fast, given = of(family, model=model), of(family, model=model, run=captured()), conditions(family, 2)
        before = sample(fast, schedulers()[2](), images(2), steps=5, inputs=given)
        block = model.transformer_blocks[1]
        attention: Any = block.attn if family == "sd3" else block.attn1
        attention.to_k = nn.Sequential(attention.to_k, nn.Tanh())
        want = sample(eager, schedulers()[2](), images(2), steps=5, inputs=given)
        assert torch.equal(sample(fast, schedulers()[2](), images(2), steps=5, inputs=given), want) and not torch.equal(before, want)

    def test_a_model_in_training_runs_as_in_evaluation_and_stays_in_training(self) -> None:
        model: Any = dit()
        for block in model.transformer_blocks:
            block.ff.net[1] = nn.Dropout(0.5).eval()
        eager, fast, given = of("dit", model=model), of("dit", model=model.train(), run=captured()), conditions("dit", 2)
        found = sample(fast, schedulers()[2](), images(2), steps=5, inputs=given)
        assert model.training and all(m.training for m in model.modules())
        assert torch.equal(found, sample(eager, schedulers()[2](), images(2), steps=5, inputs=given))

    def test_under_autocast_what_is_kept_is_of_its_type(self) -> None:
        model, given, run = dit(), conditions("dit", 2), captured()
        eager, fast = of("dit", model=model), of("dit", model=model, run=run)
        with torch.autocast("cpu", torch.bfloat16):
            want = sample(eager, schedulers()[2](), images(2), steps=5, inputs=given)
            found = sample(fast, schedulers()[2](), images(2), steps=5, inputs=given)
        torch.testing.assert_close(found, want, rtol=0.02, atol=0.02)
        plain = sample(eager, schedulers()[2](), images(2), steps=5, inputs=given)
        assert torch.equal(sample(fast, schedulers()[2](), images(2), steps=5, inputs=given), plain)
        assert {room.state.store.kept[0].dtype for found in run._rooms.values() for room in found} == {torch.bfloat16, torch.float32}


def test_a_users_own_transformer() -> None:
    model, example = Own().eval(), (torch.randn(2, 1, 8, 8), torch.tensor([300, 500]))
    rule = dataclasses.replace(LITTLE, measure=ChannelNorm())
    eager, fast = (attach_regions(model, rule, noise=FlowMatching(), example=example, run=run) for run in (None, captured()))
    noise = torch.randn(4, 1, 8, 8)
    assert torch.equal(sample(fast, schedulers()[2](), noise, steps=6), sample(eager, schedulers()[2](), noise, steps=6))
    assert fast.report.cost < 0.85


def test_a_pipeline_takes_it() -> None:
    from diffusers import DDIMScheduler, DiTPipeline

    pipe = DiTPipeline(dit(), autoencoder(), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)

    def draw(view: Any) -> Tensor:
        found = view(class_labels=[1, 2], num_inference_steps=6, generator=torch.Generator().manual_seed(0), output_type="np")
        return torch.as_tensor(found.images)

    eager = attach_region_pipeline(pipe, LITTLE)
    for run in (captured(), Captured(CPU, compiled=False)):
        view = attach_region_pipeline(pipe, LITTLE, run=run)
        assert isinstance(view.denoiser.runner, CapturedRegions)
        for _ in range(2):
            assert torch.equal(draw(view), draw(eager)) and view.denoiser.report.cost < 1


class Loose(Measure):
    __hash__ = None  # type: ignore[assignment]

    def of(self, output: Tensor) -> Tensor:
        return output.float().abs().sum(1)


class TestRefusals:
    def test_what_runs_something_else(self) -> None:
        for run in (Eager(), "captured", CPU):
            with pytest.raises(InvalidInput, match="CapturedRegions"):
                of("dit", run=run)  # type: ignore[arg-type]
        with pytest.raises(InvalidInput, match="one graph"):
            captured(most=0)

    def test_another_device(self) -> None:
        denoiser = of("dit", run=captured())
        denoiser.runner.device = torch.device("meta")  # type: ignore[attr-defined]
        with pytest.raises(InvalidInput, match=r"called on cpu.*is for meta"):
            denoiser(hidden_states=images(2), timestep=torch.tensor(600), **conditions("dit", 2))

    def test_a_measure_that_cannot_be_told_from_others(self) -> None:
        denoiser = of("dit", dataclasses.replace(LITTLE, measure=Loose()), run=captured())
        with pytest.raises(InvalidInput, match="frozen dataclass"):
            denoiser(hidden_states=images(2), timestep=torch.tensor(600), **conditions("dit", 2))

    def test_a_model_that_lost_what_is_needed(self) -> None:
        model: Any = MODELS["pixart"]()
        denoiser = of("pixart", model=model, run=captured())
        model.fuse_qkv_projections()
        with pytest.raises(UnsupportedModel, match="unfuse_qkv_projections"):
            denoiser(hidden_states=images(2), timestep=torch.tensor(600), **conditions("pixart", 2))
