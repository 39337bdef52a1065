"""How a user calls diffusion methods: the verbs on a pipeline and on a denoiser."""

from __future__ import annotations

import copy
import inspect
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from denoise_models import Toy, autoencoder, dit
from torch import Tensor, nn

pytest.importorskip("diffusers")

import offramp
from offramp import systems
from offramp.cli.image_nets import EulerFlow, SmallDiT
from offramp.core.errors import FingerprintMismatch, InvalidInput, NoEffectWarning
from offramp.core.noise import FlowMatching
from offramp.engines.diffusion.compose import composed
from offramp.engines.diffusion.denoise import Denoiser
from offramp.engines.diffusion.model import DiffusionModel
from offramp.engines.diffusion.pipeline import sample
from offramp.engines.diffusion.region_graphs import CapturedRegions
from offramp.train import Noising, RectifiedFlow, noisy_loader

STEPS = 6
CALL: dict[str, Any] = {"class_labels": [1, 2], "num_inference_steps": STEPS, "output_type": "np"}


@pytest.fixture(scope="module")
def pipe() -> Any:
    from diffusers import DDIMScheduler, DiTPipeline

    made = DiTPipeline(dit(), autoencoder(), DDIMScheduler())
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def cached(pipe: Any) -> DiffusionModel:
    return offramp.attach(pipe, system=systems.build("deepcache", interval=2))


def images(run: Any, **change: Any) -> Tensor:
    return torch.as_tensor(run(generator=torch.Generator().manual_seed(0), **{**CALL, **change}).images)


# ---- a pipeline ------------------------------------------------------------------------------------------------------------


def test_it_is_called_as_the_pipeline_is_and_leaves_that_alone(pipe: Any, cached: DiffusionModel) -> None:
    full = images(pipe)
    assert type(cached) is DiffusionModel and cached.detach() is pipe
    got = images(cached)
    assert got.shape == full.shape and not torch.equal(got, full) and cached.report.cost < 0.8
    assert torch.equal(images(pipe), full) and type(pipe.transformer).__name__ == "DiTTransformer2DModel"
    assert cached.vae is pipe.vae and cached.config is pipe.config
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = cached.nothing_like_it


def test_another_scheduler_is_set_without_touching_the_users(pipe: Any) -> None:
    from diffusers import DPMSolverMultistepScheduler

    fast = offramp.attach(pipe, system=systems.build("deepcache", interval=2))
    before = pipe.scheduler
    fast.scheduler = DPMSolverMultistepScheduler()
    assert images(fast).isfinite().all() and pipe.scheduler is before


def test_calibrate_and_compile_give_a_pipeline_with_the_users_call(pipe: Any, cached: DiffusionModel, tmp_path: Path) -> None:
    plan = offramp.calibrate(cached, target=offramp.MeanCost(0.8), calls=[CALL])
    run = offramp.compile(cached, plan)
    assert isinstance(run, type(pipe)) and inspect.signature(run.__call__) == inspect.signature(pipe.__call__)
    assert images(run).isfinite().all() and run.denoiser.report.cost == pytest.approx(plan.cost.value)
    assert plan.made_with["sampler"] == "DDIMScheduler" and plan.made_with["guidance"] == 4.0 and plan.made_with["steps"] == STEPS
    assert plan.certificate.items == 2, "images, not calls"
    cached.save(tmp_path)
    cached.plan = None
    assert torch.equal(images(offramp.load(pipe, tmp_path)), images(cached))
    plan.save(tmp_path)
    again = offramp.load_plan(tmp_path)
    assert again == plan and torch.equal(images(offramp.compile(cached, again)), images(run))
    with torch.no_grad():
        pipe.transformer.proj_out_2.bias.add_(0.5)
    try:
        with pytest.raises(FingerprintMismatch, match="Calibrate again"):
            offramp.compile(cached, plan)
    finally:
        with torch.no_grad():
            pipe.transformer.proj_out_2.bias.sub_(0.5)


