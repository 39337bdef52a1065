"""The whole way from a model file to a report, and what goes wrong on it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from offramp.core.trace import Trace
from offramp.network import load_plan

Call = Callable[..., object]


@pytest.fixture(scope="module")
def run(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that went through fit, record and calibrate."""
    from typer.testing import CliRunner

    from offramp.cli import app

    out = tmp_path_factory.mktemp("runs") / "toy"
    common = ["--out", str(out)]
    source = ["--model", f"python:{toy / 'net.py'}:make", "--data", str(toy / "points.npz"), "--device", "cpu"]
    steps = [
        ["fit", *source, *common, "--part", "0:0.5", "--exits", "2", "--epochs", "3", "--learning-rate", "0.01", "--eval-part", "0.5:0.6"],
        ["record", "--config", str(out / "config.toml"), "--part", "0.6:0.8", "--time-at", "1,8"],
        ["calibrate", *common, "--rule", "margin", "--mean-cost", "0.7"],
    ]
    for words in steps:
        result = CliRunner().invoke(app, words, env={"COLUMNS": "200"})
        assert result.exit_code == 0, result.output
    return out


class TestTheWholeWay:
    def test_artifacts(self, run: Path) -> None:
        for name in (
            "adapter/adapter.json",
            "adapter/adapter.safetensors",
            "training/metrics.jsonl",
            "trace/trace.json",
            "plan/plan.json",
            "config.toml",
        ):
            assert (run / name).is_file(), name
        trace = Trace.load(run / "trace")
        assert trace.items == 120 and len(trace.exits) == 3 and trace.latency is not None and trace.latency.batch_sizes == (1, 8)
        assert trace.provenance["part"] == "0.6:0.8"

    def test_plan_meets_its_target(self, run: Path) -> None:
        plan = load_plan(run / "plan")
        assert type(plan.rule).__name__ == "Margin" and plan.mean_cost <= 0.7 + 1e-9 and sum(plan.shares[:-1]) > 0

    def test_items_used_twice_are_named(self, run: Path, tmp_path: Path, offramp: Call) -> None:
        copy = tmp_path / "copy"
        shutil.copytree(run, copy)
        rest = ("--config", run / "config.toml", "--out", copy)
        for words, overlap in (
            (("record", *rest), "was trained on"),  # by default all items, those of training among them
            (("record", *rest, "--part", "0.4:0.6"), "was trained on"),
            (("record", *rest, "--part", "0.6:0.8", "--part-seed", "1"), "was trained on"),
            (("record", *rest, "--part", "0.6:0.8"), None),
            (("evaluate", *rest, "--part", "0.7:0.9"), "chose the thresholds"),
            (("evaluate", *rest, "--part", "0.8:1"), None),
        ):
            result = offramp(*words)
            assert result.exit_code == 0, result.output
            assert ("These items" in result.output) == (overlap is not None) and (overlap or "") in result.output, (words, result.output)

    def test_evaluate_bench_report(self, run: Path, offramp: Call) -> None:
        rest = ("--config", run / "config.toml", "--part", "0.8:1")
        result = offramp("evaluate", *rest, "--keep-all-exits")
        assert result.exit_code == 0 and "full model" in result.output and "random exits, same shares" in result.output
        found = json.loads((run / "evaluation.json").read_text())
        test = Trace.load(run / "test")
        assert found["items"] == test.items == 120 and found["exits_as_replayed"] == 1.0
        assert found["full_accuracy"] == pytest.approx(float((test.predictions[:, -1] == test.labels).double().mean()))
        assert found["mean_cost"] == pytest.approx(float(torch.tensor(found["shares"]).double() @ test.cost) / test.base_cost)

        result = offramp(
            "bench", *rest, "--batch-sizes", "1,4", "--repeats", "3", "--batches", "2", "--mode", "latency", "--mode", "throughput"
        )
        assert result.exit_code == 0
        runs = json.loads((run / "bench.json").read_text())["runs"]
        assert [(r["mode"], r["batch_size"]) for r in runs] == [("latency", 1), ("throughput", 1), ("latency", 4), ("throughput", 4)]
        assert all(len(s) == 3 and min(s) > 0 for r in runs for s in r["samples_ms"].values())
        latency = next(r for r in runs if r["mode"] == "latency")
        kept = [n for n in test.exits[:-1] if n not in latency["dropped"]]
        assert latency["accuracy"] == pytest.approx(found["accuracy"]) or len(kept) < len(test.exits) - 1
        assert all(0 < r["mean_cost"] < 1.1 and len(r["fixed_exit_ms"] or test.exits) == len(test.exits) for r in runs)
        slow = [r["name"] for r in runs if r["median_ms"] > r["full_ms"] and r["shares"][-1] < 1]
        assert all((f"{r['name']}: the plan leaves early and still takes" in result.output) == (r["name"] in slow) for r in runs)
        assert "never leaves early" not in result.output, "the yardstick that runs the whole model is no plan of the user's"

        pytest.importorskip("matplotlib")
        result = offramp("report", "--config", run / "config.toml")  # the part is the one that was evaluated
        page = (run / "report.html").read_text()
        assert result.exit_code == 0 and page.lstrip().lower().startswith("<!doctype html")
        assert "Accuracy against FLOPs" in page and "Accuracy against measured time, batch 1" in page and "fixed exit" in page

    def test_targets_of_calibrate(self, run: Path, offramp: Call) -> None:
        assert offramp("calibrate", "--out", run, "--max-drop", "0.2", "--delta", "0.2").exit_code == 0
        certificate = load_plan(run / "plan").certificate
        assert certificate is not None and certificate.guaranteed and certificate.delta == 0.2
        assert offramp("calibrate", "--out", run, "--p95-ms", "1e6").exit_code == 0
        assert (
            offramp(
                "calibrate", "--out", run, "--mean-cost", "0.8", "--peak-cost", "0.9", "--method", "QuantileCost(per_exit=True)"
            ).exit_code
            == 0
        )
        assert offramp("calibrate", "--out", run, "--system", "eero").exit_code == 0
        assert load_plan(run / "plan").certificate.method == "ExponentialWeights"
        assert offramp("calibrate", "--out", run, "--rule", "margin", "--mean-cost", "0.7").exit_code == 0

    def test_infeasible_is_a_failure_and_not_bad_input(self, run: Path, offramp: Call) -> None:
        result = offramp("calibrate", "--out", run, "--mean-cost", "0.01")
        assert result.exit_code == 1 and "cannot be met" in result.output

    def test_other_weights_are_refused(self, run: Path, toy: Path, tmp_path: Path, offramp: Call) -> None:
        frozen = tmp_path / "frozen"
        from importlib.util import module_from_spec, spec_from_file_location

        spec = spec_from_file_location("net", toy / "net.py")
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        save_file(module.make(3).state_dict(), tmp_path / "w.safetensors")
        source = ("--model", f"python:{toy / 'net.py'}:make", "--data", toy / "points.npz", "--out", frozen, "--num-classes", 3)
        assert (
            offramp("fit", *source, "--weights", tmp_path / "w.safetensors", "--recipe", "frozen", "--exits", 1, "--epochs", 1).exit_code
            == 0
        )
        assert json.loads((frozen / "adapter" / "adapter.json").read_text())["content"]["base_included"] is False
        other = {k: v + 1 for k, v in module.make(3).state_dict().items()}
        save_file(other, tmp_path / "other.safetensors")
        result = offramp("record", *source, "--weights", tmp_path / "other.safetensors")
        assert result.exit_code == 2 and "fingerprint" in result.output
        assert offramp("record", "--config", frozen / "config.toml").exit_code == 0


