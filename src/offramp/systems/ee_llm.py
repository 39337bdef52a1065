"""EE-LLM: exits trained along with the model, a threshold on the top probability, and skipped blocks recomputed with the next tokens.

Delta from calm: rule = top-1 probability in place of the gap of two, head = an output layer of its own, axis = exits after a quarter and
half of the blocks, train = small weights for the early exits, calibrate = nothing, threshold = one number that the user sets, fill =
waiting tokens run again with every later pass.

Deviations from the released code (PyTorch, Megatron; github.com/pan-x-c/EE-LLM):
    - Training in one process or data-parallel: pipeline parallelism, and the loss that carries gradients across its stages, are not part
      of it. Neither is inference that gains its time from a pipeline.
    - An exit has a norm of its own besides its output layer, both started as copies of the model's; the 7 B script has the output layer
      alone and starts it afresh.
    - Rows of a batch leave by themselves.

Checked against the released scripts and README: exits before blocks 9 and 17 of 32 counted from 1, weights 0.1 and 0.2, output layers that
are not tied, no warm-up in the 7 B script (an option of the others). By notes on the client: 0.8 as its default threshold. Title and
authors: its README; the venue is that of the published paper. Not checked, for want of the paper's full text: how many tokens may wait.
The claim is the abstract's: faster without compromising output. That is taken as agreement on 99 % of the tokens at the default threshold;
the 99 % is this library's.

Reference: Y. Chen, X. Pan, Y. Li, B. Ding, J. Zhou. EE-LLM: Large-Scale Training and Inference of Early-Exit Large Language Models with 3D
Parallelism. ICML 2024. arXiv:2312.04916.
"""

from __future__ import annotations

from offramp.core.system import Card, Predicate, System
from offramp.exits.lm import OwnOutput
from offramp.exits.placement import AfterBlocks
from offramp.policies.decoding import Recompute
from offramp.policies.threshold import Confidence
from offramp.train.recipe import Joint
from offramp.train.text_recipes import Warmed

CARD = Card(
    name="ee-llm",
    title="EE-LLM: Large-Scale Training and Inference of Early-Exit Large Language Models with 3D Parallelism",
    authors="Yanxi Chen, Xuchen Pan, Yaliang Li, Bolin Ding, Jingren Zhou",
    year=2024,
    venue="ICML",
    arxiv="2312.04916",
    engine="generate",
    delta_from="calm",
    delta={
        "rule": "top-1 probability",
        "head": "an output layer of its own",
        "axis": "exits after a quarter and half of the blocks",
        "train": "small weights for the early exits",
        "calibrate": "nothing",
        "threshold": "one number that the user sets",
        "fill": "waiting tokens run again with every later pass",
    },
    trained=True,
    status="sketch",
    claim="At the default threshold, fewer blocks run and 99 % of the tokens are what the full model would choose.",
    predicate=Predicate("agreement", ">=", 0.99),
    bibtex="""
        @inproceedings{chen2024eellm,
          title     = {{EE-LLM}: Large-Scale Training and Inference of Early-Exit Large Language Models with {3D} Parallelism},
          author    = {Chen, Yanxi and Pan, Xuchen and Li, Yaliang and Ding, Bolin and Zhou, Jingren},
          booktitle = {International Conference on Machine Learning (ICML)},
          year      = {2024},
          eprint    = {2312.04916},
          archiveprefix = {arXiv}
        }
    """,
)


def ee_llm(
    shares: tuple[float, ...] = (0.25, 0.5),
    weights: tuple[float, ...] = (0.1, 0.2),
    warmup: float = 0.0,
    threshold: float = 0.8,
    cap: int = 8,
) -> System:
    """Compose EE-LLM.

    Args:
        shares: of the blocks before each exit, each inside (0, 1); the 7 B model's 8 and 16 of 32.
        weights: of the early exits' losses, one each, >= 0; the model's own has 1.
        warmup: share of the training in which they rise from 0, in [0, 1].
        threshold: top probability to leave with, in [0, 1]; the release's client 0.8.
        cap: most tokens of a row that may wait for a full pass, at least 1.
    """
    return System(
        card=CARD,
        rule=Confidence(),
        head=OwnOutput(),
        placement=AfterBlocks(tuple(shares)),
        recipe=Joint(Warmed((*weights, 1.0), warmup)),
        fill=Recompute(cap),
        threshold=threshold,
    )
