"""What all reproductions share: settings from a file, means over seeds, and what is made of a claim."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from offramp import systems
from offramp.cli.reproduce_common import (
    Reproduction,
    VariantSettings,
    across_seeds,
    averaged,
    in_words,
    measured,
    rows_by_name,
    save,
    to_try,
    verdict,
)
from offramp.core.errors import InvalidInput
from offramp.core.system import Predicate


@dataclass(frozen=True)
class Some(VariantSettings):
    depth: int
    sizes: tuple[int, ...] = ()
    sweep: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth < 1:
            raise InvalidInput(f"depth must be at least 1, got {self.depth}.")


FILE = """
seeds = [7]
sizes = [1, 2]

[system]
exits = 1
heads = 2

[sweep]
limit = [0.1, 0.2]

[tiny]
depth = 3

[large]
depth = 9
seeds = [1, 2]
system = { exits = 4 }
"""


def written(folder: Path, text: str = FILE) -> Path:
    (folder / "x.toml").write_text(text)
    return folder / "x.toml"


class TestSettings:
    def test_what_stands_outside_is_shared_and_tables_are_joined(self, tmp_path: Path) -> None:
        path = written(tmp_path)
        assert Some.variants(path) == ["tiny", "large"], "tables that are named like a setting are no variants"
        assert Some.load(path, "tiny") == Some(3, (1, 2), {"limit": [0.1, 0.2]}, seeds=(7,), system={"exits": 1, "heads": 2})
        large = Some.load(path, "large")
        assert large.seeds == (1, 2) and dict(large.system) == {"exits": 4, "heads": 2} and large.sizes == (1, 2)

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ("depth = 3", "dept = 3", r"x.toml, variant tiny: unknown key 'dept'. Did you mean 'depth'"),
            ("depth = 3", "", r"x.toml, variant tiny: the key 'depth' is missing"),
            ("depth = 3", "depth = 0", r"x.toml, variant tiny: depth must be at least 1, got 0"),
            ("seeds = [7]", "seeds = []", r"x.toml, variant tiny: seeds must not be empty"),
            ("sizes = [1, 2]", "size = 3", r"unknown key 'size'"),
        ],
    )
    def test_a_mistake_is_named_with_its_place(self, tmp_path: Path, old: str, new: str, message: str) -> None:
        with pytest.raises(InvalidInput, match=message):
            Some.load(written(tmp_path, FILE.replace(old, new)), "tiny")

    def test_a_variant_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidInput, match="no variant 'huge'; it has: tiny, large"):
            Some.load(written(tmp_path), "huge")
        with pytest.raises(InvalidInput, match="No configuration file"):
            Some.load(tmp_path / "none.toml", "tiny")

    def test_a_sweep_is_one_row_a_value(self) -> None:
        assert to_try({"a": [1, 2], "b": [0.5]}) == [{"a": 1}, {"a": 2}, {"b": 0.5}] and to_try({}) == [{}]
        assert [in_words(c) for c in ({"a": 0.50}, {"a": 1, "b": 2}, {})] == ["a 0.5", "a 1, b 2", "default"]


class TestNumbers:
    ROWS = (
        {"budget": 0.3, "infeasible": True},
        {"budget": 0.5, "drop": 0.02},
        {"budget": 0.7, "drop": -0.01},
        {"budget": 0.9, "drop": 0.0},
        {"budget": 1.0, "drop": -0.5},  # the full cost says nothing about leaving early: it never counts
        {"budget": 1.2, "drop": 0.5},
    )

    @pytest.mark.parametrize(
        ("predicate", "value"),
        [
            (Predicate("drop", "<=", 0.0), (0.02 - 0.01) / 3),
            (Predicate("drop", "<=", 0.0, over="worst"), 0.02),
            (Predicate("drop", "<=", 0.0, over="best"), -0.01),
            (Predicate("drop", ">=", 0.0, over="worst"), -0.01),
            (Predicate("drop", ">=", 0.0, over="best"), 0.02),
            (Predicate("drop", "<=", 0.0, budget=0.7), -0.01),
            (Predicate("drop", "<=", 0.0, budget=0.3), None),
            (Predicate("drop", "<=", 0.0, budget=0.8), None),
            (Predicate("accuracy", ">=", 0.0), None),
        ],
    )
    def test_measured(self, predicate: Predicate, value: float | None) -> None:
        assert measured(predicate, self.ROWS) == (value if value is None else pytest.approx(value))

    def test_what_counts_may_be_said(self) -> None:
        predicate = Predicate("drop", "<=", 0.0, over="worst")
        assert measured(predicate, self.ROWS, lambda cost: cost > 1) == 0.5 and measured(predicate, self.ROWS, lambda cost: False) is None

    @pytest.mark.parametrize("budget", [0.0, 1.0, 1.5, -0.5, float("nan")])
    def test_a_predicate_names_a_cost_below_the_full_one(self, budget: float) -> None:
        with pytest.raises(InvalidInput, match=r"inside \(0, 1\)"):
            Predicate("drop", "<=", 0.0, budget=budget)

    def test_a_predicate_in_words(self) -> None:
        assert str(Predicate("drop", "<=", 0.0, budget=0.64)) == "drop <= 0, at cost 0.64"
        assert str(Predicate("excess", "<=", 0.02, over="worst")) == "excess <= 0.02, worst over budgets below 1"

    def test_interval_and_verdict(self) -> None:
        estimate = across_seeds([0.01, 0.02, 0.03])
        assert estimate.value == pytest.approx(0.02) and estimate.high - 0.02 == pytest.approx(4.303 * 0.01 / 3**0.5)
        above = Predicate("gain_over_fixed", ">=", 0.0)
        assert verdict(above, estimate).startswith("holds (not clear")
        assert verdict(above, across_seeds([0.02, 0.021, 0.022])) == "holds"
        assert verdict(above, across_seeds([-0.02, -0.021, -0.022])) == "does not hold"
        assert verdict(above, across_seeds([0.02])) == "holds (not clear: one seed)"
        assert verdict(above, None) == "not measured: no budget was feasible"
        assert verdict(above, None, "it is too dear") == "not measured: it is too dear"

    def test_means_over_rows_that_have_the_number(self) -> None:
        found = averaged([{"a": 1.0, "b": None}, {"a": 3.0}, {"c": 5}], ("c", "b", "a"))
        assert list(found) == ["c", "a"] and found["c"] == [5.0, 5.0, 5.0]
        assert found["a"][0] == 2.0 and found["a"][1] < 1 < 3 < found["a"][2]
        seeds = [{"rows": [{"name": "x", "a": 1}, {"name": "y", "a": 5}]}, {"rows": [{"name": "x", "a": 2}]}]
        assert [(r["name"], r["a"][0]) for r in rows_by_name(seeds, "rows", "name", ["a"])] == [("x", 1.5), ("y", 5.0)]


class TestReproduction:
    """One that trains nothing: every repetition gives the drop that its seed says."""

    KIND = Reproduction(
        "classify",
        Some,
        "tiny",
        read=lambda settings, data, device, say: f"{data} on {device}",
        repeat=lambda name, settings, given, seed, device, say: {
            "seed": seed,
            "given": given,
            "budgets": [{"budget": 0.67, "drop": seed / 100}],
        },
        summarise=lambda settings, seeds: {"depth": settings.depth, "seeds": [s["seed"] for s in seeds]},
        table=lambda result: (("",), []),
    )

    def test_a_result(self, tmp_path: Path) -> None:
        settings = Some(3, seeds=(-3, -2, -1), system={"exits": 1})
        system = systems.build("branchynet", exits=1)
        found = self.KIND.run("branchynet", settings, variant="tiny", data="here")
        assert found["claim"] == system.card.claim and found["predicate"]["metric"] == system.card.predicate.metric  # type: ignore[union-attr]
        assert found["summary"] == {"depth": 3, "seeds": [-3, -2, -1]} and found["settings"]["system"] == {"exits": 1}
        assert [s["given"] for s in found["seeds"]] == ["here on cpu"] * 3 and found["composition"]["rule"]
        assert save(found, tmp_path) == tmp_path / "branchynet--tiny--cpu.json"

    def test_the_claim_is_judged_by_what_counts(self) -> None:
        built = systems.build("branchynet")
        system = replace(built, card=replace(built.card, predicate=Predicate("drop", "<=", 0.01)))
        seeds = [self.KIND.repeat("", None, "", k, "cpu", print) for k in (-3, -2, -1)]
        found = self.KIND.conclude(system, Some(3), "tiny", seeds, {})
        assert found["verdict"] == "holds" and found["measured"]["values"] == [-0.03, -0.02, -0.01]
        never = replace(self.KIND, counts=lambda system, cost: False, nothing="nothing counts").conclude(system, Some(3), "tiny", seeds, {})
        assert never["verdict"] == "not measured: nothing counts" and never["measured"] is None

    def test_what_is_refused(self) -> None:
        with pytest.raises(InvalidInput, match="kangaroo is a method of the generate engine; here those of the classify engine"):
            self.KIND.run("kangaroo", Some(3), variant="tiny")
        built = systems.build("branchynet")
        with pytest.raises(InvalidInput, match="card of branchynet has no predicate"):
            self.KIND.conclude(replace(built, card=replace(built.card, predicate=None)), Some(3), "tiny", [], {})
