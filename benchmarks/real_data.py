"""The four systems on real data: trainings side by side on one GPU, then Pareto tables beside what they must beat.

    python real_data.py train --data FOLDER --work FOLDER [--variants cifar:0,sst2:0,...] [--seconds 270] [--workers 10]
    python real_data.py table --work FOLDER [--variants cifar,cifar-vit,sst2]
    python real_data.py pool --work FOLDER --variants cifar:0 --system eero

``train`` does the trainings of `offramp reproduce` for every system in ``configs/``; those that systems have in common run once: the full
model, the smaller static models, and networks with the same heads, placement and recipe. Each training is a job of its own, taken by the
next free process, so a run that is stopped keeps what is done. ``table`` needs no GPU: it calibrates on the recorded held-out items,
measures on the test items, and writes one result a system and variant as `offramp reproduce` does, ``real_VARIANT.json`` with the Pareto
table, and ``real_data.md``. Only seeds of which every training is done enter. ``pool`` puts the calibration and test items of one network
into ``results/traces/VARIANT-SYSTEM-seedN``, without logits, for `guarantee.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from offramp import systems
from offramp.cli import reproduce as reproducing
from offramp.cli.reproduce_common import across_seeds, save
from offramp.core.bundle import write_json
from offramp.core.parts import part_key
from offramp.core.system import Predicate, System
from offramp.core.trace import Trace
from offramp.measure.clock import environment

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Job:
    """One training.

    Attributes:
        variant: of the configurations.
        seed: repetition.
        change: how a static model differs from the full one; ``None`` for a network with exits.
        system: the first system of those that share a network with exits, or ``""``.
    """

    variant: str
    seed: int
    change: tuple[tuple[str, Any], ...] | None
    system: str = ""

    def folder(self, work: Path) -> Path:
        name = f"exits-{self.system}" if self.change is None else "static" + "".join(f"-{k}{v}" for k, v in self.change)
        return work / self.variant / f"seed{self.seed}" / name

    def done(self, work: Path) -> bool:
        return (self.folder(work) / "job.json").is_file()


@dataclass(frozen=True)
class Study:
    """The systems of one variant, with settings that they must share.

    Attributes:
        settings: of each system.
        systems: built.
        shared: system whose network each system uses.
    """

    settings: Mapping[str, reproducing.Settings]
    systems: Mapping[str, System]
    shared: Mapping[str, str]

    @property
    def any(self) -> reproducing.Settings:
        return next(iter(self.settings.values()))


def study(configs: Path, variant: str) -> Study:
    """Read a variant of the configurations of all classifiers that have it."""
    classifiers = [f for f in sorted(configs.glob("*.toml")) if systems.load_card(f.stem).engine == "classify"]
    files = [f for f in classifiers if variant in reproducing.Settings.variants(f)]
    if not files:
        raise SystemExit(f"No configuration in {configs} has a variant {variant!r}.")
    settings = {f.stem: reproducing.Settings.load(f, variant) for f in files}
    plain = [{k: v for k, v in asdict(s).items() if k != "system"} for s in settings.values()]
    if any(p != plain[0] for p in plain):
        raise SystemExit(
            f"The configurations of variant {variant!r} differ in more than the system's arguments, so they share no training."
        )
    built = {name: systems.build(name, **s.system) for name, s in settings.items()}
    first: dict[str, str] = {}
    shared = {name: first.setdefault(repr((s.head, s.placement, s.recipe)), name) for name, s in built.items()}
    return Study(settings, built, shared)


def jobs(configs: Path, wanted: str) -> list[Job]:
    """The trainings of ``variant,...`` or ``variant:seed,...`` in that order, the long ones of a seed first."""
    out = []
    for part in wanted.split(","):
        variant, _, seed = part.partition(":")
        s = study(configs, variant)
        for each in [int(seed)] if seed else s.any.seeds:
            out += [Job(variant, each, None, name) for name in dict.fromkeys(s.shared.values())]
            out += [Job(variant, each, tuple(change.items())) for change in ({}, *reversed(s.any.smaller))]
    return out


def work_on(job: Job, configs: Path, data: Mapping[str, str], work: Path, device: str, pools: dict[str, reproducing.Pool]) -> None:
    """Do one training and write what came of it; ``job.json`` last."""
    started = time.perf_counter()
    s = study(configs, job.variant)
    if job.variant not in pools:
        pools[job.variant] = reproducing.load_pool(s.any, data["text" if s.any.data == "text" else "images"]).to(device)
    pool, folder = pools[job.variant], job.folder(work)
    ready = time.perf_counter()
    if job.change is None:
        rules = [s.systems[name].rule for name, of in s.shared.items() if of == job.system]
        recorded = reproducing.train_exits(s.any, pool, s.systems[job.system], job.seed, device, rules=rules)
        recorded.calibration.save(folder / "calibration")
        recorded.test.save(folder / "test")
        found: dict[str, Any] = {"head_flops": list(recorded.head_flops), "items": recorded.items}
    else:
        static, _ = reproducing.train_static(s.any, pool, dict(job.change), job.seed, device)
        found = asdict(static)
    found |= {"reading_s": ready - started, "training_s": time.perf_counter() - ready}
    write_json(folder / "job.json", found)


def worker(args: argparse.Namespace, todo: Sequence[Job]) -> None:
    """Take jobs that nobody has taken until none is left."""
    torch.set_num_threads(1)
    torch.backends.cudnn.benchmark = True
    pools: dict[str, reproducing.Pool] = {}
    begun = time.perf_counter()
    for job in todo:
        folder = job.folder(args.work)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            os.close(os.open(folder / "taken", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        if not (args.work / job.variant / "environment.json").is_file():
            write_json(args.work / job.variant / "environment.json", environment(args.device))
        try:
            work_on(job, args.configs, {"images": str(args.images), "text": str(args.texts)}, args.work, args.device, pools)
            print(f"{time.perf_counter() - begun:6.1f} s  {folder.relative_to(args.work)}", flush=True)
        except Exception:
            traceback.print_exc()


def train(args: argparse.Namespace) -> int:
    """Run the jobs in several processes, and stop them when the time is up."""
    todo = jobs(args.configs, args.variants)
    command = [sys.executable, __file__, "worker", *sys.argv[2:]]
    end = time.monotonic() + args.seconds
    workers = [subprocess.Popen(command) for _ in range(args.workers)]
    while any(w.poll() is None for w in workers) and time.monotonic() < end:
        time.sleep(0.5)
    for w in workers:
        w.kill()
        w.wait()
    done = sum(job.done(args.work) for job in todo)
    print(f"{done} of {len(todo)} trainings done", flush=True)
    return 0 if done == len(todo) else 3


# ------------------------------------------------------------------------------------------------------------ the tables


def collect(s: Study, variant: str, work: Path) -> tuple[list[int], dict[str, list[dict[str, Any]]]]:
    """Complete seeds, and what each system measured in each."""
    seeds: list[int] = []
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in s.systems}
    networks = list(dict.fromkeys(s.shared.values()))
    for seed in s.any.seeds:
        nets = [Job(variant, seed, None, name) for name in networks]
        plain = [Job(variant, seed, tuple(change.items())) for change in ({}, *s.any.smaller)]
        if not all(job.done(work) for job in (*nets, *plain)):
            continue
        seeds.append(seed)
        read = [json.loads((job.folder(work) / "job.json").read_text()) for job in plain]
        statics = [reproducing.Static(r["name"], r["flops"], r["accuracy"]) for r in read]
        recorded = {}
        for job in nets:
            about = json.loads((job.folder(work) / "job.json").read_text())
            held, test = (Trace.load(job.folder(work) / part) for part in ("calibration", "test"))
            recorded[job.system] = reproducing.Recorded(held, test, tuple(about["head_flops"]), about["items"])
        for name, system in s.systems.items():
            measured[name].append(reproducing.measure_seed(system, s.any.budgets, seed, statics, recorded[s.shared[name]]))
    return seeds, measured


def mean_interval(values: Sequence[float]) -> list[float]:
    e = across_seeds(values)
    return [e.value, e.low, e.high]


def pareto(
    variant: str, s: Study, measured: Mapping[str, list[dict[str, Any]]], results: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The Pareto table of one variant as JSON data; means over seeds with 95 % t intervals, raw numbers in the systems' own files."""
    first = next(iter(measured.values()))
    static = [
        {
            "name": point["name"],
            "cost": statistics.fmean(seed["static"][i]["cost"] for seed in first),
            "accuracy": mean_interval([seed["static"][i]["accuracy"] for seed in first]),
            "accuracy_of_seeds": [seed["static"][i]["accuracy"] for seed in first],
        }
        for i, point in enumerate(first[0]["static"])
    ]
    exits = {
        name: [
            {
                "exit": exit_name,
                "cost": statistics.fmean(seed["exit_cost_alone"][k] for seed in measured[name]),
                "accuracy": mean_interval([seed["exit_accuracy"][k] for seed in measured[name]]),
                "accuracy_of_seeds": [seed["exit_accuracy"][k] for seed in measured[name]],
            }
            for k, exit_name in enumerate(measured[name][0]["exits"])
        ]
        for name in dict.fromkeys(s.shared.values())
    }
    rows = []
    for name, result in results.items():
        for i, row in enumerate(result["summary"]["budgets"]):
            per_seed = [seed["budgets"][i] for seed in measured[name] if not seed["budgets"][i].get("infeasible")]
            each = ("cost", "accuracy", "fixed", "random", "static")
            extra: dict[str, Any] = {"of_seeds": {key: [r[key] for r in per_seed if r[key] is not None] for key in each}}
            extra |= {"item_se": [[r["cost_se"], r["accuracy_se"]] for r in per_seed]}
            gains = {
                key: mean_interval(values)
                for key in ("gain_over_fixed", "gain_over_random", "gain_over_static", "drop")
                if (values := [r[key] for r in per_seed if r[key] is not None])
            }
            rows.append({"system": name, **row, **gains, **extra})
    return {
        "schema": "offramp.real/1",
        "variant": variant,
        "seeds": [seed["seed"] for seed in first],
        "items": first[0]["items"],
        "full": {"accuracy": results[next(iter(results))]["summary"]["full_accuracy"], "flops": first[0]["full"]["flops"]},
        "static": static,
        "fixed_exit": exits,
        "shared_networks": dict(s.shared),
        "rows": rows,
        "claims": {n: {k: r[k] for k in ("claim", "predicate", "measured", "verdict")} for n, r in results.items()},
        "settings": {k: v for k, v in next(iter(results.values()))["settings"].items() if k != "system"},
        "environment": next(iter(results.values()))["environment"],
        "tabulated_on": environment("cpu"),
    }


