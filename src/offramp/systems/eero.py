"""EERO: every exit is a classifier that may reject; exit shares come from exponential weights under a budget. After training.

Delta from msdnet-budget: calibrate = exponential weights on the measured risk of each exit under the budget, in place of geometric
shares; train, score and rule are the same.

Deviations (rebuilt from the abstract and from notes on the paper):
    - The aggregation: shares proportional to ``exp(-beta risk - nu cost)``, with the smallest nu >= 0 that keeps the budget. The paper's
      weights may have another form.
    - By those notes the paper adds noise to scores to break ties. A run compares plain scores, so a group of equal scores stays together.

Checked against the proceedings' page and the abstract: title, authors, venue, year, arXiv number, and that shares come from exponential
weights on risk and cost of each exit "to guarantee a fixed budget", which is the claim here; the tolerance of 2 % is this library's. Not
checked: the formula, the score, the noise and the training, since neither the full text nor the authors' code
(github.com/FlorianVal/Early-Exit-With-Reject-Option, named on the paper's OpenReview page) could be read.

Reference: F. Valade, M. Hebiri, P. Gay. EERO: Early Exit with Reject Option for Efficient Classification with limited budget. UAI 2025,
PMLR 286:4290-4308. arXiv:2402.03779.
"""

from __future__ import annotations

from offramp.budget.mean_cost import ExponentialWeights
from offramp.budget.targets import MeanCost
from offramp.core.system import Card, Predicate, System
from offramp.exits.placement import Evenly
from offramp.policies.threshold import Confidence
from offramp.train.recipe import Equal, Joint

CARD = Card(
    name="eero",
    title="EERO: Early Exit with Reject Option for Efficient Classification with limited budget",
    authors="Florian Valade, Mohamed Hebiri, Paul Gay",
    year=2025,
    venue="UAI",
    arxiv="2402.03779",
    engine="classify",
    delta_from="msdnet-budget",
    delta={"calibrate": "exponential weights under a budget, reject-option quantiles"},
    trained=True,
    status="sketch",
    claim="A budget that was set on held-out inputs is kept on new ones: the mean cost exceeds it by at most 2 % of the full model's.",
    predicate=Predicate("excess", "<=", 0.02, over="worst"),
    bibtex="""
        @inproceedings{valade2025eero,
          title     = {EERO: Early Exit with Reject Option for Efficient Classification with limited budget},
          author    = {Valade, Florian and Hebiri, Mohamed and Gay, Paul},
          booktitle = {Conference on Uncertainty in Artificial Intelligence (UAI)},
          series    = {Proceedings of Machine Learning Research},
          volume    = {286},
          pages     = {4290--4308},
          year      = {2025},
          eprint    = {2402.03779},
          archiveprefix = {arXiv}
        }
    """,
)


def eero(beta: float = 10.0, exits: int = 4, mean_cost: float = 0.5) -> System:
    """Compose EERO.

    Args:
        beta: trust in the measured risk of each exit, >= 0 per unit of loss; 0 ignores it, large values favour the most accurate exit
            within the budget. A choice of this library, not of the paper.
        exits: early exits, at least 1.
        mean_cost: budget, as a share of the full model's FLOPs, > 0.
    """
    return System(
        card=CARD,
        rule=Confidence(),
        placement=Evenly(exits),
        recipe=Joint(Equal()),
        calibrator=ExponentialWeights(beta),
        target=MeanCost(mean_cost),
    )
