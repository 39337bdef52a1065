"""The benchmarks of language models: budgets and results, text, what is timed and compared, and training that ends on time."""

from __future__ import annotations

import json
import lzma
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from language_models import build, word_tokenizer
from offramp.cli.text_runs import Written
from offramp.engines.text.rounds import Rounds
from offramp.exits.cached import Adapter
from offramp.exits.lm import Shared
from offramp.language import LanguageModel, attach_lm

PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6]]


@pytest.fixture(scope="module")
def common(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("lm_common")


@pytest.fixture(scope="module")
def training(script: Callable[[str], ModuleType], common: ModuleType) -> ModuleType:
    return script("train_lm")


@pytest.fixture(scope="module")
def table(script: Callable[[str], ModuleType], training: ModuleType) -> ModuleType:
    return script("lm_systems")


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return attach_lm(build("llama"), [1, 2], Shared())


# ---- time and results ----------------------------------------------------------------------------------------------------


def test_a_part_is_expected_to_take_what_the_longest_of_its_kind_took(common: ModuleType) -> None:
    budget = common.Budget(minutes=1)
    budget.taken = {"capture: a": 20.0, "capture: b": 90.0, "time: a": 1.0}
    assert budget.expected("time", 500) == 1.0
    assert budget.expected("other", 500) == 500
    assert budget.fits("time: b", 500)
    assert not budget.fits("capture: c", 0)  # 90 seconds of 60
    assert budget.skipped == ["capture: c"]


def test_results_are_whole_after_every_part_and_rows_are_replaced(common: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    sheet = common.Sheet(path, {"shape": [1, 2], "rows": [], "environment": "one"}, common.Budget(1))
    sheet.row(way="plain", rows=1, tokens_per_s=1.0)
    sheet.row(way="plain", rows=8, tokens_per_s=2.0)
    sheet.row(way="plain", rows=1, tokens_per_s=3.0)
    assert [(r["rows"], r["tokens_per_s"]) for r in json.loads(path.read_text())["rows"]] == [(8, 2.0), (1, 3.0)]
    kept = common.Sheet(path, {"shape": (1, 2), "rows": [], "environment": "two"}, common.Budget(1), same=("shape",))
    assert len(kept.content["rows"]) == 2 and kept.content["environment"] == "two" and kept.content["earlier_environments"] == ["one"]
    other = common.Sheet(path, {"shape": (3,), "rows": []}, common.Budget(1), same=("shape",))
    assert other.content["rows"] == []


def test_a_part_that_fails_is_named_and_does_not_cost_the_others(common: ModuleType, tmp_path: Path) -> None:
    done = []

    def fails() -> None:
        raise ValueError("no luck")

    sheet = common.Sheet(tmp_path / "r.json", {}, common.Budget(1))
    with pytest.raises(SystemExit, match="first"):
        common.run_parts({"first": fails, "second": lambda: done.append(2), "third": lambda: done.append(3)}, ["first", "second"], sheet)
    assert done == [2]
    assert json.loads((tmp_path / "r.json").read_text())["errors"] == {"first": "ValueError: no luck"}


def test_unknown_parts_and_tunings_are_refused(common: ModuleType) -> None:
    with pytest.raises(SystemExit, match="plain"):
        common.asked_parts("plane", ["plain", "batch"])
    with pytest.raises(SystemExit, match="coordinate_descent"):
        common.tuned("faster", torch.device("cpu"))
    assert common.tuned("max_autotune", torch.device("cpu")) is None
    tuned = common.tuned("max_autotune", torch.device("cuda"))
    assert tuned.max_autotune and not tuned.coordinate_descent


# ---- data ----------------------------------------------------------------------------------------------------------------


def test_the_beginning_of_a_vocabulary_is_one(common: ModuleType) -> None:
    vocab = {chr(0x100 + k): k for k in range(256)} | {"ĀĀ": 256, "ĀĀĀ": 257, "ĀĀĀĀ": 258}
    merges = ["Ā Ā", "ĀĀ Ā", "ĀĀ ĀĀ"]
    small, pairs = common.first_merges(vocab, merges, 259)
    assert pairs == [("Ā", "Ā"), ("ĀĀ", "Ā")] and small[common.END_OF_TEXT] == 258 and len(small) == 259
    with pytest.raises(SystemExit, match="order"):
        common.first_merges(vocab, merges[::-1], 258)
    with pytest.raises(SystemExit, match="260"):
        common.first_merges(vocab, merges, 300)


def test_the_small_tokenizer_knows_every_byte(common: ModuleType, shared_data: Path) -> None:
    made = common.small_tokenizer(shared_data / "tokenizer", 1024)
    text = "The house, «größer»: 𝄞 \n\n\tdone."
    ids = made.encode(text).ids
    assert made.decode(ids) == text and max(ids) < 1023 and made.token_to_id(common.END_OF_TEXT) == 1023


def test_prompts_come_in_six_groups_and_the_last_tokens_stay(common: ModuleType, shared_data: Path) -> None:
    found = common.spec_bench(shared_data / "prompts" / "spec_bench.jsonl.xz", lambda text: list(text.encode()), 100)
    assert {g: len(p) for g, p in common.grouped(found).items()} == dict.fromkeys(common.GROUPS, 80)
    assert all(1 <= len(p.tokens) <= 100 and (p.cut == 0 or len(p.tokens) == 100) for p in found)
    turns = common.in_turn([*found[:3], *found[80:82]])
    assert [p.group for p in turns] == ["mt_bench", "translation", "mt_bench", "translation", "mt_bench"]


def test_a_measurement_begins_with_its_arguments(common: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "lm" / "model").mkdir(parents=True)
    (tmp_path / "prompts").mkdir()
    word_tokenizer().save_pretrained(tmp_path / "lm" / "model")
    turns = [("qa", 1, "w3 w4 w5 w6 w7"), ("qa", 2, "w8"), ("writing", 3, "w9 w1")]
    lines = [json.dumps({"category": g, "question_id": n, "turns": [t]}) for g, n, t in turns]
    (tmp_path / "prompts" / "spec_bench.jsonl.xz").write_bytes(lzma.compress("\n".join(lines).encode()))
    given = ["--data", str(tmp_path), "--model", str(tmp_path / "lm"), "--out", str(tmp_path / "x.json"), "--context", "9", "--new", "6"]
    args = common.measurement_arguments("what", "one,two", "or three").parse_args(given)
    made = common.Measurement(args)
    found = made.spec_bench(1)
    assert args.parts == "one,two" and [(p.group, p.number, len(p.tokens), p.cut) for p in found] == [
        ("mt_bench", 3, 2, 0),
        ("qa", 1, 3, 2),
    ]
    assert made.dtype == torch.bfloat16 and (made.compiled is None or made.device.type == "cuda") and len(made.spec_bench()) == 3
    made.open_sheet("some", len(found), {"blocks": 4})
    written = json.loads((tmp_path / "x.json").read_text())
    assert written["benchmark"] == "some" and written["prompts"] == 2 and written["blocks"] == 4 and written["context"] == 9
    assert written["rows"] == [] and written["environment"]["device"] == str(made.device)


def test_compressed_text_is_read(common: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress("a\r\né".encode()))
    (tmp_path / "b.txt").write_text("b", encoding="utf8")
    assert common.unpacked(tmp_path / "a.txt.xz") == "a\r\né" and common.unpacked(tmp_path / "b.txt") == "b"


# ---- times ---------------------------------------------------------------------------------------------------------------


def test_rounds_between_measured_lengths_lie_on_the_line(common: ModuleType) -> None:
    made = common.candidate(0, 3, "shared", 10.0, {2: 14.0, 4: 16.0})
    assert [made.round(k) for k in (1, 2, 3, 4)] == [12.0, 14.0, 15.0, 16.0]


def test_tokens_per_round_are_those_of_a_run(common: ModuleType, lm: LanguageModel) -> None:
    run = Rounds(lm, 1, slots=64, draft_length=3)
    done = run.generate(PROMPTS[:1], 30)
    assert common.tokens_per_round([30], sum(done.accepted)) == pytest.approx(29 / done.deep_passes)


def test_the_host_waits_once_a_round(common: ModuleType, lm: LanguageModel) -> None:
    run = Rounds(lm, 1, slots=64, draft_length=(2, 3))
    found = common.synchronisations(run, PROMPTS[:1], 12, 30, common.fixed(2))
    assert found["per_round"] == 1 and found["calls_per_round"] == 0 and found["rounds"][0] < found["rounds"][1]


def test_tokens_per_second_leave_the_prompt_out(common: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = iter([9.0, 9.0, 3.0, 1.0, 5.0, 2.0, 4.0, 1.5])  # whole texts and single tokens, the first two to warm up
    monkeypatch.setattr(common, "seconds", lambda call, device: (next(taken), call()))
    asked = []
    found = common.rate(asked.append, 11, 3, torch.device("cpu"))
    assert found["tokens_per_s"] == pytest.approx(10 / (4.0 - 1.5)) and found["samples_s"] == [3.0, 5.0, 4.0]
    assert asked == [11, 1] * 4


def test_ways_are_timed_in_turn_and_back(common: ModuleType) -> None:
    order: list[str] = []
    ways = {name: lambda count, name=name: order.append(f"{name}{count}") for name in "ab"}
    assert list(common.rates(ways, 5, 2, torch.device("cpu"))) == ["a", "b"]
    assert order == ["a5", "a1", "b5", "b1", "b5", "b1", "a5", "a1", "a5", "a1", "b5", "b1"]


# ---- texts that differ ---------------------------------------------------------------------------------------------------


def test_where_texts_differ_first(common: ModuleType) -> None:
    assert common.first_difference([1, 2, 3], [1, 2, 3]) is None
    assert common.first_difference([1, 2, 3], [1, 5, 3]) == 1
    assert common.first_difference([1, 2], [1, 2, 3]) == 2


@pytest.mark.parametrize("value", [1.0, 1.5, -3.7, 0.02, 513.0])
def test_spacing_is_that_of_the_type(common: ModuleType, value: float) -> None:
    x = torch.tensor(abs(value), dtype=torch.bfloat16)
    nearest = torch.nextafter(x, torch.tensor(float("inf"), dtype=torch.bfloat16)) - x
    assert common.spacing(value, torch.bfloat16) == float(nearest)


class _Says(nn.Module):
    """A model whose logits are always the same."""

    def __init__(self, logits: list[float], dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(logits).to(dtype))

    def forward(self, ids: torch.Tensor, use_cache: bool = True) -> Any:
        class Out:
            logits = self.weight.expand(*ids.shape, -1)

        return Out


@pytest.mark.parametrize(("second", "near"), [(3.001, True), (2.0, False)])
def test_a_divergence_is_a_near_tie_only_within_rounding(common: ModuleType, second: float, near: bool) -> None:
    logits = [3.003, second, -7.1, 0.3]
    found = common.divergence(_Says(logits, torch.bfloat16), _Says(logits, torch.float32), [1, 2], 0, 1)
    assert found["near_tie"] is near
    assert found["gap_float32"] == pytest.approx(3.003 - second, abs=1e-6) and found["spacing"] == 2.0**-6
    compared = common.compare_texts(
        _Says(logits, torch.bfloat16), _Says(logits, torch.float32), [[1], [1]], [[0, 0], [2]], [[0, 1], [2]]
    )  # fmt: skip
    assert compared["equal"] == 1 and compared["not_near_ties"] == (0 if near else 1)
    assert compared["divergences"][0]["place"] == 1


# ---- training ------------------------------------------------------------------------------------------------------------


def test_every_pass_over_the_text_is_cut_elsewhere(training: ModuleType) -> None:
    data = training.Shifted(torch.arange(1000), 16, 4)
    starts = [int(data[k]["input_ids"][0]) for k in range(len(data))]
    assert len(set(starts)) == len(starts) and all(len(data[k]["labels"]) == 16 for k in (0, len(data) - 1))
    assert {s % 16 for s in starts} == {0, 4, 8, 12}


def test_the_learning_rate_rises_and_falls_to_its_least(training: ModuleType) -> None:
    rates = [training.rate_at(k / 100) for k in range(101)]
    assert rates.index(max(rates)) == 4 and max(rates) == pytest.approx(1) and rates[-1] == pytest.approx(0.05)
    assert rates[4:] == sorted(rates[4:], reverse=True) and rates[0] > 0


def test_training_ends_when_its_time_is_over(training: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(training.time, "monotonic", lambda: now[0])
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = training.on_time(10.0, lambda *_: None)(optimizer, 1000)
    optimizer.step()
    now[0] = 104.0  # the first step compiles: it is not counted
    scheduler.step()
    assert scheduler.get_last_lr()[0] == pytest.approx(training.rate_at(1 / 1000))
    now[0] = 107.0  # half of what was left then, after two steps of a thousand
    scheduler.step()
    assert scheduler.get_last_lr()[0] == pytest.approx(training.rate_at(0.5))
    now[0] = 110.0
    with pytest.raises(training.OutOfTimeError):
        scheduler.step()


def test_exits_of_a_training_are_found_one_by_one_and_fit_a_copy_in_another_type(
    common: ModuleType, lm: LanguageModel, tmp_path: Path
) -> None:
    lm.save(tmp_path / "exits-shared")
    adapter = attach_lm(lm.model, [2], Adapter())
    with torch.no_grad():
        adapter.heads[0].out.weight.normal_()
    adapter.save(tmp_path / "exits-adapter-2")
    found = common.exits_in(tmp_path, lm.model)
    assert {name: one.exits for name, one in found.items()} == {"adapter-2": (2,), "shared-1": (1,), "shared-2": (2,)}
    precise = common.over(found["adapter-2"], build("llama", torch.float64))
    assert precise.decoder.dtype == torch.float64
    assert torch.equal(precise.heads[0].out.weight, adapter.heads[0].out.weight.double())


# ---- systems -------------------------------------------------------------------------------------------------------------


def test_every_system_of_the_table_can_be_composed_for_the_model(table: ModuleType) -> None:
    for name in (*table.DRAFTING, *table.LEAVING):
        attach_lm(build("llama", num_hidden_layers=8), system=table.composed(name, 8, 16))
    assert table.drafting(table.composed("kangaroo", 8, 16)).draft_length == 6
    assert table.drafting(table.composed("self-supervised-early-exits", 8, 16)).exit_index == 0


def test_perplexity_is_of_the_new_tokens_after_the_first(table: ModuleType) -> None:
    logits = [0.5, -1.0, 2.0]
    written = Written(((0, 1), (2, 2)), torch.tensor([[1, 2, 2], [0, 0, 2]]), torch.zeros(2, 3), 1.0, 1.0)
    log = torch.tensor(logits).log_softmax(0)
    expected = math.exp(-float(log[[2, 2, 0, 2]].mean()))
    assert table.perplexity(_Says(logits, torch.float32), written) == pytest.approx(expected)
