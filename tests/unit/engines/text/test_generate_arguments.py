"""What generate is given: prompts in every form, settings and their defaults, stop strings, streamers, refusals."""

from __future__ import annotations

import copy
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from language_models import POSITIONS, WORDS, build, byte_tokenizer, left_padded, own_greedy, prompts, shared, word_tokenizer
from offramp.core.errors import InvalidInput
from offramp.engines.text.arguments import StopStrings, token_ids
from offramp.engines.text.generate import generate
from offramp.engines.text.generator import TextGenerator
from offramp.language import LanguageModel, attach_lm
from offramp.policies.decoding import Accept, CatchUp, Plain, Verify

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return attach_lm(shared("llama"), [2])


def with_defaults(**defaults: Any) -> LanguageModel:
    """A model whose own generation configuration says something."""
    model = copy.copy(shared("llama"))
    model.generation_config = copy.deepcopy(model.generation_config)
    for name, value in defaults.items():
        setattr(model.generation_config, name, value)
    return attach_lm(model, [2])


class TestPrompts:
    def test_every_form_is_the_same_text(self, lm: LanguageModel) -> None:
        tokenizer = word_tokenizer()
        texts = ["w3 w9 w1", "w5", "w2 w2 w7 w8"]
        ids = [[WORDS.index(w) for w in text.split()] for text in texts]
        left = left_padded(ids)
        right = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        assert right["attention_mask"][1].tolist() == [1, 0, 0, 0]
        expected = generate(lm, ids, max_new_tokens=6).sequences
        assert expected.equal(own_greedy(lm.model, ids, 6))
        for found in (
            generate(lm, left["input_ids"], attention_mask=left["attention_mask"], max_new_tokens=6),
            generate(lm, **left, max_new_tokens=6),
            generate(lm, right["input_ids"], attention_mask=right["attention_mask"], max_new_tokens=6),
            generate(lm, right, max_new_tokens=6),
            generate(lm, dict(left), max_new_tokens=6),
            generate(lm, input_ids=left["input_ids"].tolist(), attention_mask=left["attention_mask"].tolist(), max_new_tokens=6),
            generate(lm, left["input_ids"], max_new_tokens=6),  # the mask is guessed from the padding token
            generate(lm, texts, tokenizer=tokenizer, max_new_tokens=6),
            generate(lm, [torch.tensor(row) for row in ids], max_new_tokens=6),
        ):
            assert found.sequences.equal(expected)
            assert found.prompts == ids

    def test_one_text(self, lm: LanguageModel) -> None:
        expected = generate(lm, [[4, 9]], max_new_tokens=3).tokens
        for form in (
            torch.tensor([4, 9]),
            torch.tensor([[4, 9]]),
            [4, 9],
            np.array([[4, 9]]),
            list(np.array([4, 9])),
            [list(np.array([4, 9]))],
        ):
            assert generate(lm, form, max_new_tokens=3).tokens == expected
        assert generate(lm, "w0 w5", tokenizer=word_tokenizer(), max_new_tokens=3).tokens == expected

    def test_a_tokenizers_lists_need_no_padding(self, lm: LanguageModel) -> None:
        tokenizer, texts = word_tokenizer(), ["w3 w9 w1", "w5"]
        expected = generate(lm, texts, tokenizer=tokenizer, max_new_tokens=3).tokens
        assert generate(lm, tokenizer(texts), max_new_tokens=3).tokens == expected
        assert generate(lm, **tokenizer(texts), max_new_tokens=3).tokens == expected
        assert generate(lm, tokenizer(texts[0]), max_new_tokens=3).tokens == expected[:1]

    def test_padding_that_is_also_an_end_is_no_padding(self) -> None:
        ids = torch.tensor([[0, 0, 7], [5, 6, 7]])
        assert token_ids(ids, pad=0) == [[7], [5, 6, 7]]
        assert token_ids(ids, pad=0, ends=(0,)) == [[0, 0, 7], [5, 6, 7]]
        assert token_ids(ids) == [[0, 0, 7], [5, 6, 7]]

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"prompts": torch.rand(2, 3)}, "whole numbers"),
            ({"prompts": torch.zeros(1, 2, 3, dtype=torch.long)}, r"\[rows, tokens\]"),
            ({"prompts": torch.ones(2, 3, dtype=torch.long), "attention_mask": torch.ones(2, 2)}, "must be the same"),
            ({"prompts": torch.ones(1, 3, dtype=torch.long), "attention_mask": torch.tensor([[1, 0, 1]])}, "zeros in the middle"),
            ({"prompts": torch.ones(2, 2, dtype=torch.long), "attention_mask": torch.tensor([[0, 0], [1, 1]])}, "at least one token"),
            ({"prompts": "w1"}, "Texts need a tokenizer"),
            ({"prompts": ["w1", [3]]}, "all texts or all lists"),
            ({"prompts": 5}, "must be texts, lists of token ids or a tensor"),
            ({"prompts": []}, "must be texts, lists of token ids or a tensor"),
            ({"prompts": [[1]], "seed": "a"}, "or None to draw other texts at every call"),
            ({"prompts": [[1], [4, 999, 1]]}, "Prompt 1 has the token id 999; ids of this model are 0 to 96"),
            ({"prompts": [[-2]]}, "Prompt 0 has the token id -2"),
            ({"prompts": [[1]], "seed": 0.5}, "seed must be a whole number"),
            ({"prompts": [[1]], "seed": [1, 2]}, "one for each of the 1 prompts"),
            ({"prompts": [[1]], "seed": 2**63}, "64 bits"),
            ({"prompts": [[1]], "max_new_tokens": 2.5}, "max_new_tokens must be a whole number"),
            ({"prompts": [[1]], "max_new_tokens": 0}, "max_new_tokens must be a whole number, at least 1, got 0"),
            ({"prompts": [[1]], "max_new_tokens": True}, "max_new_tokens must be a whole number"),
            ({"prompts": [[1]], "pad_token_id": -1}, "pad_token_id must be a whole number, at least 0"),
            ({"prompts": [[1]], "top_k": True}, "top_k must be a whole number"),
            ({"prompts": [[1]], "do_sample": "yes"}, "do_sample must be True or False"),
            ({"prompts": [[1]], "do_sample": True, "temperature": "hot"}, "temperature must be a finite number, got 'hot'"),
            ({"prompts": [[1]], "do_sample": True, "temperature": float("nan")}, "temperature must be a finite number, got nan"),
            ({"prompts": [[1]], "eos_token_id": "x"}, "eos_token_id must be a token id"),
            ({"prompts": [[1]], "stop_strings": 3}, "stop_strings must be texts"),
            ({"prompts": [[1]], "stop_strings": "a", "stop": "b"}, "another name"),
            ({"prompts": [[1.5]]}, "Token ids are whole numbers"),
            ({"prompts": [[1], [1, 2]], "attention_mask": [[1]]}, "attention_mask has 1 rows, the token ids 2"),
            ({}, "prompts or input_ids"),
            ({"prompts": [[1]], "input_ids": [[1]]}, "prompts or input_ids"),
            ({"prompts": [[1]], "mode": "verify"}, r"Plain\(\), Accept\(...\), Verify\(...\) or Scheduled\(...\)"),
            ({"prompts": [[1]], "mode": Verify(exit_index=1)}, "exit_index must be from 0 to 0"),
        ],
    )
    def test_refused(self, lm: LanguageModel, given: dict[str, Any], message: str) -> None:
        with pytest.raises(InvalidInput, match=message):
            generate(lm, **given)


