"""Static schedule: of all depths by noise level, the same for every image, those of least loss for a cost. A control of rules.

Delta from ee-diffusion: skips = a schedule that is chosen by measurement, train = every exit at every level, so that any schedule may be
chosen afterwards.

Deviations: none; it is this library's own. The loss of every exit at every noise level is measured, and the choice of one depth for each
level within a budget is a multiple-choice knapsack, solved exactly. That losses of steps add up is an assumption.

Checked against no code: there is none; the choice is tested against trying every schedule.

Reference: H. Kellerer, U. Pferschy, D. Pisinger. Knapsack Problems. Springer 2004, chapter 11.
"""

from __future__ import annotations

from offramp.core.system import Card, Predicate, System
from offramp.policies.skips import DepthSchedule
from offramp.train.recipe import Joint
from offramp.train.text_recipes import Mean

CARD = Card(
    name="static-schedule",
    title="Knapsack Problems",
    authors="Hans Kellerer, Ulrich Pferschy, David Pisinger",
    year=2004,
    venue="Springer",
    engine="denoise",
    delta_from="ee-diffusion",
    delta={"skips": "a schedule that is chosen by measurement", "train": "every exit at every level"},
    trained=True,
    status="sketch",
    claim="At equal FLOPs the FID is at most that of a constant depth, which is one of the schedules.",
    predicate=Predicate("gain_over_shallow", ">=", 0.0),
    bibtex="""
        @book{kellerer2004knapsack,
          title     = {Knapsack Problems},
          author    = {Kellerer, Hans and Pferschy, Ulrich and Pisinger, David},
          publisher = {Springer},
          year      = {2004}
        }
    """,
)


def static_schedule() -> System:
    """Compose the control; `calibrate` chooses the depths."""
    return System(card=CARD, recipe=Joint(Mean()), skips=DepthSchedule())