class TestBadInput:
    @pytest.fixture
    def fit(self, toy: Path, tmp_path: Path, offramp: Call) -> Call:
        def call(*words: object, data: object = toy / "points.npz", model: str = f"python:{toy / 'net.py'}:make") -> object:
            return offramp("fit", "--model", model, "--data", data, "--out", tmp_path / "out", "--epochs", 1, *words)

        return call

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--rule", "Confidance"], "No such option"),
            (["--head", "PooledLinaer"], "Nearest: PooledLinear"),
            (["--recipe", "Joint(wieghts=1)"], "unexpected keyword argument 'wieghts'"),
            (["--recipe", "Equal"], "not a recipe"),
            (["--recipe", "Joint("], "cannot be read"),
            (["--at", "9.linear"], "has no module at '9.linear'"),
            (["--system", "pabe"], "Nearest: pabee"),
            (["--part", "0.5"], "START:STOP"),
            (["--part", "0.9:0.1"], "0 <= START < STOP <= 1"),
            (["--device", "tpu9"], "cannot be used here"),
            (["--num-classes", 2], "row 0|row 1|row 2|row 3|row 4"),
            (["--image-size", "big"], "HEIGHTxWIDTH"),
        ],
    )
    def test_flags(self, fit: Call, words: list[object], message: str) -> None:
        result = fit(*words)
        assert result.exit_code == 2, result.output
        assert any(m in result.output for m in message.split("|")), result.output
        assert "Traceback" not in result.output

    @pytest.mark.parametrize(
        ("model", "message"),
        [
            ("resnet18", "A model is timm:NAME"),
            ("python:nowhere_at_all:make", "no Python module 'nowhere_at_all'"),
            ("python:{toy}/none.py:make", "No file at"),
            ("python:{toy}/net.py:mak", "Nearest: make"),
            ("python:{toy}/net.py:not_a_model", "returned a int"),
            ("python:{toy}/net.py:needs_more", "also needs width, depth"),
        ],
    )
    def test_models(self, fit: Call, toy: Path, model: str, message: str) -> None:
        result = fit(model=model.format(toy=toy))
        assert result.exit_code == 2 and message in result.output, result.output

    def test_data(self, fit: Call, tmp_path: Path) -> None:
        result = fit(data=tmp_path / "none.npz")
        assert result.exit_code == 2 and "No file or folder" in result.output
        (tmp_path / "empty").mkdir()
        assert "holds no images" in fit(data=tmp_path / "empty").output
        x = np.zeros((4, 8), np.float32)
        x[2, 2] = np.nan
        np.savez(tmp_path / "nan.npz", x=x, y=np.zeros(4, int))
        result = fit(data=tmp_path / "nan.npz")
        assert result.exit_code == 2 and "row 2 of 'x' holds NaN" in result.output
        np.savez(tmp_path / "wide.npz", x=np.zeros((4, 9), np.float32), y=np.zeros(4, int))
        result = fit(data=tmp_path / "wide.npz")
        assert result.exit_code == 2 and "Sequential does not take the items of" in result.output and "(2, 9)" in result.output
        np.savez(tmp_path / "keys.npz", a=x)
        assert "it holds: a" in fit(data=tmp_path / "keys.npz").output

    def test_weights(self, fit: Call, tmp_path: Path) -> None:
        assert "No weights at" in fit("--weights", tmp_path / "none.safetensors").output
        (tmp_path / "w.pt").touch()
        assert ".safetensors files only" in fit("--weights", tmp_path / "w.pt").output
        (tmp_path / "w.safetensors").write_bytes(b"hello")
        assert "is not a safetensors file" in fit("--weights", tmp_path / "w.safetensors").output
        save_file({"0.weight": torch.zeros(2, 2)}, tmp_path / "w.safetensors")
        result = fit("--weights", tmp_path / "w.safetensors")
        assert result.exit_code == 2 and "do not fit Sequential" in result.output

    def test_missing_steps(self, toy: Path, tmp_path: Path, offramp: Call) -> None:
        result = offramp("calibrate", "--out", tmp_path, "--mean-cost", 0.5)
        assert result.exit_code == 2 and "offramp record" in result.output
        result = offramp("record", "--model", f"python:{toy / 'net.py'}:make", "--data", toy / "points.npz", "--out", tmp_path)
        assert result.exit_code == 2 and "offramp fit" in result.output

    def test_no_target(self, run: Path, offramp: Call) -> None:
        result = offramp("calibrate", "--out", run)
        assert result.exit_code == 2 and "--mean-cost 0.5" in result.output

    def test_altered_trace(self, run: Path, tmp_path: Path, offramp: Call) -> None:
        import shutil

        shutil.copytree(run / "trace", tmp_path / "trace")
        file = tmp_path / "trace" / "trace.safetensors"
        file.write_bytes(file.read_bytes()[:-7])
        result = offramp("calibrate", "--out", tmp_path, "--mean-cost", 0.7)
        assert result.exit_code == 2 and "truncated or was altered" in result.output


