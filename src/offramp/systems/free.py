"""FREE: two depths only; tokens that left wait, and one parallel pass makes up for the blocks they skipped.

Delta from calm: axis = one exit after a quarter of the blocks, train = both depths' losses and shallow states that learn from deep ones,
calibrate = nothing beforehand, threshold = a mixture of two Beta distributions that follows the text, fill = catching up in parallel.

Deviations from the released code (PyTorch, github.com/raymin0223/fast_robust_early_exit):
    - A decoder alone; the release is for T5, an encoder and a decoder.
    - At most ``cap`` tokens wait; in the release any number. Rows of a batch each wait for themselves; the release has one row.
    - Each row's mixture learns while its text is written. The one given stays as it was: a run gives back what it has learned in all, to
      be given to the next. The release keeps one mixture and fits it anew between texts.
    - The chosen deep states are spread evenly for any depth; the release lists them for 12 and 24 blocks.

Checked against the released code: its options, and the gap of the two likeliest tokens as the score. Against notes on it: the stack of
waiting tokens and its one pass with a causal mask, the grid of thresholds and zeta = 0.4, alpha = 0.5 and 6 of 24 blocks in its scripts.
Title, authors, venue: its README. The claim: FREE has the better trade-off than leaving at a fixed depth, which the release calls static
exiting; measured as agreement with the full model at equal cost. The paper compares scores of summaries and translations.

Reference: S. Bae, J. Ko, H. Song, S.-Y. Yun. Fast and Robust Early-Exiting Framework for Autoregressive Language Models with Synchronized
Parallel Decoding. EMNLP 2023. arXiv:2310.05424.
"""

from __future__ import annotations

from offramp.budget.agreement import BetaMixture
from offramp.core.errors import InvalidInput
from offramp.core.system import Card, Predicate, System
from offramp.exits.lm import Shared
from offramp.exits.placement import AfterBlocks
from offramp.policies.decoding import CatchUp
from offramp.policies.threshold import Margin
from offramp.train.text_recipes import ShallowDeep

CARD = Card(
    name="free",
    title="Fast and Robust Early-Exiting Framework for Autoregressive Language Models with Synchronized Parallel Decoding",
    authors="Sangmin Bae, Jongwoo Ko, Hwanjun Song, Se-Young Yun",
    year=2023,
    venue="EMNLP",
    arxiv="2310.05424",
    engine="generate",
    delta_from="calm",
    delta={
        "axis": "one exit after a quarter of the blocks",
        "train": "both depths' losses, shallow states learn from deep ones",
        "calibrate": "nothing beforehand",
        "threshold": "a mixture of two Beta distributions that follows the text",
        "fill": "waiting tokens catch up in one pass",
    },
    trained=True,
    status="sketch",
    claim="At equal cost, leaving by confidence agrees with the full model at least as often as a fixed depth does.",
    predicate=Predicate("gain_over_fixed", ">=", 0.0),
    bibtex="""
        @inproceedings{bae2023fast,
          title     = {Fast and Robust Early-Exiting Framework for Autoregressive Language Models with Synchronized Parallel Decoding},
          author    = {Bae, Sangmin and Ko, Jongwoo and Song, Hwanjun and Yun, Se-Young},
          booktitle = {Conference on Empirical Methods in Natural Language Processing (EMNLP)},
          year      = {2023},
          eprint    = {2310.05424},
          archiveprefix = {arXiv}
        }
    """,
)


def free(blocks: int = 24, exit_after: int = 6, alpha: float = 0.5, zeta: float = 0.4, cap: int = 8) -> System:
    """Compose FREE.

    Args:
        blocks: of the model, at least 2; the paper's T5-large has 24 in its decoder.
        exit_after: blocks of the shallow model, from 1 to ``blocks`` - 1; the release 6 of 24.
        alpha: weight of the states' part of the loss, >= 0; the release 0.5.
        zeta: how likely agreement must be to leave, in (0, 1); the release 0.4.
        cap: most tokens of a row that wait, at least 1.
    """
    if not 0 < exit_after < blocks:
        raise InvalidInput(f"exit_after must be from 1 to blocks - 1, got {exit_after} of {blocks}.")
    return System(
        card=CARD,
        rule=Margin(),
        head=Shared(),
        placement=AfterBlocks((exit_after / blocks,)),
        recipe=ShallowDeep(exit_after, alpha),
        fill=CatchUp(cap),
        threshold=BetaMixture(zeta),
    )
