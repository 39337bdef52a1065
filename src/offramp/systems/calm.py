"""CALM: a token leaves at the first block that is sure enough; blocks behind take their keys and values from the state it left with.

Delta: the base of the methods here that let tokens leave, so none is named.

Deviations from the released code (JAX, t5x and flaxformer):
    - A decoder alone; the release is for T5, an encoder and a decoder.
    - Rows of a batch leave by themselves; the release lets all leave when the least sure is sure.
    - Thresholds are tested on texts that an accepting run wrote, by the share of tokens that the full model would have chosen otherwise
      after the same text. The paper tests distances between whole texts (ROUGE, BLEU, F1), of which its released code has nothing.
    - Of its three scores, the gap of the two likeliest tokens. Similarity of states and a learned gate are parts too: `StateSimilarity`,
      `LearnedGate`.

Checked against notes on the released code: the gap as a score, exits after every block with the shared head, keys and values from copied
states, all without calibration. Against the CALM baseline in FREE's released code: the gap, and the threshold that falls to nine tenths of
itself. Title, authors, venue: the proceedings' abstract. Not checked, for want of the paper's full text: weights of the losses
(proportional to the block's number), the temperature, delta. The claim is the guarantee: what was promised of the text is kept on new
texts; one seed in twenty may fail by chance.

Reference: T. Schuster, A. Fisch, J. Gupta, M. Dehghani, D. Bahri, V. Q. Tran, Y. Tay, D. Metzler. Confident Adaptive Language Modeling.
NeurIPS 2022. arXiv:2207.07061.
"""

from __future__ import annotations

from offramp.budget.risk_control import LTT
from offramp.budget.targets import Risk
from offramp.core.system import Card, Predicate, System
from offramp.exits.lm import Shared
from offramp.exits.placement import EveryBlock
from offramp.policies.decoding import Copy, Decaying
from offramp.policies.threshold import Margin
from offramp.train.recipe import IndexWeighted, Joint

CARD = Card(
    name="calm",
    title="Confident Adaptive Language Modeling",
    authors="Tal Schuster, Adam Fisch, Jai Gupta, Mostafa Dehghani, Dara Bahri, Vinh Q. Tran, Yi Tay, Donald Metzler",
    year=2022,
    venue="NeurIPS",
    arxiv="2207.07061",
    engine="generate",
    guaranteed=True,
    trained=True,
    status="sketch",
    claim="The share of tokens that the full model would have chosen otherwise stays within the limit that was promised.",
    predicate=Predicate("excess", "<=", 0.0, over="worst"),
    bibtex="""
        @inproceedings{schuster2022confident,
          title     = {Confident Adaptive Language Modeling},
          author    = {Schuster, Tal and Fisch, Adam and Gupta, Jai and Dehghani, Mostafa and Bahri, Dara and Tran, Vinh Q. and Tay, Yi and Metzler, Donald},
          booktitle = {Advances in Neural Information Processing Systems (NeurIPS)},
          year      = {2022},
          eprint    = {2207.07061},
          archiveprefix = {arXiv}
        }
    """,  # noqa: E501
)


def calm(threshold: float = 0.9, temperature: float = 4.0, max_disagreement: float = 0.1, delta: float = 0.05) -> System:
    """Compose CALM.

    Args:
        threshold: gap of the two likeliest tokens to leave with at the first new token, in [0, 1], until calibration chooses it.
        temperature: how fast it falls to nine tenths, >= 0; 0 = it stays. Paper 4.
        max_disagreement: share of a text's tokens that may differ from what the full model would choose, in (0, 1).
        delta: chance that the promise fails, in (0, 1); paper 0.05.
    """
    return System(
        card=CARD,
        rule=Margin(),
        head=Shared(),
        placement=EveryBlock(),
        recipe=Joint(IndexWeighted()),
        calibrator=LTT(),
        target=Risk(max_disagreement=max_disagreement, delta=delta),
        fill=Copy(),
        threshold=Decaying(threshold, temperature),
    )