class TestConfig:
    def test_flags_win_over_table_over_top(self, run: Path, tmp_path: Path, offramp: Call) -> None:
        import shutil

        shutil.copytree(run / "trace", tmp_path / "trace")
        config = tmp_path / "c.toml"
        config.write_text(f'out = "{tmp_path}"\nrule = "entropy"\nmean-cost = 0.9\n[calibrate]\nrule = "margin"\nmean_cost = 0.8\n')
        assert offramp("calibrate", "--config", config, "--mean-cost", 0.7).exit_code == 0
        plan = load_plan(tmp_path / "plan")
        assert type(plan.rule).__name__ == "Margin" and plan.certificate.requested["mean_cost"] == 0.7
        assert offramp("calibrate", "--config", config).exit_code == 0
        assert load_plan(tmp_path / "plan").certificate.requested["mean_cost"] == 0.8

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("mean_cots = 0.5", "unknown key 'mean_cots'. Did you mean 'mean_cost'?"),
            ("[calibrate]\nrul = 'margin'", "Did you mean 'rule'?"),
            ("[calibrat]\nrule = 'margin'", "Did you mean 'calibrate'?"),
            ("mean_cost = ", "is not a TOML file"),
            ("[calibrate]\nepochs = 3", "unknown key 'epochs'"),
            ("mean_cost = 'much'", "Invalid value for '--mean-cost'"),
        ],
    )
    def test_mistakes(self, tmp_path: Path, offramp: Call, content: str, message: str) -> None:
        (tmp_path / "c.toml").write_text(content)
        result = offramp("calibrate", "--config", tmp_path / "c.toml", "--out", tmp_path)
        assert result.exit_code == 2 and message in result.output, result.output

    def test_missing_file(self, tmp_path: Path, offramp: Call) -> None:
        result = offramp("calibrate", "--config", tmp_path / "c.toml", "--out", tmp_path)
        assert result.exit_code == 2 and "No configuration file" in result.output

    def test_written_and_read_back(self, tmp_path: Path) -> None:
        from offramp.cli.config import read_toml, write_toml

        values = {"a": 'quote " back \\ tab\t line\n é', "b": [1, 2.5, True], "n": None, "t": {"x": False, "p": Path("a/b")}}
        write_toml(tmp_path / "c.toml", values)
        assert read_toml(tmp_path / "c.toml") == {"a": values["a"], "b": [1, 2.5, True], "t": {"x": False, "p": "a/b"}}


def test_help_of_every_command_has_an_example(offramp: Call) -> None:
    from offramp.cli import app

    names = [c.name for c in app.registered_commands]
    assert {"fit", "record", "calibrate", "evaluate", "bench", "report", "systems", "show", "diff", "cite", "reproduce"} <= set(names)
    for name in names:
        result = offramp(name, "--help")
        assert result.exit_code == 0 and f"Example: offramp {name}" in " ".join(result.output.split()), name


class TestMethods:
    def test_listing(self, offramp: Call) -> None:
        result = offramp("systems")
        assert result.exit_code == 0
        for name in ("branchynet", "msdnet-budget", "pabee", "eero"):
            assert name in result.output
        assert "pabee" not in offramp("systems", "--engine", "generate").output

    def test_show_diff_cite(self, offramp: Call) -> None:
        assert "patience = 6" in offramp("show", "pabee").output
        result = offramp("diff", "eero", "msdnet-budget")
        assert "ExponentialWeights()" in result.output and "GeometricShares()" in result.output and "Confidence" not in result.output
        assert "same parts" in offramp("diff", "eero", "eero").output
        assert offramp("cite", "eero", "pabee").output.count("@") == 2
        assert offramp("diff", "eero", "eeroo").exit_code == 2
