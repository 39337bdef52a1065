"""Denoisers in training: what an exit learns is what the engine gives there; noise, targets, plans and recipes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from denoisers import BLOCKS, PLACES, UViT, attached, batch, loud
from offramp.core.errors import InvalidInput
from offramp.core.noise import FlowMatching
from offramp.core.parts import part_from_dict, part_to_dict
from offramp.diffusion import DenoisingNet, attach_denoiser
from offramp.engines.diffusion.denoise import Denoiser
from offramp.exits import DenoisingExit
from offramp.network import attach
from offramp.policies.denoising import OUTPUT, Every, NoiseLevel, NoiseSchedule, Point, StateChange, depth_schedule
from offramp.policies.fills import CachedOutput, HeadOutput, Identity
from offramp.train import (
    PARTS,
    ExitsView,
    FinalOnly,
    Holding,
    Joint,
    Mean,
    MeanSquared,
    NoisePrediction,
    Noising,
    PlanView,
    RectifiedFlow,
    ScheduledDepth,
    Seen,
    UncertaintyAware,
    VelocityPrediction,
    add_heads,
    fit,
    layer_groups,
    linear_betas,
    load_best,
    noisy_loader,
)

ALWAYS = float("-inf")


def first(output: Any) -> Tensor:
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found


@pytest.fixture(scope="module")
def nets() -> Callable[[str], DenoisingNet]:
    """Attached once each; for tests that train nothing."""
    made: dict[str, DenoisingNet] = {}

    def get(kind: str) -> DenoisingNet:
        if kind != "uvit":
            pytest.importorskip("diffusers")
        if kind not in made:
            made[kind] = attached(kind)
        return made[kind]

    return get


def fresh() -> DenoisingNet:
    """A U-ViT to train; cutting it costs little."""
    torch.manual_seed(0)
    return attach_denoiser(loud(UViT(), 0.2), PLACES["uvit"], noise=FlowMatching(), example=batch(2))


def shapes(count: int = 64) -> tuple[Tensor, Tensor]:
    """Bright squares: the class says in which quarter, so there is something to learn."""
    g = torch.Generator().manual_seed(3)
    classes = torch.randint(0, 4, (count,), generator=g)
    images = torch.full((count, 3, 8, 8), -0.8) + 0.05 * torch.randn(count, 3, 8, 8, generator=g)
    for k, c in enumerate(classes.tolist()):
        images[k, :, 4 * (c // 2) : 4 * (c // 2) + 4, 4 * (c % 2) : 4 * (c % 2) + 4] += 1.5
    return images, classes


def loader(size: int = 16, **options: Any) -> Any:
    images, classes = shapes()
    noising = Noising(RectifiedFlow(), label="class_labels", no_class=10, **options)
    return noisy_loader(images, noising, size, classes=classes)


# ---- what is learned -----------------------------------------------------------------------------------------------------

PROCESSES = [RectifiedFlow(), RectifiedFlow(full=1.0, spread=None), NoisePrediction(linear_betas()), VelocityPrediction(linear_betas())]


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: f"{type(p).__name__}-{getattr(p, 'full', '')}")
def test_noise_is_added_at_the_level_that_the_timestep_says_and_the_target_gives_the_image_back(process: Any) -> None:
    torch.manual_seed(0)
    clean, noise, times = torch.rand(512, 3, 4, 4) * 2 - 1, torch.randn(512, 3, 4, 4), process.times(512)
    seen, target = process.noised(clean, noise, times)
    share = process.noise.log_snr(times).view(-1, 1, 1, 1)
    if isinstance(process, RectifiedFlow):
        sigma = torch.sigmoid(-share / 2)
        alpha, back = 1 - sigma, seen - sigma * target
    else:
        alpha, sigma = torch.sigmoid(share).sqrt(), torch.sigmoid(-share).sqrt()
        back = alpha * seen - sigma * target if isinstance(process, VelocityPrediction) else (seen - sigma * target) / alpha
    torch.testing.assert_close(seen.double(), alpha * clean + sigma * noise, atol=1e-5, rtol=1e-4)
    near = share.flatten() > -6  # further out the image is hardly in what is seen
    assert near.sum() > 200
    torch.testing.assert_close(back[near], clean[near].double(), atol=1e-4, rtol=1e-3)
    assert times.min() >= 0 and torch.unique(times).numel() > 100


def test_levels_of_a_flow_are_logit_normal() -> None:
    torch.manual_seed(0)
    logits = torch.logit(RectifiedFlow(mean=0.5, spread=0.8).times(20_000).double() / 1000)
    assert abs(float(logits.mean()) - 0.5) < 0.03 and abs(float(logits.std()) - 0.8) < 0.02


def test_a_scheduler_of_diffusers_adds_the_same_noise() -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    clean, noise, times = torch.randn(6, 3, 4, 4), torch.randn(6, 3, 4, 4), torch.tensor([0, 1, 250, 500, 750, 999])
    scheduler = diffusers.DDPMScheduler(1000, prediction_type="v_prediction")
    for process, target in ((NoisePrediction(linear_betas()), noise), (VelocityPrediction(linear_betas()), None)):
        seen, found = process.noised(clean, noise, times)
        torch.testing.assert_close(seen, scheduler.add_noise(clean, noise, times), atol=1e-5, rtol=1e-4)
        expected = scheduler.get_velocity(clean, noise, times) if target is None else target
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_labels_are_dropped_images_mirrored_and_batches_keep_to_a_bin() -> None:
    torch.manual_seed(0)
    images, classes = torch.arange(8.0).expand(400, 3, 8, 8).contiguous(), torch.randint(0, 10, (400,))
    flow = RectifiedFlow(full=1.0)
    made = Noising(flow, label="class_labels", no_class=10, drop=0.25, flip=True)((images, classes))
    assert abs(float((made["class_labels"] == 10).float().mean()) - 0.25) < 0.07
    kept = made["class_labels"] != 10
    assert bool((made["class_labels"][kept] == classes[kept]).all())
    back = made["sample"] - made["timestep"].view(-1, 1, 1, 1) * made["labels"]
    mirrored = back[:, 0, 0, 0] > 3.5
    assert abs(float(mirrored.float().mean()) - 0.5) < 0.1
    torch.testing.assert_close(back, torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images), atol=1e-4, rtol=1e-4)
    seen = set()
    for _ in range(40):
        times = Noising(flow, edges=(-1.0, 1.0))((images[:16], classes[:16]))["timestep"]
        bins = torch.bucketize(flow.noise.log_snr(times), torch.tensor([-1.0, 1.0], dtype=torch.float64), right=True)
        assert len(times) == 16 and len(set(bins.tolist())) == 1
        seen.add(int(bins[0]))
    assert seen == {0, 1, 2}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Noising(RectifiedFlow(), drop=1.5), "drop"),
        (lambda: Noising(RectifiedFlow(), edges=(1.0, 0.0)), "ascending"),
        (lambda: Noising(RectifiedFlow(), label="class_labels")([torch.zeros(3, 8, 8)]), "class for every image"),
        (lambda: noisy_loader(torch.zeros(4, 3, 8, 8), Noising(RectifiedFlow()), 8), "batch_size"),
        (lambda: RectifiedFlow(spread=0.0), "spread"),
        (lambda: ScheduledDepth((0.0,), (1,)), "bins"),
        (lambda: UncertaintyAware(uncertainty=-1.0), "weights"),
        (lambda: layer_groups("inlet", [f"blocks.{k}" for k in range(4)], 3, (0.0, 1.0)), "divide"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        make()


# ---- exits and plans -----------------------------------------------------------------------------------------------------

EXITS: dict[str, Sequence[str] | None] = {"uvit": None, "dit": None, "unet": ["down_blocks.0.resnets.0"]}


@pytest.mark.parametrize("kind", EXITS)
def test_an_exit_is_trained_on_what_the_engine_gives_there(nets: Callable[[str], DenoisingNet], kind: str) -> None:
    net = nets(kind)
    inputs = batch(5, net.sample_name)
    view = ExitsView(net, EXITS[kind])
    answers = view(**inputs)
    assert view.names == (*view.at, "output") and len(answers) == len(view.at) + 1
    for place, answer in zip(view.at, answers[:-1], strict=True):
        engine = Denoiser(net, [Point(place, -1, Identity(), NoiseLevel(), ALWAYS)])
        assert torch.equal(first(engine(**inputs)), answer)
        assert float((answer - answers[-1]).detach().abs().max()) > 1e-3
    with torch.no_grad():
        assert torch.equal(first(net.model(**inputs)), answers[-1])
    net.model.zero_grad()
    answers[0].square().mean().backward()
    reached = {n for n, p in net.model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    last = PLACES[kind][-2]
    assert reached and not any(n.startswith(f"{last}.") for n in reached), "an early exit must not move what it skips"
    net.model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("kind", ["uvit", "dit"])
def test_a_plan_is_trained_as_the_engine_runs_it(nets: Callable[[str], DenoisingNet], kind: str) -> None:
    net = nets(kind)
    inputs = batch(9, net.sample_name)
    blocks = [p for p in PLACES[kind] if "block" in p]
    plans = {
        "schedule": depth_schedule((-1.0, 1.0), [blocks[0], blocks[2], None]),
        "groups": layer_groups(blocks[0], blocks[1:3], 2, (0.5,)) if kind == "uvit" else layer_groups("pos_embed", blocks, 2, (0.5,)),
    }
    for plan in plans.values():
        view = PlanView(net, plan)
        answer = view(**inputs)[0]
        assert torch.equal(first(Denoiser(net, plan)(**inputs)), answer)
        alone = torch.cat([view(**{n: v[r : r + 1] for n, v in inputs.items()})[0] for r in range(9)])
        torch.testing.assert_close(alone, answer, atol=1e-5, rtol=1e-4)


def test_groups_of_blocks_serve_their_levels_alone(nets: Callable[[str], DenoisingNet]) -> None:
    net = nets("dit")
    blocks = [p for p in PLACES["dit"] if "block" in p]
    view = PlanView(net, layer_groups("pos_embed", blocks, 2, (0.0,)))
    names = {"noisy": {"transformer_blocks.0", "transformer_blocks.1"}, "clean": {"transformer_blocks.2", "transformer_blocks.3"}}
    for which, time in (("noisy", 900.0), ("clean", 100.0)):
        net.model.zero_grad()
        inputs = batch(3, "hidden_states") | {"timestep": torch.full((3,), time)}
        view(**inputs)[0].square().mean().backward()
        moved = {n for n in blocks if any(p.grad is not None and bool(p.grad.any()) for p in net.model.get_submodule(n).ff.parameters())}
        assert moved == names[which]
    net.model.zero_grad(set_to_none=True)


@pytest.mark.parametrize(("kind", "modulated"), [("uvit", False), ("dit", False), ("unet", True)])
def test_learned_exits_read_tokens_and_maps_and_say_what_the_engine_says(
    nets: Callable[[str], DenoisingNet], kind: str, modulated: bool, request: pytest.FixtureRequest
) -> None:
    net = nets(kind)
    request.addfinalizer(net.heads.clear)
    place = PLACES[kind][1]
    add_heads(net, DenoisingExit(modulated=modulated), [place])
    for p in net.heads.parameters():
        nn.init.normal_(p, std=0.05)
    inputs = batch(4, net.sample_name)
    view = ExitsView(net, [place])
    (answer, full), (level, told) = view.forward_with_states(**inputs)
    assert answer.shape == full.shape == (4, 3, 8, 8)
    assert told.shape == (4,) and float(told.detach().min()) > 0 and float(told.detach().max()) < 1
    engine = Denoiser(net, [Point(place, OUTPUT, HeadOutput(), NoiseLevel(), ALWAYS)])
    assert torch.equal(first(engine(**inputs)), answer)
    torch.testing.assert_close(level.double(), net.noise.log_snr(inputs["timestep"]), rtol=1e-5, atol=1e-5)
    ahead = inputs | {"timestep": inputs["timestep"] * 0.5}
    assert not torch.equal(view.forward_with_states(**ahead)[1][1], told), "the noise level must count"


def test_the_uncertainty_is_one_linear_map_of_state_and_level() -> None:
    from offramp.exits.denoising import level_features

    torch.manual_seed(0)
    head = DenoisingExit(output=False).build((6, 5), (3, 8, 8))
    nn.init.normal_(head.probe.weight)
    hidden, level = torch.randn(4, 6, 5), torch.linspace(-9, 9, 4)
    both = torch.cat([hidden, level_features(level)[:, None].expand(-1, 6, -1)], -1)
    torch.testing.assert_close(head.uncertainty(hidden, level), torch.sigmoid(head.probe(both)).mean((1, 2)))
    assert head.output is None
    with pytest.raises(InvalidInput, match="square patch"):
        DenoisingExit().build((7, 5), (3, 7, 2))
    with pytest.raises(InvalidInput, match="attach_denoiser"):
        attach(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), at=["0"], example=torch.randn(2, 4), head=DenoisingExit())  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="was given"):
        head.uncertainty(torch.randn(4, 6, 7), level)


def test_views_refuse_what_cannot_be_trained(nets: Callable[[str], DenoisingNet]) -> None:
    net = nets("uvit")
    with pytest.raises(InvalidInput, match="StateChange"):
        PlanView(net, [Point(0, -1, Identity(), StateChange(), -0.1)])
    with pytest.raises(InvalidInput, match="CachedOutput"):
        PlanView(net, [Point(0, -1, CachedOutput(), Every(2))])
    with pytest.raises(InvalidInput, match="order"):
        ExitsView(net, ["blocks.2", "blocks.0"])
    with pytest.raises(InvalidInput, match="UncertaintyAware needs exits"):
        fit(net, loader(), UncertaintyAware(), epochs=1, progress=False)
    with pytest.raises(InvalidInput, match="no exit 7"):
        fit(net, loader(), ScheduledDepth((0.0,), (7, None)), epochs=1, progress=False)
    with pytest.raises(InvalidInput, match="called nothing_like_it"):
        fit(net, loader(), Holding(Joint(Mean()), ("nothing_like_it",)), epochs=1, progress=False)
    with pytest.raises(InvalidInput, match="is for denoisers"):
        fit(PlanView(net, []), loader(), UncertaintyAware(), epochs=1, progress=False)
    with pytest.raises(InvalidInput, match="equilibrium"):
        fit(net, loader(), Joint(equilibrium=True), epochs=1, progress=False)


# ---- recipes -------------------------------------------------------------------------------------------------------------


def seen(answers: Sequence[Tensor], labels: Tensor, extra: Any) -> Seen:
    return Seen(tuple(answers), labels, MeanSquared(), extra=extra)


def test_a_row_learns_at_the_exit_of_its_noise_level() -> None:
    torch.manual_seed(0)
    answers = [torch.randn(6, 3, 2, 2, requires_grad=True) for _ in range(3)]
    labels, level = torch.randn(6, 3, 2, 2), torch.tensor([-9.0, -2.0, -1.0, 0.5, 1.0, 8.0])
    found = ScheduledDepth((-1.0, 1.0), (0, 1, None)).objective(seen(answers, labels, level))
    depth = [0, 0, 1, 1, 2, 2]  # a level on an edge belongs to the cleaner bin
    each = torch.stack([(answers[d][r] - labels[r]).square().mean() for r, d in enumerate(depth)])
    torch.testing.assert_close(found.total, each.mean())
    for k in range(3):
        torch.testing.assert_close(found.losses[k], each[2 * k : 2 * k + 2].mean())
    found.total.backward()
    for k, answer in enumerate(answers):
        assert answer.grad is not None
        assert [bool(g.any()) for g in answer.grad] == [d == k for d in depth]


def test_uncertainty_learns_the_error_and_the_error_does_not_learn_from_it() -> None:
    torch.manual_seed(0)
    answers = [torch.randn(5, 3, 2, 2, requires_grad=True) for _ in range(3)]
    told = [torch.rand(5, requires_grad=True) for _ in range(2)]
    labels = torch.randn(5, 3, 2, 2)
    found = UncertaintyAware(uncertainty=0.7, layers=0.3).objective(seen(answers, labels, tuple(told)))
    total = (answers[2] - labels).square().mean()
    for answer, u in zip(answers[:2], told, strict=True):
        error = (answer - labels).detach().tanh().abs().mean((1, 2, 3))
        total = total + 0.7 * (u - error).square().mean() + 0.3 * ((1 - u.detach()) * (answer - labels).square().mean((1, 2, 3))).mean()
    torch.testing.assert_close(found.total, total)
    wanted = torch.autograd.grad(total, [*answers, *told])
    for a, b in zip(torch.autograd.grad(found.total, [*answers, *told]), wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "recipe", [Holding(ScheduledDepth((0.0, 2.0), (0, 1, None))), UncertaintyAware(0.5, 2.0, joint=True)], ids=lambda r: type(r).__name__
)
def test_recipes_come_back_from_data(recipe: Any) -> None:
    assert part_from_dict(part_to_dict(recipe), PARTS) == recipe


def test_training_lowers_the_loss_of_every_exit() -> None:
    net = fresh()
    found = fit(net, loader(), epochs=25, optimizer=lambda p: torch.optim.AdamW(p, 3e-3), progress=False)
    steps = [r["losses"] for r in found.history if r["event"] == "step"]
    for name in (*net.at[:-1], "output"):
        before, after = (sum(s[name] for s in part) / 8 for part in (steps[:8], steps[-8:]))
        assert after < 0.7 * before, (name, before, after)


def test_what_is_held_stays_and_everything_else_moves() -> None:
    net = fresh()
    before = {n: p.detach().clone() for n, p in net.model.named_parameters()}
    recipe = Holding(ScheduledDepth((-1.0, 1.0), (0, 1, None)))
    fit(net, loader(), recipe, epochs=2, optimizer=lambda p: torch.optim.AdamW(p, 1e-3, weight_decay=0.0), progress=False)
    same = {n for n, p in net.model.named_parameters() if torch.equal(p, before[n])}
    assert same == {n for n in before if n.startswith("time_embed.")}
    assert all(p.requires_grad for p in net.model.parameters())


def test_learned_exits_leave_a_frozen_model_as_it_is_and_a_joint_one_learns() -> None:
    for joint in (False, True):
        net = fresh()
        add_heads(net, DenoisingExit())
        before = {n: p.detach().clone() for n, p in net.model.named_parameters()}
        found = fit(net, loader(), UncertaintyAware(joint=joint), epochs=12, optimizer=lambda p: torch.optim.AdamW(p, 3e-3), progress=False)
        assert all(torch.equal(p, before[n]) for n, p in net.model.named_parameters()) is not joint
        terms = [r["terms"] for r in found.history if r["event"] == "step"]
        for name in ("uncertainty", "layers"):
            start, end = (sum(t[name] for t in part) / 6 for part in (terms[:6], terms[-6:]))
            assert end < 0.8 * start, (name, start, end)


def test_a_plan_and_a_shallow_schedule_learn_what_they_run(tmp_path: Path) -> None:
    net = fresh()
    edges = (0.0,)
    view = PlanView(net, layer_groups("blocks.0", ["blocks.1", "blocks.2"], 2, edges))
    found = fit(
        view, loader(edges=edges), Joint(FinalOnly()), epochs=25, optimizer=lambda p: torch.optim.AdamW(p, 3e-3),
        eval_loader=loader(), output_dir=tmp_path, progress=False,
    )  # fmt: skip
    evaluations = [r["loss"] for r in found.history if r["event"] == "eval"]
    assert min(evaluations) < 0.7 * evaluations[0]
    assert load_best(view, tmp_path) in [r["step"] for r in found.history if r["event"] == "eval"]


def learned_variance() -> DenoisingNet:
    """A U-ViT that answers a prediction of 3 channels and then a variance of 3."""
    torch.manual_seed(0)
    return attach_denoiser(loud(UViT(channels=6), 0.2), PLACES["uvit"], noise=FlowMatching(), example=batch(2))


def test_exits_of_a_learned_variance_answer_the_prediction_and_the_middle_of_the_variances_bounds() -> None:
    net = learned_variance()
    add_heads(net, DenoisingExit(), ["blocks.0"])  # the others answer through the model's final layers
    for p in net.heads.parameters():
        torch.nn.init.normal_(p, std=0.3)
    view, inputs = ExitsView(net), batch(4)
    with torch.no_grad():
        answers, _ = view.forward_with_states(**inputs)
        assert [tuple(a.shape) for a in answers] == [(4, 3, 8, 8)] * BLOCKS
        torch.testing.assert_close(answers[-1], net.model(**inputs)[:, :3])
        for place, answer in zip(net.at[:-1], answers, strict=False):
            own = place == "blocks.0"
            point = Point(place, OUTPUT if own else -1, HeadOutput() if own else Identity(), NoiseLevel(), ALWAYS)
            whole = Denoiser(net, (point,))(**inputs)
            assert whole.shape == (4, 6, 8, 8), "samplers find the variance where it always was"
            torch.testing.assert_close(whole[:, :3], answer)
            assert (whole[:, 3:] == 0).all() == own
    assert net.heads["blocks/0"].linear.out_features == 12  # the prediction alone costs  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "recipe",
    [Joint(Mean()), Joint(FinalOnly()), Holding(ScheduledDepth((0.0,), (0, None))), UncertaintyAware(), UncertaintyAware(joint=True)],
    ids=["mean", "final", "schedule", "heads", "joint"],
)
def test_a_learned_variance_is_left_untrained_by_every_recipe(recipe: Any) -> None:
    net = learned_variance()
    if isinstance(recipe, UncertaintyAware):
        add_heads(net, DenoisingExit())
    before = {n: p.detach().clone() for n, p in net.model.named_parameters()}
    found = fit(net, loader(), recipe, epochs=2, optimizer=lambda p: torch.optim.AdamW(p, 1e-3, weight_decay=0.0), progress=False)
    assert all(math.isfinite(r["loss"]) for r in found.history if r["event"] == "step")
    outlet = net.model.outlet.weight.unflatten(0, (6, 4))  # type: ignore[union-attr,operator]
    was = before["outlet.weight"].unflatten(0, (6, 4))
    assert torch.equal(outlet[3:], was[3:])
    trains = getattr(recipe, "joint", True)
    assert torch.equal(outlet[:3], was[:3]) is not trains


def test_a_plan_trains_the_prediction_of_a_learned_variance() -> None:
    net = learned_variance()
    view = PlanView(net, depth_schedule((0.0,), ("blocks.0", None)))
    inputs = batch(4)
    answer, _ = view.forward_with_states(**inputs)
    assert answer[0].shape == (4, 3, 8, 8)
    fit(view, loader(), Joint(FinalOnly()), epochs=1, progress=False)


def test_a_run_that_was_cut_short_goes_on_exactly(tmp_path: Path) -> None:
    def run(folder: Path, *stops: int | None) -> dict[str, Tensor]:
        net = fresh()
        for stop in stops:
            fit(net, loader(), Joint(Mean()), epochs=3, output_dir=folder, max_steps=stop, progress=False)
        return dict(net.model.state_dict())

    whole, parts = run(tmp_path / "a", 12), run(tmp_path / "b", 5, 12)
    assert all(torch.equal(v, parts[n]) for n, v in whole.items())


@pytest.mark.parametrize("exits", [None, []], ids=["with exits", "without"])
def test_compiled_views_answer_alike(exits: list[str] | None) -> None:
    net = fresh()
    view = ExitsView(net, exits)
    inputs = batch(4)
    plain = view(**inputs)
    keys = set(view.state_dict())
    view.compile(backend="eager")
    for a, b in zip(view(**inputs), plain, strict=True):
        torch.testing.assert_close(a, b)
    assert set(view.state_dict()) == keys, "compiling must not change what is saved"


def test_mixed_precision_reaches_the_cut() -> None:
    net = fresh()
    found = fit(net, loader(), epochs=1, mixed_precision="bf16", progress=False)
    assert all(math.isfinite(r["loss"]) for r in found.history)


def test_the_schedule_of_signals_and_of_the_recipe_agree(nets: Callable[[str], DenoisingNet]) -> None:
    net = nets("uvit")
    inputs, edges = batch(9), (-1.0, 1.0)
    exits = ExitsView(net)
    answers, states = exits.forward_with_states(**inputs)
    labels = torch.randn_like(answers[-1])
    total = ScheduledDepth(edges, (0, 2, None)).objective(seen(answers, labels, states[0])).total
    plan = PlanView(net, depth_schedule(edges, ["blocks.0", "blocks.2", None]))
    torch.testing.assert_close((plan(**inputs)[0] - labels).square().mean(), total)
    assert isinstance(plan.points[0].signal, NoiseSchedule) and len(net.at) == BLOCKS