def test_fewer_steps_are_taken_than_asked_for(pipe: Any) -> None:
    fast = offramp.attach(pipe, system=systems.build("few-steps", share=0.5))
    assert torch.equal(images(fast), images(pipe, num_inference_steps=3))
    assert torch.equal(images(fast, num_inference_steps=2), images(pipe, num_inference_steps=1))
    assert inspect.signature(type(fast.published).__call__) == inspect.signature(type(pipe).__call__)


def test_a_method_that_changes_nothing_warns(pipe: Any) -> None:
    fast = offramp.attach(pipe, system=systems.build("first-block-cache", change=0.0))
    with pytest.warns(NoEffectWarning, match="skipped nothing in this call of 6 steps"):
        assert torch.equal(images(fast), images(pipe))


def test_a_schedule_that_is_not_chosen_yet_says_so(pipe: Any) -> None:
    fast = offramp.attach(pipe, system=systems.build("static-schedule"))
    with pytest.raises(InvalidInput, match="choose them with calibrate"):
        images(fast)


# ---- a denoiser alone ------------------------------------------------------------------------------------------------------


def small() -> nn.Module:
    torch.manual_seed(0)
    model = SmallDiT(1, 3, 8, depth=4, width=16, heads=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def example() -> dict[str, Tensor]:
    return {"sample": torch.randn(2, 1, 8, 8), "timestep": torch.tensor([500.0, 100.0]), "class_labels": torch.tensor([0, 1])}


def on_small(name: str, model: nn.Module | None = None, **arguments: Any) -> DiffusionModel:
    options: dict[str, Any] = {"scheduler": EulerFlow(), "noise": FlowMatching(), "example": example()}
    return offramp.attach(model or small(), system=systems.build(name, **arguments), **options)


def loader() -> Any:
    return noisy_loader(torch.randn(16, 1, 8, 8), Noising(RectifiedFlow(), label="class_labels"), 8, classes=torch.arange(16) % 3)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items()}


def test_a_method_of_tokens_is_captured_too(pipe: Any, cached: DiffusionModel) -> None:
    some = offramp.attach(pipe, system=systems.build("ras"))
    eager = images(offramp.compile(some, captured=False))
    assert not torch.equal(eager, images(pipe))
    fast = offramp.compile(some, captured=True)
    assert torch.equal(images(fast), eager) and torch.equal(images(fast), eager), "a second trajectory begins anew"
    run = CapturedRegions(some.net.device, compiled=False)
    assert torch.equal(images(some.view(run=run)), eager)
    with pytest.raises(InvalidInput, match="which a Captured runs"):
        cached.view(run=run)


def test_a_denoiser_alone_is_called_as_it_is() -> None:
    fast = on_small("shallow")
    given = example()
    assert fast.layout.inlet == "embed" and fast.layout.blocks == tuple(f"blocks.{k}" for k in range(4))
    assert fast(**given).shape == (2, 1, 8, 8) and isinstance(offramp.compile(fast), Denoiser)
    assert not torch.equal(fast(**given), fast.detach()(**given))
    assert fast.report.cost == pytest.approx(0.5, abs=0.1)


def test_published_lists_keep_their_shares_in_a_model_of_another_depth() -> None:
    fast = on_small("ee-diffusion")
    clean = [fast.points[k].signal.skip for k in range(len(fast.points))]
    levels = FlowMatching().log_snr(torch.linspace(950, 50, 10)).tolist()
    edges = fast.points[0].signal.edges
    depth = [
        next((fast.layout.blocks.index(p.at) + 1 for p in fast.points if p.signal.skip[sum(x >= e for e in edges)]), 4) for x in levels
    ]
    assert depth == [2, 2, 2, 2, 3, 3, 3, 3, 4, 4], "shares of 12, 12, 16, 16, 20, 20, 24, 24, 28, 28 of 28, noisiest first"
    assert all(len(s) == 10 for s in clean)