class TestSequences:
    def test_are_those_of_transformers_also_when_rows_end(self, lm: LanguageModel) -> None:
        texts = prompts((4, 9, 1))
        free = generate(lm, texts, max_new_tokens=10).tokens
        end = free[0][2]
        expected = own_greedy(lm.model, texts, 10, eos_token_id=end, pad_token_id=0)
        found = generate(lm, texts, Verify(3), max_new_tokens=10, eos_token_id=end, pad_token_id=0)
        assert found.sequences.equal(expected) and found.sequences.dtype == torch.int64

    def test_are_filled_with_the_end_where_nothing_else_is_said(self) -> None:
        lm = with_defaults(pad_token_id=None)
        free = generate(lm, prompts((4, 9)), max_new_tokens=10).tokens
        found = generate(lm, prompts((4, 9)), max_new_tokens=10, eos_token_id=free[0][2])
        assert found.sequences[0, -1] == free[0][2]


class TestDefaults:
    def test_from_the_models_generation_configuration(self) -> None:
        base = attach_lm(shared("llama"), [2])
        sampled = {"do_sample": True, "temperature": 0.5, "top_k": 5, "top_p": 0.7, "repetition_penalty": 1.4}
        asked = generate(base, prompts((4,)), max_new_tokens=12, **sampled).tokens
        assert generate(with_defaults(**sampled), prompts((4,)), max_new_tokens=12).tokens == asked
        assert generate(base, prompts((4,)), max_new_tokens=12).tokens != asked
        overridden = generate(with_defaults(**sampled), prompts((4,)), max_new_tokens=12, do_sample=False, repetition_penalty=1.0)
        assert overridden.tokens == generate(base, prompts((4,)), max_new_tokens=12).tokens

    def test_from_a_given_configuration(self) -> None:
        from transformers import GenerationConfig

        lm = with_defaults(max_new_tokens=5, do_sample=True)
        found = generate(lm, prompts((4,)), generation_config=GenerationConfig(max_new_tokens=7, do_sample=False))
        assert found.tokens == generate(lm, prompts((4,)), max_new_tokens=7, do_sample=False).tokens

    def test_fifty_candidates_when_sampling_as_in_transformers(self, lm: LanguageModel) -> None:
        same = generate(lm, prompts((4,)), do_sample=True, temperature=30.0)
        assert same.tokens == generate(lm, prompts((4,)), do_sample=True, temperature=30.0, top_k=50).tokens
        assert same.tokens != generate(lm, prompts((4,)), do_sample=True, temperature=30.0, top_k=0).tokens

    def test_end_of_text(self, lm: LanguageModel) -> None:
        free = generate(lm, prompts((4,)), max_new_tokens=9).tokens[0]
        ending = with_defaults(eos_token_id=[free[3], 96])
        assert generate(ending, prompts((4,)), max_new_tokens=9).tokens[0] == free[: free.index(free[3]) + 1]
        assert generate(ending, prompts((4,)), max_new_tokens=9, eos_token_id=[]).tokens[0] == free
        assert generate(lm, prompts((4,)), max_new_tokens=9, eos_token_id=torch.tensor(free[3])).tokens[0][-1] == free[3]

    def test_lengths(self, lm: LanguageModel) -> None:
        texts = prompts((4, 9))
        assert [len(t) for t in generate(lm, texts).tokens] == [20, 20]
        assert [len(t) for t in generate(lm, texts, max_length=12).tokens] == [3, 3]
        assert generate(lm, texts, max_length=12).sequences.equal(lm.model.generate(**left_padded(texts), max_length=12, do_sample=False))
        assert [len(t) for t in generate(lm, texts, max_length=12, max_new_tokens=5).tokens] == [5, 5]
        assert [len(t) for t in generate(with_defaults(max_new_tokens=2), texts).tokens] == [2, 2]
        assert [len(t) for t in generate(with_defaults(max_new_tokens=2), texts, max_length=12).tokens] == [3, 3]
        assert [len(t) for t in generate(with_defaults(max_length=12), texts).tokens] == [3, 3]
        with pytest.raises(InvalidInput, match="max_length is 9 and the longest prompt has 9 tokens"):
            generate(lm, texts, max_length=9)

    def test_the_default_length_stays_within_the_positions(self) -> None:
        lm = attach_lm(shared("gpt2"), [2])
        text = prompts((120,))
        assert generate(lm, text).sequences.equal(lm.model.generate(torch.tensor(text), do_sample=False))


