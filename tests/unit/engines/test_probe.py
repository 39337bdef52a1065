"""The probe: rows with sources, written atomically, surviving families that fail or kill the process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from offramp.backbones.families import Family, Inputs
from offramp.core.errors import InvalidInput
from offramp.engines import probe as module
from offramp.engines.probe import markdown, matrix, probe, probe_families, probe_family, probe_model


def chain() -> nn.Module:
    return nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(4)], nn.Linear(8, 3))


def test_users_model() -> None:
    model = chain().train()
    row = probe_model(model, torch.randn(2, 8))
    assert row.supported and row.reason == "" and model.training
    assert row.exits.value == ["0", "1", "2"] and row.exits.source == "measured"
    assert row.bit_exact.value == {"1": True, "3": True, "7": True}
    assert row.live_bytes.value == row.hidden_bytes.value == [32, 32, 32]
    assert row.length_dynamic.value is False and row.length_dynamic.source == "declared by the exporter"
    assert row.batch_dynamic.value is True and row.batch_dynamic.source == "measured"


def test_unknown_is_said_and_not_guessed() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = chain()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x + torch.randn_like(x))

    row = probe_model(Noisy(), {"x": torch.randn(2, 8)})
    assert not row.supported and row.reason.startswith("cutting: mismatch")
    assert row.bit_exact.source == row.live_bytes.source == row.batch_dynamic.source == "unknown"
    assert row.outputs.value == "Tensor of 1 tensor"


def test_names_and_unknown_names() -> None:
    names = probe_families()
    assert len(names) == len(set(names)) >= 40 and {n.split("/")[0] for n in names} == {"timm", "transformers", "diffusers"}
    with pytest.raises(InvalidInput, match="timm/nothing"):
        probe(["timm/nothing"])
    with pytest.raises(InvalidInput, match="timm/nothing"):
        probe_family("timm/nothing")
    with pytest.raises(InvalidInput, match="no tensor"):
        probe_model(chain(), (3,))


def broken() -> nn.Module:
    raise OSError("no such weights")


def test_a_failing_family_costs_its_row_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def inputs(rows: int, length: int | None) -> Inputs:
        return Inputs((torch.randn(rows, 8),))

    families = {"timm/broken": Family("timm/broken", "cnn", broken, inputs), "timm/chain": Family("timm/chain", "mlp", chain, inputs)}
    pytest.importorskip("timm")
    monkeypatch.setattr(module, "_families", lambda: families)
    rows = probe(json_path=tmp_path / "c.json", markdown_path=tmp_path / "c.md", progress=False, isolate=False)
    assert [r.supported for r in rows] == [False, True]
    assert rows[0].reason == "making the model: OSError: no such weights"
    data = json.loads((tmp_path / "c.json").read_text())
    assert data == matrix(rows) and data["supported"] == 1 and data["families"] == 2
    page = (tmp_path / "c.md").read_text()
    assert page == markdown(data) and "1 of 2 families" in page and "no such weights" in page and "32 / 32" in page


def test_a_family_that_dies_or_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        exitcode = -9

        def join(self) -> None: ...

        def kill(self) -> None: ...

    class Silent:
        def __init__(self, dead: bool) -> None:
            self.dead = dead

        def send(self, name: str | None) -> None: ...

        def poll(self, timeout: float) -> bool:
            return self.dead

        def recv(self) -> None:
            raise EOFError

        def close(self) -> None: ...

    for dead, reason in ((True, "exit code -9"), (False, "more than 2 s")):
        workers = module._Workers(2)
        workers._process, workers._connection = Gone(), Silent(dead)
        row = workers.probe("timm/vit")
        assert not row.supported and reason in row.reason and workers._process is None
