"""EESD: a frozen model drafts from its first blocks through one more block, and Thompson sampling decides how long.

Delta from kangaroo: head = a block of the model's own kind in place of the adapter, axis = an exit after an eighth of the blocks, draft =
Thompson sampling in place of a threshold on the probability.

Deviations (no code was released; rebuilt from the abstract and from notes on the paper):
    - The share of the blocks before the exit and the most drafts of a round are choices of this library.
    - Self-distillation here: soft cross-entropy to the model's own distribution on the training text. The paper's is on text that the
      model wrote.
    - The exit's norm is its own, started as a copy of the model's; in the paper it is the model's, by those notes.
    - A single uniform number decides whether to go on, with the probability that drawing from the Beta distribution gives on average.
    - How Calibration-TS joins a draft's confidence with what was seen is not known; see `CalibratedThompson`. Tree attention is not part.

Checked against the proceedings' page and the abstract: title, authors, venue, an exit after the first N layers, self-distillation,
Thompson sampling that sets the number of drafts in each round, verification in one pass. Not checked: everything numeric. The claim is
that sampling the number of drafts beats a fixed one; measured in weights read for a token, against the best fixed number.

Reference: J. Liu, Q. Wang, J. Wang, X. Cai. Speculative Decoding via Early-exiting for Faster LLM Inference with Thompson Sampling Control
Mechanism. Findings of ACL 2024. arXiv:2406.03853.
"""

from __future__ import annotations

from offramp.core.system import Card, Predicate, System
from offramp.exits.cached import Block
from offramp.exits.placement import AfterBlocks
from offramp.policies.decoding import Verify
from offramp.policies.draft_stop import BetaThompson, CalibratedThompson
from offramp.train.recipe import Distill, Frozen

CARD = Card(
    name="eesd",
    title="Speculative Decoding via Early-exiting for Faster LLM Inference with Thompson Sampling Control Mechanism",
    authors="Jiahao Liu, Qifan Wang, Jingang Wang, Xunliang Cai",
    year=2024,
    venue="Findings of ACL",
    arxiv="2406.03853",
    engine="generate",
    delta_from="kangaroo",
    delta={
        "head": "a block of the model's own kind",
        "axis": "an exit after an eighth of the blocks",
        "draft": "Thompson sampling decides whether to go on",
    },
    lossless=True,
    trained=True,
    status="sketch",
    claim="Thompson sampling of the number of drafts makes a token of the model's own text cheaper than any fixed number does.",
    predicate=Predicate("gain_over_fixed", ">=", 0.0),
    bibtex="""
        @inproceedings{liu2024speculative,
          title     = {Speculative Decoding via Early-exiting for Faster {LLM} Inference with {T}hompson Sampling Control Mechanism},
          author    = {Liu, Jiahao and Wang, Qifan and Wang, Jingang and Cai, Xunliang},
          booktitle = {Findings of the Association for Computational Linguistics: ACL 2024},
          pages     = {3027--3043},
          year      = {2024},
          eprint    = {2406.03853},
          archiveprefix = {arXiv}
        }
    """,
)


def eesd(share: float = 1 / 8, draft_length: int = 10, calibrated: bool = False, a: float = 1.0, b: float = 1.0) -> System:
    """Compose EESD.

    Args:
        share: of the blocks before the exit, inside (0, 1).
        draft_length: most drafts in a round, at least 1.
        calibrated: Calibration-TS, which looks at a draft's confidence, in place of Beta-TS.
        a: of Beta-TS's prior, > 0; 1 by the notes.
        b: of Beta-TS's prior, > 0; 1 by the notes.
    """
    return System(
        card=CARD,
        head=Block(),
        placement=AfterBlocks((share,)),
        recipe=Frozen(Distill(temperature=1.0, alpha=1.0)),
        draft=Verify(draft_length, CalibratedThompson() if calibrated else BetaThompson(a, b)),
    )