class TestRefusals:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("num_beams", 4),
            ("min_p", 0.1),
            ("no_repeat_ngram_size", 3),
            ("bad_words_ids", [[3]]),
            ("logits_processor", [lambda ids, scores: scores]),
            ("stopping_criteria", [lambda ids, scores: False]),
            ("prefix_allowed_tokens_fn", lambda row, ids: [1]),
            ("inputs_embeds", torch.zeros(1, 2, 32)),
            ("output_scores", True),
            ("use_cache", 0.5),
        ],
    )
    def test_known_to_transformers_only(self, lm: LanguageModel, name: str, value: Any) -> None:
        with pytest.raises(InvalidInput, match=f"{name}=.* is known to transformers and not supported.*own generate"):
            generate(lm, [[1]], **{name: value})

    @pytest.mark.parametrize("name", ["assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens"])
    def test_drafts_have_a_mode(self, lm: LanguageModel, name: str) -> None:
        with pytest.raises(InvalidInput, match=rf"{name}=3 .* offramp\.compile\(lm, Verify\(\.\.\.\)\)"):
            generate(lm, [[1]], **{name: 3})

    def test_more_texts_of_a_prompt_are_more_rows(self, lm: LanguageModel) -> None:
        with pytest.raises(InvalidInput, match=r"num_return_sequences=2 .* prompts=\[prompt\] \* n"):
            generate(lm, [[1]], num_return_sequences=2)

    def test_that_changes_nothing_is_fine(self, lm: LanguageModel) -> None:
        neutral: dict[str, Any] = {"num_beams": 1, "use_cache": True, "min_p": None, "bad_words_ids": [], "logits_processor": []}
        assert generate(lm, [[5]], max_new_tokens=3, **neutral).tokens == generate(lm, [[5]], max_new_tokens=3).tokens

    def test_unknown_with_a_hint(self, lm: LanguageModel) -> None:
        with pytest.raises(InvalidInput, match=r"no argument 'temprature'.* temperature"):
            generate(lm, [[1]], temprature=0.3)
        with pytest.raises(InvalidInput, match=r"no argument 'qqq'.*Known are input_ids"):
            generate(lm, [[1]], qqq=1)

    @pytest.mark.parametrize(("name", "value"), [("no_repeat_ngram_size", 2), ("suppress_tokens", [4]), ("num_beams", 3)])
    def test_defaults_of_the_model_are_not_passed_over(self, name: str, value: Any) -> None:
        lm = with_defaults(**{name: value})
        with pytest.raises(InvalidInput, match=f"configuration asks for {name}=.*Give {name}=None"):
            generate(lm, [[5]], max_new_tokens=3)
        assert len(generate(lm, [[5]], max_new_tokens=3, **{name: None}).tokens[0]) == 3


