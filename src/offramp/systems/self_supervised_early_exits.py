"""Self-supervised early exits: heads on a frozen model learn what it would say; one tolerance gives each of them its threshold.

Delta from calm: rule = entropy in place of the gap of two, head = an output layer of its own, axis = exits after each fifth of the blocks,
train = heads alone, on the model's own distribution, calibrate = the loosest threshold that agrees often enough, threshold = one for each
exit, from data, fill = catching up in parallel.

Deviations (no code was read; rebuilt from the abstract and from summaries):
    - A head is a norm and an output layer, started as copies of the model's; the paper's has a hidden layer and starts afresh.
    - What becomes of keys and values behind an exit is not said in what could be read; here waiting tokens catch up, which is exact.
    - The later version of the paper, in which the first head that is sure enough drafts and the model verifies, is not composed here.

Checked against the abstracts of both versions and a summary: title, author, heads at the four fifths, frozen model, the divergence to the
model's own distribution, entropy as the best score, a calibration set and one tolerance. Not checked, for want of the full text: the
tolerances tried. The claim is that of calibration: what was tolerated is kept. It is measured on new texts, among the tokens that left,
given the text before each; the 2 % of slack is this library's, since no test protects the loosest threshold that looks good.

Reference: F. Valade. Accelerating Large Language Model Inference with Self-Supervised Early Exits. 2024. arXiv:2407.21082.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from offramp.budget.agreement import tolerant_thresholds
from offramp.core.errors import InvalidInput
from offramp.core.system import Card, Predicate, System
from offramp.exits.lm import OwnOutput
from offramp.exits.placement import AfterBlocks
from offramp.policies.decoding import CatchUp
from offramp.policies.threshold import Entropy
from offramp.train.recipe import Distill, Frozen

CARD = Card(
    name="self-supervised-early-exits",
    title="Accelerating Large Language Model Inference with Self-Supervised Early Exits",
    authors="Florian Valade",
    year=2024,
    venue="arXiv",
    arxiv="2407.21082",
    engine="generate",
    delta_from="calm",
    delta={
        "rule": "entropy",
        "head": "an output layer of its own",
        "axis": "exits after each fifth of the blocks",
        "train": "heads alone, on the model's own distribution",
        "calibrate": "the loosest threshold that agrees often enough",
        "threshold": "one for each exit, from data",
        "fill": "waiting tokens catch up in one pass",
    },
    trained=True,
    status="sketch",
    claim="Of the tokens that leave, the share that the full model would choose otherwise exceeds the tolerance by at most 2 %.",
    predicate=Predicate("excess", "<=", 0.02, over="worst"),
    bibtex="""
        @misc{valade2024accelerating,
          title  = {Accelerating Large Language Model Inference with Self-Supervised Early Exits},
          author = {Valade, Florian},
          year   = {2024},
          eprint = {2407.21082},
          archiveprefix = {arXiv}
        }
    """,
)


@dataclass(frozen=True)
class _Tolerant:
    """The loosest threshold of each exit at which at most this share of the calibration tokens that reach it disagree."""

    tolerance: float

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < 1:
            raise InvalidInput(f"tolerance must be in [0, 1), got {self.tolerance}.")

    def __call__(self, scores: Tensor, agreed: Tensor) -> tuple[float, ...]:
        return tolerant_thresholds(scores, agreed, self.tolerance)


def self_supervised_early_exits(shares: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8), tolerance: float = 0.1, cap: int = 8) -> System:
    """Compose self-supervised early exits.

    Args:
        shares: of the blocks before each exit, each inside (0, 1); paper the four fifths.
        tolerance: share of the tokens that leave which may disagree with the full model, in [0, 1).
        cap: most tokens of a row that wait, at least 1.
    """
    return System(
        card=CARD,
        rule=Entropy(),
        head=OwnOutput(),
        placement=AfterBlocks(tuple(shares)),
        recipe=Frozen(Distill(temperature=1.0, alpha=1.0)),
        calibrator=_Tolerant(tolerance),
        fill=CatchUp(cap),
    )
