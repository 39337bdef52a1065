"""EERO: every exit is a classifier that may reject; exit shares come from exponential weights under a budget. After training.

Delta from msdnet-budget: calibrate = exponential weights on the measured risk of each exit under the budget, in place of geometric
shares; train, score and rule are the same.

Deviations (written from the paper's description; no code of the authors was compared):
    - The aggregation is rebuilt: shares proportional to ``exp(-beta risk - nu cost)``, with the
      smallest nu >= 0 that keeps the budget; the exact form of the paper's weights may differ.
    - The paper adds noise to scores to break ties. A run compares plain scores, so a group of equal scores stays together.

Reference: F. Valade, M. Hebiri, P. Gay. EERO: Early Exit with Reject Option for Efficient Classification with limited budget. 2024.
arXiv:2402.03779.
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
    year=2024,
    venue="arXiv",
    arxiv="2402.03779",
    engine="classify",
    delta_from="msdnet-budget",
    delta={"calibrate": "exponential weights under a budget, reject-option quantiles"},
    trained=True,
    status="sketch",
    claim="A budget that was set on held-out inputs is kept on new ones: the mean cost exceeds it by at most 2 % of the full model's.",
    predicate=Predicate("excess", "<=", 0.02, over="worst"),
    bibtex="""
        @article{valade2024eero,
          title   = {EERO: Early Exit with Reject Option for Efficient Classification with limited budget},
          author  = {Valade, Florian and Hebiri, Mohamed and Gay, Paul},
          journal = {arXiv preprint arXiv:2402.03779},
          year    = {2024}
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
