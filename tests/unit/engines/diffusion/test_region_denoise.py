"""Some tokens of an image through a denoiser: against computation by hand, against the plain model, against batches of one."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from denoise_models import autoencoder, dit, pixart, schedulers, sd3, unet
from torch import Tensor, nn

from denoisers import loud
from offramp.backbones import diffusers as library
from offramp.backbones.image_tokens import ImageTokens, prediction
from offramp.core.errors import BudgetInfeasible, InvalidInput, NoEffectWarning, UnsupportedModel
from offramp.core.flops import count_flops
from offramp.core.noise import FlowMatching
from offramp.diffusion import uncut_denoiser
from offramp.engines.diffusion import region_graphs
from offramp.engines.diffusion.pipeline import sample
from offramp.engines.diffusion.region_budget import region_cost, regions_for_cost
from offramp.engines.diffusion.region_step import EagerRegions, RegionMemory, RegionRunner
from offramp.engines.diffusion.regions import RegionDenoiser, attach_region_pipeline, attach_regions
from offramp.reduce.regions import AtLevels, AtSteps, ChannelNorm, Regions

pytest.importorskip("diffusers")

LITTLE = Regions(ratio=0.5, multiple=4, first=2, resets=AtSteps((5,)))
NAMES = ("hidden_states", "timestep")
MODELS = {"dit": dit, "pixart": pixart, "sd3": sd3}
EXTRA: dict[str, Any] = {"pixart": {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}}

families = pytest.mark.parametrize("family", MODELS)


def conditions(family: str, rows: int) -> dict[str, Any]:
    """What conditions each row, different for each; the same for a row whatever the number of rows."""
    draws = [torch.Generator().manual_seed(100 + r) for r in range(rows)]
    text = torch.stack([torch.randn(8, 12, generator=g) for g in draws])
    if family == "dit":
        return {"class_labels": torch.arange(rows) * 7 % 1000}
    if family == "pixart":
        mask = torch.ones(rows, 8)
        mask[:, 6:] = 0
        return {"encoder_hidden_states": text, "encoder_attention_mask": mask, **EXTRA["pixart"]}
    return {"encoder_hidden_states": text, "pooled_projections": torch.stack([torch.randn(10, generator=g) for g in draws])}


def images(rows: int, height: int = 8, width: int = 8) -> Tensor:
    return torch.stack([torch.randn(4, height, width, generator=torch.Generator().manual_seed(r)) for r in range(rows)])


def of(
    family: str, regions: Regions = LITTLE, model: nn.Module | None = None, observe: bool = False, run: RegionRunner | None = None
) -> RegionDenoiser:
    model = model if model is not None else MODELS[family]()
    example = {"hidden_states": images(2), "timestep": torch.tensor([600, 600]), **conditions(family, 2)}
    return attach_regions(model, regions, noise=FlowMatching(), example=example, observe=observe, run=run)


def row_of(value: Any, row: int) -> Any:
    return value[row : row + 1] if isinstance(value, Tensor) else value


def close(found: Tensor, expected: Tensor) -> None:
    """Equal but for rounding, by the size of the image: random models do not stay near 1."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * max(1.0, float(expected.abs().max())))


