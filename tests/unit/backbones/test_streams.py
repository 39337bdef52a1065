from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from denoisers import loud
from offramp.backbones.streams import image_streams
from offramp.backbones.taps import Stream, Taps
from offramp.core.errors import NotCuttable
from offramp.core.noise import FlowMatching
from offramp.core.system import System
from offramp.diffusion import DenoisingNet, attach_denoiser
from offramp.engines.diffusion.denoise import Denoiser
from offramp.engines.diffusion.model import attach_diffusion
from offramp.policies.denoising import Chance, Point, ResidualChange
from offramp.policies.fills import CachedResidual, Identity
from offramp.policies.skips import LayerGroups
from offramp.systems.deediff import deediff
from offramp.systems.first_block_cache import first_block_cache
from offramp.systems.latte_flow import latte_flow
from offramp.train.denoising import add_heads

diffusers = pytest.importorskip("diffusers")

IMAGE = 16  # tokens of the images below
HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16}


class Joint(nn.Module):
    """Attention over image and text at once; names of arguments that say nothing, the text first where ``text_first``."""

    def __init__(self, text_first: bool) -> None:
        super().__init__()
        self.text_first = text_first
        self.mix, self.read = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat([a, b], 1)
        both = both + torch.tanh(self.mix(both) + self.read(both).mean(1, keepdim=True))
        image, text = both.split((a.shape[1], b.shape[1]), 1)
        return (text, image) if self.text_first else (image, text)


class Net(nn.Module):
    """Three blocks; with ``mixed`` states are changed between them and both are read at the end, so that only shapes tell them apart."""

    def __init__(self, text_first: bool, mixed: bool = False) -> None:
        super().__init__()
        self.text_first, self.mixed = text_first, mixed
        self.embed, self.caption, self.time = nn.Linear(4, 8), nn.Linear(5, 8), nn.Linear(1, 8)
        self.blocks = nn.ModuleList(Joint(text_first) for _ in range(3))
        self.out = nn.Linear(8, 4)

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        image, words = self.embed(sample), self.caption(text)
        level = self.time(timestep.float()[:, None] / 1000)[:, None]
        for block in self.blocks:
            made = block(image + level, words + level) if self.mixed else block(image, words)
            words, image = made if self.text_first else made[::-1]
        if self.mixed:
            image = image + words.mean(1, keepdim=True)
        return self.out(image + level)


def example(text: int, seed: int = 0, rows: int = 2) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(rows, 6, 4, generator=g),
        "timestep": torch.tensor([900, 30])[:rows],
        "text": torch.randn(rows, text, 5, generator=g),
    }


@pytest.mark.parametrize("text", [3, 6, 9])  # 6: as many as the image has
@pytest.mark.parametrize("text_first", [True, False])
def test_the_image_is_told_from_the_text_whatever_names_order_and_lengths(text_first: bool, text: int) -> None:
    torch.manual_seed(0)
    model, inputs = Net(text_first).eval(), example(text)
    places = ["caption", "blocks.0", "blocks.1", "blocks.2"]
    streams = image_streams(model, places, inputs, "sample")
    want = {"caption": Stream("embed"), **({f"blocks.{k}": Stream(f"blocks.{k}", 1) for k in range(3)} if text_first else {})}
    assert streams == want
    with Taps(model, places, streams=streams) as taps:
        model(**inputs)
    assert [s.shape[1] for s in taps.states] == [6] * 4
    assert torch.equal(taps.states[0], model.embed(inputs["sample"]))
    net = attach_denoiser(model, places, noise=FlowMatching(), example=inputs)
    made = net.cut()
    state = made.begin(**net.example_call().kwargs)
    for k, expected in enumerate(taps.states):
        state = made.run(state, k, k + 1)
        torch.testing.assert_close(state.hidden, expected)