MODES = [Plain(), Verify(4), Accept(0.0, fill=CatchUp(3))]


class TestStopStrings:
    @pytest.mark.parametrize("mode", MODES[:2])
    def test_words_as_in_transformers(self, lm: LanguageModel, mode: Any) -> None:
        tokenizer, texts = word_tokenizer(), prompts((4, 9, 2))
        free = generate(lm, texts, max_new_tokens=14).tokens
        for place in range(1, 8):
            both = tokenizer.decode(free[1][place - 1 : place + 1])
            stops = [both, WORDS[free[0][place]]]
            # transformers lets a row that a string stopped write on with its batch mates unless there is an end token too
            options = {"stop_strings": stops, "tokenizer": tokenizer, "pad_token_id": 0, "eos_token_id": 96}
            found = generate(lm, texts, mode, max_new_tokens=14, **options)
            assert found.sequences.equal(own_greedy(lm.model, texts, 14, **options)), stops
            assert len(found.tokens[0]) <= place + 1

    @pytest.mark.parametrize("stop", ["ab", "b", "a a", "the", "é", "heab"])
    def test_decisions_on_bytes_as_in_transformers(self, stop: str) -> None:
        from transformers import StopStringCriteria

        tokenizer = byte_tokenizer()
        known = {t: i for t, i in tokenizer.get_vocab().items()}
        theirs, ours = StopStringCriteria(tokenizer, [stop]), StopStrings(tokenizer, [stop])
        pool = [known[t] for t in ("a", "b", "ab", "Ġa", "the", "Ã", "©", "h", "e") if t in known]
        generator = torch.Generator().manual_seed(0)
        fired = 0
        for _ in range(900):
            length = int(torch.randint(1, 7, (1,), generator=generator))
            ids = [pool[int(i)] for i in torch.randint(0, len(pool), (length,), generator=generator)]
            expected = bool(theirs(torch.tensor([ids]), torch.zeros(1, 97))[0])
            assert ours(ids) == expected, tokenizer.decode(ids)
            fired += expected
        assert fired > 3

    @pytest.mark.parametrize("mode", MODES)
    def test_within_a_run(self, lm: LanguageModel, mode: Any) -> None:
        tokenizer = word_tokenizer()
        free = generate(lm, prompts((4, 9)), mode, max_new_tokens=14).tokens
        for place in range(1, 13):
            stop = WORDS[free[0][place]] + " "  # a word is complete when the next begins
            found = generate(lm, prompts((4, 9)), mode, max_new_tokens=14, stop_strings=stop, tokenizer=tokenizer)
            for row in range(2):
                hits = [i for i, t in enumerate(free[row][:-1]) if t == free[0][place]]
                assert found.tokens[row] == free[row][: hits[0] + 2 if hits else None]

    def test_stop_is_another_name(self, lm: LanguageModel) -> None:
        tokenizer = word_tokenizer()
        stop = WORDS[generate(lm, [[4, 9]], max_new_tokens=6).tokens[0][2]]
        expected = generate(lm, [[4, 9]], max_new_tokens=6, tokenizer=tokenizer, stop_strings=stop).tokens
        assert generate(lm, [[4, 9]], max_new_tokens=6, tokenizer=tokenizer, stop=stop).tokens == expected != [[]]
        for captured in (False, True):
            writer = TextGenerator(lm, Verify(2), tokenizer=tokenizer, captured=captured)
            assert writer.generate([[4, 9]], max_new_tokens=6, stop=[stop]).tokens == expected

    def test_refused(self, lm: LanguageModel) -> None:
        with pytest.raises(InvalidInput, match="need the tokenizer"):
            generate(lm, [[1]], stop_strings="a")
        with pytest.raises(InvalidInput, match="not empty"):
            generate(lm, [[1]], stop_strings=["a", ""], tokenizer=word_tokenizer())


