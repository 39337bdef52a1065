"""Reproductions of all systems that write text, seed by seed: what they have in common is trained once, results are saved as they come.

The same as `offramp reproduce NAME --variant tiny` for each of them. A seed that a result of the same settings already holds is not run
again, so that a run that was stopped goes on.

    python benchmarks/text_systems.py --data tinyshakespeare.txt.xz
    python benchmarks/text_systems.py --data FOLDER --variant books --device cuda kangaroo eesd
"""

from __future__ import annotations

import argparse
import json
import traceback
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from offramp import systems
from offramp.cli import reproduce_text as reproducing
from offramp.cli.reproduce_common import save
from offramp.measure.clock import environment

HERE = Path(__file__).resolve().parent


def as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def earlier(path: Path, settings: reproducing.TextSettings) -> list[dict[str, Any]]:
    """Seeds of a committed result, if its settings are these, the seeds themselves apart."""
    if not path.is_file():
        return []
    found = json.loads(path.read_text())
    wanted = as_json(asdict(replace(settings, seeds=(0,))))
    return found["seeds"] if {**found["settings"], "seeds": [0]} == wanted else []


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", help="systems; all that write text by default")
    parser.add_argument("--data", required=True)
    parser.add_argument("--variant", default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seeds", type=int, nargs="+", help="by default those of the configurations")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    args = parser.parse_args()
    names = args.names or [n for n in systems.list_systems() if systems.load_card(n).engine == "generate"]
    settings = {n: reproducing.TextSettings.load(HERE / "configs" / f"{n}.toml", args.variant) for n in names}
    paths = {n: args.results / f"{n}--{args.variant}--{args.device.partition(':')[0]}.json" for n in names}
    failed = 0
    for seed in args.seeds or max((s.seeds for s in settings.values()), key=len):
        bases = reproducing.Bases(lambda text: print(text, flush=True))
        for name in names:
            before = earlier(paths[name], settings[name])
            if seed in {s["seed"] for s in before}:
                continue
            corpus = reproducing.load_corpus(settings[name], args.data)
            try:
                trained = reproducing.prepare(name, settings[name], corpus, seed, args.device, bases)
                measured = reproducing.measure_seed(name, settings[name], corpus, seed, trained, bases.say)
            except Exception:  # one method that fails must not cost the others their run
                traceback.print_exc()
                failed += 1
                continue
            seeds = sorted([*before, as_json(measured)], key=lambda s: s["seed"])
            done = replace(settings[name], seeds=tuple(s["seed"] for s in seeds))
            system = systems.build(name, **done.system)
            result = reproducing.TEXTS.conclude(system, done, args.variant, seeds, environment(args.device))
            print(f"{save(result, args.results)}: {result['verdict']}", flush=True)
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