@families
class TestExactness:
    def test_all_tokens_are_the_plain_model_bit_for_bit_with_every_scheduler(self, family: str) -> None:
        denoiser = of(family, Regions(ratio=1.0, first=1, resets=AtSteps(())))
        given = conditions(family, 2)
        for scheduler in schedulers():
            plain = sample(denoiser.net.model, scheduler(), images(2), steps=5, inputs=given, names=NAMES)
            assert torch.equal(sample(denoiser, scheduler(), images(2), steps=5, inputs=given), plain)
            assert denoiser.report.cost == 1.0 and denoiser.report.reasons == {(0, "first"): 2, (0, "all"): 8}
            denoiser.regions = Regions(first=100)
            assert torch.equal(sample(denoiser, scheduler(), images(2), steps=5, inputs=given), plain)
            denoiser.regions = dataclasses.replace(LITTLE, first=1)
            assert not torch.allclose(sample(denoiser, scheduler(), images(2), steps=5, inputs=given), plain, atol=1e-3)
            denoiser.regions = Regions(ratio=1.0, first=1, resets=AtSteps(()))

    def test_a_row_does_not_depend_on_its_batch_mates(self, family: str) -> None:
        denoiser = of(family, dataclasses.replace(LITTLE, ratio=0.4, change=0.3, resets=AtLevels((0.5,))))
        rows = 8
        given = conditions(family, rows)
        for scheduler in schedulers():
            together = sample(denoiser, scheduler(), images(rows), steps=6, inputs=given)
            assert denoiser.report.cost < 0.95
            for row in range(rows):
                own = {n: row_of(v, row) for n, v in given.items()}
                alone = sample(denoiser, scheduler(), images(rows)[row : row + 1], steps=6, inputs=own)
                close(alone[0], together[row])

    def test_images_that_are_not_square(self, family: str) -> None:
        denoiser, given = of(family), conditions(family, 2)
        if family == "dit":  # diffusers' DiT puts tokens back as a square
            with pytest.raises(InvalidInput, match=r"gives \(3, 4, 8, 8\)"):
                denoiser(hidden_states=images(2, 8, 12), timestep=torch.tensor(500), **given)
            return
        flow = schedulers()[2]
        plain = sample(denoiser.net.model, flow(), images(2, 8, 12), steps=7, inputs=given, names=NAMES)
        denoiser.regions = Regions(first=100)
        assert torch.equal(sample(denoiser, flow(), images(2, 8, 12), steps=7, inputs=given), plain)
        denoiser.regions, denoiser.observe = LITTLE, True
        sample(denoiser, flow(), images(2, 8, 12), steps=7, inputs=given)
        assert [int(m.sum()) for m in denoiser.maps.values()] == [48, 48, 24, 24, 24, 48, 24]

    def test_flops_are_those_of_the_tokens_that_are_computed(self, family: str) -> None:
        denoiser, given = of(family), conditions(family, 3)
        sample(denoiser, schedulers()[2](), images(3), steps=6, inputs=given)
        report, model = denoiser.report, denoiser.net.model
        call = {"hidden_states": images(1), "timestep": torch.tensor([500]), **{n: row_of(v, 0) for n, v in given.items()}}
        assert report.full_flops == count_flops(model, **call)
        tokens, width, layers, text = 16, 16, len(model.transformer_blocks), 8  # type: ignore[arg-type]
        each = 2 * 4 * width**2 + 2 * 8 * width**2 + 4 * tokens * width  # projections, feed-forward, attention to all tokens
        each += {"dit": 0, "pixart": 2 * 2 * width**2 + 4 * text * width, "sd3": 4 * text * width}[family]  # attention to text
        saved = 8 * (layers * each + 2 * width * 4 * 4)  # and the output layer, of 8 of the 16 tokens
        assert report.flops[0].tolist() == [report.full_flops - (saved if s in (2, 3, 4) else 0) for s in range(6)]
        assert report.fired[0].tolist() == [-1, -1, 0, 0, 0, -1] and (report.depth == layers).all()

    def test_the_users_model_stays_what_it_was(self, family: str) -> None:
        model = MODELS[family]().train()
        before = {n: (id(m), type(m), m.training) for n, m in model.named_modules()}
        processors = {n: id(m.processor) for n, m in model.named_modules() if hasattr(m, "processor")}
        weights = copy.deepcopy(model.state_dict())
        denoiser = of(family, model=model)
        sample(denoiser, schedulers()[2](), images(2), steps=4, inputs=conditions(family, 2))
        assert {n: (id(m), type(m), m.training) for n, m in model.named_modules()} == before
        assert {n: id(m.processor) for n, m in model.named_modules() if hasattr(m, "processor")} == processors and processors
        assert all(torch.equal(v, weights[n]) for n, v in model.state_dict().items())

    def test_what_is_loaded_into_the_model_afterwards_is_seen(self, family: str) -> None:
        from diffusers.models.attention_processor import Attention, AttnProcessor

        denoiser, given = of(family, Regions(first=100)), conditions(family, 2)
        model: Any = denoiser.net.model
        before = sample(denoiser, schedulers()[2](), images(2), steps=2, inputs=given)
        block = model.transformer_blocks[1]
        attention: Attention = block.attn if family == "sd3" else block.attn1
        attention.to_k = nn.Sequential(attention.to_k, nn.Tanh())
        if family != "sd3":
            attention.set_processor(AttnProcessor())
        plain = sample(model, schedulers()[2](), images(2), steps=2, inputs=given, names=NAMES)
        assert torch.equal(sample(denoiser, schedulers()[2](), images(2), steps=2, inputs=given), plain) and not torch.equal(before, plain)
        with torch.no_grad():
            model.pos_embed.proj.weight.mul_(1.1)
        plain = sample(model, schedulers()[2](), images(2), steps=2, inputs=given, names=NAMES)
        assert torch.equal(sample(denoiser, schedulers()[2](), images(2), steps=2, inputs=given), plain)


