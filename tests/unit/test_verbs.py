"""The verbs at the package root: what is given decides what is made, and what belongs elsewhere is refused by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import offramp
from language_models import VOCABULARY, build, own_greedy, prompts, word_tokenizer
from offramp import verbs
from offramp.budget.agreement import certify_table
from offramp.core.errors import ArtifactError, InvalidInput, UnsupportedModel
from offramp.core.system import System
from offramp.engines.classify.engine import Runner
from offramp.engines.text.generate import generate
from offramp.engines.text.generator import TextGenerator
from offramp.engines.text.planner import plan_speculation
from offramp.exits.cached import Adapter, Block
from offramp.exits.lm import OwnNorm, OwnOutput, Shared, Trimmed
from offramp.language import LanguageModel
from offramp.network import MultiExit, never
from offramp.train import Frozen, Joint
from offramp.train.text import packed, text_loader


@pytest.fixture
def model() -> Any:
    return build("llama")


@pytest.fixture
def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


@pytest.fixture
def net(plain: nn.Module) -> MultiExit:
    return offramp.attach(plain, at=["1"], example=torch.randn(2, 8))


# ---- attach ------------------------------------------------------------------------------------------------------------------


def test_the_model_decides_what_is_attached(model, net):
    assert type(net) is MultiExit
    assert type(offramp.attach(model, exits=[1, 2])) is LanguageModel
    found = offramp.attach(model)
    assert type(found) is LanguageModel and found.exits == (1,) and found.specs == (Shared(),)
    ids = {"input_ids": torch.randint(3, VOCABULARY, (2, 6)), "use_cache": False}
    cut = offramp.attach(model, at=["model.layers.1"], example=ids, select=lambda output: output.logits[:, -1])
    assert type(cut) is MultiExit, "at and example are those of a network that is cut"


@pytest.mark.parametrize(
    ("word", "part"),
    [("shared", Shared()), ("norm", OwnNorm()), ("output", OwnOutput()), ("adapter", Adapter()), ("block", Block())],
)
def test_words_for_heads(model, word, part):
    assert offramp.attach(model, exits=[2], head=word).specs == (part,)
    assert set(verbs.HEADS) == {"shared", "norm", "output", "adapter", "block", "trimmed"}


def test_heads_one_each_and_parts(model):
    assert offramp.attach(model, exits=[1, 3], head=["norm", Adapter(heads=2)]).specs == (OwnNorm(), Adapter(heads=2))
    with pytest.raises(InvalidInput, match=r"words for heads are shared, norm"):
        offramp.attach(model, exits=[1], head="linear")


def test_trimmed_says_what_it_needs(model):
    assert offramp.attach(model, exits=[1], head="trimmed", kept=[3, 1, 2]).specs == (Trimmed((3, 1, 2)),)
    texts = [[5, 5, 5, 9, 9, 7], [9, 5]]
    assert offramp.attach(model, exits=[1], head="trimmed", texts=texts, kept=2).specs == (Trimmed((5, 9)),)
    words = offramp.attach(model, exits=[1], head="trimmed", texts=["w1 w1 w3"], tokenizer=word_tokenizer(), kept=1)
    assert words.specs == (Trimmed((word_tokenizer()("w1")["input_ids"][0],)),)
    assert len(offramp.attach(model, exits=[1], head="trimmed", texts=texts).specs[0].kept) == VOCABULARY // 8
    with pytest.raises(InvalidInput, match=r"give kept=\[token ids\], or texts"):
        offramp.attach(model, exits=[1], head="trimmed")
    with pytest.raises(InvalidInput, match=rf"from 1 to the model's {VOCABULARY}"):
        offramp.attach(model, exits=[1], head="trimmed", texts=texts, kept=VOCABULARY + 1)


def test_options_of_the_other_kind_are_named(model, plain):
    with pytest.raises(InvalidInput, match=r"a language model takes no select.*belongs to a network cut into segments"):
        offramp.attach(model, exits=[1], select=lambda x: x)
    with pytest.raises(InvalidInput, match=r"a network cut into segments takes no kept.*belongs to a language model"):
        offramp.attach(plain, at=["1"], example=torch.randn(2, 8), kept=3)
    with pytest.raises(InvalidInput, match=r"takes no nonsense\. It takes exits, head"):
        offramp.attach(model, exits=[1], nonsense=3)
    with pytest.raises(InvalidInput, match=r"give example=.*exits="):
        offramp.attach(plain)
    with pytest.raises(InvalidInput, match=r"give example="):
        offramp.attach(model, at=["model.layers.1"])
    with pytest.raises(UnsupportedModel, match=r"not a causal language model"):
        offramp.attach(plain, exits=[1])
    with pytest.raises(InvalidInput, match=r"exits=\[2\]"):
        offramp.attach(model, exits=2)
    for options in ({}, {"exits": [1]}):
        with pytest.raises(InvalidInput, match=r"takes a torch.nn.Module; got str"):
            offramp.attach("llama", **options)


def test_what_attach_refuses_of_a_language_model(model):
    with pytest.raises(InvalidInput, match=r"got str 'llama'.*from_pretrained\('llama'\)"):
        offramp.attach("llama")
    with pytest.raises(
        InvalidInput, match=r"branchynet is a method of the classify engine.*whose methods are calm,.*at=\.\.\. and example="
    ):
        offramp.attach(model, system=offramp.systems.build("branchynet"))
    with pytest.raises(InvalidInput, match=r"has its exits already.*lm\.model"):
        offramp.attach(offramp.attach(model, exits=[1]), exits=[2])


@pytest.mark.parametrize("name", ["layerskip", "skipdecode"])
def test_a_method_composed_for_another_depth_is_refused_when_attached(model, name):
    with pytest.raises(InvalidInput, match=rf'build\("{name}", blocks=4\)'):
        offramp.attach(model, system=offramp.systems.build(name))
    fitting = offramp.systems.build(name, blocks=4)
    given = prompts((5, 3))
    lm = offramp.attach(model, system=fitting)
    assert len(offramp.compile(lm, fitting).generate(given, max_new_tokens=4).tokens[1]) == 4


# ---- fit ---------------------------------------------------------------------------------------------------------------------

TEXTS = ["w1 w2 w3 w4 w5 w6 w7", "w9 w8 w7 w6 w5 w4", "w3 w3 w3"]
STEP = {"epochs": 1, "progress": False, "batch_size": 2}


def trained(model: Any, data: Any, **options: Any) -> torch.Tensor:
    torch.manual_seed(0)
    lm = offramp.attach(model, exits=[2], head="norm")
    offramp.fit(lm, data, **{**STEP, **options})
    return lm.heads[0].norm.weight.detach().clone()


def test_texts_in_any_form_train_alike(model, tmp_path):
    """Strings, token ids, a folder, blocks and a loader: the same blocks, so the same weights."""
    tokenizer = word_tokenizer()
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt").write_text(text)
    blocks = packed(TEXTS, tokenizer, 6)
    expected = trained(model, blocks)
    assert not torch.equal(expected, model.model.norm.weight), "nothing was learned"
    assert torch.equal(trained(model, TEXTS, tokenizer=tokenizer, block=6), expected)
    ids = [tokenizer(t)["input_ids"] for t in TEXTS]
    assert torch.equal(trained(model, [[*i, tokenizer.eos_token_id] for i in ids], block=6), expected)
    assert torch.equal(trained(model, tmp_path, tokenizer=tokenizer, block=6), expected)
    assert torch.equal(trained(model, str(tmp_path), tokenizer=tokenizer, block=6), expected)
    lm = offramp.attach(model, exits=[2], head="norm")
    offramp.fit(lm, text_loader(blocks, 2), epochs=1, progress=False)
    assert torch.equal(lm.heads[0].norm.weight, expected)


def test_one_text_of_any_length_as_a_string_or_a_file(model, tmp_path):
    """A string that is the name of nothing is a text, however long: longer than names of files may be, too."""
    text = " ".join(f"w{k % 90}" for k in range(400))
    expected = trained(model, [text], tokenizer=word_tokenizer(), block=20)
    assert torch.equal(trained(model, text, tokenizer=word_tokenizer(), block=20), expected)
    (tmp_path / "one.txt").write_text(text)
    for file in (tmp_path / "one.txt", str(tmp_path / "one.txt")):
        assert torch.equal(trained(model, file, tokenizer=word_tokenizer(), block=20), expected)


def test_a_model_from_a_folder_brings_its_tokenizer_and_is_fitted_for_one_epoch(model, tmp_path):
    from transformers import AutoModelForCausalLM

    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    text = "w1 w2 w3 w4 w5 w6 w7 w8 " * 10
    lm = offramp.attach(loaded, exits=[2], head="norm")
    with pytest.raises(InvalidInput, match=r"no tokenizer was given"):
        offramp.fit(lm, text, recipe=Frozen(), block=8, progress=False)
    word_tokenizer().save_pretrained(tmp_path)
    for given in (text, [text]):
        assert offramp.fit(lm, given, recipe=Frozen(), block=8, progress=False).epochs == 1


def test_what_must_be_given_is_named(net):
    with pytest.raises(InvalidInput, match=r"fit of a network cut into segments needs epochs; give epochs=\.\.\."):
        offramp.fit(net, [])


def test_tokens_in_any_width_train_alike(model):
    """Files of tokens hold 16 bits, tokenizers give 32 or 64."""
    blocks = packed(TEXTS, word_tokenizer(), 6)
    expected = trained(model, blocks)
    for dtype in (torch.int32, torch.int16, torch.uint8):
        assert torch.equal(trained(model, blocks.to(dtype)), expected)
    assert torch.equal(trained(model, blocks.numpy().astype("uint16")), expected)
    loader = [{"input_ids": blocks[:2].int(), "labels": blocks[:2].int()}]
    assert torch.equal(trained(model, loader), trained(model, [{k: v.long() for k, v in loader[0].items()}]))


def test_evaluation_data_too(model):
    lm = offramp.attach(model, exits=[2], head="norm")
    blocks = packed(TEXTS, word_tokenizer(), 6)
    found = offramp.fit(lm, blocks, Frozen(), eval_data=blocks[:1], **STEP)
    assert found.best is not None
    with pytest.raises(InvalidInput, match=r"eval_data or eval_loader"):
        offramp.fit(lm, blocks, eval_data=blocks, eval_loader=text_loader(blocks, 1), **STEP)


def test_what_fit_refuses(model, net, tmp_path):
    lm = offramp.attach(model, exits=[1])
    with pytest.raises(InvalidInput, match=r"no tokenizer was given.*taken for a text.*no file or folder at 'once upon"):
        offramp.fit(lm, "once upon a time", **STEP)
    for missing in ("data/texts", tmp_path / "nothing"):
        with pytest.raises(InvalidInput, match=r"no file or folder of texts at"):
            offramp.fit(lm, missing, **STEP)
    (tmp_path / "not_utf8").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidInput, match=r"no text in UTF-8"):
        offramp.fit(lm, tmp_path / "not_utf8", tokenizer=word_tokenizer(), **STEP)
    with pytest.raises(InvalidInput, match=r"fewer than one block of 512.*taken for a text"):
        offramp.fit(lm, "w1 w2", tokenizer=word_tokenizer(), **STEP)
    with pytest.raises(InvalidInput, match=r"whole numbers \[blocks, tokens\]"):
        offramp.fit(lm, torch.randn(2, 4), **STEP)
    with pytest.raises(InvalidInput, match=r"ndarray is no blocks of tokens"):
        offramp.fit(lm, np.array([["a", "b"]], dtype=object), **STEP)
    with pytest.raises(InvalidInput, match=r"no tokenizer was given"):
        offramp.fit(lm, TEXTS, **STEP)
    with pytest.raises(InvalidInput, match=r"takes no tokenizer, block.*They belong to a language model"):
        offramp.fit(net, [], epochs=1, tokenizer=len, block=3)
    with pytest.raises(InvalidInput, match=r"what attach or load made"):
        offramp.fit(model, TEXTS, **STEP)
    with pytest.raises(InvalidInput, match=r"takes no epoch\. It takes .*epochs"):
        offramp.fit(lm, TEXTS, epoch=1)


def test_a_network_is_fitted_as_before(net):
    loader = [(torch.randn(4, 8), torch.tensor([0, 1, 2, 0]))] * 3
    assert offramp.fit(net, loader, Joint(), epochs=1, progress=False).steps == 3


# ---- compile -----------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::offramp.core.errors.NoEffectWarning")
def test_what_is_compiled(model, net, tmp_path):
    assert type(offramp.compile(net, never(net, offramp.Confidence()), offramp.LatencyMode(batch_size=2), measure=False)) is Runner
    lm = offramp.attach(model, exits=[2])
    given = prompts((5, 3))
    expected = own_greedy(model, given, 12)
    texts = [row.tolist() for row in expected[:1]]
    method = System(replace(offramp.systems.load_card("pabee"), engine="generate"), draft=offramp.Verify(2))
    for plan in (offramp.Plain(), offramp.Verify(3), plan_speculation(lm, texts, most=2), method):
        run = offramp.compile(lm, plan)
        assert type(run) is TextGenerator
        assert torch.equal(run.generate(given, max_new_tokens=12).sequences, expected)
    plan_speculation(lm, texts, most=2).save(tmp_path / "drafts")
    run = offramp.compile(lm, offramp.load_plan(tmp_path / "drafts"))
    assert run.plan.times.candidates and torch.equal(run.generate(given, max_new_tokens=12).sequences, expected)
    run = offramp.compile(lm, texts=texts, margin=0.1)
    assert run.plan.margin == 0.1 and torch.equal(run.generate(given, max_new_tokens=12).sequences, expected)
    run = offramp.compile(lm, offramp.Accept(0.2))
    assert run.generate(given, max_new_tokens=5).tokens == generate(lm, given, offramp.Accept(0.2), max_new_tokens=5).tokens


def test_every_plan_that_is_saved_is_loaded_and_one_at_a_time(net, tmp_path):
    with pytest.raises(ArtifactError, match=r"no plan\. Expected one of plan\.json, .*speculation_plan\.json, accept_plan\.json"):
        offramp.load_plan(tmp_path)
    kept = never(net, offramp.Confidence())
    kept.save(tmp_path)
    assert offramp.load_plan(tmp_path) == kept
    shares = np.zeros((40, 2))
    way = offramp.Accept(exits=(0,))
    leaving = certify_table(np.array([0.9, 0.5]), shares, shares, offramp.Risk(max_disagreement=0.1), way=way, fingerprint="abc")
    leaving.save(tmp_path / "leaving")
    assert offramp.load_plan(tmp_path / "leaving") == leaving
    leaving.save(tmp_path)
    with pytest.raises(ArtifactError, match=r"2 plans \(plan, accept_plan\); give each a folder of its own"):
        offramp.load_plan(tmp_path)


def test_a_plan_of_the_other_kind_is_refused(model, net):
    lm = offramp.attach(model, exits=[2])
    with pytest.raises(InvalidInput, match=r"networks that are cut into segments"):
        offramp.compile(lm, never(net, offramp.Confidence()))
    with pytest.raises(InvalidInput, match=r"compile runs a Plan"):
        offramp.compile(net, offramp.Plain())
    with pytest.raises(InvalidInput, match=r"takes no mode"):
        offramp.compile(lm, offramp.Plain(), offramp.LatencyMode())
    with pytest.raises(InvalidInput, match=r"takes no graphs\. It belongs to a network cut"):
        offramp.compile(lm, offramp.Plain(), graphs=True)
    with pytest.raises(InvalidInput, match=r"takes no texts\. It belongs to a language model"):
        offramp.compile(net, never(net, offramp.Confidence()), texts=[])
    with pytest.raises(InvalidInput, match=r"needs texts"):
        offramp.compile(lm)
    with pytest.raises(InvalidInput, match=r"agreement\(lm, texts\)"):
        offramp.record(lm, [])
    with pytest.raises(InvalidInput, match=r"what attach or load made"):
        offramp.compile(model, offramp.Plain())


def test_calibrating_a_language_model_points_to_what_promises(model):
    with pytest.raises(InvalidInput, match=r"certify_agreement"):
        offramp.calibrate(offramp.attach(model, exits=[2]))


def test_a_model_converted_behind_its_exits_is_refused(model):
    lm = offramp.attach(model, exits=[2], head="norm")
    run = offramp.compile(lm, offramp.Verify(2))
    model.bfloat16()
    with pytest.raises(InvalidInput, match=r"Exit 0 is torch.float32"):
        run.generate(prompts((5,)), max_new_tokens=3)
    with pytest.raises(InvalidInput, match=r"Exit 0 is torch.float32 on cpu, the model torch.bfloat16 on cpu.*lm\.to\("):
        offramp.compile(lm, offramp.Verify(2))
    lm.to(lm.decoder.device, lm.decoder.dtype)
    assert offramp.compile(lm, offramp.Verify(2))(prompts((5,)), max_new_tokens=3).tokens == run(prompts((5,)), max_new_tokens=3).tokens


def test_what_may_be_given_is_listed_by_the_names_that_a_user_gives(model, net, tmp_path):
    """Names inside the library, and what the verb itself is called with, are no options: given as such they are refused too."""
    lm = offramp.attach(model, exits=[2])
    lm.save(tmp_path)
    calls = {
        "lm": lambda **o: offramp.compile(lm, offramp.Plain(), **o),
        "train_loader": lambda **o: offramp.fit(net, [], **o),
        "data": lambda **o: offramp.attach(model, exits=[1], **o),
        "model": lambda **o: offramp.compile(net, never(net, offramp.Confidence()), **o),
        "loader": lambda **o: offramp.fit(lm, TEXTS, **o),
        "trace": lambda **o: offramp.load(model, tmp_path, **o),
    }
    inside = {"net", "lm", "model", "folder", "train_loader", "data", "loader", "trace"}
    for name, call in calls.items():
        with pytest.raises(InvalidInput, match=rf"takes no {name}\.") as error:
            call(**{name: 1})
        listed = str(error.value).rpartition("It takes ")[2].rstrip(".").split(", ")
        assert listed and not inside & set(listed), listed
    with pytest.raises(InvalidInput, match=r"takes no nonsense\. It takes no options\.$"):
        offramp.load(model, tmp_path, nonsense=1)
    with pytest.raises(InvalidInput, match=r"takes no nonsense\. It takes rules,"):
        offramp.record(net, [], nonsense=1)


# ---- load, report --------------------------------------------------------------------------------------------------------------


def test_what_was_saved_is_told_from_the_folder(model, net, plain, tmp_path):
    offramp.attach(model, exits=[1, 2], head="norm").save(tmp_path / "lm")
    net.save(tmp_path / "net")
    assert offramp.load(model, tmp_path / "lm").specs == (OwnNorm(), OwnNorm())
    assert type(offramp.load(plain, tmp_path / "net", example=torch.randn(2, 8))) is MultiExit
    with pytest.raises(InvalidInput, match=r"give example="):
        offramp.load(plain, tmp_path / "net")
    with pytest.raises(InvalidInput, match=r"takes no example\. It belongs to a diffusion model or a network cut"):
        offramp.load(model, tmp_path / "lm", example=torch.randn(2, 8))
    with pytest.raises(ArtifactError, match=r"no saved exits"):
        offramp.load(model, tmp_path)
    net.save(tmp_path / "lm")
    with pytest.raises(ArtifactError, match=r"more than one"):
        offramp.load(model, tmp_path / "lm")


def test_reports_of_texts(model, tmp_path):
    pytest.importorskip("matplotlib")
    lm = offramp.attach(model, exits=[2])
    found = offramp.compile(lm, offramp.Verify(2)).generate(prompts((4,)), max_new_tokens=6)
    path = offramp.report(tmp_path / "texts.html", generation=found, lm=lm)
    assert "model of 4 blocks" in Path(path).read_text()
    with pytest.raises(InvalidInput, match=r"lm=..."):
        offramp.report(tmp_path / "texts.html", generation=found)
    with pytest.raises(InvalidInput, match=r"one of them"):
        offramp.report(tmp_path / "texts.html")


def test_a_new_kind_is_one_entry(monkeypatch, plain):
    """What another kind of network needs to be known by all verbs; what it is attached to need not be a module."""

    class Other:
        pass

    made = Other()
    kind = verbs.Kind("something else", Other, lambda model, options: "special" in options, {"attach": lambda model, *, special: made})
    monkeypatch.setattr(verbs, "KINDS", (kind, *verbs.KINDS))
    assert offramp.attach(plain, special=True) is made and offramp.attach("a pipeline", special=True) is made
    with pytest.raises(InvalidInput, match=r"compile of something else"):
        offramp.compile(made, None)
