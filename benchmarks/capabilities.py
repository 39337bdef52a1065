"""Runs the cut over every known model family and writes `results/capabilities.json` and `docs/capabilities.md`.

    PYTHONPATH=src python benchmarks/capabilities.py [family ...]

With names, only those rows are measured again and the others are kept.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from pathlib import Path

import torchvision_operators

ROOT = Path(__file__).resolve().parents[1]
JSON, PAGE = ROOT / "benchmarks" / "results" / "capabilities.json", ROOT / "docs" / "capabilities.md"

torchvision_operators.provide()
warnings.filterwarnings("ignore")
logging.disable(logging.ERROR)


def main(names: list[str]) -> None:
    from offramp.core.bundle import write_json, write_text
    from offramp.engines.probe import markdown, matrix, probe, probe_families

    rows = probe(names or None)
    data = matrix(rows)
    if names:
        kept = {r["family"]: r for r in json.loads(JSON.read_text(encoding="utf-8"))["rows"]} if JSON.is_file() else {}
        kept |= {r["family"]: r for r in data["rows"]}
        data["rows"] = [kept[n] for n in probe_families() if n in kept]
        data["supported"], data["families"] = sum(r["supported"] for r in data["rows"]), len(data["rows"])
    write_json(JSON, data)
    write_text(PAGE, markdown(data))


if __name__ == "__main__":
    main(sys.argv[1:])