def test_fit_trains_what_the_method_says() -> None:
    fast = on_small("ee-diffusion")
    before = weights(fast.net.model)
    offramp.fit(fast, loader(), epochs=1, max_steps=2, progress=False)
    after = weights(fast.net.model)
    assert not torch.equal(before["blocks.0.attention.to_q.weight"], after["blocks.0.attention.to_q.weight"])
    assert torch.equal(before["time_embed.out.weight"], after["time_embed.out.weight"]), "the time embedder is held"

    heads = on_small("deediff")
    model, probe = weights(heads.net.model), weights(heads.net.heads)
    vars(heads)["_plan"] = "found for other weights"
    assert set(heads.net.heads) == {"blocks/0", "blocks/1", "blocks/2"}
    offramp.fit(heads, loader(), epochs=1, max_steps=2, progress=False)
    assert all(torch.equal(v, model[k]) for k, v in weights(heads.net.model).items()) and heads.plan is None
    assert any(not torch.equal(v, probe[k]) for k, v in weights(heads.net.heads).items())

    with pytest.raises(InvalidInput, match="deepcache trains nothing"):
        offramp.fit(on_small("deepcache"), loader(), epochs=1)
    uniform = on_small("static-schedule")
    offramp.fit(uniform, loader(), epochs=1, max_steps=1, progress=False)


# ---- bad input -------------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_by_name(pipe: Any, cached: DiffusionModel) -> None:
    model = small()
    bad: list[tuple[Any, str]] = [
        (lambda: offramp.attach(pipe), "takes a diffusion method"),
        (lambda: offramp.attach(pipe, system=systems.build("pabee")), "pabee is a method of the classify engine"),
        (lambda: offramp.attach(pipe, system=cached.system, at=["blocks.0"]), "takes no at"),
        (lambda: offramp.attach(pipe, system=cached.system, scheduler=EulerFlow()), "its own scheduler"),
        (lambda: offramp.attach(model, system=cached.system), "needs its noise levels"),
        (lambda: offramp.attach(model, system=cached.system, noise=FlowMatching()), "pass an example"),
        (lambda: offramp.attach(model, system=systems.build("few-steps"), noise=FlowMatching(), example=example()), "changes the sampler"),
        (lambda: offramp.attach(SimpleNamespace(scheduler=EulerFlow()), system=cached.system), "no denoiser"),
        (lambda: offramp.attach("pipe", system=cached.system), "got str"),
        (lambda: on_small("deepcache", branch=1), "branch must be from 0 to 0"),
        (lambda: on_small("latte-flow", groups=3), "must divide 4 blocks"),
        (lambda: offramp.compile(cached, "plan"), "what calibrate"),
        (lambda: offramp.calibrate(cached, offramp.MeanCost(0.5), rule=1), "takes no rule"),
        (lambda: offramp.calibrate("trace", offramp.MeanCost(0.5)), "got str"),
        (lambda: offramp.record(cached, []), "record of a diffusion model is not known"),
    ]
    for call, words in bad:
        with pytest.raises(InvalidInput, match=words):
            call()


def test_a_model_that_has_no_blocks_says_so() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(4, 4)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.mix(x) * t[:, None]

    with pytest.raises(InvalidInput, match="Plain has neither repeated blocks nor the down_blocks and up_blocks of a U-Net"):
        offramp.attach(
            Plain(), system=systems.build("deepcache"), noise=FlowMatching(), example={"x": torch.randn(2, 4), "t": torch.ones(2)}
        )


def test_a_change_of_noise_shape_is_no_error_and_no_warning(cached: DiffusionModel) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", NoEffectWarning)
        assert len(images(cached, class_labels=[3])) == 1 and len(images(cached)) == 2


