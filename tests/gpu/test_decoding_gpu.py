"""Decoding on CUDA: the kernel is the masked attention, captured rounds write what the reference writes, in float32 token for token."""

from __future__ import annotations

import pytest
import torch

from offramp.backbones.attention import decoding_attention, kernel_available, masked_attention
from offramp.engines.text.generate import generate
from offramp.engines.text.rounds import Rounds
from offramp.engines.text.sampling import Sampling
from offramp.language import attach_lm
from offramp.policies.decoding import Plain, Verify

transformers = pytest.importorskip("transformers")
DEVICE = torch.device("cuda")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(autouse=True)
def _exact():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before
    torch._dynamo.reset()


@pytest.mark.skipif(not kernel_available(), reason="Triton is not installed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "heads", "groups", "queries", "width", "slots", "window", "softcap"),
    [
        (1, 8, 2, 1, 32, 150, None, None),
        (3, 4, 4, 5, 24, 200, None, None),
        (2, 6, 2, 3, 64, 130, 17, None),
        (2, 4, 1, 16, 128, 90, 5, 30.0),
        # Split among programs: long caches at few rows, grouped heads, ragged rows that leave splits without a slot.
        (1, 32, 8, 1, 64, 8192, None, None),
        (2, 32, 4, 6, 64, 3000, None, None),
        (2, 8, 8, 1, 80, 1100, None, 20.0),
        (3, 32, 8, 6, 128, 4096, 1000, None),
        (2, 16, 2, 16, 128, 1500, None, 50.0),
        (2, 8, 4, 3, 256, 2000, 700, 30.0),
        (1, 4, 1, 2, 256, 20000, None, None),
        # Groups that several programs share, the last of them not full.
        (2, 71, 1, 1, 64, 700, None, None),
        (2, 7, 1, 16, 32, 150, None, None),
        # So many rows that none is split.
        (80, 8, 4, 2, 64, 600, None, None),
    ],
)
def test_kernel_is_masked_attention(dtype, rows, heads, groups, queries, width, slots, window, softcap):
    torch.manual_seed(0)
    buffers = torch.randn(2, rows, slots + 1, groups, width, device=DEVICE, dtype=dtype)
    key, value = (t[:, :slots].transpose(1, 2) for t in buffers)
    query = torch.randn(rows, queries, heads, width, device=DEVICE, dtype=dtype).transpose(1, 2)
    first = torch.randint(0, slots - queries, (rows, 1), device=DEVICE)
    if rows > 1:
        first[0], first[-1] = 3, slots - queries
    positions = first + torch.arange(queries, device=DEVICE)
    slot = torch.arange(slots, device=DEVICE)
    seen = slot <= positions[..., None]
    if window is not None:
        seen &= slot > positions[..., None] - window
    expected = masked_attention(query.double(), key.double(), value.double(), seen[:, None], None, softcap).transpose(1, 2)
    found = decoding_attention(query, key, value, positions, None, softcap, window)
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(found, decoding_attention(query, key, value, positions, None, softcap, window)), "the order of additions is fixed"


def language_model(dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128
    )
    model = transformers.LlamaForCausalLM(config).eval().to(DEVICE, dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    model.generation_config.eos_token_id = None
    return attach_lm(model, [1, 3])


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 97, (n,), generator=generator).tolist() for n in (5, 1, 17, 9)]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("draft_length", [0, 3])
def test_rounds_write_what_transformers_writes(compiled, draft_length):
    lm = language_model()
    expected = [
        lm.model.generate(torch.tensor([p], device=DEVICE), max_new_tokens=40, do_sample=False)[0, len(p) :].tolist() for p in prompts()
    ]
    mode = Verify(draft_length=draft_length, exit_index=1) if draft_length else Plain()
    assert generate(lm, prompts(), mode, max_new_tokens=40).tokens == expected
    run = Rounds(lm, 4, slots=64, draft_length=draft_length, exit_index=1, compiled=compiled)
    assert run.generate(prompts(), 40).tokens == expected
    assert run.generate(prompts()[::-1], 40).tokens == expected[::-1], "used again, nothing is left of the texts before"


def test_sampled_rounds():
    lm = language_model()
    sampling = {"do_sample": True, "temperature": 0.8, "top_k": 20}
    expected = generate(lm, prompts(), Verify(draft_length=2, exit_index=1), max_new_tokens=20, **sampling)
    run = Rounds(lm, 4, slots=40, draft_length=2, exit_index=1, sampling=Sampling(**sampling))
    assert run.generate(prompts(), 20).tokens == expected.tokens


def test_bfloat16_rounds_finish():
    lm = language_model(torch.bfloat16)
    found = Rounds(lm, 2, slots=64, draft_length=4, exit_index=1).generate(prompts()[:2], 30)
    assert [len(t) for t in found.tokens] == [30, 30] and found.accepted <= found.drafted
