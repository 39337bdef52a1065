"""Layers that read the same states as one product: same answers, same parameters, less work; what is more than plain is not joined."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from language_models import FAMILIES, build, prompts
from offramp.backbones import joined
from offramp.backbones.decoder import Decoder, decoder
from offramp.engines.capture import Tuning
from offramp.engines.text.generate import generate
from offramp.engines.text.rounds import Rounds
from offramp.language import attach_lm
from offramp.policies.decoding import Plain

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def logits(made: Decoder, text: torch.Tensor) -> torch.Tensor:
    cache = made.cache(len(text), text.shape[1])
    step = made.step(cache, torch.arange(text.shape[1]).expand(len(text), -1))
    return made.logits(made.run(made.embed(text, step), 0, len(made), step))


def parts(made: Decoder) -> int:
    return sum(isinstance(m, joined._Part) for block in made.blocks for child in block.children() for m in child.children())


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_parameters_and_training_stay(family: str) -> None:
    model = build(family).double()
    made = decoder(model)
    text = torch.tensor([prompts((9,))[0]])
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    with torch.inference_mode():  # as engines are made
        together = made.joined()
        expected = logits(made, text)
        torch.testing.assert_close(logits(together, text), expected, rtol=1e-10, atol=1e-10)
    after = dict(model.named_parameters())
    assert all(after[n] is p and torch.equal(p, value) for n, (p, value) in before.items())
    assert parts(made) == 0
    groups = [names for m in made.blocks[0].children() for names in joined.PROJECTIONS if all(hasattr(m, name) for name in names)]
    assert parts(together) == sum(map(len, groups)) * len(made), "layers that are one product already stay"
    model.train()
    model(text, labels=text).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.eval()
    with torch.no_grad():
        assert not torch.equal(logits(made, text), expected)
        torch.testing.assert_close(logits(together, text), logits(made, text), rtol=1e-10, atol=1e-10)


def llama() -> Any:
    return build("llama")


def test_one_product_for_three(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    made = decoder(model)
    calls: list[tuple[int, ...]] = []
    linear = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda x, w, b=None: (calls.append(tuple(w.shape)), linear(x, w, b))[1])
    text = torch.tensor([prompts((5,))[0]])
    with torch.no_grad():
        logits(made, text)
        several = len(calls)
        calls.clear()
        logits(made.joined(), text)
    assert len(calls) == several - 3 * len(made)


def test_joined_twice_stays_where_it_is_and_is_saved_as_before(tmp_path: Path) -> None:
    model = llama()
    made = decoder(model)
    made.joined()
    layer = model.model.layers[0].self_attn
    place = layer.q_proj.weight.data_ptr()
    made.joined()
    assert layer.q_proj.weight.data_ptr() == place
    assert layer.k_proj.weight.data_ptr() == place + layer.q_proj.weight.nbytes
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    model.save_pretrained(tmp_path / "folder")
    for saved in (load_file(tmp_path / "model.safetensors"), type(model).from_pretrained(tmp_path / "folder").state_dict()):
        assert saved.keys() == model.state_dict().keys()
        assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())


class Adapted(nn.Linear):
    pass


def _hooked(attention: Any) -> None:
    attention.k_proj.register_forward_hook(lambda *_: None)


def _adapted(attention: Any) -> None:
    attention.v_proj.__class__ = Adapted


def _one_bias(attention: Any) -> None:
    attention.q_proj.bias = nn.Parameter(torch.zeros(len(attention.q_proj.weight)))


def _other_type(attention: Any) -> None:
    attention.q_proj.weight.data = attention.q_proj.weight.data.double()


def _tied(attention: Any) -> None:
    attention.v_proj.weight = attention.k_proj.weight


@pytest.mark.parametrize("change", [_hooked, _adapted, _one_bias, _other_type, _tied])
def test_more_than_plain_layers_stay(change: Any) -> None:
    model = llama()
    made = decoder(model)
    change(model.model.layers[1].self_attn)
    assert parts(made.joined()) == 5 * len(made) - 3


def test_what_graphs_read_is_kept() -> None:
    made = decoder(llama())
    made.joined()
    assert not made._before
    made = decoder(llama())
    made.captured = True
    made.joined()
    assert len(made._before) == 5 * len(made)


def test_rounds_with_joined_projections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    lm = attach_lm(llama(), [1])
    texts = prompts((4, 7))
    expected = generate(lm, texts, Plain(), max_new_tokens=12).tokens
    run = Rounds(lm, 2, slots=40, draft_length=3, compiled=Tuning(joined_projections=True))
    assert parts(run.model) == 5 * len(lm.decoder)
    assert run.generate(texts, 12).tokens == expected
    assert lm.decoder.captured