class ByHand:
    """DiT's forward for one image, some tokens over kept keys and values, written out in matrix products."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.keys: list[Tensor] = [torch.full((16, 16), math.nan) for _ in model.transformer_blocks]
        self.values = [k.clone() for k in self.keys]
        self.output = torch.full((16, 16), math.nan)

    def __call__(self, image: Tensor, time: Tensor, label: Tensor, active: list[int]) -> Tensor:
        model = self.model
        state = model.pos_embed(image)[0, active]
        for k, block in enumerate(model.transformer_blocks):
            modulation = block.norm1.linear(nn.functional.silu(block.norm1.emb(time, label)))[0].chunk(6)
            shift, scale, gate, shift_ff, scale_ff, gate_ff = modulation
            x = nn.functional.layer_norm(state, (16,), eps=1e-6) * (1 + scale) + shift
            attention = block.attn1
            self.keys[k][active] = x @ attention.to_k.weight.T + attention.to_k.bias
            self.values[k][active] = x @ attention.to_v.weight.T + attention.to_v.bias
            query = x @ attention.to_q.weight.T + attention.to_q.bias
            heads = []
            for part in (slice(0, 8), slice(8, 16)):
                weights = (query[:, part] @ self.keys[k][:, part].T / math.sqrt(8)).softmax(-1)
                heads.append(weights @ self.values[k][:, part])
            state = state + gate * (torch.cat(heads, 1) @ attention.to_out[0].weight.T + attention.to_out[0].bias)
            x = nn.functional.layer_norm(state, (16,), eps=1e-5) * (1 + scale_ff) + shift_ff
            inner = nn.functional.gelu(x @ block.ff.net[0].proj.weight.T + block.ff.net[0].proj.bias, approximate="tanh")
            state = state + gate_ff * (inner @ block.ff.net[2].weight.T + block.ff.net[2].bias)
        condition = nn.functional.silu(model.transformer_blocks[0].norm1.emb(time, label))
        shift, scale = model.proj_out_1(condition)[0].chunk(2)
        self.output[active] = model.proj_out_2(nn.functional.layer_norm(state, (16,), eps=1e-6) * (1 + scale) + shift)
        picture = torch.empty(4, 8, 8)
        for token, numbers in enumerate(self.output):
            r, c = divmod(token, 4)
            picture[:, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2] = numbers.reshape(2, 2, 4).permute(2, 0, 1)
        return picture


@torch.no_grad()
def test_steps_of_some_tokens_equal_a_computation_by_hand() -> None:
    """Several steps with other tokens each: keys and values of the others are those of when they were last computed."""
    denoiser = of("dit", Regions(ratio=0.4, multiple=1, first=1, resets=AtSteps(())), observe=True)
    labels = torch.tensor([3, 800])
    hands = [ByHand(denoiser.net.model) for _ in range(2)]
    seen: list[set[tuple[int, ...]]] = [set(), set()]
    for step, time in enumerate((900, 800, 650, 500, 300)):
        image = torch.randn(2, 4, 8, 8)
        found = denoiser(hidden_states=image, timestep=torch.tensor(time), class_labels=labels).sample
        for row in range(2):
            active = denoiser.maps[0, step][row].nonzero().flatten().tolist()
            assert len(active) == (16 if step == 0 else 7)
            seen[row].add(tuple(active))
            expected = hands[row](image[row : row + 1], torch.tensor([time]), labels[row : row + 1], active)
            torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-5)
    assert all(len(s) > 2 for s in seen), "other tokens at other steps"


@families
@torch.no_grad()
def test_steps_equal_the_models_own_forward_with_keys_and_values_put_back(family: str) -> None:
    """The plain model with every token computed, but in every block the keys and values of inactive tokens set to the remembered ones."""
    denoiser = of(family, Regions(ratio=0.4, multiple=1, first=1, resets=AtSteps((3,))), observe=True)
    model, given = copy.deepcopy(denoiser.net.model), conditions(family, 2)
    now: dict[str, Tensor] = {}
    kept: dict[str, Tensor] = {}

    def put_back(name: str, new: Tensor) -> Tensor:
        kept[name] = torch.where(now["active"][..., None], new, kept.get(name, new))
        return kept[name]

    attention = "attn" if family == "sd3" else "attn1"
    for name, module in model.named_modules():
        if name.endswith((f".{attention}.to_k", f".{attention}.to_v")):
            module.register_forward_hook(lambda _, __, new, name=name: put_back(name, new))
    last = torch.zeros(2, 4, 8, 8)
    for step, time in enumerate((900, 800, 650, 500, 400, 300)):
        call = {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([time, time]), **given}
        found = denoiser(**call).sample
        now["active"] = denoiser.maps[0, step]
        pixels = now["active"].reshape(2, 1, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)
        last = torch.where(pixels, model(**call).sample, last)
        torch.testing.assert_close(found, last, rtol=1e-4, atol=1e-5)
        assert now["active"].sum(1).tolist() == [16 if step in (0, 3) else 7] * 2
    assert len(kept) == 2 * len(model.transformer_blocks)  # type: ignore[arg-type]


@torch.no_grad()
def test_the_tokens_are_those_of_highest_priority() -> None:
    regions = Regions(ratio=0.5, multiple=1, first=1, resets=AtSteps(()), measure=ChannelNorm(), low=False)
    denoiser = of("dit", regions, observe=True)
    waited, last = torch.zeros(1, 16), torch.zeros(0)
    for step, time in enumerate((900, 800, 650, 500)):
        output = denoiser(hidden_states=images(1) * (1 + step), timestep=torch.tensor(time), class_labels=torch.tensor([3])).sample
        active = denoiser.maps[0, step]
        if step:
            priority = nn.functional.avg_pool2d(last.square().sum(1, keepdim=True).sqrt(), 2).flatten(1) * torch.exp(0.1 * waited)
            assert set(priority.topk(8).indices[0].tolist()) == set(active[0].nonzero().flatten().tolist())
        waited, last = torch.where(active, 0, waited + 1), output.clone()


def test_both_attentions_of_a_block_and_normed_queries() -> None:
    """Stable Diffusion 3.5: a second attention over the image alone, and norms of queries and keys."""
    from diffusers import SD3Transformer2DModel

    config = {k: v for k, v in dict(sd3().config).items() if not k.startswith("_")}
    model = loud(SD3Transformer2DModel(**{**config, "dual_attention_layers": (0, 1), "qk_norm": "rms_norm"}))
    denoiser = of("sd3", model=model)
    assert denoiser.image_tokens.places == 2 * (3 + 2) + 1
    sample(denoiser, schedulers()[2](), images(2), steps=5, inputs=conditions("sd3", 2))
    assert denoiser.report.reasons[0, "skipped"] == 6


@families
def test_bfloat16(family: str) -> None:
    model = MODELS[family]().bfloat16()
    given = {n: v.bfloat16() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in conditions(family, 2).items()}
    example = {"hidden_states": images(2).bfloat16(), "timestep": torch.tensor([600, 600]), **given}
    denoiser = attach_regions(model, Regions(first=100), noise=FlowMatching(), example=example)
    plain = sample(model, schedulers()[2](), images(2).bfloat16(), steps=5, inputs=given, names=NAMES)
    assert torch.equal(sample(denoiser, schedulers()[2](), images(2).bfloat16(), steps=5, inputs=given), plain)
    denoiser.regions = LITTLE
    found = sample(denoiser, schedulers()[2](), images(2).bfloat16(), steps=5, inputs=given)
    assert found.dtype == torch.bfloat16 and found.isfinite().all() and denoiser.report.cost < 1


class _Attention(nn.Module):
    """Of a transformer in plain PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (2, 8)).transpose(1, 2) for part in (self.to_q, self.to_k, self.to_v))
        return self.to_out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm, self.mlp = _Attention(), nn.LayerNorm(16), nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x) + condition)
        return x + self.mlp(x)


