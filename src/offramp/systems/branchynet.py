"""BranchyNet: side branches trained together, left when the entropy of their answer is low.

Delta: none, it is the base that later methods change. Axes: score = entropy, rule = threshold, train = joint weighted sum, calibrate =
one threshold.

Deviations from the released code (Chainer):
    - Branches are pooled linear heads, so that any model can carry them; the paper's have one or more convolutions. Give others with
      ``attach(..., head=...)``.
    - The paper screens thresholds on a grid; here one threshold is placed exactly for a mean cost.
    - The paper starts from the weights of a trained network; so does `fit` when the model has them.

Reference: S. Teerapittayanon, B. McDanel, H. T. Kung. BranchyNet: Fast Inference via Early Exiting from Deep Neural Networks. ICPR 2016.
arXiv:1709.01686.
"""

from __future__ import annotations

from offramp.budget.mean_cost import QuantileCost
from offramp.budget.targets import MeanCost
from offramp.core.system import Card, Predicate, System
from offramp.exits.linear import PooledLinear
from offramp.exits.placement import Evenly
from offramp.policies.threshold import Entropy
from offramp.train.recipe import Equal, Explicit, Joint

CARD = Card(
    name="branchynet",
    title="BranchyNet: Fast Inference via Early Exiting from Deep Neural Networks",
    authors="Surat Teerapittayanon, Bradley McDanel, H. T. Kung",
    year=2016,
    venue="ICPR",
    arxiv="1709.01686",
    engine="classify",
    trained=True,
    status="sketch",
    claim="At two thirds of the cost, leaving at low entropy is as accurate as the same network trained without branches.",
    predicate=Predicate("drop", "<=", 0.0, budget=0.67),
    bibtex="""
        @inproceedings{teerapittayanon2016branchynet,
          title     = {BranchyNet: Fast Inference via Early Exiting from Deep Neural Networks},
          author    = {Teerapittayanon, Surat and McDanel, Bradley and Kung, H. T.},
          booktitle = {International Conference on Pattern Recognition (ICPR)},
          year      = {2016},
          eprint    = {1709.01686},
          archiveprefix = {arXiv}
        }
    """,
)


def branchynet(exits: int = 2, weights: tuple[float, ...] | None = None, mean_cost: float = 0.5) -> System:
    """Compose BranchyNet.

    Args:
        exits: branches, at least 1; the paper uses 1 (LeNet) or 2 (AlexNet, ResNet).
        weights: of the K = ``exits`` + 1 losses, each >= 0, the model's own last (section III-B); ``None`` = all 1. The paper leaves them
            as hyper-parameters.
        mean_cost: budget, as a share of the full model's FLOPs, > 0. The paper has none: it plots all.
    """
    return System(
        card=CARD,
        rule=Entropy(),
        head=PooledLinear(),
        placement=Evenly(exits),
        recipe=Joint(Equal() if weights is None else Explicit(tuple(weights))),
        calibrator=QuantileCost(),
        target=MeanCost(mean_cost),
    )
