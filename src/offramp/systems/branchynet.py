"""BranchyNet: side branches trained together, left when the entropy of their answer is low.

Delta: none, it is the base that later methods change. Axes: score = entropy, rule = threshold, train = joint weighted sum, calibrate =
one threshold.

Deviations from the paper and the released code (Chainer):
    - Branches are pooled linear heads, so that any model can carry them; the paper's have one to three convolutions before the linear
      layer. Give others with ``attach(..., head=...)``.
    - The paper has a threshold per branch and screens them on a grid, on the test images; here one threshold, shared by all branches, is
      placed exactly for a mean cost on held-out items.
    - The paper starts from the weights of the trained network without branches and finds random ones clearly less accurate. `fit` starts
      from what the model has; `offramp reproduce` trains the network with branches from random weights.
    - The paper's gains are run time at batch 1; costs here are FLOPs.

Checked against the paper's text and the released code, both in github.com/kunglab/branchynet: title, authors, loss (III-B; weights of the
released networks all 1), entropy in nats below a threshold (III-C), branches of each network and initialisation (IV), weights (V-A), and
the claim (Table I): no less accurate for LeNet and AlexNet, though less accurate for ResNet-110. The cost of the claim is the run time of
AlexNet on a CPU there, the smallest saving in that table.

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
        weights: of the K = ``exits`` + 1 losses, each >= 0, the model's own last (section III-B); ``None`` = all 1, as in the released
            networks. Section V-A finds 1 for the one branch and 0.3 for the last exit better on a small AlexNet.
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
