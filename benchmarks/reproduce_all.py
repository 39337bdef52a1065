"""Reproductions of all systems of an engine, seed by seed: what they have in common is trained once, results are saved as they come.

The same as `offramp reproduce NAME --variant tiny` for each of them: systems that write text share models and controls of a seed, diffusion
systems the full model, the network that judges, and every control. A seed that a result of the same settings already holds is not run
again, so that a run that was stopped goes on.

    python benchmarks/reproduce_all.py text --data tinyshakespeare.txt.xz
    python benchmarks/reproduce_all.py images
    python benchmarks/reproduce_all.py text --data FOLDER --variant books --device cuda kangaroo eesd
"""

from __future__ import annotations

import argparse
import json
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from offramp import systems
from offramp.cli import reproduce_images, reproduce_text
from offramp.cli.progress import Say
from offramp.cli.reproduce_common import Reproduction, VariantSettings, save
from offramp.measure.clock import environment

HERE = Path(__file__).resolve().parent


@dataclass
class Texts:
    """Systems that write text, within one seed.

    Attributes:
        device: to train and measure on.
        data: path of the text.
        say: told what is being done.
    """

    device: str
    data: str | None
    say: Say
    how: Reproduction = reproduce_text.TEXTS

    def __post_init__(self) -> None:
        self.bases = reproduce_text.Bases(self.say)

    def repeat(self, name: str, settings: Any, seed: int) -> dict[str, Any]:
        if self.data is None:
            raise SystemExit("Give the path of a text with --data.")
        corpus = reproduce_text.load_corpus(settings, self.data)
        trained = reproduce_text.prepare(name, settings, corpus, seed, self.device, self.bases)
        return reproduce_text.measure_seed(name, settings, corpus, seed, trained, self.say)


@dataclass
class Images:
    """Diffusion systems, within one seed: those with the same settings share a bench."""

    device: str
    data: str | None
    say: Say
    how: Reproduction = reproduce_images.DENOISERS
    benches: dict[str, reproduce_images.Bench] = field(default_factory=dict)

    def repeat(self, name: str, settings: Any, seed: int) -> dict[str, Any]:
        key = json.dumps(asdict(replace(settings, system={}, seeds=(seed,))), sort_keys=True)
        if key not in self.benches:
            pictures = reproduce_images.read_pictures(settings, self.data, self.device)
            self.benches[key] = reproduce_images.Bench(settings, pictures, seed, self.device, self.say)
        return reproduce_images.measure_on(self.benches[key], name, settings)


KINDS: Mapping[str, type[Texts] | type[Images]] = {"text": Texts, "images": Images}


def as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def earlier(path: Path, settings: VariantSettings) -> list[dict[str, Any]]:
    """Seeds of a committed result, if its settings are these, the seeds themselves apart."""
    if not path.is_file():
        return []
    found = json.loads(path.read_text())
    wanted = as_json(asdict(replace(settings, seeds=(0,))))
    return found["seeds"] if {**found["settings"], "seeds": [0]} == wanted else []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=tuple(KINDS))
    parser.add_argument("names", nargs="*", help="systems; all of the kind by default")
    parser.add_argument("--data", help="path of the data, where the variant needs one")
    parser.add_argument("--variant", default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seeds", type=int, nargs="+", help="by default those of the configurations")
    parser.add_argument("--configs", type=Path, default=HERE / "configs")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    args = parser.parse_args()

    how = KINDS[args.kind].how
    names = args.names or [n for n in systems.list_systems() if systems.load_card(n).engine == how.engine]
    settings = {n: how.settings.load(args.configs / f"{n}.toml", args.variant) for n in names}
    paths = {n: args.results / f"{n}--{args.variant}--{args.device.partition(':')[0]}.json" for n in names}
    failed = 0
    for seed in args.seeds or max((s.seeds for s in settings.values()), key=len):
        here = KINDS[args.kind](args.device, args.data, lambda text: print(text, flush=True))
        for name in names:
            before = earlier(paths[name], settings[name])
            if seed in {s["seed"] for s in before}:
                continue
            try:
                measured = here.repeat(name, settings[name], seed)
            except Exception:  # one method that fails must not cost the others their run
                traceback.print_exc()
                failed += 1
                continue
            seeds = sorted([*before, as_json(measured)], key=lambda s: s["seed"])
            done = replace(settings[name], seeds=tuple(s["seed"] for s in seeds))
            result = how.conclude(systems.build(name, **done.system), done, args.variant, seeds, environment(args.device))
            print(f"{save(result, args.results)}: {result['verdict']}", flush=True)
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
