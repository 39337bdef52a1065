"""A model that changes between texts: what is followed writes the model's own text, and what cannot be followed is refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from language_models import build, own_greedy, prompts
from offramp.core.errors import InvalidInput
from offramp.engines.capture import Tuning
from offramp.engines.text.generate import generate
from offramp.engines.text.generator import TextGenerator
from offramp.engines.text.rounds import Rounds
from offramp.language import LanguageModel, attach_lm
from offramp.policies.decoding import Plain, Verify, Way

WAYS: list[tuple[Way, bool]] = [(Plain(), False), (Verify(3), False), (Verify(3), True)]
NEW = 12


class Adapted(nn.Module):
    """A layer with something of low rank beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.down = base, nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)
        nn.init.normal_(self.up.weight)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.base(hidden) + self.up(self.down(hidden))
        return found


def text(run: TextGenerator | Rounds) -> list[list[int]]:
    return run.generate(prompts((5,)), max_new_tokens=NEW).tokens


def own(model: Any) -> list[list[int]]:
    return [own_greedy(model, prompts((5,)), NEW)[0, 5:].tolist()]


# ---- refused -----------------------------------------------------------------------------------------------------------------


def _adapter(model: Any) -> None:
    for block in model.model.layers:
        block.self_attn.q_proj = Adapted(block.self_attn.q_proj)


def _one_adapter(model: Any) -> None:
    model.model.layers[2].self_attn.v_proj = Adapted(model.model.layers[2].self_attn.v_proj)


def _head(model: Any) -> None:
    model.lm_head = nn.Linear(32, 97, bias=False)


def _embeddings(model: Any) -> None:
    model.set_input_embeddings(nn.Embedding(97, 32))


def _resized(model: Any) -> None:
    model.resize_token_embeddings(100)


def _network(model: Any) -> None:
    model.model.layers[1].mlp = copy.deepcopy(model.model.layers[1].mlp)


def _inner_norm(model: Any) -> None:
    model.model.layers[3].input_layernorm = nn.Identity()


def _final_norm(model: Any) -> None:
    model.model.norm = nn.Identity()


def _block(model: Any) -> None:
    model.model.layers[0] = copy.deepcopy(model.model.layers[0])


def _fewer(model: Any) -> None:
    model.model.layers = model.model.layers[:3]


def _trunk(model: Any) -> None:
    model.model = copy.deepcopy(model.model)


def _added(model: Any) -> None:
    model.model.layers[1].self_attn.q_norm = nn.Identity()


def _forward(model: Any) -> None:
    block = model.model.layers[1]
    block.forward = lambda hidden, *_, **__: hidden


def _rotary(model: Any) -> None:
    model.model.rotary_emb = copy.deepcopy(model.model.rotary_emb)


REFUSED: dict[Callable[[Any], None], str] = {
    _adapter: r"model\.layers\.0\.self_attn\.q_proj, model\.layers\.1\.self_attn\.q_proj, .* and 1 more",
    _one_adapter: r": model\.layers\.2\.self_attn\.v_proj\.",
    _head: "the output layer",
    _embeddings: "the input embeddings",
    _resized: r"the vocabulary \(97 tokens then, 100 now\)",
    _network: r": model\.layers\.1\.mlp\.",
    _inner_norm: r": model\.layers\.3\.input_layernorm\.",
    _final_norm: r": model\.norm\.",
    _block: r"model\.layers\.0, ",
    _fewer: r"model\.layers\.3, ",
    _trunk: r"the input embeddings, model, ",
    _added: r": model\.layers\.1\.self_attn\.q_norm\.",
    _forward: r": model\.layers\.1\.forward\.",
    _rotary: r": model\.rotary_emb\.",
}


@pytest.mark.parametrize("change", REFUSED, ids=lambda c: c.__name__)
def test_modules_in_the_place_of_others_are_refused(change: Callable[[Any], None]) -> None:
    model = build("llama")
    lm = attach_lm(model, [2])
    runs = [TextGenerator(lm, way, captured=captured) for way, captured in WAYS]
    for run in (runs[0], runs[2]):  # the second has written nothing before
        text(run)
    change(model)
    for run in runs:
        with pytest.raises(InvalidInput, match=f"LlamaForCausalLM was changed .*{REFUSED[change]}.* attach again"):
            text(run)
    with pytest.raises(InvalidInput, match="attach again"):
        generate(lm, prompts((5,)), max_new_tokens=NEW)
    with pytest.raises(InvalidInput, match="attach again"):
        Rounds(lm, 1, slots=40)