def test_a_first_block_without_a_state_like_it_before_it_compares_states() -> None:
    torch.manual_seed(0)
    given = {"x": torch.randn(2, 6, 4), "t": torch.tensor([500.0, 300.0]), "y": torch.tensor([1, 2])}
    fast = offramp.attach(
        Toy().eval(), system=systems.build("first-block-cache"), scheduler=EulerFlow(), noise=FlowMatching(), example=given
    )
    assert type(fast.points[0].signal).__name__ == "StateChange" and on_small("first-block-cache").points[0].signal.since == "embed"


# ---- one at a time, and the pipeline as it is now ---------------------------------------------------------------------------


def first_images(run: Any, count: int) -> list[Tensor]:
    """The images of calls in several threads that begin together."""
    made: list[Tensor] = []
    threads = [threading.Thread(target=lambda: made.append(images(run, num_inference_steps=12))) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return made


def test_threads_wait_for_one_another(pipe: Any) -> None:
    fast = offramp.attach(pipe, system=systems.build("deepcache", interval=3))
    run = offramp.compile(fast)
    want = images(run, num_inference_steps=12)
    for one in (run, fast):
        found = first_images(one, 3)
        assert len(found) == 3 and all(torch.equal(f, want) for f in found)


def test_loops_of_their_own_in_two_threads_share_nothing() -> None:
    run = offramp.compile(on_small("deepcache", interval=4))
    given, times = example(), torch.linspace(950, 50, 4).tolist()
    each = [{**given, "sample": torch.randn(2, 1, 8, 8)} for _ in range(2)]
    want = [[run.net.model(**{**g, "timestep": torch.full((2,), t)}) for t in times] for g in each]
    mine, found = [threading.Semaphore(1), threading.Semaphore(0)], ([], [])  # type: ignore[var-annotated]

    def loop(k: int) -> None:
        for t in times:
            mine[k].acquire()  # the two take turns
            found[k].append(run(**{**each[k], "timestep": torch.full((2,), t)}))
            mine[1 - k].release()

    threads = [threading.Thread(target=loop, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k in range(2):
        assert all(torch.equal(a, b) for a, b in zip(found[k], want[k], strict=True)), "nothing is reused that another left"


def test_a_call_within_a_call_is_refused_and_the_next_one_runs(pipe: Any) -> None:
    fast = offramp.attach(pipe, system=systems.build("deepcache", interval=2))
    run = offramp.compile(fast)
    want = images(run)
    step = pipe.scheduler.step
    for one in (run, fast):
        for error in (None, KeyboardInterrupt):

            def inner(*args: Any, one: Any = one, error: Any = error, **kwargs: Any) -> Any:
                if error is not None:
                    raise error
                return images(one)

            pipe.scheduler.step = inner
            try:
                with pytest.raises(error or InvalidInput, match=None if error else "at work already"):
                    images(one)
            finally:
                pipe.scheduler.step = step
            assert torch.equal(images(one), want)


def test_a_method_of_the_pipeline_that_returns_it_returns_what_was_attached(pipe: Any) -> None:
    fast = offramp.attach(pipe, system=systems.build("deepcache", interval=2))
    assert fast.to("cpu") is fast and inspect.signature(fast.to) == inspect.signature(pipe.to)
    assert fast.set_progress_bar_config(disable=True) is None
    lone = on_small("deepcache")
    assert lone.eval() is lone and lone.to("cpu") is lone


def test_a_scheduler_that_is_set_on_the_pipeline_later_is_the_one_that_runs() -> None:
    from diffusers import DDIMScheduler, DiTPipeline, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

    own = DiTPipeline(dit(), autoencoder(), DDIMScheduler())
    own.set_progress_bar_config(disable=True)
    fast = offramp.attach(own, system=systems.build("ee-diffusion"))
    images(fast)
    before, edges = fast.report.log_snr, fast.points[0].signal.edges
    own.scheduler = DPMSolverMultistepScheduler(beta_schedule="squaredcos_cap_v2")
    got = images(fast)
    assert fast.scheduler is own.scheduler is fast.published.scheduler
    assert torch.equal(got, images(offramp.attach(own, system=systems.build("ee-diffusion"))))
    assert not torch.equal(fast.report.log_snr, before) and fast.points[0].signal.edges != edges, "levels are the new scheduler's"

    view = offramp.compile(fast)
    for setting in (own, fast, view):
        kept = setting.scheduler
        with pytest.raises(InvalidInput, match="samples a FlowMatching one"):
            setting.scheduler = FlowMatchEulerDiscreteScheduler()
            images(view if setting is view else fast)
        setting.scheduler = kept
    assert torch.equal(images(fast), got) and torch.equal(images(view), got)
    view.scheduler = DDIMScheduler()
    images(view)
    assert torch.equal(view.denoiser.report.log_snr, before), "a view follows its own scheduler"
    other = copy.copy(own)
    other.transformer = dit(3)
    fast.pipe.__dict__["transformer"] = other.transformer
    with pytest.raises(InvalidInput, match="another module than"):
        images(fast)


def _assign(model: nn.Module) -> None:
    model.load_state_dict({k: v * 1.1 for k, v in model.state_dict().items()}, assign=True)


def _replace(model: Any) -> None:
    model.blocks[0].attention.to_q = nn.Linear(16, 16)


def _hook(model: Any) -> None:
    model.blocks[1].register_forward_hook(lambda m, a, o: o * 0)


def _offload(model: Any) -> None:
    pytest.importorskip("accelerate").cpu_offload(model, execution_device="cpu")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_assign, "parameters are other tensors"),
        (_replace, "another module"),
        (_hook, "forward hook"),
        (_offload, "offloaded by accelerate"),
    ],
)
def test_a_model_that_changes_after_it_was_attached_is_refused(change: Any, words: str) -> None:
    model = small()
    fast, noise = on_small("deepcache", model, interval=2), torch.randn(2, 1, 8, 8)
    run, classes = offramp.compile(fast), {"class_labels": torch.tensor([0, 1])}
    sample(run, EulerFlow(), noise, steps=4, inputs=classes)
    change(model)
    for call in (
        lambda: sample(run, EulerFlow(), noise, steps=4, inputs=classes),
        lambda: run(**example()),
        lambda: offramp.compile(fast),
        lambda: fast.sample(noise, steps=4, inputs=classes),
    ):
        with pytest.raises(InvalidInput, match=words):
            call()


