"""Saved files: whole or refused. Nothing is unpickled, a crash leaves what was there, and every error says what is wrong."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from offramp.core import bundle
from offramp.core.bundle import fingerprint, load_bundle, read_json, save_bundle, write_atomic, write_json
from offramp.core.errors import ArtifactError

SOURCE = Path(bundle.__file__).resolve().parents[1]
CONTENT = {"a": [1, 2.5, None], "b": {"text": "é", "flag": True}, "tiny": 1e-300, "third": 1 / 3}


def tensors():
    return {"x": torch.arange(12.0).reshape(3, 4).T, "y": torch.tensor([True, False]), "z": torch.randn(5).bfloat16()}


@pytest.fixture
def saved(tmp_path) -> Path:
    save_bundle(tmp_path, "thing", "kind", CONTENT, tensors())
    return tmp_path


def test_round_trip(tmp_path):
    given = tensors()
    save_bundle(tmp_path / "deep" / "er", "thing", "kind", CONTENT, given)
    content, found = load_bundle(tmp_path / "deep" / "er", "thing", "kind")
    assert content == CONTENT
    assert all(torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in given.items()) and set(found) == set(given)
    save_bundle(tmp_path, "plain", "kind", {"keys": {1: "one", 10: "ten", 2: "two"}, "pair": (1, 2)})
    assert load_bundle(tmp_path, "plain", "kind") == ({"keys": {"1": "one", "10": "ten", "2": "two"}, "pair": [1, 2]}, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "plain.json"]


def test_views_of_one_memory_are_saved_each(tmp_path):
    base = torch.arange(6.0)
    save_bundle(tmp_path, "thing", "kind", {}, {"a": base, "b": base[2:4], "c": base})
    found = load_bundle(tmp_path, "thing", "kind")[1]
    assert found["b"].tolist() == [2.0, 3.0] and torch.equal(found["a"], found["c"])


@pytest.mark.parametrize("part", ["thing.json", "thing.safetensors"])
@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.9, 0.99])
def test_truncated(saved, part, keep):
    path = saved / part
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(ArtifactError, match=re.escape(part)):
        load_bundle(saved, "thing", "kind")


@pytest.mark.parametrize("part", ["thing.json", "thing.safetensors"])
def test_altered_byte(saved, part):
    """A changed byte anywhere is noticed, or changes nothing (white space)."""
    path = saved / part
    data = path.read_bytes()
    noticed = 0
    for position in range(0, len(data), max(1, len(data) // 150)):
        for change in (1, 32):
            altered = bytearray(data)
            altered[position] ^= change
            path.write_bytes(altered)
            try:
                content, found = load_bundle(saved, "thing", "kind")
            except ArtifactError:
                noticed += 1
            else:
                path.write_bytes(data)
                expected = load_bundle(saved, "thing", "kind")
                assert content == expected[0] and all(torch.equal(found[k], v) for k, v in expected[1].items())
    assert noticed > 150


def test_altered_number_in_json(saved):
    path = saved / "thing.json"
    path.write_text(path.read_text(encoding="utf-8").replace("2.5", "2.6"), encoding="utf-8")
    with pytest.raises(ArtifactError, match="altered"):
        load_bundle(saved, "thing", "kind")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[1, 2]", "not written by offramp"),
        ("3", "not written by offramp"),
        ("null", "not written by offramp"),
        ('{"model": "other", "version": 1}', "not written by offramp"),
        ('{"format": "other", "version": 1, "kind": "kind", "content": {}}', "not written by offramp"),
        ('{"format": "offramp", "version": 1, "kind": "kind"}', "not written by offramp"),
        ('{"format": "offramp", "version": 1, "kind": "plan", "content": {}}', "'kind' was expected"),
        ('{"format": "offramp", "version": 99, "kind": "kind", "content": {}}', "Upgrade offramp"),
        ('{"format": "offramp", "version": "x", "kind": "kind", "content": {}}', "version"),
        ('{"format": "offramp", "version": 1, "kind": "kind", "content": []}', "not an object"),
        ('{"format": "offramp", "version": 1, "kind": "kind", "content": {}, "sha256": "0"}', "altered"),
        ('{"format": "offramp", "version": 1, "kind": "kind", "content": {"a": NaN}, "sha256": "0"}', "altered"),
        ('{"format": "offramp", "version": 1, "kind": "kind", "content": {}, "tensors": null}', "not an object"),
    ],
)
def test_foreign_json(tmp_path, text, message):
    (tmp_path / "thing.json").write_text(text, encoding="utf-8")
    with pytest.raises(ArtifactError, match=message):
        load_bundle(tmp_path, "thing", "kind")


def test_binary_in_place_of_json(tmp_path):
    (tmp_path / "thing.json").write_bytes(b"\x80\x04\x95\xff\xfe")
    with pytest.raises(ArtifactError, match="not JSON"):
        load_bundle(tmp_path, "thing", "kind")


@pytest.mark.parametrize("part", ["thing.json", "thing.safetensors"])
def test_missing_file(saved, part):
    (saved / part).unlink()
    with pytest.raises(ArtifactError, match=re.escape(part)):
        load_bundle(saved, "thing", "kind")
    with pytest.raises(ArtifactError, match="No file"):
        load_bundle(saved / "nowhere", "thing", "kind")


def test_arrays_of_another_bundle(saved, tmp_path):
    save_bundle(tmp_path / "other", "thing", "kind", CONTENT, {"x": torch.zeros(3)})
    (saved / "thing.safetensors").write_bytes((tmp_path / "other" / "thing.safetensors").read_bytes())
    with pytest.raises(ArtifactError, match="altered"):
        load_bundle(saved, "thing", "kind")


def test_a_path_in_the_file_does_not_lead_out_of_the_folder(tmp_path):
    """An arrays file is looked for beside the JSON, whatever the JSON says."""
    inside = tmp_path / "inside"
    save_bundle(inside, "thing", "kind", {}, {"x": torch.zeros(3)})
    os.replace(inside / "thing.safetensors", tmp_path / "thing.safetensors")
    record = json.loads((inside / "thing.json").read_text())
    record["tensors"]["file"] = "../thing.safetensors"
    (inside / "thing.json").write_text(json.dumps(record))
    with pytest.raises(ArtifactError):
        load_bundle(inside, "thing", "kind")


# -------------------------------------------------------------------------------------------------------------------------- atomic


def test_a_crash_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, {"old": 1})

    def crash(temporary: Path) -> None:
        temporary.write_text("half of the n")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, crash)
    assert read_json(path) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"], "no temporary file is left"


@pytest.mark.parametrize("where", ["arrays", "json", "replace"])
def test_a_crash_in_the_middle_of_a_bundle_leaves_the_old_one(saved, monkeypatch, where):
    def crash(*_, **__):
        raise RuntimeError("crash")

    if where == "arrays":
        monkeypatch.setattr(bundle, "save_file", crash)
        content = {"new": 1}
    elif where == "json":
        content = {"new": float("nan")}
    else:
        monkeypatch.setattr(os, "replace", crash)
        content = {"new": 1}
    with pytest.raises((RuntimeError, ValueError)):
        save_bundle(saved, "thing", "kind", content, {"x": torch.zeros(1)})
    monkeypatch.undo()
    found, arrays = load_bundle(saved, "thing", "kind")
    assert found == CONTENT and set(arrays) == {"x", "y", "z"}
    assert sorted(p.name for p in saved.iterdir()) == ["thing.json", "thing.safetensors"]


def test_killed_in_the_middle_of_writing(saved):
    """A process that dies without cleaning up leaves a temporary file behind and the old bundle whole."""
    pid = os.fork()
    if not pid:  # the child

        def die(temporary: Path) -> None:
            temporary.write_bytes(b"half")
            os._exit(9)

        write_atomic(saved / "thing.safetensors", die)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert load_bundle(saved, "thing", "kind")[0] == CONTENT


def test_files_have_the_usual_permissions(saved):
    umask = os.umask(0)
    os.umask(umask)
    assert {oct((saved / n).stat().st_mode & 0o777) for n in ("thing.json", "thing.safetensors")} == {oct(0o666 & ~umask)}


def test_infinity_is_not_json(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"a": float("inf")})
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_unpickled():
    for path in SOURCE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        found = re.findall(r"\b(?:pickle|cPickle|dill|joblib|shelve|marshal)\b|torch\.(?:load|save)\(|allow_pickle\s*=\s*True", text)
        code = [f for f in found if not re.fullmatch(r"pickle", f) or re.search(r"^\s*(import|from)\s+pickle", text, re.M)]
        assert not code, f"{path.name}: {code}"
        for call in re.findall(r"\bnp\.load\([^)]*\)", text):
            assert "allow_pickle=False" in call, f"{path.name}: {call}"


# ---------------------------------------------------------------------------------------------------------------------- fingerprint


def test_fingerprint():
    def make(seed: int = 0, width: int = 3) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width))

    model = make()
    before = fingerprint(model)
    assert re.fullmatch("[0-9a-f]{64}", before) and fingerprint(make()) == before
    model.eval().requires_grad_(False)
    assert fingerprint(model) == before, "modes do not matter"
    others = (make(1), make(0, 4), make().double(), nn.ModuleList(make()))
    assert len({before, *(fingerprint(other) for other in others)}) == 5
    with torch.no_grad():
        model[0].weight[0, 0] += 1e-6
    assert fingerprint(model) != before
    model = make()
    model[1].running_mean += 1
    assert fingerprint(model) != before, "buffers count"


def test_fingerprint_of_every_kind_of_tensor():
    """Scalars, no elements, bfloat16, booleans, views that are not contiguous."""
    model = nn.Module()
    kinds = {"a": torch.tensor(3), "b": torch.zeros(0), "c": torch.ones(2).bfloat16(), "d": torch.tensor([True]), "e": torch.randn(3, 2).T}
    for name, tensor in kinds.items():
        model.register_buffer(name, tensor)
    before = fingerprint(model)
    model.e = model.e.contiguous()
    assert fingerprint(model) == before, "strides do not matter"