@pytest.mark.parametrize("change", [_adapter, _head, _embeddings, _resized, _inner_norm, _final_norm], ids=lambda c: c.__name__)
def test_attached_again_it_writes_what_the_model_does(change: Callable[[Any], None]) -> None:
    model = build("llama")
    attach_lm(model, [2])
    change(model)
    lm = attach_lm(model, [2])
    for way, captured in WAYS:
        assert text(TextGenerator(lm, way, captured=captured)) == own(model)


@pytest.mark.parametrize("family", ["gpt2", "opt", "opt_350m", "gpt_neox", "gemma2", "phi3", "qwen3", "cohere"])
def test_families(family: str) -> None:
    """Nothing is amiss while nothing changes, and every block is looked at."""
    model = build(family)
    made = attach_lm(model, [2]).decoder
    model.train()
    model(torch.tensor(prompts((5,)))).logits.sum().backward()
    model.eval()
    made.check_unchanged()
    last = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 4)[3]
    name, child = next(iter(last.named_children()))
    setattr(last, name, copy.deepcopy(child))
    with pytest.raises(InvalidInput, match=rf"\.3\.{name}"):
        made.check_unchanged()


def test_put_back_it_goes_on() -> None:
    """Adapters that are taken off again, and a method that is set to what it was."""
    model = build("llama")
    run = TextGenerator(attach_lm(model, [2]), Verify(2), captured=True)
    expected, block = text(run), model.model.layers[1]
    layer, block.mlp = block.mlp, nn.Identity()
    with pytest.raises(InvalidInput, match="mlp"):
        text(run)
    block.mlp = layer
    block.forward = block.forward
    assert text(run) == expected


# ---- followed ----------------------------------------------------------------------------------------------------------------


def _in_place(model: Any) -> None:
    with torch.no_grad():
        for p in model.model.layers.parameters():
            p.add_(0.2)


def _assigned(model: Any) -> None:
    model.load_state_dict({name: value + 0.2 for name, value in model.state_dict().items()}, assign=True)


def _data(model: Any) -> None:
    for block in model.model.layers:
        block.self_attn.v_proj.weight.data = -block.self_attn.v_proj.weight.data


def _inside(model: Any) -> None:
    for block in model.model.layers:
        block.mlp.down_proj = Adapted(block.mlp.down_proj)


def _hooked(model: Any) -> None:
    model.model.layers[1].register_forward_hook(lambda module, given, found: -found)


def _double(model: Any) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1e-9)
    model.double()


FOLLOWED = [_in_place, _assigned, _data, _inside, _hooked, _double]
MOVED = [_assigned, _data, _inside, _hooked, _double]


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("change", FOLLOWED, ids=lambda c: c.__name__)
def test_weights_are_followed(change: Callable[[Any], None], joined: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    model = build("llama")
    lm = attach_lm(model, [2])
    compiled = Tuning(joined_projections=True) if joined else None
    runs = [TextGenerator(lm, way, captured=captured, compiled=compiled) for way, captured in WAYS]
    rounds = Rounds(lm, 1, slots=40, draft_length=2, compiled=compiled)
    before = [text(run) for run in (*runs, rounds)]
    change(model)
    expected = own(model)
    assert expected != before[0] or change is _double
    for run in (*runs, rounds, *runs, rounds):
        assert text(run) == expected


@pytest.mark.parametrize("change", FOLLOWED, ids=lambda c: c.__name__)
def test_captured_anew_where_weights_stand_elsewhere(change: Callable[[Any], None]) -> None:
    """A graph reads addresses: only values that change in place leave it as it is."""
    model = build("llama")
    run = TextGenerator(attach_lm(model, [2]), Verify(3), captured=True)
    text(run)
    rounds = run.kept.all[0].rounds
    run.kept.all[0].times = {3: 1.0}
    graph = rounds.graph()
    text(run)
    assert run.captures == 1 and rounds.graph() is graph
    change(model)
    for _ in range(2):
        text(run)
    moved = change in MOVED
    assert run.captures == 1 + moved and (rounds.graph() is not graph) == moved
    assert (run.kept.all[0].times is None) == moved, "times of what was before are forgotten"
    assert rounds.renew() is False


def test_heads_are_followed() -> None:
    lm: LanguageModel = attach_lm(build("llama"), [2])
    rounds = Rounds(lm, 1, slots=40, draft_length=2)
    rounds.generate(prompts((5,)), NEW)
    assert rounds.renew() is False
    lm.heads[0].register_parameter("extra", nn.Parameter(torch.zeros(1)))
    assert rounds.renew() is True and rounds.renew() is False


def test_an_error_on_the_way_leaves_nothing_half_made(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    rounds = Rounds(attach_lm(model, [2]), 1, slots=40, draft_length=2)
    text(rounds)
    _assigned(model)
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(Rounds, "_made", lambda self, way: (_ for _ in ()).throw(MemoryError()))
        text(rounds)
    assert text(rounds) == own(model)
