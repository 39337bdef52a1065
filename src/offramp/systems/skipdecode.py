"""SkipDecode: every position has its depth, the later the shallower, and it is the lower blocks that are jumped.

Delta from calm: rule = none, head = none, axis = no exits: the last blocks always run, train = under the schedule, calibrate = nothing,
threshold = none, fill = a schedule by position, so that nothing is ever missing.

Deviations (no code was released; rebuilt from the abstract and from notes on the paper):
    - Depth falls along a line from the first new token to the last; most and least follow from the mean share of blocks that is asked for,
      the steepest line of those that meet it. Prompts use the most.
    - In training each text is taken as one, from its first token to its last; the paper fine-tunes on tasks, with prompts.

Checked against the abstract: title, authors, one exit point for all rows at a position, which never rises, lower to middle blocks that are
bypassed, OPT models of 1.3 and 6.7 B parameters (24 and 32 blocks), no key or value recomputed, and the claim: negligible regression at
half of the blocks or less. That is taken as a perplexity of at most 1.05 times the full model's, trained as long without a schedule, at
half of the blocks; the 5 % is this library's. Not checked, for want of the paper's full text: the line, the blocks that always run, the
fine-tuning.

Reference: L. Del Corro, A. Del Giorno, S. Agarwal, B. Yu, A. Awadallah, S. Mukherjee. SkipDecode: Autoregressive Skip Decoding with
Batching and Caching for Efficient LLM Inference. 2023. arXiv:2307.02628.
"""

from __future__ import annotations

from offramp.budget.depth_schedule import LinearDepth
from offramp.core.errors import InvalidInput
from offramp.core.system import Card, Predicate, System
from offramp.policies.decoding import Scheduled
from offramp.train.text_recipes import Skipping

CARD = Card(
    name="skipdecode",
    title="SkipDecode: Autoregressive Skip Decoding with Batching and Caching for Efficient LLM Inference",
    authors="Luciano Del Corro, Allie Del Giorno, Sahaj Agarwal, Bin Yu, Ahmed Awadallah, Subhabrata Mukherjee",
    year=2023,
    venue="arXiv",
    arxiv="2307.02628",
    engine="generate",
    delta_from="calm",
    delta={
        "rule": "none",
        "head": "none",
        "axis": "no exits: the last blocks always run",
        "train": "under the schedule",
        "calibrate": "nothing",
        "threshold": "none",
        "fill": "a schedule by position, so that nothing is missing",
    },
    trained=True,
    status="sketch",
    claim="With half of the blocks on average, perplexity is within 5 % of the full model's.",
    predicate=Predicate("perplexity_ratio", "<=", 1.05, budget=0.5),
    bibtex="""
        @misc{delcorro2023skipdecode,
          title  = {{SkipDecode}: Autoregressive Skip Decoding with Batching and Caching for Efficient {LLM} Inference},
          author = {Del Corro, Luciano and Del Giorno, Allie and Agarwal, Sahaj and Yu, Bin and Awadallah, Ahmed and Mukherjee, Subhabrata},
          year   = {2023},
          eprint = {2307.02628},
          archiveprefix = {arXiv}
        }
    """,
)


def skipdecode(blocks: int = 24, share: float = 0.5, length: int = 256, warmup: int = 1, most: int | None = None) -> System:
    """Compose SkipDecode.

    Args:
        blocks: of the model, at least 2; the paper's OPT models have 24 and 32.
        share: of the blocks that run, on average over the new tokens, in (0, 1]; at most this, and as near to it as can be. Paper down to
            0.2.
        length: new tokens of a text, at least 1, for which the share is meant.
        warmup: first blocks that always run, at least 0; 1 by the notes.
        most: blocks at the first new token, if that is settled.
    """
    if not 0 < share <= 1:
        raise InvalidInput(f"share must be in (0, 1], got {share}.")
    schedule = LinearDepth.for_speedup(blocks, 1 / share, length, warmup=warmup, most=most)
    return System(card=CARD, recipe=Skipping(schedule), fill=Scheduled(schedule))