def test_what_cannot_be_told_is_refused_with_the_reason_and_another_length_tells() -> None:
    model = Net(True, mixed=True).eval()
    with pytest.raises(NotCuttable, match=r"which of .* at 'blocks.0' is the image cannot be told. Give an example with another number"):
        image_streams(model, ["blocks.0"], example(6), "sample")
    assert image_streams(model, ["blocks.0"], example(3), "sample") == {"blocks.0": Stream("blocks.0", 1)}


def test_what_does_not_depend_on_the_state_is_not_skipped_with_it() -> None:
    torch.manual_seed(0)
    model, inputs = Net(False).eval(), example(3)
    net = attach_denoiser(model, ["caption", "blocks.1", "blocks.2"], noise=FlowMatching(), example=inputs)
    made = net.cut()  # the time is embedded after image and caption, and read after the second block
    assert len(made.made(1, 2)) == 2, "image and text of the block; not the embedded time"
    with torch.no_grad():
        skipping = Denoiser(net, (Point("caption", "blocks.1", Identity(), Chance(), -1.0),))(**inputs)
        image, words = model.embed(inputs["sample"]), model.caption(inputs["text"])
        image, _ = model.blocks[2](image, words)
        level = model.time(inputs["timestep"].float()[:, None] / 1000)[:, None]
        torch.testing.assert_close(skipping, model.out(image + level))


def test_what_is_not_a_number_moves_nothing() -> None:
    torch.manual_seed(0)
    model, inputs = Net(True).eval(), example(6)
    inputs["text"][0, 0, 0] = torch.nan
    assert image_streams(model, ["caption", "blocks.0"], inputs, "sample") == {
        "caption": Stream("embed"),
        "blocks.0": Stream("blocks.0", 1),
    }


def test_one_stream_is_read_as_ever() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
    assert image_streams(model, ["0"], {"sample": torch.randn(2, 3, 4), "timestep": torch.zeros(2)}, "sample") == {}


# ---- models of diffusers -------------------------------------------------------------------------------------------------


def sd3() -> nn.Module:
    return loud(
        diffusers.SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=3, joint_attention_dim=32, caption_projection_dim=32,
            pooled_projection_dim=24, **HEADS,
        )
    )  # fmt: skip


def flux() -> nn.Module:
    return loud(
        diffusers.FluxTransformer2DModel(
            patch_size=1, in_channels=4, num_layers=1, num_single_layers=2, joint_attention_dim=32, pooled_projection_dim=24,
            axes_dims_rope=(4, 4, 8), **HEADS,
        )
    )  # fmt: skip


