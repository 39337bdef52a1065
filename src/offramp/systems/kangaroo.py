"""Kangaroo: a frozen model drafts from its first blocks through a small adapter, and stops drafting when it is unsure.

Delta from layerskip: head = an adapter of one attention and two norms, axis = one exit after a sixteenth of the blocks, train = the
adapter alone, on the model's own distribution, draft = stops after a draft below a probability.

Deviations from the released code (PyTorch, github.com/Equationliu/Kangaroo):
    - Batches of several rows, and sampling; the release decodes one row greedily.
    - What the adapter lacks after a round in which every draft was kept is shown to it in that round, not in the next.
    - The adapter is trained in one process on states of the running model; the release stores states on disk first.

Checked against the released code: the exit after 2 of the 32 blocks of the 7 B model, threshold 0.6 and at most 6 drafts (its command),
the comparison (drafting stops after a draft whose probability is below the threshold), the adapter without a feed-forward part, the
longest equal prefix and one token more. Not checked, for want of the paper's full text: the numbers of the training. The claim is that the
second early exit, that of the drafting, beats every fixed number of drafts; measured in weights read for a token.

Reference: F. Liu, Y. Tang, Z. Liu, Y. Ni, K. Han, Y. Wang. Kangaroo: Lossless Self-Speculative Decoding via Double Early Exiting. 2024.
arXiv:2404.18911.
"""

from __future__ import annotations

from offramp.core.system import Card, Predicate, System
from offramp.exits.cached import Adapter
from offramp.exits.placement import AfterBlocks
from offramp.policies.decoding import Verify
from offramp.policies.draft_stop import BelowProbability
from offramp.train.recipe import Distill, Frozen

CARD = Card(
    name="kangaroo",
    title="Kangaroo: Lossless Self-Speculative Decoding via Double Early Exiting",
    authors="Fangcheng Liu, Yehui Tang, Zhenhua Liu, Yunsheng Ni, Kai Han, Yunhe Wang",
    year=2024,
    venue="arXiv",
    arxiv="2404.18911",
    engine="generate",
    delta_from="layerskip",
    delta={
        "head": "an adapter of one attention and two norms",
        "axis": "one exit after a sixteenth of the blocks",
        "train": "the adapter alone, on the model's own distribution",
        "draft": "stops after a draft below a probability",
    },
    lossless=True,
    trained=True,
    status="sketch",
    claim="Stopping when the exit is unsure makes a token of the model's own text cheaper than any fixed number of drafts does.",
    predicate=Predicate("gain_over_fixed", ">=", 0.0),
    bibtex="""
        @misc{liu2024kangaroo,
          title  = {Kangaroo: Lossless Self-Speculative Decoding via Double Early Exiting},
          author = {Liu, Fangcheng and Tang, Yehui and Liu, Zhenhua and Ni, Yunsheng and Han, Kai and Wang, Yunhe},
          year   = {2024},
          eprint = {2404.18911},
          archiveprefix = {arXiv}
        }
    """,
)


def kangaroo(share: float = 2 / 32, probability: float = 0.6, draft_length: int = 6) -> System:
    """Compose Kangaroo.

    Args:
        share: of the blocks before the exit, inside (0, 1); the release uses 2 of 32 blocks (7 B) or 3 of 40 (13 B).
        probability: of a draft below which drafting stops, in [0, 1]; the release 0.6.
        draft_length: most drafts in a round, at least 1; the release 6.
    """
    return System(
        card=CARD,
        head=Adapter(),
        placement=AfterBlocks((share,)),
        recipe=Frozen(Distill(temperature=1.0, alpha=1.0)),
        draft=Verify(draft_length, BelowProbability(probability)),
    )
