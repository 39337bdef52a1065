"""Elastic-Cache: a masked-diffusion language model keeps keys and values until attention drifts, and refreshes from where it does.

Delta: none, it changes no method here. Axis: which positions are computed in which blocks at a step of filling in masks; fill = keys and
values as they were when last computed; rule = a cosine of attention, tested in every block, for each row.

Deviations (no code could be read; rebuilt from the abstract, reviews and notes on the paper):
    - The watched token of a block is chosen when the block is refreshed, of the tokens that are written the one that candidates attend to
      most, and compared with what it attended to then; notes on the paper can also be read as with the step before (``rolling=True``). Its
      query is kept from then and asks the keys of now; ``fresh=True`` computes the token at every step instead.
    - A row that drifts at a block runs that block for all positions before the next ones. From states that were kept behind it, the next
      block's keys and values would be those that it has already. With a threshold above 1 the text is then exactly that of no cache.
    - The attention row is averaged over heads. Nothing is tested in the last block, behind which there is nothing to refresh.
    - Every row of a batch decides for itself; masks beyond the window are refreshed with the others, not in blocks of their own.

Checked against the abstract and the reviews of the published version: title, authors, venue, the sliding window of left-most masks, the
drift test on the most attended token of each block against a threshold gamma (0.9 for text), the refresh from the next block on, and that
answers are confident ones. Not checked, for want of the full text: the formula of the drift, window sizes (16 or 32 in the notes), the
confidence (0.9 there). The claim is that against fixed periods: at equal FLOPs, the text is nearer to that of no cache.

Reference: Q. Nguyen-Tri, M. Ranjan, Z. Shen. Attention Is All You Need for KV Cache in Diffusion LLMs. ICLR 2026. arXiv:2510.14973.
"""

from __future__ import annotations

from offramp.core.system import Card, Predicate, System
from offramp.policies.refresh import Elastic, Sliding, Unmask

CARD = Card(
    name="elastic-cache",
    title="Attention Is All You Need for KV Cache in Diffusion LLMs",
    authors="Quan Nguyen-Tri, Mukul Ranjan, Zhiqiang Shen",
    year=2026,
    venue="ICLR",
    arxiv="2510.14973",
    engine="unmask",
    trained=False,
    status="sketch",
    claim="At equal FLOPs the text agrees with that of no cache at least as well as under a refresh at fixed intervals.",
    predicate=Predicate("gain_over_fixed", ">=", 0.0),
    bibtex="""
        @inproceedings{nguyentri2026elastic,
          title     = {Attention Is All You Need for {KV} Cache in Diffusion {LLMs}},
          author    = {Nguyen-Tri, Quan and Ranjan, Mukul and Shen, Zhiqiang},
          booktitle = {International Conference on Learning Representations (ICLR)},
          year      = {2026},
          eprint    = {2510.14973},
          archiveprefix = {arXiv}
        }
    """,
)


def elastic_cache(drift: float = 0.9, window: int = 16, confidence: float = 0.9, rolling: bool = False, fresh: bool = False) -> System:
    """Compose Elastic-Cache.

    Args:
        drift: gamma, the cosine of attention below which a block has drifted; above 1 everything is computed at every step. Paper 0.9 for
            text.
        window: beta, how many of the left-most masks may be filled in, at least 1. Paper 16 or 32.
        confidence: epsilon, the probability from which on a mask is filled in, > 0; the surest one is in any case. Paper 0.9.
        rolling: compare attention with the step before instead of the last refresh.
        fresh: compute the watched tokens at every step too, for new queries.
    """
    return System(card=CARD, fill=Unmask(Elastic(drift, rolling, fresh), Sliding(window), confidence))