def test_weights_in_place_and_moved_ones_are_followed() -> None:
    model = small()
    model.register_buffer("extra", torch.ones(3))
    fast, given = on_small("shallow", model), example()
    run = offramp.compile(fast, captured=True)
    before = run(**given)
    run.reset()
    model.to(torch.float64).to(torch.float32)  # other buffers with the same values, and other addresses
    assert torch.equal(run(**given), before)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data * 1.5
    run.reset()
    assert torch.equal(run(**given), on_small("shallow", model)(**given)) and not torch.equal(run(**given), before)


def test_what_fewer_steps_spend_is_reported_of_all_that_were_asked_for(pipe: Any) -> None:
    fast = offramp.attach(pipe, system=systems.build("few-steps", share=0.5))
    images(fast)
    assert fast.report.cost == pytest.approx(0.5) and fast.report.row_cost.tolist() == pytest.approx([1.0] * 4)
    images(fast, num_inference_steps=5)
    assert fast.report.cost == pytest.approx(fast.taken(5) / 5)


def test_a_plan_is_of_one_method(pipe: Any, cached: DiffusionModel) -> None:
    plan = offramp.calibrate(offramp.attach(pipe, system=systems.build("few-steps")), offramp.MeanCost(0.6), calls=[CALL])
    for use in (
        lambda: offramp.compile(cached, plan),
        lambda: setattr(cached, "plan", plan),
        lambda: cached.sample(torch.randn(2, 4, 8, 8), steps=2, plan=plan),
    ):
        with pytest.raises(FingerprintMismatch, match="plan is of few-steps and the method here is deepcache"):
            use()
    with pytest.raises(InvalidInput, match="got 'plan'"):
        cached.plan = "plan"


