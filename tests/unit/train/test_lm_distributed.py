"""Two processes train the exits of a language model as one process does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

RUN = """
import sys
sys.path.insert(0, sys.argv[1])
import conftest
sys.path.insert(0, sys.argv[1] + "/unit/train")
import os
from lm_texts import corpus, llama
from safetensors.torch import save_file
import torch
from offramp.exits.cached import Adapter
from offramp.language import attach_lm
from offramp.train import EarlyExitLoss, Rotating, ShallowDeep, fit, text_loader

share = 8 // int(os.environ.get("WORLD_SIZE", 1))
found = {}
turning = EarlyExitLoss((2, 3), 4, 0.5, Rotating(2))
for name, recipe, exits in (("soft", None, [2]), ("layerskip", turning, [2, 3]), ("free", ShallowDeep(2), [2])):
    lm = attach_lm(llama(), exits, Adapter(heads=2))
    loader = text_loader(corpus()[:32], share, shuffle=False)
    fit(lm, loader, recipe, epochs=1, progress=False, optimizer=lambda p: torch.optim.SGD(p, 0.1))
    found |= {f"{name}.{k}": v.clone() for part in (lm.heads, lm.model) for k, v in part.state_dict().items()}
save_file(found, sys.argv[2] + os.environ.get("RANK", "alone"))
"""


def _environment() -> dict[str, str]:
    given = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
    return {**given, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="accelerate would put both processes on the one GPU")
def test_two_processes_train_what_one_does(tmp_path):
    program, tests, out = tmp_path / "run.py", str(Path(__file__).resolve().parents[2]), str(tmp_path / "weights-")
    program.write_text(RUN)
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(program), tests, out]
    started = [
        subprocess.Popen(command, env=_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for command in ([sys.executable, str(program), tests, out], two)
    ]
    try:
        for process in started:
            _, errors = process.communicate(timeout=180)
            assert process.returncode == 0, errors
    finally:
        for process in started:
            process.kill()
    alone, first, second = (load_file(f"{out}{who}") for who in ("alone", "0", "1"))
    assert alone.keys() == first.keys() == second.keys()
    for key, value in alone.items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], value, rtol=1e-4, atol=1e-5)