def percent(value: Sequence[float] | None, seeds: Sequence[float]) -> str:
    """Mean over seeds in percent, with the t interval; of two seeds, whose interval would say nothing, the two values."""
    if value is None:
        return "-"
    if len(seeds) == 2:
        return f"{100 * value[0]:.2f} ({100 * seeds[0]:.2f}, {100 * seeds[1]:.2f})"
    half = value[0] - value[1]
    return f"{100 * value[0]:.2f}" + (f" ± {100 * half:.2f}" if half > 0 else "")


def markdown(table: Mapping[str, Any]) -> str:
    """One variant's tables for people."""
    seeds, items = len(table["seeds"]), table["items"]
    spread = {1: "one seed", 2: "mean (each of two seeds)"}.get(seeds, f"mean ± half of the 95 % t interval over {seeds} seeds")
    lines = [
        f"## {table['variant']}",
        "",
        f"{items['train']} training, {items['calibration']} calibration and {items['test']} test items, trained on "
        f"{table['environment']['device_name']}. Accuracy in %: {spread}; one seed's accuracy alone has a standard error of about "
        f"{100 * statistics.median(se for row in table['rows'] for _, se in row.get('item_se', [])):.1f}, for the number of test items. "
        "Cost: mean FLOPs over those of the full model, heads on the way included.",
        "",
        "| budget | system | cost | accuracy | fixed exit (or mix) at this cost | random exit | smaller model (or mix) at this cost |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(table["rows"], key=lambda r: r["budget"]):
        cost = f"{row['cost'][0]:.3f}" if "cost" in row else "infeasible"
        cells = [percent(row.get(key), row["of_seeds"].get(key, ())) for key in ("accuracy", "fixed", "random", "static")]
        lines.append(f"| {row['budget']:g} | {row['system']} | {cost} | " + " | ".join(cells) + " |")
    lines += ["", "| trained alone | cost | accuracy |", "|---|---|---|"]
    lines += [
        f"| {p['name']} | {p['cost']:.3f} | {percent(p['accuracy'], p['accuracy_of_seeds'])} |"
        for p in sorted(table["static"], key=lambda p: p["cost"])
    ]
    for name, points in table["fixed_exit"].items():
        users = ", ".join(user for user, of in table["shared_networks"].items() if of == name)
        lines += ["", f"| fixed exit of the network of {users} | cost | accuracy |", "|---|---|---|"]
        lines += [f"| {p['exit']} | {p['cost']:.3f} | {percent(p['accuracy'], p['accuracy_of_seeds'])} |" for p in points]
    lines += ["", "| system | claim | as a test | measured | verdict |", "|---|---|---|---|---|"]
    for name, c in table["claims"].items():
        m = c["measured"]
        got = "-" if m is None else f"{m['value']:.4f} [{m['low']:.4f}, {m['high']:.4f}]"
        lines.append(f"| {name} | {c['claim']} | {Predicate(**c['predicate'])} | {got} | {c['verdict']} |")
    return "\n".join([*lines, ""])


def tables(args: argparse.Namespace) -> int:
    """Write the results of every variant that has a complete seed."""
    parts = []
    for variant in dict.fromkeys(part.partition(":")[0] for part in args.variants.split(",")):
        s = study(args.configs, variant)
        seeds, measured = collect(s, variant, args.work)
        if not seeds:
            print(f"{variant}: no seed is complete", file=sys.stderr)
            continue
        machine = json.loads((args.work / variant / "environment.json").read_text())
        results = {}
        for name, system in s.systems.items():
            done = replace(s.settings[name], seeds=tuple(seeds))
            results[name] = reproducing.CLASSIFIERS.conclude(system, done, variant, measured[name], machine)
            print(save(results[name], args.results))
        table = pareto(variant, s, measured, results)
        write_json(args.results / f"real_{variant}.json", table)
        parts.append(markdown(table))
    if not parts:
        return 1
    text = "# Four systems on real data\n\nWritten by `benchmarks/real_data.py table`; the numbers are in `real_*.json`.\n\n" + "\n".join(
        parts
    )
    (args.results / "real_data.md").write_text(text)
    print(text)
    return 0


def pool(args: argparse.Namespace) -> int:
    """Calibration and test items of one network as one trace without logits."""
    variant, _, seed = args.variants.partition(":")
    s = study(args.configs, variant)
    if args.system not in s.systems:
        raise SystemExit(f"--system must be one of {', '.join(s.systems)}, got {args.system!r}.")
    folder = Job(variant, int(seed or 0), None, s.shared[args.system]).folder(args.work)
    held, test = (Trace.load(folder / part) for part in ("calibration", "test"))
    key = part_key(s.systems[args.system].rule)

    def both(name: str) -> torch.Tensor:
        return torch.cat([getattr(held, name), getattr(test, name)])

    pooled = replace(
        held,
        predictions=both("predictions"),
        losses=both("losses"),
        labels=both("labels"),
        logits=None,
        recorded={key: torch.cat([held.recorded[key], test.recorded[key]])},
        provenance={**held.provenance, "data": f"{variant}, seed {seed or 0}: {held.items} held-out and {test.items} test items"},
    )
    out = args.results / "traces" / f"{variant}-{args.system}-seed{seed or 0}"
    pooled.save(out)
    print(out)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("train", "worker", "table", "pool"))
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with cifar10_20k4k_jpeg.npz and the SST-2 tables")
    parser.add_argument("--work", type=Path, required=True, help="folder of the trainings")
    parser.add_argument("--variants", default="cifar,cifar-vit,sst2")
    parser.add_argument("--configs", type=Path, default=HERE / "configs")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--device", default="cuda" if os.path.exists("/dev/nvidiactl") else "cpu")
    parser.add_argument("--system", default="eero", help="whose network to pool")
    parser.add_argument("--workers", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=3600.0, help="stop after this long")
    args = parser.parse_args()
    args.images, args.texts = args.data / "cifar10_20k4k_jpeg.npz", args.data
    if args.verb == "table":
        return tables(args)
    if args.verb == "pool":
        return pool(args)
    if args.verb == "train":
        return train(args)
    worker(args, jobs(args.configs, args.variants))
    return 0


if __name__ == "__main__":
    sys.exit(main())