class Told:
    def __init__(self) -> None:
        self.shapes: list[int] = []
        self.tokens: list[int] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        assert not self.ended and value.device.type == "cpu"
        self.shapes.append(value.dim())
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended += 1


class TestStreamer:
    @pytest.mark.parametrize("mode", MODES)
    def test_is_told_everything_once(self, lm: LanguageModel, mode: Any) -> None:
        told = Told()
        found = generate(lm, prompts((4,)), mode, max_new_tokens=9, streamer=told)
        assert told.tokens == found.prompts[0] + found.tokens[0]
        assert told.ended == 1 and told.shapes[0] == 2 and set(told.shapes[1:]) == {1}

    def test_of_transformers(self, lm: LanguageModel, capsys: pytest.CaptureFixture[str]) -> None:
        from transformers import TextStreamer

        tokenizer = word_tokenizer()
        found = generate(lm, prompts((4,)), Verify(3), max_new_tokens=9, streamer=TextStreamer(tokenizer, skip_prompt=True))
        assert capsys.readouterr().out.split() == [WORDS[t] for t in found.tokens[0]]

    def test_one_text_only(self, lm: LanguageModel) -> None:
        with pytest.raises(InvalidInput, match="one text, got 2"):
            generate(lm, prompts((4, 2)), streamer=Told())

    def test_stops_with_the_text(self, lm: LanguageModel) -> None:
        model = build("llama")
        free = generate(attach_lm(model, [2]), prompts((4,)), max_new_tokens=9).tokens[0]
        told = Told()
        found = generate(attach_lm(model, [2]), prompts((4,)), Verify(5), max_new_tokens=9, streamer=told, eos_token_id=free[4])
        assert told.tokens[4:] == found.tokens[0] == free[: free.index(free[4]) + 1]


class TestConfigurations:
    def test_a_mapping_is_read_as_a_configuration_is(self, lm: LanguageModel) -> None:
        from transformers import GenerationConfig

        asked = {"max_new_tokens": 4, "do_sample": True, "temperature": 3.0, "top_k": 0}
        expected = generate(lm, [[5, 6]], generation_config=GenerationConfig(**asked))
        assert [len(t) for t in expected.tokens] == [4]
        whole = GenerationConfig(**asked).to_dict()
        for found in (asked, whole, MappingProxyType(asked), SimpleNamespace(**asked)):
            assert generate(lm, [[5, 6]], generation_config=found).tokens == expected.tokens
        assert len(generate(lm, [[5, 6]], generation_config=asked, max_new_tokens=2).tokens[0]) == 2

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ("nonsense", "GenerationConfig of transformers or a mapping of its settings"),
            (4, "or a mapping of its settings"),
            ([("max_new_tokens", 4)], "or a mapping of its settings"),
            (SimpleNamespace, "or a mapping of its settings"),
            ({"max_new_token": 4}, "no argument 'max_new_token'. Did you mean max_new_tokens"),
            ({"num_beams": 4}, "num_beams=4 is known to transformers"),
            ({"max_new_tokens": 0}, "max_new_tokens must be a whole number, at least 1"),
            ({3: 4}, "has a setting 3; settings have names"),
        ],
    )
    def test_what_is_none_is_refused(self, lm: LanguageModel, config: Any, message: str) -> None:
        with pytest.raises(InvalidInput, match=message):
            generate(lm, [[5, 6]], generation_config=config)


def test_without_a_seed_every_call_draws_anew_and_follows_the_global_seed(lm: LanguageModel) -> None:
    def written() -> list[list[int]]:
        return generate(lm, [[5, 6], [5, 6]], do_sample=True, top_k=0, temperature=5.0, max_new_tokens=12, seed=None).tokens

    torch.manual_seed(3)
    first, second = written(), written()
    assert first != second and first[0] != first[1]
    torch.manual_seed(3)
    assert written() == first


def test_a_prompt_that_fills_all_positions_is_said_to_be_too_long() -> None:
    lm = attach_lm(shared("gpt2"), [2])
    for asked in ({}, {"max_new_tokens": 5}):
        with pytest.raises(InvalidInput, match=rf"longest prompt has {POSITIONS + 2} tokens, more than the {POSITIONS} positions.*Shorten"):
            generate(lm, [[5] * (POSITIONS + 2)], **asked)
    assert len(generate(lm, [[5] * POSITIONS]).tokens[0]) == 1