class _Embed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.position = nn.Conv2d(1, 16, 2, 2), nn.Parameter(torch.randn(1, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.patches(x).flatten(2).transpose(1, 2) + self.position


class Own(nn.Module):
    """A user's own denoiser of one channel, which returns a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks, self.out = _Embed(), nn.ModuleList(_Block() for _ in range(3)), nn.Linear(16, 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        tokens = self.embed(x)
        for block in self.blocks:
            tokens = block(tokens, (t.to(x.dtype) / 1000)[:, None, None])
        return nn.functional.pixel_shuffle(self.out(tokens).transpose(1, 2).unflatten(2, (4, 4)), 2)


def test_a_users_own_transformer() -> None:
    model, example = Own().eval(), (torch.randn(2, 1, 8, 8), torch.tensor([300, 500]))
    with pytest.raises(InvalidInput, match="ChannelNorm"):
        attach_regions(model, LITTLE, noise=FlowMatching(), example=example)
    denoiser = attach_regions(model, dataclasses.replace(LITTLE, measure=ChannelNorm()), noise=FlowMatching(), example=example)
    noise = torch.randn(4, 1, 8, 8)
    plain = sample(model, schedulers()[2](), noise, steps=6)
    assert not torch.allclose(sample(denoiser, schedulers()[2](), noise, steps=6), plain) and denoiser.report.cost < 0.85
    denoiser.regions = Regions(first=100, measure=ChannelNorm())
    assert torch.equal(sample(denoiser, schedulers()[2](), noise, steps=6), plain)


class TestBranches:
    @torch.no_grad()
    def test_branches_in_calls_of_their_own_never_share_state(self) -> None:
        model = dit()
        both, first, second = (of("dit", model=model) for _ in range(3))
        labels = (torch.tensor([3, 4]), torch.tensor([1000, 1000]))
        for time in (900, 800, 700, 600, 500, 400):
            image = torch.randn(2, 4, 8, 8)
            call = {"hidden_states": image, "timestep": torch.tensor(time)}
            conditional, free = (both(**call, class_labels=label).sample for label in labels)
            assert torch.equal(conditional, first(**call, class_labels=labels[0]).sample)
            assert torch.equal(free, second(**call, class_labels=labels[1]).sample)
        assert both.report.flops.shape == (4, 6) and both.report.cost < 0.95
        assert both.report.cache_bytes == 2 * first.report.cache_bytes

    def test_branches_in_one_call_are_rows(self) -> None:
        denoiser, noise = of("dit"), images(2)
        given: Any = {"inputs": {"class_labels": torch.tensor([1, 2])}, "unconditional": {"class_labels": torch.tensor([1000, 1000])}}
        for scheduler in schedulers():
            together = sample(denoiser, scheduler(), noise, steps=5, guidance=2.0, **given)
            halves = [
                sample(
                    denoiser, scheduler(), noise[r : r + 1], steps=5, guidance=2.0,
                    inputs={"class_labels": torch.tensor([1 + r])}, unconditional={"class_labels": torch.tensor([1000])},
                )
                for r in range(2)
            ]  # fmt: skip
            close(torch.cat(halves), together)


class TestMemory:
    def test_it_is_counted_and_forgotten(self) -> None:
        denoiser, given = of("dit"), conditions("dit", 2)
        first = sample(denoiser, schedulers()[2](), images(2), steps=5, inputs=given)
        kept = 2 * 4 * (2 * 4 * 16 * 16 + 16 * 16 + 16) + 2 * 16 * 4 + 2  # keys, values, outputs, focus; waits; flags
        assert denoiser.report.cache_bytes == kept
        assert denoiser.trajectory.cache_bytes == 0
        assert torch.equal(sample(denoiser, schedulers()[2](), images(2), steps=5, inputs=given), first)

    @torch.no_grad()
    def test_a_new_trajectory_begins_where_noise_rises(self) -> None:
        model = dit()
        denoiser, alone = of("dit", model=model), of("dit", model=model)
        call: Any = {"class_labels": torch.tensor([3, 4])}
        for time in (700, 600, 500):
            denoiser(hidden_states=images(2), timestep=torch.tensor(time), **call)
        for time in (900, 800, 700, 600):
            image = torch.randn(2, 4, 8, 8)
            found = denoiser(hidden_states=image, timestep=torch.tensor(time), **call).sample
            assert torch.equal(found, alone(hidden_states=image, timestep=torch.tensor(time), **call).sample)

    @torch.no_grad()
    def test_rows_at_different_steps_go_their_own_ways(self) -> None:
        """The last row begins anew while the others go on: dense and partial rows in one call."""
        model = dit()
        denoiser, alone = of("dit", model=model, observe=True), [of("dit", model=model) for _ in range(3)]
        times = [(700, 300), (600, 200), (500, 900), (400, 800), (300, 700), (200, 600), (100, 500)]
        labels = torch.tensor([3, 4, 5])
        for step, (going, anew) in enumerate(times):
            image, time = torch.randn(3, 4, 8, 8), torch.tensor([going, going, anew])
            found = denoiser(hidden_states=image, timestep=time, class_labels=labels).sample
            for row in range(3):
                call = {"hidden_states": image[row : row + 1], "class_labels": labels[row : row + 1], "timestep": time[row]}
                torch.testing.assert_close(found[row : row + 1], alone[row](**call).sample, rtol=0, atol=1e-5)
            counts = denoiser.maps[0, step].sum(1).tolist()
            assert counts == [[16] * 3, [16] * 3, [8, 8, 16], [8, 8, 16], [8] * 3, [16, 16, 8], [8] * 3][step]

    def test_resets_by_noise_level_come_once(self) -> None:
        denoiser = of("dit", dataclasses.replace(LITTLE, resets=AtLevels((-0.5, 1.0))))
        for steps in (8, 13):
            sample(denoiser, schedulers()[2](), images(2), steps=steps, inputs=conditions("dit", 2))
            assert denoiser.report.reasons == {(0, "first"): 4, (0, "reset"): 4, (0, "skipped"): 2 * (steps - 4)}
            dense = (denoiser.report.fired[0] < 0).nonzero().flatten().tolist()[2:]
            levels = denoiser.report.log_snr[0].tolist()
            assert all(levels[s - 1] < x <= levels[s] for s, x in zip(dense, (-0.5, 1.0), strict=True))

    @torch.no_grad()
    def test_what_is_not_finite_is_computed_again(self) -> None:
        model = dit()
        denoiser, alone = of("dit", model=model, observe=True), of("dit", model=model)
        labels = torch.tensor([3, 4])
        for step, time in enumerate((900, 800, 700, 600, 500)):
            image = torch.randn(2, 4, 8, 8)
            spoiled = image.clone()
            if step == 2:
                spoiled[0, 0] = torch.nan
            found = denoiser(hidden_states=spoiled, timestep=torch.tensor(time), class_labels=labels).sample
            mate = alone(hidden_states=image[1:], timestep=torch.tensor(time), class_labels=labels[1:]).sample
            torch.testing.assert_close(found[1:], mate, rtol=0, atol=1e-5)
            if step == 3:
                plain = denoiser.net.model(image, torch.tensor([time, time]), labels).sample
                torch.testing.assert_close(found[:1], plain[:1], rtol=0, atol=1e-5)
        assert denoiser.report.reasons[0, "not finite"] == 1
        assert [m.sum(1).tolist() for m in denoiser.maps.values()] == [[16, 16], [16, 16], [8, 8], [16, 8], [8, 8]]

    @torch.no_grad()
    def test_what_is_returned_is_the_callers(self) -> None:
        """Writing into an output changes nothing later, and a later step does not change an output, not even where tokens are pixels."""
        from diffusers import DiTTransformer2DModel

        config = {k: v for k, v in dict(dit().config).items() if not k.startswith("_")}
        model = loud(DiTTransformer2DModel(**{**config, "patch_size": 1, "sample_size": 4}))
        example = {"hidden_states": images(1, 4, 4), "timestep": torch.tensor([600]), "class_labels": torch.tensor([3])}
        one, other = (attach_regions(model, LITTLE, noise=FlowMatching(), example=example) for _ in range(2))
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

    def test_shapes_and_inference_mode_may_change(self) -> None:
        denoiser = of("dit")
        with torch.inference_mode():
            for time in (900, 800, 700):
                denoiser(hidden_states=images(2), timestep=torch.tensor(time), class_labels=torch.tensor([3, 4]))
        denoiser(hidden_states=images(2), timestep=torch.tensor(600), class_labels=torch.tensor([3, 4]))
        denoiser(hidden_states=images(3), timestep=torch.tensor(500), class_labels=torch.tensor([3, 4, 5]))
        assert denoiser.report.reasons[0, "shape"] == 3


@pytest.fixture(scope="module")
def pipe() -> Any:
    from diffusers import DDIMScheduler, DiTPipeline

    made = DiTPipeline(dit(), autoencoder(), DDIMScheduler())
    made.set_progress_bar_config(disable=True)
    return made


class TestPipelines:
    def test_a_pipeline_keeps_its_call(self, pipe: Any) -> None:
        def run(which: Any) -> Tensor:
            found = which(class_labels=[1, 2], num_inference_steps=6, generator=torch.Generator().manual_seed(0), output_type="np")
            return torch.as_tensor(found.images)

        view = attach_region_pipeline(pipe, Regions(first=100))
        for scheduler in schedulers()[:2]:
            pipe.scheduler = view.scheduler = scheduler()
            assert torch.equal(run(view), run(pipe))
        fast = attach_region_pipeline(pipe, LITTLE, observe=True)
        assert not torch.equal(run(fast), run(pipe))
        assert fast.denoiser.report.flops.shape == (4, 6), "both guidance branches"
        assert [int(m.sum()) for m in fast.denoiser.maps.values()] == [64, 64, 32, 32, 32, 64]
        assert fast.denoiser.trajectory.cache_bytes == 0 and type(pipe.transformer).__name__ == "DiTTransformer2DModel"

    def test_the_last_step_is_dense_where_asked(self, pipe: Any) -> None:
        view = attach_region_pipeline(pipe, dataclasses.replace(LITTLE, last=True))
        view(class_labels=[1], num_inference_steps=5, output_type="np")
        assert view.denoiser.report.reasons[0, "last"] == 2

    def test_a_tuple_is_returned_where_it_is_asked_for(self) -> None:
        denoiser = of("dit")
        call = {"hidden_states": images(1), "class_labels": torch.tensor([1]), "return_dict": False}
        for time in (900, 800, 700):
            assert isinstance(denoiser(timestep=torch.tensor(time), **call), tuple)

    def test_learned_variances_have_no_part_in_the_choice(self) -> None:
        from diffusers import DiTTransformer2DModel

        config = dict(dit().config)
        model = DiTTransformer2DModel(**{**{k: v for k, v in config.items() if not k.startswith("_")}, "out_channels": 8}).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn_like(p) * 0.1)
        denoiser = of("dit", Regions(ratio=0.5, multiple=1, first=1, resets=AtSteps(()), staleness=0.0), model=model, observe=True)
        call: Any = {"hidden_states": images(1), "class_labels": torch.tensor([1])}
        last = denoiser(timestep=torch.tensor(900), **call).sample
        denoiser(timestep=torch.tensor(800), **call)
        spread = nn.functional.avg_pool2d(last[:, :4].std(1, keepdim=True), 2).flatten(1)
        assert set(denoiser.maps[0, 1][0].nonzero().flatten().tolist()) == set((-spread).topk(8).indices[0].tolist())


class TestCost:
    @pytest.mark.parametrize("change", [0.0, -0.5])
    def test_what_is_foretold_is_what_runs(self, change: float) -> None:
        denoiser = of("dit", observe=True)
        flow = schedulers()[2]()
        flow.set_timesteps(9)
        levels = FlowMatching().log_snr(flow.timesteps).tolist()
        for cost in (0.6, 0.75, 0.9, 1.0):
            found = regions_for_cost(denoiser, dataclasses.replace(LITTLE, multiple=1, change=change, last=True), levels, cost)
            denoiser.regions = found
            sample(denoiser, schedulers()[2](), images(2), steps=9, inputs=conditions("dit", 2))
            assert denoiser.report.cost == pytest.approx(region_cost(denoiser, found, levels), abs=1e-12)
            more = dataclasses.replace(found, ratio=min(1.0, found.ratio + 1 / 16))
            assert denoiser.report.cost <= cost < region_cost(denoiser, more, levels) or found.ratio == 1.0

    def test_what_cannot_be_met_says_what_can(self) -> None:
        denoiser = of("dit")
        with pytest.raises(BudgetInfeasible, match="fewer steps dense") as caught:
            regions_for_cost(denoiser, LITTLE, [-3.0, -1.0, 0.0, 1.0], 0.3)
        assert 0.5 < caught.value.best < 1.0 and caught.value.requested == 0.3
        with pytest.raises(InvalidInput, match="noise levels"):
            region_cost(denoiser, LITTLE, [])


class TestRefusals:
    @pytest.mark.parametrize("name", ["flux", "aura_flow", "sana", "transformer2d", "unet2d_condition"])
    def test_models_of_another_make_say_what_they_lack(self, name: str) -> None:
        model = next(f for f in library.families() if f.name == f"diffusers/{name}").build()
        with pytest.raises((UnsupportedModel, InvalidInput), match=r"lacks|images|expected tokens"):
            ImageTokens(model)
            attach_regions(model, LITTLE, noise=FlowMatching(), example=library_inputs(name))

    def test_projections_in_one_layer(self) -> None:
        model: Any = pixart()
        denoiser = of("pixart", model=model)
        model.fuse_qkv_projections()
        with pytest.raises(UnsupportedModel, match="unfuse_qkv_projections"):
            ImageTokens(model)
        with pytest.raises(UnsupportedModel, match="unfuse_qkv_projections"):
            denoiser(hidden_states=images(2), timestep=torch.tensor(600), **conditions("pixart", 2))

    def test_tokens_that_meet_elsewhere(self) -> None:
        class Mixing(nn.Module):
            def __init__(self, inner: nn.Module) -> None:
                super().__init__()
                self.inner = inner

            def forward(self, x: Tensor) -> Tensor:
                return self.inner(x) + x.mean(1, keepdim=True)

        class Placed(Mixing):
            def forward(self, x: Tensor) -> Tensor:
                return self.inner(x) * torch.linspace(0, 1, 16)[: x.shape[1], None]

        class Fixed(Mixing):
            def forward(self, x: Tensor) -> Tensor:
                return self.inner(x) * torch.linspace(0, 1, 16)[:, None]

        for kind, message in ((Mixing, "some of its tokens computed"), (Placed, "some of its tokens computed"), (Fixed, "does not run")):
            model: Any = dit()
            model.transformer_blocks[2].ff = kind(model.transformer_blocks[2].ff)
            with pytest.raises(UnsupportedModel, match=message):
                of("dit", model=model)

    def test_a_forward_that_is_replaced(self) -> None:
        model: Any = dit()
        model.forward = model.forward  # as hooks of libraries do it: bound to the model itself
        with pytest.raises(UnsupportedModel, match="forward is replaced"):
            of("dit", model=model)

    def test_what_saves_nothing_warns_and_what_is_no_rule_is_refused(self) -> None:
        with pytest.warns(NoEffectWarning, match="smaller multiple"):
            of("dit", Regions(multiple=64))
        with pytest.raises(InvalidInput, match="Regions"):
            of("dit", 0.5)  # type: ignore[arg-type]
        with pytest.raises(InvalidInput, match="no denoiser"):
            attach_region_pipeline(object(), LITTLE)
        with pytest.raises(UnsupportedModel, match="lacks"):
            net = uncut_denoiser(unet(), noise=FlowMatching(), example={"sample": images(1), "timestep": torch.tensor([3])})
            RegionDenoiser(net, LITTLE)


def library_inputs(name: str) -> Any:
    found = next(f for f in library.families() if f.name == f"diffusers/{name}").inputs(2, None)
    return (found.args, found.kwargs)


@torch.no_grad()
@pytest.mark.parametrize("family, k", [("dit", 8), ("dit", None), ("pixart", 8), ("sd3", 8)])
def test_a_compiler_sees_a_step_whole(family: str, k: int | None) -> None:
    """Static shapes, no break and nothing that depends on data, from the choice of tokens to what the next step is decided by."""
    denoiser = of(family)
    call = denoiser.net.call(hidden_states=images(2), timestep=torch.tensor([600, 600]), **conditions(family, 2))
    step = dataclasses.replace(denoiser._form(call).step, k=k)
    memory = RegionMemory(2, 1)
    EagerRegions()(dataclasses.replace(step, k=None), call, memory, None)
    memory.held.waited.copy_(torch.arange(32).reshape(2, 16) * 7 % 5)
    states, function = [memory.held.clone(), memory.held.clone()], region_graphs._function(step)
    torch._dynamo.reset()
    ways = (function, torch.compile(function, backend="eager", fullgraph=True))
    plain, whole = (prediction(run(call.kwargs, s.store.kept, s.focus, s.waited, s.broken)) for run, s in zip(ways, states, strict=True))
    assert torch.equal(plain, whole) and all(torch.equal(a, b) for a, b in zip(states[0].tensors, states[1].tensors, strict=True))
    assert (states[0].waited == 0).sum(1).tolist() == [k or 16] * 2