def test_calls_carry_out_the_plan_that_was_calibrated(pipe: Any) -> None:
    fast = offramp.attach(pipe, system=systems.build("deepcache", interval=2))
    published = images(fast)
    plan = offramp.calibrate(fast, offramp.MeanCost(0.8), calls=[CALL])
    assert fast.plan is plan
    got = images(fast)
    assert fast.report.cost == pytest.approx(plan.cost.value) and not torch.equal(got, published)
    assert torch.equal(got, images(offramp.compile(fast, plan))) and torch.equal(got, images(offramp.compile(fast)))
    fast.plan = None
    assert torch.equal(images(fast), published) and fast.detach() is pipe


def test_a_second_method_is_composed_and_not_put_on_top(pipe: Any) -> None:
    every = offramp.attach(pipe, system=systems.build("deepcache", interval=2))
    first = offramp.attach(pipe, system=systems.build("first-block-cache", change=5.0))
    for given in (every, offramp.compile(every)):
        with pytest.raises(InvalidInput, match=r"compose\.composed\(first, second\)"):
            offramp.attach(given, system=first.system)
    lone = on_small("deepcache", interval=2)
    with pytest.raises(InvalidInput, match="carries out a method already"):
        on_small("shallow", offramp.compile(lone))

    both = composed(every, first)
    got, alone = images(both), images(every)
    assert isinstance(both, type(pipe)) and got.isfinite().all() and not torch.equal(got, alone)
    report = both.denoiser.report
    assert report.fired[0].tolist()[:3] == [-1, 0, 1] and report.cost < every.report.cost, "where one computes, the other may reuse"
    for wrong, words in (
        ((first,), "two methods or more"),
        ((first, lone), "attached to one pipeline"),
        ((first, offramp.attach(pipe, system=systems.build("few-steps"))), "no set of points"),
    ):
        with pytest.raises(InvalidInput, match=words):
            composed(*wrong)


def test_what_would_save_half_a_pipeline_is_refused(pipe: Any, cached: DiffusionModel, tmp_path: Path) -> None:
    run = offramp.compile(cached)
    with pytest.raises(InvalidInput, match="Save your own pipeline"):
        run.save_pretrained(tmp_path)
    cached.save_pretrained(tmp_path)
    assert (tmp_path / "transformer").is_dir(), "the pipeline's own"


@pytest.mark.parametrize("name", ["deepcache", "ras"])
def test_a_copy_is_whole_and_of_its_own(name: str) -> None:
    from diffusers import DDIMScheduler, DiTPipeline

    own = DiTPipeline(dit(), autoencoder(), DDIMScheduler())
    own.set_progress_bar_config(disable=True)
    fast = offramp.attach(own, system=systems.build(name))
    run = offramp.compile(fast, captured=True)
    want = images(run), images(fast)
    twins = copy.deepcopy(run), copy.deepcopy(fast)
    assert twins[0].transformer is twins[0].denoiser is not run.denoiser
    assert twins[0].denoiser.net.model is not own.transformer and twins[1].net.model is twins[1].pipe.transformer
    with torch.no_grad():
        own.transformer.proj_out_2.bias.add_(0.5)
    for twin, before, original in zip(twins, want, (run, fast), strict=True):
        assert torch.equal(images(twin), before) and not torch.equal(images(original), before)


def test_other_names_are_set_on_the_pipeline(pipe: Any) -> None:
    fast = offramp.attach(pipe, system=systems.build("deepcache", interval=2))
    before, vae = images(fast), pipe.vae
    with pytest.raises(InvalidInput, match=r"fast\.detach\(\)\.vae"):
        fast.vae = autoencoder()
    pipe.vae = copy.deepcopy(vae)
    try:
        with torch.no_grad():
            pipe.vae.decoder.conv_out.bias.add_(0.2)
        assert not torch.equal(images(fast), before)
    finally:
        pipe.vae = vae
