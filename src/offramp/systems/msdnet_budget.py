"""MSDNet's budgeted batch classification: exits are filled in geometric shares, the most confident inputs first. The rule only.

Delta from branchynet: score = top-1 probability in place of entropy, calibrate = geometric exit shares with a threshold per exit in
place of one shared threshold, axis = four early exits, head = whatever the network has.

Deviations from the released code (PyTorch, github.com/kalviny/MSDNet-PyTorch, which the authors' own repository points to):
    - The multi-scale dense architecture is not part of it: the rule works on the exits of any model.
    - The release sweeps the ratio q over 0.05, 0.10, ..., 1.95; here q is found for the mean cost that is asked for.
    - Thresholds lie halfway between two scores and not on one, so that rounding does not move an input.
    - The first release (Torch, github.com/gaohuang/MSDNet) has an option, on by default, to average the exits in early exit, but not the
      script that reads it. Nothing is averaged here, nor in the PyTorch release.

Checked against both repositories: title, authors, venue, shares ``q^k``, the procedure for thresholds, top-1 probability as score, the
plain sum of losses, thresholds from held-out training images (5000 of CIFAR). The PyTorch release's routine was run on made-up scores:
for each ratio it sweeps the same items leave at the same exits (``benchmarks/results/parity.json``), hence the status. Not checked, for
want of the paper's full text: the wording of the claim. The abstract speaks of a budget spent unevenly on easy and hard inputs and names
no cost, so the claim is measured over all budgets.

Reference: G. Huang, D. Chen, T. Li, F. Wu, L. van der Maaten, K. Q. Weinberger. Multi-Scale Dense Networks for Resource Efficient Image
Classification. ICLR 2018. arXiv:1703.09844 (budgeted batch classification).
"""

from __future__ import annotations

from offramp.budget.mean_cost import GeometricShares
from offramp.budget.targets import MeanCost
from offramp.core.system import Card, Predicate, System
from offramp.exits.placement import Evenly
from offramp.policies.threshold import Confidence
from offramp.train.recipe import Equal, Joint

CARD = Card(
    name="msdnet-budget",
    title="Multi-Scale Dense Networks for Resource Efficient Image Classification",
    authors="Gao Huang, Danlu Chen, Tianhong Li, Felix Wu, Laurens van der Maaten, Kilian Q. Weinberger",
    year=2018,
    venue="ICLR",
    arxiv="1703.09844",
    engine="classify",
    delta_from="branchynet",
    delta={
        "rule": "top-1 probability",
        "calibrate": "geometric exit shares, a threshold per exit",
        "axis": "four early exits",
        "head": "whatever the network has",
    },
    trained=True,
    status="reference",
    claim="At equal mean cost, spending more on the inputs that are hard is more accurate than giving every input the same exit.",
    predicate=Predicate("gain_over_fixed", ">=", 0.0, over="mean"),
    bibtex="""
        @inproceedings{huang2018multiscale,
          title     = {Multi-Scale Dense Networks for Resource Efficient Image Classification},
          author    = {Huang, Gao and Chen, Danlu and Li, Tianhong and Wu, Felix and van der Maaten, Laurens and Weinberger, Kilian Q.},
          booktitle = {International Conference on Learning Representations (ICLR)},
          year      = {2018},
          eprint    = {1703.09844},
          archiveprefix = {arXiv}
        }
    """,
)


def msdnet_budget(exits: int = 4, mean_cost: float = 0.5) -> System:
    """Compose MSDNet's budget rule.

    Args:
        exits: early exits, at least 1. The PyTorch release's budgeted CIFAR-100 network has 5 classifiers, so 4 early ones; the Torch
            release's for CIFAR-10 has 7.
        mean_cost: budget, as a share of the full model's FLOPs, > 0. The paper sweeps it.
    """
    return System(
        card=CARD,
        rule=Confidence(),
        placement=Evenly(exits),
        recipe=Joint(Equal()),
        calibrator=GeometricShares(),
        target=MeanCost(mean_cost),
    )