def inputs_of(kind: str, text: int, time: float, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    given = {
        "encoder_hidden_states": torch.randn(2, text, 32, generator=g),
        "pooled_projections": torch.randn(2, 24, generator=g),
        "timestep": torch.full((2,), time),
    }
    if kind == "sd3":
        return {"hidden_states": torch.randn(2, 4, 8, 8, generator=g), **given}
    ids = {"img_ids": torch.arange(3 * IMAGE).view(IMAGE, 3).float(), "txt_ids": torch.zeros(text, 3)}
    return {"hidden_states": torch.randn(2, IMAGE, 4, generator=g), **given, **ids}


MODELS = {"sd3": sd3, "flux": flux}


@pytest.fixture(scope="module", params=["sd3", "flux"])
def family(request: pytest.FixtureRequest) -> tuple[str, nn.Module]:
    torch.manual_seed(0)
    return request.param, MODELS[request.param]()


def hidden_states(net: DenoisingNet, inputs: dict[str, Tensor]) -> list[Tensor]:
    call = net.call(**inputs)
    made = net.cut(call)
    state, found = made.begin(**call.kwargs), []
    with torch.no_grad():
        for k in range(len(made.segments) - 1):
            state = made.run(state, k, k + 1)
            found.append(state.hidden)
    return [s for s in found if s is not None]


def method(kind: str, model: nn.Module, system: System, text: int = 8) -> Any:
    return attach_diffusion(model, system=system, noise=FlowMatching(1.0), example=inputs_of(kind, text, 0.5))


def test_first_block_cache_goes_by_the_residual_of_the_image(family: tuple[str, nn.Module]) -> None:
    kind, model = family
    fast = method(kind, model, first_block_cache(change=1e9, max_reuse=1, ends=False))
    (point,) = fast.points
    assert isinstance(point.signal, ResidualChange) and isinstance(point.fill, CachedResidual)
    runner = fast.run(observe=True)
    calls = [inputs_of(kind, 9, 0.9), inputs_of(kind, 9, 0.8, seed=1)]
    calls[1]["encoder_hidden_states"] = calls[0]["encoder_hidden_states"]
    with torch.no_grad():
        assert torch.equal(runner(**calls[0]).sample, model(**calls[0]).sample)
        reused = runner(**calls[1]).sample
        assert not torch.allclose(reused, model(**calls[1]).sample)

    def residual(inputs: dict[str, Tensor]) -> Tensor:
        """What the first block adds to the image, by hooks."""
        seen: list[Tensor] = []
        block = model.get_submodule("transformer_blocks.0")
        hook = block.register_forward_hook(lambda _, a, k, out: seen.append(out[1] - k["hidden_states"]), with_kwargs=True)
        with torch.no_grad():
            model(**inputs)
        hook.remove()
        return seen[0]

    old, new = map(residual, calls)
    want = -((new - old).abs().flatten(1).sum(1) / old.abs().flatten(1).sum(1))
    torch.testing.assert_close(runner.report.scores[0][:, 1], want, rtol=1e-4, atol=1e-5)


def test_learned_exits_read_the_image_and_answer_it_for_any_number_of_text_tokens(family: tuple[str, nn.Module]) -> None:
    kind, model = family
    fast = method(kind, model, deediff(theta=1.0), text=IMAGE)  # every image leaves at the first exit; shapes alone tell nothing
    add_heads(fast.net, fast.system.head)
    runner = fast.run()
    for text in (IMAGE, 5):
        inputs = inputs_of(kind, text, 0.5)
        states = hidden_states(fast.net, inputs)
        assert [tuple(s.shape) for s in states] == [(2, IMAGE, 32)] * 3
        last: list[Tensor] = []
        handle = model.get_submodule("norm_out").register_forward_pre_hook(lambda _, args, seen=last: seen.append(args[0]))
        with torch.no_grad():
            model(**inputs)
            handle.remove()
            torch.testing.assert_close(states[-1], last[0])  # what the output layer reads
            level = fast.net.noise.log_snr(inputs["timestep"]).float()
            torch.testing.assert_close(runner(**inputs).sample, fast.net.heads["transformer_blocks/0"].output(states[0], level))


def test_groups_of_layers_run_where_text_and_time_are_embedded_after_the_image() -> None:
    model = loud(
        diffusers.PixArtTransformer2DModel(
            in_channels=4, out_channels=8, num_layers=4, sample_size=8, patch_size=2, cross_attention_dim=32, caption_channels=32,
            use_additional_conditions=False, **HEADS,
        )
    )  # fmt: skip
    inputs = {"hidden_states": torch.randn(2, 4, 8, 8), "encoder_hidden_states": torch.randn(2, 6, 32), "timestep": torch.full((2,), 0.9)}
    inputs["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}  # type: ignore[assignment]
    fast = attach_diffusion(model, system=latte_flow(groups=2), noise=FlowMatching(1.0), example=inputs)
    assert isinstance(fast.skips, LayerGroups)
    with torch.no_grad():
        for time, kept in ((0.9, slice(0, 2)), (0.1, slice(2, 4))):  # the first group serves the noisiest
            given = {**inputs, "timestep": torch.full((2,), time)}
            short = copy.deepcopy(model)
            short.transformer_blocks = short.transformer_blocks[kept]  # type: ignore[index]
            torch.testing.assert_close(fast.run()(**given).sample, short(**given).sample)
