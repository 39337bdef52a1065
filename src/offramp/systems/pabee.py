"""PABEE: leave when several layers in a row give the same answer.

Delta from branchynet: head = BERT's pooler on the first token, shared by all exits, axis = an exit after every block, score = length of
the current run of equal answers, train = loss weighted by depth.

Deviations from the released code (PyTorch, transformers):
    - A batch need not wait for its slowest member: rows leave one by one.
    - The patience is a threshold like any other, so it can be calibrated for a cost or a risk. Patience takes whole numbers only, hence
      the costs that can be met are few; calibration takes the largest within the budget.
    - The model's own answer keeps its own head; in the release the last layer shares the pooler too. No dropout before the heads.
    - The release fine-tunes pretrained ALBERT or BERT; `offramp reproduce` trains small networks from random weights.

Checked against the released code (github.com/JetRunner/PABEE) and its port in transformers' research projects: title, authors, venue, the
count of equal answers and its reset, the shared pooler, the loss and its weights, the tolerance of regression (the code's default is 0, the
port's notes advise 0.1), one input at a time. Run on given logits, the released rule leaves at the same layers and the released loss is the
same (``benchmarks/results/parity.json``). The claim is the first table of the port's notes, ALBERT-base on GLUE: no task is worse, at 0.64
of the cost; its second table reports BERT-base as less accurate. Not checked, for want of the paper's full text: its section numbers, and
the patience behind that table (the scripts try 3 to 8; PALBERT's code compares with 6, the default here).

Reference: W. Zhou, C. Xu, T. Ge, J. McAuley, K. Xu, F. Wei. BERT Loses Patience: Fast and Robust Inference with Early Exit. NeurIPS 2020.
arXiv:2006.04152.
"""

from __future__ import annotations

from offramp.budget.mean_cost import QuantileCost
from offramp.budget.targets import MeanCost
from offramp.core.errors import InvalidInput
from offramp.core.system import Card, Predicate, System
from offramp.exits.linear import PooledLinear
from offramp.exits.placement import EveryBlock
from offramp.exits.pooled import Pooler
from offramp.policies.agreement import Patience
from offramp.policies.combine import at
from offramp.train.recipe import IndexWeighted, Joint

CARD = Card(
    name="pabee",
    title="BERT Loses Patience: Fast and Robust Inference with Early Exit",
    authors="Wangchunshu Zhou, Canwen Xu, Tao Ge, Julian McAuley, Ke Xu, Furu Wei",
    year=2020,
    venue="NeurIPS",
    arxiv="2006.04152",
    engine="classify",
    delta_from="branchynet",
    delta={
        "head": "BERT's pooler on the first token, shared",
        "axis": "an exit after every block",
        "rule": "patience",
        "train": "weights that grow with depth",
    },
    trained=True,
    status="sketch",
    claim="At 0.64 of the cost, leaving when layers agree is at least as accurate as the full model trained alone.",
    predicate=Predicate("drop", "<=", 0.0, budget=0.64),
    bibtex="""
        @inproceedings{zhou2020bert,
          title     = {{BERT} Loses Patience: Fast and Robust Inference with Early Exit},
          author    = {Zhou, Wangchunshu and Xu, Canwen and Ge, Tao and McAuley, Julian and Xu, Ke and Wei, Furu},
          booktitle = {Advances in Neural Information Processing Systems (NeurIPS)},
          year      = {2020},
          eprint    = {2006.04152},
          archiveprefix = {arXiv}
        }
    """,
)


def pabee(patience: int = 6, regression_tolerance: float | None = None, tokens: bool = True, mean_cost: float = 0.5) -> System:
    """Compose PABEE.

    Args:
        patience: layers in a row that must agree with the one before them, at least 1; the authors' scripts try 3 to 8 with 12 layers. The
            rule leaves at threshold 0 with exactly this patience; calibration moves the threshold and so the patience.
        regression_tolerance: answers are numbers and agree if they differ by less than this (the authors advise 0.1); ``None`` for classes.
        tokens: the states are tokens. ``False`` for the maps of a convolutional network, which have no first token: each exit then has a
            pooled linear head.
        mean_cost: budget, as a share of the full model's FLOPs, > 0. The paper has none: it fixes the patience.
    """
    if patience < 1:
        raise InvalidInput(f"patience must be at least 1, got {patience}.")
    return System(
        card=CARD,
        rule=at(Patience(regression_tolerance), patience),
        head=Pooler(shared=True) if tokens else PooledLinear(),
        placement=EveryBlock(),
        recipe=Joint(IndexWeighted()),
        calibrator=QuantileCost(),
        target=MeanCost(mean_cost),
    )
