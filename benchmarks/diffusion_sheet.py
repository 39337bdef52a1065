"""The diffusion benchmark's result on disk: which call measured what, what other calls wrote taken in, and files beside it.

Calls may measure side by side, each with a result of its own (``--out``), and one of them takes the others' results in (``--take``).
A row belongs to the setting that was measured, by a digest of it: a row of a plan that is no longer there does not stay.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusion_ways import Way
from lm_common import Budget, Sheet

from offramp.core.bundle import write_atomic

SETTINGS = ("benchmark", "dtype", "steps", "samples", "guidance", "costs", "half", "calibration")
"""What results must have in common to be one."""


def digest(data: Any) -> str:
    """Of JSON data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:12]


def models_in(folder: str | Path) -> dict[str, str]:
    """Families of what `train_diffusion.py` wrote, each with a digest of the trainings that it is made of."""
    stages: dict[str, dict[str, Any]] = json.loads((Path(folder) / "training.json").read_text())["stages"]
    bases = ("flow", "noise", "unet")
    plain = {n: {k: v for k, v in about.items() if k != "check"} for n, about in stages.items()}  # checks are added later
    variants = {n: about for n, about in plain.items() if n not in bases}
    return {b: digest([plain[b], variants if "losses" in plain[b] else {}]) for b in bases if b in plain}


def differences(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Settings that differ, in words."""
    plain = json.loads(json.dumps({k: mine.get(k) for k in SETTINGS}))
    return [f"{k} is {theirs.get(k)!r} there and {plain[k]!r} here" for k in SETTINGS if plain[k] != theirs.get(k)]


def _same(mine: Mapping[str, Any], theirs: Mapping[str, Any], what: str, where: str) -> None:
    if wrong := sorted(k for k in set(mine) & set(theirs) if mine[k] != theirs[k]):
        raise SystemExit(f"{where} is of other {what} ({', '.join(wrong)}): measure with the same ones, or give another --out.")


def row_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What there is one row of."""
    return tuple(row.get(k) for k in ("group", "system", "way", "rows"))


def keys_of(ways: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Digests of settings by title."""
    made = [Way.from_dict(w) for w in ways]
    return {w.title: w.key for w in made}


def without_stale(content: dict[str, Any]) -> int:
    """Drop rows of settings that are not (or no longer) planned; how many there were."""
    known = {name: keys_of(ways) for name, ways in content.get("plans", {}).items()}
    kept = [r for r in content["rows"] if r["group"] == "text" or known.get(r["system"], {}).get(r["way"]) == r.get("key")]
    gone = len(content["rows"]) - len(kept)
    content["rows"] = kept
    return gone


def take(content: dict[str, Any], other: Mapping[str, Any], where: str) -> dict[str, int]:
    """Take in what another call measured; nothing is changed if it does not belong to this result.

    Args:
        content: of this result.
        other: of another one.
        where: it was read from, for messages.

    Returns:
        How many families of plans and rows are new, and how many rows were there already (this result's own stay).

    Raises:
        SystemExit: the settings, models or features differ, or two calls chose different plans for one family.
    """
    if wrong := differences(content, other):
        raise SystemExit(f"{where} was measured with other settings: {'; '.join(wrong)}. Give the same options to all calls.")
    _same(content.get("models", {}), other.get("models", {}), "models", where)
    networks = [c.get("features", {}).get("networks", {}) for c in (content, other)]
    _same(networks[0], networks[1], "feature networks", where)
    plans, theirs = content.get("plans", {}), other.get("plans", {})
    whole, their_whole = content.get("compositions", {}), other.get("compositions", {})
    new = [n for n in theirs if n not in plans or (n in their_whole and n not in whole)]
    for name in theirs:
        if name not in new and keys_of(plans[name]) != keys_of(theirs[name]) and (name in whole) == (name in their_whole):
            raise SystemExit(f"{where} has other plans for {name}: let one call choose them (--parts plans), and all others --take them.")
    calls = content.setdefault("calls", [])
    place = {}
    for index, call in enumerate(other.get("calls", [])):
        if call not in calls:
            calls.append(call)
        place[index] = calls.index(call)
    for name in new:
        for what in ("plans", "compositions"):
            if name in other.get(what, {}):
                content.setdefault(what, {})[name] = other[what][name]
        content.setdefault("planned_in", {})[name] = place[other["planned_in"][name]]
    for what in ("models", "features"):
        if what in other:
            content[what] = {**other[what], **content.get(what, {})}
    content["seeds"] = max(content.get("seeds", 0), other.get("seeds", 0))
    content["batches"] = sorted({*content.get("batches", []), *other.get("batches", [])})
    there = {row_of(r) for r in content["rows"]}
    rows = [{**r, "call": place[r["call"]]} for r in other["rows"] if row_of(r) not in there]
    content["rows"] = [*content["rows"], *rows]
    content["errors"] = {**other.get("errors", {}), **content.get("errors", {})}
    return {"plans": len(new), "rows": len(rows), "already there": len(other["rows"]) - len(rows)}


def settled(content: dict[str, Any]) -> None:
    """Forget errors of what was measured after all, in another call."""
    errors = content.get("errors", {})
    for r in content["rows"]:
        place = f"{r['system']}: {r['way']}, seed {r['rows']}" if r["group"] == "quality" else f"{r['system']} {r['rows']}: {r['way']}"
        errors.pop(f"{r['group']} {place}", None)


def missing(content: Mapping[str, Any]) -> dict[str, list[str]]:
    """What is to be measured of each family and is not there, in words."""
    out = {}
    for name in dict.fromkeys([*content.get("models", {}), *content.get("plans", {})]):
        there = {(r["group"], r["way"], r["rows"]) for r in content["rows"] if r.get("system") == name}
        ways = content.get("plans", {}).get(name, [])
        titles = [f"{w['name']}, {w['setting']}" if w["setting"] else str(w["name"]) for w in ways]
        said = [] if titles else ["Nothing is planned."]
        if titles and (state := content.get("compositions", {}).get(name, "none was tried")) != "all were tried":
            said.append(f"Compositions: {state}.")
        for what, group, places in (("seed", "quality", range(content.get("seeds", 0))), ("batch", "time", content.get("batches", []))):
            wanted = [t for t in titles if group == "quality" or t != "full model"]
            for place in places:
                if gone := [t for t in wanted if (group, t, place) not in there]:
                    which = "nothing" if len(gone) == len(wanted) else f"all but {len(gone)} of {len(wanted)} ({'; '.join(gone)})"
                    said.append(f"Measured of {group}, {what} {place}: {which}.")
        out[name] = said
    return out


class Result(Sheet):
    """A sheet whose rows and plans say which call measured them.

    Args:
        path: of the JSON file; what an earlier call with the same settings wrote there is gone on with.
        content: what there is before anything was measured.
        budget: of this call.
        call: what a reader needs of this call: its environment, and how many others measured beside it.

    Raises:
        SystemExit: the file is of other settings or models; it is not written over.
    """

    def __init__(self, path: str | Path, content: dict[str, Any], budget: Budget, call: Mapping[str, Any]) -> None:
        self.call = dict(call)
        before = json.loads(Path(path).read_text()) if Path(path).is_file() else {}
        if before.get("rows") or before.get("plans"):
            if wrong := differences(content, before):
                raise SystemExit(f"{path} was measured with other settings: {'; '.join(wrong)}. Give another --out, or remove it.")
            _same(content.get("models", {}), before.get("models", {}), "models", str(path))
            content = {**content, "models": {**before.get("models", {}), **content.get("models", {})}}
        super().__init__(path, content, budget, SETTINGS)

    def write(self) -> None:
        """Times and gaps are those of this call; the environment is the one that most rows were measured in."""
        self.call |= {"seconds": {k: round(v, 1) for k, v in self.budget.taken.items()}, "left_out": list(self.budget.skipped)}
        calls = self.content.get("calls", [])
        counts = Counter(r["call"] for r in self.content["rows"]) or Counter(self.content.get("planned_in", {}).values())
        self.content["environment"] = calls[counts.most_common(1)[0][0]]["environment"] if counts else self.call["environment"]
        self.content["missing"] = missing(self.content)
        self.content.pop("earlier_environments", None)
        super().write()

    def measured(self) -> int:
        """This call's place in the result, which it gets with the first thing that it measures."""
        calls = self.content.setdefault("calls", [])
        for index, call in enumerate(calls):
            if call is self.call:
                return index
        calls.append(self.call)
        return len(calls) - 1

    def row(self, **found: Any) -> None:
        super().row(**found, call=self.measured())


class Files:
    """Tensors beside a result, in one folder that is written to and others that are read.

    Several processes may share the folders: a file's name is of the family, the setting and its digest with the settings of the result
    and the models, and files appear whole.

    Args:
        folders: the first is written to.
        content: of the result.
    """

    def __init__(self, folders: Sequence[Path], content: Mapping[str, Any]) -> None:
        self.folders, self.content = [Path(f) for f in folders], content
        self.folders[0].mkdir(parents=True, exist_ok=True)

    def name(self, family: str, way: Way, what: str, seed: int, slug: Callable[[str], str]) -> str:
        """Of one kind of file of a setting and seed."""
        of = [self.content.get(k) for k in SETTINGS if k not in ("costs", "half", "calibration")]
        return f"{family}-{slug(way.title)}-{digest([of, self.content.get('models', {}).get(family), way.key])}-{seed}.{what}.pt"

    def save(self, name: str, data: Any) -> None:
        """Write a file, whole or not at all."""
        write_atomic(self.folders[0] / name, lambda temporary: torch.save(data, temporary))

    def load(self, name: str, device: torch.device | str = "cpu") -> Any:
        """What was saved under a name in the first folder that has it; ``None`` if none has."""
        for folder in self.folders:
            if (folder / name).is_file():
                return torch.load(folder / name, map_location=device, weights_only=True)
        return None
